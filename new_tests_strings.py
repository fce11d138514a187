"""Tests of the strings and numbers that a schema allows; they move into test_shimmy.py."""

from __future__ import annotations

import json
import random
import re
import time
from typing import Any

import pytest
import hypothesis
from hypothesis import assume
from hypothesis import strategies as some
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from shimmy import (
    FORMATS,
    Automaton,
    InvalidRequest,
    NumberShape,
    State,
    StringShape,
    number_fits,
    number_symbol,
    numbers_meet,
    string_fits,
    string_symbol,
    strings_meet,
)

# topic: strings and numbers


def each(**values: list[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test by the values of one name."""
    name, found = next(iter(values.items()))
    return pytest.mark.parametrize(name, found)


def begin(shape: StringShape | NumberShape) -> State:
    """The state before a string or number of a shape."""
    symbol = string_symbol(shape) if isinstance(shape, StringShape) else number_symbol(shape)
    assert symbol is not None
    return Automaton(symbol).start


def reads(shape: StringShape | NumberShape, text: str | bytes) -> bool:
    """Whether a JSON text is read to its end."""
    state = begin(shape).read(text if isinstance(text, bytes) else text.encode())
    return state is not None and state.ends


def takes(shape: StringShape, text: str) -> bool:
    return reads(shape, json.dumps(text, ensure_ascii=False))


def walk(shape: StringShape | NumberShape, seed: int, patience: int = 40) -> str | None:
    """A JSON text, byte by byte at random; after some of them it ends where it may. None where chance led nowhere near an end."""
    chance, state, text = random.Random(seed), begin(shape), b""
    while not (state.ends and (not state.bits or chance.random() < 0.3)):
        options = [byte for byte in range(256) if state.bits >> byte & 1]
        assert options, f"{shape} leads into a dead end behind {text!r}"
        quote = 34 in options and len(text) > 1 and (len(text) > patience or chance.random() < 0.2)
        text += bytes([34 if quote else chance.choice(options)])
        following = state.step(text[-1])
        assert following is not None
        state = following
        if len(text) > 3000:
            return None
    return text.decode()


def pattern(*texts: str, **more: object) -> StringShape:
    return StringShape(patterns=texts, **more)  # type: ignore[arg-type]


@each(text=['""', '"abc"', '"\\n\\u00e9\\/"', '"é\U0001f600"', '"\\ud83d\\ude00"', '"\\uD83D\\uDE00x"', '"\x7f"'])
def test_string_without_conditions_reads(text):
    assert reads(StringShape(), text)


@each(
    text=[
        b'"\\ud83d"',
        b'"\\ude00"',
        b'"\\ud83d\\u0041"',
        b'"\\ud83dx"',
        b'"a\nb"',
        b'"\\x41"',
        b'"\xc0\x80"',
        b'"\xed\xa0\x80"',
        b'"\xf4\x90\x80\x80"',
        b'"\xe0\x80\x80"',
        b'"\\u12g4"',
        b'"abc',
    ]
)
def test_string_that_is_no_json_is_not_read(text):
    assert not reads(StringShape(), text)


def test_string_without_conditions_is_one_state():
    state = begin(StringShape()).read(b'"')
    assert state is not None and state.read(b"abc") is state and state.read("é\\n\\ud83d\\ude00".encode()) is state


@each(text=['"\U0001f600\U0001f600"', '"\\ud83d\\ude00a"', '"ab"'])
def test_length_counts_code_points(text):
    assert (
        reads(StringShape(low=2, high=2), text) and not reads(StringShape(high=1), text) and not reads(StringShape(low=3), text)
    )


YES_AND_NO = [
    ("^abc[0-9]$", ["abc5"], ["abc", "xabc5", "abc5\n"]),
    ("^a|b$", ["a", "axx", "xxb"], ["xax", "bx"]),
    ("(^a)b", ["ab", "abx"], ["xab"]),
    ("a{2,3}", ["aa", "xaaaax"], ["a", "axa"]),
    ("^a{2,3}$", ["aa", "aaa"], ["a", "aaaa"]),
    ("^(a{2,3}){2,}?$", ["aaaa", "aaaaaaa"], ["aaa"]),
    ("^x{,2}$", ["", "xx"], ["xxx"]),
    ("((^|, )(foo|bar))+$", ["foo", "foo, bar", "x, foo"], ["xfoo", "foo,"]),
    ("^((foo|bar)(,|$))+", ["foo", "foo,", "foo,bar", "foo,baz"], ["foob", "x"]),
    ("^(?:a|$){2}$", ["aa", "a", ""], ["aaa"]),
    ("(^|a){2}b$", ["aab", "ab", "b"], ["xb", "xab"]),
    ("^$|^x", ["", "xy"], ["y"]),
    ("$^", [""], ["a"]),
    ("^(?!foo)", ["bar", "fo", ""], ["foo", "foox"]),
    ("^(?!foo$)[a-z]+$", ["fo", "foox"], ["foo"]),
    ("^(?=.*[A-Z])(?=.*[0-9]).{3,}$", ["A1b", "xx9X"], ["abc", "A1"]),
    ("^((?!foo).)*$", ["abc", "fo", ""], ["foo", "xfoox"]),
    ("a(?=b)", ["ab"], ["a", "ac"]),
    ("^[^]$", ["\n", "x"], ["", "xx"]),
    ("^.$", ["x", "\U0001f600"], ["\n", "\u2028", ""]),
    ("^\\w\\d\\s$", ["a1 ", "_0\ufeff"], ["é1 ", "a٣ "]),
    ("^[\\W\\D\\S]$", ["é", "1"], ["ab"]),
    ("^\\p{Lu}\\P{L}$", ["É1"], ["é1", "Éé"]),
    ("^\\u00e9\\x41\\u{1F600}\\ud83d\\ude00\\cJ$", ["éA\U0001f600\U0001f600\n"], ["éA"]),
    ("^[a\\-z\\]/\\/-]$", ["a", "-", "]", "/"], ["b"]),
    ("^[\\w-.]$", ["a", "-", "."], ["+"]),
    ("^(?<name>a)(?P<other>b)(?:c)(?#d)$", ["abc"], ["abcd"]),
    ("^{a}]$", ["{a}]"], ["a"]),
    ("\\Aab\\Z", ["ab"], ["abc"]),
    ("", ["", "x"], []),
    ("^(a|a)*$", ["", "aaa"], ["b"]),
    ("^(a*)*(b?){3}$", ["aab", "bbb"], ["bbbb"]),
]


@each(text=[one for one, _, _ in YES_AND_NO])
def test_pattern_takes_what_it_matches(text):
    yes, no = next((yes, no) for one, yes, no in YES_AND_NO if one == text)
    for example, wanted in [(one, True) for one in yes] + [(one, False) for one in no]:
        assert takes(pattern(text), example) is wanted and string_fits(pattern(text), example) is wanted
        assert string_fits(StringShape(unlike=(text,)), example) is not wanted


@each(
    text=[
        "(a)\\1",
        "\\bfoo",
        "(?<=a)b",
        "(?<!a)b",
        "(?i)a",
        "\\k<a>",
        "\\q",
        "\\p{Greek}",
        "(",
        "a)",
        "[a",
        "*a",
        "a**",
        "a{2,1}",
        "[z-a]",
        "(?:(?!b)a){2}",
        "\\",
        "a{9999999999}",
    ]
)
def test_pattern_that_cannot_be_honoured_is_refused_by_name(text):
    with pytest.raises(InvalidRequest, match="pattern"):
        string_symbol(pattern(text))


@each(
    case=[(("^abc[0-9]$",), b'"abc'), (('^a"\n\x1f[0-9]$',), b'"a\\"\\n\\u001f'), (("^é\U0001f600$",), '"é\U0001f600"'.encode())]
)
def test_pattern_forces_text(case):
    assert begin(pattern(*case[0])).forced(100) == case[1]


def test_last_text_left_is_forced():
    shape = pattern("^(red|green|blue)$", excluded=frozenset(["red", "green"]))
    assert begin(shape).forced(100) == b'"blue"'


@each(
    shape=[
        pattern("^a+$", "^b+$"),
        pattern("^(abc)*$", low=4, high=5),
        pattern("^a$", excluded=frozenset("a")),
        StringShape(low=2, high=1),
        pattern("^[a-c]{2}$", unlike=("[ab]", "^.c")),
        StringShape(formats=("ipv4", "ipv6")),
        StringShape(formats=("uuid",), high=35),
        pattern("[^]^"),
    ]
)
def test_string_that_cannot_be_is_none(shape):
    assert string_symbol(shape) is None


def test_strings_meet():
    assert strings_meet(pattern("^a+b$"), pattern("^[ab]{3}$")) and not strings_meet(pattern("^a+$"), pattern("b"))
    assert strings_meet(StringShape(low=3), pattern("^(abc)*$")) and not strings_meet(
        StringShape(low=4, high=5), pattern("^(abc)*$")
    )


LETTERS = some.text("ab1-\n\U0001f600", max_size=6)
PATTERNS = some.sampled_from(
    [
        "^a",
        "b$",
        "a.b",
        "^[ab]*$",
        "(ab)+",
        "^(aab?)*$",
        "^.{2,4}$",
        "1|-",
        "^(?!a)",
        "^((?!ab).)*$",
        "^[^1]*$",
        "(a|b){3}",
        "^(..)*$",
        "^(...)*$",
        "^(a|1)*b?$",
        "^$|..",
        "a*b*",
    ]
)
SHAPES = some.builds(
    StringShape,
    low=some.integers(0, 5),
    high=some.none() | some.integers(2, 9),
    patterns=some.lists(PATTERNS, max_size=2).map(tuple),
    unlike=some.lists(PATTERNS, max_size=2).map(tuple),
    excluded=some.frozensets(LETTERS, max_size=4),
)


def is_right(shape: StringShape, text: str) -> bool:
    """As `re` says."""
    dotted = text.replace("\u2028", "\n").replace("\r", "\n").replace("\u2029", "\n")
    return (
        shape.low <= len(text) <= (9999 if shape.high is None else shape.high)
        and text not in shape.excluded
        and all(re.search(one.replace("$", r"\Z"), dotted) for one in shape.patterns)
        and not any(re.search(one.replace("$", r"\Z"), dotted) for one in shape.unlike)
    )


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(SHAPES, LETTERS, some.integers(0, 999))
def test_string_of_any_shape_is_as_re_says(shape, text, seed):
    symbol = string_symbol(shape)
    assert symbol is not None or not is_right(shape, text)
    assume(symbol is not None)
    assert takes(shape, text) == string_fits(shape, text) == is_right(shape, text)
    written = walk(shape, seed)
    assert written is None or is_right(shape, json.loads(written))


RIGHT = Draft202012Validator.FORMAT_CHECKER


@each(name=[name for name in FORMATS if name != "relative-json-pointer"])  # jsonschema refuses 101#
def test_format_is_what_jsonschema_accepts(name):
    texts = [walk(StringShape(formats=(name,)), seed) for seed in range(20)]
    assert all(RIGHT.conforms(json.loads(text), name) for text in texts if text is not None)
    assert any(texts)


@each(
    case=[
        ("date", "2024-02-29"),
        ("date-time", "1985-04-12T23:20:50.52Z"),
        ("date-time", "1937-01-01t12:00:27.87+00:20"),
        ("time", "08:30:06Z"),
        ("duration", "P4Y1M2DT3H4M5S"),
        ("duration", "P2W"),
        ("duration", "PT36H"),
        ("email", "joe.o'neil+x@example.com"),
        ("email", '"joe bloggs"@[127.0.0.1]'),
        ("hostname", "a-b.example"),
        ("ipv4", "87.10.0.1"),
        ("ipv6", "::ffff:192.168.0.1"),
        ("ipv6", "1:2::8"),
        ("ipv6", "::"),
        ("uuid", "2EB8AA08-aa98-11ea-b4aa-73b441d16380"),
        ("uri", "http://foo.bar/?baz=qux#quux"),
        ("uri", "urn:oasis:names:x:1.0"),
        ("uri", "http://[::1]:80/%C3"),
        ("uri", "mailto:a@b.c"),
        ("uri-reference", "/abc?q#f"),
        ("uri-reference", "//a/b"),
        ("uri-reference", ""),
        ("iri", "http://ƒøø.ßår/?∂éœ"),
        ("json-pointer", "/foo/~0~1/"),
        ("relative-json-pointer", "1/foo"),
        ("relative-json-pointer", "0#"),
        ("regex", "^([a-z]+)\\d{3}$"),
        ("unheard-of", "x"),
    ]
)
def test_format_takes(case):
    assert takes(StringShape(formats=case[:1]), case[1])


@each(
    case=[
        ("date", "2023-02-29"),
        ("date", "1900-02-29"),
        ("date", "2020-04-31"),
        ("date", "0000-01-01"),
        ("date-time", "2020-01-01 00:00:00Z"),
        ("time", "24:00:00Z"),
        ("time", "12:00:00"),
        ("duration", "P"),
        ("duration", "P1YT"),
        ("email", "a.b.c"),
        ("email", ".a@b.c"),
        ("hostname", "-a.b"),
        ("hostname", "a_b"),
        ("hostname", "a" * 64),
        ("ipv4", "256.1.1.1"),
        ("ipv4", "01.1.1.1"),
        ("ipv6", "1::2::3"),
        ("ipv6", "1:2:3:4:5:6:7"),
        ("uuid", "2eb8aa08aa9811eab4aa73b441d16380"),
        ("uri", "/abc"),
        ("uri", "http://a b"),
        ("uri", "http://a/%zz"),
        ("uri-reference", "\\a"),
        ("json-pointer", "/~2"),
        ("relative-json-pointer", "01/a"),
        ("regex", "(a"),
    ]
)
def test_format_does_not_take(case):
    assert not takes(StringShape(formats=case[:1]), case[1])


def test_format_that_cannot_be_honoured_is_refused_by_name():
    for shape in (StringShape(formats=("uri-template",)), StringShape(not_formats=("regex",))):
        with pytest.raises(InvalidRequest, match="format"):
            string_symbol(shape)


def test_hostname_of_254_characters_is_none():
    name = ".".join(["a" * 62] * 4) + "a"
    assert takes(StringShape(formats=("hostname",)), name) and not takes(StringShape(formats=("hostname",)), name + ".a")
    assert string_fits(StringShape(not_formats=("hostname",)), name + ".a")


HOSTILE = [
    "(a+)+$",
    "^(a|a)*$",
    "^(a{0,10000}){0,10000}$",
    "^(((a{0,1000}b){0,1000}c){0,1000}d){0,1000}$",
    "(" * 10_000,
    "[" * 10_000,
    "(" * 5000 + ")" * 5000,
    "^" + "a?" * 3000 + "a" * 3000 + "$",
    "(x+x+)+y",
    "^(" + "|".join(f"w{n}" for n in range(2500)) + ")$",
    "((((((((^a)*)*)*)*)*)*)*)*b",
    "(a|b)*a(a|b){200}$",
    "^" + "(?=.*a)" * 500,
    "(?!" * 30 + "a" + ")" * 30,
]


@each(number=list(range(len(HOSTILE))))
def test_hostile_pattern_is_served_or_refused(number):
    began = time.thread_time()
    try:
        walk(pattern(HOSTILE[number]), 1)
    except InvalidRequest:
        pass
    assert time.thread_time() - began < 20  # for ever, it would take


@each(text=["0", "-0", "1.5", "1e5", "-1.5E-07", "123456", "0.001"])
def test_number_without_conditions_reads(text):
    assert reads(NumberShape(), text)


@each(text=["01", "1.", "-", ".5", "1e", "+1", "--1", "0x1", "1" * 99, "1e400"])
def test_number_that_is_none_or_too_long_is_not_read(text):
    assert not reads(NumberShape(), text)


def test_number_never_begins_what_bounds_forbid():
    assert begin(NumberShape(low=(0, False))).read(b"-") is None
    assert begin(NumberShape(True, (12, False), (17, False))).bits == 1 << ord("1")
    assert begin(NumberShape(True, (7, False), (7, False))).forced(9) == b"7"
    assert begin(NumberShape(True, (100, False), None, (1000,))).read(b"0") is None


def test_number_as_near_to_its_excluded_bound_as_doubles_are_is_not_read():
    shape = NumberShape(high=(1, True))
    assert reads(shape, "0.999999") and not reads(shape, "0.99999999999999999") and not reads(shape, "1")


@each(
    shape=[
        NumberShape(True, (1, True), (2, True)),
        NumberShape(False, (1, False), (6, False), (7,)),
        NumberShape(False, (3, True), (3, False)),
        NumberShape(True, not_multiples=(1,)),
        NumberShape(multiples=(6,), not_multiples=(3,)),
    ]
)
def test_number_that_cannot_be_is_none(shape):
    assert number_symbol(shape) is None


@each(
    shape=[
        NumberShape(low=(float("inf"), False)),
        NumberShape(multiples=(0,)),
        NumberShape(multiples=(-1,)),
        NumberShape(high=(10**999, False)),
        NumberShape(multiples=(1e-99,)),
    ]
)
def test_number_out_of_proportion_is_refused(shape):
    with pytest.raises(InvalidRequest):
        number_symbol(shape)


def test_numbers_meet():
    assert numbers_meet(NumberShape(True, (1, True)), NumberShape(high=(2, False)))
    assert not numbers_meet(NumberShape(True, (1, True)), NumberShape(high=(2, True)))


NUMBERS = some.integers(-30, 30) | some.integers(-(10**12), 10**12) | some.integers(-900, 900).map(lambda n: n / 100)
BOUNDS = some.none() | some.tuples(NUMBERS, some.booleans())
NUMBER_SHAPES = some.builds(
    NumberShape,
    some.booleans(),
    BOUNDS,
    BOUNDS,
    some.lists(some.sampled_from([1, 2, 3, 7, 10, 0.1, 0.01, 2.5, 0.25, 100]), max_size=2).map(tuple),
    some.lists(some.sampled_from([1, 2, 3, 0.1]), max_size=1).map(tuple),
)


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(NUMBER_SHAPES, NUMBERS, some.integers(0, 999))
def test_number_of_any_shape_is_as_arithmetic_says(shape, value, seed):
    symbol = number_symbol(shape)
    assert symbol is not None or not number_fits(shape, value)
    assume(symbol is not None)
    value = int(value) if value == int(value) else value
    assert reads(shape, json.dumps(value)) == number_fits(shape, value)
    written = walk(shape, seed)
    assert written is not None and number_fits(shape, json.loads(written))


def test_excluded_texts_are_many_and_long():
    names = frozenset(["a" * n for n in range(1000)] + [f"name{n}" for n in range(1000)])
    shape = StringShape(excluded=names)
    assert takes(shape, "a" * 1000) and takes(shape, "name1000") and not takes(shape, "aaa") and not takes(shape, "name12")


def test_states_are_few():
    text = Automaton(string_symbol(pattern("^[a-z]{3}-[0-9]+$")))  # type: ignore[arg-type]
    for word in ("abc-1", "xyz-22", "qqq-9999999"):
        assert text.start.read(f'"{word}"'.encode()) is not None
    assert len(text._states) < 12
