"""A program that behaves like a training process, for tests of launchers.

Its state after N steps is a fixed function of N, saved after every step.

    python fake_trainer.py --workdir=DIR --gin.steps=30 --gin.interrupt='1:0:10:SIGKILL 2:1:20:SIGTERM'

`interrupt` says when it is interrupted, as attempt:process:step:what, where what is a signal, `LOST` (its machine
vanishes) or an exit code. SIGTERM to one process makes all stop and exit with 42. No process gets more than a step
ahead of another: when one has died, the others wait for ever.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import signal
import sys
import time

STEP_S = 0.005


def advance(value: str, step: int) -> str:
    """The state after a step."""
    return hashlib.sha256(f"{value}/{step}".encode()).hexdigest()


def final(steps: int) -> str:
    """The state of a run that nothing ever happened to."""
    value = ""
    for step in range(steps):
        value = advance(value, step)
    return value


def main() -> None:
    flags = dict(text.removeprefix("--").partition("=")[::2] for text in sys.argv[1:])
    workdir = pathlib.Path(flags["workdir"])
    workdir.mkdir(parents=True, exist_ok=True)
    process = os.environ.get("MEMORIZING_PROCESS_ID", "0")
    attempt = count_attempt(workdir / f"attempts-{process}")
    (workdir / f"told-{process}.json").write_text(
        json.dumps({"arguments": sys.argv, "environment": dict(os.environ), "pid": os.getpid()})
    )
    strikes = {}
    for text in flags.get("gin.interrupt", "").split():
        when, what = text.rsplit(":", 1)
        strikes[when] = what
    stop = workdir / f"stop-{attempt}"
    signal.signal(signal.SIGTERM, lambda *_: stop.touch())
    # Nobody may be left to end it.
    signal.alarm(300)
    saved = workdir / f"state-{process}.json"
    state = json.loads(saved.read_text()) if saved.exists() else {"step": 0, "value": ""}
    print(f"process {process}, attempt {attempt}, from step {state['step']}", flush=True)
    peers = [workdir / f"state-{peer}.json" for peer in range(int(os.environ.get("MEMORIZING_NUM_PROCESSES", "1")))]
    while state["step"] < int(flags["gin.steps"]):
        while any(step_of(peer) < state["step"] for peer in peers) and not stop.exists():
            time.sleep(STEP_S)
        # A step more, and the other could reach its next interruption before this one has counted an attempt.
        if stop.exists():
            sys.exit(42)
        state = {"step": state["step"] + 1, "value": advance(state["value"], state["step"])}
        temporary = saved.with_suffix(".tmp")
        temporary.write_text(json.dumps(state))
        temporary.replace(saved)
        strike(strikes.get(f"{attempt}:{process}:{state['step']}"))
        time.sleep(STEP_S)


def step_of(saved: pathlib.Path) -> int:
    return json.loads(saved.read_text())["step"] if saved.exists() else 0


def count_attempt(path: pathlib.Path) -> int:
    with open(path, "a") as file:
        file.write("x")
    return path.stat().st_size


def strike(what: str | None) -> None:
    if what is None:
        return
    if what.isdigit():
        sys.exit(int(what))
    if what == "LOST":
        pathlib.Path(os.environ["FAKE_CLOUD"], "machine_lost").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), getattr(signal, what))


if __name__ == "__main__":
    main()
