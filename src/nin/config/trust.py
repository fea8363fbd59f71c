"""Checks of configs that come from a run folder, a checkpoint or an export.

They import no class without permission, and write nothing outside the run's folder.
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.utils import get_class

from nin.config.composition import compose_settings
from nin.config.data_sets import AnyData
from nin.config.keys import is_within, split_override
from nin.config.schema import Data, FolderData, OwnClass, Settings, UserError

_TRUSTED = ("nin", "lightning")
# The sections that may name a class of the user's own, and those of them that a trained network needs.
_OWN_CLASSES = ("model", "data", "loss", "optimizer", "schedule")
OF_TRAINED = ("model", "data")
# Classes of torch that need no permission.
_OF_TORCH = {"loss": r"torch\.nn\.\w+Loss", "optimizer": r"torch\.optim\..+", "schedule": r"torch\.optim\..+"}
# The remedy of a refusal, for the class's module.
_ALLOW = "add --allow {0}"
# Names of arguments that are a folder, a file or an address: dirpath, save_dir, exclude_batches_path, tracking_uri.
_PLACE = re.compile(r"(dir|path|file|location|uri|url|host)$")


def require_trusted_targets(stored: Settings, allowed: list[str], overrides: Iterable[str] = ()) -> None:
    """Checks the loggers and callbacks of a stored config before anything is imported for them.

    Args:
        allowed: names of further modules whose classes the config may name.
        overrides: of the user, which replace places that the config names.

    Raises:
        UserError: names each ``_target_`` that is neither a network or a callback of this project, a callback of
            Lightning nor a logger for TensorBoard or CSV files, and each path or address that leads out of the run's
            folder.
    """
    given = [split_override(word)[0] for word in overrides]
    refused = [*_find_refused_classes(stored, allowed, _OWN_CLASSES), *_find_refused_entries(stored, allowed)]
    if errors := [*_format_refusals(refused, _ALLOW), *_find_outer_places(stored, given)]:
        raise UserError(*errors)


def find_modules_to_allow(stored: Settings) -> list[str] | None:
    """The modules that `require_trusted_targets` must be allowed; None if a place is to be confirmed as well."""
    if any(_find_outer_places(stored, [])):
        return None
    return _modules([*_find_refused_classes(stored, [], _OWN_CLASSES), *_find_refused_entries(stored, [])])


def find_modules_of_trained(stored: Settings) -> list[str]:
    """The modules that must be allowed to use the trained network, without those that only training needs."""
    return _modules(_find_refused_classes(stored, [], OF_TRAINED))


def _modules(refused: Iterable[tuple[str, str]]) -> list[str]:
    return list(dict.fromkeys(target.partition(".")[0] for _, target in refused))


def require_allowed_classes(
    stored: Settings,
    allowed: list[str],
    groups: tuple[str, ...] = _OWN_CLASSES,
    remedy: str = _ALLOW + ' (in Python: allow=["{0}"])',
) -> None:
    """Raises UserError if a section in ``groups`` names a class of the user's own outside the modules ``allowed``."""
    if errors := _format_refusals(_find_refused_classes(stored, allowed, groups), remedy):
        raise UserError(*errors)


