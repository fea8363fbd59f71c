import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nin import cli
from nin.config.composition import (
    apply_overrides,
    compose_config,
    compose_settings,
)
from nin.config.hydra_options import open_hydra, parse_arguments
from nin.config.schema import CONF, FolderData, Settings, UserError
from nin.config.validation import validate
from nin.networks.build import build_network

OPTIONS = sorted(p.relative_to(CONF).with_suffix("") for p in CONF.glob("*/*.yaml"))
MODELS, EXPERIMENTS = (
    ", ".join(option.name for option in OPTIONS if str(option.parent) == group) for group in ("model", "experiment")
)
KEYS = (
    "seed, name, weights, resume, threads, label_smoothing, speed, compile, checkpoint, sweep, model, data, loss, "
    "optimizer, schedule, trainer, logger, callbacks, experiment"
)


def test_a_variable_that_is_not_set_is_an_error_of_the_override(settings: Callable[..., Settings]) -> None:
    with pytest.raises(UserError, match=r"^data\.root=\$\{oc\.env:NOPE\}/x: .*NOPE"):
        apply_overrides(settings(), ["data.root=${oc.env:NOPE}/x"], ("data.root",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hydra: {launcher: {n_jobs: 4}}", r"Key 'n_jobs' not in 'BasicLauncherConf' \(hydra\.launcher\.n_jobs\)"),
        ("defaults: [override /model: nin_smal]", r"defaults have model: nin_smal, and .*; did you mean nin_small\?"),
        ("defaults: [model: nin_small]", "defaults have model: nin_small, which .*; write override /model: nin_small$"),
        (
            "defaults: [override model: nin_small]",
            "defaults have override model: …, which .*; write override /model: …$",
        ),
        ("defaults: [/model: nin_small]", "defaults have /model: nin_small, and .*; write override /model: nin_small$"),
        ("defaults: [override /modell: nin]", "defaults have override /modell, and there is no such group$"),
        ("defaults: [/experiment: cpu]", "defaults have /experiment: …, which is this file itself; .*its name alone$"),
        ("defaults: [cpux]", r"^experiment=mine: no such experiment: cpux; did you mean cpu\?"),
        ("model: nin_small", r"^model=nin_small: has keys .* in its defaults, .* \[override /model: nin_small\]$"),
        (
            "trainer: cpu",
            '^trainer="cpu": has keys of its own; .*; an option is chosen in defaults: override /trainer: …$',
        ),
        ("seed: [0, 1]", r"^seed=\[0, 1\]: must be a valid integer; several values, .* below hydra\.sweeper\.params$"),
    ],
)
def test_mistakes_in_files_of_ones_own_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{content}\n")
    with open_hydra(str(tmp_path), None), pytest.raises(UserError, match=message):
        compose_settings(["experiment=mine"])


def errors_of(*overrides: str) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        compose_settings(list(overrides))
    return caught.value.errors


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_config_file_composes_and_builds_its_network(option: Path) -> None:
    needed = ["data.root=/photos"] if str(option) == "data/folder" else []
    with torch.device("meta"):  # on which large networks take no time
        network = build_network(validate(compose_config([f"{option.parent}={option.name}", *needed])), 1, 10)
    assert sum(p.numel() for p in network.parameters()) > 0


def test_each_recipe_has_the_head_and_the_number_of_epochs_that_it_was_measured_with() -> None:
    recipes = {name: compose_config([f"experiment={name}"]) for name in EXPERIMENTS.split(", ")}
    assert {recipe.model.head for recipe in recipes.values()} == {"gap"}  # no fully connected layer
    assert {name: recipe.trainer.max_epochs for name, recipe in recipes.items()} == {
        "best": 20, "cpu": 4, "cpu_best": 7, "nin_small": 3, "notebook": 10, "paper": 10, "paper_cifar10": 30,
        "quickstart": 3, "robust": 10,
    }  # fmt: skip


def test_errors_of_hydra_and_of_the_schema_are_reported_together() -> None:
    errors = errors_of("optimizer.lrr=1", "model=nin_smal", "seed=-1", "a=[", "model.dropout=2")
    assert [error.split(";")[0] for error in errors] == [
        "model=nin_smal: no such model",
        "a=[: its bracket is not closed",
        "optimizer.lrr=1: no such key",
        "seed=-1: must be greater than or equal to 0",
        "model.dropout=2: must be less than 1",
    ]
    assert f"did you mean nin_small? There are: {MODELS}" in errors[0]


