"""Images per second of training, of the notebooks' loop and of the machine's limit, measured in turns.

Each round measures all of them, so that their ratios hold while other programs use the machine.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from nin.bench.notebook import NotebookLoop
from nin.bench.project import Report, prepare_training, synchronize
from nin.config.schema import Settings
from nin.data.module import ImageDataModule
from nin.data.sources import describe
from nin.networks.build import build_network, counting_device
from nin.networks.layers import countable_operators
from nin.training.classifier import Classifier


def count_operations(settings: Settings) -> dict[str, int]:
    """FLOP per image; a multiply-add counts as two.

    Returns:
        "scoring", of a forward pass (two with ``data.test_time_flip``), and "training", of a forward and a backward
        pass.
    """
    data = describe(settings.data)
    with counting_device(settings.model):
        network = build_network(settings, data.channels, len(data.class_names))
        # Two, since batch norm needs more than one value per channel.
        images = torch.zeros(2, data.channels, settings.data.image_size, settings.data.image_size)
    # torch's own count of the gradients of a convolution's weights ignores its groups.
    known = {torch.ops.aten.convolution_backward: _count_convolution_backward}
    with countable_operators():
        with FlopCounterMode(display=False) as forward:
            logits = network(images)
        with FlopCounterMode(display=False, custom_mapping=known) as backward:
            logits.sum().backward()
    count = forward.get_total_flops() // 2
    scoring = count * (2 if settings.data.test_time_flip else 1)
    return {"scoring": scoring, "training": count + backward.get_total_flops() // 2}


def _count_convolution_backward(gradient: Any, images: Any, weights: Any, *more: Any, **_: Any) -> int:
    """The FLOP of a convolution's gradients, from the shapes of its tensors; each takes as many as the output."""
    transposed, computed = more[4], more[7]  # the last says which gradients are needed
    return conv_flop_count(images, weights, gradient, transposed) * sum(computed[:2])  # type: ignore[no-any-return]


@dataclass
class Turns(Callback):
    """Pauses training every few steps, records its rate, and runs each of the other measurements once.

    Args:
        others: the other measurements, by name: functions that measure a rate per second for about ``seconds``.
        rounds: the number of turns after which training stops.
    """

    others: dict[str, Callable[[], float]]
    seconds: float
    rounds: int
    progress: Report
    rates: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    steps: int = 0  # per turn; 0 until the time of a step is known
    done: int = 0
    images: int = 0
    started: float = 0.0
    is_warm: bool = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.done, self.images = self.done + 1, self.images + len(batch[1])
        # On a GPU, the first steps of a compiled network record its CUDA graphs.
        few = 1 if pl_module.device.type == "cpu" else 10
        if self.done < (self.steps or few):
            return
        synchronize(pl_module.device)
        elapsed = time.perf_counter() - self.started
        if self.steps:
            self.rates["training"].append(self.images / elapsed)
            for name, measure_rate in self.others.items():
                self.report(name)
                self.rates[name].append(measure_rate())
            trainer.should_stop = len(self.rates["training"]) >= self.rounds
            if not trainer.should_stop:
                self.report("training")
        elif self.is_warm:
            self.steps = max(1, round(self.seconds * few / elapsed))
        self.is_warm = True
        self.done, self.images, self.started = 0, 0, time.perf_counter()

    def report(self, name: str) -> None:
        """Reports that the measurement ``name`` of this round begins."""
        done, count = sum(map(len, self.rates.values())), 1 + len(self.others)
        self.progress(f"round {done // count + 1} of {self.rounds}", name, done, self.rounds * count)


