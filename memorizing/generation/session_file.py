"""A session in a file: the state of a text, and the model that it belongs to.

The first line is a record of what follows: names, types and shapes of arrays, and the digest of their bytes, which are
all that is behind it. Nothing is unpacked and nothing is allocated that the model did not ask for; a file of the wrong
content is refused before any of it is used.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from memorizing.array_typing import Tree
from memorizing.errors import UserError
from memorizing.generation.programs import TextState
from memorizing.runtime.json_lines import replace_bytes
from memorizing.runtime.workdir import DamagedRecord, OtherFormat, resolve, seal, unseal
from memorizing.training.checkpoint import paths

# What makes a session of the same model: name of each part, and its value or digest.
Identity = Mapping[str, str | int]

# Names of the arrays: the open segment's inputs, and what stands before those of the context.
_INPUTS = "inputs"
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
    arrays = {_INPUTS: np.asarray(state.inputs, np.int32)}
    arrays |= {_CONTEXT + name: np.asarray(leaf) for name, leaf in paths(state.context).items()}
    body = b"".join(array.tobytes() for array in arrays.values())
    record = {
        "identity": dict(identity),
        "num_tokens": int(state.num_tokens),
        "arrays": _described(arrays),
        "body": hashlib.sha256(body).hexdigest(),
    }
    file = resolve(path)
    try:
        replace_bytes(file, json.dumps(seal(record)).encode() + b"\n" + body)
    except OSError as error:
        raise UserError(f"the session {path} cannot be written ({error.strerror or error})") from error


def load(path: str, context: Tree, identity: Identity, vocab_size: int, segment_length: int) -> TextState:
    """Reads a session.

    Args:
      path: of the file.
      context: shapes and dtypes of the context.
      identity: of the model that is to go on with it.
      vocab_size, segment_length: of that model.

    Raises:
      UserError: there is no such file, it is damaged or no session, or it belongs to another model; the message says
        what differs.
    """
    try:
        content = resolve(path).read_bytes()
    except OSError as error:
        raise UserError(f"the session {path} cannot be read ({error.strerror or error})") from error
    first_line, _, body = content.partition(b"\n")
    try:
        record = unseal(first_line.decode())
        if hashlib.sha256(body).hexdigest() != record["body"]:
            raise DamagedRecord
        belongs = dict(record["identity"])
    except OtherFormat as error:
        raise UserError(f"the session {path} {error}: read the text again") from None
    except (DamagedRecord, UnicodeDecodeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} is no session, or is damaged: give a file that --save_session has written") from None
    for name, value in identity.items():
        if belongs.get(name) != value:
            raise UserError(
                f"the session {path} was read with another model: "
                f"its {name} is {belongs.get(name)}, that of this run is {value}; "
                "read the text again, or name the run and the step that it was read with"
            )
    state = _state(record, body, context)
    if state is None or not _is_possible(state, vocab_size, segment_length):
        raise UserError(
            f"the session {path} holds what this model cannot have written: give a file that --save_session has written"
        )
    return state


def _described(arrays: Mapping[str, Any]) -> list[list[Any]]:
    """Name, type and shape of each array, as JSON has them."""
    return [[name, str(array.dtype), list(array.shape)] for name, array in arrays.items()]


def _state(record: Mapping[str, Any], body: bytes, context: Tree) -> TextState | None:
    """The arrays of a session as the state of a text; None if they are not those of such a context."""
    num_tokens = record.get("num_tokens")
    described = record.get("arrays")
    wanted = paths(context)
    names = _described({_CONTEXT + name: leaf for name, leaf in wanted.items()})
    if type(num_tokens) is not int or not isinstance(described, list) or described[1:] != names:
        return None
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in wanted.values())
    num_inputs, rest = divmod(len(body) - num_bytes, np.dtype(np.int32).itemsize)
    if num_inputs < 1 or rest or described[0] != [_INPUTS, "int32", [1, num_inputs]]:
        return None
    inputs = np.frombuffer(body, np.int32, num_inputs)[None]
    leaves = []
    place = inputs.nbytes
    for leaf in wanted.values():
        leaves.append(np.frombuffer(body, leaf.dtype, math.prod(leaf.shape), place).reshape(leaf.shape))
        place += leaves[-1].nbytes
    return TextState(jax.tree.unflatten(jax.tree.structure(context), leaves), inputs, num_tokens)


def _is_possible(state: TextState, vocab_size: int, segment_length: int) -> bool:
    """Whether a model of these sizes can have come to a state by reading."""
    num_open = state.inputs.size - 1
    if not 0 <= num_open <= segment_length:
        return False
    if state.num_tokens != int(state.context["clock"]) * segment_length + num_open:
        return False
    if not np.all((state.inputs >= 0) & (state.inputs < vocab_size)):
        return False
    # The integers of a context are token ids, and counts of what was read.
    limit = max(vocab_size, state.num_tokens + 1)
    for leaf in jax.tree.leaves(state.context):
        if leaf.dtype == np.bool_:
            is_right = np.frombuffer(leaf.tobytes(), np.uint8) <= 1
        elif np.issubdtype(leaf.dtype, np.integer):
            is_right = (leaf >= 0) & (leaf < limit)
        else:
            is_right = np.isfinite(leaf)
        if not np.all(is_right):
            return False
    return True
