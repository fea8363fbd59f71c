import inspect
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from nin.config import rules, schema, validation
from nin.config.changes import MAY_CHANGE, find_differences
from nin.config.composition import compose_config
from nin.config.keys import flatten, is_within
from nin.config.schema import Settings, Trainer, UserError
from nin.config.validation import validate, validate_plain
from nin.training.callbacks.dead_units import DeadUnitMonitor
from nin.training.callbacks.tensorboard import ImageLogger


def refused(*overrides: str) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        validate(compose_config(list(overrides)))
    return caught.value.errors


def test_defaults_are_the_notebooks_experiment() -> None:
    settings = validate(compose_config([]))
    assert (settings.model.name, settings.data.name, settings.data.image_size, settings.data.batch_size) == (
        "nin",
        "fashion_mnist",
        224,
        128,
    )
    assert settings.optimizer.model_dump() == {
        "name": "sgd",
        "lr": 0.1,
        "momentum": 0.0,
        "nesterov": False,
        "weight_decay": 0.0,
    }
    assert (settings.schedule.name, settings.model.init, settings.trainer.max_epochs, settings.seed) == (
        "constant",
        "xavier_uniform",
        10,
        0,
    )
    assert (settings.data.val_size, settings.data.score_each_epoch) == (5000, "val")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=null", "seed=null: must be a valid integer"),
        ("seed=-1", "seed=-1: must be greater than or equal to 0"),
        ("seed=true", "seed=true: must be a valid integer"),
        ("optimizer.lr=fast", 'optimizer.lr="fast": must be a valid number'),
        ("optimizer.lr=0", "optimizer.lr=0: must be greater than 0"),
        ("optimizer.lr=nan", "optimizer.lr=NaN: must be a finite number"),
        ("model.norm=layer", "model.norm=\"layer\": must be 'none' or 'batch'"),
        ("model.first_padding=-1", "model.first_padding=-1: must be greater than or equal to 0"),
        ("model.widths=[96,256,0]", "model.widths.2=0: must be greater than or equal to 1 or a valid list"),
        ("model.conv1x1_layers=-1", "model.conv1x1_layers=-1: must be greater than or equal to 0"),
        ("model.dropout=1", "model.dropout=1: must be less than 1"),
        (
            "+data.bath_size=3",
            "data.bath_size: no such key; did you mean data.batch_size? There are: root, image_size, batch_size, "
            "score_each_epoch, augment, normalize, test_time_flip, name, val_size, mirrors",
        ),
        (
            "+model.depth=3",
            "model.depth: no such key; there are: name, input_size, init, widths, last_width, kernel_sizes, "
            "first_stride, first_padding, conv1x1_layers, conv1x1_relu, head, head_width, dropout, "
            "dropout_between, norm, final_relu",
        ),
        ("~optimizer.momentum", "optimizer.momentum: has no value; set optimizer.momentum=…, or do not delete it"),
        ("name=a/b", 'name="a/b": must consist of letters, digits and the characters _-=,+@. and not begin with a dot'),
        ("name=..", 'name="..": must consist of letters, digits and the characters _-=,+@. and not begin with a dot'),
        ("data.val_size=60000", "data.val_size=60000: fashion_mnist has 60000 training images; hold out fewer"),
        (
            "data.val_size=0",
            "data.val_size=0: there are no held-out images for choosing the best checkpoint; choose "
            "data.val_size=5000 or data.score_each_epoch=test as in the notebooks (the last epoch's weights are "
            "then the best)",
        ),
        ("trainer.max_epochs=-1", "trainer.max_epochs=-1: training would never end; set it, or trainer.max_steps"),
        ("trainer.max_epochs=0", "trainer.max_epochs=0: nothing would be trained; give 1 or more"),
        ("trainer.limit_test_batches=0", "trainer.limit_test_batches=0: a run ends with its test; give 1 or more"),
        ("trainer.min_epochs=11", "trainer.min_epochs=11: must be at most trainer.max_epochs, which is 10"),
        ("trainer.max_steps=0", "trainer.max_steps=0: nothing would be trained; give 1 or more"),
        ("trainer.max_time=00:00:00:00", "trainer.max_time=00:00:00:00: nothing would be trained; give a longer time"),
        ("trainer.max_time=long", "trainer.max_time=long: must be days:hours:minutes:seconds, as in 00:01:30:00"),
        (
            "trainer.precision=32bit",
            "trainer.precision=\"32bit\": must be 'auto', '32-true', '16-mixed', 'bf16-mixed', '16-true', "
            "'bf16-true', '64-true', 'transformer-engine', 'transformer-engine-float16', '32', '16', 'bf16', '64', "
            "32, 16 or 64",
        ),
        ("speed=false", "speed=false: has keys of its own; set one of them, as in speed.<key>=…"),
        ("+trainer.max_time={hours:0}", "trainer.max_time={'hours': 0}: nothing would be trained; give a longer time"),
        ("trainer.limit_train_batches=0.0", "trainer.limit_train_batches=0: nothing would be trained; give 1 or more"),
        (
            "optimizer.nesterov=true",
            "optimizer: nesterov=true needs momentum: set optimizer.momentum=0.9 or optimizer.nesterov=false",
        ),
        ("threads=100000", "threads=100000: must be less than or equal to 1024"),
        ("checkpoint.keep=1000000000", "checkpoint.keep=1000000000: must be less than or equal to 1000"),
        ("model.first_stride=0", "model.first_stride=0: must be greater than or equal to 1"),
        ("model.widths=[]", "model.widths=[]: must have at least 1 item"),
        ("data.root=", 'data.root="": must have at least 1 character'),
        (
            "data.batch_size=1000000000000",
            "data.batch_size=1000000000000: there are 55000 training images after 5000 are held out; choose at "
            "most that",
        ),
        (
            "trainer.limit_train_batches=0.001",
            "trainer.limit_train_batches=0.001: leaves none of 430 batches; choose 0.0024 or more, or a number of "
            "batches, as in 1",
        ),
        (
            "trainer.limit_val_batches=0.001",
            "trainer.limit_val_batches=0.001: leaves none of 40 batches; choose 0.025 or more, or a number of "
            "batches, as in 1",
        ),
        (
            "trainer.limit_test_batches=0.001",
            "trainer.limit_test_batches=0.001: leaves none of 79 batches; choose 0.0127 or more, or a number of "
            "batches, as in 1",
        ),
        (
            "trainer.overfit_batches=0.001",
            "trainer.overfit_batches=0.001: leaves none of 430 batches; choose 0.0024 or more, or a number of "
            "batches, as in 1",
        ),
        (
            "trainer.limit_train_batches=-1",
            "trainer.limit_train_batches=-1: must be a number of batches (0, 1, 2, …) or a fraction of all batches "
            "(0.0 to 1.0)",
        ),
        (
            "trainer.limit_val_batches=1.5",
            "trainer.limit_val_batches=1.5: must be a number of batches (0, 1, 2, …) or a fraction of all batches "
            "(0.0 to 1.0)",
        ),
        (
            "trainer.val_check_interval=0",
            "trainer.val_check_interval=0: must be a number of batches (1, 2, …), a fraction of an epoch (above "
            "0.0, up to 1.0) or null, which is once an epoch; trainer.limit_val_batches=0 turns validation off",
        ),
        (
            "trainer.val_check_interval=0.0",
            "trainer.val_check_interval=0: must be a number of batches (1, 2, …), a fraction of an epoch (above "
            "0.0, up to 1.0) or null, which is once an epoch; trainer.limit_val_batches=0 turns validation off",
        ),
        (
            "trainer.val_check_interval=431",
            "trainer.val_check_interval=431: an epoch has 430 batches; choose at most that, or set "
            "trainer.check_val_every_n_epoch=null to count the batches of all epochs",
        ),
        ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val=-1: must be greater than or equal to 0"),
        (
            "trainer.sync_batchnorm=true",
            "trainer.sync_batchnorm=true: there is one device, so nothing to synchronize; set it to false",
        ),
        (f"name={'a' * 201}", f'name="{"a" * 78}…: must have at most 200 characters'),
        (
            "trainer.strategy=ddp_fork",
            "trainer.strategy=ddp_fork: starts its processes as copies of one that does not train; choose ddp",
        ),
        (
            "trainer.strategy=ddp_spawn_find_unused_parameters_true",
            "trainer.strategy=ddp_spawn_find_unused_parameters_true: starts its processes as copies of one that "
            "does not train; choose ddp",
        ),
        ("trainer.devices=1.5", "trainer.devices=1.5: must be a valid integer or a valid string or a valid list"),
    ],
)
def test_an_error_has_the_key_its_value_and_the_rule(override: str, message: str) -> None:
    assert refused(override) == (message,)


