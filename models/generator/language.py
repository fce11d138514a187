"""The notation of the text files, the word lists, and the way users type.

"[a|b|]" in a text is a choice, nested as deep as needed. "{name}" is filled in last, so that values are never expanded.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

TEXT = Path(__file__).resolve().parent.parent / "text"
CHOICE = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"\{(\w+)\}")

Message = dict[str, Any]
Grammars = dict[str, tuple[list[str], list[str]]]


# ── Notation ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def expand(pattern: str, rng: random.Random, **slots: str) -> str:
    """Draws one sentence from the grammar `pattern`."""
    while "[" in pattern:
        pattern = CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), pattern)
    pattern = re.sub(r" {2,}", " ", pattern).strip()
    return SLOT.sub(lambda match: slots.get(match.group(1), match.group(0)), pattern)


def grammars(text: str) -> Grammars:
    """Parses "@name", then lines "> what may be said" and "= an answer"; any other line continues the one before."""
    named: Grammars = {}
    for entry in re.split(r"\n(?=[@>=])", text.strip()):
        mark, rest = entry[0], entry[1:].strip().replace("\n", " ")
        if mark == "@":
            asks: list[str] = []
            answers: list[str] = []
            named[rest] = asks, answers
        else:
            (asks if mark == ">" else answers).append(rest)
    return named


def read_text(name: str) -> str:
    return (TEXT / name).read_text(encoding="utf-8")


def read_grammars(name: str) -> Grammars:
    return grammars(read_text(name + ".txt"))


def words_of(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def word_list(named: Grammars, name: str) -> list[str]:
    """The words of an entry that holds a list, as in "> red, green, blue"."""
    return words_of(named[name][0][0])


def pair_list(named: Grammars, name: str) -> list[tuple[str, str]]:
    """The pairs of an entry that holds some, as in "> hot=cold, big=small"."""
    return [(left, right) for left, _, right in (word.partition("=") for word in word_list(named, name))]


def sentence(text: str) -> str:
    """Puts the first letter in upper case."""
    return text[:1].upper() + text[1:]


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


# ── Words ────────────────────────────────────────────────────────────────────────────────────────────────────────────

LISTS = read_grammars("words")
NAMES_F, NAMES_M = word_list(LISTS, "names_f"), word_list(LISTS, "names_m")
CAPITALS = dict(pair_list(LISTS, "capitals"))
CITIES = sorted(set(CAPITALS.values())) + word_list(LISTS, "cities")
WORDS = word_list(LISTS, "words")
ADJECTIVES = word_list(LISTS, "adjectives")
ANIMALS, PEOPLE = word_list(LISTS, "animals"), word_list(LISTS, "people")
ONES, TENS = word_list(LISTS, "ones"), word_list(LISTS, "tens")


def invented_word(rng: random.Random) -> str:
    """Makes up a word: it can only be copied, not recalled."""
    return "".join(
        rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") + rng.choice(["", "", "n", "r", "s", "l"])
        for _ in range(rng.randint(1, 3))
    )


def some_name(rng: random.Random) -> str:
    return sentence(invented_word(rng)) if rng.random() < 0.2 else rng.choice(NAMES_F + NAMES_M)


def some_city(rng: random.Random) -> str:
    return sentence(invented_word(rng)) if rng.random() < 0.15 else rng.choice(CITIES)


def in_words(number: int, link: str = " ") -> str:
    """Spells 421 "four hundred twenty one"; `link` is " ", " and " (behind hundreds) or "-" (behind tens)."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10] + (("-" if link == "-" else " ") + ONES[number % 10] if number % 10 else "")
    unit, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    rest = number % unit
    joint = " and " if link == " and " and rest and (unit == 100 or rest < 100) else " "
    return in_words(number // unit, link) + " " + name + (joint + in_words(rest, link) if rest else "")


# ── How users type ───────────────────────────────────────────────────────────────────────────────────────────────────

MANNER = read_grammars("manner")
FRAMES = MANNER["frames"][0]
OPENERS, ENDINGS = word_list(MANNER, "openers"), word_list(MANNER, "endings")
PROPER = {word.lower(): word for word in word_list(MANNER, "proper")}


def misspelt(text: str, rng: random.Random) -> str:
    """Swaps two letters of one longer word, or drops or doubles one."""
    places = list(re.finditer(r"[a-z]{5,}", text))
    if not places:
        return text
    match = rng.choice(places)
    at = match.start() + rng.randint(1, len(match.group()) - 2)
    swapped = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return rng.choice([swapped, text[:at] + text[at + 1 :], text[:at] + text[at] + text[at:]])


def proper_case(text: str) -> str:
    """Spells names and abbreviations as careful writers do; the grammars are in lower case."""
    return re.sub(r"(?<![\w/.-])[a-z]+(?![\w/-])", lambda match: PROPER.get(match.group(), match.group()), text)


def spoken(core: str, rng: random.Random, mark: str = "?", loose: bool = True) -> str:
    """Types a request as a user might: openers, courtesies, case, punctuation, now and then a slip.

    `loose` allows changes to the letters themselves; turn it off where the text holds something to be copied.
    """
    text = core
    if rng.random() < 0.22:
        text = expand(rng.choice(FRAMES), rng, q=text) if loose and mark == "?" else text
    if rng.random() < 0.12:
        text = rng.choice(OPENERS) + rng.choice([", ", " ", ": ", "! "]) + text
    if rng.random() < 0.1:
        text += rng.choice([", ", " "]) + rng.choice(ENDINGS)
    if loose and rng.random() < 0.07:
        text = misspelt(text, rng)
    if rng.random() < 0.6:
        text = sentence(proper_case(text) if loose else text)
    elif loose and rng.random() < 0.03:
        text = text.upper()
    end = rng.choice([mark] * 6 + ["", "", "", ".", mark * 2, "!"]) if not text.endswith(("?", ".", "!")) else ""
    return text + end
