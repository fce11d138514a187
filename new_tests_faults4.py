"""Tests of branch faults4; the lead moves them into test_shimmy.py."""
# ruff: noqa: F811
from __future__ import annotations

import contextlib
import json
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from test_shimmy import (  # noqa: F401
    HANG,
    LONG_CTX,
    SHORT_GRACE,
    TEXT,
    TEXTS,
    TONGUES,
    VOCABULARY,
    Server,
    altered,
    assert_healthy,
    eventually,
    frame,
    linux,
    memory_of,
    raw_ws,
    requests_of,
    serve,
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
