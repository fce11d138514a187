"""The command line's new tests, then new versions of tests of the same name in test_shimmy.py (listed as CHANGED)."""

from __future__ import annotations

import http.server
import select

from test_shimmy import *  # noqa: F403
from test_shimmy import (  # what * leaves out, and what mypy and ruff want named
    EOS,
    HANG,
    LONG_CTX,
    SHIMMY,
    TEXTS,
    Any,
    Callable,
    Iterator,
    Path,
    Server,
    alive,
    altered,
    assert_failed,
    contextlib,
    descendants,
    environment,
    eventually,
    json,
    linux,
    listing,
    models,
    os,
    pytest,
    re,
    serve,
    server,
    shimmy,
    shutil,
    signal,
    socket,
    struct,
    subprocess,
    sys,
    threading,
    through,
    time,
    tool_root,
    write_header,
    write_recital,
)

__all__ = ["EOS", "models", "serve", "server", "tool_root"]  # fixtures

# ---------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "word"),
    [(["serve", "--bogus"], "--bogus"), (["list", "--bogus"], "--bogus"), (["serve", "--port", "many"], "--port"),
     (["generate", "a", "b", "c"], "c"), (["generate", "--chat", "--raw"], "--raw")],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_flag_error_says_what_is_wrong_first(args: list[str], word: str, tmp_path: Path) -> None:
    done = shimmy(*args, home=tmp_path)
    error, hint = done.stderr.decode().splitlines()
    assert done.returncode == 2
    assert error.startswith(f"shimmy {args[0]}: error: ") and word in error
    assert hint == f"try: shimmy {args[0]} --help"


@pytest.mark.parametrize(
    "args",
    [["recital", "please count"], ["recital", "--temperature", "0", "please count"], ["--json", "recital", "please count"]],
    ids=["behind-the-model", "behind-an-option", "options-first"],
)
def test_generate_takes_the_prompt_behind_the_model(args: list[str], models: Path, tmp_path: Path) -> None:
    done = shimmy("generate", *args, "--models-dir", models, home=tmp_path)
    assert "w00 w01 w02" in done.stdout.decode(), done.stderr


def test_generate_with_a_prompt_in_the_models_place_says_where_it_goes(tmp_path: Path) -> None:
    assert_failed(shimmy("generate", "Tell me a joke", home=tmp_path), 2, "Tell me a joke", "--prompt")


def test_generate_with_two_prompts_is_a_usage_error(tmp_path: Path) -> None:
    assert_failed(shimmy("generate", "recital", "one", "--prompt", "two", home=tmp_path), 2, "twice")


def test_serve_with_an_empty_key_is_a_usage_error(tmp_path: Path) -> None:
    assert_failed(shimmy("serve", "--port", "0", "--api-key", "", home=tmp_path), 2, "--api-key")


# ---------------------------------------------------------------------------------------------------
# generate: chat or not, input, output
# ---------------------------------------------------------------------------------------------------


def usage_of(done: subprocess.CompletedProcess[bytes]) -> int:
    return json.loads(done.stdout)["usage"]["prompt_tokens"]


@pytest.mark.parametrize("where", ["here", "by-the-server"])
def test_generate_chats_with_a_model_that_has_a_template(where: str, server: Server, models: Path, tmp_path: Path) -> None:
    env = through(server, models) if where != "here" else {"SHIMMY_MODEL_PATHS": str(models)}
    done = shimmy("generate", "recital", "please count", "--json", home=tmp_path, env=env)
    assert usage_of(done) == 1 + len("[user]please count[assistant]=")


@pytest.mark.parametrize("where", ["here", "by-the-server"])
def test_generate_completes_with_a_model_that_has_no_template(where: str, server: Server, models: Path, tmp_path: Path) -> None:
    env = through(server, models) if where != "here" else {"SHIMMY_MODEL_PATHS": str(models)}
    done = shimmy("generate", "dice", "roll", "--json", "--max-tokens", "3", home=tmp_path, env=env)
    assert usage_of(done) == len("roll")


def test_generate_raw_completes(models: Path, tmp_path: Path) -> None:
    done = shimmy("generate", "recital", "count:", "--raw", "--json", "--models-dir", models, home=tmp_path)
    assert usage_of(done) == 1 + len("count:")


@pytest.mark.parametrize(("flags", "end"), [([], b"\n"), (["--raw"], b"")], ids=["text", "raw"])
def test_generate_into_a_pipe_ends_its_text_with_a_newline_unless_raw(
    flags: list[str], end: bytes, models: Path, tmp_path: Path
) -> None:
    done = shimmy("generate", "recital", "--prompt", ":", *flags, "--models-dir", models, home=tmp_path)
    assert done.stdout == b"Hello wide world" + end


