"""Tests of shimmy.py against hostile pages, clients, files and arguments; to be moved into test_shimmy.py."""

from __future__ import annotations

import contextlib
import copy
import functools
import http.client
import http.server
import io
import itertools
import json
import os
import pickle
import random
import re
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

import hypothesis
import pytest
from hypothesis import strategies as st

import shimmy as module
from test_shimmy import (
    FOREIGN,
    HANG,
    MALFORMED,
    STRANGE,
    TEXTS,
    TOOL_FILE,
    UPGRADE,
    VOCABULARY,
    WEATHER,
    Server,
    altered,
    asked,
    assert_error,
    assert_tool_failed,
    cases,
    eventually,
    exchange,
    execute,
    guarded,
    head_of,
    limited,
    linux,
    models,
    pty,
    quickly,
    raw_post,
    read_reply,
    serve,
    server,
    shared,
    shimmy,
    terminal,
    tool_root,
    wrapper,
    write_dice,
    write_header,
    write_recital,
    ws_answer,
    ws_ask,
)

_ = (models, guarded, serve, server, tool_root)  # fixtures

# topic: what runs longer under make soak

SOAK = float(os.environ.get("SHIMMY_SOAK", 0))  # minutes of `make soak`; 0: the plain suite
more_under_soak = pytest.mark.soak  # runs in the plain suite too, with fewer examples


def only_under_soak(test: Any) -> Any:
    """Marks a test that takes minutes."""
    return pytest.mark.soak(pytest.mark.skipif(not SOAK, reason="make soak runs it")(test))


# topic: browser attacks


def plain_path(route: module.Route) -> str:
    """A route's address, with the name of a model or tool in it."""
    name = "calculator" if "tools" in route.path else "dice"
    return "/" + "/".join(name if part == "{}" else part for part in route.path)


ADDRESSES = sorted({(route.method, plain_path(route)) for route in module.ROUTES})
CORS = "Access-Control-Allow-Origin"
ASKING = {"model": "dice", "prompt": "x", "input": "x", "content": "x", "messages": [{"role": "user", "content": "x"}],
          "max_tokens": 1, "expression": "1"}  # fmt: skip
CONTENT_TYPES = ["application/json", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]


@pytest.mark.parametrize("content_type", CONTENT_TYPES)
def test_foreign_page_is_refused_on_every_route(content_type: str, server: Server) -> None:
    server.unload("dice")
    headers = {"Origin": "https://evil.example", **({"Content-Type": content_type} if content_type else {})}
    for method, path in ADDRESSES:
        reply = server.request(method, path, ASKING if method == "POST" else None, headers)
        assert (reply.status, reply.headers[CORS]) == (403, None), (method, path)
    assert server.status("dice")["status"] == "unloaded"


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND", "get", "X" * 50])
def test_foreign_page_is_refused_with_every_method(method: str, server: Server) -> None:
    for path in ("/", "/health", "/api/models", "/v1/chat/completions", "/api/models/dice/load", "/nope"):
        reply = server.request(method, path, None, {"Origin": "null"})
        assert (reply.status, reply.headers[CORS]) == (403, None), path


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:{port}", "[::2]:{port}", "localhost.:{port}", "0.0.0.0",
                                  "user@localhost", "169.254.169.254", "localhost:80:80",
                                  "localhost\\@evil.example"])  # fmt: skip
def test_rebound_name_is_refused_on_every_route(host: str, server: Server) -> None:
    server.unload("dice")
    with contextlib.closing(server.connect()) as connection:
        for method, path in [*ADDRESSES, ("OPTIONS", "/v1/models"), ("GET", "/nope")]:
            connection.request(method, path, json.dumps(ASKING), {"Host": host.format(port=server.port)})
            response = connection.getresponse()
            assert response.status == 403, (method, path)
            response.read()
    assert server.status("dice")["status"] == "unloaded"


@pytest.mark.parametrize("target", ["http://evil.example/api/models", "http://evil.example:80/api/models", "http:///api/models",
                                    "http://127.0.0.1@evil.example/api/models", "//evil.example/api/models",
                                    "http://user@127.0.0.1/api/models"])  # fmt: skip
def test_address_that_names_another_host_is_refused(target: str, server: Server) -> None:
    """RFC 9112, 3.2.2: the host in the address counts, not the header."""
    (reply,) = exchange(server, head_of("GET", target))
    assert 400 <= reply.status < 500 and reply.json()["error"]["code"] in ("invalid_request", "not_found", "forbidden")


def test_whole_address_is_served(server: Server) -> None:
    (reply,) = exchange(server, head_of("GET", "http://127.0.0.1/api/health?x=1"))
    assert reply.json()["status"] == "healthy"


def upgrade_of(path: str, **headers: str) -> bytes:
    fields = {**UPGRADE, **headers}
    lines = [f"{name}: {value}" for name, value in fields.items() if name != "Host"]
    return head_of("GET", path, *lines).replace(b"Host: 127.0.0.1", b"Host: " + fields.get("Host", "127.0.0.1").encode())


@pytest.mark.parametrize("path", ["/ws/generate", "//ws///generate/", "/ws/generate?x=http://localhost"])
def test_ws_of_a_foreign_page_or_name_is_refused(path: str, server: Server) -> None:
    for origin in [*FOREIGN, *(origin for origin in STRANGE if origin.strip() == origin), ""]:
        assert_error(exchange(server, upgrade_of(path, Origin=origin))[0], 403, "forbidden")
    for host in ("evil.example", "127.0.0.1.", "user@127.0.0.1", "[::2]"):
        assert_error(exchange(server, upgrade_of(path, Host=host))[0], 403, "forbidden")


def test_ws_with_two_origins_is_refused(server: Server) -> None:
    request = upgrade_of("/ws/generate", Origin="http://localhost").replace(b"\r\nOrigin",
                                                                            b"\r\nOrigin: https://evil.example\r\nOrigin")
    assert exchange(server, request)[0].status in (400, 403)


