"""A run from request to result, with training replaced by a function that does nothing."""

import contextlib
import dataclasses
import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers import FakeExperiment
from nin.checkpoints.checkpoint_io import AtomicCheckpointIO
from nin.config.schema import FolderData, Settings, UserError
from nin.data import splits
from nin.data.splits import open_folder
from nin.runs import versions
from nin.runs.folder import RunFolder
from nin.system.processes import StoppedError
from nin.training import experiment, run
from nin.training.request import RunRequest
from pictures import folder_data, write_folder


class KilledError(Exception):
    pass


@pytest.fixture
def request_of(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., RunRequest]:
    monkeypatch.setattr(experiment, "Experiment", FakeExperiment)
    constant = ("schedule=constant", "optimizer=sgd")
    return lambda *overrides: RunRequest(settings(*constant, *overrides), RunFolder(tmp_path / "run"))


def test_what_there_is_is_refused_where_nothing_may_be_resumed(request_of: Callable[..., RunRequest]) -> None:
    run.execute_run(request_of("resume=never"))
    with pytest.raises(UserError, match=r"run: exists, and resume=never; give another name=…, or resume=auto"):
        run.execute_run(request_of("resume=never"))


@pytest.mark.parametrize("killed_in", ["write_request", "update_state"])
def test_an_extended_run_that_is_killed_at_its_start_is_not_finished(
    request_of: Callable[..., RunRequest], monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    assert run.execute_run(request_of())["epochs"] == 2
    longer = request_of("trainer.max_epochs=4")
    complete = getattr(RunFolder, killed_in)

    def killed(folder: RunFolder, *args: Any, **values: Any) -> None:
        complete(folder, *args, **values)
        if "pid" not in values:  # claiming the folder
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, killed_in, killed)
        patch.setattr(RunFolder, "write_result", lambda *_: None)  # a killed process writes nothing
        with pytest.raises(run.RunFailedError):
            run.execute_run(longer)
    assert run.read_finished_result(longer.folder, longer.settings) is None
    assert run.execute_run(longer)["epochs"] == 4
    assert run.execute_run(longer)["epochs"] == 4


