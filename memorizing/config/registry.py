"""Everything that gin can configure."""

from __future__ import annotations

from memorizing.config.types import register
from memorizing.evaluation.windows import Windows
from memorizing.models.attention import MECHANISMS
from memorizing.models.layers import Lora
from memorizing.models.lm_config import LMConfig
from memorizing.models.memory.continuous_cache import ContinuousCache
from memorizing.models.memory.product_keys import ProductKeys
from memorizing.models.memory.search import ApproximateSearch, ExactSearch
from memorizing.models.positions import Rotary
from memorizing.models.recurrent_tokens import RecurrentTokens
from memorizing.runtime.sharding import MeshConfig
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
    TopicCopy,
)
from memorizing.synthetic.recall import (
    MQAR,
    BABILong,
    Passkey,
    PlainWords,
    Ruler,
    SegmentedMQAR,
    StandardLibrary,
    TextLanguage,
)
from memorizing.training.experiment import BatchConfig, Experiment, LoopConfig
from memorizing.training.optimizer import Adafactor, AdamW, Cosine, InverseSquareRoot, ParameterGroup

for configurable in (
    # What is run.
    Experiment,
    BatchConfig,
    LoopConfig,
    MeshConfig,
    # The model.
    LMConfig,
    *MECHANISMS,
    Rotary,
    Lora,
    RecurrentTokens,
    ContinuousCache,
    ProductKeys,
    ExactSearch,
    ApproximateSearch,
    # Optimizers and schedules.
    Adafactor,
    AdamW,
    InverseSquareRoot,
    Cosine,
    ParameterGroup,
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
    TopicCopy,
    # Recall suites, and what their prompts are written in.
    MQAR,
    SegmentedMQAR,
    Passkey,
    Ruler,
    BABILong,
    PlainWords,
    TextLanguage,
    StandardLibrary,
    # Any data, read in windows.
    Windows,
):
    register(configurable)
