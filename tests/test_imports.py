"""What may import what. A training process that reads a token cache loads no TensorFlow, `--help` loads no JAX, and imports inside the library go one way."""

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

# design.md section 2, from the ground up: a module may import what stands on a lower line. `None` is everything.
LAYERS = (
    ("array_typing", "batch", "bootstrap", "errors", "json_lines", "tables", "watchdog"),
    ("distributed", "events", "workdir"),
    ("failures", "stopping"),
    ("positions", "context", "sharding", "optimizer", "losses", "search", "windows", "sampling"),
    ("masks", "layers"),
    ("external_memory",),
    ("attention.base",),
    ("attention.full", "attention.xl", "attention.transformer_xl"),
    ("attention.compressive", "attention.knn"),
    ("recurrent_tokens",),
    ("model",),
    ("flops", "compiled_cost"),
    ("accelerators",),
    ("train_state", "decoding"),
    ("checkpoint", "train_step", "metrics"),
    ("evaluate", "experiment", "inspection"),
    ("evaluation_report", "inspection_page", "plots", "program"),
    ("transfer", "training.identity", "training.batches"),
    ("training.start",),
    ("training.loop",),
    ("training.hooks",),
    ("evaluation.evaluation_hook", "evaluation.controls"),
    ("evaluation.train_and_evaluate",),
    ("gin_types",),
    ("gin_registry",),
    ("finished_run", "session_file"),
    ("text_model",),
    ("flops_report", "plan"),
    ("plan_report",),
    ("commands.experiment_flags",),
    ("commands.evaluate", "commands.generate", "commands.inspect", "commands.plan", "commands.train"),
    ("main",),
    ("__main__",),
)
PACKAGES = ("attention", "commands", "evaluation", "training")
# Leaves that know pytrees, not modules (design.md section 2).
LEAVES = {
    "sharding": {"array_typing", "errors"},
    "optimizer": {"array_typing", "errors"},
    "search": {"errors"},
    "losses": {"array_typing"},
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


def test_imports_go_one_way():
    height = {name: level for level, names in enumerate(LAYERS) for name in names}
    for module in MODULES:
        name = module.removeprefix("memorizing.")
        if module == "memorizing" or name in PACKAGES or name.startswith("synthetic"):
            continue
        assert name in height, f"{name}: give it a place in LAYERS"
        for other in imported(module) - {"synthetic", *PACKAGES}:
            if other.startswith("synthetic."):
                continue
            assert height[other] < height[name], f"{name} imports {other}"


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
