"""`nin export`: arguments, where the file goes, and what is missing."""

import shutil
from pathlib import Path

import pytest

from nin.commands.export import main
from nin.config.schema import UserError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "pt2", "--int8"], "--int8: quantizes ONNX files; leave out --format pt2"),
        (["--out", "model.bin"], "--out model.bin: the name must end in .onnx"),
    ],
)
def test_mistakes(run_folder: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main([str(run_folder), *arguments])


def test_an_export_is_not_exported_again(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is an export already; nin predict, nin eval and nin serve take it"):
        main([str(tmp_path / "model.onnx")])


def test_missing_packages_are_named(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name))
    with pytest.raises(UserError, match="needs onnx, onnxscript, onnxruntime: python3 -m pip install onnx onnxscript"):
        main([str(run_folder)])


@pytest.mark.parametrize("name", ["export", "export/.model.tmp.onnx", "export/triton/labels.txt"])
def test_a_link_in_a_run_is_not_written_through(run_folder: Path, tmp_path: Path, name: str) -> None:
    run, target = tmp_path / "run", tmp_path / "target"
    shutil.copytree(run_folder / "checkpoints", run / "checkpoints")
    target.mkdir() if name == "export" else target.write_text("precious")
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).symlink_to(target)
    with pytest.raises(UserError, match=f"{name}: a symbolic link, which would be written through"):
        main([str(run)])
    assert not list(target.iterdir()) if target.is_dir() else target.read_text() == "precious"
