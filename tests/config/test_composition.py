from pathlib import Path

import pytest

from nin import networks
from nin.config.composition import apply_overrides, collect_errors, compose_config, compose_settings
from nin.config.schema import UserError, project_conf
from nin.config.validation import validate

OPTIONS = sorted(p.relative_to(project_conf()).with_suffix("") for p in project_conf().glob("*/*.yaml"))


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_config_file_composes_and_builds_its_network(option: Path) -> None:
    network = networks.build(validate(compose_config([f"{option.parent}={option.name}"])))
    assert sum(p.numel() for p in network.parameters()) > 0


def test_hydras_mistakes_and_ours_are_told_together() -> None:
    told = collect_errors(Exception(), ["optimizer.lrr=1", "model=nin_smal", "seed=-1", "a=[", "model.dropout=2"])
    assert [mistake.split(";")[0] for mistake in told.errors] == [
        "model=nin_smal: no such model",
        "a=[: not of the form key=value (no viable alternative at input '[')",
        "optimizer.lrr=1: no such key",
        "seed=-1: must be greater than or equal to 0",
        "model.dropout=2: must be less than 1",
    ]
    assert "did you mean nin_small? There are: alexnet, lenet, nin, nin_small, vgg" in str(told)


def test_a_key_that_only_another_model_has() -> None:
    with pytest.raises(UserError, match=r"model.dropout=0.1: no such key; there are: name, input_size, init$"):
        compose_settings(["model=lenet", "model.dropout=0.1"])


def test_the_users_own_config_dir(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\noptimizer:\n  lr: 0.7\n")
    assert compose_settings(["--config-dir", str(tmp_path), "experiment=mine"]).optimizer.lr == 0.7


def test_an_earlier_runs_settings_change_only_where_they_may() -> None:
    earlier = validate(compose_config(["model=nin_small", "trainer=cpu", "optimizer.lr=0.3"]))
    changed = apply_overrides(
        earlier, ["trainer=auto", "trainer.max_epochs=3", "data.root=/x"], ("trainer", "data.root")
    )
    assert (changed.trainer.accelerator, changed.trainer.max_epochs, changed.data.root) == ("auto", 3, "/x")
    assert (changed.model, changed.optimizer) == (earlier.model, earlier.optimizer)
    assert "dead_units" in earlier.callbacks
    assert "dead_units" not in apply_overrides(earlier, ["~callbacks.dead_units"], ("callbacks",)).callbacks
    without = validate(compose_config(["model=nin_small", "callbacks=none"]))
    assert apply_overrides(without, ["~callbacks.dead_units"], ("callbacks",)).callbacks == {}
    with pytest.raises(UserError, match=r"optimizer.lr=1: can't be changed here; these can: trainer, data.root"):
        apply_overrides(earlier, ["optimizer.lr=1"], ("trainer", "data.root"))
    with pytest.raises(UserError, match="no such key"):
        apply_overrides(earlier, ["trainer.max_epoch=1"], ("trainer",))
