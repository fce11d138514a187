# ruff: noqa: F811  the fixtures are imported until this is part of test_shimmy.py
from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import shimmy as module
from test_shimmy import (  # noqa: F401
    HANG,
    SHIMMY,
    TEXTS,
    Server,
    altered,
    assert_failed,
    assert_ollama_error,
    cases,
    environment,
    eventually,
    interruptible,
    models,
    pty,
    serve,
    server,
    shimmy,
    slow_load,
    terminal,
    tool_root,
    write_header,
    write_recital,
)

# topic: pull
# Fetches from a hub in this process: its own port answers the API and redirects, another port has the files.

COMMIT = "c0ffee" * 6 + "c0ff"
REPO_NAME = "tester/Recital-GGUF"
QUICK = ("PULL_RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)", "PULL_RETRY_SECONDS = (0.01, 0.01, 0.01)")


class FakeHub:
    """A hub with one repository; tests change what it does."""

    def __init__(self) -> None:
        self.repo = REPO_NAME
        self.files: dict[str, bytes] = {}
        self.names: list[Any] = []  # more names in the list, whatever they are
        self.sizes: dict[str, int] = {}  # instead of the true ones
        self.cuts: list[float] = []  # each download ends at this part of the file
        self.answers: list[tuple[int, dict[str, str]]] = []  # what the next requests get instead
        self.token = self.error_code = ""
        self.gated = self.ignores_range = self.spoils = False
        self.hold = threading.Event()  # downloads wait in their middle until it is set
        self.hold.set()
        self.seen: list[tuple[str, str, dict[str, str]]] = []  # whose port, path, headers
        self._servers = [self._listen(name) for name in ("hub", "cdn")]
        self.url, cdn = (f"http://127.0.0.1:{each.server_address[1]}" for each in self._servers)
        self.cdn = cdn.replace("127.0.0.1", "localhost")
        self.env = {"HF_ENDPOINT": self.url}

    def _listen(self, name: str) -> http.server.ThreadingHTTPServer:
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.seen.append((name, self.path, dict(self.headers)))
                if hub.answers:
                    return self.reply(*hub.answers.pop(0))
                (hub.answer_api if name == "hub" else hub.answer_file)(self)

            def reply(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        return running

    def close(self) -> None:
        self.hold.set()
        for each in self._servers:
            each.shutdown()
            each.server_close()

    def answer_api(self, request: Any) -> None:
        path = urlsplit(request.path).path
        if path == "/api/models":
            return request.reply(200, {}, json.dumps([{"id": REPO_NAME}, {"id": "x/../y"}]).encode())
        if self.repo not in path:
            return request.reply(401, {"X-Error-Code": "RepoNotFound"})
        allowed = not self.gated or request.headers.get("Authorization") == f"Bearer {self.token}"
        if path.startswith("/api/models/"):
            return request.reply(200, {}, json.dumps(self.listing()).encode())
        if not allowed:
            return request.reply(403 if request.headers.get("Authorization") else 401, {"X-Error-Code": "GatedRepo"})
        request.reply(302, {"Location": f"{self.cdn}/{path.partition(COMMIT)[2].strip('/')}"})

    def listing(self) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = [{"rfilename": "README.md", "size": 3, "blobId": "1" * 40}]
        for name, data in self.files.items():
            size, digest = self.sizes.get(name, len(data)), hashlib.sha256(data).hexdigest()
            siblings.append({"rfilename": name, "size": size, "blobId": "2" * 40, "lfs": {"sha256": digest, "size": size}})
        siblings += [{"rfilename": n, "size": 1, "lfs": {"sha256": "a" * 64}} for n in self.names]
        return {"sha": COMMIT, "siblings": siblings}

    def answer_file(self, request: Any) -> None:
        data = self.files[unquote(urlsplit(request.path).path).strip("/")]
        start = int((re.match(r"bytes=(\d+)-", request.headers.get("Range") or "") or (0, 0))[1])
        start = 0 if self.ignores_range else start
        status, headers = 200, {"Content-Length": str(len(data) - start), "ETag": '"v1"'}
        if start:
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(data) - 1}/{len(data)}"
        sent = data[start : int(self.cuts.pop(0) * len(data))] if self.cuts else data[start:]
        sent = bytes(len(sent)) if self.spoils else sent
        request.close_connection = len(sent) < len(data) - start
        half = len(sent) // 2
        request.reply(status, headers, sent[:half])
        self.hold.wait(HANG)
        request.wfile.write(sent[half:])

    def downloads(self) -> list[dict[str, str]]:
        return [headers for port, _, headers in self.seen if port == "cdn"]


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    running = FakeHub()
    running.files = {"recital-q4_k_m.gguf": os.urandom(400_000), "recital-q8_0.gguf": os.urandom(500_000)}
    yield running
    running.close()


@pytest.fixture
def quick(tmp_path: Path) -> Path:
    """A shimmy.py that waits only briefly before it tries again."""
    return altered(tmp_path, QUICK)


