from test_shimmy import *  # noqa: F403
import base64

WEATHER_FUNCTION: Any = WEATHER["function"]
CLAUDE_WEATHER = {"name": "get_weather", "input_schema": WEATHER_FUNCTION["parameters"],
                  "description": WEATHER_FUNCTION["description"]}  # fmt: skip
RESPONSE_WEATHER = {"type": "function", **WEATHER_FUNCTION}
CITY = {"city": "Paris"}


@pytest.fixture(scope="module")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The model in the box, and one whose prompts hold thoughts as text."""
    folder = tmp_path_factory.mktemp("boxed")
    template = "{% for m in messages %}[{{ m.role }}]{{ m.reasoning_content or '' }}|{{ m.content }}{% endfor %}:"
    write_recital(folder / "thoughtful.gguf", template=template)
    with shared(folder / "home", "--models-dir", REPO / "models", "--models-dir", folder) as running:
        yield running


def claude(content: Any = "hi", **fields: Any) -> dict[str, Any]:
    """A body for /v1/messages."""
    return {"model": "recital", "max_tokens": 50, "messages": [{"role": "user", "content": content}], **fields}


def respond(given: Any = "hi", **fields: Any) -> dict[str, Any]:
    """A body for /v1/responses."""
    return {"model": "recital", "input": given, **fields}


def named(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """A stream's documents; each event is named as its document says, and nothing else is sent."""
    reply = server.post(path, {**body, "stream": True})
    assert reply.status == 200 and reply.headers["Content-Type"].startswith("text/event-stream"), reply.body
    found = []
    for event in reply.body.decode().removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def prompt_tokens(server: Server, *messages: dict[str, Any], **fields: Any) -> int:
    """How long the same conversation's prompt is for OpenAI's chat route."""
    body = {"model": "recital", "messages": messages, "max_tokens": 1, **fields}
    return server.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens"]


# Anthropic's Messages


def test_messages_answer_has_anthropics_shape(server: Server) -> None:
    reply = server.post("/v1/messages?beta=true", claude()).json()
    assert re.fullmatch("msg_[0-9a-f]{24}", reply.pop("id"))
    usage = reply.pop("usage")
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == prompt_tokens(server, {"role": "user", "content": "hi"})
    assert usage["output_tokens"] == 3 and usage["cache_creation_input_tokens"] == 0
    assert reply == {"type": "message", "role": "assistant", "model": "recital", "stop_reason": "end_turn",
                     "stop_sequence": None, "content": [{"type": "text", "text": TEXTS[":"]}]}  # fmt: skip


