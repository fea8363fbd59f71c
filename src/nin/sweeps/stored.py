"""Reads the files in a sweep's folder. They may come from elsewhere: any other content is ignored."""

import contextlib
import json
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from nin.config.changes import select_training_callbacks
from nin.config.errors import printable
from nin.config.rules import BATCH_LIMITS
from nin.runs.files import YAML_LOADER, read_yaml_text
from nin.runs.folder import RunFolder

_MISSING = object()  # the mark of a missing key; null is a value


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, None if it can't be read."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError, RecursionError):
        return yaml.load(read_yaml_text(path), Loader=YAML_LOADER)
    return None


def read_values(path: Path, keys: Iterable[str]) -> dict[str, str]:
    """The values of ``keys`` in a job's config, and of what may change when it is resumed, but is part of its result.

    These are ``trainer.max_epochs``, ``trainer.precision``, the names and arguments of callbacks that may change
    training, and ``data.root`` of ``data=folder``.
    """
    config = read_yaml(path)
    values = {key: _value_at(config, key) for key in (*keys, "trainer.max_epochs", "trainer.precision")}
    for group in ("data", "optimizer", "schedule"):  # their sections have a key with the option's name
        if isinstance(section := values.get(group), dict):
            values[group] = section.get("name")
    if _value_at(config, "data.name") == "folder":
        values["data.root"] = _value_at(config, "data.root")
    callbacks = _value_at(config, "callbacks")
    if isinstance(callbacks, dict):
        entries = select_training_callbacks(callbacks)
        values["callbacks"] = " ".join(map(str, entries))
        for name, arguments in entries.items():
            values |= {f"callbacks.{name}.{key}": value for key, value in arguments.items()}
    texts = {key: text for key, value in values.items() if (text := _as_override(key, value)) is not None}
    return {printable(key): printable(text) for key, text in texts.items()}


def _as_override(key: str, value: Any) -> str | None:
    """The value of ``key`` as in overrides: ``null``, ``true``, ``[48,128]``; None for a section or a missing key."""
    if isinstance(value, list):
        if any(isinstance(item, list) for item in value):  # in a file from elsewhere a list may hold itself
            return None
        items = [_as_override(key, item) for item in value]
        return None if None in items else f"[{','.join(map(str, items))}]"
    if value is None or isinstance(value, int | float):
        return _normalize_scalar(key, json.dumps(value))
    return value if isinstance(value, str) else None


def normalize_value(key: str, text: str) -> str:
    """The value of ``key`` in one form, however it was typed: ``0`` for ``0.0``, and a text without its quotes."""
    if text.startswith("[") and text.endswith("]"):
        return f"[{','.join(_normalize_scalar(key, item.strip()) for item in text[1:-1].split(','))}]"
    return _normalize_scalar(key, text)


def _normalize_scalar(key: str, text: str) -> str:
    if text in ("True", "False"):
        return text.lower()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1].replace(f"\\{text[0]}", text[0])
    try:
        number = float(text)
    except ValueError:
        return text
    if key in BATCH_LIMITS and not text.isdecimal():  # of these, 1 and 1.0 are two values
        return repr(number)
    return str(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)


def _value_at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part, _MISSING) if isinstance(config, dict) else _MISSING
    return config


def describe_hardware(result: dict[str, Any]) -> str:
    """The device, the precision and the version of torch of a run, from its result; empty if they are unknown."""
    match result:
        case {"device": str(device), "versions": {"torch": str(torch)}}:
            known = [device, result.get("precision"), f"torch {torch}"]  # results of earlier versions lack the second
            return printable(", ".join(str(part) for part in known if part))
    return ""


def is_running(folder: RunFolder) -> bool:
    """Whether the process that last claimed the folder is alive, as far as this machine knows."""
    # Trying the lock would claim the folder for a moment, and a job that starts then would be refused.
    state = folder.read_state()
    if state.get("host") != socket.gethostname() or not state.get("pid"):
        return False
    try:
        os.kill(state["pid"], 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True
