"""The typed section of each network, read from the signature of its class. Imports no torch."""

import ast
import functools
import operator
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, create_model

from nin.config import types
from nin.config.types import Init, OwnClass, Positive, Section

# The arguments that come from the data, not from the config.
FROM_DATA = {"in_channels", "num_classes", "image_size"}
# The names that an annotation may use. A sequence is a list in YAML.
_NAMES = {**vars(typing), **vars(types), "Sequence": list}


class Model(Section):
    """The keys that all networks of the project have."""

    name: str
    # The default of data.image_size.
    input_size: Positive
    init: Init


class OwnModel(OwnClass):
    """Any ``nn.Module`` that maps ``(batch, channels, image_size, image_size)`` to logits ``(batch, classes)``."""

    input_size: Positive


def read_networks(folder: Path) -> dict[str, type[Model]]:
    """The section of each network in ``folder``, by the network's name. A section has the name of the network's class.

    A network of the project is a file ``networks/<name>.py`` with a class of the same name in any case, such as
    ``LeNet`` in ``lenet.py``, whose constructor takes ``in_channels``, ``num_classes`` and ``image_size``. All other
    arguments are keys of the config, and their annotations are the types and ranges. The file is parsed and not
    imported, because importing it imports torch.

    Raises:
        TypeError: names an argument without an annotation, or with one that can't be used.
    """
    found: dict[str, type[Model]] = {}
    for path in sorted(folder.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef) or node.name.lower() != path.stem.replace("_", ""):
                continue
            arguments = _constructor_arguments(node)
            if {argument.arg for argument in arguments} >= FROM_DATA:
                keys = {a.arg: (_evaluate(a, path), ...) for a in arguments if a.arg not in FROM_DATA}
                keys["name"] = (Literal[path.stem], ...)
                found[path.stem] = create_model(node.name, __base__=Model, **keys)  # type: ignore[call-overload]
    return found


def _constructor_arguments(node: ast.ClassDef) -> list[ast.arg]:
    for function in node.body:
        if isinstance(function, ast.FunctionDef) and function.name == "__init__":
            return [*function.args.args[1:], *function.args.kwonlyargs]
    return []


def _evaluate(argument: ast.arg, path: Path) -> Any:
    """The type that an argument's annotation names."""
    if argument.annotation is None:
        raise TypeError(f"{path}: {argument.arg} has no annotation, which is the type of the config key")
    try:
        return eval(compile(ast.Expression(argument.annotation), str(path), "eval"), dict(_NAMES))
    except NameError as error:
        raise TypeError(f"{path}: {argument.arg}: {error}; use names of typing and nin.config.types") from error


NETWORKS = read_networks(Path(__file__).parents[1] / "networks")
# Pickle finds a class by the name that its module has for it.
globals().update({section.__name__: section for section in NETWORKS.values()})

if TYPE_CHECKING:
    TypedModel = Model
else:
    TypedModel = Annotated[functools.reduce(operator.or_, NETWORKS.values()), Field(discriminator="name")]
