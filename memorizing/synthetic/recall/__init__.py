"""Recall suites: tasks that ask for what was told several segments before, made in numpy."""

from memorizing.synthetic.recall.babilong import BABILong
from memorizing.synthetic.recall.language import PlainWords, StandardLibrary, TextLanguage
from memorizing.synthetic.recall.mqar import MQAR, SegmentedMQAR
from memorizing.synthetic.recall.passkey import Passkey
from memorizing.synthetic.recall.ruler import Ruler

__all__ = [
    "MQAR",
    "BABILong",
    "Passkey",
    "PlainWords",
    "Ruler",
    "SegmentedMQAR",
    "StandardLibrary",
    "TextLanguage",
]