def cache(home: Path) -> Path:
    return home / ".cache" / "huggingface" / "hub" / f"models--{REPO_NAME.replace('/', '--')}"


def fetched(home: Path, name: str) -> bytes:
    return (cache(home) / "snapshots" / COMMIT / name).read_bytes()


def parts(home: Path) -> list[Path]:
    return list((cache(home) / "blobs").glob("*.incomplete"))


def test_pull_lays_files_out_as_the_hubs_cache(hub: FakeHub, tmp_path: Path) -> None:
    done = shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env)
    data, place = hub.files["recital-q4_k_m.gguf"], cache(tmp_path) / "snapshots" / COMMIT / "recital-q4_k_m.gguf"
    assert (done.returncode, done.stdout.decode()) == (0, f"{place}\n"), done.stderr
    assert os.readlink(place) == f"../../blobs/{hashlib.sha256(data).hexdigest()}" and place.read_bytes() == data
    assert (cache(tmp_path) / "refs" / "main").read_text() == COMMIT and not parts(tmp_path)


def test_pulled_model_is_found_by_huggingface_hub(hub: FakeHub, tmp_path: Path) -> None:
    library = pytest.importorskip("huggingface_hub")
    shimmy("pull", f"{REPO_NAME}:Q8_0", home=tmp_path, env=hub.env)
    folder = cache(tmp_path).parent
    found = library.hf_hub_download(REPO_NAME, "recital-q8_0.gguf", cache_dir=folder, local_files_only=True)
    assert Path(found).read_bytes() == hub.files["recital-q8_0.gguf"]
    scan = library.scan_cache_dir(folder)
    (repo,) = scan.repos
    assert not scan.warnings and repo.repo_id == REPO_NAME and repo.nb_files == 1
    assert next(iter(repo.revisions)).refs == {"main"}


def test_pull_ends_with_the_next_command(hub: FakeHub, tmp_path: Path) -> None:
    done = shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env)
    assert 'generate recital-q4-k-m "Hello"' in done.stderr.decode()
    assert "there are also Q8_0 (488KB)" in done.stderr.decode()


def offered(*names: str) -> list[module.Offer]:
    return module.offers_of(module.RemoteFile(name, "", 1) for name in names)


@cases(
    "names,part,chosen",
    {
        "the usual one": (["m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-Q2_K.gguf"], "", "m-Q4_K_M.gguf"),
        "its small sister": (["m-Q4_0.gguf", "m-Q4_K_S.gguf", "m-Q5_K_M.gguf"], "", "m-Q4_K_S.gguf"),
        "five bits rather than three": (["m-Q3_K_M.gguf", "m-Q5_K_M.gguf"], "", "m-Q5_K_M.gguf"),
        "eight rather than sixteen": (["m-f16.gguf", "m-Q8_0.gguf"], "", "m-Q8_0.gguf"),
        "one without a name": (["model.gguf"], "", "model.gguf"),
        "Ollama's latest": (["m-Q8_0.gguf", "m-Q4_K_M.gguf"], "latest", "m-Q4_K_M.gguf"),
        "named in another case": (["m-Q8_0.gguf", "m-Q4_K_M.gguf"], "q8_0", "m-Q8_0.gguf"),
        "by its end": (["m-UD-Q4_K_XL.gguf", "m-Q4_K_M.gguf"], "UD-Q4_K_XL", "m-UD-Q4_K_XL.gguf"),
        "by its file": (["a.Q4_0.gguf", "b.Q4_0.gguf"], "b.Q4_0.gguf", "b.Q4_0.gguf"),
        "by its folder": (["Q8_0/m.gguf", "F16/m.gguf"], "F16", "F16/m.gguf"),
        "no projector": (["mmproj-m-Q4_K_M.gguf", "m-Q8_0.gguf"], "", "m-Q8_0.gguf"),
    },
)
def test_pull_chooses_a_quantization(names: list[str], part: str, chosen: str) -> None:
    offer = module.choose_offer(offered(*names), part)
    assert offer and [file.name for file in offer.files] == [chosen]


def test_pull_offers_no_shards_that_are_not_all_there() -> None:
    assert [offer.stem for offer in offered("a-00001-of-00002.gguf", "b-00001-of-00001.gguf", "mmproj.gguf")] == ["b"]


def test_pull_fetches_every_shard(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {f"Q4_K_M/big-0000{i}-of-00003.gguf": os.urandom(1000 + i) for i in (1, 2, 3)}
    done = shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env)
    assert done.stdout.decode().endswith("Q4_K_M/big-00001-of-00003.gguf\n"), done.stderr
    assert all(fetched(tmp_path, name) == data for name, data in hub.files.items())


def test_pull_sends_the_token_to_the_hub_only(hub: FakeHub, tmp_path: Path) -> None:
    done = shimmy("pull", REPO_NAME, home=tmp_path, env={**hub.env, "HF_TOKEN": "hf_secret"})
    sent = {(port, headers.get("Authorization")) for port, _, headers in hub.seen}
    assert done.returncode == 0 and sent == {("hub", "Bearer hf_secret"), ("cdn", None)}


