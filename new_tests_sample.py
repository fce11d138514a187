# ruff: noqa: F811  pytest fixtures
"""Tests of sampling, thought budgets, constraints behind a marker, and who shares prompts; to be moved into test_shimmy.py."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from test_shimmy import (  # noqa: F401  some are fixtures
    ADD,
    GREEDY,
    SPELLED,
    SPELLER_STARTS,
    TEXTS,
    TOKEN_ID,
    VOCABULARY,
    WEATHER,
    Reply,
    Server,
    altered,
    assert_error,
    cases,
    deltas,
    ids,
    kinds,
    models,
    serve,
    server,
    shimmy,
    spelling,
    tool_root,
    write_recital,
    write_speller,
)

# ── Sampling ──────────────────────────────────────────────────────────────────────────────────────────────────────────

SAMPLER_BOUNDS: dict[str, tuple[list[Any], tuple[str, ...]]] = {  # more rows for WRONG_VALUES
    "typical_p": ([-0.1, 1.1, "x", True], ("0", "1")),
    "top_n_sigma": ([-1.1, 101, "x"], ("-1", "100")),
    "xtc_probability": ([-0.1, 1.1, []], ("0", "1")),
    "xtc_threshold": ([-0.1, 1.1, {}], ("0", "1")),
    "repeat_last_n": ([-2, 1.5, "64"], ("-1",)),
    "dry_multiplier": ([-0.1, 101, "x"], ("0", "100")),
    "dry_base": ([0.9, 101, "x"], ("1", "100")),
    "dry_allowed_length": ([-1, 1.5, "2"], ("0",)),
    "dry_penalty_last_n": ([-2, 0.5, True], ("-1",)),
    "dry_sequence_breakers": (["\n", [1], ["x"] * 17, ["x" * 41]], ()),
    "mirostat": ([-1, 3, 1.5, "2"], ("0", "2")),
    "mirostat_tau": ([-1, 101], ("0", "100")),
    "mirostat_eta": ([-0.1, 1.1], ("0", "1")),
    "logit_bias": ([5, "x", {"x": 1}, {"1": 101}, {"1": True}, [1], [[1]], [["x", 1]], [[-1, 1]], [[1, 101]], [[1, True]]], ()),
}
WRONG_SAMPLING = [
    pytest.param(field, value, bounds, id=f"{field}={json.dumps(value)[:24]}")
    for field, (values, bounds) in SAMPLER_BOUNDS.items()
    for value in values
]


@pytest.mark.parametrize(("field", "value", "bounds"), WRONG_SAMPLING)
def test_sampling_field_out_of_bounds_is_400_naming_it(
    field: str, value: Any, bounds: tuple[str, ...], server: Server
) -> None:
    assert_error(server.generate(**{field: value}), 400, "invalid_request", field, *bounds)
    error = assert_error(server.chat(**{field: value}), 400, "invalid_request", field, *bounds)
    assert error["type"] == "invalid_request_error" and error["param"].startswith(field)


BREAKERS = {"dry_sequence_breakers": ["é", "\n", "\0", "", "the the", "日" * 13]}
LOWEST = {
    "typical_p": 0, "top_n_sigma": -1, "xtc_probability": 0, "xtc_threshold": 0, "repeat_last_n": -1, "dry_multiplier": 0,
    "dry_base": 1, "dry_allowed_length": 0, "dry_penalty_last_n": -1, "dry_sequence_breakers": [], "mirostat": 0,
}  # fmt: skip
HIGHEST = {
    "typical_p": 1, "top_n_sigma": 100, "xtc_probability": 1, "xtc_threshold": 1, "repeat_last_n": 2**40,
    "repeat_penalty": 1.1, "dry_multiplier": 100, "dry_base": 100, "dry_allowed_length": 2**40, "dry_penalty_last_n": 2**40,
    "dry_sequence_breakers": ["x" * 40] * 16,
}  # fmt: skip


@cases(
    "fields",
    {
        "lowest": LOWEST,
        "highest": HIGHEST,
        "DRY with nothing allowed": {**LOWEST, "dry_multiplier": 1},
        "odd breakers": {"dry_multiplier": 1, **BREAKERS},
        "mirostat 1 at its lowest": {"mirostat": 1, "mirostat_tau": 0, "mirostat_eta": 0},
        "mirostat 2 at its highest": {"mirostat": 2, "mirostat_tau": 100, "mirostat_eta": 1, "temperature": 5},
        "typical with all tokens and the end ignored": {"typical_p": 0.5, "top_k": 0, "ignore_eos": True},
        "everything in a schema": {**HIGHEST, "typical_p": 0.1, "top_k": 0, "json_schema": {"enum": ["ab", "cd"]}},
        "mirostat in a schema": {"mirostat": 1, "json_schema": {"enum": ["ab", "cd"]}},
        "XTC in a schema": {"xtc_probability": 1, "xtc_threshold": 0, "json_schema": {"enum": ["ab", "cd"]}},
    },
)
def test_sampling_limits_are_inclusive(fields: dict[str, Any], server: Server) -> None:
    reply = server.generate("Once", "dice", max_tokens=20, **fields)
    assert reply.status == 200, reply.body
    assert "json_schema" not in fields or json.loads(reply.text) in ("ab", "cd")


def next_tokens(server: Server, prompt: Any, model: str = "recital", **fields: Any) -> tuple[str, dict[str, float]]:
    """Returns the token picked next and the probabilities of the twenty likeliest."""
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "logprobs": 20, "ignore_eos": True, **fields}
    shown = server.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    return shown["tokens"][0], {token: math.exp(logprob) for token, logprob in shown["top_logprobs"][0].items()}


ALL: dict[str, Any] = {"top_k": 0, "top_p": 1, "min_p": 0}
PROMPTS = ["Once", "the end", "abc"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_xtc_drops_every_likely_token_but_the_last(prompt: str, kinds: Server) -> None:
    _, top = next_tokens(kinds, ids(prompt), "llama")
    likely = sorted(top, key=top.__getitem__, reverse=True)[:4]
    threshold = (top[likely[3]] + sorted(top.values())[-5]) / 2
    assert threshold < 0.5
    picked, _ = next_tokens(kinds, ids(prompt), "llama", **ALL, temperature=0, xtc_probability=1, xtc_threshold=threshold)
    assert picked == likely[3]


def test_xtc_with_a_threshold_above_one_half_is_off(server: Server) -> None:
    greedy = server.generate("Once", "dice", **GREEDY).text
    assert server.generate("Once", "dice", **GREEDY, xtc_probability=1, xtc_threshold=0.6).text == greedy


@pytest.mark.parametrize("prompt", PROMPTS)
def test_typical_p_zero_keeps_the_token_of_expected_surprise(prompt: str, kinds: Server) -> None:
    _, top = next_tokens(kinds, ids(prompt), "llama")
    best = sorted(top, key=top.__getitem__, reverse=True)[:10]
    shares = {token: top[token] / sum(map(top.__getitem__, best)) for token in best}
    entropy = -sum(p * math.log(p) for p in shares.values())
    picked, _ = next_tokens(kinds, ids(prompt), "llama", top_k=10, typical_p=0, temperature=2)
    assert picked == min(best, key=lambda token: abs(-math.log(shares[token]) - entropy))


@pytest.mark.parametrize("only_best", [{"top_n_sigma": 0.01}, {"mirostat": 2, "mirostat_tau": 0}], ids=json.dumps)
def test_sampler_narrowed_to_the_best_token_is_greedy(only_best: dict[str, Any], server: Server) -> None:
    greedy = server.generate("Once", "dice", **GREEDY).text
    assert server.generate("Once", "dice", **{**GREEDY, **ALL, "temperature": 3, **only_best}).text == greedy


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_follows_its_target(version: int, server: Server) -> None:
    """A low target keeps texts likely, a high one does not."""

    def surprise(tau: float) -> float:
        body = {"model": "dice", "prompt": "Once", "max_tokens": 60, "ignore_eos": True, "logprobs": 0, "temperature": 1,
                "seed": 5, "mirostat": version, "mirostat_tau": tau}  # fmt: skip
        shown = server.post("/v1/completions", body).json()["choices"][0]["logprobs"]
        return -sum(shown["token_logprobs"]) / len(shown["token_logprobs"])

    assert surprise(1) < surprise(6)


TICKING = [TOKEN_ID[word] for word in ("tock ", "tick ", "tock ", "tick ", "tock ", "tick ")]


@cases(
    "fields, repeats",
    {
        "off": ({}, True),
        "on": ({"dry_multiplier": 100}, False),
        "growing with the repetition": ({"dry_multiplier": 1, "dry_base": 10}, False),
        "too weak": ({"dry_multiplier": 0.1, "dry_base": 1}, True),
        "all of it allowed": ({"dry_multiplier": 100, "dry_allowed_length": 6}, True),
        "seeing one token": ({"dry_multiplier": 100, "dry_penalty_last_n": 1}, True),
        "seeing nothing": ({"dry_multiplier": 100, "dry_penalty_last_n": 0}, True),
        "seeing the whole context": ({"dry_multiplier": 100, "dry_penalty_last_n": -1}, False),
        "a breaker inside": ({"dry_multiplier": 100, "dry_sequence_breakers": ["ick"]}, True),
        "no breakers": ({"dry_multiplier": 100, "dry_sequence_breakers": []}, False),
    },
)
def test_dry_sees_repetitions_in_the_prompt(fields: dict[str, Any], repeats: bool, server: Server) -> None:
    picked, _ = next_tokens(server, TICKING, temperature=0, **fields)
    assert (picked == "tock ") == repeats


def test_dry_stops_an_endless_repetition(server: Server) -> None:
    assert "tock tick tock tick tock" in server.generate("#", max_tokens=20, temperature=0).text
    assert "tock tick tock tick tock" not in server.generate("#", max_tokens=20, temperature=0, dry_multiplier=100).text


@cases("last_n, penalized", {"nothing": (0, False), "too little": (3, False), "enough": (6, True), "the context": (-1, True)})
def test_repeat_last_n_says_how_far_penalties_look_back(last_n: int, penalized: bool, server: Server) -> None:
    tokens = [TOKEN_ID[word] for word in ("tock ", "w01 ", "w02 ", "w03 ", "w04 ", "tick ")]
    picked, _ = next_tokens(server, tokens, temperature=0, repeat_penalty=10, repeat_last_n=last_n)
    assert (picked != "tock ") == penalized


def test_mirostat_and_xtc_repeat_with_a_seed(server: Server) -> None:
    for fields in ({"mirostat": 1}, {"mirostat": 2}, {"xtc_probability": 0.5, "xtc_threshold": 0.01}):
        ask = functools.partial(server.generate, "Once", "dice", max_tokens=40, temperature=1, ignore_eos=True, **fields)
        assert ask(seed=3).text == ask(seed=3).text != ask(seed=4).text


def test_choices_are_seeded_one_after_another(server: Server) -> None:
    body = {"model": "dice", "prompt": "Once", "max_tokens": 30, "temperature": 1, "ignore_eos": True}
    together = server.post("/v1/completions", {**body, "seed": 7, "n": 3}).json()["choices"]
    assert [c["text"] for c in together] == [server.post("/v1/completions", {**body, "seed": 7 + i}).text for i in range(3)]


W07 = TOKEN_ID["w07 "]


@cases(
    "bias, text",
    {
        "an object": ({str(W07): 100}, "w07 w07 "),
        "pairs": ([[W07, 100]], "w07 w07 "),
        "pairs with the id in digits": ([[str(W07), 100]], "w07 w07 "),
        "none": ([], "w00 w01 "),
        "banned by false in pairs": ([[TOKEN_ID["w00 "], False], [W07, 100]], "w07 w07 "),
        "banned by false in an object": ({str(TOKEN_ID["w00 "]): False, str(W07): 100}, "w07 w07 "),
    },
)
def test_logit_bias_takes_the_forms_of_openai_and_llama_server(bias: Any, text: str, server: Server) -> None:
    assert server.generate("=", max_tokens=2, temperature=0, logit_bias=bias).text == text


def test_generate_help_names_every_sampling_parameter(tmp_path: Path) -> None:
    said = shimmy("generate", "--help", home=tmp_path).stdout.decode()
    assert all(f"--{name.replace('_', '-')} " in said for name in SAMPLER_BOUNDS if name != "logit_bias")


def test_generate_flags_of_new_samplers_reach_them(models: Path, tmp_path: Path) -> None:
    args = ["--max-tokens", "20", "--temperature", "0", "--dry-multiplier", "100", "--repeat-last-n", "-1"]
    ask = functools.partial(shimmy, "generate", "recital", "--raw", "--prompt", "#", "--models-dir", models, home=tmp_path)
    done = ask(*args, "--dry-sequence-breakers", "Never", "--dry-sequence-breakers", "ever")
    assert done.returncode == 0 and b"tock tick tock tick tock" not in done.stdout, done.stderr
    assert b"tock tick tock tick tock" in ask(*args, "--dry-sequence-breakers", "ick").stdout


# ── Log probabilities ─────────────────────────────────────────────────────────────────────────────────────────────────


@cases(
    "prompt, stop, text",
    {
        "no stop string": ("|", [], TEXTS["|"]),
        "a stop string of several tokens": ("|", ["STOP"], "alpha "),
        "a stop string that begins as a token does": ("=", ["w03 w04"], "w00 w01 w02 "),
        "a stop string inside a token": (":", ["orl"], "Hello wide w"),
        "a stop string at once": (":", ["Hell"], ""),
        "a stop string that does not come": ("|", ["omegaX", "STOPPX"], TEXTS["|"]),
        "characters of several tokens": ("~", ["!!!"], "café and😀"),
    },
)
def test_logprobs_joined_are_the_text_up_to_a_stop_string(prompt: str, stop: list[str], text: str, server: Server) -> None:
    said = {":": "hi", "|": "stopping", "=": "count", "~": "unicode"}[prompt]
    choice = server.chat(said, logprobs=True, temperature=0, stop=stop).json()["choices"][0]
    assert choice["message"]["content"] == text
    assert b"".join(bytes(token["bytes"]) for token in choice["logprobs"]["content"]).decode() == text


@cases(
    "prompt, stop, text",
    {
        "text of whole tokens": ("=", ["w03 w05"], TEXTS["="]),
        "text that ends inside a token": ("|", ["STOP"], "alpha "),
        "held text that is no stop string": ("|", ["STOPPER", "ha STOPPSTOPS"], TEXTS["|"]),
    },
)
def test_every_chunk_carries_the_logprobs_of_its_own_text(prompt: str, stop: list[str], text: str, thinking: Server) -> None:
    """Where a stop string may begin text waits, in whole tokens, and so do their log probabilities."""
    body = {"model": "recital", "prompt": prompt, "stop": stop, "temperature": 0, "logprobs": 0}
    sent = thinking.streamed("/v1/completions", body)
    pieces = [chunk["choices"][0] for chunk in sent[:-1] if chunk["choices"] and chunk["choices"][0]["text"]]
    assert [piece["text"] for piece in pieces] == ["".join(piece["logprobs"]["tokens"]) for piece in pieces]
    assert "".join(piece["text"] for piece in pieces) == text and len(pieces) > 1


# ── Thoughts ──────────────────────────────────────────────────────────────────────────────────────────────────────────

THINKING_TEMPLATE = "{{ messages[-1].content }}<think>"  # the answer begins inside the thought


ALWAYS_BEHIND = (  # as if every prompt ended inside the thought
    "        if end.endswith(opens):\n            return",
    "        if end or not end:\n            return",
)


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose models think, and which sends each token by itself."""
    folder = tmp_path_factory.mktemp("thinking")
    write_speller(folder / "models" / "speller.gguf")
    write_recital(folder / "models" / "recital.gguf")
    write_recital(folder / "models" / "thinker.gguf", template=THINKING_TEMPLATE)
    for name, piece in (("opening", "\n</think>{"), ("foul", "\n</think>[")):  # the marker's token goes on
        write_recital(folder / "models" / f"{name}.gguf", tokens=[piece if t == "\n</think>" else t for t in VOCABULARY])
    script = altered(folder, ("FLUSH_SECONDS = 0.01", "FLUSH_SECONDS = 0.0"), ALWAYS_BEHIND)
    flags = ("--models-dir", folder / "models", "--model", "recital", "--max-loaded", "5")
    running = Server(folder / "home", "--port", "0", *flags, script=script)
    yield running
    running.stop()


