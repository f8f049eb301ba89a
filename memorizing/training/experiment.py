"""A training run as data: the frozen dataclasses that gin builds and `train` executes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import optax
from jax.sharding import Mesh

from memorizing.array_typing import Tree
from memorizing.batch import DataSource
from memorizing.errors import Count, CountOrNone, Range, Seed, UserError
from memorizing.models.lm_config import LMConfig
from memorizing.runtime import sharding
from memorizing.runtime.sharding import MeshConfig
from memorizing.training.optimizer import AdamW, Optimizer, hold_frozen

# More documents side by side than any machine reads, and more bytes than all machines of a pod have.
MAX_ROWS = 1 << 20
MAX_CONTEXT_BYTES = 1 << 53


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """The shape of a step.

    Attributes:
      tokens_per_step: targets a step, padding included; the paper's runs have 2^17.
      segment_length: T, tokens of one segment.
      num_segments: U, consecutive segments of each row in one step; gradients reach through all of them.
      num_microbatches: parts into which the rows are split, one after the other, to save memory.
      curriculum: pairs of a step and the num_segments from that step on; the rows stay as they are, the tokens of a
        step grow.
    """

    tokens_per_step: Count = 2048
    segment_length: Annotated[int, Range(1, 2**24)] = 128
    num_segments: Annotated[int, Range(1, 2**16)] = 1
    num_microbatches: Count = 1
    curriculum: tuple[tuple[Count, Annotated[int, Range(1, 2**16)]], ...] = ()

    def __post_init__(self) -> None:
        for name in ("tokens_per_step", "segment_length", "num_segments", "num_microbatches"):
            if getattr(self, name) < 1:
                raise UserError(f"BatchConfig.{name} = {getattr(self, name)}: at least 1")
        starts = [start for start, _ in self.curriculum]
        is_growing = starts == sorted(set(starts))
        if not is_growing or any(min(stage) < 1 for stage in self.curriculum):
            raise UserError(
                f"BatchConfig.curriculum = {self.curriculum}: pairs of a step, growing, and a number of segments, "
                "at least 1"
            )
        tokens_per_row = self.segment_length * self.num_segments
        if self.tokens_per_step % tokens_per_row:
            raise UserError(
                f"BatchConfig.tokens_per_step = {self.tokens_per_step} is not a multiple of the {tokens_per_row} tokens "
                f"of a row (segment_length {self.segment_length} x num_segments {self.num_segments})"
            )
        if self.num_rows > MAX_ROWS:
            raise UserError(
                f"BatchConfig.tokens_per_step = {self.tokens_per_step} makes {self.num_rows:,} rows of {tokens_per_row} "
                f"tokens: at most {MAX_ROWS:,} rows"
            )
        if self.num_rows % self.num_microbatches:
            raise UserError(
                f"BatchConfig.num_microbatches = {self.num_microbatches} does not divide the {self.num_rows} rows"
            )

    @property
    def num_rows(self) -> int:
        """B: documents read side by side."""
        return self.tokens_per_step // (self.segment_length * self.num_segments)

    def segments_at(self, step: int) -> int:
        """U at a step, counted from 1."""
        num_segments = self.num_segments
        for start, segments in self.curriculum:
            if start <= step:
                num_segments = segments
        return num_segments

    def tokens_at(self, step: int) -> int:
        """Targets of a step, counted from 1."""
        return self.num_rows * self.segments_at(step) * self.segment_length


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """What the loop does when. Steps count updates; 0 means never for the `..._every` settings.

    Attributes:
      num_steps: length of the run.
      log_every, evaluate_every, checkpoint_every: steps between them; evaluation and checkpoint also come at the end.
      keep_checkpoints: how many of the newest stay.
      save_context: whether checkpoints hold the context with its memories.
      seed: of initialisation, dropout and the order of documents.
      profile_steps: first and last step of a profiler trace, written to `workdir/profile`; empty for none.
      start_from: workdir of another run whose newest checkpoint this run starts from; empty for none.
      evaluate_segments: how many segments back the answers of held-out samples lie, for a final table of accuracies;
        for data made of samples.
      start_optimizer: whether `start_from` also takes over the optimizer state and the step.
      hang_seconds: a run that finishes no step for so long (compiling, restoring and saving included) is ended, to be
        started again; 0 for never.
      compilation_cache: folder that keeps compiled programs for the next start; empty for JAX's own setting.
      wandb_project: of Weights & Biases, to which metrics are then sent as well; empty for none.
    """

    num_steps: Count = 1000
    log_every: Count = 50
    evaluate_every: CountOrNone = 0
    checkpoint_every: CountOrNone = 500
    keep_checkpoints: Count = 3
    save_context: bool = True
    seed: Seed = 0
    profile_steps: tuple[Count, ...] = ()
    start_from: str = ""
    start_optimizer: bool = True
    evaluate_segments: tuple[Count, ...] = ()
    hang_seconds: Annotated[float, Range(0, 1e9)] = 1800.0
    compilation_cache: str = ""
    wandb_project: str = ""

    def __post_init__(self) -> None:
        if self.log_every < 1 or self.num_steps < 1 or self.keep_checkpoints < 1:
            raise UserError("LoopConfig.num_steps, log_every and keep_checkpoints have to be at least 1")
        if self.hang_seconds < 0:
            raise UserError(f"LoopConfig.hang_seconds = {self.hang_seconds}: seconds, or 0 for never")
        if 0 < self.hang_seconds < 1:
            # Ended before its first step, it would be started again for ever.
            raise UserError(f"LoopConfig.hang_seconds = {self.hang_seconds}: at least a second, or 0 for never")
        if len(self.profile_steps) not in (0, 2) or list(self.profile_steps) != sorted(self.profile_steps):
            raise UserError(
                f"LoopConfig.profile_steps = {self.profile_steps}: a first step and a last one that is no earlier, or ()"
            )


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A training run, whole.

    Attributes:
      model, data, batch, optimizer, mesh, loop: its parts.
      without_memory: trains the model without its external memories, all else being equal: what they are held against.
    """

    data: DataSource
    model: LMConfig = LMConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: Optimizer = AdamW()
    mesh: MeshConfig = MeshConfig()
    loop: LoopConfig = LoopConfig()
    without_memory: bool = False

    def __post_init__(self) -> None:
        if self.without_memory:
            object.__setattr__(self, "model", self.model.without_memory())
        self.model.check(self.batch.segment_length)
        num_bytes = self.model.state_bytes(self.batch.segment_length) * self.batch.num_rows
        if num_bytes > MAX_CONTEXT_BYTES:
            raise UserError(
                f"the context of {self.batch.num_rows:,} rows takes {num_bytes:.1e} bytes, more than any machine has: "
                "choose a smaller memory or window, fewer layers with one, or fewer rows"
            )

    def make_mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh over `devices` (default: all).

        Raises:
          UserError: experiment and devices do not fit each other.
        """
        mesh = self.mesh.make_mesh(devices)
        rows = self.batch.num_rows // self.batch.num_microbatches
        sharding.check_divides("rows of a microbatch", rows, mesh, "data")
        sharding.check_divides("LMConfig.num_heads", self.model.num_heads, mesh, "model")
        if self.model.has_memory:
            # Those of a memory are not replicated.
            sharding.check_divides("LMConfig.num_kv_heads", self.model.dims.kv_heads, mesh, "model")
            sharding.check_divides("key heads that have a memory", self.model.memory_heads, mesh, "model")
        memories = {group.attention for group in self.model.groups} | {self.model.continuous_cache}
        for memory in memories:
            if memory and memory.memory_size:
                name = f"{type(memory).__name__}.memory_size in segments"
                num_segments = memory.memory_size // self.batch.segment_length
                sharding.check_divides(name, num_segments, mesh, "memory")
        return mesh

    def make_optimizer(self) -> optax.GradientTransformation:
        """The optimizer of the model's parameters."""
        return self.optimizer.build(self.model.stack.stacked_layers)

    def hold_frozen(self, params: Tree) -> Tree:
        """The same parameters, of which those that are frozen get no gradient."""
        return hold_frozen(params, self.optimizer.groups, self.model.stack.stacked_layers)

    def check_data(self) -> None:
        """Raises UserError where experiment and data do not fit each other."""
        if self.loop.evaluate_segments and not hasattr(self.data, "reaching"):
            raise UserError(
                "LoopConfig.evaluate_segments is for data made of samples, which this data is not: set it to ()"
            )
        if self.data.vocab_size > self.model.vocab_size:
            raise UserError(
                f"LMConfig.vocab_size = {self.model.vocab_size}, but the data has {self.data.vocab_size} token ids"
            )
