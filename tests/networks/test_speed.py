"""What computes faster computes the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from torch import nn

from helpers import run_experiment
from nin.checkpoints import files as checkpoint_files
from nin.config.composition import compose_config
from nin.config.networks import OwnModel
from nin.config.schema import Settings
from nin.config.validation import validate
from nin.networks import speed
from nin.networks.nin import NiN
from nin.runs.folder import RunFolder
from nin.training.classifier import Classifier

OFF = (
    "speed.channels_last=false",
    "speed.relu_after_pooling=false",
    "speed.fused_optimizer=false",
    "speed.micro_batch=null",
)


def far(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The relative distance of two networks' weights."""
    assert list(one) == list(other)
    difference = sum((one[name] - other[name]).double().square().sum() for name in one)
    return float((difference / sum(weights.double().square().sum() for weights in one.values())).sqrt())


@pytest.mark.parametrize(
    "overrides",
    [
        # Batches of 30 images: micro-batches of 7, 7, 7, 7 and 2.
        ("model=nin", "data.image_size=67", "speed.micro_batch=7"),
        pytest.param(
            (
                "model=nin",
                "data.image_size=99",
                "speed.micro_batch=16",
                "trainer.accumulate_grad_batches=2",
                "optimizer.momentum=0.9",
            ),
            marks=pytest.mark.long,
        ),
        pytest.param(
            ("model=vgg", "data.image_size=32", "speed.micro_batch=4", "trainer.limit_train_batches=3"),
            marks=pytest.mark.long,
        ),
        pytest.param(
            ("model=alexnet", "data.image_size=65", "speed.micro_batch=11", "trainer.limit_train_batches=3"),
            marks=pytest.mark.long,
        ),
    ],
)
def test_steps_with_every_switch_on_are_steps_with_all_off(
    tmp_path: Path, data_root: Path, overrides: tuple[str, ...]
) -> None:
    common = [
        "data=garments", f"data.root={data_root}", "trainer=cpu", "callbacks=none", "logger=none",
        "trainer.max_epochs=1", "trainer.limit_train_batches=12", "trainer.limit_val_batches=2",
        "trainer.limit_test_batches=2", "data.batch_size=30", "optimizer.lr=0.01", "speed.micro_batch=16", *overrides,
    ]  # fmt: skip
    weights, scores = [], []
    for name, switches in (("on", ()), ("off", OFF)):
        folder = RunFolder(tmp_path / name)
        scores.append(run_experiment(validate(compose_config([*common, *switches])), folder)["metrics"])
        state = checkpoint_files.read(folder.last)["state_dict"]
        weights.append({name: value for name, value in state.items() if name.startswith("network.")})
    assert far(*weights) < 1e-5
    assert scores[0]["val/loss"] == pytest.approx(scores[1]["val/loss"], rel=1e-5)
    assert scores[0]["test/acc"] == scores[1]["test/acc"]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(
            ("model=nin", "model.init=kaiming_dirac", "data.image_size=67", "optimizer.lr=0.1", "data.batch_size=64"),
            marks=pytest.mark.long,
        ),
        ("model=nin_small", "optimizer.lr=0.1", "data.batch_size=16"),  # batch norm: no micro-batches
    ],
)
def test_in_float64_the_switches_differ_by_its_rounding(
    tmp_path: Path, real_root: Path, overrides: tuple[str, ...]
) -> None:
    """In float32 the same runs end up to some percent apart, because training amplifies rounding, here 2e-16."""
    common = [
        f"data.root={real_root}", "trainer=cpu", "callbacks=none", "logger=none", "trainer.max_steps=20",
        "trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "trainer.precision=64-true",
        "speed.micro_batch=24", *overrides,
    ]  # fmt: skip
    weights = []
    for name, switches in (("on", ()), ("off", OFF)):
        folder = RunFolder(tmp_path / name)
        run_experiment(validate(compose_config([*common, *switches])), folder)
        state = checkpoint_files.read(folder.last)["state_dict"]
        weights.append({key: value for key, value in state.items() if key.startswith("network.")})
    assert next(iter(weights[0].values())).dtype == torch.float64
    assert 0 < far(*weights) < 1e-12


def test_only_weights_of_rank_4_are_converted(settings: Callable[..., Settings]) -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv3d(2, 3, 3), nn.BatchNorm2d(3))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    own = OwnModel.model_validate({"_target_": "my_net.Net", "input_size": 28})
    chosen = settings("speed.channels_last=true").model_copy(update={"model": own})
    speed.optimize(module, chosen, in_channels=2)
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert module[1].weight.is_contiguous()
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_relu_after_the_pooling_gives_the_same_values_and_gradients_to_the_bit() -> None:
    torch.manual_seed(0)
    before = NiN(image_size=67, dropout=0.0)
    after = NiN(image_size=67, dropout=0.0)
    after.load_state_dict(before.state_dict())
    speed.move_relu_after_pooling(after)
    assert sum(isinstance(layer[0], nn.MaxPool2d) for layer in after if isinstance(layer, nn.Sequential)) == 3
    assert list(after.state_dict()) == list(before.state_dict())
    images, gradients = torch.rand(2, 1, 67, 67), []
    for network in (before, after):
        logits = network(images)
        logits.square().sum().backward()
        gradients.append([logits, *(p.grad for p in network.parameters())])
    assert all(torch.equal(*both) for both in zip(*gradients, strict=True))


