"""Decodes the images of a folder in parallel processes, with a progress bar. Imports no torch."""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nin.config.schema import FolderData, UserError
from nin.data.decoding import ImageError, convert, has_color, open_image, to_pixels
from nin.data.folder import PARTS, Listing, printable

_CHUNK = 256  # images per task of a process
_SAMPLE = 32  # images from which the number of channels is guessed


def decode_folder(data: FolderData, listing: Listing, images: Path) -> tuple[int, dict[str, str]]:
    """Decodes all files of ``listing`` into ``images``; returns the number of channels and the broken files."""
    files = [file for part in PARTS for file in listing.files.get(part, [])]
    names = [file.name for file in files]
    train = len(listing.files["train"])
    skipped = frozenset(listing.broken)
    if data.channels != "auto":
        return data.channels, decode_files(data, names, skipped, images, data.channels, 0)[0]
    sample = names[:train][:: max(1, train // _SAMPLE)]
    sample = [name for name in sample if name not in skipped]
    task = (data.root, sample, None, 0, data.stored_size, data.fit, 3, len(sample))
    if not decode_chunk(*task)[1]:
        broken, color = decode_files(data, names, skipped, images, 1, train)
        if not color:
            return 1, broken
    return 3, decode_files(data, names, skipped, images, 3, 0)[0]


def decode_files(
    data: FolderData, names: list[str], skipped: frozenset[str], images: Path, channels: int, color_until: int
) -> tuple[dict[str, str], bool]:
    """Decodes files in parallel processes, each of which writes its rows of ``images``.

    Args:
        skipped: names that are not read.
        color_until: the first this many images are searched for color, if ``channels`` is 1.

    Returns:
        The broken files with the reason, and whether any image has color.
    """
    with images.open("wb") as file:
        file.truncate(len(names) * data.stored_size**2 * channels)
    tasks = []
    for start in range(0, len(names), _CHUNK):
        chunk = ["" if name in skipped else name for name in names[start : start + _CHUNK]]
        search = max(0, color_until - start)
        tasks.append((data.root, chunk, images, start, data.stored_size, data.fit, channels, search))
    broken: dict[str, str] = {}
    color = False
    with _progress(len(names), data.root) as advance:
        for count, errors, found in _run(tasks):
            broken |= errors
            color |= found
            advance(count)
            if found and channels == 1:
                break  # all are decoded again with 3 channels
    return broken, color


def _run(tasks: list[tuple[Any, ...]]) -> Iterator[tuple[int, dict[str, str], bool]]:
    """Yields the number of images, the errors and whether there is color for each task, as they end."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if len(tasks) <= 2 or cores == 1:  # starting processes would take longer
        for task in tasks:
            yield len(task[1]), *decode_chunk(*task)
        return
    # Started anew, and not forked: the parent has threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(cores, len(tasks)), context, initializer=_ignore_interrupts)
    try:
        futures = {pool.submit(decode_chunk, *task): len(task[1]) for task in tasks}
        for future in as_completed(futures):
            yield futures[future], *future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that decodes images was killed, or could not start: there may be too little memory; a Python "
            "program of yours that uses nin needs if __name__ == '__main__': around what it does"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    """Ctrl-C interrupts all processes of a terminal; the parent ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def decode_chunk(
    root: str, names: list[str], images: Path | None, start: int, size: int, fit: str, channels: int, search: int
) -> tuple[dict[str, str], bool]:
    """Decodes some files and writes them to ``images`` from row ``start`` on.

    Args:
        names: relative to ``root``; empty ones are left out.
        images: None to write nothing.
        search: the number of images, the first ones, that are searched for color.
    """
    row = size * size * channels
    pixels = np.zeros(len(names) * row, dtype=np.uint8)
    broken, color = {}, False
    for i, name in enumerate(names):
        if not name:
            continue
        try:
            image = to_pixels(open_image(Path(root, name)), size, fit)
        except ImageError as error:
            broken[name] = str(error)
            continue
        color = color or (i < search and has_color(image))
        pixels[i * row : (i + 1) * row] = convert(image, channels).reshape(-1)
    if images is not None:
        with images.open("r+b") as file:
            file.seek(start * row)
            file.write(pixels.data)
    return broken, color


@contextlib.contextmanager
def _progress(total: int, root: str) -> Iterator[Any]:
    """Yields a function that advances a progress bar on standard error."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        print(f"decoding {total:,} images of {printable(root)} (once)", file=sys.stderr, flush=True)
        yield lambda count: None
        return
    columns = (TextColumn("decoding images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)
