"""What gin says, made readable. The only module that uses gin's private names and the texts of its errors."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence

import gin

from memorizing.config.types import REGISTERED
from memorizing.errors import UserError, first_line


def explain(error: Exception) -> str:
    """gin's message in one line, with the nearest right name where a name is unknown."""
    text = str(error)
    where = re.search(r"In (?:file|bindings string)[^\n]*\n\s*(.+)", text)
    where = f" (in: {where.group(1).strip()})" if where else ""
    unknown = re.search(r"No configurable matching (?:reference )?'@?([\w./]+)", text)
    if unknown:
        name = unknown.group(1).split("/")[-1]
        return f"gin: there is no {name!r}{_nearest(name, list(REGISTERED))}{where}"
    parameter = re.search(r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", text)
    if parameter:
        owner, name = parameter.group(1).split(".")[-1], parameter.group(2)
        fields = [f"{owner}.{field.name}" for field in dataclasses.fields(REGISTERED[owner])]
        return f"gin: there is no {owner}.{name}{_nearest(f'{owner}.{name}', fields)}{where}"
    macro = re.search(r"call to configurable 'macro' .* in scope '(\w+)'", text)
    if macro:
        name = macro.group(1)
        return f"gin: %{name} is used but never set: add --gin.{name}=VALUE{_nearest(name, _macros())}"
    return f"gin: {first_line(error)}{where}"


def fail_on_unused(names: Iterable[str]) -> None:
    """Raises UserError for a name that was given and bound, but that no object asked for (a misspelt scope or macro, a part that is not in use)."""
    used = set()
    for (scope, selector), parameters in gin.config._OPERATIVE_CONFIG.items():
        short = selector.split(".")[-1]
        if selector == "gin.macro":
            used.add(scope)
            continue
        # What is built through a macro is built in the macro's scope, where the bindings of every enclosing scope hold.
        parts = scope.split("/") if scope else []
        enclosing = ["/".join(parts[:depth]) for depth in range(len(parts) + 1)]
        used |= {f"{outer}/{short}.{name}".lstrip("/") for outer in enclosing for name in parameters}
    for name in names:
        scope, _, rest = name.rpartition("/")
        short = ".".join(rest.split(".")[-2:])
        if f"{scope}/{short}".lstrip("/") not in used:
            advice = (
                _nearest(name, sorted(used))
                if "." not in name or scope
                else ": no such object is part of this experiment"
            )
            raise UserError(f"gin: {name} was given but never used{advice}")


def names_bound(lines: Iterable[str]) -> list[str]:
    return [match.group(1) for line in lines if (match := re.match(r"([\w./]+)\s*=", line))]


def _nearest(name: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def _macros() -> list[str]:
    return [scope for scope, selector in gin.config._CONFIG if selector == "gin.macro"]