def thought_of(reply: Reply) -> tuple[str, str]:
    message = reply.message
    return message.get("reasoning_content", "").strip(), message["content"]


@cases(
    "model, budget, thought, content",
    {
        "none": ("recital", None, "two and two", "Four!!"),
        "unlimited": ("recital", -1, "two and two", "Four!!"),
        "more than enough": ("recital", 100, "two and two", "Four!!"),
        "one token": ("recital", 1, "two and two", "Hello wide world"),
        "nothing": ("recital", 0, "", "Hello wide world"),
        "begun by the prompt, nothing": ("thinker", 0, "", "Hello wide world"),
        "begun by the prompt, two tokens": ("thinker", 2, "Hello wide", "Hello wide world"),
        "begun by the prompt, more than enough": ("thinker", 9, "Hello wide world", ""),
    },
)
def test_thought_ends_within_its_budget(
    model: str, budget: int | None, thought: str, content: str, thinking: Server
) -> None:
    fields = {"model": model, "temperature": 0, "thinking_budget_tokens": budget}
    reply = thinking.chat("think", **fields)
    assert thought_of(reply) == (thought, content)
    sent = deltas(thinking.streamed("/v1/chat/completions", {"messages": [{"role": "user", "content": "think"}], **fields}))
    assert "".join(d.get("content") or "" for d in sent) == content
    assert "".join(d.get("reasoning_content") or "" for d in sent).strip() == thought


