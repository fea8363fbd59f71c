"""Several processes: joblib's, torchrun's, SLURM's, and many jobs in one."""

import contextlib
import importlib.util
import itertools
import json
import os
import pickle
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf
from torch import nn

from helpers import (
    ENVIRONMENT,
    GATED,
    SMALL,
    FakeExperiment,
    gated,
    merge,
    nin,
    outcome,
    read_results,
    run_experiment,
    start,
    wait_for,
    wait_until,
)
from nin import cli
from nin.checkpoints import files as checkpoint_files
from nin.commands import train
from nin.config.composition import compose_config
from nin.config.hydra_options import open_hydra
from nin.config.keys import quote_value
from nin.config.schema import CONF, Settings, UserError
from nin.config.validation import validate
from nin.runs.folder import RunFolder
from nin.sweeps import checks, launch, summary, workers
from nin.sweeps.workers import PARENT_VARIABLE, ReportedError, start_worker
from nin.system import processes
from nin.system.processes import StoppedError
from nin.training import experiment


def alone(overrides: list[str], folder: Path) -> str:
    """The weights of a single run in this process."""
    return run_experiment(validate(compose_config(overrides)), RunFolder(folder))["weights_sha256"]


def test_a_loss_that_no_job_could_use_is_refused_before_the_first_starts() -> None:
    classes = ("torch.nn.MultiMarginLoss", "torch.nn.MultiMarginLos")
    jobs = [["experiment=quickstart", f"+loss._target_={name}", "label_smoothing=0"] for name in classes]
    jobs.append(["experiment=quickstart", f"+loss._target_={classes[0]}", "label_smoothing=0.1"])
    with pytest.raises(UserError) as refused:
        checks.check_jobs(jobs, on_this_machine=False)
    wrong_class, smoothed = refused.value.errors
    assert wrong_class == "loss._target_=torch.nn.MultiMarginLos: torch.nn has no class MultiMarginLos"
    assert smoothed.startswith("label_smoothing=0.1: is for the cross-entropy alone")


class Divisible(nn.Sequential):
    """A network of the user's own, whose constructor refuses some widths."""

    def __init__(self, in_channels: int, num_classes: int, width: int):
        groups = nn.GroupNorm(4, width)
        super().__init__(
            nn.Conv2d(in_channels, width, 14), groups, nn.AvgPool2d(15), nn.Flatten(), nn.Linear(width, num_classes)
        )


def test_networks_and_optimizers_of_ones_own_are_built_before_the_first_job_starts(
    tmp_path: Path, data_root: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "divisible.yaml").write_text(f"_target_: {__name__}.Divisible\ninput_size: 28\nwidth: 4\n")
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "rmsprop.yaml").write_text("_target_: torch.optim.RMSprop\nlr: 0.1\n")
    (tmp_path / "schedule").mkdir()
    (tmp_path / "schedule" / "bad.yaml").write_text("_target_: torch.optim.lr_scheduler.StepLR\ngama: 1\n")
    (tmp_path / "schedule" / "good.yaml").write_text(
        "_target_: torch.optim.lr_scheduler.CosineAnnealingLR\nT_max: steps\n"
    )
    common = ["data=garments", f"data.root={data_root}", "model=divisible", "optimizer=rmsprop", "trainer=cpu"]

    def errors(*jobs: str) -> list[str]:
        try:
            checks.check_jobs([[*common, word] for word in jobs], on_this_machine=True)
        except UserError as refused:
            return list(refused.errors)
        return []

    with open_hydra(str(tmp_path)):
        assert errors("model.width=4", "model.width=8", "optimizer.lr=0.2") == []
        found = [
            re.findall(r"fails with width=(.)", error) for error in errors("seed=1", "model.width=6", "model.width=7")
        ]
        assert found == [["6"], ["7"]]
        wrong_type = f'model.width="wide": must be a valid integer, as annotated in {__name__}.Divisible'
        assert errors("model.width=4", "model.width=wide") == [wrong_type]
        (refused,) = errors("optimizer.lr=0.2", "optimizer.lr=-1")
        (unknown,) = errors("schedule=good", "schedule=bad")
        assert unknown.startswith("schedule.gama: torch.optim.lr_scheduler.StepLR has no such argument; did you mean")
        assert refused.startswith("optimizer: torch.optim.RMSprop fails with lr=-1 (ValueError")


def test_processes_of_one_run_in_a_sweep_are_refused_with_the_way_that_works() -> None:
    with pytest.raises(UserError) as refused:
        checks.check_jobs(
            [["trainer=ddp", "trainer.accelerator=cpu"], ["trainer.devices=[0,1]"], ["seed=-1"]], on_this_machine=True
        )
    first, second, third = refused.value.errors
    assert "trainer.strategy=ddp, trainer.devices=auto" in first
    assert "hydra/launcher=joblib for one job per GPU" in first
    assert "trainer.devices=[0, 1]" in second
    assert third.startswith("seed=-1")


def test_an_unknown_key_is_searched_in_one_job_and_the_other_errors_of_all_jobs_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    composed: list[list[str]] = []
    compose_settings = checks.compose_settings
    monkeypatch.setattr(checks, "compose_settings", lambda job, **_: (composed.append(job), compose_settings(job))[1])
    with pytest.raises(UserError) as refused:
        checks.check_jobs([["optimzer.lr=0.1", "seed=1"], ["optimzer.lr=0.2", "seed=-1"]], on_this_machine=True)
    assert refused.value.errors == (
        "optimzer.lr=0.1: no such key; did you mean optimizer.lr?",
        "seed=-1: must be greater than or equal to 0",
    )
    assert composed == [["optimzer.lr=0.1", "seed=1"], ["seed=-1"]]


