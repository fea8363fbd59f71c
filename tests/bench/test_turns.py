import contextlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric

from nin import cli
from nin.bench import notebook, turns
from nin.bench.notebook import NotebookLoop
from nin.bench.project import synchronize
from nin.bench.turns import count_operations
from nin.config.composition import compose_settings
from nin.config.hydra_options import open_hydra
from nin.data.module import ImageDataModule
from nin.networks.build import build_network
from nin.networks.layers import describe_layers
from pictures import folder_data, write_folder


def test_the_rate_of_training_is_images_by_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, begun = 0.0, list[tuple[Any, ...]]()
    monkeypatch.setattr(turns, "time", SimpleNamespace(perf_counter=lambda: now))
    measured = turns.Turns(
        {"other": lambda: 7.0}, seconds=40, rounds=2, progress=lambda *reported: begun.append(reported)
    )
    trainer, module = SimpleNamespace(should_stop=False), SimpleNamespace(device=torch.device("cpu"))
    while not trainer.should_stop:
        now += 10
        measured.on_train_batch_end(trainer, module, None, (None, torch.zeros(32)), 0)
    assert measured.steps == 4  # 40 s of 10 s each
    assert measured.rates == {"training": [3.2, 3.2], "other": [7.0, 7.0]}
    assert begun == [
        ("round 1 of 2", "other", 1, 4), ("round 2 of 2", "training", 2, 4), ("round 2 of 2", "other", 3, 4),
    ]  # fmt: skip


