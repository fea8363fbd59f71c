"""Decodes the images of a folder in parallel processes, with a progress bar. Imports no torch."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nin.config.errors import printable
from nin.config.schema import FolderData, UserError
from nin.data.chunks import Chunk, decode_chunk
from nin.data.decoding import silence_pillow
from nin.data.folder import PARTS, Listing

_CHUNK = 256  # images per chunk, at most
_CHUNK_PIXELS = 2**24  # the same in pixels: 64 MiB in each process
_FEW_BYTES = 2 * 2**20  # files of fewer bytes in all are decoded sooner than a process starts
_SAMPLE = 32  # images from which the number of channels is guessed


def decode_folder(data: FolderData, listing: Listing, images: Path) -> tuple[int, dict[str, str]]:
    """Decodes all files of ``listing`` into ``images``; returns the number of channels and the broken files."""
    silence_pillow()
    files = [file for part in PARTS for file in listing.files.get(part, [])]
    names = ["" if file.name in listing.broken else file.name for file in files]
    processes = 1 if sum(file.size for file in files) < _FEW_BYTES else count_cores()
    train = len(listing.files.get("train", files))  # these decide whether the images have color
    if data.channels != "auto":
        return data.channels, decode_files(data, names, images, data.channels, 0, processes)[0]
    sample = [name for name in names[:train][:: max(1, train // _SAMPLE)] if name]
    if not decode_chunk(Chunk(data.root, sample, None, 0, data.stored_size, data.fit, 3, len(sample)))[1]:
        broken, color = decode_files(data, names, images, 1, train, processes)
        if not color:
            return 1, broken
    return 3, decode_files(data, names, images, 3, 0, processes)[0]


def decode_files(
    data: FolderData, names: list[str], images: Path, channels: int, color_until: int, processes: int
) -> tuple[dict[str, str], bool]:
    """Decodes files in parallel processes, each of which writes its rows of ``images``.

    Args:
        names: empty ones are left out.
        color_until: the first this many images are searched for color, if ``channels`` is 1.

    Returns:
        The broken files with the reason, and whether any image has color.
    """
    with images.open("wb") as file:
        file.truncate(len(names) * data.stored_size**2 * channels)
    # Several chunks for each process, so that all end at about the same time.
    length = min(_CHUNK, 1 + len(names) // (8 * processes), max(1, _CHUNK_PIXELS // data.stored_size**2))
    chunks = [
        Chunk(
            data.root, names[start : start + length], images, start, data.stored_size, data.fit, channels,
            max(0, color_until - start),
        )
        for start in range(0, len(names), length)
    ]  # fmt: skip
    broken: dict[str, str] = {}
    color = False
    with _progress(len(names), data.root) as advance, contextlib.closing(_run(chunks, processes)) as results:
        for chunk, errors, found in results:
            broken |= errors
            color |= found
            advance(len(chunk.names))
            if found and channels == 1:
                break  # all are decoded again with 3 channels
    return broken, color


def count_cores() -> int:
    """The number of CPU cores that this process may use, of those that the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(chunks: list[Chunk], processes: int) -> Generator[tuple[Chunk, dict[str, str], bool], None, None]:
    """Yields each chunk with its errors and whether it has color, in their order."""
    if processes == 1:
        for chunk in chunks:
            yield chunk, *decode_chunk(chunk)
        return
    # Spawned, and not forked: this process has threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_start_worker)
    try:
        for chunk, decoded in zip(chunks, pool.map(decode_chunk, chunks), strict=True):
            yield chunk, *decoded
    except BrokenProcessPool as error:
        raise UserError(
            "a process that decodes images was killed, or could not start: there may be too little memory; a Python "
            "program of yours that uses nin needs if __name__ == '__main__': around what it does"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Hides Pillow's warnings; the process ends when its parent does, and leaves Ctrl-C to it."""
    silence_pillow()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts all processes
    parent: Any = multiprocessing.parent_process()

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


@contextlib.contextmanager
def _progress(total: int, root: str) -> Iterator[Any]:
    """Yields a function that advances a progress bar on standard error."""
    console = Console(stderr=True)
    if not console.is_terminal:
        if total:  # an empty folder is reported as an error
            print(f"decoding {total:,} images of {printable(root)} (once)", file=sys.stderr, flush=True)
        yield lambda count: None
        return
    columns = (TextColumn("decoding images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)
