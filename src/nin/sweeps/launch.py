"""The start of a sweep: its jobs are checked, and get folders, threads and GPUs."""

import _thread
import importlib.util
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from nin.config.composition import compose_settings
from nin.config.schema import THREADS, Settings, Trainer, UserError, is_single_process
from nin.data.sources import prepare
from nin.runs.folder import logging_to
from nin.sweeps.jobs import KEYS, expand_jobs, without_overridden
from nin.system.distributed import multi_process_launcher, quoted
from nin.system.signals import StopRequest

_A_JOB_FAILED = signal.SIGUSR1
_GPUS = "NIN_GPUS"  # what a sweep's first process tells those that it starts: the GPUs that they share out


class Launch:
    """A sweep as the process knows it that starts its jobs.

    Args:
        config: as Hydra compose_config it; completed in place with what all jobs are to have in common.

    Raises:
        UserError: with the errors of all jobs, or if the launcher is not installed.
    """

    def __init__(self, config: DictConfig):
        self.folder = Path(config.hydra.sweep.dir)
        self.stopped_by: int | None = None
        self.ended_fast = self._gives_up = False
        launcher = config.hydra.launcher
        if by := multi_process_launcher():
            raise UserError(f"{by}: each of its processes would begin the whole sweep; start it in one")
        _require_installed(launcher._target_)
        task = list(config.hydra.overrides.task)
        params = without_overridden(config.hydra.sweeper.get("params") or {}, task)
        config.hydra.sweeper.params = params
        overrides = OverridesParser.create().parse_overrides([*(f"{k}={v}" for k, v in params.items()), *task])
        swept, fixed = (
            [o.key_or_group for o in overrides if o.is_sweep_override() == varies] for varies in (True, False)
        )
        for key, remedy in (("name", "it names the whole sweep"), ("sweep", "choose one of them a command")):
            if key in swept:
                raise UserError(f"{key}: can't be varied; {remedy}")
        if config.sweep.fail_fast and "submitit" in launcher._target_:
            raise UserError("sweep.fail_fast=true: all jobs are sent before one can fail; leave it out")
        jobs: list[Settings] = []
        if config.hydra.sweeper._target_.endswith("BasicSweeper"):  # another one finds its values on the way
            jobs = _checked(expand_jobs(params, task), here="submitit" not in launcher._target_)
        common = {"name": f"'{config.name}'"}  # where it is the time of start, or another machine's variable
        if is_joblib(launcher._target_):
            # Threads that wait for work leave the cores to the other jobs.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            os.environ.setdefault(THREADS, str(_threads()))
            _share_out_gpus(launcher, jobs)
            if _at_once(launcher) > 1:
                self._take_signals()
        # Each job's config is compose_config anew, from these.
        unnamed = [*fixed, *common, KEYS]
        config.hydra.overrides.hydra += [
            f"hydra.job.config.override_dirname.exclude_keys=[{','.join(dict.fromkeys(unnamed))}]",
            f"hydra.sweep.dir={quoted(str(self.folder))}",
            *(f"{key}={value}" for key, value in common.items()),
            f"{KEYS}=[{','.join(swept)}]",  # the last: behind it stands what was asked for
        ]

    def _take_signals(self) -> None:
        """Joblib would kill the jobs of a process that is stopped: they are asked to stop instead, and waited for.

        One of its processes that has no job yet would die of a signal, and joblib would kill the others for it: they
        begin with signals held back, until `StopRequest` listens.
        """
        taken = (signal.SIGINT, signal.SIGTERM, _A_JOB_FAILED)
        for signum in taken:  # a library's thread may have begun before, and take them
            signal.signal(signum, self._handle)
        resource_tracker.ensure_running()  # at its start it lets signals through again
        signal.pthread_sigmask(signal.SIG_BLOCK, taken)

        def wait() -> None:
            while True:
                self._pass_on(signal.sigwait(taken))

        threading.Thread(target=wait, daemon=True).start()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._gives_up:
            raise KeyboardInterrupt
        self._pass_on(signum)

    def _pass_on(self, signum: int) -> None:
        again = self.stopped_by == signal.SIGINT == signum
        if signum == _A_JOB_FAILED:
            self.ended_fast = True
        else:
            self.stopped_by = signum
        processes = multiprocessing.active_children()
        if again or (not processes and signum != _A_JOB_FAILED):
            self._gives_up = True
            _thread.interrupt_main()
        for process in processes:
            os.kill(process.pid, signal.SIGINT)


