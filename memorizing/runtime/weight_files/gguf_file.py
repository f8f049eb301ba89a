"""Files in the format GGUF, version 3: settings by name, a table of tensors, and their bytes.

The header is read here: the package `gguf` makes an array of every number and every word of a vocabulary, which takes
most of a minute, and believes every length that it reads. What is in the blocks of a tensor is its to say.
"""

from __future__ import annotations

import math
import mmap
import struct
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from memorizing.errors import UserError
from memorizing.runtime.weight_files.tensor_file import TensorInfo, damaged, read_bytes

# Name, elements of a block, and its bytes, by number (ggml.h). Those of one element are plain numbers.
_KINDS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
_BLOCK_BYTES = {name: (elements, num_bytes) for name, elements, num_bytes in _KINDS.values()}
_PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# Formats of `struct` by the number of a setting's type.
_SCALARS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?", "", "", "Q", "q", "d")))
_STRING, _ARRAY = 8, 9
_MAX_SETTINGS, _MAX_TENSORS, _MAX_AXES, _MAX_AXIS = 1 << 16, 1 << 20, 4, 1 << 40
# Elements that are brought from blocks to numbers at a time.
_AT_A_TIME = 1 << 22
EXTRA = "pip install -e '.[pretrained]'"


class GGUFFile:
    """A file of tensors; a `TensorFile`.

    Attributes:
      path: of the file.
      settings: by name, such as `llama.block_count`.
    """

    def __init__(self, path: epath.Path) -> None:
        """
        Raises:
          UserError: it is no such file, or does not hold what its header says.
        """
        self.path = path
        header = _Header(path)
        self.settings, self._tensors = header.read()

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return self._tensors

    def read(self, name: str) -> np.ndarray:
        """A tensor, float32 unless the file has plain numbers of another dtype."""
        info = self._tensors[name]
        content = np.frombuffer(read_bytes(self.path, info.start, info.stop - info.start), np.uint8)
        if info.kind in _PLAIN:
            return content.view(_PLAIN[info.kind]).reshape(info.shape)
        quantization, dequantize = _dequantizer(info.kind)
        elements, num_bytes = _BLOCK_BYTES[info.kind]
        # [blocks, bytes]
        blocks = content.reshape(-1, num_bytes)
        numbers = np.empty((len(blocks), elements), np.float32)
        step = _AT_A_TIME // elements
        for first in range(0, len(blocks), step):
            numbers[first : first + step] = dequantize(blocks[first : first + step], quantization)
        return numbers.reshape(info.shape)


def _dequantizer(kind: str) -> tuple[Any, Any]:
    """The function of the package `gguf` that turns blocks into numbers, and its word for this kind.

    Raises:
      UserError: it is not installed.
    """
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise UserError(f"tensors of the kind {kind} are read with the package gguf: {EXTRA}") from None
    return GGMLQuantizationType[kind], dequantize


class _Header:
    """Reads the header of a file from its beginning on."""

    def __init__(self, path: epath.Path) -> None:
        self._path = path
        self._place = 0

    def read(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        """Settings and tensors."""
        if self._path.stat().length < 24:
            raise damaged(self._path, "it has no header")
        with open(self._path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            self._content = content
            self._size = len(content)
            try:
                return self._read()
            except (struct.error, UnicodeDecodeError):
                raise damaged(self._path, f"its header cannot be read at byte {self._place:,}") from None

    def _read(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        magic, version, num_tensors, num_settings = self._take("<4sIQQ")
        if magic != b"GGUF":
            raise UserError(f"{self._path} is no GGUF file")
        if version not in (2, 3):
            raise UserError(f"{self._path} is of version {version} of GGUF: 2 and 3 are read")
        if num_tensors > _MAX_TENSORS or num_settings > _MAX_SETTINGS:
            raise damaged(self._path, f"it is said to have {num_tensors:,} tensors and {num_settings:,} settings")
        settings: dict[str, Any] = {}
        for _ in range(num_settings):
            name = self._string()
            (kind,) = self._take("<I")
            settings[name] = self._value(kind)
        table = [self._table_entry() for _ in range(num_tensors)]
        alignment = settings.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
            raise damaged(self._path, f"general.alignment = {alignment}")
        first = -(-self._place // alignment) * alignment
        return settings, {name: self._info(name, shape, number, offset, first) for name, shape, number, offset in table}

    def _take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._content, self._place)
        self._place += struct.calcsize(layout)
        return values

    def _string(self) -> str:
        (length,) = self._take("<Q")
        return self._bytes(length).decode()

    def _bytes(self, length: int) -> bytes:
        if length > self._size - self._place:
            raise damaged(self._path, f"{length:,} bytes are said to follow byte {self._place:,}")
        start, self._place = self._place, self._place + length
        return self._content[start : self._place]

    def _value(self, kind: int) -> Any:
        """A setting's value; numbers in a list are an array."""
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        layout = _SCALARS.get(kind)
        if not layout:
            raise damaged(self._path, f"a setting before byte {self._place:,} has the unknown type {kind}")
        (value,) = self._take(f"<{layout}")
        return value

    def _array(self) -> Any:
        kind, length = self._take("<IQ")
        layout = _SCALARS.get(kind)
        # A text takes 8 bytes at least.
        num_bytes = struct.calcsize(f"<{layout}") if layout else 8
        if length > (self._size - self._place) // num_bytes or (not layout and kind != _STRING):
            raise damaged(
                self._path, f"a list before byte {self._place:,} has the length {length:,} or the type {kind}"
            )
        if kind == _STRING:
            return [self._string() for _ in range(length)]
        return np.frombuffer(self._bytes(length * num_bytes), f"<{layout}").copy()

    def _table_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the kind, and place of a tensor."""
        name = self._string()
        (num_axes,) = self._take("<I")
        if num_axes > _MAX_AXES:
            raise damaged(self._path, f"{name[:80]!r} is said to have {num_axes:,} axes")
        axes = self._take(f"<{num_axes}Q")
        kind, offset = self._take("<IQ")
        # The last axis comes first.
        return name, tuple(reversed(axes)), kind, offset

    def _info(self, name: str, shape: tuple[int, ...], number: int, offset: int, first: int) -> TensorInfo:
        if number not in _KINDS:
            known = ", ".join(kind for kind, _, _ in _KINDS.values())
            raise UserError(
                f"{self._path}: {name[:80]!r} is of ggml's type {number}, which is not read; what is: {known}"
            )
        kind, elements, num_bytes = _KINDS[number]
        if max(shape, default=1) > _MAX_AXIS or (shape and shape[-1] % elements):
            raise damaged(self._path, f"{name[:80]!r} is said to have the shape {shape}")
        start = first + offset
        stop = start + math.prod(shape) // elements * num_bytes
        if stop > self._size:
            raise damaged(self._path, f"it ends after {self._size:,} bytes, within or before {name[:80]!r}")
        return TensorInfo(shape, kind, start, stop)
