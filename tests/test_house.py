"""The laws of the house: who may import whom, what must not be named where, and how large a room may be.

A law is a function from a file to its offences. Each is shown to find what it is for, and to leave the right alone.
"""

from __future__ import annotations

import ast
import collections
import graphlib
import importlib.util
import io
import pathlib
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import pytest

from memorizing.config.registry import MECHANISMS

ROOT = pathlib.Path(__file__).parents[1]
PROGRAMS = ("memorizing", "data", "launch", "benchmarks", "examples")
EVERYTHING = (*PROGRAMS, "tests")

# From the ground up: a room may import itself and the rooms before it.
ORDER = ("words", "runtime", "models", "training", "cost", "evaluation", "generation", "config", "commands", "main")
WORDS = ("array_typing", "batch", "context", "errors")
MAIN = ("main", "__main__", "__init__")
MAY_IMPORT = {room: {*ORDER[: index + 1]} for index, room in enumerate(ORDER)}
# Beside the rooms in order: data that is made or read, and what starts runs.
MAY_IMPORT |= {"synthetic": {"synthetic", "words"}, "data": {"data", "words"}, "launch": {"launch"}}
for above in ("config", "commands", "main"):
    MAY_IMPORT[above] |= {"synthetic"}
EXCEPTIONS = {("memorizing.data.gin_registry", "memorizing.config.types")}

# Where mechanisms are named, and where parts of a model are applied.
MECHANISM_ROOMS = ("memorizing/models/attention/", "memorizing/config/")
APPLICATION = ("memorizing/models/language_model.py", "memorizing/models/stack/stack.py")

# Private names of other packages that a file may use, and why.
ADAPTERS = {
    ("memorizing/config/files.py", "_FILE_READERS"): "gin has no public way to take back how it looks for a file",
    ("memorizing/runtime/distributed.py", "_src"): "JAX has no public name for the key-value store of its processes",
    (
        "data/prepare/workers.py",
        "_processes",
    ): "before Python 3.14 a pool has no public way to end its processes at once",
    ("launch/command.py", "_SubParsersAction"): "argparse has no public name for what `add_subparsers` returns",
}
# Documented names that only look private.
PUBLIC = {"_asdict", "_fields", "_replace", "_exit"}

MAX_TOP, MAX_MODULES, MAX_PROSE, MAX_README = 14, 12, 120, 200


class File(NamedTuple):
    """A file of the repository.

    Attributes:
      path: from the repository's root, with slashes.
      text: what is in it.
    """

    path: str
    text: str

    @property
    def module(self) -> str:
        """The dotted name under which it is installed; of a package, that of its `__init__`."""
        parts = self.path.removesuffix(".py").split("/")
        return ".".join(parts if parts[0] == "memorizing" else ["memorizing", *parts])

    @property
    def room(self) -> str:
        return room(self.module)

    def nodes(self) -> Iterator[ast.AST]:
        return ast.walk(ast.parse(self.text))


Law = Callable[[File], list[str]]


def room(module: str) -> str:
    """`models` of `memorizing.models.attention.knn`, `words` of `memorizing.batch`."""
    name = module.split(".")[1]
    return "words" if name in WORDS else "main" if name in MAIN else name


