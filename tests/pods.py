"""Several processes on this machine as the hosts of one run, brought together as on a real pod."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable

# A process is dead after so many seconds of silence: soon, since tests wait for it.
HEARTBEAT_SECONDS = 5


# What the collectives of JAX on CPU print as they connect; several threads at once, so that lines are torn.
GLOO = re.compile(r"\[Gloo\]|peer ranks")


class Pod:
    """Processes of one run."""

    def __init__(self, num_processes: int, num_devices: int, program: list[str]) -> None:
        """
        Args:
          num_processes: how many.
          num_devices: CPU devices of each.
          program: of Python, and its arguments.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        # Compiling is most of such short runs.
        shared = os.environ | {
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "MEMORIZING_COORDINATOR": f"127.0.0.1:{port}",
            "MEMORIZING_NUM_PROCESSES": str(num_processes),
            "MEMORIZING_CPU_DEVICES": str(num_devices),
            "MEMORIZING_HEARTBEAT_SECONDS": str(HEARTBEAT_SECONDS),
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, *program],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=shared | {"MEMORIZING_PROCESS_ID": str(index)},
            )
            for index in range(num_processes)
        ]

    def end(self, timeout: float = 300) -> tuple[list[int], list[str], list[str]]:
        """Exit codes, and what each process wrote to stdout and stderr.

        Kills the processes that are left after the timeout in seconds.
        """
        deadline = time.monotonic() + timeout
        try:
            texts = [process.communicate(timeout=deadline - time.monotonic()) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        # JAX's transport tells of itself on either.
        out, error = (
            ["\n".join(line for line in text.splitlines() if line and not GLOO.search(line)) for text in side]
            for side in zip(*texts, strict=True)
        )
        return [process.returncode for process in self.processes], out, error

    def signal_when(self, moment: Callable[[], bool], index: int, number: int) -> None:
        """Sends a signal to one of the processes as soon as something holds."""
        while not moment() and all(process.poll() is None for process in self.processes):
            time.sleep(0.01)
        self.processes[index].send_signal(number)