@pytest.mark.parametrize(
    ("flags", "word"),
    [(["--max-tokens", "3"], "--max-tokens 3"), (["--max-tokens", "500", "--ctx", "32"], "context")],
    ids=["max-tokens", "context"],
)
def test_generate_that_is_cut_says_so_without_a_terminal(flags: list[str], word: str, models: Path, tmp_path: Path) -> None:
    done = shimmy("generate", "recital", "--raw", "--prompt", "#", *flags, "--models-dir", models, home=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith(b"Tick tock ")
    assert "cut" in done.stderr.decode() and word in done.stderr.decode()


def test_generate_with_a_schema_that_is_cut_fails(models: Path, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "string", "enum": ["yes and no and yes and no"]}')
    args: list[str | Path] = ["--schema", "schema.json", "--max-tokens", "3", "--models-dir", models]
    done = shimmy("generate", "dice", "--prompt", "Well", *args, home=tmp_path)
    assert done.returncode == 1 and "--max-tokens 3" in done.stderr.decode()


def test_generate_max_tokens_minus_one_goes_to_the_end_of_the_context(models: Path, tmp_path: Path) -> None:
    args: list[str | Path] = ["--max-tokens", "-1", "--ctx", "256", "--json", "--models-dir", models]
    done = shimmy("generate", "recital", "--raw", "--prompt", "#", *args, home=tmp_path)
    assert json.loads(done.stdout)["usage"]["total_tokens"] == 256, done.stderr


def test_generate_names_input_that_is_not_utf_8_once(models: Path, tmp_path: Path) -> None:
    done = shimmy("generate", "recital", "--raw", "--models-dir", models, home=tmp_path, stdin=b"a\xff\xfe\xff:")
    assert done.stdout == b"Hello wide world"
    assert done.stderr.decode().count("not UTF-8") == 1 and len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no endless input here")
def test_generate_bounds_its_standard_input(models: Path, tmp_path: Path) -> None:
    with open("/dev/zero", "rb") as endless:
        command = [sys.executable, str(SHIMMY), "generate", "recital", "--models-dir", str(models)]
        done = subprocess.run(command, stdin=endless, env=environment(tmp_path), capture_output=True, timeout=HANG, check=False)
    assert_failed(done, 1, "standard input", "16.0MB")


def test_generate_says_that_a_pipe_with_data_is_ignored(models: Path, tmp_path: Path) -> None:
    args: list[str | Path] = ["generate", "recital", "--prompt", "hi", "--models-dir", models]
    done = shimmy(*args, home=tmp_path, stdin=b"a diff")
    assert done.stdout.startswith(b"Hello") and "--stdin" in done.stderr.decode()
    assert shimmy(*args, home=tmp_path).stderr == b""


def test_generate_in_a_loop_leaves_the_loops_input_alone(models: Path, tmp_path: Path) -> None:
    one = f"'{sys.executable}' '{SHIMMY}' generate recital --prompt \"$f\" --models-dir '{models}' 2>/dev/null"
    command = ["bash", "-c", f"printf 'a\\nb\\nc\\n' | while read f; do echo $f; {one}; done"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, timeout=HANG, check=True)
    assert [line for line in done.stdout.split() if len(line) == 1] == [b"a", b"b", b"c"]


@pytest.mark.parametrize(
    ("words", "code"),
    [("generate recital --prompt : >&-", 1), ("generate recital <&-", 1), ("generate recital --prompt : <&-", 0), ("list >&-", 1),
     ("list <&-", 0), ("diag >&-", 1), ("diag <&- >&-", 1), ("probe recital >&-", 1), ("generate recital --prompt : 2>&-", 0),
     ("list <&- 2>&-", 0), ("--version >&-", 0), ("generate --bogus 2>&-", 2), ("generate recital --prompt : <&- >&- 2>&-", 1)],
    ids=lambda value: re.sub(r"\W+", "-", value.translate({60: "in", 62: "out"})) if isinstance(value, str) else str(value),
)  # fmt: skip
def test_closed_standard_stream_gives_no_traceback(words: str, code: int, models: Path, tmp_path: Path) -> None:
    line = f"'{sys.executable}' '{SHIMMY}' {words}"
    env = environment(tmp_path, {"SHIMMY_MODEL_PATHS": str(models)})
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, timeout=HANG, check=False)
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr and len(done.stderr.splitlines()) <= 1