def test_what_was_meant_is_suggested() -> None:
    assert errors_of("lr=0.1", "dropout=1", "experimnt=cpu", "optimzer.lr=1", "ckpt_path=a.ckpt", "seed =1") == (
        "lr=0.1: no such key; did you mean optimizer.lr?",
        "dropout=1: no such key; did you mean model.dropout?",
        f"experimnt=cpu: no such key; did you mean experiment? There are: {KEYS}",
        "ckpt_path=a.ckpt: no such key; to continue a run, type nin resume with the run's folder, as in nin resume "
        "outputs/runs/first",
        "seed =1: remove the space before =",
        "optimzer.lr=1: no such key; did you mean optimizer.lr?",
    )


def test_values_that_hydra_ends_with_a_traceback() -> None:
    digits = "1" * 5000
    assert errors_of("model=null", "experiment=null", f"seed={digits}", "hydra.sweeper.params={seed:1}") == (
        f"model=null: model is a config group, and its value an option; there are: {MODELS}",
        f"experiment=null: experiment is a config group, and its value an option; there are: {EXPERIMENTS}; or leave "
        "it out",
        f"seed={digits[:74]}…: a number of too many digits",
        "hydra.sweeper.params={seed:1}: hydra.sweeper.params can't have this value; the values of a sweep are given as "
        "key=value1,value2, with -m",
    )


def test_a_remedy_for_what_hydra_refuses() -> None:
    assert errors_of("name=ä", "++seed=1", "seed=2", "+seed=1", "~nosuch", "+experiment=cpu", "model=../nin_smal") == (
        "name=ä: has characters that must be quoted, as in 'name=\"ä\"'",
        "+seed=1: is in the config already; leave out the +, as in seed=1",
        f"~nosuch: no such key; there are: {KEYS}",
        "+experiment=cpu: is in the config already; leave out the +, as in experiment=cpu",
        f"model=../nin_smal: no such model; did you mean nin_small? There are: {MODELS}",
        "seed: has two values, 1 and 2; give it once",
    )
    assert errors_of("logger=[tensorboard,wandb]") == (
        "logger=[tensorboard,wandb]: no such logger: wandb; there are: csv, none, tensorboard; another logger "
        "is named by its _target_ (docs/extending.md)",
    )
    (error,) = errors_of("seed=interval(1)")
    assert error.endswith(
        "experiment=cpu (TypeError while evaluating 'interval(1)': missing a required argument: 'end')"
    )
    functions = "here are: bool, choice, float, glob, int, interval, range, shuffle, sort, str, tag; quote a text"
    assert errors_of("model.dropout=intervall(0,1)", "data.root=photos(2)") == (
        "model.dropout=intervall(0,1): no such function intervall; did you mean interval? T"
        f"{functions}, as in 'model.dropout=\"intervall(0,1)\"'",
        f"data.root=photos(2): no such function photos; t{functions}, as in 'data.root=\"photos(2)\"'",
    )
    assert errors_of("seed:1", ".seed=1", "=5", "[seed=1]") == tuple(
        f"{word}: must have the form key=value, as in experiment=cpu"
        for word in ("seed:1", "=5", "[seed=1]", ".seed=1")
    )
    (error,) = errors_of(str(Path(__file__).parent))
    assert (
        ": is a folder; an override must have the form key=value; nin resume, eval, predict, export and serve take one"
        in error
    )
    (error,) = errors_of("model.widths=[" + 400 * "16,")  # no file has so long a name
    assert "…: its bracket is not closed; quote" in error
    (error,) = errors_of("callbacks.dead_units.image=1")
    assert error.endswith("; to add an argument of nin.training.callbacks.dead_units.DeadUnitMonitor: "
                          "+callbacks.dead_units.image=…")  # fmt: skip


def test_text_with_special_characters_is_to_be_quoted() -> None:
    # Long, and with backslashes, which Hydra keeps: what is recommended is the text that was given.
    long = f"data.root=/{'a' * 90}\\b (2)/"
    (message,) = errors_of(long)
    (word,) = shlex.split(message.partition(", as in ")[2])
    assert compose_config([word]).data.root == long.partition("=")[2]
    assert errors_of("name=a (2)", "data.root=ph=1", "model.widths=[1,2") == (
        "name=a (2): must consist of letters, digits and the characters _-=,+@. and not begin with a dot",
        """data.root=ph=1: has characters that must be quoted, as in 'data.root="ph=1"'""",
        "model.widths=[1,2: its bracket is not closed; quote an override that has spaces, as in 'model.widths=[1, 2]'",
    )
    settings = validate(compose_config([]))
    with pytest.raises(UserError) as caught:
        apply_overrides(settings, ["data.root=ph,3", "name=a,b"], ("data.root",))
    assert caught.value.errors == (
        """data.root=ph,3: takes one value here; a text with a comma is quoted, as in 'data.root="ph,3"'""",
        """name=a,b: takes one value here; a text with a comma is quoted, as in 'name="a,b"'""",
    )


