"""Text out of PDF, page by page, as far as a file says what its glyphs stand for."""

from __future__ import annotations

import io
import logging

SUFFIX = ".pdf"
MISSING = "PDF, which needs pip install 'memorizing[documents]'"


def text_of_pdf(content: bytes) -> str | None:
    """The text of a file, None where `pypdf` is not installed.

    Raises:
      Exception: it is damaged or encrypted: pypdf has many errors, also Python's own.
    """
    try:
        import pypdf
    except ImportError:
        return None
    # It warns of every small fault of a file.
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    reader = pypdf.PdfReader(io.BytesIO(content))
    return "\n".join(page.extract_text() for page in reader.pages)
