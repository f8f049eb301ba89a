"""`memorizing launch gke`: the JobSet is valid, and exit codes become the right restarts.

The arguments of the program survive YAML and Kubernetes.
"""

from __future__ import annotations

import copy
import json
import pathlib
import re

import pytest
import yaml
from fake_cloud import expand
from hypothesis import given
from hypothesis import strategies as st
from launching import NASTY, NASTY_BINDINGS, TRAINER, Workplace, until

from memorizing.launch.errors import LaunchError
from memorizing.launch.gke import Cluster, job_set, to_yaml
from memorizing.launch.job import Job, Secret
from memorizing.launch.slices import SLICES

STEPS = 30
IMAGE = "us-docker.pkg.dev/project/repository/memorizing:1"
CLUSTER = Cluster(queue="multislice-queue", namespace="team", service_account="trainer")
# Whatever a process can be given as an argument.
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def job(**fields: object) -> Job:
    return Job(**{"name": "first", "slice": "v5litepod-32", "image": IMAGE, "workdir": "gs://bucket/first"} | fields)


JOBS = {
    "one slice": job(),
    "two slices": job(slices=2, gin_files=("a.gin", "b.gin"), bindings=tuple(NASTY_BINDINGS)),
    "one host, not spot": job(slice="v3-8", spot=False),
    "the paper's": job(slice="v3-32", secrets=(Secret("WANDB_API_KEY", "wandb"),), environment=(("NOTE", NASTY),)),
}


def parsed(described: Job, cluster: Cluster = CLUSTER) -> dict:
    """The JobSet as a cluster reads it."""
    return yaml.safe_load(to_yaml(job_set(described, cluster)))


def container(document: dict) -> dict:
    return document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("described", JOBS.values(), ids=JOBS)
def test_job_and_pod_are_valid(described: Job):
    """By the schemas of Kubernetes; a misspelt field is found."""
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")

    def validate(template: dict) -> None:
        batch = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": template["spec"]}
        validator.validate(batch, "1.32", strict=True)

    template = parsed(described)["spec"]["replicatedJobs"][0]["template"]
    validate(template)
    wrong = copy.deepcopy(template)
    wrong["spec"]["template"]["spec"]["nodeSelektor"] = {}
    with pytest.raises(validator.ValidationError):
        validate(wrong)


@pytest.mark.parametrize("described", JOBS.values(), ids=JOBS)
def test_job_set_is_valid(described: Job):
    """By the types of JobSet: all fields are known, and names and actions are among those that the types document."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed")
    document = parsed(described)
    kept = models.JobsetV1alpha2JobSet.from_dict(copy.deepcopy(document)).to_dict()
    assert paths(document) == paths(kept)
    fields = models.JobsetV1alpha2FailurePolicyRule.model_fields
    name = re.search(r'regular expression "(.+?)"', fields["name"].description).group(1)
    actions = re.search(r"Valid values are (.+)\.", fields["action"].description).group(1).split(", ")
    for rule in document["spec"]["failurePolicy"]["rules"]:
        assert re.fullmatch(name, rule["name"])
        assert rule["action"] in actions
    misspelt = copy.deepcopy(document)
    misspelt["spec"]["failurePolicy"]["maxRestart"] = 3
    assert paths(misspelt) != paths(models.JobsetV1alpha2JobSet.from_dict(misspelt).to_dict())


def paths(tree: object, prefix: str = "") -> set[str]:
    """Every leaf of a document, with its value."""
    if isinstance(tree, dict):
        return {path for key, value in tree.items() for path in paths(value, f"{prefix}/{key}")}
    if isinstance(tree, list):
        return {path for index, value in enumerate(tree) for path in paths(value, f"{prefix}/{index}")}
    # A quantity of 4 is 4.0.
    return {f"{prefix}={float(tree) if type(tree) is int else tree!r}"}


@pytest.mark.parametrize("name", SLICES)
def test_every_slice_asks_for_its_own_machines(name: str):
    described = job(slice=name)
    entry = SLICES[name]
    spec = parsed(described)["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = spec["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == entry.hosts
    limit = container(parsed(described))["resources"]["limits"]["google.com/tpu"]
    assert limit * entry.hosts == entry.chips
    # Machine types end with how many chips they have.
    assert entry.gke_machine.endswith(f"-{limit}t")
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == entry.gke_topology
    variables = {variable["name"] for variable in container(parsed(described))["env"]}
    assert ("MEMORIZING_DISTRIBUTED" in variables) == (entry.hosts > 1)


@given(bindings=st.lists(TEXTS), note=TEXTS)
def test_arguments_and_variables_arrive_as_they_are(bindings: list[str], note: str):
    described = job(bindings=tuple(bindings), environment=(("NOTE", note),))
    read = container(parsed(described))
    # Whatever variables there are, none is put into a text.
    variables = {"HOME": "home", "NOTE": "note", "": "nothing"}
    assert [expand(word, variables) for word in read["command"]] == described.command()
    assert {entry["name"]: expand(entry["value"], variables) for entry in read["env"]}["NOTE"] == note


@pytest.mark.parametrize(
    "text", ["1e3", "4x4", "y", "no", "null", "0x1f", "1:20", "=", "~", "2026-11-22", "", ".inf", "on"]
)
def test_every_text_is_a_text_to_any_parser(text: str):
    """Parsers of YAML disagree on what is plainly a number or a truth value: such a text is quoted."""
    written = to_yaml(job_set(job(environment=(("NOTE", text),)), CLUSTER))
    assert f"value: '{text}'" in written or f'value: "{text}"' in written


@pytest.fixture
def cluster(tmp_path: pathlib.Path) -> Workplace:
    return Workplace(tmp_path)


def run_to_its_end(place: Workplace, strikes: str, *flags: str) -> dict:
    """Hands a job of two hosts to the stand-in for a cluster and waits for the JobSet's end."""
    trainer = [f"--program=python {TRAINER}", "--", f"--workdir={place.workdir}", f"--gin.steps={STEPS}"]
    launched = place.launch(
        *("gke", "--name=first", "--slice=v5p-16", f"--image={IMAGE}", "--apply", *flags),
        *(*trainer, f"--gin.interrupt={strikes}", *(f"--gin.{binding}" for binding in NASTY_BINDINGS)),
    )
    assert launched.returncode == 0, launched.stderr
    read = lambda: json.loads((place.cloud / "jobset.json").read_text())  # noqa: E731
    until(lambda: read()["terminalState"])
    return read()


