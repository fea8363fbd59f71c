"""Exports for Triton and for C++, and the programs of docs/deploy.md."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import nin
from nin.config.schema import UserError
from nin.deploy.images import ImageForm

PAGE = Path(__file__).parents[2] / "docs" / "deploy.md"


def block(language: str, containing: str) -> str:
    """A code block of the page."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (found,) = [content for content in blocks if containing in content]
    return found


@pytest.mark.long
def test_tritons_own_protobuf_reads_the_model_repository(run_folder: Path, data_root: Path, tmp_path: Path) -> None:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as model_config

    from nin.commands.export import main

    root = f"data.root={data_root}"
    assert main([str(run_folder), "--format", "triton", "--out", str(tmp_path / "repository"), root]) == 0
    folder = tmp_path / "repository" / "small"
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == ["1/model.onnx", "config.pbtxt", "labels.txt"]
    config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config.ModelConfig())
    network = nin.load(folder / "1" / "model.onnx")
    assert (config.name, config.backend, config.max_batch_size) == ("small", "onnxruntime", 128)
    assert config.HasField("dynamic_batching")
    (images,) = config.input
    assert (images.name, images.data_type, list(images.dims)) == ("images", model_config.TYPE_UINT8, [-1, -1])
    scores = network.score(np.zeros((1, 28, 28), np.uint8), maps=True)
    assert {output.name: tuple(output.dims) for output in config.output} == {
        "probabilities": scores.probabilities.shape[1:],
        "logits": scores.logits.shape[1:],
        "maps": scores.maps.shape[1:],
    }
    assert config.output[0].label_filename == "labels.txt"
    assert (folder / "labels.txt").read_text().splitlines() == network.description.class_names
    assert config.parameters["weights_sha256"].string_value == network.description.more["weights_sha256"]


def test_each_of_tritons_labels_is_one_line(tmp_path: Path) -> None:
    from nin.deploy.triton import export_triton

    known = SimpleNamespace(class_names=["ant", "bee\nhive"], channels=1, more={"run": "a", "weights_sha256": "0"})
    exporter: Any = SimpleNamespace(description=known, export_onnx=lambda _: known, map_size=lambda: None)
    labels = (export_triton(exporter, tmp_path) / "labels.txt").read_text()
    assert labels == "ant\nbee\\nhive\n"


def test_a_run_does_not_replace_another_one_in_a_model_repository(tmp_path: Path) -> None:
    from nin.deploy.triton import export_triton

    for run in ("x=1", "x=1", "x 1"):
        known = SimpleNamespace(class_names=["ant"], channels=1, more={"run": run, "weights_sha256": "0"})
        exporter: Any = SimpleNamespace(
            description=known, export_onnx=lambda _, known=known: known, map_size=lambda: None
        )
        if run == "x=1":
            assert export_triton(exporter, tmp_path) == tmp_path / "x_1"  # the same run is exported again
            continue
        with pytest.raises(UserError, match=r"x_1: has another run than x 1; give another folder with --out"):
            export_triton(exporter, tmp_path)


