"""New tests of: the machine, model files, models in memory. To be moved into test_shimmy.py."""

from __future__ import annotations

import resource
import traceback

from shimmy import Catalog, GenerationFailed, InvalidRequest, ModelTable, SearchRoot, TableOptions
from test_shimmy import *  # noqa: F403
from test_shimmy import (  # what a linter would like to see named
    HANG,
    SHIMMY,
    Any,
    Callable,
    Cancellation,
    Path,
    Server,
    ThreadPoolExecutor,
    altered,
    assert_error,
    environment,
    eventually,
    finish,
    gguf,
    json,
    linux,
    listing,
    np,
    ollama_model,
    os,
    pytest,
    quote,
    shimmy,
    struct,
    subprocess,
    sys,
    threading,
    time,
    write_header,
    write_recital,
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------

OUTER = {"memory.max": "90000000", "memory.current": "1000", "memory.stat": "anon 500\n"}
CGROUPS: dict[str, tuple[str, dict[str, dict[str, str]]]] = {
    "page cache counts as free": ("0::/\n", {"": {
        "memory.max": "3000000", "memory.current": "2900000",
        "memory.stat": "anon 7\ninactive_file 1000000\nactive_file 500000\n"}}),
    "a nested group binds": ("0::/app/job\n", {"": {}, "app": OUTER, "app/job": {
        "memory.max": "1700000", "memory.current": "100000", "memory.stat": "file 9\n"}}),
    "an outer group binds": ("0::/app/job\n", {"app/job": OUTER, "app": {
        "memory.max": "1600000", "memory.current": "1", "memory.stat": "active_file 1\n"}}),
    "no limit in the inner one": ("0::/app\n", {"app": OUTER | {"memory.max": "max"}, "": OUTER | {
        "memory.max": "1601000"}}),
    "version 1": ("3:cpu:/\n5:memory:/docker/x\n", {"memory/docker/x": {
        "memory.limit_in_bytes": "2000000", "memory.usage_in_bytes": "1000000",
        "memory.stat": "inactive_file 3\ntotal_inactive_file 500000\ntotal_active_file 100000\n"}}),
}  # fmt: skip


@pytest.mark.parametrize("case", CGROUPS)
@linux
def test_free_memory_within_a_container(case: str, tmp_path: Path) -> None:
    own, groups = CGROUPS[case]
    (tmp_path / "own").write_text(own)
    for folder, files in groups.items():
        for name, text in files.items():
            (tmp_path / "groups" / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / "groups" / folder / name).write_text(text)
    script = altered(tmp_path, ('"/proc/self/cgroup"', repr(str(tmp_path / "own"))),
                     ('"/sys/fs/cgroup"', repr(str(tmp_path / "groups"))))  # fmt: skip
    done = shimmy("diag", "--json", home=tmp_path, script=script)
    assert json.loads(done.stdout)["memory"]["available_bytes"] == 1_600_000


COUNT_BUILDS = """
import sys
if "_build" in sys.orig_argv:
    with open({file!r}, "a") as file:
        print("asked", file=file)
"""


def test_first_diags_at_once_ask_for_the_build_once(serve: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(COUNT_BUILDS.format(file=str(tmp_path / "asked")))
    server = serve(env={"PYTHONPATH": str(tmp_path / "site")})
    with ThreadPoolExecutor(12) as pool:
        assert {reply.status for reply in pool.map(lambda _: server.get("/diag"), range(12))} == {200}
    assert (tmp_path / "asked").read_text().count("asked") == 1


# ---------------------------------------------------------------------------------------------------
# Model files
# ---------------------------------------------------------------------------------------------------


def write_marked(path: Path, arch: str = "llama", **marks: Any) -> Path:
    """A header with keys of the architecture: pooling_type=1 writes llama.pooling_type."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_context_length(512)
    for key, value in marks.items():
        name = f"{arch}.{key.replace('__', '.')}"
        writer.add_bool(name, value) if isinstance(value, bool) else writer.add_uint32(name, value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "a"])
    writer.add_tensor("token_embd.weight", np.zeros((64, 64), np.float32))
    finish(writer)
    return path


ENCODERS = ["bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "modern-bert", "neo-bert", "eurobert",
             "gemma-embedding", "llama-embed", "t5encoder"]  # fmt: skip


def test_list_tells_embedding_models_from_generative_ones(tmp_path: Path) -> None:
    for arch in ENCODERS:
        write_marked(tmp_path / f"{arch}.gguf", arch)
    write_marked(tmp_path / "last.gguf", "qwen3", pooling_type=3)
    write_marked(tmp_path / "reranker.gguf", "qwen3", pooling_type=4)
    write_marked(tmp_path / "both-ways.gguf", "qwen3", attention__causal=False)
    write_marked(tmp_path / "no-pooling.gguf", "qwen3", pooling_type=0)
    write_marked(tmp_path / "diffusion.gguf", "llada", attention__causal=False)
    write_marked(tmp_path / "plain.gguf")
    models = listing(tmp_path, "--models-dir", tmp_path).models
    generative = {"no-pooling", "diffusion", "plain", "shimmy-tiny"}
    assert {id for id, model in models.items() if not model["embedding"]} == generative & set(models)
    assert (models["last"]["pooling"], models["reranker"]["pooling"], models["plain"]["pooling"]) == ("last", "rank", None)


EMBEDDER_REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": ("/api/generate", {"prompt": "x"}),
    "a stream": ("/api/generate", {"prompt": "x", "stream": True}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    "load": ("/api/models/{model}/load", {}),
    "load in the background": ("/api/models/{model}/load?wait=false", {}),
}


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server whose only model, but for shimmy's own, cannot generate, and is called the default."""
    home = tmp_path_factory.mktemp("embedder")
    write_marked(home / "models" / "all-mini.gguf", "bert", pooling_type=1)
    running = Server(home, "--port", "0", "--model", "all-mini")
    yield running
    running.stop()


@pytest.mark.parametrize("model", ["all-mini", "default"])
@pytest.mark.parametrize("request_", EMBEDDER_REQUESTS)
def test_embedding_model_is_refused_before_it_loads(request_: str, model: str, embedder: Server) -> None:
    path, fields = EMBEDDER_REQUESTS[request_]
    reply = embedder.post(path.replace("{model}", model), {"model": model, **fields})
    error = assert_error(reply, 400, "invalid_request", "model", "all-mini", "embedding model")
    assert error.get("param", "model") == "model"
    assert (embedder.status("all-mini")["status"], embedder.status("all-mini")["error"]) == ("unloaded", None)


def test_embedding_model_that_comes_first_is_not_the_default(serve: Callable[..., Server], tmp_path: Path) -> None:
    write_marked(tmp_path / "two" / "a-bert.gguf", "bert")
    write_recital(tmp_path / "two" / "b-writer.gguf")
    server = serve("--models-dir", tmp_path / "two")
    assert server.status("default")["model"] == "b-writer"


def test_embedding_models_alone_give_no_default(serve: Callable[..., Server], tmp_path: Path) -> None:
    write_marked(tmp_path / "one" / "a-bert.gguf", "bert")
    (tmp_path / "shimmy.py").write_bytes(SHIMMY.read_bytes())
    server = serve("--models-dir", tmp_path / "one", script=tmp_path / "shimmy.py")
    assert_error(server.generate(model="default"), 404, "model_not_found", "embedding", "a-bert")


def bytes_of_pair(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def header_of(pairs: int, *parts: bytes) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, 1, pairs) + b"".join(parts)


TENSOR = struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 32, 0, 0)
ARCHITECTURE = bytes_of_pair("general.architecture", 8, struct.pack("<Q", 5) + b"llama")


@linux
def test_header_that_states_a_string_of_2_gib_is_read_in_little_memory(tmp_path: Path) -> None:
    with (tmp_path / "vast.gguf").open("wb") as file:
        file.write(header_of(2, ARCHITECTURE, bytes_of_pair("general.description", 8, struct.pack("<Q", 1 << 31))))
        file.seek(1 << 31, os.SEEK_CUR)
        file.write(TENSOR + bytes(4096))
    done = subprocess.run(
        [sys.executable, SHIMMY, "list", "--json", "--models-dir", tmp_path], cwd=tmp_path, env=environment(tmp_path),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)), capture_output=True, timeout=HANG,
    )  # fmt: skip
    assert "vast" in [model["id"] for model in json.loads(done.stdout)["models"]]


