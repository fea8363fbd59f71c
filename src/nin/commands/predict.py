"""``nin predict RUN_OR_CHECKPOINT_OR_EXPORT IMAGES…``: class probabilities of the user's own images."""

import argparse
import csv
import itertools
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size
from rich.progress import BarColumn, TextColumn

from nin.commands.options import add_allow_option, expand_path, require_writable_folder
from nin.config.errors import printable
from nin.config.schema import UserError
from nin.runs.console import Console, format_for_output, log_to, open_progress
from nin.runs.imports import lightning_imports

if TYPE_CHECKING:
    import numpy as np

    from nin.data.decoding import ImageError
    from nin.deploy.trained import Scores, TrainedNetwork

    # An image's name, and its probabilities (classes,) or what is wrong with it.
    _Row = tuple[str, np.ndarray | None, str]

# Images are read and scored so many at a time.
WINDOW = 256


def main(arguments: list[str]) -> int:
    args = parse_arguments(arguments)
    with log_to(None):
        from nin.deploy.loading import load

        with lightning_imports():
            network = load(args.network, args.allow)
        return predict(network, args)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nin predict",
        allow_abbrev=False,
        description="Print class probabilities of images. They are preprocessed as the test images were: gray or color "
        "as the network needs them, resized, and, if the run used data.test_time_flip, classified together with their "
        "flipped copies.",
        epilog="example: nin predict outputs/runs/first shirt.jpg photos/ --maps maps",
    )
    parser.add_argument(
        "network",
        metavar="RUN_OR_CHECKPOINT_OR_EXPORT",
        type=Path,
        help="a run's folder, a .ckpt file or an exported .onnx file",
    )
    parser.add_argument("images", type=Path, nargs="+", help="image files, folders, IDX files, or - for standard input")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="classes in the table; default: 3")
    parser.add_argument(
        "--invert", action="store_true", help="for dark objects on a light background: swap light and dark"
    )
    parser.add_argument(
        "--maps", type=expand_path, metavar="DIR", help="write a picture of each image's score maps there"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="all probabilities, as a JSON array")
    form.add_argument("--csv", action="store_true", help="all probabilities, one row per image")
    add_allow_option(parser)
    args = parser.parse_intermixed_args(arguments)  # images may follow an option
    if args.top < 1:
        raise UserError(f"--top {args.top}: must be 1 or more")
    if missing := [str(p) for p in args.images if str(p) != "-" and not p.exists()]:
        if not args.network.exists():
            missing.insert(0, str(args.network))
        raise UserError(f"{', '.join(missing)}: no such file or folder")
    if args.maps:
        require_writable_folder(f"--maps {args.maps}", args.maps)
        _require_other_folder(args.maps, args.images)
    return args


def _require_other_folder(maps: Path, images: list[Path]) -> None:
    """Raises UserError if a picture could replace an image, or be classified the next time.

    It could if ``maps`` is the folder of one of the files in ``images``, or within one of the folders there.
    """
    place = maps.resolve()
    for path in (path for path in images if str(path) != "-"):
        folder = path.resolve() if path.is_dir() else path.parent.resolve()
        if place == folder or (path.is_dir() and place.is_relative_to(folder)):
            raise UserError(f"--maps {maps}: has the images of {path}, or is in that folder; give another folder")


def predict(network: "TrainedNetwork", args: argparse.Namespace) -> int:
    """Classifies the images, prints the rows and writes the pictures of score maps; returns the exit status.

    Raises:
        UserError: if there are no images.
    """
    from nin.data.decoding import silence_pillow
    from nin.deploy.images import LeftOut, has_light_border, iterate

    silence_pillow()

    if args.maps:
        network.require_maps()
    description = network.description
    classes = description.class_names
    names = _MapNames(args.maps) if args.maps else None
    found, broken, light, left_out = 0, 0, 0, LeftOut()
    stderr_console = Console(stderr=True, soft_wrap=True)

    def score_all() -> "Iterator[_Row]":
        nonlocal found, broken, light
        images = iterate(args.images, replace(description.form, invert=args.invert), sys.stdin.buffer, left_out)
        for found, (name, image, scores) in enumerate(_score_each(network, images, maps=bool(names)), start=1):
            if scores is None:
                broken += 1
                stderr_console.print(f"nin predict: {printable(name)}: {printable(str(image))}")
                yield name, None, str(image)
            else:
                light += has_light_border(image)
                yield name, scores.probabilities, ""
                if names:
                    _write_picture(names.next(name), image, classes, scores, args.top)
            progress.update(bar, completed=found)
        if not found:
            files = "; " * bool(left_out.files) + _describe_files(left_out.files)
            raise UserError(f"{', '.join(map(str, args.images))}: no images there{files}")

    columns = TextColumn("{task.completed} images"), BarColumn(pulse_style="blue")
    # Rows of a program's format that appear on the same terminal show the progress.
    is_hidden = (args.json or args.csv) and sys.stdout.isatty()
    with open_progress(stderr_console, *columns, is_hidden=is_hidden) as progress:
        bar = progress.add_task("", total=None)
        if args.json:
            _print_json(score_all(), classes)
        elif args.csv:
            _print_csv(score_all(), classes)
        else:
            _print_table(score_all(), classes, args.top)
    if not args.invert and light > 0 and description.light_on_dark:
        stderr_console.print(
            f"nin predict: images with a light border: {light} of {found - broken}; the network was trained on light "
            "objects on a dark background: if they are dark on light, add --invert"
        )
    if names and found > broken:
        stderr_console.print(f"score maps: {printable(str(args.maps))}, a picture of each image")
    for folder in left_out.folders:
        stderr_console.print(f"nin predict: {printable(folder)}: no images there")
    if left_out.files:
        stderr_console.print(f"nin predict: {_describe_files(left_out.files)}")
    if broken:
        stderr_console.print(f"nin predict: {broken} of {found} could not be read")
    return 1 if broken or left_out.folders else 0


