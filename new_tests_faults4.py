"""Tests of branch faults4; the lead moves them into test_shimmy.py."""
# ruff: noqa: F811
from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from test_shimmy import (  # noqa: F401
    BERT,
    GAP_TOKENS,
    HANG,
    HOLD,
    LONG_CTX,
    REPO_NAME,
    SHIMMY,
    SHORT_GRACE,
    TEXT,
    TEXTS,
    TONGUES,
    VOCABULARY,
    FakeHub,
    Server,
    alive,
    altered,
    assert_error,
    assert_failed_last,
    assert_healthy,
    assert_ollama_error,
    cases,
    encoded,
    environment,
    eventually,
    fetched,
    frame,
    hub,
    interruptible,
    linux,
    memory_of,
    models,
    narrow_terminal,
    parts,
    pty,
    raw_post,
    raw_ws,
    read_reply,
    real_hub,
    requested,
    requests_of,
    serve,
    server,
    shared,
    shimmy,
    tool_root,
    words,
    write_recital,
    ws_ask,
)

# topic: WebSocket
# Clients that stop reading.


@contextlib.contextmanager
def stalled_ws(server: Server, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A WebSocket on which a request was sent and nothing is read."""
    with raw_ws(server, frame(TEXT, json.dumps(body).encode())) as sock:
        eventually(lambda: requests_of(server) != (0, 0), "it runs")
        yield sock


def ws_documents(sock: socket.socket) -> Iterator[dict[str, Any]]:
    """The documents in a server's unmasked text frames (RFC 6455, 5.2), pings left out."""
    stream = sock.makefile("rb")
    while head := stream.read(2):
        longer = {126: 2, 127: 8}.get(head[1], 0)
        data = stream.read(int.from_bytes(stream.read(longer), "big") if longer else head[1])
        if head[0] & 15 == TEXT:
            yield json.loads(data)


SMALL_UNREAD = ("MAX_UNREAD = 4 * MIB", "MAX_UNREAD = MIB // 4")


@pytest.fixture(scope="session")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose words have 4,000 characters, so that a client is soon far behind."""
    folder = tmp_path_factory.mktemp("wordy")
    tokens = [token[:3] * 1300 + "▁" if token in ("tick▁", "tock▁") else token for token in VOCABULARY]
    write_recital(folder / "recital.gguf", tokens=tokens)
    return folder


def test_ws_client_too_far_behind_is_given_up_and_told_why(
    serve: Callable[..., Server], wordy: Path, tmp_path: Path
) -> None:
    own = serve("--models-dir", wordy, "--ctx", str(LONG_CTX), script=altered(tmp_path, SMALL_UNREAD))
    own.load("recital")
    text = ""
    with stalled_ws(own, TONGUES["native"].body()) as sock:
        eventually(lambda: requests_of(own)[0] == 0, "the engine's work for it ends")
        for document in ws_documents(sock):
            if "error" in document:
                break
            text += document["token"]
    assert "too slowly" in document["error"]["details"], document
    assert len(text) > 200_000 and set(text.removeprefix("Tick ").split()) == {"tic" * 1300, "toc" * 1300}


def test_ws_client_that_reads_nothing_for_too_long_is_dropped(
    serve: Callable[..., Server], wordy: Path, tmp_path: Path
) -> None:
    script = altered(tmp_path, ("WRITE_SECONDS = 60.0", "WRITE_SECONDS = 0.5"))
    own = serve("--models-dir", wordy, "--ctx", str(LONG_CTX), script=script)
    own.load("recital")
    with stalled_ws(own, TONGUES["native"].body()):
        eventually(lambda: requests_of(own) == (0, 0), "the engine's work for it ends")
        eventually(lambda: b"shimmy_open_connections 1\n" in own.get("/metrics").body, "only the asking connection is open")
    assert ws_ask(own, prompt=":")[0] == TEXTS[":"]
    assert_healthy(own)


@linux
def test_ws_clients_that_stop_reading_take_little_memory_and_hold_nobody_up(
    serve: Callable[..., Server], wordy: Path, tmp_path: Path
) -> None:
    own = serve("--models-dir", wordy, "--ctx", str(LONG_CTX), "--parallel", "9", script=altered(tmp_path, SMALL_UNREAD))
    own.load("recital")
    with contextlib.ExitStack() as stack:
        before = memory_of(own)
        for _ in range(8):
            stack.enter_context(stalled_ws(own, TONGUES["native"].body()))
        while requests_of(own)[0]:
            assert ws_ask(own, prompt="=")[0] == TEXTS["="]
        assert memory_of(own) - before < 30 << 20


def test_serve_stops_although_a_ws_client_reads_nothing(
    serve: Callable[..., Server], wordy: Path, tmp_path: Path
) -> None:
    own = serve("--models-dir", wordy, "--ctx", str(LONG_CTX), script=altered(tmp_path, SMALL_UNREAD, SHORT_GRACE))
    own.load("recital")
    with stalled_ws(own, TONGUES["native"].body()):
        eventually(lambda: requests_of(own)[0] == 0, "the engine's work for it ends")
        own.signal(signal.SIGTERM)
        assert own.process.wait(HANG) == 0
    assert "Traceback" not in own.log.read_text()


# topic: Pull
# A busy hub, many pulls at once, a full disk, and clients that leave.


def pulling(server: Server, repo: str = REPO_NAME) -> http.client.HTTPConnection:
    """A connection on which a pull has been asked for."""
    connection = server.connect()
    connection.request("POST", "/api/pull", encoded({"model": f"hf.co/{repo}"}))
    return connection


def statuses(connection: http.client.HTTPConnection) -> list[str]:
    """What an answered pull says, each once in a row."""
    said = [json.loads(line) for line in connection.getresponse().read().splitlines()]
    return [status for status, _ in itertools.groupby(each.get("status") or each["error"] for each in said)]


def test_ollama_pull_tells_each_second_how_long_a_busy_hub_has_it_wait(
    real_hub: FakeHub, serve: Callable[..., Server]
) -> None:
    real_hub.answers = [(429, {"Retry-After": "3"})]
    connection = pulling(serve("--allow-pull", env=real_hub.env))
    response = connection.getresponse()
    first = json.loads(response.readline())
    assert not real_hub.answers and len(real_hub.seen) == 1, "it still waits"
    assert response.status == 200 and first == {"status": f"{real_hub.url[7:]} is busy (429), trying again in 3 s"}
    rest = [json.loads(line) for line in response.read().splitlines()]
    assert [each["status"][-3:] for each in rest[:2]] == ["2 s", "1 s"] and rest[-1] == {"status": "success"}


def test_ollama_pull_of_a_hub_that_stays_busy_ends_with_an_error(hub: FakeHub, serve: Callable[..., Server]) -> None:
    hub.answers = [(429, {"Retry-After": "1"}), (429, {"Retry-After": "3600"})]
    assert statuses(pulling(serve("--allow-pull", env=hub.env)))[-1].endswith("answers 429; it asks to be left alone for 3600 s")


def test_pulls_beyond_four_at_once_are_refused_and_later_ones_served(hub: FakeHub, serve: Callable[..., Server]) -> None:
    own = serve("--allow-pull", env=hub.env)
    hub.hold.clear()
    running = [pulling(own) for _ in range(4)]
    heads = [connection.getresponse() for connection in running]
    assert [head.status for head in heads] == [200] * 4
    refused = own.post("/api/pull", {"model": REPO_NAME})
    assert_ollama_error(refused, 503, "4 models are being fetched already")
    assert refused.headers["Retry-After"]
    hub.hold.set()
    assert [json.loads(head.read().splitlines()[-1]) for head in heads] == [{"status": "success"}] * 4
    assert own.post("/api/pull", {"model": REPO_NAME, "stream": False}).json() == {"status": "success"}
    assert len(hub.downloads()) == 1, "one fetched, the others waited for it"


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of a file's size here")
def test_pull_onto_a_full_disk_says_what_to_do_and_keeps_the_part(hub: FakeHub, tmp_path: Path) -> None:
    small = [sys.executable, "-c", f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (123456, 123456)); {EXEC}"]
    env = environment(tmp_path, hub.env)
    done = subprocess.run([*small, str(SHIMMY), "pull", REPO_NAME], cwd=tmp_path, env=env, capture_output=True, timeout=HANG)
    assert_failed_last(done, "File too large", "make room for 270KB and pull again to go on", ".incomplete")
    assert [part.stat().st_size for part in parts(tmp_path)] == [123456]
    assert shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env).returncode == 0
    assert fetched(tmp_path, "recital-q4_k_m.gguf") == hub.files["recital-q4_k_m.gguf"]
    assert hub.downloads()[-1]["Range"] == "bytes=123456-"


EXEC = "import os, sys; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
WRITE = "left = left[part.write(left) :]"
FULL = "raise OSError(errno.ENOSPC, 'No space left on device')"


@cases("stream,status", {"streamed": (True, 200), "whole": (False, 507)})
def test_ollama_pull_onto_a_full_disk_says_what_to_do(
    stream: bool, status: int, hub: FakeHub, serve: Callable[..., Server], tmp_path: Path
) -> None:
    own = serve("--allow-pull", env=hub.env, script=altered(tmp_path, (WRITE, FULL)))
    reply = own.post("/api/pull", {"model": REPO_NAME, "stream": stream})
    error = json.loads(reply.body.splitlines()[-1])["error"]
    assert reply.status == status and "No space left on device: make room for 391KB" in error
    assert_healthy(own)


def test_pull_of_a_file_that_the_disk_takes_in_pieces_is_whole(hub: FakeHub, tmp_path: Path) -> None:
    script = altered(tmp_path, (WRITE, "left = left[part.write(left[:1000]) :]"))
    assert shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env, script=script).returncode == 0
    assert fetched(tmp_path, "recital-q4_k_m.gguf") == hub.files["recital-q4_k_m.gguf"]


def test_ollama_pull_into_a_folder_that_cannot_be_made_names_it(hub: FakeHub, serve: Callable[..., Server]) -> None:
    own = serve("--allow-pull", env={**hub.env, "HF_HUB_CACHE": "/dev/null/hub"})
    reply = own.post("/api/pull", {"model": REPO_NAME, "stream": False})
    assert_ollama_error(reply, 502, "the model cannot be written: /dev/null/hub")
    assert_healthy(own)


def test_client_that_leaves_a_pull_ends_it_although_the_server_sends_nothing(
    hub: FakeHub, serve: Callable[..., Server]
) -> None:
    own = serve("--allow-pull", "-v", env=hub.env)
    hub.hold.clear()
    connection = pulling(own)
    eventually(lambda: [part for part in parts(own.home) if part.stat().st_size == 200_000], "half of it is here")
    connection.close()
    left = time.monotonic()
    eventually(lambda: "POST /api/pull" in own.log.read_text(), "the pull has ended")
    assert time.monotonic() - left < 10, "it waited for the server's next byte"
    assert [part.stat().st_size for part in parts(own.home)] == [200_000] and not hub.hold.is_set()
    hub.hold.set()
    assert own.post("/api/pull", {"model": REPO_NAME, "stream": False}).json() == {"status": "success"}
    assert hub.downloads()[-1]["Range"] == "bytes=200000-"
    assert_healthy(own)


def test_client_that_leaves_while_the_hub_has_it_wait_ends_the_pull(hub: FakeHub, serve: Callable[..., Server]) -> None:
    own = serve("--allow-pull", "-v", env=hub.env)
    hub.answers = [(429, {"Retry-After": "200"})]
    connection = pulling(own)
    connection.getresponse().readline()
    connection.close()
    eventually(lambda: "POST /api/pull" in own.log.read_text(), "the pull has ended")
    assert_healthy(own)


# topic: Engine
# Clients that leave the routes that make vectors, ranks and gaps, at every stage.


@dataclass(frozen=True)
class Errand:
    """A request of seconds to a route that tells no endless text; used as a Tongue is."""

    path: str
    model: str
    long: dict[str, Any]
    short: dict[str, Any]
    streams: bool = False

    def body(self, stream: bool = False, long: bool = True) -> dict[str, Any]:
        return {"model": self.model, **(self.long if long else self.short), **({"stream": stream} if self.streams else {})}


MANY = [words(*range(90))] * 2000
GAP = {"input_prefix": "a", "input_suffix": "b", "n_predict": 3}
ERRANDS = {
    "embeddings": Errand("/v1/embeddings", "bert", {"input": MANY}, {"input": "w011"}),
    "embeddings of a generative model": Errand("/v1/embeddings", "gap", {"input": MANY}, {"input": "w011"}),
    "ollama embed": Errand("/api/embed", "bert", {"input": MANY}, {"input": "w011"}),
    "ollama embeddings": Errand("/api/embeddings", "gap", {"prompt": "w011 " * 12_000}, {"prompt": "w011"}),
    "rerank": Errand("/v1/rerank", "reranker", {"query": "w011", "documents": MANY}, {"query": "w011", "documents": ["w012"]}),
    "infill": Errand("/infill", "gap", GAP | {"n_predict": LONG_CTX, "ignore_eos": True}, GAP, streams=True),
    "infill of a long text": Errand("/infill", "gap", GAP | {"input_prefix": "y" * 60_000}, GAP, streams=True),
}
on_every_errand = cases("errand", ERRANDS)


@pytest.fixture(scope="module")
def errands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that runs one text at a time, with models for vectors, ranks and gaps; a load waits while `hold` is there."""
    folder = tmp_path_factory.mktemp("errands")
    BERT.write(folder / "models" / "bert.gguf")
    BERT.write(folder / "models" / "reranker.gguf", pooling=4)
    write_recital(folder / "models" / "gap.gguf", name="Gap", tokens=GAP_TOKENS)
    flags: list[str | Path] = ["--models-dir", folder / "models", "--ctx", str(LONG_CTX), "--parallel", "1"]
    with shared(folder / "home", *flags, script=altered(folder, HOLD)) as running:
        for model in ("bert", "reranker", "gap"):
            running.load(model)
        yield running


@contextlib.contextmanager
def held_load(server: Server, model: str) -> Iterator[None]:
    """The model is unloaded, and its next load waits for the block's end."""
    server.unload(model)
    hold = server.home / "hold"
    hold.touch()
    try:
        yield
    finally:
        hold.unlink(missing_ok=True)


def aborted(server: Server, model: str) -> int:
    """How many jobs the engine has ended before they were done."""
    metrics = server.get("/metrics").body.decode()
    found = re.search(rf'request_success_total{{model_name="{model}",finished_reason="abort"}} (\d+)', metrics)
    assert found
    return int(found[1])


def nobody_left_at(server: Server, errand: Errand) -> None:
    eventually(lambda: requests_of(server, errand.model) == (0, 0), "nobody is left")
    assert server.post(errand.path, errand.body(long=False)).status == 200


@on_every_errand
def test_client_that_leaves_ends_its_errand(errand: Errand, errands: Server) -> None:
    before = aborted(errands, errand.model)
    with requested(errands, errand):
        eventually(lambda: requests_of(errands, errand.model) == (1, 0), "it runs")
    eventually(lambda: aborted(errands, errand.model) == before + 1, "the engine lets go of it")
    nobody_left_at(errands, errand)


@cases("errand", {name: errand for name, errand in ERRANDS.items() if errand.streams})
def test_client_that_leaves_a_streamed_errand_ends_it(errand: Errand, errands: Server) -> None:
    before = aborted(errands, errand.model)
    with requested(errands, errand, stream=True) as sock:
        assert sock.recv(1) == b"H"
    eventually(lambda: aborted(errands, errand.model) == before + 1, "the engine lets go of it")
    nobody_left_at(errands, errand)


@on_every_errand
def test_client_that_leaves_behind_another_errand_is_waited_for_no_more(errand: Errand, errands: Server) -> None:
    before = aborted(errands, errand.model)
    with requested(errands, errand):
        eventually(lambda: sum(requests_of(errands, errand.model)) == 1, "another is at work")
        with requested(errands, errand):
            eventually(lambda: sum(requests_of(errands, errand.model)) == 2, "it waits")
        eventually(lambda: sum(requests_of(errands, errand.model)) == 1, "it waits no more")
    eventually(lambda: aborted(errands, errand.model) == before + 2, "the engine lets go of both")
    nobody_left_at(errands, errand)


def test_clients_that_leave_their_errands_while_the_models_load_are_waited_for_no_more(errands: Server) -> None:
    with contextlib.ExitStack() as held:
        for model in ("bert", "reranker", "gap"):
            held.enter_context(held_load(errands, model))
        with contextlib.ExitStack() as clients:
            for errand in ERRANDS.values():
                clients.enter_context(requested(errands, errand))
            waiting = {"bert": 2, "reranker": 1, "gap": 4}
            for model, count in waiting.items():
                eventually(lambda m=model, n=count: requests_of(errands, m) == (0, n), "all wait")
        for model in waiting:
            eventually(lambda m=model: requests_of(errands, m) == (0, 0), "nobody is left")
            assert errands.status(model)["status"] == "loading"
    for errand in ERRANDS.values():
        nobody_left_at(errands, errand)


# topic: Lifecycle
# A server that is killed while its engines are stopped.


@linux
def test_server_killed_while_its_engines_are_stopped_leaves_none(serve: Callable[..., Server], models: Path) -> None:
    own = serve("--models-dir", models)
    for model in ("recital", "plain"):
        assert own.load(model).json()["loaded"]  # from threads that have ended since
    children = [own.engine(f"{model}.gguf") for model in ("recital", "plain")]
    for child in children:
        os.kill(child, signal.SIGSTOP)
    own.process.kill()
    own.process.wait(HANG)
    try:
        eventually(lambda: not any(map(alive, children)), "the engines end although they are stopped")
    finally:
        for child in filter(alive, children):
            os.kill(child, signal.SIGKILL)


@linux
def test_engine_outlives_the_threads_that_asked_for_it(serve: Callable[..., Server], models: Path) -> None:
    own = serve("--models-dir", models)
    with socket.create_connection((own.host, own.port), timeout=HANG) as sock:
        sock.sendall(raw_post("/api/models/recital/load", b"{}"))
        assert read_reply(sock).json()["loaded"]
    engine = own.engine("recital.gguf")
    threads = Path(f"/proc/{own.process.pid}/task")
    busy = len(list(threads.iterdir()))
    for _ in range(20):  # each on a connection, hence in a thread, of its own
        assert own.generate().text == TEXTS[":"]
    eventually(lambda: len(list(threads.iterdir())) <= busy, "their threads have ended")
    assert own.engine("recital.gguf") == engine and own.status("recital")["status"] == "loaded"


# topic: Command line
# Ctrl-C at early moments.

HERE = "__import__('os').write(2, b'here'); __import__('time').sleep(1)"
EARLY: dict[str, tuple[str, str, str]] = {
    "before the restart": ("serve", '    if _bytecode_prefix(os.path.realpath(__file__)) == os', f"    {HERE}\n"),
    "when the restart begins": ("serve", 'import signal, sys\nif signal', f"{HERE}\n"),
    "while modules are imported": ("list", "import argparse\n", f"{HERE}\n"),
    "before main has begun": ("list", "    for stream in (sys.stdout, sys.stderr):\n        if isinst", f"    {HERE}\n"),
    "when main has begun": ("list", "        args = parse(argv)\n", f"        {HERE}\n"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to send here")
@cases("command,line,pause", EARLY)
def test_ctrl_c_at_an_early_moment_ends_quietly(command: str, line: str, pause: str, tmp_path: Path) -> None:
    script = altered(tmp_path, (line, pause + line))
    os.utime(script, (1e9, 1e9))  # old enough to be run from bytecode
    with subprocess.Popen([sys.executable, script, command], cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, preexec_fn=interruptible) as running:  # fmt: skip
        assert running.stderr and running.stderr.read(4) == b"here"
        running.send_signal(signal.SIGINT)
        stdout, stderr = running.communicate(timeout=HANG)
    assert (running.returncode, stdout, stderr) == (-signal.SIGINT, b"", b"")


@pty
def test_list_on_a_narrow_terminal_leaves_paths_and_values_whole(models: Path, tmp_path: Path) -> None:
    with narrow_terminal(40, "list", "--models-dir", models, home=tmp_path) as screen:
        lines = screen.rest().splitlines()
    (start,) = [i for i, line in enumerate(lines) if line == "recital"]
    path = f"  {models / 'recital.gguf'}"
    about = lines[start + 1 : lines.index(path)]
    labels = [pair.split() for pair in ", ".join(about).replace(",,", ",").split(", ")]
    assert [pair[0] for pair in labels] == ["params", "quant", "size", "context", "fits"] and all(len(p) == 2 for p in labels)
    assert max(map(len, about)) <= 40


# topic: llama.cpp
# Long runs of characters that a SentencePiece vocabulary does not have.

UNKNOWN_RUNS = {
    "letters": "a" * 30_000, "emoji": "😀" * 8_000, "between words": ("tick " + "龘" * 300) * 20 + " tick",
    "words behind": "é" * 20_000 + " wide  world",
}  # fmt: skip


def test_a_million_letters_without_a_token_are_refused_with_their_number_soon(server: Server) -> None:
    began = time.monotonic()
    reply = server.generate("a" * 1_000_000, max_tokens=1)
    assert_error(reply, 400, "context_length_exceeded", "1000001 tokens")
    assert time.monotonic() - began < HANG / 2, "it took llama.cpp over a minute"


@cases("text", UNKNOWN_RUNS)
def test_long_runs_of_bytes_become_the_tokens_that_llama_cpp_makes(text: str, server: Server, models: Path) -> None:
    found = server.post("/tokenize", {"content": text, "model": "recital"}).json()["tokens"]
    script = f"""
import sys; sys.path.insert(0, {str(SHIMMY.parent)!r})
import json, numpy, shimmy
c = shimmy.import_llama(); c.llama_backend_init(); quiet = c.llama_log_callback(lambda *_: None); c.llama_log_set(quiet, None)
parameters = c.llama_model_default_params(); parameters.vocab_only = True
model = c.llama_model_load_from_file({str(models / "recital.gguf")!r}.encode(), parameters)
vocab = c.llama_model_get_vocab(model); text = sys.stdin.buffer.read()
rows = numpy.empty(len(text) + 16, numpy.int32)
count = c.llama_tokenize(vocab, text, len(text), rows.ctypes.data_as(c.ctypes.POINTER(c.ctypes.c_int32)), len(rows), False, True)
print(json.dumps(rows[:count].tolist()))
"""
    theirs = subprocess.run([sys.executable, "-c", script], input=text.encode(), capture_output=True, timeout=HANG, check=True)
    assert found == json.loads(theirs.stdout)
