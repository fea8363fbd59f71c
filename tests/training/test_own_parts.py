"""Runs with networks, optimizers and data modules of the user's own that differ from the project's in kind."""

import contextlib
import gc
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from torchdata.stateful_dataloader import StatefulDataLoader

from gate import StopIn
from helpers import outcome, run_experiment
from nin.checkpoints import files as checkpoint_files
from nin.config.changes import find_differences
from nin.config.schema import OwnData, Settings, UserError
from nin.config.validation import validate_plain
from nin.data.own import build_own_data
from nin.data.sources import describe, load
from nin.deploy.pipeline import Pipeline
from nin.networks.layers import describe_layers
from nin.runs.folder import RunFolder
from nin.system.processes import StoppedError
from nin.training.classifier import Classifier
from nin.training.evaluation import evaluate_weights
from nin.training.experiment import Experiment
from nin.training.loss import build_loss
from nin.training.request import RunRequest
from nin.training.run import execute_run
from nin.training.trainer import build_trainer
from pictures import folder_data, write_folder


class Partly(nn.Sequential):
    """A frozen layer, a mask that is infinite, and a parameter that no output depends on."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(nn.AvgPool2d(7), nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, num_classes))
        self[2].requires_grad_(False)
        self.unused = nn.Parameter(torch.zeros(3))
        self.register_buffer("mask", torch.tensor([-torch.inf, 0.0]))


def with_network(settings: Callable[..., Settings], *overrides: str, network: str = "Partly") -> Settings:
    plain = settings("logger=none", "callbacks=none", *overrides).model_dump(mode="json")
    return validate_plain(plain | {"model": {"_target_": f"{__name__}.{network}", "input_size": 28}})


def with_data(settings: Callable[..., Settings], data: str, *overrides: str, **arguments: object) -> Settings:
    own = {"_target_": f"{__name__}.{data}", "image_size": 28, "batch_size": 4, **arguments}
    return validate_plain(settings(*overrides).model_dump(mode="json") | {"data": own})


# All batches of a data module.
ALL = tuple(f"trainer.limit_{part}_batches=null" for part in ("train", "val", "test"))


class Normalized(Partly):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.insert(2, nn.BatchNorm1d(16))


def test_batch_norm_of_a_network_of_ones_own_has_the_statistics_of_the_full_batch(
    settings: Callable[..., Settings],
) -> None:
    classes = [str(i) for i in range(10)]
    for network, expected in (("Partly", 4), ("Normalized", None)):
        module = Classifier(with_network(settings, "speed.micro_batch=4", network=network), classes)
        assert module.micro_batch_size == expected


def test_a_last_batch_of_one_image_of_which_batch_norm_has_no_statistics_is_left_out(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    training = len(load(settings().data, "train")[1]) - settings().data.val_size
    keys = ("trainer.limit_train_batches=null", "schedule=constant", "trainer.log_every_n_steps=1")
    for rest, steps in ((1, 2), (2, 4)):  # in two epochs
        chosen = with_network(settings, f"data.batch_size={training - rest}", *keys, network="Normalized")
        assert run_experiment(chosen, RunFolder(tmp_path / str(rest)))["steps"] == steps


class InAList(Partly):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.more = [nn.Linear(num_classes, num_classes)]

    def forward(self, images: Tensor) -> Tensor:
        return self.more[0](super().forward(images))


class ZeroAtItsEnd(Partly):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.more = [nn.Linear(16, 16)]
        nn.init.zeros_(self[3].weight)

    def forward(self, images: Tensor) -> Tensor:
        return self[3](self.more[0](self[2](self[1](self[0](images)))))


class PlainTensor(Partly):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.projection = torch.randn(num_classes, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) @ self.projection


class StateOfOtherShapes(Partly):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("drawn", torch.zeros(int(torch.randint(1000, (1,)))))


class RandomInEval(Partly):
    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(images), 0.5, training=True)


class Detached(Partly):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).detach()


class Probabilities(Partly):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).softmax(1)


def test_a_network_that_ends_with_a_softmax_is_named(
    settings: Callable[..., Settings], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for network in ("Partly", "Probabilities"):
        Experiment(RunRequest(with_network(settings, network=network), RunFolder(tmp_path / network)))
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert re.match(r"model: [\w.]+\.Probabilities ends with a softmax, as the sum of its outputs", warning)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("InAList", r"^model: .*\.InAList: built again and given its state_dict\(\), it has other .*ModuleList"),
        ("ZeroAtItsEnd", r"^model: .*\.ZeroAtItsEnd: built again and given its state_dict\(\), it has other .*"),
        ("PlainTensor", r"^model: .*\.PlainTensor: built again .* tensors be registered with register_buffer\(\) or"),
        ("StateOfOtherShapes", r"^model: .*\.StateOfOtherShapes: its state_dict\(\) can't be loaded again: "),
        ("Detached", r"^model: .*\.Detached: its logits have no gradient, so that nothing could be trained: leave out"),
        ("Shifting", None),
        ("RandomInEval", None),
        ("Normalized", None),
    ],
)
def test_a_network_whose_checkpoints_would_lack_a_part_of_it_is_refused(
    settings: Callable[..., Settings], tmp_path: Path, network: str, message: str | None
) -> None:
    request = RunRequest(with_network(settings, network=network), RunFolder(tmp_path))
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        module = Experiment(request).module
        assert all(part.training for part in module.modules())


class Shifting(Partly):
    """Changes its input, as a network may that has no use for it afterwards."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.sub_(0.5))


