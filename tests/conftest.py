"""What all tests share.

Eight CPU devices, strict JAX, reproducible hypothesis, a compilation cache, programs that compile fast.
"""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator

assert "jax" not in sys.modules, "devices are chosen when JAX is imported: conftest.py has to come first"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
# For workers and the processes that tests start, as the command line has it: see `main.start_with_large_pages`.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
# Every program is compiled once, for all workers and for the processes that tests start.
if "PYTEST_XDIST_WORKER" not in os.environ:
    CACHE = tempfile.mkdtemp(prefix="memorizing-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
# Compiling is most of the suite's time: the older way to emit fused loops takes half as long as the newer one, and code
# in one piece less than in parts that threads would share. An XLA that does not know a flag would abort.
if "XLA_FLAGS" not in os.environ:
    flags = {"XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"}
    trial = [sys.executable, "-c", "import jax; jax.devices()"]
    if subprocess.run(trial, env=os.environ | flags, capture_output=True).returncode == 0:
        os.environ |= flags
# A shell ignores Ctrl-C for what it starts in the background, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from mechanisms import MECHANISMS, Mechanism  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
# Programs here run for milliseconds and compile for seconds; the fixture `optimized` is for the others.
jax.config.update("jax_disable_most_optimizations", True)
# [N] + [T, N] is more often a mistake than a wish.
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("memorizing", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("memorizing")


# Compiled programs stay until the end, and the collector would look through their millions of objects ever again.
gc.set_threshold(50_000)


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_look_through() -> Iterator[None]:
    """What is left of a file's tests is taken out of the collector's sight."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def optimized() -> Iterator[None]:
    """Compiles as a user's run does, but for how loops are emitted."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(params=MECHANISMS, ids=lambda mechanism: mechanism.name)
def mechanism(request: pytest.FixtureRequest) -> Mechanism:
    """Each mechanism in turn."""
    return request.param
