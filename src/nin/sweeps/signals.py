"""Signals of a sweep with joblib: the first process forwards them to its workers."""

import _thread
import multiprocessing
import os
import signal
import threading
from multiprocessing import resource_tracker
from types import FrameType

from nin.sweeps.workers import JOB_FAILED_SIGNAL
from nin.system.processes import StoppedError, stop_signals


class SignalForwarder:
    """Forwards the signals that stop a run to joblib's workers and lets them finish; joblib itself would kill them.

    A worker without a job would die of a signal, and joblib would kill the others because of that: workers start with
    these signals blocked, until `StopRequest` listens.
    """

    def __init__(self) -> None:
        self.stopped_by: int | None = None
        self.job_failed = self._gives_up = False
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
        if again or (not processes and signum != JOB_FAILED_SIGNAL):
            self._gives_up = True
            _thread.interrupt_main()
        for process in processes:
            if process.pid:
                # A terminal sends Ctrl-C to the workers too, for which a second SIGINT means to end at once.
                os.kill(process.pid, signal.SIGINT if again else signal.SIGTERM)

    def requeue(self) -> None:
        """Requeues the SLURM job if SLURM's signal before the time limit stopped the sweep; its workers have ended."""
        if self.stopped_by not in (None, signal.SIGINT, signal.SIGTERM):
            signal.signal(self.stopped_by, signal.SIG_DFL)  # it would be sent to a handler, as to that of submitit
            StoppedError(self.stopped_by).requeue()
