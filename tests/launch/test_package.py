"""What ships with the launcher: modules that need nothing, an image that holds the package, a file for SkyPilot."""

from __future__ import annotations

import ast
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from memorizing.launch.restarts import START_AGAIN
from memorizing.launch.slices import SLICES

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
MODULES = sorted(path.stem for path in LAUNCH.glob("*.py"))


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_each_other_and_yaml(module: str):
    """Neither jax nor the library.

    The launcher knows the command line, the environment and the exit codes of a training process, and nothing else.
    """
    imported = set()
    for node in ast.walk(ast.parse((LAUNCH / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add(node.module)
    outside = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert outside <= {"yaml"}


def test_the_launcher_loads_nothing_of_the_library():
    imports = "".join(f"import memorizing.launch.{module}\n" for module in MODULES if module != "__init__")
    unwanted = "[name for name in sys.modules if name.split('.')[0] in ('jax', 'flax', 'numpy', 'gin') or name.startswith('memorizing.') and not name.startswith('memorizing.launch')]"
    ended = subprocess.run(
        [sys.executable, "-c", f"{imports}import sys\nprint({unwanted})"], capture_output=True, text=True
    )
    assert ended.stdout.strip() == "[]", ended.stdout + ended.stderr


def test_the_image_gets_everything_that_the_package_needs(tmp_path: pathlib.Path):
    """Builds the package from what the Dockerfile copies, and from nothing else."""
    source, built = tmp_path / "source", tmp_path / "built"
    source.mkdir()
    sent = set(re.findall(r"^!(.+)$", (LAUNCH / "Dockerfile.dockerignore").read_text(), re.MULTILINE))
    for line in re.findall(r"^COPY (.+)$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE):
        *names, target = line.split()
        assert set(names) <= sent, "the ignore file keeps it from the builder"
        for name in names:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, source / target)
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    command = [sys.executable, "setup.py", "-q", "build_py", f"--build-lib={built}"]
    ended = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    shipped = {
        "launch/command.py",
        "launch/sky.yaml",
        "launch/Dockerfile",
        "gin/runs/demo.gin",
        "data/streams/segments.py",
    }
    assert not [name for name in shipped if not (built / "memorizing" / name).exists()]


def test_skypilot_keeps_the_contract():
    document = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    resources = document["resources"]
    entry = SLICES[resources["accelerators"].removeprefix("tpu-")]
    assert resources["accelerator_args"]["runtime_version"] == entry.runtime_version
    assert resources["job_recovery"]["recover_on_exit_codes"] == [START_AGAIN]
    # Without `exec` a shell stands between the program and SIGTERM.
    command = document["run"]
    assert command.startswith("exec ")
    # `-m` would import what lies in the folder that is copied along, without data/ and launch/ in it.
    assert "/bin/memorizing train " in command and " -m " not in command
    assert set(re.findall(r"\$(\w+)", command)) <= set(document["envs"])


def test_skypilot_accepts_its_file():
    sky = pytest.importorskip("sky", reason="skypilot is not installed")
    document = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    given = [("WORKDIR", "gs://bucket/first"), ("GIN_FILE", "smoke")]
    assert sky.Task.from_yaml_config(document, env_overrides=given).envs["GIN_FILE"] == "smoke"
