"""Where commands leave what they found."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from etils import epath

from memorizing.errors import UserError
from memorizing.runtime.json_lines import replace_bytes


def write_files(folder: epath.Path, contents: Mapping[str, bytes]) -> str:
    """Writes results, in the first process, and returns their names.

    Raises:
      UserError: the folder cannot be written.
    """
    if jax.process_index() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in contents.items():
                replace_bytes(folder / name, content)
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror or error})") from error
    return ", ".join(contents)
