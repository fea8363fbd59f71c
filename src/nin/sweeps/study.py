"""The study of a search: what is proposed for a trial, and the storage that has all trials.

A proposal depends on the search's seed, the trial's number and the trials of earlier batches, and on nothing else: a
new sampler is built for each trial and is given a copy of these trials in the order of their numbers. A search that was
killed therefore proposes the same trials when it is run again.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
from filelock import FileLock
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, CmaEsSampler, GridSampler, QMCSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from nin.config.errors import read_first_line
from nin.config.schema import UserError
from nin.runs.files import read_bytes
from nin.sweeps.claims import DatabaseClaims, FileClaims, database_name, require_postgresql
from nin.sweeps.space import Space, enumerate_values, exact_value, format_distribution
from nin.training.pruning import build_pruner, without_values

_STUDY = "nin:study"  # a trial's key for the state that a sampler keeps in the study
_PLAN = "nin:plan"  # the study's key for what the search is
JOURNAL = "study.journal"
# The errors that Optuna raises for lines that are JSON and no journal.
_DAMAGED = (ValueError, LookupError, TypeError, AttributeError, AssertionError)


@dataclass(frozen=True)
class Plan:
    """The definition of a search. Under one name, all of it stays the same; only the number of trials may grow.

    Args:
        name: of the search and of its study.
        batch_size: number of trials that are proposed from the same earlier trials.
        fixed: the overrides that all trials share.
        max_epochs: of a trial; None if it is not known.
        config_name: of the config that the trials start from.
        config_path: of the folder that replaces ``conf/``, relative to the working directory; None if none does.
    """

    name: str
    space: Space
    sampler: str
    seed: int
    pruner: str
    batch_size: int
    fixed: tuple[str, ...]
    max_epochs: int | None
    config_name: str = "train"
    config_path: str | None = None

    def describe(self) -> dict[str, str]:
        """The keys and values that must not change."""
        searched = {key: format_distribution(distribution) for key, distribution in self.space.items()}
        fixed = dict(word.partition("=")[::2] for word in self.fixed)
        given = {"seed": str(self.seed), "--config-name": self.config_name}
        if self.config_path:
            given["--config-path"] = self.config_path
        own = {"sampler": self.sampler, "pruner": self.pruner, "n_jobs": str(self.batch_size)}
        return searched | fixed | given | {f"hydra.sweeper.{k}": v for k, v in own.items()}

    @property
    def images_sha256(self) -> str | None:
        """The fingerprint of the folder of images that all trials share; None of other data."""
        return next((word.partition("=")[2] for word in self.fixed if word.startswith("images_sha256=")), None)


def propose(plan: Plan, trials: Sequence[FrozenTrial]) -> FrozenTrial:
    """The trial that follows ``trials``, in the state RUNNING.

    Args:
        trials: all trials of a lower number, as `hide_concurrent_values` returns them.
    """
    storage = InMemoryStorage()
    pruner = build_pruner(plan.pruner, plan.max_epochs)  # a sampler uses only the trials of its Hyperband bracket
    study = optuna.create_study(
        storage=storage,
        study_name=plan.name,
        direction="maximize",
        sampler=build_sampler(plan, len(trials)),
        pruner=pruner,
    )
    study_id = storage.get_study_id_from_name(plan.name)
    for trial in trials:
        study.add_trial(trial)
    for key, value in (trials[-1].system_attrs.get(_STUDY, {}) if trials else {}).items():
        storage.set_study_system_attr(study_id, key, value)
    # Samplers draw in the order of the keys: that of the first trial, also if the command now has another one.
    first = [key for key in (trials[0].params if trials else ()) if key in plan.space]
    study.ask({key: plan.space[key] for key in dict.fromkeys([*first, *plan.space])})
    proposed = study.get_trials(deepcopy=True)[-1]
    return create_trial(
        state=TrialState.RUNNING,
        params={key: exact_value(value, proposed.distributions[key]) for key, value in proposed.params.items()},
        distributions=proposed.distributions,
        system_attrs=proposed.system_attrs | {_STUDY: storage.get_study_system_attrs(study_id)},
        user_attrs={"folder": trial_name(len(trials))},
    )


def build_sampler(plan: Plan, number: int) -> BaseSampler:
    """The sampler for trial ``number``, whose random state depends on the search's seed and on this number only."""
    seed = int(np.random.SeedSequence([plan.seed, number]).generate_state(1)[0])
    match plan.sampler:
        case "random":
            return RandomSampler(seed)
        case "cmaes":
            return CmaEsSampler(seed=seed, warn_independent_sampling=False)
        case "qmc":  # one sequence, of which trial n is the n-th point
            with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
                return QMCSampler(seed=plan.seed, warn_independent_sampling=False)
        case "grid":  # one order of the grid's points
            return GridSampler({k: enumerate_values(k, v) for k, v in plan.space.items()}, seed=plan.seed)
    return TPESampler(seed=seed)


def hide_concurrent_values(trials: Sequence[FrozenTrial], batch_start: int, number: int) -> list[FrozenTrial]:
    """The trials before ``number`` as its proposal and its pruner see them: with values of earlier batches only."""
    return [
        trial if i < batch_start and trial.state.is_finished() else without_values(trial)
        for i, trial in enumerate(trials[:number])
    ]


def trial_name(number: int) -> str:
    """The name of a trial's folder."""
    return f"trial-{number:04d}"


class JournalLock:
    """The lock of the journal file. The system releases it when a process ends, however it ends.

    Whoever acquires it removes an incomplete last line, which a process that was killed has left: the next line would
    be appended to it, and the journal could not be read any more.
    """

    def __init__(self, journal: Path):
        self.journal, self.lock = journal, FileLock(f"{journal}.lock")

    def acquire(self) -> bool:
        self.lock.acquire()
        with self.journal.open("rb+") as file:
            content = file.read()
            if (end := content.rfind(b"\n") + 1) < len(content):
                file.truncate(end)
        return True

    def release(self) -> None:
        self.lock.release()


