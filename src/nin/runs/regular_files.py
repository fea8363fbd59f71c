"""What may be in a run's folder, which may come from elsewhere: regular files and folders, no links and no pipes."""

import errno
import stat
from collections.abc import Callable
from pathlib import Path

from nin.config.schema import UserError


def require_no_links_or_pipes(folder: Path) -> None:
    """Checks everything in ``folder``: a link would be written through, a named pipe waited for.

    Raises:
        UserError: names the first one that is found.
    """
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise UserError(f"{path}: a symbolic link, which would be written through; replace it by its target")
        if _is_other_than(stat.S_ISREG, path) and _is_other_than(stat.S_ISDIR, path):
            raise UserError(f"{path}: not a file; remove it")


def require_folders(*paths: Path) -> None:
    """Checks that each of ``paths`` is a folder or does not exist.

    Raises:
        UserError: names the first one that is something else.
    """
    for path in paths:
        if _is_other_than(stat.S_ISDIR, path):
            raise UserError(f"{path}: not a folder; remove it")


def require_files(*paths: Path) -> None:
    """Checks that each of ``paths`` is a regular file or does not exist.

    Raises:
        UserError: names the first one that is something else.
    """
    for path in paths:
        if _is_other_than(stat.S_ISREG, path):
            raise UserError(f"{path}: not a file; remove it")


def _is_other_than(kind: Callable[[int], bool], path: Path) -> bool:
    """Whether something of another kind is at ``path``. One look: another process may remove it in the meantime."""
    try:
        return not kind(path.stat().st_mode)
    except FileNotFoundError:
        return False


def read_text(path: Path) -> str:
    """The text of a file; ``Path.read_text`` would wait for ever for a named pipe."""
    # One look: another process may replace or remove the file in the meantime.
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a file", str(path))
    return path.read_text(encoding="utf-8")
