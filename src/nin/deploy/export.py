"""Exports a checkpoint to one file with all preprocessing inside, and checks it against the checkpoint."""

import contextlib
import importlib.util
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nin.config.composition import apply_overrides
from nin.config.schema import Settings, UserError
from nin.config.trust import without_training_parts
from nin.data.sources import describe, prepare, require_same_classes, with_found_root
from nin.data.splits import warn_of_other_images, with_channels
from nin.data.transforms import resize
from nin.deploy.onnx_model import load_onnx, metadata_of, open_session
from nin.deploy.pipeline import Pipeline, read_checkpoint
from nin.deploy.scoring import evaluate_network, load_part
from nin.deploy.trained import BATCH_IMAGES, Description, TrainedNetwork
from nin.training.classifier import Classifier

# Largest difference of a probability between the checkpoint and its export.
TOLERANCE = 1e-5
# How much accuracy an int8 file may lose.
INT8_LOSS = 0.003
OVERRIDABLE = ("data.root", "data.cache", "data.mirrors")

ReportImages = Callable[[str, int, int], None]


class ExportError(RuntimeError):
    """The exported file does not give what the checkpoint gives; it was not kept."""


class Exporter:
    """One checkpoint, the test set that its exports are checked on, and its description.

    Args:
        path: the checkpoint.
        progress: called with what is done, the number of images done, and of all.
        overrides: where the data set is: `OVERRIDABLE`.
        allow: modules whose classes the checkpoint may name.

    Raises:
        UserError: if a package is missing, the file is no checkpoint, or the data set is missing or has other classes.
    """

    def __init__(
        self,
        path: Path,
        progress: ReportImages,
        overrides: Sequence[str] = (),
        allow: Sequence[str] = (),
    ):
        require_packages()
        self.module, self.pipeline, self.description = read_checkpoint(path, allow)
        self.progress = progress
        # The settings of the run, with the place of the data on this machine.
        stored = with_found_root(without_training_parts(self.module.settings))
        self.local_settings = apply_overrides(stored, list(overrides), OVERRIDABLE)
        prepare(self.local_settings.data)
        self.local_settings = with_channels(self.local_settings, self.description.channels)
        warn_of_other_images(self.local_settings.data, self.description.more["images_sha256"])
        self.images, self.labels = load_part(self.local_settings, "test")
        require_same_classes(describe(self.local_settings.data).class_names, self.description.class_names)

    def export_onnx(self, path: Path) -> Description:
        """Writes ``path``, once the file's probabilities are the checkpoint's on every test image.

        Raises:
            ExportError: if they differ; nothing is written.
        """
        with open_checked(path) as temporary:
            program = trace_onnx(self.pipeline)
            _save(program.model_proto, temporary, self.description)
            found = self.check(load_onnx(temporary))
            # Written again with the results of the check; weights and operators stay those that were checked.
            description = self.description.with_more(check=found)
            _save(program.model_proto, temporary, description)
        return description

    def export_int8(self, source: Path, path: Path) -> dict[str, Any]:
        """Quantizes the export ``source`` to int8, and keeps it at ``path`` if it loses little accuracy.

        Returns:
            Sizes, rates and accuracies of both files.

        Raises:
            ExportError: if it loses more than 0.003 of the accuracy; nothing is written.
        """
        import onnx

        from nin.deploy.quantize import quantize

        images, _ = load_part(self.local_settings, "train")
        with open_checked(path) as temporary:
            quantize(source, temporary, images)
            quantized, progress = load_onnx(temporary), partial(self.progress, "scoring")
            metrics, _ = evaluate_network(quantized, self.images, self.labels, progress)
            # The accuracy of the export was measured when it was checked.
            accuracy = {"float": load_onnx(source).description.more["check"]["accuracy"], "int8": metrics["test/acc"]}
            lost = accuracy["float"] - accuracy["int8"]
            if round(lost, 7) > INT8_LOSS:
                raise ExportError(
                    f"int8: test accuracy {accuracy['int8']:.4f}, and {accuracy['float']:.4f} before: it loses "
                    f"{lost:.4f}, more than {INT8_LOSS:g}; not kept"
                )
            found = {"images": len(self.labels), "accuracy": accuracy["int8"], "accuracy_of_float": accuracy["float"]}
            description = self.description.with_more(int8=found)
            _save(onnx.load(temporary), temporary, description)
            sizes = {"float": source.stat().st_size, "int8": temporary.stat().st_size}
            rates = {"float": self._rate(source), "int8": self._rate(temporary)}
        return {"bytes": sizes, "images_per_second": rates, "accuracy": accuracy}

    def map_size(self) -> tuple[int, int] | None:
        """Height and width of the score maps; None where the export has none."""
        if not self.pipeline.has_maps:
            return None
        with torch.no_grad():
            maps = self.pipeline(*example_images(self.pipeline))[2]
        return maps.shape[-2], maps.shape[-1]

    def check(self, export: TrainedNetwork) -> dict[str, Any]:
        """Compares an export with the checkpoint on the whole test set and on a single image, in float32.

        Raises:
            ExportError: if a prediction differs, or a probability by more than 1e-5.
        """
        single = self.images[:1]  # an export may have taken the dimension of the batch for a constant
        expected = probabilities_of(self.module, torch.tensor(single)).numpy()
        largest, differing, right = float(np.abs(expected - export.predict(single)).max()), 0, 0
        for start in range(0, len(self.labels), BATCH_IMAGES):
            batch, labels = self.images[start : start + BATCH_IMAGES], self.labels[start : start + BATCH_IMAGES]
            expected = probabilities_of(self.module, torch.tensor(batch)).numpy()
            exported = export.predict(batch)
            # Unlike max(), np.maximum() keeps NaN.
            largest = float(np.maximum(largest, np.abs(expected - exported).max()))
            differing += int((expected.argmax(1) != exported.argmax(1)).sum())
            right += int((exported.argmax(1) == labels).sum())
            self.progress("checking", start + len(labels), len(self.labels))
        if differing or not largest <= TOLERANCE:
            raise ExportError(
                f"of {len(self.labels)} test images {differing} are classified differently than by the checkpoint, "
                f"and probabilities differ by up to {largest:.2g} (allowed: {TOLERANCE:g}); not kept"
            )
        accuracy = round(right / len(self.labels), 7)
        return {"images": len(self.labels), "accuracy": accuracy, "largest_difference": largest}

    def _rate(self, path: Path) -> float:
        network, batch = load_onnx(path), self.images[:BATCH_IMAGES]
        network.predict(batch)  # to warm up
        return round(images_per_second(lambda: network.predict(batch), len(batch), seconds=2), 1)


