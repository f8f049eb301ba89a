"""A run over several hosts, each a real process with devices of its own.

What a user relies on: how many machines a run has changes nothing but its speed; a signal to any of them saves the same
step on all; when one fails, all end at once, with an exit code that says whether starting again helps.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import signal
import time

import few_steps
import numpy as np
import pytest
from etils import epath
from pods import HEARTBEAT_SECONDS, Pod

from memorizing import main
from memorizing.runtime import events
from memorizing.training.checkpoint import read_arrays

STEPS = 24
MIDDLE = 16
# Rows for 32 devices; held-out documents of different lengths, not a multiple of the hosts.
COMMAND = [
    "train",
    "--gin_file=smoke",
    "--gin.LMConfig.num_layers=1",
    "--gin.LMConfig.attention_at=((0, @KNNAttention()),)",
    "--gin.LMConfig.embed_dim=16",
    "--gin.LMConfig.head_dim=8",
    "--gin.LMConfig.mlp_dim=32",
    "--gin.LMConfig.dropout=0.1",
    "--gin.KNNAttention.memory_size=16",
    "--gin.KNNAttention.num_neighbors=4",
    "--gin.BatchConfig.tokens_per_step=128",
    "--gin.BatchConfig.segment_length=4",
    "--gin.RepeatedPassages.num_documents=5",
    "--gin.RepeatedPassages.num_passages=3",
    "--gin.RepeatedPassages.passage_length=6",
    f"--gin.LoopConfig.num_steps={STEPS}",
    "--gin.LoopConfig.log_every=1",
    "--gin.LoopConfig.checkpoint_every=1",
    f"--gin.LoopConfig.keep_checkpoints={STEPS}",
]

GIN_FLAGS = [flag for flag in COMMAND if flag.startswith("--gin.")]

# The same command with slow data, so that there is time to interrupt it.
SLOWLY = """
import time
from memorizing import main
from memorizing.synthetic.repeated_passages import RepeatedPassagesStream
read = RepeatedPassagesStream.__next__
RepeatedPassagesStream.__next__ = lambda stream: (time.sleep(0.2), read(stream))[1]
main.main()
"""

# A step that all processes take part in, and what may happen to one of them.
TROUBLE = """
import os, signal, sys, time
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from memorizing.runtime import failures
from memorizing.errors import UserError
from memorizing.runtime.sharding import MeshConfig, RowPlacement
from memorizing.runtime.watchdog import HangDetector

trouble, victim = sys.argv[1], int(sys.argv[2])

def run():
    placement = RowPlacement(MeshConfig().make_mesh(), 8)
    rows = placement.put(np.ones(len(placement.rows)))
    add = jax.jit(lambda rows: rows.sum())
    float(add(rows))
    with HangDetector(3, lambda reason: failures.fail(42, reason)) as watchdog:
        for step in range(100000):
            if step == 5 and jax.process_index() == victim:
                if trouble == "bug": raise ValueError("what a bug says")
                if trouble == "mistake": raise UserError("what a user did")
                if trouble == "kill": os.kill(os.getpid(), signal.SIGKILL)
                if trouble == "hang": time.sleep(1000)
            assert float(add(rows)) == 8
            watchdog.beat()
            time.sleep(0.01)

sys.exit(failures.end_together(run))
"""


def metrics(workdir: pathlib.Path, kind: str = "train") -> dict[int, dict]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    values = [json.loads(line) for line in lines if line.endswith("\n")]
    return {line["step"]: line for line in values if line["kind"] == kind}


def losses(workdir: pathlib.Path) -> list[float]:
    return [line["loss"] for line in metrics(workdir).values()]


def record(workdir: pathlib.Path, step: int) -> dict:
    """Checksums of all that was saved with a step, context included, and where every row stood."""
    return json.loads((workdir / "checkpoints" / str(step) / "data" / "metadata").read_text())


def saved_steps(workdir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def copy_until(step: int, workdir: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """The workdir as it was when a step had been saved."""
    shutil.copytree(workdir, target)
    for later in saved_steps(target):
        if later > step:
            shutil.rmtree(target / "checkpoints" / str(later))
    return target


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The run on two hosts of four devices, from its start to its end."""
    workdir = tmp_path_factory.mktemp("hosts") / "undisturbed"
    codes, out, error = Pod(2, 4, ["-m", "memorizing", *COMMAND, f"--workdir={workdir}"]).end()
    assert codes == [0, 0], error
    assert "as trained" in out[0] and out[1] == "", "one process prints"
    return workdir


