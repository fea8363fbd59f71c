"""Signals of a sweep: between its jobs they end it, and with joblib its first process forwards them to its workers."""

import _thread
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

from nin.sweeps.workers import JOB_FAILED_SIGNAL, SweepInterrupt
from nin.system.processes import StoppedError, stop_signals


@contextmanager
def interrupt_at_signals() -> Iterator[None]:
    """Raises SweepInterrupt at a signal that no run listens to, as between two jobs; Ctrl-C raises KeyboardInterrupt.

    By default the process would end without a report and, at SLURM's signal before the time limit, without a requeue.
    """

    def interrupt(signum: int, frame: FrameType | None) -> None:
        stopped = StoppedError(signum)
        stopped.requeue()
        raise SweepInterrupt(stopped.exit_status)

    before = {signum: signal.signal(signum, interrupt) for signum in stop_signals() if signum != signal.SIGINT}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class SignalForwarder:
    """Forwards the signals that stop a run to joblib's workers and lets them finish; joblib itself would kill them.

    A worker without a job would die of a signal, and joblib would kill the others because of that: workers start with
    these signals blocked, until `StopRequest` listens.
    """

    def __init__(self) -> None:
        self.stopped_by: int | None = None
        self.job_failed = self._gives_up = self._is_launched = False
        taken = (*stop_signals(), JOB_FAILED_SIGNAL)
        for signum in taken:  # a thread that a library started earlier may receive them
            signal.signal(signum, self._handle)
        resource_tracker.ensure_running()  # it unblocks signals when it starts
        signal.pthread_sigmask(signal.SIG_BLOCK, taken)

        def wait() -> None:
            while True:
                self._forward(signal.sigwait(taken))

        threading.Thread(target=wait, daemon=True).start()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._gives_up:
            raise KeyboardInterrupt
        self._forward(signum)

    def _forward(self, signum: int) -> None:
        again = signum == signal.SIGINT and self.stopped_by is not None
        if signum == JOB_FAILED_SIGNAL:
            self.job_failed = True
        else:
            self.stopped_by = self.stopped_by or signum
        processes = multiprocessing.active_children()
        # Workers without a job stay for minutes.
        if again or (signum != JOB_FAILED_SIGNAL and not (processes and self._is_launched)):
            self._gives_up = True
            _thread.interrupt_main()
        for process in processes:
            if process.pid:
                # A terminal sends Ctrl-C to the workers too, for which a second SIGINT means to end at once.
                os.kill(process.pid, signal.SIGINT if again else signal.SIGTERM)

    def forward_during(self, launch: Callable[..., Any]) -> Callable[..., Any]:
        """``launch``, during which signals are forwarded to the workers; at other times they end the sweep."""

        def launch_jobs(*arguments: Any) -> Any:
            if self.stopped_by is not None:
                raise StoppedError(self.stopped_by)
            self._is_launched = True
            try:
                return launch(*arguments)
            finally:
                self._is_launched = False

        return launch_jobs
