"""The order of theories by their imports."""

from __future__ import annotations

import posixpath
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping

from memorizing.data.formats import isabelle_syntax

_SUFFIX = ".thy"


def import_order(theories: Mapping[str, str], sessions: Collection[str]) -> list[str]:
    """Sorts theories so that none comes before one that it imports.

    A theory comes right after those of its imports that no earlier theory needed, in the order in which it names them.
    Where imports do not decide, names do. Theories that import one another in a circle, which Isabelle refuses, come in
    some order.

    Args:
      theories: texts by the names of their files.
      sessions: names of the sessions that these theories belong to: "SESSION.NAME" imports one of them.

    Returns:
      The names of the files.
    """
    resolve = _Resolver(theories, sessions)
    needed = {name: [*resolve(name, isabelle_syntax.imports(text))] for name, text in theories.items()}
    order: list[str] = []
    seen: set[str] = set()
    for first in sorted(theories):
        # A stack instead of recursion, since a chain of imports may be long.
        pending = [] if first in seen else [(first, iter(needed[first]))]
        seen.add(first)
        while pending:
            name, rest = pending[-1]
            following = next((other for other in rest if other not in seen), None)
            if following is None:
                order.append(name)
                pending.pop()
            else:
                seen.add(following)
                pending.append((following, iter(needed[following])))
    return order


class _Resolver:
    """Which file an import means."""

    def __init__(self, files: Collection[str], sessions: Collection[str]) -> None:
        self._files = frozenset(files)
        self._sessions = frozenset(sessions)
        self._by_theory: dict[str, list[str]] = defaultdict(list)
        for file in sorted(files):
            self._by_theory[posixpath.basename(file).removesuffix(_SUFFIX)].append(file)

    def __call__(self, importing: str, imports: list[str]) -> Iterator[str]:
        """Yields the files among ours that the theory in the file `importing` imports."""
        for imported in imports:
            file = self._file(posixpath.dirname(importing), imported)
            if file is not None and file != importing:
                yield file

    def _file(self, folder: str, imported: str) -> str | None:
        first, _, rest = imported.partition("/")
        if first in ("~~", "$AFP", "$ISABELLE_HOME"):
            # From the top of a library, above which there may be more.
            return next((file for file in self._files if f"/{file}".endswith(f"/{rest}{_SUFFIX}")), None)
        if rest:
            path = posixpath.normpath(posixpath.join(folder, imported)) + _SUFFIX
            return path if path in self._files else None
        session, dot, theory = imported.rpartition(".")
        if dot and session not in self._sessions:
            return None
        return self._nearest(folder, theory)

    def _nearest(self, folder: str, theory: str) -> str | None:
        """The file of a theory: in the folder itself, else the one that shares most of its path with it."""

        def distance(file: str) -> tuple[int, int]:
            other = posixpath.dirname(file)
            shared = len(posixpath.commonpath((f"/{folder}", f"/{other}")))
            return (other != folder, -shared)

        return min(self._by_theory.get(theory, ()), key=distance, default=None)
