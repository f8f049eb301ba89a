"""Every shipped gin file works at full size, and every mistake in a configuration is told in a line or two.

Abstract arrays only: the 200M model with 256 rows and a memory of 65536 needs no byte here.
"""

from __future__ import annotations

import io
import math
import pathlib
import stat
import subprocess
import sys

import gin
import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from memorizing import main
from memorizing.batch import Batch
from memorizing.config import loading
from memorizing.config.files import GIN_FOLDER, shipped_files
from memorizing.config.loading import load_experiment
from memorizing.errors import UserError
from memorizing.models.attention.xl import XLAttention
from memorizing.models.lm_config import LMConfig
from memorizing.runtime.sharding import AXES
from memorizing.training.experiment import Experiment
from memorizing.training.state import init_train_state
from memorizing.training.step import make_train_step

FILES = shipped_files()
# Parts of a run that every run includes: no experiments themselves.
PARTS = ("runs/base.gin", "runs/pretrain.gin")
RUNS = [name for name in FILES if name.startswith("runs/") and name not in PARTS]
POD = 32


TALK = ("sparse", "reformer", "routing")
# The length of segments that their papers train on.
PUBLISHED = {
    "sparse_base": 12288,
    "reformer_base": 65536,
    "routing_base": 4096,
    "routing_enwik8": 8192,
    "routing_pg19": 8192,
}


# Of models that differ in nothing but sizes, each is traced every night, and with the suite only these.
IN_SUITE = ("runs/table4_context512_memory65536_xl512.gin", "runs/table5_context512_memory8192_to_65536.gin")
OTHER_SIZES = ("runs/table", "runs/memory_in_qwen3", "models/memorizing_1b", "models/memorizing_8b")


def traced(files: list[str]) -> list:
    """Parameters of tests: the files, some of them for every night only."""
    at_night = [name for name in files if name.startswith(OTHER_SIZES) and name not in IN_SUITE]
    return [pytest.param(name, marks=pytest.mark.nightly if name in at_night else ()) for name in files]


def given(file: str) -> list[str]:
    """Bindings for what a run leaves to its user."""
    names = {"START_FROM": "START_FROM=elsewhere", "CACHE": "CACHE=nowhere"}
    return [binding for name, binding in names.items() if f"%{name}" in closure(file)]


def closure(file: str) -> str:
    """The text of a file and of all that it includes."""
    text = (GIN_FOLDER / file).read_text()
    included = [line.split("'")[1] for line in text.splitlines() if line.startswith("include ")]
    return "\n".join([text, *map(closure, included)])


def trace_step(experiment: Experiment, num_devices: int) -> float:
    """Traces one training step on abstract arrays and an abstract mesh. Returns millions of parameters."""
    mesh, batch, optimizer = experiment.mesh, experiment.batch, experiment.make_optimizer()
    shape = (num_devices // mesh.model // mesh.memory, mesh.model, mesh.memory)
    rows, segments, length = batch.num_rows, batch.segments_at(1), batch.segment_length

    def array(dtype: type, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    integers, floats = array(np.int32, rows, segments, length), array(np.float32, rows, segments, length)
    with jax.sharding.use_abstract_mesh(AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))):
        state = jax.eval_shape(lambda: init_train_state(experiment.model, optimizer, rows, length, seed=0))
        step = make_train_step(experiment.model, optimizer, batch.num_microbatches)
        flags = array(bool, rows, segments, length)
        abstract_batch = Batch(integers, integers, floats, flags, array(bool, rows, segments))
        new_state, metrics = jax.eval_shape(step, state, abstract_batch)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), new_state) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert metrics["loss"].shape == ()
    return sum(leaf.size for leaf in jax.tree.leaves(state.params)) / 1e6


@pytest.mark.parametrize("file", traced(RUNS))
def test_every_run_traces_a_full_size_step(file: str):
    experiment, text = load_experiment([file], given(file))
    assert "Experiment.model = @LMConfig()" in text
    is_paper = "runs/pretrain.gin" in closure(file)
    millions = trace_step(experiment, POD if is_paper else math.gcd(8, experiment.batch.num_rows))
    if is_paper and "models/transformer_200m.gin" in closure(file) and "1b" not in file:
        # 151M and 33M of embeddings.
        assert 180 < millions < 190
        assert experiment.batch.num_rows * experiment.batch.segment_length == 2**17


