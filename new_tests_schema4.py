"""Tests of branch schema4: structured output (topics name the sections of test_shimmy.py they belong to)."""
from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import jsonschema
import pytest

from shimmy import TURN, Automaton, InvalidRequest, NotYet, State, StringShape, read_json, string_fits, string_symbol
from test_shimmy import (  # noqa: F401
    MOST,
    REPO,
    SHIMMY,
    TINY,
    Server,
    accepts,
    altered,
    assert_error,
    begin,
    cases,
    each,
    first_state,
    guarded,
    models,
    serve,
    server,
    takes,
    tool_root,
    walk,
)

# topic: Strings and numbers

SEARCHED = StringShape(patterns=("a.{5}b", "c.{4}d"), unlike=("aa", "bd"), high=40)  # a way to its end must be searched


def test_pattern_is_searched_for_every_text_as_for_the_first():
    pick = random.Random(1)
    for _ in range(150):  # a machine once had 20,000 steps of search for all its life
        here = first_state(SEARCHED)
        while here.bits:
            here = here.step(pick.choice([byte for byte in b'abcd"' if here.bits >> byte & 1] or [here.bits.bit_length() - 1]))
    texts = ("".join(pick.choices("abcdx", k=pick.randint(20, 40))) for _ in range(2000))
    assert all(takes(SEARCHED, text) for text in texts if string_fits(SEARCHED, text))


@pytest.fixture
def short_turn() -> Iterator[None]:
    """The thread's turn is over at once."""
    TURN.begin(0.0)
    yield
    TURN.begin(math.inf)


def asked_again(here: State, data: bytes) -> tuple[State, int]:
    """The state behind some bytes, and how many turns that took."""
    turns = 1
    while True:
        try:
            found = here.read(data)
            assert found is not None
            return found, turns
        except NotYet:
            turns += 1
            TURN.begin(0.0)


def test_search_in_a_string_goes_on_in_the_next_turn(short_turn):
    shape = StringShape(patterns=("x.{3}b", "c.{2}d"), unlike=("aa", "bd"), high=30)
    here, turns = asked_again(Automaton(string_symbol(shape)).start, b'"xc')
    assert turns > 2 and here.bits


def test_elements_that_must_differ_are_looked_at_within_turns(short_turn):
    schema = {"type": "array", "uniqueItems": True, "items": {"type": "array", "items": {"enum": list(range(20))}, "minItems": 2}}
    here, turns = asked_again(begin(schema), b"[[1, 2], [1")
    assert turns > 1 and here.bits


@each(name=["xn--X", "a.xn--07jt112bpxg", "XN--aa---o47jg78q", "ab--c"])
def test_hostname_with_hyphens_in_the_third_and_fourth_place_is_left_out(name):
    assert not takes(StringShape(formats=("hostname",)), name)


@each(name=["a-b", "a--b", "abc--d", "a-b-c.de", "abcd", "ab-d", "x" * 63, "a1-b"])
def test_hostname_with_other_hyphens_is_read(name):
    assert takes(StringShape(formats=("hostname",)), name)


@each(name=["xn--x", "xn--nxasmq6b", "ab--c.de"])
def test_what_may_be_a_hostname_is_none_that_is_no_hostname(name):
    assert not takes(StringShape(not_formats=("hostname",)), name) and takes(StringShape(not_formats=("hostname",)), name + "-")


# topic: Structured output

def test_what_a_number_must_not_be_is_one_machine():
    values = list(range(0, 4000, 2))
    here = begin({"type": "integer", "minimum": 0, "not": {"enum": values}}).read(b"1")
    assert here is not None and here.ends and len(here.stacks) == 1
    assert [accepts({"type": "integer", "not": {"enum": values}}, value) for value in (1998, 1999)] == [False, True]


@each(document=["0", "-0", "0.0", "2", "2.0", "2.50", "-1"])
def test_number_that_is_excluded_is_refused_however_it_is_written(document):
    here = begin({"type": "number", "not": {"enum": [0, 2, 2.5, -1]}}).read(document.encode())
    assert here is None or not here.ends