def test_closing_a_thought_counts_as_completion_tokens_with_logprobs(thinking: Server) -> None:
    reply = thinking.chat("think", temperature=0, thinking_budget_tokens=1, logprobs=True).json()
    assert reply["usage"]["completion_tokens"] == len(["<think>", "two", *"\n</think>\n\n", "Hello", " wide", " world"])
    said = "".join(token["token"] for token in reply["choices"][0]["logprobs"]["content"])
    assert said.endswith("Hello wide world") and "two and two" in said


def test_thought_budget_leaves_a_marker_inside_the_answer_alone(thinking: Server) -> None:
    """Only what an answer begins with is a thought."""
    later = {str(TOKEN_ID["<think>"]): 40, str(TOKEN_ID["Hello"]): 0}  # as the second token
    plain = thinking.chat("hi", temperature=0, max_tokens=6, logit_bias=later)
    limited = thinking.chat("hi", temperature=0, max_tokens=6, logit_bias=later, thinking_budget_tokens=0)
    assert plain.message == limited.message


def test_max_tokens_ends_a_text_whose_thought_is_being_closed(thinking: Server) -> None:
    reply = thinking.chat("think", temperature=0, thinking_budget_tokens=1, max_tokens=5)
    assert (reply.finish_reason, reply.json()["usage"]["completion_tokens"]) == ("length", 5)


