"""The command `launch`: starts a job on a pod or on this machine, and looks after it."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from . import gke, local, supervisor, tpu_vm, verbs
from .errors import LaunchError
from .gke import Cluster
from .job import PROGRAM, Job, Secret
from .local import Hosts
from .record import Record
from .restarts import DONE, FAILED, MISTAKE
from .slices import SLICES
from .supervisor import Pace
from .tpu_vm import Zone

_MOST = 2**31 - 1

Launch = Callable[[argparse.Namespace, Sequence[str]], int]

DESCRIPTION = """\
Starts `memorizing train` (or another command) on many hosts. What follows `--` are its own flags:

  memorizing launch local --hosts=2 --devices=4 -- --gin_file=smoke --workdir=/tmp/run
  memorizing launch gke --name=first --slice=v5litepod-32 --image=IMAGE -- --gin_file=RUN --workdir=gs://BUCKET/first --gin.LoopConfig.num_steps=1000
  memorizing launch tpu-vm --name=first --slice=v3-32 --zone=europe-west4-a --image=IMAGE -- --gin_file=RUN --workdir=gs://BUCKET/first

gke and tpu-vm print what they would run, and run it with --apply.

The program says by its exit code what is to happen: 0 done; 42 saved, start me again (as often as it says so, and whenever machines are taken away);
1 failed, start again up to --restarts times; 2 something given is wrong, stop.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.description = DESCRIPTION
    backends = parser.add_subparsers(metavar="BACKEND|VERB", required=True)
    _add_gke(_add(backends, "gke", "a JobSet for Google Kubernetes Engine", _launch_gke))
    _add_tpu_vm(_add(backends, "tpu-vm", "queued resources of the Cloud TPU API, supervised from here", _launch_tpu_vm))
    _add_local(_add(backends, "local", "processes on this machine, with CPU devices", _launch_local))
    status = _add(
        backends, "status", "how a job fares; without a name, all jobs", lambda options, _: verbs.status(options.name)
    )
    status.add_argument("name", nargs="?")
    logs = _add(
        backends,
        "logs",
        "the output of a job",
        lambda options, _: verbs.logs(options.name, options.process, options.lines, options.follow),
    )
    logs.add_argument("name")
    logs.add_argument("--process", type=_number(int, 0, _MOST), default=0, help="of which process (default: 0)")
    logs.add_argument(
        "--lines", type=_number(int, 0, _MOST), default=100, help="how many of the last lines (default: 100)"
    )
    logs.add_argument("--follow", action="store_true", help="go on as more comes")
    _add(backends, "stop", "let a job save and end it", lambda options, _: verbs.stop(options.name)).add_argument(
        "name"
    )
    _add(backends, "slices", "the TPU slices that exist", _print_slices)


def run(options: argparse.Namespace, bindings: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    try:
        return options.launch(options, bindings)
    except LaunchError as error:
        print(f"memorizing: {error}", file=sys.stderr)
        return MISTAKE


def _add(backends: argparse._SubParsersAction, name: str, summary: str, launch: Launch) -> argparse.ArgumentParser:
    parser = backends.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(launch=launch)
    return parser


def _add_job(parser: argparse.ArgumentParser, restarts: int, name: str | None) -> None:
    parser.add_argument(
        "--name",
        required=name is None,
        default=name,
        help="a DNS label, the name of the job" + (f" (default: {name})" if name else ""),
    )
    parser.add_argument(
        "--restarts",
        type=_number(int, 0, _MOST),
        default=restarts,
        metavar="N",
        help=f"failures that are started again; preemptions do not count (default: {restarts})",
    )
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="a variable for every process; repeatable"
    )
    parser.add_argument("--program", metavar="COMMAND", help="what to run instead of `python -m memorizing train`")
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="-- [COMMAND] FLAGS",
        help="flags of the program; of `memorizing COMMAND` if a command comes first",
    )


