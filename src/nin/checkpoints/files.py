"""Checkpoint files: data only, with a checksum; which of them are valid, and whether they fit the run."""

import contextlib
import hashlib
import io
import logging
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from nin.checkpoints.checksum import DIGITS
from nin.config.changes import find_differences
from nin.config.errors import read_first_line
from nin.config.schema import Settings, UserError
from nin.config.trust import OF_TRAINED, require_allowed_classes
from nin.config.validation import validate_plain
from nin.runs.files import open_atomically, sync_folder
from nin.runs.folder import RunFolder

log = logging.getLogger(__name__)

# The keys under which the callback and the data module find their own state in a checkpoint.
CALLBACK_STATE_KEY = "ResumableCheckpoint"
DATA_STATE_KEY = "ImageDataModule"

# The version of what `ResumableCheckpoint` saves; after a change of it, earlier checkpoints can't be resumed.
STATE_FORMAT = 1
_ZIP_END = b"PK\x05\x06"  # starts the last 22 bytes before the comment


class DamagedError(UserError):
    """The content of the file is not that of a checkpoint; reading it again would not help."""


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint: tensors on the CPU and plain values.

    Raises:
        UserError: as `read_with_checksum`.
    """
    return read_with_checksum(path)[0]


def read_with_checksum(path: Path) -> tuple[dict[str, Any], str]:
    """The content of a checkpoint, and the checksum that the file ends with, which the content matches.

    Raises:
        DamagedError: if the file is damaged, not a checkpoint of this project, or holds anything but data.
        UserError: if it is missing, or can't be read.
    """
    if path.exists() and not path.is_file():
        raise DamagedError(f"{path}: not a file")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error
    except MemoryError as error:
        raise UserError(f"{path}: can't be read: not enough memory") from error
    end = len(content) - DIGITS
    if end < 22 or content[end - 22 : end - 18] != _ZIP_END:
        raise _damaged(path, "damaged, or not a checkpoint of nin: it does not end with a checksum")
    if hashlib.sha256(memoryview(content)[:end]).hexdigest().encode() != content[end:]:  # no copy
        raise _damaged(path, "damaged: its content does not match its checksum")
    try:
        with warnings.catch_warnings(action="ignore"):  # about other pickle protocols, which torch then refuses
            checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DamagedError(
            f"{path}: refused: it is not a checkpoint, or holds more than tensors and plain values, which could run "
            "code when it is loaded"
        ) from error
    except Exception as error:  # torch raises many types on a file with a valid checksum of other content
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise UserError(f"{path}: can't be read: not enough memory") from error
        raise DamagedError(f"{path}: not a checkpoint: {read_first_line(error)}") from error
    _require_layout(checkpoint, path)
    return checkpoint, content[end:].decode()


def _damaged(path: Path, what: str) -> DamagedError:
    others = ", ".join(sorted(other.name for other in path.parent.glob("*.ckpt") if other.name != path.name))
    return DamagedError(f"{path}: {what}{f'; other checkpoints there: {others}' if others else ''}")


def _require_layout(checkpoint: Any, path: Path) -> None:
    if not isinstance(checkpoint, dict):
        raise DamagedError(f"{path}: not a checkpoint of nin: it holds a {type(checkpoint).__name__}")
    layout = {"state_dict": dict, "hyper_parameters": dict, "global_step": int, "epoch": int}
    wrong = [key for key, kind in layout.items() if not isinstance(checkpoint.get(key), kind)]
    if wrong:
        raise DamagedError(
            f"{path}: not a checkpoint of this version of nin: {', '.join(wrong)} missing or of another type"
        )


@contextlib.contextmanager
def explain_failed_save(size: int) -> Iterator[None]:
    """Adds the remedy to an OSError that is raised while a checkpoint of ``size`` bytes is saved."""
    try:
        yield
    except OSError as error:
        error.strerror = (
            f"{error.strerror}: the checkpoint of {size / 1e6:.0f} MB could not be saved, the previous one is kept; "
            "free some space and resume the run"
        )
        raise


def rotate_checkpoints(folder: RunFolder, best: bool, keep: int) -> None:
    """Renames .fresh.ckpt to last.ckpt. With ``best``, copies it to best.ckpt first.

    The previous last.ckpt becomes last-1.ckpt, and so on; ``keep`` of these are kept.
    """
    last = folder.last
    if best:
        size = folder.fresh.stat().st_size
        with explain_failed_save(size), folder.fresh.open("rb") as content, open_atomically(folder.best) as file:
            shutil.copyfileobj(content, file)
    if keep and last.exists():
        for i in reversed(range(1, keep)):
            if (older := last.with_name(f"last-{i}.ckpt")).exists():
                older.replace(last.with_name(f"last-{i + 1}.ckpt"))
        last.replace(last.with_name("last-1.ckpt"))
    folder.fresh.replace(last)
    sync_folder(folder.checkpoints)


def load_newest_valid(folder: RunFolder, rename: bool) -> tuple[Path, dict[str, Any]] | None:
    """The newest valid checkpoint of a run; None if none was ever saved. Damaged files are skipped.

    Args:
        rename: whether damaged files are renamed, with a warning; only where the folder is claimed, by rank 0.

    Raises:
        UserError: if there are checkpoints and none is valid, or one can't be read, which may be for a moment only.
    """
    for path in resume_candidates(folder):
        if not path.exists():
            continue
        try:
            return _later(path, read(path), folder.best)
        except DamagedError as error:
            if rename:
                aside = next(p for i in range(1000) if not (p := path.with_name(f"{path.name}.damaged-{i}")).exists())
                path.rename(aside)
                log.warning("%s; renamed to %s", error, aside.name)
        except UserError as error:
            if path.exists():  # otherwise another process has renamed it
                remedy = "try again, or move it away to resume from the checkpoint before it"
                raise UserError(f"{error}; {remedy}") from error
    # best.ckpt or a damaged file shows that there was progress, which must not be discarded silently.
    if folder.checkpoints.exists() and (left := [p.name for p in folder.checkpoints.iterdir() if p.name[0] != "."]):
        raise UserError(
            f"{folder.checkpoints}: no valid checkpoint to resume from (found: {', '.join(sorted(left))}); put a valid "
            "last.ckpt there, give another name=…, or remove the run's folder to start again"
        )
    return None


def _later(path: Path, checkpoint: dict[str, Any], best: Path) -> tuple[Path, dict[str, Any]]:
    """``checkpoint``, or best.ckpt if that is of a later time: the run was killed before it renamed .fresh.ckpt.

    Resumed from the earlier one with another precision, it might not save best.ckpt again, and would test an epoch that
    is not its own.
    """
    with contextlib.suppress(UserError):
        if _position(other := read(best)) > _position(checkpoint):
            return best, other
    return path, checkpoint


def _position(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """The optimizer steps and the epochs that are done; an epoch's end has the step of the validation before it."""
    epochs = _select(checkpoint, ("loops", "fit_loop", "epoch_progress", "current", "processed"))
    return checkpoint["global_step"], epochs if isinstance(epochs, int) else 0


