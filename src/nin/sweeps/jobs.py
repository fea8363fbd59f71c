"""A sweep's jobs: their overrides, folders and results, and what they have in common."""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig

from nin.config.changes import MAY_CHANGE, PART_OF_RESULT
from nin.config.composition import count_sweep_values, parse_overrides
from nin.config.errors import printable, read_first_line
from nin.config.keys import is_within, split_override
from nin.config.schema import UserError
from nin.runs.console import format_path
from nin.runs.folder import RunFolder, job_folder
from nin.sweeps.rows import Job, varying_keys
from nin.sweeps.stored import describe_hardware, is_running, normalize_value, read_values, read_yaml

METRICS = ("val/acc", "val/loss", "test/acc", "test/loss")
# The errors that a file with other content raises.
_UNREADABLE = (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
KEYS = "sweep.keys"  # the config key that lists the keys that a sweep varies
_MAX_JOBS = 10_000


def folder_names(jobs: Iterable[Sequence[str]], swept: Iterable[str]) -> list[str]:
    """The name of each job's folder, from its overrides of the keys and groups ``swept``."""
    keys = set(swept)

    def is_swept(word: str) -> bool:
        return split_override(word)[0] in keys

    return [job_folder(",".join(sorted(filter(is_swept, job)))) for job in jobs]


def add_common_overrides(config: DictConfig, *words: str) -> None:
    """Adds overrides to those that all jobs share; they come before the last one, which sets KEYS."""
    for word in words:
        config.hydra.overrides.hydra.insert(len(config.hydra.overrides.hydra) - 1, word)


def own_overrides(words: Sequence[str]) -> list[str]:
    """A job's overrides without those that the sweep adds to all its jobs, the last of which sets KEYS."""
    own = max((i + 1 for i, word in enumerate(words) if word.startswith(f"{KEYS}=")), default=0)
    return list(words[own:])


def without_overridden(params: Mapping[str, Any], task: Iterable[str]) -> dict[str, Any]:
    """``hydra.sweeper.params`` without the keys that the command line sets.

    With both, some jobs would run several times.
    """
    given = _by_key(task)
    return {key: value for key, value in params.items() if key not in given}


def _by_key(words: Iterable[str]) -> dict[str, str]:
    return dict(map(split_override, words))


def swept_keys(overrides: list[Override]) -> list[str]:
    """The keys and groups that a sweep varies; of an option's package too, as in ``model@teacher``."""
    return [key_of(override) for override in overrides if override.is_sweep_override()]


def key_of(override: Override) -> str:
    return override.get_key_element().lstrip("+~")


def expand_jobs(overrides: list[Override]) -> list[list[str]]:
    """Each job's own overrides, from those of the sweep, in the jobs' order.

    Raises:
        UserError: if an override's values can't be enumerated, or there are more than 10,000 jobs.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    swept = " ".join(override.input_line or "" for override in overrides if override.is_sweep_override())
    try:
        if (count := math.prod(map(count_sweep_values, overrides))) > _MAX_JOBS:
            raise UserError(f"{swept}: {count:,} jobs; a sweep has at most {_MAX_JOBS:,}, vary fewer values")
        return [job for (job,) in BasicSweeper.split_arguments(overrides, 1)]
    except (HydraException, ValueError, OverflowError) as error:  # interval(0,1), range(0,3,0)
        if any(override.is_interval_sweep() for override in overrides):
            raise UserError(f"{swept}: an interval is for a search; add hydra/sweeper=optuna") from error
        raise UserError(f"{swept}: its values can't be enumerated ({read_first_line(error)})") from error


def read_jobs(folder: Path) -> list[Job]:
    """Every job of a sweep: those that were started, in the order of their folders' names, then the others.

    In a folder of single runs (``outputs/runs``) every run, identified by "run", its name, and its "overrides".

    Raises:
        UserError: if ``folder`` is not the folder of a sweep or of runs.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; sweeps are folders in outputs/sweeps, single runs in outputs/runs")
    requested, swept = _read_requested_jobs(folder)
    jobs = [job for path in sorted(folder.iterdir()) if (job := _read_job(path, swept))]
    if not jobs and RunFolder(folder).has_progress():
        raise UserError(
            f"{folder}: is a single run, whose result is in {RunFolder(folder).result.name}; to compare it with the "
            f"others: nin report {format_path(folder.resolve().parent)}"
        )
    if not jobs:
        raise UserError(f"{folder}: no job was started here; is it a sweep's folder, as in outputs/sweeps/lr?")
    if not requested and _are_single_runs(jobs):
        for job in jobs:
            overrides = " ".join(f"{key}={value}" for key, value in job.overrides.items())
            job.overrides = {"run": printable(job.folder.name), "overrides": overrides}
        return jobs
    started = {job.folder.name for job in jobs}
    # A key that was varied only later has given the same job another folder.
    keys = dict.fromkeys(["seed", *swept, *varying_keys(jobs)])
    for job in jobs:
        for key, value in read_values(RunFolder(job.folder).config, keys).items():
            job.overrides.setdefault(key, value)
    others = [Job(folder, job, "not started") for name, job in requested if name not in started]
    # These jobs have no config yet. Where all jobs of the command that have one agree, the others have the same value.
    names = {name for name, _ in requested}
    same = _values_of_all([job for job in jobs if job.folder.name in names])
    for other in others:
        for key, value in same.items():
            if not is_within(key, swept):
                other.overrides.setdefault(key, value)
    _drop_common([*jobs, *others], swept)
    unique: dict[frozenset[tuple[str, str]], Job] = {}
    for job in sorted(jobs, key=lambda job: job.status != "finished"):
        unique.setdefault(frozenset(job.overrides.items()), job)
    return sorted(unique.values(), key=lambda job: job.folder) + others


def _values_of_all(jobs: list[Job]) -> dict[str, str]:
    """The overrides that have the same value in all ``jobs``."""
    return dict(set.intersection(*({*job.overrides.items()} for job in jobs))) if jobs else {}


def _are_single_runs(jobs: list[Job]) -> bool:
    """Whether the runs say themselves that no sweep started them: their configs list no keys that a sweep varies."""
    configs = [read_yaml(RunFolder(job.folder).config) for job in jobs]
    sweeps = [config.get("sweep") for config in configs if isinstance(config, dict)]
    return any(isinstance(sweep, dict) and sweep.get("keys") == [] for sweep in sweeps)


def requested_names(sweep: Path) -> list[str]:
    """The names of the folders of the command that last started the sweep; none of a search, or if it is unknown."""
    return [name for name, _ in _read_requested_jobs(sweep)[0]]


def _read_requested_jobs(sweep: Path) -> tuple[list[tuple[str, dict[str, str]]], list[str]]:
    """The jobs of the command that last started the sweep, each with its folder's name, and the keys that it varies.

    Both are read from Hydra's multirun.yaml; they are empty if it does not exist or has other content.
    """
    try:
        hydra = read_yaml(sweep / "multirun.yaml")["hydra"]
        params, task = hydra["sweeper"].get("params") or {}, hydra["overrides"]["task"]
        if "glob(" in str([params, task]) and not _finds_same_options(hydra):
            return [], []
        overrides = parse_overrides([*(f"{k}={v}" for k, v in params.items()), *task])
        swept = swept_keys(overrides)
        jobs = expand_jobs(overrides)
    except (*_UNREADABLE, HydraException, UserError):
        return [], []
    names = folder_names(jobs, swept)
    return [(name, _select_experiment(_by_key(job), swept, name)) for name, job in zip(names, jobs, strict=True)], swept


def _finds_same_options(hydra: Any) -> bool:
    """Whether glob(*) stands for the same options here as in the command that started the sweep.

    That command may have read configs of the user's own, which `nin report` does not read.
    """
    app = GlobalHydra.instance().hydra
    here = app.config_loader.get_sources() if app else []
    started = hydra["runtime"]["config_sources"]
    # Hydra adds hydra.searchpath=[…] where it composes a config, and not where it looks for the options of glob(*).
    composed = [source for source in started if not source["provider"].startswith("hydra.searchpath in ")]
    return {(s.provider, s.path) for s in here} == {(s["provider"], s["path"]) for s in composed}


def _select_experiment(overrides: dict[str, str], swept: list[str], folder: str) -> dict[str, str]:
    """The overrides that make a job another experiment (not ``threads=1``, ``callbacks=none``), or that are varied."""
    return {
        printable(key): printable(normalize_value(value))
        for key, value in overrides.items()
        # An earlier sweep in this folder may have varied other keys than the last one.
        if key in (*swept, "trainer.max_epochs")
        or f"{key}=" in folder
        or not (key == "trainer" or is_within(key, MAY_CHANGE))
    }


def _read_job(path: Path, swept: list[str]) -> Job | None:
    """The job in folder ``path``; None if there is none, or if its overrides.yaml is not a list of overrides."""
    folder = RunFolder(path)
    words = read_yaml(folder.overrides)
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return None
    overrides = _select_experiment(_by_key(words), swept, path.name)
    result: Any = None
    with contextlib.suppress(UserError):  # not a result: it is written again when the run is started again
        result = folder.read_result()
    match result:
        case {"status": "failed"}:
            lines = str(result.get("error", "")).splitlines()
            return Job(path, overrides, "failed", error=printable(lines[0]) if lines else "unknown error")
        case {"status": "finished" | "pruned", "metrics": dict() as metrics}:
            values = {**metrics, **{key: result.get(key) for key in ("train_seconds", "test_images")}}
            if "seed" in result:
                overrides.setdefault("seed", printable(str(result["seed"])))
            numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float) and abs(v) < 1e300}
            return Job(path, overrides, result["status"], numbers, hardware=describe_hardware(result))
    epochs = folder.read_epochs()
    metrics = {k: v for k, v in epochs[-1].items() if k in METRICS} if epochs else {}
    return Job(path, overrides, "running" if is_running(folder) else "unfinished", metrics)


def _drop_common(jobs: list[Job], swept: list[str]) -> None:
    """Drops keys of PART_OF_RESULT that no sweep varies, and that have one value in all jobs that have them."""
    for key in {key for job in jobs for key in job.overrides if is_within(key, PART_OF_RESULT)} - {*swept}:
        if len({job.overrides[key] for job in jobs if key in job.overrides}) == 1:
            for job in jobs:
                job.overrides.pop(key, None)