def test_hosts_change_nothing_but_the_speed(undisturbed: pathlib.Path, tmp_path: pathlib.Path):
    """One process with as many devices has the same losses and evaluations, to rounding."""
    alone = tmp_path / "alone"
    seldom = "--gin.LoopConfig.checkpoint_every=100"
    assert main._run([*COMMAND, seldom, f"--workdir={alone}"]) == 0
    expected = losses(alone)
    assert len(expected) == STEPS
    # Losses of single steps, each of other documents, say little: the parameters tell whether anything was trained.
    middle, end = (read_arrays(epath.Path(undisturbed), step) for step in (MIDDLE, STEPS))
    moved = max(np.abs(end[path] - middle[path]).max() for path in end if path.startswith("params/"))
    assert moved > 0.01, "nothing was trained"
    np.testing.assert_allclose(losses(undisturbed), expected, rtol=0, atol=1e-5)
    evaluations = [json.loads((workdir / "evaluation.json").read_text()) for workdir in (undisturbed, alone)]
    assert evaluations[0]["as trained"]["tokens"] == evaluations[1]["as trained"]["tokens"] == 5 * 3 * 6
    for name in ("as trained", "memory cleared"):
        np.testing.assert_allclose(evaluations[0][name]["loss"], evaluations[1][name]["loss"], rtol=1e-5)


@pytest.mark.nightly
def test_one_host_goes_on_from_two(undisturbed: pathlib.Path, tmp_path: pathlib.Path):
    continued = copy_until(MIDDLE, undisturbed, tmp_path / "continued")
    told = few_steps.run(str(continued), MIDDLE, MIDDLE + 4, GIN_FLAGS)
    np.testing.assert_allclose(told["losses"], losses(undisturbed)[MIDDLE : MIDDLE + 4], rtol=0, atol=1e-5)
    assert record(continued, MIDDLE + 4)["rows"] == record(undisturbed, MIDDLE + 4)["rows"]


@pytest.mark.nightly
def test_four_hosts_of_eight_devices_go_on_from_two_of_four(undisturbed: pathlib.Path, tmp_path: pathlib.Path):
    """As many devices as the paper's pod has."""
    workdir = copy_until(MIDDLE, undisturbed, tmp_path / "workdir")
    program = [few_steps.__file__, str(workdir), str(MIDDLE), str(MIDDLE + 4), *GIN_FLAGS]
    codes, out, error = Pod(4, 8, program).end()
    assert codes == [0] * 4, error
    told = json.loads(out[0].splitlines()[-1])
    assert told["rows"] == 8, "each host reads its own rows"
    np.testing.assert_allclose(told["losses"], losses(undisturbed)[MIDDLE : MIDDLE + 4], rtol=0, atol=1e-5)
    assert record(workdir, MIDDLE + 4)["rows"] == record(undisturbed, MIDDLE + 4)["rows"]


