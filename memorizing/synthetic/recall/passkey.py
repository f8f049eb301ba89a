"""A pass key in text that repeats itself (Mohtashami and Jaggi 2023).

Its weakness: the text around the key is one sentence over and over, so that whatever is new is the key. The needles of
`ruler` in prose are the stricter test.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from memorizing.synthetic.recall import scoring, templates
from memorizing.synthetic.recall.prompt import Draft, Prompt, PromptTask, TooShort, room_for_answer


@dataclasses.dataclass(frozen=True)
class Passkey(PromptTask):
    """The key is any number below 50,000, at any depth: fillers before it and behind it, cut by tokens.

    As published they are cut by characters. What is generated has to be the key, and nothing else.
    """

    @property
    def chance(self) -> float:
        return 1 / 49_999

    def prompt(self, rng: np.random.Generator, length: int) -> Prompt:
        encode = self.language.encode
        key = self.language.name(rng, "passkeys")
        answer = encode(f" {key}")
        task = encode(templates.PASSKEY_TASK + "\n")
        fact = encode("\n" + templates.PASSKEY_FACT.format(key, key) + "\n")
        question = encode("\n" + templates.PASSKEY_QUESTION)
        fixed = sum(map(len, (task, fact, question))) + room_for_answer(len(answer), len(answer), length)
        room = length - fixed
        if room < 0:
            raise TooShort(fixed)
        filler = encode(f"{templates.FILLER} ")
        fillers = np.resize(filler, room)
        before = int(rng.integers(room + 1))
        draft = Draft()
        draft.add(task)
        draft.add(fillers[:before])
        told = draft.add(fact)
        draft.add(fillers[: room - before])
        draft.add(question)
        draft.answer(answer, told)
        return Prompt(draft.text(), (key,), templates.PASSKEY_QUESTION, len(answer))

    def score(self, prediction: str, prompt: Prompt) -> float:
        return scoring.equal(prediction, prompt.references)
