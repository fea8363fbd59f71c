"""What the YAML files in a sweep's folder say. They may come from elsewhere: any other content is ignored."""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from nin.config.changes import changes_training
from nin.config.errors import printable

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, None if it can't be read."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError, RecursionError):
        if path.is_file():  # not a named pipe, which would be waited for
            return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    return None


def read_values(path: Path, keys: Iterable[str]) -> dict[str, str]:
    """The values of ``keys`` in a job's config, and of what may change when it is resumed, but is part of its result.

    These are ``trainer.max_epochs``, the names and arguments of callbacks that may change training, and ``data.root``
    of ``data=folder``.
    """
    config = read_yaml(path)
    values = {key: _value_at(config, key) for key in (*keys, "trainer.max_epochs")}
    if _value_at(config, "data.name") == "folder":
        values["data.root"] = _value_at(config, "data.root")
    callbacks = _value_at(config, "callbacks")
    if isinstance(callbacks, dict):
        entries = {k: v for k, v in callbacks.items() if isinstance(v, dict) and changes_training(v)}
        values["callbacks"] = " ".join(map(str, entries))
        for name, arguments in entries.items():
            values |= {f"callbacks.{name}.{key}": value for key, value in arguments.items()}
    return {
        printable(key): printable(value if isinstance(value, str) else json.dumps(value))  # true, not True
        for key, value in values.items()
        if isinstance(value, str | int | float)
    }


def _value_at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config
