"""The five corpora from their raw layouts to caches and to TFDS and seqio: every document comes back byte for byte."""

import argparse
import json
import zlib

import numpy as np
import pytest
from raw_corpora import pack, tar, write

from memorizing.data import documents
from memorizing.data.corpora import catalogue
from memorizing.data.prepare import command
from memorizing.data.tasks import tensorflow_start
from memorizing.data.tokens import token_cache, vocabulary

pytest.importorskip("seqio", reason="there is no seqio for every Python and platform")

HARD = "\tx  =  '\u2581 \x01 e\u0301 漢 \ufb01 \U0001f600'\r\n\n\n   </s> \u2028 <0x41>  \n"
WORDS = "".join(f"word{index % 97} = {index * index}; " + "\n" * (index % 11 == 0) for index in range(400))


def paper(title):
    return f"\\documentclass{{article}}\\begin{{document}}{title}\n{HARD}{WORDS}\\end{{document}}"


def page(url, text):
    return json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": url}) + "\n"


RAW = {
    "arxiv": {
        "src/arXiv_src_2601_001.tar": tar({f"2601/2601.0000{i}.gz": pack(paper(f"{i}")) for i in range(1, 5)}),
        "arxiv-metadata-oai-snapshot.json": "".join(
            json.dumps({"id": f"2601.0000{i}", "categories": "math.AG", "license": None, "versions": []}) + "\n"
            for i in range(1, 5)
        ),
    },
    "github": {
        f"repository{i}/{name}": text
        for i in range(4)
        for name, text in {"a.py": HARD, "b/c.py": WORDS + str(i), "LICENSE": "SPDX-License-Identifier: MIT"}.items()
    },
    "isabelle": {
        f"afp/thys/{name}": text
        for entry in ("One", "Two", "Three")
        for name, text in {
            f"{entry}/ROOT": f"chapter AFP\nsession {entry} (AFP) = HOL +\n  theories A\n",
            f"{entry}/A.thy": f"theory A imports B begin\n{HARD}{WORDS}end",
            f"{entry}/B.thy": "theory B imports Main begin\nend",
            "ROOTS": "One\nTwo\nThree\n",
        }.items()
    },
    "c4": {
        "en/c4-train.00000-of-00001.json.gz": pack(
            page("https://a.org/1", WORDS + HARD)
            + page("https://a.org/2", "short")
            + page("https://a.org/3", WORDS * 2)
        ),
        "en/c4-validation.00000-of-00001.json.gz": pack(page("https://a.org/4", HARD + WORDS * 3)),
    },
    "pg19": {
        "train/1.txt": HARD + WORDS,
        "train/2.txt": WORDS,
        "validation/3.txt": HARD,
        "test/4.txt": HARD * 3,
        "metadata.csv": '1,"A, title",1900,http://a/1\r\n',
    },
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw")
    return {name: write(root / name, files) for name, files in RAW.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "spm.model"
    path.write_bytes(vocabulary.train((WORDS + HARD).split("\n"), 400).model)
    return path


def run(*flags):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(["--processes=1", *map(str, flags)]))


@pytest.mark.parametrize("used", ["bytes", "spm400"])
@pytest.mark.parametrize("corpus", RAW)
def test_tokens_of_a_document_are_its_text(sources, model, tmp_path, corpus, used):
    flags = [f"--vocabulary={model}"] if used != "bytes" else []
    assert run(f"--task={corpus}_{used}", f"--source={sources[corpus]}", f"--output={tmp_path / 'cache'}", *flags) == 0
    cache = token_cache.open_cache(str(tmp_path / "cache"))
    expected = {
        document.key: document for document in documents.read_all(catalogue.reader(corpus, str(sources[corpus])))
    }
    if corpus == "c4":
        assert cache.metadata["min_tokens"] == 4096
        assert len(cache.vocabulary.encode(expected.pop("https://a.org/2").text)) < 4096
        assert cache.metadata["skipped"]["fewer than 4096 tokens"] >= 1
        expected = {
            key: document for key, document in expected.items() if len(cache.vocabulary.encode(document.text)) >= 4096
        }
    found = {}
    for name in cache.metadata["splits"]:
        split = cache.split(name)
        for index in range(len(split)):
            document = expected[split.key(index)]
            tokens = split.tokens(index)
            assert cache.vocabulary.decode(tokens) == document.text
            # The Task's tokens are those of our own vocabulary, ended once.
            np.testing.assert_array_equal(tokens, [*cache.vocabulary.encode(document.text), vocabulary.EOS_ID])
            assert split.num_bytes[index] == len(document.text.encode())
            assert document.metadata.get("split", name) == name
            found[document.key] = document
    assert found == expected and any(HARD.rstrip("\n") in document.text for document in found.values())
    assert cache.metadata["licence"] and cache.metadata["citation"]


@pytest.mark.parametrize("used", ["bytes", "spm400"])
@pytest.mark.parametrize("corpus", RAW)
def test_a_cache_is_the_same_where_there_is_no_seqio(sources, model, tmp_path, monkeypatch, capsys, corpus, used):
    flags = [f"--vocabulary={model}"] if used != "bytes" else []
    caches = [tmp_path / "with", tmp_path / "without"]
    for cache, missing in zip(caches, (None, "seqio"), strict=True):
        monkeypatch.setattr(tensorflow_start, "missing", lambda missing=missing: missing)
        assert run(f"--task={corpus}_{used}", f"--source={sources[corpus]}", f"--output={cache}", *flags) == 0
        assert ("seqio is not installed" in capsys.readouterr().out) == (missing is not None)
    with_, without = ({path.name: path.read_bytes() for path in cache.iterdir()} for cache in caches)
    assert with_ == without and len(with_) > 3


def test_damaged_members_are_named_and_the_rest_is_prepared(sources, tmp_path, capsys):
    source = write(tmp_path / "c4", RAW["c4"])
    damaged = source / "en" / "c4-train.00001-of-00002.json.gz"
    damaged.write_bytes(pack(page("https://a.org/5", WORDS * 2) + str(np.random.default_rng(0).bytes(9999)))[:-9999])
    assert run("--task=c4_bytes", f"--source={source}", f"--output={tmp_path / 'cache'}") == 0
    out = capsys.readouterr().out
    assert f"damaged: {damaged.name}" in out
    metadata = token_cache.read_metadata(str(tmp_path / "cache"))
    assert len(metadata["damaged"]) == 1 and damaged.name in metadata["damaged"][0]
    assert metadata["skipped"]["damaged"] == 1


def test_empty_splits_are_told_and_leave_nothing(tmp_path, capsys):
    source = write(tmp_path / "c4", {name: text for name, text in RAW["c4"].items() if "train" in name})
    assert run("--task=c4_bytes", f"--source={source}", f"--output={tmp_path / 'cache'}") == 2
    assert "no document is in the split 'validation'" in capsys.readouterr().err
    # All of the only held-out page is too short, which is known when it is tokenised.
    name = "en/c4-validation.00000-of-00001.json.gz"
    write(source, {name: pack(page("https://a.org/4", "short"))})
    assert run("--task=c4_bytes", f"--source={source}", f"--output={tmp_path / 'cache'}") == 2
    assert "'validation' (left out: fewer than 4096 tokens: 2)" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["c4"]


@pytest.mark.parametrize("corpus", ["arxiv", "pg19"])
def test_tfds_and_seqio_have_the_same_documents_and_tokens(sources, model, tmp_path, corpus):
    import seqio
    import tensorflow_datasets as tfds

    from memorizing.data.tasks import seqio_tasks
    from memorizing.data.tasks.task_name import TaskName

    builder = tfds.builder(f"memorizing_{corpus}", data_dir=tmp_path / "tfds")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=sources[corpus]),
    )
    assert builder.info.redistribution_info.license == catalogue.find(corpus).licence
    assert builder.info.citation == catalogue.find(corpus).citation
    run(
        f"--task={corpus}_spm400",
        f"--source={sources[corpus]}",
        f"--output={tmp_path / 'cache'}",
        f"--vocabulary={model}",
    )
    cache = token_cache.open_cache(str(tmp_path / "cache"))
    task = seqio_tasks.register(TaskName(corpus, 400), str(model), str(tmp_path / "tfds"))
    assert seqio.TaskRegistry.get(f"{corpus}_spm400") is task
    assert set(task.splits) == set(cache.metadata["splits"])
    for name in task.splits:
        dataset = task.get_dataset(None, name, shuffle=False, use_cached=False, try_in_mem_cache=False)
        split = cache.split(name)
        found = list(dataset.as_numpy_iterator())
        assert [example["doc_id"].decode() for example in found] == [split.key(index) for index in range(len(split))]
        for index, example in enumerate(found):
            np.testing.assert_array_equal(example["targets"], split.tokens(index))


