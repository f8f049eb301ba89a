"""A corpus of a few short texts and finished runs on it, for tests of what is done with a finished run."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memorizing import main
from memorizing.batch import EvaluationBatch, Vocabulary
from memorizing.config.loading import load_experiment
from memorizing.config.types import register
from memorizing.data.tokens.vocabulary import ByteVocabulary
from memorizing.synthetic import RepeatedPassages
from memorizing.training.checkpoint import Checkpointer
from memorizing.training.identity import open_workdir
from memorizing.training.state import init_train_state

LENGTH, MEMORY = 8, 16


@dataclasses.dataclass(frozen=True)
class ShiftedBytes:
    """Bytes with other ids than `ByteVocabulary`."""

    name: str = "bytes"
    size: int = 259
    digest: str = "shifted"
    start_id: int = 0

    def encode(self, text: str) -> np.ndarray:
        return (ByteVocabulary().encode(text) - 2) % 256 + 3

    decode = pieces = None


@dataclasses.dataclass(frozen=True)
class TinyTexts:
    """A `DataSource` of three held-out texts; as `memorizing.data.streams.sources.CachedCorpus`, without a cache."""

    is_shifted: bool = False
    seed: int = 0
    vocab_size: int = dataclasses.field(default=259, init=False)
    start_id: int = dataclasses.field(default=0, init=False)

    @property
    def identity(self) -> str:
        return repr(self)

    @property
    def texts(self) -> dict[str, str]:
        words = ["if", "else:", "return", "naïve", "x", "€", "\n", "</script>", "{{DATA}}", "<b>"]
        rng = np.random.default_rng(self.seed)
        return {
            name: " ".join(rng.choice(words, size)) for name, size in (("short.py", 3), ("long.py", 30), ("<b>", 12))
        }

    @property
    def text(self) -> TinyTexts:
        return self

    @property
    def vocabulary(self) -> Vocabulary:
        return ShiftedBytes() if self.is_shifted else ByteVocabulary()

    @property
    def num_eval_documents(self) -> int:
        return 3

    @property
    def document_bytes(self) -> np.ndarray:
        return np.array([len(text.encode()) for text in self.texts.values()])

    @property
    def document_words(self) -> np.ndarray:
        return np.array([len(text.split()) for text in self.texts.values()])

    def document_keys(self) -> list[str]:
        return list(self.texts)

    def document_tokens(self, index: int) -> np.ndarray:
        return self.vocabulary.encode(list(self.texts.values())[index])

    def train_batches(self, *args, **kwargs):
        raise NotImplementedError

    def evaluation_batches(
        self, num_rows: int, segment_length: int, rows: range | None = None
    ) -> Iterator[EvaluationBatch]:
        """As RepeatedPassages makes them of its documents: a passage that is not repeated."""
        for index in range(self.num_eval_documents):
            tokens = self.document_tokens(index)
            one = RepeatedPassages(self.vocab_size, passage_length=len(tokens), num_passages=1, num_documents=1)
            object.__setattr__(one, "document", lambda *_, tokens=tokens: tokens)
            for batch, document, offset in one.evaluation_batches(num_rows, segment_length):
                yield EvaluationBatch(batch, np.where(document >= 0, index, -1), offset)


register(TinyTexts)

BINDINGS = (
    "Experiment.data=@TinyTexts()",
    "VOCAB_SIZE=259",
    "LMConfig.num_layers=2",
    "LMConfig.embed_dim=16",
    "LMConfig.num_heads=2",
    "LMConfig.head_dim=8",
    "LMConfig.mlp_dim=16",
    "LMConfig.initial_logit_scale=8.0",
    "LMConfig.attention_at=((1, @KNNAttention()),)",
    f"KNNAttention.memory_size={MEMORY}",
    "KNNAttention.num_neighbors=4",
    # With the values that follow, equal keys lead to different values. Which of them is the last to be found depends on
    # where the ring stands, and so on what a row has read before.
    "KNNAttention.stored_value=own",
    f"BatchConfig.segment_length={LENGTH}",
    f"BatchConfig.tokens_per_step={2 * LENGTH}",
)


def finished_run(
    workdir: pathlib.Path, *bindings: str, model_file: str = "models/memorizing_tiny.gin", seed: int = 0
) -> str:
    """A workdir as `train` leaves it, with two checkpoints, of weights that are far from those of the start.

    `models/transformer_tiny.gin` has no memory.
    """
    has_memory = "memorizing" in model_file
    chosen = [binding for binding in BINDINGS if has_memory or "KNNAttention" not in binding]
    experiment, text = load_experiment(["runs/base.gin", model_file], [*chosen, *bindings])
    folder = open_workdir(str(workdir), experiment, text)
    checkpointer = Checkpointer(folder, stacked_layers=experiment.model.stack.stacked_layers)
    for step in (1, 2):
        checkpointer.save(_state(experiment, seed, step), {})
    checkpointer.close()
    return str(folder)


def expect_error(capsys: pytest.CaptureFixture, arguments: list[str], pattern: str, command: str = "evaluate") -> None:
    """The command ends with code 2 and says one line, which matches the pattern."""
    capsys.readouterr()
    assert main._run([command, *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert re.search(pattern, error), error


@functools.cache
def _state(experiment, seed: int, step: int):
    @jax.jit
    def make():
        batch = experiment.batch
        state = init_train_state(
            experiment.model, experiment.make_optimizer(), batch.num_rows, batch.segment_length, seed
        )
        keys = jax.random.split(jax.random.key(100 * seed + step), len(jax.tree.leaves(state.params)))
        noise = iter(keys)
        params = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(noise), leaf.shape), state.params)
        return state.replace(params=params, step=jnp.asarray(step, jnp.int32))

    return make()
