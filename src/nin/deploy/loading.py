"""Finds out what a path is: a run's folder, a checkpoint or an export. Imports torch only for the first two."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nin.config.schema import UserError
from nin.data.folder import SUFFIXES
from nin.runs.folder import RunFolder

if TYPE_CHECKING:
    from nin.deploy.trained import TrainedNetwork


def load(path: str | Path, allow: str | Sequence[str] = ()) -> "TrainedNetwork":
    """A trained network, ready to classify images.

    Args:
        path: a run's folder (its best.ckpt is loaded), a checkpoint, or an ``.onnx`` file written by `nin export`.
        allow: a Python module of yours whose classes a checkpoint may name, or several: a network of your own is
            imported from them.

    Returns:
        An object with ``predict(images)``, probabilities ``(batch, classes)``, and ``maps(images)``, score maps
        ``(batch, classes, height, width)``; see `TrainedNetwork`.

    Raises:
        UserError: if there is no such file, it is none of these, or it names a class that is not allowed.
    """
    path = Path(path)
    if path.suffix.lower() in SUFFIXES and path.is_file():
        raise UserError(f"{path}: an image; give a run's folder, a checkpoint or an .onnx file, and then the images")
    if is_export(path):
        from nin.deploy.onnx_model import load_onnx

        return load_onnx(path)
    checkpoint = find_checkpoint(path)
    from nin.deploy.pipeline import load_checkpoint

    return load_checkpoint(checkpoint, [allow] if isinstance(allow, str) else allow)


def is_export(path: Path) -> bool:
    """Whether a path names an export and not a run or a checkpoint."""
    return path.suffix == ".onnx"


def find_checkpoint(path: Path, files: str = "a .ckpt or an .onnx file") -> Path:
    """The checkpoint to use from a run's folder: best.ckpt, or last.ckpt before the first epoch has ended.

    If ``path`` is a file, it is returned itself.

    Args:
        files: what the command takes beside a run's folder, for the message.

    Raises:
        UserError: if there is none, or the file is an export in another format than ONNX.
    """
    if path.suffix == ".pt2" and path.is_file():
        raise UserError(
            f"{path}: an export for C++ and torch.export.load(); give its run, a checkpoint or an .onnx file instead"
        )
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; give a run's folder, as in outputs/runs/first, or {files}")
    folder = RunFolder(path)
    for checkpoint in (folder.best, folder.last):
        if checkpoint.exists():
            return checkpoint
    if run := next(path.glob("*/checkpoints/*.ckpt"), None):
        raise UserError(f"{path}: holds several runs; give one of them, as in {run.parent.parent}")
    if file := next(path.glob("*.ckpt"), None):
        raise UserError(f"{path}: holds checkpoints; give the run's folder, or one of the files, as in {file}")
    raise UserError(f"{path}: no checkpoint in it yet ({folder.best.relative_to(path)}); is it a run's folder?")


def default_export(path: Path, suffix: str) -> Path:
    """The path that `nin export` writes: ``export/model<suffix>`` in a run's folder, or beside a checkpoint file."""
    # `with_suffix` twice would cut off more: a name such as lr=0.01.ckpt has two dots.
    return path / "export" / f"model{suffix}" if path.is_dir() else path.with_name(f"{path.stem}{suffix}")
