"""Tests of structured output, to be moved into test_shimmy.py beside those of json_schema."""

from __future__ import annotations

from test_shimmy import *  # noqa

# Schemas, and what is true of each of their documents -----------------------------------------------


def holding(schema: dict[str, Any]) -> dict[str, Any]:
    """An object whose one property has the schema."""
    return {"type": "object", "properties": {"v": schema}, "required": ["v"]}


def options(*schemas: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": list(schemas)}


def both(*schemas: dict[str, Any]) -> dict[str, Any]:
    return {"allOf": list(schemas)}


def recursive(schema: dict[str, Any]) -> dict[str, Any]:
    return {"$defs": {"R": schema}, "$ref": "#/$defs/R"}


INTEGER, FLAG, SHORT = {"type": "integer"}, {"type": "boolean"}, {"type": "string", "maxLength": 3}
FITTING: dict[str, tuple[Any, Callable[[Any], bool]]] = {
    "exclusiveMinimum false": ({**INTEGER, "minimum": -3, "exclusiveMinimum": False, "maximum": 0}, lambda v: -3 <= v <= 0),
    "exclusiveMaximum false": ({**INTEGER, "minimum": 0, "exclusiveMaximum": False, "maximum": 0}, lambda v: v == 0),
    "exclusive true": ({**INTEGER, "minimum": 5, "exclusiveMinimum": True, "maximum": 7, "exclusiveMaximum": True},
                       lambda v: v == 6),
    "two minimums": (both({**INTEGER, "minimum": 7}, {"minimum": 3}, {"maximum": 9}, {"maximum": 8}), lambda v: v in (7, 8)),
    "minimum and a type": (both({"minimum": 7}, {"type": "integer", "maximum": 9}), lambda v: 7 <= v <= 9),
    "two anyOfs": (both(options({"const": 1}, {"const": 2}), options({"const": 2}, {"const": 3})), lambda v: v == 2),
    "anyOf beside allOf": ({**both(options({"const": 1}, {"const": 2})), **options({"const": 2}, {"const": 3})},
                           lambda v: v == 2),
    "two lengths": (both({"type": "string", "minLength": 2}, {"minLength": 1, "maxLength": 9}, {"maxLength": 3}),
                    lambda v: 2 <= len(v) <= 3),
    "two counts": (both({"type": "array", "items": FLAG, "minItems": 2}, {"minItems": 1, "maxItems": 9}, {"maxItems": 3}),
                   lambda v: 2 <= len(v) <= 3),
    "two enums": (both({"enum": [1, 2, "a"]}, {"enum": [2.0, "a", None]}, {"type": "integer"}), lambda v: v == 2),
    "enum beside a type": ({"enum": ["a", 1, None, 2.5], "type": "integer"}, lambda v: v == 1),
    "enum beside bounds": ({"enum": [1, 5, 9], "minimum": 2, "exclusiveMaximum": 9}, lambda v: v == 5),
    "enum of objects": ({"enum": [{"a": 1}, {"a": "x"}, {}], "properties": {"a": INTEGER}, "required": ["a"]},
                        lambda v: v == {"a": 1}),
    "property in both": (both({"properties": {"a": {**INTEGER, "minimum": 3}}, "required": ["a"]},
                              {"properties": {"a": {"maximum": 4}, "b": FLAG}}), lambda v: v["a"] in (3, 4)),
    "items in both": (both({"type": "array", "items": {**INTEGER, "minimum": 3}, "minItems": 1, "maxItems": 3},
                           {"items": {"maximum": 4}}), lambda v: set(v) <= {3, 4} and v != []),
    "closed in one": (both({"properties": {"a": FLAG}, "additionalProperties": False, "required": ["a"]},
                           {"properties": {"a": {}, "b": FLAG}}), lambda v: set(v) == {"a"}),
    "beside $ref": ({"$defs": {"n": INTEGER}, "$ref": "#/$defs/n", "minimum": 3, "maximum": 4}, lambda v: v in (3, 4)),
    "prefix of two, one needed": ({"type": "array", "prefixItems": [FLAG, {"const": 7}, {"const": 8}], "minItems": 1,
                                   "maxItems": 2}, lambda v: 1 <= len(v) <= 2 and v[1:] in ([], [7])),
    "prefix and more": ({"type": "array", "prefixItems": [{"const": 7}], "items": FLAG, "minItems": 3, "maxItems": 4},
                        lambda v: v[0] == 7 and 3 <= len(v) <= 4 and all(type(x) is bool for x in v[1:])),
    "prefix cut": ({"type": "array", "prefixItems": [FLAG, FLAG, FLAG], "maxItems": 1}, lambda v: len(v) == 1),
    "required alone": ({"required": ["a"], "properties": {"b": FLAG}, "additionalProperties": INTEGER},
                       lambda v: type(v["a"]) is int and {type(x) for k, x in v.items() if k == "b"} <= {bool}),
    "minItems alone": ({"minItems": 2, "maxItems": 2, "items": FLAG}, lambda v: len(v) == 2),
    "null keywords": ({"type": "object", "properties": {"a": FLAG}, "required": None, "allOf": None, "enum": None,
                       "additionalProperties": None, "$ref": None, "minProperties": None}, lambda v: set(v) <= {"a"}),
    "const null": ({"const": None}, lambda v: v is None),
    "impossible option": (options({**INTEGER, "minimum": 5, "maximum": 3}, {"const": "x"}, {"enum": [1], "const": 2}), lambda v: v == "x"),
    "impossible property": ({"properties": {"a": False, "b": FLAG}, "required": ["b"]}, lambda v: set(v) == {"b"}),
    "oneOf told apart": ({"oneOf": [holding({"const": 1}), holding({"const": 2})]}, lambda v: v["v"] in (1, 2)),
    "date": ({"type": "string", "format": "date"}, lambda v: time.strptime(v.replace("0000", "2000"), "%Y-%m-%d") is not None),
    "nullable in one of both": (both({**FLAG, "nullable": True}, FLAG), lambda v: v in (True, False)),
    "unevaluatedProperties": ({"type": "object", "unevaluatedProperties": False}, lambda v: v == {}),
    "64-bit bounds": ({**INTEGER, "minimum": 9223372036854775800, "maximum": 9223372036854775807},
                      lambda v: 2**63 - 8 <= v < 2**63),
    "large minimum": ({**INTEGER, "minimum": 10**16}, lambda v: v >= 10**16),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(FITTING))
def test_json_schema_admits_only_its_documents(kind: str, server: Server) -> None:
    schema, fits = FITTING[kind]
    for seed in range(3):
        reply = server.generate("any", "dice", json_schema=schema, max_tokens=240, temperature=2, seed=seed)
        assert reply.finish_reason == "length" or fits(json.loads(reply.text)), reply.text


def test_json_schema_keeps_additional_properties_off_the_named_ones(server: Server) -> None:
    """Names are made of a and b almost alone, so that many of them would be named ones."""
    named = {name: {"const": 1} for name in ("", "a", "ab", "é")}
    schema = {"type": "object", "properties": named, "additionalProperties": {"const": 7}}
    bias = {str(byte_alphabet().index(char)): 30 for char in 'ab"'}
    ask = functools.partial(server.generate, "any", "dice", json_schema=schema, max_tokens=60, temperature=4, logit_bias=bias)
    pairs = [pair for seed in range(40) for pair in re.findall(r'"([^"]*)":\s*(\d)', ask(seed=seed).text)]
    assert all((name in named) == (value == "1") for name, value in pairs), pairs
    assert {"", "a"} <= {name for name, _ in pairs} and any(name not in named for name, _ in pairs)


# Refused by name ---------------------------------------------------------------------------------------

ALIKE = [{"type": "object", "properties": {"a": {"type": "array", "items": {"$ref": "#/$defs/R"}, "maxItems": n}, f"b{n}": FLAG}}
         for n in range(10)]  # fmt: skip
REFUSED: dict[str, tuple[Any, str]] = {
    "4,000 digits": ({**INTEGER, "maximum": 10**4000}, "maximum"),
    "65 bits": ({**INTEGER, "minimum": -(2**65)}, "minimum"),
    "1e300": ({**INTEGER, "exclusiveMaximum": 1e300}, "exclusiveMaximum"),
    "minLength of 4,000 digits": ({"minLength": 10**4000}, "minLength"),
    "exclusive true without a bound": ({**INTEGER, "exclusiveMinimum": True}, "exclusiveMinimum"),
    "bounds of true": ({**INTEGER, "minimum": True}, "minimum"),
    "readings that multiply": (recursive(options(*ALIKE)), "anyOf"),
    "two arrays of itself": (recursive(options({"type": "array", "items": {"$ref": "#/$defs/R"}}, {
        "type": "array", "items": options({"$ref": "#/$defs/R"}, {"const": 1})})), "anyOf"),
    "an endless object": (recursive(holding({"$ref": "#/$defs/R"})), "no document"),
    "nothing is both": (both({"type": "string"}, {"type": "integer"}), "string"),
    "oneOf that overlaps": ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    "oneOf of required": ({"properties": {"a": {}, "b": {}}, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, "oneOf"),
    "two formats": (both({"format": "date"}, {"format": "uuid"}), "format"),
    "format and length": ({"type": "string", "format": "date", "maxLength": 5}, "format"),
    "items as a list": ({"type": "array", "items": [INTEGER]}, "items"),
    "unevaluatedItems": ({"type": "array", "unevaluatedItems": False}, "unevaluatedItems"),
    "contains false": ({"type": "array", "contains": False}, "contains"),
    "propertyNames false": ({"type": "object", "propertyNames": False}, "propertyNames"),
    "an anchor": ({"$defs": {"x": {"$anchor": "x"}}, "$ref": "#x"}, "$ref"),
    "a number's maximum": ({"type": "number", "maximum": 5}, "maximum"),
    "required names nobody may give": ({"required": ["a"], "additionalProperties": False}, "no document"),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(REFUSED))
def test_json_schema_names_what_it_refuses(kind: str, server: Server) -> None:
    schema, word = REFUSED[kind]
    reply = server.generate("any", "dice", json_schema=schema, max_tokens=5)
    error = assert_error(reply, 400, "invalid_request", "json_schema", word)
    assert len(error["message"]) < 300


# Bounded in time ---------------------------------------------------------------------------------------


def chained(option: Callable[[int, int], dict[str, Any]]) -> dict[str, Any]:
    """Fifteen definitions, each anyOf of four times allOf of the next and an option."""
    defs = {f"d{i}": {"anyOf": [both({"$ref": f"#/$defs/d{i + 1}"}, option(i, j)) for j in range(4)]} for i in range(15)}
    return {"$defs": defs | {"d15": FLAG}, "$ref": "#/$defs/d0"}


def alike(property: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    return recursive(options(*({"type": "object", "properties": property(i)} for i in range(10))))


SELF = {"$ref": "#/$defs/R"}
HOSTILE: dict[str, Any] = {
    "chained, all alike": chained(lambda i, j: {"title": f"{i} {j}"}),
    "chained, all different": chained(lambda i, j: {"maxLength": 4 * i + j}),
    "chained without brackets": {"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(3000)}, "$ref": "#/$defs/d0"},
    "ten alike": alike(lambda i: {"a": SELF}),
    "ten alike that need themselves": recursive(options(*10 * [{**holding(SELF), "title": "x"}])),
    "ten alike, then different": alike(lambda i: {"a": SELF, f"b{i}": FLAG}),
    "ten that hold different": alike(lambda i: {"a": options(SELF, {"const": i}), f"b{i}": FLAG}),
    "ten in arrays": alike(lambda i: {"a": {"type": "array", "items": SELF, "maxItems": i}, f"b{i}": FLAG}),
    "allOf of itself": recursive(both(*({"properties": {"a": one}} for one in (both(SELF, {"properties": {"b": SELF}}), SELF)))),
    "a product": both(*(options(*({"minLength": 3 * i + j} for j in range(3))) for i in range(30))),
    "20,000 properties": {"type": "object", "properties": {f"p{i}": {} for i in range(20_000)}},
    "900 properties": {"type": "object", "properties": {f"p{i}": FLAG for i in range(900)}},
    "names to avoid": {"type": "object", "properties": {f"p{i}" * 40: FLAG for i in range(500)}, "additionalProperties": True},
    "a constant of 2 MB": {"const": "x" * 2_000_000},
    "5,000 constants": {"enum": [f"v{i:05d}" for i in range(5000)]},
    "lengths by the thousand": {"properties": {f"p{i}": {"type": "string", "maxLength": 1000 + i} for i in range(500)}},
    "200 alike objects": options(*({"properties": {f"p{i * j % 97}": SHORT for j in range(20)}} for i in range(200))),
    "200 arrays": options(*({"type": "array", "items": {"type": "string", "maxLength": i}} for i in range(200))),
    "60 deep": functools.reduce(lambda inner, i: options(inner, {"const": i}), range(28), FLAG),
}


@pytest.mark.parametrize("kind", list(HOSTILE))
def test_json_schema_that_is_hostile_costs_little(kind: str, server: Server) -> None:
    """Either a 400, or a grammar with which the text goes on, deeper and deeper; and the model serves others afterwards."""
    server.generate("warm", "dice", max_tokens=1)
    bias = {str(byte_alphabet().index(char)): 30 for char in '{[:"a'}
    began = time.monotonic()
    reply = server.generate("any", "dice", json_schema=HOSTILE[kind], max_tokens=60, temperature=1, seed=1, logit_bias=bias)
    assert time.monotonic() - began < 10
    if reply.status != 200:
        assert_error(reply, 400, "invalid_request", "json_schema")
    assert server.generate("any", "dice", max_tokens=1).status == 200


# Useful ones work -----------------------------------------------------------------------------------------

PET = {"oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}], "discriminator": {"propertyName": "kind"}}
FRIEND = options(PET, {"type": "null"})
USEFUL: dict[str, Any] = {
    "optional": {"properties": {"a": options(SHORT, {"type": "null"})}},
    "linked list": recursive({"properties": {"v": INTEGER, "next": options(SELF, {"type": "null"})}, "required": ["v", "next"]}),
    "tree": recursive({"properties": {"v": INTEGER, "below": {"type": "array", "items": SELF}}, "required": ["v"]}),
    "discriminated": {"$defs": {"cat": {"properties": {"kind": {"const": "cat"}, "n": INTEGER, "friend": FRIEND}},
                                "dog": {"properties": {"kind": {"const": "dog"}, "n": FLAG, "friend": FRIEND}}}, **PET},
    "expressions": recursive(options(
        {"properties": {"left": SELF, "right": SELF, "op": {"const": "+"}}, "required": ["left", "right", "op"]},
        {"properties": {"left": SELF, "right": SELF, "op": {"const": "*"}}, "required": ["left", "right", "op"]},
        {"properties": {"value": {"type": "number"}}, "required": ["value"]})),
    "any JSON": recursive(options(SHORT, {"type": "number"}, {"type": "null"}, {"type": "array", "items": SELF},
                                  {"type": "object", "additionalProperties": SELF})),
    "eight objects": options(*({"properties": {"x": INTEGER, f"y{i}": SHORT}, "required": ["x", f"y{i}"]} for i in range(8))),
    "constants with titles": {"oneOf": [{"const": f"c{i}", "title": f"Choice {i}"} for i in range(300)]},
    "zod's integer": {**INTEGER, "minimum": -(2**53) + 1, "maximum": 2**53 - 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", list(USEFUL))
def test_json_schema_of_a_common_form_is_taken(kind: str, server: Server) -> None:
    reply = server.generate("any", "dice", json_schema=USEFUL[kind], max_tokens=100, temperature=1, seed=2)
    assert reply.finish_reason == "length" or not list(problems(json.loads(reply.text), USEFUL[kind], USEFUL[kind]))


# Random schemas against a checker of our own --------------------------------------------------------------


def is_type(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer":
        return isinstance(value, (int, float)) and value == int(value)
    kinds: dict[str, Any] = {"object": dict, "array": list, "string": str, "number": (int, float), "null": type(None)}
    return kind in kinds and isinstance(value, kinds[kind])


def same(one: Any, two: Any) -> bool:
    plain = not any(isinstance(value, (bool, dict, list)) for value in (one, two))
    return json.dumps(one) == json.dumps(two) or (plain and one == two)


def problems(value: Any, schema: Any, root: Any) -> Iterator[str]:
    """The keywords of a schema that a value does not fit; written apart from shimmy's reading."""
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}

    def fits(one: Any, inner: Any) -> bool:
        return not any(problems(one, inner, root))

    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    size = len(value) if isinstance(value, (str, list)) else None
    length = "Length" if isinstance(value, str) else "Items"
    members = value.items() if isinstance(value, dict) else ()
    items = list(enumerate(value)) if isinstance(value, list) else []
    first, named = schema.get("prefixItems", []), schema.get("properties", {})
    checks: dict[str, Callable[[Any], bool]] = {
        "type": lambda v: any(is_type(value, kind) for kind in ([v] if isinstance(v, str) else v)),
        "enum": lambda v: any(same(value, one) for one in v),
        "const": lambda v: same(value, v),
        "minimum": lambda v: not number or value >= v,
        "maximum": lambda v: not number or value <= v,
        f"min{length}": lambda v: size is None or size >= v,
        f"max{length}": lambda v: size is None or size <= v,
        "required": lambda v: not isinstance(value, dict) or set(v) <= set(value),
        "properties": lambda v: all(fits(one, v[name]) for name, one in members if name in v),
        "additionalProperties": lambda v: all(fits(one, v) for name, one in members if name not in named),
        "prefixItems": lambda v: all(fits(one, v[i]) for i, one in items if i < len(v)),
        "items": lambda v: all(fits(one, v) for i, one in items if i >= len(first)),
        "allOf": lambda v: all(fits(value, one) for one in v),
        "anyOf": lambda v: any(fits(value, one) for one in v),
        "oneOf": lambda v: sum(fits(value, one) for one in v) == 1,
        "$ref": lambda v: fits(value, root["$defs"][v.split("/")[-1]]),
    }
    for key, said in schema.items():
        if key in checks and not checks[key](said):
            yield f"{key} {said}: {value}"


def random_schema(pick: random.Random, depth: int = 0) -> Any:
    inner = functools.partial(random_schema, pick, depth + 1)

    def some(low: int, high: int) -> list[Any]:
        return [inner() for _ in range(pick.randint(low, high))]

    names = pick.sample(["a", "b", "ab", "é"], pick.randint(0, 3))
    kinds: list[Callable[[], Any]] = [
        lambda: {"type": "integer", "minimum": pick.randint(-30, 5), "maximum": pick.randint(0, 200)},
        lambda: {"type": "string", "minLength": pick.randint(0, 2), "maxLength": pick.randint(1, 3)},
        lambda: {"enum": pick.choices([1, 2, "a", "ab", None, True, 1.0, {"a": 1}, [], [1]], k=3)},
        lambda: {"type": pick.sample(["boolean", "null", "integer"], 2)},
        lambda: {"$ref": f"#/$defs/{pick.choice('xy')}"},
    ]
    if depth < 3:
        kinds += 2 * [
            lambda: {"type": "object", "properties": {name: inner() for name in names}, "required": names[:1],
                     **({"additionalProperties": inner()} if pick.random() < 0.5 else {})},
            lambda: {"required": names, "additionalProperties": inner()},
            lambda: {"type": "array", "items": inner(), "prefixItems": some(1, 2), "maxItems": pick.randint(0, 4)},
            lambda: {"type": "array", "items": inner(), "minItems": pick.randint(0, 2), "maxItems": pick.randint(1, 3)},
            lambda: {"anyOf": some(1, 3)},
            lambda: {"allOf": some(2, 3)},
            lambda: {"oneOf": some(1, 2)},
            lambda: {"anyOf": some(1, 2), "allOf": some(1, 2)},
            lambda: {**pick.choice(kinds[:4])(), "anyOf": some(1, 3)},
        ]  # fmt: skip
    return pick.choice(kinds)()


def test_json_schema_made_at_random_is_refused_or_fitted(server: Server) -> None:
    checked = 0
    for seed in itertools.count():
        pick = random.Random(seed)
        schema = {**random_schema(pick), "$defs": {"x": random_schema(pick, 2), "y": random_schema(pick, 3)}}
        reply = server.generate("any", "dice", json_schema=schema, max_tokens=120, temperature=2, seed=seed)
        if reply.status != 200:
            assert_error(reply, 400, "invalid_request", "json_schema")
        elif reply.finish_reason == "stop":
            assert not list(problems(json.loads(reply.text), schema, schema)), (seed, schema, reply.text)
            checked += 1
        if checked == 60:
            break
        assert seed < 600
