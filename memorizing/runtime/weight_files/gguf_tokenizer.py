"""The tokenizer in a GGUF file as a tokenizer.json, the form that the library `tokenizers` reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from memorizing.errors import UserError, first_line
from memorizing.runtime.weight_files.gguf_file import EXTRA

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# How a text is cut before byte pairs are joined, by llama.cpp's name of the way; what Llama 3 and Qwen say differs in
# the digits that stay together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_PATTERNS = {
    "llama-bpe": _WORDS.replace("DIGITS", "{1,3}"),
    "smaug-bpe": _WORDS.replace("DIGITS", "{1,3}"),
    "qwen2": _WORDS.replace("DIGITS", ""),
}
# Pythia's is called OLMo's there.
_GPT2_WAYS = ("smollm", "gpt-2", "olmo")
# ggml's kinds of tokens. Control tokens and, with byte pairs, those that a user defined stand for no text of their own.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
# How SentencePiece writes a space.
_SPACE = "\u2581"


class _Words(NamedTuple):
    """The tokens of a file.

    Attributes:
      texts: by id.
      kinds: ggml's, of each.
      start: id of what is put before a text; None for nothing.
    """

    texts: list[str]
    kinds: list[int]
    start: int | None

    def of_kind(self, *kinds: int) -> list[str]:
        return [text for text, kind in zip(self.texts, self.kinds, strict=True) if kind in kinds]


def tokenizer_json(settings: Mapping[str, Any], given: str) -> str:
    """The text of a tokenizer.json.

    Args:
      settings: of the GGUF file.
      given: names it, for messages.

    Raises:
      UserError: the file has no tokenizer, or neither one of byte pairs nor SentencePiece's; or `tokenizers` is not
        installed.
    """
    try:
        from tokenizers import processors
    except ImportError:
        raise UserError(f"a tokenizer is read with the package tokenizers: {EXTRA}") from None
    kind, way = (settings.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    is_spaced = kind == "llama"
    if not is_spaced and (kind != "gpt2" or (way not in _PATTERNS and way not in _GPT2_WAYS)):
        raise UserError(
            f"{given}: its tokenizer ({kind}, {way}) cannot be made into a tokenizer.json: give the model's own with "
            "--tokenizer=FILE"
        )
    try:
        words = _words(settings, given)
        tokenizer = _of_pieces(words, settings, given) if is_spaced else _of_byte_pairs(words, settings, given, way)
        if words.start is not None:
            start = words.texts[words.start]
            tokenizer.post_processor = processors.TemplateProcessing(f"{start} $A", None, [(start, words.start)])
        return tokenizer.to_str()
    except UserError:
        raise
    # Settings may be of any type; and the library has one error for all: Exception.
    except Exception as error:
        raise UserError(f"{given}: its tokenizer is damaged ({first_line(error)[:100]})") from None


def puts_start_before(settings: Mapping[str, Any]) -> bool:
    """Whether a text begins with a token of its own; a file that does not say so is read as llama.cpp reads it."""
    return bool(settings.get("tokenizer.ggml.add_bos_token", settings.get("tokenizer.ggml.model") == "llama"))


def _words(settings: Mapping[str, Any], given: str) -> _Words:
    texts, kinds = (settings.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    if not isinstance(texts, list) or kinds is None or len(kinds) != len(texts):
        raise _incomplete(given)
    start = settings.get("tokenizer.ggml.bos_token_id")
    has_start = puts_start_before(settings) and isinstance(start, int) and 0 <= start < len(texts)
    return _Words(texts, [int(kind) for kind in kinds], start if has_start else None)


def _incomplete(given: str) -> UserError:
    return UserError(f"{given}: its tokenizer is not complete: give the model's own with --tokenizer=FILE")


def _of_byte_pairs(words: _Words, settings: Mapping[str, Any], given: str, way: str) -> Tokenizer:
    """A tokenizer of GPT-2's kind."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    merges = settings.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise _incomplete(given)
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocabulary = {word: index for index, word in enumerate(words.texts)}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=way == "llama-bpe"))
    tokenizer.pre_tokenizer = _pre_tokenizer(way)
    tokenizer.decoder = decoders.ByteLevel()
    special = words.of_kind(_CONTROL, _USER_DEFINED)
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return tokenizer


def _of_pieces(words: _Words, settings: Mapping[str, Any], given: str) -> Tokenizer:
    """A tokenizer of SentencePiece's byte pairs, as those of Llama 2, Mistral and Gemma.

    Of the pieces that two neighbours would make, SentencePiece makes the one with the highest score. So the pairs to be
    joined are all ways to cut a piece in two pieces, in the order of its score.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    scores = settings.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(words.texts):
        raise _incomplete(given)
    is_joined = {text for text, kind in zip(words.texts, words.kinds, strict=True) if kind == _NORMAL}
    by_score = sorted(range(len(words.texts)), key=lambda index: -scores[index])
    pairs = []
    for index in by_score:
        piece = words.texts[index]
        if piece in is_joined:
            cuts = ((piece[:place], piece[place:]) for place in range(1, len(piece)))
            pairs += [(left, right) for left, right in cuts if left in is_joined and right in is_joined]

    vocabulary = {word: index for index, word in enumerate(words.texts)}
    unknown = next(iter(words.of_kind(_UNKNOWN)), None)
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    has_prefix = bool(settings.get("tokenizer.ggml.add_space_prefix", True))
    spaced = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaced]) if has_prefix else spaced
    unspaced = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*unspaced, decoders.Strip(" ", 1, 0)] if has_prefix else unspaced)
    special = words.of_kind(_CONTROL, _UNKNOWN)
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    # Found in a text before anything is joined, where spaces are marked already.
    defined = words.of_kind(_USER_DEFINED)
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=True) for word in defined])
    return tokenizer


def _pre_tokenizer(way: str) -> Any:
    """How a text is cut into words."""
    from tokenizers import Regex, pre_tokenizers

    if way in _PATTERNS:
        split = pre_tokenizers.Split(Regex(_PATTERNS[way]), "isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    by_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if way == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_gpt2])
    return by_gpt2
