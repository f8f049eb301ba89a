"""The seqio Tasks: the definition of what the tokens of a document are.

Where there is no seqio, `prepare` makes the same tokens without them; a test holds the two against each other.

A Task gives each document in one piece, however long: it is read without a feature converter, which would cut it.

Importing this module registers a Task of each corpus for bytes and for the vocabulary of 32000 pieces, `github_bytes`,
`arxiv_spm32000`, ..., and a mixture of all corpora for each, `all_bytes` and `all_spm32000`. They read what the TFDS
builders (`builders`) have written into TFDS's data folder. `prepare` gives the same Tasks the documents themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import seqio
import tensorflow as tf

from memorizing.data.corpora import catalogue
from memorizing.data.tasks import builders
from memorizing.data.tasks.builders import DOCUMENT_ID, NUM_BYTES, TEXT
from memorizing.data.tasks.task_name import TaskName
from memorizing.data.tokens import paths
from memorizing.data.tokens.vocabulary import ESCAPES

TARGETS = "targets"
NUM_PIECES = 32000
MIXTURE = "all"
# The only split of a source that holds what it is given.
_GIVEN = "all"


def make(name: TaskName, source: seqio.DataSource, model_path: str | None) -> seqio.Task:
    """Makes a Task.

    Args:
      name: of the Task: its corpus and vocabulary.
      source: of examples with the key, the text and the size of a document.
      model_path: of the SentencePiece model, which is read when it is needed; None for bytes.
    """
    return seqio.Task(str(name), source, **_definition(model_path))


def register(
    name: TaskName, model_path: str | None = None, data_dir: str | None = None, replace: bool = True
) -> seqio.Task:
    """Registers a Task over what the corpus's TFDS builder has written.

    Args:
      name: of the Task.
      model_path: of its SentencePiece model; None for bytes.
      data_dir: TFDS's data folder; None for the usual one.
      replace: whether to replace a Task of that name.
    """
    if str(name) in seqio.TaskRegistry.names():
        if not replace:
            return seqio.TaskRegistry.get(str(name))
        seqio.TaskRegistry.remove(str(name))
    builder = builders.BUILDERS[name.corpus]
    source = seqio.TfdsDataSource(tfds_name=f"{builder.name}:{builder.VERSION}", tfds_data_dir=data_dir)
    # seqio's own sources lack members that its annotation of `source` asks for.
    return seqio.TaskRegistry.add(
        str(name),
        source=source,  # pyright: ignore[reportArgumentType]
        **_definition(model_path),
    )


def register_all(
    num_pieces: int | None,
    model_path: str | None = None,
    data_dir: str | None = None,
    rates: Mapping[str, float] | None = None,
) -> seqio.Mixture:
    """Registers the Tasks of all corpora for one vocabulary, and their mixture.

    Args:
      num_pieces: size of the SentencePiece vocabulary, None for bytes.
      model_path: of its model; None for bytes.
      data_dir: TFDS's data folder; None for the usual one.
      rates: of each corpus in the mixture, in documents; None: all equal.
    """
    names = [TaskName(corpus, num_pieces) for corpus in catalogue.PUBLISHED]
    for name in names:
        register(name, model_path, data_dir)
    mixture = str(TaskName(MIXTURE, num_pieces))
    if mixture in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.remove(mixture)
    return seqio.MixtureRegistry.add(mixture, [(str(name), (rates or {}).get(name.corpus, 1.0)) for name in names])


def tokenised(
    name: TaskName, model_path: str | None, documents: Callable[[], Iterable[Mapping[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """Yields what a Task makes of some documents, in their order, as numpy arrays.

    Args:
      name: of the Task.
      model_path: of its SentencePiece model; None for bytes.
      documents: makes an iterator over examples with the key, the text and the size of a document. Another thread reads
        it ahead. What it raises is raised here.
    """
    raised: list[Exception] = []

    def guarded() -> Iterator[Mapping[str, Any]]:
        try:
            yield from documents()
        except Exception as error:
            # TensorFlow would turn it into a text.
            raised.append(error)

    task = make(name, _GivenSource(guarded), model_path)
    dataset = task.get_dataset(
        sequence_length=None,
        split=_GIVEN,
        use_cached=False,
        shuffle=False,
        # It would hold all documents of a small corpus in memory, for a single pass.
        try_in_mem_cache=False,
    )
    yield from dataset.as_numpy_iterator()
    if raised:
        raise raised[0]


class _GivenSource(seqio.DataSource):
    """Examples that a function makes."""

    def __init__(self, make_examples: Callable[[], Iterator[Mapping[str, Any]]]) -> None:
        super().__init__(splits=(_GIVEN,), caching_permitted=False)
        self._make_examples = make_examples

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> list[str]:
        return [split]

    def get_dataset(self, split: str = _GIVEN, *unused: Any, **also_unused: Any) -> tf.data.Dataset:
        del unused, also_unused
        signature = {
            DOCUMENT_ID: tf.TensorSpec((), tf.string),
            TEXT: tf.TensorSpec((), tf.string),
            NUM_BYTES: tf.TensorSpec((), tf.int64),
        }
        return tf.data.Dataset.from_generator(self._make_examples, output_signature=signature)


def _definition(model_path: str | None) -> dict[str, Any]:
    """How documents become tokens, as arguments of `seqio.Task`."""
    carried = {key: key for key in (DOCUMENT_ID, NUM_BYTES)}
    tokenize = [functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False)]
    if model_path is None:
        vocabulary = seqio.ByteVocabulary()
    else:
        vocabulary = seqio.SentencePieceVocabulary(model_path, extra_ids=0)
        tokenize = [_escaped_lines, *tokenize, _join]
    return {
        "preprocessors": [
            functools.partial(seqio.preprocessors.rekey, key_map={TARGETS: TEXT} | carried),
            *tokenize,
            seqio.preprocessors.append_eos,
        ],
        "output_features": {TARGETS: seqio.Feature(vocabulary, add_eos=True, dtype=tf.int32)},
        "metric_fns": [],
    }


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


register_all(None)
register_all(NUM_PIECES, paths.vocabulary_path(NUM_PIECES))