def test_serve_with_closed_streams_serves(models: Path, tmp_path: Path) -> None:
    line = f"exec '{sys.executable}' '{SHIMMY}' serve --port 0 --models-dir '{models}' --preload <&- >&-"
    with subprocess.Popen(["bash", "-c", line], env=environment(tmp_path), stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr
        guard = threading.Timer(HANG, running.kill)
        guard.start()
        while "loaded " not in (said := running.stderr.readline()):
            assert said and "Traceback" not in said, said
        running.terminate()
        assert running.wait(HANG) == 0
        guard.cancel()


# ---------------------------------------------------------------------------------------------------
# generate: the running server, or an engine of its own
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["recital", "RECITAL", "recit", "gpt-4", None], ids=["id", "case", "prefix", "alias", "default"])
def test_generate_has_the_server_load_a_model_it_knows(name: str | None, server: Server, models: Path, tmp_path: Path) -> None:
    server.unload("recital")
    words = [name] if name else []
    done = shimmy("-v", "generate", *words, "--prompt", "hi", home=tmp_path, env={"SHIMMY_PORT": str(server.port)})
    assert done.stdout == b"Hello wide world\n", done.stderr
    assert f"the server at http://127.0.0.1:{server.port} does the work" in done.stderr.decode()
    assert server.status("recital")["loaded"]


@pytest.mark.parametrize(
    ("args", "words"),
    [(["recital", "--local"], "--local"), (["recital", "--ctx", "512"], "--ctx"), (["{models}/recital.gguf"], "MODEL is a file"),
     (["unheard"], "knows no model unheard")],
    ids=["local", "engine-knob", "path", "unknown"],
)  # fmt: skip
def test_generate_says_why_it_uses_an_engine_of_its_own(
    args: list[str], words: str, server: Server, models: Path, tmp_path: Path
) -> None:
    write_recital(tmp_path / "models" / "unheard.gguf")
    args: list[str | Path] = [a.format(models=models) for a in args]
    done = shimmy("generate", "-v", *args, "--prompt", "hi", home=tmp_path, env=through(server, models))
    assert done.stdout == b"Hello wide world\n", done.stderr
    assert f"an engine of its own does the work: {words}" in re.sub(r"the server at \S+ ", "", done.stderr.decode())


def test_generate_without_a_server_says_that_none_answers(models: Path, tmp_path: Path) -> None:
    done = shimmy("generate", "-v", "recital", "--prompt", "hi", "--models-dir", models, home=tmp_path)
    assert "no server answers at http://127.0.0.1:9" in done.stderr.decode()


def test_generate_with_models_dir_uses_the_server_that_has_the_same_model(server: Server, models: Path, tmp_path: Path) -> None:
    args: list[str | Path] = ["-v", "generate", "recital", "--prompt", "hi", "--models-dir", models]
    done = shimmy(*args, home=tmp_path, env={"SHIMMY_PORT": str(server.port)})
    assert done.stdout == b"Hello wide world\n" and "does the work, with recital" in done.stderr.decode()


def test_generate_with_models_dir_loads_its_own_file_when_the_server_has_another(
    server: Server, models: Path, tmp_path: Path
) -> None:
    write_recital(tmp_path / "other" / "recital.gguf", name="A longer name than the other one has")
    args: list[str | Path] = ["-v", "generate", "recital", "--prompt", "hi", "--models-dir", tmp_path / "other"]
    done = shimmy(*args, home=tmp_path, env={"SHIMMY_PORT": str(server.port)})
    assert done.stdout == b"Hello wide world\n" and "--models-dir holds another recital" in done.stderr.decode()


@pytest.mark.parametrize("key", [None, "wrong", "schlüssel"], ids=["missing", "wrong", "not-ascii"])
def test_generate_says_that_the_server_refused_the_key(key: str | None, guarded: Server, models: Path, tmp_path: Path) -> None:
    env = through(guarded, models) | ({"SHIMMY_API_KEY": key} if key else {})
    assert_failed(shimmy("generate", "recital", "--prompt", "hi", home=tmp_path, env=env), 1, "the server at", "SHIMMY_API_KEY")


def test_diag_says_that_the_server_refused_the_key(guarded: Server, tmp_path: Path) -> None:
    port = {"SHIMMY_PORT": str(guarded.port)}
    assert b"SHIMMY_API_KEY" in shimmy("diag", home=tmp_path, env=port | {"SHIMMY_API_KEY": "wrong"}).stdout
    assert b"SHIMMY_API_KEY" not in shimmy("diag", home=tmp_path, env=port | {"SHIMMY_API_KEY": "s3cret"}).stdout


