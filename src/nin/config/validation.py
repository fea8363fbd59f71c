"""Converts a composed config to `Settings`, with checks of types, ranges and the rules on several keys at once.

Imports no torch.
"""

import contextlib
import json
from collections.abc import Collection
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException
from pydantic import ValidationError

from nin.config.errors import (
    did_you_mean,
    format_errors,
    list_options,
    names_of,
    read_first_line,
    sections_of,
    shorten,
)
from nin.config.keys import is_within
from nin.config.rules import RULES
from nin.config.schema import CONF, DeadUnitMonitor, EarlyStopping, ImageLogger, Settings, UserError
from nin.config.types import OwnClass, Section

# Hydra would merge several options into one.
_ONE_OPTION = ("model", "data", "loss", "optimizer", "schedule", "trainer")


def find_override_errors(overrides: list[str]) -> list[str]:
    """Errors of a command line that Hydra accepts, as a key with two values, or a name that is read as a number."""
    errors: list[str] = []
    values: dict[str, object] = {}
    parsed = OverridesParser.create().parse_overrides(overrides)
    deletions = {override.key_or_group: override.input_line for override in parsed if override.is_delete()}
    for override in parsed:
        if override.is_delete():
            continue
        key, value = override.get_key_element().lstrip("+"), override.value()
        # Hydra would delete it, whatever the order is. With + or ++ it replaces what is deleted.
        if key in deletions and not (override.is_add() or override.is_force_add()):
            errors.append(f"{override.input_line}: {deletions[key]} deletes this key; leave one of the two out")
        if key in values and values[key] != value:
            errors.append(f"{key}: has two values, {values[key]} and {value}; give it once")
        values[key] = value
        if isinstance(value, list) and key in _ONE_OPTION:
            errors.append(f"{override.input_line}: {key} is a config group of which one option applies; give one")
        if "." not in key and isinstance(value, str) and ".." in value.split("/") and (CONF / key).is_dir():
            close = did_you_mean(value.split("/")[-1], list_options(key))
            errors.append(f"{override.input_line}: no such {key}; {close}")
        text = str(override.input_line).partition("=")[2]
        if key == "name" and type(value) in (int, float) and text != str(value):
            remedy = f"""quote it twice to keep it, as in 'name="{text}"'"""
            errors.append(f"{override.input_line}: Hydra reads this as the number {value}; {remedy}")
    return errors


def validate(config: DictConfig) -> Settings:
    """Returns the typed form of a composed config.

    Raises:
        UserError: lists every wrong type, unknown key, value out of range and impossible combination.
    """
    unresolved = OmegaConf.to_container(config, resolve=False)
    for group in ("model", "data"):  # others refer to their keys
        if isinstance(unresolved, dict) and isinstance(option := unresolved.get(group), str):
            raise UserError(
                f"{group}={option}: has keys of its own; a file chooses an option of a group in its defaults, as in "
                f"defaults: [override /{group}: {option}]"
            )
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        if isinstance(error, MissingMandatoryValue):
            if error.full_key == "data.root":
                raise UserError(
                    "data.root: must be given: the folder that holds train/<class>/, as in data.root=photos"
                ) from error
            raise UserError(f"{error.full_key}: must be given, as in {error.full_key}=…") from error
        if isinstance(error, InterpolationKeyError) and "model.input_size" in str(error):
            if not {"name", "_target_"} & {*(config.get("model") or {})}:
                raise UserError(
                    f"model: no option is chosen; give model={' or '.join(list_options('model'))}"
                ) from error
            raise UserError(
                "model.input_size: missing; the YAML of a network gives the image size that it is made for, as in "
                "input_size: 32"
            ) from error
        raise UserError(f"{error.full_key}: {read_first_line(error)}") from error
    return validate_plain(plain)


def validate_plain(plain: Any) -> Settings:
    """`validate` for plain values, as checkpoints and run folders store them: no interpolation is resolved.

    Raises as `validate` does.
    """
    if not isinstance(plain, dict):
        raise UserError(f"the config must be a dictionary, not {shorten(json.dumps(plain, default=str))}")
    errors: dict[str, str] = {}  # the message for each key
    try:
        settings = Settings.model_validate(plain)
    except ValidationError as error:
        errors |= format_errors(error, Settings, plain)
        # One invalid key must not hide the errors of others, so the rules also get the valid keys of invalid settings.
        combinations = find_errors(construct_unchecked(plain, errors), AttributeError)
    else:
        combinations = find_errors(settings)
    errors |= _find_callback_errors(plain)
    if errors or combinations:
        raise UserError(*dict.fromkeys([*errors.values(), *combinations]))
    return settings


def _find_callback_errors(plain: dict) -> dict[str, str]:
    errors: dict[str, str] = {}
    callbacks = plain.get("callbacks")
    for name, entry in (callbacks if isinstance(callbacks, dict) else {}).items():
        section = _find_callback_section(str(entry.get("_target_"))) if isinstance(entry, dict) else None
        if section is None:
            continue
        arguments = {key: value for key, value in entry.items() if not str(key).startswith("_")}
        try:
            section.model_validate(arguments)
        except ValidationError as error:
            errors |= format_errors(error, section, arguments, f"callbacks.{name}.")
    return errors


def _find_callback_section(target: str) -> type[Section] | None:
    """The types and ranges of a callback's arguments; None for one that checks its arguments itself."""
    if target.startswith("lightning.pytorch.callbacks.") and target.endswith(".EarlyStopping"):
        return EarlyStopping
    own: dict[str, type[Section]] = {
        "nin.training.callbacks.dead_units.DeadUnitMonitor": DeadUnitMonitor,
        "nin.training.callbacks.tensorboard.ImageLogger": ImageLogger,
    }
    return own.get(target)


def construct_unchecked(plain: dict, invalid: Collection[str]) -> Settings:
    """Builds Settings from the valid keys of a config with errors; to read an ``invalid`` one is an AttributeError."""

    def has_errors(key: str) -> bool:
        return any(is_within(one, [key]) for one in invalid)

    values = {key: value for key, value in plain.items() if not has_errors(key)}
    for key, field in Settings.model_fields.items():
        given = plain.get(key)
        if key in invalid or not isinstance(given, dict):
            continue
        valid = {name: value for name, value in given.items() if not has_errors(f"{key}.{name}")}
        for section in sections_of(field.annotation):
            is_own = issubclass(section, OwnClass)
            if is_own == ("_target_" in given) and (is_own or given.get("name") in (None, *names_of(section))):
                values[key] = section.model_construct(**valid)
    return Settings.model_construct(**values)


def find_errors(settings: Settings, *missing: type[Exception]) -> list[str]:
    """Returns the errors of every rule.

    Args:
        missing: the error that ends a rule where it reads a key without a valid value.
    """
    errors: list[str] = []
    for rule in RULES:
        with contextlib.suppress(*missing):
            for error in rule(settings):  # one at a time: those before a rule ends are kept
                errors.append(error)
    return errors
