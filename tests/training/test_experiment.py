"""Whole runs on the garments, in this process: what they leave behind, and that it is true."""

import csv
import json
import re
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import RunningStage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional

from helpers import SMALL, outcome, run_experiment
from nin.checkpoints import files as checkpoint_files
from nin.checkpoints.weights import hash_weights
from nin.commands.eval import find_checkpoint
from nin.config.composition import compose_config
from nin.config.schema import Data, Settings, UserError
from nin.config.validation import validate
from nin.data import module as data_module
from nin.data import splits
from nin.data.module import split
from nin.data.sources import load
from nin.data.transforms import resize
from nin.deploy.pipeline import read_checkpoint
from nin.runs.console import silence_known_warnings
from nin.runs.folder import RunFolder
from nin.training import experiment
from nin.training.callbacks.metrics import MetricsLogger
from nin.training.callbacks.progress import EpochPrinter
from nin.training.classifier import Classifier
from nin.training.evaluation import evaluate_weights
from nin.training.loss import NonFiniteLossError, require_finite
from nin.training.request import RunRequest
from nin.training.run import execute_run
from nin.training.trainer import build_trainer
from pictures import folder_data, write_folder

CLASSES = tuple("abcdefghij")


@pytest.fixture(scope="module")
def run(
    settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunFolder, dict[str, Any]]:
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    folder.update_state(run_id="a" * 32)
    return folder, run_experiment(settings("callbacks=default"), folder, ["a=1"])


def test_the_result_is_complete(run: tuple[RunFolder, dict[str, Any]]) -> None:
    _, result = run
    assert json.loads(json.dumps(result)) == result
    assert (result["status"], result["epochs"], result["steps"], result["seed"]) == ("finished", 2, 12, 0)
    assert "stopped_by" not in result
    assert set(result["metrics"]) == {"val/loss", "val/acc", "test/loss", "test/acc", "test/acc_by_class"}
    assert len(result["metrics"]["test/acc_by_class"]) == 10
    assert result["overrides"] == ["a=1"]
    # Convolutions and batch norms of the three blocks.
    assert result["parameters"] == (200 + 48) + (1664 + 96) + (2720 + 84)
    assert result["images_per_second"] > 0
    assert result["train_seconds"] > 0
    assert re.fullmatch(r"cpu \(.+, [A-Z0-9]+, \d+ threads?\)", result["device"])
    assert result["precision"] == "32-true"


def test_the_same_settings_give_the_same_numbers_and_another_seed_does_not(
    run: tuple[RunFolder, dict[str, Any]], settings: Callable[..., Settings], tmp_path: Path
) -> None:
    _, result = run
    torch.manual_seed(123)
    again = run_experiment(settings("logger=none", "callbacks=none"), RunFolder(tmp_path / "again"))
    assert outcome(again) == outcome(result)
    other = run_experiment(settings("seed=1", "logger=none", "callbacks=none"), RunFolder(tmp_path / "other"))
    assert other["weights_sha256"] != result["weights_sha256"]


def test_checkpoints_are_data_and_hold_what_was_trained(run: tuple[RunFolder, dict[str, Any]]) -> None:
    folder, result = run
    last, best = (checkpoint_files.read(path) for path in (folder.last, folder.best))
    module = Classifier(checkpoint_files.read_checkpoint_settings(last, folder.last), CLASSES)
    module.load_state_dict(last["state_dict"])
    assert hash_weights(module.network) == result["weights_sha256"]
    (scores,) = (state["best"] for state in best["callbacks"].values() if "best" in state)
    assert scores["val/acc"] == result["metrics"]["val/acc"]
    assert last["callbacks"][checkpoint_files.CALLBACK_STATE_KEY]["run_id"] == "a" * 32


def test_eval_repeats_the_results_test_numbers(run: tuple[RunFolder, dict[str, Any]]) -> None:
    folder, result = run
    for path in (folder.path, folder.best):
        checkpoint = checkpoint_files.read(find_checkpoint(path))
        metrics, confusion = evaluate_weights(checkpoint_files.read_checkpoint_settings(checkpoint, path), checkpoint)
        assert metrics == {k: v for k, v in result["metrics"].items() if k.startswith("test/")}
        assert confusion.sum() == 64
    checkpoint["state_dict"]["network.0.0.weight"][0] = torch.nan
    with pytest.raises(UserError, match=r"network.0.0.weight has values that are NaN or infinite"):
        evaluate_weights(checkpoint_files.read_checkpoint_settings(checkpoint, path), checkpoint)


