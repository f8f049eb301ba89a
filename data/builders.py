"""A TFDS builder around any corpus reader: it writes whole documents, which the seqio Tasks read."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from . import documents
from .documents import Reader

TEXT = "text"
DOCUMENT_ID = "doc_id"
NUM_BYTES = "num_bytes"


@dataclasses.dataclass(kw_only=True)
class CorpusConfig(tfds.core.BuilderConfig):
    """What a builder reads.

    Attributes:
      name: of the corpus.
      reader: of its documents.
      splits: keys of the documents of each split.
      advance: called after each document.
    """

    # TFDS logs its configurations: without all the keys.
    reader: Reader = dataclasses.field(repr=False)
    splits: Mapping[str, frozenset[str]] = dataclasses.field(repr=False)
    advance: Callable[[], None] = dataclasses.field(default=lambda: None, repr=False)


class Documents(tfds.core.GeneratorBasedBuilder):
    """Documents of a corpus, `documents/CORPUS:VERSION`, each as its key, its text and its size."""

    VERSION = tfds.core.Version("1.0.0")

    @property
    def seqio_name(self) -> str:
        """How seqio wants a dataset to be named: with its version."""
        return f"{self.name}/{self.builder_config.name}:{self.version}"

    def _info(self) -> tfds.core.DatasetInfo:
        # Not `dataset_info_from_configs`: it looks for files beside a builder and fails where there are none.
        return tfds.core.DatasetInfo(
            builder=self,
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
        del dl_manager  # Nothing is downloaded; the reader knows where the corpus is.
        return {split: self._generate_examples(keys) for split, keys in self.builder_config.splits.items()}

    def _generate_examples(self, keys: frozenset[str]) -> Iterator[tuple[int, Any]]:
        for index, document in enumerate(documents.read(self.builder_config.reader, wanted=keys)):
            num_bytes = len(document.text.encode())
            yield index, {DOCUMENT_ID: document.key, TEXT: document.text, NUM_BYTES: num_bytes}
            self.builder_config.advance()


def build(
    corpus: str,
    reader: Reader,
    splits: Mapping[str, frozenset[str]],
    directory: str,
    advance: Callable[[], None] = lambda: None,
) -> Documents:
    """Writes the documents of a corpus.

    Args:
      corpus: its name.
      reader: of its documents.
      splits: keys of the documents of each split.
      directory: to write into.
      advance: called after each document.
    """
    tfds.disable_progress_bar()
    builder = Documents(
        data_dir=directory, config=CorpusConfig(name=corpus, reader=reader, splits=splits, advance=advance)
    )
    # It prints that it downloads, which it does not.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
    return builder