def test_messages_stream_sends_its_events_in_order(server: Server) -> None:
    first, *rest, before, last = named(server, "/v1/messages", claude())
    assert first["type"] == "message_start" and first["message"]["content"] == []
    assert first["message"]["usage"]["input_tokens"] > 0
    assert rest[0] == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    assert rest[-1] == {"type": "content_block_stop", "index": 0}
    assert all(d["type"] == "content_block_delta" and d["delta"]["type"] == "text_delta" for d in rest[1:-1])
    assert "".join(d["delta"]["text"] for d in rest[1:-1]) == TEXTS[":"]
    assert before["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert before["usage"]["output_tokens"] == 3 and "input_tokens" in before["usage"]
    assert last == {"type": "message_stop"}


def test_messages_thought_is_a_thinking_block_before_the_text(server: Server) -> None:
    body = claude("think", thinking={"type": "enabled", "budget_tokens": 1024})
    content = server.post("/v1/messages", body).json()["content"]
    assert content == [{"type": "thinking", "thinking": "two and two\n", "signature": ""}, {"type": "text", "text": "Four!!"}]
    stream = named(server, "/v1/messages", body)
    shown = [(d["index"], d["delta"]["type"]) for d in stream if d["type"] == "content_block_delta"]
    assert [key for key, _ in itertools.groupby(shown)] == [(0, "thinking_delta"), (0, "signature_delta"), (1, "text_delta")]


def test_messages_call_streams_its_arguments_as_json_deltas(server: Server) -> None:
    stream = named(server, "/v1/messages", claude("weather", tools=[CLAUDE_WEATHER]))
    (begun,) = [d["content_block"] for d in stream if d["type"] == "content_block_start"]
    assert begun.pop("id") and begun == {"type": "tool_use", "name": "get_weather", "input": {}}
    parts = [d["delta"] for d in stream if d["type"] == "content_block_delta"]
    assert {p["type"] for p in parts} == {"input_json_delta"}
    assert json.loads("".join(p["partial_json"] for p in parts)) == CITY
    assert stream[-2]["delta"]["stop_reason"] == "tool_use"


def test_messages_several_blocks_have_rising_indexes(server: Server) -> None:
    add = {"name": "add", "input_schema": {"type": "object", "properties": {}}}
    stream = named(server, "/v1/messages", claude("twice", tools=[add], max_tokens=100))
    begun = [(d["index"], d["content_block"]["type"]) for d in stream if d["type"] == "content_block_start"]
    assert begun == [(0, "text"), (1, "tool_use"), (2, "tool_use")]
    content = server.post("/v1/messages", claude("twice", tools=[add], max_tokens=100)).json()["content"]
    assert [b.get("input") for b in content[1:]] == [{"a": 1}, {"a": 2}] and content[0]["text"].strip() == "Both:"


def test_messages_call_that_was_cut_says_max_tokens(server: Server) -> None:
    reply = server.post("/v1/messages", claude("weather", tools=[CLAUDE_WEATHER], max_tokens=5)).json()
    assert reply["stop_reason"] == "max_tokens" and reply["content"][-1]["input"] == {}


def test_messages_stop_sequence_is_named(server: Server) -> None:
    reply = server.post("/v1/messages", claude("stopping", stop_sequences=["omega!", "STOPPSTOP"])).json()
    assert (reply["stop_reason"], reply["stop_sequence"]) == ("stop_sequence", "STOPPSTOP")
    assert reply["content"] == [{"type": "text", "text": "alpha "}]


def test_messages_last_assistant_message_is_continued(server: Server) -> None:
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well:"}]
    assert server.post("/v1/messages", claude(messages=said)).json()["content"][0]["text"] == TEXTS[":"]


CLAUDE_CHATS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {  # what is sent, and the same as OpenAI's chat
    "system text": ({"system": "Be kind."}, [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]),
    "system blocks": (
        {"system": [{"type": "text", "text": "Be"}, {"type": "text", "text": "kind", "cache_control": {"type": "ephemeral"}}]},
        [{"role": "system", "content": "Be\n\nkind"}, {"role": "user", "content": "hi"}],
    ),
    "a header that changes with each request": (
        {"system": [{"type": "text", "text": "x-anthropic-billing-header: cc_version=1;"}, {"type": "text", "text": "Be"}]},
        [{"role": "system", "content": "Be"}, {"role": "user", "content": "hi"}],
    ),
    "texts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]},
        [{"role": "user", "content": "one\n\ntwo"}],
    ),
    "a system message in mid-conversation": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, {"role": "user", "content": "c"}]},
        [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, {"role": "user", "content": "c"}],
    ),
    "blocks that only Anthropic reads": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [
            {"type": "redacted_thinking", "data": "x"}, {"type": "server_tool_use", "id": "1", "name": "web_search", "input": {}},
            {"type": "text", "text": "b"}]}, {"role": "user", "content": "c"}]},
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
    ),
    "a document": (
        {"messages": [{"role": "user", "content": [{"type": "document", "title": "T", "source": {
            "type": "text", "media_type": "text/plain", "data": "long"}}, {"type": "text", "text": "?"}]}]},
        [{"role": "user", "content": "T\nlong\n\n?"}],
    ),
    "fields that mean nothing here": (
        {"metadata": {"user_id": "u"}, "context_management": {"edits": []}, "service_tier": "auto",
         "thinking": {"type": "adaptive"},
         "output_config": {"effort": "high"}, "tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        [{"role": "user", "content": "hi"}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CLAUDE_CHATS)
def test_messages_become_the_prompt_that_openais_chat_makes(case: str, server: Server) -> None:
    sent, same = CLAUDE_CHATS[case]
    counted = server.post("/v1/messages/count_tokens", claude() | sent).json()
    assert counted == {"input_tokens": prompt_tokens(server, *same)}


RESULTS: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({"content": "sunny"}, "sunny"),
    "parts": ({"content": [{"type": "text", "text": "sun"}, {"type": "text", "text": "ny"}]}, "sun\n\nny"),
    "an error": ({"content": "no such city", "is_error": True}, "Error: no such city"),
    "nothing": ({}, ""),
    "tools that a search found": ({"content": [{"type": "tool_reference", "tool_name": "add"}]}, "add"),
}


@pytest.mark.parametrize("case", RESULTS)
def test_messages_tool_result_becomes_a_tool_turn(case: str, server: Server) -> None:
    result, text = RESULTS[case]
    used = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": CITY}
    answered = {"type": "tool_result", "tool_use_id": "toolu_1", **result}
    said = [{"role": "user", "content": "weather"}, {"role": "assistant", "content": [{"type": "text", "text": "Well"}, used]},
            {"role": "user", "content": [answered]}]  # fmt: skip
    body = claude(messages=said, tools=[CLAUDE_WEATHER])
    call = {"id": "toolu_1", "type": "function", "function": {"name": "get_weather", "arguments": json.dumps(CITY)}}
    same: list[Any] = [said[0], {"role": "assistant", "content": "Well", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "toolu_1", "content": text}]  # fmt: skip
    counted = server.post("/v1/messages/count_tokens", body).json()["input_tokens"]
    assert counted == prompt_tokens(server, *same, tools=[WEATHER])
    assert server.post("/v1/messages", body).json()["content"][0]["text"] == TEXTS["S"]


def test_messages_thought_goes_back_into_the_prompt(boxed: Server) -> None:
    thought = {"type": "thinking", "thinking": "hmm", "signature": ""}
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [thought, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "c"}]  # fmt: skip
    counted = boxed.post("/v1/messages/count_tokens", claude(messages=said, model="thoughtful")).json()
    assert counted == {"input_tokens": 1 + len("[user]|a[assistant]hmm|b[user]|c:")}


