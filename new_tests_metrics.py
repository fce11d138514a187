"""New tests of branch metrics: /metrics and request ids."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import shimmy as module
from test_shimmy import (
    HANG,
    LONG_CTX,
    TEXTS,
    Server,
    altered,
    anthropic_client,
    assert_error,
    cases,
    eventually,
    exchange,
    guarded,
    head_of,
    linux,
    models,
    read_reply,
    serve,
    server,
    tool_root,
    write_recital,
    ws_ask,
)

__all__ = ["guarded", "models", "serve", "server", "tool_root"]  # fixtures

# topic: metrics


class Scraped:
    """What `/metrics` says, as Prometheus' own package reads it."""

    def __init__(self, text: str) -> None:
        parser = pytest.importorskip("prometheus_client.parser")
        self.families = {family.name: family for family in parser.text_string_to_metric_families(text)}
        self.samples = {(s.name, *sorted(s.labels.items())): s.value for f in self.families.values() for s in f.samples}

    def __call__(self, name: str, **labels: str) -> float:
        """The value of the one sample of this name and these labels; 0 while there is none."""
        return self.samples.get((name, *sorted(labels.items())), 0.0)

    def of(self, model: str, name: str, **labels: str) -> float:
        return self(name, model_name=model, **labels)


def scrape(server: Server) -> Scraped:
    reply = server.get("/metrics")
    assert reply.status == 200, reply.body
    return Scraped(reply.body.decode())


KNOWN = {  # what dashboards ask for, by the type they take it for
    "counter": ["llamacpp:prompt_tokens", "llamacpp:prompt_seconds", "llamacpp:tokens_predicted",
                "llamacpp:tokens_predicted_seconds", "vllm:prompt_tokens", "vllm:generation_tokens",
                "vllm:prefix_cache_queries", "vllm:prefix_cache_hits", "vllm:request_success", "shimmy_requests", "shimmy_model_loads", "shimmy_model_load_failures",
                "shimmy_engine_deaths", "shimmy_connections_refused"],
    "gauge": ["llamacpp:prompt_tokens_seconds", "llamacpp:predicted_tokens_seconds", "llamacpp:kv_cache_usage_ratio",
              "llamacpp:requests_processing", "llamacpp:requests_deferred", "vllm:num_requests_running",
              "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "shimmy_model_memory_bytes", "shimmy_open_connections",
              "process_start_time_seconds", "process_resident_memory_bytes"],
    "histogram": ["vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds",
                  "vllm:e2e_request_latency_seconds", "vllm:request_queue_time_seconds", "vllm:request_prefill_time_seconds",
                  "vllm:request_decode_time_seconds", "vllm:request_prompt_tokens", "vllm:request_generation_tokens"],
}  # fmt: skip


def test_metrics_have_the_names_and_types_that_dashboards_know(server: Server) -> None:
    server.generate()
    families = scrape(server).families
    assert {name: families[name].type for names in KNOWN.values() for name in names} == {
        name: type for type, names in KNOWN.items() for name in names
    }
    assert all(family.documentation for family in families.values())


def test_metrics_are_prometheus_text_and_answer_head(server: Server) -> None:
    reply, head = server.get("/metrics"), server.request("HEAD", "/metrics")
    assert reply.headers["Content-Type"] == head.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert reply.body.endswith(b"\n") and head.body == b"" and int(head.headers["Content-Length"]) > 1000


def test_each_series_is_there_once(server: Server) -> None:
    ws_ask(server, prompt=":")
    lines = [line.rpartition(" ")[0] for line in server.get("/metrics").body.decode().splitlines()]
    series = [line for line in lines if not line.startswith("#")]
    assert len(set(series)) == len(series) > 100


def test_metrics_need_the_key(guarded: Server) -> None:
    assert_error(guarded.get("/metrics"), 401, "unauthorized")
    assert guarded.get("/metrics", Authorization="Bearer s3cret").status == 200


def test_llama_servers_names_have_no_labels(server: Server) -> None:
    text = server.get("/metrics").body.decode()
    assert re.search(r"(?m)^llamacpp:prompt_tokens_total \d+$", text)
    assert "llamacpp:" in text and not re.search(r"llamacpp:\w+\{", text)


