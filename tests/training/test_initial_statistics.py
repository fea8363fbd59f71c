from collections.abc import Callable
from pathlib import Path

import lightning
import pytest
import torch
from torch import nn

from helpers import run_experiment
from nin.checkpoints.files import read
from nin.checkpoints.weights import hash_weights
from nin.config.schema import Settings
from nin.data.module import ImageDataModule
from nin.networks.components import start_from_components
from nin.runs.folder import RunFolder
from nin.training.classifier import Classifier
from nin.training.evaluation import evaluate_weights


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
