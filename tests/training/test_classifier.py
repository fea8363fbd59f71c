import math
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from torch.utils.data import DataLoader, TensorDataset

from nin.config.composition import apply_overrides, compose_config
from nin.config.schema import Settings, UserError
from nin.config.validation import validate, validate_plain
from nin.training.classifier import Classifier
from nin.training.loss import require_logits
from nin.training.optimizers import build_schedule
from nin.training.trainer import build_trainer

CLASSES = tuple("abcdefghij")
SCHEDULES = "torch.optim.lr_scheduler"
QUIET = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip


def one_cycle_of(optimizer: torch.optim.Optimizer, name: str = "lr") -> list[tuple[Any, ...]]:
    """For each parameter group, its value ``name`` in each of the 10 steps of schedule=one_cycle."""
    return run_schedule(optimizer, 10, "schedule=one_cycle", name=name)


def run_schedule(
    optimizer: torch.optim.Optimizer, steps: int, *overrides: str, name: str = "lr"
) -> list[tuple[Any, ...]]:
    scheduler, values = build_schedule(optimizer, validate(compose_config(list(overrides))).schedule, steps), []
    for _ in range(steps):
        values.append([group[name] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return list(zip(*values, strict=True))


def learning_rates(steps: int, *overrides: str) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    return list(run_schedule(optimizer, steps, *overrides)[0])


def test_one_cycle_takes_an_optimizer_without_momentum() -> None:
    (rates,) = one_cycle_of(torch.optim.Adagrad([torch.nn.Parameter(torch.zeros(1))], lr=1.0))
    assert max(rates) == pytest.approx(1.0)
    assert rates[0] < 0.1 > rates[-1]


def test_one_cycle_has_the_learning_rate_and_momentum_of_each_group() -> None:
    def optimizer() -> torch.optim.Optimizer:
        own = ({"lr": 0.1}, {"lr": 1.0, "momentum": 0.5}, {"lr": 2.0, "momentum": 0.0})
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], **values} for values in own]
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9)

    assert [max(rates) for rates in one_cycle_of(optimizer())] == pytest.approx([0.1, 1.0, 2.0])
    momenta = one_cycle_of(optimizer(), "momentum")
    assert [max(values) for values in momenta] == pytest.approx([0.95, 0.55, 0.0])
    assert [min(values) for values in momenta] == pytest.approx([0.85, 0.45, 0.0])


def test_cosine_by_hand() -> None:
    assert learning_rates(4, "schedule=cosine", "schedule.warmup=0") == pytest.approx(
        [1, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 + math.cos(3 * math.pi / 4)) / 2]
    )


def test_warmup_rises_in_equal_steps() -> None:
    assert learning_rates(8, "schedule.warmup=0.5") == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])
    rates = learning_rates(8, "schedule=cosine", "schedule.warmup=0.25")
    assert rates[:3] == pytest.approx([0.5, 1, 1])
    assert rates[5] == pytest.approx(0.5)


@pytest.mark.parametrize("warmup", [0.3, 0.5])
def test_one_cycle_has_the_exact_learning_rate_of_every_step(warmup: float) -> None:
    def cosine(start: float, end: float, share: float) -> float:
        return end + (start - end) * (1 + math.cos(math.pi * share)) / 2

    top = warmup * 10 - 1  # the step with the highest learning rate
    rising = [cosine(1 / 25, 1, step / top) for step in range(int(top) + 1)]
    falling = [cosine(1, 1 / 250_000, (step - top) / (9 - top)) for step in range(int(top) + 1, 10)]
    assert learning_rates(10, "schedule=one_cycle", f"schedule.warmup={warmup}") == pytest.approx(rising + falling)


def test_one_cycle_of_very_few_steps() -> None:
    assert learning_rates(2, "schedule=one_cycle") == pytest.approx([1 / 25, 1])


