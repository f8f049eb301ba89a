"""The service by HTTP: OpenAI's completions, as far as they fit, and sessions."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from memorizing.errors import UserError, what_the_machine_lacks
from memorizing.generation.serving.guard import Guard, Limits, error, error_content
from memorizing.generation.serving.requests import BadRequest, Completion, Fields, completion
from memorizing.generation.serving.service import Service, Written
from memorizing.generation.serving.session_store import CannotBeRead, CannotBeWritten, UnknownSession

Endpoint = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")

# A body that takes longer to arrive is given up.
_BODY_SECONDS = 60
# What logs of servers call a client that went away before its answer. It reaches nobody.
_WENT_AWAY = 499


def make_app(service: Service, limits: Limits, most_tokens: int) -> Starlette:
    """The application.

    Args:
      service: what it answers with.
      limits: of requests.
      most_tokens: that one request may have written.
    """
    endpoints = _Endpoints(service, most_tokens)
    table = [
        ("GET", "/v1/models", endpoints.models),
        ("POST", "/v1/completions", endpoints.completions),
        ("GET", "/v1/sessions", endpoints.sessions),
        ("GET", "/v1/sessions/{name}", endpoints.session),
        ("DELETE", "/v1/sessions/{name}", endpoints.delete),
        ("POST", "/v1/sessions/{name}/read", endpoints.read),
        ("POST", "/v1/sessions/{name}/save", endpoints.save),
    ]
    routes = [Route(path, _answering(endpoint), methods=[method]) for method, path, endpoint in table]
    # What no address or method belongs to.
    handlers = {HTTPException: _no_such_address}
    return Starlette(routes=routes, middleware=[Middleware(Guard, limits=limits)], exception_handlers=handlers)


class _Endpoints:
    """What is done for each address."""

    def __init__(self, service: Service, most_tokens: int) -> None:
        self._service, self._most_tokens = service, most_tokens
        self._started = int(time.time())

    async def models(self, _: Request) -> Response:
        model = {"id": self._service.name, "object": "model", "created": self._started, "owned_by": "memorizing"}
        return JSONResponse({"object": "list", "data": [model]})

    async def completions(self, request: Request) -> Response:
        asked = completion(await _body(request), self._service.name, self._most_tokens)
        answer = _Answer(self._service.name)
        if not asked.stream:
            return JSONResponse(answer.whole(await _while_heard(request, self._service.write(asked))))
        parts = _stream(self._service, asked, answer)
        # An error before the first part has its own status.
        first = await _while_heard(request, anext(parts))
        return StreamingResponse(_chain(first, parts), media_type="text/event-stream")

    async def sessions(self, _: Request) -> Response:
        described = await asyncio.to_thread(self._service.sessions.describe)
        return JSONResponse({"object": "list", "data": described})

    async def session(self, request: Request) -> Response:
        return JSONResponse(await self._service.describe(request.path_params["name"]))

    async def delete(self, request: Request) -> Response:
        name = request.path_params["name"]
        await self._service.delete(name)
        return JSONResponse({"id": name, "deleted": True})

    async def read(self, request: Request) -> Response:
        fields = Fields(await _body(request))
        text = fields.text("text")
        fields.end()
        if not text:
            raise BadRequest("text is missing: give at least one character", "text")
        return JSONResponse(await _while_heard(request, self._service.read(request.path_params["name"], text)))

    async def save(self, request: Request) -> Response:
        fields = Fields(await _body(request))
        other = fields.text("as")
        fields.end()
        return JSONResponse(await self._service.save(request.path_params["name"], other))


class _Answer:
    """A completion as OpenAI's clients read it."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def whole(self, written: Written) -> dict[str, Any]:
        """All at once."""
        num_read, num_written = written.num_read, written.num_written
        usage = {"prompt_tokens": num_read, "completion_tokens": num_written, "total_tokens": num_read + num_written}
        return {**self.part(written.text, written.reason), "usage": usage}

    def part(self, text: str, reason: str | None = None) -> dict[str, Any]:
        """A part of the text; the last one has the reason why it ended."""
        choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": reason}
        about = {"id": self._id, "object": "text_completion", "created": self._created, "model": self._model}
        return {**about, "choices": [choice]}


async def _stream(service: Service, asked: Completion, answer: _Answer) -> AsyncIterator[str]:
    """A completion as server-sent events. Who stops listening ends the writing."""
    parts: asyncio.Queue[str | None] = asyncio.Queue()
    writing = asyncio.create_task(service.write(asked, parts.put_nowait))
    writing.add_done_callback(lambda _: parts.put_nowait(None))
    has_begun = False
    try:
        while (part := await parts.get()) is not None:
            if part:
                has_begun = True
                yield _event(answer.part(part))
        written = await writing
        yield _event({**answer.whole(written), "choices": answer.part("", written.reason)["choices"]})
        yield "data: [DONE]\n\n"
    except Exception as failure:
        if not has_begun:
            raise
        status, message, field = _explained(failure)
        yield _event(error_content(status, message, field))
    finally:
        writing.cancel()


async def _chain(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for part in rest:
        yield part


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _while_heard(request: Request, work: Awaitable[T]) -> T:
    """Works for a client whose body has arrived; one that goes away ends the work, and frees its place.

    Raises:
      ClientDisconnect: it went away.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_has_left(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return await working
    finally:
        leaving.cancel()
        if working.cancel():
            # It may have a session to itself until it has ended.
            await asyncio.wait([working])


async def _has_left(request: Request) -> None:
    """Waits until a client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            return await request.body()
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {_BODY_SECONDS} seconds") from None


def _answering(endpoint: Endpoint) -> Endpoint:
    """The endpoint, which answers its errors too."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except ClientDisconnect:
            return Response(status_code=_WENT_AWAY)
        except Exception as failure:
            status, message, field = _explained(failure)
            return error(status, message, field=field)

    return answer


async def _no_such_address(request: Request, failure: Exception) -> Response:
    assert isinstance(failure, HTTPException)
    path = request.url.path[:100]
    return error(failure.status_code, f"{request.method} {path}: {failure.detail.lower()}", failure.headers)


def _explained(failure: Exception) -> tuple[int, str, str | None]:
    """An error's status, its line, and the field that is wrong."""
    if isinstance(failure, HTTPException):
        return failure.status_code, failure.detail, None
    if isinstance(failure, UnknownSession):
        return 404, str(failure), None
    if isinstance(failure, CannotBeRead):
        return 409, str(failure), None
    if isinstance(failure, CannotBeWritten):
        return 507, str(failure), None
    if isinstance(failure, UserError):
        return 400, str(failure), getattr(failure, "field", None)
    lack = what_the_machine_lacks(failure)
    if lack is not None:
        return 507, lack, None
    # A defect of ours: what is to be known of it is for whoever runs the server.
    traceback.print_exception(failure, file=sys.stderr)
    return 500, f"this failed: {type(failure).__name__} (the server's log has more)", None
