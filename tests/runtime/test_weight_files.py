"""Files of other people's weights: what is read is what was written, and damage is told in one line."""

from __future__ import annotations

import io
import json
import pathlib
import random
import shutil
import string

import gguf
import numpy as np
import pytest
import sentencepiece
from damage import damages
from etils import epath
from gguf import GGMLQuantizationType as Kind
from pretrained_models import GOLDEN, NAMES, write_gguf
from tokenizers import Tokenizer

from memorizing.data.tokens.tokenizer import TOKENIZER_FILE, load
from memorizing.errors import UserError
from memorizing.models.positions import Rotary
from memorizing.models.pretrained import gguf_names
from memorizing.models.pretrained.settings import Settings
from memorizing.runtime.weight_files import safetensors_file
from memorizing.runtime.weight_files.folder import FolderOfTensors, read_json
from memorizing.runtime.weight_files.gguf_file import GGUFFile
from memorizing.runtime.weight_files.gguf_tokenizer import tokenizer_json
from memorizing.runtime.weight_files.safetensors_file import Output, SafetensorsFile
from memorizing.training.pretrained.source import open_source

MODEL = "llama_tied"


def refused(function, *arguments) -> str:
    """The one line in which something is refused."""
    with pytest.raises(UserError) as error:
        function(*arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


def read_all(file) -> None:
    for name, info in file.tensors.items():
        if info.kind in safetensors_file.DTYPES or isinstance(file, GGUFFile):
            file.read(name)


# safetensors


def test_safetensors_are_read_as_numpy_has_them(tmp_path: pathlib.Path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array(7.5, np.float64),
        "c": np.zeros((0, 4), np.float16),
        "d": np.array([1, -2], safetensors_file.DTYPES["BF16"]),
    }
    kinds = {dtype: kind for kind, dtype in safetensors_file.DTYPES.items()}
    path = epath.Path(tmp_path / "x.safetensors")
    outputs = [Output(name, array.shape, kinds[array.dtype]) for name, array in arrays.items()]
    safetensors_file.write(path, outputs, arrays.values())
    file = SafetensorsFile(path)
    assert file.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        found = file.read(name)
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found, array)


def test_a_damaged_header_of_safetensors_is_one_line(tmp_path: pathlib.Path):
    """Every bit of it in turn, and beginnings of the file: refused, or harmless, as in the name of a tensor."""
    path = tmp_path / "model.safetensors"
    outputs = [Output("weight", (2, 3), "F32"), Output("bias", (3,), "BF16")]
    safetensors_file.write(epath.Path(path), outputs, [np.ones((2, 3)), np.ones(3)])
    num_refused = 0
    for content in damages(path, num_beginnings=60):
        try:
            read_all(SafetensorsFile(epath.Path(path)))
        except UserError as error:
            assert "\n" not in str(error)
            num_refused += 1
        else:
            assert len(content) == path.stat().st_size
    assert num_refused > 800


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}, "it ends after"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "does not have 4 bytes"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "is wrong"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "is wrong"),
        ({"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}, "cannot be read"),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, "cannot be read"),
        ({"a": 3}, "cannot be read"),
        ([1], "no object"),
    ],
)
def test_wrong_headers_of_safetensors(tmp_path: pathlib.Path, header: object, words: str):
    path = epath.Path(tmp_path / "x.safetensors")
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    assert words in refused(SafetensorsFile, path)


def test_a_header_of_any_size_is_not_read(tmp_path: pathlib.Path):
    path = epath.Path(tmp_path / "x.safetensors")
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    assert "9,223,372,036,854,775,808 bytes" in refused(SafetensorsFile, path)


# Folders.


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(GOLDEN / MODEL, tmp_path / "model")


def rewrite(folder: pathlib.Path, change) -> None:
    """Writes the weights anew, after `change` of the dictionary of tensors."""
    path = epath.Path(folder / "model.safetensors")
    file = SafetensorsFile(path)
    arrays = {name: file.read(name).astype(np.float32) for name in file.tensors}
    change(arrays)
    safetensors_file.write(path, [Output(name, array.shape, "F32") for name, array in arrays.items()], arrays.values())


