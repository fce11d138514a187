from test_shimmy import *  # noqa

import math

# ── Ollama ────────────────────────────────────────────────────────────────────────────────────────────────────────────
# Its routes in its own shapes: raw HTTP first, then its packages.


def post_lines(server: Server, path: str, body: dict[str, Any], **headers: str) -> list[dict[str, Any]]:
    """Posts a body and returns the lines of its answer, which must be newline-delimited JSON."""
    reply = server.post(path, {"model": "recital", **body}, **headers)
    assert reply.status == 200, reply.body
    assert reply.headers["Content-Type"] == "application/x-ndjson" and reply.body.endswith(b"\n")
    return [json.loads(line) for line in reply.body.splitlines()]


def ollama_chat(server: Server, content: str = "hi", **fields: Any) -> dict[str, Any]:
    """One plain answer of /api/chat."""
    body = {"model": "recital", "messages": [{"role": "user", "content": content}], "stream": False, **fields}
    reply = server.post("/api/chat", body)
    assert reply.status == 200, reply.body
    return reply.json()


def assert_ollama_error(reply: Reply, status: int, *words: str) -> None:
    """Asserts Ollama's shape of an error: a text and nothing else."""
    assert reply.status == status, reply.body
    error = reply.json()
    assert list(error) == ["error"] and isinstance(error["error"], str) and "Traceback" not in error["error"]
    for word in words:
        assert word in error["error"], error


def test_ollama_chat_streams_lines_unless_told_otherwise(server: Server) -> None:
    *pieces, end = post_lines(server, "/api/chat", {"messages": [{"role": "user", "content": "hi"}]})
    assert "".join(p["message"]["content"] for p in pieces) == "Hello wide world"
    for piece in pieces:
        assert set(piece) == {"model", "created_at", "message", "done"} and piece["done"] is False
        assert piece["message"]["role"] == "assistant" and piece["model"] == "recital"
    assert end["done"] is True and end["done_reason"] == "stop" and end["message"]["content"] == ""
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", end["created_at"])


def test_ollama_chat_plain_is_one_document_with_counts(server: Server) -> None:
    usage = server.chat("hi").json()["usage"]
    reply = ollama_chat(server)
    assert reply["message"] == {"role": "assistant", "content": "Hello wide world"} and reply["done"] is True
    assert (reply["prompt_eval_count"], reply["eval_count"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert reply["total_duration"] >= reply["load_duration"] > 0 and reply["prompt_eval_duration"] > 0 < reply["eval_duration"]


def test_ollama_chat_takes_a_tag_and_echoes_the_name(server: Server) -> None:
    assert ollama_chat(server, model="Recital:latest")["model"] == "Recital:latest"


@streamed_and_plain
def test_ollama_chat_tells_thoughts_apart(server: Server, stream: bool) -> None:
    message = server.chat("please think", chat_template_kwargs={}).message
    body = {"messages": [{"role": "user", "content": "please think"}], "think": True}
    answers = post_lines(server, "/api/chat", body) if stream else [ollama_chat(server, "please think", think=True)]
    assert "".join(a["message"].get("thinking", "") for a in answers) == message.get("reasoning_content", "")
    assert "".join(a["message"]["content"] for a in answers) == message["content"]


@streamed_and_plain
def test_ollama_chat_calls_tools_with_objects(server: Server, stream: bool) -> None:
    body = {"messages": [{"role": "user", "content": "weather twice"}], "tools": [WEATHER], "stream": stream}
    answers = post_lines(server, "/api/chat", body) if stream else [ollama_chat(server, "weather", tools=[WEATHER])]
    (call,) = [call for a in answers for call in a["message"].get("tool_calls", [])]
    assert call["function"] == {"index": 0, "name": "get_weather", "arguments": {"city": "Paris"}} and call["id"]
    assert answers[-1]["done_reason"] == "stop"


def test_ollama_chat_streams_two_calls_one_after_another(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "twice"}], "tools": [{"function": ADD["function"]}]}
    calls = [c["function"] for a in post_lines(server, "/api/chat", body) for c in a["message"].get("tool_calls", [])]
    assert [(c["index"], c["arguments"]) for c in calls] == [(0, {"a": 1}), (1, {"a": 2})]


def test_ollama_chat_reads_calls_and_their_results(server: Server) -> None:
    call = {"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    turns = [
        {"role": "user", "content": "weather"},
        {"role": "assistant", "tool_calls": [call], "thinking": "hm"},
        {"role": "tool", "tool_name": "get_weather", "content": "sunny"},
    ]
    assert ollama_chat(server, messages=turns, tools=[WEATHER])["message"]["content"] == TEXTS["S"]


@cases(
    "options,text,reason",
    {
        "limit": ({"num_predict": 2}, "Hello wide", "length"),
        "no limit": ({"num_predict": -1}, "Hello wide world", "stop"),
        "limit of zero is none": ({"num_predict": 0}, "Hello wide world", "stop"),
        "stop strings": ({"stop": ["wide"]}, "Hello ", "stop"),
        "seed below zero": ({"seed": -1, "num_predict": 1, "temperature": 0}, "Hello", "length"),
        "what is decided at the load": ({"num_ctx": 4096, "num_gpu": 1, "numa": False}, "Hello wide world", "stop"),
    },
)
def test_ollama_options_hold(server: Server, options: dict[str, Any], text: str, reason: str) -> None:
    reply = ollama_chat(server, options=options)
    assert (reply["message"]["content"], reply["done_reason"]) == (text, reason)


