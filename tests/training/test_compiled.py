"""The network as it is compiled on a GPU, traced without a GPU: one graph, and no second trace.

The backend "eager" runs the traced graph as it is. On a GPU the same graph becomes CUDA graphs.
"""

import importlib.util
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch._dynamo.utils import counters

from helpers import SMALL, merge, run_experiment
from nin.config.composition import compose_config
from nin.config.schema import Settings
from nin.config.validation import validate
from nin.runs.folder import RunFolder
from nin.system import devices
from nin.training.classifier import Classifier

# As on a GPU, but for its device: full batches, bfloat16 under autocast. 110 images: batches of 32, 32, 32 and 14.
GPU_SETTINGS = (
    "compile=true", "speed.micro_batch=null", "trainer.precision=bf16-mixed", "data.val_size=9890", "data.augment=flip",
    "trainer.limit_train_batches=1.0", "trainer.log_every_n_steps=2",
)  # fmt: skip
# They also run the network, with hooks and in eval mode, in the middle of an epoch.
CALLBACKS = ("callbacks.dead_units.images=32", "callbacks.images.wrong_images=1", "callbacks.images.sample_images=1")


class StoppedHereError(Exception):
    pass


class StopAt(Callback):
    """Ends the run without a word after a number of batches, as a kill does."""

    def __init__(self, batches: int):
        self.batches = batches

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.batches -= 1
        if not self.batches:
            raise StoppedHereError


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Compiles with the backend "eager"; the arguments of every call of `compile`."""
    calls: list[dict[str, Any]] = []
    original = torch.nn.Module.compile

    def traced_only(module: torch.nn.Module, **arguments: Any) -> None:
        calls.append(arguments)
        original(module, backend="eager", fullgraph=True, dynamic=arguments["dynamic"])

    monkeypatch.setattr(torch.nn.Module, "compile", traced_only)
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield calls
    torch._dynamo.reset()


def compose(data_root: Path, *overrides: str) -> Settings:
    small = [word for word in SMALL if not ("model=nin" in overrides and word.startswith("model."))]
    return validate(compose_config(merge([*small, f"data.root={data_root}", *GPU_SETTINGS, *overrides])))


def require_one_graph() -> None:
    assert counters["stats"]["unique_graphs"] == 1
    assert dict(counters["graph_break"]) == {}


def test_one_graph_for_all_steps_of_two_epochs_and_after_resuming(
    data_root: Path, tmp_path: Path, traced: list[dict[str, Any]]
) -> None:
    chosen = compose(data_root, "checkpoint.every_n_steps=1", "data.normalize=true", *CALLBACKS)
    uninterrupted = run_experiment(chosen, RunFolder(tmp_path / "uninterrupted"))
    require_one_graph()

    folder = RunFolder(tmp_path / "resumed")
    for batches in (2, 4):  # in the first epoch, and in its last, smaller batch
        with pytest.raises(StoppedHereError):
            run_experiment(chosen, folder, callbacks=[StopAt(batches)])
        torch._dynamo.reset()  # a resumed run is another process
        counters.clear()
    resumed = run_experiment(chosen, folder)
    require_one_graph()
    assert resumed["weights_sha256"] == uninterrupted["weights_sha256"]
    assert {call["dynamic"] for call in traced} == {False}


def test_the_notebooks_network_is_one_graph(data_root: Path, tmp_path: Path, traced: list[dict[str, Any]]) -> None:
    small = ("model=nin", "model.dropout=0.5", "data.image_size=67", "data.batch_size=4", "data.val_size=9990")
    run_experiment(compose(data_root, *small, "trainer.max_epochs=1", "logger=none", *CALLBACKS), RunFolder(tmp_path))
    require_one_graph()


def test_a_run_is_compiled_however_many_were_before_it_in_this_process(
    data_root: Path, tmp_path: Path, traced: list[dict[str, Any]]
) -> None:
    # The fixture makes a second trace of the same code an error, as torch leaves it out from the ninth on.
    for width in (8, 12):
        chosen = compose(data_root, f"model.widths=[8,{width}]", "trainer.max_steps=2", "logger=none", "callbacks=none")
        run_experiment(chosen, RunFolder(tmp_path / f"{width}"))
    assert counters["stats"]["unique_graphs"] == 2


def test_a_gpu_compiles_by_default_and_cuda_graphs_accumulate_no_gradients(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    default, off = (Classifier(settings("model=nin_small", *words), ["a", "b"]) for words in ([], ["compile=false"]))
    modes = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda _, mode, dynamic: modes.append(mode))
    monkeypatch.setattr(Classifier, "device", torch.device("cuda"))
    monkeypatch.setattr(devices, "missing_for_compile", lambda _: None)
    later = GradientAccumulationScheduler({3: 2})
    for batches, callbacks in ((1, []), (2, []), (1, [later])):
        trainer = SimpleNamespace(accumulate_grad_batches=batches, callbacks=callbacks)
        monkeypatch.setattr(Classifier, "trainer", trainer)
        default.on_train_start()
        off.on_train_start()
    assert modes == ["reduce-overhead", "default", "default"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="torch comes without Triton on this platform")
def test_without_what_triton_needs_a_gpu_trains_without_compilation(
    settings: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # A machine that has the rest, as this one may not.
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_paths", lambda *_: {"include": str(tmp_path)})
    monkeypatch.setenv("CC", "gcc")
    compiled: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, mode, **__: compiled.append(mode))
    monkeypatch.setattr(Classifier, "device", torch.device("cuda"))
    trainer = SimpleNamespace(accumulate_grad_batches=1, callbacks=[], is_global_zero=True)
    monkeypatch.setattr(Classifier, "trainer", trainer)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    Classifier(settings(), ["a", "b"]).on_train_start()
    monkeypatch.setattr(sysconfig, "get_paths", lambda *_: {"include": "/nowhere"})
    Classifier(settings(), ["a", "b"]).on_train_start()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    Classifier(settings(), ["a", "b"]).on_train_start()
    assert [record.args[0].split(":")[0] for record in caplog.records if isinstance(record.args, tuple)] == [
        "the GPU has compute capability 6.1, and Triton needs 7.0", "/nowhere has no Python.h",
        "there is no C compiler",
    ]  # fmt: skip
    assert compiled == []
    Classifier(settings("compile=true"), ["a", "b"]).on_train_start()  # what is requested fails with torch's message
    assert compiled == ["reduce-overhead"]


@pytest.mark.parametrize("broken", ["graph", "shape"])
def test_a_network_that_is_traced_again_is_found(
    broken: str, data_root: Path, tmp_path: Path, traced: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nin.networks.speed import Dropout

    forward: Callable[..., torch.Tensor] = Dropout.forward

    def breaks(self: Dropout, images: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return forward(self, images)

    def counts(self: Dropout, images: torch.Tensor) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return forward(self, images) * self.calls

    monkeypatch.setattr(Dropout, "forward", breaks if broken == "graph" else counts)
    with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.RecompileError)):
        run_experiment(compose(data_root, "callbacks=none", "logger=none"), RunFolder(tmp_path))