@pytest.mark.parametrize("value", [-2, 1.5, "x", True], ids=json.dumps)
@pytest.mark.parametrize("field", ["thinking_budget_tokens", "reasoning_budget_tokens"])
def test_thinking_budget_out_of_bounds_is_400(field: str, value: Any, server: Server) -> None:
    assert_error(server.chat(**{field: value}), 400, "invalid_request", field, "-1")


SHAPE = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}


@cases("temperature", {"greedy": 0, "sampled": 1})
@cases("model", {"a token of its own": "recital", "a token that goes on as the schema does": "opening"})
def test_schema_holds_behind_the_thought(model: str, temperature: float, thinking: Server) -> None:
    reply = thinking.chat("think", model, temperature=temperature, response_format={
        "type": "json_schema", "json_schema": {"name": "a", "schema": SHAPE}})  # fmt: skip
    assert reply.message["reasoning_content"].strip() == "two and two"
    assert json.loads(reply.message["content"]) == {"a": 1} and reply.finish_reason == "stop"


def test_token_that_would_break_the_schema_behind_the_thought_never_comes(thinking: Server) -> None:
    reply = thinking.chat("think", "foul", temperature=0, json_schema=SHAPE, max_tokens=40)
    assert reply.message["content"] == "" and reply.finish_reason == "length"


