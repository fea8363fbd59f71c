"""The ``nin`` program: finds the command, runs it, and turns an error into a message and an exit status.

Nothing heavy is imported before a command needs it.
"""

import contextlib
import difflib
import errno
import importlib
import os
import re
import shutil
import sys
import textwrap
import traceback
from typing import TextIO

COMMANDS = {
    "train": "train a network, then test the best checkpoint once; with -m a sweep",
    "resume": "continue a run as if it had not been interrupted",
    "eval": "test a run, a checkpoint or an exported file",
    "predict": "classify your own images; --maps also draws where each class is recognized",
    "export": "write a file for deployment that includes the preprocessing, and check it on the test set",
    "serve": "serve a trained network over HTTP, with a page to try it",
    "report": "print the table and draw the chart of a sweep, also an unfinished one",
    "inspect": "print a network's layers, parameters and multiply-adds",
    "bench": "measure images per second, compared with the notebooks' loop and a matrix product",
}


def main() -> None:
    """Entry point of ``nin`` and ``python -m nin``."""
    # Processes that are started from here import nothing from the working directory, which may come from elsewhere.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    if sys.stdin is None:  # closed by the caller, as in: nin … <&-
        sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115  # open to the end
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, as in: nin … >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115  # open to the end
        with contextlib.suppress(AttributeError, ValueError):  # replaced or closed
            getattr(sys, name).reconfigure(errors="replace")  # characters that ASCII or Latin-1 lacks
    try:
        try:
            status: str | int | None = dispatch()
        except SystemExit as ended:  # of argparse, whose help is not written yet
            status = ended.code
        sys.stdout.flush()
    except OSError as error:
        # A full disk and a removed working directory are no errors of standard output.
        if not (isinstance(error, BrokenPipeError) or _cannot_write(sys.stdout)):
            raise
        status = 141 if isinstance(error, BrokenPipeError) else 1  # nin report … | head
        if status == 1:
            print(f"nin: standard output can't be written ({error.strerror})", file=sys.stderr)
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # Python flushes both again when it exits
            with contextlib.suppress(OSError):  # replaced by one without a file
                os.dup2(null, stream.fileno())
    sys.exit(status)


def _cannot_write(stream: TextIO) -> bool:
    try:
        # flush() alone may succeed: text that is longer than the buffer is dropped when writing it fails.
        print(file=stream, flush=True)
    except OSError:
        return True
    return False


def dispatch() -> int:
    """Runs the command that the command line names; returns the exit status."""
    name, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if name.startswith("-sc"):
        return complete(name, arguments)
    if name == "help" and arguments[:1] and arguments[0] in COMMANDS:
        name, arguments = arguments[0], ["--help"]
    if name in ("-h", "--help", "help"):
        print(format_usage())
        return 0
    if name == "--version":
        from importlib.metadata import version

        print(f"nin {version('network-in-network')}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        suggestion = f"; did you mean nin {close[0]}?" if close else ""
        print(f"nin: no command '{name}'{suggestion}\n\n{format_usage()}", file=sys.stderr)
        return 2
    return run(name, arguments)


def format_usage() -> str:
    longest, width = max(map(len, COMMANDS)), max(40, shutil.get_terminal_size().columns)
    indent = " " * (longest + len("  nin   "))
    rows = "\n".join(
        textwrap.fill(f"  nin {name:<{longest}}  {purpose}", width, subsequent_indent=indent, break_on_hyphens=False)
        for name, purpose in COMMANDS.items()
    )
    return (
        "Network in Network on Fashion-MNIST as a Lightning + Hydra experiment.\n\n"
        f"{rows}\n\n"
        "Start with:  nin train experiment=quickstart\n"
        "More on each with --help, as in:  nin train --help; the version: nin --version\n"
        "Documentation: README.md and docs/"
    )


def run(name: str, arguments: list[str]) -> int:
    """Runs one command; returns its exit status.

    0: it is done; 1: the work failed; 2: it was refused, because of the command, the data or the machine; 128 and more:
    a signal ended it, as in a shell.
    """
    if sys.platform == "win32":  # no POSIX signals, and no folder can be flushed to disk
        print(f"nin {name}: needs Linux or macOS; on Windows start it in WSL (wsl --install)", file=sys.stderr)
        return 2
    try:
        os.getcwd()  # noqa: PTH109  # pathlib is not imported yet
    except FileNotFoundError:
        print(f"nin {name}: the working directory was removed; change to another one", file=sys.stderr)
        return 2
    try:  # Ctrl-C may come while these are imported
        return _run_command(name, arguments)
    except KeyboardInterrupt:
        return 130


def _run_command(name: str, arguments: list[str]) -> int:
    command = importlib.import_module(f"nin.commands.{name}")
    from nin.config.errors import printable_lines
    from nin.config.schema import UserError
    from nin.runs.console import silence_known_warnings

    silence_known_warnings()
    try:
        return command.main(arguments) or 0
    except UserError as error:
        if error.__cause__ and os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exception(error.__cause__)
        print(f"nin {name}: {printable_lines(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        # Somebody else's run, or a path that no file can have.
        if not (isinstance(error, PermissionError) or error.errno == errno.ENAMETOOLONG):
            raise
        print(f"nin {name}: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        exports = "without torch nin predict, nin eval and nin serve take exported .onnx files only"
        print(f"nin {name}: needs torch and the project's other dependencies; {exports}", file=sys.stderr)
        return 2


def complete(flag: str, arguments: list[str]) -> int:
    """Shell completion: Hydra's own, which expects overrides directly after the program's name."""
    line, point = os.environ.get("COMP_LINE", ""), int(os.environ.get("COMP_POINT", 0))
    if without := re.sub(r"^(\S+\s+)(train|inspect|bench)\s+", r"\1", line):
        os.environ["COMP_LINE"] = without
        os.environ["COMP_POINT"] = str(max(0, point - (len(line) - len(without))))
    if line and without == line:
        *before, begun = re.split(r"\s+", line[:point])
        if len(before) == 1:  # files follow the command, which the shell completes
            print("\n".join(c for c in COMMANDS if c.startswith(begun)))
        return 0
    return run("train", [flag, *arguments])