@pytest.mark.parametrize("file", traced([name for name in FILES if name.startswith("models/")]))
def test_every_model_traces_a_step(file: str):
    files = ["runs/base.gin", file, "tasks/repeated_passages.gin"]
    length = PUBLISHED.get(file.removeprefix("models/").removesuffix(".gin"), 128)
    sizes = [f"BatchConfig.tokens_per_step={32 * length}", f"BatchConfig.segment_length={length}"]
    experiment, _ = load_experiment(files, sizes)
    trace_step(experiment, POD)


@pytest.mark.parametrize("file", [name for name in FILES if name.startswith("tasks/")])
def test_every_task_builds(file: str):
    """Only the configuration: a corpus is opened when it is read."""
    files = ["runs/base.gin", "models/transformer_tiny.gin", file]
    experiment, _ = load_experiment(files, given(file))
    assert hasattr(type(experiment.data), "train_batches")


@pytest.mark.parametrize("file", [name for name in FILES if name.startswith("meshes/")])
def test_every_mesh_fits_eight_devices(file: str):
    experiment, _ = load_experiment(["runs/smoke.gin", file], [])
    assert experiment.make_mesh().size == 8


def test_table_4_is_complete():
    """Context, memory and XL cache of every row of the paper's table (issue: each is one gin run file)."""

    def row(file: str) -> tuple:
        experiment, _ = load_experiment([file], given(file))
        attention = dict(experiment.model.attention_at).get(8)
        local = experiment.model.attention
        memory = attention.memory_size if attention else None
        return experiment.batch.segment_length, memory, getattr(local, "window", None)

    rows = {row(file) for file in RUNS if "table4" in file}
    assert rows == {
        (512, None, None),
        (2048, None, None),
        (512, None, 512),
        (2048, None, 2048),
        (512, 1536, None),
        (512, 8192, None),
        (512, 8192, 512),
        (512, 65536, 512),
        (2048, 8192, 2048),
        (2048, 65536, 2048),
    }


def test_gin_is_the_package_and_our_folder_does_not_shadow_it():
    assert not (GIN_FOLDER / "__init__.py").exists()
    assert pathlib.Path(gin.__file__).resolve().parent != GIN_FOLDER.resolve()


def test_shipped_files_are_found_by_every_short_name():
    texts = {load_experiment([name], [])[1] for name in ("runs/smoke.gin", "runs/smoke", "smoke.gin", "smoke")}
    assert len(texts) == 1


def test_bindings_override_files_and_bare_words_need_no_quotes():
    experiment, text = load_experiment(
        ["smoke"], ["LMConfig.dtype=bfloat16", "LMConfig.num_layers=3", "LMConfig.attention_at=()", "AdamW.b1=0.5"]
    )
    assert (experiment.model.dtype, experiment.model.num_layers, experiment.optimizer.b1) == ("bfloat16", 3, 0.5)
    assert not experiment.model.has_memory
    assert "LMConfig.dtype = 'bfloat16'" in text


def test_the_resolved_text_is_the_experiment():
    """config.gin in the workdir reproduces the run."""
    experiment, text = load_experiment(["smoke"], ["KNNAttention.memory_size=64"])
    gin.clear_config()
    gin.parse_config(text)
    assert gin.get_configurable("Experiment")() == experiment


def test_configuration_classes_are_unaffected_from_python():
    """A test or a notebook that builds a model gets what it writes, whatever gin file was loaded before."""
    load_experiment(["smoke"], ["LMConfig.mlp_dim=17"])
    assert LMConfig().mlp_dim != 17


# Mistakes.


@pytest.fixture
def mistake(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture):
    """Runs `memorizing train` on the smoke run and returns what it said."""

    def run(*arguments: str, file: str = "smoke", workdir: pathlib.Path | None = None) -> str:
        workdir = workdir or tmp_path / "workdir"
        code = main._run(["train", f"--gin_file={file}", f"--workdir={workdir}", *arguments])
        error = capfd.readouterr().err
        assert code == 2, error
        assert error.startswith("memorizing: ") and "Traceback" not in error
        assert len(error.strip().splitlines()) <= 3 and len(error) < 600, error
        return error

    return run


