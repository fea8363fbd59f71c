import inspect
from collections.abc import Callable

import lightning
import pytest
import torch

from nin import networks
from nin.config.composition import compose_config
from nin.config.networks import smallest_image_size
from nin.config.schema import Settings, Trainer, UserError
from nin.config.validation import validate


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
    ("override", "told"),
    [
        ("seed=null", "seed=null: must be a valid integer"),
        ("seed=-1", "seed=-1: must be greater than or equal to 0"),
        ("seed=true", "seed=true: must be a valid integer"),
        ("optimizer.lr=fast", 'optimizer.lr="fast": must be a valid number'),
        ("optimizer.lr=0", "optimizer.lr=0: must be greater than 0"),
        ("optimizer.lr=nan", "optimizer.lr=NaN: must be a finite number"),
        ("model.norm=layer", "model.norm=\"layer\": must be 'none' or 'batch'"),
        ("model.first_padding=-1", "model.first_padding=-1: must be greater than or equal to 0"),
        ("model.widths=[[96,96],256,384]", "model: widths has [96, 96] for a block of 3 layers"),
        ("model.widths=[96,256,0]", "model.widths.2"),
        ("model.conv1x1_layers=-1", "model.conv1x1_layers=-1: must be greater than or equal to 0"),
        ("model.dropout=1", "model.dropout=1: must be less than 1"),
        ("+data.bath_size=3", "data.bath_size: no such key; did you mean batch_size?"),
        ("+model.depth=3", "model.depth: no such key; there are: name, input_size"),
        ("~optimizer.momentum", "optimizer.momentum: missing"),
        ("name=a/b", 'name="a/b": must be one plain word'),
        ("name=..", 'name="..": must be one plain word'),
        ("data.image_size=66", "data.image_size=66: nin needs at least 67 pixels a side; choose data.image_size=67"),
        ("data.val_size=60000", "data.val_size=60000: fashion_mnist has 60000 training images"),
        ("data.val_size=0", "data.val_size=0: nothing is held out"),
        ("trainer.max_epochs=-1", "trainer.max_epochs=-1: nothing says when training ends"),
        ("trainer.max_epochs=0", "trainer.max_epochs=0: nothing would be trained"),
        ("trainer.max_steps=0", "trainer.max_steps=0: nothing would be trained"),
        ("trainer.limit_train_batches=0.0", "trainer.limit_train_batches=0: nothing would be trained"),
        ("optimizer.nesterov=true", "optimizer: nesterov=true needs momentum"),
        ("model.widths=[96,256]", "model: kernel_sizes has 4 entries and widths 2"),
        ("trainer.devices=1.5", "trainer.devices=1.5: must be a valid integer or a valid string or a valid list"),
    ],
)
def test_a_mistake_is_told_with_its_remedy(override: str, told: str) -> None:
    (mistake,) = refused(override)
    assert mistake.startswith(told)


def test_all_mistakes_are_told_together() -> None:
    told = refused(
        "seed=-1",
        "data.image_size=40",
        "data.batch_size=0",
        "optimizer.lr=x",
        "schedule=cosine",
        "trainer.max_epochs=-1",
    )
    assert [mistake.split("=")[0] for mistake in told] == [
        "seed",
        "data.batch_size",
        "optimizer.lr",
        "data.image_size",
        "schedule",
    ]


def test_the_trainer_section_has_every_argument_of_lightnings_trainer() -> None:
    ours_to_give = {"self", "logger", "callbacks", "plugins", "default_root_dir", "enable_checkpointing"}
    arguments = set(inspect.signature(lightning.Trainer.__init__).parameters) - ours_to_give
    assert set(Trainer.model_fields) == arguments


@pytest.mark.parametrize("model", ["nin", "nin model.first_padding=1", "nin_small", "lenet", "alexnet", "vgg"])
def test_the_smallest_image_size_is_where_the_network_still_works(model: str) -> None:
    def logits(size: int) -> torch.Size:
        overrides = f"model={model} data.image_size={size}".split()
        with torch.device("meta"):
            network = networks.build(settings_of(overrides))
            return network(torch.zeros(2, 1, size, size)).shape

    def settings_of(overrides: list[str]) -> Settings:
        # Unchecked: the check itself is under test.
        config = compose_config(overrides)
        whole = validate(compose_config([*overrides, "data.image_size=500"]))
        return whole.model_copy(update={"data": whole.data.model_copy(update={"image_size": config.data.image_size})})

    smallest = smallest_image_size(validate(compose_config(f"model={model}".split())).model)
    assert logits(smallest) == (2, 10)
    # A layer fails, or a fully connected layer is left without an input, of which torch warns.
    with pytest.raises((RuntimeError, UserWarning), match=r"size|zero-element"):
        logits(smallest - 1)


def test_settings_survive_a_round_trip_through_plain_values(settings: Callable[..., Settings]) -> None:
    whole = settings()
    assert Settings.model_validate(whole.model_dump(mode="json")) == whole
