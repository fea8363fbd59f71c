"""The memory of a training step, and which part of it grows with the batch size."""

import contextlib
import resource
import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn

from nin.bench.project import Report, prepare_training
from nin.config.schema import Settings


def measure_memory(settings: Settings, batch_size: int, progress: Report) -> dict[str, int]:
    """Bytes of a training step.

    Returns:
        "weights", "gradients" and "optimizer" (its state); "activations", the largest number of bytes kept for the
        backward pass, and "activations_full_batch", the same without micro-batches; "peak", of the GPU's memory, or
        of the process on a CPU.
    """
    progress(line := f"memory at batch size {batch_size}", "a step", 0, 2)
    data = settings.data.model_copy(update={"batch_size": batch_size})
    one_step = settings.trainer.model_copy(update={"max_steps": 1})
    settings = settings.model_copy(update={"data": data, "trainer": one_step, "callbacks": {}, "compile": False})
    measured = _measure_step(settings)
    progress(line, "a step without micro-batches", 1, 2)
    full_batch = settings.speed.model_copy(update={"micro_batch": None})
    activations = _measure_step(settings.model_copy(update={"speed": full_batch}))["activations"]
    peak = measured.pop("peak")
    return measured | {"activations_full_batch": activations, "peak": peak}


def _measure_step(settings: Settings) -> dict[str, int]:
    with prepare_training(settings) as (module, data, build):
        trainer = build([])
        device = trainer.strategy.root_device
        saved_tensors = SavedTensors(module)
        _reset_peak(device)
        with torch.autograd.graph.saved_tensors_hooks(saved_tensors.pack, lambda saved: saved.tensor):
            trainer.fit(module, data)
        parameters = sum(p.nbytes for p in module.network.parameters())
        state = (value for values in trainer.optimizers[0].state.values() for value in values.values())
        return {
            "weights": parameters + sum(b.nbytes for b in module.network.buffers()),
            "gradients": parameters,
            "optimizer": sum(value.nbytes for value in state if isinstance(value, Tensor)),
            "activations": saved_tensors.peak,
            "peak": _peak(device),
        }


class SavedTensors:
    """Counts the bytes that autograd saves for the backward pass: each storage once, and no parameters.

    Args:
        module: whose parameters are not counted.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.references: dict[int, int] = defaultdict(int)
        self.current = self.peak = 0

    def pack(self, tensor: Tensor) -> "SavedTensor":
        return SavedTensor(self, tensor)


class SavedTensor:
    """A tensor that is counted from its construction until it is freed."""

    def __init__(self, counter: SavedTensors, tensor: Tensor):
        self.counter, self.tensor = counter, tensor
        self.address, self.size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        # Tensors are compared by their storage, since a linear layer saves a transposed view of its weights.
        self.counted = all(self.address != p.untyped_storage().data_ptr() for p in counter.module.parameters())
        if self.counted:
            counter.references[self.address] += 1
            counter.current += self.size if counter.references[self.address] == 1 else 0
            counter.peak = max(counter.peak, counter.current)

    def __del__(self) -> None:
        if self.counted:
            self.counter.references[self.address] -= 1
            self.counter.current -= 0 if self.counter.references[self.address] else self.size


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # exists on Linux only
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int:
    """The largest number of bytes in use since `_reset_peak`: of the GPU if it is used, otherwise of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    # The system reports bytes on macOS, and KiB elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
