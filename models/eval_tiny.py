#!/usr/bin/env python3
"""Measures shimmy-tiny.gguf through the real server, on sentences and numbers that its training never saw.

    python models/eval_tiny.py                       start shimmy, ask, print the table, write it into models/README.md
    python models/eval_tiny.py --limit 20 --keep     a quick look; README.md stays as it is

The sentences are those of models/text/eval_*.txt, the operands those for which `held_out` is true; `generator` keeps
both out of training. Each request goes over POST /v1/chat/completions at temperature 0. Exit status 1: a threshold was
missed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from generator import unseen
from generator.language import Message, in_words, word_list
from generator.unseen import FACT_TEXTS, TASK_TEXTS

HERE = Path(__file__).resolve().parent

# ── Judges ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Reply:
    """What came back: the message, why it ended, and its number of tokens."""

    message: Message
    finish_reason: str
    tokens: int

    @property
    def text(self) -> str:
        return self.message.get("content") or ""

    @property
    def calls(self) -> list[Message]:
        return self.message.get("tool_calls") or []


Judge = Callable[[Reply], bool]


@dataclass(frozen=True)
class Case:
    """A request and what a right reply is; it counts in `category`, and in those that `also` names."""

    category: str
    messages: list[Message]
    judge: Judge
    tools: list[Message] = field(default_factory=list)
    also: dict[str, Judge] = field(default_factory=dict)


def says(pattern: str) -> Judge:
    """The answer is text, and holds the pattern."""
    return lambda reply: not reply.calls and re.search(pattern, reply.text, re.IGNORECASE) is not None


def calls_sum(first: int, operator: str, second: int) -> Judge:
    """The calculator, with this sum; the order of two summands or two factors is free."""
    orders = [(first, second)] + ([(second, first)] if operator in "+*" else [])
    judges = [calls("calculator", {"expression": f"{a} {operator} {b}"}) for a, b in orders]
    return lambda reply: any(judge(reply) for judge in judges)


def says_all(*patterns: str) -> Judge:
    return lambda reply: all(says(pattern)(reply) for pattern in patterns)


def says_exactly(wanted: str) -> Judge:
    return lambda reply: reply.text.strip(" .!\"'").lower() == wanted.strip(" .!\"'").lower()


def calls(name: str, arguments: Message) -> Judge:
    """One call, of that tool, with exactly those arguments (spaces aside)."""

    def judge(reply: Reply) -> bool:
        if len(reply.calls) != 1 or reply.calls[0]["function"]["name"] != name:
            return False
        given = parsed(reply.calls[0]["function"]["arguments"])
        return isinstance(given, dict) and squeezed(given) == squeezed(arguments)

    return judge


def is_object(reply: Reply) -> bool:
    return isinstance(parsed(reply.text), dict)


def is_json(wanted: Message) -> Judge:
    return lambda reply: parsed(reply.text) == wanted


def squeezed(arguments: Message) -> dict[str, str]:
    return {key: str(value).replace(" ", "") for key, value in arguments.items()}


def parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def well_formed(reply: Reply, tools: list[Message]) -> bool:
    """Every call names an offered tool, with a JSON object of exactly its parameters; no call is left over as text."""
    parameters = {tool["function"]["name"]: set(tool["function"]["parameters"]["properties"]) for tool in tools}
    for call in reply.calls:
        arguments = parsed(call["function"]["arguments"])
        if not isinstance(arguments, dict) or set(arguments) != parameters.get(call["function"]["name"]):
            return False
    return "tool_call" not in reply.text


def no_call(reply: Reply) -> bool:
    return not reply.calls and "tool_call" not in reply.text


def is_upper(reply: Reply) -> bool:
    return reply.text == reply.text.upper()


def is_one_word(reply: Reply) -> bool:
    return len(reply.text.split()) == 1


def is_story_length(reply: Reply) -> bool:
    return 80 <= reply.tokens <= 300


# ── Tools on offer ───────────────────────────────────────────────────────────────────────────────────────────────────


def tool(name: str, description: str, parameter: str, about: str | None = None) -> Message:
    described = {} if about is None else {"description": about}
    properties = {parameter: {"type": "string", **described}}
    parameters = {"type": "object", "properties": properties, "required": [parameter]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def name_of(offered: Message) -> str:
    return str(offered["function"]["name"])


def parameter_of(offered: Message) -> str:
    return str(next(iter(offered["function"]["parameters"]["properties"])))


CALCULATOR = tool("calculator", "Evaluate an arithmetic expression.", "expression")
CALCULATORS = [
    CALCULATOR,
    tool("calculator", "Computes arithmetic for the user", "expression", "The arithmetic to compute"),
]
WEATHER_TOOLS = [
    tool("get_weather", "Get the current weather", "city", "The city"),
    tool("weather_for", "Weather of a city", "town", "Name of the town"),
    tool("lookup_city_weather", "Looks up the current weather in a city", "location", "The location"),
    tool("get_weather_now", "Returns the current weather", "place", ""),
]


# ── Cases ────────────────────────────────────────────────────────────────────────────────────────────────────────────

WEATHER = TASK_TEXTS["weather"][0]
CAPITAL_ASKS = FACT_TEXTS["capital_asks"][0]
COMPUTED = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def talk_cases() -> Iterable[Case]:
    for texts, (pattern,) in unseen.TALK.values():
        for text in texts:
            yield Case("greetings and identity", user(text), says(pattern))


def topic_cases() -> Iterable[Case]:
    for texts, (pattern,) in unseen.TOPICS.values():
        for text in texts:
            yield Case("shimmy questions", user(text), says(pattern))


def fact_questions(rng: random.Random) -> Iterable[tuple[str, Judge]]:
    """Every small fact once, with what a right answer is."""
    for text, pattern in unseen.FACTS:
        yield text, says(pattern)
    for country, city in unseen.CAPITALS.items():
        yield rng.choice(CAPITAL_ASKS).format(country), says(city)
    for word, other in unseen.OPPOSITES.items():
        yield rng.choice(FACT_TEXTS["opposite_asks"][0]).format(word), says(rf"\b({other})\b")
    for word in unseen.SPELLINGS:
        letters = r",? ?-?".join(word.upper())
        yield rng.choice(FACT_TEXTS["spelling_asks"][0]).format(word), says(rf"\b{letters}\b")
    for end in rng.sample(range(2, 31), 14):
        numbers = ", ".join(map(str, range(1, end + 1)))
        yield rng.choice(FACT_TEXTS["count_asks"][0]).format(end), says_exactly(numbers)
    for text in unseen.REPEATS:
        yield rng.choice(FACT_TEXTS["repeat_asks"][0]).format(text), says_exactly(text)


def fact_cases(rng: random.Random) -> Iterable[Case]:
    for text, judge in fact_questions(rng):
        yield Case("small facts", user(text), judge)


def held_out_operands(rng: random.Random, operator: str, digits: int) -> tuple[int, int]:
    while True:
        sizes = rng.randint(1, digits), rng.randint(1, digits)
        first, second = (rng.randint(0 if size == 1 else 10 ** (size - 1), 10**size - 1) for size in sizes)
        if unseen.held_out(first, operator, second):
            return first, second


def called(category: str, text: str, judge: Judge, tools: list[Message]) -> Case:
    """A request that needs a call; it counts among well-formed calls too."""
    return Case(category, user(text), judge, tools, {"valid call syntax": lambda reply: well_formed(reply, tools)})


def digit_cases(rng: random.Random, count: int) -> Iterable[Case]:
    for at in range(count):
        operator = "+-*/"[at % 4]
        first, second = held_out_operands(rng, operator, 4)
        tools = [rng.choice(CALCULATORS)] + ([rng.choice(WEATHER_TOOLS)] if at % 2 else [])
        text = rng.choice(TASK_TEXTS[f"sum.{operator}"][0]).format(a=first, b=second)
        yield called("calculator call exact (digits)", text, calls_sum(first, operator, second), tools)


def word_cases(rng: random.Random, count: int) -> Iterable[Case]:
    for at in range(count):
        operator = "+-*/"[at % 4]
        first, second = held_out_operands(rng, operator, 3)
        worded = [text for text in TASK_TEXTS[f"sum.{operator}"][0] if not re.search(r"\} [-+*/x] \{", text)]
        text = rng.choice(worded).format(a=in_words(first), b=in_words(second))
        judge = calls_sum(first, operator, second)
        yield called("calculator call exact (words)", text, judge, [rng.choice(CALCULATORS)])


def weather_cases(rng: random.Random, count: int) -> Iterable[Case]:
    for at in range(count):
        weather, city = WEATHER_TOOLS[at % len(WEATHER_TOOLS)], rng.choice(unseen.CITIES)
        judge = calls(name_of(weather), {parameter_of(weather): city})
        tools = [weather, CALCULATOR] if at % 2 else [weather]
        yield called("weather call exact", WEATHER[at % len(WEATHER)].format(city), judge, tools)


def quiet_cases(rng: random.Random, count: int) -> Iterable[Case]:
    """Requests that need no tool, with tools on offer."""
    for text in rng.sample(unseen.FIXED, count):
        tools = [rng.choice(CALCULATORS)] + ([rng.choice(WEATHER_TOOLS)] if rng.random() < 0.5 else [])
        yield Case("no call when none fits", user(text), no_call, tools)


def result_cases(rng: random.Random, count: int) -> Iterable[Case]:
    """The call was made and its result is given back: the answer must hold it."""
    for at in range(count):
        yield sum_result_case(rng, at) if at % 3 < 2 else weather_result_case(rng)


def sum_result_case(rng: random.Random, at: int) -> Case:
    operator = "+-*"[at % 3 if at % 2 else 2]
    first, second = held_out_operands(rng, operator, 4)
    result = COMPUTED[operator](first, second)
    content = str(result) if at % 2 else json.dumps({"result": result})
    request = user(rng.choice(TASK_TEXTS[f"sum.{operator}"][0]).format(a=first, b=second))
    call = call_and_result("calculator", {"expression": f"{first} {operator} {second}"}, content)
    return Case("tool result used", request + call, says(rf"(?<!\d){re.escape(str(result))}(?!\d)"), [CALCULATOR])


def weather_result_case(rng: random.Random) -> Case:
    weather, city, degrees = rng.choice(WEATHER_TOOLS), rng.choice(unseen.CITIES), rng.randint(-9, 38)
    sky = rng.choice(["sunny", "cloudy", "rainy", "foggy", "clear"])
    content = rng.choice([f"{sky}, {degrees} °C", json.dumps({"condition": sky, "temperature": degrees})])
    request = user(rng.choice(WEATHER).format(city))
    call = call_and_result(name_of(weather), {parameter_of(weather): city}, content)
    return Case("tool result used", request + call, says_all(sky, str(degrees)), [weather])


def call_and_result(name: str, arguments: Message, content: str) -> list[Message]:
    call = {"id": "call_0", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
    return [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0", "content": content},
    ]


def json_cases(rng: random.Random, count: int) -> Iterable[Case]:
    names = word_list(TASK_TEXTS, "names")
    for at in range(count):
        wanted: Message = {"name": names[at % len(names)]}
        if at % 3 < 2:
            wanted["age"] = rng.randint(2, 98)
            text = rng.choice(TASK_TEXTS["json_age"][0]).format(n=wanted["name"], a=wanted["age"])
        else:
            wanted["city"] = rng.choice(unseen.CITIES)
            text = rng.choice(TASK_TEXTS["json_city"][0]).format(n=wanted["name"], c=wanted["city"])
        yield Case("valid JSON", user(text), is_object, also={"JSON holds the right values": is_json(wanted)})


def style_cases(rng: random.Random, count: int) -> Iterable[Case]:
    """A system prompt that asks for upper case, or for one word; and the answer must be right as well."""
    short = [(pattern, text) for text, pattern in unseen.FACTS if "*" not in pattern]  # a list of days is not one word
    for at in range(count):
        style, category, judge = (
            ("one_word", "system prompt: one word", is_one_word) if at % 2 else ("upper", "system prompt: upper case", is_upper)
        )
        system = {"role": "system", "content": rng.choice(TASK_TEXTS[style][0])}
        country, city = rng.choice(list(unseen.CAPITALS.items()))
        pattern, text = rng.choice([(city, rng.choice(CAPITAL_ASKS).format(country)), rng.choice(short)])
        yield Case(category, [system, *user(text)], judge, also={"…and the answer is right": says(pattern)})


def story_cases() -> Iterable[Case]:
    for text, subject in unseen.STORIES:
        also = {"stories: about their subject": says(rf"\b{subject}")}
        yield Case("stories: 80 to 300 tokens", user(text), is_story_length, also=also)


def all_cases() -> list[Case]:
    rng = random.Random(3)
    makers = [
        talk_cases(),
        topic_cases(),
        digit_cases(rng, 160),
        word_cases(rng, 80),
        weather_cases(rng, 100),
        quiet_cases(rng, 150),
        result_cases(rng, 120),
        fact_cases(rng),
        json_cases(rng, 108),
        style_cases(rng, 100),
        story_cases(),
    ]
    return [case for cases in makers for case in cases]


# The lines of the table: the share in percent that is wanted; None means that it is measured only.
THRESHOLDS: dict[str, float | None] = {
    "greetings and identity": 95,
    "shimmy questions": 85,
    "calculator call exact (digits)": 90,
    "calculator call exact (words)": None,
    "weather call exact": None,
    "valid call syntax": 99,
    "no call when none fits": 95,
    "tool result used": 95,
    "small facts": 85,
    "valid JSON": 90,
    "JSON holds the right values": None,
    "system prompt: upper case": None,
    "system prompt: one word": None,
    "…and the answer is right": None,
    "stories: 80 to 300 tokens": None,
    "stories: about their subject": None,
    "ends its turn by itself": 99,
}
MAX_TOKENS = 400


# ── Server ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Server:
    """shimmy as a child process, on a port that it picks itself."""

    def __init__(self, model: Path) -> None:
        command = [sys.executable, str(HERE.parent / "shimmy.py"), "serve", "--port", "0", "--model", str(model)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.url = ""
        for line in self.process.stdout:
            found = re.search(r"http://[\w.\[\]:-]+", line)
            if found:
                self.url = found.group()
                return
        sys.exit(f"shimmy did not start (exit status {self.process.wait()})")

    def ask(self, case: Case) -> Reply:
        body: Message = {"model": "default", "messages": case.messages, "temperature": 0, "max_tokens": MAX_TOKENS}
        if case.tools:
            body["tools"] = case.tools
        request = urllib.request.Request(
            self.url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            sys.exit(f"the server refused a request: {error.read().decode()}")
        choice = answer["choices"][0]
        return Reply(choice["message"], choice["finish_reason"], answer["usage"]["completion_tokens"])

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


# ── Table ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def verdicts(case: Case, reply: Reply) -> dict[str, bool]:
    """Category → right or not, for every category in which this case counts."""
    told = {case.category: case.judge(reply), "ends its turn by itself": reply.finish_reason in ("stop", "tool_calls")}
    for name, judge in case.also.items():
        if name != "valid call syntax" or reply.calls or "tool_call" in reply.text:  # syntax counts when it calls
            told[name] = judge(reply)
    return told


def measure(server: Server, cases: list[Case], show: bool) -> dict[str, list[bool]]:
    results: dict[str, list[bool]] = {name: [] for name in THRESHOLDS}
    live = sys.stderr.isatty()
    with ThreadPoolExecutor(4) as pool:
        for at, (case, reply) in enumerate(zip(cases, pool.map(server.ask, cases), strict=True), 1):
            told = verdicts(case, reply)
            for name, right in told.items():
                results[name].append(right)
            if show and not all(told.values()):
                wrong = ", ".join(name for name, right in told.items() if not right)
                print(f"[{wrong}] {case.messages[-1]['content']!r} -> {reply.text or reply.calls!r}")
            if live:
                print(f"\r{at}/{len(cases)} ", end="", file=sys.stderr)
    return results


def table(results: dict[str, list[bool]]) -> tuple[str, bool]:
    """The table in Markdown, and whether every threshold is met."""
    lines, met = ["| what | cases | right | wanted |", "|---|---:|---:|---:|"], True
    for name, threshold in THRESHOLDS.items():
        told = results[name]
        share = 100 * sum(told) / len(told) if told else 0.0
        enough = threshold is None or share >= threshold
        met = met and enough
        wanted = "" if threshold is None else f"≥ {threshold:g} %" + ("" if enough else " (missed)")
        lines.append(f"| {name} | {len(told)} | {share:.1f} % | {wanted} |")
    return "\n".join(lines), met


def write_table(text: str) -> None:
    readme = HERE / "README.md"
    if readme.exists():
        page = readme.read_text(encoding="utf-8")
        page = re.sub(
            r"(<!-- measured -->\n).*?(<!-- /measured -->)",
            lambda match: match.group(1) + text + "\n" + match.group(2),
            page,
            flags=re.DOTALL,
        )
        readme.write_text(page, encoding="utf-8")


def first_of_each(cases: list[Case], count: int) -> list[Case]:
    """The first `count` cases of each category."""
    seen: Counter[str] = Counter()
    kept = []
    for case in cases:
        seen[case.category] += 1
        if seen[case.category] <= count:
            kept.append(case)
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure shimmy-tiny.gguf through the real server.")
    parser.add_argument("--model", type=Path, default=HERE / "shimmy-tiny.gguf")
    parser.add_argument("--limit", type=int, help="ask only this many cases of each kind")
    parser.add_argument("--keep", action="store_true", help="leave README.md as it is")
    parser.add_argument("--show", action="store_true", help="print every case that failed")
    options = parser.parse_args()
    cases = all_cases()
    if options.limit:
        cases = first_of_each(cases, options.limit)
    server, began = Server(options.model), time.monotonic()
    try:
        text, met = table(measure(server, cases, options.show))
    finally:
        server.stop()
    print(f"{text}\n\n{len(cases)} requests in {time.monotonic() - began:.0f} s")
    if not options.keep and not options.limit:
        write_table(text)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
