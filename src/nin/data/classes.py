"""Whether the classes of a data set are those of a network. Imports no torch."""

from collections.abc import Iterable

from nin.config.errors import printable
from nin.config.schema import UserError


def require_same_classes(found: Iterable[str], trained: object) -> None:
    """Checks that labels mean the same to a data set and to a network, which a folder given later need not fulfil.

    Args:
        found: the class names of the data set.
        trained: the class names that are stored with the network.

    Raises:
        UserError: names both.
    """
    names = list(found)
    if names != trained:
        stored = trained if isinstance(trained, list) else []
        ours, theirs = (", ".join(printable(str(name)) for name in each) for each in (names, stored))
        raise UserError(f"data: its classes are {ours}; the network was trained for {theirs or 'others'}")
