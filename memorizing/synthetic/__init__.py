"""Tasks made in numpy: the whole training loop runs without any corpus, and without TensorFlow."""

from memorizing.synthetic.curriculum import Curriculum
from memorizing.synthetic.dictionary import DictionaryLookup
from memorizing.synthetic.facts import DetectAndMemorize, Memorize, Reasoning
from memorizing.synthetic.noise import NoiseSource, SyntheticWords
from memorizing.synthetic.repeated_passages import RepeatedPassages
from memorizing.synthetic.sequences import Copy, Reverse
from memorizing.synthetic.task import SyntheticTask
from memorizing.synthetic.topics import TopicCopy

__all__ = [
    "Copy",
    "Curriculum",
    "DetectAndMemorize",
    "DictionaryLookup",
    "Memorize",
    "NoiseSource",
    "Reasoning",
    "RepeatedPassages",
    "Reverse",
    "SyntheticTask",
    "SyntheticWords",
    "TopicCopy",
]