def test_ollama_format_holds_a_schema(server: Server) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    reply = ollama_chat(server, model="dice", format=schema, options={"temperature": 0, "num_predict": 60})
    assert isinstance(json.loads(reply["message"]["content"])["ok"], bool)


def test_ollama_format_json_is_an_object(server: Server) -> None:
    reply = ollama_chat(server, model="dice", format="json", options={"temperature": 0, "num_predict": 4})
    assert reply["message"]["content"].lstrip().startswith("{")


def test_ollama_logprobs_stand_beside_the_text(server: Server) -> None:
    (first, *_) = ollama_chat(server, logprobs=True, top_logprobs=2)["logprobs"]
    assert first["token"] == "Hello" and len(first["top_logprobs"]) == 2


@cases(
    "body,headers",
    {
        "options": ({"options": {}}, {}),
        "raw": ({"raw": False}, {}),
        "keep_alive": ({"keep_alive": "5m"}, {}),
        "think": ({"think": False}, {}),
        "format": ({"format": ""}, {}),
        "system with options": ({"system": "be kind", "options": {}}, {}),
        "its Python package": ({}, {"User-Agent": "ollama-python/0.6.3 (x86_64 linux) Python/3.12"}),
        "its JavaScript package": ({}, {"User-Agent": "ollama-js/0.6.4 (x64 linux Node.js/v22)"}),
        "its own program": ({}, {"User-Agent": "ollama/0.14.0 (amd64 linux) Go/go1.24"}),
    },
)
def test_ollama_generate_is_told_by_field_or_agent(server: Server, body: dict[str, Any], headers: dict[str, str]) -> None:
    *pieces, end = post_lines(server, "/api/generate", {"prompt": "hi", **body}, **headers)
    assert "".join(p["response"] for p in pieces) == "Hello wide world" and end["done_reason"] == "stop"


@cases("body", {"plain": {"prompt": "hi:"}, "null fields": {"prompt": "hi:", "options": None, "think": None},
                "system alone": {"prompt": "hi", "system": "be kind"},
                "messages": {"messages": [{"role": "user", "content": "hi"}]}})  # fmt: skip
def test_generate_without_a_field_of_ollama_is_the_documented_one(server: Server, body: dict[str, Any]) -> None:
    assert server.post("/api/generate", {"model": "recital", **body}).text == "Hello wide world"


def test_ollama_generate_raw_leaves_the_template_out(server: Server) -> None:
    body = {"model": "recital", "prompt": "=", "raw": True, "stream": False}
    reply = server.post("/api/generate", body).json()
    assert reply["response"] == TEXTS["="] and reply["prompt_eval_count"] == 2


@cases(
    "body,words",
    {
        "images": ({"images": ["aGk="]}, ["images", "no model here sees"]),
        "template": ({"template": "{{ .Prompt }}"}, ["template is not served"]),
        "context": ({"context": [1, 2]}, ["context is not served", "/api/chat"]),
        "raw with system": ({"raw": True, "system": "x"}, ["system needs"]),
        "suffix without such tokens": ({"suffix": "x"}, ["cannot fill a gap"]),
    },
)
def test_ollama_generate_refuses_by_name(server: Server, body: dict[str, Any], words: list[str]) -> None:
    assert_ollama_error(server.post("/api/generate", {"model": "recital", "prompt": "x", **body}), 400, *words)


def test_ollama_empty_requests_load_and_let_go(serve: Callable[..., Server], models: Path) -> None:
    server = serve("--models-dir", models)
    (loaded,) = post_lines(server, "/api/generate", {"keep_alive": -1})
    assert loaded["done_reason"] == "load" and server.status("recital")["loaded"]
    assert [m["name"] for m in server.get("/api/ps").json()["models"]] == ["recital:latest"]
    (gone,) = post_lines(server, "/api/chat", {"messages": [], "keep_alive": 0})
    assert gone["done_reason"] == "unload"
    eventually(lambda: server.get("/api/ps").json() == {"models": []}, "the model goes")


@cases("keep", {"seconds": 1, "a duration": "1000ms"})
def test_ollama_keep_alive_holds_for_its_model(serve: Callable[..., Server], models: Path, keep: Any) -> None:
    server = serve("--models-dir", models)
    server.load("dice")
    ollama_chat(server, keep_alive=keep)
    assert [m["model"] for m in server.get("/api/ps").json()["models"]] == ["dice:latest", "recital:latest"]
    eventually(lambda: server.status("recital")["status"] == "unloaded", "its time is over")
    assert server.status("dice")["loaded"]


def test_ollama_keep_alive_zero_unloads_behind_the_answer(serve: Callable[..., Server], models: Path) -> None:
    server = serve("--models-dir", models)
    assert ollama_chat(server, keep_alive="0")["message"]["content"] == "Hello wide world"
    eventually(lambda: server.status("recital")["status"] == "unloaded", "the model goes")


