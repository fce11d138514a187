"""Tests of the HTTP border, the tools and strict JSON, to be moved into test_shimmy.py."""

import ipaddress
import pathlib

import shimmy as module
from test_shimmy import *  # noqa: F403

# ruff: noqa: F405

# Strict JSON


@contextlib.contextmanager
def quickly(seconds: float = 5.0) -> Iterator[None]:
    """What used to take minutes; the bound is generous for a busy machine."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def test_body_of_escaped_quotes_behind_brackets_is_refused_in_linear_time(server: Server) -> None:
    with quickly():
        body = b'{"model":"default","prompt":"' + b"[]" * 65 + b'\\"' * 500_000 + b"\\"
        assert_error(server.post("/api/generate", body), 400, "invalid_request")


@pytest.mark.parametrize("unit", ["{},", "[],", '"a",', "1,", '{"a":1},'])
def test_body_of_too_many_values_is_refused(unit: str, server: Server) -> None:
    body = b'{"model": "recital", "prompt": ":", "x": [' + unit.encode() * ((12 << 20) // len(unit)) + b"0]}"
    assert_error(server.post("/api/generate", body), 400, "invalid_request", "values")


@pytest.mark.parametrize("text", ['[[{"' * 80, "\\\\" * 3000 + '"[{', "[]{}" * 400_000, '","' * 400_000])
def test_marks_inside_a_string_are_neither_levels_nor_values(text: str, server: Server) -> None:
    assert server.generate(":", x=text).text == TEXTS[":"]


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('["\\"]",', "]")])
def test_json_of_64_levels_is_read_and_of_65_refused(opening: str, closing: str, server: Server) -> None:
    for levels, status in ((63, 200), (64, 400)):  # and the body's own
        nested = opening * levels + "1" + closing * levels
        body = f'{{"model": "recital", "prompt": ":", "x": {nested}, "y": 1}}'.encode()
        assert server.post("/api/generate", body).status == status


def test_budget_is_waited_for_in_order() -> None:
    budget, order = module.Budget(100), []

    def hold(name: str, size: int) -> None:
        with budget.hold(size):
            order.append(name)

    with budget.hold(90):
        threads = [threading.Thread(target=hold, args=each) for each in (("large", 50), ("small", 5))]
        for number, thread in enumerate(threads, 1):
            thread.start()
            eventually(lambda n=number: len(budget._waiting) == n, "it waits")  # type: ignore[misc]
    for thread in threads:
        thread.join(HANG)
    assert order == ["large", "small"] and budget.used == 0


def test_budget_that_stays_taken_is_overloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TURN_SECONDS", 0.1)
    budget = module.Budget(100)
    with budget.hold(500):  # larger than all, hence alone
        with pytest.raises(module.Overloaded):
            budget.take(1)
    budget.take(1)


@linux
def test_large_bodies_at_once_stay_within_bounds(server: Server) -> None:
    values = b"[" + b"{}," * 200_000 + b"0]"
    body = b'{"model": "recital", "prompt": ":", "x": ' + values + b', "y": "' + b"z" * (12 << 20) + b'"}'
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: server.post("/api/generate", body), range(8)))
    assert [reply.text for reply in replies] == [TEXTS[":"]] * 8
    peak = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{server.process.pid}/status").read_text())
    assert peak and int(peak[1]) < 600 << 10  # KiB


def test_room_for_bodies_is_given_back_when_the_connection_closes(server: Server) -> None:
    body = json.dumps({"model": "recital", "prompt": ":", "x": "y" * (15 << 20)}).encode()
    for _ in range(12):  # the ninth would find no room
        assert server.post("/api/generate", body, Connection="close").text == TEXTS[":"]


# Heads


def test_upgrade_head_of_spaces_is_refused_in_linear_time(server: Server) -> None:
    with quickly():
        (reply,) = exchange(server, b"GET /ws/generate HTTP/1.1\r\na:" + b" " * 12_000 + b"\n\r\n\r\n")
        assert_error(reply, 400, "invalid_request")


@pytest.mark.parametrize("path", ["/health", "/ws/generate"])
@pytest.mark.parametrize("line", ["X: a\rY: b", "X: a\0b", "X: a\x1bb", "X: a\x7f", "X: a\r\n folded", "X: a\r\n\tfolded",
                                  "X: a\r"])  # fmt: skip
def test_control_character_or_folded_line_in_a_head_is_400(line: str, path: str, server: Server) -> None:
    upgrade = [f"{name}: {value}" for name, value in UPGRADE.items()] if path != "/health" else []
    (reply,) = exchange(server, head_of("GET", path, *upgrade, line))
    assert_error(reply, 400, "invalid_request")


def test_head_sent_byte_by_byte_is_read(server: Server) -> None:
    with socket.create_connection((server.host, server.port), timeout=HANG) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"\r\n\r\n" + head_of("GET", "/health", "X: " + "y" * 500):
            sock.sendall(bytes([byte]))
        assert read_reply(sock).status == 200


@pytest.mark.parametrize("size", [9000, 20_000, 100_000])
def test_ws_upgrade_whose_head_is_too_large_is_431(size: int, server: Server) -> None:
    lines = [f"{name}: {value}" for name, value in {**UPGRADE, "X-Large": "x" * size}.items()]
    (reply,) = exchange(server, head_of("GET", "/ws/generate", *lines))
    assert_error(reply, 431, "invalid_request")


@pytest.mark.parametrize("path", ["//ws//generate", "/ws/generate/", "/ws/generate?x=1", "///////ws/generate",
                                  "/" * 100 + "ws/generate"])  # fmt: skip
def test_ws_path_is_read_as_any_other(path: str, server: Server) -> None:
    with ws_connect(f"ws://127.0.0.1:{server.port}{path}", proxy=None) as ws:
        ws.send('{"model": "recital", "prompt": ":"}')
        assert ws_answer(ws)[0] == TEXTS[":"]


# Clients that leave, and clients that only end their side

ENDLESS = json.dumps({"model": "recital", "prompt": "#", "max_tokens": LONG_CTX}).encode()
COUNTED = json.dumps({"model": "recital", "prompt": "#", "max_tokens": 3000}).encode()


def is_idle(server: Server) -> bool:
    return server.status("recital")["requests_running"] == 0


@contextlib.contextmanager
def running(server: Server, request: bytes, *, more: bytes = b"") -> Iterator[socket.socket]:
    """A raw connection whose request runs."""
    server.load("recital")
    eventually(lambda: is_idle(server), "nothing runs")
    with socket.create_connection((server.host, server.port), timeout=HANG) as sock:
        sock.sendall(request)
        eventually(lambda: not is_idle(server), "it runs")
        if more:
            sock.sendall(more)
            time.sleep(0.1)
        yield sock


@pytest.mark.parametrize("more", [b"\r\n", b"\r\n" * 3, b"\n", head_of("GET", "/health"), b"GET /hea"],
                         ids=["crlf", "crlfs", "lf", "request", "half"])  # fmt: skip
def test_client_that_leaves_behind_more_bytes_stops_the_engine(more: bytes, server: Server) -> None:
    with running(server, raw_post("/api/generate", ENDLESS), more=more):
        pass
    with quickly(10.0):
        eventually(lambda: is_idle(server), "the generation is cancelled")


@pytest.mark.parametrize("more", [b"", b"\r\n"], ids=["nothing", "crlf"])
def test_client_that_half_closes_gets_its_answer(more: bytes, server: Server) -> None:
    with running(server, raw_post("/api/generate", COUNTED), more=more) as sock:
        sock.shutdown(socket.SHUT_WR)
        time.sleep(0.2)
        assert len(read_reply(sock).text.split()) == 3000


def test_client_that_half_closes_behind_two_requests_gets_both_answers(server: Server) -> None:
    with running(server, raw_post("/api/generate", COUNTED), more=head_of("GET", "/health")) as sock:
        sock.shutdown(socket.SHUT_WR)
        answers = b"".join(iter(functools.partial(sock.recv, 65536), b""))
    assert answers.count(b"HTTP/1.1 200 OK") == 2 and b'"healthy"' in answers


def test_client_that_half_closes_a_stream_gets_all_of_it(server: Server) -> None:
    body = json.dumps({**json.loads(COUNTED), "stream": True}).encode()
    with running(server, raw_post("/api/generate", body)) as sock:
        sock.shutdown(socket.SHUT_WR)
        time.sleep(0.2)
        reply = read_reply(sock)
    assert reply.body.count(b"data: ") >= 3 and reply.body.endswith(b"data: [DONE]\n\n")


def test_client_that_half_closes_and_then_leaves_stops_the_engine(server: Server) -> None:
    with running(server, raw_post("/api/generate", ENDLESS)) as sock:
        sock.shutdown(socket.SHUT_WR)
        time.sleep(0.3)
        assert not is_idle(server)
    with quickly(10.0):
        eventually(lambda: is_idle(server), "the generation is cancelled")


def test_http_1_0_client_that_ends_its_side_has_left(server: Server) -> None:
    request = b"POST /api/generate HTTP/1.0\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(ENDLESS) + ENDLESS
    with running(server, request) as sock:
        sock.shutdown(socket.SHUT_WR)
        eventually(lambda: is_idle(server), "there is nothing it would skip, so it cannot be asked")


@pytest.fixture
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A loopback connection: the server's end and the client's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    with contextlib.closing(ours), contextlib.closing(theirs):
        yield ours, theirs


@pytest.mark.parametrize("close", [True, False], ids=["close", "shutdown"])
def test_watcher_tells_a_closed_client_from_a_half_closed_one(close: bool, connected: tuple[socket.socket, ...]) -> None:
    watcher, cancel, (ours, theirs), probes = Watcher(), Cancellation(), connected, []

    def probe() -> bool:
        probes.append(ours.send(b"HTTP/1.1 100 Continue\r\n\r\n"))
        return True

    with watcher.watching(ours, cancel, probe):
        theirs.close() if close else theirs.shutdown(socket.SHUT_WR)
        eventually(lambda: probes, "it is asked")
        if close:
            eventually(lambda: cancel.cancelled, "it has left")
        time.sleep(0.2)
        assert cancel.cancelled is close and len(probes) == 1


@linux
def test_client_with_a_descriptor_beyond_1023_can_be_asked(connected: tuple[socket.socket, ...]) -> None:
    import fcntl

    with socket.socket(fileno=fcntl.fcntl(connected[0], fcntl.F_DUPFD, 1500)) as high:
        assert module.is_writable(high)


# Trust

STRANGE = ["http://127.0.0.1:80.evil.example", "http://127.0.0.1:80@evil.example", "http://user@127.0.0.1", "http://127.0.0.1:",
           "http://localhost:999999", "http://[127.0.0.1", "http://", "http://localhost.", "http://localhost/", "http:localhost",
           "http://localhost:80 ", "http://localhost#", "app://x/evil", "//localhost"]  # fmt: skip


@pytest.mark.parametrize("origin", STRANGE)
def test_strange_origin_is_refused_and_not_reflected(origin: str, server: Server) -> None:
    if origin.endswith(" "):
        origin = origin[:-1] + "\xa0"
    reply = server.post("/api/tools/calculator/execute", {"expression": "1"}, Origin=origin)
    assert_error(reply, 403, "forbidden")
    assert "Access-Control-Allow-Origin" not in reply.headers


@pytest.mark.parametrize("origin", ["app://.", "app://", "capacitor://localhost", "http://shimmy.localhost:1"])
def test_origin_of_an_app_passes(origin: str, server: Server) -> None:
    assert server.get("/api/models", Origin=origin).headers["Access-Control-Allow-Origin"] == origin


@pytest.mark.parametrize("host", ["", "user@127.0.0.1", "127.0.0.1.", "localhost.", "localhost:", "localhost:x",
                                  "127.0.0.1:80.evil", "localhost:99999", "[127.0.0.1", "[::1", "::1", "[::1]evil", "[]",
                                  "localhost/x", "[::1%25lo]"])  # fmt: skip
def test_strange_host_is_refused(host: str, server: Server) -> None:
    assert_error(server.get("/api/models", Host=host), 403, "forbidden")


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("key", ["schlüssel", "clé s3crète"])
def test_key_that_is_not_ascii_opens(key: str, encoding: str, serve: Callable[..., Server]) -> None:
    server = serve("--api-key", key)
    sent = key.encode(encoding)
    request = b"GET /api/models HTTP/1.1\r\nHost: localhost\r\n%s\r\n\r\n"
    replies = exchange(server, *(request % line for line in (b"x-api-key: " + sent, b"Authorization: Bearer " + sent)))
    assert [reply.status for reply in replies] == [200, 200]
    (refused,) = exchange(server, request % (b"x-api-key: " + sent + b"!"))
    assert_error(refused, 401, "unauthorized")


def test_key_that_is_not_ascii_opens_websocket(serve: Callable[..., Server]) -> None:
    server, lines = serve("--api-key", "schlüssel"), [f"{name}: {value}" for name, value in UPGRADE.items()]
    with socket.create_connection((server.host, server.port), timeout=HANG) as sock:
        sock.sendall(head_of("GET", "/ws/generate", *lines, "x-api-key: schlüssel"))
        assert sock.recv(4096).startswith(b"HTTP/1.1 101 ")


# Connections and descriptors


def wrapper(folder: Path, *lines: str) -> Path:
    """A script that runs shimmy.py after `lines`."""
    path = repr(str(SHIMMY))
    runs = ["import runpy, sys", *lines, f"sys.argv[0] = {path}", f"runpy.run_path({path}, run_name='__main__')"]
    (folder / "wrapper.py").write_text("\n".join(runs))
    return folder / "wrapper.py"


def limited(folder: Path, soft: int, hard: int) -> Path:
    return wrapper(folder, "import resource", f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))")


@linux
def test_descriptor_limit_is_raised(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(script=limited(tmp_path, 128, 2000))
    (line,) = [line for line in Path(f"/proc/{server.process.pid}/limits").read_text().splitlines() if "open files" in line]
    assert line.split()[3:5] == ["2000", "2000"]


@linux
def test_connections_are_bounded_by_the_descriptors_there_are(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(script=limited(tmp_path, 200, 200))
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.create_connection((server.host, server.port), timeout=HANG)) for _ in range(120)]
        for sock in socks:
            sock.sendall(head_of("GET", "/health"))
        statuses = [read_reply(sock).status for sock in socks]
        assert set(statuses) == {200, 503} and 20 <= statuses.count(200) < 100
    eventually(lambda: server.get("/health").status == 200, "there is room again")


@linux
def test_connections_without_a_descriptor_are_refused_without_spinning(serve: Callable[..., Server]) -> None:
    import resource

    server = serve()
    assert server.get("/health").status == 200
    opened = len(os.listdir(f"/proc/{server.process.pid}/fd"))
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (opened + 3, opened + 3))  # a limit that nobody foresaw
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.create_connection((server.host, server.port), timeout=HANG)) for _ in range(8)]
        for sock in socks:
            sock.sendall(head_of("GET", "/health"))
        statuses = [read_reply(sock).status for sock in socks]
        assert 503 in statuses and set(statuses) <= {200, 503}
        before = processor_seconds(server)
        time.sleep(1.0)
        assert processor_seconds(server) - before < 0.3
    eventually(lambda: server.get("/health").status == 200, "there is room again")


def processor_seconds(server: Server) -> float:
    user, system = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def test_connection_without_a_thread_is_answered_503(serve: Callable[..., Server], tmp_path: Path) -> None:
    no_threads = ("import threading", "start = threading.Thread.start", "def refuse(self):",
                  "    if 'process_request_thread' in self.name: raise RuntimeError(\"can't start new thread\")",
                  "    start(self)", "threading.Thread.start = refuse")  # fmt: skip
    server = serve(script=wrapper(tmp_path, *no_threads))
    for _ in range(40):  # more than are kept waiting
        assert_error(server.get("/health"), 503, "overloaded", "thread")


# Tools

HANGING = """
import time
from shimmy import tool

