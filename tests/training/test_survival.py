"""A run that was stopped, killed or damaged anywhere ends as the run that was left alone."""

import contextlib
import csv
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from helpers import ENVIRONMENT, GATED, SMALL, broken_pipe, gated, nin, outcome, run_experiment, start, wait_for
from nin import cli
from nin.checkpoints import files as checkpoint_files
from nin.checkpoints.checkpoint_io import AtomicCheckpointIO
from nin.checkpoints.files import resume_candidates
from nin.config.composition import compose_config
from nin.config.schema import Settings, UserError
from nin.config.validation import validate
from nin.runs.folder import RunFolder
from nin.system.processes import StoppedError, StopRequest
from nin.training import evaluation, experiment
from nin.training.callbacks import metrics
from nin.training.classifier import Classifier
from nin.training.request import RunRequest
from nin.training.run import execute_run

# ---------------------------------------------------------------------------------------------------------------------
# In this process: the interruption comes at an exact place, as a signal or as an exception that nobody catches.


class KilledError(Exception):
    pass


TIME = event_file_writer.time.time


@pytest.fixture(autouse=True)
def a_second_for_every_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard names event files by the second, and nobody starts a process twice in one; these tests do."""
    seconds = itertools.count(1_700_000_000)
    monkeypatch.setattr(event_file_writer.time, "time", lambda: float(next(seconds)))


class Interruption(Callback):
    """Sends SIGTERM, or raises, at the beginning of the n-th batch, be it for training, validation or test."""

    def __init__(self, batch: int, kill: bool):
        self.left, self.kill = batch, kill

    def on_train_batch_start(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0 and self.kill:
            raise KilledError
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    on_validation_batch_start = on_test_batch_start = on_train_batch_start


def trained(
    settings: Settings, folder: Path, batch: int | None = None, kill: bool = False
) -> tuple[dict[str, Any], int]:
    """The result of a run that is interrupted at the n-th batch of every start, and how often it was."""
    for interruptions in range(50):
        callbacks = [Interruption(batch, kill)] if batch else []
        with contextlib.suppress(StoppedError, KilledError):
            return run_experiment(settings, RunFolder(folder), callbacks=callbacks), interruptions
    raise AssertionError("the run never ends")


def stopped(settings: Settings, folder: RunFolder, batch: int) -> None:
    """Leaves the run as it is when a stop is requested at the n-th batch."""
    with pytest.raises(StoppedError):
        run_experiment(settings, folder, callbacks=[Interruption(batch, kill=False)])


def record(folder: Path) -> tuple[list[dict[str, str]], dict[str, list[tuple[int, float]]]]:
    """metrics.csv and every scalar curve, without what a clock measured."""
    clocks = ("seconds", "images_per_second", "while_training/images_per_second")
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    curves = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return [{k: v for k, v in row.items() if k not in clocks} for row in rows], {
        tag: [(step, 0.0 if tag in clocks else value) for step, value in curve] for tag, curve in curves.items()
    }


@pytest.mark.parametrize(
    "overrides",
    [
        "schedule=one_cycle data.augment=flip_shift data.normalize=true model.init=kaiming_dirac_pca optimizer=sgd "
        "optimizer.lr=0.1 optimizer.momentum=0.9 checkpoint.every_n_steps=3",
        pytest.param(
            "schedule=cosine trainer.accumulate_grad_batches=2 trainer.limit_train_batches=7", marks=pytest.mark.long
        ),
        "trainer.val_check_interval=0.5 checkpoint.every_n_steps=1",
        pytest.param("trainer.check_val_every_n_epoch=2", marks=pytest.mark.long),
        pytest.param("trainer.limit_val_batches=0", marks=pytest.mark.long),
        pytest.param("trainer.max_steps=9 trainer.precision=bf16-true", marks=pytest.mark.long),
        pytest.param("trainer.precision=64-true data.normalize=true", marks=pytest.mark.long),
        pytest.param("data.val_size=0 data.score_each_epoch=test", marks=pytest.mark.long),
        pytest.param(
            "callbacks=early_stopping callbacks.early_stopping.patience=1 trainer.max_epochs=5", marks=pytest.mark.long
        ),
        # The eighth batch is of a validation, for which Lightning has exchanged the weights for their average.
        pytest.param("callbacks=ema callbacks.ema.decay=0.9", marks=pytest.mark.long),
        pytest.param("model.norm=none model.dropout=0.5 trainer.num_sanity_val_steps=2", marks=pytest.mark.long),
        # The eighth batch is of a validation between two batches whose gradients are added up.
        pytest.param(
            "trainer.accumulate_grad_batches=2 trainer.limit_train_batches=9 trainer.val_check_interval=7",
            marks=pytest.mark.long,
        ),
        # Early stopping ends it after two epochs, and min_epochs continues it for two more.
        pytest.param(
            "callbacks=early_stopping callbacks.early_stopping.patience=1 +callbacks.early_stopping.min_delta=1.0 "
            "trainer.max_epochs=5 trainer.min_epochs=4",
            marks=pytest.mark.long,
        ),
    ],
)
def test_interrupted_anywhere_it_is_the_same_run(
    settings: Callable[..., Settings], tmp_path: Path, overrides: str
) -> None:
    requested = [*overrides.split(), "~callbacks.images"]
    uninterrupted, _ = trained(settings(*requested), tmp_path / "uninterrupted")
    curves = record(tmp_path / "uninterrupted")
    for steps in curves[1].values():
        assert all(a[0] < b[0] for a, b in itertools.pairwise(steps))
    for batch, kill in ((5, True), (8, False)):
        # A kill without a checkpoint in between would come at the same place for ever.
        often = ["checkpoint.every_n_steps=1"] if kill else []
        folder = tmp_path / f"{batch}"
        result, interruptions = trained(settings(*requested, *often), folder, batch, kill)
        assert interruptions > 0
        assert outcome(result) == outcome(uninterrupted)
        assert (result["steps"], result["epochs"]) == (uninterrupted["steps"], uninterrupted["epochs"])
        rows, resumed = record(folder)
        assert rows == curves[0]
        assert resumed.keys() == curves[1].keys()
        assert {tag: curve for tag, curve in resumed.items() if curve != curves[1][tag]} == {}


def test_an_extended_run_ends_as_if_all_epochs_had_been_requested_at_once(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In float64, for which Lightning has two names; its Trainer then says "64-true".
    requested = ["schedule=constant", "~callbacks.images", "trainer.precision=64"]
    at_once, _ = trained(settings(*requested), tmp_path / "at_once")
    trained(settings(*requested, "trainer.max_epochs=1"), tmp_path / "extended")
    extended, _ = trained(settings(*requested), tmp_path / "extended")
    assert outcome(extended) == outcome(at_once)
    assert record(tmp_path / "extended") == record(tmp_path / "at_once")
    assert extended["train_seconds"] > 0
    best = checkpoint_files.read(RunFolder(tmp_path / "extended").best)
    weights = best["state_dict"]["network.0.0.weight"]
    assert weights.dtype == torch.float64
    assert not torch.equal(weights, weights.float().double())
    test, used = evaluation.test, []
    monkeypatch.setattr(evaluation, "test", lambda *arguments: used.append(arguments[1]) or test(*arguments))
    tested, _ = evaluation.evaluate_weights(settings(*requested), best)
    assert torch.equal(used[0].state_dict()["network.0.0.weight"], weights)  # not rounded to float32
    assert tested == {name: value for name, value in extended["metrics"].items() if name.startswith("test/")}


class Clock(Callback):
    """Stands in for ``time``: a batch of training takes 100 seconds, one of validation 1, and nothing else any."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def on_train_batch_start(self, *_: Any) -> None:
        self.now += 100

    def on_validation_batch_start(self, *_: Any) -> None:
        self.now += 1