def test_the_shortest_and_the_longest_warmup() -> None:
    lowest = 1 / 250_000
    expected = [1 / 25, 1, (1 + lowest) / 2, lowest]
    assert learning_rates(4, "schedule=one_cycle", "schedule.warmup=0.0") == pytest.approx(expected)
    assert learning_rates(4, "schedule=cosine", "schedule.warmup=0.99") == pytest.approx([0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize(("momentum", "ends"), [(0.9, (0.95, 0.85)), (0.98, (0.99, 0.97)), (0.0, (0.0, 0.0))])
def test_one_cycle_moves_momentum_around_the_given_value(momentum: float, ends: tuple[float, float]) -> None:
    weights = [torch.nn.Parameter(torch.zeros(1))]
    (of_sgd,) = one_cycle_of(torch.optim.SGD(weights, lr=1.0, momentum=momentum), "momentum")
    (betas,) = one_cycle_of(torch.optim.AdamW(weights, lr=1.0, betas=(momentum, 0.999)), "betas")
    for values in (of_sgd, [first for first, _ in betas]):
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
    module = Classifier(settings("schedule=constant", *overrides), CLASSES)
    optimizer = module.configure_optimizers()
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert {key: list(group[key]) if key == "betas" else group[key] for key in values} == values
    assert len(group["params"]) == len(list(module.network.parameters()))


@pytest.mark.parametrize(
    ("overrides", "fused"),
    [([], True), (["trainer.gradient_clip_val=1"], False), (["speed.fused_optimizer=false"], False)],
)
def test_no_fused_optimizer_where_gradients_are_clipped(
    settings: Callable[..., Settings], overrides: list[str], fused: bool
) -> None:
    optimizer = Classifier(settings("schedule=constant", *overrides), CLASSES).configure_optimizers()
    assert optimizer.param_groups[0]["fused"] is fused


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ({"_target_": f"{SCHEDULES}.LinearLR", "start_factor": 1.0, "end_factor": 0.4, "total_iters": "steps"},
         [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]),
        ({"_target_": f"{SCHEDULES}.ExponentialLR", "gamma": 0.5, "interval": "epoch"}, [1.0] * 3 + [0.5] * 3),
    ],
)  # fmt: skip
def test_a_schedule_of_ones_own_is_called_after_each_step_or_once_per_epoch(
    settings: Callable[..., Settings], schedule: dict[str, object], factors: list[float]
) -> None:
    rates = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    plain = settings("optimizer=sgd", "optimizer.lr=0.01").model_dump(mode="json")
    module = Classifier(validate_plain(plain | {"schedule": schedule}), CLASSES)
    batches = DataLoader(TensorDataset(torch.rand(6, 1, 28, 28), torch.arange(6)), batch_size=2)
    Trainer(**QUIET, max_epochs=2, num_sanity_val_steps=0, callbacks=[Rates()]).fit(module, batches, batches)
    assert rates == pytest.approx([0.01 * factor for factor in factors])


def test_hyperparameters_are_plain_and_rebuild_the_network(settings: Callable[..., Settings]) -> None:
    module = Classifier(settings(), ["T-shirt", "bag", "shoe"], in_channels=3)
    assert set(module.hparams) == {"settings", "class_names", "in_channels"}
    again = Classifier(**module.hparams)
    again.load_state_dict(module.state_dict())
    images = torch.rand(2, 3, 28, 28)
    assert again.class_names == ("T-shirt", "bag", "shoe")
    assert module.eval()(images).shape == (2, 3)
    assert torch.equal(module(images), again.eval()(images))


def test_hyperparameters_from_elsewhere_import_nothing(settings: Callable[..., Settings]) -> None:
    plain = settings().model_dump(mode="json") | {"model": {"_target_": "this.s", "input_size": 28}}
    with pytest.raises(
        UserError, match=r"model._target_=this.s: a stored config may not import .*, import this first$"
    ):
        Classifier(plain, CLASSES)
    assert "this" not in sys.modules


def test_load_from_checkpoint_needs_nothing_but_the_file(settings: Callable[..., Settings], tmp_path: Path) -> None:
    module = Classifier(settings(), ["bag", "shoe"], in_channels=3)
    trainer = Trainer(max_steps=0, **QUIET)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path := tmp_path / "a.ckpt")
    again = Classifier.load_from_checkpoint(path, weights_only=True)
    assert (again.settings, again.class_names, again.in_channels) == (module.settings, ("bag", "shoe"), 3)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("flip", ["false", "true"])