def test_text_that_never_closes_its_thought_just_ends(thinking: Server) -> None:
    reply = thinking.chat("think", "thinker", temperature=0, json_schema=SHAPE)
    assert (*thought_of(reply), reply.finish_reason) == ("Hello wide world", "", "stop")


@pytest.mark.parametrize("budget", [0, 1, 2])
@pytest.mark.parametrize("model", ["recital", "thinker"])
def test_schema_holds_behind_a_thought_that_was_closed(model: str, budget: int, thinking: Server) -> None:
    reply = thinking.chat("think", model, temperature=0, json_schema=SHAPE, thinking_budget_tokens=budget)
    assert json.loads(reply.message["content"]) == {"a": 1} and reply.finish_reason == "stop"


def test_marker_spelled_one_byte_at_a_time_begins_the_grammar(thinking: Server) -> None:
    reply = thinking.chat("thought", "speller", temperature=0, grammar='root ::= "\\n\\n" [A-Z] "x"')
    assert thought_of(reply) == ("Two and two?", "Fx")


@pytest.mark.parametrize("private", [True, False], ids=["private prompts", "shared prompts"])
def test_clients_with_different_keys_share_prompts_only_if_allowed(
    private: bool, serve: Callable[..., Server], models: Path
) -> None:
    flags = ["--private-prompts"] * private
    own = serve("--models-dir", models, "--api-key", "one", "--api-key", "two", *flags)

    def cached(key: str) -> int:
        body = {"model": "recital", "messages": [{"role": "user", "content": "A long beginning that some share"}]}
        reply = own.post("/v1/chat/completions", body, Authorization=f"Bearer {key}").json()
        return reply["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("one") == 0
    assert (cached("two") > 0) is not private
    assert cached("one") > 0
    assert_error(own.get("/api/models", Authorization="Bearer three"), 401, "unauthorized")


# ── What OpenAI's clients send ────────────────────────────────────────────────────────────────────────────────────────


NAMED = {"type": "function", "function": {"name": "get_weather"}}
JSON_OBJECT = {"response_format": {"type": "json_object"}}


@cases(
    "fields, word",
    {
        "an unknown word": ({"tool_choice": "maybe"}, "auto"),
        "a number": ({"tool_choice": 5}, "auto"),
        "a function without a name": ({"tool_choice": {"type": "function", "function": {}}}, "name"),
        "required without tools": ({"tools": None, "tool_choice": "required"}, "tools"),
        "a function without tools": ({"tools": None, "tool_choice": NAMED}, "get_weather"),
        "a function that is not offered": ({"tools": [ADD], "tool_choice": NAMED}, "get_weather"),
        "allowed_tools": ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "allowed_tools"),
        "required with a format": ({"tool_choice": "required", **JSON_OBJECT}, "response_format"),
        "a function with a format": ({"tool_choice": NAMED, **JSON_OBJECT}, "response_format"),
        "a function with a grammar": ({"tool_choice": NAMED, "grammar": 'root ::= "a"'}, "grammar"),
    },
)
def test_tool_choice_that_cannot_be_kept_is_400(fields: dict[str, Any], word: str, server: Server) -> None:
    error = assert_error(server.chat("weather?", **{"tools": [WEATHER], **fields}), 400, "invalid_request", word)
    assert error["param"] == "tool_choice"


