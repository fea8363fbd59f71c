"""Options that several commands have."""

import argparse
import os
from pathlib import Path


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Adds Hydra's options for other configs than ``conf/train.yaml``."""
    parser.add_argument(
        "--config-dir", "-cd", metavar="FOLDER", help="folder of your own configs, searched in addition to conf/"
    )
    parser.add_argument(
        "--config-name", "-cn", default="train", metavar="NAME", help="name of the primary config; default: train"
    )
    parser.add_argument("--config-path", "-cp", metavar="FOLDER", help="folder that replaces conf/")


def expand_path(text: str) -> Path:
    """A path whose ``~`` is the home folder, which a shell expands in ``--out ~/x`` and not in ``--out=~/x``."""
    return Path(os.path.expanduser(text))  # noqa: PTH111  # pathlib raises for an unknown ~user


def add_allow_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--allow MODULE``, which can be given several times."""
    parser.add_argument(
        "--allow", metavar="MODULE", action="append", default=[],
        help="a Python module of yours whose classes the run or the checkpoint may name; can be given several times",
    )  # fmt: skip