def test_ollama_keep_alive_of_ages_leaves_the_others_theirs(serve: Callable[..., Server], models: Path) -> None:
    server = serve("--models-dir", models)
    ollama_chat(server, model="dice", keep_alive="999999999h", options={"num_predict": 1})
    ollama_chat(server, keep_alive=1)
    eventually(lambda: server.status("recital")["status"] == "unloaded", "its time is over")
    (dice,) = server.get("/api/ps").json()["models"]
    assert dice["name"] == "dice:latest" and int(dice["expires_at"][:4]) < 2100


def test_ollama_ps_tells_when_a_model_goes(serve: Callable[..., Server], models: Path) -> None:
    server = serve("--models-dir", models)
    ollama_chat(server, keep_alive="2h")
    (model,) = server.get("/api/ps").json()["models"]
    assert model["size"] > 0 and model["size_vram"] == 0 and model["context_length"] == 8192
    hours = (time.mktime(time.strptime(model["expires_at"][:19], "%Y-%m-%dT%H:%M:%S")) - time.mktime(time.gmtime())) / 3600
    assert 1.9 < hours <= 2.01


def test_ollama_tags_list_every_model(server: Server, models: Path) -> None:
    listed = server.get("/api/tags").json()["models"]
    assert {"recital:latest", "dice:latest", "hollow:latest"} <= {m["name"] for m in listed}
    recital = next(m for m in listed if m["name"] == "recital:latest")
    assert recital["model"] == recital["name"] and recital["size"] == (models / "recital.gguf").stat().st_size
    assert re.fullmatch("[0-9a-f]{64}", recital["digest"]) and recital["modified_at"].endswith("Z")
    size = recital["details"].pop("parameter_size")
    assert size.endswith("K") and recital["details"] == {
        "parent_model": "", "format": "gguf", "family": "llama", "families": ["llama"], "quantization_level": "F16"
    }  # fmt: skip


def test_ollama_digest_changes_with_the_file(serve: Callable[..., Server], tmp_path: Path) -> None:
    file = write_dice(tmp_path / "own" / "dice.gguf")
    server = serve("--models-dir", tmp_path / "own")

    def digest() -> str:
        return next(m["digest"] for m in server.get("/api/tags").json()["models"] if m["name"] == "dice:latest")

    before = digest()
    os.utime(file, (1, 1))
    assert before != digest()


@cases("field", {"its field": "model", "its older field": "name"})
def test_ollama_show_tells_all(server: Server, models: Path, field: str) -> None:
    reply = server.post("/api/show", {field: "recital:latest", "verbose": True})
    document = reply.json()
    assert document["template"] == TEMPLATE and {"completion", "tools"} <= set(document["capabilities"])
    told = document["model_info"]
    assert (told["general.architecture"], told["llama.context_length"]) == ("llama", LONG_CTX)
    assert told["general.basename"] == "Recital" and document["details"]["quantization_level"] == "F16"
    assert str(models).encode() not in reply.body


def test_ollama_version_is_one_that_clients_accept(server: Server) -> None:
    assert tuple(map(int, server.get("/api/version").json()["version"].split("."))) >= (0, 13, 4)  # what Codex asks for


def test_ollama_embed_gives_normalised_vectors(server: Server) -> None:
    reply = server.post("/api/embed", {"model": "dice", "input": ["in the", "thin"]}).json()
    assert [round(math.hypot(*v), 3) for v in reply["embeddings"]] == [1.0, 1.0]
    assert reply["model"] == "dice" and reply["prompt_eval_count"] > 2 and reply["total_duration"] > 0
    older = server.post("/api/embeddings", {"model": "dice", "prompt": "thin"}).json()
    assert np.allclose(older["embedding"], reply["embeddings"][1], atol=1e-3)


def test_ollama_embed_cuts_what_is_too_long_unless_told_not_to(server: Server) -> None:
    body = {"model": "dice", "input": "x" * 5000}
    assert server.post("/api/embed", body).json()["prompt_eval_count"] == 256
    assert_ollama_error(server.post("/api/embed", {**body, "truncate": False}), 400, "5000")


@cases("path,body,answer", {"embed": ("/api/embed", {"input": []}, ("embeddings", [])),
                            "embeddings": ("/api/embeddings", {"prompt": ""}, ("embedding", []))})  # fmt: skip
def test_ollama_empty_input_only_loads(server: Server, path: str, body: dict[str, Any], answer: tuple[str, Any]) -> None:
    assert server.post(path, {"model": "dice", **body}).json()[answer[0]] == answer[1]


