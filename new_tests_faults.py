"""Faults of engines and of clients, shutdown, suspended machines and clocks that jump; and the soak run.

To be moved into test_shimmy.py: each `# topic:` names the section.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import itertools
import json
import os
import random
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from test_shimmy import (
    HANG,
    HURRY,
    LONG_CTX,
    REPO,
    SHIMMY,
    TEXTS,
    Reply,
    Server,
    alive,
    altered,
    assert_healthy,
    assert_holds_as_before,
    cases,
    descendants,
    encoded,
    eventually,
    held,
    linux,
    models,
    raw_post,
    read_reply,
    serve,
    server,
    shared,
    streamed_and_plain,
    tool_root,
    wrapper,
    write_dice,
    write_recital,
    ws_answer,
)  # fmt: skip

__all__ = ["models", "serve", "server", "tool_root"]  # fixtures

# topic: Servers and clients


@dataclass(frozen=True)
class Tongue:
    """One dialect: how to ask for a text in it."""

    path: str
    fields: dict[str, Any]
    text: str = "prompt"  # the field that holds the text

    def body(self, text: str = "forever", pad: str = "", stream: bool = True) -> dict[str, Any]:
        """A request for endless text ("forever") or for three words ("hi")."""
        prompt = pad + {"forever": "#", "hi": ":"}[text]
        said = {"prompt": prompt, "input": f"{pad} {text}", "messages": [{"role": "user", "content": f"{pad} {text}"}]}
        return {"model": "recital", self.text: said[self.text], "stream": stream, **self.fields}


TONGUES = {
    "native": Tongue("/api/generate", {"max_tokens": LONG_CTX}),
    "chat": Tongue("/v1/chat/completions", {"max_tokens": LONG_CTX}, "messages"),
    "completions": Tongue("/v1/completions", {"max_tokens": LONG_CTX}),
    "messages": Tongue("/v1/messages", {"max_tokens": LONG_CTX}, "messages"),
    "responses": Tongue("/v1/responses", {"max_output_tokens": LONG_CTX}, "input"),
    "ollama chat": Tongue("/api/chat", {"options": {"num_predict": LONG_CTX}}, "messages"),
    "ollama generate": Tongue("/api/generate", {"raw": True, "options": {"num_predict": LONG_CTX}}),
    "llama-server": Tongue("/completion", {"n_predict": LONG_CTX}),
}
in_every_tongue = cases("tongue", TONGUES)


def last_document(body: bytes) -> Any:
    """The last document of a stream, whichever kind of stream it is."""
    line = body.strip().splitlines()[-1].removeprefix(b"data: ")
    return line.decode() if line == b"[DONE]" else json.loads(line)


def ends_with_an_error(body: bytes) -> bool:
    document = last_document(body)
    return document.get("type") == "response.failed" or "error" in document


def ends_well(body: bytes) -> bool:
    document = last_document(body)
    return document == "[DONE]" or bool(
        document.get("done") or document.get("stop") or document.get("type") in ("message_stop", "response.completed",
                                                                               "response.incomplete")
    )  # fmt: skip


@contextlib.contextmanager
def requested(server: Server, tongue: Tongue, **options: Any) -> Iterator[socket.socket]:
    """A raw connection on which a request has been sent."""
    with socket.create_connection((server.host, server.port), timeout=HANG) as sock:
        sock.sendall(raw_post(tongue.path, json.dumps(tongue.body(**options)).encode()))
        yield sock


def requests_of(server: Server, model: str = "recital") -> tuple[int, int]:
    status = server.status(model)
    return status["requests_running"], status["requests_waiting"]


# topic: Engine
# Clients that leave at every stage, in every dialect.

HOLD = (
    "        self.c.llama_backend_init()\n",
    "        self.c.llama_backend_init()\n        while os.path.exists('hold'):\n            time.sleep(0.02)\n",
)


@pytest.fixture(scope="module")
def single(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that runs one request at a time; a load waits while the file `hold` is there."""
    folder = tmp_path_factory.mktemp("single")
    flags: list[str | Path] = ["--models-dir", models, "--ctx", str(LONG_CTX), "--parallel", "1"]
    with shared(folder / "home", *flags, script=altered(folder, HOLD)) as running:
        running.load("recital")
        yield running


@contextlib.contextmanager
def held_load(server: Server) -> Iterator[None]:
    """The model is unloaded, and its next load waits for the block's end."""
    server.unload("recital")
    hold = server.home / "hold"
    hold.touch()
    try:
        yield
    finally:
        hold.unlink(missing_ok=True)


def nobody_left(server: Server) -> None:
    eventually(lambda: requests_of(server) == (0, 0), "nobody is left")


