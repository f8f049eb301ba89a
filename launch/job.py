"""What a job is: everything that every backend needs to know, and nothing about where it runs."""

from __future__ import annotations

import dataclasses
import difflib
import re

from .errors import LaunchError
from .slices import SLICES, Slice

PROGRAM = ("python", "-m", "memorizing", "train")

# A DNS label that begins with a letter. JobSet and GKE make names of pods from it, of at most 63 characters:
# '-slice-0-0-' and a suffix have to fit behind it.
MAX_NAME = 40
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_IMAGE = re.compile(r"[A-Za-z0-9][\w./:@-]*")
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_REFERENCE = re.compile(r"[A-Za-z0-9]([-\w.]*[A-Za-z0-9])?")
_SOUNDS_SECRET = re.compile(r"(^|_)(SECRETS?|TOKENS?|PASSWORD|PASSWD|CREDENTIALS?|KEY|APIKEY)(_|$)", re.IGNORECASE)
_PASSWORD_IN_ADDRESS = re.compile(r"://[^/\s@:]*:[^/\s@]+@")
# How a process finds the others: memorizing/runtime/distributed.py reads it.
_OURS = tuple(
    f"MEMORIZING_{name}" for name in ("COORDINATOR", "NUM_PROCESSES", "PROCESS_ID", "CPU_DEVICES", "DISTRIBUTED")
)


@dataclasses.dataclass(frozen=True)
class Secret:
    """An environment variable whose value lies in a secret store.

    The value is fetched where the program runs, and is never printed or written here.

    Attributes:
      variable: name of the environment variable.
      secret: name of the secret: a Kubernetes Secret, or one of Secret Manager.
    """

    variable: str
    secret: str


@dataclasses.dataclass(frozen=True)
class Job:
    """A job, the same for every backend. Raises LaunchError for what cannot work.

    Attributes:
      name: a DNS label.
      program: what every host runs, before its flags.
      gin_files, workdir, arguments, bindings: the flags, in the order of the command line of `memorizing train`;
        bindings without `--gin.`.
      slice, slices: kind and number of TPU slices; None where the backend has no TPU.
      image: container image that holds the program.
      spot: on machines that may be taken away.
      restarts: failures after which the job is started again; a preemption is no failure.
      environment: variables and values, for all processes.
      secrets: variables whose values lie in a secret store.
    """

    name: str
    program: tuple[str, ...] = PROGRAM
    gin_files: tuple[str, ...] = ()
    workdir: str | None = None
    arguments: tuple[str, ...] = ()
    bindings: tuple[str, ...] = ()
    slice: str | None = None
    slices: int = 1
    image: str | None = None
    spot: bool = True
    restarts: int = 10
    environment: tuple[tuple[str, str], ...] = ()
    secrets: tuple[Secret, ...] = ()

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.slice is not None:
            _check_slices(self.slice, self.slices)
        if self.restarts < 0:
            raise LaunchError(f"--restarts={self.restarts}: expected 0 or more")
        if self.image is not None and not _IMAGE.fullmatch(self.image):
            raise LaunchError(
                f"--image={self.image!r}: expected a reference such as "
                "us-docker.pkg.dev/PROJECT/REPOSITORY/memorizing:TAG"
            )
        if not self.program:
            raise LaunchError("--program is empty: name the program that every host runs")
        for text in self.command():
            _check_text(text, "an argument")
        for variable, value in self.environment:
            _check_variable(variable, value)
        for secret in self.secrets:
            _check_variable_name(secret.variable, "--secret")
            if not _SECRET_REFERENCE.fullmatch(secret.secret):
                raise LaunchError(
                    f"--secret={secret.variable}={secret.secret!r}: expected --secret=VARIABLE=NAME, the name of a "
                    "secret and not its value"
                )

    def command(self) -> list[str]:
        """The program and its flags, exactly as it shall receive them."""
        words = list(self.program)
        words += [f"--gin_file={file}" for file in self.gin_files]
        if self.workdir is not None:
            words.append(f"--workdir={self.workdir}")
        words += self.arguments
        words += [f"--gin.{binding}" for binding in self.bindings]
        return words

    @property
    def machine(self) -> Slice:
        """The row of the table of slices. For a job on TPUs only."""
        assert self.slice is not None, "this job has no slice"
        return SLICES[self.slice]

    @property
    def hosts(self) -> int:
        """Hosts of all slices together."""
        return self.machine.hosts * self.slices

    def tpu_environment(self) -> dict[str, str]:
        """Variables of a process on a TPU host. JAX finds the other hosts itself."""
        distributed = {"MEMORIZING_DISTRIBUTED": "1"} if self.hosts > 1 else {}
        return distributed | {"PYTHONUNBUFFERED": "1"} | dict(self.environment)


def check_name(name: str) -> str:
    """The name, if it is a DNS label of a length that all backends take. Raises LaunchError."""
    if _NAME.fullmatch(name) and len(name) <= MAX_NAME:
        return name
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-0123456789")[:MAX_NAME].strip("-")
    hint = f"; {plain} would do" if plain else ""
    raise LaunchError(
        f"name {name!r}: expected a DNS label: lower-case letters, digits and '-', a letter first, no '-' at the end, "
        f"at most {MAX_NAME} characters{hint}"
    )


def nearest(name: str, known: list[str]) -> str:
    """'; did you mean NAME?', or nothing."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


def _check_slices(name: str, count: int) -> None:
    if name not in SLICES:
        raise LaunchError(
            f"--slice={name}: there is no such slice{nearest(name, list(SLICES))} (all: memorizing launch slices)"
        )
    if count < 1:
        raise LaunchError(f"--slices={count}: expected 1 or more")
    if count > 1 and (SLICES[name].hosts == 1 or SLICES[name].generation == "v3"):
        why = "v3 has no multislice" if SLICES[name].generation == "v3" else "multislice joins slices of several hosts"
        raise LaunchError(
            f"--slices={count} of {name}: {why}; take one larger slice, or v4, v5p, v5litepod or v6e of 16 or more"
        )


def _check_text(text: str, what: str) -> None:
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise LaunchError(f"{what} holds a character that no program can receive: {text!r}")
    if _PASSWORD_IN_ADDRESS.search(text):
        raise LaunchError(
            f"{what} holds an address with a password in it, which would be printed and stored: "
            "use --secret=VARIABLE=NAME"
        )


def _check_variable(variable: str, value: str) -> None:
    _check_variable_name(variable, "--env")
    if _SOUNDS_SECRET.search(variable):
        raise LaunchError(
            f"--env={variable}: it looks like a secret, which would be printed and stored; "
            f"give --secret={variable}=NAME, the name of a secret that holds it"
        )
    _check_text(value, f"--env={variable}")


def _check_variable_name(variable: str, flag: str) -> None:
    if not _ENVIRONMENT_NAME.fullmatch(variable):
        raise LaunchError(f"{flag}={variable!r}: expected NAME=VALUE with letters, digits and '_' in the name")
    if variable in _OURS:
        raise LaunchError(f"{flag}={variable}: the launcher sets it itself")
