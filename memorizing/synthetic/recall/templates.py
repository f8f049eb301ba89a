"""The words of the prompts, which are part of the protocols: a score compares only with the same ones.

RULER (Hsieh et al. 2024, and its code), the passkey (Mohtashami and Jaggi 2023, as in the code of LongLLaMA), bAbI
(Weston et al. 2015). `{}` are filled in.
"""

from __future__ import annotations

import re

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

PASSKEY_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
PASSKEY_FACT = "The pass key is {}. Remember it. {} is the pass key."
PASSKEY_QUESTION = "What is the pass key? The pass key is"

NEEDLE = "One of the special magic {} for {} is: {}."
NIAH_TASK = (
    "Some special magic {} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {} afterwards."
)
NIAH_QUESTION = "What are all the special magic {} for {} mentioned in the provided text?"
NIAH_PREFIX = " The special magic {} for {} mentioned in the provided text are"
# The same for a single answer.
NIAH_TASK_ONE = NIAH_TASK.replace("Some", "A").replace("are hidden", "is hidden")
NIAH_QUESTION_ONE = NIAH_QUESTION.replace("are all", "is")
NIAH_PREFIX_ONE = NIAH_PREFIX.replace("text are", "text is")

VT_TASK = "Memorize and track the chain(s) of variable assignment hidden in the following text."
VT_FIRST = "VAR {} = {}"
VT_NEXT = "VAR {} = VAR {} "
VT_QUESTION = "Question: Find all variables that are assigned the value {} in the text above."
VT_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {} variables are assigned the "
    "value {}, they are: "
)

CWE_TASK = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often."
)
CWE_QUESTION = "Question: What are the 10 most common words in the above list?"
CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"

FWE_TASK = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words."
)
FWE_QUESTION = "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
FWE_QUESTION += "frequently appeared words in the above coded text?"
FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"

# bAbI's worlds: who acts, what is carried, where.
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
PERSONS = ("John", "Mary", "Sandra", "Daniel")
GIVERS = ("Bill", "Fred", "Jeff", "Mary")
THINGS = ("apple", "football", "milk")
# Others, which no model has seen in training: whether the task was learned or its labels.
OTHER_PLACES = ("attic", "cellar", "library", "stable", "terrace", "workshop")
OTHER_PERSONS = ("Anna", "Peter", "Olga", "Victor")
OTHER_GIVERS = ("Emil", "Karl", "Nora", "Anna")
OTHER_THINGS = ("candle", "hammer", "letter")

MOVES = ("went to", "journeyed to", "travelled to", "moved to", "went back to")
TAKES = ("grabbed", "took", "got", "picked up")
DROPS = ("dropped", "put down", "discarded", "left")
GIVES = ("gave", "handed", "passed")

_OF_STORIES = (
    *PLACES,
    *PERSONS,
    *GIVERS,
    *THINGS,
    *OTHER_PLACES,
    *OTHER_PERSONS,
    *OTHER_GIVERS,
    *OTHER_THINGS,
    *MOVES,
    *TAKES,
    *DROPS,
    *GIVES,
    "The the is of north south east west Where was before What did give to Who who what where gave received there ?",
)
_NUMBERS = " ".join(f"{number}" for number in range(1, 1000))


def words_of(text: str) -> list[str]:
    """Words and marks of a text. Dots and brackets in a row are a mark each."""
    return re.findall(r"\w+|[^\w\s]", text)


def _all_words() -> tuple[str, ...]:
    own = [value for name, value in globals().items() if name.isupper() and isinstance(value, str)]
    kinds = "number numbers word words uuid uuids A and"
    found = [word for text in (*own, *_OF_STORIES, kinds, _NUMBERS) for word in words_of(text)]
    return tuple(dict.fromkeys(found))


# Every word and mark of any prompt but for names, each once.
WORDS = _all_words()
