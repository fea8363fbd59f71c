"""Test metrics without torch, of images that may stay in their file."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nin.deploy.scoring import MappedImages, evaluate_network, load_part
from pictures import folder_data, write_folder


def test_metrics_of_more_than_30_classes_and_of_images_in_a_file() -> None:
    """Each image's first pixel is its number, which selects the probabilities that the network answers."""
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet(np.ones(31), 300).astype(np.float32)
    labels = generator.integers(0, 31, 300)
    pixels = np.zeros((600, 2, 2), np.uint8)
    pixels[::2, 0, 0], pixels[::2, 1, 1] = np.arange(300) % 256, np.arange(300) // 256
    images = MappedImages(pixels, np.arange(0, 600, 2))

    def predict(batch: Any) -> np.ndarray:
        assert len(batch) <= 128
        return probabilities[batch[:, 0, 0].astype(int) + 256 * batch[:, 1, 1].astype(int)]

    network: Any = SimpleNamespace(
        predict=predict, description=SimpleNamespace(class_names=[f"c{i}" for i in range(31)])
    )
    done: list[tuple[int, int]] = []
    metrics, confusion = evaluate_network(network, images, labels, lambda *counts: done.append(counts))
    order = np.argsort(-probabilities, axis=1)
    assert metrics["test/acc"] == pytest.approx((order[:, 0] == labels).mean(), abs=1e-6)
    assert metrics["test/top5_acc"] == pytest.approx((order[:, :5] == labels[:, None]).any(1).mean(), abs=1e-6)
    assert metrics["test/loss"] == pytest.approx(-np.log(probabilities[np.arange(300), labels]).mean(), abs=1e-6)
    assert confusion.sum() == 300
    assert done == [(128, 300), (256, 300), (300, 300)]
    few = SimpleNamespace(
        predict=lambda batch: predict(batch)[:, :10], description=SimpleNamespace(class_names=list("abcdefghij"))
    )
    assert "test/top5_acc" not in evaluate_network(few, images, labels % 10, lambda *_: None)[0]  # type: ignore[arg-type]


def test_an_accuracy_by_class_is_a_share_of_the_images_of_that_class() -> None:
    """And not of the images for which the class is predicted."""
    probabilities = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.5, 0.3]], np.float32)
    network: Any = SimpleNamespace(
        predict=lambda _: probabilities, description=SimpleNamespace(class_names=["a", "b", "c"])
    )
    images, labels = np.zeros((3, 2, 2), np.uint8), np.array([0, 0, 1])
    metrics, confusion = evaluate_network(network, images, labels, lambda *_: None)
    assert metrics["test/acc_by_class"] == {"a": 0.5, "b": 1.0, "c": None}
    assert confusion.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]  # rows are true classes


def test_the_parts_of_a_folder_are_those_of_its_run(tmp_path: Path) -> None:
    """The test images that are split off the training images depend on the seed of the run."""
    from nin.data.module import ImageDataModule

    data = folder_data(write_folder(tmp_path / "root", {"train": 8}))

    def load(seed: int, part: str) -> tuple[np.ndarray, np.ndarray]:
        settings: Any = SimpleNamespace(data=data, seed=seed)
        images, labels = load_part(settings, part)
        return images[:], labels

    run = ImageDataModule(data, seed=3)
    run.setup()
    for part, (images, labels) in (("train", run.train), ("test", run.test)):
        found = load(3, part)
        rows = zip(images.numpy(), labels.tolist(), strict=True)  # a test of the run has another order
        expected = sorted((image.tobytes(), label) for image, label in rows)
        assert sorted((image.tobytes(), label) for image, label in zip(*found, strict=True)) == expected
        assert not np.array_equal(found[0], load(0, part)[0])
