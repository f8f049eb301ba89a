"""The gin files of the synthetic tasks."""

from __future__ import annotations

import pytest

from memorizing.config.loading import load_experiment

TASKS = ("memorize", "detect_and_memorize", "detect_any_offset", "reasoning", "copy", "reverse", "dictionary_lookup")
RECALL = ("mqar", "segmented_mqar", "passkey_words", "ruler_words", "babilong_words", "passkey", "ruler", "babilong")


@pytest.mark.parametrize("name", (*TASKS, *RECALL))
def test_task_builds_with_a_vocabulary_of_its_size(name: str) -> None:
    files = ["runs/base.gin", "models/transformer_tiny.gin", f"tasks/{name}.gin"]
    experiment, _ = load_experiment(files, ["BatchConfig.segment_length=64", "BatchConfig.tokens_per_step=1024"])
    assert experiment.model.vocab_size == experiment.data.vocab_size
    assert experiment.data.position == "any_offset" if name == "detect_any_offset" else True
    # Prompts as bytes are long.
    length = 512 if name in ("passkey", "ruler", "babilong") else 64
    batch = next(experiment.data.train_batches(2, range(2), 2, length, 0))
    assert batch.tokens.shape == (2, 2, length) and batch.targets.max() < experiment.model.vocab_size