@cases(
    "path,body,status,words",
    {
        "unknown model": ("/api/chat", {"model": "nonesuch", "messages": []}, 404, ["not found", "nonesuch"]),
        "no model": ("/api/chat", {"messages": []}, 400, ["model is required"]),
        "unknown model shown": ("/api/show", {"model": "nonesuch"}, 404, ["not found"]),
        "nothing shown": ("/api/show", {}, 400, ["model is required"]),
        "pull": ("/api/pull", {"model": "llama3"}, 400, ["pull is not served"]),
        "images": ("/api/chat", {"model": "recital", "messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, 400,
                   ["messages[0].images"]),
        "unknown format": ("/api/chat", {"model": "recital", "messages": [], "format": "yaml"}, 400, ["format", "json"]),
        "keep_alive": ("/api/chat", {"model": "recital", "messages": [], "keep_alive": "soon"}, 400, ["keep_alive", "5m"]),
        "temperature": ("/api/chat", {"model": "recital", "messages": [], "options": {"temperature": 9}}, 400, ["temperature"]),
        "too long": ("/api/generate", {"model": "dice", "prompt": "x" * 300, "raw": True}, 400, ["context"]),
        "a list": ("/api/chat", [1], 400, ["JSON object"]),
        "wrong model": ("/api/embed", {"model": 5, "input": "x"}, 400, ["model must be a string"]),
    },
)  # fmt: skip
def test_ollama_errors_are_a_text(server: Server, path: str, body: Any, status: int, words: list[str]) -> None:
    assert_ollama_error(server.post(path, body), status, *words)


WRONG = [0, -9, 1.5, True, "nonsense", "", [], [1], [[]], ["x"], {}, {"a": 1}, 10**400, [None]]
OLLAMA_FIELDS = ["model", "stream", "format", "options", "keep_alive", "think", "logprobs", "top_logprobs"]
OPTION_NAMES = ["num_predict", "temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_last_n", "repeat_penalty",
                "presence_penalty", "frequency_penalty", "seed", "stop", "num_ctx"]  # fmt: skip
WRONG_BODIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "chat": ("/api/chat", {"messages": [{"role": "user", "content": "hi"}]}, [*OLLAMA_FIELDS, "messages", "tools"]),
    "generate": ("/api/generate", {"prompt": "hi", "raw": True},
                 [*OLLAMA_FIELDS, "prompt", "raw", "suffix", "system", "template", "context", "images"]),
    "embed": ("/api/embed", {"input": "hi"}, ["model", "input", "truncate", "dimensions", "options", "keep_alive"]),
    "embeddings": ("/api/embeddings", {"prompt": "hi"}, ["model", "prompt", "options", "keep_alive"]),
    "show": ("/api/show", {}, ["model", "name"]),
    "completion": ("/completion", {"prompt": ":"},
                   ["model", "prompt", "n_predict", "stream", "stop", "seed", "n_probs", "response_fields", "t_max_predict_ms",
                    "logit_bias", "temperature", "grammar", "json_schema", "n_cmpl", "ignore_eos"]),
    "infill": ("/infill", {"input_prefix": "a", "input_suffix": "b"}, ["input_prefix", "input_suffix", "input_extra", "prompt"]),
    "tokenize": ("/tokenize", {"content": "a"}, ["model", "content", "add_special", "parse_special", "with_pieces"]),
    "detokenize": ("/detokenize", {"tokens": [5]}, ["model", "tokens"]),
    "apply-template": ("/apply-template", {"messages": [{"role": "user", "content": "hi"}]}, ["model", "messages", "tools"]),
}  # fmt: skip


@cases("path,body,fields", WRONG_BODIES)
def test_wrong_fields_are_never_the_server_fault(server: Server, path: str, body: dict[str, Any], fields: list[str]) -> None:
    limits: dict[str, Any] = {"model": "recital", "stream": False, "n_predict": 2, "options": {"num_predict": 2}}
    for name, value in itertools.product(fields, WRONG):
        reply = server.post(path, {**limits, **body, name: value})
        assert reply.status in (200, 400, 404), (name, value, reply.body)
        assert reply.status == 200 or "error" in reply.json(), (name, value)
        if name == "model" and not isinstance(value, str):
            assert reply.status == 400, (value, reply.body)


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_ollama_wrong_options_are_refused_by_name(server: Server, name: str) -> None:
    for value in ("nonsense" if name != "stop" else 5, {}, [1], True):
        body = {"model": "recital", "prompt": "hi", "options": {"num_predict": 1, name: value}}
        assert_ollama_error(server.post("/api/generate", body), 400, name)


@linux
@cases("path,body", {"chat": ("/api/chat", {"messages": [{"role": "user", "content": "forever"}]}),
                     "generate": ("/api/generate", {"prompt": "#", "raw": True})})  # fmt: skip
def test_ollama_stream_that_breaks_off_ends_with_an_error_line(
    serve: Callable[..., Server], models: Path, path: str, body: dict[str, Any]
) -> None:
    server = serve("--models-dir", models, "--ctx", str(LONG_CTX))
    with contextlib.closing(server.connect()) as connection:
        connection.request("POST", path, encoded({"model": "recital", **body}))
        response = connection.getresponse()
        assert json.loads(response.readline())["done"] is False
        os.kill(server.engine("recital.gguf"), signal.SIGKILL)
        *_, last = response.read().splitlines()
    assert list(json.loads(last)) == ["error"] and "engine process ended" in json.loads(last)["error"]


