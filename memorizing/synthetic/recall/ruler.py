"""RULER's eleven synthetic tasks (Hsieh et al. 2024): needles in haystacks, chains of variables, frequent words.

They are not RULER: its two tasks with questions about documents need downloads, and word lists and essays are others.
Means over these tasks compare with no published mean, and where prose or word lists matter, names say so.

Ours also draws anew for every sample what RULER's code fixes by its seed: the order of needles, the place in the prose
where a haystack begins, the places of common words.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import numpy as np

from memorizing.synthetic.recall import scoring, templates
from memorizing.synthetic.recall.language import Kind, different_names
from memorizing.synthetic.recall.prompt import (
    PUBLISHED_LENGTH,
    Draft,
    Prompt,
    PromptTask,
    TooShort,
    fitted,
    room_for_answer,
    units_from,
)
from memorizing.synthetic.task import Text

Name = Literal[
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
]


class Niah(NamedTuple):
    """A task with needles.

    Attributes:
      haystack: 'noise', one filler over and over; 'essay', prose; 'needle', other needles.
      key, value: kinds of names.
      num_keys, num_values, num_queries: needles are keys times values; so many keys are asked for.
    """

    haystack: Literal["noise", "essay", "needle"]
    key: Kind
    value: Kind
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


NIAH = {
    "niah_single_1": Niah("noise", "words", "numbers"),
    "niah_single_2": Niah("essay", "words", "numbers"),
    "niah_single_3": Niah("essay", "words", "uuids"),
    "niah_multikey_1": Niah("essay", "words", "numbers", num_keys=4),
    "niah_multikey_2": Niah("needle", "words", "numbers"),
    "niah_multikey_3": Niah("needle", "uuids", "uuids"),
    "niah_multivalue": Niah("essay", "words", "numbers", num_values=4),
    "niah_multiquery": Niah("essay", "words", "numbers", num_keys=4, num_queries=4),
}
# Tasks whose prose or words are others than the published ones.
DIFFERENT = {name for name, task in NIAH.items() if task.haystack == "essay" or task.key == "words"} | {"cwe"}
TASKS: tuple[Name, ...] = get_args(Name)

# As published: tokens to generate, and units by which haystacks are fitted. A sentence has about twenty words.
_GENERATED = {"vt": 30, "cwe": 120, "fwe": 50}
_NIAH_GENERATED = 128
_STEPS = {"noise": 25, "needle": 25, "essay": 25}
_NUM_HOPS = 4


@dataclasses.dataclass(frozen=True)
class Ruler(PromptTask):
    """One of the tasks.

    Attributes:
      task: its name.
    """

    task: Name = "niah_single_1"

    @property
    def chance(self) -> float:
        """That of a guess at what the prompt does not tell; one among its own words is likelier, where they are few."""
        return 0.0

    @property
    def shown_name(self) -> str:
        """The task's name, with a mark where its words are not RULER's."""
        return f"{self.task}@ours" if self.task in DIFFERENT else self.task

    def prompt(self, rng: np.random.Generator, length: int) -> Prompt:
        if self.task in NIAH:
            return self._needles(rng, length, NIAH[self.task])
        writers: dict[str, Callable[[np.random.Generator, int], Prompt]] = {
            "vt": self._variables,
            "cwe": self._common_words,
            "fwe": self._frequent_words,
        }
        return writers[self.task](rng, length)

    def score(self, prediction: str, prompt: Prompt) -> float:
        return scoring.ruler_all(prediction, prompt.references)

    # Needles.

    def _needles(self, rng: np.random.Generator, length: int, task: Niah) -> Prompt:
        encode = self.language.encode
        keys = different_names(self.language, rng, task.key, task.num_keys)
        number = task.num_keys * task.num_values
        taken = {*keys}
        values: list[str] = []
        for _ in range(number):
            values.append(self._untaken(rng, task.value, taken))
            taken.add(values[-1])
        told = [(keys[i // task.num_values], value) for i, value in enumerate(values)]
        asked = [keys[i] for i in rng.choice(task.num_keys, task.num_queries, replace=False)]
        order = rng.permutation(number)
        start, question, prefix = self._niah_texts(task, asked)
        # The needles in the order of the text, and of each key that is asked for its values in that order.
        in_text = [told[i] for i in order]
        places = {pair: place for place, pair in enumerate(in_text)}
        expected = [pair for key in asked for pair in in_text if pair[0] == key]
        needles = [encode(self._before(task) + self._needle(task, *pair)) for pair in in_text]
        answers = [encode(f" {value}") for _, value in expected]
        end = encode("\n" + question + prefix)
        parts = [encode(start + "\n"), end]
        num_answer = sum(map(len, answers)) + len(encode(",")) * len(answers)
        reserved = room_for_answer(num_answer, _NIAH_GENERATED, length)
        fixed = sum(map(len, parts)) + sum(map(len, needles)) + reserved
        if fixed > length:
            raise TooShort(fixed)
        units = self._haystack(rng, task, length - fixed, length, taken)
        draft = Draft()
        draft.add(parts[0])
        told_at = _insert(draft, units, needles, _depths(rng, task, len(units), number))
        draft.add(end)
        for index, (pair, answer) in enumerate(zip(expected, answers, strict=True)):
            if index:
                draft.add(encode(","))
            draft.answer(answer, told_at[places[pair]])
        references = tuple(value for _, value in expected)
        return Prompt(draft.text(), references, question, max(reserved, num_answer))

    def _needle(self, task: Niah, key: str, value: str) -> str:
        return templates.NEEDLE.format(task.value, key, value)

    def _before(self, task: Niah) -> str:
        """What joins units: prose goes on, others are lines."""
        return " " if task.haystack == "essay" else "\n"

    def _niah_texts(self, task: Niah, asked: list[str]) -> tuple[str, str, str]:
        """The task, the question and the start of the answer."""
        named = _enumerated(asked)
        if task.num_queries * task.num_values == 1:
            kind = task.value[:-1]
            texts = templates.NIAH_TASK_ONE, templates.NIAH_QUESTION_ONE, templates.NIAH_PREFIX_ONE
        else:
            kind = task.value
            texts = templates.NIAH_TASK, templates.NIAH_QUESTION, templates.NIAH_PREFIX
        start, question, prefix = texts
        return start.format(kind, kind), question.format(kind, named), prefix.format(kind, named)

    def _haystack(
        self, rng: np.random.Generator, task: Niah, room: int, length: int, taken: set[str]
    ) -> list[np.ndarray]:
        """Units that fill a room, none of which holds a name of the needles."""
        if task.haystack == "essay":
            units = units_from(self.language.sentences(), rng, room)
        elif task.haystack == "noise":
            unit = self.language.encode("\n" + templates.FILLER)
            units = [unit] * (room // len(unit) + 1)
        else:
            units, total = [], 0
            while total <= room:
                key = self._untaken(rng, task.key, taken)
                value = self._untaken(rng, task.value, taken)
                units.append(self.language.encode("\n" + self._needle(task, key, value)))
                total += len(units[-1])
        lengths = np.array([len(unit) for unit in units])
        return units[: fitted(lengths, room, length, _STEPS[task.haystack])]

    def _untaken(self, rng: np.random.Generator, kind: Kind, taken: set[str]) -> str:
        for _ in range(1000):
            name = self.language.name(rng, kind)
            if name not in taken:
                return name
        raise ValueError(f"{self.language} has too few {kind}")

    # Variables.

    def _variables(self, rng: np.random.Generator, length: int) -> Prompt:
        encode = self.language.encode
        example = Draft()
        self._chain(example, rng, self._noise(5), "short_variables")
        value, names = self._chain_names(rng, "variables")
        answers = [encode(f" {name}") for name in names]
        num_answer = sum(map(len, answers))
        reserved = room_for_answer(num_answer, _GENERATED["vt"], length)
        empty = Draft()
        self._write_chain(empty, rng, [], value, names)
        between = encode("\n\n")
        fixed = example.length + len(between) + empty.length - num_answer + reserved
        if fixed > length:
            raise TooShort(fixed)
        unit = len(self._noise(1)[0])
        lengths = np.full((length - fixed) // unit + 1, unit)
        draft = Draft()
        # The worked example's answers are part of the prompt.
        draft.add(example.text().ids)
        draft.add(between)
        number = fitted(lengths, length - fixed, length, 10)
        question = self._write_chain(draft, rng, self._noise(number), value, names)
        return Prompt(draft.text(), tuple(names), question, max(reserved, num_answer))

    def _noise(self, number: int) -> list[np.ndarray]:
        return [self.language.encode("\n" + templates.FILLER)] * number

    def _chain_names(self, rng: np.random.Generator, kind: Kind) -> tuple[str, list[str]]:
        """A value and variables."""
        names = different_names(self.language, rng, kind, _NUM_HOPS + 1)
        value = self._untaken(rng, "values", {*names})
        return value, names

    def _chain(self, draft: Draft, rng: np.random.Generator, units: list[np.ndarray], kind: Kind) -> None:
        value, names = self._chain_names(rng, kind)
        self._write_chain(draft, rng, units, value, names)

    def _write_chain(
        self, draft: Draft, rng: np.random.Generator, units: list[np.ndarray], value: str, names: list[str]
    ) -> str:
        """Writes a whole prompt with its answers; returns the question."""
        encode = self.language.encode
        statements = [templates.VT_FIRST.format(names[0], value)]
        statements += [templates.VT_NEXT.format(after, before) for before, after in itertools.pairwise(names)]
        encoded = [encode("\n" + statement) for statement in statements]
        draft.add(encode(templates.VT_TASK + "\n"))
        places = np.sort(rng.choice(max(len(units), len(names)), len(names), replace=False))
        told_at = _insert(draft, units, encoded, np.minimum(places, len(units)))
        question = templates.VT_QUESTION.format(value)
        prefix = templates.VT_PREFIX.format(len(names), value).rstrip()
        draft.add(encode("\n" + question + prefix))
        for name in names:
            # That a variable has the value takes the whole chain before it.
            draft.answer(encode(f" {name}"), told_at[0])
        return question

    # Words that are counted.

    def _common_words(self, rng: np.random.Generator, length: int) -> Prompt:
        encode = self.language.encode
        is_long = length >= PUBLISHED_LENGTH
        example = self._word_list(rng, *((40, 10, 3) if is_long else (20, 3, 1)))
        repeats = (30, 3) if is_long else (6, 1)
        num_end = len(encode("\n" + templates.CWE_QUESTION + templates.CWE_PREFIX))
        # Lengths of words differ: a first guess that is certainly too long, then fewer until it fits.
        number = min(10 + max(length // (repeats[1] * 3), 10), self.language.most("common"))
        step = 10 if is_long else 5
        while number > 10:
            written = self._word_list(rng, number, *repeats)
            reserved = room_for_answer(written.num_answer, _GENERATED["cwe"], length)
            total = example.draft.length + 1 + written.draft.length - written.num_answer + reserved
            if total <= length:
                break
            # In proportion to what is too much, but at least a step.
            excess = (total - length) * (number - 10) // max(written.draft.length - num_end, 1)
            number -= max(step, excess // step * step)
        else:
            smallest = self._word_list(rng, 11, *repeats)
            raise TooShort(example.draft.length + 1 + smallest.draft.length)
        draft = Draft()
        shift = draft.add(np.concatenate([example.draft.text().ids, encode("\n")])) + 1
        text = written.draft.text()
        first = int(np.argmax(text.is_answer))
        draft.add(text.ids[:first])
        _copy_answers(draft, text, first, shift)
        return Prompt(draft.text(), written.names, templates.CWE_QUESTION, max(reserved, written.num_answer))

    def _word_list(self, rng: np.random.Generator, number: int, common: int, others: int) -> _WordList:
        """A prompt with its answers: so many different words, ten of which are common."""
        encode = self.language.encode
        words = different_names(self.language, rng, "common", number)
        counts = np.where(np.arange(number) < 10, common, others)
        order = rng.permutation(np.repeat(np.arange(number), counts))
        draft = Draft()
        draft.add(encode(templates.CWE_TASK + "\n"))
        first_at: dict[int, int] = {}
        for place, index in enumerate(order.tolist()):
            end = draft.add(encode(f"{'' if place == 0 else ' '}{place + 1}. {words[index]}"))
            first_at.setdefault(index, end)
        draft.add(encode("\n" + templates.CWE_QUESTION + templates.CWE_PREFIX))
        # The answers in the order in which they appear.
        names = sorted(range(10), key=first_at.__getitem__)
        # What is generated begins behind the first number.
        start = draft.length + len(encode(" 1."))
        for place, index in enumerate(names):
            draft.add(encode(f" {place + 1}."))
            draft.answer(encode(f" {words[index]}"), first_at[index])
        return _WordList(draft, tuple(words[index] for index in names), draft.length - start)

    def _frequent_words(self, rng: np.random.Generator, length: int) -> Prompt:
        encode = self.language.encode
        start = encode(templates.FWE_TASK)
        end = encode("\n" + templates.FWE_QUESTION + templates.FWE_PREFIX)
        vocabulary = min(max(length // 50, 8), self.language.most("codes"))
        names = different_names(self.language, rng, "codes", vocabulary)
        answers = [encode(f" {name}") for name in names[1:4]]
        num_answer = sum(map(len, answers)) + 2 * len(encode(","))
        reserved = room_for_answer(num_answer, _GENERATED["fwe"], length)
        room = length - len(start) - len(end) - reserved
        pieces = [encode(" ..."), *(encode(f" {name}") for name in names[1:])]
        lengths = np.array([len(piece) for piece in pieces])
        total, step = 0, max(length // 32, 1)
        counts = _zeta_counts(total, vocabulary)
        while (more := _zeta_counts(total + step, vocabulary)) @ lengths <= room:
            total, counts = total + step, more
        # The answers are the second to the fourth: no other word is as frequent.
        if not counts[1] > counts[2] > counts[3] > counts[4]:
            raise TooShort(length + 16 * int(lengths.mean()))
        order = rng.permutation(np.repeat(np.arange(vocabulary), counts))
        draft = Draft()
        draft.add(start)
        first_at: dict[int, int] = {}
        for index in order.tolist():
            place = draft.add(pieces[index])
            first_at.setdefault(index, place)
        draft.add(end)
        for rank, answer in enumerate(answers, 1):
            if rank > 1:
                draft.add(encode(","))
            draft.answer(answer, first_at[rank])
        return Prompt(draft.text(), tuple(names[1:4]), templates.FWE_QUESTION, max(reserved, num_answer))


class _WordList(NamedTuple):
    """A list of words with a question and answers.

    Attributes:
      draft: all of it.
      names: the common words.
      num_answer: tokens of the answers and what stands between them.
    """

    draft: Draft
    names: tuple[str, ...]
    num_answer: int


def _zeta_counts(total: int, vocabulary: int) -> np.ndarray:
    """How often each rank occurs, int [vocabulary]: total / (rank^2 * zeta(2)), rounded down."""
    ranks = np.arange(1, vocabulary + 1)
    return np.floor(total * ranks**-2.0 / (np.pi**2 / 6)).astype(int)


def _enumerated(names: list[str]) -> str:
    """As RULER joins them: 'a, b, and c'."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"


