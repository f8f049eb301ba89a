"""The corpora by name: what they are, where they come from, and how the reader of each is made."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from memorizing.data.corpora import bigquery, c4, github
from memorizing.data.corpora.arxiv import ArxivReader
from memorizing.data.corpora.bigquery import BigQueryReader
from memorizing.data.corpora.c4 import C4Reader
from memorizing.data.corpora.github import GithubReader
from memorizing.data.corpora.isabelle import IsabelleReader
from memorizing.data.corpora.pg19 import PG19Reader
from memorizing.data.documents import Reader
from memorizing.data.errors import DataError

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
        settings that a user may give.
      licence: what its texts may be used for, in a sentence.
      citation: the work that describes it.
      archives: how to get it as it is distributed.
      min_tokens: documents of fewer tokens are left out, once they are tokenised.
      official_splits: whether its documents tell their split, in their metadata.
      is_prose: whether its texts are made of words between white space, so that perplexity per word means something.
    """

    name: str
    title: str
    open: Callable[[str], Reader]
    readers: tuple[type[Reader], ...]
    licence: str
    citation: str
    archives: str
    min_tokens: int = 0
    official_splits: bool = False
    is_prose: bool = False


def _github(source: str) -> Reader:
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
            licence="mostly arXiv's non-exclusive licence to distribute: not to be passed on; each paper's is in the metadata",
            citation=_MEMORIZING_TRANSFORMERS,
            archives=(
                "the bulk source s3://arxiv/src/arXiv_src_*.tar (requester pays, see info.arxiv.org/help/bulk_data_s3.html) "
                "and arxiv-metadata-oai-snapshot.json (kaggle.com/datasets/Cornell-University/arxiv) in one folder"
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
                "a folder of checkouts or of unpacked source distributions, one sub-folder each; or the tables licenses, files "
                "and contents of bigquery-public-data.github_repos, exported as JSON lines into one folder"
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
                "releases of the AFP (isa-afp.org/download) and of Isabelle (isabelle.in.tum.de), packed or unpacked, in one "
                "folder; the paper's is of October 2021"
            ),
        ),
        Corpus(
            name="c4",
            title="C4(4K+)",
            open=C4Reader,
            readers=(C4Reader,),
            licence="ODC-BY, and the terms of use of Common Crawl",
            citation=(
                "Raffel, Shazeer, Roberts et al.: Exploring the Limits of Transfer Learning with a Unified Text-to-Text "
                "Transformer. JMLR 2020"
            ),
            archives="en/c4-train.*.json.gz and en/c4-validation.*.json.gz of huggingface.co/datasets/allenai/c4 (305 GB)",
            min_tokens=c4.MIN_TOKENS,
            official_splits=True,
        ),
        Corpus(
            name="pg19",
            title="PG-19",
            open=PG19Reader,
            readers=(PG19Reader,),
            licence="texts in the public domain in the United States; metadata: Apache 2.0",
            citation="Rae, Potapenko, Jayakumar, Lillicrap: Compressive Transformers for Long-Range Sequence Modelling. ICLR 2020",
            archives="a copy of the bucket gs://deepmind-gutenberg (11 GB): train, validation, test and metadata.csv",
            official_splits=True,
        ),
    )
}


def find(name: str) -> Corpus:
    """The corpus of a name. Raises DataError where there is none."""
    return _chosen(CORPORA, name, "corpus")


def reader(corpus: str, source: str, settings: Mapping[str, str] = types.MappingProxyType({})) -> Reader:
    """The reader of a corpus.

    Args:
      corpus: a name in `CORPORA`.
      source: the folder or archive of the raw corpus; for github also "stdlib", the standard library of the running
        Python.
      settings: fields of the reader by name, as text: a number, true or false, a word, or words with commas between.

    Raises:
      DataError: there is no such corpus, or no such setting, or a value is not of its type.
    """
    made = find(corpus).open(source)
    kinds = _kinds(type(made))
    if settings and not kinds:
        raise DataError(f"--reader.{next(iter(settings))}: the reader of {corpus} has no settings")
    values = {name: _converted(name, text, _chosen(kinds, name, "reader setting")) for name, text in settings.items()}
    return dataclasses.replace(made, **values)


def settings() -> dict[str, str]:
    """What every setting of the readers means, by its name: what their docstrings say, each after its corpus."""
    found: dict[str, dict[str, str]] = {}
    for corpus in CORPORA.values():
        for kind in corpus.readers:
            documented = "\n".join(inspect.getdoc(base) or "" for base in kind.__mro__)
            for name in _kinds(kind):
                meaning = re.search(rf"^  {name}: (.+(?:\n    .+)*)", documented, re.MULTILINE)[1]
                found.setdefault(name, {})[corpus.name] = " ".join(meaning.split())
    return {name: " ".join(f"{user}: {text}" for user, text in by_corpus.items()) for name, by_corpus in found.items()}


def _kinds(reader_type: type[Reader]) -> dict[str, Any]:
    """The types of a reader's settings by name."""
    _, *fields = dataclasses.fields(reader_type)
    hints = typing.get_type_hints(reader_type)
    return {field.name: hints[field.name] for field in fields}


def _chosen(table: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in table:
        nearest = difflib.get_close_matches(name, table, n=1, cutoff=0)[0]
        raise DataError(f"no {what} {name!r}; the nearest name is {nearest!r}, all are: {', '.join(table)}")
    return table[name]


_BOOLEANS = {"true": True, "false": False}


def _converted(name: str, text: str, kind: Any) -> Any:
    """A setting's value; `kind` is bool, int, float, str or tuple[str, ...]."""
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in _BOOLEANS:
            raise DataError(f"--reader.{name}={text}: give true or false")
        return _BOOLEANS[text.lower()]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise DataError(f"--reader.{name}={text}: give a {'whole ' if kind is int else ''}number") from None
    return tuple(filter(None, map(str.strip, text.split(","))))
