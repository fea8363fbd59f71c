"""Classes of the user's own: imports them, and checks their arguments. Imports no torch."""

import inspect
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

from hydra.errors import HydraException
from hydra.utils import get_class
from pydantic import ConfigDict, TypeAdapter, ValidationError

from nin.config.errors import did_you_mean, format_errors, locate_in_own_code, read_first_line
from nin.config.keys import is_within
from nin.config.schema import UserError
from nin.config.types import OwnClass, Section


def import_class(key: str, config: OwnClass, kind: type) -> type:
    """The class that ``_target_`` names.

    Args:
        key: the section of the config, for messages.
        kind: what it must be a subclass of.

    Raises:
        UserError: if it can't be imported, or is something else; or names the arguments that it does not take, or those
            that are not of the type with which the signature annotates them.
    """
    try:
        found = get_class(config.target)
    except (HydraException, ImportError, ValueError, AttributeError) as error:
        raise UserError(f"{key}._target_={config.target}: {explain_import_error(config.target, error)}") from error
    if not issubclass(found, kind):
        raise UserError(f"{key}._target_={config.target}: must be a subclass of {kind.__module__}.{kind.__name__}")
    parameters = _signature(found).parameters
    takes_any = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    unknown = [name for name in config.arguments if name not in parameters and not takes_any]
    if len(unknown) == 1:
        close = did_you_mean(unknown[0], list(parameters))
        raise UserError(f"{key}.{unknown[0]}: {config.target} has no such argument; {close}")
    if unknown:  # an experiment for another class sets them
        raise UserError(
            f"{key}: {config.target} has no arguments {', '.join(unknown)}; there are: {', '.join(parameters)}; choose "
            f"another experiment, or delete what it sets, as in ~{key}.{unknown[0]}"
        )
    require_annotated_types(key, config.target, config.arguments, parameters)
    return found


def _signature(found: type) -> inspect.Signature:
    """The signature of a class, with annotations that are text (``from __future__ import annotations``) evaluated."""
    try:
        return inspect.signature(found, eval_str=True)
    except Exception:  # noqa: BLE001  # a name that only a type checker imports, or whatever the text computes
        return inspect.signature(found)


def require_annotated_types(
    key: str, target: str, arguments: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]
) -> None:
    """Checks the arguments whose annotation is a plain type, so that a wrong one is named before any job starts.

    Raises:
        UserError: names each argument that is of another type.
    """
    errors: list[str] = []
    for name, value in arguments.items():
        parameter = parameters.get(name)
        if parameter is None or not _is_plain(parameter.annotation):
            continue
        if value is None and parameter.default is None:  # as in `width: int = None`
            continue
        if isinstance(value, Mapping) and "_target_" in value:  # of a callback: Hydra passes what it makes
            continue
        try:
            TypeAdapter(parameter.annotation, config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            errors += format_errors(error, Section, {}, f"{key}.{name}").values()
    if errors:
        raise UserError(*(f"{error}, as annotated in {target}" for error in errors))


def _is_plain(annotation: Any) -> bool:
    """Whether a value of a config can be compared with the type: not with a class, or a tuple, which YAML lacks."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return all(map(_is_plain, typing.get_args(annotation)))
    return annotation in (bool, int, float, str, types.NoneType)


def explain_import_error(target: str, error: BaseException) -> str:
    """Why Hydra could not import the class ``target``, for a message."""
    module, _, name = target.rpartition(".")
    if hasattr(sys.modules.get(module), name):  # a function, as torchvision.models.resnet18
        return "is no class; write one that calls it"
    if module in sys.modules:
        return f"{module} has no class {name}"
    while error.__cause__:  # Hydra's errors have that of the import as their cause
        error = error.__cause__
    reason = f"can't be imported ({read_first_line(error)}){locate_in_own_code(error)}"
    if ".py." in target:
        reason += f"; a class is named without .py: {target.replace('.py.', '.')}"
    elif isinstance(error, ModuleNotFoundError) and error.name and is_within(module, [error.name]):
        reason += "; is the folder of its file in PYTHONPATH?"
    return reason


def build(key: str, config: OwnClass, kind: type, *positional: Any, **available: Any) -> Any:
    """An object of the user's own class.

    Args:
        positional: the first arguments.
        available: arguments that are given if the signature has them and the config does not.

    Raises:
        UserError: as `import_class`; or names an argument that the class needs, or the error that it raises.
    """
    found = import_class(key, config, kind)
    parameters = inspect.signature(found).parameters
    given = {name: value for name, value in available.items() if name in parameters} | config.arguments
    try:
        inspect.signature(found).bind(*positional, **given)
    except TypeError as error:
        raise UserError(f"{key}: {config.target}: {error}") from error
    try:
        return found(*positional, **given)
    except UserError:  # raised by this package, which the class calls
        raise
    except Exception as error:  # raised by the user's own class, about a value, a file or a package
        values = ", ".join(f"{name}={value!r}" for name, value in config.arguments.items())
        reason = f"{type(error).__name__}: {error}"
        where = locate_in_own_code(error)
        raise UserError(f"{key}: {config.target} fails with {values or 'its defaults'} ({reason}){where}") from error