def _depths(rng: np.random.Generator, task: Niah, num_units: int, number: int) -> np.ndarray:
    """Before which unit each needle stands, ascending, int [number]."""
    if task.haystack == "essay":
        # Forty depths, equally spaced.
        shares = np.sort(rng.choice(40, number, replace=False)) / 39
        return np.round(shares * num_units).astype(int)
    return np.sort(rng.choice(max(num_units, number), number, replace=False)).clip(max=num_units)


def _insert(draft: Draft, units: list[np.ndarray], facts: list[np.ndarray], before: np.ndarray) -> list[int]:
    """Writes units with facts among them; returns where each fact ends."""
    told_at = []
    waiting = list(zip(before.tolist(), facts, strict=True))
    for index in range(len(units) + 1):
        while waiting and waiting[0][0] == index:
            told_at.append(draft.add(waiting.pop(0)[1]))
        if index < len(units):
            draft.add(units[index])
    return told_at


def _copy_answers(draft: Draft, text: Text, first: int, shift: int) -> None:
    """Writes what stands from the first answer on, which was told `shift` positions earlier than it now is."""
    assert text.told_at is not None
    place = first
    while place < len(text.ids):
        same = (text.told_at[place:] == text.told_at[place]) & (text.is_answer[place:] == text.is_answer[place])
        end = place + int(np.argmin(same)) if not same.all() else len(text.ids)
        if text.is_answer[place]:
            draft.answer(text.ids[place:end], int(text.told_at[place]) + shift)
        else:
            draft.add(text.ids[place:end])
        place = end