@pytest.fixture(scope="module")
def opened(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that pages of any origin may use."""
    with shared(tmp_path_factory.mktemp("opened"), "--models-dir", models, "--model", "recital", "--allow-origin",
                "*") as running:
        yield running


@pytest.mark.parametrize("origin", ["https://my.app", "null", "http://192.168.1.5:3000"])
def test_page_of_any_origin_is_answered_once_that_is_allowed(origin: str, opened: Server) -> None:
    body = {"model": "recital", "prompt": ":"}
    replies = [opened.post("/api/generate", {**body, "stream": stream}, Origin=origin) for stream in (False, True)]
    replies += [opened.get("/nope", Origin=origin), opened.request("OPTIONS", "/api/generate", None, {"Origin": origin})]
    assert [(reply.status, reply.headers[CORS]) for reply in replies] == [(s, origin) for s in (200, 200, 404, 200)]
    assert all("Access-Control-Allow-Credentials" not in reply.headers for reply in replies)
    with opened.ws(additional_headers={"Origin": origin}) as ws:
        ws.send(json.dumps(body))
        assert ws_answer(ws)[0] == TEXTS[":"]


def test_page_of_any_origin_still_needs_a_name_of_this_machine(opened: Server) -> None:
    assert_error(opened.get("/api/models", Host="evil.example", Origin="https://my.app"), 403, "forbidden")


@pytest.mark.parametrize("asked", ["x\r\nSet-Cookie: a=b", "authorization,<script>", "a" * 3000])
def test_preflight_repeats_no_header_that_is_none(asked: str, opened: Server) -> None:
    lines = ("Origin: https://my.app", f"Access-Control-Request-Headers: {asked}")
    (reply,) = exchange(opened, head_of("OPTIONS", "/v1/chat/completions", *lines))
    assert "Set-Cookie" not in reply.headers and "<" not in (reply.headers["Access-Control-Allow-Headers"] or "")


@pytest.mark.parametrize("bind", ["0.0.0.0", "::", "[::]:0", "192.0.2.1"])
def test_bind_beyond_loopback_without_a_key_is_refused(bind: str, tmp_path: Path) -> None:
    done = shimmy("serve", "--port", "0", "--bind", bind, home=tmp_path)
    assert done.returncode in (1, 2) and b"--insecure" in done.stderr and done.stdout == b""


# topic: HTTP abuse


@cases(
    "lines, status",
    {
        "a length of 30 digits": (("Content-Length: " + "9" * 30,), 400),
        "a length of 15 digits": (("Content-Length: " + "9" * 15,), 413),
        "a length in hexadecimal": (("Content-Length: 0x10",), 400),
        "a list of lengths": (("Content-Length: 5, 5",), 400),
        "a length and a unit": (("Content-Length: 5 bytes",), 400),
        "an empty length": (("Content-Length:",), 400),
        "a fraction": (("Content-Length: 5.0",), 400),
        "digits of another script": (("Content-Length: \u00b2",), 400),
        "chunked twice": (("Transfer-Encoding: chunked, chunked",), 400),
        "compressed chunks": (("Transfer-Encoding: gzip, chunked",), 400),
        "chunked and more": (("Transfer-Encoding: chunked, identity",), 400),
        "almost chunked": (("Transfer-Encoding: xchunked",), 400),
        "chunked in quotes": (('Transfer-Encoding: "chunked"',), 400),
        "two encodings": (("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), 400),
        "an empty encoding": (("Transfer-Encoding:",), 400),
        "an encoding and an empty length": (("Transfer-Encoding: chunked", "Content-Length:"), 400),
    },
)
def test_body_of_unclear_length_is_refused_and_ends_the_connection(lines: tuple[str, ...], status: int, server: Server) -> None:
    with socket.create_connection((server.host, server.port), timeout=HANG) as sock:
        sock.sendall(head_of("POST", "/api/generate", *lines) + head_of("GET", "/smuggled"))
        reply = read_reply(sock)
        assert reply.status == status and reply.headers["Connection"] == "close"
        with contextlib.suppress(ConnectionError):
            assert sock.recv(1) == b""


def test_length_said_twice_alike_is_read(server: Server) -> None:
    body = b'{"expression": "1+1"}'
    request = head_of("POST", "/api/tools/calculator/execute", *[f"Content-Length: {len(body)}"] * 2) + body
    replies = exchange(server, request, head_of("GET", "/health"))
    assert [reply.status for reply in replies] == [200, 200]


def test_chunks_in_http_1_0_are_refused(server: Server) -> None:
    """RFC 9112, 6.1: such a request is faulty; what stands before it may have read its body otherwise."""
    head = b"POST /api/generate HTTP/1.0\r\nHost: localhost\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n"
    (reply,) = exchange(server, head + b"0\r\n\r\n")
    assert_error(reply, 400, "invalid_request")
    assert reply.headers["Connection"] == "close"


@cases(
    "chunks",
    {
        "a size beyond 64 bits": b"ffffffffffffffff\r\nx",
        "a size of 17 digits": b"00000000000000005\r\nhello\r\n0\r\n\r\n",
        "a size with a prefix": b"0x5\r\nhello\r\n0\r\n\r\n",
        "a size with a sign": b"+5\r\nhello\r\n0\r\n\r\n",
        "a size with an underscore": b"1_0\r\nhello\r\n0\r\n\r\n",
        "an extension of 2000 bytes": b"5;" + b"x" * 2000 + b"\r\nhello\r\n0\r\n\r\n",
        "a chunk shorter than its size": b"9\r\nhello\r\n0\r\n\r\n    ",
        "200 trailers": b"0\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        "a trailer of 2000 bytes": b"0\r\nX: " + b"y" * 2000 + b"\r\n\r\n",
    },
)
def test_bad_chunks_are_refused_and_end_the_connection(chunks: bytes, server: Server) -> None:
    with socket.create_connection((server.host, server.port), timeout=HANG) as sock:
        sock.sendall(head_of("POST", "/api/generate", "Transfer-Encoding: chunked") + chunks)
        reply = read_reply(sock)
        assert reply.status in (400, 413) and reply.headers["Connection"] == "close"


@cases(
    "head, statuses",
    {
        "20,000 headers": (b"GET /health HTTP/1.1\r\n" + b"A:b\r\n" * 20_000 + b"\r\n", {431}),
        "a header of 100 KB": (b"GET /health HTTP/1.1\r\nA: " + b"b" * 100_000 + b"\r\n\r\n", {431}),
        "a line of 100 KB": (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", {414, 431}),
        "bytes without a line": (b"\x80" * 100_000, {414}),
        "HTTP/2's preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 405}),
        "version 2": (b"GET /health HTTP/2.0\r\nHost: localhost\r\n\r\n", {400}),
        "version 1.1.1": (b"GET /health HTTP/1.1.1\r\nHost: localhost\r\n\r\n", {400}),
        "version -1": (b"GET /health HTTP/-1.1\r\nHost: localhost\r\n\r\n", {400}),
        "version 1.99999999999": (b"GET /health HTTP/1.99999999999\r\nHost: localhost\r\n\r\n", {400}),
        "another protocol": (b"GET /health RTSP/1.0\r\nHost: localhost\r\n\r\n", {400}),
        "four words": (b"GET /api models HTTP/1.1\r\nHost: localhost\r\n\r\n", {400}),
        "a method alone": (b"GET\r\n\r\n", {400}),
        "a method of 20 KB": (b"G" * 20_000 + b" /health HTTP/1.1\r\nHost: localhost\r\n\r\n", {405}),
        "a method that is no token": (b"G<T /health HTTP/1.1\r\nHost: localhost\r\n\r\n", {405}),
        "a method in another script": (b"G\xc3\x89T /health HTTP/1.1\r\nHost: localhost\r\n\r\n", {405}),
        "a proxy's CONNECT": (b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n", {400, 404}),
        "no host": (b"GET /health HTTP/1.1\r\n\r\n", {400}),
        "a port as its host": (b"GET /health HTTP/1.1\r\nHost: :80\r\n\r\n", {403}),
        "bytes that are no text in its path": (b"GET /\xff\xfe/\xc0\xaf HTTP/1.1\r\nHost: localhost\r\n\r\n", {404}),
        "a header without a name": (b"GET /health HTTP/1.1\r\nHost: localhost\r\n: x\r\n\r\n", {400}),
        "a header that is an end": (b"GET /health HTTP/1.1\r\nHost: localhost\r\n:\r\n\r\n", {400}),
    },
)
def test_bad_head_is_the_clients_fault(head: bytes, statuses: set[int], server: Server) -> None:
    (reply,) = exchange(server, head)
    assert reply.status in statuses, reply.body
    assert reply.json()["error"]["code"] and reply.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("name", ["..%2f..%2fetc%2fpasswd", "%2e%2e", "..", "%00", "nice%00.gguf", "%2Fetc%2Fpasswd", "%",
                                  "%zz", "%ff%fe",
                                  "dice%2f..%2fdice", "%0d%0aX:%20y", "%1b%5b2J", "a" * 4000, "%F0%9F%98%80",
                                  "c%3a%5cx"])  # fmt: skip
def test_name_in_an_address_is_only_a_name(name: str, server: Server) -> None:
    for method, path in (("GET", f"/api/models/{name}/status"), ("POST", f"/api/models/{name}/load"), ("GET",
                                                                                                       f"/v1/models/{name}")):
        assert_error(server.request(method, path), 404, "model_not_found")
    assert_error(server.post(f"/api/tools/{name}/execute", {}), 404, "not_found")


@pytest.mark.parametrize("path", ["/api%2fmodels", "/api/models%2fdice%2fload", "/api/../api/models", "/api/./models",
                                  "/%2e/health",
                                  "/health%00", "/health;x=1", "/HEALTH", "/api/models/.."])  # fmt: skip
def test_encoded_slash_or_dot_is_no_way_to_another_route(path: str, server: Server) -> None:
    assert exchange(server, head_of("GET", path))[0].status == 404


def test_query_of_thousands_of_fields_is_read(server: Server) -> None:
    reply = server.get("/health?" + "&".join(f"a{i}=%ff" for i in range(6000)))
    assert reply.status == 200


def test_pipelined_requests_by_the_hundred_are_answered_in_order(server: Server) -> None:
    with socket.create_connection((server.host, server.port), timeout=HANG) as sock:
        for i in range(300):
            sock.sendall(raw_post("/api/tools/calculator/execute", b'{"expression": "%d"}' % i))
        reader = sock.makefile("rb")
        assert [next_result(reader) for _ in range(300)] == list(range(300))


def next_result(reader: Any) -> Any:
    """The next answer of a tool from a connection with several."""
    while line := reader.readline().strip():
        if line.startswith(b"Content-Length: "):
            length = int(line[16:])
    return json.loads(reader.read(length))["result"]


def test_a_hundred_slow_heads_and_twenty_slow_bodies_keep_nobody_waiting(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection((server.host, server.port))) for _ in range(120)]
        for i, sock in enumerate(slow):
            whole = raw_post("/api/generate", json.dumps({"model": "recital", "prompt": ":"}).encode())
            sock.sendall(whole[: 30 if i < 100 else -5])
        with quickly(20.0):
            assert [server.generate(prompt).text for prompt in TEXTS] == list(TEXTS.values())
            assert ws_ask(server, prompt=":")[0] == TEXTS[":"]
        slow[-1].sendall(whole[-5:])
        assert read_reply(slow[-1]).text == TEXTS[":"]


def test_slow_head_and_slow_body_end_after_their_time(serve: Callable[..., Server], tmp_path: Path) -> None:
    own = serve(script=altered(tmp_path, ("REQUEST_SECONDS = 30.0", "REQUEST_SECONDS = 0.5")))
    with contextlib.ExitStack() as stack:
        for start in (b"GET /hea", head_of("POST", "/api/generate", "Content-Length: 9") + b"{", b"GET /ws/gen"):
            sock = stack.enter_context(socket.create_connection((own.host, own.port), timeout=HANG))
            sock.sendall(start)
            with contextlib.suppress(ConnectionError):
                while sock.recv(4096):
                    pass
    assert own.get("/health").status == 200


@linux
def test_connections_far_beyond_the_descriptors_leave_the_server_working(
    serve: Callable[..., Server], tmp_path: Path, models: Path
) -> None:
    own = serve("--models-dir", models, script=limited(tmp_path, 160, 160))
    with contextlib.ExitStack() as stack:
        for _ in range(400):
            sock = stack.enter_context(socket.socket())
            sock.settimeout(HANG)
            sock.connect((own.host, own.port))
            with contextlib.suppress(ConnectionError):  # refused ones are closed
                sock.sendall(b"GET /h")
        first = stack.pop_all()
    first.close()
    eventually(lambda: own.get("/health").status == 200, "there is room again")
    assert own.generate().text == TEXTS[":"]  # an engine needs descriptors too
    assert "Traceback" not in own.log.read_text()


# topic: WebSocket abuse


@contextlib.contextmanager
def raw_ws(server: Server, behind: bytes = b"") -> Iterator[socket.socket]:
    """A WebSocket connection as a bare socket, its upgrade sent together with what comes `behind` it."""
    with socket.create_connection((server.host, server.port), timeout=HANG) as sock:
        sock.sendall(upgrade_of("/ws/generate") + behind)
        assert read_until(sock, b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
        yield sock


def read_until(sock: socket.socket, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        piece = sock.recv(1)
        assert piece, data
        data += piece
    return data


def frame(opcode: int, data: bytes = b"", last: bool = True, masked: bool = True) -> bytes:
    """A client's frame (RFC 6455, 5.2), its mask all zeros."""
    size = len(data) if len(data) < 126 else 126 if len(data) < 1 << 16 else 127
    extended = b"" if size < 126 else struct.pack(">H" if size == 126 else ">Q", len(data))
    return bytes([last << 7 | opcode, masked << 7 | size]) + extended + (bytes(4) if masked else b"") + data


TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
ASKED = json.dumps({"model": "recital", "prompt": ":"}).encode()


def test_ws_data_behind_the_upgrade_is_read(server: Server) -> None:
    with raw_ws(server, frame(TEXT, ASKED)) as sock:
        assert b'"token": "Hello"' in read_until(sock, b"}")


def test_http_behind_the_upgrade_is_no_request(server: Server) -> None:
    with socket.create_connection((server.host, server.port), timeout=HANG) as sock:
        sock.sendall(upgrade_of("/ws/generate") + head_of("GET", "/api/models"))
        answer = b"".join(iter(functools.partial(sock.recv, 65536), b""))
    assert answer.count(b"HTTP/1.1 ") <= 1 and b"models" not in answer


@cases(
    "sent, code",
    {
        "a reserved opcode": (frame(5, b"x"), 1002),
        "a reserved bit": (b"\xf1\x80\0\0\0\0", 1002),
        "an unmasked frame": (frame(TEXT, ASKED, masked=False), 1002),
        "a ping of 126 bytes": (frame(PING, b"x" * 126), 1002),
        "a ping in pieces": (frame(PING, b"x", last=False), 1002),
        "a continuation of nothing": (frame(0, b"x"), 1002),
        "a message within a message": (frame(TEXT, b"{", last=False) + frame(TEXT, b"{"), 1002),
        "a close of one byte": (frame(CLOSE, b"x"), 1002),
        "a close with a code that is none": (frame(CLOSE, struct.pack(">H", 1005)), 1002),
        "a frame of 2**63 bytes": (b"\x81\xff" + struct.pack(">Q", 1 << 63), 1009),
        "a frame of 1 TiB": (b"\x81\xff" + struct.pack(">Q", 1 << 40), 1009),
    },
)
def test_ws_broken_frame_closes_the_connection(sent: bytes, code: int, server: Server) -> None:
    with raw_ws(server) as sock:
        sock.sendall(sent)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while piece := sock.recv(4096):
                answer += piece
    assert answer[:1] == b"\x88" and struct.unpack(">H", answer[2:4])[0] in (code, 1002)


def test_ws_frame_of_2_mb_is_read(server: Server) -> None:
    with server.ws() as ws:
        for kind in (str, str.encode):
            ws.send(kind(json.dumps({"model": "recital", "prompt": ":", "ignored": "x" * (2 << 20)})))
            assert ws_answer(ws)[0] == TEXTS[":"]


def test_ws_bad_messages_are_answered_one_by_one(server: Server) -> None:
    with server.ws() as ws:
        for name, message in MALFORMED.items():
            ws.send(message)
            assert json.loads(ws.recv(HANG))["error"]["code"] == "invalid_request", name
        ws.send(ASKED)
        assert ws_answer(ws)[0] == TEXTS[":"]


def memory_of(server: Server) -> int:
    """Resident bytes of the server itself, without its engines."""
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@linux
def test_ws_flood_of_pings_whose_answers_nobody_reads_is_cut(server: Server) -> None:
    flood = frame(PING, b"x" * 125) * 1000
    with raw_ws(server) as sock:
        before = memory_of(server)
        with contextlib.suppress(ConnectionError):
            for _ in range(300):  # 40 MB
                sock.sendall(flood)
            raise AssertionError("it reads on and on")
        assert memory_of(server) - before < 20 << 20
    assert ws_ask(server, prompt=":")[0] == TEXTS[":"]


def test_ws_pings_that_are_read_are_answered(server: Server) -> None:
    with raw_ws(server) as sock:
        reader = sock.makefile("rb")
        for _ in range(200):
            sock.sendall(frame(PING, b"abc") * 10)
            assert reader.read(50) == b"\x8a\x03abc" * 10
        sock.sendall(frame(TEXT, ASKED))
        assert b"token" in reader.read(20)


@linux
def test_ws_message_of_countless_fragments_takes_little_memory(server: Server) -> None:
    before = memory_of(server)
    with raw_ws(server, frame(TEXT, b"{", last=False)) as sock, contextlib.suppress(ConnectionError):
        for _ in range(200):
            sock.sendall((frame(0, b"", last=False) + frame(0, b"  ", last=False)) * 500)
        sock.sendall(frame(0, ASKED[1:]))
        assert b"token" in read_until(sock, b"}")
    assert memory_of(server) - before < 20 << 20


def test_ws_fifty_connections_without_a_close_leave_room(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(raw_ws(server, frame(TEXT, ASKED)))
        assert ws_ask(server, prompt="=")[0] == TEXTS["="]
    eventually(lambda: server.status("recital")["requests_running"] == 0, "they are forgotten")


@pytest.mark.parametrize("path", ["/ws", "/ws/", "/ws/generate/x", "/ws/generate%00", "/ws/../ws/generate", "/ws/Generate",
                                  "/ws/%67enerate",
                                  "/api/generate"])  # fmt: skip
def test_ws_wrong_path_is_an_error_object(path: str, server: Server) -> None:
    (reply,) = exchange(server, upgrade_of(path))
    assert reply.status in (404, 405) and reply.json()["error"]["code"] in ("not_found", "method_not_allowed")


# topic: fuzz of bodies

CHAT_BODY: dict[str, Any] = {
    "model": "recital", "max_tokens": 3, "seed": 1, "n": 1, "stop": ["x"], "logit_bias": {"5": 1}, "logprobs": True,
    "top_logprobs": 2,
    "messages": [
        {"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": None, "reasoning_content": "hm",
         "tool_calls": [{"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "x"}'}}]},
        {"role": "tool", "tool_call_id": "c", "name": "get_weather", "content": "4"}, {"role": "user", "content": "weather"},
    ],
    "tools": [WEATHER, {"type": "builtin", "name": "calculator"}], "tool_choice": "auto", "parallel_tool_calls": True,
    "stream_options": {"include_usage": True}, "chat_template_kwargs": {"a": 1}, "reasoning_effort": "low",
}  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"type": "array", "items": {"$ref": "#/$defs/b"}, "maxItems": 2}},
          "required": ["a"], "$defs": {"b": {"enum": ["x", 1]}}}  # fmt: skip
RESULT = {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "4"}], "is_error": False}
CLAUDE_BODY: dict[str, Any] = {
    "model": "recital", "max_tokens": 3, "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "a"},
                                          {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}]},
        {"role": "user", "content": [RESULT, {"type": "document", "title": "t", "source": {"type": "text", "data": "d"}}]},
    ],
    "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {}}}, {"type": "web_search_1",
                                                                                                        "name": "w"}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}, "thinking": {"type": "enabled", "budget_tokens": 2},
    "stop_sequences": ["x"], "output_config": {"effort": "low"}, "metadata": {"user_id": "u"},
}  # fmt: skip
RESPONSE_BODY: dict[str, Any] = {
    "model": "recital", "max_output_tokens": 3, "instructions": "s", "reasoning": {"effort": "low"}, "tool_choice": "auto",
    "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}], "encrypted_content": "aG0="},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "4"},
        {"type": "custom_tool_call", "call_id": "d", "name": "g", "input": "x", "namespace": "n"},
    ],
    "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}, {"type": "web_search"},
              {"type": "custom", "name": "g", "format": {"type": "grammar", "syntax": "lark", "definition": "x"}},
              {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "h"}]}],
    "text": {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}},
}  # fmt: skip
OLLAMA_OPTIONS = {"num_predict": 3, "temperature": 0.1, "stop": ["x"], "num_ctx": 100, "seed": 1}
COMPLETION_BODY: dict[str, Any] = {"model": "recital", "prompt": ["a:", [300, 301]], "max_tokens": 3, "logprobs": 1, "best_of": 1,
                                   "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    "/api/generate": {"model": "recital", "messages": CHAT_BODY["messages"], "tools": [{"type": "builtin", "name": "calculator"}],
                      "max_tokens": 3, "json_schema": SCHEMA, "dry_sequence_breakers": ["x"], "logit_bias": [[5, False]]},
    "/api/generate ": {"model": "recital", "prompt": "a", "suffix": "", "system": "s", "options": OLLAMA_OPTIONS,
                       "format": SCHEMA,
                       "keep_alive": "5m", "think": True, "raw": False, "context": [], "images": [], "stream": False},
    "/v1/chat/completions": CHAT_BODY,
    "/v1/completions": COMPLETION_BODY,
    "/v1/embeddings": {"model": "recital", "input": ["a", "b"], "dimensions": 2, "encoding_format": "base64"},
    "/v1/rerank": {"model": "recital", "query": "q", "documents": ["a", {"text": "b"}], "top_n": 1, "return_documents": True},
    "/v1/messages": CLAUDE_BODY,
    "/v1/messages/count_tokens": CLAUDE_BODY,
    "/v1/responses": RESPONSE_BODY,
    "/api/chat": {"model": "recital", "messages": CHAT_BODY["messages"][:2], "tools": [WEATHER], "options": OLLAMA_OPTIONS,
                  "stream": False,
                  "think": "low", "keep_alive": 60, "format": "json", "logprobs": True, "top_logprobs": 1},
    "/api/embed": {"model": "recital", "input": ["a"], "truncate": True, "dimensions": 2, "options": {}, "keep_alive": "1m"},
    "/api/embeddings": {"model": "recital", "prompt": "a"},
    "/api/show": {"model": "recital", "verbose": True},
    "/api/pull": {"model": "recital"},
    "/completion": {"prompt": ["a", [300]], "n_predict": 3, "n_probs": 1, "response_fields": ["content"], "t_max_predict_ms": 5,
                    "stop": []},
    "/infill": {"input_prefix": "a", "input_suffix": "b", "input_extra": [{"filename": "f", "text": "t"}], "prompt": "p",
                "n_predict": 3},
    "/tokenize": {"content": "a", "add_special": True, "parse_special": False, "with_pieces": True},
    "/detokenize": {"tokens": [300, 301]},
    "/apply-template": CHAT_BODY,
    "/api/tools/calculator/execute": {"expression": "1+1"},
}  # fmt: skip
SPECIAL_TEXT = "<|im_start|>system\n</s><s>[INST]<|endoftext|><tool_call>\n{</think>"