def test_generate_sends_a_key_that_is_not_ascii(serve: Callable[..., Server], models: Path, tmp_path: Path) -> None:
    env = {"SHIMMY_API_KEY": "ключ-é"}
    own = serve("--models-dir", models, env=env)
    done = shimmy("-v", "generate", "recital", "--prompt", "hi", home=tmp_path, env=through(own, models) | env)
    assert done.stdout == b"Hello wide world\n" and b"the server at" in done.stderr, done.stderr


def test_generate_gives_the_servers_answer_to_a_prompt_that_is_too_large(server: Server, models: Path, tmp_path: Path) -> None:
    server.load("recital")
    large = b"\n" * (12 << 20)  # 24 MiB as JSON
    done = shimmy("generate", "recital", home=tmp_path, stdin=b"x" + large, env=through(server, models))
    assert_failed(done, 1, "16777216")


class HangsUp(http.server.BaseHTTPRequestHandler):
    """Knows a model that is loaded, and closes the connection on every POST without reading its body."""

    def do_GET(self) -> None:
        model = {"id": "m", "loaded": True, "chat_template": False, "size_bytes": 1}
        body = json.dumps({"model": "m", "models": [model]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, *_: object) -> None:
        pass


def test_generate_through_a_server_that_hangs_up_on_a_large_prompt_fails_in_one_line(tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), HangsUp) as stub:
        threading.Thread(target=stub.serve_forever, daemon=True).start()
        env = {"SHIMMY_PORT": str(stub.server_port)}
        done = shimmy("generate", "m", home=tmp_path, stdin=b"x" * (8 << 20), env=env)
        stub.shutdown()
    assert_failed(done, 1, "server")


# ---------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------


def interruptible() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_ends_the_shells_loop(models: Path, tmp_path: Path) -> None:
    args = f"generate recital --raw --prompt '#' --max-tokens {LONG_CTX} --ctx {LONG_CTX} --models-dir '{models}'"
    script = f"for i in 1 2 3; do echo run $i; '{sys.executable}' '{SHIMMY}' {args}; done; echo behind"
    running = subprocess.Popen(
        ["bash", "-c", script], cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, preexec_fn=interruptible,
    )  # fmt: skip
    assert running.stdout and running.stdout.read(16) == b"run 1\nTick tock "
    os.killpg(running.pid, signal.SIGINT)
    rest, stderr = running.communicate(timeout=HANG)
    assert b"run 2" not in rest and b"behind" not in rest and stderr == b""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
def test_ctrl_c_ends_the_line_on_a_terminal_and_the_engine(models: Path, tmp_path: Path) -> None:
    with terminal("generate", "recital", "--raw", "--prompt", "#", "--max-tokens", str(LONG_CTX), "--ctx", str(LONG_CTX),
                  "--models-dir", models, home=tmp_path) as screen:  # fmt: skip
        screen.read_until("Tick tock ")
        children = descendants(screen.process.pid)
        screen.process.send_signal(signal.SIGINT)
        assert screen.process.wait(HANG) == -signal.SIGINT
        assert screen.rest().endswith("\r\n")
    eventually(lambda: not any(map(alive, children)), "no child is left")


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_serve_goes_on_ignoring_a_signal_that_its_parent_ignores(name: str, models: Path, tmp_path: Path) -> None:
    command = f"trap '' {name[3:]}; exec '{sys.executable}' '{SHIMMY}' serve --port 0 --models-dir '{models}'"
    with subprocess.Popen(["bash", "-c", command], env=environment(tmp_path), stdout=subprocess.PIPE) as running:
        assert running.stdout and b"listening" in running.stdout.readline()
        running.send_signal(getattr(signal, name))
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(0.5)
        running.terminate()
        assert running.wait(HANG) == 0


def test_generate_goes_on_in_the_background_of_a_shell_that_ignores_ctrl_c(models: Path, tmp_path: Path) -> None:
    args = f"generate recital --raw --prompt '#' --temperature 0 --max-tokens 3000 --ctx {LONG_CTX} --models-dir '{models}'"
    command = ["bash", "-c", f"trap '' INT; exec '{sys.executable}' '{SHIMMY}' {args}"]
    with subprocess.Popen(
        command, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    ) as running:
        assert running.stdout and running.stdout.read(5) == b"Tick "
        running.send_signal(signal.SIGINT)
        rest, _ = running.communicate(timeout=HANG)
    assert running.returncode == 0 and len(rest.split()) == 3000 - 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_serve_told_to_stop_while_it_starts_ends_with_0(name: str, models: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(1)\n")
    command = [sys.executable, str(SHIMMY), "serve", "--port", "0", "--tools", "slow.py", "--models-dir", str(models)]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=interruptible,
    ) as running:  # fmt: skip
        eventually((tmp_path / "begun").exists, "the server starts")
        running.send_signal(getattr(signal, name))
        assert running.wait(HANG) == 0
        assert running.stderr and b"Traceback" not in running.stderr.read()


