"""What the documents state is so: the page of plain PyTorch, and the links and commands of README and docs/."""

import hashlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import torch

from helpers import nin

ROOT = Path(__file__).parents[1]
PLAIN_LOOP = ROOT / "docs" / "plain_loop.py"
# Two epochs of ten batches, the tenth with 12 images: a new order and an incomplete batch are part of the comparison.
EXPERIMENT = {"image_size": 67, "batch_size": 32, "val_size": 9700}


def _plain_loop() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plain_loop", PLAIN_LOOP)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _speed_off() -> list[str]:
    """The overrides that docs/architecture.md gives for the comparison."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    command = text.split("    nin train name=plain ", 1)[1].split("\n\n", 1)[0]
    return command.replace("\\", " ").split()


def test_the_plain_loop_ends_with_the_weights_of_nin_train(data_root: Path, tmp_path: Path) -> None:
    overrides = [f"data.{key}={value}" for key, value in EXPERIMENT.items()]
    limits = ["trainer.max_epochs=2", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
    run = nin(
        "train", "name=plain", *_speed_off(), "data=garments", f"data.root={data_root}", "threads=1", "trainer=cpu",
        *overrides, *limits, "callbacks=none", "logger=none", cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "outputs/runs/plain/result.json").read_text())
    assert result["steps"] == 20

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            network = _plain_loop().train(str(data_root / "Garments" / "raw"), **EXPERIMENT, epochs=2)
    finally:
        torch.set_num_threads(threads)
    weights = b"".join(weight.numpy().tobytes() for weight in network.state_dict().values())
    assert hashlib.sha256(weights).hexdigest() == result["weights_sha256"]


def test_the_plain_loop_is_one_page_that_imports_only_the_reading_of_images() -> None:
    lines = PLAIN_LOOP.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 80
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    assert [line for line in imports if "nin" in line] == ["from nin.data.idx import read_images, read_labels"]
    assert not [line for line in imports if "lightning" in line or "hydra" in line]
