import os
import signal
from pathlib import Path

import pytest

from nin.system.signals import StoppedError, is_requeued


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for SLURM's program; the file has the arguments of its calls."""
    program, calls = tmp_path / "scontrol", tmp_path / "calls"
    program.write_text(f'#!/bin/sh\necho "$@" >> {calls}\ncat {tmp_path}/answer\nexit $(cat {tmp_path}/status)\n')
    program.chmod(0o755)
    (tmp_path / "status").write_text("0")
    (tmp_path / "answer").write_text("")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_a_job_that_slurm_warned_is_requeued(scontrol: Path, capsys: pytest.CaptureFixture[str]) -> None:
    StoppedError(signal.SIGUSR1).requeue()
    assert scontrol.read_text() == "requeue 7\n"
    assert capsys.readouterr().err == "SLURM job 7 is requeued\n"
    (scontrol.parent / "status").write_text("1")
    StoppedError(signal.SIGUSR1).requeue()
    assert capsys.readouterr().err.startswith("SLURM job 7 could not be requeued (")


def test_a_job_that_was_stopped_otherwise_is_not_requeued(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        StoppedError(signum).requeue()
    monkeypatch.setenv("SLURM_PROCID", "1")  # rank 0 does it
    StoppedError(signal.SIGUSR1).requeue()
    assert not scontrol.exists()


@pytest.mark.parametrize(
    ("answer", "requeued"),
    [("JobState=PENDING", True), ("JobState=RUNNING", False), ("JobState=CANCELLED", False), ("", False)],
)
def test_slurm_tells_whether_a_job_will_run_again(scontrol: Path, answer: str, requeued: bool) -> None:
    (scontrol.parent / "answer").write_text(f"JobId=7 {answer} Reason=None")
    assert is_requeued() is requeued
    assert scontrol.read_text() == "show job 7\n"
