import io
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import LambdaCallback
from rich.console import Console

from helpers import run_experiment
from nin.config.schema import Settings
from nin.runs.folder import RunFolder
from nin.system.processes import StoppedError
from nin.training.callbacks import progress
from nin.training.callbacks.progress import TrainingProgressBar
from nin.training.experiment import Experiment
from nin.training.request import RunRequest


def test_a_terminal_has_a_bar_with_loss_accuracy_speed_and_time_left(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=140)
    monkeypatch.setattr(progress, "Console", lambda: console)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run_experiment(settings("logger=none", "callbacks=none"), RunFolder(tmp_path))
    shown = screen.getvalue()
    for words in ("epoch 2/2", "loss ", "acc ", "val 0.", "images/s", "0:00:0", "testing"):
        assert words in shown


def test_the_bar_of_a_run_that_is_resumed_within_an_epoch_ends_complete(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "Console", lambda: Console(file=io.StringIO(), force_terminal=True))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    request = RunRequest(settings("logger=none", "callbacks=none"), RunFolder(tmp_path))
    request.folder.checkpoints.mkdir()
    stopped = Experiment(request)
    stop = LambdaCallback(on_train_batch_end=lambda *_: setattr(request.stop, "signum", signal.SIGTERM))
    stopped.trainer.callbacks.append(stop)  # type: ignore[attr-defined]  # set by Lightning, missing in its types
    with pytest.raises(StoppedError):
        stopped.run()

    resumed, shown = Experiment(RunRequest(request.settings, request.folder)), []
    (bar,) = (c for c in resumed.trainer.callbacks if isinstance(c, TrainingProgressBar))  # type: ignore[attr-defined]
    record = LambdaCallback(on_train_end=lambda *_: shown.extend((t.completed, t.total) for t in bar.progress.tasks))
    resumed.trainer.callbacks.append(record)  # type: ignore[attr-defined]
    resumed.run()
    assert shown == [(12, 12)]


@pytest.mark.parametrize(("is_global_zero", "lines"), [(True, ["epoch 1/2", ""]), (False, [])])
def test_the_first_process_alone_draws_a_bar_and_ends_it_once(
    is_global_zero: bool, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    # A terminal without a cursor, where the bar is printed when it is stopped.
    console = Console(file=screen, force_terminal=True, _environ={"TERM": "dumb"})
    monkeypatch.setattr(progress, "Console", lambda: console)
    monkeypatch.setattr(progress, "count_progress", lambda trainer: (12, 0))
    trainer = SimpleNamespace(
        is_global_zero=is_global_zero,
        num_training_batches=6,
        num_val_batches=[1],
        num_test_batches=[1],
        current_epoch=0,
    )
    bar = TrainingProgressBar()
    bar.on_exception(trainer, None, ValueError())  # before its setup
    bar.setup(trainer, None, "fit")
    bar.on_train_start(trainer, None)
    bar.on_train_batch_end(trainer, None)
    bar.on_validation_start(trainer, None)
    bar.on_validation_batch_end(trainer, None)
    bar.on_validation_end(trainer, None)
    bar.on_train_epoch_end(trainer, None)
    bar.teardown(trainer, None, "fit")
    bar.on_exception(trainer, None, ValueError())  # in the teardown of another callback
    assert [line[:9] for line in screen.getvalue().splitlines()] == lines


def test_elsewhere_it_is_one_line_an_epoch_and_none_if_not_wanted(
    settings: Callable[..., Settings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_experiment(settings("logger=none", "callbacks=none"), RunFolder(tmp_path / "a"))
    lines = capsys.readouterr().out.splitlines()
    assert [line[:9] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    quiet = settings("logger=none", "callbacks=none", "trainer.enable_progress_bar=false")
    run_experiment(quiet, RunFolder(tmp_path / "b"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("batches", "device", "data", "size", "message"),
    [
        (1002, "cpu", "mnist", 224, "experiment=cpu trains a small network on the same images at their own size, "),
        (1002, "cpu", "mnist", 28, "experiment=cpu trains a small network on the same images in minutes"),
        (1002, "cpu", "folder", 224, "a smaller data.image_size "),
        (1002, "cuda", "mnist", 224, None),
        (102, "cpu", "mnist", 224, None),  # 50 minutes
    ],
)
def test_a_long_run_on_a_cpu_is_estimated_once(
    batches: int,
    device: str,
    data: str,
    size: int,
    message: str | None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = iter((0, 30, 60, 90))  # after the first batch, the second, …
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(seconds), process_time=lambda: 0))
    monkeypatch.setattr(progress, "cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr(progress, "count_progress", lambda trainer: (batches, 2))
    trainer = SimpleNamespace(is_global_zero=True, precision="32-true")
    settings = SimpleNamespace(data=SimpleNamespace(name=data, image_size=size))
    module = SimpleNamespace(device=SimpleNamespace(type=device), settings=settings)
    warner = progress.SlowTrainingWarner(sample_seconds=60)
    for _ in range(4):
        warner.on_train_batch_end(trainer, module)
    start = f"about 8.3 hours of training left on this CPU. {message}"  # of 30 s for each batch
    assert [text.startswith(start) and "trainer.precision=auto" in text for text in caplog.messages] == (
        [True] if message else []
    )


@pytest.mark.parametrize(
    ("cpu_seconds", "threads", "policy", "warning"),
    [
        (25.2, 2, None, "training gets 1.3 CPU cores for its 2 threads, "),  # of 20 s
        (33, 2, None, None),
        (25.2, 2, "PASSIVE", None),  # threads that sleep while they wait
        (12, 1, None, None),
        (44, 4, None, "training gets 2.2 CPU cores for its 4 threads, "),
    ],
)
def test_too_few_cores_for_the_threads_are_reported_once(
    cpu_seconds: float,
    threads: int,
    policy: str | None,
    warning: str | None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds, cpu = iter((100, 110, 120)), iter((7, 7 + cpu_seconds))
    clocks = SimpleNamespace(monotonic=lambda: next(seconds), process_time=lambda: next(cpu))
    monkeypatch.setattr(progress, "time", clocks)
    monkeypatch.setattr(progress.torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(progress, "count_progress", lambda trainer: (10, 2))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    warner = progress.SlowTrainingWarner(sample_seconds=20)
    for _ in range(5):
        warner.on_train_batch_end(
            SimpleNamespace(is_global_zero=True), SimpleNamespace(device=SimpleNamespace(type="cpu"))
        )
    assert [text[: len(warning or "")] for text in caplog.messages] == ([warning] if warning else [])
    assert all(f" threads={int(cpu_seconds / 20)}: " in text for text in caplog.messages)


def test_what_is_not_known_yet_is_not_shown() -> None:
    # Validation may come before the first logging.
    assert progress._format({}) == ""
    assert progress._format({"val/acc": 0.5}) == "val 0.5000"
    assert progress._format({"val/acc": 0.5, "images_per_second": 1200.4}) == "val 0.5000  1,200 images/s"
