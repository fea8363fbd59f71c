"""The versions of the code that a run uses: of the packages, of the checkout, and of the user's own classes."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from hydra.utils import get_object

from nin.config.errors import printable
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


def describe_changed_code(result: Mapping[str, Any], imported_only: bool = False) -> str:
    """The files of the user's own classes that are not those with which a run was trained; "" if there are none.

    Imports nothing: ``result`` may come from elsewhere.

    Args:
        result: of the run.
        imported_only: whether modules are left out that this process has not imported, as that of a loss in a test.
    """
    recorded = result.get("own_code")
    changed = []
    for module, source in recorded.items() if isinstance(recorded, dict) else ():
        before = source.get("sha256") if isinstance(source, dict) else None
        file = None if imported_only and module not in sys.modules else _find_source(module)
        if before and file and (now := _hash_source(file)) != before:
            changed.append(f"{file} (its SHA-256 begins with {now}, not with {before})")
    return printable(f"own code has changed since the run was trained: {', '.join(changed)}") if changed else ""


def _find_source(module: str) -> Path | None:
    """The file that ``import`` would take; None if there is none."""
    folders: Sequence[str] | None = None
    found = None
    parts = module.split(".")
    for i in range(len(parts)):
        spec = PathFinder.find_spec(".".join(parts[: i + 1]), folders)
        found, folders = (spec.origin, spec.submodule_search_locations or []) if spec else (None, [])
    return Path(found) if found and Path(found).is_file() else None


@functools.cache  # by the class: its file may have been changed since it was imported, as between the jobs of a sweep
def _read_source(own: Any) -> dict[str, str | None]:
    file = str(sys.modules[own.__module__].__file__)
    return {"sha256": _hash_source(Path(file)), "git_commit": read_git_commit(file)}


def _hash_source(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


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