def test_losses_and_accuracies_are_means_over_images_though_the_last_batch_is_smaller(
    settings: Callable[..., Settings], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Weights that stay where they are, so that all images have been scored by the same.
    still = ["optimizer.lr=1e-12", "model.norm=none", "model.dropout=0"]
    limits = [f"trainer.limit_{part}_batches=1.0" for part in ("train", "val", "test")]
    requested = settings(*still, *limits, "data.val_size=9901", "trainer.max_epochs=1", "logger=none", "callbacks=none")
    folder = RunFolder(tmp_path)
    reported = run_experiment(requested, folder)["metrics"] | folder.read_epochs()[0]

    module = Classifier(requested, CLASSES).eval()
    module.load_state_dict(checkpoint_files.read(folder.last)["state_dict"])
    images, labels = map(torch.from_numpy, load(requested.data, "train"))
    held_out, kept = split(len(labels), 9901, requested.seed)
    test = tuple(map(torch.from_numpy, load(requested.data, "test")))
    parts = {"train": (images[kept], labels[kept]), "val": (images[held_out], labels[held_out]), "test": test}
    for part, (images, labels) in parts.items():  # 99, 9901 and 2000, in batches of 32
        with torch.no_grad():
            logits = module(resize(images, 28))
        assert reported[f"{part}/loss"] == pytest.approx(float(functional.cross_entropy(logits, labels)), rel=3e-6)
        assert reported[f"{part}/acc"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()), rel=3e-6)
    names = Classifier.load_from_checkpoint(folder.best, weights_only=True).class_names
    right = (logits.argmax(1) == labels).double()
    by_class = {name: float(right[labels == i].mean()) for i, name in enumerate(names)}
    assert reported["test/acc_by_class"] == pytest.approx(by_class)
    never = [name for i, name in enumerate(names) if i not in logits.argmax(1)]
    assert never  # untrained weights predict few of the classes
    assert f"never predicted for any of 2000 test images: {', '.join(never)};" in caplog.text


def test_metrics_csv_has_one_row_an_epoch(run: tuple[RunFolder, dict[str, Any]]) -> None:
    folder, result = run
    rows = list(csv.DictReader(folder.metrics.read_text().splitlines()))
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "6"), ("2", "12")]
    best = max(rows, key=lambda row: (float(row["val/acc"]), -float(row["val/loss"])))
    assert float(best["val/loss"]) == result["metrics"]["val/loss"]


def test_tensorboard_has_every_tag_once_a_step(run: tuple[RunFolder, dict[str, Any]]) -> None:
    folder, result = run
    events = EventAccumulator(str(folder.path), size_guidance={"scalars": 0}).Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    windows = [4, 6, 8, 12]
    others = [f"while_training/{name}" for name in ("grad_norm", "lr", "images_per_second")]
    expected = dict.fromkeys(("train/loss", "train/acc", *others), windows)
    expected |= {tag: [6, 12] for tag in ("val/loss", "val/acc")}
    expected |= {f"when_finished/{name}": [12] for name in ("test/loss", "test/acc", "val/loss", "val/acc")}
    counts = ["dead_classes", *(f"dead_channels/block{i}" for i in (1, 2, 3))]
    expected |= {f"zero_units/{count}": [0, 2, 3, 5, 6, 8, 9, 11, 12] for count in counts}
    assert steps == expected
    assert events.Scalars("when_finished/test/acc")[0].value == pytest.approx(result["metrics"]["test/acc"])
    assert events.Tags()["graph"]
    hparams = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"optimizer.lr" in hparams
    assert b"hp_metric" not in hparams


def test_with_other_loggers_metrics_csv_is_there_too(settings: Callable[..., Settings], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "csv")
    short = settings("logger=csv", "trainer.max_steps=5", "trainer.accumulate_grad_batches=2")
    described = experiment.Experiment(RunRequest(short, folder)).describe_start()
    assert ", 2 epochs, at most 5 steps, batches of " in described
    run_experiment(short, folder)
    assert (folder.path / "csv" / "metrics.csv").exists()
    assert not folder.event_files()
    # Five steps of two batches each: an epoch of six batches, and two thirds of another, which is validated too.
    rows = list(csv.DictReader(folder.metrics.read_text().splitlines()))
    assert [row["step"] for row in rows] == ["3", "5"]
    assert all(row["val/acc"] for row in rows)


