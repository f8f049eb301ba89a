"""Perplexity of those tokens only that a long context helps to predict: Self-LongPPL.

After Fang et al. 2025, "What is wrong with perplexity for long-context language modeling?". There a large model chooses
the key tokens, by its losses with a short and with a long context. Here the chooser is a run itself, with its memory
empty and with its memory: a token is a key token if the memory takes more than 2 nats from its loss, and leaves less
than 2. Figures of two models compare only over the same key tokens: the file that one run wrote is read for the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from memorizing.errors import UserError, first_line
from memorizing.evaluation import bootstrap
from memorizing.evaluation.evaluator import ReadSegment
from memorizing.runtime.metrics import perplexity

# Nats that the context has to take from a token's loss, and those that may be left.
LEAST_GAIN = 2.0
MOST_LOSS = 2.0

# By document, the loss of every token in nats, float32 [tokens].
Losses = dict[int, np.ndarray]


class KeyTokens(NamedTuple):
    """Which tokens of held-out documents are looked at.

    Attributes:
      data: identity of the data.
      chosen_by: what has chosen them, JSON-able.
      positions: by document, ascending.
    """

    data: str
    chosen_by: dict[str, Any]
    positions: dict[int, list[int]]

    @property
    def number(self) -> int:
        """How many there are."""
        return sum(map(len, self.positions.values()))

    def to_json(self) -> str:
        """A file's text."""
        positions = {str(document): places for document, places in self.positions.items()}
        return json.dumps({"data": self.data, "chosen_by": self.chosen_by, "positions": positions}) + "\n"


def read_key_tokens(path: str, data: str) -> KeyTokens:
    """Reads what `KeyTokens.to_json` wrote.

    Args:
      path: of the file.
      data: identity of the data that they are asked for.

    Raises:
      UserError: there is no such file, it is damaged, or of other data.
    """
    try:
        found = json.loads(epath.Path(path).read_text())
        positions = {int(document): [int(place) for place in places] for document, places in found["positions"].items()}
        key_tokens = KeyTokens(str(found["data"]), dict(found["chosen_by"]), positions)
    except OSError as error:
        raise UserError(f"--key_tokens={path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--key_tokens={path}: no file of key tokens ({first_line(error)})") from None
    if key_tokens.data != data:
        raise UserError(f"--key_tokens={path} is of the data {key_tokens.data}, this run has {data}")
    return key_tokens


def losses_of(segments: Iterable[ReadSegment]) -> Losses:
    """The loss of every token of the documents that count, 0 for those that do not."""
    parts: dict[int, list[tuple[int, np.ndarray]]] = {}
    for segment in segments:
        nats = np.asarray(segment.scores[0])
        weights = np.asarray(segment.batch.loss_weights[:, 0])
        for row in np.flatnonzero(segment.document >= 0):
            own = np.where(weights[row] > 0, nats[row], 0.0)
            parts.setdefault(int(segment.document[row]), []).append((int(segment.offset[row]), own))
    return {
        document: np.concatenate([own for _, own in sorted(pieces, key=lambda piece: piece[0])])
        for document, pieces in parts.items()
    }


def choose(without: Losses, having: Losses, data: str, chosen_by: dict[str, Any]) -> KeyTokens:
    """The tokens that a memory helps to predict.

    Args:
      without: losses with an empty memory.
      having: losses with the memory.
      data: identity of the documents.
      chosen_by: what the losses are of.
    """
    positions = {}
    for document in sorted(having):
        gain = without[document] - having[document]
        is_key = (gain > LEAST_GAIN) & (having[document] < MOST_LOSS)
        positions[document] = np.flatnonzero(is_key).tolist()
    return KeyTokens(data, chosen_by, positions)


def figures(losses: Losses, key_tokens: KeyTokens, seed: int) -> dict[str, Any]:
    """LongPPL of the key tokens with an interval over documents; None where there are no key tokens.

    Args:
      losses: in one setting.
      key_tokens: of the same documents.
      seed: of the bootstrap.
    """
    nats = np.array([losses[document][places].sum() for document, places in key_tokens.positions.items()])
    counts = np.array([len(places) for places in key_tokens.positions.values()])
    total = sum(map(len, losses.values()))
    found: dict[str, Any] = {"key_tokens": int(counts.sum()), "share": int(counts.sum()) / max(total, 1)}
    if not counts.sum():
        return found | {"long_ppl": None, "interval": None}
    interval = bootstrap.ratio_interval(nats, counts, seed)
    ends = None if np.isnan(interval).any() else [math.exp(end) for end in interval]
    return found | {"long_ppl": perplexity(float(nats.sum() / counts.sum())), "interval": ends}


def table(by_setting: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Rows of a table: a setting each."""
    rows = [["", "LongPPL", "95%"]]
    for name, found in by_setting.items():
        if found["long_ppl"] is None:
            rows.append([name, "-", ""])
            continue
        interval = found["interval"]
        ends = f"[{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
        rows.append([name, f"{found['long_ppl']:.3f}", ends])
    return rows
