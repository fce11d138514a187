"""Tests of JSON schemas as grammars; they move into test_shimmy.py."""

from __future__ import annotations

import functools
import json
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from shimmy import Automaton, InvalidRequest, State, read_json
from test_shimmy import Server, assert_error, cases, models, options, recursive, serve, server, tool_root  # noqa: F401

# topic: structured output

FUZZ = int(os.environ.get("SHIMMY_FUZZ", "300"))
CHECKED = [  # formats that jsonschema checks without further packages, as we do
    "date", "email", "ipv4", "ipv6", "uuid", "time"]  # fmt: skip


def begin(schema: Any) -> State:
    """The state before the first byte of a schema's documents."""
    return Automaton(read_json(json.dumps(schema), "json_schema")).start


def follow(here: State | None, data: bytes) -> State | None:
    for byte in data:
        if here is None:
            return None
        here = here.step(byte)
    return here


def accepts(schema: Any, value: Any) -> bool:
    here = follow(begin(schema), json.dumps(value, ensure_ascii=False).encode())
    return here is not None and here.ends


def walk(here: State, pick: random.Random, most: int = 500) -> bytes | None:
    """A text that ends, chosen at random, what leads to an end more often; None if none was found in so many bytes."""
    text = bytearray()
    while here.bits and not (here.ends and pick.random() < 0.5):
        if len(text) >= most:
            return None
        may = [byte for byte in range(256) if here.bits >> byte & 1]
        soon = [byte for byte in may if byte in b'"]}ab01'] if pick.random() < 0.9 else []
        text.append(pick.choice(soon or may))
        behind = here.step(text[-1])
        assert behind is not None, f"{text!r} leads to what firsts did not say"
        here = behind
    assert here.ends, f"{text!r} is a dead end"
    return bytes(text)


def schema_made(pick: random.Random, depth: int = 0) -> Any:
    """A schema made at random, of all keywords, with values small enough to meet."""
    inner = functools.partial(schema_made, pick, depth + 1)
    values = [1, 2, "a", "ab", None, True, 1.5, {"a": 1}, [], [1], "b", 0, {}]
    leaves: list[Callable[[], Any]] = [
        lambda: True,
        lambda: {"type": pick.choice(["string", "integer", "number", "boolean", "null"])},
        lambda: {"enum": pick.choices(values, k=pick.randint(1, 4))},
        lambda: {"const": pick.choice([1, "a", None, [1, "a"], {"a": 1, "b": [2]}])},
        lambda: {"$ref": f"#/$defs/{pick.choice('xy')}"},
    ]
    if depth > 2 or pick.random() < 0.1:
        return pick.choice(leaves)()
    groups = keywords_made(pick, inner)
    which = pick.choices(range(6), (4, 3, 1, 1, 3, 0.3))[0]
    found = {key: groups[which][key]() for key in pick.sample([*groups[which]], pick.randint(1, min(3, len(groups[which]))))}
    if which < 4 and pick.random() < 0.7:
        kind = ("object", "array", "string", "number")[which]
        found["type"] = kind if pick.random() < 0.8 else [kind, "null"]
    elif pick.random() < 0.5:
        group = pick.choice(groups[:4])
        found |= {key: group[key]() for key in pick.sample([*group], 2)}
    return found


def keywords_made(pick: random.Random, inner: Callable[[], Any]) -> list[dict[str, Callable[[], Any]]]:
    """Values for keywords: of objects, arrays, strings and numbers, those that combine, those that come late."""
    names = ["a", "b", "ab", "é"]

    def number() -> float:
        return pick.choice([-2, -0.5, 0, 0.5, 1, 2, 3, 10])

    def count() -> int:
        return pick.randint(0, 3)

    def pair() -> list[Any]:
        return [inner(), inner()]

    return [
        {
            "properties": lambda: {name: inner() for name in pick.sample(names, pick.randint(1, 3))},
            "required": lambda: pick.sample(names, pick.randint(1, 2)),
            "additionalProperties": inner,
            "patternProperties": lambda: {pick.choice(["^a", "b$", "^[ab]+$", "c"]): inner()},
            "propertyNames": lambda: pick.choice([{"maxLength": 2}, {"pattern": "a"}, {"enum": names[:3]}, inner()]),
            "minProperties": count, "maxProperties": count,
            "dependentRequired": lambda: {pick.choice(names): pick.sample(names, 2)},
            "dependentSchemas": lambda: {pick.choice(names): inner()},
        },
        {"items": inner, "prefixItems": pair, "minItems": count, "maxItems": lambda: count() + 1, "uniqueItems": lambda: True,
         "contains": inner, "minContains": count, "maxContains": count},
        {"minLength": count, "maxLength": lambda: count() + 1, "format": lambda: pick.choice(CHECKED),
         "pattern": lambda: pick.choice(["^a", "b", "^[a-c]*$", "a.b"])},
        {"minimum": number, "maximum": number, "exclusiveMinimum": number, "exclusiveMaximum": number,
         "multipleOf": lambda: pick.choice([1, 2, 0.5, 3, 0.25])},
        {"not": inner, "allOf": pair, "anyOf": pair, "oneOf": pair, "if": inner, "then": inner, "else": inner},
        {"unevaluatedProperties": inner, "unevaluatedItems": inner},
    ]  # fmt: skip


