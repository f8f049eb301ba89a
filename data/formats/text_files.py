"""Text out of bytes: which encoding they are in, and whether they are text at all."""

from __future__ import annotations

import codecs
import contextlib
import io
from collections import Counter
from collections.abc import Iterator
from typing import IO

from memorizing.data.documents import damaged
from memorizing.data.formats import archives, markup, pdf, source_files
from memorizing.data.formats.archives import Member
from memorizing.errors import first_line

# Files whose bytes are their text.
PROSE = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc")
CODE = (
    *sorted({suffix for suffixes in source_files.SUFFIXES.values() for suffix in suffixes}),
    *(".js", ".jsx", ".mjs", ".rs", ".rb", ".php", ".cs", ".swift", ".kt", ".scala", ".dart", ".zig", ".nim", ".jl"),
    *(".hs", ".ml", ".mli", ".fs", ".clj", ".ex", ".exs", ".erl", ".lisp", ".el", ".scm", ".thy", ".lean", ".v"),
    *(".sh", ".bash", ".lua", ".pl", ".pm", ".r", ".f90", ".sql", ".proto", ".css", ".scss"),
)
SUFFIXES = (*PROSE, *CODE, *markup.HTML, markup.EPUB, pdf.SUFFIX)

BINARY = "no text"
EMPTY = "empty"

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    # The mark of UTF-16 begins as this one.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Of text, of which Latin letters are in UTF-16 every second byte is zero, and in no other encoding any.
_SAMPLE = 1 << 16
_MOST_ZEROS, _FEWEST_ZEROS = 0.3, 0.02
_MAX_CONTROLS = 0.01
# Tabs, line ends, form feeds, and the escape of a terminal's colours.
_CONTROLS = bytes(byte for byte in range(32) if byte not in b"\t\n\v\f\r\x1b") + b"\x7f"


def text_of(label: str, suffix: str, content: bytes) -> tuple[str, str | None]:
    """The text of a file.

    Args:
      label: names it in messages.
      suffix: tells its kind, such as ".txt" or ".epub".
      content: of the file.

    Returns:
      The text and None, or "" and why the file is left out.
    """
    try:
        if suffix in markup.HTML:
            return _page(content)
        if suffix == markup.EPUB:
            pages = [_page(page)[0] for page in markup.pages_of_epub(content)]
            return _unless_empty("\n".join(filter(None, pages)))
        if suffix == pdf.SUFFIX:
            text = pdf.text_of_pdf(content)
            # A glyph may stand for half of a character.
            return ("", pdf.MISSING) if text is None else _unless_empty(text.encode("utf-8", "replace").decode())
    # Of a damaged file libraries say anything.
    except Exception as error:
        return "", damaged(label, first_line(error))
    return decoded(content)


def _page(content: bytes) -> tuple[str, str | None]:
    """The text of a page of HTML, in UTF-8 or else in the encoding that it names."""
    text, reason = decoded(content)
    named = markup.declared_encoding(content)
    if reason is None and named and _is_legacy(content):
        with contextlib.suppress(LookupError, UnicodeDecodeError):
            text = content.decode(named)
    return (text, reason) if reason else _unless_empty(markup.text_of_html(text))


def _is_legacy(content: bytes) -> bool:
    """Whether bytes of text are in neither UTF-8 nor, by a mark, in another form of Unicode."""
    try:
        content.decode()
    except UnicodeDecodeError:
        return not any(content.startswith(mark) for mark, _ in _MARKS)
    return False


def _unless_empty(text: str) -> tuple[str, str | None]:
    return (text, None) if text.strip() else ("", EMPTY)


def between(member: Member, separator: str, max_bytes: int, skipped: Counter[str]) -> Iterator[bytes]:
    """Yields what stands between the lines of a file that are a separator, as the file is read.

    Args:
      member: the file.
      separator: the line, without white space around it.
      max_bytes: more between two separators is left out, and counted.
      skipped: counts what was left out, by reason.
    """
    try:
        with member.open() as file:
            start = file.read(4)
            file.seek(0)
            if any(start.startswith(mark) for mark, encoding in _MARKS if encoding != "utf-8-sig"):
                # Not a byte of such a line is that of UTF-8.
                content = file.read(archives.MAX_BYTES + 1)
                if len(content) > archives.MAX_BYTES:
                    skipped[archives.TOO_LARGE] += 1
                    return
                file = io.BytesIO(decoded(content)[0].encode())
            yield from _parts(file, separator.strip().encode(), max_bytes, skipped)
    except archives.READ_ERRORS as error:
        skipped[damaged(member.label, archives.why(error))] += 1


def _parts(file: IO[bytes], separator: bytes, max_bytes: int, skipped: Counter[str]) -> Iterator[bytes]:
    content = bytearray()
    while True:
        line = file.readline(max_bytes + 1)
        if line and line.strip() != separator:
            if len(content) <= max_bytes:
                content += line
            continue
        if len(content) > max_bytes:
            skipped[archives.TOO_LARGE] += 1
        elif content.strip():
            yield bytes(content)
        if not line:
            return
        content.clear()


def decoded(content: bytes) -> tuple[str, str | None]:
    """The text of a file.

    UTF-8 and UTF-16, with a mark at the start or without, UTF-32 with one, and else Latin-1, in whose unused places
    Windows has other characters. The mark is no part of the text.

    Returns:
      The text and None, or "" and why the file is left out.
    """
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), None) or _without_mark(content)
    if encoding is None:
        return "", BINARY
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        return "", BINARY
    return _unless_empty(text)


def _without_mark(content: bytes) -> str | None:
    """The encoding of a file that does not say it; None where it is no text."""
    sample = content[:_SAMPLE]
    if b"\0" in content:
        even, odd = (sample[first::2].count(0) / max(len(sample) // 2, 1) for first in (0, 1))
        if len(content) % 2 == 0 and odd > _MOST_ZEROS and even < _FEWEST_ZEROS:
            return "utf-16-le"
        return "utf-16-be" if len(content) % 2 == 0 and even > _MOST_ZEROS and odd < _FEWEST_ZEROS else None
    # A few are in a short text too.
    if len(sample) - len(sample.translate(None, _CONTROLS)) > 2 + _MAX_CONTROLS * len(sample):
        return None
    for encoding in ("utf-8", "cp1252"):
        try:
            content.decode(encoding)
        except UnicodeDecodeError:
            continue
        return encoding
    return "latin-1"
