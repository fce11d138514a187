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
    (
        HELLO,
        [
            "Hello, dear shimmy!",
            "Hi, how lovely that you are here",
            "Hey, a lovely good morning",
            "Hello and good evening",
            "Good morning, everybody!",
            "hi there, little friend!!",
            "Hey hey hey",
            "Well, well, hello there model!",
            "A warm hello to you",
            "Oh hi",
            "Good afternoon, dear model",
            "hello, oh hello",
            "Hello again, model",
            "Hi! It is good that we meet",
            "A very good evening to you, shimmy",
        ],
    ),
    (
        r"running well|all is well",
        [
            "How are you feeling today?",
            "Tell me how you are, shimmy",
            "And how are you this morning?",
            "How have you been?",
            "Hello, how is everything going?",
            "Are you doing well?",
            "How are you, shimmy?",
            "Is all well with you?",
            "How are you feeling?",
            "How is your day, model?",
        ],
    ),
    (
        r"welcome|glad",
        [
            "Thank you, you helped me a lot",
            "Oh, thanks a lot for this answer",
            "Thanks, my friend!",
            "Thank you so much for your help, shimmy",
            "Great answer, thanks!",
            "thx a lot",
            "Perfect, thank you very much",
            "Many, many thanks!",
            "That was very useful, thank you",
            "Thank you kindly",
            "Thank you for that answer!",
            "That helped me, thanks",
            "Thanks again, little model",
        ],
    ),
    (
        r"goodbye|see you",
        [
            "Ok, bye then, model",
            "Goodbye, my dear friend",
            "I have to go to bed now, bye",
            "See you next time",
            "Bye for today!",
            "Good night, little model!",
            "I am leaving now, goodbye",
            "Farewell, shimmy, and many thanks",
            "see you around",
            "Well, that was all, bye",
            "Goodbye and thank you",
            "I must leave, see you tomorrow",
            "Bye, have a nice evening",
        ],
    ),
    (
        WHO,
        [
            "So who might you be?",
            "Who exactly are you?",
            "Please let me have your name",
            "What is the name of this model?",
            "Which name do you have?",
            "Could you introduce yourself?",
            "Hello! What sort of model are you?",
            "And who may you be?",
            "Tell me a little about yourself",
            "What are you exactly, shimmy?",
            "With whom am I chatting?",
            "I'd like to know your name",
            "How are you called?",
            "You are what model?",
            "Who is this speaking?",
            "What should people call you?",
            "Your name is what?",
            "Do you have any name?",
            "What is your name, model?",
            "May I ask who you are?",
            "Introduce yourself to me",
            "Do I talk to shimmy-tiny?",
        ],
    ),
    (
        r"make_tiny|trained from nothing",
        [
            "Who was it that made you?",
            "By whom were you trained?",
            "Who are your creators?",
            "Where was this model trained?",
            "Who programmed this model?",
            "Let me know who built you",
            "What were you trained on?",
            "Which persons have made you?",
            "Who has trained you?",
            "How did they make you?",
        ],
    ),
    (
        r"three million|very small model",
        [
            "How many parameters are in you?",
            "Just how big are you?",
            "Are you a really small model?",
            "How big is this model?",
            "Say how many parameters you have",
            "Are you large or small?",
            "What number of parameters do you have?",
        ],
    ),
    (
        r"can answer questions about shimmy",
        [
            "What can you do for people?",
            "So what is it that you can do?",
            "Tell me what you are able to do",
            "What are the things you can do?",
            "In what ways can you help me?",
            "What sort of questions can you answer?",
            "I could use your help",
            "What are you good for?",
            "What do you do?",
            "Let me know what you can do",
            "Can you name some things you can do?",
        ],
    ),
    (
        r"can be wrong|very small",
        [
            "Can I trust what you say?",
            "Do you sometimes make mistakes?",
            "What are your limits, then?",
            "Are your answers always right?",
            "What things can't you do?",
            "Could you be wrong?",
            "Do you make errors sometimes?",
        ],
    ),
    (
        PROGRAM,
        [
            "Are you really a human?",
            "Are you a human or a machine?",
            "Do you have any feelings?",
            "Are you just a computer program?",
            "Am I chatting with a real person?",
            "Are you a living person?",
            "Can you really think?",
            "Are you some kind of robot?",
            "So you are no human?",
            "Is this a person or a machine?",
        ],
    ),
    (
        WHO,
        [
            "Are you the model ChatGPT?",
            "Is this really ChatGPT?",
            "So you are Claude?",
            "Are you made by OpenAI?",
            "You are Gemini, correct?",
            "Are you Siri or Alexa?",
            "Is GPT-4 what I am using?",
            "Do you come from OpenAI?",
        ],
    ),
    (
        r"english",
        [
            "Do you also speak German?",
            "Could you speak French with me?",
            "Which languages can you use?",
            "Do you understand any Spanish?",
            "Would you speak Spanish to me?",
        ],
    ),
    (
        r"internet|clock",
        [
            "Can you go online?",
            "What's the date of today?",
            "Do you have access to the internet?",
            "Do you know what time it is?",
            "Are you on the internet?",
        ],
    ),
]

