"""Prompts: they fit, their answers follow from the text and stand in it once, and nothing of them is told before."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from memorizing.data.tokens.vocabulary import ByteVocabulary
from memorizing.errors import UserError
from memorizing.synthetic.recall import BABILong, Passkey, PlainWords, Ruler, StandardLibrary, TextLanguage, ruler
from memorizing.synthetic.recall.language import HeldOutDocuments, split_sentences
from memorizing.synthetic.recall.prompt import fitted

WORDS, TEXT = PlainWords(), TextLanguage(ByteVocabulary())
LENGTHS = {WORDS: 1500, TEXT: 5000}
LANGUAGES = pytest.mark.parametrize("language", [WORDS, TEXT], ids=["words", "text"])


def tasks_of(language) -> list:
    return [Passkey(language=language), *(Ruler(language=language, task=name) for name in ruler.TASKS)]


def made(task, length: int, number: int = 3):
    for index in range(number):
        yield task.prompt(np.random.default_rng([3, index]), length)


def before_and_after(task, prompt) -> tuple[str, str]:
    first = int(np.argmax(prompt.text.is_answer))
    return task.language.decode(prompt.text.ids[:first]), task.language.decode(prompt.text.ids[first:])


@LANGUAGES
def test_prompts_fit_and_their_answers_are_told_where_they_say(language) -> None:
    """And an oracle that gives the answers gets everything, in the benchmark's own score."""
    for length in (LENGTHS[language], 4096 if language is WORDS else 9000):
        for task in tasks_of(language):
            if language is TEXT and length == 5000 and getattr(task, "task", "") == "cwe":
                # Thirty times ten words as bytes take more.
                continue
            for prompt in made(task, length):
                text = prompt.text
                first = int(np.argmax(text.is_answer))
                assert first + prompt.num_generated <= length
                # What is left free is less than a unit of a haystack, or a twentieth of it where it comes in steps.
                assert first + prompt.num_generated > 0.6 * length or getattr(task, "task", "") in ("cwe", "fwe")
                assert text.ids.min() >= 1 and text.ids.max() < language.vocab_size
                starts = np.flatnonzero(text.is_answer & (np.diff(text.is_answer.astype(int), prepend=0) != 0))
                assert (text.told_at[starts] < first).all() and (text.told_at[~text.is_answer] == -1).all()
                _, after = before_and_after(task, prompt)
                assert task.score(after, prompt) == 1 and task.score("", prompt) == 0


def test_counted_words_fit_to_the_last_token() -> None:
    """Of an answer that is told with its number, what is generated begins behind that."""
    task = Ruler(language=TEXT, task="cwe")
    for length in range(9180, 9200):
        prompt = task.prompt(np.random.default_rng(length), length)
        assert np.argmax(prompt.text.is_answer) + prompt.num_generated <= length


@LANGUAGES
@pytest.mark.parametrize("name", ["passkey", *ruler.NIAH])
def test_a_needle_stands_once_in_front_of_its_answer(language, name: str) -> None:
    task = Passkey(language=language) if name == "passkey" else Ruler(language=language, task=name)
    depths = []
    for prompt in made(task, LENGTHS[language], 12):
        before, _ = before_and_after(task, prompt)
        for reference in prompt.references:
            found = [place.start() for place in re.finditer(rf"(?<![\w-]){reference}(?![\w-])", before)]
            # The pass key's sentence names it twice.
            assert len(found) == (2 if name == "passkey" else 1), reference
            depths.append(found[0] / len(before))
        # The question names the keys, not the values.
        assert not any(
            reference in before[before.rindex("What is" if len(prompt.references) == 1 else "What are") :]
            for reference in prompt.references
        )
        spans = np.flatnonzero(np.diff(prompt.text.told_at, prepend=-1) > 0)
        if name.startswith("niah"):
            sentences = [language.decode(prompt.text.ids[: prompt.text.told_at[start] + 1]) for start in spans]
            assert [reference in text[-120:] for reference, text in zip(prompt.references, sentences, strict=True)]
    assert min(depths) < 0.45 and max(depths) > 0.55


def test_numbers_of_needles_are_those_of_the_tasks() -> None:
    for name, niah in ruler.NIAH.items():
        (prompt,) = made(Ruler(language=WORDS, task=name), 1500, 1)
        before, _ = before_and_after(Ruler(language=WORDS), prompt)
        needles = re.findall(r"One of the special magic \w+ for (w\d+) is : (w\d+)", before)
        own = niah.num_keys * niah.num_values
        assert len(needles) > own if niah.haystack == "needle" else len(needles) == own
        asked = re.findall(r"w\d+", before[before.rindex("What") :])
        assert sorted(value for key, value in needles if key in asked) == sorted(prompt.references)
        assert len(prompt.references) == niah.num_values * niah.num_queries


def test_a_chain_of_variables_is_solved_by_replay() -> None:
    task = Ruler(language=TEXT, task="vt")
    for prompt in made(task, 5000):
        before, _ = before_and_after(task, prompt)
        # The last one: a worked example, with names of three letters, comes before.
        context, question = before[before.rindex("Memorize and track") :].split("Question:")
        (value,) = re.findall(r"assigned the value (\d+) in the text", question)
        values: dict[str, str] = {}
        for name, source in re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", context):
            values[name] = values.get(source, source)
        assert {name for name, own in values.items() if own == value} == set(prompt.references)
        example = before[: before.rindex("Memorize and track")]
        assert len(re.findall(r"VAR [A-Z]{3} =", example)) == 5 and "they are:" in example
        assert len(prompt.references) == 5 and all(len(name) == 5 for name in prompt.references)


