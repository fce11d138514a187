"""Sums for a calculator, and other tools that take one string: requests, calls, results, answers."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .facts import small_phrase
from .language import (
    LISTS,
    MANNER,
    SLOT,
    WORDS,
    Message,
    expand,
    in_words,
    invented_word,
    read_grammars,
    sentence,
    some_city,
    some_name,
    spoken,
    word_list,
)
from .unseen import held_out

# ── Sums ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

SUM_TEXTS = read_grammars("sums")
RESULT_FRAMES, ORDER_FRAMES = SUM_TEXTS["result_frames"][0], SUM_TEXTS["order_frames"][0]
SUM_ORDERS = tuple(word + " " for word in word_list(SUM_TEXTS, "orders"))  # "add 2 and 3" is an order, "2 plus 3" is not
SPECIAL_SUMS = list(zip(*SUM_TEXTS["special"], strict=True))  # what is asked, and the expression
COUNTABLES = word_list(LISTS, "countables")


def some_number(rng: random.Random) -> int:
    digits = rng.choices([1, 2, 3, 4, 5, 6], [2, 4, 4, 4, 0.4, 0.2])[0]
    return rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def operands(operator: str, rng: random.Random) -> tuple[int, int]:
    """Draws two numbers that are not held out for the evaluation."""
    while True:
        first, second = some_number(rng), some_number(rng)
        if not held_out(first, operator, second):
            return first, second


def shown_number(number: str, rng: random.Random, words: float) -> str:
    """The number in words with probability `words`, else in digits."""
    if number.isdigit() and rng.random() < words:
        return in_words(int(number), rng.choice([" ", " and ", "-"]))
    return number


def word_problem(operator: str, first: str, second: str, rng: random.Random) -> str:
    pattern = rng.choice(SUM_TEXTS[f"problem.{operator}"][0])
    thing = rng.choice(COUNTABLES)
    return expand(pattern, rng, a=first, b=second, i=thing, n=some_name(rng), m=some_name(rng))


def two_operands(rng: random.Random) -> tuple[str, str]:
    """A sum in digits or words, and the expression for the calculator."""
    operator = rng.choice("++--**/")
    first, second = map(str, operands(operator, rng))
    if rng.random() < 0.15:
        return word_problem(operator, first, second, rng), f"{first} {operator} {second}"
    if rng.random() < 0.07:
        first += "." + str(rng.randint(1, 99)).rstrip("0")
    if rng.random() < 0.07:
        second += "." + str(rng.randint(1, 9))
    pattern = rng.choice(SUM_TEXTS[f"two.{operator}"][0])
    worded = rng.choice([0, 0, 0, 1, 1, 0.5]) if re.search("[a-w]{3}", SLOT.sub("", pattern)) else 0.0
    core = expand(pattern, rng, a=shown_number(first, rng, worded), b=shown_number(second, rng, worded))
    frame = rng.choice(ORDER_FRAMES if core.startswith(SUM_ORDERS) else RESULT_FRAMES)
    mark = "?" if frame.startswith(("what", "how", "do you")) else ""
    return spoken(frame.replace("{e}", core), rng, mark, loose=False), f"{first} {operator} {second}"


def special_sum(rng: random.Random) -> tuple[str, str]:
    """A square, a root, a percentage, three operands and the like, and the expression for the calculator."""
    ask, expression = rng.choice(SPECIAL_SUMS)
    values = {name: str(some_number(rng)) for name in "abc"}
    values |= {"s": str(rng.randint(2, 12)), "p": str(rng.randint(1, 99))}
    core = expand(ask, rng, **values)
    frame = rng.choice(RESULT_FRAMES) if not core.startswith("add ") else "{e}"
    mark = "?" if frame.startswith(("what", "how")) else ""
    return spoken(frame.replace("{e}", core), rng, mark, loose=False), expand(expression, rng, **values)


def two_sums(rng: random.Random) -> tuple[str, list[str]]:
    """Two sums in one question, for two calls in one turn."""
    texts, expressions = [], []
    for _ in range(2):
        operator = rng.choice("+-*/")
        first, second = operands(operator, rng)
        word = rng.choice(word_list(SUM_TEXTS, f"sign.{operator}"))
        texts.append(f"{first} {word} {second}")
        expressions.append(f"{first} {operator} {second}")
    return expand(SUM_TEXTS["two_sums"][0][0], rng, a=texts[0], b=texts[1]), expressions


def result_of(expression: str) -> str:
    """What a calculator answers; "division by zero" stands for every error."""
    try:
        value = eval(expression, {"__builtins__": {}, "sqrt": math.sqrt})  # our own expressions only
    except (ZeroDivisionError, OverflowError):
        return "division by zero"
    if isinstance(value, int) and value > 10**18:
        return f"{float(value):g}"
    return str(value)


def calculator_result(expression: str, result: str, rng: random.Random) -> Any:
    """Writes a result as one of the servers or clients that run a calculator might."""
    if result == "division by zero":
        return rng.choice([{"error": result}, result, {"success": False, "error": result}])
    number = json.loads(result) if re.fullmatch(r"-?\d+(\.\d+)?", result) else result
    plain: list[Any] = [result, result, {"result": number}, {"value": number}]
    success = {"success": True, "result": number, "error": None}
    return rng.choice([*plain, success, {"expression": expression, "result": number}])


# ── Values and results ───────────────────────────────────────────────────────────────────────────────────────────────


def some_words(low: int, high: int) -> Callable[[random.Random], str]:
    return lambda rng: " ".join(rng.sample(WORDS, rng.randint(low, high)))


def some_word(rng: random.Random) -> str:
    return rng.choice([rng.choice(WORDS), invented_word(rng)])


def some_title(rng: random.Random) -> str:
    return sentence(some_words(1, 3)(rng))


def some_product(rng: random.Random) -> str:
    return rng.choice([rng.choice(WORDS), invented_word(rng).upper(), sentence(invented_word(rng))])


def some_room(rng: random.Random) -> str:
    return rng.choice(word_list(LISTS, "rooms"))


def some_path(rng: random.Random) -> str:
    folder = rng.choice(["", "docs/", "/tmp/", "data/", "notes/", invented_word(rng) + "/"])
    return folder + some_word(rng) + rng.choice([".txt", ".md", ".json", ".csv", ".log", ".py"])


def some_url(rng: random.Random) -> str:
    scheme = rng.choice(["http://", "https://"])
    host = rng.choice(["example.com", invented_word(rng) + ".org", "www." + invented_word(rng) + ".com"])
    return scheme + host + rng.choice(["", "/", "/" + rng.choice(WORDS), "/" + rng.choice(WORDS) + ".html"])


def weather_result(rng: random.Random, place: str) -> Any:
    sky, degrees = rng.choice(word_list(LISTS, "skies")), rng.randint(-15, 40)
    forms: list[Any] = [
        f"{sentence(sky)}, {degrees} °C",
        f"{sky}, {degrees} degrees",
        {"condition": sky, "temperature": degrees},
        {"temperature": degrees, "sky": sky},
        {"city": place, "weather": sky, "temp": degrees},
        f"{degrees}C and {sky}",
        {"weather": sky},
        sky,
        f"{degrees} °C",
    ]
    return rng.choice(forms)


def words_result(rng: random.Random, _value: str) -> Any:
    text = small_phrase(rng)
    return rng.choice([text, sentence(text) + ".", {"result": text}, {"text": text}, {"answer": text, "ok": True}])


def number_result(rng: random.Random, _value: str) -> Any:
    number = rng.choice([rng.randint(0, 9999), round(rng.uniform(0, 999), 2)])
    return rng.choice([str(number), {"value": number}, {"result": number}, {"price": number, "currency": "EUR"}])


def time_result(rng: random.Random, _value: str) -> Any:
    clock = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    return rng.choice([clock, {"time": clock}, f"It is {clock}."])


def player_result(rng: random.Random, value: str) -> Any:
    return rng.choice(["playing", "ok", {"status": "playing"}, f"Now playing {value}"])


def note_result(rng: random.Random, _value: str) -> Any:
    return rng.choice(["saved", "ok", {"status": "saved"}, {"id": rng.randint(1, 999)}, "done"])


def person_result(rng: random.Random, value: str) -> Any:
    number = {"name": value, "phone": str(rng.randint(10000, 999999))}
    return rng.choice([str(rng.randint(10000, 9999999)), number, {"email": value.lower() + "@example.com"}])


def light_result(rng: random.Random, _value: str) -> Any:
    return rng.choice(["on", "ok", {"state": "on"}, "done", "light is on"])


# ── Kinds of tools ───────────────────────────────────────────────────────────────────────────────────────────────────

TOOL_TEXTS = read_grammars("tools")
TOOL_QUESTIONS = set(word_list(MANNER, "tool_questions"))
MISSING = {name: TOOL_TEXTS[f"{name}.missing"][1][0] for name in ("calculator", "weather", "time")}


@dataclass(frozen=True)
class ToolKind:
    """A kind of tool with one string argument: how it may be called, asked for, and what it returns."""

    names: list[str]
    says: list[str]
    parameters: list[str]
    asks: list[str]
    answers: list[str]
    value: Callable[[random.Random], str]
    result: Callable[[random.Random, str], Any]


def tool_kind(name: str, value: Callable[[random.Random], str], result: Callable[[random.Random, str], Any]) -> ToolKind:
    """The kind of tool whose texts stand under `name`."""
    names, parameters = word_list(TOOL_TEXTS, f"{name}.names"), word_list(TOOL_TEXTS, f"{name}.parameters")
    return ToolKind(names, TOOL_TEXTS[f"{name}.says"][0], parameters, *TOOL_TEXTS[name], value, result)


TOOL_KINDS = {
    "weather": tool_kind("weather", some_city, weather_result),
    "time": tool_kind("time", some_city, time_result),
    "search": tool_kind("search", some_words(1, 3), words_result),
    "define": tool_kind("define", some_word, words_result),
    "price": tool_kind("price", some_product, number_result),
    "play": tool_kind("play", some_title, player_result),
    "file": tool_kind("file", some_path, words_result),
    "fetch": tool_kind("fetch", some_url, words_result),
    "mail": tool_kind("mail", some_words(2, 4), note_result),
    "person": tool_kind("person", some_name, person_result),
    "room": tool_kind("room", some_room, light_result),
}


# ── Offers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Offer:
    """A tool in a conversation: its kind, its schema, and its argument's name."""

    kind: str
    tool: Message
    parameter: str

    @property
    def name(self) -> str:
        return str(self.tool["function"]["name"])


