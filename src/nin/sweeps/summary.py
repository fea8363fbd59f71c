"""The results of a sweep's jobs: the table in the terminal, summary.csv, summary.md, summary.png and runs.csv."""

import csv
import io
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from nin.config.errors import printable
from nin.config.schema import UserError
from nin.runs.console import Console, format_path, markdown_table, tensorboard_command
from nin.runs.files import open_atomically, write_atomically
from nin.sweeps.chart import draw
from nin.sweeps.jobs import MEASURES, METRICS, read_jobs
from nin.sweeps.rows import Job, Row, group_by_seed, subtract_by_seed, varying_keys
from nin.sweeps.tables import fit_table


def report(folder: Path, metric: str = "val/acc", x_axis: str = "epochs", storage: str | None = None) -> None:
    """Prints the table of the sweep in ``folder`` and writes its summary, if the folder can be written.

    Args:
        metric: to sort by and to draw, one of ``METRICS``.
        x_axis: of the curves, "epochs" or "seconds".
        storage: the URL of a search's database.

    Raises:
        UserError: if ``folder`` is not the folder of a sweep or of runs.
    """
    if (folder / "search.json").exists():
        from nin.sweeps.search_report import report_search  # needs Optuna

        if metric != "val/acc":
            raise UserError(f"--metric {metric}: the trials of a search are compared by val/acc; leave --metric out")
        if x_axis != "epochs":
            raise UserError(f"--x {x_axis}: the chart of a search has no curves; leave --x out")
        return report_search(folder, storage)
    if storage:
        raise UserError(f"--storage: {folder} is not the folder of a search (it has no search.json); leave it out")
    jobs = read_jobs(folder)
    measured = {name for job in jobs for name in job.metrics}
    if metric == "val/acc" and metric not in measured and "test/acc" in measured:
        metric = "test/acc"  # data.score_each_epoch=test: there are no held-out images
    rows = group_by_seed(jobs, metric)
    name, seeds = printable(folder.resolve().name), _describe_seeds(rows)
    title = f"{name}: best {metric} first{seeds}"
    console = Console()
    console.print(title, style="italic", soft_wrap=True)
    console.print(fit_table(_layouts(rows, metric), console))
    for note in describe_errors(rows):
        print(note)
    for failure in describe_failures(jobs):
        print(f"failed: {failure}")
    try:
        write_atomically(folder / "summary.csv", _as_csv(rows))
        write_atomically(folder / "runs.csv", _runs_as_csv(jobs))
        write_atomically(folder / "summary.md", _as_markdown(title, jobs, rows, metric))
        with open_atomically(folder / "summary.png") as file:
            draw(f"{name}: {metric}{seeds}", rows, metric, x_axis).savefig(file, format="png", dpi=120)
    except OSError as error:  # another user's sweep, a full disk
        print(f"no summary: {error.filename or folder} can't be written ({error.strerror})", file=sys.stderr)
    else:
        print(f"summary:    {format_path(folder)}/summary.csv, summary.md, summary.png, runs.csv")
    print(f"dashboards: {tensorboard_command(folder)}")


def _layouts(rows: list[Row], metric: str) -> Iterator[tuple[list[list[str]], set[int]]]:
    """The table with a column for each varied key, and with one for all of them; settings and states may be wrapped."""
    layouts = (False, True, True), (False, False, True), (True, False, True), (True, False, False)
    for merge_keys, all_worst, sizes in layouts:
        table = tabulate(rows, metric, merge_keys, all_worst, sizes)
        yield table, {*range(1 if merge_keys else len(rows[0].keys)), len(table[0]) - 1}


def tabulate(
    rows: list[Row], metric: str, merge_keys: bool = False, all_worst: bool = True, sizes: bool = True
) -> list[list[str]]:
    """The table as text, header first: varied keys, metrics over the seeds, median seconds of training, number of runs.

    Args:
        merge_keys: whether one column has all varied keys.
        all_worst: whether there is a column with the worst seed of every metric, or of ``metric`` only.
        sizes: whether there is a column with the number of parameters, if the rows differ in it.
    """
    metrics = list(dict.fromkeys([metric, "val/acc", "test/acc"]))
    has_seeds = any(len(row.values(name)) > 1 for row in rows for name in metrics)
    with_worst = [name for name in metrics if has_seeds and (name == metric or all_worst)]
    header = list(rows[0].keys)
    if merge_keys:
        header = ["run" if "run" in header else "settings"]
    for name in metrics:
        header += [name, "worst"] if name in with_worst else [name]
    parameters = [row.parameters() for row in rows]
    with_sizes = sizes and len({*parameters} - {None}) > 1
    lines = []
    for row, count in zip(rows, parameters, strict=True):
        line = [row.label] if merge_keys else list(row.keys.values())
        for name in metrics:
            mean, std, worst = ("" if value is None else f"{value:.4f}" for value in row.summarize(name).values())
            line.append(f"{mean} ± {std}" if std else mean)
            line += [worst] if name in with_worst else []
        seconds = row.median_seconds()
        more = ["" if count is None else f"{count:,}"] * with_sizes + ["" if seconds is None else f"{seconds:.0f}"]
        lines.append([*line, *more, _describe_runs(row)])
    return [[*header, *["parameters"] * with_sizes, "seconds", "status" if "run" in rows[0].keys else "runs"], *lines]