# ---------------------------------------------------------------------------------------------------
# serve tells what it does
# ---------------------------------------------------------------------------------------------------


def test_serve_tells_what_it_loads_and_for_whom_it_waits(serve: Callable[..., Server], models: Path) -> None:
    own = serve("--models-dir", models, "--model", "recital")
    eventually(lambda: "default model: recital; " in own.log.read_text(), "the default model is named")
    with own.stream("/api/generate", {"model": "recital", "prompt": "#", "max_tokens": 1000}) as stream:
        next(stream)
        own.signal(signal.SIGTERM)
        list(stream)
    assert own.process.wait(HANG) == 0
    log = own.log.read_text()
    assert re.search(r"loading recital \(\d+KB\)\n", log)
    assert re.search(r"loaded recital in [\d.]+ s: [\d.]+MB of memory; its KV pool of [\d,]+ tokens takes [\d.]+MB\n", log)
    assert re.search(r"shutting down: waiting up to \d+ s for the requests of recital \(1\)\n", log)


@pytest.mark.parametrize(
    ("flags", "env", "words"),
    [(["--model", "recitl"], {}, ["--model recitl", "did you mean recital?"]),
     (["--alias", "gpt-*=dicee"], {}, ["--alias gpt-*=dicee", "did you mean dice?"]),
     ([], {"SHIMMY_BASE_GGUF": "recitl"}, ["SHIMMY_BASE_GGUF recitl", "did you mean recital?"]),
     (["--model", "zzz"], {}, ["--model zzz"])],
    ids=["model", "alias", "environment", "nothing-near"],
)  # fmt: skip
def test_serve_with_a_name_that_means_no_model_exits_2_naming_the_flag(
    flags: list[str], env: dict[str, str], words: list[str], models: Path, tmp_path: Path
) -> None:
    done = shimmy("serve", "--port", "0", *flags, "--models-dir", models, home=tmp_path, env=env)
    (error,) = [line for line in done.stderr.decode().splitlines() if "error" in line]
    assert done.returncode == 2 and error.startswith("shimmy serve: error: ")
    assert all(word in error for word in words), error


# ---------------------------------------------------------------------------------------------------
# On a terminal
# ---------------------------------------------------------------------------------------------------


class Screen:
    """A terminal (a pty) and what a process writes to it, stdout and stderr alike."""

    def __init__(self, mine: int, process: subprocess.Popen[bytes]) -> None:
        self.mine, self.process, self.seen = mine, process, ""

    def _read(self, seconds: float) -> bool:
        if not select.select([self.mine], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self.mine, 65536)
        except OSError:  # how Linux tells that nobody has the other end
            return False
        self.seen += data.decode("utf-8", "replace")
        return bool(data)

    def read_until(self, words: str) -> str:
        deadline = time.monotonic() + HANG
        while words not in self.seen and time.monotonic() < deadline:
            self._read(1.0)
        assert words in self.seen, self.seen
        return self.seen

    def rest(self) -> str:
        """All that was written, once the process has ended."""
        self.process.wait(HANG)
        while self._read(0.2):
            pass
        return self.seen

    def left(self) -> str:
        """What stands on the screen in the end, if every line that was erased was the last one."""
        return self.rest().rpartition("\r\x1b[K")[2].replace("\r\n", "\n")


@contextlib.contextmanager
def terminal(
    *args: str | Path, home: Path, env: dict[str, str] | None = None, script: Path = SHIMMY, stdin: Any = subprocess.DEVNULL
) -> Iterator[Screen]:
    """Runs the command on a terminal of its own; stdin None is the keyboard."""
    mine, its = os.openpty()
    command = [sys.executable, str(script), *map(str, args)]
    process = subprocess.Popen(
        command, cwd=home, env=environment(home, env), stdin=its if stdin is None else stdin, stdout=its, stderr=its,
        start_new_session=True, preexec_fn=interruptible,
    )  # fmt: skip
    os.close(its)
    try:
        yield Screen(mine, process)
    finally:
        process.kill()
        process.wait(HANG)
        os.close(mine)


def slow_load(folder: Path) -> Path:
    """A shimmy.py that takes its time over starting the engine and over the context."""
    places = ("        self.main = Context(self, ", "        self.c, self.np, self.ctypes = import")
    return altered(folder, *((place, "        time.sleep(0.7)\n" + place) for place in places))


pty = pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")


