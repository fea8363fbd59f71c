"""Whole searches with real runs, in the tests' own process."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import SMALL, merge, read_results
from nin import cli
from pictures import write_folder

Search = Callable[..., tuple[int, str]]


@pytest.fixture
def search(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Search:
    """Runs a search of short trials in ``tmp_path``; returns its exit status and all that it printed."""
    monkeypatch.chdir(tmp_path)
    small = [*SMALL, "callbacks=none", "logger=none", "trainer.max_epochs=1", "threads=1", f"data.root={data_root}"]

    def run(*words: str) -> tuple[int, str]:
        status = cli.run("train", ["-m", "hydra/sweeper=optuna", "name=tune", *merge([*small, *words])])
        return status, "".join(capfd.readouterr())

    return run


FAILS_WITH_SEED_5 = """
from lightning import Callback


class FailingWithSeed5(Callback):
    def on_train_start(self, trainer, pl_module):
        if pl_module.settings.seed == 5:
            raise RuntimeError("seed 5")
"""


def test_the_best_is_trained_again_with_the_final_seeds_and_a_failed_one_is_reported(
    tmp_path: Path, search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fails_with_seed_5.py").write_text(FAILS_WITH_SEED_5)
    words = ["optimizer.lr=tag(log,interval(1e-3,1e-1))", "hydra.sweeper.n_trials=2"]
    words += ["hydra.sweeper.final_seeds=[5,3,4]", "+callbacks.own={_target_: fails_with_seed_5.FailingWithSeed5}"]
    status, printed = search(*words, "++seed=1")
    assert status == 1, printed
    folder = tmp_path / "outputs/sweeps/tune"
    assert not (folder / "best.json").exists()  # the best trial is not tested as well
    results = read_results(folder)
    trials = {name: result for name, result in results.items() if name.startswith("trial-")}
    best = max(trials, key=lambda name: trials[name]["metrics"]["val/acc"])
    finals = [results[f"final-{best[-4:]}-seed={seed}"] for seed in (3, 4)]
    assert [final["seed"] for final in finals] == [3, 4]
    (lr,) = (word for word in trials[best]["overrides"] if word.startswith("optimizer.lr="))
    assert all(lr in final["overrides"] for final in finals)
    accs = [final["metrics"]["test/acc"] for final in finals]
    mean, worst, found = sum(accs) / 2, min(accs), trials[best]["metrics"]["val/acc"]
    assert f"trained again with 2 seeds: test/acc {mean:.4f} ± " in printed
    assert f"worst {worst:.4f}; the search's figure: {found:.4f}" in printed
    assert "The search's own figure is optimistic: it is the highest of many" in printed
    assert "job 5 of 5: final-" in printed
    assert f"\nfailed: final-{best[-4:]}-seed=5: RuntimeError: seed 5\n" in printed
    assert "Error executing job" not in printed  # of Hydra, with its overrides; the traceback is enough


def test_a_search_ends_at_max_failures_with_the_error_of_each_trial(tmp_path: Path, search: Search) -> None:
    words = ["optimizer.lr=tag(log,interval(1e20,1e30))", "model.norm=none", "hydra.sweeper.n_trials=6"]
    for _ in range(2):  # run again, it ends at once
        status, printed = search(*words, "hydra.sweeper.max_failures=2")
        assert status == 1, printed
        assert "the search ends: 2 trials have failed (hydra.sweeper.max_failures)" in printed
        assert "failed: trial-0001: NonFiniteLossError: the loss is nan" in printed
    folder = tmp_path / "outputs/sweeps/tune"
    assert [result["status"] for result in read_results(folder).values()] == ["failed", "failed"]
    # Nothing is drawn of no completed trial.
    assert {path.name for path in folder.glob("*.*")} >= {"summary.csv", "summary.md"}
    assert not (folder / "best.yaml").exists()
    assert not (folder / "summary.png").exists()
    assert "summary.csv, summary.md\n" in printed


FAILS_FOR_THE_MACHINE = """
import errno
from pathlib import Path

from lightning import Callback


