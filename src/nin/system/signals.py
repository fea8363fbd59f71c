"""Ctrl-C, SIGTERM and SLURM's signals: a run stops after the current batch with a checkpoint."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import Any, Self

from nin.system.distributed import environment_rank


class StoppedError(Exception):
    """The run was stopped by a signal; its checkpoint is saved."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum
        self.exit_status = 130 if signum == signal.SIGINT else 143

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}"

    def requeue(self) -> None:
        """Requeues the SLURM job if SLURM's signal before the time limit stopped it."""
        if self.signum in (signal.SIGINT, signal.SIGTERM) or environment_rank() != 0:
            return
        if callable(signal.getsignal(self.signum)):
            signal.raise_signal(self.signum)  # submitit's own handler requeues the job and ends this process
        done = _scontrol("requeue")
        outcome = f"could not be requeued ({done.stderr.strip()})" if done.returncode else "is requeued"
        print(f"SLURM job {os.environ['SLURM_JOB_ID']} {outcome}", file=sys.stderr)


def is_requeued() -> bool:
    """Whether SLURM ends this job to run it again, as after ``scontrol requeue``, and not because it was cancelled."""
    if "SLURM_JOB_ID" not in os.environ:
        return False
    state = _scontrol("show", "job").stdout
    return "JobState=" in state and not any(f"JobState={name}" in state for name in ("RUNNING", "CANCELLED"))


def _scontrol(*command: str) -> subprocess.CompletedProcess[str]:
    line = ["scontrol", *command, os.environ["SLURM_JOB_ID"]]
    return subprocess.run(line, capture_output=True, text=True, check=False)


class StopRequest:
    """Records that a signal requested a stop; a second Ctrl-C ends the process at once.

    As a context manager it restores the previous signal handlers on exit.

    Args:
        parent: for a worker process of a sweep, the id of the process that started it: its end also requests a stop,
            and the handlers stay until this process ends, because a signal between two jobs must not end it.
    """

    def __init__(self, parent: int | None = None) -> None:
        self._signum: int | None = None
        self._received_at = 0.0
        self._parent = parent
        self._previous: dict[int, Any] = {}

    @property
    def signum(self) -> int | None:
        """The signal that requested the stop, or None."""
        if self._signum is None and self.is_orphan():
            self._signum = signal.SIGTERM
        return self._signum

    @signum.setter
    def signum(self, signum: int) -> None:
        self._signum = signum

    def is_orphan(self) -> bool:
        """Whether the parent process that this one depends on has ended."""
        return self._parent is not None and os.getppid() != self._parent

    def __enter__(self) -> Self:
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        if self._parent is None:
            for signum, handler in self._previous.items():
                signal.signal(signum, handler)

    def listen(self) -> None:
        """Installs the signal handlers; called again where another library has replaced them."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python delivers signals to the main thread only
        for signum in _signals():
            handler = signal.signal(signum, self._handle)
            self._previous.setdefault(signum, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _signals())  # sweeps.workers starts processes with them blocked

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        # A sweep forwards to its workers a signal that the terminal may have sent to all of them.
        echo = self._parent and time.monotonic() - self._received_at < 1
        if signum == signal.SIGINT and self.signum is not None and not echo:
            _write(b"\x1b[?25h\nstopped at once\n" if os.isatty(2) else b"stopped at once\n")  # shows the cursor
            os._exit(130)
        if self.signum is not None:
            return
        self.signum, self._received_at = signum, time.monotonic()
        _write(b"\nstopping after this batch with a checkpoint (Ctrl-C again stops at once)\n")


def _signals() -> list[signal.Signals]:
    """The signals of people, ``kill`` and batch systems; SLURM's as Lightning and submitit configure them."""
    signals = [signal.SIGINT, signal.SIGTERM]
    if "SLURM_JOB_ID" in os.environ:
        signals.append(signal.SIGUSR1)
    if "SUBMITIT_EXECUTOR" in os.environ:
        signals.append(signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"])
    return signals


def _write(line: bytes) -> None:
    with contextlib.suppress(OSError):  # `tee` may have ended by the same Ctrl-C
        os.write(2, line)
