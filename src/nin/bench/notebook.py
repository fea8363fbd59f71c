"""The notebooks' training loop, written without this project."""

import itertools
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
        # On a CPU there are no workers: they would take cores from the network, also during the other measurements.
        workers = 0 if device.type == "cpu" else min(8, count_cores())
        self.loader = DataLoader(dataset, batch_size, shuffle=True, num_workers=workers)
        self.network = network.to(device)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01)

    def __call__(self) -> float:
        """Images per second, with the default allocator as in a notebook."""
        with default_allocator():
            return self._rate()

    def _rate(self) -> float:
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


class PILImages(Dataset[tuple[Tensor, int]]):
    """``(height, width)`` uint8 images, each resized by PIL when it is read."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, image_size: int):
        self.images, self.labels = images, labels
        self.transform = transforms.Compose([transforms.Resize(image_size), transforms.ToTensor()])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])
