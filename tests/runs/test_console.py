import io
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.utils import get_class

from helpers import broken_pipe, full_disk
from nin.runs import console
from nin.runs.console import log_to, tolerate_output_errors


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's /dev/full")
@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("output", [broken_pipe, full_disk])
def test_output_that_can_not_be_written_is_ignored(
    monkeypatch: pytest.MonkeyPatch, output: Callable[[], int], name: str
) -> None:
    with os.fdopen(output(), "w") as stream:
        with pytest.raises(OSError, match=r"Broken pipe|No space left"):
            os.write(stream.fileno(), b"x")
        monkeypatch.setattr(sys, name, stream)
        tolerate_output_errors()
        for _ in range(3):
            print("x" * 10_000, file=getattr(sys, name), flush=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's /dev/full")
def test_a_log_that_can_not_be_written_is_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    with console.log_to(Path("/dev/full")):
        for _ in range(3):
            logging.getLogger("nin").info("a line")
    assert capsys.readouterr().err == "WARNING: /dev/full: can't be written (No space left on device)\n"


@pytest.mark.parametrize(("encoding", "written"), [("ascii", b"? ? x\n"), ("latin-1", b"? \xe9 x\n")])
def test_characters_that_the_encoding_lacks_are_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, encoding: str, written: bytes
) -> None:
    with (tmp_path / "out").open("w", encoding=encoding) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        tolerate_output_errors()
        print("… é x", flush=True)
    assert (tmp_path / "out").read_bytes() == written


def test_an_error_that_hydra_raises_is_not_logged_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("hydra.utils"), "level", logging.NOTSET)  # restored after the test
    logging.getLogger("hydra.utils").manager._clear_cache()
    with warnings.catch_warnings():
        console.silence_known_warnings()
    with pytest.raises(ImportError):
        get_class("no.such.Class")
    assert caplog.text == ""


def test_a_stream_without_a_file_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", None)
    tolerate_output_errors()
    assert sys.stdout is stream
    assert sys.stderr is None


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment in the working directory, whose programs are not on PATH."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "tensorboard"):
        (programs / name).touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH", raising=False)
    return programs


def test_tensorboard_is_named_as_the_shell_finds_it(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("outputs/runs/my run")
    by_path = ".venv/bin/tensorboard --logdir 'outputs/runs/my run'"
    assert console.tensorboard_command(folder) == by_path
    monkeypatch.setenv("PATH", str(environment))  # activated
    assert console.tensorboard_command(folder) == "tensorboard --logdir 'outputs/runs/my run'"
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")  # `uv run` has changed PATH, not the user's shell
    assert console.tensorboard_command(folder) == by_path
    (environment / "tensorboard").unlink()
    assert console.tensorboard_command(folder).startswith(f"{environment}/python -m tensorboard.main --logdir ")
    # `uv run --with` removes its environment at its end.
    monkeypatch.setattr(sys, "executable", "/home/me/.cache/uv/builds-v0/.tmp1/bin/python")
    expected = "python3 -m uv run tensorboard --logdir 'outputs/runs/my run'"
    assert console.tensorboard_command(folder) == expected


def test_control_characters_in_a_warning_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with log_to(None):
        logging.getLogger("nin").warning("%s is missing\nand more", "x\x1b]0;title\x07")
    assert capsys.readouterr().err == "WARNING: x\\x1b]0;title\\x07 is missing\nand more\n"
