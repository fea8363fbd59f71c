import os
import subprocess
import sys

import pytest

from helpers import ENVIRONMENT
from nin.sweeps import workers
from nin.system.processes import StopRequest

PROGRAM = r"""
import sys, time
from types import SimpleNamespace
from nin.sweeps import workers
workers.start_worker()
worker = workers.this_worker()
def job(request):
    worker.stop._parent = -1  # the parent dies
    while request.stop.signum is None:  # as training asks after every batch
        time.sleep(0.01)
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