# Questions about shimmy: the key fact that the answer must hold, and sentences.
TOPICS: dict[str, tuple[str, list[str]]] = {
    "what_is": (
        r"inference server",
        ["What is this shimmy thing?", "In a few words, what is shimmy?", "Please explain to me what shimmy is"],
    ),
    "start": (
        r"shimmy\.py serve",
        [
            "How is the server started?",
            "With which command do I start shimmy?",
            "Give me the command that starts the server",
        ],
    ),
    "port": (
        r"11435",
        [
            "Which port number is the default one?",
            "Tell me the port that shimmy listens on",
            "Under which port number does the server listen?",
        ],
    ),
    "change_port": (
        r"--port|SHIMMY_PORT",
        [
            "I'd rather run it on a different port, how?",
            "How is the port changed?",
            "I need the server on some other port",
        ],
    ),
    "port_taken": (
        r"--port",
        [
            "My port is already taken, what do I do?",
            "What if another process already uses the port?",
            "It says the port is in use, what should be done?",
        ],
    ),
    "port_zero": (
        r"--port 0",
        [
            "Could the server choose a free port by itself?",
            "How can I get any free port?",
            "Is it able to take any unused port?",
        ],
    ),
    "bind": (
        r"127\.0\.0\.1",
        [
            "Which address does it bind to normally?",
            "Can others on the network see my server by default?",
            "What host address does shimmy listen on?",
        ],
    ),
    "bind_network": (
        r"--bind",
        [
            "How can other computers in my network use the server?",
            "I want to open shimmy to the whole network",
            "How could a friend on my network connect to it?",
        ],
    ),
    "add_model": (
        r"folder",
        [
            "I have a new GGUF file, where should I put it?",
            "How can one more model be added?",
            "In which folder do I put a new model?",
        ],
    ),
    "where_models": (
        r"\./models",
        [
            "In which folders does shimmy look for models?",
            "Where does the server search for GGUF models?",
            "Tell me the folders in which models are searched",
        ],
    ),
    "models_dir": (
        r"--models-dir|SHIMMY_MODEL_PATHS",
        [
            "How do I tell it to search another folder for models?",
            "My models are on a different drive, how do I add it?",
            "I keep my models in another directory, which flag do I need?",
        ],
    ),
    "default_model": (
        r"--model|SHIMMY_BASE_GGUF",
        [
            "Which model will be the default?",
            "How is the default model chosen?",
            "How do I say which model is the default one?",
        ],
    ),
    "rescan": (
        r"discover",
        [
            "How do I rescan the model folders?",
            "I just added a model while the server runs, must I restart?",
            "How does the server notice a model that I copied just now?",
        ],
    ),
    "list": (
        r"shimmy\.py list|/api/models",
        [
            "How can I get a list of all my models?",
            "Show all models that are there",
            "What command shows me the models?",
        ],
    ),
    "skipped": (
        r"list -v",
        [
            "Why does my model not appear in the list?",
            "My file was skipped, why?",
            "My GGUF file is not listed, why is that?",
        ],
    ),
    "stream": (
        r"\"stream\"|stream",
        [
            "How can I stream the answer of the model?",
            "I want to see the tokens as they are generated",
            "I would like the answer streamed",
        ],
    ),
    "tool_call": (
        r"tools",
        [
            "How can I give the model tools to call?",
            "Are tool calls supported by the server?",
            "How do I offer functions to the model?",
        ],
    ),
    "builtin_tools": (
        r"calculator, file_read and http_get",
        ["Which tools are already built in?", "Tell me the built-in tools", "What tools does the server bring along?"],
    ),
    "file_read": (
        r"--tool-root",
        [
            "How is the file_read tool switched on?",
            "Why is file_read not allowed?",
            "What must I do so that file_read works?",
        ],
    ),
    "http_get": (
        r"--tool-hosts",
        [
            "How do I switch the http_get tool on?",
            "Why is http_get not allowed?",
            "What must I do so that http_get works?",
        ],
    ),
    "own_tools": (
        r"--tools",
        [
            "How can I add a tool of my own?",
            "My own tools should be used too",
            "How do I register my own Python function as a tool?",
        ],
    ),
    "websocket": (
        r"/ws/generate",
        [
            "What is the URL for the websocket?",
            "How is the websocket used?",
            "Is a websocket there, and at which address?",
        ],
    ),
    "openai_client": (
        r"/v1",
        [
            "Can I use it with an OpenAI client?",
            "Which base URL must my OpenAI client have?",
            "What do I set as the base URL in the OpenAI library?",
        ],
    ),
    "health": (
        r"/api/health",
        [
            "How do I see whether my server is healthy?",
            "Which URL is the health check?",
            "Which route says that the server is alive?",
        ],
    ),
    "metrics": (
        r"/metrics",
        [
            "Where can I find the metrics for Prometheus?",
            "Does it have Prometheus metrics?",
            "Are there any Prometheus metrics to scrape?",
        ],
    ),
    "diag": (
        r"diag",
        [
            "What is the command diag good for?",
            "Something does not work, how do I diagnose it?",
            "Which command helps me to find problems in my setup?",
        ],
    ),
    "probe": (
        r"probe",
        [
            "How can I measure how fast my model is?",
            "What does the command probe do?",
            "Which tool of shimmy tests a model's speed?",
        ],
    ),
    "generate": (
        r"generate",
        [
            "How can I generate text in my terminal?",
            "I want to generate text without starting a server",
            "How do I run just one prompt on the command line?",
        ],
    ),
    "pipe": (
        r"--stdin",
        [
            "How is text piped into generate?",
            "Can I feed stdin to the generate command?",
            "How do I give the output of a command to generate?",
        ],
    ),
    "needs": (
        r"llama-cpp-python and websockets",
        [
            "Which Python packages does shimmy need?",
            "What are its dependencies?",
            "Tell me what packages I need for shimmy",
        ],
    ),
    "install": (
        r"pip install",
        [
            "How can shimmy be installed?",
            "What is needed to install shimmy here?",
            "Please tell me how I get shimmy installed",
        ],
    ),
    "gguf": (
        r"GGUF",
        [
            "What format must a model file have?",
            "Which file formats can shimmy load?",
            "What sort of model files does the server read?",
        ],
    ),
    "api_key": (
        r"--api-key",
        [
            "How do I protect the server with an API key?",
            "Where do I set the API key?",
            "How do clients send the API key?",
        ],
    ),
    "load": (
        r"/load",
        [
            "How is a model loaded through the API?",
            "How can a model be loaded by hand?",
            "What request loads a model right now?",
        ],
    ),
    "unload": (
        r"/unload",
        [
            "How can a model be unloaded?",
            "How do I free the memory of the model again?",
            "I want to throw a model out of memory",
        ],
    ),
    "max_loaded": (
        r"--max-loaded|\b3 models",
        [
            "How many models can stay loaded at the same time?",
            "Is it possible to keep two models loaded at once?",
            "What is the limit of models loaded together?",
        ],
    ),
    "keep_alive": (
        r"--keep-alive",
        [
            "How long will an idle model stay in memory?",
            "Can idle models be unloaded automatically?",
            "After what time is an idle model unloaded?",
        ],
    ),
    "embeddings": (
        r"/v1/embeddings",
        [
            "Where do I get embeddings for a text?",
            "Can shimmy compute text embeddings?",
            "I want the embedding of a sentence",
        ],
    ),
    "schema": (
        r"response_format",
        [
            "How do I make the model answer in valid JSON?",
            "How can a JSON schema be required?",
            "The reply has to follow my JSON schema",
        ],
    ),
    "tool_choice": (
        r"tool_choice",
        [
            "How do I force the model to call a tool?",
            "How do I forbid tool calls in a request?",
            "How do I make a tool call required?",
        ],
    ),
    "context": (
        r"--ctx",
        [
            "How can I make the context larger?",
            "Which flag is for the context size?",
            "How can I get a bigger context window?",
        ],
    ),
    "too_long": (
        r"context_length_exceeded",
        [
            "What will happen if my prompt is longer than the context?",
            "My prompt is too long, what happens?",
            "Will a prompt that is too long be cut?",
        ],
    ),
    "parallel": (
        r"--parallel",
        [
            "How many requests can the server handle at the same time?",
            "Can several clients be served at once?",
            "How many users may ask at the same time?",
        ],
    ),
    "overloaded": (
        r"503",
        [
            "Why did I get the status 503?",
            "What happens if too many requests are waiting?",
            "What does overloaded mean in an error?",
        ],
    ),
    "alias": (
        r"--alias",
        [
            "My client can only ask for gpt-4, what now?",
            "How do I give a model another name?",
            "My app asks for another model name that I cannot change",
        ],
    ),
    "preload": (
        r"--preload",
        [
            "How can the model be loaded at startup?",
            "Why is the very first answer slow?",
            "I want the default model to be in memory from the start",
        ],
    ),
    "stop_server": (
        r"ctrl-c",
        ["How can the server be stopped?", "How do I shut shimmy down cleanly?", "What do I press to end the server?"],
    ),
    "version": (
        r"--version",
        [
            "How do I find out my version of shimmy?",
            "What is the version of this shimmy?",
            "Tell me which version of shimmy I have",
        ],
    ),
    "page": (
        r"browser",
        [
            "Can I chat in my web browser?",
            "Does shimmy have a web page for chat?",
            "Where do I find a page to chat in?",
        ],
    ),
    "not_found": (
        r"list",
        [
            "The server answers model_not_found, why?",
            "Why is there an error: model not found?",
            "Why does it tell me the model was not found?",
        ],
    ),
    "error_shape": (
        r"code, message and details",
        ["What does an error look like?", "What format do the errors have?", "How are errors written in JSON?"],
    ),
    "cancel": (
        r"close|cancel",
        [
            "How do I stop a request that is running?",
            "Can a running generation be cancelled?",
            "The answer is wrong, how do I abort it?",
        ],
    ),
    "max_tokens": (
        r"max_tokens",
        [
            "How do I limit how many tokens I get?",
            "How can I make the answers shorter?",
            "What field limits the number of tokens?",
        ],
    ),
    "temperature": (
        r"0\.7",
        [
            "What is the temperature by default?",
            "Which temperature is the default one?",
            "How high is the default temperature?",
        ],
    ),
    "seed": (
        r"seed",
        ["How can I get exactly the same answer again?", "What is a seed for?", "How do I make the output repeatable?"],
    ),
    "stop_strings": (
        r"stop",
        [
            "How can the text end at a certain word?",
            "What does the field stop do?",
            "Which field holds my stop strings?",
        ],
    ),
    "gpu": (
        r"gpu",
        ["Will shimmy use my GPU?", "How do I run it on my GPU?", "Is it possible to use a graphics card?"],
    ),
    "threads": (
        r"--threads",
        [
            "How can I change the number of CPU threads?",
            "How many CPU threads does the server use?",
            "I want it to use fewer threads",
        ],
    ),
    "lora": (
        r"--lora",
        [
            "How can I use a LoRA adapter with my model?",
            "Are LoRA adapters supported?",
            "How do I apply a LoRA to a model?",
        ],
    ),
    "ollama": (
        r"ollama",
        [
            "Will it find the models I have in Ollama?",
            "Can I use models that Ollama downloaded?",
            "I have some models from Ollama already, can shimmy use them?",
        ],
    ),
    "cors": (
        r"--allow-origin",
        [
            "My web page gets a CORS error, what now?",
            "How do I allow another origin?",
            "A website cannot call the API, which option allows its origin?",
        ],
    ),
    "offline": (
        r"no internet|this machine",
        [
            "Does it work without an internet connection?",
            "Is my data sent to the cloud?",
            "Can I use shimmy when there is no internet?",
        ],
    ),
    "crash": (
        r"own process|stays up",
        [
            "What if a model crashes?",
            "Will the server survive a crash of the model?",
            "Does the server die when the engine crashes?",
        ],
    ),
    "finish_reason": (
        r"finish_reason|max_tokens",
        [
            "What does the finish_reason tell me?",
            "Why has my answer been cut off?",
            "What is meant by finish_reason length?",
        ],
    ),
    "template": (
        r"--chat-template|chatml",
        [
            "Can my own chat template be used?",
            "Which one is the chat template that shimmy takes?",
            "What do I do when my model has no chat template?",
        ],
    ),
    "chat_route": (
        r"/v1/chat/completions",
        [
            "What is the endpoint for chat?",
            "Where do I post my chat messages?",
            "To which route do I send a chat with messages?",
        ],
    ),
    "generate_route": (
        r"/api/generate",
        [
            "Which endpoint do I use to generate text from a prompt?",
            "How would a prompt be sent with curl?",
            "What is the route that makes text from a prompt?",
        ],
    ),
    "status": (
        r"/status",
        [
            "How can I see if my model is loaded?",
            "What endpoint tells me a model's status?",
            "How can I know whether the model is ready?",
        ],
    ),
    "shards": (
        r"shards",
        [
            "My model is split in two files, how do I use it?",
            "Can it load a sharded model?",
            "How should I store a model that has several shards?",
        ],
    ),
    "os": (
        r"windows",
        ["Will it run on Windows?", "Which operating systems does it run on?", "Is there support for macOS?"],
    ),
    "logs": (
        r"-v",
        ["How can I see more logs?", "Are prompts written to the logs?", "How do I make the server more verbose?"],
    ),
    "config": (
        r"no configuration",
        [
            "Do I have to write a config file?",
            "Which environment variables does shimmy read?",
            "Where is the configuration file?",
        ],
    ),
    "seen_memory": (
        r"memory",
        [
            "How much memory will a model need?",
            "How much RAM does shimmy use?",
            "What amount of RAM do I need for a model?",
        ],
    ),
    "completions": (
        r"/v1/completions",
        [
            "Is there an endpoint for plain completions?",
            "What can I do with /v1/completions?",
            "Where do I find the old completions endpoint?",
        ],
    ),
    "names": (
        r"file name",
        ["How does a model get its name?", "What is the id of my model?", "Which id will my model have?"],
    ),
}