def test_the_mirrored_images_of_a_network_that_changes_its_input_are_those_of_the_images(
    settings: Callable[..., Settings],
) -> None:
    chosen = with_network(settings, "data.test_time_flip=true", network="Shifting")
    module = Classifier(chosen, [str(i) for i in range(10)]).eval()
    images = torch.randint(256, (2, 28, 28), dtype=torch.uint8)
    pixels = images.unsqueeze(1) / 255
    with torch.no_grad():
        expected = (module(pixels.clone()).softmax(1) + module(pixels.flip(-1)).softmax(1)) / 2
        torch.testing.assert_close(Pipeline(module.network, 1, 28, 28, test_time_flip=True)(images)[0], expected)
        torch.testing.assert_close(module.predict_step(pixels, 0), expected)


class Squeezing(Partly):
    """Removes the dimension of the batch as well, if it has one image."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).squeeze()


def test_a_network_that_fails_with_a_single_image_is_refused(settings: Callable[..., Settings]) -> None:
    message = r"^model: .*Squeezing maps images \(1, 1, 28, 28\) to \(10,\), and not to logits \(1, 10\)"
    with pytest.raises(UserError, match=message):
        Classifier(with_network(settings, network="Squeezing"), [str(i) for i in range(10)])


class Mismatched(Partly):
    def forward(self, images: Tensor) -> Tensor:
        return self[3](images)


def test_the_error_of_a_network_has_the_line_of_its_file(settings: Callable[..., Settings]) -> None:
    line = Mismatched.forward.__code__.co_firstlineno + 1
    message = rf"^model: .*Mismatched fails on images .*: mat1 and .* \(test_own_parts.py:{line}, in forward\); if the "
    with pytest.raises(UserError, match=message + "images are too small for it"):
        Classifier(with_network(settings, network="Mismatched"), [str(i) for i in range(10)])


class Misspelled(Partly):
    def forward(self, images: Tensor) -> Tensor:
        return images.relo()  # type: ignore[attr-defined]


def test_the_error_of_a_network_that_no_image_size_mends_names_none(settings: Callable[..., Settings]) -> None:
    with pytest.raises(UserError, match=r"no attribute 'relo' \(test_own_parts.py:\d+, in forward\)$"):
        Classifier(with_network(settings, network="Misspelled"), [str(i) for i in range(10)])


class Remembering(Partly):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_a_network_whose_state_has_more_than_tensors_is_refused(settings: Callable[..., Settings]) -> None:
    with pytest.raises(UserError, match=r"^model: .*Remembering: state_dict\(\) has a dict at _extra_state; checkp"):
        Classifier(with_network(settings, network="Remembering"), [str(i) for i in range(10)])


class Averages(nn.Sequential):
    """Has no parameters."""

    def __init__(self) -> None:
        super().__init__(nn.AvgPool2d((14, 5), (14, 5)), nn.Flatten())


def test_a_network_without_parameters_has_a_table_of_layers_and_is_not_trained(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    chosen = with_network(settings, network="Averages")
    (row,) = describe_layers(Classifier(chosen, [str(i) for i in range(10)]).network, 1, 28)
    assert (row.parameters, row.output_shape) == (0, (10,))
    with pytest.raises(UserError, match=r"^model: no parameter of the network has requires_grad, so"):
        run_experiment(chosen, RunFolder(tmp_path))


class Auxiliary(Partly):
    """Returns more than logits in training, as torchvision's GoogLeNet and Inception3 do."""

    def forward(self, images: Tensor) -> Any:
        logits = super().forward(images)
        return (logits, logits) if self.training else logits


@pytest.mark.parametrize("micro_batch", ["auto", "16"])
def test_a_network_that_returns_more_than_logits_in_training_is_refused(
    settings: Callable[..., Settings], tmp_path: Path, micro_batch: str
) -> None:
    chosen = with_network(settings, f"speed.micro_batch={micro_batch}", network="Auxiliary")
    with pytest.raises(UserError, match=r"^model: the network returns tuple in training, .*aux_logits=false"):
        run_experiment(chosen, RunFolder(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("BCEWithLogitsLoss", r"fails with logits \(21, 10\) and int64 labels \(21,\): ValueError: Target size"),
        ("CosineEmbeddingLoss", "TypeError: .*missing 1 required positional argument"),
        ("MSELoss", r"RuntimeError: The size of tensor a .* dimension 1$"),  # no line: none is the user's
    ],
)
def test_a_loss_that_takes_no_logits_and_labels_is_refused_before_training(
    settings: Callable[..., Settings], name: str, message: str
) -> None:
    chosen = settings(f"+loss._target_=torch.nn.{name}")
    with pytest.raises(UserError, match=rf"^loss: torch.nn.{name} .*{message}"):
        build_loss(chosen, [str(i) for i in range(10)])