def _add_pod(parser: argparse.ArgumentParser) -> None:
    _add_job(parser, restarts=10, name=None)
    parser.add_argument(
        "--slice", required=True, help="kind of TPU slice, such as v3-32 (all: memorizing launch slices)"
    )
    parser.add_argument(
        "--slices", type=_number(int, 1, 2**16), default=1, metavar="N", help="number of slices (default: 1)"
    )
    parser.add_argument(
        "--image", required=True, help="container image with the program: docker build -f launch/Dockerfile ."
    )
    parser.add_argument(
        "--spot",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="machines that may be taken away (default: yes)",
    )
    parser.add_argument(
        "--secret",
        action="append",
        default=[],
        metavar="VARIABLE=NAME",
        help="a variable whose value lies in the secret NAME; repeatable",
    )
    parser.add_argument("--apply", action="store_true", help="run what is printed")


def _add_gke(parser: argparse.ArgumentParser) -> None:
    _add_pod(parser)
    parser.add_argument("--context", help="context of kubectl (default: the current one)")
    parser.add_argument("--namespace", help="namespace (default: that of the context)")
    parser.add_argument("--queue", help="local queue of Kueue, if the cluster has it")
    parser.add_argument("--service_account", help="service account of Kubernetes, as which the pods reach buckets")


def _add_tpu_vm(parser: argparse.ArgumentParser) -> None:
    _add_pod(parser)
    parser.add_argument("--zone", required=True, help="such as europe-west4-a")
    parser.add_argument("--project", help="project of Google Cloud (default: that of gcloud)")
    parser.add_argument(
        "--poll",
        type=_number(float, 1e-3, 1e6),
        default=30.0,
        metavar="S",
        help="seconds between two looks at the machines (default: 30)",
    )
    parser.add_argument(
        "--grace",
        type=_number(float, 0, 1e6),
        default=180.0,
        metavar="S",
        help="seconds for the other hosts when the program has ended with an error on one (default: 180)",
    )
    parser.add_argument("--keep", action="store_true", help="keep the machines when the job has ended")


def _add_local(parser: argparse.ArgumentParser) -> None:
    _add_job(parser, restarts=0, name="local")
    parser.add_argument(
        "--hosts", type=_number(int, 1, 2**10), default=1, metavar="N", help="number of processes (default: 1)"
    )
    parser.add_argument(
        "--devices",
        type=_number(int, 1, 2**10),
        default=1,
        metavar="N",
        help="CPU devices of each process (default: 1)",
    )
    parser.add_argument(
        "--grace",
        type=_number(float, 0, 1e6),
        default=120.0,
        metavar="S",
        help="seconds for saving when asked to stop (default: 120)",
    )


def _number(kind: Callable[[str], float], least: float, most: float) -> Callable[[str], float]:
    """A type for argparse: a number from `least` to `most`. What the library has for this, it may not import."""

    def parse(text: str) -> float:
        value = kind(text)
        # Not a number is neither.
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"={text}: expected from {least:,} to {most:,}")
        return value

    parse.__name__ = kind.__name__
    return parse


def _job(options: argparse.Namespace, bindings: Sequence[str], python: str = PROGRAM[0], **fields: Any) -> Job:
    """The job of a command line. Flags behind `--` that are not the job's own stay as they are."""
    own = argparse.ArgumentParser("memorizing launch ... --", add_help=False, allow_abbrev=False)
    own.add_argument("--gin_file", action="append", default=[])
    own.add_argument("--workdir")
    given, rest = own.parse_known_args(options.arguments)
    if options.program is not None:
        program = _words(options.program)
    else:
        command = rest.pop(0) if rest and not rest[0].startswith("-") else PROGRAM[-1]
        program = (python, *PROGRAM[1:-1], command)
    return Job(
        name=options.name,
        program=program,
        gin_files=tuple(given.gin_file),
        workdir=given.workdir,
        arguments=tuple(rest),
        bindings=tuple(bindings),
        restarts=options.restarts,
        environment=tuple(_pair(text, "--env") for text in options.env),
        **fields,
    )