def test_a_folder_of_images_must_be_given() -> None:
    message = "data.root: must be given: the folder that holds train/<class>/, as in data.root=photos"
    assert refused("data=folder") == (message,)


def test_a_duration_below_zero_is_named() -> None:
    assert "trainer.max_time.hours=-1: must be greater than or equal to 0" in refused("+trainer.max_time={hours:-1}")


@pytest.mark.parametrize(
    ("override", "recommendation"),
    [
        ("trainer.limit_train_batches=0.001", r"choose (\S+) or more"),
        ("trainer.val_check_interval=431", r"an epoch has (\d+) batches; choose at most that"),
        ("data.batch_size=1000000000000", r"there are (\d+) training images .* choose at most that"),
        ("threads=100000", r"must be less than or equal to (\d+)"),
    ],
)
def test_the_value_that_a_message_recommends_is_accepted(override: str, recommendation: str) -> None:
    (error,) = refused(override)
    value = re.search(recommendation, error)[1]  # type: ignore[index]
    validate(compose_config([f"{override.partition('=')[0]}={value}"]))


def test_errors_of_early_stopping_are_reported_together() -> None:
    assert refused(
        "callbacks=early_stopping",
        "callbacks.early_stopping.monitor=val/foo",
        "callbacks.early_stopping.patience=abc",
        "callbacks.early_stopping.mode=most",
        "+callbacks.early_stopping.delta=1",
    ) == (
        'callbacks.early_stopping.patience="abc": must be a valid integer',
        "callbacks.early_stopping.mode=\"most\": must be 'min' or 'max'",
        "callbacks.early_stopping.delta: no such key; did you mean callbacks.early_stopping.min_delta? There are: "
        "monitor, min_delta, patience, verbose, mode, strict, check_finite, stopping_threshold, divergence_threshold, "
        "check_on_train_epoch_end, log_rank_zero_only",
        "callbacks.early_stopping.monitor=val/foo: no such metric; there are: val/loss, val/acc",
    )


