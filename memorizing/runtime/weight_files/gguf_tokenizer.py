"""The tokenizer in a GGUF file as a tokenizer.json, the form that the library `tokenizers` reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memorizing.errors import UserError
from memorizing.runtime.weight_files.gguf_file import EXTRA

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
_GPT2_WAYS = ("smollm", "gpt-2")
# Kinds of tokens that stand for no text of their own: ggml's CONTROL and USER_DEFINED.
_CONTROL, _USER_DEFINED = 3, 4


def tokenizer_json(settings: Mapping[str, Any], given: str) -> str:
    """The text of a tokenizer.json.

    Args:
      settings: of the GGUF file.
      given: names it, for messages.

    Raises:
      UserError: the file has no tokenizer, or one of another kind than byte pairs; or `tokenizers` is not installed.
    """
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, processors
    except ImportError:
        raise UserError(f"a tokenizer is read with the package tokenizers: {EXTRA}") from None
    kind, way = (settings.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind != "gpt2" or (way not in _PATTERNS and way not in _GPT2_WAYS):
        raise UserError(
            f"{given}: its tokenizer ({kind}, {way}) cannot be made into a tokenizer.json: give the model's own with "
            "--tokenizer=FILE"
        )
    words, merges, kinds = (settings.get(f"tokenizer.ggml.{name}") for name in ("tokens", "merges", "token_type"))
    if not isinstance(words, list) or not isinstance(merges, list) or kinds is None or len(kinds) != len(words):
        raise UserError(f"{given}: its tokenizer is not complete: give the model's own with --tokenizer=FILE")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocabulary = {word: index for index, word in enumerate(words)}
    try:
        model = models.BPE(vocabulary, pairs, ignore_merges=way == "llama-bpe")
    except Exception as error:
        raise UserError(f"{given}: its tokenizer is damaged ({str(error)[:100]})") from None
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _pre_tokenizer(way)
    tokenizer.decoder = decoders.ByteLevel()
    special = [words[index] for index, kind in enumerate(kinds) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    start = settings.get("tokenizer.ggml.bos_token_id")
    if settings.get("tokenizer.ggml.add_bos_token") and isinstance(start, int) and start < len(words):
        template = [(words[start], start)]
        tokenizer.post_processor = processors.TemplateProcessing(f"{words[start]} $A", None, template)
    return tokenizer.to_str()


def _pre_tokenizer(way: str) -> Any:
    """How a text is cut into words."""
    from tokenizers import Regex, pre_tokenizers

    if way in _PATTERNS:
        split = pre_tokenizers.Split(Regex(_PATTERNS[way]), "isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    by_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if way == "gpt-2":
        return by_gpt2
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_gpt2])
