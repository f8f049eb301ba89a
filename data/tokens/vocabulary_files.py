"""Vocabularies in files: those that a user gives, and the copy that every token cache has of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etils import epath

from memorizing.batch import Vocabulary
from memorizing.data.errors import DataError
from memorizing.data.tokens import tokenizer, vocabulary
from memorizing.data.tokens.tokenizer import TOKENIZER_FILE, TokenizerVocabulary
from memorizing.data.tokens.vocabulary import MODEL_FILE, ByteVocabulary, SentencePieceVocabulary


def load(
    path: str, start_token: str | None = None, end_token: str | None = None
) -> SentencePieceVocabulary | TokenizerVocabulary:
    """Reads a vocabulary that a user gives.

    Args:
      path: of a SentencePiece model, of a `tokenizer.json`, or of the folder of a pretrained model that holds one.
      start_token, end_token: see `tokenizer.load`; a SentencePiece model has its own.

    Raises:
      DataError: it cannot be read, or would lose something of a text.
    """
    file = epath.Path(path)
    if file.suffix == ".json" or file.is_dir():
        return tokenizer.load(path, start_token, end_token)
    if start_token or end_token:
        raise DataError(f"--vocabulary={path}: only a {TOKENIZER_FILE} takes --start_token and --end_token")
    return vocabulary.load(path)


def can_write(used: Vocabulary, text: str) -> bool:
    """Whether a text comes back from its tokens. Some tokenizers lack control characters."""
    return not isinstance(used, TokenizerVocabulary) or used.can_write(text)


def file_name(used: Vocabulary) -> str | None:
    """Name of a vocabulary's file in the folder of a token cache; None where it needs none."""
    if isinstance(used, SentencePieceVocabulary):
        return MODEL_FILE
    return TOKENIZER_FILE if isinstance(used, TokenizerVocabulary) else None


def save(used: Vocabulary, folder: epath.PathLike) -> None:
    """Writes the file of a vocabulary into a folder, for `read`."""
    if isinstance(used, SentencePieceVocabulary | TokenizerVocabulary):
        (epath.Path(folder) / str(file_name(used))).write_bytes(used.model)


def described(used: Vocabulary) -> dict[str, Any]:
    """What `read` has to know of a vocabulary, JSON-able."""
    special = {"start_id": used.start_id, "end_id": used.end_id}
    return {"name": used.name, "size": used.size, "digest": used.digest} | special


def read(folder: epath.PathLike, description: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary whose file lies in a folder.

    Args:
      folder: local.
      description: what `described` said of it. Caches that were made before ids were noted have 0 and 1.

    Raises:
      DataError: the file is missing, or another one.
    """
    name = description["name"]
    if name == ByteVocabulary().name:
        return ByteVocabulary()
    is_tokenizer = name.startswith("hf")
    path = epath.Path(folder) / (TOKENIZER_FILE if is_tokenizer else MODEL_FILE)
    try:
        model = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"the token cache is damaged: {path}: {error.strerror or error}; delete the folder and prepare it again"
        ) from None
    if is_tokenizer:
        tokenizer.check_installed(str(path))
        loaded: Vocabulary = TokenizerVocabulary(model, description["start_id"], description["end_id"])
    else:
        loaded = SentencePieceVocabulary(model)
    if loaded.digest != description["digest"]:
        raise DataError(
            f"{folder} holds another vocabulary than it was made with; delete the folder and prepare it again"
        )
    return loaded
