"""A trained model for whoever has a text: it scores texts and writes on, and remembers what it has read.

`memorizing.load` makes one:

model = memorizing.load("runs/demo")
print(model.score(open("some.py").read()).perplexity)
print(model.generate("def main():\n", num_tokens=100)[0])
"""

from __future__ import annotations

import codecs
import collections
import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from memorizing.batch import Vocabulary
from memorizing.errors import UserError
from memorizing.evaluation.finished_run import FinishedRun
from memorizing.generation import session_file
from memorizing.generation.decoding import HostScores, TextDecoder
from memorizing.generation.programs import Decoder, TextState, Weights
from memorizing.generation.sampling import Sampling
from memorizing.generation.side_by_side import SideBySide
from memorizing.runtime import sharding
from memorizing.runtime.metrics import perplexity


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a model predicted a text.

    Attributes:
      tokens: int32 [length], of the text.
      nats: float32 [length], -log p of each token, given everything before it.
      pieces: the text of each token; a part of a character is U+FFFD.
      num_bytes: of the text in UTF-8.
    """

    tokens: np.ndarray
    nats: np.ndarray
    pieces: Sequence[str]
    num_bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(np.mean(self.nats, dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """Per token."""
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        return float(np.sum(self.nats, dtype=np.float64)) / math.log(2) / self.num_bytes


class TextModel:
    """A finished run as a reader and writer of texts.

    Attributes:
      run: the run, with its experiment and the step of the checkpoint.
      vocabulary: text to ids and back.
    """

    def __init__(self, run: FinishedRun) -> None:
        """
        Raises:
          UserError: the run's data is no text, or has another vocabulary than the run was trained with, or the model
            cannot write token by token.
        """
        run.check_data()
        vocabulary = run.vocabulary
        if vocabulary is None:
            raise UserError(
                f"the data of {run.workdir} is no text ({type(run.experiment.data).__name__}): "
                "only a model of text can read and write one"
            )
        self.run = run
        self.vocabulary = vocabulary
        config = run.experiment.model
        segment_length = run.experiment.batch.segment_length
        memory_segments = math.gcd(*config.memory_sizes.values()) // segment_length
        mesh = sharding.mesh_for_one_row(config.memory_heads or config.dims.kv_heads, memory_segments)
        self._decoder = _decoder(config, segment_length, mesh)
        with jax.set_mesh(mesh):
            self._weights = Weights(*run.variables_on(mesh))

    def score(self, text: str) -> Score:
        """Scores a text as one document, from an empty memory. Raises UserError if it is empty."""
        return self.session().read(text)

    def generate(
        self, prompt: str, num_tokens: int = 200, num_samples: int = 1, seed: int = 0, **sampling: Any
    ) -> list[str]:
        """Reads a prompt into an empty memory and writes on: see `Session.generate`.

        Raises:
          UserError: the prompt is empty, or a setting is out of range.
        """
        session = self.session()
        session.read(prompt)
        return session.generate(num_tokens, num_samples, seed, **sampling)

    def session(self, path: str | None = None) -> Session:
        """A session that has read nothing, or goes on where one was saved.

        Args:
          path: of a file that `Session.save` has written.

        Raises:
          UserError: the file cannot be read, or was saved with another model.
        """
        return Session(self, self.reader(self.start() if path is None else self.load(path)))

    def start(self) -> TextState:
        """What is known of a text of which nothing has been read."""
        return self._decoder.start(self.vocabulary.start_id)

    def load(self, path: str) -> TextState:
        """What a file says that `save` has written, on the host. Raises UserError as `session` does."""
        experiment = self.run.experiment
        return session_file.load(
            path,
            self._decoder.abstract_context(1),
            self.identity,
            experiment.model.vocab_size,
            experiment.batch.segment_length,
        )

    def save(self, path: str, state: TextState) -> None:
        """Writes what is known of a text to a file. Raises UserError if it cannot be written."""
        session_file.save(path, state, self.identity)

    def reader(self, state: TextState) -> TextDecoder:
        """One row that goes on from a state."""
        return TextDecoder(self._decoder, self._weights, state)

    def side_by_side(self, num_places: int) -> SideBySide:
        """Places for so many texts that are written at once."""
        return SideBySide(self._decoder, self._weights, num_places)

    @property
    def memory(self) -> str:
        """What the model carries from segment to segment, in words."""
        config, length = self.run.experiment.model, self.run.experiment.batch.segment_length
        counts = collections.Counter(config.memory_sizes.values())
        memories = [f"{size:,} tokens" + f" in {count} places" * (count > 1) for size, count in counts.items()]
        kinds = sorted({type(group.attention).__name__ for group in config.groups})
        memory = f", a memory of {' and of '.join(memories)}" if memories else ""
        return f"{', '.join(kinds)}, segments of {length} tokens{memory}"

    @property
    def session_bytes(self) -> int:
        """Of what is carried from segment to segment, and so of a session."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self._decoder.abstract_context(1)))

    @functools.cached_property
    def identity(self) -> session_file.Identity:
        """What a session belongs to."""
        experiment = self.run.experiment
        return {
            "vocabulary": self.vocabulary.digest[:16],
            "segment length": experiment.batch.segment_length,
            "model": hashlib.sha256(repr(experiment.model).encode()).hexdigest()[:16],
            "step": self.run.step,
            "weights": self.run.weights[:16],
        }

    @functools.cached_property
    def allowed(self) -> np.ndarray:
        """Which tokens may be written, bool [V]: not those that stand for nothing."""
        allowed = np.arange(self.run.experiment.model.vocab_size) < self.vocabulary.size
        allowed[list(self.vocabulary.unused_ids)] = False
        return allowed


