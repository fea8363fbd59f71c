"""The jobs of a sweep: in the sweep's own process one after another, in joblib's workers, or on a cluster."""

import contextlib
import functools
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from nin.config.hydra_options import WITHOUT_SPACE, find_config_options, format_config_options
from nin.config.schema import Settings, UserError
from nin.config.validation import validate
from nin.runs.console import silence_known_warnings, tolerate_output_errors
from nin.runs.folder import RunClaimedError, RunFolder
from nin.sweeps.gpus import acquire_gpu
from nin.sweeps.jobs import own_overrides, read_requested_jobs
from nin.system.processes import StoppedError, StopRequest, global_rank, is_requeued
from nin.training.request import RunRequest
from nin.training.run import RunFailedError, execute_run

# A worker sends it to the sweep's first process if `sweep.fail_fast` ends the sweep. SLURM uses SIGUSR1, and submitit
# SIGUSR2.
JOB_FAILED_SIGNAL = signal.SIGURG

# A sweep's first process sets it for its workers to its own id: a worker that starts late may have no parent any more.
PARENT_VARIABLE = "NIN_SWEEP_PROCESS"


class ReportedError(UserError):
    """The error of a job that was refused; it has been printed, and is not printed again at the end of the sweep."""

    def __init__(self, *errors: str, of_machine: bool = False):
        super().__init__(*errors)
        self.of_machine = of_machine


class SweepInterrupt(BaseException):
    """Ends a sweep whose jobs run one after another; not an Exception, because Hydra continues after those."""

    def __init__(self, exit_status: int):
        super().__init__(exit_status)
        self.exit_status = exit_status


def run_sweep_job(config: DictConfig) -> float | None:
    """Hydra's task function: runs one job of a sweep and returns its val/acc.

    Raises:
        ReportedError, RunFailedError, StoppedError: what ended the job, where the sweep continues with other jobs.
        SweepInterrupt: if the sweep ends with this job.
    """
    gc.collect()  # of the previous job: the objects of Lightning, which refer to each other, hold its memory
    hydra = HydraConfig.get()
    os.chdir(hydra.runtime.cwd)  # Ray's processes start where the cluster was started
    silence_known_warnings()
    folder = Path(hydra.runtime.output_dir)
    in_worker = is_joblib(hydra.launcher._target_) and is_joblib_worker()
    in_turn = not in_worker and not is_cluster(hydra.launcher._target_)
    if in_worker:
        this_worker().require_running()
    request = _build_request(config, folder, in_turn)
    if in_turn or in_worker:
        print(f"{request.label}{_progress(folder, hydra.job.num, request.settings)}", flush=True)
    try:
        result = this_worker().run(request) if in_worker else execute_run(request)
        if in_turn and request.stop.signum is not None:  # the job is done, and the next one does not start
            raise StoppedError(request.stop.signum)
        return result["metrics"]["val/acc"]
    except RunClaimedError as error:  # the sweep waits for it when its other jobs are done
        print(f"{request.label}{error}", flush=True)
        return None
    except (UserError, RunFailedError, StoppedError) as error:
        status, ended = _end_job(error, folder, in_worker)
    if in_turn:
        if status < 128 and request.stop.signum is not None:  # the next job would not receive the signal
            stop = StoppedError(request.stop.signum)
            stop.requeue()
            status = stop.exit_status
        if status > 128 or request.settings.sweep.fail_fast:
            raise SweepInterrupt(status)
    if status > 128 and is_requeued():
        sys.exit(status)  # SLURM runs this job again: the waiting sweep must not take it for ended
    raise ended


def _build_request(config: DictConfig, folder: Path, in_turn: bool) -> RunRequest:
    """Validates the job's config.

    Raises:
        ReportedError, SweepInterrupt: if it is refused.
    """
    try:
        settings = validate(config)
    except UserError as error:
        _report_refusal(error, folder)
        if in_turn and config.sweep.fail_fast is True:
            raise SweepInterrupt(2) from None
        raise ReportedError(*error.errors) from None
    hydra = HydraConfig.get()
    space_in_file = [WITHOUT_SPACE] if hydra.sweeper.get("params") else []
    return RunRequest(
        settings,
        RunFolder(folder),
        own_overrides(hydra.overrides.task),
        [*format_config_options(find_config_options(hydra)), *space_in_file],
        label="" if in_turn else f"{folder.name}  ",
        rank=global_rank(settings.trainer),
        wait=settings.sweep.wait,
    )


