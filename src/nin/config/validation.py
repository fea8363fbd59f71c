"""From a composed config to `Settings`, or to one message that lists every error with its remedy."""

import difflib
import itertools
import json
import re
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from nin.config import rules
from nin.config.networks import Section
from nin.config.schema import MAY_CHANGE, EarlyStopping, Settings, UserError, flat, is_within


def validate(config: DictConfig) -> Settings:
    """Returns the typed form of a composed config.

    Raises:
        UserError: lists every wrong type, unknown key, value out of range and impossible combination.
    """
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    return validate_plain(plain)


def validate_plain(plain: Any) -> Settings:
    """`validate` for plain values, as checkpoints and run folders store them: no interpolation is resolved.

    Args:
        plain: a dictionary, or a config whose interpolations are left as they are.
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
    combinations = rules.find_errors(settings or _construct_unchecked(plain), errors)
    errors |= _early_stopping_errors(plain)
    if errors or combinations or settings is None:
        raise UserError(*dict.fromkeys([*errors.values(), *combinations]))
    return settings


def _construct_unchecked(plain: dict) -> Settings:
    """Settings whose valid keys can be read by the same names as those of checked settings."""
    sections = {}
    for key, field in Settings.model_fields.items():
        for section in _sections(field.annotation):
            values = plain.get(key)
            if isinstance(values, dict) and values.get("name") in (None, *_names(section)):
                sections[key] = section.model_construct(**values)
    return Settings.model_construct(**{**plain, **sections})


def _early_stopping_errors(plain: dict) -> dict[str, str]:
    errors: dict[str, str] = {}
    callbacks = plain.get("callbacks")
    for name, entry in (callbacks if isinstance(callbacks, dict) else {}).items():
        target = str(entry.get("_target_")) if isinstance(entry, dict) else ""
        if not (target.startswith("lightning.pytorch.callbacks.") and target.endswith(".EarlyStopping")):
            continue
        arguments = {key: value for key, value in entry.items() if not key.startswith("_")}
        try:
            EarlyStopping.model_validate(arguments)
        except ValidationError as error:
            errors |= format_errors(error, EarlyStopping, arguments, f"callbacks.{name}.")
    return errors


def format_errors(error: ValidationError, section: type[Section], plain: dict, prefix: str = "") -> dict[str, str]:
    """One message per key, from the errors that pydantic found in ``plain``, the values of ``section``."""
    return {
        prefix + key: prefix + _format_error(key, list(errors), section)
        for key, errors in itertools.groupby(error.errors(), lambda e: _key(e, plain))
    }


def _key(error: ErrorDetails, plain: dict) -> str:
    """The config key of an error. The error's path also names the members of unions, which are not part of the key."""
    path, node = [], plain
    for part in error["loc"]:
        if (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int)):
            path.append(str(part))
            node = node[part]
        elif error["type"] == "missing" and part == error["loc"][-1]:
            path.append(str(part))
    return ".".join(path)


def _format_error(key: str, errors: list[ErrorDetails], section: type[Section]) -> str:
    """One error in words: the key, its value, the rule, the remedy."""
    first = errors[0]
    match first["type"]:
        case "extra_forbidden":
            known = _known_keys(section, first["loc"][:-1])
            return f"{key}: no such key; {did_you_mean(str(first['loc'][-1]), known)}"
        case "missing":
            return f"{key}: missing; conf/ has a value for every key, give it one or leave it as it was"
        case "union_tag_invalid":
            return f"{key}.name={first['ctx']['tag']}: must be one of {first['ctx']['expected_tags']}"
        case "value_error" if isinstance(first["input"], dict):  # of a section: the message names the key
            return f"{key}: {first['ctx']['error']}"
        case "string_pattern_mismatch":
            rule = "one plain word that can name a folder: letters, digits and _-=,+@, and . not in front"
            return f"{key}={shorten(json.dumps(first['input']))}: must be {rule}"
    expected = list(dict.fromkeys(_expectation(error) for error in errors))
    if all(rule.startswith("be ") for rule in expected):
        expected = [expected[0], *(rule.removeprefix("be ") for rule in expected[1:])]
    return f"{key}={shorten(json.dumps(first['input']))}: must {' or '.join(expected)}"


def _expectation(error: ErrorDetails) -> str:
    """What a value must do or be: "have at least 1 item" of "List should have at least 1 item after validation, …"."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"]).removeprefix("must ")
    if error["type"] == "int_parsing_size":
        return "be a number of fewer digits"
    return re.sub(r"^\w+ should |,? after validation.*$", "", error["msg"])


def shorten(text: str, length: int = 80) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _known_keys(section: type[Section], loc: tuple) -> list[str]:
    branches: list[type[Section]] = []
    for part in loc:
        if part in section.model_fields:
            branches = _sections(section.model_fields[part].annotation)
            section = branches[0]
        else:
            section = next(b for b in branches if part in _names(b))
    return list(section.model_fields)


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _names(section: type[Section]) -> tuple[str, ...]:
    return get_args(section.model_fields["name"].annotation) if "name" in section.model_fields else ()


def did_you_mean(word: str, known: list[str]) -> str:
    """The end of a message about an unknown ``word``: the most similar ``known`` word, if any, and all of them."""
    close = difflib.get_close_matches(word, known, n=1)
    there_are = f"here are: {', '.join(known)}"
    return f"did you mean {close[0]}? T{there_are}" if close else f"t{there_are}"


def differences(before: Settings, now: Settings) -> list[str]:
    """The keys, with both values, that make ``now`` another experiment than ``before``; none if it may be resumed."""

    def fixed_values(settings: Settings) -> dict[str, Any]:
        keys = flat(settings.model_dump(mode="json"))
        # The learning rates of other schedules depend on the number of steps.
        constant_lr = settings.schedule.name == "constant" and not settings.schedule.warmup
        may_change = [key for key in MAY_CHANGE if constant_lr or key != "trainer.max_epochs"]
        return {k: v for k, v in keys.items() if not is_within(k, may_change)}

    there, here = fixed_values(before), fixed_values(now)
    return [
        f"{key}: {json.dumps(there.get(key))} there, {json.dumps(here.get(key))} now"
        for key in dict.fromkeys([*there, *here])
        if there.get(key) != here.get(key)
    ]
