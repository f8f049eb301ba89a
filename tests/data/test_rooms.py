"""Imports inside the data side go one way, from room to room in the order that its docstring tells."""

from __future__ import annotations

import ast
import pathlib

import pytest

import memorizing.data

ROOT = pathlib.Path(memorizing.data.__file__).parent
ORDER = ("errors", "documents", "formats", "corpora", "tokens", "tasks", "streams", "prepare", "gin_registry")
# What every side of the library may import.
SHARED_WORDS = {"array_typing", "batch", "context", "errors"}
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def forbidden(room: str, source: str) -> list[str]:
    """The imports of our own modules that a room must not have, out of the text of one of its modules."""
    imported = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported += ["." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names]
    ours = [name.split(".") for name in imported if name.startswith(("memorizing.", "."))]
    return [".".join(name) for name in ours if not _is_allowed(room, name)]


def _is_allowed(room: str, name: list[str]) -> bool:
    if name[:2] == ["memorizing", "data"]:
        return ORDER.index(name[2]) <= ORDER.index(room)
    return name[0] == "memorizing" and (name[1] in SHARED_WORDS or room == "gin_registry")


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_one_way(module: pathlib.Path):
    assert forbidden(module.with_suffix("").parts[0], (ROOT / module).read_text()) == []


@pytest.mark.parametrize(
    "room, line",
    [
        ("formats", "from memorizing.data.corpora import catalogue"),
        ("tokens", "from memorizing.data.tasks.splits import TRAIN"),
        ("streams", "import memorizing.data.prepare.pipeline"),
        ("corpora", "from memorizing.data import gin_registry"),
        ("streams", "from memorizing.training import loop"),
        ("tasks", "from . import splits"),
    ],
)
def test_a_wrong_import_is_found(room: str, line: str):
    assert forbidden(room, f"def late():\n    {line}\n") != []


def test_rooms_are_small():
    folders = [ROOT, *{path.parent for path in ROOT.rglob("*.py")}]
    assert max(len(list(folder.glob("*.py"))) for folder in folders) <= 13, "12 modules and __init__"
