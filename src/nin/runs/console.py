"""The output of a run, to the terminal and to nin.log."""

import contextlib
import io
import logging
import os
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import rich.console
from rich.progress import Progress, ProgressColumn

from nin.config.errors import printable_lines
from nin.config.keys import split_override
from nin.runs.imports import route_lightning_logs

# Warnings that Lightning, torch and Hydra raise in every run of this project, and that a user can do nothing about.
_KNOWN_WARNINGS = (
    # The files in conf/hydra/launcher have the names of the launchers' schemas, which fill in the other keys.
    r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 with torch 2.15
    r"GPU available but not used",  # with trainer=cpu, and in `nin bench`, which measures the overhead on the CPU
    r"TensorFloat32 tensor cores for float32",  # raised by torch.compile, also where the network computes in bfloat16
    r"The `srun` command is available on your system but is not used",  # on a login node, and in a job of one process
    r"Glyph \d+ .* missing from",  # matplotlib's own fonts lack the characters of many languages
    # `MetricsLogger` also logs at the end of every epoch, however short the epoch is.
    r"The number of training batches \(\d+\) is smaller than the logging interval",
)


def silence_known_warnings() -> None:
    """Silences warnings of Lightning and Hydra that appear in every run of this project."""
    for message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # `get_class` raises what it logs


class _ConsoleHandler(logging.StreamHandler):
    """Writes to the current standard error, which a progress bar replaces while it is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        """The message without control characters, which a name in a file from elsewhere may have."""
        return printable_lines(super().format(record))


class _LogFile(logging.FileHandler):
    """nin.log. If the disk is full, that is printed once, and the run continues."""

    is_reported = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.is_reported:
            self.is_reported = True
            print(f"WARNING: {self.baseFilename}: can't be written ({error.strerror})", file=sys.stderr)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closing tries again to write what could not be written
            super().close()


@contextlib.contextmanager
def log_to(file: Path | None, label: str = "") -> Iterator[None]:
    """Sends log records and warnings, except the known ones, to ``file``; warnings and errors also to standard error.

    Args:
        label: a prefix of every line on standard error, where several runs print at the same time.
    """
    console = _ConsoleHandler()
    console.setLevel(logging.WARNING)
    console.setFormatter(logging.Formatter(f"{label}%(levelname)s: %(message)s"))
    handlers: list[logging.Handler] = [console]
    if file:
        handlers.append(_LogFile(file, encoding="utf-8"))
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    previous = root.handlers, root.level
    root.handlers = handlers
    root.setLevel(logging.INFO)
    route_lightning_logs()
    silence_known_warnings()  # a notebook calls this without a command, which would have done so
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.handlers, root.level = previous
        for handler in handlers:
            handler.close()


class Console(rich.console.Console):
    """rich's console; it prints text as it is, without colored numbers, ``[bold]`` and ``:smile:``.

    A closed pipe ends the command as it does after ``print``, with exit status 141 instead of 1.
    """

    def __init__(self, **options: Any):
        super().__init__(**{"highlight": False, "markup": False, "emoji": False} | options)

    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError, for `nin.cli`


def open_progress(console: Console, *columns: ProgressColumn, is_hidden: bool = False) -> Progress:
    """A progress bar on ``console`` if that is a terminal, otherwise one that is disabled; it is removed at its end.

    Args:
        columns: rich's default ones, if there are none.
    """
    return Progress(
        *columns,
        console=console,
        transient=True,
        disable=is_hidden or not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),  # if it is a file, its lines must not appear in the terminal
    )


class _TolerantFile(io.FileIO):
    """A file that ignores a closed pipe and a full disk: a run continues although nobody reads its output."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def tolerate_output_errors() -> None:
    """Makes standard output and standard error ignore write errors and characters that their encoding lacks.

    A run continues to its result although nobody reads its output any more (``| head``) or the disk is full.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        with contextlib.suppress(AttributeError, OSError, ValueError):  # replaced, closed, or without a file
            file = io.BufferedWriter(_TolerantFile(stream.fileno(), "w", closefd=False))
            by_line = name == "stderr" or stream.isatty()  # as Python does
            tolerant = io.TextIOWrapper(file, stream.encoding, errors="replace", line_buffering=by_line)
            stream.flush()
            setattr(sys, name, tolerant)


def format_for_output(text: str) -> str:
    """``text`` with escapes for what the encoding of standard output lacks: ``?`` would make two names equal."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def format_path(path: Path) -> str:
    """``path`` relative to the working directory if it lies in it, otherwise absolute."""
    path, working_directory = path.resolve(), Path.cwd()
    return str(path.relative_to(working_directory)) if path.is_relative_to(working_directory) else str(path)


def format_name_override(name: str) -> str:
    """The override that gives a run or a sweep this name; Hydra would read ``name=a,b`` as two values."""
    return f"name={name}" if re.fullmatch(r"[\w.@+-]+", name) else f'name="{name}"'


def format_repeated_command(name: str, overrides: Sequence[str]) -> str:
    """How to run the command with ``overrides`` again: without a ``name=…`` it would start another run or sweep."""
    is_named = any(split_override(word)[0] == "name" for word in overrides)
    return "the same command" if is_named else f"the same command with {shlex.quote(format_name_override(name))}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown, in which ``|`` would end a cell."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


def tensorboard_command(folder: Path) -> str:
    """The command that opens TensorBoard on a folder of runs, with a program that the user's shell finds.

    TensorBoard names a run by its folder, relative to the one that it is opened on: a run's own folder is only ".".
    ``uv run`` adds the environment to PATH for its own process only; then the program is given by its path.
    """
    program = Path(sys.executable).with_name("tensorboard")
    if "UV_RUN_RECURSION_DEPTH" not in os.environ and shutil.which("tensorboard"):
        words = ["tensorboard"]
    elif "builds-v0" in program.parts:  # of `uv run --with`, which removes it at its end
        words = ["python3", "-m", "uv", "run", "tensorboard"]
    elif program.exists():
        words = [str(program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program)]
    else:
        words = [sys.executable, "-m", "tensorboard.main"]
    return shlex.join([*words, "--logdir", format_path(folder)])