def test_count_tokens_beyond_the_context_counts_on(server: Server) -> None:
    counted = server.post("/v1/messages/count_tokens", claude("a" * LONG_CTX)).json()
    assert counted == {"input_tokens": 1 + len("[user][assistant]:") + LONG_CTX}


def test_messages_headers_that_differ_reuse_the_same_prefix(server: Server) -> None:
    read = []
    for version in ("1.2.3", "4.5.6"):
        header = {"type": "text", "text": f"x-anthropic-billing-header: cc_version={version};"}
        body = claude(system=[header, {"type": "text", "text": "A system text that nobody else sends."}])
        read.append(server.post("/v1/messages", body).json()["usage"])
    assert read[1]["cache_read_input_tokens"] == read[0]["input_tokens"] + read[0]["cache_read_input_tokens"] - 1


@pytest.mark.parametrize("kind", ["any", "tool"])
def test_messages_tool_choice_forces_a_call(kind: str, boxed: Server) -> None:
    choice = {"type": kind} | ({"name": "get_weather"} if kind == "tool" else {})
    body = claude("Good morning!", model="shimmy-tiny", tools=[CLAUDE_WEATHER], tool_choice=choice, max_tokens=100)
    reply = boxed.post("/v1/messages", body).json()
    assert reply["stop_reason"] == "tool_use" and reply["content"][-1]["name"] == "get_weather"
    assert set(reply["content"][-1]["input"]) == {"city"}


def test_messages_tool_choice_none_offers_no_tool(server: Server) -> None:
    body = claude("weather", tools=[CLAUDE_WEATHER], tool_choice={"type": "none"})
    assert server.post("/v1/messages", body).json()["stop_reason"] == "end_turn"


def test_messages_output_format_holds_the_answer_to_its_schema(boxed: Server) -> None:
    schema = {"type": "object", "properties": {"port": {"type": "integer"}}, "required": ["port"], "additionalProperties": False}
    config = {"format": {"type": "json_schema", "schema": schema}}
    reply = boxed.post("/v1/messages", claude("Which port?", model="shimmy-tiny", output_config=config)).json()
    assert set(json.loads(reply["content"][0]["text"])) == {"port"}