def sparse(path: Path, size: int, head: bytes) -> Path:
    path.write_bytes(head)
    os.truncate(path, size)
    return path


LONG_STRING = struct.pack("<Q", 1 << 20) + bytes(1 << 20)
STRAINING = {
    "pairs": (130 << 20, header_of(10_000_000), "metadata pairs"),
    "tensors": (130 << 20, struct.pack("<4sIQQ", b"GGUF", 3, 3_000_000, 1) + ARCHITECTURE, "tensors"),
    "kept text": (20 << 20, header_of(14, *(bytes_of_pair(f"k{i}", 8, LONG_STRING) for i in range(14))), "MiB of text"),
    "strings of nothing": (2 << 30, header_of(2, bytes_of_pair("k", 9, struct.pack("<IQ", 8, 1 << 28))), "to read"),
}


@pytest.mark.parametrize("kind", STRAINING)
def test_header_that_would_take_long_to_read_is_skipped_with_a_reason(kind: str, tmp_path: Path) -> None:
    size, head, word = STRAINING[kind]
    sparse(tmp_path / "strain.gguf", size, head)
    began = time.monotonic()
    assert word in listing(tmp_path, "--models-dir", tmp_path).reason("strain.gguf")
    assert time.monotonic() - began < 12


@pytest.mark.parametrize("what", ["manifest", "blob", "gguf file"])
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_named_pipe_holds_up_no_scan(what: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    ollama_model(store, "tiny", "latest")
    (blob,) = (store / "blobs").iterdir()
    manifest = store / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "latest"
    pipe = {"manifest": manifest, "blob": blob, "gguf file": tmp_path / "models" / "pipe.gguf"}[what]
    write_header(tmp_path / "models" / "fine.gguf")
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    done = shimmy("-v", "list", home=tmp_path, env={"OLLAMA_MODELS": str(store)})
    assert b"fine" in done.stdout and str(pipe) + ": not a regular file" in done.stderr.decode()


FORGED = "good\n\x1b[31mforged    7B  \u202egpj"


def test_texts_of_a_header_are_listed_printable_and_short(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "forger.gguf"), "llama")
    writer.add_name(FORGED)
    writer.add_description("x" * (1 << 20))
    writer.add_size_label(FORGED)
    writer.add_tensor("t", np.zeros((64, 64), np.float32))
    finish(writer)
    model = listing(tmp_path, "--models-dir", tmp_path).models["forger"]
    assert model["name"].startswith("good\\n\\x1b[31mforged") and model["description"].endswith("…")
    texts = [model[key] for key in ("id", "name", "description", "model_type", "parameter_count")]
    assert all(text.isprintable() and len(text) <= 200 for text in texts)


