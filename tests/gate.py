"""Callbacks that hold, stop, slow down or fail a run, so that the rest is the same on every machine, however fast."""

import contextlib
import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer


class Gate(Callback):
    """Training waits before the step whose number is in the file ``path``, until there is a larger one.

    A process that has begun to wait has written the file ``<path>.<process id>``.
    """

    def __init__(self, path: str):
        self.path = Path(path)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        while trainer.global_step >= self._limit():
            self.path.with_name(f"{self.path.name}.{os.getpid()}").touch()
            time.sleep(0.01)

    def _limit(self) -> int:
        with contextlib.suppress(OSError, ValueError):  # not there yet, or half written
            return int(self.path.read_text())
        return 0


class StopIn(Callback):
    """Sends SIGTERM to this process in the ``count``-th call of a hook."""

    def __init__(self, hook: str, count: int = 1):
        self.left = count
        setattr(self, hook, self.stop)

    def stop(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


class SlowEnd(Callback):
    """Rank 0 takes longer to end a stopped run than Lightning takes to see that the other processes have ended."""

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            time.sleep(12)


class Draws(Callback):
    """Each process writes a random number of its first and of its last step, and the sum of its weights."""

    def __init__(self, path: str):
        self.path = Path(path)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        weights = sum(float(parameter.double().sum()) for parameter in pl_module.parameters())
        with self.path.with_name(f"{self.path.name}.{trainer.global_rank}").open("a") as file:
            print(trainer.global_step, f"{weights:.9f}", float(torch.rand(1)), file=file)


class FailingRank(Callback):
    """Rank 0 fails in the fourth batch; the other processes are at work for a long time."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            if trainer.is_global_zero:
                raise OSError(errno.ENOSPC, "No space left on device")
            time.sleep(150)
