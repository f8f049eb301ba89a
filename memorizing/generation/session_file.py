"""A session in a file: the state of a text, and the model that it belongs to.

An `.npz` archive, whose checksums are checked as it is read.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping

import jax
import numpy as np

from memorizing.array_typing import Tree
from memorizing.errors import UserError
from memorizing.generation.decoding import TextState
from memorizing.runtime.workdir import resolve
from memorizing.training.checkpoint import paths

# What makes a session of the same model: name of each part, and its value or digest.
Identity = Mapping[str, str | int]

# Names of arrays in the archive: of the identity, and before those of the context.
_IDENTITY = "identity"
_CONTEXT = "context/"


def save(path: str, state: TextState, identity: Identity) -> None:
    """Writes a session; the file is there as a whole or not at all.

    Args:
      path: of the file.
      state: of one row.
      identity: of the model that it was read with.

    Raises:
      UserError: the file cannot be written.
    """
    described = json.dumps(dict(identity)).encode()
    arrays: dict[str, np.ndarray] = {
        "inputs": np.asarray(state.inputs),
        "num_tokens": np.asarray(state.num_tokens, np.int64),
        _IDENTITY: np.frombuffer(described, np.uint8),
    }
    arrays |= {_CONTEXT + name: np.asarray(leaf) for name, leaf in paths(state.context).items()}
    content = io.BytesIO()
    # The stubs of NumPy take the names for the option `allow_pickle`.
    np.savez(content, **arrays)  # pyright: ignore[reportArgumentType]
    file = resolve(path)
    unfinished = file.parent / f".{file.name}.unfinished"
    try:
        unfinished.write_bytes(content.getvalue())
        unfinished.replace(file)
    except OSError as error:
        raise UserError(f"the session {path} cannot be written ({error.strerror or error})") from error


def load(path: str, context: Tree, identity: Identity) -> TextState:
    """Reads a session.

    Args:
      path: of the file.
      context: shapes and dtypes of the context.
      identity: of the model that is to go on with it.

    Raises:
      UserError: there is no such file, it is damaged or no session, or it belongs to another model; the message says
        what differs.
    """
    try:
        content = resolve(path).read_bytes()
    except OSError as error:
        raise UserError(f"the session {path} cannot be read ({error.strerror or error})") from error
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        belongs = json.loads(arrays[_IDENTITY].tobytes())
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no session, or is damaged: give a file that --save_session has written") from error
    for name, value in identity.items():
        if belongs.get(name) != value:
            raise UserError(
                f"the session {path} was read with another model: "
                f"its {name} is {belongs.get(name)}, that of this run is {value}; "
                "read the text again, or name the run and the step that it was read with"
            )
    # NumPy does not know bfloat16, and writes its bytes as they are.
    leaves = [arrays[_CONTEXT + name].view(leaf.dtype) for name, leaf in paths(context).items()]
    restored = jax.tree.unflatten(jax.tree.structure(context), leaves)
    return TextState(restored, arrays["inputs"], int(arrays["num_tokens"]))
