#!/usr/bin/env python3
"""Measures shimmy-tiny.gguf through the real server, on phrasings and numbers that its training never saw.

    python models/eval_tiny.py                       start shimmy, ask, print the table, write it into models/README.md
    python models/eval_tiny.py --limit 20 --keep     a quick look; README.md stays as it is

Every sentence below is kept out of training by make_tiny.py, which imports PHRASES; the operands are those for which
`held_out` is true. Each request goes over POST /v1/chat/completions at temperature 0. Exit status 1: a threshold was
missed.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Message = dict[str, Any]

# ── What is asked ────────────────────────────────────────────────────────────────────────────────────────────────────
# Small talk: a pattern that a right answer matches, and sentences.

HELLO = r"hello|hi\b|i am shimmy"
WHO = r"shimmy-tiny"
PROGRAM = r"program|not a person"
SMALL_TALK: list[tuple[str, list[str]]] = [
    (HELLO, ["Hello, dear shimmy!", "Hi, is someone there?", "Hey, good morning to you", "Hello and good evening", "Good morning, everybody!", "hi there, friend!!", "Hey hey hey", "Well hello!", "A warm hello to you", "Oh hi",
             "Good afternoon, dear model", "hello, hello, hello"]),
    (r"running well|all is well", ["How are you feeling today?", "So how are you, my friend?", "And how are you this morning?", "How have you been?", "Hello, how is everything going?", "Are you doing well?", "How are you, shimmy?", "Is all well with you?"]),
    (r"welcome|glad", ["Thank you, you helped me a lot", "Oh, thanks a lot for this answer", "Thanks, my friend!", "Thank you so much for your help, shimmy", "Great answer, thanks!", "thx a lot", "Perfect, thank you very much", "Many thanks for everything", "That was very useful, thank you", "Thank you kindly"]),
    (r"goodbye|see you", ["Ok bye", "Goodbye, my dear friend", "I have to go to bed now, bye", "See you next time", "Bye for today!", "Good night, shimmy!", "I am leaving now, goodbye", "Farewell, and thanks", "see you around", "Well, that was all, bye"]),
    (WHO, ["So, who are you?", "Who exactly are you?", "Please say your name", "What is the name of this model?", "Which name do you have?", "Could you introduce yourself?", "Hello! What are you?", "And who may you be?", "Tell me a little about yourself", "What are you exactly, shimmy?", "Who am I chatting to now?",
           "I'd like to know your name", "How are you called?", "What model are you?", "Who is this speaking?", "What should people call you?", "Your name is what?", "Do you have any name?"]),
    (r"make_tiny|trained from nothing", ["Who was it that made you?", "By whom were you trained?", "Who are your creators?", "Where were you trained?", "Who programmed this model?", "Tell me who built you", "What were you trained on?", "Which people made you?"]),
    (r"three million|very small model", ["How many parameters are in you?", "Just how big are you?", "Are you a really small model?", "How big is this model?", "Say how many parameters you have", "Are you large or small?"]),
    (r"can answer questions about shimmy", ["What can you do for people?", "So what can you do?", "Tell me what you are able to do", "What are the things you can do?", "How can you help me today?", "What sort of questions can you answer?", "I need help", "What are you good for?", "What do you do?"]),
    (r"can be wrong|very small", ["Can I trust what you say?", "Do you sometimes make mistakes?", "What are your limits, then?", "Are your answers always right?", "What can't you do?", "Could you be wrong?"]),
    (PROGRAM, ["Are you really a human?", "Are you a human or a machine?", "Do you have any feelings?", "Are you just a computer program?", "Am I chatting with a real person?", "Are you a living person?", "Can you really think?", "Are you some kind of robot?"]),
    (WHO, ["Are you the model ChatGPT?", "Is this really ChatGPT?", "So you are Claude?", "Are you made by OpenAI?", "You are Gemini, correct?", "Are you Siri or Alexa?"]),
    (r"english", ["Do you also speak German?", "Could you speak French with me?", "Which languages can you use?", "Do you understand any Spanish?"]),
    (r"internet|clock", ["Can you go online?", "What's the date of today?", "Do you have access to the internet?", "Do you know what time it is?"]),
]

# Questions about shimmy: the key fact that the answer must hold, and sentences.
TOPICS: dict[str, tuple[str, list[str]]] = {
    "what_is": (r"inference server", ["What is this shimmy thing?", "In a few words, what is shimmy?"]),
    "start": (r"shimmy\.py serve", ["How is the server started?", "With which command do I start shimmy?"]),
    "port": (r"11435", ["Which port number is the default one?", "Tell me the port that shimmy listens on"]),
    "change_port": (r"--port|SHIMMY_PORT", ["I'd rather run it on a different port, how?", "How is the port changed?"]),
    "port_taken": (r"--port", ["My port is already taken, what do I do?", "What if another process already uses the port?"]),
    "port_zero": (r"--port 0", ["Could the server choose a free port by itself?", "How can I get any free port?"]),
    "bind": (r"127\.0\.0\.1", ["Which address does it bind to normally?", "Can others on the network see my server by default?"]),
    "bind_network": (r"--bind", ["How can other computers in my network use the server?", "I want to open shimmy to the whole network"]),
    "add_model": (r"folder", ["I have a new GGUF file, where should I put it?", "How can one more model be added?"]),
    "where_models": (r"\./models", ["In which folders does shimmy look for models?", "Where does the server search for GGUF models?"]),
    "models_dir": (r"--models-dir|SHIMMY_MODEL_PATHS", ["How do I tell it to search another folder for models?", "My models are on a different drive, how do I add it?"]),
    "default_model": (r"--model|SHIMMY_BASE_GGUF", ["Which model will be the default?", "How is the default model chosen?"]),
    "rescan": (r"discover", ["How do I rescan the model folders?", "I just added a model while the server runs, must I restart?"]),
    "list": (r"shimmy\.py list|/api/models", ["How can I get a list of all my models?", "Show all models that are there"]),
    "skipped": (r"list -v", ["Why does my model not appear in the list?", "My file was skipped, why?"]),
    "stream": (r"\"stream\"|stream", ["How can I stream the answer of the model?", "I want to see the tokens as they are generated"]),
    "tool_call": (r"tools", ["How can I give the model tools to call?", "Does the server support tool calls?"]),
    "builtin_tools": (r"calculator, file_read and http_get", ["Which tools are already built in?", "Tell me the built-in tools"]),
    "file_read": (r"--tool-root", ["How do I switch on the file_read tool?", "Why is file_read not allowed?"]),
    "http_get": (r"--tool-hosts", ["How do I switch the http_get tool on?", "Why is http_get not allowed?"]),
    "own_tools": (r"--tools", ["How can I add a tool of my own?", "I want to write my own tools"]),
    "websocket": (r"/ws/generate", ["What is the URL for the websocket?", "How is the websocket used?"]),
    "openai_client": (r"/v1", ["Can I use it with an OpenAI client?", "Which base URL must my OpenAI client have?"]),
    "health": (r"/api/health", ["How can I check if the server is healthy?", "Which URL is the health check?"]),
    "metrics": (r"/metrics", ["Where can I find the metrics for Prometheus?", "Does it have Prometheus metrics?"]),
    "diag": (r"diag", ["What is the command diag good for?", "Something does not work, how do I diagnose it?"]),
    "probe": (r"probe", ["How can I measure how fast my model is?", "What does the command probe do?"]),
    "generate": (r"generate", ["How can I generate text in my terminal?", "I want to generate text without starting a server"]),
    "pipe": (r"--stdin", ["How do I pipe text into generate?", "Can I feed stdin to the generate command?"]),
    "needs": (r"llama-cpp-python and websockets", ["Which Python packages does shimmy need?", "What are its dependencies?"]),
    "install": (r"pip install", ["How can shimmy be installed?", "What do I do to install shimmy?"]),
    "gguf": (r"GGUF", ["What format must a model file have?", "Which file formats can shimmy load?"]),
    "api_key": (r"--api-key", ["How do I protect the server with an API key?", "Where do I set the API key?"]),
    "load": (r"/load", ["How do I load a model through the API?", "How can a model be loaded by hand?"]),
    "unload": (r"/unload", ["How can a model be unloaded?", "How do I free the memory of the model again?"]),
    "max_loaded": (r"--max-loaded|\b3 models", ["How many models can stay loaded at the same time?", "Is it possible to keep two models loaded at once?"]),
    "keep_alive": (r"--keep-alive", ["How long will an idle model stay in memory?", "Can idle models be unloaded automatically?"]),
    "embeddings": (r"/v1/embeddings", ["Where do I get embeddings for a text?", "Can shimmy compute text embeddings?"]),
    "schema": (r"response_format", ["How do I make the model answer in valid JSON?", "Can I require a JSON schema?"]),
    "tool_choice": (r"tool_choice", ["How do I force the model to call a tool?", "How do I forbid tool calls in a request?"]),
    "context": (r"--ctx", ["How can I make the context larger?", "Which flag is for the context size?"]),
    "too_long": (r"context_length_exceeded", ["What will happen if my prompt is longer than the context?", "My prompt is too long, what happens?"]),
    "parallel": (r"--parallel", ["How many requests can the server handle at the same time?", "Can several clients be served at once?"]),
    "overloaded": (r"503", ["Why did I get the status 503?", "What happens if too many requests are waiting?"]),
    "alias": (r"--alias", ["My client can only ask for gpt-4, what now?", "How do I give a model another name?"]),
    "preload": (r"--preload", ["How can the model be loaded at startup?", "Why is the very first answer slow?"]),
    "stop_server": (r"ctrl-c", ["How can the server be stopped?", "How do I shut shimmy down cleanly?"]),
    "version": (r"--version", ["How do I find out my version of shimmy?", "What is the version of this shimmy?"]),
    "page": (r"browser", ["Can I chat in my web browser?", "Does shimmy have a web page for chat?"]),
    "not_found": (r"list", ["The server answers model_not_found, why?", "What does the error model not found mean?"]),
    "error_shape": (r"code, message and details", ["What does an error look like?", "What format do the errors have?"]),
    "cancel": (r"close|cancel", ["How do I stop a request that is running?", "Can a running generation be cancelled?"]),
    "max_tokens": (r"max_tokens", ["How do I limit how many tokens I get?", "How can I make the answers shorter?"]),
    "temperature": (r"0\.7", ["What is the temperature by default?", "Which temperature is the default one?"]),
    "seed": (r"seed", ["How can I get exactly the same answer again?", "What is a seed for?"]),
    "stop_strings": (r"stop", ["How do I end the text at a certain word?", "What does the field stop do?"]),
    "gpu": (r"gpu", ["Will shimmy use my GPU?", "How do I run it on my GPU?"]),
    "threads": (r"--threads", ["How can I change the number of CPU threads?", "How many CPU threads does the server use?"]),
    "lora": (r"--lora", ["How can I use a LoRA adapter with my model?", "Are LoRA adapters supported?"]),
    "ollama": (r"ollama", ["Will it find the models I have in Ollama?", "Can I use models that Ollama downloaded?"]),
    "cors": (r"--allow-origin", ["My web page gets a CORS error, what now?", "How do I allow another origin?"]),
    "offline": (r"no internet|this machine", ["Does it work without an internet connection?", "Is my data sent to the cloud?"]),
    "crash": (r"own process|stays up", ["What if a model crashes?", "Will the server survive a crash of the model?"]),
    "finish_reason": (r"finish_reason|max_tokens", ["What does the finish_reason tell me?", "Why was my answer cut off?"]),
    "template": (r"--chat-template|chatml", ["How can I use my own chat template?", "What chat template does shimmy use?"]),
    "chat_route": (r"/v1/chat/completions", ["What is the endpoint for chat?", "Where do I post my chat messages?"]),
    "generate_route": (r"/api/generate", ["Which endpoint do I use to generate text from a prompt?", "How do I send a prompt with curl?"]),
    "status": (r"/status", ["How can I see if my model is loaded?", "Which endpoint gives the status of a model?"]),
    "shards": (r"shards", ["My model is split in two files, how do I use it?", "Can it load a sharded model?"]),
    "os": (r"windows", ["Will it run on Windows?", "Which operating systems does it run on?"]),
    "logs": (r"-v", ["How can I see more logs?", "Are prompts written to the logs?"]),
    "config": (r"no configuration", ["Do I have to write a config file?", "Which environment variables does shimmy read?"]),
    "seen_memory": (r"memory", ["How much memory will a model need?", "How much RAM does shimmy use?"]),
    "completions": (r"/v1/completions", ["Is there an endpoint for plain completions?", "What can I do with /v1/completions?"]),
    "names": (r"file name", ["How does a model get its name?", "What is the id of my model?"]),
}

# Small facts: a pattern of the right answer, and a sentence.
CAPITALS = {"France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Norway": "Oslo", "Egypt": "Cairo", "Kenya": "Nairobi", "Peru": "Lima", "Canada": "Ottawa", "Greece": "Athens", "Poland": "Warsaw", "Cuba": "Havana", "Austria": "Vienna",
            "Portugal": "Lisbon", "Australia": "Canberra", "China": "Beijing", "Thailand": "Bangkok", "Ireland": "Dublin", "Hungary": "Budapest", "Iceland": "Reykjavik", "Chile": "Santiago"}
CAPITAL_PHRASES = ["Hello, what is the capital of {} called, please?", "Which city is {}'s capital?", "I forgot the capital of {}. What is it?", "So what would be the capital of {}?"]
OPPOSITES = {"hot": "cold", "big": "small", "tall": "short", "fast": "slow", "happy": "sad", "full": "empty", "old": "young|new", "rich": "poor", "strong": "weak", "wet": "dry", "loud": "quiet", "deep": "shallow", "sweet": "sour", "north": "south", "clean": "dirty", "early": "late"}
OPPOSITE_PHRASES = ["What would be the opposite of {}?", "Can you say the opposite of the word {}?", "The opposite of {} is what?"]
SPELLINGS = ["apple", "river", "garden", "planet", "rabbit", "bridge", "candle", "robot", "silver", "music", "winter", "castle", "tiger", "honey", "pencil", "dragon"]
SPELLING_PHRASES = ["Will you spell {} for me?", "I do not know how to spell {}", "What letters does {} have?", "Let me see you spell {}"]
COUNT_PHRASES = ["Please could you count up to {}?", "Start at 1 and count to {}", "I would like you to count to {}", "Count all the way to {}"]
REPEATS = ["the green lamp sings at noon", "seven brave horses", "Clara walks to Lisbon", "bottle of honey", "we like pancakes", "bread and silver bells", "the robot paints a door", "moon river", "orange basket under the stairs", "nobody knows the old king",
           "quiet storm", "please wait here", "Milo and Freya", "three cups of tea"]
REPEAT_PHRASES = ["Now say this: {}", "Please repeat after me: {}", "Repeat exactly: {}", "Can you echo this: {}"]
FACTS: list[tuple[str, str]] = [
    (r"tuesday", "Which day do we have after Monday?"), (r"thursday", "Can you say what day comes after Wednesday?"), (r"saturday", "What day is right after Friday?"), (r"sunday", "What is the day that follows Saturday?"), (r"monday", "Which day comes before Tuesday, please?"),
    (r"friday", "What day was it before Saturday?"), (r"monday", "What is the first day in the week?"), (r"monday.*sunday", "Tell me all the days of the week"), (r"wednesday", "If it is Tuesday today, which day is tomorrow?"), (r"sunday", "Which day is before Monday?"),
    (r"february", "Which month do we have after January?"), (r"june", "What month is right after May?"), (r"december", "What is the last month, after November?"), (r"march", "Can you say which month is before April?"), (r"july", "Which month is the seventh month of the year?"),
    (r"january.*december", "Tell me all the months of the year"), (r"31", "How many days are there in the month of May?"), (r"30", "How many days has the month of June?"), (r"28", "How many days are in the month February?"), (r"august", "What month is it after July?"),
    (r"green", "What is the colour that grass has?"), (r"blue", "Do you know which colour the sky has?"), (r"white", "Which colour has snow?"), (r"yellow", "Of what colour is a lemon?"), (r"red", "What colour is blood, please?"), (r"black", "So what colour is coal?"),
    (r"green", "What do I get when I mix blue and yellow?"), (r"orange", "Which colour is made by red and yellow?"), (r"purple", "If I mix red and blue, what colour is it?"), (r"orange", "A carrot is which colour?"),
    (r"woof", "What sound can a dog make?"), (r"meow", "So what does the cat say?"), (r"moo", "Which sound does a cow make?"), (r"8", "Do you know how many legs a spider has?"), (r"4", "How many legs are there on a horse?"), (r"puppy", "What is the word for a young dog?"),
    (r"kitten", "How do you call a young cat?"), (r"calf", "What is the baby of a cow called?"), (r"7", "How many days does one week have?"), (r"12", "How many months are in one year?"), (r"24", "How many hours are in one day?"), (r"60", "How many minutes does one hour have?"), (r"26", "How many letters are there in the whole alphabet?"),
    (r"spring.*winter", "Tell me all the seasons"), (r"summer", "Which season do we have after spring?"), (r"\bB\b", "Which letter do we have after A?"), (r"winter", "Which season comes right after autumn?"), (r"366", "How many days are there in one leap year?"),
]

# Sums: {a} and {b} are operands. Taking order: every phrasing names the first operand of the expression as {a}.
SUMS: dict[str, list[str]] = {
    "+": ["So how much is {a} plus {b}?", "Hello, what is {a} + {b}?", "I must know the sum of {a} and {b}", "Would you please add {a} and {b}?", "Tell me what {a} plus {b} is", "Do the sum {a} + {b} for me", "{a} plus {b} gives what?", "Could you add {a} to {b}?", "Can you tell me the total of {a} and {b}?"],
    "-": ["So how much is {a} minus {b}?", "Hello, what is {a} - {b}?", "I must know the difference of {a} and {b}", "Would you please subtract {b} from {a}?", "Tell me what {a} minus {b} is", "{a} minus {b} gives what?", "Could you take {b} away from {a}?", "Do {a} - {b} for me"],
    "*": ["So how much is {a} times {b}?", "Hello, what is {a} * {b}?", "I must know the product of {a} and {b}", "Would you please multiply {a} by {b}?", "Tell me what {a} times {b} is", "{a} times {b} gives what?", "Could you multiply {a} and {b}?", "Do {a} x {b} for me"],
    "/": ["So how much is {a} divided by {b}?", "Hello, what is {a} / {b}?", "I must know the quotient of {a} and {b}", "Would you please divide {a} by {b}?", "Tell me what {a} divided by {b} is", "{a} divided by {b} gives what?", "Could you divide {a} by {b}?", "Do {a} / {b} for me"],
}
WEATHER = ["So how is the weather over in {}?", "Hello, what's the weather in {} like?", "Would it be cold in {} today?", "I want to know the weather in {}", "Could you check the weather in {} for me?", "Is it going to rain in {}?", "I am in {}, is it sunny?", "Please say how warm it is in {}", "What will the weather be in {}?", "Tell me if it rains in {}"]
WEATHER_CITIES = ["Paris", "Oslo", "Toronto", "Kyoto", "Lagos", "Hamburg", "Lima", "Seattle", "Dubai", "Porto", "Helsinki", "Tamrin", "Velo", "Kastor", "New York", "Cape Town"]
STORIES = {"fox": "Would you tell us a story about a fox?", "robot": "Let me read a short story about a robot", "princess": "I feel like a story about a princess", "owl": "Please tell me a nice story about an owl", "boat": "Make a little story about a boat", "bear": "A story about a bear would be nice", "dragon": "I want a story of a dragon",
           "cat": "Can you make a story about a cat?", "wizard": "Tell the story of a wizard", "penguin": "Could I hear a story about a penguin?", "mouse": "Now a story about a mouse", "farmer": "Write one story about a farmer", "star": "One story about a star, please", "horse": "Do you have a story about a horse?", "king": "Tell my child a story about a king",
           "train": "A very short story about a train please", "turtle": "Let us have a story about a turtle", "pirate": "Tell a story with a pirate", "lion": "May I have a story about a lion?", "snowman": "Think of a story about a snowman", "rabbit": "A bedtime story about a rabbit", "giant": "Please write a tale about a giant",
           "duck": "Story about a duck, please", "tree": "I would love a story about a tree", "sailor": "Read me the story of a sailor", "wolf": "Tell me some story about a wolf", "queen": "Do tell a story about a queen", "bee": "Any story about a bee?", "ghost": "How about a story about a ghost?", "tiger": "A tale about a tiger for my son"}
NAMES = ["Anna", "Tom", "Clara", "Hugo", "Nora", "Ben", "Lucy", "Victor", "Mia", "Oscar", "Ravi", "Stella", "Jana", "Piet", "Solveig", "Marlon", "Tilda", "Enzo"]
JSON_PHRASES = ["Please write a JSON object with name and age: {n} is {a} years old.", "{n} is {a} years old. Could you give me that as JSON?", "Could you make JSON with name and age from this? {n} is {a}.", "I need name and age as a JSON object: {n} is {a} years old.", "Write the following as JSON: {n} is {a} years old.", "JSON with the keys name and age for this text: {n}, aged {a}."]
JSON_CITY = ["Please write a JSON object with name and city: {n} lives in {c}.", "{n} lives in {c}. Could you give me that as JSON?", "I need name and city as a JSON object: {n} is from {c}.", "Could you make JSON with name and city from this? {n} comes from {c}."]
UPPER = ["Please answer in upper case.", "Only use capital letters.", "Every answer must be in upper case letters.", "You are an assistant that always writes in capital letters."]
ONE_WORD = ["Please answer with one word.", "Answer with just a single word.", "Every answer must be one word.", "You are an assistant that replies with a single word."]

CALCULATOR: Message = {"type": "function", "function": {"name": "calculator", "description": "Evaluate an arithmetic expression.", "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}}}
CALCULATORS = [CALCULATOR,
               {"type": "function", "function": {"name": "calculator", "description": "Computes arithmetic for the user", "parameters": {"type": "object", "properties": {"expression": {"type": "string", "description": "The arithmetic to compute"}}, "required": ["expression"]}}}]
WEATHER_TOOLS: list[Message] = [
    {"type": "function", "function": {"name": name, "description": text, "parameters": {"type": "object", "properties": {key: {"type": "string", "description": about}}, "required": [key]}}}
    for name, text, key, about in [("get_weather", "Get the current weather", "city", "The city"), ("weather_for", "Weather of a city", "town", "Name of the town"), ("lookup_city_weather", "Looks up the current weather in a city", "location", "The location"), ("get_weather_now", "Returns the current weather", "place", "")]]


def held_out(*values: object) -> bool:
    """The same tenth of all operand tuples that make_tiny.py leaves out."""
    return hashlib.sha256(repr(values).encode()).digest()[0] < 26


def all_phrases() -> list[str]:
    """Every fixed sentence that is asked, for make_tiny.py to leave out."""
    fixed = [text for _, texts in SMALL_TALK for text in texts] + [text for _, texts in TOPICS.values() for text in texts]
    fixed += [text for _, text in FACTS] + list(STORIES.values())
    fixed += [phrase.format(country) for phrase in CAPITAL_PHRASES for country in CAPITALS]
    fixed += [phrase.format(word) for phrase in OPPOSITE_PHRASES for word in OPPOSITES] + [phrase.format(word) for phrase in SPELLING_PHRASES for word in SPELLINGS]
    fixed += [phrase.format(end) for phrase in COUNT_PHRASES for end in range(1, 31)] + [phrase.format(text) for phrase in REPEAT_PHRASES for text in REPEATS]
    return fixed + [phrase.format(city) for phrase in WEATHER for city in WEATHER_CITIES] + UPPER + ONE_WORD


PHRASES = all_phrases()
