import logging
import random
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from lightning import Callback
from pydantic import Field

from gate import StopIn
from helpers import outcome, run_experiment
from nin.checkpoints import files as checkpoint_files
from nin.config.schema import SGD, AdamW, Settings, UserError
from nin.config.schema import Checkpoint as CheckpointSettings
from nin.config.types import Section
from nin.runs.folder import RunFolder
from nin.system.processes import StoppedError, StopRequest
from nin.training import classifier, optimizers
from nin.training.callbacks import checkpoints
from nin.training.callbacks.checkpoints import ResumableCheckpoint
from nin.training.callbacks.metrics import MetricsLogger
from nin.training.trainer import build_trainer


def test_among_equal_accuracies_the_lowest_loss_is_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = MetricsLogger(tmp_path / "metrics.csv")
    chosen = CheckpointSettings(every_n_steps=None, every_n_minutes=None, keep=0)
    callback = ResumableCheckpoint(RunFolder(tmp_path), chosen, metrics, StopRequest())
    saved: list[bool] = []
    monkeypatch.setattr(callback, "_save", lambda trainer, save_point, best: saved.append(best))
    epochs = [(0.90, 0.5), (0.90, 0.4), (0.90, 0.45), (0.90, 0.4), (0.89, 0.1), (0.91, 0.9)]
    for metrics.scored_step, (acc, loss) in enumerate(epochs, start=1):
        metrics.scores = {"val/acc": acc, "val/loss": loss}
        callback.on_train_epoch_end(SimpleNamespace(global_step=metrics.scored_step), None)
    assert saved == [True, True, False, False, False, True]
    assert callback.best == {"val/acc": 0.91, "val/loss": 0.9}


@pytest.mark.parametrize(("own", "signum"), [(None, signal.SIGUSR1), (signal.SIGTERM, signal.SIGTERM)])
def test_processes_of_a_run_stop_by_the_signal_that_the_first_of_them_received(
    own: int | None, signum: int, tmp_path: Path
) -> None:
    # SLURM requeues a job if rank 0 stops by its signal, which may reach rank 0 last.
    chosen = CheckpointSettings(every_n_steps=None, every_n_minutes=None, keep=0)
    callback = ResumableCheckpoint(RunFolder(tmp_path), chosen, MetricsLogger(tmp_path / "metrics.csv"), StopRequest())
    callback.stop.signum = own
    strategy = SimpleNamespace(root_device="cpu", reduce=lambda own, reduce_op: max(own, torch.tensor(signal.SIGUSR1)))
    with pytest.raises(StoppedError) as stopped:
        callback._raise_if_requested(SimpleNamespace(world_size=2, strategy=strategy))  # type: ignore[arg-type]
    assert stopped.value.signum == signum


class Rprop(Section):
    """An optimizer that is added as CONTRIBUTING.md says: torch has no fused form of it, and it has no momentum."""

    name: Literal["rprop"]
    lr: float


class MoreSettings(Settings):
    optimizer: Annotated[SGD | AdamW | Rprop, Field(discriminator="name")]


@pytest.mark.parametrize("before", [False, True])
def test_a_resumed_run_computes_its_steps_as_its_own_settings_say(
    before: bool, settings: Callable[..., Settings]
) -> None:
    def build(fused: bool) -> torch.optim.Optimizer:
        chosen = settings(f"speed.fused_optimizer={fused}", "optimizer=adamw")
        return optimizers.build_optimizer(chosen, layer.parameters(), torch.device("cpu"))

    layer = torch.nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    saved, resumed = build(before), build(not before)
    saved.step()
    resumed.load_state_dict(saved.state_dict())
    assert [group["fused"] for group in resumed.param_groups] == [not before]
    assert resumed.state_dict()["state"][0]["step"] == 1
    resumed.step()


@pytest.mark.parametrize("chosen", ["optimizer=adamw", "optimizer=sgd optimizer.momentum=0.9"])
def test_a_state_is_resumed_in_another_memory_layout(chosen: str, settings: Callable[..., Settings]) -> None:
    """As `speed.channels_last`, which may differ when a run is resumed, gives the weights."""
    steps = []
    for layouts in ([torch.contiguous_format] * 2, [torch.contiguous_format, torch.channels_last]):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 8 * 4 * 3 * 3).reshape(8, 4, 3, 3))
        state = None
        for layout in layouts:
            weight = torch.nn.Parameter(weight.detach().to(memory_format=layout))
            optimizer = optimizers.build_optimizer(settings(*chosen.split()), [weight], torch.device("cpu"))
            if state:
                optimizer.load_state_dict(state)
            weight.grad = torch.linspace(-1, 3, weight.numel()).reshape(weight.shape).to(memory_format=layout)
            optimizer.step()
            state = optimizer.state_dict()
        steps.append(weight.detach())
    assert torch.equal(*steps)


