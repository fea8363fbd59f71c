"""A search: a sweep whose jobs Optuna proposes. See docs/search.md.

Each trial is a job of the sweep's launcher, in a folder that is named by the trial's number. What is recorded in the
study is read from these folders: wherever the search was killed, the next start finds there what has ended.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import optuna
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig
from optuna.trial import FrozenTrial, TrialState

from nin.config.composition import compose_settings
from nin.config.errors import printable
from nin.config.hydra_options import find_config_options, unwrap_job_result
from nin.config.keys import quote_value, split_override
from nin.config.schema import Settings, UserError
from nin.runs.files import write_atomically
from nin.runs.folder import RunFolder
from nin.sweeps.jobs import add_common_overrides
from nin.sweeps.search_best import SearchFile, test_best, write_search_file
from nin.sweeps.search_checks import check_search, count_points, experiment_words, read_search_settings
from nin.sweeps.search_report import best_trial
from nin.sweeps.space import overrides_of
from nin.sweeps.study import Store, hide_concurrent_values, propose, trial_name
from nin.training.pruning import TrialPruner, write_comparison
from nin.training.run import RunFailedError

_POLL_SECONDS = 1.0
_WITHOUT_VALUE = "no epoch ended with a validation, so it has no val/acc"


class Search:
    """A search, checked and ready to start.

    Args:
        config: as Hydra composed it for a multirun. What the trials have in common is added when the search starts.
        overrides: those of ``hydra.sweeper.params``, then the command line's.
        on_this_machine: whether the trials run here, so that this machine needs the accelerators that they request.

    Raises:
        UserError: lists every error that is found.
    """

    def __init__(self, config: DictConfig, overrides: list[Override], on_this_machine: bool):
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # the search prints a line for each trial itself
        self.config, self.settings, self.folder = config, read_search_settings(config), Path(config.hydra.sweep.dir)
        self.plan, self.fixed, self.point = check_search(config, overrides, self.settings, on_this_machine)
        # The search itself sets which of its jobs are tested, and which may be pruned.
        self.job_words = [word for word in self.fixed if split_override(word)[0] not in ("sweep.test", "sweep.prune")]
        self.points = count_points(self.plan) if self.plan.sampler == "grid" else None
        self.total = min(self.settings.n_trials, self.points or self.settings.n_trials)
        group_options = GlobalHydra.instance().config_loader().get_group_options
        self.selects_configs = any("@" in key or group_options(key) for key in self.plan.space)

    def run(self, launcher: Launcher) -> None:
        """Runs the search to its end.

        Raises:
            RunFailedError: if too many trials failed, or none completed.
            UserError, StoppedError, SweepInterrupt: what ended a job and the search with it.
        """
        self.launcher = launcher
        # The jobs of another process, which a killed search may have left, are waited for.
        prune = str(self.settings.pruner != "none").lower()
        add_common_overrides(self.config, "sweep.wait=true", "sweep.test=false", f"sweep.prune={prune}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.store = Store(self.plan, self.folder, self.settings.storage)
        self._write_search_file()
        if self.total < self.settings.n_trials:
            print(f"the grid has {self.total} points, so there are {self.total} trials")
        elif (points := self.points) and points > self.total:
            print(f"the grid has {points} points; {self.total} are tried, all with hydra.sweeper.n_trials={points}")
        self._run_trials()
        self._finish()

    def _write_search_file(self) -> None:
        """Writes what ``nin report`` needs."""
        content = SearchFile(
            name=self.plan.name,
            fixed=self.fixed,
            n_trials=self.total,
            max_epochs=self.plan.max_epochs,
            final_seeds=self.settings.final_seeds,
            storage=self.settings.storage,
            in_files=bool(self.config.hydra.sweeper.params),
            **find_config_options(self.config.hydra),
        )
        write_search_file(self.folder, content)

    def _run_trials(self) -> None:
        shared = False
        while True:
            with self.store.claims.lock():
                trials = self.store.trials()
                self._require_few_failures(trials)
                batch, start = self._take(trials)
                trials = self.store.trials()
            if batch:
                try:
                    self._run_batch(batch, start, trials)
                finally:
                    for number in batch:
                        self.store.claims.release(number)
            elif len(trials) >= self.total and all(trial.state.is_finished() for trial in trials[: self.total]):
                return
            else:
                if not shared:
                    print("the other trials are run by another process; waiting for them", flush=True)
                    shared = True
                time.sleep(_POLL_SECONDS)

    def _take(self, trials: Sequence[FrozenTrial]) -> tuple[list[int], int]:
        """Claims the trials of the first batch that has some to run, and proposes those that it lacks.

        Returns:
            Their numbers, and the number with which the batch starts.
        """
        known = list(trials)
        for start in range(0, self.total, self.plan.batch_size):
            taken = []
            for number in range(start, min(start + self.plan.batch_size, self.total)):
                if number == len(known):
                    known.append(propose(self.plan, hide_concurrent_values(known, start, number)))
                    self.store.add(known[-1])
                if not known[number].state.is_finished() and self.store.claims.claim(number):
                    taken.append(number)
            if taken:
                return taken, start
        return [], 0

    def _run_batch(self, batch: list[int], start: int, trials: Sequence[FrozenTrial]) -> None:
        jobs: dict[int, list[str]] = {}
        for number in batch:
            if words := self._prepare(number, start, trials):
                jobs[number] = words
        ended = {}
        if jobs:
            ended = dict(zip(jobs, self.launcher.launch(list(jobs.values()), min(jobs)), strict=True))
        for number in batch:  # in this order, whichever ended first
            folder = self._run_folder(number)
            if not folder.result_status():
                self._record_refusal(folder, jobs[number], ended[number])
            self._record(number, folder)

    def _run_folder(self, number: int) -> RunFolder:
        return RunFolder(self.folder / trial_name(number))

    def _prepare(self, number: int, start: int, trials: Sequence[FrozenTrial]) -> list[str] | None:
        """The overrides of a trial's job; None if it has ended already, or its configuration can't be composed."""
        folder, own = self._run_folder(number), overrides_of(trials[number].params)
        words = [*self.job_words, *own]
        result = folder.read_result()
        if result and not _failed_for_machine(result):  # the search was killed before it was recorded
            if experiment_words(result.get("overrides", words)) != experiment_words(words):  # its study was removed
                raise UserError(f"{folder.path}: has the result of another search; remove it, or give another name=…")
            return None
        if self.selects_configs:  # Hydra's launcher would end the search where it can't compose a combination of them
            try:
                self._compose(own)
            except UserError as error:
                self._write_failure(folder, words, error)
                return None
        if self.plan.pruner != "none":
            earlier = hide_concurrent_values(trials, start, number)
            write_comparison(folder.path, self.plan.name, self.plan.pruner, self.plan.max_epochs, earlier)
        print(f"trial {number}: {' '.join(own)}", flush=True)
        return [*words, f"hydra.sweep.subdir={folder.path.name}"]

    def _compose(self, own: list[str]) -> Settings:
        """The settings of a trial with its ``own`` overrides."""
        return compose_settings([*self.job_words, *own], config_name=self.config.hydra.job.config_name)

    def _record_refusal(self, folder: RunFolder, words: list[str], ended: Any) -> None:
        """A job that left no result was stopped, or refused by what only the run itself can check.

        Raises:
            StoppedError, UserError, RunFailedError: if it is not the trial's own failure.
        """
        try:
            unwrap_job_result(ended)
        except UserError as error:
            if error.of_machine:
                self._give_up_for_machine(folder)
            if folder.has_progress():  # the folder has another experiment, which is not overwritten
                raise
            self._write_failure(folder, words[:-1], error)
            return
        self._give_up(f"{folder.path}: has no result")

    def _write_failure(self, folder: RunFolder, words: list[str], error: UserError) -> None:
        write_atomically(folder.overrides, json.dumps(words) + "\n")  # JSON is YAML
        folder.write_result({"status": "failed", "error": str(error), "overrides": words})

    def _record(self, number: int, folder: RunFolder) -> None:
        result: dict[str, Any] = folder.read_result() or {}
        if _failed_for_machine(result):
            self._give_up_for_machine(folder)
        if self.plan.images_sha256 and result.get("images_sha256") not in (None, self.plan.images_sha256):
            raise UserError(
                f"{folder.path}: the images in the folder have changed since the search began, and trials are compared "
                "on the same ones; restore them and remove this trial's folder, or give another name=…"
            )
        values = {int(row["epoch"]): row["val/acc"] for row in folder.read_epochs() if "val/acc" in row}
        rungs: dict[str, float] = {}
        if values and self.plan.pruner != "none":
            pruner = TrialPruner(folder.path)
            pruner.report(values)
            rungs = pruner.rungs
        with self.store.claims.lock():
            match result["status"]:
                case "failed":
                    error = str(result.get("error", ""))
                    print(f"trial {number} failed: {printable(error)}", flush=True)
                    self.store.finish(number, TrialState.FAIL, None, values, {}, error)
                case "pruned":
                    print(f"trial {number} was pruned after {max(values)} epochs", flush=True)
                    self.store.finish(number, TrialState.PRUNED, values[max(values)], values, rungs)
                case _ if (value := result.get("metrics", {}).get("val/acc")) is None:
                    print(f"trial {number} failed: {_WITHOUT_VALUE}", flush=True)
                    self.store.finish(number, TrialState.FAIL, None, values, {}, _WITHOUT_VALUE)
                case _:
                    self.store.finish(number, TrialState.COMPLETE, value, values, rungs)

    def _require_few_failures(self, trials: Sequence[FrozenTrial]) -> None:
        failed = sum(trial.state == TrialState.FAIL for trial in trials)
        if self.settings.max_failures is not None and failed >= self.settings.max_failures:
            self._give_up(f"{failed} trials have failed (hydra.sweeper.max_failures)")

    def _give_up_for_machine(self, folder: RunFolder) -> NoReturn:
        """Ends the search where each further trial would fail too; the trial is not recorded, so that it is resumed."""
        self._give_up(f"{folder.path}: the machine is the reason; the search's command, run again, resumes the trial")

    def _give_up(self, reason: str) -> NoReturn:
        print(f"the search ends: {reason}", flush=True)
        raise RunFailedError(reason)

    def _finish(self) -> None:
        """Tests the best trial, or trains its configuration again with the final seeds."""
        # An earlier command may have had more trials, which count here as they do in the report.
        best = best_trial(self.store.trials())
        if best is None:
            self._give_up("no trial completed")
        if self.settings.final_seeds is None:
            if self.point.sweep.test:
                with self.store.claims.lock():
                    test_best(self.folder, best, self._compose(overrides_of(best.params)))
            return
        jobs_in_all = f"sweep.jobs={self.total + len(self.settings.final_seeds)}"
        add_common_overrides(self.config, jobs_in_all, "sweep.test=true", "sweep.prune=false")
        words = [*(w for w in self.job_words if split_override(w)[0] != "seed"), *overrides_of(best.params)]
        jobs = [
            [*words, f"seed={seed}", f"hydra.sweep.subdir={quote_value(f'final-{best.number:04d}-seed={seed}')}"]
            for seed in self.settings.final_seeds
        ]
        for ended in self.launcher.launch(jobs, self.total):
            unwrap_job_result(ended)  # raises what ended it


def _failed_for_machine(result: dict[str, Any]) -> bool:
    return result["status"] == "failed" and result.get("cause") == "machine"
