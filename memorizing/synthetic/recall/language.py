"""What prompts are written in: text of a vocabulary, or plain ids, of which each is a word.

A language encodes pieces of a prompt, and has names to be remembered and sentences to hide them in.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import pathlib
import re
import string
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Literal, Protocol

import numpy as np

from memorizing.batch import TextSource, Vocabulary
from memorizing.errors import Range
from memorizing.synthetic.recall import templates

# What a name looks like in text: digits, two words, a uuid, a variable of five or three capitals, six random letters,
# a single word.
Kind = Literal["passkeys", "numbers", "words", "uuids", "variables", "short_variables", "values", "codes", "common"]


class Language(Protocol):
    """A frozen dataclass that gin builds.

    Attributes:
      vocab_size: number of token ids; id 0 stands before a text and in none.
    """

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> np.ndarray:
        """Ids of a piece of a prompt, int32 [length]; it begins with a space where it follows another one."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids."""
        ...

    def name(self, rng: np.random.Generator, kind: Kind) -> str:
        """Something to be remembered, which stands in no sentence."""
        ...

    def most(self, kind: Kind) -> int:
        """How many different names of a kind a prompt may take."""
        ...

    def sentences(self) -> Sequence[np.ndarray]:
        """Ids of sentences of prose, in order, each of which begins with a space."""
        ...


def different_names(language: Language, rng: np.random.Generator, kind: Kind, number: int) -> list[str]:
    """So many names, no two of them equal."""
    names: dict[str, None] = {}
    # Ten times as many draws as names: there are always enough names in text, and plain words are counted.
    for _ in range(10 * number + 1000):
        if len(names) == number:
            break
        names[language.name(rng, kind)] = None
    else:
        raise ValueError(f"{language} has too few different {kind} for the {number} that a prompt takes")
    return list(names)


