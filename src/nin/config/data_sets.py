"""The typed config of each data set. Imports no torch."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from nin.config.types import NonNegative, OwnClass, Pixels, Positive, Section, Share

# The sizes of the training set, before data.val_size images are held out, and of the test set. Those of data=folder are
# known when the folder has been read.
TRAINING_IMAGES = {
    "fashion_mnist": 60_000, "mnist": 60_000, "kmnist": 60_000, "garments": 10_000, "cifar10": 50_000,
}  # fmt: skip
TEST_IMAGES = {
    "fashion_mnist": 10_000, "mnist": 10_000, "kmnist": 10_000, "garments": 2_000, "cifar10": 10_000,
}  # fmt: skip
# Those of Fashion-MNIST's format: gray, 28x28, light things on a dark ground.
IDX_FORMAT = ("fashion_mnist", "mnist", "kmnist", "garments")


# Absolute: a checkpoint can be evaluated from another working directory than that of its run.
Folder = Annotated[str, Field(min_length=1), AfterValidator(lambda root: str(Path(root).expanduser().absolute()))]


class Images(Section):
    """The keys that all data sets have."""

    root: Folder
    image_size: Pixels
    batch_size: Positive
    # The images on which metrics are computed after every epoch. "test" is the notebooks' protocol; the best
    # checkpoint is then not chosen by these metrics.
    score_each_epoch: Literal["val", "test"]
    augment: Literal["none", "flip", "flip_shift", "erase", "trivial"]
    # Whether the network's input has mean 0 and standard deviation 1 over the training images, for each channel.
    normalize: bool
    # Whether predictions are the mean of the probabilities for the image and for its mirror image.
    test_time_flip: bool


class Data(Images):
    """A published data set, or the synthetic clothing silhouettes."""

    name: Literal["fashion_mnist", "mnist", "kmnist", "garments", "cifar10"]
    val_size: NonNegative
    # Base URLs for downloading missing files, tried in this order. garments are generated, not downloaded.
    mirrors: list[str]


class FolderData(Images):
    """The user's own images, one folder per class."""

    name: Literal["folder"]
    # Training images that are held out, where the folder has no val/ or no test/: a number, or a share of them.
    val_size: NonNegative | Share
    test_size: NonNegative | Share
    stored_size: Pixels
    fit: Literal["crop", "pad", "stretch"]
    # "auto": 3 if any training image has color.
    channels: Literal[1, 3, "auto"]
    skip_broken: bool
    # The folder of the decoded images; None: beside the root.
    cache: Folder | None
    # More decoded images than this are read from disk by batch, and not kept in memory.
    memory_limit_mib: NonNegative


class OwnData(OwnClass):
    """A LightningDataModule of the user's own, with attributes ``class_names`` and ``channels``."""

    image_size: Pixels
    batch_size: Positive
    score_each_epoch: Literal["val", "test"] = "val"
    test_time_flip: bool = False

    normalize: ClassVar[bool] = False
