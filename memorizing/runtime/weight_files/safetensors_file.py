"""Files in the format safetensors: 8 bytes with the length of a header, the header in JSON, and the tensors' bytes.

The format is small enough to be read and written here; see https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from memorizing.runtime.weight_files.tensor_file import TensorInfo, damaged, read_bytes

# Those that hold weights.
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Bytes of an element of what a file may hold beside them.
_OTHER_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1} | {
    f"{sign}{8 * size}": size for size in (2, 4, 8) for sign in "UI"
}
# The format's own limit.
_MAX_HEADER = 100_000_000
_METADATA = "__metadata__"


class SafetensorsFile:
    """A file of tensors; a `TensorFile`."""

    def __init__(self, path: epath.Path) -> None:
        """
        Raises:
          UserError: it is no such file, or does not hold what its header says.
        """
        self.path = path
        self._tensors = _read_header(path)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return self._tensors

    def read(self, name: str) -> np.ndarray:
        info = self._tensors[name]
        if info.kind not in DTYPES:
            raise damaged(self.path, f"{name} holds {info.kind}, which are no weights")
        content = read_bytes(self.path, info.start, info.stop - info.start)
        return np.frombuffer(content, DTYPES[info.kind]).reshape(info.shape)


def _read_header(path: epath.Path) -> dict[str, TensorInfo]:
    file_size = path.stat().length
    if file_size < 8:
        raise damaged(path, "it has no header")
    length = int.from_bytes(read_bytes(path, 0, 8), "little")
    if not 2 <= length <= min(file_size - 8, _MAX_HEADER):
        raise damaged(path, f"its header is said to have {length:,} bytes")
    try:
        header = json.loads(read_bytes(path, 8, length))
    except (ValueError, RecursionError):
        raise damaged(path, "its header is no JSON") from None
    if not isinstance(header, dict):
        raise damaged(path, "its header is no object of JSON")
    first = 8 + length
    return {name: _info(path, name, entry, first, file_size) for name, entry in header.items() if name != _METADATA}


def _info(path: epath.Path, name: str, entry: Any, first: int, file_size: int) -> TensorInfo:
    """What the header says of a tensor, held against the size of the file."""
    try:
        kind = entry["dtype"]
        shape = tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        num_bytes = DTYPES[kind].itemsize if kind in DTYPES else _OTHER_BYTES[kind]
    except (TypeError, KeyError, ValueError):
        raise damaged(path, f"what its header says of {name[:80]!r} cannot be read") from None
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise damaged(path, f"the shape or the place of {name[:80]!r} is wrong")
    if stop - start != math.prod(shape) * num_bytes:
        raise damaged(path, f"{name[:80]!r} of shape {shape} and type {kind} does not have {stop - start:,} bytes")
    if first + stop > file_size:
        raise damaged(path, f"it ends after {file_size:,} bytes, within or before {name[:80]!r}")
    return TensorInfo(shape, kind, first + start, first + stop)


class Output(NamedTuple):
    """A tensor to be written.

    Attributes:
      name: in the file.
      shape: of the tensor.
      kind: how it is stored; a key of `DTYPES`.
    """

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def num_bytes(self) -> int:
        """Of the tensor in the file."""
        return math.prod(self.shape) * DTYPES[self.kind].itemsize


def write(path: epath.Path, outputs: Iterable[Output], arrays: Iterable[np.ndarray]) -> None:
    """Writes a file.

    Args:
      path: of the file.
      outputs: what is written, in this order.
      arrays: the tensors, each made when it is written.
    """
    outputs = list(outputs)
    text = json.dumps(_header(outputs), separators=(",", ":")).encode()
    # Tensors begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for output, array in zip(outputs, arrays, strict=True):
            assert array.shape == output.shape, f"{output.name}: {array.shape}"
            stored = np.ascontiguousarray(array, DTYPES[output.kind])
            file.write(stored.reshape(-1).view(np.uint8).data)


def _header(outputs: Iterable[Output]) -> Mapping[str, Any]:
    # What readers of other libraries ask for.
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    start = 0
    for output in outputs:
        stop = start + output.num_bytes
        header[output.name] = {"dtype": output.kind, "shape": list(output.shape), "data_offsets": [start, stop]}
        start = stop
    return header
