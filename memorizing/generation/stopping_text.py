"""Text that comes in parts and ends before the first of some texts: what `stop` and `until` ask for."""

from __future__ import annotations

from collections.abc import Sequence


class StoppingText:
    """Text that is passed on as soon as it is certain.

    Attributes:
      has_stopped: whether one of the stopping texts has come.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """
        Args:
          stop: the texts, none of them empty; none for a text that goes on to its end.
        """
        self._stop = stop
        self.has_stopped = False
        # What may be the beginning of one of them.
        self._held = ""

    def add(self, part: str) -> str:
        """What is certain with this part."""
        if self.has_stopped:
            return ""
        self._held += part
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        self.has_stopped = bool(places)
        size = min(places, default=len(self._held) - self._num_open())
        released, self._held = self._held[:size], self._held[size:]
        return released

    def end(self) -> str:
        """What is left when no part comes any more."""
        return "" if self.has_stopped else self._held

    def _num_open(self) -> int:
        """Characters at the end with which a stopping text may have begun."""
        most = max(map(len, self._stop), default=1) - 1
        ends = (self._held[-size:] for size in range(min(most, len(self._held)), 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stop)), 0)
