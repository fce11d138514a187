"""How models write thoughts and calls: derived formats, the parser, forced calls, conversations that templates refuse."""

from __future__ import annotations

import glob

import shimmy as module
from test_shimmy import *  # noqa: F403

TYPES = {
    "text": {"type": "string"}, "count": {"type": "integer"}, "share": {"type": "number"}, "yes": {"type": "boolean"},
    "gone": {"type": "null"}, "list": {"type": "array", "items": {}}, "inner": {"type": "object"},
}  # fmt: skip
NAMES = ("get_weather", "add_to_list")
OFFERED = [
    {"type": "function", "function": {"name": name, "description": f"The function {name}", "parameters": {
        "type": "object", "properties": {k: v | {"description": k} for k, v in TYPES.items()}, "required": ["text"]}}}
    for name in NAMES
]  # fmt: skip
CALLS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "one": [("get_weather", {"text": "Paris"})],
    "two": [("get_weather", {"text": "Paris", "count": 1}), ("add_to_list", {"text": "milk and honey", "yes": True})],
    "types": [("get_weather", {"text": "some words", "count": -3, "share": 0.25, "yes": False, "gone": None, "list": [1, "a"], "inner": {}})],
    "nested": [("get_weather", {"text": "some words", "inner": {"deep": {"list": [{"a": [1, 2]}, {"b": {}}]}, "word": "w"}})],
    "quotes": [("get_weather", {"text": 'say "hi", it\'s \\ fine'})],
    "lines": [("get_weather", {"text": "one\ntwo\n\n  three"})],
    "marker": [("get_weather", {"text": "a </tool_call> b"})],
    "unicode": [("get_weather", {"text": "naïve 😀 日本"})],
}


def templates() -> list[Path]:
    """llama.cpp's templates: in the folder SHIMMY_TEMPLATES names, else none."""
    return sorted(map(Path, glob.glob(os.path.join(os.environ.get("SHIMMY_TEMPLATES", "/nowhere"), "*.jinja"))))


def turn(source: str, ids: tuple[str, ...] = ("abcdefgh1", "abcdefgh2"), **said: Any) -> tuple[str, str]:
    """What the template writes as the assistant's turn: what the prompt has of it already, and the rest."""
    user = {"role": "user", "content": "A question"}
    calls = [{"id": id, "type": "function", "function": {"name": n, "arguments": a}}
             for id, (n, a) in zip(ids, said.pop("calls", ()), strict=False)]  # fmt: skip
    said = {"content": ""} | said | ({"tool_calls": calls} if calls else {})

    def render(messages: list[Any], generation: bool) -> str:
        rendering = module.Rendering({"": source}, "<bos>", "<eos>", messages, OFFERED, {}, generation)
        return rendering.run()

    prompt, whole = (text[text.rindex("A question") :] for text in (
        render([user], True), render([user, {"role": "assistant", **said}], False)))  # fmt: skip
    at = len(os.path.commonprefix([prompt, whole]))
    for opens, closes in ("<>", "[]"):  # not in the middle of a marker
        if (start := prompt.rfind(opens, 0, at)) > prompt.rfind(closes, 0, at):
            at = start
    return (prompt if whole[at:].lstrip().startswith("</") else whole[:at]), whole[at:]


def read(format: Any, prompt: str, text: str, size: int) -> tuple[str, str, list[tuple[str, Any]], list[Any]]:
    """The content, thought and calls that the parser finds in a text fed in pieces."""
    parser = module.ChatParser(0, format, {t["function"]["name"]: t["function"]["parameters"] for t in OFFERED}, prompt, frozenset())
    events = [e for i in range(0, len(text), size) for e in parser.push(text[i : i + size])] + list(parser.finish("stop"))
    reply = module.Reply()
    for event in events:
        reply.add(event)
    choice = reply.choices()[0][1]
    calls = [(c["name"], json.loads(c["arguments"] or "null")) for c in choice.calls]
    return choice.text, "".join(choice.thoughts), calls, events


def derived(source: str) -> Any:
    return module.Derivation({"": source}, "<bos>", "<eos>", ()).run()
