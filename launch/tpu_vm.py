"""Command lines of the backend `tpu-vm`: queued resources of the Cloud TPU API, and a container on every host.

Nothing here runs anything; `supervisor` does. The program runs in a container of the host's Docker, so that it outlives
the connection that started it, gets SIGTERM itself when the host goes down, and leaves its exit code and its output
behind.
"""

from __future__ import annotations

import dataclasses
import re
import shlex

from .errors import LaunchError
from .job import Job
from .restarts import START_AGAIN

# Seconds that a container gets to save when it is stopped.
GRACE_S = 120
# The beginning of the line that tells the state of a host's container.
STATE_MARK = "memorizing-state"
# The port of the coordinator: JAX's default, 8482, is closed in the firewall of some TPU machines.
COORDINATOR_PORT = 8476
_ZONE = re.compile(r"[a-z]+(-[a-z0-9]+)+")
_PROJECT = re.compile(r"([a-z0-9.-]+:)?[a-z][-a-z0-9]*[a-z0-9]")
_GOOGLE_REGISTRY = re.compile(r"([a-z0-9-]+-docker\.pkg\.dev|([a-z]+\.)?gcr\.io)/")


@dataclasses.dataclass(frozen=True)
class Zone:
    """Where a job gets its machines. Raises LaunchError for a name that cannot be one."""

    zone: str
    project: str | None = None

    def __post_init__(self) -> None:
        if not _ZONE.fullmatch(self.zone):
            raise LaunchError(f"--zone={self.zone!r}: expected a zone such as europe-west4-a")
        if self.project is not None and not _PROJECT.fullmatch(self.project):
            raise LaunchError(f"--project={self.project!r}: expected the id of a Google Cloud project")

    @property
    def flags(self) -> list[str]:
        """Flags of gcloud."""
        project = [f"--project={self.project}"] if self.project else []
        return [f"--zone={self.zone}", *project]


def nodes(job: Job) -> list[str]:
    """Names of the TPUs of a request, one a slice."""
    if job.slices == 1:
        return [job.name]
    return [f"{job.name}-{index}" for index in range(job.slices)]


def create_command(job: Job, zone: Zone) -> list[str]:
    """Asks for the machines."""
    if job.slices == 1:
        names = [f"--node-id={job.name}"]
    else:
        names = [f"--node-count={job.slices}", f"--node-prefix={job.name}"]
    spot = ["--spot"] if job.spot else []
    return [
        *_queued("create", job, zone),
        *names,
        f"--accelerator-type={job.machine.name}",
        f"--runtime-version={job.machine.runtime_version}",
        *spot,
        "--quiet",
    ]


def describe_command(job: Job, zone: Zone) -> list[str]:
    """Prints the state of the request."""
    return [*_queued("describe", job, zone), "--format=value(state.state)"]


def delete_command(job: Job, zone: Zone) -> list[str]:
    """Gives the machines back, and deletes the request: a suspended one is never queued again and holds quota."""
    return [*_queued("delete", job, zone), "--force", "--quiet"]


def on_hosts(node: str, zone: Zone, script: str, worker: str = "all") -> list[str]:
    """Runs a shell script on the hosts of a TPU."""
    return [
        *("gcloud", "compute", "tpus", "tpu-vm", "ssh", node, *zone.flags),
        f"--worker={worker}",
        "--quiet",
        "--strict-host-key-checking=no",
        f"--command={script}",
    ]


def pull_script(job: Job) -> str:
    """Fetches the image, so that all hosts start at the same time afterwards."""
    image = _image(job)
    registry = _GOOGLE_REGISTRY.match(image)
    login = f"sudo gcloud auth configure-docker {registry.group(1)} --quiet && " if registry else ""
    return f"{login}sudo docker pull --quiet {shlex.quote(image)}"


def start_script(job: Job) -> str:
    """Starts the program on a host, in place of an earlier attempt."""
    name = shlex.quote(job.name)
    variables = [entry.variable for entry in job.secrets]
    fetch = ""
    for entry in job.secrets:
        value = f'"$(gcloud secrets versions access latest --secret={shlex.quote(entry.secret)})"'
        fetch += f"{entry.variable}={value} && export {entry.variable} && "
    sudo = ["sudo"]
    if variables:
        sudo.append(f"--preserve-env={','.join(variables)}")
    environment = {"JAX_COORDINATOR_PORT": str(COORDINATOR_PORT)} | job.tpu_environment()
    run = [
        *(*sudo, "docker", "run", "--detach", f"--name={job.name}", "--net=host", "--privileged"),
        *("--shm-size=16g", f"--stop-timeout={GRACE_S}"),
        *(f"--env={name}={value}" for name, value in environment.items()),
        *(f"--env={variable}" for variable in variables),
        *("--entrypoint=", _image(job)),
        *job.command(),
    ]
    return f"sudo docker rm --force {name} >/dev/null 2>&1; {fetch}{shlex.join(run)}"


def state_script(job: Job) -> str:
    """Prints one line a host: `memorizing-state STATUS EXIT_CODE`."""
    name = shlex.quote(job.name)
    form = shlex.quote(f"{STATE_MARK} {{{{.State.Status}}}} {{{{.State.ExitCode}}}}")
    return f"sudo docker inspect --format={form} {name} 2>/dev/null || echo {STATE_MARK} missing 0"


def logs_script(job: Job, lines: int | None, follow: bool = False) -> str:
    """Prints the output of the program."""
    command = ["sudo", "docker", "logs"]
    if lines is not None:
        command.append(f"--tail={lines}")
    if follow:
        command.append("--follow")
    command.append(job.name)
    return f"{shlex.join(command)} 2>&1"


def collect_script(job: Job) -> str:
    """Prints the output of the program with the host's name before every line."""
    return f'{logs_script(job, None)} | sed "s/^/$(hostname): /"'


def stop_script(job: Job) -> str:
    """Lets the program save, and waits until it has."""
    return f"sudo docker stop --time={GRACE_S} {shlex.quote(job.name)}"


def plan(job: Job, zone: Zone, poll_s: float, keep: bool) -> str:
    """What the supervisor would run, as text for a shell, with what it looks for."""

    def on_all(script: str) -> list[str]:
        return [shlex.join(on_hosts(node, zone, script)) for node in nodes(job)]

    again = (
        "one that is SUSPENDED or FAILED is deleted and asked for again; "
        f"exit code {START_AGAIN} starts again, 1 up to {job.restarts} times, 2 never"
    )
    lines = [
        "# ask for the machines",
        shlex.join(create_command(job, zone)),
        f"# every {poll_s:g} s until it says ACTIVE; {again}",
        shlex.join(describe_command(job, zone)),
        f"# fetch the image, then start on all {job.hosts} hosts",
        *on_all(pull_script(job)),
        *on_all(start_script(job)),
        f"# every {poll_s:g} s: how the program fares on every host",
        *on_all(state_script(job)),
    ]
    if keep:
        lines.append("# at the end: nothing, the machines stay (--keep)")
    else:
        lines += ["# at the end", shlex.join(delete_command(job, zone))]
    return "\n".join(lines)


def _image(job: Job) -> str:
    assert job.image is not None, "a job on TPU machines has an image"
    return job.image


def _queued(verb: str, job: Job, zone: Zone) -> list[str]:
    return ["gcloud", "compute", "tpus", "queued-resources", verb, job.name, *zone.flags]
