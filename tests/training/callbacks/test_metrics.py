"""What is logged at which step, on runs of two epochs of six batches."""

import csv
import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import run_experiment
from nin.config.schema import Settings
from nin.runs.folder import RunFolder
from nin.system.processes import StoppedError
from nin.training.callbacks.dead_units import is_at_chance
from nin.training.callbacks.metrics import MetricsLogger


class Steps(Callback):
    """Records the learning rate and the gradient of every optimizer step."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])
        gradients = [p.grad.flatten() for p in pl_module.parameters()]
        self.norms.append(float(torch.cat(gradients).double().norm()))


def test_lr_and_gradient_norm_are_those_of_the_step(settings: Callable[..., Settings], tmp_path: Path) -> None:
    chosen = settings("schedule=one_cycle", "trainer.log_every_n_steps=1", "callbacks=none", "speed.micro_batch=12")
    run_experiment(chosen, folder := RunFolder(tmp_path), callbacks=[steps := Steps()])
    events = EventAccumulator(str(folder.path)).Reload()
    assert [e.step for e in events.Scalars("while_training/lr")] == list(range(1, 13))
    assert [e.value for e in events.Scalars("while_training/lr")] == pytest.approx(steps.rates)
    assert [e.value for e in events.Scalars("while_training/grad_norm")] == pytest.approx(steps.norms, rel=1e-5)
    assert len(set(steps.rates)) == 12
    rows = list(csv.DictReader(folder.metrics.read_text().splitlines()))
    assert [float(row["lr"]) for row in rows] == pytest.approx([steps.rates[5], steps.rates[11]])


def test_an_epoch_has_no_scores_of_earlier_weights(settings: Callable[..., Settings], tmp_path: Path) -> None:
    keys = ("trainer.max_epochs=2", "trainer.limit_train_batches=5", "trainer.val_check_interval=3", "callbacks=none")
    run_experiment(settings(*keys), folder := RunFolder(tmp_path))
    assert [sorted(row.keys() & {"step", "train/acc", "val/acc"}) for row in folder.read_epochs()] == [
        ["step", "train/acc"]
    ] * 2
    events = EventAccumulator(str(folder.path)).Reload()
    assert [event.step for event in events.Scalars("val/acc")] == [3, 8]


def test_the_gradient_norm_is_that_without_the_scale_of_float16() -> None:
    # GradScaler works on a GPU only; a fused optimizer is given scaled gradients, and others unscaled ones.
    plugin = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: 8.0))
    trainer = SimpleNamespace(global_step=0, loggers=[1], log_every_n_steps=1, precision_plugin=plugin)
    network = torch.nn.Linear(1, 2)
    network.weight.grad, network.bias.grad = torch.tensor([[3.0], [0.0]]), torch.tensor([4.0, 0.0])
    for fused, norm in ((True, 5 / 8), (False, 5.0)):
        metrics = MetricsLogger(Path())
        optimizer = torch.optim.AdamW(network.parameters(), fused=fused)
        metrics.on_before_optimizer_step(trainer, network, optimizer)
        assert (metrics.grad_norm[0], float(metrics.grad_norm[1])) == (1, norm)


def test_images_per_second_are_images_by_seconds(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The clock advances by 100 s in every training batch, so that everything else is less than a thousandth of it.
    passed, clock = itertools.count(step=100), time.perf_counter

    class Slow(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            now = next(passed) + 100
            monkeypatch.setattr(time, "perf_counter", lambda: clock() + now)

    result = run_experiment(settings("callbacks=none"), folder := RunFolder(tmp_path), callbacks=[Slow()])
    # 32 images in 100 s, with one decimal.
    for rate in (result["images_per_second"], *(row["images_per_second"] for row in folder.read_epochs())):
        assert rate == pytest.approx(0.3, abs=0.051)
    events = EventAccumulator(str(folder.path)).Reload()
    rates = [event.value for event in events.Scalars("while_training/images_per_second")]
    assert rates == pytest.approx([0.32] * 4, rel=0.05)


def test_the_rate_of_a_window_counts_the_time_in_which_a_gpu_computes_the_metrics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0

    class OnGpu(torch.Tensor):
        """Computed without waiting for it; reading it takes 5 s."""

        def __float__(self) -> float:
            nonlocal now
            now += 5.0
            return 0.5

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    metrics = MetricsLogger(Path())
    metrics.window_images, metrics.window_started = 100, 0.0
    metric = SimpleNamespace(compute=lambda: OnGpu())
    module = SimpleNamespace(train_loss=metric, train_acc=metric)
    read = metrics.read_window(SimpleNamespace(world_size=2), module)  # type: ignore[arg-type]
    assert read == {"train/loss": 0.5, "train/acc": 0.5, "images_per_second": 20.0}


class OwnScore(Callback):
    """Logs a metric of its own in every validation and in the test; stops the run in the second validation."""

    def __init__(self) -> None:
        self.validations = 0

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log("val/f1", 0.5)

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log("test/f1", 0.25)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        self.validations += batch_idx == 0
        if self.validations == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_metric_that_a_callback_logs_can_be_monitored_and_is_no_column_of_metrics_csv(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping = ["callbacks=early_stopping", "callbacks.early_stopping.monitor=val/f1", "trainer.max_epochs=4"]
    own = [f"+callbacks.own._target_={__name__}.OwnScore", "callbacks.early_stopping.patience=2", "logger=none"]
    chosen, folder = settings(*stopping, *own), RunFolder(tmp_path)
    with pytest.raises(StoppedError):
        run_experiment(chosen, folder)
    monkeypatch.setattr(OwnScore, "on_validation_batch_start", Callback.on_validation_batch_start)
    result = run_experiment(chosen, folder)
    assert result["epochs"] == 3  # the first, and two that are no better
    assert result["metrics"]["test/f1"] == 0.25
    assert [sorted(row) for row in folder.read_epochs()] == [sorted([*ROW, "val/loss", "val/acc"])] * 3


ROW = {
    "epoch": 1, "step": 6, "lr": 0.1, "train/loss": 2.3, "train/acc": 0.1, "images_per_second": 9.0, "seconds": 1.0,
}  # fmt: skip


def test_what_is_loaded_is_what_was_saved_and_nothing_else(tmp_path: Path) -> None:
    metrics = MetricsLogger(tmp_path / "metrics.csv")
    metrics.started = metrics.window_started = 0.0
    metrics.epoch, metrics.rows = {"images": 32, "seconds": 1.0, "loss": 70.0, "right": 3.0}, [ROW]
    state = metrics.state_dict()
    loaded = MetricsLogger(tmp_path / "metrics.csv")
    loaded.load_state_dict(state | {"metrics_csv": "/elsewhere.csv"})  # of a checkpoint from elsewhere
    assert (loaded.metrics_csv, loaded.epoch, loaded.rows) == (metrics.metrics_csv, metrics.epoch, metrics.rows)
    for name in state:
        with pytest.raises(KeyError, match=name):
            loaded.load_state_dict({key: value for key, value in state.items() if key != name})


def test_the_time_of_a_validation_in_which_a_run_is_stopped_is_none_of_the_training(tmp_path: Path) -> None:
    metrics = MetricsLogger(tmp_path / "metrics.csv")
    metrics.started = metrics.window_started = 0.0
    before = metrics.state_dict()["window_seconds"]
    metrics.validation_started = 7.0
    assert metrics.state_dict()["window_seconds"] == 7.0
    metrics.validation_started = None
    assert metrics.state_dict()["window_seconds"] >= before


@pytest.mark.parametrize(
    ("loss", "acc", "classes", "chance"),
    [
        (2.2566, 0.1, 10, True),  # 0.98 ln 10 = 2.25653
        (2.2565, 0.1, 10, False),
        (2.3, 0.151, 10, False),  # 1.5 / 10
        (2.3, 0.01, 100, False),
        (4.6, 0.014, 100, True),
        (4.6, 0.016, 100, False),
    ],
)
def test_chance_depends_on_the_number_of_classes(loss: float, acc: float, classes: int, chance: bool) -> None:
    assert is_at_chance({"train/loss": loss, "train/acc": acc}, classes) is chance


def test_the_time_of_lightnings_sanity_check_is_none_of_the_training(tmp_path: Path) -> None:
    metrics, trainer = MetricsLogger(tmp_path / "metrics.csv"), SimpleNamespace(sanity_checking=True)
    metrics.on_validation_start(trainer, None)  # type: ignore[arg-type]
    metrics.on_validation_end(trainer, None)  # type: ignore[arg-type]
    metrics.started = metrics.window_started = time.perf_counter()
    assert metrics.state_dict()["window_seconds"] > 0
