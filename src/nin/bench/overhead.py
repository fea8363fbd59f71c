"""What a step costs besides the network: a plain loop, Lightning's bare Trainer, and this project's training."""

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from nin.bench.project import Told, project
from nin.config.schema import Settings
from nin.networks import NUM_CLASSES

_STEPS, _WARM_UP = 300, 30


@dataclass
class Clock(Callback):
    """Seconds of ``_STEPS`` steps behind the first ``_WARM_UP``."""

    done: int = 0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.done += 1
        if self.done == _WARM_UP:
            self.begun = time.perf_counter()
        elif self.done == _WARM_UP + _STEPS:
            self.seconds = time.perf_counter() - self.begun
            trainer.should_stop = True


class Bare(LightningModule):
    """The smallest LightningModule that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.network = _smallest()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def _smallest() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, NUM_CLASSES))


def overhead(settings: Settings, rounds: int, told: Told) -> dict[str, float]:
    """Milliseconds a step on a linear network: a plain loop, Lightning's bare Trainer, and this project's training."""
    batches = [(torch.rand(32, 1, 28, 28), torch.randint(0, NUM_CLASSES, (32,))) for _ in range(_WARM_UP + _STEPS)]
    milliseconds = defaultdict(list)
    for i in range(rounds):
        told(f"overhead {i + 1} of {rounds}")
        for name, seconds in {
            "plain loop": lambda: _plain_loop(batches),
            "bare Trainer": lambda: _bare_trainer(batches),
            "nin train": lambda: _whole_project(settings),
        }.items():
            milliseconds[name].append(1000 * seconds() / _STEPS)
    return {name: float(np.median(values)) for name, values in milliseconds.items()}


def _plain_loop(batches: list[tuple[Tensor, Tensor]]) -> float:
    network = _smallest()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    for i, (images, labels) in enumerate(batches):
        if i == _WARM_UP:
            begun = time.perf_counter()
        optimizer.zero_grad()
        functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return time.perf_counter() - begun


def _bare_trainer(batches: list[tuple[Tensor, Tensor]]) -> float:
    clock = Clock()
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    loader = DataLoader(batches, batch_size=None)
    Trainer(max_epochs=1, accelerator="cpu", callbacks=[clock], **off).fit(Bare(), loader)
    return clock.seconds


def _whole_project(settings: Settings) -> float:
    clock = Clock()
    on_cpu = settings.trainer.model_copy(update={"accelerator": "cpu", "devices": 1, "precision": None})
    settings = settings.model_copy(update={"trainer": on_cpu, "compile": False})
    with project(settings) as (module, data, build):
        data.data = settings.data.model_copy(update={"image_size": 28, "batch_size": 32})
        module.settings = settings.model_copy(update={"data": data.data})
        module.network, module.dropouts, module.micro_batch_size = _smallest(), [], None
        build([clock]).fit(module, data)
    return clock.seconds
