"""C4 (Raffel et al. 2020) as allenai distributes it: `en/c4-train.00000-of-01024.json.gz`, a web page a line.

The corpus C4(4K+) of Wu et al. 2022 has only the pages of 4096 tokens or more. How many tokens a page has depends on
the vocabulary. So all pages are read here, and the short ones are left out once they are tokenised.
"""

from __future__ import annotations

import dataclasses
import posixpath
import re
from collections import Counter
from collections.abc import Iterator

from memorizing.data.corpora.reader_settings import setting
from memorizing.data.documents import Document
from memorizing.data.errors import DataError
from memorizing.data.formats import archives, json_lines

MIN_TOKENS = 4096

_EXPECTED = (
    "the folder of the variants of C4 (en, realnewslike ...) or of one variant: "
    "c4-train.*.json.gz and c4-validation.*.json.gz"
)
_FILE = re.compile(r"c4-(?:train|validation)\.\d+-of-\d+\.json(?:\.gz)?")


@dataclasses.dataclass(frozen=True)
class C4Reader:
    """The web pages; a shard is a file.

    Attributes:
      source: the folder of the files, or of the variant's folder.
    """

    source: str
    variant: str = setting("en", "name of the variant's folder, where the files do not lie in the source itself.")

    def shards(self) -> list[str]:
        """See `documents.CorpusReader`."""
        inside = posixpath.join(self.source, self.variant)
        prefix = f"{self.variant}/" if archives.is_folder(inside) else ""
        names = archives.listing(posixpath.join(self.source, prefix), _EXPECTED)
        shards = [f"{prefix}{name}" for name in names if _FILE.fullmatch(name)]
        if not shards:
            raise DataError(
                f"no file c4-train.*.json.gz or c4-validation.*.json.gz in {self.source!r} or {inside!r}; "
                f"give {_EXPECTED}"
            )
        return shards

    def documents(self, shard: str, skipped: Counter[str]) -> Iterator[Document]:
        """Yields pages; see `documents.CorpusReader`."""
        label = posixpath.basename(shard)
        split = "validation" if label.startswith("c4-validation.") else "train"
        # The corpus has each address once. If a page comes again, its line distinguishes it from the first.
        seen: set[str] = set()
        lines = json_lines.read(posixpath.join(self.source, shard), label, skipped, {"text": str, "url": str})
        for number, page in lines:
            url = page["url"]
            key = f"{url}#{label}:{number}" if url in seen else url
            seen.add(url)
            yield Document(key, page["text"], {"split": split, "timestamp": page.get("timestamp", "")})
