"""The corpora by name: what they are, where they come from, and how the reader of each is made."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from . import github
from .documents import Reader
from .errors import DataError

# The source that every user has.
STANDARD_LIBRARY = "stdlib"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A corpus.

    Attributes:
      name: what tasks call it.
      title: what people call it.
      open: makes its reader, a dataclass, from the path of its source.
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
    licence: str
    citation: str
    archives: str
    min_tokens: int = 0
    official_splits: bool = False
    is_prose: bool = False


def _github(source: str) -> Reader:
    return github.standard_library() if source == STANDARD_LIBRARY else github.GithubReader(source)


_MEMORIZING_TRANSFORMERS = "Wu et al., Memorizing Transformers, ICLR 2022"

CORPORA: dict[str, Corpus] = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            name="github",
            title="GitHub",
            open=_github,
            licence="each repository has its own, which asks at least that its notice is kept",
            citation=_MEMORIZING_TRANSFORMERS,
            archives="a folder of checkouts or of unpacked source distributions, one sub-folder each",
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
    types_by_name = settings_of(made)
    values = {
        name: _converted(name, text, _chosen(types_by_name, name, "reader setting")) for name, text in settings.items()
    }
    return dataclasses.replace(made, **values)


def settings_of(made: Reader) -> dict[str, Any]:
    """The settings of a reader: the types of its fields by name, but for the first, which is its source."""
    _, *fields = dataclasses.fields(made)
    hints = typing.get_type_hints(type(made))
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
