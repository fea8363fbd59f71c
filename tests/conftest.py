"""Shared by all tests: settings in one process, the garments drawn once, and the real data where NIN_DATA has it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests run side by side: with all threads each they would wait for one another. Before torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from nin.checks import read
from nin.config import composed
from nin.settings import Settings

# A whole run in a second or two: two epochs of six batches of the garments at 28x28.
SMALL = (
    "experiment=quickstart",
    "trainer=cpu",
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=6",
    "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=2",
    "data.batch_size=32",
    "trainer.log_every_n_steps=4",
    "model.widths=[8,16]",
    "model.last_width=16",
    "model.dropout=0.2",
)


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the garments, drawn once a session."""
    from nin.data.files import prepare

    root = tmp_path_factory.mktemp("data")
    prepare(read(composed(["data=garments", "model=nin_small", f"data.root={root}"])).data)
    return root


@pytest.fixture(scope="session")
def real_root() -> Path:
    """Holds Fashion-MNIST; never the repository's own data/, which a test must not depend on."""
    root = os.environ.get("NIN_DATA")
    if not root or not (Path(root) / "FashionMNIST" / "raw").is_dir():
        pytest.skip("NIN_DATA does not point at Fashion-MNIST")
    return Path(root)


@pytest.fixture(scope="session")
def settings(data_root: Path) -> Callable[..., Settings]:
    """Composes settings of a small run on the garments, with more overrides behind."""
    return lambda *overrides: read(composed([*SMALL, f"data.root={data_root}", *overrides]))


# Without cached bytecode every process would compile torch and Lightning anew.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("NIN_DATA", "PYTHONDONTWRITEBYTECODE")}


def nin(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the program as a person would, warnings being errors."""
    return subprocess.run(
        [sys.executable, "-m", "nin", *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def start(*arguments: object, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """As ``nin``, and goes on while it runs."""
    command = [sys.executable, "-m", "nin", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=cwd, env=ENVIRONMENT | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 90) -> None:
    begun = time.monotonic()
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < begun + seconds, f"no {path}"
        time.sleep(0.005)