@pytest.mark.parametrize("shape", [(), (1,), (10_000,)])
def test_the_state_of_other_weights_is_not_loaded(shape: tuple[int, ...], settings: Callable[..., Settings]) -> None:
    weight = torch.nn.Parameter(torch.zeros(20_000))
    weight.grad = torch.ones(20_000)
    optimizer = optimizers.build_optimizer(settings("optimizer=adamw"), [weight], torch.device("cpu"))
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"] = torch.zeros(shape)  # the step itself would crash
    with pytest.raises(ValueError, match="the optimizer's state is that of other weights"):
        optimizer.load_state_dict(state)


def test_an_optimizer_that_is_added_is_built_and_must_have_its_state_on_resuming(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(optimizers.OPTIMIZERS, "rprop", torch.optim.Rprop)
    plain = settings("schedule=constant").model_dump(mode="json") | {"optimizer": {"name": "rprop", "lr": 0.1}}
    module = classifier.Classifier(MoreSettings.model_validate(plain), ["bag", "shoe"])
    optimizer = module.configure_optimizers()
    assert type(optimizer) is torch.optim.Rprop
    assert optimizer.param_groups[0]["lr"] == 0.1
    module(torch.rand(2, 1, 28, 28)).sum().backward()
    optimizer.step()
    trainer: Any = SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=[], precision="32-true", global_step=1)
    optimizers.require_restored(trainer, module.settings)
    optimizer.state.clear()
    with pytest.raises(ValueError, match="the state of the optimizer is missing"):
        optimizers.require_restored(trainer, module.settings)
    optimizers.require_restored(trainer, settings("schedule=constant", "optimizer=sgd"))  # has none without momentum
    trainer.global_step = 0
    optimizers.require_restored(trainer, module.settings)  # stopped while the first gradients were accumulated


class Clock(Callback):
    """On which each training batch takes a minute."""

    def __init__(self) -> None:
        self.minute = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.minute += 1

    def monotonic(self) -> float:
        return 60.0 * self.minute

    perf_counter = monotonic


