"""Sessions by name: those that were used last in memory, all others in files of one folder.

The files are those of `generate --save_session`. What is in memory and not in its file yet is written there before it
leaves the memory; a session that cannot be written stays.
"""

from __future__ import annotations

import collections
import re
import threading
from typing import Any

from etils import epath

from memorizing.errors import UserError
from memorizing.generation.programs import TextState
from memorizing.generation.text_model import TextModel

SUFFIX = ".session"
# Lower case, so that no two names are one file on any file system; no name is hidden, or leads out of the folder.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")


class UnknownSession(UserError):
    """There is no session of this name."""


class CannotBeRead(UserError):
    """The file of a session is damaged, or belongs to another model."""


class CannotBeWritten(UserError):
    """There is no room for the file of a session, or it may not be written."""


class SessionStore:
    """The sessions of a folder. Several threads may use it."""

    def __init__(self, folder: epath.Path, model: TextModel, most_in_memory: int) -> None:
        """
        Args:
          folder: of the files; it exists.
          model: that the sessions belong to.
          most_in_memory: sessions that are kept in memory, at least one.
        """
        self._folder, self._model, self._most_in_memory = folder, model, most_in_memory
        # The one used last at the end.
        self._states: collections.OrderedDict[str, TextState] = collections.OrderedDict()
        self._unsaved: set[str] = set()
        self._lock = threading.Lock()

    def get(self, name: str) -> TextState:
        """A session, on the host; not to be changed.

        Raises:
          UnknownSession: there is none.
          CannotBeRead: its file is damaged, or belongs to another model.
          CannotBeWritten: another session has to leave the memory for it, and cannot be written.
        """
        path = self._path(name)
        with self._lock:
            if name not in self._states:
                if not path.exists():
                    raise UnknownSession(f"there is no session {name!r}: read a text into it first")
                self._admit(name, self._load(path))
            self._states.move_to_end(name)
            return self._states[name]

    def put(self, name: str, state: TextState) -> None:
        """What a session is from now on.

        Raises:
          CannotBeWritten: another session has to leave the memory for it, and cannot be written; nothing has changed.
        """
        self._path(name)
        with self._lock:
            self._admit(name, state)
            self._unsaved.add(name)

    def save(self, name: str) -> None:
        """Writes a session to its file, if it is not there yet. Raises as `get`, and CannotBeWritten."""
        self.get(name)
        with self._lock:
            self._write(name)

    def save_all(self) -> list[CannotBeWritten]:
        """Writes all that is not in files yet; returns what went wrong."""
        errors = []
        with self._lock:
            for name in sorted(self._unsaved):
                try:
                    self._write(name)
                except CannotBeWritten as error:
                    errors.append(error)
        return errors

    def delete(self, name: str) -> None:
        """Forgets a session and deletes its file. Raises UnknownSession if there is none."""
        path = self._path(name)
        with self._lock:
            if name not in self._states and not path.exists():
                raise UnknownSession(f"there is no session {name!r}")
            path.unlink(missing_ok=True)
            self._states.pop(name, None)
            self._unsaved.discard(name)

    def describe(self) -> list[dict[str, Any]]:
        """Every session by name: whether it is in memory, in its file as it is, and how many tokens, if in memory."""
        with self._lock:
            names = {path.name.removesuffix(SUFFIX) for path in self._folder.glob(f"*{SUFFIX}")}
            names = {name for name in names if _NAME.fullmatch(name)} | {*self._states}
            return [self._described(name) for name in sorted(names)]

    def describe_one(self, name: str) -> dict[str, Any]:
        """The same of one session. Raises as `get`."""
        self.get(name)
        with self._lock:
            return self._described(name)

    def _described(self, name: str) -> dict[str, Any]:
        state = self._states.get(name)
        tokens = None if state is None else state.num_tokens
        return {"id": name, "tokens": tokens, "in_memory": state is not None, "saved": name not in self._unsaved}

    def _path(self, name: str) -> epath.Path:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"the session's name {name[:100]!r}: expected up to 100 of a-z, 0-9, '.', '_' and '-', the first a "
                "letter or a digit"
            )
        return self._folder / f"{name}{SUFFIX}"

    def _admit(self, name: str, state: TextState) -> None:
        """Takes a session into the memory, and writes and forgets what was not used for the longest time."""
        while len({*self._states} - {name}) >= self._most_in_memory:
            oldest = next(other for other in self._states if other != name)
            self._write(oldest)
            del self._states[oldest]
        self._states[name] = state
        self._states.move_to_end(name)

    def _load(self, path: epath.Path) -> TextState:
        try:
            return self._model.load(str(path))
        except UserError as error:
            raise CannotBeRead(_without_folder(error, path)) from None

    def _write(self, name: str) -> None:
        if name in self._unsaved:
            path = self._path(name)
            try:
                self._model.save(str(path), self._states[name])
            except UserError as error:
                raise CannotBeWritten(_without_folder(error, path)) from None
            self._unsaved.discard(name)


def _without_folder(error: UserError, path: epath.Path) -> str:
    """What went wrong with a file, for clients: where it lies is not their concern."""
    return str(error).replace(str(path), path.name)
