"""Ctrl-C, SIGTERM and SLURM's warning: a request to stop at the next batch, not an end in the middle of one."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import Any, Self

from nin.system.distributed import global_rank


class StoppedError(Exception):
    """The run was stopped from outside; its checkpoint is saved."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum
        self.exit_status = 130 if signum == signal.SIGINT else 143

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}"

    def requeue(self) -> None:
        """Puts a SLURM job back into the queue if it was stopped by SLURM's warning that its time is up."""
        if self.signum in (signal.SIGINT, signal.SIGTERM) or global_rank() != 0:
            return
        if callable(signal.getsignal(self.signum)):
            signal.raise_signal(self.signum)  # submitit's own handler does it, and ends this process
        done = _scontrol("requeue")
        told = f"could not be requeued ({done.stderr.strip()})" if done.returncode else "is back in the queue"
        print(f"SLURM job {os.environ['SLURM_JOB_ID']} {told}", file=sys.stderr)


def back_in_queue() -> bool:
    """Whether SLURM ends this job to run it again, as after `scontrol requeue`, and not because it was cancelled."""
    if "SLURM_JOB_ID" not in os.environ:
        return False
    shown = _scontrol("show", "job").stdout
    return "JobState=" in shown and not any(f"JobState={state}" in shown for state in ("RUNNING", "CANCELLED"))


def _scontrol(*command: str) -> subprocess.CompletedProcess[str]:
    line = ["scontrol", *command, os.environ["SLURM_JOB_ID"]]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def _signals() -> list[signal.Signals]:
    """What people, ``kill`` and batch systems send; SLURM's warnings as Lightning and submitit have it send them."""
    signals = [signal.SIGINT, signal.SIGTERM]
    if "SLURM_JOB_ID" in os.environ:
        signals.append(signal.SIGUSR1)
    if "SUBMITIT_EXECUTOR" in os.environ:
        signals.append(signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"])
    return signals


class StopRequest:
    """Remembers that a stop was asked for; a second Ctrl-C ends the process at once.

    As a context manager it puts the handlers that were there before back in place.

    Args:
        with_parent: in one of joblib's processes. The end of the one that started it asks for a stop as well, and it
            listens to its end: between two jobs, too, a signal must not be the end of the process.
    """

    def __init__(self, with_parent: bool = False) -> None:
        self._signum: int | None = None
        self._asked_at = 0.0
        self._parent = os.getppid() if with_parent else None
        self._before: dict[int, Any] = {}

    @property
    def signum(self) -> int | None:
        """What asked for the stop."""
        if self._signum is None and self._parent and os.getppid() != self._parent:
            self._signum = signal.SIGTERM
        return self._signum

    @signum.setter
    def signum(self, signum: int) -> None:
        self._signum = signum

    def __enter__(self) -> Self:
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        if self._parent is None:
            for signum, handler in self._before.items():
                signal.signal(signum, handler)

    def listen(self) -> None:
        """Takes the signals; said again where another library has taken them meanwhile."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python delivers signals to the main thread alone
        for signum in _signals():
            handler = signal.signal(signum, self._handle)
            self._before.setdefault(signum, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _signals())  # see launch.Launch

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        # A sweep passes on to its processes what the terminal may have sent to all of them.
        echo = self._parent and time.monotonic() - self._asked_at < 1
        if signum == signal.SIGINT and self.signum is not None and not echo:
            _tell(b"\x1b[?25h\nstopped at once\n" if os.isatty(2) else b"stopped at once\n")  # the cursor back
            os._exit(130)
        if self.signum is not None:
            return
        self.signum, self._asked_at = signum, time.monotonic()
        _tell(b"\nstopping after this batch, with a checkpoint (Ctrl-C again stops at once)\n")


def _tell(line: bytes) -> None:
    with contextlib.suppress(OSError):  # the `tee` behind us has had the Ctrl-C too, and is gone
        os.write(2, line)
