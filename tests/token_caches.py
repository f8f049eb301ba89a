"""Small token caches, which several tests of the data side read."""

import numpy as np

from memorizing.data.tokens import cache_writer, staging, token_cache
from memorizing.data.tokens.cache_writer import TokenisedDocument
from memorizing.data.tokens.vocabulary import ByteVocabulary

TEXTS = {"one": "first\n", "zwei é": "\tdeuxième 漢字\n" * 100, "three": "x"}


def tokenised(used, texts):
    for key, text in texts.items():
        yield TokenisedDocument(key, len(text.encode()), np.append(used.encode(text), used.end_id))


def write(folder, parts, used, task="github_bytes", described=None):
    """Writes a cache of parts, each a list of pairs of a split and a document, into a staged folder."""
    indices = []
    for number, documents in enumerate(parts):
        indices.append(folder.work / f"part-{number}.npz")
        cache_writer.write_part(folder.path, indices[-1], number, used.size, documents)
    cache_writer.join(folder.path, indices, ["train", "validation"], task, used, described or {"source": "nowhere"})


def write_cache(path, used=None, task="github_bytes", texts=None, documents_per_part=10):
    used = used or ByteVocabulary()
    documents = [("train", document) for document in tokenised(used, texts or TEXTS)]
    documents += [("validation", document) for document in tokenised(used, {"held out": "é"})]
    parts = [documents[first : first + documents_per_part] for first in range(0, len(documents), documents_per_part)]
    with staging.staged(str(path), token_cache.METADATA_FILE, {}) as folder:
        write(folder, parts, used, task)
    return str(path)
