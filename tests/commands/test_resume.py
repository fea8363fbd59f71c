import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import broken_pipe
from nin import cli
from nin.commands import resume
from nin.config.schema import Settings
from nin.runs.folder import RunFolder
from nin.system.processes import StoppedError
from nin.training.request import RunRequest
from nin.training.run import RunFailedError


@pytest.fixture
def run(settings: Callable[..., Settings], tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.write_request(settings().model_dump(mode="json"), ["seed=0"])
    return folder


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[RunRequest]:
    """What would be trained; nothing is."""
    found: list[RunRequest] = []

    def execute(request: RunRequest) -> None:
        print("… " * 10_000, flush=True)
        found.append(request)

    monkeypatch.setattr(resume, "execute_run", execute)
    return found


def test_a_config_from_elsewhere_is_refused_until_its_module_is_allowed(
    run: RunFolder,
    settings: Callable[..., Settings],
    requests: list[RunRequest],
    capsys: pytest.CaptureFixture[str],
) -> None:
    foreign = settings().model_dump(mode="json") | {"callbacks": {"x": {"_target_": "this.s"}}}
    run.write_request(foreign, [])
    assert cli.run("resume", [str(run.path)]) == 2
    printed = capsys.readouterr()
    assert printed.err == (
        "nin resume: callbacks.x._target_=this.s: a stored config may not import this class; if you trust its module, "
        "add --allow this\n"
    )
    assert (printed.out, requests) == ("", [])
    assert cli.run("resume", [str(run.path), "--allow", "this"]) == 0
    assert requests[0].settings.callbacks == foreign["callbacks"]
    assert "this" not in sys.modules


@pytest.mark.parametrize("override", ["resume=never", "name=other"])
def test_to_resume_this_folder_is_no_choice_of_this_command(
    override: str, run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run("resume", [str(run.path), override]) == 2
    assert capsys.readouterr().err.startswith(f"nin resume: {override}: can't be changed here")


def test_of_a_sweep_its_command_is_run_again(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run("resume", [str(run.path.parent)]) == 2
    assert capsys.readouterr().err.endswith("holds several runs; to resume a sweep, run its command again\n")


def test_a_folder_that_is_missing_and_one_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, message in (
        (tmp_path / "none", "no such folder; runs are folders in outputs/runs"),
        (tmp_path, "not a run's folder (it has no .hydra/config.yaml); runs are in outputs/runs"),
    ):
        assert cli.run("resume", [str(folder)]) == 2
        assert capsys.readouterr().err == f"nin resume: {folder}: {message}\n"


def test_a_missing_run_is_the_only_missing_argument(capsys: pytest.CaptureFixture[str]) -> None:
    for command, argument in (
        ("resume", "RUN"),
        ("eval", "RUN_OR_CHECKPOINT_OR_EXPORT"),
        ("export", "RUN_OR_CHECKPOINT"),
    ):
        with pytest.raises(SystemExit):
            cli.run(command, [])
        assert capsys.readouterr().err.endswith(f"the following arguments are required: {argument}\n")


def test_an_interpolation_in_a_stored_config_is_not_resolved(
    run: RunFolder, requests: list[RunRequest], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SECRET", "resolved")
    config = run.config.read_text()
    for given, key in (("data.root", "  root: "), ("trainer.devices", "  devices: ")):
        before, _, after = config.partition(key)
        run.config.write_text(f"{before}{key}${{oc.env:SECRET}}\n{after.partition(chr(10))[2]}")
        assert cli.run("resume", [str(run.path)]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(f"nin resume: {given}=")
        assert "${oc.env:SECRET}: an interpolation; a stored config has plain values only" in printed
    assert requests == []


def test_a_run_is_continued_though_nobody_reads_what_it_prints(
    run: RunFolder, requests: list[RunRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    with os.fdopen(broken_pipe(), "w", encoding="ascii") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert cli.run("resume", [str(run.path), "trainer.max_epochs=3"]) == 0
    assert requests[0].settings.trainer.max_epochs == 3
    assert requests[0].overrides == ["seed=0", "trainer.max_epochs=3"]


def test_the_command_of_a_resumed_run_has_the_options_of_its_start_and_each_key_once(
    run: RunFolder, settings: Callable[..., Settings], requests: list[RunRequest]
) -> None:
    run.update_state(options=["--config-dir", "/my own", 5])
    words = ["seed=0", "trainer.max_epochs=2", "+logger.mine={_target_: x}", "+logger.mine.y=1", "+callbacks.other.x=1"]
    run.write_request(settings().model_dump(mode="json"), words)
    later = ["trainer.max_epochs=3", "~logger.mine", "callbacks.other.x=2"]
    request = RunRequest(settings(), run, [*words, *later])
    assert request.command == "nin train seed=0 trainer.max_epochs=3 +callbacks.other.x=2"
    assert cli.run("resume", [str(run.path), "trainer.max_epochs=3"]) == 0
    start = "nin train --config-dir '/my own' seed=0 trainer.max_epochs=3 "
    assert requests[0].command.startswith(start)


@pytest.mark.parametrize(
    ("ended", "status", "printed"),
    [
        (RunFailedError(), 1, ""),
        (StoppedError(signal.SIGINT), 130, ""),
        (StoppedError(signal.SIGTERM), 143, ""),
        (StoppedError(signal.SIGUSR1), 143, "SLURM job 7 could not be requeued"),
    ],
)
@pytest.mark.parametrize(("command", "word"), [("resume", "run"), ("train", "name=run")])
def test_the_exit_status_is_how_the_run_ended_and_slurms_warning_requeues_its_job(
    run: RunFolder,
    ended: Exception,
    status: int,
    printed: str,
    command: str,
    word: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def execute(_: RunRequest) -> None:
        raise ended

    monkeypatch.setattr(f"nin.commands.{command}.execute_run", execute)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", "")  # without SLURM's programs
    monkeypatch.chdir(run.path.parent)
    assert cli.run(command, [word]) == status
    assert capsys.readouterr().err.partition(" (")[0] == printed
