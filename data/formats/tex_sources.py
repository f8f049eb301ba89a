"""The LaTeX sources of one paper as one text: the main file, then what it reads in, then the rest."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping

from memorizing.data.documents import SEPARATOR

_SUFFIX = ".tex"
# A percent sign begins a comment, unless a backslash stands before it; two are the end of a line.
_COMMENT = re.compile(r"%(?:(?<!\\%)|(?<=(?<!\\)\\\\%)).*")
# A file of the class `subfiles` is part of another.
_MAIN = re.compile(r"\\document(?:class|style)\b(?!\s*(?:\[[^\]]*\])?\s*\{subfiles\})")
_BEGIN = re.compile(r"\\begin\s*\{document\}")
# \input{FILE}, \input FILE, \include{FILE}, \subfile{FILE}, \import{FOLDER}{FILE} and the like; and what authors call
# their own, such as \chapterinput[FOLDER]{FILE}: only what names a file of the paper counts.
_READS = re.compile(
    r"\\[A-Za-z]*(?:input|include|import|from|subfile|InputIfFileExists)\*?"
    r"(?:\s*(?:\[(?P<option>[^\[\]]*)\]\s*)?\{(?P<first>[^{}]*)\}(?:\s*\{(?P<second>[^{}]*)\})?"
    r"|\s+(?P<bare>[^\s\\{}\[\]]+))",
    re.IGNORECASE,
)
_MACRO = re.compile(r"\\[A-Za-z]+\s*")
_AUTO_IGNORE = "%auto-ignore"


def decode(content: bytes) -> str:
    """The text of a source, UTF-8 or else Latin-1, which takes any bytes."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def is_ignored(text: str) -> bool:
    """Whether a source begins with the mark that makes arXiv ignore it. A withdrawn paper has no other source."""
    return text.lstrip().startswith(_AUTO_IGNORE)


def join(sources: Mapping[str, str]) -> str:
    """The sources of a paper as one text, each of them whole and once.

    Args:
      sources: texts by the paths of their files; all end in .tex.
    """
    return SEPARATOR.join(sources[name] for name in order(sources))


def order(sources: Mapping[str, str]) -> list[str]:
    """The files of a paper in order: the main file, what it reads in, in the order of reading, then the rest by name.

    A file comes after the one that reads it in, and brings along what it reads in itself. The main file is one with a
    \\documentclass and a \\begin{document}. If there are several (a supplement, a cover, a separate figure), it is the
    one that is longest together with all that it reads in.
    """
    if len(sources) == 1:
        return list(sources)
    plain = {name: _COMMENT.sub("", text) for name, text in sources.items()}
    inputs = _Inputs(plain)
    reads = {name: [*inputs(name)] for name in sources}
    main = _main_file({name: plain[name] for name, text in sources.items() if not is_ignored(text)}, reads)
    first = _reached(main, reads) if main else []
    reached = set(first)
    return first + sorted(name for name in sources if name not in reached)


def _main_file(plain: Mapping[str, str], reads: Mapping[str, list[str]]) -> str | None:
    """The main file, out of texts without comments."""

    def rank(name: str) -> tuple[bool, int, str]:
        # The smallest is the main file.
        reached = [plain.get(other, "") for other in _reached(name, reads)]
        return (not any(map(_BEGIN.search, reached)), -sum(map(len, reached)), name)

    return min((name for name, text in plain.items() if _MAIN.search(text)), key=rank, default=None)


def _reached(main: str, reads: Mapping[str, list[str]]) -> list[str]:
    """A file and everything that it reads in, each file once, in the order of reading."""
    found: list[str] = []
    seen: set[str] = set()
    pending = [main]
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            found.append(name)
            pending.extend(reversed(reads[name]))
    return found


class _Inputs:
    """Which files a source reads in; made from texts without comments."""

    def __init__(self, plain: Mapping[str, str]) -> None:
        self._plain = plain
        # The author's file system may not have distinguished small and capital letters.
        self._by_lower = {name.lower(): name for name in sorted(plain, reverse=True)}

    def __call__(self, name: str) -> Iterator[str]:
        folder = posixpath.dirname(name)
        for match in _READS.finditer(self._plain[name]):
            option, first, second, bare = match.group("option", "first", "second", "bare")
            wanted = [bare] if bare else [f"{first}/{second}", f"{option}/{first}", first]
            file = next(filter(None, (self._file(folder, path) for path in wanted)), None)
            if file is not None and file != name:
                yield file

    def _file(self, folder: str, wanted: str) -> str | None:
        """A file by its name, as seen from the top of the paper or else from the file that reads it."""
        # A macro in a path mostly stands for the top of the paper, or for nothing.
        wanted = _MACRO.sub("", wanted).strip('"/ ')
        for start in ("", folder):
            path = posixpath.normpath(posixpath.join(start, wanted))
            for candidate in (path + _SUFFIX, path):
                if candidate in self._plain:
                    return candidate
                if candidate.lower() in self._by_lower:
                    return self._by_lower[candidate.lower()]
        return None
