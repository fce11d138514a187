"""Tests of grammars that our automata follow, and of text written without the model; to be moved into test_shimmy.py."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from test_shimmy import (  # noqa: F401  fixtures
    ADD,
    REPO,
    SHIMMY,
    TINY,
    WEATHER,
    Server,
    altered,
    assert_error,
    boxed,
    cases,
    eventually,
    models,
    module,
    serve,
    server,
    streamed_and_plain,
    tool_root,
)  # fmt: skip

# topic: tokens under a grammar


@pytest.fixture(scope="module")
def llama() -> Any:
    """The model in the box, in this process."""
    file = REPO / "models" / f"{TINY}.gguf"
    options = module.EngineOptions(ctx=512, parallel=2, threads=1, gpu_layers=0)
    return module.Llama(module.Load(str(file), file.stat().st_size, options), lambda fraction: None)


class WholeWalk(module.Sampler):
    """Shows the chain all tokens that the grammar allows."""

    def _allowed(self, grammar: Any, scores: Any) -> Any:
        return grammar.allowed()


class Rows:
    """A text that is decoded by hand."""

    def __init__(self, llama: Any, text: str) -> None:
        tokens = llama.vocab.tokenize([text])
        self.llama, self.row, self.n_computed, self.n_tokens = llama, 0, 0, len(tokens)
        self.tokens = llama.np.zeros(512, llama.np.int32)
        self.tokens[: self.n_tokens] = tokens
        llama.main.drop(0)

    def logits(self) -> tuple[Any, int]:
        """The logits behind the text, and their row in the batch."""
        rows = self.n_tokens - self.n_computed
        assert self.llama.main.decode([(self, rows)]) == 0
        self.n_computed = self.n_tokens
        return self.llama.main.logits(1)[0], rows - 1

    def append(self, token: int) -> None:
        self.tokens[self.n_tokens] = token
        self.n_tokens += 1


def sampler(llama: Any, grammar: str, kind: type[Any] = module.Sampler, prompt: Any = (), **fields: Any) -> Any:
    constraint = module.Constraint(module.Gbnf(grammar), "grammar")
    return kind(llama, module.Sampling(constraint=constraint, **fields), prompt)


GRAMMARS = {
    "a record": 'root ::= "{\\"name\\": \\"" [^"\\\\\\x00-\\x1f]{3,40} "\\", \\"kind\\": " ("\\"red\\"" | "\\"green\\"") "}"',
    "a string": r'root ::= "\"" ([^"\\\x00-\x1f] | "\\" ["\\nt])* "\""',
    "numbers": 'root ::= ([0-9]+ ", "){20}',
    "no vowels": "root ::= [^aeiou]{20,60}",
}


@pytest.mark.parametrize("grammar", GRAMMARS.values(), ids=GRAMMARS)
@cases("fields", {
    "the usual chain": {},
    "the likeliest": {"temperature": 0.0},
    "hot": {"temperature": 3.0},
    "no filter": {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0},
    "top_k": {"top_k": 5, "top_p": 1.0, "min_p": 0.0},
    "top_p": {"top_k": 0, "top_p": 0.9, "min_p": 0.0},
    "most of top_p": {"top_k": 0, "top_p": 0.995, "min_p": 0.0, "temperature": 1.5},
    "min_p": {"top_k": 0, "top_p": 1.0, "min_p": 0.02, "temperature": 1.5},
    "top_p and min_p": {"top_k": 0, "top_p": 0.8, "min_p": 0.05},
    "typical": {"typical_p": 0.7},
    "typical of all": {"typical_p": 0.7, "top_k": 0},
    "deviations": {"top_n_sigma": 1.0},
    "without the likeliest": {"xtc_probability": 0.6, "xtc_threshold": 0.1},
    "the likeliest but for XTC": {"temperature": 0.0, "xtc_probability": 0.9},
    "penalties": {"repeat_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "the likeliest with penalties": {"temperature": 0.0, "repeat_penalty": 1.5},
    "repetition": {"dry_multiplier": 1.0},
    "biases": {"logit_bias": ((300, 5.0), (301, -math.inf), (11, 2.0))},
    "Mirostat": {"mirostat": 1},
    "Mirostat 2": {"mirostat": 2},
})  # fmt: skip
def test_pick_among_the_likeliest_is_the_pick_among_all(grammar: str, fields: dict[str, Any], llama: Any) -> None:
    rows = Rows(llama, "Here is the record of a customer: ")
    prompt = list(rows.tokens[: rows.n_tokens])
    quick, whole = (sampler(llama, grammar, kind, prompt, seed=7, **fields) for kind in (module.Sampler, WholeWalk))
    for _ in range(16):
        logits, row = rows.logits()
        before = logits.copy()
        token = quick.pick(logits, row)
        logits[:] = before
        assert token == whole.pick(logits, row)
        if token < 0 or token in llama.vocab.eog:
            break
        rows.append(token)


def test_picks_under_a_grammar_have_the_probabilities_that_all_allowed_tokens_give(llama: Any) -> None:
    logits, row = Rows(llama, "The number is ").logits()
    kept = logits.copy()
    whole = module.Grammar(llama, module.Constraint(module.Gbnf("root ::= [0-9]+"), "grammar")).allowed()
    best = max(kept[whole])
    wanted = {int(t): math.exp(kept[t] - best) for t in whole if math.exp(kept[t] - best) >= 0.05}
    counts: dict[int, int] = dict.fromkeys(wanted, 0)
    for seed in range(2000):
        picking = sampler(llama, "root ::= [0-9]+", seed=seed, temperature=1.0, top_k=0, top_p=1.0, min_p=0.05)
        logits[:] = kept
        counts[picking.pick(logits, row)] += 1
        picking.close()
    total = sum(wanted.values())
    assert sum((counts[t] - 2000 * p / total) ** 2 / (2000 * p / total) for t, p in wanted.items()) < 3 * len(wanted) + 10


@pytest.mark.parametrize("grammar", GRAMMARS.values(), ids=GRAMMARS)
def test_allowed_tokens_are_those_whose_bytes_may_follow(grammar: str, llama: Any) -> None:
    started = module.Grammar(llama, module.Constraint(module.Gbnf(grammar), "grammar"))
    for token in llama.vocab.tokens_inside(b'{"name": "'):
        tokens = [t for t in range(llama.vocab.size) if started.after(t) is not None]
        assert list(started.allowed()) == tokens
        started.follow(token)


def test_allowed_tokens_hold_the_end_only_where_the_text_may_end(llama: Any) -> None:
    started = module.Grammar(llama, module.Constraint(module.Gbnf('root ::= "a" "b"?'), "grammar"))
    assert not set(started.allowed()) & llama.vocab.eog
    started.accept(llama.vocab.tokens_inside(b"a")[0])
    assert llama.vocab.eog <= set(started.allowed())


def test_control_tokens_stand_for_no_text_but_a_formats_own(llama: Any) -> None:
    control = next(t for t in llama.vocab.marker_pieces if t not in llama.vocab.eog)
    name = llama.vocab.marker_pieces[control]
    grammar = module.Gbnf(f"root ::= {json.dumps(name)}")
    assert module.Grammar(llama, module.Constraint(grammar, "grammar")).after(control) is None
    assert module.Grammar(llama, module.Constraint(grammar, "tools", None, frozenset({name}))).after(control)


@cases("text", {"a key": '{"name": "', "no space at first": "name", "spaces": "   ", "lines": "\n\n a", "letters of Greek": "αβγ",
                "emoji": "😀!", "nothing": ""})  # fmt: skip
@pytest.mark.parametrize("model", [TINY, "recital", "dice"])
def test_tokens_of_forced_text_stand_for_just_its_bytes(text: str, model: str, models: Path) -> None:  # noqa: F811
    file = (models if model != TINY else REPO / "models") / f"{model}.gguf"
    options = module.EngineOptions(ctx=256, parallel=1, threads=1, gpu_layers=0)
    vocab = module.Llama(module.Load(str(file), file.stat().st_size, options), lambda fraction: None).vocab
    assert b"".join(map(vocab.piece, vocab.tokens_inside(text.encode()))) == text.encode()


def test_machines_of_many_grammars_are_few_and_the_oldest_go(llama: Any) -> None:
    machines = module.Machines(llama.vocab)
    first = machines.of(module.Gbnf('root ::= "0"'))
    for number in range(1, 60):
        machines.of(module.Gbnf(f'root ::= "{number}" [a-z]*'))
        assert machines.of(module.Gbnf('root ::= "0"')) is first
    assert len(machines._kept) == machines.MAX_KEPT


def test_machines_with_many_states_make_room_for_each_other(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machines = module.Machines(llama.vocab)
    monkeypatch.setattr(machines, "MAX_STATES", 100)
    for number in range(5):
        machine = machines.of(module.Gbnf(f'root ::= "{number}" [a-z]{{100}}'))
        machine.automaton.start.read(f"{number}".encode() + b"a" * 60)
    assert len(machines._kept) == 2


# topic: text that is written without the model

SENTENCE = "The quick brown fox jumps over the lazy dog and runs far away"
FORCED = f'root ::= "{SENTENCE} " ("home" | "again") " in the evening of the day."'


def forced(reply: Any) -> int:
    count: int = reply.json()["usage"]["timings"]["forced_n"]
    return count


def test_forced_text_is_written_without_the_model(boxed: Server) -> None:  # noqa: F811
    reply = boxed.chat("hi", TINY, grammar=FORCED)
    assert reply.message["content"] in {f"{SENTENCE} {end} in the evening of the day." for end in ("home", "again")}
    assert reply.json()["usage"]["completion_tokens"] - 4 <= forced(reply) < reply.json()["usage"]["completion_tokens"]


def test_free_text_has_no_forced_tokens(boxed: Server) -> None:  # noqa: F811
    assert forced(boxed.chat("hi", TINY, max_tokens=8)) == 0


def test_text_that_is_forced_to_its_end_ends_there(boxed: Server) -> None:  # noqa: F811
    reply = boxed.chat("hi", TINY, grammar=f'root ::= "{SENTENCE}"', ignore_eos=True)
    assert reply.message["content"] == SENTENCE and reply.json()["choices"][0]["finish_reason"] == "stop"


def test_document_that_is_complete_ends_the_text_at_its_last_token(boxed: Server) -> None:  # noqa: F811
    whole = boxed.chat("hi", TINY, grammar=FORCED, temperature=0).json()["usage"]["completion_tokens"]
    choice = boxed.chat("hi", TINY, grammar=FORCED, temperature=0, max_tokens=whole).json()["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"].endswith("day.")


@pytest.mark.parametrize("most", range(1, 20))
def test_max_tokens_within_forced_text_is_exact(most: int, boxed: Server) -> None:  # noqa: F811
    reply = boxed.chat("hi", TINY, grammar=FORCED, max_tokens=most).json()
    assert reply["usage"]["completion_tokens"] == most and reply["choices"][0]["finish_reason"] == "length"
    assert SENTENCE.startswith(reply["choices"][0]["message"]["content"][: len(SENTENCE)])


@cases("stop", {"in the text that is forced at first": "fox ju", "at its very begin": "The", "in what is forced later": "evening",
                "over a choice": "away "})  # fmt: skip
def test_stop_string_within_forced_text_ends_it(stop: str, boxed: Server) -> None:  # noqa: F811
    reply = boxed.chat("hi", TINY, grammar=FORCED, stop=stop, temperature=0)
    whole = boxed.chat("hi", TINY, grammar=FORCED, temperature=0).message["content"]
    assert reply.message["content"] == whole.partition(stop)[0]
    assert reply.json()["choices"][0]["finish_reason"] == "stop"


PLACES = 'root ::= ("a place of " [a-z]{3,9} " and of much more than that, ")+ "the end"'


def test_same_seed_gives_the_same_text_with_forced_parts(boxed: Server) -> None:  # noqa: F811
    ask = {"grammar": PLACES, "temperature": 1.2, "max_tokens": 60}
    first, second, other = (boxed.chat("hi", TINY, seed=seed, **ask).message["content"] for seed in (5, 5, 6))
    assert first == second != other
    both = boxed.chat("hi", TINY, seed=5, n=2, **ask).json()["choices"]
    assert [choice["message"]["content"] for choice in both] == [first, other]


def test_log_probabilities_cover_forced_text_too(boxed: Server) -> None:  # noqa: F811
    reply = boxed.chat("hi", TINY, grammar=FORCED, logprobs=True, top_logprobs=2)
    said = reply.json()["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in said) == reply.message["content"]
    assert len(said) == reply.json()["usage"]["completion_tokens"] and forced(reply) == 0


def test_stream_of_forced_text_is_the_plain_answer(boxed: Server) -> None:  # noqa: F811
    body = {"model": TINY, "messages": [{"role": "user", "content": "hi"}], "grammar": PLACES, "seed": 3, "max_tokens": 80}
    stream = boxed.streamed("/v1/chat/completions", body)
    plain = boxed.post("/v1/chat/completions", body)
    assert "".join(e["choices"][0]["delta"].get("content") or "" for e in stream[:-1]) == plain.message["content"]


def test_client_that_leaves_ends_a_text_with_forced_parts(boxed: Server) -> None:  # noqa: F811
    body = {"model": TINY, "messages": [{"role": "user", "content": "hi"}], "grammar": PLACES.replace(")+", "){100000}")}
    with boxed.stream("/v1/chat/completions", body) as stream:
        list(itertools.islice(stream, 5))
    eventually(lambda: boxed.status(TINY)["requests_running"] == 0, "the end of the text")


def test_banned_tokens_are_not_forced(boxed: Server) -> None:  # noqa: F811
    tokens = boxed.post("/tokenize", {"content": " brown"}).json()["tokens"]
    reply = boxed.chat("hi", TINY, grammar=FORCED, logit_bias={str(token): -100 for token in tokens})
    assert SENTENCE.startswith(reply.message["content"]) or reply.message["content"].startswith(SENTENCE)
    assert " brown" not in reply.message["content"] or len(tokens) > 1


@cases("choice", {"any function": "required", "one": {"type": "function", "function": {"name": "get_weather"}}})
def test_forced_call_is_partly_written_without_the_model(choice: Any, boxed: Server) -> None:  # noqa: F811
    reply = boxed.chat("weather?", TINY, tools=[WEATHER, ADD], tool_choice=choice, max_tokens=200, seed=1)
    assert reply.message["tool_calls"] and forced(reply) >= 5


def test_grammar_begins_with_forced_text_behind_a_thought(boxed: Server) -> None:  # noqa: F811
    reply = boxed.chat("hi", TINY, response_format={"type": "json_object"}, thinking_budget_tokens=0, max_tokens=40)
    assert reply.status == 200


def test_texts_with_forced_parts_beside_each_other_are_as_alone(serve: Callable[..., Server]) -> None:  # noqa: F811
    many = serve("--models-dir", REPO / "models", "--model", TINY, "--parallel", "6")
    asks = [{"grammar": PLACES, "temperature": 0, "max_tokens": 90, "logit_bias": {str(300 + i): 3}} for i in range(6)]
    alone = [many.chat("hi", TINY, **ask).message["content"] for ask in asks]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda ask: many.chat("hi", TINY, **ask).message["content"], asks))
    assert [text[:40] for text in together] == [text[:40] for text in alone]  # sums in another order may differ later
    assert all(text.startswith("a place of ") and " and of much more than that, " in text for text in together)


def test_text_that_steps_back_in_its_forced_part_goes_on_where_it_was(serve: Callable[..., Server]) -> None:  # noqa: F811
    small = serve("--models-dir", REPO / "models", "--model", TINY, "--ctx", "512", "--kv-pool", "512", "--parallel", "4")
    ask: dict[str, Any] = {"grammar": PLACES.replace(")+", "){60}"), "temperature": 0.5, "seed": 4, "max_tokens": 300}
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda i: small.chat("hi " * i, TINY, **ask), range(1, 5)))
    for reply in replies:
        assert reply.json()["usage"]["completion_tokens"] == 300
        parts = reply.message["content"].split(" and of much more than that, ")
        assert all(part.startswith("a place of ") for part in parts[:-1]) and len(parts) > 8


def test_prompt_asked_again_starts_behind_what_is_forced_too(boxed: Server) -> None:  # noqa: F811
    usages = [boxed.chat("a new prompt", TINY, grammar=FORCED, temperature=0).json()["usage"] for _ in range(2)]
    assert usages[1]["prompt_tokens_details"]["cached_tokens"] == usages[1]["prompt_tokens"]


def test_completion_without_chat_has_forced_text(server: Server) -> None:  # noqa: F811
    reply = server.post("/v1/completions", {"model": "dice", "prompt": "x", "grammar": FORCED, "max_tokens": 200})
    assert reply.json()["choices"][0]["text"].startswith(SENTENCE) and reply.json()["usage"]["timings"]["forced_n"] > 50


def test_words_that_are_cut_within_a_character_are_still_whole(server: Server) -> None:  # noqa: F811
    text = server.chat("hi", "dice", grammar='root ::= ("日本" | "日曜" | "é😀") "語の文"', temperature=1).message["content"]
    assert text in ("日本語の文", "日曜語の文", "é😀語の文")


# topic: hostile grammars

DOUBLING = "\n".join(["root ::= a0", *(f'a{i} ::= "a" a{i + 1} "b" | "a" a{i + 1} "c"' for i in range(20)), 'a20 ::= "d"'])
MANY = "root ::= " + " | ".join(f'[a-z]{{{n}}} "{n}"' for n in range(60, 450))
MOST = 'root ::= "ab" m\nm ::= ' + " | ".join(f'[a-z]{{{n}}} "{n}"' for n in range(60, 5000))
REPEATS = "root ::= ((([a-z]{1,1000}){1,1000}){1,1000}){1,1000}"


@cases("grammar, said", {
    "brackets 10,000 deep": ("root ::= " + "(" * 10_000 + '"a"' + ")" * 10_000, "nested over 100 deep"),
    "a rule that begins with itself": ('root ::= root "a" | "b"', "left-recursive"),
    "rules that begin with each other": ('root ::= x\nx ::= "a"? y\ny ::= x "b"', "left-recursive"),
    "repeats beyond numbers": ('root ::= "a"{99999999999}', "not a number of repeats"),
    "more text than is read": ('root ::= "' + "a" * 600_000 + '"', "over 500000 characters"),
})  # fmt: skip
def test_hostile_grammar_is_refused(grammar: str, said: str, server: Server) -> None:  # noqa: F811
    assert assert_error(server.chat("hi", "dice", grammar=grammar), 400, "invalid_request", said)["param"] == "grammar"


@cases("grammar, fields", {
    "a billion repeats": ('root ::= "ab"{1000000000}', {}),
    "readings that double": (DOUBLING, {}),
    "rules 10,000 deep": ("root ::= a0\n" + "\n".join(f'a{i} ::= "x" a{i + 1} "y"' for i in range(9999)) + '\na9999 ::= "z"', {}),
    "readings by the hundred": (MANY, {"top_k": 0, "top_p": 1, "min_p": 0, "ignore_eos": True}),
    "brackets without end": ('root ::= "(" root ")" | "x"', {"logit_bias": {"120": -100}}),
})  # fmt: skip
def test_hostile_grammar_is_followed_as_far_as_the_text_goes(grammar: str, fields: dict[str, Any], server: Server) -> None:  # noqa: F811
    choice = server.chat("hi", "dice", grammar=grammar, max_tokens=40, **fields).json()["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["content"]


@cases("grammar, said", {
    "readings by the thousand": (MOST, "ambiguous"),
    "repeats of repeats": (REPEATS, "the grammar is"),
})  # fmt: skip
@streamed_and_plain
def test_grammar_that_is_too_much_to_follow_ends_its_own_text(grammar: str, said: str, stream: bool, server: Server) -> None:  # noqa: F811
    body = {"model": "dice", "messages": [{"role": "user", "content": "hi"}], "grammar": grammar, "max_tokens": 100, "top_k": 0,
            "top_p": 1, "min_p": 0, "ignore_eos": True}  # fmt: skip
    with server.endless() as other:
        next(other)
        if stream:
            error = server.streamed("/v1/chat/completions", body)[-1]["error"]
        else:
            error = assert_error(server.post("/v1/chat/completions", body), 400, "invalid_request")
        assert error["code"] == "invalid_request" and said in error["message"]
        assert next(other)["choices"][0]["text"]


def test_grammar_that_takes_many_steps_for_a_token_gives_the_same_text(serve: Callable[..., Server], tmp_path: Path) -> None:  # noqa: F811
    slow = altered(tmp_path, ("PATIENCE, TRIES = 0.01, 500", "PATIENCE, TRIES = 0.0, 10**9"))
    ask = {"grammar": 'root ::= ([a-z]{2,5} " "){8}', "seed": 2, "top_k": 0, "top_p": 1, "min_p": 0, "temperature": 1.5}
    texts = [serve("--models-dir", REPO / "models", "--model", TINY, script=script).chat("hi", TINY, **ask).message["content"]
             for script in (SHIMMY, slow)]  # fmt: skip
    assert texts[0] == texts[1] and len(texts[0].split()) == 8


def test_grammar_that_takes_too_many_steps_for_a_token_ends_its_own_text(serve: Callable[..., Server], tmp_path: Path) -> None:  # noqa: F811
    script = altered(tmp_path, ("PATIENCE, TRIES = 0.01, 500", "PATIENCE, TRIES = 0.0, 3"))
    hasty = serve("--models-dir", REPO / "models", "--model", TINY, script=script)
    assert_error(hasty.chat("hi", TINY, grammar=MANY), 400, "invalid_request", "intricate")
    assert hasty.chat("hi", TINY, max_tokens=4).status == 200
