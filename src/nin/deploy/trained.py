"""A trained network as Python code uses it, whatever computes it: PyTorch or onnxruntime. Imports neither."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from nin.config.data_sets import IDX_FORMAT
from nin.config.schema import UserError
from nin.config.types import Pixels, Section
from nin.deploy.images import ImageForm, as_arrays, batches_of_one_size

# A batch is computed at a time; larger ones are not faster on a CPU, and take memory.
BATCH_IMAGES, BATCH_PIXELS = 128, 4_000_000


@dataclass(frozen=True)
class Scores:
    """The outputs of a network for a batch of images.

    Attributes:
        probabilities: ``(batch, classes)`` float32; each row sums to 1.
        logits: ``(batch, classes)`` float32; with ``data.test_time_flip`` the mean of the image's and its mirror's.
        maps: ``(batch, classes, height, width)`` float32, or None if they were not requested.
    """

    probabilities: np.ndarray
    logits: np.ndarray
    maps: np.ndarray | None = None

    def each(self) -> list["Scores"]:
        """The scores of each image, without the batch dimension."""
        maps = [None] * len(self.logits) if self.maps is None else self.maps
        return [Scores(*row) for row in zip(self.probabilities, self.logits, maps, strict=True)]


@dataclass(frozen=True)
class Description:
    """The description of a trained network, which an export has as its metadata.

    Attributes:
        class_names: in the order of the probabilities.
        channels: of the images: 1 (gray) or 3 (color).
        stored_size: pixels per side to which every image is resized first, as those of its data set were.
        image_size: pixels per side of the network's input.
        test_time_flip: whether probabilities are the mean of the image's and its mirror's.
        fit: how files are brought to the stored size when they are decoded, as those of `data=folder` were ("crop",
            "pad", "stretch"); None: the pipeline resizes them.
        maps: "gap": the logit is the mean of the class's map. "fc": it is the mean plus the bias. "grad_cam": an
            approximation. "none": a network without maps, or an export of one whose maps need gradients.
        settings: of the run, as in its config.yaml.
        more: the run's name, weights_sha256, versions, test accuracy, and what the check of an export found.
    """

    __pydantic_config__ = Section.model_config  # for a file's metadata

    class_names: list[str]
    channels: int
    stored_size: Pixels
    image_size: Pixels
    test_time_flip: bool
    maps: str
    settings: dict[str, Any]
    fit: Literal["crop", "pad", "stretch"] | None = None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def form(self) -> ImageForm:
        """The form to which the user's files are decoded."""
        return ImageForm(self.channels, self.stored_size, self.fit) if self.fit else ImageForm(self.channels)

    @property
    def light_on_dark(self) -> bool:
        """Whether its data set's images are light on dark, as those of Fashion-MNIST's format are."""
        return self.settings["data"].get("name") in IDX_FORMAT

    def with_more(self, **values: Any) -> "Description":
        """This description with ``values`` added to ``more``."""
        return replace(self, more=self.more | values)


class TrainedNetwork:
    """A network with all preprocessing: images in, probabilities and score maps out.

    ``images`` are one uint8 array ``(batch, height, width)`` or ``(batch, height, width, 3)``, or a list of such
    arrays without the batch, of Pillow images and of paths; in a list sizes may differ. Each image is
    preprocessed as a test image: gray or color as the network needs it, resized to the stored size, then to the
    network's.

    Args:
        compute: takes a uint8 batch of one size, ``(batch, height, width)`` for a gray network and
            ``(batch, height, width, 3)`` for a color one, and whether maps are requested.
        no_maps: the reason if ``description.maps`` is "none"; the default is that of an export.
    """

    def __init__(
        self,
        description: Description,
        compute: Callable[[np.ndarray, bool], Scores],
        no_maps: str = "this export has no score maps: they need gradients in this network, which an export does not "
        "have, or the network has no maps; for the former, give the run or its checkpoint instead",
    ):
        self.description, self.compute, self.no_maps = description, compute, no_maps

    def predict(self, images: Any) -> np.ndarray:
        """Probabilities ``(batch, classes)``, float32; classes as in ``description.class_names``."""
        return self.score(images).probabilities

    def maps(self, images: Any) -> np.ndarray:
        """Score maps ``(batch, classes, height, width)``, float32: where in each image each class is recognized.

        Raises:
            UserError: if this network has none.
            ValueError: if there are no images: the maps' size is known from those of an image.
        """
        maps = self.score(images, maps=True).maps
        if maps is None:
            raise ValueError("images: there are none, so that the size of their score maps is unknown")
        return maps

    def score(self, images: Any, maps: bool = False) -> Scores:
        """Probabilities, logits and, if ``maps``, score maps.

        Raises:
            UserError: if maps are requested and there are none.
        """
        if maps:
            self.require_maps()
        arrays = as_arrays(images, self.description.form)
        if not arrays:
            return Scores(*np.empty((2, 0, len(self.description.class_names)), np.float32))
        each: dict[int, Scores] = {}
        for indices in batches_of_one_size(arrays, BATCH_IMAGES, BATCH_PIXELS):
            each |= zip(indices, self.compute(np.stack([arrays[i] for i in indices]), maps).each(), strict=True)
        names = ("probabilities", "logits", "maps") if maps else ("probabilities", "logits")
        return Scores(*(np.stack([getattr(each[i], name) for i in range(len(arrays))]) for name in names))

    def require_maps(self) -> None:
        """Raises UserError if there are no score maps."""
        if self.description.maps == "none":
            raise UserError(self.no_maps)
