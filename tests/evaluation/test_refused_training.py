"""A training that is refused before its first step leaves nothing behind, and takes away nothing that was there."""

from __future__ import annotations

import pathlib

import pytest
from etils import epath

from memorizing.config.loading import load_experiment
from memorizing.errors import UserError
from memorizing.evaluation.train_and_evaluate import train_and_evaluate
from memorizing.runtime.workdir import CONFIG, take_back

# Found by the checkpoint's reader and by the task's first sample: in one case before anything is made, in the other
# with everything open.
MISTAKES = {
    "start_from": (["smoke"], ["LoopConfig.start_from='nowhere'"]),
    "TopicCopy": (["smoke", "tasks/topics"], ["BatchConfig.segment_length=8"]),
}


def refused(workdir: pathlib.Path, mistake: str) -> str:
    files, bindings = MISTAKES[mistake]
    experiment, text = load_experiment(files, bindings)
    with pytest.raises(UserError) as error:
        train_and_evaluate(experiment, str(workdir), text)
    return str(error.value)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_refused_training_leaves_no_folder(tmp_path: pathlib.Path, mistake: str):
    assert mistake in refused(tmp_path / "run", mistake)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_others_put_there_stays(tmp_path: pathlib.Path, mistake: str):
    (tmp_path / "notes.txt").write_text("mine")
    refused(tmp_path, mistake)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_others_put_into_folders_of_such_names_stays(tmp_path: pathlib.Path, mistake: str):
    theirs = [tmp_path / name for name in ("checkpoints/model.pt", "events/calendar")]
    for path in theirs:
        path.parent.mkdir()
        path.write_text("theirs")
    refused(tmp_path, mistake)
    assert [path.read_text() for path in theirs] == ["theirs", "theirs"]


def test_a_folder_that_was_empty_stays(tmp_path: pathlib.Path):
    refused(tmp_path, "start_from")
    assert tmp_path.exists() and not list(tmp_path.iterdir())


@pytest.mark.parametrize("trained", ["checkpoints/3/data", "metrics.jsonl"])
def test_what_was_trained_stays(tmp_path: pathlib.Path, trained: str):
    kept = tmp_path / trained
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text('{"step": 3, "kind": "train"}\n')
    (tmp_path / CONFIG).write_text("of that run")
    take_back(epath.Path(tmp_path), [CONFIG, trained.partition("/")[0]])
    assert kept.exists() and (tmp_path / CONFIG).exists()
