"""The LightningDataModule: both data sets in memory as uint8, the held-out split, batches."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor

from nin.config.schema import Data
from nin.data.sources import describe, load, prepare
from nin.data.transforms import augment, resize


class Batches:
    """Batches of images that fit in memory, each taken by one indexing operation.

    Yields ``(batch, 28, 28)`` uint8 images and ``(batch,)`` int64 labels; the last batch may be smaller. A shuffled
    order hangs on the seed and the epoch alone, and the place in it can be saved and loaded, so that a run that goes
    on in the middle of an epoch sees the images that are left.

    Args:
        seed: of the order; None keeps the order of the files.
        epoch: tells the current epoch.
        reshuffled: whether each epoch has an order of its own.
        rank: which of the ``world_size`` processes this is. Each takes its share of every batch's images.
    """

    def __init__(
        self,
        images: Tensor,
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
        self._place = {"epoch": 0, "batch": 0}
        self._loaded: dict[str, int] | None = None

    def __len__(self) -> int:
        whole, rest = divmod(len(self.labels), self.batch_size * self.world_size)
        # Shuffled batches are for training, and nothing can be learnt from an empty one: a rest of fewer images than
        # processes is left out.
        return whole + (rest >= self.world_size if self.seed is not None else rest > 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, loaded = self.epoch(), self._loaded
        self._loaded = None
        order = self._order(epoch if self.reshuffled else 0)
        for batch in range(loaded["batch"] if loaded and loaded["epoch"] == epoch else 0, len(self)):
            together = self.batch_size * self.world_size
            taken = order[batch * together : (batch + 1) * together][self.rank :: self.world_size]
            # Counted before the batch is used: a checkpoint after this batch goes on with the next.
            self._place = {"epoch": epoch, "batch": batch + 1}
            yield self.images[taken], self.labels[taken]

    def _order(self, epoch: int) -> Tensor:
        if self.seed is None:
            return torch.arange(len(self.labels), device=self.labels.device)
        # Each epoch of a seed has a generator of its own, so that its order is known without those before it.
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0]))
        return torch.randperm(len(self.labels), generator=generator).to(self.labels.device)

    def state_dict(self) -> dict[str, int]:
        return dict(self._place)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._place, self._loaded = dict(state), dict(state)


class ImageDataModule(LightningDataModule):
    """Fashion-MNIST or the garments: training images, held-out images to choose by, test images.

    Args:
        data: which set, how large its images and batches.
        seed: chooses the held-out images and each epoch's order.
    """

    def __init__(self, data: Data, seed: int):
        super().__init__()
        self.data, self.seed = data, seed
        self.info = describe(data)

    def prepare_data(self) -> None:
        prepare(self.data)

    def setup(self, stage: str) -> None:
        if stage == "fit" and not hasattr(self, "train"):
            images, labels = self._on_device(*load(self.data, "train"))
            held_out, kept = split(len(labels), self.data.val_size, self.seed)
            self.train, self.val = (images[kept], labels[kept]), (images[held_out], labels[held_out])
        if not hasattr(self, "test") and (stage in ("test", "predict") or self.data.score_each_epoch == "test"):
            self.test = self._on_device(*load(self.data, "t10k"))

    def _on_device(self, images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        """The whole set lives on the accelerator: 47 MB, and no transfer in a step."""
        device = self.trainer.strategy.root_device
        return torch.tensor(images, device=device), torch.tensor(labels, device=device, dtype=torch.int64)

    def train_dataloader(self) -> Batches:
        return self._batches(self.train, self.seed)

    def val_dataloader(self) -> Batches:
        return self._batches(self.test if self.data.score_each_epoch == "test" else self.val)

    def test_dataloader(self) -> Batches:
        return self._batches(self.test)

    predict_dataloader = test_dataloader

    def _batches(self, part: tuple[Tensor, Tensor], seed: int | None = None) -> Batches:
        trainer = self.trainer
        return Batches(
            *part,
            self.data.batch_size,
            seed,
            lambda: trainer.current_epoch,
            not trainer.overfit_batches,  # overfitted are the same batches again and again
            trainer.global_rank,
            trainer.world_size,
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """uint8 28x28 on the device becomes what the network sees; while training, augment."""
        images, labels = batch
        if self.trainer.training:
            images = augment(images, self.data.augment)
        return self.prepare_images(images), labels

    def prepare_images(self, images: Tensor) -> Tensor:
        """``(batch, 28, 28)`` uint8 becomes ``(batch, 1, image_size, image_size)`` from 0 to 1."""
        # In the precision of the network's weights, where that is not float32.
        return self.trainer.precision_plugin.convert_input(resize(images, self.data.image_size))


def split(count: int, val_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the held-out images and of those to train on, in the files' order; they hang on ``seed`` alone."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[:val_size].sort().values, order[val_size:].sort().values
