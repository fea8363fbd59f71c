"""A sweep's jobs: which folder each has, what varies, what came out, and which of them are one but for the seed."""

import contextlib
import hashlib
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from nin.config.composition import count_sweep_values
from nin.config.schema import MAY_CHANGE, UserError, is_within
from nin.runs.folder import RunFolder

_MOST_JOBS = 10_000  # of a sweep; each is a folder
_LONGEST = 100  # characters of a folder's name; file systems take 255 bytes


def job_folder(overrides: str) -> str:
    """The folder of a job, from its overrides: themselves where they can name one, shortened and numbered otherwise.

    ``optimizer.lr=0.1,seed=0`` stays as it is. Two jobs never share a folder: what is shortened or has characters
    that a folder's name should not have ends with a part of its checksum.
    """
    if not overrides:
        return "job"  # of a sweep that varies nothing
    plain = re.sub(r"[^\w=.,+@-]+", "_", overrides)
    if plain == overrides and len(plain) <= _LONGEST:
        return plain
    return f"{plain[: _LONGEST - 9]}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"


# The key that tells a sweep's jobs what it varies.
KEYS = "sweep.keys"


def own_overrides(words: Sequence[str]) -> list[str]:
    """A job's overrides without those that the sweep gives to all its jobs, which end with KEYS."""
    own = max((i + 1 for i, word in enumerate(words) if word.startswith(f"{KEYS}=")), default=0)
    return list(words[own:])


def without_overridden(params: Mapping[str, Any], task: Iterable[str]) -> dict[str, Any]:
    """What is left of ``hydra.sweeper.params`` beside a command line. Hydra's sweeper would take both, and run jobs
    several times."""
    given = _by_key(task)
    return {key: value for key, value in params.items() if key not in given}


def _by_key(words: Iterable[str]) -> dict[str, str]:
    return dict(word.lstrip("+~").partition("=")[::2] for word in words)