class Session:
    """A text that is being read, and may be written on."""

    def __init__(self, model: TextModel, decoder: TextDecoder) -> None:
        self._model, self._decoder = model, decoder

    @property
    def num_tokens(self) -> int:
        """Tokens read so far."""
        return self._decoder.num_tokens

    def read(self, text: str, on_progress: Callable[[int], None] = lambda _: None) -> Score:
        """Reads on, whole segments at a time; what is read stays in the memory as far as that reaches.

        Args:
          text: goes on directly where the text before ended.
          on_progress: told after every segment how many of the text's tokens have been read.

        Raises:
          UserError: the text is empty.
        """
        if not text:
            raise UserError("the text is empty: give at least one character")
        vocabulary = self._model.vocabulary
        tokens = vocabulary.encode(text)
        nats = self.read_tokens(tokens, on_progress).nats
        pieces = [piece.decode("utf-8", "replace") for piece in vocabulary.pieces(tokens)]
        return Score(tokens, nats, pieces, len(text.encode()))

    def read_tokens(self, tokens: np.ndarray, on_progress: Callable[[int], None] = lambda _: None) -> HostScores:
        """Reads on, as `read`, what is in tokens already.

        Args:
          tokens: int32 [length], of the model's vocabulary.
          on_progress: told after every segment how many of them have been read.

        Returns:
          How well each was predicted, [length].
        """
        scores = self._decoder.read(tokens[None], on_progress)
        return HostScores(*(of_rows[0] for of_rows in scores))

    def copy(self) -> Session:
        """Another session that has read the same, and goes on by itself."""
        return Session(self._model, self._decoder.fork(1))

    def write(self, num_tokens: int = 200, num_samples: int = 1, seed: int = 0, **sampling: Any) -> Iterator[list[str]]:
        """Writes on in several samples side by side; the session stays where it is.

        What is written is forgotten, unless it is read.

        Args:
          num_tokens: length of a sample; it ends earlier where the model ends the document.
          num_samples: how many samples; the first of several is drawn by the same random numbers as the only one.
          seed: of the random numbers, from 0 up to 2^32 - 1.
          sampling: the fields of `Sampling`: temperature, top_k, top_p.

        Yields:
          What each sample goes on with, only ever whole characters, and so often nothing.

        Raises:
          UserError: a setting is out of range.
        """
        # Not in the generator, so that a wrong setting is told at once.
        check_amounts(num_tokens, num_samples, seed)
        settings = Sampling(**sampling)
        steps = self._decoder.fork(num_samples).generate(num_tokens, settings, seed, self._model.allowed)
        return _texts(self._model.vocabulary, steps, num_samples)

    def generate(self, num_tokens: int = 200, num_samples: int = 1, seed: int = 0, **sampling: Any) -> list[str]:
        """The samples of `write`, each as a whole."""
        parts = self.write(num_tokens, num_samples, seed, **sampling)
        return ["".join(sample) for sample in zip(*parts, strict=True)]

    def save(self, path: str) -> None:
        """Writes the session to a file, for `TextModel.session`. Raises UserError if it cannot be written."""
        self._model.save(path, self._decoder.state)


def check_amounts(num_tokens: int, num_samples: int, seed: int) -> None:
    """Raises UserError where one of them is out of range."""
    for name, value in (("num_tokens", num_tokens), ("num_samples", num_samples)):
        if value < 1:
            raise UserError(f"{name} = {value}: at least 1")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed = {seed}: from 0 up to {2**32 - 1}")


# Compiled once a process, for all checkpoints of a model.
_decoder = functools.lru_cache(maxsize=8)(Decoder)


class TextStream:
    """Tokens to text as they come: no text is taken back, and a character waits until it is complete."""

    # So many tokens before a new one say what it adds to the text.
    _CONTEXT = 16

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary, self._recent = vocabulary, []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The text that this token completes."""
        self._recent = [*self._recent, token][-self._CONTEXT :]
        return self._decoder.decode(self._vocabulary.pieces(self._recent)[-1])

    def end(self) -> str:
        """What is left: U+FFFD for a character that is not complete."""
        return self._decoder.decode(b"", final=True)


def _texts(vocabulary: Vocabulary, steps: Iterator[np.ndarray], num_samples: int) -> Iterator[list[str]]:
    """The text of every sample, step by step, until all of them have ended."""
    streams: list[TextStream | None] = [TextStream(vocabulary) for _ in range(num_samples)]
    for tokens in steps:
        texts = [""] * num_samples
        for sample, (stream, token) in enumerate(zip(streams, tokens.tolist(), strict=True)):
            if stream and token == vocabulary.end_id:
                texts[sample], streams[sample] = stream.end(), None
            elif stream:
                texts[sample] = stream.add(token)
        yield texts
        if not any(streams):
            return
    yield [stream.end() if stream else "" for stream in streams]
