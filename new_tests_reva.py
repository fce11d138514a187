"""What a review of structured output mended."""

import random

import pytest

from shimmy import Automaton, CallFormat, CallsGrammar, InvalidRequest, Params, bytes_of, read_ahead

# topic: calls whose arguments stand one by one

TAGS = CallFormat("<call>", "\n", "</call>", params=Params("<p=", ">", "</p>"))


def written(parameters, seed):
    """A call as a random walk through its grammar writes it, at most 300 bytes of it."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    state, text, chance = Automaton(read_ahead(CallsGrammar(TAGS, tools).symbol("", False))).start, b"", random.Random(seed)
    while state.bits and len(text) < 300:
        text += bytes([chance.choice(list(bytes_of(state.bits)))])
        state = state.read(text[-1:])
    return text.decode(errors="replace")


def one(schema):
    return {"type": "object", "properties": {"a": schema}, "required": ["a"]}


@pytest.mark.parametrize("schema, pattern", [
    ({"type": "string", "pattern": "^[0-9]{3}$"}, "[0-9]{3}"),
    ({"type": "string", "format": "ipv4"}, r"[0-9]{1,3}(\.[0-9]{1,3}){3}"),
    ({"type": "string", "minLength": 2, "maxLength": 4, "not": {"pattern": "x"}}, "[^x]{2,4}"),
    ({"allOf": [{"enum": ["u", "v</p>"]}]}, "u"),
    ({"const": 5}, "5"),
])  # fmt: skip
def test_a_plain_argument_fits_its_schema(schema, pattern):
    import re

    for seed in range(10):
        assert re.fullmatch(f"<call>f\n<p=a>({pattern})</p></call>", written(one(schema), seed))


def test_a_required_argument_without_a_schema_is_written():
    assert "<p=b>" in written({"type": "object", "properties": {}, "required": ["b"]}, 1)


@pytest.mark.parametrize("parameters, word", [
    (one({"type": "string", "minLength": "x"}), "minLength"),
    (one({"type": "string", "pattern": "("}), "bracket"),
    (one({"enum": ["</p>"]}), "no string"),
    ({**one({}), "minProperties": 2}, "minProperties"),
])  # fmt: skip
def test_what_plain_arguments_cannot_honour_is_refused_by_name(parameters, word):
    with pytest.raises(InvalidRequest, match=word):
        written(parameters, 1)
