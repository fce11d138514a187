"""Whole conversations, and the chat template through which they are rendered."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field

from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .facts import fact, fact_turn, shimmy_question, small_talk, some_talk, unknown
from .language import Message, expand, read_grammars, read_text, sentence, spoken
from .tasks import json_task, story
from .tools import TOOL_KINDS, calculator_turns, missing_tool, offers, said, tool_turns
from .unseen import FORBIDDEN, normalized

# The Hermes/Qwen form, with a short preamble: a model of this size pays for every token of it.
CHAT_TEMPLATE = read_text("chat_template.jinja")
SYSTEMS = read_grammars("systems")


def template_environment() -> ImmutableSandboxedEnvironment:
    """The settings with which Hugging Face's renderer, llama-cpp-python and shimmy render a template."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    return environment


TEMPLATE = template_environment().from_string(CHAT_TEMPLATE)


@dataclass
class Chat:
    """One conversation: OpenAI messages, and the tools offered in it."""

    messages: list[Message] = field(default_factory=list)
    tools: list[Message] = field(default_factory=list)

    def add_turn(self, ask: str, answer: str) -> None:
        self.messages += [said("user", ask), said("assistant", answer)]

    def render(self, add_generation_prompt: bool = False) -> str:
        extra = {"tools": self.tools} if self.tools else {}
        return TEMPLATE.render(messages=self.messages, add_generation_prompt=add_generation_prompt, **extra)


def plain_turn(rng: random.Random) -> tuple[str, str]:
    """One request of any kind that needs no tool."""
    makers = [small_talk, shimmy_question, fact_turn, story, json_task, unknown]
    return rng.choices(makers, [70, 26, 60, 3, 8, 3])[0](rng)


def plain_chat(rng: random.Random, turns: int) -> Chat:
    chat = Chat()
    if rng.random() < 0.22:
        chat.messages.append(said("system", rng.choice(SYSTEMS["plain"][0])))
    for _ in range(turns):
        missing = missing_tool(rng, set()) if rng.random() < 0.04 else None
        chat.add_turn(*(missing or plain_turn(rng)))
    return chat


def one_word(rng: random.Random) -> tuple[str, str]:
    """A request and its answer in one word."""
    if rng.random() < 0.15:
        kind = rng.choice(["greeting", "thanks", "bye", "who", "how_are_you"])
        return spoken(some_talk(kind, rng), rng), SYSTEMS[f"word.{kind}"][1][0]
    while True:
        ask, _, short = fact(rng)
        if " " not in short:
            return ask, short


def in_upper_case(rng: random.Random) -> tuple[str, str]:
    ask, answer = rng.choices([fact_turn, small_talk], [3, 2])[0](rng)
    return ask, answer.upper()


def with_thoughts(rng: random.Random) -> tuple[str, str]:
    ask, answer = rng.choices([fact_turn, shimmy_question], [2, 2])[0](rng)
    return ask, f"<think>\nThe user asks: {ask}\n</think>\n\n{answer}"


STYLES = {"upper": in_upper_case, "word": one_word, "think": with_thoughts}


def style_prompt(style: str, rng: random.Random) -> str:
    text = expand(rng.choice(SYSTEMS[style][0]), rng)
    return (sentence(text) if rng.random() < 0.8 else text) + rng.choice([".", ".", "", "!"])


def styled_chat(rng: random.Random, turns: int) -> Chat:
    """A system prompt that asks for upper case, for one word, or for thoughts first."""
    style = rng.choice(["upper", "upper", "word", "word", "think"])
    chat = Chat([said("system", style_prompt(style, rng))])
    for _ in range(turns):
        chat.add_turn(*STYLES[style](rng))
    return chat


def tool_chat(rng: random.Random, turns: int) -> Chat:
    """Tools are offered; some requests need one, some do not, and for some none fits."""
    kind = rng.choices(["calculator", *TOOL_KINDS], [10] + [4 if name == "weather" else 1 for name in TOOL_KINDS])[0]
    offered = offers(rng, kind) if rng.random() < 0.9 else offers(rng)
    kinds = {offer.kind for offer in offered}
    chat = Chat(tools=[offer.tool for offer in offered])
    if rng.random() < 0.3:
        chat.messages.append(said("system", rng.choice(SYSTEMS["plain"][0])))
    for _ in range(turns):
        if rng.random() < 0.66:
            offer = rng.choices(offered, [3 if offer.kind == "calculator" else 1 for offer in offered])[0]
            chat.messages += (calculator_turns if offer.kind == "calculator" else tool_turns)(offer, rng)
        else:
            missing = missing_tool(rng, kinds) if rng.random() < 0.12 else None
            chat.add_turn(*(missing or plain_turn(rng)))
    return chat


def conversation(rng: random.Random, long: bool = False) -> Chat:
    """Draws one conversation of any kind; a `long` one fills a window of 2,048 tokens."""
    maker = rng.choices([plain_chat, tool_chat, styled_chat], [58, 26, 16])[0]
    shares = [30, 30, 22, 18] if maker is tool_chat else [60, 22, 12, 6]  # tools take many tokens, so use them well
    turns = rng.randint(8, 30) if long else rng.choices([1, 2, 3, 4], shares)[0]
    while True:
        chat = maker(rng, turns)
        asked = (message["content"] for message in chat.messages if message["role"] == "user")
        if not any(normalized(text) in FORBIDDEN for text in asked):
            return chat
