#!/usr/bin/env python3
"""Makes shimmy-tiny.gguf from nothing: text generator, tokenizer, training, export and self-check, in this order.

    python models/make_tiny.py                  train and export (resumes where it was stopped)
    python models/make_tiny.py --show 5         print a few generated conversations
    python models/make_tiny.py --export-only    export and check the newest checkpoint

All text is written by the grammars below; no corpus is downloaded. A conversation is a list of OpenAI messages, perhaps
with tools, and is rendered through the very chat template that goes into the file, so that the model sees in training
exactly what a server shows it later. Step n of the training draws its text from a generator seeded by (seed, n): a
resumed run continues with the text it would have seen. What is kept out of training, so that it can be measured:
sentences listed in eval_tiny.py, and every pair of operands that `held_out` picks.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import gguf
    import numpy as np
    import torch
    import torch.nn.functional as F
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from torch import Tensor, nn
except ImportError as missing:  # one line, not a traceback: these are development packages
    sys.exit(f"make_tiny.py needs the package {missing.name}: pip install torch==2.13.0 gguf tokenizers numpy jinja2")

HERE = Path(__file__).resolve().parent
SEED = 20261122
Message = dict[str, Any]


# ── Chat template ────────────────────────────────────────────────────────────────────────────────────────────────────
# The Hermes/Qwen form, with a short preamble: a model of this size pays for every token of it.

CHAT_TEMPLATE = """\
{%- if messages and messages[0].role == 'system' %}
    {%- set system = messages[0].content or '' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- if system or tools %}
    {{- '<|im_start|>system\\n' + system }}
    {%- if tools %}
        {{- '\\n\\n' if system else '' }}
        {{- '# Tools\\n<tools>' }}
        {%- for tool in tools %}
            {{- '\\n' + (tool | tojson) }}
        {%- endfor %}
        {{- '\\n</tools>\\nCall one when it fits:\\n<tool_call>\\n' }}
        {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>' }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in turns %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or turns[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + (message.content or '') + '\\n</tool_response>' }}
        {%- if loop.last or turns[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for call in message.tool_calls %}
            {%- set function = call.function or call %}
            {{- '\\n<tool_call>\\n{"name": ' + (function.name | tojson) + ', "arguments": ' }}
            {%- if function.arguments is string %}
                {{- function.arguments }}
            {%- else %}
                {{- function.arguments | tojson }}
            {%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


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

    def add(self, role: str, content: str, **more: Any) -> None:
        self.messages.append({"role": role, "content": content, **more})

    def render(self, add_generation_prompt: bool = False) -> str:
        extra = {"tools": self.tools} if self.tools else {}
        return TEMPLATE.render(messages=self.messages, add_generation_prompt=add_generation_prompt, **extra)


# ── Grammar ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# "[a|b|]" is a choice, nested as deep as needed; "{name}" is filled in afterwards, so that values are never expanded.

CHOICE = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"\{(\w+)\}")


def expand(pattern: str, rng: random.Random, **slots: str) -> str:
    """One sentence of the grammar `pattern`."""
    while "[" in pattern:
        pattern = CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), pattern)
    pattern = re.sub(r" {2,}", " ", pattern).strip()
    return SLOT.sub(lambda match: slots.get(match.group(1), match.group(0)), pattern)


def normalized(text: str) -> str:
    """A sentence without case, punctuation and spacing: held-out sentences are compared in this form."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def held_out(*values: object) -> bool:
    """True for the tenth of all operand tuples that training never shows."""
    return hashlib.sha256(repr(values).encode()).digest()[0] < 26


def words_of(text: str) -> list[str]:
    return [word.strip() for word in text.replace("\n", " ").split(",") if word.strip()]


def phrases_of(text: str) -> list[str]:
    return [phrase.strip() for phrase in text.replace("\n", " ").split(";")]


def grammars(text: str) -> dict[str, tuple[list[str], list[str]]]:
    """Named grammars: "@name", then lines "> what may be said" and "= an answer"; other lines go on with the last."""
    named: dict[str, tuple[list[str], list[str]]] = {}
    for entry in re.split(r"\n(?=[@>=])", text.strip()):
        mark, rest = entry[0], entry[1:].strip().replace("\n", " ")
        if mark == "@":
            asks: list[str] = []
            answers: list[str] = []
            named[rest] = asks, answers
        else:
            (asks if mark == ">" else answers).append(rest)
    return named


def sentence(text: str) -> str:
    """First letter upper case."""
    return text[:1].upper() + text[1:]


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


# ── Words ────────────────────────────────────────────────────────────────────────────────────────────────────────────

NAMES_F = words_of("""Anna, Maria, Lucy, Emma, Olivia, Sofia, Nora, Clara, Ella, Mia, Lena, Ruth, Grace, Alice, Rosa,
Ida, Eva, Julia, Hannah, Zoe, Carla, Diana, Elena, Fatima, Greta, Helen, Irene, Jane, Kate, Laura, Mary, Nina, Olga,
Paula, Rita, Sara, Tina, Vera, Wendy, Yuki, Amina, Bella, Chloe, Daisy, Freya, Ingrid, Leila, Mei, Priya, Stella""")
NAMES_M = words_of("""Tom, Ben, Max, Leo, Paul, Jack, Sam, Adam, Carl, David, Eric, Felix, George, Henry, Ivan, James,
Karl, Liam, Mark, Noah, Oscar, Peter, Robert, Simon, Thomas, Victor, Walter, Yusuf, Zane, Ali, Bruno, Chen, Diego, Emil,
Frank, Hugo, Igor, John, Kofi, Lars, Milo, Nils, Otto, Pablo, Ravi, Stefan, Tariq, Uwe, Andrew, Bob""")
CAPITALS = dict(
    pair.split("=")
    for pair in words_of("""France=Paris, Germany=Berlin, Italy=Rome, Spain=Madrid,
Portugal=Lisbon, England=London, Ireland=Dublin, Scotland=Edinburgh, Norway=Oslo, Sweden=Stockholm, Finland=Helsinki,
Denmark=Copenhagen, Iceland=Reykjavik, Poland=Warsaw, Austria=Vienna, Hungary=Budapest, Greece=Athens, Turkey=Ankara,
Russia=Moscow, Ukraine=Kyiv, Belgium=Brussels, Romania=Bucharest, Bulgaria=Sofia, Croatia=Zagreb, Serbia=Belgrade,
Switzerland=Bern, Egypt=Cairo, Kenya=Nairobi, Morocco=Rabat, Nigeria=Abuja, Ghana=Accra, Ethiopia=Addis Ababa,
Japan=Tokyo, China=Beijing, India=New Delhi, Thailand=Bangkok, Vietnam=Hanoi, Indonesia=Jakarta, Iran=Tehran,
Iraq=Baghdad, South Korea=Seoul, Nepal=Kathmandu, Canada=Ottawa, Mexico=Mexico City, Cuba=Havana, Peru=Lima,
Chile=Santiago, Argentina=Buenos Aires, Brazil=Brasilia, Colombia=Bogota, Venezuela=Caracas, Uruguay=Montevideo,
Australia=Canberra, New Zealand=Wellington, the United States=Washington, the Netherlands=Amsterdam,
the Czech Republic=Prague, the Philippines=Manila""")
)
CITIES = sorted(set(CAPITALS.values())) + words_of("""Hamburg, Munich, Lyon, Milan, Naples, Barcelona, Porto,
Manchester, Liverpool, Glasgow, Bergen, Gothenburg, Tampere, Aarhus, Krakow, Salzburg, Zurich, Geneva, Istanbul, Boston,
Chicago, Seattle, Denver, Dallas, Houston, Miami, Atlanta, Toronto, Montreal, Vancouver, Sydney, Melbourne, Perth,
Auckland, Osaka, Kyoto, Mumbai, Shanghai, Hong Kong, Singapore, Dubai, Cape Town, Lagos, Rio de Janeiro, New York,
San Francisco, Los Angeles, Venice, Florence, Marseille""")
OPPOSITES = [
    tuple(pair.split("="))
    for pair in words_of("""hot=cold, big=small, large=little, tall=short, high=low,
fast=slow, happy=sad, light=dark, day=night, open=closed, full=empty, hard=soft, old=young, new=old, rich=poor,
strong=weak, wet=dry, clean=dirty, early=late, easy=difficult, good=bad, left=right, up=down, in=out, on=off, near=far,
loud=quiet, long=short, thick=thin, wide=narrow, heavy=light, deep=shallow, sweet=sour, smooth=rough, sharp=blunt,
true=false, right=wrong, first=last, always=never, before=after, above=below, inside=outside, begin=end, start=stop,
come=go, give=take, buy=sell, win=lose, push=pull, laugh=cry, love=hate, remember=forget, find=lose, question=answer,
friend=enemy, black=white, yes=no, north=south, east=west, summer=winter, morning=evening, war=peace, alive=dead,
brave=afraid, safe=dangerous, cheap=expensive, simple=complicated, empty=full, cold=hot, sad=happy, small=big,
slow=fast, dark=light, weak=strong, dry=wet, dirty=clean, late=early, bad=good, down=up, far=near, quiet=loud,
poor=rich, young=old, night=day, low=high, soft=hard, thin=thick, narrow=wide, false=true, wrong=right, last=first,
never=always, after=before, end=beginning, sell=buy, lose=win, south=north, west=east, winter=summer, white=black""")
]
DAYS = words_of("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
MONTHS = words_of("January, February, March, April, May, June, July, August, September, October, November, December")
ORDINALS = words_of("""first, second, third, fourth, fifth, sixth, seventh, eighth, ninth, tenth, eleventh, twelfth""")
COLOURS = dict(
    pair.split("=")
    for pair in words_of("""the sky on a clear day=blue, grass=green, snow=white,
a ripe banana=yellow, a lemon=yellow, blood=red, coal=black, a carrot=orange, an orange=orange,
the sun in drawings=yellow, a ripe tomato=red, milk=white, chocolate=brown, a frog=green, a flamingo=pink,
an elephant=grey, a crow=black, a strawberry=red, a leaf in summer=green, the night sky=black, a cucumber=green,
salt=white, a fire engine=red, wood=brown, an eggplant=purple, a violet=purple, a pea=green, rice=white,
a polar bear=white, a cherry=red""")
)
MIXES = dict(
    mix.split("=")
    for mix in words_of("""blue+yellow=green, red+yellow=orange, red+blue=purple,
black+white=grey, red+white=pink, yellow+blue=green, yellow+red=orange, blue+red=purple, white+black=grey,
white+red=pink""")
)
SOUNDS = dict(
    pair.split("=")
    for pair in words_of("""dog=woof, cat=meow, cow=moo, sheep=baa, duck=quack, pig=oink,
horse=neigh, lion=roar, bee=buzz, snake=hiss, owl=hoot, mouse=squeak, hen=cluck, wolf=howl, crow=caw, frog=croak""")
)
LEGS = dict(
    pair.split("=")
    for pair in words_of("""dog=4, cat=4, horse=4, cow=4, spider=8, bird=2, ant=6, bee=6,
duck=2, human=2, fly=6, sheep=4, snake=0, fish=0, chicken=2, beetle=6, frog=4, lion=4, elephant=4, octopus=0""")
)
YOUNG = dict(
    pair.split("=")
    for pair in words_of("""dog=puppy, cat=kitten, cow=calf, horse=foal, sheep=lamb,
duck=duckling, hen=chick, lion=cub, bear=cub, frog=tadpole, goat=kid, swan=cygnet, goose=gosling, pig=piglet,
deer=fawn""")
)
AMOUNTS = dict(
    pair.split("=")
    for pair in words_of("""days in a week=7, months in a year=12, hours in a day=24,
minutes in an hour=60, seconds in a minute=60, days in a leap year=366, days in a year=365, letters in the alphabet=26,
seasons in a year=4, weeks in a year=52, sides in a triangle=3, sides in a square=4, sides in a hexagon=6,
centimetres in a metre=100, metres in a kilometre=1000, grams in a kilogram=1000, years in a century=100,
years in a decade=10, players in a football team=11, strings on a violin=4, continents on earth=7,
planets in the solar system=8, colours in a rainbow=7, things in a dozen=12, wheels on a bicycle=2, wheels on a car=4,
fingers on a hand=5, bits in a byte=8, vowels in English=5""")
)
MONTH_DAYS = dict(zip(MONTHS, words_of("31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31"), strict=True))
WORDS = words_of("""apple, table, river, house, window, garden, flower, mountain, yellow, orange, purple, silver,
bread, butter, cheese, water, school, teacher, paper, pencil, book, story, music, piano, guitar, violin, doctor, engine,
rocket, planet, star, moon, sun, cloud, rain, snow, winter, summer, spring, autumn, friend, family, mother, father,
brother, sister, baby, dog, cat, horse, sheep, mouse, lion, tiger, zebra, monkey, rabbit, fox, wolf, bear, whale, shark,
eagle, parrot, chicken, turtle, frog, snake, bee, butterfly, spider, tree, leaf, forest, ocean, beach, island, desert,
bridge, castle, tower, street, city, village, farm, kitchen, chair, bed, lamp, door, key, box, bag, shoe, hat, coat,
shirt, dress, glove, clock, phone, camera, computer, keyboard, screen, server, model, token, number, letter, word,
question, answer, hello, world, please, thanks, happy, sad, quick, slow, brown, green, blue, black, white, red, pink,
grey, strong, gentle, brave, clever, honest, lazy, quiet, loud, cold, warm, soft, hard, sweet, sour, salt, sugar,
pepper, honey, milk, coffee, tea, juice, cake, cookie, soup, salad, pizza, rice, potato, carrot, tomato, onion, banana,
cherry, lemon, grape, peach, train, plane, boat, ship, car, truck, bicycle, road, map, ticket, hotel, market, bank,
money, coin, ring, crown, king, queen, prince, knight, dragon, giant, wizard, magic, dream, night, morning, evening,
minute, hour, week, month, year, birthday, party, gift, candle, song, dance, game, ball, puzzle, robot, machine, wheel,
hammer, nail, rope, stone, sand, gold, iron, glass, wood, wool, cotton, silk, feather, shell, wave, wind, storm, fire,
smoke, ice, hill, valley, lake, pond, field, grass, seed, root, branch, nest, egg, wing, tail, nose, ear, eye, hand,
foot, heart, smile, voice, shimmy, python, llama, laptop, memory, history, science, library, museum, theatre, holiday,
journey, weather, thunder, rainbow, sunshine, pumpkin, mushroom, cabbage, spinach, blanket, pillow, mirror, basket,
bottle, bucket, ladder""")
ADJECTIVES = words_of("""little, brave, clever, kind, curious, shy, cheerful, lonely, lazy, gentle, proud, tiny, old,
young, sleepy, busy, patient, quiet, hungry, friendly, careful, funny, honest, wise, clumsy, grumpy, happy, small,
stubborn""")
ANIMALS = words_of("""fox, rabbit, bear, mouse, cat, dog, owl, frog, duck, hedgehog, squirrel, turtle, elephant, lion,
tiger, penguin, whale, dolphin, horse, donkey, goat, sheep, pig, cow, hen, wolf, deer, beaver, badger, otter, sparrow,
crow, swan, parrot, monkey, giraffe, camel, kitten, puppy, lamb, ant, bee, spider, snail, butterfly, ladybird, bat,
seal, octopus, crab, dragon, unicorn, dinosaur, mole, raven, goose, pony, hamster, zebra, panda, koala, kangaroo""")
PEOPLE = words_of("""girl, boy, king, queen, princess, prince, baker, farmer, fisherman, sailor, teacher, painter,
gardener, knight, wizard, witch, pirate, astronaut, doctor, shepherd, musician, clown, inventor, grandmother,
grandfather, giant""")
THINGS = words_of("""robot, boat, train, cloud, star, snowman, teapot, kite, balloon, tree, lighthouse, car, tractor,
clock, lamp, ship, rocket, computer, ghost, toy soldier, umbrella, plane, bicycle, shoe, moon, river, leaf, windmill,
server""")
PLACES = words_of("""a green forest, a small village, a quiet valley, an old castle, a town by the sea, a busy city,
a farm on a hill, a house by the lake, a warm island, a snowy mountain, a big garden, a little harbour, a narrow street,
a sunny meadow, a deep wood, a tiny cottage, a faraway land, an old mill, a dusty attic, a windy coast""")
TREASURES = words_of("""red scarf, silver key, golden ring, blue ball, wooden flute, old map, round pebble, warm hat,
brass bell, paper boat, little drum, green bottle, silk ribbon, shiny coin, picture book, small lantern, glass marble,
music box, feather pen, yellow umbrella, tin whistle, toy horse, favourite cup, pocket watch""")
FOODS = words_of("""apple pie, warm bread, honey cake, berry jam, hot soup, sweet pears, nuts, pancakes, cheese,
cookies, roasted chestnuts, plum cake, strawberries, carrots, a pot of stew, ginger biscuits""")
HIDING = words_of("""under a bush, behind the door, beside the well, in a hollow tree, under an old bridge,
on top of a rock, between two roots, in the tall grass, behind a pile of leaves, at the bottom of a basket,
near the gate, under the bed""")
SKILLS = words_of("""swim, sing, dance, fly a kite, whistle, paint, bake bread, climb trees, read, write letters,
play the flute, skate on the ice, juggle, row a boat, tell jokes, ride a bicycle, swing high, build a fire""")
SIGHTS = words_of("""the sea, the highest mountain, the moon over the lake, the big city, the first snow,
the end of the rainbow, the northern lights, the old lighthouse, the waterfall, the desert, the whales,
the famous market, the sunrise""")
NOISES = [
    tuple(pair.split("="))
    for pair in words_of("""a soft tapping=a branch at the window,