def test_a_signal_to_one_host_saves_the_same_step_on_all(undisturbed: pathlib.Path, tmp_path: pathlib.Path):
    """Started again on as many hosts, every step equals, bit for bit, that of the undisturbed run.

    A second signal goes to the first host.
    """
    stops, programs = [], tmp_path / "programs"
    cache = f"--gin.LoopConfig.compilation_cache={programs}"
    for index in (1, 0):
        pod = Pod(2, 4, ["-c", SLOWLY, *COMMAND, cache, f"--workdir={tmp_path}"])
        begin = stops[-1] if stops else 0
        pod.signal_when(lambda begin=begin: max(metrics(tmp_path), default=0) > begin, index, signal.SIGTERM)
        codes, out, error = pod.end()
        assert codes == [42, 42], error
        assert f"stopped and saved at step {saved_steps(tmp_path)[-1]};" in out[0] and out[1] == ""
        stops.append(saved_steps(tmp_path)[-1])
    assert 0 < stops[0] < stops[1] < STEPS, "the test comes too late"
    for step in stops:
        assert record(tmp_path, step) == record(undisturbed, step)
    arrays, expected = (read_arrays(epath.Path(workdir), stops[-1]) for workdir in (tmp_path, undisturbed))
    for path, array in expected.items():
        np.testing.assert_array_equal(array, arrays[path], err_msg=path)
    assert losses(tmp_path) == losses(undisturbed)[: stops[-1]]
    assert any("train_step" in path.name for path in programs.iterdir())
    spent = events.goodput(epath.Path(tmp_path))
    assert spent.starts == 2 and spent.seconds["restore"] > 0 and spent.seconds["stopped"] > 0


def test_a_damaged_checkpoint_ends_all_hosts(undisturbed: pathlib.Path, tmp_path: pathlib.Path):
    """Also where only one of them reads what is damaged."""
    workdir = copy_until(3, undisturbed, tmp_path / "workdir")
    for file in (workdir / "checkpoints" / "3" / "context").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    codes, _, error = Pod(2, 4, ["-m", "memorizing", *COMMAND, f"--workdir={workdir}"]).end()
    assert codes == [2, 2], error
    assert any("--restore_step=2" in text for text in error) and not any("Traceback" in text for text in error)


@pytest.mark.parametrize(
    ("trouble", "victim", "code"),
    [pytest.param("bug", 0, 1, marks=pytest.mark.nightly), ("bug", 1, 1), ("mistake", 1, 2), ("hang", 1, 42)],
)
def test_one_that_fails_takes_the_others_with_it(trouble: str, victim: int, code: int):
    """At once, and with a code of which all agree."""
    begin = time.monotonic()
    codes, _, error = Pod(2, 4, ["-c", TROUBLE, trouble, str(victim)]).end()
    assert codes == [code, code], error
    assert time.monotonic() - begin < 60, "nobody may wait for the shutdown of JAX"
    if trouble == "hang":
        assert all("no step was finished in 3 seconds" in text for text in error)
        assert 'File "<string>", line' in error[victim], "the stacks say where it hangs"
    else:
        says = {"bug": "what a bug says", "mistake": "what a user did"}[trouble]
        assert says in error[victim] and f"process {victim} failed: {says}" in error[1 - victim]
        assert ("Traceback" in error[victim]) == (trouble == "bug")


def test_a_host_that_vanishes_ends_the_others_with_a_code_to_start_again():
    codes, _, error = Pod(2, 4, ["-c", TROUBLE, "kill", "1"]).end(timeout=60 + HEARTBEAT_SECONDS)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] in (42, -signal.SIGABRT), error[0]


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"MEMORIZING_COORDINATOR": "nowhere"}, "MEMORIZING_COORDINATOR=nowhere"),
        ({"MEMORIZING_COORDINATOR": "localhost:1"}, "MEMORIZING_NUM_PROCESSES is not set"),
        (
            {"MEMORIZING_COORDINATOR": "localhost:1", "MEMORIZING_NUM_PROCESSES": "2"},
            "MEMORIZING_PROCESS_ID is not set",
        ),
        (
            {"MEMORIZING_COORDINATOR": "localhost:1", "MEMORIZING_NUM_PROCESSES": "2", "MEMORIZING_PROCESS_ID": "2"},
            "MEMORIZING_PROCESS_ID=2",
        ),
        ({"MEMORIZING_CPU_DEVICES": "many"}, "MEMORIZING_CPU_DEVICES=many"),
    ],
)
def test_an_environment_without_meaning_is_told(environment: dict[str, str], says: str):
    from memorizing.errors import UserError
    from memorizing.runtime import distributed

    with pytest.raises(UserError, match=says):
        distributed.initialize(environment)