def test_pull_reads_the_token_that_hf_auth_login_wrote(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "token").write_text("hf_stored\n")
    hub.gated, hub.token = True, "hf_stored"
    assert shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env).returncode == 0


@cases("token", {"none": "", "another account's": "hf_other"})
def test_pull_of_a_gated_repository_says_where_its_licence_is(token: str, hub: FakeHub, tmp_path: Path) -> None:
    hub.gated, hub.token = True, "hf_right"
    done = shimmy("pull", REPO_NAME, home=tmp_path, env={**hub.env, "HF_TOKEN": token})
    error = done.stderr.decode().splitlines()[-1]
    assert done.returncode == 1 and f"accept its licence at {hub.url}/{REPO_NAME}" in error and "HF_TOKEN" in error


def test_pull_of_an_unknown_repository_offers_near_names(hub: FakeHub, tmp_path: Path) -> None:
    done = shimmy("pull", "tester/Recitel-GGUF", home=tmp_path, env=hub.env)
    assert_failed(done, 1, "there is no tester/Recitel-GGUF", "HF_TOKEN", f"did you mean {REPO_NAME}?")


def test_pull_of_an_unknown_quantization_names_those_that_are_there(hub: FakeHub, tmp_path: Path) -> None:
    assert_failed(shimmy("pull", f"{REPO_NAME}:Q5_0", home=tmp_path, env=hub.env), 1, "no Q5_0", "Q4_K_M (391KB)", "Q8_0")


def test_pull_of_a_repository_without_gguf_says_so(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {"model.safetensors": b"x"}
    assert_failed(shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env), 1, "no GGUF model", "-GGUF")


@cases("name", {"no slash": "recital", "a path up": "../x", "dots": "a/..", "empty": "", "file": "file:///etc/passwd"})
def test_pull_of_what_is_no_name_fails_in_one_line(name: str, tmp_path: Path) -> None:
    assert_failed(shimmy("pull", name, home=tmp_path, env={"HF_ENDPOINT": "http://127.0.0.1:9"}), 1, "OWNER/REPO")


@cases("cut", {"early": [0.3], "late": [0.99], "often": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]})
def test_pull_goes_on_after_the_connection_was_cut(cut: list[float], hub: FakeHub, quick: Path, tmp_path: Path) -> None:
    hub.cuts = list(cut)
    done = shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env, script=quick)
    assert done.returncode == 0 and fetched(tmp_path, "recital-q4_k_m.gguf") == hub.files["recital-q4_k_m.gguf"]
    assert [headers.get("Range") for headers in hub.downloads()] == [None, *(f"bytes={int(c * 400_000)}-" for c in cut)]


def test_pull_that_failed_is_continued_by_the_next(hub: FakeHub, quick: Path, tmp_path: Path) -> None:
    hub.cuts = [0.5, 0.0, 0.0, 0.0]
    cut = shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env, script=quick)
    assert_failed_last(cut, "pull again to go on", "195KB of 391KB")
    assert [part.stat().st_size for part in parts(tmp_path)] == [200_000]
    done = shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env)
    assert done.returncode == 0 and hub.downloads()[-1]["Range"] == "bytes=200000-"
    assert "195KB still to fetch" in done.stderr.decode()
    assert fetched(tmp_path, "recital-q4_k_m.gguf") == hub.files["recital-q4_k_m.gguf"] and not parts(tmp_path)


def assert_failed_last(done: subprocess.CompletedProcess[bytes], *words: str) -> None:
    """Asserts exit code 1 and that the last line on stderr contains the words."""
    message = done.stderr.decode()
    assert done.returncode == 1 and done.stdout == b"" and "Traceback" not in message
    assert all(word in message.splitlines()[-1] for word in words), message


def test_pull_begins_anew_where_the_server_ignores_ranges(hub: FakeHub, quick: Path, tmp_path: Path) -> None:
    hub.ignores_range, hub.cuts = True, [0.3]
    assert shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env, script=quick).returncode == 0
    assert fetched(tmp_path, "recital-q4_k_m.gguf") == hub.files["recital-q4_k_m.gguf"]


def test_pull_removes_what_has_the_wrong_checksum(hub: FakeHub, tmp_path: Path) -> None:
    hub.spoils = True
    assert_failed_last(shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env), "SHA-256 is wrong")
    assert list((cache(tmp_path) / "blobs").iterdir()) == [] and not (cache(tmp_path) / "refs").exists()


def test_pull_waits_as_long_as_a_busy_hub_asks_for(hub: FakeHub, tmp_path: Path) -> None:
    hub.answers = [(429, {"Retry-After": "2"})]
    began = time.monotonic()
    assert shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env).returncode == 0
    assert time.monotonic() - began >= 2


