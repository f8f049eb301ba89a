"""Starts TensorFlow where it is needed: once a process, without its log, away from any accelerator."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from types import ModuleType

import absl.logging

from memorizing.data.errors import DataError


def missing() -> str | None:
    """Name of a package that a seqio Task needs and that is not installed; None where all are.

    TensorFlow and seqio are not there for every Python and platform.
    """
    needed = ("seqio", "tensorflow", "tensorflow_datasets")
    return next((name for name in needed if importlib.util.find_spec(name) is None), None)


def tasks() -> ModuleType:
    """Imports and returns `seqio_tasks`, which needs TensorFlow."""
    with _lock:
        return _tasks()


def _tasks() -> ModuleType:
    if f"{__package__}.seqio_tasks" not in sys.modules:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        # Not only by default: a training process that waits for this one may own the accelerator.
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
        with quiet_stderr():
            importlib.import_module(f"{__package__}.seqio_tasks")
        absl.logging.set_verbosity(absl.logging.ERROR)
    from memorizing.data.tasks import seqio_tasks

    return seqio_tasks


# Only one of several threads starts it.
_lock = threading.Lock()


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Holds back what libraries write to the process's standard error without Python's knowledge.

    It is shown only when the block fails unexpectedly.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held_back:
        original = os.dup(2)
        os.dup2(held_back.fileno(), 2)
        try:
            yield
        except DataError:
            raise
        except Exception:
            held_back.seek(0)
            os.write(original, held_back.read())
            raise
        finally:
            os.dup2(original, 2)
            os.close(original)
