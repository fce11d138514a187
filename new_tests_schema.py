"""Tests of JSON schemas as grammars; they move into test_shimmy.py."""

from __future__ import annotations

import functools
import json
import os
import random
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from shimmy import Automaton, InvalidRequest, State, read_json
from test_shimmy import cases

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
        here._automaton.work = 0  # the engine does so for each token
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
        here._automaton.work = 0
        behind = here.step(text[-1])
        assert behind is not None, f"{bytes(text)} leads to what firsts did not say"
        here = behind
    assert here.ends, f"{bytes(text)} is a dead end"
    return bytes(text)


def schema_made(pick: random.Random, depth: int = 0) -> Any:
    """A schema made at random, of all keywords, with values small enough to meet."""
    inner = functools.partial(schema_made, pick, depth + 1)
    leaves = [lambda: True, lambda: {"type": pick.choice(["string", "integer", "number", "boolean", "null"])},
              lambda: {"enum": pick.choices([1, 2, "a", "ab", None, True, 1.5, {"a": 1}, [], [1], "b", 0, {}], k=pick.randint(1, 4))},
              lambda: {"const": pick.choice([1, "a", None, [1, "a"], {"a": 1, "b": [2]}])}, lambda: {"$ref": f"#/$defs/{pick.choice('xy')}"}]
    if depth > 2 or pick.random() < 0.1:
        return pick.choice(leaves)()
    names = ["a", "b", "ab", "é"]
    number, count = (lambda: pick.choice([-2, -0.5, 0, 0.5, 1, 2, 3, 10])), (lambda: pick.randint(0, 3))
    some = {name: inner for name in pick.sample(names, pick.randint(1, 3))}
    keywords: dict[str, Any] = {
        "properties": lambda: {name: make() for name, make in some.items()}, "required": lambda: pick.sample(names, pick.randint(1, 2)),
        "additionalProperties": inner, "patternProperties": lambda: {pick.choice(["^a", "b$", "^[ab]+$", "c"]): inner()},
        "propertyNames": lambda: pick.choice([{"maxLength": 2}, {"pattern": "a"}, {"enum": names[:3]}, inner()]),
        "minProperties": count, "maxProperties": count, "dependentRequired": lambda: {pick.choice(names): pick.sample(names, 2)},
        "dependentSchemas": lambda: {pick.choice(names): inner()}, "items": inner, "prefixItems": lambda: [inner(), inner()],
        "minItems": count, "maxItems": lambda: count() + 1, "uniqueItems": lambda: True, "contains": inner, "minContains": count,
        "maxContains": count, "minLength": count, "maxLength": lambda: count() + 1, "pattern": lambda: pick.choice(["^a", "b", "^[a-c]*$", "a.b"]),
        "format": lambda: pick.choice(CHECKED), "minimum": number, "maximum": number, "exclusiveMinimum": number, "exclusiveMaximum": number,
        "multipleOf": lambda: pick.choice([1, 2, 0.5, 3, 0.1]), "not": inner, "allOf": lambda: [inner(), inner()],
        "anyOf": lambda: [inner(), inner()], "oneOf": lambda: [inner(), inner()], "if": inner, "then": inner, "else": inner,
        "unevaluatedProperties": inner, "unevaluatedItems": inner}  # fmt: skip
    groups = ([*keywords][:9], [*keywords][9:16], [*keywords][16:20], [*keywords][20:25], [*keywords][25:32], [*keywords][32:])
    kinds = ("object", "array", "string", "number")
    which = pick.choices(range(6), (4, 3, 1, 1, 3, 0.3))[0]
    found = {key: keywords[key]() for key in pick.sample(groups[which], pick.randint(1, 3))}
    if which < 4 and pick.random() < 0.7:
        found["type"] = kinds[which] if pick.random() < 0.8 else [kinds[which], "null"]
    elif pick.random() < 0.5:
        group = pick.choice(groups[:4])
        found |= {key: keywords[key]() for key in pick.sample(group, 2)}
    return found


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
