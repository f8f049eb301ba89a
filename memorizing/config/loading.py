"""From gin files and command-line bindings to an experiment."""

from __future__ import annotations

import ast
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import gin

import memorizing.config.registry  # noqa: F401  registers what gin files name
from memorizing.config.files import find_file, is_shipped
from memorizing.config.gin_messages import explain, fail_on_unused, modules_and_files, names_bound
from memorizing.errors import UserError, first_line
from memorizing.training.experiment import Experiment

# What a run's own configuration may import: a run can be anybody's, and to import a module is to execute it.
_TRUSTED_MODULES = ("memorizing.data.gin_registry",)


def load_experiment(gin_files: Sequence[str], bindings: Sequence[str], base: str = "") -> tuple[Experiment, str]:
    """Builds the experiment that gin files and bindings describe.

    Args:
      gin_files: paths, or names of shipped files with or without folder and suffix.
      bindings: `NAME=VALUE`; a value that is no Python literal and no gin reference is taken as a string.
      base: the resolved configuration of a run, which files and bindings change; what it binds may become unused.

    Returns:
      The experiment, and the resolved configuration as gin text.

    Raises:
      UserError: for everything that is wrong with them; the message names the binding and the nearest right name.
    """
    gin.clear_config()
    files = [find_file(name) for name in gin_files]
    quoted = [_quote_bare_word(binding) for binding in bindings]
    # gin logs an error for every place where it looked for a file before it found it.
    logging.disable(logging.ERROR)
    try:
        _parse_base(base)
        gin.parse_config_files_and_bindings([str(file) for file in files], [], finalize_config=False)
        for binding in quoted:
            _parse_binding(binding)
        experiment = gin.get_configurable("Experiment")()
    except UserError as error:
        raise UserError(first_line(error)) from error
    except Exception as error:  # gin raises ValueError, SyntaxError, TypeError, OSError, TokenError and others.
        raise UserError(explain(error)) from error
    finally:
        logging.disable(logging.NOTSET)
    text = gin.operative_config_str()
    fail_on_unused(_names_given(quoted, files), text)
    return experiment, text


def _names_given(bindings: Sequence[str], files: Sequence[Path]) -> list[str]:
    """What the user has bound, on the command line and in files that do not come with the package."""
    own_files = [file.read_text(encoding="utf-8-sig") for file in files if not is_shipped(file)]
    names = []
    for text in [*bindings, *own_files]:
        names += names_bound(text)
    return names


def _quote_bare_word(binding: str) -> str:
    name, equals, value = binding.partition("=")
    if not equals or not name.strip():
        raise UserError(f"--gin.{binding}: expected --gin.NAME=VALUE")
    try:
        ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        # What begins like this is meant as gin, also where it is wrong.
        is_gin = value.strip().startswith(("@", "%", "(", "[", "{"))
        return binding if is_gin and ("@" in value or "%" in value) else f"{name} = {value!r}"
    return binding


def _parse_base(base: str) -> None:
    try:
        modules, files = modules_and_files(base)
        for module in modules:
            # What is loaded already is not executed again.
            if module not in _TRUSTED_MODULES and module not in sys.modules:
                raise UserError(
                    f"the run's own config.gin imports {module}, which would execute it: if you trust that module, add "
                    f"--import={module} (in Python: import it first)"
                )
        if files:
            raise UserError(f"the run's own config.gin includes {files[0]}, which no run has written: restore it")
        gin.parse_config(base)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the run's own config.gin cannot be read: {explain(error)}") from error


def _parse_binding(binding: str) -> None:
    try:
        gin.parse_config(binding)
    except Exception as error:
        explanation = explain(error)
        if binding not in explanation:
            explanation = f"{explanation} (in: {binding})"
        raise UserError(explanation) from error
