"""Dotted config keys and overrides: flattening, splitting, quoting, prefixes."""

from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString


def flatten(nested: dict[str, Any], prefix: str = "", keep_empty: bool = False) -> dict[str, Any]:
    """Returns dotted keys: ``{"model": {"norm": "none"}}`` becomes ``{"model.norm": "none"}``.

    Args:
        keep_empty: whether an empty dictionary is a value; it has no key otherwise.
    """
    found: dict[str, Any] = {}
    for key, value in nested.items():
        is_value = not isinstance(value, dict) or (keep_empty and not value)
        found |= {f"{prefix}{key}": value} if is_value else flatten(value, f"{prefix}{key}.", keep_empty)
    return found


def split_override(word: str) -> tuple[str, str]:
    """The key and the value of an override: ``+model.norm=none`` gives ``("model.norm", "none")``."""
    key, _, value = word.lstrip("+~").partition("=")
    return key, value


def quote_value(text: str) -> str:
    """``text`` as a quoted value in Hydra's override grammar."""
    return QuotedString(text, Quote.single).with_quotes()


def is_within(key: str, prefixes: tuple[str, ...] | list[str]) -> bool:
    """Whether ``key`` equals or starts with one of ``prefixes``: ``speed.micro_batch`` is within ``speed``."""
    return f"{key}.".startswith(tuple(f"{prefix}." for prefix in prefixes))
