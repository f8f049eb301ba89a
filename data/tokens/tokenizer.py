"""A Hugging Face `tokenizer.json` as a vocabulary: the ids of a pretrained model, and every text comes back exactly.

Two kinds keep everything of a text: those of bytes (GPT-2, Pythia, Llama 3, Qwen, SmolLM), and those that write a space
as U+2581 and fall back on bytes (Gemma, Llama 2, Mistral). Their ids are those of the file, with three exceptions,
without which a text would not come back as it was:

* no space is put before a text;
* a text is not brought into the normal form NFC (Qwen and Pythia do): other forms get other tokens;
* what a special token is called is text like any other, where it stands in a document.

A tokenizer may have no token for some control characters. A document that holds one is left out, see `can_write`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath

from memorizing.data.errors import DataError
from memorizing.data.tokens import vocabulary
from memorizing.errors import first_line

TOKENIZER_FILE = "tokenizer.json"
_MAX_SIZE = 1 << 24
# What tells of the special tokens, beside that file.
_CONFIG_FILE = "tokenizer_config.json"
# Names of tokens that end a document, where nothing tells which one does.
_KNOWN_ENDS = ("<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "</s>", "<eos>")
# Bytes that occur in no UTF-8.
_NOT_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
# Bytes that a tokenizer may lack, as SmolLM's does: control characters, and those of planes 4 to 11, which are empty.
_RARE = {*range(0x20), 0x7F, 0xF1, 0xF2} - {*b"\t\n\r"}


@dataclasses.dataclass(frozen=True)
class TokenizerVocabulary:
    """A `memorizing.batch.Vocabulary` of a `tokenizer.json`.

    Attributes:
      model: the content of the file.
      start_id: what stands before a document's first token.
      end_id: what ends a document.
    """

    model: bytes = dataclasses.field(repr=False)
    start_id: int
    end_id: int

    @property
    def name(self) -> str:
        return f"hf{self.size}"

    @property
    def size(self) -> int:
        """One more than the highest id; a model may have more rows than that in its table of embeddings."""
        return len(self._raw_pieces)

    @property
    def digest(self) -> str:
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        return hashlib.sha256(self.model + f"\n{self.start_id} {self.end_id}".encode()).hexdigest()

    @property
    def unused_ids(self) -> tuple[int, ...]:
        return self._unused_ids

    @functools.cached_property
    def _unused_ids(self) -> tuple[int, ...]:
        return tuple(index for index, piece in enumerate(self._raw_pieces) if not piece and index != self.end_id)

    def token_id(self, token: str) -> int | None:
        """The id of a token as the file writes it; None where there is none."""
        return self._tokenizer.token_to_id(token)

    @functools.cached_property
    def _lacking(self) -> re.Pattern[str] | None:
        """Characters that no tokens stand for."""
        there = {piece[0] for piece in self._raw_pieces if len(piece) == 1}
        lead = {0xF1: "\U00040000-\U0007ffff", 0xF2: "\U00080000-\U000bffff"}
        classes = "".join(lead.get(byte) or f"\\x{byte:02x}" for byte in sorted(_RARE - there))
        return re.compile(f"[{classes}]") if classes else None

    def can_write(self, text: str) -> bool:
        """Whether the text comes back from its tokens; else the characters that have none are left out of them."""
        return self._lacking is None or self._lacking.search(text) is None

    def encode(self, text: str) -> np.ndarray:
        given = text if self._is_of_bytes else vocabulary.escape(text)
        return np.asarray(self._tokenizer.encode(given, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.pieces(ids)).decode("utf-8", "replace")

    def pieces(self, ids: Iterable[int]) -> list[bytes]:
        raw = [self._raw_pieces[index] for index in map(int, ids)]
        return raw if self._is_of_bytes else vocabulary.unescaped(raw)

    @functools.cached_property
    def _parsed(self) -> dict[str, Any]:
        return json.loads(self.model)

    @functools.cached_property
    def _is_of_bytes(self) -> bool:
        return is_of_bytes(self._parsed)

    @functools.cached_property
    def _tokenizer(self) -> Any:
        import tokenizers

        made = tokenizers.Tokenizer.from_str(json.dumps(_that_loses_nothing(self._parsed)))
        made.encode_special_tokens = True
        return made

    @functools.cached_property
    def _raw_pieces(self) -> list[bytes]:
        """The text of each id in UTF-8, escaped where the vocabulary is not of bytes."""
        added = {token["id"]: token for token in self._parsed.get("added_tokens") or ()}
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        if max(ids.values()) >= _MAX_SIZE:
            raise DataError(f"a {TOKENIZER_FILE} has the id {max(ids.values()):,}: at most {_MAX_SIZE - 1:,}")
        pieces = [b""] * (1 + max(ids.values()))
        for token, index in ids.items():
            if index not in added:
                pieces[index] = _text_of_bytes(token) if self._is_of_bytes else _text_of_spaced(token)
            elif not added[index]["special"]:
                pieces[index] = token.encode() if self._is_of_bytes else _spaced(token)
        model = self._parsed["model"]
        unknown = ids.get(model.get("unk_token"), model.get("unk_id"))
        if unknown is not None:
            pieces[unknown] = b""
        return pieces


def load(path: str, start_token: str | None = None, end_token: str | None = None) -> TokenizerVocabulary:
    """Reads a `tokenizer.json`, and what `tokenizer_config.json` beside it says of its special tokens.

    Args:
      path: of the file, or of the folder of a pretrained model, local or gs://.
      start_token: stands before a document's first token. None: what the tokenizer itself puts before a text, as those
        of Llama and Gemma do; where it puts nothing there, the end, as between the documents of pretraining.
      end_token: ends a document. None: the `eos_token` of the configuration, or a well-known name.

    Raises:
      DataError: it cannot be read, loses something of a text, or has no such token; or `tokenizers` is not installed.
    """
    named = f"--vocabulary={path}"
    check_installed(named)
    file = epath.Path(path)
    try:
        file = file / TOKENIZER_FILE if file.is_dir() else file
        loaded = TokenizerVocabulary(file.read_bytes(), 0, 0)
        start_id, end_id = _special_ids(named, loaded, _config(file.parent / _CONFIG_FILE), start_token, end_token)
        made = dataclasses.replace(loaded, start_id=start_id, end_id=end_id)
        _check_loses_nothing(named, made)
    except DataError:
        raise
    # The library has one error for all, Exception; and of a file that is none, anything may be missing.
    except Exception as error:
        raise DataError(f"{named}: cannot be read as a {TOKENIZER_FILE} ({first_line(error)})") from None
    return made


def _special_ids(
    named: str, loaded: TokenizerVocabulary, config: dict[str, Any], start_token: str | None, end_token: str | None
) -> tuple[int, int]:
    """The ids of what stands before a document's first token, and of what ends a document; see `load`."""
    ends = [end_token] if end_token else [_content(config.get("eos_token")), *_KNOWN_ENDS]
    end_id = _first_id(loaded, ends)
    if end_id is None:
        told = f"no token {end_token!r}" if end_token else "nothing that says which token ends a document"
        raise DataError(f"{named} has {told}; name one with --end_token=TOKEN")
    starts = [start_token] if start_token else [_put_before(loaded), _bos(config)]
    start_id = _first_id(loaded, starts)
    if start_id is None and start_token:
        raise DataError(f"{named} has no token {start_token!r}; name another one with --start_token=TOKEN")
    return end_id if start_id is None else start_id, end_id