def test_tokens_are_counted_as_usage_tells(serve: Callable[..., Server], models: Path) -> None:
    own = serve("--models-dir", models)
    used = [own.generate("="), own.generate("a longer prompt ="), own.chat("count"), own.generate("Once", "dice", max_tokens=7)]
    usage = [reply.json()["usage"] for reply in used]
    now = scrape(own)
    assert now("llamacpp:tokens_predicted_total") == sum(u["completion_tokens"] for u in usage)
    assert now.of("dice", "vllm:generation_tokens_total") == usage[3]["completion_tokens"]
    assert now.of("recital", "vllm:prompt_tokens_total") == sum(u["prompt_tokens"] for u in usage[:3])
    computed = now("llamacpp:prompt_tokens_total") + now("llamacpp:prompt_tokens_cached_total")
    assert computed == sum(u["prompt_tokens"] for u in usage)


def test_cache_hits_are_counted_in_tokens(serve: Callable[..., Server], models: Path) -> None:
    own = serve("--models-dir", models)
    for _ in range(2):
        usage = own.chat("count " * 20).json()["usage"]
    now = scrape(own)
    assert now.of("recital", "vllm:prefix_cache_queries_total") == 2 * usage["prompt_tokens"]
    assert now.of("recital", "vllm:prefix_cache_hits_total") == usage["prompt_tokens_details"]["cached_tokens"] > 50


def test_histograms_hold_each_request_once_in_rising_buckets(serve: Callable[..., Server], models: Path) -> None:
    own = serve("--models-dir", models)
    for _ in range(3):
        own.generate("=")
    now = scrape(own)
    for name in KNOWN["histogram"]:
        samples = now.families[name].samples
        buckets = [s.value for s in samples if s.name == f"{name}_bucket"]
        assert buckets == sorted(buckets) and buckets[-1] == now.of("recital", f"{name}_count"), name
        assert now.of("recital", f"{name}_sum") > 0 or "latency" in name or "per_output" in name
        assert buckets[-1] == 3 or "inter_token" in name or name.endswith(":time_per_output_token_seconds"), name


def test_time_to_first_token_has_the_load_in_it(serve: Callable[..., Server], models: Path, tmp_path: Path) -> None:
    context = "        self.main = Context(self, "
    script = altered(tmp_path, (context, "        time.sleep(0.3)\n" + context))
    own = serve("--models-dir", models, script=script)
    own.generate(":")
    now = scrape(own)
    assert now.of("recital", "vllm:time_to_first_token_seconds_sum") > 0.3
    queued, computed = (now.of("recital", f"vllm:request_{what}_time_seconds_sum") for what in ("queue", "inference"))
    assert queued > 0.3 > computed > 0


def test_running_stream_shows_while_it_runs(serve: Callable[..., Server], models: Path) -> None:
    own = serve("--models-dir", models, "--ctx", str(LONG_CTX))
    with own.endless() as stream:
        next(stream)
        now = eventually(lambda: (s := scrape(own))("llamacpp:kv_cache_tokens") > 100 and s, "cells are in use")
        assert now.of("recital", "vllm:num_requests_running") == now("llamacpp:requests_processing") == 1
        assert 0 < now.of("recital", "vllm:kv_cache_usage_perc") == now("llamacpp:kv_cache_usage_ratio") <= 1
        before = now.of("recital", "vllm:generation_tokens_total")
        eventually(lambda: scrape(own).of("recital", "vllm:generation_tokens_total") > before > 0, "tokens count as they come")
    eventually(lambda: scrape(own)("llamacpp:kv_cache_tokens") == 0, "nobody holds cells")


@cases("body, reason", {
    "its own end": ({}, "stop"), "max_tokens": ({"max_tokens": 2}, "length"),
})  # fmt: skip
def test_ends_are_counted_by_reason(body: dict[str, Any], reason: str, server: Server) -> None:
    before = scrape(server).of("recital", "vllm:request_success_total", finished_reason=reason)
    server.generate(":", **body)
    assert scrape(server).of("recital", "vllm:request_success_total", finished_reason=reason) == before + 1


