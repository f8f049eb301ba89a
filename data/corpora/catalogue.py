"""The corpora by name: what they are, where they come from, and how the reader of each is made."""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any

from memorizing.data.corpora import bigquery, c4, github, reader_settings
from memorizing.data.corpora.arxiv import ArxivReader
from memorizing.data.corpora.bigquery import BigQueryReader
from memorizing.data.corpora.c4 import C4Reader
from memorizing.data.corpora.github import GithubReader
from memorizing.data.corpora.isabelle import IsabelleReader
from memorizing.data.corpora.pg19 import PG19Reader
from memorizing.data.corpora.text import TextReader
from memorizing.data.documents import CorpusReader
from memorizing.data.errors import DataError
from memorizing.data.formats import file_trees

# The source that every user has.
STANDARD_LIBRARY = "stdlib"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A corpus.

    Attributes:
      name: what tasks call it.
      title: what people call it.
      open: makes its reader from the path of its source.
      readers: the types of reader it may make: dataclasses, whose first field is the source and whose others are
        settings that a user may give (`reader_settings`).
      licence: what its texts may be used for, in a sentence.
      citation: the work that describes it.
      archives: how to get it as it is distributed.
      min_tokens: documents of fewer tokens are left out, once they are tokenised.
      official_splits: whether the metadata of its documents says which split they are in.
      is_published: whether it is one of those that others know by name: they have TFDS builders and seqio Tasks.
      is_prose: whether its texts are made of words between white space, so that perplexity per word makes sense.
    """

    name: str
    title: str
    open: Callable[[str], CorpusReader]
    readers: tuple[type[CorpusReader], ...]
    licence: str
    citation: str
    archives: str
    min_tokens: int = 0
    official_splits: bool = False
    is_published: bool = True
    is_prose: bool = False


def _github(source: str) -> CorpusReader:
    if source == STANDARD_LIBRARY:
        return github.standard_library()
    return BigQueryReader(source) if bigquery.is_export(source) else GithubReader(source)


_MEMORIZING_TRANSFORMERS = "Wu, Rabe, Hutchins, Szegedy: Memorizing Transformers. ICLR 2022"

CORPORA: dict[str, Corpus] = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            name="arxiv",
            title="arXiv Math",
            open=ArxivReader,
            readers=(ArxivReader,),
            licence=(
                "mostly arXiv's non-exclusive licence to distribute: not to be passed on; "
                "each paper's is in the metadata"
            ),
            citation=_MEMORIZING_TRANSFORMERS,
            archives=(
                "the bulk source s3://arxiv/src/arXiv_src_*.tar (requester pays, see "
                "info.arxiv.org/help/bulk_data_s3.html) and arxiv-metadata-oai-snapshot.json "
                "(kaggle.com/datasets/Cornell-University/arxiv) in one folder"
            ),
        ),
        Corpus(
            name="github",
            title="GitHub",
            open=_github,
            readers=(GithubReader, BigQueryReader),
            licence="each repository has its own, which asks at least that its notice is kept",
            citation=_MEMORIZING_TRANSFORMERS,
            archives=(
                "a folder of checkouts or of unpacked source distributions, one sub-folder each; or the tables "
                "licenses, files and contents of bigquery-public-data.github_repos, exported as JSON lines into one "
                "folder"
            ),
        ),
        Corpus(
            name="isabelle",
            title="Isabelle",
            open=IsabelleReader,
            readers=(IsabelleReader,),
            licence="entries of the AFP: BSD, a few LGPL, as the metadata says; Isabelle: BSD",
            citation=_MEMORIZING_TRANSFORMERS,
            archives=(
                "releases of the AFP (isa-afp.org/download) and of Isabelle (isabelle.in.tum.de), packed or unpacked, "
                "in one folder; the paper's is of October 2021"
            ),
        ),
        Corpus(
            name="c4",
            title="C4(4K+)",
            open=C4Reader,
            readers=(C4Reader,),
            licence="ODC-BY, and the terms of use of Common Crawl",
            citation=(
                "Raffel, Shazeer, Roberts et al.: Exploring the Limits of Transfer Learning with a Unified "
                "Text-to-Text Transformer. JMLR 2020"
            ),
            archives=(
                "en/c4-train.*.json.gz and en/c4-validation.*.json.gz of huggingface.co/datasets/allenai/c4 (305 GB)"
            ),
            min_tokens=c4.MIN_TOKENS,
            official_splits=True,
        ),
        Corpus(
            name="pg19",
            title="PG-19",
            open=PG19Reader,
            readers=(PG19Reader,),
            licence="texts in the public domain in the United States; metadata: Apache 2.0",
            citation=(
                "Rae, Potapenko, Jayakumar, Lillicrap: Compressive Transformers for Long-Range Sequence Modelling. "
                "ICLR 2020"
            ),
            archives="a copy of the bucket gs://deepmind-gutenberg (11 GB): train, validation, test and metadata.csv",
            official_splits=True,
        ),
        Corpus(
            name="text",
            title="documents of your own",
            open=TextReader,
            readers=(TextReader,),
            licence="that of the documents",
            citation="their own",
            archives=(
                "folders, files and patterns of text, source code and JSON lines, with commas between; archives, named "
                "as such"
            ),
            is_published=False,
        ),
    )
}

PUBLISHED = {name: corpus for name, corpus in CORPORA.items() if corpus.is_published}


def find(name: str) -> Corpus:
    """The corpus of a name. Raises DataError where there is none."""
    _check_known(name, CORPORA, "corpus")
    return CORPORA[name]


def reader(corpus: str, source: str, settings: Mapping[str, str] = types.MappingProxyType({})) -> CorpusReader:
    """The reader of a corpus.

    Args:
      corpus: a name in `CORPORA`.
      source: the folder or archive of the raw corpus; for github also "stdlib", the standard library of the running
        Python.
      settings: values of the reader's settings by name, as text (see `reader_settings.converted`).

    Raises:
      DataError: there is no such corpus, or no such setting, or a value is not of its type.
    """
    made = find(corpus).open(source)
    known = reader_settings.meanings(type(made))
    if settings and not known:
        raise DataError(f"--reader.{next(iter(settings))}: the reader of {corpus} has no settings")
    values: dict[str, Any] = {}
    for name, text in settings.items():
        _check_known(name, known, "reader setting")
        values[name] = reader_settings.converted(type(made), name, text)
    # All readers are dataclasses, which a protocol cannot say.
    return dataclasses.replace(made, **values)  # pyright: ignore[reportArgumentType]


def settings() -> dict[str, str]:
    """What every setting of the readers means, by its name: one text for all corpora that have it, each named in it."""
    found: dict[str, dict[str, str]] = {}
    for corpus in CORPORA.values():
        for reader_type in corpus.readers:
            for name, meaning in reader_settings.meanings(reader_type).items():
                found.setdefault(name, {})[corpus.name] = meaning
    return {
        name: " ".join(f"{corpus}: {meaning}" for corpus, meaning in by_corpus.items())
        for name, by_corpus in found.items()
    }


def absolute(corpus: str, source: str) -> str:
    """A source without the current folder in it."""
    if find(corpus).is_published:
        is_path = source != STANDARD_LIBRARY and not file_trees.is_url(source)
        return os.path.abspath(source) if is_path else source
    return file_trees.absolute(source)


def _check_known(name: str, known: Collection[str], what: str) -> None:
    """Raises DataError, which tells the nearest name, where a name is not known."""
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise DataError(f"no {what} {name!r}; the nearest name is {nearest!r}, all are: {', '.join(known)}")
