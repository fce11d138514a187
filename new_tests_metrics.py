"""New tests of branch metrics: /metrics and request ids."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect as ws_connect

import shimmy as module
from test_shimmy import (
    BERT,
    HANG,
    LONG_CTX,
    REPO,
    SHIMMY,
    TEXTS,
    Server,
    altered,
    anthropic_client,
    assert_error,
    cases,
    environment,
    eventually,
    exchange,
    guarded,
    head_of,
    linux,
    models,
    read_reply,
    serve,
    server,
    shared,
    shimmy,
    tool_root,
    write_recital,
    ws_answer,
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
                "vllm:prefix_cache_queries", "vllm:prefix_cache_hits", "vllm:request_success",
                "shimmy_requests", "shimmy_model_loads", "shimmy_model_load_failures",
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
    "Ollama's embeddings": ("POST", "/api/embed", {"model": "default", "input": "hi"}, "/api/embed", "ollama"),
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


# topic: readme

README = (REPO / "README.md").read_text()
BLOCKS = re.findall(r"(?ms)^```(\w+)\n(.*?)^```$", README)
PENDING = {"models/page.png"}  # branch page makes it


def blocks_of(*languages: str) -> list[str]:
    return [text for language, text in BLOCKS if language in languages]


def first_line(block: str) -> str:
    return block.splitlines()[0][:60]


def check_command_lines(block: str) -> None:
    """Asserts that shimmy understands its command lines in a block, and that pip is asked for what the script needs."""
    joined = block.replace("\\\n", " ")
    for line in joined.splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["pip", "install"]:
            script = SHIMMY.read_text()
            assert all(f'"{w}"' in script for w in words if re.match(r"[a-z-]+>=", w)) and "--prefer-binary" in words
        elif len(words) > 1 and words[1] == "shimmy.py":
            module.parser().parse_args(words[2:])


def check_make(block: str) -> None:
    """Asserts that make knows the target."""
    target = block.split()[1]
    assert subprocess.run(["make", "-n", target], cwd=REPO, capture_output=True, check=False).returncode == 0


def check_docker(block: str) -> None:
    """Asserts that the flags are those of the container file."""
    (file,) = blocks_of("dockerfile")
    assert f"EXPOSE {module.DEFAULT_PORT}" in file and f"{module.DEFAULT_PORT}:{module.DEFAULT_PORT}" in block
    assert "ENV SHIMMY_MODEL_PATHS=/models" in file and ":/models:ro" in block and "SHIMMY_API_KEY" in block


NOT_RUN: dict[str, tuple[str, Callable[[str], None]]] = {  # by a block's start: why it is not run, what is checked instead
    "make run": ("installs for minutes and then serves for ever", check_make),
    ".venv/bin/python shimmy.py pull": ("fetches from the network", check_command_lines),
    "pip install --prefer-binary": ("installs, and opens a browser", check_command_lines),
    "python shimmy.py pull": ("fetches from the network", check_command_lines),
    "docker build": ("needs docker's daemon and the network", check_docker),
}


def why_not_run(block: str) -> tuple[str, Callable[[str], None]] | None:
    return next((entry for start, entry in NOT_RUN.items() if block.startswith(start)), None)


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the model in the box, and a reranker; its home is a checkout as README's reader has it."""
    home = tmp_path_factory.mktemp("reader")
    (home / "models").mkdir()
    shutil.copy(REPO / "models" / "shimmy-tiny.gguf", home / "models")
    BERT.write(home / "models" / "reranker.gguf", pooling=4)
    shutil.copy(SHIMMY, home / "shimmy.py")
    (home / "notes.txt").write_text("The meeting is moved to Monday.\n")
    (home / "phrases.txt").write_text("Hello\nGood evening\n")
    person = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}}, "required": ["name"]}
    (home / "person.json").write_text(json.dumps(person))
    (home / "bin").mkdir()
    for name, command in {"python": sys.executable, "curl": f"{shutil.which('curl')} -sS --fail-with-body"}.items():
        (home / "bin" / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (home / "bin" / name).chmod(0o755)
    subprocess.run("git init -q && git add notes.txt && echo changed >> notes.txt", shell=True, cwd=home, check=True)
    with shared(home, "--models-dir", home / "models", "--model", "shimmy-tiny", script=home / "shimmy.py") as running:
        yield running


def as_reader(documented: Server, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command as README's reader does, but for the port."""
    env = environment(documented.home, {"SHIMMY_PORT": str(documented.port), "NO_PROXY": "*"})
    env["PATH"] = f"{documented.home / 'bin'}:{env['PATH']}"
    return subprocess.run(
        command, cwd=documented.home, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=HANG, check=False
    )


def served(block: str, server: Server) -> str:
    """The block for this server."""
    return block.replace(str(module.DEFAULT_PORT), str(server.port)).replace("RERANKER", "reranker")


@pytest.mark.parametrize("block", [b for b in blocks_of("sh", "console") if not why_not_run(b)], ids=first_line)
def test_readme_shell_lines_run(block: str, documented: Server) -> None:
    done = as_reader(documented, ["bash", "-euo", "pipefail", "-c", served(block, documented)])
    assert done.returncode == 0 and done.stdout.strip(), done
    assert '"error": {' not in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize("block", [b for b in blocks_of("sh", "console") if why_not_run(b)], ids=first_line)
def test_readme_shell_lines_that_are_not_run_are_understood(block: str) -> None:
    reason = why_not_run(block)
    assert reason
    reason[1](block)


@pytest.mark.parametrize("block", blocks_of("python"), ids=first_line)
def test_readme_python_runs(block: str, documented: Server) -> None:
    done = as_reader(documented, [sys.executable, "-c", served(block, documented)])
    assert done.returncode == 0 and not done.stderr, done
    assert done.stdout.strip() or "@tool" in block


def test_readme_blocks_name_their_language_and_none_is_left_out() -> None:
    known = {"sh", "python", "nginx", "ini", "dockerfile", "caddyfile"}
    assert {language for language, _ in BLOCKS} == known and README.count("\n```") == 2 * len(BLOCKS)
    for start in NOT_RUN:
        assert [b for b in blocks_of("sh") if b.startswith(start)], f"README no longer says {start!r}"


def test_readme_links_lead_somewhere() -> None:
    headings = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"(?m)^#+ (.+)$", README)}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http") and target not in PENDING:
            assert (REPO / target).is_file(), target