def expand_jobs(params: Mapping[str, Any], task: Iterable[str]) -> list[list[str]]:
    """Each job's own overrides, from ``hydra.sweeper.params`` and those of the command line, in the jobs' order."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    overrides = _parsed(params, task)
    try:
        if (count := math.prod(map(count_sweep_values, overrides))) > _MOST_JOBS:
            raise UserError(f"{' '.join(task)}: {count:,} jobs; a sweep has at most {_MOST_JOBS:,}")
        return [job for (job,) in BasicSweeper.split_arguments(overrides, 1)]
    except (HydraException, ValueError) as error:  # interval(0,1), range(0,3,0)
        raise UserError(f"{' '.join(task)}: not to be tried one by one ({str(error).splitlines()[0]})") from error


def _parsed(params: Mapping[str, Any], task: Iterable[str]) -> list[Override]:
    words = [*(f"{key}={value}" for key, value in without_overridden(params, task).items()), *task]
    hydra = GlobalHydra.instance().hydra
    # glob(*) asks the search path, which there is in a Hydra command alone.
    return OverridesParser.create(hydra.config_loader if hydra else None).parse_overrides(words)


@dataclass
class Job:
    """One job as its files tell of it."""

    folder: Path
    overrides: dict[str, str]
    status: str  # finished, failed, running, unfinished or not begun
    metrics: dict[str, float] = field(default_factory=dict)
    error: str = ""


@dataclass
class Row:
    """Jobs that differ in nothing but their seed."""

    keys: dict[str, str]
    jobs: list[Job]

    def values(self, metric: str) -> list[float]:
        """Those of finished jobs; an unfinished one has only the scores of an epoch on the way."""
        done = [job.metrics.get(metric) for job in self.jobs if job.status == "finished"]
        return [value for value in done if value is not None and math.isfinite(value)]

    def statistics(self, metric: str) -> dict[str, float | None]:
        """Mean, standard deviation and worst over the seeds; None where there is nothing to tell it from."""
        values = self.values(metric)
        worst = max if metric.endswith("loss") else min
        return {
            "mean": statistics.fmean(values) if values else None,
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "worst": worst(values) if values else None,
        }

    @property
    def label(self) -> str:
        return " ".join(f"{key.split('.')[-1]}={value}" for key, value in self.keys.items() if value) or "all"


def read_jobs(sweep: Path) -> list[Job]:
    """Every job of a sweep: those that have begun, in the order of their folders' names, then the others.

    Raises:
        UserError: if ``sweep`` is no sweep's folder.
    """
    if not sweep.is_dir():
        raise UserError(f"{sweep}: no such sweep; sweeps are folders in outputs/sweeps")
    asked, swept = _asked(sweep)
    jobs = [job for folder in sorted(sweep.iterdir()) if (job := _read_job(folder, swept))]
    if not jobs:
        raise UserError(f"{sweep}: no job has begun here; is it a sweep's folder, as in outputs/sweeps/lr?")
    begun = {job.folder.name for job in jobs}
    # A key that was varied only later has given the same job another folder.
    keys = dict.fromkeys(["seed", *swept, *varying_keys(jobs)])
    for job in jobs:
        _fill_in(job, keys)
    once: dict[frozenset, Job] = {}
    for job in sorted(jobs, key=lambda job: job.status != "finished"):
        once.setdefault(frozenset(job.overrides.items()), job)
    jobs = sorted(once.values(), key=lambda job: job.folder)
    return jobs + [Job(sweep, job, "not begun") for folder, job in asked if folder not in begun]


def _asked(sweep: Path) -> tuple[list[tuple[str, dict[str, str]]], list[str]]:
    """The jobs that the sweep was last asked for, each with its folder's name, and the keys that it varies.

    Both are read from the file that Hydra writes.
    """
    try:
        hydra = yaml.load((sweep / "multirun.yaml").read_text(encoding="utf-8"), Loader=_Loader)["hydra"]
        params, task = hydra["sweeper"].get("params") or {}, hydra["overrides"]["task"]
        swept = [override.key_or_group for override in _parsed(params, task) if override.is_sweep_override()]
        jobs = expand_jobs(params, task)
    except (OSError, yaml.YAMLError, LookupError, TypeError, HydraException, UserError):
        return [], []
    # As Hydra names them.
    names = [job_folder(",".join(sorted(word for word in job if _by_key([word]).keys() & swept))) for job in jobs]
    return [(name, _telling(_by_key(job), swept, name)) for name, job in zip(names, jobs, strict=True)], swept


def _telling(overrides: dict[str, str], swept: list[str], folder: str) -> dict[str, str]:
    """Without what makes no other experiment (``threads=1``, ``callbacks=none``) and is not what the sweep varies."""
    return {
        key: value
        for key, value in overrides.items()
        # The sweep that varied it may not be the last one that was asked for here.
        if key in swept or f"{key}=" in folder or not (key == "trainer" or is_within(key, MAY_CHANGE))
    }


def _read_job(path: Path, swept: list[str]) -> Job | None:
    folder = RunFolder(path)
    try:
        # A line an override: Hydra's own file, read without the time that a whole config takes.
        words = yaml.load(folder.overrides.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, yaml.YAMLError):
        return None
    overrides = _telling(_by_key(words or []), swept, path.name)
    result = folder.read_result()
    if result is None:
        return Job(path, overrides, "running" if folder.is_claimed() else "unfinished", folder.latest_scores())
    if result["status"] == "failed":
        return Job(path, overrides, "failed", error=result["error"])
    metrics = {k: v for k, v in result["metrics"].items() if isinstance(v, float)}
    if "seed" in result:
        overrides.setdefault("seed", str(result["seed"]))
    return Job(path, overrides, "finished", metrics | {"train_seconds": result["train_seconds"]})


def _fill_in(job: Job, keys: Iterable[str]) -> None:
    """Gives a job the values that it has for ``keys`` without having been asked for them."""
    missing = [key for key in keys if key not in job.overrides]
    if not missing:
        return
    with contextlib.suppress(OSError, yaml.YAMLError):
        config = yaml.load(RunFolder(job.folder).config.read_text(encoding="utf-8"), Loader=_Loader)
        for key in missing:
            value: Any = config
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if isinstance(value, str | int | float):
                job.overrides[key] = value if isinstance(value, str) else json.dumps(value)  # true, not True


_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def group_by_seed(jobs: list[Job], metric: str) -> list[Row]:
    """Jobs that differ only in seed put together, the best by ``metric`` first, those without it last."""
    varying = varying_keys(jobs)
    groups: dict[tuple[str, ...], list[Job]] = defaultdict(list)
    for job in jobs:
        groups[tuple(job.overrides.get(key, "") for key in varying)].append(job)
    rows = [Row(dict(zip(varying, values, strict=True)), group) for values, group in groups.items()]
    sign = 1 if metric.endswith("loss") else -1
    return sorted(rows, key=lambda row: (not row.values(metric), sign * (row.statistics(metric)["mean"] or 0)))


def varying_keys(jobs: list[Job]) -> list[str]:
    """The keys, without ``seed``, that do not have one value in all jobs."""
    keys = dict.fromkeys(key for job in jobs for key in job.overrides)
    return [key for key in keys if key != "seed" and len({job.overrides.get(key) for job in jobs}) > 1]