@streamed_and_plain
@in_every_tongue
def test_client_that_leaves_during_decoding_ends_its_request(tongue: Tongue, stream: bool, single: Server) -> None:
    with requested(single, tongue, stream=stream) as sock:
        eventually(lambda: requests_of(single) == (1, 0), "it runs")
        if stream:
            assert sock.recv(1).startswith(b"H")
    nobody_left(single)


@streamed_and_plain
@in_every_tongue
def test_client_that_leaves_while_its_prompt_is_read_ends_its_request(tongue: Tongue, stream: bool, single: Server) -> None:
    with requested(single, tongue, stream=stream, pad=random.choice("bcdefg") * 40_000):
        eventually(lambda: requests_of(single) == (1, 0), "it runs")
    nobody_left(single)


@streamed_and_plain
@in_every_tongue
def test_client_that_leaves_while_it_waits_frees_its_place(tongue: Tongue, stream: bool, single: Server) -> None:
    with requested(single, TONGUES["native"]):
        eventually(lambda: requests_of(single) == (1, 0), "another runs")
        with requested(single, tongue, stream=stream):
            eventually(lambda: requests_of(single) == (1, 1), "it waits")
        eventually(lambda: requests_of(single) == (1, 0), "it waits no more")
    nobody_left(single)


def test_clients_that_leave_while_the_model_loads_are_waited_for_no_more(single: Server) -> None:
    with held_load(single), contextlib.ExitStack() as stack:
        for tongue, stream in itertools.product(TONGUES.values(), (True, False)):
            stack.enter_context(requested(single, tongue, stream=stream))
        eventually(lambda: requests_of(single) == (0, 2 * len(TONGUES)), "all wait")
        stack.close()
        nobody_left(single)
        assert single.status("recital")["status"] == "loading"
    assert single.generate().text == TEXTS[":"]


def test_websocket_that_closes_while_it_waits_frees_its_place(single: Server) -> None:
    with requested(single, TONGUES["native"]):
        eventually(lambda: requests_of(single) == (1, 0), "another runs")
        with single.ws() as ws:
            ws.send(json.dumps(TONGUES["native"].body()))
            eventually(lambda: requests_of(single) == (1, 1), "it waits")
        eventually(lambda: requests_of(single) == (1, 0), "it waits no more")
    nobody_left(single)


def test_websocket_that_closes_while_the_model_loads_is_waited_for_no_more(single: Server) -> None:
    with held_load(single):
        with single.ws() as ws:
            ws.send(json.dumps(TONGUES["native"].body()))
            eventually(lambda: requests_of(single) == (0, 1), "it waits")
        nobody_left(single)


def test_websocket_whose_client_vanishes_while_its_prompt_is_read_ends_its_request(single: Server) -> None:
    with single.ws() as ws:
        ws.send(json.dumps(TONGUES["native"].body(pad="h" * 40_000)))
        eventually(lambda: requests_of(single) == (1, 0), "it runs")
        ws.socket.shutdown(socket.SHUT_RDWR)  # no closing frame
        nobody_left(single)


# topic: HTTP
# Clients that read slowly or never, many at once, and connections used for long.


def logprobs_of_20(path: str = "/v1/chat/completions") -> bytes:
    body = TONGUES["chat"].body() | {"logprobs": True, "top_logprobs": 20}
    return raw_post(path, json.dumps(body).encode())


def connect_stalled(server: Server, request: bytes) -> socket.socket:
    """A connection with a small buffer, on which a request was sent and nothing is read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(HANG)
    sock.connect((server.host, server.port))
    sock.sendall(request)
    return sock


def test_client_too_far_behind_is_given_up_and_told_why(serve: Callable[..., Server], models: Path, tmp_path: Path) -> None:
    script = altered(tmp_path, ("MAX_UNREAD = 4 * MIB", "MAX_UNREAD = MIB // 4"))
    own = serve("--models-dir", models, "--ctx", str(LONG_CTX), script=script)
    own.load("recital")
    with connect_stalled(own, logprobs_of_20()) as sock:
        eventually(lambda: requests_of(own) == (1, 0), "it runs")
        nobody_running = eventually(lambda: requests_of(own)[0] == 0, "the engine's work for it ends")
        body = read_reply(sock).body
    assert nobody_running and "too slowly" in last_document(body)["error"]["details"]
    said = [json.loads(line[6:]) for line in body.splitlines() if line.startswith(b"data: ")][:-1]
    text = "".join(d["choices"][0]["delta"].get("content") or "" for d in said)
    assert ("Tick " + "tock tick " * LONG_CTX).startswith(text.rstrip() + " ") and len(text) > 1000


def test_300_clients_at_once_are_all_answered(server: Server) -> None:
    tongues = [t for t, _ in zip(itertools.cycle(TONGUES.values()), range(300), strict=False)]
    with ThreadPoolExecutor(300) as pool:
        replies = list(pool.map(lambda t: server.post(t.path, t.body("hi")), tongues))
    assert all(r.status == 200 and ends_well(r.body) for r in replies)


@linux
def test_connection_serves_thousands_of_requests(server: Server) -> None:
    server.generate()
    before = held(server)
    requests: list[tuple[str, str, bytes | None]] = [("GET", "/api/models/recital/status", None), ("GET", "/health", None)] * 50
    requests += [("POST", t.path, encoded(t.body("hi", stream=False))) for t in TONGUES.values()]
    with contextlib.closing(server.connect()) as connection:
        for method, path, body in requests * 20:
            connection.request(method, path, body)
            response = connection.getresponse()
            assert response.status == 200 and response.read()
        used = connection.sock
        assert used is not None
    assert_holds_as_before(server, before)


@streamed_and_plain
@in_every_tongue
def test_client_that_half_closes_gets_its_answer_in_every_tongue(tongue: Tongue, stream: bool, server: Server) -> None:
    with requested(server, tongue, text="hi", stream=stream) as sock:
        sock.shutdown(socket.SHUT_WR)
        reply = read_reply(sock)
    assert reply.status == 200 and (not stream or ends_well(reply.body))


# topic: Worker
# Engines that are killed, stopped, starved or robbed of their file, at every stage.


def engines_of(server: Server) -> list[int]:
    """The engines' process ids, those that load included."""
    found = []
    for pid in descendants(server.process.pid):
        with contextlib.suppress(OSError):
            if b"engine_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def engine_of(server: Server) -> int:
    """The one engine's process id, also while it loads; helpers have no such name in their command line."""

    return eventually(lambda: engines_of(server), "an engine")[-1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV], ids=lambda n: n.name)