def _require_installed(launcher: str) -> None:
    for extra in ("joblib", "submitit"):
        if f"hydra_{extra}_launcher" not in launcher:
            continue
        try:
            found = importlib.util.find_spec(f"hydra_plugins.hydra_{extra}_launcher")
        except ModuleNotFoundError:  # no plugin of Hydra's at all
            found = None
        if not found:
            raise UserError(
                f"hydra/launcher: its package is not installed; type: python3 -m uv sync --extra {extra} "
                f"(or python3 -m pip install '.[{extra}]' in the checkout)"
            )


def _checked(jobs: list[list[str]], here: bool) -> list[Settings]:
    """The settings of a sweep's jobs.

    Args:
        here: whether they run on this machine, which must have what they ask for.

    Raises:
        UserError: with the errors of all jobs.
    """
    errors: dict[str, None] = {}
    checked: list[Settings] = []
    for job in jobs:
        try:
            settings = compose_settings(job)
            _require_one_process(settings.trainer)
            prepare(settings.data)
            checked.append(settings)
        except UserError as error:
            errors |= dict.fromkeys(error.errors)
    tried: list[Any] = []
    for settings in checked if here and not errors else []:
        parts = (settings.trainer, settings.logger, settings.callbacks)
        if parts in tried:
            continue
        tried.append(parts)
        try:
            require_accelerator(settings.trainer)
            _require_accepted_by_lightning(settings)
        except UserError as error:
            errors |= dict.fromkeys(error.errors)
    if errors:
        raise UserError(*errors)
    if not jobs:
        raise UserError("a key of the sweep has no values, and so the sweep no jobs")
    return checked


def _require_one_process(trainer: Trainer) -> None:
    if not is_single_process(trainer):
        raise UserError(
            f"trainer.strategy={trainer.strategy}, trainer.devices={trainer.devices}, trainer.num_nodes="
            f"{trainer.num_nodes}: a sweep's job has one device, since each further process would begin the whole "
            "sweep. Type trainer=gpu hydra/launcher=joblib for one job a GPU, several at once; or start single runs: "
            "for seed in 0 1 2; do nin train trainer=ddp seed=$seed name=seed-$seed; done"
        )


def require_accelerator(trainer: Trainer) -> None:
    """Raises UserError if the accelerator that was asked for by name is not there; only then is torch needed."""
    if trainer.accelerator in ("auto", "cpu"):
        return
    import torch

    cuda, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if {"gpu": cuda or mps, "cuda": cuda, "mps": mps}.get(trainer.accelerator, True):
        return
    found = f"{cuda} CUDA GPU(s)" if cuda else "an Apple GPU" if mps else "no GPU that torch can use, only the CPU"
    raise UserError(
        f"trainer.accelerator={trainer.accelerator}: this machine has {found} (torch {torch.__version__}); "
        f"type trainer={'gpu' if cuda else 'mps' if mps else 'cpu'}, or trainer=auto, which takes the best there is"
    )


def _require_accepted_by_lightning(settings: Settings) -> None:
    from nin.training.trainer import build_trainer

    with logging_to(None):
        build_trainer(settings, None, [])


def is_joblib(launcher: str) -> bool:
    return launcher.endswith(".JoblibLauncher")


def is_joblib_worker() -> bool:
    """Whether this is one of joblib's processes; one job at a time needs none, and runs in the sweep's own."""
    return multiprocessing.current_process().name != "MainProcess"


def _threads() -> int:
    """As many as a run alone would have: the order of additions, and so the result, hangs on it."""
    import torch

    return torch.get_num_threads()


def _share_out_gpus(launcher: DictConfig, jobs: list[Settings]) -> None:
    """One job a GPU, and no more jobs at once than there are GPUs. Another sweeper's jobs are not known beforehand."""
    import torch

    if not torch.cuda.is_available() or (jobs and all(job.trainer.accelerator == "cpu" for job in jobs)):
        return
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    os.environ[_GPUS] = gpus
    count = len(gpus.split(","))
    launcher.n_jobs = count if launcher.n_jobs < 0 else min(launcher.n_jobs, count)


def _at_once(launcher: DictConfig) -> int:
    from joblib import effective_n_jobs

    return effective_n_jobs(launcher.n_jobs)


_held: list[FileLock] = []  # this process has its GPU to its end


def acquire_gpu(folder: Path, stop: StopRequest) -> None:
    """Makes one of the GPUs that are shared out the only one that this process sees, before torch looks for them.

    Waits for one as long as others work on the same sweep with all of them.
    """
    while not _held and _GPUS in os.environ and stop.signum is None:
        for gpu in os.environ[_GPUS].split(","):
            lock = FileLock(folder / f".gpu-{gpu}.lock", timeout=0)
            try:
                lock.acquire()
            except Timeout:
                continue
            _held.append(lock)
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
            return
        time.sleep(1)


def stop_other_workers() -> None:
    """Called in one of joblib's processes: the one that started it asks all of them to stop."""
    os.kill(os.getppid(), _A_JOB_FAILED)
