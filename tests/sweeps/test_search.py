"""Searches: what is proposed, what is refused, what is resumed."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from filelock import Timeout
from hydra.types import RunMode
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from PIL import Image
from rich.console import Console
from torch import nn

from helpers import SMALL, merge, read_results, run_experiment
from nin import cli
from nin.commands import train
from nin.config.composition import compose_config, parse_overrides
from nin.config.hydra_options import open_hydra
from nin.config.schema import CONF, Settings, UserError
from nin.config.validation import validate
from nin.runs.folder import RunFolder
from nin.sweeps import search as search_module
from nin.sweeps import search_best, search_checks, search_report, workers
from nin.sweeps.claims import DatabaseClaims
from nin.sweeps.launch import Sweep
from nin.sweeps.search import Search
from nin.sweeps.search_best import SearchFile, best_command, best_config, read_search_file, write_search_file
from nin.sweeps.search_checks import count_points, experiment_words
from nin.sweeps.search_report import best_trial, count_saved_epochs, describe_answer
from nin.sweeps.space import enumerate_values, overrides_of, read_space, sample_corners
from nin.sweeps.study import (
    JOURNAL,
    JournalLock,
    Plan,
    Store,
    build_sampler,
    hide_concurrent_values,
    open_journal,
    propose,
    require_same_plan,
)
from nin.training.callbacks.pruning import PruningCallback
from nin.training.pruning import TrialPruner, write_comparison
from nin.training.request import RunRequest

LR = "optimizer.lr=tag(log, interval(1e-4, 1e-1))"


@pytest.mark.parametrize(
    ("word", "distribution"),
    [
        (LR, FloatDistribution(1e-4, 1e-1, log=True)),
        ("model.dropout=interval(0, 0.8)", FloatDistribution(0.0, 0.8)),
        ("model.last_width=tag(int, interval(16, 64))", IntDistribution(16, 64)),
        ("model.last_width=int(interval(16, 64))", IntDistribution(16, 64)),
        ("model.last_width=tag(log, int, interval(16, 64))", IntDistribution(16, 64, log=True)),
        ("model.last_width=range(16, 65, 16)", IntDistribution(16, 64, step=16)),
        ("model.last_width=range(1, 4)", IntDistribution(1, 3)),
        ("model.dropout=range(0, 1, 0.25)", FloatDistribution(0.0, 0.75, step=0.25)),
        ("model.dropout=range(0.1, 0.8, 0.1)", FloatDistribution(0.1, 0.7, step=0.1)),
        ("model.dropout=range(0.4, 0.1, -0.1)", FloatDistribution(0.2, 0.4, step=0.1)),
        ("model.norm=none,batch", CategoricalDistribution(["none", "batch"])),
        ("model.widths=[8,16],[16,32]", CategoricalDistribution(["[8,16]", "[16,32]"])),
        ("model.norm=choice(none, batch)", CategoricalDistribution(["none", "batch"])),
    ],
)
def test_hydras_syntax_becomes_optunas_distributions(word: str, distribution: BaseDistribution) -> None:
    key = word.partition("=")[0]
    assert read_space(parse_overrides([word, "seed=1"])) == ({key: distribution}, ["seed=1"])


def test_a_grid_has_the_decimals_of_a_range() -> None:
    (distribution,) = read_space(parse_overrides(["model.dropout=range(0.1, 0.8, 0.1)"]))[0].values()
    values = enumerate_values("model.dropout", distribution)
    assert values == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert all(map(distribution._contains, values))  # as Optuna checks it


def test_a_grid_of_too_many_points_is_refused_before_they_are_listed() -> None:
    space = read_space(parse_overrides(["data.batch_size=tag(int, interval(1, 1000000000))"]))[0]
    with pytest.raises(UserError, match=r"^data.batch_size: has 1,000,000,000 values; a grid takes at most 10,000"):
        count_points(dataclasses.replace(plan(), space=space))
    three = [f"optimizer.{key}=tag(int, interval(1, 500))" for key in ("lr", "momentum", "weight_decay")]
    with pytest.raises(UserError, match=r"^hydra.sweeper.sampler=grid: has 125,000,000 points; give fewer values"):
        count_points(dataclasses.replace(plan(), space=read_space(parse_overrides(three))[0]))


def test_the_options_of_a_group_are_chosen_by_a_pattern() -> None:
    with open_hydra():
        space, _ = read_space(parse_overrides(["model=glob(nin*)", "optimizer=glob(*)"]))
        with pytest.raises(UserError, match=r"^model=glob\(x\*\): not a space \(.*choices.*one"):
            read_space(parse_overrides(["model=glob(x*)"]))
    models, optimizers = ["nin", "nin_small"], ["adamw", "sgd"]
    assert space == {"model": CategoricalDistribution(models), "optimizer": CategoricalDistribution(optimizers)}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.dropout=interval(0.8, 0)", r"interval\(0.8, 0\): not a space \(.*low.*high"),
        ("model.last_width=interval(8, 4)", r"interval\(8, 4\): not a space \(.*low.*high"),
        ("model.dropout=interval(0.5, 0.5)", "the interval is empty"),
        ("model.dropout=interval(0, inf)", "both ends must be finite"),
        ("optimizer.lr=tag(log, interval(0, 0.1))", r"interval\(0, 0.1\)\): not a space \(.*low.*log"),
        ("model.last_width=tag(log, int, interval(0, 8))", r"interval\(0, 8\)\): not a space \(.*low.*log"),
        ("optimizer.lr=tag(lg, interval(1, 2))", "no such tag lg; there are: float, int, log"),
        ("model.last_width=range(5, 5)", "the range has no values"),
        ("model.last_width=range(5, 1)", "the range has no values"),
        ("model.dropout=range(0, inf)", r"model.dropout=range\(0, inf\): not a space \(cannot convert Infinity"),
        ("model=glob(*)", r"model=glob\(\*\): not a space \(ConfigLoader is not set\)"),
        ("model.last_width=tag(int, interval(1.5, 3))", "both ends must be integers"),
        ("model.last_width=tag(log, range(1, 3))", "a range has steps; use tag"),
        ("model.norm=none,none", "has a value twice"),
        ("model.norm=shuffle(none,batch)", "leave shuffle out"),
        ("model.last_width=shuffle(range(16,65,16))", "leave shuffle out"),
    ],
)
def test_a_space_without_values_is_refused(word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_space(parse_overrides([word]))


def plan(sampler: str = "tpe", batch_size: int = 1, **more: Any) -> Plan:
    words = [LR, "model.dropout=interval(0, 0.8)", "model.norm=none,batch"]
    if sampler == "grid":
        words = ["optimizer.lr=0.1,0.01", "model.dropout=range(0, 1, 0.25)"]
    space = read_space(parse_overrides(words))[0]
    given = {"seed": 7, "pruner": "none", "fixed": (), "max_epochs": 4} | more
    return Plan("s", space, sampler, batch_size=batch_size, **given)


def objective(params: dict[str, Any]) -> float:
    return -abs(np.log10(float(params["optimizer.lr"])) + 2) - float(params["model.dropout"])


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "qmc", "grid"])
def test_proposals_are_those_of_plain_optuna_with_the_same_seeds(sampler: str) -> None:
    given, count = plan(sampler), 8 if sampler == "grid" else 25
    trials: list[optuna.trial.FrozenTrial] = []
    for number in range(count):
        proposed = propose(given, hide_concurrent_values(trials, number, number))
        trials.append(
            create_trial(
                params=proposed.params,
                distributions=proposed.distributions,
                system_attrs=proposed.system_attrs,
                value=objective(proposed.params),
            )
        )
    study = optuna.create_study(study_name="s", direction="maximize")
    for number in range(count):
        seed = int(np.random.SeedSequence([7, number]).generate_state(1)[0])
        study.sampler = {
            "tpe": lambda seed=seed: optuna.samplers.TPESampler(seed=seed),
            "random": lambda seed=seed: optuna.samplers.RandomSampler(seed=seed),
            "cmaes": lambda seed=seed: optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
            "qmc": lambda: optuna.samplers.QMCSampler(seed=7, warn_independent_sampling=False),
            "grid": lambda: build_sampler(given, 0),
        }[sampler]()
        trial = study.ask(given.space)
        if number < count - 1:  # the end of a grid would stop a loop that is not there
            study.tell(trial, objective(trial.params))
    assert [trial.params for trial in trials] == [trial.params for trial in study.trials]
    assert len({json.dumps(trial.params) for trial in trials}) == count


def test_a_proposal_does_not_depend_on_trials_of_its_own_batch() -> None:
    given = plan(batch_size=3)
    finished = [create_trial(value=float(i), params={}, distributions={}) for i in range(2)]
    running = create_trial(state=TrialState.RUNNING, params={}, distributions={}, system_attrs={"grid_id": 1})
    seen = hide_concurrent_values([finished[0], finished[1], running], 0, 2)
    assert [trial.state for trial in seen] == [TrialState.RUNNING] * 2
    proposals = [propose(given, hide_concurrent_values(two, 0, 2)).params for two in ([*finished], [running, running])]
    assert proposals[0] == proposals[1]


def test_an_incomplete_last_line_is_removed_before_the_next_one_is_written(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL
    optuna.create_study(storage=open_journal(path), study_name="s")
    complete = path.read_bytes()
    path.write_bytes(complete + b'{"op_code":4,"wor')
    lock = JournalLock(path)
    lock.acquire()
    assert path.read_bytes() == complete
    lock.release()
    path.write_bytes(complete + b"something else")
    with pytest.raises(UserError, match=r"study.journal: damaged, or not the journal of a study"):
        open_journal(path)


@pytest.mark.parametrize("content", [b"\x00\x01\n\x02\n", b"[]\n", b'{"a": 1}\n{"b": 2}\n', b"hello", b"hello\n"])
def test_a_damaged_journal_is_refused_in_one_message(content: bytes, tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_bytes(content)
    with pytest.raises(UserError, match=r"damaged, or not the journal of a study"):
        open_journal(tmp_path / JOURNAL)
    assert (tmp_path / JOURNAL).read_bytes() == content


def test_a_journal_with_another_name_is_refused_with_the_name_and_the_folder_that_resume_it(tmp_path: Path) -> None:
    first = dataclasses.replace(plan(), name="2026-01-02_03-04-05")
    Store(first, tmp_path, None)
    renamed = tmp_path.rename(tmp_path.with_name("renamed"))
    there = f"name=2026-01-02_03-04-05 hydra.sweep.dir={renamed}"
    other = dataclasses.replace(first, name="2026-01-02_03-04-06")
    with pytest.raises(UserError, match=f"to resume it give {there}; or another hydra.sweep.dir=…"):
        require_same_plan(open_journal(renamed / JOURNAL), other, renamed)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"config_name": "mine"}, r"--config-name: mine in the existing search, train in this command$"),
        ({"config_path": "/my/conf"}, r"--config-path: /my/conf in the existing search, not given in this command$"),
    ],
)
def test_another_base_config_is_another_search(other: dict[str, str], message: str, tmp_path: Path) -> None:
    mine = dataclasses.replace(plan(), **other)
    storage = Store(mine, tmp_path, None).storage
    require_same_plan(storage, mine, tmp_path)
    with pytest.raises(UserError, match=message):
        require_same_plan(storage, plan(), tmp_path)


def check(*words: str, config_dir: Path | None = None, config_path: Path | None = None) -> Search:
    """The search that a command line requests, after its checks."""
    args = train.parse_arguments(["-m", "hydra/sweeper=optuna", *words])
    with open_hydra(config_dir and str(config_dir), config_path and str(config_path)) as app:
        search = Sweep(train.compose(app, args, RunMode.MULTIRUN)).search
    assert search is not None
    return search


def test_a_search_whose_files_were_edited_is_another_search(tmp_path: Path, data_root: Path) -> None:
    words = ["experiment=mine", f"data.root={data_root}", "optimizer.lr=0.1,0.2"]
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    plans = []
    for smoothing, clip in (("0.0", "null"), ("0.3", "1.0")):
        changed = f"label_smoothing: {smoothing}\ntrainer: {{gradient_clip_val: {clip}}}\n"
        text = f"# @package _global_\ndefaults: [quickstart, _self_]\n{changed}"
        (tmp_path / "own" / "experiment" / "mine.yaml").write_text(text)
        plans.append(check(*words, config_dir=tmp_path / "own").plan)
    storage = Store(plans[0], tmp_path, None).storage
    require_same_plan(storage, plans[0], tmp_path)
    with pytest.raises(
        UserError, match=r"label_smoothing: 0\.0 in the existing search, 0\.3 in this command"
    ) as caught:
        require_same_plan(storage, plans[1], tmp_path)
    assert "trainer.gradient_clip_val: null in the existing search, 1.0 in this command" in str(caught.value)


def test_the_test_of_an_earlier_searchs_trial_is_not_that_of_another_with_its_number(tmp_path: Path) -> None:
    trial = create_trial(value=0.5)
    trial.number = 0
    tested = {"trial": 0, "weights_sha256": "a", "metrics": {"test/acc": 0.9}, "test_images": 10}
    (tmp_path / "best.json").write_text(json.dumps(tested))
    assert search_best.read_test(tmp_path, trial) == tested  # its trial's folder is elsewhere
    (tmp_path / "trial-0000").mkdir()
    result = tmp_path / "trial-0000" / "result.json"
    for weights, found in (("a", tested), ("b", None)):
        result.write_text(json.dumps({"status": "finished", "best_weights_sha256": weights}))
        assert search_best.read_test(tmp_path, trial) == found


def test_the_plan_has_the_folder_that_replaces_conf(tmp_path: Path, data_root: Path) -> None:
    words = ["data=garments", f"data.root={data_root}", "trainer=cpu", "seed=0", "optimizer.lr=0.1,0.2"]
    shutil.copytree(CONF, tmp_path / "conf")
    found = [check(*words, config_path=path).plan.config_path for path in (None, tmp_path / "conf")]
    assert found == [None, str(tmp_path / "conf")]


def test_the_best_of_all_trials_is_tested_also_by_a_command_with_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    tested: list[int] = []
    monkeypatch.setattr(search_module, "test_best", lambda folder, best, settings: tested.append(best.number))
    trials = [create_trial(value=value) for value in (0.5, 0.9)]
    for number, trial in enumerate(trials):
        trial.number = number
    search: Any = Search.__new__(Search)
    search.total, search.folder, search._compose = 1, Path(), lambda own: None
    search.settings = SimpleNamespace(final_seeds=None)
    search.point = SimpleNamespace(sweep=SimpleNamespace(test=True))
    search.store = SimpleNamespace(trials=lambda: trials, claims=SimpleNamespace(lock=contextlib.nullcontext))
    search._finish()
    assert tested == [1]  # as in the report


def test_a_callback_that_changes_training_is_part_of_the_search(data_root: Path) -> None:
    words = ["data=garments", f"data.root={data_root}", "trainer=cpu", "optimizer.lr=0.1,0.2"]
    plain, quiet, average = (
        check(*words, *more).plan.describe() for more in ([], ["callbacks=none"], ["callbacks=ema"])
    )
    assert quiet == plain
    assert {key: value for key, value in average.items() if key not in plain} == {
        "callbacks.ema._target_": "lightning.pytorch.callbacks.EMAWeightAveraging", "callbacks.ema.decay": "0.99",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a search has no space"),
        (["model.dropout=interval(0.8,0)"], r"model.dropout=interval\(0.8,0\): not a space \("),
        (["model.dropuot=interval(0,0.8)"], "model.dropuot.*did you mean model.dropout"),
        (["model.dropout=interval(0,1.5)"], "model.dropout=1.5: must be less than 1"),
        (["model.norm=none,layer"], "model.norm=.*layer"),
        (
            ["model.conv1x1_layers=interval(1,3)"],
            r"layers=3.0: must be a valid integer; .* are 'model.conv1x1_layers=tag\(int, interval\(1, 3\)\)'",
        ),
        (["seed=0,1,2"], "seed: is not searched.*final_seeds"),
        (["++seed=0,1,2"], "seed: is not searched.*final_seeds"),
        ([LR, "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0: must be greater than or equal to 1"),
        ([LR, "hydra.sweeper.sampler=tpa"], "hydra.sweeper.sampler=.*'tpe'"),
        ([LR, "hydra.sweeper.sampler=grid"], "sampler=grid needs choices or a range"),
        (
            [LR, "hydra.sweeper.storage=sqlite:///x"],
            "hydra.sweeper.storage=.*: must be postgresql://user@host/database",
        ),
        ([LR, "hydra.sweeper.final_seeds=[0,1,1]"], "hydra.sweeper.final_seeds=.*: must have each seed once"),
        ([LR, "hydra.sweeper.final_seeds=[]"], "hydra.sweeper.final_seeds=.*: must have at least 1 item"),
        ([LR, "hydra.sweeper.max_failures=0"], "hydra.sweeper.max_failures=0: must be greater than or equal to 1"),
        ([LR, "hydra.sweeper.n_jobs=0"], "hydra.sweeper.n_jobs=0: must be greater than or equal to 1"),
        ([LR, "hydra.sweeper.storage=postgresql://u:secret@localhost:1/x"], "localhost:1/x: can't be reached"),
        ([LR, "data.score_each_epoch=test"], "a search compares val/acc on held-out images"),
        ([LR, "sweep.test=false", "hydra.sweeper.final_seeds=[0]"], "sweep.test=false: the runs of .*final_seeds"),
        ([LR, "sweep.fail_fast=true"], "hydra.sweeper.max_failures=1"),
        ([LR, "trainer.check_val_every_n_epoch=3"], "check_val_every_n_epoch=3: a trial has 2 epochs.*at most that"),
        ([LR, "trainer.val_check_interval=4"], "val_check_interval=4: .*might end without a validation; leave"),
        ([LR, "trainer.val_check_interval=0.5"], "val_check_interval=0.5: .*leave trainer.val_check_interval out"),
        ([LR, "trainer.val_check_interval=00:00:01:00"], "val_check_interval=00:00:01:00: .*without a validation"),
    ],
)
def test_bad_input_is_refused_in_one_message_and_nothing_is_written(
    words: list[str], message: str, tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as refused:
        check(*(word for word in SMALL if "dropout" not in word), f"data.root={data_root}", "name=bad", *words)
    assert "secret" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_search_and_a_sweep_do_not_share_a_name(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("outputs", "sweeps", "x")
    small = [*(word for word in SMALL if "dropout" not in word), f"data.root={data_root}", "name=x"]
    job = folder / "seed=0" / ".hydra"
    job.mkdir(parents=True)
    (job / "overrides.yaml").write_text("[seed=0]")
    with pytest.raises(UserError, match="outputs/sweeps/x: has a sweep of this name; give another name"):
        check(*small, LR)
    job.parent.rename(folder / "trial-0000")
    check(*small, LR)  # a search whose search.json was lost
    (folder / "search.json").write_text("{}")
    check(*small, LR)  # a search that is run again
    assert cli.run("train", ["-m", *small, "seed=0,1"]) == 2
    message = "nin train: outputs/sweeps/x: has a search of this name; give another name=…\n"
    assert capsys.readouterr().err == message


def test_a_validation_after_each_epoch_or_each_batch_is_accepted(settings: Callable[..., Settings]) -> None:
    for interval in ("null", "1.0", "1"):
        search_checks._require_validation_at_an_end(settings(f"trainer.val_check_interval={interval}"))


def searcher(folder: Path, total: int) -> Search:
    """A search of ``total`` trials, without its checks; several of one folder share its trials, as processes do."""
    search = Search.__new__(Search)
    search.plan, search.total, search.store = plan(), total, Store(plan(), folder, None)
    search.settings = SimpleNamespace(max_failures=None)  # type: ignore[assignment]
    return search


def test_two_searchers_that_share_a_folder_never_have_the_same_trial(tmp_path: Path) -> None:
    one, other = searcher(tmp_path, 2), searcher(tmp_path, 2)
    assert one._take(one.store.trials()) == ([0], 0)
    assert other._take(other.store.trials()) == ([1], 1)
    assert other._take(other.store.trials()) == ([], 0)
    with one.store.claims.lock(), pytest.raises(Timeout):
        other.store.claims.lock().acquire(timeout=0)  # type: ignore[union-attr]
    one.store.claims.release(0)  # as when its process ends
    assert other._take(other.store.trials()) == ([0], 0)


@pytest.mark.parametrize(
    ("trials", "printed"),
    [
        (5, "the grid has 3 points, so there are 3 trials\ntrial 0: "),
        (3, "trial 0: "),
        (2, "the grid has 3 points; 2 are tried, all with hydra.sweeper.n_trials=3\ntrial 0: "),
    ],
)
def test_a_grid_of_another_size_than_the_search_is_reported(
    trials: int,
    printed: str,
    tmp_path: Path,
    data_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def launch(*_: object) -> None:
        raise UserError("launched")

    monkeypatch.chdir(tmp_path)
    grid = ["hydra.sweeper.sampler=grid", f"hydra.sweeper.n_trials={trials}", "optimizer.lr=0.1,0.2,0.3"]
    search = check(*SMALL, f"data.root={data_root}", *grid)
    with pytest.raises(UserError, match=r"^launched$"):
        search.run(SimpleNamespace(launch=launch))  # type: ignore[arg-type]
    assert capsys.readouterr().out.startswith(printed)


def test_a_search_ends_only_after_the_trials_that_another_process_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = searcher(tmp_path, 1), searcher(tmp_path, 1)
    assert other._take(other.store.trials()) == ([0], 0)
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            other.store.finish(0, TrialState.COMPLETE, 0.5, {}, {})
            other.store.claims.release(0)

    monkeypatch.setattr(search_module, "time", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(one, "_run_batch", lambda *_: pytest.fail("has run a trial of another process"))
    one._run_trials()
    assert len(waited) == 3
    assert capsys.readouterr().out == "the other trials are run by another process; waiting for them\n"


@pytest.fixture
def database_locks(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], object]:
    """Has PostgreSQL's functions in SQLite, locks of a connection by two numbers; returns those that are held."""
    import sqlalchemy

    held: dict[tuple[int, int], object] = {}
    create_engine = sqlalchemy.create_engine

    def engine(url: str, **_: Any) -> Any:
        made = create_engine("sqlite://", poolclass=sqlalchemy.pool.StaticPool)

        @sqlalchemy.event.listens_for(made, "connect")
        def connect(connection: Any, _: object) -> None:
            def try_lock(study: int, number: int) -> int:
                return int(held.setdefault((study, number), connection) is connection)

            def lock(study: int, number: int) -> None:
                if not try_lock(study, number):
                    raise TimeoutError("would wait without end")

            def unlock(study: int, number: int) -> int:
                return int(held.pop((study, number), None) is connection)

            connection.create_function("pg_try_advisory_lock", 2, try_lock)
            connection.create_function("pg_advisory_lock", 2, lock)
            connection.create_function("pg_advisory_unlock", 2, unlock)

        return made

    monkeypatch.setattr(sqlalchemy, "create_engine", engine)
    return held


