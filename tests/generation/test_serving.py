"""`memorizing serve`: what many clients get is what each would get alone, and nothing of a session is lost or mixed.

The answers are held against `TextModel.session`, which is what `memorizing generate` uses.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import jax
import numpy as np
import pytest
import untrained_run
import uvicorn
from etils import epath
from paces import pass_at_once

import memorizing
from memorizing import main
from memorizing.generation import session_file
from memorizing.generation.sampling import Sampling
from memorizing.generation.serving.app import make_app
from memorizing.generation.serving.guard import Limits
from memorizing.generation.serving.scheduler import Job, Scheduler
from memorizing.generation.serving.service import Service
from memorizing.generation.serving.session_store import SessionStore
from memorizing.generation.side_by_side import SideBySide
from memorizing.generation.text_model import TextModel
from memorizing.runtime import sharding

GREEDY = {"temperature": 0, "max_tokens": 20}
PLACES = 4
TOKEN = "a token of some length"
NO_LIMITS = Limits(None, 2**20, 128)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return untrained_run.write(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def model(workdir: pathlib.Path) -> Iterator[TextModel]:
    one_device = sharding.mesh_for_one_row
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "mesh_for_one_row", lambda *sizes: one_device(*sizes, devices=jax.devices()[:1]))
        model = memorizing.load(str(workdir))
    # Bytes at random are hardly ever text: letters only.
    model.allowed = np.isin(np.arange(259), model.vocabulary.encode("abcdefghijklmnopqrstuvwxyz \n"))
    yield model


@contextlib.contextmanager
def served(
    model: TextModel, folder: pathlib.Path, limits: Limits = NO_LIMITS, in_memory: int = 64
) -> Iterator[httpx.Client]:
    """A client of a server of the model; the sessions stay in the folder."""
    service = Service(model, SessionStore(epath.Path(folder), model, in_memory), PLACES)
    server = uvicorn.Server(uvicorn.Config(make_app(service, limits, 200), log_level="warning"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=address, timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(60)
        assert service.close() == []


@pytest.fixture
def serve(model: TextModel, tmp_path: pathlib.Path) -> Callable[..., contextlib.AbstractContextManager[httpx.Client]]:
    """`served`, with the test's own folder."""
    return functools.partial(served, model, tmp_path)


