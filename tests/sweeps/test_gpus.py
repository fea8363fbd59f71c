import os
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from nin.config.schema import Settings, UserError
from nin.sweeps.gpus import share_gpus


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
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7,6")
    launcher = SimpleNamespace(n_jobs=-1)
    share_gpus(launcher, [settings("trainer.accelerator=cpu"), settings("trainer.accelerator=auto")])
    assert (launcher.n_jobs, os.environ["NIN_GPUS"]) == (3, "4,GPU-7,6")


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