def test_tokens_of_a_client_that_left_are_counted(serve: Callable[..., Server], models: Path) -> None:
    own = serve("--models-dir", models, "--ctx", str(LONG_CTX))
    with own.endless() as stream:
        next(stream)

    def left() -> Scraped | None:
        now = scrape(own)
        return now if now.of("recital", "vllm:request_success_total", finished_reason="abort") else None

    now = eventually(left, "the end is counted")
    assert now.of("recital", "vllm:generation_tokens_total") > 0 and now.of("recital", "vllm:prompt_tokens_total") == 2


def test_counters_never_fall_over_loads_and_unloads(serve: Callable[..., Server], models: Path) -> None:
    own, seen = serve("--models-dir", models), []
    for _ in range(3):
        own.generate(":")
        own.unload("recital")
        seen.append(scrape(own))
    for early, late in itertools.pairwise(seen):
        rising = [key for key in early.samples if re.search("_(total|bucket|sum|count)$", key[0])]
        assert all(late.samples[key] >= early.samples[key] for key in rising)
    assert [s.of("recital", "shimmy_model_loads_total") for s in seen] == [1, 2, 3]
    assert seen[-1].of("recital", "shimmy_model_loaded") == seen[-1].of("recital", "shimmy_model_memory_bytes") == 0


def test_memory_is_shown_by_model(server: Server) -> None:
    server.load("recital")
    now = scrape(server)
    assert now.of("recital", "shimmy_model_memory_bytes") > 10e6 and now("process_resident_memory_bytes") > 10e6


def test_failed_load_is_counted(serve: Callable[..., Server], models: Path) -> None:
    own = serve("--models-dir", models)
    assert_error(own.generate(model="hollow"), 500, "generation_failed")
    now = scrape(own)
    assert (now.of("hollow", "shimmy_model_load_failures_total"), now.of("hollow", "shimmy_model_loads_total")) == (1, 0)


@linux
def test_death_of_an_engine_is_counted_and_its_requests_as_errors(serve: Callable[..., Server], models: Path) -> None:
    own = serve("--models-dir", models, "--ctx", str(LONG_CTX))
    with own.endless() as stream:
        next(stream)
        os.kill(own.engine("recital.gguf"), signal.SIGKILL)
        assert list(stream)[-1]["error"]["code"] == "generation_failed"
    now = eventually(lambda: (s := scrape(own)).of("recital", "shimmy_engine_deaths_total") and s, "the death is counted")
    assert now.of("recital", "vllm:request_success_total", finished_reason="error") == 1


STOPS_HERE = ("        self.main = Context(self, ", "        time.sleep(60)\n        self.main = Context(self, ")


def test_metrics_answer_at_once_while_a_model_loads(serve: Callable[..., Server], models: Path, tmp_path: Path) -> None:
    own = serve("--models-dir", models, script=altered(tmp_path, STOPS_HERE))
    with ThreadPoolExecutor() as pool:
        waiter = pool.submit(own.generate)
        now = eventually(lambda: (s := scrape(own)).of("recital", "vllm:num_requests_waiting") and s, "somebody waits")
        assert now("llamacpp:requests_deferred") == 1 and now.of("recital", "shimmy_model_loaded") == 0
        assert not waiter.done()
        own.unload("recital", "?force=true")


HI = {"messages": [{"role": "user", "content": "hi"}]}