class Weighted(nn.Module):
    """Cross-entropy with a weight for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.arange(1.0, 11))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels, self.weights)  # type: ignore[arg-type]  # a tensor


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_loss_with_buffers_has_the_precision_of_its_logits(
    settings: Callable[..., Settings], tmp_path: Path, precision: str
) -> None:
    plain = settings("logger=none", "callbacks=none", f"trainer.precision={precision}", "trainer.max_epochs=1")
    chosen = validate_plain(plain.model_dump(mode="json") | {"loss": {"_target_": f"{__name__}.Weighted"}})
    assert run_experiment(chosen, RunFolder(tmp_path))["steps"] == 6


@pytest.mark.parametrize("optimizer", [["optimizer=adamw"], ["optimizer=sgd", "optimizer.momentum=0.9"]])
def test_a_network_with_frozen_and_unused_weights_is_resumed(
    settings: Callable[..., Settings], tmp_path: Path, optimizer: list[str]
) -> None:
    keys = ["schedule=constant", *optimizer]
    uninterrupted = run_experiment(
        with_network(settings, *keys, "trainer.max_epochs=2"), RunFolder(tmp_path / "uninterrupted")
    )
    folder = RunFolder(tmp_path / "extended")
    run_experiment(with_network(settings, *keys, "trainer.max_epochs=1"), folder)
    before = checkpoint_files.read(folder.last)["state_dict"]
    extended = run_experiment(with_network(settings, *keys, "trainer.max_epochs=2"), folder)
    assert extended["weights_sha256"] == uninterrupted["weights_sha256"]
    after = checkpoint_files.read(folder.last)["state_dict"]
    (frozen,) = (name for name in after if name.endswith("2.weight"))
    assert torch.equal(before[frozen], after[frozen])


class Noisy(Partly):
    """Draws random numbers for every batch, also in the test."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + torch.randn(len(images), 1)[:, [0] * 10].cumsum(1)  # type: ignore[no-any-return]


class Unfreezing(BaseFinetuning):
    """Trains the first block from the second epoch on."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.network[0], train_bn=False)  # type: ignore[index,arg-type]

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.make_trainable(pl_module.network[0])  # type: ignore[index,arg-type]


def add_callback(settings: Settings, target: str, **arguments: object) -> Settings:
    return settings.model_copy(update={"callbacks": {"own": {"_target_": target, **arguments}}})


def noisy(settings: Callable[..., Settings]) -> Settings:
    return with_network(settings, network="Noisy")


def unfreezing(settings: Callable[..., Settings]) -> Settings:
    return add_callback(settings("trainer.max_epochs=3", "schedule=constant", "logger=none"), f"{__name__}.Unfreezing")


def stopping_early(settings: Callable[..., Settings]) -> Settings:
    """Checks at the end of an epoch, whose last validation is before its last batches."""
    words = ("trainer.max_epochs=4", "trainer.val_check_interval=3", "trainer.limit_train_batches=5", "logger=none")
    arguments = {"monitor": "val/loss", "mode": "max", "patience": 1, "check_on_train_epoch_end": True}
    return add_callback(settings(*words), "lightning.pytorch.callbacks.EarlyStopping", **arguments)


def float32_state(settings: Callable[..., Settings]) -> Settings:
    """torch's NAdam keeps a product of momenta in float32."""
    words = ("trainer.precision=bf16-true", "schedule=constant", "logger=none", "callbacks=none")
    plain = settings(*words).model_dump(mode="json")
    return validate_plain(plain | {"optimizer": {"_target_": "torch.optim.NAdam", "lr": 0.01}})


@pytest.mark.parametrize(
    ("requested", "hook", "count"),
    [
        (noisy, "on_test_batch_start", 1),
        (unfreezing, "on_train_batch_end", 8),
        (unfreezing, "on_train_batch_end", 12),
        (stopping_early, "on_train_batch_end", 9),
        (stopping_early, "on_test_batch_start", 1),  # after its training has ended
        (float32_state, "on_train_batch_end", 3),
    ],
)
def test_state_that_is_not_lightnings_is_resumed(
    settings: Callable[..., Settings],
    tmp_path: Path,
    requested: Callable[[Callable[..., Settings]], Settings],
    hook: str,
    count: int,
) -> None:
    uninterrupted = run_experiment(requested(settings), RunFolder(tmp_path / "uninterrupted"))
    folder = RunFolder(tmp_path / "stopped")
    with pytest.raises(StoppedError):
        run_experiment(requested(settings), folder, callbacks=[StopIn(hook, count)])
    resumed = run_experiment(requested(settings), folder)
    assert outcome(resumed) == outcome(uninterrupted)
    reason = "EarlyStopping: Monitored metric val/loss did not improve in the last 1 records. Best score: 2."
    for result in (uninterrupted, resumed):
        assert result.get("stopped_by", "").startswith(reason) == (requested is stopping_early)


