"""The command `serve`: a run as a service, with sessions, until it is stopped."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from etils import epath

from memorizing.commands import experiment_flags
from memorizing.commands.documents import read_text
from memorizing.config.runs import open_run
from memorizing.errors import EXIT_FAILED, MOST, Range, UserError
from memorizing.generation.serving.session_store import SessionStore
from memorizing.generation.text_model import TextModel
from memorizing.runtime.workdir import resolve
from memorizing.runtime.workdir_lock import held

if TYPE_CHECKING:
    from starlette.applications import Starlette

# Of the environment: the token, where it is not in a file.
TOKEN = "MEMORIZING_TOKEN"
SHORTEST_TOKEN = 16
PORT = Range(0, 65535)
SECONDS = Range(0, 3600)

DESCRIPTION = f"""\
Serves a trained model by HTTP: texts are read into sessions, asked about and written on, many at once. It answers to OpenAI's completions, as far as they fit.

  memorizing serve                                                  the demo's run, on this machine only
  memorizing serve --workdir=DIR --port=8000 --sessions=FOLDER
  {TOKEN}=... memorizing serve --workdir=DIR --host=0.0.0.0     for others: with a token, which requests bear

  curl localhost:8000/v1/sessions/book/read --json '{{"text": "..."}}'
  curl localhost:8000/v1/completions --json '{{"session": "book", "prompt": "And then", "max_tokens": 50, "stream": true}}'

Sessions that were not used for long wait in files, which are those of `memorizing generate`. Stopped (Ctrl-C, SIGTERM), it ends what is being written and saves all sessions.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.description = DESCRIPTION
    experiment_flags.add_run(parser)
    parser.add_argument("--sessions", metavar="DIR", help="folder of the sessions (default: sessions in the run's)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1); for others than this machine, "
        "0.0.0.0 or one of its addresses, and a token",
    )
    parser.add_argument(
        "--port", type=PORT.of(int), default=8000, metavar="N", help="port (default: 8000); 0 for any that is free"
    )
    parser.add_argument(
        "--token_file",
        metavar="FILE",
        help=f"holds what requests have to bear, as Authorization: Bearer TOKEN (default: what {TOKEN} holds)",
    )
    numbers = (
        ("--rows", experiment_flags.SIDE_BY_SIDE, 8, "requests that are worked on at once, in one step"),
        ("--sessions_in_memory", Range(1, MOST), 64, "sessions that wait in memory; those before wait in files"),
        ("--max_tokens", Range(1, MOST), 4096, "tokens that one request may have written"),
        ("--max_requests", Range(1, MOST), 128, "requests at once; others are told to try later"),
        ("--max_bytes", Range(1, MOST), 2**24, "bytes of a request"),
        ("--grace", SECONDS, 30, "seconds that requests have to end in when it is stopped"),
    )
    for name, limits, default, what in numbers:
        parser.add_argument(
            name, type=limits.of(int), default=default, metavar="N", help=f"{what} (default: {default:,})"
        )


def run(options: argparse.Namespace, bindings: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    _check_installed()
    token = _token(options.token_file)
    if token is None and not _is_this_machine(options.host):
        raise UserError(
            f"--host={options.host}: others than this machine can reach it, so it takes a token: put at least "
            f"{SHORTEST_TOKEN} characters into a file, --token_file=FILE, or into {TOKEN}"
        )
    with _listening(options.host, options.port) as listener:
        experiment_flags.use_devices(1)
        model = TextModel(open_run(options.workdir or experiment_flags.DEFAULT_WORKDIR, options.step, bindings))
        folder = resolve(options.sessions) if options.sessions else model.run.workdir / "sessions"
        with held(folder, _say, "--sessions"):
            return _serve(options, model, folder, token, listener)


def _check_installed() -> None:
    for name in ("starlette", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"serve takes {name}, which is not installed: pip install 'memorizing[serve]'")


def _token(file: str | None) -> str | None:
    """The token of the file, or else of the environment; None if there is none."""
    if file is None:
        token, where = os.environ.get(TOKEN), f"the token in {TOKEN}"
    else:
        named = f"--token_file={file}"
        token = read_text(resolve(file), named, "is no text (at byte {place})", "is no text (at byte {place})").strip()
        where = f"the token of {named}"
    if token is not None and (len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable()):
        raise UserError(f"{where}: expected at least {SHORTEST_TOKEN} printable characters of ASCII")
    return token


def _is_this_machine(host: str) -> bool:
    """Whether only programs of this machine reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listening(host: str, port: int) -> socket.socket:
    """A socket on which connections wait. Raises UserError if there is no such address, or it is taken."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise UserError(f"--host={host} --port={port}: cannot be listened on ({error.strerror or error})") from None


def _serve(
    options: argparse.Namespace, model: TextModel, folder: epath.Path, token: str | None, listener: socket.socket
) -> int:
    """Answers until it is stopped; returns the exit code."""
    from memorizing.generation.serving.app import make_app
    from memorizing.generation.serving.guard import Limits
    from memorizing.generation.serving.service import Service

    _say(f"{model.run.workdir}, step {model.run.step}: {model.memory}")
    mebibytes = model.session_bytes / 2**20
    _say(f"sessions in {folder}, {mebibytes:,.2f} MiB each; up to {options.sessions_in_memory:,} of them in memory")
    service = Service(model, SessionStore(folder, model, options.sessions_in_memory), options.rows)
    app = make_app(service, Limits(token, options.max_bytes, options.max_requests), options.max_tokens)
    try:
        service.warm_up()
        _answer(app, listener, options.grace)
    finally:
        errors = service.close()
        for error in errors:
            _say(f"memorizing: {error}")
        _say("stopped: all other sessions are saved" if errors else "stopped: all sessions are saved")
    return EXIT_FAILED if errors else 0


def _answer(app: Starlette, listener: socket.socket, grace: int) -> None:
    """Answers until a signal comes; then ends what has begun."""
    import uvicorn

    config = uvicorn.Config(app, access_log=False, log_level="warning", timeout_graceful_shutdown=grace)
    server = uvicorn.Server(config)
    # It raises the signal that stopped it once more when it has stopped, and then there are sessions to be saved.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    host, port, *_ = listener.getsockname()
    _say(f"serving on http://{f'[{host}]' if ':' in host else host}:{port}")
    server.run(sockets=[listener])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
