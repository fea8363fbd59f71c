"""Options that several commands have."""

import argparse


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Adds Hydra's options for other configs than ``conf/train.yaml``."""
    parser.add_argument(
        "--config-dir", "-cd", metavar="FOLDER", help="folder of your own configs, searched in addition to conf/"
    )
    parser.add_argument(
        "--config-name", "-cn", default="train", metavar="NAME", help="name of the primary config; default: train"
    )
    parser.add_argument("--config-path", "-cp", metavar="FOLDER", help="folder that replaces conf/")


def add_allow_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--allow MODULE``, which can be given several times."""
    parser.add_argument(
        "--allow", metavar="MODULE", action="append", default=[],
        help="a Python module of yours whose classes the run or the checkpoint may name; can be given several times",
    )  # fmt: skip
