"""Tests the weights of a checkpoint, as ``nin eval`` does."""

import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from nin.checkpoints.files import images_sha256
from nin.checkpoints.weights import load_weights
from nin.config.schema import FolderData, Settings, is_single_process
from nin.data.classes import require_same_classes
from nin.data.splits import warn_of_other_images, with_channels
from nin.system.devices import set_threads
from nin.training.callbacks.metrics import MetricsLogger
from nin.training.callbacks.progress import TrainingProgressBar
from nin.training.classifier import Classifier
from nin.training.experiment import build_data, require_test_batches, test
from nin.training.trainer import build_trainer


def evaluate(settings: Settings, checkpoint: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Tests a checkpoint's weights.

    Returns:
        The test metrics, and the confusion matrix ``(classes, classes)``: rows are true classes, columns predicted.

    Raises:
        UserError: if the weights are not those of the network, or not finite, or the images have other classes, or
            there are no batches to test.
    """
    set_threads(settings)
    warn_of_other_images(settings.data, images_sha256(checkpoint))
    if isinstance(settings.data, FolderData):
        channels = with_channels(settings.data, checkpoint["hyper_parameters"]["in_channels"])
        settings = settings.model_copy(update={"data": channels})
    data = build_data(settings)
    require_same_classes(data.class_names, checkpoint["hyper_parameters"].get("class_names"))
    module = Classifier(settings, data.class_names, data.channels)
    # One process reports the metrics, however many trained the weights; nothing is written and no curve is logged.
    one = {} if is_single_process(settings.trainer) else {"strategy": "auto", "devices": 1, "num_nodes": 1}
    trainer = settings.trainer.model_copy(update={**one, "profiler": None})
    settings = settings.model_copy(update={"logger": {}, "callbacks": {}, "trainer": trainer})
    with_bar = trainer.enable_progress_bar and sys.stdout.isatty()
    bar = [TrainingProgressBar(MetricsLogger(Path()))] if with_bar else []
    tester = build_trainer(settings, None, bar)
    if tester.precision == "64-true":  # as Lightning names it, also if the setting is 64
        module.double()  # float32 would round the weights
    load_weights(module, checkpoint)
    require_test_batches(settings, data, tester)
    try:
        return test(tester, module, data)
    except SystemExit as error:  # into which Lightning turns a Ctrl-C
        raise KeyboardInterrupt from error