def test_predict_returns_class_probabilities_and_test_returns_metrics(
    settings: Callable[..., Settings], flip: str
) -> None:
    module = Classifier(settings(f"data.test_time_flip={flip}", "speed.micro_batch=4"), CLASSES)
    images, labels = torch.rand(10, 1, 28, 28), torch.arange(10)
    trainer = Trainer(**QUIET)
    (probabilities,) = trainer.predict(module, DataLoader(TensorDataset(images, labels), batch_size=10))
    (metrics,) = trainer.test(module, DataLoader(TensorDataset(images, labels), batch_size=5), verbose=False)
    module.eval()  # the Trainer has restored the training mode
    with torch.no_grad():
        logits, scored = module(images), module.predict_logits(images)
        expected = logits.softmax(1)
        if flip == "true":
            expected = (expected + module(images.flip(-1)).softmax(1)) / 2
            torch.testing.assert_close(scored.exp(), expected)
        else:
            assert torch.equal(scored, logits)
    torch.testing.assert_close(probabilities, expected)
    assert metrics == pytest.approx(
        {
            "test/loss": float(-expected[labels, labels].log().mean()),
            "test/acc": float((expected.argmax(1) == labels).float().mean()),
        },
        abs=1e-6,
    )


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_validation_in_bfloat16_sums_in_float32(settings: Callable[..., Settings]) -> None:
    module = Classifier(settings("model=nin_small"), CLASSES)
    images = DataLoader(TensorDataset(torch.zeros(1100, 1, 28, 28), torch.zeros(1100, dtype=torch.long)), batch_size=11)
    trainer = Trainer(precision="bf16-true", **QUIET)
    (metrics,) = trainer.validate(module, images, verbose=False)
    with torch.inference_mode():
        loss = -module(torch.zeros(1, 1, 28, 28, dtype=torch.bfloat16)).float().log_softmax(1)[0, 0]
    # In bfloat16 each loss would have three digits, and their sum would be 2% off.
    assert metrics["val/loss"] == pytest.approx(loss.item(), rel=1e-6)
    kinds = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
    assert {kind: require_logits(torch.ones(1, dtype=kind)).dtype for kind in kinds} == kinds
    assert set(metrics) == {"val/loss", "val/acc"}


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_stored_images_without_their_data_module_are_refused(settings: Callable[..., Settings]) -> None:
    stored = DataLoader(TensorDataset(torch.zeros(4, 28, 28, dtype=torch.uint8)), batch_size=4)
    with pytest.raises(TypeError, match=r"the images are \(4, 28, 28\), uint8, .* give the data module to the Trainer"):
        Trainer(**QUIET).predict(Classifier(settings(), CLASSES), stored)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_top5_accuracy_with_more_than_30_classes(settings: Callable[..., Settings]) -> None:
    module = Classifier(settings(), [f"c{i}" for i in range(31)])
    images = torch.rand(62, 1, 28, 28)
    module.eval()
    with torch.no_grad():
        classes = module(images).argsort(1, descending=True)
    # The label of every image is in another place of the order, and then in the first one.
    for places, expected in ((torch.arange(62) % 31, 5 / 31), (torch.zeros(62, dtype=torch.long), 1.0)):
        labelled = TensorDataset(images, classes.gather(1, places[:, None]).squeeze(1))
        (metrics,) = Trainer(**QUIET).test(module, DataLoader(labelled, batch_size=31), verbose=False)
        assert metrics["test/top5_acc"] == pytest.approx(expected)