class FailingForTheMachine(Callback):
    def __init__(self, labels):
        self.labels = Path(labels)

    def on_fit_end(self, trainer, pl_module):
        if not Path("damaged").exists():  # of the first trial
            Path("damaged").write_bytes(self.labels.read_bytes())
            self.labels.write_bytes(b"")

    def on_train_epoch_end(self, trainer, pl_module):
        if Path("full").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
"""


def test_a_trial_that_the_machine_refused_or_ended_is_resumed_by_the_same_command(
    tmp_path: Path, search: Search, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fails_for_the_machine.py").write_text(FAILS_FOR_THE_MACHINE)
    shutil.copytree(data_root / "Garments", tmp_path / "data/Garments")
    labels, folder = tmp_path / "data/Garments/raw/train-labels-idx1-ubyte", tmp_path / "outputs/sweeps/tune"
    callback = f"{{_target_: fails_for_the_machine.FailingForTheMachine, labels: {labels}}}"
    words = [
        "model.dropout=interval(0,0.5)",
        "hydra.sweeper.n_trials=2",
        "data.root=data",
        f"+callbacks.own={callback}",
    ]

    def expect_end(status: int, printed: str, error: str) -> None:
        assert status == 1, printed
        assert error in printed
        assert "the search ends: outputs/sweeps/tune/trial-0001: the machine is the reason" in printed
        report = [line for line in printed.splitlines() if "trial 1 failed" in line]
        assert report == []

    expect_end(*search(*words), "not the recorded file (0 bytes")
    labels.write_bytes((tmp_path / "damaged").read_bytes())
    (tmp_path / "full").touch()
    expect_end(*search(*words), "No space left on device")
    assert read_results(folder)["trial-0001"]["cause"] == "machine"
    (tmp_path / "full").unlink()
    status, printed = search(*words)
    assert status == 0, printed
    assert [(result["status"], "cause" in result) for result in read_results(folder).values()] == [
        ("finished", False),
        ("finished", False),
    ]


ADDS_AN_IMAGE = """
import shutil
from pathlib import Path

from lightning import Callback


class AddingAnImage(Callback):
    def on_train_end(self, trainer, pl_module):
        shutil.copy("images/train/red/0.png", "images/train/blue/new.png")