def _pod_job(options: argparse.Namespace, bindings: Sequence[str]) -> Job:
    job = _job(
        options,
        bindings,
        slice=options.slice,
        slices=options.slices,
        image=options.image,
        spot=options.spot,
        secrets=tuple(Secret(*_pair(text, "--secret")) for text in options.secret),
    )
    # Other commands than `train` may have none.
    is_training = job.program[-1] == PROGRAM[-1]
    if options.program is None and (is_training or job.workdir is not None):
        _check_workdir(job)
    for file in job.gin_files:
        if os.path.exists(file):
            print(
                f"note: --gin_file={file} is a file here; the program reads it in the image, at that path",
                file=sys.stderr,
            )
    return job


def _check_workdir(job: Job) -> None:
    """Raises LaunchError unless the workdir can be shared: a bucket, or a file system that is mounted on all hosts."""
    if job.workdir is None or not ("://" in job.workdir or job.workdir.startswith("/")):
        raise LaunchError(
            f"--workdir={job.workdir or ''}: hosts have no folder in common; "
            f"give a bucket behind `--`, such as --workdir=gs://BUCKET/runs/{job.name}"
        )


def _launch_gke(options: argparse.Namespace, bindings: Sequence[str]) -> int:
    job = _pod_job(options, bindings)
    cluster = Cluster(options.context, options.namespace, options.queue, options.service_account)
    document = gke.to_yaml(gke.job_set(job, cluster))
    command = gke.create_command(cluster)
    if not options.apply:
        print(f"# --apply hands this to: {shlex.join(command)}")
        print(f"# nodes for one slice: {shlex.join(gke.node_pool_command(job))}")
        print(document, end="")
        return DONE
    print(f"{document}$ {shlex.join(command)}", flush=True)
    try:
        created = subprocess.run(command, input=document.encode())
    except FileNotFoundError:
        raise LaunchError("kubectl is not installed here; without --apply the JobSet is only printed") from None
    if created.returncode:
        return FAILED
    Record(job.name).save("gke", cluster, job)
    print(f"look at it with: memorizing launch status {job.name}")
    return DONE


def _launch_tpu_vm(options: argparse.Namespace, bindings: Sequence[str]) -> int:
    job = _pod_job(options, bindings)
    zone = Zone(options.zone, options.project)
    pace = Pace(options.poll, options.grace)
    if not options.apply:
        print(tpu_vm.plan(job, zone, options.poll, options.keep))
        return DONE
    return supervisor.run(job, zone, pace, options.keep)


def _launch_local(options: argparse.Namespace, bindings: Sequence[str]) -> int:
    job = _job(options, bindings, python=sys.executable)
    hosts = Hosts(options.hosts, options.devices, options.grace)
    return local.run(job, hosts)


def _print_slices(*_: object) -> int:
    head = (
        "slice",
        "chips",
        "cores",
        "devices",
        "hosts",
        "HBM/device",
        "GKE accelerator",
        "topology",
        "machine",
        "compiler",
        "runtime version",
    )
    rows: list[tuple[str, ...]] = [head]
    for entry in SLICES.values():
        row = (
            entry.name,
            str(entry.chips),
            str(entry.cores),
            str(entry.devices),
            str(entry.hosts),
            f"{entry.hbm_gb} GB",
            entry.gke_accelerator,
            entry.gke_topology,
            entry.gke_machine,
            entry.compiler_topology,
            entry.runtime_version,
        )
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = []
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            # The columns of numbers are aligned to the right.
            is_number = 0 < i < 6
            cells.append(cell.rjust(width) if is_number else cell.ljust(width))
        print("  ".join(cells).rstrip())
    return DONE


def _words(program: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(program))
    except ValueError as error:
        raise LaunchError(f"--program={program}: {error}; expected words as a shell reads them") from None


def _pair(text: str, flag: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise LaunchError(f"{flag}={text}: expected {flag}=NAME=VALUE")
    return name, value
