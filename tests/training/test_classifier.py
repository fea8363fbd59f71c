import math
from collections.abc import Callable

import pytest
import torch

from nin.config.composition import compose_config
from nin.config.schema import Settings
from nin.config.validation import validate
from nin.training.classifier import Classifier, schedule


def learning_rates(steps: int, *overrides: str) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    chosen = validate(compose_config(list(overrides))).schedule
    scheduler, rates = schedule(optimizer, chosen, steps), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_by_hand() -> None:
    assert learning_rates(4, "schedule=cosine", "schedule.warmup=0") == pytest.approx(
        [1, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 + math.cos(3 * math.pi / 4)) / 2]
    )


def test_warmup_climbs_in_equal_steps() -> None:
    assert learning_rates(8, "schedule.warmup=0.5") == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])
    rates = learning_rates(8, "schedule=cosine", "schedule.warmup=0.25")
    assert rates[:3] == pytest.approx([0.5, 1, 1])
    assert rates[5] == pytest.approx(0.5)


def test_one_cycle_by_hand() -> None:
    rates = learning_rates(10, "schedule=one_cycle")
    assert (rates[0], max(rates), rates[2]) == pytest.approx((1 / 25, 1, 1))
    assert rates[-1] == pytest.approx(1 / 250_000)
    assert learning_rates(2, "schedule=one_cycle") == pytest.approx([1 / 25, 1])


@pytest.mark.parametrize(("momentum", "ends"), [(0.9, (0.95, 0.85)), (0.98, (0.99, 0.97)), (0.0, (0.0, 0.0))])
def test_one_cycle_moves_momentum_around_what_was_asked_for(momentum: float, ends: tuple[float, float]) -> None:
    weights = [torch.nn.Parameter(torch.zeros(1))]
    chosen = validate(compose_config(["schedule=one_cycle"])).schedule
    for optimizer, value in (
        (torch.optim.SGD(weights, lr=1.0, momentum=momentum), lambda group: group["momentum"]),
        (torch.optim.AdamW(weights, lr=1.0, betas=(momentum, 0.999)), lambda group: group["betas"][0]),
    ):
        scheduler, values = schedule(optimizer, chosen, 10), []
        for _ in range(10):
            values.append(value(optimizer.param_groups[0]))
            optimizer.step()
            scheduler.step()
        assert (values[0], min(values)) == pytest.approx(ends)


@pytest.mark.parametrize(
    ("overrides", "kind", "values"),
    [
        (
            ["optimizer=sgd", "optimizer.lr=0.2", "optimizer.momentum=0.9", "optimizer.nesterov=true"],
            torch.optim.SGD,
            {"lr": 0.2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0},
        ),
        (["optimizer=adamw"], torch.optim.AdamW, {"lr": 0.005, "betas": [0.9, 0.999], "weight_decay": 0.01}),
    ],
)
def test_the_optimizer_is_the_configs(
    settings: Callable[..., Settings], overrides: list[str], kind: type, values: dict
) -> None:
    module = Classifier(settings("schedule=constant", *overrides))
    optimizer = module.configure_optimizers()
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert {key: list(group[key]) if key == "betas" else group[key] for key in values} == values
    assert len(group["params"]) == len(list(module.network.parameters()))


def test_hyperparameters_are_plain_and_rebuild_the_network(settings: Callable[..., Settings]) -> None:
    module = Classifier(settings())
    again = Classifier(Settings.model_validate(dict(module.hparams)))
    again.load_state_dict(module.state_dict())
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(module.eval()(images), again.eval()(images))
