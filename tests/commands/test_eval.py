"""What ``nin eval`` takes from a checkpoint or an export from elsewhere, and what it does not follow."""

import csv
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import nin
from helpers import broken_pipe
from nin import cli
from nin.checkpoints.checkpoint_io import AtomicCheckpointIO
from nin.commands import eval as eval_command
from nin.config.schema import Settings, UserError
from nin.data.module import ImageDataModule
from nin.data.sources import describe, load
from nin.deploy import onnx_model
from nin.training import evaluation
from nin.training.callbacks.mistakes import MistakeRecorder
from nin.training.classifier import Classifier
from pictures import folder_data

PLACES = ("data.mirrors=[https://example.org]", "data.root=/foreign", "trainer.profiler=pytorch")


def save(path: Path, settings: dict[str, Any], class_names: Sequence[str] = ("a", "b")) -> Path:
    hyper_parameters = {"settings": settings, "class_names": list(class_names), "in_channels": 1}
    content = {"state_dict": {}, "hyper_parameters": hyper_parameters, "global_step": 1, "epoch": 0}
    AtomicCheckpointIO().save_checkpoint(content, path)
    return path


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_what_a_file_from_elsewhere_names_is_not_followed(
    settings: Callable[..., Settings], tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    used: list[Settings] = []

    def stop(tested: Settings, *_: Any) -> None:
        used.append(tested)
        raise UserError("tested")

    monkeypatch.setenv("NIN_DATA", str(data_root))
    stored = settings(*PLACES)
    path = save(tmp_path / "x.ckpt", stored.model_dump(mode="json"))
    if kind == "export":
        path = path.with_suffix(".onnx")
        description = SimpleNamespace(settings=stored.model_dump(mode="json"), more={})
        monkeypatch.setattr(onnx_model, "load_onnx", lambda *_: SimpleNamespace(description=description))
        monkeypatch.setattr("nin.deploy.scoring.load_part", stop)
    monkeypatch.setattr(evaluation, "evaluate_weights", stop)
    with pytest.raises(UserError, match=r"^tested$"):
        eval_command.main([str(path)])
    (tested,) = used
    assert (tested.data.root, tested.data.mirrors) == (str(data_root), settings().data.mirrors)
    assert (tested.trainer.profiler, tested.logger, tested.callbacks) == (None, {}, {})


def test_a_checkpoint_is_tested_on_the_images_where_the_run_found_them(
    settings: Callable[..., Settings], tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIN_DATA", str(tmp_path / "own"))
    path = save(tmp_path / "x.ckpt", settings().model_dump(mode="json"))
    monkeypatch.setattr(evaluation, "evaluate_weights", lambda tested, *_: [tested.data.root])
    assert eval_command.evaluate_checkpoint(path, [], [])[1] == str(data_root)
    (tmp_path / "chosen").symlink_to(data_root)
    monkeypatch.chdir(tmp_path)
    assert eval_command.evaluate_checkpoint(path, ["data.root=chosen"], [])[1] == str(tmp_path / "chosen")
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"model": {"_target_": "this.s", "input_size": 28}},
            "model._target_=this.s: a stored config may not import this class",
        ),
        ({"callbacks": {"x": {"_target_": "${oc.env:HOME}"}}}, "an interpolation; a stored config has plain values"),
    ],
)
def test_a_checkpoint_is_plain_data(
    settings: Callable[..., Settings], tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    path = save(tmp_path / "x.ckpt", settings().model_dump(mode="json") | changed)
    with pytest.raises(UserError, match=message):
        eval_command.main([str(path)])
    assert "this" not in sys.modules


def test_a_missing_gpu_is_reported_as_by_nin_train_before_data_are_written(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setenv("NIN_DATA", str(tmp_path / "data"))
    path = save(tmp_path / "x.ckpt", settings("trainer.accelerator=gpu").model_dump(mode="json"))
    with pytest.raises(UserError, match=r"trainer\.accelerator=gpu: this machine has no GPU .* use trainer=cpu"):
        eval_command.main([str(path)])
    assert list(tmp_path.iterdir()) == [path]


def test_what_several_processes_trained_is_tested_by_one(
    settings: Callable[..., Settings], tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several processes each would test a part of the images and report its own accuracy."""

    def stop(tested: Settings, *_: Any) -> None:
        used.append(tested)
        raise UserError("tested")

    used: list[Settings] = []
    monkeypatch.setenv("NIN_DATA", str(data_root))
    monkeypatch.setattr(evaluation, "build_trainer", stop)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    stored = settings(
        "trainer.strategy=ddp", "trainer.devices=2", "trainer.accelerator=auto", "trainer.sync_batchnorm=true"
    )
    path = save(tmp_path / "x.ckpt", stored.model_dump(mode="json"), describe(stored.data).class_names)
    with pytest.raises(UserError, match=r"^tested$"):
        eval_command.main([str(path)])
    (tested,) = used
    assert (tested.trainer.strategy, tested.trainer.devices, tested.trainer.num_nodes) == ("auto", 1, 1)


def test_a_test_ends_though_nobody_reads_its_result(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = {"test/acc": 1.0, "test/loss": 0.0, "test/acc_by_class": {"ä" * 9000: 1.0}}
    tested: list[Path] = []

    def test(path: Path, *_: Any) -> tuple[Settings, dict[str, Any], np.ndarray]:
        tested.append(path)
        return settings(), metrics, np.eye(1, dtype=int)

    monkeypatch.setattr(eval_command, "evaluate_checkpoint", test)
    (tmp_path / "x.ckpt").touch()
    with os.fdopen(broken_pipe(), "w", encoding="ascii") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert cli.run("eval", [str(tmp_path / "x.ckpt")]) == 0
        sys.stdout.flush()
    assert tested == [tmp_path / "x.ckpt"]


def test_ctrl_c_ends_it_with_130(run_folder: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setenv("NIN_DATA", str(data_root))
    monkeypatch.setattr(Classifier, "test_step", interrupt)
    # Python's own handler: a shell starts programs in the background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.run("eval", [str(run_folder), "trainer=cpu"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning ignores it from then on


def test_the_wrongly_classified_images_are_written_with_the_surest_first(
    run_folder: Path,
    settings: Callable[..., Settings],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    test_images: np.ndarray,
) -> None:
    wrong = tmp_path / "new" / "wrong.csv"
    eval_command.main([str(run_folder), "--wrong", str(wrong)])
    assert capsys.readouterr().out.splitlines()[-1] == f"wrongly classified images: {wrong}"
    network, labels = nin.load(run_folder), load(settings().data, "test")[1]
    count = 64  # two batches
    names = np.array(describe(settings().data).class_names)
    probabilities = network.score(test_images[:count]).probabilities
    expected = {
        str(i): (names[labels[i]], names[row.argmax()], f"{row.max():.4f}")
        for i, row in enumerate(probabilities)
        if row.argmax() != labels[i]
    }
    with wrong.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["image"]: (row["true"], row["predicted"], row["probability"]) for row in rows} == expected
    assert 0 < len(rows) < count
    surest = [float(row["probability"]) for row in rows]
    assert surest == sorted(surest, reverse=True)


def test_where_wrong_images_can_not_be_written_nothing_is_tested(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "evaluate_weights", lambda *_: pytest.fail("tested"))
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe.csv")
    places = {
        "": r"--wrong \.: is a folder; give a file, as in wrong\.csv",
        str(tmp_path): f"--wrong {tmp_path}: is a folder; give a file, as in wrong.csv",
        str(tmp_path / "pipe.csv"): f"--wrong {tmp_path}/pipe.csv: is a device or a pipe; give a file, as in wrong.csv",
        f"{tmp_path}/file/wrong.csv": rf"--wrong \S+: can't be written \({tmp_path}/file is not a folder\)",
    }
    for place, message in places.items():
        with pytest.raises(UserError, match=f"^{message}$"):
            eval_command.main([str(run_folder), f"--wrong={place}"])


def test_the_wrong_images_of_a_folder_are_its_files(tmp_path: Path) -> None:
    for gray in range(0, 240, 6):  # 40 images, each of another gray, eight of which are held out for the test
        folder = tmp_path / "photos" / "train" / "ab"[gray % 4 // 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), gray).save(folder / f"{gray}.png")
    data = ImageDataModule(folder_data(tmp_path / "photos", test_size=8), seed=0)
    data.setup("test")
    recorder = MistakeRecorder()
    module: Any = SimpleNamespace(class_names=["a", "b"])
    for images, labels in data.test_dataloader():  # all are wrong, and brighter ones surer
        logits = torch.zeros(len(labels), 2)
        logits[torch.arange(len(labels)), 1 - labels] = 1 + images[:, 0, 0] / 255
        recorder.on_test_batch_end(SimpleNamespace(), module, logits, (images, labels))  # type: ignore[arg-type]
    recorder.on_test_end(SimpleNamespace(datamodule=data), module)  # type: ignore[arg-type]
    recorder.write(tmp_path / "wrong.csv")
    with (tmp_path / "wrong.csv").open() as file:
        files = [Path(row["image"]) for row in csv.DictReader(file)]
    grays = sorted(data.test[0][:, 0, 0].tolist(), reverse=True)
    assert [int(file.stem) for file in files] == grays
    assert len(grays) == 8
    assert all((tmp_path / "photos" / file).is_file() for file in files)
    (tmp_path / "photos" / files[0]).rename(tmp_path / "photos" / "train" / "a" / "new.png")
    with pytest.raises(UserError, match="photos: has changed since its images were read; try again"):
        recorder.write(tmp_path / "wrong.csv")