@linux
def test_engine_killed_while_it_loads_fails_that_load(number: int, single: Server) -> None:
    with ThreadPoolExecutor(len(TONGUES)) as pool, held_load(single):
        waiters = [pool.submit(single.post, t.path, t.body("hi", stream=False)) for t in TONGUES.values()]
        eventually(lambda: requests_of(single) == (0, len(TONGUES)), "all wait")
        os.kill(engine_of(single), number)
        replies = [waiter.result() for waiter in waiters]
    assert {reply.status for reply in replies} == {500}
    assert all("could not be loaded" in reply.body.decode() for reply in replies)
    assert single.generate().text == TEXTS[":"]


@linux
@streamed_and_plain
def test_engine_killed_while_it_reads_a_prompt_fails_all_that_run_and_wait(stream: bool, single: Server) -> None:
    bodies = [(t.path, t.body("hi", pad="i" * 40_000, stream=stream)) for t in TONGUES.values()]
    with ThreadPoolExecutor(len(bodies)) as pool:
        waiters = [pool.submit(single.post, *each) for each in bodies]
        eventually(lambda: requests_of(single) == (1, len(TONGUES) - 1), "one runs, the others wait")
        os.kill(engine_of(single), signal.SIGKILL)
        replies = [waiter.result() for waiter in waiters]
    if stream:
        assert all(r.status == 500 or ends_with_an_error(r.body) for r in replies)
    else:
        assert {r.status for r in replies} == {500}
    assert single.generate().text == TEXTS[":"]


@linux
def test_engine_that_hangs_while_it_reads_a_prompt_is_replaced(
    serve: Callable[..., Server], models: Path, tmp_path: Path
) -> None:
    own = serve("--models-dir", models, "--ctx", str(LONG_CTX), "--parallel", "1", script=altered(tmp_path, *HURRY))
    own.load("recital")
    with ThreadPoolExecutor(len(TONGUES)) as pool:
        waiters = [pool.submit(own.post, t.path, t.body("hi", pad="i" * 40_000, stream=False)) for t in TONGUES.values()]
        eventually(lambda: requests_of(own) == (1, len(TONGUES) - 1), "one runs, the others wait")
        engine = engine_of(own)
        os.kill(engine, signal.SIGSTOP)
        replies = [waiter.result() for waiter in waiters]
    assert all(r.status == 500 and "said nothing" in r.body.decode() for r in replies)
    assert not alive(engine) and own.generate().text == TEXTS[":"]


@linux
def test_engine_out_of_memory_fails_requests_and_is_replaced(serve: Callable[..., Server], models: Path) -> None:
    own = serve("--models-dir", models, "--ctx", str(LONG_CTX))
    own.load("recital")
    engine = engine_of(own)
    size = int(Path(f"/proc/{engine}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(engine, resource.RLIMIT_AS, (size, size))
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda i: own.generate(f"{i} " * 10_000 + "#", max_tokens=10), range(8)))
    assert all(r.status == 200 or r.json()["error"]["code"] == "generation_failed" for r in replies)
    eventually(lambda: requests_of(own) == (0, 0), "nobody is left")
    own.unload("recital", "?force=true")
    assert own.generate().text == TEXTS[":"] and engine_of(own) != engine
    assert_healthy(own)