def test_the_notebooks_habit_scores_test_images_and_chooses_nothing_by_them(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "notebook")
    result = run_experiment(settings("data.val_size=0", "data.score_each_epoch=test"), folder)
    assert result["metrics"]["val/acc"] is None
    last, best = (checkpoint_files.read(path) for path in (folder.last, folder.best))
    assert last["global_step"] == best["global_step"] == 12
    rows = list(csv.DictReader(folder.metrics.read_text().splitlines()))
    assert float(rows[-1]["test/acc"]) == result["metrics"]["test/acc"]
    events = EventAccumulator(str(folder.path)).Reload()
    assert [event.step for event in events.Scalars("test/acc")] == [6, 12]


def test_the_final_test_is_logged_where_the_last_epoch_was_not_scored(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    requested = settings("data.score_each_epoch=test", "trainer.check_val_every_n_epoch=2", "trainer.max_epochs=3")
    run_experiment(requested, folder)
    events = EventAccumulator(str(folder.path)).Reload()
    assert [event.step for event in events.Scalars("test/acc")] == [12, 18]
    assert [event.step for event in events.Scalars("when_finished/test/acc")] == [18]
    # The scores of epoch 2 are not those of epoch 3.
    assert ["test/acc" in row for row in folder.read_epochs()] == [False, True, False]


def test_a_validation_in_the_middle_of_an_epoch_is_no_time_of_its_images(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed, clock = [0.0], time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + passed[0])

    class Slow(Callback):
        def on_validation_batch_end(self, *_: Any) -> None:
            passed[0] += 10_000

    folder = RunFolder(tmp_path)
    requested = settings("trainer.val_check_interval=3", "trainer.log_every_n_steps=4", "callbacks=none", "logger=none")
    run_experiment(requested, folder, callbacks=[Slow()])
    for epoch in folder.read_epochs():  # 6 batches of 32
        assert epoch["images_per_second"] > 6 * 32 / 10_000
        assert epoch["seconds"] > 20_000


def test_a_loss_that_is_not_finite_stops_the_run_and_says_what_to_try(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    wild = settings("optimizer=sgd", "optimizer.lr=1e30", "schedule=constant", "model.norm=none", "logger=none")
    with pytest.raises(
        NonFiniteLossError,
        match=r"the loss is (nan|inf) at step \d.*learning rate 1e\+30.*Try a smaller optimizer.lr, "
        r"schedule.warmup=0.1, trainer.gradient_clip_val=1, model.norm=batch$",
    ):
        run_experiment(wild, RunFolder(tmp_path))


def test_what_a_run_has_already_is_not_recommended(settings: Callable[..., Settings]) -> None:
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.5}])
    module = SimpleNamespace(
        trainer=SimpleNamespace(optimizers=[optimizer]),
        settings=settings("model.norm=batch", "schedule.warmup=0.1", "trainer.gradient_clip_val=1"),
        global_step=3,
        current_epoch=0,
    )
    with pytest.raises(NonFiniteLossError, match=r"learning rate 0.5: training diverged. Try a smaller optimizer.lr$"):
        require_finite(module, float("nan"))