def test_the_steps_that_record_cuda_graphs_do_not_set_the_length_of_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(turns, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(turns, "synchronize", lambda _: None)
    measured = turns.Turns({}, seconds=40, rounds=2, progress=lambda *_: None)
    trainer, module = SimpleNamespace(should_stop=False), SimpleNamespace(device=torch.device("cuda"))
    for step in range(1000):
        now += 10 if step > 2 else 600
        measured.on_train_batch_end(trainer, module, None, (None, torch.zeros(32)), 0)
        if trainer.should_stop:
            break
    assert measured.steps == 4
    assert measured.rates == {"training": [3.2, 3.2]}


@pytest.mark.parametrize(("device", "waits"), [("cpu", False), ("cuda", True), ("mps", True)])
def test_a_clock_is_read_when_the_gpu_has_finished(device: str, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = list[torch.device]()
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    synchronize(torch.device(device))
    assert waited == [torch.device(device)] * waits


def test_batches_that_are_read_from_disk_are_moved_to_the_device(tmp_path: Path) -> None:
    data = ImageDataModule(folder_data(write_folder(tmp_path / "root", {"train": 4}), memory_limit_mib=0))
    data.setup("fit")
    seen: list[str] = []
    module: Any = SimpleNamespace(
        device=torch.device("meta"), modules=list, eval=lambda: None,
        validation_step=lambda batch, _: seen.extend(tensor.device.type for tensor in batch),
        eval_loss=MeanMetric(), eval_acc=MeanMetric(),
    )  # fmt: skip
    trainer: Any = SimpleNamespace(precision_plugin=SimpleNamespace(val_step_context=contextlib.nullcontext))
    turns._scoring_rate(data, module, trainer, 0.01)
    assert set(seen) == {"meta"}
    prepare = data.on_after_batch_transfer
    data.on_after_batch_transfer = lambda batch, i: (seen.append(batch[0].device.type), prepare(batch, i))[1]  # type: ignore[method-assign]
    seen.clear()
    turns._data_rate(data, module, 0)
    assert seen == ["meta"]


def test_the_notebooks_loop_starts_a_worker_for_each_core_that_this_process_may_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    train = torch.zeros(2, 28, 28, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    loop = NotebookLoop(nn.Linear(1, 1), train, 28, 1, torch.device("meta"), 1)
    assert loop.loader.num_workers == 3


@pytest.mark.filterwarnings("ignore:Please use the new API settings to control TF32:UserWarning")  # in torch 2.9
def test_the_limit_in_float32_is_that_of_tf32_on_gpus_as_in_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.backends.cudnn.allow_tf32  # torch's default
    matmul = torch.backends.cuda.matmul
    before, during = matmul.fp32_precision, []
    monkeypatch.setattr(turns, "synchronize", lambda _: during.append(matmul.fp32_precision))
    rand, sizes = torch.rand, []

    def small(*size: int, **options: Any) -> torch.Tensor:
        sizes.append(size)
        return rand(8, 8, **options)

    monkeypatch.setattr(torch, "rand", small)
    assert turns.measure_matrix_product(torch.device("cpu"), torch.float32, 0.01) > 0
    assert sizes == [(size, size) for size in (1024, 2048, 4096) for _ in range(2)]
    assert set(during) == {"tf32"}
    assert matmul.fp32_precision == before


def test_the_limit_is_that_of_the_sizes_which_the_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 2048

    def rate(size: int, *_: Any) -> float:
        if size > largest:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return float(size)

    monkeypatch.setattr(turns, "_product_rate", rate)
    arguments = torch.device("cpu"), torch.float32, 0.01
    assert turns.measure_matrix_product(*arguments) == 2048
    largest = 512
    with pytest.raises(torch.OutOfMemoryError):
        turns.measure_matrix_product(*arguments)


@pytest.mark.parametrize(("free_mb", "workers"), [(64, 0), (200, 2), (10_000, 8)])
def test_the_notebooks_loop_on_a_gpu_has_workers_as_shared_memory_allows(
    free_mb: int, workers: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(notebook.shutil, "disk_usage", lambda _: SimpleNamespace(free=free_mb * 10**6))
    train = torch.zeros(2, 28, 28, dtype=torch.uint8), torch.zeros(2, dtype=torch.long)
    loops = [NotebookLoop(nn.Linear(1, 1), train, 224, 128, torch.device(name), 1) for name in ("meta", "cpu")]
    assert [loop.loader.num_workers for loop in loops] == [workers, 0]
    assert caplog.text.count(f"/dev/shm has room for {workers} of 8 workers") == (workers < 8)


@pytest.mark.parametrize("overrides", [[], ["model=nin_small"], ["model=lenet"]], ids=["nin", "nin_small", "lenet"])
def test_operations_are_two_per_multiply_add(overrides: list[str]) -> None:
    settings = compose_settings(overrides)
    with torch.device("meta"):
        network = build_network(settings, in_channels=1, num_classes=10)
    rows = describe_layers(network, in_channels=1, image_size=settings.data.image_size)
    forward = 2 * sum(row.multiply_adds for row in rows)
    # The backward pass computes the gradients of weights and of inputs, but not of the images.
    first = next(m for m in network.modules() if isinstance(m, torch.nn.Conv2d))
    height, width = rows[0].output_shape[1:]
    images = 2 * height * width * first.weight.numel()
    assert count_operations(settings) == {"scoring": forward, "training": 3 * forward - images}


class Deep(nn.Module):
    """Reads values of tensors when it is constructed, as networks with stochastic depth do."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        rates = [float(rate) for rate in torch.linspace(0, 0.1, 2)]
        self.layers = nn.Sequential(nn.Flatten(), *map(nn.Dropout, rates), nn.Linear(784, num_classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


def test_operations_of_a_network_that_needs_values_of_tensors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "deep.yaml").write_text(f"_target_: {__name__}.Deep\ninput_size: 28\n")
    with open_hydra(str(tmp_path)):
        counted = count_operations(compose_settings(["model=deep"]))
    assert counted == {"scoring": 2 * 7840, "training": 4 * 7840}
    assert cli.run("inspect", ["--config-dir", str(tmp_path), "model=deep"]) == 0
    assert "7,850" in capsys.readouterr().out


class Depthwise(nn.Sequential):
    """A convolution to 8 channels, and one of each of them alone."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(
            nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Flatten(), nn.Linear(8 * 784, num_classes)
        )


def test_operations_of_the_gradients_of_grouped_convolutions(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "depthwise.yaml").write_text(f"_target_: {__name__}.Depthwise\ninput_size: 28\n")
    with open_hydra(str(tmp_path)):
        counted = count_operations(compose_settings(["model=depthwise"]))
    first, grouped, connected = 784 * 8, 784 * 8 * 9, 8 * 784 * 10
    # The images need no gradients.
    backward = first + 2 * (grouped + connected)
    assert counted == {
        "scoring": 2 * (first + grouped + connected), "training": 2 * (first + grouped + connected + backward),
    }  # fmt: skip


def test_operations_of_the_notebooks_network() -> None:
    counted = count_operations(compose_settings([]))
    assert counted == {"scoring": 1_524_594_704, "training": 4_506_039_600}
    flipped = count_operations(compose_settings(["data.test_time_flip=true"]))
    assert flipped == {"scoring": 2 * counted["scoring"], "training": counted["training"]}