@tool
def sleeper(seconds: float) -> str:
    '''Sleeps.'''
    time.sleep(seconds)
    return "awake"
"""


def test_tool_that_does_not_return_is_given_up(serve: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text(HANGING)
    script = altered(tmp_path, ("TOOL_SECONDS = 30.0", "TOOL_SECONDS = 0.5"))
    server = serve("--tools", tmp_path / "tools.py", script=script)
    for _ in range(4):
        assert_tool_failed(execute(server, "sleeper", 3600), "over 0.5 seconds")
    with quickly():
        assert_tool_failed(execute(server, "sleeper", 0), "have not come back")
    assert execute(server, "calculator", "1 + 1").json()["result"] == 2


def test_tool_that_returns_late_makes_room_again(serve: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text(HANGING)
    script = altered(tmp_path, ("TOOL_SECONDS = 30.0", "TOOL_SECONDS = 0.2"))
    server = serve("--tools", tmp_path / "tools.py", script=script)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: execute(server, "sleeper", 1.0), range(4)))
    eventually(lambda: execute(server, "sleeper", 0).json()["result"] == "awake", "they have come back")


def read_while_swapped(root: Path, path: str, swap: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What file_read gives or raises when `swap` happens between its look and its opening."""
    is_file, outcome = pathlib.Path.is_file, []

    def then_swap(self: pathlib.Path) -> bool:
        found = is_file(self)
        swap()
        return found

    def read() -> None:
        try:
            outcome.append(module.FileReader(str(root)).file_read(path))
        except module.ToolError as error:
            outcome.append(error)

    monkeypatch.setattr(pathlib.Path, "is_file", then_swap)
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(10.0)
    return outcome


