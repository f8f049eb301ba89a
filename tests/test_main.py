"""What the command line does before any command."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import pathlib

import pytest

from memorizing import main


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    """A machine that has the TPU library and no other plugin of JAX; its devices are the files in the folder."""
    library = importlib.machinery.ModuleSpec("libtpu", None)
    installed = {"libtpu": library, "jax_plugins": None}
    monkeypatch.setattr(importlib.util, "find_spec", installed.get)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
    monkeypatch.setattr(main, "TPU_DEVICES", (f"{tmp_path}/accel*", f"{tmp_path}/vfio/*"))
    return tmp_path


def test_the_tpu_library_is_not_asked_where_there_is_no_tpu(machine: pathlib.Path):
    environment: dict[str, str] = {}
    main.leave_out_absent_tpus(environment)
    assert environment == {"JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize("device", ["accel0", "vfio/0"])
def test_a_tpu_is_used(machine: pathlib.Path, device: str):
    path = machine / device
    path.parent.mkdir(exist_ok=True)
    path.touch()
    environment: dict[str, str] = {}
    main.leave_out_absent_tpus(environment)
    assert environment == {}


def test_the_platform_of_the_user_stays(machine: pathlib.Path):
    environment = {"JAX_PLATFORMS": "tpu"}
    main.leave_out_absent_tpus(environment)
    assert environment == {"JAX_PLATFORMS": "tpu"}


def test_another_accelerator_is_used(machine: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: (group,))
    environment: dict[str, str] = {}
    main.leave_out_absent_tpus(environment)
    assert environment == {}
