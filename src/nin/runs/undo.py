"""Takes back what a start of a run has written in its folder, if the run is refused."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from nin.config.schema import UserError
from nin.runs.files import open_atomically
from nin.runs.folder import RunFolder


@contextlib.contextmanager
def undo_if_refused(folder: RunFolder) -> Iterator[None]:
    """Undoes what this start has written if the run is refused before anything is trained.

    From a new folder all that this start has written is removed. In an existing one, config, overrides, state and
    result of the earlier start are written back, unless a checkpoint has been saved since.
    """
    before, is_new = set(folder.path.iterdir()), not folder.config.exists()
    replaced = (folder.overrides, folder.config, folder.state, folder.result)
    kept = {path: path.read_bytes() for path in replaced if path.exists()}
    saved = _modified(folder.last)
    try:
        yield
    except (UserError, KeyboardInterrupt):
        # Lightning requests the schedule and batches after the request is written.
        if is_new and not folder.has_progress():
            _remove_new(folder, before)
        elif saved == _modified(folder.last):
            _restore(kept)
        raise


def _remove_new(folder: RunFolder, before: set[Path]) -> None:
    """Removes what a refused run has written beside ``before``; without a config `RunFolder.claim` removes the rest."""
    for path in {*folder.path.iterdir(), folder.config} - before:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _modified(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _restore(kept: dict[Path, bytes]) -> None:
    """Writes files of an earlier start again, where a refused one has replaced them."""
    for path, content in kept.items():
        if not path.exists() or path.read_bytes() != content:
            with open_atomically(path) as file:
                file.write(content)