def _describe_runs(row: Row) -> str:
    """Describes the runs of a row, as in "3 (1 failed)"; a single run by its status."""
    states = [job.status for job in row.jobs]
    if "run" in row.keys:
        return states[0]
    others = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states) if state != "finished")
    return f"{len(states)} ({others})" if others else str(len(states))


def _describe_seeds(rows: list[Row]) -> str:
    """Describes the number of seeds, as in ", 3 seeds per row"; nothing for single runs."""
    counts = sorted({len(row.values("train_seconds")) for row in rows} - {0})
    if not counts or "run" in rows[0].keys:
        return ""
    numbers = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f", {numbers} seed{'s' * (counts[-1] > 1)} per row"


def describe_errors(rows: list[Row]) -> list[str]:
    """Explains ±, the sampling error of test/acc that the choice of test images causes, hardware, data and code."""
    notes = []
    if any(len(row.values(metric)) > 1 for row in rows for metric in METRICS):
        notes.append("± is the sample standard deviation over seeds.")
    notes += _describe_difference(rows)
    errors = [error for row in rows if (error := row.sampling_error()) is not None]
    if errors:
        images = sorted({int(n) for row in rows for n in row.values("test_images")})
        # Single runs may be on many data sets.
        sizes = f"{images[0]:,} to {images[-1]:,}" if len(images) > 2 else " or ".join(f"{n:,}" for n in images)
        low, high = f"{min(errors):.4f}", f"{max(errors):.4f}"
        notes.append(
            f"Sampling error of test/acc ({sizes} images, sqrt(p(1-p)/n)): "
            f"{low if low == high else f'{low} to {high}'}."
        )
    if hardware := dict.fromkeys(job.hardware for row in rows for job in row.jobs if job.hardware):
        notes.append(f"Median seconds of training on {'; '.join(hardware)}.")
    if len(data := dict.fromkeys(job.data for row in rows for job in row.jobs if job.data)) > 1:
        notes.append(f"The runs are on different data ({', '.join(data)}): compare those of one data set.")
    commits = dict.fromkeys(job.commit[:10] + job.commit[40:] for row in rows for job in row.jobs if job.commit)
    if len(commits) > 1:
        notes.append(f"The runs are of different code (commits; + is one with changes): {', '.join(commits)}.")
    return notes


def _describe_difference(rows: list[Row]) -> list[str]:
    """Compares two rows seed by seed: what all runs of one seed have in common does not hide their difference."""
    if len(rows) != 2 or "run" in rows[0].keys:
        return []
    by_metric = {metric: subtract_by_seed(rows[0], rows[1], metric) for metric in ("val/acc", "test/acc")}
    found = [
        f"{statistics.fmean(values):+.4f} ± {statistics.stdev(values):.4f} of {metric} ({len(values)} seeds)"
        for metric, values in by_metric.items()
        if len(values) > 1
    ]
    return [f"First row minus second, seed by seed: {', '.join(found)}."] if found else []


def describe_failures(jobs: list[Job]) -> list[str]:
    """The folder's name and the error of each failed job."""
    return [f"{printable(job.folder.name)}: {job.error}" for job in jobs if job.status == "failed"]


def _as_csv(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [f"{metric} {what}" for metric in METRICS for what in ("mean", "std", "worst")]
    writer.writerow(
        [*rows[0].keys, "runs", "finished", *names, "test/acc sampling_error", "train_seconds median", "parameters"]
    )
    for row in rows:
        values = [value for metric in METRICS for value in row.summarize(metric).values()]
        finished = sum(job.status == "finished" for job in row.jobs)
        more = [row.sampling_error(), row.median_seconds(), row.parameters()]
        writer.writerow([*row.keys.values(), len(row.jobs), finished, *values, *more])
    return text.getvalue()


def _runs_as_csv(jobs: list[Job]) -> str:
    """One line for each run: what it was, what it reached, and where it is."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    has_seed = any("seed" in job.overrides for job in jobs)
    keys = [*varying_keys(jobs), *["seed"] * has_seed]
    names = [*METRICS, *MEASURES]
    writer.writerow(["folder", *keys, "status", *names, "hardware", "commit"])
    for job in jobs:
        given = [job.overrides.get(key, "") for key in keys]
        measured = [job.metrics.get(name, "") for name in names]
        writer.writerow([printable(job.folder.name), *given, job.status, *measured, job.hardware, job.commit])
    return text.getvalue()


def _as_markdown(title: str, jobs: list[Job], rows: list[Row], metric: str) -> str:
    header, *lines = tabulate(rows, metric)
    text = [f"# {title}", "", *markdown_table(header, lines)]
    text += [line for note in describe_errors(rows) for line in ("", note)]
    if failed := describe_failures(jobs):
        text += ["", "Failed:", "", *(f"* {line}" for line in failed)]
    return "\n".join([*text, "", "![](summary.png)", ""])
