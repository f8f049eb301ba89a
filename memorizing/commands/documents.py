"""What a command reads: a file of text, documents in place of a run's own, or the longest of these."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from etils import epath

from memorizing.batch import DataSource, with_documents
from memorizing.commands import experiment_flags
from memorizing.config.runs import open_run
from memorizing.errors import UserError
from memorizing.evaluation.finished_run import FinishedRun


def open_on_documents(
    workdir: str | None, step: int | None, documents: str | None, bindings: Sequence[str]
) -> FinishedRun:
    """A finished run, on the documents that the user names or else the held-out ones of its data.

    Args:
      workdir: its folder; None for that of the demo.
      step: of the checkpoint; None for the newest.
      documents: where the user's lie; None for the run's own.
      bindings: over the run's own configuration.

    Raises:
      UserError: the run cannot be opened, or reads no text, or the documents cannot be read.
    """
    finished = open_run(workdir or experiment_flags.DEFAULT_WORKDIR, step, bindings)
    if documents is None:
        return finished
    finished.check_data()
    data = with_documents(finished.experiment.data, documents, lambda line: print(line, flush=True))
    if data is None:
        raise UserError(f"--documents={documents}: the data of {finished.workdir} is no text")
    return dataclasses.replace(finished, experiment=dataclasses.replace(finished.experiment, data=data))


def read_text(path: epath.Path, named: str, not_utf8: str, not_text: str) -> str:
    """The text of a file.

    Args:
      path: of the file.
      named: the flag and what the user gave it, with which every message begins.
      not_utf8: how the message goes on where the file is not UTF-8; `{place}` is the first wrong byte's place in the
        file, `{byte}` its value.
      not_text: how it goes on where the file has a zero byte, as binary files do; `{place}` is the place of that.

    Raises:
      UserError: the file cannot be read, or is no text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{named}: cannot be read ({error.strerror or error})") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = not_utf8.format(place=error.start, byte=content[error.start])
        raise UserError(f"{named} {reason}") from error
    if "\0" in text:
        reason = not_text.format(place=content.index(0))
        raise UserError(f"{named} {reason}")
    return text


def longest_document(data: DataSource) -> int:
    """Index of the held-out document with the most bytes; the first one, where documents have none."""
    if data.document_bytes is None:
        return 0
    return int(np.argmax(data.document_bytes))