BABBLE = {
    "bytes that are no message": "pipe._writer.write(b'\\xff' * 64); pipe._writer.flush()",
    "a message of 4 GiB": "pipe._writer.write(b'\\xff\\xff\\xff\\xff'); pipe._writer.flush()",
    "a closed pipe": "pipe._writer.close()",
}


@pytest.fixture(scope="module")
def breakable(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose engine runs the file `break` with its next heartbeat."""
    folder = tmp_path_factory.mktemp("breakable")
    beat = "            pipe.send(Alive(tuple((pulse.task, pulse.begun) for pulse in pulses)))\n"
    lines = ("if os.path.exists('break'):", "    os.rename('break', 'broken')", "    exec(open('broken').read())")
    breaks = "".join(f"            {line}\n" for line in lines)
    script = altered(folder, (beat, breaks + beat), *HURRY)
    running = Server(folder / "home", "--port", "0", "--models-dir", models, "--ctx", str(LONG_CTX), script=script)
    yield running
    running.stop()


@linux
@cases("fault", BABBLE)
def test_engine_whose_pipe_breaks_is_replaced(fault: str, breakable: Server) -> None:
    with breakable.endless() as stream:
        next(stream)
        engine = engine_of(breakable)
        (breakable.home / "next").write_text(fault)
        (breakable.home / "next").rename(breakable.home / "break")
        rest = [event for event in stream if event != "[DONE]"]
    assert rest[-1]["error"]["code"] == "generation_failed"
    eventually(lambda: not alive(engine), "the engine is gone")
    assert breakable.generate().text == TEXTS[":"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with three models whose files may be changed, in its home's `models`."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("truncated", "deleted", "replaced"):
        write_recital(folder / "models" / f"{name}.gguf", name=name)
    with shared(folder, "--models-dir", folder / "models", "--ctx", str(LONG_CTX)) as running:
        yield running


def loaded_file(server: Server, model: str) -> Path:
    """Loads a model of `files`, and returns its file's path."""
    assert server.load(model).status == 200
    return server.home / "models" / f"{model}.gguf"


@linux
def test_file_truncated_while_loaded_fails_what_runs(files: Server) -> None:
    path = loaded_file(files, "truncated")
    whole = path.read_bytes()
    with files.endless("truncated") as stream:
        next(stream)
        os.truncate(path, 4096)
        rest = [event for event in stream if event != "[DONE]"]
    assert rest[-1]["error"]["code"] == "generation_failed"
    again = files.generate(model="truncated")
    assert again.status in (404, 500) and again.json()["error"]["code"] in ("model_not_found", "generation_failed")
    path.write_bytes(whole)
    assert eventually(lambda: files.generate(model="truncated").status == 200, "the file is whole again")


def test_file_deleted_while_loaded_serves_until_it_is_unloaded(files: Server) -> None:
    loaded_file(files, "deleted").unlink()
    files.post("/api/models/discover")
    assert files.generate(model="deleted").text == TEXTS[":"]
    assert files.unload("deleted").json()["status"] == "unloaded"
    reply = files.generate(model="deleted")
    assert reply.status in (404, 500) and reply.json()["error"]["code"] in ("model_not_found", "generation_failed")


def test_file_replaced_while_loaded_serves_the_old_one_until_it_is_unloaded(files: Server, tmp_path: Path) -> None:
    other = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}="
    os.replace(write_recital(tmp_path / "new.gguf", template=other), loaded_file(files, "replaced"))
    files.post("/api/models/discover")
    assert files.chat(model="replaced").message["content"] == TEXTS[":"]
    files.unload("replaced")
    assert files.chat(model="replaced").message["content"].strip() == TEXTS["="].strip()


def hammer(server: Server, number: int, seconds: float) -> dict[str, int]:
    """Loads, unloads, asks and generates at random; counts the answers. Asserts that each is well-formed."""
    rng, counts, until = random.Random(number), dict[str, int](), time.monotonic() + seconds
    while time.monotonic() < until:
        model, what = rng.choice(("recital", "plain", "dice")), rng.choice(("load", "unload", "status", "generate"))
        if what == "generate":
            answer = server.generate(model=model, max_tokens=rng.choice((1, 50)), stream=rng.random() < 0.5)
        elif what == "status":
            answer = server.get(f"/api/models/{model}/status")
        else:
            answer = server.post(f"/api/models/{model}/{what}{rng.choice(('', '?force=true'))}")
        failed = answer.status != 200 or (answer.headers["Content-Type"].startswith("text/event") and not ends_well(answer.body))
        error = (last_document(answer.body) if answer.status == 200 else answer.json())["error"] if failed else None
        assert not error or error["code"] in ("generation_failed", "overloaded"), (what, error)
        assert what != "status" or answer.json()["status"] in ("unloaded", "loading", "loaded", "unloading", "failed")
        key = f"{what} {error['details'] if error else 'ok'}"
        counts[key] = counts.get(key, 0) + 1
    return counts


