"""One answer for all of a sweep's jobs: the table, summary.csv, summary.md, and the picture in summary.png."""

import csv
import io
import textwrap
from pathlib import Path
from typing import Any

from nin.runs.folder import RunFolder, write_atomically
from nin.sweeps.jobs import Job, Row

METRICS = ("val/acc", "val/loss", "test/acc", "test/loss")


def write_summary(sweep: Path, jobs: list[Job], rows: list[Row], metric: str) -> None:
    """summary.csv, summary.md and summary.png in the sweep's folder."""
    write_atomically(sweep / "summary.csv", _as_csv(rows))
    write_atomically(sweep / "summary.md", _as_markdown(sweep, jobs, rows, metric))
    picture = sweep / ".summary.png.tmp"
    _draw(rows, metric).savefig(picture, format="png", dpi=120)
    picture.replace(sweep / "summary.png")


def _as_csv(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [f"{metric} {what}" for metric in METRICS for what in ("mean", "std", "worst")]
    writer.writerow([*rows[0].keys, "runs", "finished", *names, "train_seconds mean"])
    for row in rows:
        values = [value for metric in METRICS for value in row.statistics(metric).values()]
        finished = sum(job.status == "finished" for job in row.jobs)
        writer.writerow([*row.keys.values(), len(row.jobs), finished, *values, row.statistics("train_seconds")["mean"]])
    return text.getvalue()


def table(rows: list[Row], metric: str) -> list[list[str]]:
    """The answer as words, the header first: what varies, the metrics over the seeds, seconds of training, runs."""
    shown = list(dict.fromkeys([metric, "val/acc", "test/acc"]))
    header = [*rows[0].keys, *(column for name in shown for column in (name, "worst")), "seconds", "runs"]
    return [header, *(_words(row, shown) for row in rows)]


def _words(row: Row, shown: list[str]) -> list[str]:
    words = list(row.keys.values())
    for name in shown:
        found = row.statistics(name)
        mean, deviation, worst = ("" if value is None else f"{value:.4f}" for value in found.values())
        words += [f"{mean} ± {deviation}" if deviation else mean, worst]
    seconds = row.statistics("train_seconds")["mean"]
    words.append("" if seconds is None else f"{seconds:.0f}")
    states = [job.status for job in row.jobs]
    others = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states) if s != "finished")
    return [*words, f"{len(states)} ({others})" if others else str(len(states))]


def failures(jobs: list[Job]) -> list[str]:
    return [f"{job.folder.name}: {job.error}" for job in jobs if job.status == "failed"]


def _as_markdown(sweep: Path, jobs: list[Job], rows: list[Row], metric: str) -> str:
    header, *lines = table(rows, metric)
    text = [f"# {sweep.name}", "", f"{len(jobs)} runs, the best by {metric} first; ± is the standard deviation.", ""]
    text += [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines)]
    if failed := failures(jobs):
        text += ["", "Failed:", "", *(f"* {line}" for line in failed)]
    return "\n".join([*text, "", "![](summary.png)", ""])


def _draw(rows: list[Row], metric: str) -> Any:
    """What came out in the end, and beside it each run's way there over its seconds of training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    end, way = figure.subplots(1, 2)
    rows = [row for row in rows if row.values(metric)]
    colours = [f"C{i % 10}" for i in range(len(rows))]
    if not rows:
        end.text(0.5, 0.5, "no run has finished yet", ha="center", transform=end.transAxes)
    elif not _draw_line(end, rows, metric):
        _draw_bars(end, rows, metric, colours)
    for row, colour in zip(rows, colours, strict=True):
        for i, job in enumerate(row.jobs):
            epochs = [epoch for epoch in RunFolder(job.folder).read_epochs() if metric in epoch]
            seconds, values = [epoch["seconds"] for epoch in epochs], [epoch[metric] for epoch in epochs]
            label = _wrapped(row) if i == 0 else None
            way.plot(seconds, values, color=colour, marker=".", linewidth=1, label=label)
    way.set_xlabel("seconds of training")
    way.set_ylabel(metric)
    if 1 < len(rows) <= 10:
        way.legend()
    return figure


def _draw_line(axes: Any, rows: list[Row], metric: str) -> bool:
    """Over a key that is a number, with a band over the seeds; False if there is none."""
    keys = list(rows[0].keys)
    numbers = {row.label: _number(row.keys[keys[0]]) for row in rows} if len(keys) == 1 else {}
    if len(rows) == 1 or not numbers or None in numbers.values():
        return False
    rows = sorted(rows, key=lambda row: numbers[row.label])
    at = [numbers[row.label] for row in rows]
    axes.plot(at, [row.statistics(metric)["mean"] for row in rows], marker="o")
    axes.fill_between(
        at, [min(row.values(metric)) for row in rows], [max(row.values(metric)) for row in rows], alpha=0.2
    )
    axes.set_xlabel(keys[0])
    axes.set_ylabel(metric)
    if min(at) > 0 and max(at) / min(at) >= 20:
        axes.set_xscale("log")
    elif len(at) <= 10:
        axes.set_xticks(at)
    return True


def _draw_bars(axes: Any, rows: list[Row], metric: str, colours: list[str]) -> None:
    means = [row.statistics(metric)["mean"] for row in rows]
    spread = [row.statistics(metric)["std"] or 0 for row in rows]
    axes.barh([_wrapped(row) for row in rows], means, xerr=spread, capsize=3, color=colours)
    axes.invert_yaxis()
    axes.set_xlabel(metric)
    # A bar from zero hides the difference between 0.91 and 0.92.
    every = [v for row in rows for v in row.values(metric)]
    margin = max(max(every) - min(every), 0.01)
    axes.set_xlim(max(0, min(every) - margin), max(every) + margin / 2)


def _wrapped(row: Row) -> str:
    return textwrap.fill(row.label, width=32, break_long_words=False)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
