"""Registration of a configuration class with gin, such that a value of the wrong type is told when the object is built and not somewhere in a traced function."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from typing import Any

import gin

from memorizing.errors import UserError

# What gin files can name, by name.
REGISTERED: dict[str, type] = {}


def register(cls: type) -> None:
    """Lets gin files build a frozen dataclass as `@ClassName()` and bind its fields as `ClassName.field`.

    The class itself stays as it is: called from Python, no gin binding changes it.
    """
    hints = typing.get_type_hints(cls)
    REGISTERED[cls.__name__] = cls

    @functools.wraps(cls, updated=())
    def build(*args: Any, **kwargs: Any) -> Any:
        missing = [f.name for f in dataclasses.fields(cls) if f.init and _is_required(f) and f.name not in kwargs]
        if missing and not args:
            raise UserError(
                f"{cls.__name__}.{missing[0]} is not set: bind it in a gin file or with --gin.{cls.__name__}.{missing[0]}=..."
            )
        for name, value in kwargs.items():
            if not matches(value, hints[name]):
                raise UserError(
                    f"{cls.__name__}.{name} = {value!r}: expected {describe(hints[name])}, got {type(value).__name__}"
                )
        return cls(*args, **kwargs)

    gin.external_configurable(build, name=cls.__name__, module="memorizing")


def matches(value: Any, hint: Any) -> bool:
    """Whether a value has a type: classes, unions, literals and tuples of them; an int is a float, a bool is neither; protocols match what has their methods."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is typing.Literal:
        return value in args
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, arg) for arg in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if args[-1] is Ellipsis:
            return all(matches(item, args[0]) for item in value)
        return len(value) == len(args) and all(map(matches, value, args))
    if hint is None or hint is type(None):
        return value is None
    if getattr(hint, "_is_protocol", False):
        # On the class: an instance may have to open its corpus to answer.
        return all(
            hasattr(type(value), name)
            for name, member in vars(hint).items()
            if inspect.isfunction(member) and name[0] != "_"
        )
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def describe(hint: Any) -> str:
    """A type as a user would say it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe, args))
    if origin is tuple:
        return (
            "a tuple like ()"
            if not args
            else "a tuple of " + ", ".join(describe(arg) for arg in args if arg is not Ellipsis)
        )
    if (
        dataclasses.is_dataclass(hint)
        or getattr(hint, "_is_protocol", False)
        or hint.__module__.startswith("memorizing")
    ):
        return f"a configured object (@{hint.__name__}())"
    return {"int": "a whole number", "float": "a number", "str": "a string", "bool": "True or False"}.get(
        hint.__name__, str(hint)
    )


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
