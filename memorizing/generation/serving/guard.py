"""Who may ask, and how much at once. Stands before the application, and reads no more than it lets through."""

from __future__ import annotations

import dataclasses
import hmac
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# By which a browser reaches this machine's own addresses, and no page of anybody else's does.
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
_PORT = re.compile(r":\d+$")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is let through.

    Attributes:
      token: that a request has to bear; None for everybody on this machine.
      most_bytes: of a request's body.
      most_requests: at once.
    """

    token: str | None = dataclasses.field(repr=False)
    most_bytes: int
    most_requests: int


class Guard:
    """Refuses what must not reach the application, each with its status and a line of JSON."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits = app, limits
        self._num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope["method"], Headers(scope=scope))
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        self._num_requests += 1
        try:
            await self._app(scope, self._bounded(receive), send)
        finally:
            self._num_requests -= 1

    def _refusal(self, method: str, headers: Headers) -> JSONResponse | None:
        """Why a request is not let through."""
        token = self._limits.token
        given = headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            how = {"WWW-Authenticate": "Bearer"}
            return error(401, "this takes the server's token: Authorization: Bearer TOKEN", how)
        host = _PORT.sub("", headers.get("host", ""))
        if token is None and host not in _LOCAL_NAMES:
            # Else a page in a browser on this machine could ask, under a name that leads here.
            return error(421, f"this is not {host[:100]!r}: without a token it answers to {', '.join(_LOCAL_NAMES)}")
        if method == "POST" and headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            # A page elsewhere can have a browser send a form here, but not this without asking.
            return error(415, "the body is no JSON: Content-Type: application/json")
        if (length := headers.get("content-length", "0")).isdecimal() and int(length) > self._limits.most_bytes:
            return error(413, self._too_large)
        if self._num_requests >= self._limits.most_requests:
            return error(503, f"{self._num_requests} requests are being worked on: try later", {"Retry-After": "1"})
        return None

    @property
    def _too_large(self) -> str:
        return f"the body is larger than {self._limits.most_bytes:,} bytes: read a text in parts"

    def _bounded(self, receive: Receive) -> Receive:
        """Gives no more of a body than is allowed."""
        num_bytes = 0

        async def bounded() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._limits.most_bytes:
                raise HTTPException(413, self._too_large)
            return message

        return bounded


def error(
    status: int, message: str, headers: Mapping[str, str] | None = None, field: str | None = None
) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    return JSONResponse(error_content(status, message, field), status, headers)


def error_content(status: int, message: str, field: str | None = None) -> dict[str, Any]:
    """The same as the object that it sends."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    name = HTTPStatus(status).phrase.lower().replace(" ", "_")
    return {"error": {"message": message, "type": kind, "param": field, "code": name}}