# Small facts: a pattern of the right answer, and a sentence.
CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "Norway": "Oslo",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Peru": "Lima",
    "Canada": "Ottawa",
    "Greece": "Athens",
    "Poland": "Warsaw",
    "Cuba": "Havana",
    "Austria": "Vienna",
    "Portugal": "Lisbon",
    "Australia": "Canberra",
    "China": "Beijing",
    "Thailand": "Bangkok",
    "Ireland": "Dublin",
    "Hungary": "Budapest",
    "Iceland": "Reykjavik",
    "Chile": "Santiago",
}
CAPITAL_PHRASES = [
    "What name does the capital of {} have?",
    "Which city is {}'s capital?",
    "I forgot the capital of {}. What is it?",
    "So what would be the capital of {}?",
]
OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "tall": "short",
    "fast": "slow",
    "happy": "sad",
    "full": "empty",
    "old": "young|new",
    "rich": "poor",
    "strong": "weak",
    "wet": "dry",
    "loud": "quiet",
    "deep": "shallow",
    "sweet": "sour",
    "north": "south",
    "clean": "dirty",
    "early": "late",
}
OPPOSITE_PHRASES = [
    "What would be the opposite of {}?",
    "Can you say the opposite of the word {}?",
    "The opposite of {} is what?",
]
SPELLINGS = [
    "apple",
    "river",
    "garden",
    "planet",
    "rabbit",
    "bridge",
    "candle",
    "robot",
    "silver",
    "music",
    "winter",
    "castle",
    "tiger",
    "honey",
    "pencil",
    "dragon",
]
SPELLING_PHRASES = [
    "Will you spell {} for me?",
    "I do not know how to spell {}",
    "What letters does {} have?",
    "Let me see you spell {}",
]
COUNT_PHRASES = [
    "Please could you count up to {}?",
    "Start at 1 and count to {}",
    "I would like you to count to {}",
    "Count all the way to {}",
]
REPEATS = [
    "the green lamp sings at noon",
    "seven brave horses",
    "Clara walks to Lisbon",
    "bottle of honey",
    "we like pancakes",
    "bread and silver bells",
    "the robot paints a door",
    "moon river",
    "orange basket under the stairs",
    "nobody knows the old king",
    "quiet storm",
    "please wait here",
    "Milo and Freya",
    "three cups of tea",
]
REPEAT_PHRASES = ["Now say this: {}", "Please repeat after me: {}", "Repeat exactly: {}", "Can you echo this: {}"]
FACTS: list[tuple[str, str]] = [
    (r"tuesday", "Which day do we have after Monday?"),
    (r"thursday", "Can you say what day comes after Wednesday?"),
    (r"saturday", "What day is right after Friday?"),
    (r"sunday", "What is the day that follows Saturday?"),
    (r"monday", "Which day comes before Tuesday, please?"),
    (r"friday", "What day was it before Saturday?"),
    (r"monday", "What is the first day in the week?"),
    (r"monday.*sunday", "Tell me all the days of the week"),
    (r"wednesday", "If it is Tuesday today, which day is tomorrow?"),
    (r"sunday", "And which day is before Monday?"),
    (r"february", "Which month do we have after January?"),
    (r"june", "What month is right after May?"),
    (r"december", "What is the last month, after November?"),
    (r"march", "Can you say which month is before April?"),
    (r"july", "Which month is the seventh month of the year?"),
    (r"january.*december", "Tell me all the months of the year"),
    (r"31", "How many days are there in the month of May?"),
    (r"30", "How many days has the month of June?"),
    (r"28", "How many days are in the month February?"),
    (r"august", "What month is it after July?"),
    (r"green", "What is the colour that grass has?"),
    (r"blue", "Do you know which colour the sky has?"),
    (r"white", "Which colour has snow?"),
    (r"yellow", "Of what colour is a lemon?"),
    (r"red", "What colour is blood, please?"),
    (r"black", "So what colour is coal?"),
    (r"green", "What do I get when I mix blue and yellow?"),
    (r"orange", "Which colour is made by red and yellow?"),
    (r"purple", "If I mix red and blue, what colour is it?"),
    (r"orange", "A carrot is which colour?"),
    (r"woof", "What sound can a dog make?"),
    (r"meow", "So what does the cat say?"),
    (r"moo", "Which sound comes from a cow?"),
    (r"8", "Do you know how many legs a spider has?"),
    (r"4", "How many legs are there on a horse?"),
    (r"puppy", "What is the word for a young dog?"),
    (r"kitten", "How do you call a young cat?"),
    (r"calf", "What is the baby of a cow called?"),
    (r"7", "How many days does one week have?"),
    (r"12", "How many months are in one year?"),
    (r"24", "How many hours are in one day?"),
    (r"60", "How many minutes does one hour have?"),
    (r"26", "How many letters are there in the whole alphabet?"),
    (r"spring.*winter", "Tell me all the seasons"),
    (r"summer", "Which season do we have after spring?"),
    (r"\bB\b", "Which letter do we have after A?"),
    (r"winter", "Which season comes right after autumn?"),
    (r"366", "How many days are there in one leap year?"),
]