"""


def test_a_search_ends_where_the_folder_of_images_changes(
    tmp_path: Path, search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "adds_an_image.py").write_text(ADDS_AN_IMAGE)
    write_folder(tmp_path / "images", {"train": 30}, {"red": (200, 20, 20), "blue": (20, 20, 200)})
    words = ["data=folder", "data.root=images", "data.image_size=28", "data.batch_size=8", "data.val_size=8"]
    words += ["data.test_size=8", "hydra.sweeper.n_trials=3", "optimizer.lr=interval(0.001,0.01)"]
    words += ["+callbacks.own={_target_: adds_an_image.AddingAnImage}"]
    status, printed = search(*words)
    assert status == 2, printed
    message = "outputs/sweeps/tune/trial-0001: the images in the folder have changed since the search began"
    assert f"nin train: {message}" in printed
    assert sorted(read_results(tmp_path / "outputs/sweeps/tune")) == ["trial-0000", "trial-0001"]
    # It stays refused, until the images are the same again and the trial is removed.
    assert search(*words)[0] == 2
    (tmp_path / "images/train/blue/new.png").unlink()
    status, printed = search(*words)
    assert status == 2
    assert f"nin train: {message}" in printed
    shutil.rmtree(tmp_path / "outputs/sweeps/tune/trial-0001")
    status, printed = search(*merge([*words, "hydra.sweeper.n_trials=2"]))
    assert status == 0, printed
    assert printed.count("nin (") == 1  # the first trial is not trained again


@pytest.mark.parametrize("test", ["true", "false"])
def test_a_trial_is_never_tested_and_the_best_one_at_the_end_unless_sweep_test_is_false(
    test: str, tmp_path: Path, search: Search
) -> None:
    folder = tmp_path / "outputs/sweeps/tune"
    words = ["model.dropout=interval(0,0.5)", "hydra.sweeper.n_trials=1", f"sweep.test={test}"]
    status, printed = search(*words)
    assert status == 0, printed
    result = json.loads((folder / "trial-0000/result.json").read_text())
    assert result["metrics"]["test/acc"] is None
    assert (folder / "best.json").exists() == ("tested once: test/acc" in printed) == (test == "true")
    if test == "true":
        # A config in the folder may come from elsewhere, and is not needed to test the checkpoint.
        (folder / "best.json").unlink()
        (tmp_path / "planted.py").write_text("raise SystemExit('imported')")
        planted = "data: {_target_: planted.Data, image_size: 28, batch_size: 8}"
        config = folder / "trial-0000/.hydra/config.yaml"
        config.write_text(re.sub(r"^data:\n(  .*\n)+", planted + "\n", config.read_text(), flags=re.MULTILINE))
        assert planted in config.read_text()
        status, again = search(*words)
        assert status == 0, again
        assert (folder / "best.json").exists()


@pytest.mark.long
def test_the_result_of_another_search_whose_study_was_removed_is_not_recorded(tmp_path: Path, search: Search) -> None:
    folder = tmp_path / "outputs/sweeps/tune"
    for space, expected in (("interval(0,0.5)", 0), ("interval(0,0.5)", 0), ("interval(0.5,0.9)", 2)):
        status, printed = search(f"model.dropout={space}", "hydra.sweeper.n_trials=1")
        assert status == expected, printed
        (folder / "study.journal").unlink()
    assert "outputs/sweeps/tune/trial-0000: has the result of another search; remove it" in printed


@pytest.mark.long
def test_trials_are_added_later_and_another_search_under_the_name_is_refused(tmp_path: Path, search: Search) -> None:
    folder, space = tmp_path / "outputs/sweeps/tune", "optimizer.lr=tag(log,interval(1e-3,1e-1))"

    def trials() -> dict[str, float]:
        return {name: result["metrics"]["val/loss"] for name, result in read_results(folder).items()}

    assert search(space, "hydra.sweeper.n_trials=1")[0] == 0
    first = trials()
    assert search(space, "hydra.sweeper.n_trials=2")[0] == 0
    assert list(trials()) == ["trial-0000", "trial-0001"]
    assert first.items() <= trials().items()
    for words, difference in (
        (
            [space, "hydra.sweeper.sampler=random"],
            "hydra.sweeper.sampler: tpe in the existing search, random in this command",
        ),
        (
            ["optimizer.lr=interval(1,2)"],
            "optimizer.lr: tag(log, interval(0.001, 0.1)) in the existing search, interval(1",
        ),
    ):
        status, printed = search(*words, "hydra.sweeper.n_trials=3")
        assert status == 2
        assert difference in printed
    assert list(trials()) == ["trial-0000", "trial-0001"]


def test_a_trial_whose_settings_are_refused_fails_and_the_search_continues(tmp_path: Path, search: Search) -> None:
    grid = ["hydra.sweeper.sampler=grid", "hydra.sweeper.n_trials=4", "optimizer=sgd", "trainer.limit_train_batches=1"]
    # Only the settings themselves show that one combination is refused.
    words = ["optimizer.nesterov=true,false", "optimizer.momentum=0.0,0.9"]
    status, printed = search(*grid, *words)
    assert status == 0, printed
    results = read_results(tmp_path / "outputs/sweeps/tune").values()
    assert sorted(result["status"] for result in results) == ["failed", "finished", "finished", "finished"]
    (failed,) = (result for result in results if result["status"] == "failed")
    assert any(word.endswith("momentum=0.0") for word in failed["overrides"])
    assert "nesterov=true needs momentum" in failed["error"]


@pytest.mark.long
def test_the_answer_of_a_search_from_the_users_own_config_names_it(tmp_path: Path, search: Search) -> None:
    (tmp_path / "mine.yaml").write_text("# @package _global_\ndefaults: [train, {override model: nin_small}, _self_]\n")
    options = ["--config-dir", str(tmp_path), "--config-name", "mine"]
    own = ["optimizer.lr=interval(0.01,0.1)", "hydra.sweeper.n_trials=1"]
    status, printed = search(*options, *own)
    assert status == 0, printed
    assert f"nin train --config-dir {tmp_path} --config-name mine name=tune-best " in printed
    assert not (tmp_path / "outputs/sweeps/tune/best.yaml").exists()
