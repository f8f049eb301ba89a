"""The suites: which tasks at which lengths belong to a name, for what a model reads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from memorizing.batch import DataSource, text_of
from memorizing.errors import UserError
from memorizing.synthetic.curriculum import Curriculum
from memorizing.synthetic.dictionary import DictionaryLookup
from memorizing.synthetic.facts import FactTask
from memorizing.synthetic.recall import ruler
from memorizing.synthetic.recall.babilong import BABILong
from memorizing.synthetic.recall.language import HeldOutDocuments, Language, StandardLibrary, TextLanguage
from memorizing.synthetic.recall.mqar import MQAR, AssociativeRecall, SegmentedMQAR
from memorizing.synthetic.recall.passkey import Passkey
from memorizing.synthetic.recall.prompt import PromptTask
from memorizing.synthetic.task import SyntheticTask

_LEAST_SENTENCES = 200
_PAIRS = (2, 4, 8, 16, 32, 64, 128, 256)


class Exercise(NamedTuple):
    """One task at one length.

    Attributes:
      suite, task: names.
      settings: what tells it apart from others of its task, such as the number of pairs.
      source: the held-out samples.
    """

    suite: str
    task: str
    settings: dict[str, Any]
    source: SyntheticTask


@dataclasses.dataclass(frozen=True)
class Reader:
    """What is evaluated.

    Attributes:
      data: of the run.
      vocab_size: ids that its model knows.
      segment_length: T.
    """

    data: DataSource
    vocab_size: int
    segment_length: int

    @property
    def task(self) -> DataSource:
        """What it is trained on; of a curriculum, what it comes to."""
        return self.data.task if isinstance(self.data, Curriculum) else self.data

    # Once: its prose is decoded and encoded.
    @functools.cached_property
    def language(self) -> Language | None:
        """What prompts for it are written in; None where it reads plain ids without words."""
        if isinstance(self.task, PromptTask):
            return self.task.language
        text = text_of(self.data)
        if text is None:
            return None
        documents = HeldOutDocuments(text, self.data.identity)
        # Of short documents, or none that has sentences, no haystack can be made.
        has_prose = len(documents.sentences()) >= _LEAST_SENTENCES
        return TextLanguage(text.vocabulary, documents if has_prose else StandardLibrary())


def exercises(names: Sequence[str], reader: Reader, lengths: Sequence[int], samples: int) -> list[Exercise]:
    """The tasks of suites, those that fit.

    Args:
      names: of suites.
      reader: what is evaluated.
      lengths: of samples, in segments.
      samples: of each task at each length.

    Raises:
      UserError: there is no such suite, or it is none for what the run reads, or nothing of it fits.
    """
    found: list[Exercise] = []
    for name in names:
        if name not in SUITES:
            raise UserError(f"--suite={name}: one of {', '.join(SUITES)}, or several with commas between")
        made = [
            exercise._replace(source=dataclasses.replace(exercise.source, num_eval_samples=samples))
            for length in lengths
            for exercise in SUITES[name](reader, length)
        ]
        fitting = [exercise for exercise in made if _fits(exercise, reader)]
        if not fitting:
            raise UserError(
                f"--suite={name}: nothing of it fits {' or '.join(map(str, lengths))} segments of "
                f"{reader.segment_length} tokens and {reader.vocab_size} token ids; give larger --lengths"
            )
        found += fitting
    # The short ones first, task by task.
    order = {exercise.task: place for place, exercise in reversed(list(enumerate(found)))}
    return sorted(found, key=lambda each: (order[each.task], list(each.settings.values())))


def _fits(exercise: Exercise, reader: Reader) -> bool:
    if exercise.source.vocab_size > reader.vocab_size:
        return False
    try:
        # All of them: samples of one task differ a little in what they take.
        for index in range(exercise.source.num_eval_samples):
            exercise.source.held_out_text(index, reader.segment_length)
    except UserError:
        return False
    return True


def _segmented_mqar(reader: Reader, length: int) -> list[Exercise]:
    task = reader.task
    own = task if isinstance(task, SegmentedMQAR) else SegmentedMQAR(num_ids=_even(reader.vocab_size))
    gap = length - own.pair_segments - own.query_segments
    return [] if gap < 0 else _by_pairs(dataclasses.replace(own, eval_gap=gap), length, "mqar", "segmented_mqar")


def _published_mqar(reader: Reader, length: int) -> list[Exercise]:
    task = reader.task
    own = task if isinstance(task, MQAR) else MQAR(num_ids=_even(reader.vocab_size))
    return _by_pairs(dataclasses.replace(own, eval_segments=length), length, "published_mqar", "mqar")


def _by_pairs(task: AssociativeRecall, length: int, suite: str, name: str) -> list[Exercise]:
    """With several numbers of pairs, that of the task among them; and with new values for half of the keys."""
    found = []
    most = task.num_ids // 4
    for pairs in sorted({*_PAIRS, task.num_pairs}):
        if pairs > most:
            continue
        own = task.with_pairs(pairs)
        found.append(Exercise(suite, name, {"pairs": pairs, "segments": length}, own))
        if own.num_new_values == 0 and pairs == task.num_pairs:
            forgetting = dataclasses.replace(own, num_new_values=pairs // 2)
            settings = {"pairs": pairs, "segments": length}
            found.append(Exercise(suite, f"{name}_newest_value", settings, forgetting))
    return found


def _even(vocab_size: int) -> int:
    return vocab_size // 2 * 2


def _dictionary(reader: Reader, length: int) -> list[Exercise]:
    task = _own(reader, DictionaryLookup, "dictionary")
    source = dataclasses.replace(task, eval_distance=length - 1, eval_segments=length)
    return [Exercise("dictionary", "dictionary_lookup", {"segments": length}, source)]


def _facts(reader: Reader, length: int) -> list[Exercise]:
    task = _own(reader, FactTask, "facts")
    name = "".join(f"_{c.lower()}" if c.isupper() else c for c in type(task).__name__).lstrip("_")
    return [Exercise("facts", name, {"segments": length}, dataclasses.replace(task, eval_segments=length))]


def _own(reader: Reader, kind: type[Any], suite: str) -> Any:
    """The run's own task, whose vocabulary and settings are learned."""
    if not isinstance(reader.task, kind):
        raise UserError(
            f"--suite={suite}: for runs that are trained on such a task; this one is trained on {reader.data.identity}"
        )
    return reader.task