@cases("method, path, body, route, api", {
    "chat": ("POST", "/v1/chat/completions", HI, "/v1/chat/completions", "openai"),
    "without v1": ("POST", "//chat/completions/", HI, "/chat/completions", "openai"),
    "messages": ("POST", "/v1/messages", {"model": "default", "max_tokens": 9, **HI}, "/v1/messages", "anthropic"),
    "own": ("POST", "/api/generate", {"model": "default", "prompt": ":"}, "/api/generate", "shimmy"),
    "Ollama's at the same address": ("POST", "/api/generate", {"model": "default", "prompt": ":", "raw": True, "stream": False},
                                     "/api/generate", "ollama"),
    "status of a model": ("GET", "/api/models/recital/status", None, "/api/models/{name}/status", "shimmy"),
    "HEAD": ("HEAD", "/props", None, "/props", "llama-server"),
    "metrics": ("GET", "/metrics?x=1", None, "/metrics", "shimmy"),
})  # fmt: skip
def test_requests_are_counted_by_route_and_api(method: str, path: str, body: Any, route: str, api: str, server: Server) -> None:
    labels = {"method": method, "route": route, "api": api, "status": "200"}
    before = scrape(server)("shimmy_requests_total", **labels)
    assert server.request(method, path, body).status == 200
    eventually(lambda: scrape(server)("shimmy_requests_total", **labels) > before, "it is counted")


def test_requests_over_websocket_are_counted(server: Server) -> None:
    labels = {"method": "WS", "route": "/ws/generate", "api": "shimmy", "status": "200"}
    before = scrape(server)("shimmy_requests_total", **labels)
    ws_ask(server, prompt=":")
    eventually(lambda: scrape(server)("shimmy_requests_total", **labels) == before + 1, "it is counted")


def test_what_clients_invent_makes_no_series(server: Server) -> None:
    def series() -> set[Any]:
        return {key for key in scrape(server).samples if key[0] != "shimmy_requests_total"}

    server.generate()
    before = series()
    for i in range(5):
        server.get(f"/made/up/{i}")
        server.generate(model=f"made-up-{i}")
        server.get(f"/api/models/made-up-{i}/status")
        exchange(server, head_of(f"MADE{i}", "/health"))
    now = scrape(server)
    assert series() == before and not [key for key in now.samples if re.search(r"(?i)made", str(key))]
    labels = {"method": "GET", "route": "other", "api": "shimmy", "status": "404"}
    eventually(lambda: scrape(server)("shimmy_requests_total", **labels) >= 5, "they are counted together")


HOSTILE = 'a"},x{b="\\c\\n\nd # HELP'


def test_hostile_model_name_is_escaped(serve: Callable[..., Server], tmp_path: Path) -> None:
    write_recital(tmp_path / "odd" / f"{HOSTILE}.gguf")
    os.rename(write_recital(tmp_path / "odd" / "raw.gguf"), os.fsencode(tmp_path) + b"/odd/z\xff.gguf")
    own = serve("--models-dir", tmp_path / "odd")
    ids = [id for id in own.ids() if id not in ("default", "shimmy-tiny")]
    for id in ids:
        assert own.generate(model=id, max_tokens=1).status == 200, id
    names = {s.labels["model_name"] for s in scrape(own).families["vllm:generation_tokens"].samples}
    assert names == set(ids) and len(ids) == 2 and any('"' in id and "\\" in id for id in ids)


def test_labels_are_escaped_as_the_format_wants() -> None:
    assert module.sample_line("x", {"a": 'b\\c"d\ne\udcff'}, 1) == r'x{a="b\\c\"d\ne\\udcff"} 1'


def test_value_on_a_buckets_bound_is_in_it() -> None:
    histogram = module.Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        histogram.add(value)
    assert histogram.counts == [2, 2, 1]


def test_counting_loses_nothing_among_threads() -> None:
    meter, metrics = module.Meter(), module.Metrics()

    def work(_: int) -> None:
        job = module.Timing(0.0, True)
        for _ in range(2000):
            meter.piece(job, 1)
            metrics.answered("GET", "/", "shimmy", 200)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert meter.generated_tokens == sum(meter.first_token.counts) + sum(meter.gap.counts) == 8000
    assert metrics.answers() == {("GET", "/", "shimmy", "200"): 8000}


def test_connections_are_counted(serve: Callable[..., Server], models: Path) -> None:
    own = serve("--models-dir", models)
    with own.ws(), socket.create_connection((own.host, own.port)):
        eventually(lambda: scrape(own)("shimmy_open_connections") == 3, "an upgraded one, an idle one, and the scrape's")
    eventually(lambda: scrape(own)("shimmy_open_connections") == 1, "they are closed")
    assert scrape(own)("shimmy_connections_total") > 3


# topic: request ids