def test_name_of_a_file_cannot_forge_a_row(tmp_path: Path) -> None:
    write_header(tmp_path / "models" / "a.gguf").rename(tmp_path / "models" / f"{FORGED}.gguf")
    (tmp_path / "models" / "b.gguf").symlink_to(tmp_path / "models" / "\x1b[2J gone")
    done = shimmy("list", "--short", home=tmp_path)
    (line,) = [line for line in done.stdout.decode().splitlines() if "forged" in line]
    assert line.isprintable() and line.startswith("good")
    report = json.loads(shimmy("list", "--json", home=tmp_path).stdout)
    assert all(note.isprintable() for folder in report["directories"] for note in folder["notes"])


def test_name_that_prints_nothing_means_no_model(serve: Callable[..., Server], tmp_path: Path) -> None:
    write_header(tmp_path / "odd" / "model-one.gguf")
    write_header(tmp_path / "odd" / "a.gguf").rename(tmp_path / "odd" / "\x01\x02.gguf")
    server = serve("--models-dir", tmp_path / "odd")
    assert {"model", "model-one"} <= set(server.ids())
    for name in ("\0", " ", "\x1b"):
        assert_error(server.generate(model=name), 404, "model_not_found")


def test_file_whose_name_is_no_utf_8_can_be_addressed(serve: Callable[..., Server], tmp_path: Path) -> None:
    write_recital(tmp_path / "odd" / "made.gguf").rename(os.fsdecode(os.fsencode(tmp_path / "odd") + b"/caf\xe9-one.gguf"))
    server = serve("--models-dir", tmp_path / "odd")
    (id,) = [id for id in server.ids() if id.startswith("caf")]
    assert id.isprintable() and server.generate(model=id).text == "Hello wide world"