@dataclasses.dataclass(frozen=True)
class PlainWords:
    """Plain ids: every word and mark of a prompt is one id, and so is every name, whatever its kind.

    Attributes:
      num_words: words besides those of the prompts; one half are names, of the other sentences are made.
    """

    num_words: Annotated[int, Range(64, 2**20)] = 512

    @property
    def vocab_size(self) -> int:
        return 1 + len(templates.WORDS) + self.num_words

    def encode(self, text: str) -> np.ndarray:
        """See `Language`. Raises ValueError for a word that is not in the vocabulary."""
        words = templates.words_of(text)
        unknown = [word for word in words if word not in self._ids]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not in the vocabulary of {self}")
        return np.array([self._ids[word] for word in words], np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """See `Language`: the words, with a space between any two."""
        return " ".join(self._words[i] for i in ids if 0 < i < self.vocab_size)

    def name(self, rng: np.random.Generator, kind: Kind) -> str:
        """See `Language`."""
        return self._word(int(rng.integers(self.num_words // 2)))

    def most(self, kind: Kind) -> int:
        """See `Language`; numbers of a list are words as well, and there are a thousand of them."""
        return min(self.num_words // 2, 200)

    @functools.cached_property
    def _sentences(self) -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        first = 1 + len(templates.WORDS) + self.num_words // 2
        stop = self._ids["."]
        bodies = [rng.integers(first, self.vocab_size, length) for length in rng.integers(9, 16, 1000)]
        return [np.append(body, stop).astype(np.int32) for body in bodies]

    def sentences(self) -> Sequence[np.ndarray]:
        """See `Language`: of words drawn independently, 10 to 16 ids each, always the same ones."""
        return self._sentences

    def _word(self, index: int) -> str:
        # All equally long: no word is a part of another one.
        return f"w{index:0{len(str(self.num_words))}}"

    @functools.cached_property
    def _words(self) -> list[str]:
        return ["", *templates.WORDS, *map(self._word, range(self.num_words))]

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self._words) if word}


class Prose(Protocol):
    """Where sentences come from: a frozen dataclass."""

    def sentences(self) -> Sequence[str]:
        """Sentences in order, white space made single spaces."""
        ...


@dataclasses.dataclass(frozen=True)
class TextLanguage:
    """Text in a vocabulary, as RULER and BABILong have it; names come from no list of theirs.

    Attributes:
      vocabulary: turns text into ids.
      prose: sentences.
    """

    vocabulary: Vocabulary
    prose: Prose = dataclasses.field(default_factory=lambda: StandardLibrary())

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.size

    def encode(self, text: str) -> np.ndarray:
        """See `Language`."""
        return self.vocabulary.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """See `Language`."""
        return self.vocabulary.decode(ids)

    def name(self, rng: np.random.Generator, kind: Kind) -> str:
        """See `Language`."""
        if kind == "numbers":
            return str(rng.integers(1_000_000, 10_000_000))
        if kind == "passkeys":
            return str(rng.integers(1, 50_000))
        if kind == "values":
            return str(rng.integers(10_000, 99_999))
        if kind == "uuids":
            return str(uuid.UUID(bytes=rng.bytes(16), version=4))
        if kind in ("variables", "short_variables"):
            return _letters(rng, string.ascii_uppercase, 5 if kind == "variables" else 3)
        if kind == "codes":
            return _letters(rng, string.ascii_lowercase, 6)
        words = StandardLibrary().words()
        if kind == "common":
            return str(words[int(rng.integers(len(words)))])
        # Words at even places stand for adjectives, those at odd ones for nouns.
        first, second = 2 * rng.integers(len(words) // 2, size=2)
        name = f"{words[first]}-{words[second + 1]}"
        return name if name not in self._compounds else self.name(rng, kind)

    def most(self, kind: Kind) -> int:
        """See `Language`."""
        return len(StandardLibrary().words()) // 2 if kind == "common" else 10_000

    def sentences(self) -> Sequence[np.ndarray]:
        """See `Language`."""
        return self._encoded

    @functools.cached_property
    def _encoded(self) -> list[np.ndarray]:
        return [self.vocabulary.encode(f" {sentence}") for sentence in self.prose.sentences()]

    @functools.cached_property
    def _compounds(self) -> set[str]:
        return {found for sentence in self.prose.sentences() for found in re.findall(r"[a-z]+-[a-z]+", sentence)}


def _letters(rng: np.random.Generator, alphabet: str, number: int) -> str:
    return "".join(alphabet[i] for i in rng.integers(len(alphabet), size=number))


# Prose.

# With long docstrings, and in every Python that we support.
_MODULES = (
    *("argparse", "calendar", "codecs", "configparser", "contextlib", "csv", "datetime", "difflib", "fractions"),
    *("functools", "gettext", "heapq", "inspect", "mailbox", "optparse", "os", "pickletools", "random", "shutil"),
    *("smtplib", "statistics", "subprocess", "tempfile", "textwrap", "threading", "turtle", "uuid", "zipfile"),
)
_MOST_WORDS = 60


@dataclasses.dataclass(frozen=True)
class StandardLibrary:
    """Docstrings of the running Python: what every machine has. They differ a little between versions of Python."""

    def sentences(self) -> Sequence[str]:
        """See `Prose`."""
        return _library_sentences()

    def words(self) -> Sequence[str]:
        """Different words of the docstrings, 4 to 9 lower-case letters, in alphabetical order."""
        return _library_words()


@dataclasses.dataclass(frozen=True)
class HeldOutDocuments:
    """Sentences of the held-out documents of a run's own data.

    Attributes:
      text: the documents.
      name: of the data, which tells them apart.
      most: tokens to take from each document.
      num_documents: how many documents to take.
    """

    text: TextSource = dataclasses.field(repr=False)
    name: str
    most: int = 50_000
    num_documents: int = 64

    def sentences(self) -> Sequence[str]:
        """See `Prose`."""
        return self._sentences

    @functools.cached_property
    def _sentences(self) -> list[str]:
        found: list[str] = []
        for index in range(min(len(self.text.document_keys()), self.num_documents)):
            tokens = self.text.document_tokens(index)[: self.most]
            found += split_sentences(self.text.vocabulary.decode(tokens))
        return found


def split_sentences(text: str) -> list[str]:
    """Sentences of a text, by marks that end one; those without four words are left out, and long ones are cut."""
    found = []
    for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text):
        words = sentence.split()
        for first in range(0, len(words), _MOST_WORDS):
            part = words[first : first + _MOST_WORDS]
            if len(part) >= 4:
                found.append(" ".join(part))
    return found


@functools.cache
def _library_sentences() -> tuple[str, ...]:
    found = [sentence for doc in _docstrings() for sentence in split_sentences(doc)]
    return tuple(dict.fromkeys(sentence for sentence in found if sentence.isascii()))


@functools.cache
def _library_words() -> tuple[str, ...]:
    text = " ".join(_library_sentences())
    return tuple(sorted(set(re.findall(r"(?<![\w-])[a-z]{4,9}(?![\w'-])", text))))


def _docstrings() -> Iterator[str]:
    for name in _MODULES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.origin or not spec.origin.endswith(".py"):
            continue
        tree = ast.parse(pathlib.Path(spec.origin).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""
