"""How fast: the real training beside the notebooks' loop and the machine's limit, in turns, so that ratios hold."""

import contextlib
import os
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from nin import networks
from nin.callbacks import EventStream, Watch
from nin.checkpoints import Checkpoints
from nin.classifier import Classifier
from nin.data.datamodule import ImageData
from nin.experiment import build_trainer
from nin.networks import IN_CHANNELS, NUM_CLASSES
from nin.progress import Bar
from nin.run_folder import RunFolder
from nin.settings import Settings
from nin.stopping import StopRequest

Told = Callable[[str], None]


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
            _wait_for(module.device)
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
    with _project(settings) as (module, data, build):
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


@contextlib.contextmanager
def _project(settings: Settings) -> Iterator[tuple[Classifier, ImageData, Callable[..., Trainer]]]:
    """What `nin train` trains with: its bar (drawn nowhere), loggers and checkpoints, in a folder that goes away."""
    with tempfile.TemporaryDirectory() as path, Path(os.devnull).open("w") as nowhere, StopRequest() as stop:
        folder = RunFolder(path)
        folder.checkpoints.mkdir()
        lightning.seed_everything(settings.seed, verbose=False)
        opened = []

        def build(more: list[Callback]) -> Trainer:
            watch = Watch(folder.metrics)
            bar = Bar(watch)
            bar.console = Console(file=nowhere, force_terminal=True, width=120)
            kept = Checkpoints(folder, settings.checkpoint.every_n_steps, watch, stop)
            trainer = build_trainer(settings, folder.path, [watch, bar, kept, *more])
            opened.extend(trainer.loggers)
            return trainer

        yield Classifier(settings), ImageData(settings.data, settings.seed), build
        for logger in opened:
            if isinstance(logger, EventStream):
                logger.close()


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
        """Images a second."""
        batches = iter(self.loader)
        if not self.steps or self.loader.num_workers:
            self._step(next(batches))  # not timed: the workers begin, memory is taken
        if not self.steps:
            begun = time.perf_counter()
            self._step(next(batches))
            self.steps = max(1, min(len(self.loader) - 3, round(self.seconds / (time.perf_counter() - begun))))
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
    """``(height, width)`` uint8 images, each resized by PIL when it is asked for."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, image_size: int):
        self.images, self.labels = images, labels
        self.transform = transforms.Compose([transforms.Resize(image_size), transforms.ToTensor()])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def _data_rate(data: ImageData, module: Classifier, seconds: float) -> float:
    """Images a second that are taken, resized and scaled, and nothing else."""
    images, begun = 0, time.perf_counter()
    while True:
        for batch in data.train_dataloader():
            images += len(data.on_after_batch_transfer(batch, 0)[1])
            if time.perf_counter() > begun + seconds:
                _wait_for(module.device)
                return images / (time.perf_counter() - begun)


def _scoring_rate(data: ImageData, module: Classifier, device: torch.device, seconds: float) -> float:
    """Images a second through `Classifier.validation_step`, as `nin eval` does it."""
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    training, images, begun = module.training, 0, time.perf_counter()
    module.eval()
    with torch.inference_mode():
        while time.perf_counter() < begun + seconds:
            module.validation_step(batch, 0)
            images += len(batch[1])
            _wait_for(device)
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
        _wait_for(device)
        products, begun = 0, time.perf_counter()
        while time.perf_counter() < begun + seconds / len(sizes):
            left @ right
            _wait_for(device)
            products += 1
        best = max(best, 2 * size**3 * products / (time.perf_counter() - begun))
    return best


def operations(settings: Settings) -> dict[str, int]:
    """FLOP an image: forward alone, and forward with backward; a multiply-add counts as two."""
    network, size = networks.build(settings), settings.data.image_size
    images = torch.zeros(2, IN_CHANNELS, size, size)  # two, since batch norm needs more than one
    with FlopCounterMode(display=False) as forward:
        logits = network(images)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    count = forward.get_total_flops() // 2
    return {"forward": count, "training": count + backward.get_total_flops() // 2}


# ---------------------------------------------------------------------------------------------------------------------
# What a step costs besides the network.

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
    on_cpu = settings.trainer.model_copy(update={"accelerator": "cpu"})
    settings = settings.model_copy(update={"trainer": on_cpu, "compile": False})
    with _project(settings) as (module, data, build):
        data.data = settings.data.model_copy(update={"image_size": 28, "batch_size": 32})
        module.settings = settings.model_copy(update={"data": data.data})
        module.network, module.dropouts, module.piece_size = _smallest(), [], None
        build([clock]).fit(module, data)
    return clock.seconds


# ---------------------------------------------------------------------------------------------------------------------
# Why memory grows as it does.


def memory(settings: Settings, batch_size: int, told: Told) -> dict[str, int]:
    """Bytes in a training step: what stays, what is kept for the backward pass, and the whole process's peak."""
    told(f"memory at batch {batch_size}")
    data = settings.data.model_copy(update={"batch_size": batch_size})
    one_step = settings.trainer.model_copy(update={"max_steps": 1})
    settings = settings.model_copy(update={"data": data, "trainer": one_step, "callbacks": {}, "compile": False})
    found = _one_step(settings)
    whole = _one_step(settings.model_copy(update={"speed": settings.speed.model_copy(update={"piece": None})}))
    peak = found.pop("peak")
    return found | {"activations_uncut": whole["activations"], "peak": peak}


def _one_step(settings: Settings) -> dict[str, int]:
    kept = Kept()
    with _project(settings) as (module, images, build):
        trainer = build([])
        _reset_peak()
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda saved: saved.tensor):
            trainer.fit(module, images)
        parameters = sum(p.nbytes for p in module.network.parameters())
        state = (value for values in trainer.optimizers[0].state.values() for value in values.values())
        return {
            "weights": parameters + sum(b.nbytes for b in module.network.buffers()),
            "gradients": parameters,
            "optimiser": sum(value.nbytes for value in state if isinstance(value, Tensor)),
            "activations": kept.most,
            "peak": _peak(),
        }


class Kept:
    """Counts the bytes that autograd keeps for the backward pass, each piece of memory once."""

    def __init__(self) -> None:
        self.users: dict[int, int] = defaultdict(int)
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> "Saved":
        return Saved(self, tensor)


class Saved:
    def __init__(self, kept: Kept, tensor: Tensor):
        self.kept, self.tensor = kept, tensor
        self.place, self.size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        self.counted = not isinstance(tensor, nn.Parameter)
        if self.counted:
            kept.users[self.place] += 1
            kept.now += self.size if kept.users[self.place] == 1 else 0
            kept.most = max(kept.most, kept.now)

    def __del__(self) -> None:
        if self.counted:
            self.kept.users[self.place] -= 1
            self.kept.now -= 0 if self.kept.users[self.place] else self.size


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux's
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """The most memory that was taken since `_reset_peak`: the GPU's, or else this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _dtype(trainer: Trainer) -> torch.dtype:
    return {"bf16": torch.bfloat16, "16": torch.float16}.get(str(trainer.precision).split("-")[0], torch.float32)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
