"""gin's errors in plain words, and which of the names that a user has given were used.

The only module that depends on the texts of gin's errors. They are read with regular expressions: gin raises plain
ValueErrors, and to find the mistakes before gin does, its includes and imports would have to be followed here.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable

import gin
from gin import config_parser

from memorizing.config.types import REGISTERED
from memorizing.errors import UserError, first_line

_UNKNOWN_CLASS = re.compile(r"No configurable matching (?:reference )?'@?([\w./]+)")
_UNKNOWN_PARAMETER = re.compile(r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'")
_UNSET_MACRO = re.compile(r"call to configurable 'macro' .* in scope '([\w/]+)'")
_LOCATION = re.compile(r"In (?:file|bindings string)[^\n]*\n\s*(.+)")


def explain(error: Exception) -> str:
    """An error of gin in one line: where it is, and the nearest right name where a name is unknown."""
    if isinstance(error, RecursionError):
        return "gin: a value contains itself, such as a KNNAttention whose `local` is @KNNAttention(): name another"
    text = str(error)
    location = _LOCATION.search(text)
    where = f" (in: {location[1].strip()})" if location else ""
    if found := _UNKNOWN_CLASS.search(text):
        name = found[1].split("/")[-1]
        return f"gin: there is no {name!r}{_nearest(name, REGISTERED)}{where}"
    if found := _UNKNOWN_PARAMETER.search(text):
        owner = found[1].split(".")[-1]
        name = f"{owner}.{found[2]}"
        return f"gin: there is no {name}{_nearest(name, _parameters(owner))}{where}"
    if found := _UNSET_MACRO.search(text):
        name = found[1]
        return f"gin: %{name} is used but never set: add --gin.{name}=VALUE{_nearest(name, macros_set())}"
    return f"gin: {first_line(error)}{where}"


def fail_on_unused(names: Iterable[str], config_text: str) -> None:
    """Checks that what was bound is what some object asked for.

    Args:
      names: what the user has bound.
      config_text: the resolved configuration, which holds what was used and nothing else.

    Raises:
      UserError: a name was not used: its scope or macro is misspelt, or no such part is in this experiment.
    """
    used = names_used(config_text)
    for name in names:
        if _without_module(name) in used:
            continue
        is_plain_parameter = "." in name and "/" not in name
        advice = ": no such object is part of this experiment" if is_plain_parameter else _nearest(name, sorted(used))
        raise UserError(f"gin: {name} was given but never used{advice}")


def names_bound(text: str) -> list[str]:
    """The names that gin text gives a value: `Class.parameter`, `scope/Class.parameter`, or that of a macro."""
    names = []
    for statement in config_parser.ConfigParser(text, _ReferencesAsText()):
        if isinstance(statement, config_parser.BindingStatement):
            names.append(_bound_name(statement))
    return names


def modules_and_files(text: str) -> tuple[list[str], list[str]]:
    """The modules that gin text imports, and the files that it includes."""
    statements = list(config_parser.ConfigParser(text, _ReferencesAsText()))
    modules = [statement.module for statement in statements if isinstance(statement, config_parser.ImportStatement)]
    files = [statement.filename for statement in statements if isinstance(statement, config_parser.IncludeStatement)]
    return modules, files


def names_used(config_text: str) -> set[str]:
    """Every name by which a value in a resolved configuration could have been given."""
    used = set()
    for full_name in names_bound(config_text):
        name = _without_module(full_name)
        *scopes, parameter = name.split("/")
        if "." not in parameter:
            used.add(name)
            continue
        # An object in the scope a/b takes what is bound in a/b, in a and without a scope; what is built through a macro
        # is in the macro's scope.
        for depth in range(len(scopes) + 1):
            used.add("/".join([*scopes[:depth], parameter]))
    return used


def macros_set() -> list[str]:
    """The macros that have a value in what gin has read so far."""
    return [name for name in names_bound(gin.config_str()) if "." not in name]


class _ReferencesAsText(config_parser.ParserDelegate):
    """Leaves `@Class()` and `%MACRO` unresolved: only the names that are bound matter."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> str:
        return scoped_configurable_name

    def macro(self, macro_name: str) -> str:
        return macro_name


def _bound_name(statement: config_parser.BindingStatement) -> str:
    name = statement.selector
    if statement.arg_name:
        name = f"{name}.{statement.arg_name}"
    if statement.scope:
        name = f"{statement.scope}/{name}"
    return name


def _without_module(name: str) -> str:
    """`scope/Class.parameter` for `scope/module.Class.parameter`."""
    scope, slash, parameter = name.rpartition("/")
    without_module = ".".join(parameter.split(".")[-2:])
    return f"{scope}{slash}{without_module}"


def _parameters(owner: str) -> list[str]:
    """What can be bound of a class of ours; nothing for another library's."""
    if owner not in REGISTERED:
        return []
    fields = dataclasses.fields(REGISTERED[owner])
    return [f"{owner}.{field.name}" for field in fields if field.init]


def _nearest(name: str, known: Iterable[str]) -> str:
    # What was given is no help.
    others = [other for other in known if other != name]
    match = difflib.get_close_matches(name, others, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""