def test_settings_may_stand_behind_options() -> None:
    args = parse_arguments(["experiment=cpu", "--config-dir", "my", "model=deep", "-m", "name=x"])
    assert args.overrides == ["experiment=cpu", "model=deep", "name=x"]
    assert (args.config_dir, args.multirun) == ("my", True)
    with pytest.raises(UserError, match=r"^--experiment: no such option; .* as in experiment=…; there are: --help"):
        parse_arguments(["seed=1", "-m", "model=nin", "--experiment", "cpu"])


def test_several_values_need_a_sweep() -> None:
    assert errors_of("seed=1,2", "threads=range(1000000000)") == (
        "seed=1,2: has several values; add -m for a sweep, as in nin train -m seed=1,2",
        "threads=range(1000000000): has several values; add -m for a sweep, as in nin train -m "
        "'threads=range(1000000000)'",
    )


def test_a_group_has_one_option() -> None:
    assert errors_of("model=[nin_small,lenet]", "seed=1") == (
        "model=[nin_small,lenet]: model is a config group of which one option applies; give one",
    )
    assert len(compose_settings(["logger=[tensorboard,csv]"]).logger) == 2


def test_a_key_has_one_value_and_an_option_is_in_its_group() -> None:
    assert errors_of("optimizer.lr=0.1", "optimizer.lr=0.2", "model=../model/nin", "seed=1", "seed=1") == (
        "optimizer.lr: has two values, 0.1 and 0.2; give it once",
        f"model=../model/nin: no such model; did you mean nin? There are: {MODELS}",
    )
    own = compose_settings(["~optimizer", "+optimizer={_target_: torch.optim.RAdam, lr: 0.1}", "~callbacks.images"])
    assert own.optimizer.arguments == {"lr": 0.1}
    with pytest.raises(UserError, match=r"^optimizer=sgd: ~optimizer deletes this key; leave one of the two out$"):
        compose_settings(["~optimizer", "optimizer=sgd"])
    assert compose_settings(["~seed", "++seed=3"]).seed == 3
    earlier = validate(compose_config([]))
    with pytest.raises(UserError, match="threads: has two values, 1 and 2; give it once"):
        apply_overrides(earlier, ["threads=1", "threads=2"], ("threads",))


def test_a_name_is_not_changed_by_being_read_as_a_number() -> None:
    assert errors_of("name=2024_01_15") == (
        "name=2024_01_15: Hydra reads this as the number 20240115; quote it twice to keep it, as in "
        """'name="2024_01_15"'""",
    )
    assert compose_settings(['name="2024_01_15"']).name == "2024_01_15"
    assert compose_settings(["name=2024"]).name == "2024"


def test_importing_changes_no_warning_filter() -> None:
    program = "import warnings; before = list(warnings.filters); import nin.config.composition, nin.runs.console as c; "
    program += "assert warnings.filters == before; c.silence_known_warnings(); assert warnings.filters != before"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_key_that_only_another_model_has() -> None:
    with pytest.raises(UserError, match=r"model.dropout=0.1: no such key; there are: name, input_size, init$"):
        compose_settings(["model=lenet", "model.dropout=0.1"])