def imports(file: File) -> list[tuple[str, str]]:
    """Everything that a file imports, wherever in its text: its dotted name, and what the file calls it."""
    package = file.module.rpartition(".")[0]
    found = []
    for node in file.nodes():
        if isinstance(node, ast.Import):
            found += [(alias.name, alias.asname or alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found += [(f"{origin}.{alias.name}", alias.asname or alias.name) for alias in node.names]
    return found


def imported(file: File) -> set[str]:
    """Everything that a file imports, as dotted names."""
    return {name for name, _ in imports(file)}


def named(file: File) -> set[str]:
    """Every identifier that stands in a file, and every text that could be one."""
    names = set()
    for node in file.nodes():
        if isinstance(node, ast.alias):
            names |= {*node.name.split("."), node.asname or node.name}
        elif isinstance(node, ast.Constant):
            names |= {node.value} if isinstance(node.value, str) else set()
        else:
            names |= {getattr(node, field) for field in ("id", "attr", "arg", "name") if hasattr(node, field)}
    return names


# The laws.


def imports_against_the_order(file: File) -> list[str]:
    """Rooms that a room must not know."""
    allowed = MAY_IMPORT.get(file.room)
    if allowed is None:
        return [f"{file.path}: {file.room} is no room: give it a place in ORDER"]
    ours = {name for name in imported(file) if name.startswith("memorizing.")}
    # `from memorizing import __version__` is no room.
    wrong = {name for name in ours if room(name) not in allowed and not name.startswith("memorizing.__")}
    exempt = {name for name in wrong if any((file.module, name.rpartition(".")[0]) == pair for pair in EXCEPTIONS)}
    return [f"{file.path} imports {name}" for name in sorted(wrong - exempt)]


def relative_imports(file: File) -> list[str]:
    """In the library a name is written in full."""
    nodes = [node for node in file.nodes() if isinstance(node, ast.ImportFrom) and node.level]
    return [f"{file.path}:{node.lineno} is a relative import" for node in nodes]


def jax_in_the_launcher(file: File) -> list[str]:
    """What starts runs works on a machine without JAX."""
    heavy = {name for name in imported(file) if name.split(".")[0] in ("jax", "jaxlib", "flax", "numpy")}
    return [f"{file.path} imports {name}" for name in sorted(heavy)] if file.room == "launch" else []


def mechanisms_named(file: File) -> list[str]:
    """Classes of mechanisms (configuration, state, layers), or modules of mechanisms, outside their rooms."""
    if file.path.startswith(MECHANISM_ROOMS):
        return []
    modules = {mechanism.__module__ for mechanism in MECHANISMS}
    contents = [value for module in modules for value in vars(sys.modules[module]).values()]
    classes = {value.__name__ for value in contents if isinstance(value, type) and value.__module__ in modules}
    imports = {name for name in imported(file) if name in modules or name.rpartition(".")[0] in modules}
    return [f"{file.path} names {name}" for name in sorted(named(file) & classes | imports)]


def sentinels(file: File) -> list[str]:
    """No token id means nothing: `Batch.is_real` says what is real."""
    return [f"{file.path} names PADDING"] if "PADDING" in named(file) else []


def applications(file: File) -> list[str]:
    """Calls of Flax's `apply` outside the one function that applies the model, and the stack of its layers."""
    if file.path in APPLICATION or not file.path.startswith("memorizing/"):
        return []
    # `language_model.apply(...)` is that function: what is called is a module of ours.
    ours = {alias for name, alias in imports(file) if name.startswith("memorizing.")}
    calls = [node.func for node in file.nodes() if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    wrong = [call for call in calls if call.attr == "apply" and getattr(call.value, "id", None) not in ours]
    return [f"{file.path}:{call.lineno} calls {ast.unparse(call)}" for call in wrong]


def private_names(file: File) -> list[str]:
    """Names with an underscore that belong to another module or package."""
    return [f"{file.path} uses {name}" for name in foreign_names(file) if (file.path, name) not in ADAPTERS]


def foreign_names(file: File) -> list[str]:
    """The private names in a file that it does not define."""
    own = {node.name for node in file.nodes() if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    found = {part for name in imported(file) for part in name.split(".")}
    for node in file.nodes():
        if isinstance(node, ast.Attribute):
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            (own if of_self else found).add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            found |= {arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)}
    return sorted(name for name in found - own - PUBLIC if name.startswith("_") and not name.startswith("__"))


def long_prose(file: File) -> list[str]:
    """Lines of comments and docstrings that are too long to read."""
    readline = io.StringIO(file.text).readline
    numbers = {token.start[0] for token in tokenize.generate_tokens(readline) if token.type == tokenize.COMMENT}
    for node in file.nodes():
        is_documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if is_documented and ast.get_docstring(node) is not None:
            numbers |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    lines = file.text.splitlines()
    return [f"{file.path}:{number}" for number in sorted(numbers) if len(lines[number - 1]) > MAX_PROSE]


LAWS = {
    imports_against_the_order: ("memorizing", "data", "launch"),
    relative_imports: ("memorizing",),
    jax_in_the_launcher: ("launch",),
    mechanisms_named: PROGRAMS,
    sentinels: PROGRAMS,
    applications: ("memorizing",),
    private_names: PROGRAMS,
    long_prose: EVERYTHING,
}


def circle(sources: Iterable[File]) -> list[str]:
    """Modules that import each other in a circle, if there are any."""
    by_name = {file.module.removesuffix(".__init__"): file for file in sources}
    # `from memorizing.models import stack` imports a module, `from memorizing.errors import UserError` is of one.
    graph = {
        name: {other if other in by_name else other.rpartition(".")[0] for other in imported(file)} - {name}
        for name, file in by_name.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def crowded(paths: Iterable[str]) -> list[str]:
    """The top of the library, and packages, with more than a reader can survey."""
    modules = [path.removesuffix(".py").split("/") for path in paths]
    top = {parts[1] for parts in modules if parts[0] == "memorizing"} - {"__init__", "__main__"}
    sizes = collections.Counter("/".join(parts[:-1]) for parts in modules if parts[-1] not in ("__init__", "__main__"))
    del sizes["memorizing"]
    found = [f"memorizing has {len(top)} entries: {sorted(top)}"] if len(top) > MAX_TOP else []
    return found + [f"{package} has {size} modules" for package, size in sizes.items() if size > MAX_MODULES]


def files(*folders: str) -> list[File]:
    """The Python files of folders."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [File(path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Law):
    offences = [offence for file in files(*LAWS[law]) for offence in law(file)]
    assert not offences, "\n".join(offences)


def test_no_imports_in_a_circle():
    assert circle(files("memorizing", "data", "launch")) == []


def test_rooms_are_not_crowded():
    # launch/ is used as one command and stays as it is.
    offences = crowded(file.path for file in files("memorizing", "data", "benchmarks", "examples"))
    assert not offences, "\n".join(offences)


def test_every_exception_is_needed():
    sources = files(*PROGRAMS)
    modules = {(file.module, name.rpartition(".")[0]) for file in sources for name in imported(file)}
    private = {(file.path, name) for file in sources for name in foreign_names(file)}
    assert EXCEPTIONS - modules == set()
    assert {*ADAPTERS} - private == set()
    assert {*APPLICATION} - {file.path for file in sources} == set()


def test_the_front_door_is_short():
    num_lines = len((ROOT / "README.md").read_text().splitlines())
    assert num_lines <= MAX_README


def test_every_gin_file_is_documented():
    pages = "".join(path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))])
    names = sorted(path.relative_to(ROOT / "gin").with_suffix("").as_posix() for path in (ROOT / "gin").rglob("*.gin"))
    missing = [name for name in names if name not in pages]
    assert not missing, "\n".join(missing)


# Each law finds what it is for.

KNN = MECHANISMS[0].__module__


@pytest.mark.parametrize(
    ("law", "path", "text"),
    [
        (imports_against_the_order, "memorizing/models/stack.py", "from memorizing.training import loop"),
        (imports_against_the_order, "memorizing/models/stack.py", "import memorizing.runtime.events, memorizing.main"),
        (imports_against_the_order, "memorizing/models/stack.py", "def f():\n    from memorizing import training"),
        (imports_against_the_order, "memorizing/context.py", "if TYPE_CHECKING:\n    import memorizing.models.stack"),
        (imports_against_the_order, "memorizing/models/attention/knn.py", "from ...training.loop import train"),
        (imports_against_the_order, "memorizing/generation/decoding.py", "from memorizing.config.loading import load"),
        (imports_against_the_order, "memorizing/synthetic/babi.py", "from memorizing.models import stack"),
        (imports_against_the_order, "memorizing/models/stack.py", "from memorizing.synthetic import Copy"),
        (imports_against_the_order, "memorizing/cost/plan.py", "from memorizing.data import sources"),
        (imports_against_the_order, "data/streams/order.py", "from memorizing.runtime import events"),
        (imports_against_the_order, "data/streams/order.py", "from memorizing.config.types import register"),
        (imports_against_the_order, "data/gin_registry.py", "from memorizing.config.loading import load_experiment"),
        (imports_against_the_order, "launch/gke.py", "from memorizing.errors import UserError"),
        (imports_against_the_order, "memorizing/utils.py", ""),
        (relative_imports, "memorizing/models/stack.py", "from . import layers"),
        (jax_in_the_launcher, "launch/gke.py", "def f():\n    import jax.numpy as jnp"),
        (mechanisms_named, "memorizing/training/loop.py", "def f(x):\n    return isinstance(x, lib.KNNAttention)"),
        (mechanisms_named, "memorizing/cost/plan.py", "from memorizing.models.attention import KNNCore as Core"),
        (mechanisms_named, "memorizing/cost/plan.py", f"from {KNN} import anything"),
        (mechanisms_named, "memorizing/cost/plan.py", "type(x).__name__ == 'KNNAttention'"),
        (mechanisms_named, "benchmarks/step.py", "XLCore()"),
        (sentinels, "memorizing/batch.py", "PADDING = 0"),
        (sentinels, "data/streams/segments.py", "from memorizing.batch import PADDING as nothing"),
        (sentinels, "data/streams/segments.py", "tokens != batch.PADDING"),
        (applications, "memorizing/training/step.py", "model.apply({'params': params}, x)"),
        (applications, "memorizing/training/step.py", "LanguageModel(config).apply(variables, x)"),
        (private_names, "memorizing/training/step.py", "from jax._src import core"),
        (private_names, "memorizing/training/step.py", "from flax.linen import _private"),
        (private_names, "memorizing/config/loading.py", "import gin\ngin.config._CONFIG.clear()"),
        (private_names, "memorizing/config/types.py", "getattr(hint, '_is_protocol', False)"),
        (private_names, "memorizing/commands/train.py", "from memorizing.main import _run"),
        (private_names, "memorizing/runtime/distributed.py", "from jax._src import core\ncore._private"),
        (long_prose, "memorizing/batch.py", "x = 1\n# " + "long " * 24),
        (long_prose, "memorizing/batch.py", 'def f():\n    """Short.\n\n    ' + "long " * 24 + '\n    """'),
    ],
)
def test_a_law_can_be_broken(law: Law, path: str, text: str):
    assert law(File(path, text))


@pytest.mark.parametrize(
    ("law", "path", "text"),
    [
        (imports_against_the_order, "memorizing/models/attention/knn.py", "from memorizing.models import search"),
        (imports_against_the_order, "memorizing/config/runs.py", "from memorizing.generation import text_model"),
        (imports_against_the_order, "memorizing/config/registry.py", "from memorizing.synthetic import Copy"),
        (imports_against_the_order, "memorizing/main.py", "from memorizing import __version__\nimport jax"),
        (imports_against_the_order, "memorizing/__init__.py", "from memorizing.generation.text_model import TextModel"),
        (imports_against_the_order, "data/gin_registry.py", "from memorizing.config.types import register"),
        (imports_against_the_order, "data/streams/order.py", "from ..tokens import paths\nfrom .segments import Line"),
        (mechanisms_named, "memorizing/models/attention/base.py", "KNNAttention"),
        (mechanisms_named, "memorizing/commands/train.py", "HELP = 'set --gin.KNNAttention.memory_size=4096'"),
        (sentinels, "memorizing/batch.py", '"""There is no PADDING."""\nPADDING_MODE = 1'),
        (
            applications,
            "memorizing/training/step.py",
            "from memorizing.models import language_model as lm\nlm.apply(x)",
        ),
        (applications, "memorizing/training/step.py", "from memorizing.models import model\nmodel.apply(config, x)"),
        (applications, "memorizing/models/stack/stack.py", "block.apply(variables, x)"),
        (private_names, "memorizing/runtime/distributed.py", "from jax._src import distributed"),
        (private_names, "memorizing/batch.py", "self._x = 1\nother._x = 2\nrow._replace(a=1)\n__version__"),
        (long_prose, "memorizing/batch.py", "x = '" + "long " * 24 + "'"),
    ],
)
def test_a_law_leaves_the_right_alone(law: Law, path: str, text: str):
    assert law(File(path, text)) == []


def test_a_circle_is_found():
    first = File("memorizing/batch.py", "def f():\n    from memorizing.models import stack")
    second = File("memorizing/models/stack.py", "from memorizing.models.layers import Einsum")
    third = File("memorizing/models/layers.py", "from memorizing.batch import Batch")
    assert circle([first, second]) == []
    assert circle([first, second, third])


def test_a_crowded_room_is_found():
    assert crowded([f"memorizing/room{i}/__init__.py" for i in range(MAX_TOP)]) == []
    assert crowded([f"memorizing/room{i}/__init__.py" for i in range(MAX_TOP + 1)])
    assert crowded(["memorizing/__init__.py", *(f"data/streams/m{i}.py" for i in range(MAX_MODULES))]) == []
    assert crowded([f"data/streams/m{i}.py" for i in range(MAX_MODULES + 1)])