SOAK_MINUTES = float(os.environ.get("SHIMMY_SOAK", 0))


@linux
@pytest.mark.soak
def test_loads_and_unloads_from_all_sides_end_in_a_consistent_state(serve: Callable[..., Server], models: Path) -> None:
    own = serve("--models-dir", models, "--max-loaded", "2")
    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(lambda i: hammer(own, i, 60.0 if SOAK_MINUTES else 2.0), range(4)))
    unexpected = {k for c in counts for k in c if not k.endswith(" ok") and "unloaded" not in k}
    assert not unexpected
    for model in ("recital", "plain", "dice"):
        assert own.unload(model).json()["status"] == "unloaded" and requests_of(own, model) == (0, 0)
    assert not [pid for pid in engines_of(own) if alive(pid)] and own.generate().text == TEXTS[":"]
    assert_healthy(own)


# topic: Lifecycle
# Shutdown at every stage, what a killed server leaves, suspended machines, clocks that jump.

SHORT_GRACE = ("GRACE_SECONDS = 5.0", "GRACE_SECONDS = 0.5")


def test_streams_end_in_their_tongue_when_the_grace_time_is_over(
    serve: Callable[..., Server], models: Path, tmp_path: Path
) -> None:
    flags = ["--models-dir", models, "--ctx", str(LONG_CTX), "--parallel", "4"]
    own = serve(*flags, script=altered(tmp_path, SHORT_GRACE))
    asks = [(t.path, t.body(stream=stream)) for t in TONGUES.values() for stream in (True, False)]
    own.load("recital")
    with ThreadPoolExecutor(len(asks)) as pool, own.ws() as ws:
        replies = pool.map(lambda each: own.post(*each), asks)
        ws.send(json.dumps(TONGUES["native"].body()))
        eventually(lambda: requests_of(own) == (4, len(asks) - 3), "four run, the others wait")
        own.signal(signal.SIGTERM)
        for (path, body), reply in zip(asks, replies, strict=True):
            assert reply.status == 503 or (body["stream"] and ends_with_an_error(reply.body)), path
            assert b"shutting down" in reply.body, path
        last = {}
        with contextlib.suppress(ConnectionClosed):
            while True:
                last = json.loads(ws.recv(HANG))
    assert "shutting down" in last["error"]["details"]
    assert own.process.wait(HANG) == 0 and "Traceback" not in own.log.read_text()


@linux
def test_clients_of_a_model_that_loads_are_told_of_the_shutdown(
    serve: Callable[..., Server], models: Path, tmp_path: Path
) -> None:
    ping = ("PING_SECONDS = 15.0", "PING_SECONDS = 0.1")  # the heads of the streams are out
    own = serve("--models-dir", models, script=altered(tmp_path, HOLD, ping))
    asks = [(t.path, t.body("hi", stream=stream)) for t in TONGUES.values() for stream in (True, False)]
    with held_load(own), ThreadPoolExecutor(len(asks)) as pool:
        replies = pool.map(lambda each: own.post(*each), asks)
        eventually(lambda: requests_of(own) == (0, len(asks)), "all wait")
        engine = engine_of(own)
        time.sleep(0.5)
        own.signal(signal.SIGTERM)
        for (path, body), reply in zip(asks, replies, strict=True):
            assert reply.status == 503 or (body["stream"] and ends_with_an_error(reply.body)), path
            assert b"shutting down" in reply.body, path
        assert own.process.wait(HANG) == 0
    eventually(lambda: not alive(engine), "the engine is gone")


def test_stream_of_a_model_that_is_being_unloaded_finishes_before_the_exit(serve: Callable[..., Server], models: Path) -> None:
    own = serve("--models-dir", models, "--ctx", str(LONG_CTX))
    with ThreadPoolExecutor() as pool, own.stream("/api/generate", TONGUES["native"].body() | {"max_tokens": 3000}) as stream:
        next(stream)
        unload = pool.submit(own.unload, "recital")
        eventually(lambda: own.status("recital")["status"] == "unloading", "it is being unloaded")
        own.signal(signal.SIGTERM)
        rest = list(stream)
        assert unload.result().status in (200, 503)
    assert rest[-1] == "[DONE]" and rest[-2]["choices"][0]["finish_reason"] == "length"
    assert own.process.wait(HANG) == 0


@linux
def test_server_killed_under_load_leaves_nothing_behind(serve: Callable[..., Server], models: Path, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    shm = set(os.listdir("/dev/shm"))
    own = serve("--models-dir", models, "--ctx", str(LONG_CTX), env={"TMPDIR": str(tmp_path / "tmp")})
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(requested(own, tongue)) for tongue in TONGUES.values()]
        stack.enter_context(requested(own, TONGUES["native"], pad="j" * 40_000))
        own.load("plain")
        assert all(sock.recv(1) for sock in socks)
        children = descendants(own.process.pid)
        own.process.kill()
        own.process.wait(HANG)
        assert len(children) == 3  # two engines and a helper
        eventually(lambda: not any(map(alive, children)), "every child ends by itself")
    assert not list((tmp_path / "tmp").iterdir()) and set(os.listdir("/dev/shm")) <= shm
    with socket.create_server((own.host, own.port)):
        pass