def test_readme_names_every_route() -> None:
    missing = [r.label() for r in module.ROUTES if r.label() not in README and f"/v1{r.label()}" not in README]
    assert [m for m in missing if not re.search(r"…|/unload$|/status$|^/$|reranking|models/\{name\}$", m)] == []


def test_readme_names_every_flag_of_serve() -> None:
    flags = set(re.findall(r"(?m)^ +(--[a-z-]+)", shimmy("serve", "--help", home=Path("/tmp")).stdout.decode()))
    assert {flag for flag in flags if flag not in README} <= {"--help"}


def test_readme_flags_exist() -> None:
    others = "prefer-binary extra-index-url url no-cache-dir no-install-recommends create-home now install"
    commands = ("serve", "generate", "list", "probe", "diag", "pull")
    help = "".join(shimmy(command, "--help", home=Path("/tmp")).stdout.decode() for command in commands)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - {f"--{name}" for name in others.split()}
    assert {flag for flag in named if not re.search(rf"{flag}\b", help)} == set()


def test_readme_systemd_unit_is_valid_and_starts(serve: Callable[..., Server], tmp_path: Path) -> None:
    (unit,) = blocks_of("ini")
    python, script, command, *flags = re.search(r"(?m)^ExecStart=(.+)$", unit)[1].split()  # type: ignore[index]
    assert command == "serve" and serve(*flags).get("/health").status == 200
    if shutil.which("systemd-analyze"):
        file = tmp_path / "shimmy.service"
        file.write_text(unit.replace(python, sys.executable).replace(script, str(SHIMMY)))
        done = subprocess.run(["systemd-analyze", "verify", file], capture_output=True, text=True, timeout=HANG, check=False)
        assert done.returncode == 0 and "shimmy.service" not in done.stderr, done.stderr


def test_readme_container_file_copies_what_is_there_and_its_entry_starts(serve: Callable[..., Server]) -> None:
    (file,) = blocks_of("dockerfile")
    lines = [line for line in file.replace("\\\n", " ").splitlines() if line]
    known = {"FROM", "RUN", "USER", "COPY", "ENV", "EXPOSE", "ENTRYPOINT"}
    assert {line.split()[0] for line in lines} == known and "COPY shimmy.py /app/" in lines
    check_command_lines(next(line.removeprefix("RUN ") for line in lines if "pip install" in line).replace("--no-cache-dir ", ""))
    entry = next(line for line in lines if line.startswith("ENTRYPOINT"))
    python, script, command, *flags = json.loads(entry.split(maxsplit=1)[1])
    assert (python, script, command) == ("python", "/app/shimmy.py", "serve")
    own = serve(*flags, env={"SHIMMY_API_KEY": "k"})
    assert own.get("/health").status == 200 and own.get("/v1/models").status == 401


def test_readme_caddyfile_names_the_server() -> None:
    """Not run: Caddy is in no package list here."""
    (file,) = blocks_of("caddyfile")
    assert file.count("{") == file.count("}") and f"reverse_proxy 127.0.0.1:{module.DEFAULT_PORT}" in file
    if shutil.which("caddy"):
        adapted = subprocess.run(["caddy", "adapt", "--config", "-", "--adapter", "caddyfile"], input=file.encode(), check=True)
        assert adapted.returncode == 0


