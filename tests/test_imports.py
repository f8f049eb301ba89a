"""What is loaded. A training process that reads a token cache loads no TensorFlow, and `--help` loads no JAX.

In which order rooms import each other is one of the laws in test_house.py.
"""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

import memorizing

PACKAGE = pathlib.Path(memorizing.__file__).parent
FOLDERS = ("data", "launch", "gin")
MODULES = sorted(
    ".".join(("memorizing", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.relative_to(PACKAGE).parts[0] not in FOLDERS
)

# Leaves that know pytrees, not modules.
LEAVES = {
    "runtime.sharding": {"array_typing", "errors"},
    # Groups of parameters speak of layers by name.
    "training.optimizer": {"array_typing", "errors", "models.stack", "models.stack.arrays"},
    "models.memory.blocks": set(),
    "models.memory.placement": {"models.positions"},
    "models.memory.slabs": {"models.memory.blocks", "models.memory.placement"},
    "models.memory.search": {
        "errors",
        "models.memory",
        "models.memory.blocks",
        "models.memory.placement",
        "models.memory.slabs",
    },
    "models.losses": {"array_typing"},
}


def imported(module: str) -> set[str]:
    """Modules of ours that a module imports, wherever in its text, without the package's name."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: absolute imports only"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name.removeprefix("memorizing.") for name in names & set(MODULES) if name != "memorizing"}


def fresh(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_import_almost_nothing(leaf: str):
    assert imported(f"memorizing.{leaf}") <= LEAVES[leaf]


def test_training_knows_neither_evaluation_nor_cost():
    """They come in as hooks and functions."""
    found = waiting = {module.removeprefix("memorizing.") for module in MODULES if "memorizing.training" in module}
    while waiting:
        waiting = set().union(*(imported(f"memorizing.{name}") for name in waiting)) - found
        found = found | waiting
    assert found & {"evaluate", "plots", "accelerators", "flops", "inspection"} == set()
    assert not any(name.startswith("evaluation") for name in found)


def test_synthetic_data_knows_no_model():
    """It hands batches to the training side and knows nothing else of it."""
    for module in MODULES:
        if module.startswith("memorizing.synthetic"):
            others = {name for name in imported(module) if not name.startswith("synthetic")}
            assert others <= {"array_typing", "batch", "errors"}, module


def test_the_core_loads_neither_tensorflow_nor_the_data_side():
    unwanted = (
        "tensorflow",
        "seqio",
        "tensorflow_datasets",
        "apache_beam",
        "torch",
        "memorizing.data",
        "memorizing.launch",
    )
    imports = "\n".join(f"import {module}" for module in MODULES if not module.endswith("__main__"))
    ended = fresh(f"{imports}\nimport sys\nprint([name for name in {unwanted!r} if name in sys.modules])")
    assert ended.stdout.strip() == "[]", ended.stdout + ended.stderr


def test_the_package_and_the_command_line_load_nothing_heavy():
    """`memorizing --help` answers at once."""
    ended = fresh(
        "import sys, memorizing.main\n"
        "try: memorizing.main._run(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('jax', 'flax', 'orbax', 'gin', 'numpy') if name in sys.modules])"
    )
    assert ended.stdout.strip().splitlines()[-1] == "[]", ended.stdout + ended.stderr


def test_sigterm_while_importing_asks_to_be_started_again():
    """A launcher would count 143 as a failure."""
    ended = fresh(
        "import importlib, os, time, memorizing.main as main\n"
        "def slow(name):\n"
        "    os.kill(os.getpid(), 15)\n"
        "    time.sleep(60)\n"
        "importlib.import_module = slow\n"
        "main.main(['train'])\n"
    )
    assert ended.returncode == 42, ended.stderr
