"""A sweep's jobs: their overrides, folders and results, and what they have in common."""

import contextlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig

from nin.config.changes import PART_OF_RESULT, SAME_EXPERIMENT
from nin.config.errors import printable, read_first_line
from nin.config.keys import is_within, split_override
from nin.config.schema import UserError
from nin.runs.console import format_path
from nin.runs.files import read_text, write_atomically
from nin.runs.folder import RunFolder, job_folder
from nin.sweeps.rows import Job, varying_keys
from nin.sweeps.stored import describe_hardware, is_running, normalize_value, read_values, read_yaml

METRICS = ("val/acc", "val/loss", "test/acc", "test/loss")
MEASURES = ("epochs", "steps", "train_seconds", "parameters", "test_images")  # of result.json
KEYS = "sweep.keys"  # the config key that lists the keys that a sweep varies
_JOBS = "jobs.json"
_MAX_JOBS = 10_000


def to_overrides(params: Mapping[str, Any]) -> list[str]:
    """``hydra.sweeper.params`` as a command line has them."""
    return [f"{key}={'null' if value is None else value}" for key, value in params.items()]


def without_overridden(params: Mapping[str, Any], task: Iterable[str]) -> dict[str, Any]:
    """``hydra.sweeper.params`` without the keys that the command line sets.

    With both, some jobs would run several times.
    """
    given = {split_override(word)[0] for word in task}
    return {key: value for key, value in params.items() if split_override(key)[0] not in given}


def key_of(override: Override) -> str:
    """The key or group of an override; of an option's package too, as in ``model@teacher``."""
    return override.get_key_element().lstrip("+~")


def expand_jobs(overrides: list[Override]) -> list[list[str]]:
    """Each job's own overrides, from those of the sweep, in the jobs' order.

    Raises:
        UserError: if an override's values can't be enumerated, or there is no job, or more than 10,000.
    """
    swept = " ".join(override.input_line or "" for override in overrides if override.is_sweep_override())
    try:
        counts = [_count_values(override) for override in overrides]
        if 0 in counts:
            raise UserError(f"{overrides[counts.index(0)].input_line}: has no values, so there are no jobs")
        if math.prod(counts) > _MAX_JOBS:
            raise UserError(f"{swept}: a sweep has at most {_MAX_JOBS:,} jobs; vary fewer values")
        return [job for (job,) in BasicSweeper.split_arguments(overrides, 1)]
    except (HydraException, ValueError, ArithmeticError) as error:  # interval(0,1), range(0,3,0), range(0,nan)
        if any(override.is_interval_sweep() for override in overrides):
            raise UserError(f"{swept}: an interval is for a search; add hydra/sweeper=optuna") from error
        raise UserError(f"{swept}: its values can't be enumerated ({read_first_line(error)})") from error


def _count_values(override: Override) -> int:
    """The number of values of a swept key, counted up to one more than a sweep has jobs; 1 for a key with one value."""
    if not override.is_discrete_sweep():
        return 1
    value = override.value()
    # Hydra's own iterator lists a range to shuffle it.
    values = value.range() if isinstance(value, RangeSweep) else override.sweep_iterator()
    return sum(1 for _ in itertools.islice(values, _MAX_JOBS + 1))


def folder_names(jobs: Iterable[Sequence[str]], swept: Iterable[str]) -> list[str]:
    """The name of each job's folder, from its overrides of the keys and groups ``swept``."""
    keys = set(swept)
    return [job_folder(",".join(sorted(word for word in job if split_override(word)[0] in keys))) for job in jobs]


def add_common_overrides(config: DictConfig, *words: str) -> None:
    """Adds overrides to those that all jobs share; they come before the last one, which sets KEYS."""
    for word in words:
        config.hydra.overrides.hydra.insert(len(config.hydra.overrides.hydra) - 1, word)


def write_requested_jobs(sweep: Path, swept: list[str], jobs: Mapping[str, list[str]]) -> None:
    """Writes the keys that a command varies, and the overrides of each of its jobs by the name of the job's folder.

    The jobs of the command that starts last replace those of earlier ones in the same sweep.
    """
    write_atomically(sweep / _JOBS, json.dumps({"keys": swept, "jobs": jobs}) + "\n")


def read_requested_jobs(sweep: Path) -> tuple[list[str], dict[str, list[str]]]:
    """What `write_requested_jobs` wrote last; nothing of a search, or if the file has other content.

    The file may come from elsewhere: a name in it is compared with those of folders, and no path is made of it.
    """
    with contextlib.suppress(OSError, ValueError, RecursionError):
        match json.loads(read_text(sweep / _JOBS)):
            case {"keys": list(swept), "jobs": dict(jobs)} if all(map(_are_words, [swept, *jobs.values()])):
                return swept, jobs
    return [], {}