def test_errors_of_the_projects_callbacks_and_of_the_trainer_are_reported_together() -> None:
    assert refused(
        *("trainer.accelerator=gpuu", "trainer.strategy=dpd", "optimizer.lr=-1", "callbacks.dead_units.images=0"),
        *("callbacks.dead_units.checks_per_epoch=x", "callbacks.images.wrong_images=-1", "+callbacks.images.samples=1"),
    ) == (
        "optimizer.lr=-1: must be greater than 0",
        "callbacks.images.wrong_images=-1: must be greater than or equal to 0",
        "callbacks.images.samples: no such key; did you mean callbacks.images.sample_images? There are: wrong_images, "
        "sample_images",
        "callbacks.dead_units.images=0: must be greater than or equal to 1",
        'callbacks.dead_units.checks_per_epoch="x": must be a valid integer',
        "trainer.accelerator=gpuu: no such accelerator; did you mean gpu? There are: auto, cpu, gpu, cuda, mps, tpu",
        "trainer.strategy=dpd: no such strategy; did you mean ddp? There are: " + ", ".join(rules.STRATEGIES),
    )


def test_a_class_of_the_user_may_register_accelerators_and_strategies() -> None:
    names = ["trainer.accelerator=npu", "trainer.strategy=npu_ddp"]
    assert validate(compose_config([*names, "+callbacks.own._target_=my.Own"])).trainer.strategy == "npu_ddp"
    assert validate(compose_config([*names, "+logger.own._target_=my.Logger"])).trainer.accelerator == "npu"
    assert len(refused(*names, "+callbacks.lr._target_=lightning.pytorch.callbacks.LearningRateMonitor")) == 2


