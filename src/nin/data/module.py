"""The LightningDataModule: images in memory as uint8, held-out validation images, batches."""

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor

from nin.config.data_sets import DATA_SETS
from nin.config.errors import printable
from nin.config.schema import Data, FolderData, UserError
from nin.data import splits
from nin.data.cache import MappedImages
from nin.data.folder import PARTS
from nin.data.sources import describe, load, prepare
from nin.data.transforms import augment, resize

log = logging.getLogger(__name__)


class TensorDataLoader:
    """A dataloader over tensors that are already in memory, or memory-mapped.

    It takes each batch with one indexing operation, without worker processes.

    Yields ``(batch, height, width)`` uint8 images, ``(batch, height, width, 3)`` in color, and ``(batch,)`` int64
    labels; the last batch may be smaller. The shuffled order depends only on the seed and the epoch. The position in it
    is the state that is saved and loaded, so that a resumed run continues in the middle of an epoch.

    Args:
        images, labels: all images of the part, as they are yielded, and their labels.
        batch_size: number of images per batch of each process.
        seed: of the shuffled order; None keeps the order of the images.
        epoch: returns the current epoch.
        reshuffled: whether every epoch has its own order.
        rank: of this process among ``world_size``; each takes its share of every batch.
    """

    def __init__(
        self,
        images: Tensor | MappedImages,
        labels: Tensor,
        batch_size: int,
        seed: int | None = None,
        epoch: Callable[[], int] = lambda: 0,
        reshuffled: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.seed, self.epoch, self.reshuffled, self.rank, self.world_size = seed, epoch, reshuffled, rank, world_size
        self._position = {"epoch": 0, "batch": 0}
        self._loaded: dict[str, int] | None = None

    def __len__(self) -> int:
        full, rest = divmod(len(self.labels), self.batch_size * self.world_size)
        # Shuffled batches are for training, and batch norm has no statistics of a single image: a last batch in which a
        # process would have fewer than two images is left out.
        return full + (rest >= 2 * self.world_size if self.seed is not None else rest > 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, loaded = self.epoch(), self._loaded
        self._loaded = None
        order = self._order(epoch if self.reshuffled else 0)
        for batch in range(loaded["batch"] if loaded and loaded["epoch"] == epoch else 0, len(self)):
            in_all = self.batch_size * self.world_size
            taken = order[batch * in_all : (batch + 1) * in_all][self.rank :: self.world_size]
            # Set before the batch is used: a checkpoint after this batch resumes with the next one.
            self._position = {"epoch": epoch, "batch": batch + 1}
            yield self.images[taken], self.labels[taken]

    def _order(self, epoch: int) -> Tensor:
        if self.seed is None:
            return torch.arange(len(self.labels), device=self.labels.device)
        # A generator per epoch: the order of an epoch does not depend on the epochs before it.
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0]))
        return torch.randperm(len(self.labels), generator=generator).to(self.labels.device)

    def state_dict(self) -> dict[str, int]:
        return dict(self._position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Sets the position in the data."""
        self._position = self._loaded = {"epoch": state["epoch"], "batch": state["batch"]}


class ImageDataModule(LightningDataModule):
    """Training, validation and test images of one data set, in memory, or of a large folder read by batch.

    Also works without a Trainer: ``prepare_data()``, ``setup("fit")``, then iterate over ``train_dataloader()`` and
    pass the images of each batch through `transform_images`. All tensors are then on the CPU.

    Args:
        settings: the config's section ``data``: the data set, the size of images and batches.
        seed: chooses the held-out validation images and the order of every epoch.
        is_prepared: whether the files have been downloaded and verified already, as ``prepare_data`` does.

    Attributes:
        class_names: one per class; the label of an image is the index of its class.
        channels: of the images.
        notes: entries for result.json: a folder's fingerprint, the number of images in its parts, and which parts were
            split off its training images. Empty for the published data sets.
    """

    def __init__(self, settings: Data | FolderData, seed: int = 0, is_prepared: bool = False):
        super().__init__()
        self.settings, self.seed, self.is_prepared = settings, seed, is_prepared
        info = describe(settings)
        self.class_names, self.channels = info.class_names, info.channels
        self.notes: dict[str, Any] = {}

    def prepare_data(self) -> None:
        if not self.is_prepared:
            prepare(self.settings)
        self.is_prepared = True

    def setup(self, stage: str | None = None) -> None:
        if isinstance(self.settings, FolderData):
            self._setup_folder(self.settings, stage)
            return
        if stage == "fit":
            _warn_of_mirrored_characters(self.settings)
        if stage in (None, "fit", "validate") and not hasattr(self, "train"):
            images, labels = self._load("train")
            held_out, kept = split(len(labels), self.settings.val_size, self.seed)
            self.train, self.val = (images[kept], labels[kept]), (images[held_out], labels[held_out])
        if not hasattr(self, "test") and (
            stage in (None, "test", "predict") or self.settings.score_each_epoch == "test"
        ):
            self.test = self._load("test")

    def _load(self, part: str) -> tuple[Tensor, Tensor]:
        """All images are kept on the training device, 47 MB of Fashion-MNIST: no transfer during a step."""
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        assert not isinstance(self.settings, FolderData)  # `_setup_folder`
        images, labels = map(torch.from_numpy, load(self.settings, part))
        return images.to(device), labels.to(device)

    def _setup_folder(self, data: FolderData, stage: str | None) -> None:
        """Images up to ``data.memory_limit_mib`` are copied to the training device, more are read by batch."""
        if hasattr(self, "train"):
            return
        cache = splits.open_folder(data)
        self.notes |= splits.describe_split(cache, data, self.seed)
        if cache.broken:
            self.notes["skipped_files"] = len(cache.broken)
            log.warning(
                "data.skip_broken=true: %d files are left out:\n  %s",
                len(cache.broken), "\n  ".join(f"{printable(name)}: {why}" for name, why in cache.broken.items()),
            )  # fmt: skip
        if cache.other_files:
            names = ", ".join(printable(name) for name in cache.other_files[:10])
            more = f" and {len(cache.other_files) - 10} more" if len(cache.other_files) > 10 else ""
            log.warning("files without the suffix of an image, or beside train/, are left out: %s%s", names, more)
        count, limit = math.prod(cache.shape), data.memory_limit_mib
        # The mapping is not shared, so that changes of the tensor do not reach the file.
        mapped = torch.from_file(str(cache.path / "images.bin"), shared=False, size=count, dtype=torch.uint8)
        images, labels = mapped.view(cache.shape), torch.from_numpy(cache.labels())
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        if device.type != "cpu" and count > limit * 2**20:
            more = "each batch is copied from the disk; with a larger limit all images are stored on the GPU"
            log.warning("%d MiB of images are above data.memory_limit_mib=%d: %s", count // 2**20, limit, more)
        parts: dict[str, Any] = {}
        if stage in (None, "fit"):
            splits.require_training_images(data, self.seed)
        for part, rows in splits.split_folder(cache, data, self.seed).items():
            if part != "train":  # they are stored by class; trainer.limit_val_batches takes the first
                rows = rows[splits.order_in_proportion(cache.labels()[rows], self.seed)]
            if part == "test":
                self.test_rows = rows
            indices = torch.from_numpy(rows)
            if count <= limit * 2**20:
                parts[part] = images[indices].to(device), labels[indices].to(device)
            else:
                parts[part] = MappedImages(images, indices), labels[indices]
        self.train, self.val, self.test = (parts[part] for part in PARTS)
        self.notes |= {"images_sha256": cache.fingerprint, "images": dict(cache.counts)}

    def state_dict(self) -> dict[str, Any]:
        """Returns the SHA-256 of a folder's decoded images and labels, and the number of images in each part.

        The number is needed because the SHA-256 is the same whether the last images were in ``val/`` or in ``test/``.
        """
        if "images_sha256" not in self.notes:
            return {}
        return {"fingerprint": self.notes["images_sha256"], "counts": self.notes["images"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compares the folder's images with those of the checkpoint.

        Raises:
            UserError: if they are others, or in other parts.
        """
        if not isinstance(self.settings, FolderData):
            return
        cache = splits.open_folder(self.settings)
        if state_dict != {"fingerprint": cache.fingerprint, "counts": dict(cache.counts)}:
            raise UserError(
                f"data.root={self.settings.root}: has other images than those the run was started with, or in other "
                "parts, so it can't be resumed exactly; restore them, or give another name=…"
            )

    def compute_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel over the training images, from 0 to 1: float32 ``(channels,)``."""
        counts = torch.zeros(self.channels, 256, dtype=torch.int64)
        images = self.train[0]
        chunk = max(1, 2**24 // images[:1].numel())  # 16 MiB
        for start in range(0, len(images), chunk):
            pixels = images[start : start + chunk].cpu().reshape(-1, self.channels)
            counts += torch.stack([channel.bincount(minlength=256) for channel in pixels.T])
        values = torch.arange(256, dtype=torch.float64) / 255
        shares = counts.double() / counts.sum(1, keepdim=True)
        mean = shares @ values
        deviation = (shares @ values**2 - mean**2).clamp(min=0).sqrt()
        return mean.float(), deviation.float()

    def sample(self, count: int) -> Tensor:
        """Returns at most ``count`` training images at equal distances, prepared and not augmented, on the CPU.

        Float32 ``(count, channels, image_size, image_size)``.
        """
        return self.transform_images(self.train[0][self.spread(count)]).cpu().float()

    def spread(self, count: int) -> Tensor:
        """Indices ``(count,)`` of at most ``count`` training images at equal distances.

        A folder's images are sorted by class: so there are some of each.
        """
        total = len(self.train[0])
        count = min(count, total)
        return torch.arange(count) * total // count

    def train_dataloader(self) -> TensorDataLoader:
        return self._batches(self.train, self.seed)

    def val_dataloader(self) -> TensorDataLoader:
        return self._batches(self.test if self.settings.score_each_epoch == "test" else self.val)

    def test_dataloader(self) -> TensorDataLoader:
        return self._batches(self.test)

    predict_dataloader = test_dataloader

    def _batches(self, part: "tuple[Tensor | MappedImages, Tensor]", seed: int | None = None) -> TensorDataLoader:
        trainer = self.trainer
        if trainer is None:
            return TensorDataLoader(*part, self.settings.batch_size, seed)
        return TensorDataLoader(
            *part,
            self.settings.batch_size,
            seed,
            lambda: trainer.current_epoch,
            not trainer.overfit_batches,  # type: ignore[attr-defined]  # Lightning sets it. Overfitting needs the same batches in every epoch
            trainer.global_rank,
            trainer.world_size,
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Augments training images, and converts all images to the input of the network."""
        images, labels = batch
        is_training = self.trainer is not None and self.trainer.training
        return self.transform_images(images, self.settings.augment if is_training else "none"), labels

    def transform_images(self, images: Tensor, augmentation: str = "none") -> Tensor:
        """Augments images, and converts ``(batch, height, width)`` uint8 to ``(batch, 1, image_size, image_size)``.

        In color, ``(batch, height, width, 3)`` to ``(batch, 3, image_size, image_size)``. Values are from 0 to 1.

        The result has the precision of the weights, where the Trainer's is not float32.
        """
        images = resize(augment(images, augmentation), self.settings.image_size)
        return self.trainer.precision_plugin.convert_input(images) if self.trainer else images


def _warn_of_mirrored_characters(data: Data) -> None:
    """Warns if characters are flipped, as the recipes for clothes do."""
    if not DATA_SETS[data.name].has_characters:
        return
    settings = [f"data.augment={data.augment}"] * (data.augment != "none")
    settings += ["data.test_time_flip=true"] * data.test_time_flip
    if settings:
        log.warning(
            "%s mirrors the characters of %s, some of which then are other characters; data.augment=none "
            "data.test_time_flip=false does not",
            " ".join(settings), data.name,
        )  # fmt: skip


def split(count: int, val_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """The sorted indices of the held-out images, ``(val_size,)``, and of the others, ``(count - val_size,)``.

    They depend on nothing but these arguments.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[:val_size].sort().values, order[val_size:].sort().values