def test_claims_in_a_database_are_those_of_one_search(database_locks: dict[tuple[int, int], object]) -> None:
    from sqlalchemy.exc import OperationalError

    one, other, another_search = (DatabaseClaims("postgresql://x@y/z", name) for name in ("s", "s", "t"))
    assert one.claim(0)
    assert not other.claim(0)
    assert another_search.claim(0)
    one.release(0)
    assert other.claim(0)
    waits = pytest.raises(OperationalError, match="user-defined function raised exception")
    with one.lock(), waits, other.lock():
        pytest.fail("has the lock that another process has")
    with other.lock():
        assert (one._study, -1) in database_locks
    assert (one._study, -1) not in database_locks


def test_a_search_in_a_database_has_its_claims_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database_locks: dict[tuple[int, int], object]
) -> None:
    """Machines that share a database need not share a folder: locks of files would not keep a trial from the others."""
    storage = optuna.storages.InMemoryStorage()
    monkeypatch.setattr("nin.sweeps.study.RDBStorage", lambda *_, **__: storage)
    url = "postgresql://me@far/x"
    one, other = (Store(plan(), tmp_path / machine, url) for machine in ("one", "other"))
    one.add(propose(plan(), []))
    assert len(other.trials()) == 1
    assert one.claims.claim(0)
    assert not other.claims.claim(0)
    assert [number for _, number in database_locks] == [0]
    assert list(tmp_path.rglob("*")) == []