def schema(name: str, description: str, parameter: str, about: str, rng: random.Random) -> Message:
    """A tool as OpenAI clients send it, now and then with less or more than they have to."""
    described = {"description": about} if about and rng.random() < 0.7 else {}
    body: Message = {"type": "object", "properties": {parameter: {"type": "string", **described}}}
    if rng.random() < 0.85:
        body["required"] = [parameter]
    if rng.random() < 0.08:
        body["additionalProperties"] = False
    head = {"name": name, "description": description} if rng.random() < 0.93 else {"name": name}
    return {"type": "function", "function": {**head, "parameters": body}}


def other_name(name: str, rng: random.Random) -> str:
    """Varies a tool's name so widely that a model can only copy it from the system text."""
    word, odd = rng.choice(WORDS), invented_word(rng)
    extra = rng.choice([word, word, odd, rng.choice(["my", "tool", "api", "do", "v2", "now", "city", "by", "info"])])
    joined = rng.choice([f"{extra}_{name}", f"{name}_{extra}", f"{name}_{extra}", f"{word}_{odd}", odd + word, f"{odd}_{name}"])
    return rng.choice([joined, joined, joined.replace("_", "-"), joined.title().replace("_", "")])


def calculator_offer(rng: random.Random) -> Offer:
    name, parameter = "calculator", "expression"
    if rng.random() < 0.12:
        name, parameter = other_name(name, rng), rng.choice(word_list(SUM_TEXTS, "calculator.parameters"))
    about = rng.choice(SUM_TEXTS["calculator.about"][0])
    says = rng.choice(SUM_TEXTS["calculator.says"][0])
    return Offer("calculator", schema(name, says, parameter, about, rng), parameter)