@pytest.mark.parametrize(
    ("binding", "told"),
    [
        # Not a multiple: the binding, what was given, the nearest that would do.
        ("KNNAttention.memory_size=100", ["KNNAttention.memory_size", "100", "16", "96", "112"]),
        ("LMConfg.num_layers=3", ["LMConfg", "LMConfig"]),
        ("LMConfig.num_layer=3", ["LMConfig.num_layer", "LMConfig.num_layers"]),
        ("LMConfig.attention=@FullAtention()", ["FullAtention", "FullAttention"]),
        ("LMConfig.num_layers=three", ["LMConfig.num_layers", "three", "whole number"]),
        ("LMConfig.num_layers=2.5", ["LMConfig.num_layers", "2.5", "whole number"]),
        ("LMConfig.num_layers=True", ["LMConfig.num_layers", "True", "whole number"]),
        ("LMConfig.num_layers=0", ["LMConfig.num_layers = 0", "from 1 to 10,000"]),
        ("LMConfig.dtype=float16", ["LMConfig.dtype", "float16", "bfloat16"]),
        # What could stand there, and what is wrong inside a tuple of pairs.
        ("LMConfig.attention=5", ["LMConfig.attention = 5", "@FullAttention()", "@KNNAttention()"]),
        ("LMConfig.attention=@FullAttention", ["LMConfig.attention = @FullAttention", "add ()"]),
        ("Experiment.optimizer=@LMConfig()", ["Experiment.optimizer = @LMConfig()", "@Adafactor()", "@AdamW()"]),
        ("LMConfig.attention_at=((1, @AdamW()),)", ["LMConfig.attention_at[0][1] = @AdamW()", "@KNNAttention()"]),
        ("LMConfig.attention_at=(('1', @KNNAttention()),)", ["LMConfig.attention_at[0][0] = '1'", "whole number"]),
        ("LMConfig.attention_at=((1, 2, 3),)", ["LMConfig.attention_at[0] = (1, 2, 3)", "3 items"]),
        ("LMConfig.attention_at=[(1, @KNNAttention())]", ["[(1, @KNNAttention())]", "tuple", "list"]),
        ("BatchConfig.curriculum=((0, True),)", ["BatchConfig.curriculum[0][1] = True", "whole number"]),
        ("LoopConfig.profile_steps=3", ["LoopConfig.profile_steps = 3", "a tuple, each item a whole number"]),
        ("LMConfig.attention_at=((7, @KNNAttention()),)", ["attention_at", "7", "num_layers"]),
        ("XLAttention.window=8", ["XLAttention.window", "never used"]),
        ("lerning/Cosine.peak=1.0", ["lerning/Cosine.peak", "never used", "Cosine.peak"]),
        ("Adafactor.momentum=0.5", ["Adafactor.momentum", "never used"]),
        ("STEPSS=5", ["STEPSS", "never used"]),
        ("LMConfig.num_layers=%LAYERS", ["%LAYERS", "never set"]),
        ("LMConfig.num_layers=%small/LAYERS", ["%small/LAYERS", "never set"]),
        ("LMConfig.vocab_size=%VOCAB_SIZES", ["%VOCAB_SIZES", "never set", "mean VOCAB_SIZE?"]),
        # gin's own, which takes no such parameter.
        ("singleton.value=3", ["singleton.value"]),
        ("LMConfig.num_layers", ["LMConfig.num_layers", "NAME=VALUE"]),
        ("KNNAttention.local=@KNNAttention()", ["a value contains itself", "local"]),
        ("LMConfig.attention_at=((1, @KNNAttention()", ["LMConfig.attention_at"]),
        ("MeshConfig.data=3", ["MeshConfig.data", "3", "8 devices"]),
        ("MeshConfig.memory=3", ["MeshConfig", "memory", "3"]),
        ("BatchConfig.tokens_per_step=100", ["BatchConfig.tokens_per_step", "100"]),
        ("BatchConfig.tokens_per_step=64", ["rows", "4", "8"]),
        ("LMConfig.vocab_size=50", ["LMConfig.vocab_size", "50", "64"]),
        ("Cosine.decay_steps=10", ["Cosine.warmup_steps = 20", "Cosine.decay_steps = 10"]),
        ("LoopConfig.start_from=/nowhere", ["LoopConfig.start_from", "/nowhere"]),
    ],
)
def test_a_wrong_binding_is_named(mistake, binding: str, told: list[str]):
    error = mistake(f"--gin.{binding}")
    assert [word for word in told if word not in error] == [], error


