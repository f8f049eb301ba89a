"""How many steps the device is given at once, set by a test instead of by the clock."""

from __future__ import annotations

import pytest

from memorizing.evaluation.reading import Pace


def pass_at_once(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """From now on so many steps, as far as there are so many."""
    monkeypatch.setattr(Pace, "number", property(lambda _: number, lambda *_: None), raising=False)