def measure_rates(
    settings: Settings, seconds: float, rounds: int, progress: Report, more: Mapping[str, Callable[[], float]]
) -> dict[str, float]:
    """Median rates over ``rounds`` of about ``seconds`` each.

    Args:
        more: further measurements, by name: functions that return a rate per second.

    Returns:
        Images per second: "training", "notebooks", "data" (reading and resizing batches only), "scoring"; and FLOP per
        second: "matrix product". And those of ``more``.
    """
    with prepare_training(settings) as (module, data, build):
        data.trainer = trainer = build([])
        data.setup("fit")
        device, dtype = trainer.strategy.root_device, _dtype(trainer)
        network = build_network(settings, data.channels, len(data.class_names))
        size, batch_size = settings.data.image_size, settings.data.batch_size
        images, labels = data.train
        if not isinstance(images, torch.Tensor):  # read from disk by batch; the notebooks keep all in memory
            images, labels = images[:10_000], labels[:10_000]
        others: dict[str, Callable[[], float]] = {
            "notebooks": NotebookLoop(network, (images, labels), size, batch_size, device, seconds),
            "data": lambda: _data_rate(data, module, seconds / 4),
            "scoring": lambda: _scoring_rate(data, module, trainer, seconds),
            "matrix product": lambda: measure_matrix_product(device, dtype, seconds / 2),
            **more,
        }
        turns = Turns(others, seconds, rounds, progress)
        turns.report("training")
        build([turns]).fit(module, data)
    return {name: float(np.median(rates)) for name, rates in turns.rates.items()}


def _data_rate(data: ImageDataModule, module: Classifier, seconds: float) -> float:
    """Images per second that are read, resized and scaled, without training on them."""
    images, started = 0, time.perf_counter()
    while True:
        for batch in data.train_dataloader():
            images += len(_transfer(data, batch, module)[1])
            if time.perf_counter() > started + seconds:
                synchronize(module.device)
                return images / (time.perf_counter() - started)


def _transfer(data: ImageDataModule, batch: Any, module: Classifier) -> tuple[Tensor, Tensor]:
    """A batch as the Trainer hands it to a step; only images above data.memory_limit_mib are not on the device yet."""
    return data.on_after_batch_transfer(data.transfer_batch_to_device(batch, module.device, 0), 0)


def _scoring_rate(data: ImageDataModule, module: Classifier, trainer: Trainer, seconds: float) -> float:
    """Images per second of `Classifier.validation_step`, which ``nin eval`` runs too."""
    batch = _transfer(data, next(iter(data.train_dataloader())), module)
    training = [part for part in module.modules() if part.training]
    images, started = 0, time.perf_counter()
    module.eval()
    with torch.inference_mode(), trainer.precision_plugin.val_step_context():
        while time.perf_counter() < started + seconds:
            module.validation_step(batch, 0)
            images += len(batch[1])
    synchronize(module.device)  # only at the end: `nin eval` does not wait for a GPU after each batch either
    seconds = time.perf_counter() - started
    module.eval_loss.reset()
    module.eval_acc.reset()
    for part in training:
        part.training = True
    return images / seconds


@contextlib.contextmanager
def _precision_of_convolutions() -> Iterator[None]:
    """On NVIDIA's GPUs, computes float32 matrix products in TF32, as torch computes float32 convolutions by default."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@_precision_of_convolutions()
def measure_matrix_product(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """The highest rate of a large matrix product, in FLOP per second: the machine's limit."""
    best = 0.0
    sizes = (1024, 2048, 4096) if device.type == "cpu" else (4096, 8192, 16384)
    for size in sizes:
        try:
            best = max(best, _product_rate(size, device, dtype, seconds / len(sizes)))
        except torch.OutOfMemoryError:
            if not best:
                raise
            break  # on a small GPU the smaller sizes count
    return best


def _product_rate(size: int, device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    left, right = (torch.rand(size, size, device=device, dtype=dtype) for _ in range(2))
    left @ right
    synchronize(device)
    products, started = 0, time.perf_counter()
    while time.perf_counter() < started + seconds:
        left @ right
        synchronize(device)
        products += 1
    return 2 * size**3 * products / (time.perf_counter() - started)


def _dtype(trainer: Trainer) -> torch.dtype:
    bits = str(trainer.precision).split("-")[0]
    return {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}.get(bits, torch.float32)
