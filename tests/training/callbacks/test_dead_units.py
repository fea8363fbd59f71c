import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import Precision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from helpers import run_experiment
from nin.checkpoints import files as checkpoint_files
from nin.config.composition import compose_settings
from nin.config.schema import Settings
from nin.data.module import ImageDataModule, split
from nin.data.sources import load
from nin.data.transforms import resize
from nin.networks import speed
from nin.networks.alexnet import AlexNet
from nin.networks.lenet import LeNet
from nin.networks.nin import NiN
from nin.runs.folder import RunFolder
from nin.training.callbacks.dead_units import DeadUnitMonitor, count_dead, is_at_chance
from nin.training.callbacks.metrics import MetricsLogger
from nin.training.classifier import Classifier
from pictures import folder_data, write_folder

# The notebooks' network, narrower: nothing but its start decides which classes are dead in so few steps.
LOTTERY = (
    "model=nin", "data.image_size=67", "model.widths=[8,16,16]", "model.last_width=null", "optimizer=sgd",
    "optimizer.lr=0.1", "schedule=constant", "schedule.warmup=0",
)  # fmt: skip


def relu_outputs(network: nn.Sequential, images: torch.Tensor) -> list[list[torch.Tensor]]:
    """What every ReLU gives, by block, run layer by layer."""
    outputs = []
    for block in network.eval():
        parts = list(block) if isinstance(block, nn.Sequential) else [block]
        outputs.append([])
        for part in parts:
            images = part(images).clone()
            if isinstance(part, nn.ReLU):
                outputs[-1].append(images)
    return [block for block in outputs if block]


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_dead_counts_are_what_every_relu_gives(norm: str) -> None:
    torch.manual_seed(0)
    network, images = NiN(image_size=67, widths=(8, 16, 16), norm=norm), torch.rand(6, 1, 67, 67)
    silenced = {0: [1, 5], 4: [0], 7: [2, 9]}  # block by its place in the network: channels of its last layer
    with torch.no_grad():
        for block, channels in silenced.items():
            network[block][-2].bias[channels] = -1e3
    expected = relu_outputs(network, images)
    channels = {i: sum(int((o.amax((0, 2, 3)) == 0).sum()) for o in b) for i, b in enumerate(expected, start=1)}
    classes = (expected[-1][-1].amax((0, 2, 3)) == 0).nonzero().flatten().tolist()
    assert {2, 9} <= set(classes)
    assert channels[1] >= 2
    before = [t.clone() for t in network.state_dict().values()]
    network.train()
    random_state = torch.get_rng_state()
    assert count_dead(network, iter(images.split(4))) == (channels, classes)
    assert network.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(a, b) for a, b in zip(before, network.state_dict().values(), strict=True))
    speed.move_relu_after_pooling(network)
    assert count_dead(network, iter(images.split(4))) == (channels, classes)
    assert not any(module._forward_hooks for module in network.modules())


def test_dead_classes_of_batch_norm_that_is_synchronized_between_gpus() -> None:
    network = NiN(image_size=67, widths=(8, 16, 16), norm="batch")
    with torch.no_grad():
        network[7][-2].bias[[2, 9]] = -1e3
    images = torch.rand(6, 1, 67, 67)
    found = count_dead(network, iter([images]))[1]
    assert {2, 9} <= set(found)
    assert count_dead(nn.SyncBatchNorm.convert_sync_batchnorm(network), iter([images]))[1] == found


def test_a_check_takes_no_larger_batches_than_training_on_a_gpu(settings: Callable[..., Settings]) -> None:
    chosen = settings("data.batch_size=16", "speed.micro_batch=null")  # a GPU has no micro-batches
    module = Classifier(chosen, [str(i) for i in range(10)])
    data = ImageDataModule(chosen.data)
    data.prepare_data()
    data.setup("fit")
    sample = DeadUnitMonitor(images=40)._sample(SimpleNamespace(datamodule=data), module)  # type: ignore[arg-type]
    assert [len(images) for images in sample] == [16, 16, 8]