def _are_words(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(word, str) for word in content)


def own_overrides(words: Sequence[str]) -> list[str]:
    """A job's overrides without those that the sweep adds to all its jobs, the last of which sets KEYS."""
    own = max((i + 1 for i, word in enumerate(words) if word.startswith(f"{KEYS}=")), default=0)
    return list(words[own:])


def read_jobs(folder: Path) -> list[Job]:
    """Every job of a sweep: those that were started, in the order of their folders' names, then the others.

    In a folder of single runs (``outputs/runs``) every run, identified by "run", its name, and its "overrides".

    Raises:
        UserError: if ``folder`` is not the folder of a sweep or of runs.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; sweeps are folders in outputs/sweeps, single runs in outputs/runs")
    swept, requested = read_requested_jobs(folder)
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
            values = read_values(RunFolder(job.folder).config, ("data.name", "data._target_"))  # and root of a folder
            job.data = " ".join(value for key, value in values.items() if key.startswith("data."))
        return jobs
    started = {job.folder.name for job in jobs}
    # A key that was varied only later has given the same job another folder.
    keys = dict.fromkeys(["seed", *swept, *varying_keys(jobs)])
    for job in jobs:
        values = read_values(RunFolder(job.folder).config, keys)
        # A varied folder of images is one value however its path was typed: the config has the absolute one.
        root = {key: value for key, value in values.items() if key == "data.root"}
        job.overrides = values | job.overrides | root
    others = [
        Job(folder, _select_experiment(words, swept, name), "not started")
        for name, words in requested.items()
        if name not in started
    ]
    # These jobs have no config yet. Where all jobs of the command that have one agree, the others have the same value.
    known = [{*job.overrides.items()} for job in jobs if job.folder.name in requested]
    same = {key: value for key, value in set.intersection(*known) if not is_within(key, swept)} if known else {}
    for other in others:
        other.overrides = same | other.overrides
    _drop_common([*jobs, *others], swept)
    unique: dict[frozenset[tuple[str, str]], Job] = {}
    for job in sorted(jobs, key=lambda job: job.status != "finished"):
        unique.setdefault(frozenset(job.overrides.items()), job)
    return sorted(unique.values(), key=lambda job: job.folder) + others


def _read_job(path: Path, swept: list[str]) -> Job | None:
    """The job in folder ``path``; None if there is none, or if its overrides.yaml is not a list of overrides."""
    folder = RunFolder(path)
    words = read_yaml(folder.overrides)
    if not _are_words(words):
        return None
    overrides = _select_experiment(words, swept, path.name)
    match result := folder.find_result():
        case {"status": "failed"}:
            lines = str(result.get("error", "")).splitlines()
            return Job(path, overrides, "failed", error=printable(lines[0]) if lines else "unknown error")
        case {"status": "finished" | "pruned", "metrics": dict() as metrics}:
            values = {**metrics, **{key: result.get(key) for key in MEASURES}}
            if "seed" in result:
                overrides.setdefault("seed", printable(str(result["seed"])))
            numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and abs(v) < 1e300}
            commit = printable(str(result.get("git_commit") or ""))
            hardware = describe_hardware(result)
            return Job(path, overrides, result["status"], numbers, hardware=hardware, commit=commit)
    epochs = folder.read_epochs()
    metrics = {k: v for k, v in epochs[-1].items() if k in METRICS} if epochs else {}
    return Job(path, overrides, "running" if is_running(folder) else "unfinished", metrics)


def _select_experiment(words: list[str], swept: list[str], folder: str) -> dict[str, str]:
    """The overrides that make a job another experiment (not ``threads=1``, ``callbacks=none``), or that are varied."""
    return {
        printable(key): printable(normalize_value(key, value))
        for key, value in dict(map(split_override, words)).items()
        # An earlier sweep in this folder may have varied other keys than the last one.
        if key in swept or f"{key}=" in folder or not (key == "trainer" or is_within(key, SAME_EXPERIMENT))
    }


def _are_single_runs(jobs: list[Job]) -> bool:
    """Whether the runs say themselves that no sweep started them: their configs list no keys that a sweep varies."""
    configs = [read_yaml(RunFolder(job.folder).config) for job in jobs]
    sweeps = [config.get("sweep") for config in configs if isinstance(config, dict)]
    return any(isinstance(sweep, dict) and sweep.get("keys") == [] for sweep in sweeps)


def _drop_common(jobs: list[Job], swept: list[str]) -> None:
    """Drops keys of PART_OF_RESULT that no sweep varies, and that have one value in all jobs that have them."""
    for key in {key for job in jobs for key in job.overrides if is_within(key, PART_OF_RESULT)} - {*swept}:
        if len({job.overrides[key] for job in jobs if key in job.overrides}) == 1:
            for job in jobs:
                job.overrides.pop(key, None)
