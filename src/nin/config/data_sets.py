"""The typed config of each data set. Imports no torch."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from nin.config.types import Fraction, NonNegative, OwnClass, Pixels, Positive, Section


@dataclass(frozen=True)
class DataSet:
    """The facts about a data set that are known before its files are read. Those of data=folder are read from it.

    Attributes:
        folder: where its files are, in ``data.root``; of the MNIST family torchvision has the same.
        class_names: one per class; the label of an image is the index of its class.
        training_images, test_images: their numbers, before ``data.val_size`` of the first are held out.
        channels: of an image.
        stored_size: height and width of an image, in pixels.
        has_characters: whether the images are characters, some of which are others when they are mirrored.
    """

    folder: str
    class_names: tuple[str, ...]
    training_images: int = 60_000
    test_images: int = 10_000
    channels: int = 1
    stored_size: int = 28
    has_characters: bool = False


_CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_OBJECTS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DATA_SETS = {
    "fashion_mnist": DataSet("FashionMNIST", _CLOTHES),
    "mnist": DataSet("MNIST", tuple("0123456789"), has_characters=True),
    "kmnist": DataSet("KMNIST", ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"), has_characters=True),
    "garments": DataSet("Garments", _CLOTHES, training_images=10_000, test_images=2_000),
    "cifar10": DataSet("CIFAR10", _OBJECTS, training_images=50_000, channels=3, stored_size=32),
}
# The data sets in the format of Fashion-MNIST: gray, 28x28, light objects on a dark background.
IDX_FORMAT = ("fashion_mnist", "mnist", "kmnist", "garments")


def _absolute(folder: str) -> str:
    """A checkpoint can be evaluated from another working directory than that of its run."""
    path = str(Path(os.path.expanduser(folder)).absolute())  # noqa: PTH111  # pathlib raises for an unknown ~user
    if ("${" in path and "${" not in folder) or path != path.encode(errors="replace").decode():
        # In the run's stored config the first would be an interpolation, and the second can't be read from YAML.
        raise ValueError(f"must be a path in UTF-8 and without ${{; it is {path!r}; start in another folder")
    return path


LocalPath = Annotated[str, Field(min_length=1), AfterValidator(_absolute)]


class Images(Section):
    """The keys that all data sets have."""

    root: LocalPath
    image_size: Pixels
    batch_size: Positive
    # The images on which metrics are computed after every epoch. "test" is the notebooks' protocol; the best
    # checkpoint is then not chosen by these metrics.
    score_each_epoch: Literal["val", "test"]
    augment: Literal["none", "flip", "flip_shift", "erase", "trivial"]
    # Whether the network's input has mean 0 and standard deviation 1 for each channel, over the training images as they
    # are stored.
    normalize: bool
    # Whether predictions are the mean of the probabilities for the image and for its flipped image.
    test_time_flip: bool


class Data(Images):
    """A published data set, or the synthetic clothing silhouettes."""

    name: Literal["fashion_mnist", "mnist", "kmnist", "garments", "cifar10"]
    val_size: NonNegative
    # Base URLs for downloading missing files, tried in this order. garments are generated, not downloaded.
    mirrors: list[str]


def raw_folder(data: Data) -> Path:
    """The folder of the files, as in ``<root>/FashionMNIST/raw``."""
    return Path(data.root) / DATA_SETS[data.name].folder / "raw"


class FolderData(Images):
    """The user's own images, one folder per class."""

    name: Literal["folder"]
    # Training images that are held out, where the folder has no val/ or no test/: a number, or a fraction of them.
    val_size: NonNegative | Fraction
    test_size: NonNegative | Fraction
    stored_size: Pixels
    fit: Literal["crop", "pad", "stretch"]
    # "auto": 3 if any training image has color.
    channels: Literal[1, 3, "auto"]
    skip_broken: bool
    # The folder of the decoded images; None: beside the root, or in ~/.cache/nin.
    cache: LocalPath | None
    # More decoded images than this are read from disk by batch, and not kept in memory.
    memory_limit_mib: NonNegative


class OwnData(OwnClass):
    """A LightningDataModule of the user's own, with attributes ``class_names`` and ``channels``."""

    image_size: Pixels
    batch_size: Positive
    score_each_epoch: Literal["val", "test"] = "val"
    test_time_flip: bool = False

    normalize: ClassVar[bool] = False


AnyData = Data | FolderData | OwnData