@linux
def test_server_killed_while_it_loads_leaves_no_engine(serve: Callable[..., Server], models: Path, tmp_path: Path) -> None:
    own = serve("--models-dir", models, script=altered(tmp_path, HOLD))
    with held_load(own), requested(own, TONGUES["native"]):
        children = [engine_of(own)]
        own.process.kill()
        own.process.wait(HANG)
        eventually(lambda: not any(map(alive, children)), "the engine ends by itself")


def all_processes(server: Server) -> list[int]:
    return [server.process.pid, *descendants(server.process.pid)]


@contextlib.contextmanager
def suspended(server: Server, seconds: float) -> Iterator[None]:
    """The server and all of its children stand still for a while, as on a machine that sleeps; then the block runs."""
    pids = all_processes(server)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    for pid in reversed(pids):
        os.kill(pid, signal.SIGCONT)
    yield
    assert [pid for pid in pids if not alive(pid)] == []


@linux
def test_machine_that_sleeps_and_wakes_loses_no_stream(serve: Callable[..., Server], models: Path, tmp_path: Path) -> None:
    bounds = [('"decode": 900', '"decode": 1'), ('"sample": 120', '"sample": 1'), ('"tokenize": 300', '"tokenize": 1'),
              ('"load": 600', '"load": 1')]  # fmt: skip
    flags = ["--models-dir", models, "--ctx", str(LONG_CTX), "--parallel", "9"]
    own = serve(*flags, script=altered(tmp_path, *HURRY, *bounds))
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(requested(own, tongue)) for tongue in TONGUES.values()]
        stack.enter_context(requested(own, TONGUES["native"], pad="k" * 60_000))
        assert all(sock.recv(1) for sock in socks)
        with suspended(own, 4.0):
            for sock in socks:
                sock.recv(1 << 20)
            time.sleep(2.5)
            assert all(sock.recv(1 << 20) for sock in socks)
            assert requests_of(own)[0] >= len(socks) - 1
    assert "said nothing" not in own.log.read_text() and "did not come" not in own.log.read_text()


@linux
def test_machine_that_sleeps_while_a_template_is_rendered_loses_no_request(
    serve: Callable[..., Server], models: Path, tmp_path: Path
) -> None:
    slow = "        return Outcome(task.run())\n"
    waits = f"        while os.path.exists('hold'):\n            time.sleep(0.02)\n{slow}"
    own = serve("--models-dir", models, script=altered(tmp_path, (slow, waits), ("HELPER_SECONDS = 1.5", "HELPER_SECONDS = 0.5")))
    assert own.chat().status == 200  # what is asked of a new template once has been asked
    (own.home / "hold").touch()
    with ThreadPoolExecutor() as pool:
        reply = pool.submit(own.chat)
        time.sleep(0.2)
        with suspended(own, 4.0):
            (own.home / "hold").unlink()
            assert reply.result().message["content"] == TEXTS[":"]


def test_clock_that_runs_backwards_changes_nothing_but_dates(
    serve: Callable[..., Server], models: Path, tmp_path: Path
) -> None:
    script = wrapper(tmp_path, "import time", "real = time.time", "began = real()", "time.time = lambda: 2 * began - real()")
    own = serve("--models-dir", models, "--max-loaded", "2", script=script)
    for model in ("plain", "recital", "plain", "dice"):
        assert own.generate(model=model, max_tokens=2).status == 200
    assert own.get("/health").json()["uptime_seconds"] > 0
    assert [own.status(model)["loaded"] for model in ("plain", "recital", "dice")] == [True, False, True]


DATES = {  # who may ask for the time of day: what becomes a date that people or clients read, or is compared with a file's
    "_bytecode_prefix", "Residents.worker_for", "Residents.release", "Service.__init__", "OpenAI.__init__",
    "Responses.read", "Ollama._document", "answer_ps",
}  # fmt: skip


def test_wall_clock_is_asked_only_for_dates() -> None:
    """A clock that jumps ends no wait, and keeps none for ever: those ask time.monotonic()."""
    asking: set[str] = set()

    def visit(node: ast.AST, owner: str) -> None:
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("time.time", "time.time_ns"):
            asking.add(owner)
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, (ast.FunctionDef, ast.ClassDef))
            visit(child, f"{owner}.{child.name}".lstrip(".") if named else owner)  # type: ignore[attr-defined]

    visit(ast.parse(SHIMMY.read_text()), "")
    assert asking == DATES