def test_a_part_chosen_by_a_macro_takes_its_settings():
    bindings = ["LOCAL=@XLAttention()", "XLAttention.window=8"]
    experiment, _ = load_experiment(["smoke"], bindings)
    assert experiment.model.attention == XLAttention(window=8)


def test_a_misspelt_file_is_named_with_the_nearest(mistake):
    error = mistake(file="smokee")
    assert ("smokee" in error and "smoke.gin" in error.replace("smokee", "")) or "did you mean smoke" in error


def test_a_mistake_in_a_users_file_is_named(mistake, tmp_path: pathlib.Path):
    file = tmp_path / "mine.gin"
    file.write_text("include 'runs/smoke.gin'\nLMConfig.embed_dims = 8\n")
    assert "LMConfig.embed_dim" in mistake(file=str(file))
    file.write_text("include 'runs/smoke.gin'\nAdafactor.momentum = 0.5\n")
    assert "Adafactor.momentum" in mistake(file=str(file))
    file.write_text("include 'runs/smoke.gin'\nLMConfig.embed_dim = = 8\n")
    mistake(file=str(file))
    file.write_text("include 'runs/smoke.gin'\nAdafactor:\n  momentum = 0.5\n")
    assert "Adafactor.momentum" in mistake(file=str(file))
    file.write_text("include 'runs/smok.gin'\n")
    assert "runs/smok.gin" in mistake(file=str(file))


def test_a_workdir_that_cannot_be_written_is_named(mistake, tmp_path: pathlib.Path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert f"--workdir={blocked}/run" in mistake(workdir=blocked / "run")
    assert f"--workdir={blocked}" in mistake(workdir=blocked)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions")
def test_a_workdir_without_permission_is_named(mistake, tmp_path: pathlib.Path):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(stat.S_IREAD | stat.S_IEXEC)
    try:
        (closed / "probe").touch()
    except PermissionError:
        assert f"--workdir={closed}" in mistake(workdir=closed)
    else:
        pytest.skip("this user may write anywhere")


def test_a_workdir_of_another_experiment_is_left_alone(mistake, tmp_path: pathlib.Path):
    from memorizing.training.identity import open_workdir

    open_workdir(str(tmp_path / "run"), *load_experiment(["smoke"], []))
    # As if it had saved: before that, nothing can be mixed up.
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    written = (tmp_path / "run" / "config.gin").read_text()
    error = mistake("--gin.LMConfig.embed_dim=32", workdir=tmp_path / "run")
    assert "LMConfig.embed_dim" in error and "64" in error and "32" in error
    assert (tmp_path / "run" / "config.gin").read_text() == written, "the other run's configuration was overwritten"
    # A record that was cut short may be of any experiment.
    (tmp_path / "run" / "experiment.json").write_text('{"data": {"name"')
    assert "experiment.json is damaged" in mistake(workdir=tmp_path / "run")
    assert (tmp_path / "run" / "config.gin").read_text() == written


def test_a_run_of_another_seed_or_of_more_steps_is_left_alone(tmp_path: pathlib.Path):
    """Its results were once printed as those of the seed and the length that were given."""
    from memorizing.training.identity import open_workdir

    path = str(tmp_path)
    open_workdir(path, *load_experiment(["smoke"], []))
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    written = (tmp_path / "config.gin").read_bytes()
    other, text = load_experiment(["smoke"], ["LoopConfig.seed=5"])
    with pytest.raises(UserError, match=r"LoopConfig\.seed is 0 there and 5 here.*another --workdir"):
        open_workdir(path, other, text)
    shorter, text = load_experiment(["smoke"], ["LoopConfig.num_steps=19"])
    with pytest.raises(UserError, match=r"LoopConfig\.num_steps = 19, but the run .* has done 20"):
        open_workdir(path, shorter, text)
    assert (tmp_path / "config.gin").read_bytes() == written
    open_workdir(path, shorter, text, restore_step=10)
    open_workdir(path, *load_experiment(["smoke"], ["LoopConfig.num_steps=20"]))


def test_mistakes_after_the_first_checkpoint_folder_leave_no_traceback_either(tmp_path: pathlib.Path):
    """In a process of its own: what libraries say while the interpreter ends is on the user's screen too."""
    command = [sys.executable, "-m", "memorizing", "train", "--gin_file=smoke", f"--workdir={tmp_path}"]
    ended = subprocess.run([*command, "--restore_step=3"], capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert "--restore_step=3" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) <= 3, ended.stderr


def test_gin_files_may_begin_with_a_byte_order_mark_and_end_lines_as_windows_does(tmp_path: pathlib.Path):
    included = tmp_path / "included.gin"
    included.write_bytes("\ufeffLMConfig.num_layers = 1\r\n".encode())
    own = tmp_path / "own.gin"
    own.write_bytes(f"\ufeffinclude 'runs/smoke.gin'\r\ninclude '{included}'\r\nLMConfig.mlp_dim = 8\r\n".encode())
    experiment, _ = load_experiment([str(own)], ["LMConfig.attention_at=()"])
    assert (experiment.model.num_layers, experiment.model.mlp_dim) == (1, 8)


def test_text_that_a_terminal_cannot_show_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit, match="0"):
        main.main(["--help"])
    print("Größe 漢字")
    print("Größe")
    out.flush()
    err.flush()
    assert out.buffer.getvalue().endswith(b"Gr??e ??\nGr??e\n")
    told = err.buffer.getvalue().decode()
    assert len(told.splitlines()) == 1 and "ascii" in told and "PYTHONIOENCODING=utf-8" in told