def test_the_pages_onnxruntime_program_runs_with_onnxruntime_and_numpy_alone(export: Path) -> None:
    program = block("python", "InferenceSession")
    assert set(re.findall(r"^(?:import|from) (\w+)", program, re.MULTILINE)) == {"json", "numpy", "onnxruntime"}
    blocked = "import sys\nsys.modules.update(dict.fromkeys(('nin', 'torch', 'PIL', 'onnx')))\n"
    run = subprocess.run(
        [sys.executable, "-c", blocked + program], cwd=export.parent, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() in nin.load(export).description.class_names


def test_the_batch_of_a_network_that_takes_its_length_is_dynamic_too() -> None:
    import torch

    from nin.deploy.compiled import trace_program
    from nin.deploy.pipeline import Pipeline

    class Flat(torch.nn.Linear):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images.reshape(len(images), -1))

    pipeline = Pipeline(Flat(16, 3), channels=1, stored_size=4, image_size=4, test_time_flip=False).eval()
    images = torch.randint(256, (5, 9, 8), dtype=torch.uint8)
    for found, expected in zip(trace_program(pipeline).module()(images), pipeline(images), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++") or not Path("/usr/include/png.h").exists(), reason="no g++ or no libpng")
@pytest.mark.parametrize("kind", ["gray", "color"])
def test_the_pages_cpp_program_classifies_as_the_checkpoint(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch

    from nin.commands.export import main

    program = block("cpp", "AOTIModelPackageLoader")
    if kind == "gray":
        run_folder, image = request.getfixturevalue("run_folder"), request.getfixturevalue("test_images")[7]
        root = request.getfixturevalue("data_root")
    else:
        run_folder = request.getfixturevalue("color_run")
        root = run_folder.parents[2] / "photos"
        image = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
        # The changes that the program's comment names.
        program = program.replace("= PNG_FORMAT_GRAY;", "= PNG_FORMAT_RGB;")
        program = program.replace("{1, png.height, png.width}", "{1, png.height, png.width, 3}")
    capfd.readouterr()
    assert main([str(run_folder), "--format", "pt2", "--out", str(tmp_path / "model.pt2"), f"data.root={root}"]) == 0
    assert "torch" not in capfd.readouterr().err  # no warnings of the compiler
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.export.pt2", "model.pt2"]
    stored = {"nin.json": ""}
    torch.export.load(tmp_path / "model.export.pt2", extra_files=stored)
    assert json.loads(stored["nin.json"])["more"]["check"]["largest_difference"] <= 1e-5
    (tmp_path / "classify.cpp").write_text(program)
    Image.fromarray(image).save(tmp_path / "shirt.png")
    compile_and_run = block("bash", "g++").replace("python3", sys.executable)
    run = subprocess.run(["bash", "-ec", compile_and_run], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    network = nin.load(run_folder)
    found = [line.rsplit(" ", 1) for line in run.stdout.splitlines()]
    probabilities = network.predict([image])[0]
    best = np.argsort(-probabilities)[:3]
    assert [name for name, _ in found] == [network.description.class_names[i] for i in best]
    assert [float(p) for _, p in found] == pytest.approx(probabilities[best].tolist(), abs=1e-5)


@pytest.mark.long
def test_the_model_repository_of_a_color_network_takes_color_images(color_run: Path, tmp_path: Path) -> None:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as model_config

    from nin.commands.export import main

    root = f"data.root={color_run.parents[2] / 'photos'}"
    assert main([str(color_run), "--format", "triton", "--out", str(tmp_path / "repository"), root]) == 0
    folder = tmp_path / "repository" / "small"
    config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config.ModelConfig())
    assert list(config.input[0].dims) == [-1, -1, 3]
    assert [list(output.dims) for output in config.output[:2]] == [[3], [3]]
    assert (folder / "labels.txt").read_text().split() == ["blue", "green", "red"]
    assert nin.load(folder / "1" / "model.onnx").predict(np.zeros((1, 50, 40, 3), np.uint8)).shape == (1, 3)


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("shape", [(60, 41, 3), (34, 56, 3), (56, 34, 3)])
def test_the_pages_lines_for_photos_bring_them_to_the_stored_size_as_nin_predict_does(
    fit: str, shape: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    exif = Image.Exif()
    exif[274] = 6  # lies on its side
    photo.save("photo.png", exif=exif)
    metadata = SimpleNamespace(custom_metadata_map={"nin": '{"stored_size": 28}'})
    names = {"json": json, "np": np, "session": SimpleNamespace(get_modelmeta=lambda: metadata)}
    exec(block("python", "ImageOps.fit"), names)
    if fit == "pad":
        exec(block("python", "ImageOps.contain"), names)
    assert np.array_equal(names["images"], [ImageForm(3, 28, fit).decode(Path("photo.png"))])


def test_openapi_is_valid_json_and_names_the_routes_of_the_service() -> None:
    from nin.deploy import service

    api = json.loads((service.PAGES / "openapi.json").read_text())
    pages = {"/openapi.json", "/docs", "/"}
    source = Path(service.__file__).read_text()
    assert set(re.findall(r'Route\("(.*?)"', source)) - pages == set(api["paths"])
