"""Converts a composed config to `Settings`, with checks of types, ranges and the rules on several keys at once.

Imports no torch.
"""

import json
from collections.abc import Collection
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException
from pydantic import ValidationError

from nin.config.errors import construct_unchecked, did_you_mean, format_errors, list_options, read_first_line, shorten
from nin.config.keys import is_within
from nin.config.rules import RULES
from nin.config.schema import CONF, DeadUnitMonitor, EarlyStopping, ImageLogger, Settings, UserError
from nin.config.types import Section

# Hydra would merge several options into one.
_ONE_OPTION = ("model", "data", "loss", "optimizer", "schedule", "trainer")


def find_override_errors(overrides: list[str]) -> list[str]:
    """Errors of a command line that Hydra accepts, as a key with two values, or a name that is read as a number."""
    errors: list[str] = []
    values: dict[str, object] = {}
    for override in OverridesParser.create().parse_overrides(overrides):
        key, value = override.get_key_element().lstrip("+~"), override.value()
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

    ``plain`` is a dictionary, or a config whose interpolations are left as they are. Raises as `validate` does.
    """
    if isinstance(plain, DictConfig):
        plain = OmegaConf.to_container(plain, resolve=False)
    if not isinstance(plain, dict):
        raise UserError(f"the config must be a dictionary, not {shorten(json.dumps(plain, default=str))}")
    errors: dict[str, str] = {}  # the message for each key
    settings = None
    try:
        settings = Settings.model_validate(plain)
    except ValidationError as error:
        errors |= format_errors(error, Settings, plain)
    # One invalid key must not hide the errors of others, so the rules also get the valid keys of invalid settings.
    combinations = find_errors(settings or construct_unchecked(plain), errors)
    errors |= _find_callback_errors(plain)
    if errors or combinations or settings is None:
        raise UserError(*dict.fromkeys([*errors.values(), *combinations]))
    return settings


def _find_callback_errors(plain: dict) -> dict[str, str]:
    errors: dict[str, str] = {}
    callbacks = plain.get("callbacks")
    for name, entry in (callbacks if isinstance(callbacks, dict) else {}).items():
        section = _find_callback_section(str(entry.get("_target_"))) if isinstance(entry, dict) else None
        if section is None:
            continue
        arguments = {key: value for key, value in entry.items() if not key.startswith("_")}
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


def find_errors(settings: Settings, invalid: Collection[str]) -> list[str]:
    """Returns the errors of every rule that reads no key in ``invalid``; those keys are already reported."""
    return [
        error
        for keys, rule in RULES
        if not any(is_within(key, keys) or any(is_within(k, [key]) for k in keys) for key in invalid)
        for error in rule(settings)
    ]