# topic: Soak
# `python test_shimmy.py soak` runs mixed traffic for minutes: nothing may grow, no answer may lack its end. Exit 1 if so.


def test_soak_of_seconds_finds_nothing() -> None:
    command = [sys.executable, __file__, "soak", "--minutes", "0.03", "--kill", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "websocket" in done.stdout and "descriptors" in done.stdout


class Improper(Exception):
    """An answer without a proper end, or that is none of its dialect."""


SOAK_SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
               "required": ["name", "age"], "additionalProperties": False}  # fmt: skip


class Soak:
    """Mixed traffic on one server. Each kind of traffic is a method that makes one request and says how it ended."""

    KINDS = (*TONGUES, "websocket", "tools", "schema", "embeddings", "leaving", "loading", "asking")

    def __init__(self, server: Server, kill: float) -> None:
        self.server, self.kill = server, kill
        self.ends = {kind: dict.fromkeys(("complete", "error", "left", "improper"), 0) for kind in self.KINDS}
        self.faults: list[str] = []
        self.kills = 0
        self._lock = threading.Lock()

    def run(self, seconds: float) -> list[float]:
        """Runs every kind at once. Returns the seconds that each of the same probes took."""
        until = time.monotonic() + seconds
        threads = [threading.Thread(target=self._repeat, args=(kind, until)) for kind in self.KINDS]
        threads.append(threading.Thread(target=self._kill_engines, args=(until,)))
        for thread in threads:
            thread.start()
        probes = []
        while time.monotonic() < until:
            began = time.perf_counter()
            if self.server.generate("=").status == 200:
                probes.append(time.perf_counter() - began)
            time.sleep(0.2)
        for thread in threads:
            thread.join()
        return probes

    def _repeat(self, kind: str, until: float) -> None:
        rng = random.Random(kind)
        while time.monotonic() < until:
            try:
                end = self._tongue(TONGUES[kind], rng) if kind in TONGUES else getattr(self, f"_{kind}")(rng)
            except Exception as fault:  # whatever it is, it is no proper end
                end = "improper"
                self.faults.append(f"{kind}: {type(fault).__name__}: {fault}"[:300])
            with self._lock:
                self.ends[kind][end] += 1
            time.sleep(rng.random() / 10)

    def _kill_engines(self, until: float) -> None:
        rng = random.Random(0)
        while time.monotonic() + self.kill < until:
            time.sleep(self.kill)
            if found := engines_of(self.server):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(found), signal.SIGKILL)
                    self.kills += 1

    @staticmethod
    def _judged(reply: Reply, stream: bool = False) -> str:
        """How an answer ended. Raises Improper."""
        if reply.status in (500, 503):
            document = reply.json()
            if not document.get("error"):
                raise Improper(f"{reply.status} {reply.body[:200]!r}")
            return "error"
        if reply.status != 200:
            raise Improper(f"{reply.status} {reply.body[:200]!r}")
        if not stream:
            reply.json()
            return "complete"
        if not ends_well(reply.body) and not ends_with_an_error(reply.body):
            raise Improper(f"ends with {reply.body[-200:]!r}")
        return "complete" if ends_well(reply.body) else "error"

    def _tongue(self, tongue: Tongue, rng: random.Random) -> str:
        stream, body = rng.random() < 0.7, tongue.body(rng.choice(("forever", "hi")), pad="x" * rng.choice((0, 10, 3000)))
        body["stream"] = stream
        limit = rng.choice((1, 20, 300))
        for name in tongue.fields:
            body[name] = {"num_predict": limit} if name == "options" else limit if name != "raw" else True
        return self._judged(self.server.post(tongue.path, body), stream)

    def _websocket(self, rng: random.Random) -> str:
        with self.server.ws() as ws:
            for _ in range(rng.choice((1, 3))):
                ws.send(json.dumps({"model": "recital", "prompt": "#", "max_tokens": rng.choice((1, 300))}))
                if cancel := rng.random() < 0.3:
                    ws.send('{"cancel": true}')
                end = ws_answer(ws)[1]
                if "error" in end:
                    return "error"
                if not end["done"] or not (end["finish_reason"] == "length" or cancel):
                    raise Improper(str(end))
        return "complete"

    def _tools(self, rng: random.Random) -> str:
        messages = [{"role": "user", "content": f"What is {rng.randrange(100)} plus {rng.randrange(100)}?"}]
        body = {"model": "shimmy-tiny", "messages": messages, "tools": [{"type": "builtin", "name": "calculator"}],
                "max_tokens": 60, "stream": (stream := rng.random() < 0.5)}  # fmt: skip
        return self._judged(self.server.post("/v1/chat/completions", body), stream)

    def _schema(self, rng: random.Random) -> str:
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SOAK_SCHEMA}}
        fields = {"response_format": form, "max_tokens": 100, "seed": rng.randrange(9)}
        reply = self.server.chat("Describe a person as JSON.", "shimmy-tiny", **fields)
        end = self._judged(reply)
        if end == "complete" and reply.finish_reason == "stop":
            json.loads(reply.message["content"])
        return end

    def _embeddings(self, rng: random.Random) -> str:
        texts = ["word " * rng.randrange(1, 30) for _ in range(rng.randrange(1, 6))]
        reply = self.server.post("/v1/embeddings", {"model": "recital", "input": texts})
        end = self._judged(reply)
        if end == "complete" and len(reply.json()["data"]) != len(texts):
            raise Improper("vectors are missing")
        return end

    def _leaving(self, rng: random.Random) -> str:
        tongue = rng.choice(list(TONGUES.values()))
        with requested(self.server, tongue, pad="y" * rng.choice((0, 5000)), stream=rng.random() < 0.7) as sock:
            sock.settimeout(rng.choice((0.001, 0.05, 0.3)))
            with contextlib.suppress(TimeoutError):
                sock.recv(1000)
        return "left"

    def _loading(self, rng: random.Random) -> str:
        replies = [self.server.load("dice"), self.server.generate("Once", "dice", max_tokens=5),
                   self.server.unload("dice", rng.choice(("", "?force=true")))]  # fmt: skip
        return min((self._judged(reply) for reply in replies), key=("error", "complete").index)

    def _asking(self, rng: random.Random) -> str:
        path = rng.choice(("/health", "/api/models", "/v1/models", "/api/ps", "/api/tags", "/", "/api/models/dice/status"))
        reply = self.server.get(path)
        if reply.status != 200 or not reply.body:
            raise Improper(f"{path} {reply.status}")
        return "complete"