def _describe_files(left_out: list[str]) -> str:
    if not left_out:
        return ""
    more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
    return f"files without the suffix of an image are left out: {', '.join(map(printable, left_out[:3]))}{more}"


def _score_each(
    network: "TrainedNetwork", images: "Iterator[tuple[str, np.ndarray | ImageError]]", maps: bool
) -> "Iterator[tuple[str, Any, Scores | None]]":
    """Yields the name, the image and its scores without the batch dimension; None for an ImageError."""
    from nin.data.decoding import ImageError

    for window in _windows(images):
        arrays = [image for _, image in window if not isinstance(image, ImageError)]
        scores = iter(network.score(arrays, maps).each())
        for name, image in window:
            yield name, image, None if isinstance(image, ImageError) else next(scores)


def _windows(images: "Iterator[tuple[str, np.ndarray | ImageError]]") -> "Iterator[list[Any]]":
    """Lists of images that fit in memory together."""
    window, pixels = [], 0
    for name, image in images:
        window.append((name, image))
        pixels += getattr(image, "size", 0)
        if len(window) == WINDOW or pixels > 50_000_000:
            yield window
            window, pixels = [], 0
    if window:
        yield window


def _write_picture(path: Path, image: Any, class_names: list[str], scores: "Scores", top: int) -> None:
    from nin.deploy.map_figures import write_maps

    assert scores.maps is not None
    try:
        write_maps(path, image, class_names, scores.probabilities, scores.logits, scores.maps, top)
    except OSError as error:
        raise UserError(f"--maps {path.parent}: can't be written ({error.strerror})") from error


class _MapNames:
    """One PNG file per image, named after it, in one folder."""

    def __init__(self, folder: Path):
        self.folder, self.used = folder, set[str]()

    def next(self, name: str) -> Path:
        # The suffix is left out; the name of an IDX file's image ends in [index]. Of long names the last 200 bytes are
        # kept: a file system allows 255, also for the temporary file.
        stem = name if name.endswith("]") else str(Path(name).with_suffix(""))
        plain = re.sub(r"[^\w.+=,-]+", "_", stem).strip("_.").encode()[-200:].decode(errors="ignore") or "image"
        chosen, i = plain, 2
        while chosen in self.used:
            chosen, i = f"{plain}-{i}", i + 1
        self.used.add(chosen)
        return self.folder / f"{chosen}.png"


def _print_table(rows: "Iterator[_Row]", class_names: list[str], top: int) -> None:
    """A table for people, printed as the images are done; errors are on standard error."""
    # An export may come from elsewhere, and a terminal would obey escape sequences in its class names.
    classes, top = [printable(name) for name in class_names], min(top, len(class_names))
    lines: list[tuple[str, ...]] = [("image", "class", *(f"{i + 2}." for i in range(top - 1)))]
    # A class's cell ends in a probability of 6 characters.
    widths = [len("image"), *[max(map(cell_len, classes)) + 7] * top]
    # A terminal would wrap a longer line; for a program the names are complete.
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    room = max(columns - sum(widths[1:]) - 2 * top, 20)
    scored = ((name, probabilities) for name, probabilities, _ in rows if probabilities is not None)
    while window := list(itertools.islice(scored, WINDOW)):
        for name, probabilities in window:
            best = (-probabilities).argsort(kind="stable")[:top]
            lines.append((_keep_end(printable(name), room), *(f"{classes[i]} {probabilities[i]:.4f}" for i in best)))
        widths[0] = max(widths[0], *(cell_len(line[0]) for line in lines))
        print("\n".join("  ".join(map(set_cell_size, line, widths)).rstrip() for line in lines))
        lines = []


def _keep_end(name: str, width: int) -> str:
    """``name`` without its beginning if it has more than ``width`` cells of a terminal."""
    start = 0
    while cell_len(name[start:]) + (start > 0) > width:
        start += 1
    return f"…{name[start:]}" if start else name


def _print_json(rows: "Iterator[_Row]", class_names: list[str]) -> None:
    """One array, an object per image, written as the images are done."""
    before = "["
    for name, probabilities, error in rows:
        row: dict[str, Any] = {"image": name, "error": error}
        if probabilities is not None:
            by_class = {c: round(float(p), 9) for c, p in zip(class_names, probabilities, strict=True)}
            row = {"image": name, "class": class_names[int(probabilities.argmax())], "probabilities": by_class}
        text = json.dumps(row, ensure_ascii=False)
        if format_for_output(text) != text:
            text = json.dumps(row)  # with escapes for what is not ASCII
        sys.stdout.write(f"{before}\n{text}")
        before = ","
    sys.stdout.write("\n]\n")


def _print_csv(rows: "Iterator[_Row]", class_names: list[str]) -> None:
    """A row per image: name, class, its probability, then each class's; errors are on standard error."""
    writer = csv.writer(
        SimpleNamespace(write=lambda text: sys.stdout.write(format_for_output(text))), lineterminator="\n"
    )
    writer.writerow(["image", "class", "probability", *class_names])
    for name, probabilities, _ in rows:
        if probabilities is not None:
            values, best = [round(float(p), 9) for p in probabilities], int(probabilities.argmax())
            writer.writerow([name, class_names[best], values[best], *values])