def test_pull_gives_up_where_the_hub_asks_for_an_hour(hub: FakeHub, tmp_path: Path) -> None:
    hub.answers = [(429, {"Retry-After": "3600"})]
    assert_failed(shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env), 1, "429", "3600 s")


def test_pull_of_a_file_larger_than_the_disk_does_not_begin(hub: FakeHub, tmp_path: Path) -> None:
    hub.sizes["recital-q4_k_m.gguf"] = 1 << 60
    assert_failed_last(shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env), "disk is too small", "1073741824.0GB")
    assert not hub.downloads()


def test_pull_of_another_size_than_the_hub_states_fails(hub: FakeHub, tmp_path: Path) -> None:
    hub.sizes["recital-q4_k_m.gguf"] = 300_000
    assert_failed_last(shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env), "400000 bytes, not 300000")


def test_pull_dry_run_fetches_nothing(hub: FakeHub, tmp_path: Path) -> None:
    done = shimmy("pull", REPO_NAME, "--dry-run", home=tmp_path, env=hub.env)
    assert done.returncode == 0 and not hub.downloads() and not cache(tmp_path).exists()
    for word in (f"{REPO_NAME}:Q4_K_M: 391KB", "recital-q4_k_m.gguf", "fits the memory", "Q8_0 (488KB)", str(cache(tmp_path))):
        assert word in done.stdout.decode()


def test_pull_dry_run_says_that_a_model_does_not_fit_the_memory(hub: FakeHub, tmp_path: Path) -> None:
    hub.sizes["recital-q4_k_m.gguf"] = 1 << 50
    assert b"does not fit the memory" in shimmy("pull", REPO_NAME, "--dry-run", home=tmp_path, env=hub.env).stdout


def test_pull_of_what_is_here_asks_only_the_list(hub: FakeHub, tmp_path: Path) -> None:
    shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env)
    before = len(hub.downloads())
    done = shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env)
    assert done.returncode == 0 and b"is here already" in done.stderr and len(hub.downloads()) == before


def start(*args: str, home: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(SHIMMY), *args]
    return subprocess.Popen(
        command, cwd=home, env=environment(home, env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=interruptible
    )


def test_two_pulls_of_one_file_fetch_it_once(hub: FakeHub, tmp_path: Path) -> None:
    hub.hold.clear()
    running = [start("pull", REPO_NAME, home=tmp_path, env=hub.env) for _ in range(2)]
    eventually(lambda: len([path for _, path, _ in hub.seen if path.startswith("/api/")]) == 2, "both have asked")
    eventually(hub.downloads, "one fetches")
    time.sleep(0.5)
    hub.hold.set()
    done = [(each.communicate(timeout=HANG), each.returncode) for each in running]
    assert [code for _, code in done] == [0, 0], done
    assert len(hub.downloads()) == 1 and fetched(tmp_path, "recital-q4_k_m.gguf") == hub.files["recital-q4_k_m.gguf"]


def test_ctrl_c_leaves_a_part_that_the_next_pull_continues(hub: FakeHub, tmp_path: Path) -> None:
    hub.hold.clear()
    with start("pull", REPO_NAME, home=tmp_path, env=hub.env) as running:
        eventually(lambda: [part for part in parts(tmp_path) if part.stat().st_size == 200_000], "half of it is here")
        running.send_signal(signal.SIGINT)
        _, stderr = running.communicate(timeout=HANG)
    assert running.returncode == -signal.SIGINT and b"Traceback" not in stderr
    hub.hold.set()
    assert shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env).returncode == 0
    assert hub.downloads()[-1]["Range"] == "bytes=200000-"


@cases(
    "name",
    {"up": "../../../evil-Q4_K_M.gguf", "absolute": "/tmp/evil-Q4_K_M.gguf", "backslashes": "..\\evil-Q4_K_M.gguf",
     "a drive": "C:evil-Q4_K_M.gguf", "escapes": "evil\x1b[31m-Q4_K_M.gguf", "no text": 5, "empty part": "a//evil-Q4_K_M.gguf"},
)  # fmt: skip
def test_pull_ignores_hostile_file_names(name: Any, hub: FakeHub, tmp_path: Path) -> None:
    del hub.files["recital-q4_k_m.gguf"]
    hub.names = [name]
    done = shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env)
    assert done.stdout.decode().endswith("/recital-q8_0.gguf\n"), done.stderr
    assert b"evil" not in done.stderr and b"\x1b" not in done.stderr


@cases("answer", {"no JSON": b"<html>", "a list": b"[]", "no commit": b'{"sha":"../..","siblings":[]}', "deep": b"[" * 100_000})
def test_pull_from_what_is_no_hub_fails_in_one_line(answer: bytes, hub: FakeHub, tmp_path: Path) -> None:
    hub.answer_api = lambda request: request.reply(200, {}, answer)  # type: ignore[method-assign]
    assert_failed(shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env), 1, "no list")


