"""The cost of a training step besides the network: a plain loop, Lightning's bare Trainer, and ``nin train``."""

import math
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from nin.bench.project import Report, prepare_training
from nin.config.networks import OwnModel
from nin.config.schema import Settings
from nin.data.sources import describe

_STEPS, _WARM_UP = 300, 30
_BATCH_SIZE, _IMAGE_SIZE = 32, 28


@dataclass
class StepTimer(Callback):
    """Measures the seconds of ``_STEPS`` steps after the first ``_WARM_UP``, then stops training."""

    done: int = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.done += 1
        if self.done == _WARM_UP:
            self.started = time.perf_counter()
        elif self.done == _WARM_UP + _STEPS:
            self.seconds = time.perf_counter() - self.started
            trainer.should_stop = True


class LinearModule(LightningModule):
    """Trains ``network`` with nothing but what training needs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def measure_overhead(settings: Settings, rounds: int, progress: Report) -> dict[str, float]:
    """Milliseconds per step on a linear network, by name: "plain loop", "bare Trainer" and "nin train"."""
    data = describe(settings.data)
    shape, classes = (data.channels, _IMAGE_SIZE, _IMAGE_SIZE), len(data.class_names)
    batches = [
        (torch.rand(_BATCH_SIZE, *shape), torch.randint(0, classes, (_BATCH_SIZE,))) for _ in range(_WARM_UP + _STEPS)
    ]
    milliseconds: dict[str, list[float]] = defaultdict(list)
    for i in range(rounds):
        ways = {
            "plain loop": lambda network: _time_plain_loop(network, batches),
            "bare Trainer": lambda network: _time_bare_trainer(network, batches),
            "nin train": lambda network: _time_project(network, settings),
        }
        for name, time_steps in ways.items():
            done = sum(map(len, milliseconds.values()))
            progress(f"overhead, round {i + 1} of {rounds}", name, done, rounds * len(ways))
            network = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes))
            milliseconds[name].append(1000 * time_steps(network) / _STEPS)
    return {name: float(np.median(values)) for name, values in milliseconds.items()}


def _time_plain_loop(network: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    started = 0.0
    for i, (images, labels) in enumerate(batches):
        if i == _WARM_UP:
            started = time.perf_counter()
        optimizer.zero_grad()
        functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return time.perf_counter() - started


def _time_bare_trainer(network: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    timer = StepTimer()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[timer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    dataset = TensorDataset(images.unflatten(0, (-1, _BATCH_SIZE)), labels.unflatten(0, (-1, _BATCH_SIZE)))
    trainer.fit(LinearModule(network), DataLoader(dataset, batch_size=None))  # each item of the dataset is a batch
    return timer.seconds


def _time_project(network: nn.Sequential, settings: Settings) -> float:
    timer = StepTimer()
    on_cpu = settings.trainer.model_copy(update={"accelerator": "cpu", "devices": 1, "precision": None})
    settings = settings.model_copy(update={"trainer": on_cpu, "compile": False})
    with prepare_training(settings) as (module, data, build):
        data.prepare_data()
        data.setup("fit")  # before the batch size below: a folder may have fewer images
        data.settings = settings.data.model_copy(  # type: ignore[assignment]  # refused for data of the user's own
            update={"image_size": _IMAGE_SIZE, "batch_size": _BATCH_SIZE}
        )
        model = settings.model
        if not isinstance(model, OwnModel):
            model = model.model_copy(update={"init": "torch"})  # the linear network has no filters to start from images
        module.settings = settings.model_copy(update={"data": data.settings, "model": model})
        module.network, module.dropouts, module.micro_batch_size = network, [], None
        build([timer]).fit(module, data)
    return timer.seconds