@contextlib.contextmanager
def open_checked(path: Path) -> Iterator[Path]:
    """Gives a temporary file, which is renamed to ``path`` at the end and removed after an error."""
    # The suffix stays the same, because torch's functions require it.
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}.tmp{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.touch()  # an OSError where nothing can be written: torch's functions raise others, after the work
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def probabilities_of(module: Classifier, images: Tensor) -> Tensor:
    """Probabilities ``(batch, classes)`` of uint8 images of the stored size, as evaluation in float32 computes them."""
    with torch.no_grad():
        return module.predict_logits(resize(images, module.settings.data.image_size)).softmax(-1)


def images_per_second(score: Callable[[], object], images: int, seconds: float) -> float:
    """The rate of ``score``, which scores a batch of ``images`` again and again."""
    begun, done = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begun) < seconds or not done:
        score()
        done += images
    return done / elapsed


def measure_untrained(settings: Settings, seconds: float) -> Callable[[], float]:
    """Exports the network of ``settings`` to ONNX, with the weights that training starts from.

    Returns:
        A function that measures for ``seconds`` how many images per second onnxruntime scores, in batches of
        ``data.batch_size`` images of the stored size, with as many CPU threads as torch.

    Raises:
        UserError: if a package is missing.
    """
    require_packages()
    info, data = describe(settings.data), settings.data
    module = Classifier(settings, info.class_names, info.channels).eval().requires_grad_(False)
    pipeline = Pipeline(module.network, info.channels, info.stored_size, data.image_size, data.test_time_flip).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(trace_onnx(pipeline).model_proto.SerializeToString())
        session = open_session(path, torch.get_num_threads())
    shape = (data.batch_size, info.stored_size, info.stored_size)
    images = np.zeros(shape if info.channels == 1 else (*shape, 3), np.uint8)
    return lambda: images_per_second(
        lambda: session.run(["probabilities"], {"images": images}), data.batch_size, seconds
    )


def trace_onnx(pipeline: Pipeline) -> Any:
    """The pipeline as an ONNX program with dynamic batch, height and width."""
    names = ["probabilities", "logits", *(["maps"] if pipeline.has_maps else [])]
    return torch.onnx.export(
        pipeline,
        example_images(pipeline),
        dynamo=True,
        input_names=["images"],
        output_names=names,
        dynamic_shapes=({0: "batch", 1: "height", 2: "width"},),
        verbose=False,
    )


def example_images(pipeline: Pipeline) -> tuple[Tensor]:
    """Two uint8 images, ``(2, height, width)`` or with a last dimension of 3, for tracing.

    No size is one that the exporter would take for a constant.
    """
    shape = (2, pipeline.stored_size + 3, pipeline.stored_size + 5)
    return (torch.zeros(shape if pipeline.channels == 1 else (*shape, 3), dtype=torch.uint8),)


def _save(model: Any, path: Path, description: Description) -> None:
    """Writes an ONNX file with the description in its metadata; weights are in the file itself."""
    import onnx

    # The exporter notes the source line of every node, with the paths of this machine.
    for noted in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        noted.doc_string = ""
        del noted.metadata_props[:]
    onnx.helper.set_model_props(model, metadata_of(description))
    path.write_bytes(model.SerializeToString())


def require_packages() -> None:
    """Raises UserError, with the line that installs them, if a package is missing."""
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if not importlib.util.find_spec(name)]:
        raise UserError(f"needs {', '.join(missing)}: python3 -m pip install {' '.join(missing)}")