def test_help_tells_a_newcomer_what_to_type(capsys: pytest.CaptureFixture):
    for arguments in (["--help"], ["train", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main._run(arguments)
        out = capsys.readouterr().out
        assert ended.value.code == 0
        assert "memorizing train" in out and "--gin_file" in out
    # What stands there is there, and what does not is a command away.
    for name in ("demo", "smoke", "dictionary_near", "dictionary", "rmt_curriculum", "add_memory_1b"):
        assert name in out and f"runs/{name}.gin" in FILES
    assert main._run(["gin"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [name for name in FILES if not any(line.split()[:1] == [name.removesuffix(".gin")] for line in lines)] == []
    assert max(map(len, lines)) <= 120


def test_a_gin_file_is_shown(capsys: pytest.CaptureFixture):
    assert main._run(["gin", "demo"]) == 0
    assert capsys.readouterr().out.strip() == (GIN_FOLDER / "runs" / "demo.gin").read_text().strip()
    assert main._run(["gin", "demmo"]) == 2
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize("name", TALK)
def test_tiny_models_of_one_segment_go_with_the_demo_and_can_write(name: str):
    experiment, _ = load_experiment(["demo", f"models/{name}_tiny.gin"], [])
    model = experiment.model
    model.check(experiment.batch.segment_length)
    model.check_can_decode()
    assert not model.has_memory and len(model.groups) == 1
    assert 0 < trace_step(experiment, 1) < 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_go_with_their_segments(name: str):
    files = ["runs/base.gin", f"models/{name}.gin", "tasks/repeated_passages.gin"]
    length = PUBLISHED[name]
    one_row = [f"BatchConfig.segment_length={length}", f"BatchConfig.tokens_per_step={length}"]
    experiment, _ = load_experiment(files, one_row)
    experiment.model.check(length)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("SOURCE=/data/me@host/docs", "SOURCE = '/data/me@host/docs'"),
        ("SOURCE=50%", "SOURCE = '50%'"),
        ("A.b=@C()", "A.b=@C()"),
        ("A.b=(1, %STEPS)", "A.b=(1, %STEPS)"),
        ("A.b=3", "A.b=3"),
    ],
)
def test_words_are_quoted_and_gin_is_not(given: str, read: str):
    assert loading._quote_bare_word(given) == read