def test_pull_without_a_network_fails_in_one_line(tmp_path: Path) -> None:
    done = shimmy("pull", REPO_NAME, home=tmp_path, env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert_failed(done, 1, "127.0.0.1:9 cannot be reached: Connection refused")


@cases("location", {"a file": "file:///etc/passwd", "in circles": "/api/again"})
def test_pull_refuses_bad_redirects(location: str, hub: FakeHub, tmp_path: Path) -> None:
    hub.answers = [(302, {"Location": location})] * 20
    assert_failed(shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env), 1, "redirects")


def test_pull_of_an_address_lands_in_the_models_folder(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {"own.gguf": b"GGUF" + os.urandom(300_000)}
    done = shimmy("pull", f"{hub.cdn}/own.gguf?download=true", home=tmp_path, env={**hub.env, "HF_TOKEN": "hf_secret"})
    assert done.returncode == 0 and (tmp_path / "models" / "own.gguf").read_bytes() == hub.files["own.gguf"]
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["own.gguf"]
    assert not any("Authorization" in headers for _, _, headers in hub.seen)


def test_pull_of_an_address_resumes_the_same_file_only(hub: FakeHub, quick: Path, tmp_path: Path) -> None:
    hub.files = {"own.gguf": b"GGUF" + os.urandom(300_000)}
    hub.cuts = [1.0, 0.5, 0.0, 0.0, 0.0]
    assert shimmy("pull", f"{hub.cdn}/own.gguf", home=tmp_path, env=hub.env, script=quick).returncode == 1
    assert shimmy("pull", f"{hub.cdn}/own.gguf", home=tmp_path, env=hub.env).returncode == 0
    last = hub.downloads()[-1]
    assert (last["Range"], last["If-Range"]) == ("bytes=150002-", '"v1"')
    assert (tmp_path / "models" / "own.gguf").read_bytes() == hub.files["own.gguf"]


def test_pull_of_an_address_overwrites_no_other_file(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {"own.gguf": b"GGUF" + os.urandom(3000)}
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "own.gguf").write_bytes(b"mine")
    assert_failed(shimmy("pull", f"{hub.cdn}/own.gguf", home=tmp_path, env=hub.env), 1, "own.gguf", "another file")
    assert (tmp_path / "models" / "own.gguf").read_bytes() == b"mine"


def test_pull_of_a_web_page_fails(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {"own.gguf": b"<html>"}
    assert_failed(shimmy("pull", f"{hub.cdn}/own.gguf", home=tmp_path, env=hub.env), 1, "no GGUF file")


def test_pull_takes_an_address_of_the_hubs_pages(hub: FakeHub, tmp_path: Path) -> None:
    done = shimmy("pull", f"{hub.url}/{REPO_NAME}/blob/main/recital-q8_0.gguf", home=tmp_path, env=hub.env)
    assert done.returncode == 0 and fetched(tmp_path, "recital-q8_0.gguf") == hub.files["recital-q8_0.gguf"]


@pty
def test_pull_on_a_terminal_draws_a_bar(hub: FakeHub, tmp_path: Path) -> None:
    hub.hold.clear()
    with terminal("pull", REPO_NAME, home=tmp_path, env=hub.env) as screen:
        screen.read_until("50% 195KB of 391KB")
        hub.hold.set()
        assert "fetched 391KB in 0:0" in screen.rest()


@pytest.fixture
def real_hub(hub: FakeHub, tmp_path: Path) -> FakeHub:
    """A hub whose model can be loaded."""
    hub.files = {"recital-q8_0.gguf": write_recital(tmp_path / "made" / "recital.gguf").read_bytes()}
    return hub


def test_serve_pulls_the_model_that_it_names(real_hub: FakeHub, serve: Callable[..., Server]) -> None:
    running = serve("--model", f"{REPO_NAME}:Q8_0", env=real_hub.env)
    assert running.generate(":", model="default").text == TEXTS[":"]


def test_generate_pulls_once_and_then_needs_no_hub(real_hub: FakeHub, tmp_path: Path) -> None:
    for _ in range(2):
        done = shimmy("generate", REPO_NAME, "--raw", "--prompt", ":", home=tmp_path, env=real_hub.env)
        assert done.stdout.decode() == TEXTS[":"], done.stderr
    assert len(real_hub.seen) == 3  # the list, the redirect, the file


def test_ollama_pull_fetches_for_a_client_where_that_is_allowed(real_hub: FakeHub, serve: Callable[..., Server]) -> None:
    running = serve("--allow-pull", env=real_hub.env)
    reply = running.post("/api/pull", {"model": f"hf.co/{REPO_NAME}:Q8_0"})
    first, *files, last = map(json.loads, reply.body.splitlines())
    size = len(real_hub.files["recital-q8_0.gguf"])
    assert (first, last) == ({"status": "pulling manifest"}, {"status": "success"}) and reply.status == 200
    assert files[-1]["completed"] == files[-1]["total"] == size and files[-1]["digest"].startswith("sha256:")
    assert running.generate(":", model="recital-q8-0").text == TEXTS[":"]
    whole = running.post("/api/pull", {"name": f"{REPO_NAME}:Q8_0", "stream": False})
    assert whole.json() == {"status": "success"}


def test_ollama_pull_is_refused_where_it_is_not_allowed(server: Server) -> None:
    assert_ollama_error(server.post("/api/pull", {"model": f"hf.co/{REPO_NAME}"}), 403, "--allow-pull")


def test_ollama_pull_of_what_is_not_there_has_the_hubs_status(hub: FakeHub, serve: Callable[..., Server]) -> None:
    reply = serve("--allow-pull", env=hub.env).post("/api/pull", {"model": "tester/nothing"})
    assert_ollama_error(reply, 404, "there is no tester/nothing")


# topic: what serve says
# On stderr, once the first scan is over.


def said_by(running: Server, words: str) -> str:
    """What stands on a server's stderr, once the words do."""
    return eventually(lambda: words in running.log.read_text() and running.log.read_text(), f"it says {words}")


def test_serve_with_the_model_in_the_box_alone_says_how_to_get_a_real_one(serve: Callable[..., Server]) -> None:
    first, command, *_ = said_by(serve(), "curl").splitlines()
    assert "only the model in the box is here" in first and re.search(r"python\S* \S*shimmy.py pull \w+/\S+-GGUF$", command)


def test_serve_says_what_it_found_and_how_to_begin(serve: Callable[..., Server], models: Path) -> None:
    running = serve("--models-dir", models, "--model", "dice", "--api-key", "s3cret")
    said = said_by(running, "curl")
    assert "default model: dice; " in said and f"4 in {models}" in said and re.search(r"engine +1 thread\n", said)
    assert re.search(r"memory +[\d.]+GB free, dice takes \d+KB; 256 tokens of context, up to 256 fit", said)
    assert f"http://127.0.0.1:{running.port}/\n" in said and "pull" not in said and "s3cret" not in said
    command = next(line for line in said.splitlines() if "curl " in line).partition("try")[2].replace("KEY", "s3cret")
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=HANG, check=True)
    assert json.loads(done.stdout)["object"] == "chat.completion"


def test_serve_says_what_a_context_that_does_not_fit_could_be(serve: Callable[..., Server], models: Path, tmp_path: Path) -> None:
    place = "        left = free - self.size_bytes - 128 * MIB"
    script = altered(tmp_path, (place, "        free = self.size_bytes + 128 * MIB + 102_400\n" + place))
    said = said_by(serve("--models-dir", models, "--model", "recital", script=script), "curl")
    assert "8,192 tokens of context do not fit: only 768 fit, say --ctx 768" in said


def test_serve_says_that_a_gpu_lies_idle(serve: Callable[..., Server], tmp_path: Path) -> None:
    script = altered(tmp_path, ('    "/dev/kfd": (', '    "/proc/self": ('))
    said = said_by(serve(script=script), "curl")
    assert "the machine has an AMD one" in said and "-DGGML_HIP=on" in said


@pty
@pytest.mark.parametrize("columns", [40, 60])
def test_serve_keeps_to_a_narrow_terminal(columns: int, models: Path, tmp_path: Path) -> None:
    with narrow_terminal(columns, "serve", "--port", "0", "--models-dir", models, home=tmp_path) as screen:
        lines = screen.read_until("curl ").replace("\x1b[K", "").splitlines()
        screen.process.terminate()
        assert screen.process.wait(HANG) == 0
    rows = [line for line in lines if line.startswith("  ") and " try " not in line and str(models) not in line]
    assert len(rows) >= 4 and max(map(len, rows)) <= columns


@contextlib.contextmanager
def narrow_terminal(columns: int, *args: str | Path, home: Path) -> Iterator[Any]:
    """A terminal of so many columns, which its process finds as it starts."""
    (home / "wrapper").write_text(f"import os, subprocess, sys\nsubprocess.run(['stty', 'cols', '{columns}'], stdin=2)\n"
                                  f"os.execv(sys.executable, [sys.executable, {str(SHIMMY)!r}, *sys.argv[1:]])\n")  # fmt: skip
    with terminal(*args, home=home, script=home / "wrapper") as screen:
        yield screen


@pty
def test_serve_on_a_terminal_shows_how_far_a_load_is(models: Path, tmp_path: Path) -> None:
    with terminal("serve", "--port", "0", "--preload", "--model", "recital", "--models-dir", models, home=tmp_path,
                  script=slow_load(tmp_path)) as screen:  # fmt: skip
        screen.read_until("preparing the context of recital")
        screen.read_until("loaded recital in")
        screen.process.terminate()
        assert screen.process.wait(HANG) == 0


def test_verbose_serve_logs_tokens_and_speed_of_each_request(serve: Callable[..., Server], models: Path) -> None:
    running = serve("-v", "--models-dir", models)
    for _ in range(2):
        running.generate("a long prompt that is read once =", max_tokens=40)
    first, second = (line for line in said_by(running, "cached").splitlines() if "POST /api/generate" in line)
    assert re.search(r"200 \d+ ms recital 34\+40 tokens, first after \d\.\d{3} s, [\d.]+ tokens/s", first)
    assert re.search(r"recital 34\+40 tokens \(33 cached\), first after", second)


# topic: the terminal


def test_verbose_generate_ends_with_tokens_and_speed(server: Server, models: Path, tmp_path: Path) -> None:
    for env in ({"SHIMMY_MODEL_PATHS": str(models)}, {"SHIMMY_PORT": str(server.port)}):
        done = shimmy("-v", "generate", "recital", "--raw", "--prompt", "=", home=tmp_path, env=env)
        last = done.stderr.decode().splitlines()[-1]
        assert done.stdout.decode() == TEXTS["="]
        assert re.search(r" 2\+40 tokens( \(1 cached\))?, first after \d+\.\d{3} s, [\d.]+ tokens/s$", last), last


def test_verbose_lines_end_with_tokens_and_speed(models: Path, tmp_path: Path) -> None:
    done = shimmy("-v", "generate", "recital", "--raw", "--lines", "--models-dir", models, home=tmp_path, stdin=b":\n=\n")
    assert re.search(rb"43 tokens in [\d.]+ s: [\d.]+ tokens/s\n$", done.stderr), done.stderr


def chat(*flags: str, models: Path, home: Path) -> Any:
    return terminal("generate", "recital", "--chat", "--models-dir", models, *flags, home=home, stdin=None)


def say(screen: Any, line: str, *until: str) -> str:
    """Types a line at the prompt; reads until the words, in order, and the next prompt have come."""
    os.write(screen.mine, line.encode() + b"\n")
    for words in (*until, "> "):
        screen.read_until(words)
        shown, screen.seen = screen.seen, screen.seen.partition(words)[2]
    return shown


def end(screen: Any) -> None:
    os.write(screen.mine, b"\x04")
    assert screen.process.wait(HANG) == 0


@pty
def test_chat_at_a_keyboard_is_a_conversation(models: Path, tmp_path: Path) -> None:
    with chat("-v", models=models, home=tmp_path) as screen:
        screen.read_until("loaded recital")
        say(screen, "hello", "Hello wide world", f"{1 + len('[user]hello[assistant]:')}+3 tokens")
        turns = "[user]hello[assistant]Hello wide world[user]count[assistant]="
        say(screen, "count", "w38 w39", f"{1 + len(turns)}+40 tokens (")
        end(screen)
    assert (tmp_path / ".shimmy_history").read_text() == "hello\ncount\n"
    assert (tmp_path / ".shimmy_history").stat().st_mode & 0o077 == 0


@pty
def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(models: Path, tmp_path: Path) -> None:
    with chat("--ctx", "65536", models=models, home=tmp_path) as screen:
        screen.read_until("> ")
        os.write(screen.mine, b"go on forever\n")
        screen.read_until("tick tock tick tock")
        screen.process.send_signal(signal.SIGINT)
        screen.seen = ""
        screen.read_until("\r\n> ")
        screen.seen = ""
        os.write(screen.mine, b"half a line")
        screen.read_until("half a line")
        screen.process.send_signal(signal.SIGINT)
        screen.read_until("\r\n> ")
        say(screen, "hello", "Hello wide world")
        end(screen)


@pty
def test_chat_takes_commands_and_texts_of_several_lines(models: Path, tmp_path: Path) -> None:
    with chat("-v", models=models, home=tmp_path) as screen:
        screen.read_until("loaded recital")
        say(screen, "/help", "Ctrl-C stops an answer")
        say(screen, "/nonsense", "no such command")
        say(screen, "hello", f"{1 + len('[user]hello[assistant]:')}+3 tokens")
        say(screen, "/system Be brief")
        say(screen, '"""one\ntwo"""', f"{1 + len('[system]Be brief[user]one/two[assistant]:')}+3 tokens")
        say(screen, "/reset")
        say(screen, "hello", f"{1 + len('[system]Be brief[user]hello[assistant]:')}+3 tokens")
        end(screen)


@pty
def test_chat_says_what_went_wrong_and_goes_on(models: Path, tmp_path: Path) -> None:
    with chat("--ctx", "128", models=models, home=tmp_path) as screen:
        screen.read_until("> ")
        say(screen, "a" * 300, "does not fit", "/reset begins anew")
        say(screen, "hello", "Hello wide world")
        end(screen)


@pty
@pytest.mark.parametrize("columns", [40, 60])
def test_list_keeps_to_a_narrow_terminal(columns: int, models: Path, tmp_path: Path) -> None:
    with narrow_terminal(columns, "list", "--models-dir", models, home=tmp_path) as screen:
        lines = screen.rest().splitlines()
    assert "recital" in lines and max(len(line) for line in lines if str(models) not in line) <= columns


def test_list_names_the_largest_context_that_fits(models: Path, tmp_path: Path) -> None:
    done = shimmy("list", "--json", "--models-dir", models, home=tmp_path)
    contexts = {model["id"]: model["largest_context"] for model in json.loads(done.stdout)["models"]}
    assert (contexts["recital"], contexts["dice"]) == (65536, 256)
    place = "        left = free - self.size_bytes - 128 * MIB"
    script = altered(tmp_path, (place, "        free = self.size_bytes + 128 * MIB + 102_400\n" + place))
    table = shimmy("list", "--models-dir", models, home=tmp_path, script=script).stdout.decode()
    assert re.search(r"recital .* 65536 +ctx 768 ", table) and re.search(r"dice .* 256 +yes ", table)


def test_probe_names_the_largest_context_that_fits(models: Path, tmp_path: Path) -> None:
    done = shimmy("probe", "recital", "--models-dir", models, home=tmp_path)
    assert re.search(rb"context +8,192 tokens, up to 65,536 would fit\n", done.stdout)


@cases("command", {name or "none": name for name in module.HELP})
def test_help_shows_what_each_command_does(command: str, tmp_path: Path) -> None:
    done = shimmy(*([command] if command else []), "--help", home=tmp_path, env={"COLUMNS": "80"})
    text = done.stdout.decode()
    assert done.returncode == 0 and len(text.splitlines()[2]) > 50 and max(map(len, text.splitlines())) <= 80
    epilog = module.HELP[command][2]
    assert text.endswith(f"{epilog}\n") if epilog else True


def test_the_examples_of_the_help_work(hub: FakeHub, tmp_path: Path) -> None:
    shown = shimmy(home=tmp_path).stderr.decode()
    serve_it, generate_it, pull_it = re.findall(r"(?m)^  python (shimmy\.py .*)$", shown)
    hub.repo = module.SUGGESTED
    for example in (generate_it, pull_it):
        command = f"'{sys.executable}' {example.replace('shimmy.py', str(SHIMMY), 1)}"
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment(tmp_path, hub.env), capture_output=True,
                              timeout=HANG, check=False)  # fmt: skip
        assert done.returncode == 0 and done.stdout, done.stderr
    assert serve_it == "shimmy.py serve"