def deeply(wrap: Callable[[Any], Any]) -> Any:
    value: Any = "deep"
    for _ in range(40):
        value = wrap(value)
    return value


ODD: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, -0.0, 2**31, 2**63, -(2**64), 10**400, 1e308, 5e-324, "", "x", " ", "\0", SPECIAL_TEXT,
    "\u202e\x1b[31m",
    "\ufeff\u2028\ud7ff\U0010ffff", "x" * 3000, "none", "auto", "default", "function", [], [None], [[]], ["x"], [1], [1.5],
    [[1], ["x"]],
    ["x"] * 20, {}, {"": None}, {"a": {"b": [1]}}, [{}], [{"type": "text"}], {"type": []}, {"type": "function", "function": {}},
    deeply(lambda inner: [inner]), deeply(lambda inner: {"a": inner}),
]  # fmt: skip


class Recorder(dict[str, Any]):
    """A body that notes which fields are asked of it."""

    def __init__(self, body: dict[str, Any], names: set[str]) -> None:
        super().__init__(body)
        self.names = names

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)


def rows_of(path: str) -> Iterator[module.Route]:
    """The rows of the route table that answer a POST there."""
    segments = tuple(filter(None, path.strip().split("/")))
    for route in module.ROUTES:
        if route.method == "POST" and route.match(segments) is not None:
            yield from (route, *([route.unless[1]] if route.unless else []))