def text_of(number: int, length: int = 30) -> str:
    return f"{number:02} {'abcdefghij'[number % 10] * (number + 1)} was here " + "so it was " * (length // 10)


def ask(client: httpx.Client, **fields: Any) -> str:
    answer = client.post("/v1/completions", json=GREEDY | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def read(client: httpx.Client, name: str, text: str) -> dict[str, Any]:
    answer = client.post(f"/v1/sessions/{name}/read", json={"text": text})
    assert answer.status_code == 200, answer.text
    return answer.json()


def file_of(model: TextModel, path: pathlib.Path, *texts: str) -> bytes:
    """The file that `generate --save_session` writes when it has read the texts."""
    session = model.session()
    for text in texts:
        session.read(text)
    session.save(str(path))
    return path.read_bytes()


@pytest.fixture
def slow_draws(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Draws of one token that take their time, so that a test is not overtaken; a list of how many writers each had."""
    draw, drawn = SideBySide.draw, []

    def slow(side_by_side: SideBySide, writers: Any, at_most: int) -> Any:
        time.sleep(0.02)
        drawn.append(len(writers))
        return draw(side_by_side, writers, at_most=1)

    monkeypatch.setattr(SideBySide, "draw", slow)
    return drawn


# Alone and among others.


def test_32_clients_get_what_each_gets_alone(
    model: TextModel, serve: Callable, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    """More than can run at once, and than the memory holds: sessions go to files and come back all the time."""
    num_clients = 32
    expected = []
    for number in range(num_clients):
        session = model.session()
        session.read(text_of(number))
        session.read(f"and {number}")
        first = session.generate(GREEDY["max_tokens"], temperature=0)[0]
        session.read(first)
        expected.append((first, session.generate(GREEDY["max_tokens"], temperature=0)[0]))
    assert len(set(expected)) > num_clients / 2, "the test cannot see what it forbids"

    draw, drawn = SideBySide.draw, []
    monkeypatch.setattr(SideBySide, "draw", lambda *given: drawn.append(len(given[1])) or draw(*given))

    async def one(client: httpx.AsyncClient, number: int) -> tuple[str, str]:
        async def post(path: str, **fields: Any) -> dict[str, Any]:
            answer = await client.post(path, json=fields)
            assert answer.status_code == 200, answer.text
            return answer.json()

        name = f"session-{number}"
        await post(f"/v1/sessions/{name}/read", text=text_of(number))
        await post(f"/v1/sessions/{name}/read", text=f"and {number}")
        # To ask does not change what is remembered, but for who says so.
        await post("/v1/completions", session=name, prompt="something else", **GREEDY)
        first = await post("/v1/completions", session=name, remember=True, **GREEDY)
        second = await post("/v1/completions", session=name, **GREEDY)
        return first["choices"][0]["text"], second["choices"][0]["text"]

    async def all_at_once(address: httpx.URL) -> list[tuple[str, str]]:
        async with asyncio.timeout(300), httpx.AsyncClient(base_url=address, timeout=300) as client:
            return await asyncio.gather(*(one(client, number) for number in range(num_clients)))

    with serve(in_memory=5) as client:
        assert asyncio.run(all_at_once(client.base_url)) == expected
        # Some wrote side by side.
        assert max(drawn) == PLACES
        assert sum(each["in_memory"] for each in client.get("/v1/sessions").json()["data"]) == 5
    # Another server on the same folder goes on.
    with serve(in_memory=5) as client:
        sessions = client.get("/v1/sessions").json()["data"]
        assert len(sessions) == num_clients and not any(each["in_memory"] for each in sessions)
        for number in (0, 17):
            assert ask(client, session=f"session-{number}") == expected[number][1]
    # And so does `generate`, on a file that is bit for bit its own.
    alone = file_of(model, tmp_path / "alone.session", text_of(3), "and 3", expected[3][0])
    assert (tmp_path / "session-3.session").read_bytes() == alone


def test_samples_are_those_of_generate(model: TextModel, serve: Callable):
    settings = {"temperature": 0.7, "top_k": 10, "top_p": 0.9, "seed": 5}
    with serve() as client:
        text = ask(client, prompt="Once", **settings)
        assert text == model.generate("Once", GREEDY["max_tokens"], **settings)[0]
        assert text != ask(client, prompt="Once", **settings | {"seed": 6})


def test_what_is_read_is_scored_as_generate_does(model: TextModel, serve: Callable):
    text = text_of(1)
    with serve() as client:
        told = read(client, "book", text)
    score = model.score(text)
    assert told["tokens"] == told["read"]["tokens"] == len(text)
    assert told["read"]["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-6)


def test_a_session_of_generate_is_gone_on_with(model: TextModel, serve: Callable, tmp_path: pathlib.Path):
    """Also one whose segment is full and open, as writing leaves it."""
    length = model.run.experiment.batch.segment_length
    session = model.session()
    session.read("a" * (length // 2))
    reader = session._decoder
    for _ in reader.generate(length // 2, Sampling(temperature=0), 0, model.allowed):
        pass
    assert reader.num_open == length
    session.save(str(tmp_path / "open.session"))
    expected = session.generate(GREEDY["max_tokens"], temperature=0)[0]
    whole = session.read("and on").nats
    with serve() as client:
        assert ask(client, session="open") == expected
        told = read(client, "open", "and on")
        assert np.log(told["read"]["perplexity"]) == pytest.approx(whole.mean(), rel=1e-5)


def test_no_company_compiles_again(model: TextModel, caplog: pytest.LogCaptureFixture):
    scheduler = Scheduler(model, PLACES)
    jobs = [Job(model.start(), model.vocabulary.encode(text_of(n))[: 5 * n], 2 * n) for n in range(1, 9)]
    scheduler.submit(Job(model.start(), model.vocabulary.encode(text_of(0)), 3)).result(60)
    with jax.log_compiles(), caplog.at_level("WARNING", "jax"):
        for outcome in [scheduler.submit(job) for job in jobs]:
            outcome.result(60)
    scheduler.close()
    assert "Compiling" not in caplog.text


def test_a_state_stays_as_it_is_while_jobs_go_on_from_it(model: TextModel):
    scheduler = Scheduler(model, PLACES)
    tokens = model.vocabulary.encode(text_of(5))
    state = scheduler.submit(Job(model.start(), tokens, keep=True)).result(60).state
    before = jax.tree.map(np.copy, state.context)
    jobs = [scheduler.submit(Job(state, tokens, 40, seed=seed, keep=True)) for seed in (1, 2, 1)]
    first, second, third = (job.result(60).state for job in jobs)
    scheduler.close()
    jax.tree.map(np.testing.assert_array_equal, before, state.context)
    assert np.array_equal(first.inputs, third.inputs) and not np.array_equal(first.inputs, second.inputs)


def test_a_stop_among_tokens_that_are_drawn_at_once_leaves_nothing_beyond_it(
    model: TextModel, monkeypatch: pytest.MonkeyPatch
):
    pass_at_once(monkeypatch, 32)
    tokens = model.vocabulary.encode(text_of(2))[: model.run.experiment.batch.segment_length + 1]
    drawn: list[int] = []

    def is_enough(token: int) -> bool:
        drawn.append(token)
        return len(drawn) == 5

    scheduler = Scheduler(model, PLACES)
    outcome = scheduler.submit(Job(model.start(), tokens, 40, on_token=is_enough, keep=True)).result(60)
    scheduler.close()
    assert (outcome.reason, outcome.num_written, len(drawn)) == ("stop", 5, 5)
    reader = model.reader(model.start())
    reader.read(np.append(tokens, drawn).astype(np.int32)[None])
    jax.tree.map(np.testing.assert_array_equal, outcome.state, reader.state)


@pytest.mark.nightly
def test_a_model_on_several_devices_writes_the_same(workdir: pathlib.Path, model: TextModel):
    shared = memorizing.load(str(workdir))
    shared.allowed = model.allowed
    scheduler = Scheduler(shared, PLACES)
    drawn: list[list[int]] = [[] for _ in range(5)]
    jobs = [
        Job(shared.start(), shared.vocabulary.encode(text_of(n)), 40, Sampling(temperature=0), on_token=drawn[n].append)
        for n in range(5)
    ]
    for outcome in [scheduler.submit(job) for job in jobs]:
        outcome.result(120)
    scheduler.close()
    for number, tokens in enumerate(drawn):
        assert model.vocabulary.decode(tokens) == model.generate(text_of(number), 40, temperature=0)[0]


# Streams.


def events(answer: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in answer.iter_lines() if line]


def test_a_stream_is_the_text_in_parts(serve: Callable):
    with serve() as client:
        whole = client.post("/v1/completions", json=GREEDY | {"prompt": "Once"}).json()
        with client.stream("POST", "/v1/completions", json=GREEDY | {"prompt": "Once", "stream": True}) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            *parts, last, done = events(answer)
        parts, last = [json.loads(part) for part in parts], json.loads(last)
        assert done == "[DONE]" and len(parts) > 10
        assert "".join(part["choices"][0]["text"] for part in parts) == whole["choices"][0]["text"]
        assert {part["choices"][0]["finish_reason"] for part in parts} == {None}
        assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"
        assert last["usage"] == whole["usage"] == {"prompt_tokens": 4, "completion_tokens": 20, "total_tokens": 24}
        # An error before the first part is an answer of its own.
        refused = client.post("/v1/completions", json={"session": "nobody", "stream": True})
        assert refused.status_code == 404


def test_a_text_ends_before_what_stops_it(serve: Callable):
    with serve() as client:
        text = ask(client, prompt="Once")
        stop = text[10:12]
        place = text.index(stop)
        for stream in (False, True):
            answer = client.post("/v1/completions", json=GREEDY | {"prompt": "Once", "stop": stop, "stream": stream})
            if stream:
                parts = [json.loads(part)["choices"][0] for part in events(answer)[:-1]]
                assert "".join(part["text"] for part in parts) == text[:place]
                assert parts[-1]["finish_reason"] == "stop"
            else:
                assert answer.json()["choices"][0] | {"logprobs": None} == {
                    "text": text[:place],
                    "index": 0,
                    "logprobs": None,
                    "finish_reason": "stop",
                }


def test_who_stops_listening_frees_a_place_and_changes_nothing(serve: Callable, slow_draws: list[int]):
    with serve() as client:
        for place in range(PLACES):
            read(client, f"book-{place}", "Once")
        before = ask(client, session="book-0")
        asked = {"remember": True, "max_tokens": 200, "stream": True}
        with contextlib.ExitStack() as streams:
            heard = []
            for place in range(PLACES):
                stream = client.stream("POST", "/v1/completions", json=asked | {"session": f"book-{place}"})
                heard.append(streams.enter_context(stream).iter_lines())
                next(heard[place])
        assert [ask(client, session=f"book-{place}") for place in range(PLACES)] == [before] * PLACES
    assert len(slow_draws) < 200


LONG = "it was so " * 300


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("completions", {"session": "{name}", "remember": True, "max_tokens": 200}),
        ("completions", {"session": "{name}", "remember": True, "prompt": LONG, "stream": True}),
        ("sessions/{name}/read", {"text": LONG}),
    ],
    ids=["writing", "before a stream's first part", "reading"],
)
def test_who_goes_away_before_the_answer_frees_a_place_and_changes_nothing(
    serve: Callable, monkeypatch: pytest.MonkeyPatch, path: str, fields: dict[str, Any]
):
    """Also who still waits for a place."""
    rounds, once = [], Scheduler._round

    def slow(scheduler: Scheduler) -> None:
        time.sleep(0.02)
        once(scheduler)
        rounds.append(len(scheduler._running))

    async def ask_and_leave(address: httpx.URL, requests: list[tuple[str, dict[str, Any]]]) -> None:
        async with httpx.AsyncClient(base_url=address, timeout=60) as client:
            asked = [asyncio.create_task(client.post(f"/v1/{path}", json=fields)) for path, fields in requests]
            while len(rounds) < 5:
                await asyncio.sleep(0.01)
            for each in asked:
                each.cancel()
            await asyncio.wait(asked)

    names = [f"book-{number}" for number in range(PLACES + 1)]
    with serve() as client:
        for name in names:
            read(client, name, "Once")
        before = ask(client, session=names[0])
        pass_at_once(monkeypatch, 1)
        monkeypatch.setattr(Scheduler, "_round", slow)
        requests = [
            (path.format(name=name), {key: name if value == "{name}" else value for key, value in fields.items()})
            for name in names
        ]
        asyncio.run(ask_and_leave(client.base_url, requests))
        assert max(rounds) == PLACES
        # To be remembered: nobody has the session any more.
        assert [ask(client, session=name, remember=True) for name in names] == [before] * len(names)
    assert len(rounds) < 200


def test_who_goes_away_while_a_session_is_kept_lets_nobody_between(
    model: TextModel, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    store = SessionStore(epath.Path(tmp_path), model, 4)
    service, put, has_begun = Service(model, store, PLACES), store.put, threading.Event()

    def slow(*given: Any) -> None:
        has_begun.set()
        time.sleep(0.3)
        put(*given)

    async def leave_and_read_on() -> dict[str, Any]:
        leaving = asyncio.create_task(service.read("book", "Once"))
        await asyncio.to_thread(has_begun.wait)
        leaving.cancel()
        return await service.read("book", " more")

    monkeypatch.setattr(store, "put", slow)
    told = asyncio.run(leave_and_read_on())
    service.close()
    assert told["tokens"] == store.get("book").num_tokens == 9


def test_who_goes_away_within_a_request_is_no_defect(serve: Callable, capfd: pytest.CaptureFixture):
    with serve(Limits(None, 1000, 1)) as client:
        address = (client.base_url.host, client.base_url.port)
        with socket.create_connection(address) as half:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            half.sendall(f'{head}Content-Length: 100\r\n\r\n{{"prompt": '.encode())
            while client.get("/v1/models").status_code != 503:
                time.sleep(0.01)
        while client.get("/v1/models").status_code == 503:
            time.sleep(0.01)
    assert "Traceback" not in capfd.readouterr().err


# What goes wrong.


def test_a_failed_step_is_told_and_the_next_one_goes_on(serve: Callable, monkeypatch: pytest.MonkeyPatch):
    with serve() as client:
        read(client, "book", "Once")
        expected = ask(client, session="book")

        def fail(*_: Any) -> None:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand much more")

        with monkeypatch.context() as patch:
            patch.setattr(SideBySide, "draw", fail)
            answer = client.post("/v1/completions", json={"session": "book"})
            assert answer.status_code == 507 and "out of memory" in answer.json()["error"]["message"]
        assert ask(client, session="book") == expected


def test_a_defect_is_told_in_one_line(serve: Callable, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    def fail(*_: Any) -> None:
        raise KeyError("/home/somebody/secret")

    with serve() as client, monkeypatch.context() as patch:
        patch.setattr(SideBySide, "draw", fail)
        answer = client.post("/v1/completions", json={"prompt": "Once"})
        assert answer.status_code == 500 and "secret" not in answer.text
    assert "secret" in capfd.readouterr().err


def test_a_full_disk_loses_nothing(serve: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with serve(in_memory=1) as client:
        read(client, "first", "Once")
        expected = ask(client, session="first")
        with monkeypatch.context() as patch:
            patch.setattr(session_file, "replace_bytes", full)
            refused = client.post("/v1/sessions/second/read", json={"text": "Twice"})
            assert refused.status_code == 507
            assert "the session first.session cannot be written (No space left" in refused.json()["error"]["message"]
            assert client.get("/v1/sessions/second").status_code == 404
        assert ask(client, session="first") == expected
        read(client, "second", "Twice")
    assert {path.name for path in tmp_path.iterdir()} == {"first.session", "second.session"}


def test_a_damaged_session_is_refused_and_stays(serve: Callable, tmp_path: pathlib.Path):
    with serve() as client:
        read(client, "book", "Once")
        assert client.post("/v1/sessions/book/save", json={}).json()["saved"]
    content = (tmp_path / "book.session").read_bytes()
    damaged = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    (tmp_path / "book.session").write_bytes(damaged)
    with serve() as client:
        for path, fields in (("completions", {"session": "book"}), ("sessions/book/read", {"text": "a"})):
            refused = client.post(f"/v1/{path}", json=fields)
            assert refused.status_code == 409 and "book.session is no session, or is damaged" in refused.text
            assert str(tmp_path) not in refused.text
    assert (tmp_path / "book.session").read_bytes() == damaged


@pytest.mark.parametrize(
    "name", ["../x", "..", ".hidden", "a/b", "/etc/passwd", "a\\b", "A", "", "a" * 101, "ü", "a\n"]
)
def test_a_name_never_leaves_the_folder(serve: Callable, tmp_path: pathlib.Path, name: str):
    quoted = "".join(f"%{byte:02x}" for byte in name.encode())
    with serve() as client:
        read(client, "book", "Once")
        statuses = [
            client.post(f"/v1/sessions/{quoted}/read", json={"text": "a"}).status_code,
            client.get(f"/v1/sessions/{quoted}").status_code,
            client.delete(f"/v1/sessions/{quoted}").status_code,
            client.post("/v1/completions", json={"session": name}).status_code,
            client.post("/v1/sessions/book/save", json={"as": name}).status_code,
        ]
        # A name with a slash is no address at all; nor is none.
        assert set(statuses) <= {400, 404, 405, 307} and statuses[-2:] == [400, 400]
    assert [path.name for path in tmp_path.iterdir()] == ["book.session"]
    assert not (tmp_path.parent / "x.session").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "prompt is missing"),
        ({"prompt": 3}, "prompt = 3: expected a text"),
        ({"prompt": ["a", "b"]}, "prompt = "),
        ({"prompt": "\ud800"}, "prompt is no text in UTF-8"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens = 0: expected a whole number from 1 to 200"),
        ({"prompt": "a", "max_tokens": 201}, "max_tokens = 201"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens = 1.5"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens = true"),
        ({"prompt": "a", "temperature": -1}, "temperature = -1: expected a number from 0"),
        ({"prompt": "a", "temperature": float("inf")}, "temperature = Infinity"),
        ({"prompt": "a", "top_p": 0}, "top_p = 0: above 0"),
        ({"prompt": "a", "seed": -1}, "seed = -1"),
        ({"prompt": "a", "stream": "yes"}, 'stream = "yes": expected true or false'),
        ({"prompt": "a", "stop": ["a"] * 5}, "stop = "),
        ({"prompt": "a", "stop": ""}, "stop = "),
        ({"prompt": "a", "n": 2}, "n = 2 cannot be had here"),
        ({"prompt": "a", "logprobs": 1}, "logprobs = 1 cannot be had here"),
        ({"prompt": "a", "tempature": 1}, "there is no field 'tempature'"),
        ({"prompt": "a", "model": "gpt"}, "there is no model 'gpt': this is 'run'"),
        ({"prompt": "a", "remember": True}, "name the session"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_wrong_fields_are_told_in_a_line(shared_client: httpx.Client, fields: dict[str, Any], message: str):
    answer = shared_client.post("/v1/completions", content=json.dumps(fields), headers=JSON)
    error = answer.json()["error"]
    assert answer.status_code == 400 and message in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] is None or error["param"] in (*fields, "prompt")


JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def shared_client(model: TextModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """For what is refused before it is worked on."""
    with served(model, tmp_path_factory.mktemp("sessions"), Limits(None, 1000, 4)) as client:
        yield client


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        (("POST", "/v1/completions", {"content": b"{", "headers": JSON}), 400, "the body is no JSON"),
        (("POST", "/v1/completions", {"content": b"[]", "headers": JSON}), 400, "no JSON object"),
        (("POST", "/v1/completions", {"content": b"[" * 900, "headers": JSON}), 400, "no JSON"),
        (("POST", "/v1/completions", {"content": b"prompt=a"}), 415, "Content-Type"),
        (("POST", "/v1/completions", {"content": b" " * 1001, "headers": JSON}), 413, "larger than 1,000 bytes"),
        (("POST", "/v1/completions", {"content": iter([b" " * 600] * 2), "headers": JSON}), 413, "larger than"),
        (("GET", "/v1/completions", {}), 405, "method not allowed"),
        (("GET", "/v1/elsewhere", {}), 404, "not found"),
        (("POST", "/v1/sessions/book/read", {"json": {}}), 400, "text is missing"),
        (("POST", "/v1/sessions/book/read", {"json": {"text": "a", "more": 1}}), 400, "no field 'more'"),
        (("GET", "/v1/sessions/nobody", {}), 404, "there is no session 'nobody'"),
        (("DELETE", "/v1/sessions/nobody", {}), 404, "there is no session 'nobody'"),
        (("POST", "/v1/sessions/nobody/save", {"json": {}}), 404, "there is no session 'nobody'"),
        (("GET", "/v1/models", {"headers": {"Host": "evil.example"}}), 421, "this is not 'evil.example'"),
    ],
)
def test_wrong_requests_have_their_status(
    shared_client: httpx.Client, request_: tuple[str, str, dict[str, Any]], status: int, message: str
):
    method, path, rest = request_
    answer = shared_client.request(method, path, **rest)
    assert answer.status_code == status and message in answer.json()["error"]["message"]


def test_more_requests_than_are_allowed_are_told_to_try_later(serve: Callable, slow_draws: list[int]):
    with serve(Limits(None, 1000, 1)) as client:
        asked = {"prompt": "a", "max_tokens": 200, "stream": True}
        with client.stream("POST", "/v1/completions", json=asked) as answer:
            # To drop the lines would be to stop listening.
            lines = answer.iter_lines()
            next(lines)
            refused = client.get("/v1/models")
            assert refused.status_code == 503 and refused.headers["retry-after"]
        # Until the server has noticed that nobody listens any more.
        deadline = time.monotonic() + 30
        while client.get("/v1/models").status_code == 503 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert client.get("/v1/models").json()["data"][0]["id"] == "run"


def test_a_token_is_asked_for(serve: Callable):
    with serve(Limits(TOKEN, 1000, 4)) as client:
        for headers in ({}, {"Authorization": "Bearer another"}, {"Authorization": TOKEN}, {"Authorization": "ü"}):
            refused = client.get("/v1/models", headers={name: value.encode() for name, value in headers.items()})
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
            assert TOKEN not in refused.text
        right = {"Authorization": f"Bearer {TOKEN}", "Host": "any.example"}
        assert client.get("/v1/models", headers=right).status_code == 200
    assert TOKEN not in repr(Limits(TOKEN, 1000, 4))


def test_sessions_are_copied_listed_and_deleted(serve: Callable, tmp_path: pathlib.Path):
    with serve() as client:
        read(client, "book", "Once")
        answer = client.post("/v1/sessions/book/save", json={"as": "copy"})
        assert answer.json() == {"id": "copy", "tokens": 4, "in_memory": True, "saved": True}
        assert client.post("/v1/sessions/book/save", json={"as": "copy"}).status_code == 400
        read(client, "book", " more")
        assert [(each["id"], each["tokens"], each["saved"]) for each in client.get("/v1/sessions").json()["data"]] == [
            ("book", 9, False),
            ("copy", 4, True),
        ]
        assert client.delete("/v1/sessions/copy").json() == {"id": "copy", "deleted": True}
        assert client.get("/v1/sessions/copy").status_code == 404
    assert [path.name for path in tmp_path.iterdir()] == ["book.session"]


# The command.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host=0.0.0.0"], "--host=0.0.0.0: others than this machine can reach it, so it takes a token"),
        (["--host=::"], "it takes a token"),
        (["--host=example.com"], "it takes a token"),
        (["--token_file={tmp}/missing"], "missing: cannot be read"),
        (["--token_file={tmp}/short"], "at least 16 printable characters"),
        (["--port=65536"], "--port=65536: expected from 0 to 65,535"),
        (["--port={taken}"], "cannot be listened on (Address already in use"),
        (["--rows=0"], "--rows=0: expected from 1"),
        (["--step=7"], "7"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_at_the_start_is_told_in_a_line(
    workdir: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
):
    (tmp_path / "short").write_text("secret\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = [flag.format(tmp=tmp_path, taken=taken.getsockname()[1]) for flag in flags]
        if "--port" not in given[0]:
            given.append("--port=0")
        assert main._run(["serve", f"--workdir={workdir}", *given]) == 2
    told = capsys.readouterr().err
    assert message in told.splitlines()[-1] and "Traceback" not in told and "secret" not in told
    assert not (workdir / "sessions").exists()


def test_a_stopped_server_ends_what_it_writes_and_saves_all(workdir: pathlib.Path, tmp_path: pathlib.Path):
    """A process of its own, with a token that nobody sees."""
    (tmp_path / "token").write_text(TOKEN)
    command = [sys.executable, "-m", "memorizing", "serve", f"--workdir={workdir}", "--port=0", "--rows=2"]
    command += [f"--sessions={tmp_path / 'sessions'}", f"--token_file={tmp_path / 'token'}"]
    # Compiled as fast as here.
    fast = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | fast)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("serving on "):
            break
    address = lines[-1].split()[-1]
    with httpx.Client(base_url=address, timeout=60, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        read(client, "book", "Once")
        read(client, "other", "Twice")
        asked = {"session": "book", "remember": True, "max_tokens": 300, "stream": True}
        with client.stream("POST", "/v1/completions", json=asked) as answer:
            parts = answer.iter_lines()
            received = [next(parts)]
            process.send_signal(signal.SIGTERM)
            received += [line for line in parts if line]
    assert process.wait(60) == 0
    told = "".join(lines) + process.stderr.read()
    assert "stopped: all sessions are saved" in told and TOKEN not in told and "Traceback" not in told
    assert received[-1] == "data: [DONE]"
    written = json.loads(received[-2].removeprefix("data: "))["usage"]["completion_tokens"]
    model = memorizing.load(str(workdir))
    assert model.session(str(tmp_path / "sessions" / "book.session")).num_tokens == 4 + written
    assert model.session(str(tmp_path / "sessions" / "other.session")).num_tokens == 5