def test_a_run_that_ended_early_is_finished_if_as_many_epochs_as_it_has_are_requested(
    request_of: Callable[..., RunRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = FakeExperiment.run
    monkeypatch.setattr(FakeExperiment, "run", lambda self, resumes: complete(self, resumes) | {"epochs": 2})
    result = run.execute_run(request_of("trainer.max_epochs=4"))
    monkeypatch.setattr(FakeExperiment, "run", lambda *_: pytest.fail("trained again"))
    assert run.execute_run(request_of("trainer.max_epochs=2")) == result
    more = request_of("trainer.max_epochs=3")
    assert run.read_finished_result(more.folder, more.settings) is None
    with pytest.raises(UserError, match=r"^trainer.max_epochs=1: the run has already trained for 2 epochs; give as"):
        run.execute_run(request_of("trainer.max_epochs=1"))


def test_a_sweep_skips_a_finished_job_that_was_extended(request_of: Callable[..., RunRequest]) -> None:
    result = run.execute_run(request_of("trainer.max_epochs=4"))
    shorter = request_of("trainer.max_epochs=2")
    shorter.settings = shorter.settings.model_copy(
        update={"sweep": shorter.settings.sweep.model_copy(update={"keys": ["seed"]})}
    )
    assert run.execute_run(shorter) == result


def test_another_experiment_that_began_in_the_meantime_is_not_this_one(
    request_of: Callable[..., RunRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = run.prepare

    def meanwhile(data: Any) -> None:
        monkeypatch.setattr(run, "prepare", prepare)
        run.execute_run(replace(request_of("optimizer.lr=0.1"), overrides=["optimizer.lr=0.1", "name=run"]))

    monkeypatch.setattr(run, "prepare", meanwhile)
    header = r"belongs to another experiment \(optimizer.lr=0.1 name=run\); give another name=…, .*:"
    with pytest.raises(UserError, match=rf"{header}\n  optimizer.lr: 0.1 in the existing run, 0.2 in this command$"):
        run.execute_run(request_of("optimizer.lr=0.2"))


def test_a_finished_run_says_with_which_precision_and_processes_it_was_trained_if_others_are_requested(
    request_of: Callable[..., RunRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    run.execute_run(request_of())
    precision, processes = "trainer.precision=64-true", ["trainer.strategy=ddp", "trainer.devices=2"]
    for words, other in (
        ([], ""),
        ([precision], " with trainer.precision=32-true"),
        (processes, " with 1 process"),
        ([precision, *processes], " with trainer.precision=32-true and 1 process"),
    ):
        capsys.readouterr()
        run.execute_run(request_of(*words))
        assert f"run is finished{other}; to train again, give" in capsys.readouterr().out


def test_a_finished_run_is_not_the_result_of_other_images(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add_sum(experiment: FakeExperiment, resumes: int = 0) -> dict[str, Any]:
        assert isinstance(experiment.settings.data, FolderData)
        cache = open_folder(experiment.settings.data)
        return run_fake(experiment) | {"images_sha256": cache.fingerprint, "images": cache.counts}

    run_fake = FakeExperiment.run
    monkeypatch.setattr(FakeExperiment, "run", add_sum)
    monkeypatch.setattr(experiment, "Experiment", FakeExperiment)

    def request_of(root: Path) -> RunRequest:
        data = folder_data(root, cache=str(tmp_path / "cache"))
        return RunRequest(settings().model_copy(update={"data": data}), RunFolder(tmp_path / "run"))

    first = write_folder(tmp_path / "first", {"train": 8, "val": 2})
    result = run.execute_run(request_of(first))
    moved = first.rename(tmp_path / "moved")
    assert run.execute_run(request_of(first)) == run.execute_run(request_of(moved)) == result
    other = write_folder(tmp_path / "other", {"train": 9, "val": 2})
    refused = r": has other images, or in other parts, than .*first had in the finished run .*run; give another"
    with pytest.raises(UserError, match=f"other{refused}"):
        run.execute_run(request_of(other))
    # In the same place the same pixels in the same order, of another part; in a new process, which lists them again.
    moved.rename(first)
    (first / "val").rename(first / "test")
    monkeypatch.setattr(splits, "_opened", {})
    with pytest.raises(UserError, match=f"first{refused}"):
        run.execute_run(request_of(first))


def test_a_result_that_lacks_a_part_is_named(request_of: Callable[..., RunRequest]) -> None:
    request = request_of()
    result = run.execute_run(request)
    request.folder.write_result({"status": "finished", "metrics": {"test/acc": 0.5}, "epochs": "2"})
    with pytest.raises(UserError) as refused:
        run.execute_run(request)
    wrong = "these entries are missing or have the wrong type: epochs, steps, train_seconds, parameters, weights_sha256"
    assert str(refused.value) == f"{request.folder.result}: {wrong}; remove the file and run the command again"
    metrics = result["metrics"] | {"test/acc": "0.5", "val/loss": [1.0]}
    request.folder.write_result(result | {"metrics": metrics, "best_weights_sha256": 5, "images_per_second": "7"})
    wrong = "wrong type: best_weights_sha256, images_per_second, metrics.test/acc, metrics.val/loss; remove the file"
    with pytest.raises(UserError, match=re.escape(wrong)):
        run.execute_run(request)


def test_a_refused_extension_leaves_the_run_as_it_was(
    request_of: Callable[..., RunRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(experiment: FakeExperiment, resumes: int = 0) -> None:
        raise UserError("trainer: refused")

    request = request_of()
    request.folder.checkpoints.mkdir(parents=True)
    request.folder.last.write_bytes(b"weights")
    monkeypatch.setattr(run, "read_settings", lambda folder: request.settings)
    run.execute_run(request)

    def files() -> dict[str, bytes]:
        return {
            path.name: path.read_bytes()
            for path in (*request.folder.config.parent.glob("*.yaml"), request.folder.result)
        }

    before, state = files(), request.folder.read_state()
    assert before.keys() == {"config.yaml", "overrides.yaml", "result.json"}
    longer = request_of("trainer.max_epochs=4")
    with monkeypatch.context() as patch:
        patch.setattr(FakeExperiment, "run", refuse)
        with pytest.raises(UserError, match="trainer: refused"):
            run.execute_run(longer)
        assert files() == before
        assert request.folder.read_state() == state  # nor does it count as a resume
        # Once something was trained, the earlier result is that of other weights.
        patch.setattr(FakeExperiment, "run", lambda *_: request.folder.last.write_bytes(b"others") and refuse(*_))
        with pytest.raises(UserError, match="trainer: refused"):
            run.execute_run(longer)
    assert not request.folder.result.exists()


def test_a_folder_with_files_of_another_program_is_refused(request_of: Callable[..., RunRequest]) -> None:
    request = request_of()
    request.folder.path.mkdir()
    names = ("metrics.csv", "events.out.tfevents.1.other", ".draft.tmp")
    for name in names:
        (request.folder.path / name).write_text("mine")
    found = r"run: contains metrics.csv, events.out.tfevents.1.other but no run; a new run would overwrite them"
    with pytest.raises(UserError, match=found):
        run.execute_run(request)
    assert {path.name: path.read_text() for path in request.folder.path.iterdir()} == dict.fromkeys(names, "mine")
    for name in names[:2]:
        (request.folder.path / name).unlink()
    run.execute_run(request)
    assert (request.folder.path / ".draft.tmp").read_text() == "mine"  # not a name that a run's files have


def test_ctrl_c_before_training_leaves_nothing(
    request_of: Callable[..., RunRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    request = request_of()
    for place in ("__init__", "run"):  # before and after the request is written
        with monkeypatch.context() as patch:
            patch.setattr(FakeExperiment, place, interrupted)
            with pytest.raises(KeyboardInterrupt):
                run.execute_run(request)
        assert not request.folder.path.exists()
    # A run that has progress keeps it, and its log says what ended the command.
    run.execute_run(request)
    monkeypatch.setattr(FakeExperiment, "__init__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.execute_run(request_of("trainer.max_epochs=4"))
    assert request.folder.read_result()
    assert "stopped by Ctrl-C at the start" in request.folder.log.read_text()


def test_a_folder_without_its_hidden_files_is_not_continued_by_another_experiment(
    request_of: Callable[..., RunRequest],
) -> None:
    first, other = request_of(), request_of("seed=3")
    hyper_parameters = {"settings": first.settings.model_dump(mode="json")}
    checkpoint = {"state_dict": {}, "hyper_parameters": hyper_parameters, "global_step": 1, "epoch": 0}
    AtomicCheckpointIO().save_checkpoint(checkpoint, first.folder.last)
    with pytest.raises(
        UserError, match=r"belongs to another experiment; (?s:.*)seed: 0 in the existing run, 3 in this command"
    ):
        run.execute_run(other)
    assert not first.folder.config.exists()
    assert run.execute_run(first)["resumes"] == 1


def test_a_run_that_waits_for_another_process_can_be_stopped(
    request_of: Callable[..., RunRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    waiting = request_of()
    waiting.wait, waiting.stop.signum = True, signal.SIGTERM
    with waiting.folder.claim(), pytest.raises(StoppedError):
        run.execute_run(waiting)
    assert "which is working on this run" in capsys.readouterr().out
    assert not waiting.folder.result.exists()


def test_a_failed_run_that_is_refused_afterwards_still_says_why_it_failed(
    request_of: Callable[..., RunRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that failed before its first checkpoint has nothing else to show."""

    def fail_at_the_start(experiment: FakeExperiment, resumes: int = 0) -> None:
        raise RuntimeError("out of memory")

    def refuse(experiment: FakeExperiment, resumes: int = 0) -> None:
        raise UserError("trainer: refused")

    for run_or_refuse, expected in ((fail_at_the_start, run.RunFailedError), (refuse, UserError)):
        monkeypatch.setattr(FakeExperiment, "run", run_or_refuse)
        request = request_of(*(["trainer.log_every_n_steps=7"] if run_or_refuse is refuse else []))
        with pytest.raises(expected):
            run.execute_run(request)
        result = json.loads(request.folder.result.read_text())
        assert (result["status"], result["error"]) == ("failed", "RuntimeError: out of memory")
        assert "log_every_n_steps: 7" not in request.folder.config.read_text()


@pytest.mark.parametrize("failed_before", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_another_process_ended_in_the_meantime_is_not_run_again(
    request_of: Callable[..., RunRequest], monkeypatch: pytest.MonkeyPatch, fails: bool, failed_before: bool
) -> None:
    trained: list[int] = []

    def train(_: FakeExperiment) -> None:
        trained.append(1)
        if fails and len(trained) < 3:
            raise RuntimeError

    monkeypatch.setattr(FakeExperiment, "train", train)
    if failed_before:  # which is no reason not to try again
        monkeypatch.setattr(FakeExperiment, "train", lambda _: 1 / 0)
        with pytest.raises(run.RunFailedError):
            run.execute_run(request_of())
        monkeypatch.setattr(FakeExperiment, "train", train)
    claim = RunFolder.claim

    def claim_late(folder: RunFolder, wait: Any = None) -> Any:
        monkeypatch.setattr(RunFolder, "claim", claim)
        with pytest.raises(run.RunFailedError) if fails else contextlib.nullcontext():
            run.execute_run(request_of())
        return claim(folder, wait)

    monkeypatch.setattr(RunFolder, "claim", claim_late)
    if fails:
        with pytest.raises(run.RunFailedError):
            run.execute_run(request_of())
        assert trained == [1] * (1 + failed_before)
    else:
        assert run.execute_run(request_of())["status"] == "finished"
        assert trained == [1]


def test_the_commit_is_that_of_the_start_and_those_of_resumes_are_kept(
    request_of: Callable[..., RunRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = SimpleNamespace(current="first")
    monkeypatch.setattr(run, "read_git_commit", lambda: commits.current)
    monkeypatch.setattr(run, "read_versions", dict)

    def change(_: FakeExperiment) -> None:
        commits.current = "changed while training"

    monkeypatch.setattr(FakeExperiment, "train", change)
    started = request_of()
    result = run.execute_run(started)
    assert (result["git_commit"], result["resumes"]) == ("first", 0)
    assert "resumed_with" not in result
    run_id = started.folder.read_state()["run_id"]

    monkeypatch.setattr(FakeExperiment, "train", lambda _: None)
    for commit in ("first", "second"):
        started.folder.result.unlink()
        commits.current = commit
        result = run.execute_run(started)
    assert (result["git_commit"], result["resumes"]) == ("first", 2)
    assert started.folder.read_state()["run_id"] == run_id
    assert result["resumed_with"] == [{"versions": {}, "git_commit": "second"}]
    assert "own_code" not in result


def test_the_files_of_own_classes_are_those_of_the_start_and_changed_ones_are_those_of_a_resume(
    request_of: Callable[..., RunRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(run, "read_git_commit", lambda: None)
    monkeypatch.setattr(versions, "read_git_commit", lambda file: f"of {Path(file).name}")
    source = tmp_path / "own_part.py"
    targets = {"own": "own_part.Own", "broken": "no_such.Own", "known": "lightning.Callback"}
    request = request_of(*(f"+callbacks.{key}._target_={target}" for key, target in targets.items()))
    found, expected = [], []
    for content in ("class Own: pass", "class Own: pass  # changed"):
        source.write_text(content)
        found.append(run.execute_run(request))
        sha = sha256(content.encode()).hexdigest()[:16]
        expected.append({"own_part": {"sha256": sha, "git_commit": "of own_part.py"}})
        source.write_text("class Own: ...  # changed while the first one is in use")
        assert versions.read_own_code(request.settings) == expected[-1]
        request.folder.result.unlink()
        del sys.modules["own_part"]  # as in a new process
        importlib.invalidate_caches()
    first, resumed = found
    assert first["own_code"] == resumed["own_code"] == expected[0]
    assert [start["own_code"] for start in resumed["resumed_with"]] == expected[1:]


def test_numbers_as_keys_of_a_callback_are_numbers_when_the_run_is_resumed_from_its_config(
    request_of: Callable[..., RunRequest],
) -> None:
    target = "_target_: lightning.pytorch.callbacks.GradientAccumulationScheduler"
    started = request_of(f"+callbacks.later={{{target}, scheduling: {{0: 1, 4: 2}}}}")
    run.execute_run(started)
    assert run.read_settings(started.folder) == started.settings
    assert run.read_settings(started.folder).callbacks["later"]["scheduling"] == {0: 1, 4: 2}


def test_the_commit_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    source = tmp_path / "versions.py"
    source.write_text("1")
    monkeypatch.setattr(versions, "__file__", str(source))
    assert versions.read_git_commit() is None  # no checkout
    installed = tmp_path / "site" / "nin" / "runs" / "versions.py"
    (noted := tmp_path / "site" / "network_in_network-0.1.0.dist-info").mkdir(parents=True)
    (noted / "METADATA").write_text("Name: network-in-network\nVersion: 0.1.0\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    for origin, commit in (({"dir_info": {}}, None), ({"vcs_info": {"vcs": "git", "commit_id": "a" * 40}}, "a" * 40)):
        (noted / "direct_url.json").write_text(json.dumps({"url": "file:///clone"} | origin))
        installed.parent.mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(versions, "__file__", str(installed))
        assert versions.read_git_commit() == commit
        monkeypatch.setattr(versions, "__file__", str(source))
        assert versions.read_git_commit() is None  # other code than was installed
    shutil.rmtree(tmp_path / "site")
    git("init")
    git("commit", "--allow-empty", "-m", "theirs")
    assert versions.read_git_commit() is None  # installed inside somebody else's checkout
    git("add", ".")
    git("commit", "-m", "x")
    assert versions.read_git_commit() == git("rev-parse", "HEAD")
    source.write_text("2")
    assert versions.read_git_commit() == git("rev-parse", "HEAD") + "+"
    monkeypatch.undo()
    assert versions.read_git_commit(str(source)) == git("rev-parse", "HEAD") + "+"


def fill_memory(_: FakeExperiment) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def flatten(_: FakeExperiment) -> None:
    """As in a network of the user's own, with maps in the channels-last format."""
    torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last).view(2, -1)


@pytest.mark.parametrize(
    ("train", "error", "remedy"),
    [
        (fill_memory, "Tried to allocate 20.00 GiB.", "start another run with a smaller data.batch_size"),
        (flatten, "view size is not compatible", "set speed.channels_last=false, or use .reshape()"),
    ],
)
def test_an_error_with_a_known_remedy_fails_with_it(
    request_of: Callable[..., RunRequest],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    train: Callable[[FakeExperiment], None],
    error: str,
    remedy: str,
) -> None:
    monkeypatch.setattr(FakeExperiment, "train", train)
    started = request_of()
    with pytest.raises(run.RunFailedError):  # exit status 1
        run.execute_run(started)
    for text in (started.folder.log.read_text(), capsys.readouterr().err, started.folder.read_result()["error"]):
        assert error in text
        assert remedy in text


def test_another_rank_than_the_first_fails_with_its_traceback(
    request_of: Callable[..., RunRequest], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Let out, an OSError would be taken for one of the run's folder.
    monkeypatch.setattr(FakeExperiment, "train", lambda _: Path("images_of_node_2").read_bytes())
    request = dataclasses.replace(request_of(), rank=1)
    request.folder.checkpoints.mkdir(parents=True)  # by rank 0
    with pytest.raises(run.RunFailedError):
        run.execute_run(request)
    printed = capsys.readouterr().err
    assert "rank 1 failed" in printed
    assert "FileNotFoundError: [Errno 2] No such file or directory: 'images_of_node_2'" in printed


@pytest.mark.parametrize(
    ("variables", "status"),
    [({"LOCAL_RANK": "1"}, 0), ({}, 143), ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 143)],
)
def test_another_rank_that_lightning_started_ends_well_after_a_stop(
    variables: dict[str, str], status: int, request_of: Callable[..., RunRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    # With a status other than 0, Lightning would kill rank 0, which may still be writing. torchrun gives the status on.
    def stop(_: FakeExperiment) -> None:
        raise StoppedError(signal.SIGTERM)

    monkeypatch.setattr(FakeExperiment, "train", stop)
    request = dataclasses.replace(request_of(), rank=1)
    request.folder.checkpoints.mkdir(parents=True)  # by rank 0
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoppedError) as stopped:
        run.execute_run(request)
    assert stopped.value.exit_status == status
