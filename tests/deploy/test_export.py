"""An export gives what the checkpoint gives, is one self-contained file, and is data only."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import nin
from nin.checkpoints import files as checkpoint_files
from nin.checkpoints.checkpoint_io import AtomicCheckpointIO
from nin.commands import predict, serve
from nin.commands.eval import evaluate_checkpoint, evaluate_export
from nin.config.schema import UserError
from nin.deploy import onnx_model
from nin.deploy.export import Exporter, open_checked
from nin.deploy.onnx_model import load_onnx, metadata_of, open_session
from nin.deploy.scoring import MappedImages, load_part
from pictures import folder_data, write_folder


def test_the_exported_file_gives_the_checkpoints_probabilities_and_maps(
    run_folder: Path, export: Path, test_images: np.ndarray
) -> None:
    expected = nin.load(run_folder).score(test_images, maps=True)
    found = nin.load(export).score(test_images, maps=True)
    np.testing.assert_array_equal(found.probabilities.argmax(1), expected.probabilities.argmax(1))
    np.testing.assert_allclose(found.probabilities, expected.probabilities, rtol=0, atol=1e-5)
    assert found.maps is not None
    np.testing.assert_allclose(found.maps, expected.maps, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.maps.mean((2, 3)), found.logits, rtol=1e-4, atol=1e-4)


def test_an_export_is_computed_by_as_many_threads_as_requested(
    export: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions: list[Any] = []

    def record(path: Path, threads: int | None = None) -> Any:
        sessions.append(open_session(path, threads))
        return sessions[-1]

    monkeypatch.setattr(onnx_model, "open_session", record)
    monkeypatch.setattr("nin.deploy.server.run", lambda *_: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    used = []
    for compute in (
        lambda: serve.main([str(export), "--port", "0", "--threads", "2"]),
        lambda: serve.main([str(export), "--port", "0"]),
        lambda: evaluate_export(export, [f"data.root={data_root}", "threads=2"]),
        lambda: load_onnx(export),
    ):
        compute()
        used.append(sessions[-1].get_session_options().intra_op_num_threads)
    assert used == [2, 3, 2, 0]  # 0: onnxruntime's default


def test_places_that_a_checkpoint_names_are_not_followed(
    run_folder: Path, tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIN_DATA", str(data_root))
    checkpoint = checkpoint_files.read(run_folder / "checkpoints" / "best.ckpt")
    data = checkpoint["hyper_parameters"]["settings"]["data"]
    data |= {"root": str(tmp_path / "foreign"), "mirrors": ["https://example.org"]}
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "x.ckpt")
    here = Exporter(tmp_path / "x.ckpt", lambda *_: None).local_settings
    assert (here.data.root, "https://example.org" in here.data.mirrors) == (str(data_root), False)
    assert not (tmp_path / "foreign").exists()


def test_an_export_is_checked_on_the_images_where_the_run_found_them(
    run_folder: Path, tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIN_DATA", str(tmp_path / "own"))
    checkpoint = run_folder / "checkpoints" / "best.ckpt"
    assert Exporter(checkpoint, lambda *_: None).local_settings.data.root == str(data_root)
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 300), (1, 300, 200), (2, 28, 29)])
def test_batch_height_and_width_are_dynamic(run_folder: Path, export: Path, shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_allclose(nin.load(export).predict(images), nin.load(run_folder).predict(images), atol=1e-5)


def test_the_metadata_says_where_the_file_comes_from(run_folder: Path, export: Path, data_root: Path) -> None:
    known, model = nin.load(export).description, onnx.load(export)
    found = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(found["class_names"]) == list(known.class_names) == nin.load(run_folder).description.class_names
    assert found["run"] == "small"
    assert found["weights_sha256"] == nin.load(run_folder).description.more["weights_sha256"]
    assert known.more["check"]["images"] == 2000
    assert 0 <= known.more["check"]["largest_difference"] <= 1e-5
    assert 0.5 < known.more["check"]["accuracy"] <= 1
    # No path of this machine, and no operator beyond the standard's.
    for place in (Path(nin.__file__).parent, data_root, run_folder):
        assert str(place).encode() not in export.read_bytes()
    assert {node.domain for node in model.graph.node} == {""}


def exporter_of_three(monkeypatch: pytest.MonkeyPatch, expected: list[float]) -> "Exporter":
    """An exporter with three test images, whose checkpoint gives each the probabilities ``expected``."""
    from nin.deploy import export

    exporter = export.Exporter.__new__(export.Exporter)
    exporter.images, exporter.labels = np.zeros((3, 2, 2), np.uint8), np.zeros(3, np.int64)
    exporter.progress = lambda *_: None
    monkeypatch.setattr(exporter, "module", None, raising=False)
    monkeypatch.setattr(export, "probabilities_of", lambda _, images: torch.tensor([expected] * len(images)))
    return exporter


@pytest.mark.parametrize(
    ("expected", "exported"),
    [
        ([0.9, 0.1], [np.nan, np.nan]),  # the argmax of both is class 0
        ([0.500002, 0.499998], [0.499998, 0.500002]),  # within 1e-5, but another class
    ],
)
def test_exported_probabilities_that_are_not_numbers_or_of_another_class_are_refused(
    expected: list[float], exported: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nin.deploy import export

    class Exported:
        def predict(self, images: np.ndarray) -> np.ndarray:
            return np.array([exported] * len(images), np.float32)

    with pytest.raises(export.ExportError, match=r"of 3 test images [03] are classified differently"):
        exporter_of_three(monkeypatch, expected).check(Exported())  # type: ignore[arg-type]


def test_an_export_that_differs_for_a_single_image_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from nin.deploy import export

    class Exported:
        def predict(self, images: np.ndarray) -> np.ndarray:
            return np.array([[0.9, 0.1] if len(images) > 1 else [0.8, 0.2]] * len(images), np.float32)

    with pytest.raises(export.ExportError, match=r"of 3 test images 0 .* probabilities differ by up to 0\.1 "):
        exporter_of_three(monkeypatch, [0.9, 0.1]).check(Exported())  # type: ignore[arg-type]


def test_a_place_that_can_not_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "existing.pt2").write_text("earlier")
    with pytest.raises(FileNotFoundError), open_checked(Path("/proc/model.pt2")):  # no one can create files there
        pytest.fail("the work has begun")
    with pytest.raises(ZeroDivisionError), open_checked(tmp_path / "existing.pt2") as temporary:
        temporary.write_text(str(1 / 0))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]


def test_a_file_that_differs_from_the_checkpoint_is_not_kept(
    run_folder: Path,
    data_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from nin.commands.export import main
    from nin.deploy import export

    exact = export.probabilities_of
    monkeypatch.setattr(export, "probabilities_of", lambda *given: exact(*given) + 2e-5)
    assert main([str(run_folder), "--out", str(tmp_path / "m.onnx"), f"data.root={data_root}"]) == 1
    assert re.search(r"differ by up to 2\S*e-05 \(allowed: 1e-05\); not kept$", capfd.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_int8_is_smaller_and_refused_if_it_loses_accuracy(
    run_folder: Path, export: Path, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nin.deploy import export as module
    from nin.deploy import quantize as quantize_module

    calibrated: list[np.ndarray] = []
    quantize = quantize_module.quantize

    def record(source: Path, path: Path, images: np.ndarray) -> None:
        calibrated.append(images)
        quantize(source, path, images)

    monkeypatch.setattr(quantize_module, "quantize", record)
    here = [f"data.root={data_root}"]
    exporter = module.Exporter(run_folder / "checkpoints" / "best.ckpt", lambda *_: None, here)
    monkeypatch.setattr(module, "images_per_second", lambda *_, **__: 1.0)
    path = tmp_path / "m.int8.onnx"
    with monkeypatch.context() as patch:
        patch.setattr(module, "INT8_LOSS", 0.1)  # a network this small loses more than a real one
        measured = exporter.export_int8(export, path)
    # Not with the test images, on which its accuracy is then found.
    np.testing.assert_array_equal(calibrated[0], load_part(exporter.local_settings, "train")[0])
    noted = load_onnx(path).description.more["int8"]
    assert measured["accuracy"] == {"float": noted["accuracy_of_float"], "int8": noted["accuracy"]}
    assert noted["images"] == 2000
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert "QuantizeLinear" in kinds
    assert "BatchNormalization" not in kinds
    before = measured["accuracy"]["float"]
    assert before == evaluate_export(export, here)[1]["test/acc"]
    # From here on that file again: another quantization would take seconds to write the same.
    content = path.read_bytes()
    monkeypatch.setattr(quantize_module, "quantize", lambda source, to, images: to.write_bytes(content))
    with monkeypatch.context() as patch:
        for lost in (0.003, 0.0031):
            patch.setattr(module, "evaluate_network", lambda *_, lost=lost: ({"test/acc": before - lost}, None))
            if lost == 0.003:  # the difference may be 0.0030000000000000027
                assert exporter.export_int8(export, path)["accuracy"]["float"] == before
            else:
                with pytest.raises(module.ExportError, match=r"it loses 0.0031, more than 0.003; not kept"):
                    exporter.export_int8(export, path)
    monkeypatch.setattr(module, "INT8_LOSS", -1)
    with pytest.raises(module.ExportError, match=r"it loses .*, more than -1; not kept"):
        exporter.export_int8(export, tmp_path / "other.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["m.int8.onnx"]


@pytest.mark.parametrize("count", [3, 512, 700, 1023, 1500])
def test_int8_is_calibrated_with_images_of_every_class(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nin.deploy import quantize as module

    batches: list[dict[str, np.ndarray]] = []

    def read_all(*given: Any, **_: Any) -> None:
        batches.extend(iter(lambda: given[2].get_next(), None))

    monkeypatch.setattr(module, "quant_pre_process", lambda *_, **__: None)
    monkeypatch.setattr(module, "quantize_static", read_all)
    images = np.arange(count, dtype=np.int16)[:, None, None]  # each with its index as its only pixel
    for given in (images, MappedImages(images, np.arange(count))):
        batches.clear()
        module.quantize(tmp_path / "m.onnx", tmp_path / "m.int8.onnx", given)
        chosen = np.concatenate([batch["images"] for batch in batches]).flatten()
        assert len(chosen) == min(count, 512)
        # No stretch of the data set is left out: a folder's images are sorted by class.
        assert np.diff(chosen, prepend=-1, append=count).max() <= -(-count // len(chosen))


def _change(export: Path, path: Path, change: object) -> Path:
    model = onnx.load(export)
    change(model)  # type: ignore[operator]
    path.write_bytes(model.SerializeToString())
    return path


def _change_description(export: Path, path: Path, **changes: Any) -> Path:
    def change(model: "onnx.ModelProto") -> None:
        changed = dataclasses.replace(nin.load(export).description, **changes)
        onnx.helper.set_model_props(model, metadata_of(changed))

    return _change(export, path, change)


def test_weights_outside_of_the_file_are_refused(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime would otherwise read any file that the export names."""
    (tmp_path / "secret").write_bytes(bytes(100_000))
    monkeypatch.chdir(tmp_path)
    for location in ("secret", str(tmp_path / "secret"), f"../{tmp_path.name}/secret"):

        def refer(model: "onnx.ModelProto", location: str = location) -> None:
            weights = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
            size = len(weights.raw_data)
            weights.ClearField("raw_data")
            weights.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", location), ("offset", "0"), ("length", str(size))):
                weights.external_data.add(key=key, value=value)

        with pytest.raises(UserError, match="refused: damaged, or not a self-contained ONNX file"):
            load_onnx(_change(export, tmp_path / "m.onnx", refer))