# ---------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------

NAME_ROUTES = {
    "generate": ("POST", "/api/generate", {"prompt": ":"}),
    "chat": ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    "status": ("GET", "/api/models/{name}/status", None),
    "load": ("POST", "/api/models/{name}/load", {}),
    "unload": ("POST", "/api/models/{name}/unload", {}),
    "model": ("GET", "/v1/models/{name}", None),
}


@pytest.mark.parametrize("route", NAME_ROUTES)
def test_name_with_a_nul_is_not_found(route: str, server: Server) -> None:
    method, path, body = NAME_ROUTES[route]
    path = path.replace("{name}", quote("reci\0tal", safe=""))
    reply = server.request(method, path, body and {**body, "model": "reci\0tal"})
    assert_error(reply, 404, "model_not_found", "reci\\x00tal")


def test_name_of_a_mile_is_not_found_at_once(server: Server) -> None:
    began = time.monotonic()
    reply = server.generate(model="a/" * 400_000)
    assert time.monotonic() - began < 5
    assert_error(reply, 404, "model_not_found", "a/a/a/")
    assert len(reply.body) < 500


@pytest.mark.parametrize("name", ["recital.gguf", "Recital.GGUF", "recital:latest", "RECITAL:latest"])
def test_request_may_name_a_model_as_other_servers_do(name: str, server: Server) -> None:
    assert server.generate(model=name, max_tokens=1).status == 200


@pytest.mark.parametrize("name", ["reci:latest", ".gguf", ":latest", "recital.gguf.gguf", " ", "\0"])
def test_request_by_half_a_name_is_not_found(name: str, server: Server) -> None:
    assert_error(server.generate(model=name, max_tokens=1), 404, "model_not_found")


def test_ambiguous_name_is_told_what_it_could_mean(serve: Callable[..., Server], tmp_path: Path) -> None:
    for number in range(7):
        write_header(tmp_path / "apes" / f"ape-{number}.gguf")
    server = serve("--models-dir", tmp_path / "apes")
    error = assert_error(server.generate(model="ape"), 404, "model_not_found")
    assert error["details"] == (
        "Model 'ape' is not available: it could mean ape-0, ape-1, ape-2, ape-3, ape-4 and 2 more")
    message = server.chat(model="ape").json()["error"]["message"]
    assert message == f"The specified model was not found: {error['details']}"


def test_v1_unknown_model_is_told_in_the_message_what_there_is(server: Server) -> None:
    message = server.chat(model="claude-9").json()["error"]["message"]
    assert message.startswith("The specified model was not found: Model 'claude-9' is not available (available: ")
    assert "recital" in message and "--alias 'claude-9=MODEL'" in message


def test_models_named_in_vain_are_told_with_near_names(models: Path) -> None:
    options = TableOptions(default="recitol", aliases=(("gpt-*", "nonesuch"), ("ok", "dice"), ("d", "default")))
    table = ModelTable(Catalog([SearchRoot(str(models), "--models-dir")]), lambda *_: None, options)  # type: ignore[arg-type]
    table.start()
    first, second = table.unresolved()
    assert (first.setting, first.value, first.near) == ("--model", "recitol", ("recital",))
    assert (second.setting, second.value) == ("--alias gpt-*", "nonesuch")