def test_what_lightning_refuses_is_the_users_mistake(settings: Callable[..., Settings], tmp_path: Path) -> None:
    second = [
        f"+callbacks.second.{word}"
        for word in ("_target_=lightning.pytorch.callbacks.EarlyStopping", "monitor=val/acc")
    ]
    with pytest.raises(UserError, match=r"trainer: Found more than one stateful callback"):
        experiment.build_trainer(settings("callbacks=early_stopping", *second, "+callbacks.second.mode=max"), None, [])
    monitor = "+callbacks.lr._target_=lightning.pytorch.callbacks.LearningRateMonitor"
    with pytest.raises(UserError, match=r"trainer: Cannot use .*LearningRateMonitor.* no logger"):
        run_experiment(settings(monitor, "logger=none"), RunFolder(tmp_path))
    average = [
        f"+callbacks.swa.{word}"
        for word in ("_target_=lightning.pytorch.callbacks.StochasticWeightAveraging", "swa_lrs=0.1")
    ]
    with pytest.raises(UserError, match=r"callbacks.swa: a run with .* can't be resumed, .*; use callbacks=ema"):
        experiment.build_trainer(settings(*average), None)
    pruning = "+callbacks.prune={_target_: lightning.pytorch.callbacks.ModelPruning, pruning_fn: l1_unstructured}"
    with pytest.raises(UserError, match=r"callbacks.prune: a run with ModelPruning can't be resumed"):
        experiment.build_trainer(settings(pruning), None)
    for finder, remedy in (
        ("LearningRate", r"optimizer.lr=0.001,0.01,0.1 sweep.test=false"),
        ("BatchSize", "nin bench"),
    ):
        found = settings(f"+callbacks.find._target_=lightning.pytorch.callbacks.{finder}Finder")
        with pytest.raises(UserError, match=rf"callbacks.find: {finder}Finder would change .*{remedy}"):
            experiment.build_trainer(found, None)
    failed = [
        f"+callbacks.exc.{word}"
        for word in ("_target_=lightning.pytorch.callbacks.OnExceptionCheckpoint", f"dirpath={tmp_path}")
    ]
    with pytest.raises(UserError, match=r"callbacks.exc: with OnExceptionCheckpoint, Lightning starts a new run from"):
        experiment.build_trainer(settings(*failed), None)


