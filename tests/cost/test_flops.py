"""FLOPs on paper: against the RMT report's headline, against XLA's own count, and their growth with the length."""

from __future__ import annotations

import argparse
import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from mechanisms import apply_model, init_params

from memorizing.commands import plan
from memorizing.context import Layout
from memorizing.cost import flops, flops_report
from memorizing.errors import UserError
from memorizing.models.attention.base import Attention, LayerDims
from memorizing.models.attention.compressive import CompressiveAttention
from memorizing.models.attention.full import FullAttention
from memorizing.models.attention.knn import KNNAttention
from memorizing.models.attention.sparse.factorized import SparseAttention
from memorizing.models.attention.sparse.sinkhorn import SinkhornAttention
from memorizing.models.attention.transformer_xl import TransformerXLAttention
from memorizing.models.attention.xl import XLAttention
from memorizing.models.lm_config import LMConfig
from memorizing.models.recurrent_tokens import RecurrentTokens
from memorizing.runtime import tables

CONFIG = LMConfig(vocab_size=1000, num_layers=4, embed_dim=64, num_heads=4, head_dim=16, mlp_dim=256)
MECHANISMS = {
    "segments": CONFIG,
    "xl": dataclasses.replace(CONFIG, attention=XLAttention(window=32)),
    "knn": dataclasses.replace(CONFIG, attention_at=((2, KNNAttention(memory_size=256, num_neighbors=8)),)),
    "transformer_xl": dataclasses.replace(CONFIG, attention=TransformerXLAttention(window=32)),
    "compressive": dataclasses.replace(CONFIG, attention=CompressiveAttention(window=32, compressed_size=16)),
    "rmt": dataclasses.replace(CONFIG, recurrent_tokens=RecurrentTokens(num_tokens=5)),
}


@pytest.mark.parametrize("count", flops_report.opt_flops(), ids=lambda count: count["model"])
def test_headline_of_the_rmt_report(count: dict) -> None:
    assert count["ratio"] == pytest.approx(count["reported"], rel=0.03)


def test_headline_covers_the_five_models_of_the_report() -> None:
    assert {count["model"]: count["reported"] for count in flops_report.opt_flops()} == {
        "125M": 295,
        "1.3B": 154,
        "6.7B": 82,
        "30B": 48,
        "175B": 29,
    }


def test_one_layer_by_hand() -> None:
    """T 3, D 4, 2 heads of 5, F 6, V 7."""
    config = LMConfig(vocab_size=7, num_layers=1, embed_dim=4, num_heads=2, head_dim=5, mlp_dim=6)
    projections, scores_and_values, softmax = 4 * (2 * 3 * 4 * 10), 2 * (2 * 3 * 3 * 10), 3 * 2 * 3 * 3
    mlp, logits = 2 * (2 * 3 * 4 * 6), 2 * 3 * 4 * 7
    assert flops.full_attention_flops(config, 3) == projections + scores_and_values + softmax + mlp + logits


@pytest.mark.parametrize("name", MECHANISMS)
def test_cost_in_segments_is_linear_in_the_length(name: str) -> None:
    one = flops.forward_flops(MECHANISMS[name], 64, 64)
    assert [flops.forward_flops(MECHANISMS[name], 64 * n, 64) for n in (2, 10, 1000)] == [2 * one, 10 * one, 1000 * one]


def test_full_attention_is_quadratic_in_the_length() -> None:
    lengths = 2**18, 2**19
    assert flops.full_attention_flops(CONFIG, lengths[1]) / flops.full_attention_flops(CONFIG, lengths[0]) > 3.9


@pytest.mark.parametrize("length", [512, 100])
def test_one_segment_costs_as_much_as_full_attention(length: int) -> None:
    """... and with recurrent tokens a little more: the share of their positions."""
    full = flops.full_attention_flops(CONFIG, length)
    assert flops.forward_flops(CONFIG, length, 512) == full
    recurrent = flops.forward_flops(MECHANISMS["rmt"], length, 512)
    assert 1 < recurrent / full < (1 + 10 / length) ** 2


def test_each_mechanism_adds_its_own_cost() -> None:
    plain = flops.segment_flops(CONFIG, 64)
    width, softmax = 2 * 64 * 4 * 16, 3 * 64 * 4
    attend_a_key = 2 * width + softmax
    added = {name: flops.segment_flops(config, 64) - plain for name, config in MECHANISMS.items()}
    assert added["segments"] == 0
    assert added["xl"] == 4 * 32 * attend_a_key
    # One layer: the score of every slot, then attention to the neighbours.
    assert added["knn"] == 256 * width + 8 * attend_a_key
    # Keys and values of what is cached, and the position term.
    relative = 32 * 2 * 2 * 64 * 64 + (64 + 96 - 1) * (2 * 64 * 64 + width)
    assert added["transformer_xl"] == 4 * (32 * attend_a_key + relative)
    relative = 48 * 2 * 2 * 64 * 64 + (64 + 112 - 1) * (2 * 64 * 64 + width)
    convolution = 64 * 2 * 64 * 64
    assert added["compressive"] == 4 * (48 * attend_a_key + relative + convolution)


