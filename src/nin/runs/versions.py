"""The versions of the code that a run uses: of the packages, of the checkout, and of the user's own classes."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from hydra.utils import get_object

from nin.config.keys import flatten, is_within
from nin.config.schema import Settings

# The packages that compute.
_PACKAGES = ("network-in-network", "torch", "torchvision", "lightning", "hydra-core", "torchmetrics", "numpy")
# Packages whose classes a config may name, and whose versions are known.
_OTHERS = ["nin", "lightning", "torch", "torchvision", "torchmetrics"]


def read_versions() -> dict[str, str]:
    """The versions of Python and of the packages that compute."""
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version()} | packages


def read_own_code(settings: Settings) -> dict[str, dict[str, str | None]]:
    """The source files of the classes outside this project, Lightning and torch that ``settings`` name, by module.

    Of each file the first 16 digits of its SHA-256, and the commit of its checkout as `read_git_commit` returns it. The
    classes are imported, if they are not yet.
    """
    found = {}
    for key, target in flatten(settings.model_dump()).items():
        if key.endswith("._target_") and not is_within(str(target), _OTHERS):
            with contextlib.suppress(Exception):  # raised by the user's file; what needs the class raises it again
                own = get_object(target)
                if not is_within(own.__module__, _OTHERS):
                    found[own.__module__] = _read_source(own)
    return found


@functools.cache  # by the class: its file may have been changed since it was imported, as between the jobs of a sweep
def _read_source(own: Any) -> dict[str, str | None]:
    file = str(sys.modules[own.__module__].__file__)
    return {"sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16], "git_commit": read_git_commit(file)}


def read_git_commit(file: str | None = None) -> str | None:
    """The commit of the checkout that has ``file``, followed by "+" if files differ; None outside a checkout.

    Args:
        file: None for this project, which may also have been installed from a commit (``git+https://…``).
    """
    try:
        return _read_commit_of_checkout(file or __file__)
    except (OSError, subprocess.SubprocessError):
        return None if file else _read_installed_commit()


def _read_commit_of_checkout(file: str) -> str:
    here: dict[str, Any] = {"cwd": Path(file).parent, "capture_output": True, "text": True, "timeout": 10}
    # Fails for an installed package, which may lie within another project's checkout.
    subprocess.run(["git", "ls-files", "--error-unmatch", file], check=True, **here)
    described = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    return subprocess.run(described, check=True, **here).stdout.strip()


def _read_installed_commit() -> str | None:
    """The commit that pip or uv has noted where it installed this package from a repository."""
    found = importlib.metadata.distribution(_PACKAGES[0])
    if Path(str(found.locate_file("nin"))) != Path(__file__).parents[1]:
        return None  # other code is running than was installed, as with PYTHONPATH
    commit = json.loads(found.read_text("direct_url.json") or "{}").get("vcs_info", {}).get("commit_id")
    return commit if isinstance(commit, str) else None