def test_the_names_of_accelerators_and_strategies_are_lightnings() -> None:
    assert {*rules.ACCELERATORS} == {"auto", "gpu", *AcceleratorRegistry.available_accelerators()}
    separate = {name for name in StrategyRegistry.available_strategies() if not re.search(rules._COPIES, name)}
    assert {*rules.STRATEGIES} == {"auto", *separate}


def test_the_sections_of_the_projects_callbacks_have_their_arguments_and_defaults() -> None:
    for section, callback in ((schema.DeadUnitMonitor, DeadUnitMonitor), (schema.ImageLogger, ImageLogger)):
        target = f"{callback.__module__}.{callback.__qualname__}"
        assert validation._find_callback_section(target) is section
        parameters = list(inspect.signature(callback).parameters.values())
        assert section().model_dump() == {parameter.name: parameter.default for parameter in parameters}


def test_a_monitored_metric_of_another_type_is_reported_once() -> None:
    assert refused("callbacks=early_stopping", "callbacks.early_stopping.monitor=null") == (
        "callbacks.early_stopping.monitor=null: must be a valid string",
    )


def test_a_callback_without_a_monitored_metric_is_accepted() -> None:
    target = "+callbacks.x._target_=lightning.pytorch.callbacks.ModelCheckpoint"
    assert "x" in validate(compose_config([target, "+callbacks.x.monitor=null"])).callbacks


@pytest.mark.parametrize("metric", ["test/acc", "test/loss"])
def test_test_images_do_not_decide_when_training_ends(metric: str) -> None:
    on_test = ("callbacks=early_stopping", "data.score_each_epoch=test", f"callbacks.early_stopping.monitor={metric}")
    assert refused(*on_test) == (
        f"callbacks.early_stopping.monitor={metric}: test images must not decide when training ends; choose val/acc or "
        "val/loss",
    )


def test_a_monitored_metric_must_be_computed() -> None:
    for reason in ("data.score_each_epoch=test", "trainer.limit_val_batches=0"):
        (error,) = refused("callbacks=early_stopping", reason)
        assert error.startswith("callbacks.early_stopping.monitor=val/acc: this run does not compute it")


def test_the_metric_of_a_users_own_callback_can_be_monitored() -> None:
    own = ["callbacks=early_stopping", "callbacks.early_stopping.monitor=my/metric", "+callbacks.own._target_=my.Own"]
    validate(compose_config(own))