@cases("items, least", {
    "a pattern": ({"type": "string", "pattern": "^(x|yy|zzz)$"}, 3),
    "a pattern and lengths": ({"type": "string", "pattern": "^[ab]*$", "maxLength": 1}, 3),
    "one multiple": ({"type": "number", "exclusiveMinimum": 0.5, "maximum": 2, "multipleOf": 2}, 1),
    "halves": ({"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.5}, 3),
    "lists of one": ({"type": "array", "items": {"type": "string", "pattern": "^[ab]$"}, "minItems": 1, "maxItems": 1}, 2),
    "objects": ({"type": "object", "properties": {"a": {"type": "string", "pattern": "^[ab]$"}}, "minProperties": 1}, 2),
})  # fmt: skip
def test_different_elements_are_counted(items, least):
    schema = {"type": "array", "items": items, "uniqueItems": True}
    with pytest.raises(InvalidRequest, match="no document can fit"):
        begin({**schema, "minItems": least + 1})
    for seed in range(20):
        text = walk(begin({**schema, "minItems": least}), random.Random(seed))
        assert text is not None and len(json.loads(text)) == least


@cases("schema, least", {
    "names of a pattern": ({"patternProperties": {"^[ab]$": {}}}, 2),
    "beside one that is named": ({"properties": {"a": {}, "c": {}}, "patternProperties": {"^[ab]$": {}}}, 3),
    "the empty name": ({"additionalProperties": {}, "propertyNames": {"maxLength": 0}}, 1),
})  # fmt: skip
def test_names_that_an_object_may_have_are_counted(schema, least):
    with pytest.raises(InvalidRequest, match="no document can fit"):
        begin({"type": "object", **schema, "minProperties": least + 1})
    for seed in range(20):
        text = walk(begin({"type": "object", **schema, "minProperties": least}), random.Random(seed), 5000)
        assert text is None or len(json.loads(text)) == least


def test_object_that_needs_its_named_properties_cannot_leave_them_out():
    here = begin({"type": "object", "properties": {"name": {}}, "patternProperties": {"^[ab]$": {}}, "minProperties": 3})
    assert here.forced(100) == b'{"name": '


def test_objects_of_few_values_are_told_apart_in_their_names():
    letters = [chr(code) for code in range(ord("a"), ord("u"))]
    item = {"type": "object", "properties": {"a": {"enum": letters}}, "required": ["a"]}
    schema = {"type": "array", "items": item, "uniqueItems": True}
    here = begin(schema).read(("[" + ", ".join(f'{{"a": "{letter}"}}' for letter in letters[:-2]) + ', {"a": "').encode())
    assert here is not None and here.bits == 1 << ord("s") | 1 << ord("t")


def test_lists_that_differ_within_lists_that_differ_cost_little():
    schema = {"type": "array", "uniqueItems": True, "items": {"type": "array", "uniqueItems": True}}
    automaton = Automaton(read_json(json.dumps(schema), "x"))
    here = automaton.start.read(b'[[1, [2]], [1, [3]], [1, [2, 4')
    assert here is not None and here.bits >> ord("]") & 1


def test_schema_that_takes_many_steps_for_a_token_gives_the_same_text(serve: Callable[..., Server], tmp_path: Path) -> None:
    slow = altered(tmp_path, ("PATIENCE, TRIES = 0.01, 500", "PATIENCE, TRIES = 0.0, 10**9"))
    items = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^[ab]c?$"}, "b": {"type": "integer"}},
             "required": ["a"]}  # fmt: skip
    schema = {"type": "array", "items": items, "uniqueItems": True, "minItems": 4, "maxItems": 5}
    answer = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    ask = {"response_format": answer, "seed": 2, "temperature": 1.5}
    texts = [serve("--models-dir", REPO / "models", "--model", TINY, script=script).chat("hi", TINY, **ask).message["content"]
             for script in (SHIMMY, slow)]  # fmt: skip
    assert texts[0] == texts[1]
    jsonschema.validate(json.loads(texts[0]), schema)


# topic: Hostile grammars

def test_grammar_that_is_too_ambiguous_to_begin_names_its_field(server: Server) -> None:
    begins = "root ::= " + " | ".join(f'[a-z]{{{n}}} "{n}"' for n in range(60, 5000))
    error = assert_error(server.chat("hi", "dice", grammar=begins), 400, "invalid_request", "grammar: the grammar is ambiguous")
    assert error["param"] == "grammar"


def test_grammar_that_becomes_too_ambiguous_names_its_field(server: Server) -> None:
    error = assert_error(server.chat("hi", "dice", grammar=MOST, max_tokens=100), 400, "invalid_request", "ambiguous")
    assert error["param"] == "grammar"