def test_what_is_counted_in_other_networks() -> None:
    images = torch.rand(2, 1, 67, 67)
    assert count_dead(NiN(image_size=67, final_relu=False), iter([images]))[1] == []
    assert count_dead(NiN(image_size=67, head="fc"), iter([images]))[1] is None
    counts, classes = count_dead(AlexNet(image_size=67), iter([images]))
    assert (list(counts), classes) == ([1, 2, 3, 4, 5, 6, 7], None)
    assert count_dead(LeNet(image_size=67), iter([images])) == ({}, None)


def test_dead_classes_are_logged_as_the_checkpoint_has_them_and_warned_of_once(
    settings: Callable[..., Settings], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    looks = ("images=2", "checks_per_epoch=4", "patience_steps=0")
    chosen = settings(*LOTTERY, *(f"callbacks.dead_units.{look}" for look in looks), "trainer.log_every_n_steps=1")
    with caplog.at_level(logging.WARNING, "nin"):
        run_experiment(chosen, folder := RunFolder(tmp_path))

    events = EventAccumulator(str(folder.path)).Reload()
    logged = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"] if tag.startswith("zero_units/")}
    assert set(logged) == {"zero_units/dead_classes", *(f"zero_units/dead_channels/block{i}" for i in range(1, 5))}
    # Of six batches an epoch; the last check is of the weights that are saved.
    steps = [0, 2, 3, 5, 6, 8, 9, 11, 12]
    assert all([event.step for event in values] == steps for values in logged.values())

    images, labels = map(torch.from_numpy, load(chosen.data, "train"))
    training_images = images[split(len(labels), chosen.data.val_size, chosen.seed)[1][:2]]
    network = NiN(image_size=67, widths=(8, 16, 16))
    weights = checkpoint_files.read(folder.last)["state_dict"]
    network.load_state_dict({name.removeprefix("network."): w for name, w in weights.items() if "network" in name})
    outputs = relu_outputs(network, resize(training_images, 67))
    silent = int((outputs[-1][-1].amax((0, 2, 3)) == 0).sum())
    assert logged["zero_units/dead_classes"][-1].value == silent > 0
    for i, block in enumerate(outputs, start=1):
        assert logged[f"zero_units/dead_channels/block{i}"][-1].value == sum(
            int((maps.amax((0, 2, 3)) == 0).sum()) for maps in block
        )

    (warning,) = [
        record.getMessage() for record in caplog.records if record.name == "nin.training.callbacks.dead_units"
    ]
    assert "after step 3 (epoch 1) the network does no better than guessing: train/loss is 2.3" in warning
    assert f"{silent} of 10 classes are dead on these 2 training images, in eval mode (" in warning
    assert "Try experiment=robust" in warning


@pytest.mark.parametrize(("network", "named"), [("nin", True), ("lenet", False)])
def test_a_warning_names_keys_that_the_network_has(network: str, named: bool, caplog: pytest.LogCaptureFixture) -> None:
    metrics = MetricsLogger(Path())
    metrics.latest = {"train/loss": 2.4, "train/acc": 0.1}
    data = SimpleNamespace(train=(None, range(200)))
    trainer: Any = SimpleNamespace(callbacks=[metrics], global_step=300, current_epoch=0, datamodule=data)
    model = compose_settings([f"model={network}"]).model
    settings = SimpleNamespace(model=model, loss=None)
    module: Any = SimpleNamespace(num_classes=10, class_names="abcdefghij", settings=settings)
    monitor = DeadUnitMonitor()
    for _ in range(2):  # the second check in a row warns
        monitor._warn(trainer, module, [2])
    (warning,) = caplog.messages
    assert warning.startswith("after step 300 (epoch ")
    assert ("model.final_relu=false" in warning) == named
    assert "1 of 10 classes is dead on these 200 training images, in eval mode (c)" in warning
    assert "guessing: train/loss is 2.4000, and equal probabilities for all classes give ln 10 = 2.3026." in warning
    settings.loss, monitor = object(), DeadUnitMonitor()  # one of the user's own
    for _ in range(2):
        monitor._warn(trainer, module, [])
    assert "guessing: train/acc is 0.1000. " in caplog.messages[1]


def test_a_class_is_warned_of_that_is_dead_in_two_counts_in_a_row_though_the_network_learns(
    settings: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    chosen = settings("model.final_relu=true", "model.norm=none", "speed.micro_batch=null")
    module = Classifier(chosen, list("abcdefghij"))
    last = [layer for layer in module.network.modules() if isinstance(layer, nn.Conv2d)][-1]
    data = ImageDataModule(chosen.data)
    data.setup("fit")
    metrics = MetricsLogger(Path())
    metrics.latest = {"train/loss": 1.0, "train/acc": 0.6}
    trainer: Any = SimpleNamespace(
        callbacks=[metrics], loggers=[], datamodule=data, precision_plugin=Precision(), is_global_zero=True,
        num_training_batches=1, max_steps=-1, current_epoch=0,
    )  # fmt: skip
    monitor = DeadUnitMonitor(images=2, checks_per_epoch=1, patience_steps=3)
    warned = []
    for step, dead in enumerate(([1], [1], [1], [2], [1], [1, 2], [1, 2]), start=1):
        with torch.no_grad():
            last.weight.zero_()
            last.bias.fill_(1)[dead] = -1
        trainer.global_step = step
        monitor.on_train_batch_end(trainer, module, None, None, 0)
        warned.append(len(caplog.messages))
    assert warned == [0, 0, 0, 0, 0, 1, 1]  # the counts before the third step are too early
    expected = "at step 6 (epoch 1): 1 of 10 classes is dead on these 2 training images, in eval mode (b): the score"
    assert caplog.messages[0].startswith(expected)


@pytest.mark.long
def test_a_network_that_learns_is_not_warned_about(
    settings: Callable[..., Settings], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = settings(
        "trainer.log_every_n_steps=1", "callbacks.dead_units.patience_steps=6", "trainer.limit_train_batches=1.0"
    )
    with caplog.at_level(logging.WARNING, "nin"):  # the counts themselves are logged at INFO, to nin.log
        run_experiment(chosen, RunFolder(tmp_path))
    assert EventAccumulator(str(tmp_path)).Reload().Scalars("zero_units/dead_classes")
    assert not [record for record in caplog.records if record.name == "nin.training.callbacks.dead_units"]


def test_the_sample_of_a_folder_has_all_classes(tmp_path: Path, settings: Callable[..., Settings]) -> None:
    data = folder_data(write_folder(tmp_path / "photos", {"train": 20}), cache=str(tmp_path / "cache"))
    module = ImageDataModule(data)
    module.prepare_data()
    module.setup("fit")
    classifier = Classifier(settings("data.test_time_flip=false").model_copy(update={"data": data}), ["r", "g", "b"], 3)
    trainer: Any = SimpleNamespace(datamodule=module)
    images = torch.cat(list(DeadUnitMonitor(images=6)._sample(trainer, classifier)))
    # The channel that is largest in each class's color: blue, green, red.
    assert images.mean((2, 3)).argmax(1).tolist() == [2, 2, 1, 1, 0, 0]


def test_counting_dead_units_changes_nothing(settings: Callable[..., Settings], tmp_path: Path) -> None:
    hashes, looks = set(), {}
    for times in (1, 6):
        folder = RunFolder(tmp_path / str(times))
        checks = f"callbacks.dead_units.checks_per_epoch={times}"
        chosen = settings(*LOTTERY, checks, "~callbacks.images", "trainer.max_steps=9")
        hashes.add(run_experiment(chosen, folder)["weights_sha256"])
        logged = EventAccumulator(str(folder.path)).Reload().Scalars("zero_units/dead_classes")
        looks[times] = [event.step for event in logged]
    assert len(hashes) == 1
    assert looks == {1: [0, 6, 9], 6: list(range(10))}


def test_the_state_of_a_checkpoint_sets_no_other_attribute() -> None:
    monitor = DeadUnitMonitor()
    monitor.load_state_dict({"checked_step": 7, "suspects": None, "warned": True, "images": 10**9})
    assert (monitor.checked_step, monitor.warned, monitor.images) == (7, True, DeadUnitMonitor().images)


def test_a_loss_of_ones_own_is_not_compared_with_that_of_equal_probabilities() -> None:
    guessing = {"train/loss": 0.5, "train/acc": 0.1}
    assert not is_at_chance(guessing, 10)
    assert is_at_chance(guessing, 10, has_own_loss=True)
    assert not is_at_chance(guessing | {"train/acc": 0.2}, 10, has_own_loss=True)
    assert not is_at_chance({}, 10, has_own_loss=True)  # nothing was logged yet
