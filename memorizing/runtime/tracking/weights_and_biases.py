"""Weights & Biases, for who asks for it: `pip install 'memorizing[wandb]'`."""

from __future__ import annotations

import importlib.util
import json
import secrets
import tempfile
from collections.abc import Mapping

from etils import epath

from memorizing.errors import UserError, first_line
from memorizing.runtime.json_lines import replace_text

# Says under which name the run is known there, so that a run that goes on is the same one.
FILE = "wandb.json"


def check(project: str) -> None:
    """Raises UserError where a project is asked for and its library is missing."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"LoopConfig.wandb_project = {project!r}: Weights & Biases is not installed: "
            "pip install 'memorizing[wandb]', or leave it empty"
        )


class WeightsAndBiases:
    """Sends metrics to a project. Its own variables say who and how: WANDB_API_KEY, WANDB_MODE=offline, ...

    Only metrics and the configuration are sent: no code, no state of a repository, nothing of what is printed.
    """

    def __init__(self, workdir: epath.Path, project: str, config: Mapping[str, str]) -> None:
        """
        Args:
          workdir: the run's folder; what is kept until it is sent lies there, or in a temporary folder where that is
            on another machine.
          project: there.
          config: settings by name.

        Raises:
          UserError: Weights & Biases refuses, or does not know who this is.
        """
        import wandb

        is_remote = "://" in str(workdir)
        folder = tempfile.mkdtemp(prefix="memorizing-wandb-") if is_remote else str(workdir)
        settings = wandb.Settings(console="off", disable_git=True, disable_code=True, save_code=False, silent=True)
        try:
            self._run = wandb.init(
                project=project,
                name=workdir.name,
                id=_name_of(workdir),
                resume="allow",
                dir=folder,
                config=dict(config),
                settings=settings,
            )
        except wandb.Error as error:
            raise UserError(
                f"LoopConfig.wandb_project = {project!r}: {first_line(error)}; log in (wandb login), keep it here "
                "(WANDB_MODE=offline), or leave it empty"
            ) from None
        # A run that goes on writes some steps again: the later values count.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


def _name_of(workdir: epath.Path) -> str:
    path = workdir / FILE
    try:
        name = json.loads(path.read_text())["id"]
    except (OSError, ValueError, KeyError, TypeError):
        name = secrets.token_hex(8)
        replace_text(path, json.dumps({"id": name}) + "\n")
    return str(name)