def test_an_export_is_read_where_no_temporary_folder_can_be_written(
    export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    assert load_onnx(export).predict(np.zeros((1, 28, 28), np.uint8)).shape == (1, 10)


def test_an_export_without_maps_says_so(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That of a network whose maps need gradients."""

    def drop_maps(model: "onnx.ModelProto") -> None:
        del model.graph.output[2]

    network = load_onnx(_change(export, tmp_path / "m.onnx", drop_maps))
    images = np.zeros((2, 28, 28), np.uint8)
    assert network.predict(images).shape == (2, 10)
    with pytest.raises(UserError, match=r"this export has no score maps: .* give the run or its checkpoint instead"):
        network.maps(images)
    Image.new("L", (28, 28)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="this export has no score maps"):
        predict.main([str(tmp_path / "m.onnx"), str(tmp_path / "a.png"), "--csv", "--maps", str(tmp_path / "maps")])
    assert not (tmp_path / "maps").exists()
    assert capsys.readouterr().out == ""


def test_class_names_are_readable_in_the_metadata(export: Path, tmp_path: Path) -> None:
    """As the C++ program of docs/deploy.md shows them."""
    names = ["日本", "Füße", 'a "b"', *map(str, range(7))]

    path = _change_description(export, tmp_path / "m.onnx", class_names=names)
    assert load_onnx(path).description.class_names == names
    written = open_session(path).get_modelmeta().custom_metadata_map["class_names"]
    assert written.startswith('["日本", "Füße", ')
    assert json.loads(written) == names


def test_eval_of_an_export_of_a_folders_run_needs_the_folder(export: Path, tmp_path: Path) -> None:
    """The file names no path, and nobody's folder is called as the default is."""
    settings = nin.load(export).description.settings | {"data": folder_data(Path("data")).model_dump(mode="json")}
    path = _change_description(export, tmp_path / "m.onnx", settings=settings)
    with pytest.raises(UserError, match=r"its run's images were in a folder; say where they are: data.root=…$"):
        evaluate_export(path, [])
    with pytest.raises(UserError, match="nowhere"):
        evaluate_export(path, ["++data.root=nowhere"])
    with pytest.raises(UserError, match="nowhere: no such folder"):
        evaluate_export(path, ["data.root=nowhere"])


def test_labels_of_other_classes_are_not_compared_with_predictions(
    run_folder: Path, export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A folder that is given later may have as many classes, or more, and other ones; and other images."""
    root = write_folder(tmp_path / "photos", {"train": 4, "test": 1}, {"light\nblue": (1, 2, 3), "red": (9, 0, 0)})
    folder = folder_data(root, image_size=28).model_dump(mode="json")
    exported, checkpoint, known = tmp_path / "m.onnx", tmp_path / "x.ckpt", nin.load(export).description
    more = known.more | {"images_sha256": "0" * 64}
    _change_description(export, exported, settings=known.settings | {"data": folder}, more=more)
    content = checkpoint_files.read(run_folder / "checkpoints" / "best.ckpt")
    content["hyper_parameters"]["settings"]["data"] = folder
    content["ImageDataModule"] = {"fingerprint": "0" * 64, "counts": {}}
    AtomicCheckpointIO().save_checkpoint(content, checkpoint)
    message = r"^data: its classes are light\\nblue, red; the network was trained for T-shirt/top, Trouser, "
    here = [f"data.root={root}"]
    for has_test in (True, False):
        if not has_test:  # the test images are then some of the training images, but not those of the run
            shutil.move(root / "test", tmp_path)
        for test in (
            lambda: evaluate_export(exported, here),
            lambda: Exporter(checkpoint, lambda *_: None, here),
            lambda: evaluate_checkpoint(checkpoint, here, []),
        ):
            with pytest.raises(UserError, match=message):
                test()
            printed = capsys.readouterr().err + caplog.text
            assert ("may have been trained on some of them" in printed) is not has_test
            caplog.clear()


def test_custom_operators_foreign_and_damaged_files_are_refused(export: Path, tmp_path: Path) -> None:
    def custom(model: "onnx.ModelProto") -> None:
        model.graph.node[0].domain = "evil"
        model.opset_import.add(domain="evil", version=1)

    with pytest.raises(UserError, match="refused"):
        load_onnx(_change(export, tmp_path / "m.onnx", custom))
    whole = dataclasses.asdict(load_onnx(export).description)
    changes: list[dict[str, Any]] = [
        {"class_names": []}, {"class_names": ["a"]}, {"class_names": [1] * 10}, {"class_names": ["a"] * 10},
        {"channels": 2}, {"stored_size": 10**9},
        {"image_size": "28"}, {"fit": "x"}, {"settings": {}}, {"settings": {"data": 5}}, {"more": None}, {"x": 1},
    ]  # fmt: skip
    others = [{"nin": json.dumps(whole | change)} for change in changes]
    for metadata in ({}, {"nin": "[]"}, {"nin": json.dumps({"class_names": "x"})}, *others):

        def describe(model: "onnx.ModelProto", metadata: dict[str, str] = metadata) -> None:
            del model.metadata_props[:]
            onnx.helper.set_model_props(model, metadata)

        with pytest.raises(UserError, match=r"not written by (this version of )?nin export"):
            load_onnx(_change(export, tmp_path / "m.onnx", describe))
    (tmp_path / "m.onnx").write_bytes(export.read_bytes()[:5000])
    with pytest.raises(UserError, match="refused: damaged"):
        load_onnx(tmp_path / "m.onnx")
    with pytest.raises(UserError, match="can't be read"):
        load_onnx(tmp_path / "nowhere.onnx")


def test_predict_and_eval_of_an_export_import_no_torch(
    run_folder: Path, export: Path, data_root: Path, tmp_path: Path
) -> None:
    from PIL import Image

    Image.new("L", (28, 28)).save(tmp_path / "a.png")
    program = f"""
import sys
sys.modules.update(dict.fromkeys(("torch", "torchvision", "lightning", "onnx", "captum")))  # not importable
from nin.commands import eval, predict
assert predict.main([{str(export)!r}, {str(tmp_path / "a.png")!r}, "--maps", {str(tmp_path / "maps")!r}]) == 0
eval.main([{str(export)!r}, "data.root={data_root}"])
from nin import cli
sys.argv = ["nin", "predict", {str(run_folder)!r}, {str(tmp_path / "a.png")!r}]
cli.main()
"""
    home = tmp_path / "home"
    home.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("XDG_")} | {"HOME": str(home)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)  # set in this process by the code that is tested
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    # Telemetry of onnxruntime would have its files in .cache/Microsoft; matplotlib has its own.
    assert {str(path.relative_to(home)) for path in home.glob(".cache/*")} <= {".cache/matplotlib"}
    assert run.returncode == 2
    of_export, of_run = run.stderr.splitlines()
    assert of_export == f"score maps: {tmp_path / 'maps'}, a picture of each image"
    assert of_run.startswith("nin predict: needs torch and the project's other dependencies; without torch ")
    accuracy = nin.load(export).description.more["check"]["accuracy"]
    assert f"test/acc  {accuracy:.4f}\n" in run.stdout
    assert (tmp_path / "maps").exists()


def test_a_pipe_in_the_place_of_an_export_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.onnx")
    with pytest.raises(UserError, match=r"model.onnx: can't be read \(not a file\)"):
        load_onnx(tmp_path / "model.onnx")
