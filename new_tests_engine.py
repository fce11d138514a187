# ruff: noqa: F403, F405
"""Tests of the engine's restructuring: sampling without aborts, hostile texts, children that hang, cached bytecode."""
from __future__ import annotations

import importlib.util
import marshal
import types

import shimmy as module_under_test
from test_shimmy import *

# Sampling never reaches an abort

BANNED = {str(write): -100 for write in (*b"tf", 256, 257)}  # t, f, th, the of dice's vocabulary
FIELDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "defaults": {},
    "hot": {"temperature": 5, "top_k": 0, "top_p": 1, "min_p": 0},
    "penalties": {"repeat_penalty": 10, "presence_penalty": 2, "frequency_penalty": -2},
    "greedy with penalties": {"temperature": 0, "repeat_penalty": 0.1},
    "only the likeliest": {"top_k": 1, "min_p": 1, "top_p": 0},
    "past the end": {"ignore_eos": True},
    "with log probabilities": {"logprobs": 5},
}


@pytest.fixture(scope="module")
def gambler(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose dice nobody else throws."""
    running = Server(tmp_path_factory.mktemp("gambler"), "--port", "0", "--models-dir", models, "--ctx", str(LONG_CTX))
    running.load("dice")
    yield running
    running.stop()


@linux
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_schema_whose_every_document_is_banned_ends_the_text_and_nobody_elses(fields: dict[str, Any], gambler: Server) -> None:
    engine = gambler.engine("dice.gguf")
    body = {"model": "dice", "prompt": "x", "json_schema": {"type": "boolean"}, "logit_bias": BANNED, "max_tokens": 20}
    reply = gambler.post("/v1/completions", {**body, **fields})
    assert reply.text.strip() == "" and reply.finish_reason == "stop"
    assert gambler.engine("dice.gguf") == engine


@linux
def test_sampling_fields_of_all_kinds_at_once_never_end_the_engine(gambler: Server) -> None:
    choose, engine = random.Random(11), gambler.engine("dice.gguf")
    ranges: dict[str, Seq[Any]] = {
        "temperature": [0, 1e-38, 1e-5, 0.7, 5], "top_k": [0, 1, 3, 10**9], "top_p": [0, 1e-9, 0.5, 1], "min_p": [0, 0.5, 1],
        "repeat_penalty": [0.1, 1, 10], "presence_penalty": [-2, 0, 2], "frequency_penalty": [-2, 0, 2],
        "ignore_eos": [True, False], "logprobs": [None, 0, 20], "seed": [-1, 0, 2**64], "max_tokens": [1, 30],
        "json_schema": [None, None, {"type": "string"}, {"enum": ["é", "the", 1]}, {"type": "array"}],
    }  # fmt: skip

    def ask(_: int) -> int:
        body = {name: choose.choice(values) for name, values in ranges.items()}
        few, all_but = range(choose.randrange(1, 263)), range(1, 263)
        tokens = choose.choice([(), few, all_but, range(263)])
        bias = {str(t): choose.choice([-100, 100, -99.5]) if tokens is few else -100 for t in tokens}
        return gambler.post("/v1/completions", {"model": "dice", "prompt": "Once", **body, "logit_bias": bias}).status

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(ask, range(1000))) == {200}
    assert gambler.engine("dice.gguf") == engine


@linux
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 1}, {"json_schema": {"type": "boolean"}}], ids=str)
def test_model_whose_output_is_not_a_number_fails_the_request_only(
    fields: dict[str, Any], value: float, serve: Callable[..., Server], tmp_path: Path
) -> None:
    broken = gguf.GGUFReader(write_dice(tmp_path / "broken.gguf"), "r+")
    next(t for t in broken.tensors if t.name == "output.weight").data[:] = value
    del broken
    own = serve("--models-dir", tmp_path)
    own.load("broken")
    engine = own.engine("broken.gguf")
    assert_error(own.generate("any", "broken", **fields), 500, "generation_failed", "not a number")
    assert own.engine("broken.gguf") == engine


@pytest.mark.parametrize("key", ["temp", "top_k", "top_p"])
def test_sampling_settings_of_a_file_that_make_no_sense_are_passed_over(
    key: str, serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = gguf.GGUFWriter.add_bos_token_id

    def with_setting(writer: gguf.GGUFWriter, token: int) -> None:
        plain(writer, token)
        writer.add_string(f"general.sampling.{key}", "inf")

    monkeypatch.setattr(gguf.GGUFWriter, "add_bos_token_id", with_setting)
    write_dice(tmp_path / "odd.gguf")
    reply = serve("--models-dir", tmp_path).post("/v1/completions", {"model": "odd", "prompt": "Once", "max_tokens": 5})
    assert reply.status == 200


@pytest.mark.parametrize("token", [263, 2**31, 9999999999])
def test_bias_of_a_token_that_does_not_exist_is_refused_by_name(token: int, gambler: Server) -> None:
    error = assert_error(
        gambler.post("/v1/completions", {"model": "dice", "prompt": "x", "logit_bias": {str(token): 1}}),
        400, "invalid_request", "logit_bias", "0…262",
    )  # fmt: skip
    assert error["param"] == "logit_bias"


# Texts


@pytest.mark.parametrize("count", [26_500, 200_000])
@pytest.mark.parametrize("tokenizer", ["deepseek-v3", "gpt-4o", "tekken", "llama4"])
def test_run_of_one_character_is_tokenized(
    tokenizer: str, count: int, serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = gguf.GGUFWriter.add_tokenizer_pre
    monkeypatch.setattr(gguf.GGUFWriter, "add_tokenizer_pre", lambda writer, _: plain(writer, tokenizer))
    write_dice(tmp_path / "runs.gguf", context=20_000)
    own = serve("--models-dir", tmp_path, "--ctx", "20000")
    assert_error(own.generate("a" * count, "runs"), 400, "context_length_exceeded", f"{count} tokens", "20000")
    assert own.generate("a" * 300, "runs", max_tokens=1).json()["usage"]["prompt_tokens"] == 300


def test_text_that_no_context_holds_is_refused_before_it_is_tokenized(gambler: Server) -> None:
    started = time.monotonic()
    reply = gambler.generate("x" * 8_000_000, "dice")
    assert_error(reply, 400, "context_length_exceeded", f"at least {-(-8_000_000 // 13)} tokens", "256")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("special", ["<unk>", "<s>", "<|quiet|>"])
def test_special_token_in_a_users_text_stays_text(special: str, server: Server) -> None:
    plain = server.chat("(" * len(special)).json()["usage"]["prompt_tokens"]
    assert server.chat(special).json()["usage"]["prompt_tokens"] == plain


def naive_stream(text: str, stop: Seq[str]) -> str:
    """What is shown of a text: up to the end of the piece-by-piece first stop string, one character a piece."""
    for end in range(1, len(text) + 1):
        found = [at for s in stop if (at := text[:end].find(s)) >= 0]
        if found:
            return text[: min(found)]
    return text


def test_stop_strings_are_found_in_text_fed_one_character_at_a_time() -> None:
    choose = random.Random(3)
    for _ in range(3000):
        stop = tuple("".join(choose.choices("ab", k=choose.randrange(1, 6))) for _ in range(choose.randrange(1, 4)))
        text = "".join(choose.choices("abc", k=30))
        stream, shown = module_under_test.TextStream(stop), ""
        for character in text:
            shown += stream.push(character.encode())
            assert not any(s in shown for s in stop)
            if stream.stopped:
                break
        assert shown + stream.finish() == naive_stream(text, stop), (text, stop)


@pytest.mark.parametrize("text", ["a" * 20_000, "ab" * 10_000, "aab" * 7_000])
def test_stop_strings_cost_the_same_however_long(text: str) -> None:
    seconds = []
    for size in (16, 4096):
        stream = module_under_test.TextStream(tuple(("aab" * size)[: size + i] + "z" for i in range(16)))
        started = time.process_time()
        for character in text:
            stream.push(character.encode())
        seconds.append(time.process_time() - started)
    assert seconds[1] < 3 * seconds[0] + 0.5


# Children that hang

HURRY = (("SILENCE = 30 ", "SILENCE = 2 "), ("STARTING = 180 ", "STARTING = 3 "))


@linux
def test_engine_that_hangs_ends_its_stream_with_the_reason_and_reloads(
    serve: Callable[..., Server], models: Path, tmp_path: Path
) -> None:
    own = serve("--models-dir", models, "--ctx", str(LONG_CTX), script=altered(tmp_path, *HURRY))
    with own.endless() as stream:
        next(stream)
        os.kill(own.engine("recital.gguf"), signal.SIGSTOP)
        rest = [event for event in stream if event != "[DONE]"]
    assert rest[-1]["error"]["code"] == "generation_failed" and "said nothing for 2 s" in rest[-1]["error"]["details"]
    assert own.generate("=").text == TEXTS["="]


@linux
def test_engine_that_hangs_while_idle_is_replaced(serve: Callable[..., Server], models: Path, tmp_path: Path) -> None:
    own = serve("--models-dir", models, script=altered(tmp_path, *HURRY))
    own.load("recital")
    engine = own.engine("recital.gguf")
    os.kill(engine, signal.SIGSTOP)
    assert "said nothing" in eventually(lambda: own.status("recital")["error"], "it is noticed")
    eventually(lambda: not alive(engine), "the engine is gone")
    assert own.generate("=").text == TEXTS["="]


@linux
def test_engine_with_a_full_pipe_that_hangs_is_unloaded_by_force(serve: Callable[..., Server], models: Path) -> None:
    own = serve("--models-dir", models, "--ctx", str(LONG_CTX))
    own.generate()
    engine = own.engine("recital.gguf")
    os.kill(engine, signal.SIGSTOP)
    with ThreadPoolExecutor() as pool:
        stuck = [pool.submit(own.generate, "x" * 300_000) for _ in range(3)]
        eventually(lambda: own.status("recital")["requests_waiting"] == 3, "they are on their way")
        started = time.monotonic()
        assert own.unload("recital", "?force=true").json()["status"] == "unloaded"
        assert time.monotonic() - started < 20 and not alive(engine)
        for each in stuck:
            assert_error(each.result(), 500, "generation_failed")


STOPS_ITSELF = (
    "        self.c.llama_backend_init()\n",
    "        if not os.path.exists('once'):\n"
    "            open('once', 'w').close()\n            os.kill(os.getpid(), signal.SIGSTOP)\n",
)


@pytest.fixture
def stopped(serve: Callable[..., Server], models: Path, tmp_path: Path) -> Callable[..., Server]:
    """A server on whose first load the engine stops itself in the middle, with its pid."""

    def start(*changes: tuple[str, str]) -> tuple[Server, int]:
        own = serve("--models-dir", models, script=altered(tmp_path, STOPS_ITSELF, *changes))
        assert own.post("/api/models/recital/load?wait=false").status == 202
        eventually((own.home / "once").exists, "it loads")
        (engine,) = descendants(own.process.pid)
        return own, engine

    return start  # type: ignore[return-value]


@linux
def test_engine_that_hangs_while_it_loads_fails_the_load(stopped: Callable[..., tuple[Server, int]]) -> None:
    own, engine = stopped(*HURRY)
    assert_error(own.generate(), 500, "generation_failed", "said nothing for 3 s")
    assert not alive(engine) and own.generate("=").text == TEXTS["="]


@linux
def test_load_that_hangs_is_ended_by_an_unload_by_force(stopped: Callable[..., tuple[Server, int]]) -> None:
    own, engine = stopped()
    with ThreadPoolExecutor() as pool:
        waiter = pool.submit(own.generate)
        eventually(lambda: own.status("recital")["requests_waiting"], "somebody waits for the load")
        assert own.unload("recital", "?force=true").json()["status"] == "unloaded"
        assert_error(waiter.result(), 500, "generation_failed", "unloaded")
    assert not alive(engine) and own.generate("=").text == TEXTS["="]


@linux
def test_load_that_hangs_does_not_keep_the_server_or_the_engine_alive(stopped: Callable[..., tuple[Server, int]]) -> None:
    own, engine = stopped()
    assert own.stop() == 0
    eventually(lambda: not alive(engine), "the engine is gone")


@linux
@pytest.mark.parametrize("task", ["decode", "sample", "tokenize"])
def test_engine_that_does_not_come_back_from(task: str, serve: Callable[..., Server], models: Path, tmp_path: Path) -> None:
    bounds = {"decode": ("900", "self.main.abort(False)"), "sample": ("120", "urgent = self._sample(plan)"),
              "tokenize": ("300", "tokens = self._tokens(submission.job.prompt)")}  # fmt: skip
    bound, line = bounds[task]
    begins = "        self.pulse.begin('decode')\n" if task == "decode" else ""
    hang = f"{begins.strip()}\n        os.path.exists('hang') and time.sleep(1000)\n        {line}".strip()
    script = altered(tmp_path, (line, hang), (f'"{task}": {bound},', f'"{task}": 1,'))
    own = serve("--models-dir", models, "--ctx", str(LONG_CTX), script=script)
    with own.endless() as stream:
        next(stream)
        (own.home / "hang").touch()
        newcomer = threading.Thread(target=own.generate)
        newcomer.start()
        rest = [event for event in stream if event != "[DONE]"]
        newcomer.join()
    assert f"'{task}' did not come to an end within 1 s" in rest[-1]["error"]["details"]
    (own.home / "hang").unlink()
    assert own.generate("=").text == TEXTS["="]


def test_cancel_does_not_wait_for_the_tokenizer(serve: Callable[..., Server], models: Path, tmp_path: Path) -> None:
    line = "tokens = self._tokens(submission.job.prompt)"
    slow = altered(tmp_path, (line, f"time.sleep(20)\n        {line}"))
    own = serve("--models-dir", models, script=slow)
    own.load("recital")
    started = time.monotonic()
    with own.ws() as ws:
        ws.send(json.dumps({"model": "recital", "prompt": ":"}))
        eventually(lambda: own.status("recital")["requests_waiting"], "it is on its way")
        ws.send('{"cancel": true}')
        assert ws_answer(ws)[1]["finish_reason"] == "cancelled"
    assert time.monotonic() - started < 10


def test_cancel_stops_the_engine_although_nobody_iterates(models: Path) -> None:
    """The thread that iterates may be stuck in a write to a client that does not read."""
    info: Any = types.SimpleNamespace(id="recital", path=str(models / "recital.gguf"), size_bytes=10**6)
    options = module_under_test.EngineOptions(ctx=LONG_CTX, threads=1)
    worker = module_under_test.Worker(info, options, 9, lambda *_: None).start(lambda _: None)
    cancel, sampling = Cancellation(), module_under_test.Sampling(max_tokens=LONG_CTX, temperature=0)
    events = iter(worker.submit([module_under_test.Generate(("#",), sampling, False)], cancel))
    while not isinstance(next(events), module_under_test.Piece):
        pass
    assert worker.counts() == (1, 0)
    cancel.cancel()
    eventually(lambda: worker.counts()[0] == 0, "the engine is idle")
    worker.stop()


def test_server_that_was_stopped_for_a_while_finds_its_engine_alive(
    serve: Callable[..., Server], models: Path, tmp_path: Path
) -> None:
    own = serve("--models-dir", models, script=altered(tmp_path, *HURRY))
    own.load("recital")
    own.signal(signal.SIGSTOP)
    time.sleep(4)
    own.signal(signal.SIGCONT)
    time.sleep(1)
    assert own.status("recital")["loaded"] and "said nothing" not in own.log.read_text()


# Cached bytecode


def settled_copy(folder: Path, name: str = "shimmy.py", age: float = 100, source: str | None = None) -> Path:
    """A copy of shimmy.py that was changed `age` seconds ago."""
    folder.mkdir(exist_ok=True)
    script = folder / name
    script.write_text(source or SHIMMY.read_text())
    os.utime(script, (time.time() - age,) * 2)
    return script


def bytecode_below(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.pyc"))


def build_of(script: Path, home: Path, env: dict[str, str] | None = None) -> str:
    """What a helper process started by this script says of the engine library."""
    return json.loads(shimmy("diag", "--json", home=home, script=script, env=env).stdout)["engine"]


@pytest.mark.parametrize("name", ["shimmy.py", "my server", "a.b.py"])
def test_helper_processes_start_from_bytecode_beside_the_file(name: str, tmp_path: Path) -> None:
    script = settled_copy(tmp_path / "some folder", name)
    said = build_of(script, tmp_path)
    (bytecode,) = bytecode_below(script.parent)
    made = bytecode.stat().st_mtime_ns
    assert "=" in said and build_of(script, tmp_path) == said and bytecode.stat().st_mtime_ns == made


def test_bytecode_of_a_file_in_a_folder_for_all_is_kept_in_the_users_cache(tmp_path: Path) -> None:
    script = settled_copy(tmp_path / "open")
    script.parent.chmod(0o777)
    assert "=" in build_of(script, tmp_path)
    assert bytecode_below(script.parent) == [] and bytecode_below(tmp_path / ".cache" / "shimmy")


def test_file_that_changed_is_compiled_anew(tmp_path: Path) -> None:
    script = settled_copy(tmp_path / "copy", age=200)
    assert "of another kind" not in build_of(script, tmp_path)
    changed = SHIMMY.read_text().replace('.decode().strip(" |\\n"),', '.decode()*0 + "of another kind",')
    settled_copy(tmp_path / "copy", age=100, source=changed)
    assert build_of(script, tmp_path) == "of another kind"


def test_file_changed_this_second_leaves_no_bytecode(tmp_path: Path) -> None:
    script = settled_copy(tmp_path / "copy", age=-1)
    assert "=" in build_of(script, tmp_path) and bytecode_below(tmp_path) == []


def test_bytecode_that_a_stranger_could_have_left_is_not_run(tmp_path: Path) -> None:
    script = settled_copy(tmp_path / "open")
    planted = Path(importlib.util.cache_from_source(str(script)))
    planted.parent.mkdir()
    stat = script.stat()
    code = compile("def build_main(): print('{\"engine\": \"planted\"}')", "planted", "exec")
    head = importlib.util.MAGIC_NUMBER + struct.pack("<III", 0, int(stat.st_mtime), stat.st_size)
    planted.write_bytes(head + marshal.dumps(code))
    assert build_of(script, tmp_path) == "planted"  # as for every import: the folder is ours
    planted.parent.chmod(0o777)
    assert build_of(script, tmp_path) != "planted"


def test_modules_in_the_working_directory_are_not_imported_by_helpers(tmp_path: Path) -> None:
    (tmp_path / "importlib").mkdir()
    for name in ("numpy.py", "ctypes.py", "json.py", "importlib/__init__.py"):
        (tmp_path / name).write_text("raise SystemExit('from the working directory')")
    assert "=" in build_of(settled_copy(tmp_path / "copy"), tmp_path)