def test_batch_norm_is_synchronized_on_gpus_only() -> None:
    cpus = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.sync_batchnorm=true")
    assert refused(*cpus) == (
        "trainer.sync_batchnorm=true: torch synchronizes batch norm on GPUs only; set it to false",
    )
    validate(compose_config(["trainer=ddp", "trainer.sync_batchnorm=true"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainer.barebones=true"],
            "trainer.barebones=true: the run would have no checkpoint, log or result; set it to false",
        ),
        (
            ["trainer.max_steps=3", "trainer.min_steps=4"],
            "trainer.min_steps=4: must be at most trainer.max_steps, which is 3",
        ),
        (
            ["trainer.max_epochs=null"],
            "trainer.max_epochs=null: training would never end; set it, or trainer.max_steps",
        ),
        (
            ["trainer.limit_train_batches=5", "trainer.val_check_interval=6"],
            "trainer.val_check_interval=6: an epoch has 5 batches; choose at most that, or set "
            "trainer.check_val_every_n_epoch=null to count the batches of all epochs",
        ),
        (
            ["trainer.limit_train_batches=0.5", "trainer.val_check_interval=216"],
            "trainer.val_check_interval=216: an epoch has 215 batches; choose at most that, or set "
            "trainer.check_val_every_n_epoch=null to count the batches of all epochs",
        ),
        (
            ["data.val_size=0", "data.score_each_epoch=test", "trainer.limit_val_batches=0.01"],
            "trainer.limit_val_batches=0.01: leaves none of 79 batches; choose 0.0127 or more, or a number of "
            "batches, as in 1",
        ),
    ],
)
def test_numbers_of_steps_and_batches_that_do_not_fit_are_refused(overrides: list[str], message: str) -> None:
    assert refused(*overrides) == (message,)


def test_a_minimum_may_be_the_maximum() -> None:
    equal = [f"trainer.{end}_{unit}=4" for end in ("min", "max") for unit in ("epochs", "steps")]
    assert validate(compose_config(equal)).trainer.min_steps == 4


def test_an_interval_between_validations_may_count_the_batches_of_all_epochs() -> None:
    words = ["trainer.limit_train_batches=5", "trainer.val_check_interval=6", "trainer.check_val_every_n_epoch=null"]
    assert validate(compose_config(words)).trainer.val_check_interval == 6


def test_a_target_of_another_type_is_reported_and_no_rule_takes_the_section_for_plain_values() -> None:
    (error,) = refused("+data._target_=3")
    assert error.startswith("data._target_=3: ")


def test_keys_that_are_numbers_are_reported() -> None:
    first, second = refused("callbacks=early_stopping", "++trainer={4: 1}", "++callbacks.early_stopping={3: 1}")
    assert first.startswith("trainer.4: no such key; there are: accelerator, strategy")
    assert second.startswith("callbacks.early_stopping.3: no such key; there are: monitor, min_delta")


def test_a_fault_in_a_rule_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def misspelled(settings: Settings) -> Iterator[str]:
        yield settings.data.image_sise

    monkeypatch.setattr(validation, "RULES", [misspelled])
    with pytest.raises(AttributeError, match="image_sise"):
        validate(compose_config([]))
    assert refused("data.image_size=0") == ("data.image_size=0: must be greater than or equal to 1",)


def test_an_invalid_key_hides_only_what_can_not_be_known_without_it() -> None:
    assert refused("data.batch_size=0", "data.val_size=60000", "trainer.limit_train_batches=0.001") == (
        "data.batch_size=0: must be greater than or equal to 1",
        "data.val_size=60000: fashion_mnist has 60000 training images; hold out fewer",
    )
    # This rule reads the number of epochs first, and then the time.
    assert refused("trainer.max_epochs=0", "trainer.max_time=5") == (
        "trainer.max_time=5: must be a valid string or a valid dictionary",
        "trainer.max_epochs=0: nothing would be trained; give 1 or more",
    )


def test_all_errors_are_reported_together() -> None:
    errors = refused(
        "seed=-1",
        "data.image_size=0",
        "data.batch_size=0",
        "optimizer.lr=x",
        "schedule=cosine",
        "trainer.max_epochs=-1",
    )
    assert [error.split("=")[0] for error in errors] == [
        "seed",
        "data.image_size",
        "data.batch_size",
        "optimizer.lr",
        "schedule",
    ]


def test_the_trainer_section_has_every_argument_of_lightnings_trainer() -> None:
    from_other_groups = {"self", "logger", "callbacks", "plugins", "default_root_dir", "enable_checkpointing"}
    arguments = set(inspect.signature(lightning.Trainer.__init__).parameters) - from_other_groups
    assert set(Trainer.model_fields) == arguments


