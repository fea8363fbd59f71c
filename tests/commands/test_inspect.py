import logging
import re
import sys
from pathlib import Path

import pytest

from nin import cli


def cells(output: str) -> dict[str, list[str]]:
    """The tables' rows by their first cell; of several with the same name the last."""
    rows = (re.split(r"\s{2,}", line.strip()) for line in output.splitlines() if line.strip())
    return {row[0]: row[1:] for row in rows}


def test_layers_and_comparison_fit_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.run("inspect", []) == 0
    output = capsys.readouterr().out
    rows = cells(output)
    assert output.strip().startswith("nin at 224x224")
    assert rows["NiNBlock"] == ["10 x 5 x 5", "34,790", "869,000", "195"]
    assert rows["AdaptiveAvgPool2d"] == ["10 x 1 x 1", "219"]
    assert rows["total"] == ["1,992,166", "762,297,352"]
    assert rows["vgg"] == ["224x224", "102,760,448", "128,806,154", "7,547,232,256"]
    assert rows["nin"] == ["224x224", "none", "1,992,166", "762,297,352"]
    assert max(map(len, output.splitlines())) <= 80


def test_a_narrow_terminal_cuts_no_number_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    assert cli.run("inspect", []) == 0
    assert "…" not in (output := capsys.readouterr().out)
    assert cells(output)["vgg"] == ["224x224", "102,760,448", "128,806,154", "7,547,232,256"]


def test_overrides_choose_the_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run("inspect", ["model=mlp"]) == 0
    output = capsys.readouterr().out
    assert output.strip().startswith("mlp at 28x28")
    assert "3,256,330" in output
    assert cli.run("inspect", ["model.widths=[96]"]) == 2
    assert "kernel_sizes has 4 entries" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--cfg", "--multirun", "--experiment"])
def test_options_that_do_not_exist_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run("inspect", [option])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"nin inspect: error: unrecognized arguments: {option}\n")


def test_the_users_own_config_dir(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /model: lenet\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    assert cli.run("inspect", ["--config-dir", str(tmp_path), "experiment=mine"]) == 0
    assert capsys.readouterr().out.strip().startswith("lenet at ")
    (tmp_path / "best.yaml").write_text("defaults: [train, {override model: mlp}, _self_]\n")
    assert cli.run("inspect", ["--config-name", "best", "-cd", str(tmp_path), "model.hidden_width=16"]) == 0
    assert capsys.readouterr().out.strip().startswith("mlp at ")
    assert cli.run("inspect", ["--config-dir", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == f"nin inspect: --config-dir {tmp_path / 'nowhere'}: no such folder\n"


@pytest.mark.parametrize(
    ("layers", "counts"),
    [
        ("nn.Sequential(nn.Conv2d(in_channels, 10, 7)), nn.MaxPool2d(22)", ["500", "237,160"]),
        ("nn.Conv2d(in_channels, 10, 7, padding='same'), nn.MaxPool2d(28)", ["500", "384,160"]),
        # After the fully connected layer a window is larger than what is left of a receptive field's positions.
        (
            "nn.Flatten(), nn.Linear(784, 64), nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 10, 7), nn.MaxPool2d(2)",
            ["50,740", "52,136"],
        ),
    ],
    ids=["valid", "same", "unflatten"],
)
def test_no_receptive_field_is_made_up_for_a_network_of_ones_own(
    layers: str,
    counts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "own_layers.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Sequential):\n    def __init__(self, in_channels):\n"
        f"        super().__init__({layers}, nn.Flatten())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_layers", raising=False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "own.yaml").write_text("_target_: own_layers.Net\ninput_size: 28\n")
    assert cli.run("inspect", ["--config-dir", str(tmp_path), "model=own", "data=garments"]) == 0
    output = capsys.readouterr().out
    rows = cells(output)
    assert rows["total"] == counts
    assert next(iter(rows)).startswith("own_layers.Net at 28x28")
    assert any("Conv2d" in name for name in rows)
    assert "receptive field is not known of a network of your own" in output
    assert "vgg" not in rows


def test_a_target_that_is_no_class_is_one_message(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("hydra.utils"), "level", logging.NOTSET)  # restored after the test
    logging.getLogger("hydra.utils").manager._clear_cache()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "resnet.yaml").write_text("_target_: torchvision.models.resnet18\ninput_size: 32\n")
    assert cli.run("inspect", ["--config-dir", str(tmp_path), "model=resnet"]) == 2
    message = "model._target_=torchvision.models.resnet18: is no class; write one that calls it"
    assert capsys.readouterr().err == f"nin inspect: {message}\n"
    assert caplog.text == ""  # of Hydra, which raises what it logs
