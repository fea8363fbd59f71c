"""The program as a person runs it, in few processes of its own: each takes seconds to start."""

import contextlib
import errno
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import ENVIRONMENT, SMALL, broken_pipe, full_disk, merge, nin, put_job
from nin import cli
from nin.config.schema import UserError


def test_bare_nin_and_help_list_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run = nin(cwd=tmp_path)
    assert run.returncode == 0
    assert dispatch(monkeypatch, "--help") == 0
    for printed in (run.stdout, capsys.readouterr().out):
        for command in ("train", "eval", "inspect"):
            assert f"nin {command} " in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_help_on_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        dispatch(monkeypatch, "help", "report")
    assert capsys.readouterr().out.startswith("usage: nin report ")


def test_help_on_train_ends_with_the_documentation_and_the_line_for_completion(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):  # Hydra's help ends the process
        dispatch(monkeypatch, "train", "--help")
    footer = capsys.readouterr().out[-500:]
    assert "docs/config.md" in footer
    assert 'eval "$(nin train -sc install=bash)"' in footer


def dispatch(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of the program, run in this process."""
    monkeypatch.setattr(sys, "argv", ["nin", *arguments])
    return cli.dispatch()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trian", "no command 'trian'; did you mean nin train?"),
        ("evla", "no command 'evla'; did you mean nin eval?"),
        ("x", "no command 'x'"),
    ],
)
def test_an_unknown_command_gets_a_suggestion(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    assert dispatch(monkeypatch, name) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[0] == f"nin: {message}"


def test_on_windows_the_message_names_what_to_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert dispatch(monkeypatch, "train", "experiment=quickstart") == 2
    assert capsys.readouterr().err == ("nin train: needs Linux or macOS; on Windows start it in WSL (wsl --install)\n")


def test_a_working_directory_that_was_removed_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert dispatch(monkeypatch, "report", "sweep") == 2
    message = "nin report: the working directory was removed; change to another one\n"
    assert capsys.readouterr().err == message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's /dev/full")
@pytest.mark.parametrize(
    ("output", "status", "message"),
    [(broken_pipe, 141, ""), (full_disk, 1, f"nin: standard output can't be written ({os.strerror(errno.ENOSPC)})\n")],
)
def test_standard_output_that_can_not_be_written_is_no_traceback(
    output: Callable[[], int], status: int, message: str
) -> None:
    command = [sys.executable, "-m", "nin", "--help"]
    with os.fdopen(output(), "w") as stdout:
        ended = subprocess.run(command, env=ENVIRONMENT, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (status, message)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's /dev/full")
def test_a_file_that_can_not_be_written_is_not_taken_for_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing to a full disk raises an OSError without a file's name, as writing to standard output does."""

    def write() -> None:
        with open("/dev/full", "w") as file:  # noqa: PTH123
            file.write("result")

    monkeypatch.setattr(cli, "dispatch", write)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as raised:
        cli.main()
    assert raised.value.filename is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's /dev/full")
def test_long_output_that_can_not_be_written_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python drops what is longer than its buffer when a write fails: writing again would succeed."""
    with open("/dev/full", "w") as output:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", output)
        monkeypatch.setattr(cli, "dispatch", lambda: print("x" * 100_000))
        monkeypatch.setattr(os, "dup2", lambda *_: None)  # pytest's own standard error stays open
        with pytest.raises(SystemExit) as ended:
            cli.main()
        with contextlib.suppress(OSError):
            output.close()
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"nin: standard output can't be written ({os.strerror(errno.ENOSPC)})\n"


@pytest.mark.parametrize("is_error_closed", [False, True])
@pytest.mark.parametrize("command", ["report --help", "report sweep", "inspect model=nin_small"])
def test_a_command_whose_output_nobody_reads_ends_with_141(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, is_error_closed: bool
) -> None:
    """As in ``nin report sweep | head -1``, and with ``2>&1``."""
    put_job(tmp_path / "sweep" / "a", ["seed=1"], 0.5)
    before = set(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["nin", *command.split()])
    with os.fdopen(broken_pipe(), "w") as output, tempfile.TemporaryFile("w+", 1) as errors:
        monkeypatch.setattr(sys, "stdout", output)
        monkeypatch.setattr(sys, "stderr", output if is_error_closed else errors)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert os.fstat(errors.fileno()).st_size == 0
    assert ended.value.code == 141
    assert set(tmp_path.rglob("*")) == before


def test_a_message_that_nobody_reads_ends_with_141(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["nin", "trian"])
    with os.fdopen(broken_pipe(), "w", buffering=1) as errors:
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        monkeypatch.setattr(sys, "stderr", errors)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 141


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("nin ", "train resume eval predict export serve report inspect bench"),
        ("nin re", "resume report"),
        ("nin eval ", ""),
        ("nin x ", ""),
        ("nin train model=l", "model=lenet"),
        ("nin  inspect  model=l", "model=lenet"),
        ("nin bench seed=1 model=l", "model=lenet"),
    ],
)
def test_completion_offers_commands_and_values_and_leaves_files_to_the_shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, offered: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["nin"])  # restored after the test
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    assert cli.complete("-sc", ["query=bash"]) == 0
    assert capsys.readouterr().out.split() == offered.split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "data.batch_size=0", "seed=-1"], "nin train: 2 errors\n  seed=-1: must be"),
        (["train", "data.image_size=40"], "nin train: data.image_size=40: nin needs at least 67 pixels per side"),
        (["train", "data=garments", "trainer.devices=0", "name=x"], "nin train: trainer: `Trainer(devices=0)` value"),
        (
            ["eval", "nowhere"],
            "nin eval: nowhere: no such file or folder; give a run's folder, as in outputs/runs/first",
        ),
        (["eval", "a" * 300], f"nin eval: {'a' * 300}: File name too long"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_written(
    tmp_path: Path,
    data_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIN_DATA", str(data_root))
    assert cli.run(arguments[0], arguments[1:]) == 2
    printed = capfd.readouterr()
    assert printed.err.startswith(message)
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_may_not_be_read_is_one_message_and_other_errors_of_files_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: list[str]) -> None:
        raise OSError(int(arguments[0]), "no", *arguments[1:])

    monkeypatch.setattr("nin.commands.report.main", fail)
    for number in (errno.EACCES, errno.EPERM):
        for words, name in ((["theirs/result.json"], "theirs/result.json"), ([], "a file")):
            assert cli.run("report", [str(number), *words]) == 2
            assert capsys.readouterr() == ("", f"nin report: {name}: no\n")
    with pytest.raises(OSError, match="no"):
        cli.run("report", [str(errno.EIO), "theirs/result.json"])


def test_the_traceback_of_a_mistake_is_printed_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(arguments: list[str]) -> None:
        raise UserError("model: fails") from KeyError(arguments[0])

    monkeypatch.setattr("nin.commands.report.main", refuse)
    for value, first in (("0", "nin report: model: fails"), ("1", "KeyError: 'sweep'")):
        monkeypatch.setenv("HYDRA_FULL_ERROR", value)
        assert cli.run("report", ["sweep"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert (lines[0], lines[-1]) == (first, "nin report: model: fails")


def test_train_then_run_the_command_again_then_eval(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [*SMALL, "callbacks.images.wrong_images=4", "callbacks.images.sample_images=4", "name=first"]
    first = nin("train", *small, cwd=tmp_path, NIN_DATA=str(data_root))
    assert (first.returncode, first.stderr) == (0, "")
    folder = tmp_path / "outputs" / "runs" / "first"
    there = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "events" not in p.name)
    assert there == [
        *(f".hydra/{name}" for name in ("config.yaml", "lock", "overrides.yaml", "state.json")),
        *(f"checkpoints/{name}" for name in ("best.ckpt", "last-1.ckpt", "last.ckpt")),
        *("metrics.csv", "nin.log", "result.json"),
    ]
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["overrides"]) == ("finished", small)
    lines = first.stdout.splitlines()
    assert re.match(r"nin \([\d,]+ parameters\) on garments at 28x28, 2 epochs, batches of 32; 1 x cpu ", lines[0])
    assert re.search(r" threads?\), precision 32-true$", lines[0])
    assert re.fullmatch(r"run folder: outputs/runs/first, curves: \S*tensorboard --logdir outputs/runs", lines[1])
    assert [line.split("  ")[0] for line in lines[2:4]] == ["epoch 1/2", "epoch 2/2"]
    assert "run folder: outputs/runs/first" in lines
    assert re.fullmatch(r"curves:     \S*tensorboard --logdir outputs/runs", lines[-1])

    times = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIN_DATA", str(data_root))
    assert cli.run("train", merge(small)) == 0
    assert "outputs/runs/first is finished" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == times

    assert cli.run("eval", ["outputs/runs/first", "data.batch_size=32"]) == 0
    tested = capsys.readouterr()
    assert tested.err == ""
    assert re.search(r"^test/acc  (.*)$", tested.out, re.M)[1] == f"{result['metrics']['test/acc']:.4f}"
    assert re.search(r"^test/loss (.*)$", tested.out, re.M)[1] == f"{result['metrics']['test/loss']:.4f}"


def test_processes_that_are_started_import_nothing_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "")  # the program sets it, and it is as before after the test
    monkeypatch.delenv("PYTHONSAFEPATH")
    monkeypatch.setattr(sys, "argv", ["nin", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    (tmp_path / "difflib.py").write_text("print('imported')")
    done = subprocess.run([sys.executable, "-m", "nin", "help"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "imported" not in done.stdout
    (tmp_path / "pickle.py").write_text("print('imported')")
    done = subprocess.run([sys.executable, "-c", "import pickle"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
