"""TensorBoard's event files, on any file system that etils can name."""

from __future__ import annotations

import io
from collections.abc import Mapping

from etils import epath


class TensorBoard:
    """Writes scalars to a folder of event files. A run that goes on from a step hides what lies beyond it."""

    def __init__(self, folder: epath.Path, resumed_step: int) -> None:
        """
        Args:
          folder: of the event files.
          resumed_step: from which the run goes on.
        """
        # Not at the top: an import of a second, only needed where something is written.
        from tensorboardX import SummaryWriter
        from tensorboardX.record_writer import register_writer_factory

        scheme, separator, _ = str(folder).partition("://")
        if separator:
            # tensorboardX would need a library of its own for each store.
            register_writer_factory(scheme, _WholeFiles())
        self._writer = SummaryWriter(logdir=str(folder), purge_step=resumed_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WholeFiles:
    """How tensorboardX opens files where nothing can be appended: the whole file is written again."""

    def open(self, path: str) -> _WholeFile:
        return _WholeFile(epath.Path(path))

    def directory_check(self, path: str) -> None:
        epath.Path(path).mkdir(parents=True, exist_ok=True)


class _WholeFile:
    """A file that is whole in memory, and written every time that tensorboardX flushes it: every two minutes."""

    def __init__(self, path: epath.Path) -> None:
        self._path = path
        self._content = io.BytesIO()

    def write(self, content: bytes) -> None:
        self._content.write(content)

    def flush(self) -> None:
        self._path.write_bytes(self._content.getvalue())

    def close(self) -> None:
        self.flush()