@cases(
    "words,completed",
    {"a command": (["gen"], ["generate"]), "a flag": (["serve", "--po"], ["--port"]),
     "a choice": (["serve", "--kv-type", "q"], ["q8_0", "q4_0"]), "a model": (["generate", "rec"], ["recital"]),
     "a hostile one": (["probe", "$("], [r"\$\(touch\$ifs-run\)"])},
)  # fmt: skip
def test_bash_completes(words: list[str], completed: list[str], models: Path, tmp_path: Path) -> None:
    write_recital(tmp_path / "models" / "$(touch$IFS run).gguf")
    command = tmp_path / "shimmy.py"
    command.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{SHIMMY}' \"$@\"\n")
    command.chmod(0o755)
    script = shimmy("completion", "bash", home=tmp_path).stdout.decode()
    array = " ".join(f"'{word}'" for word in ["./shimmy.py", *words])
    script += f"\nCOMP_WORDS=({array}); COMP_CWORD={len(words)}; _shimmy; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    env = environment(tmp_path, {"SHIMMY_MODEL_PATHS": str(models)})
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, timeout=HANG, check=True)
    assert done.stdout.decode().split("\n")[:-1] == completed and not (tmp_path / "run").exists()


@cases("shell", {"zsh": "zsh", "fish": "fish"})
def test_completion_knows_every_command(shell: str, tmp_path: Path) -> None:
    script = shimmy("completion", shell, home=tmp_path).stdout.decode()
    assert all(command in script for command in module.HELP if command) and "kv-type" in script


@cases(
    "changes",
    {"text for numbers": {"attention.key_length": "a" * 1000, "attention.value_length": "a"},
     "text for a count": {"block_count": "x"}, "no heads": {"attention.head_count": 0},
     "a list of texts": {"attention.head_count_kv": ("a",)}, "a fraction": {"block_count": 0.5}},
)  # fmt: skip
def test_memory_of_a_context_is_unknown_where_the_header_is_wrong(changes: dict[str, Any]) -> None:
    shape = {"block_count": 2, "embedding_length": 64, "attention.head_count": 4, "attention.head_count_kv": 2}
    named = [{f"llama.{key}": value for key, value in each.items()} for each in (shape, shape | changes)]
    assert [module._kv_numbers(meta, "llama") for meta in named] == [2 * 2 * 2 * 16, None]


def test_memory_of_a_context_counts_each_layers_heads() -> None:
    meta = {"a.block_count": 3, "a.embedding_length": 64, "a.attention.head_count": 4, "a.attention.head_count_kv": (4, 0, 2)}
    assert module._kv_numbers(meta, "a") == 6 * 2 * 16
