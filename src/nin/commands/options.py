"""Options that several commands have."""

import argparse
import os
from pathlib import Path

from nin.config.schema import UserError


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


def require_writable_folder(option: str, folder: Path) -> None:
    """Raises UserError, before the work begins, if ``folder`` can't be made or written.

    Args:
        option: with its value, for the message.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise UserError(f"{option}: can't be written ({existing} is not a folder)")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{option}: can't be written (no permission to write to {existing})")


def add_allow_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--allow MODULE``, which can be given several times."""
    parser.add_argument(
        "--allow", metavar="MODULE", action="append", default=[],
        help="a Python module of yours whose classes the run or the checkpoint may name; can be given several times",
    )  # fmt: skip
