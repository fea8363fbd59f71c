"""The examples of docs/extending.md: its files are written as they stand there, and its commands run."""

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import nin
from helpers import SMALL
from nin.commands import eval as evaluation
from nin.commands import export as exporting
from nin.commands import train
from pictures import write_folder

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
FEW_STEPS = [word for word in SMALL if word.startswith("trainer.") and "max_epochs" not in word]
NARROW = [word for word in SMALL if word.startswith("model.")]
COMMANDS = re.findall(r"^    (?:PYTHONPATH=\. )?nin (train .*)$", PAGE.replace("\\\n", ""), re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the files of the page."""
    written = []
    for block in re.finditer(r"```(?:python|yaml)\n(.*?)```", PAGE, re.DOTALL):
        # The last file that is named before a block of code is the one that it shows.
        path = tmp_path / re.findall(r"`([\w/]+\.(?:py|yaml))`", PAGE[: block.start()])[-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block[1])
        written.append(path)
    assert len(set(written)) == 11
    write_folder(tmp_path / "photos", {"train": 12, "test": 4}, size=40)
    monkeypatch.setenv("NIN_DATA", str(data_root))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("my_net", "my_data", "my_loss", "my_callbacks"):
        sys.modules.pop(name, None)


def run(command: str) -> dict[str, object]:
    short = ["trainer=cpu", "trainer.max_epochs=1", "data.batch_size=8", *FEW_STEPS]
    if "data=" not in command:
        short.append("data=garments")
    if base := re.search(r"weights=outputs/runs/(\w+)", command):
        run(next(other for other in COMMANDS if f"name={base[1]}" in other))
    if "experiment=quickstart" in command and "model=" not in command:
        short += NARROW
    if not re.search(r"(model|data)=(tiny|stripes|folder)", command):
        short.append("~callbacks.images")  # its figures take as long as the run, and are the same in all of these
    keys = [word.partition("=")[0] for word in short]
    arguments = [word for word in shlex.split(command)[1:] if word.partition("=")[0] not in keys]
    assert train.main([*arguments, *short]) == 0
    name = next(word for word in arguments if word.startswith("name=")).removeprefix("name=")
    return json.loads(Path("outputs/runs", name, "result.json").read_text())


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: re.search(r"name=(\w+)", command)[1])
def test_the_commands_of_the_page_run(
    folder: Path, command: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    result = run(command)
    assert result["status"] == "finished"
    if "model=tiny" in command:
        with pytest.raises(Exception, match=r"model._target_=my_net.TinyNet: .* add --allow my_net"):
            evaluation.main(["outputs/runs/tiny"])
        evaluation.main(["--allow", "my_net", "outputs/runs/tiny", *FEW_STEPS])
        assert "my_net.TinyNet" in capsys.readouterr().out
        image = [np.zeros((28, 28), np.uint8)]
        with pytest.raises(Exception, match="add --allow my_net"):
            nin.load("outputs/runs/tiny")
        expected = nin.load("outputs/runs/tiny", allow=["my_net"]).predict(image)
        assert exporting.main(["outputs/runs/tiny", "--allow", "my_net", f"data.root={os.environ['NIN_DATA']}"]) == 0
        assert "own code has changed" not in "".join(capsys.readouterr())
        with (folder / "my_net.py").open("a") as file:
            file.write("# other\n")
        changed = f"own code has changed since the run was trained: {folder}/my_net.py (its SHA-256 begins with "
        evaluation.main(["--allow", "my_net", "outputs/runs/tiny", *FEW_STEPS])
        assert f"WARNING: outputs/runs/tiny/checkpoints/best.ckpt: {changed}" in capsys.readouterr().err
        nin.load("outputs/runs/tiny", allow=["my_net"])
        assert f"best.ckpt: {changed}" in caplog.messages[-1]
        run(command)
        assert f"WARNING: {changed}" in capsys.readouterr().out
        # The export needs no class of yours.
        np.testing.assert_allclose(nin.load("outputs/runs/tiny/export/model.onnx").predict(image), expected, atol=1e-6)
    if "loss=weighted" in command:
        # The loss is needed for training alone.
        (folder / "my_loss.py").unlink()
        del sys.modules["my_loss"]
        evaluation.main(["outputs/runs/weighted", *FEW_STEPS])
        assert f"test/loss {result['metrics']['test/loss']:.4f}" in capsys.readouterr().out
        assert nin.load("outputs/runs/weighted").predict([np.zeros((28, 28), np.uint8)]).shape == (1, 10)
        assert "my_loss" not in sys.modules
    if "data=stripes" in command:
        assert list(result["metrics"]["test/acc_by_class"]) == ["horizontal", "vertical"]
    if "CSVLogger" in command:
        assert Path("outputs/runs/log/lightning_logs/version_0/metrics.csv").exists()
    if "PrintSteps" in command:
        assert "steps 6" in capsys.readouterr().out


def test_the_page_has_an_example_of_each(folder: Path) -> None:
    names = {re.search(r"name=(\w+)", command)[1] for command in COMMANDS}
    models, others = {"tiny", "clothes", "tuned"}, {"stripes", "weighted", "rmsprop", "steps", "log"}
    assert names == {"mine", "photos", "ants"} | models | others
