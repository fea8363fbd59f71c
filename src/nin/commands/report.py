"""``nin report SWEEP``: the table and the chart of a sweep, also of one that is half done."""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nin.runs.results import shown
from nin.sweeps import jobs as sweep
from nin.sweeps import summary


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="nin report",
        description="What a sweep has found: runs that differ only in seed are folded into mean, standard deviation and "
        "worst; the best first. Writes summary.csv, summary.md and summary.png into its folder.",
        epilog="example: nin report outputs/sweeps/lr",
    )
    parser.add_argument("sweep", type=Path, help="a sweep's folder, as in outputs/sweeps/lr")
    parser.add_argument(
        "--metric", default="val/acc", choices=summary.METRICS, help="what to sort by and draw; default: val/acc"
    )
    asked = parser.parse_args(arguments)
    report(asked.sweep, asked.metric)


def report(folder: Path, metric: str = "val/acc") -> None:
    """Prints the table of the sweep in ``folder``, and writes its summary if that can be."""
    jobs = sweep.read_jobs(folder)
    if not any(metric in job.metrics for job in jobs) and metric == "val/acc":
        metric = "test/acc"  # the notebooks' habit: nothing is held out
    rows = sweep.group_by_seed(jobs, metric)
    header, *lines = summary.table(rows, metric)
    table = Table(title=f"{folder.name}: the best by {metric} first", title_justify="left")
    for name in header:
        table.add_column(name, overflow="fold")
    for line in lines:
        table.add_row(*line)
    Console(highlight=False).print(table)
    for failure in summary.failures(jobs):
        print(f"failed: {failure}")
    try:
        summary.write_summary(folder, jobs, rows, metric)
        print(f"summary:    {shown(folder)}/summary.csv, summary.md, summary.png")
    except OSError as error:  # somebody else's sweep, a full disk
        print(f"no summary: {error.filename} can't be written ({error.strerror})", file=sys.stderr)
    print(f"dashboards: tensorboard --logdir {shown(folder)}")