def check_installed(named: str) -> None:
    """Raises DataError, which names what needs it, where the package `tokenizers` is missing."""
    if importlib.util.find_spec("tokenizers") is None:
        raise DataError(f"{named}: tokenizers is not installed: pip install 'memorizing[pretrained]'")


def is_of_bytes(parsed: dict[str, Any]) -> bool:
    """Whether the tokens of a parsed `tokenizer.json` are written in GPT-2's alphabet of bytes."""
    parts = [*_parts(parsed.get("pre_tokenizer")), *_parts(parsed.get("decoder"))]
    return any(part.get("type") == "ByteLevel" for part in parts)


def _parts(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The parts of a normaliser, a pre-tokenizer, a decoder or a post-processor, which may be sequences of others."""
    if not part:
        return
    if part.get("type") != "Sequence":
        yield part
        return
    for value in part.values():
        if isinstance(value, list):
            for inner in value:
                yield from _parts(inner)


def _that_loses_nothing(parsed: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer without what would change a text; see the top of the module."""
    changed = json.loads(json.dumps(parsed)) | {"truncation": None, "padding": None, "post_processor": None}
    kept = [part for part in _parts(changed.get("normalizer")) if part["type"] not in ("NFC", "Prepend")]
    changed["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    for part in _parts(changed.get("pre_tokenizer")):
        if part["type"] in ("ByteLevel", "Metaspace") and "add_prefix_space" in part:
            part["add_prefix_space"] = False
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
    return changed


@functools.cache
def _bytes_by_character() -> dict[str, int]:
    """GPT-2's alphabet: printable characters of Latin-1 stand for themselves, the other bytes for U+0100 and on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _text_of_bytes(token: str) -> bytes:
    alphabet = _bytes_by_character()
    return bytes(alphabet[character] for character in token)


def _text_of_spaced(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return _spaced(token)


def _spaced(token: str) -> bytes:
    return token.replace(vocabulary.SPACE_MARK, " ").encode()


def _put_before(loaded: TokenizerVocabulary) -> str | None:
    """The token that the post-processor puts before a text."""
    for part in _parts(json.loads(loaded.model).get("post_processor")):
        if part["type"] == "TemplateProcessing" and "SpecialToken" in part["single"][0]:
            return part["single"][0]["SpecialToken"]["id"]
        if "cls" in part:
            return part["cls"][0]
    return None


def _bos(config: dict[str, Any]) -> str | None:
    """The token that the configuration says to put before a text."""
    return _content(config.get("bos_token")) if config.get("add_bos_token") else None


def _config(path: epath.Path) -> dict[str, Any]:
    """What stands beside the tokenizer; nothing where there is no such file."""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _content(token: Any) -> str | None:
    """A token of the configuration: its text, or an object that has it."""
    return token.get("content") if isinstance(token, dict) else token


def _first_id(loaded: TokenizerVocabulary, tokens: Iterable[str | None]) -> int | None:
    ids = (loaded.token_id(token) for token in tokens if isinstance(token, str))
    return next((index for index in ids if index is not None), None)


def _check_loses_nothing(named: str, made: TokenizerVocabulary) -> None:
    """Raises DataError where a text would not come back from its tokens."""
    parsed = json.loads(made.model)
    added = parsed.get("added_tokens") or ()
    stripping = [token for token in added if not token["special"] and (token.get("lstrip") or token.get("rstrip"))]
    special = "".join(token["content"] for token in added if token["special"])
    text = vocabulary.HARD_TEXT + special + vocabulary.HARD_TEXT
    known = {piece[0] for piece in made._raw_pieces if len(piece) == 1}
    missing = {*range(256)} - known - _NOT_UTF8 - _RARE
    if stripping or missing or b"".join(made.pieces(made.encode(text))) != text.encode():
        raise DataError(
            f"{named} does not give back every text as it was: give a tokenizer of bytes (GPT-2, Llama 3, Qwen), or one "
            "that falls back on bytes and normalises nothing (Gemma, Llama 2)"
        )
