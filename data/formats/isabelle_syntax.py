"""The part of Isabelle's outer syntax that says which theories a session has and what each of them imports.

From "The Isabelle/Isar Reference Manual" (theory headers) and "The Isabelle System Manual" (session ROOT files).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from typing import NamedTuple

_TOKENS = re.compile(
    r"""
    (?P<open>\(\*|\\<open>|‹|\{\*) | (?P<close>\*\)|\\<close>|›|\*\})
    | "(?P<string>(?:[^"\\]|\\.)*)" | `(?P<old_string>(?:[^`\\]|\\.)*)`
    | (?P<word>(?:[^\s"`(){}\[\],=+‹›\\]|\\<(?!open>|close>)[^>]*>)+)
    | (?P<sign>[()\[\],=+])
    """,
    re.VERBOSE | re.DOTALL,
)
# What ends a comment, a cartouche (written in two ways) and a text block of older versions. Each nests in itself only.
_CLOSED_BY = {"(*": ("*)",), "\\<open>": ("\\<close>", "›"), "‹": ("\\<close>", "›"), "{*": ("*}",)}


class Token(NamedTuple):
    """A word, a string without its quotes, or a sign; `is_sign` tells the latter from a string."""

    text: str
    is_sign: bool = False
    is_string: bool = False


def tokens(text: str) -> Iterator[Token]:
    """Yields the tokens outside comments, cartouches and text blocks; reads no further than it is asked to."""
    position = 0
    while match := _TOKENS.search(text, position):
        position = match.end()
        if match["open"]:
            position = _end_of_block(text, match["open"], position)
        elif match.lastgroup in ("string", "old_string"):
            yield Token(match[match.lastgroup], is_string=True)
        elif match["word"]:
            yield Token(match["word"])
        elif match["sign"]:
            yield Token(match["sign"], is_sign=True)


def _end_of_block(text: str, opened: str, position: int) -> int:
    closed_by = _CLOSED_BY[opened]
    opened_by = [start for start, ends in _CLOSED_BY.items() if ends == closed_by]
    marks = re.compile("|".join(map(re.escape, (*opened_by, *closed_by))))
    depth = 1
    while depth:
        match = marks.search(text, position)
        if match is None:
            return len(text)
        # Text blocks of older versions do not nest.
        depth += -1 if match[0] in closed_by else opened != "{*"
        position = match.end()
    return position


def imports(theory: str) -> list[str]:
    """What a theory imports, as it is written: `theory NAME imports ... begin`."""
    found: list[str] = []
    state = ""
    for token in tokens(theory):
        if token.is_string or token.is_sign:
            if state == "imports" and token.is_string:
                found.append(token.text)
        elif token.text in ("begin", "keywords", "abbrevs", "uses"):
            if state:
                return found
        elif token.text in ("theory", "imports"):
            state = token.text
        elif state == "imports":
            found.append(token.text)
    return found


class IsabelleSession(NamedTuple):
    """A session of a ROOT file.

    Attributes:
      name: its name.
      directories: where its theories are, relative to the ROOT file.
    """

    name: str
    directories: tuple[str, ...]


_SECTIONS = frozenset(
    (
        *("description", "options", "sessions", "directories", "theories", "document_theories", "document_files"),
        *("export_files", "export_classpath", "session", "chapter", "chapter_definition"),
    )
)


class Root(NamedTuple):
    """What a ROOT file declares: the chapters of its sessions, and the sessions, in its order."""

    chapters: frozenset[str]
    sessions: tuple[IsabelleSession, ...]


def root(text: str) -> Root:
    """Reads a ROOT file: `session NAME (GROUPS) in DIR = PARENT + ... directories ... theories ...`."""
    chapters: set[str] = set()
    sessions: list[IsabelleSession] = []
    section = ""
    words: list[str] = []

    def end_section() -> None:
        if section == "chapter" and words:
            chapters.add(words[0])
        elif section == "session" and words:
            directory = words[1] if len(words) > 1 else "."
            sessions.append(IsabelleSession(words[0], (directory,)))
        elif section == "directories" and sessions:
            name, directories = sessions[-1]
            further = [posixpath.join(directories[0], word) for word in words]
            sessions[-1] = IsabelleSession(name, (*directories, *further))

    is_head = False
    after_in = False
    depth = 0
    for token in tokens(text):
        if token.is_sign:
            depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(token.text, 0)
            # The rest of a session's head is its parent.
            is_head = is_head and token.text != "="
        elif depth > 0:
            continue
        elif not token.is_string and token.text in _SECTIONS:
            end_section()
            section = token.text
            words = []
            is_head = section == "session"
            after_in = False
        elif section == "session":
            if is_head and not token.is_string and token.text == "in" and words:
                after_in = True
            elif is_head and (not words or after_in):
                words.append(token.text)
        else:
            words.append(token.text)
    end_section()
    return Root(frozenset(chapters), tuple(sessions))