def test_missing_surplus_and_wrong_tensors(folder: pathlib.Path):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda arrays: arrays.update({"extra.weight": np.ones(3)}))
    assert "nothing is known of extra.weight" in refused(open_source, str(folder))
    rewrite(folder, lambda arrays: arrays.pop("extra.weight"))
    rewrite(folder, lambda arrays: arrays.update({name: arrays[name].T}))
    assert f"{name} has the shape (24, 32), and (32, 24)" in refused(open_source, str(folder))
    rewrite(folder, lambda arrays: arrays.pop(name))
    assert f"{name} is missing, and 0 more" in refused(open_source, str(folder))


def test_what_no_model_learned_is_left_out(folder: pathlib.Path):
    def add(arrays: dict) -> None:
        arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4)
        # Tied, and stored all the same.
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]

    rewrite(folder, add)
    open_source(str(folder))


def test_pickles_are_refused_by_name(folder: pathlib.Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle" in refused(open_source, str(folder))
    assert "pytorch_model.bin is a pickle" in refused(open_source, str(folder / "pytorch_model.bin"))


def test_an_index_names_files_of_its_folder(folder: pathlib.Path):
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    assert "it names '../elsewhere.safetensors'" in refused(FolderOfTensors, epath.Path(folder))
    path.write_text(json.dumps({"weight_map": {"a": "other.safetensors"}}))
    assert "other.safetensors is missing" in refused(FolderOfTensors, epath.Path(folder))
    path.write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    assert FolderOfTensors(epath.Path(folder)).tensors
    path.write_text(json.dumps([1]))
    assert "no weight_map" in refused(FolderOfTensors, epath.Path(folder))


def test_a_tensor_is_in_one_file(folder: pathlib.Path):
    shutil.copy(folder / "model.safetensors", folder / "b.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    assert "remove one of them" in refused(FolderOfTensors, epath.Path(folder))


def test_what_is_not_there(tmp_path: pathlib.Path, folder: pathlib.Path):
    assert "no such folder or file, and no model of that name (smollm2)" in refused(open_source, str(tmp_path / "no"))
    (folder / "config.json").write_text("{")
    assert "it is no JSON" in refused(open_source, str(folder))
    (folder / "config.json").unlink()
    assert "has no config.json" in refused(open_source, str(folder))
    (folder / "notes.txt").write_text("x")
    assert "give the folder" in refused(open_source, str(folder / "notes.txt"))
    (folder / "deep.json").write_text("[" * 200_000)
    assert "it is no JSON" in refused(read_json, epath.Path(folder / "deep.json"))


# GGUF


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16])
def test_plain_numbers_of_gguf(tmp_path: pathlib.Path, kind: Kind):
    stored = write_gguf(tmp_path / "model.gguf", "qwen3", kind)
    source = open_source(str(tmp_path / "model.gguf"))
    for name, array in stored.items():
        found = source.file.read(source.names[name])
        np.testing.assert_array_equal(found.astype(np.float32), array)