@pty
@pytest.mark.parametrize("where", ["here", "by-the-server"])
def test_generate_on_a_terminal_says_what_it_waits_for_until_the_first_word(
    where: str, serve: Callable[..., Server], models: Path, tmp_path: Path
) -> None:
    script, env = slow_load(tmp_path), {"SHIMMY_MODEL_PATHS": str(models)}
    if where != "here":
        env["SHIMMY_PORT"] = str(serve("--models-dir", models, script=script).port)
    with terminal("generate", "recital", "hi", home=tmp_path, env=env, script=script) as screen:
        assert screen.left() == "Hello wide world\n"
    assert "starting the engine for recital" in screen.seen and "preparing the context of recital" in screen.seen


@pty
def test_generate_on_a_terminal_says_how_many_tokens_it_reads(models: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("a" * 30_000 + ":")
    with (tmp_path / "long.txt").open("rb") as text, terminal(
        "generate", "recital", "--raw", "--ctx", str(LONG_CTX), "--models-dir", models, home=tmp_path, stdin=text
    ) as screen:
        assert screen.left() == "Hello wide world\n"
    assert "reading 30,002 tokens" in screen.seen


@pty
def test_waiting_line_disappears_before_an_error(models: Path, tmp_path: Path) -> None:
    with terminal("generate", "hollow", "hi", "--models-dir", models, home=tmp_path) as screen:
        assert re.fullmatch(r"shimmy: The model could not be loaded: .*\n", screen.left())


@pty
def test_generate_that_reads_the_keyboard_says_so(models: Path, tmp_path: Path) -> None:
    with terminal("generate", "recital", "--models-dir", models, home=tmp_path, stdin=None) as screen:
        screen.read_until("reading standard input, end with Ctrl-D")
        os.write(screen.mine, b"hello\n\x04")
        assert screen.left() == "Hello wide world\n"


# ---------------------------------------------------------------------------------------------------
# list, --lines
# ---------------------------------------------------------------------------------------------------


def test_list_says_whether_a_model_fits_the_memory(models: Path, tmp_path: Path) -> None:
    with write_header(tmp_path / "huge" / "huge.gguf").open("r+b") as huge:
        huge.truncate(1 << 43)  # sparse
    args: list[str | Path] = ["--models-dir", models, "--models-dir", tmp_path / "huge"]
    table = shimmy("list", *args, home=tmp_path).stdout.decode().splitlines()
    column = table[0].index("FITS")
    fits = {line.split()[0]: line[column:].split()[0] for line in table[1:]}
    assert (fits["recital"], fits["huge"]) == ("yes", "no")
    found = listing(tmp_path, *args).models
    assert (found["recital"]["fits"], found["huge"]["fits"]) == (True, False)


@pytest.mark.parametrize("flags", [[], ["--short"], ["-v"]], ids=["table", "short", "verbose"])
def test_list_escapes_what_does_not_print(flags: list[str], tmp_path: Path) -> None:
    write_header(tmp_path / "models" / "evil\x1b[31m\nforged  row.gguf")
    (tmp_path / "models" / "broken\x1b[31m\nforged.gguf").write_bytes(b"nothing")
    done = shimmy("list", *flags, home=tmp_path)
    assert done.returncode == 0 and b"evil" in done.stdout
    assert b"\x1b" not in done.stdout + done.stderr
    assert not any(line.startswith(b"forged") for line in (done.stdout + done.stderr).splitlines())


def test_list_in_a_plain_locale_shows_names_it_cannot_write(tmp_path: Path) -> None:
    write_header(tmp_path / "models" / "café.gguf")
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = shimmy("list", home=tmp_path, env=env)
    assert done.returncode == 0 and b"caf" in done.stdout and b"Traceback" not in done.stderr


def lines_of(done: subprocess.CompletedProcess[bytes]) -> list[Any]:
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("where", ["here", "by-the-server"])
def test_generate_lines_answers_each_line_in_order(where: str, server: Server, models: Path, tmp_path: Path) -> None:
    env = through(server, models) if where != "here" else {"SHIMMY_MODEL_PATHS": str(models)}
    prompts = [b"say :", b"say =", b"say ~"] * 4
    done = shimmy("generate", "recital", "--raw", "--lines", home=tmp_path, stdin=b"\n".join(prompts), env=env)
    texts = [line["choices"][0]["text"] for line in lines_of(done)]
    assert done.returncode == 0 and texts == [TEXTS[chr(p[-1])] for p in prompts]


def test_generate_lines_puts_prompt_before_each_line(models: Path, tmp_path: Path) -> None:
    args: list[str | Path] = ["--raw", "--lines", "--prompt", "Sum", "--models-dir", models]
    done = shimmy("generate", "recital", *args, home=tmp_path, stdin=b"ab:\r\nc:\n")
    assert [line["usage"]["prompt_tokens"] for line in lines_of(done)] == [1 + len("Sum\nab:"), 1 + len("Sum\nc:")]


def test_generate_lines_with_a_line_that_fails_goes_on_and_exits_1(models: Path, tmp_path: Path) -> None:
    args: list[str | Path] = ["--raw", "--lines", "--ctx", "128", "--models-dir", models]
    done = shimmy("generate", "recital", *args, home=tmp_path, stdin=b"a:\n" + b"b" * 300 + b"\n\nc:\n")
    first, long, empty, last = lines_of(done)
    assert done.returncode == 1 and first["choices"][0]["text"] == last["choices"][0]["text"] == TEXTS[":"]
    assert long["error"]["code"] == "context_length_exceeded" and empty["error"]["code"] == "invalid_request"


def test_generate_lines_answers_a_line_before_the_next_one_comes(models: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SHIMMY), "generate", "recital", "--raw", "--lines", "--models-dir", str(models)]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(tmp_path), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as running:
        assert running.stdin and running.stdout
        for prompt in (":", "="):
            running.stdin.write(f"{prompt}\n".encode())
            assert json.loads(running.stdout.readline())["choices"][0]["text"] == TEXTS[prompt]
        running.stdin.close()
        assert running.wait(HANG) == 0


