"""A run's parameters as a folder in Hugging Face's format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from memorizing.errors import UserError
from memorizing.models.pretrained.reading_config import read_config
from memorizing.models.pretrained.tensors import OWN, Tensor, tensors_of
from memorizing.models.pretrained.writing_config import write_config
from memorizing.runtime.weight_files import safetensors_file
from memorizing.runtime.weight_files.folder import CONFIG, INDEX, WEIGHTS
from memorizing.runtime.weight_files.safetensors_file import Output
from memorizing.runtime.workdir import resolve
from memorizing.training.pretrained.run_folder import ORIGIN, Origin

# Files larger than that are awkward to move about; others split there too.
MAX_FILE_BYTES = 5_000_000_000
# In Torch's words, by that of safetensors.
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_GENERATION = "generation_config.json"
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Exported(NamedTuple):
    """What was written.

    Attributes:
      folder: where.
      num_tensors: of the model itself.
      own: names of the tensors that other libraries do not know: those of a memory.
      num_bytes: of all tensors.
    """

    folder: epath.Path
    num_tensors: int
    own: list[str]
    num_bytes: int


def export(
    origin: Origin,
    params: Mapping[str, np.ndarray],
    to: str,
    dtype: str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Exported:
    """Writes config.json, the tokenizer, and the parameters in safetensors.

    Args:
      origin: the model that the run began with.
      params: of the run, arrays of single layers by path.
      to: the folder, which must not exist yet.
      dtype: of the tensors, in the words of safetensors; None for the origin's.
      max_file_bytes: more are split over several files, with an index.

    Raises:
      UserError: the folder is there, or the run's parameters are those of another model.
    """
    folder = _new_folder(to)
    dtype = dtype or origin.dtype
    architecture = read_config(origin.config, str(origin.folder / ORIGIN))
    tensors = tensors_of(architecture)
    _check(tensors, params)
    known = {path for tensor in tensors for path in tensor.paths}
    own = {_own_name(path): path for path in sorted(params) if path not in known}
    outputs = [Output(tensor.name, tensor.shape, dtype) for tensor in tensors]
    # A memory's parameters are few, and stay as they are.
    outputs += [Output(name, params[path].shape, "F32") for name, path in own.items()]
    joined = {tensor.name: tensor for tensor in tensors}

    def arrays(outputs: Sequence[Output]) -> Iterator[np.ndarray]:
        for output in outputs:
            if output.name in own:
                yield params[own[output.name]]
            else:
                tensor = joined[output.name]
                yield tensor.join([params[path] for path in tensor.paths])

    # Under another name until it is complete; what was killed meanwhile left parts of another model perhaps.
    partial = folder.parent / f"{folder.name}.partial"
    if partial.exists():
        partial.rmtree()
    partial.mkdir(parents=True)
    parts = _in_files(outputs, max_file_bytes)
    for name, members in parts.items():
        safetensors_file.write(partial / name, members, arrays(members))
    if len(parts) > 1:
        _write_json(partial / INDEX, _index(parts))
    special = {name: origin.config[name] for name in _SPECIAL_IDS if origin.config.get(name) is not None}
    _write_json(partial / CONFIG, write_config(architecture, DTYPE_NAMES[dtype]) | special)
    if special:
        _write_json(partial / _GENERATION, special)
    for name in origin.tokenizer_files:
        (partial / name).write_bytes((origin.folder / name).read_bytes())
    partial.rename(folder)
    return Exported(folder, len(tensors), list(own), sum(output.num_bytes for output in outputs))


def _new_folder(to: str) -> epath.Path:
    folder = resolve(to)
    if folder.exists():
        raise UserError(f"--to={to} is there already: choose another folder, or remove it")
    return folder


def _check(tensors: Sequence[Tensor], params: Mapping[str, np.ndarray]) -> None:
    """Raises UserError where the parameters are not those of the architecture."""
    for tensor in tensors:
        for path in tensor.paths:
            if path not in params:
                raise UserError(f"the run has no {path}, which {tensor.name} is made of: is it another model's run?")
    for tensor in tensors:
        shapes = [part.shape for part in tensor.split(np.broadcast_to(np.float32(0), tensor.shape))]
        for path, shape in zip(tensor.paths, shapes, strict=True):
            if params[path].shape != shape:
                raise UserError(
                    f"the run's {path} has the shape {params[path].shape}, and {shape} in the model that was imported"
                )


def _own_name(path: str) -> str:
    """`memorizing.layer_10.attention.core.alpha` of `params/layer_10/attention/core/alpha`."""
    return OWN + path.removeprefix("params/").replace("/", ".")


def _in_files(outputs: Sequence[Output], max_file_bytes: int) -> dict[str, list[Output]]:
    """The outputs of each file, in order."""
    groups: list[list[Output]] = [[]]
    num_bytes = 0
    for output in outputs:
        if groups[-1] and num_bytes + output.num_bytes > max_file_bytes:
            groups.append([])
            num_bytes = 0
        groups[-1].append(output)
        num_bytes += output.num_bytes
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    number = len(groups)
    return {f"model-{index:05d}-of-{number:05d}.safetensors": group for index, group in enumerate(groups, start=1)}


def _index(parts: Mapping[str, Sequence[Output]]) -> dict[str, Any]:
    """Which tensor is in which file."""
    total = sum(output.num_bytes for members in parts.values() for output in members)
    weight_map = {output.name: name for name, members in parts.items() for output in members}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _write_json(path: epath.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