CLAUDE_WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "messages absent": ({"messages": None}, "messages"),
    "messages no list": ({"messages": {}}, "messages"),
    "messages empty": ({"messages": []}, "messages"),
    "a message no object": ({"messages": ["hi"]}, "messages[0]"),
    "role unknown": ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    "role a list": ({"messages": [{"role": [], "content": "x"}]}, "messages[0].role"),
    "content absent": ({"messages": [{"role": "user"}]}, "messages[0].content"),
    "content a number": ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
    "a block no object": (claude(["x"]), "messages[0].content[0]"),
    "block type unknown": (claude([{"type": "sound"}]), "messages[0].content[0].type"),
    "block type an object": (claude([{"type": {}}]), "messages[0].content[0].type"),
    "an image": (claude([{"type": "image", "source": {}}]), '"image"'),
    "an image in a result": (claude([{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "image"}]}]), '"image"'),
    "text a number": (claude([{"type": "text", "text": 1}]), "messages[0].content[0].text"),
    "result without id": (claude([{"type": "tool_result", "content": "x"}]), "messages[0].content[0].tool_use_id"),
    "result a number": (claude([{"type": "tool_result", "tool_use_id": "1", "content": 5}]), "messages[0].content[0].content"),
    "is_error a string": (claude([{"type": "tool_result", "tool_use_id": "1", "is_error": "no"}]), "is_error"),
    "call from the user": (claude([{"type": "tool_use", "id": "1", "name": "a", "input": {}}]), "messages[0].content[0].type"),
    "document without source": (claude([{"type": "document"}]), "messages[0].content[0].source"),
    "document a PDF": (claude([{"type": "document", "source": {"type": "base64", "data": ""}}]), "source.type"),
    "call's input text": (
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "a", "input": "{}"}]}]},
        "messages[0].content[0].input",
    ),
    "thinking a number": (
        {"messages": [{"role": "assistant", "content": [{"type": "thinking", "thinking": 7}]}]},
        "messages[0].content[0].thinking",
    ),
    "system a number": ({"system": 1}, "system"),
    "system an image": ({"system": [{"type": "image"}]}, "system[0].type"),
    "model a number": ({"model": 1}, "model"),
    "max_tokens zero": ({"max_tokens": 0}, "max_tokens"),
    "max_tokens text": ({"max_tokens": "5"}, "max_tokens"),
    "temperature beyond": ({"temperature": 9}, "temperature"),
    "top_p beyond": ({"top_p": 2}, "top_p"),
    "top_k negative": ({"top_k": -1}, "top_k"),
    "stop_sequences text": ({"stop_sequences": "x"}, "stop_sequences"),
    "stop_sequences numbers": ({"stop_sequences": [1]}, "stop_sequences"),
    "stream text": ({"stream": "yes"}, "stream"),
    "tools an empty object": ({"tools": {}}, "tools"),
    "a tool no object": ({"tools": ["x"]}, "tools[0]"),
    "tool without name": ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
    "tool without schema": ({"tools": [{"name": "a"}]}, "tools[0].input_schema"),
    "tool's description a list": ({"tools": [{**CLAUDE_WEATHER, "description": []}]}, "tools[0].description"),
    "tool type a number": ({"tools": [{**CLAUDE_WEATHER, "type": 1}]}, "tools[0].type"),
    "too many tools": ({"tools": [CLAUDE_WEATHER] * 129}, "tools"),
    "tool_choice text": ({"tool_choice": "auto"}, "tool_choice"),
    "tool_choice type unknown": ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
    "tool_choice any without tools": ({"tool_choice": {"type": "any"}}, "tool_choice"),
    "tool_choice of an unknown tool": (
        {"tools": [CLAUDE_WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name",
    ),
    "tool_choice without a name": ({"tools": [CLAUDE_WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    "disable_parallel_tool_use text": ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}}, "disable_parallel"),
    "thinking true": ({"thinking": True}, "thinking"),
    "thinking type unknown": ({"thinking": {"type": "hard"}}, "thinking.type"),
    "thinking budget zero": ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
    "output_config a list": ({"output_config": [1]}, "output_config"),
    "effort unknown": ({"output_config": {"effort": "huge"}}, "output_config.effort"),
    "format unknown": ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
    "format without schema": ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
}  # fmt: skip


@pytest.mark.parametrize("case", CLAUDE_WRONG)
def test_messages_wrong_field_is_400_naming_it_in_anthropics_shape(case: str, server: Server) -> None:
    fields, word = CLAUDE_WRONG[case]
    reply = server.post("/v1/messages", claude() | fields)
    document = reply.json()
    assert reply.status == 400 and set(document) == {"type", "error"} and document["type"] == "error", document
    assert document["error"]["type"] == "invalid_request_error" and word in document["error"]["message"], document


CLAUDE_ERRORS: dict[str, tuple[str, str, Any, int, str]] = {
    "unknown model": ("POST", "/v1/messages", claude(model="nobody"), 404, "not_found_error"),
    "no JSON": ("POST", "/v1/messages", b"{", 400, "invalid_request_error"),
    "no JSON to count": ("POST", "/v1/messages/count_tokens", b"[]", 400, "invalid_request_error"),
    "another method": ("GET", "/v1/messages", None, 405, "invalid_request_error"),
    "too large": ("POST", "/v1/messages", b" " * ((16 << 20) + 1), 413, "request_too_large"),
    "cannot be loaded": ("POST", "/v1/messages", claude(model="hollow"), 500, "api_error"),
}


@pytest.mark.parametrize("case", CLAUDE_ERRORS)
def test_messages_errors_have_anthropics_types(case: str, server: Server) -> None:
    method, path, body, status, kind = CLAUDE_ERRORS[case]
    reply = server.request(method, path, body)
    assert (reply.status, reply.json()["type"], reply.json()["error"]["type"]) == (status, "error", kind)
    assert reply.json()["error"]["message"]


def test_messages_without_the_key_are_401_and_x_api_key_opens(guarded: Server) -> None:
    refused = guarded.post("/v1/messages", claude())
    assert (refused.status, refused.json()["error"]["type"]) == (401, "authentication_error")
    assert guarded.post("/v1/messages", claude(), **{"x-api-key": "s3cret"}).status == 200


@streamed_and_plain
def test_messages_prompt_beyond_the_context_says_it_in_anthropics_words(stream: bool, server: Server) -> None:
    reply = server.post("/v1/messages", claude("a" * LONG_CTX, stream=stream))
    tokens = 1 + len("[user][assistant]:") + LONG_CTX
    assert reply.status == 400 and reply.json()["error"]["code"] == "context_length_exceeded"
    assert reply.json()["error"]["message"] == f"prompt is too long: {tokens} tokens > {LONG_CTX - 1} maximum"


def test_head_of_the_root_is_200_without_a_key(guarded: Server) -> None:
    assert guarded.request("HEAD", "/").status == 200


@pytest.mark.parametrize(("path", "sign"), [("/v1/messages", "ping"), ("/v1/responses", "response.in_progress")])
def test_silence_is_broken_by_events(path: str, sign: str, serve: Callable[..., Server], tmp_path: Path) -> None:
    load = '        pulses[0].begin("load")\n        llama ='
    script = altered(tmp_path, ("PING_SECONDS = 15.0", "PING_SECONDS = 0.2"), (load, "        time.sleep(2)\n" + load))
    folder = tmp_path / "models"
    folder.mkdir()
    write_recital(folder / "recital.gguf")
    server = serve("--models-dir", folder, script=script)
    stream = named(server, path, claude() | respond())
    kinds = [d["type"] for d in stream]
    assert kinds.count(sign) >= 3 and kinds[-1] in ("message_stop", "response.completed")
    if path == "/v1/responses":
        assert kinds[0] == "response.created" and kinds.count("response.created") == 1
        assert [d["sequence_number"] for d in stream] == list(range(len(stream)))


@linux
@pytest.mark.parametrize(("path", "last"), [("/v1/messages", "error"), ("/v1/responses", "response.failed")])
def test_stream_that_breaks_off_ends_with_the_dialects_error(
    path: str, last: str, serve: Callable[..., Server], models: Path
) -> None:
    server = serve("--models-dir", models, "--ctx", str(LONG_CTX))
    with server.stream(path, claude("forever") | respond("forever") | {"max_tokens": LONG_CTX}) as stream:
        seen = [next(stream) for _ in range(8)]
        os.kill(server.engine("recital.gguf"), signal.SIGKILL)
        seen += stream
    assert seen[-1]["type"] == last
    assert not {"message_stop", "message_delta", "response.completed"} & {d["type"] for d in seen}
    error = seen[-1]["error"] if last == "error" else seen[-1]["response"]["error"]
    assert error["code"] == "generation_failed"


# OpenAI's Responses


def test_response_has_openais_shape(server: Server) -> None:
    reply = server.post("/v1/responses", respond(instructions="Be kind.", metadata={"a": "b"})).json()
    assert (reply["object"], reply["status"], reply["model"], reply["error"]) == ("response", "completed", "recital", None)
    assert reply["instructions"] == "Be kind." and reply["metadata"] == {"a": "b"} and reply["store"] is False
    (item,) = reply["output"]
    assert item.pop("id").startswith("msg_") and reply["id"].startswith("resp_")
    part = {"type": "output_text", "text": TEXTS[":"], "annotations": [], "logprobs": []}
    assert item == {"type": "message", "role": "assistant", "status": "completed", "content": [part]}
    asked = prompt_tokens(server, {"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"})
    usage = reply["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (asked, 3, asked + 3)


def test_response_stream_sends_its_events_in_order(server: Server) -> None:
    stream = named(server, "/v1/responses", respond())
    kinds = [kind for kind, _ in itertools.groupby(d["type"].removeprefix("response.") for d in stream)]
    assert kinds == ["created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
                     "content_part.done", "output_item.done", "completed"]  # fmt: skip
    assert [d["sequence_number"] for d in stream] == list(range(len(stream)))
    (added,), (done,) = ([d["item"]["id"] for d in stream if d["type"] == f"response.output_item.{k}"] for k in ("added", "done"))
    final = stream[-1]["response"]
    assert added == done == final["output"][0]["id"] == stream[4]["item_id"] and final["usage"]["output_tokens"] == 3
    assert "".join(d["delta"] for d in stream if d["type"].endswith("delta")) == final["output"][0]["content"][0]["text"]
    assert {d["response"]["id"] for d in stream if "response" in d} == {final["id"]}


def test_response_thought_is_an_item_that_can_be_sent_back(server: Server, boxed: Server) -> None:
    reasoning, message = server.post("/v1/responses", respond("think")).json()["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "two and two\n"}] and reasoning["summary"] == []
    assert base64.b64decode(reasoning["encrypted_content"]) == b"two and two\n"
    sealed = {"type": "reasoning", "summary": [], "encrypted_content": reasoning["encrypted_content"]}
    given = [{"role": "user", "content": "a"}, sealed, message, {"role": "user", "content": "c"}]
    usage = boxed.post("/v1/responses", respond(given, model="thoughtful")).json()["usage"]
    same = [given[0], {"role": "assistant", "content": "Four!!", "reasoning_content": "two and two\n"}, given[3]]
    assert usage["input_tokens"] == prompt_tokens(boxed, *same, model="thoughtful")


def test_response_thought_streams_before_the_text(server: Server) -> None:
    stream = named(server, "/v1/responses", respond("think"))
    kinds = [kind for kind, _ in itertools.groupby(d["type"].removeprefix("response.") for d in stream)]
    assert kinds[2:8] == ["output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done",
                          "content_part.done", "output_item.done"]  # fmt: skip
    assert [d["item"]["type"] for d in stream if d["type"].endswith("item.done")] == ["reasoning", "message"]


def test_response_foreign_encrypted_content_is_left_out(boxed: Server) -> None:
    sealed = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAAABo_-8="}
    given = [{"role": "user", "content": "a"}, sealed, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    usage = boxed.post("/v1/responses", respond(given, model="thoughtful")).json()["usage"]
    assert usage["input_tokens"] == 1 + len("[user]|a[assistant]|b[user]|c:")


def test_response_call_streams_its_arguments(server: Server) -> None:
    stream = named(server, "/v1/responses", respond("weather", tools=[RESPONSE_WEATHER]))
    kinds = [kind for kind, _ in itertools.groupby(d["type"].removeprefix("response.") for d in stream)]
    assert kinds[2:] == ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
                         "output_item.done", "completed"]  # fmt: skip
    (call,) = stream[-1]["response"]["output"]
    assert json.loads(call["arguments"]) == CITY and call["name"] == "get_weather" and "namespace" not in call
    assert call["id"].startswith("fc_") and call["call_id"] and call["status"] == "completed"
    assert "".join(d["delta"] for d in stream if d["type"].endswith("delta")) == call["arguments"]


RESPONSE_CHATS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "developer and parts": (
        [{"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be"}]},
         {"role": "user", "content": "a"}],
        [{"role": "system", "content": "Be"}, {"role": "user", "content": "a"}],
    ),
    "a call and its output": (
        [{"role": "user", "content": "weather"},
         {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Well"}]},
         {"type": "function_call", "call_id": "1", "name": "get_weather", "arguments": '{"city": "Paris"}'},
         {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "sunny"}]}],
        [{"role": "user", "content": "weather"}, {"role": "assistant", "content": "Well", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}]},
         {"role": "tool", "tool_call_id": "1", "content": "sunny"}],
    ),
    "a freeform call": (
        [{"role": "user", "content": "x"}, {"type": "custom_tool_call", "call_id": "1", "name": "get_weather", "input": "a\nb"},
         {"type": "custom_tool_call_output", "call_id": "1", "output": "done"}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"input": "a\\nb"}'}}]},
         {"role": "tool", "tool_call_id": "1", "content": "done"}],
    ),
    "two calls in a row are one turn": (
        [{"role": "user", "content": "x"},
         *({"type": "function_call", "call_id": c, "name": "add", "arguments": "{}"} for c in "12"),
         *({"type": "function_call_output", "call_id": c, "output": c} for c in "12")],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [
            {"id": c, "type": "function", "function": {"name": "add", "arguments": "{}"}} for c in "12"]},
         *({"role": "tool", "tool_call_id": c, "content": c} for c in "12")],
    ),
    "what OpenAI's own tools did": (
        [{"role": "user", "content": "a"}, {"type": "web_search_call", "id": "ws_1", "status": "completed"}],
        [{"role": "user", "content": "a"}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RESPONSE_CHATS)
def test_response_input_becomes_the_prompt_that_openais_chat_makes(case: str, server: Server) -> None:
    given, same = RESPONSE_CHATS[case]
    usage = server.post("/v1/responses", respond(given)).json()["usage"]
    assert usage["input_tokens"] == prompt_tokens(server, *same)


def test_response_namespaced_call_comes_back_with_name_and_namespace_apart(boxed: Server) -> None:
    tools = [{"type": "namespace", "name": "mcp__sky__", "description": "The sky", "tools": [RESPONSE_WEATHER]}]
    body = respond("Paris?", model="shimmy-tiny", tools=tools, tool_choice="required", parallel_tool_calls=False)
    reply = boxed.post("/v1/responses", body).json()
    (call,) = [item for item in reply["output"] if item["type"] == "function_call"]
    assert (call["namespace"], call["name"]) == ("mcp__sky__", "get_weather")
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "1"}
    sent_back = [{"role": "user", "content": "Paris?"}, call, output]
    assert boxed.post("/v1/responses", {**body, "input": sent_back, "tool_choice": "none"}).status == 200