def at_rest(server: Server) -> dict[str, float]:
    """What the server holds once nothing runs: memory (MB), descriptors, threads."""
    health = lambda: server.get("/health").json()  # noqa: E731
    eventually(lambda: health()["requests_running"] == health()["requests_waiting"] == 0, "nothing runs")
    time.sleep(3.0)  # connections and threads that end
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    descriptors, threads = held(server)
    return {"memory (MB)": pages * resource.getpagesize() / 1e6, "descriptors": descriptors, "threads": threads}


SOAK_ROOM = {"memory (MB)": (1.1, 10.0), "descriptors": (1.0, 6.0), "threads": (1.0, 6.0)}  # may grow by this factor, and so much


def soak(arguments: list[str]) -> int:
    """Runs the traffic, prints how it ended, and returns the exit status."""
    parser = argparse.ArgumentParser(prog="test_shimmy.py soak", description="Mixed traffic; exit 1 when something breaks.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--kill", type=float, default=60.0, help="seconds between engines that are killed")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        write_recital(Path(folder) / "models" / "recital.gguf")
        write_dice(Path(folder) / "models" / "dice.gguf")
        flags: list[str | Path] = ["--models-dir", f"{folder}/models", "--models-dir", REPO / "models", "--ctx", "8192"]
        server = Server(Path(folder) / "home", "--port", "0", *flags)
        try:
            return soaked(Soak(server, options.kill), options.minutes * 60)
        finally:
            server.stop()


def soaked(traffic: Soak, seconds: float) -> int:
    traffic.run(min(60.0, seconds / 4))  # warms up: lazy imports, caches, the largest of everything
    before = at_rest(traffic.server)
    probes = traffic.run(seconds)
    after = at_rest(traffic.server)
    print(f"{'traffic':<18}{'complete':>10}{'error':>8}{'left':>8}{'improper':>10}")
    for kind, ends in traffic.ends.items():
        print(f"{kind:<18}{ends['complete']:>10}{ends['error']:>8}{ends['left']:>8}{ends['improper']:>10}")
    fifth = max(1, len(probes) // 5)
    first, last = (statistics.median(part) * 1000 for part in (probes[:fifth], probes[-fifth:]))
    print(f"engines killed: {traffic.kills}; {len(probes)} probes, {first:.0f} ms at first, {last:.0f} ms at last")
    wrong = list(traffic.faults)
    if len(probes) >= 100 and last > 1.5 * first + 20:  # fewer say nothing
        wrong.append("the last probes took longer than the first")
    for what, (factor, more) in SOAK_ROOM.items():
        print(f"{what:<18}{before[what]:>10.1f} -> {after[what]:.1f}")
        if after[what] > before[what] * factor + more:
            wrong.append(f"{what} grew")
    if "Traceback" in traffic.server.log.read_text():
        wrong.append("the server logged a traceback: " + traffic.server.log.read_text().split("Traceback", 1)[1][-1500:])
    for fault in wrong[:20]:
        print("FAULT", fault)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(soak(sys.argv[2:]) if sys.argv[1:2] == ["soak"] else "python new_tests_faults.py soak [--help]")
