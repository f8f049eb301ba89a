"""The table of the corpora, and the readers' settings as a user writes them."""

import dataclasses
import pathlib
import pickle

import pytest
from raw_corpora import write

from memorizing.data.corpora import catalogue, reader_settings
from memorizing.data.errors import DataError

TASKS = pathlib.Path(__file__).parents[3] / "gin" / "tasks"


@pytest.mark.parametrize("name", catalogue.CORPORA)
def test_every_corpus_is_whole(name, tmp_path):
    corpus = catalogue.find(name)
    assert corpus.name == name and all((corpus.title, corpus.licence, corpus.citation, corpus.archives))
    reader = catalogue.reader(name, str(tmp_path))
    assert type(reader) in corpus.readers
    assert pickle.loads(pickle.dumps(reader)) == reader
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(reader, dataclasses.fields(reader)[0].name, "")
    for suffix, size in (("", 32_000), ("_bytes", 259)):
        text = (TASKS / f"{name}{suffix}.gin").read_text()
        assert f"CachedCorpus.task = '{name}{suffix or '_spm32000'}'" in text and f"VOCAB_SIZE = {size}" in text


def test_five_corpora():
    assert set(catalogue.CORPORA) == {"arxiv", "github", "isabelle", "c4", "pg19", "text"}
    assert {name for name, corpus in catalogue.CORPORA.items() if corpus.official_splits} == {"c4", "pg19"}


def test_settings_are_read_from_text(tmp_path):
    arxiv = catalogue.reader("arxiv", str(tmp_path), {"primary_only": "True", "subject": "cs", "max_bytes": "5"})
    assert (arxiv.primary_only, arxiv.subject, arxiv.max_bytes) == (True, "cs", 5)
    assert not catalogue.reader("arxiv", str(tmp_path), {"primary_only": "false"}).primary_only
    github = catalogue.reader("github", str(tmp_path), {"languages": "c, go", "licences": "", "seed": "-1"})
    assert (github.languages, github.licences, github.seed) == (("c", "go"), (), -1)
    # On top of what a source brings along.
    library = catalogue.reader("github", catalogue.STANDARD_LIBRARY, {"min_bytes": "1"})
    assert library.min_bytes == 1 and library.single_files and library.languages == ("python",)


@pytest.mark.parametrize(
    ("corpus", "settings", "told"),
    [
        (
            "arxiv",
            {"primary": "true"},
            "no reader setting 'primary'; the nearest name is 'primary_only', all are: metad",
        ),
        ("arxiv", {"source": "elsewhere"}, "no reader setting 'source'"),
        ("c4", {"primary_only": "true"}, "no reader setting 'primary_only'.*all are: variant"),
        ("arxiv", {"primary_only": "yes"}, "--reader.primary_only=yes: give true or false"),
        ("github", {"max_bytes": "1e6"}, "--reader.max_bytes=1e6: give a whole number"),
        ("pg19", {"x": "1"}, "the reader of pg19 has no settings"),
        ("gitlab", {}, "no corpus 'gitlab'; the nearest name is 'github'"),
    ],
)
def test_settings_that_cannot_be_are_told(tmp_path, corpus, settings, told):
    with pytest.raises(DataError, match=told):
        catalogue.reader(corpus, str(tmp_path), settings)


def test_every_setting_says_what_it_means():
    settings = catalogue.settings()
    assert settings["primary_only"].startswith("arxiv: whether the first category")
    assert "arxiv: papers with more" in settings["max_bytes"] and "github: no further file" in settings["max_bytes"]
    assert "parts" in settings and "languages" in settings
    for reader in (reader for corpus in catalogue.CORPORA.values() for reader in corpus.readers):
        _, *others = (field.name for field in dataclasses.fields(reader))
        assert list(reader_settings.meanings(reader)) == others, "every field but the source is a setting"


def test_languages_that_are_not_known_are_told(tmp_path):
    write(tmp_path, {"repo/a.py": ""})
    with pytest.raises(DataError, match=r"languages=\('rust',\): give one or more of c, c\+\+"):
        catalogue.reader("github", str(tmp_path), {"languages": "rust"}).shards()