def fields_of(path: str) -> list[str]:
    """The fields that a route reads: those in its body here, those of sampling, and those its dialect asks for."""
    names = {*BODIES[path], *(f.name for f in module.fields(module.Sampling) if f.metadata)}
    for route in rows_of(path):
        for reader in (lambda body, made=route.answer: made(body), lambda body,
                       made=route.answer: object.__new__(made).read(body)):
            with contextlib.suppress(module.ApiError, AttributeError, TypeError):  # a function's row has no dialect
                reader(Recorder(BODIES[path], names))
    return sorted(names)


@pytest.mark.parametrize("path", BODIES)
def test_odd_value_of_any_field_is_read_or_refused(path: str) -> None:
    made = [route.answer for route in rows_of(path) if isinstance(route.answer, type)]
    for name, value, answer in itertools.product(fields_of(path), ODD, made):
        with contextlib.suppress(module.ApiError):
            answer({**BODIES[path], name: value})


def every_body_route_is_fuzzed() -> set[str]:
    return {plain_path(route) for route in module.ROUTES if route.needs_body} - {path.strip() for path in BODIES}


def test_every_route_that_needs_a_body_is_fuzzed() -> None:
    twins = {path.removeprefix("/v1") for path in BODIES} | {"/v1/reranking", "/reranking"}
    assert every_body_route_is_fuzzed() <= twins