@cases(
    "fields, names",
    {
        "required": ({"tool_choice": "required"}, {"get_weather", "add"}),
        "a function": ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, {"add"}),
        "one call alone": ({"tool_choice": "required", "parallel_tool_calls": False}, {"get_weather", "add"}),
        "one call alone, if any": ({"parallel_tool_calls": False}, {"get_weather"}),
    },
)
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_tool_choice_is_enforced(fields: dict[str, Any], names: set[str], temperature: float, server: Server) -> None:
    said = "weather?" if "tool_choice" not in fields else "hi"
    reply = server.chat(said, tools=[WEATHER, ADD], temperature=temperature, seed=1, max_tokens=400, **fields)
    calls = reply.message.get("tool_calls") or []
    assert len(calls) >= 1 and {call["function"]["name"] for call in calls} <= names
    assert fields.get("parallel_tool_calls") is not False or len(calls) == 1


@cases("choice", {"absent": {}, "null": {"tool_choice": None}, "auto": {"tool_choice": "auto"}})
def test_tool_choice_auto_leaves_the_choice_to_the_model(choice: dict[str, Any], server: Server) -> None:
    assert server.chat("weather?", tools=[WEATHER], **choice).message["tool_calls"]


@pytest.mark.parametrize("value", ["yes", 1], ids=json.dumps)
def test_parallel_tool_calls_must_be_true_or_false(value: Any, server: Server) -> None:
    assert_error(server.chat(parallel_tool_calls=value), 400, "invalid_request", "parallel_tool_calls")