def test_the_time_of_a_run_is_that_of_all_its_starts_and_of_its_validations(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, requested, folder = Clock(), settings("logger=none", "callbacks=none"), RunFolder(tmp_path)
    monkeypatch.setattr(metrics, "time", clock)
    with pytest.raises(StoppedError):
        run_experiment(requested, folder, callbacks=[clock, Interruption(11, kill=False)])
    clock.now += 5000  # until it is started again
    result = run_experiment(requested, folder, callbacks=[clock])
    assert result["train_seconds"] == 1204  # two epochs of six batches, each with a validation of two
    assert result["images_per_second"] == 0.3  # 384 images in 1200 seconds
    assert [row["seconds"] for row in folder.read_epochs()] == [602, 1204]


# ---------------------------------------------------------------------------------------------------------------------
# Damage.


@pytest.fixture(scope="module")
def stopped_run(
    settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Settings, Path, dict[str, Any]]:
    """The folder of a run that was stopped in its second epoch, and the result that it is to have."""
    folder = tmp_path_factory.mktemp("stopped")
    requested = settings("~callbacks.images", "checkpoint.every_n_steps=2")
    with pytest.MonkeyPatch.context() as patch:
        seconds = itertools.count(1_600_000_000)  # before those of the tests that resume it
        patch.setattr(event_file_writer.time, "time", lambda: float(next(seconds)))
        uninterrupted, _ = trained(requested, folder / "uninterrupted")
        stopped(requested, RunFolder(folder / "half"), batch=11)
    return requested, folder / "half", uninterrupted


HalfDone = tuple[Settings, RunFolder, dict[str, Any]]


@pytest.fixture
def half_done(stopped_run: tuple[Settings, Path, dict[str, Any]], tmp_path: Path) -> HalfDone:
    """A copy of the stopped run."""
    requested, folder, uninterrupted = stopped_run
    shutil.copytree(folder, tmp_path / "half")
    return requested, RunFolder(tmp_path / "half"), uninterrupted


def cut_off(path: Path) -> None:
    os.truncate(path, random.Random(0).randrange(path.stat().st_size))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(1).randrange(len(content))] ^= 0x10
    path.write_bytes(content)