def assert_id(reply: Any, id: str | None = None) -> str:
    """Both spellings of the header, once; returns the id."""
    found = [*reply.headers.get_all("X-Request-Id", []), *reply.headers.get_all("request-id", [])]
    assert len(found) == 2 and found[0] == found[1] and id in (None, found[0])
    return found[0]


ANSWERS: dict[str, tuple[str, str, Any]] = {
    "plain": ("GET", "/health", None),
    "HEAD": ("HEAD", "/health", None),
    "own": ("POST", "/api/generate", {"model": "default", "prompt": ":"}),
    "own streamed": ("POST", "/api/generate", {"model": "default", "prompt": ":", "stream": True}),
    "OpenAI": ("POST", "/v1/chat/completions", HI),
    "OpenAI streamed": ("POST", "/v1/chat/completions", {**HI, "stream": True}),
    "Anthropic's error": ("POST", "/v1/messages", {}),
    "Ollama streamed": ("POST", "/api/chat", {"model": "default", **HI}),
    "no route": ("GET", "/nowhere", None),
    "wrong method": ("PUT", "/health", None),
    "no JSON": ("POST", "/completion", b"{"),
    "preflight": ("OPTIONS", "/v1/models", None),
    "no upgrade": ("GET", "/ws/generate", None),
    "metrics": ("GET", "/metrics", None),
}


@cases("method, path, body", ANSWERS)
def test_every_answer_carries_the_clients_id(method: str, path: str, body: Any, server: Server) -> None:
    assert_id(server.request(method, path, body, {"X-Request-Id": "trace-7/ä".encode("ascii", "ignore").decode()}), "trace-7/")


@cases("method, path, body", ANSWERS)
def test_every_answer_has_an_id_of_its_own(method: str, path: str, body: Any, server: Server) -> None:
    ids = {assert_id(server.request(method, path, body)) for _ in range(3)}
    assert len(ids) == 3 and all(re.fullmatch(r"[0-9a-f]{16}", id) for id in ids)


@cases("sent", {
    "empty": b"", "too long": b"x" * 129, "space inside": b"a b", "not ASCII": "ä".encode(), "tab": b"a\tb",
})  # fmt: skip
def test_id_that_is_not_sane_is_replaced(sent: bytes, server: Server) -> None:
    (reply,) = exchange(server, head_of("GET", "/health").replace(b"\r\n\r\n", b"\r\nX-Request-Id: " + sent + b"\r\n\r\n"))
    assert reply.status == 200 and re.fullmatch(r"[0-9a-f]{16}", assert_id(reply))


def test_longest_sane_id_is_taken(server: Server) -> None:
    id = "".join(chr(c) for c in range(33, 127)) + "x" * 34
    assert_id(server.get("/health", **{"X-Request-Id": id}), id)


def test_requests_of_one_connection_have_their_own_ids(server: Server) -> None:
    first, second, third = exchange(server, head_of("GET", "/health", "X-Request-Id: mine"), *[head_of("GET", "/health")] * 2)
    assert len({assert_id(first, "mine"), assert_id(second), assert_id(third)}) == 3


@cases("head", {"no HTTP": b"nonsense\r\n\r\n", "bad header": b"GET / HTTP/1.1\r\nHost : x\r\n\r\n"})
def test_malformed_request_is_answered_with_an_id(head: bytes, server: Server) -> None:
    (reply,) = exchange(server, head)
    assert reply.status == 400 and assert_id(reply)


def test_connection_refused_at_the_door_has_an_id_and_is_counted(
    serve: Callable[..., Server], models: Path, tmp_path: Path
) -> None:
    own = serve("--models-dir", models, script=altered(tmp_path, ("MAX_CONNECTIONS = 1024", "MAX_CONNECTIONS = 1")))
    with socket.create_connection((own.host, own.port)) as first:
        first.sendall(head_of("GET", "/health"))
        assert read_reply(first).status == 200
        with socket.create_connection((own.host, own.port), timeout=HANG) as second:
            reply = read_reply(second)
        assert reply.status == 503 and assert_id(reply)
        first.sendall(head_of("GET", "/metrics"))
        assert Scraped(read_reply(first).body.decode())("shimmy_connections_refused_total") == 1