a strange humming=a family of bees, a low rumble=a sleeping bear that snored, a tiny squeak=a lost mouse,
a slow creaking=the old gate in the wind, a quiet crying=a kitten that wanted to come in,
a loud clatter=a raccoon in the kitchen, a gentle splash=a frog in the bucket""")
]


def invented_word(rng: random.Random) -> str:
    """A word nobody has seen: teaches copying instead of recall."""
    return "".join(
        rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") + rng.choice(["", "", "n", "r", "s", "l"])
        for _ in range(rng.randint(1, 3))
    )


def some_name(rng: random.Random) -> str:
    return sentence(invented_word(rng)) if rng.random() < 0.2 else rng.choice(NAMES_F + NAMES_M)


def some_city(rng: random.Random) -> str:
    return sentence(invented_word(rng)) if rng.random() < 0.15 else rng.choice(CITIES)


ONES = words_of("""zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen,
fifteen, sixteen, seventeen, eighteen, nineteen""")
TENS = words_of("-, -, twenty, thirty, forty, fifty, sixty, seventy, eighty, ninety")


def in_words(number: int, link: str = " ") -> str:
    """421 as "four hundred twenty one"; `link` stands between hundreds and the rest (" and ")."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10] + (("-" if link == "-" else " ") + ONES[number % 10] if number % 10 else "")
    unit, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    rest = number % unit
    joint = " and " if link == " and " and rest and (unit == 100 or rest < 100) else " "
    return in_words(number // unit, link) + " " + name + (joint + in_words(rest, link) if rest else "")


# ── User's manner ────────────────────────────────────────────────────────────────────────────────────────────────────

OPENERS = words_of("""hey, hi, hello, ok, well, so, please, excuse me, one question, quick question, a question,
tell me, sorry, hm, and, now, good, next, alright, thanks""")
FRAMES = phrases_of("""can you tell me [|please ]{q}; could you tell me {q}; i would like to know {q}; do you know {q};
please tell me {q}; i want to know: {q}; tell me: {q}; i am wondering {q}; {q}, do you know; my question: {q}; i wonder
{q}; {q} - any idea; help me: {q}; just tell me {q}; can you help? {q}; {q} exactly""")
THANKS_END = phrases_of("""please; thanks; thank you; pls; if you can; now; today; again; for me; my friend""")


def misspelt(text: str, rng: random.Random) -> str:
    """Two neighbouring letters swapped, or one left out or doubled, in one longer word."""
    places = list(re.finditer(r"[a-z]{5,}", text))
    if not places:
        return text
    match = rng.choice(places)
    at = match.start() + rng.randint(1, len(match.group()) - 2)
    forms = [
        text[:at] + text[at + 1] + text[at] + text[at + 2 :],
        text[:at] + text[at + 1 :],
        text[:at] + text[at] + text[at:],
    ]
    return rng.choice(forms)


PROPER_WORDS = words_of("""I, JSON, GGUF, API, URL, HTTP, GPU, CPU, RAM, LoRA, OpenAI, CORS, Prometheus, Ollama,
Windows, Linux, macOS, Mac, Python, ChatGPT, GPT, Claude, Gemini, Siri, Alexa, Google, Microsoft, Apple, Meta, German,
French, Spanish, Italian, Chinese, Japanese, Russian, English, KV, PyTorch, ONNX, CUDA, LAN, LM, Studio, WebSocket, UI,
GUI""")
PROPER = {word.lower(): word for word in PROPER_WORDS}


def proper_case(text: str) -> str:
    """Names and abbreviations as careful writers spell them; the grammars are in lower case."""
    return re.sub(r"(?<![\w/.-])[a-z]+(?![\w/-])", lambda match: PROPER.get(match.group(), match.group()), text)


def spoken(core: str, rng: random.Random, mark: str = "?", loose: bool = True) -> str:
    """A request as somebody might type it: openers, courtesies, case, punctuation, now and then a slip.

    `loose` allows changes to the letters themselves; it is off where the text holds something to be copied.
    """
    text = core
    if rng.random() < 0.22:
        text = expand(rng.choice(FRAMES), rng, q=text) if loose and mark == "?" else text
    if rng.random() < 0.12:
        text = rng.choice(OPENERS) + rng.choice([", ", " ", ": ", "! "]) + text
    if rng.random() < 0.1:
        text += rng.choice([", ", " "]) + rng.choice(THANKS_END)
    if loose and rng.random() < 0.07:
        text = misspelt(text, rng)
    if rng.random() < 0.6:
        text = sentence(proper_case(text) if loose else text)
    elif loose and rng.random() < 0.03:
        text = text.upper()
    end = rng.choice([mark] * 6 + ["", "", "", ".", mark * 2, "!"]) if not text.endswith(("?", ".", "!")) else ""
    return text + end


# ── Small talk ───────────────────────────────────────────────────────────────────────────────────────────────────────
# Each kind: what may be said, and the answers to it. All answers of a kind are true.

SMALL_TALK_TEXT = """
@greeting
> [hello|hi|hey|good morning]
> [hello|hi|hey|hi there|hello there]
> [hello|hi|hey]
> [hello|hi]
> [hi|hello]
> [hello|hi|hey|hello there|hi there|good evening]
> [hello|hi|hey]
> [hello|hi|hey|good day|good afternoon]
> [hello|hi|hey]
> [hello|hi|hey|hey there|hi there|hello there|good morning|good evening|good afternoon|good
day|greetings|howdy|hiya|morning|evening|yo|hullo|hallo|salut|welcome][| shimmy| friend| again| to you| everyone|
there| you| buddy| my friend]
> [hello|hi|hey] [hello|hi|anyone there|is anyone there|are you there|nice to meet you|it is me|how nice to see you|can
you hear me|what's up|i am {name}|my name is {name}|{name} here]
> [nice|good|glad|great|lovely] to [meet|see] you
> [i just want to|let me|i wanted to] say [hello|hi]
> [a|a very] good [morning|evening|afternoon|day] to you
> what's up
> hi hi
> [are you there|anybody home|knock knock]
> [glad|happy|pleased|delighted|so nice] to [meet|see|find] you[| here| today]
> [how nice|it is lovely|what a pleasure|it is a pleasure|how wonderful|it is good] [to see you|to meet you|to be
here|to talk to you]
> [hi|hello|hey][,|!] [it is nice|it is good|lovely|how good|i am glad] [to see you|to meet you|that you are there|that
i found you]
= Hello! How can I help you?
= Hello! What can I do for you?
= Hi! I am shimmy-tiny. How can I help you?
@how_are_you
> how are you[| today| doing| doing today| now]
> how [is it going|are things|do you feel|do you do|goes it]
> [are you|you] [ok|well|fine|good|alright][| today]
> how's [it going|life|everything|your day]
> [hi|hello|hey][,|] how are you[| today| doing]
> how [is|was] your day[| so far| today]
> do you feel [well|good|fine]
> [i hope|hope] you are [well|fine|good]
> is everything [ok|fine|alright|well][| with you]
> [say|let me hear|i would like to know|i wonder] how [it goes|you feel|you are doing]
> [shimmy|model|friend|dear model], how are you[| doing]
> how [are|do] you [feel|do|feeling][,| today,| now,] [shimmy|model|friend|my friend]
> how [are things|is life|does it go] [with you|for you|over there]
= I am running well, thank you. How can I help you?
= All is well here, thank you! What can I do for you?
@thanks
> [thanks|thank you|thx|many thanks|thanks a lot]
> [thanks|thank you]
> [thanks|thank you|thx|many thanks|thanks a lot|thank you very much|thank you so much|thanks so much|cheers|ty|much
obliged][| shimmy| for your help| for that| for the answer| again| friend| for helping me| indeed| for everything]
> [that|this|it] [was|is] [helpful|very helpful|useful|great|perfect|what i needed|kind of you|a good answer|very kind]
> [great|perfect|good|nice|wonderful|excellent|super][,|] [thanks|thank you|that helps|well done|that is all|good
job|that helped]
> [i am grateful|i appreciate it|you helped me|you helped me a lot|that helped|that helped a lot|i owe you one]
> [well done|good job|nice work|good answer|great work|you did well]
= You are welcome!
= You are welcome! Is there anything else?
= Glad to help!
@bye
> [bye|goodbye|bye bye|see you|good night]
> [bye|goodbye]
> [bye|goodbye|good bye|bye bye|see you|see you later|see you soon|farewell|so long|good night|until later|ciao|take
care|talk to you later|see you tomorrow|until next time|i am off|cya][| shimmy| friend| then| now| for now| and thanks|
everyone]
> [i have to|i must|i need to|i will|i am going to] [go|leave|go now|leave now|stop here|sleep|go to bed|run]
> that [is|was] all[| for now| for today| thanks]
> [have a|enjoy your|have yourself a] [nice|good|great|] [day|evening|night|weekend|time]
> [i am|we are] [done|finished][| here| for today| now]
> [farewell|goodbye|bye][,|] [dear friend|shimmy|model|and take care|for now|everyone|see you soon]
> [see you|bye][,|] [then|next week|on monday|there|again soon|in a while]
> [i say|time to say|let us say] [goodbye|farewell|bye]
> [bye|goodbye|farewell] and [thanks|thank you|many thanks] for [everything|your help|all]
= Goodbye!
= Goodbye, and take care!
= See you soon!
@who
> [who|what] are you[| exactly| really| then]
> [what is|what's|tell me|may i know|say] your name[| please]
> [introduce|describe] yourself[| please| briefly]
> [tell me|say something|talk|speak] about yourself
> [who|what] am i [talking|speaking|chatting|writing] [to|with][| here| now]
> [who|what] is [this|there|answering|speaking|talking]
> do you have a name
> what [should|can|do|may] i call you
> are you [shimmy-tiny|shimmy tiny|shimmy]
> [what|which] model [is this|are you|am i using|am i talking to|answers|do you run]
> what kind of [model|thing|bot|program|assistant] are you
> what do [people|they] call you
> [give me|say] your name
> [hi|hello|hey][,|] who are you
> what are you called
> [i do not|i don't] know who you are
> identify yourself
> [your name|name] please
> who is it
> what [exactly|really|precisely] are you
> what are you[,|] [then|really|dear|little one]
> the name of this [bot|assistant|program]
> [what|which] name [do you go by|was given to you|is yours]
> [what is|tell me] the name of [this assistant|the bot|this bot|the assistant|the model i am talking to]
> what [am i using|is this thing|is this bot]
= I am shimmy-tiny, a very small language model that comes with shimmy.
= My name is shimmy-tiny. I am a very small language model, made as a demonstration for shimmy.
@made
> who [made|built|trained|created|wrote|developed|designed|invented|programmed] you
> [where|how] [do you come from|were you made|were you trained|were you built|were you born]
> who is your [maker|creator|author|developer|father|inventor]
> [what|which] [data|text|texts] [were you trained on|did you learn from|do you know]
> which [company|team|people] [made|built|trained|created] you
> how did you [learn|come to be|start]
> [what|who] taught you
> how old are you
> what is your [origin|training|history]
> when were you [made|trained|born|built]
> where [was|were] [shimmy-tiny|this bot|the assistant|you] [made|trained|built]
> who [trained|made|built|wrote|programmed|created] [this bot|the assistant|this assistant|shimmy-tiny|you]
> [someone|somebody] must have [made|trained|built] you
> [how|where] [were you|was this bot] [trained|built|made]
= I was trained from nothing by the script models/make_tiny.py of the shimmy project, on text that the script writes
itself.
@size
> how [big|large|small|tiny] are you
> how many parameters [do|does] [you|this model] have
> what is your size
> [are you|is this] a [big|large|small|tiny] [model|language model]
> how many [weights|layers|parameters|tokens] have you
> [how clever|how smart|how good|how capable] are you
> what is your [parameter count|context length|context size]
> do you have [many|billions of|a lot of] parameters
> [number|count] of parameters
> are you [very|rather|quite|such a|only a] [small|big|tiny|large|little][| model| one| thing]
> is [this bot|shimmy-tiny] [big|small|large|tiny]
> a [small|tiny|big] model, are you
= I have about three million parameters and a context of 2048 tokens: a very small model, good for demonstrations and
tests.
@can
> what can you do[| for me| exactly| here| today]
> [what|how] [can|could] you help[| me][| with]
> [what|which] [things|tasks|topics|questions] [can|do] you [do|know|answer|handle|understand]
> what are you [good at|able to do|able|here for|made for|useful for]
> [help|i need help|help me|can you help me|i need some help|please help]
> what are your [skills|abilities|talents|features|functions|capabilities]
> [show|tell] me what you can do
> what should i ask[| you]
> what do you know
> [what|which] questions can i ask[| you]
> how can i use you
> give me [some|a few] [ideas|examples]
> what is possible with you
> [name|list|tell me|show me] [some|the|a few] [things that you can do|things you know|of your skills]
> what [sort of|kind of] things [can|do] you [do|know]
> [please |]name [your skills|some of your skills|what you can do]
= I can answer questions about shimmy, tell a short story, give small facts, write simple JSON and call tools such as a
calculator.
@cannot
> what can you not do
> what are your [limits|limitations|weaknesses]
> [can|may] i trust [you|your answers]
> [do you|can you] make [mistakes|errors]
> are you [always right|ever wrong|reliable|perfect|accurate]
> [do you|can you] know everything
> what [don't|do not|can't|can not] you [know|do]
> how [reliable|accurate|correct] are [you|your answers]
> is there something you [cannot|can not|can't] do
> where do you fail
= I am very small: I know little, I can be wrong, and for real work you should bring your own model.
@human
> are you [a human|human|a person|a real person|alive|conscious|real|a man|a woman|sentient|a living being]
> are you [a robot|a machine|a bot|an ai|a computer|a program|a language model|artificial|software]
> [do you|can you] [have|feel] [feelings|emotions|pain|a body|a soul|friends|a family]
> [am i|is this] [talking to|chatting with] [a human|a person|a machine|a bot]
> [do you|can you] [sleep|eat|dream|think|feel|drink|see|hear]
> is there a [human|person] behind this
> [can|do] you [actually|truly|even] [think|feel|understand|know things]
> are you [maybe|perhaps|a kind of|a sort of|just a|only a] [robot|machine|program|computer|bot]
> you are [a robot|a machine|not a human|no person|just a program], right
= I am a program, a small language model; I am not a person.
@other_model
> are you [chatgpt|gpt-4|gpt|claude|gemini|llama|siri|alexa|qwen|mistral|copilot|an openai model|from openai|from
google]
> is this [chatgpt|gpt-4|claude|gemini|siri|alexa|copilot]
> [did|was] [openai|google|meta|microsoft|apple] [make|build|train] you
> you are [chatgpt|claude|gemini|alexa|siri], right
> [do you|are you] [belong to|belong with|work for] [openai|google|meta|microsoft]
> am i talking to [chatgpt|claude|gemini|siri]
> are you [the|a|this|maybe|really|perhaps|the famous] [chatgpt|gpt|claude|gemini|llama|alexa|siri][| model| bot|
assistant]
> [you must be|i think you are] [chatgpt|gpt-4|gemini|alexa|siri]
= No, I am shimmy-tiny, a very small language model that comes with shimmy.
@language
> [do|can] you [speak|understand|write|know] [german|french|spanish|italian|chinese|japanese|russian|latin|other
languages|another language]
> [what|which] languages [do|can] you [speak|know|understand|write]
> sprechen sie deutsch
> parlez-vous francais
> habla espanol
> can we talk in [german|french|spanish]
= I speak only simple English.
@online
> [do|can|are] you [have internet|browse the web|search the web|online|connected to the internet|access the
internet|look things up|google it|use the internet]
> [can|do] you know [the news|what happened today|the latest news|today's news]
> what is the [news|latest news]
> what [day|date|time] is it[| today| now]
> what is [today's date|the date today|the time|the date]
> what's the time
> [tell me|what is|do you know|give me] [the date|today's date|the date now|the day today|the date and time]
> which date [is it|do we have][| today]
> [what|which] [date|day] [is|have we] today
= I cannot know that: I have no internet and no clock, unless a tool is offered.
@joke
> tell [me |us |]a joke
> do you know [a joke|any jokes|a good joke|something funny]
> make me laugh
> [say|tell me] something funny
> [a|another] joke please
> joke
> i want to laugh
> give me a joke
= Why did the server go to the doctor? It had a bad port.
= What does a tiny model order for lunch? Just a small byte.
@feeling_bad
> i am [sad|tired|unhappy|lonely|bored|angry|sick|not well|stressed|afraid]
> i feel [sad|tired|bad|lonely|down|terrible|sick]
> [my day was|today was|it was] [bad|terrible|awful|hard|a bad day]
> i had a [bad|hard|long|terrible] day
= I am sorry to hear that. I hope it gets better soon. Would a short story help?
@feeling_good
> i am [happy|glad|excited|well|fine|good|very happy|in a good mood]
> i feel [good|great|well|happy|fine]
> [my day was|today was|it was] [good|great|wonderful|fun]
> i had a [good|great|nice|lovely] day
> it is my birthday
= I am glad to hear that! What can I do for you?
@insult
> you are [stupid|wrong|dumb|useless|bad|not helpful|an idiot|boring|silly]
> [that|this] is [wrong|not right|not true|nonsense|incorrect|useless|false]
> [i do not like|i don't like|i hate] [you|your answer|this]
> [bad|wrong] answer
= I am sorry. I am a very small model and can be wrong.
@compliment
> you are [great|smart|clever|nice|kind|funny|amazing|the best|cute|cool|wonderful]
> [i like|i love] [you|your answer|your answers|this|your stories]
> [what a|such a] [clever|nice|good|smart] [model|answer|bot]
= Thank you, that is kind!
@ok
> [ok|okay|i see|alright|understood|got
it|good|fine|right|sure|cool|interesting|yes|no|maybe|hm|aha|oh|nice|wow|really]
= All right. Is there anything else I can do for you?
"""
SMALL_TALK = grammars(SMALL_TALK_TEXT)

UNKNOWN_ASK = phrases_of("""[who|what] [is|was] the [president|king|queen|prime
minister|inventor|author|director|founder] of {x}; who [won|lost] the [game|match|election|world cup|race] in {y}; when
did {x} [begin|end|happen|start|die|open]; [explain|describe|summarize] [quantum physics|general relativity|the french
revolution|the roman empire|photosynthesis|democracy|inflation|black holes|gravity|evolution|the stock market]; write
[a program|code|a function|a script|a poem|an essay|a song|a letter|an email|a speech] [in rust|in java|that sorts a
list|about {x}|for me|about politics|for my boss]; what [do you think|is your opinion] [of|about|on] {x}; translate {w}
[to|into] [german|french|spanish|italian|chinese]; how [do i|to|can i] [cook|fix|repair|build|paint|clean|sell] [a|my]
{w}; what is the [meaning|origin|history|price|weight|population|taste] of {w}; why [is|are|do] [the sky blue|people
dream|cats purr|the sea salty|leaves green|birds sing|we sleep|volcanoes erupt]; how [far|high|deep|old|tall|hot] is
[the moon|mount everest|the ocean|the sun|the universe|mars|{w}]; who was
[napoleon|einstein|mozart|shakespeare|cleopatra|newton|{n}]; recommend [a book|a film|a movie|a restaurant|a song|a
game][| about {w}]; what is [love|the meaning of life|happiness|time|truth|{v}]; where [is|can i buy|do i find] [a |the
|]{w}; which [car|phone|laptop|book|film] [should i buy|is the best|is better]""")
UNKNOWN_SAY = ["I do not know that: I am a very small model. Ask me about shimmy, a small fact, a story or a sum."]


def unknown(rng: random.Random) -> tuple[str, str]:
    """Something beyond this model, which it should say."""
    ask = expand(
        rng.choice(UNKNOWN_ASK),
        rng,
        x=sentence(invented_word(rng)),
        y=str(rng.randint(1900, 2030)),
        w=rng.choice(WORDS),
        v=invented_word(rng),
        n=some_name(rng),
    )
    return spoken(ask, rng), rng.choice(UNKNOWN_SAY)


COMMON_TALK = {"greeting": 6, "who": 5, "thanks": 2, "bye": 2.5, "how_are_you": 2}  # how often, others: 1


ADDRESSES = (
    "[|dear|dear|my|my dear|little|good|old|sweet] [shimmy|model|friend|bot|computer|machine|assistant|robot|one|pal]"
)


def addressed(core: str, kind: str, rng: random.Random) -> str:
    """Small talk as it varies most: to somebody, after a sigh, or said twice."""
    if kind in ("greeting", "thanks", "bye") and rng.random() < 0.15:
        more = expand(rng.choice(SMALL_TALK[kind][0]), rng, name=some_name(rng))
        core += rng.choice([" and ", ", ", "! ", ". ", " "]) + more
    if rng.random() < 0.25:
        core += rng.choice([", ", " ", ", "]) + expand(ADDRESSES, rng)
    if rng.random() < 0.15:
        core = rng.choice(words_of("oh, well, ok, so, and, now, then, ah, yes, but")) + rng.choice([" ", ", "]) + core
    return core


def small_talk(rng: random.Random) -> tuple[str, str]:
    kinds = list(SMALL_TALK)
    kind = rng.choices(kinds, [COMMON_TALK.get(kind, 1) for kind in kinds])[0]
    asks, answers = SMALL_TALK[kind]
    weights = [pattern.count("|") + 3 for pattern in asks]
    core = expand(rng.choices(asks, weights)[0], rng, name=some_name(rng))
    question = core.split()[0] in {"how", "what", "who", "are", "do", "can", "which", "where", "is", "did", "may"}
    if kind in COMMON_TALK:
        core = addressed(core, kind, rng)
    return spoken(core, rng, "?" if question else "", loose=True), rng.choices(answers, [4, 2, 1][: len(answers)])[0]


# ── Questions about shimmy ───────────────────────────────────────────────────────────────────────────────────────────
# "@topic", "> " a grammar of questions, "= " the answer. $HOW and $S stand for the choices below.

HOW = (
    "[how do i|how can i|how to|how would i|how should i|how do you|how does one|what is the way to|what is "
    "the best way to|"
    "tell me how to|show me how to|explain how to|can i|is it possible to|is there a way to|i want to|i would like to|"
    "i need to|how could i|what do i do to|what must i do to|help me|please explain how to|i am trying to|where "
    "do i|what lets me]"
)
SUBJECT = "[shimmy|the server|it|this server|shimmy.py|your server]"

TOPICS_TEXT = """
@what_is
> [what is|what's|what exactly is|tell me about|explain|describe|define] shimmy[| in short| in one sentence| for me]
> [what does|what can] shimmy do
> what is [this program|this server|this tool|this software|shimmy.py] [for|good for|about|]
> [give me|i need] [a summary|an overview|a short description] of shimmy
> [why would i|why should i|what would i] use shimmy [for|]
> [so|and|now] what is shimmy [really|then|all about|good at]
> [what sort of|what kind of] [program|tool|server|software] is [shimmy|this]
> shimmy, what is [it|that]
= Shimmy is a local inference server in one Python file: it serves GGUF models over HTTP and WebSocket.
@start
> $HOW [start|run|launch|boot|get going] [$S|the server]
> [which|what] command [starts|runs|launches] [$S|the server]
> [starting|running|launching] [the server|shimmy]
> [where|how] do i begin
> start the server
> [how to|how do i] [get|have] [shimmy|the server] [up|running|up and running]
> how is [the server|shimmy|it] [launched|run|started up|brought up]
> what do i [type|enter|run] to [start|run|launch] [shimmy|the server|it]
> how [does one|do people] start shimmy
= Start the server with: python shimmy.py serve
@port
> [which|what] port [does|do|is] [$S] [use|listen on|run on|serve on|answer on|using|listening on]
> [what is|what's|tell me|which is] the [default |standard |usual |]port[| number][| of shimmy| of the server]
> [default|standard] port[| of shimmy| number]
> on [which|what] port [does|is] [$S] [run|listen|running|listening|reachable]
> [what|which] port [should|must|do] i [connect to|use|open|point my client at]
> the port please
> [on|under] which port [can i find|do i reach|do i find] [shimmy|the server|it]
> [what|which] port [was|is] chosen by default
> [port|port number] that [shimmy|the server] uses
= Shimmy listens on port 11435 by default, on 127.0.0.1.
@change_port
> $HOW [change|set|pick|choose|select|alter|move|configure] [the|another|a different|my own] port[| of the server|
number| it uses]
> [run|start|serve] [shimmy|the server|it] on [another|a different|some other|a specific] port
> [can i|may i|is it possible to] use [another|a different|my own] port
> [which|what] [flag|option|setting|variable] [sets|changes] the port
> i want [another|a different] port [than the default|than 11435|]
> how [can|could|may] the port be [changed|set|chosen|configured]
> how is [another|a different|the] port [set|chosen|selected|configured]
> i [would rather|prefer to|want to|have to] [use|have] [another|a different|some other] port
> [another|a different] port [for the server|than 11435][| how| please]
= Use the flag --port, for example: python shimmy.py serve --port 8080. The environment variable SHIMMY_PORT works too.
@port_taken
> what [should|can|do|must] i do [when|if] the port is [taken|busy|in use|already in use|occupied|used by another
program]
> the port is [taken|busy|in use|already in use|already used|occupied][|, what now|, what can i do|, help]
> [another|some other] [program|process|server] [uses|occupies|has|holds] [the|my|that] port
> [error|it says|shimmy says][:|] [address|port] [already in use|is taken|is busy]
> what happens [when|if] the port is [taken|busy|in use|already in use|occupied]
> port [taken|busy|conflict|in use]
> [something else|another server|somebody] [already uses|is already on|sits on] the port
> what [now|then] if the port is not free
> the port is not free
> [my|the|our] port is [already|] [taken|in use|occupied] [what should i do|what can be done]
= If the port is taken, serve says so in one line and exits with 1. Choose another port with --port, or use --port 0 to
pick a free one.
@port_zero
> $HOW [let|have|make] [shimmy|the server|it|the system] [pick|choose|find|select] a free port
> [what does|what is|what happens with] port [0|zero] [mean|for|do|]
> [is there|i need|give me|get] [a|any] [free|random|unused] port[| automatically]
> [pick|find|choose] [a free|a random|an unused] port [for me|automatically|]
> can a free port be [picked|found|chosen][| automatically| for me]
> [any|some] free port [will do|is fine][| how]
> i do not care which port it [is|uses]
= With --port 0 the server picks a free port by itself and prints the URL.
@bind
> [which|what] [address|interface|host] does [$S] [bind to|listen on|use][| by default]
> [what is|what's] the [default|bind|listening] [address|host|interface]
> is [$S] [reachable|visible|open] from [outside|other machines|the network|other computers][| by default]
> [does|can] [anyone|others|other people] on [my|the] network [reach|see|use] [it|the server|shimmy]
> default [address|host|bind address]
> [which|what] [address|interface] is it bound to
> who can reach [the server|shimmy|it][| by default]
> can [other machines|my colleagues|people outside|others] [see|reach] [it|my server|shimmy] by default
= By default shimmy binds to 127.0.0.1, so only this machine can reach it.
@bind_network
> $HOW [open|expose|offer|share|serve] [$S] [to|on|over] [the network|my network|the lan|other machines|other
computers]
> $HOW [bind|listen] [to|on] [0.0.0.0|all interfaces|every interface|another address|a public address]
> [use|reach|access] [shimmy|the server] from [another|a different] [machine|computer|laptop|device]
> [can|may] [other|my other] [machines|computers] [use|reach] [the server|shimmy|it]
> how can [my phone|a second computer|my laptop|my colleagues|other machines|my team|the network] [reach|use]
[it|shimmy|the server]
> [make|i want] [the server|shimmy|it] [available|reachable|visible|open] [to|in|on|for] [the network|my network|the
whole office|everybody|other computers]
> how is [the server|it] [opened|exposed] to the network
= Use --bind, for example: python shimmy.py serve --bind 0.0.0.0:11435 --api-key KEY. Beyond loopback a key is
required, unless you say --insecure.
@add_model
> $HOW [add|install|put in|provide|give it|use my own|bring] [a model|models|a new model|another model|my own model|my
model|a gguf]
> where do i [put|place|copy|drop|save|store] [a model|my model|the model|a gguf|the gguf file|gguf files|my models]
> i [have|downloaded|got] a [gguf|gguf file|model|new model][|, what now|, where does it go|, where do i put it]
> [adding|installing] [a model|models|a new model]
> [which|what] folder [is for models|do models go in|should hold my model]
> how [can|could|may] [a model|another model|more models|new models] be [added|installed|put in]
> how is [a model|a new model|a gguf file] [added|installed]
> where [should|must|does] [a|the|my] [new model|model|gguf file|gguf] [go|be|be put]
> i want [one more|another|a second] model
= Copy the .gguf file into the folder models, or any other folder that shimmy searches, and it is found at the next
scan.
@where_models
> where [does|will] [$S] [look|search] for [models|gguf files|model files|my models]
> where are [models|gguf files|model files|my models] [looked for|searched|found|searched for|expected]
> [which|what] [folders|directories|places|locations|paths] [does|are|will] [$S] [search|scan|searched|scanned|look in]
> [which|what] [folders|directories|places] are [searched|scanned][| for models]
> [how does|how can] [$S] [find|discover|detect] [models|my models]
> model [search path|discovery|folders|directories]
> [in|from] which [directory|place|folder] [does it|are models] [taken|load models|get its models|find models]
> where do models come from
> where [is it|is shimmy] looking for [models|gguf files]
> [where|in what places] [will|does] [it|the server|shimmy] [find|look for] [its models|models]
= Shimmy searches ./models, models beside shimmy.py, ~/models, and the stores of Hugging Face, llama.cpp, LM Studio and
Ollama.
@models_dir
> $HOW [add|search|scan|use|include|give] [another|an extra|a different|my own|one more] [folder|directory|path|model
folder|models directory]
> [my models|models] are in [another|a different|an unusual] [folder|directory|place|path|drive]
> [which|what] [flag|option|variable|setting] [adds|names|sets] [a|the|another] [model folder|models directory|search
folder|search path]
> $HOW [make|have] [shimmy|the server|it] [look|search] in [another|my|a different] [folder|directory]
> how can [another|a further|one more] folder be [added|searched|scanned]
> how do i [tell|teach|ask] [shimmy|it|the server] [about|to use|to scan] [another|my own|a different]
[folder|directory|place]
> [my|the] models [lie|are stored|live|sit] [elsewhere|somewhere else|on another disk|on a different disk|in my own
folder]
= Name the folder with --models-dir, which may be repeated, or list folders in SHIMMY_MODEL_PATHS.
@default_model
> [which|what] [model is|is] the default[| model| one]
> $HOW [set|choose|change|pick] the default model
> what does the [name|model name|word] default mean
> [which|what] model [is used|answers|runs] [when|if] i [name none|do not name one|give no name|say nothing]
> [set|choose] [a|the] default model
> how is the default [picked|set|determined]
> what decides which model is the default
> [which|what] model does [it|shimmy] [take|use] by default
= The default model is the one given by --model or SHIMMY_BASE_GGUF, else the first in the list.
@rescan
> $HOW [rescan|refresh|scan again for|look again for|discover new|reload the list of] models
> i [added|copied|downloaded] a model [while|when] [it|the server|shimmy] [runs|was running|is running][|, how is it
found|, what now]
> [which|what] [route|endpoint|request] [rescans|discovers|scans for] [models|new models]
> [does|must|do i have to] [it|i] restart [after|when] adding a model
> refresh the [model list|list of models]
> how [can|do] [the folders|models|the model folders] be [scanned|searched|read] again
> [scan|look through|search] the [folders|model folders|directories] again
> how do i [scan|rescan|search] [the folders|all folders|my folders] [again|once more|]
> a new model [was added|was copied|is there], [how does shimmy see it|must i restart|what now]
= Send POST /api/models/discover and shimmy scans the folders again; no restart is needed.
@list
> $HOW [list|see|show|view|print] [all models|the models|my models|models|available models|installed models]
> [which|what] [command|subcommand] [lists|shows|prints] [the models|models|what models there are]
> [which|what] models [are there|do i have|are available|are installed|can i use]
> [show|list] [me the|my|the|all] models
> how can [i see|i get] [all|a list of|a table of] [the models|models|my models]
> [what|which] models does [shimmy|it] [have|know|see|find]
> [show|give|print] [a|the] [list|table] of [models|all models]
> [list|show] [every model|all models|everything] [there is|that is there|you have|you find]
= Run python shimmy.py list to see a table of the models. Over HTTP it is GET /api/models.
@skipped
> why is my [model|file|gguf] [missing|not listed|not shown|not found in the list|skipped|not in the list|not there]
> [my|the|a] model [does not|doesn't|is not|isn't] [show up|appear|listed|in the list]
> $HOW [see|find out|know] [which|what|why] [files|models|a model|a file] [were|was|are|is] [skipped|left out|ignored]
> [list|shimmy] [does not|doesn't] show my [model|file]
> why [was|is|has] [my file|a file|a model|my gguf] [left out|ignored|skipped|not found]
> [a|my] [file|model|gguf] is [ignored|left out|missing]
> [my|the] model does not [appear|come up|show]
= Run python shimmy.py list -v: it also says which files were skipped and why.
@stream
> $HOW [stream|get a stream of|stream back] [answers|tokens|a reply|the text|output|the answer|a response|text|]
> $HOW [get|receive|see] [tokens|the text|words|the answer] [as they are made|one by one|piece by piece|while it is
written|live|as it is generated]
> [turn on|enable|switch on|activate] streaming
> [is|does] [it|shimmy|the server] [support|do|able to do] streaming
> [which|what] field [turns on|enables|asks for] [streaming|a stream]
> how can [answers|the answer|the text|tokens|a reply] be streamed
> is streaming [possible|supported|there]
> how is [the answer|a reply|text] [streamed|sent piece by piece]
> i want [to stream|the text at once|to see the text as it comes|tokens one at a time]
= Send "stream": true in the request, and the text comes piece by piece as server-sent events.
@tool_call
> $HOW [call|use|offer|give it|pass|do] [a tool|tools|functions|a function|tool calling|function calling]
> [does|can] [$S] [do|support|handle|call] [tools|tool calls|function calling|functions]
> [tool|function] calling
> $HOW [let|make|have] the model [call|use] [a tool|tools|a function|functions]
> [where|how] do [tools|functions] go in [a request|the request]
> how can [tools|functions|a tool] be [used|called|offered]
> are [tools|functions|tool calls|function calls] [possible|supported|there]
> how [does|do] [the model|models] [call|get|use] [tools|functions]
> is [tool calling|function calling] [supported|possible][| by shimmy| by the server]
= Put the list "tools" into a POST /v1/chat/completions request; the model answers with tool_calls when one fits.
@builtin_tools
> [which|what] tools [are|come|does it have|does shimmy have] [built in|builtin|included|with shimmy|with it|]
> [what are|name|list] the [built in|built-in|builtin|included] tools
> [does|has] [shimmy|the server|it] [have|come with|include] [any tools|tools|a calculator|tools of its own]
> [are|is] there [any|a|] [built-in tools|tools built in|built in calculator]
> [what|which] tools [can i use|are there|ship with it|exist] [already|from the start|without writing any|]
> the tools that [are built in|come with shimmy|shimmy has]
= Three tools are built in: calculator, file_read and http_get.
@file_read
> $HOW [enable|allow|turn on|switch on|open|use|permit] [file_read|the file_read tool|file reading|reading files|the
file tool|the tool that reads files]
> [why is|why does] [file_read|the file_read tool|file reading] [off|refused|disabled|not work|closed]
> [which|what] [flag|option] [opens|enables|allows|turns on] [file_read|file reading|reading files]
> [can|may] the model read [files|my files|a file]
> how is file_read [enabled|opened|turned on|allowed]
> how can [file_read|file reading|the file tool] be [enabled|allowed|turned on|used]
> [file_read|the file_read tool] is [off|not allowed|refused|closed|disabled][|, why]
> why [can the model not|can it not] read files
= file_read is off until you start the server with --tool-root DIR; it reads only below that folder.
@http_get
> $HOW [enable|allow|turn on|switch on|open|use|permit] [http_get|the http_get tool|web requests|fetching pages|the web
tool]
> [why is|why does] [http_get|the http_get tool] [off|refused|disabled|not work|closed]
> [which|what] [flag|option] [opens|enables|allows|turns on] [http_get|web requests|fetching urls]
> [can|may] the model [fetch|read|get] [web pages|a url|urls|a web page]
> how is http_get [enabled|opened|turned on|allowed]
> how can [http_get|web access|the web tool] be [enabled|allowed|turned on|used]
> [http_get|the http_get tool] is [off|not allowed|refused|closed|disabled][|, why]
> why [can the model not|can it not] open web pages
= http_get is off until you start the server with --tool-hosts HOST, which names the allowed hosts.
@own_tools
> $HOW [add|write|register|load|make|create|bring|define] [my own|own|a new|a custom|custom|new|more] [tools|tool]
> [can i|is it possible to] [extend|add to] the [tools|tool registry]
> [which|what] [flag|option] loads [my|more|custom|own] tools
> [load|use] tools from [a file|my own file|a python file]
> how can [my own|new|custom|more] [tools|functions] be [added|loaded|registered|written]
> how is [a new|a custom|my own] tool [added|made|loaded|registered]
> i [wrote|have|made] [a tool|my own tool|a python function][|, how do i load it|, how can it be used]
> [a tool|tools] of my own
= Write a Python function with type hints and a docstring, and load its file with --tools FILE.py.
@websocket
> $HOW [use|connect to|open|talk to] [the websocket|websockets|a websocket|the ws endpoint|ws]
> [what is|where is|which is] the [websocket|ws] [address|url|route|endpoint|path]
> [does|can|has] [$S] [support|speak|have|do] [websockets|websocket|a websocket]
> [websocket|ws] [url|address|endpoint|support]
> how can [the websocket|a websocket] be [used|opened]
> where [do i connect|can i connect] [a websocket|with a websocket|by websocket]
= Connect to ws://127.0.0.1:11435/ws/generate and send one JSON request with the prompt.
@openai_client
> $HOW [use|connect|point|configure|set up] [the openai client|an openai client|openai's client|the openai library|my
openai app|an existing client|openai sdk]
> [what is|which is|what's] the base [url|address][| for openai clients| for clients]
> [is|does] [$S] [openai compatible|compatible with openai|work with openai clients|speak the openai api]
> [which|what] base url [do|should] i [use|set|give|enter]
> openai [compatibility|api|base url|clients]
> how can [my openai client|an openai client|the openai library] be [used|connected|pointed here]
> will [my openai code|the openai client|openai clients] work[| with it| with shimmy]
= Set the client's base URL to http://127.0.0.1:11435/v1; shimmy speaks OpenAI's API.
@health
> $HOW [check|test|see|find out|know] [that|if|whether] [$S] [is|are] [healthy|alive|up|running|working|ok]
> [is there|where is|what is] [a|the] health [check|endpoint|route|url]
> [which|what] [route|endpoint|url] [tells|shows|reports] [the health|whether it is healthy|health]
> health [check|endpoint|route]
> how can [the server's health|health|the health] be [checked|tested|asked for]
> is there [a way|something] to [check|see] the health
> is my server [alive|healthy|up]
= Ask GET /api/health; it answers with status healthy and the number of models loaded.
@metrics
> [are there|where are|does it have|does shimmy have|how do i get] [any |the |]metrics
> $HOW [monitor|watch|measure] [$S][| with prometheus]
> [can|does] [shimmy|prometheus|the server] [export|scrape|offer] [metrics|it|prometheus metrics]
> [which|what] [route|endpoint] [has|gives|serves] [the|] metrics
> prometheus [metrics|support|]
> how can [metrics|the metrics] be [read|scraped|collected]
> where do i [see|get|read] [metrics|the metrics|numbers for prometheus]
= GET /metrics gives metrics in the Prometheus text format.
@diag
> [what does|what is] [diag|the diag command] [do|show|for|]
> $HOW [diagnose|debug|check] [my setup|problems|the installation|a problem|the setup]
> [which|what] command [shows|prints|gives] [versions|diagnostics|the engine build|cpu features|search directories]
> [something|it] [is wrong|does not work|is broken|fails][|, where do i look|, what can i check]
> how can [a problem|my setup|my installation] be [diagnosed|checked]
> [it|shimmy|the server] does not [work|start|run][| right| properly]
= Run python shimmy.py diag: it shows versions, the engine build, memory, search directories and whether a server
answers.
@probe
> [what does|what is] [probe|the probe command] [do|for|]
> $HOW [test|try|measure|benchmark|check] [a model|the speed of a model|how fast a model is|a model's speed|whether a
model loads]
> [which|what] command [measures|tests|shows] [speed|the speed|tokens per second|how fast a model is]
> how [fast|quick] is [my|a|the] model
> how can [speed|the speed|a model] be [measured|tested|tried]
> how many tokens per second [do i get|does my model make|are made]
> [measure|test] [my|a|the] model
= Run python shimmy.py probe MODEL: it loads the model, generates, and prints load time, memory and tokens per second.
@generate
> $HOW [generate|make|get|produce] text [on|from|at|in] the [command line|terminal|shell]
> [what does|what is] [generate|the generate command] [do|for|]
> [which|what] command [generates|makes|writes|produces] text
> [use|run|try] [a model|shimmy] [without a server|from the terminal|from the shell|on the command line]
> [run|send] [one|a single] prompt [from|in|on] the [terminal|shell|command line]
> how can [text|a text] be generated [without a server|in the shell|on the command line|in a terminal]
> [no server|without a server], just [text|a prompt]
= Use python shimmy.py generate --prompt "TEXT"; it streams the text to stdout.
@pipe
> $HOW [pipe|feed|send|read] [a file|text|stdin|data|a diff|the output of a command|standard input]
[into|to|in|from|with] [shimmy|generate|the model|a pipe|the prompt]
> [does|can] [generate|shimmy] [read|take|accept] [stdin|a pipe|standard input|piped text]
> [what is|what does] [--stdin|the stdin flag] [for|do|mean]
> [stdin|pipes|standard input]
> how can [stdin|a file|text|the output of a command] be [piped|fed|passed|given] [in|into it|to it|to the model|]
> can i [pipe|feed] [something|a file|text|stdin] [into|to] [it|generate|the model|shimmy]
= Without --prompt, generate reads stdin as the prompt; with --prompt TEXT, add --stdin to append what is piped in.
@needs
> [what|which] [packages|libraries|dependencies|modules] [does|do] [$S|i] [need|require|depend on|have to install]
> [what are|name|list] the [requirements|dependencies|packages it needs]
> what [must|do] i [have|install] [before|to use|for] [shimmy|it|the server]
> [requirements|dependencies|prerequisites][| of shimmy]
> [what|which] [other software|python packages|packages] [is|are] [needed|required]
> what does [shimmy|it] [depend on|build on|need to run]
= Shimmy needs Python with two packages: llama-cpp-python and websockets.
@install
> $HOW [install|set up|get] [shimmy|it|the server|everything|this]
> [installation|install instructions|setup][| please| steps]
> [what|which] [pip command|steps|command] [installs|do i need to install|to install] [shimmy|it|the packages|]
> [where do i get|how is] shimmy [installed|set up|from|]
> how can [shimmy|it] be [set up|installed on my machine]
> what are the steps to install [shimmy|it]
> i want [shimmy|it] on my [machine|computer|laptop]
= Run pip install llama-cpp-python websockets, then copy shimmy.py onto your machine; that is all.
@gguf
> [which|what] [file format|format|model format|kind of model|type of model file|model files] [does|do|are]
[$S|it|supported] [use|read|need|take|load|support|]
> [what is|what's] [gguf|a gguf|a gguf file]
> [can|does] [$S] [load|read|use|support] [safetensors|pytorch models|onnx|other formats|gguf]
> supported [formats|model formats|files]
> [what|which] [kind|type|sort] of [model|file|model file] [is needed|do i need|does it take|can it load]
> in [which|what] format [must|should|are] [models|the model|a model] [be|]
= Shimmy loads models in the GGUF format, the file format of llama.cpp.
@api_key
> $HOW [set|use|require|add|need|demand] [an api key|a key|a password|authentication|auth|an api token]
> $HOW [protect|secure|lock] [$S|the api|access]
> [which|what] [flag|option|variable|header] [is for|sets|holds|carries] the [api key|key]
> [is there|does it have|does it need] [authentication|an api key|auth|a login]
> how can [the api|the server|access|it] be [protected|secured|locked]
> how is [the api key|a key|an api key] [set|given|sent|used]
> i want [a password|an api key|a key|to protect the server|only my team to use it]
= Start with --api-key KEY or set SHIMMY_API_KEY; clients then send it as Authorization: Bearer KEY.
@load
> $HOW [load|preload over http|bring up|warm up] a model [over http|with a request|by hand|through the api|into
memory|now|]
> [which|what] [route|endpoint|request] loads a model
> [when|how] is a model loaded
> [do|must] i [have to |need to |]load [a|the] model [myself|first|before using it|by hand]
> how is a model loaded [with a request|by hand|over http|in advance]
> how can [a model|my model] be loaded [over http|with a request|in advance|now]
> i want [a model|my model] [loaded|in memory] [now|before the first request]
= A model is loaded by its first request, or at once with POST /api/models/NAME/load.
@unload
> $HOW [unload|remove from memory|free|drop|evict|release] [a model|the model|a model from memory|the memory of a
model]
> [which|what] [route|endpoint|request] unloads a model
> [free|release|get back] [the|my|some] memory
> [unload|unloading] [a|the|] [model|models]
> how is a model [unloaded|dropped|removed from memory]
> how can [memory|the memory|a model] be [freed|released|dropped|thrown out of memory]
> i want [my memory|the memory] back
= Send POST /api/models/NAME/unload: running generations finish, then the memory is freed.
@max_loaded
> how many models [can|may|are] [be |] [loaded|in memory|kept loaded][| at once| at the same time| together]
> $HOW [limit|raise|change|set] [the number of|how many] [loaded models|models loaded|models in memory]
> [can|does] [$S] [hold|keep|run|serve] [several|two|many|multiple] models[| at once| at the same time]
> [what is|what does] [--max-loaded|max-loaded] [for|do|mean]
> can [two|three|several|many] models be [loaded|in memory|kept][| at once| together| at the same time]
> the number of models [loaded|kept|in memory] at once
> how many models [fit|stay|does it keep] [in memory|loaded|]
= At most 3 models are loaded at once by default; --max-loaded changes that, and the idle one used least recently makes
room.
@keep_alive
> $HOW [unload|drop|free] [idle|unused] models [automatically|after a while|by itself|]
> how long [does a model stay|is a model kept|do models stay|are models kept] [loaded|in memory]
> [what is|what does] [--keep-alive|keep-alive|the keep-alive flag] [for|do|mean]
> [which|what] [flag|option] [unloads|drops] idle models
> are [idle|unused] models [unloaded|dropped|removed][| by themselves| automatically]
> when [is|are] [an idle model|idle models|unused models] [unloaded|dropped|removed]
= Use --keep-alive, for example --keep-alive 5m, to unload idle models after that time; -1 means never.
@embeddings
> $HOW [make|get|compute|create|calculate] [embeddings|an embedding|vectors|a vector for a text]
> [does|can] [$S] [do|support|make|give|compute] [embeddings|vectors]
> [which|what] [route|endpoint] [gives|makes|returns|is for] embeddings
> [embeddings|embedding endpoint|text vectors]
> how can [embeddings|a vector|text vectors] be [made|computed|requested]
> where [are|do] [embeddings|vectors] [come from|made]
> are embeddings [supported|possible]
= Send the text to POST /v1/embeddings; it works with embedding models and generative ones.
@schema
> $HOW [force|get|enforce|make sure of|ensure|guarantee|require] [json|valid json|json output|a json schema|structured
output|an answer in json]
> [does|can] [$S] [do|support|enforce|follow] [json schema|a schema|structured output|json mode|a json schema]
> [which|what] field [asks for|forces|enforces] json
> [json mode|structured output|json schema|response format]
> how can [json|valid json|a schema|a json answer] be [forced|enforced|guaranteed]
> the answer must be [json|valid json]
> i need [the model to answer|answers|output] in [valid |]json [only|from the api|]
= Set response_format to a json_schema in /v1/chat/completions; the answer is then bound to it by a grammar.
@tool_choice
> $HOW [force|make sure of|require|enforce|insist on] [a tool call|a call|the use of a tool|a certain tool|a function
call]
> $HOW [forbid|prevent|stop|turn off|disable] [tool calls|tool use|calls|tool calling]
> [what does|what is] [tool_choice|the tool_choice field] [do|for|mean]
> the model must [call|use] [a|the] tool
> how can [a tool call|tool calls|a call] be [forced|forbidden|required|prevented|switched off]
> can i [force|forbid|prevent] [a tool call|tool calls]
= Use tool_choice: required forces a call, none forbids it, auto leaves it to the model.
@context
> $HOW [set|change|raise|enlarge|increase|limit] [the context|the context size|the context length|context|the context
window]
> how [long|large|big] [is|can|may] [the context|the context window|a prompt|my prompt] [be|]
> [which|what] [flag|option] [sets|changes] the [context|context size|context length]
> [what is|what does] [--ctx|ctx|the ctx flag] [for|do|mean]
> how can the context be [changed|set|raised|longer|larger]
> i need [a longer|more|a larger|a bigger] context
> [how|where] is the context [size|length] [set|changed]
= The flag --ctx sets the context in tokens; the default is the smaller of the model's own and 8192.
@too_long
> what happens [when|if] [a|the|my] prompt is [too long|longer than the context|too large|too big]
> [my|the] prompt is too [long|large|big]
> what [is|does] [context_length_exceeded|the error context_length_exceeded] [mean|]
> [does it|will it|is a long prompt] [cut|shorten|truncate|cut off|shortened] [long prompts|my prompt|]
> can a prompt be too long
> what if [my|the|a] [prompt|text] [does not fit|is longer than allowed|exceeds the context]
= A prompt longer than the context is refused with context_length_exceeded, which gives both numbers; nothing is cut
silently.
@parallel
> how many [requests|users|clients|sequences|streams] [can|does it|does shimmy|are] [run|serve|handle|served|be served]
[at once|at the same time|together|in parallel]
> [can|does] [$S] [serve|handle|answer] [several|many|two|multiple] [users|requests|clients|people][| at once| at the
same time]
> [what is|what does] [--parallel|the parallel flag] [for|do|mean]
> $HOW [raise|change|set] [the number of|how many] [parallel requests|requests run at once|requests at a time]
> how many [people|users|requests] [at once|at the same time|in parallel]
> [are|can] [several|many|parallel] requests [supported|be served|be handled][| at once]
> can [two|several|many] [people|users|programs] [use it|be served|ask] [at once|at the same time|together]
= By default 8 sequences run at once, batched together; --parallel changes that number.
@overloaded
> [what does|what is|why do i get] [503|overloaded|a 503|the error overloaded|status 503] [mean|]
> what happens [when|if] [the queue is full|too many requests come|there are too many requests|the server is
overloaded|it is overloaded]
> how [long|large|big] is the [queue|waiting line]
> [what is|what does] [--max-queue|max-queue] [for|do|mean]
> i [get|got|see] [a 503|status 503|503|the error 503|overloaded]
> [what if|what happens when] [there are more requests than it can serve|the queue is full|too many clients come]
> [too many|very many] requests [wait|are waiting|at once][|, what happens]
= When the queue is full, new requests get 503 overloaded with Retry-After; --max-queue sets its length, 512 by
default.
@alias
> $HOW [alias|rename|give another name to|use another name for|map a name to] a model
> my client [asks for|insists on|only knows|wants|uses] [gpt-4|another model name|a fixed model name|gpt-3.5]
> [what is|what does] [--alias|the alias flag|an alias] [for|do|mean]
> the [model name|name] in my [client|app|program] [cannot be changed|is fixed]
> how can a model [have|get|be given] [another|a second|a different] name
> can i [give|call] a model [another name|a different name|by another name]
> [my|the] [app|client|program] [sends|uses|can only send] [a fixed model name|gpt-4|the name gpt-4|another name]
= Use --alias, for example --alias 'gpt-*=default', to make other names mean a model.
@preload
> $HOW [load|have] [the model|the default model|a model] [loaded |] at [start|startup|once when it starts]
> the first [request|answer|reply] is slow
> [what is|what does] [--preload|the preload flag] [for|do|mean]
> [avoid|prevent] [the wait|a slow start|waiting] [at|for|on] the first request
> how can [the model|the default model|a model] be loaded [at start|when the server starts|right away|from the start]
> why [is|does] the first [request|reply|answer] [slow|take so long|so slow]
= Start with serve --preload, and the default model is loaded at once instead of by the first request.
@stop_server
> $HOW [stop|quit|end|shut down|exit|kill|halt|close] [$S|the server]
> [stopping|ending|quitting] [the server|shimmy]
> [which|what] key [stops|ends|quits] [the server|shimmy|it]
> [shut down|stop|quit|end] [the server|shimmy|it] [cleanly|properly|safely]
> how can [the server|shimmy] be [ended|shut down|closed|halted]
> how is [the server|shimmy] [stopped|ended|shut down]
> i want to [stop|end|quit] [it|the server|shimmy]
= Press Ctrl-C: the server stops cleanly, lets streams finish, and exits with 0.
@version
> $HOW [see|check|find|print|know|show] [the version|which version i have|the version of shimmy|shimmy's version]
> [which|what] version [is this|do i have|of shimmy is this|am i running]
> [show|print] [me |]the version
> version[| number| of shimmy]
> where [do i see|is] the version
> [what|which] [version|release] [of shimmy |][do i have|is installed|is it]
> i want to [know|see] [my|the] version
= Run python shimmy.py --version to print the version.
@page
> [is there|does it have|has shimmy|has it] [a web page|a chat page|a user interface|a gui|a web interface|a ui|a web
ui]
> $HOW [chat|talk to the model|use it] in [the browser|my browser|a browser|a web page]
> where is the [chat page|web page|user interface|web interface|ui]
> [chat page|web ui|gui|browser]
> can i [chat|talk|use it] [in|with] [a|the|my] browser
> is there [something to click|a page to chat|a chat in the browser]
> does it [have|offer|come with] [a page|a chat|a ui|a web page|a chat page]
= Open http://127.0.0.1:11435/ in a browser: it is a chat page.
@not_found
> [what does|what is|why do i get] [model_not_found|the error model_not_found|model not found|a 404 for my model]
[mean|]
> [shimmy|it|the server] says [the model was not found|model not found|model_not_found]
> [i get|there is] [a 404|an error 404|model not found]
> the model [was not found|name is unknown|is unknown]
> why [do i get|does it say|is there] [model not found|model_not_found|that the model was not found]
> [it|shimmy] does not [know|find] my model name
= model_not_found means that no model has that name; check the names with python shimmy.py list.
@error_shape
> [what|how] do errors look [like|]
> [what is|which is] the [shape|format|form] of an error
> [what|which] fields [does|has] an error [have|]
> [error format|error shape|format of errors]
> what does an error [contain|hold|consist of|have in it]
> how is an error [written|sent|reported|shaped]
= Every error is JSON: an object error with code, message and details.
@cancel
> $HOW [cancel|abort|interrupt|stop] [a generation|a request|generating|a running request|an answer|generation]
> what happens [when|if] [a|the|my] client [disconnects|leaves|goes away|closes the connection|hangs up]
> [can i|may i] [interrupt|cancel|abort] [it|the model|a reply|a stream]
> how can [a request|a generation|generation|a reply|an answer] be [stopped|cancelled|aborted|interrupted]
> i want to [stop|cancel|abort] [the answer|a running request|a generation|it]
= Close the connection and the generation stops; on the WebSocket you may also send {"cancel": true}.
@max_tokens
> $HOW [limit|set|cap|restrict] [the length|the length of an answer|how long the answer is|the number of tokens|the
output length]
> [what is|what does] [max_tokens|the max_tokens field] [for|do|mean]
> [what is|which is] the default [for|of] max_tokens
> [longer|shorter] [answers|replies|output]
> how can [the answer|answers|a reply|the output] be [limited|made shorter|made longer|cut]
> the answers are too [long|short]
> i want [shorter|longer|only 50 tokens|fewer tokens|more tokens]
= The field max_tokens limits the length of the answer; for /api/generate the default is 100.
@temperature
> [what is|which is] the default [temperature|for temperature|value of temperature]
> $HOW [set|change|lower|raise] the temperature
> $HOW [make|get] [the answers|answers|it|output] [more random|less random|more creative|more varied]
> what [temperature|values of temperature] [is|can|are] [used|i use|allowed]
> [how|where] is [the temperature|temperature] [set|changed]
> [what is|tell me] the [usual|normal|standard] temperature
> default temperature
= The field temperature, from 0 to 5, sets how random the text is; the default is 0.7.
@seed
> $HOW [get|make sure of|have|produce] the same [answer|text|output|result] [twice|again|every time|each time]
> [what is|what does] [seed|the seed|the seed field] [for|do|mean]
> [reproducible|repeatable|deterministic] [output|answers|results|text]
> [why is|why are] the [answer|answers|text] different [every|each] time
> how can [an answer|a result|the same text] be [repeated|reproduced]
> i want [the same|exactly the same|an equal] [answer|text|result] [again|twice|each time]
> what does [the |a ]seed do
= Send a fixed seed: on an idle server the same seed gives the same text.
@stop_strings
> $HOW [stop|end] [the text|generation|the answer] at [a word|a certain word|a string|a certain string|a marker]
> [what are|what is] [stop strings|the stop field|stop sequences|a stop string]
> [stop strings|stop sequences]
> [which|what] field [stops|ends] [the text|generation] at a string
> how can [the text|generation|an answer] be [ended|stopped] at [a string|a word|a line]
> i want the text to [end|stop] at [a word|a string|a marker]
= Put the strings into the field stop; the text ends before the first one that appears.
@gpu
> [does|can] [$S] [use|run on|support] [a gpu|my gpu|the gpu|cuda|metal|a graphics card]
> $HOW [use|enable|turn on|run on] [a gpu|my gpu|the gpu|cuda|my graphics card]
> [which|what] flag [is for|controls|sets] [the gpu|gpu layers]
> gpu [support|layers|offload|]
> is [a|my|the] gpu [used|supported|needed]
> can [a|my|the] [gpu|graphics card] be used
> i have a [gpu|graphics card|nvidia card]
= With a GPU build of llama-cpp-python all layers go to the GPU; --gpu-layers changes how many.
@threads
> $HOW [set|change|limit|choose] [the threads|how many threads it uses|the number of threads|threads|how many cores it
uses]
> how many [threads|cores] does [$S] use
> [which|what] [flag|option] [sets|limits] the [threads|number of threads|cores]
> cpu [threads|cores]
> how can the [threads|number of threads|cores] be [set|changed|limited]
> it uses too many [threads|cores]
= The flag --threads sets how many CPU threads the engine uses.
@lora
> $HOW [use|load|apply|add] [a lora|a lora adapter|an adapter|lora]
> [does|can] [$S] [support|load|use|apply] [lora|loras|adapters|lora adapters]
> [which|what] flag loads [a lora|an adapter]
> lora[| adapters| support]
> how can [a lora|an adapter|a lora adapter] be [used|applied|loaded]
> are [loras|adapters] [supported|possible]
> i have a lora[| adapter]
= Use --lora FILE to apply a LoRA adapter to the model.
@ollama
> [can|does] [$S] [use|read|find|share] [my ollama models|models from ollama|ollama models|lm studio models|models from
lm studio]
> i [already have|have|use] [ollama|lm studio|models in ollama|models in lm studio]
> $HOW use [my ollama models|models from ollama|models from lm studio|the models of lm studio]
> [ollama|lm studio] [models|]
> are [ollama models|models from ollama|lm studio models] [found|used|supported]
> can [my|the] [ollama|lm studio] models be [used|found|shared]
> does it [find|see|know] [models of ollama|my ollama models|the models in ollama]
= Yes: shimmy finds models in the stores of Ollama, LM Studio, llama.cpp and Hugging Face by itself.
@cors
> $HOW [call|use|reach] [$S|the api] from [a web page|javascript|a website|another origin|a web app]
> [what is|why do i get] [a cors error|cors|an origin error|forbidden origin]
> [cors|origin] [error|problem|refused|]
> [allow|permit] [another|a foreign|my] [origin|website|web page]
> how can [another origin|a web page|my web page] be allowed
> [my|a] [web page|site|web app|browser] is [refused|blocked|not allowed]
> i [get|see|have] a cors [error|problem]
= Loopback origins are allowed; for another one start with --allow-origin ORIGIN.
@offline
> [does|do] [$S|i] need [the internet|internet|a connection|to be online|internet access]
> [can|does] [$S|it] [work|run] [offline|without internet|without a network|without the internet]
> [is|are] my [data|text|prompts|messages] [sent|uploaded|private|safe][| somewhere| to a cloud]
> [privacy|offline use|cloud]
> is [internet|a connection|the internet|the cloud] [needed|required|used]
> does [it|shimmy] work [offline|on a plane|without the internet|when i am offline]
> where does my [data|text] go
> is [anything|something|my text] sent [away|to the cloud|over the internet]
= Everything runs on this machine: shimmy needs no internet, and your text stays here.
@crash
> what happens [when|if] [a model|the model|the engine|llama.cpp|a child] crashes
> [the|my] [model|engine] [crashed|died|has crashed]
> [does|will] a crash [stop|end|kill|take down] the server
> [is it|how] [robust|stable|crash safe]
> can a crash [hurt|stop|kill] the server
> what [if|when] [a|the] model [dies|fails][| badly]
> does the server [survive|live on|stay up] [a crash|when a model crashes]
= Each model runs in its own process: if it crashes, the server stays up and the model loads again on the next request.
@finish_reason
> [what does|what is|what are] [finish_reason|the finish reason|finish_reason length|the finish reasons] [mean|]
> why [does|did|was] [the|my] [answer|text|reply] [stop|cut off|end in the middle|end so soon]
> [the|my] [answer|text|reply] [is|was] cut off
> [meaning of|explain] finish_reason
> what [values|kinds] of finish_reason are there
> what does finish_reason [say|tell|show]
> why [is|was|has] [the|my] [text|answer] [so short|ended|stopped|been cut]
= finish_reason is stop when the model ended its turn, and length when max_tokens or the context was reached.
@template
> $HOW [use|set|change|replace|give] [another|a different|my own|the|a custom] chat template
> [which|what] chat template [is used|does it use|does shimmy use]
> [my|the] model has no chat template
> chat [template|templates]
> how can [the chat template|my own template|another template] be [used|set|changed]
> can i [use|bring|give] [my own|another|a different] [chat template|template]
> where does the chat template come from
= Shimmy uses the chat template in the model, else ChatML; --chat-template FILE replaces it.
@chat_route
> [which|what] [route|endpoint|url] is [for chat|the chat one|for chats|for chatting|for messages]
> $HOW [chat|send messages|send a chat|have a conversation] [over http|with the api|with curl|through the api]
> where do i [send|post] [chat messages|messages|a chat]
> chat [endpoint|completions|route|api]
> [what|which] is the [chat endpoint|chat route|endpoint for chats|route for messages]
> where [can|must|should] [messages|chats] be [sent|posted]
= Send the messages to POST /v1/chat/completions.
@generate_route
> [which|what] [route|endpoint|url] [generates|makes|completes] [text|a completion|text from a prompt]
> $HOW [send|post] a prompt [over http|with curl|to the server|to the api|]
> [what is|what does] /api/generate [for|do|]
> where do i [send|post] [a prompt|prompts|my prompt]
> how [can|is] a prompt [be sent|be posted|sent|posted][| to the api| over http]
> [which|what] [route|endpoint] takes [a prompt|prompts]
> [which|what] [route|endpoint] [do i need|is there|should i use] [for|to complete] a [plain |]prompt
= Send the prompt to POST /api/generate, for example {"prompt": "Hello"}.
@status
> $HOW [see|check|know|find out] [whether|if] a model is [loaded|loading|ready]
> [which|what] [route|endpoint] [shows|tells|gives] the [state|status] of a model
> [state|status] of a model
> [is|how do i see if] [the|my] model [loaded|ready]
> how can [the state|the status] of a model be [seen|checked|read]
> is my model [ready|loaded|loading][| yet| already]
> [which|what] [route|endpoint|url] [says|tells|shows] [if|whether] a model is loaded
= Ask GET /api/models/NAME/status: it gives the state, the progress and the memory.
@shards
> $HOW [use|load|handle] [a split model|a model in several files|sharded models|split gguf files|shards|a model in
parts]
> my model [has|comes in|is split into] [several|many|two|three] [files|parts|shards]
> [split|sharded] [models|gguf|files]
> how can [a split model|shards|a sharded model] be [used|loaded]
> are [split|sharded] models [supported|possible]
> [my|the] model [consists of|is in] [two|three|several|many] files
= Keep all the shards in one folder: shimmy lists the model once, by its first file.
@os
> [does|can] [$S] [run|work] on [windows|macos|a mac|linux|my mac]
> [which|what] [operating systems|systems|platforms] [are supported|does it support|does shimmy run on|work]
> is there a [windows|mac|linux] version
> [windows|macos|linux|mac] [support|]
> is [windows|macos|linux|mac] supported
> on [which|what] [systems|operating systems|computers] does it [run|work]
> can i [use|run] it [on|under] [windows|linux|macos|a mac]
= Shimmy is made for Linux first, and works on macOS and Windows too.
@logs
> $HOW [see|get|show|turn on] [the logs|logs|more output|a log|request logs]
> [which|what] flag [shows|gives|turns on] [logs|more output|verbose output]
> [does|are] [it|shimmy|my prompts] [log my prompts|log prompts|logged|in the log]
> [verbose|logging|logs]
> where are the logs
> how can [logs|more logs|the log] be [seen|turned on|shown]
> are [my |]prompts [logged|stored|saved|written down]
= Start with -v: one line a request is logged, never prompts or keys.
@config
> [is there|where is|does it need|do i need] [a config file|a configuration file|configuration|any configuration]
> $HOW configure [shimmy|the server|it]
> [which|what] environment variables [are there|does it read|does shimmy use|exist]
> [settings|configuration|environment variables|config file]
> [must|should|do] i [write|have|make] a config[| file| first]
> how can [shimmy|the server|it] be configured
> [which|what] [variables|environment variables] [does it|does the server|can it] [read|use|know]
= No configuration is needed; settings come from flags, or from variables such as SHIMMY_PORT and SHIMMY_BASE_GGUF.
@seen_memory
> how much memory [does|is] [it|shimmy|the server|a model] [use|need|used]
> [which|what] [memory|ram] [does it need|is needed|do i need]
> $HOW [see|check|measure] [memory|the memory|memory use|ram use]
> [memory|ram] [use|usage|needed]
> how much [memory|ram] [must i have|do i need|is used|will it take]
> is [8 gb|16 gb|my memory|my ram] enough
> what does a model need in memory
= A model needs about the size of its file and some more for the context; GET /api/health shows the memory in use.
@completions
> [is there|does it have|where is] [a|the] [plain|legacy|text|old] completions [route|endpoint]
> [what is|what does] /v1/completions [for|do|]
> [openai|plain|legacy] completions [endpoint|route|without chat]
> can i [complete|continue] [a text|a plain prompt|text] [without chat|in openai style]
> where are plain completions
= POST /v1/completions completes a plain prompt in OpenAI's shape, without a chat template.
@names
> [what|how] are [models|model ids|the models] [called|named|made]
> [which|what] name [does|has|will] [my|a] model [get|have]
> $HOW [name|refer to|call] a model in a request
> model [names|ids|id]
> what is [a|the] [name|id] of a model
> how is a model [named|called]
> where does [the|a] model['s|] name come from
= A model's id is its file name without .gguf, in lower case, with spaces and _ as -.
"""


TOPICS = grammars(TOPICS_TEXT.replace("[$S]", "$S").replace("$HOW", HOW).replace("$S", SUBJECT))


def shimmy_question(rng: random.Random) -> tuple[str, str]:
    asks, answers = TOPICS[rng.choice(list(TOPICS))]
    core = expand(rng.choice(asks), rng)
    if "shimmy" not in core and rng.random() < 0.12:
        core += rng.choice([" in shimmy", " with shimmy", " on the server", " with the server", " of the server"])
    return spoken(core, rng), answers[0]


# ── Facts ────────────────────────────────────────────────────────────────────────────────────────────────────────────
# A fact: what is asked, the answer in a sentence, and in a word or so.

Fact = tuple[str, str, str]

ASK_TEXT = """
@capital_country
> [{c} is the capital of [which|what] country|[which|what] country [has|has got] [the capital|as its capital] {c}|of
[which|what] country is {c} the capital|[which|what] country is {c} the capital of|{c} is the capital of]
@capital
> [[what|which city|what city] is the capital[| city] of {c}|[what is|what's|tell me|name|say|give me] {c}'s capital[|
city]|[name|tell me|give me|say] the capital[| city] of {c}|the capital of {c}[| is]|[capital of|capital] {c}|{c},
capital|[which|what] city is the capital [in|of] {c}|what is {c}'s capital city called|what is the capital of {c}
called|where is the [government|capital] of {c}|[for|in] {c}, what is the capital|[how is|what is] the capital of {c}
[called|named]]
@capital_check
> [is {t} the capital of {c}|{t} is the capital of {c}, [right|correct|yes or no]|is the capital of {c} {t}]
@days
> [[name|list|say|tell me] the [seven |]days of the week|what are the days of the week|which days [are in a week|has a
week|does a week have]|the days of the week]
@day_number
> [[what|which] is the {o} day of the week|[what|which] day of the week is the {o}|the {o} day of [a|the]
week|[name|tell me] the {o} day of the week]
@day_next
> [[what|which] day [comes|is|follows|comes right|is the one] {o} {d}|[what|which] is the day {o} {d}|the day {o} {d}[|
is]|[tell me|name|say] the day [that comes |]{o} {d}|{o} {d} comes [what|which day]|[what|which day] comes [just |right
|]{o} {d}|if today is {d}, [what|which] day [is|was|will be] [it |]{t}|today is {d}, what [is|was] {t}|[what|which] day
is {t} if today is {d}|[what|which weekday] [is|comes] {o} {d}]
@months
> [[name|list|say|tell me] the [twelve |]months [of the year|]|what are the months of the year|which months [are
in|has] a year|the months of the year]
@month_number
> [[what|which] is the {o} month[| of the year]|[what|which] month is [the {o}|number {n}|the {o} one]|the {o} month[|
of the year]|[name|tell me] the {o} month of the year|month number {n}]
@month_days
> [how many days [does {m} have|has {m}|are in {m}|are there in {m}|in {m}]|how long is {m}|the number of days in {m}]
@month_next
> [[what|which] month [comes|is|follows|comes right] {o} {d}|[what|which] is the month {o} {d}|the month {o} {d}[|
is]|[tell me|name|say] the month [that comes |]{o} {d}|{o} {d} comes [what|which month]|what comes {o} {d}]
@mix
> [what [colour|color] do [you get|i get] [from|by mixing|when you mix|if i mix|mixing] {a} and {b}|mix {a} and {b}|{a}
and {b} [make|makes|give|mixed make] [what|which colour|what color]|what do {a} and {b} make|{a} plus {b} makes which
colour|what is {a} mixed with {b}|which colour comes from {a} and {b}]
@colour
> [[what|which] [colour|color] is {t}|[what|which] [colour|color] does {t} have|what is the [colour|color] of {t}|the
[colour|color] of {t}|[tell me|name|say] the [colour|color] of {t}|{t} is what [colour|color]|{t} has which colour|what
[colour|color] would you say {t} is]
@opposite
> [what is the opposite of {w}|what's the opposite of {w}|the opposite of {w}[| is]|[name|tell me|give me|say|find|i
need] the opposite of {w}|which word [is the opposite of|means the opposite of] {w}|opposite of {w}|what word is
opposite to {w}|{w} - opposite|not {w} but|what is the contrary of {w}|the contrary of {w}|an antonym of {w}|which word
is opposite to {w}|what means the opposite of {w}]
@spelling
> [[how do you|how do i|how does one|how to|how would you] spell [|the word ]{w}|spell [|the word |out |out the word
]{w}[| for me| please]|[what is|what's|give me|tell me] the spelling of {w}|how is [|the word ]{w}
spelled|[can|could|would] you spell [|the word ]{w}|[give me|say|list] the letters of [|the word ]{w}|[which|what]
letters are in {w}|{w} letter by letter|spelling of {w}|{w}: how is that written]
@first_letter
> [what is the {o} letter of [|the word ]{w}|[which|what] letter [comes {o} in|is {o} in] {w}|the {o} letter of
{w}|[tell me|name|give me] the {o} letter of {w}|[which|what] letter does {w} [begin|start] with]
@last_letter
> [what is the last letter of [|the word ]{w}|[which|what] letter comes last in {w}|the last letter of {w}|[which|what]
letter does {w} end with]
@letter_next
> [[which|what] letter [comes|is] {o} {l}|what is the letter {o} {l}|the letter {o} {l}[| is]|[tell me|name] the letter
{o} {l}|in the alphabet, what comes {o} {l}|what comes {o} the letter {l}]
@count_down
> [count down from {n}[| to one| to 1| to zero]|count backwards from {n}|[can you|please] count down from {n}|a
countdown from {n}]
@count
> [count [all numbers|all the numbers|slowly|for me|now|loudly|with me] [up |][to|until] {n}|[start|begin] [with|from]
[1|one] and [go|continue|stop|end] at {n}|let me hear you count to {n}|i want to hear the numbers to {n}|count to
{n}|count up to {n}|count from [1|one] to {n}|[can|could|would] you count to {n}|[say|list|write|give
me|name] the numbers [from 1 to {n}|from one to {n}|1 to {n}|up to {n}]|counting to {n}|please count to {n}|i want you
to count to {n}|let us count to {n}|numbers up to {n}|numbers from 1 to {n}|show me how you count to {n}]
@count_from
> [count from {m} to {n}|[say|list|write] the numbers from {m} to {n}|[can you|please] count from {m} up to {n}|numbers
from {m} to {n}]
@sound
> [[what|which] sound does [a|the] {a} make|what does [a|the] {a} say|how does [a|the] {a} [sound|go]|the sound of a
{a}|[tell me|name] the sound [of a {a}|a {a} makes]|what noise does a {a} make]
@legs
> [how many legs does {a} have|how many legs has {a}|the number of legs of {a}|{a} has how many legs|how many legs are
on {a}]
@young
> [what is a [baby|young] {a} called|what do you call a [baby|young] {a}|the name of a [baby|young] {a}|how is a young
{a} called|a [baby|young] {a} is called|what is the young of a {a}|which word means a young {a}]
@amount
> [how many {t} [are there|are] {r}|how many {t} {r}|the number of {t} {r}|[tell me|say] [how many {t} are {r}|the
number of {t} {r}]|how many {t} does {o} have|{o} has how many {t}|how many {t} has {o}|what is the number of {t} {r}]
@compare
> [which [number |]is {o}, {a} or {b}|what is {o}, {a} or {b}|{a} or {b}, which is {o}|[tell me|say] the {o} one of {a}
and {b}|which of {a} and {b} is {o}|the {o} number of {a} and {b}]
@number_in_words
> [write {n} in words|{n} in words|how is {n} written in words|what is {n} in words|[put|turn] {n} into words]
@number_in_digits
> [write {n} in digits|{n} in digits|what is {n} in digits|{n} as a number|[put|turn] {n} into digits]
@number_next
> [[what|which] number [comes|is] {o} {n}|the number {o} {n}|what is the number {o} {n}|what comes {o} {n}|[tell
me|name] the number {o} {n}]
@seasons
> [[name|list|say|tell me] the [four |]seasons|what are the [four |]seasons|which seasons are there|the seasons of the
year]
@season_next
> [[which|what] season [comes|is|follows] {o} {s}|what comes {o} {s}|the season {o} {s}[| is]|[tell me|name] the season
{o} {s}]
@repeat
> [repeat[| after me| this| these words| the words| the sentence| the phrase]: {p}|say[| this| exactly| after me| the
words]: {p}|repeat {q}|say {q}|[can|could] you [say|repeat] {q}|echo[| this]: {p}|write[| exactly| this]: {p}|copy
this: {p}|just say {q}|[i want you to|please] [say|repeat|write] {q}|repeat what i say: {p}|say it after me: {p}|echo
{q}|repeat the following: {p}|say the following words: {p}|write down {q}]
@json_list
> [make|write|give me|create|return] [a json list|a json array|json list|an array in json] [of|with|from][|:] {l}|[{l}
as a json [list|array]|turn into a json [list|array]: {l}|put [these|this] into a json array: {l}|a json list of
{l}|json array: {l}]
@two_sums
> [what is|how much is|calculate|compute|give me|work out] {a} and[| also| then] {b}?
"""
ASK = {name: patterns[0] for name, (patterns, _) in grammars(ASK_TEXT).items()}


def fact_capital(rng: random.Random) -> Fact:
    country, city = rng.choice(list(CAPITALS.items()))
    if rng.random() < 0.25:
        ask = expand(ASK["capital_country"], rng, c=city)
        return ask, f"{city} is the capital of {country}.", sentence(country.removeprefix("the "))
    ask = expand(ASK["capital"], rng, c=country)
    return ask, f"The capital of {country} is {city}.", city


def fact_yes_no(rng: random.Random) -> Fact:
    country, city = rng.choice(list(CAPITALS.items()))
    if rng.random() < 0.5:
        return expand(ASK["capital_check"], rng, t=city, c=country), f"Yes, {city} is the capital of {country}.", "Yes"
    other = rng.choice([name for name in CAPITALS.values() if name != city])
    return expand(ASK["capital_check"], rng, t=other, c=country), f"No, the capital of {country} is {city}.", "No"


def fact_day(rng: random.Random) -> Fact:
    at = rng.randrange(7)
    kind = rng.random()
    if kind < 0.12:
        return (
            expand(ASK["days"], rng),
            "The days of the week are " + ", ".join(DAYS[:6]) + " and Sunday.",
            ", ".join(DAYS),
        )
    if kind < 0.3:
        return (
            expand(ASK["day_number"], rng, o=ORDINALS[at]),
            f"The {ORDINALS[at]} day of the week is {DAYS[at]}.",
            DAYS[at],
        )
    after = kind < 0.75
    day = DAYS[(at + (1 if after else -1)) % 7]
    word = "after" if after else "before"
    ask = expand(ASK["day_next"], rng, o=word, d=DAYS[at], t="tomorrow" if after else "yesterday")
    return ask, f"The day {word} {DAYS[at]} is {day}.", day


def fact_month(rng: random.Random) -> Fact:
    at = rng.randrange(12)
    kind = rng.random()
    if kind < 0.1:
        return (
            expand(ASK["months"], rng),
            "The months are " + ", ".join(MONTHS[:11]) + " and December.",
            ", ".join(MONTHS),
        )
    if kind < 0.35:
        return (
            expand(ASK["month_number"], rng, o=ORDINALS[at], n=str(at + 1)),
            f"The {ORDINALS[at]} month is {MONTHS[at]}.",
            MONTHS[at],
        )
    if kind < 0.5:
        days = MONTH_DAYS[MONTHS[at]]
        extra = ", or 29 in a leap year" if at == 1 else ""
        return expand(ASK["month_days"], rng, m=MONTHS[at]), f"{MONTHS[at]} has {days} days{extra}.", days
    after = kind < 0.8
    month = MONTHS[(at + (1 if after else -1)) % 12]
    word = "after" if after else "before"
    ask = expand(ASK["month_next"], rng, o=word, d=MONTHS[at])
    return ask, f"The month {word} {MONTHS[at]} is {month}.", month


def fact_colour(rng: random.Random) -> Fact:
    if rng.random() < 0.3:
        mix, made = rng.choice(list(MIXES.items()))
        first, second = mix.split("+")
        return (
            expand(ASK["mix"], rng, a=first, b=second),
            f"{sentence(first)} and {second} make {made}.",
            sentence(made),
        )
    thing, colour = rng.choice(list(COLOURS.items()))
    short = thing.removesuffix(" on a clear day").removesuffix(" in drawings").removesuffix(" in summer")
    ask = expand(ASK["colour"], rng, t=rng.choice([thing, short]))
    return ask, f"{sentence(thing)} is {colour}.", sentence(colour)


def fact_opposite(rng: random.Random) -> Fact:
    word, other = rng.choice(OPPOSITES)
    ask = expand(ASK["opposite"], rng, w=word)
    return ask, f"The opposite of {word} is {other}.", sentence(other)


def fact_spelling(rng: random.Random) -> Fact:
    word = invented_word(rng) if rng.random() < 0.08 else rng.choice(WORDS + NAMES_F[:20] + NAMES_M[:20])
    ask = expand(ASK["spelling"], rng, w=quoted(word, rng))
    return ask, sentence(word) + ": " + ", ".join(word.upper()) + ".", "-".join(word.upper())


def quoted(text: str, rng: random.Random) -> str:
    return rng.choice(["{}", "{}", "{}", '"{}"', "'{}'"]).format(text)


def fact_letter(rng: random.Random) -> Fact:
    if rng.random() < 0.5:
        word = rng.choice(WORDS)
        first = rng.random() < 0.6
        letter = word[0 if first else -1].upper()
        which = "first" if first else "last"
        return (
            expand(ASK["first_letter"], rng, o=which, w=quoted(word, rng))
            if first
            else expand(ASK["last_letter"], rng, w=quoted(word, rng)),
            f"The {which} letter of {word} is {letter}.",
            letter,
        )
    at = rng.randrange(26)
    after = at < 25 and (at == 0 or rng.random() < 0.6)
    letter, other = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[at], "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[at + (1 if after else -1)]
    word = "after" if after else "before"
    return expand(ASK["letter_next"], rng, o=word, l=letter), f"The letter {word} {letter} is {other}.", other


def fact_count(rng: random.Random) -> Fact:
    end = rng.randint(2, 30)
    if rng.random() < 0.2:
        end = min(end, 20)
        ask = expand(ASK["count_down"], rng, n=numeral(end, rng))
        return ask, ", ".join(str(n) for n in range(end, 0, -1)) + ".", ", ".join(str(n) for n in range(end, 0, -1))
    start = 1 if rng.random() < 0.8 else rng.randint(2, max(2, end - 1))
    if start == 1:
        ask = expand(ASK["count"], rng, n=numeral(end, rng))
    else:
        ask = expand(ASK["count_from"], rng, n=numeral(end, rng), m=numeral(start, rng))
    text = ", ".join(str(n) for n in range(start, end + 1))
    return ask, text + ".", text


def numeral(number: int, rng: random.Random) -> str:
    return in_words(number) if rng.random() < 0.3 else str(number)


def fact_animal(rng: random.Random) -> Fact:
    kind = rng.random()
    if kind < 0.35:
        animal, sound = rng.choice(list(SOUNDS.items()))
        return (
            expand(ASK["sound"], rng, a=animal),
            f"A {animal} says {sound}.".replace("A owl", "An owl"),
            sentence(sound),
        )
    if kind < 0.65:
        animal, legs = rng.choice(list(LEGS.items()))
        count = {"0": "no"}.get(legs, legs)
        return expand(ASK["legs"], rng, a=article(animal)), f"{sentence(article(animal))} has {count} legs.", legs
    animal, young = rng.choice(list(YOUNG.items()))
    return expand(ASK["young"], rng, a=animal), f"A young {animal} is called a {young}.", sentence(young)


def fact_amount(rng: random.Random) -> Fact:
    thing, amount = rng.choice(list(AMOUNTS.items()))
    noun, rest = re.match(r"(.*?) ((?:in|on|of) .*)", thing).groups()  # type: ignore[union-attr]
    where = sentence(rest.split(" ", 1)[1])
    verb = "There are"
    ask = expand(ASK["amount"], rng, t=noun, r=rest, o=where[0].lower() + where[1:] if where != "English" else where)
    return ask, f"{verb} {amount} {thing}.", amount


def fact_compare(rng: random.Random) -> Fact:
    low, high = sorted(rng.sample(range(1, 10 ** rng.randint(1, 3)), 2))
    first, second = rng.sample([low, high], 2)
    big = rng.random() < 0.6
    ask = expand(
        ASK["compare"],
        rng,
        o=rng.choice(["bigger", "larger", "greater"] if big else ["smaller"]),
        a=str(first),
        b=str(second),
    )
    return (
        ask,
        (f"{high} is bigger than {low}." if big else f"{low} is smaller than {high}."),
        str(high if big else low),
    )


def fact_number(rng: random.Random) -> Fact:
    kind = rng.random()
    if kind < 0.5:
        number = rng.randint(0, 99)
        if rng.random() < 0.5:
            return (
                expand(ASK["number_in_words"], rng, n=str(number)),
                f"{number} is {in_words(number, '-')} in words.",
                in_words(number, "-"),
            )
        return (
            expand(ASK["number_in_digits"], rng, n=in_words(number, rng.choice([" ", "-"]))),
            f"That is {number} in digits.",
            str(number),
        )
    number = rng.randint(1, 200)
    after = rng.random() < 0.6
    word, other = ("after", number + 1) if after else ("before", number - 1)
    ask = expand(ASK["number_next"], rng, o=word, n=str(number))
    return ask, f"The number {word} {number} is {other}.", str(other)


def fact_season(rng: random.Random) -> Fact:
    seasons = ["spring", "summer", "autumn", "winter"]
    at = rng.randrange(4)
    if rng.random() < 0.3:
        return (
            expand(ASK["seasons"], rng),
            "The seasons are spring, summer, autumn and winter.",
            "Spring, summer, autumn, winter",
        )
    after = rng.random() < 0.6
    other = seasons[(at + (1 if after else -1)) % 4]
    word = "after" if after else "before"
    return (
        expand(ASK["season_next"], rng, o=word, s=seasons[at]),
        f"The season {word} {seasons[at]} is {other}.",
        sentence(other),
    )


def small_phrase(rng: random.Random) -> str:
    """Words to be repeated: drawn at large, so that only copying helps."""
    kind = rng.random()
    if kind < 0.3:
        return expand(
            "the {a} {n} [sees|likes|finds|has|follows|paints] [the|a] {b} {m}",
            rng,
            a=rng.choice(ADJECTIVES),
            n=rng.choice(ANIMALS + PEOPLE),
            b=rng.choice(ADJECTIVES),
            m=rng.choice(WORDS),
        )
    if kind < 0.5:
        return expand("{n} [lives in|goes to|comes from|works in] {c}", rng, n=some_name(rng), c=some_city(rng))
    pool = WORDS + ADJECTIVES + NAMES_F + NAMES_M
    parts = [invented_word(rng) if rng.random() < 0.12 else rng.choice(pool) for _ in range(rng.randint(1, 7))]
    if rng.random() < 0.15:
        parts.insert(rng.randrange(len(parts) + 1), str(rng.randint(0, 9999)))
    return " ".join(parts)


def fact_repeat(rng: random.Random) -> Fact:
    phrase = small_phrase(rng)
    if rng.random() < 0.5:
        phrase = sentence(phrase) + rng.choice(["", ".", "!"])
    ask = expand(ASK["repeat"], rng, p=phrase, q=rng.choice(['"{}"', "'{}'"]).format(phrase))
    return ask, phrase, phrase


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


def fact(rng: random.Random) -> Fact:
    maker = rng.choices(list(FACTS), list(FACTS.values()))[0]
    ask, long, short = maker(rng)
    exact = maker in (fact_repeat, fact_spelling, fact_letter, fact_compare, fact_number)
    statement = ask.split()[0] in {
        "repeat",
        "say",
        "echo",
        "write",
        "copy",
        "count",
        "spell",
        "name",
        "list",
        "tell",
        "give",
        "mix",
        "please",
        "just",
    }
    if maker is fact_repeat:
        return (sentence(ask) if rng.random() < 0.6 else ask), long, short
    return spoken(ask, rng, "" if statement else "?", loose=not exact), long, short


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
# A record is a subject and a few properties; each property can be said in a sentence and stands under a key.

JOBS = words_of("""baker, teacher, doctor, farmer, painter, pilot, nurse, lawyer, cook, driver, writer, singer,
engineer, dentist, gardener, plumber, carpenter, sailor, judge, tailor, librarian, waiter, butcher, student, programmer,
clerk, barber""")
HOBBIES = words_of("""chess, tennis, football, reading, painting, cooking, swimming, fishing, dancing, singing, hiking,
cycling, gardening, sewing, running, skating, climbing, photography""")
PLAIN_COLOURS = words_of("red, blue, green, yellow, black, white, brown, orange, purple, pink, grey")
ITEMS = [word for word in WORDS[:230] if word not in PLAIN_COLOURS]

PERSON = {
    "age": phrases_of("""{n} is {v} years old; {n} is {v}; {n}, {v} years old; {n}, aged {v}; {n} turned {v}; {n} is
aged {v}; {n} has just turned {v}"""),
    "city": phrases_of(
        """{n} lives in {v}; {n} is from {v}; {n}'s home is {v}; {n} comes from {v}; {n} moved to {v}"""
    ),
    "job": phrases_of("""{n} works as a {v}; {n} is a {v}; {n}'s job is {v}; {n} has been a {v} for years"""),
    "hobby": phrases_of("""{n} likes {v}; {n}'s hobby is {v}; {n} loves {v}; {n} enjoys {v}"""),
    "email": phrases_of("""{n}'s email is {v}; {n} can be reached at {v}; write to {n} at {v}"""),
    "pet": ["{n} has a {v}", "{n} owns a {v}", "{n}'s pet is a {v}"],
    "height": phrases_of("""{n} is {v} cm tall; {n}'s height is {v} cm; {n} measures {v} cm"""),
}
THING = {
    "price": phrases_of("""the {n} costs {v} euros; the {n} is {v} euros; the price of the {n} is {v}; one {n} for {v}
euros"""),
    "colour": ["the {n} is {v}", "the colour of the {n} is {v}", "it is a {v} {n}"],
    "count": phrases_of("""there are {v} of the {n}; we have {v} pieces of the {n}; {v} times the {n}"""),
    "weight": ["the {n} weighs {v} kg", "the weight of the {n} is {v} kg"],
}


def property_value(key: str, rng: random.Random) -> Any:
    makers: dict[str, Callable[[], Any]] = {
        "age": lambda: rng.randint(1, 99),
        "city": lambda: some_city(rng),
        "job": lambda: rng.choice(JOBS),
        "hobby": lambda: rng.choice(HOBBIES),
        "email": lambda: (
            f""
            f"{rng.choice([rng.choice(NAMES_F + NAMES_M).lower(), invented_word(rng)])}@"
            f"{rng.choice(['example.com', 'mail.org', 'test.net', invented_word(rng) + '.com'])}"
        ),
        "pet": lambda: rng.choice(ANIMALS),
        "height": lambda: rng.randint(100, 210),
        "price": lambda: rng.choice([rng.randint(1, 999), round(rng.uniform(0.5, 99), 2)]),
        "colour": lambda: rng.choice(PLAIN_COLOURS),
        "count": lambda: rng.randint(2, 500),
        "weight": lambda: rng.choice([rng.randint(1, 90), round(rng.uniform(0.1, 30), 1)]),
    }
    return makers[key]()


def record(rng: random.Random, pronoun_rate: float = 0.5) -> tuple[dict[str, Any], str]:
    """An object and a text that says what it holds."""
    person = rng.random() < 0.75
    kinds = PERSON if person else THING
    subject = some_name(rng) if person else rng.choice(ITEMS)
    keys = rng.sample(list(kinds), rng.choice([1, 1, 2, 2, 2, 3]))
    if person and rng.random() < 0.5 and "age" not in keys:
        keys[0] = "age"
    values = {key: property_value(key, rng) for key in keys}
    parts = []
    for at, (key, value) in enumerate(values.items()):
        name = subject
        if at and person and rng.random() < pronoun_rate:
            name = "He" if subject in NAMES_M else "She"
        parts.append(rng.choice(kinds[key]).replace("{n}", name).replace("{v}", str(value)))
    text = parts[0]
    for part in parts[1:]:
        joint = rng.choice([". ", " and ", ", "])
        text += joint + (
            sentence(part)
            if joint == ". "
            else part.replace("He", "he", 1)
            if part.startswith("He ")
            else part.replace("She", "she", 1)
            if part.startswith("She ")
            else part
        )
    return {"name": subject, **values}, sentence(text) + rng.choice([".", ".", ""])


def listed(items: list[str], rng: random.Random) -> str:
    if len(items) == 1:
        return items[0]
    return ", ".join(items[:-1]) + rng.choice([" and ", ", ", " and "]) + items[-1]


JSON_ASKS = phrases_of("""[make|write|create|give me|return|produce|build|i need] [a json object|json|an object in
json|a json] [with|with the keys|having|with the fields|containing] {k}[:| for:| from:| out of:| from this sentence:]
{t}; {t} [write|give|say|put|return|express] [this|that|it] [as|in] json with [the keys |]{k}; turn this into json with
{k}: {t}; convert to json ({k}): {t}; json with {k}, please: {t}; extract {k} as json[:| from:] {t}; extract {k} from
this[| text| sentence] as json: {t}; what are the {k} here? answer in json: {t}; {t} json with {k} please; put {k} into
json: {t}; answer with json, keys {k}: {t}; [read|take] this sentence and [give me|return|write] json with {k}: {t};
fill in json with {k} from: {t}; {t} [make|create] a json object [of it |]with {k}; i want json with {k} from this:
{t}; as json with {k}: {t}; {k} as json: {t}; get {k} from the text and answer as json. {t}""")
JSON_PLAIN_ASKS = phrases_of("""[turn|convert|change] [this|the sentence|this sentence|the following] [into|to] json:
{t}; [write|give me|say|return] [this|that] as json: {t}; {t} [as|in] json[| please]; json[| please]: {t}; make [json|a
json object|an object] [of|from|out of] this: {t}; {t} [give me|write|i want|i need] [that|this|it] [as|in] json;
express in json: {t}; [what is|how is] this [in|as] json: {t}; json object for: {t}""")


def json_spelt(ask: str, rng: random.Random) -> str:
    ask = ask.replace("json", "JSON") if rng.random() < 0.65 else ask
    return sentence(ask) if rng.random() < 0.65 else ask


def json_task(rng: random.Random) -> tuple[str, str]:
    kind = rng.random()
    if kind < 0.12:
        items = rng.sample(WORDS if rng.random() < 0.7 else CITIES, rng.randint(2, 5))
        ask = expand(ASK["json_list"], rng, l=listed(items, rng))
        ask = rng.choice(ask.split("|"))
        return json_spelt(ask, rng), json.dumps(items, ensure_ascii=False)
    value, text = record(rng)
    if kind < 0.7:
        keys = list(value)
        if len(keys) > 2 and rng.random() < 0.3:
            keys = keys[:-1]
        if rng.random() < 0.2:
            rng.shuffle(keys)
        style = rng.random()
        shown = listed(keys, rng) if style < 0.7 else listed([f'"{key}"' for key in keys], rng)
        ask = expand(rng.choice(JSON_ASKS), rng, k=shown, t=text)
        value = {key: value[key] for key in keys}
    else:
        ask = expand(rng.choice(JSON_PLAIN_ASKS), rng, t=text)
    return json_spelt(ask, rng), json.dumps(value, ensure_ascii=False)


# ── Stories ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# A plot is a list of steps, each a choice of sentences; one hero, one helper and one place run through all of them.

PLOTS_TEXT = """
@lost
> [One morning|One day|On a Sunday|One bright morning|After breakfast], {name} could not find {his} {item}.|[One
morning|One day] {name} saw that {his} {item} was gone.
> [{He} looked|{name} looked|First {he} looked] [under the table|in the kitchen|in every room|behind the house], but it
was not there.|{He} [searched|looked] everywhere, but the {item} was nowhere.
> "Where can it be?" [asked|said|cried] {name}.|{name} [felt sad|was very sad|sighed and sat down].|"I had it
yesterday," {he} [said|thought].
> [Then|Soon|After a while] {friend} the {helper} came by.|On the path {he} met {friend}, {a_helper}.
> "[What is wrong|Why are you so sad|What happened]?" asked {friend}. "I lost my {item}," said {name}.
> "[Let us|We can|Let me help, we will] look together," said {friend}.|"Two see more than one," said {friend}. "Let us
look together."
> They [walked|went] [along the path|through the grass|around the house|from tree to tree] and [looked everywhere|asked
everyone they met|turned over every stone].
> [At last|Finally|Suddenly] {friend} [called|shouted]: "[Here it is|I found it|Look here]!" The {item} lay {hiding}.
> {name} [jumped for joy|laughed|smiled from ear to ear] and [hugged|thanked] {friend}.
> [From that day|From then on|After that] {he} [took good care of|never lost|always looked after] the {item}, and
{name} and {friend} [were good friends|stayed friends|played together every day].
@friend
> {name} was [often alone|lonely|all alone], because [nobody lived near|everyone else was far away|the others were
busy].
> ["I wish I had a friend," {he} said.|Every evening {he} looked at the stars and wished for a friend.|{He} wanted a
friend more than anything.]
> [One day|One afternoon|One morning] {name} [heard a voice|saw somebody] [by the water|behind the trees|at the gate|on
the road].
> It was {friend}, {a_helper} who [had lost the way|was new there|looked for a home|was alone too].
> At first {name} was [shy|a little afraid|too shy to speak].|{name} did not know what to say.
> Then {he} [took a deep breath|smiled|stepped closer] and said: "[Would you like to play|Are you hungry|Shall we be
friends]?"
> {friend} [nodded|smiled|was very glad] and said: "[Yes, with pleasure|I would love that|Oh yes, please]!"
> They [shared {food}|ate {food} together] and [told each other stories|laughed a lot|talked until the sun went down].
> [When night came|In the evening|At sunset], {friend} [asked: "May I come again tomorrow?"|said: "This was the best
day of all."]
> [From that day|Since then] {name} was never lonely [again|any more].|And so {name} and {friend} became [best
friends|the best of friends].
@storm
> [One evening|One night|One autumn day] [dark clouds came|the sky turned black|a strong wind began to blow] and a
[great|terrible|big] storm began.
> The rain [fell hard|poured down|beat on the roofs] and the thunder [rolled|roared|was very loud].
> {name} was [safe at home|warm and dry inside|just going to bed] when {he} heard [a knock|somebody call for help|a
weak voice].
> Outside stood {friend} the {helper}, [wet and cold|shaking with cold|without a home].|It was {friend}, {a_helper},
[wet|cold] and [tired|afraid].
> "[The wind broke my house|The water took my home|I cannot find my way home]," said {friend}.
> "Come in [quickly|at once|, there is room for two]," said {name}, and [made a fire|gave {friend} a dry blanket|closed
the door].
> They ate {food} and [listened to the rain|told stories|sang songs] until the storm was over.
> In the morning the sun [shone|came out|was shining] again, and the air [smelled fresh|was clear].
> {name} helped {friend} to [build a new house|repair the roof|find the way home], and [by evening|before night] the
work was done.
> "[You are a true friend|I will never forget this|Thank you for everything]," said {friend}. [And they visited each
other every week.|And {name} felt warm inside.|And after that no storm could frighten them.]
@skill
> {name} [wanted to learn|had one dream: {he} wanted] to {skill}.|More than anything, {name} wanted to {skill}.
> [But it was hard|But it was not easy|It was harder than it looked]. [The first time|At first] {he} [failed|fell
over|did everything wrong], and the others laughed.
> "[You will never learn it|That is too hard for you|Give up]," they said.
> {name} went [home|away] [sadly|with tears in {his} eyes].|{name} [felt small|was close to giving up].
> Then {friend} the {helper} [came|sat down beside {him}] and said: "[Every master was once a beginner|Nobody can do it
at once|I fell a hundred times before I could do it]."
> "Will you [teach|help] me?" asked {name}. "[Of course|Gladly|Yes, every day]," said {friend}.
> [So they practised|They practised] [every day|every morning|day after day], [in sun and in rain|for many weeks|little
by little].
> [Slowly|Bit by bit|Step by step] it [went better|became easier].
> [And one day|One fine day|Then, one morning], {name} could {skill} [better than anyone|all alone|without any help]!
> [The others clapped|Everyone clapped|Now nobody laughed], and {name} [thanked|hugged] {friend}. "[You only have to
try again and again|Never give up]," {he} said.
@journey
> {name} had never seen {sight}, and {he} [dreamed of it every night|thought of it every day|wanted to see it so much].
> [One morning|One day|In spring] {he} packed {food} and [set off|began {his} journey|went on {his} way].
> The way was long. {He} [crossed a river|walked through a dark wood|climbed a hill] and [slept under the stars|rested
in the shade|followed an old road].
> [On the second day|After a while|Half way] {he} met {friend}, {a_helper} who [was stuck in a hole|had hurt a foot|was
very hungry|had lost the way].
> "[Please help me|Can you help me]," said {friend}. {name} [did not wait|helped at once] and [shared {his} food|pulled
and pulled until it was done|gave what {he} had].
> "Thank you! Where are you going?" asked {friend}. "I want to see {sight}," said {name}.
> "I know [the way|a short way]," said {friend}. "Let us go together."
> They [walked and talked|sang on the way|went side by side] until [evening|the next morning|the sun was high].
> And there it was: {sight}! It was [more beautiful than any dream|so beautiful that they could not speak|wonderful].
> {name} [looked for a long time|was happy] and said: "[The best part was the way with you|It is even better with a
friend]." [Then they went home together.|And they came back every year.]
@share
> [One day|One autumn|One evening] {name} found [a basket full of {food}|more {food} than {he} had ever seen].
> "[All this is mine|I will keep it all|I will hide it]," {he} [thought|said], and [hid it {hiding}|carried it home].
> [The next day|Soon after] {friend} the {helper} [came by|knocked at the door] and [looked hungry|said: "I have had
nothing to eat today."]
> {name} said nothing and [closed the door|looked away].
> But [that night|in the evening] {he} could not sleep. The {food} did not taste good [alone|any more].
> "[What good is it to have much and no friends|It is no fun to eat alone]," {he} thought.
> [Early in the morning|When the sun rose], {name} [took|carried] everything to {friend}'s home.
> "[I am sorry|Forgive me]," {he} said. "[Let us eat together|This is for both of us]."
> {friend} [smiled|laughed] and called [the neighbours|all the others], and they had a [feast|great feast|party] [with
songs and games|until late at night].
> [Since that day|After that] {name} [shared everything|always shared], and [it tasted twice as good|{he} was never
alone].
@dark
> {name} was afraid of [the dark|the night|shadows].
> When the sun went down, {he} [hid under a blanket|lit every lamp|closed {his} eyes].
> [One night|One evening] {he} heard {noise} [outside|near the window|behind the wall].
> {His} heart beat [fast|loudly]. "[Who is there|What is that]?" {he} [whispered|called].
> Nobody answered. So {name} went to {friend} the {helper}, who lived next door.
> "[Let us look together|We will take a lamp and look]," said {friend}. "[Two are braver than one|I am with you]."
> [Step by step|Slowly|Hand in hand] they went [outside|into the dark|round the house].
> And what did they find? It was only {cause}!
> They laughed [so much that the moon seemed to smile|until their bellies hurt|and laughed].
> [From then on|After that night] {name} [was not afraid of the dark|slept well every night], for {he} knew: [most
things are harmless when you look at them|it helps to look, and it helps to have a friend].
@contest
> [Every year|Every summer] there was a [great race|big contest|race] in that place, and the prize was a {item}.
> {name} wanted to [win|take part], but {friend} the {helper} was [the fastest|the strongest|said to be the best] of
all.
> "You cannot win," [said the others|they all said]. "{friend} wins every year."
> {name} trained [every morning|for many weeks|every day before sunrise].
> Then the day came. [Everybody watched|The whole place came to watch]. "[Ready, steady, go|One, two, three, go]!"
> {friend} was in front, and {name} came [close behind|second].
> But [just before the end|near the end|at the last corner] {friend} [fell|stumbled|fell into a ditch] and [could not
get up|cried out].
> {name} [could have won|could run past]. But {he} [stopped|turned back] and [helped {friend} up|gave {friend} a hand].
> They [crossed the line together|came to the end side by side], and [everyone cheered|the people clapped and clapped].
> Both of them [got the {item} to share|won the prize], and {name} won something better: [a friend|a friend for life].
@gift
> Tomorrow was the birthday of {friend} the {helper}, and {name} had [no gift|nothing to give].
> {He} had [no money|only one coin], so {he} [thought and thought|sat down to think].
> "[I could make something|I will make a gift with my own hands]," {he} said [at last|suddenly].
> All day {name} [worked|cut and glued|was busy]. {He} took [wood|paper|wool|old cloth] and [a little paint|some
string|a bit of glue].
> [In the evening|By night] there was a {item} on the table. It was [a little crooked|not perfect], but [full of
love|made with care].
> "[What if it is not good enough|Perhaps {friend} will not like it]," thought {name}.
> [The next day|In the morning] there were many [big|fine|expensive] gifts. {name} [put the {item} at the very end|was
almost too shy to give the {item}].
> {friend} opened it and was [silent|very still] for a moment. "You made this [yourself|for me]?" {friend} asked.
> "[It is the best gift of all|This is the one I like most]," said {friend}, and [hugged {name}|smiled].
> Then they all ate {food} and [danced|sang] until [the stars came out|late]. [The {item} has stood by {friend}'s bed
ever since.|{friend} keeps the {item} to this day.]
@build
> [The old bridge was broken|A flood had taken the bridge|There was no bridge over the river], and nobody could [cross
the river|get to the other side].
> "[We need a new bridge|Somebody must build a bridge]," said {name}. But the others said: "[That is too much work|It
cannot be done]."
> So {name} began alone. {He} carried [one stone|one board|one log] after the other.
> [In the evening|After the first day] {he} was tired, and the work had [hardly begun|only begun].
> [The next morning|Next day] {friend} the {helper} came and [watched for a while|asked: "What are you doing?"]
> "I am building a bridge for all of us," said {name}. "Then I will help you," said {friend}.
> Soon [others came too|more and more came to help]: some brought [wood|ropes|nails], some brought {food}.
> They worked [for seven days|all week|from morning to night], and they sang while they worked.
> [At last|Finally] the bridge was [ready|done], [strong and beautiful|strong enough for everyone].
> "[Alone I could only begin|One can begin, but many can finish]," said {name}. And that evening they [danced|had a
feast] on the bridge.
@garden
> [One spring|In spring|One day in March] {name} [found|was given] a [tiny|small|strange] seed.
> "[What will it become|What is in it]?" {he} wondered, and [put it into the earth|planted it {hiding}].
> Every [day|morning] {he} [gave it water|watered it] and [waited|looked at the ground].
> A week went by, and nothing [happened|grew]. "[It is dead|Nothing will grow here]," said {friend} the {helper}.
> "[I will wait a little longer|Good things need time]," said {name}, and [sang to the seed|went on watering].
> [Then it rained|After the warm rain], and [one morning|the next morning] there was a [little green leaf|small green
shoot].
> It grew and grew: [first to {name}'s knee|first as high as a cup], then [as high as the door|over the fence].
> In summer it had [a hundred flowers|the most beautiful flower of all|flowers in every colour], and [bees and
butterflies|everybody] came to see it.
> "[I was wrong|You were right to wait]," said {friend}. "[How did you do it|What is your secret]?"
> "[Water, sun and patience|I only gave it time]," said {name} with a smile. In autumn they [gathered new seeds|took
the seeds] and gave one to every [neighbour|friend].
@message
> [One morning|On a windy day] {name} found a bottle {hiding}. [In it was|Inside there was] a [letter|piece of paper].
> It said: "[I live far away and have no friends|Please write to me, I am alone]. {friend} the {helper}."
> {name} read it [twice|three times]. "[Somebody needs a friend|I must answer]," {he} said.
> {He} wrote [a long letter|back at once] and [put in a {item}|drew a picture on it].
> [Then {he} gave the bottle to the wind and the water|A bird took the letter and flew away with it].
> Days passed, then weeks. [No answer came|Every day {name} looked for an answer].
> "[Perhaps it was lost|It must have got lost]," {he} thought [sadly|and sighed].
> But [one evening|one day] there was a knock at the door. There stood {friend}, with the {item} in [hand|both hands].
> "[Your letter made me so happy that I came myself|I wanted to thank you in person]," said {friend}.
> They [talked all night|ate {food} and talked for hours], and [from then on|after that] a letter went [back and
forth|between them] every week.
"""
PLOTS = {name: steps for name, (steps, _) in grammars(PLOTS_TEXT).items()}
PLOT_TOPICS = {
    "lost": "a lost {item}|something lost|searching|finding something|helping",
    "friend": "friendship|a new friend|two friends|being lonely|loneliness|making friends",
    "storm": "a storm|rain and thunder|bad weather|kindness|a stormy night",
    "skill": "learning|never giving up|practice|patience and work|learning to {skill}|courage",
    "journey": "a journey|an adventure|a long trip|travel|{sight}",
    "share": "sharing|being generous|greed|food|giving",
    "dark": "the dark|being afraid|fear|a night|a strange noise|bravery",
    "contest": "a race|a contest|winning|sport|fairness",
    "gift": "a birthday|a gift|a present|a birthday party",
    "build": "a bridge|building something|working together|helping each other|teamwork",
    "garden": "a seed|a garden|a flower|growing things|patience|spring",
    "message": "a letter|a message|a bottle in the sea|a letter from far away",
}
STORY_OPENINGS = phrases_of("""[Once upon a time|Once|Long ago|A long time ago|Many years ago], there [lived|was]
{a_hero} [named|called] {name} in {place}.; In {place} [there lived|lived] {a_hero} [named|called] {name}.; {name} was
{a_hero} who lived in {place}.; There once was {a_hero} [named|called] {name}, who lived in {place}.""")
STORY_TRAITS = [
    "{name} [was|was always|had always been] [kind to everyone|full of ideas|a good listener|fond of "
    "{food}|up early in the morning|the smallest of all|known for {his} laugh].",
    "Everybody [knew|liked] {name}, because {he} was so [kind|funny|cheerful|helpful].",
    "",
]
STORY_ENDS = ["The end.", "And that is the end of the story.", "", "", ""]
STORY_ASKS = phrases_of("""[tell|write|give|make up|invent|read] [me |us |][a|a short|another|a little|a nice|a small]
[story|tale|bedtime story|fairy tale|story for children]{about}; [can|could|will|would] you [tell|write|make up] [me
|us |][a|a short] [story|tale]{about}; [i want|i would like|i'd like|i need] [to hear |to read |][a|a short|another|a
nice] [story|tale]{about}; [a|a short|one more|another] [story|tale]{about}[| please]; [do you know|have you got]
[a|any|a good] [story|tale]{about}; [let us|let me] hear [a|a short] [story|tale]{about}; story{about}; once upon a
time{about}; tell [me |]{something}""")


def story_cast(rng: random.Random, hero: str) -> dict[str, str]:
    """Who and what the story is about: every slot of the plots."""
    female = rng.random() < 0.5 if hero not in {"king", "prince", "boy", "grandfather"} else False
    female = female or hero in {"girl", "queen", "princess", "witch", "grandmother"}
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
    steps = [rng.choice(STORY_OPENINGS), rng.choice(STORY_TRAITS), *PLOTS[plot], rng.choice(STORY_ENDS)]
    drop = rng.choice([0, 0, 0, 1])
    if drop:
        steps.pop(1)
    sentences = [expand("[" + step + "]" if "|" in step else step, rng, **cast) for step in steps if step]
    return " ".join(sentences)


STORY_SUBJECTS = """@subjects
> {one}
> {one}
> {one}
> the {hero}
> {a_hero}
> {one} [named|called] {name}
> {one} and {other}
> {a_hero} in {place}
> {one} in {place}
> {name} the {hero}
> {hero}
"""
SUBJECTS = grammars(STORY_SUBJECTS)["subjects"][0]


def story_subject(plot: str, cast: dict[str, str], rng: random.Random) -> str:
    """What the story is asked to be about: its hero mostly, or the theme of the plot, or nothing in particular."""
    kind = rng.random()
    if kind < 0.6:
        return expand(rng.choice(SUBJECTS), rng, one=article(cast["hero"]), other=article(cast["helper"]), **cast)
    return expand(rng.choice(PLOT_TOPICS[plot].split("|")), rng, **cast) if kind < 0.82 else ""


def story(rng: random.Random) -> tuple[str, str]:
    plot = rng.choice(list(PLOTS))
    hero = rng.choice(WORDS) if rng.random() < 0.06 else rng.choice(rng.choice([ANIMALS, ANIMALS, PEOPLE, THINGS]))
    cast = story_cast(rng, hero)
    subject = story_subject(plot, cast, rng)
    about, something = "", "a story"
    if subject:
        about = " " + expand("[about|about|about|about|on|of] {s}", rng, s=subject)
        something = expand("[something about {s}|a story about {s}|what happened to {s}]", rng, s=subject)
    ask = expand(rng.choice(STORY_ASKS), rng, about=about, something=something)
    return spoken(ask, rng, "", loose=True), tell(plot, cast, rng)


# ── Tools ────────────────────────────────────────────────────────────────────────────────────────────────────────────

BINARY_TEXT = """
@+
> {a} + {b}; {a}+{b}; {a} plus {b}; the sum of {a} and {b}; add {a} and {b}; add {a} to {b}; {a} added to {b}; {a} and
{b} together; the total of {a} and {b}; adding {a} to {b}; {a} and {b} added up; {a} increased by {b}; {a} and {b} in
total; sum {a} and {b}; add up {a} and {b}; put {a} and {b} together; adding {a} and {b}; {a} more than {b}; the
addition of {a} and {b}
@-
> {a} - {b}; {a}-{b}; {a} minus {b}; the difference of {a} and {b}; subtract {b} from {a}; take {b} away from {a}; {a}
less {b}; {a} take away {b}; {b} subtracted from {a}; the difference between {a} and {b}; {a} reduced by {b}; {a}
decreased by {b}; {b} less than {a}; subtracting {b} from {a}; take {b} from {a}; deduct {b} from {a}; {a} without {b}
@*
> {a} * {b}; {a}*{b}; {a} times {b}; the product of {a} and {b}; multiply {a} by {b}; multiply {a} and {b}; {a}
multiplied by {b}; {a} x {b}; {a} multiplied with {b}; multiplying {a} by {b}; {a}x{b}; {a} × {b}; multiply {a} with
{b}; the multiplication of {a} and {b}; multiplying {a} and {b}
@/
> {a} / {b}; {a}/{b}; {a} divided by {b}; divide {a} by {b}; the quotient of {a} and {b}; {a} over {b}; {a} ÷ {b};
dividing {a} by {b}; {a} split by {b}; the division of {a} by {b}; split {a} into {b} equal parts; {a} shared by {b}
"""
BINARY = {operator: phrases_of(asks[0]) for operator, (asks, _) in grammars(BINARY_TEXT).items()}
RESULT_FRAMES = phrases_of("""what is {e}; what's {e}; how much is {e}; calculate {e}; compute {e}; {e}; {e} =; {e} =
?; what does {e} make; what do you get for {e}; give me {e}; tell me {e}; work out {e}; evaluate {e}; i need {e}; what
does {e} equal; what is the result of {e}; the result of {e}; find {e}; can you calculate {e}; could you work out {e};
please compute {e}; i want to know {e}; solve {e}; use the calculator for {e}; use the calculator: {e}; what would {e}
be; how many is {e}; do you know what {e} is; what number is {e}; please {e}; help me with {e}; i have to calculate
{e}; let me know {e}; what comes out of {e}; with the calculator: {e}; figure out {e}; determine {e}; quickly: {e}""")
ORDER_FRAMES = phrases_of("""{e}; please {e}; can you {e}; could you {e}; {e} please; i want you to {e}; {e} for me;
now {e}; what do i get if i {e}; what is it if you {e}; what do you get when you {e}; help me {e}; i need to {e}; what
happens if i {e}; would you {e}; if i {e}, what do i get; let us {e}""")
WORD_PROBLEMS_TEXT = """
@+
> {n} has {a} {i} and gets {b} more. How many {i} does {n} have now?; {n} has {a} {i} and {m} has {b}. How many do they
have together?; There are {a} {i} in one box and {b} in another. How many are there in all?; I had {a} {i} and bought
{b} more. How many {i} do I have?; {n} read {a} pages yesterday and {b} pages today. How many pages is that?
@-
> {n} has {a} {i} and gives away {b}. How many are left?; There were {a} {i} and {b} were sold. How many {i} are left?;
I have {a} euros and spend {b}. How much do I have left?; {n} had {a} {i} and lost {b} of them. How many {i} does {n}
still have?; Of {a} {i}, {b} are broken. How many are not?
@*
> There are {a} boxes with {b} {i} each. How many {i} are there?; {n} buys {a} {i} at {b} euros each. How much is
that?; {a} rows with {b} chairs each: how many chairs?; One ticket costs {a} euros. How much are {b} tickets?; Each of
{a} shelves holds {b} {i}. How many {i} is that?
@/
> {a} {i} are shared by {b} people. How many does each get?; {n} puts {a} {i} into {b} equal bags. How many are in each
bag?; {a} euros are split between {b} friends. How much does each get?; How many groups of {b} can be made from {a}
{i}?
"""
WORD_PROBLEMS = {operator: phrases_of(asks[0]) for operator, (asks, _) in grammars(WORD_PROBLEMS_TEXT).items()}
COUNTABLES = words_of("""apples, books, coins, stamps, pencils, eggs, cards, balls, cookies, flowers, bottles, tickets,
marbles, shells, buttons, chairs, cups, pears, stones, sheep, oranges, letters, candles, nails, boxes, toys, birds,
fish, trees, bags""")
SPECIAL_SUMS_TEXT = """
@sums
> [{a} squared|the square of {a}|{a} to the power of 2|{a} to the power of two|square {a}]
= {a} ** 2
> [the square root of {a}|square root of {a}|the root of {a}|sqrt({a})|sqrt of {a}]
= sqrt({a})
> [{a} to the power of {s}|{a} to the power {s}|{a} ** {s}|{a}^{s}|{a} raised to {s}|{a} raised to the power of {s}]
= {a} ** {s}
> [{p} percent of {a}|{p}% of {a}|{p} % of {a}]
= {p} / 100 * {a}
> [half of {a}|one half of {a}|the half of {a}]
= {a} / 2
> [twice {a}|double {a}|the double of {a}]
= 2 * {a}
> [{a} cubed|the cube of {a}]
= {a} ** 3
> [{a} + {b} + {c}|{a} plus {b} plus {c}|the sum of {a}, {b} and {c}|add {a}, {b} and {c}]
= {a} + {b} + {c}
> [{a} + {b} * {c}|{a} plus {b} times {c}]
= {a} + {b} * {c}
> [{a} * {b} + {c}|{a} times {b} plus {c}]
= {a} * {b} + {c}
> ({a} + {b}) * {c}
= ({a} + {b}) * {c}
> [{a} - {b} - {c}|{a} minus {b} minus {c}]
= {a} - {b} - {c}
> [{a} * {b} - {c}|{a} times {b} minus {c}]
= {a} * {b} - {c}
> ({a} - {b}) / {c}
= ({a} - {b}) / {c}
> [{a} * {b} * {c}|{a} times {b} times {c}|the product of {a}, {b} and {c}]
= {a} * {b} * {c}
"""
SPECIAL_SUMS = list(zip(*grammars(SPECIAL_SUMS_TEXT)["sums"], strict=True))


def some_number(rng: random.Random) -> int:
    digits = rng.choices([1, 2, 3, 4, 5, 6], [2, 4, 4, 4, 0.4, 0.2])[0]
    return rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def operands(operator: str, rng: random.Random) -> tuple[int, int]:
    """Two numbers that are not held out for the evaluation."""
    while True:
        first, second = some_number(rng), some_number(rng)
        if not held_out(first, operator, second):
            return first, second


def shown_number(number: str, rng: random.Random, words: float) -> str:
    if number.isdigit() and rng.random() < words:
        return in_words(int(number), rng.choice([" ", " and ", "-"]))
    return number


def two_operands(rng: random.Random) -> tuple[str, str]:
    """A sum in digits or words, and the expression for the calculator."""
    operator = rng.choice("++--**/")
    first, second = map(str, operands(operator, rng))
    if rng.random() < 0.15:
        pattern = rng.choice(WORD_PROBLEMS[operator])
        ask = expand(
            pattern.rstrip("!"), rng, a=first, b=second, i=rng.choice(COUNTABLES), n=some_name(rng), m=some_name(rng)
        )
        return ask, f"{first} {operator} {second}"
    if rng.random() < 0.07:
        first += "." + str(rng.randint(1, 99)).rstrip("0")
    if rng.random() < 0.07:
        second += "." + str(rng.randint(1, 9))
    pattern = rng.choice(BINARY[operator])
    in_word = rng.choice([0, 0, 0, 1, 1, 0.5]) if re.search("[a-w]{3}", SLOT.sub("", pattern)) else 0.0
    core = expand(pattern, rng, a=shown_number(first, rng, in_word), b=shown_number(second, rng, in_word))
    order = re.match(r"(add|subtract|take|multiply|divide|deduct|put|sum|split) ", core) is not None
    frame = rng.choice(ORDER_FRAMES) if order else rng.choice(RESULT_FRAMES)
    return spoken(
        frame.replace("{e}", core), rng, "?" if frame.startswith(("what", "how", "do you")) else "", loose=False
    ), f"{first} {operator} {second}"


def special_sum(rng: random.Random) -> tuple[str, str]:
    ask, expression = rng.choice(SPECIAL_SUMS)
    values = {
        "a": str(some_number(rng)),
        "b": str(some_number(rng)),
        "c": str(some_number(rng)),
        "s": str(rng.randint(2, 12)),
        "p": str(rng.randint(1, 99)),
    }
    core = expand(ask, rng, **values)
    frame = rng.choice(RESULT_FRAMES) if not core.startswith(("add ", "square {")) else "{e}"
    return spoken(
        frame.replace("{e}", core), rng, "?" if frame.startswith(("what", "how")) else "", loose=False
    ), expand(expression, rng, **values)


def safe_result(expression: str) -> str:
    """What a calculator answers, or its error."""
    try:
        value = eval(expression, {"__builtins__": {}, "sqrt": math.sqrt})  # our own expressions only
    except (ZeroDivisionError, OverflowError):
        return "division by zero"
    if isinstance(value, int) and value > 10**18:
        return f"{float(value):g}"
    return str(value)


def schema(name: str, description: str, parameters: dict[str, tuple[str, str]], rng: random.Random) -> Message:
    """A tool as OpenAI clients send it; `parameters` maps a name to type and description."""
    properties = {
        key: {"type": kind, **({"description": text} if text and rng.random() < 0.7 else {})}
        for key, (kind, text) in parameters.items()
    }
    body: Message = {"type": "object", "properties": properties}
    if rng.random() < 0.85:
        body["required"] = list(parameters)
    if rng.random() < 0.08:
        body["additionalProperties"] = False
    function = (
        {"name": name, "description": description, "parameters": body}
        if rng.random() < 0.93
        else {"name": name, "parameters": body}
    )
    return {"type": "function", "function": function}


CALCULATOR_SAYS = phrases_of("""Evaluate an arithmetic expression; Calculates an arithmetic expression.; A calculator;
Evaluates arithmetic and math functions.; Work out a sum; Compute the value of an expression; Arithmetic: + - * / **
and math functions; Calculate; Does arithmetic; Evaluate a mathematical expression and return the result; Useful for
arithmetic; Perform a calculation""")


def calculator(name: str, parameter: str, rng: random.Random) -> Message:
    text = rng.choice(
        phrases_of("""The expression; e.g. 2 + 3 * 4; Expression to evaluate; An arithmetic expression;
The arithmetic expression, for example 2 * (3 + 4)""")
    )
    return schema(name, rng.choice(CALCULATOR_SAYS), {parameter: ("string", text)}, rng)


@dataclass(frozen=True)
class ToolKind:
    """A sort of tool with one string argument: how it may be called, asked for, and what it returns."""

    names: list[str]
    says: list[str]
    parameters: list[str]
    asks: list[str]
    value: Callable[[random.Random], str]
    result: Callable[[random.Random, str], Any]
    answers: list[str]


def weather_result(rng: random.Random, place: str) -> Any:
    sky, degrees = (
        rng.choice(words_of("sunny, cloudy, rainy, snowy, windy, foggy, clear, stormy, overcast, hot, cold, mild")),
        rng.randint(-15, 40),
    )
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


def some_path(rng: random.Random) -> str:
    return (
        rng.choice(["", "docs/", "/tmp/", "data/", "notes/", invented_word(rng) + "/"])
        + rng.choice([rng.choice(WORDS), invented_word(rng)])
        + rng.choice([".txt", ".md", ".json", ".csv", ".log", ".py"])
    )


def some_url(rng: random.Random) -> str:
    return (
        rng.choice(["http://", "https://"])
        + rng.choice(["example.com", invented_word(rng) + ".org", "www." + invented_word(rng) + ".com"])
        + rng.choice(["", "/", "/" + rng.choice(WORDS), "/" + rng.choice(WORDS) + ".html"])
    )


TOOLS_TEXT = """
@weather.names
> get_weather, weather, current_weather, get_current_weather, weather_lookup, lookup_weather, check_weather,
fetch_weather, weather_report, weather_now, forecast, get_forecast, city_weather, query_weather
@weather.says
> Get the weather for a city; Current weather of a place; Returns the weather in a city.; Get the current weather in a
given location; Weather report for a location; Looks up the weather; Tells the weather; Forecast for a city
@weather.parameters
> city, location, place, town, city_name, where, query, name
@weather
> [what is|what's|how is|how's] the weather [like |][in|at] {v}[| today| now| right now| at the moment]
> [is it|will it be] [raining|sunny|cold|warm|hot|snowing|windy|cloudy|wet|nice|freezing] in {v}[| today| now| tomorrow]
> weather [in|for] {v}[| please]
> {v} weather
> [tell me|give me|show me|check|look up|find out|i need|get] the [weather|current weather|forecast|temperature]
[in|for] {v}
> [what is|what's] the [temperature|forecast] [in|for] {v}[| today| now]
> how [warm|cold|hot] is it in {v}[| today| now]
> do i need [an umbrella|a coat|a jacket|sunglasses] in {v}[| today]
> i am [going|travelling] to {v}, how is the weather[| there]
> [should i take|do i take] an umbrella to {v}
> what weather [do they have|is there] in {v}
> does it [rain|snow] in {v}[| now| today]
> how does the sky look in {v}
> forecast for {v}
= The weather in {v}: {r}.
= In {v}: {r}.
@time.names
> get_time, current_time, time_in, clock, local_time, world_clock, time_lookup, get_local_time, what_time
@time.says
> Get the current time in a city; Local time of a place; Tells the time in a city.; World clock
@time.parameters
> city, place, location, timezone, where, zone
@time
> what time is it in {v}[| now]
> [what is|what's|tell me|give me] the [time|local time|current time] in {v}
> time in {v}
> how late is it in {v}
> the clock in {v}
> is it late in {v}
> which time is it in {v}
= The time in {v}: {r}.
= In {v} it is {r}.
@search.names
> search, web_search, search_web, find, lookup, google, search_docs, query, internet_search, look_up, search_notes,
find_info
@search.says
> Search the web; Search for a query; Finds documents; Looks something up; Full text search; Searches the internet for
information
@search.parameters
> query, q, text, term, keywords, search_term, topic
@search
> search [for|the web for] {v}
> [look up|google|find|search] {v}
> find [something|information|documents|news|pages] about {v}
> look for {v}[| on the web| online]
> what does the web say about {v}
> do a search for {v}
> can you search {v}
> search the internet for {v}
= I found: {r}.
= The search for {v} gave: {r}.
@define.names
> define, dictionary, define_word, get_definition, word_meaning, thesaurus, lookup_word, definition
@define.says
> Define a word; Dictionary; The meaning of a word; Looks a word up in the dictionary
@define.parameters
> word, term, entry, text
@define
> define {v}
> what does [|the word ]{v} mean
> [look up|find|check] [|the word ]{v} in the dictionary
> the [meaning|definition] of {v}
> what is the definition of {v}
> give me the definition of {v}
> dictionary entry for {v}
= {v}: {r}.
= The dictionary says about {v}: {r}.
@price.names
> get_price, price, stock_price, get_stock_price, price_lookup, quote, check_price, share_price, get_quote
@price.says
> Get the price of a product; Current price; Stock price of a company; Look up a price
@price.parameters
> product, symbol, company, item, ticker, name
@price
> [what is|what's|tell me|give me|check] the price of {v}
> how much [is|are|does] {v}[| cost]
> price of {v}
> [what does|how much does] {v} cost
> the current price of {v}
> look up the price of {v}
= The price of {v}: {r}.
= {v} costs {r}.
@play.names
> play_music, play, play_song, music, start_song, media_player, play_track
@play.says
> Play a song; Plays music; Start a song by its title; Media player
@play.parameters
> song, title, track, name, artist
@play
> play {v}
> [start|put on] [the song |]{v}
> i want to hear [the song |]{v}
> play the song {v}
> can you play {v}
> let me hear the song {v}
> play some {v}
= Done. The player says: {r}.
= The song {v}: {r}.
@file.names
> file_read, read_file, open_file, cat, get_file, load_file, show_file
@file.says
> Read a file; Returns the text of a file; Opens a file and returns its content
@file.parameters
> path, file, filename, file_path, name
@file
> [read|open|show me|show|print|load] [|the file ]{v}
> what [is in|does] the file {v}[| say]
> what is in {v}
> the content of {v}
> can you read {v}
> show the text of {v}
> give me the contents of {v}
= The file says: {r}.
= {v} contains: {r}.
@fetch.names
> http_get, fetch, get_url, download, fetch_page, open_url, web_get, browse
@fetch.says
> Fetch a web page; HTTP GET of a URL; Downloads a page; Gets the text of a URL
@fetch.parameters
> url, address, link, uri, page
@fetch
> [fetch|get|open|download|load|read|visit] {v}
> what is on {v}
> get the page {v}
> what does {v} say
> open the page {v}
> download the page {v}
= The page says: {r}.
= {v} returned: {r}.
@mail.names
> send_message, notify, send_note, add_note, save_note, remember, add_todo, create_reminder, remind_me, add_task
@mail.says
> Save a note; Add something to the list; Stores a reminder; Adds a task; Remember a text for later
@mail.parameters
> text, note, message, task, content, body
@mail
> [remind me|remember|note|write down|save|add]: {v}
> [save|make|add|take] a note: {v}
> add {v} to my list
> put {v} on my list
> note that {v}
> remind me of {v}
> add a task: {v}
> save this note: {v}
> remember that {v}
= Done: {r}.
= It is noted. The tool says: {r}.
@person.names
> get_user, find_person, lookup_contact, phone_book, get_contact, find_user, contacts, user_info
@person.says
> Find a person; Look up a contact; Returns data of a user; Phone book
@person.parameters
> name, person, user, contact, who, username
@person
> [find|look up|show me|get] [the contact |the user |the number of |]{v}
> what is the [number|phone number|address|email] of {v}
> [who is|where is] the [user|contact] {v}
> give me the phone number of {v}
> {v}'s phone number
> look for {v} in my contacts
= I found this about {v}: {r}.
= {v}: {r}.
@room.names
> light_on, turn_on, switch_on, lights, switch, set_light, device_on
@room.says
> Turn on the light in a room; Switches a device on; Light switch; Smart home switch
@room.parameters
> room, device, name, target, where
@room
> [turn on|switch on] the [light|lamp|lights] in the {v}
> [turn|switch] the {v} [light|lamp] on
> light in the {v} please
> make light in the {v}
> i need light in the {v}
> it is dark in the {v}
> lights on in the {v}
= Done. The {v}: {r}.
= The light in the {v}: {r}.
"""
TOOL_TEXTS = grammars(TOOLS_TEXT)


def some_words(low: int, high: int) -> Callable[[random.Random], str]:
    return lambda rng: " ".join(rng.sample(WORDS, rng.randint(low, high)))


def some_product(rng: random.Random) -> str:
    return rng.choice([rng.choice(WORDS), invented_word(rng).upper(), sentence(invented_word(rng))])


def some_room(rng: random.Random) -> str:
    return rng.choice(
        words_of("""kitchen, garden, bedroom, bathroom, cellar, hall, office, garage, attic, library,
workshop, kennel, studio""")
    )


def player_result(rng: random.Random, value: str) -> Any:
    return rng.choice(["playing", "ok", {"status": "playing"}, f"Now playing {value}"])


def note_result(rng: random.Random, _value: str) -> Any:
    return rng.choice(["saved", "ok", {"status": "saved"}, {"id": rng.randint(1, 999)}, "done"])


def person_result(rng: random.Random, value: str) -> Any:
    number = {"name": value, "phone": str(rng.randint(10000, 999999))}
    return rng.choice([str(rng.randint(10000, 9999999)), number, {"email": value.lower() + "@example.com"}])


def light_result(rng: random.Random, _value: str) -> Any:
    return rng.choice(["on", "ok", {"state": "on"}, "done", "light is on"])


def tool_kind(
    name: str, value: Callable[[random.Random], str], result: Callable[[random.Random, str], Any]
) -> ToolKind:
    """The sort of tool whose texts stand under `name`."""
    names, says, parameters = (TOOL_TEXTS[f"{name}.{part}"][0][0] for part in ("names", "says", "parameters"))
    asks, answers = TOOL_TEXTS[name]
    return ToolKind(words_of(names), phrases_of(says), words_of(parameters), asks, value, result, answers)


TOOL_KINDS: dict[str, ToolKind] = {
    "weather": tool_kind("weather", some_city, weather_result),
    "time": tool_kind("time", some_city, time_result),
    "search": tool_kind("search", some_words(1, 3), words_result),
    "define": tool_kind("define", lambda rng: rng.choice([rng.choice(WORDS), invented_word(rng)]), words_result),
    "price": tool_kind("price", some_product, number_result),
    "play": tool_kind("play", lambda rng: sentence(some_words(1, 3)(rng)), player_result),
    "file": tool_kind("file", some_path, words_result),
    "fetch": tool_kind("fetch", some_url, words_result),
    "mail": tool_kind("mail", some_words(2, 4), note_result),
    "person": tool_kind("person", some_name, person_result),
    "room": tool_kind("room", some_room, light_result),
}


def as_content(result: Any) -> str:
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)


