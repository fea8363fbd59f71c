"""The start of a sweep: its jobs are checked, and Hydra's launcher runs them."""

import os
import sys
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.callbacks import Callbacks
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import OverrideParseException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from nin.config.composition import parse_overrides
from nin.config.errors import read_first_line
from nin.config.hydra_options import unwrap_job_result
from nin.config.keys import quote_value, split_override
from nin.config.override_errors import format_error
from nin.config.schema import Settings, UserError
from nin.config.validation import find_override_errors
from nin.runs.console import format_path, format_repeated_command
from nin.runs.files import write_atomically
from nin.runs.folder import RunFolder, find_weights_file
from nin.sweeps.checks import check_jobs, require_joblib_arguments, require_launcher, require_search_packages
from nin.sweeps.gpus import share_gpus
from nin.sweeps.jobs import (
    KEYS,
    add_common_overrides,
    expand_jobs,
    folder_names,
    key_of,
    to_overrides,
    without_overridden,
    write_requested_jobs,
)
from nin.sweeps.signals import SignalForwarder, interrupt_at_signals
from nin.sweeps.stored import is_running
from nin.sweeps.workers import (
    PARENT_VARIABLE,
    ReportedError,
    SweepInterrupt,
    is_cluster,
    is_joblib,
    run_sweep_job,
    start_worker,
)
from nin.system.devices import default_threads
from nin.system.processes import StoppedError, multi_process_launcher, remove_left_over_ranks
from nin.training.run import RunFailedError, require_same_experiment

if TYPE_CHECKING:
    from nin.sweeps.search import Search

_GRID = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
# Imported where a search starts: other sweeps need no Optuna.
_SEARCH = "nin.sweeps.search.Search"


