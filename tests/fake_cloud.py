"""Stands in for `gcloud`, `kubectl`, and the `sudo` and `docker` of a TPU host.

It records its arguments, and runs programs as processes of this machine.

    python fake_cloud.py gcloud ARGUMENTS...       state lies under $FAKE_CLOUD

It follows the rules of the real programs, as far as a launcher depends on them: gcloud hands a command to the hosts'
shell once; a request that lost its machines stays SUSPENDED; Docker keeps exit codes; Kubernetes expands $(NAME) and
applies the failure policies of Job and JobSet (with their messages).
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(os.environ.get("FAKE_CLOUD", "."))
# A program that touches this file loses its machine.
MACHINE_LOST = ROOT / "machine_lost"


def main() -> int:
    return call(sys.argv[1], sys.argv[2:])


def call(tool: str, arguments: list[str]) -> int:
    with open(ROOT / "calls.jsonl", "a") as calls:
        calls.write(json.dumps([tool, *arguments]) + "\n")
    return {"gcloud": gcloud, "kubectl": kubectl, "sudo": sudo, "docker": docker}[tool](arguments)


def flag(arguments: list[str], name: str) -> str | None:
    return next((text.partition("=")[2] for text in arguments if text.startswith(f"--{name}=")), None)


# ---- Google Cloud ----------------------------------------------------------------------------------------------------


def gcloud(arguments: list[str]) -> int:
    if arguments[:4] == ["compute", "tpus", "tpu-vm", "ssh"]:
        return ssh(arguments[4], arguments[5:])
    if arguments[:3] == ["compute", "tpus", "queued-resources"]:
        return queued_resources(arguments[3], arguments[4:])
    if arguments[:3] == ["secrets", "versions", "access"]:
        print(f"value of {flag(arguments, 'secret')}")
    return 0


def queued_resources(verb: str, arguments: list[str]) -> int:
    request = ROOT / "request.json"
    if verb == "create":
        kind = flag(arguments, "accelerator-type")
        count = int(flag(arguments, "node-count") or 1)
        nodes = [flag(arguments, "node-id")] if count == 1 else [f"{arguments[0]}-{index}" for index in range(count)]
        hosts = json.loads(os.environ["FAKE_HOSTS"])[kind]
        request.write_text(
            json.dumps({"states": ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], "nodes": nodes, "hosts": hosts})
        )
        return 0
    if not request.exists():
        print("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: no such request", file=sys.stderr)
        return 1
    if verb == "delete":
        kill_hosts()
        request.unlink()
        return 0
    found = json.loads(request.read_text())
    if MACHINE_LOST.exists():
        MACHINE_LOST.unlink()
        kill_hosts()
        found["states"] = ["SUSPENDING", "SUSPENDED"]
    print(found["states"].pop(0) if len(found["states"]) > 1 else found["states"][0])
    request.write_text(json.dumps(found))
    return 0


def ssh(node: str, arguments: list[str]) -> int:
    found = json.loads((ROOT / "request.json").read_text())
    if found["states"] != ["ACTIVE"] or node not in found["nodes"]:
        print(f"ERROR: {node} cannot be reached", file=sys.stderr)
        return 255
    # As gcloud does: the command is split at blanks and joined again by ssh.
    command = " ".join(flag(arguments, "command").split(" "))
    worker = flag(arguments, "worker")
    chosen = range(found["hosts"]) if worker == "all" else [int(worker)]
    total = str(len(found["nodes"]) * found["hosts"])
    first = found["nodes"].index(node) * found["hosts"]
    running = [
        subprocess.Popen(
            ["bash", "-c", command], env=os.environ | {"FAKE_HOST": str(first + host), "FAKE_PROCESSES": total}
        )
        for host in chosen
    ]
    return max(process.wait() for process in running)


def kill_hosts() -> None:
    for host in (ROOT / "hosts").glob("*"):
        remove(host)


# ---- A TPU host ------------------------------------------------------------------------------------------------------


def sudo(arguments: list[str]) -> int:
    kept = ["PATH", *(name for name in os.environ if name.startswith("FAKE_"))]
    if arguments[0].startswith("--preserve-env="):
        kept += arguments.pop(0).partition("=")[2].split(",")
    for name in set(os.environ) - set(kept):
        del os.environ[name]
    return call(arguments[0], arguments[1:])


def docker(arguments: list[str]) -> int:
    host = ROOT / "hosts" / os.environ["FAKE_HOST"]
    verb, *rest = arguments
    if verb == "run":
        return run_container(host, rest)
    if verb == "pull":
        return 0
    if not (host / "pid").exists():
        return 1
    if verb == "inspect":
        code = (host / "exit_code").read_text() if (host / "exit_code").exists() else None
        status = "running" if code is None else "exited"
        print(flag(rest, "format").replace("{{.State.Status}}", status).replace("{{.State.ExitCode}}", code or "0"))
    elif verb == "logs":
        print((host / "log").read_text(), end="")
    elif verb == "rm":
        remove(host)
    elif verb == "stop":
        stop_container(host, signal.SIGTERM)
    return 0


def run_container(host: pathlib.Path, arguments: list[str]) -> int:
    environment = platform(int(host.name), int(os.environ["FAKE_PROCESSES"]))
    while arguments[0].startswith("--"):
        name, _, value = arguments.pop(0).partition("=")
        if name == "--env":
            variable, given, text = value.partition("=")
            environment[variable] = text if given else os.environ[variable]
    host.mkdir(parents=True)
    if os.fork():
        while not (host / "pid").exists():
            time.sleep(0.005)
        return 0
    os.setsid()
    with open(host / "log", "wb") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        # What follows the image.
        process = subprocess.Popen(arguments[1:], env=environment)
    write(host / "pid", str(process.pid))
    code = process.wait()
    write(host / "exit_code", str(code if code >= 0 else 128 - code))
    os._exit(0)


def stop_container(host: pathlib.Path, number: int) -> None:
    if not (host / "exit_code").exists():
        os.kill(int((host / "pid").read_text()), number)
    while not (host / "exit_code").exists():
        time.sleep(0.005)


def remove(host: pathlib.Path) -> None:
    stop_container(host, signal.SIGKILL)
    for path in host.iterdir():
        path.unlink()
    host.rmdir()


def platform(process: int, count: int) -> dict[str, str]:
    """What a process finds out from the machines it runs on. They are this one."""
    found = {name: os.environ[name] for name in ("PATH", "FAKE_CLOUD")}
    return found | {
        "MEMORIZING_COORDINATOR": os.environ["FAKE_COORDINATOR"],
        "MEMORIZING_NUM_PROCESSES": str(count),
        "MEMORIZING_PROCESS_ID": str(process),
        "MEMORIZING_CPU_DEVICES": "2",
        "JAX_PLATFORMS": "cpu",
    }


def write(path: pathlib.Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


# ---- Kubernetes with JobSet ------------------------------------------------------------------------------------------


def kubectl(arguments: list[str]) -> int:
    verb = next(text for text in arguments if not text.startswith("-"))
    status = ROOT / "jobset.json"
    if verb == "create":
        import yaml

        document = yaml.safe_load(sys.stdin)
        print(f"jobset.jobset.x-k8s.io/{document['metadata']['name']} created", flush=True)
        if os.fork() == 0:
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for number in (0, 1, 2):
                os.dup2(null, number)
            JobSetController(document, status).run()
            os._exit(0)
        while not status.exists():
            time.sleep(0.005)
    elif verb == "get" and "jobset" in arguments:
        found = json.loads(status.read_text())
        print(f"NAME TERMINALSTATE RESTARTS\n{found['name']} {found['terminalState']} {found['restarts']}")
    elif verb == "logs":
        print((ROOT / "pod-0.log").read_text(), end="")
    elif verb == "delete":
        os.kill(json.loads(status.read_text())["controller"], signal.SIGTERM)
    return 0


def expand(text: str, variables: dict[str, str]) -> str:
    """What Kubernetes makes of a text: `$$` is `$`, `$(NAME)` a variable if there is one, anything else stays."""

    def replace(match: re.Match) -> str:
        if match.group() == "$$":
            return "$"
        return variables.get(match.group(1), match.group())

    return re.sub(r"\$\$|\$\(([^)]*)\)", replace, text)


class JobSetController:
    """Runs a JobSet: pods as processes, failure policies as they are documented."""

    def __init__(self, document: dict, status: pathlib.Path):
        self.spec = document["spec"]
        self.status = status
        self.state = {
            "name": document["metadata"]["name"],
            "terminalState": "",
            "restarts": 0,
            "counted": 0,
            "controller": os.getpid(),
        }
        self.pods: list[subprocess.Popen] = []
        self.report()

    def report(self) -> None:
        write(self.status, json.dumps(self.state))

    def run(self) -> None:
        signal.signal(signal.SIGTERM, self.delete)
        while True:
            action = self.attempt()
            if action is None or action == "FailJobSet":
                self.state["terminalState"] = "Completed" if action is None else "Failed"
                self.report()
                return
            if action == "RestartJobSet":
                if self.state["counted"] >= self.spec["failurePolicy"]["maxRestarts"]:
                    self.state["terminalState"] = "Failed"
                    self.report()
                    return
                self.state["counted"] += 1
            self.state["restarts"] += 1
            self.report()

    def attempt(self) -> str | None:
        """Runs all pods once; the action of the failure policy, or None if all succeeded."""
        jobs = [entry["template"]["spec"] for entry in self.spec["replicatedJobs"] for _ in range(entry["replicas"])]
        placed = [job for job in jobs for _ in range(job["completions"])]
        self.pods = [self.start(index, len(placed), job) for index, job in enumerate(placed)]
        while True:
            codes = [pod.poll() for pod in self.pods]
            failed = next((index for index, code in enumerate(codes) if code), None)
            if failed is not None:
                code = codes[failed] if codes[failed] > 0 else 128 - codes[failed]
                lost = MACHINE_LOST.exists()
                MACHINE_LOST.unlink(missing_ok=True)
                self.end_pods(placed[failed])
                return self.action(*self.job_failure(placed[failed], code, lost))
            if None not in codes:
                return None
            time.sleep(0.01)

    def start(self, index: int, count: int, job: dict) -> subprocess.Popen:
        container = job["template"]["spec"]["containers"][0]
        variables: dict[str, str] = {}
        for entry in container["env"]:
            reference = entry.get("valueFrom", {}).get("secretKeyRef")
            variables[entry["name"]] = (
                f"value of {reference['name']}" if reference else expand(entry["value"], variables)
            )
        command = [expand(word, variables) for word in container["command"]]
        with open(ROOT / f"pod-{index}.log", "ab") as log:
            return subprocess.Popen(command, env=platform(index, count) | variables, stdout=log, stderr=log)

    def end_pods(self, job: dict) -> None:
        for pod in self.pods:
            if pod.poll() is None:
                pod.terminate()
        for pod in self.pods:
            pod.wait(job["template"]["spec"]["terminationGracePeriodSeconds"])

    @staticmethod
    def job_failure(job: dict, code: int, lost: bool) -> tuple[str, str]:
        """Reason and message of the failed Job."""
        for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
            assert rule["action"] == "FailJob"
            if code in rule.get("onExitCodes", {}).get("values", ()):
                name = rule["onExitCodes"]["containerName"]
                return (
                    "PodFailurePolicy",
                    f"Container {name} for pod default/pod failed with exit code {code} matching FailJob rule at index {index}",
                )
            if lost and "onPodConditions" in rule:
                condition = rule["onPodConditions"][0]["type"]
                return (
                    "PodFailurePolicy",
                    f"Pod default/pod has condition {condition} matching FailJob rule at index {index}",
                )
        assert job["backoffLimit"] == 0
        return "BackoffLimitExceeded", "Job has reached the specified backoff limit"

    def action(self, reason: str, message: str) -> str:
        for rule in self.spec["failurePolicy"]["rules"]:
            patterns = rule.get("onJobFailureMessagePatterns", [""])
            if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
                return rule["action"]
        return "RestartJobSet"

    def delete(self, *_: object) -> None:
        for pod in self.pods:
            if pod.poll() is None:
                pod.terminate()
        self.state["terminalState"] = "Deleted"
        self.state["codes"] = [pod.wait() for pod in self.pods]
        self.report()
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