def describe_search(folder: Path, **changed: Any) -> None:
    """Writes search.json as a search does."""
    content = {"name": "s", "fixed": [], "n_trials": 1, "max_epochs": 4} | changed
    (folder / "search.json").write_text(json.dumps(content))


def test_a_trial_that_ends_without_a_score_has_failed_and_the_search_and_its_report_continue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = Search.__new__(Search)
    search.plan, search.store = plan(), Store(plan(), tmp_path, None)
    for number, score in enumerate((None, 0.5000167)):
        search.store.add(propose(plan(), search.store.trials()))
        folder = RunFolder(tmp_path / f"trial-000{number}")
        folder.write_result({"status": "finished", "metrics": {"val/acc": score}})
        search._record(number, folder)
    trials = search.store.trials()
    assert [trial.state.name for trial in trials] == ["FAIL", "COMPLETE"]
    propose(plan(), trials)
    describe_search(tmp_path, n_trials=2)
    search_report.report_search(tmp_path)
    printed = capsys.readouterr().out
    assert "trial 0 failed: no epoch ended with a validation" in printed
    assert "s: 2 of 2 trials, 1 failed; best val/acc first" in printed
    assert "best: trial-0001, val/acc 0.5000" in printed
    assert "failed: trial-0000: no epoch ended with a validation" in printed
    assert [(tmp_path / f"summary.{kind}").read_text().count("0.5000167") for kind in ("csv", "md")] == [1, 0]