def test_file_read_does_not_follow_a_link_put_there_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note.txt").write_text("secret")
    (tmp_path / "root" / "sub").mkdir(parents=True)
    (tmp_path / "root" / "sub" / "note.txt").write_text("note")

    def swap() -> None:
        (tmp_path / "root" / "sub").rename(tmp_path / "root" / "old")
        (tmp_path / "root" / "sub").symlink_to(tmp_path / "out")

    (answer,) = read_while_swapped(tmp_path / "root", "sub/note.txt", swap, monkeypatch)
    assert isinstance(answer, module.ToolError)


def test_file_read_does_not_wait_for_a_pipe_put_there_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "note.txt").write_text("note")

    def swap() -> None:
        (tmp_path / "note.txt").unlink()
        os.mkfifo(tmp_path / "note.txt")

    (answer,) = read_while_swapped(tmp_path, "note.txt", swap, monkeypatch)
    assert isinstance(answer, module.ToolError) and "regular" in str(answer)


# IANA's special-purpose address registries, and what is no unicast
SPECIAL = ["0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
           "192.0.0.9/32", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16",
           "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
           "255.255.255.255/32", "::/128", "::1/128", "::ffff:10.0.0.0/104", "64:ff9b::10.0.0.0/104", "64:ff9b:1::/48",
           "100::/64", "100:0:0:1::/64", "2001::/23", "2001:1::1/128", "2001:2::/48", "2001:3::/32", "2001:4:112::/48",
           "2001:10::/28", "2001:20::/28", "2001:30::/28", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20", "5f00::/16",
           "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8"]  # fmt: skip


@pytest.mark.parametrize("network", SPECIAL)
def test_special_purpose_network_is_not_global(network: str) -> None:
    addresses = ipaddress.ip_network(network)
    assert not any(map(module.is_global, map(str, (addresses[0], addresses[addresses.num_addresses // 2], addresses[-1]))))


@pytest.mark.parametrize("address", ["1.1.1.1", "9.255.255.255", "11.0.0.0", "192.0.1.0", "192.88.98.255", "192.88.100.0",
                                     "223.255.255.255", "2606:4700::1111", "2001:200::1", "2a00::1", "::ffff:8.8.8.8",
                                     "64:ff9b::8.8.8.8"])  # fmt: skip
def test_public_address_is_global(address: str) -> None:
    assert module.is_global(address)


@pytest.mark.parametrize("url", ["http://192.88.99.1/", "http://[2002:808:808::1]/", "http://[2001:0:808:808::1]/"])
def test_http_get_refuses_special_purpose_networks(url: str, server: Server) -> None:
    assert_tool_failed(execute(server, "http_get", url), "not global")


def test_http_get_refuses_an_address_that_is_too_long(server: Server) -> None:
    assert_tool_failed(execute(server, "http_get", "http://127.0.0.1/" + "a" * 10_000), "characters")
