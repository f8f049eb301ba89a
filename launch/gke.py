"""The backend `gke`: a job as a JobSet (jobset.x-k8s.io/v1alpha2). JobSet starts it again; there is no loop of ours.

How exit codes become restarts: a pod that ends with an error fails its Job, with a message that names the exit code if
a rule of the pod failure policy matched; the rules of the JobSet look at that message. JobSet has had
`onJobFailureMessagePatterns` since the autumn of 2025; an older one refuses the document.
"""

from __future__ import annotations

import dataclasses
import re

import yaml

from .errors import LaunchError
from .job import Job
from .restarts import MISTAKE, START_AGAIN

CONTAINER = "train"
REPLICATED_JOB = "slice"
# A pod that is asked to go gets this long to save; a spot machine may give it less.
GRACE_S = 120
_LABEL = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where in GKE a job runs. Raises LaunchError for a name that cannot be one.

    Attributes:
      context: of kubectl; None is the current one.
      namespace: None is that of the context.
      queue: of Kueue, if the cluster has it.
      service_account: of Kubernetes, as which the pods reach buckets.
    """

    context: str | None = None
    namespace: str | None = None
    queue: str | None = None
    service_account: str | None = None

    def __post_init__(self) -> None:
        for field in ("namespace", "queue", "service_account"):
            value = getattr(self, field)
            if value is not None and not _LABEL.fullmatch(value):
                raise LaunchError(
                    f"--{field}={value!r}: expected a name of Kubernetes: letters, digits, '-', '_' and '.'"
                )


class _Dumper(yaml.SafeDumper):
    pass


# Parsers disagree on what 1e3, 4x8 or y are: what is not plainly a word is quoted.
_WORD = re.compile(r"[A-Za-z][\w./-]+")
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if _WORD.fullmatch(text) else '"'
    ),
)


def job_set(job: Job, cluster: Cluster) -> dict:
    """The JobSet of a job."""
    annotations = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    labels = {"kueue.x-k8s.io/queue-name": cluster.queue} if cluster.queue else {}
    metadata = {"name": job.name, "namespace": cluster.namespace, "labels": labels, "annotations": annotations}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {key: value for key, value in metadata.items() if value},
        "spec": {
            "failurePolicy": {
                "maxRestarts": job.restarts,
                # No slice of a new attempt meets one of the old that is still saving.
                "restartStrategy": "BlockingRecreate",
                "rules": [
                    _rule("mistake", "FailJobSet", f"failed with exit code {MISTAKE} "),
                    _rule("startAgain", "RestartJobSetAndIgnoreMaxRestarts", f"failed with exit code {START_AGAIN} "),
                    _rule("machineLost", "RestartJobSetAndIgnoreMaxRestarts", "has condition DisruptionTarget "),
                ],
            },
            "replicatedJobs": [
                {"name": REPLICATED_JOB, "replicas": job.slices, "template": {"spec": _job(job, cluster)}}
            ],
        },
    }


def _rule(name: str, action: str, pattern: str) -> dict:
    return {
        "name": name,
        "action": action,
        "onJobFailureReasons": ["PodFailurePolicy"],
        "onJobFailureMessagePatterns": [pattern],
    }


def _job(job: Job, cluster: Cluster) -> dict:
    by_code = {"containerName": CONTAINER, "operator": "In"}
    return {
        "parallelism": job.machine.hosts,
        "completions": job.machine.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": by_code | {"values": [MISTAKE]}},
                {"action": "FailJob", "onExitCodes": by_code | {"values": [START_AGAIN]}},
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"spec": _pod(job, cluster)},
    }


def _pod(job: Job, cluster: Cluster) -> dict:
    selector = {
        "cloud.google.com/gke-tpu-accelerator": job.machine.gke_accelerator,
        "cloud.google.com/gke-tpu-topology": job.machine.gke_topology,
    }
    tolerations = [{"key": "google.com/tpu", "operator": "Exists"}]
    if job.spot:
        spot = "cloud.google.com/gke-spot"
        selector[spot] = "true"
        tolerations.append({"key": spot, "operator": "Equal", "value": "true", "effect": "NoSchedule"})
    account = {"serviceAccountName": cluster.service_account} if cluster.service_account else {}
    return account | {
        "restartPolicy": "Never",
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "terminationGracePeriodSeconds": GRACE_S,
        "nodeSelector": selector,
        "tolerations": tolerations,
        "containers": [_container(job)],
        "volumes": [{"name": "dshm", "emptyDir": {"medium": "Memory"}}],
    }


def _container(job: Job) -> dict:
    variables = [{"name": name, "value": _verbatim(value)} for name, value in job.tpu_environment().items()]
    secrets = [
        {"name": entry.variable, "valueFrom": {"secretKeyRef": {"name": entry.secret, "key": entry.variable}}}
        for entry in job.secrets
    ]
    return {
        "name": CONTAINER,
        "image": job.image,
        # In list form: the program is process 1 and gets SIGTERM itself, and no shell reads its arguments.
        "command": [_verbatim(word) for word in job.command()],
        "env": [*variables, *secrets],
        "securityContext": {"privileged": True},
        "resources": {"limits": {"google.com/tpu": job.machine.chips_per_host}},
        "volumeMounts": [{"mountPath": "/dev/shm", "name": "dshm"}],
    }


def _verbatim(text: str) -> str:
    """Kubernetes replaces $(NAME) in commands and values, and reads $$ as $."""
    return text.replace("$", "$$")


def to_yaml(document: dict) -> str:
    """The document as YAML text that any parser reads alike."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=float("inf"))


