"""A callback that holds training, so that a signal finds a run at work on every machine, however late it comes."""

import contextlib
import time
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer


class Gate(Callback):
    """Training waits before the step whose number is in the file ``path``, until there is a larger one."""

    def __init__(self, path: str):
        self.path = Path(path)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        while trainer.global_step >= self._limit():
            time.sleep(0.01)

    def _limit(self) -> int:
        with contextlib.suppress(OSError, ValueError):  # not there yet, or half written
            return int(self.path.read_text())
        return 0
