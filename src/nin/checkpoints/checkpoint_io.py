"""Lightning's plugin for checkpoint files: writes them atomically, removes them, and loads them as data."""

import hashlib
import io
import logging
import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.plugins import TorchCheckpointIO

from nin.checkpoints.checksum import DIGITS
from nin.checkpoints.files import explain_failed_save, read
from nin.config.schema import UserError
from nin.runs.files import open_atomically

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves checkpoints atomically, with a checksum inside; loads data only, never code.

    Args:
        folders: where it writes and removes files. A config or the state of a callback may come from elsewhere, and
            name any path. None: everywhere.
    """

    _is_checked = False

    def __init__(self, folders: Sequence[Path] | None = None):
        super().__init__()
        self.folders = folders if folders is None else [Path(os.path.realpath(folder)) for folder in folders]

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Saves ``checkpoint`` to ``path``.

        Raises:
            OSError: if the disk is full or can't be written; the previous file is kept.
            UserError: if a callback's state could not be loaded again as data, or ``path`` is outside of the folders.
        """
        if not self._is_within_folders(path):
            raise UserError(f"{path}: outside of the run's folder; set the dirpath of the callback that saves there")
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        if not self._is_checked:  # a state that can't be loaded is found in the first save, not on resuming
            _require_data(buffer, "one")
            self._is_checked = True
        content = buffer.getbuffer()
        content[-2:] = DIGITS.to_bytes(2, "little")  # the length of the comment stands at the end of a zip file
        digest = hashlib.sha256(content).hexdigest().encode()
        with explain_failed_save(len(content)), open_atomically(Path(path)) as file:
            file.write(content)
            file.write(digest)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a checkpoint file, if it is there and within the folders."""
        file = Path(path)
        if self._is_within_folders(file) and file.is_file() and not file.is_symlink():
            file.unlink()
        elif os.path.lexists(file):
            log.warning("%s: is not removed, because it is no checkpoint in the run's folder", path)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Loads a checkpoint as `read` does."""
        return read(Path(path))

    def _is_within_folders(self, path: str | Path) -> bool:
        real = Path(os.path.realpath(path))
        return self.folders is None or any(real.is_relative_to(folder) for folder in self.folders)


def require_loadable_states(trainer: Trainer) -> None:
    """Raises UserError if the state of a callback can't be loaded again from a checkpoint as data."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning, missing in its types
        buffer = io.BytesIO()
        torch.save(callback.state_dict(), buffer)
        _require_data(buffer, type(callback).__name__)


def _require_data(buffer: io.BytesIO, callback: str) -> None:
    try:
        torch.load(io.BytesIO(buffer.getbuffer()), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        kind = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"callbacks: the state of {callback} holds a {kind[1] if kind else 'class'}, which can't be loaded without "
            "running code; its state_dict() must return tensors, numbers, strings, lists and dictionaries of them"
        ) from error
