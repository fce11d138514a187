from test_shimmy import *  # noqa: F403
from collections.abc import Iterable

HOSTILE_TEMPLATES = {
    "a power of powers": "{{ 9 ** (9 ** 9) }}",
    "nine billion letters": "{{ 'a' * 10**10 }}",
    "centred in a billion": "{{ 'a' | center(10**9) }}",
    "a format of a billion": "{{ '%999999999d' % 1 }}",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
                    "{% endfor %}{% endfor %}{% endfor %}",
    "endless recursion": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "output without end": "{% for a in range(99999) %}{% for b in range(99999) %}{{ messages }}{% endfor %}{% endfor %}",
    "doubling": "{% set ns = namespace(s='aaaaaaaa') %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "an index error": "{{ messages[99].content.x }}{{ [][1] }}{{ ''.split(',')[3].a.b }}",
    "a division by zero": "{{ 1 / 0 }}",
}  # fmt: skip


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("hostile")
    for name, template in HOSTILE_TEMPLATES.items():
        write_recital(folder / f"{name.replace(' ', '-')}.gguf", template=template)
    write_recital(folder / "recital.gguf")
    server = Server(folder / "home", "--models-dir", folder, "--max-loaded", "20")
    server.load("recital")
    yield server
    assert server.stop() == 0


@pytest.mark.parametrize("name", HOSTILE_TEMPLATES)
def test_hostile_chat_template_is_its_requests_error_and_nobody_elses(name: str, hostile: Server) -> None:
    """A runaway is ended within two seconds (here: of a machine that other tests use too), while others are served."""
    model = name.replace(" ", "-")
    assert hostile.load(model).status == 200
    replies: list[Reply] = []
    asking = threading.Thread(target=lambda: replies.append(hostile.chat("hi", model)))
    began = time.monotonic()
    asking.start()
    waits = []
    while asking.is_alive():
        asked = time.monotonic()
        assert hostile.get("/health").status == 200
        waits.append(time.monotonic() - asked)
        time.sleep(0.05)
    assert_error(replies[0], 400, "invalid_request", "template")
    assert time.monotonic() - began < 6
    assert max(waits) < 1
    assert hostile.chat("hi").message["content"] == "Hello wide world"


def test_more_runaway_templates_than_helpers_leave_the_others_served(hostile: Server) -> None:
    hostile.load("nested-loops")
    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda _: hostile.chat("hi", "nested-loops"), range(12)))
    assert {r.status for r in replies} <= {400, 503}
    assert hostile.chat("hi").message["content"] == "Hello wide world"


def test_model_without_a_template_stops_at_the_markers_it_is_given(serve: Callable[..., Server], tmp_path: Path) -> None:
    path = tmp_path / "models" / "plain.gguf"
    path.parent.mkdir()
    write_recital(path, template="")
    server = serve("--models-dir", path.parent)
    assert server.chat("hi", "plain").status == 200
    assert server.log.read_text().count("no chat template") == 1


THOUGHT_CASES = {
    "at the beginning": ("<think>why</think>So", "why", "So"),
    "behind white space": ("\n <think>why</think>\n\nSo", "why", "So"),
    "in the middle": ("So <think>why</think> not", "", "So <think>why</think> not"),
    "never closed": ("<think>why", "why", ""),
    "a marker that is none": ("<thin air>", "", "<thin air>"),
}


def parsed(text: str, pieces: Iterable[str], **options: Any) -> dict[str, Any]:
    """What a client is told of a text: content, thought, calls and the reason of its end."""
    import shimmy

    parser = shimmy.ChatParser(0, shimmy.ChatFormat(), **{"tools": False, "thinking": False, **options})
    events = [e for piece in pieces for e in parser.push(piece)] + list(parser.finish("stop"))
    reply = shimmy.Reply()
    for event in events:
        reply.add(event)
    ((_, choice),) = reply.choices()
    calls = [(c["name"], c["arguments"]) for c in choice.calls]
    return {"text": choice.text, "thought": "".join(choice.thoughts), "calls": calls, "reason": choice.finish_reason}


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "one character at a time"])
@pytest.mark.parametrize("case", THOUGHT_CASES)
def test_thought_only_begins_an_answer(case: str, whole: bool) -> None:
    text, thought, content = THOUGHT_CASES[case]
    said = parsed(text, [text] if whole else text)
    assert (said["thought"], said["text"]) == (thought, content)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "one character at a time"])
