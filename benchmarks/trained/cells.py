"""The cells of the leaderboard: mechanisms, what each is trained on, and how large it may be."""

from __future__ import annotations

from typing import NamedTuple

from memorizing.config.loading import load_experiment
from memorizing.errors import UserError

RUN = "mechanisms"


class Entry(NamedTuple):
    """A mechanism, or several together.

    Attributes:
      name: as the table shows it.
      bindings: over the run; {size} is what a budget of bytes decides, in tokens.
      files: of gin, over the run.
    """

    name: str
    bindings: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def is_sized(self) -> bool:
        return any("{size}" in binding for binding in self.bindings)


class Task(NamedTuple):
    """What cells are trained on.

    Attributes:
      title: as the table shows it.
      segment_length: tokens of a segment.
      vocab_size: of the task.
      files: of gin, over the run.
      bindings: over the run; {source} is where text comes from.
    """

    title: str
    segment_length: int
    vocab_size: int
    files: tuple[str, ...] = ()
    bindings: tuple[str, ...] = ()


_WINDOW = ("LOCAL=@XLAttention()", "XLAttention.window={size}")
_MEMORY = ("LMConfig.attention_at=((1, @KNNAttention()),)", "KNNAttention.memory_size={size}")
_TAUGHT = ("models/with_recall.gin",)
_CACHE = ("ContinuousCache.memory_size={size}", "ContinuousCache.mixing='learned'")
_WITH_CACHE = ("models/with_continuous_cache.gin",)
_TOKENS = ("LMConfig.recurrent_tokens=@RecurrentTokens()", "RecurrentTokens.num_tokens=10")

NOTHING = "nothing is carried"
ENTRIES = (
    Entry(NOTHING),
    Entry("window", _WINDOW),
    Entry("window and first positions", (*_WINDOW, "XLAttention.same_length=True", "XLAttention.num_sinks=8")),
    Entry(
        "adaptive span",
        (
            "LMConfig.attention=@AdaptiveSpanAttention()",
            "AdaptiveSpanAttention.window={size}",
            "AdaptiveSpanAttention.span_loss=1e-4",
        ),
    ),
    Entry("Transformer-XL", ("LMConfig.attention=@TransformerXLAttention()", "TransformerXLAttention.window={size}")),
    Entry(
        "Compressive Transformer",
        (
            "LMConfig.attention=@CompressiveAttention()",
            "CompressiveAttention.window={size}",
            "CompressiveAttention.compressed_size={size}",
            "CompressiveAttention.rate=4",
        ),
    ),
    Entry("memory tokens (RMT)", _TOKENS),
    Entry("memory tokens and window", (*_TOKENS, *_WINDOW)),
    Entry("kNN memory as in the paper", _MEMORY),
    Entry("kNN memory, taught", _MEMORY, _TAUGHT),
    Entry("continuous cache", _CACHE, _WITH_CACHE),
    Entry("kNN memory, taught, and continuous cache", (*_MEMORY, *_CACHE), (*_TAUGHT, *_WITH_CACHE)),
    Entry(
        "kNN memory, taught, over a window of a segment",
        (*_MEMORY, "LOCAL=@XLAttention()", "XLAttention.window={segment}"),
        _TAUGHT,
    ),
    Entry("Sparse Transformer", (), ("models/sparse_tiny.gin",)),
    Entry("Reformer, strictly causal", (), ("models/reformer_tiny.gin",)),
    Entry("Routing Transformer, strictly causal", (), ("models/routing_tiny.gin",)),
    Entry("Sparse Sinkhorn Attention", (), ("models/sinkhorn_tiny.gin",)),
)
# Of the model, whatever size the file of a mechanism gives it.
_SIZE = ("LMConfig.num_layers=2", "VOCAB_SIZE={vocabulary}")

TASKS = {
    "recall": Task("segmented MQAR", 48, 512),
    "text": Task(
        "text",
        64,
        2048,
        ("tasks/stdlib.gin",),
        ("BatchConfig.segment_length=64", "BatchConfig.tokens_per_step=2048", "SOURCE={source}"),
    ),
}
# Of SegmentedMQAR in the run's file.
PAIRS = 16


class Cell(NamedTuple):
    """One training.

    Attributes:
      entry: the mechanism.
      task: a name of TASKS.
      budget: bytes of context that a row may carry.
      rate: the greatest learning rate.
      seed: of the run.
      steps: of training.
    """

    entry: Entry
    task: str
    budget: int
    rate: float
    seed: int
    steps: int

    @property
    def folder_name(self) -> str:
        entry = "".join(letter if letter.isalnum() else "_" for letter in self.entry.name)
        budget = self.budget if self.entry.is_sized else 0
        return f"{self.task}-{entry}-{budget}-{self.rate:g}-{self.steps}-seed{self.seed}"


def settings(cell: Cell, size: int, source: str) -> tuple[list[str], list[str]]:
    """Files and bindings of a cell's run.

    Args:
      size: of the mechanism, in tokens.
      source: of the text.
    """
    task = TASKS[cell.task]
    names = {"size": size, "segment": task.segment_length, "vocabulary": task.vocab_size, "source": source}
    own = [binding.format(**names) for binding in (*task.bindings, *_SIZE, *cell.entry.bindings)]
    common = [f"STEPS={cell.steps}", f"RATE={cell.rate}", f"SEED={cell.seed}"]
    return [RUN, *cell.entry.files, *task.files], [*own, *common]


def size_within(cell: Cell, source: str) -> int:
    """The largest size, in whole segments, whose context of a row is within the budget; 0 for what has no size.

    Raises:
      UserError: the budget is too small for one segment.
    """
    if not cell.entry.is_sized:
        return 0

    unit = TASKS[cell.task].segment_length

    def context_bytes(size: int) -> int:
        experiment, _ = load_experiment(*settings(cell, size, source))
        return experiment.model.state_bytes(unit)

    one, two = context_bytes(unit), context_bytes(2 * unit)
    if one > cell.budget:
        raise UserError(f"--budgets={cell.budget}: a segment of {cell.entry.name} alone takes {one:,} bytes a row")
    return unit * (1 + (cell.budget - one) // (two - one))
