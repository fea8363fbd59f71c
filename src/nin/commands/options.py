"""Options that several commands have."""

import argparse


def add_allow_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--allow MODULE``, which can be given several times."""
    parser.add_argument(
        "--allow", metavar="MODULE", action="append", default=[],
        help="a Python module of yours whose classes the run or the checkpoint may name; can be given several times",
    )  # fmt: skip