def test_a_preempted_job_ends_like_an_undisturbed_one(cluster: Workplace):
    """SIGTERM and a lost machine do not count, a kill and a failure do."""
    ended = run_to_its_end(cluster, "1:0:5:SIGTERM 2:1:10:LOST 3:1:15:SIGKILL 4:0:20:1", "--restarts=2")
    assert ended["terminalState"] == "Completed"
    assert (ended["restarts"], ended["counted"]) == (4, 2)
    cluster.assert_undisturbed(2, STEPS)
    assert cluster.told(1)["arguments"][-len(NASTY_BINDINGS) :] == [f"--gin.{binding}" for binding in NASTY_BINDINGS]
    status = cluster.launch("status", "first")
    assert "first Completed 4" in status.stdout
    assert "process 0, attempt 5" in cluster.launch("logs", "first").stdout


def test_a_mistake_fails_the_job_at_once(cluster: Workplace):
    ended = run_to_its_end(cluster, "1:1:3:2", "--restarts=5")
    assert (ended["terminalState"], ended["restarts"]) == ("Failed", 0)


def test_failures_are_counted(cluster: Workplace):
    ended = run_to_its_end(cluster, "1:1:3:1 2:1:6:1 3:0:9:1", "--restarts=2")
    assert (ended["terminalState"], ended["counted"]) == ("Failed", 2)


def test_stopping_a_job_lets_it_save(cluster: Workplace):
    cluster.launch(*("gke", "--name=first", "--slice=v5p-16", f"--image={IMAGE}", "--apply", *cluster.trainer(100_000)))
    until(lambda: all((cluster.workdir / f"state-{process}.json").exists() for process in range(2)))
    assert cluster.launch("stop", "first").returncode == 0
    until(lambda: json.loads((cluster.cloud / "jobset.json").read_text())["terminalState"] == "Deleted")
    assert json.loads((cluster.cloud / "jobset.json").read_text())["codes"] == [42, 42]


def test_without_apply_nothing_is_run_or_written(cluster: Workplace):
    arguments = ["gke", "--name=first", "--slice=v5litepod-32", f"--image={IMAGE}", "--secret=WANDB_API_KEY=wandb"]
    cluster.environment["WANDB_API_KEY"] = "a-secret-value"
    printed = cluster.launch(*arguments, "--", "--gin_file=smoke", "--workdir=gs://bucket/first")
    assert printed.returncode == 0, printed.stderr
    document = yaml.safe_load(printed.stdout)
    assert container(document)["command"] == [
        *("python", "-m", "memorizing", "train", "--gin_file=smoke", "--workdir=gs://bucket/first")
    ]
    reference = {"secretKeyRef": {"name": "wandb", "key": "WANDB_API_KEY"}}
    assert {"name": "WANDB_API_KEY", "valueFrom": reference} in container(document)["env"]
    assert "a-secret-value" not in printed.stdout
    assert not (cluster.cloud / "calls.jsonl").exists() and not (cluster.folder / "jobs").exists()


def test_what_cannot_be_launched(cluster: Workplace):
    good = ["gke", "--name=first", "--slice=v5litepod-32", f"--image={IMAGE}"]
    for arguments, message in (
        ([*good, "--", "--gin_file=smoke"], "--workdir=gs://BUCKET/runs/first"),
        ([*good, "--", "--workdir=runs/first"], "hosts have no folder in common"),
        ([*good, "--namespace=a b", "--", "--workdir=gs://b"], "--namespace"),
        ([*good, "--slice=v5lite-32", "--", "--workdir=gs://b"], "did you mean v5litepod-32?"),
        ([*good, "--secret=KEY", "--", "--workdir=gs://b"], "--secret=KEY"),
    ):
        ended = cluster.launch(*arguments)
        assert ended.returncode == 2, arguments
        assert message in ended.stderr and "Traceback" not in ended.stderr
    for wrong in (
        {"slice": "v3-32", "slices": 2},
        {"slice": "v6e-8", "slices": 2},
        {"slices": 0},
        {"image": "a b"},
        {"image": "--privileged"},
        {"bindings": ("a=\0",)},
        {"workdir": "s3://user:password@host/bucket"},
        {"environment": (("GITHUB_TOKEN", "x"),)},
        {"environment": (("MEMORIZING_PROCESS_ID", "1"),)},
        {"secrets": (Secret("KEY", "$(cat key)"),)},
    ):
        with pytest.raises(LaunchError):
            job(**wrong)


@given(st.text())
def test_a_name_that_is_no_dns_label_is_refused(name: str):
    label = re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name, re.ASCII) and len(name) <= 40
    if label:
        assert job(name=name).name == name
    else:
        with pytest.raises(LaunchError):
            job(name=name)