def test_common_words_are_strictly_the_most_common() -> None:
    task = Ruler(language=TEXT, task="cwe")
    places = set()
    for length, common, other in ((3000, 6, 1), (9000, 30, 3)):
        for prompt in made(task, length, 2):
            before, _ = before_and_after(task, prompt)
            context = before[before.rindex("Below is a numbered list") :].split("Question")[0]
            words = re.findall(r"\d+\. (\w+)", context)
            counts = {word: words.count(word) for word in set(words)}
            assert {word for word, count in counts.items() if count == common} == set(prompt.references)
            assert {count for word, count in counts.items() if word not in prompt.references} == {other}
            places.add(tuple(words.index(word) for word in prompt.references))
    # Other places in every sample.
    assert len(places) == 4


def test_frequent_words_are_ranks_two_to_four() -> None:
    task = Ruler(language=TEXT, task="fwe")
    for prompt in made(task, 4096):
        before, _ = before_and_after(task, prompt)
        words = before.split("coded words.")[1].split("\nQuestion")[0].split()
        counts = sorted(((words.count(word), word) for word in set(words)), reverse=True)
        assert counts[0][1] == "..."
        assert tuple(word for _, word in counts[1:4]) == prompt.references
        assert counts[3][0] > counts[4][0]


def test_fitting_takes_steps_where_prompts_are_long() -> None:
    lengths = np.full(1000, 10)
    assert fitted(lengths, 1239, 2000, 25) == 123
    assert fitted(lengths, 9_990, 10_000, 25) == 975
    # A step of a twentieth at most.
    assert fitted(lengths, 409, 5000, 25) == 40
    assert fitted(lengths, 5, 2000, 25) == 0 and fitted(lengths, -5, 5000, 25) == 0


@LANGUAGES
def test_samples_are_functions_of_their_index(language) -> None:
    task = dataclasses.replace(Ruler(language=language), task="niah_multikey_1", eval_segments=4)
    length = LENGTHS[language] // 4
    texts = [task.held_out_text(index, length).ids.tobytes() for index in range(4)]
    assert texts == [task.held_out_prompt(index, length).text.ids.tobytes() for index in range(4)]
    assert len(set(texts)) == 4
    # Alone, and from an equal task.
    assert dataclasses.replace(task).held_out_text(3, length).ids.tobytes() == texts[3]


def test_a_prompt_that_does_not_fit_is_told() -> None:
    for task in (*tasks_of(WORDS), BABILong()):
        with pytest.raises(UserError, match=r"segment_length = 4.*tokens or more, 2 segments have 8"):
            task.sample("train", 0, 0, 2, 4)


def test_a_random_guesser_scores_next_to_nothing() -> None:
    rng = np.random.default_rng(0)
    for name in ("niah_single_1", "niah_single_3", "vt"):
        task = Ruler(language=TEXT, task=name)
        scores = [task.score(TEXT.decode(rng.integers(3, 259, 128)), prompt) for prompt in made(task, 4096, 10)]
        assert sum(scores) == 0
    names = np.array([WORDS.name(rng, "words") for _ in range(3000)]).reshape(300, 10)
    (prompt,) = made(Ruler(language=WORDS), 300, 1)
    hits = np.mean([Ruler().score(name, prompt) for name in names[:, 0]])
    assert hits < 0.03


def test_names_and_prose_come_from_the_machine() -> None:
    words, sentences = StandardLibrary().words(), StandardLibrary().sentences()
    assert len(words) > 1000 and len(sentences) > 1000 and list(words) == sorted(set(words))
    assert all(len(sentence.split()) >= 4 for sentence in sentences)
    rng = np.random.default_rng(1)
    assert re.fullmatch(r"\d{7}", TEXT.name(rng, "numbers")) and re.fullmatch(r"[A-Z]{5}", TEXT.name(rng, "variables"))
    assert re.fullmatch(r"[\da-f]{8}-[\da-f]{4}-4[\da-f]{3}-[89ab][\da-f]{3}-[\da-f]{12}", TEXT.name(rng, "uuids"))
    assert re.fullmatch(r"[a-z]+-[a-z]+", TEXT.name(rng, "words"))
    assert {"niah_single_2", "cwe"} <= ruler.DIFFERENT and not ruler.DIFFERENT & {"vt", "fwe", "niah_multikey_3"}
    assert Ruler(task="niah_single_2").shown_name == "niah_single_2@ours" and Ruler(task="vt").shown_name == "vt"
    with pytest.raises(ValueError, match="'Paris' is not in the vocabulary"):
        WORDS.encode("Paris")


def test_sentences_of_documents() -> None:
    found = split_sentences("One two three four. Five six.\n  Seven eight   nine ten eleven? no end " + "x " * 70)
    assert found[:1] == ["One two three four."] and found[1].startswith("Seven eight nine ten eleven? no end x")
    assert max(len(sentence.split()) for sentence in found) == 60

    class Documents:
        vocabulary = ByteVocabulary()

        def document_keys(self) -> list[str]:
            return ["a", "b"]

        def document_tokens(self, index: int) -> np.ndarray:
            return self.vocabulary.encode(["First one is here. Second one is here.", "Third one is here."][index])

    prose = HeldOutDocuments(Documents(), "two")
    assert prose.sentences() == ["First one is here.", "Second one is here.", "Third one is here."]
    # What a run's identity is made of has no object's address in it.
    assert repr(prose) == "HeldOutDocuments(name='two', most=50000, num_documents=64)"
