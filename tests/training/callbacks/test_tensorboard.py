import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata
from torch import Tensor, nn

from helpers import run_experiment
from nin.config.composition import compose_settings
from nin.config.schema import Settings
from nin.networks.score_maps import forward_with_maps
from nin.runs.folder import RunFolder
from nin.training.callbacks import tensorboard
from nin.training.callbacks.dead_units import count_dead
from nin.training.callbacks.figures import draw_confusion, draw_curves, most_confused
from nin.training.callbacks.tensorboard import ImageLogger, SingleFileTensorBoardLogger, hyperparameters
from nin.training.classifier import Classifier


def test_the_most_confused_classes_come_first() -> None:
    counts = torch.tensor([[9, 0, 0, 0], [0, 5, 4, 0], [0, 1, 9, 0], [0, 0, 1, 8]])
    assert most_confused(counts, 2) == [1, 2]
    assert most_confused(counts, 3) == [1, 2, 3]


def test_hyperparameters_are_those_of_the_sweep_or_those_that_differ_from_the_defaults(
    settings: Callable[..., Settings],
) -> None:
    chosen = settings("optimizer.lr=1e-05", "seed=3")
    single = hyperparameters(chosen, [])
    assert single["optimizer.lr"] == 1e-5
    assert single["seed"] == 3
    assert "model.name" not in single  # as by default
    assert "data.root" not in single
    assert hyperparameters(compose_settings([]), []) == {"seed": 0}  # no data.image_size: it is the network's
    assert "optimizer.betas" in single  # of adamw, and the default is sgd
    assert "trainer.precision" not in single  # as by default
    sweep = chosen.model_copy(update={"sweep": chosen.sweep.model_copy(update={"keys": ["optimizer.lr"]})})
    assert hyperparameters(sweep, ["optimizer.lr=1e-05", "seed=3"]) == {"optimizer.lr": 1e-5}
    # As Hydra's grammar allows them, and YAML's does not.
    words = {"model": "model=nin_small", "name": r"name='bob\'s'", "optimizer.lr": "optimizer.lr=${oc.env:LR}"}
    sweep = chosen.model_copy(update={"sweep": chosen.sweep.model_copy(update={"keys": list(words)}), "name": "bob's"})
    expected = {"model": "nin_small", "name": "bob's", "optimizer.lr": 1e-5}
    assert hyperparameters(sweep, list(words.values())) == expected


def test_a_run_logs_its_request_its_result_and_augmented_samples(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "first")
    chosen = settings("callbacks.images.sample_images=4", "trainer.max_epochs=1")
    result = run_experiment(chosen, folder, ["experiment=quickstart", "name=my run"])
    events = EventAccumulator(str(folder.path), size_guidance={"tensors": 0}).Reload()

    def text(tag: str) -> str:
        return events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()

    assert text("command") == "    nin train experiment=quickstart 'name=my run'\n"
    assert result["command"] == "nin train experiment=quickstart 'name=my run'"
    assert "    optimizer:\n      name: adamw\n      lr: 0.005\n" in text("config")
    assert f"| metrics.test/acc | {result['metrics']['test/acc']:.4f} |" in text("result")
    assert set(events.Tags()["images"]) == {
        "while_training/samples",
        *(f"when_finished/{name}" for name in ("confusion", "wrong", "curves")),
    }
    assert events.Images("while_training/samples")[0].width == 4 * (28 + 2) + 2
    groups = sorted({tag.partition("/")[0] for kind in ("scalars", "images") for tag in events.Tags()[kind]})
    assert groups == ["train", "val", "when_finished", "while_training", "zero_units"]
    (layout,) = events.Tensors("custom_scalars__config__")
    categories = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0]).category
    charts = [chart for category in categories for chart in category.chart]
    # A chart has one color per run: with two curves of a run they would look alike.
    assert [list(chart.multiline.tag) for chart in charts] == [["train/loss"], ["val/loss"], ["train/acc"], ["val/acc"]]
    start = metadata.parse_session_start_info_plugin_data(
        events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    )
    assert start.group_name == "first"
    assert "optimizer.lr" in start.hparams
    # TensorBoard would show the columns of one run for all runs in a folder, and other runs have other keys.
    assert "_hparams_/experiment" not in events.summary_metadata