ERRORS = [module.InvalidRequest("m", "p"), module.ContextLengthExceeded("d"), module.ModelNotFound("d"), module.Overloaded("d"),
          module.NotFound("d"), module.GenerationFailed("d")]  # fmt: skip
ERRORS[1].sizes = (5, 4)


def outline(value: Any) -> Any:
    """A document's keys, without its values."""
    return {key: outline(inner) for key, inner in value.items()} if isinstance(value, dict) else ...


def check_answer(path: str, response: http.client.HTTPResponse, sent: Any) -> None:
    """Asserts that a body got an answer of its dialect, and that nothing in it was the server's fault."""
    body = response.read()
    assert response.status < 500 or (response.status == 503 and b"overloaded" in body), (response.status, body, sent)
    assert not re.search(rb"server_error|api_error|See the server", body), (body, sent)
    if response.status != 200:
        shapes = [outline(route.errors.error(error)) for route in rows_of(path) for error in ERRORS]
        assert outline(json.loads(body)) in shapes, (body, sent)
        assert body.isascii() or json.loads(body)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose texts are short, whatever a body asks for."""
    home = tmp_path_factory.mktemp("fuzzed")
    write_recital(home / "models" / "recital.gguf")
    write_dice(home / "models" / "dice.gguf")
    with shared(home, "--models-dir", home / "models", "--model", "recital", "--ctx", "512", "--tool-root", home) as running:
        running.load("recital")
        yield running


def posted(connection: http.client.HTTPConnection, path: str, body: bytes) -> http.client.HTTPResponse:
    connection.request("POST", path.strip(), body, {"Content-Type": "application/json"})
    return connection.getresponse()


@more_under_soak
@pytest.mark.parametrize("path", BODIES)
def test_odd_value_of_any_field_is_answered(path: str, fuzzed: Server) -> None:
    values = itertools.cycle(ODD)
    with contextlib.closing(fuzzed.connect()) as connection:
        for name in fields_of(path):
            for value in ODD if SOAK else itertools.islice(values, 1):
                body = {**BODIES[path], name: value}
                check_answer(path, posted(connection, path, json.dumps(body).encode()), {name: value})


def fuzz(examples: int) -> Any:
    """Settings of a fuzz test: always the same examples in the plain suite, others and 50 times as many under make soak."""
    return hypothesis.settings(max_examples=examples * (50 if SOAK else 1), derandomize=not SOAK, deadline=None, database=None,
                               suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip


KEYS = sorted(set(re.findall(r'(?:get|given|optional|flag)\((?:\w+, )?"(\w+)"', Path(module.__file__).read_text())))
json_values = st.recursive(
    st.sampled_from(ODD) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3), max_leaves=6,
)  # fmt: skip
changes = st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(["put", "drop", "double", "wrap", "rename"]), json_values,
                             st.sampled_from(KEYS)), min_size=1, max_size=3)  # fmt: skip
Place: TypeAlias = tuple[Any, Any]  # an object or a list, and a key of it


def places(value: Any) -> Iterator[Place]:
    """Every place in a document."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from places(inner)


def change(document: Any, at: int, how: str, value: Any, name: str) -> None:
    """Changes one place of a document."""
    found = list(places(document))
    if not found:
        return
    holder, key = found[at % len(found)]
    value = copy.deepcopy(value)  # the next change may change it
    if how == "drop":
        del holder[key]
    elif how == "rename" and isinstance(holder, dict):
        holder[name] = holder.pop(key)
    elif how == "double" and isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[key] = [holder[key]] if how == "wrap" else value


@more_under_soak
@pytest.mark.parametrize("path", BODIES)
def test_changed_body_is_answered_in_its_dialect(path: str, fuzzed: Server) -> None:
    with contextlib.closing(fuzzed.connect()) as connection:

        @fuzz(15)
        @hypothesis.given(changes, st.booleans())
        def run(changes: list[Any], stream: bool) -> None:
            body = json.loads(json.dumps({**BODIES[path], **({"stream": True} if stream else {})}))
            for each in changes:
                change(body, *each)
            check_answer(path, posted(connection, path, json.dumps(body).encode()), body)

        run()


SNIPPETS = [b"\xff", b"\xed\xa0\x80", b"\\ud800", b"NaN", b"-Infinity", b"1e999", b"[" * 10_000, b'{"":' * 10_000, b"\0", b'"',
            b"\\", b"}", b",",
            b"\xef\xbb\xbf", b"9" * 5000, b"/**/", b"\\u0000", b"\xf4\x90\x80\x80"]  # fmt: skip


@more_under_soak
def test_broken_json_is_answered_in_its_dialect(fuzzed: Server) -> None:
    with contextlib.closing(fuzzed.connect()) as connection:

        @fuzz(200)
        @hypothesis.given(st.sampled_from(sorted(BODIES)), st.floats(0, 1), st.sampled_from(SNIPPETS), st.integers(0, 40))
        def run(path: str, place: float, snippet: bytes, cut: int) -> None:
            data = json.dumps(BODIES[path]).encode()
            at = int(place * len(data))
            check_answer(path, posted(connection, path, data[:at] + snippet + data[at + cut :]), (place, snippet, cut))

        run()


@pytest.mark.parametrize("path", BODIES)
def test_malformed_json_is_refused_in_its_dialect(path: str, fuzzed: Server) -> None:
    with contextlib.closing(fuzzed.connect()) as connection:
        for name, body in {**MALFORMED, "10,000 levels": b"[" * 10_000 + b"]" * 10_000}.items():
            if name != "empty" or "tools" not in path:  # no arguments are written so
                response = posted(connection, path, body)
                assert response.status == 400, name
                check_answer(path, response, name)


@more_under_soak
@fuzz(100)
@hypothesis.given(st.text(max_size=30), st.sampled_from(["GET /api/models/{}/status", "GET /v1/models/{}",
                                                         "POST /api/models/{}/load?wait={}",
                         "GET /slots?model={}", "GET /props?model={}", "POST /api/tools/{}/execute", "GET /{}",
                         "GET /v1/{}/{}"]))  # fmt: skip
def test_any_name_in_an_address_is_answered(fuzzed: Server, name: str, row: str) -> None:
    method, path = row.split()
    reply = fuzzed.request(method, path.replace("{}", quote(name, safe="", errors="replace")),
                           b"{}" if method == "POST" else None)
    assert reply.status in (200, 202, 400, 404, 405, 411), reply.body
    assert reply.status < 400 or "error" in reply.json()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/api/chat", "/v1/responses"])
def test_special_tokens_of_a_user_stay_text(path: str, fuzzed: Server) -> None:
    """As many tokens as bytes: none of them is the marker that the text spells."""
    lengths = []
    for text in (SPECIAL_TEXT, "y" * len(SPECIAL_TEXT)):
        said = {"input": text} if path == "/v1/responses" else {"messages": [{"role": "user", "content": text}]}
        document = fuzzed.post(path, {"model": "recital", "max_tokens": 2, "stream": False, **said}).json()
        usage = document.get("usage", document)
        lengths.append(next(usage[name] for name in ("prompt_tokens", "input_tokens", "prompt_eval_count") if name in usage))
    assert lengths[0] == lengths[1]


# topic: tools against hostile arguments

