"""The rows of a sweep's table: jobs that differ only in their seed, with mean, deviation and worst seed."""

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Job:
    """One job of a sweep or one single run, as read from its folder."""

    folder: Path
    overrides: dict[str, str]
    status: str  # finished, failed, pruned, running, unfinished or not started
    metrics: dict[str, float] = field(default_factory=dict)
    error: str = ""
    hardware: str = ""  # the device, the precision and the version of torch
    commit: str = ""  # of the code
    data: str = ""  # the data set, of a single run

    def values(self, metric: str) -> list[float]:
        """The finite value of ``metric`` of a finished job; an unfinished one only has that of an earlier epoch."""
        value = self.metrics.get(metric) if self.status == "finished" else None
        return [value] if value is not None and math.isfinite(value) else []


@dataclass
class Row:
    """Jobs that differ only in their seed."""

    keys: dict[str, str]
    jobs: list[Job]

    def values(self, metric: str) -> list[float]:
        """The finite values of ``metric`` in finished jobs."""
        return [value for job in self.jobs for value in job.values(metric)]

    def summarize(self, metric: str) -> dict[str, float | None]:
        """ "mean", sample standard deviation "std" and "worst" over the seeds; None where there are too few values."""
        values = self.values(metric)
        worst = max if metric.endswith("loss") else min
        return {
            "mean": statistics.fmean(values) if values else None,
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "worst": worst(values) if values else None,
        }

    def parameters(self) -> int | None:
        """The number of the network's parameters; None if it is unknown, or not the same in all finished runs."""
        values = {int(value) for value in self.values("parameters")}
        return values.pop() if len(values) == 1 else None

    def median_seconds(self) -> float | None:
        """Seconds of training of the run in the middle: one that was disturbed or resumed does not change it."""
        values = self.values("train_seconds")
        return statistics.median(values) if values else None

    def sampling_error(self) -> float | None:
        """Standard error of test/acc due to the number n of test images, sqrt(p (1 - p) / n); None if unknown."""
        p, images = self.summarize("test/acc")["mean"], self.values("test_images")
        if p is None or not 0 <= p <= 1 or not images or min(images) < 1:
            return None
        return math.sqrt(p * (1 - p) / min(images))

    @property
    def label(self) -> str:
        """The name of a single run, or the varied keys without their sections: "norm=batch lr=0.1"."""
        if "run" in self.keys:
            return self.keys["run"]
        return " ".join(f"{key.split('.')[-1]}={value}" for key, value in self.keys.items() if value) or "all"


def group_by_seed(jobs: list[Job], metric: str) -> list[Row]:
    """Rows of the jobs that differ only in seed, the best by ``metric`` first, those without it last."""
    varying = varying_keys(jobs)
    groups: dict[tuple[str, ...], list[Job]] = defaultdict(list)
    for job in jobs:
        groups[tuple(job.overrides.get(key, "") for key in varying)].append(job)
    rows = [Row(dict(zip(varying, values, strict=True)), group) for values, group in groups.items()]
    sign = 1 if metric.endswith("loss") else -1
    return sorted(rows, key=lambda row: (not row.values(metric), sign * (row.summarize(metric)["mean"] or 0)))


def subtract_by_seed(first: Row, second: Row, metric: str) -> list[float]:
    """The differences of ``metric``, one for each seed with which both rows have a finished run."""
    by_seed = [
        {job.overrides["seed"]: value for job in row.jobs if "seed" in job.overrides for value in job.values(metric)}
        for row in (first, second)
    ]
    return [value - by_seed[1][seed] for seed, value in by_seed[0].items() if seed in by_seed[1]]


def varying_keys(jobs: list[Job]) -> list[str]:
    """The keys, without ``seed``, that do not have one value in all jobs; of single runs always "run", their name."""
    keys = dict.fromkeys(key for job in jobs for key in job.overrides if key != "seed")
    return [key for key in keys if key == "run" or len({job.overrides.get(key) for job in jobs}) > 1]
