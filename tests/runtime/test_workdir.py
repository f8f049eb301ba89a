"""The files that describe a run are what was written, or are refused in one line, whatever bit of them is changed."""

from __future__ import annotations

import pathlib

import pytest
from damage import damages
from etils import epath

from memorizing.errors import UserError
from memorizing.runtime import workdir
from memorizing.runtime.json_lines import JsonLines, read_lines

TEXT = "LMConfig.num_layers = 2\nLMConfig.dtype = 'bfloat16'\n"


def test_a_record_is_read_as_it_was_written_or_refused(tmp_path: pathlib.Path):
    path = epath.Path(tmp_path) / "vocabulary.json"
    workdir.write_record(path, {"name": "bytes", "size": 259})
    content = path.read_bytes()
    record = {"format": workdir.FORMAT, "name": "bytes", "size": 259}
    assert workdir.read_record(path) == record
    for damaged in damages(path):
        try:
            assert workdir.read_record(path) == record
        except UserError as error:
            assert "vocabulary.json" in str(error) and "\n" not in str(error)
            continue
        # White space between the entries.
        assert damaged.split() == content.split() or len(damaged) == len(content) - 1


def test_a_configuration_is_read_as_it_was_written_or_refused(tmp_path: pathlib.Path):
    folder = epath.Path(tmp_path)
    workdir.write_config(folder, TEXT)
    path = folder / workdir.CONFIG
    content = path.read_bytes()
    assert content.startswith(TEXT.encode())
    assert workdir.read_config(folder) == TEXT
    for _ in damages(path):
        with pytest.raises(UserError, match=r"config\.gin is not as it was written.*--gin\.NAME=VALUE"):
            workdir.read_config(folder)


def test_lines_that_a_killed_process_left_unfinished_are_left_out_and_no_others(tmp_path: pathlib.Path):
    """A damaged line is named: to leave out what follows would lose it."""
    path = epath.Path(tmp_path) / "metrics.jsonl"
    whole = '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    for length in range(len(whole)):
        path.write_text(whole[:length])
        assert read_lines(path, ["step"]) == [{"step": step + 1} for step in range(whole[:length].count("\n"))]
    for damaged in ('{"step: 2}', '{"stap": 2}', "2", "", "\x00" * 11, "\ud800"):
        path.write_bytes(whole.replace('{"step": 2}', damaged).encode(errors="surrogatepass"))
        with pytest.raises(UserError, match=r"metrics\.jsonl is damaged in line 2: .*delete the line"):
            JsonLines(path, ["step"])
        assert b'{"step": 3}' in path.read_bytes()