def _end_job(error: Exception, folder: Path, in_worker: bool) -> tuple[int, Exception]:
    """The exit status of a job that ``error`` has ended, and the error with which its task ends.

    Hydra keeps the latter until the end of the sweep: it is a new one, whose traceback holds no network.
    """
    if isinstance(error, UserError):
        _report_refusal(error, folder)
        return 2, ReportedError(*error.errors, of_machine=error.of_machine)
    if isinstance(error, StoppedError):
        if not in_worker:  # the sweep's first process waits for all workers, and then requeues the job
            error.requeue()
        return error.exit_status, StoppedError(error.signum)
    return 1, RunFailedError()


def _report_refusal(error: UserError, folder: Path) -> None:
    print(f"nin train: {error}", file=sys.stderr)
    with contextlib.suppress(OSError):
        folder.rmdir()  # if Hydra has just made it and nothing was written


def _progress(folder: Path, number: int, settings: Settings) -> str:
    """ "job 2 of 6: optimizer.lr=0.1,seed=0 (about 3 min of training left)", from the time of the finished jobs."""
    assert settings.sweep.jobs is not None  # set by the sweep
    seconds: dict[str, float] = {}
    for path in folder.parent.glob("*/result.json"):
        if isinstance(taken := RunFolder(path.parent).find_result().get("train_seconds"), int | float):
            seconds[path.parent.name] = taken
    left = ""
    if seconds:
        # Finished jobs of other commands in the folder count for the time of a job, and not for how many are left.
        _, jobs = read_requested_jobs(folder.parent)
        is_known = folder.name in jobs and len(jobs) == settings.sweep.jobs
        jobs_left = len(jobs.keys() - seconds.keys()) if is_known else settings.sweep.jobs - number
        minutes = sum(seconds.values()) / len(seconds) * jobs_left / 60
        if jobs_left:
            time_left = f"about {minutes:.0f} min" if minutes >= 1 else "under a minute"
            left = f" ({time_left} of training left)"
    return f"job {number + 1} of {settings.sweep.jobs}: {folder.name}{left}"


def is_joblib(launcher: str) -> bool:
    """Whether ``launcher`` is the class path of Hydra's joblib launcher."""
    return launcher.endswith(".JoblibLauncher")


def is_cluster(launcher: str) -> bool:
    """Whether ``launcher``, the class path of a launcher, sends all jobs to other processes at once: SLURM or Ray."""
    return "submitit" in launcher or "hydra_ray_launcher" in launcher


def is_joblib_worker() -> bool:
    """Whether this is one of joblib's processes; one job at a time runs in the sweep's own process."""
    return multiprocessing.current_process().name != "MainProcess"


class Worker:
    """One of joblib's processes: what lasts over its jobs.

    If the sweep's first process dies, a running job saves and stops, and the process ends.

    Args:
        parent: the id of the sweep's first process, which may have died before this one began.
    """

    def __init__(self, parent: int) -> None:
        self.stop = StopRequest(parent)
        self.stop.listen()
        self.has_failed = False  # a job, with ``sweep.fail_fast``
        self.gpu: FileLock | None = None
        self.is_busy = False
        threading.Thread(target=self._watch_parent, daemon=True).start()

    def require_running(self) -> None:
        """Checks that the sweep has not ended: joblib starts the jobs that are left all the same.

        Raises:
            StoppedError, RunFailedError: if a signal or, with ``sweep.fail_fast``, an earlier job has ended it.
        """
        if self.stop.signum is not None:
            raise StoppedError(self.stop.signum)
        if self.has_failed:
            raise RunFailedError

    def run(self, request: RunRequest) -> dict:
        """Runs a job. An unexpected exception would make joblib kill the others.

        Raises:
            UserError, RunFailedError, StoppedError: what ended the job.
        """
        self.is_busy = True
        try:
            self.gpu = self.gpu or acquire_gpu(request.folder.path.parent, self.stop)
            if self.stop.signum is not None:
                raise StoppedError(self.stop.signum)
            request.stop = self.stop
            return execute_run(request)
        except RunClaimedError:
            raise
        except (UserError, RunFailedError):
            if request.settings.sweep.fail_fast:
                self.has_failed = True
                if not self.stop.is_orphan():
                    os.kill(os.getppid(), JOB_FAILED_SIGNAL)
            raise
        finally:
            self.is_busy = False

    def _watch_parent(self) -> None:
        while not self.stop.is_orphan() or self.is_busy:
            time.sleep(0.5)
        os._exit(143)  # joblib's own threads wait for the parent, and would never end


@functools.cache
def this_worker() -> Worker:
    """The `Worker` of this process; the first call installs its signal handlers."""
    return Worker(int(os.environ[PARENT_VARIABLE]))


def start_worker() -> None:
    """joblib's initializer: runs in each worker before its first job."""
    tolerate_output_errors()
    silence_known_warnings()
    this_worker()
