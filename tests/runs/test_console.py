"""The commands that a run prints work as printed."""

import sys
from pathlib import Path

import pytest

from nin.runs import console


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
