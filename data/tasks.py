"""The seqio Tasks: whole documents as tokens, with their keys and sizes carried along.

A Task gives a document in one piece, however long: it is read without a feature converter, which would cut it. What it
gives goes into the token cache once.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import seqio
import tensorflow as tf

from . import builders
from .vocabulary import ESCAPES, SentencePieceVocabulary, Vocabulary

TARGETS = "targets"


def register(name: str, builder: builders.Documents, vocabulary: Vocabulary, model_path: str) -> seqio.Task:
    """Registers the Task under a name, in place of an earlier one of that name.

    Args:
      name: a Task's name, see `task_name`.
      builder: has written its documents.
      vocabulary: turns them into tokens.
      model_path: where a SentencePiece model lies as a file, from which seqio reads it.
    """
    if name in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(name)
    carried = {key: key for key in (builders.DOCUMENT_ID, builders.NUM_BYTES)}
    tokenize = [functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False)]
    if isinstance(vocabulary, SentencePieceVocabulary):
        seqio_vocabulary = seqio.SentencePieceVocabulary(model_path, extra_ids=0)
        tokenize = [_escaped_lines, *tokenize, _join]
    else:
        seqio_vocabulary = seqio.ByteVocabulary()
    return seqio.TaskRegistry.add(
        name,
        source=seqio.TfdsDataSource(tfds_name=builder.seqio_name, tfds_data_dir=os.fspath(builder.data_dir_root)),
        preprocessors=[
            functools.partial(seqio.preprocessors.rekey, key_map={TARGETS: builders.TEXT} | carried),
            *tokenize,
            seqio.preprocessors.append_eos,
        ],
        output_features={TARGETS: seqio.Feature(seqio_vocabulary, add_eos=True, dtype=tf.int32)},
        metric_fns=[],
    )


def examples(task: seqio.Task, split: str) -> Iterator[dict[str, Any]]:
    """Yields the documents of a split in an order that is always the same, as numpy."""
    dataset = task.get_dataset(
        sequence_length=None,
        split=split,
        use_cached=False,
        shuffle=False,
        # It would hold all documents of a small corpus in memory for one pass.
        try_in_mem_cache=False,
    )
    return dataset.as_numpy_iterator()


@seqio.map_over_dataset
def _escaped_lines(example: dict[str, Any]) -> dict[str, Any]:
    """`vocabulary.escape` in TensorFlow, and the text as lines with their ends.

    Since a newline is a token of its own, the lines have the tokens of the whole, several times as fast.
    """
    text = example[TARGETS]
    for character, escaped in ESCAPES:
        text = tf.strings.regex_replace(text, character, escaped)
    lines = tf.strings.split(text, "\n")
    return example | {TARGETS: tf.concat([lines[:-1] + "\n", lines[-1:]], axis=0)}


@seqio.map_over_dataset
def _join(example: dict[str, Any]) -> dict[str, Any]:
    """The tokens of all lines as one document."""
    return example | {TARGETS: example[TARGETS].flat_values}