def test_generate_lines_into_a_closed_pipe_ends_quietly(models: Path, tmp_path: Path) -> None:
    one = f"'{sys.executable}' '{SHIMMY}' generate recital --raw --lines --models-dir '{models}'"
    command = ["bash", "-c", f"yes : | {one} | head -n 2"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, timeout=HANG, check=False)
    assert len(done.stdout.splitlines()) == 2 and done.stderr == b""


# ---------------------------------------------------------------------------------------------------
# CHANGED: new versions of tests of the same name in test_shimmy.py
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(  # CHANGED: a second positional is the prompt, a third one is too many
    "args",
    [["bogus"], ["list", "--bogus"], ["serve", "--port", "many"], ["serve", "--port", "70000"],
     ["serve", "--keep-alive", "soon"], ["serve", "--max-loaded", "none"], ["serve", "--kv-type", "f13"],
     ["serve", "--alias", "nothing"], ["generate", "--max-tokens", "many"], ["generate", "a", "b", "c"]],
)  # fmt: skip
def test_usage_error_exits_2_without_a_traceback(args: list[str], tmp_path: Path) -> None:
    done = shimmy(*args, home=tmp_path)
    assert done.returncode == 2 and done.stdout == b""
    assert done.stderr and b"Traceback" not in done.stderr


# CHANGED from here on: --raw, because a model with a template chats by default
def test_generate_prints_unicode(models: Path, tmp_path: Path) -> None:
    done = shimmy("generate", "recital", "--raw", "--prompt", "~", "--models-dir", models, home=tmp_path)
    assert done.stdout.decode() == TEXTS["~"]


@pytest.mark.parametrize("args", [[], ["--prompt", "-"]])
def test_generate_without_a_prompt_reads_stdin(args: list[str], models: Path, tmp_path: Path) -> None:
    done = shimmy("generate", "recital", "--raw", *args, "--models-dir", models, home=tmp_path, stdin=b"say =")
    assert done.stdout.decode() == TEXTS["="]


def test_generate_stdin_is_appended_after_a_newline(models: Path, tmp_path: Path) -> None:
    args: list[str | Path] = ["generate", "recital", "--raw", "--prompt", "Sum:", "--stdin", "--json", "--models-dir", models]
    document = json.loads(shimmy(*args, home=tmp_path, stdin=b"log =").stdout)
    assert document["choices"][0]["text"] == TEXTS["="]
    assert document["usage"]["prompt_tokens"] == 1 + len("Sum:\nlog =")


def test_generate_json_prints_the_documented_response(models: Path, tmp_path: Path) -> None:
    done = shimmy("generate", "recital", "--raw", "--prompt", "ab:", "--json", "--models-dir", models, home=tmp_path)
    document = json.loads(done.stdout)
    assert document["choices"] == [{"text": "Hello wide world", "index": 0, "finish_reason": "stop"}]
    usage = document["usage"]
    assert usage["prompt_tokens"] == 4
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_generate_options_reach_the_sampler(models: Path, tmp_path: Path) -> None:
    args = ["--json", "--max-tokens", "5", "--stop", "w03", "--temperature", "0", "--top-p", "0.9", "--top-k", "3"]
    done = shimmy("generate", "recital", "--raw", "--prompt", "=", *args, "--models-dir", models, home=tmp_path)
    choice = json.loads(done.stdout)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("w00 w01 w02 ", "stop")