def test_a_gpu_that_is_not_requested_is_no_warning(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CUDAAccelerator, "is_available", lambda: True)
    with pytest.warns(UserWarning, match="GPU available but not used"):
        experiment.build_trainer(settings("logger=none"), None, [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silence_known_warnings()
        experiment.build_trainer(settings("logger=none"), None, [])


def test_training_and_selection_do_not_depend_on_the_test_images(
    settings: Callable[..., Settings],
    tmp_path: Path,
    run: tuple[RunFolder, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load_with_noise(data: Data, part: str) -> tuple[np.ndarray, np.ndarray]:
        images, labels = load(data, part)
        if part == "test":
            noise = np.random.default_rng(0)
            images = noise.integers(0, 256, images.shape, dtype=np.uint8)
            labels = noise.integers(0, 10, labels.shape)
        return images, labels

    monkeypatch.setattr(data_module, "load", load_with_noise)
    with_noise = RunFolder(tmp_path / "run")
    result = run_experiment(settings(), with_noise)
    folder, expected = run
    assert result["metrics"]["test/loss"] != expected["metrics"]["test/loss"]
    for key in ("val/acc", "val/loss"):
        assert result["metrics"][key] == expected["metrics"][key]
    for name in ("last", "best"):
        theirs, ours = (checkpoint_files.read(getattr(f, name))["state_dict"] for f in (with_noise, folder))
        assert all(torch.equal(theirs[key], ours[key]) for key in ours)


def test_augmentation_is_for_training_alone(settings: Callable[..., Settings], tmp_path: Path) -> None:
    keys = ["optimizer.lr=1e-12", "optimizer.weight_decay=0", "model.norm=none", "model.dropout=0", "logger=none"]
    rows, results = {}, {}
    for name in ("none", "flip_shift"):
        folder = RunFolder(tmp_path / name)
        results[name] = run_experiment(settings(f"data.augment={name}", *keys), folder)
        rows[name] = folder.read_epochs()[-1]
    scored = [name for name in ("val/loss", "val/acc") if rows["none"][name] is not None]
    assert len(scored) == 2
    assert [rows["flip_shift"][n] for n in scored] == pytest.approx([rows["none"][n] for n in scored], rel=1e-6)
    tested = [results[name]["metrics"]["test/loss"] for name in ("flip_shift", "none")]
    assert tested[0] == pytest.approx(tested[1], rel=1e-6)
    assert rows["flip_shift"]["train/loss"] != pytest.approx(rows["none"]["train/loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("requested", "features", "used"),
    [
        ("auto", {"avx512_bf16": True}, "bf16-mixed"),
        ("auto", {"amx_bf16": True}, "bf16-mixed"),
        ("auto", {"avx512_bf16": False, "avx2": True}, "32-true"),
        ("null", {"avx512_bf16": True}, "32-true"),
        ("64-true", {"avx512_bf16": True}, "64-true"),
    ],
)
def test_bfloat16_on_a_cpu_is_requested_and_native(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, requested: str, features: dict, used: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)  # torch 2.9 has none
    trainer = experiment.build_trainer(settings(f"trainer.precision={requested}", "callbacks=none"), None, [])
    assert trainer.precision == used


def test_a_progress_bar_of_the_users_replaces_the_projects(settings: Callable[..., Settings], tmp_path: Path) -> None:
    bar = "+callbacks.bar._target_=lightning.pytorch.callbacks.TQDMProgressBar"
    printer = EpochPrinter(MetricsLogger(tmp_path))
    trainer = experiment.build_trainer(settings(bar, "callbacks=none"), tmp_path, [printer])
    assert trainer.progress_bar_callback in trainer.callbacks
    assert printer not in trainer.callbacks
    assert printer in experiment.build_trainer(settings("callbacks=none"), tmp_path, [printer]).callbacks
    with pytest.raises(UserError, match=r"trainer: .*enable_progress_bar=False"):
        experiment.build_trainer(settings(bar, "trainer.enable_progress_bar=false"), tmp_path, [])


def test_hooks_are_profiled_on_request_only(settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build_trainer(settings("trainer.profiler=simple"), None)
    trainer.profiler.start("a")  # type: ignore[attr-defined]  # set by Lightning, missing in its types
    assert "a" in trainer.profiler.current_actions  # type: ignore[attr-defined]
    profiler = build_trainer(settings(), None).profiler  # type: ignore[attr-defined]
    monkeypatch.setattr(profiler, "start", lambda action: pytest.fail(action))
    with profiler.profile("a") as action:
        assert action == "a"


def test_a_step_on_a_cpu_does_not_count_gpus(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # as `import lightning` sets it
    module = Classifier(settings("optimizer=adamw", "schedule=constant", "schedule.warmup=0"), CLASSES)
    optimizer = module.configure_optimizers()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("loads NVIDIA's management library"))
    optimizer.step()


def test_early_stopping_composes(settings: Callable[..., Settings]) -> None:
    chosen = settings("callbacks=early_stopping")
    trainer = experiment.build_trainer(chosen, None, [])
    (stopping,) = (callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping))
    assert (stopping.monitor, stopping.mode, stopping.patience) == ("val/acc", "max", 3)


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ("trainer.precision=bf16-true callbacks=default", 12),
        ("trainer.precision=bf16-mixed", 12),
        # As many as a second allows.
        ("trainer.max_time=00:00:00:01 trainer.max_epochs=-1 trainer.limit_train_batches=1.0 schedule=constant", None),
        ("trainer.fast_dev_run=true", 1),
        ("model=lenet optimizer.lr=0.01", 12),
    ],
)
def test_it_runs_to_its_end_in_many_ways(data_root: Path, tmp_path: Path, overrides: str, steps: int | None) -> None:
    words = ["callbacks=none", *overrides.split()]
    small = [word for word in SMALL if not ("model=lenet" in words and word.startswith("model."))]
    result = run_experiment(validate(compose_config([*small, f"data.root={data_root}", *words])), RunFolder(tmp_path))
    assert result["status"] == "finished"
    assert result["metrics"]["test/acc"] is not None
    last = checkpoint_files.read(RunFolder(tmp_path).last)
    assert last["global_step"] == result["steps"] > 0
    assert steps in (None, result["steps"])
    assert result.get("stopped_by", "").startswith("Timer: ") == ("max_time" in overrides)


def test_an_epoch_that_ends_between_accumulated_batches_has_its_row_and_the_reason(
    settings: Callable[..., Settings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class TimeIsUp(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    folder = RunFolder(tmp_path)
    chosen = settings("trainer.accumulate_grad_batches=2", "callbacks=none")
    result = run_experiment(chosen, folder, callbacks=[TimeIsUp()])
    assert result["stopped_by"] == "trainer.should_stop was set by one of: TimeIsUp"  # within the last epoch
    assert f"training ended early, in epoch 2: {result['stopped_by']}\n" in capsys.readouterr().out
    rows = folder.read_epochs()
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 3), (2, 3)]
    assert rows[1]["train/loss"] > 0


def test_overfitted_are_the_same_batches_again_and_again(settings: Callable[..., Settings], tmp_path: Path) -> None:
    trained_on = []

    class Seen(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Classifier, batch: Any, index: int) -> None:
            trained_on.append(batch[1])

    requested = settings("trainer.overfit_batches=2", "callbacks=none", "logger=none")
    run_experiment(requested, RunFolder(tmp_path), callbacks=[Seen()])
    assert len(trained_on) == 4
    assert torch.equal(torch.cat(trained_on[:2]), torch.cat(trained_on[2:]))


def test_eval_repeats_the_test_of_bfloat16_weights_and_they_classify_in_float32(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    requested = settings("trainer.precision=bf16-true", "trainer.max_epochs=1", "callbacks=none")
    folder = RunFolder(tmp_path)
    result = run_experiment(requested, folder)
    # The network is float32 until the Trainer converts it.
    best = checkpoint_files.read(folder.best)
    tested, _ = evaluate_weights(requested, best)
    assert tested == {name: value for name, value in result["metrics"].items() if name.startswith("test/")}
    module, _, _ = read_checkpoint(folder.best)
    weight = next(module.network.parameters())
    assert weight.dtype == torch.float32
    assert torch.equal(weight, best["state_dict"]["network.0.0.weight"].float())


def test_an_average_of_the_weights_is_validated_tested_and_saved(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    trained, scored = [], {}

    def weights_of(network: torch.nn.Module) -> torch.Tensor:
        return torch.cat([weights.detach().flatten() for weights in network.parameters()])

    class Recorder(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Classifier, *_: Any) -> None:
            trained.append(weights_of(pl_module.network))

        def on_validation_batch_end(self, trainer: Trainer, pl_module: Classifier, *_: Any) -> None:
            scored[trainer.state.stage] = weights_of(pl_module.network)

        on_test_batch_end = on_validation_batch_end

    words = ("callbacks=ema", "callbacks.ema.decay=0.9", "~callbacks.images", "~callbacks.dead_units", "logger=none")
    run_experiment(settings(*words, "trainer.max_epochs=1"), RunFolder(tmp_path), callbacks=[Recorder()])
    average = trained[0]
    for weights in trained[1:]:
        average = 0.9 * average + 0.1 * weights
    assert (average - trained[-1]).abs().max() > 1e-3
    saved = weights_of(read_checkpoint(RunFolder(tmp_path).best)[0].network)
    for weights in (scored[RunningStage.VALIDATING], scored[RunningStage.TESTING], saved):
        torch.testing.assert_close(weights, average)


def test_a_run_without_the_test_is_tested_when_it_is_started_again_with_it(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    keys = ["callbacks=none", "logger=none"]
    uninterrupted = run_experiment(settings(*keys), RunFolder(tmp_path / "uninterrupted"))
    folder = RunFolder(tmp_path / "run")
    untested = execute_run(RunRequest(settings(*keys, "sweep.test=false"), folder))
    assert untested["metrics"]["test/acc"] is None
    assert execute_run(RunRequest(settings(*keys, "sweep.test=false"), folder)) == untested
    tested = execute_run(RunRequest(settings(*keys), folder))
    assert outcome(tested) == outcome(uninterrupted)
    assert (untested["weights_sha256"], untested["steps"]) == (uninterrupted["weights_sha256"], uninterrupted["steps"])


@pytest.mark.parametrize("when", ["trainer.max_steps=1", "checkpoint.every_n_steps=1"])
def test_weights_that_are_not_finite_are_not_saved(
    settings: Callable[..., Settings], tmp_path: Path, when: str
) -> None:
    """Neither at the end, nor after a step whose own loss was finite: a run could not be resumed with them."""
    keys = ["callbacks=none", "logger=none", "optimizer=sgd", "optimizer.lr=1e39", "schedule=constant"]
    folder = RunFolder(tmp_path)
    with pytest.raises(NonFiniteLossError, match=r"weight has values that are NaN or infinite at step 1 .*diverged"):
        run_experiment(settings(*keys, when), folder)
    assert not folder.last.exists()


def test_only_scores_of_the_very_weights_choose_the_best(settings: Callable[..., Settings], tmp_path: Path) -> None:
    # Scored after batches 4 of 6, and saved after 6: those scores are of other weights.
    result = run_experiment(settings("trainer.val_check_interval=4", "logger=none"), RunFolder(tmp_path))
    assert result["metrics"]["val/acc"] is None
    assert checkpoint_files.read(RunFolder(tmp_path).best)["global_step"] == 12


class OwnLogger(DummyLogger):
    def __init__(self, **others: Any):
        super().__init__()
        self.others = others


def test_a_logger_is_given_the_runs_folder_where_it_takes_one_and_has_none(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    other = "+logger.other={_target_: lightning.pytorch.loggers.CSVLogger, save_dir: elsewhere}"
    chosen = settings("logger=csv", other, f"+logger.own._target_={__name__}.OwnLogger", "callbacks=none")
    csv_logger, other_logger, own = experiment.build_trainer(chosen, tmp_path).loggers
    assert (csv_logger.save_dir, other_logger.save_dir, own.others) == (str(tmp_path), "elsewhere", {})


class OwnCallback(Callback):
    pass


class MisspelledCallback(OwnCallback):
    def on_train_epoch_finish(self) -> None:
        pass

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pass

    def on_it(self) -> None:
        """A method of its own."""


def test_a_misspelled_hook_of_a_callback_is_named(
    settings: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    chosen = settings("logger=none", "callbacks=ema", f"+callbacks.mine._target_={__name__}.MisspelledCallback")
    build_trainer(chosen, None)
    similar = "on_train_epoch_end, on_train_epoch_start"
    text = f"Lightning never calls MisspelledCallback.on_train_epoch_finish; its hooks with similar names: {similar}"
    warned = [record.getMessage() for record in caplog.records if record.name.startswith("nin.")]
    assert warned == [f"callbacks.mine: {text}"]


def test_checkpoints_are_saved_in_the_runs_folder_only_unless_a_callback_is_ones_own(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    chosen = settings("logger=none", "callbacks=none")
    trainers: list[Any] = [build_trainer(chosen, tmp_path, own) for own in ([], [OwnCallback()])]
    assert [trainer.strategy.checkpoint_io.folders for trainer in trainers] == [[tmp_path.resolve()], None]


def test_a_csv_logger_does_not_overwrite_its_file_on_resuming(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    chosen = settings("logger=csv", "callbacks=none")
    (first,), (resumed,) = (
        experiment.build_trainer(chosen, tmp_path, [], resume_step).loggers for resume_step in (None, 9)
    )
    assert (first.log_dir, resumed.log_dir) == (str(tmp_path / "csv"), str(tmp_path / "csv-9"))


def test_a_csv_logger_has_the_settings_at_the_start_and_every_value_when_a_checkpoint_is_saved(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    written = []

    class Reader(Callback):
        def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
            assert "optimizer.lr: 0.005\n" in (tmp_path / "csv" / "hparams.yaml").read_text()
            path = tmp_path / "csv" / "metrics.csv"
            written.append(len(path.read_text().splitlines()) if path.exists() else 0)

        def on_test_start(self, trainer: Trainer, *_: Any) -> None:
            trainer.fit_loop.epoch_loop._batches_that_stepped += 1  # as after some resumes

    run_experiment(settings("logger=csv", "callbacks=none"), RunFolder(tmp_path), callbacks=[Reader()])
    assert written[0] == 0
    assert written[1] > 2  # the header, and rows of training and validation
    rows = list(csv.DictReader((tmp_path / "csv" / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in rows if row["test/acc"]] == ["12"]


def test_a_folder_with_another_class_is_named_when_a_run_is_resumed(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its network has weights of another shape, which are not what the user has changed."""
    root, folder = write_folder(tmp_path / "photos", {"train": 8}), RunFolder(tmp_path / "run")
    for epochs in (1, 2):
        chosen = settings(f"trainer.max_epochs={epochs}", "trainer.log_every_n_steps=1", "schedule=constant")
        chosen = chosen.model_copy(update={"data": folder_data(root, image_size=28)})
        if epochs == 1:
            run_experiment(chosen, folder)
            shutil.copytree(root / "train" / "red", root / "train" / "zebra")
            monkeypatch.setattr(splits, "_opened", {})  # as in a new process, which lists the folder again
            continue
        with pytest.raises(UserError, match="photos: has other images than those the run was started with"):
            run_experiment(chosen, folder)
