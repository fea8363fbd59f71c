"""The versions of the code that a run uses: of the packages, and of the checkout."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

# The packages that compute.
_PACKAGES = ("network-in-network", "torch", "torchvision", "lightning", "hydra-core", "torchmetrics", "numpy")


def read_versions() -> dict[str, str]:
    """The versions of Python and of the packages that compute."""
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version()} | packages


def read_git_commit() -> str | None:
    """The commit of the checkout that this code runs from, followed by "+" if files differ; None outside a checkout."""
    try:
        here: dict[str, Any] = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "timeout": 10}
        # Fails for an installed package, which may lie within another project's checkout.
        subprocess.run(["git", "ls-files", "--error-unmatch", __file__], check=True, **here)
        described = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
        return subprocess.run(described, check=True, **here).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
