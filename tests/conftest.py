"""Fixtures that all tests share: settings of a small run, the garments, generated once, and Fashion-MNIST.

The last is used if NIN_DATA names its folder.
"""

import functools
import gc
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

# Before torch is imported. Threads that wait without a core for it would take the core from those that compute.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests run side by side: with all threads each they would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from composition_cache import cached_compositions
from helpers import SMALL, STARTED, nin
from nin.config.composition import compose_config
from nin.config.schema import Settings
from nin.config.validation import validate
from pictures import write_folder

# Several processes each, one after another.
LONGEST = (
    "test_killed_stopped_refused_and_resumed_as_a_person_would",
    "test_train_then_run_the_command_again_then_eval",
)


def pytest_collection_finish() -> None:
    """Keeps the garbage collector from searching torch and Lightning again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # bindings in C++ report what is not collected at the end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first: one that begins at the end would keep a single process busy."""
    items.sort(key=lambda item: item.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def compose_each_config_once() -> Iterator[None]:
    with cached_compositions():
        yield


@pytest.fixture(autouse=True)
def end_started_processes() -> Iterator[None]:
    """Ends what a failed test has started and left running: otherwise the next test would fail with its warning."""
    yield
    for process in STARTED:
        process.kill()
        with process:  # closes the pipe and waits
            pass
    STARTED.clear()


@pytest.fixture(autouse=True)
def print_no_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)  # `nin train --help` sets it for its process


@pytest.fixture(autouse=True)
def restore_loggers() -> Iterator[None]:
    """Removes the log handlers that Hydra and Optuna install when a sweep runs in this process.

    Their stream is a file descriptor of a test that is over. When another test opens a pipe with the same number and
    does not read it, log records fill the pipe, and logging then blocks for ever.
    """
    before = {name: (list(logger.handlers), logger.level) for name, logger in _shared_loggers()}
    yield
    for name, logger in _shared_loggers():
        handlers, level = before[name]
        for handler in [handler for handler in logger.handlers if handler not in handlers]:
            logger.removeHandler(handler)
        logger.setLevel(level)


def _shared_loggers() -> list[tuple[str, logging.Logger]]:
    return [(name, logging.getLogger(name)) for name in ("root", "optuna")]


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared with the other processes of pytest-xdist, whose folders for temporary files are side by side."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def data_root(shared_folder: Path) -> Path:
    """Holds the garments, generated once for all processes, which takes several seconds."""
    from nin.data.sources import prepare

    root = shared_folder / "data"
    prepare(validate(compose_config(["data=garments", "model=nin_small", f"data.root={root}"])).data)
    return root


@pytest.fixture(scope="session")
def real_root() -> Path:
    """Holds Fashion-MNIST; never the repository's own data/, which a test must not depend on."""
    root = os.environ.get("NIN_DATA")
    if not root or not (Path(root) / "FashionMNIST" / "raw").is_dir():
        pytest.skip("NIN_DATA is not a folder that has FashionMNIST/raw")
    return Path(root)


@pytest.fixture(scope="session")
def settings(data_root: Path) -> Callable[..., Settings]:
    """Composes settings of a small run on the garments, with more overrides after its own.

    Unless an override is about these, it draws no figures, which would take as long as the run, and looks for dead
    units in a few images.
    """

    @functools.cache  # a composition takes a tenth of a second, and many tests have the same
    def compose(*overrides: str) -> Settings:
        cheap = {"callbacks.images": "~callbacks.images", "callbacks.dead_units": "callbacks.dead_units.images=16"}
        if any(word.startswith("callbacks=") for word in overrides):
            cheap = {}
        few = [word for key, word in cheap.items() if not any(key in word for word in overrides)]
        return validate(compose_config([*SMALL, f"data.root={data_root}", *few, *overrides]))

    return compose


@pytest.fixture(scope="session")
def run_folder(shared_folder: Path, settings: Callable[..., Settings]) -> Path:
    """A run's folder with best.ckpt: a small network trained for 80 steps, with data.test_time_flip."""
    folder = shared_folder / "runs" / "small"
    folder.mkdir(parents=True, exist_ok=True)
    best = folder / "checkpoints" / "best.ckpt"
    with FileLock(folder / ".test-lock"):
        if not best.exists():
            train_for_a_moment(
                settings("name=small", "data.test_time_flip=true", "trainer.precision=32-true", "threads=1"), best
            )
    return folder


def train_for_a_moment(chosen: Settings, path: Path) -> None:
    import torch
    from torch.nn import functional

    from nin.checkpoints.checkpoint_io import AtomicCheckpointIO
    from nin.data.sources import describe, load
    from nin.data.transforms import resize
    from nin.training.classifier import Classifier

    torch.manual_seed(0)
    known = describe(chosen.data)
    module = Classifier(chosen, known.class_names, known.channels)
    images, labels = map(torch.from_numpy, load(chosen.data, "train"))
    optimizer = torch.optim.Adam(module.network.parameters(), 0.01)
    for i in range(80):  # enough to tell most classes apart
        batch = resize(images[32 * i : 32 * i + 32], 28)
        loss = functional.cross_entropy(module.network(batch), labels[32 * i : 32 * i + 32])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    content = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    checkpoint = {**content, "global_step": 80, "epoch": 1}
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)


@pytest.fixture(scope="session")
def color_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A color network's run, for tests that take minutes; its images are in ``photos`` beside ``outputs``."""
    base = tmp_path_factory.mktemp("color")
    # Larger than the network's images: files are resized when they are decoded.
    write_folder(base / "photos", {"train": 100, "test": 70}, size=40)
    overrides = ["experiment=cpu", "trainer=cpu", "threads=1", "trainer.max_epochs=1", "data=folder", "name=small"]
    overrides += ["data.root=photos", "data.image_size=28", "data.batch_size=16", "data.cache=cache"]
    done = nin("train", *overrides, cwd=base)
    assert done.returncode == 0, done.stderr
    return base / "outputs" / "runs" / "small"


@pytest.fixture(scope="session")
def export(run_folder: Path, data_root: Path) -> Path:
    """`run_folder` exported to ONNX, which checks it on the whole test set."""
    from nin.commands.export import main

    path = run_folder / "export" / "model.onnx"
    with FileLock(run_folder / ".test-lock"):
        if not path.exists():
            assert main([str(run_folder), f"data.root={data_root}"]) == 0
    return path


@pytest.fixture(scope="session")
def test_images(data_root: Path) -> np.ndarray:
    """The garments' test images, ``(2000, 28, 28)`` uint8."""
    from nin.data.idx import parse_idx

    return parse_idx((data_root / "Garments" / "raw" / "t10k-images-idx3-ubyte").read_bytes())
