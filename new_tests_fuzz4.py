"""Tests of the branch fuzz4."""

from __future__ import annotations

from typing import Any

import pytest

from test_shimmy import ANY_ARRAY, InvalidRequest, begin, cases, follow

# topic: Structured output

R = {"$ref": "#/$defs/R"}
HOLDS_ITSELF: dict[str, Any] = {**R, "$defs": {"R": {**ANY_ARRAY, "uniqueItems": True, "items": R}}}


@cases("text, ends", {
    "the empty one, and others": ("[[], [[]], [[], [[]]]]", True),
    "one twice": ("[[], []", False),
    "one twice, further in": ("[[[]], [[], []", False),
    "three that hold each other": ("[[], [[]], [[[]]]]", True),
})  # fmt: skip
def test_arrays_without_repeats_that_hold_each_other_are_followed(text: str, ends: bool) -> None:
    here = follow(begin(HOLDS_ITSELF), text.encode())
    assert bool(here and here.ends) == ends


def test_element_that_begins_like_another_can_still_become_one_of_its_own() -> None:
    text = {"type": "string", "pattern": "b", "maxLength": 2}
    schema = {**ANY_ARRAY, "uniqueItems": True, "items": {"type": "object", "properties": {"a": text}, "required": ["a"]}}
    here = follow(begin(schema), b'[{"a": "1b"}, {"a": "')
    assert here and here.step(ord("2")) and here.step(ord("b")) and not here.step(ord("1"))


def test_text_that_nests_too_deep_to_be_followed_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="nests too deep"):
        begin(HOLDS_ITSELF).read(b"[" * 3000 + b"]")


EMPTY = {"type": "object", "maxProperties": 0}
IMPOSSIBLE = {"type": "integer", "minimum": 2, "maximum": 1}


@cases("schema", {
    "objects that can only be empty": {**ANY_ARRAY, "uniqueItems": True, "prefixItems": [
        EMPTY, {"type": "object", "additionalProperties": IMPOSSIBLE}]},
    "objects that must not be empty": {**ANY_ARRAY, "uniqueItems": True, "minItems": 3, "items": {
        "type": "object", "properties": {"a": {"type": "boolean"}}, "minProperties": 1}},
})  # fmt: skip
def test_array_without_repeats_that_lacks_elements_is_refused(schema: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"uniqueItems|no document"):
        begin(schema)


@cases("schema, said", {
    "a format that a constant must not have": ({"const": "a", "not": {"format": "email"}}, "format"),
    "an array beside something else": ({"type": ["array", "null"], "uniqueItems": True, "minItems": 2,
                                        "prefixItems": [{"const": 1}, {"const": 1}]}, "uniqueItems"),
})  # fmt: skip
def test_schema_is_refused_before_a_text_begins_and_by_its_field(schema: Any, said: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^json_schema: .*{said}") as refused:
        begin(schema)
    assert refused.value.param == "json_schema"