class Frozen(Partly):
    """Of its two layers of batch norm the first keeps its statistics, as that of a pretrained backbone."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.insert(2, nn.BatchNorm1d(16).eval())
        self.insert(3, nn.BatchNorm1d(16))


class FrozenByTrain(Frozen):
    """The same, as a class does it that is put in training mode again and again."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.train()

    def train(self, mode: bool = True) -> "FrozenByTrain":
        super().train(mode)
        self[2].eval()
        return self


@pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode")  # Lightning's
@pytest.mark.parametrize("network", ["Frozen", "FrozenByTrain"])
def test_what_a_network_puts_in_eval_mode_stays_in_it_through_validations_and_a_resumption(
    settings: Callable[..., Settings], tmp_path: Path, network: str
) -> None:
    folder, counts = RunFolder(tmp_path), []
    for epochs in (2, 3):
        keys = (f"trainer.max_epochs={epochs}", "schedule=constant", "trainer.val_check_interval=2")
        run_experiment(with_network(settings, *keys, network=network), folder)
        state = checkpoint_files.read(folder.last)["state_dict"]
        counts.append([int(state[name]) for name in state if name.endswith("num_batches_tracked")])
    assert counts == [[0, 12], [0, 18]]


class ThreeLooks(torch.optim.SGD):
    """Evaluates the batch three times for one step, as LBFGS does; records the gradients."""

    seen: list[list[Tensor]] = []  # noqa: RUF012  # read by the test, which has no access to the object

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            losses = [self._look(closure) for _ in range(3)]
        super().step()
        return losses[0]

    def _look(self, closure: Any) -> Any:
        loss = closure()
        self.seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return loss


