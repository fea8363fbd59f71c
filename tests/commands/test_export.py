"""`nin export`: arguments, where the file goes, and what is missing."""

import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

import nin
from nin.commands import export as command
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


def test_without_a_compiler_nothing_is_written(
    run_folder: Path, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ["--format", "pt2", "--out", str(tmp_path / "new" / "model.pt2"), f"data.root={data_root}"]
    with pytest.raises(UserError, match=r"--format pt2: AOTInductor needs a C\+\+ compiler; install g\+\+ or clang"):
        main([str(run_folder), *words])
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_not_exported_again(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is an export already; nin predict, nin eval and nin serve take it"):
        main([str(tmp_path / "model.onnx")])


@pytest.mark.parametrize(("int8", "remedy"), [(False, "--int8 writes it again"), (True, "remove it")])
def test_an_int8_file_of_an_earlier_export_is_reported(
    int8: bool, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nin.deploy.export import ExportError

    class Exporter:
        def export_onnx(self, path: Path) -> SimpleNamespace:
            path.touch()
            return SimpleNamespace(more={"check": {"images": 1, "accuracy": 1.0, "largest_difference": 0.0}})

        def export_int8(self, source: Path, path: Path) -> None:
            raise ExportError("int8: it loses more; not kept")

    out = tmp_path / "model.onnx"
    assert command._export_onnx(Exporter(), out, int8) == int(int8)  # type: ignore[arg-type]
    assert "earlier" not in capsys.readouterr().err
    (tmp_path / "model.int8.onnx").touch()
    command._export_onnx(Exporter(), out, int8)  # type: ignore[arg-type]
    message = f"model.int8.onnx: is of an earlier export, perhaps with other weights; {remedy}\n"
    assert capsys.readouterr().err.endswith(message)


def test_an_export_for_cpp_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    from nin.commands import serve

    path = tmp_path / "model.pt2"
    path.write_bytes(b"PK")
    for use in (lambda: main([str(path)]), lambda: serve.find_export(path), lambda: nin.load(path)):
        with pytest.raises(UserError, match=r"an export for C.+; give its run, a checkpoint or an .onnx file instead"):
            use()


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("shirt.png", "not an exported .onnx file; give one, or a run's folder"), ("last.ckpt", "nin export .*last.ckpt")],
)
def test_the_service_takes_no_other_file_than_an_export(tmp_path: Path, name: str, remedy: str) -> None:
    from nin.commands import serve

    (tmp_path / name).touch()
    with pytest.raises(UserError, match=remedy):
        serve.find_export(tmp_path / name)


def test_a_run_is_exported_again_for_another_checkpoint_whatever_the_times_of_the_files(
    run_folder: Path, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nin.checkpoints.checkpoint_io import AtomicCheckpointIO
    from nin.checkpoints.files import read
    from nin.commands import serve

    commands = []
    done = SimpleNamespace(returncode=0)
    monkeypatch.setattr(serve.subprocess, "run", lambda command, **_: commands.append(command[2:]) or done)
    copy = Path(shutil.copytree(run_folder, tmp_path / "copy"))
    best = copy / "checkpoints" / "best.ckpt"
    os.utime(best, (2e9, 2e9))
    assert serve.find_export(copy) == copy / "export" / "model.onnx"
    assert not commands
    checkpoint = read(best)
    AtomicCheckpointIO().save_checkpoint(checkpoint | {"epoch": checkpoint["epoch"] + 1}, best)
    os.utime(best, (1e9, 1e9))
    serve.find_export(copy)
    assert commands == [["nin", "export", str(copy)]]
    shutil.rmtree(copy / "export")
    serve.find_export(copy)
    assert commands == [["nin", "export", str(copy)]] * 2
    done.returncode = 2
    with pytest.raises(UserError, match="copy: could not be exported"):
        serve.main([str(copy), "--port", "0", "--allow", "my_net", "--allow", "my_layers"])
    assert commands[2:] == [["nin", "export", str(copy), "--allow=my_net", "--allow=my_layers"]]
    for returncode, status in ((1, 1), (-signal.SIGKILL, 137)):
        done.returncode = returncode
        with pytest.raises(SystemExit) as ended:
            serve.main([str(copy), "--port", "0"])
        assert ended.value.code == status
        assert capsys.readouterr().err.endswith("copy: could not be exported\n")


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
