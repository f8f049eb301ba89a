"""A session is what was written, or is refused in one line: for every bit and every beginning of a file, and by hand.

A file that was made by hand, with a digest that is right, still has to hold what the model can have written.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damage import damages

from memorizing.errors import UserError
from memorizing.generation import session_file
from memorizing.generation.programs import TextState
from memorizing.runtime.workdir import seal

VOCAB, LENGTH = 32, 4
IDENTITY = {"weights": "0123", "segment length": LENGTH}
# Two whole segments and one token of the third.
STATE = TextState(
    context={
        "clock": jnp.asarray(2, jnp.int32),
        "keys": jnp.asarray([[0.5, -1.0]], jnp.bfloat16),
        "tokens": jnp.asarray([[3, 31]], jnp.int32),
        "valid": jnp.asarray([[True, False]]),
    },
    inputs=np.asarray([[7, 8]], np.int32),
    num_tokens=9,
)
ABSTRACT = jax.eval_shape(lambda: STATE.context)


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    session_file.save(str(tmp_path / "book.session"), STATE, IDENTITY)
    return tmp_path / "book.session"


def load(file: pathlib.Path) -> TextState:
    return session_file.load(str(file), ABSTRACT, IDENTITY, VOCAB, LENGTH)


def test_what_was_saved_is_loaded(file: pathlib.Path):
    loaded = load(file)
    assert loaded.num_tokens == 9
    np.testing.assert_array_equal(loaded.inputs, STATE.inputs)
    for name, leaf in STATE.context.items():
        assert loaded.context[name].dtype == leaf.dtype
        np.testing.assert_array_equal(loaded.context[name], leaf)


def test_every_flipped_bit_and_every_beginning_is_refused(file: pathlib.Path):
    for _ in damages(file):
        with pytest.raises(UserError, match="is no session, or is damaged") as told:
            load(file)
        assert "\n" not in str(told.value)


def forge(file: pathlib.Path, change: dict[str, Any], place: int = 0, added: bytes = b"") -> None:
    """Changes a session as somebody would who knows the format: the digests are right."""
    first_line, _, body = file.read_bytes().partition(b"\n")
    record = json.loads(first_line)
    body = body[:place] + added + body[place + len(added) :] if place >= 0 else body + added
    record |= {"body": hashlib.sha256(body).hexdigest()} | change
    del record["sha256"]
    file.write_bytes(json.dumps(seal(record)).encode() + b"\n" + body)


def i32(*values: int) -> bytes:
    return np.asarray(values, np.int32).tobytes()


def arrays(**change: list) -> list[list]:
    described = {
        "inputs": ["inputs", "int32", [1, 2]],
        "clock": ["context/clock", "int32", []],
        "keys": ["context/keys", "bfloat16", [1, 2]],
        "tokens": ["context/tokens", "int32", [1, 2]],
        "valid": ["context/valid", "bool", [1, 2]],
    }
    return list((described | change).values())


@pytest.mark.parametrize(
    ("change", "place", "added"),
    [
        ({}, 0, i32(10**6)),
        ({}, 4, i32(-1)),
        ({}, 8, i32(-2)),
        ({}, 8, i32(3)),
        ({}, 12, np.asarray([np.inf], jnp.bfloat16).tobytes()),
        ({}, 12, np.asarray([np.nan], jnp.bfloat16).tobytes()),
        ({}, 16, i32(32)),
        ({}, 20, i32(-1)),
        ({}, 24, b"\2"),
        ({}, -1, b"\0"),
        ({}, -1, b"\0\0\0\0"),
        ({"num_tokens": -9}, 0, b""),
        ({"num_tokens": 10**30}, 0, b""),
        ({"num_tokens": 9.0}, 0, b""),
        ({"num_tokens": None}, 0, b""),
        ({"num_tokens": True}, 0, b""),
        ({"arrays": []}, 0, b""),
        ({"arrays": None}, 0, b""),
        ({"arrays": arrays(inputs=["inputs", "int32", [2, 1]])}, 0, b""),
        ({"arrays": arrays(inputs=["inputs", "int32", [1, 10**12]])}, 0, b""),
        ({"arrays": arrays(keys=["context/keys", "float16", [1, 2]])}, 0, b""),
        ({"arrays": arrays(keys=["context/keys", "object", [1, 2]])}, 0, b""),
    ],
)
def test_what_no_model_has_written_is_refused(file: pathlib.Path, change: dict[str, Any], place: int, added: bytes):
    forge(file, change, place, added)
    with pytest.raises(UserError, match="holds what this model cannot have written"):
        load(file)


def test_a_forged_file_that_says_the_same_is_loaded(file: pathlib.Path):
    """Else the test above could not fail."""
    forge(file, {"arrays": arrays()})
    assert load(file).num_tokens == 9


@pytest.mark.parametrize("content", [b"", b"\n", b"PK\x03\x04", b"[]\n", b'{"format": 3}\n', b"\xff\n", b"[" * 100_000])
def test_what_is_no_session_is_refused(file: pathlib.Path, content: bytes):
    file.write_bytes(content)
    with pytest.raises(UserError, match="is no session, or is damaged"):
        load(file)


def test_a_session_without_its_parts_is_refused(file: pathlib.Path):
    for name in ("identity", "body"):
        record = {"identity": IDENTITY, "num_tokens": 9, "arrays": arrays(), "body": hashlib.sha256(b"").hexdigest()}
        del record[name]
        file.write_bytes(json.dumps(seal(record)).encode() + b"\n")
        with pytest.raises(UserError, match="is no session, or is damaged"):
            load(file)