def some_offer(kind: str, rng: random.Random) -> Offer:
    """Offers a tool of this kind, under one of its names or another, with one of its parameters or another."""
    if kind == "calculator":
        return calculator_offer(rng)
    tool = TOOL_KINDS[kind]
    name, parameter = rng.choice(tool.names), rng.choice(tool.parameters)
    if rng.random() < 0.55:
        name = other_name(name, rng)
    if rng.random() < 0.3:
        parameter = rng.choice([rng.choice(WORDS), invented_word(rng), "input", "value", "arg", "x", "item", "target"])
    about = rng.choice([f"The {parameter}", f"Name of the {parameter}", tool.says[0], ""])
    return Offer(kind, schema(name, rng.choice(tool.says), parameter, about, rng), parameter)


def offers(rng: random.Random, wanted: str = "") -> list[Offer]:
    """One to four tools of different kinds, `wanted` among them."""
    kinds = [kind for kind in ["calculator", *TOOL_KINDS] if kind != wanted]
    weights = [4 if kind == "calculator" else 3 if kind == "weather" else 1 for kind in kinds]
    chosen = [wanted] if wanted else []
    for kind in rng.choices(kinds, weights, k=rng.choices([0, 1, 2, 3], [6 if wanted else 0, 6, 3, 1])[0]):
        if kind not in chosen:
            chosen.append(kind)
    rng.shuffle(chosen)
    return [some_offer(kind, rng) for kind in chosen]