OWN = """# @package _global_
defaults: [train, {override model: mlp}, {override data: garments}, _self_]
model: {hidden_width: 32}
trainer: {max_epochs: 1}
"""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.hidden_width=16,32"], None),
        (["hydra/sweeper=optuna", "hydra.sweeper.params={threads:null}", "model.hidden_width=16,32"], None),
        (["hydra/sweeper=optuna", "model.hidden_width=16,32"], None),
        (["model.hidden_with=16,32"], "model.hidden_with=16: no such key; did you mean model.hidden_width?"),
        (["trainer.min_epochs=5,6"], "trainer.min_epochs=5"),  # more than max_epochs of this config
        (["seed=0,1", "optimizer.lr=0.1,0.10"], "optimizer.lr=0.1,seed=0: is requested twice; give each value once"),
        (["hydra/sweeper=optuna", "hydra.sweeper.params={seed:'interval(1)'}"], "seed=interval(1): must have the form"),
        (["hydra/sweeper=optuna", "hydra.sweeper.params={seed:'[1,[2'}"], "seed=[1,[2: its bracket is not closed"),
    ],
)
def test_a_sweep_of_the_users_own_config_is_checked_as_its_jobs_are_composed(
    words: list[str], message: str | None, tmp_path: Path, data_root: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(OWN)
    options = ["-m", "--config-dir", str(tmp_path), "--config-name", "mine"]
    args = train.parse_arguments([*options, "name=own", f"data.root={data_root}", *words])
    refused = pytest.raises(UserError) if message else contextlib.nullcontext()
    with open_hydra(str(tmp_path)) as app, refused as error:
        launch.Sweep(train.compose(app, args, RunMode.MULTIRUN))
    assert message is None or error.value.errors[0].startswith(message)


def test_a_part_of_a_files_sweep_has_the_jobs_of_the_complete_one(data_root: Path) -> None:
    words = ["sweep=networks", "name=parts", "data=garments", f"data.root={data_root}", "trainer=cpu"]

    def jobs(*own: str) -> list[str]:
        with open_hydra() as app:
            config = train.compose(app, train.parse_arguments(["-m", *words, *own]), RunMode.MULTIRUN)
            return [*launch.Sweep(config).jobs]

    # The file gives optimizer.lr one value, so that it names no job.
    assert jobs("model=mlp", "seed=1") == ["model=mlp,seed=1"]
    assert jobs("model=mlp,lenet", "seed=1") == ["model=mlp,seed=1", "model=lenet,seed=1"]
    assert jobs("model=mlp", "seed=1", "optimizer.lr=0.1,0.2") == [
        "model=mlp,optimizer.lr=0.1,seed=1",
        "model=mlp,optimizer.lr=0.2,seed=1",
    ]


def test_the_jobs_of_a_sweep_are_checked_with_the_search_path_of_the_command_line(
    tmp_path: Path, data_root: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tiny.yaml").write_text("defaults: [mlp, _self_]\nhidden_width: 8\n")
    own = [f"hydra.searchpath=[file://{tmp_path}]", "model=glob([t*,mlp])"]
    args = train.parse_arguments(["-m", "name=own", "data=garments", f"data.root={data_root}", *own, "trainer=cpu"])
    with open_hydra(overrides=args.overrides) as app:
        config = train.compose(app, args, RunMode.MULTIRUN)
        assert [*launch.Sweep(config).jobs] == ["model=mlp", "model=tiny"]
        assert compose_config(["model=tiny"]).model.hidden_width == 8


def test_what_lightning_refuses_is_found_before_the_first_job_begins_but_not_for_another_machine(
    data_root: Path,
) -> None:
    small = ["model=nin_small", "data=garments", f"data.root={data_root}"]
    # It needs a package that is no dependency of the project.
    jobs = [[*small, "trainer.precision=32-true"], [*small, "trainer.precision=transformer-engine"]]
    with pytest.raises(UserError, match="trainer: Requirement 'transformer_engine"):
        checks.check_jobs(jobs, on_this_machine=True)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="this machine has no GPU"):
            checks.check_jobs([[*small, "trainer=gpu"]], on_this_machine=True)
        assert len(checks.check_jobs([[*small, "trainer=gpu"]], on_this_machine=False)) == 1


def test_a_launcher_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"its package is not installed; run: python3 -m pip install hydra-submitit-launcher submitit"
    ):
        checks.require_launcher("hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher")
    checks.require_launcher("hydra._internal.core_plugins.basic_launcher.BasicLauncher")


@pytest.mark.filterwarnings(r"ignore:\s*.hydra/launcher/submitit_slurm")  # `runs.console` does it, and pytest undoes it
def test_jobs_that_are_all_sent_at_once_cannot_end_at_the_first_failure() -> None:
    requested = ["sweep.fail_fast=true", "hydra/launcher=submitit_slurm"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides=requested, return_hydra_config=True)
    with pytest.raises(UserError, match=r"sweep.fail_fast=true: all jobs are submitted before one can fail"):
        launch.Sweep(config)


