"""Shared by all tests: settings in one process, the garments drawn once, and the real data where NIN_DATA has it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests run side by side: with all threads each they would wait for one another. Before torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from helpers import SMALL
from nin.config.composition import compose_config
from nin.config.schema import Settings
from nin.config.validation import validate


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the garments, drawn once a session."""
    from nin.data.sources import prepare

    root = tmp_path_factory.mktemp("data")
    prepare(validate(compose_config(["data=garments", "model=nin_small", f"data.root={root}"])).data)
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
    return lambda *overrides: validate(compose_config([*SMALL, f"data.root={data_root}", *overrides]))
