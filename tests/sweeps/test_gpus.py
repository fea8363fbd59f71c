import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock

from nin.config.schema import Settings, UserError
from nin.sweeps import gpus
from nin.sweeps.gpus import acquire_gpu, share_gpus
from nin.system.processes import StopRequest


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("NIN_GPUS", "")  # removed again after the test
    monkeypatch.delenv("NIN_GPUS")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(("requested", "jobs"), [(-1, 2), (8, 2), (2, 2), (1, 1)])
def test_one_job_per_gpu(settings: Callable[..., Settings], requested: int, jobs: int) -> None:
    launcher = SimpleNamespace(n_jobs=requested)
    share_gpus(launcher, [settings("trainer.accelerator=cpu"), settings("trainer.accelerator=auto")])
    assert (launcher.n_jobs, os.environ["NIN_GPUS"]) == (jobs, "0,1")


def test_only_the_visible_gpus_are_shared(settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7,")
    launcher = SimpleNamespace(n_jobs=-1)
    share_gpus(launcher, [settings("trainer.accelerator=cpu"), settings("trainer.accelerator=auto")])
    assert (launcher.n_jobs, os.environ["NIN_GPUS"]) == (2, "4,GPU-7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")  # from another machine; torch finds two
    share_gpus(launcher, [settings("trainer.accelerator=auto")])
    assert (launcher.n_jobs, os.environ["NIN_GPUS"]) == (2, "0,1")


def test_a_gpu_is_not_requested_by_its_number_where_each_job_sees_one_only(settings: Callable[..., Settings]) -> None:
    jobs = [settings("trainer.accelerator=gpu", "trainer.devices=[1]")]
    with pytest.raises(UserError, match=r"trainer.devices=\[1\]: with hydra/launcher=joblib .*CUDA_VISIBLE_DEVICES"):
        share_gpus(SimpleNamespace(n_jobs=-1), jobs)
    share_gpus(SimpleNamespace(n_jobs=1), jobs)  # in the sweep's own process, which sees all of them
    share_gpus(SimpleNamespace(n_jobs=-1), [settings("trainer.accelerator=gpu", "trainer.devices=[0]")])


def test_jobs_on_the_cpu_share_nothing(settings: Callable[..., Settings]) -> None:
    launcher = SimpleNamespace(n_jobs=-1)
    share_gpus(launcher, [settings("trainer.accelerator=cpu")])
    assert (launcher.n_jobs, "NIN_GPUS" in os.environ) == (-1, False)
    share_gpus(launcher, [settings("trainer.accelerator=cpu"), settings("trainer.accelerator=auto")])
    assert (launcher.n_jobs, os.environ["NIN_GPUS"]) == (2, "0,1")


def test_without_shared_gpus_a_job_takes_none(tmp_path: Path) -> None:
    assert acquire_gpu(tmp_path, StopRequest()) is None
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.fixture
def in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, FileLock]:
    """The locks of both shared GPUs, held as by other jobs."""
    monkeypatch.setenv("NIN_GPUS", "3,4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    locks = {gpu: FileLock(tmp_path / f".gpu-{gpu}.lock") for gpu in ("3", "4")}
    for lock in locks.values():
        lock.acquire()
    return locks


def test_a_job_waits_for_a_free_gpu_and_sees_no_other(
    in_use: dict[str, FileLock], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        assert len(waits) < 4
        if len(waits) == 3:
            in_use["4"].release()

    monkeypatch.setattr(gpus, "time", SimpleNamespace(sleep=sleep))
    lock = acquire_gpu(tmp_path, StopRequest())
    assert lock is not None
    assert lock.is_locked
    assert (os.environ["CUDA_VISIBLE_DEVICES"], len(waits)) == ("4", 3)


def test_a_job_that_is_stopped_while_it_waits_takes_no_gpu(
    in_use: dict[str, FileLock], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopRequest()

    def sleep(seconds: float) -> None:
        assert stop.signum is None
        stop.signum = 15
        in_use["4"].release()

    monkeypatch.setattr(gpus, "time", SimpleNamespace(sleep=sleep))
    assert acquire_gpu(tmp_path, stop) is None
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,4"