def test_call_that_was_cut_invents_no_closing_marker(whole: bool) -> None:
    text = 'Well <tool_call>\n{"name": "get_weather", "argu'
    said = parsed(text, [text] if whole else text, tools=True)
    assert said == {"text": text, "thought": "", "calls": [], "reason": "stop"}


def test_stream_of_a_model_that_loads_slowly_shows_signs_of_life(serve: Callable[..., Server], tmp_path: Path) -> None:
    script = altered(
        tmp_path,
        ("PING_SECONDS = 15.0", "PING_SECONDS = 0.2"),
        ('        pulses[0].begin("load")\n        llama =', '        time.sleep(2)\n        pulses[0].begin("load")\n        llama ='),
    )
    folder = tmp_path / "models"
    folder.mkdir()
    write_recital(folder / "recital.gguf")
    server = serve("--models-dir", folder, script=script)
    with contextlib.closing(server.connect()) as connection:
        connection.request("POST", "/v1/completions", encoded({"model": "recital", "prompt": ":", "stream": True}))
        response = connection.getresponse()
        assert response.status == 200
        lines = [line for line in response if line.strip()]
    assert lines.count(b": waiting\n") >= 3
    assert lines[-1] == b"data: [DONE]\n"


def test_completion_echo_begins_with_the_prompt(server: Server) -> None:
    body = {"model": "recital", "prompt": [":", "S"], "echo": True}
    texts = [c["text"] for c in server.post("/v1/completions", body).json()["choices"]]
    assert texts == [":" + TEXTS[":"], "S" + TEXTS["S"]]
    assert [joined([e for e in server.streamed("/v1/completions", {**body, "prompt": ":"})])] == [":" + TEXTS[":"]]


@pytest.mark.parametrize("value", [2, 16], ids=["two", "sixteen"])
def test_completion_best_of_must_equal_n(value: int, server: Server) -> None:
    body = {"model": "recital", "prompt": ":", "best_of": value}
    assert_error(server.post("/v1/completions", body), 400, "invalid_request", "best_of")
    assert server.post("/v1/completions", {**body, "n": value}).status == 200


def test_chat_response_format_holds_the_answer_to_json(tiny: Server) -> None:
    schema = {"type": "object", "properties": {"port": {"type": "integer"}}, "required": ["port"]}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    for seed in range(3):
        reply = tiny.chat("Which port?", "default", response_format=form, temperature=1, seed=seed, max_tokens=100)
        document = json.loads(reply.message["content"])
        assert set(document) == {"port"} and isinstance(document["port"], int)
    reply = tiny.chat("Which port?", "default", response_format={"type": "json_object"}, max_tokens=60)
    assert reply.message["content"].startswith("{")


def test_chat_grammar_holds_the_answer(server: Server) -> None:
    assert server.chat("hi", "dice", grammar='root ::= "yes" | "no"', temperature=1).message["content"] in ("yes", "no")


@pytest.mark.parametrize(
    "format, word",
    [({"type": "json_schema"}, "json_schema"), ({"type": "json_schema", "json_schema": {"name": "x"}}, "schema"), ("json", "object")],
    ids=["no schema", "an empty holder", "a string"],
)
def test_chat_response_format_that_is_wrong_names_it(format: Any, word: str, server: Server) -> None:
    assert_error(server.chat(response_format=format), 400, "invalid_request", "response_format", word)


def test_usage_holds_timings_in_llama_servers_shape(server: Server) -> None:
    timings = server.chat("hi").json()["usage"]["timings"]
    assert {"cache_n", "prompt_n", "prompt_ms", "prompt_per_second", "predicted_n", "predicted_per_second"} <= set(timings)


