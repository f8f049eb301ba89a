"""Everything that gin can configure, and how gin files and command-line bindings become an experiment."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import gin

from memorizing.attention.compressive import CompressiveAttention
from memorizing.attention.full import FullAttention
from memorizing.attention.knn import KNNAttention
from memorizing.attention.transformer_xl import TransformerXLAttention
from memorizing.attention.xl import XLAttention
from memorizing.config.types import REGISTERED, register
from memorizing.errors import UserError
from memorizing.experiment import BatchConfig, Experiment, LoopConfig
from memorizing.model import LMConfig
from memorizing.optimizer import Adafactor, AdamW, Cosine, InverseSquareRoot
from memorizing.recurrent_tokens import RecurrentTokens
from memorizing.search import ApproximateSearch, ExactSearch
from memorizing.sharding import MeshConfig
from memorizing.synthetic import (
    Copy,
    Curriculum,
    DetectAndMemorize,
    DictionaryLookup,
    Memorize,
    Reasoning,
    RepeatedPassages,
    Reverse,
    SyntheticWords,
)
from memorizing.windows import Windows

for configurable in (
    # What is run.
    Experiment,
    BatchConfig,
    LoopConfig,
    MeshConfig,
    # The model.
    LMConfig,
    FullAttention,
    XLAttention,
    KNNAttention,
    TransformerXLAttention,
    CompressiveAttention,
    RecurrentTokens,
    ExactSearch,
    ApproximateSearch,
    # Optimizers and schedules.
    Adafactor,
    AdamW,
    InverseSquareRoot,
    Cosine,
    # Data that needs no corpus; gin files of corpora import memorizing.data.gin_registry.
    RepeatedPassages,
    Memorize,
    DetectAndMemorize,
    Reasoning,
    Copy,
    Reverse,
    DictionaryLookup,
    Curriculum,
    SyntheticWords,
    # Any data, read in windows.
    Windows,
):
    register(configurable)

_PACKAGE = Path(__file__).parents[1]
# In a wheel the gin files lie inside the package, in a checkout beside it.
GIN_FOLDER = next(
    (folder for folder in (_PACKAGE / "gin", _PACKAGE.parent / "gin") if folder.is_dir()), _PACKAGE / "gin"
)
gin.add_config_file_search_path(str(GIN_FOLDER))


def shipped_files() -> list[str]:
    """Names of the gin files that come with the package, such as `runs/demo.gin`."""
    return sorted(str(path.relative_to(GIN_FOLDER)) for path in GIN_FOLDER.rglob("*.gin"))


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
        raise UserError(_first_line(error)) from error
    except Exception as error:  # gin raises ValueError, SyntaxError, TypeError, OSError, TokenError and others.
        raise UserError(_explain(error)) from error
    finally:
        logging.disable(logging.NOTSET)
    given = [
        *_names(quoted),
        *(name for file in files if not _is_shipped(file) for name in _names(file.read_text().splitlines())),
    ]
    _fail_on_unused(given)
    return experiment, gin.operative_config_str()


def find_file(name: str) -> Path:
    """The gin file of this path or shipped name. Raises UserError with the nearest name if there is none."""
    path = Path(name)
    shipped = shipped_files()
    if path.is_file():
        return path
    for candidate in (name, f"{name}.gin"):
        if candidate in shipped:
            return GIN_FOLDER / candidate
        by_name = [file for file in shipped if Path(file).name == candidate]
        if len(by_name) == 1:
            return GIN_FOLDER / by_name[0]
    nearest = difflib.get_close_matches(name, shipped + [Path(file).stem for file in shipped], n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise UserError(f"--gin_file={name}: there is no such file, here or among the shipped ones in {GIN_FOLDER}{hint}")


def _quote_bare_word(binding: str) -> str:
    name, equals, value = binding.partition("=")
    if not equals or not name.strip():
        raise UserError(f"--gin.{binding}: expected --gin.NAME=VALUE")
    if "@" in value or "%" in value:
        return binding
    try:
        ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        return f"{name} = {value!r}"
    return binding


def _parse_base(base: str) -> None:
    try:
        gin.parse_config(base)
    except Exception as error:
        raise UserError(f"the run's own config.gin cannot be read: {_explain(error)}") from error


def _parse_binding(binding: str) -> None:
    try:
        gin.parse_config(binding)
    except Exception as error:
        explanation = _explain(error)
        raise UserError(explanation if binding in explanation else f"{explanation} (in: {binding})") from error


def _explain(error: Exception) -> str:
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
    return f"gin: {_first_line(error)}{where}"


def _fail_on_unused(names: Iterable[str]) -> None:
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


def _names(lines: Iterable[str]) -> list[str]:
    return [match.group(1) for line in lines if (match := re.match(r"([\w./]+)\s*=", line))]


def _nearest(name: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def _macros() -> list[str]:
    return [scope for scope, selector in gin.config._CONFIG if selector == "gin.macro"]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _is_shipped(file: Path) -> bool:
    return file.resolve().is_relative_to(GIN_FOLDER.resolve())