def _passkey(reader: Reader, length: int) -> list[Exercise]:
    return [
        Exercise("passkey", "passkey", {"segments": length}, Passkey(eval_segments=length, language=_words(reader)))
    ]


def _ruler(reader: Reader, length: int) -> list[Exercise]:
    tasks = [ruler.Ruler(eval_segments=length, language=_words(reader), task=name) for name in ruler.TASKS]
    return [Exercise("ruler", task.shown_name, {"segments": length}, task) for task in tasks]


def _babilong(reader: Reader, length: int) -> list[Exercise]:
    language = _words(reader)
    found = []
    for task in ("qa1", "qa2", "qa3", "qa4", "qa5"):
        for names in ("familiar", "other"):
            source = BABILong(eval_segments=length, language=language, task=task, names=names)
            name = task if names == "familiar" else f"{task}_other_names"
            found.append(Exercise("babilong", name, {"segments": length}, source))
    return found


def _words(reader: Reader) -> Language:
    language = reader.language
    if language is None:
        raise UserError(
            f"the run reads plain ids without words ({reader.data.identity}): suites with prompts take a run on text, or "
            "on a task with words, such as tasks/passkey_words"
        )
    return language


def _own_task(reader: Reader, length: int) -> list[Exercise]:
    """Of what the run is trained on."""
    for kind, make in (
        (SegmentedMQAR, _segmented_mqar),
        (MQAR, _published_mqar),
        (DictionaryLookup, _dictionary),
        (FactTask, _facts),
        (Passkey, _passkey),
        (ruler.Ruler, _ruler),
        (BABILong, _babilong),
    ):
        if isinstance(reader.task, kind):
            return make(reader, length)
    raise UserError(f"--suite=own: the run is trained on no task with answers, but on {reader.data.identity}")


SUITES: dict[str, Callable[[Reader, int], list[Exercise]]] = {
    "own": _own_task,
    "mqar": _segmented_mqar,
    "published_mqar": _published_mqar,
    "passkey": _passkey,
    "ruler": _ruler,
    "babilong": _babilong,
    "dictionary": _dictionary,
    "facts": _facts,
}
