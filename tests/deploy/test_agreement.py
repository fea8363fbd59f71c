"""Every test image: checkpoint, `nin predict`, export and service give the same class and the same probabilities."""

import concurrent.futures
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import nin
from deploy.server import serve
from helpers import nin as run_nin
from nin.commands.eval import evaluate_checkpoint, evaluate_export
from nin.commands.predict import main as predict
from nin.deploy.pipeline import read_checkpoint
from nin.deploy.scoring import load_part


@pytest.fixture(params=["garments", *(pytest.param(name, marks=pytest.mark.long) for name in ("real", "color"))])
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A run's folder, its export, and the folder of its data set."""
    if request.param == "garments":
        return tuple(map(request.getfixturevalue, ("run_folder", "export", "data_root")))
    if request.param == "color":
        run = request.getfixturevalue("color_run")
        root = run.parents[2] / "photos"
    else:
        run, root = tmp_path / "outputs" / "runs" / "real", request.getfixturevalue("real_root")
        overrides = ["experiment=cpu", "trainer=cpu", "threads=1", "trainer.max_epochs=1", "name=real"]
        overrides += ["trainer.limit_train_batches=100"]
        done = run_nin("train", *overrides, cwd=tmp_path, NIN_DATA=str(root))
        assert done.returncode == 0, done.stderr
    done = run_nin("export", run, "--out", tmp_path / "model.onnx", f"data.root={root}", cwd=run.parents[2])
    assert done.returncode == 0, done.stderr
    return run, tmp_path / "model.onnx", root


def test_all_test_images_have_one_class_and_one_set_of_probabilities(
    trained: tuple[Path, Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, export, root = trained
    checkpoint = run / "checkpoints" / "best.ckpt"
    overrides = [f"data.root={root}"]
    float32 = ["trainer=cpu", "trainer.precision=32-true", "trainer.limit_test_batches=1.0"]
    settings, _, confusion = evaluate_checkpoint(checkpoint, [*overrides, *float32], [])
    assert np.array_equal(evaluate_export(export, overrides)[2], confusion)

    mapped, labels = load_part(settings, "test")
    images = mapped[:]
    module, _, description = read_checkpoint(checkpoint)
    with torch.no_grad():
        pixels = torch.tensor(images).reshape(*images.shape[:3], -1).permute(0, 3, 1, 2) / 255
        expected = np.concatenate([module.predict_logits(part).softmax(-1).numpy() for part in pixels.split(128)])
    assert len(expected) == confusion.sum() >= 210
    assert len(set(expected.argmax(1))) > 2
    assert np.array_equal(confusion_of(labels, expected), confusion)

    files = image_files(images, root, tmp_path / "files")
    found = {"export": nin.load(export).predict(images)}
    for name, network in (("nin predict", run), ("nin predict of the export", export)):
        capfd.readouterr()
        assert predict([str(network), *map(str, files), "--json"]) == 0
        found[name] = from_json(json.loads(capfd.readouterr().out), description.class_names)
    with serve(export) as server, concurrent.futures.ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda file: server.request("POST", "/predict", file.read_bytes()), files))
        assert {status for status, _, _ in answers} == {200}
        found["service"] = from_json([answer for _, answer, _ in answers], description.class_names)
    for name, probabilities in found.items():
        assert np.array_equal(probabilities.argmax(1), expected.argmax(1)), name
        np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-5, err_msg=name)


def confusion_of(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    confusion = np.zeros((probabilities.shape[1],) * 2, int)
    np.add.at(confusion, (labels, probabilities.argmax(1)), 1)
    return confusion


def image_files(images: np.ndarray, root: Path, folder: Path) -> list[Path]:
    """The files of the test images: the data set's own, or PNG files of its arrays."""
    if (root / "test").is_dir():
        return sorted((root / "test").glob("*/*.png"))
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:05}.png")
    return sorted(folder.iterdir())


def from_json(rows: list[dict[str, Any]], class_names: list[str]) -> np.ndarray:
    """Probabilities ``(images, classes)``, after the check that the class of each row is the most probable one."""
    assert all(row["class"] == max(row["probabilities"], key=row["probabilities"].get) for row in rows)
    return np.array([[row["probabilities"][name] for name in class_names] for row in rows])