def test_a_pruned_trial_has_its_last_value_and_the_values_at_the_rungs_that_it_reached(tmp_path: Path) -> None:
    search = Search.__new__(Search)
    search.plan = plan(pruner="hyperband", max_epochs=9)
    search.store = Store(search.plan, tmp_path, None)
    search.store.add(propose(search.plan, []))
    folder = RunFolder(tmp_path / "trial-0000")
    write_comparison(folder.path, "s", "hyperband", 9, [])
    folder.metrics.write_text("epoch,val/acc\n1,0.5\n2,\n3,0.4\n")  # no validation in the second epoch
    folder.write_result({"status": "pruned"})
    search._record(0, folder)
    (trial,) = search.store.trials()
    assert (trial.state, trial.value) == (TrialState.PRUNED, 0.4)
    assert trial.intermediate_values == {1: 0.5, 3: 0.4}
    rungs = {key: value for key, value in trial.system_attrs.items() if key.startswith("completed_rung_")}
    assert rungs == {"completed_rung_0": 0.5, "completed_rung_1": 0.4}


def test_the_experiment_of_a_trial_does_not_depend_on_how_it_is_run() -> None:
    words = [
        "+model.depth=2",
        "++threads=1",
        "threads=2",
        "optimizer.lr=0.1",
        "trainer.max_epochs=3",
        "+logger.csv=null",
        "sweep.test=false",
        "sweep=tune_nin_small",
        "trainer=cpu",
    ]
    expected = ["+model.depth=2", "optimizer.lr=0.1", "sweep=tune_nin_small", "trainer.max_epochs=3"]
    assert experiment_words(words) == expected