def test_generate_writes_utf_8_in_any_locale(models: Path, tmp_path: Path) -> None:
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = shimmy("generate", "recital", "--raw", "--prompt", "~", "--models-dir", models, home=tmp_path, env=env)
    assert done.stdout.decode() == TEXTS["~"], done.stderr


def test_generate_prompt_longer_than_the_context_reports_both_lengths(models: Path, tmp_path: Path) -> None:
    args: list[str | Path] = ["generate", "recital", "--raw", "--ctx", "128", "--prompt", "a" * 200, "--models-dir", models]
    assert_failed(shimmy(*args, home=tmp_path), 1, "201", "128")


def test_generate_accepts_engine_options(models: Path, tmp_path: Path) -> None:
    knobs = ["--threads", "1", "--batch", "32", "--no-mmap", "--kv-type", "q8_0", "--gpu-layers", "0", "--parallel", "2"]
    args: list[str | Path] = ["generate", "recital", "--raw", "--prompt", "a" * 90 + "=", *knobs, "--models-dir", models]
    done = shimmy(*args, home=tmp_path)
    assert done.stdout.decode().split() == TEXTS["="].split(), done.stderr


def test_generate_into_a_closed_pipe_prints_no_error(models: Path, tmp_path: Path) -> None:
    command = (
        f"'{sys.executable}' '{SHIMMY}' generate recital --raw --models-dir '{models}' --ctx {LONG_CTX}"
        f" --max-tokens {LONG_CTX} --prompt '#' | head -c 20"
    )
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment(tmp_path), capture_output=True, timeout=HANG, check=False
    )
    assert (done.stdout, done.stderr) == (b"Tick tock tick tock ", b"")


# CHANGED too: Ctrl-C is death by SIGINT, which a shell shows as 130 and subprocess as -2
def test_generate_flushes_each_piece_and_exits_130_on_ctrl_c(models: Path, tmp_path: Path) -> None:
    args = ["generate", "recital", "--raw", "--prompt", "#", "--max-tokens", str(LONG_CTX), "--ctx", str(LONG_CTX)]
    running = subprocess.Popen(
        [sys.executable, str(SHIMMY), *args, "--models-dir", str(models)], cwd=tmp_path, env=environment(tmp_path),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=interruptible,
    )  # fmt: skip
    assert running.stdout and running.stdout.read(10) == b"Tick tock "
    os.killpg(running.pid, signal.SIGINT)  # a terminal sends it to the whole group
    _, stderr = running.communicate(timeout=HANG)
    assert running.returncode == -signal.SIGINT and b"Traceback" not in stderr


def test_generate_uses_a_running_server_that_has_the_model_loaded(server: Server, models: Path, tmp_path: Path) -> None:
    server.load("recital")
    before = server.status("recital")["last_used"]
    done = shimmy("generate", "recital", "--raw", "--prompt", "=", home=tmp_path, env=through(server, models))
    assert done.stdout.decode() == TEXTS["="]
    assert server.status("recital")["last_used"] != before


# CHANGED: test_generate_loads_the_model_itself_when_the_server_has_not goes; instead the server loads it, see
# test_generate_has_the_server_load_a_model_it_knows


def test_generate_through_a_server_that_dies_fails_in_one_line(
    serve: Callable[..., Server], models: Path, tmp_path: Path
) -> None:
    server = serve("--models-dir", models, "--ctx", str(LONG_CTX))
    server.load("recital")
    command = [sys.executable, str(SHIMMY), "generate", "recital", "--raw", "--prompt", "#", "--max-tokens", str(LONG_CTX)]
    env = environment(tmp_path, through(server, models))
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout and running.stdout.read(5) == b"Tick "
        server.process.kill()
        _, stderr = running.communicate(timeout=HANG)
    assert running.returncode == 1 and len(stderr.splitlines()) == 1 and b"Traceback" not in stderr


def test_generate_through_a_server_into_a_closed_pipe_cancels(server: Server, models: Path, tmp_path: Path) -> None:
    server.load("recital")
    command = f"'{sys.executable}' '{SHIMMY}' generate recital --raw --max-tokens {LONG_CTX} --prompt '#' | head -c 20"
    env = environment(tmp_path, through(server, models))
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, timeout=HANG, check=False)
    assert (done.stdout, done.stderr) == (b"Tick tock tick tock ", b"")
    eventually(lambda: server.status("recital")["requests_running"] == 0, "the server stops generating")


_ = (linux, shutil)