EFFORT_TEMPLATE = "{% if enable_thinking == false %}={% elif reasoning_effort == 'high' %}|{% else %}:{% endif %}"


@cases(
    "fields, text",
    {
        "absent": ({}, TEXTS[":"]),
        "null": ({"reasoning_effort": None}, TEXTS[":"]),
        "low": ({"reasoning_effort": "low"}, TEXTS[":"]),
        "high": ({"reasoning_effort": "high"}, TEXTS["|"]),
        "none turns thinking off": ({"reasoning_effort": "none"}, TEXTS["="]),
        "chat_template_kwargs win": (
            {"reasoning_effort": "none", "chat_template_kwargs": {"reasoning_effort": "high", "enable_thinking": True}},
            TEXTS["|"]),
    },
)  # fmt: skip
def test_reasoning_effort_reaches_the_template(fields: dict[str, Any], text: str, efforts: Server) -> None:
    assert efforts.chat("hi", "effort", temperature=0, **fields).message["content"].strip() == text.strip()


@pytest.fixture(scope="module")
def efforts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("efforts")
    write_recital(folder / "models" / "effort.gguf", template=EFFORT_TEMPLATE)
    running = Server(folder / "home", "--port", "0", "--models-dir", folder / "models")
    yield running
    running.stop()


@pytest.mark.parametrize("value", ["max", "", 5, True, ["low"]], ids=json.dumps)
def test_reasoning_effort_unknown_is_400(value: Any, server: Server) -> None:
    assert_error(server.chat(reasoning_effort=value), 400, "invalid_request", "reasoning_effort", "minimal", "xhigh")


import test_shimmy as _t

MAY_THINK = _t.TEMPLATE + "{# enable_thinking <think> #}"  # a model that opens its thoughts itself


def test_schema_lets_a_model_think_that_may(serve: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    write_recital(tmp_path / "models" / "thinker.gguf", template=MAY_THINK)
    own = serve("--models-dir", tmp_path / "models")
    reply = own.chat("think", "thinker", temperature=0, response_format={
        "type": "json_schema", "json_schema": {"name": "a", "schema": SHAPE}})  # fmt: skip
    assert reply.message["reasoning_content"].strip() == "two and two"
    assert json.loads(reply.message["content"]) == {"a": 1} and reply.finish_reason == "stop"