def test_ollama_silence_is_filled_with_spaces(serve: Callable[..., Server], models: Path, tmp_path: Path) -> None:
    slow = altered(
        tmp_path, ("PING_SECONDS = 15.0", "PING_SECONDS = 0.1"),
        ('self.pulse.begin("tokenize")', 'time.sleep(1.0); self.pulse.begin("tokenize")'),
    )  # fmt: skip
    server = serve("--models-dir", models, script=slow)
    server.load("recital")
    reply = server.post("/api/chat", {"model": "recital", "messages": [{"role": "user", "content": "hi"}]})
    assert reply.body.startswith(b"    ")
    assert "".join(json.loads(line)["message"]["content"] for line in reply.body.splitlines()) == "Hello wide world"


# ── llama-server ──────────────────────────────────────────────────────────────────────────────────────────────────────
# Its own routes, as editors call them.

GAP_TOKENS = ["<unk>", "<s>", "</s>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", *VOCABULARY[6:]]


@pytest.fixture(scope="module")
def gaps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a small context and a model that has tokens for gaps, behind which it says Hello wide world."""
    folder = tmp_path_factory.mktemp("gaps")
    write_recital(folder / "gap.gguf", name="Gap", tokens=GAP_TOKENS)
    with shared(tmp_path_factory.mktemp("gaps-home"), "--models-dir", folder, "--model", "gap", "--ctx", "64") as running:
        yield running


def assert_llama_error(reply: Reply, status: int, kind: str, *words: str) -> dict[str, Any]:
    """Asserts llama-server's shape of an error, whose code is the status."""
    assert reply.status == status, reply.body
    error = reply.json()["error"]
    assert (error["code"], error["type"]) == (status, kind) and isinstance(error["message"], str)
    for word in words:
        assert word in error["message"], error
    return error


def llama_events(server: Server, path: str, body: dict[str, Any]) -> list[Any]:
    with server.stream(path, body) as stream:
        return list(stream)


