"""``nin eval RUN_OR_CHECKPOINT [overrides]``: test metrics of a run or of one checkpoint."""

import argparse
from pathlib import Path

from nin.config.composition import apply_overrides
from nin.config.schema import UserError
from nin.data.sources import prepare
from nin.runs.folder import RunFolder, logging_to
from nin.runs.results import print_test

MAY_CHANGE = ("data.root", "data.batch_size", "trainer", "threads", "speed")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="nin eval",
        description="Test loss and accuracy, by class too, and the confusion matrix. Of a run's folder its best.ckpt "
        "is tested, which is what result.json has; before the first epoch's end, last.ckpt.",
        epilog="example: nin eval outputs/runs/first trainer=cpu",
    )
    parser.add_argument("run_or_checkpoint", type=Path, help="a run's folder, or one .ckpt file")
    parser.add_argument("overrides", nargs="*", help=f"key=value; may change: {', '.join(MAY_CHANGE)}")
    asked = parser.parse_args(arguments)
    path = checkpoint_of(asked.run_or_checkpoint)

    with logging_to(None):
        from nin.checkpoints import files as checkpoint_files
        from nin.training import experiment

        checkpoint = checkpoint_files.read(path)
        settings = apply_overrides(checkpoint_files.settings_of(checkpoint, path), asked.overrides, MAY_CHANGE)
        prepare(settings.data)
        metrics, confusion = experiment.evaluate(settings, checkpoint)
    print(
        f"{path}: {settings.model.name}, {settings.data.name} at {settings.data.image_size}x{settings.data.image_size}"
    )
    print_test(metrics, confusion)


def checkpoint_of(path: Path) -> Path:
    """The checkpoint that a run's folder is judged by, or ``path`` itself if it is a file.

    Raises:
        UserError: if there is none.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such run or checkpoint; runs are folders in outputs/runs")
    folder = RunFolder(path)
    for checkpoint in (folder.best, folder.last):
        if checkpoint.exists():
            return checkpoint
    raise UserError(f"{path}: no checkpoint in it yet ({folder.best.relative_to(path)}); is it a run's folder?")
