"""Hydra's errors about one override, as messages in this project's form."""

import os
import re
import shlex
from pathlib import Path

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nin.config.errors import NAME_RULE, did_you_mean, list_options, read_first_line, shorten
from nin.config.hydra_options import SEARCH_PATH
from nin.config.keys import flatten
from nin.config.schema import CONF, NAME


def format_error(override: str, error: Exception, config: DictConfig) -> str:
    """An error that Hydra found in ``override``, in this project's form: what was given, the rule, the remedy."""
    given, parser = shorten(override), OverridesParser.create()
    try:
        key = parser.parse_override(override).key_or_group
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
        if value[:1] in ("[", "{") and value[-1] not in "]}":
            return f"{given}: its bracket is not closed; quote an override that has spaces, as in '{key}=[1, 2]'"
        if key == "name" and not re.match(NAME, value):  # refused also where it is quoted
            return f"{given}: must {NAME_RULE}"
        if unknown := re.search(r"Unknown function '(\w+)'", str(parser_error)):
            close = did_you_mean(unknown[1], sorted(parser.functions.functions))
            return f"{given}: no such function {unknown[1]}; {close}; quote a text, as in {quote_override(override)}"
        if value and not value.endswith(",") and is_text and re.fullmatch(r"[+~]{0,2}[A-Za-z_]\w*([./]\w+)*", key):
            return f"{given}: has characters that must be quoted, as in {quote_override(override)}"
        reason = f" ({read_first_line(parser_error)})" if value and not lexer_failed else ""
        return f"{given}: must have the form key=value, as in experiment=cpu{reason}"
    except ValueError:
        return f"{given}: a number of too many digits"
    if not key:
        return f"{given}: must have the form key=value, as in experiment=cpu"
    first = read_first_line(error)
    if key in ("experiment", "sweep") and re.search(rf"Could not override '\w+@{key}\.", first):
        return f"{given}: its file must begin with the line: # @package _global_"
    if reason := _find_error_in_defaults(key, override.partition("=")[2], error):
        return f"{given}: its file's defaults have {reason}"
    missing = re.search(rf"Could not load '{re.escape(key)}/(.+)'", first)  # one of a list of options
    if missing or "Could not find" in str(error):
        # The lines of the options begin with a tab; so do those of the search path, provider=…, path=….
        options = [line.strip() for line in str(error).splitlines() if line.startswith("\t") and "=" not in line]
        option = missing[1] if missing else override.partition("=")[2]
        close = did_you_mean(option, options or list_options(key))
        other = "; another logger is named by its _target_ (docs/extending.md)" if key == "logger" else ""
        if not other and close.startswith("there are") and _find_searched_folders() == [str(CONF)]:
            other = "; a config of your own needs --config-dir"
        if any((Path(folder) / key / f"{option}.yml").is_file() for folder in _find_searched_folders()):
            return f"{given}: the name of its file must end in .yaml; rename {key}/{option}.yml"
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


def _find_error_in_defaults(group: str, value: str, error: Exception) -> str:
    """What is wrong in the ``defaults`` of the file that ``group=value`` chooses; "" if the error is another one."""
    first, folder = read_first_line(error), re.escape(group)
    if isinstance(error, RecursionError):
        return f"/{group}: …, which is this file itself; to start from another file of {group}, give its name alone"
    if entry := re.search(rf"Could not (?:find|load) '{folder}/(\w+)/([^/']+)'", first):
        if f"{entry[1]}/{entry[2]}" in value:  # an option may be in a folder of the group
            return ""
        return f"{entry[1]}: {entry[2]}, which chooses no option; write override /{entry[1]}: {entry[2]}"
    if entry := re.search(rf"Could not override '{folder}/(\w+)@", first):
        return f"override {entry[1]}: …, which chooses no option; write override /{entry[1]}: …"
    entry = re.match(r"Multiple values for (\w+)\. To override a value use 'override \w+: (.+)'", first)
    if entry and entry[1] != group:
        return f"/{entry[1]}: {entry[2]}, and a config has one; write override /{entry[1]}: {entry[2]}"
    if entry := re.match(rf"In '{folder}/.+': Could not override '(\w+)'\. No match", first):
        return f"override /{entry[1]}, and there is no such group"
    entry = re.search(r"Could not find '(.+)/([^/']+)'", first)  # as in `override /model: …`
    if entry and f"{entry[1]}/{entry[2]}" != f"{group}/{value}":
        close = did_you_mean(entry[2], list_options(entry[1]))
        return f"{entry[1]}: {entry[2]}, and there is no such {entry[1]}; {close}"
    return ""


def _find_searched_folders() -> list[str]:
    """This project's ``conf/`` and the user's own folders; none in commands without ``--config-dir``."""
    if not (hydra := GlobalHydra.instance().hydra):  # `apply_overrides` of nin eval, resume and others
        return []
    sources = hydra.config_loader.get_search_path().get_path()
    own = [str(source.path) for source in sources if source.provider in ("main", "command-line", SEARCH_PATH)]
    return [path.removeprefix("file://") for path in own]


def quote_override(override: str) -> str:
    """An override whose value is one text for Hydra, as it is typed in a shell."""
    key, _, value = override.partition("=")
    return shlex.quote(f"{key}={QuotedString(value, Quote.double).with_quotes()}")


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
        if parent in ("callbacks", "logger"):
            return f"; {close}; to add another one: +{key}=…"
        return f"; {close}" + (f"; to add an argument of {node._target_}: +{key}=…" if is_open else "")
    close = did_you_mean(key, keys)
    return f"; {close.partition('?')[0]}?" if close.startswith("did") else ""
