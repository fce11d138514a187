# ruff: noqa: F811  the fixtures are imported until this is part of test_shimmy.py
from __future__ import annotations

from pathlib import Path

from new_tests_shell import REPO_NAME, FakeHub, hub, quick  # noqa: F401
from test_shimmy import assert_failed, cases, shimmy

# topic: pull

NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_secret"}


@cases("place", {"no IPv6 address": "http://[bad/x.gguf", "no such port": "http://127.0.0.1:99999/x.gguf",
                 "no host": "http:///x.gguf"})  # fmt: skip
def test_pull_of_an_impossible_address_fails_in_one_line(place: str, tmp_path: Path) -> None:
    assert_failed(shimmy("pull", place, home=tmp_path, env=NOWHERE), 1, "is no model to fetch")


@cases("place", {"no IPv6 address": "http://[bad/x.gguf", "no such port": "http://127.0.0.1:99999/x.gguf"})
def test_pull_refuses_a_redirect_to_an_impossible_address(place: str, hub: FakeHub, tmp_path: Path) -> None:
    hub.answers = [(302, {"Location": place})]
    assert_failed(shimmy("pull", f"{hub.cdn}/x.gguf", home=tmp_path, env=NOWHERE), 1, "redirects to", "refused")


@cases("endpoint", {"no scheme": "huggingface.co", "a file": "file:///etc", "no host": "http://[x"})
def test_pull_from_an_endpoint_that_is_no_address_fails_in_one_line(endpoint: str, tmp_path: Path) -> None:
    done = shimmy("pull", REPO_NAME, home=tmp_path, env={"HF_ENDPOINT": endpoint})
    assert_failed(done, 1, "HF_ENDPOINT", "write an address")


@cases("length", {"no digits": "²", "hundreds of digits": "9" * 400, "more than Python reads": "9" * 5000})
def test_pull_of_a_file_of_impossible_size_fails_in_one_line(length: str, hub: FakeHub, tmp_path: Path) -> None:
    hub.answers = [(200, {"Content-Length": length})]
    hub.answer_file = lambda request: request.reply(200, {}, b"GGUF")  # type: ignore[method-assign]
    assert_failed(shimmy("pull", f"{hub.cdn}/x.gguf", home=tmp_path, env=NOWHERE), 1, "")


@cases("size", {"negative": -5, "huge": 10**400})
def test_pull_ignores_files_of_impossible_size(size: int, hub: FakeHub, tmp_path: Path) -> None:
    hub.sizes["recital-q4_k_m.gguf"] = size
    done = shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env)
    assert done.returncode == 0 and done.stdout.endswith(b"recital-q8_0.gguf\n"), done.stderr


def test_a_search_nested_without_end_offers_no_near_names(hub: FakeHub, tmp_path: Path) -> None:
    hub.answer_api = lambda request: request.reply(*(  # type: ignore[method-assign]
        (200, {}, b"[" * 100_000) if "search" in request.path else (404, {})))  # fmt: skip
    assert_failed(shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env), 1, "there is no")


@cases("date", {"long ago": "Mon, 01 Jan 0001 00:00:00 -0000", "far away": "Mon, 01 Jan 2026 00:00:00 +99999999999999"})
def test_pull_waits_its_own_time_when_a_server_names_an_impossible_date(
    date: str, hub: FakeHub, quick: Path, tmp_path: Path
) -> None:
    hub.answers = [(503, {"Retry-After": date})]
    assert shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env, script=quick).returncode == 0


def test_a_file_server_that_refuses_does_not_make_its_repository_gated(hub: FakeHub, tmp_path: Path) -> None:
    hub.answer_file = lambda request: request.reply(403, {})  # type: ignore[method-assign]
    done = shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env)
    assert done.returncode == 1 and b"answers 403" in done.stderr and b"gated" not in done.stderr
