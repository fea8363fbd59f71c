"""What runs on a GPU in a training step and in validation, with fake CUDA tensors: no GPU and no driver is needed.

A fake tensor has a shape, a type and a device, and no values. An operation on tensors of two devices fails, and so
does everything that reads a value back, for which the CPU would wait in every step. Copies between devices are refused
too. The backward pass and the optimizer need a driver: `tests/test_gpu.py`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import SMALL, merge
from nin.config.composition import compose_config
from nin.config.validation import validate
from nin.data import module as data_module
from nin.data.module import ImageDataModule
from nin.networks.normalize import Normalize
from nin.training.classifier import Classifier
from nin.training.trainer import build_trainer

pytestmark = pytest.mark.skipif(
    torch.__version__ < (2, 10), reason="torch 2.9 needs a driver where a fake CUDA tensor is indexed, as in x[:1]"
)
CUDA = torch.device("cuda", 0)
CLASSES = tuple("abcdefghij")
GPU_SETTINGS = ("data.augment=flip_shift", "data.normalize=true", "data.test_time_flip=true", "data.image_size=40",
                "callbacks=none", "logger=none")  # fmt: skip


class CopiedError(Exception):
    pass


class NoCopies(TorchDispatchMode):
    """Refuses copies between CUDA and the CPU, in both directions: for either, the CPU waits for the GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # `_to_copy` makes a new tensor, `copy_` fills its first argument.
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = [value for value in args if isinstance(value, Tensor)][-1]
            if source.device.type != out.device.type:
                raise CopiedError(f"{func} from {source.device} to {out.device}")
        return out


