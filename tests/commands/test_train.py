import os
import shlex
import sys
from pathlib import Path

import pytest
from hydra.types import RunMode

from helpers import SMALL, broken_pipe
from nin import cli
from nin.commands import train
from nin.commands.train import compose, parse_arguments
from nin.config.hydra_options import open_hydra
from nin.config.schema import UserError
from nin.sweeps import launch, workers
from nin.training.request import RunRequest


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIN_DATA", str(data_root))


JOBLIB = ["-m", "hydra/launcher=joblib"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--multirn", "seed=1,2"],
         "--multirn: no such option; settings are given without dashes, as in multirn=…; did you mean "
         "--multirun? There are: *"),
        (["-m", "seed=1,2", "--cfg", "job"],
         "--cfg and -m exclude each other; leave out -m, and give each swept key one value"),
        (["--resolve"], "--resolve and --package: are for --cfg, as in nin train --cfg job --resolve; add it"),
        (["--package", "x"], "--resolve and --package: are for --cfg, as in nin train --cfg job --resolve; add it"),
        (["--experimental-rerun", "x"], "--experimental-rerun: not supported; use nin resume RUN"),
        ([*JOBLIB, "hydra.launcher.n_jobs=0"],
         "hydra.launcher.n_jobs=0: must be 1 or more, or -1 for the number of cores"),
        ([*JOBLIB, "hydra.launcher.backend=foo"],
         "hydra.launcher.backend=foo: must be loky or null; jobs can't share a process"),
        ([*JOBLIB, "hydra.launcher.timeout=5"],
         "hydra.launcher.timeout=5: must be null; trainer.max_time limits a job"),
        ([*JOBLIB, "hydra.launcher.pre_dispatch=foo"],
         "hydra.launcher.pre_dispatch=foo: must be all, a number or n_jobs"),
        ([*JOBLIB, "hydra.launcher.require=foo"], "hydra.launcher: require=foo is not a valid backend constraint*"),
        (["-m", "optimzer.lr=0.1,0.2"], "optimzer.lr=0.1: no such key; did you mean optimizer.lr?"),
        (["-m", "hydra/sweeper=optuna", "optimzer.lr=interval(0,1)"],
         "optimzer.lr=0.0: no such key; did you mean optimizer.lr?"),
        (["-m", "seed=range(3,3)", "optimzer.lr=1"], "optimzer.lr=1: no such key; did you mean optimizer.lr?"),
        (["-m", "seed=range(0,3,0)", "optimzer.lr=1"], "optimzer.lr=1: no such key; did you mean optimizer.lr?"),
        (["-m", "seed=range(0,nan)", "optimzer.lr=1"], "optimzer.lr=1: no such key; did you mean optimizer.lr?"),
        (["-m", f"seed=2,{'1' * 5000}"], f"seed=2,{'1' * 72}…: a number of too many digits"),
        (["-m", "optimizer=glob(*)", "optimzer.lr=1"], "optimzer.lr=1: no such key; did you mean optimizer.lr?"),
        (["-m", "model=choice(mlp)", "model.hidden_width=8"],
         "model.hidden_width: Hydra composes a sweep also without what it varies, and that config has no such "
         "key; write ++model.hidden_width=…"),
        (["-m", "hydra.sweeper._target_=my.Sweeper"],
         "hydra.sweeper: my.Sweeper is not supported; a sweep trains with all values, and hydra/sweeper=optuna "
         "searches for the best"),
        ([*JOBLIB, "hydra.launcher.n_job=2"],
         "hydra.launcher.n_job=2: no such key; did you mean hydra.launcher.n_jobs? There are: *"),
        (["hydra.run.dri=x"], "hydra.run.dri=x: no such key; did you mean hydra.run.dir? There are: dir"),
        (["-m", "hydra.launcher.n_jobs=2"],
         "hydra.launcher.n_jobs=2: no such key, because the jobs run one after another; add "
         "hydra/launcher=joblib for several at once"),
        (["-m", "sweep.jobs=null"], "sweep.jobs: is set by the sweep; leave it out"),
        (["-m", "hydra.sweeper.max_batch_size=0"], "hydra.sweeper.max_batch_size=0: must be 1 or more, or null"),
        (["-m", "seed=1", "seed=2,3"], "seed: given more than once; give it once, with all its values"),
        (["-m", "seed=1,2", "seed=2,3"], "seed: given more than once; give it once, with all its values"),
        (["-m", "seed=1", "seed=2", "optimizer.lr=0.1,0.2"], "seed: has two values, 1 and 2; give it once"),
        (["-m", "seed=range(0,3,0)"], "seed=range(0,3,0): its values can't be enumerated (range() arg 3*"),
        (["-m", "name=a,b"], "name: can't be varied; it names the whole sweep"),
        (["trainer.num_nodes=2"],
         "trainer.num_nodes=2: this process was started on one node only; start it on every node with torchrun "
         "or srun, or set MASTER_ADDR and NODE_RANK on each"),
        (["hydra.run.dir="], "hydra.run.dir: is empty; leave it out, or give the run's folder"),
        (["hydra.output_subdir=.hydra"],
         "hydra.output_subdir=.hydra: a run keeps its own .hydra/, whose config Hydra would overwrite; leave it "
         "out"),
        (["hydra.job.chdir=true"],
         "hydra.job.chdir=true: a run stays in the working directory, so that relative paths keep their "
         "meaning; leave it out"),
        (["-m", "hydra.job.chdir=true", "seed=1,2"],
         "hydra.job.chdir=true: a run stays in the working directory, so that relative paths keep their "
         "meaning; leave it out"),
        (["-m", "hydra.sweep.dir=", "seed=1,2"], "hydra.sweep.dir: is empty; leave it out, or give the sweep's folder"),
        (["-m", "hydra.sweep.subdir=x", "seed=1,2"],
         "hydra.sweep.subdir: a sweep names its jobs' folders by what it varies; leave it out"),
        (["-m", "hydra.sweep.subdir=${hydra.job.num}", "seed=1,2"],
         "hydra.sweep.subdir: a sweep names its jobs' folders by what it varies; leave it out"),
        (["--config-path", "nowhere"], "--config-path nowhere: no such folder"),
        (["name=${nosuch}"], "name: Interpolation key 'nosuch' not found"),
        (["-m", "optimizer.lr=${nosuch}", "seed=1,2"], "optimizer.lr: Interpolation key 'nosuch' not found"),
        (["+callbacks.x._target_=lightning.pytorch.callbacks.Timer", "+callbacks.x.duration=abc"],
         "callbacks.x: Error in call to target 'lightning.pytorch.callbacks.timer.Timer'*"),
        (["+callbacks.x={_target_: lightning.pytorch.callbacks.ModelSummary, max_depth: all}"],
         'callbacks.x.max_depth="all": must be a valid integer, as annotated in '
         "lightning.pytorch.callbacks.ModelSummary"),
        (["+callbacks.x={_target_: zipfile.ZipFile, file: no_such}"],
         "callbacks.x: Error in call to target 'zipfile.ZipFile': FileNotFoundError: [Errno 2] No such file or "
         "directory: 'no_such'"),
        (["+callbacks.x={_target_: builtins.dict, y: {_target_: builtins.no_such}}"],
         "callbacks.x: Error locating target 'builtins.no_such'*"),
        (["+callbacks.x._target_=no_such.X"],
         "callbacks.x._target_=no_such.X: can't be imported (No module named 'no_such'); is the folder of its "
         "file in PYTHONPATH?"),
        (["+callbacks.x._target_=helpers.NoSuch"], "callbacks.x._target_=helpers.NoSuch: helpers has no class NoSuch"),
        (["hydra/launcher=joblib"], "hydra/launcher=joblib: starts the jobs of a sweep; add -m, or leave it out"),
        (["callbacks.c={_target_: x.C}"], "callbacks.c={_target_: x.C}: no such key; there are: images, dead_units; to "
         "add another one: +callbacks.c=…"),
        (["~data", "~callbacks", "seed=1"], "2 errors\n  data: has no value; set data=…, or do not delete it\n"
         "  callbacks: has no value; set callbacks=…, or do not delete it"),
        (["+callbacks.x._target_=builtins.dict"],
         "callbacks.x: its _target_ must be a subclass of Lightning's Callback, not {}"),
    ],
)  # fmt: skip
def test_a_refused_command_line_is_one_message_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.run("train", [*arguments, *SMALL[:2]]) == 2  # few: each is composed alone to find all errors
    printed = capsys.readouterr()
    if message.endswith("*"):  # the rest is another package's
        assert printed.err.startswith(f"nin train: {message[:-1]}")
    else:
        assert printed.err == f"nin train: {message}\n"
    assert (printed.out, list(tmp_path.iterdir())) == ("", [])


