"""A checkpoint as one PyTorch module with all preprocessing, for `nin predict` and for every export."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nin.checkpoints import files as checkpoint_files
from nin.checkpoints.weights import hash_weights, load_weights
from nin.config.schema import Data, FolderData, OwnData, Settings, UserError
from nin.data.sources import describe
from nin.deploy.trained import Description, Scores, TrainedNetwork
from nin.networks.score_maps import NO_MAPS, find_last_maps, find_map_kind, forward_with_maps, grad_cam
from nin.runs.folder import RunFolder
from nin.runs.versions import describe_changed_code, read_versions
from nin.training.classifier import Classifier

log = logging.getLogger(__name__)


class Pipeline(nn.Module):
    """uint8 images of any size in; probabilities, logits and score maps out, as `Scores` describes them.

    Input: ``(batch, height, width)`` for 1 channel, ``(batch, height, width, 3)`` for 3. Output: probabilities and
    logits ``(batch, classes)`` and, where the network has them, score maps ``(batch, classes, h, w)``.
    """

    def __init__(self, network: nn.Module, channels: int, stored_size: int, image_size: int, test_time_flip: bool):
        super().__init__()
        self.network = network
        self.channels, self.stored_size, self.image_size = channels, stored_size, image_size
        self.test_time_flip = test_time_flip
        self.maps = _choose_maps(network, channels, image_size)
        self.has_maps = self.maps in ("gap", "fc")

    def prepare(self, images: Tensor) -> Tensor:
        """The network's input ``(batch, channels, image_size, image_size)``, float32 from 0 to 1.

        An image of the stored size comes out of the first resizing bit for bit as it was: nothing here depends on the
        image's size, so that an export takes every size.
        """
        pixels = images.unsqueeze(1) if self.channels == 1 else images.permute(0, 3, 1, 2)
        pixels = pixels.to(torch.float32) / 255
        pixels = _resize(pixels, self.stored_size)
        return pixels if self.image_size == self.stored_size else _resize(pixels, self.image_size)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        pixels = self.prepare(images)
        # Computed first, because a network of the user's own may change its input.
        mirrored = self._forward(pixels.flip(-1)) if self.test_time_flip else None
        logits, maps = self._forward(pixels)
        probabilities = logits.softmax(-1)
        if mirrored:
            mirrored_logits, mirrored_maps = mirrored
            probabilities = (probabilities + mirrored_logits.softmax(-1)) / 2
            logits = (logits + mirrored_logits) / 2
            maps = None if maps is None else (maps + mirrored_maps.flip(-1)) / 2
        return (probabilities, logits) if maps is None else (probabilities, logits, maps)

    def _forward(self, pixels: Tensor) -> tuple[Tensor, Any]:
        if not self.has_maps:
            return self.network(pixels), None
        return forward_with_maps(self.network, pixels)

    def grad_cam(self, images: Tensor) -> Tensor:
        """Maps ``(batch, classes, height, width)`` of a network that has no score maps of its own."""
        pixels = self.prepare(images)
        maps = grad_cam(self.network, pixels)
        return (maps + grad_cam(self.network, pixels.flip(-1)).flip(-1)) / 2 if self.test_time_flip else maps


def _choose_maps(network: nn.Module, channels: int, image_size: int) -> str:
    """What `Description.maps` is for the network, which is in evaluation mode."""
    kind, image = find_map_kind(network), torch.zeros(1, channels, image_size, image_size)
    with torch.no_grad():
        if kind and forward_with_maps(network, image)[1] is not None:
            return kind
    return "none" if find_last_maps(network, image) is None else "grad_cam"


def _resize(pixels: Tensor, size: int) -> Tensor:
    return functional.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)


def read_checkpoint(path: Path, allow: Sequence[str] = ()) -> tuple[Classifier, Pipeline, Description]:
    """The module of a checkpoint with its weights, the pipeline around its network, and the description of both.

    Both are in evaluation mode, and share the network.

    Args:
        allow: modules whose classes the checkpoint may name.

    Raises:
        UserError: if the file is no checkpoint of this version, or it names a class that is not allowed.
    """
    checkpoint, checksum = checkpoint_files.read_with_checksum(path)
    # No data are loaded: a data module of the user's own is not imported.
    settings = checkpoint_files.read_checkpoint_settings(checkpoint, path, list(allow), ("model",))
    class_names, in_channels = (checkpoint["hyper_parameters"].get(key) for key in ("class_names", "in_channels"))
    if not (isinstance(class_names, list) and all(isinstance(n, str) for n in class_names)):
        raise UserError(f"{path}: saved by another version of nin? It names no classes")
    if in_channels not in (1, 3):
        raise UserError(
            f"{path}: trained on images of {in_channels} channels; nin predict, export and serve take grayscale (1) "
            "and RGB (3)"
        )
    # Nothing is trained: a loss of the user's own is not imported.
    module = Classifier(settings.model_copy(update={"loss": None}), class_names, in_channels)
    load_weights(module, checkpoint)
    module = module.float().eval().requires_grad_(False)
    data, file = settings.data, path.absolute()
    pipeline = Pipeline(module.network, in_channels, _stored_size(data), data.image_size, data.test_time_flip).eval()
    run = RunFolder(file.parents[1]) if file.parent.name == "checkpoints" else None
    result = run.find_result() if run else {}
    if changed := describe_changed_code(result, imported_only=True):
        log.warning("%s: %s; it may compute something else now", path, changed)
    test_accuracy = result.get("metrics", {}).get("test/acc") if run and file == run.best else None
    description = Description(
        class_names=class_names,
        channels=pipeline.channels,
        stored_size=pipeline.stored_size,
        fit=data.fit if isinstance(data, FolderData) else None,
        image_size=pipeline.image_size,
        test_time_flip=pipeline.test_time_flip,
        maps=pipeline.maps,
        settings=_portable(settings),
        more={
            # All jobs of a sweep have the sweep's name.
            "run": f"{settings.name}/{run.path.resolve().name}" if run and settings.sweep.keys else settings.name,
            "checkpoint": path.name,
            "checkpoint_sha256": checksum,
            "weights_sha256": hash_weights(module.network),
            "images_sha256": checkpoint_files.read_images_sha256(checkpoint),
            "test_accuracy": test_accuracy,
            "versions": read_versions(),
        },
    )
    return module, pipeline, description


def _stored_size(data: Data | FolderData | OwnData) -> int:
    """The folder, or the data module of the user's own, need not be there: for them it is a setting."""
    if isinstance(data, FolderData):
        return data.stored_size
    return data.image_size if isinstance(data, OwnData) else describe(data).stored_size