def test_response_freeform_call_comes_back_as_raw_input(boxed: Server) -> None:
    tool = {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}}
    choice = {"type": "custom", "name": "apply_patch"}
    stream = named(boxed, "/v1/responses", respond("Patch it", model="shimmy-tiny", tools=[tool], tool_choice=choice, seed=1))
    (call,) = [i for i in stream[-1]["response"]["output"] if i["type"] == "custom_tool_call"]
    assert call["name"] == "apply_patch" and isinstance(call["input"], str) and '"input"' not in call["input"]
    (done,) = [d for d in stream if d["type"] == "response.custom_tool_call_input.done"]
    assert (done["input"], done["item_id"]) == (call["input"], call["id"])


def test_response_freeform_tool_is_described_with_its_grammar(server: Server) -> None:
    form = {"type": "grammar", "syntax": "regex", "definition": "[a-c]+"}
    tool = {"type": "custom", "name": "spell", "description": "Spells", "format": form}
    schema = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"], "additionalProperties": False}
    said = "Spells\n\nThe input must match this grammar (regex):\n[a-c]+"
    same = {"type": "function", "function": {"name": "spell", "description": said, "parameters": schema}}
    usage = server.post("/v1/responses", respond(tools=[tool])).json()["usage"]
    assert usage["input_tokens"] == prompt_tokens(server, {"role": "user", "content": "hi"}, tools=[same])


