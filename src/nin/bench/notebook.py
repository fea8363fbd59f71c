"""The notebooks' training loop, written without this project."""

import itertools
import logging
import shutil
import time

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from nin.data.parallel import count_cores
from nin.system.devices import default_allocator

log = logging.getLogger(__name__)


class NotebookLoop:
    """The notebooks' training: PIL's Resize and ToTensor on one image at a time, float32, torch's default memory
    format, SGD, and the loss and accuracy read back from the device in every batch.

    Args:
        network: trained in place.
        train: ``(count, 28, 28)`` uint8 images and ``(count,)`` labels.
        seconds: how long a call measures.
    """

    def __init__(
        self,
        network: nn.Module,
        train: tuple[Tensor, Tensor],
        image_size: int,
        batch_size: int,
        device: torch.device,
        seconds: float,
    ):
        self.device, self.seconds, self.steps = device, seconds, 0
        images, labels = train
        dataset = PILImages(images.cpu().numpy(), labels.cpu().numpy(), image_size)
        workers = _count_workers(device, 4 * batch_size * image_size**2)
        self.loader = DataLoader(dataset, batch_size, shuffle=True, num_workers=workers)
        self.network = network.to(device)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01)

    @default_allocator()
    def __call__(self) -> float:
        """Images per second, with the default allocator as in a notebook."""
        batches = itertools.chain.from_iterable(itertools.repeat(self.loader))
        if not self.steps or self.loader.num_workers:
            self._step(next(batches))  # not timed: the workers start, memory is allocated
        if not self.steps:
            started = time.perf_counter()
            self._step(next(batches))
            self.steps = max(1, round(self.seconds / (time.perf_counter() - started)))
        started, images = time.perf_counter(), 0
        for _ in range(self.steps):
            images += self._step(next(batches))
        return images / (time.perf_counter() - started)

    def _step(self, batch: tuple[Tensor, Tensor]) -> int:
        images, labels = batch[0].to(self.device), batch[1].to(self.device)
        self.optimizer.zero_grad()
        logits = self.network(images)
        loss = functional.cross_entropy(logits, labels)
        loss.backward()
        self.optimizer.step()
        loss.item(), (logits.argmax(1) == labels).sum().item()
        return len(labels)


def _count_workers(device: torch.device, batch_bytes: int) -> int:
    if device.type == "cpu":
        return 0  # they would take cores from the network, also during the other measurements
    try:
        # Each worker holds two batches that are done and one in progress; a container often has 64 MB for all.
        limit = shutil.disk_usage("/dev/shm").free // (3 * batch_bytes)
    except OSError:
        limit = 8  # macOS, whose shared memory is no file system
    workers = min(8, count_cores())
    if limit < workers:
        log.warning(
            "/dev/shm has room for %d of %d workers of the notebooks' loop, which is slower with fewer: give the "
            "container more shared memory (docker run --shm-size=2g)", limit, workers
        )  # fmt: skip
    return min(workers, limit)


class PILImages(Dataset[tuple[Tensor, int]]):
    """``(height, width)`` uint8 images, each resized by PIL when it is read."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, image_size: int):
        self.images, self.labels = images, labels
        self.transform = transforms.Compose([transforms.Resize(image_size), transforms.ToTensor()])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])
