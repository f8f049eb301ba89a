"""The command line.

A command is a module with `add_arguments(parser)` and `run(options, bindings)`. It is imported only when it runs, so
that `--help` is instant and training never imports TensorFlow.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import glob
import importlib
import importlib.util
import io
import os
import re
import signal
import sys
from collections.abc import MutableMapping, Sequence
from typing import Any, NoReturn

from memorizing import __version__
from memorizing.errors import EXIT_FAILED, EXIT_START_AGAIN, EXIT_USER_ERROR, UserError, what_the_machine_lacks

DESCRIPTION = """\
Language models that remember: training with external memories in JAX.

  memorizing train                                   a small model on the standard library of this Python, minutes on a laptop
  memorizing train --gin_file=runs/NAME.gin          a shipped or your own experiment
  memorizing train --gin.LMConfig.num_layers=6       ... with one thing changed
  memorizing COMMAND --help                          everything about a command
"""

# Name of a command: its module, and what it does.
COMMANDS = {
    "train": ("memorizing.commands.train", "train a model and evaluate it"),
    "import": ("memorizing.commands.import_model", "make a run of a pretrained model"),
    "export": ("memorizing.commands.export_model", "write a run's parameters in Hugging Face's format"),
    "generate": ("memorizing.commands.writing.generate", "read a text into memory and write on"),
    "serve": ("memorizing.commands.writing.serve", "a run as a service, with sessions, for many at once"),
    "evaluate": ("memorizing.commands.evaluate", "a finished run on held-out documents, with several memories"),
    "inspect": ("memorizing.commands.inspect", "see what the memory of a run looks up"),
    "lm-eval": ("memorizing.commands.writing.harness", "tasks of the LM Evaluation Harness, on a finished run"),
    "status": ("memorizing.commands.watching.status", "how a run is doing, also while it trains"),
    "runs": ("memorizing.commands.watching.runs", "the runs of a folder side by side, and what differs in them"),
    "report": ("memorizing.commands.watching.report", "a run as one page: losses, evaluations, memories, time"),
    "plan": ("memorizing.commands.plan", "what a run will cost"),
    "gin": ("memorizing.commands.gin_files", "list the gin files that come with the package, show one"),
    "prepare": ("memorizing.data.prepare.command", "make a token cache from a corpus"),
    "bench": ("memorizing.benchmarks.bench", "measure what the documentation claims"),
    "launch": ("memorizing.launch.command", "start a run on a pod, or on several processes here"),
}

# Where Linux says for which memory it gives pages of 2 MiB: for all, for what asks for them, or for none.
LARGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"
# Has the C library ask for them, from 2.35 on; others pass over what they do not know.
TUNABLES = "GLIBC_TUNABLES"
LARGE_PAGES_TUNABLE = "glibc.malloc.hugetlb=1"

# Where Linux shows the TPUs of a machine: those up to v4, and later ones.
TPU_DEVICES = ("/dev/accel*", "/dev/vfio/*")


class _Parser(argparse.ArgumentParser):
    """A parser that tells a mistake in one line, as everything else does."""

    def error(self, message: str) -> NoReturn:
        # "argument --rows: =0: expected ..." is what a `Range` says of a number.
        message = re.sub(r"^argument (--\w+): (=?)", lambda found: found[1] + (found[2] or ": "), message)
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As the library's, but what is not known is an error: a command's own parser is asked before the first one."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            # Not at the top: while this module is imported, a stopped training is not heard.
            import difflib

            known = [name for action in self._actions for name in action.option_strings]
            nearest = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
            meant = f"; did you mean {nearest[0]}?" if nearest else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return options, unknown


def main(arguments: list[str] | None = None) -> None:
    """Runs a command and exits with its code."""
    if arguments is None:
        arguments = sys.argv[1:]
        start_with_large_pages(arguments)
    if arguments[:1] == ["train"]:
        # Until the run itself listens, after seconds of imports: there is nothing yet to be saved.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(EXIT_START_AGAIN))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    _show_what_can_be_shown()
    leave_out_absent_tpus(os.environ)
    if arguments[:1] != ["prepare"]:
        # etils would read and write object stores through TensorFlow, where that is installed.
        os.environ.setdefault("EPATH_USE_TF", "false")
    sys.exit(_run(arguments))


def start_with_large_pages(arguments: Sequence[str]) -> None:
    """Starts this program anew with large pages, where Linux gives them to those that ask and nobody has asked yet.

    On CPUs, XLA allocates and frees the arrays of a step over and over, and a program waits for every page: with pages
    of 4 KiB this can be a good part of a step's time. The C library reads its settings only as a program starts.

    Args:
      arguments: of the command line.
    """
    tunables = os.environ.get(TUNABLES, "")
    if "glibc.malloc.hugetlb" in tunables or not _gives_large_pages_on_request():
        return
    os.environ[TUNABLES] = f"{tunables}:{LARGE_PAGES_TUNABLE}".lstrip(":")
    if arguments[:1] == ["train"]:
        # A stop that comes in between waits until it is listened to.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with contextlib.suppress(OSError):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _gives_large_pages_on_request() -> bool:
    with contextlib.suppress(OSError), open(LARGE_PAGES) as setting:
        return "[madvise]" in setting.read()
    return False


def _show_what_can_be_shown() -> None:
    """Characters that a terminal cannot show become question marks, which is said once: no reason to fail."""
    said: list[bool] = []

    def replace(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        if not said:
            said.append(True)
            print(
                f"memorizing: this terminal's encoding, {error.encoding}, has not all of these characters: ? stands for "
                "the others (PYTHONIOENCODING=utf-8 shows them)",
                file=sys.stderr,
            )
        return "?" * (error.end - error.start), error.end

    codecs.register_error("memorizing", replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="memorizing")


def leave_out_absent_tpus(environment: MutableMapping[str, str]) -> None:
    """Keeps JAX off the TPU library on a machine that has it but no TPU: it would begin with a page of errors.

    Nothing changes where the user has chosen a platform, or where JAX has yet another one than TPU and CPU.

    Args:
      environment: of this process, in which JAX reads the platforms to try.
    """
    if importlib.util.find_spec("libtpu") is None or _has_tpu() or _has_plugin():
        return
    environment.setdefault("JAX_PLATFORMS", "cpu")


def _has_tpu() -> bool:
    return any(glob.glob(pattern) for pattern in TPU_DEVICES)


def _has_plugin() -> bool:
    """Whether JAX has more than TPUs and CPUs: it finds the packages of others in these two ways."""
    if importlib.util.find_spec("jax_plugins") is not None:
        return True
    # Not at the top: half of this module's time to import, in which a stopped training is not heard.
    from importlib import metadata

    return bool(metadata.entry_points(group="jax_plugins"))


def _run(arguments: list[str]) -> int:
    # argparse cannot know the names after `--gin.`: they are taken out first.
    bindings = [argument.removeprefix("--gin.") for argument in arguments if argument.startswith("--gin.")]
    rest = [argument for argument in arguments if not argument.startswith("--gin.")]
    try:
        for binding in bindings:
            _check_text(f"--gin.{binding}")
        options = _parser(rest).parse_args(rest)
        return options.run(options, bindings)
    except UserError as error:
        print(f"memorizing: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:
        # Whoever reads, such as `head`, has seen enough; Python flushes once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except ImportError as error:
        if not re.search(r"\b(gcsfs|s3fs)\b", str(error)):
            raise
        # A token cache, say, lies in an object store.
        print(f"memorizing: {error} (pip install 'memorizing[gcs]' for gs://)", file=sys.stderr)
        return EXIT_USER_ERROR
    except Exception as error:
        lack = what_the_machine_lacks(error)
        if lack is None:
            raise
        print(f"memorizing: {lack}", file=sys.stderr)
        return EXIT_FAILED


def _check_text(argument: str) -> None:
    """Raises UserError for bytes that are no UTF-8, which Python takes from a command line as halves of characters."""
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        shown = argument.encode(errors="backslashreplace").decode()
        raise UserError(f"{shown} is no text in UTF-8 (at character {error.start})") from None


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser("memorizing", description=DESCRIPTION, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"memorizing {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, formatter_class=raw)
        if arguments[:1] == [name]:
            implementation = importlib.import_module(module)
            implementation.add_arguments(command)
            command.set_defaults(run=implementation.run)
    return parser