def test_unknown_default_is_logged_with_near_names(serve: Callable[..., Server], models: Path) -> None:
    server = serve("--models-dir", models, "--model", "recitol")
    eventually(lambda: "recitol was found for --model (near: recital)" in server.log.read_text(), "the log says so")


def test_unknown_names_at_once_share_a_scan(serve: Callable[..., Server], models: Path, tmp_path: Path) -> None:
    line = "for file in self.files:\n"
    told = "print('SCAN', file=sys.stderr, flush=True)\n        time.sleep(0.4)\n        "
    script = altered(tmp_path, (line, told + line))
    server = serve("--models-dir", models, script=script)
    server.ids()
    time.sleep(0.6)  # older than a look that serves an unknown name
    before = server.log.read_text().count("SCAN")
    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda n: server.generate(model=f"nonesuch-{n}"), range(12)))
    assert {reply.status for reply in replies} == {404}
    assert server.log.read_text().count("SCAN") - before <= 3


def test_first_scan_that_fails_leaves_nobody_waiting(serve: Callable[..., Server], tmp_path: Path) -> None:
    script = altered(tmp_path, ("known, findings = set(self._read), Findings()", "raise LookupError('no disk today')"))
    server = serve(script=script)
    assert server.generate(model="recital").status in (404, 500)
    assert server.get("/health").status == 200


# ---------------------------------------------------------------------------------------------------
# Lifecycle
# ---------------------------------------------------------------------------------------------------


class FakeWorker:
    """What a table asks of a worker, without a child."""

    alive = True

    def __init__(self) -> None:
        self.measure, self.asked = threading.Event(), threading.Event()

    def counts(self) -> tuple[int, int]:
        return 0, 0

    def memory_bytes(self) -> int:
        self.asked.set()
        assert self.measure.wait(HANG)
        return 7

    def stop(self) -> None:
        self.measure.set()


def table_of(models: Path, start_worker: Any) -> ModelTable:
    table = ModelTable(Catalog([SearchRoot(str(models), "--models-dir")]), start_worker, TableOptions())
    table.start()
    return table


def test_failing_load_gives_each_waiter_an_exception_of_its_own(models: Path) -> None:
    together = threading.Event()

    def fail(*_: Any) -> Any:
        assert together.wait(HANG)
        raise GenerationFailed("no luck", "The model could not be loaded")

    table = table_of(models, fail)
    caught: list[GenerationFailed] = []

    def ask() -> None:
        try:
            table.load("dice", True, Cancellation())
        except GenerationFailed as error:
            caught.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    eventually(lambda: table.status("dice")["requests_waiting"] == 8, "all wait for the same load")
    together.set()
    for thread in threads:
        thread.join(HANG)
    assert len({id(error) for error in caught}) == 8
    assert {(error.message, error.details) for error in caught} == {("The model could not be loaded", "no luck")}
    assert {sum(f.name == "ask" for f in traceback.extract_tb(error.__traceback__)) for error in caught} == {1}


def test_memory_that_is_slow_to_ask_for_holds_up_nobody(models: Path) -> None:
    worker = FakeWorker()
    table = table_of(models, lambda *_: worker)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(table.load, "dice", True, Cancellation())
        assert worker.asked.wait(HANG)
        began = time.monotonic()
        assert any(model["loaded"] for model in table.models()) and time.monotonic() - began < HANG / 4
        worker.measure.set()
        assert asked.result(HANG)["memory_bytes"] == 7
    table.close()


MAPS = """
import mmap, sys
file = open(sys.argv[1], "rb")
mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
print(sum(mapped[::4096]), flush=True)
sys.stdin.read()
"""