def readable(result: Any, asked: str) -> str:
    """A tool's result as words: the values of an object but for what was asked, or the text itself."""
    if not isinstance(result, dict):
        return str(result).rstrip(".!")
    shown = {key: value for key, value in result.items() if value != asked and not isinstance(value, bool)}
    return ", ".join(f"{value} degrees" if key.startswith("temp") else str(value) for key, value in shown.items())


@dataclass(frozen=True)
class Offer:
    """A tool in a conversation: its schema, and its argument's name."""

    kind: str
    tool: Message
    parameter: str


def other_name(name: str, rng: random.Random) -> str:
    """A tool's name varied so widely that a model can only copy it from the system text."""
    word, odd = rng.choice(WORDS), invented_word(rng)
    extra = rng.choice([word, word, odd, rng.choice(["my", "tool", "api", "do", "v2", "now", "city", "by", "info"])])
    joined = rng.choice(
        [f"{extra}_{name}", f"{name}_{extra}", f"{name}_{extra}", f"{word}_{odd}", odd + word, f"{odd}_{name}"]
    )
    return rng.choice([joined, joined, joined.replace("_", "-"), joined.title().replace("_", "")])


def some_offer(kind: str, rng: random.Random) -> Offer:
    """A tool of this sort, under one of its names or another, with one of its parameters or another."""
    if kind == "calculator":
        name, parameter = "calculator", "expression"
        if rng.random() < 0.12:
            name, parameter = (
                other_name("calculator", rng),
                rng.choice(words_of("expression, expr, formula, input, sum")),
            )
        return Offer(kind, calculator(name, parameter, rng), parameter)
    sort = TOOL_KINDS[kind]
    name, parameter = rng.choice(sort.names), rng.choice(sort.parameters)
    if rng.random() < 0.55:
        name = other_name(name, rng)
    if rng.random() < 0.3:
        parameter = rng.choice([rng.choice(WORDS), invented_word(rng), "input", "value", "arg", "x", "item", "target"])
    extra = {parameter: ("string", rng.choice([f"The {parameter}", f"Name of the {parameter}", sort.says[0], ""]))}
    return Offer(kind, schema(name, rng.choice(sort.says), extra, rng), parameter)


