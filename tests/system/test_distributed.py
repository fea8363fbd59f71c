import os
from collections.abc import Callable

import pytest

from nin.config.schema import Settings, UserError
from nin.system import distributed

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
    assert distributed.global_rank(settings().trainer) == 0
    assert name not in os.environ


def test_several_processes_have_the_rank_of_the_environment(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    two = settings().trainer.model_copy(update={"strategy": "ddp", "devices": 2})
    assert distributed.global_rank(two) == 3
    assert os.environ["RANK"] == "3"


def test_nodes_that_nothing_starts_are_not_waited_for(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    two_nodes = settings().trainer.model_copy(update={"num_nodes": 2})
    with pytest.raises(UserError, match=r"^trainer.num_nodes=2: this process was started on one node only; start it"):
        distributed.require_matching_start(two_nodes)
    for name, value in (("MASTER_ADDR", "node-0"), ("SLURM_NNODES", "2")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            distributed.require_matching_start(two_nodes)