def flip_in_the_checksum(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x01
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [cut_off, flip, flip_in_the_checksum, empty, folder_instead])
def test_a_damaged_last_checkpoint_is_set_aside_and_the_one_before_it_used(
    half_done: HalfDone, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    requested, folder, uninterrupted = half_done
    damage(folder.last)
    result = run_experiment(requested, folder)
    assert outcome(result) == outcome(uninterrupted)
    assert (folder.checkpoints / "last.ckpt.damaged-0").exists()
    assert "renamed to last.ckpt.damaged-0" in caplog.text


def test_with_no_good_checkpoint_left_nothing_is_begun_again(half_done: HalfDone) -> None:
    requested, folder, _ = half_done
    candidates = resume_candidates(folder)
    assert [path.name for path in candidates] == ["last.ckpt", "last-1.ckpt", "last-2.ckpt", "best.ckpt"]
    for path in candidates:
        cut_off(path)
    for _ in range(2):
        with pytest.raises(UserError, match=r"no valid checkpoint to resume from .*last.ckpt.damaged-0.*start again"):
            run_experiment(requested, folder)


@pytest.mark.parametrize(
    ("owner", "function", "error"),
    [
        (Path, "read_bytes", OSError(5, "Input/output error")),
        (torch, "load", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")),
        (torch, "load", MemoryError()),
        (Path, "read_bytes", MemoryError()),
    ],
)
def test_a_checkpoint_that_can_not_be_read_now_is_not_taken_for_a_damaged_one(
    half_done: HalfDone, monkeypatch: pytest.MonkeyPatch, owner: Any, function: str, error: Exception
) -> None:
    requested, folder, uninterrupted = half_done

    def fail(*_: Any, **__: Any) -> None:
        raise error

    names = sorted(path.name for path in folder.checkpoints.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(owner, function, fail)
        with pytest.raises(
            UserError, match=r"last.ckpt: can't be read(: not enough memory| \(Input/output error\)); try"
        ):
            run_experiment(requested, folder)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == names
    assert run_experiment(requested, folder)["weights_sha256"] == uninterrupted["weights_sha256"]


def test_a_disk_that_is_full_costs_nothing_but_the_checkpoint(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    import resource

    requested = settings("~callbacks.images", "checkpoint.every_n_steps=2")
    uninterrupted, _ = trained(requested, tmp_path / "uninterrupted")
    folder, size = (
        RunFolder(tmp_path / "full"),
        (tmp_path / "uninterrupted" / "checkpoints" / "last.ckpt").stat().st_size,
    )
    stopped(requested, folder, batch=9)
    saved = {path.name: path.read_bytes() for path in folder.checkpoints.iterdir()}

    # The system refuses to write more than half a checkpoint, as it would with a full disk.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        with pytest.raises(OSError, match=r"could not be saved, the previous one is kept; free some space"):
            run_experiment(requested, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in folder.checkpoints.iterdir()} == saved
    result = run_experiment(requested, folder)
    assert outcome(result) == outcome(uninterrupted)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("optimizer_states", "checkpoint contains only the model"),
        ("hyper_parameters", "no valid checkpoint"),
        ("a weight", "weight is missing"),
    ],
)
def test_a_checkpoint_that_lacks_something_says_so(half_done: HalfDone, missing: str, message: str) -> None:
    requested, folder, _ = half_done
    content = torch.load(folder.last, weights_only=True)
    if missing == "a weight":
        del content["state_dict"]["network.0.0.weight"]
    else:
        del content[missing]
    for path in resume_candidates(folder):
        path.unlink(missing_ok=True)
    content["callbacks"]["ResumableCheckpoint"]["best"] = {}  # best.ckpt is removed too, from which it would resume
    AtomicCheckpointIO().save_checkpoint(content, folder.last)
    with pytest.raises(UserError, match=message):
        run_experiment(requested, folder)


def test_another_number_of_processes_is_another_experiment(half_done: HalfDone) -> None:
    requested, folder, _ = half_done
    content = checkpoint_files.read(folder.last)
    content["callbacks"]["ResumableCheckpoint"]["processes"] *= 2
    AtomicCheckpointIO().save_checkpoint(content, folder.last)
    with pytest.raises(UserError, match=r"trainer.devices: the run was started with 2 processes and would now have 1,"):
        run_experiment(requested, folder)


class Unreadable(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"where": Path()}


def test_a_callback_whose_state_could_not_be_read_again_is_refused_before_the_first_step(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Classifier, "training_step", lambda *_: pytest.fail("a step was taken"))
    requested = settings(
        f"+callbacks.mine._target_={__name__}.Unreadable",
        "trainer.max_epochs=1",
        "+logger.csv={_target_: lightning.pytorch.loggers.CSVLogger}",
    )
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"callbacks: the state of Unreadable holds a pathlib.*PosixPath, which"):
        execute_run(RunRequest(requested, RunFolder(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_logger_of_ones_own_is_resumed_too(settings: Callable[..., Settings], tmp_path: Path) -> None:
    def rows(path: Path) -> list[dict[str, str]]:
        """Without empty cells, and without what a clock measured."""
        lines = csv.DictReader(path.read_text().splitlines())
        return [{k: v for k, v in line.items() if v and k != "images_per_second"} for line in lines]

    requested = settings("logger=csv", "~logger.csv.version", "callbacks=none")
    trained(requested, tmp_path / "uninterrupted")
    folder = RunFolder(tmp_path / "stopped")
    stopped(requested, folder, batch=9)
    run_experiment(requested, folder)
    first, second = (rows(folder.path / f"version_{i}" / "metrics.csv") for i in (0, 1))
    assert [row["step"] for row in first] == ["4", "6", "6"]
    assert first + second == rows(tmp_path / "uninterrupted" / "version_0" / "metrics.csv")
    given = [(folder.path / f"version_{i}" / "hparams.yaml").read_text() for i in (0, 1)]
    assert given[0] == given[1]
    assert "optimizer.lr: 0.005\n" in given[1]


def test_lost_and_shortened_event_files_are_reported(half_done: HalfDone, caplog: pytest.LogCaptureFixture) -> None:
    requested, folder, uninterrupted = half_done
    (events,) = folder.event_files()
    os.truncate(events, events.stat().st_size // 2)
    step = checkpoint_files.read(folder.last)["global_step"]
    result = run_experiment(requested, folder)
    assert result["weights_sha256"] == uninterrupted["weights_sha256"]
    assert f"curves have a gap before step {step}: {events.name}" in caplog.text


def test_what_a_resumed_run_is_started_with(half_done: HalfDone, monkeypatch: pytest.MonkeyPatch) -> None:
    requested, folder, _ = half_done
    before = checkpoint_files.read(folder.last)["hyper_parameters"]["settings"]["threads"]
    monkeypatch.setenv("NIN_THREADS", str(before + 1))  # a machine with more cores
    resumed = experiment.Experiment(RunRequest(requested, folder))
    assert resumed.settings.threads == before
    (logger,) = experiment.build_trainer(requested, folder.path, [], resume_step=9).loggers
    assert logger._kwargs["purge_step"] == 9


def change(path: Path, **changes: Any) -> None:
    """Replaces parts of a checkpoint, named by their keys, with a valid checksum."""
    content = checkpoint_files.read(path)
    for keys, value in changes.items():
        *parents, last = keys.split("__")
        part = content
        for key in parents:
            part = part[int(key) if key.isdigit() else key]
        part[int(last) if last.isdigit() else last] = value
    AtomicCheckpointIO().save_checkpoint(content, path)


def test_the_state_of_another_run_is_not_continued(half_done: HalfDone) -> None:
    requested, folder, _ = half_done
    content = folder.last.read_bytes()
    state = "callbacks__ResumableCheckpoint"
    changes: list[tuple[dict[str, Any], str]] = [
        ({f"{state}__format": 0}, "can't be resumed: it has no state of the training, or that of another version of"),
        ({"hyper_parameters__settings__seed": 5}, "seed: 5 in the existing run, 0 in this command"),
        ({f"{state}__run_id": "b" * 32}, "was saved by another run (id bbbbbbbb…, the folder has aaaaaaaa…)"),
    ]
    folder.update_state(run_id="a" * 32)
    for changed, message in changes:
        folder.last.write_bytes(content)
        change(folder.last, **changed)
        with pytest.raises(UserError) as refused:
            experiment.Experiment(RunRequest(requested, folder))
        assert message in str(refused.value)
    # A folder that was copied without its hidden files has the identity of its checkpoints.
    folder.state.unlink()
    assert experiment.Experiment(RunRequest(requested, folder)).run_id == "b" * 32


def test_a_state_that_can_not_be_restored_is_named(half_done: HalfDone, caplog: pytest.LogCaptureFixture) -> None:
    requested, folder, uninterrupted = half_done
    content = folder.last.read_bytes()
    caplog.set_level("INFO")
    for changed in (
        {"optimizer_states": []},
        {"optimizer_states__0__state": {}},
        {"optimizer_states__0__state__0": {}},
        {"optimizer_states__0__state__0__exp_avg": torch.zeros(10_000)},  # with fewer, the step itself would crash
        {"lr_schedulers": []},
        {"lr_schedulers__0": {}},
        {"loops__fit_loop__epoch_loop.val_loop.batch_progress": 1.5},
        {"callbacks__MetricsLogger": {"rows": []}},
        {"callbacks__ResumableCheckpoint__batches": None},
        {"callbacks__ResumableCheckpoint__batches": {"batch": 4}},
        {"callbacks__ResumableCheckpoint__processes": [{"random_state": {"python": 5}, "metrics": {}}]},
    ):
        folder.last.write_bytes(content)
        change(folder.last, **changed)
        caplog.clear()
        with pytest.raises(UserError) as refused:
            run_experiment(requested, folder)
        named = r"last.ckpt: can't be resumed: its state could not be restored \(\w+Error: "
        assert re.search(named, str(refused.value)), changed
        assert "Traceback" in caplog.text
    folder.last.unlink()  # as the message says
    result = run_experiment(requested, folder)
    assert outcome(result) == outcome(uninterrupted)


def test_killed_between_the_first_best_and_the_first_last_it_resumes_from_the_best(half_done: HalfDone) -> None:
    requested, folder, uninterrupted = half_done
    for path in resume_candidates(folder)[:-1]:
        path.unlink()
    result = run_experiment(requested, folder)
    assert outcome(result) == outcome(uninterrupted)


def test_other_weights_are_not_tested_in_place_of_a_best_checkpoint_that_is_gone(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    requested, folder = settings("~callbacks.images"), RunFolder(tmp_path / "run")
    trained(requested, folder.path)
    change(folder.best, **{"state_dict__network.0.0.weight": checkpoint_files.read(folder.best)["state_dict"][
        "network.0.0.weight"] * float("nan")})  # fmt: skip
    with pytest.raises(UserError, match=r"network.0.0.weight has values that are NaN or infinite"):
        run_experiment(requested, folder)
    folder.best.unlink()
    with pytest.raises(UserError, match=r"best.ckpt: is missing, and the run would end with the test of a worse"):
        run_experiment(requested, folder)


def test_metrics_csv_that_was_removed_is_written_again_where_no_step_is_left(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    requested, folder = settings("~callbacks.images"), RunFolder(tmp_path / "run")
    trained(requested, folder.path)
    rows = folder.read_epochs()
    assert len(rows) == 2
    folder.metrics.unlink()
    run_experiment(requested, folder)
    assert folder.read_epochs() == rows


def test_fewer_epochs_than_are_done_are_refused_and_change_nothing(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    requested, folder = settings("~callbacks.images", "schedule=constant"), RunFolder(tmp_path / "run")
    trained(requested, folder.path)
    folder.write_request(requested.model_dump(mode="json"), [])
    folder.write_result({"status": "failed"})
    before = folder.config.read_bytes(), folder.result.read_bytes()
    fewer = requested.model_copy(update={"trainer": requested.trainer.model_copy(update={"max_epochs": 1})})
    with pytest.raises(UserError, match=r"trainer.max_epochs=1: the run has already trained for 2 epochs"):
        execute_run(RunRequest(fewer, folder))
    assert (folder.config.read_bytes(), folder.result.read_bytes()) == before


def test_a_stop_request_is_recorded_though_nobody_reads_the_message_about_it() -> None:
    """As where the reader is `tee`, which has had the Ctrl-C as well."""
    standard_error, writer = os.dup(2), broken_pipe()
    os.dup2(writer, 2)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.signum == signal.SIGINT
    finally:
        os.dup2(standard_error, 2)
        os.close(writer)
        os.close(standard_error)


def test_only_what_the_run_itself_had_half_written_is_taken_away(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (folder.checkpoints / ".ipynb_checkpoints").mkdir(parents=True)
    for name in (".fresh.ckpt", ".best.ckpt.0123456789ab.tmp", ".nfs01", "last.ckpt"):
        (folder.checkpoints / name).touch()
    with folder.claim():
        assert sorted(path.name for path in folder.checkpoints.iterdir()) == [
            ".ipynb_checkpoints",
            ".nfs01",
            "last.ckpt",
        ]


# ---------------------------------------------------------------------------------------------------------------------
# Real processes.


def test_killed_stopped_refused_and_resumed_as_a_person_would(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_file_writer.time, "time", TIME)  # as in the other processes
    monkeypatch.chdir(tmp_path)
    there, gate = {"cwd": tmp_path, "NIN_DATA": str(data_root), **GATED}, tmp_path / "gate"
    runs, words = tmp_path / "outputs" / "runs", [*SMALL, "checkpoint.every_n_steps=1", "callbacks=none", *gated(gate)]
    gate.write_text("1000")
    requested = validate(compose_config([*words, f"data.root={data_root}"]))
    expected = run_experiment(requested, RunFolder(runs / "uninterrupted"))

    # Killed once a checkpoint is there. Meanwhile nobody else may work on it, and the message names who does.
    gate.write_text("5")
    first = start("train", *words, "name=killed", **there)
    wait_for(runs / "killed" / "checkpoints" / "last.ckpt", first)
    first.send_signal(signal.SIGSTOP)  # it stays at work
    with pytest.raises(UserError, match=f"process {first.pid} on"):
        execute_run(RunRequest(requested, RunFolder(runs / "killed")))
    first.kill()
    first.communicate()

    # Another experiment under the same name is refused, with the keys.
    other = compose_config([*words, "name=killed", "optimizer.lr=0.001", "seed=3"])
    seed = r"seed: 0 in the existing run, 3 in this command"
    with pytest.raises(UserError, match=rf"{seed}\n  optimizer.lr: 0.005 in the existing run, 0.001 in this command"):
        execute_run(RunRequest(validate(other), RunFolder(runs / "killed")))

    # Requested to stop, it does at once, with a checkpoint of that step, the third of the second epoch.
    gate.write_text("8")
    third = start("train", *words, "name=killed", **there)
    wait_for(tmp_path / f"gate.{third.pid}", third)
    third.send_signal(signal.SIGINT)
    gate.write_text("1000")
    output = third.communicate(timeout=120)[0]
    assert third.returncode == 130, output
    assert "resuming from epoch" in output
    assert "last.ckpt is saved; resume with: the same command\n" in output

    assert cli.run("resume", ["outputs/runs/killed", f"callbacks.gate.path={gate}", "--allow", "gate"]) == 0
    result = json.loads((runs / "killed" / "result.json").read_text())
    assert outcome(result) == outcome(expected)
    assert record(runs / "killed") == record(runs / "uninterrupted")
    assert result["resumes"] == 2
    assert (runs / "killed" / "nin.log").read_text().count("resume #") == 2
    # What the dead process had begun to write is gone.
    assert not [path for path in (runs / "killed").rglob(".*") if path.name != ".hydra"]


# A batch that never ends.
ENDLESS = """
import time
from nin.system.processes import StopRequest
with StopRequest():
    print(flush=True)
    while True:
        time.sleep(9)
"""


def test_a_second_ctrl_c_ends_a_run_at_once() -> None:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", ENDLESS], env=ENVIRONMENT, **pipes) as process:
        try:
            assert process.stdout.readline() == "\n"
            process.send_signal(signal.SIGINT)
            assert process.stderr.readline() == "\n"
            assert process.stderr.readline() == "stopping after this batch (Ctrl-C again stops at once)\n"
            process.send_signal(signal.SIGINT)
            assert process.stderr.read() == "stopped at once\n"
            assert process.wait(60) == 130
        finally:
            process.kill()


def test_a_stop_at_max_steps_before_min_epochs_leaves_an_epoch_that_ends(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    keys = ("trainer.max_steps=2", "trainer.min_epochs=2", "logger=none", "callbacks=none")
    uninterrupted, _ = trained(settings(*keys), tmp_path / "uninterrupted")
    folder = RunFolder(tmp_path / "stopped")
    stopped(settings(*keys), folder, batch=2)
    result = run_experiment(settings(*keys), folder)
    assert outcome(result) == outcome(uninterrupted)
    (row,) = folder.read_epochs()
    assert row["val/acc"] == result["metrics"]["val/acc"]  # Lightning alone would leave out this validation


def test_the_state_of_a_model_checkpoint_in_last_ckpt_is_that_after_the_epoch(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    target = "+callbacks.own._target_=lightning.pytorch.callbacks.ModelCheckpoint"
    keys = (target, "+callbacks.own.monitor=val/acc", "+callbacks.own.save_top_k=-1", "logger=none")
    folder = RunFolder(tmp_path)
    interruption = Interruption(9, kill=True)  # the first batch of the second epoch
    with pytest.raises(KilledError):
        run_experiment(settings(*keys), folder, callbacks=[interruption])
    saved = torch.load(folder.last, weights_only=True)["callbacks"]
    (own,) = (state for name, state in saved.items() if name.startswith("ModelCheckpoint"))
    assert len(own["best_k_models"]) == 1


@pytest.mark.long
@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
@pytest.mark.parametrize(
    "overrides",
    [
        "schedule=one_cycle data.augment=flip_shift data.normalize=true model.init=kaiming_dirac_pca",
        "trainer.accumulate_grad_batches=3 trainer.limit_train_batches=7 trainer.val_check_interval=5",
        "trainer.max_steps=9 checkpoint.every_n_steps=2",
        "trainer.max_steps=9 trainer.min_epochs=4 trainer.max_epochs=5",
    ],
)
def test_interrupted_at_every_batch_it_is_the_same_run(
    settings: Callable[..., Settings], tmp_path: Path, overrides: str, kill: bool
) -> None:
    requested = settings(*overrides.split(), "~callbacks.images")
    uninterrupted, _ = trained(requested, tmp_path / "uninterrupted")
    curves = record(tmp_path / "uninterrupted")
    for batch in itertools.count(1):
        folder = RunFolder(tmp_path / f"{batch}")
        try:
            run_experiment(requested, folder, callbacks=[Interruption(batch, kill)])
            break  # the run has fewer batches
        except (StoppedError, KilledError):
            result = run_experiment(requested, folder)
        assert outcome(result) == outcome(uninterrupted), batch
        assert record(folder.path) == curves, batch
    assert batch > 12


@pytest.mark.long
def test_killed_many_times_it_is_the_same_run(tmp_path: Path, data_root: Path) -> None:
    real = os.environ.get("NIN_DATA")  # on real images where they are
    data = "fashion_mnist" if real and (Path(real) / "FashionMNIST" / "raw").is_dir() else "garments"
    there = {"cwd": tmp_path, "NIN_DATA": real if real and data == "fashion_mnist" else str(data_root)}
    requested = [
        *SMALL,
        "callbacks=none",
        f"data={data}",
        "data.augment=flip_shift",
        "trainer.limit_train_batches=250",
        "trainer.max_epochs=6",
        "checkpoint.every_n_steps=3",
    ]
    runs, draw = tmp_path / "outputs" / "runs", random.Random(data)
    assert nin("train", *requested, "name=uninterrupted", **there).returncode == 0
    expected = json.loads((runs / "uninterrupted" / "result.json").read_text())
    deaths = 0
    for death in range(20):
        process = start("train", *requested, "name=killed", **there)
        log = runs / "killed" / "nin.log"
        begun = log.read_text().count("resume #") if log.exists() else 0
        if death:
            while process.poll() is None and log.read_text().count("resume #") == begun:
                time.sleep(0.01)
        else:
            wait_for(runs / "killed" / "checkpoints" / "last.ckpt", process)
        time.sleep(draw.uniform(0, expected["train_seconds"] / 15))
        process.kill()
        process.communicate()
        deaths += process.returncode == -signal.SIGKILL
    last = nin("resume", "outputs/runs/killed", **there)
    assert last.returncode == 0, last.stderr
    result = json.loads((runs / "killed" / "result.json").read_text())
    assert outcome(result) == outcome(expected)
    assert record(runs / "killed") == record(runs / "uninterrupted")
    assert deaths > 10  # the run may have come to its end before the last of them
