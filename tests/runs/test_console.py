import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nin.runs.console import tolerate_output_errors


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's /dev/full")
@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("output", [closed_pipe, full_disk])
def test_output_that_can_not_be_written_is_ignored(
    monkeypatch: pytest.MonkeyPatch, output: Callable[[], int], name: str
) -> None:
    with os.fdopen(output(), "w") as stream:
        monkeypatch.setattr(sys, name, stream)
        tolerate_output_errors()
        for _ in range(3):
            print("x" * 10_000, file=getattr(sys, name), flush=True)


@pytest.mark.parametrize(("encoding", "written"), [("ascii", b"? ? x\n"), ("latin-1", b"? \xe9 x\n")])
def test_characters_that_the_encoding_lacks_are_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, encoding: str, written: bytes
) -> None:
    with (tmp_path / "out").open("w", encoding=encoding) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        tolerate_output_errors()
        print("… é x", flush=True)
    assert (tmp_path / "out").read_bytes() == written


def test_a_stream_without_a_file_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", None)
    tolerate_output_errors()
    assert sys.stdout is stream
    assert sys.stderr is None
