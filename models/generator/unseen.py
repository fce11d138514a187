"""What training must never show, because the evaluation asks it: whole sentences, and a tenth of all operand pairs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from .language import pair_list, read_grammars, word_list

TALK = read_grammars("eval_talk")  # for each kind the sentences, and a pattern that a right answer matches
TOPICS = read_grammars("eval_topics")  # the same for questions about shimmy
FACT_TEXTS = read_grammars("eval_facts")
TASK_TEXTS = read_grammars("eval_tasks")

FACTS = list(zip(*FACT_TEXTS["facts"], strict=True))  # a question, and a pattern that a right answer matches
CAPITALS = dict(pair_list(FACT_TEXTS, "capitals"))
OPPOSITES = dict(pair_list(FACT_TEXTS, "opposites"))
SPELLINGS = word_list(FACT_TEXTS, "spellings")
REPEATS = FACT_TEXTS["repeats"][0]
STORIES = list(zip(*TASK_TEXTS["stories"], strict=True))  # a request, and its subject
CITIES = word_list(TASK_TEXTS, "cities")


def filled(phrases: list[str], values: Iterable[object]) -> list[str]:
    """Every phrase with every value."""
    values = list(values)
    return [phrase.format(value) for phrase in phrases for value in values]


FIXED = [
    *(text for asks, _ in TALK.values() for text in asks),
    *(text for asks, _ in TOPICS.values() for text in asks),
    *(text for text, _ in FACTS),
    *(text for text, _ in STORIES),
]
PHRASES = [
    *FIXED,
    *filled(FACT_TEXTS["capital_asks"][0], CAPITALS),
    *filled(FACT_TEXTS["opposite_asks"][0], OPPOSITES),
    *filled(FACT_TEXTS["spelling_asks"][0], SPELLINGS),
    *filled(FACT_TEXTS["count_asks"][0], range(1, 31)),
    *filled(FACT_TEXTS["repeat_asks"][0], REPEATS),
    *filled(TASK_TEXTS["weather"][0], CITIES),
    *TASK_TEXTS["upper"][0],
    *TASK_TEXTS["one_word"][0],
]


def normalized(text: str) -> str:
    """Drops case, punctuation and spacing; sentences are compared in this form."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


FORBIDDEN = {normalized(text) for text in PHRASES}


def held_out(*values: object) -> bool:
    """True for the tenth of all operand tuples that only the evaluation uses."""
    return hashlib.sha256(repr(values).encode()).digest()[0] < 26