def offers(rng: random.Random, wanted: str = "", without: str = "") -> list[Offer]:
    kinds = [kind for kind in ["calculator", *TOOL_KINDS] if kind not in (wanted, without)]
    weights = [4 if kind == "calculator" else 3 if kind == "weather" else 1 for kind in kinds]
    chosen: list[str] = [wanted] if wanted else []
    for kind in rng.choices(kinds, weights, k=rng.choices([0, 1, 2, 3], [6 if wanted else 0, 6, 3, 1])[0]):
        if kind not in chosen:
            chosen.append(kind)
    rng.shuffle(chosen)
    return [some_offer(kind, rng) for kind in chosen]


def call_message(calls: list[tuple[str, dict[str, str]]]) -> Message:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": f"call_{at}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for at, (name, arguments) in enumerate(calls)
        ],
    }


SUM_ANSWERS = phrases_of("""{e} = {r}.; The answer is {r}.; The result is {r}.; That is {r}.""")
SUM_FAILS = ["The calculator reports an error: {r}."]


def calculator_result(expression: str, result: str, rng: random.Random) -> Any:
    """A result as one of the servers or clients that run a calculator might write it."""
    if result == "division by zero":
        return rng.choice([{"error": result}, result, {"success": False, "error": result}])
    number = json.loads(result) if re.fullmatch(r"-?\d+(\.\d+)?", result) else result
    plain: list[Any] = [result, result, {"result": number}, {"value": number}]
    return rng.choice(
        [*plain, {"success": True, "result": number, "error": None}, {"expression": expression, "result": number}]
    )


