"""Small talk, questions about shimmy, and small facts."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from .language import (
    ADJECTIVES,
    ANIMALS,
    CAPITALS,
    LISTS,
    MANNER,
    NAMES_F,
    NAMES_M,
    PEOPLE,
    WORDS,
    article,
    expand,
    grammars,
    in_words,
    invented_word,
    pair_list,
    read_grammars,
    read_text,
    sentence,
    some_city,
    some_name,
    spoken,
    word_list,
)

# ── Small talk ───────────────────────────────────────────────────────────────────────────────────────────────────────

SMALL_TALK = read_grammars("talk")
COMMON_TALK = {"greeting": 6, "who": 5, "thanks": 2, "bye": 2.5, "how_are_you": 2}  # weights; the others have 1
TALK_WEIGHTS = [COMMON_TALK.get(kind, 1) for kind in SMALL_TALK]
TALK_QUESTIONS = set(word_list(MANNER, "talk_questions"))
ADDRESSES = MANNER["addresses"][0][0]
SIGHS = word_list(MANNER, "sighs")


def some_talk(kind: str, rng: random.Random) -> str:
    """One sentence of this kind, each pattern as likely as the next."""
    return expand(rng.choice(SMALL_TALK[kind][0]), rng, name=some_name(rng))


def addressed(core: str, kind: str, rng: random.Random) -> str:
    """Varies small talk as users do: addressed to somebody, after a sigh, or said twice."""
    if kind in ("greeting", "thanks", "bye") and rng.random() < 0.15:
        more = some_talk(kind, rng)
        core += rng.choice([" and ", ", ", "! ", ". ", " "]) + more
    if rng.random() < 0.25:
        core += rng.choice([", ", " ", ", "]) + expand(ADDRESSES, rng)
    if rng.random() < 0.15:
        core = rng.choice(SIGHS) + rng.choice([" ", ", "]) + core
    return core


def small_talk(rng: random.Random) -> tuple[str, str]:
    kind = rng.choices(list(SMALL_TALK), TALK_WEIGHTS)[0]
    asks, answers = SMALL_TALK[kind]
    weights = [pattern.count("|") + 3 for pattern in asks]
    core = expand(rng.choices(asks, weights)[0], rng, name=some_name(rng))
    mark = "?" if core.split()[0] in TALK_QUESTIONS else ""
    if kind in COMMON_TALK:
        core = addressed(core, kind, rng)
    return spoken(core, rng, mark), rng.choices(answers, [4, 2, 1][: len(answers)])[0]


# ── Questions about shimmy ───────────────────────────────────────────────────────────────────────────────────────────
# In topics.txt, $HOW and $S stand for choices of "how do I ..." and of names for the server.

TOPICS = grammars(read_text("topics.txt").replace("$HOW", MANNER["how"][0][0]).replace("$S", MANNER["subject"][0][0]))


def shimmy_question(rng: random.Random) -> tuple[str, str]:
    asks, answers = TOPICS[rng.choice(list(TOPICS))]
    core = expand(rng.choice(asks), rng)
    if "shimmy" not in core and rng.random() < 0.12:
        core += rng.choice([" in shimmy", " with shimmy", " on the server", " with the server", " of the server"])
    return spoken(core, rng), answers[0]


# ── Facts ────────────────────────────────────────────────────────────────────────────────────────────────────────────
# In facts.txt, the first answer to a fact is a sentence and the second a word or so, for one-word answers.

Fact = tuple[str, str, str]  # what is asked, the answer in a sentence, and in a word or so

FACT_TEXTS = read_grammars("facts")
OPPOSITES = pair_list(LISTS, "opposites")
DAYS, MONTHS = word_list(LISTS, "days"), word_list(LISTS, "months")
MONTH_DAYS = word_list(LISTS, "month_days")
SEASONS = word_list(LISTS, "seasons")
ORDINALS = word_list(LISTS, "ordinals")
COLOURS, MIXES = pair_list(LISTS, "colours"), pair_list(LISTS, "mixes")
SOUNDS, LEGS, YOUNG = pair_list(LISTS, "sounds"), pair_list(LISTS, "legs"), pair_list(LISTS, "young")
AMOUNTS = pair_list(LISTS, "amounts")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def stated(name: str, rng: random.Random, answer: str = "", **slots: str) -> Fact:
    """Asks and answers the fact `name`; "{Word}" in an answer is the slot "{word}" with a capital."""
    long, short = FACT_TEXTS[answer or name][1]
    ask = expand(FACT_TEXTS[name][0][0], rng, **slots)
    slots |= {sentence(slot): sentence(value) for slot, value in slots.items()}
    return ask, expand(long, rng, **slots), expand(short, rng, **slots)


def quoted(text: str, rng: random.Random) -> str:
    return rng.choice(["{}", "{}", "{}", '"{}"', "'{}'"]).format(text)


def numeral(number: int, rng: random.Random) -> str:
    return in_words(number) if rng.random() < 0.3 else str(number)


def neighbour(items: list[str] | str, at: int, after: bool) -> tuple[str, str]:
    """The word "after" or "before", and the item there; the first follows the last."""
    return ("after", items[(at + 1) % len(items)]) if after else ("before", items[at - 1])


def fact_capital(rng: random.Random) -> Fact:
    country, city = rng.choice(list(CAPITALS.items()))
    if rng.random() < 0.25:
        return stated("capital_country", rng, c=city, country=country, short=sentence(country.removeprefix("the ")))
    return stated("capital", rng, c=country, city=city)


def fact_yes_no(rng: random.Random) -> Fact:
    country, city = rng.choice(list(CAPITALS.items()))
    if rng.random() < 0.5:
        return stated("capital_check", rng, "capital_yes", t=city, c=country, city=city)
    other = rng.choice([name for name in CAPITALS.values() if name != city])
    return stated("capital_check", rng, "capital_no", t=other, c=country, city=city)


def fact_day(rng: random.Random) -> Fact:
    at = rng.randrange(7)
    kind = rng.random()
    if kind < 0.12:
        return stated("days", rng)
    if kind < 0.3:
        return stated("day_number", rng, o=ORDINALS[at], day=DAYS[at])
    word, day = neighbour(DAYS, at, after=kind < 0.75)
    return stated("day_next", rng, o=word, d=DAYS[at], t="tomorrow" if word == "after" else "yesterday", day=day)


def fact_month(rng: random.Random) -> Fact:
    at = rng.randrange(12)
    kind = rng.random()
    if kind < 0.1:
        return stated("months", rng)
    if kind < 0.35:
        return stated("month_number", rng, o=ORDINALS[at], n=str(at + 1), month=MONTHS[at])
    if kind < 0.5:
        extra = ", or 29 in a leap year" if MONTHS[at] == "February" else ""
        return stated("month_days", rng, m=MONTHS[at], days=MONTH_DAYS[at], extra=extra)
    word, month = neighbour(MONTHS, at, after=kind < 0.8)
    return stated("month_next", rng, o=word, d=MONTHS[at], month=month)


def fact_colour(rng: random.Random) -> Fact:
    if rng.random() < 0.3:
        mix, made = rng.choice(MIXES)
        first, second = mix.split("+")
        return stated("mix", rng, a=first, b=second, made=made)
    thing, colour = rng.choice(COLOURS)
    short = thing.removesuffix(" on a clear day").removesuffix(" in drawings").removesuffix(" in summer")
    return stated("colour", rng, t=rng.choice([thing, short]), thing=thing, colour=colour)


def fact_opposite(rng: random.Random) -> Fact:
    word, other = rng.choice(OPPOSITES)
    return stated("opposite", rng, w=word, other=other)


def fact_spelling(rng: random.Random) -> Fact:
    word = invented_word(rng) if rng.random() < 0.08 else rng.choice(WORDS + NAMES_F[:20] + NAMES_M[:20])
    letters, dashed = ", ".join(word.upper()), "-".join(word.upper())
    return stated("spelling", rng, w=quoted(word, rng), word=word, letters=letters, dashed=dashed)


def fact_letter(rng: random.Random) -> Fact:
    if rng.random() < 0.5:
        word = rng.choice(WORDS)
        which, at = ("first", 0) if rng.random() < 0.6 else ("last", -1)
        return stated(f"{which}_letter", rng, o=which, w=quoted(word, rng), word=word, letter=word[at].upper())
    at = rng.randrange(26)
    side, other = neighbour(LETTERS, at, after=at < 25 and (at == 0 or rng.random() < 0.6))
    return stated("letter_next", rng, o=side, l=LETTERS[at], other=other)


def fact_count(rng: random.Random) -> Fact:
    end = rng.randint(2, 30)
    if rng.random() < 0.2:
        end = min(end, 20)
        return stated("count_down", rng, n=numeral(end, rng), numbers=", ".join(map(str, range(end, 0, -1))))
    start = 1 if rng.random() < 0.8 else rng.randint(2, max(2, end - 1))
    numbers = ", ".join(map(str, range(start, end + 1)))
    if start == 1:
        return stated("count", rng, n=numeral(end, rng), numbers=numbers)
    return stated("count_from", rng, n=numeral(end, rng), m=numeral(start, rng), numbers=numbers)


def fact_animal(rng: random.Random) -> Fact:
    kind = rng.random()
    if kind < 0.35:
        animal, sound = rng.choice(SOUNDS)
        return stated("sound", rng, a=animal, animal=article(animal), sound=sound)
    if kind < 0.65:
        animal, legs = rng.choice(LEGS)
        return stated("legs", rng, a=article(animal), count="no" if legs == "0" else legs, legs=legs)
    animal, young = rng.choice(YOUNG)
    return stated("young", rng, a=animal, young=young)


def fact_amount(rng: random.Random) -> Fact:
    thing, amount = rng.choice(AMOUNTS)  # such as "days in a week", of which "a week" is the owner
    noun, preposition, owner = re.split(r" (in|on|of) ", thing, maxsplit=1)
    return stated("amount", rng, t=noun, r=f"{preposition} {owner}", o=owner, thing=thing, amount=amount)


def fact_compare(rng: random.Random) -> Fact:
    low, high = sorted(rng.sample(range(1, 10 ** rng.randint(1, 3)), 2))
    first, second = map(str, rng.sample([low, high], 2))
    if rng.random() < 0.6:
        how, best, worst, words = "bigger", high, low, ["bigger", "larger", "greater"]
    else:
        how, best, worst, words = "smaller", low, high, ["smaller"]
    word = rng.choice(words)
    return stated("compare", rng, o=word, a=first, b=second, how=how, best=str(best), worst=str(worst))


def fact_number(rng: random.Random) -> Fact:
    if rng.random() < 0.5:
        number = rng.randint(0, 99)
        if rng.random() < 0.5:
            return stated("number_in_words", rng, n=str(number), words=in_words(number, "-"))
        return stated("number_in_digits", rng, n=in_words(number, rng.choice([" ", "-"])), number=str(number))
    number = rng.randint(1, 200)
    side, other = ("after", number + 1) if rng.random() < 0.6 else ("before", number - 1)
    return stated("number_next", rng, o=side, n=str(number), other=str(other))


def fact_season(rng: random.Random) -> Fact:
    at = rng.randrange(4)
    if rng.random() < 0.3:
        return stated("seasons", rng)
    side, other = neighbour(SEASONS, at, after=rng.random() < 0.6)
    return stated("season_next", rng, o=side, s=SEASONS[at], other=other)


def small_phrase(rng: random.Random) -> str:
    """Words to be repeated: drawn at large, so that only copying helps."""
    kind = rng.random()
    animal_does, person_goes = FACT_TEXTS["small_sentence"][0]
    if kind < 0.3:
        a, n, b, m = (rng.choice(words) for words in (ADJECTIVES, ANIMALS + PEOPLE, ADJECTIVES, WORDS))
        return expand(animal_does, rng, a=a, n=n, b=b, m=m)
    if kind < 0.5:
        return expand(person_goes, rng, n=some_name(rng), c=some_city(rng))
    pool = WORDS + ADJECTIVES + NAMES_F + NAMES_M
    parts = [invented_word(rng) if rng.random() < 0.12 else rng.choice(pool) for _ in range(rng.randint(1, 7))]
    if rng.random() < 0.15:
        parts.insert(rng.randrange(len(parts) + 1), str(rng.randint(0, 9999)))
    return " ".join(parts)


def fact_repeat(rng: random.Random) -> Fact:
    phrase = small_phrase(rng)
    if rng.random() < 0.5:
        phrase = sentence(phrase) + rng.choice(["", ".", "!"])
    return stated("repeat", rng, p=phrase, q=rng.choice(['"{}"', "'{}'"]).format(phrase))


FACTS: dict[Callable[[random.Random], Fact], float] = {
    fact_capital: 3.5,
    fact_yes_no: 0.7,
    fact_day: 2,
    fact_month: 2,
    fact_colour: 1.3,
    fact_opposite: 2.2,
    fact_spelling: 5.5,
    fact_letter: 1,
    fact_count: 8,
    fact_animal: 1.3,
    fact_amount: 1.2,
    fact_compare: 0.6,
    fact_number: 0.8,
    fact_season: 0.5,
    fact_repeat: 10,
}
COPIED = {fact_repeat, fact_spelling, fact_letter, fact_compare, fact_number}  # their letters must stay as they are
ORDERS = set(word_list(MANNER, "orders"))


def fact(rng: random.Random) -> Fact:
    maker = rng.choices(list(FACTS), list(FACTS.values()))[0]
    ask, long, short = maker(rng)
    if maker is fact_repeat:
        return (sentence(ask) if rng.random() < 0.6 else ask), long, short
    mark = "" if ask.split()[0] in ORDERS else "?"
    return spoken(ask, rng, mark, loose=maker not in COPIED), long, short


def fact_turn(rng: random.Random) -> tuple[str, str]:
    ask, long, _ = fact(rng)
    return ask, long


# ── Beyond this model ────────────────────────────────────────────────────────────────────────────────────────────────


def unknown(rng: random.Random) -> tuple[str, str]:
    """Something this model does not know, and should say so."""
    asks, answers = FACT_TEXTS["unknown"]
    ask = expand(
        rng.choice(asks),
        rng,
        x=sentence(invented_word(rng)),
        y=str(rng.randint(1900, 2030)),
        w=rng.choice(WORDS),
        v=invented_word(rng),
        n=some_name(rng),
    )
    return spoken(ask, rng), rng.choice(answers)
