"""Commands beside training that are killed before any of the changes they make to files.

What is there then is whole, of this time or of the time before, and the same command makes the rest.
"""

from __future__ import annotations

import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
from tiny_texts import MEMORY, finished_run

PROGRAM = pathlib.Path(__file__).parents[1] / "killed_at_write.py"
# More changes than any of them makes.
NEVER = 1000

COMMANDS = {
    "evaluate": ["evaluate", "--workdir={folder}/run", f"--memory_sizes={MEMORY}"],
    "inspect": ["inspect", "--workdir={folder}/run"],
    "session": [
        "generate",
        "--workdir={folder}/run",
        "--prompt=abc def",
        "--num_tokens=0",
        "--save_session={folder}/run/read.session",
    ],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("trained")
    finished_run(folder / "run")
    return folder


def run(folder: pathlib.Path, command: list[str], place: int) -> int:
    arguments = [argument.format(folder=folder) for argument in command]
    process = subprocess.run(
        [sys.executable, str(PROGRAM), str(place), str(folder), *arguments],
        stdout=subprocess.DEVNULL,
        timeout=300,
    )
    return process.returncode


def results(folder: pathlib.Path) -> dict[str, bytes]:
    """What can be found in a folder by its name; unfinished files begin with a dot."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.nightly
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_what_a_killed_command_leaves_is_whole(trained: pathlib.Path, tmp_path: pathlib.Path, command: list[str]):
    # One path for both: results name it.
    folder = tmp_path / "runs"
    shutil.copytree(trained, folder)
    assert run(folder, command, NEVER) == 0
    expected = results(folder)
    assert len(expected) > len(results(trained))

    shutil.rmtree(folder)
    shutil.copytree(trained, folder)
    for place in range(NEVER):
        code = run(folder, command, place)
        for name, content in results(folder).items():
            assert content == expected[name], f"{name}, killed before change {place}"
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert place >= 2
    assert results(folder).keys() == expected.keys()
