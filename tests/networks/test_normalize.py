from collections.abc import Callable
from pathlib import Path

import torch

from helpers import run_experiment
from nin.checkpoints.files import read
from nin.config.schema import Settings
from nin.networks.build import build_network
from nin.networks.normalize import Normalize
from nin.runs.folder import RunFolder
from pictures import write_folder


def test_the_output_has_mean_0_and_deviation_1() -> None:
    images = torch.rand(8, 3, 5, 5) * torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1) + 0.2
    layer = Normalize(3)
    assert torch.equal(layer(images), images)
    layer.set_statistics(images.mean((0, 2, 3)), images.std((0, 2, 3), correction=0))
    out = layer(images)
    assert torch.allclose(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-6)
    # The last channel is the same everywhere.
    assert torch.allclose(out.std((0, 2, 3), correction=0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-6)


def test_a_normalized_network_has_the_weights_of_one_that_is_not(settings: Callable[..., Settings]) -> None:
    torch.manual_seed(0)
    plain = build_network(settings(), 1, 10).state_dict()
    torch.manual_seed(0)
    normalized = build_network(settings("data.normalize=true"), 1, 10).state_dict()
    assert list(normalized) == ["normalize.mean", "normalize.std", *plain]
    assert all(torch.equal(normalized[name], plain[name]) for name in plain)


def test_a_run_on_a_folder_keeps_the_statistics_of_its_training_images(
    tmp_path: Path, settings: Callable[..., Settings]
) -> None:
    root = write_folder(tmp_path / "root", {"train": 16, "test": 4}, size=28)
    requested = settings(
        "data=folder", f"data.root={root}", "data.normalize=true", "data.batch_size=8", "trainer.max_epochs=1",
        "trainer.limit_val_batches=null", "trainer.limit_test_batches=null", "data.augment=trivial",
    )  # fmt: skip
    result = run_experiment(requested, RunFolder(tmp_path / "run"))
    assert (result["test_images"], result["val_split"]) == (12, "5 of 48 training images, chosen by seed 0")
    assert list(result["metrics"]["test/acc_by_class"]) == ["blue", "green", "red"]
    checkpoint = read(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert checkpoint["hyper_parameters"]["in_channels"] == 3
    mean = checkpoint["state_dict"]["network.normalize.mean"].flatten()
    # The mean of the three colors in each channel, over 255.
    assert torch.allclose(mean, torch.tensor([90, 93, 107]) / 255, atol=0.02)
