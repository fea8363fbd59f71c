"""Images a second: the real training, the notebooks' loop and the machine's limit in turns, so that ratios hold."""

import itertools
import os
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from nin import networks
from nin.bench.project import Told, project, wait_for
from nin.config.schema import Settings
from nin.data.module import ImageDataModule
from nin.networks import IN_CHANNELS
from nin.system.devices import default_allocator
from nin.training.classifier import Classifier


def operations(settings: Settings) -> dict[str, int]:
    """FLOP an image: scoring it, and training on it, which is forward and backward; a multiply-add counts as two."""
    network, size = networks.build(settings), settings.data.image_size
    images = torch.zeros(2, IN_CHANNELS, size, size)  # two, since batch norm needs more than one
    with FlopCounterMode(display=False) as forward:
        logits = network(images)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    count = forward.get_total_flops() // 2
    scoring = count * (2 if settings.data.test_time_flip else 1)
    return {"scoring": scoring, "training": count + backward.get_total_flops() // 2}


@dataclass
class Turns(Callback):
    """Stops the training every few steps, notes its rate, and lets each of the others have a turn.

    Args:
        others: by name, what measures a rate (anything a second) for about ``seconds``.
        rounds: after so many turns the training ends.
    """

    others: dict[str, Callable[[], float]]
    seconds: float
    rounds: int
    told: Told
    rates: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    steps: int = 0  # of a turn; 0 while it is not known how long one takes
    done: int = 0
    images: int = 0

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, _: int) -> None:
        self.done, self.images = self.done + 1, self.images + len(batch[1])
        if self.done == (self.steps or 2):
            wait_for(module.device)
            elapsed = time.perf_counter() - self.begun
            if self.steps:
                self.rates["training"].append(self.images / elapsed)
                self.told(f"round {len(self.rates['training'])} of {self.rounds}")
                for name, rate in self.others.items():
                    self.rates[name].append(rate())
                trainer.should_stop = len(self.rates["training"]) == self.rounds
            else:
                self.steps = max(1, round(self.seconds / elapsed))  # the first step was not timed
            self.done = 0
        if not self.done or not self.steps:
            self.images, self.begun = 0, time.perf_counter()


def training(settings: Settings, seconds: float, rounds: int, told: Told) -> dict[str, float]:
    """Median rates of what takes turns: images a second, and FLOP a second of the matrix product."""
    with project(settings) as (module, data, build):
        data.trainer = build([])
        data.setup("fit")
        device, dtype = data.trainer.strategy.root_device, _dtype(data.trainer)
        others = {
            "notebooks": NotebookLoop(settings, data.train, device, seconds),
            "data": lambda: _data_rate(data, module, seconds / 4),
            "scoring": lambda: _scoring_rate(data, module, device, seconds),
            "matrix product": lambda: matrix_product(device, dtype, seconds / 2),
        }
        turns = Turns(others, seconds, rounds, told)
        trainer = build([turns])
        trainer.fit(module, data)
    return {name: float(np.median(rates)) for name, rates in turns.rates.items()}


class NotebookLoop:
    """The notebooks' training: PIL's Resize and ToTensor an image at a time, float32, torch's default layout, SGD,
    and the loss and accuracy read back in every batch."""

    def __init__(self, settings: Settings, train: tuple[Tensor, Tensor], device: torch.device, seconds: float):
        self.device, self.seconds, self.steps = device, seconds, 0
        images = PILImages(*(part.cpu().numpy() for part in train), settings.data.image_size)
        # Where the network has the cores, workers for the data would only take them from it, in the others' turns too.
        workers = 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)
        self.loader = DataLoader(images, settings.data.batch_size, shuffle=True, num_workers=workers)
        self.network = networks.build(settings).to(device).train()
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01)

    def __call__(self) -> float:
        """Images a second, with the allocator left to itself as in a notebook."""
        with default_allocator():
            return self._rate()

    def _rate(self) -> float:
        batches = itertools.chain.from_iterable(itertools.repeat(self.loader))
        if not self.steps or self.loader.num_workers:
            self._step(next(batches))  # not timed: the workers begin, memory is taken
        if not self.steps:
            begun = time.perf_counter()
            self._step(next(batches))
            self.steps = max(1, round(self.seconds / (time.perf_counter() - begun)))
        begun, images = time.perf_counter(), 0
        for _ in range(self.steps):
            images += self._step(next(batches))
        return images / (time.perf_counter() - begun)

    def _step(self, batch: tuple[Tensor, Tensor]) -> int:
        images, labels = batch[0].to(self.device), batch[1].to(self.device)
        self.optimizer.zero_grad()
        logits = self.network(images)
        loss = functional.cross_entropy(logits, labels)
        loss.backward()
        self.optimizer.step()
        loss.item(), (logits.argmax(1) == labels).sum().item()
        return len(labels)


class PILImages(Dataset):
    """``(height, width)`` uint8 images, each resize by PIL when it is asked for."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, image_size: int):
        self.images, self.labels = images, labels
        self.transform = transforms.Compose([transforms.Resize(image_size), transforms.ToTensor()])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def _data_rate(data: ImageDataModule, module: Classifier, seconds: float) -> float:
    """Images a second that are taken, resize and scaled, and nothing else."""
    images, begun = 0, time.perf_counter()
    while True:
        for batch in data.train_dataloader():
            images += len(data.on_after_batch_transfer(batch, 0)[1])
            if time.perf_counter() > begun + seconds:
                wait_for(module.device)
                return images / (time.perf_counter() - begun)


def _scoring_rate(data: ImageDataModule, module: Classifier, device: torch.device, seconds: float) -> float:
    """Images a second through `Classifier.validation_step`, as `nin eval` does it."""
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    training, images, begun = module.training, 0, time.perf_counter()
    module.eval()
    with torch.inference_mode(), data.trainer.precision_plugin.val_step_context():
        while time.perf_counter() < begun + seconds:
            module.validation_step(batch, 0)
            images += len(batch[1])
            wait_for(device)
    module.score_loss.reset()
    module.score_acc.reset()
    module.train(training)
    return images / (time.perf_counter() - begun)


def matrix_product(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """The best rate of a large matrix product, in FLOP a second: the machine's limit."""
    best = 0.0
    sizes = (1024, 2048, 4096) if device.type == "cpu" else (4096, 8192, 16384)
    for size in sizes:
        left, right = (torch.rand(size, size, device=device, dtype=dtype) for _ in range(2))
        left @ right
        wait_for(device)
        products, begun = 0, time.perf_counter()
        while time.perf_counter() < begun + seconds / len(sizes):
            left @ right
            wait_for(device)
            products += 1
        best = max(best, 2 * size**3 * products / (time.perf_counter() - begun))
    return best


def _dtype(trainer: Trainer) -> torch.dtype:
    bits = str(trainer.precision).split("-")[0]
    return {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}.get(bits, torch.float32)