def test_a_search_may_continue_on_another_device_but_not_with_another_precision_or_other_images(
    tmp_path: Path,
) -> None:
    words = ["name=x", "model=nin_small", "data=folder", "data.image_size=28", "data.batch_size=8", "optimizer.lr=1,2"]
    images, moved = tmp_path / "images", tmp_path / "moved"

    def plan_of(images: Path, *others: str) -> Plan:
        return check(*words, f"data.root={images}", f"data.cache={tmp_path / 'cache'}", *others).plan

    def add_image(root: Path, name: str, gray: int) -> None:
        (root / "train" / name).mkdir(parents=True, exist_ok=True)
        Image.new("L", (28, 28), gray).save(root / "train" / name / f"{gray}.png")

    for gray in range(20):
        add_image(images, "ab"[gray % 2], gray)
    storage = Store(plan_of(images), tmp_path, None).storage
    require_same_plan(storage, plan_of(images, "trainer=cpu"), tmp_path)
    with pytest.raises(UserError, match=r"trainer.precision: null in the existing search, bf16-true in this command$"):
        require_same_plan(storage, plan_of(images, "trainer.precision=bf16-true"), tmp_path)
    images.rename(moved)
    require_same_plan(storage, plan_of(moved), tmp_path)
    add_image(moved, "a", 200)
    with pytest.raises(UserError, match=r"images_sha256: [0-9a-f]{64} in the existing search, [0-9a-f]{64} in this"):
        require_same_plan(storage, plan_of(moved), tmp_path)
    # Other augmentations are of the same images, other channels are not.
    assert plan_of(moved, "data.augment=none,flip").images_sha256 == plan_of(moved).images_sha256 is not None
    assert plan_of(moved, "data.channels=1,3").images_sha256 is None


def test_best_yaml_of_an_earlier_state_of_the_search_is_removed_where_it_would_be_wrong(tmp_path: Path) -> None:
    store = Store(plan(), tmp_path, None)
    store.add(propose(plan(), []))
    store.finish(0, TrialState.COMPLETE, 0.5, {}, {})
    for fixed, is_written in ((["threads=1"], True), (["~callbacks.dead_units"], False)):
        describe_search(tmp_path, fixed=fixed)
        search_report.report_search(tmp_path)
        assert (tmp_path / "best.yaml").exists() is is_written


def test_a_report_names_the_key_that_matters_most_first_and_draws_three_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = plan("random")
    store = Store(given, tmp_path, None)
    for number in range(8):
        store.add(propose(given, store.trials()))
        rate = float(store.trials()[number].params["optimizer.lr"])
        store.finish(number, TrialState.COMPLETE, 0.5 + np.log10(rate) / 10, {}, {})
    describe_search(tmp_path, n_trials=8)
    search_report.report_search(tmp_path)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("importance"))
    shares = re.fullmatch(
        r"importance for val/acc \(fANOVA\): optimizer.lr (0\.\d+), model\.\w+ (0\.\d+), model\.\w+ (0\.\d+)", line
    )
    assert shares, line
    assert float(shares[1]) > 0.5
    assert line in (tmp_path / "summary.md").read_text()
    # The history, the importances and the parallel coordinates, each of 9 by 5 inches with 110 pixels per inch.
    with Image.open(tmp_path / "summary.png") as picture:
        assert picture.size == pytest.approx((990, 3 * 550), rel=0.15)