@pytest.mark.parametrize(("channels", "drawn"), [(1, 1), (2, 1), (3, 3), (5, 3)])
def test_of_images_with_other_numbers_of_channels_the_first_are_drawn(
    monkeypatch: pytest.MonkeyPatch, channels: int, drawn: int
) -> None:
    grids, images = [], torch.rand(2, channels, 4, 4)
    logger = SimpleNamespace(experiment=SimpleNamespace(add_image=lambda tag, grid, step: grids.append(grid)))
    monkeypatch.setattr(tensorboard, "_tensorboard_loggers", lambda _: [logger])
    monkeypatch.setattr(tensorboard, "_score_maps", lambda *_: None)
    callback, outputs = tensorboard.ImageLogger(), torch.eye(2)
    callback.on_train_batch_start(SimpleNamespace(global_step=0), None, (images,), 0)
    (grid,) = grids
    assert torch.equal(grid[:, 2:6, 2:6], images[0, :drawn].expand(3, 4, 4))  # beside a frame of two pixels
    callback.on_test_batch_end(None, None, outputs, (images, torch.ones(2, dtype=torch.int64)), 0)
    assert [wrong[0].shape for wrong in callback.wrong] == [(drawn, 4, 4)]


def test_a_wrong_image_has_its_label_the_predicted_class_and_the_score_maps_of_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, scored = torch.rand(2, 1, 4, 4), []
    maps = torch.arange(12.0).view(1, 3, 2, 2)  # of the wrong image alone: one per class
    monkeypatch.setattr(tensorboard, "_tensorboard_loggers", lambda _: [None])
    monkeypatch.setattr(tensorboard, "_score_maps", lambda _, images: (scored.append(images), maps)[1])
    callback = ImageLogger()
    callback.on_test_batch_end(None, None, torch.eye(3)[[0, 0]], (images, torch.tensor([0, 2])), 0)
    ((image, label, predicted, both),) = callback.wrong
    assert (label, predicted) == (2, 0)
    assert image.tolist() == images[1].tolist()
    assert torch.equal(scored[0], images[1:])
    assert both.tolist() == [[[8, 9], [10, 11]], [[0, 1], [2, 3]]]


def test_the_score_maps_of_a_wrong_image_are_of_both_views_where_its_prediction_is(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorboard, "_tensorboard_loggers", lambda _: [None])
    module = Classifier(settings("data.test_time_flip=true"), [str(i) for i in range(10)]).eval()
    images = torch.rand(1, 1, 28, 28)
    callback = ImageLogger()
    with torch.no_grad():
        callback.on_test_batch_end(None, module, torch.eye(10)[[3]], (images, torch.tensor([5])), 0)
        maps, mirrored = (forward_with_maps(module.network, view)[1] for view in (images, images.flip(-1)))
    ((_, label, predicted, both),) = callback.wrong
    assert (label, predicted) == (5, 3)
    np.testing.assert_allclose(both, ((maps + mirrored.flip(-1)) / 2)[0, [5, 3]], rtol=1e-6)