def test_response_tools_that_the_server_cannot_run_are_left_out(server: Server) -> None:
    hosted = [{"type": "web_search"}, {"type": "image_generation"}, {"type": "mcp", "server_label": "x"}]
    reply = server.post("/v1/responses", respond("weather", tools=hosted)).json()
    assert reply["usage"]["input_tokens"] == prompt_tokens(server, {"role": "user", "content": "weather"})


def test_response_allowed_tools_narrow_what_is_offered(server: Server) -> None:
    other = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {}}}
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_weather"}]}
    usage = server.post("/v1/responses", respond("weather", tools=[other, RESPONSE_WEATHER], tool_choice=choice)).json()["usage"]
    assert usage["input_tokens"] == prompt_tokens(server, {"role": "user", "content": "weather"}, tools=[WEATHER])


def test_response_that_was_cut_is_incomplete(server: Server) -> None:
    stream = named(server, "/v1/responses", respond("count", max_output_tokens=3))
    response = stream[-1]["response"]
    assert stream[-1]["type"] == "response.incomplete" and response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"} and response["output"][0]["status"] == "incomplete"


def test_response_text_format_holds_the_answer_to_its_schema(boxed: Server) -> None:
    schema = {"type": "object", "properties": {"port": {"type": "integer"}}, "required": ["port"], "additionalProperties": False}
    form = {"type": "json_schema", "name": "answer", "strict": True, "schema": schema}
    reply = boxed.post("/v1/responses", respond("Which port?", model="shimmy-tiny", text={"format": form})).json()
    assert set(json.loads(reply["output"][0]["content"][0]["text"])) == {"port"}


