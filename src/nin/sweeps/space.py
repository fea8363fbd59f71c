"""The space of a search: Hydra's syntax for sweeps as Optuna's distributions."""

import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from nin.config.errors import read_first_line
from nin.config.schema import UserError

_TAGS = {"log", "int", "float"}
_MAX_VALUES = 10_000  # the most values of one key
_MAX_CHECKED = 50  # choices of a key that are tried before the search starts; each takes a tenth of a second

Space = dict[str, BaseDistribution]


def read_space(overrides: Iterable[Override]) -> tuple[Space, list[str]]:
    """The distribution of every searched key, and the overrides that all trials share.

    Raises:
        UserError: lists every space that is empty, inverted or not defined.
    """
    space, fixed, errors = {}, [], []
    for override in overrides:
        try:
            if override.is_sweep_override():
                space[override.get_key_element()] = _distribution(override)
            else:
                fixed.append(str(override.input_line))
        except (HydraException, ValueError, OverflowError) as error:
            errors.append(f"{override.input_line}: not a space ({read_first_line(error)})")
        except UserError as error:
            errors += error.errors
    if errors:
        raise UserError(*errors)
    return space, fixed


def _distribution(override: Override) -> BaseDistribution:
    value, given = override.value(), str(override.input_line)
    tags = set(getattr(value, "tags", ()))
    if unknown := sorted(tags - _TAGS):
        raise UserError(f"{given}: no such tag {unknown[0]}; there are: {', '.join(sorted(_TAGS))}")
    if isinstance(value, IntervalSweep):
        return _interval(value, tags, given)
    if getattr(value, "shuffle", False):  # in another order, so another space, at each start
        raise UserError(f"{given}: shuffle is for a sweep; a search has no order of values, leave shuffle out")
    if isinstance(value, RangeSweep):
        return _range(value, tags, given)
    if tags:
        raise UserError(f"{given}: {' and '.join(sorted(tags))} is for interval and range; leave the tag out")
    texts = [str(text) for text in override.sweep_string_iterator()]
    if len(set(texts)) < len(texts):
        raise UserError(f"{given}: has a value twice; give each once")
    return CategoricalDistribution(texts)


def _interval(value: IntervalSweep, tags: set[str], given: str) -> BaseDistribution:
    low, high = value.start, value.end
    assert low is not None  # Hydra's interval() has both
    assert high is not None
    if not math.isfinite(low) or not math.isfinite(high):
        raise UserError(f"{given}: both ends must be finite")
    if low == high:  # Optuna refuses all other ends that do not fit
        raise UserError(f"{given}: the interval is empty; its first end must be less than its second")
    if "int" in tags or (isinstance(low, int) and isinstance(high, int)):
        if low != int(low) or high != int(high):
            raise UserError(f"{given}: with int, both ends must be integers")
        return IntDistribution(int(low), int(high), log="log" in tags)
    return FloatDistribution(low, high, log="log" in tags)


def _range(value: RangeSweep, tags: set[str], given: str) -> BaseDistribution:
    """The numbers that Hydra's own sweep would enumerate: without ``stop``."""
    if not value.step:
        raise UserError(f"{given}: the step must not be 0")
    if "log" in tags:
        raise UserError(f"{given}: a range has steps; use tag(log, interval(…)) or tag(log, int, interval(…))")
    assert value.start is not None  # Hydra's range() has both
    assert value.stop is not None
    # Decimals are exact: with floats, 0.1 + 6 * 0.1 is 0.7000000000000001.
    start, stop, step = (Decimal(str(number)) for number in (value.start, value.stop, value.step))
    count = math.ceil((stop - start) / step)
    if count <= 0:
        raise UserError(f"{given}: the range has no values; its first end must come before its second")
    if count > _MAX_VALUES:
        raise UserError(f"{given}: the range has {count:,} values; give at most {_MAX_VALUES:,}, or an interval")
    low, high = sorted((start, start + (count - 1) * step))
    if all(isinstance(number, int) for number in (value.start, value.stop, value.step)):
        return IntDistribution(int(low), int(high), step=abs(int(step)))
    return FloatDistribution(float(low), float(high), step=float(abs(step)))


def exact_value(value: Any, distribution: BaseDistribution) -> Any:
    """A proposed value; of a range with decimals computed in decimals: 0.3, and not 0.30000000000000004."""
    if not isinstance(distribution, FloatDistribution) or not distribution.step:
        return value
    low, step = Decimal(str(distribution.low)), Decimal(str(distribution.step))
    return float(low + round((Decimal(str(value)) - low) / step) * step)


def overrides_of(params: Mapping[str, Any]) -> list[str]:
    """A trial's proposed values as overrides."""
    return [f"{key}={format_value(value)}" for key, value in params.items()]


def format_value(value: Any) -> str:
    """A proposed value as the right side of an override that Hydra reads back to the last digit."""
    return value if isinstance(value, str) else repr(value)


def enumerate_values(key: str, distribution: BaseDistribution) -> list[Any]:
    """All values of a distribution, for a grid.

    Raises:
        UserError: if there are infinitely many, or too many.
    """
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    if distribution.log or distribution.step is None:
        raise UserError(f"{key}: hydra.sweeper.sampler=grid needs choices or a range, not an interval")
    low, high, step = (Decimal(str(value)) for value in (distribution.low, distribution.high, distribution.step))
    count = round((high - low) / step) + 1
    if count > _MAX_VALUES:
        raise UserError(f"{key}: has {count:,} values; a grid takes at most {_MAX_VALUES:,} of each key")
    return [type(distribution.low)(low + i * step) for i in range(count)]


def sample_corners(space: Space) -> list[dict[str, str]]:
    """A few points of the space as text, to find errors before the search starts: ends of intervals, all choices."""
    ends = {key: ends_of(distribution) for key, distribution in space.items()}
    count, most = len(ends), min(_MAX_CHECKED, max(map(len, ends.values()), default=0))
    # For each point the place of each key's value. With a shift from key to key, low and high ends also meet.
    picks = [[0] * count, [-1] * count, [*range(count)], [*range(1, count + 1)], *([n] * count for n in range(most))]
    points = [
        {key: values[n % len(values)] for n, (key, values) in zip(pick, ends.items(), strict=True)} for pick in picks
    ]
    return [point for i, point in enumerate(points) if point not in points[:i]]


def ends_of(distribution: BaseDistribution) -> list[str]:
    """The lowest and the highest value as text; of choices all."""
    if isinstance(distribution, CategoricalDistribution):
        return [str(choice) for choice in distribution.choices]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return [format_value(distribution.low), format_value(distribution.high)]


def format_distribution(distribution: BaseDistribution) -> str:
    """A distribution as Hydra writes it, for messages."""
    if isinstance(distribution, CategoricalDistribution):
        return ",".join(map(str, distribution.choices))
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    if distribution.step is not None and (isinstance(distribution, FloatDistribution) or distribution.step > 1):
        return f"range({distribution.low}, …, {distribution.high}, {distribution.step})"
    tags = [*(["log"] if distribution.log else []), *(["int"] if isinstance(distribution, IntDistribution) else [])]
    text = f"interval({distribution.low}, {distribution.high})"
    return f"tag({', '.join(tags)}, {text})" if tags else text
