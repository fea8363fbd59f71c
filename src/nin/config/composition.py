"""Composes ``conf/`` outside ``hydra.main``, and reports all errors of a command line at once."""

import contextlib
import functools
import re
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nin.config.errors import read_first_line
from nin.config.keys import is_within
from nin.config.override_errors import format_error, quote_override
from nin.config.schema import CONF, Settings, UserError
from nin.config.validation import find_override_errors, validate

# Hydra raises the built-in ones for values that it does not expect: model=null, hydra.sweeper.params={seed:1}, or an
# integer of more digits than Python reads.
COMPOSITION_ERRORS = (
    HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, AttributeError, AssertionError,
    RecursionError,  # an experiment's file that includes the experiment, which is itself
)  # fmt: skip

# The keys of the group trainer that decide where a run trains.
_DEVICE = ("trainer.accelerator", "trainer.strategy", "trainer.devices")


def compose_settings(overrides: list[str], config_name: str = "train") -> Settings:
    """Returns the settings that a command line requests.

    Args:
        config_name: of the config to start from (``--config-name``).

    Raises:
        UserError: lists every error in it.
    """
    try:
        config = compose_config(overrides, config_name)
    except COMPOSITION_ERRORS as error:
        raise collect_errors(error, overrides, config_name=config_name) from None
    if errors := find_override_errors(overrides):
        raise UserError(*errors)
    return validate(config)


def compose_config(overrides: list[str], config_name: str = "train", with_hydra: bool = False) -> DictConfig:
    """Returns the config that Hydra composes from ``conf/``, or the folders of `open_hydra`, and the overrides.

    Args:
        with_hydra: whether it has the section ``hydra``.
    """
    if GlobalHydra.instance().is_initialized():
        return compose(config_name, overrides, with_hydra)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(config_name, overrides, with_hydra)


def parse_overrides(words: list[str]) -> list[Override]:
    """Parses overrides. ``glob(*)`` finds the options of a group where Hydra was opened, as in every Hydra command."""
    hydra = GlobalHydra.instance().hydra
    return OverridesParser.create(hydra.config_loader if hydra else None).parse_overrides(words)


def apply_overrides(settings: Settings, overrides: list[str], may_change: tuple[str, ...]) -> Settings:
    """Returns ``settings`` of an earlier run with some keys overridden.

    ``trainer=cpu`` overrides where the run trains (accelerator, strategy, devices), and not for how long.

    Args:
        may_change: the keys, or prefixes of keys, that may be overridden.

    Raises:
        UserError: lists every error, or every key that is not among ``may_change``.
    """
    config = OmegaConf.create(settings.model_dump())
    words = overrides
    try:
        parsed = parse_overrides(overrides)
        if swept := [override.input_line or "" for override in parsed if override.is_sweep_override()]:
            rule = "takes one value here; a text with a comma is quoted, as in"
            raise UserError(*(f"{word}: {rule} {quote_override(word)}" for word in swept))
        words = [word for override in parsed if (word := _for_defaults(override, config))]
        requested = compose_config(words)
    except COMPOSITION_ERRORS as error:
        raise collect_errors(error, words) from None
    if errors := find_override_errors(overrides):
        raise UserError(*errors)
    changes = [(key, o) for o in parsed for key in (_DEVICE if o.key_or_group == "trainer" else (o.key_or_group,))]
    if refused := dict.fromkeys(o.input_line for key, o in changes if not is_within(key, may_change)):
        *before, last = (f"{word}: can't be changed here" for word in refused)
        raise UserError(*before, f"{last}; these can: {', '.join(may_change)}")
    for key, override in changes:
        if override.is_delete():
            parent, _, last = key.rpartition(".")
            section = OmegaConf.select(config, parent) if parent else config
            if section:  # the earlier run may not have it
                section.pop(last, None)
        else:
            try:
                value = OmegaConf.select(requested, key)
            except OmegaConfBaseException as error:  # an interpolation, as ${oc.env:…}, that can't be resolved
                raise UserError(f"{override.input_line}: {read_first_line(error)}") from None
            OmegaConf.update(config, key, value, merge=False)
    return validate(config)


def _for_defaults(override: Override, earlier: DictConfig) -> str | None:
    """Rewrites ``override`` for the default config: a key of the ``earlier`` run gets ``++``; None for its deletion."""
    word, (parent, _, last) = override.input_line or "", override.key_or_group.rpartition(".")
    section = OmegaConf.select(earlier, parent) if parent else None
    if not isinstance(section, DictConfig) or last not in section:
        return word
    if override.is_delete():
        return None
    return word if word.startswith("+") else f"++{word}"


def collect_errors(
    first: Exception, overrides: list[str], config_dir: str | None = None, config_name: str = "train"
) -> UserError:
    """Returns all errors of a command line, and those of the config that its valid overrides give.

    Hydra reports one error per composition, here ``first``, so the config is composed with one override after the
    other, without those that fail.
    """

    @functools.cache  # a composition takes a tenth of a second
    def composed(*words: str, with_hydra: bool = False) -> Any:  # a config, or the error in it
        try:
            return compose_config(list(words), config_name, with_hydra)
        except COMPOSITION_ERRORS as error:
            return error

    if isinstance(error := composed(), Exception):
        if str(error) != str(first):  # a config that needs an override, as in model: ???
            return UserError(read_first_line(first))
        given = {"--config-dir": config_dir, "--config-name": config_name if config_name != "train" else None}
        options = " ".join(f"{option} {value}" for option, value in given.items() if value)
        return UserError(f"{options}{': ' if options else ''}{read_first_line(error)}")
    errors: list[str] = []
    valid: list[str] = []
    # Groups first: whether a key exists depends on the chosen options.
    rest = sorted(overrides, key=lambda o: "." in o.partition("=")[0])
    for word in rest:
        if isinstance(error := composed(*valid, word), Exception):
            errors.append(format_error(word, error, composed(*valid, with_hydra="hydra." in word)))
        else:
            valid.append(word)
    errors += find_override_errors(valid)
    try:
        validate(composed(*valid))
    except UserError as more:
        errors += more.errors
    if not errors and (unknown := re.match(r"Could not override '(.+)'", str(first))):
        errors = [
            f"{unknown[1]}: Hydra composes a sweep also without what it varies, and that config has no such key; write "
            f"++{unknown[1]}=…"
        ]
    return UserError(*(errors or [read_first_line(first)]))


def first_job_overrides(overrides: list[str]) -> list[str]:
    """A sweep's overrides with only the first value of each swept key; those without any value are left out."""
    job = []
    for word in overrides:
        try:
            (override,) = parse_overrides([word])
        except (HydraException, ValueError):  # no override, or a number of too many digits: kept, and reported later
            job.append(word)
            continue
        first: str | None = word
        if override.is_interval_sweep():  # a search has intervals
            first = str(override.value().start)  # type: ignore[union-attr]
        elif override.is_discrete_sweep():
            first = _first_value(override)
        if override.is_sweep_override():
            first = None if first is None else f"{override.get_key_element()}={first}"
        job += [] if first is None else [first]
    return job


def _first_value(override: Override) -> str | None:
    with contextlib.suppress(ValueError, ArithmeticError):  # range(0,3,0), range(0,nan)
        return next(override.sweep_string_iterator(), None)
    return None
