"""What a file of tensors is to its reader."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from etils import epath

from memorizing.errors import UserError


class TensorInfo(NamedTuple):
    """What a header says of a tensor.

    Attributes:
      shape: of the tensor.
      kind: how its numbers are stored, in the words of the file's format: BF16, Q4_1.
      start, stop: where its bytes lie in the file.
    """

    shape: tuple[int, ...]
    kind: str
    start: int
    stop: int


class TensorFile(Protocol):
    """Named tensors in one file or several."""

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """What is there, by name."""
        ...

    def read(self, name: str) -> np.ndarray:
        """A tensor, in the dtype of the file, or float32 where that is a format of blocks."""
        ...


def damaged(path: epath.Path, what: str) -> UserError:
    """What to raise where a file is not what its format asks for."""
    return UserError(f"{path} is damaged: {what}; copy or download it again")


def read_bytes(path: epath.Path, start: int, size: int) -> bytes:
    """Some bytes of a file.

    Raises:
      UserError: it has not so many any more.
    """
    with path.open("rb") as file:
        file.seek(start)
        found = file.read(size)
    if len(found) != size:
        raise damaged(path, f"it ends before byte {start + size:,}")
    return found