def test_the_users_own_config_dir(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\noptimizer:\n  lr: 0.7\n")
    with open_hydra(str(tmp_path)):
        assert compose_settings(["experiment=mine"]).optimizer.lr == 0.7


def test_a_mistake_in_a_yaml_file_of_the_user_is_reported_with_its_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "bad.yaml").write_text("input_size: 28\nwidths: [16\n")
    (tmp_path / "bad.yaml").write_text("seed: 1\nseed: 2\n")
    (tmp_path / "odd.yaml").write_text("name: @x\n")
    option = f'model=bad: while parsing a flow sequence in "{tmp_path}/model/bad.yaml", line 2, column 9 expected '
    base = f'--config-dir {tmp_path} --config-name bad: while constructing a mapping in "{tmp_path}/bad.yaml", line 1'
    odd = "--config-name odd: while scanning for the next token found character '@' that cannot start any token in "
    for command, words, message in (
        ("train", ["model=bad"], option),
        ("train", ["-m", "model=bad,nin"], option),
        ("train", ["-m", "hydra/sweeper=optuna", "model=nin,bad"], option),
        ("train", ["--cfg", "job", "model=bad"], option),
        ("train", ["--config-name", "bad"], base),
        ("inspect", ["model=bad"], option),
        ("inspect", ["--config-name", "odd"], f'{odd}"{tmp_path}/odd.yaml", line 1, column 7'),
    ):
        assert cli.run(command, ["--config-dir", str(tmp_path), *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"nin {command}: {message}")
        assert error.count("\n") == 1


def test_a_config_of_ones_own_without_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "my_own.yaml").touch()
    folder = ["--config-dir", str(tmp_path)]
    hint = f"; there are: {EXPERIMENTS}; a config of your own needs --config-dir"
    (tmp_path / "experiment" / "other.yml").write_text("")
    renamed = ": the name of its file must end in .yaml; rename experiment/other.yml"
    for words, end in (
        ([*folder, "experiment=other"], renamed),
        ([f"hydra.searchpath=[file://{tmp_path}]", "experiment=other"], renamed),
        (["experiment=mine"], hint),
        (["-m", "experiment=mine", "seed=1,2"], hint),
        (["experiment=bset"], f"; did you mean best? There are: {EXPERIMENTS}"),
        ([*folder, "experiment=mine"], f"; there are: {EXPERIMENTS.replace('nin_small', 'my_own, nin_small')}"),
        ([f"hydra.searchpath=[{tmp_path}]", "experiment=mine"], "notebook, paper, paper_cifar10, quickstart, robust"),
    ):
        assert cli.run("train", words) == 2
        error = capsys.readouterr().err
        assert error.startswith("nin train: experiment=")
        assert error.endswith(f"{end}\n")
    earlier = validate(compose_config(["model=nin_small"]))
    with pytest.raises(UserError, match=f"model=mine: no such model; there are: {MODELS}$"):  # takes no --config-dir
        apply_overrides(earlier, ["model=mine"], ("model",))


def test_only_permitted_keys_of_an_earlier_run_are_overridden() -> None:
    earlier = validate(compose_config(["model=nin_small", "trainer=cpu", "optimizer.lr=0.3"]))
    changed = apply_overrides(
        earlier, ["trainer=auto", "trainer.max_epochs=3", "data.root=/x"], ("trainer", "data.root")
    )
    assert (changed.trainer.accelerator, changed.trainer.max_epochs, changed.data.root) == ("auto", 3, "/x")
    assert (changed.model, changed.optimizer) == (earlier.model, earlier.optimizer)
    # Keys that only the earlier run's data set has.
    folder = validate(compose_config(["model=nin_small", "data=folder", "data.root=/x", "data.cache=/y"]))
    moved = apply_overrides(folder, ["data.cache=/z"], ("data.cache",)).data
    assert isinstance(moved, FolderData)
    assert (moved.root, moved.cache) == ("/x", "/z")
    assert "dead_units" in earlier.callbacks
    assert "dead_units" not in apply_overrides(earlier, ["~callbacks.dead_units"], ("callbacks",)).callbacks
    without = validate(compose_config(["model=nin_small", "callbacks=none"]))
    assert apply_overrides(without, ["~callbacks.dead_units"], ("callbacks",)).callbacks == {}
    with pytest.raises(UserError) as refused:
        apply_overrides(earlier, ["optimizer.lr=1", "trainer=cpu", "seed=3"], ("data.root", "trainer.max_epochs"))
    assert refused.value.errors == (
        "optimizer.lr=1: can't be changed here",
        "trainer=cpu: can't be changed here",
        "seed=3: can't be changed here; these can: data.root, trainer.max_epochs",
    )
    with pytest.raises(UserError, match="no such key"):
        apply_overrides(earlier, ["trainer.max_epoch=1"], ("trainer",))


def test_keys_that_are_numbers_hide_no_other_mistake() -> None:
    callback = (
        "+callbacks.acc={_target_: lightning.pytorch.callbacks.GradientAccumulationScheduler, scheduling: {4: 2}}"
    )
    with pytest.raises(UserError, match=r"^optimizer.lrr=0.1: no such key; did you mean optimizer.lr\?") as refused:
        compose_settings([callback, "optimizer.lrr=0.1"])
    assert len(refused.value.errors) == 1


def test_a_class_is_named_by_a_file_of_the_group() -> None:
    with pytest.raises(UserError, match=r"the value of model is an option; write this to my/model/<name>.yaml, and"):
        compose_settings(["model={_target_: my_net.Net, input_size: 28}"])