def block(kind: str) -> tuple[bytes, np.ndarray]:
    """A block of a kind, and its numbers, from the layout in ggml's ggml-common.h."""
    rng = np.random.default_rng(0)
    scale, least = np.float16(0.25), np.float16(-1.5)
    half = scale.tobytes()
    if kind == "Q8_0":
        levels = rng.integers(-128, 128, 32, np.int8)
        return half + levels.tobytes(), 0.25 * levels
    if kind in ("Q4_0", "Q4_1"):
        # Low halves of the bytes are the elements 0 to 15, high ones 16 to 31.
        content = rng.integers(0, 256, 16, np.uint8)
        levels = np.concatenate([content & 15, content >> 4]).astype(float)
        if kind == "Q4_0":
            return half + content.tobytes(), 0.25 * (levels - 8)
        return half + least.tobytes() + content.tobytes(), 0.25 * levels - 1.5
    if kind == "Q6_K":
        # 256 elements of 6 bits: 128 bytes of low halves, 64 of high pairs, 16 scales, and the scale of these.
        low, high = rng.integers(0, 256, 128, np.uint8), rng.integers(0, 256, 64, np.uint8)
        scales = rng.integers(-128, 128, 16, np.int8)
        levels = np.zeros(256)
        for part in (0, 1):
            for place in range(32):
                pairs = int(high[32 * part + place])
                first, second = int(low[64 * part + place]), int(low[64 * part + 32 + place])
                for quarter, nibble in enumerate((first & 15, second & 15, first >> 4, second >> 4)):
                    level = (nibble | (pairs >> (2 * quarter) & 3) << 4) - 32
                    levels[128 * part + 32 * quarter + place] = level
        numbers = 0.25 * np.repeat(scales.astype(float), 16) * levels
        return low.tobytes() + high.tobytes() + scales.tobytes() + half, numbers
    assert kind == "Q4_K"
    # 8 groups of 32 elements; scales and minima of 6 bits each in 12 bytes.
    packed, content = rng.integers(0, 256, 12, np.uint8), rng.integers(0, 256, 128, np.uint8)
    numbers = np.zeros(256)
    for group in range(8):
        if group < 4:
            factor, offset = packed[group] & 63, packed[group + 4] & 63
        else:
            factor = packed[group + 4] & 15 | (packed[group - 4] >> 6) << 4
            offset = packed[group + 4] >> 4 | (packed[group] >> 6) << 4
        pairs = content[32 * (group // 2) : 32 * (group // 2) + 32]
        levels = pairs >> 4 if group % 2 else pairs & 15
        numbers[32 * group : 32 * group + 32] = 0.25 * float(factor) * levels - -1.5 * float(offset)
    return half + least.tobytes() + packed.tobytes() + content.tobytes(), numbers


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"])
def test_blocks_of_gguf(tmp_path: pathlib.Path, kind: str):
    content, numbers = block(kind)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    data = np.frombuffer(content, np.uint8)[None]
    writer.add_tensor("weight", np.concatenate([data, data]), raw_dtype=Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GGUFFile(epath.Path(tmp_path / "x.gguf")).read("weight")
    np.testing.assert_allclose(found, np.stack([numbers, numbers]), rtol=1e-6)


def test_a_damaged_header_of_gguf_is_one_line(tmp_path: pathlib.Path):
    path = tmp_path / "model.gguf"
    write_gguf(path, "qwen3", tokens=["a", "b"])
    size = min(info.start for info in GGUFFile(epath.Path(path)).tensors.values())
    num_refused = 0
    for _ in damages(path, range(0, min(size, 1000)), num_beginnings=60):
        try:
            file = GGUFFile(epath.Path(path))
            assert sum(info.stop - info.start for info in file.tensors.values()) < 1 << 20
        except UserError as error:
            assert "\n" not in str(error)
            num_refused += 1
    assert num_refused > 1000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GGUF" + (3).to_bytes(4, "little") + (2**62).to_bytes(8, "little") * 2, "tensors and"),
        (b"GGML" + bytes(30), "no GGUF file"),
        (b"GGUF" + (9).to_bytes(4, "little") + bytes(16), "version 9"),
        (
            b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little") + b"\xff" * 8,
            "are said to follow",
        ),
        (b"", "no header"),
    ],
)
def test_wrong_headers_of_gguf(tmp_path: pathlib.Path, content: bytes, words: str):
    path = epath.Path(tmp_path / "x.gguf")
    path.write_bytes(content)
    assert words in refused(GGUFFile, path)


def test_other_models_in_gguf_are_refused(tmp_path: pathlib.Path):
    def written(family: str, change=lambda writer: None) -> str:
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", family)
        change(writer)
        writer.add_tensor("weight", np.ones(32, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return str(tmp_path / "x.gguf")

    assert "general.architecture = 'mamba'" in refused(open_source, written("mamba"))
    assert "mixtures of experts" in refused(open_source, written("llama", lambda writer: writer.add_expert_count(8)))
    assert "num_hidden_layers = None" in refused(open_source, written("llama"))


def test_as_many_elements_are_turned_as_gguf_says():
    """It counts them, and config.json has a share of the head: 26 of 46 by the share would be 25."""
    for head_dim in range(2, 257):
        for turned in range(2, head_dim + 1, 2):
            share = gguf_names._share_turned(turned, Settings({"hidden_size": head_dim, "num_attention_heads": 1}, "x"))
            assert 2 * len(Rotary(share=share).frequencies(head_dim)) == turned
    settings = {"general.architecture": "gptneox", "gptneox.embedding_length": 8, "gptneox.attention.head_count": 1}
    assert "rope.dimension_count = None" in refused(gguf_names.config_of, settings, [], "x")
    assert "= 9" in refused(gguf_names.config_of, settings | {"gptneox.rope.dimension_count": 9}, [], "x")


def test_a_tokenizer_in_gguf_that_is_not_known():
    assert "--tokenizer=FILE" in refused(tokenizer_json, {"tokenizer.ggml.model": "t5"}, "x.gguf")
    settings = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
    assert "not complete" in refused(tokenizer_json, settings, "x.gguf")
    assert "not complete" in refused(tokenizer_json, {"tokenizer.ggml.model": "llama"}, "x.gguf")
    broken = settings | {
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.merges": ["c d"],
        "tokenizer.ggml.token_type": np.ones(2, np.int32),
    }
    assert "damaged" in refused(tokenizer_json, broken, "x.gguf")
    for damage in ({"token_type": 7}, {"token_type": ["a", "b"]}, {"merges": [1, 2]}):
        changed = broken | {f"tokenizer.ggml.{name}": value for name, value in damage.items()}
        assert "damaged" in refused(tokenizer_json, changed, "x.gguf")


# Repeated words with spaces, lines and signs, so that pieces of several lengths compete.
_SENTENCES = pathlib.Path(gguf.__file__).read_text().splitlines() + [
    f"the {word}  is   not the {other}; it was {word}{other}" for word in NAMES for other in NAMES
]


@pytest.mark.parametrize("way", ["llama 2", "gemma"])
def test_sentencepiece_in_gguf_has_the_ids_of_sentencepiece(way: str, tmp_path: pathlib.Path):
    """With a space before every text, or with pieces that a user defined and spaces among them."""
    is_gemma = way == "gemma"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES),
        model_writer=model,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=not is_gemma,
        user_defined_symbols=["\n", "\u2581\u2581", "<b>"] if is_gemma else [],
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(processor.vocab_size())
    defined = ["\n", "\u2581\u2581", "<b>"] if is_gemma else []

    def kind(index: int) -> gguf.TokenType:
        if processor.is_unknown(index):
            return gguf.TokenType.UNKNOWN
        if processor.is_control(index):
            return gguf.TokenType.CONTROL
        if processor.is_byte(index):
            return gguf.TokenType.BYTE
        is_defined = processor.id_to_piece(index) in defined
        return gguf.TokenType.USER_DEFINED if is_defined else gguf.TokenType.NORMAL

    settings = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(index) for index in ids],
        "tokenizer.ggml.scores": np.array([processor.get_score(index) for index in ids], np.float32),
        "tokenizer.ggml.token_type": np.array([kind(index) for index in ids], np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_space_prefix": not is_gemma,
    }
    text = tokenizer_json(settings, "x.gguf")
    # Good enough for documents, which is a check of its own.
    (tmp_path / TOKENIZER_FILE).write_text(text)
    assert load(str(tmp_path)).start_id == 1

    made = Tokenizer.from_str(text)
    rng = random.Random(0)
    characters = "the isnot  \n\t;<b>é漢\U0001f600" + string.ascii_lowercase
    texts = [*_SENTENCES, *("".join(rng.choices(characters, k=200)) for _ in range(200))]
    for text in texts:
        expected = processor.encode(text)
        assert made.encode(text, add_special_tokens=False).ids == expected, text
        assert made.encode(text).ids == [1, *expected]
        assert made.decode(expected) == text