def resume_candidates(folder: RunFolder) -> list[Path]:
    """Paths of the checkpoints from which a run may resume, newest first; they need not exist."""
    older = (p for p in folder.checkpoints.glob("last-*.ckpt") if p.stem.removeprefix("last-").isdecimal())
    # A run that was killed during its first save has only best.ckpt.
    return [folder.last, *sorted(older, key=lambda p: int(p.stem.removeprefix("last-"))), folder.best]


def require_same_run(checkpoint: Mapping[str, Any], path: Path, settings: Settings, run_id: str | None) -> str | None:
    """Checks that a checkpoint continues exactly this experiment, and has the state that resuming needs.

    Args:
        run_id: the identity of the run's folder; None if it has none.

    Returns:
        The identity of the run that saved the checkpoint; None if that run had none.

    Raises:
        UserError: names what differs or is missing.
    """
    # A valid checksum and this number stand for the rest: nothing else is checked before it is used.
    if _select(checkpoint, ("callbacks", CALLBACK_STATE_KEY, "format")) != STATE_FORMAT:
        raise UserError(
            f"{path}: can't be resumed: it has no state of the training, or that of another version of nin; remove it "
            "to resume from the checkpoint before it, or give another name=…"
        )
    if different := find_differences(read_checkpoint_settings(checkpoint, path), settings):
        raise UserError(
            f"{path} was saved by another experiment; give another name=…, or its settings:\n  "
            + "\n  ".join(different)
        )
    saved_by = _select(checkpoint, ("callbacks", CALLBACK_STATE_KEY, "run_id"))
    if run_id and saved_by and saved_by != run_id:
        raise UserError(
            f"{path} was saved by another run (id {str(saved_by)[:8]}…, the folder has {run_id[:8]}…); put the run's "
            "own checkpoint there, or give another name=…"
        )
    return saved_by


def read_checkpoint_settings(
    checkpoint: Mapping[str, Any], path: Path, allowed: list[str] | None = None, groups: tuple[str, ...] = OF_TRAINED
) -> Settings:
    """The settings of the run that saved a checkpoint. They are plain values: no interpolation is resolved.

    Args:
        allowed: the modules whose classes may be imported, if the settings are used to build the trained network; None
            if they are only compared.
        groups: the sections whose classes are going to be imported.

    Raises:
        UserError: if this version of the project does not know them, or they name a class that is not allowed.
    """
    try:
        _require_few_values(checkpoint["hyper_parameters"]["settings"])
        stored = validate_plain(checkpoint["hyper_parameters"]["settings"])
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{path}: saved by another version of nin?\n{error}") from error
    if allowed is not None:
        require_allowed_classes(stored, allowed, groups)
    return stored


def _require_few_values(settings: Any) -> None:
    """Raises TypeError for more than 100,000 values: a few lists that hold each other stand for any number of them."""
    waiting, count = [settings], 0
    while waiting:
        count += 1
        if count > 100_000:
            raise TypeError("its settings have more than 100,000 values")
        match waiting.pop():
            case dict() as section:
                waiting.extend(section.values())
            case list() | tuple() as values:
                waiting.extend(values)


def read_images_sha256(checkpoint: Mapping[str, Any]) -> Any:
    """The fingerprint of the folder of images that the run had; None if it had none."""
    return _select(checkpoint, (DATA_STATE_KEY, "fingerprint"))


def _select(nested: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        nested = nested.get(key) if isinstance(nested, Mapping) else None
    return nested
