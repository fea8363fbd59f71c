import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers import ENVIRONMENT, SMALL, put_job
from nin import cli
from nin.config.schema import UserError
from nin.runs.folder import RunClaimedError, RunFolder
from nin.sweeps import signals, workers
from nin.sweeps.jobs import write_requested_jobs
from nin.system.processes import StoppedError, StopRequest
from nin.training.request import RunRequest
from nin.training.run import RunFailedError

PROGRAM = r"""
import sys, time
from types import SimpleNamespace
from typing import Any
from nin.sweeps import workers
workers.start_worker()
worker = workers.this_worker()
def job(request):
    worker.stop._parent = -1  # the parent dies
    while request.stop.signum is None:  # as training checks after every batch
        time.sleep(0.01)
    time.sleep(1.5)  # saving takes longer than two checks of the parent
    print("saved \u2026", flush=True)  # not in ASCII
    return {}
workers.execute_run = job
workers.acquire_gpu = lambda *_: None
if sys.argv[1] == "busy":
    worker.run(SimpleNamespace(folder=SimpleNamespace(path=__import__("pathlib").Path("a/b")), stop=None))
time.sleep(100)
"""


@pytest.mark.parametrize(("state", "printed"), [("idle", ""), ("busy", "saved ?\n")])
def test_a_worker_whose_parent_is_gone_saves_and_ends(state: str, printed: str) -> None:
    parent = os.getpid()
    if state == "idle":  # before the worker began
        dead = subprocess.Popen([sys.executable, "-c", ""])
        parent = dead.pid
        dead.wait()
    environment = ENVIRONMENT | {workers.PARENT_VARIABLE: str(parent), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", PROGRAM, state]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert (ended.returncode, ended.stdout) == (143, printed), ended.stderr


def test_a_worker_with_a_parent_is_not_stopped() -> None:
    assert StopRequest(os.getppid()).signum is None
    assert StopRequest().signum is None
    assert StopRequest(-1).signum is not None


def test_a_job_that_another_process_runs_does_not_end_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StopRequest, "listen", lambda self: None)
    monkeypatch.setattr(workers.threading, "Thread", lambda **_: SimpleNamespace(start=lambda: None))
    worker = workers.Worker(os.getppid())
    request = SimpleNamespace(
        folder=RunFolder(tmp_path / "seed=0"), settings=SimpleNamespace(sweep=SimpleNamespace(fail_fast=True))
    )

    def execute(_: RunRequest) -> None:
        raise ended

    monkeypatch.setattr(workers, "execute_run", execute)
    monkeypatch.setattr(workers.os, "kill", lambda pid, signum: signals.append(signum))
    signals: list[int] = []
    ended: Exception = RunClaimedError("process 1 is working on this run")
    with pytest.raises(RunClaimedError):
        worker.run(request)
    assert (worker.has_failed, signals) == (False, [])
    worker.require_running()
    ended = RunFailedError()
    with pytest.raises(RunFailedError):
        worker.run(request)
    assert (worker.has_failed, signals) == (True, [workers.JOB_FAILED_SIGNAL])
    with pytest.raises(RunFailedError):
        worker.require_running()
    worker.stop.signum = signal.SIGTERM
    with pytest.raises(StoppedError):
        worker.require_running()


def test_signals_reach_the_workers_while_jobs_run_and_end_the_sweep_while_none_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handlers: dict[int, Any] = {}
    sent: list[tuple[int, int]] = []
    interrupted: list[bool] = []
    replaced = {
        "signal": SimpleNamespace(
            **vars(signal) | {"signal": handlers.__setitem__, "pthread_sigmask": lambda *_: None}
        ),
        "threading": SimpleNamespace(Thread=lambda **_: SimpleNamespace(start=lambda: None)),
        "resource_tracker": SimpleNamespace(ensure_running=lambda: None),
        "multiprocessing": SimpleNamespace(active_children=lambda: [SimpleNamespace(pid=5)]),  # also without a job
        "os": SimpleNamespace(kill=lambda pid, signum: sent.append((pid, signum))),
        "_thread": SimpleNamespace(interrupt_main=lambda: interrupted.append(True)),
    }
    for name, stand_in in replaced.items():
        monkeypatch.setattr(signals, name, stand_in)
    forwarder = signals.SignalForwarder()
    launch = forwarder.forward_during(lambda jobs, start: handlers[signal.SIGTERM](signal.SIGTERM, None))
    launch([], 0)
    assert (forwarder.stopped_by, sent, interrupted) == (signal.SIGTERM, [(5, signal.SIGTERM)], [])
    with pytest.raises(StoppedError):
        launch([], 1)  # a further batch of jobs
    forwarder = signals.SignalForwarder()
    handlers[signal.SIGTERM](signal.SIGTERM, None)  # as while the best trial is tested
    assert (forwarder.stopped_by, interrupted) == (signal.SIGTERM, [True])


def test_the_time_that_is_left_is_that_of_the_commands_own_jobs(tmp_path: Path) -> None:
    for lr in range(5):  # of an earlier command, two minutes each
        put_job(tmp_path / f"optimizer.lr={lr}", [f"optimizer.lr={lr}"], 0.9, train_seconds=120.0)
    (tmp_path / "optimizer.lr=x").mkdir()  # of other content, as the results of a folder from elsewhere may be
    (tmp_path / "optimizer.lr=x" / "result.json").write_text('{"status": "finished", "train_seconds": "120"}')
    settings: Any = SimpleNamespace(sweep=SimpleNamespace(jobs=4))
    # Of a search, whose jobs have no names before they start, those that were begun earlier are done.
    assert workers._progress(tmp_path / "trial-0001", 1, settings).endswith("(about 6 min of training left)")
    write_requested_jobs(tmp_path, ["optimizer.lr"], {f"optimizer.lr={lr}": [] for lr in (4, 5, 6, 7)})
    progress = workers._progress(tmp_path / "optimizer.lr=4", 0, settings)
    assert progress == "job 1 of 4: optimizer.lr=4 (about 6 min of training left)"
    write_requested_jobs(tmp_path, ["optimizer.lr"], {f"optimizer.lr={lr}": [] for lr in range(4)})  # all finished
    assert workers._progress(tmp_path / "optimizer.lr=3", 3, settings) == "job 4 of 4: optimizer.lr=3"


def test_a_job_whose_own_config_is_refused_says_why(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(config: object) -> None:
        raise UserError("seed: not today")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workers, "validate", refuse)
    small = [*SMALL, f"data.root={data_root}", "name=s", "seed=0,1"]
    for more, count in (([], 2), (["sweep.fail_fast=true"], 1)):
        assert cli.run("train", ["-m", *small, *more]) == (1 if count == 2 else 2)
        assert capfd.readouterr().err.count("nin train: seed: not today\n") == count