class Sweep:
    """A sweep, checked and ready to start.

    Args:
        config: as Hydra composed it for a multirun; what all jobs have in common is added in place.

    Raises:
        UserError: with the errors of all jobs, or if the launcher is not installed.
    """

    def __init__(self, config: DictConfig):
        if not config.hydra.sweep.dir.strip():
            raise UserError("hydra.sweep.dir: is empty; leave it out, or give the sweep's folder")
        given: Any = OmegaConf.to_container(config.hydra.overrides.hydra, resolve=False)
        if any(split_override(word)[0] == "hydra.sweep.subdir" for word in given):
            raise UserError("hydra.sweep.subdir: a sweep names its jobs' folders by what it varies; leave it out")
        self.config = config
        self.folder = Path(config.hydra.sweep.dir)
        self.signals: SignalForwarder | None = None
        self.search: Search | None = None
        # Each job's overrides, by the name of its folder. A search chooses the values of its jobs while it runs.
        self.jobs: dict[str, list[str]] = {}
        self.on_cluster = is_cluster(config.hydra.launcher._target_)
        if starter := multi_process_launcher():
            raise UserError(f"{starter}: each of its processes would start the whole sweep; start it in one process")
        require_launcher(config.hydra.launcher._target_)
        remove_left_over_ranks()  # before lightning is imported; no job has several processes
        task: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
        if (sweeper := config.hydra.sweeper._target_) not in (_GRID, _SEARCH):
            raise UserError(
                f"hydra.sweeper: {sweeper} is not supported; a sweep trains with all values, and hydra/sweeper=optuna "
                "searches for the best"
            )
        is_search = sweeper == _SEARCH
        self._require_same_kind(is_search)
        params = config.hydra.sweeper.get("params") or {}
        _, in_file = self._parse(to_overrides(params))
        params = without_overridden(params, task)
        config.hydra.sweeper.params = params
        overrides, self.swept = self._parse([*to_overrides(params), *task])
        # Keys of the file to which the command line gives one value: a part of the file's sweep has the same jobs.
        self.swept += [key for key in in_file if key not in self.swept and not is_search]
        settings = self._check(overrides, is_search)
        if is_joblib(config.hydra.launcher._target_):
            self._configure_joblib(config.hydra.launcher, settings)
        self._complete_config()

    def _require_same_kind(self, is_search: bool) -> None:
        """A folder has one report, that of a search if it has search.json: the jobs of a sweep would not be in it."""
        has_search = (self.folder / "search.json").exists()
        if has_search and not is_search:
            raise UserError(f"{self.folder}: has a search of this name; give another name=…")
        jobs = (path.parents[1].name for path in self.folder.glob("*/.hydra/overrides.yaml"))
        # A search whose search.json was lost writes it again.
        if is_search and not has_search and not all(name.startswith(("trial-", "final-")) for name in jobs):
            raise UserError(f"{self.folder}: has a sweep of this name; give another name=…")

    def _parse(self, words: list[str]) -> tuple[list[Override], list[str]]:
        """The overrides of the sweep, and the keys and groups that it varies."""
        try:
            overrides = parse_overrides(words)
        except OverrideParseException as error:  # of hydra.sweeper.params in a file
            raise UserError(format_error(error.override, error, self.config)) from None
        swept, fixed = ([key_of(o) for o in overrides if o.is_sweep_override() == varies] for varies in (True, False))
        for key, remedy in (("name", "it names the whole sweep"), ("sweep", "choose one of them per command")):
            if key in swept:
                raise UserError(f"{key}: can't be varied; {remedy}")
        if own := [key for key in (*swept, *fixed) if key in (KEYS, "sweep.jobs", "sweep.wait")]:
            raise UserError(f"{own[0]}: is set by the sweep; leave it out")
        if both := sorted({key for key in swept if key in fixed or swept.count(key) > 1}):
            raise UserError(f"{both[0]}: given more than once; give it once, with all its values")
        if errors := find_override_errors([str(o.input_line) for o in overrides if not o.is_sweep_override()]):
            raise UserError(*errors)
        return overrides, swept

    def _check(self, overrides: list[Override], is_search: bool) -> list[Settings]:
        """The settings of the jobs; of a search those of one point of its space."""
        launcher, sweeper = self.config.hydra.launcher, self.config.hydra.sweeper
        if self.config.sweep.fail_fast and self.on_cluster:
            raise UserError("sweep.fail_fast=true: all jobs are submitted before one can fail; leave it out")
        if (size := sweeper.get("max_batch_size")) is not None and size < 1:
            raise UserError(f"hydra.sweeper.max_batch_size={size}: must be 1 or more, or null")
        if is_joblib(launcher._target_):
            require_joblib_arguments(launcher)
        if is_search:
            require_search_packages()
            from nin.sweeps.search import Search

            self.search = Search(self.config, overrides, on_this_machine=not self.on_cluster)
            if self.search.point.weights:
                find_weights_file(Path(self.search.point.weights))
            return [self.search.point]
        expanded = expand_jobs(overrides)
        names = folder_names(expanded, self.swept)
        if repeated := next((name for name, count in Counter(names).items() if count > 1), None):
            raise UserError(f"{repeated}: is requested twice; give each value once")
        self.jobs = dict(zip(names, expanded, strict=True))
        config_name = self.config.hydra.job.config_name
        checked = check_jobs(expanded, on_this_machine=not self.on_cluster, config_name=config_name)
        for name, settings in zip(self.jobs, checked, strict=True):
            folder = RunFolder(self.folder / name)
            if not folder.has_progress():
                if settings.weights:
                    find_weights_file(Path(settings.weights))
            # With resume=never, jobs that exist are refused one by one, and the others run.
            elif settings.resume != "never" and folder.config.exists():
                require_same_experiment(folder, settings)
        return checked

    def _configure_joblib(self, launcher: DictConfig, jobs: list[Settings]) -> None:
        # Threads that wait for work leave the cores to the other jobs.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ[PARENT_VARIABLE] = str(os.getpid())
        default_threads()  # noted before the workers start: a job's result depends on it
        share_gpus(launcher, jobs)
        from joblib import effective_n_jobs

        if effective_n_jobs(launcher.n_jobs) > 1:
            self.signals = SignalForwarder()

    def _complete_config(self) -> None:
        # The processes of a cluster may start in another folder.
        folder = self.folder.absolute() if self.on_cluster else self.folder
        self.config.hydra.overrides.hydra += [
            f"hydra.sweep.dir={quote_value(str(folder))}",
            # The name may be the time of the start, or come from a variable that another machine lacks.
            f"name={quote_value(str(self.config.name))}",
            f"sweep.jobs={self.search.total if self.search else len(self.jobs)}",
            f"{KEYS}=[{','.join(self.swept)}]",  # last: the job's own overrides follow it
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
        folders = [RunFolder(self.folder / name) for name in self.jobs]
        # An extended run has its earlier result until it trains.
        return sum(is_running(job) or job.result_status() not in ("finished", "pruned") for job in folders)

    def _launch(self, loader: ConfigLoader, callbacks: Callbacks) -> int:
        context = HydraContext(config_loader=loader, callbacks=callbacks)
        launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=run_sweep_job, config=self.config
        )
        if self.signals:
            launcher.joblib["initializer"] = start_worker
            launcher.launch = self.signals.forward_during(launcher.launch)
        status = 0
        try:
            with nullcontext() if self.signals or self.on_cluster else interrupt_at_signals():
                self.search.run(launcher) if self.search else self._run_jobs(launcher)
        except (SweepInterrupt, StoppedError) as stopped:
            status = stopped.exit_status
        except (ReportedError, RunFailedError):
            status = 1  # the other jobs have run
        except KeyboardInterrupt:
            status = 130
        except BrokenProcessPool:
            status = 1
            if not self._status_of_signals():
                print(f"nin train: a worker process was killed; {self._remedy()}", file=sys.stderr)
        except Exception as error:
            # The launchers of a cluster raise their own errors for a job that was killed or whose machine was lost.
            if type(error).__module__.partition(".")[0] not in ("submitit", "ray"):
                raise
            status = 1
            lost = f"a job was lost ({read_first_line(error)}), and others may still run"
            print(f"nin train: {lost}; {self._remedy()}", file=sys.stderr)
        if self.signals and self.signals.stopped_by:
            StoppedError(self.signals.stopped_by).requeue()  # at SLURM's signal; the workers have ended
        return self._status_of_signals() or status

    def _remedy(self) -> str:
        task = OmegaConf.to_container(self.config.hydra.overrides.task, resolve=False)
        return f"{format_repeated_command(str(self.config.name), task)} resumes the sweep"  # type: ignore[arg-type]

    def _run_jobs(self, launcher: Launcher) -> None:
        """Runs all jobs. Raises what stopped one, and at the end the error of one that failed, which has been printed.

        Not by Hydra's sweeper, which composes each job once more, prints the overrides of the first that failed, and
        leaves the jobs of further batches (``hydra.sweeper.max_batch_size``) alone.
        """
        write_atomically(self.folder / "multirun.yaml", OmegaConf.to_yaml(self.config))
        write_requested_jobs(self.folder, self.swept, self.jobs)
        jobs = [[*words, f"hydra.sweep.subdir={quote_value(name)}"] for name, words in self.jobs.items()]
        size = self.config.hydra.sweeper.get("max_batch_size") or len(jobs)
        failure: Exception | None = None
        for start in range(0, len(jobs), size):
            for job in launcher.launch(jobs[start : start + size], start):
                try:
                    unwrap_job_result(job)
                except (ReportedError, RunFailedError) as error:
                    failure = error
                    if self.config.sweep.fail_fast:
                        raise
        if failure:
            raise failure

    def _status_of_signals(self) -> int:
        if self.signals and self.signals.stopped_by:
            return StoppedError(self.signals.stopped_by).exit_status
        return 1 if self.signals and self.signals.job_failed else 0
