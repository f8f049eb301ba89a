"""A folder as Hugging Face's libraries write one: config.json, tokenizer.json, and weights in safetensors."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from etils import epath

from memorizing.errors import UserError, first_line
from memorizing.runtime.weight_files.safetensors_file import SafetensorsFile
from memorizing.runtime.weight_files.tensor_file import TensorInfo, damaged

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Configurations and indices, in bytes.
_MAX_JSON = 1 << 26


class FolderOfTensors:
    """The safetensors files of a folder, as one; a `TensorFile`."""

    def __init__(self, folder: epath.Path) -> None:
        """
        Raises:
          UserError: there are none, one is damaged, or two have a tensor of the same name.
        """
        self._files = [SafetensorsFile(path) for path in _weight_paths(folder)]
        self._file_of: dict[str, SafetensorsFile] = {}
        for file in self._files:
            for name in file.tensors:
                if name in self._file_of:
                    raise UserError(f"{name} is in {self._file_of[name].path} and in {file.path}: remove one of them")
                self._file_of[name] = file

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: file.tensors[name] for name, file in self._file_of.items()}

    def read(self, name: str) -> np.ndarray:
        return self._file_of[name].read(name)


def read_json(path: epath.Path) -> Any:
    """A file of JSON.

    Raises:
      UserError: it is not there, far too large, or no JSON.
    """
    if not path.exists():
        raise UserError(f"{path.parent} has no {path.name}: give the folder of a model in Hugging Face's format")
    if path.stat().length > _MAX_JSON:
        raise damaged(path, f"it has {path.stat().length:,} bytes")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"it is no JSON ({first_line(error)[:80]})") from None


def refuse_pickled(path: epath.Path) -> None:
    """Raises UserError where a file would be executed to be read."""
    if path.suffix in _PICKLED:
        raise UserError(
            f"{path} is a pickle: reading it would execute what is in it; take the model's files in safetensors, or "
            "save it anew as such where you trust it"
        )


def _weight_paths(folder: epath.Path) -> list[epath.Path]:
    """The files with weights: the one, those of the index, or all."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        return _indexed(folder)
    found = sorted(folder.glob("*.safetensors"))
    if found:
        return found
    for path in sorted(folder.iterdir()):
        refuse_pickled(path)
    raise UserError(f"{folder} has no {WEIGHTS}, and no other file of weights that is read")


def _indexed(folder: epath.Path) -> list[epath.Path]:
    """The files that the index names."""
    index = read_json(folder / INDEX)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise damaged(folder / INDEX, "it has no weight_map")
    names = sorted({*files.values()})
    for name in names:
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise damaged(folder / INDEX, f"it names {name[:80]!r}")
        if not (folder / name).exists():
            raise UserError(f"{folder / name} is missing: {INDEX} names it")
    return [folder / name for name in names]
