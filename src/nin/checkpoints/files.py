"""Checkpoint files: whole or not there, with a checksum, data only; and how a good one is told from a damaged one."""

import hashlib
import io
import logging
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.fabric.plugins import TorchCheckpointIO
from omegaconf import OmegaConf

from nin.config.schema import Settings, UserError
from nin.config.validation import validate
from nin.runs.folder import RunFolder, open_atomically
from nin.system.distributed import global_rank

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, with a checksum in it; reads data only, never code.

    The checksum is the zip file's comment: 64 hex digits of the SHA-256 of everything before them.
    """

    proved = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        if not self.proved:  # once: what could not be read again must not be found out at the end
            _require_data(buffer)
            self.proved = True
        content = buffer.getbuffer()
        content[-2:] = _DIGITS.to_bytes(2, "little")  # the comment's length, at the very end of a zip file
        digest = hashlib.sha256(content).hexdigest().encode()
        try:
            with open_atomically(Path(path)) as file:
                file.write(content)
                file.write(digest)
        except OSError as error:
            megabytes = len(content) / 1e6
            error.strerror = (
                f"{error.strerror}: the checkpoint of {megabytes:.0f} MB could not be saved, the one before it is "
                "kept; make room and say the same command again, which goes on from there"
            )
            raise

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return read(Path(path))


def _require_data(buffer: io.BytesIO) -> None:
    try:
        torch.load(io.BytesIO(buffer.getbuffer()), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        kind = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"callbacks: the state of one holds a {kind[1] if kind else 'class'}, which can't be read again without "
            "running code; have its state_dict() return tensors, numbers, words, lists and dictionaries of them"
        ) from error


# The name under which the callback `ResumableCheckpoint` finds its own state in a checkpoint.
CALLBACK = "ResumableCheckpoint"
_DIGITS = 64
_ZIP_END = b"PK\x05\x06"  # 22 bytes before the comment


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's content: tensors and plain values, on the CPU.

    Raises:
        UserError: if the file is missing, damaged, no checkpoint of this project, or holds anything but data.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error
    end = len(content) - _DIGITS
    sealed = content[end - 22 : end - 18] == _ZIP_END
    if sealed and hashlib.sha256(content[:end]).hexdigest().encode() != content[end:]:
        raise UserError(f"{path}: damaged: its content does not fit its checksum")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickles of other protocols before it refuses them
            checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused: it is no checkpoint, or holds more than tensors and plain values, which could run code "
            "when it is read"
        ) from error
    except Exception as error:  # whatever torch happens on in a file that is cut off
        raise UserError(
            f"{path}: damaged, or no checkpoint: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: not a checkpoint of nin: it holds a {type(checkpoint).__name__}")
    missing = [key for key in ("state_dict", "hyper_parameters") if key not in checkpoint]
    if missing:
        raise UserError(f"{path}: not a checkpoint of this version of nin: it has no {' and no '.join(missing)}")
    return checkpoint


def settings_of(checkpoint: dict[str, Any], path: Path) -> Settings:
    """The settings of the run that wrote a checkpoint.

    Raises:
        UserError: if they are not what this version of the project knows.
    """
    try:
        return validate(OmegaConf.create(checkpoint["hyper_parameters"]["settings"]))
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{path}: written by another version of nin?\n{error}") from error


def require_matching_weights(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Raises UserError, with the names, if a checkpoint's weights are not those that ``module`` has."""
    there, here = set(checkpoint["state_dict"]), set(module.state_dict())
    if odd := sorted(there ^ here):
        raise UserError(
            "the checkpoint was written by another version of nin: "
            + ", ".join(f"{name} is {'not in it' if name in here else 'unknown here'}" for name in odd[:3])
            + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
        )


def load_newest_valid(folder: RunFolder) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, or None where none was ever saved. Damaged ones are set aside with a warning.

    Raises:
        UserError: if there were checkpoints and none is good.
    """
    for path in folder.resume_candidates():
        if not path.exists():
            continue
        try:
            checkpoint = read(path)
        except UserError as error:
            aside = next(p for i in range(1000) if not (p := path.with_name(f"{path.name}.damaged-{i}")).exists())
            if global_rank() == 0:  # the others of several processes leave it out as well
                path.rename(aside)
            log.warning("%s; set aside as %s", error, aside.name)
            continue
        if missing := {"loops", "callbacks", "optimizer_states", "lr_schedulers"} - checkpoint.keys():
            raise UserError(
                f"{path}: nothing to go on from: it has no {', '.join(sorted(missing))} (another version's?)"
            )
        if "processes" not in checkpoint["callbacks"].get(CALLBACK, {}):
            raise UserError(f"{path}: written by another program or version: it has no state of {CALLBACK}")
        return path, checkpoint
    # A best.ckpt or a damaged file is the trace of progress that must not be thrown away unasked.
    if folder.checkpoints.exists() and (there := [p.name for p in folder.checkpoints.iterdir() if p.name[0] != "."]):
        raise UserError(
            f"{folder.checkpoints}: no good checkpoint to go on from (there are: {', '.join(sorted(there))}); put a "
            "good last.ckpt there, give another name=…, or remove the run's folder to start it anew"
        )
    return None