def test_tasks_have_stable_names_and_there_is_a_mixture_of_all():
    import seqio

    from memorizing.data.tasks import seqio_tasks

    for used, size in (("bytes", 259), ("spm32000", None)):
        for corpus in RAW:
            task = seqio.TaskRegistry.get(f"{corpus}_{used}")
            assert set(task.output_features) == {"targets"} and task.output_features["targets"].add_eos
            assert size is None or task.output_features["targets"].vocabulary.vocab_size == size
        mixture = seqio.MixtureRegistry.get(f"all_{used}")
        assert {task.name for task in mixture.tasks} == {f"{corpus}_{used}" for corpus in RAW}
    rates = {"c4": 3.0, "pg19": 0.5}
    mixture = seqio_tasks.register_all(None, rates=rates)
    assert {task.name: mixture.get_rate(task) for task in mixture.tasks} == {
        f"{corpus}_bytes": rates.get(corpus, 1.0) for corpus in RAW
    }


def test_describe_shows_what_a_cache_holds(sources, tmp_path, capsys):
    output = tmp_path / "cache"
    assert run("--task=pg19_bytes", f"--source={sources['pg19']}", f"--output={output}") == 0
    capsys.readouterr()
    assert run(f"--describe={output}") == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(index for index, line in enumerate(lines) if line.split()[:1] == ["split"])
    columns = [line.split() for line in lines[header : header + 4]]
    assert columns[0] == [
        "split",
        "documents",
        "tokens",
        "bytes",
        "bytes/token",
        ">=4K",
        ">=20K",
        ">=100K",
        "shortest",
        "10%",
        "median",
        "90%",
        "longest",
    ]
    split = token_cache.open_cache(str(output)).split("train")
    lengths = split.num_tokens
    assert columns[1][:4] == ["train", "2", f"{lengths.sum():,}", f"{split.num_bytes.sum():,}"]
    assert columns[1][5:8] == ["100.0%", "0.0%", "0.0%"]
    assert (columns[1][8], columns[1][-1]) == (f"{lengths.min():,}", f"{lengths.max():,}")
    assert [row[0] for row in columns[1:]] == ["train", "validation", "test"]
    # Two documents of four are shorter than 4K; what is shown of a text cannot change the terminal.
    assert sum("#" in line for line in lines) == 3
    assert any(line.startswith("  | ") and "\\x01" in line for line in lines)
    assert not any(character in line for line in lines for character in "\x01\r\u2028")
    picture = (output / "lengths.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and zlib.crc32(picture)
    assert run(f"--describe={tmp_path / 'missing'}") == 2
    assert "no token cache in" in capsys.readouterr().err
