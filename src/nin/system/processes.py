"""The processes of a run: their ranks, the folder that they share, and the signals that stop them.

torchrun, srun and Lightning start several processes for one run. A run stops after the current batch, with a
checkpoint, by Ctrl-C, SIGTERM and SLURM's signals.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Self

from nin.config.keys import quote_value
from nin.config.schema import Trainer, UserError, is_single_process

_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # as Lightning reads them


def require_matching_start(trainer: Trainer) -> None:
    """Checks that the processes of the run are started as ``trainer`` says.

    Raises:
        UserError: if each process of torchrun or srun would train a network of its own, or if nothing starts the
            processes of the other nodes, for which Lightning would wait without a message.
    """
    if (launcher := multi_process_launcher()) and is_single_process(trainer):
        total = os.environ["WORLD_SIZE" if launcher == "torchrun" else "SLURM_STEP_NUM_TASKS"]
        local = os.environ["LOCAL_WORLD_SIZE"] if launcher == "torchrun" else "… (the processes per node)"
        raise UserError(
            f"{launcher} started {total} processes, and trainer.strategy={trainer.strategy} uses one; "
            f"add trainer=ddp trainer.devices={local}"
        )
    # Lightning divides the images among as many processes as there are devices, also if others were started.
    devices = len(trainer.devices) if isinstance(trainer.devices, list) else trainer.devices
    if started_by_torchrun() and str(devices) != (started := os.environ["LOCAL_WORLD_SIZE"]):
        raise UserError(
            f"trainer.devices={trainer.devices}: torchrun started {started} processes on this machine; add "
            f"trainer.devices={started}"
        )
    if trainer.num_nodes > 1 and not started_on_several_nodes():
        raise UserError(
            f"trainer.num_nodes={trainer.num_nodes}: this process was started on one node only; start it on every node "
            "with torchrun or srun, or set MASTER_ADDR and NODE_RANK on each"
        )


def started_on_several_nodes() -> bool:
    """Whether torchrun, SLURM or variables that the user has set describe a cluster to Lightning."""
    return started_by_torchrun() or "MASTER_ADDR" in os.environ or int(os.environ.get("SLURM_NNODES", 1)) > 1


def multi_process_launcher() -> str | None:
    """The program that started this process together with others, "torchrun" or "srun"; None if it is alone."""
    if started_by_torchrun():
        return "torchrun"
    return "srun" if "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 else None


def started_by_torchrun() -> bool:
    """Whether torchrun started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


def global_rank(trainer: Trainer) -> int:
    """The rank of this process in its run, before Lightning knows it. The only process of a run has rank 0."""
    if is_single_process(trainer):
        remove_left_over_ranks()
        return 0
    return environment_rank()


def remove_left_over_ranks() -> None:
    """Removes variables that another program left in the environment of a run of one process.

    Lightning, which reads them when it is imported, would take the process for another rank, and nothing would be
    logged or saved.
    """
    for key in _RANKS:
        if os.environ.get(key, "0") != "0":
            del os.environ[key]


def environment_rank() -> int:
    """The rank that torchrun, Lightning or SLURM has set in the environment; 0 if none has."""
    return next((int(os.environ[key]) for key in _RANKS if key in os.environ), 0)


def broadcast_run_dir(run_dir: str) -> None:
    """Sends the run folder of rank 0 to torchrun's other processes.

    The default name has the time of the start, which may differ between processes.
    """
    if started_by_torchrun() and os.environ["RANK"] == "0":
        _torchrun_store().set(_run_dir_key(), str(Path(run_dir).absolute()))


def receive_run_dir() -> list[str]:
    """The override that puts another rank of torchrun's processes into the run folder of rank 0."""
    if not started_by_torchrun() or os.environ["RANK"] == "0":
        return []
    return [f"hydra.run.dir={quote_value(_torchrun_store().get(_run_dir_key()).decode())}"]


def _run_dir_key() -> str:
    """Differs for each restart: the store outlives the processes that torchrun starts again."""
    return f"nin/run_dir/{os.environ['TORCHELASTIC_RESTART_COUNT']}"


def _torchrun_store() -> Any:
    from torch.distributed import TCPStore

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


class StoppedError(Exception):
    """The run was stopped by a signal."""

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
        if "SUBMITIT_EXECUTOR" in os.environ and callable(signal.getsignal(self.signum)):
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
    try:
        return subprocess.run(line, capture_output=True, text=True, check=False)
    except OSError as error:  # a container may lack it
        return subprocess.CompletedProcess(line, 1, "", f"scontrol: {error.strerror}")


class StopRequest:
    """Records that a signal requested a stop; a second Ctrl-C ends the process at once.

    As a context manager it restores the previous signal handlers on exit.

    Args:
        parent: for a worker process of a sweep, the id of the process that started it: its end also requests a stop,
            and the handlers stay until this process ends, because a signal between two jobs must not end it.
    """

    def __init__(self, parent: int | None = None) -> None:
        self._signum: int | None = None
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
        """Installs the signal handlers, in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python delivers signals to the main thread only
        for signum in stop_signals():
            handler = signal.signal(signum, self._handle)
            self._previous.setdefault(signum, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals())  # `sweeps.signals` starts workers with them blocked

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signum is not None:
            _write(b"\x1b[?25h\nstopped at once\n" if os.isatty(2) else b"stopped at once\n")  # shows the cursor
            os._exit(130)
        if self.signum is not None:
            return
        self.signum = signum
        _write(b"\nstopping after this batch (Ctrl-C again stops at once)\n")


@contextlib.contextmanager
def convert_worker_exit_to_stop(stop: StopRequest) -> Iterator[None]:
    """Turns the error of a DataLoader whose processes were ended by the signal of ``stop`` into a `StoppedError`.

    ``timeout`` and ``scancel``, for example, send it to all processes of a group.
    """
    try:
        yield
    except RuntimeError as error:
        if stop.signum is None or not str(error).startswith("DataLoader worker (pid"):
            raise
        raise StoppedError(stop.signum) from error


def leave_process_group(kind: type[BaseException] | None, *_: object) -> None:
    """Ends gloo's threads, which may abort a process that ends before them; Lightning ends those of NCCL only.

    Args:
        kind: of the error with which the work has ended, if any.
    """
    from torch import distributed

    if kind is not None and not issubclass(kind, StoppedError):
        return  # the other processes may never answer
    if distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()


def stop_signals() -> list[signal.Signals]:
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