def test_settings_survive_a_round_trip_through_plain_values(settings: Callable[..., Settings]) -> None:
    complete = settings()
    assert Settings.model_validate(complete.model_dump(mode="json")) == complete


def test_a_run_may_be_resumed_with_these_keys_changed_and_no_others(settings: Callable[..., Settings]) -> None:
    keys = flatten(settings("logger=none", "callbacks=none").model_dump(mode="json"))
    sections = ("speed.", "checkpoint.", "sweep.")
    assert {key for key in keys if is_within(key, MAY_CHANGE) and not key.startswith(sections)} == {
        *("name", "resume", "threads", "data.root", "data.mirrors", "compile"),
        *(f"trainer.{key}" for key in ("accelerator", "strategy", "devices", "num_nodes", "precision", "profiler")),
        *(f"trainer.{key}" for key in ("deterministic", "benchmark", "detect_anomaly", "inference_mode")),
        *(f"trainer.{key}" for key in ("enable_progress_bar", "enable_model_summary", "log_every_n_steps")),
        *("trainer.max_epochs", "trainer.num_sanity_val_steps"),
    }
    assert find_differences(settings(), settings("data.batch_size=64", "seed=3", "threads=1")) == [
        "seed: 0 in the existing run, 3 in this command",
        "data.batch_size: 32 in the existing run, 64 in this command",
    ]


def test_one_batch_and_all_batches_are_two_experiments(settings: Callable[..., Settings]) -> None:
    for key in ("limit_train_batches", "limit_val_batches", "overfit_batches", "val_check_interval"):
        number, fraction = (settings(f"trainer.{key}={value}") for value in ("1", "1.0"))
        assert find_differences(number, number) == []
        message = f"trainer.{key}: 1 in the existing run, 1.0 in this command"
        assert find_differences(number, fraction) == [message]


def test_a_deleted_group_is_reported_with_its_options() -> None:
    assert refused("~data", "optimizer.lr=-1") == (
        "data: has no value; set data=…, or do not delete it",
        "optimizer.lr=-1: must be greater than 0",
    )
    assert refused("experiment=quickstart", "~optimizer") == (
        "optimizer: no option is chosen; give optimizer=adamw or sgd",
    )
    models = "alexnet or lenet or mlp or nin or nin_small or vgg"
    assert refused("experiment=quickstart", "~model") == (f"model: no option is chosen; give model={models}",)


def test_callbacks_that_may_change_training_are_part_of_the_experiment(settings: Callable[..., Settings]) -> None:
    monitor = "+callbacks.lr={_target_: lightning.pytorch.callbacks.LearningRateMonitor}"
    for observers in (["callbacks=none"], ["~callbacks.images"], ["callbacks.dead_units.images=7"], [monitor]):
        assert find_differences(settings(), settings(*observers)) == []
    average = '"lightning.pytorch.callbacks.EMAWeightAveraging"'
    assert find_differences(settings(), settings("callbacks=ema")) == [
        f"callbacks.ema._target_: not given in the existing run, {average} in this command",
        "callbacks.ema.decay: not given in the existing run, 0.99 in this command",
    ]
    for words in (
        ["callbacks=early_stopping"],
        ["+callbacks.x._target_=ninja.X"],
        ["+callbacks.x._target_=my.ModelSummary"],
    ):
        chosen = settings(*words)
        assert find_differences(chosen, chosen) == []
        assert find_differences(settings(), chosen)
        assert find_differences(chosen, settings())