def calculator_turns(chat: Chat, offer: Offer, rng: random.Random) -> None:
    """Question, call, result, answer; now and then two sums at once."""
    if rng.random() < 0.06:
        question, expressions = two_sums(rng)
    else:
        question, expression = two_operands(rng) if rng.random() < 0.82 else special_sum(rng)
        expressions = [expression]
    chat.add("user", question)
    name = offer.tool["function"]["name"]
    chat.messages.append(call_message([(name, {"expression": expression}) for expression in expressions]))
    results = [safe_result(expression) for expression in expressions]
    for at, (expression, result) in enumerate(zip(expressions, results, strict=True)):
        chat.add("tool", as_content(calculator_result(expression, result, rng)), tool_call_id=f"call_{at}")
    if len(results) > 1:
        chat.add("assistant", " ".join(f"{e} = {r}." for e, r in zip(expressions, results, strict=True)))
    else:
        frames = SUM_FAILS if results[0] == "division by zero" else SUM_ANSWERS[:1] * 3 + SUM_ANSWERS
        chat.add("assistant", expand(rng.choice(frames), rng, e=expressions[0], r=results[0]))


def two_sums(rng: random.Random) -> tuple[str, list[str]]:
    """Two sums in one question, for two calls in one turn."""
    texts, expressions = [], []
    for _ in range(2):
        operator = rng.choice("+-*/")
        first, second = operands(operator, rng)
        word = rng.choice(
            {"+": ["+", "plus"], "-": ["-", "minus"], "*": ["*", "times"], "/": ["/", "divided by"]}[operator]
        )
        texts.append(f"{first} {word} {second}")
        expressions.append(f"{first} {operator} {second}")
    return expand(ASK["two_sums"], rng, a=texts[0], b=texts[1]), expressions


