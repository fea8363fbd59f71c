"""The start of a sweep: Hydra's sweeper and launcher run its jobs, and signals are forwarded to joblib's workers."""

import _thread
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from hydra._internal.callbacks import Callbacks
from hydra.core.config_loader import ConfigLoader
from hydra.core.plugins import Plugins
from hydra.errors import OverrideParseException
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from nin.config.composition import format_error, parse_overrides, quote_value
from nin.config.errors import first_line
from nin.config.schema import Settings, UserError
from nin.config.validation import find_override_errors
from nin.runs.console import format_path
from nin.runs.folder import RunFolder
from nin.sweeps.checks import check_jobs, require_joblib_arguments, require_launcher, require_search_packages
from nin.sweeps.gpus import share_gpus
from nin.sweeps.jobs import (
    KEYS,
    add_common_overrides,
    expand_jobs,
    folder_names,
    job_folder,
    without_overridden,
)
from nin.sweeps.stored import is_running
from nin.sweeps.workers import (
    JOB_FAILED_SIGNAL,
    PARENT_VARIABLE,
    ContinuingLauncher,
    ReportedError,
    SweepInterrupt,
    is_cluster,
    is_joblib,
    run_sweep_job,
    start_worker,
)
from nin.system.devices import default_threads
from nin.system.processes import StoppedError, multi_process_launcher, remove_left_over_ranks
from nin.training.run import RunFailedError

if TYPE_CHECKING:
    from nin.sweeps.search import Search

# Imported where a search starts: other sweeps need no Optuna.
_SEARCH = "nin.sweeps.search.Search"

# hydra.sweep.subdir in conf/train.yaml. The report, and a sweep that waits for others, find jobs by these names.
_SUBDIR = "${job_folder:${hydra.job.override_dirname}}"