# Sums: {a} and {b} are operands. Taking order: every phrasing names the first operand of the expression as {a}.
SUMS: dict[str, list[str]] = {
    "+": [
        "How much would I get for {a} plus {b}?",
        "Hello there, what value has {a} + {b}?",
        "I must know the sum of {a} and {b}",
        "Would you please add {a} and {b}?",
        "Tell me what {a} plus {b} is",
        "Do the sum {a} + {b} for me",
        "{a} plus {b} gives what?",
        "Are you able to add {a} to {b}?",
        "Can you tell me the total of {a} and {b}?",
    ],
    "-": [
        "How much would I get for {a} minus {b}?",
        "Hello there, what value has {a} - {b}?",
        "I must know the difference of {a} and {b}",
        "Would you please subtract {b} from {a}?",
        "Tell me what {a} minus {b} is",
        "{a} minus {b} gives what?",
        "Are you able to take {b} away from {a}?",
        "Do {a} - {b} for me",
    ],
    "*": [
        "How much would I get for {a} times {b}?",
        "Hello there, what value has {a} * {b}?",
        "I must know the product of {a} and {b}",
        "Would you please multiply {a} by {b}?",
        "Tell me what {a} times {b} is",
        "{a} times {b} gives what?",
        "Are you able to multiply {a} and {b}?",
        "Do {a} x {b} for me",
    ],
    "/": [
        "How much would I get for {a} divided by {b}?",
        "Hello there, what value has {a} / {b}?",
        "I must know the quotient of {a} and {b}",
        "Would you please divide {a} by {b}?",
        "Tell me what {a} divided by {b} is",
        "{a} divided by {b} gives what?",
        "Are you able to divide {a} by {b}?",
        "Do {a} / {b} for me",
    ],
}
WEATHER = [
    "So how is the weather over in {}?",
    "Hello, what's the weather in {} like?",
    "Would it be cold in {} today?",
    "I want to know the weather in {}",
    "Could you check the weather in {} for me?",
    "Is it going to rain in {}?",
    "I am in {}, is it sunny?",
    "Please say how warm it is in {}",
    "What will the weather be in {}?",
    "Tell me if it rains in {}",
]
WEATHER_CITIES = [
    "Paris",
    "Oslo",
    "Toronto",
    "Kyoto",
    "Lagos",
    "Hamburg",
    "Lima",
    "Seattle",
    "Dubai",
    "Porto",
    "Helsinki",
    "Tamrin",
    "Velo",
    "Kastor",
    "New York",
    "Cape Town",
]
STORIES = {
    "fox": "Would you tell us a story about a fox?",
    "robot": "Let me read a short story about a robot",
    "princess": "I feel like a story about a princess",
    "owl": "Please tell me a nice story about an owl",
    "boat": "Make a little story about a boat",
    "bear": "A story about a bear would be nice",
    "dragon": "I want a story of a dragon",
    "cat": "Can you make a story about a cat?",
    "wizard": "Tell the story of a wizard",
    "penguin": "Could I hear a story about a penguin?",
    "mouse": "Now a story about a mouse",
    "farmer": "Write one story about a farmer",
    "star": "One story about a star, please",
    "horse": "Do you have a story about a horse?",
    "king": "Tell my child a story about a king",
    "train": "A very short story about a train please",
    "turtle": "Let us have a story about a turtle",
    "pirate": "Tell a story with a pirate",
    "lion": "May I have a story about a lion?",
    "snowman": "Think of a story about a snowman",
    "rabbit": "A bedtime story about a rabbit",
    "giant": "Please write a tale about a giant",
    "duck": "Story about a duck, please",
    "tree": "I would love a story about a tree",
    "sailor": "Read me the story of a sailor",
    "wolf": "Tell me some story about a wolf",
    "queen": "Do tell a story about a queen",
    "bee": "Any story about a bee?",
    "ghost": "How about a story about a ghost?",
    "tiger": "A tale about a tiger for my son",
}
NAMES = [
    "Anna",
    "Tom",
    "Clara",
    "Hugo",
    "Nora",
    "Ben",
    "Lucy",
    "Victor",
    "Mia",
    "Oscar",
    "Ravi",
    "Stella",
    "Jana",
    "Piet",
    "Solveig",
    "Marlon",
    "Tilda",
    "Enzo",
]
JSON_PHRASES = [
    "Please write a JSON object with name and age: {n} is {a} years old.",
    "{n} is {a} years old. Could you give me that as JSON?",
    "Could you make JSON with name and age from this? {n} is {a}.",
    "I need name and age as a JSON object: {n} is {a} years old.",
    "Write the following as JSON: {n} is {a} years old.",
    "JSON with the keys name and age for this text: {n}, aged {a}.",
]
JSON_CITY = [
    "Please write a JSON object with name and city: {n} lives in {c}.",
    "{n} lives in {c}. Could you give me that as JSON?",
    "I need name and city as a JSON object: {n} is from {c}.",
    "Could you make JSON with name and city from this? {n} comes from {c}.",
]
UPPER = [
    "Please answer in upper case.",
    "Only use capital letters.",
    "Every answer must be in upper case letters.",
    "You are an assistant that always writes in capital letters.",
]
ONE_WORD = [
    "Please answer with one word.",
    "Answer with just a single word.",
    "Every answer must be one word.",
    "You are an assistant that replies with a single word.",
]