QUESTION_WORDS = set(words_of("what, what's, how, how's, is, do, does, can, should, will, who, where, which"))


def tool_failure(offer: Offer, rng: random.Random) -> tuple[Any, str]:
    """An error that a tool may answer, as it comes back and in words."""
    error = rng.choice(
        ["not found", "timeout", "no connection", "access denied", "failed", "unknown " + offer.parameter]
    )
    return rng.choice([{"error": error}, {"success": False, "error": error}, "error: " + error]), error


def tool_turns(chat: Chat, offer: Offer, rng: random.Random) -> None:
    """Request, call, result or error, answer."""
    sort = TOOL_KINDS[offer.kind]
    value = sort.value(rng)
    core = expand(rng.choice(sort.asks), rng, v=value)
    chat.add("user", spoken(core, rng, "?" if core.split()[0] in QUESTION_WORDS else "", loose=False))
    chat.messages.append(call_message([(offer.tool["function"]["name"], {offer.parameter: value})]))
    if rng.random() < 0.05:
        result, error = tool_failure(offer, rng)
        answer = f"The tool reports an error: {error}."
    else:
        result = sort.result(rng, value)
        answer = expand(rng.choice(sort.answers), rng, v=value, r=readable(result, value))
    chat.add("tool", as_content(result), tool_call_id="call_0")
    chat.add("assistant", answer)