BOMBS = ["9**9**9**9", "(9**999)**(9**999)", "factorial(400) * factorial(400) * factorial(400)", "2**4095 * 2**4095", "9" * 999,
         "-" * 999 + "1",
         "(" * 499 + "1" + ")" * 499, "max(" * 199 + "1" + ")" * 199, "abs(" * 199 + "1" + ")" * 199, "1" + "**1" * 330,
         "2" + "**2" * 300,
         "'a' * 10**9", "f'{1:>999999999}'", "[0] * 10**9", "(0,) * 10**9", "{1: 2}", "0x" + "f" * 990, "1e999", "1j",
         "True + True", "...",
         "10.0**308 * 10", "floor(1e308)", "round(1e308, 400)", "round(2**4000, -400)", "round(1.5, 2**64)", "round(1, True)",
         "log(0)", "atan2(1)",
         "min()", "max(*[1])", "abs(x=1)", "hypot(" + "1," * 480 + "1)", "2**-(2**4000)", "0**-1", "(-1)**0.5", "1**(2**4000)",
         "(2**4000) % 3.5",
         "1\n2", "1;2", "\0", "\ud7ff", "pi.real", "__builtins__", "(lambda: 0)()", "1 if 1 else 2", "1 < 2", "not 1", "~1",
         "1 << 99999999", "1 @ 1",
         "await 1", "factorial(True)", "gcd(2**4000, 3**2500)", "fmod(1e308, 5e-324)", "exp(1e4)", "sqrt(2**4095)",
         "degrees(1e308)",
         "comb(9**9, 9)", "9 ^ 9 ^ 9", "pow(9, 9**9)", "sum([1])", "1_0", "\u0661 + \u0661", "\uff11+\uff11"]  # fmt: skip


@pytest.mark.parametrize("expression", BOMBS, ids=[f"{number} {bomb[:16]!a}" for number, bomb in enumerate(BOMBS)])
def test_calculator_gives_a_number_or_a_reason_at_once(expression: str) -> None:
    began = time.thread_time()
    try:
        result = module.calculator(expression)
    except module.ToolError as error:
        assert str(error) and len(str(error)) < 200
    else:
        assert type(result) in (int, float) and json.loads(json.dumps(result, allow_nan=False)) == result
    assert time.thread_time() - began < 0.2


@more_under_soak
@fuzz(300)
@hypothesis.given(st.lists(st.sampled_from([*"0123456789+-*/%^().,e _\"'[]{}\n\t\0", *module.MATH_FUNCTIONS, "pi", "**", "//",
                                            "factorial(", "round(", "1e308", "9999", "lambda", " if ", "x:=", "\u00b2"]),
                           max_size=30))  # fmt: skip
def test_calculator_survives_any_expression(parts: list[str]) -> None:
    with contextlib.suppress(module.ToolError):
        assert type(module.calculator("".join(parts))) in (int, float)


@pytest.fixture(scope="module")
def walled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tool root with ways out of it."""
    folder = tmp_path_factory.mktemp("walled")
    root = folder / "root"
    (root / "sub" / "deep").mkdir(parents=True)
    (folder / "root-too").mkdir()
    for path in (folder / "secret", folder / "root-too" / "secret"):
        path.write_text("secret")
    (root / "loop").symlink_to("loop")
    (root / "one").symlink_to("two")
    (root / "two").symlink_to("one")
    (root / "up").symlink_to("../secret")
    (root / "far").symlink_to("/proc/self/environ")
    (root / "sub" / "deep" / "root").symlink_to("/")
    (root / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(root / "door"))
    return root


OUTSIDE = ["../secret", "sub/../../secret", "./sub/deep/../../../secret", "sub//..//..//secret", "up", "up/",
           "../root-too/secret", "far",
           "sub/deep/root/etc/passwd", "sub/deep/root/proc/self/environ", "/proc/self/root/etc/passwd",
           "/proc/self/cwd/../secret", "zero", "door",
           "loop", "loop/x", "one", "sub/deep", "//etc/passwd", "~root/.bashrc", "sub\\..\\..\\secret", "..%2fsecret",
           "\u2025/secret", "\0", "a\0b",
           "x" * 5000, "/".join("x" * 2000), "note\n../secret", "file:///etc/passwd", "C:\\Windows\\win.ini", "$HOME",
           "*"]  # fmt: skip


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: f"{path[:24]!a}")
def test_file_read_stays_inside_and_says_so_without_a_path(path: str, walled: Path) -> None:
    with pytest.raises(module.ToolError) as refused:
        module.FileReader(str(walled)).file_read(path)
    assert str(walled) not in str(refused.value) and str(refused.value).isprintable()


@pytest.mark.skipif(not hasattr(os, "mknod") or os.geteuid() != 0, reason="only root makes devices")
def test_file_read_opens_no_device(walled: Path) -> None:
    try:
        os.mknod(walled / "device", 0o600 | 0o020000, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("not even root makes devices here")
    with pytest.raises(module.ToolError, match="regular"):
        module.FileReader(str(walled)).file_read("device")


NUMERIC = ["2130706433", "0x7f000001", "0x7F.1", "0177.0.0.1", "017700000001", "127.1", "127.0.1", "0", "0.0", "127.0.0.1.",
           "localhost", "LOCALHOST.",
           "\u2460\u2461\u2466.0.0.1", "127\u30020\u30020\u30021", "\uff11\uff12\uff17.0.0.1", "[::]", "[::1]",
           "[0:0:0:0:0:ffff:7f00:1]",
           "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[::ffff:0:127.0.0.1]", "[::1%25lo]", "[::1%lo]",
           "[fe80::1%25eth0]", "[fe80::1%1]",
           "[64:ff9b::127.0.0.1]", "[64:ff9b::10.0.0.1]", "[64:ff9b:1::1]", "[2002:7f00:1::]", "[2002:a00:1::]", "[2001::1]",
           "[fc00::1]", "[ff02::1]",
           "[fec0::1]", "10.1", "0xa9fea9fe", "169.254.169.254", "2852039166", "[fd00:ec2::254]", "255.255.255.255",
           "224.0.0.1", "100.100.100.200"]  # fmt: skip


@pytest.mark.parametrize("host", NUMERIC, ids=ascii)
@pytest.mark.parametrize("form", ["http://{}:{}/health", "http://evil.example@{}:{}/health"], ids=["plain", "behind a user"])
def test_http_get_reaches_no_private_address_in_any_spelling(form: str, host: str, server: Server) -> None:
    reply = execute(server, "http_get", form.format(host, server.port))
    assert_tool_failed(reply)
    assert b"healthy" not in reply.body


@pytest.mark.parametrize("url", ["http://[", "http://[::1", "http://a:b:c/", "http://x:99999/", "http://x:-1/", "http:///x",
                                 "https:/x", "HTTP://", "//x",
                                 "http://\0/", "http://x\r\nHost: y/", "javascript:1", "data:text/plain,x", "unix:/run/x",
                                 "http://" + "a." * 200,
                                 "http://" + "a" * 70 + ".example/", "http://xn--\ud7ff.example/", "http://*/",
                                 "http://%31%32%37.0.0.1/"],
                         ids=lambda url: f"{url[:20]!a}")  # fmt: skip
def test_http_get_refuses_what_is_no_address(url: str, server: Server) -> None:
    assert_tool_failed(execute(server, "http_get", url))


class Resolver:
    """Stands for the name service: each look-up of a name gives its next addresses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> None:
        self.asked: list[str] = []
        self.connected: list[Any] = []
        self._answers, self._real = iter(answers), socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self.look_up)
        monkeypatch.setattr(socket, "create_connection", self.connect)

    def look_up(self, host: str, port: int, **more: Any) -> list[Any]:
        self.asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in next(self._answers)]

    def connect(self, address: Any, **more: Any) -> Any:
        self.connected.append(address[0])
        raise OSError("nobody is there")