def test_pages_may_read_the_id(server: Server) -> None:
    reply = server.get("/health", Origin="http://localhost:3000")
    assert {"x-request-id", "request-id"} <= set(reply.headers["Access-Control-Expose-Headers"].lower().split(", "))


def test_upgrade_and_refused_upgrade_carry_the_clients_id(server: Server) -> None:
    with server.ws(additional_headers={"X-Request-Id": "ws-1"}) as ws:
        assert ws.response and ws.response.headers["X-Request-Id"] == "ws-1" == ws.response.headers["request-id"]
    key = ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {'A' * 22}=="]
    (reply,) = exchange(server, head_of("GET", "/ws/generate", *key, "Origin: https://evil.example", "X-Request-Id: ws-2"))
    assert reply.status == 403
    assert_id(reply, "ws-2")


def test_log_line_has_the_id(serve: Callable[..., Server], models: Path) -> None:
    own = serve("-v", "--models-dir", models)
    own.post("/api/generate", {"model": "default", "prompt": ":"}, **{"X-Request-Id": "trace-1"})
    with own.ws(additional_headers={"X-Request-Id": "trace-2"}) as ws:
        ws.send(json.dumps({"model": "default", "prompt": ":", "max_tokens": 1}))
        ws.recv(HANG)
    lines = r"POST /api/generate 200 .*, id trace-1\n(.|\n)*WS /ws/generate 200 .*, id trace-2\n"
    assert eventually(lambda: re.search(lines, own.log.read_text()), "the lines are written")


def test_failure_is_logged_with_its_id_without_v(serve: Callable[..., Server], models: Path) -> None:
    own = serve("--models-dir", models)
    body = {"model": "hollow", "prompt": "private words"}
    reply = own.post("/api/generate", body, **{"X-Request-Id": "trace-3"})
    assert_error(reply, 500, "generation_failed")
    log = eventually(lambda: "trace-3" in (text := own.log.read_text()) and text, "the failure is logged")
    assert re.search(r"POST /api/generate failed, id trace-3: .*hollow", log) and "private" not in log


def test_traceback_is_logged_with_its_id(serve: Callable[..., Server], models: Path, tmp_path: Path) -> None:
    script = altered(tmp_path, ('    return Answer(call.service.diag())', '    raise ZeroDivisionError("oops")'))
    own = serve("--models-dir", models, script=script)
    assert_error(own.get("/diag", **{"X-Request-Id": "trace-4"}), 500, "server_error")
    assert re.search(r"GET /diag failed, id trace-4\nTraceback(.|\n)*oops", own.log.read_text())


@pytest.fixture
def kept_id(server: Server) -> Iterator[dict[str, str]]:
    yield {"X-Request-Id": "sdk-1"}


def test_openai_package_reads_the_id(server: Server, kept_id: dict[str, str]) -> None:
    client, said = server.client(), [{"role": "user", "content": "hi"}]
    answer = client.chat.completions.create(model="recital", messages=said, extra_headers=kept_id)  # type: ignore[arg-type]
    assert answer._request_id == "sdk-1" and answer.choices[0].message.content == TEXTS[":"]
    with pytest.raises(Exception, match="model") as caught:
        client.chat.completions.create(model="nobody", messages=said, extra_headers=kept_id)  # type: ignore[arg-type]
    assert caught.value.request_id == "sdk-1"  # type: ignore[attr-defined]


def test_anthropic_package_reads_the_id(server: Server, kept_id: dict[str, str]) -> None:
    client, fields = anthropic_client(server), {"max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
    assert client.messages.create(model="recital", extra_headers=kept_id, **fields)._request_id == "sdk-1"
    with client.messages.stream(model="recital", extra_headers=kept_id, **fields) as stream:
        assert stream.request_id == "sdk-1"
    with pytest.raises(Exception, match="nobody") as caught:
        client.messages.create(model="nobody", extra_headers=kept_id, **fields)
    assert caught.value.request_id == "sdk-1"  # type: ignore[attr-defined]