# topic: nginx

nginx = pytest.mark.skipif(not shutil.which("nginx") or not shutil.which("openssl"), reason="nginx and openssl are not here")


@dataclass(frozen=True)
class Proxied:
    """The server behind nginx as README sets it up: TLS, another name, a key."""

    port: int
    context: ssl.SSLContext
    headers: dict[str, str]

    def connect(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection("127.0.0.1", self.port, context=self.context, timeout=HANG)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
        connection = self.connect()
        connection.request(method, path, body and json.dumps(body), {**self.headers, **headers})
        return connection.getresponse()


def nginx_files(folder: Path, port: int, upstream: int) -> Path:
    """README's configuration for ports of a test's own, and what surrounds it on a real machine."""
    certify = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=llm.example.com -days 2 -keyout privkey.pem -out fullchain.pem"
    subprocess.run(certify.split(), cwd=folder, check=True, capture_output=True)
    (block,) = blocks_of("nginx")
    own = block.replace("listen 443", f"listen 127.0.0.1:{port}").replace("/etc/letsencrypt/live/llm.example.com", str(folder))
    own = own.replace(str(module.DEFAULT_PORT), str(upstream))
    temporary = "".join(f"{name}_temp_path {folder / name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(f"{user} daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
                                       f"http {{ access_log off; {temporary}\n{own}\n}}")  # fmt: skip
    return folder / "nginx.conf"


@pytest.fixture(scope="module")
def proxied(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    home, folder = tmp_path_factory.mktemp("behind"), tmp_path_factory.mktemp("nginx")
    host = "llm.example.com"
    flags = ["--allow-host", host, "--allow-origin", f"https://{host}", "--api-key", "k", "--ctx", str(LONG_CTX)]
    assert f"serve {' '.join(flags[:4])}" in README
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with shared(home, "--models-dir", models, "--model", "recital", *flags) as server:
        process = subprocess.Popen(["nginx", "-c", nginx_files(folder, port, server.port), "-p", folder], stderr=subprocess.PIPE)
        context = ssl.create_default_context(cafile=folder / "fullchain.pem")
        context.check_hostname = False
        found = Proxied(port, context, {"Host": host, "Authorization": "Bearer k", "Origin": f"https://{host}"})

        def answers() -> bool:
            with contextlib.suppress(ConnectionError):
                return found.request("GET", "/health").status == 200
            return False

        try:
            eventually(answers, "nginx answers")
            yield found
        finally:
            process.terminate()
            process.wait(HANG)


@nginx
@cases("path, body", {
    "SSE": ("/api/generate", {"model": "recital", "prompt": "#", "max_tokens": LONG_CTX, "stream": True}),
    "NDJSON": ("/api/chat", {"model": "recital", "messages": [{"role": "user", "content": "forever"}],
                             "options": {"num_predict": LONG_CTX}}),
})  # fmt: skip
def test_streams_come_piece_by_piece_through_nginx(path: str, body: dict[str, Any], proxied: Proxied) -> None:
    """The stream never ends by itself: what is read here has not waited for its end."""
    response = proxied.request("POST", path, body)
    assert response.status == 200
    assert b"ick" in response.readline() + response.readline() + response.readline()
    response.close()


@nginx
def test_websocket_passes_nginx(proxied: Proxied) -> None:
    options: Any = {"ssl": proxied.context, "proxy": None, "origin": proxied.headers["Origin"], "open_timeout": HANG,
                    "additional_headers": {"Authorization": "Bearer k"}}  # fmt: skip
    with socket.create_connection(("127.0.0.1", proxied.port)) as sock, ws_connect(
        "wss://llm.example.com/ws/generate", sock=sock, **options
    ) as ws:
        ws.send(json.dumps({"model": "recital", "prompt": "#", "max_tokens": LONG_CTX}))
        assert "ick" in json.loads(ws.recv(HANG))["token"]
        ws.send(json.dumps({"cancel": True}))
        assert ws_answer(ws)[1]["finish_reason"] == "cancelled"


@nginx
def test_keys_hosts_origins_and_ids_hold_behind_nginx(proxied: Proxied) -> None:
    assert proxied.request("GET", "/v1/models", **{"X-Request-Id": "edge-1"}).headers["X-Request-Id"] == "edge-1"
    assert proxied.request("GET", "/v1/models", Authorization="").status == 401
    assert proxied.request("GET", "/v1/models", Origin="https://evil.example").status == 403


@nginx
def test_large_bodies_pass_nginx(proxied: Proxied) -> None:
    body = {"model": "recital", "prompt": ":", "unknown": "a" * 15_000_000}
    assert proxied.request("POST", "/api/generate", body).status == 200