class Hooked(nn.Sequential):
    """Can't be traced by torch.jit; its batch norm is frozen."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4).eval())
        self[1].register_full_backward_hook(lambda *_: None)

    def forward(self, images: Tensor) -> Tensor:
        assert len(images) > 0  # of which the trace warns
        return super().forward(images)


def test_the_event_file_is_in_the_runs_folder_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("$HOME", "~"):
        logger = SingleFileTensorBoardLogger(folder)
        logger.log_metrics({"val/acc": 0.5}, step=1)
        logger.close()
        assert len(list((tmp_path / folder).glob("events.out.tfevents.*"))) == 1


def test_a_network_that_cannot_be_traced_trains_without_its_graph(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = SingleFileTensorBoardLogger(str(tmp_path))
    trainer: Any = SimpleNamespace(ckpt_path=None, is_global_zero=True, loggers=[logger])
    settings = SimpleNamespace(data=SimpleNamespace(image_size=4))
    module: Any = SimpleNamespace(network=Hooked(), in_channels=1, settings=settings)
    ImageLogger().on_train_start(trainer, module)
    logger.close()
    assert "TensorBoard has no graph of the network, which can't be traced: Modules that have" in caplog.text
    assert capsys.readouterr() == ("", "")
    # Batch norm that a callback has frozen stays so: a resumed run draws no graph.
    assert [part.training for part in module.network] == [True, True, False]
    count_dead(nn.Sequential(frozen := nn.BatchNorm1d(4).eval(), nn.ReLU()), iter([torch.ones(2, 4)]))
    assert not frozen.training


def test_a_figure_that_cannot_be_drawn_is_a_warning_and_the_run_has_its_result(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("draw_confusion", "draw_curves"):
        monkeypatch.setattr(tensorboard, name, lambda *_: [].missing)
    chosen = settings("callbacks.images.sample_images=0", "trainer.max_steps=1")
    result = run_experiment(chosen, RunFolder(tmp_path / "run"))
    assert result["status"] == "finished"
    assert result["metrics"]["test/acc"] is not None
    images = EventAccumulator(str(tmp_path / "run")).Reload().Tags()["images"]
    assert images == ["when_finished/wrong"]
    for name in ("confusion", "curves"):
        assert f"the figure when_finished/{name} is missing: 'list' object has no attribute 'missing'" in caplog.text


def test_the_jobs_of_a_sweep_have_their_keys_and_the_final_metrics_as_columns(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "lr" / "optimizer.lr=0.1")
    version = "+logger.tensorboard.version=tensorboard"  # a folder in the run's folder
    chosen = settings("callbacks=none", "trainer.max_steps=1", "sweep.keys=[optimizer.lr]", "optimizer.lr=0.1", version)
    result = run_experiment(chosen, folder, ["optimizer.lr=0.1"])
    events = EventAccumulator(str(folder.path)).Reload()
    columns = metadata.parse_experiment_plugin_data(events.summary_metadata["_hparams_/experiment"].plugin_data.content)
    assert [column.name for column in columns.hparam_infos] == ["optimizer.lr"]
    assert [column.display_name for column in columns.metric_infos] == ["test/acc", "test/loss", "val/acc", "val/loss"]
    for column in columns.metric_infos:
        (event,) = events.Scalars(column.name.tag)
        assert event.value == pytest.approx(result["metrics"][column.display_name])


def test_training_and_validation_are_two_kinds_of_lines() -> None:
    rows = [{"step": step, "train/loss": 1 / step, "val/loss": 2 / step, "train/acc": 0.5} for step in (6, 12)]
    loss, accuracy = draw_curves(rows).axes
    lines = [(line.get_label(), line.get_linestyle()) for line in loss.lines]
    assert lines == [("train/loss", "--"), ("val/loss", "-")]
    assert loss.lines[0].get_color() != loss.lines[1].get_color()
    assert list(loss.lines[1].get_xydata()[1]) == [12, 2 / 12]
    assert [line.get_label() for line in accuracy.lines] == ["train/acc"]


def test_the_columns_of_a_confusion_matrix_are_the_predicted_classes() -> None:
    (axes,) = draw_confusion(torch.tensor([[0, 3], [0, 0]]), ("cat", "dog")).axes  # three cats that are taken for dogs
    assert [(text.get_text(), text.get_position()) for text in axes.texts] == [("3", (1, 0))]
    assert axes.images[0].get_array().tolist() == [[0, 3], [0, 0]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cat", "dog"]


def test_long_class_names_leave_room_for_a_confusion_matrix() -> None:
    figure = draw_confusion(torch.eye(2, dtype=torch.long), ("a" * 80, "b" * 80))
    figure.savefig(io.BytesIO())  # a warning, which is an error in tests, if there is no room
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["a" * 39 + "…", "b" * 39 + "…"]


def test_class_names_with_dollar_signs_are_drawn_as_they_are() -> None:
    figure = draw_confusion(torch.eye(2, dtype=torch.long), ("under_$5", "$5_to_$10"))
    figure.savefig(io.BytesIO())  # a formula with a syntax error can't be drawn
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [r"under_\$5", r"\$5_to_\$10"]