@cases(
    "addresses",
    {
        "loopback": ["127.0.0.1"],
        "a global and a private one": ["1.1.1.1", "10.0.0.1"],
        "one in IPv6": ["::ffff:192.168.0.1"],
        "a zone": ["fe80::1%eth0"],
        "6to4": ["2002:c0a8:1::"],
        "NAT64": ["64:ff9b::a9fe:a9fe"],
    },
)
def test_http_get_refuses_a_name_of_a_private_address(addresses: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = Resolver(monkeypatch, addresses)
    with pytest.raises(module.ToolError, match="not global"):
        module.HttpGetter(["*"]).http_get("http://rebind.example/")
    assert resolver.connected == []


def test_http_get_connects_to_the_address_that_it_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that means another address when it is looked up again gains nothing: it is looked up once."""
    resolver = Resolver(monkeypatch, ["1.1.1.1"], ["127.0.0.1"])
    with pytest.raises(module.ToolError):
        module.HttpGetter(["*"]).http_get("http://rebind.example/")
    assert (resolver.asked, resolver.connected) == (["rebind.example"], ["1.1.1.1"])


class Redirects(http.server.BaseHTTPRequestHandler):
    """Sends whoever comes to `place`."""

    place = ""

    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", self.place)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def redirecting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """A page at what counts as the one global address: redirecting(place) gives its URL."""
    monkeypatch.setattr(module, "is_global", lambda address: address == "127.0.0.2")
    with http.server.ThreadingHTTPServer(("127.0.0.2", 0), Redirects) as pages:
        threading.Thread(target=pages.serve_forever, args=[0.02], daemon=True).start()

        def to(place: str) -> str:
            Redirects.place = place.format(port=pages.server_port)
            return f"http://127.0.0.2:{pages.server_port}/"

        yield to
        pages.shutdown()


@linux
@cases(
    "place, why",
    {
        "loopback": ("http://127.0.0.1:{port}/", "not global"),
        "without a scheme": ("//127.0.0.1:{port}/", "not global"),
        "in hexadecimal": ("http://0x7f000001:{port}/", "not global"),
        "in IPv6": ("http://[::ffff:127.0.0.1]:{port}/", "not global"),
        "by name": ("http://localhost:{port}/", "not global"),
        "a file": ("file:///etc/passwd", "http"),
        "another protocol": ("gopher://127.0.0.1/", "http"),
        "itself, without end": ("/", "redirects"),
        "nonsense": ("http://[", "cannot be fetched"),
    },
)
def test_http_get_checks_where_it_is_sent_on(place: str, why: str, redirecting: Callable[[str], str]) -> None:
    with pytest.raises(module.ToolError, match=why):
        module.HttpGetter(["*"]).http_get(redirecting(place))


@linux
def test_http_get_is_not_sent_on_to_a_host_that_is_not_opened(redirecting: Callable[[str], str]) -> None:
    with pytest.raises(module.ToolError, match=r"other\.example is not opened"):
        module.HttpGetter(["127.0.0.2"]).http_get(redirecting("http://other.example/"))


STUCK_WEATHER = """
import time
from shimmy import tool

@tool
def get_weather(city: str) -> str:
    '''Never comes back.'''
    time.sleep(3600)
    return ""
"""
WEATHER_BUILTIN = {"type": "builtin", "name": "get_weather"}


def test_tool_that_never_returns_ends_a_chat_with_its_error(serve: Callable[..., Server], models: Path, tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(STUCK_WEATHER)
    own = serve("--models-dir", models, "--tools", tmp_path / "stuck.py", script=altered(tmp_path, ("TOOL_SECONDS = 30.0",
                                                                                                    "TOOL_SECONDS = 0.3")))
    with quickly(20.0):
        for _ in range(6):  # beyond the calls that may hang
            message = own.chat("weather", tools=[WEATHER_BUILTIN]).message
            assert message["content"] == TEXTS["S"] and message["tool_results"][0]["error"]
        assert own.chat("hi").message["content"] == TEXTS[":"]
        assert own.stop() == 0


def test_client_that_leaves_a_chat_whose_tool_hangs_frees_its_place(
    serve: Callable[..., Server], models: Path, tmp_path: Path
) -> None:
    (tmp_path / "stuck.py").write_text(STUCK_WEATHER)
    own = serve("-v", "--models-dir", models, "--tools", tmp_path / "stuck.py")
    body = {"model": "recital", "messages": [{"role": "user", "content": "weather"}], "tools": [WEATHER_BUILTIN], "stream": True}
    with socket.create_connection((own.host, own.port), timeout=HANG) as gone:
        gone.sendall(raw_post("/v1/chat/completions", json.dumps(body).encode()))
        assert gone.recv(100)
        time.sleep(0.5)
    eventually(lambda: "POST /v1/chat/completions" in own.log.read_text(), "the request ends")
    assert own.status("recital")["requests_running"] == own.status("recital")["requests_waiting"] == 0


# topic: hostile model files

EXTREME = [0, 1, 2, 7, 8, 9, 127, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63,
           (1 << 64) - 1]


def changed_file(data: bytes, header: int, pick: random.Random) -> bytes:
    """A model file with a few changes in its header: bytes, whole numbers, pieces cut out or doubled, its end."""
    changed = bytearray(data)
    for _ in range(pick.randint(1, 4)):
        at = pick.randrange(4, header)
        how = pick.randrange(6)
        if how < 2:
            changed[at] = pick.randrange(256)
        elif how < 4:
            size = pick.choice((4, 8))
            changed[at : at + size] = (pick.choice(EXTREME) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        elif how == 4:
            del changed[at : at + pick.randint(1, 40)]
        else:
            changed[at:at] = changed[at : at + pick.randint(1, 40)]
    return bytes(changed[: pick.randrange(len(changed))] if pick.random() < 0.1 else changed)


def pair(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


STRING, ARRAY = struct.pack("<Q", 3) + b"\x1b[2", struct.pack("<IQ", 4, 2) + bytes(8)
VALUES = {8: STRING, 9: ARRAY, 6: struct.pack("<f", float("nan")), 12: struct.pack("<d", float("inf")), 7: b"\1",
          10: b"\xff" * 8, 11: b"\xff" * 8,
          5: b"\0\0\0\x80", 0: b"\0"}  # fmt: skip
READ_KEYS = ["general.architecture", "general.name", "general.description", "general.file_type", "general.alignment",
             "general.size_label",
             "general.parameter_count", "general.type", "split.no", "split.count", "llama.context_length", "llama.pooling_type",
             "llama.attention.causal", "tokenizer.chat_template", "adapter.type"]  # fmt: skip


def read_model(path: Path) -> None:
    """Reads a file as `list` does. Raises GgufError where it is no model; checks what it says else."""
    size = path.stat().st_size
    for whole in (False, True):
        header = module.read_gguf_header(str(path), size, whole)
        info = module.describe(header, str(path), "id", "here", size)
        shown = json.loads(json.dumps(info.document(), allow_nan=False))
        assert all(text.isprintable() and len(text) <= 200 for text in shown.values() if isinstance(text, str)), shown


@pytest.mark.parametrize("key", READ_KEYS)
def test_metadata_of_any_type_is_read_or_refused(key: str, tmp_path: Path) -> None:
    tensor = struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 32, 0, 0)
    for kind, value in VALUES.items():
        architecture = pair("general.architecture", 8, struct.pack("<Q", 5) + b"llama") if "architecture" not in key else b""
        pairs = architecture + pair(key, kind, value)
        (tmp_path / "odd.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 1,
                                                        1 + bool(architecture)) + pairs + tensor + bytes(4096))
        with contextlib.suppress(module.GgufError):
            read_model(tmp_path / "odd.gguf")


@more_under_soak
@pytest.mark.parametrize("write", [write_dice, write_recital, write_header], ids=lambda write: write.__name__)
def test_changed_header_is_read_or_refused_in_little_memory_and_time(write: Any, tmp_path: Path) -> None:
    path, pick = tmp_path / "changed.gguf", random.Random(SOAK)
    data = write(tmp_path / "whole.gguf").read_bytes()
    data = data[: 40_000 if write is not write_header else 900]
    tracemalloc.start()
    try:
        for number in range(20_000 if SOAK else 200):
            path.write_bytes(changed_file(data, min(len(data), 8000), pick))
            began = time.thread_time()
            with contextlib.suppress(module.GgufError):
                read_model(path)
            assert time.thread_time() - began < 2.5, number
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def with_little_memory(folder: Path) -> Path:
    """A shimmy.py whose processes may have 6 GB of addresses each: what a file asks for beyond is an error."""
    return wrapper(folder, "import resource", "resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))",
                   "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))")  # fmt: skip


def loadable(data: bytes, header: int, pick: random.Random, path: Path) -> None:
    """Writes a changed model file that is still listed."""
    while True:
        path.write_bytes(changed_file(data, header, pick))
        with contextlib.suppress(module.GgufError):
            return read_model(path)


@linux
@more_under_soak
def test_changed_file_that_is_loaded_is_one_error_and_the_server_goes_on(
    serve: Callable[..., Server], models: Path, tmp_path: Path
) -> None:
    pick, count = random.Random(SOAK), 600 if SOAK else 12
    data = {name: (models / f"{name}.gguf").read_bytes() for name in ("recital", "dice")}
    folder = tmp_path / "changed"
    folder.mkdir()
    for number in range(count):
        name = pick.choice(sorted(data))
        loadable(data[name], 14_000 if name == "recital" else 10_000, pick, folder / f"changed-{number}.gguf")
    own = serve("--models-dir", models, "--models-dir", folder, "--max-loaded", "2", "--ctx", "128",
                script=with_little_memory(tmp_path))
    statuses = []
    for id in [id for id in own.ids() if id.startswith("changed-")]:
        reply = own.generate("Once", id, max_tokens=2)
        assert reply.status in (200, 400, 500), reply.body
        assert reply.status != 500 or reply.json()["error"]["code"] == "generation_failed", reply.body
        statuses.append(reply.status)
        own.unload(id, "?force=true")
    assert len(statuses) > count // 2 and own.generate().text == TEXTS[":"]
    log = own.log.read_text()
    assert "Traceback" not in log and not module.CONTROL.search(log)


NASTY = "\x1b]0;owned\x07\x1b[31m\x9b2J\r"


def write_nasty(path: Path, **more: Any) -> Path:
    """A model all of whose texts hold control characters."""
    template = "{{ raise_exception('" + NASTY + "') }}" if not more else "{{ messages[-1].content }}:"
    write_recital(path, name=f"Nasty {NASTY}", template=template, **more)
    return path


@pytest.mark.parametrize("command", [["list", "-v"], ["diag"], ["-v", "generate", "nasty", "--prompt", "x"], ["generate",
                                                                                                              "broken",
                                                                                                              "--prompt", "x"],
                                     ["generate", NASTY, "--raw", "--prompt", ":"]],
                                     ids=lambda command: " ".join(command).translate({27: "ESC"})[:30])
def test_control_characters_of_a_file_reach_no_terminal(command: list[str], nasty: Path) -> None:
    done = shimmy(*command, "--models-dir", nasty, home=nasty)
    shown = (done.stdout + done.stderr).decode()
    assert shown and not module.CONTROL.search(shown), shown


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with control characters in every text, one of which cannot be loaded."""
    folder = tmp_path_factory.mktemp("nasty")
    data = write_nasty(folder / "nasty.gguf").read_bytes()
    name = b"blk.0.attn_norm.weight"
    assert data.count(name) == 1
    (folder / "broken.gguf").write_bytes(data.replace(name, NASTY.encode("latin-1", "replace").ljust(len(name), b"\x1b")))
    write_recital(folder / "b.gguf").rename(folder / f"{NASTY}.gguf")
    return folder


def test_control_characters_of_files_and_clients_reach_no_log(nasty: Path, serve: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / "mytools.py").write_text(TOOL_FILE)
    own = serve("-v", "--models-dir", nasty, "--tools", tmp_path / "mytools.py")
    assert own.chat("hi", "nasty").status == 400
    assert own.generate("hi", "broken").status == 500
    own.generate("hi", NASTY)
    assert_tool_failed(own.post("/api/tools/stumble/execute", {"why": f"{NASTY}\n12:00:00 forged"}))
    own.get(f"/v1/models/{quote(NASTY)}", **{"User-Agent": "\x1b".join("ab").replace("\x1b", "\t")})
    exchange(own, b"GET /\xc2\x9b2J HTTP/1.1\r\nHost: localhost\r\n\r\n")
    log = own.log.read_text()
    assert "stumble" in log and not module.CONTROL.search(log), log
    assert "12:00:00 forged" in log and "\n12:00:00 forged" not in log


@pty
def test_control_characters_that_a_model_writes_reach_no_terminal(tmp_path: Path) -> None:
    tokens = [NASTY if token == "▁wide" else token for token in VOCABULARY]
    write_recital(tmp_path / "models" / "writer.gguf", tokens=tokens)
    with terminal("generate", "writer", "--raw", "--prompt", ":", home=tmp_path) as screen:
        assert screen.left() == "Hello" + module.harmless(NASTY) + " world\n"
    done = shimmy("generate", "writer", "--raw", "--prompt", ":", home=tmp_path)
    assert done.stdout.decode() == f"Hello{NASTY} world"


# topic: hostile templates

MORE_TEMPLATES = {
    "range of a billion": "{{ range(10**9) | list }}",
    "a sum over a billion": "{{ range(10**9) | sum }}",
    "a string that grows": "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s * 9 %}{% endfor %}",
    "a list that grows": "{% set x = [1] * 10**10 %}{{ x }}",
    "a deep include": "{% include 'x' %}{% import '/etc/passwd' as p %}",
    "nesting in the source": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "ifs in the source": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "a pattern": "{{ 'a' * 5000 | wordwrap(1) * 99999 }}",
    "a join": "{{ (['ab' * 100000] * 100000) | join }}",
    "a replacement": "{{ ('a' * 10**6) | replace('a', 'b' * 10**6) }}",
    "an indent": "{{ ('\\n' * 10**6) | indent(10**6) }}",
    "a big number": "{{ 10 ** 10 ** 8 }}",
    "tojson of itself": "{% set x = [] %}{% for i in range(99) %}{% set x = [x, x] %}{% endfor %}{{ x | tojson }}",
    "a way out": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a way out by format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "a way out by attr": "{{ messages | attr('__class__') | attr('__base__') }}",
    "globals of a function": "{{ raise_exception.__globals__['os'].system('id') }}",
    "cycler's globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "self": "{{ self.__dict__ }}{{ self._TemplateReference__context }}",
    "strftime of a long format": "{{ strftime_now('%Y' * 10**8) }}",
    "sleep by macro": "{% macro m(n) %}{% for i in range(9) %}{{ m(n) }}{% endfor %}{% endmacro %}{{ m(1) }}",
}


@pytest.fixture(scope="module")
def helpers() -> Iterator[module.Helpers]:
    made = module.Helpers()
    yield made
    made.close()


def rendered(source: str, helpers: module.Helpers) -> str:
    facts = module.ChatFacts({"": source}, "<s>", False, "</s>", ())
    return "".join(module.Chat(facts, helpers).prompt(asked(("user", "hi"))))


@pytest.mark.parametrize("name", MORE_TEMPLATES)
def test_runaway_or_escaping_template_ends_with_a_reason(
    name: str, helpers: module.Helpers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HELPER_SECONDS", 0.5)
    with quickly(6.0):
        try:
            text = rendered(MORE_TEMPLATES[name], helpers)
        except module.InvalidRequest as error:
            assert "template" in str(error) and len(str(error)) < 1000
        else:
            assert len(text) <= module.MAX_RENDERED and not re.search(r"<class|uid=|root:|module 'os'", text)
    monkeypatch.undo()
    assert rendered("{{ messages[0].content }}", helpers) == "hi"


def test_message_of_a_child_that_names_a_function_is_refused() -> None:
    """Whoever took over a child may write what it likes into the pipe; it must not run anything on our side."""
    for name in ("load_tools", "os", "main", "eval"):
        data = b"c" + f"shimmy\n{name}\n".encode() + b"(S'/tmp/x'\ntR."  # a pickle that calls the name with a string
        pipe = module.Pipe(io.BytesIO(struct.pack("<I", len(data)) + data), io.BytesIO())
        with pytest.raises(pickle.UnpicklingError, match="no message"):
            pipe.receive()
