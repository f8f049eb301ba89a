"""The corpora by name: how the reader of each is made from what the user gives as its source."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from . import github
from .documents import Reader
from .errors import DataError

# The source that every user has.
STANDARD_LIBRARY = "stdlib"


def _github(source: str) -> Reader:
    return github.standard_library() if source == STANDARD_LIBRARY else github.GithubReader(source)


CORPORA: dict[str, Callable[[str], Reader]] = {"github": _github}


def reader(corpus: str, source: str) -> Reader:
    """The reader of a corpus.

    Args:
      corpus: a name in `CORPORA`.
      source: the folder of the raw corpus; for github also "stdlib", the standard library of the running Python.

    Raises:
      DataError: there is no such corpus.
    """
    if corpus not in CORPORA:
        nearest = difflib.get_close_matches(corpus, CORPORA, n=1, cutoff=0)[0]
        raise DataError(f"no corpus {corpus!r}; the nearest name is {nearest!r}, all are: {', '.join(CORPORA)}")
    return CORPORA[corpus](source)
