"""Private attributes of Lightning's training loop. ``tests/test_private_api.py`` pins their names and meaning."""

from typing import Any

from lightning import Trainer


def is_stopping(trainer: Trainer) -> bool:
    """Whether Lightning ends training now: early stopping and max_time wait for min_epochs and min_steps."""
    if trainer.global_step == trainer.max_steps:
        return True
    return trainer.should_stop and trainer.fit_loop._can_stop_early  # noqa: SLF001  # no public way


def is_accumulating(trainer: Trainer) -> bool:
    """Whether the last batch's gradients wait for those of the next one: a checkpoint would lack them."""
    return trainer.fit_loop.epoch_loop._should_accumulate()  # noqa: SLF001  # no public way


def validation_follows(trainer: Trainer) -> bool:
    """Whether Lightning validates after the current training batch."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]  # noqa: SLF001  # see above


def has_position(trainer: Trainer) -> bool:
    """Whether the dataloader can be resumed in the middle of an epoch; the user's own may not.

    From one without a length Lightning takes a batch in advance, and its position is one too far.
    """
    fetcher: Any = trainer.fit_loop._data_fetcher  # noqa: SLF001  # no public way
    return hasattr(trainer.train_dataloader, "state_dict") and fetcher.length is not None


def make_iterator(trainer: Trainer) -> None:
    """Makes the iterator of the training dataloader, in place of the one that Lightning has made."""
    iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]  # noqa: SLF001  # no public way


def reload_epochs(trainer: Trainer) -> list[int | float]:
    """The epochs in which Lightning last requested the loaders (trainer.reload_dataloaders_every_n_epochs)."""
    loop = trainer.fit_loop
    return [loop._last_train_dl_reload_epoch, loop.epoch_loop.val_loop._last_val_dl_reload_epoch]  # noqa: SLF001


def set_reload_epochs(trainer: Trainer, epochs: list[int | float]) -> None:
    """Sets what `reload_epochs` returns."""
    loop = trainer.fit_loop
    loop._last_train_dl_reload_epoch, loop.epoch_loop.val_loop._last_val_dl_reload_epoch = epochs  # noqa: SLF001
