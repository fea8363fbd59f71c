"""``nin eval RUN_OR_CHECKPOINT_OR_EXPORT [overrides]``: test metrics of a run, a checkpoint or an export."""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nin.commands.options import add_allow_option, expand_path, require_writable_folder
from nin.config.composition import apply_overrides
from nin.config.keys import split_override
from nin.config.schema import FolderData, Settings, UserError
from nin.config.trust import with_local_root, without_training_parts
from nin.data.sources import describe, prepare, require_same_classes, with_found_root
from nin.deploy.loading import find_checkpoint, is_export
from nin.runs.console import Console, log_to, open_progress, tolerate_output_errors
from nin.runs.folder import RunFolder
from nin.runs.imports import lightning_imports
from nin.runs.results import print_test
from nin.runs.versions import describe_changed_code
from nin.system.devices import require_accelerator

if TYPE_CHECKING:
    from nin.training.callbacks.mistakes import MistakeRecorder

log = logging.getLogger(__name__)

OVERRIDABLE = ("data.root", "data.cache", "data.mirrors", "data.batch_size", "trainer", "threads", "speed")


def main(arguments: list[str]) -> None:
    args = parse_arguments(arguments)
    tolerate_output_errors()
    mistakes = None
    if is_export(args.network):
        if args.wrong:
            raise UserError("--wrong: is for a run or a checkpoint, not for an exported file; give the run's folder")
        path, (settings, metrics, confusion) = args.network, evaluate_export(args.network, args.overrides)
    else:
        path = find_checkpoint(args.network)
        mistakes = _prepare_mistakes(args.wrong) if args.wrong else None
        settings, metrics, confusion = evaluate_checkpoint(path, args.overrides, args.allow, mistakes)
    size = settings.data.image_size
    print(f"{path}: {settings.model.name}, {settings.data.name} at {size}x{size}")
    print_test(metrics, confusion)
    if mistakes:
        mistakes.write(args.wrong)
        print(f"wrongly classified images: {args.wrong}")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nin eval",
        allow_abbrev=False,
        description="Print test loss and accuracy, also per class, and the confusion matrix. For a run's folder, "
        "best.ckpt is tested, as for result.json; before the first epoch has ended, last.ckpt.",
        epilog="example: nin eval outputs/runs/first trainer=cpu",
    )
    parser.add_argument(
        "network",
        metavar="RUN_OR_CHECKPOINT_OR_EXPORT",
        type=Path,
        help="a run's folder, a .ckpt file or an exported .onnx file",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        help=f"key=value; may change: {', '.join(OVERRIDABLE)} (for an exported file only data.… and threads)",
    )
    parser.add_argument(
        "--wrong", metavar="FILE.csv", type=expand_path,
        help="write the wrongly classified images to this file, those with the highest probability first",
    )  # fmt: skip
    add_allow_option(parser)
    return parser.parse_intermixed_args(arguments)  # overrides may follow --allow


def _prepare_mistakes(wrong: Path) -> "MistakeRecorder":
    """Checks before the test that the file ``wrong`` can be written."""
    if wrong.exists() and not wrong.is_file():
        kind = "a folder" if wrong.is_dir() else "a device or a pipe"
        raise UserError(f"--wrong {wrong}: is {kind}; give a file, as in wrong.csv")
    require_writable_folder(f"--wrong {wrong}", wrong.parent)
    with lightning_imports():
        from nin.training.callbacks.mistakes import MistakeRecorder

    return MistakeRecorder()


def evaluate_checkpoint(
    path: Path, overrides: list[str], allowed: list[str], mistakes: "MistakeRecorder | None" = None
) -> tuple[Settings, dict[str, Any], Any]:
    """Tests a checkpoint; returns its settings with the overrides, the test metrics and the confusion matrix.

    Args:
        allowed: modules whose classes the checkpoint may name.
        mistakes: records the wrongly classified images.

    Raises:
        UserError: if the file is no checkpoint, names a class that is not allowed, an override is refused, or the
            accelerator is missing.
    """
    with lightning_imports():
        from nin.checkpoints.files import read, read_checkpoint_settings
        from nin.training.evaluation import evaluate_weights

    with log_to(None):
        checkpoint = read(path)
        stored = with_found_root(without_training_parts(read_checkpoint_settings(checkpoint, path, allowed)))
        settings = apply_overrides(stored, overrides, OVERRIDABLE)
        # A test has one process, in which no batch norm is synchronized.
        require_accelerator(settings.trainer.model_copy(update={"sync_batchnorm": False}))
        prepare(settings.data)
        found = evaluate_weights(settings, checkpoint, mistakes)
        result = RunFolder(path.parent.parent).find_result() if path.parent.name == "checkpoints" else {}
        if changed := describe_changed_code(result, imported_only=True):
            log.warning("%s: %s; it may compute something else now", path, changed)
        return settings, *found


def evaluate_export(path: Path, overrides: list[str]) -> tuple[Settings, dict[str, Any], Any]:
    """The same with onnxruntime, and without torch.

    Raises:
        UserError: if the file is no export, it is not known where its images are, they have other classes, or an
            override is refused.
    """
    from nin.data.splits import warn_of_other_images
    from nin.deploy.onnx_model import load_onnx, read_export_settings
    from nin.deploy.scoring import evaluate_network, load_part

    description = load_onnx(path).description
    stored = with_local_root(without_training_parts(read_export_settings(description, path)))
    # An export names no path of the machine that wrote it, and a folder of images has no default place.
    if isinstance(stored.data, FolderData) and "data.root" not in dict(map(split_override, overrides)):
        raise UserError(f"{path}: its run's images were in a folder; say where they are: data.root=…")
    settings = apply_overrides(stored, overrides, (*(key for key in OVERRIDABLE if key.startswith("data.")), "threads"))
    with log_to(None):
        prepare(settings.data)
        warn_of_other_images(settings.data, description.more.get("images_sha256"))
    images, labels = load_part(settings, "test")
    network = load_onnx(path, settings.threads)
    require_same_classes(describe(settings.data).class_names, network.description.class_names)
    with open_progress(Console(stderr=True)) as progress:
        bar = progress.add_task("testing", total=len(labels))
        metrics, confusion = evaluate_network(
            network, images, labels, lambda done, _: progress.update(bar, completed=done)
        )
    return settings, metrics, confusion
