"""Ctrl-C, SIGTERM and SLURM's warning: a request to stop at the next batch, not an end in the middle of one."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

# What people, kill, batch systems and SLURM (before its time limit or a preemption) send.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, *((signal.SIGUSR1,) if "SLURM_JOB_ID" in os.environ else ()))


class StoppedError(Exception):
    """The run was stopped from outside; its checkpoint is saved."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_status = 130 if signum == signal.SIGINT else 143


class StopRequest:
    """Remembers that a stop was asked for; a second Ctrl-C ends the process at once.

    As a context manager it puts the handlers that were there before back in place.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def listen(self) -> None:
        """Takes the signals; said again where another library has taken them meanwhile."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python delivers signals to the main thread alone
        for signum in _SIGNALS:
            handler = signal.signal(signum, self._handle)
            self._before.setdefault(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signum is not None:
            os.write(2, b"\x1b[?25h\nstopped at once\n" if os.isatty(2) else b"stopped at once\n")  # the cursor back
            os._exit(130)
        self.signum = signum
        os.write(2, b"\nstopping after this batch, with a checkpoint (Ctrl-C again stops at once)\n")
