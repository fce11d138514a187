"""Tests of what must differ in a JSON document; they move into test_shimmy.py."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from shimmy import Automaton, State, bytes_of, read_json
from test_shimmy import cases

# topic: structured output


def begin(schema: Any) -> State:
    """The state before the first byte of a schema's documents."""
    return Automaton(read_json(json.dumps(schema), "json_schema")).start


def written(schema: Any, seed: int, most: int = 600) -> Any:
    """A document written at random, which must never come to a dead end; None if it grew too long."""
    here, text, rnd = begin(schema), bytearray(), random.Random(seed)
    while len(text) < most and not (here.ends and rnd.random() < 0.3):
        found = list(bytes_of(here.bits))
        if here.ends and not found:
            break
        assert found, f"a dead end: {bytes(text)!r}"
        byte = rnd.choices(found, [9 if b in b',"}]' else 1 for b in found])[0]
        after = here.step(byte)
        assert after is not None, f"a dead end: {bytes(text)!r}"
        here = after
        text.append(byte)
    return json.loads(text) if here.ends else None


UNIQUE = {"type": "array", "uniqueItems": True}
NULLS = {"type": "object", "additionalProperties": {"type": "null"}}
STRINGS = {**UNIQUE, "items": {"type": "string"}}


@cases("schema", {
    "any strings": STRINGS,
    "few characters": {**UNIQUE, "items": {"type": "string", "maxLength": 2, "pattern": "^[aé😀]*$"}, "minItems": 5},
    "all there are": {**UNIQUE, "items": {"type": "string", "pattern": "^(a|b.|cd?)$", "maxLength": 2}, "minItems": 9},
    "a text that ends or goes on": {**UNIQUE, "items": {"type": "string", "pattern": "^(ab?c?|d*)$"}, "minItems": 8},
    "escapes": {**UNIQUE, "items": {"type": "string", "pattern": r"^[\n\u0001/]$"}, "minItems": 3},
    "constants and strings": {**UNIQUE, "minItems": 3,
                              "items": {"anyOf": [{"enum": ["a", 1]}, {"type": "string", "pattern": "^[ab]$"}]}},
    "names": {**NULLS, "minProperties": 3, "propertyNames": {"pattern": "^[abc]$"}},
})  # fmt: skip
def test_schema_of_unlike_texts_is_written_without_dead_ends(schema: Any) -> None:
    documents = [document for seed in range(40) if (document := written(schema, seed)) is not None]
    for document in documents:
        Draft202012Validator(schema).validate(document)
    assert documents


@pytest.mark.parametrize("text", ['["ab", "ab"', r'["ab", "\u0061b"', r'["\u00e9", "é"', r'["a\/b", "a/b"', '["", ""'])
def test_schema_of_unlike_texts_refuses_one_written_twice(text: str) -> None:
    assert begin(STRINGS).read(text.encode()) is None


@pytest.mark.parametrize("text", ['["ab", "abc", "a", "b"]', r'["\ud83d\ude00", "\ud83d\ude01"]', r'["a\\b", "ab"]'])
def test_schema_of_unlike_texts_takes_others(text: str) -> None:
    state = begin(STRINGS).read(text.encode())
    assert state is not None and state.ends


def test_schema_of_many_unlike_texts_keeps_one_machine() -> None:
    root = read_json(json.dumps(STRINGS), "json_schema")
    state = Automaton(root).start.read(json.dumps([f"text {i}" for i in range(200)]).encode())
    assert state is not None and state.ends
    assert len(root.documents._leaves) == 1  # type: ignore[attr-defined]