@pytest.fixture
def step(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs two training steps and a validation, the second of each with fewer images, on fake CUDA tensors."""

    def load(data: Any, part: str) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((90, 28, 28), np.uint8), np.zeros(90, np.int64)

    def run(*overrides: str, prepare: Callable[[Classifier], None] = lambda _: None) -> dict[str, Any]:
        monkeypatch.setattr(data_module, "load", load)
        words = [*GPU_SETTINGS, "trainer.limit_train_batches=1.0", "data.val_size=45", *overrides]
        small = [word for word in SMALL if not (any("model=" in w for w in overrides) and word.startswith("model."))]
        chosen = validate(compose_config(merge([*small, f"data.root={data_root}", *words])))
        trainer = build_trainer(chosen, None, [])
        trainer.strategy._root_device = CUDA
        trainer.strategy.precision_plugin = MixedPrecision("bf16-mixed", "cuda")
        module = Classifier(chosen, CLASSES)
        # A tensor of the module that is not fake would be taken for one on its real device, the CPU.
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            torch.empty(0, device=CUDA)  # for the first such tensor, torch 2.10 starts CUDA if it is available
            # Without a driver autocast would turn itself off. The mode itself needs to know that there is none.
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
            module._apply(lambda t: (t if isinstance(t, FakeTensor) else mode.from_tensor(t)).to(CUDA))
            module._device = CUDA
            prepare(module)
            data = ImageDataModule(chosen.data, chosen.seed, is_prepared=True)
            data.trainer = module.trainer = trainer
            data.setup("fit")
            return train_and_validate(trainer, module, data)

    return run


def train_and_validate(trainer: Any, module: Classifier, data: ImageDataModule) -> dict[str, Any]:
    """In the order in which Lightning calls them; returns the tensors of the last steps."""
    seen: dict[str, Any] = {}
    module.network.register_forward_hook(lambda _, images, logits: seen.update(images=images[0], logits=logits))
    trainer.state.stage = RunningStage.TRAINING
    sizes = []
    for batch in data.train_dataloader():
        assert {part.device for part in batch} == {CUDA}  # no batch is copied to the GPU
        sizes.append(len(batch[1]))
        with NoCopies(), trainer.precision_plugin.train_step_context():
            prepared = data.on_after_batch_transfer(batch, 0)
            seen["loss"] = module.training_step(prepared, 0)
    seen["train/loss"], seen["train/acc"] = module.train_loss.compute(), module.train_acc.compute()
    trainer.state.stage = RunningStage.VALIDATING
    module.eval()
    with torch.no_grad(), trainer.precision_plugin.val_step_context():
        for batch in data.val_dataloader():
            sizes.append(len(batch[1]))
            with NoCopies():
                prepared = data.on_after_batch_transfer(batch, 0)
                module.validation_step(prepared, 0)
                seen["probabilities"] = module.predict_step(prepared, 0)
    assert sizes == [32, 13, 32, 13]
    return seen | module._compute_eval_metrics("val")


def test_a_step_and_a_validation_stay_on_the_gpu(step: Callable[..., dict[str, Any]]) -> None:
    seen = step()
    assert {name: value.device for name, value in seen.items()} == dict.fromkeys(seen, CUDA)
    assert seen["images"].shape == (32, 1, 40, 40)
    assert (seen["images"].dtype, seen["logits"].dtype) == (torch.float32, torch.bfloat16)  # under autocast
    assert {seen[name].dtype for name in ("loss", "train/loss", "val/loss", "probabilities")} == {torch.float32}


@pytest.mark.parametrize(
    "overrides",
    ["model=nin data.image_size=67", "model=lenet", "data.augment=none data.normalize=false data.image_size=28"],
)
def test_other_networks_and_settings_stay_on_the_gpu(step: Callable[..., dict[str, Any]], overrides: str) -> None:
    words = overrides.split()
    assert step(*words)["loss"].device == CUDA


# Each stage: the object and the name of the function whose result is spoiled.
STAGES: dict[str, tuple[Any, str]] = {
    "data in memory": (ImageDataModule, "_load"),
    "augmentation": (data_module, "augment"),
    "resizing": (data_module, "resize"),
    "normalization": (Normalize, "forward"),
    "forward pass": (nn.Conv2d, "forward"),
    "dropout": (functional, "dropout"),
    "loss": (functional, "cross_entropy"),
    "validation": (Classifier, "predict_logits"),
    "prediction": (Classifier, "_predict_in_micro_batches"),
}


def spoil(
    stage: str, monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]
) -> Callable[[Classifier], None]:
    """For ``prepare``: the network is built before anything is spoiled."""
    owner, name = STAGES[stage]
    original = getattr(owner, name)

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        return tuple(map(change, result)) if isinstance(result, tuple) else change(result)

    return lambda _: monkeypatch.setattr(owner, name, spoiled)


@pytest.mark.parametrize("stage", STAGES)
def test_a_tensor_that_is_made_on_the_cpu_is_found(
    stage: str, step: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not copied there: it has the right shape and type on the wrong device.
    prepare = spoil(stage, monkeypatch, lambda tensor: torch.empty_like(tensor, device="cpu"))
    # torch takes one number on the CPU in operations on CUDA tensors. A loss there is read in every step.
    with pytest.raises((RuntimeError, AssertionError), match=r"device|cuda|_local_scalar_dense"):
        assert step(prepare=prepare)["loss"].device == CUDA


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "data in memory"])  # before the first step
def test_a_tensor_that_is_moved_to_the_cpu_is_found(
    stage: str, step: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = spoil(stage, monkeypatch, lambda tensor: tensor.cpu())
    with pytest.raises(CopiedError):
        step(prepare=prepare)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "data in memory"])
def test_a_value_that_is_read_back_is_found(
    stage: str, step: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(tensor: Tensor) -> Tensor:
        tensor.flatten()[0].item()
        return tensor

    prepare = spoil(stage, monkeypatch, read)
    with pytest.raises(DataDependentOutputException):
        step(prepare=prepare)


@pytest.mark.parametrize("metric", ["train_loss", "train_acc", "eval_acc"])
@pytest.mark.parametrize("change", [lambda value: value.cpu(), lambda value: value.sum().item() + value])
def test_metrics_that_read_values_are_found(
    metric: str, change: Callable[[Tensor], Tensor], step: Callable[..., dict[str, Any]]
) -> None:
    def prepare(module: Classifier) -> None:
        used = getattr(module, metric)
        update = used.update
        used.update = lambda value, *rest: update(change(value), *rest)

    with pytest.raises((CopiedError, DataDependentOutputException)):
        step(prepare=prepare)


def test_a_layer_that_was_left_on_the_cpu_is_found(step: Callable[..., dict[str, Any]]) -> None:
    def prepare(module: Classifier) -> None:
        last = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)][-1]
        last.weight = nn.Parameter(torch.empty_like(last.weight, device="cpu"))

    with pytest.raises(RuntimeError, match="device"):
        step(prepare=prepare)