def test_completion_has_llama_servers_shape(server: Server) -> None:
    usage = server.generate("Say :").json()["usage"]
    document = server.post("/completion", {"prompt": "Say :"}).json()
    assert (document["content"], document["stop"], document["stop_type"]) == ("Hello wide world", True, "eos")
    assert (document["tokens_evaluated"], document["tokens_predicted"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert document["model"] == "recital" and document["truncated"] is False and document["tokens"] == []
    assert document["timings"]["predicted_n"] == document["tokens_predicted"]


def test_completion_streams_without_done(server: Server) -> None:
    """As Continue sends it: it reads `content` of each event."""
    body = {"model": "recital", "prompt": ":", "n_predict": 50, "stop": None, "temperature": 0.5, "mirostat": None}
    *pieces, end = llama_events(server, "/completion", body)
    assert "".join(p["content"] for p in pieces) == "Hello wide world" and not any(p["stop"] for p in pieces)
    assert end["stop"] is True and end["content"] == "" and end["timings"]


@cases(
    "fields,told",
    {
        "end of text": ({}, ("Hello wide world", "eos", "")),
        "limit": ({"n_predict": 1}, ("Hello", "limit", "")),
        "no limit": ({"n_predict": -1}, ("Hello wide world", "eos", "")),
        "stop string": ({"stop": ["wide"]}, ("Hello ", "word", "wide")),
        "token ids": ({"prompt": [1, TOKEN_ID["<0x3A>"]]}, ("Hello wide world", "eos", "")),
        "a list of one": ({"prompt": [":"]}, ("Hello wide world", "eos", "")),
        "no tokens": ({"n_predict": 0}, ("", "limit", "")),
        "blank model": ({"model": " "}, ("Hello wide world", "eos", "")),
    },
)  # fmt: skip
def test_completion_tells_why_it_stopped(server: Server, fields: dict[str, Any], told: tuple[str, str, str]) -> None:
    document = server.post("/completion", {"prompt": ":", **fields}).json()
    assert (document["content"], document["stop_type"], document["stopping_word"]) == told


def test_completion_takes_biases_in_pairs(server: Server) -> None:
    body = {"prompt": ":", "n_predict": 1, "temperature": 0, "seed": -1, "logit_bias": [[TOKEN_ID["Hello"], False]]}
    assert server.post("/completion", body).json()["content"] != "Hello"


def test_completion_of_no_tokens_fills_the_cache(server: Server) -> None:
    prompt = "warm up this very prompt :"
    assert server.post("/completion", {"prompt": prompt, "n_predict": 0}).json()["tokens_predicted"] == 0
    assert server.post("/completion", {"prompt": prompt}).json()["tokens_cached"] > 10


@cases(
    "fields,document",
    {
        "flat and nested": (["content", "timings/predicted_n"], {"content": "Hello", "timings/predicted_n": 1}),
        "nothing": ([""], {}),
        "unknown": (["nonesuch/x", "stop"], {"stop": True}),
    },
)
def test_completion_gives_only_the_fields_asked_for(server: Server, fields: list[str], document: dict[str, Any]) -> None:
    assert server.post("/completion", {"prompt": ":", "n_predict": 1, "response_fields": fields}).json() == document


def test_completion_tells_probabilities(server: Server) -> None:
    (first, *_) = server.post("/completion", {"prompt": ":", "n_probs": 3}).json()["completion_probabilities"]
    assert first["token"] == "Hello" and len(first["top_logprobs"]) == 3


def test_completion_ends_when_its_time_is_over(serve: Callable[..., Server], tmp_path: Path) -> None:
    tokens = ["\ntock▁" if t == "tock▁" else t for t in VOCABULARY]
    write_recital(tmp_path / "own" / "ticks.gguf", tokens=tokens)
    server = serve("--models-dir", tmp_path / "own", "--ctx", str(LONG_CTX), "--model", "ticks")
    server.load("ticks")
    document = server.post("/completion", {"prompt": "#", "t_max_predict_ms": 200}).json()
    assert document["stop_type"] == "limit" and document["tokens_predicted"] < LONG_CTX - 10
    assert document["content"].startswith("Tick \ntock")


def test_infill_puts_the_gap_between_its_tokens(gaps: Server) -> None:
    document = gaps.post("/infill", {"input_prefix": "ab", "input_suffix": "cde", "n_predict": 20}).json()
    assert document["content"] == "Hello wide world" and document["tokens_evaluated"] == 1 + 3 + 5  # BOS, gap, bytes


def test_infill_goes_on_where_the_prompt_stops(gaps: Server) -> None:
    body = {"input_prefix": "ab", "input_suffix": "", "prompt": "cd"}
    assert gaps.post("/infill", body).json()["tokens_evaluated"] == 1 + 3 + 4


def test_infill_text_does_not_become_a_special_token(gaps: Server) -> None:
    text = "<|fim_middle|>"
    body = {"input_prefix": text, "input_suffix": "", "input_extra": [{"text": text}]}
    extra = len("\n\n--- snippet ---\n\n") + len(text)
    assert gaps.post("/infill", body).json()["tokens_evaluated"] == 1 + 3 + len(text) + extra


def test_infill_leaves_out_what_does_not_fit_from_the_front(gaps: Server) -> None:
    """As llama.vim sends it: pieces of other files beyond the context are no error."""
    extra = [{"filename": "a.py", "text": "x" * 20}] * 5
    body = {
        "id_slot": 0, "input_prefix": "ab\n", "input_suffix": "\n", "input_extra": extra, "prompt": "c", "n_predict": 8,
        "stop": [], "n_indent": 4, "top_k": 40, "top_p": 0.9, "samplers": ["top_k", "top_p", "infill"], "stream": False,
        "cache_prompt": True, "t_max_prompt_ms": 500, "t_max_predict_ms": 1000,
        "response_fields": ["content", "timings/prompt_n", "truncated", "tokens_cached", "tokens_evaluated"],
    }  # fmt: skip
    document = gaps.post("/infill", body).json()
    assert set(document) == set(body["response_fields"]) and document["content"] == "Hello wide world"
    assert 1 + 3 + 5 < document["tokens_evaluated"] <= 64 - 8  # with one piece, and room for the answer


def test_infill_as_zed_sends_it(gaps: Server) -> None:
    stop = ["<|endoftext|>", "<|file_separator|>", "<|fim_pad|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
            "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<PRE>", "<SUF>", "<MID>", "[PREFIX]", "[SUFFIX]"]  # fmt: skip
    body = {"input_prefix": "ab", "input_suffix": "cd", "prompt": "Fill in.", "stream": False, "n_predict": 20,
            "temperature": 0.2, "top_k": 40, "top_p": 0.99, "stop": stop, "cache_prompt": True}  # fmt: skip
    assert gaps.post("/infill", body).json()["content"] == "Hello wide world"


def test_ollama_suffix_fills_a_gap(gaps: Server) -> None:
    reply = gaps.post("/api/generate", {"model": "gap", "prompt": "ab", "suffix": "cde", "stream": False}).json()
    assert (reply["response"], reply["prompt_eval_count"]) == ("Hello wide world", 9)
    assert "insert" in gaps.post("/api/show", {"model": "gap"}).json()["capabilities"]


@cases(
    "path,body,words",
    {
        "prompt too long": ("/completion", {"prompt": "x" * 100}, ["context"]),
        "gap too long": ("/infill", {"input_prefix": "x" * 100, "input_suffix": ""}, ["context"]),
    },
)
def test_llama_server_tells_both_sizes(gaps: Server, path: str, body: dict[str, Any], words: list[str]) -> None:
    error = assert_llama_error(gaps.post(path, body), 400, "exceed_context_size_error", *words)
    assert error["n_ctx"] == 64 and error["n_prompt_tokens"] > 100


@cases(
    "path,body,words",
    {
        "no prompt": ("/completion", {}, ["prompt is required"]),
        "several prompts": ("/completion", {"prompt": ["a", "b"]}, ["several requests"]),
        "no such tokens": ("/infill", {"input_prefix": "a", "input_suffix": "b"}, ["cannot fill a gap"]),
        "no prefix": ("/infill", {"input_suffix": "b"}, ["input_prefix"]),
        "a piece without text": ("/infill", {"input_prefix": "", "input_suffix": "", "input_extra": [{}]}, ["extra[0].text"]),
        "no content": ("/tokenize", {}, ["content"]),
        "no tokens": ("/detokenize", {}, ["tokens"]),
        "an unknown token": ("/detokenize", {"tokens": [10**9]}, ["outside"]),
        "a token below zero": ("/detokenize", {"tokens": [-1]}, ["outside"]),
        "too much": ("/tokenize", {"content": "x" * (2**20 + 1)}, ["1048576"]),
        "no messages": ("/apply-template", {}, ["messages is required"]),
        "messages refused": ("/apply-template", {"messages": [{"role": "user", "content": "mutiny"}]}, ["No mutiny"]),
    },
)
def test_llama_server_refuses_by_name(server: Server, path: str, body: dict[str, Any], words: list[str]) -> None:
    assert_llama_error(server.post(path, body), 400, "invalid_request_error", *words)


def test_llama_server_unknown_model_is_404(server: Server) -> None:
    for reply in (server.post("/completion", {"model": "nonesuch", "prompt": ":"}), server.get("/props?model=nonesuch")):
        assert_llama_error(reply, 404, "not_found_error", "nonesuch")


@linux
def test_completion_stream_that_breaks_off_ends_with_an_error(serve: Callable[..., Server], models: Path) -> None:
    server = serve("--models-dir", models, "--model", "recital", "--ctx", str(LONG_CTX))
    with server.stream("/completion", {"prompt": "#"}) as stream:
        assert next(stream)["content"]
        os.kill(server.engine("recital.gguf"), signal.SIGKILL)
        *_, last = stream
    assert last["error"]["code"] == 500 and last["error"]["type"] == "server_error"


@cases(
    "fields,tokens",
    {
        "a text": ({"content": "a:"}, ["<0x61>", "<0x3A>"]),
        "with the model's own": ({"content": "a", "add_special": True}, ["<s>", "<0x61>"]),
        "a special token": ({"content": "<|quiet|>"}, ["<|quiet|>"]),
        "a special token's name": ({"content": "<s>", "parse_special": False}, ["<0x3C>", "<0x73>", "<0x3E>"]),
        "nothing": ({"content": ""}, []),
    },
)
def test_tokenize_gives_ids(server: Server, fields: dict[str, Any], tokens: list[str]) -> None:
    assert server.post("/tokenize", fields).json() == {"tokens": [TOKEN_ID[t] for t in tokens]}


def test_tokenize_shows_pieces_and_bytes(server: Server) -> None:
    pieces = [t["piece"] for t in server.post("/tokenize", {"content": "aé", "with_pieces": True}).json()["tokens"]]
    assert pieces == ["a", [0xC3], [0xA9]]


@pytest.mark.parametrize("text", ["naïve 😀 and 日本", "", "a  b\n", "<|quiet|>x"])
def test_detokenize_gives_back_the_text(server: Server, text: str) -> None:
    ids = server.post("/tokenize", {"content": text}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": ids}).json() == {"content": text}


def test_tokenize_does_not_wait_for_streams(server: Server) -> None:
    with server.endless() as stream:
        next(stream)
        assert server.post("/tokenize", {"content": "ab"}).json()["tokens"]


def test_apply_template_gives_the_prompt(server: Server) -> None:
    body = {"messages": [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "hi"}]}
    assert server.post("/apply-template", body).json() == {"prompt": "[system]Be kind[user]hi[assistant]:"}


def test_props_describe_a_model_without_directories(server: Server, models: Path) -> None:
    reply = server.get("/props?model=recital")
    document = reply.json()
    assert document["default_generation_settings"]["n_ctx"] == LONG_CTX and document["chat_template"] == TEMPLATE
    assert document["chat_template_caps"]["supports_tools"] and document["modalities"] == {"vision": False, "audio": False}
    assert document["model_path"] == "recital.gguf" and str(models).encode() not in reply.body
    assert server.get("/props").json() == document and document["total_slots"] == 8


def test_props_of_a_model_that_is_not_loaded_load_nothing(serve: Callable[..., Server], models: Path) -> None:
    server = serve("--models-dir", models, "--model", "recital")
    assert server.get("/props").json()["default_generation_settings"]["n_ctx"] == 8192
    assert not server.status("recital")["loaded"] and server.get("/slots").json() == []


def test_slots_show_what_runs_and_no_text(serve: Callable[..., Server], models: Path) -> None:
    server = serve("--models-dir", models, "--ctx", str(LONG_CTX), "--parallel", "2")
    with server.endless() as stream:
        next(stream)
        slots = eventually(lambda: [s for s in server.get("/slots?model=recital").json() if s["is_processing"]], "one runs")
    (slot,) = slots
    assert slot == {"id": 0, "id_task": -1, "n_ctx": LONG_CTX, "speculative": False, "is_processing": True, "model": "recital"}
    assert len(server.get("/slots").json()) == 2


def test_v1_health_is_llama_servers(server: Server) -> None:
    assert server.get("/v1/health").json()["status"] == "ok" and server.get("/health").json()["status"] == "healthy"


# ── One model list ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_model_list_serves_every_client(server: Server, models: Path) -> None:
    document = server.get("/v1/models").json()
    data = document["data"]
    assert (document["has_more"], document["first_id"], document["last_id"]) == (False, data[0]["id"], data[-1]["id"])
    recital = next(m for m in data if m["id"] == "recital")
    assert (recital["object"], recital["type"], recital["owned_by"]) == ("model", "model", "shimmy")
    assert (recital["display_name"], recital["context_length"], recital["max_model_len"]) == ("Recital", LONG_CTX, LONG_CTX)
    assert recital["created_at"] == time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime(recital["created"]))
    size = (models / "recital.gguf").stat().st_size
    count = recital["meta"].pop("n_params")
    assert recital["meta"] == {"n_ctx": LONG_CTX, "n_ctx_train": LONG_CTX, "size": size} and count > 1000
    recital["meta"]["n_params"] = count
    assert server.get("/v1/models/recital").json() == recital


def test_model_list_tells_the_context_that_a_request_may_have(serve: Callable[..., Server], models: Path) -> None:
    server = serve("--models-dir", models, "--ctx", "512")
    contexts = {m["id"]: (m["context_length"], m["meta"]["n_ctx_train"]) for m in server.get("/v1/models").json()["data"]}
    assert contexts["recital"] == (512, LONG_CTX) and contexts["dice"] == (256, 256)


# ── Ollama's packages ─────────────────────────────────────────────────────────────────────────────────────────────────


def ollama_client(server: Server) -> Any:
    package = pytest.importorskip("ollama")
    return package.Client(host=f"http://{server.host}:{server.port}", trust_env=False)


def test_ollama_package_chats(server: Server) -> None:
    client = ollama_client(server)
    turns = [{"role": "user", "content": "hi"}]
    assert client.chat("recital", turns).message.content == "Hello wide world"
    assert "".join(c.message.content for c in client.chat("recital", turns, stream=True)) == "Hello wide world"
    (call,) = client.chat("recital", [{"role": "user", "content": "weather"}], tools=[WEATHER]).message.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", {"city": "Paris"})


def test_ollama_package_generates(server: Server) -> None:
    client = ollama_client(server)
    assert client.generate("recital", "hi").response == "Hello wide world"
    assert "".join(c.response for c in client.generate("recital", "hi", stream=True)) == "Hello wide world"
    assert client.generate("recital").done_reason == "load"


def test_ollama_package_lists_shows_and_embeds(server: Server) -> None:
    client = ollama_client(server)
    assert "recital:latest" in [m.model for m in client.list().models]
    assert client.show("recital").modelinfo["llama.context_length"] == LONG_CTX
    client.generate("recital")
    assert "recital:latest" in [m.model for m in client.ps().models]
    assert len(client.embed("dice", ["in", "the"]).embeddings) == 2 and len(client.embeddings("dice", "in").embedding) == 64


def test_ollama_package_raises_what_went_wrong(server: Server) -> None:
    client, package = ollama_client(server), pytest.importorskip("ollama")
    with pytest.raises(package.ResponseError, match="not found") as caught:
        client.chat("nonesuch", [{"role": "user", "content": "hi"}])
    assert caught.value.status_code == 404


@cases("stream", {"streamed": (), "plain": ("--no-stream",)})
def test_llm_with_its_ollama_plugin_prompts(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: tuple[str, ...]
) -> None:
    pytest.importorskip("llm_ollama")
    for name, value in {"OLLAMA_HOST": f"http://{server.host}:{server.port}", "LLM_USER_PATH": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "llm", "-m", "ollama/recital", "hi", "-o", "temperature", "0", *stream]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert (done.stdout.strip(), done.returncode) == ("Hello wide world", 0), done.stderr


NODE_CLIENT = """
const {Ollama} = require('ollama'); const client = new Ollama({host: process.argv[1]}); const said = [];
(async () => {
  const messages = [{role: 'user', content: 'hi'}], model = 'recital';
  said.push((await client.chat({model, messages})).message.content);
  let text = ''; for await (const part of await client.chat({model, messages, stream: true})) text += part.message.content;
  said.push(text, (await client.generate({model, prompt: 'hi'})).response);
  said.push((await client.list()).models.some(m => m.name === 'recital:latest'), (await client.show({model})).template.length > 9);
  said.push((await client.ps()).models.length > 0, (await client.embed({model: 'dice', input: ['in', 'the']})).embeddings.length);
  try { await client.chat({model: 'nonesuch', messages}) } catch (error) { said.push(error.status_code) }
  console.log(JSON.stringify(said));
})();
"""


def test_ollama_package_of_npm_does_all(server: Server, tmp_path: Path) -> None:
    """Needs node, and the package `ollama` where NODE_PATH says."""
    found = shutil.which("node") and subprocess.run(["node", "-e", "require('ollama')"], capture_output=True, check=False)
    if not found or found.returncode:
        pytest.skip("npm's package ollama is not installed")
    command = ["node", "-e", NODE_CLIENT, f"http://{server.host}:{server.port}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert json.loads(done.stdout) == [*["Hello wide world"] * 3, True, True, True, 2, 404], done.stderr
