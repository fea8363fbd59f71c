"""The test of a network: at the end of a run, and of a checkpoint, as ``nin eval`` does."""

import sys
from typing import Any

import lightning
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from nin.checkpoints.files import read_images_sha256
from nin.checkpoints.weights import load_weights
from nin.config.rules import format_empty_fraction
from nin.config.schema import OwnData, Settings, UserError, is_single_process
from nin.data.module import ImageDataModule
from nin.data.own import build_own_data
from nin.data.sources import require_same_classes
from nin.data.splits import warn_of_other_images, with_channels
from nin.system.devices import require_working_gpu, set_threads
from nin.training.callbacks.metrics import rounded
from nin.training.callbacks.mistakes import MistakeRecorder
from nin.training.callbacks.progress import TrainingProgressBar
from nin.training.classifier import Classifier
from nin.training.trainer import build_trainer


def evaluate_weights(
    settings: Settings, checkpoint: dict[str, Any], mistakes: MistakeRecorder | None = None
) -> tuple[dict[str, Any], Tensor]:
    """Tests a checkpoint's weights.

    Args:
        mistakes: records the wrongly classified images.

    Returns:
        The test metrics, and the confusion matrix ``(classes, classes)``: rows are true classes, columns predicted.

    Raises:
        UserError: if the weights are not those of the network, or not finite, or the images have other classes, or
            there are no batches to test.
    """
    set_threads(settings)
    # As in the run: a data module of the user's own may choose its test images at random.
    lightning.seed_everything(settings.seed, verbose=False)
    warn_of_other_images(settings.data, read_images_sha256(checkpoint))
    in_channels = checkpoint["hyper_parameters"].get("in_channels")
    if not isinstance(in_channels, int):
        raise UserError("the checkpoint has no number of channels; was it saved by another version of nin?")
    settings = with_channels(settings, in_channels)
    data = build_data(settings)
    require_same_classes(data.class_names, checkpoint["hyper_parameters"].get("class_names"))
    module = Classifier(settings, data.class_names, data.channels)
    # One process reports the metrics, however many trained the weights; nothing is written and no curve is logged.
    one = {} if is_single_process(settings.trainer) else {"strategy": "auto", "devices": 1, "num_nodes": 1}
    trainer = settings.trainer.model_copy(update={**one, "profiler": None})
    settings = settings.model_copy(update={"logger": {}, "callbacks": {}, "trainer": trainer})
    with_bar = trainer.enable_progress_bar and sys.stdout.isatty()
    callbacks: list[lightning.Callback] = [TrainingProgressBar()] if with_bar else []
    if mistakes:
        callbacks.append(mistakes)
    tester = build_trainer(settings, None, callbacks)
    require_working_gpu(tester.strategy.root_device)
    if tester.precision == "64-true":  # as Lightning names it, also if the setting is 64
        module.double()  # float32 would round the weights
    load_weights(module, checkpoint)
    require_test_batches(settings, data, tester)
    try:
        return test(tester, module, data)
    except SystemExit as error:  # Lightning turns a Ctrl-C into it
        raise KeyboardInterrupt from error


def build_data(settings: Settings) -> Any:
    """The LightningDataModule, for files that are prepared."""
    if isinstance(settings.data, OwnData):
        return build_own_data(settings.data)
    return ImageDataModule(settings.data, settings.seed, is_prepared=True)


def require_test_batches(settings: Settings, data: Any, trainer: lightning.Trainer) -> None:
    """Checks that a test will have batches: Lightning would refuse it when training is over.

    Raises:
        UserError: if ``data`` has no test images, or ``trainer.limit_test_batches`` leaves none.
    """
    if isinstance(settings.data, OwnData) and not is_overridden("test_dataloader", data):
        raise UserError(f"data: {settings.data.target} needs a test_dataloader(): a run ends with its test")
    limit = settings.trainer.limit_test_batches
    if not isinstance(limit, float) or limit == 1:
        return
    with isolate_rng():
        data = build_data(settings)  # a second one, because Lightning sets up that of the run itself
        data.trainer = trainer
        data.prepare_data()
        data.setup("test")
        lengths = [sized_len(loader) for loader in CombinedLoader(data.test_dataloader(), "sequential").flattened]
    key = "trainer.limit_test_batches"
    if None in lengths:
        rule = "a fraction of batches whose number is not known; give a number of batches, as in 1"
        raise UserError(f"{key}={limit:g}: {rule}")
    if empty := [count for count in lengths if count and int(count * limit) == 0]:
        raise UserError(format_empty_fraction(key, limit, empty[0]))


def test(
    trainer: lightning.Trainer, module: Classifier, data: lightning.LightningDataModule
) -> tuple[dict[str, Any], Tensor]:
    """Test loss, accuracy and accuracy by class of the module's weights.

    Also the confusion matrix ``(classes, classes)``: rows are true classes, columns predicted.
    """
    trainer.test(module, data, verbose=False)
    metrics = rounded({name: value for name, value in trainer.callback_metrics.items() if name.startswith("test/")})
    confusion = module.confusion.compute().cpu()
    right, total = confusion.diag().tolist(), confusion.sum(1).tolist()
    by_class = {name: r / n if n else None for name, r, n in zip(module.class_names, right, total, strict=True)}
    return metrics | {"test/acc_by_class": by_class}, confusion
