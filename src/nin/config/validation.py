"""From a compose_config config to ``Settings``, or to one message that lists every mistake with its remedy."""

import contextlib
import difflib
import itertools
import json
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from nin.config.networks import Section, smallest_image_size
from nin.config.schema import MAY_CHANGE, TRAINING_IMAGES, Settings, UserError, flat, is_within


def validate(config: DictConfig) -> Settings:
    """The typed form of a compose_config config.

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
    errors: dict[str, None] = {}
    settings = None
    try:
        settings = Settings.model_validate(plain)
    except ValidationError as error:
        for key, rules in itertools.groupby(error.errors(), lambda e: _key(e, plain)):
            errors[_told(key, list(rules))] = None
    errors |= dict.fromkeys(_impossible_combinations(plain))
    if errors:
        raise UserError(*errors)
    return settings


def _key(error: ErrorDetails, plain: dict) -> str:
    """The config key that an error is about. Its path also names a union's branches, which the config does not."""
    path, node = [], plain
    for part in error["loc"]:
        if (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int)):
            path.append(str(part))
            node = node[part]
        elif error["type"] == "missing" and part == error["loc"][-1]:
            path.append(str(part))
    return ".".join(path)


def _told(key: str, errors: list[ErrorDetails]) -> str:
    """One mistake in words: the key, its value, the rule, the remedy."""
    first = errors[0]
    match first["type"]:
        case "extra_forbidden":
            return f"{key}: no such key; {did_you_mean(str(first['loc'][-1]), _known_keys(first['loc'][:-1]))}"
        case "missing":
            return f"{key}: missing; conf/ has a value for every key, give it one or leave it as it was"
        case "union_tag_invalid":
            return f"{key}.name={first['ctx']['tag']}: must be one of {first['ctx']['expected_tags']}"
        case "value_error":
            return f"{key}: {first['ctx']['error']}"
        case "string_pattern_mismatch":
            rule = "one plain word that can name a folder: letters, digits and _-=,+@, and . not in front"
            return f"{key}={json.dumps(first['input'])}: must be {rule}"
    rules = dict.fromkeys(e["msg"].replace("Input should be ", "").replace("String should ", "") for e in errors)
    return f"{key}={json.dumps(first['input'])}: must be {' or '.join(rules)}"


def _known_keys(loc: tuple) -> list[str]:
    section, branches = Settings, []
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
    """What somebody who typed ``word`` may have did_you_mean, for the end of a message."""
    close = difflib.get_close_matches(word, known, n=1)
    there_are = f"here are: {', '.join(known)}"
    return f"did you mean {close[0]}? T{there_are}" if close else f"t{there_are}"


def _impossible_combinations(plain: dict) -> list[str]:
    """Mistakes beyond types and ranges; most show only when several keys are prepare_images together."""
    # Unchecked, so that one wrong key does not hide another; a rule whose own keys are wrong is passed over.
    sections = {}
    for key, field in Settings.model_fields.items():
        for section in _sections(field.annotation):
            values = plain.get(key)
            if isinstance(values, dict) and values.get("name") in (None, *_names(section)):
                sections[key] = section.model_construct(**values)
    unchecked = Settings.model_construct(**{**plain, **sections})
    found = []
    for rule in (
        _image_size_fits,
        _some_images_are_left,
        _something_chooses_the_best,
        _training_ends,
        _nothing_is_left_out,
        _watched,
    ):
        with contextlib.suppress(TypeError, AttributeError, KeyError):
            found += [mistake] if (mistake := rule(unchecked)) else []
    return found


def _image_size_fits(settings: Settings) -> str | None:
    size, smallest = settings.data.image_size, smallest_image_size(settings.model)
    if size >= smallest:
        return None
    small = ", or model=nin_small, which is made for 28" if size >= 28 else ""
    return (
        f"data.image_size={size}: {settings.model.name} needs at least {smallest} pixels a side; "
        f"choose data.image_size={smallest} or more{small}"
    )


def _some_images_are_left(settings: Settings) -> str | None:
    held_out, there = settings.data.val_size, TRAINING_IMAGES[settings.data.name]
    if held_out < there:
        return None
    return f"data.val_size={held_out}: {settings.data.name} has {there} training images; hold out fewer"


def _something_chooses_the_best(settings: Settings) -> str | None:
    if settings.data.val_size or settings.data.score_each_epoch == "test":
        return None
    return (
        "data.val_size=0: nothing is held out to choose the best checkpoint by; choose data.val_size=5000, or "
        "data.score_each_epoch=test as the notebooks do (the last epoch's weights then count as the best)"
    )


def _training_ends(settings: Settings) -> str | None:
    trainer, schedule = settings.trainer, settings.schedule
    if trainer.max_epochs not in (-1, None) or trainer.max_steps != -1:
        return None
    if schedule.name != "constant" or schedule.warmup:
        return f"schedule={schedule.name}: needs to know the last step; set trainer.max_epochs or trainer.max_steps"
    if trainer.max_time is None:
        given = "null" if trainer.max_epochs is None else trainer.max_epochs
        return f"trainer.max_epochs={given}: nothing says when training ends; set it, or trainer.max_steps"
    return None


def _nothing_is_left_out(settings: Settings) -> str | None:
    for key in ("max_epochs", "max_steps", "limit_train_batches"):
        if getattr(settings.trainer, key) == 0:
            return f"trainer.{key}=0: nothing would be trained; give 1 or more"
    if settings.trainer.limit_test_batches == 0:
        return "trainer.limit_test_batches=0: a run ends with its test; give 1 or more"
    if settings.trainer.barebones:
        return "trainer.barebones=true: it would leave no checkpoint, log or result; set it to false"
    return None


def _watched(settings: Settings) -> str | None:
    """Early stopping and the like need the metric that they watch."""
    unscored = settings.data.score_each_epoch == "test" or settings.trainer.limit_val_batches == 0
    for name, callback in settings.callbacks.items():
        if unscored and str(callback.get("monitor")).startswith("val/"):
            return f"callbacks.{name}.monitor={callback['monitor']}: nothing is score under that name in this run"
    return None


def differences(before: Settings, now: Settings) -> list[str]:
    """The keys, with both values, that make ``now`` another experiment than ``before``; none if it may go on."""

    def fixed(settings: Settings) -> dict[str, Any]:
        keys = flat(settings.model_dump(mode="json"))
        # A schedule with a last step would have had other learning rates all along.
        endless = settings.schedule.name == "constant" and not settings.schedule.warmup
        may_change = [key for key in MAY_CHANGE if endless or key != "trainer.max_epochs"]
        return {k: v for k, v in keys.items() if not is_within(k, may_change)}

    there, here = fixed(before), fixed(now)
    return [
        f"{key}: {json.dumps(there.get(key))} there, {json.dumps(here.get(key))} now"
        for key in dict.fromkeys([*there, *here])
        if there.get(key) != here.get(key)
    ]