def test_dropout_draws_the_mask_of_the_full_batch() -> None:
    maps = torch.rand(10, 4, 3, 3)
    torch.manual_seed(0)
    full_batch = nn.functional.dropout(maps, 0.3)
    for layout in (torch.contiguous_format, torch.channels_last):
        dropout = speed.Dropout(0.3, (4, 3, 3))
        torch.manual_seed(0)
        dropout.begin(10, maps.device)
        micro_batches = [dropout(micro_batch) for micro_batch in maps.contiguous(memory_format=layout).split(4)]
        assert torch.equal(torch.cat(micro_batches), full_batch)
    assert dropout.eval()(maps) is maps


def test_all_masks_of_dropout_are_in_the_same_memory() -> None:
    """A CUDA graph has their address in it."""
    dropout, kept, addresses = speed.Dropout(0.3, (4, 3, 3)), [], []
    for images in (10, 10, 6, 10):  # the last batch of an epoch is smaller
        dropout.begin(images, torch.device("cpu"))
        assert dropout.mask is not None
        assert dropout.mask.unique().tolist() == pytest.approx([0, 1 / 0.7])
        addresses.append(dropout.mask.data_ptr())
        kept.append(dropout.mask.clone())
    assert len(set(addresses)) == 1
    assert not torch.equal(kept[0], kept[1])


def test_weights_keep_torchs_memory_format_on_apples_gpus(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for accelerator, kept in (("auto", True), ("mps", True), ("cpu", False)):
        network = Classifier(settings(f"trainer.accelerator={accelerator}"), "abcdefghij").network
        weights = [tensor for tensor in network.parameters() if tensor.dim() == 4 and tensor.shape[1] > 1]
        assert {tensor.is_contiguous() for tensor in weights if tensor.shape[2] > 1} == {kept}


@pytest.mark.parametrize("name", ["nin", "alexnet"])
def test_a_network_with_dropout_compiles_to_one_graph_with_the_same_masks(name: str, data_root: Path) -> None:
    module = Classifier(
        validate(compose_config([f"model={name}", "data=garments", "data.image_size=67"])), "abcdefghij"
    )
    graphs, images, logits = [], torch.rand(4, 1, 67, 67), []

    def counted(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for step in range(2):
        for compiled in (False, True):
            torch.manual_seed(step)
            for dropout in module.dropouts:
                dropout.begin(len(images), images.device)
            if compiled and not step:
                module.network.compile(backend=counted, dynamic=False)
            logits.append(module.network(images) if compiled else module.network.forward(images))
    assert len(graphs) == 1
    convolutions = [layer for layer in module.network.modules() if isinstance(layer, nn.Conv2d)]
    assert str(graphs[0].graph).count("torch.conv2d") == len(convolutions)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[2], logits[3])
    assert not torch.equal(logits[0], logits[2])


def test_batch_norm_prevents_micro_batches_and_large_maps_make_small_ones() -> None:
    def micro_batch_size(network: nn.Sequential, image_size: int) -> int | None:
        return speed.micro_batch_size(network, speed.output_shapes(network, 1, image_size))

    assert micro_batch_size(NiN(norm="batch"), 224) is None
    assert micro_batch_size(NiN(), 224) == 16  # 18 MiB / (4 bytes * 96 * 54 * 54)
    assert micro_batch_size(NiN(image_size=67), 67) == 218  # 18 MiB / (4 bytes * 96 * 15 * 15)


def test_output_shapes_leave_the_network_as_it_is() -> None:
    network = NiN(norm="batch", widths=[4, 8, 16], image_size=67)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = torch.get_rng_state()
    shapes = speed.output_shapes(network, in_channels=1, image_size=67)
    assert shapes == [
        (4, 15, 15), (4, 7, 7), (8, 7, 7), (8, 3, 3), (16, 3, 3), (16, 1, 1), (16, 1, 1), (10, 1, 1), (10, 1, 1), (10,),
    ]  # fmt: skip
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert network.training
    assert torch.equal(torch.get_rng_state(), state)


def test_every_dropout_is_replaced_with_masks_of_its_own_shape() -> None:
    network = NiN(head="mlp", head_width=8, dropout_between=True, widths=[4, 8, 16], image_size=67)
    replaced = speed.replace_dropout(network, speed.output_shapes(network, in_channels=1, image_size=67))
    assert [dropout.shape for dropout in replaced] == [(4, 7, 7), (8, 3, 3), (8,), (8,)]
    assert not any(type(layer) is nn.Dropout for layer in network)


@pytest.mark.filterwarnings("ignore:`torch.jit.script.* is deprecated")  # in torch 2.15; it still works
def test_a_network_with_relu_after_pooling_can_be_scripted() -> None:
    network, images = NiN(image_size=67, dropout=0.0).eval(), torch.rand(2, 1, 67, 67)
    speed.move_relu_after_pooling(network)
    assert torch.allclose(torch.jit.script(network)(images), network(images))


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_from_step_to_step(tmp_path: Path, data_root: Path) -> None:
    taken = []

    class Memory(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            lines = Path("/proc/self/status").read_text().splitlines()
            taken.append(int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024)

    common = ["data=garments", f"data.root={data_root}", "trainer=cpu", "trainer.max_steps=12", "callbacks=none"]
    small = ["trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
    settings = validate(compose_config([*common, *small]))  # 224x224, batches of 128
    run_experiment(settings, RunFolder(tmp_path), callbacks=[Memory()])
    assert len(taken) == 12
    assert max(taken[4:]) - max(taken[:4]) < 20, taken  # MiB; a batch's maps are 900
