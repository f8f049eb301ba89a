"""TFDS builders of the corpora: they write whole documents, which the seqio Tasks read.

    builder = tfds.builder("memorizing_arxiv")          # after: import memorizing.data.tasks.builders
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=ARCHIVES))

They are there for users of TFDS and seqio; `memorizing prepare` reads the corpora without them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from memorizing.data.corpora import catalogue
from memorizing.data.documents import CorpusReader
from memorizing.data.tasks import splits
from memorizing.data.tasks.splits import SplitRule

TEXT = "text"
DOCUMENT_ID = "doc_id"
NUM_BYTES = "num_bytes"


class CorpusBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Documents of a corpus, each as its key, its text and its size.

    A corpus without official splits is divided by the hash of the keys, as `memorizing prepare` does.
    """

    VERSION = tfds.core.Version("1.0.0")
    CORPUS: ClassVar[catalogue.Corpus]
    VALIDATION_FRACTION: ClassVar[float] = 0.05

    @property
    def MANUAL_DOWNLOAD_INSTRUCTIONS(self) -> str:
        return f"The manual folder is the source of the corpus: {self.CORPUS.archives}."

    def _info(self) -> tfds.core.DatasetInfo:
        # Not `dataset_info_from_configs`: it looks for files beside a builder and fails where there are none.
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.CORPUS.title}: whole documents. {self.CORPUS.archives}",
            license=self.CORPUS.licence,
            citation=self.CORPUS.citation,
            features=tfds.features.FeaturesDict(
                {
                    DOCUMENT_ID: tfds.features.Text(),
                    TEXT: tfds.features.Text(),
                    NUM_BYTES: tfds.features.Scalar(np.int64),
                }
            ),
            # The reader's order, not that of TFDS's own hashes.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, Any]]]:
        reader = catalogue.reader(self.CORPUS.name, os.fspath(dl_manager.manual_dir))
        rule, numbers = self._divide(reader)
        return {splits.NAMES[number]: self._generate_examples(reader, rule, number) for number in sorted(numbers)}

    def _divide(self, reader: CorpusReader) -> tuple[SplitRule, set[int]]:
        """The rule of the splits, and the numbers of those that have documents."""
        hashes = []
        official = []
        for shard in reader.shards():
            for document in reader.documents(shard, Counter()):
                hashes.append(splits.key_hash(document.key))
                official.append(splits.number(document.metadata.get("split"), document.key))
        by_hash = np.asarray(hashes, np.uint64)
        if self.CORPUS.official_splits:
            rule: SplitRule = splits.OfficialSplits()
        else:
            rule = splits.by_rank(by_hash, self.VALIDATION_FRACTION)
        numbers = rule.numbers((), by_hash, np.asarray(official, np.int8))
        return rule, set(numbers.tolist())

    def _generate_examples(self, reader: CorpusReader, rule: SplitRule, number: int) -> Iterator[tuple[int, Any]]:
        index = 0
        for shard in reader.shards():
            for document in reader.documents(shard, Counter()):
                if _number(rule, document.key, document.metadata.get("split")) == number:
                    num_bytes = len(document.text.encode())
                    yield index, {DOCUMENT_ID: document.key, TEXT: document.text, NUM_BYTES: num_bytes}
                    index += 1


def _number(rule: SplitRule, key: str, official: str | None) -> int:
    hashes = np.asarray([splits.key_hash(key)], np.uint64)
    given = np.asarray([splits.number(official, key)], np.int8)
    (number,) = rule.numbers([key], hashes, given)
    return int(number)


def _builder(corpus: catalogue.Corpus) -> type[CorpusBuilder]:
    # TFDS names a builder after its class, and has a c4 and a pg19 of its own.
    name = f"Memorizing{corpus.name.capitalize()}"
    return type(name, (CorpusBuilder,), {"CORPUS": corpus, "__doc__": corpus.title, "__module__": __name__})


BUILDERS: dict[str, type[CorpusBuilder]] = {corpus.name: _builder(corpus) for corpus in catalogue.PUBLISHED.values()}
