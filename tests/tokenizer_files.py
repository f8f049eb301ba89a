"""Small tokenizers of the kinds that pretrained models come with, as their folders hold them."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = [f"def function_{index % 17}(self, argument):\n    return  {index} # été" for index in range(200)]


def of_bytes(path: pathlib.Path, size: int = 400, lacking: str = "", **config: Any) -> str:
    """As GPT-2's: nothing stands before a text. As SmolLM's it may lack characters of the alphabet of bytes."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet()} - {*lacking})
    special = ["<|endoftext|>", "<|pad|>"]
    _train(made, trainers.BpeTrainer, size, special_tokens=special, initial_alphabet=alphabet)
    return _written(made, path, {"eos_token": "<|endoftext|>"} | config)


def of_llama3(path: pathlib.Path) -> str:
    """As Llama 3's: of bytes after the special tokens' ids, and a text begins with one."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    words = tokenizers.Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), by_bytes])
    made.decoder = decoders.ByteLevel()
    _train(made, trainers.BpeTrainer, 400, special_tokens=[], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    begin = ("<|begin_of_text|>", made.token_to_id("<|begin_of_text|>"))
    template = processors.TemplateProcessing(f"{begin[0]} $A", f"{begin[0]} $A {begin[0]} $B", [begin])
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return _written(made, path, {"bos_token": begin[0], "eos_token": {"content": "<|end_of_text|>"}})


def of_spaces(path: pathlib.Path, byte_fallback: bool = True) -> str:
    """As Llama 2's and Gemma's: a space is U+2581, one stands before a text, and rare characters become bytes."""
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.Replace(" ", "\u2581")
    _train(made, trainers.BpeTrainer, 200, special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"])
    model = json.loads(made.to_str())["model"]
    vocab = model["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    merges = [tuple(merge) for merge in model["merges"]]
    made.model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=byte_fallback, fuse_unk=True)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _written(made, path, {"add_bos_token": True, "bos_token": "<bos>", "eos_token": "<eos>"})


def _train(made: tokenizers.Tokenizer, trainer: Any, size: int, **settings: Any) -> None:
    made.train_from_iterator(LINES, trainer(vocab_size=size, show_progress=False, **settings))


def _written(made: tokenizers.Tokenizer, folder: pathlib.Path, config: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder / "tokenizer.json")
