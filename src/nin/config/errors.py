"""Messages about a config: what was given, the rule, the remedy."""

import difflib
import itertools
import json
import re
import sysconfig
import traceback
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from nin.config.schema import CONF, Settings
from nin.config.types import Section

# Code that is not the user's own, by the name of its package (which may be installed from a clone) or by its place.
_LIBRARIES = ("nin", "torch", "torchvision", "lightning")
_SITE_PACKAGES, _STDLIB = {"site-packages", "dist-packages"}, sysconfig.get_path("stdlib")
NAME_RULE = "consist of letters, digits and the characters _-=,+@. and not begin with a dot"


def read_first_line(error: BaseException) -> str:
    """The first line of its message, or the name of its class if it has none."""
    if isinstance(error, yaml.YAMLError):  # the other lines name the file and the place in it
        return " ".join(str(error).split())
    if isinstance(error, SyntaxError):  # `locate_in_own_code` has the file and the line
        return f"{type(error).__name__}: {error.msg}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].endswith("composing config:"):  # of Hydra; the reason and the key follow
        key = next((line for line in lines if line.startswith("full_key: ")), "")
        return " ".join([lines[0], *lines[1:2], *([f"({key.removeprefix('full_key: ')})"] if key else [])])
    return lines[0] if lines else type(error).__name__


def locate_in_own_code(error: BaseException) -> str:
    """The innermost line of the user's own code in the traceback, as in " (nets.py:21, in forward)"; "" if none is.

    Of a syntax error, its own line.
    """
    if isinstance(error, SyntaxError) and error.filename and not error.filename.startswith("<"):
        return f" ({Path(error.filename).name}:{error.lineno})"
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        file, package = Path(frame.f_code.co_filename), str(frame.f_globals.get("__name__")).partition(".")[0]
        is_library = package in _LIBRARIES or file.is_relative_to(_STDLIB) or _SITE_PACKAGES.intersection(file.parts)
        if not (is_library or file.name.startswith("<")):  # generated code, as "<string>"
            return f" ({file.name}:{line}, in {frame.f_code.co_name})"
    return ""


def format_errors(error: ValidationError, section: type[Section], plain: dict, prefix: str = "") -> dict[str, str]:
    """One message per key, from the errors that pydantic found in ``plain``, the values of ``section``."""
    return {
        prefix + key: _format_error(prefix + key, list(errors), section)
        for key, errors in itertools.groupby(error.errors(), lambda e: _key(e, plain))
    }


def _key(error: ErrorDetails, plain: dict) -> str:
    """The config key of an error. The error's path also names the members of unions, which are not part of the key."""
    path, node = [], plain
    for place, part in enumerate(error["loc"], start=1):
        if part == "_target_" and place < len(error["loc"]):
            continue  # the member of a union for classes of the user's own
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
        case "extra_forbidden" | "invalid_key":
            known, name = _known_keys(section, first["loc"][:-1]), str(first["loc"][-1])
            # Where Hydra puts the keys of a file of the user's own by default.
            if key == "experiment" or (key.startswith("sweep.") and name in (*Settings.model_fields, "hydra")):
                group = key.partition(".")[0]
                values = ", and the values of a sweep are in hydra.sweeper.params" if group == "sweep" else ""
                return f"{group}: the file of this option must begin with the line: # @package _global_{values}"
            if "." in name:
                nested = name.replace(".", ": {") + ": …" + "}" * name.count(".")
                return f"{key}: no such key; in a file it is written as {nested}"
            return f"{key}: no such key; {did_you_mean(name, known, key.removesuffix(name))}"
        case "missing":
            return f"{key}: has no value; set {key}=…, or do not delete it"
        case "model_type" | "dict_type" if key in Settings.model_fields:
            given = shorten(json.dumps(first["input"]))
            option = f"; an option is chosen in defaults: override /{key}: …" if isinstance(first["input"], str) else ""
            return f"{key}={given}: has keys of its own; set one of them, as in {key}.<key>=…{option}"
        case "union_tag_not_found":
            return f"{key}: no option is chosen; give {key}={' or '.join(list_options(key))}"
        case "union_tag_invalid":
            return f"{key}.name={first['ctx']['tag']}: must be one of {first['ctx']['expected_tags']}"
        case "value_error" if isinstance(first["input"], dict):  # a rule of a section: the message names the key
            return f"{key}: {first['ctx']['error']}"
        case "string_pattern_mismatch" if key.endswith("_target_"):
            rule = "be a module and a class in it, as in my_net.Net"
        case "string_pattern_mismatch":
            rule = NAME_RULE
        case _:
            rules = list(dict.fromkeys(map(_expectation, errors)))
            if all(rule.startswith("be ") for rule in rules):
                rules = [rules[0], *(rule.removeprefix("be ") for rule in rules[1:])]
            rule = " or ".join(rules)
    given = first["input"]
    has_several = isinstance(given, list) or (isinstance(given, str) and "," in given)
    several = "; several values, as in 0,1, are for a sweep: with -m, or in its file below hydra.sweeper.params"
    hint = several if has_several and re.fullmatch("be a valid (integer|number|boolean)", rule) else ""
    return f"{key}={shorten(json.dumps(given, ensure_ascii=False))}: must {rule}{hint}"


def _expectation(error: ErrorDetails) -> str:
    """Returns what a value must do or be: "have at least 1 item" from "List should have at least 1 item after …"."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"]).removeprefix("must ")
    if error["type"] == "int_parsing_size":
        return "be a number of fewer digits"
    return re.sub(r"^\w+ should |,? after validation.*$", "", error["msg"])


def shorten(text: str, limit: int = 80) -> str:
    """``text`` with at most ``limit`` characters; "…" replaces what is cut off."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def printable(name: str) -> str:
    """``name`` with escapes in place of what is not UTF-8 and of control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def printable_lines(text: str) -> str:
    """`printable` for each line of ``text``."""
    return "\n".join(map(printable, text.splitlines()))


def _known_keys(section: type[Section], loc: tuple) -> list[str]:
    branches: list[type[Section]] = []
    for part in loc:
        if part in section.model_fields:
            branches = sections_of(section.model_fields[part].annotation)
            section = branches[0]
        elif part != "typed":  # the tag of all sections but classes of the user's own
            section = next(b for b in branches if part in names_of(b))
    return list(section.model_fields)


def sections_of(annotation: Any) -> list[type[Section]]:
    """The sections that a field's type allows: the members of a union, without ``Annotated``."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_of(part)]


def names_of(section: type[Section]) -> tuple[str, ...]:
    """The values that ``name`` may have in a section, as in ``("sgd",)``; none if it has no such key."""
    return get_args(section.model_fields["name"].annotation) if "name" in section.model_fields else ()


def did_you_mean(word: str, known: list[str], prefix: str = "") -> str:
    """The end of a message about an unknown ``word``: the most similar ``known`` word, if any, and all of them.

    Args:
        prefix: of the suggested word, for the key of a section as it is typed.
    """
    close = difflib.get_close_matches(word, known, n=1)
    there_are = f"here are: {', '.join(known)}"
    return f"did you mean {prefix}{close[0]}? T{there_are}" if close else f"t{there_are}"


def list_options(group: str) -> list[str]:
    """The options of a config group: the names of the files in its folder of ``conf/``."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))