class Sweep:
    """A sweep, checked and ready to start.

    Args:
        config: as Hydra composed it for a multirun; what all jobs have in common is added in place.

    Raises:
        UserError: with the errors of all jobs, or if the launcher is not installed.
    """

    def __init__(self, config: DictConfig):
        OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)  # of conf/train.yaml
        if not config.hydra.sweep.dir.strip():
            raise UserError("hydra.sweep.dir: is empty; leave it out, or give the sweep's folder")
        sweep: Any = OmegaConf.to_container(config.hydra.sweep, resolve=False)
        if sweep["subdir"] != _SUBDIR:
            raise UserError("hydra.sweep.subdir: a sweep names its jobs' folders by what it varies; leave it out")
        self.config = config
        self.folder = Path(config.hydra.sweep.dir)
        self.signals: SignalForwarder | None = None
        self.search: Search | None = None
        # Of the folders of its jobs; none of a sweeper that chooses its values while it runs.
        self.names: list[str] = []
        self.on_cluster = is_cluster(config.hydra.launcher._target_)
        if starter := multi_process_launcher():
            raise UserError(f"{starter}: each of its processes would start the whole sweep; start it in one process")
        require_launcher(config.hydra.launcher._target_)
        remove_left_over_ranks()  # before lightning is imported; no job has several processes
        if (request := self.folder / "multirun.yaml").is_symlink():
            raise UserError(f"{request}: a symbolic link, which would be written through; replace it by its target")
        task: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
        self.task: list[str] = task
        params = without_overridden(config.hydra.sweeper.get("params") or {}, task)
        if "params" in config.hydra.sweeper:  # another sweeper may not have the key
            config.hydra.sweeper.params = params
        is_search = config.hydra.sweeper._target_ == _SEARCH
        self._require_same_kind(is_search)
        swept, fixed = self._parse(params)
        jobs, count = self._check(params, swept, is_search)
        if is_joblib(config.hydra.launcher._target_):
            self._configure_joblib(config.hydra.launcher, jobs)
        self._complete_config(swept, fixed, count)

    def _require_same_kind(self, is_search: bool) -> None:
        """A folder has one report, that of a search if it has search.json: the jobs of a sweep would not be in it."""
        has_search = (self.folder / "search.json").exists()
        if has_search and not is_search:
            raise UserError(f"{self.folder}: has a search of this name; give another name=…")
        jobs = (path.parents[1].name for path in self.folder.glob("*/.hydra/overrides.yaml"))
        # A search whose search.json was lost writes it again.
        if is_search and not has_search and not all(name.startswith(("trial-", "final-")) for name in jobs):
            raise UserError(f"{self.folder}: has a sweep of this name; give another name=…")

    def _parse(self, params: dict[str, Any]) -> tuple[list[str], list[str]]:
        """The keys that the sweep varies, and those that all jobs share."""
        try:
            overrides = parse_overrides([*(f"{k}={v}" for k, v in params.items()), *self.task])
        except OverrideParseException as error:  # of hydra.sweeper.params in a file
            raise UserError(format_error(error.override, error, self.config)) from None
        swept, fixed = (
            [o.key_or_group for o in overrides if o.is_sweep_override() == varies] for varies in (True, False)
        )
        for key, remedy in (("name", "it names the whole sweep"), ("sweep", "choose one of them per command")):
            if key in swept:
                raise UserError(f"{key}: can't be varied; {remedy}")
        if both := sorted({key for key in swept if key in fixed or swept.count(key) > 1}):
            raise UserError(f"{both[0]}: given more than once; give it once, with all its values")
        if errors := find_override_errors([str(o.input_line) for o in overrides if not o.is_sweep_override()]):
            raise UserError(*errors)
        return swept, fixed

    def _check(self, params: dict[str, Any], swept: list[str], is_search: bool) -> tuple[list[Settings], int | None]:
        """The settings of the jobs, of a search those of one point of its space, and the number of jobs.

        Another sweeper chooses its values while it runs; then there are no settings, and no number.
        """
        launcher, sweeper = self.config.hydra.launcher, self.config.hydra.sweeper
        if self.config.sweep.fail_fast and self.on_cluster:
            raise UserError("sweep.fail_fast=true: all jobs are submitted before one can fail; leave it out")
        if sweeper.get("max_batch_size") is not None and sweeper.max_batch_size < 1:
            raise UserError(f"hydra.sweeper.max_batch_size={sweeper.max_batch_size}: must be 1 or more, or null")
        if is_joblib(launcher._target_):
            require_joblib_arguments(launcher)
        if is_search:
            require_search_packages()
            from nin.sweeps.search import Search

            self.search = Search(self.config, self.task, on_this_machine=not self.on_cluster)
            return [self.search.point], self.search.total
        if not sweeper._target_.endswith("BasicSweeper"):
            return [], None
        expanded = expand_jobs(params, self.task)
        self.names = folder_names(expanded, swept)
        config_name = self.config.hydra.job.config_name
        return check_jobs(expanded, on_this_machine=not self.on_cluster, config_name=config_name), len(expanded)

    def _configure_joblib(self, launcher: DictConfig, jobs: list[Settings]) -> None:
        # Threads that wait for work leave the cores to the other jobs.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ[PARENT_VARIABLE] = str(os.getpid())
        default_threads()  # noted before the workers start: a job's result depends on it
        share_gpus(launcher, jobs)
        from joblib import effective_n_jobs

        if effective_n_jobs(launcher.n_jobs) > 1:
            self.signals = SignalForwarder()

    def _complete_config(self, swept: list[str], fixed: list[str], jobs: int | None) -> None:
        # The processes of a cluster may start in another folder.
        folder = self.folder.absolute() if self.on_cluster else self.folder
        # The name may be the time of the start, or come from a variable that another machine lacks.
        common = {"name": f"'{self.config.name}'", "sweep.jobs": jobs or "null"}
        unnamed = dict.fromkeys([*fixed, *common, "sweep.wait", KEYS])
        self.config.hydra.overrides.hydra += [
            f"hydra.job.config.override_dirname.exclude_keys=[{','.join(unnamed)}]",
            f"hydra.sweep.dir={quote_value(str(folder))}",
            *(f"{key}={value}" for key, value in common.items()),
            f"{KEYS}=[{','.join(swept)}]",  # last: the job's own overrides follow it
        ]

    def run(self, loader: ConfigLoader) -> int:
        """Runs all jobs and returns the exit status.

        A job that another process is running is skipped first, and waited for when all others are done.
        """
        callbacks = Callbacks(self.config)
        callbacks.on_multirun_start(config=self.config, config_name=self.config.hydra.job.config_name)
        try:
            status = self._launch(loader, callbacks)
            # A search has waited for other processes itself.
            if not self.search and status == 0 and (left := self._count_skipped_jobs()):
                jobs, them = ("1 job was", "it") if left == 1 else (f"{left} jobs were", "them")
                print(f"{format_path(self.folder)}: {jobs} skipped for another process; waiting for {them}")
                add_common_overrides(self.config, "sweep.wait=true")
                status = self._launch(loader, callbacks)
        finally:
            callbacks.on_multirun_end(config=self.config, config_name=self.config.hydra.job.config_name)
        return status

    def _count_skipped_jobs(self) -> int:
        """Jobs that were skipped, also those whose process has ended since, without a result or with a failure.

        Another command of this name may run other jobs in the same folder, for which this one does not wait.
        """
        if self.names:
            folders = [RunFolder(self.folder / name) for name in self.names]
            # An extended run has its earlier result until it trains.
            return sum(is_running(job) or job.result_status() not in ("finished", "pruned") for job in folders)
        return sum(is_running(RunFolder(path)) for path in self.folder.iterdir())

    def _launch(self, loader: ConfigLoader, callbacks: Callbacks) -> int:
        context, plugins = HydraContext(config_loader=loader, callbacks=callbacks), Plugins.instance()
        instantiate = plugins.instantiate_launcher if self.search else plugins.instantiate_sweeper
        plugin: Any = instantiate(hydra_context=context, task_function=run_sweep_job, config=self.config)
        launcher = plugin if self.search else plugin.launcher
        if self.signals:
            launcher.joblib["initializer"] = start_worker
        continuing = ContinuingLauncher(launcher, self.config.sweep.fail_fast)
        if self.names:  # another sweeper may need the result of each job
            plugin.launcher = continuing
        try:
            self.search.run(launcher) if self.search else plugin.sweep(arguments=self.task)
            status = int(continuing.has_failed)
        except (SweepInterrupt, StoppedError) as stopped:
            status = stopped.exit_status
        except (ReportedError, RunFailedError):
            status = 1  # the other jobs have run
        except KeyboardInterrupt:
            status = 130
        except BrokenProcessPool:
            status = 1
            if not self._status_of_signals():
                print("nin train: a worker process was killed; run the same command again to resume", file=sys.stderr)
        except Exception as error:
            # What the launchers of a cluster raise for a job that was killed or whose machine was lost.
            if type(error).__module__.partition(".")[0] not in ("submitit", "ray"):
                raise
            status = 1
            reason = first_line(error)
            print(f"nin train: a job was lost ({reason}); run the same command again to resume", file=sys.stderr)
        return self._status_of_signals() or status

    def _status_of_signals(self) -> int:
        if self.signals and self.signals.stopped_by:
            return StoppedError(self.signals.stopped_by).exit_status
        return 1 if self.signals and self.signals.job_failed else 0


class SignalForwarder:
    """Forwards Ctrl-C and SIGTERM to joblib's workers and lets them finish; joblib itself would kill them.

    A worker without a job would die of a signal, and joblib would kill the others because of that: workers start with
    these signals blocked, until `StopRequest` listens.
    """

    def __init__(self) -> None:
        self.stopped_by: int | None = None
        self.job_failed = self._gives_up = False
        taken = (signal.SIGINT, signal.SIGTERM, JOB_FAILED_SIGNAL)
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
            self.stopped_by = signum
        processes = multiprocessing.active_children()
        if again or (not processes and signum != JOB_FAILED_SIGNAL):
            self._gives_up = True
            _thread.interrupt_main()
        for process in processes:
            if process.pid:
                # A terminal sends Ctrl-C to the workers too, for which a second SIGINT means to end at once.
                os.kill(process.pid, signal.SIGINT if again else signal.SIGTERM)
