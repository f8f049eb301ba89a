"""`memorizing inspect`: two memories agree as long as they hold the same.

The neighbours on the page are those that the model attended to; and mistakes are told.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import pathlib
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mechanisms import LENGTH, MECHANISMS, VOCAB, XL, Mechanism, apply_model
from tiny_texts import TinyTexts, expect_error, finished_run

from memorizing import main
from memorizing.config.runs import open_run
from memorizing.evaluation import plots
from memorizing.evaluation.inspection import page as page_module
from memorizing.evaluation.inspection.document import DocumentTokens
from memorizing.evaluation.inspection.lookups import (
    Inspection,
    Lookups,
    inspect,
    read_with_memory,
    recall_of,
)
from memorizing.evaluation.inspection.page import kept_positions, make_page
from memorizing.models.attention.knn import KNNAttention, KNNCore
from memorizing.models.attention.local import LocalCore
from memorizing.models.attention.sparse.factorized import SparseCore
from memorizing.models.memory import external_memory, retrieval
from memorizing.models.memory.continuous_cache import ContinuousCache
from memorizing.models.memory.external_memory import positions_back
from memorizing.models.memory.search import ExactSearch
from memorizing.runtime.sharding import MeshConfig

# What is inspected are the look-ups of a layer.
WITH_MEMORY = [mechanism for mechanism in MECHANISMS if "layer_01" in mechanism.config.memory_sizes]
# The others, in one softmax, are looked into in test_joint_memory.py.
GATED = [mechanism for mechanism in WITH_MEMORY if isinstance(mechanism.config.stack.mechanisms[1], KNNAttention)]
SMALL, LARGE = 2 * LENGTH, 5 * LENGTH
LOCAL_CORES = (LocalCore, SparseCore)


@pytest.fixture(params=WITH_MEMORY, ids=lambda mechanism: mechanism.name)
def remembering(request: pytest.FixtureRequest) -> Mechanism:
    return request.param


def document(num_tokens: int = 9 * LENGTH - 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, VOCAB, num_tokens, np.int32)


def run(
    mechanism: Mechanism, memory_size: int, segments: np.ndarray, starts: list[bool]
) -> tuple[np.ndarray, Any, Any]:
    """Logits [U, B, T, V], what was passed to and came out of the attention cores, and what was handed out, by segment.

    Segments are [U, B, T].
    """
    config, params = mechanism.config.with_memory_size(memory_size), mechanism.model.params

    @jax.jit
    def step(context: dict, tokens: jax.Array, start: jax.Array) -> tuple:
        seen = {}

        def look_on(next_method: Any, args: tuple, kwargs: dict, call: Any) -> Any:
            output = next_method(*args, **kwargs)
            if call.method_name == "__call__" and isinstance(call.module, (KNNCore, *LOCAL_CORES)):
                queries, keys, values, scale, *_ = args
                seen[type(call.module).__name__] = {
                    "q": queries,
                    "k": keys,
                    "v": values,
                    "scale": scale,
                    "y": output[0],
                }
            return output

        with nn.intercept_methods(look_on):
            output = apply_model(config, params, tokens, jnp.ones_like(tokens, bool), start, context)
        handed = output.report.retrieved["layer_01"].neighbours
        return output.logits, seen, handed, output.context

    context = config.init_context(segments.shape[1], LENGTH)
    collected = []
    for tokens, start in zip(segments, starts, strict=True):
        *results, context = step(context, tokens, np.full(segments.shape[1], start))
        collected.append(jax.device_get(results))
    logits, seen, handed = zip(*collected, strict=True)
    return np.stack(logits), seen, handed


# Two documents of a row, one after the other: when the second begins, the ring is turned.
FIRST, SECOND = 3, 9
STARTS = [index in (0, FIRST) for index in range(FIRST + SECOND)]


@functools.cache
def two_documents(mechanism: Mechanism, memory_size: int) -> tuple[np.ndarray, Any, Any]:
    return run(mechanism, memory_size, document((FIRST + SECOND) * LENGTH).reshape(-1, 1, LENGTH), STARTS)


def test_logits_are_equal_as_long_as_the_smaller_memory_holds_everything(remembering: Mechanism):
    """The exact form of the paper's figure 7, up to the rounding of the search's products, which may depend on M.

    The segment after the first M tokens still finds all of them.
    """
    small, large = (two_documents(remembering, size)[0] for size in (SMALL, LARGE))
    covered = FIRST + SMALL // LENGTH + 1
    np.testing.assert_allclose(small[:covered], large[:covered], rtol=0, atol=1e-5)
    assert (np.abs(small - large)[covered:].max(axis=(1, 2, 3)) > 1e-3).all()


@pytest.mark.parametrize("gated", GATED, ids=lambda mechanism: mechanism.name)
def test_neighbours_are_the_nearest_of_what_was_stored_and_what_was_attended_to(gated: Mechanism):
    """In the second document distances lead to its own nearest keys.

    And their values, by scale and scores, to the layer's output.
    """
    _, seen, handed = two_documents(gated, SMALL)
    ((_, attention),) = gated.config.attention_at
    layout = gated.config.recurrent_tokens
    own = slice(layout.num_tokens, layout.num_tokens + LENGTH) if layout else slice(None)
    mine = range(FIRST, FIRST + SECOND)
    keys, values, queries = (np.concatenate([seen[i]["KNNCore"][name][0, own] for i in mine]) for name in "kvq")
    gate = nn.sigmoid(gated.model.params["layer_01"]["attention"]["core"]["gate"])[:, None]
    local = type(attention.local.core(gated.config.dims)).__name__
    for index in mine[1:]:
        slots, scores = handed[index].slots[0], handed[index].scores[0]
        # Clock `index`: as many segments, of both documents, came before.
        back = positions_back(slots, index, SMALL, LENGTH)
        start = (index - FIRST) * LENGTH
        stored = np.arange(max(start - SMALL, attention.stores_next), start)
        for t in range(LENGTH):
            for head in range(2):
                every = queries[start + t, head] @ keys[stored - attention.stores_next, head].T
                count = min(4, len(every))
                found = scores[t, head] > -np.inf
                assert found.sum() == count
                np.testing.assert_allclose(scores[t, head, found], np.sort(every)[::-1][:count], atol=1e-6)
                at = start - back[t, head, found]
                key_at = at - attention.stores_next
                assert (key_at >= 0).all(), "nothing of the document before"
                products = keys[key_at, head] @ queries[start + t, head]
                np.testing.assert_allclose(products, scores[t, head, found], atol=1e-6)
                weights = np.exp(seen[index]["KNNCore"]["scale"][head] * scores[t, head, found])
                read = weights / weights.sum() @ values[at, head]
                y = seen[index]["KNNCore"]["y"][0, own][t, head]
                # The last of these local cores that was called is that of the layer with the memory.
                y_local = seen[index][local]["y"][0, own][t, head]
                np.testing.assert_allclose(y, gate[head] * read + (1 - gate[head]) * y_local, atol=1e-5)


def test_a_capped_model_tells_its_cap():
    capped = next(each for each in WITH_MEMORY if each.config.attention_logit_cap)
    context = capped.config.init_context(1, LENGTH)
    inputs = (np.ones((1, LENGTH), np.int32), np.ones((1, LENGTH), bool), np.ones(1, bool), context)
    output = jax.eval_shape(lambda: apply_model(capped.config, capped.model.params, *inputs))
    assert output.report.retrieved["layer_01"].logit_cap == capped.config.attention_logit_cap


def test_slots_are_dated_rightly():
    """Whatever the clock, the age of every slot is that of what was last written there."""
    length, num_slots = 3, 12
    memory = external_memory.empty(1, 1, num_slots, 1, jnp.float32)
    for clock in range(11):
        position = clock * length
        valid = np.flatnonzero(memory.valid[0])
        stored = np.asarray(memory.keys[0, 0, valid, 0])
        np.testing.assert_array_equal(position - positions_back(valid, clock, num_slots, length), stored)
        assert len(valid) == min(position, num_slots)
        new = jnp.arange(position, position + length, dtype=jnp.float32)[None, :, None, None]
        segment = external_memory.of_segment(new, new, jnp.zeros((1, length), jnp.int32), jnp.ones((1, length), bool))
        memory = external_memory.write(memory, segment, jnp.asarray(clock))


def test_a_sharded_memory_hands_out_the_same_neighbours():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    tokens = jnp.zeros((4, 24), jnp.int32)
    valid = jnp.asarray(rng.random((4, 24)) < 0.6)
    memory = external_memory.Memory(draw(4, 2, 24, 8), draw(4, 2, 24, 8), tokens, valid)
    inputs = draw(4, 6, 2, 8), jnp.ones(2), memory

    def found(neighbours: retrieval.Neighbours) -> list:
        order = np.argsort(-neighbours.scores, axis=-1, kind="stable")[..., :5]
        scores, slots = (np.take_along_axis(np.asarray(x), order, -1) for x in (neighbours.scores, neighbours.slots))
        return [scores, np.where(scores > -np.inf, slots, -1)]

    whole = found(retrieval.read(*inputs, 5, ExactSearch()).neighbours)
    with jax.set_mesh(MeshConfig(model=2, memory=2).make_mesh()):
        parts = found(jax.jit(lambda *args: retrieval.read(*args, 5, ExactSearch()).neighbours)(*inputs))
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-6)
    np.testing.assert_array_equal(parts[1], whole[1])


@pytest.mark.parametrize("mixing", ["fixed", "gated"])
def test_what_a_cache_copied_explains_its_predictions(mixing: str):
    """From distances, scores and scale of the look-ups: the loss with the cache, out of the loss without."""
    cache = ContinuousCache(LARGE, num_neighbors=4, theta=4.0, weight=0.5, mixing=mixing)
    with_cache = Mechanism("", continuous_cache=cache)
    # Few different tokens, so that some are found again.
    document = DocumentTokens(np.random.default_rng(0).integers(1, 6, 9 * LENGTH - 3, np.int32), 0)
    read = functools.partial(read_with_memory, buffers={}, document=document, segment_length=LENGTH)
    mixed = read(with_cache.config, with_cache.model.params, keeps_lookups=True)
    alone = read(Mechanism("").config, with_cache.model.params)
    (found,) = mixed.lookups
    weights, tokens = found.weights()[:, 0], document.tokens
    led_to = tokens[np.arange(len(tokens))[:, None] - found.distances[:, 0]]
    cached = np.sum(weights * (led_to == tokens[:, None]), axis=1)
    if mixing == "fixed":
        share = np.where(found.distances[:, 0, 0] > 0, found.gate[0], 0.0)
        np.testing.assert_allclose(mixed.nats, -np.log((1 - share) * np.exp(-alone.nats) + share * cached), atol=1e-5)
    # Whatever the weight, the loss lies between those of model and cache.
    low, high = np.sort(np.stack([np.exp(-alone.nats), np.where(found.distances[:, 0, 0] > 0, cached, 0)]), axis=0)
    assert (np.exp(-mixed.nats) <= high + 1e-5).all() and (np.exp(-mixed.nats) >= low - 1e-5).all()
    assert (cached > 0).mean() > 0.3 and 0 < found.gate[0] < 1


def test_the_recall_of_look_ups_is_counted():
    """Against plain counting over every 8th position."""
    tokens = np.random.default_rng(0).integers(0, 5, 70, np.int32)
    of_layer = lookups(len(tokens))
    recall = recall_of(of_layer, tokens, memory_size=24, segment_length=8)
    positions = range(8, 70, 8)
    weights = of_layer.weights()
    for head in range(2):
        hits, on_hits = [], []
        for position in positions:
            distances = of_layer.distances[position, head]
            is_hit = [distance > 0 and tokens[position - distance] == tokens[position] for distance in distances]
            hits += [hit for hit, distance in zip(is_hit, distances, strict=True) if distance > 0]
            on_hits.append(weights[position, head][is_hit].sum())
        np.testing.assert_allclose(recall.hit_share[head], np.mean(hits))
        np.testing.assert_allclose(recall.hit_weight[head], np.mean(on_hits), rtol=1e-6)
    candidates = [tokens[q] == tokens[p] for p in positions for q in range(max(p // 8 * 8 - 24, 0), p // 8 * 8)]
    np.testing.assert_allclose(recall.hit_chance, np.mean(candidates))


# The page.


def data_of(page: str) -> dict[str, Any]:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL).group(1))


def unpacked(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


def neighbours_on(page: str, layer: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Kept positions, distances, scores (NaN where none) and weights, as the page's script reads them."""
    data = data_of(page)
    stored, kept = data["layers"][layer], unpacked(data["kept"], "<u4").astype(np.int64)
    shape = (len(kept), len(stored["gate"]), stored["numNeighbours"])
    distances = unpacked(stored["distances"], f"<u{stored['distanceBytes']}").reshape(shape).astype(np.int64)
    raw = unpacked(stored["scores"], "<i2").reshape(shape)
    scores = np.where(raw == data["noNeighbour"], np.nan, raw * stored["scoreUnit"])
    logits = np.array(stored["scale"])[:, None] * scores
    if stored["logitCap"]:
        logits = stored["logitCap"] * np.tanh(logits / stored["logitCap"])
    weights = np.nan_to_num(np.exp(logits))
    return kept, distances, scores, weights / weights.sum(axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def inspected() -> tuple[Mechanism, np.ndarray, Inspection, str]:
    mechanism = Mechanism("", XL, ((1, KNNAttention(SMALL, 4, XL)),))
    tokens = document()
    inspection = inspect(
        mechanism.config, mechanism.model.params, {}, DocumentTokens(tokens, 0), (SMALL, LARGE), LENGTH
    )
    pieces = [f"{token}\n".encode() for token in tokens]
    return mechanism, tokens, inspection, make_page("title", inspection, pieces, {}, {})


def test_the_page_shows_what_the_model_used(inspected: tuple):
    """Recomputed from the page's data: positions, nearest keys of the document so far, and the losses."""
    mechanism, tokens, inspection, page = inspected
    padded = np.pad(np.concatenate([[0], tokens]), (0, -(len(tokens) + 1) % LENGTH))
    # Position i reads token i - 1; the first reads what stands before a document, here as any other token.
    segments = padded[: -(-len(tokens) // LENGTH) * LENGTH].reshape(-1, 1, LENGTH)
    kept, distances, scores, weights = neighbours_on(page)
    assert kept.tolist() == list(range(LENGTH, len(tokens)))
    _, seen, _ = run(mechanism, LARGE, segments, [index == 0 for index in range(len(segments))])
    stream = {name: np.concatenate([each["KNNCore"][name][0] for each in seen]) for name in "qk"}
    for position, found, score, weight in zip(kept, distances, scores, weights, strict=True):
        start = position // LENGTH * LENGTH
        for head in range(2):
            exists = ~np.isnan(score[head])
            at = position - found[head, exists]
            assert len(set(at)) == min(4, start) and (max(0, start - LARGE) <= at).all() and (at < start).all()
            query = stream["q"][position, head]
            every = np.sort(stream["k"][max(0, start - LARGE) : start, head] @ query)[::-1]
            np.testing.assert_allclose(score[head, exists], every[: exists.sum()], atol=1e-4)
            np.testing.assert_allclose(stream["k"][at, head] @ query, score[head, exists], atol=1e-4)
            logits = inspection.lookups[0].scale[head] * every[: exists.sum()]
            softmax = np.exp(logits - logits.max())
            np.testing.assert_allclose(weight[head, exists], softmax / softmax.sum(), atol=2e-3)
    nats = np.stack([unpacked(packed, "<f4") for packed in data_of(page)["nats"]])
    np.testing.assert_array_equal(nats, inspection.nats)
    gain = nats[0] - nats[1]
    assert data_of(page)["numEqual"] == inspection.num_equal == SMALL + LENGTH
    assert np.abs(gain[: SMALL + LENGTH]).max() < 1e-5 and np.abs(gain[SMALL + LENGTH :]).max() > 1e-3


def lookups(num_tokens: int, num_heads: int = 2, k: int = 4) -> Lookups:
    rng = np.random.default_rng(0)
    distances = np.minimum(rng.integers(1, 100_000, (num_tokens, num_heads, k)), np.arange(num_tokens)[:, None, None])
    scores = np.where(distances > 0, np.sort(rng.random(distances.shape))[..., ::-1], -np.inf)
    ones = np.ones(num_heads, np.float32)
    return Lookups("layer_01", ones / 2, 8 * ones, distances.astype(np.int32), scores.astype(np.float32))


def test_a_long_document_keeps_what_fits():
    """Of all tokens the losses; neighbours of those with the largest difference, and of others all over the text."""
    num_tokens, heads, k = 5000, 2, 4
    nats = np.random.default_rng(1).exponential(size=(2, num_tokens)).astype(np.float32)
    inspection = Inspection(np.ones(num_tokens, np.int32), (0, 4096), 8, nats, (lookups(num_tokens),))
    assert kept_positions(inspection, 10**9).tolist() == list(range(1, num_tokens))
    budget = 400 * heads * k * (2 + 2)
    kept = kept_positions(inspection, budget)
    assert 390 <= len(kept) <= 400 and (np.diff(kept) > 0).all()
    assert set(np.argsort(-np.abs(inspection.gain[1:]))[:200] + 1) <= set(kept)
    assert np.diff(kept).max() < 60
    page = make_page("", inspection, [b"word "] * num_tokens, {}, {})
    _, distances, scores, _ = neighbours_on(page)
    np.testing.assert_array_equal(distances, inspection.lookups[0].distances[1:])
    np.testing.assert_allclose(np.nan_to_num(scores), np.maximum(inspection.lookups[0].scores[1:], 0), atol=1e-4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("draw", [plots.distances, plots.mass_by_age])
def test_pictures_of_a_model_with_memories_in_all_layers_can_be_read(draw: Callable):
    """One line a head and a legend of 270 names would cover all there is to see: the rows of a map are layers."""
    nats = np.zeros((2, 500), np.float32)
    layers = tuple(dataclasses.replace(lookups(500, num_heads=9), layer=f"layer_{index:02d}") for index in range(30))
    heights = {}
    for shown in (layers[:1], layers):
        picture = draw(Inspection(np.ones(500, np.int32), (0, 4096), 8, nats, shown))
        assert picture.startswith(b"\x89PNG")
        heights[len(shown)] = int.from_bytes(picture[20:24], "big")
    assert heights[30] > heights[1], "a row for each layer"


@pytest.mark.parametrize("logit_cap", [0.0, 3.0])
def test_the_page_weighs_scores_of_any_size(logit_cap: float):
    """Keys of imported models have any length, and their logits may be capped."""
    small = lookups(200)
    large = dataclasses.replace(small, scores=300 * small.scores, scale=small.scale / 300, logit_cap=logit_cap)
    nats = np.zeros((2, 200), np.float32)
    page = make_page("", Inspection(np.ones(200, np.int32), (0, 64), 8, nats, (large,)), [b"word "] * 200, {}, {})
    kept, _, scores, weights = neighbours_on(page)
    has_any = large.distances[kept].max(axis=-1) > 0
    np.testing.assert_allclose(np.nan_to_num(scores), np.maximum(large.scores[kept], 0), atol=0.01)
    np.testing.assert_allclose(weights[has_any], large.weights(kept)[has_any], atol=1e-3)
    logits = np.array(8.0) * small.scores[kept]
    capped = logit_cap * np.tanh(logits / logit_cap) if logit_cap else logits
    expected = np.exp(capped) * (small.distances[kept] > 0)
    expected /= np.maximum(expected.sum(axis=-1, keepdims=True), 1e-30)
    np.testing.assert_allclose(large.weights(kept), expected, atol=1e-5)


def test_any_text_stands_on_the_page_as_it_is():
    """Text that would end a script, look like a place of the template, or lie in several tokens."""
    text = 'a</script><script>alert(1)</script>{{DATA}}{{\n"\\ naïve € \U0001f600 <!-- \u2028'
    pieces = [bytes([byte]) for byte in text.encode()]
    nats = np.zeros((2, len(pieces)), np.float32)
    inspection = Inspection(np.ones(len(pieces), np.int32), (0, 8), 8, nats, (lookups(len(pieces)),))
    page = make_page("<b>{{DATA}}", inspection, pieces, {"<i>": "{{x"}, {"a": (b"png", '">')})
    data = data_of(page)
    assert "".join(data["table"][index] for index in unpacked(data["tokens"], "<u4")) == text
    assert "&lt;b&gt;{{DATA}}" in page and "<i>" not in page and "<b>" not in page
    assert page.count("<script") == 2 == page.count("</script>")
    # Nothing is fetched, by the page's own word to the browser and by what it holds.
    assert "default-src 'none'" in page
    assert (
        not re.search(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", page) and "url(" not in page and "@import" not in page
    )


# The command.


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return pathlib.Path(finished_run(tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture(scope="module")
def page_path(workdir: pathlib.Path) -> pathlib.Path:
    assert main._run(["inspect", f"--workdir={workdir}"]) == 0
    return workdir / "inspection" / "long.py" / "index.html"


def test_a_document_of_the_corpus_and_a_file(
    workdir: pathlib.Path, page_path: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
):
    """Without a name it is the longest; a file with the same text gives the same page but for its name."""
    data = data_of(page_path.read_text())
    text = TinyTexts().texts["long.py"]
    assert "".join(data["table"][index] for index in unpacked(data["tokens"], "<u4")) == text
    for name in ("delta_by_position.png", "distances.png", "attention_by_age.png"):
        assert (page_path.parent / name).read_bytes().startswith(b"\x89PNG")
    (tmp_path / "copy.txt").write_text(text)
    arguments = ["inspect", f"--workdir={workdir}", f"--document={tmp_path / 'copy.txt'}", "--max_tokens=60"]
    assert main._run([*arguments, "--memory_sizes=8,16"]) == 0
    copy = data_of((workdir / "inspection" / "copy.txt" / "index.html").read_text())
    assert copy["memorySizes"] == [8, 16]
    run = open_run(str(workdir))
    tokens = TinyTexts().vocabulary.encode(text)[:60]
    expected = inspect(run.experiment.model, run.params, {}, DocumentTokens(tokens, 0), (8, 16), 8)
    np.testing.assert_array_equal([unpacked(nats, "<f4") for nats in copy["nats"]], expected.nats)


@pytest.mark.parametrize(
    ("content", "pattern"),
    [(b"\xff\xfe\x00text", r"no UTF-8 text \(byte 0\)"), (b"a\0b", "zero bytes"), (b"", "empty"), (b" \n", "empty")],
)
def test_a_file_that_cannot_be_read_as_text(
    workdir: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, content: bytes, pattern: str
):
    (tmp_path / "file").write_bytes(content)
    expect_error(capsys, [f"--workdir={workdir}", f"--document={tmp_path / 'file'}"], f"file.*{pattern}", "inspect")
    assert not (workdir / "inspection" / "file").exists()


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--document=shrot.py"], r"no such file.*short\.py"),
        (["--document=.py"], "no one held-out document"),
        (["--memory_sizes=16,8"], "smaller and a larger"),
        (["--memory_sizes=0,12"], r"12.*multiple"),
        (["--max_tokens=0"], "--max_tokens=0: expected from 1"),
        (["--gin.TinyTexts.is_shifted=True"], r"vocabulary.*bytes.*shifted"),
        (["--gin.LMConfig.mlp_dim=32"], r"mlp"),
    ],
)
def test_a_mistake_is_told_in_a_line(
    workdir: pathlib.Path, capsys: pytest.CaptureFixture, arguments: list[str], pattern: str
):
    expect_error(capsys, [f"--workdir={workdir}", *arguments], pattern, "inspect")


def test_a_model_without_a_memory_has_nothing_to_show(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
    plain = finished_run(tmp_path / "plain", model_file="models/transformer_tiny.gin")
    expect_error(capsys, [f"--workdir={plain}"], "no external memory", "inspect")


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome", "chromium-browser"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_page_and_obeys_the_keyboard(page_path: pathlib.Path, tmp_path: pathlib.Path):
    """End, and then one token back: its loss, its neighbours and their places are those of the page's data."""
    page = page_path.read_text()
    press = """<script>
const press = key => textPane.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
press("End"); press("ArrowLeft"); document.title = String(chosen);
</script></body>"""
    (tmp_path / "page.html").write_text(page.replace("</body>", press))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    ended = subprocess.run(
        [BROWSER, *flags, f"file://{tmp_path / 'page.html'}"], capture_output=True, text=True, timeout=120
    )
    shown = ended.stdout
    data = data_of(page)
    nats = [unpacked(packed, "<f4") for packed in data["nats"]]
    position = len(nats[0]) - 2
    assert f"<title>{position}</title>" in shown, ended.stderr[-2000:]
    assert 'class="chosen" aria-current="true"' in shown or 'aria-current="true"' in shown
    gain = nats[0][position] - nats[1][position]
    assert f"Δ {'+' if gain >= 0 else '−'}{abs(gain):.3f} nats" in shown
    kept, distances, scores, weights = neighbours_on(page)
    assert kept[-2] == position
    for head in range(2):
        score, weight, back = scores[-2, head, 0], weights[-2, head, 0], distances[-2, head, 0]
        row = f'<td>{score:.3f}</td><td>{weight:.3f}</td><td>{back}</td><td><button title="show in the text">{position - back}</button>'
        assert row in shown


@pytest.mark.skipif(shutil.which("node") is None, reason="no Node.js on this machine")
def test_a_list_of_buttons_is_one_stop_of_the_tab_key():
    """Sixty of them once stood between the beginning of the page and its text."""
    template = (pathlib.Path(page_module.__file__).parent / "inspection.html").read_text()
    function = re.search(r"^function oneStop.*?^}$", template, re.MULTILINE | re.DOTALL)[0]
    assert template.count("oneStop(") == 2
    script = (
        function
        + """
let focused = null;
const buttons = [0, 1, 2].map(i => ({addEventListener(_, f) { this.press = f; }, focus() { focused = i; }}));
oneStop(buttons);
const seen = [buttons.map(each => each.tabIndex)];
for (const key of ["ArrowDown", "End", "ArrowDown", "Home", "ArrowUp", "x"]) {
  buttons[focused ?? 0].press({key, preventDefault() {}});
  seen.push([focused, buttons.map(each => each.tabIndex)]);
}
console.log(JSON.stringify(seen));
"""
    )
    ended = subprocess.run(["node", "-e", script], capture_output=True, text=True, timeout=60)
    first, *moves = json.loads(ended.stdout)
    assert first == [0, -1, -1]
    assert [focused for focused, _ in moves] == [1, 2, 2, 0, 0, 0]
    for focused, stops in moves:
        assert [index for index, stop in enumerate(stops) if stop == 0] == [focused]


def test_heads_without_a_memory_count_nowhere():
    found = lookups(100)
    assert found.heads.tolist() == [0, 1]
    distances, scores = found.distances.copy(), found.scores.copy()
    distances[:, 0], scores[:, 0] = 0, -np.inf
    half = dataclasses.replace(found, distances=distances, scores=scores)
    assert half.heads.tolist() == [1]
    nothing = dataclasses.replace(found, distances=np.zeros_like(distances))
    assert nothing.heads.tolist() == [0, 1]