def test_keys_of_the_users_own_data_and_parts_of_a_batch_for_an_own_loss_are_part_of_the_experiment(
    settings: Callable[..., Settings],
) -> None:
    def own(*overrides: str, **parts: Any) -> Settings:
        return validate_plain(settings(*overrides).model_dump() | parts)

    assert find_differences(settings(), settings("data.root=/other", "speed.micro_batch=4")) == []
    first, second = ({"_target_": "x.Data", "image_size": 28, "batch_size": 4, "root": root} for root in "ab")
    assert find_differences(own(data=first), own(data=first)) == []
    assert find_differences(own(data=first), own(data=second)) == [
        'data.root: "a" in the existing run, "b" in this command'
    ]
    loss = {"_target_": "torch.nn.MultiMarginLoss"}
    assert find_differences(own("speed.channels_last=false", loss=loss), own(loss=loss)) == []
    assert find_differences(own("speed.micro_batch=4", loss=loss), own(loss=loss)) == [
        'speed.micro_batch: 4 in the existing run, "auto" in this command'
    ]


@pytest.mark.parametrize(("value", "text"), [(None, "null"), ({}, "{}"), (0.5, "0.5")])
def test_an_argument_of_an_own_class_that_is_not_given_is_not_the_same_as_null_or_an_empty_one(
    settings: Callable[..., Settings], value: Any, text: str
) -> None:
    def own(**arguments: Any) -> Settings:
        network = {"_target_": "x.Net", "input_size": 28, **arguments}
        callbacks = {"mine": {"_target_": "x.Mine", **arguments}}
        return validate_plain(settings().model_dump() | {"model": network, "callbacks": callbacks})

    assert find_differences(own(drop=value), own(drop=value)) == []
    assert find_differences(own(), own(drop=value)) == [
        f"{key}.drop: not given in the existing run, {text} in this command" for key in ("model", "callbacks.mine")
    ]
    assert find_differences(own(drop=value), own()) == [
        f"{key}.drop: {text} in the existing run, not given in this command" for key in ("model", "callbacks.mine")
    ]


def test_a_folder_of_a_user_whom_the_machine_does_not_know_is_a_relative_path(
    settings: Callable[..., Settings],
) -> None:
    assert settings("data.root='~no-such-user/images'").data.root == str(Path("~no-such-user/images").absolute())


@pytest.mark.parametrize("name", ["a${b}", os.fsdecode(b"bad\xff")], ids=["interpolation", "not UTF-8"])
def test_data_in_a_folder_whose_path_a_stored_config_can_not_have_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    assert refused("data.root=data") == (
        f'data.root="data": must be a path in UTF-8 and without ${{; it is {str(tmp_path / name / "data")!r}; start in '
        "another folder",
    )


def test_more_epochs_are_another_experiment_where_the_learning_rate_depends_on_them(
    settings: Callable[..., Settings],
) -> None:
    refused = (
        "trainer.max_epochs: 2 in the existing run, 3 in this command (schedule=one_cycle: the learning rate of every "
        "step depends on it)"
    )
    for schedule, expected in (("one_cycle", [refused]), ("constant", [])):
        requested = (f"schedule={schedule}", "schedule.warmup=0" if schedule == "constant" else "schedule.warmup=0.3")
        assert find_differences(settings(*requested), settings(*requested, "trainer.max_epochs=3")) == expected
    for name, argument, expected in (("ExponentialLR", {"gamma": 0.9}, 0), ("LinearLR", {"total_iters": "steps"}, 1)):
        own = {"schedule": {"_target_": f"torch.optim.lr_scheduler.{name}", **argument}}
        short, long = (validate_plain(settings(*words).model_dump() | own) for words in ([], ["trainer.max_epochs=3"]))
        assert len(find_differences(short, long)) == expected
        endless = long.model_copy(update={"trainer": long.trainer.model_copy(update={"max_epochs": -1})})
        (message,) = rules.require_an_end_of_training(endless)
        assert ("depends on the number of steps" in message) == expected
    # The schedule is what differs: the number of epochs is the same, whether or not it may change.
    constant, cosine = settings("schedule=constant"), settings("schedule=cosine", "schedule.warmup=0")
    assert find_differences(constant, cosine) == [
        'schedule.name: "constant" in the existing run, "cosine" in this command'
    ]
    assert find_differences(cosine, constant) == [
        'schedule.name: "cosine" in the existing run, "constant" in this command'
    ]
