"""Shapes and dtypes that the models' signatures state are those that they are called with."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).parents[1]
# The models may not be imported before what checks them: hence a process of their own.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(TESTS)}


# One mechanism of each kind; a step is enough to call everything but what the gradient calls.
SOME = (
    "keeps_shapes and ("
    + " or ".join(("followed", "joint", "gated", "strictly", "merged", "compressive", "adaptive", "(rmt and knn)"))
    + ")"
)
ALL = "keeps_shapes or gradients_are_finite and nan"


@pytest.mark.parametrize("chosen", [SOME, pytest.param(ALL, marks=pytest.mark.nightly)], ids=["some", "all"])
def test_mechanisms_keep_what_their_signatures_state(chosen: str):
    """Every call in a segment checked, and every night in a gradient."""
    arguments = ["-o", "addopts=", "-q", "-p", "shape_checks", "-k", chosen]
    contract = TESTS / "models" / "test_context_contract.py"
    checked = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, str(contract)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert checked.returncode == 0, checked.stdout
    assert "passed" in checked.stdout, checked.stdout


def test_a_wrong_shape_is_seen():
    program = """
import shape_checks
import jax.numpy as jnp
import jaxtyping
from memorizing.models.losses import next_token_nats
next_token_nats(jnp.zeros((2, 3, 5)), jnp.zeros((2, 3), int))
try:
    next_token_nats(jnp.zeros((2, 3, 5)), jnp.zeros((2, 4), int))
except jaxtyping.TypeCheckError as error:
    print(error)
"""
    checked = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True)
    assert "targets" in checked.stdout, checked.stdout + checked.stderr
