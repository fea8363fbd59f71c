import shutil
from collections.abc import Callable
from pathlib import Path

import lightning
import pytest
import torch
from torch import nn

from helpers import run_experiment
from nin.checkpoints.checksum import read_checksum
from nin.checkpoints.files import read
from nin.checkpoints.weights import hash_weights, load_matching_weights
from nin.config.schema import Settings, UserError
from nin.data.module import ImageDataModule
from nin.networks.components import start_from_components
from nin.runs.folder import RunFolder
from nin.training.classifier import Classifier
from nin.training.evaluation import evaluate_weights
from nin.training.initialization import start_from_checkpoint
from nin.training.request import RunRequest
from nin.training.run import execute_run


def test_a_run_starts_from_normalized_training_images_that_are_not_augmented(
    tmp_path: Path, settings: Callable[..., Settings]
) -> None:
    requested = settings(
        "data.normalize=true", "data.augment=flip_shift", "model.init=kaiming_dirac_pca", "model.norm=none",
        "optimizer.lr=1e-30", "trainer.max_epochs=1", "seed=3",
    )  # fmt: skip
    run_experiment(requested, RunFolder(tmp_path / "run"))
    filters = read(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]["network.0.0.weight"]
    assert filters.shape == (8, 1, 3, 3)
    data = ImageDataModule(requested.data, seed=3)
    data.setup("fit")
    images = data.train[0]
    spread = torch.tensor([i * len(images) // 256 for i in range(256)])
    mean, std = data.compute_statistics()
    convolution = nn.Conv2d(1, 8, 3, stride=2)
    start_from_components(convolution, (images[spread].unsqueeze(1) / 255 - mean) / std)
    assert torch.allclose(filters, convolution.weight, atol=1e-5)


def test_a_test_is_that_of_the_first_filters_as_they_were_trained(
    tmp_path: Path, settings: Callable[..., Settings]
) -> None:
    init = ["model.init=kaiming_dirac_pca", "optimizer.lr=0.005", "trainer.max_epochs=1"]
    requested, folder = settings(*init, "callbacks=none", "logger=none"), RunFolder(tmp_path)
    result = run_experiment(requested, folder)
    best = read(folder.best)
    module = Classifier(requested, [str(i) for i in range(10)])
    module.load_state_dict(best["state_dict"])
    assert result["best_weights_sha256"] == hash_weights(module.network)
    tested, _ = evaluate_weights(requested, best)
    assert tested == {name: value for name, value in result["metrics"].items() if name.startswith("test/")}


def test_a_run_starts_with_the_weights_of_another_one_and_resumes_without_it(
    tmp_path: Path, settings: Callable[..., Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ("callbacks=none", "logger=none", "schedule=constant", "model.init=kaiming_dirac_pca")
    first, second = (RunFolder(tmp_path / name) for name in ("first", "second"))
    execute_run(RunRequest(settings(*plain, "trainer.max_epochs=1"), first))
    start = read(first.best)["state_dict"]
    keys = (*plain, f"weights={first.path}", "model.last_width=12", "optimizer.lr=1e-30", "seed=5")
    capsys.readouterr()
    result = execute_run(RunRequest(settings(*keys, "trainer.max_epochs=1"), second))
    printed = capsys.readouterr().out
    others = "not in it, or in another shape: 5.0.weight, 5.1.weight, 5.1.bias, 5.1.running_mean and "
    assert f"starting with the weights of {first.best}; {others}" in printed
    assert result["initial_weights_sha256"] == read_checksum(first.best)
    trained = read(second.last)["state_dict"]
    kept = {name for name in start if name.endswith((".weight", ".bias")) and torch.equal(trained[name], start[name])}
    blocks = [f"network.{name}.weight" for block in (0, 2) for name in (f"{block}.0", f"{block}.3", f"{block}.6")]
    assert kept > {*blocks}
    assert not kept & {f"network.5.{i}.weight" for i in (0, 1, 3, 4, 6)}
    shutil.rmtree(first.path)
    extended = execute_run(RunRequest(settings(*keys, "trainer.max_epochs=2"), second))
    assert (extended["epochs"], extended["resumes"]) == (2, 1)
    assert extended["initial_weights_sha256"] == result["initial_weights_sha256"]


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, settings: Callable[..., Settings]) -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    for saved, error in (
        (
            {"network.0.weight": torch.ones(3, 5), "network.1.num_batches_tracked": torch.tensor(1)},
            "none of its weights",
        ),
        ({"network.0.weight": torch.full((3, 2), torch.nan)}, "0.weight has values that are NaN or infinite"),
    ):
        with pytest.raises(UserError, match=error):
            load_matching_weights(network, {"state_dict": saved})
    for given, error in (("none", "no such file"), (".", "has no checkpoints/best.ckpt")):
        with pytest.raises(UserError, match=rf"^weights={tmp_path / given}: {error}$"):
            start_from_checkpoint(network, tmp_path / given)


def test_an_infinite_mask_and_other_kinds_of_tensors_are_no_obstacle() -> None:
    network = nn.Linear(2, 2)
    network.register_buffer("mask", torch.tensor([-torch.inf, 0]))
    network.register_buffer("count", torch.tensor(3))
    saved = {"weight": torch.ones(2, 2), "bias": torch.ones(2).to_sparse(), "mask": torch.tensor([-torch.inf, 1])}
    others = load_matching_weights(network, {"state_dict": saved | {"count": torch.tensor(True)}})
    assert others == ["bias", "count"]
    assert network.mask.tolist() == [-torch.inf, 1]
    assert int(network.count) == 3


def fit_without_data(settings: Settings) -> None:
    module = Classifier(settings, [str(i) for i in range(10)])
    module.trainer = trainer = lightning.Trainer(barebones=True)
    assert getattr(trainer, "datamodule", None) is None
    module.setup("fit")


def test_other_data_modules_are_refused_where_training_images_are_needed(settings: Callable[..., Settings]) -> None:
    for needed in (settings("model.init=kaiming_dirac_pca"), settings("data.normalize=true")):
        with pytest.raises(TypeError, match="need an ImageDataModule"):
            fit_without_data(needed)
    fit_without_data(settings())