CALCULATOR: Message = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}
CALCULATORS = [
    CALCULATOR,
    {
        "type": "function",
        "function": {
            "name": "calculator",
            "description": "Computes arithmetic for the user",
            "parameters": {
                "type": "object",
                "properties": {"expression": {"type": "string", "description": "The arithmetic to compute"}},
                "required": ["expression"],
            },
        },
    },
]
WEATHER_TOOLS: list[Message] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": text,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": "string", "description": about}},
                "required": [key],
            },
        },
    }
    for name, text, key, about in [
        ("get_weather", "Get the current weather", "city", "The city"),
        ("weather_for", "Weather of a city", "town", "Name of the town"),
        ("lookup_city_weather", "Looks up the current weather in a city", "location", "The location"),
        ("get_weather_now", "Returns the current weather", "place", ""),
    ]
]


def held_out(*values: object) -> bool:
    """The same tenth of all operand tuples that make_tiny.py leaves out."""
    return hashlib.sha256(repr(values).encode()).digest()[0] < 26


def all_phrases() -> list[str]:
    """Every fixed sentence that is asked, for make_tiny.py to leave out."""
    fixed = [text for _, texts in SMALL_TALK for text in texts] + [
        text for _, texts in TOPICS.values() for text in texts
    ]
    fixed += [text for _, text in FACTS] + list(STORIES.values())
    fixed += [phrase.format(country) for phrase in CAPITAL_PHRASES for country in CAPITALS]
    fixed += [phrase.format(word) for phrase in OPPOSITE_PHRASES for word in OPPOSITES] + [
        phrase.format(word) for phrase in SPELLING_PHRASES for word in SPELLINGS
    ]
    fixed += [phrase.format(end) for phrase in COUNT_PHRASES for end in range(1, 31)] + [
        phrase.format(text) for phrase in REPEAT_PHRASES for text in REPEATS
    ]
    return fixed + [phrase.format(city) for phrase in WEATHER for city in WEATHER_CITIES] + UPPER + ONE_WORD