# ── Turns ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def as_content(result: Any) -> str:
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)


def readable(result: Any, asked: str) -> str:
    """Puts a tool's result in words: the text itself, or an object's values except the one that was asked for."""
    if not isinstance(result, dict):
        return str(result).rstrip(".!")
    shown = {key: value for key, value in result.items() if value != asked and not isinstance(value, bool)}
    return ", ".join(f"{value} degrees" if key.startswith("temp") else str(value) for key, value in shown.items())


def calls_and_results(name: str, calls: list[dict[str, str]], results: list[Any]) -> list[Message]:
    """The assistant's calls of the tool `name`, one for each set of arguments, and what came back."""
    made = [
        {"id": f"call_{at}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for at, arguments in enumerate(calls)
    ]
    returned = [
        {"role": "tool", "content": as_content(result), "tool_call_id": f"call_{at}"} for at, result in enumerate(results)
    ]
    return [{"role": "assistant", "content": "", "tool_calls": made}, *returned]


def said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def calculator_turns(offer: Offer, rng: random.Random) -> list[Message]:
    """Question, call, result, answer; now and then two sums at once."""
    if rng.random() < 0.06:
        question, expressions = two_sums(rng)
    else:
        question, expression = two_operands(rng) if rng.random() < 0.82 else special_sum(rng)
        expressions = [expression]
    results = [result_of(expression) for expression in expressions]
    pairs = list(zip(expressions, results, strict=True))
    returned = [calculator_result(expression, result, rng) for expression, result in pairs]
    if len(pairs) > 1:
        answer = " ".join(f"{expression} = {result}." for expression, result in pairs)
    else:
        answers = SUM_TEXTS["answers"][1]
        frames = SUM_TEXTS["failure"][1] if results == ["division by zero"] else answers[:1] * 3 + answers
        answer = expand(rng.choice(frames), rng, e=expressions[0], r=results[0])
    calls = [{"expression": expression} for expression in expressions]
    return [said("user", question), *calls_and_results(offer.name, calls, returned), said("assistant", answer)]


def tool_failure(offer: Offer, rng: random.Random) -> tuple[Any, str]:
    """An error that a tool may return, and the answer to it."""
    error = rng.choice([*word_list(TOOL_TEXTS, "errors"), "unknown " + offer.parameter])
    returned = rng.choice([{"error": error}, {"success": False, "error": error}, "error: " + error])
    return returned, TOOL_TEXTS["failure"][1][0].format(error=error)


def tool_turns(offer: Offer, rng: random.Random) -> list[Message]:
    """Request, call, result or error, answer."""
    kind = TOOL_KINDS[offer.kind]
    value = kind.value(rng)
    core = expand(rng.choice(kind.asks), rng, v=value)
    request = spoken(core, rng, "?" if core.split()[0] in TOOL_QUESTIONS else "", loose=False)
    if rng.random() < 0.05:
        result, answer = tool_failure(offer, rng)
    else:
        result = kind.result(rng, value)
        answer = expand(rng.choice(kind.answers), rng, v=value, r=readable(result, value))
    calls = calls_and_results(offer.name, [{offer.parameter: value}], [result])
    return [said("user", request), *calls, said("assistant", answer)]


def missing_tool(rng: random.Random, kinds: set[str]) -> tuple[str, str] | None:
    """A request that needs a tool, and the admission that it is missing; None if the tool is among `kinds`."""
    kind = rng.choice(list(MISSING))
    if kind in kinds:
        return None
    if kind == "calculator":
        return two_operands(rng)[0], MISSING[kind]
    core = expand(rng.choice(TOOL_KINDS[kind].asks), rng, v=TOOL_KINDS[kind].value(rng))
    return spoken(core, rng, loose=False), MISSING[kind]