def test_answer_names_the_real_model(server: Server) -> None:
    default = server.get("/api/models").json()["models"][0]["description"].rpartition(" ")[2]
    assert server.chat("hi", "default").json()["model"] == default


def test_max_tokens_minus_one_means_the_contexts_end(server: Server) -> None:
    reply = server.generate("a" * 200, "dice", max_tokens=-1, ignore_eos=True).json()
    assert reply["usage"]["total_tokens"] == 256 and reply["choices"][0]["finish_reason"] == "length"


def test_post_without_a_length_is_411_and_closes(server: Server) -> None:
    body = b'{"model": "recital", "prompt": ":"}'
    with socket.create_connection((server.host, server.port), timeout=HANG) as sock:
        sock.sendall(head_of("POST", "/api/generate") + body)
        reply = read_reply(sock)
        assert_error(reply, 411, "invalid_request", "Content-Length")
        assert reply.headers["Connection"] == "close"


def test_stop_string_is_bounded(server: Server) -> None:
    assert_error(server.generate(stop=["x" * 257]), 400, "invalid_request", "stop", "256")
    assert server.generate(stop=["x" * 256]).status == 200


def test_messages_are_bounded(server: Server) -> None:
    messages = [{"role": "system", "content": "hi"}] * 4097
    assert_error(server.post("/v1/chat/completions", {"messages": messages}), 400, "invalid_request", "messages", "4096")


def test_ws_message_whose_fragments_never_end_closes_the_connection(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(script=altered(tmp_path, ("REQUEST_SECONDS = 30.0", "REQUEST_SECONDS = 1.0")))
    with server.ws() as ws:

        def fragments() -> Iterator[str]:
            yield '{"model": '
            for _ in range(100):
                time.sleep(0.1)
                yield " "

        with pytest.raises(ConnectionClosed):
            ws.send(fragments())
            ws.recv(timeout=HANG)
        assert ws.close_code == 1008


def test_ws_requests_are_logged(serve: Callable[..., Server], models: Path) -> None:
    server = serve("-v", "--models-dir", models)
    ws_ask(server, prompt=":")
    line = eventually(lambda: re.search(r"WS /ws/generate 200 \d+ ms recital \d+\+\d+ tokens", server.log.read_text()), "a line")
    assert line


BUILTIN = {"type": "builtin", "name": "calculator"}


def test_chat_runs_a_builtin_tool_and_answers_with_its_result(tiny: Server) -> None:
    reply = tiny.chat("What is 4827 plus 394?", "default", tools=[BUILTIN], temperature=0)
    assert "5221" in reply.message["content"]
    (result,) = reply.message["tool_results"]
    assert (result["name"], result["result"], result["error"]) == ("calculator", 5221, None)
    assert reply.json()["choices"][0]["finish_reason"] == "stop"
    assert "tool_calls" not in reply.message


def test_chat_streams_a_builtin_tools_result_and_the_answer(tiny: Server) -> None:
    body = {"messages": [{"role": "user", "content": "What is 4827 plus 394?"}], "tools": [BUILTIN], "temperature": 0}
    parts = deltas(tiny.streamed("/v1/chat/completions", body))
    assert [r["result"] for p in parts for r in p.get("tool_results", [])] == [5221]
    assert "5221" in "".join(p.get("content") or "" for p in parts)
    assert not any("tool_calls" in p for p in parts)


def test_chat_tells_the_model_when_a_builtin_tool_fails(server: Server) -> None:
    tool = {"type": "builtin", "name": "file_read"}
    reply = server.chat("weather", tools=[{"type": "builtin", "name": "calculator"}, tool])
    assert reply.status == 200
    assert_error(server.chat("hi", tools=[BUILTIN], n=2), 400, "invalid_request", "tools", "n")


@pytest.mark.parametrize("name", ["hammer", "", None], ids=["unknown", "empty", "absent"])
def test_chat_with_a_builtin_tool_that_is_not_there_names_those_that_are(name: Any, server: Server) -> None:
    error = assert_error(server.chat("hi", tools=[{"type": "builtin", "name": name}]), 400, "invalid_request", "tools")
    assert name is None or "calculator" in error["message"]