def test_within_an_epoch_it_saves_when_the_last_save_is_so_many_minutes_ago(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nin.training.callbacks.checkpoints")
    steps, hashes = {}, set()
    for minutes in ("null", "3.5"):
        chosen = settings(f"checkpoint.every_n_minutes={minutes}", "~callbacks.images", "logger=none")
        monkeypatch.setattr(checkpoints, "time", clock := Clock())
        hashes.add(run_experiment(chosen, RunFolder(tmp_path / minutes), callbacks=[clock])["weights_sha256"])
        steps[minutes] = [r.args[1] for r in caplog.records if r.msg.startswith("saved last.ckpt")]
        caplog.clear()
    # Epochs end at steps 6 and 12, and the minutes are counted from each save.
    assert steps == {"null": [6, 12], "3.5": [4, 6, 10, 12]}
    assert len(hashes) == 1


def test_within_an_epoch_it_saves_one_step_before_the_last(
    settings: Callable[..., Settings], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nin.training.callbacks.checkpoints")
    run_experiment(settings("trainer.max_steps=4", "callbacks=none", "logger=none"), RunFolder(tmp_path))
    assert [r.args[1] for r in caplog.records if r.msg.startswith("saved last.ckpt")] == [3, 4]


def test_a_stop_between_accumulated_batches_saves_after_the_step(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    chosen = settings("trainer.accumulate_grad_batches=3", "trainer.max_epochs=1", "~callbacks.images", "logger=none")
    uninterrupted = run_experiment(chosen, RunFolder(tmp_path / "uninterrupted"))
    for batch in (1, 2, 4):  # the gradients of batches 1 and 2, and of 4 and 5, wait for those of 3 and 6
        folder = RunFolder(tmp_path / f"{batch}")
        with pytest.raises(StoppedError):
            run_experiment(chosen, folder, callbacks=[StopIn("on_train_batch_start", batch)])
        result = run_experiment(chosen, folder)
        assert outcome(result) == outcome(uninterrupted)


class Noise(Callback):
    """Draws from the generators of Python and of NumPy, as augmentation of the user's own may.

    Both make two normally distributed numbers at a time, and keep the second for the next call.
    """

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        batch[0].add_(random.gauss(0, 1) + np.random.normal())


def test_numbers_that_python_and_numpy_draw_are_those_of_a_run_without_the_stop(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    chosen, folder = settings("~callbacks.images", "logger=none"), RunFolder(tmp_path / "stopped")
    uninterrupted = run_experiment(chosen, RunFolder(tmp_path / "uninterrupted"), callbacks=[Noise()])
    with pytest.raises(StoppedError):
        run_experiment(chosen, folder, callbacks=[Noise(), StopIn("on_train_batch_start", 7)])
    (process,) = checkpoint_files.read(folder.last)["callbacks"][checkpoint_files.CALLBACK_STATE_KEY]["processes"]
    (*_, kept), (*_, is_kept, _) = (process["random_state"][name] for name in ("python", "numpy"))
    assert kept is not None
    assert is_kept == 1
    resumed = run_experiment(chosen, folder, callbacks=[Noise()])
    assert resumed["weights_sha256"] == uninterrupted["weights_sha256"]


@pytest.mark.parametrize("hook", ["on_sanity_check_start", "on_fit_start", "on_train_start", "on_test_start"])
def test_a_stop_before_the_first_batch_is_one_after_it(
    settings: Callable[..., Settings], tmp_path: Path, hook: str
) -> None:
    keys = ["trainer.accumulate_grad_batches=2", "trainer.num_sanity_val_steps=1", "trainer.max_epochs=1"]
    chosen = settings(*keys, "~callbacks.images", "logger=none")
    folder = RunFolder(tmp_path)
    with pytest.raises(StoppedError, match="SIGTERM"):
        run_experiment(chosen, folder, callbacks=[StopIn(hook)])
    saved = checkpoint_files.read(folder.last)
    assert saved["global_step"] == (3 if hook == "on_test_start" else 1)


@pytest.mark.filterwarnings("ignore:When using `Trainer.accumulate_grad_batches")
def test_a_run_that_accumulates_more_gradients_in_a_later_epoch_is_resumed_within_it(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    scheduler = "lightning.pytorch.callbacks.GradientAccumulationScheduler"
    scheduled = "+callbacks.scheduler={_target_: %s, scheduling: {0: 1, 1: 2}}" % scheduler  # noqa: UP031  # braces
    chosen = settings(scheduled, "schedule=constant", "~callbacks.images", "logger=none")
    uninterrupted = run_experiment(chosen, RunFolder(tmp_path / "uninterrupted"))
    folder = RunFolder(tmp_path / "stopped")
    with pytest.raises(StoppedError):
        run_experiment(chosen, folder, callbacks=[StopIn("on_train_batch_start", 8)])
    assert checkpoint_files.read(folder.last)["global_step"] == 7  # six of one batch and one of two
    result = run_experiment(chosen, folder)
    assert (result["weights_sha256"], result["steps"]) == (uninterrupted["weights_sha256"], 9)


@pytest.mark.filterwarnings("ignore:When using `Trainer.accumulate_grad_batches")
@pytest.mark.parametrize(("limit", "expected"), [("trainer.max_steps=-1", 9), ("trainer.max_steps=8", 8)])
def test_a_schedule_ends_with_the_last_step_though_later_epochs_accumulate_more_gradients(
    settings: Callable[..., Settings], tmp_path: Path, limit: str, expected: int
) -> None:
    scheduler = "lightning.pytorch.callbacks.GradientAccumulationScheduler"
    scheduled = "+callbacks.scheduler={_target_: %s, scheduling: {0: 1, 1: 2}}" % scheduler  # noqa: UP031  # braces
    chosen = settings(scheduled, "schedule=one_cycle", limit, "~callbacks.images", "logger=none")
    result = run_experiment(chosen, RunFolder(tmp_path))
    assert result["steps"] == expected  # six of one batch and three of two, at most
    # OneCycleLR ends with a 250,000th of its highest learning rate.
    assert RunFolder(tmp_path).read_epochs()[-1]["lr"] == pytest.approx(chosen.optimizer.lr / 250_000)  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_the_files_of_a_model_checkpoint_are_its_own_and_a_run_with_it_is_resumed(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    target = "+callbacks.mc._target_=lightning.pytorch.callbacks.ModelCheckpoint"
    keys = [target, "+callbacks.mc.every_n_train_steps=2", "+callbacks.mc.save_last=true"]
    keys += ["schedule=constant", "~callbacks.images", "logger=none"]
    uninterrupted = run_experiment(settings(*keys), RunFolder(tmp_path / "uninterrupted"))
    assert (tmp_path / "uninterrupted" / "model_checkpoints" / "last.ckpt").exists()
    folder, elsewhere = RunFolder(tmp_path / "stopped"), tmp_path / "elsewhere"
    chosen = settings(*keys, f"+callbacks.mc.dirpath={elsewhere}")

    class KilledError(Exception):
        pass

    class Kill(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 9:  # epochs end at 6 and 12, and the ModelCheckpoint has saved at 8
                raise KilledError

    with pytest.raises(KilledError):
        run_experiment(chosen, folder, callbacks=[Kill()])
    assert checkpoint_files.read(folder.last)["global_step"] == 6
    theirs = checkpoint_files.read(elsewhere / "last.ckpt")
    assert theirs["global_step"] == 8
    # As Lightning has it, which resumes from there in the middle of the epoch.
    assert theirs["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"] == 2
    result = run_experiment(chosen, folder)
    assert (result["weights_sha256"], result["steps"]) == (uninterrupted["weights_sha256"], 12)
    refused = settings(*keys, f"+callbacks.mc.dirpath={folder.path / 'model_checkpoints' / '..' / 'checkpoints'}")
    with pytest.raises(UserError, match=r"callbacks.mc.dirpath=.*: has the run's own checkpoints; choose another"):
        build_trainer(refused, folder.path)
