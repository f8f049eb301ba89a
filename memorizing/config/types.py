"""Configuration classes for gin.

A value of the wrong type, or out of the range that its field has, is an error when the object is built, not in a trace.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from typing import Any

import gin

from memorizing.errors import Range, UserError, is_number

# What gin files can name, by name.
REGISTERED: dict[str, type] = {}

_WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "True or False", type(None): "None"}


def register(cls: type) -> None:
    """Lets gin files build a frozen dataclass as `@ClassName()` and bind its fields as `ClassName.field`.

    The class itself stays as it is: called from Python, no gin binding changes it.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    REGISTERED[cls.__name__] = cls

    @functools.wraps(cls, updated=())
    def build(**values: Any) -> Any:
        for field in dataclasses.fields(cls):
            name = f"{cls.__name__}.{field.name}"
            if field.name in values:
                _check(name, values[field.name], hints[field.name])
                _check_ranges(name, values[field.name], hints[field.name])
                values[field.name] = _with_floats(values[field.name], hints[field.name])
            elif field.init and _is_required(field):
                raise UserError(f"{name} is not set: bind it in a gin file or with --gin.{name}=...")
        return cls(**values)

    gin.external_configurable(build, name=cls.__name__, module="memorizing")


def matches(value: Any, hint: Any) -> bool:
    """Whether a value has a type.

    Types are classes, protocols, unions, literals and tuples of them. An int is a float, a bool is neither. A protocol
    matches what has its methods.
    """
    if hint is Any:
        return True
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if origin is typing.Annotated:
        return matches(value, args[0])
    if origin is typing.Literal:
        # 1 and True are equal, and are not the same to a user.
        return any(type(value) is type(arg) and value == arg for arg in args)
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, arg) for arg in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        items = _item_hints(hint, len(value))
        return len(items) == len(value) and all(map(matches, value, items))
    # On the class: an instance may have to open its corpus to answer.
    return _is_subclass(type(value), origin or hint)


def describe(hint: Any) -> str:
    """A type as a user would say it."""
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if origin is typing.Annotated:
        return describe(args[0])
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (typing.Union, types.UnionType):
        # `X | tuple[X, ...]` tells X once.
        tuples_of_others = [tuple[other, ...] for other in args]
        return " or ".join("a tuple of such" if arg in tuples_of_others else describe(arg) for arg in args)
    if origin is tuple and args[-1:] == (Ellipsis,):
        return f"a tuple, each item {describe(args[0])}"
    if origin is tuple:
        return f"a tuple ({', '.join(map(describe, args))})"
    if hint in _WORDS:
        return _WORDS[hint]
    if isinstance(hint, type) and hint.__module__ != "builtins":
        known = [name for name, cls in REGISTERED.items() if _is_subclass(cls, hint)]
        examples = [f"@{name}()" for name in known or [hint.__name__]]
        return f"a configured object ({', '.join(examples)})"
    return str(hint)


def _check(name: str, value: Any, hint: Any) -> None:
    """Raises UserError for the innermost part of a value that has the wrong type."""
    if matches(value, hint):
        return
    if typing.get_origin(hint) is tuple and isinstance(value, tuple):
        item_hints = _item_hints(hint, len(value))
        if len(item_hints) == len(value):
            for index, item in enumerate(value):
                _check(f"{name}[{index}]", item, item_hints[index])
    raise UserError(f"{name} = {_as_gin(value)}: expected {describe(hint)}, got {_kind(value)}")


def _check_ranges(name: str, value: Any, hint: Any) -> None:
    """Raises UserError for a number in a value that is out of its range. The value has the right type."""
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if origin is typing.Annotated:
        ranges = [note for note in args[1:] if isinstance(note, Range)]
        if any(not is_number(value) or value not in wanted for wanted in ranges):
            raise UserError(f"{name} = {_as_gin(value)}: expected {describe(hint)} {ranges[0]}")
        _check_ranges(name, value, args[0])
    elif origin in (typing.Union, types.UnionType):
        fitting = next(arg for arg in args if matches(value, arg))
        _check_ranges(name, value, fitting)
    elif origin is tuple:
        for index, (item, item_hint) in enumerate(zip(value, _item_hints(hint, len(value)), strict=True)):
            _check_ranges(f"{name}[{index}]", item, item_hint)


def _with_floats(value: Any, hint: Any) -> Any:
    """The same value with floats where these are meant: JAX takes a whole number for one of 32 bits, however large.

    The value has the right type, and is in its range.
    """
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if hint is float:
        return float(value)
    if origin is typing.Annotated:
        return _with_floats(value, args[0])
    if origin in (typing.Union, types.UnionType):
        return _with_floats(value, next(arg for arg in args if matches(value, arg)))
    if origin is tuple:
        return tuple(map(_with_floats, value, _item_hints(hint, len(value))))
    return value


def _item_hints(hint: Any, length: int) -> tuple[Any, ...]:
    """The types of a tuple's items; of a tuple of any length, as many as it has."""
    args = typing.get_args(hint)
    if args[-1:] == (Ellipsis,):
        return args[:1] * length
    return args


def _is_subclass(cls: type, wanted: type) -> bool:
    if typing.Protocol in wanted.__bases__:
        functions = [name for name, member in vars(wanted).items() if inspect.isfunction(member)]
        return all(hasattr(cls, name) for name in functions if not name.startswith("_"))
    if wanted is float:
        return issubclass(cls, int | float) and cls is not bool
    if wanted is int:
        return issubclass(cls, int) and cls is not bool
    return issubclass(cls, wanted)


def _kind(value: Any) -> str:
    """What was given, for an error."""
    if inspect.isfunction(value):
        return "a class that is not built: add ()"
    if isinstance(value, tuple):
        return f"{len(value)} items"
    return type(value).__name__


def _as_gin(value: Any) -> str:
    """A value as it stands in a gin file, with objects in short."""
    if isinstance(value, tuple):
        items = ", ".join(map(_as_gin, value))
        # As in Python: one item needs a comma.
        return f"({items},)" if len(value) == 1 else f"({items})"
    if isinstance(value, list):
        items = ", ".join(map(_as_gin, value))
        return f"[{items}]"
    if inspect.isfunction(value):
        return f"@{value.__name__}"
    if dataclasses.is_dataclass(value):
        return f"@{type(value).__name__}()"
    return repr(value)


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
