"""The name of a run: an experiment's own name stands for the plain experiment only."""

from pathlib import Path

import pytest
from hydra.types import RunMode

from nin.commands.train import compose, open_hydra, parse_arguments


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["experiment=quickstart"], "quickstart"),
        (["experiment=quickstart", "trainer=cpu", "threads=1", "logger=none"], "quickstart"),  # the same experiment
        (["experiment=quickstart", "optimizer.lr=0.01"], "quickstart,optimizer.lr=0.01"),
        (["seed=1", "experiment=quickstart", "optimizer.lr=0.01"], "quickstart,optimizer.lr=0.01,seed=1"),
        (["experiment=quickstart", "trainer.max_epochs=1"], "quickstart,trainer.max_epochs=1"),
        (["experiment=quickstart", "optimizer.lr=0.01", "name=mine"], "mine"),
    ],
)
def test_an_experiment_with_changes_has_a_folder_of_its_own(
    overrides: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with open_hydra() as app:
        config = compose(app, parse_arguments(overrides), RunMode.RUN)
    assert (config.name, config.hydra.run.dir) == (name, f"outputs/runs/{name}")


def test_a_name_that_depends_on_the_time_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    with open_hydra() as app:
        config = compose(app, parse_arguments(["experiment=cpu", "seed=1"]), RunMode.RUN)
    assert config.name in (123, "123")
