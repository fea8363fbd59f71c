"""``nin eval RUN_OR_CHECKPOINT [overrides]``: test metrics of a run or of one checkpoint."""

import argparse
from pathlib import Path

from nin.config.composition import apply_overrides
from nin.config.schema import UserError
from nin.config.trust import ignore_stored_paths
from nin.data.sources import prepare
from nin.runs.console import log_to, silence_known_warnings, tolerate_output_errors
from nin.runs.folder import RunFolder
from nin.runs.results import print_test

MAY_CHANGE = ("data.root", "data.mirrors", "data.batch_size", "trainer", "threads", "speed")


def main(arguments: list[str]) -> None:
    args = parse_arguments(arguments)
    tolerate_output_errors()
    silence_known_warnings()
    path = find_checkpoint(args.run_or_checkpoint)
    with log_to(None):
        from nin.checkpoints.files import read, settings_of
        from nin.training.experiment import evaluate

        checkpoint = read(path)
        settings = apply_overrides(ignore_stored_paths(settings_of(checkpoint, path)), args.overrides, MAY_CHANGE)
        prepare(settings.data)
        metrics, confusion = evaluate(settings, checkpoint)
    size = settings.data.image_size
    print(f"{path}: {settings.model.name}, {settings.data.name} at {size}x{size}")
    print_test(metrics, confusion)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nin eval",
        allow_abbrev=False,
        description="Test loss and accuracy, also per class, and the confusion matrix. Of a run's folder, best.ckpt is "
        "tested, as in result.json; before the end of the first epoch, last.ckpt.",
        epilog="example: nin eval outputs/runs/first trainer=cpu",
    )
    parser.add_argument("run_or_checkpoint", type=Path, help="a run's folder, or a .ckpt file")
    parser.add_argument("overrides", nargs="*", help=f"key=value; may change: {', '.join(MAY_CHANGE)}")
    return parser.parse_args(arguments)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that represents a run's folder, or ``path`` itself if it is a file.

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