def _portable(settings: Settings) -> dict[str, Any]:
    """The settings as plain values, without paths of this machine and what only training needs."""
    plain = settings.model_dump(mode="json") | {"logger": {}, "callbacks": {}, "weights": None}
    # `nin eval` uses the places of the machine that it runs on; the address of a mirror may have a password.
    places: dict[str, Any] = {"root": "data", "cache": None, "mirrors": []}
    return plain | {"data": plain["data"] | {key: places[key] for key in places.keys() & plain["data"].keys()}}


def load_checkpoint(path: Path, allow: Sequence[str] = ()) -> TrainedNetwork:
    """A checkpoint ready to classify images, in float32 on the CPU.

    Raises:
        UserError: as `read_checkpoint`.
    """
    module, pipeline, description = read_checkpoint(path, allow)
    if isinstance(data := module.settings.data, OwnData):
        log.warning(
            "%s: the images are not prepared by your data module %s: their pixels are divided by 255 and resized; if "
            "the data module normalizes images, let the network do that instead",
            path, data.target,
        )  # fmt: skip

    def compute(images: np.ndarray, maps: bool) -> Scores:
        batch = torch.from_numpy(np.ascontiguousarray(images))
        with torch.no_grad():
            probabilities, logits, *found = (output.numpy() for output in pipeline(batch))
        if not maps:
            return Scores(probabilities, logits)
        return Scores(probabilities, logits, found[0] if found else pipeline.grad_cam(batch).numpy())

    return TrainedNetwork(description, compute, NO_MAPS)
