"""The gin files that come with the package, and how a file is found by its name."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import IO, Any

import gin.config
from gin import resource_reader

from memorizing.errors import UserError

_PACKAGE = Path(__file__).parents[1]
_IN_A_WHEEL = _PACKAGE / "gin"
_IN_A_CHECKOUT = _PACKAGE.parent / "gin"
GIN_FOLDER = _IN_A_CHECKOUT if _IN_A_CHECKOUT.is_dir() and not _IN_A_WHEEL.is_dir() else _IN_A_WHEEL
gin.add_config_file_search_path(str(GIN_FOLDER))


def _is_in_a_package(path: str) -> bool:
    """Whether gin would find an included file in a Python package. A folder such as `runs` is none, and no mistake."""
    try:
        return resource_reader.system_path_file_exists(path)
    except TypeError:
        return False


def _open(path: str) -> IO[str]:
    """A gin file; a text file may begin with a byte-order mark."""
    return open(path, encoding="utf-8-sig")


# gin's own check fails at a folder of that name that Python could import; it comes first on a path that gin includes.
_readers: list[Any] = gin.config._FILE_READERS
_readers[:] = [
    (
        _open if reader is open else reader,
        _is_in_a_package if exists is resource_reader.system_path_file_exists else exists,
    )
    for reader, exists in _readers
]


def shipped_files() -> list[str]:
    """Names of the gin files that come with the package, such as `runs/demo.gin`."""
    return sorted(str(path.relative_to(GIN_FOLDER)) for path in GIN_FOLDER.rglob("*.gin"))


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
    stems = [Path(file).stem for file in shipped]
    nearest = difflib.get_close_matches(name, shipped + stems, n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise UserError(f"--gin_file={name}: there is no such file, here or among the shipped ones in {GIN_FOLDER}{hint}")


def is_shipped(file: Path) -> bool:
    return file.resolve().is_relative_to(GIN_FOLDER.resolve())
