"""``nin report SWEEP``: table and chart of a sweep, also of an unfinished one, or of a folder of single runs."""

import argparse
from pathlib import Path

from nin.sweeps import chart, checks, jobs, summary


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="nin report",
        description="Print the results of a sweep, best first, and write summary.csv, summary.md, summary.png and "
        "runs.csv, which has a line for each run, into its folder. Runs that differ only in seed are summarized by "
        "mean, sample standard deviation and worst. In a folder of single runs each run is listed by its name.",
        epilog="examples: nin report outputs/sweeps/lr; nin report outputs/runs --metric test/acc",
        allow_abbrev=False,
    )
    parser.add_argument(
        "folder", metavar="SWEEP", type=Path, help="a sweep's folder, as in outputs/sweeps/lr, or outputs/runs"
    )
    parser.add_argument(
        "--metric", default="val/acc", choices=jobs.METRICS, help="to sort by and to draw; default: val/acc"
    )
    parser.add_argument("--x", default="epochs", choices=chart.X_AXES, help="x axis of the curves; default: epochs")
    parser.add_argument(
        "--storage", metavar="URL", help="the database of a search with hydra.sweeper.storage=URL; the URL in the "
        "search's files is not used, because they may come from elsewhere",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    if (args.folder / "search.json").exists():
        checks.require_search_packages()
    summary.report(args.folder, args.metric, args.x, args.storage)
