"""Why a training step's memory grows as it does."""

import contextlib
import resource
import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn

from nin.bench.project import Told, project
from nin.config.schema import Settings


def memory(settings: Settings, batch_size: int, told: Told) -> dict[str, int]:
    """Bytes in a training step: what stays, what is kept for the backward pass, and the whole process's peak."""
    told(f"memory at batch {batch_size}")
    data = settings.data.model_copy(update={"batch_size": batch_size})
    one_step = settings.trainer.model_copy(update={"max_steps": 1})
    settings = settings.model_copy(update={"data": data, "trainer": one_step, "callbacks": {}, "compile": False})
    found = _one_step(settings)
    whole = _one_step(settings.model_copy(update={"speed": settings.speed.model_copy(update={"micro_batch": None})}))
    peak = found.pop("peak")
    return found | {"activations_uncut": whole["activations"], "peak": peak}


def _one_step(settings: Settings) -> dict[str, int]:
    with project(settings) as (module, images, build):
        trainer = build([])
        device = trainer.strategy.root_device
        kept = Kept(module)
        _reset_peak(device)
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda saved: saved.tensor):
            trainer.fit(module, images)
        parameters = sum(p.nbytes for p in module.network.parameters())
        state = (value for values in trainer.optimizers[0].state.values() for value in values.values())
        return {
            "weights": parameters + sum(b.nbytes for b in module.network.buffers()),
            "gradients": parameters,
            "optimiser": sum(value.nbytes for value in state if isinstance(value, Tensor)),
            "activations": kept.most,
            "peak": _peak(device),
        }


class Kept:
    """Counts the bytes that autograd keeps for the backward pass, each piece of memory once, and no weights."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.users: dict[int, int] = defaultdict(int)
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> "Saved":
        return Saved(self, tensor)


class Saved:
    def __init__(self, kept: Kept, tensor: Tensor):
        self.kept, self.tensor = kept, tensor
        self.place, self.size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        # A linear layer keeps a transposed view of its weights.
        self.counted = all(self.place != p.untyped_storage().data_ptr() for p in kept.module.parameters())
        if self.counted:
            kept.users[self.place] += 1
            kept.now += self.size if kept.users[self.place] == 1 else 0
            kept.most = max(kept.most, kept.now)

    def __del__(self) -> None:
        if self.counted:
            self.kept.users[self.place] -= 1
            self.kept.now -= 0 if self.kept.users[self.place] else self.size


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # Linux's
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int:
    """The most memory that was taken since `_reset_peak`: the GPU's where it trains there, or else this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    # In bytes on macOS, in KiB elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
