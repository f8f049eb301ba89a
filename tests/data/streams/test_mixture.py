"""Mixtures of corpora: shares of the tokens, positions that are saved exactly, one vocabulary."""

import json

import numpy as np
import pytest
from token_caches import write_cache

from memorizing.data.errors import DataError
from memorizing.data.streams.sources import CachedCorpus, Mixture
from memorizing.data.tokens import vocabulary

LONG = {f"long {index}": "a" * 900 + str(index) for index in range(3)}
SHORT = {f"short {index}": "b" * 90 + str(index) for index in range(40)}


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    root = tmp_path_factory.mktemp("caches")
    return tuple(
        CachedCorpus(task, path=write_cache(root / task, task=task, texts=texts))
        for task, texts in (("arxiv_bytes", LONG), ("c4_bytes", SHORT))
    )


def share_of_a(batches, steps):
    tokens = np.concatenate([next(batches).targets.ravel() for _ in range(steps)])
    counts = np.bincount(tokens, minlength=259)
    return counts[ord("a") + 3] / (counts[ord("a") + 3] + counts[ord("b") + 3])


@pytest.mark.parametrize("rates", [(0.5, 0.5), (1.0, 3.0), (9.0, 1.0)])
def test_rates_are_shares_of_the_tokens(members, rates):
    batches = Mixture(members, rates).train_batches(8, range(8), 1, 32, seed=0)
    assert share_of_a(batches, 3000) == pytest.approx(rates[0] / sum(rates), abs=0.03)
    batches.close()


def test_a_mixture_is_resumed_exactly_by_other_hosts(members):
    mixture = Mixture(members, (0.3, 0.7))
    whole = mixture.train_batches(6, range(6), 2, 16, seed=4)
    for _ in range(37):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    assert any(state["offset"])
    hosts = [mixture.train_batches(6, range(first, first + 3), 2, 16, seed=4) for first in (0, 3)]
    for host in hosts:
        host.set_state(state)
    for _ in range(50):
        for expected, *shares in zip(next(whole), *map(next, hosts), strict=True):
            np.testing.assert_array_equal(expected, np.concatenate(shares))
    other = Mixture(members, (0.7, 0.3)).train_batches(6, range(6), 2, 16, seed=4)
    with pytest.raises(ValueError, match="another stream: its places is"):
        other.set_state(state)
    for batches in (whole, *hosts, other):
        batches.close()


def test_held_out_documents_of_all_are_evaluated(members):
    mixture = Mixture(members, (1.0, 1.0))
    assert mixture.document_keys() == ["arxiv: held out", "c4: held out"]
    assert mixture.num_eval_documents == 2 and mixture.document_bytes.tolist() == [2, 2]
    (batch,) = mixture.evaluation_batches(3, 8)
    assert batch.document.tolist() == [0, 1, -1]
    for row in range(2):
        targets = batch.batch.targets[row, 0]
        assert mixture.vocabulary.decode(targets) == "é"
        np.testing.assert_array_equal(targets[batch.batch.is_real[row, 0]], mixture.document_tokens(row))


def test_mixtures_that_cannot_be_are_refused(members, tmp_path):
    for corpora, rates, told in (
        (members, (1.0,), "Mixture.rates=.*each of the 2 corpora"),
        (members, (1.0, 0.0), "Mixture.rates"),
        ((), (), "Mixture.corpora"),
        (members[:1] * 2, (1.0, 1.0), "Mixture.corpora=.*different corpora"),
    ):
        with pytest.raises(DataError, match=told):
            Mixture(corpora, rates)
    used = vocabulary.train(["some words in a line"] * 50, 275)
    other = CachedCorpus("pg19_spm275", path=write_cache(tmp_path / "cache", used, "pg19_spm275"))
    with pytest.raises(DataError, match="have different vocabularies; prepare both with the same --vocabulary=FILE"):
        Mixture((members[0], other), (1.0, 1.0)).train_batches(2, range(2), 1, 8, 0)


def test_gin_builds_a_mixture(members):
    gin = pytest.importorskip("gin")
    import memorizing.data.gin_registry  # noqa: F401

    text = "built/macro.value = @Mixture()\nMixture.corpora = (@one/CachedCorpus(), @two/CachedCorpus())\n"
    text += "Mixture.rates = (0.25, 0.75)\n"
    for scope, member in zip(("one", "two"), members, strict=True):
        text += f"{scope}/CachedCorpus.task = '{member.task}'\n{scope}/CachedCorpus.path = '{member.path}'\n"
    # What a test before this one has bound stays bound.
    gin.clear_config()
    with gin.unlock_config():
        gin.parse_config(text)
    built = gin.query_parameter("built/macro.value").scoped_configurable_fn()
    gin.clear_config()
    assert built == Mixture(members, (0.25, 0.75))