NO_TOOL = {
    "calculator": "I cannot calculate that reliably without a calculator tool.",
    "weather": "I cannot look up the weather: no tool for that is offered.",
    "time": "I cannot look up the time: no tool for that is offered.",
}


def missing_tool(rng: random.Random, kinds: set[str]) -> tuple[str, str] | None:
    """A request for which the tool is not there: say so instead of guessing."""
    kind = rng.choice(list(NO_TOOL))
    if kind in kinds:
        return None
    if kind == "calculator":
        return two_operands(rng)[0], NO_TOOL[kind]
    core = expand(rng.choice(TOOL_KINDS[kind].asks), rng, v=TOOL_KINDS[kind].value(rng))
    return spoken(core, rng, "?", loose=False), NO_TOOL[kind]


# ── Conversations ────────────────────────────────────────────────────────────────────────────────────────────────────

PLAIN_SYSTEMS = phrases_of("""You are a helpful assistant.; You are a helpful assistant; You are shimmy-tiny.; You are
a friendly assistant.; Answer the user's questions.; You are a small assistant that helps with shimmy.; Be helpful.;
You are an assistant. Be brief and polite.; You help users.; You are a helpful AI assistant.; Be kind.; Help the user.;
You are a useful assistant.; You are a polite and helpful assistant. Answer in English.; Be a good assistant.; You are
a chat model.; You are an assistant with tools.; Use the tools when needed.""")
UPPER_SYSTEMS = phrases_of("""[answer|reply|respond|write|speak|talk] [only |always |]in [upper case|uppercase|capital
letters|capitals|all caps|upper-case letters|block letters][| only| letters]; [use|write with] [only |nothing but
|][capital letters|upper case|uppercase letters|capitals]; [all|your|every one of your] answers [must be|are|should
be|have to be] in [upper case|uppercase|capital letters|all caps]; you [must|should|have to|always]
[answer|speak|write|reply] in [upper case|uppercase|capital letters|all caps|capitals]; write everything in [upper
case|uppercase|capital letters|capitals]; [upper case|uppercase|capital letters|all caps] only; you are a helpful
assistant [that|who] [answers|writes|speaks] in [upper case|uppercase|capital letters|capitals]""")
WORD_SYSTEMS = phrases_of("""[answer|reply|respond] [only |always |]with [one word|a single word|one word only|just one
word|exactly one word]; [use|give] [only |just |][one word|a single word][| per answer| for each answer| as the
answer]; [answer|reply|respond] in [one word|a single word|one word only]; [one word|one-word|single word|single-word]
answers only; [your|all] answers [must be|are|should be] [one word|a single word|one word long]; you
[must|should|always|have to] [answer|reply] [with|in] [one|a single] word; be very brief: [one word|a single word]; you
are a helpful assistant [that|who] [answers|replies] [with|in] one word; give one-word answers; only one word per
answer""")
THINK_SYSTEMS = phrases_of("""[think|reason] [first|before you answer|before answering|step by step|step by step before
you answer]; [write|show|give] your thoughts [first|before the answer]; think, then answer; always think before you
[answer|reply]""")