def test_an_optimizer_that_evaluates_a_batch_several_times_has_its_gradients(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    keys = ("logger=none", "callbacks=none", "trainer.max_steps=2", "model.dropout=0", "schedule=constant")
    plain = settings(*keys, "speed.micro_batch=12").model_dump(mode="json")
    requested = validate_plain(plain | {"optimizer": {"_target_": f"{__name__}.ThreeLooks", "lr": 0.1}})
    ThreeLooks.seen.clear()
    run_experiment(requested, RunFolder(tmp_path))
    assert len(ThreeLooks.seen) == 6
    for first, *others in (ThreeLooks.seen[:3], ThreeLooks.seen[3:]):
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    accumulating = requested.model_copy(
        update={"trainer": requested.trainer.model_copy(update={"accumulate_grad_batches": 2})}
    )
    with pytest.raises(UserError, match=r"accumulate_grad_batches: must be 1 with .*\.ThreeLooks, which"):
        run_experiment(accumulating, RunFolder(tmp_path / "accumulating"))


class SearchesAlongALine(ThreeLooks):
    """Evaluates the batch at three other weights, as LBFGS does; records the losses."""

    losses: list[float] = []  # noqa: RUF012  # read by the test

    def _look(self, closure: Any) -> Any:
        loss = super()._look(closure)
        self.losses.append(loss.item())
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(1.5)
        return loss


def test_metrics_are_those_of_the_first_evaluation_of_a_batch(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    keys = ("logger=none", "callbacks=none", "trainer.max_steps=2", "model.dropout=0", "schedule=constant")
    plain = settings(*keys, "speed.micro_batch=null").model_dump(mode="json")
    own = {"_target_": f"{__name__}.SearchesAlongALine", "lr": 0.1}
    run_experiment(validate_plain(plain | {"optimizer": own}), RunFolder(tmp_path))
    losses = SearchesAlongALine.losses
    assert len({round(loss, 4) for loss in losses}) == 6
    assert RunFolder(tmp_path).read_epochs()[0]["train/loss"] == pytest.approx((losses[0] + losses[3]) / 2, abs=1e-6)


def test_in_several_processes_lightning_divides_the_images_of_ones_own_data_module(
    settings: Callable[..., Settings],
) -> None:
    own = {"_target_": f"{__name__}.Streams", "image_size": 28, "batch_size": 4}
    chosen = {}
    for devices in (1, 2):
        for given in ("null", "false", "true"):
            keys = [f"trainer.devices={devices}", f"trainer.use_distributed_sampler={given}", "callbacks=none"]
            projects = settings(*keys, f"trainer.strategy={'auto' if devices == 1 else 'ddp'}", "logger=none")
            for kind, requested in (
                ("project's", projects),
                ("own", validate_plain(projects.model_dump(mode="json") | {"data": own})),
            ):
                trainer = build_trainer(requested, None)
                chosen[kind, devices, given] = trainer._accelerator_connector.use_distributed_sampler
    assert [key for key, used in chosen.items() if used] == [
        *((kind, 1, "true") for kind in ("project's", "own")),
        ("own", 2, "null"),
        *((kind, 2, "true") for kind in ("project's", "own")),
    ]
    # A run in which every process trained on all images, is not continued otherwise.
    (before, now), one = (
        [validate_plain(settings(*keys, f"trainer.use_distributed_sampler={given}").model_dump() | {"data": own})
         for given in ("false", "null")] for keys in (["trainer.strategy=ddp", "trainer.devices=2"], [])
    )  # fmt: skip
    assert find_differences(before, now) == [
        "trainer.use_distributed_sampler: false in the existing run, true in this command"
    ]
    assert find_differences(*one) == []


def test_a_plateau_schedule_follows_the_validation_loss_and_is_resumed(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    plateau = {"_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau", "patience": 0, "factor": 0.5}
    plateau |= {"threshold": 1e9, "threshold_mode": "abs"}

    def requested(*overrides: str) -> Settings:
        keys = ("optimizer=sgd", "optimizer.lr=0.1", "trainer.max_epochs=3", "logger=none", "callbacks=none")
        return validate_plain(settings(*keys, *overrides).model_dump() | {"schedule": plateau})

    uninterrupted, folder = RunFolder(tmp_path / "uninterrupted"), RunFolder(tmp_path / "resumed")
    result = run_experiment(requested(), uninterrupted)
    # With such a threshold no epoch after the first is any better.
    assert [row["lr"] for row in uninterrupted.read_epochs()] == [0.1, 0.1, 0.05]
    # As after a kill: the checkpoint of the second epoch, with which the rate has been halved.
    folder.checkpoints.mkdir(parents=True)
    shutil.copyfile(uninterrupted.checkpoints / "last-1.ckpt", folder.last)
    shutil.copyfile(uninterrupted.best, folder.best)
    resumed = run_experiment(requested(), folder)
    assert outcome(resumed) == outcome(result)
    with pytest.raises(UserError, match=r"schedule=.*ReduceLROnPlateau: follows val/loss, which this run does not"):
        run_experiment(requested("trainer.limit_val_batches=0"), RunFolder(tmp_path / "unscored"))
    plateau["mode"] = "max"
    with pytest.raises(UserError, match=r"schedule\.mode=max: the schedule follows val/loss, which is to fall"):
        run_experiment(requested(), RunFolder(tmp_path / "rising"))


class Stream(IterableDataset):
    """A data set without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        random = torch.Generator().manual_seed(0)
        for i in range(24):
            yield torch.rand(1, 28, 28, generator=random), i % 2


class Streams(LightningDataModule):
    class_names, channels = ("even", "odd"), 1

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Stream(), batch_size=4)

    val_dataloader = test_dataloader = train_dataloader


class Parted(Streams):
    """Its test images are not those of the validation, and are there once a test is set up, as Lightning advises."""

    def setup(self, stage: str) -> None:
        if stage == "test":
            self.tested = TensorDataset(torch.zeros(24, 1, 28, 28), torch.arange(24) % 2)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.tested, batch_size=4)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*IterableDataset")
def test_the_test_set_of_ones_own_data_module_is_scored_after_each_epoch_if_that_is_requested(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    keys = (*ALL, "schedule=constant", "logger=none", "callbacks=none")
    result = run_experiment(with_data(settings, "Parted", *keys, score_each_epoch="test"), RunFolder(tmp_path))
    rows = RunFolder(tmp_path).read_epochs()
    assert [row["epoch"] for row in rows if "test/loss" in row and "val/loss" not in row] == [1, 2]
    assert rows[-1]["test/loss"] == result["metrics"]["test/loss"]  # of the same weights


class Named(Streams):
    def __init__(self, names: str) -> None:
        super().__init__()
        self.class_names = list(np.array(names.split()))  # type: ignore[assignment]


def test_names_of_classes_that_are_numpys_become_plain_and_must_differ(settings: Callable[..., Settings]) -> None:
    def own(names: str) -> OwnData:
        keys = {"_target_": f"{__name__}.Named", "image_size": 28, "batch_size": 4, "names": names}
        return OwnData.model_validate(keys)

    described = describe(own("even odd")).class_names
    saved = Classifier(settings(), build_own_data(own("even odd")).class_names).hparams["class_names"]
    assert [type(name) for name in (*described, *saved)] == [str] * 4
    with pytest.raises(UserError, match=r"^data: .*Named has several classes named odd; names must differ$"):
        describe(own("even odd odd"))


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*IterableDataset")
@pytest.mark.parametrize("limit", [["trainer.max_epochs=2"], ["trainer.max_epochs=-1", "trainer.max_steps=12"]])
def test_a_data_module_without_a_length_is_trained_on(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: list[str]
) -> None:
    # As on a terminal, so that the progress bar has no length either.
    monkeypatch.setattr("nin.training.experiment.sys.stdout.isatty", lambda: True)
    chosen = with_data(settings, "Streams", *ALL, *limit, "schedule=constant", "~callbacks.images")
    result = run_experiment(chosen, RunFolder(tmp_path))
    assert (result["status"], result["steps"]) == ("finished", 12)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*IterableDataset")
def test_a_schedule_over_an_unknown_number_of_steps_is_refused(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    plain = with_data(settings, "Streams", ALL[0], "logger=none", "callbacks=none").model_dump(mode="json")
    linear = {"_target_": "torch.optim.lr_scheduler.LinearLR", "total_iters": "steps"}
    for i, schedule in enumerate(({"name": "cosine", "warmup": 0.0}, {"name": "one_cycle", "warmup": 0.3}, linear)):
        request = RunRequest(validate_plain(plain | {"schedule": schedule}), RunFolder(tmp_path / f"{i}"))
        with pytest.raises(UserError, match=r"^schedule=.*: depends on the number of steps, which this data module"):
            execute_run(request)
        assert not request.folder.path.exists()
    limited = plain | {"trainer": plain["trainer"] | {"limit_train_batches": 2}, "schedule": linear}
    assert run_experiment(validate_plain(limited), RunFolder(tmp_path / "limited"))["steps"] == 4


class Once(Streams):
    """Gives batches in the first epoch only."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = iter(Streams().train_dataloader())

    def train_dataloader(self) -> DataLoader:
        once = self.batches

        class Loader(IterableDataset):
            def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
                return once

        return DataLoader(Loader(), batch_size=None)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*IterableDataset")
def test_a_loader_that_is_empty_in_a_later_epoch_is_named(settings: Callable[..., Settings], tmp_path: Path) -> None:
    chosen = with_data(settings, "Once", *ALL, "schedule=constant", "callbacks=none", "logger=none")
    with pytest.raises(
        UserError, match=r"^data: its train_dataloader\(\) gave no batch in epoch 2; it must start again"
    ):
        execute_run(RunRequest(chosen, RunFolder(tmp_path)))


class Interrupted(Streams):
    """Receives SIGTERM in the third batch of an epoch, once."""

    notes = "not those of data=folder"
    interrupted = False

    def train_dataloader(self) -> DataLoader:
        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for i, batch in enumerate(super(Interrupted, self).train_dataloader()):
                if i == 2 and self.trainer.current_epoch == self.epoch and not Interrupted.interrupted:
                    Interrupted.interrupted = True
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        class Loader(IterableDataset):
            def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
                return batches()

        return DataLoader(Loader(), batch_size=None)

    def __init__(self, epoch: int):
        super().__init__()
        self.epoch = epoch


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*IterableDataset")
@pytest.mark.parametrize(
    ("epoch", "message"),
    [
        (0, "no checkpoint is saved yet; start again from the beginning"),
        (1, "last.ckpt has step 6 of 8; resume with: nin resume {folder} --allow {module}\n"),
    ],
)
def test_a_stop_says_what_is_saved(
    settings: Callable[..., Settings], tmp_path: Path, capsys: pytest.CaptureFixture[str], epoch: int, message: str
) -> None:
    Interrupted.interrupted = False
    keys = (*ALL, "schedule=constant", "callbacks=none", "logger=none")
    chosen = with_data(settings, "Interrupted", *keys, epoch=epoch)
    with pytest.raises(StoppedError):
        execute_run(RunRequest(chosen, RunFolder(tmp_path)))
    message = message.format(folder=tmp_path, module=__name__.partition(".")[0])
    assert f"stopped by SIGTERM; {message}" in capsys.readouterr().err
    abroad = chosen.model_copy(update={"callbacks": {"x": {"_target_": f"{__name__}.X", "dirpath": "/elsewhere"}}})
    assert RunRequest(abroad, RunFolder(tmp_path)).resume_command == "the same command with name=quickstart"
    allow = f"--allow {__name__.partition('.')[0]}"
    for_training = {"loss": {"_target_": "mine.Loss"}, "callbacks": {"x": {"_target_": "mine.X"}}, "label_smoothing": 0}
    more = validate_plain(chosen.model_dump(mode="json") | for_training)
    assert RunRequest(more, RunFolder("x")).eval_command == f"nin eval x {allow}"
    assert RunRequest(more, RunFolder("x")).resume_command == f"nin resume x {allow} --allow mine"
    result = execute_run(RunRequest(chosen, RunFolder(tmp_path)))
    assert (result["status"], result["steps"]) == ("finished", 12)


def test_what_lightning_refuses_when_it_knows_the_number_of_batches_is_the_users_mistake(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    keys = ("trainer.limit_train_batches=null", "trainer.val_check_interval=10", "logger=none", "callbacks=none")
    plain = settings(*keys).model_dump()
    plain["model"] |= {"kernel_sizes": [3, 3, 3], "first_stride": 1}
    images = folder_data(write_folder(tmp_path / "images", {"train": 8})).model_dump()
    request = RunRequest(validate_plain(plain | {"data": images}), RunFolder(tmp_path / "run"))
    with pytest.raises(UserError, match=r"^trainer: `val_check_interval` \(10\) must be less than"):
        execute_run(request)
    assert not request.folder.path.exists()


class Position:
    """Eight batches, and the position in them."""

    def __init__(self, images: TensorDataset):
        self.images, self.position, self.loaded = images, 0, 0

    def __iter__(self) -> Iterator[list[Tensor]]:
        start, self.loaded = self.loaded, 0
        for i in range(start, 8):
            self.position = i + 1
            yield [tensor[4 * i : 4 * i + 4] for tensor in self.images.tensors]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = self.loaded = state["position"] % 8


class EagerPosition(Position):
    """As torchdata's loader: what is loaded applies to the next iterator."""

    def __iter__(self) -> Iterator[list[Tensor]]:
        start, self.loaded = self.loaded, 0
        return self.batches(start)

    def batches(self, start: int) -> Iterator[list[Tensor]]:
        for i in range(start, 8):
            self.position = i + 1
            yield [tensor[4 * i : 4 * i + 4] for tensor in self.images.tensors]

    def __len__(self) -> int:
        return 8


class Dropping(nn.Sequential):
    """Draws random numbers for every batch."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(nn.AvgPool2d(7), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, num_classes))


class Loaders(LightningDataModule):
    class_names, channels = ("even", "odd"), 1

    def __init__(self, kind: str):
        super().__init__()
        images = torch.rand(32, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        self.kind, self.images = kind, TensorDataset(images, torch.arange(32) % 2)

    def train_dataloader(self) -> Any:
        match self.kind:
            case "shuffled":
                return DataLoader(self.images, 4, shuffle=True)
            case "shuffled in a lasting worker":
                return DataLoader(self.images, 4, shuffle=True, num_workers=1, persistent_workers=True)
            case "shuffled with a generator":
                return DataLoader(self.images, 4, shuffle=True, generator=torch.Generator().manual_seed(0))
            case "weighted":
                generator = torch.Generator().manual_seed(0)
                weighted = WeightedRandomSampler([1.0, 3.0] * 16, num_samples=32, generator=generator)
                return DataLoader(self.images, batch_sampler=BatchSampler(weighted, 4, drop_last=True))
            case "sampler":  # a worker begins with the batches as soon as there is an iterator
                return DataLoader(self.images, 4, sampler=DistributedSampler(self.images, 1, 0), num_workers=1)
            case "eager":
                return EagerPosition(self.images)
            case "torchdata":
                return StatefulDataLoader(self.images, 4, shuffle=True)
            case "torchdata with a worker":
                return StatefulDataLoader(self.images, 4, shuffle=True, num_workers=1)
        return Position(self.images)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.images, 4, num_workers=int(self.kind == "sampler"))

    test_dataloader = val_dataloader


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*IterableDataset")
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata's loader reads it
@pytest.mark.parametrize(
    ("kind", "words", "interruptions"),
    [
        ("shuffled", [], [("on_train_batch_start", 12)]),
        ("shuffled", ["trainer.reload_dataloaders_every_n_epochs=1"], [("on_train_batch_start", 12)]),
        ("shuffled in a lasting worker", [], [("on_train_batch_start", 12)]),
        ("shuffled with a generator", [], [("on_train_batch_start", 12)]),
        ("weighted", [], [("on_train_batch_start", 12)]),
        ("sampler", [], [("on_train_batch_start", 12)]),
        ("eager", [], [("on_train_batch_start", 12)]),  # with a schedule for which Lightning builds the loader early
        ("eager", ["schedule=constant"], [("on_train_batch_start", 12)]),
        ("eager", [], [("on_validation_batch_start", 1)] * 2),  # resumed in it, and stopped in it again
        ("unsized", ["schedule=constant"], [("on_train_batch_start", 12)]),
        ("torchdata", [], [("on_train_batch_start", 12)]),
        ("torchdata", [], [("on_train_epoch_end", 1), ("on_train_epoch_end", 1)]),
        ("torchdata", ["trainer.limit_train_batches=4"], [("on_train_epoch_end", 1)]),
        ("torchdata with a worker", [], [("on_train_epoch_end", 1), ("on_train_batch_start", 3)]),
    ],
)
def test_loaders_of_all_kinds_are_resumed_exactly(
    settings: Callable[..., Settings],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    words: list[str],
    interruptions: list[tuple[str, int]],
) -> None:
    keys = (ALL[0], "trainer.max_epochs=3", "logger=none", "callbacks=none", "threads=1")
    plain = with_data(settings, "Loaders", *keys, *words, kind=kind).model_dump(mode="json")
    requested = validate_plain(plain | {"model": {"_target_": f"{__name__}.Dropping", "input_size": 28}})
    expected = run_experiment(requested, RunFolder(tmp_path / "uninterrupted"))
    assert "they would be" not in caplog.text
    folder = RunFolder(tmp_path / "interrupted")
    for hook, count in interruptions:
        with pytest.raises(StoppedError):
            run_experiment(requested, folder, callbacks=[StopIn(hook, count)])
    resumed = run_experiment(requested, folder)
    assert outcome(resumed) == outcome(expected)
    # What workers draw is not saved; these draw nothing.
    assert ("with num_workers=0 they would be" in caplog.text) == (kind == "torchdata with a worker")
    assert ("with persistent_workers=False they would be" in caplog.text) == (kind == "shuffled in a lasting worker")


class EndedWorkers(Callback):
    """Sends SIGTERM to the processes of the loader and to this one, as ``timeout`` does to all of a group."""

    def __init__(self, hook: str):
        setattr(self, hook, self.end)

    def end(self, *_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        # A worker that ends while it holds this lock leaves it locked, and torch waits for it without end.
        iterators = [each for each in gc.get_objects() if type(each) is _MultiProcessingDataLoaderIter]
        with contextlib.ExitStack() as locks:
            for iterator in iterators:
                locks.enter_context(iterator._workers_done_event._cond)
            for process in multiprocessing.active_children():
                # A worker ignores that of its parent, and torch's handler must find it not waited for.
                subprocess.run(["kill", str(process.pid)], check=True)
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_test_batch_start"])
def test_a_signal_that_also_ends_the_processes_of_a_loader_is_a_stop(
    settings: Callable[..., Settings], tmp_path: Path, hook: str
) -> None:
    chosen = with_data(settings, "Loaders", ALL[0], "logger=none", "callbacks=none", kind="sampler")
    with pytest.raises(StoppedError):
        run_experiment(chosen, RunFolder(tmp_path), callbacks=[EndedWorkers(hook)])


def test_a_data_module_of_ones_own_trains_with_all_callbacks_for_longer_than_their_patience(
    settings: Callable[..., Settings], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = (
        "model=nin_small",
        ALL[0],
        "callbacks=default",
        "callbacks.dead_units.patience_steps=1",
        "optimizer.lr=1e-9",
    )
    result = run_experiment(with_data(settings, "Loaders", *words, kind="shuffled"), RunFolder(tmp_path))
    assert result["steps"] == 16
    assert "after step 6 (epoch " in caplog.text  # of checks in every second step, the second in a row
    assert "are dead on these" not in caplog.text  # its classes are not counted


class Halves(Streams):
    """Six test batches."""

    def test_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.zeros(24, 1, 28, 28), torch.arange(24) % 2), batch_size=4)


class Drawn(Halves):
    """Chooses its test images at random when it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.images = torch.rand(24, 1, 28, 28)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.images, torch.arange(24) % 2), batch_size=4)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*IterableDataset")
def test_a_checkpoint_is_tested_on_the_images_that_the_run_had_chosen_at_random(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    chosen = with_data(settings, "Drawn", "logger=none", "callbacks=none", "schedule=constant", *ALL)
    result = run_experiment(chosen, RunFolder(tmp_path))
    torch.rand(1)  # what this process has drawn since does not matter
    metrics, _ = evaluate_weights(chosen, checkpoint_files.read(RunFolder(tmp_path).best))
    assert metrics == {name: value for name, value in result["metrics"].items() if name.startswith("test/")}


class Untested(LightningDataModule):
    class_names, channels = ("even", "odd"), 1
    train_dataloader = Streams.train_dataloader


@pytest.mark.parametrize(
    ("data", "share", "message"),
    [
        ("Halves", "0.1", r"^trainer.limit_test_batches=0.1: leaves none of 6 batches; choose 0.1667 or more, or a"),
        ("Streams", "0.1", r"^trainer.limit_test_batches=0.1: a fraction of batches whose number is not known; give a"),
        ("Untested", "null", r"^data: .*Untested needs a test_dataloader\(\): a run ends with its test$"),
        ("folder", "0.3", r"^trainer.limit_test_batches=0.3: leaves none of 3 batches; choose 0.3334 or more, or a"),
    ],
)
def test_a_test_without_batches_is_refused_before_training(
    settings: Callable[..., Settings], tmp_path: Path, data: str, share: str, message: str
) -> None:
    plain = settings(f"trainer.limit_test_batches={share}", "logger=none", "callbacks=none").model_dump()
    own = {"_target_": f"{__name__}.{data}", "image_size": 28, "batch_size": 4}
    if data == "folder":
        own = folder_data(write_folder(tmp_path / "images", {"train": 8})).model_dump()
        plain["model"] |= {"kernel_sizes": [3, 3, 3], "first_stride": 1}
    with pytest.raises(UserError, match=message):
        Experiment(RunRequest(validate_plain(plain | {"data": own}), RunFolder(tmp_path / "run")))