class Store:
    """The storage of a search's trials: its journal file, or a database that several machines share.

    Args:
        folder: the search's folder.
        url: of the database; None for the journal file.

    Raises:
        UserError: if the storage can't be reached or read, or has another search under this name.
    """

    def __init__(self, plan: Plan, folder: Path, url: str | None):
        self.plan, self.folder = plan, folder
        if url is None:
            self.claims: FileClaims | DatabaseClaims = FileClaims(folder)
            self.storage: BaseStorage = open_journal(folder / JOURNAL)
        else:
            self.storage, self.claims = open_database(url), DatabaseClaims(url, plan.name)
        with self.claims.lock():
            names = {study.study_name for study in self.storage.get_all_studies()}
            if plan.name not in names:
                optuna.create_study(storage=self.storage, study_name=plan.name, direction="maximize")
            self.study_id = self.storage.get_study_id_from_name(plan.name)
            require_same_plan(self.storage, plan, folder)
            if _PLAN not in self.storage.get_study_user_attrs(self.study_id):
                self.storage.set_study_user_attr(self.study_id, _PLAN, plan.describe())

    def trials(self) -> list[FrozenTrial]:
        """All trials, in the order of their numbers."""
        return self.storage.get_all_trials(self.study_id, deepcopy=False)

    def add(self, trial: FrozenTrial) -> None:
        """Adds a proposed trial, in one write."""
        self.storage.create_new_trial(self.study_id, trial)

    def finish(
        self,
        number: int,
        state: TrialState,
        value: float | None,
        intermediate_values: Mapping[int, float],
        rungs: Mapping[str, float],
        error: str = "",
    ) -> None:
        """Records a trial's end. Killed within, the same values are written again by the next call."""
        trial_id = self.storage.get_trial_id_from_study_id_trial_number(self.study_id, number)
        if self.storage.get_trial(trial_id).state.is_finished():
            return
        for epoch, intermediate in intermediate_values.items():
            self.storage.set_trial_intermediate_value(trial_id, epoch, intermediate)
        for key, rung in rungs.items():
            self.storage.set_trial_system_attr(trial_id, key, rung)
        if error:
            self.storage.set_trial_user_attr(trial_id, "error", error)
        self.storage.set_trial_state_values(trial_id, state, None if value is None else [value])


def require_same_plan(storage: BaseStorage, plan: Plan, folder: Path) -> None:
    """Raises UserError if a study of this name is another search, or a journal in ``folder`` lacks this one."""
    names = [study.study_name for study in storage.get_all_studies()]
    if plan.name not in names:
        if names and isinstance(storage, JournalStorage):
            raise UserError(
                f"{JOURNAL}: the study of another search; to resume it give name={names[0]} hydra.sweep.dir={folder}; "
                "or another hydra.sweep.dir=…"
            )
        return
    study_id = storage.get_study_id_from_name(plan.name)
    there = storage.get_study_user_attrs(study_id).get(_PLAN)
    if there is None:
        if storage.get_n_trials(study_id):
            raise UserError(f"{plan.name}: a study that is not from nin train; give another name=…")
        return
    now = plan.describe()
    differing = [key for key in dict.fromkeys([*there, *now]) if there.get(key) != now.get(key)]
    if differing:
        lines = [
            f"{key}: {there.get(key, 'not given')} in the existing search, {now.get(key, 'not given')} in this command"
            for key in differing
        ]
        header = f"{plan.name}: another search has this name; give another name=…, or what it has:"
        raise UserError("\n  ".join([header, *lines]))


def open_journal(path: Path) -> JournalStorage:
    """The journal file at ``path``, which is created if it does not exist.

    Raises:
        UserError: if the file is damaged or something else.
    """
    try:
        *lines, tail = read_bytes(path).split(b"\n") if path.exists() else [b""]
        if lines and not isinstance(json.loads(lines[-1]), dict):  # Optuna reads it only when another line follows
            raise ValueError(f"its last line is {lines[-1][:20]!r}")
        start = b'{"op_code":'
        if tail[: len(start)] != start[: len(tail)]:  # the start of a line is left by an interrupted write
            raise ValueError(f"its last line is {tail[:20]!r}")
        # Optuna's base class of locks is private; what it calls is acquire() and release().
        return JournalStorage(JournalFileBackend(str(path), lock_obj=JournalLock(path)))  # type: ignore[arg-type]
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); give another name=…") from error
    except _DAMAGED as error:
        raise UserError(
            f"{path}: damaged, or not the journal of a study ({type(error).__name__}: {error}); restore it, or give "
            "another name=…"
        ) from error


def open_database(url: str) -> RDBStorage:
    """The study storage in a PostgreSQL database. ``url`` must be of the command line, not of a file.

    Raises:
        UserError: if it can't be reached, or a package is missing.
    """
    shown = database_name(url)
    try:
        from sqlalchemy.exc import SQLAlchemyError

        require_postgresql(url)
        return RDBStorage(url, engine_kwargs={"connect_args": {"connect_timeout": 10}})
    except ImportError as error:
        raise UserError(
            "hydra.sweeper.storage: its packages are not installed; run: python3 -m pip install "
            f"'sqlalchemy>=2.1' 'psycopg[binary]' ({error})"
        ) from error
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError, RuntimeError, ValueError) as error:
        raise UserError(f"hydra.sweeper.storage={shown}: can't be reached ({read_first_line(error)})") from error
