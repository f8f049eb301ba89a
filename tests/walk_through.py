"""The mechanism that docs/adding-a-mechanism.md builds, out of the page itself: the contract tests run over it."""

from __future__ import annotations

import pathlib
import re
import sys
import types

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "adding-a-mechanism.md"


def blocks(language: str) -> list[str]:
    """The code blocks of the page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def module() -> types.ModuleType:
    """The page's first block of Python, as the module that it tells to write."""
    made = types.ModuleType("decaying_average", PAGE.name)
    # Dataclasses look their module up.
    sys.modules[made.__name__] = made
    exec(compile(blocks("python")[0], str(PAGE), "exec"), made.__dict__)
    return made


DecayingAverage = module().DecayingAverage