def test_one_run_is_not_begun_by_each_of_sruns_processes(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(
        UserError, match=r"srun started 2 processes, and trainer.strategy=auto uses one; add trainer=ddp"
    ):
        processes.require_matching_start(settings().trainer)
    processes.require_matching_start(settings("trainer=ddp").trainer)


@pytest.mark.parametrize("fail_fast", ["true", pytest.param("false", marks=pytest.mark.long)])
def test_a_job_that_another_process_runs_is_skipped_first_and_waited_for(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fail_fast: str
) -> None:
    monkeypatch.chdir(tmp_path)
    trained: list[str] = []
    monkeypatch.setattr(experiment, "Experiment", FakeExperiment)
    monkeypatch.setattr(FakeExperiment, "train", lambda self: trained.append(self.folder.path.name))
    other = RunFolder(tmp_path / "outputs" / "sweeps" / "two" / "seed=0")
    claims, claim = [0], RunFolder.claim

    def counted(folder: RunFolder, wait: Any = None) -> Any:
        claims[0] += folder.path.name == "seed=0"
        return claim(folder, wait)

    def work() -> None:
        with claim(other):
            other.write_request({"seed": 0}, ["seed=0"])
            claimed.set()
            while claims[0] < 2 and not ended.is_set():  # until the sweep comes back to it
                time.sleep(0.01)
            time.sleep(0.3)

    claimed, ended = threading.Event(), threading.Event()
    process = threading.Thread(target=work, daemon=True)
    process.start()
    assert claimed.wait(60)
    monkeypatch.setattr(RunFolder, "claim", counted)
    words = [*SMALL, f"data.root={data_root}", f"sweep.fail_fast={fail_fast}", "name=two", "seed=0,1"]
    status, printed = cli.run("train", ["-m", *words]), capfd.readouterr().out
    ended.set()
    process.join()
    assert status == 0, printed
    assert trained == ["seed=1", "seed=0"]
    assert "two: 1 job was skipped for another process; waiting for it\n" in printed
    assert "job 2 of 2: seed=1" in printed
    assert "[HYDRA]" not in printed  # Hydra's own lines of the same jobs
    assert {job: result["status"] for job, result in read_results(other.path.parent).items()} == {
        "seed=0": "finished", "seed=1": "finished",
    }  # fmt: skip


def test_a_job_that_fails_after_a_signal_is_the_last_one(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []

    def fail(self: FakeExperiment) -> None:
        trained.append(self.folder.path.name)
        with self.request.stop:
            signal.raise_signal(signal.SIGTERM)
            raise ValueError("failed")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment, "Experiment", FakeExperiment)
    monkeypatch.setattr(FakeExperiment, "train", fail)
    assert cli.run("train", ["-m", *SMALL, f"data.root={data_root}", "name=two", "seed=0,1"]) == 143
    assert trained == ["seed=0"]
    assert "ValueError: failed" in capfd.readouterr().err


def test_a_signal_between_two_jobs_ends_the_sweep_with_its_report(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []

    def train_one(self: FakeExperiment) -> None:
        trained.append(self.folder.path.name)

    def describe(folder: Path, number: int, settings: Settings) -> str:  # before a job handles signals
        if number == 1:
            signal.raise_signal(signum)
        return ""

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment, "Experiment", FakeExperiment)
    monkeypatch.setattr(FakeExperiment, "train", train_one)
    monkeypatch.setattr(workers, "_progress", describe)
    monkeypatch.setattr(processes, "_scontrol", lambda *words: subprocess.CompletedProcess(words, 0, "", ""))
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        trained.clear()
        words = ["-m", *SMALL, f"data.root={data_root}", f"name={signum.name}", "seed=0,1"]
        assert cli.run("train", words) == 143
        assert trained == ["seed=0"]
        assert signal.getsignal(signum) == signal.SIG_DFL
        printed = capfd.readouterr()
        assert "2 (1 not started)" in printed.out
        assert ("SLURM job 7 is requeued" in printed.err) == (signum == signal.SIGUSR1)


@pytest.mark.filterwarnings(r"ignore:\s*.hydra/launcher/joblib")  # as `silence_known_warnings` does
def test_joblibs_workers_know_the_sweeps_process(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in (PARENT_VARIABLE, "NIN_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(variable, "1")  # restored after the test
    words = [*SMALL, f"data.root={data_root}", "name=x", "seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=1"]
    started: list[dict[str, Any]] = []

    class Launcher:
        joblib: ClassVar[dict[str, Any]] = {}

        def launch(self, jobs: list[list[str]], start: int) -> list[Any]:
            started.append(self.joblib)
            return []

    with open_hydra() as app:
        sweep = launch.Sweep(train.compose(app, train.parse_arguments(["-m", *words]), RunMode.MULTIRUN))
        as_it_is = SimpleNamespace(stopped_by=None, job_failed=False, forward_during=lambda launch: launch)
        sweep.signals = as_it_is  # as with several workers
        monkeypatch.setattr(launch.Plugins, "instantiate_launcher", lambda *_, **__: Launcher())
        assert sweep._launch(app.config_loader, launch.Callbacks()) == 0
    assert os.environ[PARENT_VARIABLE] == str(os.getpid())
    assert started == [{"initializer": start_worker}]


@pytest.mark.parametrize(
    ("ended", "status", "printed"),
    [(UserError("result.json: damaged"), 2, "nin train: result.json: damaged\n"), (ReportedError("of a job"), 1, "")],
)
def test_an_error_of_the_launcher_itself_is_printed_and_that_of_a_job_is_not_printed_again(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    ended: UserError, status: int, printed: str,
) -> None:  # fmt: skip
    def fail(jobs: list[list[str]], start: int) -> list[Any]:
        raise ended

    monkeypatch.chdir(tmp_path)
    launcher = SimpleNamespace(launch=fail)
    monkeypatch.setattr(launch.Plugins, "instantiate_launcher", lambda *_, **__: launcher)
    words = ["-m", *SMALL, f"data.root={data_root}", "name=x", "seed=0,1"]
    assert cli.run("train", words) == status
    assert capsys.readouterr().err == printed

    def refuse(*_: Any, **__: Any) -> None:
        raise UserError("the database can't be reached")

    # A report that fails does not take the place of what ended the sweep.
    RunFolder(Path("outputs/sweeps/x/seed=0")).write_request({}, [])
    monkeypatch.setattr(summary, "report", refuse)
    assert cli.run("train", words) == status
    assert capsys.readouterr().err == f"nin train: no report: the database can't be reached\n{printed}"


def test_a_sweep_waits_for_its_own_jobs_only_and_not_for_others_in_its_folder(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    launched: list[int] = []
    sweep = tmp_path / "outputs" / "sweeps" / "x"
    other = RunFolder(sweep / "optimizer.lr=0.1")
    other.checkpoints.mkdir(parents=True)
    other.config.parent.mkdir()
    other.write_request({"seed": 0}, ["optimizer.lr=0.1"])
    other.update_state(pid=os.getpid(), host=socket.gethostname())
    jobs = {f"seed={seed}": RunFolder(sweep / f"seed={seed}") for seed in (0, 1, 2)}
    for job in jobs.values():
        job.path.mkdir()

    def finish_those_of_this_process(*_: object) -> int:
        launched.append(1)
        for name, job in jobs.items():
            if name not in skipped:
                job.write_result({"status": "finished", "metrics": {}})
        return 0

    monkeypatch.setattr(launch.Sweep, "_launch", finish_those_of_this_process)
    words = ["-m", *SMALL, f"data.root={data_root}", "name=x", "seed=0,1,2"]
    # Skipped while another process had claimed it, which has been stopped since, or has failed.
    skipped = ["seed=0", "seed=1"]
    jobs["seed=1"].write_result({"status": "failed", "error": "of another process"})
    assert cli.run("train", words) == 0
    assert launched == [1, 1]
    assert "x: 2 jobs were skipped for another process; waiting for them\n" in capsys.readouterr().out
    skipped = []
    assert cli.run("train", words) == 0
    assert launched == [1, 1, 1]
    assert "another process" not in capsys.readouterr().out


def test_the_jobs_of_a_further_batch_are_numbered_after_those_before_it(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    launched: list[tuple[int, list[str]]] = []

    def launch_jobs(jobs: list[list[str]], start: int) -> list[Any]:
        launched.append((start, [job[-1] for job in jobs]))
        return []

    monkeypatch.setattr(launch.Plugins, "instantiate_launcher", lambda *_, **__: SimpleNamespace(launch=launch_jobs))
    monkeypatch.setattr(launch.Sweep, "_count_skipped_jobs", lambda _: 0)
    words = [*SMALL, f"data.root={data_root}", "name=x", "seed=0,1,2", "hydra.sweeper.max_batch_size=2"]
    assert cli.run("train", ["-m", *words]) == 0
    first, second, third = (f"hydra.sweep.subdir={quote_value(f'seed={seed}')}" for seed in range(3))
    assert launched == [(0, [first, second]), (2, [third])]


def test_a_rank_left_in_the_environment_does_not_change_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert cli.run("train", ["-m", "name=a,b"]) == 2
    assert "SLURM_PROCID" not in os.environ


def test_the_request_of_a_sweep_is_not_written_through_a_link_and_its_report_lists_the_jobs_that_have_not_started(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep, target = tmp_path / "outputs" / "sweeps" / "x", tmp_path / "target"
    target.write_text("precious")
    RunFolder(sweep / "model=mlp").write_request({}, ["model=mlp"])
    for name in ("multirun.yaml", "jobs.json"):
        (sweep / name).symlink_to(target)
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "model" / "tiny.yaml").write_text("defaults: [mlp, _self_]\nhidden_width: 8\n")
    launcher = SimpleNamespace(launch=lambda jobs, start: [])
    monkeypatch.setattr(launch.Plugins, "instantiate_launcher", lambda *_, **__: launcher)
    words = ["data=garments", f"data.root={data_root}", "trainer=cpu", "name=x", "model=glob([t*,mlp])"]
    assert cli.run("train", ["-m", "--config-dir", "own", *words]) == 0
    assert target.read_text() == "precious"
    assert OmegaConf.load(sweep / "multirun.yaml").hydra.overrides.task[-1] == words[-1]
    capsys.readouterr()
    assert cli.run("report", [str(sweep)]) == 0  # without --config-dir
    assert re.search(r"tiny +.*not started", capsys.readouterr().out)


def test_weights_that_are_missing_are_found_before_the_first_job(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.ckpt").touch()
    words = ["-m", "experiment=quickstart", f"data.root={data_root}", "trainer=cpu", "name=x"]
    for more in (["weights=here.ckpt,nothere"], ["weights=nothere", "hydra/sweeper=optuna", "model.dropout=0,0.5"]):
        assert cli.run("train", [*words, *more]) == 2
        assert capsys.readouterr().err == f"nin train: weights={tmp_path}/nothere: no such file\n"
    assert [path.name for path in tmp_path.iterdir()] == ["here.ckpt"]


def test_a_folder_of_any_name_is_a_value_that_hydra_reads() -> None:
    for folder in ("/home/o'brien/a b", '/ä="1",x', "/a\\", "/a\\'b", "/\\b\\\\'"):
        (override,) = OverridesParser.create().parse_overrides([f"hydra.run.dir={quote_value(folder)}"])
        assert override.value() == folder


def test_what_ends_a_job_travels_between_processes() -> None:
    stopped = pickle.loads(pickle.dumps(StoppedError(signal.SIGTERM)))
    assert (stopped.signum, stopped.exit_status, str(stopped)) == (signal.SIGTERM, 143, "stopped by SIGTERM")
    refused = pickle.loads(pickle.dumps(ReportedError("one", "two")))
    assert (type(refused), refused.errors) == (ReportedError, ("one", "two"))


@pytest.mark.long
def test_joblib_runs_jobs_at_once_stops_and_resumes_to_the_same_weights(tmp_path: Path, data_root: Path) -> None:
    there, gate = {"cwd": tmp_path, "NIN_DATA": str(data_root), **GATED}, tmp_path / "gate"
    gate.write_text("3")
    limits = ["trainer.limit_train_batches=20", "checkpoint.every_n_steps=2"]
    requested = [*SMALL, "callbacks=none", *limits, *gated(gate)]
    sweep = tmp_path / "outputs" / "sweeps" / "at-once"
    command = ["train", "-m", *requested, "name=at-once", "hydra/launcher=joblib"]
    # A third process has nothing to do, and must not be the end of the others.
    first = start(*command, "seed=0,1", "hydra.launcher.n_jobs=3", **there)
    for seed in (0, 1):  # neither waits for the other
        wait_for(sweep / f"seed={seed}" / "checkpoints" / "last.ckpt", first)
    first.send_signal(signal.SIGTERM)
    gate.write_text("1000")
    output = first.communicate(timeout=90)[0]
    assert first.returncode == 143, output
    stopped = {seed: (sweep / f"seed={seed}" / "nin.log") for seed in (0, 1)}
    assert all("stopped by SIGTERM" in log.read_text() for log in stopped.values()), output
    assert "2 unfinished" in output.replace("\n", "")

    second = nin(*command, "seed=0,1,2", **there)
    assert second.returncode == 0, second.stderr
    found = read_results(sweep)
    assert [found[f"seed={seed}"]["resumes"] for seed in (0, 1, 2)] == [1, 1, 0]
    for seed in (0, 2):
        weights = alone([*requested, f"seed={seed}", f"data.root={data_root}"], tmp_path / f"alone-{seed}")
        assert found[f"seed={seed}"]["weights_sha256"] == weights
    assert "seed=2  epoch 1/2" in second.stdout


@pytest.mark.long
@pytest.mark.parametrize("again", [False, True])
def test_ctrl_c_of_a_terminal_reaches_each_process_of_a_joblib_sweep(
    tmp_path: Path, data_root: Path, again: bool
) -> None:
    gate = tmp_path / "gate"
    gate.write_text("3")
    requested = [*SMALL, "callbacks=none", "logger=none", "checkpoint.every_n_steps=2", *gated(gate), "seed=0,1,2"]
    sweep = tmp_path / "outputs" / "sweeps" / "terminal"
    command = ["train", "-m", *merge(requested), "name=terminal", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    environment = ENVIRONMENT | GATED | {"NIN_DATA": str(data_root), "OMP_NUM_THREADS": "1"}
    pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(
        [sys.executable, "-m", "nin", *command], cwd=tmp_path, env=environment, start_new_session=True, **pipe
    )
    with process:
        try:
            for seed in (0, 1):
                wait_for(sweep / f"seed={seed}" / "checkpoints" / "last.ckpt", process)
            wait_until(lambda: len(list(tmp_path.glob("gate.*"))) == 2, process)
            os.killpg(process.pid, signal.SIGINT)
            if again:
                stopping = (line for line in process.stdout if line.startswith("stopping after"))
                assert len(list(itertools.islice(stopping, 2))) == 2
                os.killpg(process.pid, signal.SIGINT)
            else:
                gate.write_text("1000")
            output = process.communicate(timeout=90)[0]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    for seed in (0, 1):
        assert ("stopped by SIGINT" in (sweep / f"seed={seed}" / "nin.log").read_text()) is not again
    assert not (sweep / "seed=2").exists() or not (sweep / "seed=2" / "nin.log").exists()


@pytest.mark.long
def test_workers_of_a_killed_sweep_end_and_two_sweeps_at_once_run_each_job_once(
    tmp_path: Path, data_root: Path
) -> None:
    there, gate = {"cwd": tmp_path, "NIN_DATA": str(data_root), "OMP_NUM_THREADS": "1", **GATED}, tmp_path / "gate"
    gate.write_text("3")
    sweep = tmp_path / "outputs" / "sweeps" / "killed"
    requested = [*SMALL, "callbacks=none", "logger=none", "checkpoint.every_n_steps=1", *gated(gate)]
    command = ["train", "-m", *requested, "name=killed", "seed=0,1"]
    first = start(*command, "hydra/launcher=joblib", **there)
    for seed in (0, 1):
        wait_for(sweep / f"seed={seed}" / "checkpoints" / "last-2.ckpt", first)  # the third save: it is at the gate
    first.kill()
    # Two sweeps at once: jobs that workers or the other sweep still run are skipped first, and waited for.
    others = [start(*command, "hydra/launcher=basic", **there) for _ in range(2)]
    for process in others:
        assert process.stdout is not None
        assert any("is working on this run" in line for line in process.stdout)  # and not that it ended without
    gate.write_text("1000")
    first.communicate(timeout=90)  # until the workers, which have the same output, have ended
    outputs = [process.communicate(timeout=200)[0] for process in others]
    assert [process.returncode for process in others] == [0, 0], outputs
    for job, result in read_results(sweep).items():
        log = (sweep / job / "nin.log").read_text()
        assert (result["status"], result["resumes"]) == ("finished", 1)
        assert (log.count("stopped by SIGTERM"), log.count("resume #")) == (1, 1)
    assert len(read_results(sweep)) == 2


@pytest.mark.long
@pytest.mark.parametrize(
    ("launcher", "message"),
    [("joblib", "a worker process was killed; the same command"), ("submitit_local", "a job was lost (")],
)
def test_a_killed_job_ends_the_sweep_with_one_line(
    tmp_path: Path, data_root: Path, launcher: str, message: str
) -> None:
    gate = tmp_path / "gate"
    gate.write_text("3")
    requested = [*SMALL, "callbacks=none", "logger=none", "checkpoint.every_n_steps=1", *gated(gate)]
    sweep = tmp_path / "outputs" / "sweeps" / "lost"
    words = ["train", "-m", *requested, "name=lost", "seed=0,1", f"hydra/launcher={launcher}"]
    process = start(*words, cwd=tmp_path, NIN_DATA=str(data_root), OMP_NUM_THREADS="1", **GATED)
    for seed in (0, 1):
        wait_for(sweep / f"seed={seed}" / "checkpoints" / "last.ckpt", process)
    os.kill(json.loads((sweep / "seed=0" / ".hydra" / "state.json").read_text())["pid"], signal.SIGKILL)
    gate.write_text("1000")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1, output
    assert f"nin train: {message}" in output
    assert "the same command resumes the sweep" in output
    assert "Traceback" not in output


def torchrun(*arguments: str, cwd: Path, data_root: Path, **more: Any) -> subprocess.Popen[str]:
    """Starts two processes of ``nin`` as on a machine with two devices."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "nin", *merge(arguments)],
        cwd=cwd,
        env=os.environ | {"NIN_DATA": str(data_root), "OMP_NUM_THREADS": "1"},
        text=True,
        **more,
    )


def on_a_terminal(*arguments: str, stop_at: Path | None = None, **more: Any) -> tuple[int, str]:
    """The exit status of ``torchrun`` and what a person sees: with a terminal there is a bar.

    Args:
        stop_at: a file; as soon as it is there, torchrun is requested to stop.
    """
    terminal, end = os.openpty()
    process = torchrun(*arguments, stdout=end, stderr=end, **more)
    os.close(end)
    printed, until = b"", time.monotonic() + 200
    with contextlib.suppress(OSError):  # the last process has closed it
        while time.monotonic() < until and select.select([terminal], [], [], 60)[0]:
            printed += os.read(terminal, 65536)
            if stop_at and stop_at.exists():
                process.terminate()
                stop_at = None
    os.close(terminal)
    try:
        return process.wait(timeout=60), printed.decode()
    finally:
        process.terminate()  # if it hangs: torchrun ends its processes, after half a minute by force
        process.wait(timeout=60)


@pytest.mark.long
def test_torchruns_processes_share_one_folder_and_are_not_one_run_each(tmp_path: Path, data_root: Path) -> None:
    # Without experiment=quickstart, which has a name: this one is to be the time of start.
    requested, there = (
        ["train", "model=nin_small", "data=garments", *SMALL[1:]],
        {"cwd": tmp_path, "data_root": data_root},
    )
    refused = torchrun(*requested, stderr=subprocess.PIPE, **there).communicate(timeout=120)[1]
    assert "torchrun started 2 processes, and trainer.strategy=auto uses one" in refused
    assert "add trainer=ddp trainer.devices=2" in refused
    assert not (tmp_path / "outputs").exists()
    same = ["model.norm=none", "model.dropout=0", "optimizer=sgd", "optimizer.lr=0.01", "trainer.max_epochs=1"]
    status, printed = on_a_terminal(*requested, "trainer.strategy=ddp", "trainer.devices=2", *same, **there)
    assert status == 0, printed
    assert "epoch 1/1" in printed
    (run,) = (tmp_path / "outputs" / "runs").iterdir()
    two = json.loads((run / "result.json").read_text())

    # Two processes with batches of 32 do what one does with batches of 64.
    folder = RunFolder(tmp_path / "one")
    one = run_experiment(
        validate(compose_config([*requested[1:], *same, "data.batch_size=64", f"data.root={data_root}"])), folder
    )
    assert (two["steps"], two["status"]) == (one["steps"], "finished")
    for metric in ("val/loss", "val/acc", "test/loss", "test/acc"):
        assert two["metrics"][metric] == pytest.approx(one["metrics"][metric], rel=1e-4)
    weights = [checkpoint_files.read(of.last)["state_dict"] for of in (RunFolder(run), folder)]
    for name in weights[0]:
        if name.startswith("network."):
            assert torch.allclose(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-6), name


@pytest.mark.long
def test_joblib_ends_at_the_first_failure_if_requested_with_the_others_checkpoints(
    tmp_path: Path, data_root: Path
) -> None:
    requested = [*SMALL, "callbacks=none", "schedule=constant", "model.norm=none", "trainer.max_epochs=2000"]
    sweep = tmp_path / "outputs" / "sweeps" / "fast"
    command = [
        *requested,
        "optimizer.lr=0.0001,1e30,0.0002",
        "hydra/launcher=joblib",
        "sweep.fail_fast=true",
        "name=fast",
    ]
    ended = nin("train", "-m", *command, cwd=tmp_path, NIN_DATA=str(data_root))
    assert ended.returncode == 1, ended.stderr
    assert json.loads((sweep / "optimizer.lr=1e+30" / "result.json").read_text())["status"] == "failed"
    assert "stopped by SIGTERM" in (sweep / "optimizer.lr=0.0001" / "nin.log").read_text()
    assert not (sweep / "optimizer.lr=0.0002" / "nin.log").exists()


@pytest.mark.long
def test_torchruns_processes_are_stopped_and_resume_to_the_same_weights(tmp_path: Path, data_root: Path) -> None:
    # 99 images in batches of 16 for both: the last one is 2 and 1, and from then on their dropout differs.
    requested = [
        *("train", *SMALL, "trainer.strategy=ddp", "trainer.devices=2", "trainer.limit_train_batches=1.0"),
        *("data.val_size=9901", "data.batch_size=8", "data.augment=flip_shift", "trainer.max_epochs=20"),
        "checkpoint.every_n_steps=5",
    ]
    there, runs = {"cwd": tmp_path, "data_root": data_root}, tmp_path / "outputs" / "runs"
    assert on_a_terminal(*requested, "name=whole", **there)[0] == 0
    third = runs / "halves" / "checkpoints" / "last-2.ckpt"
    status, printed = on_a_terminal(*requested, "name=halves", stop_at=third, **there)
    assert status == 1  # torchrun's
    assert "last.ckpt is saved; resume with: the same command\r\n" in printed  # of a terminal
    assert on_a_terminal(*requested, "name=halves", **there)[0] == 0
    whole, halves = (json.loads((runs / name / "result.json").read_text()) for name in ("whole", "halves"))
    assert outcome(halves) == outcome(whole)
    assert halves["resumes"] == 1


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads Linux's /proc")
def test_twenty_jobs_in_one_process_leave_nothing_behind(tmp_path: Path, data_root: Path) -> None:
    watched = """
import logging, os, sys, threading
from nin.commands import train
from nin.sweeps import launch

run = launch.run_sweep_job

def job(config):
    try:
        return run(config)
    finally:
        loggers = [logging.getLogger(), *map(logging.getLogger, logging.Logger.manager.loggerDict)]
        # The most so far: what there is at the moment goes down when the system takes memory back, and up again.
        memory = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
        found = [len(os.listdir("/proc/self/fd")), threading.active_count(), sum(len(l.handlers) for l in loggers)]
        print("left", memory, *found, flush=True)

launch.run_sweep_job = job
sys.exit(train.main(sys.argv[1:]))
"""
    # The second ten fail: their tracebacks must not hold their networks.
    requested = [*SMALL, "schedule=constant", "model.norm=none", "optimizer.lr=0.001,1e30", "seed=range(0,10)"]
    done = subprocess.run(
        [sys.executable, "-c", watched, *merge(["-m", "name=flat", *requested])],
        cwd=tmp_path,
        env=os.environ | {"NIN_DATA": str(data_root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    left = [[int(n) for n in line.split()[1:]] for line in done.stdout.splitlines() if line.startswith("left")]
    assert len(left) == 20, done.stderr
    memory, *counts = zip(*left[4:], strict=True)
    assert all(len(set(count)) == 1 for count in counts), left
    assert max(memory) - min(memory) < 40_000, memory  # KiB; with the tracebacks kept it was 58,000


# ---------------------------------------------------------------------------------------------------------------------
# A real SLURM cluster, where there is one: nodes that are idle and take jobs from here.


@pytest.fixture
def release(shared_folder: Path) -> Iterator[Callable[[], None]]:
    """Lets requeued jobs begin without the two minutes that SLURM waits; at the end no job of the test is left.

    One test at a time has the cluster: it cancels what is in the queue.
    """
    if not shutil.which("sbatch") or subprocess.run(["sinfo", "-h"], capture_output=True).returncode:
        pytest.skip("no SLURM cluster takes jobs from here")

    def queue(*options: str) -> list[str]:
        return subprocess.run(["squeue", "-h", *options], capture_output=True, text=True).stdout.split()

    def now() -> None:
        for job in queue("-t", "PD", "-o", "%i"):
            shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
            # Sooner than this the node still counts the job's last life as revoked.
            if "Reason=BeginTime" in shown and "Restarts=0" not in shown:
                time.sleep(4)
                subprocess.run(["scontrol", "update", f"jobid={job}", "StartTime=now"], check=False)

    with FileLock(shared_folder / "slurm.lock"):
        before = queue("-o", "%A")
        yield now
        for job in set(queue("-o", "%A")) - set(before):
            subprocess.run(["scancel", job], check=False)


ON_SLURM = [*SMALL, "callbacks=none", "trainer.limit_train_batches=20", "checkpoint.every_n_steps=1"]


@pytest.mark.long
def test_slurm_jobs_that_are_stopped_go_back_and_end_with_the_same_weights(
    tmp_path: Path, data_root: Path, release: Callable[[], None]
) -> None:
    sweep, gate = tmp_path / "outputs" / "sweeps" / "slurm", tmp_path / "gate"
    requested = [*ON_SLURM, *gated(gate)]
    command = ["train", "-m", *requested, "name=slurm", "hydra/launcher=submitit_slurm", "seed=0,1,2"]
    waiting = start(*command, cwd=tmp_path, NIN_DATA=str(data_root), **GATED)
    gate.write_text("3")
    for seed, stop in enumerate((["scancel", "--signal=USR2"], ["scontrol", "requeue"])):
        wait_for(sweep / f"seed={seed}" / "checkpoints" / "last.ckpt", waiting)
        (log,) = (sweep / ".submitit").glob(f"*_{seed}")
        # Its status says little: to a signal that it has delivered, the controller may answer "try again later", and
        # scancel then fails because the job has ended. That the job was stopped shows in its result.
        subprocess.run([*stop, log.name], check=False)
        gate.write_text(str(6 + 1000 * seed))
    while waiting.poll() is None:
        release()
        time.sleep(1)
    assert waiting.returncode == 0, waiting.communicate()[0]
    waiting.communicate()
    found = read_results(sweep)
    assert [found[f"seed={seed}"]["resumes"] for seed in (0, 1, 2)] == [1, 1, 0]
    for seed in (0, 1):
        weights = alone([*requested, f"seed={seed}", f"data.root={data_root}"], tmp_path / f"alone-{seed}")
        assert found[f"seed={seed}"]["weights_sha256"] == weights


@pytest.mark.long
def test_a_single_slurm_job_that_is_warned_goes_back_and_finds_its_folder(
    tmp_path: Path, data_root: Path, release: Callable[[], None]
) -> None:
    # Without experiment=quickstart, which has a name.
    gate = tmp_path / "gate"
    gate.write_text("3")
    requested = ["model=nin_small", "data=garments", "trainer=cpu", *ON_SLURM[2:], "optimizer.lr=0.01", *gated(gate)]
    line = " ".join(f"'{word}'" for word in [sys.executable, "-m", "nin", "train", *merge(requested)])
    sent = subprocess.run(
        ["sbatch", "--parsable", "--requeue", f"--chdir={tmp_path}", "--wrap", f"srun {line}"],
        env=os.environ | {"NIN_DATA": str(data_root)} | GATED,
        capture_output=True,
        text=True,
        check=True,
    )
    run = tmp_path / "outputs" / "runs" / sent.stdout.strip()
    until = time.monotonic() + 120
    while not (run / "checkpoints" / "last.ckpt").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    subprocess.run(["scancel", "--signal=USR1", sent.stdout.strip()], check=True)
    gate.write_text("1000")
    while not (run / "result.json").exists():
        assert time.monotonic() < until + 120
        release()
        time.sleep(0.5)
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["resumes"]) == ("finished", 1)
    assert result["weights_sha256"] == alone([*requested, f"data.root={data_root}"], tmp_path / "alone")


@pytest.mark.long
def test_a_joblib_sweep_in_a_slurm_job_that_is_warned_goes_back_with_all_its_jobs(
    tmp_path: Path, data_root: Path, release: Callable[[], None]
) -> None:
    sweep, gate = tmp_path / "outputs" / "sweeps" / "two", tmp_path / "gate"
    gate.write_text("3")
    requested = [*ON_SLURM, *gated(gate), "name=two", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    line = shlex.join([sys.executable, "-m", "nin", "train", "-m", *merge(requested), "seed=0,1"])
    sent = subprocess.run(
        ["sbatch", "--parsable", "--requeue", f"--chdir={tmp_path}", "--open-mode=append", "--wrap", f"exec {line}"],
        env=os.environ | {"NIN_DATA": str(data_root)} | GATED,
        capture_output=True,
        text=True,
        check=True,
    )
    until = time.monotonic() + 240
    while len(list(sweep.glob("*/checkpoints/last.ckpt"))) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    # As `sbatch --signal=B:USR1@120` does.
    subprocess.run(["scancel", "--batch", "--signal=USR1", sent.stdout.strip()], check=False)
    gate.write_text("1000")
    while not (sweep / "summary.csv").exists() or len(list(sweep.glob("*/result.json"))) < 2:
        assert time.monotonic() < until
        release()
        time.sleep(0.5)
    printed = (tmp_path / f"slurm-{sent.stdout.strip()}.out").read_text()
    assert printed.count("stopped by SIGTERM") == 2, printed
    assert printed.count("is requeued") == 1, printed
    assert {name: result["resumes"] for name, result in read_results(sweep).items()} == {"seed=0": 1, "seed=1": 1}