def _find_refused_classes(stored: Settings, allowed: list[str], groups: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """The keys and values of each ``_target_`` of a section that is refused."""
    for group in groups:
        section = getattr(stored, group)
        if not isinstance(section, OwnClass) or is_within(section.target, allowed):
            continue
        if group == "model" and _is_trusted(section.target, group, True):
            continue
        if group not in _OF_TORCH or not re.fullmatch(_OF_TORCH[group], section.target):
            yield f"{group}._target_", section.target


def _find_refused_entries(stored: Settings, allowed: list[str]) -> Iterator[tuple[str, str]]:
    """The same of the loggers and callbacks."""
    for group in ("logger", "callbacks"):
        for key, value in _leaves(getattr(stored, group), group):
            if not key.endswith("._target_") or is_within(str(value), allowed):
                continue
            if not _is_trusted(value, group, key.count(".") == 2):
                yield key, str(value)


def _find_outer_places(stored: Settings, given: list[str]) -> Iterator[str]:
    for group in ("logger", "callbacks"):
        for key, value in _leaves(getattr(stored, group), group):
            if key.endswith("._target_") or not isinstance(value, str) or not value or key in given:
                continue
            if _leads_out(key, value):
                yield f"{key}={value}: leads out of the run's folder; give {key}=… to confirm it"


def _leads_out(key: str, value: str) -> bool:
    """Whether a logger or callback would write outside the run's folder, or to another machine."""
    path, argument = Path(value), key.rpartition(".")[2]
    # A relative path is one in the working directory. An argument given by its position may be one.
    is_place = bool(_PLACE.search(argument)) or "._args_." in key
    return is_place or path.is_absolute() or ".." in path.parts or value.startswith("~") or "://" in value


def _format_refusals(refused: Iterable[tuple[str, str]], remedy: str) -> list[str]:
    """One message for each module that would have to be allowed, with the keys and classes."""
    modules: dict[str, list[str]] = {}
    for key, target in refused:
        modules.setdefault(target.partition(".")[0], []).append(f"{key}={target}")
    return [
        f"{', '.join(classes)}: a stored config may not import "
        f"{'this class; if you trust its' if len(classes) == 1 else 'these classes; if you trust their'} module, "
        f"{remedy.format(module)}"
        for module, classes in modules.items()
    ]


def _leaves(config: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(config, dict):
        for key, value in config.items():
            yield from _leaves(value, f"{prefix}.{key}")
    elif isinstance(config, list):
        for i, value in enumerate(config):
            yield from _leaves(value, f"{prefix}.{i}")
    else:
        yield prefix, config


def _is_trusted(target: Any, group: str, is_entry: bool) -> bool:
    """Whether ``target`` is a class of a trusted package, of the kind that the entry of ``group`` needs."""
    packages = ("nin.networks",) if group == "model" else _TRUSTED
    if not isinstance(target, str) or not is_entry or not is_within(target, packages):
        return False
    from lightning import Callback
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from torch import nn

    kinds = {
        "model": (nn.Module,),
        "logger": (TensorBoardLogger, CSVLogger),  # the others send what is logged to another machine
        "callbacks": (Callback,),
    }[group]
    try:
        found = get_class(target)
    except (HydraException, ImportError, ValueError, AttributeError):
        return False
    return issubclass(found, kinds) and is_within(found.__module__, packages)


def with_local_defaults(stored: Settings) -> Settings:
    """``stored`` without the addresses to download from, the place of a cache, the profiler and the model registry.

    Each applies only if it is given again.

    Raises:
        UserError: if a value holds an interpolation (``${oc.env:…}``), which OmegaConf would resolve.
    """
    if found := [f"{key}={value}" for key, value in _leaves(stored.model_dump(mode="json"), "") if "${" in str(value)]:
        raise UserError(*(f"{entry[1:]}: an interpolation; a stored config has plain values only" for entry in found))
    data: AnyData = stored.data
    if isinstance(data, FolderData):
        data = data.model_copy(update={"cache": None})
    elif isinstance(data, Data):
        data = data.model_copy(update={"mirrors": _default_data(data.name).mirrors})
    trainer = stored.trainer.model_copy(update={"profiler": None, "model_registry": None})
    return stored.model_copy(update={"data": data, "trainer": trainer})


def without_training_parts(stored: Settings) -> Settings:
    """``with_local_defaults``, without loggers, callbacks and loss, and with no more threads than there are cores."""
    threads = stored.threads if (stored.threads or 0) <= (os.cpu_count() or 1) else None
    without: dict[str, Any] = {"logger": {}, "callbacks": {}, "loss": None, "threads": threads}
    return with_local_defaults(stored).model_copy(update=without)


def with_local_root(stored: Settings) -> Settings:
    """``stored`` with this machine's own ``data.root``.

    A folder of images has no default place: the stored one is kept, unless another is given.
    """
    data: AnyData = stored.data
    if not isinstance(data, Data):
        return stored
    return stored.model_copy(update={"data": data.model_copy(update={"root": _default_data(data.name).root})})


def _default_data(name: str) -> Data:
    """The section of a data set as it is on this machine when nothing is overridden."""
    data = compose_settings([f"data={name}", "model=nin_small"]).data
    assert isinstance(data, Data)
    return data
