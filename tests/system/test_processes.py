import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from nin.config.schema import Settings, UserError
from nin.system import processes

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*RANKS, "MASTER_ADDR", "SLURM_NNODES", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", RANKS)
def test_a_rank_left_in_the_environment_does_not_change_a_run_of_one_process(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    assert processes.global_rank(settings().trainer) == 0
    assert name not in os.environ


def test_several_processes_have_the_rank_of_the_environment(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    two = settings().trainer.model_copy(update={"strategy": "ddp", "devices": 2})
    assert processes.global_rank(two) == 3
    assert os.environ["RANK"] == "3"


def test_torchrun_starts_as_many_processes_as_there_are_devices(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    ddp = settings("trainer=ddp", "trainer.num_nodes=2").trainer
    for devices in (2, "2", [0, 3]):
        processes.require_matching_start(ddp.model_copy(update={"devices": devices}))
    for devices in ("auto", 4, [0]):
        wrong = re.escape(f"trainer.devices={devices}: torchrun started 2 processes on this machine; add trainer.d")
        with pytest.raises(UserError, match=wrong):
            processes.require_matching_start(ddp.model_copy(update={"devices": devices}))


def test_nodes_that_nothing_starts_are_not_waited_for(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    two_nodes = settings().trainer.model_copy(update={"num_nodes": 2})
    with pytest.raises(UserError, match=r"^trainer.num_nodes=2: this process was started on one node only; start it"):
        processes.require_matching_start(two_nodes)
    for name, value in (("MASTER_ADDR", "node-0"), ("SLURM_NNODES", "2")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            processes.require_matching_start(two_nodes)


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
    processes.StoppedError(signal.SIGUSR1).requeue()
    assert scontrol.read_text() == "requeue 7\n"
    assert capsys.readouterr().err == "SLURM job 7 is requeued\n"
    (scontrol.parent / "status").write_text("1")
    processes.StoppedError(signal.SIGUSR1).requeue()
    assert capsys.readouterr().err.startswith("SLURM job 7 could not be requeued (")


def test_a_container_may_lack_slurms_programs(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    processes.StoppedError(signal.SIGUSR1).requeue()
    message = "SLURM job 7 could not be requeued (scontrol: No such file or directory)\n"
    assert capsys.readouterr().err == message
    assert not processes.is_requeued()


def test_a_job_that_was_stopped_otherwise_is_not_requeued(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        processes.StoppedError(signum).requeue()
    monkeypatch.setenv("SLURM_PROCID", "1")  # rank 0 does it
    processes.StoppedError(signal.SIGUSR1).requeue()
    assert not scontrol.exists()


@pytest.mark.parametrize(
    ("answer", "requeued"),
    [("JobState=PENDING", True), ("JobState=RUNNING", False), ("JobState=CANCELLED", False), ("", False)],
)
def test_slurm_reports_whether_a_job_will_run_again(scontrol: Path, answer: str, requeued: bool) -> None:
    (scontrol.parent / "answer").write_text(f"JobId=7 {answer} Reason=None")
    assert processes.is_requeued() is requeued
    assert scontrol.read_text() == "show job 7\n"


@pytest.mark.parametrize(
    ("variables", "signum"),
    [
        ({"SLURM_JOB_ID": "7"}, signal.SIGUSR1),
        ({"SUBMITIT_EXECUTOR": "slurm"}, signal.SIGUSR2),
        ({"SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_PREEMPT_SIGNAL": "HUP"}, signal.SIGHUP),
        ({}, signal.SIGTERM),
    ],
)
def test_the_signal_of_a_batch_system_requests_a_stop(
    variables: dict[str, str], signum: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SUBMITIT_EXECUTOR", "SUBMITIT_PREEMPT_SIGNAL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = signal.signal(signum, signal.SIG_IGN)  # in case nothing listens
    try:
        with processes.StopRequest() as stop:
            signal.raise_signal(signum)
            assert stop.signum == signum
        assert signal.getsignal(signum) is signal.SIG_IGN
    finally:
        signal.signal(signum, before)
