"""Text out of HTML, and out of books in EPUB, which are HTML in a zip archive."""

from __future__ import annotations

import html.parser
import io
import posixpath
import re
import urllib.parse
import zipfile
from collections.abc import Iterator
from xml.etree import ElementTree

from memorizing.data.formats import archives

HTML = (".html", ".htm", ".xhtml")
EPUB = ".epub"

# What is in them is no text that anybody reads.
_UNREAD = frozenset(("script", "style", "template", "noscript", "svg", "math"))
_BLOCKS = frozenset(
    (
        *(
            "address",
            "article",
            "aside",
            "blockquote",
            "br",
            "dd",
            "div",
            "dl",
            "dt",
            "fieldset",
            "figcaption",
            "figure",
        ),
        *("footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "nav", "ol", "p", "pre"),
        *("section", "table", "title", "tr", "ul"),
    )
)
_CHARSET = re.compile(
    rb"""<(?:meta|\?xml)[^>]{0,200}?(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]{1,40})""", re.IGNORECASE
)
_CONTAINER = "META-INF/container.xml"
_MAX_XML_BYTES = 16 << 20


def declared_encoding(content: bytes) -> str | None:
    """The encoding that a page names at its beginning."""
    found = _CHARSET.search(content[:2048])
    return found[1].decode("ascii", "replace") if found else None


def text_of_html(page: str) -> str:
    """The text of a page: its tags, scripts and styles taken out, a line for each paragraph, heading or row."""
    parser = _Parser()
    parser.feed(page)
    parser.close()
    return parser.text()


def pages_of_epub(content: bytes) -> Iterator[bytes]:
    """Yields the pages of a book in the order in which they are read.

    Raises:
      READ_ERRORS of `archives`, ValueError: it is damaged, or encrypted, or would become too large.
    """
    left = archives.MAX_BYTES
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        container = _xml(archive, _CONTAINER)
        package = next((node.get("full-path", "") for node in container.iter() if _name(node) == "rootfile"), "")
        described = _xml(archive, package)
        hrefs = {node.get("id"): node.get("href", "") for node in described.iter() if _name(node) == "item"}
        order = [hrefs.get(node.get("idref"), "") for node in described.iter() if _name(node) == "itemref"]
        # A page is read once, however often it is named.
        for href in dict.fromkeys(filter(None, order)):
            path = posixpath.join(posixpath.dirname(package), urllib.parse.unquote(href.partition("#")[0]))
            page = _read(archive, posixpath.normpath(path), left)
            left -= len(page)
            yield page


def _read(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    try:
        with archive.open(name) as file:
            content = file.read(limit + 1)
    except KeyError:
        raise ValueError(f"no {name} in it") from None
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    if len(content) > limit:
        raise ValueError(f"{name} is {archives.TOO_LARGE}")
    return content


def _xml(archive: zipfile.ZipFile, name: str) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(_read(archive, name, _MAX_XML_BYTES))
    except ElementTree.ParseError as error:
        raise ValueError(f"{name}: {error}") from None


def _name(node: ElementTree.Element) -> str:
    """A node's name without its namespace."""
    return node.tag.rpartition("}")[2] if isinstance(node.tag, str) else ""


class _Parser(html.parser.HTMLParser):
    """Collects lines of text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._lines: list[str] = []
        self._line: list[str] = []
        self._unread = 0
        self._kept_as_it_is = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        self._unread += tag in _UNREAD
        if tag in _BLOCKS:
            self._end_line()
        self._kept_as_it_is += tag == "pre"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        # `<script/>` holds nothing.
        if tag in _BLOCKS:
            self._end_line()

    def handle_endtag(self, tag: str) -> None:
        if tag in _UNREAD:
            self._unread = max(self._unread - 1, 0)
        if tag in _BLOCKS:
            self._end_line()
        if tag == "pre":
            self._kept_as_it_is = max(self._kept_as_it_is - 1, 0)

    def handle_data(self, data: str) -> None:
        if not self._unread:
            self._line.append(data)

    def text(self) -> str:
        self._end_line()
        return "".join(f"{line}\n" for line in self._lines)

    def _end_line(self) -> None:
        text = "".join(self._line)
        line = text.strip("\n") if self._kept_as_it_is else " ".join(text.split())
        if line.strip():
            self._lines.append(line)
        self._line = []
