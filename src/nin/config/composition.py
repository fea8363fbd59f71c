"""Composes ``conf/`` outside ``hydra.main``, and reports all errors of a command line at once."""

import bisect
import contextlib
import functools
import json
import math
import os
import re
import shlex
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nin.config.errors import NAME_RULE, did_you_mean, read_first_line, shorten
from nin.config.keys import flatten, is_within
from nin.config.schema import CONF, NAME, Settings, UserError
from nin.config.validation import find_override_errors, list_options, validate

# Hydra raises the built-in ones for values that it does not expect: model=null, hydra.sweeper.params={seed:1}, or an
# integer of more digits than Python reads.
COMPOSITION_ERRORS = (
    HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, AttributeError, AssertionError
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
    config = OmegaConf.create(settings.to_plain())
    words = overrides
    try:
        parsed = parse_overrides(overrides)
        if swept := [override.input_line or "" for override in parsed if override.is_sweep_override()]:
            rule = "takes one value here; a text with a comma is quoted, as in"
            raise UserError(*(f"{word}: {rule} {_quoted(word)}" for word in swept))
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
            OmegaConf.update(config, key, OmegaConf.select(requested, key), merge=False)
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

    Hydra reports one error per composition, here ``first``, so the config is composed repeatedly: bisection finds the
    first override that fails, it is recorded and left out, and the search continues with the rest.
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

    def is_refused(count: int) -> bool:
        return isinstance(composed(*valid, *rest[:count]), Exception)

    while is_refused(len(rest)):
        index = bisect.bisect_left(range(1, len(rest)), True, key=is_refused)  # the first that is refused
        error = composed(*valid, *rest[: index + 1])
        valid += rest[:index]
        errors.append(format_error(rest[index], error, composed(*valid, with_hydra="hydra." in rest[index])))
        rest = rest[index + 1 :]
    valid += rest
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
    with contextlib.suppress(ValueError):  # range(0,3,0)
        return next(override.sweep_string_iterator(), None)
    return None


def count_sweep_values(override: Override) -> int:
    """The number of values that a swept key takes, without listing them; 1 for a key that is not swept.

    Raises:
        UserError: if a range has no step.
    """
    if not override.is_discrete_sweep():
        return 1
    value = override.value()
    if not isinstance(value, RangeSweep):
        return sum(1 for _ in override.sweep_iterator())
    if not value.step:
        raise UserError(f"{override.input_line}: the step must not be 0")
    return max(0, math.ceil(((value.stop or 0) - (value.start or 0)) / value.step))


def format_error(override: str, error: Exception, config: DictConfig) -> str:
    """An error that Hydra found in ``override``, in this project's form: what was given, the rule, the remedy."""
    given = shorten(override)
    try:
        key = OverridesParser.create().parse_override(override).key_or_group
    except HydraException as parser_error:  # its first line has the reason; that of ``error`` may be the override
        if os.path.isdir(override):  # noqa: PTH112  # Path.is_dir raises an error for a name that is too long
            runs = "nin resume, eval, predict, export and serve take one run's folder, before all overrides"
            return f"{given}: is a folder; an override must have the form key=value; {runs}"
        if "=" in override and override.partition("=")[0] != override.partition("=")[0].strip():
            return f"{given}: remove the space before ="
        key, _, value = override.partition("=")
        lexer_failed = "LexerNoViableAlt" in str(error)
        # A list, a dictionary, a quoted text or a sweep such as range(1,3) with a mistake is not to be quoted.
        is_text = not re.match(r"""[\[{"'(]|\w+\(""", value) or lexer_failed
        if key == "name" and not re.match(NAME, value):  # refused also where it is quoted
            return f"{given}: must {NAME_RULE}"
        if value and not value.endswith(",") and is_text and re.fullmatch(r"[+~]{0,2}[A-Za-z_]\w*([./]\w+)*", key):
            return f"{given}: has characters that must be quoted, as in {_quoted(override)}"
        reason = f" ({read_first_line(parser_error)})" if value and not lexer_failed else ""
        return f"{given}: must have the form key=value, as in experiment=cpu{reason}"
    except ValueError:
        return f"{given}: a number of too many digits"
    if not key:
        return f"{given}: must have the form key=value, as in experiment=cpu"
    first = read_first_line(error)
    missing = re.search(rf"Could not load '{re.escape(key)}/(.+)'", first)  # one of a list of options
    if missing or "Could not find" in str(error):
        # The lines of the options begin with a tab; so do those of the search path, provider=…, path=….
        options = [line.strip() for line in str(error).splitlines() if line.startswith("\t") and "=" not in line]
        close = did_you_mean(missing[1] if missing else override.partition("=")[2], options or list_options(key))
        other = "; another logger is named by its _target_ (docs/extending.md)" if key == "logger" else ""
        return f"{given}: no such {key}{f': {missing[1]}' if missing else ''}; {close}{other}"
    if "requires --multirun" in str(error) or first.startswith("Ambiguous value"):
        return f"{given}: has several values; add -m for a sweep, as in nin train -m {shlex.quote(given)}"
    if isinstance(error, ValueError) and "Config group override" in first:
        return f"{given}: {key} is a config group, and its value an option; {_describe_options(key)}"
    if "{_target_:" in override and (CONF / key).is_dir():
        return f"{given}: the value of {key} is an option; write this to my/{key}/<name>.yaml, and add --config-dir my"
    if first.startswith(("Could not override", "Key '")) or "does not exist" in first:
        return f"{given}: no such key" + _suggest_key(key, config)
    if first.startswith(("Could not append", "Multiple values")) and override.startswith("+"):
        return f"{given}: is in the config already; leave out the +, as in {shlex.quote(given.lstrip('+'))}"
    if isinstance(error, yaml.YAMLError | UnicodeDecodeError):  # the file of this option is not valid
        return f"{given}: {first}"
    if not isinstance(error, HydraException | OmegaConfBaseException):
        sweep = "; the values of a sweep are given as key=value1,value2, with -m" if "sweeper.params" in key else ""
        return f"{given}: {key} can't have this value{sweep}"
    return f"{given}: {read_first_line(error.__cause__ or error)}"


def quote_value(text: str) -> str:
    """``text`` as a quoted value in Hydra's override grammar."""
    return "'" + text.replace("'", "\\'") + "'"


def _quoted(override: str) -> str:
    """An override whose value is one text for Hydra, as it is typed in a shell."""
    key, _, value = override.partition("=")
    return shlex.quote(shorten(f"{key}={json.dumps(value, ensure_ascii=False)}"))


def _describe_options(group: str) -> str:
    optional = "; or leave it out" if group in ("experiment", "sweep") else ""
    return f"there are: {', '.join(list_options(group))}{optional}"


def _suggest_key(key: str, config: DictConfig) -> str:
    """The end of a message about an unknown key: what the user probably meant."""
    if key in ("ckpt_path", "resume_from_checkpoint", "checkpoint_path"):
        return "; to continue a run, type nin resume with the run's folder, as in nin resume outputs/runs/first"
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    nested = OmegaConf.to_container(config, resolve=False)
    keys = list(flatten({str(k): v for k, v in nested.items()})) if isinstance(nested, dict) else []
    if not parent and (longer := [k for k in keys if k.endswith(f".{last}")]):
        return f"; did you mean {' or '.join(longer)}?"
    if isinstance(node, DictConfig):
        known = [str(name) for name in node if not str(name).startswith("_")]
        if parent == "hydra.launcher" and not known:
            return ", because the jobs run one after another; add hydra/launcher=joblib for several at once"
        is_open = "_target_" in node and not key.startswith("hydra.")  # Hydra's plugins have a schema
        close = did_you_mean(last, known, f"{parent}.") if parent else did_you_mean(last, [*known, "experiment"])
        return f"; {close}" + (f"; to add an argument of {node._target_}: +{key}=…" if is_open else "")
    close = did_you_mean(key, keys)
    return f"; {close.partition('?')[0]}?" if close.startswith("did") else ""