def kubectl(cluster: Cluster, *arguments: str) -> list[str]:
    """A command line of kubectl."""
    context = [f"--context={cluster.context}"] if cluster.context else []
    namespace = [f"--namespace={cluster.namespace}"] if cluster.namespace else []
    return ["kubectl", *context, *namespace, *arguments]


def create_command(cluster: Cluster) -> list[str]:
    """Creates the JobSet from the document on standard input.

    `create`, and not `apply`: a job that exists already is an error.
    """
    return kubectl(cluster, "create", "--filename=-")


def status_commands(job: Job, cluster: Cluster) -> list[list[str]]:
    """Shows the JobSet and its pods."""
    return [
        kubectl(cluster, "get", "jobset", job.name),
        kubectl(cluster, "get", "pods", f"--selector=jobset.sigs.k8s.io/jobset-name={job.name}", "--output=wide"),
    ]


def logs_command(job: Job, cluster: Cluster, process: int, lines: int, follow: bool) -> list[str]:
    """Shows the log of a process: hosts are counted slice after slice."""
    slice_index, host = divmod(process, job.machine.hosts)
    selector = {
        "jobset.sigs.k8s.io/jobset-name": job.name,
        "jobset.sigs.k8s.io/job-index": slice_index,
        "batch.kubernetes.io/job-completion-index": host,
    }
    chosen = ",".join(f"{key}={value}" for key, value in selector.items())
    following = ["--follow"] if follow else []
    return kubectl(
        cluster,
        "logs",
        f"--selector={chosen}",
        f"--container={CONTAINER}",
        f"--tail={lines}",
        *following,
    )


def stop_command(job: Job, cluster: Cluster) -> list[str]:
    """Deletes the JobSet: its pods get SIGTERM, and save."""
    return kubectl(cluster, "delete", "jobset", job.name)


def node_pool_command(job: Job) -> list[str]:
    """Makes nodes for one slice in a cluster; CLUSTER and LOCATION are the user's to fill in."""
    machine = job.machine
    many = [f"--tpu-topology={machine.gke_topology}"] if machine.hosts > 1 else []
    spot = ["--spot"] if job.spot else []
    return [
        *("gcloud", "container", "node-pools", "create", job.name, "--cluster=CLUSTER", "--location=LOCATION"),
        f"--machine-type={machine.gke_machine}",
        *many,
        f"--num-nodes={machine.hosts}",
        *spot,
    ]
