"""JSON to be written from a sentence, and stories."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from .language import (
    ADJECTIVES,
    ANIMALS,
    CITIES,
    LISTS,
    NAMES_F,
    NAMES_M,
    PEOPLE,
    WORDS,
    article,
    expand,
    invented_word,
    pair_list,
    read_grammars,
    sentence,
    some_city,
    some_name,
    spoken,
    word_list,
)

# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
# A record is a subject and a few properties; each property can be said in a sentence and stands under a key.

JSON_TEXTS = read_grammars("json")
JOBS, HOBBIES = word_list(LISTS, "jobs"), word_list(LISTS, "hobbies")
PLAIN_COLOURS = word_list(LISTS, "plain_colours")
ITEMS = [word for word in WORDS[:230] if word not in PLAIN_COLOURS]


def properties_of(kind: str) -> dict[str, list[str]]:
    """The keys of a person or a thing, each with the sentences that say it."""
    return {name.removeprefix(kind): asks for name, (asks, _) in JSON_TEXTS.items() if name.startswith(kind)}


PERSON, THING = properties_of("person."), properties_of("thing.")


def some_email(rng: random.Random) -> str:
    user = rng.choice([rng.choice(NAMES_F + NAMES_M).lower(), invented_word(rng)])
    return user + "@" + rng.choice(["example.com", "mail.org", "test.net", invented_word(rng) + ".com"])


VALUES: dict[str, Callable[[random.Random], Any]] = {
    "age": lambda rng: rng.randint(1, 99),
    "city": some_city,
    "job": lambda rng: rng.choice(JOBS),
    "hobby": lambda rng: rng.choice(HOBBIES),
    "email": some_email,
    "pet": lambda rng: rng.choice(ANIMALS),
    "height": lambda rng: rng.randint(100, 210),
    "price": lambda rng: rng.choice([rng.randint(1, 999), round(rng.uniform(0.5, 99), 2)]),
    "colour": lambda rng: rng.choice(PLAIN_COLOURS),
    "count": lambda rng: rng.randint(2, 500),
    "weight": lambda rng: rng.choice([rng.randint(1, 90), round(rng.uniform(0.1, 30), 1)]),
}


def record(rng: random.Random) -> tuple[dict[str, Any], str]:
    """An object, and a text that says what it holds."""
    person = rng.random() < 0.75
    kinds = PERSON if person else THING
    subject = some_name(rng) if person else rng.choice(ITEMS)
    keys = rng.sample(list(kinds), rng.choice([1, 1, 2, 2, 2, 3]))
    if person and rng.random() < 0.5 and "age" not in keys:
        keys[0] = "age"
    values = {key: VALUES[key](rng) for key in keys}
    parts: list[str] = []
    for key, value in values.items():
        pronoun = "He" if subject in NAMES_M else "She"
        name = pronoun if parts and person and rng.random() < 0.5 else subject
        parts.append(rng.choice(kinds[key]).replace("{n}", name).replace("{v}", str(value)))
    return {"name": subject, **values}, sentence(joined(parts, rng)) + rng.choice([".", ".", ""])


def joined(parts: list[str], rng: random.Random) -> str:
    """Joins sentences; a pronoun within a sentence gets a small letter."""
    text = parts[0]
    for part in parts[1:]:
        joint = rng.choice([". ", " and ", ", "])
        if joint == ". ":
            part = sentence(part)
        elif part.startswith(("He ", "She ")):
            part = part[0].lower() + part[1:]
        text += joint + part
    return text


def listed(items: list[str], rng: random.Random) -> str:
    if len(items) == 1:
        return items[0]
    return ", ".join(items[:-1]) + rng.choice([" and ", ", ", " and "]) + items[-1]


def json_turn(ask: str, value: Any, rng: random.Random) -> tuple[str, str]:
    """The request, with JSON mostly in capitals, and the value as JSON."""
    ask = ask.replace("json", "JSON") if rng.random() < 0.65 else ask
    return (sentence(ask) if rng.random() < 0.65 else ask), json.dumps(value, ensure_ascii=False)


def json_task(rng: random.Random) -> tuple[str, str]:
    kind = rng.random()
    if kind < 0.12:
        return json_list(rng)
    value, text = record(rng)
    if kind >= 0.7:
        return json_turn(expand(rng.choice(JSON_TEXTS["plain_asks"][0]), rng, t=text), value, rng)
    keys = list(value)
    if len(keys) > 2 and rng.random() < 0.3:
        keys = keys[:-1]
    if rng.random() < 0.2:
        rng.shuffle(keys)
    shown = keys if rng.random() < 0.7 else [f'"{key}"' for key in keys]
    shown_keys = listed(shown, rng)
    ask = expand(rng.choice(JSON_TEXTS["asks"][0]), rng, k=shown_keys, t=text)
    return json_turn(ask, {key: value[key] for key in keys}, rng)


def json_list(rng: random.Random) -> tuple[str, str]:
    items = rng.sample(WORDS if rng.random() < 0.7 else CITIES, rng.randint(2, 5))
    ask = expand(JSON_TEXTS["list_asks"][0][0], rng, l=listed(items, rng))
    return json_turn(rng.choice(ask.split("|")), items, rng)


# ── Stories ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# A plot is a list of steps, each a choice of sentences; one hero, one helper and one place run through all of them.

PLOTS = read_grammars("plots")  # the steps, and what such a story is about
STORY_TEXTS = read_grammars("stories")
THINGS, PLACES, TREASURES = word_list(LISTS, "things"), word_list(LISTS, "places"), word_list(LISTS, "treasures")
FOODS, HIDING = word_list(LISTS, "foods"), word_list(LISTS, "hiding")
SKILLS, SIGHTS = word_list(LISTS, "skills"), word_list(LISTS, "sights")
NOISES = pair_list(LISTS, "noises")
FEMALE, MALE = {"girl", "queen", "princess", "witch", "grandmother"}, {"king", "prince", "boy", "grandfather"}


def story_cast(rng: random.Random, hero: str) -> dict[str, str]:
    """Draws who and what the story is about: a value for every slot of the plots."""
    female = (rng.random() < 0.5 if hero not in MALE else False) or hero in FEMALE
    name, friend = rng.choice(NAMES_F if female else NAMES_M), rng.choice(NAMES_F + NAMES_M)
    while friend == name:
        friend = rng.choice(NAMES_F + NAMES_M)
    he, his, him = ("she", "her", "her") if female else ("he", "his", "him")
    helper = rng.choice([kind for kind in ANIMALS + PEOPLE if kind != hero])
    noise, cause = rng.choice(NOISES)
    adjective = rng.choice(ADJECTIVES)
    return {
        "name": name,
        "friend": friend,
        "he": he,
        "his": his,
        "him": him,
        "He": sentence(he),
        "His": sentence(his),
        "hero": hero,
        "helper": helper,
        "a_hero": article(f"{adjective} {hero}"),
        "a_helper": article(f"{rng.choice(ADJECTIVES)} {helper}"),
        "adjective": adjective,
        "place": rng.choice(PLACES),
        "item": rng.choice(TREASURES),
        "food": rng.choice(FOODS),
        "hiding": rng.choice(HIDING),
        "skill": rng.choice(SKILLS),
        "sight": rng.choice(SIGHTS),
        "noise": noise,
        "cause": cause,
    }


def tell(plot: str, cast: dict[str, str], rng: random.Random) -> str:
    opening, trait = rng.choice(STORY_TEXTS["openings"][0]), rng.choice(STORY_TEXTS["traits"][0])
    steps = [opening, trait, *PLOTS[plot][0], rng.choice(STORY_TEXTS["ends"][0])]
    if rng.choice([0, 0, 0, 1]):
        steps.remove(trait)
    return " ".join(expand("[" + step + "]" if "|" in step else step, rng, **cast) for step in steps if step)


def story_subject(plot: str, cast: dict[str, str], rng: random.Random) -> str:
    """Draws what the story is asked to be about: mostly its hero, or the theme of the plot, or nothing in particular."""
    kind = rng.random()
    if kind < 0.6:
        subject = rng.choice(STORY_TEXTS["subjects"][0])
        return expand(subject, rng, one=article(cast["hero"]), other=article(cast["helper"]), **cast)
    return expand(rng.choice(PLOTS[plot][1]), rng, **cast) if kind < 0.82 else ""


def story(rng: random.Random) -> tuple[str, str]:
    plot = rng.choice(list(PLOTS))
    hero = rng.choice(WORDS) if rng.random() < 0.06 else rng.choice(rng.choice([ANIMALS, ANIMALS, PEOPLE, THINGS]))
    cast = story_cast(rng, hero)
    subject = story_subject(plot, cast, rng)
    about, something = "", "a story"
    if subject:
        about = " " + expand(STORY_TEXTS["about"][0][0], rng, s=subject)
        something = expand(STORY_TEXTS["something"][0][0], rng, s=subject)
    ask = expand(rng.choice(STORY_TEXTS["asks"][0]), rng, about=about, something=something)
    return spoken(ask, rng, ""), tell(plot, cast, rng)