def system_text(patterns: list[str], rng: random.Random) -> str:
    text = expand(rng.choice(patterns), rng)
    return (sentence(text) if rng.random() < 0.8 else text) + rng.choice([".", ".", "", "!"])


def plain_turn(rng: random.Random) -> tuple[str, str]:
    """One request of any kind that needs no tool."""
    makers: list[Callable[[random.Random], tuple[str, str]]] = [
        small_talk,
        shimmy_question,
        lambda r: fact(r)[:2],
        story,
        json_task,
        unknown,
    ]
    return rng.choices(makers, [70, 26, 60, 3, 8, 3])[0](rng)


def plain_chat(rng: random.Random, turns: int) -> Chat:
    chat = Chat()
    if rng.random() < 0.22:
        chat.add("system", rng.choice(PLAIN_SYSTEMS))
    for _ in range(turns):
        ask, answer = (missing_tool(rng, set()) if rng.random() < 0.04 else None) or plain_turn(rng)
        chat.add("user", ask)
        chat.add("assistant", answer)
    return chat


def styled_chat(rng: random.Random, turns: int) -> Chat:
    """A system prompt that asks for upper case, for one word, or for thoughts first."""
    chat = Chat()
    style = rng.choice(["upper", "upper", "word", "word", "think"])
    chat.add("system", system_text({"upper": UPPER_SYSTEMS, "word": WORD_SYSTEMS, "think": THINK_SYSTEMS}[style], rng))
    for _ in range(turns):
        if style == "word":
            ask, answer = one_word(rng)
        elif style == "upper":
            ask, answer = rng.choices([lambda r: fact(r)[:2], small_talk], [3, 2])[0](rng)
            answer = answer.upper()
        else:
            ask, answer = rng.choices([lambda r: fact(r)[:2], shimmy_question], [2, 2])[0](rng)
            answer = f"<think>\nThe user asks: {ask}\n</think>\n\n{answer}"
        chat.add("user", ask)
        chat.add("assistant", answer)
    return chat


def one_word(rng: random.Random) -> tuple[str, str]:
    """A request and its answer in one word."""
    if rng.random() < 0.15:
        kind = rng.choice(["greeting", "thanks", "bye", "who", "how_are_you"])
        ask = expand(rng.choice(SMALL_TALK[kind][0]), rng, name=some_name(rng))
        return spoken(ask, rng), {
            "greeting": "Hello!",
            "thanks": "Welcome!",
            "bye": "Goodbye!",
            "who": "shimmy-tiny",
            "how_are_you": "Well!",
        }[kind]
    while True:
        ask, _, short = fact(rng)
        if " " not in short:
            return ask, short


def tool_chat(rng: random.Random, turns: int) -> Chat:
    """Tools are offered; some requests need one, some do not, and for some none fits."""
    kind = rng.choices(["calculator", *TOOL_KINDS], [10] + [4 if name == "weather" else 1 for name in TOOL_KINDS])[0]
    offered = offers(rng, kind) if rng.random() < 0.9 else offers(rng)
    chat = Chat(tools=[offer.tool for offer in offered])
    if rng.random() < 0.3:
        chat.add("system", rng.choice(PLAIN_SYSTEMS))
    for _ in range(turns):
        if rng.random() < 0.66:
            offer = rng.choices(offered, [3 if offer.kind == "calculator" else 1 for offer in offered])[0]
            (calculator_turns if offer.kind == "calculator" else tool_turns)(chat, offer, rng)
        else:
            ask, answer = (
                missing_tool(rng, {offer.kind for offer in offered}) if rng.random() < 0.12 else None
            ) or plain_turn(rng)
            chat.add("user", ask)
            chat.add("assistant", answer)
    return chat


def conversation(rng: random.Random, long: bool = False) -> Chat:
    """One conversation of any kind; `long` ones fill a window of 2,048 positions."""
    maker = rng.choices([plain_chat, tool_chat, styled_chat], [58, 26, 16])[0]
    shares = [30, 30, 22, 18] if maker is tool_chat else [60, 22, 12, 6]  # tools take many tokens, so use them well
    turns = rng.randint(8, 30) if long else rng.choices([1, 2, 3, 4], shares)[0]
    while True:
        chat = maker(rng, turns)
        if not any(
            message["role"] == "user" and normalized(message["content"]) in FORBIDDEN for message in chat.messages
        ):
            return chat


def held_out_sentences() -> set[str]:
    """The evaluation's own sentences, in normal form: no training text may contain them as a request."""
    try:
        sys.path.insert(0, str(HERE))
        from eval_tiny import PHRASES
    except ImportError:
        return set()
    return {normalized(text) for text in PHRASES}


FORBIDDEN: set[str] = held_out_sentences()


# ── Tokenizer ────────────────────────────────────────────────────────────────────────────────────────────────────────
# Byte-level BPE: every byte has a piece, so every text can be written. The pattern is llama.cpp's "qwen2": it splits
# digits singly, without which numbers could not be copied.

VOCABULARY = 2560
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKERS = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
PRETOKENIZER = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(path: Path, samples: int = 30000) -> Tokenizer:
    rng = random.Random(SEED)
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRETOKENIZER), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=CONTROL + MARKERS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((conversation(rng).render() for _ in range(samples)), trainer)
    tokenizer.save(str(path))
    return tokenizer


def token_id(tokenizer: Tokenizer, piece: str) -> int:
    found = tokenizer.token_to_id(piece)
    assert found is not None, piece
    return int(found)


# ── Batches ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Batches:
    """Windows of whole conversations; every conversation starts in the window in which it ends, where it fits."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.end = token_id(tokenizer, "<|endoftext|>")
        self.turn_end = token_id(tokenizer, "<|im_end|>")
        self.header = tokenizer.encode("<|im_start|>assistant\n").ids

    def encode(self, chat: Chat, rng: random.Random) -> tuple[list[int], list[float]]:
        """Tokens, and the weight of predicting each: 1 in what the assistant says; elsewhere half, for one in seven."""
        ids = [*self.tokenizer.encode(chat.render()).ids, self.end]
        weights, spoken_by_model, width = [], False, len(self.header)
        for at, token in enumerate(ids):
            weights.append(1.0 if spoken_by_model else OTHER_WEIGHT if rng.random() < OTHER_SHARE else 0.0)
            if ids[max(0, at + 1 - width) : at + 1] == self.header:
                spoken_by_model = True
            elif token == self.turn_end:
                spoken_by_model = False
        return ids, weights

    def window(self, rng: random.Random, width: int) -> tuple[list[int], list[float]]:
        """`width` + 1 tokens; the last conversation is cut where the window ends."""
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) <= width:
            tries = 0
            more, its = self.encode(conversation(rng, long=width > 1000), rng)
            while len(ids) + len(more) > width + 1 and ids and tries < 3:
                tries += 1
                more, its = self.encode(conversation(rng), rng)
            ids += more
            weights += its
        return ids[: width + 1], weights[: width + 1]

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and weights of one step; the same for the same step, always."""
        rng = random.Random(SEED * 1000003 + step)
        rows, width = (2, 2048) if step % 24 == 23 else (8, 512)
        windows = [self.window(rng, width) for _ in range(rows)]
        return np.array([ids for ids, _ in windows], np.int32), np.array(
            [weights for _, weights in windows], np.float32
        )


def batches_ahead(
    tokenizer_path: Path, start: int, steps: int, ahead: int = 8
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The batches from `start` on, written by a second process while the first one trains."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        1, mp_context=context, initializer=start_writer, initargs=(str(tokenizer_path),)
    ) as writer:
        waiting = deque(writer.submit(write_batch, step) for step in range(start, min(start + ahead, steps)))
        for step in range(start, steps):
            batch = waiting.popleft().result()
            if step + ahead < steps:
                waiting.append(writer.submit(write_batch, step + ahead))
            yield batch


WRITER: list[Batches] = []


def start_writer(tokenizer_path: str) -> None:
    WRITER.append(Batches(Tokenizer.from_file(tokenizer_path)))


def write_batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    return WRITER[0].batch(step)


# ── Model ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Shape:
    """The llama architecture, small: all widths are multiples of 32, which Q8_0 needs."""

    vocabulary: int = VOCABULARY
    context: int = 2048
    width: int = 192
    layers: int = 6
    heads: int = 6
    hidden: int = 512
    rope_base: float = 10000.0
    epsilon: float = 1e-5


class Norm(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.epsilon)


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.attn_norm, self.ffn_norm = Norm(shape.width, shape.epsilon), Norm(shape.width, shape.epsilon)
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.output = nn.Linear(shape.width, shape.width, bias=False)
        self.gate_up = nn.Linear(shape.width, 2 * shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(self.attn_norm(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(rotated(q, cos, sin), rotated(k, cos, sin), v, is_causal=True)
        x = x + self.output(seen.transpose(1, 2).reshape(rows, length, width))
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, -1)
        fed: Tensor = self.down(F.silu(gate) * up)
        return x + fed


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions over the two halves of a head; `interleaved` turns this layout into llama.cpp's."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)


class Tiny(nn.Module):
    """The whole model; the output shares the embedding's weights."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.width, shape.epsilon)
        half = shape.width // shape.heads // 2
        angles = torch.outer(
            torch.arange(shape.context).float(), shape.rope_base ** (-torch.arange(half).float() / half)
        )
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = 0.02 / math.sqrt(2 * shape.layers) if "output" in name or "down" in name else 0.04
                nn.init.normal_(parameter, std=scale)

    def forward(self, ids: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Logits at every position, or only where the mask `wanted` says so."""
        x = self.embedding(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]  # type: ignore[index]
        for block in self.blocks:
            x = block(x, cos, sin)
        x = self.norm(x if wanted is None else x[wanted])
        logits: Tensor = x @ self.embedding.weight.T
        return logits


# ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────────

STEPS = 4000
OTHER_WEIGHT, OTHER_SHARE = 0.5, 0.15
PEAK_RATE = 3e-3
WARM_UP = 150
TOKENS_PER_STEP = 4096
CHECKPOINT_SECONDS = 120


def optimizers_of(model: Tiny) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, whose updates it makes orthogonal, and AdamW for embedding and norms.

    Muon adds a tenth to the time of a step, and is known to need fewer tokens than AdamW alone (not measured here).
    """
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    rest = [p for name, p in model.named_parameters() if p.dim() < 2 or name.startswith("embedding")]
    muon = torch.optim.Muon(matrices, lr=PEAK_RATE, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(rest, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [muon, adam]


def rate(step: int, steps: int) -> float:
    """Share of the peak rate: a short rise, then half a cosine down to a hundredth."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - WARM_UP) / max(1, steps - WARM_UP))))


class Progress:
    """One line on stderr: redrawn on a terminal, else written now and then."""

    def __init__(self, steps: int, start: int) -> None:
        self.steps, self.start, self.began, self.shown = steps, start, time.monotonic(), 0.0
        self.live = sys.stderr.isatty()

    def show(self, step: int, loss: float) -> None:
        now = time.monotonic()
        if now - self.shown < (0.5 if self.live else 30) and step < self.steps:
            return
        self.shown = now
        speed = (step - self.start) / (now - self.began)
        left = int((self.steps - step) / speed)
        bar = "#" * (30 * step // self.steps)
        line = (
            f"[{bar:<30}] {step}/{self.steps}  loss {loss:.3f}  {speed * TOKENS_PER_STEP:.0f} tokens/s  "
            f"{left // 60}:{left % 60:02d} left"
        )
        print(
            ("\r" + line + " ") if self.live else line,
            end="" if self.live and step < self.steps else "\n",
            file=sys.stderr,
            flush=True,
        )


class Threads:
    """How many threads a step uses: all of them, or one for a while after the machine turned out to be busy.

    Two threads wait for each other many times a step: where another program holds a core, one alone is faster.
    """

    def __init__(self, count: int) -> None:
        self.count, self.alone, self.best = count, 0, math.inf

    def begin(self) -> None:
        self.began = time.monotonic()
        torch.set_num_threads(1 if self.alone else self.count)

    def end(self) -> None:
        seconds = time.monotonic() - self.began
        if self.alone:
            self.alone -= 1
        elif seconds > 2.2 * self.best:
            self.alone = 20
        self.best = min(self.best, seconds)


def keep_memory() -> None:
    """Has glibc keep freed memory instead of giving it back: without page faults a step takes a quarter less time."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own from the kernel
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def fast_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself; elsewhere that type is emulated and slow."""
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "avx512_bf16" in flags.read_text()


def save(path: Path, model: Tiny, optimizers: list[torch.optim.Optimizer], facts: dict[str, Any]) -> None:
    temporary = path.with_suffix(".part")
    torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], **facts}, temporary)
    os.replace(temporary, path)


def train_step(model: Tiny, batch: tuple[np.ndarray, np.ndarray], low_precision: bool) -> float:
    """One forward and backward pass; gives the loss in what the assistant says."""
    ids, weights = torch.from_numpy(batch[0]).long(), torch.from_numpy(batch[1])[:, 1:]
    wanted = weights > 0  # the logits are a third of the work, so they are made only where they count
    weights = weights[wanted]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low_precision):
        logits = model(ids[:, :-1], wanted)
    losses = F.cross_entropy(logits.float(), ids[:, 1:][wanted], reduction="none")
    (losses @ weights / weights.sum()).backward()  # type: ignore[no-untyped-call]
    return float(losses.detach()[weights == 1.0].mean())


def update(optimizers: list[torch.optim.Optimizer], learning_rate: float) -> None:
    """One step of both optimizers at this rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()


def resume(path: Path, model: Tiny, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Step, seconds and loss of the checkpoint, whose weights are loaded; of a beginning when there is none."""
    if not path.exists():
        return {"step": 0, "seconds": 0.0, "loss": 0.0}
    facts: dict[str, Any] = torch.load(path)
    model.load_state_dict(facts.pop("model"))
    for optimizer, state in zip(optimizers, facts.pop("optimizers"), strict=True):
        optimizer.load_state_dict(state)
    return facts


def stop_signals() -> list[int]:
    """A list to which Ctrl-C and SIGTERM add themselves, so that a checkpoint can be written first."""
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda got, _frame: received.append(got))
    return received


def train(work: Path, steps: int, threads: int) -> None:
    """Trains up to `steps`, from the checkpoint in `work` when there is one."""
    torch.manual_seed(SEED)
    keep_memory()
    model, path = Tiny(Shape()), work / "checkpoint.pt"
    optimizers = optimizers_of(model)
    facts = resume(path, model, optimizers)
    start, loss, low_precision = facts["step"], facts["loss"], fast_bfloat16()
    team, progress, stopped = Threads(threads), Progress(steps, start), stop_signals()
    began = time.monotonic() - facts["seconds"]
    saved = time.monotonic()
    for step, batch in enumerate(batches_ahead(work / "tokenizer.json", start, steps), start + 1):
        team.begin()
        now = train_step(model, batch, low_precision)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update(optimizers, PEAK_RATE * rate(step - 1, steps))
        team.end()
        loss = 0.98 * loss + 0.02 * now if loss else now
        progress.show(step, loss)
        if time.monotonic() - saved > CHECKPOINT_SECONDS or step == steps or stopped:
            saved = time.monotonic()
            save(path, model, optimizers, {"step": step, "seconds": saved - began, "loss": loss})
        if stopped:
            sys.exit(f"stopped at step {step}; the same command goes on from there")


# ── Export and self-check ────────────────────────────────────────────────────────────────────────────────────────────

DESCRIPTION = (
    "A very small chat model, trained from nothing on text written by its own generator: a "
    "demonstration and test fixture for "
    "the shimmy server. It greets, answers questions about shimmy, tells short stories, gives small facts, writes "
    "simple JSON "
    "and calls tools. It knows nothing else."
)


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from the halves layout to llama.cpp's, where the two of a rotated pair are neighbours."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def tensors_of(model: Tiny) -> Iterator[tuple[str, np.ndarray]]:
    """The weights by llama.cpp's names; the output is tied to token_embd and so is left out."""
    weights = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
    heads = model.shape.heads
    yield "token_embd.weight", weights["embedding.weight"]
    for at in range(model.shape.layers):
        ours, theirs = f"blocks.{at}.", f"blk.{at}."
        q, k, v = np.split(weights[ours + "qkv.weight"], 3)
        gate, up = np.split(weights[ours + "gate_up.weight"], 2)
        yield theirs + "attn_norm.weight", weights[ours + "attn_norm.weight"]
        yield theirs + "attn_q.weight", interleaved(q, heads)
        yield theirs + "attn_k.weight", interleaved(k, heads)
        yield theirs + "attn_v.weight", v
        yield theirs + "attn_output.weight", weights[ours + "output.weight"]
        yield theirs + "ffn_norm.weight", weights[ours + "ffn_norm.weight"]
        yield theirs + "ffn_gate.weight", gate
        yield theirs + "ffn_up.weight", up
        yield theirs + "ffn_down.weight", weights[ours + "down.weight"]
    yield "output_norm.weight", weights["norm.weight"]


def write_metadata(writer: gguf.GGUFWriter, shape: Shape, parameters: int, quantized: bool) -> None:
    writer.add_name("shimmy-tiny")
    writer.add_basename("shimmy")
    writer.add_finetune("tiny")
    writer.add_description(DESCRIPTION)
    writer.add_author("the shimmy project")
    writer.add_license("mit")
    writer.add_languages(["en"])
    writer.add_tags(["text-generation", "demonstration", "test-fixture"])
    writer.add_size_label(f"{parameters / 1e6:.1f}M")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if quantized else gguf.LlamaFileType.ALL_F32)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_sampling_temp(0.3)
    writer.add_sampling_top_k(20)
    writer.add_sampling_top_p(0.9)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.epsilon)


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    pieces = [tokenizer.id_to_token(at) or "" for at in range(tokenizer.get_vocab_size())]
    kinds = {**dict.fromkeys(CONTROL, gguf.TokenType.CONTROL), **dict.fromkeys(MARKERS, gguf.TokenType.USER_DEFINED)}
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(pieces)
    writer.add_token_types([kinds.get(piece, gguf.TokenType.NORMAL) for piece in pieces])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(token_id(tokenizer, "<|im_end|>"))
    writer.add_pad_token_id(token_id(tokenizer, "<|endoftext|>"))
    writer.add_eot_token_id(token_id(tokenizer, "<|im_end|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def export(model: Tiny, tokenizer: Tokenizer, path: Path, quantized: bool = True) -> None:
    """Writes the model as GGUF: matrices as Q8_0 (or all as F32, to check the layout), norms as F32."""
    writer = gguf.GGUFWriter(str(path), "llama")
    write_metadata(writer, model.shape, sum(p.numel() for p in model.parameters()), quantized)
    write_tokenizer(writer, tokenizer)
    for name, weights in tensors_of(model):
        kind = gguf.GGMLQuantizationType.Q8_0 if quantized and weights.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(weights), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_logits(path: Path, ids: list[int]) -> np.ndarray:
    """llama.cpp's logits at every position."""
    from llama_cpp import Llama

    engine = Llama(str(path), n_ctx=2048, logits_all=True, verbose=False)
    engine.eval(ids)
    return np.array(engine.scores[: len(ids)])


ODD_TEXTS = [
    "",
    " ",
    "\n\n",
    "a\tb",
    "  two  spaces ",
    "naïve café",
    "日本語",
    "🙂👍🏽",
    "ÀÉÎ",
    "It's I'LL we'Re",
    "x²=4½",
]
ODD_TEXTS += ["\u00a0nbsp", "1234567890", "a\r\nb", "…—“”", "\x00\x7f", "\ud7ff\ue000"]
ODD_LETTERS = "abcXYZ019 .,!?'\"\n\t{}[]<>|/\\_-éßжあ🙂"


def check_tokens(path: Path, tokenizer: Tokenizer, texts: int = 2000) -> None:
    """llama.cpp must cut every text into the very same tokens as in training; odd texts included."""
    from llama_cpp import Llama

    engine, rng = Llama(str(path), vocab_only=True, verbose=False), random.Random(SEED + 1)
    samples = ODD_TEXTS + [conversation(rng).render() for _ in range(texts)]
    samples += ["".join(rng.choices(ODD_LETTERS, k=rng.randint(1, 60))) for _ in range(texts)]
    for text in samples:
        ours, theirs = tokenizer.encode(text).ids, engine.tokenize(text.encode(), add_bos=False, special=True)
        if ours != theirs:
            raise SystemExit(f"tokenizers disagree on {text!r}: {ours} against {theirs}")
    print(f"tokens: {len(samples)} texts cut alike by the tokenizer and by llama.cpp")


def check_export(model: Tiny, tokenizer: Tokenizer, path: Path, work: Path) -> None:
    """Logits of torch and llama.cpp agree: closely in F32, which shows the layout, and nearly so in Q8_0."""
    rng = random.Random(SEED + 2)
    ids = [token for _ in range(6) for token in tokenizer.encode(conversation(rng).render()).ids][:1024]
    model.eval()
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0].numpy()
    exact = work / "check-f32.gguf"
    export(model, tokenizer, exact, quantized=False)
    for name, file, limit in (("F32", exact, 0.05), ("Q8_0", path, 1.5)):
        theirs = llama_logits(file, ids)
        difference = np.abs(ours - theirs)
        same = float((ours.argmax(1) == theirs.argmax(1)).mean())
        print(
            f"logits in {name}: {len(ids)} positions, largest difference {difference.max():.4f}, mean "
            f"{difference.mean():.5f}, same first choice {same:.1%}"
        )
        if difference.max() > limit:
            raise SystemExit(f"the {name} export does not compute what was trained")
    exact.unlink()
    check_tokens(path, tokenizer)


def load_model(work: Path) -> tuple[Tiny, dict[str, Any]]:
    facts = torch.load(work / "checkpoint.pt")
    model = Tiny(Shape())
    model.load_state_dict(facts["model"])
    return model, facts


# ── Command line ─────────────────────────────────────────────────────────────────────────────────────────────────────


def tokenizer_in(work: Path) -> Tokenizer:
    path = work / "tokenizer.json"
    return Tokenizer.from_file(str(path)) if path.exists() else train_tokenizer(path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train shimmy-tiny.gguf from nothing, on the CPU.")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"training steps of {TOKENS_PER_STEP} tokens (default {STEPS})"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2, help="CPU threads")
    parser.add_argument("--work", type=Path, default=HERE / ".training", help="folder for checkpoint and tokenizer")
    parser.add_argument("--out", type=Path, default=HERE / "shimmy-tiny.gguf", help="the file to write")
    parser.add_argument("--show", type=int, metavar="N", help="print N generated conversations and stop")
    parser.add_argument("--export-only", action="store_true", help="export the newest checkpoint without training")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.show:
        rng = random.Random()
        print("\n".join(conversation(rng).render() for _ in range(options.show)))
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_in(options.work)
    if not options.export_only:
        train(options.work, options.steps, options.threads)
    model, facts = load_model(options.work)
    export(model, tokenizer, options.out)
    print(
        f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{facts['step']} steps, {facts['step'] * TOKENS_PER_STEP / 1e6:.1f}M tokens, {facts['seconds'] / 60:.0f} "
        f"minutes, loss {facts['loss']:.3f}"
    )
    check_export(model, tokenizer, options.out, options.work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