def test_recurrent_tokens_of_the_encoder_are_there_once() -> None:
    encoder = dataclasses.replace(CONFIG, recurrent_tokens=RecurrentTokens(num_tokens=10, version="encoder"))
    assert flops.segment_flops(encoder, 64) == flops.segment_flops(MECHANISMS["rmt"], 64)


def test_a_mechanism_tells_its_own_count() -> None:
    @dataclasses.dataclass(frozen=True)
    class Unheard(Attention):
        pass

    @dataclasses.dataclass(frozen=True)
    class Heard(Attention):
        def flops(self, dims: LayerDims, layout: Layout) -> int:
            return 7

    config = dataclasses.replace(CONFIG, attention=Unheard())
    with pytest.raises(NotImplementedError, match="Unheard"):
        flops.segment_flops(config, 64)
    full = FullAttention().flops(CONFIG.dims, Layout(64))
    without = flops.segment_flops(CONFIG, 64) - 4 * full
    assert flops.segment_flops(dataclasses.replace(CONFIG, attention=Heard()), 64) == without + 4 * 7


@pytest.mark.parametrize(
    "attention",
    [
        FullAttention(),
        XLAttention(window=128),
        TransformerXLAttention(window=128),
        CompressiveAttention(window=128, compressed_size=64, compressor="conv"),
        CompressiveAttention(window=128, compressed_size=64, compressor="dilated"),
        SparseAttention("strided", stride=16),
        SparseAttention("fixed", "split", stride=16, summary_width=4),
        SinkhornAttention(block_size=16),
    ],
    ids=["full", "xl", "transformer_xl", "conv", "dilated", "strided", "fixed", "sinkhorn"],
)
@pytest.mark.parametrize("recurrent_tokens", [None, RecurrentTokens(num_tokens=16)], ids=["alone", "rmt"])
def test_count_agrees_with_the_compiler(attention: Attention, recurrent_tokens: RecurrentTokens | None) -> None:
    if recurrent_tokens and not attention.takes_memory_tokens:
        pytest.skip("it knows no memory tokens")
    # One layer: the compiler counts the body of a scan once.
    config = LMConfig(
        vocab_size=512,
        num_layers=1,
        embed_dim=256,
        num_heads=2,
        head_dim=128,
        mlp_dim=1024,
        attention=attention,
        recurrent_tokens=recurrent_tokens,
    )
    tokens, flags = jnp.zeros((1, 128), jnp.int32), jnp.ones((1, 128), bool)
    arguments = (tokens, flags, jnp.ones(1, bool), config.init_context(1, 128))
    params = jax.eval_shape(lambda: init_params(config, 1, 128, jax.random.key(0)))
    # Without the report: auxiliary losses are a matter of training.
    forward = jax.jit(lambda *inputs: apply_model(config, *inputs)[:2])
    compiled = forward.lower(params, *arguments).compile()
    assert compiled.cost_analysis()["flops"] == pytest.approx(flops.segment_flops(config, 128), rel=0.03)


def run_plan(*arguments: str, bindings: tuple[str, ...] = ()) -> int:
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    return plan.run(parser.parse_args(arguments), list(bindings))


def test_plan_prints_the_headline(capsys: pytest.CaptureFixture) -> None:
    assert run_plan("--flops=opt") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split() == ["125M", "157", "P", "545", "T", "287.9", "295", "-2.4%"]
    assert len({len(line) for line in lines[2:]}) == 1


def test_plan_prints_the_run_of_a_gin_file(capsys: pytest.CaptureFixture) -> None:
    assert run_plan("--flops", "--gin_file=smoke", "--json", bindings=("LMConfig.num_layers=3",)) == 0
    counts = json.loads(capsys.readouterr().out)
    names = [mechanism["name"] for mechanism in counts["mechanisms"]]
    assert names == [
        "full",
        "this run",
        "segments",
        "cache",
        "XL",
        "compressive",
        "kNN",
        "joint",
        "sparse",
        "Reformer",
        "routing",
        "Sinkhorn",
        "adaptive span",
        "RMT",
    ]
    assert counts["lengths"][0] == 512 and counts["lengths"][-1] == 2_048_000
    assert run_plan("--flops", "--gin_file=smoke", bindings=("LMConfig.num_layers=3",)) == 0
    text = capsys.readouterr().out
    full = counts["mechanisms"][0]["flops"]
    assert tables.with_unit(full[-1]) in text and "Full attention / mechanism" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "give either --topology"),
        (("--flops=opt", "--gin_file=smoke"), "takes no --gin_file"),
    ],
)
def test_plan_tells_what_is_missing(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_plan(*arguments)


@pytest.mark.parametrize(
    "count, text",
    [(1.234e15, "1.23 P"), (12.34e12, "12.3 T"), (1.5e21, "1,500 E"), (999.6e12, "1.00 P"), (2e7, "20.0 M")],
)
def test_units(count: float, text: str) -> None:
    assert tables.with_unit(count) == text
