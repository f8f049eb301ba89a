"""`memorizing inspect` of a model whose layers tell what they attended to: the page shows it, token by token."""

from __future__ import annotations

import base64
import json
import pathlib
import re

import numpy as np
import pytest
from tiny_texts import LENGTH, TinyTexts, expect_error, finished_run

from memorizing import main
from memorizing.evaluation.inspection.attention import NONE, AttentionReading, HeadsAttention
from memorizing.evaluation.inspection.attention_page import make_attention_page, num_kept


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL).group(1))


def unpacked(text: str, dtype: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)


def of_heads(layer: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distances and weights [tokens, N, k], and groups [tokens, N, g], as the page's script reads them."""
    heads, shown, groups = len(layer["heads"]), layer["numShown"], len(layer["groupNames"])
    return (
        unpacked(layer["distances"], "<u2", -1, heads, shown).astype(int),
        unpacked(layer["weights"], "u1", -1, heads, shown) / 255,
        unpacked(layer["groups"], "<i4", -1, heads, groups),
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return finished_run(folder, "ReformerAttention.chunk_size=4", model_file="models/reformer_tiny.gin")


def test_the_page_shows_what_each_token_attended_to(workdir: str, capsys: pytest.CaptureFixture):
    """Positions of the same segment that share a bucket in some round; the weights are those of a softmax."""
    assert main._run(["inspect", f"--workdir={workdir}"]) == 0
    assert "attention.html" in capsys.readouterr().out
    folder = pathlib.Path(workdir) / "inspection" / "long.py"
    assert [path.name for path in folder.iterdir()] == ["attention.html"]
    page = (folder / "attention.html").read_text()
    data = data_of(page)
    assert (
        "".join(data["table"][index] for index in unpacked(data["tokens"], "<u4", -1)) == TinyTexts().texts["long.py"]
    )
    assert [layer["name"] for layer in data["layers"]] == ["layer_00", "layer_01"]
    for layer in data["layers"]:
        assert layer["heads"] == [0, 1] and layer["groupNames"] == ["bucket in round 1", "bucket in round 2"]
        distances, weights, groups = of_heads(layer)
        token, head, place = np.nonzero(distances != NONE)
        back = distances[token, head, place]
        assert (back <= token % LENGTH).all()
        assert (groups[token, head] == groups[token - back, head]).any(axis=-1).all()
        # All are shown, up to the unit of the weights.
        np.testing.assert_allclose(np.where(distances == NONE, 0, weights).sum(axis=-1), 1, atol=LENGTH / 255)
        assert (back > 0).mean() > 0.3
    assert "default-src 'none'" in page and page.count("<script") == 2


def test_a_page_keeps_what_fits():
    heads, shown, num_tokens = 2, 3, 50
    rng = np.random.default_rng(0)
    attention = HeadsAttention(
        "layer_01",
        (4, 5),
        rng.integers(0, 9, (num_tokens, heads, shown)).astype(np.uint16),
        rng.random((num_tokens, heads, shown), np.float32),
        rng.integers(0, 9, (num_tokens, heads, 1)).astype(np.int32),
        ("cluster",),
    )
    reading = AttentionReading(rng.random(num_tokens, np.float32), (attention,))
    budget = 20 * heads * (3 * shown + 4)
    assert num_kept(reading, budget) == 20 and num_kept(reading, 10**9) == num_tokens
    data = data_of(make_attention_page("<b>", reading, [b"</script>"] * num_tokens, 8, {}, budget))
    distances, weights, groups = of_heads(data["layers"][0])
    np.testing.assert_array_equal(distances, attention.distances[:20])
    np.testing.assert_array_equal(groups, attention.groups[:20])
    np.testing.assert_allclose(weights, attention.weights[:20], atol=1 / 255)
    assert data["kept"] == 20 and len(unpacked(data["nats"], "<f4", -1)) == num_tokens


def test_sizes_of_a_memory_that_is_not_there_are_refused(workdir: str, capsys: pytest.CaptureFixture):
    expect_error(capsys, [f"--workdir={workdir}", "--memory_sizes=0,8"], "no external memory", "inspect")