def test_the_loss_is_read_in_a_step_on_a_cpu_only(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors on the device "meta" have no values; on an Apple GPU reading one would wait for the GPU."""
    monkeypatch.setattr(Classifier, "trainer", type("OneProcess", (), {"world_size": 1})())
    module = Classifier(settings(), CLASSES).to("meta")
    images, labels = torch.rand(4, 1, 28, 28, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    assert module.training_step((images, labels), 0).is_meta


def test_shares_of_an_uneven_last_batch_give_the_gradient_of_the_undivided_batch(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Classifier(settings("model.norm=none", "model.dropout=0"), CLASSES).eval()
    images, labels = torch.rand(3, 1, 28, 28), torch.tensor([1, 2, 3])

    class Strategy:
        def reduce(self, value: torch.Tensor, reduce_op: str) -> torch.Tensor:
            assert reduce_op == "mean"
            return torch.tensor(1.5)  # two images in one process, one in the other

    trainer = type("TwoProcesses", (), {"world_size": 2, "is_last_batch": True, "strategy": Strategy()})()
    monkeypatch.setattr(Classifier, "trainer", trainer)
    losses = [module.training_step((images[part], labels[part]), 0) for part in (slice(2), slice(2, 3))]
    expected = torch.nn.functional.cross_entropy(module(images), labels)
    torch.testing.assert_close((losses[0] + losses[1]) / 2, expected)  # ddp averages the gradients


class ClassWeights(torch.nn.CrossEntropyLoss):
    def __init__(self, class_names: list[str], weights: dict[str, float]) -> None:
        super().__init__(weight=torch.tensor([weights.get(name, 1.0) for name in class_names]))


class Learned(torch.nn.CrossEntropyLoss):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(num_classes))


class Returns(torch.nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> object:
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        errors = (logits.sub_(1).argmax(1) != labels).float()
        return {
            "each": losses,
            "more": (losses.mean(), logits),
            "number": losses.mean().item(),
            "errors": errors.mean(),
            "sum": losses.sum(),
        }[self.what]


class WeightsByNumber(torch.nn.CrossEntropyLoss):
    def __init__(self, num_classes: int, weights: dict[int, float]) -> None:
        super().__init__(weight=torch.tensor([weights.get(label, 1.0) for label in range(num_classes)]))
        assert all(label in range(num_classes) for label in weights)


def with_loss(settings: Callable[..., Settings], kind: type, *overrides: str, **arguments: object) -> Settings:
    plain = settings("schedule=constant", "optimizer=sgd", "optimizer.momentum=0", *overrides).model_dump(mode="json")
    return validate_plain(plain | {"loss": {"_target_": f"{__name__}.{kind.__name__}", **arguments}})


def require_trained_on(
    module: Classifier, images: torch.Tensor, labels: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """One step of SGD at learning rate 0.5, on all ``images``, must be that on ``loss``, and val/loss cross-entropy."""
    weights = list(module.network.parameters())
    expected = loss(module(images))
    steps = [w.detach() - 0.5 * g for w, g in zip(weights, torch.autograd.grad(expected, weights), strict=True)]
    batches = DataLoader(TensorDataset(images, labels), batch_size=len(labels))
    trainer = Trainer(**QUIET, max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(module, batches, batches)
    torch.testing.assert_close(module.train_loss.compute(), expected.detach())
    torch.testing.assert_close([weight.detach() for weight in weights], steps)
    module.eval()
    with torch.no_grad():
        cross_entropy = torch.nn.functional.cross_entropy(module(images), labels)
    torch.testing.assert_close(trainer.callback_metrics["val/loss"], cross_entropy)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_loss_of_ones_own_is_trained_and_scores_stay_cross_entropy(settings: Callable[..., Settings]) -> None:
    # A network that would be trained in micro-batches, whose mean loss would be another.
    network = ("model=nin", "data.image_size=99", "model.widths=[96,8,8]", "model.dropout=0", "data.batch_size=100")
    assert 0 < (Classifier(settings(*network), CLASSES).micro_batch_size or 0) < 100
    module = Classifier(with_loss(settings, ClassWeights, *network, "optimizer.lr=0.5", weights={"c": 5.0}), CLASSES)
    assert module.micro_batch_size is None
    labels = torch.arange(100) % 10

    def expected(logits: torch.Tensor) -> torch.Tensor:
        of_class = torch.where(labels == 2, 5.0, 1.0)
        return -(of_class * logits.log_softmax(1)[torch.arange(100), labels]).sum() / of_class.sum()

    require_trained_on(module, torch.rand(100, 1, 99, 99), labels, expected)


def test_a_loss_that_would_not_do_what_was_requested_is_refused(settings: Callable[..., Settings]) -> None:
    with pytest.raises(UserError, match=r"^loss: .*Learned has weights of its own, which would not be trained$"):
        Classifier(with_loss(settings, Learned), CLASSES)
    with pytest.raises(UserError, match=r"^label_smoothing=0.1: is for the cross-entropy alone; set label_smoothing=0"):
        Classifier(with_loss(settings, ClassWeights, "label_smoothing=0.1", weights={}), CLASSES)
    with pytest.raises(UserError, match=r"^loss.weight: .*ClassWeights has no such argument; did you mean weights\?"):
        Classifier(with_loss(settings, ClassWeights, weight={}), CLASSES)


@pytest.mark.parametrize(("what", "found"), [("each", "shape "), ("more", "tuple"), ("number", "float")])
def test_a_loss_of_ones_own_that_returns_more_than_a_mean_is_named(
    settings: Callable[..., Settings], what: str, found: str
) -> None:
    with pytest.raises(UserError, match=f"^loss: its class returns .*{found}.*, and not the mean loss of the batch"):
        Classifier(with_loss(settings, Returns, what=what), CLASSES)


def test_a_loss_without_a_gradient_is_refused(settings: Callable[..., Settings]) -> None:
    with pytest.raises(
        UserError, match=r"^loss: .*\.Returns returns a value without a gradient, so that nothing could"
    ):
        Classifier(with_loss(settings, Returns, what="errors"), CLASSES)


def test_a_loss_that_is_a_sum_is_refused(settings: Callable[..., Settings]) -> None:
    with pytest.raises(UserError, match=r"^loss: .*\.Returns doubles with twice the images: it is the sum"):
        Classifier(with_loss(settings, Returns, what="sum"), CLASSES)


def test_numbers_as_keys_of_a_loss_are_numbers_when_its_checkpoint_is_loaded(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    requested = with_loss(settings, WeightsByNumber, weights={6: 2.0})
    module = Classifier(requested, CLASSES)
    trainer = Trainer(**QUIET)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Classifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert again.settings == apply_overrides(requested, [], ()) == requested
    assert again.loss.weight[6] == 2


def test_a_module_can_be_pickled(settings: Callable[..., Settings]) -> None:
    module = Classifier(settings(), CLASSES)
    images = torch.rand(2, 1, 28, 28)
    again = pickle.loads(pickle.dumps(module))
    assert again.settings == module.settings
    assert torch.equal(again.eval()(images), module.eval()(images))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("micro_batch", ["null", "4"])
def test_label_smoothing_is_part_of_the_training_loss_only(settings: Callable[..., Settings], micro_batch: str) -> None:
    chosen = settings(
        "label_smoothing=0.1", "model.norm=none", "model.dropout=0", "schedule=constant", "optimizer=sgd",
        "optimizer.lr=0.5", "optimizer.momentum=0", f"speed.micro_batch={micro_batch}",
    )  # fmt: skip
    module = Classifier(chosen, CLASSES)
    labels = torch.arange(10)

    def expected(logits: torch.Tensor) -> torch.Tensor:
        scores = logits.log_softmax(1)
        return -(0.9 * scores[labels, labels] + 0.1 * scores.mean(1)).mean()  # Szegedy et al. 2016, section 7

    require_trained_on(module, torch.rand(10, 1, 28, 28), labels, expected)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_gradient_of_all_micro_batches_together_is_clipped(settings: Callable[..., Settings]) -> None:
    chosen = settings(
        "trainer.gradient_clip_val=0.01", "speed.micro_batch=4", "trainer.max_epochs=1", "model.norm=none",
        "model.dropout=0", "schedule=constant", "optimizer=sgd", "optimizer.lr=10", "optimizer.momentum=0",
        "callbacks=none", "logger=none",
    )  # fmt: skip
    module = Classifier(chosen, CLASSES)
    images, labels = torch.rand(10, 1, 28, 28), torch.arange(10)
    weights = list(module.network.parameters())
    gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(module(images), labels), weights)
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert norm > 0.1
    expected = [w.detach() - 10 * g * 0.01 / norm for w, g in zip(weights, gradients, strict=True)]
    batches = DataLoader(TensorDataset(images, labels), batch_size=10)
    build_trainer(chosen, None).fit(module, batches, batches)
    torch.testing.assert_close([weight.detach() for weight in weights], expected)


def test_metrics_of_a_network_in_bfloat16_are_summed_in_float32(settings: Callable[..., Settings]) -> None:
    module = Classifier(settings(), CLASSES).to(torch.bfloat16)  # as Lightning does
    trainer: Any = SimpleNamespace(precision="bf16-true")
    module.trainer = trainer
    module.on_fit_start()
    for metric in (module.train_loss, module.train_acc, module.eval_loss):
        metric.update(torch.zeros(256))
        for _ in range(44):  # in bfloat16, 256 + 1 is 256
            metric.update(torch.ones(1))
        assert float(metric.compute()) == pytest.approx(44 / 300)


def test_a_second_test_counts_its_own_images_only() -> None:
    module = Classifier(validate(compose_config(["model=nin_small"])), CLASSES)
    batches = DataLoader(TensorDataset(torch.rand(6, 1, 28, 28), torch.arange(6)), batch_size=3)
    trainer = Trainer(**QUIET)
    for _ in range(2):
        trainer.test(module, batches, verbose=False)
        assert int(module.confusion.compute().sum()) == 6


def test_a_job_of_a_sweep_does_not_compute_as_an_earlier_one_requested(settings: Callable[..., Settings]) -> None:
    def flags(*overrides: str) -> tuple[bool, bool]:
        build_trainer(settings("logger=none", "callbacks=none", *overrides), None)
        return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark

    assert flags("trainer.deterministic=true", "trainer.benchmark=false") == (True, False)
    assert flags("trainer.benchmark=true") == (False, True)
    assert flags() == (False, False)