@linux
def test_weights_that_an_idle_model_has_mapped_are_not_free_for_the_next(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free memory, most of which is page cache: what an engine has mapped of it is in use all the same."""
    weights = tmp_path / "weights"
    weights.write_bytes(bytes(60 << 20))
    monkeypatch.setattr("shimmy.available_memory", lambda: 40 << 20)
    table = table_of(models, lambda *_: FakeWorker())
    command = [sys.executable, "-c", MAPS, str(weights)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as engine:
        assert engine.stdout and engine.stdout.readline()
        monkeypatch.setattr(FakeWorker, "process", engine, raising=False)
        monkeypatch.setattr(FakeWorker, "memory_bytes", lambda _: 7)
        assert table.load("dice", True, Cancellation())["loaded"] and table.load("recital", True, Cancellation())["loaded"]
        assert table.status("dice")["status"] == "unloaded"
        engine.communicate()
    table.close()


def test_embedding_model_may_still_be_asked_about(tmp_path: Path) -> None:
    write_marked(tmp_path / "a-bert.gguf", "bert")
    table = table_of(tmp_path, lambda *_: FakeWorker())
    assert table.status("a-bert")["status"] == "unloaded"
    with pytest.raises(InvalidRequest):
        table.load("a-bert", True, Cancellation())


def threads_of(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/task"))


@pytest.fixture
def full(serve: Callable[..., Server], models: Path, tmp_path: Path) -> Any:
    """A server with room for one model, which is busy; who waits for room gives up after a second."""
    script = altered(tmp_path, ("LOAD_WAIT_SECONDS = 60.0", "LOAD_WAIT_SECONDS = 1.0"))
    server = serve("--models-dir", models, "--max-loaded", "1", "--ctx", "65536", script=script)
    with server.endless() as stream:
        next(stream)
        yield server


@linux
def test_load_without_room_costs_one_thread_however_often_it_is_asked(full: Server) -> None:
    full.post("/api/models/dice/load?wait=false")
    before = threads_of(full)
    replies = [full.post("/api/models/dice/load?wait=false") for _ in range(30)]
    assert {reply.status for reply in replies} == {202} and threads_of(full) <= before + 3


def test_load_that_gets_no_room_says_so_in_the_status(full: Server) -> None:
    assert full.post("/api/models/dice/load?wait=false").json()["error"] is None
    status = eventually(lambda: (s := full.status("dice"))["error"] and s, "the refusal shows")
    assert status["status"] == "failed" and "--max-loaded 1" in status["error"]


def test_unload_calls_a_load_off_that_waits_for_room(full: Server) -> None:
    full.post("/api/models/dice/load?wait=false")
    assert full.unload("dice").json()["status"] == "unloaded"
    eventually(lambda: full.status("dice")["requests_waiting"] == 0, "nobody waits")
    assert (full.status("dice")["status"], full.status("dice")["error"]) == ("unloaded", None)


NO_THREADS = """
import os, threading
start = threading.Thread.start
def refuse(self):
    if self.name.startswith(("load ", "unload ")) and os.path.exists({flag!r}):
        raise RuntimeError("can't start new thread")
    start(self)
threading.Thread.start = refuse
"""


@pytest.fixture
def threadless(serve: Callable[..., Server], models: Path, tmp_path: Path) -> Any:
    """A server in which no thread can start that loads or unloads, while the file `flag` is there."""
    flag = tmp_path / "flag"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_THREADS.format(flag=str(flag)))
    return serve("--models-dir", models, env={"PYTHONPATH": str(tmp_path / "site")}), flag


@pytest.mark.parametrize("query", ["", "?wait=false"])
def test_load_whose_thread_cannot_start_is_refused_and_may_be_tried_again(query: str, threadless: tuple[Server, Path]) -> None:
    server, flag = threadless
    flag.touch()
    assert_error(server.post(f"/api/models/dice/load{query}"), 503, "overloaded", "thread")
    assert server.status("dice")["status"] == "unloaded"
    flag.unlink()
    assert server.load("dice").json()["loaded"]


def test_unload_whose_thread_cannot_start_leaves_the_model_loaded(threadless: tuple[Server, Path]) -> None:
    server, flag = threadless
    assert server.load("dice").status == 200
    flag.touch()
    assert_error(server.unload("dice"), 503, "overloaded", "thread")
    assert server.status("dice")["loaded"]
    flag.unlink()
    assert server.unload("dice").json()["status"] == "unloaded"