@pytest.mark.parametrize("url", ["postgresql://me:secret@far:1/x?password=secret", "sqlite:///x.db", "mysql://far/x"])
def test_a_report_does_not_connect_to_what_a_folder_names(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    describe_search(tmp_path, storage=url, config_dir=None)
    opened: list[str] = []
    storage = optuna.storages.InMemoryStorage()
    optuna.create_study(storage=storage, study_name="s", direction="maximize")
    monkeypatch.setattr("nin.sweeps.study.RDBStorage", lambda url, **_: opened.append(url) or storage)
    assert cli.run("report", [str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"nin report: {tmp_path}: its trials are in the database ")
    assert "--storage postgresql://" in error
    assert "secret" not in error
    assert not opened
    given = "postgresql://me:other@near/x"
    assert cli.run("report", [str(tmp_path), "--storage", given]) == 0
    assert opened == [given]
    # Nor to one that this process has opened for the command line.
    describe_search(tmp_path, storage=given, config_dir=None)
    assert cli.run("report", [str(tmp_path)]) == 2
    assert opened == [given]


@pytest.mark.parametrize("url", ["sqlite:///x.db", "postgresql://host:port/x", "x"])
def test_a_storage_that_is_no_database_of_postgresql_is_refused(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run("report", [str(tmp_path), "--storage", url]) == 2
    assert "is not the folder of a search" in capsys.readouterr().err
    describe_search(tmp_path, max_epochs=None)
    assert cli.run("report", [str(tmp_path), "--storage", url]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["search.json"]


@pytest.mark.parametrize(
    "changed", [{"name": 5}, {"fixed": [1]}, {"n_trials": "many"}, {"storage": {}}, {"config_name": 1}, {"other": 1}]
)
def test_a_description_with_other_content_is_refused(
    changed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    describe_search(tmp_path, **changed)
    assert cli.run("report", [str(tmp_path)]) == 2
    assert "search.json: can't be read" in capsys.readouterr().err


def test_a_description_is_read_as_it_was_written_whatever_a_folder_is_called(tmp_path: Path) -> None:
    search = SearchFile(name="s", fixed=["seed=1"], n_trials=1, final_seeds=[0], config_dir=os.fsdecode(b"bad\xff"))
    write_search_file(tmp_path, search)
    assert read_search_file(tmp_path) == search


def test_the_report_of_a_search_without_its_journal_says_so_and_writes_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    describe_search(tmp_path)
    assert cli.run("report", [str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"nin report: {tmp_path / JOURNAL}: missing; the search's own command")
    assert [path.name for path in tmp_path.iterdir()] == ["search.json"]


def test_what_a_description_from_elsewhere_fixes_may_be_no_overrides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    known = optuna.create_study(storage=open_journal(tmp_path / JOURNAL), study_name="s", direction="maximize")
    rates = {"optimizer.lr": FloatDistribution(0.1, 1)}
    known.add_trial(create_trial(params={"optimizer.lr": 0.5}, distributions=rates, value=0.5))
    for fixed in (["seed=1,2"], ["seed"]):
        describe_search(tmp_path, fixed=fixed)
        assert cli.run("report", [str(tmp_path)]) == 0
        assert "best val/acc first" in capsys.readouterr().out
        assert not (tmp_path / "best.yaml").exists()


def test_control_characters_of_a_study_from_elsewhere_are_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;title\x07"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    known = optuna.create_study(storage=open_journal(tmp_path / JOURNAL), study_name=f"s{evil}", direction="maximize")
    norm = {f"model.norm{evil}": CategoricalDistribution([f"a{evil}", "b"])}
    params = {f"model.norm{evil}": f"a{evil}"}
    known.add_trial(create_trial(params=params, distributions=norm, value=0.5))
    failure = {"error": f"E: {evil}\n  more"}
    known.add_trial(create_trial(params=params, distributions=norm, state=TrialState.FAIL, user_attrs=failure))
    describe_search(tmp_path, name=f"s{evil}", fixed=[f"a={evil}"], n_trials=2)
    assert cli.run("report", [str(tmp_path)]) == 0
    captured = capsys.readouterr()
    printed = captured.out + captured.err
    assert not [c for c in printed if not c.isprintable() and c != "\n"]
    assert "failed: trial-0001: E: \\x1b]0;title\\x07\n  more" in printed
    # A message is free of them too.
    describe_search(tmp_path, name=f"t{evil}")
    assert cli.run("report", [str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("has no study t\\x1b]0;title\\x07\n")


def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    settings: Callable[..., Settings],
    capsys: pytest.CaptureFixture[str],
) -> None:
    find_spec = importlib.util.find_spec  # torch looks for its optional packages by it, when it is imported
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "optuna" else find_spec(name, *more)
    )
    message = "not installed: optuna; run: python3 -m pip install optuna cmaes scipy"
    with pytest.raises(UserError, match=message):
        check(*SMALL, LR)
    # A report, and a trial that is resumed alone, are refused before anything is written.
    (tmp_path / "search.json").write_text("{}")
    assert cli.run("report", [str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    run = RunFolder(tmp_path / "trial-0000")
    run.write_request(settings("sweep.prune=true").model_dump(mode="json"), [])
    assert cli.run("resume", [str(run.path)]) == 2
    assert message in capsys.readouterr().err
    assert not run.result.exists()


def later(settings: Callable[..., Settings], tmp_path: Path, values: list[float]) -> RunFolder:
    """The folder of a trial that follows others, each of which had one of ``values`` after every epoch."""
    earlier = [create_trial(value=v, intermediate_values={1: v, 2: v}) for v in values]
    write_comparison(tmp_path, "s", "median", 2, earlier)
    return RunFolder(tmp_path)


def test_a_trial_below_the_median_is_pruned_and_never_tested(settings: Callable[..., Settings], tmp_path: Path) -> None:
    given = settings("sweep.prune=true", "sweep.test=false", "callbacks=none")
    pruned = run_experiment(given, later(settings, tmp_path / "low", [0.99] * 5))
    assert (pruned["status"], pruned["epochs"], pruned["metrics"]["test/acc"]) == ("pruned", 1, None)
    assert "test_images" not in pruned
    # Resumed, it ends at once with the same result.
    again = run_experiment(given, RunFolder(tmp_path / "low"))
    assert {k: again[k] for k in ("status", "epochs", "steps")} == {k: pruned[k] for k in ("status", "epochs", "steps")}
    assert again["weights_sha256"] == pruned["weights_sha256"]
    kept = run_experiment(given, later(settings, tmp_path / "high", [0.0] * 5))
    assert (kept["status"], kept["epochs"], kept["metrics"]["test/acc"]) == ("finished", 2, None)


def test_a_search_of_the_number_of_epochs_prunes_no_trial_after_its_own_last_epoch(
    settings: Callable[..., Settings], tmp_path: Path, data_root: Path
) -> None:
    searched = check(*merge([*SMALL, f"data.root={data_root}", "trainer.max_epochs=range(1,4)"]))
    assert searched.plan.max_epochs is None  # the epochs that pruning saves are not known
    given = settings("sweep.prune=true", "sweep.test=false", "callbacks=none", "trainer.max_epochs=1")
    assert run_experiment(given, later(settings, tmp_path, [0.99] * 5))["status"] == "finished"


def test_a_pruner_decides_the_same_when_the_epochs_are_reported_again(tmp_path: Path) -> None:
    write_comparison(tmp_path, "s", "hyperband", 9, [create_trial(value=0.9, intermediate_values={1: 0.9})] * 3)
    scores = {epoch: epoch / 10 for epoch in range(1, 6)}
    at_once, one_by_one = TrialPruner(tmp_path), TrialPruner(tmp_path)
    at_once.report(scores)
    for epoch in scores:
        one_by_one.report({e: s for e, s in scores.items() if e <= epoch})
    assert (at_once.is_pruned, at_once.rungs) == (one_by_one.is_pruned, one_by_one.rungs)
    assert at_once.rungs


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_a_trial_is_not_pruned_after_its_last_epoch(pruner: str, tmp_path: Path) -> None:
    rungs = {"completed_rung_0": 0.1, "completed_rung_1": 0.9}  # of epochs 1 and 3
    earlier = [create_trial(value=0.9, intermediate_values={1: 0.1, 2: 0.1, 3: 0.9}, system_attrs=rungs)] * 5
    write_comparison(tmp_path, "s", pruner, 3, earlier)
    scores = {1: 0.5, 2: 0.5, 3: 0.5}
    given, shorter = TrialPruner(tmp_path), TrialPruner(tmp_path)
    assert not given.report(scores, last_epoch=3)
    assert shorter.report(scores, last_epoch=4)
    assert given.rungs == shorter.rungs
    # trainer.max_steps may end the training before trainer.max_epochs.
    rows = [{"epoch": epoch, "val/acc": score} for epoch, score in scores.items()]
    for max_steps, is_pruned in ((9, False), (10, True)):
        state = {"max_epochs": 4, "current_epoch": 2, "global_step": 9, "max_steps": max_steps, "should_stop": False}
        callback = PruningCallback(tmp_path, SimpleNamespace(rows=rows))  # type: ignore[arg-type]
        callback.on_train_epoch_end(SimpleNamespace(**state), None)  # type: ignore[arg-type]
        assert callback.is_pruned == is_pruned


def test_the_best_is_the_first_of_equal_ones_and_its_file_composes_to_it(tmp_path: Path) -> None:
    given = plan()
    proposed = [propose(given, []), propose(given, [create_trial(value=0.0)])]
    trials = [
        create_trial(params=p.params, distributions=p.distributions, value=v)
        for p, v in zip([proposed[0], *proposed], (0.1, 0.5, 0.5), strict=True)
    ]
    for number, trial in enumerate(trials):
        trial.number = number
    best = best_trial(trials)
    assert best is trials[1]
    assert best_trial([create_trial(state=TrialState.FAIL)]) is None
    words = ["experiment=cpu", "name=s", "data.batch_size=64", "sweep=null"]
    (tmp_path / "best.yaml").write_text(best_config(SearchFile(name="s", fixed=words, n_trials=3), best))
    found = requested("--config-dir", str(tmp_path), "--config-name", "best")
    words = [f"{key}={value}" for key, value in best.params.items()]
    expected = validate(compose_config(["experiment=cpu", "data.batch_size=64", "name=s-best", *words]))
    assert found == expected


def test_a_best_trial_whose_folder_was_removed_is_said_to_be_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = create_trial(value=0.5)
    trial.number = 3
    search_best.test_best(tmp_path, trial, validate(compose_config(["experiment=cpu"])))
    printed = capsys.readouterr().out
    assert printed.startswith(
        f"{tmp_path}/trial-0003/checkpoints/best.ckpt: not found, so the best trial is not tested"
    )
    assert not list(tmp_path.iterdir())


def test_a_best_trial_is_not_tested_where_its_accelerator_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine that only submits the trials: the search, which is finished, ends as such."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    trial = create_trial(value=0.5)
    trial.number = 3
    best = RunFolder(tmp_path / "trial-0003").best
    best.parent.mkdir(parents=True)
    best.touch()
    search_best.test_best(tmp_path, trial, validate(compose_config(["experiment=cpu", "trainer=gpu"])))
    assert re.fullmatch(
        r"trainer\.accelerator=gpu: this machine has no GPU .*, so the best trial is not tested; the same command on a "
        r"machine with the accelerator tests it\n",
        capsys.readouterr().out,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["trial-0003"]


def requested(*arguments: str) -> Settings:
    """The settings that a command line for a single run requests; refused if that is a sweep."""
    args = train.parse_arguments(list(arguments))
    with open_hydra(args.config_dir, args.config_path) as app:
        return train._build_request(train.compose(app, args, RunMode.RUN)).settings


@pytest.mark.parametrize(
    "fixed",
    [
        ["data=garments"],
        ["data=garments", "model=lenet", "optimizer=sgd"],
        ["experiment=cpu", "data=garments"],
        ["trainer=cpu", "experiment=cpu", "schedule=cosine"],
    ],
)
def test_the_best_of_a_search_that_is_ready_is_what_its_trial_was(fixed: list[str], tmp_path: Path) -> None:
    given = ["name=s", *fixed, "sweep=tune_nin_small"]
    args = train.parse_arguments(["-m", *given])
    with open_hydra() as app:
        params = train.compose(app, args, RunMode.MULTIRUN).hydra.sweeper.params
    params = {key: value for key, value in params.items() if "model=lenet" not in fixed or not key.startswith("model.")}
    space, words = read_space(parse_overrides([*(f"{key}={value}" for key, value in params.items()), *given]))
    best = propose(dataclasses.replace(plan(), space=space), [])
    best.number, best.values = 0, [0.5]
    trial = requested(*words, *overrides_of(best.params), "hydra.sweeper.params=null")
    assert "schedule=cosine" in fixed or trial.schedule.name == "one_cycle"  # of experiment=nin_small
    search = SearchFile(name="s", fixed=words, n_trials=3, in_files=True)
    (tmp_path / "best.yaml").write_text(best_config(search, best))
    expected = trial.model_copy(update={"name": "s-best"})
    assert requested("--config-dir", str(tmp_path), "--config-name", "best") == expected
    nin, command, *arguments = shlex.split(best_command(search, best))
    assert (nin, command, requested(*arguments)) == ("nin", "train", expected)


def test_the_best_command_has_the_config_dir_and_the_deletions_of_the_search(tmp_path: Path) -> None:
    study = optuna.create_study()
    lr = FloatDistribution(0.1, 0.2)
    study.add_trial(create_trial(params={"optimizer.lr": 0.1}, distributions={"optimizer.lr": lr}, value=0.5))

    def describe(name: str, *fixed: str, **options: str) -> list[str]:
        return describe_answer(tmp_path, SearchFile(name=name, fixed=[*fixed], n_trials=1, **options), study)  # type: ignore[arg-type]

    notes = describe("s", "model=tiny", config_dir="/my")
    assert "    nin train --config-dir /my name=s-best model=tiny optimizer.lr=0.1" in notes
    assert not any("--config-name best" in note for note in notes)
    notes = describe("s", "~optimizer.momentum")
    assert "    nin train name=s-best '~optimizer.momentum' optimizer.lr=0.1" in notes
    assert not any("--config-name best" in note for note in notes)
    notes = describe("s", "model=tiny", config_name="mine", config_path="/p")
    command = "nin train --config-path /p --config-name mine name=s-best model=tiny optimizer.lr=0.1"
    assert f"    {command} hydra.sweeper.params=null" in notes
    assert not any("--config-name best" in note for note in notes)
    notes = describe("s=1", "++name=s", search_path="hydra.searchpath=[/a b]")
    assert """    nin train 'hydra.searchpath=[/a b]' 'name="s=1-best"' optimizer.lr=0.1""" in notes
    assert not any("--config-name best" in note for note in notes)
    assert any("--config-name best" in note for note in describe("s=1", "++name=s"))


def test_a_search_continues_in_the_order_of_its_first_trial_though_its_keys_are_given_in_another() -> None:
    first = plan("random")
    other = dataclasses.replace(first, space=dict(reversed(first.space.items())))
    assert other.describe() == first.describe()
    trials = [propose(first, [])]
    assert propose(other, trials).params == propose(first, trials).params
    mixed = create_trial(params=dict(reversed(trials[0].params.items())), distributions=first.space, value=0.5)
    header, _, row = search_report._tabulate([*trials, mixed])
    assert dict(zip(header[4:], row[4:], strict=True)) == {k: str(v) for k, v in mixed.params.items()}


def test_pruning_says_how_many_epochs_it_saved() -> None:
    pruned = create_trial(state=TrialState.PRUNED, intermediate_values={1: 0.1, 2: 0.1})
    assert count_saved_epochs([pruned, create_trial(value=0.5, intermediate_values={1: 0.5}), pruned], 10) == 16
    # With trainer.check_val_every_n_epoch=2.
    every_second = create_trial(state=TrialState.PRUNED, intermediate_values={2: 0.1, 4: 0.1})
    assert count_saved_epochs([every_second], 10) == 6


def test_the_table_breaks_no_word() -> None:
    rows = [["trial", "val/acc", "epochs", "status", "optimizer.weight_decay", "model.conv1x1_layers"]]
    rows += [[str(i), "0.9123", "3", "finished", "0.01", "2"] for i in range(2)]
    for width in range(56, 80):
        console = Console(width=width, file=io.StringIO())
        search_report._print_table(console, rows)
        words = console.file.getvalue().split()  # type: ignore[attr-defined]
        merged = {"values", "weight_decay=0.01", "conv1x1_layers=2"}
        assert {"weight_decay", "conv1x1_layers"} <= set(words) or merged <= set(words), width


def test_a_pipe_in_the_place_of_the_journal_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / JOURNAL)
    with pytest.raises(UserError, match=r"can't be read \(not a file\)"):
        open_journal(tmp_path / JOURNAL)


def test_proposals_of_a_range_are_decimals_and_every_choice_is_checked_before_the_start() -> None:
    space = read_space(parse_overrides(["model.dropout=range(0.1,1.0,0.1)", "model=nin,lenet,alexnet,vgg,mlp"]))[0]
    trials: list[Any] = []
    for _ in range(12):
        trials.append(propose(dataclasses.replace(plan(), space=space, sampler="random"), trials))
    values = {trial.params["model.dropout"] for trial in trials}
    assert values <= {0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9}
    assert len(values) > 4
    assert {point["model"] for point in sample_corners(space)} == {"nin", "lenet", "alexnet", "vgg", "mlp"}


def test_a_combination_that_hydra_can_not_compose_is_a_failed_trial_and_the_search_continues(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(request: RunRequest) -> dict[str, Any]:
        result = {"status": "finished", "metrics": {"val/acc": 0.5}, "overrides": request.overrides}
        request.folder.write_result(result)
        return result

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workers, "execute_run", execute)
    words = ["hydra.sweeper.sampler=grid", "data=garments", f"data.root={data_root}", "name=s", "sweep.test=false"]
    searched = ["model=nin_small,mlp", "model.norm=batch"]  # the second network has no such key
    assert cli.run("train", ["-m", "hydra/sweeper=optuna", *words, *searched]) == 0
    results = read_results(Path("outputs/sweeps/s"))
    found = {word: r for r in results.values() for word in r["overrides"] if word.startswith("model=")}
    assert {word: result["status"] for word, result in found.items()} == {
        "model=nin_small": "finished", "model=mlp": "failed",
    }  # fmt: skip
    assert found["model=mlp"]["error"].startswith("model.norm=batch: no such key")


class Wide(nn.Sequential):
    """A network of the user's own."""

    def __init__(self, in_channels: int, num_classes: int, width: int, more: int = 0):
        super().__init__(nn.Conv2d(in_channels, width, 28), nn.Flatten(), nn.Linear(width, num_classes))


def test_the_arguments_of_a_network_of_ones_own_are_checked_at_both_ends(tmp_path: Path, data_root: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "wide.yaml").write_text(f"_target_: {__name__}.Wide\ninput_size: 28\nwidth: 4\n")
    words = ["model=wide", "data=garments", f"data.root={data_root}", "trainer=cpu", "trainer.max_epochs=2"]
    assert check(*words, "model.width=tag(int, interval(4, 8))", config_dir=tmp_path)
    with pytest.raises(UserError) as refused:
        check(*words, "model.width=interval(4, 8)", config_dir=tmp_path)
    remedy = "whole numbers are 'model.width=tag(int, interval(4, 8))'"
    assert refused.value.errors == tuple(
        f"model.width={end}: must be a valid integer, as annotated in {__name__}.Wide; {remedy}" for end in (4.0, 8.0)
    )
    with pytest.raises(UserError, match=r"model.more=1.0: .* whole numbers are '\+model.more=tag\(int, "):
        check(*words, "+model.more=interval(1, 2)", config_dir=tmp_path)
    with pytest.raises(UserError, match=r'^model.width="x": must be a valid integer, as annotated in [\w.]+Wide$'):
        check(*words, "model.width=4,x", config_dir=tmp_path)


def test_a_choice_that_does_not_exist_is_refused_before_the_search_starts() -> None:
    with pytest.raises(UserError, match=r"^schedule=nosuch: no such schedule; there are: constant, cosine, one_cycle;"):
        check("schedule=constant,cosine,nosuch,one_cycle", "optimizer.lr=interval(0.1, 0.2)")
