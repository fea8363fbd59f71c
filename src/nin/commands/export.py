"""``nin export RUN_OR_CHECKPOINT``: a file for deployment, checked against the checkpoint on the whole test set."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, TaskProgressColumn, TextColumn

from nin.commands.options import add_allow_option, expand_path
from nin.config.schema import UserError
from nin.runs.console import Console, format_path, log_to, open_progress
from nin.runs.files import require_no_link
from nin.runs.imports import lightning_imports

if TYPE_CHECKING:
    from nin.deploy.export import Exporter

FORMATS = ("onnx", "pt2", "triton")


def main(arguments: list[str]) -> int:
    args = parse_arguments(arguments)
    checkpoint, out = choose_files(args)
    stderr_console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    with log_to(None), open_progress(stderr_console, *columns) as progress:
        with lightning_imports():
            from nin.deploy.export import Exporter, ExportError

        bar = progress.add_task("loading", total=None)
        exporter = Exporter(
            checkpoint,
            lambda what, done, all_: progress.update(bar, description=what, completed=done, total=all_),
            args.overrides,
            args.allow,
        )
        try:
            return export(exporter, out, args.format, args.int8)
        except ExportError as error:
            stderr_console.print(f"nin export: {error}", soft_wrap=True)
            return 1
        except OSError as error:
            raise UserError(f"{out}: can't be written ({error.strerror})") from error


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nin export",
        allow_abbrev=False,
        description="Write a trained network with its preprocessing: uint8 images of any size in, probabilities and "
        "score maps out. The file is kept only if it classifies every test image as the checkpoint does.",
        epilog="example: nin export outputs/runs/first --int8",
    )
    parser.add_argument(
        "run_or_checkpoint",
        metavar="RUN_OR_CHECKPOINT",
        type=Path,
        help="a run's folder (its best.ckpt is exported), or a .ckpt file",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="onnx",
        help="onnx (default): for nin predict, nin eval, nin serve and every ONNX runtime; pt2: torch.export and an "
        "AOTInductor package for C++; triton: a model repository for Triton or KServe",
    )
    parser.add_argument(
        "--int8", action="store_true", help="also a file in int8, if it loses at most 0.003 of the accuracy"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], help="where the data set is: data.root=…, data.cache=…, data.mirrors=…"
    )
    add_allow_option(parser)
    parser.add_argument(
        "--out",
        type=expand_path,
        help="the file, or triton's folder; default: in export/ of the run, or beside the .ckpt file",
    )
    args = parser.parse_intermixed_args(arguments)
    if args.int8 and args.format != "onnx":
        raise UserError(f"--int8: quantizes ONNX files; leave out --format {args.format}")
    return args


def choose_files(args: argparse.Namespace) -> tuple[Path, Path]:
    """The checkpoint to export, and the file to write, or triton's folder.

    Raises:
        UserError: if there is no checkpoint, or the file must not be written.
    """
    from nin.deploy.loading import default_export, find_checkpoint, is_export

    if is_export(args.run_or_checkpoint):
        raise UserError(f"{args.run_or_checkpoint}: is an export already; nin predict, nin eval and nin serve take it")
    checkpoint = find_checkpoint(args.run_or_checkpoint, "a .ckpt file")
    suffix = {"onnx": ".onnx", "pt2": ".pt2", "triton": ""}[args.format]
    default = default_export(args.run_or_checkpoint, suffix)
    out = args.out or (default if suffix else default.with_name("triton"))
    if suffix and out.suffix != suffix:
        raise UserError(f"--out {out}: the name must end in {suffix}")
    if args.run_or_checkpoint.is_dir() and args.out is None:  # the run may come from elsewhere
        for path in (out.parent, *out.parent.rglob("*")):
            require_no_link(path)
    return checkpoint, out


def export(exporter: "Exporter", out: Path, kind: str, int8: bool) -> int:
    """Writes the file in the format ``kind``, and prints what was measured; returns the exit status."""
    if kind == "onnx":
        return _export_onnx(exporter, out, int8)
    if kind == "pt2":
        from nin.deploy.compiled import export_pt2

        for path, what in export_pt2(exporter, out):
            print(f"{format_path(path)}: {path.stat().st_size / 1e6:.2f} MB; {what}")
    else:
        from nin.deploy.triton import export_triton

        repository = format_path(export_triton(exporter, out).parent)
        option = shlex.quote(f"--model-repository={repository}")
        print(f"{repository}: a model repository; start Triton with {option}")
    return 0


def _export_onnx(exporter: "Exporter", out: Path, int8: bool) -> int:
    from nin.deploy.export import ExportError

    found = exporter.export_onnx(out).more["check"]
    print(
        f"{format_path(out)}: {out.stat().st_size / 1e6:.2f} MB; {found['images']:,} test images classified as by the "
        f"checkpoint, {found['accuracy']:.4f} right; probabilities differ by at most {found['largest_difference']:.1e}"
    )
    path = out.with_suffix(".int8.onnx")
    earlier = f"{format_path(path)}: is of an earlier export, perhaps with other weights" if path.exists() else ""
    if not int8:
        if earlier:
            print(f"{earlier}; --int8 writes it again", file=sys.stderr)
        return 0
    try:
        measured = exporter.export_int8(out, path)
    except ExportError as error:
        print(f"nin export: {error}", file=sys.stderr)
        if earlier:
            print(f"{earlier}; remove it", file=sys.stderr)
        return 1
    sizes, rates, accuracy = measured["bytes"], measured["images_per_second"], measured["accuracy"]
    print(
        f"{format_path(path)}: {sizes['int8'] / 1e6:.2f} MB (float: {sizes['float'] / 1e6:.2f}), {rates['int8']:,.0f} "
        f"images/s (float: {rates['float']:,.0f}), {accuracy['int8']:.4f} right (float: {accuracy['float']:.4f})"
    )
    return 0