PHRASES = all_phrases()


# ── Cases ────────────────────────────────────────────────────────────────────────────────────────────────────────────


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


def user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


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


def talk_cases() -> Iterable[Case]:
    for pattern, texts in SMALL_TALK:
        for text in texts:
            yield Case("greetings and identity", user(text), says(pattern))


def topic_cases() -> Iterable[Case]:
    for pattern, texts in TOPICS.values():
        for text in texts:
            yield Case("shimmy questions", user(text), says(pattern))


def fact_cases(rng: random.Random) -> Iterable[Case]:
    name = "small facts"
    for pattern, text in FACTS:
        yield Case(name, user(text), says(pattern))
    for country, city in CAPITALS.items():
        yield Case(name, user(rng.choice(CAPITAL_PHRASES).format(country)), says(city))
    for word, other in OPPOSITES.items():
        yield Case(name, user(rng.choice(OPPOSITE_PHRASES).format(word)), says(rf"\b({other})\b"))
    for word in SPELLINGS:
        yield Case(
            name, user(rng.choice(SPELLING_PHRASES).format(word)), says(r"\b" + r",? ?-?".join(word.upper()) + r"\b")
        )
    for end in rng.sample(range(2, 31), 14):
        yield Case(
            name, user(rng.choice(COUNT_PHRASES).format(end)), says_exactly(", ".join(map(str, range(1, end + 1))))
        )
    for text in REPEATS:
        yield Case(name, user(rng.choice(REPEAT_PHRASES).format(text)), says_exactly(text))


NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen"""
ONES, TENS = (
    NUMBERS.split(),
    ["", "", *(word + "ty" for word in ("twen", "thir", "for", "fif", "six", "seven", "eigh", "nine"))],
)


def in_words(number: int) -> str:
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10] + (" " + ONES[number % 10] if number % 10 else "")
    return in_words(number // 100) + " hundred" + (" " + in_words(number % 100) if number % 100 else "")


def held_out_operands(rng: random.Random, operator: str, digits: int) -> tuple[int, int]:
    while True:
        pair = tuple(
            rng.randint(0 if size == 1 else 10 ** (size - 1), 10**size - 1)
            for size in (rng.randint(1, digits), rng.randint(1, digits))
        )
        if held_out(pair[0], operator, pair[1]):
            return pair[0], pair[1]


def calculator_cases(rng: random.Random, count: int) -> Iterable[Case]:
    for at in range(count):
        operator = "+-*/"[at % 4]
        first, second = held_out_operands(rng, operator, 4)
        tools = [rng.choice(CALCULATORS)] + ([rng.choice(WEATHER_TOOLS)] if at % 2 else [])
        text = rng.choice(SUMS[operator]).format(a=first, b=second)
        yield called(
            Case(
                "calculator call exact (digits)",
                user(text),
                calls_sum(first, operator, second),
                tools,
            )
        )
    for at in range(count // 2):
        operator = "+-*/"[at % 4]
        first, second = held_out_operands(rng, operator, 3)
        worded = [text for text in SUMS[operator] if not re.search(r"\} [-+*/x] \{", text)]
        text = rng.choice(worded).format(a=in_words(first), b=in_words(second))
        yield called(
            Case(
                "calculator call exact (words)",
                user(text),
                calls_sum(first, operator, second),
                [rng.choice(CALCULATORS)],
            )
        )


def called(case: Case) -> Case:
    """The case, counted among well-formed calls too."""
    return Case(
        case.category,
        case.messages,
        case.judge,
        case.tools,
        {"valid call syntax": lambda reply: well_formed(reply, case.tools)},
    )


def weather_cases(rng: random.Random, count: int) -> Iterable[Case]:
    for at in range(count):
        tool, city = WEATHER_TOOLS[at % len(WEATHER_TOOLS)], rng.choice(WEATHER_CITIES)
        parameter = next(iter(tool["function"]["parameters"]["properties"]))
        tools = [tool, CALCULATOR] if at % 2 else [tool]
        judge = calls(tool["function"]["name"], {parameter: city})
        yield called(Case("weather call exact", user(WEATHER[at % len(WEATHER)].format(city)), judge, tools))


def quiet_cases(rng: random.Random, count: int) -> Iterable[Case]:
    """Requests that need no tool, with tools on offer."""
    pool = (
        [text for _, texts in SMALL_TALK for text in texts]
        + [text for _, texts in TOPICS.values() for text in texts]
        + [text for _, text in FACTS]
        + list(STORIES.values())
    )
    for text in rng.sample(pool, count):
        tools = [rng.choice(CALCULATORS)] + ([rng.choice(WEATHER_TOOLS)] if rng.random() < 0.5 else [])
        yield Case("no call when none fits", user(text), no_call, tools)


def result_cases(rng: random.Random, count: int) -> Iterable[Case]:
    """The call was made and its result is given back: the answer must hold it."""
    for at in range(count):
        if at % 3 < 2:
            operator = "+-*"[at % 3 if at % 2 else 2]
            first, second = held_out_operands(rng, operator, 4)
            expression = f"{first} {operator} {second}"
            result = str({"+": first + second, "-": first - second, "*": first * second}[operator])
            content = result if at % 2 else json.dumps({"result": int(result)})
            messages = user(rng.choice(SUMS[operator]).format(a=first, b=second)) + call_and_result(
                "calculator", {"expression": expression}, content
            )
            yield Case("tool result used", messages, says(rf"(?<!\d){re.escape(result)}(?!\d)"), [CALCULATOR])
        else:
            tool, city, degrees = rng.choice(WEATHER_TOOLS), rng.choice(WEATHER_CITIES), rng.randint(-9, 38)
            sky = rng.choice(["sunny", "cloudy", "rainy", "foggy", "clear"])
            content = rng.choice([f"{sky}, {degrees} °C", json.dumps({"condition": sky, "temperature": degrees})])
            name, parameter = tool["function"]["name"], next(iter(tool["function"]["parameters"]["properties"]))
            messages = user(rng.choice(WEATHER).format(city)) + call_and_result(name, {parameter: city}, content)
            yield Case("tool result used", messages, says_all(sky, str(degrees)), [tool])


def call_and_result(name: str, arguments: Message, content: str) -> list[Message]:
    call = {"id": "call_0", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
    return [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0", "content": content},
    ]


def json_cases(rng: random.Random, count: int) -> Iterable[Case]:
    for at in range(count):
        name = NAMES[at % len(NAMES)]
        if at % 3 < 2:
            age = rng.randint(2, 98)
            text, wanted = rng.choice(JSON_PHRASES).format(n=name, a=age), {"name": name, "age": age}
        else:
            city = rng.choice(WEATHER_CITIES)
            text, wanted = rng.choice(JSON_CITY).format(n=name, c=city), {"name": name, "city": city}
        yield Case("valid JSON", user(text), is_object, also={"JSON holds the right values": is_json(wanted)})


def is_upper(reply: Reply) -> bool:
    return reply.text == reply.text.upper()


def is_one_word(reply: Reply) -> bool:
    return len(reply.text.split()) == 1


def style_cases(rng: random.Random, count: int) -> Iterable[Case]:
    """A system prompt that asks for upper case, or for one word; and the answer must be right as well."""
    short = [fact for fact in FACTS if "*" not in fact[0]]  # a list of seven days is no one-word answer
    for at in range(count):
        upper = at % 2 == 0
        system = {"role": "system", "content": rng.choice(UPPER if upper else ONE_WORD)}
        country, city = rng.choice(list(CAPITALS.items()))
        pattern, text = rng.choice([(city, rng.choice(CAPITAL_PHRASES).format(country)), rng.choice(short)])
        category = "system prompt: upper case" if upper else "system prompt: one word"
        also = {"…and the answer is right": says(pattern)}
        yield Case(category, [system, *user(text)], is_upper if upper else is_one_word, also=also)


def story_cases() -> Iterable[Case]:
    for subject, text in STORIES.items():
        yield Case(
            "stories: 80 to 300 tokens",
            user(text),
            lambda reply: 80 <= reply.tokens <= 300,
            also={"stories: about their subject": says(rf"\b{subject}")},
        )


def all_cases() -> list[Case]:
    rng = random.Random(3)
    makers = [
        talk_cases(),
        topic_cases(),
        calculator_cases(rng, 160),
        weather_cases(rng, 100),
        quiet_cases(rng, 150),
        result_cases(rng, 120),
        fact_cases(rng),
        json_cases(rng, 108),
        style_cases(rng, 100),
        story_cases(),
    ]
    return [case for cases in makers for case in cases]


# name in the table, threshold in percent (None: measured only)
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


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure shimmy-tiny.gguf through the real server.")
    parser.add_argument("--model", type=Path, default=HERE / "shimmy-tiny.gguf")
    parser.add_argument("--limit", type=int, help="ask only this many cases of each kind")
    parser.add_argument("--keep", action="store_true", help="leave README.md as it is")
    parser.add_argument("--show", action="store_true", help="print every case that failed")
    options = parser.parse_args()
    cases = all_cases()
    if options.limit:
        cases = [
            case
            for at, case in enumerate(cases)
            if sum(other.category == case.category for other in cases[:at]) < options.limit
        ]
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