def with_definitions(pick: random.Random) -> Any:
    schema = schema_made(pick)
    return {**(schema if isinstance(schema, dict) else {}), "$defs": {"x": schema_made(pick, 2), "y": schema_made(pick, 3)}}


def test_schema_made_at_random_is_refused_or_holds_whatever_the_walk() -> None:
    """Random legal bytes lead to a document that fits, never into a dead end; no model is needed for that."""
    fitted = 0
    for seed in range(FUZZ):
        pick = random.Random(seed)
        schema = with_definitions(pick)
        try:
            here = begin(schema)
        except InvalidRequest:
            continue
        checker = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
        for text in filter(None, (walk(here, pick) for _ in range(4))):
            checker.validate(json.loads(text))
            fitted += 1
    assert fitted > FUZZ


# What a keyword admits, and what not: documents in the order and style in which they are written.
OBJECT, ARRAY, ONE = {"type": "object"}, {"type": "array"}, {"const": 1}
NAMED = {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}}
KEYWORDS: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "pattern": ({"pattern": "^a+$"}, ["a", "aaa"], ["", "b", "ab"]),
    "format": ({"format": "date"}, ["2024-02-29"], ["2023-02-29", ""]),
    "an unknown format": ({"format": "colour"}, ["red", ""], [1]),
    "lengths in characters": ({"minLength": 2, "maxLength": 3}, ["éé", "\U0001f600ab"], ["é", "abcd"]),
    "minimum of a number": ({"type": "number", "minimum": 0.5}, [0.5, 1, 12345.75], [0.4, -1]),
    "exclusive bounds": ({"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 4}, [2, 3], [1, 4, 0]),
    "draft 4's exclusive bounds": ({"type": "integer", "minimum": 1, "exclusiveMinimum": True}, [2], [1, 0]),
    "multipleOf": ({"type": "number", "multipleOf": 0.1}, [0.3, 2, -0.1], [0.35]),
    "not of a type": ({"not": {"type": ["string", "object"]}}, [1, None, [{}]], ["a", {}]),
    "not of integers": ({"type": "number", "not": {"type": "integer"}}, [0.5, -1.25], [1, 0]),
    "not of constants": ({"type": "integer", "minimum": 1, "maximum": 4, "not": {"enum": [2, 3]}}, [1, 4], [2, 3]),
    "not of a pattern": ({"type": "string", "not": {"pattern": "^a"}}, ["b", ""], ["a", "ab"]),
    "not of required": ({**OBJECT, "not": {"required": ["a"]}}, [{}, {"b": 1}], [{"a": 1}]),
    "not of a property": ({**NAMED, "not": {"properties": {"a": {"const": 1}}}}, [{"a": 2}], [{"a": 1}, {}]),
    "not of anyOf": ({"type": "integer", "not": {"anyOf": [{"minimum": 5}, {"maximum": 2}]}}, [3, 4], [2, 5]),
    "not of items": ({**ARRAY, "not": {"items": {"type": "null"}}}, [[1], [None, 1]], [[], [None]]),
    "oneOf that overlaps": ({"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 5}]}, [3, 5.5], [6, 0.5]),
    "oneOf of required": ({**NAMED, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
                          [{"a": 1}, {"b": 1}], [{"a": 1, "b": 1}, {}]),
    "if, then and else": ({**NAMED, "required": ["a"], "if": {"properties": {"a": {"const": 1}}}, "then": {"required": ["b"]},
                           "else": {"required": ["c"]}}, [{"a": 1, "b": 2}, {"a": 2, "c": 1}], [{"a": 1}, {"a": 2, "b": 1}]),
    "dependentRequired": ({**NAMED, "dependentRequired": {"a": ["b"]}}, [{}, {"b": 1}, {"a": 1, "b": 1}], [{"a": 1}]),
    "dependencies of both forms": ({**NAMED, "dependencies": {"a": ["b"], "b": {"required": ["c"]}}},
                                   [{}, {"c": 1}, {"a": 1, "b": 1, "c": 1}], [{"a": 1}, {"b": 1}, {"a": 1, "b": 1}]),
    "dependentSchemas": ({**NAMED, "dependentSchemas": {"a": {"properties": {"b": {"const": 1}}}}},
                         [{"a": 1, "b": 1}, {"b": 2}], [{"a": 1, "b": 2}]),
    "patternProperties": ({**OBJECT, "patternProperties": {"^x": {"type": "integer"}}},
                          [{}, {"x1": 1, "xy": 2}], [{"x1": "a"}, {"y": 1}]),
    "patternProperties that overlap": ({**OBJECT, "patternProperties": {"^x": {"minimum": 2}, "y$": {"maximum": 3}}},
                                       [{"x": 9}, {"xy": 2}, {"y": 1}], [{"xy": 9}, {"xy": 1}]),
    "patternProperties and others": ({**OBJECT, "patternProperties": {"^x": {"const": 1}}, "additionalProperties": {"const": 2}},
                                     [{"x": 1, "y": 2}], [{"x": 2}, {"y": 1}]),
    "a named property that matches": ({"properties": {"xa": {"minimum": 0}}, "patternProperties": {"^x": {"maximum": 5}}},
                                      [{"xa": 3}, {"xb": -3}], [{"xa": 6}, {"xa": -1}]),
    "propertyNames": ({**OBJECT, "propertyNames": {"pattern": "^a"}}, [{}, {"ab": 1}], [{"b": 1}]),
    "propertyNames as constants": ({**OBJECT, "propertyNames": {"enum": ["a", "b"]}}, [{"a": 1}, {"a": 1, "b": 2}], [{"c": 1}]),
    "minProperties": ({**NAMED, "minProperties": 2}, [{"a": 1, "c": 1}], [{}, {"b": 1}]),
    "maxProperties": ({**NAMED, "maxProperties": 1}, [{}, {"c": 1}], [{"a": 1, "b": 1}]),
    "counts of unnamed properties": ({**OBJECT, "minProperties": 2, "maxProperties": 2}, [{"x": 1, "y": 2}], [{"x": 1}, {}]),
    "unevaluatedProperties": ({"allOf": [{"properties": {"a": {}}}], "properties": {"b": {}},
                               "unevaluatedProperties": {"type": "null"}}, [{"b": 1, "a": 1, "x": None}], [{"x": 1}]),
    "contains": ({**ARRAY, "contains": {"const": 1}}, [[1], [0, 1, 0]], [[], [0]]),
    "minContains and maxContains": ({**ARRAY, "contains": {"const": 1}, "minContains": 2, "maxContains": 2}, [[1, 1], [1, 0, 1]],
                                    [[1], [1, 1, 1]]),
    "uniqueItems": ({**ARRAY, "uniqueItems": True}, [[], [1, "1", 2], [{"a": 1}, {"a": 2}]], [[1, 1], [{"a": 1}, {"a": 1}]]),
    "uniqueItems of what is written in two ways": ({**ARRAY, "uniqueItems": True}, [[1, True]], [[1, 1.0]]),
    "draft 4's tuples": ({**ARRAY, "items": [{"const": 1}], "additionalItems": {"const": 2}}, [[1], [1, 2, 2]], [[2], [1, 1]]),
    "unevaluatedItems": ({**ARRAY, "prefixItems": [{}], "unevaluatedItems": False}, [[1]], [[1, 2]]),
    "nullable": ({"type": "integer", "nullable": True}, [1, None], ["a"]),
    "const of an object": ({"const": {"b": [1, None], "a": "é"}}, [{"b": [1, None], "a": "é"}], [{"b": [1]}]),
    "enum that shares beginnings": ({"enum": ["a", "ab", 1, 12, {"a": 1}]}, ["a", "ab", 1, 12, {"a": 1}], ["b", 2, {}]),
    "$ref by $id and $anchor": ({"$id": "https://x.org/a", "$defs": {"i": {"$id": "b", "$defs": {"n": {"$anchor": "n", **ONE}}}},
                                 "$ref": "b#n"}, [1], [2]),
    "$ref alone in draft 7": ({"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"a": {"const": 1}},
                               "$ref": "#/definitions/a", "not": {}}, [1], [2]),
    "closed objects": ({"properties": {"a": {}}}, [{}, {"a": 1}], [{"b": 1}, {"a": 1, "b": 1}]),
    "opened objects": ({"properties": {"a": {}}, "additionalProperties": True}, [{"a": 1, "b": 1}], [1]),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(KEYWORDS))
def test_schema_keyword_admits_just_what_fits(kind: str) -> None:
    schema, fitting, others = KEYWORDS[kind]
    assert [value for value in fitting if not accepts(schema, value)] == []
    assert [value for value in others if accepts(schema, value)] == []


@cases("schema, text", {
    "between elements and behind keys": ({**OBJECT, "required": ["a"], "properties": {"a": {"const": [1, 2]}}}, '{"a": [1, 2]}'),
    "a constant's own order": ({"const": {"b": 1, "a": "é"}}, '{"b": 1, "a": "é"}'),
    "a list of all there is": ({**ARRAY, "uniqueItems": True, "minItems": 1, "items": {"enum": ["only"]}}, '["only"]'),
})  # fmt: skip
def test_schema_without_a_choice_forces_its_whole_text(schema: Any, text: str) -> None:
    assert begin(schema).forced(100) == text.encode()


@cases("schema", {
    "elements that run out": {**ARRAY, "uniqueItems": True, "items": {"enum": [1, 2]}, "minItems": 2},
    "a property that nothing fits": {**OBJECT, "properties": {"a": False, "b": {"const": 1}}},
    "as many as are named": {**NAMED, "minProperties": 3},
    "the most, with one required last": {**NAMED, "required": ["c"], "maxProperties": 1},
    "what must be contained, late": {**ARRAY, "items": {"enum": [1, 2]}, "contains": {"const": 1}, "maxItems": 2},
    "unique objects that run out": {**ARRAY, "uniqueItems": True, "minItems": 2,
                                    "items": {**OBJECT, "properties": {"a": {"type": "boolean"}}, "required": ["a"]}},
    "unique numbers that run out": {**ARRAY, "uniqueItems": True, "items": {"type": "integer", "minimum": 9, "maximum": 11}},
})  # fmt: skip
def test_schema_leads_into_no_dead_end(schema: Any) -> None:
    checker = Draft202012Validator(schema)
    for seed in range(40):
        text = walk(begin(schema), random.Random(seed))
        assert text is None or checker.is_valid(json.loads(text)), text


def alike(count: int) -> dict[str, Any]:
    """Objects that begin alike and hold each other."""
    return recursive(options(ONE, *({"properties": {"a": {"$ref": "#/$defs/R"}, f"b{i}": {"const": i}}, "required": ["a"]}
                                             for i in range(count))))  # fmt: skip


@cases("schema, text", {
    "ten objects": (alike(10), b'{"a": ' * 40),
    "arrays of arrays": (recursive(options(*({**ARRAY, "items": {"$ref": "#/$defs/R"}, "maxItems": n} for n in range(1, 9)))),
                         b"[" * 60),
})  # fmt: skip
def test_alternatives_that_begin_alike_stay_few_however_deep(schema: Any, text: bytes) -> None:
    here = follow(begin(schema), text)
    assert here is not None and len(here.stacks) < 100


def test_schemas_of_a_chat_at_temperature_1_hold(server: Server) -> None:  # noqa: F811
    """As above through the server: what ends by itself fits, what cannot be honoured is 400."""
    fitted = 0
    for seed in range(FUZZ // 5):
        schema = with_definitions(random.Random(10**6 + seed))
        reply = server.generate("any", "dice", json_schema=schema, max_tokens=100, temperature=1, seed=seed)
        if reply.status != 200:
            assert_error(reply, 400, "invalid_request", "json_schema")
        elif reply.finish_reason == "stop":
            Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).validate(json.loads(reply.text))
            fitted += 1
    assert fitted > FUZZ // 20
