"""Vocabularies: text to token ids and back, exactly, without TensorFlow or seqio.

The ids are those of seqio's vocabularies, which the Tasks tokenise with: 0 is padding and in no text, 1 ends a
document, 2 is unknown and never occurs. Padding has no meaning here: its id only stands before a document's first
token.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import re
from collections.abc import Iterable

import numpy as np
import sentencepiece
from etils import epath

from memorizing.batch import Vocabulary as Vocabulary
from memorizing.data.errors import DataError

PAD_ID = 0
EOS_ID = 1
UNK_ID = 2
_NUM_SPECIAL = 3


# SentencePiece's model in a folder that is described by a vocabulary's name.
MODEL_FILE = "vocabulary.model"


class _SpecialIds:
    """The ids that both vocabularies have in common; see `memorizing.batch.Vocabulary`."""

    @property
    def start_id(self) -> int:
        return PAD_ID

    @property
    def end_id(self) -> int:
        return EOS_ID

    @property
    def unused_ids(self) -> tuple[int, ...]:
        return (PAD_ID, UNK_ID)


@dataclasses.dataclass(frozen=True)
class ByteVocabulary(_SpecialIds):
    """UTF-8 bytes after the three special ids, as ByT5."""

    name: str = dataclasses.field(default="bytes", init=False)
    size: int = dataclasses.field(default=_NUM_SPECIAL + 256, init=False)
    digest: str = dataclasses.field(default="bytes", init=False)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + _NUM_SPECIAL

    def decode(self, ids: Iterable[int]) -> str:
        ids = np.asarray(ids, np.int64)
        is_byte = (ids >= _NUM_SPECIAL) & (ids < self.size)
        values = (ids[is_byte] - _NUM_SPECIAL).astype(np.uint8)
        return values.tobytes().decode("utf-8", "replace")

    def pieces(self, ids: Iterable[int]) -> list[bytes]:
        return [self._piece(int(index)) for index in ids]

    def _piece(self, index: int) -> bytes:
        is_byte = _NUM_SPECIAL <= index < self.size
        return bytes([index - _NUM_SPECIAL]) if is_byte else b""


@dataclasses.dataclass(frozen=True)
class SentencePieceVocabulary(_SpecialIds):
    """A SentencePiece model that loses nothing.

    Attributes:
      model: the serialised model.
    """

    model: bytes = dataclasses.field(repr=False)

    @functools.cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    @property
    def size(self) -> int:
        return self._processor.vocab_size()

    def piece_ids(self, *pieces: str) -> tuple[int, ...]:
        """Ids of pieces, as the model writes them."""
        return tuple(map(self._processor.piece_to_id, pieces))

    @property
    def name(self) -> str:
        return f"spm{self.size}"

    @property
    def digest(self) -> str:
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        return hashlib.sha256(self.model).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        # Since a newline is a token of its own, the lines have the tokens of the whole, several times as fast.
        lines = escape(text).split("\n")
        ids = self._processor.encode([line + "\n" for line in lines[:-1]] + lines[-1:], num_threads=1)
        return np.fromiter(itertools.chain.from_iterable(ids), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return unescape(self._processor.decode(np.asarray(ids, np.int64).tolist()))

    def pieces(self, ids: Iterable[int]) -> list[bytes]:
        return unescaped(self._raw_pieces[index] for index in map(int, ids))

    @functools.cached_property
    def _raw_pieces(self) -> list[bytes]:
        """The escaped text of each id in UTF-8."""
        processor = self._processor

        def raw(index: int) -> bytes:
            if index < _NUM_SPECIAL:
                return b""
            piece = processor.id_to_piece(index)
            if processor.is_byte(index):
                # Such as "<0x0A>".
                return bytes([int(piece[3:5], 16)])
            return piece.replace(SPACE_MARK, " ").encode()

        return list(map(raw, range(self.size)))


# SentencePiece writes a space as U+2581 and so reads U+2581 back as a space. Texts that hold it are escaped; `tasks`
# does the same in TensorFlow.
SPACE_MARK = "\u2581"
_ESCAPE = "\x01"
ESCAPES = ((_ESCAPE, _ESCAPE + "0"), (SPACE_MARK, _ESCAPE + "1"))
# What the byte after an escape stands for, in UTF-8.
_UNESCAPED = {ord(escaped[-1]): character.encode() for character, escaped in ESCAPES}


def escape(text: str) -> str:
    """Replaces what SentencePiece would change; `unescape` is the inverse for every text."""
    for character, escaped in ESCAPES:
        text = text.replace(character, escaped)
    return text


def unescape(text: str) -> str:
    for character, escaped in reversed(ESCAPES):
        text = text.replace(escaped, character)
    return text


def unescaped(pieces: Iterable[bytes]) -> list[bytes]:
    """The text of consecutive tokens out of their escaped text; an escape may lie in two of them."""
    found = []
    is_escaped = False
    for escaped in pieces:
        piece = b""
        for character in escaped:
            if is_escaped:
                piece += _UNESCAPED.get(character, bytes([ord(_ESCAPE), character]))
                is_escaped = False
            elif character == ord(_ESCAPE):
                is_escaped = True
            else:
                piece += bytes([character])
        found.append(piece)
    return found


# What a model that normalises, collapses spaces or knows no bytes does not give back.
HARD_TEXT = "\tX  =\n\n  \ufb01 e\u0301 \u6f22\U0001f600 </s> "


def load(path: str) -> SentencePieceVocabulary:
    """Reads a SentencePiece model.

    A space that it puts before every text is left out: lines are tokenised one by one (see `tasks`), and each would get
    one. So the model can differ from its file in this setting.

    Args:
      path: of its file, local or gs://.

    Raises:
      DataError: there is none, or it would lose something of a text, or its ids of padding and end are other ones.
    """
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=epath.Path(path).read_bytes())
        processor.override_normalizer_spec(add_dummy_prefix=False)
        loaded = SentencePieceVocabulary(processor.serialized_model_proto())
        special = loaded.piece_ids("<pad>", "</s>", "<unk>")
        ids = loaded.encode(HARD_TEXT).tolist()
        lines = HARD_TEXT.splitlines(keepends=True)
        by_line = np.concatenate([loaded.encode(line) for line in lines]).tolist()
    except (OSError, RuntimeError) as error:
        raise DataError(f"--vocabulary={path}: cannot be read as a SentencePiece model ({error})") from None
    if special != (PAD_ID, EOS_ID, UNK_ID) or loaded.decode(ids) != HARD_TEXT or ids != by_line:
        raise DataError(
            f"--vocabulary={path} does not give back every text as it was, joins lines, or has other ids than {PAD_ID}, "
            f"{EOS_ID} and {UNK_ID} for padding, end and unknown; train one with: memorizing prepare --vocab"
        )
    return loaded


def train(lines: Iterable[str], size: int, num_threads: int = 2) -> SentencePieceVocabulary:
    """Trains a byte-pair vocabulary that keeps every text as it is.

    Nothing is normalised, every space counts, and rare characters become bytes.

    Args:
      lines: the training text without its line ends, which are a token of their own, as tabs are.
      size: number of ids.
      num_threads: part of the settings, since it may change the result.

    Raises:
      DataError: SentencePiece cannot make so many or so few pieces from this text.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(escape(line) for line in lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=False,
            user_defined_symbols=["\n", "\t"],
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            bos_id=-1,
            num_threads=num_threads,
            # Longer lines would be left out without a word.
            max_sentence_length=1 << 16,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(f"no vocabulary of {size} pieces can be trained on this text: {_sentence(error)}") from None
    return SentencePieceVocabulary(model.getvalue())


def _sentence(error: RuntimeError) -> str:
    """SentencePiece's message without the place in its source: "INTERNAL: src/x.cc(1) [check] What is wrong."."""
    return re.sub(r"^.*\] ", "", str(error).strip().splitlines()[-1])