def test_a_wrong_value_of_an_option_is_reported_with_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.run("train", ["--cfg", "jobb"])
    assert capsys.readouterr().err.startswith("usage: nin train [")


def test_a_refused_run_leaves_a_folder_that_was_there(tmp_path: Path) -> None:
    (folder := tmp_path / "outputs" / "runs" / "x").mkdir(parents=True)
    assert cli.run("train", [*SMALL, "name=x", "trainer.devices=0"]) == 2
    assert list(folder.iterdir()) == []


def test_a_run_is_trained_though_nobody_reads_what_it_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[RunRequest] = []

    def execute(request: RunRequest) -> None:
        print("… " * 10_000, flush=True)
        trained.append(request)

    monkeypatch.setattr(train, "execute_run", execute)
    with os.fdopen(broken_pipe(), "w", encoding="ascii") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert cli.run("train", ["data=garments", "name=x"]) == 0
    assert [request.settings.name for request in trained] == ["x"]


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["experiment=quickstart"], "quickstart"),
        (["experiment=quickstart", "trainer=cpu", "threads=1", "logger=none"], "quickstart"),  # the same experiment
        (["experiment=quickstart", "optimizer.lr=0.01"], "quickstart,optimizer.lr=0.01"),
        (["seed=1", "experiment=quickstart", "optimizer.lr=0.01"], "quickstart,optimizer.lr=0.01,seed=1"),
        (["experiment=quickstart", "callbacks=none", "+callbacks.x=1"], "quickstart"),
        (["experiment=quickstart", "callbacks=ema", "threads=1"], "quickstart,callbacks=ema"),
        (["experiment=quickstart", "trainer.max_epochs=1"], "quickstart,trainer.max_epochs=1"),
        (["experiment=quickstart", "trainer.precision=64-true"], "quickstart,trainer.precision=64-true"),
        (["experiment=quickstart", "optimizer.lr=0.01", "name=mine"], "mine"),
        (["experiment=quickstart", "data.root=x"], "quickstart"),
        (["experiment=quickstart", "speed.micro_batch=8"], "quickstart"),
        (
            ["experiment=quickstart", "+loss._target_=x.Loss", "speed.micro_batch=8"],  # over parts of a batch
            "quickstart,+loss._target_=x.Loss,speed.micro_batch=8",
        ),
        (
            ["experiment=quickstart", "+data._target_=x.Data", "data.root=x"],
            "quickstart,+data._target_=x.Data,data.root=x",
        ),
    ],
)
def test_an_experiment_with_changes_has_a_folder_of_its_own(
    overrides: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with open_hydra() as app:
        config = compose(app, parse_arguments(overrides), RunMode.RUN)
    assert (config.name, config.hydra.run.dir) == (name, f"outputs/runs/{name}")


def test_the_home_folder_in_the_path_of_a_run_or_sweep_is_that_of_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    words = ['hydra.run.dir="~/${name}/a~b"', 'hydra.sweep.dir="~/sweep"', "name=mine"]
    with open_hydra() as app:
        config = compose(app, parse_arguments(words), RunMode.RUN)
    assert (config.hydra.run.dir, config.hydra.sweep.dir) == ("/home/me/mine/a~b", "/home/me/sweep")


def test_a_name_that_depends_on_the_time_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    with open_hydra() as app:
        config = compose(app, parse_arguments(["experiment=cpu", "seed=1"]), RunMode.RUN)
    assert config.name in (123, "123")


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("experiment", "optimizer: {lr: 0.01}", "experiment: the file of this option must begin with the line: #"),
        ("experiment", "", "experiment: the file of this option must begin with the line: # @package _global_"),
        (
            "experiment",
            "defaults: [override /model: nin_small]",
            "experiment=mine: its file must begin with the line: # @package _global_",
        ),
        ("sweep", "name: x", "sweep: the file of this option must begin with the line: # @package _global_"),
        ("sweep", "hydra: {}", "sweep: the file of this option must begin with the line: # @package _global_"),
        (
            "sweep",
            "# @package _global_\nsweep: {seed: '0,1'}",
            "sweep: the file of this option must begin with the line: # @package _global_, and the values of a sweep "
            "are in hydra.sweeper.params",
        ),
        (
            "sweep",
            "# @package _global_\nhydra.sweeper.params.seed: 0,1",
            "hydra.sweeper.params.seed: no such key; in a file it is written as hydra: {sweeper: {params: {seed: …}}}",
        ),
        (
            "experiment",
            "# @package _global_\noptimizer.lr: 0.1",
            "optimizer.lr: no such key; in a file it is written as optimizer: {lr: …}",
        ),
        (
            "experiment",
            "# @package _global_\ndefaults: [override /experiment: cpu]",
            "experiment=mine: its file's defaults have override /experiment: cpu, which has no effect there; to start",
        ),
    ],
)
def test_the_mistakes_of_a_first_experiment_or_sweep_file_are_explained(
    option: str, content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / option).mkdir()
    (tmp_path / option / "mine.yaml").write_text(content)
    assert cli.run("train", ["--config-dir", str(tmp_path), f"{option}=mine", "data=garments"]) == 2
    assert capsys.readouterr().err.startswith(f"nin train: {message}")


