"""Tests of shimmy.py against hostile pages, clients, files and arguments; to be moved into test_shimmy.py."""

from __future__ import annotations

import contextlib
import functools
import http.client
import http.server
import itertools
import json
import os
import random
import re
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

import shimmy as module
from test_shimmy import (
    FOREIGN,
    HANG,
    HANGING,
    LONG_CTX,
    MALFORMED,
    STRANGE,
    TEXTS,
    UPGRADE,
    WEATHER,
    Reply,
    Server,
    altered,
    assert_error,
    assert_tool_failed,
    cases,
    eventually,
    exchange,
    execute,
    head_of,
    limited,
    linux,
    models,
    guarded,
    quickly,
    raw_post,
    read_reply,
    serve,
    server,
    shared,
    shimmy,
    tool_root,
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
                                  "user@localhost", "169.254.169.254", "localhost:80:80", "localhost\\@evil.example"])  # fmt: skip
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
    request = upgrade_of("/ws/generate", Origin="http://localhost").replace(b"\r\nOrigin", b"\r\nOrigin: https://evil.example\r\nOrigin")
    assert exchange(server, request)[0].status in (400, 403)


@pytest.fixture(scope="module")
def opened(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that pages of any origin may use."""
    with shared(tmp_path_factory.mktemp("opened"), "--models-dir", models, "--model", "recital", "--allow-origin", "*") as running:
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


@pytest.mark.parametrize("name", ["..%2f..%2fetc%2fpasswd", "%2e%2e", "..", "%00", "nice%00.gguf", "%2Fetc%2Fpasswd", "%", "%zz", "%ff%fe",
                                  "dice%2f..%2fdice", "%0d%0aX:%20y", "%1b%5b2J", "a" * 4000, "%F0%9F%98%80", "c%3a%5cx"])  # fmt: skip
def test_name_in_an_address_is_only_a_name(name: str, server: Server) -> None:
    for method, path in (("GET", f"/api/models/{name}/status"), ("POST", f"/api/models/{name}/load"), ("GET", f"/v1/models/{name}")):
        assert_error(server.request(method, path), 404, "model_not_found")
    assert_error(server.post(f"/api/tools/{name}/execute", {}), 404, "not_found")


@pytest.mark.parametrize("path", ["/api%2fmodels", "/api/models%2fdice%2fload", "/api/../api/models", "/api/./models", "/%2e/health",
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
def test_connections_far_beyond_the_descriptors_leave_the_server_working(serve: Callable[..., Server], tmp_path: Path, models: Path) -> None:
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


@pytest.mark.parametrize("path", ["/ws", "/ws/", "/ws/generate/x", "/ws/generate%00", "/ws/../ws/generate", "/ws/Generate", "/ws/%67enerate",
                                  "/api/generate"])  # fmt: skip
def test_ws_wrong_path_is_an_error_object(path: str, server: Server) -> None:
    (reply,) = exchange(server, upgrade_of(path))
    assert reply.status in (404, 405) and reply.json()["error"]["code"] in ("not_found", "method_not_allowed")