def test_response_prompt_beyond_the_context_fails_among_the_events(server: Server) -> None:
    stream = named(server, "/v1/responses", respond("a" * LONG_CTX))
    assert [d["type"] for d in stream] == ["response.created", "response.failed"]
    assert stream[-1]["response"]["status"] == "failed"
    assert stream[-1]["response"]["error"]["code"] == "context_length_exceeded"
    plain = server.post("/v1/responses", respond("a" * LONG_CTX))
    assert assert_error(plain, 400, "context_length_exceeded")["type"] == "invalid_request_error"


RESPONSE_WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "input absent": ({"input": None}, "input"),
    "input a number": ({"input": 1}, "input"),
    "input empty": ({"input": []}, "input"),
    "input nothing that can be read": ({"input": [{"type": "web_search_call"}]}, "input"),
    "an item no object": ({"input": ["a"]}, "input[0]"),
    "item type unknown": ({"input": [{"type": "dance"}]}, "input[0].type"),
    "item type a list": ({"input": [{"type": ["message"]}]}, "input[0].type"),
    "an item reference": ({"input": [{"type": "item_reference", "id": "msg_1"}]}, '"item_reference"'),
    "role unknown": ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    "content absent": ({"input": [{"role": "user"}]}, "input[0].content"),
    "an image": ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, '"input_image"'),
    "text a number": ({"input": [{"role": "user", "content": [{"type": "input_text", "text": 1}]}]}, "input[0].content[0].text"),
    "call without id": ({"input": [{"type": "function_call", "name": "a", "arguments": "{}"}]}, "input[0].call_id"),
    "call without name": ({"input": [{"type": "function_call", "call_id": "1", "arguments": "{}"}]}, "input[0].name"),
    "arguments an object": (
        {"input": [{"type": "function_call", "call_id": "1", "name": "a", "arguments": {}}]}, "input[0].arguments",
    ),
    "namespace a number": (
        {"input": [{"type": "function_call", "call_id": "1", "name": "a", "namespace": 1, "arguments": ""}]},
        "input[0].namespace",
    ),
    "freeform input an object": (
        {"input": [{"type": "custom_tool_call", "call_id": "1", "name": "a", "input": {}}]}, "input[0].input",
    ),
    "output absent": ({"input": [{"type": "function_call_output", "call_id": "1"}]}, "input[0].output"),
    "encrypted_content a number": ({"input": [{"type": "reasoning", "encrypted_content": 1}]}, "input[0].encrypted_content"),
    "summary text": ({"input": [{"type": "reasoning", "summary": [1]}]}, "input[0].summary[0]"),
    "instructions a list": ({"instructions": []}, "instructions"),
    "model a number": ({"model": 1}, "model"),
    "previous_response_id": ({"previous_response_id": "resp_1"}, "previous_response_id"),
    "conversation": ({"conversation": "conv_1"}, "conversation"),
    "prompt": ({"prompt": {"id": "x"}}, "prompt"),
    "background": ({"background": True}, "background"),
    "top_logprobs": ({"top_logprobs": 2}, "top_logprobs"),
    "max_output_tokens zero": ({"max_output_tokens": 0}, "max_output_tokens"),
    "temperature text": ({"temperature": "hot"}, "temperature"),
    "stream a number": ({"stream": 1}, "stream"),
    "parallel_tool_calls text": ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    "tools an object": ({"tools": {}}, "tools"),
    "tool without type": ({"tools": [{"name": "a"}]}, "tools[0].type"),
    "function without name": ({"tools": [{"type": "function"}]}, "tools[0].name"),
    "parameters a list": ({"tools": [{"type": "function", "name": "a", "parameters": [1]}]}, "tools[0].parameters"),
    "namespace without tools": ({"tools": [{"type": "namespace", "name": "a"}]}, "tools[0].tools"),
    "namespace's function without name": (
        {"tools": [{"type": "namespace", "name": "a", "tools": [{"type": "function"}]}]}, "tools[0].tools[0].name",
    ),
    "freeform format unknown": ({"tools": [{"type": "custom", "name": "a", "format": {"type": "yaml"}}]}, "tools[0].format.type"),
    "freeform syntax unknown": (
        {"tools": [{"type": "custom", "name": "a", "format": {"type": "grammar", "syntax": "bnf", "definition": "x"}}]},
        "tools[0].format.syntax",
    ),
    "too many tools": ({"tools": [RESPONSE_WEATHER] * 129}, "tools"),
    "tool_choice unknown": ({"tool_choice": "some"}, "tool_choice"),
    "tool_choice a number": ({"tool_choice": 1}, "tool_choice"),
    "tool_choice required without tools": ({"tool_choice": "required"}, "tool_choice"),
    "tool_choice of a hosted tool": ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
    "tool_choice of an unknown tool": (
        {"tools": [RESPONSE_WEATHER], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name",
    ),
    "allowed_tools without a mode": ({"tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice.mode"),
    "reasoning text": ({"reasoning": "high"}, "reasoning"),
    "effort unknown": ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    "text a string": ({"text": "x"}, "text"),
    "format unknown": ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    "format without schema": ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
}  # fmt: skip


@pytest.mark.parametrize("case", RESPONSE_WRONG)
def test_response_wrong_field_is_400_naming_it(case: str, server: Server) -> None:
    fields, word = RESPONSE_WRONG[case]
    assert assert_error(server.post("/v1/responses", respond() | fields), 400, "invalid_request", word)["param"]


def test_models_for_codex_hold_an_empty_list_of_its_own_kind(server: Server) -> None:
    listed = server.get("/v1/models?client_version=0.99.0").json()
    assert listed["models"] == [] and "recital" in [m["id"] for m in listed["data"]]
    assert "models" not in server.get("/v1/models").json()


# The official packages


def test_openai_package_reads_a_response_and_its_stream(server: Server) -> None:
    client = server.client()
    assert client.responses.create(model="recital", input="hi").output_text == TEXTS[":"]
    with client.responses.stream(model="recital", input="weather", tools=[RESPONSE_WEATHER]) as stream:  # type: ignore[list-item]
        kinds = [event.type for event in stream]
        (call,) = stream.get_final_response().output
    assert call.type == "function_call" and json.loads(call.arguments) == CITY and kinds[-1] == "response.completed"


def test_openai_package_carries_a_thought_into_the_next_turn(server: Server) -> None:
    client = server.client()
    with client.responses.stream(model="recital", input="think") as stream:
        first = stream.get_final_response()
    assert [item.type for item in first.output] == ["reasoning", "message"] and first.output_text == "Four!!"
    given: Any = [{"role": "user", "content": "think"}, *(i.to_dict() for i in first.output), {"role": "user", "content": "hi"}]
    assert client.responses.create(model="recital", input=given).output_text == TEXTS[":"]


def test_openai_package_raises_what_a_response_refuses(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().responses.create(model="recital", input="hi", previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"


def anthropic_client(server: Server) -> Any:
    """Anthropic's package, pointed at the server."""
    anthropic = pytest.importorskip("anthropic")
    web = anthropic.DefaultHttpxClient(trust_env=False)
    return anthropic.Anthropic(base_url=f"http://{server.host}:{server.port}", api_key="none", http_client=web, max_retries=0)


def test_anthropic_package_reads_a_message_and_counts_tokens(server: Server) -> None:
    client, said = anthropic_client(server), [{"role": "user", "content": "hi"}]
    message = client.messages.create(model="recital", max_tokens=20, messages=said)
    assert (message.content[0].text, message.stop_reason) == (TEXTS[":"], "end_turn")
    assert client.messages.count_tokens(model="recital", messages=said).input_tokens == prompt_tokens(server, *said)


def test_anthropic_package_runs_a_tool_with_thoughts_streamed(server: Server) -> None:
    client = anthropic_client(server)
    said: list[Any] = [{"role": "user", "content": "weather"}]
    fields = {"model": "recital", "max_tokens": 2000, "tools": [CLAUDE_WEATHER]}
    with client.messages.stream(messages=said, thinking={"type": "enabled", "budget_tokens": 1024}, **fields) as stream:
        message = stream.get_final_message()
    (call,) = message.content
    assert (call.name, call.input, message.stop_reason) == ("get_weather", CITY, "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    said += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    with client.messages.stream(messages=said, **fields) as stream:
        assert "".join(stream.text_stream) == TEXTS["S"]
        usage = stream.get_final_message().usage
    assert usage.input_tokens > 0 and usage.cache_read_input_tokens > 0


def test_anthropic_package_raises_its_own_errors(server: Server) -> None:
    anthropic: Any = pytest.importorskip("anthropic")
    client = anthropic_client(server)
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="nobody", max_tokens=5, messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        client.messages.create(model="recital", max_tokens=5, messages=[{"role": "user", "content": "a" * LONG_CTX}])


ANTHROPIC_SCRIPT = """
const Anthropic = require("@anthropic-ai/sdk");
const client = new Anthropic({baseURL: process.argv[1], apiKey: "none", maxRetries: 0});
(async () => {
  const tools = [JSON.parse(process.argv[2])];
  const ask = content => client.messages.stream({model: "recital", max_tokens: 50, tools, messages: [{role: "user", content}]});
  const called = await ask("weather").finalMessage(), said = await ask("think").finalMessage();
  const failed = await client.messages.create({model: "nobody", max_tokens: 1, messages: []}).catch(e => e.status);
  console.log(JSON.stringify([called.stop_reason, called.content[0].input, said.content.map(b => b.type), failed]));
})();
"""


def test_anthropic_npm_package_reads_streams(server: Server) -> None:
    """Needs node, and NODE_PATH where @anthropic-ai/sdk lies."""
    if not shutil.which("node") or subprocess.run(["node", "-e", "require('@anthropic-ai/sdk')"], capture_output=True).returncode:
        pytest.skip("@anthropic-ai/sdk is not installed")
    command = ["node", "-e", ANTHROPIC_SCRIPT, f"http://{server.host}:{server.port}", json.dumps(CLAUDE_WEATHER)]
    done = subprocess.run(command, capture_output=True, timeout=HANG)
    assert json.loads(done.stdout) == ["tool_use", CITY, ["thinking", "text"], 400], done.stderr