def test_errors_are_those_of_the_config_that_the_command_names(tmp_path: Path) -> None:
    def error_of(name: str, *words: str) -> str:
        args = parse_arguments(["--config-dir", str(tmp_path), "--config-name", name, *words])
        with open_hydra(args.config_dir) as app, pytest.raises(UserError) as refused:
            compose(app, args, RunMode.RUN)
        return str(refused.value)

    mine = "# @package _global_\ndefaults: [train, {override model: mlp}, _self_]\n"
    (tmp_path / "mine.yaml").write_text(mine)
    assert error_of("mine", "model.hidden_with=16").startswith(
        "model.hidden_with=16: no such key; did you mean model.hidden_width?"
    )
    (tmp_path / "bad.yaml").write_text(f"{mine}seed: -1\n")
    assert error_of("bad", "foo=1").startswith("2 errors\n  foo=1: no such key")
    assert error_of("nosuch").startswith(f"--config-dir {tmp_path} --config-name nosuch: Cannot find primary config")
    (tmp_path / "open.yaml").write_text("# @package _global_\ndefaults: [{model: '???'}]\n")
    assert error_of("open", "model=nosuch").startswith("In 'open': Could not find 'model/nosuch'")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config-dir", "my own", "model=tiny", "name=x"],
        ["--config-dir", "my own", "--config-name", "mine", "hydra.sweeper.params=null"],
        ["hydra.searchpath=[file://my own]", "model=tiny", "hydra.run.dir=x", "~callbacks.images"],
        ["-m", "--config-dir", "my own", "--config-name", "mine", "name=x"],
    ],
)
def test_the_recorded_command_requests_the_same_run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("my own/model").mkdir(parents=True)
    Path("my own/model/tiny.yaml").write_text("defaults: [mlp, _self_]\nhidden_width: 8\n")
    defaults = "defaults: [train, {override model: tiny}, _self_]"
    space = "hydra: {sweeper: {params: {seed: 1}}}"
    Path("my own/mine.yaml").write_text(f"# @package _global_\n{defaults}\n{space}\n")
    requests: list[RunRequest] = []

    def execute(request: RunRequest) -> dict:
        requests.append(request)
        return {"metrics": {"val/acc": 0.5}}

    monkeypatch.setattr(train, "execute_run", execute)
    monkeypatch.setattr(workers, "execute_run", execute)
    assert cli.run("train", [*arguments, "data=garments", "trainer=cpu"]) == 0
    program, command, *words = shlex.split(requests[0].command)
    assert (program, command) == ("nin", "train")
    assert cli.run("train", words) == 0
    recorded, again = (r.settings.model_dump(exclude={"name", "sweep"}) for r in (requests[0], requests[-1]))
    assert (again, recorded["model"]["hidden_width"]) == (recorded, 8)
    assert shlex.join(words) == requests[-1].command.removeprefix("nin train ")  # also of the run that it starts


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["name=full"], "run.dir=… outputs/runs/full"),
        (["-m", "name=full", "seed=1,2"], "sweep.dir=… outputs/sweeps/full"),
    ],
)
def test_a_full_disk_is_reported_with_the_folder(
    arguments: list[str], folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")  # as a write raises it, without a name

    monkeypatch.setattr(train, "execute_run", fail)
    monkeypatch.setattr(launch.Sweep, "run", fail)
    key, place = folder.split()
    assert cli.run("train", [*SMALL, *arguments]) == 2
    message = f"{place}: can't be written (No space left on device); start elsewhere, or set hydra.{key}\n"
    assert capsys.readouterr().err.endswith(message)


def test_a_library_that_can_not_be_loaded_is_no_folder_that_can_not_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("libcudart.so.13: cannot open shared object file")  # as ctypes raises it

    monkeypatch.setattr(train, "execute_run", fail)
    with pytest.raises(OSError, match="libcudart"):
        cli.run("train", [*SMALL, "name=x"])
    monkeypatch.setattr(cli, "dispatch", fail)
    with pytest.raises(OSError, match="libcudart"):
        cli.main()
