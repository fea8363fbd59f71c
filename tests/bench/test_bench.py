import json
from pathlib import Path

import pytest

from nin.commands import bench


def test_what_is_measured_is_told_and_written(
    tmp_path: Path, data_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    asked = ["model=nin_small", "model.widths=[4,8]", "data.batch_size=64", "trainer=cpu", f"data.root={data_root}"]
    # A bench may go through all images several times.
    asked += ["data.val_size=9900", "trainer.log_every_n_steps=2"]
    bench.main([*asked, "--seconds", "0.2", "--rounds", "1", "--out", str(out)])
    found = json.loads(out.read_text())
    assert set(found["rates"]) == {"training", "notebooks", "data", "scoring", "matrix product"}
    assert min(found["rates"].values()) > 0
    assert set(found["milliseconds_a_step"]) == {"plain loop", "bare Trainer", "nin train"}
    # Forward, and backward for the weights and, but for the first layer, for what came in.
    assert 2.5 < found["operations"]["training"] / found["operations"]["scoring"] < 3
    shown = capsys.readouterr().out
    assert "the notebooks' loop" in shown
    assert f"written: {out}" in shown
    # Memory: what stays does not hang on the batch, what is kept for the backward pass does.
    small, _, large = found["memory"].values()
    assert list(found["memory"]) == ["16", "32", "64"]
    assert (small["weights"], small["gradients"]) == (large["weights"], large["gradients"])
    assert large["activations"] == pytest.approx(4 * small["activations"], rel=0.05)
    assert small["gradients"] == 4 * sum_of_parameters()


def sum_of_parameters() -> int:
    from nin import networks
    from nin.config.composition import compose_settings

    return sum(
        p.numel() for p in networks.build(compose_settings(["model=nin_small", "model.widths=[4,8]"])).parameters()
    )


def test_operations_are_the_notebooks_networks() -> None:
    from nin.bench.turns import operations
    from nin.config.composition import compose_settings

    counted = operations(compose_settings([]))
    assert (round(counted["scoring"] / 1e9, 2), round(counted["training"] / 1e9, 2)) == (1.52, 4.51)
    mirrored = operations(compose_settings(["data.test_time_flip=true"]))
    assert mirrored == {"scoring": 2 * counted["scoring"], "training": counted["training"]}


def test_weights_that_a_linear_layer_keeps_are_no_activations(data_root: Path) -> None:
    from nin.bench.memory import memory
    from nin.config.composition import compose_settings

    asked = ["data=garments", f"data.root={data_root}", "trainer=cpu", "trainer.limit_val_batches=0", "threads=1"]
    found = memory(compose_settings([*asked, "model=lenet", "optimizer.lr=0.01"]), 2, print)
    assert found["weights"] > 4 * 400 * 120
    assert found["activations"] < 2 * 4 * (784 + 6 * 784 * 3 + 16 * 100 * 3 + 400 + 120 * 2 + 84 * 2 + 10 * 2)
