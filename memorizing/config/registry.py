"""Everything that gin can configure."""

from __future__ import annotations

from memorizing.attention import MECHANISMS
from memorizing.config.types import register
from memorizing.experiment import BatchConfig, Experiment, LoopConfig
from memorizing.language_model import LMConfig
from memorizing.optimizer import Adafactor, AdamW, Cosine, InverseSquareRoot
from memorizing.recurrent_tokens import RecurrentTokens
from memorizing.search import ApproximateSearch, ExactSearch
from memorizing.sharding import MeshConfig
from memorizing.synthetic import (
    Copy,
    Curriculum,
    DetectAndMemorize,
    DictionaryLookup,
    Memorize,
    Reasoning,
    RepeatedPassages,
    Reverse,
    SyntheticWords,
)
from memorizing.windows import Windows

for configurable in (
    # What is run.
    Experiment,
    BatchConfig,
    LoopConfig,
    MeshConfig,
    # The model.
    LMConfig,
    *MECHANISMS,
    RecurrentTokens,
    ExactSearch,
    ApproximateSearch,
    # Optimizers and schedules.
    Adafactor,
    AdamW,
    InverseSquareRoot,
    Cosine,
    # Data that needs no corpus; gin files of corpora import memorizing.data.gin_registry.
    RepeatedPassages,
    Memorize,
    DetectAndMemorize,
    Reasoning,
    Copy,
    Reverse,
    DictionaryLookup,
    Curriculum,
    SyntheticWords,
    # Any data, read in windows.
    Windows,
):
    register(configurable)
