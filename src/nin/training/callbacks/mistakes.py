"""The images that a test classifies wrongly, for ``nin eval --wrong``."""

import csv
import io
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from torch import Tensor

from nin.config.schema import FolderData, UserError
from nin.data.cache import list_files
from nin.data.module import ImageDataModule
from nin.data.splits import open_folder
from nin.runs.files import write_atomically
from nin.training.classifier import Classifier


class MistakeRecorder(Callback):
    """Records the wrongly classified images of a test."""

    def __init__(self) -> None:
        self.tested = 0
        self.mistakes: list[tuple[int, int, int, float]] = []  # image, true and predicted label, probability

    def on_test_batch_end(self, trainer: Trainer, pl_module: Classifier, outputs: Tensor, batch: Any, *_: Any) -> None:
        labels = batch[1].cpu()
        probabilities, predicted = outputs.float().softmax(1).cpu().max(1)
        for i in (predicted != labels).nonzero().flatten().tolist():
            self.mistakes.append((self.tested + i, int(labels[i]), int(predicted[i]), float(probabilities[i])))
        self.tested += len(labels)

    def on_test_end(self, trainer: Trainer, pl_module: Classifier) -> None:
        self.data: Any = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning, missing in its types
        self.class_names = pl_module.class_names

    def write(self, path: Path) -> None:
        """Writes a CSV file with a row for each wrongly classified image, those with the highest probability first.

        An image is its file, relative to ``data.root``; without one, its position in the test set, from 0.

        Raises:
            UserError: if the folder of images has changed since they were tested, or the file can't be written.
        """
        files = _list_test_files(self.data) if isinstance(self.data, ImageDataModule) else []
        names, text = self.class_names, io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["image", "true", "predicted", "probability"])
        for image, label, predicted, probability in sorted(self.mistakes, key=lambda mistake: -mistake[3]):
            row = [files[image] if files else image, names[label], names[predicted], f"{probability:.4f}"]
            writer.writerow(row)
        try:
            write_atomically(path, text.getvalue())
        except OSError as error:
            raise UserError(f"--wrong {path}: can't be written ({error.strerror})") from error


def _list_test_files(data: ImageDataModule) -> list[str]:
    """The files of a folder's test images, in the order of their batches; none of other data."""
    settings = data.settings
    if not isinstance(settings, FolderData):
        return []
    files = list_files(settings, open_folder(settings))
    return [files[row] for row in data.test_rows]
