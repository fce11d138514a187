#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["llama-cpp-python>=0.3.36", "websockets>=17", "jinja2>=3.1.6"]
# ///
"""shimmy: the GGUF models on this machine as a local inference service, in one file.

    main process                                                   one child per loaded model
     HTTP threads ──┐                                               ┌─────────────────────────────────────┐
     ws loop thread ├─ Service.generate ── Worker ── Submit, Cancel ──▶ Intake ─▶ Engine: waiting, running │
     CLI ───────────┘     ▲          ▲       ▲  ◀── Accepted, Stepped    step = prefill + decode + sample  │
                     ModelTable   Helpers    three threads a worker └─────────────────────────────────────┘

Part I, the server, reads downward as a request flows. Its sections with their lines, 7 to 10 in the child:

    1    Limits and errors            170  every bound with its reason; ApiError and its kinds
    2    Requests and events          630  a body becomes a checked request; the events of its answer
    3    Models on disk               400  the catalog of model files; presets
    4    Chat                         800  messages to a prompt by the model's template (Helpers), its text back to events
    5    Tools                        440  a Python function is a tool; ToolLoop runs what the server may
    6    Messages                     390  jobs, what comes back of them, and the Pipe they cross
    7    llama.cpp                    840  the library: model, contexts, vocabulary, kernels
    8    Sampling                     480  how the next token is picked, and the text that tokens become
    9    Scheduling                   750  who runs and who waits, whose cells are where, Prefix reuse
    10   Engine                       690  the step loop, and the threads that feed it
    11   Worker                       520  the parent's side of a child; Metrics
    12   Models in memory             700  loads, evictions, the Ladder; ModelTable finds by name
    13   Service                      430  the only way in for every door
    14.1 Dialects                     510  what OpenAI's clients speak, and our own
    14.2 Dialects of blocks           510  Messages and Responses
    14.3 Ollama and llama-server      530  their shapes, and what clients are told of models
    15.1 Connections                  330  who may call, what comes in, who has left
    15.2 Wires                        110  documents to bytes; `deliver` is the one loop between
    15.3 Routes                       230  one row a route
    15.4 HTTP                         390  a connection's thread from its first byte to its last
    16   WebSocket, lifecycle         260  asyncio on its side thread; how a server stops
    17.1 Command line                 470  flags and their meaning
    17.2 Commands                     610  serve, list, probe, diag, pull
    17.3 generate                     560  by a running server or an engine of its own; main

Part II is a library that knows no request, route or model in memory. Each head says what it offers and uses.

    A    The machine                  360  memory, cores, versions, known faults, child processes
    B    GGUF headers                 310  a bounded reader, and the memory a model asks for
    C    Formats                      980  how models write thoughts and calls, and the parser of it
    D.1  Automata                     410  symbols, and the states of all readings of a text
    D.2  Patterns                     420  regular expressions and GBNF
    D.3  Strings                      600  sets of texts, with and, or and not
    D.4  Numbers                      220  numbers by bounds and multiples
    E.1  JSON schemas                 340  a client's schema, read and checked
    E.2  Shapes                       650  its normal form: meet, union, not
    E.3  Grammars                     740  its documents, and calls, as symbols
    F    Pull                         670  from a hub or any address into the cache
    G    Page                         840  the chat page at /

Three seams. What the client speaks: a Dialect reads bodies and makes documents, a Wire sends them. What the model writes:
Chat makes its prompts, reads its text and constrains it, by a ChatFormat derived from its template. What the engine
computes: a Job, which a Submit carries.

Who owns what. JSON, tool calls and HTTP live in the main process. Chat templates come from downloaded files and run in a
helper process, bounded in time and memory (Helpers). Tokens, KV cache and sampling live in the child, which alone imports
llama_cpp. Frozen dataclasses cross the pipes, one message a step for all sequences together; what a child says is not
trusted. A child ends with its pipe, however the parent went; on Linux an engine ends with the thread that starts them all,
even while it is stopped. A crash in native code ends one child, and one that falls silent or reports a task without end is
killed; its worker fails what ran there, and while a model loads, the Ladder loads it again with less.

Threads of the main process: one a connection, which blocks (HTTP); `accept`; `watcher`, which notices clients that leave;
`websocket`, which runs asyncio from the first upgrade on; `run_loads` and `run_unloads`, one model after another;
`first_scan` at the start; and for each worker one that reads, one that writes and one that watches. Threads of a child:
one receives, one beats, one tokenizes, one reads grammars that take long (Intake); the main thread alone decodes: Engine
takes the step that Scheduler plans, in cells that Cache gives out, and reads long prompts aside (PromptReader).
"""
from __future__ import annotations

import os
import signal
import sys
import time

# What another process of ours runs: this file from its cached bytecode, under whatever name and folder, then one
# function. Its imports see this file's folder first, as a script's do, not the working directory that -c puts there.
# Only the file's own bytecode is looked for below the prefix; that of the packages it imports stays where it is.
STARTER = """\
import signal, sys
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
if hasattr(signal, 'pthread_sigmask'):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
prefix, entry, path = sys.argv[1:4]
sys.argv = sys.argv[3:]
if sys.path[0] == '':
    sys.path[0] = path.rpartition('/')[0] or path.rpartition(chr(92))[0]
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
loader = SourceFileLoader('shimmy', path)
kept = sys.pycache_prefix, sys.dont_write_bytecode
if prefix:
    sys.pycache_prefix, sys.dont_write_bytecode = prefix, False
code = loader.get_code('shimmy')
sys.pycache_prefix, sys.dont_write_bytecode = kept
module = sys.modules['shimmy'] = module_from_spec(spec_from_loader('shimmy', loader))
exec(code, vars(module))
sys.exit(getattr(module, entry)())
"""


def child_command(entry: str, *arguments: str) -> list[str]:
    """The command line of a process that runs the function `entry` of this file, without compiling the file anew.

    The cached bytecode is Python's own kind, checked against the file's size and time before it is used. It lies in
    __pycache__ beside the file, or in the user's cache where that cannot be written, others may write it too, or
    PYTHONDONTWRITEBYTECODE (as in many containers) wants no file there.
    """
    path = os.path.realpath(__file__)
    return [sys.executable, "-c", STARTER, _bytecode_prefix(path), entry, path, *arguments]


def _bytecode_prefix(path: str) -> str:
    """A value for sys.pycache_prefix: "" is beside the file, os.devnull is nowhere."""
    from importlib.util import cache_from_source

    source, cached, own = os.stat(path), cache_from_source(path), os.path.join(user_cache(), "bytecode")
    if time.time() - source.st_mtime < 2.0:  # bytecode knows the second of its source: another change may come within it
        return os.devnull
    folder = os.path.dirname(cached) if os.path.isdir(os.path.dirname(cached)) else os.path.dirname(path)
    # who may change the bytecode must be who may change the file
    if not sys.dont_write_bytecode and (sys.pycache_prefix or _trusted({0, source.st_uid}, folder, cached)):
        return ""
    try:
        os.makedirs(own, mode=0o700, exist_ok=True)
    except OSError:
        return os.devnull
    return own if _trusted(set(), own) else os.devnull


def _trusted(owners: set[int], folder: str, *files: str) -> bool:
    """True if only `owners` and we can write the folder, and those of the files that exist."""
    found = [os.stat(path) for path in (folder, *files) if os.path.exists(path)]
    ours = os.name != "posix" or all(f.st_uid in owners | {os.geteuid()} and not f.st_mode & 0o002 for f in found)
    return ours and os.access(folder, os.W_OK)


def user_cache() -> str:
    """The user's folder of caches; safe to delete."""
    home = os.path.expanduser("~")
    usual = {"win32": os.environ.get("LOCALAPPDATA") or home, "darwin": os.path.join(home, "Library", "Caches")}
    own = os.environ.get("XDG_CACHE_HOME") or usual.get(sys.platform) or os.path.join(home, ".cache")
    return os.path.join(own, "shimmy")


def restart_from_bytecode() -> None:
    """Runs the same command line from cached bytecode, in this process. A script keeps its syntax tree, 57 MB, while it runs.

    Only a server lives long enough for that to matter more than the 15 ms it takes.
    """
    if _bytecode_prefix(os.path.realpath(__file__)) == os.devnull:
        return  # there is none, and to compile twice would take longer
    at = len(sys.orig_argv) - len(sys.argv)
    options = sys.orig_argv[1:at]  # the interpreter's own
    if sys.orig_argv[at] != sys.argv[0] or "-m" in options or "-c" in options:
        return  # another program runs us, which would be lost
    python, *rest = child_command("main", *sys.argv[1:])
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # until STARTER says what Ctrl-C does
    try:
        os.execv(python, [python, *options, *rest])  # noqa: S606  # nosec B606  # our own command line, and no shell
    except OSError:  # then as the script that we are
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


if __name__ == "__main__":
    # Ctrl-C while the imports run ends the program; main() makes it an exception again
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.name == "posix" and "serve" in sys.argv[1:3]:
        restart_from_bytecode()

import _thread
import argparse
import base64
import binascii
import bisect
import codecs
import contextlib
import copy
import errno
import functools
import gc
import http
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import pathlib
import pickle  # nosec B403  # for what the server sends to its own children
import queue
import re
import selectors
import socket
import socketserver
import stat
import struct
import threading
import urllib.parse
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field, fields, replace
from typing import IO, TYPE_CHECKING, Any, BinaryIO, ClassVar, NoReturn, TypeVar

if TYPE_CHECKING:
    import ast
    import asyncio
    import http.client
    import subprocess
    from concurrent.futures import Executor
    from fractions import Fraction

__version__ = "0.1.0"

log = logging.getLogger("shimmy")


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# Part I: the server. It reads downward, as a request flows.
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


# ── 1. Limits and errors ──────────────────────────────────────────────────────────────────────────────────────────────
# Every bound with its reason, and every error with its status.

MIB = 1 << 20
MAX_BODY = 16 * MIB  # a 128k-token prompt is under 1 MiB of text; 16 leaves room for long chats
MAX_HEAD = 64 * 1024  # request line and headers together
MAX_JSON_DEPTH = 64  # the parser recurses; real requests nest about 10 deep
MAX_CONNECTIONS = 1024  # one thread each
REQUEST_SECONDS = 30.0  # from a request's first byte to its last
IDLE_SECONDS = 120.0  # a kept-alive connection without a request
WRITE_SECONDS = 60.0  # a client that does not read for so long is gone
MAX_UNREAD = 4 * MIB  # queued for a slow client, beyond the socket's buffer: some 2,000 tokens with 20 log probabilities each
PING_SECONDS = 15.0  # silence before a sign of life keeps clients and proxies patient
HEAD_SIGNS = 2  # signs of life that are due before the headers of a stream are sent, although its request is not queued yet
LOAD_WAIT_SECONDS = 60.0  # how long a request waits for room when every loaded model is busy
GRACE_SECONDS = 5.0  # streams may finish so long after SIGTERM
MAX_STOPS = 64  # SillyTavern sends one for each name in a chat
MAX_STOP = 256  # characters of one; each is looked for with every token
MAX_BREAKERS = 16  # of DRY; for each one llama.cpp walks the vocabulary, up to 12 ms with 49,000 tokens
MAX_BREAKER = 40  # bytes of one; llama.cpp cuts longer ones
MAX_BIASES = 1024
MAX_MESSAGES = 4096  # of a chat; agents that run for hours send hundreds
MAX_CHOICES = 16
MAX_TEXTS = 256  # that one request may ask for, prompts times choices: half of what the queue holds
MAX_ECHOED = MIB  # characters of prompts, times log probabilities for each token that are echoed: some 100 MB of answer
MAX_INPUTS = 2048  # of an embedding request, OpenAI's bound
MAX_TOKENIZED = MIB  # characters of /tokenize: about a second; a quarter as many tokens of /detokenize
MAX_TOOLS = 128
MAX_TOOL_ROUNDS = 8  # of built-in tools called in one answer
MAX_TOOL_RESULT = 8000  # characters that the model reads of one, some 2,000 tokens: the context must hold several
TOOL_LOOP_SECONDS = 60.0  # for them all; then the model must answer without
MAX_SCAN_DEPTH = 12  # directories below a search root
MAX_SCAN_ENTRIES = 100_000  # files and directories looked at below one root
SCAN_DETAIL_SECONDS = 0.4  # of processor time: a scan reads whole headers for so long; the rest are read when asked about
HELPER_SECONDS = 1.5  # of processor time, for a helper process's task; the longest chats render in a tenth of that
HELPER_PATIENCE = 4  # times as long it may take on a machine that others keep busy
HELPER_BYTES = 1 << 30  # of address space, a helper process's
MAX_HELPERS = 4
MAX_RENDERED = 2 * MAX_BODY  # characters of a rendered prompt
FLUSH_SECONDS = 0.01  # steps shorter than this share a message: 100 events a second are more than an eye follows
MAX_PULLS = 4  # that clients may have running at once; more would only share the same line
HUB = "https://huggingface.co"


ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 503: "overloaded_error"}


class ApiError(Exception):
    """An answer that is an error: status, code, message, details and the field at fault (`param`)."""

    status = 500
    code = "server_error"
    message = "The server met an error"
    param: str | None = None
    headers: Mapping[str, str] = {}  # of the response
    sizes: tuple[int, ...] = ()  # what was too large, and the most it may be

    def __init_subclass__(cls, **shape: Any) -> None:
        for name, value in shape.items():
            setattr(cls, name, value)

    def __init__(self, details: str = "", message: str | None = None, param: str | None = None, hint: str = "") -> None:
        super().__init__(details)
        self.message, self.details, self.param = message or self.message, details, param or self.param
        self.hint = hint  # what the caller could name instead

    def __str__(self) -> str:
        return (f"{self.message}: {self.details}" if self.details else self.message) + self.hint

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        return ERROR_TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def document(self, openai: bool = False) -> dict[str, Any]:
        """The error object of every route. OpenAI's routes add `type` and `param`; its packages show only `message`, so
        there it says everything."""
        if openai:
            return {"error": {"code": self.code, "message": str(self), "details": self.details, "type": self.kind,
                              "param": self.param}}  # fmt: skip
        return {"error": {"code": self.code, "message": self.message, "details": self.details}}


class InvalidRequest(ApiError, code="invalid_request", message="The request is invalid"):
    """The request is wrong; message says what to change, param names the field."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(f"Field '{param}' is at fault" if param else message, message, param)
        self.status = status

    def __str__(self) -> str:
        return self.message


class ContextLengthExceeded(
    ApiError, status=400, code="context_length_exceeded", message="The prompt does not fit the model's context"
):
    """The prompt leaves no room for a token; details give both numbers, `sizes` too: its tokens, and the most there may be."""


class Unauthorized(ApiError, status=401, code="unauthorized", message="A valid API key is required",
                   headers={"WWW-Authenticate": "Bearer"}):  # fmt: skip
    """The key is missing or wrong."""


class Forbidden(ApiError, status=403, code="forbidden", message="The request is not allowed"):
    """A foreign Host or Origin."""


class NotFound(ApiError, status=404, code="not_found", message="There is nothing at this address"):
    """No such route, or no such tool."""


class ModelNotFound(ApiError, status=404, code="model_not_found", message="The specified model was not found", param="model"):
    """No model has this name."""


class MethodNotAllowed(ApiError, status=405, code="method_not_allowed", message="The method is not allowed here"):
    """The route exists, for other methods."""

    def __init__(self, method: str, allow: Iterable[str]) -> None:
        self.headers = {"Allow": ", ".join(sorted(allow))}
        super().__init__(f"{method[:20]} is not allowed; allowed are {self.headers['Allow']}")


class PayloadTooLarge(ApiError, status=413, code="payload_too_large", message="The body is too large"):
    """A body beyond MAX_BODY."""


class Overloaded(ApiError, status=503, code="overloaded", message="The server is busy, try again",
                 headers={"Retry-After": "2"}):  # fmt: skip
    """The queue, the models or the connections are at their bound; try again."""


class GenerationFailed(ApiError, code="generation_failed", message="Text generation failed"):
    """The engine could not load, or broke off."""


class Cancelled(Exception):
    """The client left or cancelled the request: there is nobody to answer."""


ERRORS: dict[str, Callable[..., ApiError]] = {  # by the code that crosses the pipe
    e.code: e for e in (InvalidRequest, ContextLengthExceeded, Overloaded, GenerationFailed, ApiError)
}


class Cancellation:
    """Cancels one request; callbacks wake its waiters, and may run more than once. Any thread may cancel."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[], None]] = []
        self.cancelled = False
        self.gently = False  # the client still listens: let the engine say how far it came

    def cancel(self, gently: bool = False) -> None:
        """Ends the request now; gently: with the engine's own end, whose finish_reason is cancelled."""
        self.gently, self.cancelled = gently, True
        for callback in list(self._callbacks):
            callback()

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Runs `callback` on cancel; immediately if already cancelled."""
        self._callbacks.append(callback)
        if self.cancelled:
            callback()

    def check(self) -> None:
        """Raises Cancelled when the request has been cancelled."""
        if self.cancelled:
            raise Cancelled


# ── 2. Requests and events ────────────────────────────────────────────────────────────────────────────────────────────
# Bodies become frozen dataclasses; each parameter is named once, with its default, bounds and help. Raw dicts end here.

Check = Callable[[str, Any], Any]


def _said(value: Any) -> str:
    """Abbreviates a value for an error message."""
    if isinstance(value, int) and value.bit_length() > 1024:
        return "a number of over 300 digits"  # to write it out takes quadratic time, or is refused by Python
    shown = json.dumps(value, ensure_ascii=True)
    return shown if len(shown) <= 40 else shown[:37] + "..."


def number(low: float, high: float) -> Check:
    """Accepts a number from `low` to `high`."""

    def check(name: str, value: Any) -> float:
        if type(value) not in (int, float) or not low <= value <= high:
            raise InvalidRequest(f"{name} must be a number from {low:g} to {high:g}, not {_said(value)}", name)
        return float(value)

    return check


def whole(low: float = -math.inf, high: float = math.inf) -> Check:
    """Accepts a whole number within the bounds given; 100.0 counts as whole, as JavaScript clients may write it."""
    bounds = f" from {low} to {high}" if high < math.inf else f" ≥ {low}" if low > -math.inf else ""

    def check(name: str, value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            raise InvalidRequest(f"{name} must be a whole number{bounds}, not {_said(value)}", name)
        return value

    return check


NO_LIMIT = 1 << 30  # tokens; more than any context has


def token_limit(name: str, value: Any) -> int:
    """A number of tokens; -1 means no limit but the context's end, as llama-server and Ollama have it."""
    return NO_LIMIT if value == -1 and not isinstance(value, bool) else int(whole(1)(name, value))


def token_count(name: str, value: Any) -> int:
    """How many tokens to keep; 0 means all, and so does -1, which vLLM's clients send."""
    return max(0, whole(-1)(name, value))


def one_type(kind: type, words: str) -> Check:
    """Accepts a value of one JSON type."""

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, kind):
            raise InvalidRequest(f"{name} must be {words}, not {_said(value)}", name)
        return value

    return check


boolean = one_type(bool, "true or false")
a_string = one_type(str, "a string")
an_object = one_type(dict, "an object")


def strings(most: int, size: int, unit: str) -> Check:
    """Accepts a string or a list of strings, each of up to `size` characters or bytes; empty ones are left out."""

    def check(name: str, value: Any) -> tuple[str, ...]:
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or len(listed) > most or not all(isinstance(s, str) for s in listed):
            raise InvalidRequest(f"{name} must be a string or a list of up to {most} strings, not {_said(value)}", name)
        longest = max((len(s.encode() if unit == "bytes" else s) for s in listed), default=0)
        if longest > size:
            raise InvalidRequest(f"{name} may have up to {size} {unit} each, not {longest}", name)
        return tuple(filter(None, listed))

    return check


stops = strings(MAX_STOPS, MAX_STOP, "characters")
breakers = strings(MAX_BREAKERS, MAX_BREAKER, "bytes")


def biases(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """Token ids with a number from −100 to 100 each; −100 and false ban the token.

    OpenAI's form is an object of id to bias, llama-server's a list of pairs.
    """
    pairs = list(value.items()) if isinstance(value, dict) else value
    paired = isinstance(pairs, list) and all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs)
    if not paired or len(pairs) > MAX_BIASES or not all(re.fullmatch("0*[0-9]{1,10}", str(token)) for token, _ in pairs):
        forms = f"an object of up to {MAX_BIASES} token ids, or a list of pairs of a token id and its bias"
        raise InvalidRequest(f"{name} must be {forms}, not {_said(value)}", name)
    check = number(-100, 100)
    return tuple((int(t), -math.inf if v is False or v == -100 else check(f"{name}.{t}", v)) for t, v in pairs)


def param(check: Check, help: str, default: Any = None, **more: Any) -> Any:
    """A request parameter: its check, one line of help for the command line (none: no flag), its default.

    `otherwise` is llama.cpp's default, which holds when neither the request nor the model's file has a value.
    """
    return field(default=default, metadata={"check": check, "help": help, **more})


NATIVE_DEFAULTS: dict[str, Any] = {"max_tokens": 100, "temperature": 0.7}  # of /api/generate and of `generate`


@dataclass(frozen=True)
class Schema:
    """A JSON schema that a field of the request (`param`) asks the text to fit."""

    param: str
    schema: Mapping[str, Any]


def a_schema(name: str, value: Any) -> Schema:
    """A JSON schema; whether it can be honoured shows when it becomes a grammar."""
    return Schema(name, an_object(name, value))


@dataclass(frozen=True)
class Constraint:
    """Limits a text to a grammar; `param`, the request's field that asked for it, is named in errors."""

    grammar: Symbol
    param: str
    after: str | None = None  # the text behind which it begins; None: at once
    markers: frozenset[str] = frozenset()  # control tokens that may write what it wants; others stand for no text


@dataclass(frozen=True)
class Sampling:
    """How tokens are picked. None means: what the model's file says (general.sampling.*), else llama.cpp's default."""

    max_tokens: int | None = param(token_limit, "most tokens to generate; -1: up to the context's end")
    temperature: float | None = param(number(0, 5), "randomness; 0 always takes the likeliest token", otherwise=0.8)
    dynatemp_range: float | None = param(number(0, 5), "let the temperature go up and down by so much, with how unsure the "
                                         "model is", otherwise=0.0)  # fmt: skip
    dynatemp_exponent: float | None = param(number(0, 10), "how fast it rises then", otherwise=1.0)
    top_p: float | None = param(number(0, 1), "keep the likeliest tokens that sum to this probability", otherwise=0.95)
    top_k: int | None = param(token_count, "keep this many likeliest tokens; 0 keeps all", otherwise=40)
    min_p: float | None = param(number(0, 1), "drop tokens below this share of the likeliest one", otherwise=0.05)
    typical_p: float | None = param(number(0, 1), "keep the tokens of about the expected surprise that sum to this "
                                    "probability; 1 is off", otherwise=1.0)  # fmt: skip
    top_n_sigma: float | None = param(number(-1, 100), "keep tokens whose score is within so many standard deviations "
                                      "of the best; 0 or less is off", otherwise=-1.0)  # fmt: skip
    xtc_probability: float | None = param(number(0, 1), "how often to drop all likely tokens but the last", otherwise=0.0)
    xtc_threshold: float | None = param(number(0, 1), "the probability from which a token counts as likely then; "
                                        "above 0.5 is off", otherwise=0.1)  # fmt: skip
    repeat_penalty: float | None = param(number(0.1, 10), "divide the score of tokens already there; 1 is off", otherwise=1.0)
    presence_penalty: float | None = param(number(-2, 2), "lower the score of tokens already there", otherwise=0.0)
    frequency_penalty: float | None = param(number(-2, 2), "lower the score of tokens by how often they came", otherwise=0.0)
    repeat_last_n: int | None = param(whole(-1), "tokens that these penalties look back on; -1: the context, 0: off",
                                      otherwise=64)  # fmt: skip
    dry_multiplier: float | None = param(number(0, 100), "lower the score of tokens that go on with a repetition (DRY); "
                                         "0 is off", otherwise=0.0)  # fmt: skip
    dry_base: float | None = param(number(1, 100), "how fast that grows with the repetition's length", otherwise=1.75)
    dry_allowed_length: int | None = param(whole(0), "tokens that may repeat for free", otherwise=2)
    dry_penalty_last_n: int | None = param(whole(-1), "tokens that DRY looks back on; -1: the context, 0: off", otherwise=64)
    dry_sequence_breakers: tuple[str, ...] | None = param(breakers, "DRY's repetitions end at this text (repeatable)",
                                                          otherwise=("\n", ":", '"', "*"))  # fmt: skip
    mirostat: int | None = param(whole(0, 2), "aim at a constant surprise: version 1 or 2 of Mirostat; 0 is off", otherwise=0)
    mirostat_tau: float | None = param(number(0, 100), "the surprise that Mirostat aims at", otherwise=5.0)
    mirostat_eta: float | None = param(number(0, 1), "how fast Mirostat learns", otherwise=0.1)
    seed: int | None = param(whole(), "the same seed gives the same text on an idle server")
    stop: tuple[str, ...] = param(stops, "end before this text (repeatable)", ())
    ignore_eos: bool = param(boolean, "go on past the model's end of text", False)
    logit_bias: tuple[tuple[int, float], ...] = param(biases, "", ())
    json_schema: Schema | None = param(a_schema, "")  # noqa: RUF009  param gives a field
    grammar: str | None = param(a_string, "")  # GBNF
    constraint: Constraint | None = None  # made from json_schema or grammar by the service
    logprobs: int | None = None  # how many alternatives to report; 0: only the picked token's own

    @classmethod
    def from_json(cls, body: Mapping[str, Any], **defaults: Any) -> Sampling:
        """The sampling parameters in `body`, checked; InvalidRequest names the field and its bounds."""
        given = {
            f.name: f.metadata["check"](f.name, body[f.name])
            for f in fields(cls)
            if f.metadata and body.get(f.name) is not None
        }
        return cls(**defaults | given)

    def filled(self, *defaults: Mapping[str, Any]) -> Sampling:
        """With the values of these, the first ones first, where the request says nothing."""
        merged = {name: value for layer in reversed(defaults) for name, value in layer.items()}
        empty = {name for name, value in vars(self).items() if value is None or value is False or value == ()}
        return replace(self, **{name: value for name, value in merged.items() if name in empty})


@dataclass(frozen=True)
class Infill:
    """A gap to fill: the text before and behind it, and pieces of other files (name, text) that may be left out."""

    prefix: str
    suffix: str
    extra: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class GenerateRequest:
    """A request for text, from any dialect: prompts (text or token ids), one chat, or a gap to fill."""

    model: str = "default"
    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: tuple[dict[str, Any], ...] | None = None
    infill: Infill | None = None
    tools: tuple[dict[str, Any], ...] = ()  # functions that the client runs
    builtins: tuple[str, ...] = ()  # tools that the server itself runs
    tool_choice: str = "auto"  # none, auto, required, or "function:" and the one to call
    parallel_tool_calls: bool = True
    continue_final_message: bool | None = None  # None: when the last message is the assistant's
    thinking_budget: int | None = None  # tokens of thought, then the answer begins
    owner: str = ""  # only requests of the same owner share cached prompts
    template_args: Mapping[str, Any] = field(default_factory=dict)
    sampling: Sampling = Sampling()
    defaults: Mapping[str, Any] = field(default_factory=dict)  # the API's own, where neither request nor preset says more
    engine: Mapping[str, Any] = field(default_factory=dict)  # what the model is to be loaded with, as Ollama's options tell
    n: int = 1
    split_markers: bool = False  # take thoughts and tool calls out of the text
    echo: bool = False  # the text begins with the prompt, with the log probabilities of its tokens


@dataclass(frozen=True)
class EmbedRequest:
    """A request for a vector of each input (text or token ids), or with a query for a score of each."""

    model: str
    inputs: tuple[str | tuple[int, ...], ...]
    dimensions: int | None = None
    query: str | None = None
    truncate: bool = False  # cut what is too long instead of refusing it
    engine: Mapping[str, Any] = field(default_factory=dict)  # as GenerateRequest has it


def read_texts(name: str, value: Any, most: int, may_be_empty: bool = True) -> tuple[str | tuple[int, ...], ...]:
    """Prompts or inputs: a string, token ids, or a list of strings and of token ids, at most so many.

    OpenAI refuses empty ones to embed; Ollama makes vectors of those in a list (EmbedHandler in server/routes.go).
    """
    texts = [value] if isinstance(value, str) or is_ids(value) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) or is_ids(t) or t == [] for t in texts):
        raise InvalidRequest(f"{name} must be a string, token ids, or a list of strings or of lists of token ids", name)
    check_length(name, texts, most)
    for index, text in enumerate(texts):
        if text == [] or (text == "" and not may_be_empty):
            raise InvalidRequest(f"{name}[{index}] is empty: each needs some text", name)
    return tuple(text if isinstance(text, str) else tuple(text) for text in texts)


def read_documents(value: Any) -> tuple[str, ...]:
    """The documents to rank: strings, or objects with a text."""
    parts = value if isinstance(value, list) else []
    texts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InvalidRequest('documents must be a list of strings, or of objects {"text": ...}', "documents")
    check_length("documents", texts, MAX_INPUTS)
    return tuple(texts)


def check_length(name: str, value: Seq[Any], most: int) -> None:
    """Raises InvalidRequest for a list that is too long."""
    if len(value) > most:
        raise InvalidRequest(f"{name} may hold up to {most}, not {len(value)}", name)


def optional(body: Mapping[str, Any], name: str, check: Check, default: Any = None) -> Any:
    """A field's value, checked; the default where it is absent or null."""
    value = body.get(name)
    return default if value is None else check(name, value)


def flag(body: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """A field that is true or false."""
    return bool(optional(body, name, boolean, default))


def is_ids(value: Any) -> bool:
    """True for a list of whole numbers that is not empty."""
    return isinstance(value, list) and bool(value) and all(type(v) is int for v in value)


THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")  # of a message; inside they all have the first name
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def read_messages(body: Mapping[str, Any]) -> tuple[dict[str, Any], ...] | None:
    """The checked `messages` of a chat, content flattened to a string; None when absent."""
    messages = body.get("messages")
    if messages is None:
        return None
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages must be a list of at least one message", "messages")
    check_length("messages", messages, MAX_MESSAGES)
    newest = newest_turn(messages)
    return tuple(read_message(f"messages[{i}]", message, message is newest) for i, message in enumerate(messages))


def newest_turn(messages: Seq[Any]) -> Any:
    """The user's newest message; None without one."""
    return next((m for m in reversed(messages) if isinstance(m, dict) and m.get("role") == "user"), None)


def read_message(where: str, message: Any, newest: bool) -> dict[str, Any]:
    """One message of a chat as templates want it: content is always a string, tool arguments are objects."""
    message = an_object(where, message)
    role = one_of(f"{where}.role", message.get("role"), ROLES)
    content = message.get("content")
    if content is None and role != "assistant":
        raise InvalidRequest(f"{where}.content is required", f"{where}.content")
    text = flat_content(f"{where}.content", "" if content is None else content, newest=newest)
    read: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": text}
    for name in ("name", "tool_call_id", *reversed(THOUGHT_FIELDS)):
        if message.get(name) is not None:
            kept = THOUGHT_FIELDS[0] if name in THOUGHT_FIELDS else name
            read[kept] = a_string(f"{where}.{name}", message[name])
    if calls := message.get("tool_calls"):
        read["tool_calls"] = read_tool_calls(f"{where}.tool_calls", calls)
    return read


MEDIA = {  # parts of messages that no model here reads, in every API's words
    "image_url": "image", "image": "image", "input_image": "image", "input_audio": "audio", "audio_url": "audio",
    "video_url": "video", "file": "file", "input_file": "file", "document": "file",
}  # fmt: skip


def flat_content(where: str, content: Any, kinds: Seq[str] = ("text", "refusal"), between: str = "", newest: bool = False) -> str:
    """A message's content as one string: a string as it is, or the texts of a list of parts of these types, joined.

    A note stands for images, audio and files, but in the user's newest turn they are refused.
    """
    return content if isinstance(content, str) else flat_parts(listed(where, content), kinds, between, newest)


def flat_parts(parts: Iterable[tuple[str, dict[str, Any]]], kinds: Seq[str], between: str, newest: bool) -> str:
    """The texts of parts, each with its place for error messages."""
    texts, media = [], []
    for place, part in parts:
        kind = part.get("type")
        if isinstance(kind, str) and kind in MEDIA:
            media.append(left_out(f"{place}.type", kind, newest))
            texts.append(a_string(f"{place}.title", given(part, "title", "")))
        else:
            name = "refusal" if one_of(f"{place}.type", kind, kinds) == "refusal" else "text"  # one comes back in the history
            texts.append(a_string(f"{place}.{name}", part.get(name)))
    return with_note(between.join(filter(None, texts)), media)


def left_out(where: str, kind: str, newest: bool) -> str:
    """The word for a part that no model here reads. Raises InvalidRequest in the user's newest turn, which is about it."""
    if newest:
        raise InvalidRequest(f"{where}: {_said(kind)} is not served: no model here reads anything but text", where)
    return MEDIA[kind]


def with_note(text: str, media: Seq[str]) -> str:
    """A text, and what was left out beside it."""
    if not media:
        return text
    note = f"[{' and '.join(dict.fromkeys(media))} left out: this model reads text only]"
    return f"{text}\n{note}" if text else note


def read_tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """An assistant message's tool calls; arguments, a JSON text over the wire, become the object templates want."""
    read = []
    for place, call in listed(where, calls):
        function = an_object(f"{place}.function", call.get("function"))
        name, arguments = a_string(f"{place}.function.name", function.get("name")), function.get("arguments")
        if isinstance(arguments, str):
            with contextlib.suppress(InvalidRequest, UnicodeEncodeError):  # what is no JSON stays the text it is
                arguments = parse_json(arguments.encode())
        read.append({"id": str(call.get("id") or ""), "type": "function",
                     "function": {"name": name, "arguments": {} if arguments is None else arguments}})  # fmt: skip
    return read


NO_PARAMETERS = {"type": "object", "properties": {}}  # of a function without; templates look for both


def read_tools(body: Mapping[str, Any]) -> tuple[tuple[dict[str, Any], ...], tuple[str, ...]]:
    """Checks a chat's tools: its functions, and the names of built-in ones; none when tool_choice is "none"."""
    tools = body.get("tools") or []
    check_length("tools", one_type(list, "a list")("tools", tools), MAX_TOOLS)
    functions, builtins = [], []
    for where, tool in listed("tools", tools):
        if one_of(f"{where}.type", tool.get("type"), ("function", "builtin")) == "builtin":
            builtins.append(a_string(f"{where}.name", tool.get("name")))
        else:
            function = an_object(f"{where}.function", tool.get("function"))
            a_string(f"{where}.function.name", function.get("name"))
            parameters = an_object(f"{where}.function.parameters", function.get("parameters") or NO_PARAMETERS)
            check_structure(json.dumps(parameters), f"{where}.function.parameters")
            functions.append({**tool, "function": {**function, "parameters": parameters}})
    return ((), ()) if body.get("tool_choice") == "none" else (tuple(functions), tuple(builtins))


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its log probability under the full softmax, and the likeliest alternatives, best first.

    Flat tuples: pairs would be 20 objects more a token, which Python's collector then looks at in every sweep.
    """

    token: bytes
    logprob: float  # not a number for a token that has none before it
    names: tuple[bytes, ...] = ()
    logprobs: tuple[float, ...] = ()
    id: int = -1
    ids: tuple[int, ...] = ()

    @property
    def top(self) -> Iterable[tuple[bytes, float]]:
        return zip(self.names, self.logprobs, strict=True)

    def cut(self, size: int) -> TokenLogprob:
        """This with at most so many characters of the token; one with a part of a character stays whole."""
        text = self.token.decode("utf-8", "replace")
        return replace(self, token=text[:size].encode()) if len(text) > size and "\ufffd" not in text else self


@dataclass(frozen=True)
class Queued:
    """Every sequence of the request passed its checks and is queued: the answer may begin."""

    model: str  # the id of the model that answers, whatever the request called it
    prompt_tokens: int = 0  # of all its sequences; 0: not known


@dataclass(frozen=True)
class Waiting:
    """Nothing happened for PING_SECONDS: a sign of life is due."""


@dataclass(frozen=True)
class Text:
    """Some text of one choice."""

    index: int
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Thought:
    """Some reasoning of one choice, which comes before its text."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class CallBegan:
    """A tool call begins; `number` counts the calls of its choice from 0."""

    index: int
    number: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of a call's arguments: JSON text."""

    index: int
    number: int
    text: str


@dataclass(frozen=True)
class ToolResult:
    """The server has run a built-in tool for the model."""

    index: int
    id: str
    name: str
    arguments: str  # JSON text
    result: Any
    error: str | None


@dataclass(frozen=True)
class ChoiceEnd:
    """A choice is complete."""

    index: int
    finish_reason: str
    stopped_by: str = ""  # the stop string that ended it
    usage: Usage | None = None  # its own


@dataclass(frozen=True)
class Vectors:
    """The result of an Embed job: a vector or a score for each input, as float32 in little-endian bytes."""

    id: int  # the job's
    rows: tuple[bytes, ...]


@dataclass(frozen=True)
class Fetching:
    """How far a pull is: what is being done, and bytes of the file at hand where there is one."""

    status: str
    digest: str = ""
    completed: int = 0
    total: int = 0


@dataclass(frozen=True)
class Usage:
    """The last event: tokens over all choices (a prompt shared by n choices counts once), and speeds."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    prompt_seconds: float
    decode_seconds: float
    forced_tokens: int = 0  # of the completion's, those that a grammar left no choice about
    reasoning_tokens: int = 0  # of the completion's, those of thoughts

    def document(self) -> dict[str, Any]:
        total = self.prompt_tokens + self.completion_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens, "total_tokens": total}

    def words(self, first: float | None) -> str:
        """For a log: the tokens, how long the first ones took (seconds), and the speed of the others."""
        told = f"{self.prompt_tokens}+{self.completion_tokens} tokens"
        told += f" ({self.cached_tokens} cached)" if self.cached_tokens else ""
        told += f", first after {first:.3f} s" if first is not None else ""
        fast = self.completion_tokens > 1 and self.decode_seconds > 0
        return told + (f", {(self.completion_tokens - 1) / self.decode_seconds:.1f} tokens/s" if fast else "")

    def timings(self) -> dict[str, float]:
        """Speeds in llama-server's shape: milliseconds, and tokens per second; of our own, how many a grammar forced."""
        told: dict[str, float] = {"cache_n": self.cached_tokens, "forced_n": self.forced_tokens}
        for name, tokens, seconds in (("prompt", self.prompt_tokens - self.cached_tokens, self.prompt_seconds),
                                      ("predicted", self.completion_tokens, self.decode_seconds)):  # fmt: skip
            each, rate = (seconds * 1000 / tokens, tokens / seconds) if tokens and seconds > 0 else (0.0, 0.0)
            told |= {f"{name}_n": tokens, f"{name}_ms": round(seconds * 1000, 3), f"{name}_per_token_ms": round(each, 3),
                     f"{name}_per_second": round(rate, 2)}  # fmt: skip
        return told


@dataclass(frozen=True)
class Tokens:
    """The result of a Tokenize job; no pieces unless they were asked for."""

    id: int  # the job's
    ids: tuple[int, ...]
    pieces: tuple[bytes, ...]


Event = (Queued | Waiting | Text | Thought | CallBegan | CallArguments | ToolResult | ChoiceEnd | Vectors | Tokens | Fetching
         | Usage)  # fmt: skip


TURN_BYTES = MIB  # a body beyond this waits for one of few places to be read and parsed
TURN_SECONDS = 10.0  # for that; a full-sized body takes about 0.1 s to parse
MAX_JSON_VALUES = 1_000_000  # keys count too: about 100 bytes each in memory; 1 MiB of token ids has 200,000


def parse_json(data: bytes, what: str = "The body") -> Any:
    """Strict JSON: UTF-8, no NaN or infinite number, no lone surrogates, MAX_JSON_DEPTH deep, up to MAX_JSON_VALUES values."""
    try:
        source = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{what} is not UTF-8 (byte {error.start})") from None
    _check_nesting(data, what)
    try:
        value = json.loads(source, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{what} is not valid JSON: {error}") from None
    if "\\u" in source:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InvalidRequest(f"{what} holds a lone surrogate, which is not Unicode text") from None
    return value


_NO_MARKS = bytes(set(range(256)) - set(b'"[]{},:'))
_STEPS = bytes.maketrans(b"[{]}", b"\1\1\xff\xff")  # as signed bytes: one level down, one level up
_BLOCK = 1 << 16  # bytes: what is split at once stays small


def _check_nesting(data: bytes, what: str) -> None:
    """Refuses JSON with too many levels or values. One pass of C loops: the worst 16 MiB take 0.4 s."""
    opened = data.count(b"[") + data.count(b"{")
    if opened <= MAX_JSON_DEPTH and opened + data.count(b",") + data.count(b":") < MAX_JSON_VALUES:
        return
    # without escapes every quote begins or ends a string; two in a row cancel out
    marks = data.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NO_MARKS).replace(b'""', b"")
    depth = values = inside = 0
    for start in range(0, len(marks), _BLOCK):
        pieces = marks[start : start + _BLOCK].split(b'"')
        outside = b"".join(pieces[inside::2])
        inside = (inside + len(pieces) - 1) % 2
        steps = memoryview(outside.translate(_STEPS, b",:")).cast("b")
        values += len(outside) - outside.count(b"]") - outside.count(b"}")  # a value follows each "[", "{", "," and ":"
        if max(itertools.accumulate(steps, initial=depth)) > MAX_JSON_DEPTH:
            raise InvalidRequest(f"{what} is nested over {MAX_JSON_DEPTH} levels deep")
        if values > MAX_JSON_VALUES:
            raise InvalidRequest(f"{what} holds over {MAX_JSON_VALUES} values")
        depth += sum(steps)


def _finite(text: str) -> float:
    """A JSON number. One too large would become infinite, and an answer that repeats it no JSON; NaN is none at all."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def parse_object(data: bytes, what: str = "The body") -> dict[str, Any]:
    """A JSON object, as strictly as parse_json."""
    value = parse_json(data, what)
    if not isinstance(value, dict):
        raise InvalidRequest(f"{what} must be a JSON object")
    return value


# ── 3. Models on disk ─────────────────────────────────────────────────────────────────────────────────────────────────
# What is on the disk: GGUF headers, search directories, and the catalog of models found there.


FILE_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
              12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
              19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL",
              26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16",
              36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4"}  # fmt: skip  llama.h, enum llama_ftype
# architectures without a decoder (llama-arch.cpp)
EMBEDDERS = {"bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert", "jina-bert-v2", "jina-bert-v3",
             "eurobert", "gemma-embedding", "llama-embed", "t5encoder"}  # fmt: skip
ENCODER_DECODERS = {"t5"}  # read with one half and write with the other, which nothing here does
DIFFUSERS = {"dream", "llada", "llada-moe", "rnd1"}  # attend in both directions and generate all the same
POOLINGS = {1: "mean", 2: "cls", 3: "last", 4: "rank"}  # llama.h, enum llama_pooling_type; 0 is none, rank a reranker's
SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")
TRASH = re.compile(r"\.Trash|\$RECYCLE\.BIN$", re.I)  # folders of what was thrown away
QUANT_IN_NAME = re.compile(r"(?:^|[-._])((?:I?Q\d[\w]*|BF16|F16|F32|MXFP4\w*))(?=$|[-.])", re.I)
SIZE_IN_NAME = re.compile(r"(?:^|[-_.])(\d+(?:\.\d+)?(?:x\d+(?:\.\d+)?)?[BM])(?=$|[-_.])", re.I)


@dataclass(frozen=True)
class Stored:
    """What a store says of a model beside its file: Ollama's parameters, system message and adapters."""

    engine: Mapping[str, Any] = field(default_factory=dict)  # by field of EngineOptions
    sampling: Mapping[str, Any] = field(default_factory=dict)  # by field of Sampling
    system: str = ""


@dataclass(frozen=True)
class ModelInfo:
    """A model on the disk, as its header describes it; the file name only fills gaps."""

    id: str
    name: str
    path: str
    source: str  # the search directory or store it was found in
    size_bytes: int
    architecture: str
    parameter_count: str | None
    quantization: str | None
    context_length: int | None
    embedding: bool  # it makes vectors or scores, and cannot generate
    pooling: str | None  # how tokens' vectors become one: mean, cls, last; rank: it scores a document for a query
    chat_template: bool | None  # None: not read so far
    description: str
    kv: KvShape | None = None  # None: not known
    stored: Stored = field(default_factory=lambda: Stored())

    def largest_context(self, kv_type: str) -> int | None:
        """The longest context whose KV cache fits the free memory beside the weights; None where nobody knows."""
        free = available_memory()
        if free is None or not self.kv or not self.kv.token_bytes(kv_type):
            return None
        left = free - self.size_bytes - GRAPH_BYTES
        most = max(0, int(left / self.kv.token_bytes(kv_type)) // 256 * 256)
        return min(most, self.context_length or most)

    def refusal(self, use: str) -> str | None:
        """Why the model cannot be used to generate, embed, rank or tokenize; None if it can."""
        if self.architecture in ENCODER_DECODERS:
            return "an encoder-decoder model (T5 and the like), which is not supported"
        if use == "tokenize":
            return None
        kind = "a reranker" if self.pooling == "rank" else "an embedding model" if self.embedding else "a generative model"
        if use == "rank":
            return None if self.pooling == "rank" else f"{kind}; only rerankers rank documents"
        if use == "embed":
            return f"{kind}; it cannot make embeddings (/v1/rerank ranks documents with it)" if self.pooling == "rank" else None
        return f"{kind}; it cannot generate text" if self.embedding else None

    def document(self) -> dict[str, Any]:
        """The model as `/api/models` lists it, without its state."""
        shown = {k: v for k, v in vars(self).items() if k not in ("architecture", "path", "source", "kv", "stored")}
        return shown | {"model_type": self.architecture}


def describe(header: GgufHeader, path: str, id: str, source: str, size: int) -> ModelInfo:
    """The ModelInfo of a header, its texts printable and short."""
    meta, stem = header.metadata, SHARD.sub("", pathlib.Path(path).stem)
    architecture = str(meta.get("general.architecture") or "unknown")
    quantization = FILE_TYPES.get(meta.get("general.file_type", -1)) or _in_name(QUANT_IN_NAME, stem)
    context = meta.get(f"{architecture}.context_length")
    name, shown = printable(str(meta.get("general.name") or stem)), printable(architecture)
    return ModelInfo(
        id=id, name=name, path=path, source=source, size_bytes=size, architecture=shown,
        parameter_count=_parameter_count(header) or _in_name(SIZE_IN_NAME, stem), quantization=quantization,
        context_length=context if isinstance(context, int) else None,
        embedding=_is_embedding(meta, architecture), pooling=POOLINGS.get(meta.get(f"{architecture}.pooling_type", 0)),
        chat_template="tokenizer.chat_template" in meta if header.complete else None,
        description=printable(str(meta.get("general.description") or f"{name} ({shown})")),
        kv=kv_shape(meta, architecture),
    )  # fmt: skip


def _in_name(pattern: re.Pattern[str], stem: str) -> str | None:
    return next(iter(pattern.findall(stem)), "").upper() or None


def _parameter_count(header: GgufHeader) -> str | None:
    """As stated, else as labelled, else summed over the tensors."""
    stated, label = header.metadata.get("general.parameter_count"), header.metadata.get("general.size_label")
    if isinstance(stated, int) and stated:
        return human_count(stated)
    if label:
        return printable(str(label))
    return human_count(header.parameters) if header.complete else None


def _is_embedding(meta: Mapping[str, Any], architecture: str) -> bool:
    """Encoders, and decoders turned into embedders or rerankers: they pool, or attend in both directions."""
    pooling, causal = meta.get(f"{architecture}.pooling_type"), meta.get(f"{architecture}.attention.causal")
    pools = architecture in EMBEDDERS or (isinstance(pooling, int) and pooling > 0)
    return pools or (causal is False and architecture not in DIFFUSERS)


def refuse_other_kinds(header: GgufHeader) -> None:
    """Raises GgufError for GGUF files that are not models: projectors, adapters, vocabularies, later shards."""
    meta, architecture = header.metadata, str(header.metadata.get("general.architecture"))
    kind = str(meta.get("general.type") or "model")
    reasons = {
        "a projector (mmproj), not a model": architecture == "clip" or kind == "mmproj",
        "a LoRA adapter, not a model": kind == "adapter" or "adapter.type" in meta,
        "an importance matrix, not a model": "imatrix" in (kind, architecture),
        "a later shard; the first one stands for the set": meta.get("split.no"),
        "a vocabulary only, without weights": header.tensor_count == 0 and not meta.get("split.count"),
    }
    for reason in (reason for reason, holds in reasons.items() if holds):
        raise GgufError(reason)


BOX = os.path.join(os.path.dirname(os.path.realpath(__file__)), "models")  # beside this file


@dataclass(frozen=True)
class SearchRoot:
    """A place to look for models: a tree of `depth` levels, or a store of Ollama's."""

    path: str
    source: str
    depth: int = MAX_SCAN_DEPTH
    ollama: bool = False


def search_roots(explicit: Seq[str], base: str | None) -> list[SearchRoot]:
    """Every place to look in, in the order that decides `default`; each directory once."""
    env = os.environ.get
    places: dict[str, Iterable[str | None]] = {
        "--models-dir": explicit,
        "SHIMMY_MODEL_PATHS": re.split(f"[;{os.pathsep}]", env("SHIMMY_MODEL_PATHS", "")),
        "SHIMMY_BASE_GGUF": [os.path.dirname(os.path.abspath(os.path.expanduser(base)))] if base else [],
        "./models": ["models"],
        "~/models": ["~/models"],
        "huggingface": hub_caches(),
        "llama.cpp": [env("LLAMA_CACHE"), "~/.cache/llama.cpp", "~/Library/Caches/llama.cpp",
                      env("LOCALAPPDATA") and os.path.join(env("LOCALAPPDATA", ""), "llama.cpp")],
        "lm-studio": ["~/.lmstudio/models", "~/.cache/lm-studio/models"],
        "ollama": [env("OLLAMA_MODELS"), "~/.ollama/models", "/usr/share/ollama/.ollama/models"],
        "beside shimmy.py": [BOX],
    }  # fmt: skip
    unique: dict[str, SearchRoot] = {}
    for source, path in ((source, path) for source, paths in places.items() for path in paths if path):
        path = os.path.abspath(os.path.expanduser(path))
        root = SearchRoot(path, source, 0 if source == "SHIMMY_BASE_GGUF" else MAX_SCAN_DEPTH, source == "ollama")
        first = unique.setdefault(os.path.realpath(path), root)
        unique[os.path.realpath(path)] = replace(first, depth=max(first.depth, root.depth))
    return list(unique.values())


def hub_home() -> str:
    """Where the tools of the Hugging Face hub keep their things."""
    env = os.environ.get
    return os.path.expanduser(env("HF_HOME") or os.path.join(env("XDG_CACHE_HOME") or "~/.cache", "huggingface"))


def hub_caches() -> list[str]:
    """The hub's caches, the one that is written to first."""
    own = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    places = (own, os.path.join(hub_home(), "hub"), "~/.cache/huggingface/hub")
    return [os.path.expanduser(place) for place in places if place]


@dataclass(frozen=True)
class ScanReport:
    """The result of a scan: models in order, skipped files with reasons, and the models of each directory."""

    models: tuple[ModelInfo, ...] = ()
    skipped: tuple[dict[str, str], ...] = ()
    directories: tuple[dict[str, Any], ...] = ()
    began: float = -math.inf  # time.monotonic()


def _walk(root: SearchRoot, notes: list[str]) -> Iterator[tuple[str, str, Stored]]:
    """Paths of .gguf files in a tree, with their stems; bounded in depth and entries; a symlink loop does no harm.

    The root may be a file itself. `notes` are told what could not be read, and where the walk stopped.
    """
    if os.path.isfile(root.path):
        yield root.path, pathlib.Path(root.path).stem, Stored()
        return

    def failed(error: OSError) -> None:
        if error.filename != root.path or not isinstance(error, FileNotFoundError):
            notes.append(f"{error.filename}: {error.strerror or error}")

    seen: set[str] = set()
    entries = 0
    for folder, folders, files in os.walk(root.path, onerror=failed, followlinks=True):
        entries += len(folders) + len(files)
        if entries > MAX_SCAN_ENTRIES:
            notes.append(f"stopped after {MAX_SCAN_ENTRIES} entries")
            return
        folders[:] = sorted(f for f in folders if root.depth and not TRASH.match(f))
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        if folders and folder.removeprefix(root.path).count(os.sep) >= root.depth:
            notes.append(f"stopped {root.depth} levels down")
            folders.clear()
        for name in sorted(files):
            if name.lower().endswith(".gguf"):
                yield os.path.join(folder, name), name[:-5], Stored()


def _walk_ollama(root: SearchRoot, notes: list[str]) -> Iterator[tuple[str, str, Stored]]:
    """The same of Ollama's store: manifests/HOST/NAMESPACE/MODEL/TAG is JSON whose model layer names a blob."""
    store = pathlib.Path(root.path)
    for manifest in sorted(itertools.islice(store.glob("manifests/*/*/*/*"), MAX_SCAN_ENTRIES)):
        try:
            model, stored = read_manifest(manifest, store / "blobs")
        except (GgufError, OSError, ValueError, ApiError) as error:
            notes.append(f"{manifest}: {error}")
            continue
        if model:
            yield model, f"{manifest.parent.name}:{manifest.name}", stored


# Ollama's names of what is decided at a model's load
OLLAMA_ENGINE = {"num_ctx": "ctx", "num_gpu": "gpu_layers", "num_thread": "threads", "num_batch": "batch"}


def read_manifest(manifest: pathlib.Path, blobs: pathlib.Path) -> tuple[str | None, Stored]:
    """The file of an Ollama model, and what its store says of it.

    Raises ValueError for a digest that is not 64 hex digits: it becomes a path. GgufError, OSError, ValueError and ApiError
    for files and parameters that make no sense.
    """
    paths: dict[str, list[str]] = {}  # by the last word of a layer's type: model, params, system, adapter …
    for _, layer in listed("layers", parse_object(read_blob(str(manifest)), "the manifest").get("layers") or []):
        kind, digest = str(layer.get("mediaType")), re.fullmatch(r"sha256:([0-9a-f]{64})", str(layer.get("digest")))
        if kind.startswith("application/vnd.ollama.image."):
            if not digest:
                raise ValueError("the manifest's digest is malformed")
            paths.setdefault(kind.rpartition(".")[2], []).append(str(blobs / f"sha256-{digest[1]}"))
    params: dict[str, Any] = {}
    for path in paths.get("params", ()):
        params |= parse_object(read_blob(path), "the parameters")
    sampling, engine = ollama_sampling({"options": params}), ollama_engine({"options": params})
    if "adapter" in paths:
        engine["lora"] = tuple(paths["adapter"])
    system = "".join(read_blob(path).decode("utf-8", "replace") for path in paths.get("system", ())[-1:])
    stored = Stored(engine, {k: v for k, v in vars(sampling).items() if v != getattr(Sampling(), k)}, system)
    return next(iter(paths.get("model", ())), None), stored


def read_blob(path: str) -> bytes:
    """The first MiB of a regular file."""
    with open_regular(path) as file:
        return file.read(MIB)


MAX_MODEL_NAME = 512  # characters; file names end at 255 bytes, Ollama's are two of them


def plain_id(label: str) -> str:
    """A file's stem as a model id: lower-case, without the shard number, `-` for spaces, `_` and what does not print."""
    import unicodedata  # macOS hands out names whose accents stand by themselves

    label = unicodedata.normalize("NFC", SHARD.sub("", label))
    spelled = "".join(c if c.isprintable() else " " for c in label)
    return re.sub(r"[\s_]+", "-", spelled.strip().lower())


def is_boxed(model: ModelInfo) -> bool:
    """True for the model that comes with shimmy."""
    name = os.path.basename(model.path)  # asked of each model in each scan: a name is compared sooner than files
    return name == "shimmy-tiny.gguf" and os.path.dirname(os.path.realpath(model.path)) == BOX


class Catalog:
    """The models on the disk. Any thread may scan or ask; what was read of a file is kept while that is unchanged."""

    def __init__(self, roots: Seq[SearchRoot], files: Seq[str] = ()) -> None:
        self.roots, self.files = roots, files
        self.report = ScanReport()
        self._scanning = threading.Lock()
        self._read: dict[tuple[Any, ...], ModelInfo | str] = {}  # or why it is none, by path, sizes and times
        self._ids: dict[str, str] = {}  # path to id: an id stays with its file for the server's life

    def scan(self, age: float = 0.0) -> ScanReport:
        """Looks at the disk, unless a scan has that began at most `age` seconds ago: one serves all who wait for it.

        A rescan costs a stat for each unchanged file.
        """
        oldest = time.monotonic() - age
        with self._scanning:
            if self.report.began <= oldest:
                self.report = self._look(time.monotonic())
            return self.report

    def _look(self, began: float) -> ScanReport:
        deadline = time.thread_time() + SCAN_DETAIL_SECONDS
        models: dict[tuple[int, ...], ModelInfo] = {}  # by device and inode: the same file reached twice is one model
        skipped: dict[str, str] = {}  # reason by path
        directories: list[dict[str, Any]] = []
        for root in (*(SearchRoot(file, "--model") for file in self.files), *self.roots):
            notes: list[str] = []
            before = len(models)
            for path, label, stored in (_walk_ollama if root.ollama else _walk)(root, notes):
                stamp = _stamp(path)
                if stamp and stamp[:2] in models:
                    continue
                result = self._examine(path, root.source, label, time.thread_time() < deadline)
                if stamp and isinstance(result, ModelInfo):
                    models[stamp[:2]] = replace(result, stored=stored)
                else:
                    skipped.setdefault(path, str(result))
            directories.append({"path": root.path, "source": root.source, "exists": os.path.isdir(root.path),
                                "models": len(models) - before,
                                "notes": list(dict.fromkeys(printable(note, 400) for note in notes))})  # fmt: skip
        # the model that comes with shimmy stands last, unless it was asked for by path
        ordered = sorted(models.values(), key=lambda m: is_boxed(m) and m.source != "--model")
        reasons = ({"path": path, "reason": reason} for path, reason in skipped.items())
        return ScanReport(tuple(ordered), tuple(reasons), tuple(directories[len(self.files) :]), began)

    def _examine(self, path: str, source: str, label: str, whole_header: bool, anew: bool = False) -> ModelInfo | str:
        """The file's ModelInfo, or why it is none; remembered while it and the others of its set stay as they are."""
        key = (path, *map(_stamp, shard_paths(path)))
        known = self._read.get(key)
        if known is None or anew:
            known = self._read[key] = self._describe(path, source, label, whole_header)
        return known

    def _describe(self, path: str, source: str, label: str, whole_header: bool) -> ModelInfo | str:
        deadline = time.thread_time() + HeaderReader.SECONDS
        try:
            header = read_gguf_header(path, whole_header, deadline)
            refuse_other_kinds(header)
            # a merged file may still be named like a shard
            paths = shard_paths(path) if header.metadata.get("split.count", 1) > 1 else [path]
            if missing := [os.path.basename(part) for part in paths if not os.path.exists(part)]:
                raise GgufError(f"incomplete shard set: {', '.join(missing)} missing")
            size = sum(map(os.path.getsize, paths))
            if whole_header:
                parameters = (read_gguf_header(part, deadline=deadline).parameters for part in paths[1:])
                header = replace(header, parameters=header.parameters + sum(parameters))
            return describe(header, path, self._id_for(path, label), source, size)
        except (GgufError, OSError, ValueError, TypeError, ArithmeticError, MemoryError) as error:
            # damage of any kind is this file's reason, never the end of a scan
            return printable((error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__)

    def _id_for(self, path: str, label: str) -> str:
        """The file's id; a second one of the same name gets a suffix made from its path, which never changes."""
        if path not in self._ids:
            id, taken = plain_id(label) or "model", set(self._ids.values())
            if id in taken or id == "default":
                import hashlib

                id += "-" + hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:6]
            self._ids[path] = id
        return self._ids[path]

    def why_skipped(self, name: str, may_be_path: bool = False) -> str:
        """": " and the reason, if a file of that name, or at that path, was skipped; else nothing."""
        skipped, path = self.report.skipped, os.path.realpath(os.path.expanduser(name)) if may_be_path else None
        found = [s["reason"] for s in skipped if path and os.path.realpath(s["path"]) == path]
        found += [s["reason"] for s in skipped if plain_id(pathlib.Path(s["path"]).stem) == plain_id(name)]
        return f": {found[0]}" if found else ""

    def whole(self, model: ModelInfo) -> ModelInfo:
        """The model with all its header tells; what could not be read stays as it was."""
        result = self._examine(model.path, model.source, model.id, whole_header=True, anew=True)
        return replace(result, stored=model.stored) if isinstance(result, ModelInfo) else model


def shard_paths(path: str) -> list[str]:
    """Every file of the set that `path` begins; [path] for a model in one file."""
    stem, suffix = os.path.splitext(path)
    shard = SHARD.search(stem)
    if not shard:
        return [path]
    return [f"{stem[: shard.start()]}-{i:05d}-of-{shard[2]}{suffix}" for i in range(1, min(int(shard[2]), 999) + 1)]


def _stamp(path: str) -> tuple[int, ...] | None:
    """Device and inode of a file, its size and time; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


# ── 4. Chat ───────────────────────────────────────────────────────────────────────────────────────────────────────────
# What the model reads and writes: messages to a prompt by the model's own template, its text back to thoughts, tool calls
# and content. Templates come from downloaded files, so they run in a helper process that can be killed.

CHATML = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}
<tool_call>
{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CHATML_MARKS = ("<|im_end|>", "<|im_start|>")

TOOLS_IN_SYSTEM = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{signatures}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""

NONCHARACTERS = [chr(c) for c in range(0xFDD0, 0xFDF0)]  # never text; one of them marks where a prompt is cut


# How a family writes thoughts and calls

ID, ANY, KEY = NONCHARACTERS[-3:]  # placeholders in a CallFormat: a call's id, text that varies, a parameter's name
MARKER = re.compile(r"<[^<>\s]*>?|\[/?[A-Z][A-Z_ ]*\]|\s+|\w+|`+|.", re.S)  # what text between calls is made of


@dataclass(frozen=True)
class Params:
    """Arguments as separate parameters: opens NAME keyed VALUE closes; `quote` delimits strings, if anything does."""

    opens: str
    keyed: str
    closes: str
    quote: str = ""


@dataclass(frozen=True)
class CallFormat:
    """How one family writes tool calls: opens NAME named ARGUMENTS, then `again` and the next call, or `closes`.

    With `keys`, `head` stands before each name and begins a JSON object, which has the name and the arguments under these
    two keys (no keys: the name is itself the key of the arguments). With `params` the arguments stand one by one, else they
    are a JSON object.
    """

    opens: str
    named: str
    closes: str
    again: str = ""  # "": one call a turn, or each opens anew
    head: str = ""
    keys: tuple[str, str] | None = None
    params: Params | None = None

    @functools.cached_property
    def call_opens(self) -> str:
        """The text that begins each call, without the section's marker before the first."""
        return common_suffix(self.opens, self.again) if self.again else self.opens

    @functools.cached_property
    def closers(self) -> frozenset[str]:
        """The pieces of text that may stand between two calls, and behind the last."""
        ends = [self.again.removesuffix(self.call_opens), self.closes]
        if self.keys:  # behind the arguments may stand other pairs, and the object may stand in a list
            ends = [*(text[text.find("}") :] for text in ends), "]"]
        return frozenset(p for p in MARKER.findall("".join(ends)) if not p.isspace())

    @functools.cached_property
    def known_keys(self) -> tuple[set[str], set[str], set[str]]:
        """Keys of a call's name, of its arguments, and of the object that these two may stand in."""
        name, arguments = self.keys or ("", "")
        return {name, "name"}, {arguments, "arguments", "parameters"}, {"function", *re.findall(r'"(\w+)":\s*\{', self.head)}

    @functools.cached_property
    def beginnings(self) -> tuple[str, ...]:
        """How the first call of a section begins, and how each does: some models leave the section's marker out."""
        blank = "[ \n" if self.keys else ""
        found = (opens.lstrip().rstrip(blank) for opens in (self.opens, self.call_opens))
        return tuple(dict.fromkeys(opens for index, opens in enumerate(found) if opens or not index))

    @functools.cached_property
    def marks(self) -> tuple[str, ...]:
        """The text to look for at each of these beginnings; none where a call has no marker."""
        return tuple(re.split(rf"\s*\n|[{ID}{ANY}]", opens)[0] for opens in self.beginnings)


HERMES = CallFormat("<tool_call>\n", '", "arguments": ', "}\n</tool_call>", head='{"name": "', keys=("name", "arguments"),
                    again="}\n</tool_call>\n<tool_call>\n")  # fmt: skip


@dataclass(frozen=True)
class ChatFormat:
    """How a family of models writes thoughts and tool calls; `drops` is other markup around its text."""

    thought: tuple[str, str] = ("<think>", "</think>")
    calls: tuple[CallFormat, ...] = (HERMES,)
    drops: tuple[str, ...] = ()
    thought_field: str = THOUGHT_FIELDS[0]  # of a message, in which the template looks for its thought


# Overrides for what cannot be derived, keyed by a text that only this family's templates hold.
FAMILIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("<|channel|>analysis<|message|>", {  # gpt-oss: the model's own order differs from the template's
        "thought": ("<|channel|>analysis<|message|>", "<|end|>"),
        "calls": (CallFormat("to=functions.", f"<|channel|>{ANY}<|message|>", "<|call|>"),
                  CallFormat("<|channel|>commentary to=functions.", f"{ANY}<|message|>", "<|call|>")),
        "drops": ("<|start|>assistant", "<|channel|>final<|message|>", "<|channel|>commentary<|message|>", "<|end|>"),
    }),
    ("end_of_msg", {  # Kimi K3: every part of a message has such a pair
        "thought": ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
        "drops": ("<|open|>response<|sep|>", "<|close|>response<|sep|>", "<|close|>message<|sep|>", "<|sep|>"),
    }),
    ("<|begin|>assistant", {"drops": ("<|begin|>assistant", "<|content|>", "<|end|>")}),  # Solar
    ("<atem:function_calls>", {  # Muse: the name stands twice
        "thought": ("to=self<|message|>", "<|eom|>"),
        "calls": (CallFormat("to=", f'<|message|><atem:function_calls>\n<atem:invoke name="{ANY}">',
                             "\n</atem:invoke>\n</atem:function_calls>",
                             params=Params('\n<atem:parameter name="', '">', "</atem:parameter>")),),
        "drops": ("<|eom|>", "<|start|>assistant"),
    }),
    (">>>all", {"drops": (">>>all\n",)}),  # Functionary 3.2: whom each part of an answer is for
    ("Here are my reasoning steps:", {"thought": ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]")}),  # Apriel
    ("[THINK]", {"thought": ("[THINK]", "[/THINK]")}),  # Mistral: a part of the content
    ("<|channel>thought", {"thought": ("<|channel>thought", "<channel|>")}),  # Gemma 4
    ("<|START_THINKING|>", {"thought": ("<|START_THINKING|>", "<|END_THINKING|>")}),  # Cohere
    ("List of tools: ", {  # LFM 2: a call is content to its template
        "calls": (CallFormat("<|tool_call_start|>[", "(", ")]<|tool_call_end|>", "), ", params=Params("", "=", ", ", "'")),),
    }),
)  # fmt: skip


def common_prefix(a: str, b: str) -> str:
    """The common prefix of two texts, in whole pieces."""
    pairs = zip(MARKER.findall(a), MARKER.findall(b), strict=False)
    return "".join(x for x, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def common_suffix(a: str, b: str) -> str:
    """The common suffix of two texts, in whole pieces."""
    pairs = zip(reversed(MARKER.findall(a)), reversed(MARKER.findall(b)), strict=False)
    return "".join(reversed([x for x, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]))


@dataclass(frozen=True)
class ChatFacts:
    """The part of what an engine says of its model that chats need."""

    templates: Mapping[str, str]  # by name; "" is the usual one
    bos: str  # what the token that begins a text is called, for templates that write it
    adds_bos: bool  # the tokenizer puts it first by itself
    eos: str
    specials: tuple[str, ...]  # names of control and marker tokens
    ends: tuple[str, ...] = ()  # of those, the ones that end a turn
    fim: Mapping[str, str] = field(default_factory=dict)  # of those, the ones that mark a gap to fill: pre, suf, mid, rep, sep


class Chat:
    """One model's way to chat: messages to prompt segments, its text to events.

    A segment is tokenized by itself, special tokens and all. A special token's name in a client's text is split over two
    segments, so that only the template's own text can become special tokens.
    """

    def __init__(self, facts: ChatFacts, helpers: Helpers) -> None:
        self.facts, self._helpers = facts, helpers
        self._format: ChatFormat | None = None  # once it is derived
        self._attempts = 0  # to derive it that failed
        self._templates = dict(facts.templates) or {"": CHATML}
        self._names = SpecialNames(facts.specials)
        self.stops = () if facts.templates else tuple(m for m in CHATML_MARKS if m not in facts.specials)

    def prompt(self, request: GenerateRequest) -> tuple[str, ...]:
        """The prompt's segments. Raises InvalidRequest when the template refuses the messages, or runs away."""
        messages = without_noise(request.messages or ())
        for message in messages:
            if THOUGHT_FIELDS[0] in message:
                message[self.format.thought_field] = message.pop(THOUGHT_FIELDS[0])
        begun = messages.pop() if continues(request) else None
        said: list[Any] = [list(request.tools), dict(request.template_args)]
        mark = unused_in([messages, said, begun])
        messages, said = [self._guard(m, mark, m["role"] == "assistant") for m in messages], self._guard(said, mark)
        begun = begun and self._guard(begun, mark, True)
        rendering = Rendering(self._templates, self.facts.bos, self.facts.eos, messages, *said)
        rendered = self._render(rendering)
        segments = self._continued(rendering, rendered, begun) if begun else [rendered]
        if self.facts.adds_bos and self.facts.bos and segments[0].startswith(self.facts.bos):
            segments[0] = segments[0][len(self.facts.bos) :]  # the tokenizer adds it, once
        return tuple(part for segment in segments for part in segment.split(mark))

    def _continued(self, rendering: Rendering, rendered: str, begun: dict[str, Any]) -> list[str]:
        """The segments of a prompt that ends with an answer that has begun.

        It stands where the template would write it: behind what it writes before the content of such a turn, and behind a
        thought's end where a thought is open.
        """
        opens, closes = self.format.thought
        content, is_open = begun["content"], rendered.rstrip().endswith(opens)
        if begins_thought(content, self.format):  # whether it ends or not
            behind = content.lstrip().removeprefix(opens)
            return [rendered, content if not is_open else behind.lstrip("\n") if rendered.endswith("\n") else behind]
        place = unused_in([rendering.messages, begun, rendered])
        turn, thought = {**begun, "content": place}, begun.get(self.format.thought_field)
        with contextlib.suppress(InvalidRequest):  # some templates take no such turn at the end
            whole = self._render(replace(rendering, messages=[*rendering.messages, turn], generation=False))
            before = whole[: whole.rfind(place)] if place in whole else ""
            if before and (not thought or thought in before) and (not is_open or before.count(closes) > rendered.count(closes)):
                return [before, content]
        thought_before = f"{'' if is_open else opens}\n{thought or ''}\n{closes}\n\n" if is_open or thought else ""
        return [rendered, thought_before + content]

    def infill(self, gap: Infill) -> tuple[tuple[str, ...], int]:
        """The segments that ask for a gap's text, and how many of the first ones may be left out.

        The order is llama-server's: other files, each behind its name, then prefix and suffix. Raises InvalidRequest for
        a model that has not learned to fill gaps.
        """
        fim = self.facts.fim
        if not {"pre", "suf", "mid"} <= fim.keys():
            raise InvalidRequest("model: it has no tokens for a prefix and a suffix, so it cannot fill a gap", "model")
        mark = unused_in([gap.prefix, gap.suffix, gap.extra])
        extra = [("rep", "myproject\n")] if "rep" in fim and gap.extra else []
        extra += [("sep", f"{name}\n{text}" if "sep" in fim else f"\n\n--- snippet ---\n\n{text}") for name, text in gap.extra]
        extra += [("sep", "filename\n")] if "sep" in fim and gap.extra else []
        first = self._apart(extra, mark)
        return (*first, *self._apart([("pre", gap.prefix), ("suf", gap.suffix), ("mid", "")], mark)), len(first)

    def _apart(self, parts: Seq[tuple[str, str]], mark: str) -> list[str]:
        """Tokens that mark a gap, each with a client's text behind it, in which names of special tokens are split."""
        segments: list[str] = []
        for token, text in parts:
            segments += [self.facts.fim[token]] if token in self.facts.fim else []
            segments += self._guard(text, mark).split(mark)
        return [segment for segment in segments if segment]

    def _render(self, rendering: Rendering) -> str:
        try:
            return str(self._helpers.run(rendering))
        except HelperFailed as error:
            raise InvalidRequest(f"messages do not fit the model's chat template: {error}", "messages") from None

    def _guard(self, value: Any, mark: str, assistant: bool = False) -> Any:
        """The value with every special token's name split by `mark`; an assistant's own thought markers stay whole."""
        if isinstance(value, dict):
            return {self._guard(k, mark): self._guard(v, mark, assistant) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._guard(v, mark, assistant) for v in value]
        if not isinstance(value, str):
            return value
        return self._names.split(value, mark, keep=self.format.thought if assistant else ())

    def parser(self, request: GenerateRequest, last: Seq[Any], index: int) -> Parser:
        """Makes the parser of choice `index`. Behind a prompt that ends inside a thought it begins in that."""
        if not request.split_markers:
            return Parser(index)
        schemas = {t["function"]["name"]: t["function"].get("parameters") or {} for t in request.tools}
        hidden = frozenset(self.facts.specials) - self.markers
        forced = request.tool_choice not in ("auto", "none")
        thinking = self._is_thinking(request, str(last[0]))
        return ChatParser(index, self.format, schemas, str(last[0]), hidden, continues(request), forced, thinking)

    def thought_budget(self, request: GenerateRequest, last: Seq[Any]) -> ThoughtBudget | None:
        """How long the answer may think, if the request says so."""
        if request.thinking_budget is None:
            return None
        return ThoughtBudget(*self.format.thought, request.thinking_budget, self._is_thinking(request, str(last[0])))

    def _is_thinking(self, request: GenerateRequest, last: str) -> bool:
        """Whether the prompt ends inside a thought, which it opens itself or which an answer that has begun does not close."""
        opens, closes = self.format.thought
        said = (request.messages or ({},))[-1].get("content", "") if continues(request) else ""
        return last.rstrip().endswith(opens) or (begins_thought(said, self.format) and closes not in said)

    def constraint(self, request: GenerateRequest, last: Seq[Any]) -> Constraint | None:
        """Constrains the answer to the calls or the schema that were asked for, behind a thought that the prompt has begun.

        `last` is the prompt's last segment, as for the parser.
        """
        named = request.tool_choice.removeprefix("function:") if request.tool_choice.startswith("function:") else None
        forced = request.tool_choice == "required" or named is not None
        tools = [t for t in request.tools if named in (None, t["function"]["name"])]
        calls = self.format.calls[0]
        one = not request.parallel_tool_calls and request.sampling.constraint is None
        if not tools or request.tool_choice == "none" or not (forced or one):
            return self._schema(request, str(last[0]))
        mark = calls.marks[0]
        if not forced:  # the first call is the only one
            symbol = calls_symbol(calls, tools, mark, False)
            return Constraint(symbol, "parallel_tool_calls", mark, self.markers) if mark else None
        opened = calls.opens if calls.opens.strip() and str(last[0]).endswith(calls.opens) else ""
        thought, after = self._thought_first(request, str(last[0]))
        many = request.parallel_tool_calls and named is None
        symbol = calls_symbol(calls, tools, opened, many)
        return Constraint(InOrder((*thought, symbol)), "tool_choice", after, self.markers)

    def _schema(self, request: GenerateRequest, last: str) -> Constraint | None:
        """The schema or grammar that was asked for: behind the thought, and where functions are offered a call instead.

        A client's own grammar says itself what stands beside it.
        """
        wanted, (thought, after) = request.sampling.constraint, self._thought_first(request, last)
        if wanted is None or wanted.param == "grammar":
            return wanted and replace(wanted, after=after, markers=self.markers | wanted.markers)
        grammar = wanted.grammar
        if continues(request) and after is None and (request.messages or ())[-1]["content"]:
            begun = (request.messages or ())[-1]["content"]
            if begins_thought(begun, self.format):
                begun = begun.partition(self.format.thought[1])[2].lstrip()
            grammar = RestOf(grammar, begun.encode(), wanted.param)
            read_soon(grammar)
            return replace(wanted, markers=self.markers, grammar=grammar)
        if request.tools and request.tool_choice != "none":
            calls = calls_symbol(self.format.calls[0], request.tools, "", request.parallel_tool_calls)
            grammar = AnyOf((calls, grammar))
        return replace(wanted, after=after, markers=self.markers, grammar=InOrder((*thought, grammar)))

    def _thought_first(self, request: GenerateRequest, last: str) -> tuple[Symbols, str | None]:
        """Symbols of a thought before the text that a grammar wants, and the marker behind which the grammar begins."""
        end, (opens, closes) = last.rstrip(), self.format.thought
        blanks = Repeated(OneChar(((0x0A, 0x0A), (0x20, 0x20))), 0, 2)
        if self._is_thinking(request, last):
            return (blanks,), closes
        if continues(request):
            return (), None
        # Qwen 3: the model itself begins a thought, or not; models without the switch would wander off into one
        may_think = any(opens in t and "enable_thinking" in t for t in self._templates.values())
        if may_think and not end.endswith(closes):
            thought = InOrder((word(opens), Repeated(anything_but(closes)), word(closes), blanks))
            return (Repeated(thought, 0, 1),), None
        return (), None

    @property
    def format(self) -> ChatFormat:
        """How the model writes thoughts and calls."""
        if self._format is None:
            derivation = Derivation(self._templates, self.facts.bos, self.facts.eos, self.facts.ends)
            try:
                self._format = self._helpers.run(derivation)
            except HelperFailed:  # a slow moment, or a template that runs away, which costs seconds each time
                self._attempts += 1
                self._format = ChatFormat() if self._attempts == 3 else None
        return self._format or ChatFormat()

    @property
    def markers(self) -> frozenset[str]:
        """Names of the special tokens that the parser must see."""
        calls = (f"{c.opens}{c.head} {c.named} {c.again} {c.closes} {c.params}" for c in self.format.calls)
        text = " ".join([*self.format.thought, *self.format.drops, *calls])
        return frozenset(text[start:end] for start, end in self._names.spans(text))


def begins_thought(content: str, format: ChatFormat) -> bool:
    """Whether an answer that has begun begins with a thought."""
    return content.lstrip().startswith(format.thought[0])


def continues(request: GenerateRequest) -> bool:
    """Whether the answer goes on where the last message, the assistant's, stops."""
    last = request.messages[-1] if request.messages and len(request.messages) > 1 else {"role": "user"}
    return last["role"] == "assistant" and not last.get("tool_calls") and request.continue_final_message is not False


def without_noise(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages without Claude Code's first system line, which differs in each request: the rest is cached then."""
    kept = [dict(m) for m in messages]
    if kept and kept[0]["role"] == "system" and kept[0]["content"].startswith("x-anthropic-billing-header"):
        kept[0]["content"] = kept[0]["content"].partition("\n")[2].lstrip("\n")
        kept = kept if kept[0]["content"] else kept[1:]
    return kept


def unused_in(said: Any) -> str:
    """A character that stands nowhere in what a client said. Raises InvalidRequest where there is none."""
    text = json.dumps(said, ensure_ascii=False)
    mark = next((c for c in NONCHARACTERS if c not in text), None)
    if mark is None:
        raise InvalidRequest("messages may not hold every Unicode noncharacter (U+FDD0 to U+FDEF)", "messages")
    return mark


class SpecialNames:
    """Finds the names of special tokens in text, in time linear in the text: some vocabularies have 6,000 of them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(n for n in names if len(n) > 1)
        self._lengths: dict[str, list[int]] = {}  # by a name's first two characters, longest first
        for start, length in sorted({(n[:2], len(n)) for n in self._names}, reverse=True):
            self._lengths.setdefault(start, []).append(length)
        starts = "|".join(map(re.escape, self._lengths))
        self._start = re.compile(f"(?={starts})" if starts else r"(?!)")

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Where names stand, the longest one at each place, from left to right without overlap."""
        end = 0
        for found in self._start.finditer(text):
            at = found.start()
            if at < end:
                continue
            length = next((n for n in self._lengths[text[at : at + 2]] if text[at : at + n] in self._names), 0)
            if length:
                end = at + length
                yield at, end

    def split(self, text: str, mark: str, keep: Seq[str] = ()) -> str:
        """The text with `mark` behind the first character of each name that is not to be kept."""
        parts, done = [], 0
        for at, end in self.spans(text):
            if text[at:end] not in keep:
                parts += [text[done : at + 1], mark]
                done = at + 1
        return "".join([*parts, text[done:]])


# Rendering, in a helper process


class HelperFailed(Exception):
    """A helper's task failed, or broke its bounds: the message says why."""


PROCESSOR_TIMER = getattr(signal, "ITIMER_PROF", None)  # its signal ends a helper though the server may be dead; not on Windows


class Helper:
    """One helper process. Owned by whoever took it from Helpers."""

    def __init__(self) -> None:
        self.process, reader, writer = start_child("helper_main")
        self._pipe = Pipe(reader, writer)

    def run(self, task: Any) -> tuple[Any, str | None]:
        """The task's value, or why it has none. Raises HelperFailed when it ended or outlived the process, Overloaded when it
        had no time."""
        timer = threading.Timer(HELPER_SECONDS * (HELPER_PATIENCE if PROCESSOR_TIMER is not None else 1), self.process.kill)
        timer.daemon = True
        try:
            timer.start()
        except RuntimeError as error:
            raise Overloaded(f"The system starts no more threads ({error})") from None
        try:
            self._pipe.send(task)
            value, complaint = self._pipe.receive()
            return value, complaint
        except Exception:  # a process's border: it died, or what it says cannot be read
            was_late = timer.finished.is_set()
            with contextlib.suppress(Exception):
                self.process.wait(1.0)
            if was_late and PROCESSOR_TIMER is not None:  # the process counts its own time, and ends with that
                raise Overloaded("The machine is too busy to apply the model's chat template") from None
            if was_late or self.process.returncode == -getattr(signal, "SIGPROF", 256):
                raise HelperFailed(f"it takes over {HELPER_SECONDS:g} seconds") from None
            raise HelperFailed("it ended the process that ran it") from None
        finally:
            timer.cancel()
            timer.join()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._pipe.end()


class Helpers:
    """Runs work on what may be hostile where a runaway costs only its own request: bounded in time and memory, then killed.

    Processes are kept for the next task; MAX_HELPERS run at once, so that a few that run away leave room for the others.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Helper] = []
        self._free = threading.BoundedSemaphore(MAX_HELPERS)
        self._closed = False

    def warm(self) -> None:
        """Starts a process unless one waits: its start then overlaps with a model's load."""
        with contextlib.suppress(Overloaded):  # whoever needs it tells
            self._keep(self._take())

    def run(self, task: Any) -> Any:
        """The value of `task.run()` in a helper. Raises HelperFailed with the reason, Overloaded when all stay busy."""
        if not self._free.acquire(timeout=HELPER_SECONDS * 4):
            raise Overloaded(f"{MAX_HELPERS} chat templates take long at once")
        try:
            helper = self._take()
            try:
                value, complaint = helper.run(task)
            except BaseException:
                helper.end()
                raise
            self._keep(helper)
        finally:
            self._free.release()
        if complaint is not None:
            raise HelperFailed(complaint)
        return value

    def _take(self) -> Helper:
        """A process that waits, if it still lives, or a new one."""
        with self._lock:
            idle = self._idle.pop() if self._idle else None
        if idle and idle.process.poll() is None:
            return idle
        if idle:
            idle.end()
        try:
            return Helper()
        except (OSError, RuntimeError) as error:
            raise Overloaded(f"The system starts no more processes ({error})") from None

    def _keep(self, helper: Helper) -> None:
        """Keeps the process for the next task."""
        with self._lock:
            if not self._closed:
                self._idle.append(helper)
                return
        helper.end()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            helpers, self._idle = self._idle, []
        for helper in helpers:
            helper.end()


def helper_main() -> None:
    """A helper process's main: tasks on stdin, outcomes on stdout. Ends with its pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no limits to set: there only time is bounded
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (HELPER_BYTES, HELPER_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe = Pipe(os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"), in_child=True)
    os.dup2(2, 1)
    with contextlib.suppress(EOFError, OSError):
        while True:
            task = pipe.receive()
            if PROCESSOR_TIMER is not None:
                signal.setitimer(PROCESSOR_TIMER, HELPER_SECONDS)
            outcome = outcome_of(task)
            if PROCESSOR_TIMER is not None:
                signal.setitimer(PROCESSOR_TIMER, 0)
            pipe.send(outcome)


def outcome_of(task: Any) -> tuple[Any, str | None]:
    """A task's value, or why it has none."""
    try:
        return task.run(), None
    except MemoryError:
        return None, f"it needs over {human_bytes(HELPER_BYTES)} of memory"
    except RecursionError:
        return None, "it recurses without end"
    except Exception as error:  # the process's border: a template may raise anything
        return None, " ".join(str(error).split())[:500] or type(error).__name__


@dataclass(frozen=True)
class Rendering:
    """A task for a helper: renders messages. Tries RESHAPES in order and takes the first whose output loses nothing."""

    templates: Mapping[str, str]
    bos: str
    eos: str
    messages: list[Any]
    tools: list[Any]
    args: dict[str, Any]
    generation: bool = True  # ends with the beginning of an answer
    native: bool = False  # only forms in which the template itself writes tools and calls

    def run(self) -> str:
        error: Exception | None = None
        rendered: str | None = None
        for reshape in NATIVE if self.native else RESHAPES:
            messages, tools = reshape(self.messages, self.tools)
            try:
                prompt = self._render(messages, tools)
                if not self._loses(prompt, self._render(messages, []) if tools else ""):
                    return prompt
                rendered = rendered or prompt
            except MemoryError:
                raise
            except Exception as failure:  # a template may raise anything: that is its complaint
                error = failure
        if rendered is not None and not self.native:
            return rendered
        raise error or ValueError("the template drops a part of the messages")

    def _render(self, messages: list[Any], tools: list[Any]) -> str:
        name = "tool_use" if tools and "tool_use" in self.templates else next(iter(self.templates))
        given = {"enable_thinking": True} | self.args | ({"tools": tools} if tools else {})
        given |= {"functions": json.dumps(tools, ensure_ascii=False), "datetime": time.strftime("%B %d %Y")}  # Firefunction
        given |= {"messages": list(messages), "add_generation_prompt": self.generation, "bos_token": self.bos,
                  "eos_token": self.eos}  # fmt: skip
        pieces, size = [], 0
        for piece in compiled_template(self.templates[name]).generate(given):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_RENDERED:
                raise MemoryError
        return "".join(pieces)

    def _loses(self, prompt: str, without_tools: str) -> bool:
        """True if the template dropped something silently: an offered tool, a call made, its result, a system text."""
        names = [t["function"]["name"] for t in self.tools]
        if any(prompt.count(name) <= without_tools.count(name) for name in names):
            return True
        called = [c["function"]["name"] for m in self.messages for c in m.get("tool_calls", [])]
        if any(prompt.count(name) < called.count(name) + names.count(name) for name in called):
            return True
        at = 0
        for role, said in self._must_appear():
            found = next((p for word in said if (p := _position(word, prompt, at)) >= 0), None)
            if found is None and role != "user":
                return True
            if role != "call" and found is not None:
                if found < at:  # moved, it changes the beginning of every longer prompt
                    return True
                at = found
        return False

    def _must_appear(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yields the texts that the prompt must hold, in the messages' order, each in several spellings."""
        for message in self.messages:
            if message["role"] != "assistant":
                yield message["role"], _spellings(message["content"].strip())
            for call in (c["function"] for c in message.get("tool_calls", [])):
                arguments = call["arguments"]
                yield "call", (call["name"], json.dumps(arguments, ensure_ascii=False))
                words = arguments.values() if isinstance(arguments, dict) else [str(arguments)]
                yield from (("call", _spellings(v)) for v in words if isinstance(v, str))


def _spellings(word: str) -> tuple[str, str]:
    """Text as it is, and as it stands in a JSON string."""
    return word, json.dumps(word, ensure_ascii=False)[1:-1]


def _position(word: str, text: str, start: int) -> int:
    """Where the word stands, looked for behind `start` first: in order, a long chat costs one pass over its prompt."""
    found = text.find(word, start)
    return found if found >= 0 else text.find(word)


@functools.lru_cache(maxsize=16)
def compiled_template(source: str) -> Any:
    """A template ready to render; the last few are kept. `{% generation %}` marks training spans, and is its body here."""
    source = re.sub(r"(\{%[-+]?\s*)generation\b", r"\1if true", source)
    return chat_environment().from_string(re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endif", source))


@functools.cache
def chat_environment() -> Any:
    """The sandboxed jinja2 environment chat templates are written for: Hugging Face's renderer (apply_chat_template)."""
    import jinja2.sandbox

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
               sort_keys: bool = False) -> str:  # fmt: skip
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """Lets templates collect things in their own lists, as Kimi K2's do; the messages are this process's copy."""

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            return (type(obj) is list and attr in ("append", "pop")) or super().is_safe_attribute(obj, attr, value)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: time.strftime(form)
    return environment


Turns = tuple[list[Any], list[Any]]  # messages and tools
Reshape = Callable[[list[Any], list[Any]], Turns]


def in_call_form(as_text: bool, new_id: Callable[[str, str, int], str] | None) -> Reshape:
    """Calls with their arguments as JSON text, which about half of the templates want, or with other ids: made of the old
    one, the function's name and the call's number."""

    def reshape(messages: list[Any], tools: list[Any]) -> Turns:
        shaped, ids = [], dict[str, str]()
        for message in map(dict, messages):
            calls = message["tool_calls"] = [{**c, "function": dict(c["function"])} for c in message.get("tool_calls", [])]
            for call in calls:
                function = call["function"]
                if as_text:
                    function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
                if new_id:
                    call["id"] = ids[call["id"]] = new_id(call["id"], function["name"], len(ids))
            if not calls:
                del message["tool_calls"]
            if new_id and (id := message.get("tool_call_id")):
                message["tool_call_id"] = ids.get(id) or new_id(id, message.get("name", ""), len(ids))
            shaped.append(message)
        return shaped, tools

    return reshape


def short_id(id: str, name: str, number: int) -> str:
    """Nine letters and digits, on which Mistral's templates insist."""
    return f"{zlib.crc32(id.encode('utf-8', 'replace')):09x}"


def telling_id(id: str, name: str, number: int) -> str:
    """An id that holds the function's name: Kimi K2's templates write nothing else of it."""
    return f"functions.{name}:{number}"


def folded(messages: list[Any], tools: list[Any]) -> Turns:
    """Turns as the strictest templates want them: one system turn at the beginning, then a user's, then by turns.

    A later system text and the result of no call become the user's words; an assistant's empty turn is left out, and
    neighbours of one role become one turn. No turn changes what stands before it but in its own neighbour, so that a longer
    conversation begins as the shorter one did.
    """
    shaped: list[Any] = []
    called: set[str] = set()
    for message in messages:
        role = message["role"]
        if role == "assistant" and not (message["content"] or message.keys() - {"role", "content"}):
            continue  # it says nothing
        called |= {c["id"] for c in message.get("tool_calls", [])}
        if role in ("tool", "function") and message.get("tool_call_id", "") not in called:
            message = {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
        elif role == "system" and any(m["role"] != "system" for m in shaped):
            message = {"role": "user", "content": message["content"]}
        if message["role"] == "assistant" and not any(m["role"] != "system" for m in shaped):
            shaped.append({"role": "user", "content": ""})
        if shaped and shaped[-1]["role"] == message["role"] and message["role"] in ("system", "user", "assistant"):
            shaped[-1] = joined(shaped[-1], message)
        else:
            shaped.append(message)
    return shaped, tools


def joined(first: Any, second: Any) -> Any:
    """Two turns of one role as one."""
    both = {**first, **second, "content": "\n\n".join(t["content"] for t in (first, second) if t["content"])}
    calls = [*first.get("tool_calls", []), *second.get("tool_calls", [])]
    return both | ({"tool_calls": calls} if calls else {})


def tools_in_system(messages: list[Any], tools: list[Any]) -> Turns:
    """The tools described in the system text, for templates that drop them."""
    messages, _ = folded(messages, [])
    signatures = "\n".join(json.dumps(t, ensure_ascii=False) for t in tools)
    described = TOOLS_IN_SYSTEM.format(signatures=signatures)
    if tools and messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{described}"}, *messages[1:]], []
    return ([{"role": "system", "content": described}] if tools else []) + messages, []


def calls_as_text(messages: list[Any], tools: list[Any]) -> Turns:
    """Tools, calls and results as plain text in Hermes' form, for templates that know nothing of them."""
    turns, _ = tools_in_system(messages, tools)
    shaped = []
    for turn in turns:
        calls = [json.dumps({k: c["function"][k] for k in ("name", "arguments")}, ensure_ascii=False)
                 for c in turn.get("tool_calls", [])]  # fmt: skip
        words = [turn["content"], *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)]
        if turn["role"] in ("tool", "function"):
            shaped.append({"role": "user", "content": f"<tool_response>\n{turn['content']}\n</tool_response>"})
        else:
            shaped.append({"role": turn["role"], "content": "\n".join(w for w in words if w)})
    return folded(shaped, [])


def system_as_user(messages: list[Any], tools: list[Any]) -> Turns:
    """The system text in the first user turn, for templates that refuse it (Gemma 2) or move it to the last (Mistral)."""
    return folded([{**m, "role": "user"} if m["role"] == "system" else m for m in messages], tools)


def compose(*reshapes: Reshape) -> Reshape:
    """Applies several forms one after the other."""
    return lambda messages, tools: functools.reduce(lambda turns, reshape: reshape(*turns), reshapes, (messages, tools))


CALL_FORMS = tuple(itertools.starmap(in_call_form, (
    (False, None), (True, None), (False, short_id), (True, short_id), (False, telling_id))))  # fmt: skip
NATIVE = tuple(compose(turns, calls) for turns in (compose(), folded, system_as_user) for calls in CALL_FORMS)
RESHAPES = (
    *NATIVE, tools_in_system, compose(tools_in_system, CALL_FORMS[1]), calls_as_text, compose(calls_as_text, system_as_user),
)  # fmt: skip


# ── 5. Tools ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# A Python function with type hints and a docstring is a tool; three are built in, and two of those start closed.


class ToolError(Exception):
    """Why a tool failed: the caller reads it in `error`, with success false."""


@dataclass(frozen=True)
class Tool:
    """A function a model may call: its name, what it does, its parameters as a JSON schema."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., Any]

    def document(self) -> dict[str, Any]:
        return {"name": self.name, "description": self.description, "parameters": self.parameters}


PYTHON_TYPES = {"string": str, "integer": int, "number": float, "boolean": bool, "object": dict, "array": list}  # by JSON's name


def make_tool(function: Callable[..., Any], name: str | None = None) -> Tool:
    """A Tool from a function: the docstring's first paragraph describes it, `name: words` lines its parameters."""
    import inspect

    described = inspect.getdoc(function) or ""
    lines = dict(re.findall(r"^[ \t]*(\w+): (.+)$", described, re.M))
    kinds, properties = {kind.__name__: name for name, kind in PYTHON_TYPES.items()}, {}
    parameters = inspect.signature(function).parameters
    for key, parameter in parameters.items():
        hint = getattr(parameter.annotation, "__name__", None) or str(parameter.annotation)
        kind = kinds.get(re.split(r"[\[ |]", hint)[0])
        if kind is None:
            raise ValueError(f"tool {function.__name__}: parameter {key} needs a plain type hint, not {hint}")
        properties[key] = {"type": kind} | ({"description": lines[key]} if key in lines else {})
    required = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    summary = " ".join(described.split("\n\n")[0].split())
    return Tool(name or function.__name__, summary, schema, function)


REGISTERED: dict[str, Tool] = {}  # by @tool, in this file or one loaded with --tools


def tool(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: registers the function as a tool.

    >>> @tool
    ... def dice(sides: int) -> int:
    ...     '''Rolls a die.'''
    """
    made = make_tool(function)
    REGISTERED[made.name] = made
    return function


@dataclass(frozen=True)
class ToolOptions:
    """What the built-in tools may reach. Nothing by default."""

    root: str | None = None  # file_read's directory
    hosts: tuple[str, ...] = ()  # http_get's hosts; "*" is any
    files: tuple[str, ...] = ()  # Python files with more tools


TOOL_SECONDS = 30.0  # for one call; http_get ends itself after 10
MAX_STUCK = 4  # calls of one tool that may run on after TOOL_SECONDS: each holds a thread
MAX_CALLS = 256  # of one tool at once


class Tools:
    """The registry: lists tools, checks arguments and runs a tool."""

    def __init__(self, options: ToolOptions) -> None:
        reader, getter = FileReader(options.root), HttpGetter(options.hosts)
        built_in = (make_tool(calculator), make_tool(reader.file_read), make_tool(getter.http_get))
        self._tools = {t.name: t for t in built_in}
        for path in options.files:
            load_tools(path)
        self._tools |= REGISTERED

    def documents(self) -> list[dict[str, Any]]:
        return [t.document() for t in self._tools.values()]

    def function(self, name: str) -> dict[str, Any]:
        """A tool as a chat offers it. Raises InvalidRequest when there is none of that name."""
        if name not in self._tools:
            known = ", ".join(self._tools)
            raise InvalidRequest(f"tools: there is no built-in tool {_said(name)}; there are {known}", "tools")
        return {"type": "function", "function": self._tools[name].document()}

    def execute(self, name: str, arguments: Any, cancel: Cancellation | None = None) -> dict[str, Any]:
        """Runs a tool: {"success", "result", "error"}. Raises NotFound, Overloaded, InvalidRequest outside its schema."""
        running = self.running(name, arguments, cancel)
        while True:
            try:
                next(running)
            except StopIteration as end:
                return dict(end.value)

    def running(
        self, name: str, arguments: Any, cancel: Cancellation | None = None, seconds: float = math.inf
    ) -> Generator[Waiting, None, dict[str, Any]]:
        """The same with signs of life while the tool runs, for so many seconds and TOOL_SECONDS at most."""
        if name not in self._tools:
            raise NotFound(f"Tool '{name[:200]}' is not registered", "The specified tool was not found")
        call = ToolCall(self._tools[name], check_arguments(self._tools[name], arguments))
        try:
            result = yield from call.wait(cancel, min(seconds, TOOL_SECONDS))
            return {"success": True, "result": result, "error": None}
        except ToolError as error:
            return {"success": False, "result": None, "error": str(error)}
        except (Overloaded, Cancelled):
            raise
        except Exception as error:
            log.warning("tool %s failed: %s", name, type(error).__name__, exc_info=True)
            return {"success": False, "result": None, "error": f"{type(error).__name__}: {error}"}


class ToolCall(threading.Thread):
    """One call of a tool, in a thread that is left behind when it takes longer than it may."""

    def __init__(self, tool: Tool, arguments: dict[str, Any]) -> None:
        super().__init__(name=f"tool {tool.name}", daemon=True)
        self._tool, self._arguments, self._began = tool, arguments, time.monotonic()
        self._outcome: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def wait(self, cancel: Cancellation | None, seconds: float) -> Generator[Waiting, None, Any]:
        """The result. Raises what the tool raised, ToolError where it takes too long or MAX_STUCK calls never came back,
        Overloaded beyond MAX_CALLS."""
        others = [thread for thread in threading.enumerate() if isinstance(thread, ToolCall) and thread.name == self.name]
        stuck = sum(self._began - other._began > TOOL_SECONDS for other in others)
        if stuck >= MAX_STUCK:
            raise ToolError(f"{stuck} calls of {self._tool.name} have not come back yet")
        if len(others) >= MAX_CALLS:
            raise Overloaded(f"{len(others)} calls of {self._tool.name} are running")
        self.start()
        if cancel:
            cancel.on_cancel(lambda: self._outcome.put((None, Cancelled())))
        while (left := self._began + seconds - time.monotonic()) > 0:
            try:
                result, error = self._outcome.get(timeout=max(0.01, min(left, PING_SECONDS)))
            except queue.Empty:
                yield Waiting()
                continue
            if error:
                raise error
            return result
        raise ToolError(f"{self._tool.name} took over {seconds:g} seconds")

    def run(self) -> None:
        """Calls the function, which is somebody's: it may return and raise anything, SystemExit too."""
        try:
            result = self._tool.function(**self._arguments)
            json.dumps(result, allow_nan=False)
            self._outcome.put((result, None))
        except Exception as error:
            self._outcome.put((None, error))
        except BaseException as error:
            self._outcome.put((None, ToolError(f"{type(error).__name__}: {error}")))


def load_tools(path: str) -> None:
    """Runs a Python file so that its @tool functions register; `from shimmy import tool` works in it."""
    import runpy

    sys.modules.setdefault("shimmy", sys.modules[__name__])
    try:
        runpy.run_path(path)
    except Exception as error:  # somebody's code: anything may come
        raise ImportError(f"--tools {path}: {type(error).__name__}: {error}") from error


def check_arguments(tool: Tool, arguments: Any) -> dict[str, Any]:
    """The arguments without nulls, which mean absent. Raises InvalidRequest when they are outside the tool's schema."""
    known = tool.parameters["properties"]
    arguments = {k: v for k, v in an_object("The body (the tool's arguments)", arguments).items() if v is not None}
    for name, value in arguments.items():
        if name not in known:
            raise InvalidRequest(f"{name} is no parameter of {tool.name}; it takes {', '.join(known) or 'none'}", name)
        kind = known[name]["type"]
        if type(value) is not PYTHON_TYPES[kind] and not (kind == "number" and type(value) is int):
            raise InvalidRequest(f"{name} must be of type {kind}, not {_said(value)}", name)
    for name in tool.parameters["required"]:
        if name not in arguments:
            raise InvalidRequest(f"{name} is required", name)
    return arguments


MAX_EXPRESSION = 1000  # characters
MAX_BITS = 4096  # of any whole number on the way


def calculator(expression: str) -> float:
    """Evaluates an arithmetic expression with math functions and returns the number.

    expression: for example 2 * (3 + 4) or sqrt(2) / sin(pi / 3)
    """
    import ast

    if len(expression) > MAX_EXPRESSION:
        raise ToolError(f"the expression is over {MAX_EXPRESSION} characters")
    try:
        tree = ast.parse(expression.strip().replace("^", "**"), mode="eval")
        value = evaluate(tree.body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ToolError("the expression is not arithmetic that can be read") from None
    except (ArithmeticError, ValueError, TypeError) as error:
        raise ToolError(str(error) or type(error).__name__) from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ToolError("the result is not a finite number")
    return value


def power(a: Any, b: Any) -> Any:
    """a ** b. Raises ToolError before numbers get too large to compute."""
    if isinstance(a, int) and isinstance(b, int) and abs(a) > 1 and (abs(a).bit_length() - 1) * b > MAX_BITS:
        raise ToolError(f"a number on the way has over {MAX_BITS} bits")
    return a**b


def rounded(x: Any, digits: int = 0) -> Any:
    """x to so many digits. Raises ToolError for more than any float has."""
    if abs(digits) > 400:  # 10 ** digits is computed
        raise ToolError("round takes a number and up to 400 digits")
    return round(x, digits) if digits else round(x)


def factorial(n: int) -> int:
    """n!, up to 400!. Raises ToolError beyond."""
    if not 0 <= n <= 400:
        raise ToolError("factorial takes a whole number from 0 to 400")
    return math.factorial(n)


MATH_CONSTANTS = {"pi": math.pi, "e": math.e, "tau": math.tau}
MATH_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(math, name)
    for name in (
        *("sqrt", "exp", "log", "log2", "log10", "sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh"),
        *("asinh", "acosh", "atanh", "degrees", "radians", "floor", "ceil", "trunc", "hypot", "gcd", "fabs", "fmod"),
    )
} | {"abs": abs, "min": min, "max": max, "ln": math.log, "round": rounded, "factorial": factorial}  # fmt: skip
OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": operator.add, "Sub": operator.sub, "Mult": operator.mul, "Div": operator.truediv, "FloorDiv": operator.floordiv,
    "Mod": operator.mod, "Pow": power, "UAdd": operator.pos, "USub": operator.neg,
}  # fmt: skip


def evaluate(node: ast.AST) -> Any:
    """A syntax tree of numbers, operators, math constants and functions; every whole number stays within MAX_BITS."""
    import ast

    sign = type(getattr(node, "op", None)).__name__
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value: Any = node.value
    elif isinstance(node, ast.Name) and node.id in MATH_CONSTANTS:
        value = MATH_CONSTANTS[node.id]
    elif isinstance(node, ast.UnaryOp) and sign in OPERATORS:
        value = OPERATORS[sign](evaluate(node.operand))
    elif isinstance(node, ast.BinOp) and sign in OPERATORS:
        value = OPERATORS[sign](evaluate(node.left), evaluate(node.right))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id not in MATH_FUNCTIONS:
            raise ToolError(f"the function {node.func.id} is not known")
        value = MATH_FUNCTIONS[node.func.id](*map(evaluate, node.args))
    else:
        raise ToolError(f"{type(getattr(node, 'op', node)).__name__} is not arithmetic")
    if isinstance(value, complex):
        raise ToolError("the result is not a real number")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ToolError(f"a number on the way has over {MAX_BITS} bits")
    return value


class FileReader:
    """Reads text files below one directory, and nothing else; without a directory it is closed."""

    MAX_BYTES = MIB

    def __init__(self, root: str | None) -> None:
        self.root = pathlib.Path(root).resolve() if root else None

    def file_read(self, path: str) -> str:
        """Reads a text file below the directory that `--tool-root DIR` opened (off without it).

        path: relative to that directory
        """
        if self.root is None:
            raise ToolError("file_read is off: start the server with --tool-root DIR to open a directory")
        try:
            target = (self.root / path).resolve()
            if not target.is_relative_to(self.root):
                raise ToolError("the path leads outside the tool root")
            if not target.is_file():
                raise ToolError("there is no regular file at that path")
            with open(self._open(self.root, target.relative_to(self.root).parts), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise ToolError("there is no regular file at that path")
                data = file.read(self.MAX_BYTES + 1)
        except RuntimeError:  # what resolve() says of a loop, before Python 3.13
            raise ToolError("the file cannot be read: its links lead in a circle") from None
        except (OSError, ValueError) as error:
            raise ToolError(f"the file cannot be read: {getattr(error, 'strerror', None) or error}") from None
        if len(data) > self.MAX_BYTES:
            raise ToolError(f"the file is over {self.MAX_BYTES} bytes")
        return data.decode("utf-8", "replace")

    @staticmethod
    def _open(root: pathlib.Path, parts: Seq[str]) -> int:
        """Opens a resolved path below `root`, each part from the directory before and following no link.

        So what was swapped for a link since it was resolved is not followed (ELOOP), and a pipe put there is not waited for.
        """
        nonblocking = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
        if os.open not in os.supports_dir_fd:  # Windows
            return os.open(root.joinpath(*parts), os.O_RDONLY | nonblocking)
        here = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        for i, part in enumerate(parts, 1):
            try:
                flags = nonblocking if i == len(parts) else os.O_DIRECTORY | getattr(os, "O_PATH", 0)
                there = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | flags, dir_fd=here)
            finally:
                os.close(here)
            here = there
        return here


class HttpGetter:
    """Fetches pages from allowed hosts at global addresses, connecting to the very address that was checked."""

    MAX_BYTES, MAX_SECONDS, MAX_REDIRECTS = MIB, 10.0, 5
    MAX_URL = 8192  # characters; urlsplit keeps the last 128

    def __init__(self, hosts: Seq[str]) -> None:
        self.hosts = {h.strip().lower() for h in hosts}

    def http_get(self, url: str) -> dict:  # type: ignore[type-arg]
        """Fetches an http or https address, if `--tool-hosts` opened its host (off without it).

        url: the whole address, http or https
        """
        if not self.hosts:
            raise ToolError("http_get is off: start the server with --tool-hosts HOST,… (or *) to open hosts")
        import http.client

        deadline = time.monotonic() + self.MAX_SECONDS
        for _ in range(self.MAX_REDIRECTS + 1):
            if len(url) > self.MAX_URL:
                raise ToolError(f"the address is over {self.MAX_URL} characters")
            try:
                status, headers, body = self._fetch(url, deadline)
                location = headers.get("Location")
                if status not in (301, 302, 303, 307, 308) or not location:
                    return {"status": status, "content_type": headers.get("Content-Type"), "body": body}
                url = urllib.parse.urljoin(url, location)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise ToolError(f"the address cannot be fetched: {error or type(error).__name__}") from None
        raise ToolError(f"over {self.MAX_REDIRECTS} redirects")

    def _fetch(self, url: str, deadline: float) -> tuple[int, Any, str]:
        parts = urllib.parse.urlsplit(url)
        host = (parts.hostname or "").lower()
        if parts.scheme not in ("http", "https") or not host:
            raise ToolError("the address must begin with http:// or https:// and a host")
        if "*" not in self.hosts and host not in self.hosts:
            raise ToolError(f"the host {host} is not opened by --tool-hosts")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        connection = http.client.HTTPConnection(host, port)
        connection.sock = sock = self._connect(host, port, parts.scheme == "https", deadline)
        # a server that drips bytes resets every time-out of the socket: at the deadline the connection is cut
        cut = threading.Timer(max(0.0, deadline - time.monotonic()), sock.shutdown, [socket.SHUT_RDWR])
        cut.daemon = True
        cut.start()
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"User-Agent": f"shimmy/{__version__}", "Connection": "close"})
            response = connection.getresponse()
            data = self._read(response, deadline)
            charset = codecs.lookup(response.headers.get_content_charset() or "utf-8").name
            if charset in ("punycode", "idna"):  # of host names; the first takes a minute for 1 MiB
                raise LookupError(charset)
            return response.status, response.headers, data.decode(charset, "replace")
        except LookupError:
            raise ToolError("the page is in an unknown character set") from None
        finally:
            cut.cancel()
            connection.close()

    def _connect(self, host: str, port: int, tls: bool, deadline: float) -> socket.socket:
        """Resolve once, refuse any address that is not global, connect to what was resolved."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [(str(info[4][0]), port) for info in found]
        for address in addresses:
            if not is_global(address[0]):
                raise ToolError(f"the host {host} has an address that is not global ({address[0]})")
        for number, address in enumerate(addresses, 1):
            try:
                connection = socket.create_connection(address, timeout=max(0.01, deadline - time.monotonic()))
                break
            except OSError:  # no route by this family, say
                if number == len(addresses):
                    raise
        if not tls:
            return connection
        import ssl

        return ssl.create_default_context().wrap_socket(connection, server_hostname=host)

    def _read(self, response: http.client.HTTPResponse, deadline: float) -> bytes:
        data = b""
        while len(data) <= self.MAX_BYTES:
            chunk = response.read1(65536)
            if time.monotonic() >= deadline:
                raise ToolError(f"the answer took over {self.MAX_SECONDS:.0f} seconds")
            if not chunk:
                return data
            data += chunk
        raise ToolError(f"the answer is over {self.MAX_BYTES} bytes")


# IANA's special-purpose registries, multicast and reserved space, written out: `ipaddress` knows a different part of
# them in each version of Python. AS112 and AMT (192.31.196, 192.52.193, 192.175.48) route globally and serve no pages.
SPECIAL_IPV4 = tuple(map(ipaddress.IPv4Network, (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24",
    "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
)))  # fmt: skip
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")  # the rest is special, or not given out
SPECIAL_IPV6 = tuple(map(ipaddress.IPv6Network, (  # within it; 2001::/23 holds Teredo and ORCHID, 2002::/16 is 6to4
    "2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20",
)))  # fmt: skip
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def is_global(address: str) -> bool:
    """Whether an IP address is of the public internet; one mapped into IPv6, or behind NAT64, counts as what it is."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped or ip in NAT64:
            return is_global(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        return ip in GLOBAL_UNICAST and not any(ip in network for network in SPECIAL_IPV6)
    return not any(ip in network for network in SPECIAL_IPV4)


# ── 6. Messages ───────────────────────────────────────────────────────────────────────────────────────────────────────
# What crosses the pipe between the server and an engine, and the pipe.


# Messages: parent to child


def knob(default: Any, help: str, **more: Any) -> Any:
    """An engine setting: its default, one line of help, and what argparse needs (type, choices, metavar)."""
    return field(default=default, metadata={"help": help, **more})


def parse_gpu_layers(words: str) -> int | None:
    """--gpu-layers: a number, or auto for None. -1, and `all`, are all of them."""
    if words in ("auto", "all"):
        return None if words == "auto" else -1
    if not re.fullmatch(r"-1|\d{1,6}", words):
        raise argparse.ArgumentTypeError(f"{words!r} is neither auto nor a number of layers")
    return int(words)


def parse_shares(words: str) -> tuple[float, ...]:
    """--tensor-split: how the layers are shared out, a number from 0 on for each device."""
    if not re.fullmatch(r"\d+(\.\d+)?([,/]\d+(\.\d+)?)*", words) or not any(map(float, re.split("[,/]", words))):
        raise argparse.ArgumentTypeError(f"{words!r} is no list of shares, such as 3,1")
    return tuple(map(float, re.split("[,/]", words)))


def parse_override(words: str) -> tuple[str, str]:
    """--override-tensor: a regular expression for tensors' names, and the device that they go to."""
    pattern, equals, device = words.rpartition("=")
    try:
        re.compile(pattern)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{words!r} holds no regular expression: {error}") from None
    if not (pattern and equals and device):
        raise argparse.ArgumentTypeError(f"{words!r} is no override; write PATTERN=DEVICE")
    return pattern, device


@dataclass(frozen=True)
class EngineOptions:
    """How a model is loaded; flags of serve, generate and probe alike, in llama.cpp's words."""

    ctx: int | None = knob(None, "tokens of context for one sequence (default: the model's own, at most 8192)", type=int)
    parallel: int = knob(8, "sequences decoded at once", type=int)
    kv_pool: int | None = knob(None, "tokens of KV cache all sequences share (default: 4 × ctx, as memory allows)", type=int)
    kv_type: str = knob("f16", "type of the KV cache", choices=("f16", "q8_0", "q4_0"))
    threads: int | None = knob(None, "CPU threads (default: the physical cores, 1 for models below 16 MB); "
                              "fewer where other programs are busy", type=int)
    gpu_layers: int | None = knob(None, "layers on the GPU, where there is a GPU build; -1 is all "
                                  "(default: auto, as many as fit)", type=parse_gpu_layers, metavar="N|auto")  # fmt: skip
    n_cpu_moe: int | None = knob(None, "layers whose experts stay on the CPU (default: as few as fit)", type=int)
    override_tensor: tuple[tuple[str, str], ...] = knob((), "tensors whose names match go to a device (repeatable)",
                                                        type=parse_override, metavar="PATTERN=DEVICE")  # fmt: skip
    device: tuple[str, ...] | None = knob(None, "devices to use, by commas, as diag names them; none: the CPU alone",
                                          type=lambda words: tuple(filter(None, map(str.strip, words.split(",")))),
                                          metavar="LIST")  # fmt: skip
    main_gpu: int | None = knob(None, "the GPU to use alone, by its number among those used", type=int)
    tensor_split: tuple[float, ...] | None = knob(None, "how to share the layers out over the GPUs", type=parse_shares,
                                                  metavar="A,B")  # fmt: skip
    flash_attn: str = knob("auto", "flash attention", choices=("auto", "on", "off"))
    batch: int = knob(512, "most tokens of prompts read in one step", type=int)
    mmap: bool = knob(True, "map the weights from the file instead of reading them")
    lora: tuple[str, ...] = knob((), "LoRA adapter to apply (repeatable)", metavar="FILE")
    chat_template: str | None = knob(None, "chat template (jinja) in place of the model's own", metavar="FILE")  # its text


@dataclass(frozen=True)
class Rung:
    """One way to load a model, from as configured (the top) down to the plainest. What each step gives up:"""

    small_pool: bool = False  # a KV pool of more than one context
    gpu_share: float = 1.0  # the rest of the layers that the GPU would take
    without: tuple[str, ...] = ()  # these special kernels of the CPU
    plain: bool = False  # all of them
    cpu: bool = False  # the GPU

    def below(self, cause: str, gpu: bool) -> Rung | None:
        """The next rung that may mend a crash, a hang, or a want of memory; None if no other can."""
        if cause == "memory" and not self.small_pool:
            return replace(self, small_pool=True)
        if gpu and not self.cpu and self.gpu_share > 0.25:
            return replace(self, gpu_share=self.gpu_share / 2)
        if cause != "memory" and not self.plain:
            return replace(self, plain=True)
        return replace(self, cpu=True) if gpu and not self.cpu else None

    def words(self) -> str:
        """What is given up, for people; "" at the top."""
        given_up = [
            (self.small_pool, "with a KV pool of one context"), (self.cpu, "on the CPU alone"),
            (self.gpu_share < 1 and not self.cpu, f"with {self.gpu_share:.0%} of the layers on the GPU"),
            (self.plain, "without special CPU kernels"),
            (bool(self.without) and not self.plain, f"without the {' and '.join(self.without)} kernels of the CPU"),
        ]  # fmt: skip
        return ", ".join(words for given, words in given_up if given)


@dataclass(frozen=True)
class Setup:
    """How one engine loads its model: the options, what this machine makes us give up, what memory others will take."""

    options: EngineOptions = EngineOptions()
    rung: Rung = Rung()
    reserved: int = 0  # bytes that count as free, and that other engines have mapped or will fill
    others_idle: bool = False  # models that nobody uses are in memory: better that they go than to do with less


@dataclass(frozen=True)
class Load:
    """First message to a child: which model, and how."""

    model: ModelInfo
    setup: Setup = Setup()


@dataclass(frozen=True)
class ThoughtBudget:
    """How many tokens the thought that an answer begins with may have; then `closing` is written for the model.

    A text that does not begin with `opens` has no thought, unless the prompt has begun one.
    """

    opens: str
    closes: str
    tokens: int
    begun: bool = False  # the prompt ends inside the thought
    closing: str = ""  # the closing marker and what goes with it; "": on a line of its own, then an empty line

    @property
    def ending(self) -> str:
        return self.closing or f"\n{self.closes.strip()}\n\n"


@dataclass(frozen=True)
class Generate:
    """A job: write one text. A prompt is segments of text, tokenized one by one, or token ids."""

    prompt: tuple[str, ...] | tuple[int, ...]
    sampling: Sampling
    markers: frozenset[str]  # control tokens that are shown: reasoning, tool calls
    thought: ThoughtBudget | None = None
    owner: str = ""  # whose cells the prompt may begin with
    spare: int = 0  # so many segments at the prompt's start may be left out where all do not fit
    echo: bool = False  # give out the prompt too, with the log probabilities of its tokens


@dataclass(frozen=True)
class Embed:
    """A job: make a vector of each input (text, or token ids). With a query: score each input for it."""

    inputs: tuple[str | tuple[int, ...], ...]
    dimensions: int | None = None  # keep so many of the vector's numbers
    query: str | None = None
    truncate: bool = False  # cut inputs that are too long


@dataclass(frozen=True)
class Tokenize:
    """A job for the tokenizer alone: a text's tokens, or what tokens stand for."""

    content: str | tuple[int, ...]
    add_special: bool = False  # with the tokens that the model wants around a text
    parse_special: bool = True  # names of special tokens become these
    pieces: bool = False  # tell what each token stands for


Job = Generate | Embed | Tokenize  # everything an engine computes; Intake makes Sequence, Embedding and Tokens of them


@dataclass(frozen=True)
class Submit:
    """One job. Whatever comes back about it carries its id."""

    id: int
    job: Job


@dataclass(frozen=True)
class Cancel:
    """Ends jobs within a step."""

    ids: tuple[int, ...]


# Messages: child to parent


@dataclass(frozen=True)
class Progress:
    """How much of the weights is loaded, 0 to 1."""

    fraction: float


@dataclass(frozen=True)
class Loaded:
    """The model is ready: its context, and what the parent needs to know of it."""

    ctx: int
    pool: int
    parallel: int
    chat: ChatFacts
    notes: tuple[str, ...]
    pool_bytes: int = 0  # memory that the pool's KV cache takes when it is full
    memory_need: int = 0  # bytes of RAM that the engine takes when its pool is full
    devices: str = ""  # where the layers are, on a machine with more than a CPU
    on_gpu: bool = False  # some of them
    gpu_bytes: int = 0  # memory that the model took on its GPUs, its whole KV cache too


@dataclass(frozen=True)
class Alive:
    """Sent every second, whatever the child does; with what takes too long, if anything does."""

    stuck: str = ""


@dataclass(frozen=True)
class LoadFailed:
    """Why the model cannot be served; the child ends.

    A cause tells what may help: "room" (others hold the memory), "memory" (the library got none), else "crash" or "hang",
    which the parent sees. Nothing helps against other reasons.
    """

    reason: str
    cause: str = ""


@dataclass(frozen=True)
class Accepted:
    """The job passed its checks and waits for its first step."""

    id: int
    prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """Text of one sequence since the last message."""

    id: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    tokens: int = 0  # generated since the last message

    @property
    def size(self) -> int:
        """About how many bytes it takes in memory, as measured."""
        return 220 + len(self.text) + sum(280 + 80 * len(logprob.names) for logprob in self.logprobs)


@dataclass(frozen=True)
class Finished:
    """The end of one sequence: stop, length or cancelled."""

    id: int
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    prompt_seconds: float = 0.0  # from its first step to its first token
    decode_seconds: float = 0.0  # from there to its last
    stopped_by: str = ""  # the stop string that ended it
    forced_tokens: int = 0  # of those, the ones that a grammar left no choice about, which the model did not pick


@dataclass(frozen=True)
class Failed:
    """A job that cannot go on; `code` names the ApiError."""

    id: int
    code: str
    details: str
    param: str | None = None
    sizes: tuple[int, ...] = ()  # ApiError's


@dataclass(frozen=True)
class Stepped:
    """What one step, or the steps of the last few milliseconds, gave all sequences together."""

    events: tuple[Piece | Vectors | Tokens | Finished | Failed, ...]
    running: int  # sequences in the batch now
    cells: int = 0  # of the pool, that these hold


class _Unpickler(pickle.Unpickler):  # nosec B301  # of what the server sends
    """Finds classes in this file, whatever the module is called on either side."""

    def find_class(self, module: str, name: str) -> Any:
        return globals()[name]


# The pipe. A child may be taken over by a hostile model file or template: what it sends is JSON, whose objects stand for a
# few types in a table and nothing else. What we send to it may be anything, a grammar's symbols too, and is pickled.

MAX_MESSAGE = 128 * MIB  # of a child's: 2,048 vectors of 8,192 numbers are 64 MiB, in base64 85
KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,), "float": (int, float), "str": (str,), "bytes": (bytes,), "bool": (bool,), "tuple": (tuple,),
    "Mapping": (dict,), "None": (type(None),),
}  # fmt: skip


@functools.cache
def sendable() -> dict[type, int]:
    """The types that a child may send, and their numbers."""
    types = (Progress, Loaded, LoadFailed, Alive, Accepted, Stepped, Piece, TokenLogprob, Vectors, Tokens, Finished, Failed,
             ChatFacts, ChatFormat, CallFormat, Params)  # fmt: skip
    return {kind: number for number, kind in enumerate(types)}


@functools.cache
def wanted_kinds(kind: type) -> list[tuple[type, ...]]:
    """For each field of a dataclass the types of its values."""
    plain = (re.sub(r"\[.*\]", "", str(f.type)).split(" | ") for f in fields(kind))
    return [tuple(itertools.chain(*(KINDS.get(name, (object,)) for name in names))) for names in plain]


def json_form(value: Any) -> dict[str, Any]:
    """A value that JSON has no form for: bytes, or a dataclass that a child may send."""
    if isinstance(value, bytes):
        return {"bytes": binascii.b2a_base64(value, newline=False).decode()}
    return {"type": sendable()[type(value)], "fields": [getattr(value, f.name) for f in fields(value)]}


def from_json_form(found: dict[str, Any]) -> Any:
    """The value that a JSON object stands for. Raises ValueError, LookupError or TypeError for any other."""
    if "bytes" in found:
        return binascii.a2b_base64(found["bytes"])
    if "type" not in found:
        return found
    kind = list(sendable())[found["type"]]
    values = [tupled(value) if isinstance(value, list) else value for value in found["fields"]]
    if not all(map(isinstance, values, wanted_kinds(kind))):
        raise TypeError(f"a {kind.__name__} holds what it cannot")
    return kind(*values)


def tupled(value: list[Any]) -> tuple[Any, ...]:
    """A list, which JSON has alone, as the tuple that it was."""
    return tuple([tupled(v) if isinstance(v, list) else v for v in value])


class Pipe:
    """Messages over a pair of byte streams: a length, then the message. Any thread may send."""

    def __init__(self, reader: IO[bytes], writer: IO[bytes], in_child: bool = False) -> None:
        self._reader, self._writer, self._in_child, self._lock = reader, writer, in_child, threading.Lock()

    def send(self, message: Any) -> None:
        """Raises OSError when the other side is gone."""
        if self._in_child:
            data = json.dumps(message, default=json_form, ensure_ascii=False).encode("utf-8", "surrogatepass")
        else:
            data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        with self._lock:
            self._writer.write(struct.pack("<I", len(data)) + data)
            self._writer.flush()

    def receive(self) -> Any:
        """The next message. Raises EOFError when the other side is gone, other exceptions for what is no message."""
        header = self._reader.read(4)
        if len(header) < 4:
            raise EOFError
        (size,) = struct.unpack("<I", header)
        if size > MAX_MESSAGE and not self._in_child:
            raise ValueError(f"a message of {size} bytes")
        data = self._reader.read(size)
        if len(data) < size:
            raise EOFError
        if self._in_child:
            return _Unpickler(io.BytesIO(data)).load()
        return json.loads(data.decode("utf-8", "surrogatepass"), object_hook=from_json_form)

    def close(self) -> None:
        """Shows the other side the end of the stream, unless a send is stuck in it: only the other side's death ends that."""
        if self._lock.acquire(timeout=1.0):
            with contextlib.suppress(OSError, ValueError):
                self._writer.close()
            self._lock.release()

    def end(self) -> None:
        """Closes both ends; called by the thread that receives when nothing more will come."""
        self._reader.close()
        self.close()


# ── 7. llama.cpp (child) ──────────────────────────────────────────────────────────────────────────────────────────────
# A narrow binding: vocabulary, model, context, sampler, text. Only this section imports llama_cpp.


class LoadError(Exception):
    """The model cannot be loaded; the message tells the user why, `cause` what may help (LoadFailed)."""

    def __init__(self, reason: str, cause: str = "") -> None:
        super().__init__(reason)
        self.cause = cause


def import_llama() -> Any:
    """llama_cpp's C bindings alone; the package's own __init__ would add half a second and 20 MB."""
    import importlib.util
    import types

    if "llama_cpp" not in sys.modules:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None:
            raise ImportError("llama-cpp-python is not installed: pip install llama-cpp-python")
        package = types.ModuleType("llama_cpp")
        package.__path__ = list(spec.submodule_search_locations or [])
        package.__spec__ = spec
        sys.modules["llama_cpp"] = package
    import llama_cpp.llama_cpp as bindings

    for name in ("llama_memory_seq_cp", "llama_sampler_apply", "llama_set_adapters_lora"):
        if not hasattr(bindings, name):
            raise ImportError(f"the installed llama-cpp-python lacks {name}: shimmy needs 0.3.36 or newer")
    return bindings


@dataclass(frozen=True)
class Device:
    """A device of llama.cpp's: its name, such as CPU or CUDA0, its kind (CPU, GPU, IGPU, ACCEL), and bytes of its memory."""

    name: str
    description: str
    kind: str
    free: int
    total: int
    handle: Any = field(default=None, compare=False)  # where it is, in the process that asked


class Ggml:
    """The functions of libggml that llama_cpp does not bind: devices, and the CPU's special kernels (ggml-backend.h).

    These kernels come with buffer types of the CPU device ("extra": AMX, CPU_REPACK …), into which fitting weights are
    rearranged. llama.cpp walks a list of them that can be edited in place before a model is loaded.
    """

    KINDS = ("CPU", "GPU", "IGPU", "ACCEL", "META")  # enum ggml_backend_dev_type

    def __init__(self, llama: Any) -> None:
        import ctypes

        self._ctypes, self._llama = ctypes, llama
        folder = os.path.dirname(llama._lib._name)
        # libraries that libllama links to show their functions through it, but not on Windows
        paths = [os.path.join(folder, n) for n in sorted(os.listdir(folder)) if "ggml" in n] if os.name == "nt" else []
        self._libraries = [llama._lib, *map(ctypes.CDLL, paths)]

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        """Calls a function; whole numbers are passed as size_t or pointers, which have the same width."""
        function = next(getattr(library, name) for library in self._libraries if hasattr(library, name))
        kinds = {int: self._ctypes.c_size_t, type(None): self._ctypes.c_void_p, bytes: self._ctypes.c_char_p}
        function.restype, function.argtypes = result, [kinds.get(type(a), type(a)) for a in arguments]
        return function(*arguments)

    def devices(self) -> list[Device]:
        """All devices, the CPU included, in llama.cpp's order."""
        c, found = self._ctypes, list[Device]()
        for index in range(self.call("ggml_backend_dev_count", c.c_size_t)):
            handle = self.call("ggml_backend_dev_get", c.c_void_p, index)
            name, about = (self.call(f"ggml_backend_dev_{n}", c.c_char_p, handle) for n in ("name", "description"))
            free, total = c.c_size_t(), c.c_size_t()
            self.call("ggml_backend_dev_memory", None, handle, c.pointer(free), c.pointer(total))
            kind = self.KINDS[self.call("ggml_backend_dev_type", c.c_int, handle)]
            found.append(Device(name.decode(), about.decode("utf-8", "replace"), kind, free.value, total.value, handle))
        return found

    def buffer_type(self, device: int) -> int:
        """Where tensors go that are meant for a device."""
        return int(self.call("ggml_backend_dev_buffer_type", self._ctypes.c_void_p, device))

    @functools.cached_property
    def cpu(self) -> int:
        return int(self.call("ggml_backend_dev_by_type", self._ctypes.c_void_p, self.KINDS.index("CPU")))

    def _cpu_function(self, name: bytes, result: Any, *kinds: Any) -> Any:
        """A function that only the CPU backend has, or None."""
        registry = self.call("ggml_backend_dev_backend_reg", self._ctypes.c_void_p, self.cpu)
        address = self.call("ggml_backend_reg_get_proc_address", self._ctypes.c_void_p, registry, name)
        return self._ctypes.CFUNCTYPE(result, *kinds)(address) if address else None

    def kernels(self) -> dict[str, int]:
        """The CPU's extra buffer types by name, in the order in which weights are offered to them."""
        kinds = itertools.takewhile(bool, self._extra or ())
        return {self.call("ggml_backend_buft_name", self._ctypes.c_char_p, kind).decode(): kind for kind in kinds}

    @functools.cached_property
    def _extra(self) -> Any:
        """llama.cpp's list of them, ended by a null; None if there is none."""
        c = self._ctypes
        ask = self._cpu_function(b"ggml_backend_dev_get_extra_bufts", c.POINTER(c.c_void_p), c.c_void_p)
        return ask(self.cpu) if ask else None

    def leave_out(self, names: Seq[str]) -> None:
        """Takes kernels out of the list, before a model is loaded."""
        if self._extra:
            for index, kind in enumerate([*(kind for name, kind in self.kernels().items() if name not in names), None]):
                self._extra[index] = kind

    SIDE = 64  # of the matrix that a kernel is tried on
    ROWS = (1, 2, 33)  # as a generated token has, a pair of them, a prompt

    def try_kernel(self, kind: int) -> str:
        """Multiplies a small 4-bit matrix in a buffer of this type: "" or what is wrong. What crashes does so here."""
        import numpy as np

        c, pointer, side = self._ctypes, self._ctypes.c_void_p, self.SIDE
        held, weights = self._tensor(2, side)  # GGML_TYPE_Q4_0
        buffer = self.call("ggml_backend_alloc_ctx_tensors_from_buft", pointer, held, kind)
        if not buffer:
            return ""  # it takes no such matrix
        self.call("ggml_backend_buffer_set_usage", None, buffer, c.c_int(1))  # GGML_BACKEND_BUFFER_USAGE_WEIGHTS
        # a block holds 32 numbers, here equal ones: the scale 0.5, then 4 bits each, which mean that number less 8
        numbers = (np.arange(side)[:, None] + np.arange(side // 32)) % 7 - 3
        blocks = np.zeros(numbers.shape, [("scale", "<f2"), ("bits", "u1", 16)])
        blocks["scale"], blocks["bits"] = 0.5, (numbers[..., None] + 8) * 17
        self.call("ggml_backend_tensor_set", None, weights, blocks.tobytes(), 0, blocks.nbytes)
        backend = self.call("ggml_backend_dev_init", pointer, self.cpu, None)
        self._cpu_function(b"ggml_backend_set_n_threads", None, pointer, c.c_int)(backend, min(2, len(processors())))
        matrix = np.repeat(numbers / 2, 32, axis=1)
        for rows in self.ROWS:
            values = ((np.arange(rows)[:, None] * 3 + np.arange(side)) % 5 / 2 - 1).astype("<f4")
            if not np.allclose(self._product(backend, weights, values), values @ matrix.T, rtol=0, atol=0.5):  # 8-bit rounding
                return "wrong results"
        return ""

    def _tensor(self, kind: int, rows: int) -> tuple[int, int]:
        """A graph's memory without data (ggml_init_params), and a matrix in it."""
        c = self._ctypes
        params = type("Params", (c.Structure,), {"_fields_": [("size", c.c_size_t), ("at", c.c_void_p), ("bare", c.c_bool)]})
        held = self.call("ggml_init", c.c_void_p, params(1 << 20, None, True))
        return held, self.call("ggml_new_tensor_2d", c.c_void_p, held, c.c_int(kind), c.c_int64(self.SIDE), c.c_int64(rows))

    def _product(self, backend: int, weights: int, values: Any) -> Any:
        """Rows times the matrix of `weights`; not a number where that fails."""
        c, pointer, found = self._ctypes, self._ctypes.c_void_p, values * math.nan
        held, input = self._tensor(0, len(values))  # GGML_TYPE_F32
        result = self.call("ggml_mul_mat", pointer, held, weights, input)
        graph = self.call("ggml_new_graph", pointer, held)
        self.call("ggml_build_forward_expand", None, graph, result)
        self.call("ggml_backend_alloc_ctx_tensors_from_buft", pointer, held, self.buffer_type(self.cpu))
        self.call("ggml_backend_tensor_set", None, input, values.tobytes(), 0, values.nbytes)
        if not self.call("ggml_backend_graph_compute", c.c_int, backend, graph):
            self.call("ggml_backend_tensor_get", None, result, found.ctypes.data, 0, found.nbytes)
        return found


def build_main() -> None:
    """A helper process's main: prints what the engine library says of itself and of the devices, as JSON."""
    try:
        llama = import_llama()
        ggml = Ggml(llama)
        shown = [{k: v for k, v in vars(device).items() if k != "handle"} for device in ggml.devices()]
        print(json.dumps({"engine": llama.llama_print_system_info().decode().strip(" |\n"),
                          "gpu_offload": bool(llama.llama_supports_gpu_offload()), "devices": shown}))  # fmt: skip
    except (ImportError, OSError, RuntimeError, StopIteration) as error:
        print(json.dumps({"engine": f"not usable: {error}", "gpu_offload": False, "devices": []}))


def kernels_main() -> None:
    """A helper process's main: tries the CPU's special kernels but those on the command line.

    Prints each one's name, and behind it what is wrong with it: a name alone is one that was not survived.
    """
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    ggml = Ggml(import_llama())
    for name, kind in ggml.kernels().items():
        if name not in sys.argv[1:]:
            print(name, end="", flush=True)
            print(f"\t{ggml.try_kernel(kind)}", flush=True)


@dataclass(frozen=True)
class LoadPlan:
    """How much of a model goes where, and how much context it gets."""

    ctx: int  # tokens of one sequence
    pool: int  # cells that all share; 0: the model keeps nothing of a text
    sequences: int  # in the context at once, and prefixes of ended ones
    gpu_layers: int = 0
    cpu_moe: int = 0
    memory_need: int = 0  # bytes of RAM that it takes when the pool is full


def plan_load(model: ModelInfo, setup: Setup, free: int | None, gpus: Seq[int] = (), weights: Weights | None = None) -> LoadPlan:
    """Plans a load into `free` bytes of RAM (None: nobody knows) and of each GPU. LoadError, with numbers, if it cannot fit."""
    options, rung, own = setup.options, setup.rung, model.context_length or 8192
    kv, ctx = model.kv or KvShape(), min(options.ctx or min(own, 8192), own)
    spare = 2 if any(kv.states) else options.parallel + 8  # rows for prefixes; a state takes megabytes
    sequences = min(options.parallel + spare, 256)  # llama.cpp's LLAMA_MAX_SEQ
    pool = 0 if kv == KvShape() and model.kv else ctx if rung.small_pool or model.embedding else options.kv_pool or 4 * ctx
    placed = Placement(0, 0, pool)
    if gpus and not rung.cpu:
        placed = place(weights or Weights((), model.size_bytes), kv, gpus, ctx, max(pool, ctx), options.kv_type, sequences,
                       4 * GRAPH_BYTES, options.gpu_layers, options.n_cpu_moe, rung.gpu_share)  # fmt: skip
        as_fits = options.gpu_layers is None and rung.gpu_share == 1
        if setup.others_idle and as_fits and weights and placed.gpu_layers <= len(weights.layers):
            raise LoadError(f"only {placed.gpu_layers} of {len(weights.layers)} layers fit the GPU beside other models", "room")
        pool = placed.pool if pool else 0
    need, on_cpu = _ram_need(model, weights, placed)
    each, need = kv.token_bytes(options.kv_type) * on_cpu, need + int(kv.state_bytes(sequences) * on_cpu)
    if free is not None and on_cpu:
        pool = _fit_pool(model, options, ctx, pool, each, free - need)
    cells = -(-max(pool, ctx) // 256) * 256 if pool else 0
    return LoadPlan(ctx, cells, sequences, placed.gpu_layers, placed.cpu_moe, int(need + each * cells) + GRAPH_BYTES)


def _ram_need(model: ModelInfo, weights: Weights | None, placed: Placement) -> tuple[int, float]:
    """Bytes of the weights that stay in RAM, and the share of the layers that does."""
    if weights is None or not weights.layers or not placed.gpu_layers:
        return (0, 0.0) if placed.gpu_layers else (model.size_bytes, 1.0)
    first = max(0, len(weights.layers) - placed.gpu_layers)
    gone = sum(total for total, _ in weights.layers[first:]) - sum(e for _, e in weights.layers[first : placed.cpu_moe])
    gone += weights.output if placed.gpu_layers > len(weights.layers) else 0
    return max(0, model.size_bytes - gone), first / len(weights.layers)


def _fit_pool(model: ModelInfo, options: EngineOptions, ctx: int, pool: int, each: float, free: int) -> int:
    """The pool's tokens with so many free bytes beside the weights: a quarter of them at most, but one context at least."""
    left = free - GRAPH_BYTES
    if free < 0:
        have = human_bytes(max(0, free + model.size_bytes))
        raise LoadError(f"the weights need {human_bytes(model.size_bytes)}, {have} of memory are available", "room")
    if pool and each * ctx > left:
        fits = max(0, int(left // each)) // 256 * 256
        advice = f"--ctx {fits} would fit" if fits >= 256 else "no context would fit"
        raise LoadError(f"a context of {ctx} tokens needs {human_bytes(each * ctx)} of KV cache, "
                        f"{human_bytes(max(left, 0))} are available; {advice}", "room")  # fmt: skip
    fixed = options.kv_pool or model.embedding or not each
    return pool if fixed else max(min(pool, int(left / 4 // each)), min(pool, ctx))


class Vocabulary:
    """A model's tokens: text to tokens (any thread), tokens to the bytes they stand for."""

    SHORTEST = 4  # bytes that the longest piece has at least; a character has no more
    COUNTED = MIB  # characters that are always tokenized, to say exactly how many tokens: a megabyte takes about a second
    MAX_RUN = 4096  # characters; see `_cut`

    def __init__(self, c: Any, model: Any, np: Any) -> None:
        import ctypes

        self.c, self.np, self.ctypes, self.handle, self.model = c, np, ctypes, c.llama_model_get_vocab(model), model
        self.size, self.kind = c.llama_vocab_n_tokens(self.handle), c.llama_vocab_type(self.handle)
        self.eog = frozenset(t for t in range(self.size) if c.llama_vocab_is_eog(self.handle, t))
        self.eog_array = np.array(sorted(self.eog), dtype=np.int64)
        template = c.llama_model_chat_template(model, b"rerank")
        self.rerank_template = template.decode("utf-8", "replace") if template else ""
        self.nothing = np.array([max(c.llama_vocab_bos(self.handle), 0)], np.int32)  # what an empty text is read as
        self._pieces: dict[int, bytes] = {}
        self.marker_pieces: dict[int, str] = {}  # names of control tokens: a chat shows those of its format
        self.specials = tuple(self._read_specials())

    def _read_specials(self) -> Iterator[str]:
        """The names of control, unknown and marker tokens, which text from users must not become."""
        attribute = self.c.llama_vocab_get_attr
        control = self.c.LLAMA_TOKEN_ATTR_CONTROL | self.c.LLAMA_TOKEN_ATTR_UNKNOWN
        special = control | self.c.LLAMA_TOKEN_ATTR_USER_DEFINED  # what llama.cpp finds in a text whose specials it parses
        for token in [t for t in range(self.size) if attribute(self.handle, t) & special]:
            name = self.name(token).decode("utf-8", "replace")
            if attribute(self.handle, token) & control:
                self.marker_pieces[token] = name
            if attribute(self.handle, token) & control or re.fullmatch(r"[<\[].*[>\]]", name):
                yield name

    def least_tokens(self, segments: Seq[str], ctx: int) -> int:
        """A lower bound of the tokens these texts become; 0 where it cannot reach `ctx`, or to count them takes no time.

        No token stands for more bytes than the longest piece has, and that one has at least SHORTEST.
        """
        size = sum(len(s) for s in segments)  # characters: no more than there are bytes
        return -(-size // self.longest) if size >= max(self.SHORTEST * ctx, self.COUNTED) else 0

    @functools.cached_property
    def longest(self) -> int:
        """Bytes of the longest piece, or a little more. A walk of 0.1 s over a large vocabulary, so only long texts ask."""
        return max(self.SHORTEST, *(len(self.c.llama_vocab_get_text(self.handle, t)) for t in range(self.size)))

    def tokens(self, *texts: str, first: bool = False, last: bool = False, special: bool = True) -> Any:
        """The tokens of texts, each by itself, an int32 array; with `special`, names of special tokens become these.

        `first` and `last` add the tokens that the model wants before and behind a text (BOS, CLS; EOS, SEP).
        """
        parts, (before, _, behind) = list[Any](), self.ends
        for text in texts:
            for at, part in enumerate(self._cut(text)):
                # within a text SentencePiece puts no space before a part, as it does not behind a line break
                left = b"\n" if at and self.kind == self.c.LLAMA_VOCAB_TYPE_SPM else b""
                parts.append(self._call(left + part.encode("utf-8", "replace"), special)[len(self._call(left, special)) :])
        return self.np.concatenate([before[: len(before) * first], *parts, behind[: len(behind) * last]])

    def _cut(self, text: str) -> Iterator[str]:
        """Cuts a text that llama.cpp's tokenizers must not be given whole; each cut is a boundary between tokens.

        Of a byte-pair tokenizer: what has no white space, or nothing else, for long. It splits the text with std::regex
        first, which recurses once a character of a match (libstdc++; 0.9 KiB of stack each). SentencePiece: at line breaks,
        if there are any. It copies all tokens so far at each character that it has no token for (llama-vocab.cpp,
        resegment: the reserve), which takes a minute for a million.
        """
        start, most, cuts = 0, self.MAX_RUN, list[int]()
        if len(text) > most and self.kind == self.c.LLAMA_VOCAB_TYPE_BPE:
            cuts = [at for run in re.finditer(r"\S+|\s+", text) for at in range(run.start() + most, run.end(), most)]
        elif len(text) > most and self.kind == self.c.LLAMA_VOCAB_TYPE_SPM:
            cuts = [part.end() for part in re.finditer(rf"(?s).{{1,{most}}}(?:(?<=\n)(?!\n)|\Z)|.{{{most}}}", text)][:-1]
        for at in cuts:
            yield text[start:at]
            start = at
        yield text[start:]

    def _call(self, data: bytes, special: bool) -> Any:
        """Usually fewer tokens than bytes; an unknown space takes three."""
        count = len(data) + 16
        for _ in range(2):
            buffer = self.np.empty(count, self.np.int32)
            rows = buffer.ctypes.data_as(self.ctypes.POINTER(self.ctypes.c_int32))
            count = self.c.llama_tokenize(self.handle, data, len(data), rows, len(buffer), False, special)
            if count >= 0:
                return buffer[:count]
            count = min(-count, 64 * (len(data) + 16))  # what it would need; INT32_MIN: more than anybody has
        raise GenerationFailed("the tokenizer failed")

    def gap_names(self) -> dict[str, str]:
        """The names of the tokens that mark a gap to fill, as far as the model has them and text finds them."""
        ids = {k: getattr(self.c, f"llama_vocab_fim_{k}")(self.handle) for k in ("pre", "suf", "mid", "rep", "sep")}
        names = {k: self.name(id).decode("utf-8", "replace") for k, id in ids.items() if id >= 0}
        return {k: name for k, name in names.items() if self.tokens(name).tolist() == [ids[k]]}

    def pair(self, query: str, document: str) -> Any:
        """A query and a document as rerankers have learned them: in the model's own template, else BOS q EOS SEP d EOS."""
        texts = {"{query}": query, "{document}": document}
        if not self.rerank_template:
            first, middle, last = self.ends
            return self.np.concatenate([first, self.tokens(query, special=False), middle, self.tokens(document, special=False),
                                        last])  # fmt: skip
        parts = re.split("({query}|{document})", self.rerank_template)
        if any(name in text for text in texts.values() for name in self.specials):
            return self.np.concatenate([self.tokens(texts.get(part, part), special=part not in texts) for part in parts])
        return self.tokens("".join(texts.get(part, part) for part in parts))  # in one piece: a space belongs to its word

    @functools.cached_property
    def ends(self) -> list[Any]:
        """The tokens before a text, between two texts, and behind the last one, as the model wants them."""
        c, vocab = self.c, self.handle
        bert = self.kind == c.LLAMA_VOCAB_TYPE_WPM  # its tokenizer asks no flag: CLS text SEP
        bos = [c.llama_vocab_bos(vocab)] if bert or c.llama_vocab_get_add_bos(vocab) else []
        eos = [c.llama_vocab_eos(vocab)] if c.llama_vocab_get_add_eos(vocab) else []
        sep = [c.llama_vocab_sep(vocab)] if bert or c.llama_vocab_get_add_sep(vocab) else []
        return [self.np.array([t for t in ids if t >= 0], self.np.int32) for ids in (bos, eos + sep, sep if bert else eos)]

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for in text; control tokens give none."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._render(token, False)
        return found

    def shown(self, token: int) -> bytes:
        """The bytes in which a marker is looked for: a control token's name, any other's piece."""
        name = self.marker_pieces.get(token)
        return self.piece(token) if name is None else name.encode()

    def tokens_inside(self, data: bytes) -> Seq[int]:
        """The tokens of a text inside another, special ones only by names in text; none where they would stand for other bytes.

        A tokenizer that begins a text with a space of its own is shown a line break first.
        """
        for before in (b"", b"\n"):
            tokens = self._call(before + data, False).tolist()
            pieces = [self.piece(token) for token in tokens]
            ends = [0, *itertools.accumulate(map(len, pieces))]
            start = ends[-1] - len(data)
            if start in ends and b"".join(pieces).endswith(data):
                return tokens[ends.index(start) :]
        return ()

    @functools.cached_property
    def spelling(self) -> Spelling:
        """All pieces in order. Made in 0.5 s for a large vocabulary."""
        return Spelling(self)

    def name(self, token: int) -> bytes:
        """The bytes a token is called by, control tokens too; none for a token that is not there."""
        return self._render(token, True) if token >= 0 else b""

    def _render(self, token: int, special: bool) -> bytes:
        buffer = self.ctypes.create_string_buffer(256)
        size = self.c.llama_token_to_piece(self.handle, token, buffer, 256, 0, special)
        if size < 0:
            buffer = self.ctypes.create_string_buffer(-size)
            size = self.c.llama_token_to_piece(self.handle, token, buffer, -size, 0, special)
        return bytes(buffer.raw[:size])


class Llama:
    """llama.cpp's model: weights, vocabulary, adapters, and how much context fits. `main` is where sequences live."""

    SMALL = 16 * MIB  # a step of a model below this is over before a second thread has woken

    def __init__(self, load: Load, progress: Callable[[float], None]) -> None:
        import ctypes

        import numpy

        self.c, self.np, self.ctypes = import_llama(), numpy, ctypes
        self.info, self.setup, self.options = load.model, load.setup, load.setup.options
        self.size_bytes, self.embedding = load.model.size_bytes, load.model.embedding
        self.notes: list[str] = []
        self.log_lines: deque[tuple[int, str]] = deque(maxlen=20)  # warnings and errors: level, text
        self._log = self.c.llama_log_callback(self._on_log)  # kept: the library calls it until the process ends
        self.c.llama_log_set(self._log, ctypes.c_void_p())
        self.c.llama_backend_init()
        self.ggml = Ggml(self.c)
        self.ggml.leave_out(self.setup.rung.without)
        self.devices = self._devices()
        self.plan = self._plan()
        self.ctx, self.pool, self.on_cpu = self.plan.ctx, self.plan.pool, self.plan.gpu_layers == 0
        self.threads = self.options.threads or (1 if self.size_bytes < self.SMALL else physical_cores())  # of a step
        self.kv_bytes = (self.info.kv or KvShape()).token_bytes(self.options.kv_type)  # of a token's KV cache
        # what other threads of the engine wait at while it computes, if that takes all processors
        self.gate = Gate() if self.on_cpu and self.threads >= len(processors()) else None
        self._load_model(progress)
        kind = self.metadata("general.architecture")  # where every token attends to all, an input is computed in one piece
        self.looks_both_ways = kind in EMBEDDERS or self.metadata(f"{kind}.attention.causal") == "false"
        self.vocab = Vocabulary(self.c, self.model, numpy)
        self.machines = Machines(self.vocab)
        self.cuttable = not (self.c.llama_model_is_recurrent(self.model) or self.c.llama_model_is_hybrid(self.model))
        self.n_swa = int(self.c.llama_model_n_swa(self.model))
        self.adapters = [self._adapter(file) for file in self.options.lora]
        n_batch = max(self.options.batch, self.options.parallel)
        with zero_pages_returned():
            self.main = EmbeddingContext(self) if self.embedding else Context(self, self.pool, n_batch, self.plan.sequences)

    def _on_log(self, level: int, line: bytes, _: Any) -> None:
        if level >= 3:  # GGML_LOG_LEVEL_WARN and ERROR
            self.log_lines.append((level, line.decode("utf-8", "replace").strip()))

    def _devices(self) -> list[Device]:
        """The devices beside the CPU that the options name; all GPUs if they name none. LoadError for one that is not there."""
        known = {d.name: d for d in self.ggml.devices() if d.kind != "CPU"}
        wanted, main = self.options.device, self.options.main_gpu
        if self.setup.rung.cpu or wanted in (("none",), ()):
            return []
        if unknown := set(wanted or ()) - set(known):
            raise LoadError(f"there is no device {min(unknown)}; there are {', '.join(known) or 'none but the CPU'}")
        used = [known[name] for name in wanted] if wanted else [d for d in known.values() if d.kind in ("GPU", "IGPU")]
        if main is not None and main >= len(used):
            raise LoadError(f"--main-gpu {main}: there are {len(used)} GPUs, the first one is 0")
        return used if main is None else [used[main]]

    def _plan(self) -> LoadPlan:
        """Raises LoadError when the model does not fit."""
        free, weights, own = available_memory(), None, self.info.context_length
        if self.devices:
            with contextlib.suppress(GgufError, OSError):
                weights = read_weights(shard_paths(self.info.path))
        if self.options.ctx and own and self.options.ctx > own:
            self.notes.append(f"--ctx {self.options.ctx} is beyond the model's own context; using {own}")
        free = None if free is None else free - self.setup.reserved
        return plan_load(self.info, self.setup, free, [d.free for d in self.devices], weights)

    def _load_model(self, progress: Callable[[float], None]) -> None:
        said = [0.0]

        def on_progress(fraction: float, _: Any) -> bool:
            if fraction - said[0] >= 0.01 or fraction >= 1:
                said[0] = fraction
                progress(fraction)
            return True

        params = self._model_params()
        params.progress_callback = self.c.llama_progress_callback(on_progress)
        self.model = self.c.llama_model_load_from_file(os.fsencode(self.info.path), params)
        if not self.model:
            raise self.refusal("llama.cpp cannot load the file")
        if self.c.llama_model_has_encoder(self.model) and self.c.llama_model_has_decoder(self.model):
            raise LoadError("an encoder-decoder model (T5 and the like), which is not supported")

    def _model_params(self) -> Any:
        c, options, params = self.c, self.options, self.c.llama_model_default_params()
        kinds = {name: kind for name, kind, *_ in c.llama_model_params._fields_}
        params.load_mode = c.LLAMA_LOAD_MODE_MMAP if options.mmap else c.LLAMA_LOAD_MODE_NONE
        params.use_extra_bufts = not self.setup.rung.plain
        params.n_gpu_layers = self.plan.gpu_layers  # 0 without devices
        self._devices_array = (self.ctypes.c_void_p * (len(self.devices) + 1))(*[d.handle for d in self.devices], None)
        params.devices = self.ctypes.cast(self._devices_array, kinds["devices"])
        if options.tensor_split:
            most = max(c.llama_max_devices(), len(options.tensor_split))
            self._split = (self.ctypes.c_float * most)(*options.tensor_split)
            params.tensor_split = self.ctypes.cast(self._split, kinds["tensor_split"])
        if rules := self._overrides():
            members = [("pattern", self.ctypes.c_char_p), ("kind", self.ctypes.c_void_p)]
            rule = type("Rule", (self.ctypes.Structure,), {"_fields_": members})
            array: Any = self.ctypes.ARRAY(rule, len(rules) + 1)  # type: ignore[type-var]
            self._rules = array(*rules)  # a rule of zeros ends it; kept as long as the model
            params.tensor_buft_overrides = self.ctypes.cast(self._rules, kinds["tensor_buft_overrides"])
        return params

    def _overrides(self) -> list[tuple[bytes, int]]:
        """Patterns of tensors' names, and the buffer types that these go to: as asked, and experts that stay on the CPU."""
        devices, rules = {d.name: d.handle for d in self.ggml.devices()}, list[tuple[str, int]]()
        for pattern, name in self.options.override_tensor:
            if name not in devices:
                raise LoadError(f"--override-tensor {pattern}={name}: there is no device {name}, only {', '.join(devices)}")
            rules.append((pattern, devices[name]))
        if layers := "|".join(map(str, range(self.plan.cpu_moe))):
            rules.append((rf"blk\.({layers}){EXPERTS}", self.ggml.cpu))
        return [(pattern.encode(), self.ggml.buffer_type(device)) for pattern, device in rules]

    def refusal(self, what: str) -> LoadError:
        """The error for something that llama.cpp refuses, with the first error that it logged, or else the first warning."""
        wants_memory = any(re.search(r"alloc|out of memory|insufficient", line, re.I) for _, line in self.log_lines)
        words = [line.split(": ", 1)[-1] for _, line in sorted(self.log_lines, key=lambda logged: -logged[0]) if line]
        return LoadError(": ".join([what, *words[:1]]), "memory" if wants_memory else "")

    @property
    def placed(self) -> str:
        """Where the layers are; "" where there is only the CPU."""
        layers, names = int(self.c.llama_model_n_layer(self.model)), ", ".join(d.name for d in self.devices)
        if self.on_cpu:
            return f"on the CPU, not on {names}" if names else ""
        moe = f", experts of {self.plan.cpu_moe} layers on the CPU" if self.plan.cpu_moe else ""
        return f"{'all' if self.plan.gpu_layers > layers else self.plan.gpu_layers} of {layers} layers on {names}{moe}"

    @functools.cached_property
    def candidate_rows(self) -> Any:
        """A llama_token_data of each token, without its logit."""
        rows = self.np.zeros(self.vocab.size, [("id", "i4"), ("logit", "f4"), ("p", "f4")])
        rows["id"] = self.np.arange(self.vocab.size)
        return rows

    def trial(self) -> None:
        """Decodes a few tokens and then one, as steps do: what cannot work on this machine shows before it counts as loaded."""
        count = min(4, self.main.n_batch, max(1, self.ctx - 2))
        rows = Rows(self.vocab.nothing.repeat(count + 1), 0)
        rows.row = 0
        for more in (count, 1):
            rows.n_tokens += more
            if status := self.main.decode([(rows, more)]):
                raise self.refusal(f"llama.cpp cannot compute: llama_decode returned {status}")
            rows.n_computed += more
        self.main.clear(False)

    def metadata(self, key: str) -> str:
        """A value of the GGUF header as text, "" when absent."""
        buffer = self.ctypes.create_string_buffer(256)
        size = self.c.llama_model_meta_val_str(self.model, key.encode(), buffer, 256)
        return buffer.value.decode("utf-8", "replace") if size >= 0 else ""

    def loaded(self) -> Loaded:
        """The description of this model that the parent works with."""
        c, vocab, options = self.c, self.vocab.handle, self.options
        bos, eos = (self.vocab.name(t(vocab)).decode("utf-8", "replace") for t in (c.llama_vocab_bos, c.llama_vocab_eos))
        templates: dict[str, str] = {}
        for name in (None, b"tool_use"):
            source = c.llama_model_chat_template(self.model, name)
            if source and source.decode("utf-8", "replace") not in templates.values():
                templates[(name or b"").decode()] = source.decode("utf-8", "replace")
        if options.chat_template:
            templates = {"": options.chat_template}
        if not templates and not self.embedding:
            self.notes.append("the model has no chat template; chats are written in ChatML")
        ends = tuple(self.vocab.name(t).decode("utf-8", "replace") for t in sorted(self.vocab.eog))
        free = {d.name: d.free for d in self.ggml.devices() if self.devices}
        taken = sum(max(0, d.free - free[d.name]) for d in self.devices)  # since the load began; other programs may have a part
        chat = ChatFacts(templates, bos, bool(c.llama_vocab_get_add_bos(vocab)), eos, self.vocab.specials, ends,
                         self.vocab.gap_names())  # fmt: skip
        return Loaded(self.ctx, self.pool, options.parallel, chat, tuple(self.notes), int(self.pool * self.kv_bytes),
                      self.plan.memory_need, self.placed, not self.on_cpu, taken)  # fmt: skip

    def _adapter(self, file: str) -> Any:
        adapter = self.c.llama_adapter_lora_init(self.model, os.fsencode(file))
        if not adapter:
            raise self.refusal(f"the LoRA adapter {file} cannot be applied")
        return adapter


ZERO_BLOCK = 4 * MIB  # bytes looked at together by zero_pages_returned


@contextlib.contextmanager
def zero_pages_returned() -> Iterator[None]:
    """Gives large blocks of zeros that are allocated meanwhile back to the system, which makes pages of them when written.

    llama.cpp wipes a KV cache when it makes it, so that all of it takes memory before a single token has come: of
    SmolLM2 seven times the weights. An anonymous page without content reads as zeros: nothing changes but the memory
    (madvise(2), Linux). Another thread must not write to memory that is new meanwhile; the two that run allocate no blocks.
    """
    before = _anonymous_blocks(outward=True)
    yield
    new = _anonymous_blocks(outward=False) - before
    if new:
        import ctypes

        import numpy

        madvise, words = ctypes.CDLL(None).madvise, ctypes.POINTER(ctypes.c_uint64)
        for at in new:
            if not numpy.ctypeslib.as_array(ctypes.cast(at, words), (ZERO_BLOCK // 8,)).any():
                madvise(ctypes.c_void_p(at), ctypes.c_size_t(ZERO_BLOCK), 4)  # MADV_DONTNEED


def _anonymous_blocks(outward: bool) -> set[int]:
    """Addresses of the blocks within private writable memory of no file; outward: of those that have any (proc(5), maps)."""
    found: set[int] = set()
    with contextlib.suppress(OSError, ValueError), open("/proc/self/maps") as file:
        for place, access, _, _, inode, *name in map(str.split, file):
            if access == "rw-p" and inode == "0" and not name:
                start, end = (int(side, 16) for side in place.split("-"))
                first, last = (start // ZERO_BLOCK, -(-end // ZERO_BLOCK)) if outward else (
                    -(-start // ZERO_BLOCK), end // ZERO_BLOCK)  # fmt: skip
                found.update(range(first * ZERO_BLOCK, last * ZERO_BLOCK, ZERO_BLOCK))
    return found


class Rows:
    """Tokens on their way through a context: how many have their cells there, and in which of its rows."""

    scored = False  # whether the logits behind each token are wanted

    def __init__(self, tokens: Any, n_tokens: int) -> None:
        self.tokens, self.n_tokens = tokens, n_tokens  # int32, at least n_tokens of them
        self.n_computed = 0  # so many of the first ones have cells
        self.row = -1

    @property
    def pending(self) -> int:
        """Tokens not yet evaluated: 1 while decoding, more while a prompt is read."""
        return self.n_tokens - self.n_computed


class Context:
    """llama.cpp's context: a KV cache, and the decoding into it. One thread decodes."""

    PAUSE_EVERY = 2  # operations of a graph; each takes up to 20 ms with 256 rows of a 0.5B model on two cores
    EVERY_ROW = False  # whether each row of a batch is wanted, or only that of a sequence's last token

    def __init__(self, llama: Llama, cells: int, n_batch: int, n_seq: int, pause: Callable[[], bool] | None = None) -> None:
        """Room for `cells` tokens of `n_seq` sequences, read in batches of `n_batch`. LoadError when llama.cpp refuses.

        `pause` is called every few operations of a decode, on the decoding thread; False ends the decode there.
        """
        self.llama, self.c, self.np, self.ctypes = llama, llama.c, llama.np, llama.ctypes
        self.cells, self.n_batch, self.n_seq = cells, n_batch, n_seq
        self.pause_every = self.PAUSE_EVERY
        self._abort = self.ctypes.create_string_buffer(2)
        asked = itertools.count(1)
        # llama.cpp asks before each operation whether its result is wanted, and calls again when it is there
        self._callback = self.c.ggml_backend_sched_eval_callback(  # kept: llama.cpp calls it
            lambda _tensor, asks, _data: next(asked) % self.pause_every == 0 if asks else pause()
        ) if pause else None
        llama.log_lines.clear()
        self.handle = self.c.llama_init_from_model(llama.model, self._params())
        if not self.handle:
            raise llama.refusal("llama.cpp cannot make a context")
        if llama.adapters:
            count = len(llama.adapters)
            adapters = (self.c.llama_adapter_lora_p_ctypes * count)(*llama.adapters)
            self.c.llama_set_adapters_lora(self.handle, adapters, count, (self.ctypes.c_float * count)(*[1.0] * count))
        self.memory = self.c.llama_get_memory(self.handle)
        self._make_batch()

    def _params(self) -> Any:
        options, params = self.llama.options, self.c.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified, params.swa_full = self.cells, self.n_seq, True, True
        params.n_batch = params.n_ubatch = self.n_batch
        params.n_outputs_max = self.n_seq  # else n_ubatch × n_vocab logits are reserved: 300 MiB for a large vocabulary
        params.n_threads = params.n_threads_batch = self.llama.threads
        params.flash_attn_type = {"auto": -1, "on": 1, "off": 0}[options.flash_attn]
        params.type_k = params.type_v = getattr(self.c, f"GGML_TYPE_{options.kv_type.upper()}")
        params.no_perf = True
        # in C, so that no step pays for the interpreter: strlen of a buffer, non-zero aborts the decode
        strlen = self.ctypes.CDLL("msvcrt" if sys.platform == "win32" else None).strlen
        params.abort_callback = self.ctypes.cast(strlen, self.c.ggml_abort_callback)
        params.abort_callback_data = self.ctypes.cast(self._abort, self.ctypes.c_void_p)
        if self._callback:
            params.cb_eval = self._callback
        return params

    def abort(self, wanted: bool) -> None:
        """Makes a decode that another thread runs return 2 soon; False takes that back."""
        self._abort[0] = b"\1" if wanted else b"\0"

    def _make_batch(self) -> None:
        """A llama_batch over numpy arrays, with a table of sequence pointers: filling 500 rows takes microseconds."""
        np, n = self.np, self.n_batch
        self.tokens, self.positions, self.flags = np.zeros(n, np.int32), np.zeros(n, np.int32), np.zeros(n, np.int8)
        self.sequences, self._ones = np.zeros(n, np.uintp), np.ones(n, np.int32)
        self._ids = np.arange(self.n_seq, dtype=np.int32)
        self.pointers = self._ids.ctypes.data + 4 * np.arange(self.n_seq, dtype=np.uintp)
        self.counting = np.arange(max(self.llama.ctx, self.cells) + 1, dtype=np.int32)
        self.batch = self.c.llama_batch()
        kinds = {name: kind for name, kind, *_ in self.c.llama_batch._fields_}
        for name, rows in {"token": self.tokens, "pos": self.positions, "n_seq_id": self._ones,
                           "seq_id": self.sequences, "logits": self.flags}.items():  # fmt: skip
            setattr(self.batch, name, self.ctypes.cast(rows.ctypes.data, kinds[name]))

    def decode(self, plan: Seq[tuple[Rows, int]]) -> int:
        """Evaluates so many next tokens of each sequence.

        Returns llama_decode's status: 0 done, 1 no free cells, 2 aborted, below zero an error. At 1 nothing has changed.
        """
        at = 0
        for sequence, count in plan:
            done, end = sequence.n_computed, at + count
            self.tokens[at:end] = sequence.tokens[done : done + count]
            self.positions[at:end] = self.counting[done : done + count]
            self.sequences[at:end] = self.pointers[sequence.row]
            self.flags[at:end] = every = self.EVERY_ROW or sequence.scored
            self.flags[end - 1] = every or done + count == sequence.n_tokens
            at = end
        self.batch.n_tokens = at
        status = int(self.c.llama_decode(self.handle, self.batch))
        self.c.llama_synchronize(self.handle)  # a GPU computes on; its time belongs to this step
        return status

    def logits(self, rows: int) -> Any:
        """The logits of the last decode, shape (rows, n_vocab), float32; a view that the next decode overwrites."""
        address = self.ctypes.cast(self.c.llama_get_logits(self.handle), self.ctypes.c_void_p).value
        row = self.ctypes.c_float * self.llama.vocab.size
        return self.np.frombuffer((row * rows).from_address(address), self.np.float32).reshape(rows, -1)

    # KV cache. Cutting needs `cuttable`; whole sequences can always be dropped and copied.

    def drop(self, row: int, start: int = -1) -> None:
        """Frees a sequence's cells from position `start` on."""
        if self.memory:  # a model that looks both ways has none
            self.c.llama_memory_seq_rm(self.memory, row, start, -1)

    def share(self, source: int, target: int, count: int) -> None:
        """Lets `target` begin with the first `count` cells of `source`: metadata only, nothing is copied."""
        self.c.llama_memory_seq_cp(self.memory, source, target, *((0, count) if self.llama.cuttable else (-1, -1)))

    def oldest(self, row: int) -> int:
        """The first position whose cells are there: only a sliding window overwrites any."""
        return int(self.c.llama_memory_seq_pos_min(self.memory, row)) if self.llama.n_swa else 0

    def save(self, row: int) -> Any:
        """A sequence's cells as bytes, to be kept outside the cache; None if they cannot be had."""
        size = self.c.llama_state_seq_get_size(self.handle, row)
        data = self.np.empty(size, self.np.uint8)
        target = data.ctypes.data_as(self.ctypes.POINTER(self.ctypes.c_uint8))
        return data if self.c.llama_state_seq_get_data(self.handle, target, size, row) == size else None

    def restore(self, row: int, data: Any) -> bool:
        """Puts saved cells into an empty row; False when there is no room for them."""
        source = data.ctypes.data_as(self.ctypes.POINTER(self.ctypes.c_uint8))
        return bool(self.c.llama_state_seq_set_data(self.handle, source, len(data), row))

    def clear(self, data: bool) -> None:
        """Frees all cells, so that the next ones are the first again; with `data`, wipes what they held."""
        if self.memory:
            self.c.llama_memory_clear(self.memory, data)


class EmbeddingContext(Context):
    """A context that makes vectors.

    Where the model looks both ways, a batch holds whole inputs, and llama.cpp pools their tokens' states: by the model's
    own rule, else it takes their mean. Otherwise inputs are read in slices and pooled here, for llama.cpp pools only what
    is in one batch. A reranker's score always comes from llama.cpp, which has the layers behind the pooling.
    """

    EVERY_ROW = True
    BATCH = 512  # tokens: the full speed of large batches, and cancels and newcomers need not wait long
    LOGITS = 128 * MIB  # llama.cpp computes logits for each token of a model that has them, and keeps them twice
    WHOLE, SLICED = 256, 64  # inputs in the context at once; llama.cpp's most, and enough to fill a batch

    def __init__(self, llama: Llama, pause: Callable[[], bool] | None = None) -> None:
        """Raises LoadError when llama.cpp refuses. `pause` as in Context."""
        self.whole = llama.looks_both_ways
        self.pooling = POOLINGS.get(int(llama.metadata(f"{llama.metadata('general.architecture')}.pooling_type") or 0), "mean")
        self.batch_tokens = self.batch_size(llama)  # of a batch, but for a longer input that looks both ways
        n_seq = self.WHOLE if self.whole else self.SLICED if llama.cuttable else 4  # a recurrent state takes megabytes
        cells = -(-max(llama.ctx, self.batch_tokens) // n_seq) * n_seq  # else llama.cpp's graph does not fit together
        super().__init__(llama, cells, cells if self.whole else self.batch_tokens, n_seq, pause)
        score = self.pooling == "rank"
        self.size = int(self.c.llama_model_n_cls_out(llama.model) if score else self.c.llama_model_n_embd_out(llama.model))

    @classmethod
    def batch_size(cls, llama: Llama) -> int:
        most = min(cls.BATCH, llama.options.batch)
        if not llama.looks_both_ways:
            most = min(most, cls.LOGITS // (2 * 4 * llama.vocab.size), llama.ctx)
        return max(cls.SLICED, most // cls.SLICED * cls.SLICED)

    @classmethod
    def memory_need(cls, llama: Llama) -> int:
        """Bytes that such a context takes, about: for a model that generates, which has one already."""
        return int(llama.kv_bytes * llama.ctx) + 2 * 4 * cls.batch_size(llama) * llama.vocab.size + 64 * MIB

    def _params(self) -> Any:
        params = super()._params()
        rules = {name: number for number, name in POOLINGS.items()}
        params.embeddings = True
        params.pooling_type = rules[self.pooling] if self.whole or self.pooling == "rank" else 0  # LLAMA_POOLING_TYPE_NONE
        params.n_outputs_max = 0  # every token of a batch
        return params

    def take(self, input: Rows, at: int, count: int, pooled: Any) -> Any:
        """What an input's vector is after the last decode, where `count` of its tokens stood from row `at` on.

        `pooled` is what it was after the decodes before, None at first; float32, shape (size,).
        """
        if self.whole or self.pooling == "rank":
            pointer = self.c.llama_get_embeddings_seq(self.handle, input.row)
            return self.np.ctypeslib.as_array(pointer, (self.size,)).copy()
        pointer = self.c.llama_get_embeddings(self.handle)
        states = self.np.ctypeslib.as_array(pointer, (self.batch.n_tokens, self.size))[at : at + count]
        if self.pooling == "mean":
            total = states.sum(axis=0, dtype=self.np.float32)
            return total if pooled is None else pooled + total  # its length does not matter
        if self.pooling == "cls":
            return states[0].copy() if pooled is None else pooled
        return states[-1].copy()

    def finished(self, vector: Any, dimensions: int | None) -> bytes | None:
        """A vector of length 1, cut to `dimensions`, or a score from 0 to 1: float32, little-endian. None if not a number.

        A reranker with one output gives a logit; one with two (Qwen3) gives probabilities, that of yes first.
        """
        if not self.np.isfinite(vector).all():
            return None
        if self.pooling == "rank":
            score = float(vector[0])
            vector = self.np.array([score if self.size > 1 else 0.5 + 0.5 * math.tanh(score / 2)])
        else:
            vector = vector[:dimensions].astype(self.np.float64)
            vector /= self.np.linalg.norm(vector) or 1.0
        return bytes(vector.astype("<f4").tobytes())


# ── 8. Sampling (child) ───────────────────────────────────────────────────────────────────────────────────────────────
# How the next token is picked, what a grammar leaves to pick, and the text that tokens become.


class Sampler:
    """Picks one sequence's tokens: greedy straight from the logits, else with llama.cpp's chain and its defaults.

    With a grammar the chain picks among all tokens. One that is refused is banned, and the chain picks again; where few
    tokens may come, or TRIES were refused, it picks among those that the grammar allows.
    """

    KEYS: ClassVar = {"temperature": "temp", "repeat_penalty": "penalty_repeat", "repeat_last_n": "penalty_last_n"}
    COLDEST = 1e-4  # temperatures below are 0: logits divided by less would leave float32, and infinities have no softmax
    LEAST = 1e-30  # of the likeliest token's probability; typical and Mirostat take the logarithm, and 0 has none
    TRIES = 64  # each costs what the chain costs, and a grammar's first list of what it allows as much as some hundred

    def __init__(self, llama: Llama, sampling: Sampling, prompt: Any) -> None:
        """Raises InvalidRequest for a bias of a token that does not exist, and for a grammar that cannot be read."""
        self.llama, self.sampling = llama, sampling
        self.banned = self._banned()
        self._picked: int | None = None  # what was picked before it was tried, until that is done
        self._refused = 0  # tokens, before that one
        self.grammar = Grammar(llama, sampling.constraint) if sampling.constraint else None
        self.chain: Any = None
        seed = 0xFFFFFFFF if sampling.seed is None else sampling.seed & 0xFFFFFFFF  # LLAMA_DEFAULT_SEED: a random one
        v: Any = replace(sampling, **dict(self._values()), seed=seed)
        self._greedy = v.temperature < self.COLDEST
        self._aims = bool(v.mirostat) and not self._greedy  # Mirostat picks: it replaces all but the bias and the temperature
        links, c = list(self._links(v)), llama.c
        if not links:
            return  # the likeliest token is taken
        if self._greedy:
            links.append(c.llama_sampler_init_greedy())
        self.chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        for link in links:
            c.llama_sampler_chain_add(self.chain, link)
        windows = (v.repeat_last_n if self._penalizes(v) else 0, v.dry_penalty_last_n if v.dry_multiplier else 0)
        for token in prompt[max(0, len(prompt) - max(map(self._window, windows))) :]:
            c.llama_sampler_accept(self.chain, int(token))

    def _values(self) -> Iterator[tuple[str, Any]]:
        """Each parameter: the request's, else the model file's (general.sampling.*) if it makes sense, else llama.cpp's."""
        for f in fields(Sampling):
            if "otherwise" in f.metadata and getattr(self.sampling, f.name) is None:
                value = f.metadata["otherwise"]
                with contextlib.suppress(ValueError, ApiError):
                    said = float(self.llama.metadata(f"general.sampling.{self.KEYS.get(f.name, f.name)}"))
                    value = f.metadata["check"](f.name, said)
                yield f.name, value

    def _banned(self) -> frozenset[int]:
        """Tokens that must not come: biased by −100, or those that end the text when that is to be ignored."""
        size = self.llama.vocab.size
        for token, _ in self.sampling.logit_bias:
            if token >= size:
                raise InvalidRequest(f"logit_bias: the model has no token {token}; its tokens are 0…{size - 1}", "logit_bias")
        banned = frozenset(token for token, bias in self.sampling.logit_bias if bias == -math.inf)
        return banned | (self.llama.vocab.eog if self.sampling.ignore_eos else frozenset())

    def _links(self, v: Any) -> Iterator[Any]:
        """The chain's samplers, in llama.cpp's order (common/sampling.cpp), but for one that takes the likeliest token."""
        c, vocab = self.llama.c, self.llama.vocab
        if v.logit_bias:
            biases = (c.llama_logit_bias * len(v.logit_bias))(*(c.llama_logit_bias(t, b) for t, b in v.logit_bias))
            yield c.llama_sampler_init_logit_bias(vocab.size, len(biases), biases)
        if self._aims:
            yield c.llama_sampler_init_min_p(self.LEAST, 1)
            yield c.llama_sampler_init_temp(v.temperature)
            if v.mirostat == 1:
                yield c.llama_sampler_init_mirostat(vocab.size, v.seed, v.mirostat_tau, v.mirostat_eta, 100)
            else:
                yield c.llama_sampler_init_mirostat_v2(v.seed, v.mirostat_tau, v.mirostat_eta)
            return
        if self._penalizes(v):
            last_n = self._window(v.repeat_last_n)
            yield c.llama_sampler_init_penalties(vocab.size, last_n, v.repeat_penalty, v.frequency_penalty, v.presence_penalty)
        if v.dry_multiplier:
            words = [s.encode() for s in v.dry_sequence_breakers]
            rows = (self.llama.ctypes.c_char_p * len(words))(*words)
            allowed, last_n = self._window(v.dry_allowed_length), self._window(v.dry_penalty_last_n)
            yield c.llama_sampler_init_dry(vocab.handle, v.dry_multiplier, v.dry_base, allowed, last_n, rows, len(words))
        if not self._greedy or v.typical_p < 1 or v.xtc_probability > 0:  # the other filters never drop the likeliest
            yield c.llama_sampler_init_top_n_sigma(v.top_n_sigma)  # llama.cpp makes nothing of those that are off
            yield c.llama_sampler_init_top_k(min(v.top_k, vocab.size))
            if v.typical_p < 1:
                yield c.llama_sampler_init_min_p(self.LEAST, 1)
                yield c.llama_sampler_init_typical(v.typical_p, 1)
            yield c.llama_sampler_init_top_p(v.top_p, 1)
            yield c.llama_sampler_init_min_p(v.min_p, 1)
            yield c.llama_sampler_init_xtc(v.xtc_probability, v.xtc_threshold, 1, v.seed)
        if not self._greedy:
            yield c.llama_sampler_init_temp_ext(v.temperature, v.dynatemp_range, v.dynatemp_exponent)
            yield c.llama_sampler_init_dist(v.seed)

    @staticmethod
    def _penalizes(v: Any) -> bool:
        return bool(v.repeat_last_n and (v.repeat_penalty != 1.0 or v.frequency_penalty or v.presence_penalty))

    def _window(self, tokens: int) -> int:
        """A number of tokens, at most the context: llama.cpp sets memory aside for all of them."""
        return self.llama.ctx if tokens < 0 else min(tokens, self.llama.ctx)

    def pick(self, logits: Any, row: int) -> int:
        """The next token, -1 when nothing may follow. `logits` is its row of the last decode, `row` its batch index.

        Raises NotYet, from its grammar: called again with the same logits it goes on where it was.
        """
        if self.sampling.ignore_eos:
            logits[self.llama.vocab.eog_array] = -math.inf
        if self.grammar:
            return self._pick_with(self.grammar, logits)
        if self.chain:
            token = int(self.llama.c.llama_sampler_sample(self.chain, self.llama.main.handle, row))
        else:
            token = int(logits.argmax())
        return -1 if token in self.banned else token

    def closing(self, token: int) -> Seq[int]:
        """If the model stops while thinking, the tokens that end its thought: the grammar's text begins behind it."""
        grammar = self.grammar
        return grammar.closing if grammar and grammar.is_awaited and token in self.llama.vocab.eog else ()

    def force(self, token: int) -> None:
        """Takes a token that was not picked."""
        if self.chain:
            self.llama.c.llama_sampler_accept(self.chain, token)
        if self.grammar:
            self.grammar.follow(token)

    def _pick_with(self, grammar: Grammar, logits: Any) -> int:
        while (token := self._picked) is None or (token >= 0 and grammar.after(token) is None):
            if token is not None:
                logits[token] = -math.inf
                self._refused += 1
            all_tried = self._refused >= (1 if self._aims else self.TRIES)  # Mirostat learns from each pick
            few = self._refused and not grammar.is_awaited and (all_tried or grammar.is_quick)
            self._picked = self._choose(logits, grammar.allowed() if few else None)
        self._picked, self._refused = None, 0
        if token < 0:
            return -1  # all that may follow is banned, or has no token
        self.force(token)
        return token

    def _choose(self, logits: Any, tokens: Any) -> int:
        """The token that is picked among some, or all (None); −1 if all are banned."""
        scores = logits if tokens is None else logits[tokens]
        if not len(scores) or scores.max() == -math.inf:
            return -1
        if not self.chain:
            at = int(scores.argmax())
            return at if tokens is None else int(tokens[at])
        rows, c = self.llama.candidate_rows[: len(scores)].copy(), self.llama.c
        rows["logit"] = scores
        if tokens is not None:
            rows["id"] = tokens
        data = self.llama.ctypes.cast(rows.ctypes.data, c.llama_token_data_p)
        array = c.llama_token_data_array(data, len(scores), -1, False)
        c.llama_sampler_apply(self.chain, self.llama.ctypes.byref(array))
        if not 0 <= array.selected < array.size:
            return -1
        chosen = array.data[array.selected]
        return int(chosen.id) if math.isfinite(chosen.logit) else -1

    def jump(self, most: int) -> Seq[int]:
        """At most so many tokens that must come next, whatever the model says; they are taken. Raises NotYet."""
        grammar = self.grammar
        if not grammar or grammar.is_awaited or self.sampling.logprobs is not None or most <= 0:
            return ()
        tokens = list(itertools.takewhile(lambda token: token not in self.banned, grammar.jump()[:most]))
        for token in tokens:
            self.force(token)
        return tokens

    @property
    def is_done(self) -> bool:
        """Whether the document is complete, and nothing may follow."""
        return self.grammar is not None and self.grammar.is_done

    @property
    def is_stuck(self) -> bool:
        """Whether a document has begun and is not complete, and it is not the client's own bans that end it."""
        if any(bias == -math.inf for _, bias in self.sampling.logit_bias):
            return False
        return self.grammar is not None and not self.grammar.is_awaited and not self.grammar.ends

    def close(self) -> None:
        if self.chain:
            self.llama.c.llama_sampler_free(self.chain)
        self.chain = self.grammar = None


class Grammar:
    """A grammar at work on one text: from its start, or from behind the first marker (`Constraint.after`) on."""

    def __init__(self, llama: Llama, constraint: Constraint) -> None:
        """Raises InvalidRequest for a grammar that cannot be followed. Not for the step loop: reading one may take seconds."""
        self._vocab, self.param = llama.vocab, constraint.param
        try:
            self._machine = llama.machines.of(constraint.grammar)
        except InvalidRequest as error:
            raise self.named(error) from None
        self._state = self._machine.automaton.start
        self._marker, self._seen = (constraint.after or "").encode(), b""  # no marker once the grammar has begun
        self._markers = {t: name.encode() for t, name in llama.vocab.marker_pieces.items()
                         if name in constraint.markers}  # fmt: skip
        self.closing: Seq[int] = ()
        if self._marker and constraint.param != "parallel_tool_calls":  # that one lets a text end without any call
            self.closing = self._vocab.tokens(f"\n{(constraint.after or '').strip()}\n\n").tolist()

    def named(self, error: InvalidRequest) -> InvalidRequest:
        """An error with the request's field, if it knows none."""
        return error if error.param else InvalidRequest(f"{self.param}: {error.message}", self.param)

    @property
    def is_awaited(self) -> bool:
        """Whether the marker has not come yet."""
        return bool(self._marker)

    @property
    def ends(self) -> bool:
        """Whether what stands there is a whole document."""
        return self._state.ends

    @property
    def is_done(self) -> bool:
        """Whether the document is complete, and nothing may follow."""
        return not self._marker and self._state.ends and not self._state.bits

    def after(self, token: int) -> State | None:
        """The state behind a token; None if it may not come. What stands behind the marker in the token that ends it must fit."""
        if self._marker:
            return self._state.read(self._behind_marker(token) or b"")
        if token in self._vocab.eog:
            return self._state if self._state.ends else None
        data = self._markers.get(token) or self._vocab.piece(token)
        return self._state.read(data) if data else None

    def follow(self, token: int) -> None:
        """Takes a token; one that does not fit leaves the grammar where it is."""
        if (state := self.after(token)) is None:
            return
        if self._marker:
            begun = self._behind_marker(token) is not None
            self._seen = (self._seen + self._vocab.shown(token))[-len(self._marker) :]
            self._marker = b"" if begun else self._marker
        self._state = state

    def _behind_marker(self, token: int) -> bytes | None:
        """What would stand behind the marker after this token; None if the marker is not there yet."""
        _, found, rest = (self._seen + self._vocab.shown(token)).partition(self._marker)
        return rest if found else None

    @property
    def is_quick(self) -> bool:
        """Whether `allowed` takes little time."""
        return self._machine.is_quick(self._state)

    def allowed(self) -> Any:
        """All tokens that may come next, an int32 array in their order."""
        more = [token for token in self._markers if self.after(token)]
        if self._state.ends:
            more += self._vocab.eog
        tokens, np = self._machine.allowed(self._state), self._vocab.np
        return np.union1d(tokens, np.array(more, np.int32)) if more else tokens

    def jump(self) -> Seq[int]:
        """The tokens of the text that must come next, but for the last one: the model may cut the text there in its own way."""
        return self._machine.jump(self._state)


class Spelling:
    """A vocabulary's pieces in the order of their bytes, so that those which begin alike are tried together."""

    def __init__(self, vocab: Vocabulary) -> None:
        from array import array

        pieces = sorted((piece, token) for token in range(vocab.size) if (piece := vocab.piece(token)))
        self.pieces, self.tokens = [piece for piece, _ in pieces], array("i", [token for _, token in pieces])
        self.shared = array("H", [0])  # how many bytes each has in common with the one before
        for before, here in itertools.pairwise(self.pieces):
            self.shared.append(next((i for i, (a, b) in enumerate(zip(before, here, strict=False)) if a != b), len(before)))
        self.starts = [bisect.bisect_left(self.pieces, bytes([byte])) for byte in range(256)] + [len(pieces)]

    def count(self, bits: int) -> int:
        """How many tokens begin with one of some bytes."""
        return sum(self.starts[byte + 1] - self.starts[byte] for byte in bytes_of(bits))

    def allowed(self, state: State, byte: int) -> list[int]:
        """The tokens that a state may read and that begin with a byte. Raises NotYet.

        Pieces behind one that is refused are refused too as far as they begin like it.
        """
        pieces, shared, found = self.pieces, self.shared, list[int]()
        at, end = self.starts[byte], self.starts[byte + 1]
        states: list[State] = [state]  # behind each byte of the piece before
        while at < end:
            piece = pieces[at]
            del states[shared[at] + 1 :]
            for next_byte in piece[len(states) - 1 :]:
                behind = states[-1].step(next_byte)
                if behind is None:
                    break
                states.append(behind)
            if len(states) > len(piece):
                found.append(self.tokens[at])
                at += 1
            else:
                size = len(states)
                at = bisect.bisect_right(pieces, piece[:size], at, end, key=lambda other: other[:size])
        return found


class Machine:
    """A grammar's automaton beside a vocabulary: which tokens may come next, and which must.

    Made in the tokenizing thread, used by the step loop alone.
    """

    FEW, FEW_TOKENS = 8, 1000  # bytes that may come next, or tokens that begin with one of them: then few tokens may
    MOST_JUMPED = 512  # bytes of text that must come, at a time
    MAX_KEPT = 1_000_000  # tokens, of all lists together

    def __init__(self, root: Symbol, vocab: Vocabulary) -> None:
        self.automaton, self.vocab = Automaton(read_ahead(root)), vocab
        self._allowed: dict[State, Any] = {}
        self._found: dict[State, list[list[int]]] = {}  # a part of that
        self._jumps: dict[State, Seq[int]] = {}
        self._kept = 0

    def is_quick(self, state: State) -> bool:
        """Whether `allowed` takes little time, found before or not: else what a seed gives would depend on earlier texts."""
        return state.bits.bit_count() <= self.FEW or self.vocab.spelling.count(state.bits) <= self.FEW_TOKENS

    def allowed(self, state: State) -> Any:
        """The tokens with text that may come next, an int32 array in their order."""
        if state not in self._allowed:
            found = self._found.setdefault(state, [])  # by first byte, as far as there was time
            for byte in range(len(found), 256):
                found.append(self.vocab.spelling.allowed(state, byte) if state.bits >> byte & 1 else [])
                if len(found) < 256 and TURN.is_over:
                    raise NotYet
            tokens = self.vocab.np.array(sorted(itertools.chain(*found)), self.vocab.np.int32)
            del self._found[state]
            self._make_room(len(tokens))
            self._allowed[state] = tokens
        return self._allowed[state]

    def jump(self, state: State) -> Seq[int]:
        """The tokens of the text that must come next: all if it ends the document, else all but the last."""
        if state.ends or state.bits & (state.bits - 1):
            return ()
        if state not in self._jumps:
            data = state.forced(self.MOST_JUMPED)
            behind = state.read(data)
            assert behind
            done = behind.ends and not behind.bits
            try:
                data.decode()
            except UnicodeDecodeError as error:
                data, done = data[: error.start], False
            tokens = self.vocab.tokens_inside(data)
            self._make_room(len(tokens))
            self._jumps[state] = tokens if done else tokens[:-1]
        return self._jumps[state]

    def _make_room(self, tokens: int) -> None:
        self._kept += 16 + tokens
        if self._kept > self.MAX_KEPT:
            for kept in (self._allowed, self._found, self._jumps):
                kept.clear()
            self._kept = 16 + tokens


class Machines:
    """The machines of grammars that were used last. Threads that read grammars share it; what they make is the step loop's."""

    MAX_KEPT, MAX_STATES = 16, 100_000  # machines, and states of all together but the last one's

    def __init__(self, vocab: Vocabulary) -> None:
        self._vocab = vocab
        self._kept: dict[bytes, Machine] = {}
        self._lock = threading.Lock()

    def are_quick_to_make(self, grammar: Symbol) -> bool:
        """Whether a grammar is known, or is read in some milliseconds, as most are."""
        with contextlib.suppress(InvalidRequest):  # `of` says it
            return pickle.dumps(grammar) in self._kept or read_soon(grammar)
        return True

    def of(self, grammar: Symbol) -> Machine:
        """The grammar's machine. Raises InvalidRequest for one that cannot be read."""
        _ = self._vocab.spelling  # made here, not in the step loop
        key = pickle.dumps(grammar)
        machine = self._kept.get(key) or Machine(grammar, self._vocab)
        with self._lock:
            self._kept.pop(key, None)
            self._kept[key] = machine
            while len(self._kept) > 1 and (len(self._kept) > self.MAX_KEPT or self._states() > self.MAX_STATES):
                del self._kept[next(iter(self._kept))]
        return machine

    def _states(self) -> int:
        return sum(len(machine.automaton) for machine in self._kept.values())


class LogProbs:
    """The log probabilities of every token after one step, under the full softmax."""

    LEAST = -9999.0  # what OpenAI says where there is none: JSON has no infinity

    def __init__(self, vocab: Vocabulary, logits: Any) -> None:
        wide = logits.astype(vocab.np.float64)
        wide -= wide.max()
        self.vocab = vocab
        self.values = vocab.np.maximum(wide - math.log(vocab.np.exp(wide).sum()), self.LEAST)

    def of(self, token: int, alternatives: int) -> TokenLogprob:
        """A token's own, and those of the likeliest ones."""
        values, name, np = self.values, self.vocab.name, self.vocab.np
        best = np.argpartition(-values, min(alternatives, len(values) - 1))[:alternatives].tolist() if alternatives else []
        top = sorted(((float(values[t]), name(t), t) for t in best), reverse=True)
        said, names, ids = zip(*top, strict=True) if top else ((), (), ())
        return TokenLogprob(name(token), float(values[token]), names, said, token, ids)


class TextStream:
    """One sequence's text: bytes in, text out that may be shown; what may yet become a stop string waits.

    A piece costs about the same however long the stop strings are: where one might begin only moves forward.
    """

    def __init__(self, stop: Seq[str]) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop, self._first = stop, frozenset(s[0] for s in stop)
        self._held = ""  # a stop string begins so
        self.shown = 0  # characters that were given out
        self.stopped = ""  # the stop string that came

    @property
    def position(self) -> int:
        """The character that the next byte belongs to."""
        return self.shown + len(self._held)

    @property
    def is_whole(self) -> bool:
        """Whether the bytes so far end with a whole character."""
        return not self._decoder.getstate()[0]

    def push(self, piece: bytes) -> str:
        """The text that may be shown now; at a stop string, whose text is never shown, `stopped` becomes it."""
        text = self._decoder.decode(piece)
        if not self._stop:
            self.shown += len(text)
            return text
        seen, buffer = len(self._held), self._held + text
        found = [at for s in self._stop if (at := buffer.find(s, max(0, seen - len(s) + 1))) >= 0]
        shown = min(found) if found else self._may_begin(buffer)
        self.stopped = next(s for s in self._stop if buffer.startswith(s, shown)) if found else ""
        self._held = "" if found else buffer[shown:]
        self.shown += shown
        return buffer[:shown]

    def _may_begin(self, buffer: str) -> int:
        """The first position from which on all that is there is the beginning of a stop string."""
        for at, character in enumerate(buffer):
            if character in self._first:
                tail = buffer[at:]
                if any(s.startswith(tail) for s in self._stop):
                    return at
        return len(buffer)

    def finish(self) -> str:
        """Flushes held text; drops an incomplete character."""
        rest, self._held = self._held, ""
        self.shown += len(rest)
        return rest


# ── 9. Scheduling (child) ─────────────────────────────────────────────────────────────────────────────────────────────
# Which sequences run, which wait, where their cells are, what stays of them, and what the next step computes.


class Submission:
    """A Submit on its way through the child's threads, and whether it was cancelled: only the receiving thread sets that."""

    def __init__(self, submit: Submit) -> None:
        self.id, self.job, self.cancelled = submit.id, submit.job, False


BORDERS = 3  # turns at a prompt's end, where the state of a model whose memory cannot be cut is kept


def turn_borders(prompt: Seq[int], vocab: Vocabulary) -> tuple[int, ...]:
    """Where the last turns of a prompt begin, by their control tokens, and the end but for one token."""
    marks = [at for at, token in enumerate(prompt[:-1]) if at and (int(token) in vocab.marker_pieces or token in vocab.eog)]
    apart = [at for at, before in zip(marks, [0, *marks], strict=False) if at - before >= 8]  # else within the same markup
    return tuple(sorted({*apart[-BORDERS:], max(len(prompt) - 1, 0)}))


class ThoughtMeter:
    """Counts the tokens of the thought that a text begins with."""

    PATIENCE = 3  # tokens beyond the budget, until a character is whole

    def __init__(self, budget: ThoughtBudget) -> None:
        self._budget, self._opens, self._closes = budget, budget.opens.strip().encode(), budget.closes.strip().encode()
        self._inside, self._over = budget.begun, False
        self._text = b""
        self.tokens = 0

    def add(self, piece: bytes) -> None:
        """Takes the bytes of one token."""
        if self._over:
            return
        self.tokens += self._inside
        self._text += piece
        if not self._inside:
            text = self._text = self._text.lstrip()
            self._inside = text.startswith(self._opens)
            self._over = not self._opens.startswith(text[: len(self._opens)])
            self._text = text.removeprefix(self._opens)
        if self._inside:
            self._over = self._closes in self._text
            self._text = self._text[-len(self._closes) :]

    def is_spent(self, whole: bool) -> bool:
        """True once: when the budget is used up, if possible not within a character."""
        least = self._budget.tokens + (0 if whole else self.PATIENCE)
        spent = self._inside and not self._over and self.tokens >= least
        self._over = self._over or spent
        return spent


class Echo:
    """A prompt that is given out with its tokens' log probabilities."""

    def __init__(self, job: Generate, vocab: Vocabulary) -> None:
        text = str(job.prompt[0]) if job.prompt and isinstance(job.prompt[0], str) else None
        self.n_told = 0 if text is None else len(vocab.ends[0])  # tokens, also those that the model wants before a text
        self._blank = b"" if text is None or text.startswith(" ") else b" "  # which SentencePiece puts before a text
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def tell(self, token: TokenLogprob) -> tuple[TokenLogprob, str]:
        """The prompt's next token, and the text that it ends."""
        token, self._blank = replace(token, token=token.token.removeprefix(self._blank)), b""
        self.n_told += 1
        return token, self._decoder.decode(token.token)


class Sequence(Rows):
    """One text in the making. Owned by the step loop."""

    def __init__(self, submission: Submission, prompt: Seq[int], llama: Llama) -> None:
        self.submission, job = submission, submission.job
        assert isinstance(job, Generate)
        self.n_prompt = len(prompt)
        most = llama.ctx if job.sampling.max_tokens is None else job.sampling.max_tokens
        self.limit = min(llama.ctx, self.n_prompt + most)  # tokens: it ends with length
        super().__init__(llama.np.empty(self.limit, llama.np.int32), self.n_prompt)
        self.tokens[: self.n_prompt] = prompt
        self.borders = () if llama.cuttable else turn_borders(prompt, llama.vocab)  # where its state is saved
        self.id, self.sampling, self.markers, self.owner = submission.id, job.sampling, job.markers, job.owner
        self.text = TextStream(job.sampling.stop)
        self.thought = ThoughtMeter(job.thought) if job.thought else None
        self._ending = llama.vocab.tokens(job.thought.ending).tolist() if job.thought else ()
        self.n_shown = self.n_prompt  # tokens whose text was given out
        self.n_jumped, self._jumped_at = 0, -1  # forced tokens so far; the index of the last sampled one
        self.logits: Any = None  # while its grammar takes more than a step to find what may come next
        self.jumps = False  # True while the forced continuation is being found
        self.sought = 0.0  # CPU seconds its grammar used beyond its allowance
        self.forced: deque[int] = deque()  # tokens that come next, whatever the model says
        self.sampler = Sampler(llama, job.sampling, prompt)  # kept through steps back
        self.stretches: Stretches = []
        self.n_cached = 0  # prompt tokens that were not evaluated
        self.done = False
        self.started = self.first_token = 0.0
        self.unsent = ""  # text since the last message
        self.n_told = self.n_prompt  # tokens of which the messages have told
        self.echo = Echo(job, llama.vocab) if job.echo else None
        self.logprobs: list[TokenLogprob] = []  # of its tokens
        self.unshown: deque[TokenLogprob] = deque()  # of later tokens
        self._ends: deque[int] = deque()  # the characters behind these tokens, as far as they were read
        self._waiting = ""  # text that may be shown, but is a part of a token
        self.watch_thought(b"")

    @property
    def scored(self) -> bool:  # type: ignore[override]
        """Until its first token, if the prompt is echoed."""
        return self.echo is not None and not self.first_token

    @property
    def unread(self) -> int:
        """Tokens of its prompt that are not evaluated; after a step back its own text is read like that too."""
        return (self.n_tokens if self.first_token else self.n_prompt) - self.n_computed

    @property
    def jumping(self) -> bool:
        """Whether what is pending is text that had to come behind its last pick, computed together with that."""
        return self.pending > 1 and bool(self.first_token) and self.n_computed >= self._jumped_at

    @property
    def is_stream(self) -> bool:
        """True if the next main step gives it a token."""
        return (self.pending == 1 or self.jumping) and not self.jumps

    def append(self, token: int) -> None:
        self.tokens[self.n_tokens] = token
        self.n_tokens += 1

    def jump(self) -> int:
        """Appends the text that must come next: nothing needs to be picked there. Returns the number of its tokens; raises
        NotYet and InvalidRequest, from its grammar."""
        if self.forced:
            return 0
        tokens, self._jumped_at = self.sampler.jump(self.limit - 1 - self.n_tokens), self.n_tokens - 1
        for token in tokens:
            self.append(token)
        self.n_jumped += len(tokens)
        return len(tokens)

    def next_token(self, logits: Any, row: int) -> int:
        """The forced token whose turn it is, else what the sampler picks; -1 when nothing may follow."""
        if not self.forced:
            token = self.sampler.pick(logits, row)
            self.forced.extend(self.sampler.closing(token))
            if not self.forced:
                return token
        token = self.forced.popleft()
        self.sampler.force(token)
        return token

    def watch_thought(self, piece: bytes) -> None:
        """Takes a token's bytes, or none yet; a thought over its budget is closed by the tokens that come next."""
        if self.thought and piece:
            self.thought.add(piece)
        if self.thought and self.thought.is_spent(self.text.is_whole):
            self.forced.extend(self._ending)

    def show(self, piece: bytes) -> str:
        """Takes the bytes of the next token that is shown; the text that may be sent now."""
        text = self.text.push(piece)
        if self.sampling.logprobs is not None:
            self._ends.append(self.text.position)
        return self.ready(text)

    def ready(self, text: str) -> str:
        """What may be sent now that `text` may be shown: all, or whole tokens if their log probabilities go with them."""
        if self.sampling.logprobs is None:
            return text
        self._waiting += text
        stopped, shown, sent = self.text.stopped, self.text.shown, self.text.shown - len(self._waiting)
        while self._ends and (self._ends[0] <= shown or stopped):
            logprob, end = self.unshown.popleft(), self._ends.popleft()
            if not stopped:
                self.logprobs.append(logprob)
            elif sent < shown:  # else it is the stop string's
                self.logprobs.append(logprob.cut(shown - sent))
            sent = min(end, shown)
        size = len(self._waiting) - (shown - sent)
        text, self._waiting = self._waiting[:size], self._waiting[size:]
        return text

    def common(self, other: Rows, limit: int) -> int:
        """How many tokens both begin with, among the other's first `limit` and all of this one's but the last. None that must
        be computed for their logits."""
        size = 0 if self.scored else min(self.n_tokens - 1, limit)
        different = self.tokens[:size] != other.tokens[:size]
        first = int(different.argmax()) if size else 0
        return first if size and different[first] else size


Stretches = list[tuple[object, float]]  # whose cells a sequence has, up to which token each; its own are the last, without end


def held_cells(sequences: Iterable[Sequence]) -> int:
    """How many cells sequences need; what several share counts once."""
    sizes: dict[object, float] = {}
    for sequence in sequences:
        start = 0.0
        for owner, end in sequence.stretches:
            end = min(end, sequence.n_tokens)
            sizes[owner], start = max(sizes.get(owner, 0), end - start), end
    return int(sum(sizes.values()))


class Prefix(Rows):
    """The beginning of a text that ended, for prompts that begin alike: its cells are in a row, or saved as bytes."""

    def __init__(self, sequence: Sequence, oldest: int) -> None:
        super().__init__(sequence.tokens[: sequence.n_computed].copy(), sequence.n_computed)
        self.n_computed, self.row = sequence.n_computed, sequence.row
        self.owner, self.stretches, self.oldest = sequence.owner, sequence.stretches, oldest
        self.saved: Any = None


class Input(Rows):
    """One text of an Embed job on its way through an embedding context."""

    def __init__(self, job: Embedding, index: int, tokens: Any) -> None:
        super().__init__(tokens, len(tokens))
        self.job, self.index, self.turn = job, index, 0
        self.pooled: Any = None  # what its vector is so far


class Embedding:
    """An Embed job in the making: its inputs, and the vectors that are done. Owned by the step loop."""

    def __init__(self, submission: Submission, texts: Seq[Any]) -> None:
        assert isinstance(submission.job, Embed)
        self.submission, self.id, self.dimensions = submission, submission.id, submission.job.dimensions
        self.n_prompt = sum(len(tokens) for tokens in texts)
        self.inputs = [Input(self, i, tokens) for i, tokens in enumerate(texts)]
        self.vectors: list[bytes] = [b""] * len(texts)
        self.missing = len(texts)
        self.error: ApiError | None = None
        self.started = 0.0

    @property
    def is_over(self) -> bool:
        return self.submission.cancelled or not self.missing or self.error is not None


def fair_slices(prompts: list[Sequence], rows: int, outputs: int = 0) -> list[tuple[Sequence, int]]:
    """Shares `rows` among prompts, up to `outputs` of them among those that are scored; long ones get what short ones leave.

    Each prompt's last token is left for a row of its own, as every later token has. So a prompt asked again, with all but
    that token in the cache, makes the same sums in the same order, and greedy text is the same text.
    """
    slices = []
    prompts = sorted(prompts, key=lambda s: s.pending)
    for i, sequence in enumerate(prompts):
        border = next((at - sequence.n_computed for at in sequence.borders if at > sequence.n_computed), rows)
        count = min(sequence.pending - 1, rows // (len(prompts) - i), border, outputs if sequence.scored else rows)
        rows, outputs = rows - count, outputs - count * sequence.scored
        if count > 0:
            slices.append((sequence, count))
    return slices


class Pace:
    """Learns how long steps take, and says how much of a prompt fits one without freezing the streams."""

    TARGET = 4.4  # a running stream's gap while a prompt is read, as a multiple of its usual gap
    ASIDE = 3.5  # the same for prompts read aside, where nothing is guessed
    FORCED = 2.0  # the same while a text is read that a grammar forces: anybody may ask for long ones, again and again
    STEP = 4  # kernels work in blocks: 17 rows take longer than 20
    SLICE = 1.3  # what a row costs in a small slice against one in a whole batch, until measured

    def __init__(self, n_batch: int) -> None:
        self.n_batch = n_batch
        self._usual: dict[int, float] = {}  # seconds of a step by decoding sequences
        self.row = 0.0  # seconds a prompt row adds to a step: grows with the context, so the last steps count

    def record(self, decoding: int, rows: int, seconds: float) -> None:
        """Learn from a step that had so many decoding sequences among its rows."""
        if rows == decoding:
            self._usual[rows] = self._blend(self._usual.get(rows), seconds)
        else:
            added = max(seconds - self.usual(decoding), seconds / 10) * (1 if decoding else self.SLICE)
            self.row = self._blend(self.row or None, added / (rows - decoding))

    @staticmethod
    def _blend(old: float | None, new: float) -> float:
        """A moving average that one slow step (another process had the core) does not throw off."""
        return new if old is None else old + 0.3 * (min(new, 1.5 * old) - old)

    def usual(self, decoding: int) -> float:
        """Seconds of a step without prompts; for a count not seen, the nearest one's."""
        if not decoding or not self._usual:
            return 0.0
        return self._usual[min(self._usual, key=lambda n: abs(n - decoding))]

    def prompt_rows(self, decoding: int, target: float = TARGET) -> int:
        """How many prompt tokens the next step may take beside so many decoding sequences. Faster than messages are sent, no
        client sees a step."""
        room, usual = self.n_batch - decoding, self.usual(decoding)
        if not decoding:
            return room
        if not usual or not self.row:
            return min(room, 16)
        rows = decoding + int((target * max(usual, FLUSH_SECONDS) - usual) / self.row)
        return max(1, min((rows + 1) // self.STEP * self.STEP - decoding, room))


class Cache:
    """Tracks which sequence owns which cells of the main context, and what ended ones leave. Used by the step loop alone.

    What a finished sequence leaves is a prefix: a later prompt with the same beginning starts behind it, as it does behind
    what a running one has. Every step looks at every cell in the cache, whoever's it is: on two cores 1,000 idle ones cost
    a 1 MB model a third of its speed, 2,600 doubled the reading of a prompt with half a billion parameters. So prefixes
    are saved as bytes outside the cache, and lend from there. (Not on a GPU, which hardly feels them, and where fetching
    cells that lie scattered is slow.)
    """

    SAVED, SAVED_BYTES = 64, 256 * MIB  # most prefixes outside the cache, and their bytes where the pool has fewer
    SPARE_BYTES = 256 * MIB  # of the machine's memory, that saved prefixes leave free

    def __init__(self, llama: Llama) -> None:
        self.llama, self.main = llama, llama.main
        self.rows: list[Sequence | Prefix | None] = [None] * llama.main.n_seq
        self.prefixes: list[Prefix] = []  # the one used least recently first

    def best_prefix(self, sequence: Sequence) -> tuple[Sequence | Prefix | None, int]:
        """Whose cells begin as this prompt does, and for how many tokens; at least one token stays to be evaluated."""
        best: Sequence | Prefix | None = None
        longest = 0
        others: list[Sequence | Prefix] = [*(s for s in self.rows if isinstance(s, Sequence)), *self.prefixes]
        for other in others:
            length = sequence.common(other, other.n_computed) if other.owner == sequence.owner else 0
            if length > longest and self._can_lend(other, length):
                best, longest = other, length
        return best, longest

    def _can_lend(self, other: Sequence | Prefix, length: int) -> bool:
        """Whether all of its first cells are there, and can be had without the others."""
        oldest = other.oldest if isinstance(other, Prefix) else self.main.oldest(other.row)
        return (self.llama.cuttable or length == other.n_computed) and oldest <= max(0, length - self.llama.n_swa)

    def settle(self, sequence: Sequence, donor: Sequence | Prefix | None, shared: int) -> None:
        """Gives the sequence a row that begins with so many of the donor's cells, or none if there is no room for saved ones."""
        if None not in self.rows:
            self.save_oldest()  # rows are more than sequences that run
        row, lent = self.rows.index(None), Stretches()
        if isinstance(donor, Prefix) and donor in self.prefixes:
            self.prefixes.remove(donor)
            self.prefixes.append(donor)
        if isinstance(donor, Prefix) and donor.saved is not None:
            shared = shared if self._restore(row, donor.saved) else 0
            if shared < donor.n_computed:
                self.main.drop(row, shared)
        elif donor and donor.n_computed:
            self.main.share(donor.row, row, shared)
            starts = [0.0, *(end for _, end in donor.stretches)]
            lent += [(o, min(end, shared)) for start, (o, end) in zip(starts, donor.stretches, strict=False) if start < shared]
        else:
            shared = 0
        self.rows[row], sequence.row, sequence.n_computed = sequence, row, shared
        sequence.stretches = [*lent, (object(), math.inf)]

    def _restore(self, row: int, data: Any) -> bool:
        """Puts saved cells into an empty row; prefixes make room."""
        while not self.main.restore(row, data):
            self.main.drop(row)
            if not self.save_oldest():
                return False
        return True

    def empty(self, row: int) -> None:
        """Frees a row and its cells."""
        self.main.drop(row)
        self.rows[row] = None

    def undo(self, in_step: Seq[Sequence]) -> None:
        """After an aborted decode: drops what it was to add, and every recurrent state, for it has moved them."""
        for sequence in in_step if self.llama.cuttable else ():
            self.main.drop(sequence.row, sequence.n_computed)
        if not self.llama.cuttable:
            self.clear(False)

    def clear(self, data: bool) -> None:
        """Frees all cells, also of sequences that run; with `data`, wipes what they held."""
        self.main.clear(data)
        self.prefixes = [p for p in self.prefixes if p.saved is not None]
        for row, sequence in enumerate(self.rows):
            if isinstance(sequence, Sequence):
                sequence.n_computed, sequence.stretches = 0, [(object(), math.inf)]
            else:
                self.rows[row] = None

    def leave(self, sequence: Sequence) -> None:
        """Makes what a sequence has in the cache a prefix, which stays in its row."""
        if sequence.n_computed:
            prefix = self.rows[sequence.row] = Prefix(sequence, self.main.oldest(sequence.row))
            self.add(prefix)
        else:
            self.empty(sequence.row)

    def save_oldest(self) -> bool:
        """Moves the prefix used least recently out of the cache; False when none is in it."""
        prefix = next((p for p in self.prefixes if p.saved is None), None)
        if prefix:
            self.prefixes.remove(prefix)
            self.save(prefix)
            self.empty(prefix.row)
            if self.llama.cuttable and not any(self.rows):
                self.main.clear(False)  # to begin at the first cell again: the order of cells shows in the last bits of sums
        return prefix is not None

    def save(self, prefix: Prefix) -> None:
        """Saves the cells of its row as bytes; the saved prefixes used least recently make room."""
        prefix.saved = self.main.save(prefix.row)
        if prefix.saved is None:
            prefix.n_computed = 0  # nothing to lend
        else:
            self.add(prefix)
        while (saved := [p for p in self.prefixes if p.saved is not None]) and self._are_too_many(saved):
            self.prefixes.remove(saved[0])

    def add(self, prefix: Prefix) -> None:
        """Takes a prefix in; those go for which it can lend all that they have."""
        for other in list(self.prefixes):
            size = other.n_computed
            if (size <= prefix.n_computed and other.owner == prefix.owner and self._can_lend(prefix, size)
                    and bool((prefix.tokens[:size] == other.tokens).all())):  # fmt: skip
                self.prefixes.remove(other)
                if other.saved is None:
                    self.empty(other.row)
        self.prefixes.append(prefix)

    def _are_too_many(self, saved: Seq[Prefix]) -> bool:
        """Counts tokens where memory can be cut, else bytes: a state is large for the shortest text, and kept several times."""
        free = available_memory()
        if free is not None and free - self.llama.setup.reserved < self.SPARE_BYTES:
            return True
        tokens, size = sum(p.n_computed for p in saved), sum(len(p.saved) for p in saved)
        most = max(self.llama.pool * self.llama.kv_bytes, self.SAVED_BYTES)
        return size > most or len(saved) > self.SAVED or (self.llama.cuttable and tokens > self.llama.pool)


class Aside:
    """Decodes in a context beside the main one, in batches that stop for the streams' steps.

    Every few operations of a batch llama.cpp calls `_pause`, which lets the streams step when that is due.
    """

    def __init__(self, due: Callable[[], float], step: Callable[[], None]) -> None:
        """`due` says when the streams' next step should begin (perf_counter), `step` takes it."""
        self._due, self._step = due, step
        self._resumed_at = 0.0  # when the batch last began or went on
        self._longest = 0.0  # seconds between two pauses; slowly forgotten
        self._aborted = False
        self._error: Exception | None = None

    def _pause(self) -> bool:
        """Between operations of a batch; whether to go on. An exception cannot pass through llama.cpp: it ends the batch."""
        try:
            now = time.perf_counter()
            self._longest = max(now - self._resumed_at, 0.97 * self._longest)
            if now + self._longest >= self._due():
                self._step()
            self._resumed_at = time.perf_counter()
            self._aborted = self.unwanted()
        except Exception as error:
            self._aborted, self._error = True, error
        return not self._aborted

    def unwanted(self) -> bool:
        """Whether nobody waits any more for what is being decoded."""
        raise NotImplementedError

    def _decode(self, context: Context, plan: Seq[tuple[Rows, int]]) -> int:
        """Decodes one batch; llama_decode's status. Raises what `step` raised."""
        self._aborted, self._error, self._resumed_at = False, None, time.perf_counter()
        status = context.decode(plan)
        if self._error:
            raise self._error
        return status


class PromptReader(Aside):
    """Reads long prompts while streams run: in a context of its own, whose batches stop for the streams' steps.

    In slices behind the streams' rows a prompt is read at half speed, for the kernels are made for whole batches, and
    larger slices make longer gaps. Here whole batches are read. What was read becomes a prefix, behind which the sequence
    goes on in the main context with its prompt's last token.
    """

    BATCH = 256  # tokens: nearly full speed, and the next prompt need not wait long for its turn
    TOGETHER = 4  # prompts read at once

    def __init__(self, llama: Llama, due: Callable[[], float], step: Callable[[], None]) -> None:
        """Raises LoadError."""
        super().__init__(due, step)
        self.context = Context(llama, llama.ctx, self.BATCH, self.TOGETHER, self._pause)
        self.rows: list[Sequence | None] = [None] * self.TOGETHER

    def unwanted(self) -> bool:
        return all(s.submission.cancelled for s in self.reading)

    @property
    def reading(self) -> list[Sequence]:
        return [s for s in self.rows if s and not s.done]

    def _leave(self, row: int) -> None:
        self.context.drop(row)
        self.rows[row] = None

    def take(self, sequence: Sequence) -> bool:
        """Takes a sequence over from the main context, with its cells; False while there is no room."""
        for row, other in enumerate(self.rows):
            if other and other.done:  # cancelled, or failed
                self._leave(row)
        if None not in self.rows or sum(s.n_tokens for s in (*self.reading, sequence)) > self.context.cells:
            return False
        row = self.rows.index(None)
        data = self.context.llama.main.save(sequence.row) if sequence.n_computed else None
        if data is None or not self.context.restore(row, data):
            self.context.drop(row)
            sequence.n_computed = 0
        self.rows[row], sequence.row = sequence, row
        return True

    def read(self) -> int:
        """Reads one batch, a fair slice of each prompt; llama_decode's status. Raises what `step` raised."""
        plan = fair_slices(self.reading, self.BATCH)
        status = self._decode(self.context, plan)
        for sequence, count in plan if not status else ():
            sequence.n_computed += count
            if self._aborted:  # llama_decode reports success, but what it left cannot be used
                self.context.drop(sequence.row)
                sequence.n_computed = 0
        return status

    def give_back(self) -> Iterator[tuple[Sequence, Prefix]]:
        """The sequences that are read, all but their last token, and what they have read; they leave."""
        for sequence in [s for s in self.reading if s.pending == 1]:
            prefix = Prefix(sequence, 0)
            prefix.saved = self.context.save(sequence.row)
            self._leave(sequence.row)
            yield sequence, prefix


class Embedder(Aside):
    """Makes vectors of inputs, those of several jobs in one batch. Used by the step loop alone.

    An embedding model's main context does it; a model that generates gets a second one with its first Embed job.
    """

    ALONE = 16  # operations between two pauses while no stream runs: with two busy cores, 2 cost a third of the speed

    def __init__(self, llama: Llama, scheduler: Scheduler, step: Callable[[], None]) -> None:
        super().__init__(scheduler.due, step)
        self.llama, self.scheduler = llama, scheduler
        self.jobs: list[Embedding] = []
        self.unread: deque[Input] = deque()  # in the order of their turns: an input of each job, then the next of each
        self.reading: list[Input] = []  # those in the context
        self._turn = 0  # of the input that was begun last

    @functools.cached_property
    def context(self) -> EmbeddingContext:
        """Raises Overloaded without memory for it, LoadError when llama.cpp refuses."""
        if isinstance(self.llama.main, EmbeddingContext):
            return self.llama.main
        need, free = EmbeddingContext.memory_need(self.llama), available_memory()
        if free is not None and free < need and self.llama.on_cpu:
            raise Overloaded(f"The context for embeddings needs {human_bytes(need)}, {human_bytes(free)} are available")
        return EmbeddingContext(self.llama, self._pause if self.llama.on_cpu else None)

    @functools.cached_property
    def _free(self) -> list[int]:
        return list(range(self.context.n_seq))

    def add(self, job: Embedding) -> None:
        self.jobs.append(job)
        for input in job.inputs:
            input.turn = self._turn + 1 + input.index
        self.unread = deque(sorted([*self.unread, *job.inputs], key=lambda input: input.turn))

    def unwanted(self) -> bool:
        return all(i.job.submission.cancelled for i in self.reading)

    def _pause(self) -> bool:
        going = super()._pause()
        self._pace()
        return going

    def _pace(self) -> None:
        """Pauses often only beside streams."""
        self.context.pause_every = self.context.PAUSE_EVERY if self.scheduler.running else self.ALONE

    def plan(self) -> list[tuple[Input, int]]:
        """The next batch: what is being read, then other inputs in turn, as far as there is room."""
        context, plan = self.context, list[tuple[Input, int]]()
        room = context.batch_tokens
        for input in self.reading:
            if count := min(input.pending, room):
                plan.append((input, count))
                room -= count
        while self.unread and room > 0 and self._free:
            input = self.unread[0]
            held = sum(i.n_tokens for i in self.reading) + input.n_tokens
            if not (not plan or input.n_tokens <= room if context.whole else held <= context.cells):
                break
            self.reading.append(self.unread.popleft())
            self._turn, input.row, input.job.started = input.turn, self._free.pop(), input.job.started or time.perf_counter()
            count = input.n_tokens if context.whole else min(input.n_tokens, room)
            plan.append((input, count))
            room -= count
        return plan

    def step(self, plan: Seq[tuple[Input, int]]) -> None:
        """Decodes a batch. Raises GenerationFailed, and what the streams' step raised."""
        context = self.context
        self._pace()
        status = self._decode(context, plan)
        if status == 2 or self._aborted:  # nobody waits for it
            return
        if status:
            context.clear(True)
            raise GenerationFailed(f"llama_decode returned {status}")
        at = 0
        for input, count in plan:
            input.pooled = context.take(input, at, count, input.pooled)
            input.n_computed += count
            at += count
        for input in [i for i, _ in plan if not i.pending]:
            self._leave(input)
            if (vector := context.finished(input.pooled, input.job.dimensions)) is None:
                input.job.error = GenerationFailed("the model's output is not a number")
            else:
                input.job.vectors[input.index] = vector
                input.job.missing -= 1

    def _leave(self, input: Input) -> None:
        self.reading.remove(input)
        self._free.append(input.row)
        self.context.drop(input.row)

    def drop(self, job: Embedding) -> None:
        """Takes a job out that is over."""
        self.jobs.remove(job)
        self.unread = deque(i for i in self.unread if i.job is not job)
        for input in [i for i in self.reading if i.job is job]:
            self._leave(input)


class Scheduler:
    """Decides who runs, who waits, and what the next step computes. Used by the step loop alone.

    The pool is shared. When it runs out, prefixes leave first; then the youngest running sequence steps back to the head
    of the queue, keeping its tokens and sampler, and what it has in the cache becomes a prefix.
    """

    WORTH_WAITING = 32  # tokens another prompt is just computing that are worth waiting for
    GROWTH = 16  # cells a newcomer must leave free for each running sequence
    SLICES = 2  # a prompt that takes more of them beside the streams is read aside
    SCORED = 4  # tokens of echoed prompts that a step tells beside streams: with a large vocabulary each takes 2 ms

    def __init__(self, llama: Llama, parallel: int) -> None:
        self.llama, self.parallel = llama, parallel
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.cache, self.pace = Cache(llama), Pace(llama.main.n_batch)
        self.reader: PromptReader | None = None
        self.stepped_at = 0.0  # when the main context's last step ended (perf_counter)

    @property
    def aside(self) -> list[Sequence]:
        """Sequences whose prompts the reader reads; they have no cells in the main context."""
        return self.reader.reading if self.reader else []

    @property
    def active(self) -> list[Sequence]:
        return [*self.running, *self.aside]

    def admit(self) -> None:
        """Moves waiting sequences into the batch while there is room, in order; one that waits for a prefix lets others by."""
        for sequence in list(itertools.islice(self.waiting, self.parallel)):
            if len(self.active) >= self.parallel:
                return
            donor, shared = self.cache.best_prefix(sequence)
            if self._better_soon(sequence, shared):
                continue
            needed = sequence.n_tokens - (shared if isinstance(donor, Sequence) else 0) + self.GROWTH * (len(self.running) + 1)
            taken = held_cells(self.running) + sum(s.n_tokens for s in self.aside)  # those aside need theirs when they are back
            if self.running and taken + needed > self.llama.pool:
                return
            self.waiting.remove(sequence)
            self.cache.settle(sequence, donor, shared)
            if not sequence.started:
                sequence.n_cached, sequence.started = min(sequence.n_computed, sequence.n_prompt), time.perf_counter()
            self.running.append(sequence)

    def _better_soon(self, sequence: Sequence, shared: int) -> bool:
        """Whether a prompt being read now will soon lend a much longer beginning."""
        if not self.llama.cuttable:
            return False
        reading = [(s, s.n_computed) for s in self.running if s.pending > 1]
        reading += [(s, 0) for s in self.aside]  # these lend when they are back
        return any(sequence.common(s, s.n_prompt) >= max(shared, have) + self.WORTH_WAITING
                   for s, have in reading if s.owner == sequence.owner)  # fmt: skip

    def schedule(self) -> list[tuple[Sequence, int]]:
        """The next step: one row of each decoding sequence, the rest of what some jump over, then slices of prompts being read.

        Long prompts wait for the reader, if there is one.
        """
        streams, long = [s for s in self.running if s.is_stream], self._long_prompts()
        prompts = [s for s in self.running if s.pending > 1 and not s.is_stream and s not in long]
        jumping = [s for s in streams if s.jumping]
        plan = [(s, 1) for s in streams if not s.jumping]
        if not jumping and not prompts:
            return plan
        alone = len(streams) == len(jumping) == 1 and not prompts
        target = Pace.TARGET if any(s.unread > 1 for s in prompts) else Pace.FORCED
        rows = self.pace.prompt_rows(0) - 1 if alone else self.pace.prompt_rows(len(streams), target)
        for index, sequence in enumerate(sorted(jumping, key=lambda s: s.pending)):
            more = min(sequence.pending - 1, rows // (len(jumping) - index))
            plan.append((sequence, 1 + more))
            rows -= more
        outputs = self.llama.main.n_seq - len(self.running)  # each may have one at its end
        return plan + fair_slices(prompts, rows, min(outputs, self.SCORED) if streams else outputs)

    def _long_prompts(self) -> list[Sequence]:
        """Prompts for the reader: in the main context they would take many slices beside the streams there."""
        prompts = [s for s in self.running if not s.is_stream and not s.scored] if self.reader else []
        decoding = sum(1 for s in self.running if s.is_stream) if prompts else 0
        most = self.SLICES * self.pace.prompt_rows(decoding) if decoding else math.inf
        return [s for s in prompts if s.unread > most]

    def due(self) -> float:
        """When the streams' next step should begin while a prompt is read aside (perf_counter)."""
        usual = self.pace.usual(sum(1 for s in self.running if s.is_stream))
        return self.stepped_at + Pace.ASIDE * max(usual, FLUSH_SECONDS) - usual

    def move_aside(self) -> None:
        """Hands long prompts to the reader, with their cells, in order: else shorter ones might keep the first out for ever."""
        while long := self._long_prompts():
            row = long[0].row
            if not (self.reader and self.reader.take(long[0])):
                return
            self.running.remove(long[0])
            self.cache.empty(row)

    def bring_back(self) -> None:
        """Lets sequences that the reader has read go on, as soon as there is room."""
        for sequence, prefix in self.reader.give_back() if self.reader else ():
            if prefix.saved is not None:
                self.cache.add(prefix)
            self._wait(sequence)

    def make_room(self) -> Sequence | None:
        """After a step found no free cells: saves a prefix (None), or steps the youngest back and returns it."""
        if self.cache.save_oldest():
            return None
        youngest = self.running.pop()
        self.cache.leave(youngest)
        self._wait(youngest)
        return youngest

    def _wait(self, sequence: Sequence) -> None:
        """Puts a sequence without cells at the head of the queue."""
        sequence.row, sequence.n_computed = -1, 0
        self.waiting.appendleft(sequence)

    def retire(self, sequence: Sequence) -> None:
        """Takes a sequence out; what it has in the cache stays for prompts that begin alike."""
        sequence.done = True
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self.running.remove(sequence)
            self.cache.leave(sequence)


# ── 10. Engine (child) ────────────────────────────────────────────────────────────────────────────────────────────────
# The step loop, and what feeds it: one model, one llama.cpp context, continuous batching.


class Pulse:
    """What one of the child's threads is doing. That thread alone begins tasks; the heartbeat thread counts beats."""

    LIMITS: ClassVar = {  # seconds for one task; those not named may take for ever
        "load": 600,  # a hundredth of the file, or what comes after: a GPU's kernels are compiled for minutes
        "decode": 900,  # the longest step known: 512 tokens of 70B on two cores
        "sample": 120,  # all sequences of a step; a grammar of ten equal alternatives never comes back
        "tokenize": 300,  # one text: a megabyte takes a second, a grammar's start a tenth
    }

    def __init__(self) -> None:
        self._task: tuple[str, float, int] = ("rest", math.inf, 0)  # its limit, and how many there were before
        self._seen, self._beats = self._task, 0

    def begin(self, task: str, limit: float | None = None) -> None:
        self._task = (task, limit or self.LIMITS.get(task) or math.inf, self._task[2] + 1)

    def beat(self) -> str:
        """Called every second by the heartbeat thread. What has taken too long, or ""."""
        self._beats = self._beats + 1 if self._seen == self._task else 0
        self._seen = self._task
        task, limit, _ = self._task
        return f"'{task}' did not come to an end within {limit:.0f} s" if self._beats * BEAT_SECONDS > limit else ""


def failure(id: int, error: ApiError) -> Failed:
    """Why a job cannot go on, or never began."""
    details = error.message if isinstance(error, InvalidRequest) else error.details
    return Failed(id, error.code, details, error.param, error.sizes)


class Outbox:
    """What the step loop has to say, gathered until a message is due. Any thread may call what sends at once."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._events: list[Vectors | Finished | Failed] = []
        self._unsent: list[Sequence] = []  # those with text or log probabilities to send
        self._sent_at = 0.0
        self.running = 0  # sequences in the batch, as the parent was told last

    def text(self, sequence: Sequence, text: str) -> None:
        if text:
            if not sequence.unsent:
                self._unsent.append(sequence)
            sequence.unsent += text

    def finished(self, sequence: Sequence, reason: str) -> None:
        """The end of a sequence, behind the text it held back and the log probabilities of tokens without text."""
        self.text(sequence, sequence.ready(sequence.text.finish()))
        if sequence.logprobs and sequence not in self._unsent:
            self._unsent.append(sequence)
        now = time.perf_counter()
        started, first = sequence.started or now, sequence.first_token or now
        generated = sequence.n_shown - sequence.n_prompt
        self._events.append(Finished(
            sequence.id, reason, sequence.n_prompt, generated, sequence.n_cached, first - started, now - first,
            sequence.text.stopped, min(sequence.n_jumped, generated)))  # fmt: skip

    def embedded(self, job: Embedding) -> None:
        """The end of an Embed job, with its vectors if it came so far."""
        if job.error:
            self.failed(job.id, job.error)
            return
        if not job.missing:
            self._events.append(Vectors(job.id, tuple(job.vectors)))
        spent = time.perf_counter() - job.started if job.started else 0.0
        self._events.append(Finished(job.id, "cancelled" if job.missing else "stop", job.n_prompt, 0, prompt_seconds=spent))

    def failed(self, id: int, error: ApiError) -> None:
        self._events.append(failure(id, error))

    def at_once(self, *events: Accepted | Tokens | Finished | Failed) -> None:
        """Sends what the step loop has no part in. Any thread."""
        for event in events:
            self._send(event if isinstance(event, Accepted) else Stepped((event,), self.running))

    def due(self) -> bool:
        """Whether a message should go out now: something ended, or the last one was FLUSH_SECONDS ago."""
        return bool(self._events) or time.perf_counter() - self._sent_at >= FLUSH_SECONDS

    def flush(self, running: int, cells: int) -> None:
        """Sends one message for all that the last steps made."""
        pieces = []
        for sequence in self._unsent:
            pieces.append(Piece(sequence.id, sequence.unsent, tuple(sequence.logprobs), sequence.n_tokens - sequence.n_told))
            sequence.unsent, sequence.n_told = "", sequence.n_tokens
            sequence.logprobs.clear()
        events, self._events, self._unsent, self.running = (*pieces, *self._events), [], [], running
        self._sent_at = time.perf_counter()
        self._send(Stepped(events, running, cells))

    def _send(self, message: Any) -> None:
        """With the parent gone the process ends."""
        try:
            self._pipe.send(message)
        except OSError:
            os._exit(0)


class Intake:
    """Takes in jobs and cancels: cancels take effect at once, texts are tokenized first.

    `receive` runs in the receiving thread. `tokenize` and `read_grammars` have one each: a newcomer waits for one input of each
    job that is being tokenized, and only one whose own grammar takes long waits for such grammars.
    """

    def __init__(self, llama: Llama, outbox: Outbox) -> None:
        self.llama, self.outbox = llama, outbox
        self.tokenizing, self.reading = Pulse(), Pulse()
        self.inbox: queue.SimpleQueue[Sequence | Embedding | None] = queue.SimpleQueue()  # None: look again, one is cancelled
        self.in_step: Seq[Sequence | Embedding] = ()  # the step loop says what it decodes in the main context
        self._submits: queue.SimpleQueue[Submission] = queue.SimpleQueue()
        self._grammars: queue.SimpleQueue[tuple[Submission, Seq[int]]] = queue.SimpleQueue()  # prompts whose grammars take long
        self._arriving: dict[int, Submission] = {}  # until they are tokenized; the thread that takes one out answers for it
        self._known: dict[int, Submission] = {}  # from their arrival to their end

    def receive(self, message: Submit | Cancel) -> None:
        """Takes a message from the parent."""
        if isinstance(message, Submit):
            submission = self._known[message.id] = self._arriving[message.id] = Submission(message)
            self._submits.put(submission)
            return
        for submission in filter(None, map(self._known.get, message.ids)):
            submission.cancelled = True
            if self._arriving.pop(submission.id, None):  # its text may be in the tokenizer, for seconds
                self.ended(submission.id)
                self.outbox.at_once(Accepted(submission.id, 0), Finished(submission.id, "cancelled", 0, 0))
        self.inbox.put(None)
        in_step = self.in_step
        if in_step and all(s.submission.cancelled for s in in_step):  # nobody waits for what is being decoded
            self.llama.main.abort(True)

    def ended(self, id: int) -> None:
        """The job has ended: a cancel comes too late now."""
        self._known.pop(id, None)

    def tokenize(self) -> None:
        """The tokenizing thread: jobs take turns, an input of each at a time."""
        turns: deque[Iterator[None]] = deque()
        while True:
            self.tokenizing.begin("rest")
            with contextlib.suppress(queue.Empty):
                while True:
                    turns.append(self._admit(self._submits.get(block=not turns)))
            self.tokenizing.begin("tokenize")
            job = turns.popleft()
            if next(job, "ended") is None:
                turns.append(job)

    def read_grammars(self) -> None:
        """The thread of grammars that take long: reads them one after another, while others' prompts go on."""
        while True:
            self.reading.begin("rest")
            submission, prompt = self._grammars.get()
            self.reading.begin("tokenize")
            with self._answering(submission):
                self._begin(submission, prompt)

    def _admit(self, submission: Submission) -> Iterator[None]:
        """Tokenizes a job and hands it on; yields where others may have their turn."""
        job = submission.job
        with self._answering(submission):
            if isinstance(job, Tokenize):
                self._hand_on(self._tokenized(submission.id, job))
            elif isinstance(job, Embed):
                self._hand_on(Embedding(submission, (yield from self._inputs(job, submission))))
            else:
                prompt, constraint = self._prompt(job), job.sampling.constraint
                if constraint is None or self.llama.machines.are_quick_to_make(constraint.grammar):
                    self._begin(submission, prompt)
                else:
                    self._grammars.put((submission, prompt))

    @contextlib.contextmanager
    def _answering(self, submission: Submission) -> Iterator[None]:
        """Answers the job with the error that is raised within: it must not end the others."""
        try:
            yield
        except Cancelled:
            log.debug("a grammar was left unread: its client is gone")
        except ApiError as error:
            self._hand_on(failure(submission.id, error))
        except Exception as error:
            log.exception("a job cannot begin")
            self._hand_on(failure(submission.id, GenerationFailed(f"{type(error).__name__}: {error}")))

    def _begin(self, submission: Submission, prompt: Seq[int]) -> None:
        """Hands a text to the step loop; its grammar is read first."""
        with TURN.behind(self.llama.gate, submission):
            sequence = Sequence(submission, prompt, self.llama)
        self._hand_on(sequence)

    def _hand_on(self, work: Sequence | Embedding | Tokens | Failed) -> None:
        """Hands work to the step loop, or sends what needs no step; unless the job was cancelled meanwhile."""
        if not self._arriving.pop(work.id, None):
            if isinstance(work, Sequence):
                work.sampler.close()
        elif isinstance(work, (Sequence, Embedding)):
            self.outbox.at_once(Accepted(work.id, work.n_prompt))
            self.inbox.put(work)
        else:
            self.ended(work.id)
            count = len(work.ids) if isinstance(work, Tokens) else 0
            answer = (Accepted(work.id, count), work, Finished(work.id, "stop", count, 0))
            self.outbox.at_once(*(answer if isinstance(work, Tokens) else (work,)))

    def _tokenized(self, id: int, job: Tokenize) -> Tokens:
        """Tokens, and what they stand for if that was asked. Raises InvalidRequest for ids outside the vocabulary."""
        vocab, content = self.llama.vocab, job.content
        if isinstance(content, str):
            ends, special = job.add_special, job.parse_special
            content = tuple(vocab.tokens(content, first=ends, last=ends, special=special).tolist())
        else:
            self._check(content, "tokens")
        return Tokens(id, content, tuple(vocab.name(t) for t in content) if job.pieces else ())

    def _check(self, ids: Seq[int], name: str) -> None:
        """Raises InvalidRequest for token ids outside the vocabulary."""
        size = self.llama.vocab.size
        if (outside := next((t for t in ids if not 0 <= t < size), None)) is not None:
            raise InvalidRequest(f"{name} holds token id {outside}, the model's tokens are 0…{size - 1}: send text; the ids of "
                                 "another tokenizer (tiktoken) mean nothing here", name.partition("[")[0])  # fmt: skip

    def _prompt(self, job: Generate) -> Seq[int]:
        """The prompt's token ids; of its spare segments only the last ones, as many as fit beside the rest and an answer."""
        if not job.spare:
            return self._tokens(job.prompt)
        limit, ctx = job.sampling.max_tokens, self.llama.ctx
        room, first = ctx - len(self._tokens(job.prompt[job.spare :])), job.spare
        if limit is not None and limit < ctx:  # the answer was promised so many
            room -= limit
        for segment in reversed(job.prompt[: job.spare]):
            room -= len(self.llama.vocab.tokens(str(segment)))
            if room <= 0:
                break
            first -= 1
        return self._tokens(job.prompt[first:])

    def _tokens(self, prompt: Seq[Any]) -> Seq[int]:
        """The prompt's token ids. Raises ContextLengthExceeded, or InvalidRequest for ids outside the vocabulary."""
        vocab, ctx, tokens = self.llama.vocab, self.llama.ctx, prompt
        least = 0  # tokens of a text that is not tokenized to say exactly: megabytes take seconds
        if prompt and isinstance(prompt[0], int):
            self._check(prompt, "prompt")
        else:
            least = vocab.least_tokens(prompt, ctx)
            tokens = vocab.tokens(*prompt, first=True) if least < ctx else ()
        count, about = len(tokens) or least, "" if len(tokens) else "at least "
        if count >= ctx:
            error = ContextLengthExceeded(
                f"The prompt has {about}{count} tokens; this model's maximum context length is {ctx}, at least one of them for "
                "the answer"  # OpenAI's words, by which clients know the error
            )
            error.sizes = (count, ctx - 1)
            raise error
        return tokens if len(tokens) else self.llama.vocab.nothing

    def _inputs(self, job: Embed, submission: Submission) -> Generator[None, None, list[Any]]:
        """The token ids of each input, all int32 arrays; yields between them. Raises ContextLengthExceeded, or InvalidRequest."""
        size = int(self.llama.c.llama_model_n_embd_out(self.llama.model))
        if job.dimensions and job.dimensions > size:
            raise InvalidRequest(f"dimensions must be at most {size}, the size of the model's vectors, not {job.dimensions}",
                                 "dimensions")  # fmt: skip
        inputs: list[Any] = []
        for index, input in enumerate(job.inputs):
            if submission.cancelled:
                break
            inputs.append(self._input(job, index, input))
            yield
        return inputs

    def _input(self, job: Embed, index: int, input: str | tuple[int, ...]) -> Any:
        vocab, ctx = self.llama.vocab, self.llama.ctx
        if job.truncate and len(input) > vocab.COUNTED:  # no token stands for more than the longest piece
            input = input[: ctx * vocab.longest]
        name, tokens, least = f"input[{index}]", (), 0
        if isinstance(input, tuple):
            self._check(input, name)
            tokens = self.llama.np.array(input, self.llama.np.int32)
        elif job.truncate or (least := vocab.least_tokens((input, job.query or ""), ctx + 1)) <= ctx:
            tokens = vocab.tokens(input, first=True, last=True) if job.query is None else vocab.pair(job.query, input)
        if len(tokens) > ctx and job.truncate:
            tokens = self.llama.np.concatenate([tokens[: ctx - 1], tokens[-1:]])  # the last one may be the model's own end
        count, about = len(tokens) or least, "" if len(tokens) else "at least "
        if count > ctx:  # refused, as OpenAI does: no search would find what was cut off
            name, param = (name, "input") if job.query is None else (f"documents[{index}] with the query", "documents")
            raise ContextLengthExceeded(f"{name} has {about}{count} tokens; the model reads up to {ctx} (split the text)",
                                        param=param)  # fmt: skip
        return tokens if len(tokens) else self.llama.vocab.nothing


class Engine:
    """The step loop of one model, in the child's main thread. Intake, Scheduler, PromptReader and Outbox do the rest."""

    PATIENCE = 0.01  # seconds of each step in which grammars are asked what comes next
    SEEKING, SEEKING_EACH = 5.0, 0.1  # seconds in which one may be asked for a text, and more for each token
    GARBAGE, MOST_GARBAGE = 10, 1000  # collections of young objects before all are looked at: while idle, and while text runs

    def __init__(self, llama: Llama, pipe: Pipe, pulse: Pulse) -> None:
        self.llama, self.main, self.pulse = llama, llama.main, pulse
        self.outbox = Outbox(pipe)
        self.intake = Intake(llama, self.outbox)
        self.inbox = self.intake.inbox
        self.scheduler = Scheduler(llama, llama.options.parallel)
        self.embedder = Embedder(llama, self.scheduler, self._step_streams)
        self._aside = llama.on_cpu  # whether to make a prompt reader: a GPU is quick with slices
        self._several = False  # whether several sequences have run at once, since that was last asked
        self._sought = 0.0  # seconds of this step in which grammars were asked

    def run(self) -> None:
        """Main loop: takes messages, steps while work remains, sleeps otherwise."""
        while True:
            if self.scheduler.active or self.scheduler.waiting or self.embedder.jobs:
                self._take_all()
                self.step()
            else:
                self._rest()
                self.pulse.begin("rest")
                self._take(self.inbox.get())

    def _rest(self) -> None:
        """Idle work: saves prefixes, makes the prompt reader where several sequences ran at once, runs the cycle collector."""
        while self.inbox.empty() and self._tidy():
            pass
        if self._several and self._aside and not self.scheduler.reader and self.inbox.empty():
            self._make_reader()
        if gc.get_count()[2] >= self.GARBAGE and self.inbox.empty():
            gc.collect()

    def _tidy(self) -> bool:
        """Moves a prefix out of the cache, between steps that nobody waits for; False when there is none."""
        return self.llama.on_cpu and self.scheduler.cache.save_oldest()

    def _take_all(self) -> None:
        while not self.inbox.empty():
            self._take(self.inbox.get())

    def _take(self, work: Sequence | Embedding | None) -> None:
        if isinstance(work, Embedding):
            self.embedder.add(work)
        elif work is not None:
            self.scheduler.waiting.append(work)
            self._jump(work)
            if work.n_jumped or work.done:
                self._flush()
        if work is None or work.submission.cancelled:
            for gone in [s for s in (*self.scheduler.active, *self.scheduler.waiting) if s.submission.cancelled]:
                self._finish(gone, "cancelled")
            self._flush()

    def step(self) -> None:
        """A step of the main context, or a batch of the prompt reader with the main context's steps in between."""
        self.scheduler.admit()
        self._several = self._several or len(self.scheduler.running) > 1
        self.scheduler.move_aside()
        if self.scheduler.aside:
            self._read_aside()
        else:
            self._decode()
        if self.embedder.jobs:
            self._embed()

    def _embed(self) -> None:
        """One batch of inputs that become vectors; running streams step in the middle of it."""
        embedder = self.embedder
        self._end_embeddings()
        self.main.abort(False)
        self.pulse.begin("decode")
        try:
            if plan := embedder.plan():
                if embedder.context is self.main:
                    self.intake.in_step = [i.job for i, _ in plan]
                embedder.step(plan)
        except (ApiError, LoadError) as error:
            for job in embedder.jobs:
                job.error = error if isinstance(error, ApiError) else GenerationFailed(str(error))
        self.intake.in_step = ()
        self._end_embeddings()
        if self.outbox.due():
            self._flush()

    def _end_embeddings(self) -> None:
        """Lets go of jobs that are over; not in the middle of a batch, whose cells cannot be dropped."""
        for job in [j for j in self.embedder.jobs if j.is_over]:
            self.outbox.embedded(job)
            self.embedder.drop(job)
            self.intake.ended(job.id)

    def _make_reader(self) -> None:
        """Makes the prompt reader. Clearing its memory takes as long as many steps, so it is made when none runs."""
        self._several = False
        free, need = available_memory(), self.llama.kv_bytes * self.llama.ctx + 64 * MIB
        try:
            if free is None or free > 2 * need:
                self.scheduler.reader = PromptReader(self.llama, self.scheduler.due, self._step_streams)
        except LoadError as error:
            self._aside = False
            log.warning("long prompts are read in slices: %s", error)

    def _read_aside(self) -> None:
        """Reads one batch of the prompts aside."""
        reader = self.scheduler.reader
        assert reader
        self.pulse.begin("decode")
        if status := reader.read():
            for sequence in reader.reading:
                self._fail(sequence, f"llama_decode returned {status}")
            self._flush()
        self.scheduler.bring_back()

    def _step_streams(self) -> None:
        """In the middle of the prompt reader's batch: lets newcomers in and streams step."""
        self._take_all()
        self.scheduler.admit()
        self._decode()
        self.pulse.begin("decode")  # the batch goes on

    def _decode(self) -> None:
        """One decode in the main context for everybody: prompts advance, decoding sequences gain a token."""
        scheduler = self.scheduler
        if self._running() != self.outbox.running:
            self._flush()
        self._ask_again()
        plan = scheduler.schedule()
        if not plan:
            scheduler.stepped_at = time.perf_counter()
            return
        if all(count == 1 for _, count in plan):
            self._tidy()  # takes as long as a short step; beside a prompt it would add to the gap
        decoding = sum(1 for s, _ in plan if s.is_stream)
        self.main.abort(False)
        self.intake.in_step = [s for s, _ in plan]
        self.pulse.begin("decode")
        with self._undisturbed(decoding):
            started = time.perf_counter()
            status = self.main.decode(plan)
        scheduler.stepped_at, self.intake.in_step = time.perf_counter(), ()
        if status:
            self._recover(status, plan)
            return
        scheduler.pace.record(decoding, sum(count for _, count in plan), scheduler.stepped_at - started)
        self.pulse.begin("sample")
        urgent = self._sample(plan)
        if urgent or self.outbox.due():
            self._flush()

    def _undisturbed(self, decoding: int) -> contextlib.AbstractContextManager[None]:
        """Keeps a grammar that is being read off the processors for a step of streams, if that takes them all.

        Before it the grammar has its part, of a slow step more: else it would take minutes beside a large model.
        """
        gate = self.llama.gate
        if gate is None or not decoding:
            return contextlib.nullcontext()
        least = max(self.PATIENCE / 4, self.scheduler.pace.usual(decoding) / 3)
        return gate.shut(max(least, self.PATIENCE - self._sought))

    def _recover(self, status: int, plan: Seq[tuple[Sequence, int]]) -> None:
        """After a decode that did not do its work (llama.h): 1 no free cells, 2 aborted, below zero an error."""
        if status == 1:
            back = self.scheduler.make_room()
            if back and not self.scheduler.running:  # it was alone, and the pool holds a whole context
                self._fail(back, "the KV cache is full")
        elif status == 2:
            self.scheduler.cache.undo([s for s, _ in plan])
        else:
            for sequence in list(self.scheduler.running):
                self._fail(sequence, f"llama_decode returned {status}")
            self.scheduler.cache.clear(True)
        self._flush()

    def _sample(self, plan: Seq[tuple[Sequence, int]]) -> bool:
        """Picks a token for every sequence that is fully evaluated; whether one of them is a first token."""
        ready, row, end = list[tuple[Sequence, int, slice]](), -1, 0  # each with its last row, and its part of the logits
        for sequence, count in plan:
            row += count
            sequence.n_computed += count
            is_read = sequence.n_computed == sequence.n_tokens
            if is_read or sequence.scored:
                start, end = end, end + (count if sequence.scored else 1)
                ready.append((sequence, row, slice(start, end)))
            if not is_read and sequence.n_computed in sequence.borders:
                self.scheduler.cache.save(Prefix(sequence, self.main.oldest(sequence.row)))
        if not ready:
            return False
        logits = self.main.logits(end)
        peaks = logits.max(axis=1)  # not a number if one of them is none: what sorts them may then leave its array
        first = False
        for sequence, row, part in ready:
            if not self.llama.np.isfinite(peaks[part]).all():
                self._fail(sequence, "the model's output is not a number")
                continue
            if sequence.scored:
                self._score(sequence, logits[part])
            if not sequence.pending and sequence.n_tokens >= sequence.limit:  # nothing but the echo was wanted
                self._finish(sequence, "length")
            elif not sequence.pending:
                first = first or not sequence.first_token
                self._pick(sequence, logits[part][-1], row)
        return first

    def _score(self, sequence: Sequence, logits: Any) -> None:
        """Gives out the prompt's tokens that its rows computed last were to predict; the first of all has no row before it."""
        vocab, echo, alternatives = self.llama.vocab, sequence.echo, sequence.sampling.logprobs or 0
        start, end = sequence.n_computed - len(logits) + 1, min(sequence.n_computed + 1, sequence.n_prompt)
        assert echo
        for at in range(echo.n_told, end):
            token = int(sequence.tokens[at])
            known = LogProbs(vocab, logits[at - start]).of(token, alternatives) if at else None
            told, text = echo.tell(known or TokenLogprob(vocab.name(token), math.nan, id=token))
            sequence.logprobs.append(told)
            self.outbox.text(sequence, text)

    def _ask_again(self) -> None:
        """Resumes unfinished grammars, least served first."""
        self._sought = 0.0
        for sequence in sorted(self.scheduler.running, key=lambda s: s.sought):
            if sequence.jumps:
                self._jump(sequence)
            elif sequence.logits is not None and not sequence.pending:
                self._pick(sequence, sequence.logits, -1)
            if self.outbox.due():
                self._flush()

    def _ask(self, sequence: Sequence, question: Callable[[], Result]) -> Result | None:
        """What a sequence's grammar answers; None if it needs more time, or cannot be followed, which ends the sequence."""
        share = self.PATIENCE / max(1, len(self.scheduler.running))
        fault, began = None, time.thread_time()
        TURN.begin(max(self.PATIENCE - self._sought, share))
        try:
            return question()
        except NotYet:
            if sequence.sought > self.SEEKING:
                fault = InvalidRequest("the grammar is too intricate: what may come next is not found in time")
        except InvalidRequest as error:
            fault = error
        finally:
            spent = time.thread_time() - began
            self._sought += spent
            sequence.sought += spent
        if fault and sequence.sampler.grammar:
            self._fail(sequence, sequence.sampler.grammar.named(fault))
        return None

    def _pick(self, sequence: Sequence, scores: Any, row: int) -> None:
        """One more token for one sequence, with what must come behind it; its end if that was the last."""
        sampling, vocab = sequence.sampling, self.llama.vocab
        sequence.first_token = sequence.first_token or time.perf_counter()
        known = None if sampling.logprobs is None else LogProbs(vocab, scores)
        forced, token = bool(sequence.forced), self._ask(sequence, lambda: sequence.next_token(scores, row))
        sequence.logits = scores.copy() if token is None and not sequence.done else None
        if token is None:
            return
        sequence.sought = max(0.0, sequence.sought - self.SEEKING_EACH)
        if token < 0 and sequence.sampler.is_stuck:
            self._fail(sequence, "The document cannot go on: no token that may follow is allowed or in the vocabulary")
            return
        if token < 0 or (token in vocab.eog and not sampling.ignore_eos and not forced):
            self._finish(sequence, "stop")
            return
        sequence.append(token)
        if known:
            sequence.unshown.append(known.of(token, sampling.logprobs or 0))
        self._jump(sequence)

    def _jump(self, sequence: Sequence) -> None:
        """Appends what must come next, and gives out what is there. Waiting for it keeps tokenization independent of timing."""
        sequence.jumps = self._ask(sequence, sequence.jump) is None
        if sequence.done:
            return
        self._show(sequence)
        if sequence.text.stopped or sequence.sampler.is_done:
            self._finish(sequence, "stop")
        elif sequence.n_tokens >= sequence.limit and not sequence.scored:
            self._finish(sequence, "length")

    def _show(self, sequence: Sequence) -> None:
        """Gives out the text of tokens that were not shown yet, up to a stop string."""
        vocab = self.llama.vocab
        while sequence.n_shown < sequence.n_tokens and not sequence.text.stopped:
            token = int(sequence.tokens[sequence.n_shown])
            sequence.n_shown += 1
            marker = vocab.marker_pieces.get(token) if sequence.markers else None
            piece = marker.encode() if marker in sequence.markers else vocab.piece(token)
            self.outbox.text(sequence, sequence.show(piece))
            if sequence.thought:
                sequence.watch_thought(vocab.shown(token))

    def _finish(self, sequence: Sequence, reason: str) -> None:
        self.outbox.finished(sequence, reason)
        self._retire(sequence)

    def _fail(self, sequence: Sequence, error: ApiError | str) -> None:
        self.outbox.failed(sequence.id, GenerationFailed(error) if isinstance(error, str) else error)
        self._retire(sequence)

    def _retire(self, sequence: Sequence) -> None:
        self.scheduler.retire(sequence)
        self.intake.ended(sequence.id)
        sequence.logits = None
        sequence.sampler.close()

    def _running(self) -> int:
        return len(self.scheduler.active) + len(self.embedder.jobs)

    def _flush(self) -> None:
        self.outbox.flush(self._running(), min(self.llama.pool, held_cells(self.scheduler.running)))


BEAT_SECONDS = 1.0  # between two heartbeats of a child
START_SECONDS = 10.0  # a thread that has not begun by then never will


def engine_main() -> None:
    """The child's main: messages on stdin and stdout. Never returns."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # else an abort() in native code starts a debugger
    # llama.cpp's threads wait for each other busily, GNU's OpenMP for milliseconds: beside one other busy program a step then
    # took up to twenty times as long; some 30 µs at most cost nothing where there is none
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    reader, writer = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what native code prints must not run into the messages
    pipe, ready = Pipe(reader, writer, in_child=True), queue.SimpleQueue[Intake]()
    # to look through a grammar's states for garbage takes as long as several steps; idle engines do it
    gc.set_threshold(*gc.get_threshold()[:2], Engine.MOST_GARBAGE)
    sys.setswitchinterval(0.0005)  # a thread that reads a grammar must not hold up the step loop: usual are 5 ms, at each call
    try:
        load, pulses = pipe.receive(), [pulse := Pulse()]
    except EOFError:  # it was unloaded before it began
        os._exit(0)
    start_or_die(lambda: _receive(pipe, ready))
    start_or_die(lambda: _beat(pipe, pulses))

    def progress(fraction: float) -> None:
        pulse.begin("load")
        pipe.send(Progress(fraction))

    try:
        pulse.begin("load")
        llama = Llama(load, progress)
        pulse.begin("trial", 60 + llama.size_bytes // (50 * MIB))  # the first step reads the weights from a slow disk
        llama.trial()
        engine = Engine(llama, pipe, pulse)
        pulses += [engine.intake.tokenizing, engine.intake.reading]
        for work in (engine.intake.tokenize, engine.intake.read_grammars):
            start_or_die(work, stack=64 * MIB)  # many times what Vocabulary.MAX_RUN needs
        pipe.send(llama.loaded())
    except Exception as error:  # the process's border: whatever it is, the parent is told
        cause = "memory" if isinstance(error, MemoryError) else getattr(error, "cause", "")
        pipe.send(LoadFailed(str(error) or type(error).__name__, cause))
        os._exit(1)
    ready.put(engine.intake)
    engine.run()


def _receive(pipe: Pipe, ready: queue.SimpleQueue[Intake]) -> None:
    """The child's receiving thread: there from the first moment, so that a parent that dies during a load is noticed."""
    intake: Intake | None = None
    while True:
        try:
            message = pipe.receive()
        except (EOFError, OSError):
            os._exit(0)
        intake = intake or ready.get()
        intake.receive(message)


def _beat(pipe: Pipe, pulses: Seq[Pulse]) -> None:
    """The child's heartbeat thread: native code lets it run, so its silence means that the whole process hangs."""
    while True:
        try:
            pipe.send(Alive(next(filter(None, [pulse.beat() for pulse in pulses]), "")))
        except OSError:
            os._exit(0)
        time.sleep(BEAT_SECONDS)


def start_or_die(work: Callable[[], None], stack: int = 0) -> None:
    """Starts a thread whose failure ends the process, with so many bytes of stack (0: as usual).

    Not by `Thread.start`: that waits for ever for a thread which has no memory to begin.
    """
    begun = threading.Event()

    def guarded() -> None:
        begun.set()
        try:
            work()
        except Exception:
            try:
                log.exception("the engine fails")
            finally:  # without memory even that may fail
                os._exit(1)

    threading.stack_size(stack)
    _thread.start_new_thread(guarded, ())
    threading.stack_size(0)
    if not begun.wait(START_SECONDS):
        os._exit(1)


# ── 11. Worker ────────────────────────────────────────────────────────────────────────────────────────────────────────
# The parent's side of a child: starts it, carries messages, notices its death.


SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKENS = (1.0, 10.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10_000.0, 25_000.0, 50_000.0, 100_000.0)


class Histogram:
    """Values counted by the smallest bound that holds them. Whoever adds holds its owner's lock; anybody may read."""

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value


@dataclass
class Timing:
    """A job as its model's meter follows it. Owned by the thread that reads the child's messages."""

    began: float  # monotonic seconds: when its request came, before the model was loaded for it
    generates: bool
    last: float = 0.0  # when its last piece came
    tokens: int = 0  # generated, that have been counted


class Meter:
    """Counts what a model has done since the server began. Counters only rise, however often the model is unloaded.

    Any thread may count; a lock, about a microsecond, is taken for each piece of text and each end, never for a token.
    """

    ENDS: ClassVar = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}  # vLLM's words
    RECENT_SECONDS = 60.0  # of which the tokens per second tell

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.prompt_tokens = self.computed_tokens = self.cached_tokens = self.sought_tokens = self.generated_tokens = 0
        self.prompt_seconds = self.decode_seconds = 0.0
        self.loads = self.load_failures = self.deaths = 0
        self.ends = dict.fromkeys(self.ENDS.values(), 0)
        self.first_token, self.gap, self.per_token, self.queue = Histogram(), Histogram(), Histogram(), Histogram()
        self.prefill, self.decode, self.inference, self.whole = Histogram(), Histogram(), Histogram(), Histogram()
        self.prompt_sizes, self.answer_sizes = Histogram(TOKENS), Histogram(TOKENS)
        self._recent: deque[tuple[float, Finished]] = deque(maxlen=256)

    def piece(self, job: Timing, tokens: int) -> None:
        """Text came: the first of its sequence, or a gap after the last."""
        now = time.monotonic()
        with self._lock:
            if job.last:
                self.gap.add(now - job.last)
            else:
                self.first_token.add(now - job.began)
            self.generated_tokens += tokens
        job.last, job.tokens = now, job.tokens + tokens

    def finished(self, job: Timing, end: Finished) -> None:
        """A job has ended as the engine says. What it did not compute it waited for: the load, its turn, its first step."""
        now = time.monotonic()
        computing = end.prompt_seconds + end.decode_seconds
        with self._lock:
            self._recent.append((now, end))
            self.ends[self.ENDS[end.finish_reason]] += 1
            self.prompt_tokens += end.prompt_tokens
            self.computed_tokens += end.prompt_tokens - end.cached_tokens
            self.cached_tokens += end.cached_tokens
            self.sought_tokens += end.prompt_tokens * job.generates
            self.generated_tokens += end.completion_tokens - job.tokens
            self.prompt_seconds += end.prompt_seconds
            self.decode_seconds += end.decode_seconds
            self.prompt_sizes.add(end.prompt_tokens)
            self.whole.add(now - job.began)
            self.inference.add(computing)
            self.queue.add(max(0.0, now - job.began - computing))
            self.prefill.add(end.prompt_seconds)
            if job.generates:
                self.decode.add(end.decode_seconds)
                self.answer_sizes.add(end.completion_tokens)
            if end.completion_tokens > 1:
                self.per_token.add(end.decode_seconds / (end.completion_tokens - 1))

    def failed(self, job: Timing) -> None:
        """A job broke off."""
        with self._lock:
            self.ends["error"] += 1
            self.whole.add(time.monotonic() - job.began)

    def moved(self, before: str, after: str) -> None:
        """The model went from one state to another (Entry.state)."""
        with self._lock:
            self.loads += after == "loaded"
            self.load_failures += (before, after) == ("loading", "failed")
            self.deaths += (before, after) == ("loaded", "failed")

    def recent(self) -> list[Finished]:
        """The ends of the last minute, 256 at most."""
        with self._lock:
            return [end for when, end in self._recent if when > time.monotonic() - self.RECENT_SECONDS]


class Metrics:
    """Counters of the whole server, and a Meter for each model. Any thread may count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.meters: dict[str, Meter] = {}  # by id; of every model that was ever wanted
        self.answers = Counter[tuple[str, str, str, str]]()  # by method, route, API and status
        self.connections = self.accepted = self.refused = 0  # the server's, whose accepting thread and lock write them

    def meter(self, id: str) -> Meter:
        return self.meters.setdefault(id, Meter())

    def answered(self, method: str, route: str, api: str, status: int) -> None:
        """A request is over. Only words that the route table knows come here, so that their number is bounded."""
        with self._lock:
            self.answers[method, route, api, str(status or "none")] += 1


class Generation:
    """One request's jobs in the engine: iterate over their messages, cancel at any time.

    Iteration ends when every job has finished. It raises ApiError when one failed or the child died, and Cancelled after
    a cancel that was not gentle. Closing the iterator cancels what has not finished.
    """

    def __init__(self, worker: Worker, ids: Seq[int]) -> None:
        self.worker, self.index = worker, {id: i for i, id in enumerate(ids)}
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._open = set(ids)
        self._given = self.taken = 0  # bytes of pieces, by the worker's reading thread and by the one that iterates

    def give(self, message: Any) -> None:
        """Hands on a message; called by the worker's reading thread alone. A client too far behind is given up."""
        self.inbox.put(message)
        if isinstance(message, Piece) and self._given - self.taken <= MAX_UNREAD:
            self._given += message.size
            if self._given - self.taken > MAX_UNREAD:
                self.worker.cancel(self.index)
                self.inbox.put(GenerationFailed(f"The client reads too slowly: {human_bytes(MAX_UNREAD)} wait for it"))

    def cancel(self, gently: bool = False) -> None:
        """Ends the engine's work at once; the iteration too, or gently with what the engine says of its end. Any thread."""
        if self._open:
            self.worker.cancel(self.index)
        if not gently:
            self.inbox.put(Cancelled())

    def __iter__(self) -> Iterator[Queued | Waiting | Piece | Vectors | Tokens | Finished]:
        early: list[Any] = []  # what the first jobs say before the last one has passed its checks
        prompt_tokens = 0
        try:
            for _ in self.index:
                while not isinstance(message := self._next(), Accepted):
                    if isinstance(message, Waiting):
                        yield message
                    else:
                        early.append(message)
                prompt_tokens += message.prompt_tokens
            yield Queued(self.worker.info.id, prompt_tokens)
            yield from early
            while self._open:
                yield self._next()
        finally:
            if self._open:
                self.worker.cancel(self._open)

    def _next(self) -> Any:
        """The next message; raises what ended the request."""
        try:
            message = self.inbox.get(timeout=PING_SECONDS)
        except queue.Empty:
            return Waiting()
        if isinstance(message, Exception):
            raise message
        if isinstance(message, Failed):
            error = ERRORS[message.code](message.details, param=message.param)
            error.sizes = message.sizes
            raise error
        if isinstance(message, Finished):
            self._open.discard(message.id)
        elif isinstance(message, Piece):
            self.taken += message.size
        return message


class LoadFailure(GenerationFailed, message="The model could not be loaded"):
    """An engine could not load its model; `cause` as LoadFailed has it."""

    def __init__(self, details: str = "", cause: str = "") -> None:
        super().__init__(details)
        self.cause = cause


class Worker:
    """One model's child process, and three threads: one reads its messages, one writes to it, one watches over it.

    Any thread may call; only `start` and `stop` wait for the child.
    """

    SILENCE = 30  # seconds without any message: the child's heartbeat needs no more than its turn and the interpreter
    STARTING = 180  # the same while libraries are loaded, which may hold the interpreter; GPU builds have gigabytes of them
    _ids = itertools.count(1)

    def __init__(self, info: ModelInfo, setup: Setup, max_queue: int, died: Callable[[Worker, str], None],
                 report: Callable[[str], None], meter: Meter | None = None) -> None:  # fmt: skip
        """`died` is called when the child ends by itself, `report` gets a line about each step of the load."""
        self.info, self.setup, self.max_queue, self._died, self._report = info, setup, max_queue, died, report
        self._meter = meter or Meter()
        self._lock = threading.Lock()
        # by id, until the child says how a job ended, wanted or not; the meter does not count those of the tokenizer alone
        self._jobs: dict[int, tuple[Generation, Timing | None]] = {}
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()  # what the writing thread sends; None: no more
        self._loading: queue.SimpleQueue[Progress | Loaded | LoadFailed] = queue.SimpleQueue()
        self._heard, self._patience = False, self.STARTING  # since the last tick; and how long its silence is borne
        self._ended = threading.Event()
        self._why = ""  # why the child was given up
        self.cause = ""  # why the child ended by itself, as LoadFailed has it
        self._running = self.cells = 0
        self._serving = self._stopping = False
        self.alive = True
        self.chat: Chat | None = None  # the service's

    def start(self, progress: Callable[[float], None]) -> Worker:
        """Starts the child and waits until the model is loaded. Raises LoadFailure if it is not, also after `stop`."""
        began, id = time.perf_counter(), printable(self.info.id)
        self._report(f"loading {id} ({human_bytes(self.info.size_bytes)})")
        self._start_child()
        self._outbox.put(Load(replace(self.info, path=os.path.abspath(self.info.path)), self.setup))
        while isinstance(message := self._loading.get(), Progress):
            progress(message.fraction)
        if isinstance(message, LoadFailed):
            self.stop()
            raise LoadFailure(f"Model '{self.info.id}': {message.reason}", cause=message.cause)
        self.loaded: Loaded = message
        self.loaded_at = time.monotonic()
        self.load_seconds = time.perf_counter() - began
        for note in message.notes:
            log.warning("%s: %s", id, printable(str(note)))
        pool = f"; its KV pool of {message.pool:,} tokens takes up to {human_bytes(message.pool_bytes)}" if message.pool else ""
        pool += f"; {message.devices}" if message.devices else ""
        self._report(f"loaded {id} in {self.load_seconds:.1f} s: {human_bytes(self.memory_bytes())} of memory{pool}")
        self._serving = True
        return self

    def _start_child(self) -> None:
        with self._lock:
            if self._stopping:
                raise LoadFailure(f"Model '{self.info.id}': unloaded before it was loaded")
            self.process, reader, writer = start_child("engine_main")
            self._pipe = Pipe(reader, writer)
        try:
            for work in (self._read, self._write, self._watch):
                threading.Thread(target=work, name=f"{work.__name__[1:]} {self.info.id}", daemon=True).start()
        except RuntimeError:  # no more threads to be had
            self.stop()
            raise

    def submit(self, jobs: Seq[Job], cancel: Cancellation, began: float | None = None) -> Generation:
        """Queues jobs as one generation, whose request came at `began` (monotonic seconds).

        Raises Overloaded when the queue is full, GenerationFailed without a child.
        """
        ids = [next(self._ids) for _ in jobs]
        generation = Generation(self, ids)
        with self._lock:
            if not self.alive:
                raise GenerationFailed("The model's engine process ended")
            if len(ids) > self.loaded.parallel + self.max_queue:
                most = self.loaded.parallel + self.max_queue
                raise InvalidRequest(f"n: {len(ids)} texts are more than the {most} that --max-queue leaves room for", "n")
            waiting = len(self._jobs) - self.loaded.parallel
            if waiting + len(ids) > self.max_queue:
                raise Overloaded(f"{max(waiting, 0)} requests wait already (--max-queue {self.max_queue})")
            for id, job in zip(ids, jobs, strict=True):
                timing = Timing(began or time.monotonic(), isinstance(job, Generate))
                self._jobs[id] = generation, None if isinstance(job, Tokenize) else timing
        for id, job in zip(ids, jobs, strict=True):
            self._outbox.put(Submit(id, job))
        cancel.on_cancel(lambda: generation.cancel(cancel.gently))
        return generation

    def cancel(self, ids: Iterable[int]) -> None:
        """Lets the engine end these jobs within a step. Never waits: the child may hang."""
        self._outbox.put(Cancel(tuple(ids)))

    def _write(self) -> None:
        """The writing thread: a child that hangs, with its pipe full, holds up this one only."""
        with contextlib.suppress(OSError, ValueError):  # the reading thread notices the same death
            while (message := self._outbox.get()) is not None:
                self._pipe.send(message)

    def _read(self) -> None:
        """The reading thread: hands every message to its generation, or to the load."""
        try:
            while True:
                message = self._pipe.receive()
                self._heard = True
                if not isinstance(message, Alive):
                    self._patience = self.SILENCE
                elif message.stuck:
                    self._give_up(printable(message.stuck))
                if isinstance(message, Stepped):
                    self._running, self.cells = message.running, message.cells
                    for event in message.events:
                        self._take(event)
                elif isinstance(message, (Progress, Loaded, LoadFailed)) and not self._serving:
                    self._loading.put(message)
                elif isinstance(message, Accepted):
                    self._take(message)
        except (EOFError, OSError):
            pass
        except Exception:  # a thread's border: a child that cannot be understood is no use
            log.exception("%s: what the engine process says is unreadable", self.info.id)
            self._give_up("what it says is unreadable")
        self._pipe.end()
        self._end()

    def _take(self, event: Any) -> None:
        """Tells the meter what the child says of a job, whether or not anybody still waits for it, and hands it on."""
        generation, timing = self._jobs.get(event.id, (None, None))
        if isinstance(event, (Finished, Failed)):
            with self._lock:
                self._jobs.pop(event.id, None)
        if timing and isinstance(event, Piece):
            self._meter.piece(timing, event.tokens)
        elif timing and isinstance(event, Finished):
            self._meter.finished(timing, event)
        elif timing and isinstance(event, Failed) and event.code == GenerationFailed.code:  # else the request was at fault
            self._meter.failed(timing)
        if generation:
            generation.give(event)

    def _watch(self) -> None:
        """The watching thread: gives up a child that is silent, and one that not even a kill ends.

        It counts ticks of a second, not the time of a clock: a machine that slept, or a server that was stopped and
        continued, finds its children alive.
        """
        silent = 0
        while not self._ended.wait(BEAT_SECONDS):
            silent, self._heard = 0 if self._heard else silent + 1, False
            if silent * BEAT_SECONDS > self._patience:
                self._give_up(f"it said nothing for {self._patience} s")
        self._outbox.put(None)

    def _give_up(self, why: str) -> None:
        """Kills the child, and tells everybody it carried why."""
        self._why = self._why or f"the engine process was ended: {why}"
        self.process.kill()
        with contextlib.suppress(Exception):
            self.process.wait(5.0)  # in an uninterruptible wait for a disk it stays
        self._end()

    def _end(self) -> None:
        """The child is gone: fails everybody who waits for it. Only the first call counts."""
        with contextlib.suppress(Exception):
            self.process.wait(2.0)
        status = self.process.returncode
        reason = self._why or f"the engine process ended ({ending(status)})"
        cause = "hang" if self._why else "memory" if status == -KILLED else "crash" if has_crashed(status) else ""
        with self._lock:
            if self._ended.is_set():
                return
            self.alive, self._running, self.cells = False, 0, 0
            self.cause = "" if self._stopping else cause
            self._ended.set()
        if self._serving and not self._stopping:  # of a load the ladder tells
            log.error("%s: %s", self.info.id, reason)
        self._loading.put(LoadFailed("it was unloaded while it loaded" if self._stopping else reason, self.cause))
        self.fail_all(GenerationFailed(f"Model '{self.info.id}': {reason}"))
        with self._lock:
            jobs, self._jobs = self._jobs, {}
        for _, timing in jobs.values():
            if timing:
                self._meter.failed(timing)
        if self._serving:
            self._died(self, reason)

    def fail_all(self, error: ApiError) -> None:
        """Ends every generation with an error of its own: one that many threads raise would collect their tracebacks."""
        with self._lock:
            generations = {generation for generation, _ in self._jobs.values()}
        for generation in generations:
            generation.inbox.put(type(error)(error.details, error.message, error.param))

    def counts(self) -> tuple[int, int]:
        """Jobs that run, and jobs that wait."""
        with self._lock:
            total = len(self._jobs)
        running = min(self._running, total)
        return running, total - running

    def settings(self) -> dict[str, Any]:
        """How the model is loaded, for its status: `options` that differ from their defaults, `fallback` that was needed."""
        usual, loaded = EngineOptions(), self.loaded
        options = {k: v for k, v in vars(self.setup.options).items() if v != getattr(usual, k)}
        options |= {"chat_template": "given"} if "chat_template" in options else {}
        return {
            "context_length": loaded.ctx, "kv_pool": loaded.pool, "parallel": loaded.parallel, "options": options,
            "devices": loaded.devices, "fallback": self.setup.rung.words(),
        }  # fmt: skip

    def memory_bytes(self) -> int:
        return resident_bytes([self.process.pid]) if self.alive else 0

    def reserved_bytes(self) -> int:
        """Bytes of memory that count as free and are not: the engine has mapped them, or will fill them. Takes time."""
        return mapped_bytes([self.process.pid]) + max(0, self.loaded.memory_need - self.memory_bytes()) if self.alive else 0

    def stop(self) -> None:
        """Ends the child: it goes at the end of its pipe, else is killed. While it loads, `start` raises. Idempotent.

        Waits some ten seconds at most.
        """
        with self._lock:
            self._stopping, self.alive = True, False
            started = hasattr(self, "process")
        if started:
            self._pipe.close()
            if not self._ended.wait(3.0):
                self._give_up("it was to be unloaded")


class Ladder:
    """Finds a way in which models load on this machine: as configured, else a rung down, and another (Rung.below).

    A rung that a crash or a hang led to is remembered for models of that kind, in KnownFaults: the next start does not
    crash again. What want of memory led to is not: the memory may be there next time. `died` may come from any thread.
    """

    YOUNG = 300.0  # seconds behind a load, in which a crash is likely to come from how the model was loaded

    def __init__(self, faults: KnownFaults, report: Callable[[str], None]) -> None:
        self.faults, self.report = faults, report
        self._said: set[str] = set()
        self._crashes = Counter[str]()  # young engines that crashed, by model
        self._lowered: dict[str, Rung] = {}  # where to begin, by model

    def load(self, model: ModelInfo, setup: Setup, start: Callable[[Setup], Worker], asked: bool = False) -> Worker:
        """Loads by the highest rung that holds. `start` tries one, and raises LoadFailure.

        Raises the first rung's failure when none holds, and at once one that no other rung would mend. What a client
        `asked` for may itself be what crashes: that is remembered of no machine.
        """
        rung = kept = self._top(model)
        first: LoadFailure | None = None
        crash = ""  # what the first engine that crashed or hung said
        while True:
            try:
                worker = start(replace(setup, rung=rung))
                break
            except LoadFailure as failure:
                first = first or failure
                mendable = failure.cause not in ("", "room")
                gpu = mendable and self._uses_gpu(setup.options)
                lower = rung.below(failure.cause, gpu) if mendable else None
                if lower is None:
                    raise (failure if failure.cause == "room" else first) from None
                self._say(f"{printable(failure.details)}; trying again {lower.words()}", True)
                if failure.cause != "memory":
                    crash, kept = crash or failure.details, kept.below(failure.cause, gpu) or kept
                rung = lower
        if crash and not asked:
            self._remember(model, kept, crash)
        return worker

    def _top(self, model: ModelInfo) -> Rung:
        """Where to begin with a model: what its kind is known to need, without the kernels that are known to be broken."""
        kernels, new = self.faults.kernels()
        broken = {name: fault for name, fault in kernels.items() if fault}
        for name, fault in broken.items():
            self._say(f"this CPU's {name} kernels are broken in this build of llama-cpp-python ({fault}); "
                      "going on without them", new)  # fmt: skip
        rung = self._lowered.get(model.id) or self._known(model)
        return rung if rung.plain else replace(rung, without=tuple(broken))

    def _known(self, model: ModelInfo) -> Rung:
        known = self.faults.read().get("rungs")
        said: Any = known.get(self._kind(model)) if isinstance(known, dict) else None
        try:
            rung = Rung(plain=bool(said["plain"]), cpu=bool(said["cpu"]), gpu_share=float(said["gpu_share"]))
        except (KeyError, TypeError, ValueError):
            return Rung()
        reason = printable(str(said.get("reason")))
        self._say(f"{printable(model.id)} is loaded {rung.words()}, for models of its kind failed before: {reason}", False)
        return rung

    @staticmethod
    def _kind(model: ModelInfo) -> str:
        return f"{model.architecture} {model.quantization}"

    def _remember(self, model: ModelInfo, rung: Rung, reason: str) -> None:
        kept = {"plain": rung.plain, "cpu": rung.cpu, "gpu_share": rung.gpu_share, "reason": reason}
        self.faults.note("rungs", {self._kind(model): kept})
        self._say(f"{printable(model.id)} runs {rung.words()}; {self.faults.path} remembers that", True)

    def _say(self, words: str, new: bool) -> None:
        """Says something once; what is new to this machine also where only warnings are shown."""
        if words not in self._said:
            self._said.add(words)
            (log.warning if new else self.report)(words)

    @staticmethod
    def _uses_gpu(options: EngineOptions) -> bool:
        wanted = options.gpu_layers != 0 and options.device != ("none",)
        return wanted and any(device["kind"] in ("GPU", "IGPU") for device in engine_build()["devices"])

    def died(self, worker: Worker) -> None:
        """An engine ended by itself: the second crash of a young one takes its model a rung down."""
        model, cause = worker.info, worker.cause
        if not cause or time.monotonic() - worker.loaded_at > self.YOUNG:
            return
        self._crashes[model.id] += 1
        lower = worker.setup.rung.below(cause, worker.loaded.on_gpu)
        if lower and self._crashes[model.id] % 2 == 0:
            self._lowered[model.id] = lower
            self._say(f"{printable(model.id)} crashed twice soon after it was loaded; it goes on {lower.words()}", True)
            if cause != "memory":
                self._remember(model, lower, f"the engine crashed twice ({cause})")


# ── 12. Models in memory ──────────────────────────────────────────────────────────────────────────────────────────────
# The life of each model: loading, loaded, unloading; what the names in requests mean; and the table of both.

MakeWorker = Callable[[ModelInfo, Setup, Callable[[Worker, str], None]], Worker]  # not started yet; calls back when it dies


@dataclass(frozen=True)
class ModelSettings:
    """One model's settings: how it is loaded, and the defaults of its requests."""

    engine: EngineOptions = EngineOptions()
    sampling: Mapping[str, Any] = field(default_factory=dict)  # by field of Sampling
    system: str = ""  # the system message of chats without one
    keep_alive: float | None = None


@dataclass(frozen=True)
class Preset:
    """A section of a preset file: settings of the models that its name, the beginning of one, or a shell pattern means."""

    pattern: str
    engine: Mapping[str, Any] = field(default_factory=dict)  # by field of EngineOptions
    sampling: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()  # patterns of names that mean the model
    preload: bool = False
    keep_alive: float | None = None

    def means(self, id: str) -> bool:
        import fnmatch

        return fnmatch.fnmatchcase(id, self.pattern) or id.startswith(plain_id(self.pattern) or "\0")


class Settings:
    """The settings of every model.

    The closer to the model, the stronger: what its store says of it (Ollama's parameters), a preset file's [*], the
    command line, the model's own sections, what was asked for this load. Never changes; any thread may ask.
    """

    DEFAULT_ONLY = ("lora", "chat_template")  # on the command line these mean the default model: others would not fit them

    def __init__(self, flags: Mapping[str, Any] | None = None, presets: Seq[Preset] = (), one: bool = False) -> None:
        """`flags` are the fields of EngineOptions that the command line gives; `one`: a single model is served by these."""
        self._flags, self.presets, self._one = flags or {}, tuple(presets), one
        self._all = [p for p in presets if p.pattern == "*"]
        self.engine = self._merged([*self._all, Preset("*", self._flags)]).engine  # of no model in particular

    @staticmethod
    def _merged(layers: Seq[Preset], system: str = "") -> ModelSettings:
        engine = {name: value for layer in layers for name, value in layer.engine.items()}
        sampling = {name: value for layer in layers for name, value in layer.sampling.items()}
        keep = [layer.keep_alive for layer in layers if layer.keep_alive is not None]
        return ModelSettings(EngineOptions(**engine), sampling, system, keep[-1] if keep else None)

    def of(self, model: ModelInfo, is_default: bool, asked: Mapping[str, Any] | None = None) -> ModelSettings:
        """The settings of a model; `asked` are fields of EngineOptions that a request for its load gave."""
        stored = Preset("", model.stored.engine, model.stored.sampling)
        flags = {k: v for k, v in self._flags.items() if is_default or self._one or k not in self.DEFAULT_ONLY}
        own = [p for p in self.presets if p.pattern != "*" and p.means(model.id)]
        layers = [stored, *self._all, Preset("", flags), *own, Preset("", asked or {})]
        return self._merged(layers, model.stored.system)


@dataclass
class PendingLoad:
    """A model's load, from when it is wanted until it has ended. Touched only under the condition of Residents."""

    due: float  # monotonic: when it is given up if nobody waits for it and no room has come
    asked: dict[str, Any]  # fields of EngineOptions that it is to be loaded with, by request
    background: bool = False  # it is wanted although nobody waits for it
    refusal: ApiError | None = None  # why it cannot begin now
    error: ApiError | None = None  # how it ended, if badly


@dataclass
class Entry:
    """A model's life. Owned by Residents, touched only under its condition."""

    info: ModelInfo
    state: str = "unloaded"  # unloaded, loading, loaded, unloading, failed; changed by Residents.move alone
    progress: float = 0.0
    error: str | None = None
    worker: Worker | None = None  # while loaded and unloading
    starting: Worker | None = None  # while loading
    load: PendingLoad | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)  # fields of EngineOptions that requests gave for its last load
    crowded: str = ""  # why it did not fit beside the other models, until one of them is gone
    departures: int = 0  # times that it has left the memory
    failures: int = 0  # loads in a row that failed on every rung
    retry_at: float = 0.0  # monotonic: until then requests get the reason of the last failure
    leases: int = 0  # requests that use the worker now
    waiting: int = 0  # requests that wait for the load
    last_used: float | None = None  # seconds since the epoch
    idle_since: float = 0.0  # monotonic
    keep_alive: float | None = None  # seconds it stays when idle, as its last client wished; None: as the options have it

    @property
    def in_memory(self) -> bool:
        return self.state in ("loading", "loaded", "unloading")

    @property
    def idle(self) -> bool:
        """Nobody uses it, nor is about to: who waits while it is loaded wants it loaded with other options."""
        return self.state == "loaded" and not self.leases and (self.load is not None or not self.waiting)

    def status(self) -> dict[str, Any]:
        """The document of the status, load and unload routes, but for its memory: asking for that takes too long here."""
        running, waiting = self.worker.counts() if self.worker else (0, 0)
        return {
            "model": self.info.id, "status": self.state, "loaded": self.state == "loaded",
            "progress": round(self.progress, 3), "memory_bytes": 0,
            "requests_running": running, "requests_waiting": waiting + self.waiting,
            "last_used": self.last_used and round(self.last_used, 3), "error": self.error,
        } | (self.worker.settings() if self.worker else {})  # fmt: skip


@dataclass(frozen=True)
class TableOptions:
    """How many models stay in memory and for how long, and what names mean them."""

    max_loaded: int = 3
    keep_alive: float = -1  # seconds an idle model stays; 0: not at all, negative: for ever
    default: str | None = None  # a model's name, or the path among the catalog's files
    aliases: tuple[tuple[str, str], ...] = ()  # shell pattern, model
    preset_aliases: tuple[tuple[str, str], ...] = ()  # the same; their models need not be there


class Residents:
    """The models in memory: loads, evicts and unloads them.

    unloaded → loading → loaded → unloading → unloaded, or failed. One condition, `changed`, guards all entries. One
    thread loads, a model at a time, another ends engines, so that no wait holds it. Methods are called with it held,
    unless they say that they take it.
    """

    FIRST_PAUSE, LONGEST_PAUSE = 5.0, 600.0  # seconds after a load that failed on every rung; twice as many each time

    def __init__(self, make_worker: MakeWorker, ladder: Ladder, settings: Callable[[Entry, Mapping[str, Any]], ModelSettings],
                 options: TableOptions, metrics: Metrics) -> None:  # fmt: skip
        """`settings` is asked with the condition held."""
        self.changed = threading.Condition()
        self.entries: dict[str, Entry] = {}  # by id
        self.closed = False
        self._make_worker, self._ladder, self._settings = make_worker, ladder, settings
        self._options, self._metrics = options, metrics

    def move(self, entry: Entry, state: str, worker: Worker | None = None, error: str | None = None) -> None:
        """Takes an entry to a state with all that belongs to it, and wakes whoever waits."""
        self._metrics.meter(entry.info.id).moved(entry.state, state)
        entry.state, entry.worker, entry.starting, entry.error = state, worker, None, error
        entry.progress = 1.0 if state in ("loaded", "unloading") else 0.0
        if not entry.in_memory:
            entry.departures += 1
            for other in self.entries.values():
                other.crowded = ""
        self.changed.notify_all()

    def wake(self) -> None:
        """Lets waiters look again; takes the condition."""
        with self.changed:
            self.changed.notify_all()

    # Loading

    def want(self, entry: Entry, asked: Mapping[str, Any] | None = None, background: bool = False) -> PendingLoad:
        """The load of a model that is not loaded, or not as it is `asked` for; it begins as soon as there is room.

        Raises Overloaded when the server ends, GenerationFailed in the pause after a load that failed on every rung.
        """
        if self.closed:
            raise Overloaded("The server is shutting down")
        if self.entries.get(entry.info.id) is not entry:  # a scan has dropped it since its name was resolved
            raise ModelNotFound(f"Model '{entry.info.id}' is not available")
        load = entry.load or PendingLoad(time.monotonic() + LOAD_WAIT_SECONDS, dict(entry.asked))
        load.background |= background
        if entry.state != "loading":
            load.asked.update(asked or {})
        if entry.load is None:
            pause = entry.retry_at - time.monotonic()
            if entry.state == "failed" and pause > 0:
                raise GenerationFailed(f"{entry.error} (it is tried again in {pause:.0f} s, or by a request to load it)")
            if entry.state == "failed":
                self.move(entry, "unloaded")
            entry.load = load
            self._schedule()
            self.changed.notify_all()
        return load

    def _schedule(self) -> Entry | None:
        """The model that loads now: one that does, else that which is wanted longest of those for which there is room."""
        wanted = [(e.load, e) for e in self.entries.values() if e.load]
        for load, entry in sorted(wanted, key=lambda each: (each[1].state != "loading", each[0].due)):
            if entry.state == "loading":
                return entry
            if not entry.waiting and not load.background:  # whoever wanted it has left
                entry.load = None
            elif self._has_room(entry, load):
                self.move(entry, "loading")
                return entry
        return None

    def _has_room(self, entry: Entry, load: PendingLoad) -> bool:
        """True if a load may start; otherwise unloads the least recently used idle model, or says why it cannot begin.

        The load itself finds out whether it fits beside the others (`crowded`), for only an engine knows the devices.
        """
        load.refusal, held = None, [e for e in self.entries.values() if e.in_memory]
        if entry.in_memory:  # with other options
            held = [entry]
        elif len(held) < self._options.max_loaded and not (entry.crowded and held):
            return True
        if entry.state == "unloading" or any(e.state == "unloading" and not e.leases for e in held):
            return False
        if idle := [e for e in held if e.idle]:
            oldest = min(idle, key=lambda e: e.idle_since)
            self.move(oldest, "unloading", oldest.worker)
        else:
            busy = f"{len(held)} loaded models are busy"
            why = f"{entry.crowded}; {busy}" if entry.crowded else f"All {busy} (--max-loaded {self._options.max_loaded})"
            if entry.in_memory:
                asked = ", ".join(f"{name} {value}" for name, value in load.asked.items())
                why = f"Model '{entry.info.id}' is too busy to be loaded again with {asked}"
            load.refusal = Overloaded(why)
            if time.monotonic() > load.due and not entry.waiting:
                self._end_load(entry, load.refusal)
        return False

    def run_loads(self) -> None:
        """The loading thread; takes the condition."""
        while not self.closed:
            with self.changed:
                entry = self._schedule()
                if not entry and not self.closed:
                    self.changed.wait(1.0 if any(e.load for e in self.entries.values()) else None)
            if entry and entry.load:
                self._load(entry, entry.load)

    def _load(self, entry: Entry, load: PendingLoad) -> None:
        """Loads a model; takes the condition to say how that ended."""
        worker: Worker | None = None
        error: ApiError | None = None
        asked, others = dict(load.asked), list[Worker]()
        try:
            with self.changed:
                settings = self._settings(entry, asked)
                others = [e.worker for e in self.entries.values() if e.worker]
                idle = any(e.idle for e in self.entries.values())
            setup = Setup(settings.engine, reserved=sum(other.reserved_bytes() for other in others), others_idle=idle)
            worker = self._ladder.load(entry.info, setup, functools.partial(self._start, entry), bool(asked))
        except ApiError as failure:
            error = failure
        except Exception as failure:
            log.exception("loading %s failed", entry.info.id)
            error = GenerationFailed(f"{type(failure).__name__}: {failure}", "The model could not be loaded")
        with self.changed:
            if worker:
                entry.asked, entry.failures, entry.retry_at, entry.idle_since = asked, 0, 0.0, time.monotonic()
                self.move(entry, "loaded", worker)
                if not worker.alive:
                    self.move(entry, "failed", error="the engine process ended right after the load")
                if load.asked == asked:  # else it was asked for with other options meanwhile
                    self._end_load(entry)
            elif error and getattr(error, "cause", "") == "room" and others:
                self.move(entry, "unloaded")
                entry.crowded = error.details
            elif error:  # what every rung failed at is not tried again and again
                self._ladder.report(f"{printable(entry.info.id)} could not be loaded: {printable(error.details)}")
                if getattr(error, "cause", "") and asked == entry.asked:  # what one client wished for keeps no other from it
                    pause = self.FIRST_PAUSE * 2 ** min(entry.failures, 10)
                    entry.retry_at, entry.failures = time.monotonic() + min(self.LONGEST_PAUSE, pause), entry.failures + 1
                self._end_load(entry, error)

    def _start(self, entry: Entry, setup: Setup) -> Worker:
        """Starts one engine for a load; takes the condition. Raises LoadFailure."""
        starting = self._make_worker(entry.info, setup, functools.partial(self._died, entry))
        with self.changed:
            if self.closed:
                raise Overloaded("The server is shutting down")
            entry.starting = starting
        return starting.start(lambda fraction: setattr(entry, "progress", fraction))

    def _end_load(self, entry: Entry, error: ApiError | None = None) -> None:
        """Tells everybody who waits for a load how it ended."""
        load, entry.load = entry.load, None
        if error and load:
            load.error, entry.crowded = error, ""
            if entry.state != "loaded":
                self.move(entry, "failed", error=error.details)

    def _died(self, entry: Entry, worker: Worker, reason: str) -> None:
        """A child ended by itself; takes the condition."""
        self._ladder.died(worker)
        with self.changed:
            if entry.worker is worker and entry.state == "loaded":
                self.move(entry, "failed", error=reason)
            self.changed.notify_all()

    # Unloading

    def release(self, entry: Entry) -> None:
        """A request is done with the worker."""
        entry.leases -= 1
        entry.idle_since, entry.last_used = time.monotonic(), time.time()
        self.changed.notify_all()

    def keep_alive(self, entry: Entry) -> float:
        """How many seconds the model stays when nobody uses it; below zero: for ever."""
        if entry.keep_alive is not None:
            return entry.keep_alive
        own = self._settings(entry, {}).keep_alive
        return self._options.keep_alive if own is None else own

    def expires(self, entry: Entry) -> float:
        """When an idle model has stayed for as long as it may, monotonic; infinite for one that may stay."""
        keep = self.keep_alive(entry) if entry.idle else -1
        return entry.idle_since + keep if keep >= 0 else math.inf

    def unload(self, entry: Entry, force: bool, cancel: Cancellation) -> None:
        """Waits until the model is out of memory; force ends what runs, otherwise it may finish."""
        if entry.load:
            entry.load.background = False
        departures = entry.departures  # a load that somebody begins after our unload is none of our business
        while entry.departures == departures and entry.in_memory and not self.closed:
            cancel.check()
            if entry.state == "loaded":
                self.move(entry, "unloading", entry.worker)
            if force and entry.worker:
                entry.worker.fail_all(GenerationFailed("The model was unloaded (force)", "Text generation was ended"))
            if force and entry.starting:
                threading.Thread(target=entry.starting.stop, name=f"stop {entry.info.id}", daemon=True).start()
                entry.starting = None
            self.changed.wait(1.0)
        if entry.state == "failed":
            self.move(entry, "unloaded")
        if entry.state == "unloaded":
            entry.asked = {}

    def run_unloads(self) -> None:
        """The thread that ends engines; takes the condition."""
        while not self.closed:
            with self.changed:
                held = [e for e in self.entries.values() if e.worker]
                entry = self._leaving(held)
                if not entry and not self.closed:
                    left = min(map(self.expires, held), default=math.inf) - time.monotonic()
                    self.changed.wait(max(0.0, min(3600.0, left)) if left < math.inf else None)  # no system waits for years
            if entry and entry.worker:
                entry.worker.stop()
                with self.changed:
                    entry.keep_alive = None
                    self.move(entry, "unloaded")

    def _leaving(self, held: Iterable[Entry]) -> Entry | None:
        """A model that is to go and whose requests are done, or that is idle for too long."""
        for entry in held:
            if self.expires(entry) <= time.monotonic():
                self.move(entry, "unloading", entry.worker)
            if entry.state == "unloading" and not (entry.leases and entry.worker and entry.worker.alive):
                return entry
        return None

    def close(self, engines: bool) -> None:
        """Ends every wait, and every child if the `engines` are to end too; idempotent; takes the condition."""
        with self.changed:
            self.closed = True
            workers = [w for e in self.entries.values() for w in (e.worker, e.starting) if w and engines]
            self.changed.notify_all()
        for worker in workers:
            worker.stop()


class Lease:
    """A request's claim on a model: waits for the load, then keeps the worker in memory until the request is done."""

    def __init__(self, residents: Residents, entry: Entry, cancel: Cancellation, asked: Mapping[str, Any] | None = None) -> None:
        """`asked` are options that the request wants the model loaded with: a longer context reloads it once it is idle."""
        self._residents, self._entry, self._cancel, self._asked = residents, entry, cancel, asked or {}
        self._load: PendingLoad | None = None
        self._waiting, self._due = True, time.monotonic() + LOAD_WAIT_SECONDS

    def __enter__(self) -> Lease:
        self._cancel.on_cancel(self._residents.wake)
        with self._residents.changed:
            self._entry.waiting += 1
        return self

    def wait(self, seconds: float = math.inf) -> Worker | None:
        """The worker, once the model is loaded; None after so many seconds.

        Raises GenerationFailed with the load's reason, Overloaded when no room comes, Cancelled.
        """
        until, entry = time.monotonic() + seconds, self._entry
        with self._residents.changed:
            while (left := until - time.monotonic()) > 0:
                self._cancel.check()
                if self._load and self._load.error:  # one of its own for each waiter: a raised one holds the frames it passed
                    raise copy.copy(self._load.error)
                if self._load and self._load.refusal and time.monotonic() > self._due:
                    raise copy.copy(self._load.refusal)
                if entry.worker and entry.state == "loaded" and not self._is_unfit(entry.worker):
                    entry.waiting, entry.leases, self._waiting = entry.waiting - 1, entry.leases + 1, False
                    entry.last_used = time.time()
                    return entry.worker
                self._load = self._residents.want(entry, self._asked)
                self._residents.changed.wait(min(left, 1.0))
        return None

    def waited(self) -> Generator[Waiting, None, Worker]:
        """The same without end, with signs of life."""
        while (worker := self.wait(PING_SECONDS)) is None:
            yield Waiting()
        return worker

    def _is_unfit(self, worker: Worker) -> bool:
        """True if more context is asked for than the model got, unless it got what there was when it was asked for that."""
        ctx = self._asked.get("ctx") or 0
        wanted = min(ctx, self._entry.info.context_length or sys.maxsize)
        is_too_short = wanted > worker.loaded.ctx and ctx != self._entry.asked.get("ctx")
        return is_too_short or bool(self._asked and self._entry.load)  # it is about to be loaded again

    def __exit__(self, *_: object) -> None:
        with self._residents.changed:
            if self._waiting:
                self._entry.waiting -= 1
            else:
                self._residents.release(self._entry)


def some_of(names: Seq[str], most: int = 5) -> str:
    """a, b and 7 more."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


class Names:
    """Maps the names in requests to the models that one scan found. Never changes."""

    def __init__(self, options: TableOptions, models: dict[str, ModelInfo], default: str | None = None) -> None:
        """`default` stays what it was while that is there."""
        self._wanted, self._aliases = options.default, options.aliases
        self._all_aliases = (*options.aliases, *options.preset_aliases)
        self._models = models  # by id, in the order of the list
        self._stems = {id: pathlib.Path(m.path).stem for id, m in models.items()}
        self.default = default
        if self._wanted and default not in models:
            path = os.path.realpath(os.path.expanduser(self._wanted))
            found = [id for id, m in models.items() if os.path.realpath(m.path) == path] or self._match(self._wanted)
            self.default = found[0] if len(found) == 1 else None
        elif not self._wanted and (default not in models or models[default].embedding):
            self.default = next((id for id, m in models.items() if not m.embedding), None)

    def resolve(self, name: str) -> list[str]:
        """The ids that a name may mean, one if it is clear: `default`, id, alias, stem, letter case, prefix, in this order."""
        if name == "default":
            return [self.default] if self.default else []
        if name in self._models:
            return [name]
        import fnmatch

        for pattern, target in self._all_aliases:
            if fnmatch.fnmatchcase(name, pattern):
                return self.resolve("default") if target == "default" else self._match(target)
        return self._match(name)

    def _match(self, name: str) -> list[str]:
        """A name as it is, then as LM Studio (NAME.gguf) and Ollama (NAME:latest) write it, then as a prefix."""
        if not plain_id(name):
            return []
        for form in dict.fromkeys((name, re.sub(r"(?i)(?<=.)(\.gguf|:latest)$", "", name))):
            stems = [id for id, stem in self._stems.items() if stem == form]
            plain = plain_id(form)
            if len(stems) == 1 or plain in self._models:
                return stems if len(stems) == 1 else [plain]
        return [id for id in self._models if id.startswith(plain_id(name))]

    def not_found(self, name: str, catalog: Catalog) -> ModelNotFound:
        """The error for a name that means nothing, or several models, with why a file of that name is no model."""
        known = some_of(list(self._models))
        if name == "default" and not self._wanted:
            if self._models:
                return ModelNotFound(f"No model here generates text, only embedding models were found: {known}")
            return ModelNotFound("No GGUF model was found: put one into ./models, or name its directory with --models-dir")
        wanted, may_be_path = name, name == "default"  # which the operator named; a request never names a path
        if self._wanted and may_be_path:
            wanted = self._wanted
        could_be = self._match(wanted) if may_be_path else self.resolve(name)
        reason = f": it could mean {some_of(could_be)}" if could_be else catalog.why_skipped(wanted, may_be_path)
        details = f"Model '{printable(wanted)}' is not available{reason}"
        if could_be or not known:
            return ModelNotFound(details)
        if near := self.near(wanted):
            return ModelNotFound(details, hint=f" (did you mean {' or '.join(near)}? available: {known})")
        alias = f"; serve --alias '{printable(name, 40)}=MODEL' gives a model this name" if name != "default" else ""
        return ModelNotFound(details, hint=f" (available: {known}{alias})")

    def near(self, name: str) -> tuple[str, ...]:
        """The ids that a name could mean, else those that are spelled alike; at most three."""
        import difflib

        alike = difflib.get_close_matches(plain_id(name)[:MAX_MODEL_NAME], self._models, n=3, cutoff=0.5)
        return tuple(self._match(name)[:3] or alike)

    def unresolved(self, catalog: Catalog) -> Iterator[tuple[str, str, str]]:
        """Each setting of the command line that names a model which is not there, with that name, and why, or what is near."""
        named = [("--model", self._wanted, self.resolve("default"))] if self._wanted else []
        named += [(f"--alias {p}", t, self.resolve("default") if t == "default" else self._match(t)) for p, t in self._aliases]
        for setting, value, found in named:
            if len(found) != 1 and value != "default":
                near = f"; did you mean {' or '.join(self.near(value))}?" if self.near(value) else ""
                yield setting, value, f"{catalog.why_skipped(value, True)}{near}"


class ModelTable:
    """The models by name, those on the disk and those in memory: what Service and the routes ask."""

    def __init__(self, catalog: Catalog, make_worker: MakeWorker, options: TableOptions, metrics: Metrics | None = None,
                 settings: Settings | None = None, ladder: Ladder | None = None) -> None:  # fmt: skip
        self.catalog, self.options, self._settings = catalog, options, settings or Settings()
        ladder = ladder or Ladder(KnownFaults(), log.info)
        self._residents = Residents(make_worker, ladder, self._settings_of, options, metrics or Metrics())
        self._changed = self._residents.changed  # guards the names too
        self._names = Names(options, {})
        self._scanned = False  # the first scan is over, whatever came of it
        self.taken = -math.inf  # when the scan began whose report is in the table

    def start(self) -> None:
        """Begins the first scan, and the threads that load and unload."""
        for work in (self._first_scan, self._residents.run_loads, self._residents.run_unloads):
            threading.Thread(target=work, name=work.__name__.strip("_"), daemon=True).start()

    def _first_scan(self) -> None:
        try:
            self._refresh(math.inf)
        except Exception:
            log.exception("the scan for models failed")
        finally:
            with self._changed:
                self._scanned = True
                self._changed.notify_all()

    def _refresh(self, age: float) -> None:
        """Takes over what a scan found that began at most `age` seconds ago; takes the condition.

        Models that are in memory stay whatever became of their file.
        """
        report = self.catalog.scan(age)
        with self._changed:
            if report.began <= self.taken:  # threads may come out of the catalog in another order
                return
            self.taken, self._scanned, entries = report.began, True, self._residents.entries
            found = {m.id: entries.get(m.id) or Entry(m) for m in report.models}
            for model in report.models:
                found[model.id].info = model
            used = {id: e for id, e in entries.items() if e.state != "unloaded" or e.waiting or e.leases or e.load}
            self._residents.entries = found | {id: e for id, e in used.items() if id not in found}
            models = {id: e.info for id, e in self._residents.entries.items()}
            self._names = Names(self.options, models, self._names.default)
            self._changed.notify_all()

    # Names

    def models(self, age: float = 2.0) -> list[dict[str, Any]]:
        """The documents of `/api/models` without `default`; at once, whatever the engines are doing.

        A look at the disk takes milliseconds, and a file copied there shows; one `age` seconds old serves.
        """
        self._refresh(age)
        with self._changed:
            entries = self._residents.entries.values()
            return [e.info.document() | {"state": e.state, "loaded": e.state == "loaded"} for e in entries]

    def infos(self) -> list[ModelInfo]:
        """The same models, as their headers describe them."""
        self._refresh(2.0)
        with self._changed:
            return [e.info for e in self._residents.entries.values()]

    def names(self, cancel: Cancellation | None = None) -> Names:
        """The names of what the last scan found; waits for the first one."""
        with self._changed:
            while not self._scanned and not self._residents.closed:
                (cancel or Cancellation()).check()
                self._changed.wait(1.0)
            return self._names

    def resolve(self, name: str, cancel: Cancellation | None = None) -> str:
        """The id that `name` means: id, alias, stem in any case, or unambiguous prefix. Raises ModelNotFound.

        A name not known looks at the disk again first: a file may have been copied there a moment ago.
        """
        if len(name) > MAX_MODEL_NAME:
            raise ModelNotFound(f"Model '{printable(name, 80)}' is not available")
        if len(found := self.names(cancel).resolve(name)) != 1:
            self._refresh(0.25)
            found = self._names.resolve(name)
        if len(found) != 1:
            raise self._names.not_found(name, self.catalog)
        return found[0]

    def _find(self, name: str, cancel: Cancellation | None = None) -> Entry:
        """The entry of the model that a name means; all that its header tells is read now. Raises ModelNotFound."""
        id = self.resolve(name, cancel)
        with self._changed:
            entry = self._entry(id)
        if entry.info.chat_template is None:
            whole = self.catalog.whole(entry.info)  # not under the condition: a large vocabulary takes 0.1 s
            with self._changed:
                entry.info = whole
        return entry

    def _entry(self, id: str) -> Entry:
        """The entry, under the condition; a scan may have dropped it since the name was resolved."""
        if id not in self._residents.entries:
            raise self._names.not_found(id, self.catalog)
        return self._residents.entries[id]

    def info(self, name: str, cancel: Cancellation | None = None) -> ModelInfo:
        """All that the header of the model tells. Raises ModelNotFound."""
        return self._find(name, cancel).info

    def _settings_of(self, entry: Entry, asked: Mapping[str, Any]) -> ModelSettings:
        return self._settings.of(entry.info, entry.info.id == self._names.default, asked)

    def settings(self, id: str) -> ModelSettings:
        """The settings that the model is loaded with, or will be."""
        with self._changed:
            entry = self._entry(id)
            return self._settings_of(entry, entry.asked)

    # Life

    def lease(self, name: str, cancel: Cancellation, use: str = "generate", asked: Mapping[str, Any] | None = None) -> Lease:
        """A request's claim on the model, to generate, embed, rank or tokenize; `asked` as Lease has it.

        Raises ModelNotFound, InvalidRequest if the model cannot do that.
        """
        entry = self._find(name, cancel)
        if refusal := entry.info.refusal(use):
            raise InvalidRequest(f"model: '{entry.info.id}' is {refusal}", "model")
        return Lease(self._residents, entry, cancel, asked)

    def load(self, name: str, wait: bool, cancel: Cancellation, asked: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """`POST …/load`: begins to load unless loaded, and waits for it if asked to. Returns the status.

        A model that is loaded with other options than `asked` is unloaded first, once its requests are done.
        """
        entry = self._find(name, cancel)
        with self._changed:
            entry.retry_at = 0.0
            engine = self._settings_of(entry, entry.load.asked if entry.load else entry.asked).engine
            is_new = any(getattr(engine, name) != value for name, value in (asked or {}).items())
            if is_new and entry.state == "loaded":
                self._residents.move(entry, "unloading", entry.worker)
            if is_new or (not wait and entry.state != "loaded"):
                self._residents.want(entry, background=not wait).asked.update(asked or {})
        if not wait:
            return self._status(entry)
        with Lease(self._residents, entry, cancel, asked) as lease:
            lease.wait()
            return self._status(entry)

    def unload(self, name: str, force: bool, cancel: Cancellation) -> dict[str, Any]:
        """`POST …/unload`: lets running generations finish (or ends them), frees the memory; idempotent."""
        entry = self._find(name, cancel)
        cancel.on_cancel(self._residents.wake)
        with self._changed:
            self._residents.unload(entry, force, cancel)
        return self._status(entry)

    def status(self, name: str) -> dict[str, Any]:
        """The model's status, as the status route tells it."""
        return self._status(self._find(name))

    def _status(self, entry: Entry) -> dict[str, Any]:
        """The entry's status with its memory, asked for without the condition: off Linux that starts a process."""
        with self._changed:
            status, worker, settings = entry.status(), entry.worker, self._settings_of(entry, {})
        return status | {"memory_bytes": worker.memory_bytes() if worker else 0, "sampling": dict(settings.sampling)}

    def statuses(self) -> list[dict[str, Any]]:
        """The status of each model that is in memory or waited for, but for its memory."""
        with self._changed:
            return [e.status() for e in self._residents.entries.values() if e.in_memory or e.waiting]

    def left(self, id: str) -> float | None:
        """Seconds until a loaded model is unloaded if nobody comes; None: it stays."""
        with self._changed:
            entry, now = self._residents.entries.get(id), time.monotonic()
            keep = self._residents.keep_alive(entry) if entry else -1
            return max(0.0, keep + (entry.idle_since - now if entry.idle else 0.0)) if entry and keep >= 0 else None

    def keep(self, id: str, seconds: float) -> None:
        """How long this model stays when nobody uses it, until it is unloaded; 0: it goes as soon as it is idle."""
        with self._changed:
            if entry := self._residents.entries.get(id):
                entry.keep_alive = seconds
                self._changed.notify_all()

    def workers(self) -> list[Worker]:
        """The engines of the loaded models, in the order of the list."""
        with self._changed:
            return [e.worker for e in self._residents.entries.values() if e.worker]

    def close(self, engines: bool = True) -> None:
        """Refuses whoever waits for a model from now on, and ends the `engines`, or lets their requests go on; idempotent."""
        self._residents.close(engines)


# ── 13. Service ───────────────────────────────────────────────────────────────────────────────────────────────────────
# The only way in for HTTP, WebSocket and command line.


class Service:
    """Everything the front doors share: models, tools, settings, and `generate`."""

    def __init__(self, catalog: Catalog, table: TableOptions, settings: Settings, tools: ToolOptions = ToolOptions(),
                 max_queue: int = 512, allow_pull: bool = False, report: Callable[[str], None] = log.info) -> None:  # fmt: skip
        """`report` is told of every load, in a line."""
        self.settings, self.max_queue, self.allow_pull, self._report = settings, max_queue, allow_pull, report
        self.metrics, self.faults = Metrics(), KnownFaults()
        self.table = ModelTable(catalog, self._make_worker, table, self.metrics, settings, Ladder(self.faults, report))
        self.tools, self.helpers = Tools(tools), Helpers()
        self.started, self._began = time.time(), time.monotonic()

    def _make_worker(self, info: ModelInfo, setup: Setup, died: Callable[[Worker, str], None]) -> Worker:
        return Worker(info, setup, self.max_queue, died, self._report, self.metrics.meter(info.id))

    def _chat(self, worker: Worker) -> Chat:
        """How the model chats, made from what it says of itself when first asked."""
        worker.chat = worker.chat or Chat(worker.loaded.chat, self.helpers)
        return worker.chat

    def generate(self, request: GenerateRequest, cancel: Cancellation) -> Iterator[Event]:
        """The events of one request: Queued, then text, thoughts and calls as they are made, an end a choice, Usage.

        Raises ApiError (before Queued: the request never began; after: it broke off) or Cancelled. Closing the
        iterator, like `cancel`, stops the engine's work on it.
        """
        request = constrained(request)  # a schema is refused before a model is loaded for it
        if request.messages is not None:
            self.helpers.warm()
        yield from ToolLoop(self.tools, request, cancel).run(self._answer) if request.builtins else self._answer(request, cancel)

    def _answer(self, request: GenerateRequest, cancel: Cancellation) -> Iterator[Event]:
        """One answer of the model's."""
        began = time.monotonic()
        with self.table.lease(request.model, cancel, asked=request.engine) as lease:
            worker = yield from lease.waited()
            request = self._filled(request, self.table.settings(worker.info.id))
            jobs, parsers = self._jobs(request, self._chat(worker))
            generation = worker.submit(jobs, cancel, began)
            ends: list[Finished] = []
            thought, untold = 0, Counter[int]()  # tokens: of thoughts, and by job of what the parser holds back
            for message in generation:
                if isinstance(message, Piece):
                    events = list(parsers[generation.index[message.id]].push(message.text, message.logprobs))
                    untold[message.id] += message.tokens
                    if events:
                        thought += untold.pop(message.id) * isinstance(events[0], Thought)
                    yield from events
                elif isinstance(message, Finished):
                    ends.append(message)
                    for event in parsers[generation.index[message.id]].finish(message.finish_reason):
                        if isinstance(event, ChoiceEnd):
                            usage = self._usage([message], generation.index, request.n)
                            event = replace(event, stopped_by=message.stopped_by, usage=usage)
                        yield event
                else:
                    yield message
            yield replace(self._usage(ends, generation.index, request.n), reasoning_tokens=thought)

    @staticmethod
    def _filled(request: GenerateRequest, settings: ModelSettings) -> GenerateRequest:
        """The request with the model's own settings where it says nothing."""
        messages, system = request.messages, {"role": "system", "content": settings.system}
        if settings.system and messages and not any(message["role"] == "system" for message in messages):
            messages = (system, *messages)
        sampling = request.sampling.filled(settings.sampling, request.defaults)
        return replace(request, messages=messages, sampling=sampling)

    def load(self, model: str, use: str, cancel: Cancellation, asked: Mapping[str, Any] | None = None) -> Iterator[Event]:
        """Only loads the model, as a request that uses it would: Queued once it is there."""
        with self.table.lease(model, cancel, use, asked) as lease:
            worker = yield from lease.waited()
            yield Queued(worker.info.id)

    def render(self, request: GenerateRequest, cancel: Cancellation) -> str:
        """The prompt that a chat becomes; the model is loaded for it."""
        with self.table.lease(request.model, cancel) as lease:
            worker = lease.wait()
            assert worker
            return "".join(self._chat(worker).prompt(self._filled(request, self.table.settings(worker.info.id))))

    def tokenize(self, model: str, job: Tokenize, cancel: Cancellation) -> Tokens:
        """A text's tokens, or what tokens stand for; the model is loaded for it."""
        with self.table.lease(model, cancel, "tokenize") as lease:
            worker = lease.wait()
            assert worker
            return next(m for m in list(worker.submit([job], cancel)) if isinstance(m, Tokens))

    def count_tokens(self, request: GenerateRequest, cancel: Cancellation) -> int:
        """How many tokens the request's prompt has; the model is loaded for it, and nothing is written."""
        with contextlib.closing(self.generate(request, cancel)) as events:  # type: ignore[type-var]
            try:
                return next(event.prompt_tokens for event in events if isinstance(event, Queued))
            except ContextLengthExceeded as error:
                return error.sizes[0]

    @staticmethod
    def _jobs(request: GenerateRequest, chat: Chat) -> tuple[list[Generate], list[Parser]]:
        """Makes the engine's jobs, every prompt n times, and a parser for the text of each."""
        prompts: list[Any] = [p if isinstance(p, tuple) else (p,) for p in request.prompts]
        sampling, budget, spare = request.sampling, None, 0
        if request.infill is not None:
            prompt, spare = chat.infill(request.infill)
            prompts = [prompt]
        if request.messages is not None:
            prompts = [chat.prompt(request)]
            last = prompts[0][-1:]
            budget, constraint = chat.thought_budget(request, last), chat.constraint(request, last)
            sampling = replace(sampling, stop=(*sampling.stop, *chat.stops), constraint=constraint)
        seeds = [None if sampling.seed is None else sampling.seed + i for i in range(request.n)]
        markers = chat.markers if request.split_markers else frozenset()
        jobs = [Generate(p, replace(sampling, seed=s), markers, budget, request.owner, spare, request.echo and p != ("",))
                for p in prompts for s in seeds]  # fmt: skip
        return jobs, [chat.parser(request, job.prompt[-1:], index) for index, job in enumerate(jobs)]

    def embed(self, request: EmbedRequest, cancel: Cancellation) -> Iterator[Event]:
        """The events of one embedding or rerank request: Queued, Vectors, Usage. Raises as `generate` does."""
        began, use = time.monotonic(), "embed" if request.query is None else "rank"
        with self.table.lease(request.model, cancel, use, request.engine) as lease:
            worker = yield from lease.waited()
            job = Embed(request.inputs, request.dimensions, request.query, request.truncate)
            generation = worker.submit([job], cancel, began)
            for message in generation:
                if isinstance(message, Finished):
                    yield self._usage([message], generation.index, 1)
                elif not isinstance(message, Piece):
                    yield message

    @staticmethod
    def _usage(ends: Seq[Finished], index: Mapping[int, int], n: int) -> Usage:
        prompts = {index[e.id] // n: e for e in sorted(ends, key=lambda e: -index[e.id])}  # the first choice of each
        return Usage(
            sum(e.prompt_tokens for e in prompts.values()), sum(e.completion_tokens for e in ends),
            sum(e.cached_tokens for e in prompts.values()), max(e.prompt_seconds for e in ends),
            max(e.decode_seconds for e in ends), sum(e.forced_tokens for e in ends),
        )  # fmt: skip

    def health(self) -> dict[str, Any]:
        """`/api/health`: memory is the resident set of the server and its engines."""
        statuses = self.table.statuses()
        return {
            "status": "healthy", "models_loaded": sum(s["loaded"] for s in statuses),
            "memory_usage": human_bytes(self.memory_bytes()), "server": "shimmy", "version": __version__,
            "requests_running": sum(s["requests_running"] for s in statuses),
            "requests_waiting": sum(s["requests_waiting"] for s in statuses),
            "uptime_seconds": round(time.monotonic() - self._began, 1),
        }  # fmt: skip

    def memory_bytes(self) -> int:
        return resident_bytes([os.getpid(), *(w.process.pid for w in self.table.workers())])

    def models(self) -> dict[str, Any]:
        """`/api/models`: `default` first, then every model."""
        models, default = self.table.models(), self.table.names().default
        real = next((m for m in models if m["id"] == default), None)
        first = [real | {"id": "default", "name": "Default Model", "description": f"Base GGUF model: {default}"}] if real else []
        return {"models": first + models}

    def diag(self) -> dict[str, Any]:
        """Versions, engine, memory, and where models were looked for: `diag` and `GET /diag`."""
        self.table.models()  # waits for the first scan
        report = self.table.catalog.report
        return versions() | engine_build() | {
            "memory": {"resident_bytes": self.memory_bytes(), "available_bytes": available_memory()},
            "directories": list(report.directories), "skipped": list(report.skipped),
            "models": len(report.models), "models_loaded": [w.info.id for w in self.table.workers()],
            "server": {"running": True, "pid": os.getpid()}, "known_faults": self.known_faults(),
        }  # fmt: skip

    def known_faults(self) -> dict[str, Any]:
        """The kernels and rungs that KnownFaults remembers, and its file."""
        known = self.faults.read()
        return {"file": self.faults.path, "kernels": known.get("kernels", {}), "rungs": known.get("rungs", {})}

    def close(self) -> None:
        """Ends every engine and helper; idempotent."""
        self.table.close()
        self.helpers.close()


# Metrics, as Prometheus reads them


Sample = tuple[Mapping[str, str], "float | Histogram"]  # labels, and what has them


class Scrape:
    """The moment of a scrape. Nothing in it waits: not for the first scan, not for an engine."""

    def __init__(self, service: Service) -> None:
        self.service, self.metrics = service, service.metrics
        statuses = {s["model"]: s for s in service.table.statuses()}
        workers = {w.info.id: w for w in service.table.workers()}
        self.models: dict[str, dict[str, Any]] = {}  # by id, each number and histogram by its name
        for id, meter in sorted(self.metrics.meters.items()):
            status, worker = statuses.get(id, {}), workers.get(id)
            cells, pool = (worker.cells, worker.loaded.pool) if worker else (0, 0)
            self.models[id] = vars(meter) | {
                "running": status.get("requests_running", 0), "waiting": status.get("requests_waiting", 0),
                "loaded": int(status.get("loaded", False)), "memory": worker.memory_bytes() if worker else 0,
                "cells": cells, "pool": pool, "usage": cells / (pool or 1), "recent": meter.recent(),
            }  # fmt: skip

    def total(self, name: str) -> Any:
        return sum(numbers[name] for numbers in self.models.values())

    def rate(self, tokens: Callable[[Finished], int], seconds: Callable[[Finished], float]) -> list[Sample]:
        """Tokens per second, over what ended in the last minute."""
        ends = [end for numbers in self.models.values() for end in numbers["recent"]]
        return [({}, sum(map(tokens, ends)) / (sum(map(seconds, ends)) or 1.0))]


def metric_lines(scrape: Scrape, metric: tuple[str, str, str, Any]) -> Iterator[str]:
    """The lines of one row of METRICS."""
    name, kind, help, read = metric
    yield f"# HELP {name} {help}"
    yield f"# TYPE {name} {kind}"
    if callable(read):
        samples = read(scrape)
    elif name.startswith("llamacpp:"):
        samples = [({}, scrape.total(read))]
    else:
        samples = [({"model_name": id}, numbers[read]) for id, numbers in scrape.models.items()]
    for labels, value in samples:
        if isinstance(value, Histogram):
            yield from histogram_lines(name, labels, value)
        else:
            yield sample_line(name, labels, value)


def histogram_lines(name: str, labels: Mapping[str, str], value: Histogram) -> Iterator[str]:
    """A histogram in Prometheus' text format, its buckets cumulative."""
    counts = list(value.counts)  # one moment's, so that each bucket holds the one before
    for bound, count in zip((*map(repr, value.bounds), "+Inf"), itertools.accumulate(counts), strict=True):
        yield sample_line(f"{name}_bucket", {**labels, "le": bound}, count)
    yield sample_line(f"{name}_sum", labels, value.sum)
    yield sample_line(f"{name}_count", labels, sum(counts))


def sample_line(name: str, labels: Mapping[str, str], value: float) -> str:
    """One line of Prometheus' text format 0.0.4. A label's value may be any text: model names come from files."""
    shown = [
        # what is no Unicode becomes \\udcXX first, then, as the format wants it, backslash, line feed and quote are escaped
        f'{key}="{text.encode("utf-8", "backslashreplace").decode().translate(LABEL_ESCAPES)}"' for key, text in labels.items()
    ]
    return f"{name}{{{','.join(shown)}}} {value!r}" if shown else f"{name} {value!r}"


LABEL_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})

# Name, type, help, and what is shown: a number or histogram by its name in Scrape.models, or a function's samples.
METRICS: tuple[tuple[str, str, str, Any], ...] = (
    # llama-server's names (tools/server): all models together, for it has one model and no labels
    ("llamacpp:prompt_tokens_total", "counter", "Prompt tokens computed.", "computed_tokens"),
    ("llamacpp:prompt_tokens_cached_total", "counter", "Prompt tokens found cached.", "cached_tokens"),
    ("llamacpp:prompt_seconds_total", "counter", "Seconds from first step to first token.", "prompt_seconds"),
    ("llamacpp:tokens_predicted_total", "counter", "Tokens generated.", "generated_tokens"),
    ("llamacpp:tokens_predicted_seconds_total", "counter", "Seconds from first to last token, of all sequences.",
     "decode_seconds"),
    ("llamacpp:prompt_tokens_seconds", "gauge", "Prompt tokens per second of requests that ended in the last minute.",
     lambda r: r.rate(lambda e: e.prompt_tokens - e.cached_tokens, lambda e: e.prompt_seconds)),
    ("llamacpp:predicted_tokens_seconds", "gauge", "Tokens per second of requests that ended in the last minute.",
     lambda r: r.rate(lambda e: e.completion_tokens, lambda e: e.decode_seconds)),
    ("llamacpp:kv_cache_usage_ratio", "gauge", "Share of the KV pools that running sequences hold.",
     lambda r: [({}, r.total("cells") / (r.total("pool") or 1))]),
    ("llamacpp:kv_cache_tokens", "gauge", "Tokens of running sequences in the KV pools.", "cells"),
    ("llamacpp:requests_processing", "gauge", "Sequences being computed.", "running"),
    ("llamacpp:requests_deferred", "gauge", "Sequences waiting for their turn or their model.", "waiting"),
    # vLLM's names (vllm/v1/metrics/loggers.py): by model
    ("vllm:num_requests_running", "gauge", "Sequences being computed.", "running"),
    ("vllm:num_requests_waiting", "gauge", "Sequences waiting for their turn or their model.", "waiting"),
    ("vllm:kv_cache_usage_perc", "gauge", "Share of the KV pool that running sequences hold; 1 is all.", "usage"),
    ("vllm:prefix_cache_queries_total", "counter", "Prompt tokens looked for in the cache.", "sought_tokens"),
    ("vllm:prefix_cache_hits_total", "counter", "Prompt tokens found there.", "cached_tokens"),
    ("vllm:prompt_tokens_total", "counter", "Prompt tokens, cached ones too.", "prompt_tokens"),
    ("vllm:generation_tokens_total", "counter", "Tokens generated.", "generated_tokens"),
    ("vllm:request_success_total", "counter", "Sequences by how they ended; abort: the client left or cancelled.",
     lambda r: [({"model_name": id, "finished_reason": why}, n) for id, m in r.models.items() for why, n in m["ends"].items()]),
    ("vllm:time_to_first_token_seconds", "histogram", "From the request to its first piece of text; a load counts.",
     "first_token"),
    ("vllm:inter_token_latency_seconds", "histogram", "Between two pieces of a text: a token, or those of 10 ms.", "gap"),
    ("vllm:time_per_output_token_seconds", "histogram", "The same by vLLM's earlier name.", "gap"),
    ("vllm:request_time_per_output_token_seconds", "histogram", "Mean seconds per token of each sequence.", "per_token"),
    ("vllm:e2e_request_latency_seconds", "histogram", "From the request to its end.", "whole"),
    ("vllm:request_queue_time_seconds", "histogram", "Before its first step: the load, the tokenizer, the queue.", "queue"),
    ("vllm:request_prefill_time_seconds", "histogram", "From first step to first token.", "prefill"),
    ("vllm:request_decode_time_seconds", "histogram", "From first to last token.", "decode"),
    ("vllm:request_inference_time_seconds", "histogram", "From first step to last token.", "inference"),
    ("vllm:request_prompt_tokens", "histogram", "Tokens of each prompt.", "prompt_sizes"),
    ("vllm:request_generation_tokens", "histogram", "Tokens of each answer.", "answer_sizes"),
    # shimmy's own
    ("shimmy_model_loaded", "gauge", "1 while the model is loaded.", "loaded"),
    ("shimmy_model_memory_bytes", "gauge", "Resident memory of the model's engine.", "memory"),
    ("shimmy_model_loads_total", "counter", "Loads that succeeded.", "loads"),
    ("shimmy_model_load_failures_total", "counter", "Loads that failed.", "load_failures"),
    ("shimmy_engine_deaths_total", "counter", "Engines that crashed or hung.", "deaths"),
    ("shimmy_requests_total", "counter", "Requests by route, API and status; none: the client left before an answer.",
     lambda r: [({"method": m, "route": o, "api": a, "status": s}, n) for (m, o, a, s), n in list(r.metrics.answers.items())]),
    ("shimmy_open_connections", "gauge", "Open connections.", lambda r: [({}, r.metrics.connections)]),
    ("shimmy_connections_total", "counter", "Connections accepted.", lambda r: [({}, r.metrics.accepted)]),
    ("shimmy_connections_refused_total", "counter", "Connections refused with 503.", lambda r: [({}, r.metrics.refused)]),
    ("shimmy_build_info", "gauge", "Always 1.", lambda r: [({"version": __version__}, 1)]),
    ("process_start_time_seconds", "gauge", "When the server began, since the epoch.", lambda r: [({}, r.service.started)]),
    ("process_resident_memory_bytes", "gauge", "Memory of the server without its engines.",
     lambda r: [({}, resident_bytes([os.getpid()]))]),
)  # fmt: skip


def metrics_text(service: Service) -> bytes:
    """All of METRICS in Prometheus' text format."""
    scrape = Scrape(service)
    return "".join(f"{line}\n" for metric in METRICS for line in metric_lines(scrape, metric)).encode()


@dataclass
class Called:
    """A call as the model wrote it."""

    id: str
    name: str
    arguments: str = ""


class ToolLoop:
    """One request with built-in tools: runs what the model calls and asks again, until it answers.

    The rounds and their time are bounded: in the last one no tool is offered. Calls of the client's own functions are
    left to the client and end the loop.
    """

    def __init__(self, tools: Tools, request: GenerateRequest, cancel: Cancellation) -> None:
        if request.messages is None or request.n != 1:
            raise InvalidRequest("built-in tools need messages, and n to be 1", "tools")
        self._tools, self._cancel = tools, cancel
        offered = tuple(tools.function(name) for name in request.builtins)
        twice = {t["function"]["name"] for t in request.tools} & set(request.builtins)
        if twice:
            raise InvalidRequest(f"tools: {', '.join(sorted(twice))} is both a function and a built-in tool", "tools")
        self._request = replace(request, tools=(*request.tools, *offered), split_markers=True)
        self._deadline = time.monotonic() + TOOL_LOOP_SECONDS
        self._used: list[Usage] = []
        self._client_calls = 0

    def run(self, answer: Callable[[GenerateRequest, Cancellation], Iterator[Event]]) -> Iterator[Event]:
        for count in range(MAX_TOOL_ROUNDS + 1):
            last = count == MAX_TOOL_ROUNDS or time.monotonic() > self._deadline
            request = replace(self._request, tools=self._request.tools[: len(self._request.tools) * (not last)])
            self._calls: dict[int, Called] = {}
            self._said: list[str] = []
            self._reason = "stop"
            with contextlib.closing(answer(request, self._cancel)) as events:  # type: ignore[type-var]
                yield from self._passed_on(events, first=count == 0)
            results: list[ToolResult] = []
            for call in self._calls.values() if self._reason != "length" else ():  # a call that was cut is not run
                if call.name in self._request.builtins:
                    results.append((yield from self._execute(call)))
                    yield results[-1]
            if not results or self._client_calls or self._reason == "length":
                break
            self._extend(results)
        yield ChoiceEnd(0, "tool_calls" if self._client_calls else "stop" if self._reason == "tool_calls" else self._reason)
        yield Usage(*(sum(getattr(u, f.name) for u in self._used) for f in fields(Usage)))

    def _passed_on(self, events: Iterator[Event], first: bool) -> Iterator[Event]:
        """The events of one round that the client sees: calls of built-in tools show as results only."""
        for event in events:
            if isinstance(event, CallBegan):
                self._calls[event.number] = Called(event.id, event.name)
                self._client_calls += event.name not in self._request.builtins
            elif isinstance(event, CallArguments):
                self._calls[event.number].arguments += event.text
            elif isinstance(event, Text):
                self._said.append(event.text)
            elif isinstance(event, ChoiceEnd):
                self._reason = event.finish_reason
            elif isinstance(event, Usage):
                self._used.append(event)
            if isinstance(event, (CallBegan, CallArguments)):
                if self._calls[event.number].name not in self._request.builtins:
                    yield replace(event, number=self._client_calls - 1)
            elif isinstance(event, (Text, Thought, Waiting)) or (isinstance(event, Queued) and first):
                yield event

    def _execute(self, call: Called) -> Generator[Waiting, None, ToolResult]:
        """Runs a call, with signs of life; what is wrong with it is told to the model."""
        self._cancel.check()
        left = self._deadline - time.monotonic()
        try:
            if left <= 0:
                raise Overloaded(f"not run: the tools of an answer have {TOOL_LOOP_SECONDS:g} seconds", "The time is over")
            arguments = parse_json(call.arguments.encode("utf-8", "replace"), "The arguments")
            answer = yield from self._tools.running(call.name, arguments, self._cancel, left)
        except ApiError as error:
            answer = {"result": None, "error": str(error)}
        return ToolResult(0, call.id, call.name, call.arguments, answer["result"], answer["error"])

    def _extend(self, results: Seq[ToolResult]) -> None:
        """Adds the model's turn and the results to the conversation."""
        calls, turns = list[Any](), list[dict[str, Any]]()
        for result in results:
            arguments: Any = result.arguments
            with contextlib.suppress(InvalidRequest):
                arguments = parse_json(result.arguments.encode("utf-8", "replace"))
            calls.append({"id": result.id, "type": "function", "function": {"name": result.name, "arguments": arguments}})
            content = json.dumps(result.result, ensure_ascii=False) if result.error is None else f"Error: {result.error}"
            if len(content) > MAX_TOOL_RESULT:
                content = f"{content[:MAX_TOOL_RESULT]}\n(cut: {len(content)} characters in all)"
            turns.append({"role": "tool", "tool_call_id": result.id, "name": result.name, "content": content})
        said = {"role": "assistant", "content": "".join(self._said), "tool_calls": calls}
        self._request = replace(self._request, messages=(*(self._request.messages or ()), said, *turns), tool_choice="auto")


def constrained(request: GenerateRequest) -> GenerateRequest:
    """The request with its JSON schema or GBNF made into a grammar. Raises InvalidRequest naming what is at fault."""
    sampling = request.sampling
    schema, grammar = sampling.json_schema, sampling.grammar
    if schema and grammar:
        raise InvalidRequest("grammar and json_schema exclude each other: send one of them", "grammar")
    if schema:
        constraint = Constraint(json_symbol(schema.param, schema.schema), schema.param)
    elif grammar:
        constraint = Constraint(Gbnf(grammar), "grammar", markers=token_names(grammar))
        read_soon(constraint.grammar)
    else:
        return request
    return replace(request, sampling=replace(sampling, constraint=constraint, json_schema=None, grammar=None))


# ── 14.1. Dialects ────────────────────────────────────────────────────────────────────────────────────────────────────
# What the client speaks, one class an API: it reads a body into a request and turns events into its own documents.


@dataclass(slots=True)
class Block:
    """A stretch of an answer that is of one kind: a thought, text or a call."""

    kind: str  # thought, text, call
    index: int = 0  # in the answer
    call_id: str = ""
    name: str = ""
    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Its text, or a call's arguments."""
        return "".join(self.parts)

    def arguments(self) -> dict[str, Any]:
        """A call's arguments as an object; one that was cut has none."""
        given: Any = {}
        with contextlib.suppress(InvalidRequest):
            given = parse_json(self.text.encode("utf-8", "replace"))
        return given if isinstance(given, dict) else {}


class Choice:
    """One choice of an answer, as far as it came: a plain reply is a stream that was waited for."""

    def __init__(self, *events: Text | Thought | ToolResult | ChoiceEnd) -> None:
        self.blocks: list[Block] = []
        self.results: list[ToolResult] = []
        self.logprobs: list[TokenLogprob] = []
        self.end: ChoiceEnd | None = None
        self.finish_reason: str | None = None
        for event in events:
            self.add(event)

    def add(self, event: Text | Thought | CallBegan | CallArguments | ToolResult | ChoiceEnd, words: bool = True) -> None:
        """Takes an event; without `words` neither text nor log probabilities, of which a stream may tell megabytes."""
        if isinstance(event, (Text, Thought)):
            kind = "text" if isinstance(event, Text) else "thought"
            if event.text and not (self.blocks and self.blocks[-1].kind == kind):
                self.blocks.append(Block(kind, len(self.blocks)))
            if words:
                self.logprobs += event.logprobs
            if words and event.text:
                self.blocks[-1].parts.append(event.text)
        elif isinstance(event, CallBegan):
            self.blocks.append(Block("call", len(self.blocks), event.id, event.name))
        elif isinstance(event, CallArguments):
            self.calls[event.number].parts.append(event.text)
        elif isinstance(event, ToolResult):
            self.results.append(event)
        else:
            self.end, self.finish_reason = event, event.finish_reason

    def said(self, kind: str = "text") -> str:
        """All text, or all thoughts."""
        return "".join([part for block in self.blocks if block.kind == kind for part in block.parts])

    @property
    def calls(self) -> list[Block]:
        return [block for block in self.blocks if block.kind == "call"]


class Dialect:
    """One request in one API's shapes. A dialect knows nothing of connections: it makes documents, a Wire sends them."""

    streamed_errors: ClassVar[frozenset[str]] = frozenset()  # codes sent as events even before the stream began
    api = "shimmy"  # whose API this is: a key of ERROR_SHAPES
    streams: ClassVar[bool | None] = False  # unless told otherwise; None: never
    recalls: ClassVar[bool] = False  # whether a stream's last document tells all of it again

    def __init__(self, body: Mapping[str, Any]) -> None:
        """Reads the body. Raises InvalidRequest naming the field at fault."""
        self.id, self.created = os.urandom(12).hex(), int(time.time())
        self.stream = self.streams is not None and flag(body, "stream", self.streams)
        self.request = self.read(body)
        self.model = self.request.model  # as the request has it, until Queued tells the real id
        self.prompt_tokens = 0  # as Queued tells them
        self.owner = ""  # cache owner; set by the transport
        self.usage: Usage | None = None
        self.first: float | None = None  # when its first words came (monotonic seconds)
        self.choices: dict[int, Choice] = defaultdict(Choice)
        self.rows: tuple[bytes, ...] = ()  # of an Embed job

    def read(self, body: Mapping[str, Any]) -> Any:
        """The request a body asks for: what `events` gives to the service."""
        raise NotImplementedError

    def events(self, service: Service, cancel: Cancellation) -> Iterator[Event]:
        """Asks the service; for the errors this raises see there."""
        return service.generate(replace(self.request, owner=self.owner), cancel)

    def note(self, event: Event) -> None:
        """Remembers what came."""
        if isinstance(event, Queued):
            self.model, self.prompt_tokens = event.model, event.prompt_tokens
        elif isinstance(event, Usage):
            self.usage = event
        elif isinstance(event, Vectors):
            self.rows = event.rows
        elif isinstance(event, (Text, Thought, CallBegan, CallArguments, ToolResult, ChoiceEnd)):
            self.choices[event.index].add(event, self.recalls or not self.stream)
        if self.first is None and isinstance(event, (Text, Thought, CallBegan)):
            self.first = time.monotonic()

    def documents(self, event: Event) -> Iterator[dict[str, Any]]:
        """Turns an event into documents: a stream's chunks, or one document at the end."""
        self.note(event)
        if isinstance(event, (Text, Thought)) and not event.text and not event.logprobs:
            return
        if self.stream:
            yield from self.chunks(event)
        elif isinstance(event, Usage):
            yield self.document()

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        """A stream's documents for one event."""
        raise NotImplementedError

    def document(self) -> dict[str, Any]:
        """The whole answer."""
        raise NotImplementedError

    def idle(self) -> dict[str, Any] | None:
        """Keep-alive for clients that ignore SSE comments."""
        return None

    def failure(self, error: ApiError) -> Iterator[dict[str, Any]]:
        """Ends a stream that breaks off."""
        yield ERROR_SHAPES[self.api](error)


class Native(Dialect):
    """`/api/generate`, the documented API."""

    def read(self, body: Mapping[str, Any]) -> GenerateRequest:
        """Model and prompt (or messages, or a system text) are required."""
        if body.get("model") is None:
            raise InvalidRequest("model is required: the id of a model, or default", "model")
        prompt, messages = optional(body, "prompt", a_string), read_messages(body)
        system = optional(body, "system", a_string)
        if prompt is None and messages is None:
            raise InvalidRequest("prompt is required (or messages)", "prompt")
        if prompt is not None and messages is not None:
            raise InvalidRequest("prompt and messages exclude each other: send one of them", "prompt")
        if system is not None:
            turns = messages or ({"role": "user", "content": prompt},)
            messages, prompt = ({"role": "system", "content": system}, *turns), None
        functions, builtins = read_tools(body)
        if functions:
            raise InvalidRequest("tools may hold built-in tools here; /v1/chat/completions takes functions", "tools")
        return GenerateRequest(
            model=a_string("model", body["model"]),
            prompts=() if prompt is None else (prompt,),
            messages=messages,
            builtins=builtins,
            sampling=Sampling.from_json(body),
            defaults=NATIVE_DEFAULTS,
        )

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        if isinstance(event, Text):
            yield {"choices": [{"text": event.text, "index": 0}]}
        elif isinstance(event, Usage):
            end = {"text": "", "index": 0, "finish_reason": self.choices[0].finish_reason}
            yield {"choices": [end], "usage": event.document()}

    def document(self) -> dict[str, Any]:
        assert self.usage
        choices = [{"text": c.said(), "index": i, "finish_reason": c.finish_reason} for i, c in sorted(self.choices.items())]
        return {"choices": choices, "usage": self.usage.document()}


class NativeSocket(Native):
    """`/ws/generate`, the documented API: tokens, then done."""

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        if isinstance(event, Text):
            yield {"token": event.text}
        elif isinstance(event, Usage):
            yield self.done(self.choices[0].finish_reason, event)

    @staticmethod
    def done(reason: str | None, usage: Usage) -> dict[str, Any]:
        """The last document."""
        return {"done": True, "finish_reason": reason, "usage": usage.document()}


UNBUILT: dict[str, tuple[Any, ...]] = {  # fields of OpenAI's and vLLM's that are known here but not served, but for these values
    "guided_regex": (), "functions": ([],), "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (),
    "prediction": (), "web_search_options": (),
}  # fmt: skip


def read_format(where: str, format: Any) -> Schema | None:
    """The schema a format asks for: any object for a json_object without one, none for text.

    OpenAI's chat holds a json_schema's in an object of that name; its Responses, Anthropic and llama-server beside the type.
    """
    if format is None:
        return None
    kind = one_of(f"{where}.type", an_object(where, format).get("type"), ("text", "json_object", "json_schema"))
    if kind == "text":
        return None
    holder = an_object(f"{where}.json_schema", given(format, "json_schema", format))
    schema = given(holder, "schema", {"type": "object"} if kind == "json_object" else None)
    return Schema(where, an_object(f"{where}.schema", schema))


def guided(body: Mapping[str, Any]) -> dict[str, Any]:
    """json_schema or grammar, as vLLM's fields ask for them: structured_outputs, and guided_… before it."""
    older = {name: body.get(f"guided_{name}") for name in ("json", "choice", "grammar")}
    newer = optional(body, "structured_outputs", an_object, {})
    told = [(k, v) for k, v in (*newer.items(), *older.items()) if v is not None and v is not False]
    if len(told) > 1:
        raise InvalidRequest(f"structured_outputs: {' and '.join(dict(told))} exclude each other", "structured_outputs")
    for name, value in told:
        one_of("structured_outputs", name, ("json", "json_object", "choice", "grammar"))
        if name == "choice":
            texts = [a_string("structured_outputs.choice", text) for text in one_type(list, "a list")(name, value)]
            return {"grammar": "root ::= " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)}
        if name == "grammar":
            return {"grammar": value}
        schema = {"type": "object"} if name == "json_object" else value
        return {"json_schema": parse_json(schema.encode(), "The schema") if isinstance(schema, str) else schema}
    return {}


def read_tool_choice(choice: Any, functions: Seq[dict[str, Any]], builtins: Seq[str] = ()) -> dict[str, Any]:
    """The request's tool_choice and the tools that may be called, in any API's words. One that is forced must be offered."""
    check_length("tools", functions, MAX_TOOLS)
    names = [*(f["function"]["name"] for f in functions), *builtins]
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        where = "tool_choice.allowed_tools" if "allowed_tools" in choice else "tool_choice"
        holder = an_object(where, choice.get("allowed_tools", choice))
        choice = one_of(f"{where}.mode", holder.get("mode"), ("auto", "required"))
        names = [named_tool(place, tool, names) for place, tool in listed(f"{where}.tools", holder.get("tools"))]
    if isinstance(choice, dict):
        one_of("tool_choice.type", choice.get("type"), ("function", "custom", "tool", "allowed_tools"))
        choice = f"function:{named_tool('tool_choice', choice, names)}"
    elif choice not in ("none", "auto", "required"):
        forms = 'none, auto, required or {"type": "function", "name": …}'
        raise InvalidRequest(f"tool_choice must be {forms}, not {_said(choice)}", "tool_choice")
    if choice == "required" and not names:
        raise InvalidRequest("tool_choice: a call is required, but tools offers none", "tool_choice")
    names = [] if choice == "none" else names
    return {"tool_choice": choice, "tools": tuple(f for f in functions if f["function"]["name"] in names),
            "builtins": tuple(name for name in builtins if name in names)}  # fmt: skip


def named_tool(where: str, tool: Mapping[str, Any], names: Iterable[str]) -> str:
    """The name of a tool that is offered: beside the type, or in the `function` of OpenAI's chat."""
    named = an_object(f"{where}.function", given(tool, "function", tool))
    space = a_string(f"{where}.namespace", given(named, "namespace", ""))
    return one_of(f"{where}.name", joined_name(space, a_string(f"{where}.name", named.get("name"))), names)


def joined_name(space: str, name: str) -> str:
    """A tool's name in the prompt: models know no namespaces."""
    return f"{space}{'' if space.endswith('__') or not space else '__'}{name}"


def one_of(where: str, value: Any, known: Iterable[str]) -> str:
    """A string out of several."""
    if not isinstance(value, str) or value not in known:
        raise InvalidRequest(f"{where} must be one of {', '.join(known)}, not {_said(value)}", where)
    return value


def read_template_args(body: Mapping[str, Any], where: str, effort: Any, **own: Any) -> dict[str, Any]:
    """The template's arguments: an effort, of which templates know low, medium and high; chat_template_kwargs win."""
    known = {"none": None, "minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
    args: dict[str, Any] = {}
    if effort is not None:
        value = known[one_of(where, effort, known)]
        args = {"enable_thinking": False} if value is None else {"reasoning_effort": value}
    return args | own | optional(body, "chat_template_kwargs", an_object, {})


def first_given(body: Mapping[str, Any], check: Check, *names: str) -> Any:
    """The first of several fields that the body holds, checked; None without any."""
    return next((check(name, body[name]) for name in names if body.get(name) is not None), None)


class OpenAI(Dialect):
    """Base of OpenAI's two text routes."""

    api = "openai"
    prefix = object_name = chunk_name = ""

    def common(self, body: Mapping[str, Any], logprobs: int | None) -> GenerateRequest:
        """The fields both routes read alike. A known one that is not served is refused, not ignored."""
        self._include_usage = flag(optional(body, "stream_options", an_object, {}), "include_usage")
        for name, fine in UNBUILT.items():
            if body.get(name) is not None and body[name] not in fine:
                raise InvalidRequest(f"{name}: {_said(body[name])} is not supported here", name)
        limit = first_given(body, token_limit, "max_completion_tokens", "max_tokens", "n_predict")  # the last is llama-server's
        body = {**body, "max_tokens": limit, **guided(body)}
        schema = read_format("response_format", body.get("response_format"))
        if schema and (body.get("json_schema") or body.get("grammar")):
            raise InvalidRequest("response_format excludes json_schema and grammar: send one of them", "response_format")
        return GenerateRequest(
            model=optional(body, "model", a_string, "default"),
            sampling=Sampling.from_json(body, logprobs=logprobs, json_schema=schema),
            n=optional(body, "n", whole(1, MAX_CHOICES), 1),
        )

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        """Only the last chunk has a usage; the others not even null: there are clients that take the first for the last."""
        if isinstance(event, (Text, Thought, ToolResult, ChoiceEnd)):
            yield self._envelope(self.chunk_name, [self.shown(event.index, Choice(event), whole=False)])
        elif isinstance(event, Usage) and self._include_usage:
            yield self._envelope(self.chunk_name, []) | self._usage(event)

    def document(self) -> dict[str, Any]:
        assert self.usage
        choices = [self.shown(index, choice, whole=True) for index, choice in sorted(self.choices.items())]
        return self._envelope(self.object_name, choices) | self._usage(self.usage)

    def shown(self, index: int, choice: Choice, whole: bool) -> dict[str, Any]:
        """A choice as it is, or what is new of it."""
        raise NotImplementedError

    def _envelope(self, name: str, choices: list[Any]) -> dict[str, Any]:
        id = f"{self.prefix}-{self.id}"
        return {"id": id, "object": name, "created": self.created, "model": self.model, "choices": choices}

    @staticmethod
    def _usage(usage: Usage) -> dict[str, Any]:
        """`usage` as OpenAI has it; `timings` beside it, as llama-server has them, and in it, as we first did."""
        timings = usage.timings()
        details = {"prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
                   "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens}}  # fmt: skip
        return {"usage": usage.document() | details | {"timings": timings}, "timings": timings}


def shown_token(token: bytes, logprob: float) -> dict[str, Any]:
    """A token and its log probability, as OpenAI's chat, Ollama and llama-server show them."""
    return {"token": token.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(token)}


def shown_logprobs(tokens: Seq[TokenLogprob]) -> list[dict[str, Any]]:
    """Tokens with their likeliest alternatives."""
    return [shown_token(t.token, t.logprob) | {"top_logprobs": list(itertools.starmap(shown_token, t.top))} for t in tokens]


class ChatCompletion(OpenAI):
    """`/v1/chat/completions`."""

    prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def read(self, body: Mapping[str, Any]) -> GenerateRequest:
        messages = read_messages(body)
        if messages is None:
            raise InvalidRequest("messages is required: a list of messages", "messages")
        top, wanted = optional(body, "top_logprobs", whole(0, 20)), flag(body, "logprobs")
        if top is not None and not wanted:
            raise InvalidRequest("top_logprobs needs logprobs to be true", "top_logprobs")
        choice = read_tool_choice(given(body, "tool_choice", "auto"), *read_tools(body))
        if choice["tool_choice"] not in ("auto", "none"):  # a call has a form of its own
            if body.get("json_schema") or body.get("grammar"):
                raise InvalidRequest("tool_choice: a forced call excludes json_schema and grammar", "tool_choice")
            body = {**body, "response_format": None}
        budget = first_given(body, whole(-1), "thinking_budget_tokens", "reasoning_budget_tokens")  # llama-server's names
        return replace(
            self.common(body, (top or 0) if wanted else None),
            messages=messages,
            parallel_tool_calls=flag(body, "parallel_tool_calls", True),
            continue_final_message=optional(body, "continue_final_message", boolean),
            thinking_budget=None if budget == -1 else budget,
            template_args=read_template_args(body, "reasoning_effort", body.get("reasoning_effort")),
            split_markers=True,
            **choice,
        )

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        deltas: list[tuple[int, dict[str, Any]]] = []
        if isinstance(event, Queued):
            deltas = [(index, {"role": "assistant", "content": "", "refusal": None}) for index in range(self.request.n)]
        elif isinstance(event, CallBegan):
            call = {"index": event.number, "id": event.id, "type": "function", "function": {"name": event.name, "arguments": ""}}
            deltas = [(event.index, {"tool_calls": [call]})]
        elif isinstance(event, CallArguments):
            deltas = [(event.index, {"tool_calls": [{"index": event.number, "function": {"arguments": event.text}}]})]
        for index, delta in deltas:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            yield self._envelope(self.chunk_name, [choice])
        yield from super().chunks(event)

    def shown(self, index: int, choice: Choice, whole: bool) -> dict[str, Any]:
        """Results of built-in tools are an extension: `tool_calls` would ask the client to run those."""
        said: dict[str, Any] = {}
        for block in choice.blocks:
            if block.kind == "call":
                said.setdefault("tool_calls", []).append(a_call(block.call_id, block.name, block.text))
            else:
                name = "content" if block.kind == "text" else "reasoning_content"
                said[name] = said.get(name, "") + block.text
        if choice.results:
            said["tool_results"] = [{name: value for name, value in asdict(r).items() if name != "index"} for r in choice.results]
        logprobs, shown = choice.logprobs, None
        if logprobs or (whole and self.request.sampling.logprobs is not None):
            shown = {"content": shown_logprobs(logprobs), "refusal": None}
        if not whole:
            return {"index": index, "delta": said, "logprobs": shown, "finish_reason": choice.finish_reason}
        message = {"role": "assistant", "content": None if choice.calls else "", "refusal": None} | said
        return {"index": index, "message": message, "finish_reason": choice.finish_reason, "logprobs": shown}


class Completion(OpenAI):
    """`/v1/completions`."""

    prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"

    def read(self, body: Mapping[str, Any]) -> GenerateRequest:
        """A prompt is a string, a list of strings, token ids, or a list of those."""
        if body.get("prompt") is None:
            raise InvalidRequest("prompt is required: a string, or a list of strings or token ids", "prompt")
        prompts = read_texts("prompt", body["prompt"], MAX_TEXTS)
        echo, limit = flag(body, "echo"), body.get("max_tokens")
        nothing = echo and limit == 0 and limit is not False  # but the prompt is wanted
        request = self.common({**body, "max_tokens": 1} if nothing else body, optional(body, "logprobs", whole(0, 20)))
        sampling = replace(request.sampling, max_tokens=0) if nothing else request.sampling
        request = replace(request, prompts=prompts, sampling=sampling, echo=echo and sampling.logprobs is not None)
        if (texts := len(prompts) * request.n) > MAX_TEXTS:
            raise InvalidRequest(f"prompt: prompts times n may be up to {MAX_TEXTS}, not {texts}", "prompt")
        if optional(body, "best_of", whole(1, MAX_CHOICES), request.n) != request.n:
            raise InvalidRequest(f"best_of must equal n ({request.n}): texts are not ranked here", "best_of")
        written = [p if isinstance(p, str) else "" for p in prompts for _ in range(request.n)]  # by choice
        if echo and not request.echo and not all(isinstance(p, str) for p in prompts):
            raise InvalidRequest("echo of token ids needs logprobs: without them only prompts of text are echoed", "echo")
        most = MAX_ECHOED // (1 + (sampling.logprobs or 0))
        if request.echo and (size := request.n * sum(map(len, prompts))) > most:
            raise InvalidRequest(f"echo: with so many logprobs prompts of up to {most} characters are echoed, not {size}", "echo")
        self._echo = written if echo and not request.echo else []
        # characters so far: OpenAI counts from the prompt's start
        self._offsets = [0 if request.echo else len(text) for text in written]
        suffix = optional(body, "suffix", a_string, "")
        if suffix and (len(prompts) > 1 or not isinstance(prompts[0], str) or request.echo):
            raise InvalidRequest("suffix is served for one prompt of text, whose log probabilities are not told", "suffix")
        return replace(request, prompts=(), infill=Infill(written[0], suffix)) if suffix else request

    def documents(self, event: Event) -> Iterator[dict[str, Any]]:
        yield from super().documents(event)
        if isinstance(event, Queued):
            for index, prompt in enumerate(self._echo):
                yield from super().documents(Text(index, prompt))

    def shown(self, index: int, choice: Choice, whole: bool) -> dict[str, Any]:
        shown, tokens = None, choice.logprobs
        if tokens:
            words = [t.token.decode("utf-8", "replace") for t in tokens]
            known = [not math.isnan(t.logprob) for t in tokens]  # of a text's first token OpenAI tells null too
            tops = [{token.decode("utf-8", "replace"): p for token, p in t.top} if k else None
                    for t, k in zip(tokens, known, strict=True)]  # fmt: skip
            begun = (sum(byte & 0xC0 != 0x80 for byte in t.token) for t in tokens)  # characters, of which a token may have a part
            *offsets, self._offsets[index] = itertools.accumulate(begun, initial=self._offsets[index])
            logprobs = [t.logprob if k else None for t, k in zip(tokens, known, strict=True)]
            shown = {"tokens": words, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}
        return {"text": choice.said(), "index": index, "logprobs": shown, "finish_reason": choice.finish_reason}


class Embeddings(Dialect):
    """`/v1/embeddings`, OpenAI's."""

    api = "openai"
    streams = None

    def read(self, body: Mapping[str, Any]) -> EmbedRequest:
        self._base64 = one_of("encoding_format", given(body, "encoding_format", "float"), ("float", "base64")) == "base64"
        if body.get("input") is None:
            raise InvalidRequest("input is required: a string, or a list of strings or token ids", "input")
        return EmbedRequest(
            model=optional(body, "model", a_string, "default"),
            inputs=read_texts("input", body["input"], MAX_INPUTS, may_be_empty=False),
            dimensions=optional(body, "dimensions", whole(1)),
        )

    def events(self, service: Service, cancel: Cancellation) -> Iterator[Event]:
        return service.embed(self.request, cancel)

    def document(self) -> dict[str, Any]:
        assert self.usage
        usage = {"prompt_tokens": self.usage.prompt_tokens, "total_tokens": self.usage.prompt_tokens}
        return {"model": self.model, "usage": usage, "object": "list", **self.answer()}

    def answer(self) -> dict[str, Any]:
        """The answer but for the model and the usage."""
        vectors = [base64.b64encode(row).decode() if self._base64 else numbers(row) for row in self.rows]
        return {"data": [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]}


def numbers(row: bytes) -> list[float]:
    """A vector as numbers: nine digits tell any float32, a double's 17 would be twice as long."""
    return [float(f"{number:.9g}") for number in struct.unpack(f"<{len(row) // 4}f", row)]


class Rerank(Embeddings):
    """`/v1/rerank`, Jina's: the documents that answer the query best come first."""

    def read(self, body: Mapping[str, Any]) -> EmbedRequest:
        if not optional(body, "query", a_string):
            raise InvalidRequest("query is required: what the documents are ranked for", "query")
        documents = read_documents(body.get("documents"))
        self._top = optional(body, "top_n", whole(1), len(documents))
        self._shown = flag(body, "return_documents", True)
        return EmbedRequest(optional(body, "model", a_string, "default"), documents, query=body["query"])

    def answer(self) -> dict[str, Any]:
        scores = [numbers(row)[0] for row in self.rows]
        results: list[dict[str, Any]] = []
        for i in sorted(range(len(scores)), key=lambda i: -scores[i])[: self._top]:
            document = {"document": {"text": self.request.inputs[i]}} if self._shown else {}
            results.append({"index": i, "relevance_score": scores[i], **document})
        return {"results": results}


# ── 14.2. Dialects of blocks ──────────────────────────────────────────────────────────────────────────────────────────
# Answers as lists of blocks: Anthropic's Messages, OpenAI's Responses.


def listed(where: str, value: Any) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a list, each with its place for error messages."""
    return [(f"{where}[{i}]", an_object(f"{where}[{i}]", v)) for i, v in enumerate(one_type(list, "a list")(where, value))]


def given(body: Mapping[str, Any], name: str, default: Any) -> Any:
    """A field, or the default when it is absent."""
    return default if body.get(name) is None else body[name]


def a_call(id: str, name: str, arguments: Any) -> dict[str, Any]:
    """A tool call in an assistant's turn, as templates want it."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def a_result(id: str, names: Mapping[str, str], content: str) -> dict[str, Any]:
    """The turn that answers a call; some templates write the function's name, which these APIs leave out."""
    return {"role": "tool", "tool_call_id": id, "content": content} | ({"name": names[id]} if id in names else {})


def a_function(where: str, tool: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A function that the client runs, as templates want it."""
    function: dict[str, Any] = {"name": a_string(f"{where}.name", tool.get("name"))}
    if tool.get("description") is not None:
        function["description"] = a_string(f"{where}.description", tool["description"])
    return {"type": "function", "function": function | {"parameters": parameters}}


class BlockDialect(Dialect):
    """An API whose answers are lists of blocks."""

    _opened = 0  # blocks whose beginning was sent

    def note(self, event: Event) -> None:
        super().note(event)
        if isinstance(event, ChoiceEnd) and not self.choices[0].blocks:
            self.choices[0].blocks.append(Block("text"))  # clients look at the first block without asking whether there is one

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        blocks = self.choices[0].blocks
        if len(blocks) > self._opened:
            if self._opened:
                yield from self.closed(blocks[-2])
            yield from self.opened(blocks[-1])
            self._opened = len(blocks)
        if isinstance(event, (Thought, Text, CallArguments)) and event.text:
            yield from self.more(blocks[-1], event.text)
        elif isinstance(event, ChoiceEnd):
            yield from self.closed(blocks[-1])

    def opened(self, block: Block) -> Iterator[dict[str, Any]]:
        """Announces a block."""
        raise NotImplementedError

    def more(self, block: Block, text: str) -> Iterator[dict[str, Any]]:
        """Some more of a block."""
        raise NotImplementedError

    def closed(self, block: Block) -> Iterator[dict[str, Any]]:
        """Ends a block."""
        raise NotImplementedError


CLAUDE_BLOCKS = {  # what messages may hold, by role
    "user": ("text", "tool_result", "document", "search_result", "image"),
    "assistant": ("text", "thinking", "tool_use"),
    "system": ("text",),
}
CLAUDE_UNREAD = re.compile(  # of tools that Anthropic runs itself, and thoughts that only it can read
    r"\w+_tool_(use|result)|redacted_thinking|container_upload|compaction|fallback")  # fmt: skip


def claude_messages(body: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Anthropic's system text and messages, as templates want them."""
    messages, names = listed("messages", body.get("messages")), dict[str, str]()
    check_length("messages", messages, MAX_MESSAGES)
    if not messages:
        raise InvalidRequest("messages must be a list of at least one message", "messages")
    system = flat_content("system", given(body, "system", ""), ("text",), "\n\n", newest=True)
    turns = [{"role": "system", "content": system}] if system else []
    newest = newest_turn([message for _, message in messages if not is_results(message.get("content"))])
    return (*turns, *(turn for where, message in messages for turn in claude_turns(where, message, names, message is newest)))


def is_results(content: Any) -> bool:
    """True for a message of tool results alone, which is no turn of the user's own."""
    return isinstance(content, list) and all(isinstance(b, dict) and b.get("type") == "tool_result" for b in content)


def claude_turns(where: str, message: Mapping[str, Any], names: dict[str, str], newest: bool) -> list[dict[str, Any]]:
    """One of Anthropic's messages: results become turns of their own. `names` of calls by id, gathered over the chat."""
    role, content = one_of(f"{where}.role", message.get("role"), CLAUDE_BLOCKS), message.get("content")
    texts, thoughts, calls, results = list[Any](), list[str](), list[Any](), list[Any]()
    for place, block in listed(f"{where}.content", [{"type": "text", "text": content}] if isinstance(content, str) else content):
        kind = a_string(f"{place}.type", block.get("type"))
        if CLAUDE_UNREAD.fullmatch(kind):
            continue
        one_of(f"{place}.type", kind, CLAUDE_BLOCKS[role])
        if kind == "thinking":
            thoughts.append(a_string(f"{place}.thinking", block.get("thinking")))
        elif kind == "tool_use":
            id, name = a_string(f"{place}.id", block.get("id")), a_string(f"{place}.name", block.get("name"))
            names[id] = name
            calls.append(a_call(id, name, an_object(f"{place}.input", block.get("input"))))
        elif kind == "tool_result":
            id, content = a_string(f"{place}.tool_use_id", block.get("tool_use_id")), given(block, "content", "")
            parts = [] if isinstance(content, str) else listed(f"{place}.content", content)
            text = flat_parts(itertools.starmap(claude_part, parts), ("text",), "\n\n", False) if parts else content or ""
            results.append(a_result(id, names, f"Error: {text}" if flag(block, "is_error") else text))
        else:
            texts.append(claude_part(place, block))
    between = "" if role == "assistant" else "\n\n"  # what the model wrote in one go stays in one piece
    turn: dict[str, Any] = {"role": role, "content": flat_parts(texts, ("text",), between, newest)}
    turn |= {"reasoning_content": "".join(thoughts)} if thoughts else {}
    turn |= {"tool_calls": calls} if calls else {}
    return results if results and not turn["content"] else [*results, turn]


def claude_part(place: str, block: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A block as a part of a chat's content: what search results and documents of text say is text."""
    kind, source = block.get("type"), block.get("source")
    texts = [a_string(f"{place}.title", given(block, "title", ""))]
    if kind == "tool_reference":  # what a search for tools found
        texts = [a_string(f"{place}.tool_name", block.get("tool_name"))]
    elif kind == "search_result":
        texts += [a_string(f"{place}.source", source), flat_content(f"{place}.content", block.get("content"), ("text",), "\n\n")]
    elif kind == "document" and (form := an_object(f"{place}.source", source).get("type")) in ("text", "content"):
        name = "data" if form == "text" else "content"
        texts.append(flat_content(f"{place}.source.{name}", block["source"].get(name), ("text",), "\n\n"))
    else:
        return place, block
    return place, {"type": "text", "text": "\n".join(filter(None, texts))}


def claude_tools(body: Mapping[str, Any]) -> dict[str, Any]:
    """The tools and the choice among them; those that Anthropic's server runs, or its models know by heart, are left out."""
    functions = [
        a_function(where, tool, an_object(f"{where}.input_schema", tool.get("input_schema")))
        for where, tool in listed("tools", given(body, "tools", []))
        if a_string(f"{where}.type", given(tool, "type", "custom")) == "custom"
    ]
    choice = optional(body, "tool_choice", an_object, {"type": "auto"})
    kind = one_of("tool_choice.type", choice.get("type"), ("auto", "any", "tool", "none"))
    read = read_tool_choice(choice if kind == "tool" else {"any": "required"}.get(kind, kind), functions)
    return read | {"parallel_tool_calls": not flag(choice, "disable_parallel_tool_use")}


class Messages(BlockDialect):
    """`/v1/messages`, Anthropic's."""

    api = "anthropic"
    REASONS: ClassVar = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
    DELTAS: ClassVar = {"text": ("text_delta", "text"), "thought": ("thinking_delta", "thinking"),
                        "call": ("input_json_delta", "partial_json")}  # fmt: skip

    def read(self, body: Mapping[str, Any]) -> GenerateRequest:
        """The model thinks only if the request says so, as this API has it."""
        config = optional(body, "output_config", an_object, {})
        schema = read_format("output_config.format", given(config, "format", body.get("output_format")))
        ends = stops("stop_sequences", optional(body, "stop_sequences", one_type(list, "a list"), []))
        thinking = optional(body, "thinking", an_object, {"type": "disabled"})
        kind = one_of("thinking.type", thinking.get("type"), ("enabled", "adaptive", "disabled"))
        budget = thinking.get("budget_tokens") if kind == "enabled" else None
        return GenerateRequest(
            model=optional(body, "model", a_string, "default"),
            messages=claude_messages(body),
            sampling=Sampling.from_json({**body, "stop": None}, stop=ends, json_schema=schema),
            split_markers=True,
            thinking_budget=None if budget is None else whole(1)("thinking.budget_tokens", budget),
            template_args=read_template_args(
                body, "output_config.effort", config.get("effort"), enable_thinking=kind != "disabled"
            ),
            **claude_tools(body),
        )

    def idle(self) -> dict[str, Any]:
        return {"type": "ping"}

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        if isinstance(event, Queued):
            yield {"type": "message_start", "message": self.document()}
        yield from super().chunks(event)
        if isinstance(event, Usage):
            yield {"type": "message_delta", "delta": self._end(), "usage": self._usage()}
            yield {"type": "message_stop"}

    def opened(self, block: Block) -> Iterator[dict[str, Any]]:
        empty = self._content(replace(block, parts=[]))
        yield {"type": "content_block_start", "index": block.index, "content_block": empty}

    def more(self, block: Block, text: str) -> Iterator[dict[str, Any]]:
        kind, name = self.DELTAS[block.kind]
        yield {"type": "content_block_delta", "index": block.index, "delta": {"type": kind, name: text}}

    def closed(self, block: Block) -> Iterator[dict[str, Any]]:
        if block.kind == "thought":  # clients that keep thoughts wait for it
            delta = {"type": "signature_delta", "signature": ""}
            yield {"type": "content_block_delta", "index": block.index, "delta": delta}
        yield {"type": "content_block_stop", "index": block.index}

    def document(self) -> dict[str, Any]:
        """The message as far as it came."""
        return {"id": f"msg_{self.id}", "type": "message", "role": "assistant", "model": self.model,
                "content": [self._content(b) for b in self.choices[0].blocks], **self._end(), "usage": self._usage()}  # fmt: skip

    @staticmethod
    def _content(block: Block) -> dict[str, Any]:
        if block.kind == "text":
            return {"type": "text", "text": block.text}
        if block.kind == "thought":
            return {"type": "thinking", "thinking": block.text, "signature": ""}
        return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": block.arguments()}

    def _end(self) -> dict[str, Any]:
        """The reason that the message ended; nothing while it goes on."""
        end = self.choices[0].end
        if end and end.finish_reason == "stop" and end.stopped_by in self.request.sampling.stop:
            return {"stop_reason": "stop_sequence", "stop_sequence": end.stopped_by}
        return {"stop_reason": self.REASONS.get(end.finish_reason, "end_turn") if end else None, "stop_sequence": None}

    def _usage(self) -> dict[str, int]:
        """Tokens: this API counts cached ones by themselves."""
        usage = self.usage or Usage(self.prompt_tokens, 0, 0, 0, 0)
        return {"input_tokens": usage.prompt_tokens - usage.cached_tokens, "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": usage.cached_tokens, "output_tokens": usage.completion_tokens}  # fmt: skip


def claude_error(error: ApiError) -> dict[str, Any]:
    """Anthropic's errors."""
    kinds = {"payload_too_large": "request_too_large", "server_error": "api_error"}
    kind, message = kinds.get(error.code) or kinds.get(error.kind, error.kind), str(error)
    if isinstance(error, ContextLengthExceeded) and error.sizes:  # Claude Code reads these words, and compacts
        message = "prompt is too long: {} tokens > {} maximum".format(*error.sizes)
    return {"type": "error", "error": {"type": kind, "message": message, "code": error.code, "details": error.details}}


HOSTED_ITEM = re.compile(  # what tools of OpenAI's own did: those tools are left out here, and their traces too
    r"\w+_call(_output)?|mcp_\w+|tool_search_\w+|program(_output)?|compaction(_trigger)?|context_compaction")  # fmt: skip
RESPONSE_TEXTS = ("input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text")


class ResponseInput:
    """The tools and turns of a Responses request: what the assistant did in a row is one turn."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.functions: list[dict[str, Any]] = []
        self.freeform: set[str] = set()  # names of the functions that stand for tools whose input is any text
        self.turns: list[dict[str, Any]] = []
        self.known: dict[str, dict[str, str]] = {}  # tools by their names in the prompt: the client's name and namespace
        self._called: dict[str, str] = {}  # names of calls, by id
        self._add_tools("tools", given(body, "tools", []))
        if instructions := optional(body, "instructions", a_string):
            self.turns.append({"role": "system", "content": instructions})
        said = body.get("input")
        items = listed("input", [{"role": "user", "content": said}] if isinstance(said, str) else said)
        check_length("input", items, MAX_MESSAGES)
        self._newest = newest_turn([item for _, item in items])
        for where, item in items:
            self._add(where, item)
        if not items or not self.turns:
            raise InvalidRequest("input holds nothing that a model here could read", "input")

    def _add_tools(self, where: str, tools: Any, space: str = "") -> None:
        """Reads a list of tools; those that OpenAI's own server runs are left out."""
        for place, tool in listed(where, tools):
            kind = a_string(f"{place}.type", tool.get("type"))
            if kind == "namespace":
                self._add_tools(f"{place}.tools", tool.get("tools"), a_string(f"{place}.name", tool.get("name")))
            elif kind in ("function", "custom"):
                name = a_string(f"{place}.name", tool.get("name"))
                full = joined_name(space, name)
                self.known[full] = {"name": name} | ({"namespace": space} if space else {})
                self.freeform |= {full} if kind == "custom" else set()
                shown = self._freeform(place, tool) if kind == "custom" else tool
                schema = an_object(f"{place}.parameters", given(shown, "parameters", {}))
                self.functions.append(a_function(place, {**shown, "name": full}, schema))

    @staticmethod
    def _freeform(place: str, tool: Mapping[str, Any]) -> dict[str, Any]:
        """A freeform tool as a function of one string; its grammar (Lark's or a regular expression) is described only."""
        form = an_object(f"{place}.format", given(tool, "format", {"type": "text"}))
        said = a_string(f"{place}.description", given(tool, "description", ""))
        if one_of(f"{place}.format.type", form.get("type"), ("text", "grammar")) == "grammar":
            syntax = one_of(f"{place}.format.syntax", form.get("syntax"), ("lark", "regex"))
            definition = a_string(f"{place}.format.definition", form.get("definition"))
            said = f"{said}\n\nThe input must match this grammar ({syntax}):\n{definition}".strip()
        schema = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
        return {"description": said, "parameters": schema | {"additionalProperties": False}}

    def _add(self, where: str, item: Mapping[str, Any]) -> None:
        """Reads one item."""
        kind, read = a_string(f"{where}.type", given(item, "type", "message")), {
            "message": self._message, "reasoning": self._reasoning, "function_call": self._call,
            "custom_tool_call": self._call, "function_call_output": self._output, "custom_tool_call_output": self._output,
            "additional_tools": lambda where, item: self._add_tools(f"{where}.tools", item.get("tools")),
        }  # fmt: skip
        if kind in read or not HOSTED_ITEM.fullmatch(kind):
            read[one_of(f"{where}.type", kind, read)](where, item)

    def _assistant(self, *but: str) -> dict[str, Any]:
        """The assistant's turn that goes on, unless it has one of these fields already; else a new one."""
        last = self.turns[-1] if self.turns else {"role": ""}
        if last["role"] != "assistant" or any(last.get(name) for name in but):
            self.turns.append(last := {"role": "assistant", "content": ""})
        return last

    def _message(self, where: str, item: Mapping[str, Any]) -> None:
        role = one_of(f"{where}.role", item.get("role"), ("user", "assistant", "system", "developer"))
        text = flat_content(f"{where}.content", item.get("content"), RESPONSE_TEXTS, newest=item is self._newest)
        if role == "assistant":
            self._assistant("content", "tool_calls")["content"] = text
        else:
            self.turns.append({"role": "system" if role == "developer" else role, "content": text})

    def _reasoning(self, where: str, item: Mapping[str, Any]) -> None:
        """A thought is in encrypted_content, which here is base64 of plain text; OpenAI's own cannot be read."""
        sealed, text = a_string(f"{where}.encrypted_content", given(item, "encrypted_content", "")), ""
        with contextlib.suppress(ValueError):  # no base64, or no text inside
            text = binascii.a2b_base64(sealed, strict_mode=True).decode()
        for name in ("content", "summary"):
            text = text or flat_content(f"{where}.{name}", given(item, name, ""), RESPONSE_TEXTS)
        if text:
            turn = self._assistant("content", "tool_calls")
            turn["reasoning_content"] = turn.get("reasoning_content", "") + text

    def _call(self, where: str, item: Mapping[str, Any]) -> None:
        id, name = a_string(f"{where}.call_id", item.get("call_id")), a_string(f"{where}.name", item.get("name"))
        self._called[id] = name = joined_name(a_string(f"{where}.namespace", given(item, "namespace", "")), name)
        if item["type"] == "custom_tool_call":
            arguments: Any = {"input": a_string(f"{where}.input", item.get("input"))}
        else:
            arguments = a_string(f"{where}.arguments", item.get("arguments")) or "{}"
            with contextlib.suppress(InvalidRequest):  # what is no JSON stays the text it is
                arguments = parse_json(arguments.encode())
        self._assistant().setdefault("tool_calls", []).append(a_call(id, name, arguments))

    def _output(self, where: str, item: Mapping[str, Any]) -> None:
        text = flat_content(f"{where}.output", item.get("output"), RESPONSE_TEXTS, "\n")
        self.turns.append(a_result(a_string(f"{where}.call_id", item.get("call_id")), self._called, text))


def without_oldest(messages: tuple[dict[str, Any], ...], sizes: tuple[int, ...]) -> tuple[dict[str, Any], ...] | None:
    """A conversation from a later turn of the user's on, as far on as its tokens and their bound suggest; None: there is none."""
    begins = [i for i, message in enumerate(messages) if message["role"] == "user"]
    system = tuple(itertools.takewhile(lambda message: message["role"] == "system", messages))
    lengths = [len(json.dumps(message)) for message in messages]
    surplus = sum(lengths) * (1 - sizes[1] / sizes[0])
    later = [begin for begin in begins[1:] if sum(lengths[len(system) : begin]) >= surplus] or begins[1:][-1:]
    return (*system, *messages[later[0] :]) if later else None


class Responses(BlockDialect):
    """`/v1/responses`, OpenAI's; keeps no state."""

    api, recalls = "openai", True
    streamed_errors = frozenset({"context_length_exceeded"})  # Codex looks for it among the events only, and compacts
    ECHOED: ClassVar[dict[str, Any]] = {  # what a response repeats of its request
        "instructions": None, "max_output_tokens": None, "max_tool_calls": None, "metadata": {}, "parallel_tool_calls": True,
        "prompt_cache_key": None, "reasoning": {"effort": None, "summary": None}, "safety_identifier": None, "temperature": None,
        "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_p": None, "truncation": "disabled",
        "user": None,
    }  # fmt: skip
    KINDS: ClassVar = {  # of blocks: how their ids begin, and their events' names
        "text": ("msg", "output_text"), "thought": ("rs", "reasoning_text"), "call": ("fc", "function_call_arguments"),
        "freeform": ("ctc", "custom_tool_call_input"),
    }  # fmt: skip

    def read(self, body: Mapping[str, Any]) -> GenerateRequest:
        self._fixed = {"id": f"resp_{self.id}", "object": "response", "created_at": self.created}
        self._fixed |= {name: given(body, name, default) for name, default in self.ECHOED.items()}
        self._sent = 0  # events
        for name in ("previous_response_id", "conversation", "prompt", "background", "top_logprobs"):
            if body.get(name):
                why = ": no state is kept here, send the whole conversation as input" if name != "top_logprobs" else " here"
                raise InvalidRequest(f"{name} is not served{why}", name)
        self._truncates = one_of("truncation", given(body, "truncation", "disabled"), ("auto", "disabled")) == "auto"
        self._input = ResponseInput(body)
        reasoning, text = (optional(body, name, an_object, {}) for name in ("reasoning", "text"))
        schema, limit = read_format("text.format", text.get("format")), optional(body, "max_output_tokens", whole(1))
        return GenerateRequest(
            model=optional(body, "model", a_string, "default"),
            messages=tuple(self._input.turns),
            parallel_tool_calls=flag(body, "parallel_tool_calls", True),
            continue_final_message=False,
            template_args=read_template_args(body, "reasoning.effort", reasoning.get("effort")),
            sampling=Sampling.from_json({**body, "max_tokens": None}, max_tokens=limit, json_schema=schema),
            split_markers=True,
            **read_tool_choice(given(body, "tool_choice", "auto"), self._input.functions),
        )

    def events(self, service: Service, cancel: Cancellation) -> Iterator[Event]:
        """With `truncation` auto, the oldest turns of a conversation that is too long are left out."""
        while True:
            try:
                yield from super().events(service, cancel)
                return
            except ContextLengthExceeded as error:
                messages = without_oldest(self.request.messages, error.sizes) if self._truncates and error.sizes else None
                if messages is None:
                    raise
                self.request = replace(self.request, messages=messages)

    # Events, numbered as they go out

    def _event(self, kind: str, /, **fields: Any) -> dict[str, Any]:
        self._sent += 1
        return {"type": f"response.{kind}", "sequence_number": self._sent - 1, **fields}

    def idle(self) -> dict[str, Any]:
        """The first event must be `created`, also while the model loads."""
        return self._event("in_progress" if self._sent else "created", response=self._response("in_progress"))

    def failure(self, error: ApiError) -> Iterator[dict[str, Any]]:
        if not self._sent:
            yield self.idle()
        yield self._event("failed", response=self._response("failed", error={"code": error.code, "message": str(error)}))

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        if isinstance(event, Queued):
            if not self._sent:
                yield self.idle()
            yield self.idle()
        yield from super().chunks(event)
        if isinstance(event, Usage):
            response = self.document()
            yield self._event(response["status"], response=response)

    def opened(self, block: Block) -> Iterator[dict[str, Any]]:
        item = self._item(replace(block, parts=[]), "in_progress")
        parts = item.get("content", ())
        yield self._event("output_item.added", output_index=block.index, item=item | ({"content": []} if parts else {}))
        for part in parts:
            yield self._event("content_part.added", **self._at(block), part=part)

    def more(self, block: Block, text: str) -> Iterator[dict[str, Any]]:
        kind = self._kind(block)
        if kind != "freeform":  # its input is told when it is whole
            more = {"delta": text, "logprobs": list[Any]()} if kind == "text" else {"delta": text}
            yield self._event(f"{self.KINDS[kind][1]}.delta", **self._at(block), **more)

    def closed(self, block: Block) -> Iterator[dict[str, Any]]:
        kind, item = self._kind(block), self._item(block, self._status(block))
        name = self.KINDS[kind][1]
        done: dict[str, Any] = {"text": block.text, "logprobs": []} if kind == "text" else {"text": block.text}
        if kind == "call":
            done = {"name": item["name"], "arguments": block.text}
        elif kind == "freeform":
            done = {"input": item["input"]}
            yield self._event(f"{name}.delta", **self._at(block), delta=item["input"])
        yield self._event(f"{name}.done", **self._at(block), **done)
        for part in item.get("content", ()):
            yield self._event("content_part.done", **self._at(block), part=part)
        yield self._event("output_item.done", output_index=block.index, item=item)

    def _at(self, block: Block) -> dict[str, Any]:
        place = {"item_id": self._id(block), "output_index": block.index}
        return place if block.kind == "call" else place | {"content_index": 0}

    # Items

    def _kind(self, block: Block) -> str:
        return "freeform" if block.kind == "call" and block.name in self._input.freeform else block.kind

    def _id(self, block: Block) -> str:
        return f"{self.KINDS[self._kind(block)][0]}_{self.id}{block.index:02x}"

    def _status(self, block: Block) -> str:
        cut = self.choices[0].finish_reason == "length" and block is self.choices[0].blocks[-1]
        return "incomplete" if cut else "completed"

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        if block.kind == "text":
            part = {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}
            return {"id": self._id(block), "type": "message", "role": "assistant", "status": status, "content": [part]}
        if block.kind == "thought":
            sealed = base64.b64encode(block.text.encode("utf-8", "replace")).decode()
            return {"id": self._id(block), "type": "reasoning", "status": status, "summary": [], "encrypted_content": sealed,
                    "content": [{"type": "reasoning_text", "text": block.text}]}  # fmt: skip
        known = self._input.known.get(block.name, {"name": block.name})
        call = {"id": self._id(block), "call_id": block.call_id, **known, "status": status}
        if block.name in self._input.freeform:
            written = block.arguments().get("input")  # else the arguments stay as they are
            return call | {"type": "custom_tool_call", "input": written if isinstance(written, str) else block.text}
        return call | {"type": "function_call", "arguments": block.text}

    def document(self) -> dict[str, Any]:
        """The response at its end."""
        cut = self.choices[0].finish_reason == "length"
        output = [self._item(block, self._status(block)) for block in self.choices[0].blocks]
        why = {"reason": "max_output_tokens"} if cut else None
        return self._response("incomplete" if cut else "completed", output=output, incomplete_details=why)

    def _response(self, status: str, **more: Any) -> dict[str, Any]:
        state = {"status": status, "error": None, "incomplete_details": None, "model": self.model, "output": list[Any](),
                 "usage": self._usage(), "store": False, "background": False, "previous_response_id": None}  # fmt: skip
        return self._fixed | state | more

    def _usage(self) -> dict[str, Any] | None:
        if self.usage is None:
            return None
        return {
            "input_tokens": self.usage.prompt_tokens, "input_tokens_details": {"cached_tokens": self.usage.cached_tokens},
            "output_tokens": self.usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self.usage.reasoning_tokens},
            "total_tokens": self.usage.prompt_tokens + self.usage.completion_tokens,
        }  # fmt: skip


# ── 14.3. Ollama and llama-server ─────────────────────────────────────────────────────────────────────────────────────
# Two more APIs in their own shapes, and what the clients of all of them are told of models.

OLLAMA_VERSION = "0.14.0"  # clients ask for one that serves what they use: that had all of Ollama's, OpenAI's and Anthropic's
OLLAMA_FIELDS = ("options", "raw", "keep_alive", "suffix", "context", "template", "images", "think", "format")
OLLAMA_UNSERVED = ("create", "copy", "delete", "push", "blobs")  # below /api, and in no other API
MAX_KEEP = 1e9  # seconds, 31 years: a date that every client can read
GO_DURATION = re.compile(r"(-?)((?:\d{1,9}(?:\.\d{1,9})?(?:ns|us|µs|ms|s|m|h))+|\d{1,9})")
GO_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}


def speaks_ollama(body: Mapping[str, Any], agent: str) -> bool:
    """True if a body for `/api/generate` is Ollama's: it has a field of Ollama's own, or one of its packages sends it."""
    packages = agent.lower().startswith("ollama")  # ollama-python/…, ollama-js/…, ollama/… (Go)
    return packages or any(body.get(name) is not None for name in OLLAMA_FIELDS)


def keep_seconds(name: str, value: Any) -> float:
    """Ollama's keep_alive: seconds, or a duration as Go writes it (5m, 1h30m); below zero: for ever."""
    if not isinstance(value, str):
        return float(number(-MAX_KEEP, MAX_KEEP)(name, value))
    found = GO_DURATION.fullmatch(value)
    if not found:
        raise InvalidRequest(f"{name} must be seconds, or a duration like 30s, 5m or 1h30m, not {_said(value)}", name)
    seconds = sum(float(n) * GO_UNITS[unit] for n, unit in re.findall(r"([\d.]+)([a-zµ]*)", found[2]))
    return -seconds if found[1] else min(seconds, MAX_KEEP)



def rfc3339(seconds: float) -> str:
    """A time since the epoch, as in 2026-01-31T12:00:00.000000Z."""
    seconds = max(seconds, 0.0)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1e6):06d}Z"


def ollama_sampling(body: Mapping[str, Any]) -> Sampling:
    """Ollama's options and format. A limit of 0 or less, like a seed below zero, is none."""
    options = optional(body, "options", an_object, {})
    optional(options, "num_keep", whole(-1))
    limit, seed = optional(options, "num_predict", whole(-2), -1), optional(options, "seed", whole(), -1)
    own = {"max_tokens": limit if limit > 0 else None, "seed": seed if seed >= 0 else None, "json_schema": None, "grammar": None}
    top = optional(body, "top_logprobs", whole(0, 20), 0)
    format = {"type": "object"} if body.get("format") == "json" else given(body, "format", "")
    schema = None if format == "" else Schema("format", one_type(dict, '"json" or a JSON schema')("format", format))
    return Sampling.from_json({**neutral(options), **own}, logprobs=top if flag(body, "logprobs") else None, json_schema=schema)


def ollama_engine(body: Mapping[str, Any]) -> dict[str, Any]:
    """The options that Ollama decides at a model's load, as fields of EngineOptions."""
    options = optional(body, "options", an_object, {})
    least = {"num_ctx": 1, "num_batch": 1, "num_thread": 0, "num_gpu": -1}  # 0 threads are as many as usual
    read = {name: optional(options, name, whole(least[name])) for name in OLLAMA_ENGINE}
    most = {"num_ctx": 1 << 24, "num_batch": 4096, "num_thread": len(processors()), "num_gpu": 1 << 16}
    return {OLLAMA_ENGINE[name]: min(value, most[name]) for name, value in read.items()
            if value or (value is not None and name == "num_gpu")}  # fmt: skip


def neutral(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body with llama.cpp's other ways to say that a sampler is off: top_k below zero, a repeat_penalty of 0."""
    top, penalty, own = body.get("top_k"), body.get("repeat_penalty"), dict(body)
    if type(top) is int and top < 0:
        own["top_k"] = 0
    if type(penalty) in (int, float) and penalty == 0:
        own["repeat_penalty"] = 1
    return own


def ollama_images(where: str, holder: Mapping[str, Any], newest: bool) -> list[str]:
    """Lists a turn's images for with_note. Those of the user's newest turn are refused."""
    if not optional(holder, "images", one_type(list, "a list"), []):
        return []
    if newest:
        raise InvalidRequest(f"{where} is not served: no model here sees images", where)
    return ["image"]


class OllamaRoute(Dialect):
    """Base of Ollama's routes: keep_alive, times, and loading by a request without a question."""

    api = "ollama"

    def common(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that all its requests have."""
        self._began = self._ready = time.monotonic()
        self._keep = optional(body, "keep_alive", keep_seconds)
        if body.get("model") is None:
            raise InvalidRequest("model is required: the name of a model, or default", "model")
        return {"model": a_string("model", body["model"]), "engine": ollama_engine(body)}

    def events(self, service: Service, cancel: Cancellation) -> Iterator[Event]:
        """Without a question the model is only loaded, or let go. Behind the answer it stays as long as keep_alive says."""
        asks = any(getattr(self.request, name, None) for name in ("prompts", "messages", "infill", "inputs"))
        try:
            for event in super().events(service, cancel) if asks else self._loads(service, cancel):
                if isinstance(event, Queued):
                    self._ready = time.monotonic()
                elif isinstance(event, Usage):  # the client may ask as soon as it has the last one
                    self._stay(service)
                yield event
        finally:
            self._stay(service)

    def _stay(self, service: Service) -> None:
        if self._keep is not None:
            service.table.keep(self.model, self._keep)

    def _loads(self, service: Service, cancel: Cancellation) -> Iterator[Event]:
        if self._keep == 0:
            yield Queued(service.table.resolve(self.request.model, cancel))
        else:
            use = "embed" if isinstance(self.request, EmbedRequest) else "generate"
            yield from service.load(self.request.model, use, cancel, self.request.engine)
        yield ChoiceEnd(0, "unload" if self._keep == 0 else "load")
        yield Usage(0, 0, 0, 0.0, 0.0)

    def times(self) -> dict[str, int]:
        """Durations in nanoseconds."""
        now = time.monotonic()
        return {"total_duration": int((now - self._began) * 1e9), "load_duration": int((self._ready - self._began) * 1e9)}


class Ollama(OllamaRoute):
    """Base of Ollama's two text routes."""

    streams = True

    def read(self, body: Mapping[str, Any]) -> GenerateRequest:
        think = body.get("think")
        args = {"enable_thinking": think} if isinstance(think, bool) else read_template_args({}, "think", think)
        return GenerateRequest(**self.common(body), sampling=ollama_sampling(body), template_args=args)

    def said(self, text: str, more: dict[str, Any]) -> dict[str, Any]:
        """Puts the model's words into this route's fields."""
        raise NotImplementedError

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        if isinstance(event, (Text, Thought)):
            yield self._document(Choice(event), [])
        elif isinstance(event, (CallBegan, ChoiceEnd)):  # a call goes out whole: when the next one begins, or at the end
            whole = len(self.choices[0].calls) - isinstance(event, CallBegan)
            if whole:
                yield self._document(Choice(), self._calls()[whole - 1 : whole])
        elif isinstance(event, Usage):
            yield self._document(Choice(), [], **self._end(event))

    def document(self) -> dict[str, Any]:
        assert self.usage
        return self._document(self.choices[0], self._calls(), **self._end(self.usage))

    def _document(self, choice: Choice, calls: list[dict[str, Any]], **end: Any) -> dict[str, Any]:
        logprobs = {"logprobs": shown_logprobs(choice.logprobs)} if choice.logprobs else {}
        more: dict[str, Any] = {"thinking": choice.said("thought"), "tool_calls": calls}
        said = self.said(choice.said(), {name: value for name, value in more.items() if value})
        return {"model": self.request.model, "created_at": rfc3339(time.time()), **said, "done": bool(end), **logprobs, **end}

    def _calls(self) -> list[dict[str, Any]]:
        """The calls with their arguments as objects."""
        return [
            {"id": call.call_id, "function": {"index": i, "name": call.name, "arguments": call.arguments()}}
            for i, call in enumerate(self.choices[0].calls)
        ]

    def _end(self, usage: Usage) -> dict[str, Any]:
        """The last document's reason, counts and durations."""
        reason = self.choices[0].finish_reason
        return {
            "done_reason": reason if reason in ("length", "load", "unload") else "stop", **self.times(),
            "prompt_eval_count": usage.prompt_tokens, "prompt_eval_cached_count": usage.cached_tokens,
            "prompt_eval_duration": int(usage.prompt_seconds * 1e9),
            "eval_count": usage.completion_tokens, "eval_duration": int(usage.decode_seconds * 1e9),
        }  # fmt: skip


class OllamaChat(Ollama):
    """`/api/chat`."""

    def read(self, body: Mapping[str, Any]) -> GenerateRequest:
        tools = [{"type": "function", **tool} for _, tool in listed("tools", given(body, "tools", []))]
        functions, builtins = read_tools({"tools": tools})
        return replace(super().read(body), messages=self._messages(body), tools=functions, builtins=builtins, split_markers=True)

    @staticmethod
    def _messages(body: Mapping[str, Any]) -> tuple[dict[str, Any], ...] | None:
        """The messages as templates want them. Calls have no ids in this API: results follow in the order of the calls."""
        read, count, called = [], itertools.count(), deque[str]()
        messages = listed("messages", given(body, "messages", []))
        newest = newest_turn([message for _, message in messages])
        for where, message in messages:
            calls = listed(f"{where}.tool_calls", given(message, "tool_calls", []))
            named = [{"id": f"call{next(count):05d}", **call} for _, call in calls]
            images = ollama_images(f"{where}.images", message, message is newest)
            text = with_note(flat_content(f"{where}.content", given(message, "content", "")), images)
            turn = {**message, "tool_calls": named, "content": text, "name": given(message, "tool_name", message.get("name"))}
            if message.get("role") == "tool" and message.get("tool_call_id") is None and called:
                turn["tool_call_id"] = called.popleft()
            read.append(turn)
            called.extend(str(call["id"]) for call in named)
        return read_messages({"messages": read or None})

    def said(self, text: str, more: dict[str, Any]) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, **more}}


class OllamaGenerate(Ollama):
    """`/api/generate` as Ollama has it: a prompt becomes a chat of one turn, unless it is raw or has a suffix."""

    def read(self, body: Mapping[str, Any]) -> GenerateRequest:
        request, prompt = super().read(body), optional(body, "prompt", a_string, "")
        system, suffix, raw = optional(body, "system", a_string), optional(body, "suffix", a_string), flag(body, "raw")
        ollama_images("images", body, newest=True)
        if optional(body, "template", a_string):
            raise InvalidRequest("template is not served: the model's own is used, or none with raw", "template")
        if optional(body, "context", one_type(list, "a list")):
            raise InvalidRequest("context is not served: send the conversation as messages to /api/chat", "context")
        if raw and system:
            raise InvalidRequest("system needs the model's template, which raw leaves out", "system")
        if suffix:
            return replace(request, infill=Infill(prompt, suffix))
        if raw or not prompt:
            return replace(request, prompts=(prompt,) if prompt else ())
        turns = ({"role": "system", "content": system},) if system else ()
        return replace(request, messages=(*turns, {"role": "user", "content": prompt}), split_markers=True)

    def said(self, text: str, more: dict[str, Any]) -> dict[str, Any]:
        return {"response": text, **more}


class OllamaEmbed(OllamaRoute, Embeddings):
    """`/api/embed`. What is too long is cut unless `truncate` is false; without an input the model is only loaded."""

    def read(self, body: Mapping[str, Any]) -> EmbedRequest:
        given = body.get("input")
        return EmbedRequest(
            **self.common(body),
            inputs=() if given in (None, "", []) else read_texts("input", given, MAX_INPUTS),
            dimensions=optional(body, "dimensions", whole(1)),
            truncate=flag(body, "truncate", True),
        )

    def document(self) -> dict[str, Any]:
        assert self.usage
        vectors = [numbers(row) for row in self.rows]
        return {"model": self.request.model, "embeddings": vectors, **self.times(), "prompt_eval_count": self.usage.prompt_tokens}


class OllamaEmbedding(OllamaEmbed):
    """`/api/embeddings`, its older form: one prompt, one vector."""

    def read(self, body: Mapping[str, Any]) -> EmbedRequest:
        return super().read({**body, "input": optional(body, "prompt", a_string)})

    def document(self) -> dict[str, Any]:
        return {"embedding": numbers(self.rows[0]) if self.rows else []}


class OllamaPull(Dialect):
    """`/api/pull`, of a hub's repositories: hf.co/OWNER/REPO:QUANT, as Ollama's users write it."""

    api = "ollama"
    EVENT_SECONDS = 0.1  # between documents about one file
    streams = True
    places = threading.BoundedSemaphore(MAX_PULLS)

    def read(self, body: Mapping[str, Any]) -> GenerateRequest:
        name = first_given(body, a_string, "model", "name") or ""
        wanted = repository(name)
        if wanted is None:
            raise InvalidRequest("model must name a repository of a Hugging Face hub: hf.co/OWNER/REPO:QUANT", "model")
        self._wanted, self._told = wanted, -math.inf
        return GenerateRequest(name)

    def events(self, service: Service, cancel: Cancellation) -> Iterator[Event]:
        if not service.allow_pull:
            raise Forbidden("This server fetches nothing for its clients unless it is started with --allow-pull")
        if not self.places.acquire(blocking=False):
            raise Overloaded(f"{MAX_PULLS} models are being fetched already, which is as many as may be at once")
        try:
            pull = Pull(cancel)
            plan = yield from pull.plan(self._wanted, "")
            yield Fetching("pulling manifest")
            yield from pull.run(plan)
        finally:
            self.places.release()
        service.table.models(0.0)
        yield Fetching("success")

    def documents(self, event: Event) -> Iterator[dict[str, Any]]:
        if not isinstance(event, Fetching) or not (self.stream or event.status == "success"):
            return
        now, whole = time.monotonic(), event.completed == event.total
        if whole or now - self._told >= self.EVENT_SECONDS:
            self._told = now
            file = {"digest": f"sha256:{event.digest}", "total": event.total, "completed": event.completed}
            yield {"status": event.status} | (file if event.total else {})


# What clients are told of models: Ollama's lists, the one list of `/v1/models`, llama-server's properties


@functools.lru_cache(maxsize=64)
def header_metadata(path: str, size: int, mtime_ns: int) -> Mapping[str, Any]:
    """A file's whole metadata, read once while it is unchanged; none if it cannot be read."""
    try:
        return read_gguf_header(path).metadata
    except (GgufError, OSError, struct.error, ValueError, TypeError, ArithmeticError, MemoryError):  # damage of any kind
        return {}


def model_metadata(info: ModelInfo) -> Mapping[str, Any]:
    """The metadata of the model's header: untrusted, but read within bounds."""
    try:
        found = os.stat(info.path)
    except OSError:
        return {}
    return header_metadata(info.path, found.st_size, found.st_mtime_ns)


def parameter_number(words: str | None) -> int | None:
    """1.5B as 1,500,000,000; None where the words are another way to count (8x7B)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", words or "")
    return int(float(found[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[found[2]]) if found else None


def worker_of(service: Service, info: ModelInfo) -> Worker | None:
    """The model as it is loaded, if it is."""
    return next((worker for worker in service.table.workers() if worker.info.id == info.id), None)


def context_of(service: Service, info: ModelInfo) -> int:
    """Tokens that a request to this model may have: as it is loaded, else as it would be where the memory is enough."""
    own = info.context_length or 8192
    worker = worker_of(service, info)
    return worker.loaded.ctx if worker else min(service.settings.engine.ctx or min(own, 8192), own)


def template_of(metadata: Mapping[str, Any]) -> str:
    """The chat template in a model file, "" without one."""
    return str(metadata.get("tokenizer.chat_template") or "")


def ollama_model(info: ModelInfo) -> dict[str, Any]:
    """A model in Ollama's lists, whose names have a tag. Its digest stands for the file as it is, without reading it."""
    import hashlib

    modified, name = 0, info.id if ":" in info.id else f"{info.id}:latest"
    with contextlib.suppress(OSError):
        modified = os.stat(info.path).st_mtime_ns
    told = f"{info.path}\0{info.size_bytes}\0{modified}".encode("utf-8", "surrogateescape")
    details = {"parent_model": "", "format": "gguf", "family": info.architecture, "families": [info.architecture],
               "parameter_size": info.parameter_count or "", "quantization_level": info.quantization or ""}  # fmt: skip
    return {"name": name, "model": name, "modified_at": rfc3339(modified / 1e9), "size": info.size_bytes,
            "digest": hashlib.sha256(told).hexdigest(), "details": details}  # fmt: skip


def ollama_show(service: Service, info: ModelInfo) -> dict[str, Any]:
    """The document of `/api/show`."""
    metadata, listed, count = model_metadata(info), ollama_model(info), parameter_number(info.parameter_count)
    told: dict[str, Any] = {k: v for k, v in metadata.items() if k != "tokenizer.chat_template"
            and (isinstance(v, (str, int)) or (isinstance(v, float) and math.isfinite(v)))}  # fmt: skip
    told |= {"general.architecture": info.architecture} | ({"general.parameter_count": count} if count else {})
    told.setdefault("general.basename", info.name)
    if info.context_length:
        told[f"{info.architecture}.context_length"] = info.context_length
    return {
        "modelfile": f"FROM {os.path.basename(info.path)}\n", "parameters": "", "template": template_of(metadata),
        "license": str(metadata.get("general.license") or ""), "modified_at": listed["modified_at"],
        "details": listed["details"], "model_info": told, "capabilities": capabilities(info, metadata, worker_of(service, info)),
    }  # fmt: skip


def capabilities(info: ModelInfo, metadata: Mapping[str, Any], worker: Worker | None) -> list[str]:
    """The model's abilities in Ollama's words, read from its header; only a loaded model is sure to fill gaps."""
    if info.embedding:
        return ["embedding"]
    template = template_of(metadata)
    fills = "tokenizer.ggml.fim_mid_token_id" in metadata or bool(worker and "mid" in worker.loaded.chat.fim)
    thinks = re.search(r"enable_thinking|reasoning_content|<think>|thinking", template) is not None
    can = {"completion": True, "tools": re.search(r"\btools\b", template) is not None, "thinking": thinks, "insert": fills}
    return [name for name, is_so in can.items() if is_so]


def listed_model(service: Service, info: ModelInfo) -> dict[str, Any]:
    """A model for every client at once: OpenAI's fields, Anthropic's, vLLM's and llama-server's."""
    context, began = context_of(service, info), int(service.started)
    return {
        "id": info.id, "object": "model", "created": began, "owned_by": "shimmy",
        "type": "model", "display_name": info.name, "created_at": rfc3339(began),
        "context_length": context, "max_model_len": context,
        "meta": {"n_ctx": context, "n_ctx_train": info.context_length, "n_params": parameter_number(info.parameter_count),
                 "size": info.size_bytes},
    }  # fmt: skip


def model_properties(service: Service, info: ModelInfo) -> dict[str, Any]:
    """llama-server's `/props`; nothing is loaded for it, and no directory is told."""
    worker, metadata = worker_of(service, info), model_metadata(info)
    tools = "tools" in capabilities(info, metadata, worker)
    caps = {"supports_system_role": True} | {f"supports_{what}": tools for what in ("tools", "tool_calls", "parallel_tool_calls")}
    return {
        "default_generation_settings": {"n_ctx": context_of(service, info)}, "total_slots": service.settings.engine.parallel,
        "model_alias": info.id, "model_path": os.path.basename(info.path), "chat_template": template_of(metadata),
        "chat_template_caps": caps,
        "modalities": {"vision": False, "audio": False}, "build_info": f"shimmy-{__version__}", "is_sleeping": worker is None,
    }  # fmt: skip


# llama-server's own API


def llama_error(error: ApiError) -> dict[str, Any]:
    """llama-server's errors have the status as their code."""
    kind = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 503: "unavailable_error"}
    told: dict[str, Any] = {"code": error.status, "message": str(error), "type": kind.get(error.status, error.kind)}
    if isinstance(error, ContextLengthExceeded):
        told["type"] = "exceed_context_size_error"
        told |= {"n_prompt_tokens": error.sizes[0], "n_ctx": error.sizes[1] + 1} if error.sizes else {}
    return {"error": told}


def picked(document: dict[str, Any], names: Seq[str]) -> dict[str, Any]:
    """Only these fields of a document, a/b for one inside another; what is not there is left out."""
    found = {}
    for name in names:
        value: Any = document
        for part in name.split("/"):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            found[name] = value
    return found


ERROR_SHAPES: dict[str, Callable[[ApiError], dict[str, Any]]] = {  # by API
    "shimmy": lambda error: error.document(), "openai": lambda error: error.document(openai=True), "anthropic": claude_error,
    "ollama": lambda error: {"error": str(error)}, "llama-server": llama_error,
}  # fmt: skip


class LlamaCompletion(Dialect):
    """`/completion`."""

    api = "llama-server"
    OFF: ClassVar = {  # what turns a sampler off that `samplers` does not name; their order is always llama.cpp's own
        "penalties": {"repeat_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}, "dry": {"dry_multiplier": 0},
        "top_n_sigma": {"top_n_sigma": -1}, "top_k": {"top_k": 0}, "typ_p": {"typical_p": 1}, "top_p": {"top_p": 1},
        "min_p": {"min_p": 0}, "xtc": {"xtc_probability": 0}, "temperature": {"temperature": 1, "dynatemp_range": 0},
    }  # fmt: skip

    def read(self, body: Mapping[str, Any]) -> GenerateRequest:
        self._broke = False
        self._seconds = optional(body, "t_max_predict_ms", number(-1, 1e9), 0.0) / 1000  # of writing, from a line's end on
        fields = optional(body, "response_fields", one_type(list, "a list"))
        self._fields = None if fields is None else [a_string("response_fields", f) for f in fields]
        self._limit, self._with_tokens = optional(body, "n_predict", whole(-2)), flag(body, "return_tokens")
        self._count, seed = optional(body, "n_probs", whole(0, 20), 0), optional(body, "seed", whole(), -1)
        optional(body, "n_cmpl", whole(1, 1))
        if flag(body, "post_sampling_probs"):
            raise InvalidRequest("post_sampling_probs: probabilities here are those before sampling", "post_sampling_probs")
        own: dict[str, Any] = {"seed": seed if seed >= 0 else None}
        if self._limit is not None:  # 0: the prompt is read into the cache; what comes of it is not shown
            own["max_tokens"] = -1 if self._limit < 0 else self._limit or 1
        if samplers := optional(body, "samplers", one_type(list, "a list")):
            own |= {field: value for name, off in self.OFF.items() if name not in samplers for field, value in off.items()}
        request = GenerateRequest(
            model=optional(body, "model", a_string, "default").strip() or "default",
            sampling=Sampling.from_json({**neutral(body), **own}, logprobs=self._count or (0 if self._with_tokens else None)),
        )
        return self.asked(body, request)

    def asked(self, body: Mapping[str, Any], request: GenerateRequest) -> GenerateRequest:
        """The request with its prompts."""
        if body.get("prompt") is None:
            raise InvalidRequest("prompt is required: a string, token ids, or a list of these", "prompt")
        return replace(request, prompts=read_texts("prompt", body["prompt"], MAX_TEXTS))

    def events(self, service: Service, cancel: Cancellation) -> Iterator[Event]:
        """The answer ends early when the client's time is over; an answer of no tokens has no text."""
        for event in super().events(service, cancel):
            self._broke = self._broke or (isinstance(event, Text) and "\n" in event.text)
            late = self._seconds and self.first and time.monotonic() - self.first > self._seconds
            if late and self._broke and not cancel.cancelled:
                cancel.cancel(gently=True)
            if self._limit != 0 or not isinstance(event, Text):
                yield event

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        if isinstance(event, Text):
            yield self._document(event.index, Choice(event)) | {"stop": False, "tokens_evaluated": self.prompt_tokens}
        elif isinstance(event, ChoiceEnd):
            yield self._end(event, Choice())

    def document(self) -> Any:
        """An object, or for several prompts a list of them."""
        ends = [self._end(choice.end, choice) for _, choice in sorted(self.choices.items()) if choice.end]
        return ends if len(self.request.prompts) > 1 else ends[0]

    def _document(self, index: int, choice: Choice) -> dict[str, Any]:
        shown = [self._probability(t) for t in choice.logprobs] if self._count else []
        tokens = [t.id for t in choice.logprobs] if self._with_tokens else []
        probabilities = {"completion_probabilities": shown} if shown else {}
        return {"index": index, "content": choice.said(), "tokens": tokens, "id_slot": -1, **probabilities}

    @staticmethod
    def _probability(token: TokenLogprob) -> dict[str, Any]:
        top = [{"id": id, **shown} for id, shown in zip(token.ids, map(shown_token, token.names, token.logprobs), strict=True)]
        return {"id": token.id, **shown_token(token.token, token.logprob), "top_logprobs": top}

    def _end(self, end: ChoiceEnd, choice: Choice) -> dict[str, Any]:
        assert end.usage
        usage, word = end.usage, end.stopped_by
        document = self._document(end.index, choice) | {
            "stop": True, "model": self.model, "tokens_predicted": 0 if self._limit == 0 else usage.completion_tokens,
            "tokens_evaluated": usage.prompt_tokens, "tokens_cached": usage.cached_tokens, "truncated": False,
            "stop_type": "word" if word else "eos" if end.finish_reason == "stop" else "limit", "stopping_word": word,
            "timings": usage.timings(),
        }  # fmt: skip
        return document if self._fields is None else picked(document, self._fields)


class LlamaInfill(LlamaCompletion):
    """`/infill`: what belongs between a prefix and a suffix; `prompt` goes on where the prefix stops."""

    def asked(self, body: Mapping[str, Any], request: GenerateRequest) -> GenerateRequest:
        prefix, suffix = (a_string(name, body.get(name)) for name in ("input_prefix", "input_suffix"))
        extra = [
            (a_string(f"{where}.filename", given(piece, "filename", "tmp")), a_string(f"{where}.text", piece.get("text")))
            for where, piece in listed("input_extra", given(body, "input_extra", []))
        ]
        return replace(request, infill=Infill(prefix + optional(body, "prompt", a_string, ""), suffix, tuple(extra)))


# ── 15.1. Connections ─────────────────────────────────────────────────────────────────────────────────────────────────
# Who may call, what comes in, and whether the client is still there.


class ClientGone(Exception):
    """The client has left, or is too slow: there is nobody to answer."""


@dataclass(frozen=True)
class Access:
    """Who may call: checked for every request and every WebSocket upgrade before anything runs."""

    loopback: bool = True  # bound to loopback: Host must be a loopback name
    api_keys: tuple[str, ...] = ()  # any of them opens; none: no key is asked for
    private: bool = False  # clients with different keys share no cached prompts
    origins: tuple[str, ...] = ()  # allowed besides loopback and desktop apps; "*" is any
    hosts: tuple[str, ...] = ()  # allowed Host names besides loopback; "*" is any

    APP_SCHEMES: ClassVar = ("app", "tauri", "vscode-webview", "vscode-file", "capacitor", "electron", "obsidian")

    def check(self, headers: Any, keyless: bool) -> None:
        """Raises Forbidden for a foreign Host or Origin, Unauthorized without the key where one is set."""
        host, origin = headers.get("Host"), headers.get("Origin")
        if host is not None and not self._host_allowed(host):
            raise Forbidden(f"Host '{host[:100]}' is no name of this machine; --allow-host opens more")
        if origin is not None and not self.origin_allowed(origin, host or ""):
            raise Forbidden(f"Origin '{origin[:100]}' is not allowed; --allow-origin opens more")
        if origin is None and self._embedded(headers):
            raise Forbidden("A foreign page may not embed what this server answers")
        if self.api_keys and not keyless and self._key(headers) is None:
            raise Unauthorized("Send the key as 'Authorization: Bearer KEY' or 'x-api-key: KEY'")

    def _host_allowed(self, host: str) -> bool:
        """Refuses names that a page's owner can point at this machine (DNS rebinding); where a key is asked of everybody on
        the network, that gains nothing. Names without a dot are of containers and the local network."""
        name = host_name(host)
        if name is None or is_loopback(name) or {"*", name, host} & set(self.hosts):
            return name is not None
        own = socket.gethostname().lower()
        ours = "." not in name or is_ip(name) or name in (own, f"{own.partition('.')[0]}.local")
        return not self.loopback and (bool(self.api_keys) or ours)

    def _embedded(self, headers: Any) -> bool:
        """True for an image, frame or script of a foreign page: browsers send no Origin with those."""
        follows_link = headers.get("Sec-Fetch-Mode") == "navigate" and headers.get("Sec-Fetch-Dest") == "document"
        return headers.get("Sec-Fetch-Site") == "cross-site" and not follows_link and "*" not in self.origins

    def origin_allowed(self, origin: str, host: str) -> bool:
        """Loopback pages on any port, desktop apps, pages this server itself serves, and what was opened."""
        if "*" in self.origins or origin in self.origins:
            return True
        scheme, separator, place = origin.partition("://")
        if scheme in ("http", "https"):
            name = host_name(place)
            return name is not None and (is_loopback(name) or (not self.loopback and place.lower() == host.lower()))
        return bool(separator) and scheme in self.APP_SCHEMES and APP_PLACE.fullmatch(place) is not None

    def owner(self, headers: Any) -> str:
        """Whom the request's cached prompts belong to: everybody, or the key's number where keys are kept apart."""
        return str(self._key(headers)) if self.private and self.api_keys else ""

    def _key(self, headers: Any) -> int | None:
        """The number of the key that fits, compared in constant time; None: none does."""
        import hmac

        scheme, _, bearer = (headers.get("Authorization") or "").partition(" ")
        given = [bearer.strip()] if scheme.lower() == "bearer" else []
        sent = [g.encode("latin-1", "replace") for g in (*given, headers.get("x-api-key") or "")]
        fits = [[hmac.compare_digest(given, key.encode()) for given in sent] for key in self.api_keys]
        return next((number for number, found in enumerate(fits) if any(found)), None)


APP_PLACE = re.compile(r"[\w.~-]*(?::\d{1,5})?", re.ASCII)  # app://obsidian.md, and Electron's app://.
HOST = re.compile(r"([\w-]+(?:\.[\w-]+)*|\[[0-9a-f:.]+\])(?::(\d{1,5}))?", re.ASCII | re.I)


def host_name(host: str) -> str | None:
    """The lower-case name in HOST[:PORT], as a Host header and an Origin have it; None for anything else.

    Strict, because a lenient parser finds "127.0.0.1" in "127.0.0.1:80.evil.example".
    """
    found = HOST.fullmatch(host)
    return found[1].strip("[]").lower() if found and int(found[2] or 0) < 65536 else None


def is_ip(host: str) -> bool:
    """True for an IP address."""
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    return False


def is_loopback(host: str) -> bool:
    """True if a name or address stands for this machine alone."""
    host = host.strip("[]").lower()
    if is_ip(host):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")


TOKEN = re.compile(rb"[!#$%&'*+.^_`|~\w-]+")  # a header's name (RFC 9110, 5.6.2)
HEAD_FAULT = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)|\n[ \t]")  # the last one: a folded line (RFC 9112, 5.2)
MAX_HEADERS = 100
MAX_AHEAD = 1 << 16  # bytes that a client may send before its request is answered


class Incoming(io.RawIOBase):
    """A connection's bytes. A read ends by `deadline` (monotonic seconds), and raises ClientGone there and at the end of file.

    What the client sends while its request runs is read ahead by the watcher, which so sees it leave.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.deadline = connection, math.inf
        self._ahead = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._ahead:
            data, self._ahead = self._ahead[: len(buffer)], self._ahead[len(buffer) :]
            buffer[: len(data)] = data
            return len(data)
        try:
            self.connection.settimeout(max(self.deadline - time.monotonic(), 0.001))
            size = self.connection.recv_into(buffer)
        except OSError:  # a timeout too
            raise ClientGone from None
        if not size:
            raise ClientGone
        return size

    def read_ahead(self) -> tuple[bool, bool]:
        """Reads what is there: (the client has left, no more is read ahead). An end of file is an end, as in Go's net/http."""
        try:
            data = self.connection.recv(MAX_AHEAD)
        except OSError:
            return True, True
        self._ahead += data
        return not data, not data or len(self._ahead) >= MAX_AHEAD


class Headers:
    """A request's header fields, by name in any letter case."""

    def __init__(self, fields: Iterable[tuple[str, str]] = ()) -> None:
        self._values: dict[str, list[str]] = {}
        for name, value in fields:
            self._values.setdefault(name.lower(), []).append(value)

    def get_all(self, name: str) -> list[str]:
        return self._values.get(name.lower(), [])

    def get(self, name: str, default: Any = None) -> Any:
        return next(iter(self.get_all(name)), default)


LARGE_BODIES = threading.BoundedSemaphore(8)


class BodyTurn:
    """A body's turn among LARGE_BODIES, from when TURN_BYTES of it have come until it is parsed."""

    def __init__(self) -> None:
        self._taken = False

    def take(self, seconds: float = TURN_SECONDS) -> None:
        """Raises Overloaded when none is free within `seconds`. Idempotent, as `release` is."""
        self._taken = self._taken or LARGE_BODIES.acquire(timeout=seconds)
        if not self._taken:
            raise Overloaded("Too many large bodies are being read already")

    def release(self) -> None:
        taken, self._taken = self._taken, False
        if taken:
            LARGE_BODIES.release()


class RequestReader:
    """Reads requests: every size is bounded. `turn` is a large body's; who parses the body releases it."""

    def __init__(self, connection: socket.socket) -> None:
        self.incoming, self.turn = Incoming(connection), BodyTurn()
        self._bytes = io.BufferedReader(self.incoming)

    def begin(self) -> None:
        """Waits for a request's first byte, then starts its clock. Empty lines before it are fine (RFC 9112, 2.2)."""
        self.incoming.deadline = time.monotonic() + IDLE_SECONDS
        while self._bytes.peek(1)[:1] in (b"\r", b"\n"):
            self._bytes.read(1)
        self.incoming.deadline = time.monotonic() + REQUEST_SECONDS

    def head(self) -> tuple[str, Headers]:
        """The request line and the headers. Raises InvalidRequest (400, 414, 431): too large, or malformed lines."""
        head = bytearray()
        while not head.endswith((b"\n\r\n", b"\n\n")):
            head += self._bytes.readline(MAX_HEAD + 1 - len(head))
            if len(head) > MAX_HEAD:
                what, status = ("headers are", 431) if b"\n" in head else ("request line is", 414)
                raise InvalidRequest(f"The {what} over {MAX_HEAD} bytes", status=status)
        if HEAD_FAULT.search(head):
            raise InvalidRequest("The request's head holds a control character, a CR without LF or a folded line")
        line, _, headers = bytes(head).partition(b"\n")
        fields = [field.partition(b":") for field in headers.rstrip(b"\r\n").split(b"\n")] if headers.strip() else []
        if not all(colon and TOKEN.fullmatch(name) for name, colon, _ in fields):
            raise InvalidRequest("A header line is malformed")
        if len(fields) > MAX_HEADERS:
            raise InvalidRequest(f"A request may have up to {MAX_HEADERS} headers", status=431)
        named = ((name.decode("latin-1"), value.strip(b" \t\r").decode("latin-1")) for name, _, value in fields)
        return line.decode("latin-1"), Headers(named)

    def body(self, size: int) -> bytes:
        """A body of `size` bytes; -1: in chunks. Raises Overloaded when too many large ones arrive at once."""
        body = bytearray()
        if size < 0:
            self._read_chunks(body)
        else:
            self._read_into(body, size)
        return bytes(body)

    def _read_into(self, body: bytearray, size: int) -> None:
        """A place is taken when so much has come, so that a body that is announced and never sent keeps nobody waiting."""
        end = len(body) + size
        while len(body) < end:
            if len(body) >= TURN_BYTES:
                self.turn.take()
            body += self._bytes.read(min(end - len(body), TURN_BYTES))

    def _read_chunks(self, body: bytearray) -> None:
        """RFC 9112, 7.1; trailers are read and dropped."""
        while size := self._chunk_size():
            if len(body) + size > MAX_BODY:
                raise PayloadTooLarge(f"Bodies may have up to {MAX_BODY} bytes")
            self._read_into(body, size)
            if self._line():
                raise InvalidRequest("A chunk is longer than its size")
        for _ in range(100):
            if not self._line():
                return
        raise InvalidRequest("Too many trailers")

    def _chunk_size(self) -> int:
        text = self._line().partition(b";")[0].rstrip(b" \t")
        if not re.fullmatch(rb"[0-9a-fA-F]{1,15}", text):
            raise InvalidRequest("A chunk's size is malformed")
        return int(text, 16)

    def _line(self) -> bytes:
        line = self._bytes.readline(1026)
        if not line.endswith(b"\r\n"):
            raise InvalidRequest("A line between chunks is too long, or does not end with CR and LF")
        return line[:-2]

    def unread(self) -> bytes:
        """Takes the bytes that were read behind the request."""
        data, self.incoming.deadline = b"", 0.0
        with contextlib.suppress(ClientGone):
            while len(data) < TURN_BYTES and (more := self._bytes.read1(MAX_AHEAD)):
                data += more
        return data

    def drain(self) -> None:
        """Reads on for a moment before closing: to close over unread bytes would destroy the answer on its way (RST)."""
        self.incoming.deadline = time.monotonic() + 2.0
        with contextlib.suppress(OSError, ClientGone):
            self.incoming.connection.shutdown(socket.SHUT_WR)
            for _ in range(2048):
                self._bytes.read1(1 << 16)


def uncompressed(data: bytes, encoding: str) -> bytes:
    """A body without its Content-Encoding, within the bounds of any other. Raises InvalidRequest (400, 415), PayloadTooLarge."""
    if encoding in ("", "identity"):
        return data
    windows = {"gzip": 31, "x-gzip": 31, "deflate": 15 if data[:1] == b"\x78" else -15}  # deflate: zlib's form, or bare
    if encoding not in windows:
        raise InvalidRequest(f"Content-Encoding {encoding[:40]} is not served: send gzip, deflate or none", status=415)
    stream = zlib.decompressobj(windows[encoding])
    try:
        plain = stream.decompress(data, MAX_BODY + 1)
    except zlib.error as error:
        raise InvalidRequest(f"The body is not {encoding}: {error}") from None
    if len(plain) > MAX_BODY:
        raise PayloadTooLarge(f"The body has over {MAX_BODY} bytes when it is unpacked")
    if not stream.eof or stream.unused_data:
        raise InvalidRequest(f"The body is not one whole {encoding} stream")
    return plain


WATCH_SECONDS = 0.01  # less than a step takes


class Watcher:
    """Notices clients that leave while their request runs: one thread looks at the sockets of all running requests."""

    def __init__(self) -> None:
        self._selector, self._changed = selectors.DefaultSelector(), threading.Condition()
        self._started = False

    @contextlib.contextmanager
    def watching(self, incoming: Incoming, cancel: Cancellation) -> Iterator[None]:
        """Cancels when the client leaves. Nobody else may read the connection while the block runs."""
        with self._changed:
            if not self._started:
                threading.Thread(target=self._run, name="watcher", daemon=True).start()
                self._started = True
            self._selector.register(incoming.connection, selectors.EVENT_READ, (incoming, cancel))
            self._changed.notify()
        try:
            yield
        finally:
            with self._changed, contextlib.suppress(KeyError, ValueError, OSError):
                self._selector.unregister(incoming.connection)

    def _run(self) -> None:
        """Asks under the lock, where no socket comes or goes; to read from one of which another has the number would wait."""
        while True:
            with self._changed:
                self._changed.wait_for(self._selector.get_map)
                left = list(self._left())
            for cancel in left:
                cancel.cancel()
            time.sleep(WATCH_SECONDS)

    def _left(self) -> Iterator[Cancellation]:
        for key, _ in self._selector.select(0):
            incoming, cancel = key.data
            gone, done = incoming.read_ahead()
            if done:
                self._selector.unregister(incoming.connection)
            if gone:
                yield cancel


# ── 15.2. Wires ───────────────────────────────────────────────────────────────────────────────────────────────────────
# How documents become bytes, and the one loop between an answer's events and the client.


def to_json(document: Any) -> bytes:
    """JSON as UTF-8; what cannot be encoded becomes a question mark."""
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")


@dataclass(frozen=True)
class Framing:
    """Turns a stream into bytes: each document, the mark at the end, a sign of life."""

    content_type: str
    encode: Callable[[dict[str, Any]], bytes]
    done: bytes = b""
    pulse: bytes = b": waiting\n\n"


EVENTS = "text/event-stream; charset=utf-8"  # WHATWG HTML, 9.2
SSE = Framing(EVENTS, lambda d: b"data: %b\n\n" % to_json(d), b"data: [DONE]\n\n")
PLAIN_SSE = Framing(EVENTS, SSE.encode)  # llama-server's last document says that it is
NAMED_SSE = Framing(EVENTS, lambda d: b"event: %b\ndata: %b\n\n" % (d["type"].encode(), to_json(d)))  # Messages, Responses
NDJSON = Framing("application/x-ndjson", lambda d: to_json(d) + b"\n", pulse=b" ")  # to Ollama's clients a space is nothing


class Wire:
    """Carries a dialect's documents to one client. From `begin` on errors are documents too."""

    begun = False

    def begin(self) -> None:
        """The request is queued: what fails from now on may be told inside the answer."""

    def send(self, document: dict[str, Any]) -> None:
        """One document."""
        raise NotImplementedError

    def idle(self, document: dict[str, Any] | None) -> None:
        """A sign of life, so that no client or proxy gives up; a document, where the dialect's clients count nothing else."""

    def end(self) -> None:
        """The answer is complete."""


def deliver(dialect: Dialect, events: Iterator[Event], wire: Wire) -> None:
    """The one way from events to a client, whichever door it came through. What the events raise passes."""
    signs = 0
    with contextlib.closing(events):  # type: ignore[type-var]
        for event in events:
            if isinstance(event, Waiting):
                signs += 1
            if isinstance(event, (Queued, Fetching)) or signs == HEAD_SIGNS:
                wire.begin()
            if isinstance(event, Waiting) and wire.begun:
                wire.idle(dialect.idle())
            for document in dialect.documents(event):
                wire.send(document)
    wire.end()


# One request, through any door


ID_HEADERS = ("X-Request-Id", "request-id")  # where OpenAI's clients look for it, and Anthropic's
SANE_ID = re.compile(r"[!-~]{1,128}")  # what may go into headers and logs as it came


def request_id(sent: str | None) -> str:
    """The client's own id for its request, else a new one."""
    return sent if sent and SANE_ID.fullmatch(sent) else os.urandom(8).hex()


class RequestLog:
    """One request's line in the log: what it was, how it ended, how long it took; never its text or key."""

    def __init__(self, what: str = "", id: str | None = None) -> None:
        self.what, self.id, self.status, self._began = what, request_id(id), 0, time.monotonic()
        self.dialect: Dialect | None = None

    def write(self) -> None:
        milliseconds = (time.monotonic() - self._began) * 1000
        tokens = ""
        if self.dialect and self.dialect.usage:
            usage = self.dialect.usage
            first = self.dialect.first and self.dialect.first - self._began
            tokens = f" {printable(self.dialect.model)} {usage.words(first)}"
        log.info("%s %s %.0f ms%s, id %s", printable(self.what), self.status, milliseconds, tokens, self.id)


def run_request(
    work: Callable[[], None], line: RequestLog, fail: Callable[[ApiError], None], leave: Callable[[], None]
) -> None:
    """Runs a request: the one place where errors become answers, and where requests are logged.

    `fail` tells the client about an error; `leave` is for a request that is off: its client has left, or cancelled it.
    """
    try:
        work()
    except ApiError as error:
        line.status = error.status
        if error.status == 500:
            log.error("%s failed, id %s: %s", printable(line.what), line.id, printable(str(error)))
        fail(error)
    except (Cancelled, ClientGone):
        leave()
    except Exception:
        log.exception("%s failed, id %s", printable(line.what), line.id)
        line.status = 500
        fail(ApiError("See the server's log"))
    line.write()


# ── 15.3. Routes ──────────────────────────────────────────────────────────────────────────────────────────────────────
# What each path answers: a function of the call, or a dialect. One row a route.


@dataclass(frozen=True)
class Answer:
    """A whole answer: a document, or bytes of another kind."""

    document: Any
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        return self.document if isinstance(self.document, bytes) else to_json(self.document) + b"\n"


@dataclass(frozen=True)
class Call:
    """All that a route's function sees of a request."""

    service: Service
    names: tuple[str, ...]  # in the path
    query: Mapping[str, str]
    body: bytes
    cancel: Cancellation
    accept: str = ""  # kinds of answer that the client reads: a browser begins with text/html


def answer_health(call: Call) -> dict[str, Any]:
    """The server's state; llama-server's older clients read the counts of slots."""
    workers = call.service.table.workers()
    running, places = sum(w.counts()[0] for w in workers), sum(w.loaded.parallel for w in workers)
    return call.service.health() | {"slots_idle": places - running, "slots_processing": running}


def answer_discover(call: Call) -> dict[str, Any]:
    """Rescans the disk and lists what is there."""
    models = call.service.table.models(0.0)
    return {"discovered": len(models), "models": models}


def answer_load(call: Call) -> Answer:
    """200 with the status once the model is loaded; with `?wait=false` 202 at once. The body may hold a preset's keys."""
    wait = SWITCHES.get(call.query.get("wait", "").lower(), True)
    asked = load_options(parse_object(call.body)) if call.body.strip() else {}
    status = call.service.table.load(call.names[0], wait, call.cancel, asked)
    return Answer(status, 200 if wait or status["loaded"] else 202)


def answer_unload(call: Call) -> dict[str, Any]:
    """200 with the status once the model's memory is free; `?force=true` ends what runs."""
    force = SWITCHES.get(call.query.get("force", "").lower(), False)
    return call.service.table.unload(call.names[0], force, call.cancel)


def answer_upgrade(call: Call) -> NoReturn:
    """426: Handler gives proper upgrades to SocketListener."""
    raise InvalidRequest("This address speaks WebSocket (version 13): connect with ws://", status=426)


def answer_openai_models(call: Call) -> dict[str, Any]:
    """The same models for every client that reads a list: beside OpenAI's `data` Anthropic's page, which is the only one."""
    data = [listed_model(call.service, info) for info in call.service.table.infos()]
    page = {"has_more": False, "first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {"object": "list", "data": data, **page, **({"models": []} if "client_version" in call.query else {})}


# Ollama's and llama-server's routes that generate nothing


def answer_ps(call: Call) -> dict[str, Any]:
    """The loaded models with their expiry. No expiry is sent as a far-future date."""
    models = []
    for r in call.service.table.workers():
        left = call.service.table.left(r.info.id)
        expires = time.time() + (9.2e9 if left is None else left)
        models.append({k: v for k, v in ollama_model(r.info).items() if k != "modified_at"} | {
            "size": r.memory_bytes() + r.loaded.gpu_bytes, "size_vram": r.loaded.gpu_bytes, "expires_at": rfc3339(expires),
            "context_length": r.loaded.ctx,
        })  # fmt: skip
    return {"models": models}


def answer_show(call: Call) -> dict[str, Any]:
    """One model in detail; older clients call the field `name`."""
    name = first_given(parse_object(call.body), a_string, "model", "name")
    if name is None:
        raise InvalidRequest("model is required: the name of a model, or default", "model")
    return ollama_show(call.service, call.service.table.info(name, call.cancel))


def answer_slots(call: Call) -> list[dict[str, Any]]:
    """The places for sequences of each loaded model, and which are taken: nothing of what is written there."""
    wanted = call.query.get("model")
    id = None if wanted is None else call.service.table.info(wanted, call.cancel).id
    places = [(r, i) for r in call.service.table.workers() if id in (None, r.info.id) for i in range(r.loaded.parallel)]
    slots = [
        {"id": n, "id_task": -1, "n_ctx": r.loaded.ctx, "speculative": False, "model": r.info.id,
         "is_processing": i < r.counts()[0]}
        for n, (r, i) in enumerate(places)
    ]
    if call.query.get("fail_on_no_slot") and slots and all(slot["is_processing"] for slot in slots):
        raise Overloaded("No slot is free")  # where nothing is loaded, the next request loads
    return slots


def answer_tokenize(call: Call) -> dict[str, Any]:
    """A text's tokens, with `with_pieces` also what they stand for: a string, or bytes where that is no whole character."""
    body = parse_object(call.body)
    content, pieces = a_string("content", body.get("content")), flag(body, "with_pieces")
    check_length("content", content, MAX_TOKENIZED)
    job = Tokenize(content, flag(body, "add_special"), flag(body, "parse_special", True), pieces)
    tokens = call.service.tokenize(optional(body, "model", a_string, "default"), job, call.cancel)
    named = zip(tokens.ids, tokens.pieces, strict=False)
    return {"tokens": [{"id": id, "piece": text_or_bytes(p)} for id, p in named] if pieces else list(tokens.ids)}


def text_or_bytes(piece: bytes) -> str | list[int]:
    """A token's text; its bytes as numbers where they are no whole characters, as llama-server has it."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


def answer_detokenize(call: Call) -> dict[str, Any]:
    """The text that tokens stand for, special ones by their names."""
    body = parse_object(call.body)
    ids: Any = body.get("tokens")
    if ids != [] and not is_ids(ids):
        raise InvalidRequest(f"tokens must be a list of token ids, not {_said(ids)}", "tokens")
    check_length("tokens", ids, MAX_TOKENIZED // 4)
    job = Tokenize(tuple(ids), pieces=True)
    tokens = call.service.tokenize(optional(body, "model", a_string, "default"), job, call.cancel)
    return {"content": b"".join(tokens.pieces).decode("utf-8", "replace")}


def answer_root(call: Call) -> Answer:
    """The chat page for browsers. Others learn who is here; Claude Code asks with HEAD before anything else."""
    if "text/html" in call.accept:
        return Answer(PAGE.encode(), headers=page_headers())
    return Answer({"server": "shimmy", "version": __version__})


Answering = Callable[[Call], Any]  # an Answer, or the document of one


@dataclass(frozen=True)
class Route:
    """One row of the route table; `{}` in the path stands for a model or tool name."""

    method: str
    path: tuple[str, ...]
    answer: Answering | type[Dialect]  # a dialect generates
    keyless: bool = False
    needs_body: bool = False
    api: str = "shimmy"  # whose shape an error takes
    framing: Framing = SSE  # of a dialect's streams
    ollamas: Route | None = None  # the row for bodies and User-Agents of Ollama's at this address

    def match(self, segments: Seq[str]) -> tuple[str, ...] | None:
        """The names in the path, or None."""
        pairs = list(zip(self.path, segments, strict=False))
        if len(segments) != len(self.path) or any(part not in ("{}", segment) for part, segment in pairs):
            return None
        return tuple(segment for part, segment in pairs if part == "{}")

    def label(self) -> str:
        """The path as the metrics show it."""
        return "/" + "/".join(self.path).replace("{}", "{name}")


def _route(row: str, answer: Answering | type[Dialect], **marks: Any) -> Iterator[Route]:
    method, path = row.split()
    if isinstance(answer, type):
        assert issubclass(answer, Dialect)
        marks = {"needs_body": True, "api": answer.api} | marks
    segments = tuple(filter(None, path.split("/")))
    yield Route(method, segments, answer, **marks)
    if segments[:1] == ("v1",):  # OpenAI's routes work without /v1 too
        yield Route(method, segments[1:], answer, **marks)


PROMETHEUS = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
_OLLAMA_GENERATE = Route("POST", ("api", "generate"), OllamaGenerate, needs_body=True, api="ollama", framing=NDJSON)
ROUTES = (
    *_route("GET /", answer_root, keyless=True),
    *_route("GET /health", answer_health, keyless=True),
    *_route("GET /api/health", answer_health, keyless=True),
    *_route("GET /diag", lambda call: call.service.diag()),
    *_route("GET /metrics", lambda call: Answer(metrics_text(call.service), headers=PROMETHEUS)),
    *_route("POST /api/generate", Native, ollamas=_OLLAMA_GENERATE),
    *_route("GET /api/models", lambda call: call.service.models()),
    *_route("POST /api/models/discover", answer_discover),
    *_route("POST /api/models/{}/load", answer_load),
    *_route("POST /api/models/{}/unload", answer_unload),
    *_route("GET /api/models/{}/status", lambda call: call.service.table.status(call.names[0])),
    *_route("GET /api/tools", lambda call: {"tools": call.service.tools.documents()}),
    *_route("POST /api/tools/{}/execute", needs_body=True, answer=lambda call: call.service.tools.execute(
        call.names[0], parse_json(call.body or b"{}"), call.cancel)),
    *_route("GET /ws/generate", answer_upgrade),
    *_route("POST /v1/chat/completions", ChatCompletion),
    *_route("POST /v1/completions", Completion),
    *_route("POST /v1/embeddings", Embeddings),
    *_route("POST /v1/rerank", Rerank),
    *_route("POST /v1/reranking", Rerank),
    *_route("POST /v1/messages", Messages, framing=NAMED_SSE),
    *_route("POST /v1/messages/count_tokens", needs_body=True, api="anthropic", answer=lambda call: {
        "input_tokens": call.service.count_tokens(Messages(parse_object(call.body)).request, call.cancel)}),
    *_route("POST /v1/responses", Responses, framing=NAMED_SSE),
    *_route("GET /v1/models", answer_openai_models, api="openai"),
    *_route("GET /v1/models/{}", api="openai", answer=lambda call: listed_model(
        call.service, call.service.table.info(call.names[0], call.cancel))),
    *_route("GET /api/version", lambda call: {"version": OLLAMA_VERSION}, api="ollama"),  # clients compare it
    *_route("GET /api/tags", lambda call: {"models": list(map(ollama_model, call.service.table.infos()))}, api="ollama"),
    *_route("GET /api/ps", answer_ps, api="ollama"),
    *_route("POST /api/show", answer_show, needs_body=True, api="ollama"),
    *_route("POST /api/pull", OllamaPull, framing=NDJSON),
    *_route("POST /api/chat", OllamaChat, framing=NDJSON),
    *_route("POST /api/embed", OllamaEmbed),
    *_route("POST /api/embeddings", OllamaEmbedding),
    *_route("POST /completion", LlamaCompletion, framing=PLAIN_SSE),
    *_route("POST /infill", LlamaInfill, framing=PLAIN_SSE),
    *_route("POST /tokenize", answer_tokenize, needs_body=True, api="llama-server"),
    *_route("POST /detokenize", answer_detokenize, needs_body=True, api="llama-server"),
    *_route("POST /apply-template", needs_body=True, api="llama-server", answer=lambda call: {
        "prompt": call.service.render(ChatCompletion(parse_object(call.body)).request, call.cancel)}),
    *_route("GET /props", api="llama-server", answer=lambda call: model_properties(
        call.service, call.service.table.info(call.query.get("model", "default"), call.cancel))),
    *_route("GET /slots", answer_slots, api="llama-server"),
    *_route("GET /v1/health", lambda call: answer_health(call) | {"status": "ok"}, api="llama-server", keyless=True),
)  # fmt: skip


# ── 15.4. HTTP ────────────────────────────────────────────────────────────────────────────────────────────────────────
# A request's head, the responder that writes its answer, the handler between them, the server. One thread a connection.


class Head:
    """A request's line and headers, checked; before they are read, those of no request."""

    method, path, version = "", "", "HTTP/1.1"
    segments: Seq[str] = ()  # of the path
    query: Mapping[str, str] = {}
    length: int | None = None  # of the body; -1: in chunks
    closes = False  # the client wants the connection to end

    def __init__(self, headers: Headers) -> None:
        self.headers = headers

    def read(self, line: str) -> None:
        """Reads the request line, and what the headers say of the request. Raises InvalidRequest."""
        words = line.split()
        if len(words) != 3 or not re.fullmatch(r"HTTP/1\.[0-9]", words[2]):
            raise InvalidRequest("The request line must be METHOD ADDRESS HTTP/1.1")
        self.method, self.path, self.version = words[0], re.sub(r"^//+", "/", words[1]), min(words[2], "HTTP/1.1")
        options = {option.strip() for option in self.headers.get("Connection", "").lower().split(",")}
        self.closes = "close" in options or (self.version == "HTTP/1.0" and "keep-alive" not in options)
        for name in ("Host", "Transfer-Encoding", "Origin", "Authorization"):
            if len(self.headers.get_all(name)) > 1:
                raise InvalidRequest(f"The header {name} is repeated, where one is allowed")
        try:
            target = urllib.parse.urlsplit(self.path)
        except ValueError:
            raise InvalidRequest("The request's address is malformed") from None
        host = self.headers.get("Host", "").lower()
        if target.scheme and (target.netloc.lower() != host or target.scheme not in ("http", "https")):
            raise InvalidRequest("The request's address and its Host header name different hosts")  # RFC 9112, 3.2.2
        self.query = dict(urllib.parse.parse_qsl(target.query))
        self.segments = [urllib.parse.unquote(s) for s in target.path.split("/") if s]
        self._read_length()

    def _read_length(self) -> None:
        """Reads the body's length (RFC 9112, 6.3)."""
        lengths, encoding = self.headers.get_all("Content-Length"), self.headers.get("Transfer-Encoding")
        if encoding is not None and lengths:
            raise InvalidRequest("A request with both Content-Length and Transfer-Encoding is refused")
        if encoding is not None and (encoding.lower() != "chunked" or self.version == "HTTP/1.0"):
            raise InvalidRequest("Transfer-Encoding must be chunked, in HTTP/1.1")  # RFC 9112, 6.1
        if len(set(lengths)) > 1 or not all(re.fullmatch(r"[0-9]{1,15}", n) for n in lengths):
            raise InvalidRequest("Content-Length must be one whole number")
        self.length = int(lengths[0]) if lengths else None if encoding is None else -1

    def is_handshake(self) -> bool:
        """True for what RFC 6455, 4.2.1 wants of a client that asks for a WebSocket."""
        names = ("Upgrade", "Connection", "Sec-WebSocket-Version", "Sec-WebSocket-Key")
        upgrade, connection, version, key = (self.headers.get(name, "") for name in names)
        return (self.method == "GET" and self.version == "HTTP/1.1" and not self.length and version == "13"
                and upgrade.lower() == "websocket" and "upgrade" in connection.lower()
                and re.fullmatch(r"[A-Za-z0-9+/]{22}==", key) is not None)  # fmt: skip


class Responder(Wire):
    """Writes the answer to one request: a document with its status, or a stream of documents in a Framing."""

    framing: Framing | None = None  # a stream's

    def __init__(self, connection: socket.socket, access: Access) -> None:
        self._connection, self._access = connection, access
        self.head = Head(Headers())
        self.line = RequestLog()  # its id is the client's as soon as the head is read
        self.unread = True  # the request, or its body: what follows it is no request, so the connection closes
        self.closes = self._chunked = False

    def respond(self, answer: Answer) -> None:
        """Sends a whole answer."""
        body = answer.body()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **answer.headers}
        self.write_head(answer.status, headers, b"" if self.head.method == "HEAD" else body)

    def begin(self) -> None:
        """Sends the head of a stream."""
        if self.framing and not self.begun:
            self.begun, self._chunked = True, self.head.version == "HTTP/1.1"
            self.closes = self.closes or not self._chunked
            encoding = {"Transfer-Encoding": "chunked"} if self._chunked else {}
            self.write_head(200, {"Content-Type": self.framing.content_type, "Cache-Control": "no-cache",
                                  "X-Accel-Buffering": "no", **encoding})  # fmt: skip

    def send(self, document: dict[str, Any]) -> None:
        if self.framing:
            self._write_piece(self.framing.encode(document))
        else:
            self.respond(Answer(document))

    def idle(self, document: dict[str, Any] | None) -> None:
        if self.framing:
            self._write_piece(self.framing.encode(document) if document else self.framing.pulse)

    def end(self) -> None:
        if self.framing:
            self._write_piece(self.framing.done, last=True)

    def fail(self, error: ApiError, document: dict[str, Any]) -> None:
        """Sends the error, in its dialect's shape, as the answer or as the end of it."""
        if self.framing and self.begun:
            self._write_piece(self.framing.encode(document), last=True)
        else:
            self.respond(Answer(document, error.status, error.headers))

    def _write_piece(self, data: bytes, last: bool = False) -> None:
        """Sends a piece of a stream, and the end of the stream behind the last one."""
        if self._chunked:
            data = (b"%x\r\n%b\r\n" % (len(data), data) if data else b"") + (b"0\r\n\r\n" if last else b"")
        self.write(data)

    def write(self, data: bytes) -> None:
        """Writes it all. Raises ClientGone when the client takes nothing for WRITE_SECONDS: slow ones may read on."""
        left = memoryview(data)
        self._connection.settimeout(WRITE_SECONDS)
        try:
            while left:
                left = left[self._connection.send(left) :]
        except OSError:
            raise ClientGone from None

    def allowed_origin(self) -> str | None:
        """The request's Origin, if its page may read the answer."""
        origin = self.head.headers.get("Origin")
        allowed = origin is not None and self._access.origin_allowed(origin, self.head.headers.get("Host", ""))
        return origin if allowed else None

    def write_head(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        """Sends a head, and the body that there is already, in one write."""
        origin = self.allowed_origin()
        if origin is not None:
            vary = ", ".join(filter(None, (headers.get("Vary"), "Origin")))
            headers = {**headers, "Access-Control-Allow-Origin": origin, "Vary": vary,
                       "Access-Control-Expose-Headers": ", ".join(ID_HEADERS)}  # fmt: skip
        self.closes = self.closes or self.unread
        headers = {**headers, "Connection": "close"} if self.closes else headers
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
        lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}", f"Server: shimmy/{__version__}", f"Date: {date}"]
        lines += [f"{name}: {self.line.id}" for name in ID_HEADERS]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.line.status = status
        self.write("\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + body)


class Handler(socketserver.BaseRequestHandler):
    """One connection, in its own thread: requests one after another, each read, checked, and answered by its row of ROUTES."""

    server: Server

    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self.service, self.reader, self.upgraded = self.server.service, RequestReader(self.request), False

    def handle(self) -> None:
        closes = False
        with contextlib.suppress(ClientGone):
            while not closes:
                self.reader.begin()
                closes = self._handle_request()
            if self.upgraded:
                owner = self.server.access.owner(self.out.head.headers)
                self.server.sockets.serve(self.request, self.reader.unread(), self.out.line.id, owner)

    def _handle_request(self) -> bool:
        """Answers one request; true if the connection ends behind it."""
        self.out = Responder(self.request, self.server.access)
        self.route: Route | None = None
        try:
            run_request(self._answer_request, self.out.line, self.fail, self.leave)
        finally:
            self.reader.turn.release()
        known, route = ("GET", "HEAD", "POST", "OPTIONS"), self.route.label() if self.route else "other"
        method = self.out.head.method if self.out.head.method in known else "other"  # a client's words are without number
        self.service.metrics.answered(method, route, self._api(), self.out.line.status)
        if self.out.closes and self.out.unread:
            self.reader.drain()
        return self.out.closes

    def _answer_request(self) -> None:
        out = self.out
        line, headers = self.reader.head()
        out.line.id = request_id(headers.get("X-Request-Id") or out.line.id)
        head = out.head = Head(headers)
        head.read(line)
        out.closes, out.unread = head.closes, bool(head.length)
        out.line.what = f"{head.method} {head.path.partition('?')[0]}"
        cancel = Cancellation()
        with self.server.running(cancel):
            self._answer(head, cancel)

    def _body(self) -> bytes:
        """The request's body, at most MAX_BODY bytes; read even if unasked for, or it would become the next request."""
        head = self.out.head
        size, encoding = head.length or 0, head.headers.get("Content-Encoding", "").lower()
        if size > MAX_BODY:
            raise PayloadTooLarge(f"The body has {size} bytes, up to {MAX_BODY} are read")
        if size and head.headers.get("Expect", "").lower() == "100-continue":
            self.out.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        data = self.reader.body(size)
        self.out.unread = False
        if data and encoding:
            self.reader.turn.take()  # for whatever size it has unpacked
        return uncompressed(data, encoding) if data else data

    def _answer(self, head: Head, cancel: Cancellation) -> None:
        if self.server.stopping:
            self.out.closes = True
            raise Overloaded("The server is shutting down")
        if head.method == "OPTIONS":
            self.server.access.check({"Host": head.headers.get("Host", "")}, keyless=True)
            return self._preflight(head)
        self.route, names = self._find_route(head)
        if self.route.needs_body and head.length is None:
            self.out.unread = True  # whatever follows is no request
            raise InvalidRequest("The request needs a Content-Length, or a chunked body", status=411)
        answer, watching = self.route.answer, self.server.watcher.watching(self.reader.incoming, cancel)
        if isinstance(answer, type):
            dialect = self.out.line.dialect = self._dialect(parse_object(self._body()))  # nobody keeps the bytes while it runs
            self.reader.turn.release()
            self.out.framing = self.route.framing if dialect.stream else None
            dialect.owner = self.server.access.owner(head.headers)
            with watching:
                deliver(dialect, dialect.events(self.service, cancel), self.out)
        elif answer is answer_upgrade and head.is_handshake():
            self._upgrade(head)
        else:
            call = Call(self.service, names, head.query, self._body(), cancel, head.headers.get("Accept", ""))
            with watching:
                told = answer(call)
                self.out.respond(told if isinstance(told, Answer) else Answer(told))

    def _dialect(self, body: Mapping[str, Any]) -> Dialect:
        """The request, in the API that the body speaks: from here on errors take its shape."""
        assert self.route
        if self.route.ollamas and speaks_ollama(body, self.out.head.headers.get("User-Agent", "")):
            self.route = self.route.ollamas
        assert isinstance(self.route.answer, type)
        return self.route.answer(body)

    def _find_route(self, head: Head) -> tuple[Route, tuple[str, ...]]:
        """The row for this request, and the names in its path; the access checks come before any answer."""
        matching = [(r, names) for r in ROUTES if (names := r.match(head.segments)) is not None]
        if matching and head.headers.get("Host") is None and head.version == "HTTP/1.1":
            raise InvalidRequest("The Host header is missing")
        method = "GET" if head.method == "HEAD" else head.method
        found = next((pair for pair in matching if pair[0].method == method), matching[0] if matching else None)
        self.route = found[0] if found else None
        self.server.access.check(head.headers, self.route is not None and self.route.keyless)
        if found is None:
            raise NotFound(f"No route matches /{'/'.join(head.segments)[:200]}")
        if found[0].method != method:
            allowed = {r.method for r, _ in matching}
            raise MethodNotAllowed(head.method, allowed | ({"HEAD"} if "GET" in allowed else set()) | {"OPTIONS"})
        return found

    def _upgrade(self, head: Head) -> None:
        """Answers the handshake: the connection speaks HTTP no more."""
        import hashlib

        key = head.headers.get("Sec-WebSocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 4.2.2
        accept = base64.b64encode(hashlib.sha1(key.encode(), usedforsecurity=False).digest()).decode()
        self.out.closes = False  # whatever the client said of its connection besides
        self.out.write_head(101, {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Accept": accept})
        self.out.closes = self.upgraded = True

    def _preflight(self, head: Head) -> None:
        """CORS: what a page of an allowed origin may send. Needs no key."""
        methods = sorted({r.method for r in ROUTES if r.match(head.segments) is not None} | {"OPTIONS"})
        headers = {"Allow": ", ".join(methods)}
        if self.out.allowed_origin():
            asked = head.headers.get("Access-Control-Request-Headers") or "authorization, content-type"
            headers |= {"Access-Control-Allow-Methods": ", ".join(methods), "Access-Control-Max-Age": "600",
                        "Access-Control-Allow-Headers": re.sub(r"[^\w\-, ]", "", asked)}  # fmt: skip
        self.out.respond(Answer(b"", headers=headers))

    # For run_request

    def fail(self, error: ApiError) -> None:
        """Tells the error as the whole answer, or as the last events of a stream that has begun."""
        dialect = self.out.line.dialect
        with contextlib.suppress(ClientGone):
            if dialect and error.code in dialect.streamed_errors:
                self.out.begin()
            *others, last = dialect.failure(error) if dialect and self.out.begun else [ERROR_SHAPES[self._api()](error)]
            for document in others:
                self.out.send(document)
            self.out.fail(error, last)

    def leave(self) -> None:
        """The connection ends without an answer."""
        self.out.closes = True

    def _api(self) -> str:
        """The API in whose shape an error is told."""
        first, second, *_ = (*self.out.head.segments, "", "")
        if self.route:
            return self.route.api
        return "openai" if first == "v1" else "ollama" if first == "api" and second in OLLAMA_UNSERVED else "shimmy"


RESERVED_DESCRIPTORS = 160  # for what is open at the start, pipes of engines (3 each), model files, sockets of tools


def raise_descriptor_limit() -> int:
    """Raises the soft limit of open descriptors as far as it may go and helps; how many there may be then."""
    limit = 10_240  # macOS says "unlimited" and takes no more than this
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows counts none
        import resource

        soft, hard = (limit if n == resource.RLIM_INFINITY else n for n in resource.getrlimit(resource.RLIMIT_NOFILE))
        limit = soft
        if soft < hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            limit = hard
    return limit


class Server(socketserver.ThreadingTCPServer):
    """The listening socket and what its connections share. `stop` is the end: ordered and idempotent."""

    daemon_threads = True
    request_queue_size = 1024  # bursts wait in the kernel, not in retransmissions
    allow_reuse_address = os.name == "posix"

    def __init__(self, address: tuple[str, int], service: Service, access: Access) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.service, self.access = service, access
        descriptors = raise_descriptor_limit()
        self.max_connections = min(MAX_CONNECTIONS, max(descriptors // 10, descriptors - RESERVED_DESCRIPTORS))
        self.watcher, self.sockets = Watcher(), SocketListener(self)
        self.stopping = False
        self._changed = threading.Condition()
        self._running: set[Cancellation] = set()
        super().__init__(address, Handler)

    @property
    def url(self) -> str:
        return url_of(str(self.server_address[0]), self.server_address[1])

    def count_connection(self, change: int) -> None:
        with self._changed:
            self.service.metrics.connections += change

    def get_request(self) -> tuple[Any, Any]:
        """Accepts a connection. Where it cannot (no descriptor is left), it waits a moment: at once it would be asked again."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(0.05)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts the connection's thread, or answers 503 where it would be one too many."""
        if self.service.metrics.connections >= self.max_connections:
            return self._refuse(request, f"{self.max_connections} connections are open")
        self.count_connection(1)
        self.service.metrics.accepted += 1
        try:
            super().process_request(request, client_address)
        except (RuntimeError, MemoryError):  # can't start new thread
            self.count_connection(-1)
            self._refuse(request, "No thread can be started for another connection")

    def _refuse(self, connection: socket.socket, why: str) -> None:
        """503. To close over a request that is on its way would destroy the answer (RST): so it is awaited for a moment."""
        self.service.metrics.refused += 1
        error = Overloaded(why)
        with contextlib.closing(connection), contextlib.suppress(OSError, ClientGone):
            Responder(connection, self.access).respond(Answer(error.document(), error.status, error.headers))
            connection.settimeout(0.1)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1 << 16)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.count_connection(-1)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("connection failed", exc_info=True)

    @contextlib.contextmanager
    def running(self, cancel: Cancellation) -> Iterator[None]:
        """`stop` waits for a request that runs, and calls it off when the grace time is over."""
        with self._changed:
            self._running.add(cancel)
        try:
            yield
        finally:
            with self._changed:
                self._running.discard(cancel)
                self._changed.notify_all()

    def stop(self, grace: float = GRACE_SECONDS) -> None:
        """Stop accepting, let requests finish within `grace` seconds, call the rest off, end the engines."""
        if self.stopping:
            return
        self.stopping = True
        self.shutdown()
        self.server_close()
        self.service.table.close(engines=False)
        self._await_quiet(grace)
        for worker in self.service.table.workers():
            worker.fail_all(Overloaded("The server is shutting down"))
        for cancel in () if self._await_quiet(1.0) else list(self._running):
            cancel.cancel()
        self.sockets.stop()
        self.service.close()

    def _await_quiet(self, seconds: float) -> bool:
        """Waits until no request runs; false if one still does after so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, seconds)


# ── 16. WebSocket, lifecycle ──────────────────────────────────────────────────────────────────────────────────────────
# asyncio on its side thread, started by the first upgrade, reads and writes; a connection's HTTP thread answers its requests.

MAX_UNTAKEN = MIB  # bytes of answers to pings that a client does not take
SOCKET_PING_SECONDS = 20.0  # a client that has not been heard for two of these is gone
SOCKET_IDLE_SECONDS = 3600.0  # without a request
SOCKET_CLOSE_SECONDS = 10.0  # for a client to end its side too


@dataclass
class SocketRequest:
    """A request on a WebSocket: its message until that is parsed, and the way to cancel it."""

    message: bytes
    turn: BodyTurn
    cancel: Cancellation = field(default_factory=Cancellation)

    def body(self) -> dict[str, Any]:
        """The parsed message, which is kept no longer."""
        try:
            return parse_object(self.message, "The message")
        finally:
            self.message = b""
            self.turn.release()

    def is_cancel(self) -> bool:
        """True for `{"cancel": true}`, which is no request but ends one."""
        with contextlib.suppress(InvalidRequest):
            return len(self.message) <= 256 and parse_object(self.message).get("cancel") is True
        return False


class SocketConnection(Wire):
    """One WebSocket, around websockets' parser. The loop's thread reads and flushes, another one answers."""

    PENDING = 32  # requests that may wait on one connection
    reading: asyncio.Task[None]

    def __init__(self, server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, id: str, owner: str) -> None:
        import asyncio

        from websockets.protocol import SERVER, Protocol

        self._server, self._reader, self._writer, self._id, self._owner = server, reader, writer, id, owner
        self._loop = asyncio.get_running_loop()
        self._protocol = Protocol(SERVER, max_size=MAX_BODY, logger=logging.getLogger("websockets"))
        self._requests: deque[SocketRequest] = deque()  # the first one is running
        self._queue: queue.SimpleQueue[SocketRequest | None] = queue.SimpleQueue()  # the same; None: the connection has ended
        self._fragments, self._turn = bytearray(), BodyTurn()  # of the message that arrives
        self._since: float | None = None  # when its first byte came
        self._used = time.monotonic()

    async def read_all(self, data: bytes) -> None:
        """Reads to the connection's end, beginning with what came already. The requests end with it."""
        try:
            self._take(data)
            while data := await self._read():
                self._take(data)
        except OSError:  # the client broke off
            pass
        finally:
            self._turn.release()
            self._writer.close()
            self._queue.put(None)
            self._loop.call_later(SOCKET_CLOSE_SECONDS, self._writer.transport.abort)
            for request in list(self._requests):
                self._cancel(request)

    async def _read(self) -> bytes:
        """The next bytes; none when the client has left, or answers no ping."""
        import asyncio

        for pinged in itertools.chain([False], itertools.repeat(True)):
            if not self._requests and time.monotonic() - self._used > SOCKET_IDLE_SECONDS:
                self.close(1000, f"no request for {SOCKET_IDLE_SECONDS:g} seconds")
            with contextlib.suppress(asyncio.TimeoutError):
                return await asyncio.wait_for(self._reader.read(1 << 16), SOCKET_PING_SECONDS)
            if pinged and not self._writer.transport.get_write_buffer_size():
                break
            if self._protocol.state.name == "OPEN":
                self._protocol.send_ping(b"")
                self._flush()
        return b""

    def _take(self, data: bytes) -> None:
        """Feeds the parser, which itself answers pings, and ends the connection behind a frame that is malformed."""
        self._protocol.receive_data(data)
        frame: Any
        for frame in self._protocol.events_received():
            if frame.opcode.name not in ("TEXT", "BINARY", "CONT") or self._protocol.state.name != "OPEN":
                continue
            self._fragments += frame.data
            if frame.fin:
                request = SocketRequest(bytes(self._fragments), self._turn)
                self._fragments, self._turn, self._since = bytearray(), BodyTurn(), None
                self._receive(request)
        self._bound(len(self._fragments) + len(self._protocol.reader.buffer))
        self._flush()
        if self._writer.transport.get_write_buffer_size() > MAX_UNTAKEN:
            self._writer.transport.abort()

    def _bound(self, size: int) -> None:
        """Bounds a message that is not whole: its time from its first byte on, and how many large ones there are."""
        now = time.monotonic()
        self._since = (self._since or now) if size else None
        if self._since and now - self._since > REQUEST_SECONDS:
            self.close(1008, f"a message took over {REQUEST_SECONDS:g} seconds")
        if size > TURN_BYTES:
            try:
                self._turn.take(0)
            except Overloaded:
                self.close(1013, "too many large messages arrive already")

    def _receive(self, request: SocketRequest) -> None:
        """Queues a request, or cancels the running one."""
        waiting = len(self._requests)
        if request.is_cancel():
            with contextlib.suppress(IndexError):
                self._cancel(self._requests[0], gently=True)
        elif self._server.stopping or waiting >= self.PENDING:
            request.turn.release()
            full = f"{waiting} requests wait on this connection already"
            error = Overloaded("The server is shutting down" if self._server.stopping else full)
            self._protocol.send_text(to_json(ERROR_SHAPES["shimmy"](error)))
        else:
            self._requests.append(request)
            self._queue.put(request)

    def _cancel(self, request: SocketRequest, gently: bool = False) -> None:
        """In a thread: telling the engine may block on its pipe, which must not stop the loop."""
        self._loop.run_in_executor(None, request.cancel.cancel, gently)

    def answer_all(self) -> None:
        """Answers the requests one after another, until the connection ends."""
        while request := self._queue.get():
            try:
                if not self._writer.is_closing():  # else the client has left
                    self._answer(request)
            except Exception:  # a thread's border: the requests behind this one hold turns
                log.exception("a WebSocket's request could not be answered")
                self._loop.call_soon_threadsafe(self._writer.transport.abort)
            request.turn.release()
            self._requests.popleft()
            self._used = time.monotonic()

    def _answer(self, request: SocketRequest) -> None:
        line = RequestLog("WS /ws/generate", self._id)

        def work() -> None:
            dialect = line.dialect = NativeSocket(request.body() | {"stream": True})
            dialect.owner, line.status = self._owner, 200
            deliver(dialect, dialect.events(self._server.service, request.cancel), self)

        with self._server.running(request.cancel):
            run_request(work, line, self.fail, self.leave)
            self._server.service.metrics.answered("WS", "/ws/generate", NativeSocket.api, line.status)

    # The wire, used by a request's thread

    def fail(self, error: ApiError, document: dict[str, Any] | None = None) -> None:
        with contextlib.suppress(ClientGone):
            self.send(document or ERROR_SHAPES["shimmy"](error))

    def leave(self) -> None:
        with contextlib.suppress(ClientGone):
            self.send(NativeSocket.done("cancelled", Usage(0, 0, 0, 0, 0)))

    def send(self, document: dict[str, Any]) -> None:
        """Waits until the document is sent. Raises ClientGone when the client takes none for WRITE_SECONDS."""
        import asyncio
        from concurrent.futures import CancelledError
        from concurrent.futures import TimeoutError as Late

        sending = self._send(document)
        try:
            asyncio.run_coroutine_threadsafe(sending, self._loop).result(WRITE_SECONDS)
        except (Late, CancelledError, OSError):
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._writer.transport.abort)  # which ends _send
            raise ClientGone from None
        except RuntimeError:  # the loop has ended
            sending.close()
            raise ClientGone from None

    async def _send(self, document: dict[str, Any]) -> None:
        if self._protocol.state.name != "OPEN" or self._writer.is_closing():
            raise ClientGone
        self._protocol.send_text(to_json(document))
        self._flush()
        await self._writer.drain()

    def _flush(self) -> None:
        for data in self._protocol.data_to_send():
            if data:
                self._writer.write(data)
            else:  # what still comes is dropped: to close over it would destroy what was sent (RST)
                self._writer.write_eof()
                self._loop.call_later(SOCKET_CLOSE_SECONDS, self._writer.transport.abort)

    def close(self, code: int, reason: str, seconds: float = SOCKET_CLOSE_SECONDS) -> None:
        """Ends the connection as RFC 6455, 7 has it, at the latest after so many seconds."""
        if self._protocol.state.name == "OPEN":
            self._protocol.send_close(code, reason)
            self._flush()
            self._loop.call_later(seconds, self._writer.transport.abort)


class SocketListener:
    """Serves `/ws/generate`: asyncio in one side thread."""

    _loop: asyncio.AbstractEventLoop
    _stopped: asyncio.Event

    def __init__(self, server: Server) -> None:
        self._server = server
        self._lock, self._ready = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="websocket", daemon=True)
        self._connections: set[SocketConnection] = set()

    def serve(self, connection: socket.socket, early: bytes, id: str, owner: str) -> None:
        """Serves a connection whose handshake has been answered, to its end; `early` came behind the handshake."""
        import asyncio

        with self._lock:
            if not self._ready.is_set():
                self._thread.start()
                self._ready.wait()
        taken = socket.socket(fileno=connection.detach())
        taken.setblocking(False)
        served = asyncio.run_coroutine_threadsafe(self._open(taken, early, id, owner), self._loop).result()
        served.answer_all()
        self._connections.discard(served)

    async def _open(self, taken: socket.socket, early: bytes, id: str, owner: str) -> SocketConnection:
        import asyncio

        served = SocketConnection(self._server, *await asyncio.open_connection(sock=taken), id, owner)
        self._connections.add(served)
        served.reading = asyncio.create_task(served.read_all(early))
        return served

    def _run(self) -> None:
        import asyncio

        logging.getLogger("websockets").setLevel(logging.CRITICAL)  # requests are logged here
        asyncio.run(self._main())

    async def _main(self) -> None:
        import asyncio

        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        await self._stopped.wait()
        for connection in list(self._connections):
            connection.close(1001, "the server is shutting down", 0.3)  # its threads end with it
        await asyncio.sleep(0.5)

    def stop(self) -> None:
        """Closes the connections and ends the loop."""
        if self._ready.is_set():
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join(1.0)


# ── 17.1. Command line ────────────────────────────────────────────────────────────────────────────────────────────────
# The flags, and what they mean.

DEFAULT_PORT = 11435
SUGGESTED = "Qwen/Qwen2.5-1.5B-Instruct-GGUF"  # a first real model: small, open (Apache 2.0), good on any laptop


class UsageError(Exception):
    """The command line asks for something impossible: exit 2."""


class Arguments(argparse.ArgumentParser):
    """argparse that says what is wrong first, in one line, instead of twelve lines of usage; no flag may be abbreviated."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\ntry: {self.prog} --help\n")


def duration(words: str) -> float:
    """Seconds from 90, 90s, 5m or 2h; -1 stays -1."""
    found = re.fullmatch(r"(-?\d+(?:\.\d+)?)(s|m|h|d)?", words)
    if not found:
        raise argparse.ArgumentTypeError(f"{words!r} is no duration; write 90, 90s, 5m or 2h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2] or "s"]


def count(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most`, or on."""

    def check(words: str) -> int:
        if not re.fullmatch(r"-?\d{1,18}", words) or not least <= int(words) <= (most or int(words)):
            raise argparse.ArgumentTypeError(f"{words!r} is no whole number from {least} {f'to {most}' if most else 'on'}")
        return int(words)

    return check


ENGINE_BOUNDS = {"ctx": (1, 1 << 24), "parallel": (1, 200), "kv_pool": (1, 1 << 26), "threads": (1, 1024), "batch": (1, 65536),
                 "n_cpu_moe": (0, 4096), "main_gpu": (0, 64)}  # fmt: skip


def alias(words: str) -> tuple[str, str]:
    """PATTERN=MODEL as a pair."""
    pattern, equals, model = words.partition("=")
    if not (pattern and equals and model):
        raise argparse.ArgumentTypeError(f"{words!r} is no alias; write PATTERN=MODEL")
    return pattern, model


HELP = {  # by command: its arguments, what it does, and what stands at the end of its --help
    "": ("COMMAND ...", """\
Serves the GGUF models on this machine to the clients of OpenAI, Anthropic, Ollama and llama-server, and to shell pipes.
A tiny model comes with it, so everything works at once.""", f"""\
examples:
  python shimmy.py serve
  python shimmy.py generate --prompt "Who are you?"
  python shimmy.py pull {SUGGESTED}

The environment may stand for flags: SHIMMY_BASE_GGUF for --model,
SHIMMY_MODEL_PATHS for --models-dir, SHIMMY_BIND_ADDRESS for --bind,
SHIMMY_PORT, SHIMMY_API_KEY, and SHIMMY_MAX_CTX for --ctx.
COMMAND --help tells more."""),
    "serve": ("", """\
Starts the server. Models load when the first request names them. Prints its address on stdout, and on stderr what it found
and what it does; -v adds a line for each request.""", f"""\
examples:
  python shimmy.py serve --port 8080 --preload
  python shimmy.py serve --model {SUGGESTED}:Q4_K_M
  python shimmy.py serve --alias 'gpt-*=default' --alias 'claude-*=default'
  SHIMMY_API_KEY=secret python shimmy.py serve --bind 0.0.0.0"""),
    "generate": ("[MODEL] [PROMPT]", """\
Streams a model's answer to standard output. A running server does the work if it knows the model, else the model is loaded
for this command. --chat without a prompt is a conversation at the terminal.""", """\
examples:
  python shimmy.py generate --prompt "Which port do you use?"
  git diff | python shimmy.py generate --prompt "Summarise:" --stdin
  printf 'cat\\ndog\\n' | python shimmy.py generate --lines --prompt "In French:"
  python shimmy.py generate --chat"""),
    "pull": ("NAME", """\
Fetches a model into the Hugging Face cache, where this and other programs find it, or from an address into ~/models (or the
first --models-dir). Goes on where an earlier pull stopped, and checks what came. Without a quantization it takes Q4_K_M, or
what is nearest. Prints where the model lies.""", f"""\
examples:
  python shimmy.py pull {SUGGESTED}
  python shimmy.py pull {SUGGESTED}:Q8_0
  python shimmy.py pull https://example.com/model.gguf

environment:
  HF_ENDPOINT    the hub (default: {HUB})
  HF_TOKEN       for private and gated repositories
  HF_HUB_CACHE   where to (default: ~/.cache/huggingface/hub)"""),
    "list": ("", """\
Lists the models on this machine, and whether each fits the memory that is free: yes, no, or with how much context. -v tells
what was skipped, and why.""", ""),
    "probe": ("[MODEL]", """\
Loads a model for real and generates, to tell how much memory it takes and how fast it is.""", """\
examples:
  python shimmy.py probe
  python shimmy.py probe --threads 4 --json"""),
    "diag": ("", """\
Shows what a report of a problem should contain: versions, engine, memory, where models were looked for, and whether a server
answers.""", ""),
    "completion": ("{bash,zsh,fish}", """\
Prints a script that makes `shimmy` a command of your shell (unless it has one), and completes commands, flags and names of
models for it.""", """\
examples:
  source <(python shimmy.py completion bash)
  python shimmy.py completion fish | source"""),
}


class HelpFormat(argparse.HelpFormatter):
    """Wraps the description, and leaves the examples behind the options as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if ":\n  " in text else super()._fill_text(text, width, indent)


def help_of(command: str) -> dict[str, Any]:
    """A command's help, as argparse takes it."""
    arguments, description, epilog = HELP[command]
    usage = f"%(prog)s [options] {arguments}".rstrip()
    return {"usage": usage, "description": description, "epilog": epilog, "formatter_class": HelpFormat}


def parser() -> Arguments:
    """The whole command line. Global options work before and after the command."""
    top = Arguments(prog="shimmy", **help_of(""))
    top.add_argument("-V", "--version", action="version", version=f"shimmy {__version__}")
    top.add_argument("-v", "--verbose", action="store_true", help="log to stderr")
    shared = Arguments(add_help=False)
    shared.add_argument("-V", "--version", action="version", version=f"shimmy {__version__}", help=argparse.SUPPRESS)
    shared.add_argument("-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="log to stderr")
    shared.add_argument("--models-dir", action="append", default=[], metavar="DIR", help="also look for models here (repeatable)")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", title="commands", prog=top.prog)

    def command(name: str, help: str, run: Callable[[argparse.Namespace], int]) -> Arguments:
        sub = commands.add_parser(name, parents=[shared], help=help, **help_of(name))
        sub.set_defaults(run=run, parser=sub)
        return sub

    _serve_flags(command("serve", "start the server", command_serve))
    _generate_flags(command("generate", "generate text from a prompt", command_generate))
    pull = command("pull", "fetch a model from a Hugging Face hub", command_pull)
    pull.add_argument("name", metavar="NAME", help="OWNER/REPO, OWNER/REPO:Q4_K_M, OWNER/REPO:FILE.gguf or the address of a file")
    pull.add_argument("--dry-run", action="store_true", help="only show what would be fetched, and whether it fits the memory")
    listing = command("list", "list the models on this machine", command_list)
    listing.add_argument("--short", action="store_true", help="names only")
    listing.add_argument("--json", action="store_true", help="as JSON")
    probe = command("probe", "load a model, generate, and say how fast", command_probe)
    _model_arguments(probe)
    probe.add_argument("--json", action="store_true", help="as JSON")
    _engine_flags(probe)
    diag = command("diag", "show versions, memory, search directories and whether a server runs", command_diag)
    diag.add_argument("--json", action="store_true", help="as JSON")
    _address_flags(diag)
    completion = command("completion", "print a script that completes commands and flags in a shell", command_completion)
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    return top


def parse(argv: Seq[str] | None) -> argparse.Namespace:
    """The checked command line. A wrong one exits with 2, `--help` and `--version` with 0."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    if args.command is None:
        top.print_help(sys.stderr)
        top.exit(2)
    if args.command == "generate" and len(rest) == 1 and not rest[0].startswith("-") and args.text is None:
        args.text = rest.pop()  # argparse before 3.13 gives up on a second positional behind an option
    if rest:
        args.parser.error(f"unrecognized arguments: {' '.join(map(printable, rest))}")
    if getattr(args, "named", None) is not None:  # --model: what stands in MODEL's place is the prompt
        if (args.model if args.command == "probe" else args.text) is not None:
            raise UsageError("the model is named twice: by MODEL and by --model")
        args.model, args.text = args.named, args.model
    return args


def _model_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", nargs="?", metavar="MODEL", help="name or path (default: the default model)")
    sub.add_argument("--model", dest="named", metavar="NAME|PATH", help="the same as a flag, as `serve` has it")


def _address_flags(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("address")
    group.add_argument("--bind", metavar="HOST[:PORT]", help="address (default: 127.0.0.1:11435)")
    group.add_argument("--port", type=count(0, 65535), metavar="N", help="port; wins over the one in --bind; 0 picks one")


def _engine_flags(sub: argparse.ArgumentParser) -> None:
    """One flag for each field of EngineOptions."""
    group = sub.add_argument_group("engine")
    for f in fields(EngineOptions):
        flag, more = "--" + f.name.replace("_", "-"), dict[str, Any](f.metadata)
        if f.default not in (None, True, ()):
            more["help"] += f" (default: {f.default})"
        if f.default is True:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, **more)
        elif f.default == ():
            group.add_argument(flag, action="append", default=None, **more)
        else:
            if f.name in ENGINE_BOUNDS:
                more |= {"type": count(*ENGINE_BOUNDS[f.name]), "metavar": "N"}
            group.add_argument(flag, default=None, **more)


def _serve_flags(sub: argparse.ArgumentParser) -> None:
    _address_flags(sub)
    add = sub.add_argument_group("models").add_argument
    add("--model", metavar="NAME|PATH", help="what `default` means; OWNER/REPO[:QUANT] is fetched first")
    add("--preload", action="store_true", help="load the default model at once")
    add("--alias", action="append", type=alias, default=[], metavar="PATTERN=MODEL", help="names that mean a model")
    add("--preset", metavar="FILE.ini", help="settings of single models: a section a model, its keys are flags")
    add("--max-loaded", type=count(1), default=3, metavar="N", help="models in memory at once (default: 3)")
    add("--keep-alive", type=duration, default=-1, metavar="5m", help="unload models idle for so long; 0: at once, "
        "-1: never (default)")  # fmt: skip
    add("--max-queue", type=count(0), default=512, metavar="N", help="requests that may wait (default: 512)")
    add("--open", action="store_true", help="open the chat page in a browser")
    add = sub.add_argument_group("access").add_argument
    add("--api-key", action="append", default=[], metavar="KEY", help="ask every client for this key, or one of "
        "several (repeatable)")  # fmt: skip
    add("--private-prompts", action="store_true", help="let clients with different keys share no cached prompts")
    add("--insecure", action="store_true", help="allow a bind beyond loopback without a key")
    add("--allow-origin", action="append", default=[], metavar="ORIGIN", help="web pages that may call (repeatable)")
    add("--allow-host", action="append", default=[], metavar="HOST", help="Host names to accept (repeatable)")
    add("--allow-pull", action="store_true", help="let clients have models fetched from the hub (/api/pull)")
    add = sub.add_argument_group("tools").add_argument
    add("--tools", action="append", default=[], metavar="FILE.py", help="load more tools (repeatable)")
    add("--tool-root", metavar="DIR", help="let file_read read below this directory")
    add("--tool-hosts", default="", metavar="HOST,…", help="let http_get reach these hosts, by commas; * is any")
    _engine_flags(sub)


def _generate_flags(sub: argparse.ArgumentParser) -> None:
    _model_arguments(sub)
    sub.add_argument("text", nargs="?", metavar="PROMPT", help="the prompt, like --prompt")
    sub.add_argument("--prompt", metavar="TEXT", help="the prompt; without it, or with -, standard input is")
    sub.add_argument("--stdin", action="store_true", help="append standard input to the prompt")
    how = sub.add_mutually_exclusive_group()
    how.add_argument("--chat", action="store_true", help="apply the chat template (default where the model has one)")
    how.add_argument("--raw", action="store_true", help="continue the prompt as it is, and add no newline at the end")
    sub.add_argument("--json", action="store_true", help="print one /api/generate document")
    sub.add_argument("--lines", action="store_true", help="each line of standard input is a prompt (behind --prompt, if given); "
                     "several run at once, and one line of JSON each is printed in order")  # fmt: skip
    sub.add_argument("--schema", metavar="FILE", help="answer with JSON that fits this JSON schema")
    sub.add_argument("--tool", action="append", default=[], metavar="NAME", help="a built-in tool that a chat may use, such as "
                     "calculator (repeatable)")  # fmt: skip
    sub.add_argument("--local", action="store_true", help="never ask a running server")
    _address_flags(sub)
    _sampling_flags(sub)
    _engine_flags(sub)


def _sampling_flags(sub: argparse.ArgumentParser) -> None:
    """One flag for each parameter of Sampling that has a line of help."""
    group = sub.add_argument_group("sampling")
    for f in fields(Sampling):
        if f.metadata.get("help"):
            flag, help = "--" + f.name.replace("_", "-"), f.metadata["help"]
            help += f" (default: {NATIVE_DEFAULTS[f.name]})" if f.name in NATIVE_DEFAULTS else ""
            repeated, switch = {"action": "append", "metavar": "TEXT"}, {"action": "store_true", "default": None}
            kind = {stops: repeated, breakers: repeated, boolean: switch}.get(f.metadata["check"])
            group.add_argument(flag, help=help, **kind or {"type": _plain_number, "metavar": "N"})  # type: ignore[arg-type]


def _plain_number(words: str) -> float:
    try:
        return int(words) if re.fullmatch(r"-?\d+", words) else float(words)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{words!r} is no number") from None


def listen_address(args: argparse.Namespace) -> tuple[str, int]:
    """Host and port from flags, environment, default; UsageError when they make no address."""
    bind = args.bind or os.environ.get("SHIMMY_BIND_ADDRESS") or "127.0.0.1"
    found = re.fullmatch(r"\[([^\]]*)\](?::(\d+))?|([^:]*)(?::(\d+))?|([0-9a-fA-F:]*:[0-9a-fA-F:.]*)", bind)
    if not found:
        raise UsageError(f"--bind {bind} is no HOST[:PORT]; an IPv6 address goes in brackets: [::1]:11435")
    host = next((h for h in found.group(1, 3, 5) if h), "127.0.0.1")
    named = next((p for p in found.group(2, 4) if p), None)
    # a port flag wins over --bind's, and both over the environment's
    port = args.port if args.port is not None else named if args.bind and named else os.environ.get("SHIMMY_PORT") or named
    try:
        return host, count(0, 65535)(str(DEFAULT_PORT if port is None else port))
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{'--bind' if port == named else 'SHIMMY_PORT'}: {error}") from None


def engine_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of EngineOptions that the flags give. Raises UsageError for values that make no sense."""
    given = {f.name: getattr(args, f.name, None) for f in fields(EngineOptions)}
    found: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    if found.get("flash_attn") == "off" and found.get("kv_type", "f16") != "f16":
        raise UsageError(f"--kv-type {found['kv_type']} needs flash attention, which --flash-attn off forbids")
    for file in found.get("lora", ()):
        if not os.path.isfile(file):
            raise UsageError(f"--lora {file}: there is no such file")
    if "chat_template" in found:
        found["chat_template"] = read_file("--chat-template", found["chat_template"])
    named = {"--device": found.get("device") or (), "--override-tensor": [d for _, d in found.get("override_tensor", ())]}
    if not any(named.values()) and "main_gpu" not in found:
        return found
    devices = engine_build()["devices"]  # a helper process is asked
    there = [d["name"] for d in devices]
    for flag, names in named.items():
        if absent := [name for name in names if name not in there and not (flag == "--device" and names == ("none",))]:
            raise UsageError(f"{flag} {absent[0]}: there is no such device; there are {', '.join(there) or 'none'}")
    gpus = [d for d in devices if d["kind"] in ("GPU", "IGPU")]
    if found.get("main_gpu", -1) >= len(found.get("device") or gpus):
        raise UsageError(f"--main-gpu {found['main_gpu']}: there are {len(gpus)} GPUs, the first one is 0")
    return found


def read_file(flag: str, file: str) -> str:
    """The text file that a flag names. Raises UsageError."""
    try:
        return pathlib.Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{flag} {file}: {getattr(error, 'strerror', None) or error}") from None


def engine_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The same of a command line, with SHIMMY_MAX_CTX."""
    found, most = engine_fields(args), os.environ.get("SHIMMY_MAX_CTX")
    try:
        return found if "ctx" in found or not most else found | {"ctx": count(*ENGINE_BOUNDS["ctx"])(most)}
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"SHIMMY_MAX_CTX: {error}") from None


def given_sampling(args: argparse.Namespace, **more: Any) -> tuple[dict[str, Any], Sampling]:
    """The sampling flags that are given and `more`, as fields of a body, and checked. Raises UsageError naming the flag."""
    given = {f.name: getattr(args, f.name, None) for f in fields(Sampling) if f.metadata.get("help")} | more
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return given, Sampling.from_json(given)
    except InvalidRequest as error:
        name = error.param or ""
        raise UsageError(f"--{name.replace('_', '-')}{str(error).removeprefix(name)}") from None


# Settings of single models

SYNONYMS = {  # llama-server's names of our flags, where they mean the same
    "c": "ctx", "ctx-size": "ctx", "np": "parallel", "t": "threads", "ngl": "gpu-layers", "n-gpu-layers": "gpu-layers",
    "ncmoe": "n-cpu-moe", "ot": "override-tensor", "dev": "device", "mg": "main-gpu", "ts": "tensor-split", "fa": "flash-attn",
    "b": "batch", "batch-size": "batch", "cache-type-k": "kv-type", "cache-type-v": "kv-type", "ctk": "kv-type",
    "ctv": "kv-type", "chat-template-file": "chat-template", "temp": "temperature", "n-predict": "max-tokens",
    "load-on-startup": "preload", "s": "seed", "a": "alias",
}  # fmt: skip
SWITCHES = {"true": True, "on": True, "1": True, "yes": True, "false": False, "off": False, "0": False, "no": False}


class PresetParser(Arguments):
    """Reads the keys of a preset or of a load's body as the flags that they are; says what is wrong as a UsageError."""

    def __init__(self) -> None:
        super().__init__(add_help=False)
        _engine_flags(self)
        _sampling_flags(self)
        self.add_argument("--alias", action="append", default=[])
        self.add_argument("--preload", action="store_true")
        self.add_argument("--keep-alive", type=duration)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.partition(": ")[2] or message)  # without the flag's name, which may be a synonym

    def read(self, pairs: Mapping[str, Any]) -> argparse.Namespace:
        """The flags that the pairs stand for. Raises UsageError, which begins with the key."""
        result = argparse.Namespace()
        for key, value in pairs.items():
            try:
                self.parse_args(self._words(key.strip().replace("_", "-"), value), result)
            except UsageError as error:
                raise UsageError(f"{printable(key)}: {error}") from None
        return self.parse_args([], result)

    def _words(self, flag: str, value: Any) -> list[str]:
        """A pair as words of a command line."""
        flag = SYNONYMS.get(flag, flag)
        action = self._option_string_actions.get(f"--{flag}")
        if action is None:
            raise UsageError("there is no such setting")
        if action.nargs == 0:
            switch = SWITCHES.get(str(value).lower())
            if switch is None:
                raise UsageError(f"{printable(str(value))} is neither true nor false")
            return [f"--{flag}"] if switch else [o for o in action.option_strings if o == f"--no-{flag}"]
        if not isinstance(action, argparse._AppendAction):
            value = ",".join(map(str, value)) if isinstance(value, list) else value
        elif flag != "override-tensor" and not isinstance(value, list):
            value = str(value).split(",")
        return [f"--{flag}={str(v).strip()}" for v in (value if isinstance(value, list) else [value])]


def read_preset(file: str) -> list[Preset]:
    """The sections of a preset file, llama-server's form: INI, a section a model. Raises UsageError naming file, section, key."""
    import configparser

    ini = configparser.ConfigParser(interpolation=None, delimiters=("=",), default_section="\0", comment_prefixes=("#", ";"))
    ini.optionxform = str  # type: ignore[assignment, method-assign]
    try:
        ini.read_string("[\1]\n" + read_file("--preset", file), file)
    except configparser.Error as error:
        raise UsageError(f"--preset {file}: {' '.join(error.message.split())}") from None
    presets = []
    for section in ini.sections():
        pairs = dict(ini[section])
        if section == "\1":  # what stands above the first section
            if left := [key for key in pairs if key != "version"]:
                raise UsageError(f"--preset {file}: {left[0]} stands in no section")
            continue
        try:
            presets.append(preset := preset_of(section, pairs))
            if preset.aliases and re.search(r"[*?\[]", section):
                raise UsageError("alias: a pattern means several models, and a name can mean only one")
        except UsageError as error:
            raise UsageError(f"--preset {file}: [{section}] {error}") from None
    return presets


def preset_of(pattern: str, pairs: Mapping[str, Any]) -> Preset:
    """What pairs of key and value say of the models that a pattern means. Raises UsageError."""
    args = PresetParser().read(pairs)
    given, checked = given_sampling(args)
    sampling = {name: getattr(checked, name) for name in given}
    return Preset(pattern, engine_fields(args), sampling, tuple(args.alias), args.preload, args.keep_alive)


FILE_SETTINGS = ("lora", "chat-template", "chat-template-file")  # a request names no file: presets and the command line do


def load_options(body: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of EngineOptions from the body of a load: a preset's keys, but those that name files. Raises InvalidRequest."""
    body = {key: value for key, value in body.items() if value is not None}
    for key in body:
        if key.strip().replace("_", "-") in FILE_SETTINGS:
            raise InvalidRequest(f"{printable(key)} names a file, which only a preset and the command line may", key)
    try:
        preset = preset_of("", body)
    except UsageError as error:
        named = re.match(r"[-\w]+", str(error).removeprefix("--"))
        raise InvalidRequest(str(error), named[0] if named else None) from None
    if preset.sampling or preset.aliases or preset.preload or preset.keep_alive is not None:
        raise InvalidRequest("a load takes the engine's settings, no sampling, alias, preload or keep-alive", None)
    return dict(preset.engine)


def make_service(args: argparse.Namespace, model: str | None = None, **more: Any) -> Service:
    """A Service over the models this command line and environment name; `model` may be a path."""
    base = os.environ.get("SHIMMY_BASE_GGUF")
    default = (model if model != "default" else None) or base
    files = [os.path.expanduser(p) for p in (model, base) if p and is_path(p)]
    for file in files:
        if not os.path.isfile(file):
            raise ModelNotFound(f"There is no file {file}")
    catalog = Catalog(search_roots(args.models_dir, base if base and is_path(base) else None), files)
    presets = read_preset(args.preset) if getattr(args, "preset", None) else []
    table = TableOptions(
        getattr(args, "max_loaded", 3), getattr(args, "keep_alive", -1), default, tuple(getattr(args, "alias", ())),
        tuple((alias, p.pattern) for p in presets for alias in p.aliases),
    )  # fmt: skip
    return Service(catalog, table, Settings(engine_flags(args), presets, args.command != "serve"), **more)


def is_path(model: str) -> bool:
    """True if a MODEL argument is a file rather than a name."""
    return model.lower().endswith(".gguf") or (os.sep in model and os.path.exists(os.path.expanduser(model)))


# ── 17.2. Commands ────────────────────────────────────────────────────────────────────────────────────────────────────
# One function a command. stdout carries the result, stderr the rest; 0 success, 1 failure, 2 usage. Ctrl-C ends us by
# SIGINT (a shell shows 130), so that a loop around us stops too.


class StopSignals:
    """SIGINT, SIGTERM and SIGHUP ask `serve` to stop; a second one ends the process at once."""

    def __init__(self) -> None:
        self.asked = False
        self._codes: queue.SimpleQueue[int] = queue.SimpleQueue()  # whose put() may interrupt whatever code
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
            number = getattr(signal, name, None)
            if number is None or (name in ("SIGINT", "SIGHUP") and signal.getsignal(number) is signal.SIG_IGN):
                continue  # ignored by who started us: a shell's background job, nohup
            signal.signal(number, self._handle)

    def _handle(self, *_: Any) -> None:
        if self.asked:
            os._exit(0)
        self.asked = True
        self.stop(0)

    def stop(self, code: int) -> None:
        """Ends `wait`, from any thread."""
        self._codes.put(code)

    def wait(self) -> int:
        """Blocks until a signal or `stop`; returns the exit code."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self._codes.get(timeout=1.0)  # Windows runs signal handlers between waits only


def command_serve(args: argparse.Namespace) -> int:
    """Listens, then waits for a signal; models load on demand. Exits with 2 if a model named by a flag is not found."""
    check_packages()
    args.model = fetch_named(args.model)
    signals = StopSignals()
    address = listen_address(args)
    access = serve_access(args, address[0])
    tools = serve_tools(args)
    for directory in args.models_dir:
        if not os.path.isdir(os.path.expanduser(directory)):
            log.warning("--models-dir %s: there is no such directory", directory)
    service = make_service(args, args.model, tools=tools, max_queue=args.max_queue, allow_pull=args.allow_pull,
                           report=log.warning)  # fmt: skip
    try:
        server = Server(address, service, access)
    except OSError as error:
        advice = "; --port N listens on another, 0 on any" if error.errno == errno.EADDRINUSE else ""
        raise OSError(f"cannot listen on {address[0]}:{address[1]}: {error.strerror or error}{advice}") from None
    threading.Thread(target=server.serve_forever, args=(0.1,), name="accept", daemon=True).start()
    print(f"shimmy {__version__} is listening on {server.url}", flush=True)
    service.table.start()
    threading.Thread(target=service.faults.kernels, name="kernels", daemon=True).start()  # before the first load asks
    if args.open:
        threading.Thread(target=open_page, args=(server.url,), name="browser", daemon=True).start()
    threading.Thread(target=_after_scan, args=(args, service, signals, server.url), name="names", daemon=True).start()
    with WaitingLine(lambda: ", ".join(loading_stage(s) for s in service.table.statuses() if s["status"] == "loading")):
        code = signals.wait()
    if not code:
        busy = [(s["model"], s["requests_running"] + s["requests_waiting"]) for s in service.table.statuses()]
        who = ", ".join(f"{printable(model)} ({requests})" for model, requests in busy if requests)
        log.warning("shutting down%s", f": waiting up to {GRACE_SECONDS:.0f} s for the requests of {who}" if who else "")
    server.stop()
    return code


def serve_access(args: argparse.Namespace, host: str) -> Access:
    """Reads the access rules from the flags. Raises UsageError for a bad key, and for a network address without one."""
    own = os.environ.get("SHIMMY_API_KEY")
    keys = [checked_key("--api-key", key) for key in args.api_key] or ([checked_key("SHIMMY_API_KEY", own)] if own else [])
    loopback = is_loopback(host)
    if not loopback and not keys and not args.insecure:
        raise UsageError(f"--bind {host} opens the server to the network: set --api-key KEY, or say --insecure")
    return Access(loopback, tuple(keys), args.private_prompts, tuple(args.allow_origin), tuple(args.allow_host))


def checked_key(setting: str, words: str) -> str:
    """A key, without the blanks and line ends around it. Raises UsageError for one that no header carries."""
    key = words.strip()
    if not (key and key.isascii() and key.isprintable()):
        raise UsageError(f"{setting} must be printable ASCII, as headers are, and not empty")
    return key


def serve_tools(args: argparse.Namespace) -> ToolOptions:
    """Reads the tools' rights from the flags. Raises UsageError for files and directories that are not there."""
    for file in args.tools:
        if not os.path.isfile(file):
            raise UsageError(f"--tools {file}: there is no such file")
    if args.tool_root and not os.path.isdir(args.tool_root):
        raise UsageError(f"--tool-root {args.tool_root}: there is no such directory")
    return ToolOptions(args.tool_root, tuple(h for h in args.tool_hosts.split(",") if h.strip()), tuple(args.tools))


def _after_scan(args: argparse.Namespace, service: Service, signals: StopSignals, url: str) -> None:
    """When the first scan is over: stops the server if a named model is not there, else tells what is there, preloads."""
    lost = list(service.table.names().unresolved(service.table.catalog))
    if signals.asked:
        return
    for setting, value, why in lost:
        named = "SHIMMY_BASE_GGUF" if setting == "--model" and not args.model else setting
        value = f"{named}={value}" if setting.startswith("--alias") else f"{named} {value}"
        print(f"shimmy serve: error: {printable(value)}: no such model{why}", file=sys.stderr)
    if lost:
        signals.stop(2)
        return
    tell_serving(args, service, url)
    ids = [model.id for model in service.table.infos()]
    for preset in service.settings.presets:
        if preset.pattern != "*" and not any(map(preset.means, ids)):
            log.warning("--preset %s: [%s] means no model that is here", args.preset, printable(preset.pattern))
    wanted = [id for id in ids for preset in service.settings.presets if preset.preload and preset.means(id)]
    for name in dict.fromkeys([*(["default"] if args.preload else []), *wanted]):
        try:
            service.table.load(name, True, Cancellation())
        except ApiError as error:
            log.error("preload: %s", error)


def tell_serving(args: argparse.Namespace, service: Service, url: str) -> None:
    """Says on stderr what was found and what is missing, and how to begin."""
    models, default = service.table.infos(), service.table.names().default
    if all(map(is_boxed, models)):
        log.warning("%s: get a real one with\n  %s pull %s", "only the model in the box is here, a demonstration" if models
                    else "no model is here", own_command(), SUGGESTED)  # fmt: skip
    log.warning("default model: %s; %d model%s found", printable(default or "none"), len(models), "s" * (len(models) != 1))
    report, engine, gpu = service.table.catalog.report, service.settings.engine, machine_gpu()
    rows = [("found", f"{place['models']} in {place['path']}") for place in report.directories if place["models"]]
    if report.skipped:
        rows.append(("found", f"{len(report.skipped)} files are no models to serve: list -v says why"))
    if default:
        info, kv_type = service.table.info(default), service.table.settings(default).engine.kv_type
        words = memory_words(info.size_bytes, None if info.embedding else info.largest_context(kv_type))
        rows.append(("memory", f"{printable(info.id)}, {human_bytes(info.size_bytes)}, {words}"))
    threads = engine.threads or physical_cores()
    rows.append(("engine", f"{threads} thread{'s' * (threads != 1)}"))
    if gpu and engine.gpu_layers != 0 and not engine_build()["gpu_offload"]:
        build = f"CMAKE_ARGS=-DGGML_{gpu[1]}=on pip install --force-reinstall --no-cache-dir llama-cpp-python"
        rows.append(("engine", f"no GPU in this build of llama-cpp-python, although the machine has {gpu[0]} one: {build}"))
    key = ' -H "Authorization: Bearer KEY"' if args.api_key or os.environ.get("SHIMMY_API_KEY") else ""
    body = '{"messages":[{"role":"user","content":"Hello!"}]}'
    rows += [("page", f"{url}/"), ("try", f"curl {url}/v1/chat/completions{key} -d '{body}'")]
    print_rows([(f"  {label}", words) for label, words in rows], sys.stderr)


def print_rows(rows: Iterable[tuple[str, Any]], stream: IO[str] | None = None) -> None:
    """Labelled lines, on stdout or the stream."""
    for label, value in rows:
        print(f"{label:12} {printable(str(value), MAX_SHOWN_PATH)}", file=stream, flush=True)


def command_list(args: argparse.Namespace) -> int:
    """Shows the models on this machine."""
    service = make_service(args)
    service.table.models(0.0)
    report = service.table.catalog.report
    if args.json:
        more = {m.id: {"path": m.path, "source": m.source, "fits": fits_memory(m.size_bytes),
                       "largest_context": m.largest_context("f16")} for m in report.models}  # fmt: skip
        models = [m | more[m["id"]] for m in service.table.models() if m["id"] in more]
        print_json({"models": models, "skipped": list(report.skipped), "directories": list(report.directories)})
    elif args.short:
        for model in report.models:
            print(printable(model.id))
    else:
        cells = [(m.id, m.parameter_count, m.quantization, human_bytes(m.size_bytes), m.context_length, fit_word(m),
                  m.path) for m in report.models]  # fmt: skip
        print_table(["NAME", "PARAMS", "QUANT", "SIZE", "CONTEXT", "FITS", "WHERE"],
                    [[printable(str(cell or "-"), MAX_SHOWN_PATH) for cell in row] for row in cells])  # fmt: skip
        if not report.models:
            print("No GGUF model was found; put one into ./models or name its directory with --models-dir.", file=sys.stderr)
    if args.verbose and not args.json:
        print_rows([("skipped", f"{each['path']}: {each['reason']}") for each in report.skipped], sys.stderr)
        print_rows([("note", note) for place in report.directories for note in place["notes"]], sys.stderr)
    return 0


MAX_SHOWN_PATH = 4096  # characters of a path in tables: Linux has none that are longer


def fits_memory(size_bytes: int) -> bool | None:
    """True if weights of this size fit the memory that is free now, with 64 MiB for the least context; None: unknown."""
    free = available_memory()
    return None if free is None else size_bytes + 64 * MIB <= free


def memory_words(size: int, most: int | None = None) -> str:
    """Says if weights of that size fit the free memory, and with how many tokens of context if that is known."""
    free = available_memory()
    if free is None:
        return "free memory unknown"
    context = "" if most is None else f"; up to {most:,} tokens of context fit (--ctx)"
    return f"{'fits' if fits_memory(size) else 'does not fit'} the memory: {human_bytes(free)} free{context}"


def fit_word(model: ModelInfo) -> str | None:
    """yes, no, or the context that fits the free memory where the usual one does not."""
    fits, most = fits_memory(model.size_bytes), model.largest_context("f16")
    if fits and most is not None and most < min(model.context_length or 8192, 8192):
        return f"ctx {most}" if most else "no"
    return {True: "yes", False: "no", None: None}[fits]


def print_json(document: Any) -> None:
    """To standard output; ASCII, so that any terminal and pipe takes it."""
    print(json.dumps(document, indent=2, ensure_ascii=True))


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as their widest cell; on a terminal too narrow for them, each row's cells below one another."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    if sys.stdout.isatty() and sum(widths) + 2 * len(widths) - 2 > terminal_width(sys.stdout):
        for name, *cells in rows:
            print(name)
            print_rows((f"  {label.lower()}", cell) for label, cell in zip(header[1:], cells, strict=True))
        return
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


class WaitingLine:
    """On a terminal, a line on stderr that says what is being waited for; `clear` removes it, and so does the end.

    A thread redraws it. The cursor stays at the line's beginning, so that log messages overwrite it.
    """

    def __init__(self, what: Callable[[], str]) -> None:
        self._what = what
        self._lock, self._cleared = threading.Lock(), threading.Event()
        if not sys.stderr.isatty():
            self._cleared.set()

    def __enter__(self) -> WaitingLine:
        if self.shown:
            threading.Thread(target=self._redraw, name="waiting line", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def _redraw(self) -> None:
        began, drawn = 0.0, ""
        while self.shown:
            try:
                text = self._what()
            except Exception:  # a thread's border: the command itself tells what went wrong
                text = ""
            began = began or time.monotonic() if text else 0.0
            seconds = int(time.monotonic() - began)
            text += f" ({seconds} s)" if text and seconds >= 2 else ""
            with self._lock:
                if text != drawn and self.shown:
                    print(f"\r{text[: terminal_width() - 1]}\033[K\r", end="", file=sys.stderr, flush=True)
            drawn = text
            self._cleared.wait(0.2)

    @property
    def shown(self) -> bool:
        return not self._cleared.is_set()

    def clear(self) -> None:
        """Removes the line for good; idempotent."""
        with self._lock:
            if self.shown:
                self._cleared.set()
                print("\r\033[K", end="", file=sys.stderr, flush=True)


def terminal_width(stream: IO[str] | None = None) -> int:
    """Columns of the terminal that the stream, or else stderr, is."""
    try:
        return os.get_terminal_size((stream or sys.stderr).fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def loading_stage(status: dict[str, Any]) -> str:
    """Describes a load in progress; "" once the model is loaded, or failed."""
    model, progress = printable(status["model"], 40), status["progress"]
    if status["status"] == "loading":
        weights = f"loading {model} {progress:.0%}" if progress else f"starting the engine for {model}"
        return weights if progress < 1 else f"preparing the context of {model}"
    return f"waiting to load {model}" if status["status"] in ("unloaded", "unloading") else ""


# pull

PULL_LINE_SECONDS = 5.0  # between lines about a pull where there is no terminal


def command_pull(args: argparse.Namespace) -> int:
    """Fetches a model; prints where it lies. With --dry-run, prints what would be fetched."""
    folder = os.path.expanduser(args.models_dir[0] if args.models_dir else "~/models")
    path = fetch(read_wanted(args.name), folder, args.dry_run)
    if args.dry_run:
        return 0
    print(printable(path, MAX_SHOWN_PATH))
    import shlex

    name = shlex.quote(plain_id(pathlib.Path(path).stem))
    print(f'Try it: {own_command()} generate {name} "Hello"\nor:     {own_command()} serve --model {name}', file=sys.stderr)
    return 0


def fetch(wanted: Wanted, folder: str, dry_run: bool = False) -> str:
    """Fetches what is not here yet, and says what; the model's path. A dry run prints what would be fetched."""
    pull, view = Pull(Cancellation()), PullView()
    with view:
        plan = view.watch(pull.plan(wanted, folder))
        left, began = plan.left, time.monotonic()
        if dry_run:
            view.clear()
            print("\n".join(plan_words(plan)))
            return str(plan.path)
        for line in plan_words(plan) if left else [f"{plan.title} is here already"]:
            view.say(line)
        view.watch(pull.run(plan))
        view.clear()
        if left:
            view.say(f"fetched {human_bytes(left)} in {clock(time.monotonic() - began)}, and checked")
    return str(plan.path)


def fetch_named(model: str | None) -> str | None:
    """MODEL, or the path of the file that it means if it names a hub's repository: fetched now unless it is here."""
    wanted = repository(model) if model and (":" in model or not is_path(model)) and not os.path.exists(model) else None
    return model if wanted is None else pulled_before(wanted) or fetch(wanted, "")


def plan_words(plan: Plan) -> list[str]:
    """Describes a pull: the files, if they fit, and the other quantizations."""
    lines = [f"{plan.title}: {human_bytes(plan.size)}"]
    if len(plan.files) > 1:
        lines[0] += f" in {len(plan.files)} files"
    if 0 < plan.left < plan.size:
        lines[0] += f", {human_bytes(plan.left)} still to fetch"
    elif not plan.left:
        lines[0] += ", here already"
    lines += [f"  {printable(file.name)}  {human_bytes(file.size)}" for file, _ in plan.files]
    lines.append(f"into {printable(os.path.dirname(plan.path), MAX_SHOWN_PATH)}")
    lines.append(memory_words(plan.size))
    if plan.others:
        lines.append(f"there are also {some_of(plan.others, 12)}")
    return lines


def clock(seconds: float) -> str:
    """95 seconds as 1:35."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class PullView(WaitingLine):
    """Shows a pull on stderr: a line that is redrawn on a terminal, else a line every few seconds."""

    def __init__(self) -> None:
        super().__init__(lambda: self._text(terminal_width() - 10))  # the seconds stand behind it
        self._event, self._printed = Fetching("asking what there is"), time.monotonic()
        self._start = 0.0, 0  # when so many bytes of the file were here

    def say(self, line: str) -> None:
        """A line that stays."""
        print(("\033[K" if self.shown else "") + line, file=sys.stderr, flush=True)

    def watch(self, work: Generator[Fetching, None, Any]) -> Any:
        """Runs the work to its end; returns what it returns."""
        while True:
            try:
                event = next(work)
            except StopIteration as end:
                return end.value
            now, before = time.monotonic(), self._event
            if event.digest != before.digest or event.completed < before.completed or not before.total:
                self._start = now, event.completed
            self._event = event
            if not self.shown and now - self._printed >= PULL_LINE_SECONDS:
                self._printed = now
                self.say(self._text(math.inf))

    def _text(self, width: float) -> str:
        """Describes the progress: the most important first, the rest as far as the width goes."""
        event, (began, before) = self._event, self._start
        if not event.total:
            return event.status
        text = f"{event.completed / event.total:.0%} {human_bytes(event.completed)} of {human_bytes(event.total)}"
        seconds = time.monotonic() - began
        if seconds > 0.5 and before < event.completed < event.total:
            speed = (event.completed - before) / seconds
            text += f" {human_bytes(speed)}/s {clock((event.total - event.completed) / speed)} left"
        bar = int(12 * event.completed / event.total)
        for more in (event.status, f"[{'#' * bar}{'.' * (12 - bar)}]"):
            text = f"{text} {more}" if len(text) + len(more) + 1 <= width else text
        return text


def own_command() -> str:
    """The command that calls this program from here."""
    import shlex

    return shlex.join((sys.executable, sys.argv[0]))


PROBE_PROMPT = "Once upon a time there was a small server that could tell stories, and every day somebody asked for one. " * 8


def command_probe(args: argparse.Namespace) -> int:
    """Loads a model, generates, and says how it went."""
    check_packages()
    args.model = fetch_named(args.model)
    path = args.model if args.model and is_path(args.model) else None
    service = make_service(args, path)
    service.table.start()
    with contextlib.closing(service):
        name = service.table.resolve("default" if path or args.model is None else args.model)
        with WaitingLine(lambda: loading_stage(service.table.status(name)) or "measuring"):
            result = probe(service, name)
    if args.json:
        print_json(result)
        return 0
    most = result["largest_context"]
    print(printable(result["model"]))
    print_rows([
        ("loaded in", f"{result['load_seconds']:.2f} s"),
        ("memory", f"{human_bytes(result['memory_bytes'])}, {human_bytes(result['available_bytes'] or 0)} are left"),
        ("context", f"{result['context_length']:,} tokens{f', up to {most:,} would fit' if most else ''}"),
        *((key, result[key]) for key in ("devices", "fallback") if result[key]),
        ("prompt", f"{result['prompt_tokens_per_second']:,.0f} tokens/s"),
        ("generated", f"{result['generated_tokens_per_second']:,.0f} tokens/s"),
    ])  # fmt: skip
    return 0


def probe(service: Service, name: str) -> dict[str, Any]:
    """Loads a model for real and generates 64 tokens; speeds in tokens per second."""
    cancel, engine = Cancellation(), service.table.settings(name).engine
    most = service.table.info(name).largest_context(engine.kv_type)
    with service.table.lease(name, cancel) as lease:
        worker = lease.wait()
        assert worker
        words = min(worker.loaded.ctx // 8, 100)  # a word is up to six tokens in the smallest vocabularies
        prompt = " ".join(PROBE_PROMPT.split()[:words])
        sampling = Sampling(max_tokens=64, temperature=0.0, ignore_eos=True)
        events = list(service.generate(GenerateRequest(name, (prompt,), sampling=sampling), cancel))
        usage = next(e for e in events if isinstance(e, Usage))
        return {
            "model": name, "path": worker.info.path, "load_seconds": round(worker.load_seconds, 3),
            "memory_bytes": worker.memory_bytes(), "available_bytes": available_memory(),
            "context_length": worker.loaded.ctx, "largest_context": most,
            "devices": worker.loaded.devices, "fallback": worker.setup.rung.words(),
            "prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens,
            "prompt_tokens_per_second": round(usage.prompt_tokens / max(usage.prompt_seconds, 1e-9), 1),
            "generated_tokens_per_second": round((usage.completion_tokens - 1) / max(usage.decode_seconds, 1e-9), 1),
        }  # fmt: skip


# completion

BASH = """\
_shimmy() {
  local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} words name
  case ${COMP_WORDS[1]} in
%s
    *) words="%s";;
  esac
  case $before in
%s
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
  case $before in generate|probe|--model)
    while IFS= read -r name; do  # not with compgen, which would run what a name holds
      [[ $name == "$current"* ]] && COMPREPLY+=("$(printf %%q "$name")")
    done < <("${COMP_WORDS[0]}" list --short 2>/dev/null)
  esac
}
complete -o default -F _shimmy shimmy shimmy.py
command -v shimmy >/dev/null || shimmy() { %s "$@"; }
"""


def command_completion(args: argparse.Namespace) -> int:
    """Prints a shell's script, made of what argparse knows; it also makes `shimmy` a command, unless there is one."""
    import shlex

    commands = next(a.choices for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    flags = {name: [a for a in sub._actions if a.option_strings and a.help != argparse.SUPPRESS]
             for name, sub in dict(commands or {}).items()}  # fmt: skip
    chosen = {a.option_strings[-1]: " ".join(a.choices) for some in flags.values() for a in some if a.choices}
    this = shlex.join(child_command("main"))  # from cached bytecode, in a quarter of a script's time
    if args.shell == "fish":
        print("\n".join([*fish_lines(flags), "complete -c shimmy -w shimmy.py",
                         f"type -q shimmy; or function shimmy; {this} $argv; end"]))  # fmt: skip
        return 0
    rows = (f'    {name}) words="{" ".join(o for a in some for o in a.option_strings)}";;' for name, some in flags.items())
    values = (f'    {flag}) words="{words}";;' for flag, words in chosen.items())
    start = "autoload -U +X bashcompinit && bashcompinit\n" if args.shell == "zsh" else ""
    print(start + BASH % ("\n".join(rows), " ".join(flags), "\n".join(values), this), end="")
    return 0


def fish_lines(flags: dict[str, list[argparse.Action]]) -> Iterator[str]:
    """One line for each command and flag."""
    for name, some in flags.items():
        yield f"complete -c shimmy.py -f -n __fish_use_subcommand -a {name}"
        for a in some:
            value = f" -x -a '{' '.join(a.choices)}'" if a.choices else " -r" if a.nargs != 0 else ""
            names = "".join(f" -{'l' if o.startswith('--') else 's'} {o.lstrip('-')}" for o in a.option_strings)
            said = (a.help or "").replace("\\", "\\\\").replace("'", "\\'")
            yield f"complete -c shimmy.py -n '__fish_seen_subcommand_from {name}'{names}{value} -d '{said}'"


def url_of(host: str, port: int) -> str:
    """An address as a URL."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Neighbour:
    """The server at the configured address, if one runs there."""

    def __init__(self, args: argparse.Namespace) -> None:
        host, self._port = listen_address(args)
        self.url = url_of(host, self._port)
        every = is_ip(host) and ipaddress.ip_address(host).is_unspecified  # where it is bound; we connect to one address
        self._host = ("::1" if ":" in host else "127.0.0.1") if every else host
        key = os.environ.get("SHIMMY_API_KEY")
        self._headers = {"Authorization": f"Bearer {checked_key('SHIMMY_API_KEY', key)}"} if key else {}
        # why it answered 401
        self.refusal = "refused the key in SHIMMY_API_KEY" if key else "asks for a key: set SHIMMY_API_KEY"

    @contextlib.contextmanager
    def request(self, method: str, path: str, body: bytes | None = None,
                seconds: float | None = None) -> Iterator[http.client.HTTPResponse]:  # fmt: skip
        """The answer. Raises OSError when nobody answers within so many seconds, HTTPException for what is no HTTP."""
        import http.client

        with contextlib.closing(http.client.HTTPConnection(self._host, self._port, timeout=seconds)) as connection:
            connection.connect()
            with contextlib.suppress(ConnectionError):  # it answers 413 before it has read a body that is too large
                connection.request(method, path, body, {"Content-Type": "application/json", **self._headers})
            yield connection.getresponse()

    def get(self, path: str, seconds: float) -> tuple[int, Any]:
        """Status and document. Raises as `request` does, and ValueError for what is no JSON."""
        with self.request("GET", path, seconds=seconds) as response:
            return response.status, json.loads(response.read(MAX_BODY))


def command_diag(args: argparse.Namespace) -> int:
    """Shows what a report of a problem should contain: of a server its health, and if it takes our key."""
    import http.client

    service = make_service(args)
    service.table.models(0.0)
    server = Neighbour(args)
    state: dict[str, Any] = {"running": False, "url": server.url}
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
        status, health = server.get("/api/health", 2.0)
        state |= {"running": status == 200, "health": health}
        state["key_accepted"] = server.get("/api/tools", 2.0)[0] != 401
    document = service.diag() | {"server": state}
    if args.json:
        print_json(document)
        return 0
    rows = [(key, document[key]) for key in [*versions(), "engine", "gpu_offload"]]
    for device in document["devices"]:
        room = f", {human_bytes(device['free'])} free" if device["kind"] != "CPU" else ""
        rows.append(("device", f"{device['name']}: {device['description']}{room}"))
    known = document["known_faults"]  # what native code cannot do here
    broken = [f"{name} kernels ({fault})" for name, fault in known["kernels"].items() if fault]
    broken += [f"{kind} ({said.get('reason')})" for kind, said in known["rungs"].items() if isinstance(said, dict)]
    rows.append(("known faults", f"{', '.join(broken)}; to forget them, delete {known['file']}" if broken
                 else f"none (in {known['file']})"))  # fmt: skip
    free = document["memory"]["available_bytes"]
    rows.append(("memory", f"{human_bytes(free)} available" if free is not None else "unknown"))
    answers = "answers" if state.get("key_accepted", True) else f"answers, but {server.refusal}"
    rows.append(("server", f"{server.url}: {answers if state['running'] else 'no answer'}"))
    for place in document["directories"]:
        found = f"{place['models']} model{'s' * (place['models'] != 1)}" if place["exists"] else "not there"
        rows.append(("searched", f"{place['path']} ({place['source']}): {'; '.join([found, *place['notes']])}"))
    print_rows(rows + [("skipped", f"{each['path']}: {each['reason']}") for each in document["skipped"]])
    return 0


def check_packages() -> None:
    """Raises ImportError, in one line, for a package that is missing or too old."""
    import importlib.metadata

    for package, oldest in (("llama-cpp-python", (0, 3, 36)), ("websockets", (17,)), ("jinja2", (3, 1, 6))):
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            beside = pathlib.Path(__file__).resolve().parent / ".venv" / "bin" / "python"
            hint = f"; {beside} may have it" if beside.exists() and str(beside) != sys.executable else ""
            wanted = "pip install llama-cpp-python websockets 'jinja2>=3.1.6'"
            raise ImportError(f"{package} is not installed: {wanted}{hint}") from None
        if tuple(int(n) for n in re.findall(r"\d+", installed)[:3]) < oldest:
            wanted = ".".join(map(str, oldest))
            raise ImportError(f"{package} {installed} is too old, shimmy needs {wanted}: pip install -U {package}")


# ── 17.3. generate ────────────────────────────────────────────────────────────────────────────────────────────────────
# The command that a running server may do as well as an engine of our own; and main.


# Who does it


class NoServer(Exception):
    """No running server can do the work; the message says why, for -v."""


def choose_source(args: argparse.Namespace) -> TextSource:
    """The running server if it knows the model, else an engine of our own; -v says which and why."""
    try:
        server = RunningServer(args)
    except NoServer as reason:
        log.info("an engine of its own does the work: %s", reason)
        return OwnEngine(args)
    log.info("the server at %s does the work, with %s", server.url, printable(server.model))
    return server


class OwnEngine:
    """Generates with an engine that lives as long as the command."""

    queued: Queued | None = None  # since the request passed its checks
    cached_tokens = 0  # of the last prompt

    def __init__(self, args: argparse.Namespace) -> None:
        """Finds the model; `warm` or the first answer loads it. Raises ImportError, ModelNotFound, UsageError."""
        check_packages()
        path = args.model if args.model and is_path(args.model) else None
        self._service = make_service(args, path)
        self._service.table.start()
        try:
            info = self._service.table.info("default" if path else args.model or "default")
        except ModelNotFound as error:
            if args.model is None or args.prompt is not None:
                raise
            there = error.hint.partition(";")[0].rstrip(")") + ")" if error.hint else ""
            called, advice = printable(args.model, 60), "say --prompt TEXT, or name the model before it"
            raise UsageError(f"no model is called '{called}'{there}; if that is the prompt, {advice}") from None
        self.model, self.has_template = info.id, info.chat_template

    def warm(self) -> None:
        """Has the model loaded, without waiting for it."""
        self._service.table.load(self.model, False, Cancellation())

    def status(self) -> dict[str, Any]:
        """The model's status, as the status route tells it."""
        return self._service.table.status(self.model)

    def documents(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The documents of a stream that a body of /api/generate asks for. Raises ApiError."""
        dialect = Native(body | {"stream": True})
        with contextlib.closing(dialect.events(self._service, Cancellation())) as events:  # type: ignore[type-var]
            for event in events:
                if isinstance(event, Queued):
                    self.queued = event
                elif isinstance(event, Usage):
                    self.cached_tokens = event.cached_tokens
                yield from dialect.documents(event)

    def close(self) -> None:
        self._service.close()


class RunningServer(Neighbour):
    """Generates with the server at the configured address."""

    queued: Queued | None = None
    cached_tokens = 0  # not told

    def __init__(self, args: argparse.Namespace) -> None:
        """Has the server resolve the model's name. Raises NoServer; ApiError when the server refuses the key."""
        engine = [f.name.replace("_", "-") for f in fields(EngineOptions) if getattr(args, f.name) is not None]
        if args.local or engine or (args.model is not None and is_path(args.model)):
            raise NoServer("--local" if args.local else f"--{engine[0]} sets up an engine" if engine else "MODEL is a file")
        super().__init__(args)
        self.model, size = named_model(args)
        try:
            self.model = self.status()["model"]
            found = next(m for m in self._ask("/api/models")["models"] if m["id"] == self.model)
            theirs: int | None = found["size_bytes"]
            self.has_template = found["chat_template"]
        except (LookupError, TypeError, ValueError, AttributeError, StopIteration):
            raise NoServer(f"what answers at {self.url} is no shimmy server of this version") from None
        if size not in (None, theirs):
            raise NoServer(f"--models-dir holds another {printable(self.model)} than the server at {self.url}")

    def _ask(self, path: str) -> dict[str, Any]:
        import http.client

        try:
            status, document = self.get(path, 5.0)
        except (OSError, http.client.HTTPException, ValueError):
            raise NoServer(f"no server answers at {self.url}") from None
        if status == 200:
            return dict(document)
        error = self._error(document)
        if error.code == "model_not_found":
            raise NoServer(f"the server at {self.url} knows no model {printable(self.model)}")
        raise error

    def _error(self, document: dict[str, Any]) -> ApiError:
        """The server's error object as an exception."""
        said = document["error"]
        if said["code"] == "unauthorized":
            return ApiError(message=f"the server at {self.url} {self.refusal}")
        error = ApiError(str(said["details"]), str(said["message"]))
        error.code = said["code"]
        return error

    def close(self) -> None:
        """A connection lasts for one answer."""

    def status(self) -> dict[str, Any]:
        return self._ask(f"/api/models/{urllib.parse.quote(self.model, safe='', errors='surrogateescape')}/status")

    def documents(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        import http.client

        try:
            with self.request("POST", "/api/generate", to_json(body | {"stream": True})) as response:
                if response.status != 200:
                    raise self._error(json.loads(response.read(MAX_BODY)))
                self.queued = Queued(self.model)
                for line in response:
                    if line.startswith(b"data: {"):
                        document = json.loads(line[6:])
                        if "error" in document:
                            raise self._error(document)
                        yield document
                    elif line.startswith(b"data: [DONE]"):
                        return
                raise GenerationFailed("The server closed the connection in mid-answer")
        except (OSError, http.client.HTTPException) as error:
            raise GenerationFailed(f"The connection to the server at {self.url} broke: {error}") from None
        except (ValueError, LookupError, TypeError):
            raise GenerationFailed(f"What the server at {self.url} answers is no stream of shimmy's") from None


TextSource = OwnEngine | RunningServer


def named_model(args: argparse.Namespace) -> tuple[str, int | None]:
    """The model's name for a server, and the size of the file that --models-dir has under that name."""
    base = os.environ.get("SHIMMY_BASE_GGUF")  # our default, whatever the server's is
    name = args.model or (base and plain_id(pathlib.Path(base).stem if is_path(base) else base)) or "default"
    if args.models_dir:
        here = Catalog([SearchRoot(os.path.expanduser(d), "--models-dir") for d in args.models_dir]).scan().models
        for model in here:
            if name == "default" or plain_id(name) == model.id:
                return model.id, model.size_bytes
    return name, None


# The prompt, and what is printed


def command_generate(args: argparse.Namespace) -> int:
    """Streams one generation, or one a line, to standard output."""
    if args.text is not None and args.prompt is not None:
        raise UsageError("the prompt is given twice: behind MODEL, and with --prompt")
    args.prompt = args.text if args.prompt is None else args.prompt
    schema = args.schema and parse_json(read_file("--schema", args.schema).encode(), f"--schema {args.schema}:")
    sampling, _ = given_sampling(args, json_schema=schema)
    path = fetch_named(args.model)
    if path != args.model:  # a hub's repository, by the id of its file: a running server may be asked for that
        args.model = plain_id(pathlib.Path(str(path)).stem)
    with contextlib.closing(choose_source(args)) as source:
        asks = args.prompt is None and not (args.lines or args.json or args.stdin)
        if args.chat and asks and sys.stdin.isatty() and sys.stdout.isatty():
            return converse(args, source, {"max_tokens": -1} | sampling)  # an answer ends where the model ends it
        if args.lines:
            return generate_lines(args, source, sampling)
        answer = Collected(source, generate_body(args, source, read_prompt(args), sampling))
        with waiting_line(source) as line:
            if args.json:
                document = answer.document()
                line.clear()
                print_json(document)
            else:
                print_answer(answer, line, args.raw)
    answer.report_speed()
    return report_cut(args, answer.last, sampling.get("max_tokens", NATIVE_DEFAULTS["max_tokens"]))


class Collected:
    """An answer as its stream's documents come: its text so far, its last document, and when its first words came."""

    def __init__(self, source: TextSource, body: dict[str, Any]) -> None:
        self._source, self._body = source, body
        self.text, self.last = "", dict[str, Any]()
        self._began, self._first = time.monotonic(), 0.0

    def texts(self) -> Iterator[str]:
        """The pieces of text, as they come. Raises ApiError."""
        self._source.queued = None
        with contextlib.closing(self._source.documents(self._body)) as documents:  # type: ignore[type-var]
            for self.last in documents:
                if text := self.last["choices"][0]["text"]:
                    self._first = self._first or time.monotonic()
                    self.text += text
                    yield text

    def document(self) -> dict[str, Any]:
        """The whole answer as one document of /api/generate."""
        for _ in self.texts():
            pass
        return {"choices": [self.last["choices"][0] | {"text": self.text}], "usage": self.last["usage"]}

    def report_speed(self) -> None:
        """Logs tokens, time to first token (a load counts) and speed, for -v."""
        if usage := self.last.get("usage"):
            seconds = time.monotonic() - self._first
            told = Usage(usage["prompt_tokens"], usage["completion_tokens"], self._source.cached_tokens, 0.0, seconds)
            log.info("%s", told.words(self._first - self._began if self._first else None))


def generate_body(args: argparse.Namespace, source: TextSource, prompt: str, sampling: dict[str, Any]) -> dict[str, Any]:
    """The /api/generate body: a chat where the model has a template, unless --raw or --chat decide."""
    chat = args.chat or (not args.raw and (source.has_template is not False or args.chat_template is not None))
    if args.tool and not chat:
        raise UsageError("--tool needs a chat: give --chat, and no --raw")
    said: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    if args.tool:
        said["tools"] = [{"type": "builtin", "name": name} for name in args.tool]
    return {"model": source.model} | said | sampling


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt: from the command line, from standard input, or from both with a newline between."""
    given = None if args.prompt in (None, "-") else decoded(os.fsencode(args.prompt), "--prompt")
    if given is not None and not args.stdin:
        note_ignored_input()
        return given
    note_keyboard()
    data = sys.stdin.buffer.read(MAX_BODY + 1)
    if len(data) > MAX_BODY:
        raise PayloadTooLarge(f"standard input is over {human_bytes(MAX_BODY)}, the most that a request may have")
    piped = decoded(data, "standard input")
    if given is None and not piped.strip():
        raise InvalidRequest("the prompt is empty: standard input gave no text", "prompt")
    return piped if given is None else f"{given}\n{piped}"


def note_keyboard() -> None:
    """Says that the prompt is read from the keyboard, if it is: the command would seem to hang."""
    if sys.stdin.isatty():
        print(f"reading standard input, end with {'Ctrl-Z and Enter' if os.name == 'nt' else 'Ctrl-D'}", file=sys.stderr)


def decoded(data: bytes, what: str) -> str:
    """UTF-8 as text; what is none is named on stderr and replaced."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        print(f"shimmy: {what} is not UTF-8 (byte {error.start}): what cannot be read becomes U+FFFD", file=sys.stderr)
        return data.decode("utf-8", "replace")


def note_ignored_input() -> None:
    """Says so when data waits in a pipe that nobody reads. It is never read: it may be the file list of a loop around us."""
    with contextlib.suppress(ImportError, OSError):  # no POSIX, or nothing that can be asked
        import fcntl
        import termios

        if stat.S_ISFIFO(os.fstat(0).st_mode) and any(fcntl.ioctl(0, termios.FIONREAD, bytes(4))):  # none at a pipe's end
            print("shimmy: standard input is ignored; --stdin appends it to the prompt", file=sys.stderr)


def waiting_line(source: TextSource) -> WaitingLine:
    """Describes the wait for a generation's first word."""

    def stage() -> str:
        if source.queued is None:
            return loading_stage(source.status()) or "reading the prompt"
        tokens = source.queued.prompt_tokens
        return f"reading {tokens:,} tokens" if tokens else "reading the prompt"

    return WaitingLine(stage)


def print_answer(answer: Collected, line: WaitingLine, raw: bool = False) -> None:
    """Each piece flushed; the last line gets its newline, with --raw on a terminal only. Raises ApiError."""
    terminal = sys.stdout.isatty()

    def write(text: str) -> None:
        """A terminal would obey what a model writes; a pipe gets it byte for byte."""
        line.clear()
        sys.stdout.buffer.write((harmless(text) if terminal else text).encode("utf-8", "replace"))
        sys.stdout.buffer.flush()

    failure = None
    try:
        for text in answer.texts():
            write(text)
    except ApiError as error:
        failure = error  # whose message gets a line of its own
    if answer.text and not answer.text.endswith("\n") and (terminal or not raw):
        write("\n")
    if failure:
        raise failure


def report_cut(args: argparse.Namespace, last: Mapping[str, Any], most: int) -> int:
    """Says so on stderr when the text was cut, and where; the exit code: a document that was cut is a failure."""
    if not last or last["choices"][0].get("finish_reason") != "length":
        return 0
    limit = f"--max-tokens {most}" if 0 <= most <= last["usage"]["completion_tokens"] else "the end of the context, see --ctx"
    what = "the JSON document is not whole: it" if args.schema else "the text"
    print(f"shimmy: {what} was cut at {limit}", file=sys.stderr)
    return 1 if args.schema else 0


# --chat without a prompt, on a terminal


CHAT_HELP = """\
/reset          forgets the conversation
/system TEXT    sets the system prompt, and forgets the conversation
/help           shows this
\"\"\"             begins a text of several lines, and ends it
Ctrl-C stops an answer, Ctrl-D ends."""


def converse(args: argparse.Namespace, source: TextSource, sampling: dict[str, Any]) -> int:
    """A chat at the keyboard, until Ctrl-D."""
    print(f"{printable(source.model)}: /help shows commands, Ctrl-D ends", file=sys.stderr)
    if isinstance(source, OwnEngine):  # a server may have better to do
        source.warm()
    use_history()
    turns: list[dict[str, Any]] = []
    while (text := read_turn()) is not None:
        command, _, rest = text.strip().partition(" ")
        if command == "/reset":
            turns = [turn for turn in turns if turn["role"] == "system"]
        elif command == "/system":
            turns = [{"role": "system", "content": rest}] if rest.strip() else []
        elif command.startswith("/") and command[1:].isalpha():
            print(CHAT_HELP if command == "/help" else "there is no such command; /help shows those there are")
        elif text.strip():
            asked = {"role": "user", "content": decoded(os.fsencode(text), "the text")}
            answer = Collected(source, generate_body(args, source, "", sampling) | {"messages": [*turns, asked]})
            answer_turn(answer, source)
            if answer.text:  # it counts even if it was stopped
                turns += [asked, {"role": "assistant", "content": answer.text}]
            answer.report_speed()
            report_cut(args, answer.last, sampling["max_tokens"])
    return 0


def read_turn() -> str | None:
    '''What was typed, perhaps several lines between """; None at the end.'''
    lines: list[str] = []
    while True:
        try:
            lines.append(input(".. " if lines else "> "))
        except KeyboardInterrupt:
            print()
            lines = []
            continue
        except EOFError:
            print()
            return None
        text = "\n".join(lines)
        if not text.startswith('"""'):
            return text
        if len(text) >= 6 and text.rstrip().endswith('"""'):
            return text.rstrip()[3:-3]


def answer_turn(answer: Collected, source: TextSource) -> None:
    """Prints the answer; Ctrl-C stops it, and an error ends no more than it."""
    with waiting_line(source) as line:
        try:
            print_answer(answer, line)
        except KeyboardInterrupt:
            print()
        except ApiError as error:
            line.clear()
            complain(error, 1)
            if error.code == ContextLengthExceeded.code:  # a server's has another class
                print("/reset begins anew", file=sys.stderr)


def use_history() -> None:
    """Editing and history for input(), where Python has readline; the file is for its owner alone."""
    path = os.path.expanduser("~/.shimmy_history")
    with contextlib.suppress(ImportError, OSError):  # Windows' console has its own
        import atexit
        import readline

        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        readline.set_history_length(1000)
        atexit.register(readline.write_history_file, path)
        readline.read_history_file(path)  # libedit refuses an empty one


# --lines


def generate_lines(args: argparse.Namespace, source: TextSource, sampling: dict[str, Any]) -> int:
    """Answers every line of standard input in order, each with one line of JSON; 1 if any failed."""
    failed = cut = tokens = 0
    began = time.monotonic()
    line = waiting_line(source)
    if sys.stdin.isatty():
        line.clear()  # it would be drawn over what is being typed
    note_keyboard()
    with line:
        for document in line_documents(args, source, sampling):
            line.clear()
            print(json.dumps(document), flush=True)
            cut += document.get("choices", [{}])[0].get("finish_reason") == "length"
            failed += "error" in document
            tokens += document.get("usage", {}).get("completion_tokens", 0)
    seconds = time.monotonic() - began
    log.info("%d tokens in %.2f s: %.1f tokens/s", tokens, seconds, tokens / max(seconds, 1e-9))
    for count, what in ((failed, "failed: see their error"), (cut, "reached --max-tokens or the context's end")):
        if count:
            print(f"shimmy: {count} line{'s' * (count != 1)} {what}", file=sys.stderr)
    return int(failed > 0 or (cut > 0 and bool(args.schema)))


def line_documents(args: argparse.Namespace, source: TextSource, sampling: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The lines' documents in order, or error objects, made as many at once as the engine batches."""
    answers: queue.Queue[queue.SimpleQueue[dict[str, Any]] | None] = queue.Queue(2 * Settings(engine_flags(args)).engine.parallel)

    def read() -> None:
        for line in prompt_lines(args):
            answer: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
            answers.put(answer)
            threading.Thread(target=work, args=(line, answer), daemon=True).start()
        answers.put(None)

    def work(line: str | ApiError, answer: queue.SimpleQueue[dict[str, Any]]) -> None:
        try:
            if isinstance(line, ApiError):
                raise line
            answer.put(Collected(source, generate_body(args, source, line, sampling)).document())
        except ApiError as error:
            answer.put(error.document())
        except Exception as error:  # a thread's border: the line's reader must hear something
            log.debug("a line failed", exc_info=True)
            answer.put(ApiError(f"{type(error).__name__}: {error}").document())

    threading.Thread(target=read, daemon=True).start()  # it may be waiting for input that never comes
    while (answer := answers.get()) is not None:
        yield answer.get()


def prompt_lines(args: argparse.Namespace) -> Iterator[str | ApiError]:
    """The prompts of --lines: each line of standard input, behind --prompt if that is given."""
    before = "" if args.prompt in (None, "-") else decoded(os.fsencode(args.prompt), "--prompt") + "\n"
    number, noted = 0, False
    try:
        while data := sys.stdin.buffer.readline(MAX_BODY + 1):
            number += 1
            if len(data) > MAX_BODY:
                yield PayloadTooLarge(f"line {number} is over {human_bytes(MAX_BODY)}")
                while data and not data.endswith(b"\n"):
                    data = sys.stdin.buffer.readline(MAX_BODY)
                continue
            line = data.decode("utf-8", "replace") if noted else decoded(data, f"line {number}")
            noted = noted or "\ufffd" in line
            line = line.rstrip("\r\n")
            yield before + line if line.strip() or before else InvalidRequest(f"line {number} is empty", "prompt")
    except OSError as error:
        yield ApiError(f"standard input cannot be read: {error.strerror}")


# main


def open_closed_streams() -> bool:
    """Opens the null device for each standard stream that is closed; returns whether stdout was.

    Otherwise the next file or socket that we open would get the stream's number.
    """
    no_stdout = sys.stdout is None
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    return no_stdout


def end_interrupted() -> int:
    """Ends this process by SIGINT, as Ctrl-C would have, so that a shell's loop ends too; 130 where there is no such end."""
    stream = next((s for s in (sys.stderr, sys.stdout) if s.isatty()), None)
    if stream:
        print(file=stream, flush=True)  # behind the terminal's ^C
    if os.name == "posix":
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return 130


def main(argv: Seq[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    no_stdout = open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name or a × must not end a command where the locale is C
            stream.reconfigure(errors="backslashreplace")
    try:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's background jobs ignore it, and so do we
            signal.signal(signal.SIGINT, signal.default_int_handler)
        args = parse(argv)
        shown, lines = logging.StreamHandler(), HarmlessFormatter("%(asctime)s %(message)s", "%H:%M:%S")
        lines.clear = "\033[K" if sys.stderr.isatty() else ""  # over what WaitingLine says
        shown.setFormatter(lines)
        logging.basicConfig(handlers=[shown], level=logging.INFO if args.verbose else logging.WARNING)
        if no_stdout and args.command != "serve":
            raise OSError("standard output is closed")
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return end_interrupted()
    except BrokenPipeError:  # `| head` has seen enough
        code = 0
    except UsageError as error:
        code = complain(error, 2)
    except (ApiError, OSError, ImportError) as error:
        code = complain(error, 1)
    try:
        sys.stdout.flush()
    except OSError:  # keeps the interpreter from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return code


def complain(error: Exception, code: int) -> int:
    """One plain line on stderr."""
    with contextlib.suppress(OSError):  # 2>&1 into a pipe that is closed
        print(f"shimmy: {harmless(' '.join(str(error).split()))}", file=sys.stderr)
    return code


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# Part II: the library. Pieces that know no request, route or model in memory; each head names what it offers.
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


# ── A. The machine ────────────────────────────────────────────────────────────────────────────────────────────────────
# Memory, cores, versions and faults of this machine, our child processes, and how sizes and foreign text are shown.
# Offers: all but what begins with _. Uses: child_command, user_cache.


def human_count(count: int) -> str:
    """1,543,000,000 as 1.5B, 260,000 as 260K."""
    for unit, size in (("", 1), ("K", 1e3), ("M", 1e6), ("B", 1e9)):
        scaled = count / size
        if round(scaled) < 1000 or unit == "B":
            break
    digits = ".0f" if scaled >= 100 or not unit else ".2g" if scaled < 10 else ".3g"
    return f"{scaled:{digits}}{unit}"


def human_bytes(count: float) -> str:
    """2254857830 as 2.1GB."""
    for unit, digits in (("B", 0), ("KB", 0), ("MB", 1), ("GB", 1)):
        if round(count, digits) < 1024 or unit == "GB":
            break
        count /= 1024
    return f"{count:.{digits}f}{unit}"


def printable(text: str, limit: int = 200) -> str:
    """Text from a file or a client, safe for a terminal and a log: escapes what does not print, cuts at `limit`."""
    if len(text) <= limit and text.isprintable():
        return text
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but line feed and tab


def harmless(text: str) -> str:
    """Text whose control characters are escaped, so that no sequence of them reaches a terminal or a log."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class HarmlessFormatter(logging.Formatter):
    """Log lines without control characters, later lines of one indented: a traceback may quote a file or a client."""

    clear = ""  # comes before each

    def format(self, record: logging.LogRecord) -> str:
        return self.clear + harmless(super().format(record)).replace("\n", "\n  ")


OWN_CGROUPS = "/proc/self/cgroup"
CGROUPS = "/sys/fs/cgroup"


def _cgroups() -> list[pathlib.Path]:
    """The directory of our control group, and those above it (cgroups(7), version 2)."""
    own: list[str] = []
    with contextlib.suppress(OSError, ValueError):
        own = re.findall(r"^0::/(.*)$", pathlib.Path(OWN_CGROUPS).read_text(), re.M)
    group = pathlib.Path(CGROUPS, *own[:1])
    return [group, *group.parents]


def available_memory() -> int | None:
    """Bytes that can be had without swapping, within the container's limit; None where nobody tells."""
    free = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        with open("/proc/meminfo") as file:
            free.append(int(next(line for line in file if line.startswith("MemAvailable:")).split()[1]) * 1024)
    for group in _cgroups():
        with contextlib.suppress(OSError, ValueError):  # ValueError: the limit is "max"
            left = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
            # the kernel gives page cache back when asked: mapped weights among it
            cached = re.findall(r"^(?:in)?active_file (\d+)$", (group / "memory.stat").read_text(), re.M)
            free.append(left + sum(map(int, cached)))
    if not free and sys.platform == "darwin":
        free += _mac_memory(output_of(["/usr/bin/vm_stat"]))
    if not free and sys.platform == "win32":
        free.append(_windows_memory())
    return max(0, min(free)) if free else None


def _mac_memory(vm_stat: str) -> Iterator[int]:
    """Free bytes by what vm_stat(1) prints: pages that are free, or that the kernel gives back when asked."""
    pages = dict(re.findall(r"^Pages (\w+): +(\d+)\.", vm_stat, re.M))
    if size := re.search(r"page size of (\d+) bytes", vm_stat):
        yield int(size[1]) * sum(int(pages.get(kind, 0)) for kind in ("free", "inactive", "speculative", "purgeable"))


def _windows_memory() -> int:
    """Free physical bytes from GlobalMemoryStatusEx (MEMORYSTATUSEX, 64 bytes; ullAvailPhys at 16)."""
    import ctypes

    status = ctypes.create_string_buffer(64)
    struct.pack_into("<I", status, 0, 64)
    vars(ctypes)["windll"].kernel32.GlobalMemoryStatusEx(status)
    return int(struct.unpack_from("<Q", status, 16)[0])


def resident_bytes(pids: Iterable[int]) -> int:
    """Resident bytes of the processes together; those that are gone count nothing."""
    pids = list(pids)
    if os.path.isdir("/proc/self"):
        return sum(_proc_pages(pid, 1) for pid in pids)
    if sys.platform == "win32":
        tasklist = os.path.join(os.environ.get("SYSTEMROOT", "C:\\Windows"), "System32", "tasklist.exe")
        return _windows_resident(output_of([tasklist, "/fo", "csv", "/nh"]), pids)
    return sum(int(n) for n in output_of(["/bin/ps", "-o", "rss=", "-p", ",".join(map(str, pids))]).split()) * 1024


def _windows_resident(tasklist: str, pids: Seq[int]) -> int:
    """Bytes by tasklist's rows: "name","PID","session","number","12.345 K", with a separator by the user's language."""
    rows = re.findall(r'^"[^"]*","(\d+)","[^"]*","[^"]*","([^"]*)"', tasklist, re.M)
    return sum(int("0" + re.sub(r"\D", "", size)) * 1024 for pid, size in rows if int(pid) in pids)


def output_of(command: Seq[str], seconds: float | None = None) -> str:
    """What a command writes to stdout. Its program is named by its whole path: the working directory may hold another.

    Raises OSError when it cannot be started, subprocess.TimeoutExpired when it takes longer than `seconds`.
    """
    import subprocess

    # no shell, and nothing from a client is on the command line
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds).stdout  # noqa: S603  # nosec B603


_starting = threading.Lock()


@functools.cache
def _parent_thread() -> Executor:
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(1, "children")


def start_child(entry: str) -> tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]:
    """Starts a process of ours that runs `entry`: the process, its stdout and its stdin.

    One thread starts them all and lives as long as this process: its end is theirs (die_with_parent). Raises OSError;
    RuntimeError when there is no thread to be had, or the interpreter ends.
    """
    import subprocess

    with _starting:
        thread = _parent_thread()
    own_session = os.name == "posix"
    child = thread.submit(
        subprocess.Popen, child_command(entry), stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=own_session
    ).result()
    assert child.stdin and child.stdout
    return child, child.stdout, child.stdin


def die_with_parent() -> None:
    """Linux kills this child when the thread that started it ends (prctl(2)), even while it is stopped (SIGSTOP).

    Elsewhere, and if the parent died before, the end of the pipe tells.
    """
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, ctypes.c_ulong(signal.SIGKILL))  # PR_SET_PDEATHSIG, linux/prctl.h


def mapped_bytes(pids: Iterable[int]) -> int:
    """Resident bytes of files that the processes have mapped, weights above all; 0 where nobody tells."""
    return sum(_proc_pages(pid, 2) for pid in pids)


def _proc_pages(pid: int, column: int) -> int:
    """A column of /proc/PID/statm in bytes: 1 is what is resident, 2 what of it belongs to files (proc(5))."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[column]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def processors() -> set[int]:
    """Those this process may use, hyperthreads too."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """Cores this process may use, hyperthreads counted once: llama.cpp's kernels gain nothing from the second."""
    allowed, cores = processors(), set()
    for cpu in allowed:
        with contextlib.suppress(OSError):
            cores.add(pathlib.Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
    count = len(cores) or len(allowed)
    for group in _cgroups():
        with contextlib.suppress(OSError, ValueError):  # ValueError: the quota is "max"
            quota, period = (group / "cpu.max").read_text().split()
            count = min(count, max(1, int(quota) // int(period)))
    return count


def versions() -> dict[str, Any]:
    """Versions of what matters, without importing any of it."""
    import importlib.metadata
    import platform

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "version": __version__, "python": platform.python_version(), "platform": platform.platform(),
        "llama_cpp": version("llama-cpp-python"), "websockets": version("websockets"), "jinja2": version("jinja2"),
        "numpy": version("numpy"), "cpu_cores": physical_cores(),
    }  # fmt: skip


GPU_SIGNS = {  # files that a driver brings, and the option that builds llama.cpp for its GPU
    "/proc/driver/nvidia/version": ("an NVIDIA", "CUDA"),
    os.path.join(os.environ.get("SYSTEMROOT", ""), "System32", "nvcuda.dll"): ("an NVIDIA", "CUDA"),
    "/dev/kfd": ("an AMD", "HIP"),
}


def machine_gpu() -> tuple[str, str] | None:
    """The kind of GPU that the machine has, and llama.cpp's name for its backend; without asking any library."""
    if sys.platform == "darwin" and os.uname().machine == "arm64":
        return "Apple's", "METAL"
    return next((gpu for sign, gpu in GPU_SIGNS.items() if os.path.exists(sign)), None)


_asking_build = threading.Lock()
_known_build: dict[str, Any] = {}


def engine_build() -> dict[str, Any]:
    """CPU features and GPU offload of the installed llama.cpp; asked until it answers, by one thread at a time.

    A child asks, as a broken library may crash.
    """
    import subprocess

    with _asking_build:
        if not _known_build:
            try:
                _known_build.update(json.loads(output_of(child_command("build_main"), 60)))
            except (OSError, ValueError, subprocess.SubprocessError):
                return {"engine": "not usable: is llama-cpp-python installed?", "gpu_offload": False, "devices": []}
        return dict(_known_build)


def _machine_signs() -> Iterator[str]:
    """Tells this machine and build apart from others: the processor, GPU drivers, and the library's files."""
    import importlib.util
    import platform

    yield from (platform.machine(), platform.processor(), platform.release())
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        yield from (line for line in itertools.islice(file, 30) if line.startswith(("model name", "flags", "Features")))
    for sign in GPU_SIGNS:
        with contextlib.suppress(OSError):
            yield pathlib.Path(sign).read_text() if sign.startswith("/proc") else str(os.stat(sign).st_mtime_ns)
    spec = importlib.util.find_spec("llama_cpp")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for library in sorted(pathlib.Path(folder, "lib").glob("*")):
            yield f"{library.name} {(_stamp(str(library)) or ())[2:]}"  # not the device, which may differ after a restart


class KnownFaults:
    """What native code was found not to do on this machine with this build of llama-cpp-python: JSON in the user's cache.

    Each machine and build has a file of its own: a home directory may be on a network, and a driver or library that
    changes may have been mended. Any thread and several processes may use it; one that is damaged counts as empty.
    """

    def __init__(self, path: str | None = None) -> None:
        self._lock = threading.RLock()
        if path:
            self.path = path

    @functools.cached_property
    def path(self) -> str:
        import hashlib

        key = hashlib.sha256("\n".join(_machine_signs()).encode()).hexdigest()[:16]
        return os.path.join(user_cache(), f"known-faults-{key}.json")

    def read(self) -> dict[str, dict[str, Any]]:
        """What is known: `kernels`, a fault or "" by name, and `rungs`, a Rung and its reason by kind of model."""
        with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):
            known = json.loads(pathlib.Path(self.path).read_text(encoding="utf-8"))
            return {kind: found for kind, found in known.items() if isinstance(found, dict)}
        return {}

    def note(self, kind: str, found: Mapping[str, Any]) -> None:
        """Adds to what is known of a kind. A folder that cannot be written only costs the finding out again."""
        with self._lock, contextlib.suppress(OSError):
            known = self.read()
            known[kind] = known.get(kind, {}) | dict(found)
            os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
            part = f"{self.path}.{os.getpid()}"
            pathlib.Path(part).write_text(json.dumps(known, indent=1), encoding="utf-8")
            os.replace(part, self.path)

    def kernels(self) -> tuple[dict[str, str], bool]:
        """The CPU's special kernels of llama.cpp by name, and what is wrong with each, "" for a good one; whether that is new.

        They are tried once on a machine with a build; whoever asks first waits for that, a quarter of a second.
        """
        with self._lock:
            known = self.read().get("kernels")
            if known is not None and all(isinstance(fault, str) for fault in known.values()):
                return known, False
            found = try_kernels()
            if found is not None:
                self.note("kernels", found)
        return found or {}, True


KERNEL_SECONDS = 60.0  # for all of them: what takes 0.2 s, on a machine that others keep busy


def try_kernels() -> dict[str, str] | None:
    """Tries each of the CPU's special kernels in a child, as a broken one ends the process or never comes back.

    None where none can be tried, without llama.cpp for instance.
    """
    import subprocess

    found: dict[str, str] = {}
    while True:
        command = child_command("kernels_main", *found)
        try:
            # no shell, and nothing from a client is on the command line
            done = subprocess.run(command, capture_output=True, timeout=KERNEL_SECONDS)  # noqa: S603  # nosec B603
            said, fault, code = done.stdout, ending(done.returncode), done.returncode
        except subprocess.TimeoutExpired as error:
            said, fault, code = error.stdout or b"", "hangs", -signal.SIGSEGV
        except (OSError, subprocess.SubprocessError):
            return None
        rows = [line.partition("\t") for line in said.decode("utf-8", "replace").splitlines()]
        if code and not (has_crashed(code) and rows and not rows[-1][1]):
            return None  # it ended at nothing that was tried
        found |= {name: words if tab else fault for name, tab, words in rows}
        if not code:
            return found


def ending(code: int | None) -> str:
    """How a process ended, by its exit status (subprocess): "signal 11" or "exit status 1"."""
    return f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"


def has_crashed(code: int | None) -> bool:
    """True if a process's exit status tells of a crash in native code: a signal of its own, or an exception of Windows."""
    own_signal = code is not None and code < 0 and -code not in (signal.SIGINT, signal.SIGTERM, KILLED)
    return own_signal or (code or 0) >= 0xC0000000


KILLED = 9  # SIGKILL, which Windows has no name for: from outside, by a system without memory mostly


# ── B. GGUF headers ───────────────────────────────────────────────────────────────────────────────────────────────────
# The header of a model file, read by a bounded reader that trusts no count or length in it, and the memory it asks for.
# Offers: read_gguf_header, GgufHeader, GgufError, open_regular; KvShape, kv_shape, read_weights, place. Uses: EMBEDDERS (3).


class GgufError(Exception):
    """The file cannot be served; the message says why."""


def open_regular(path: str) -> BinaryIO:
    """Opens a regular file for reading, unbuffered. Raises GgufError for a pipe, a device or a directory.

    O_NONBLOCK: opening a pipe that nobody writes to would wait for ever; the check afterwards is of what was opened.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise GgufError("not a regular file")
    return open(descriptor, "rb", buffering=0)


class HeaderReader:
    """Reads a GGUF header front to back, trusting no count or length beyond the file's size.

    Plain reads, not a memory map: a file cut short while it is mapped would kill the process with SIGBUS.
    """

    SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    KEEP_STRING = MIB  # chat templates reach 20 kB
    KEEP_STRINGS = 8 * MIB  # of all strings together
    KEEP_ARRAY = 1024  # per-layer numbers; vocabularies are skipped
    MAX_PAIRS = 16_384  # models have about 50
    MAX_TENSORS = 262_144  # 60 layers of 384 experts, each in three tensors of its own, are 70,000
    SECONDS = 2.0  # of processor time for one model; the largest vocabulary takes 0.1

    def __init__(self, file: Any, deadline: float) -> None:
        self.size = os.fstat(file.fileno()).st_size
        self.file, self.deadline = io.BufferedReader(file, 64 * 1024), deadline  # on time.thread_time's clock
        self.kept = 0  # bytes of strings

    def check_time(self) -> None:
        if time.thread_time() > self.deadline:
            raise GgufError(f"the header takes more than {self.SECONDS:.0f} s to read")

    def read(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) < count:
            raise GgufError("the header is truncated")
        return data

    def skip(self, count: int) -> None:
        if count > self.size:
            raise GgufError("the header is truncated")
        self.file.seek(count, os.SEEK_CUR)

    def unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack("<" + form, self.read(struct.calcsize("<" + form)))

    def string(self) -> str:
        """The next string, or its first KEEP_STRING bytes."""
        self.check_time()  # each pair and each tensor begins with one
        (length,) = self.unpack("Q")
        keep = min(length, self.KEEP_STRING)
        self.kept += keep
        if self.kept > self.KEEP_STRINGS:
            raise GgufError(f"the header holds more than {self.KEEP_STRINGS // MIB} MiB of text")
        raw = self.read(keep)
        self.skip(length - keep)
        return raw.decode("utf-8", "replace")

    def skip_strings(self, count: int) -> None:
        """Steps over `count` strings; the hot loop of a whole header (300,000 of them in a large vocabulary)."""
        read, seek, size, whole = self.file.read, self.file.seek, self.size, int.from_bytes
        for number in range(count):
            if not number & 0xFFFF:
                self.check_time()
            length = whole(head := read(8), "little")
            if len(head) < 8 or length > size:
                raise GgufError("the header is truncated")
            seek(length, 1)

    def value(self, kind: int) -> Any:
        """One metadata value; long arrays are skipped and give None."""
        if kind in self.SCALARS:
            return self.unpack(self.SCALARS[kind])[0]
        if kind == 8:
            return self.string()
        if kind != 9:
            raise GgufError(f"the header has a value of unknown type {kind}")
        inner, count = self.unpack("IQ")
        if inner == 8:
            return self.skip_strings(count)
        if inner not in self.SCALARS:
            raise GgufError(f"the header has an array of unknown type {inner}")
        if count > self.KEEP_ARRAY:
            return self.skip(count * struct.calcsize("<" + self.SCALARS[inner]))
        return self.unpack(f"{count}{self.SCALARS[inner]}")


@dataclass(frozen=True)
class GgufHeader:
    """A GGUF file's own words: metadata, tensor count and, when read whole, the tensors."""

    metadata: Mapping[str, Any]
    tensor_count: int
    complete: bool  # False: reading stopped at the vocabulary
    parameters: int = 0  # summed over the tensors, when complete
    tensors: tuple[tuple[str, int], ...] = ()  # names and bytes, when complete


# elements and bytes of a block, by ggml_type (ggml.h)
BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
          10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
          16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
          23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
          34: (256, 54), 35: (256, 66), 39: (32, 17)}  # fmt: skip


def read_gguf_header(path: str, whole_header: bool = True, deadline: float | None = None) -> GgufHeader:
    """A GGUF file's header; not `whole_header` stops before the vocabulary (0.05 ms instead of up to 100 ms).

    Raises GgufError with the reason when the file is no GGUF of version 2 or 3, or is damaged or cut; OSError as open() does.
    """
    with open_regular(path) as file:
        reader = HeaderReader(file, deadline or time.thread_time() + HeaderReader.SECONDS)
        magic, version, tensors, pairs = reader.unpack("4sIQQ")
        if magic != b"GGUF":
            raise GgufError("not a GGUF file (wrong magic)")
        if not version & 0xFFFF:
            raise GgufError("big-endian GGUF file, for another kind of machine")
        if version not in (2, 3):
            raise GgufError(f"GGUF version {version} is not supported (2 and 3 are)")
        if pairs > reader.MAX_PAIRS or tensors > reader.MAX_TENSORS:
            raise GgufError(f"the header states {pairs} metadata pairs and {tensors} tensors, more than any model has")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key, (kind,) = reader.string(), reader.unpack("I")
            if kind == 9 and key.startswith("tokenizer.") and not whole_header:
                return GgufHeader(metadata, tensors, complete=False)
            metadata[key] = reader.value(kind)
        parameters, end, found = _read_tensors(reader, tensors, metadata.get("general.alignment", 32))
        if found and end > reader.size:
            raise GgufError(f"truncated: {reader.size} of {end} bytes")
        return GgufHeader(metadata, tensors, True, parameters, found)


def _read_tensors(reader: HeaderReader, count: int, alignment: Any) -> tuple[int, int, tuple[tuple[str, int], ...]]:
    """Parameters in all tensors, where in the file the last one ends, and names and bytes of each."""
    parameters, end, found = 0, 0, []
    for _ in range(count):
        name, (dimensions,) = reader.string(), reader.unpack("I")
        if dimensions > 8:
            raise GgufError("the header describes a tensor of impossible shape")
        *shape, kind, offset = reader.unpack(f"{dimensions}QIQ")
        block, width = BLOCKS.get(kind, (1, 0))
        parameters += math.prod(shape)
        found.append((name, math.prod(shape) // block * width))
        end = max(end, offset + found[-1][1])
    if not isinstance(alignment, int) or alignment < 1:
        raise GgufError("general.alignment is no number of bytes")
    return parameters, end - (-reader.file.tell() // alignment * alignment), tuple(found)


# What a model takes in memory, and what of it goes where

KV_WIDTHS = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}  # bytes of a number in the KV cache, by --kv-type
GRAPH_BYTES = 128 * MIB  # of a context beside its KV cache: the graph's buffers, and logits


@dataclass(frozen=True)
class KvShape:
    """What a model keeps of a text in each layer: numbers of the KV cache for a token, bytes of recurrent state a sequence."""

    layers: tuple[int, ...] = ()  # keys and values; 0 where a layer has none
    states: tuple[int, ...] = ()  # 0 where a layer has none

    def token_bytes(self, kv_type: str, first: int = 0) -> float:
        """Bytes of a token in the layers from `first` on."""
        return sum(self.layers[first:]) * KV_WIDTHS[kv_type]

    def state_bytes(self, sequences: int, first: int = 0) -> int:
        """Bytes of all sequences' states in the layers from `first` on."""
        return sum(self.states[first:]) * sequences


def kv_shape(meta: Mapping[str, Any], architecture: str) -> KvShape | None:
    """A model's KvShape by its header, as llama-kv-cache.cpp and llama-hparams.cpp have it; None if the header is odd."""

    def said(name: str, default: Any = 0) -> Any:
        return meta.get(f"{architecture}.{name}", default)

    def each(value: Any) -> list[int]:
        """A value for each layer. Raises ValueError unless it is one or more whole numbers."""
        listed = list(value) if isinstance(value, tuple) else [value] * n_layer
        if not all(isinstance(n, int) and 0 <= n < 1 << 24 for n in listed):
            raise ValueError
        return [*listed, *[0] * n_layer][:n_layer]

    if architecture in EMBEDDERS or said("attention.causal", None) is False:
        return KvShape()
    n_layer = said("block_count")
    if not isinstance(n_layer, int) or not 0 < n_layer <= 4096:
        return None
    try:
        (width, *_), heads = each(said("embedding_length")), each(said("attention.head_count"))
        kv_heads = each(said("attention.head_count_kv", heads[0]))
        usual = width // max(heads) if max(heads) else 0
        sizes = [sum(each(said(f"attention.{part}_length{suffix}", said(f"attention.{part}_length", usual)))[0]
                     for part in (("key",) if said("attention.key_length_mla") else ("key", "value")))
                 for suffix in ("", "_swa")]  # fmt: skip
        borrowers = each(said("attention.shared_kv_layers", max(0, n_layer - 20) if architecture == "gemma3n" else 0))[0]
        state = _state_bytes(lambda name: each(said(name))[0], width, max(heads))
    except ValueError:
        return None
    windows = _layers(said("attention.sliding_window_pattern"), [False] * n_layer)
    stated = said("attention.recurrent_layers", said("full_attention_interval"))
    recurrent = _layers(stated, [not heads for heads in kv_heads])  # which keep a state in place of keys and values
    with_keys = [not r and i < n_layer - borrowers for i, r in enumerate(recurrent)]  # the last ones may read those before them
    layers = tuple(n * sizes[w] * k for n, w, k in zip(kv_heads, windows, with_keys, strict=True))
    states = tuple(state * (r or not any(recurrent)) for r in recurrent)
    return KvShape(layers, states) if any(layers) or any(states) else None


def _layers(stated: Any, usual: list[bool]) -> list[bool]:
    """Which layers are of a kind: stated for each, or all but every n-th, else the usual ones."""
    if isinstance(stated, tuple):
        return [*map(bool, stated), *[False] * len(usual)][: len(usual)]
    if isinstance(stated, int) and stated > 0:
        return [i % stated != 0 for i in range(1, len(usual) + 1)]
    return usual


def _state_bytes(said: Callable[[str], int], width: int, heads: int) -> int:
    """Bytes of a sequence's state in one recurrent layer, in 32-bit floats: RWKV's, LFM2's, delta attention's or Mamba's."""
    names = ("wkv.head_size", "shortconv.l_cache", "kda.head_dim", "ssm.conv_kernel", "ssm.inner_size", "ssm.state_size",
             "ssm.group_count", "token_shift_count")  # fmt: skip
    head, cached, delta, kernel, inner, state, groups, shifts = map(said, names)
    if head:
        return 4 * width * ((shifts or 2) + head)
    if cached:
        return 4 * width * (cached - 1)
    if delta:
        return 4 * heads * delta * (3 * max(kernel - 1, 3) + delta)
    return 4 * (max(kernel - 1, 0) * (inner + 2 * groups * state) + state * inner)


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's tensors."""

    layers: tuple[tuple[int, int], ...]  # of each layer, and how many of these are its experts'
    output: int  # behind the last layer; the same tensor may be the input layer's, which stays on the CPU


def read_weights(paths: Iterable[str]) -> Weights:
    """The weights by the headers of a model's files. Raises GgufError, OSError."""
    tensors = [tensor for path in paths for tensor in read_gguf_header(path).tensors]
    layers: dict[int, tuple[int, int]] = {}
    output = sum(size for name, size in tensors if name.startswith("output"))
    if not any(name == "output.weight" for name, _ in tensors):
        output += sum(size for name, size in tensors if name == "token_embd.weight")
    for name, size in tensors:
        if found := re.match(r"blk\.(\d{1,4})\.", name):
            total, experts = layers.get(int(found[1]), (0, 0))
            layers[int(found[1])] = total + size, experts + size * bool(re.search(EXPERTS, name))
    return Weights(tuple(layers.get(i, (0, 0)) for i in range(max(layers, default=-1) + 1)), output)


EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch)?exps"  # in the names of experts' tensors, which take the most and work the least


@dataclass(frozen=True)
class Placement:
    """Where a model's parts go."""

    gpu_layers: int = 0  # the last ones; one more with the output
    cpu_moe: int = 0  # the first layers, whose experts stay on the CPU
    pool: int = 0  # tokens in the KV cache


def place(weights: Weights, kv: KvShape, gpus: Seq[int], ctx: int, pool: int, kv_type: str, sequences: int, compute: int,
          gpu_layers: int | None = None, cpu_moe: int | None = None, share: float = 1.0) -> Placement:  # fmt: skip
    """Fits a model onto GPUs with so many free bytes each: a smaller pool first, then experts on the CPU, then fewer layers.

    That order costs the least speed (llama-server's --fit has it too). A twentieth of each GPU stays free, and `compute`
    bytes for buffers. One sequence must have `ctx` tokens, and all together would like `pool`. None for `gpu_layers` means
    as many as fit, for `cpu_moe` as few as must be; `share` is of the layers that would fit.
    """
    count = len(weights.layers)
    each = [total + kv.state_bytes(sequences) // max(count, 1) for total, _ in weights.layers]
    room = sum(max(0, free - free // 20 - compute) for free in gpus) - (len(gpus) - 1) * max(each, default=0)

    def fits(layers: int, moe: int, tokens: int) -> bool:
        first = max(0, count - layers)
        experts = sum(e for _, e in weights.layers[first:moe])
        need = sum(total for total, _ in weights.layers[first:]) - experts + (weights.output if layers > count else 0)
        return need + kv.token_bytes(kv_type, first) * tokens + kv.state_bytes(sequences, first) <= room

    def most(layers: int, moe: int) -> int:
        """The largest pool, in steps of an eighth of a context."""
        step = max(1, ctx // 8)
        return next((p for p in range(pool, ctx, -step) if fits(layers, moe, p)), ctx)

    moe, mixture = cpu_moe or 0, any(experts for _, experts in weights.layers)
    if gpu_layers is not None:
        layers = count + 1 if gpu_layers < 0 else gpu_layers
        return Placement(int(layers * share), moe, most(layers, moe))
    all_moe = count if mixture and cpu_moe is None else moe
    tries = [(count + 1, m) for m in range(moe, all_moe + 1)] + [(n, all_moe) for n in range(count, 0, -1)]
    layers, moe = next(((n, m) for n, m in tries if fits(n, m, ctx)), (0, moe))
    return Placement(int(layers * share), moe, most(layers, moe) if layers else pool)


# ── C. Formats ────────────────────────────────────────────────────────────────────────────────────────────────────────
# How a model writes thoughts and calls, derived from its own template, and the parser that reads its text by that.
# Offers: Derivation, a template's ChatFormat; Parser and ChatParser, which turn text into events; JsonMender, as_json.
# Uses: CallFormat and Rendering (4), argument_types (E.3).


@dataclass(frozen=True)
class Derivation:
    """A task for a helper: how a model writes thoughts and calls, read off what its template makes of known ones.

    The template renders a turn of the assistant's with a known thought, and one with two known calls. What stands between
    the known words is the format; what a turn without them has too belongs to the turn.
    """

    NAMES: ClassVar = ("first_tool", "second_tool")
    ARGUMENTS: ClassVar = ({"key_a": "value a", "key_b": "value b"}, {"key_a": 7351, "key_b": "value d"})
    IDS: ClassVar = (("callid001", "callid002"), ("functions.first_tool:0", "functions.second_tool:1"))  # Kimi: name in id
    CONTENT: ClassVar = "some content"
    THOUGHT: ClassVar = "some thought"
    USER: ClassVar = "some question"

    templates: Mapping[str, str]
    bos: str
    eos: str
    ends: tuple[str, ...]  # names of the tokens that end a turn

    def run(self) -> ChatFormat:
        found = self._thought()
        for mark, row in FAMILIES:
            if any(mark in t for t in self.templates.values()):
                found |= row | ({"calls": (*row["calls"], HERMES)} if "calls" in row else {})
        with contextlib.suppress(Exception):
            found.setdefault("calls", self._calls(found.get("thought") or ChatFormat.thought))
        return ChatFormat(**{k: v for k, v in found.items() if v})

    def _turn(self, offered: bool = True, native: bool = False, generation: bool = False, **said: Any) -> str:
        """Renders a turn of the assistant's: the text behind the user's turn."""
        parameters = {"type": "object", "properties": {k: {"type": "string", "description": k} for k in self.ARGUMENTS[0]}}
        tools = [{"type": "function", "function": {"name": n, "description": n, "parameters": parameters}} for n in self.NAMES]
        messages = [{"role": "user", "content": self.USER}, {"role": "assistant", "content": "", **said}]
        messages, tools = messages[: 1 if generation else 2], tools if offered else []
        text = Rendering(self.templates, self.bos, self.eos, messages, tools, {}, generation, native).run()
        return text[text.rindex(self.USER) + len(self.USER) :]

    def _thought(self) -> dict[str, Any]:
        """The field of a message in which the template looks for its thought; the markers around it, from the last one before
        it up to the first one behind."""
        for name in THOUGHT_FIELDS:
            with contextlib.suppress(Exception):  # a template may raise anything
                said: dict[str, Any] = {"content": self.CONTENT, name: self.THOUGHT}
                before, thought, rest = self._turn(**said).partition(self.THOUGHT)
                if thought:
                    between, content, _ = rest.partition(self.CONTENT)
                    opens = [m.start() for m in MARKER.finditer(before) if m[0][0] in "<[" and len(m[0]) > 2]
                    closes = [m.end() for m in MARKER.finditer(between) if m[0][0] in "<[" and len(m[0]) > 2]
                    is_marked = content and opens and closes
                    return {"thought_field": name,
                            "thought": is_marked and (before[opens[-1] :].strip(), between[: closes[0]].strip())}
        return {}

    def _calls(self, thought: tuple[str, str]) -> tuple[CallFormat, ...]:
        """As the template writes calls; where it does not show all there is to show, also as our own words for it do."""
        for offered, native in ((True, True), (False, True), (True, False)):
            for ids, count in itertools.product(self.IDS, (2, 1)):  # some templates refuse two calls a turn, or drop one
                with contextlib.suppress(Exception):
                    text = self._with_calls(ids[:count], thought, offered, native)
                    if count == 1 or self.NAMES[1] in text:
                        return (self._read(text),) if offered and count == 2 else (self._read(text), HERMES)
        return ()

    def _with_calls(self, ids: Seq[str], thought: tuple[str, str], offered: bool, native: bool) -> str:
        """The part of a turn that makes calls: without its content and thought, its beginning and end."""
        calls = [{"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
                 for id, name, arguments in zip(ids, self.NAMES, self.ARGUMENTS, strict=False)]  # fmt: skip
        header, _, end = self._turn(offered, content=self.CONTENT).partition(self.CONTENT)
        begin = self._turn(offered, generation=True)
        texts = []
        with contextlib.suppress(Exception):  # some templates take no content beside calls
            beside = self._turn(offered, native, content=self.CONTENT, tool_calls=calls).partition(self.CONTENT)[2]
            texts.append(beside[len(common_prefix(beside, end)) :])
        with contextlib.suppress(Exception):  # some want it
            alone = self._turn(offered, native, tool_calls=calls)
            texts.append(alone[max(len(common_prefix(alone, header)), len(common_prefix(alone, begin))) :])
        texts = [self._calls_in(text, thought[1], end) for text in texts if self.NAMES[0] in text]
        opens = [t[: t.index(self.NAMES[0])] for t in texts]
        text = texts[min(range(len(texts)), key=lambda i: (not opens[i].strip(), len(opens[i])))]
        if ids[0].startswith("functions."):
            return text
        return functools.reduce(lambda t, id: t.replace(id, ID), ids, text)

    def _calls_in(self, text: str, closes: str, end: str) -> str:
        """The text behind a thought before the calls (some templates write an empty one), without what ends every turn."""
        at = text.rfind(closes, 0, text.index(self.NAMES[0]))
        text = text[at + len(closes) :] if at >= 0 else text
        last = text.rindex("value ")
        cuts = [at for mark in (*self.ends, self.eos) if mark and (at := text.find(mark, last)) >= 0]
        return text[: min(cuts, default=len(text))].removesuffix(common_suffix(text, end))

    def _read(self, text: str) -> CallFormat:
        """The format of the one or two calls that stand in `text`. Raises ValueError where it makes no sense."""
        ends, starts = [], [text.index(n) for n in self.NAMES if n in text]
        named = []
        for at, name in zip(starts, self.NAMES, strict=False):
            key = text.index("key_a", at)
            object = re.search(r'\{\s*"$', text[:key])
            if not object or not re.match(r'key_a"\s*:', text[key:]):
                return self._with_params(text, starts)
            named.append(text[at + len(name) : object.start()])
            ends.append(json.JSONDecoder().raw_decode(text, object.start())[1])
        again = text[ends[0] : starts[1]] if len(starts) == 2 else ""
        format = CallFormat(text[: starts[0]], differing(named), text[ends[-1] :], again)
        for brace in re.finditer(r"\{", format.opens):
            with contextlib.suppress(ValueError):
                value, end = json.JSONDecoder().raw_decode(text, brace.start())
                if end > ends[0]:
                    return self._in_object(value, brace.start(), format)
        if not format.opens.strip():
            raise ValueError("nothing tells where a call begins")
        return format

    def _in_object(self, value: Any, brace: int, format: CallFormat) -> CallFormat:
        """A format in which name and arguments stand in one JSON object, perhaps one level down."""
        for object in (value, *(v for v in value.values() if isinstance(v, dict))):
            keys = {json.dumps(v): k for k, v in object.items()}
            name, arguments = keys.get(json.dumps(self.NAMES[0])), keys.get(json.dumps(self.ARGUMENTS[0]))
            if self.NAMES[0] in object or (name and arguments):
                pair = ("", "") if self.NAMES[0] in object else (str(name), str(arguments))
                again = format.again[: format.again.find("{")] if format.again else ""
                return replace(format, opens=format.opens[:brace], head=format.opens[brace:], again=again, keys=pair)
        raise ValueError("the call's object holds no name")

    def _with_params(self, text: str, starts: list[int]) -> CallFormat:
        """A format in which arguments stand one by one."""
        between, at = [], [starts[0] + len(self.NAMES[0])]
        for word in ("key_a", "value a", "key_b", "value b"):
            at.append(text.index(word, at[-1]) + len(word))
            between.append(text[at[-2] : at[-1] - len(word)])
        named, keyed, after, _ = between
        named = differing([named, *(text[s + len(self.NAMES[1]) : text.index("key_a", s)] for s in starts[1:])])
        opens = common_suffix(named, after)
        quote = next((q for q in ('<|"|>', "'", '"') if keyed.endswith(q) and after.startswith(q)), "")
        keyed, after = keyed.removesuffix(quote), after.removeprefix(quote).removesuffix(opens)
        if len(starts) == 2:  # what tells a number from a string is left open
            keyed = differing([keyed, text[text.index("key_a", starts[1]) + 5 : text.index("7351", starts[1])]])
        params = Params(opens, keyed, after.replace("key_a", KEY), quote)
        rest = [text[at[-1] : starts[1]], text[text.index("value d") + 7 :]] if len(starts) == 2 else ["", text[at[-1] :]]
        last = after.replace("key_a", "key_b")
        again, closes = (r[len(quote) :] if quote else r[len(common_prefix(r, last)) :] for r in rest)
        if not text[: starts[0]].strip():
            raise ValueError("nothing tells where a call begins")
        return CallFormat(text[: starts[0]], named.removesuffix(opens), closes, again, params=params)


def differing(texts: Seq[str]) -> str:
    """The common beginning and end of the first and last text, with ANY between them."""
    first, last = texts[0], texts[-1]
    if first == last:
        return first
    begin = common_prefix(first, last)
    end = common_suffix(first[len(begin) :], last[len(begin) :])
    return begin + ANY + end


class Parser:
    """Reads one choice's text, as it comes, into events. This one takes all of it for content."""

    def __init__(self, index: int) -> None:
        self.index = index

    def push(self, text: str, logprobs: tuple[TokenLogprob, ...] = ()) -> Iterator[Event]:
        """The events of some more text; pieces may split anywhere."""
        yield Text(self.index, text, logprobs)

    def finish(self, reason: str) -> Iterator[Event]:
        """Flushes text that was held back, and ends the choice."""
        yield ChoiceEnd(self.index, reason)


Reading = Generator[None, None, Any]  # a coroutine that waits for text at each yield
MAX_HEADER = 512  # characters from a call's marker to its arguments, or that stand for nothing in a call
MAX_EARLY = 64 * 1024  # of arguments that stand before the name


_BLANK, _STRING = r"[ \t\r\n]*", r'"[^"\\\x00-\x1f]*"'
_NUMBER = r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?"
_SCALAR = f"(?:{_STRING}|{_NUMBER}|true|false|null)"
_PAIR = rf"{_STRING}{_BLANK}:{_BLANK}{_SCALAR}{_BLANK}"
_FLAT = (rf"\[{_BLANK}(?:{_SCALAR}{_BLANK}(?:,{_BLANK}{_SCALAR}{_BLANK})*)?\]"
         rf"|\{{{_BLANK}(?:{_PAIR}(?:,{_BLANK}{_PAIR})*)?\}}")  # fmt: skip
_VALUE = rf"(?:{_FLAT}|(?:{_NUMBER}|true|false|null)(?=[ \t\r\n,\]}}]))"
_WORD = r"""[^\s,:=;\[\]{}()"'<]+"""
_PAIRS = rf"{_STRING}{_BLANK}:{_BLANK}(?:{_VALUE}|{_STRING})"
_PAIRS += rf"(?:{_BLANK},{_BLANK}{_PAIRS})*"
JSON_TOKEN = re.compile(  # a piece of JSON text, as large as a pattern can tell, or of what looks like it
    rf"(?P<pairs>{_PAIRS})|(?P<string>{_STRING})|(?P<value>{_VALUE})|(?P<open>[{{\[(])|(?P<close>[}}\])])|(?P<equals>=)"
    rf"|(?P<blank>[ \t\r\n]+)|(?P<word>{_WORD})|.", re.S)  # fmt: skip


class JsonMender:
    """Makes JSON, as it comes, of what models write for it: with Python's words and quotes, raw line breaks, unquoted
    words, trailing commas.

    `quotes` are those that strings may have beside JSON's. With `closes` the value is an object whose opening bracket has
    been read, and this one ends it.
    """

    WANTED: ClassVar = {"pairs": ("key",), "string": ("key", "value", "element"), "value": ("value", "element"),
                        "open": ("value", "element"), "close": (",", "key", "element"), "equals": (":",)}  # fmt: skip
    STRING, WORD = re.compile(_STRING), re.compile(_WORD)
    PLAIN: ClassVar = {'"': re.compile(r'[^"\\\x00-\x1f]+'), "'": re.compile(r"""[^"'\\\x00-\x1f]+""")}
    ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
    NUMBER = re.compile(_NUMBER)
    WORDS: ClassVar = {"True": "true", "False": "false", "None": "null"} | {w: w for w in ("true", "false", "null")}
    BRACKETS: ClassVar = {"{": "}", "[": "]", "(": ")"}
    BEHIND = frozenset(",:)]}= \t\r\n")  # what follows an apostrophe that ends a string

    def __init__(self, quotes: Seq[str] = ("'",), closes: str = "") -> None:
        self._quotes = quotes
        self._open = [(closes, "}")] if closes else []  # what ends each open bracket, here and in JSON
        self._wants = "key" if closes else "value"  # or "element", ":", ","
        self._quote = ""  # of the string that is being read
        self._word: list[str] = []  # that is being read
        self._comma = ""  # with the blanks behind it, until something follows
        self._written = ["{"] if closes else []
        self.done = self.failed = False

    def take(self) -> str:
        """Returns the JSON text written since the last call."""
        written, self._written = "".join(self._written), []
        return written

    def read(self, text: str, at: int) -> int:
        """Reads on from a place in the text; returns how far it came: to the value's end, or to what needs more text."""
        while at < len(text) and not self.done and not self.failed:
            behind = self._string(text, at) if self._quote else self._token(text, at)
            if behind == at:
                break
            at = behind
        return at

    def _token(self, text: str, at: int) -> int:
        if self._word:
            if found := self.WORD.match(text, at):
                self._word.append(found[0])
                return found.end()
            self._end_word()
            if self.done or self.failed:
                return at
        if text[at] == self._wants:
            return self._separator(text, at)
        found = JSON_TOKEN.match(text, at)
        assert found, "every character is a token"
        if found.lastgroup == "pairs" and self._wants != "key":
            found = self.STRING.match(text, at) or found
        kind, piece = found.lastgroup or "string", found[0]
        if kind == "word" or (kind == "value" and self._wants not in self.WANTED[kind] and self.WORD.match(text, at)):
            self._word = [piece]
        elif kind == "blank":
            self._comma += piece if self._comma else ""
            self._written.append("" if self._comma else piece)
        elif self._wants not in self.WANTED[kind] or (kind == "close" and piece != self._open[-1][0]):
            self.failed = True
        elif found.lastgroup is None and self.STRING.match(text, at) is None:
            return self._begin_string(text, at)
        else:
            self._take_over(kind, piece)
        return at if self.failed else found.end()

    def _take_over(self, kind: str, piece: str) -> None:
        """A piece that is wanted. The comma before it was none too many, unless a bracket closes."""
        if kind == "close":
            self._written += [self._comma[1:], self._open.pop()[1]]
        else:
            self._written += [self._comma, {"(": "[", "=": ":"}.get(piece, piece)]
        self._comma = ""
        if kind == "open":
            self._open.append((self.BRACKETS[piece], "}" if piece == "{" else "]"))
            self._wants = "key" if piece == "{" else "element"
        elif kind == "equals":
            self._wants = "value"
        else:
            self._end_value(kind == "string" and self._wants == "key")

    def _separator(self, text: str, at: int) -> int:
        """A comma or colon, with the blanks behind it. A comma is written when something follows."""
        end = at + 1
        while end < len(text) and text[end] in " \n\r\t":
            end += 1
        if self._wants == ",":
            self._comma, self._wants = text[at:end], "key" if self._open[-1][1] == "}" else "element"
        else:
            self._written.append(text[at:end])
            self._wants = "value"
        return end

    def _end_value(self, is_key: bool) -> None:
        self._wants = ":" if is_key else ","
        self.done = not self._open

    def _begin_string(self, text: str, at: int) -> int:
        quote = next((q for q in ('"', *self._quotes) if q.startswith(text[at : at + len(q)])), "")
        self.failed = not quote
        if not quote or len(text) - at < len(quote):
            return at
        self._written += [self._comma, '"']
        self._quote, self._comma = quote, ""
        return at + len(quote)

    def _end_word(self) -> None:
        word, self._word, is_key = "".join(self._word), [], self._wants == "key"
        meant = json.dumps(word, ensure_ascii=False) if is_key else self.WORDS.get(word) or self._number(word)
        if meant is None and re.match(r"[^\W\d]", word):
            meant = json.dumps(word, ensure_ascii=False)
        self.failed = meant is None or self._wants not in self.WANTED["string"]
        if not self.failed:
            self._written += [self._comma, meant or ""]
            self._comma = ""
            self._end_value(is_key)

    def _number(self, word: str) -> str | None:
        """A number as JSON writes it; Python has more ways to."""
        if self.NUMBER.fullmatch(word):
            return word
        with contextlib.suppress(ValueError, OverflowError):
            return json.dumps(int(word, 0))
        with contextlib.suppress(ValueError):
            return json.dumps(float(word)) if word[-1].isdigit() or word[-1] == "." else None
        return None

    def _string(self, text: str, at: int) -> int:
        """Some more of a string."""
        if len(self._quote) > 1:
            return self._raw(text, at)
        char = text[at]
        if char == self._quote:
            if char == "'" and at + 1 == len(text):
                return at
            if char == "'" and text[at + 1] not in self.BEHIND:
                self._written.append(char)
            else:
                self._end_string()
            return at + 1
        if char == "\\":
            return self._escape(text, at)
        if found := self.PLAIN[self._quote].match(text, at):
            self._written.append(found[0])
            return found.end()
        self._written.append(json.dumps(char)[1:-1])
        return at + 1

    def _end_string(self) -> None:
        self._written.append('"')
        self._quote = ""
        self._end_value(self._wants == "key")

    def _escape(self, text: str, at: int) -> int:
        """An escape: JSON's as it is, one of Python's as JSON has it, else its backslash."""
        size = {"u": 6, "x": 4}.get(text[at + 1 : at + 2], 2)
        escape = text[at : at + size]
        if len(escape) < size:
            return at
        hexadecimal = re.fullmatch(r"\\x([0-9a-fA-F]{2})", escape)
        meant = rf"\u00{hexadecimal[1]}" if hexadecimal else {"\\'": "'"}.get(escape, escape)
        is_known = meant != escape or self.ESCAPE.fullmatch(escape)
        self._written.append(meant if is_known else "\\\\")
        return at + (size if is_known else 1)

    def _raw(self, text: str, at: int) -> int:
        """More of a string in a family's own quotes: nothing in it is an escape."""
        quote = self._quote
        end = text.find(quote, at)
        stop = end if end >= 0 else len(text) - held_back(text[at:], (quote,))
        self._written.append(json.dumps(text[at:stop], ensure_ascii=False)[1:-1])
        if end < 0:
            return stop
        self._end_string()
        return end + len(quote)


def mended(text: str) -> str | None:
    """A whole text as JSON, mended where it is plain what it means; None where it is not."""
    mender = JsonMender()
    end = mender.read(text + "\n", 0)
    return mender.take().strip() if mender.done and not mender.failed and not text[end:].strip() else None


def as_json(text: str, types: int) -> str:
    """An argument that stands without quotes, as JSON of one of these types (SchemaReader's bits); of another it is a string."""
    written = text.strip()
    with contextlib.suppress(ValueError, RecursionError):
        if type_bit(json.loads(written, parse_constant=_finite)) & types:
            return written
    meant = mended(written) if not types & SchemaReader.TYPES["string"] else None
    if meant is not None and type_bit(json.loads(meant)) & types:
        return meant
    return json.dumps(text, ensure_ascii=False)


class TextEnded(Exception):
    """More text is needed, and none will come."""


class NoCall(Exception):
    """The text only looks like a call."""


class Scanner:
    """Reads pieces of text from a parser's buffer: each method reads on at `at`, waits until there is enough text to tell,
    and raises NoCall if that does not fit."""

    BLANKS = re.compile(r"\s*")

    def __init__(self, parser: ChatParser) -> None:
        self._parser = parser
        self.at = self.furthest = 0  # how far the buffer has been read, now and in ways that did not fit
        self._header = 0  # from where on what is read counts as a call's header

    def _either(self, *readings: Reading) -> Reading:
        """True if the text goes on in one of some ways; if not, it is read no further."""
        at, taken = self.at, self._parser.taken
        for reading in readings:
            try:
                yield from reading
                return True
            except NoCall:
                if self._parser.taken > taken:
                    raise
                self.at, self.furthest = at, max(self.at, self.furthest)
        return False

    def _more(self) -> Reading:
        if self._parser.reason:
            raise TextEnded
        yield

    def _drop(self) -> None:
        self._parser.drop(self.at)
        self.at = self._header = 0

    def _next(self, size: int) -> str:
        return self._parser.buffer[self.at : self.at + size]

    def _advance(self, size: int) -> None:
        self.at += size
        if self.at - self._header > MAX_HEADER:
            self.at = self._header + MAX_HEADER
            raise NoCall

    def _blanks(self) -> Reading:
        """The next character that is no white space."""
        while (found := self.BLANKS.match(self._parser.buffer, self.at)) and (
                found.end() == len(self._parser.buffer) and found.end() - self._header <= MAX_HEADER):  # fmt: skip
            yield from self._more()
        self._advance(len(found[0]) if found else 0)
        return self._next(1)

    def _one_of(self, texts: Collection[str]) -> Reading:
        """The longest of some texts that stands here."""
        most = max(map(len, texts), default=0)
        while len(rest := self._next(most)) < most and any(text.startswith(rest) and text != rest for text in texts):
            yield from self._more()
        found = max(filter(rest.startswith, texts), key=len, default="")
        if not found:
            raise NoCall
        self._advance(len(found))
        return found

    def _behind_blanks(self, texts: Collection[str]) -> Reading:
        yield from self._blanks()
        return (yield from self._one_of(texts))

    def _up_to(self, closes: str, most: int) -> Reading:
        """Text that differs from call to call; reads what stands behind it, too."""
        most += len(closes)
        while (size := self._next(most).find(closes)) < 0:
            if len(self._next(most)) == most:
                raise NoCall
            yield from self._more()
        found = self._next(size)
        self._advance(size + len(closes))
        return found

    def _json(self, most: int = MAX_HEADER, told: JsonMender | None = None) -> Reading:
        """A JSON value, or what looks like one; `told`: the call's arguments, which are told as they come."""
        mender, until = told or JsonMender(), self.at + most
        while not mender.done:
            self.at = mender.read(self._parser.buffer, self.at)
            if told:
                self._drop()
                self._parser.write_arguments(mender.take())
            if mender.failed or self.at > until:
                self.at = min(self.at, until)
                raise NoCall
            if not mender.done:
                yield from self._more()
        return mender.take()

    def _string(self) -> Reading:
        """A JSON string's value."""
        if (yield from self._blanks()) != '"':
            raise NoCall
        if found := JsonMender.STRING.match(self._parser.buffer, self.at):
            self._advance(len(found[0]))
            return found[0][1:-1]
        return json.loads((yield from self._json()))


class CallReader(Scanner):
    """Reads one section of calls in the forms of their formats, with white space, order and extra keys at will.

    Text that certainly belongs to a call is dropped from the buffer as it is read; other text stays there.
    """

    PLAIN_KEY = re.compile(r'[^\n<>"/][^\n<>"]*')

    def __init__(self, parser: ChatParser, formats: Seq[CallFormat], names: Iterable[str]) -> None:
        super().__init__(parser)
        self._formats, self._names = formats, frozenset(names)
        self._name = self._id = ""  # of the call that is being read
        self._early: str | None = None  # arguments that stood before the name
        self._begun = False  # the client has been told of the call
        self._rest: str | None = None  # of its arguments if it ends here; None where it cannot
        self._found = False  # a call, at all

    def read(self, marked: bool) -> Reading:
        """True if calls were found; else the text, all of it still in the buffer, only looks like one. `marked`: nothing but
        a call begins so."""
        try:
            yield from self._either(*(self._section(format, opens) for format in self._formats for opens in format.beginnings))
        except TextEnded:
            return self._end_of_text(marked)
        except NoCall:  # in a call that has begun
            pass
        self._close()
        return self._found

    def _end_of_text(self, marked: bool) -> bool:
        """Drops the rest of a text that ends inside a section, if it certainly belongs to calls."""
        cut = self._parser.reason != "stop"
        if cut and self._name:
            self._begin()
        self._close()
        if self._found or (cut and marked):
            self._parser.drop(len(self._parser.buffer))
        return self._found or (cut and marked)

    def _named(self, name: str) -> None:
        if name not in self._names:
            raise NoCall
        self._close()
        self._name = name
        if self._early is not None:
            self._begin()
            self._parser.write_arguments(self._early)

    def _begin(self) -> None:
        if not self._begun:
            self._parser.begin_call(self._id, self._name)
            self._begun = self._found = True
            self._id = ""
        self._drop()

    def _may_end(self, rest: str) -> None:
        """Nothing must follow any more, though more may."""
        self._begin()
        self._rest = rest

    def _close(self) -> None:
        """Ends the call that was being read, if there is one."""
        if self._rest is not None:
            self._parser.write_arguments(self._rest)
        elif self._begun:
            self._parser.is_broken = True
        self._begun, self._rest = False, None

    def _text(self, text: str) -> Reading:
        """A format's text: any white space where it has some, and its open places up to the piece of text behind them."""
        pieces = iter(MARKER.findall(text))
        for piece in pieces:
            if piece.isspace():
                yield from self._blanks()
            elif piece not in (ID, ANY):
                yield from self._one_of([piece])
            elif closes := next(pieces, ""):
                found = yield from self._up_to(closes, 64)
                self._id = found if piece == ID else self._id

    def _key(self) -> Reading:
        key = yield from self._string()
        yield from self._behind_blanks(":")
        return key

    def _section(self, format: CallFormat, opens: str) -> Reading:
        """Calls, each followed by pieces of its ending, then perhaps by the next one, with its marker or without."""
        yield from self._call(format, opens)
        last = next((p for p in reversed(MARKER.findall(format.closes)) if not p.isspace() and p not in "}]"), "")
        again = {format.beginnings[-1], "" if format.keys else format.call_opens.lstrip()}
        while (yield from self._either(*(self._call(format, opens, ",;") for opens in again), self._other_pair(format),
                                       self._behind_blanks(format.closers - {last}))):  # fmt: skip
            self._drop()
        yield from self._either(self._behind_blanks([last]))
        self._drop()

    def _other_pair(self, format: CallFormat) -> Reading:
        """A pair behind the name and the arguments in a call's object."""
        yield from self._behind_blanks("," if format.keys and format.keys[0] else "")
        if (yield from self._key()) in set().union(*format.known_keys):
            raise NoCall
        yield from self._json()

    def _call(self, format: CallFormat, opens: str, separators: str = "") -> Reading:
        """A call from its beginning on, as far as it must go."""
        self._name, self._early = "", None
        if (yield from self._blanks()) in separators:
            self._advance(1)
            yield from self._blanks()
        yield from self._text(opens)
        rest = yield from self._behind_name(format) if format.keys is None else self._in_object(format, *format.keys)
        self._may_end(rest)

    def _in_object(self, format: CallFormat, name_key: str, arguments_key: str) -> Reading:
        """A call as a JSON object, perhaps in a list: its name and its arguments, in either order, between other pairs."""
        if (yield from self._blanks()) == "[":
            self._advance(1)
        yield from self._behind_blanks("{")
        if not name_key:
            self._named((yield from self._key()))
            yield from self._arguments()
            return ""
        names, arguments, inner = format.known_keys
        argued = False
        while not (self._name and argued):
            key = yield from self._key()
            if key in inner and not self._name:
                yield from self._behind_blanks("{")
                continue
            if key in names and not self._name:
                self._named((yield from self._string()))
            elif key in arguments and not argued:
                yield from self._arguments()
                argued = True
            elif key in names | arguments | inner:
                raise NoCall
            else:
                yield from self._json()
            if not (self._name and argued) and (yield from self._behind_blanks(",}" if self._name else ",")) == "}":
                return "{}"
        return ""

    def _behind_name(self, format: CallFormat) -> Reading:
        """A call whose name stands by itself; without arguments there must be what ends it."""
        name = yield from self._one_of(self._names)
        while not (behind := self._next(1)):
            yield from self._more()
        if re.match(r"[\w.-]", behind):
            raise NoCall  # a longer name
        self._named(name)
        yield from self._text(format.named)
        start, params, separator = self.at, format.params, "{"
        if params and params.quote:
            yield from self._arguments(JsonMender((params.quote,), format.closes.strip()[0]))
            return ""
        while params and (yield from self._either(self._argument(format, params, separator))):
            separator = ", "
        if separator == ", ":
            return "}"
        if (yield from self._either(self._behind_blanks(format.closers))):
            self.at = start
            return "{}"
        if params:
            raise NoCall
        yield from self._arguments()
        return ""

    def _arguments(self, mender: JsonMender | None = None) -> Reading:
        """Arguments as a JSON object, or as this mender reads them; told as they come if their call has a name."""
        first, start = (yield from self._blanks()), self.at
        if mender or (first == "{" and self._name):
            self._begin()
            return (yield from self._json(sys.maxsize, mender or JsonMender()))
        text = yield from self._json(MAX_EARLY)
        text = mended(json.loads(text)) or "" if text.startswith('"') else text  # they may stand in a string
        if first not in "{\"'nN" or not (text == "null" or text.startswith("{")):
            raise NoCall
        self._early = "{}" if text == "null" else text
        self._header += self.at - start
        if self._name:
            self._begin()
            self._parser.write_arguments(self._early)

    def _argument(self, format: CallFormat, params: Params, separator: str) -> Reading:
        """One argument of those that stand one by one."""
        yield from self._blanks()
        yield from self._text(params.opens)
        closes, *rest = MARKER.findall(params.keyed.strip())
        key = yield from self._up_to(closes, MAX_HEADER)
        if not self.PLAIN_KEY.fullmatch(key):
            raise NoCall
        yield from self._text("".join(rest))
        self._begin()
        self._rest = None
        self._parser.write_arguments(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
        yield from self._either(self._one_of([params.keyed[len(params.keyed.rstrip()) :]]))
        closes = params.closes.replace(KEY, key)
        if (yield from self._either(self._one_of(["<![CDATA["]))):
            closes = f"]]>{closes.strip()}"
        self._drop()
        yield from self._value(self._parser.types(self._name, key), closes, format.closes.rstrip())
        self._may_end("}")

    def _value(self, types: int, closes: str, behind: str) -> Reading:
        """An argument's value up to what closes it or its call (some models forget the first): a string as it comes, what has
        another type when it is all there."""
        parser, core, streams = self._parser, closes.strip(), types == SchemaReader.TYPES["string"]
        trail = closes[: len(closes) - len(closes.lstrip())]
        marks = (core, trail + core, behind + "\n\n\n", trail + behind + "\n\n\n")
        parser.write_arguments('"' * streams)
        while (at := parser.buffer.find(core, self.at)) < 0 and not parser.reason:
            self.at = len(parser.buffer) - held_back(parser.buffer, marks)
            if streams:
                parser.write_arguments(json.dumps(parser.buffer[: self.at], ensure_ascii=False)[1:-1])
                self._drop()
            yield
        value, is_whole = parser.buffer[: at if at >= 0 else None], at >= 0
        if not is_whole and parser.reason == "stop" and behind and value.rstrip().endswith(behind):
            value, is_whole = value.rstrip().removesuffix(behind), True
        value = value.removesuffix(trail) if is_whole else value
        if streams:
            parser.write_arguments(json.dumps(value, ensure_ascii=False)[1:-1] + '"' * is_whole)
        else:
            parser.write_arguments(as_json(value, types) if is_whole else value)
        self.at = at + len(core) if at >= 0 else len(parser.buffer)
        self._drop()
        if not is_whole:
            raise TextEnded


class Alignment:
    """Knows which tokens' log probabilities belong to which stretch of the text."""

    def __init__(self, hidden: frozenset[str]) -> None:
        self._hidden = hidden  # names of tokens that give no text
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._tokens: deque[tuple[int, TokenLogprob]] = deque()
        self._size = 0

    def add(self, logprobs: Seq[TokenLogprob]) -> None:
        for logprob in logprobs:
            self._tokens.append((self._size, logprob))
            if logprob.token.decode("utf-8", "replace") not in self._hidden:
                self._size += len(self._decode(logprob.token))

    def until(self, end: int | None) -> tuple[TokenLogprob, ...]:
        """Takes the tokens that begin before this character; None: all."""
        taken = []
        while self._tokens and (end is None or self._tokens[0][0] < end):
            taken.append(self._tokens.popleft()[1])
        return tuple(taken)


class ChatParser(Parser):
    """Takes thoughts and tool calls out of the text, as a coroutine that stops wherever it needs more text to go on.

    Only an answer's beginning is a thought: later its marker is text. What looks like a call but names no offered function
    is text. Pieces may split anywhere; the events' texts joined are the same.
    """

    def __init__(self, index: int, format: ChatFormat, schemas: Mapping[str, Any], prompt_end: str, hidden: frozenset[str],
                 continued: bool = False, forced: bool = False, thinking: bool = False) -> None:  # fmt: skip
        super().__init__(index)
        self._format, self._schemas, self._hidden = format, schemas, hidden
        openings = [mark for call in format.calls for mark in call.marks] if schemas else []
        self._openings = tuple(filter(None, openings))
        self._unmarked = "" in openings  # Llama 3: an answer that is a call has no marker
        self._logprobs = Alignment(hidden)
        self.buffer = ""
        self.reason: str | None = None  # why the text ended, once it has
        self._space = ""  # white space that is dropped if a call follows
        self._trim = False  # white space behind a thought or call is dropped
        self._thinking = thinking or prompt_end.rstrip().endswith(format.thought[0])
        self._continued, self._forced = continued, forced
        self._begun = continued or self._thinking  # a thought has begun, or content has
        self._events: list[Event] = []
        self.calls = 0
        self.is_broken = False  # a call's arguments cannot be read
        self._has_text = False  # content that is more than white space
        self.behind_call = 0  # where the last one ends that stands before it
        opened = next((m for m in self._openings if prompt_end.endswith(m) and not continued), "")  # functionary: >>>
        self.taken = -len(opened)
        self._reading = self._answer()
        self._feed(opened)

    def push(self, text: str, logprobs: tuple[TokenLogprob, ...] = ()) -> Iterator[Event]:
        self._logprobs.add(logprobs)
        return self._feed(text)

    def finish(self, reason: str) -> Iterator[Event]:
        self.reason = reason
        yield from self._feed("")
        if self._space and not self.calls:
            self._emit(Text(self.index, self._space))
        if rest := self._logprobs.until(None):
            self._events.append(Text(self.index, logprobs=rest))
        yield from self._drain()
        yield ChoiceEnd(self.index, "tool_calls" if self.calls and reason == "stop" and not self.is_broken else reason)

    def _feed(self, text: str) -> Iterator[Event]:
        self.buffer += text
        next(self._reading, None)
        return self._drain()

    def _drain(self) -> Iterator[Event]:
        events, self._events = self._events, []
        return iter(events)

    def _emit(self, event: Event) -> None:
        if isinstance(event, (Text, Thought)):
            event = replace(event, logprobs=self._logprobs.until(self.taken - len(self._space)))
        self._events.append(event)

    def _take(self, size: int) -> str:
        taken, self.buffer = self.buffer[:size], self.buffer[size:]
        self.taken += len(taken)
        return taken

    def drop(self, size: int) -> None:
        """Takes markup: its tokens' log probabilities belong to no text."""
        if size:
            self._take(size)
            self._logprobs.until(self.taken)

    def begin_call(self, id: str, name: str) -> None:
        self._space, self._begun, self._trim = "", True, True
        self.calls += 1
        id = id if len(id) > 8 else f"call_{os.urandom(12).hex()}"  # short ones count the calls of a turn
        self._emit(CallBegan(self.index, self.calls - 1, id, name))

    def write_arguments(self, text: str) -> None:
        if text:
            self._emit(CallArguments(self.index, self.calls - 1, text))

    def types(self, name: str, key: str) -> int:
        """The types that an argument may have."""
        return argument_types(json.dumps(self._schemas[name]), key)

    # From here on generators: each `yield` waits for more text

    def _answer(self) -> Reading:
        if self._thinking or (not self._continued and (yield from self._thought_begins())):
            yield from self._thought()
        if self._unmarked and not self._continued:
            while not self.buffer.strip() and not self.reason:
                yield
            yield from self._call("")
        while self.buffer or not self.reason:
            yield from self._content()

    def _up_to(self, marks: Seq[str], tell: Callable[[str], None]) -> Reading:
        """Tells text up to the first of some marks, which it returns; "" at the end of the text."""
        mark = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))) or r"(?!)")
        while True:
            found = mark.search(self.buffer)
            held = held_back(self.buffer, marks) if not self.reason or self._drops_a_cut_mark else 0
            if found and not self.reason and found.start() >= len(self.buffer) - held:
                found = None  # it may become a longer one
            if text := self._take(found.start() if found else len(self.buffer) - held):
                tell(text)
            if found or self.reason:
                self.drop(0 if found else held)
                return found[0] if found else ""
            yield

    def _thought_begins(self) -> Reading:
        """Whether a thought's opening marker comes next; takes that and the white space before it."""
        opens, closes = self._format.thought
        while True:
            first = self.buffer.lstrip()
            found = next((m for m in (opens, closes) if first.startswith(m)), "")
            if found:
                self.drop(len(self.buffer) - len(first) + len(found))
                self._trim = True  # the end of a thought that was none
                return found == opens
            is_half = any(m.startswith(first) for m in self._format.thought)
            if self.reason or not is_half:
                self.drop(len(self.buffer) if is_half and self._drops_a_cut_mark else 0)
                return False
            yield

    def _thought(self) -> Reading:
        """A thought up to its closing marker, without the line breaks before it."""
        self._begun = self._trim = True
        closes = self._format.thought[1]
        while not self.buffer.strip("\n") and not self.reason:
            yield
        self._take(len(self.buffer) - len(self.buffer.lstrip("\n")))  # a token may go on with text
        marks = (closes, *(() if self.calls else self._openings))
        while mark := (yield from self._up_to(marks, lambda text: self._emit(Thought(self.index, text)))):
            if mark == closes:
                return self.drop(len(closes))
            if (yield from self._call_in_thought()):
                return

    def _call_in_thought(self) -> Reading:
        """Takes calls with which the text ends, although the thought that they stand in does not (Qwen 3 and 3.5 do that);
        false if other text follows: then all this is thought."""
        inner = ChatParser(self.index, replace(self._format, drops=()), self._schemas, "", self._hidden, continued=True)
        closes, events, read, prose = self._format.thought[1], list[Event](), 0, False
        while not prose and (read < len(self.buffer) or not self.reason):
            if read == len(self.buffer):
                yield
            behind = min(read + 64, len(self.buffer))  # to read on would be for nothing if this is prose
            if self.buffer.find(closes, max(0, read - len(closes)), behind) >= 0:
                break
            more = list(inner.push(self.buffer[read:behind]))
            prose, read = any(isinstance(event, Text) for event in more), behind
            events += more
        more = list(inner.finish(self.reason)) if self.reason and not prose and read == len(self.buffer) else []
        events += more
        if more[-1:] == [ChoiceEnd(self.index, "tool_calls")] and not any(isinstance(event, Text) for event in more):
            self.drop(len(self.buffer))
            self._events += events[:-1]
            self.calls = inner.calls
            return True
        self._emit(Thought(self.index, self._take(max(inner.behind_call, 1))))
        return False

    def _content(self) -> Reading:
        """Content up to the next marker, and the call that it begins."""
        mark = yield from self._up_to((*self._openings, *self._format.drops), self._say)
        if not mark or (mark in self._openings and ((yield from self._call(mark)) or mark not in self._format.drops)):
            return
        self.drop(len(mark))
        self._trim = self._trim or not self._begun
        if (yield from self._thought_begins()):  # gpt-oss thinks again between its calls
            yield from self._thought()

    @property
    def _drops_a_cut_mark(self) -> bool:
        """Whether half a marker at the end of the text was to begin a call, had there been more tokens."""
        return self.reason == "length" and (self._forced or self.calls > 0)

    def _say(self, out: str) -> None:
        """Content; white space waits where a call may follow."""
        out = out.lstrip() if self._trim else out
        self._trim = self._trim and not out
        if self._trim:
            self._logprobs.until(self.taken)
        out = self._space + out
        kept = out.rstrip() if self._schemas or not self._begun else out
        self._space = out[len(kept) :]
        if kept:
            self._begun = self._has_text = True
            self._emit(Text(self.index, kept))

    def _call(self, mark: str) -> Reading:
        """A section of calls; false if the text only looks like one: then what cannot begin another was said."""
        reader = CallReader(self, self._format.calls, self._schemas)
        if (yield from reader.read(self._forced or mark != "")):
            self.behind_call = self.behind_call if self._has_text else self.taken
            return True
        again = max(map(len, self._openings), default=0)  # a marker may begin in the last characters that were read
        self._say(self._take(max(len(mark), reader.furthest - again) if mark not in self._format.drops else 0))
        return False


def held_back(buffer: str, marks: Iterable[str]) -> int:
    """Length of the longest suffix of `buffer` that is a proper prefix of a mark: it must wait for what comes next."""
    longest = 0
    for mark in marks:
        at = buffer.find(mark[0], max(0, len(buffer) - len(mark) + 1))
        while at >= 0 and not mark.startswith(buffer[at:]):
            at = buffer.find(mark[0], at + 1)
        longest = max(longest, len(buffer) - at if at >= 0 else 0)
    return longest


# ── D.1. Automata ─────────────────────────────────────────────────────────────────────────────────────────────────────
# A grammar's symbols, and the states of all readings of a text, made as they are met: which bytes may come next.
# Offers: Symbol and its kinds (Word, OneChar, AnyOf, InOrder, Repeated, word), numeral, written, Automaton, State, read_ahead,
# bytes_of, TURN, Gate, NotYet. Uses: nothing.


class Symbol:
    """A part of a grammar, immutable and hashable: it opens into other symbols, or reads bytes itself.

    A subclass has `opened`, or `after`, or `firsts` and `step`. Small symbols compare by value, large ones by identity. No
    symbol may lead into a dead end: whatever `step` returns can be finished.
    """

    ends = False  # a symbol that reads bytes may be left here, though it could read on
    parts: Symbols = ()  # the symbols that it is made of, as far as they stand there already

    def opened(self) -> Iterable[Symbols] | None:
        """The alternatives that may stand in its place; None if it reads bytes."""
        return None

    @functools.cached_property
    def after(self) -> Mapping[int, Symbols]:
        """The symbols that must follow each byte that it may read now."""
        raise NotImplementedError

    @functools.cached_property
    def firsts(self) -> int:
        """The bytes that it may read now, one bit each."""
        return sum(1 << byte for byte in self.after)

    def step(self, byte: int) -> Symbols | None:
        """Reads a byte and returns the symbols that must follow; None if it may not read that byte."""
        return self.after.get(byte)

    def left(self) -> Symbols:
        """The symbols that must follow when it is left although it could read on."""
        return ()

    @functools.cached_property
    def looks(self) -> bool:
        """True if it depends on the text around it: anchors and lookaheads, in regular expressions only."""
        return any(part.looks for part in self.parts)


Symbols = tuple[Symbol, ...]


@dataclass(frozen=True)
class Word(Symbol):
    """Text that must stand there, as UTF-8; the first `at` bytes of it do already."""

    data: bytes
    at: int = 0

    @property
    def firsts(self) -> int:  # type: ignore[override]
        return 1 << self.data[self.at]

    def step(self, byte: int) -> Symbols | None:
        if byte != self.data[self.at]:
            return None
        return (Word(self.data, self.at + 1),) if self.at + 1 < len(self.data) else ()


def word(text: str) -> Symbol:
    """The symbol of a text that must stand there."""
    return Word(text.encode()) if text else InOrder(())


@dataclass(frozen=True)
class OneChar(Symbol):
    """One character of ranges of code points, first and last, in UTF-8; surrogates are left out."""

    ranges: tuple[tuple[int, int], ...]

    def opened(self) -> Iterable[Symbols]:
        return [(way,) for way in written(self.ranges, "UTF-8")]


Digit = tuple[bytes, ...]  # the bytes that spell each of its values


@dataclass(frozen=True, eq=False)
class Numeral(Symbol):
    """A number of some ranges in so many digits, each of its own kind. `numeral` makes equal ones once."""

    ranges: tuple[tuple[int, int], ...]
    digits: tuple[Digit, ...]

    @functools.cached_property
    def after(self) -> dict[int, Symbols]:
        values, *rest = self.digits
        size = math.prod(map(len, rest))  # so many numbers begin with one digit
        found: dict[int, list[tuple[int, int]]] = {}
        for low, high in self.ranges:
            for value in range(low // size, high // size + 1):
                span = max(low - value * size, 0), min(high - value * size, size - 1)
                found.setdefault(value, []).append(span)
        return {byte: (numeral(tuple(spans), tuple(rest)),) if rest else ()
                for value, spans in found.items() for byte in values[value]}  # fmt: skip


numeral = functools.lru_cache(maxsize=10_000)(Numeral)


def _digit(first: int, count: int) -> Digit:
    """A digit that is spelled by bytes in a row."""
    return tuple(bytes([byte]) for byte in range(first, first + count))


_MORE = _digit(0x80, 64)
_HEX = (*_digit(ord("0"), 10), b"aA", b"bB", b"cC", b"dD", b"eE", b"fF")
_LETTERS = dict(zip(b'\b\t\n\f\r"/\\', (b"b", b"t", b"n", b"f", b"r", b'"', b"/", b"\\"), strict=True))
UTF8 = (
    (((0, 0x7F),), 0, (_digit(0, 128),)),
    (((0x80, 0x7FF),), 0, (_digit(0xC0, 32), _MORE)),
    (((0x800, 0xD7FF), (0xE000, 0xFFFF)), 0, (_digit(0xE0, 16), _MORE, _MORE)),
    (((0x10000, 0x10FFFF),), 0, (_digit(0xF0, 8), _MORE, _MORE, _MORE)),
)
SCRIPTS = {  # ranges of characters, each a number from an offset on, and its digits; "escaped": behind the backslash
    "UTF-8": UTF8,
    "JSON": ((((32, 33), (35, 91), (93, 127)), 0, UTF8[0][2]), *UTF8[1:]),
    "escaped": (
        (tuple((code, code) for code in _LETTERS), 0, (tuple(_LETTERS.get(code, b"") for code in range(128)),)),
        (UTF8[0][0] + UTF8[1][0] + UTF8[2][0], 0, ((b"u",), _HEX, _HEX, _HEX, _HEX)),
        (UTF8[3][0], 0x10000, ((b"u",), (b"dD",), _HEX[8:12], _HEX, _HEX, (b"\\",), (b"u",), (b"dD",), _HEX[12:], _HEX, _HEX)),
    ),
}


@functools.lru_cache(maxsize=10_000)
def written(ranges: tuple[tuple[int, int], ...], script: str) -> list[Numeral]:
    """The ways to write one character of some ranges."""
    found: list[Numeral] = []
    for spelled, offset, digits in SCRIPTS[script]:
        spans = ((max(low, first) - offset, min(high, last) - offset) for low, high in ranges for first, last in spelled)
        if part := tuple((low, high) for low, high in spans if low <= high):
            found.append(numeral(part, digits))
    return found


@dataclass(frozen=True, eq=False)
class AnyOf(Symbol):
    """One of several symbols."""

    parts: Symbols

    def opened(self) -> Iterable[Symbols]:
        return [(part,) for part in self.parts]


@dataclass(frozen=True, eq=False)
class InOrder(Symbol):
    """Symbols one after another."""

    parts: Symbols

    def opened(self) -> Iterable[Symbols]:
        return (self.parts,)


@dataclass(frozen=True)
class Repeated(Symbol):
    """A symbol `low` to `high` times (None: without end). What it reads is never empty."""

    symbol: Symbol
    low: int = 0
    high: int | None = None

    def opened(self) -> Iterable[Symbols]:
        if self.high == 0:
            return ((),)
        again = Repeated(self.symbol, max(self.low - 1, 0), None if self.high is None else self.high - 1)
        return ((self.symbol, again),) if self.low else ((), (self.symbol, again))

    @property
    def parts(self) -> Symbols:  # type: ignore[override]
        return (self.symbol,)


def read_ahead(root: Symbol) -> Symbol:
    """The root of a grammar whose texts (Gbnf, Json) have been read. Raises InvalidRequest where one cannot be."""
    todo, seen = [root], {root}
    while todo:
        symbol = todo.pop()
        if isinstance(symbol, (Gbnf, Json, RestOf)):
            symbol.opened()
        todo += (fresh := set(symbol.parts) - seen)
        seen |= fresh
    return root


def bytes_of(bits: int) -> Iterator[int]:
    """The bytes of a set."""
    while bits:
        yield (bits & -bits).bit_length() - 1
        bits &= bits - 1


class Stack:
    """A node of the graph-structured stack: a symbol and the stacks below it. An automaton makes equal ones once."""

    __slots__ = ("below", "top")

    def __init__(self, top: Symbol, below: Below) -> None:
        self.top, self.below = top, below


Below = frozenset["Stack | None"]  # None: the end


class State:
    """All readings of the text so far that the grammar allows. Its automaton makes equal ones once."""

    __slots__ = ("_automaton", "_next", "bits", "ends", "stacks")

    def __init__(self, automaton: Automaton, stacks: frozenset[Stack], ends: bool) -> None:
        self._automaton, self.stacks, self.ends = automaton, stacks, ends
        self._next: dict[int, State | None] = {}
        self.bits = functools.reduce(operator.or_, (stack.top.firsts for stack in stacks), 0)  # the bytes that may come

    def step(self, byte: int) -> State | None:
        """The state behind one more byte; None if that may not come. Raises as the automaton does."""
        if byte not in self._next:
            self._next[byte] = self._automaton.after(self, byte) if self.bits >> byte & 1 else None
            TURN.kept()
        return self._next[byte]

    def read(self, data: bytes) -> State | None:
        """The state behind some bytes; None if they may not come."""
        here: State | None = self
        for byte in data:
            if here is None:
                return None
            here = here._next[byte] if byte in here._next else here.step(byte)
        return here

    def forced(self, most: int) -> bytes:
        """The text that must come next, up to where there is a choice or an end, at most so many bytes."""
        found, here = bytearray(), self
        while len(found) < most and not here.ends and here.bits and not here.bits & (here.bits - 1):
            found.append(here.bits.bit_length() - 1)
            behind = here.step(found[-1])
            assert behind is not None, "firsts named a byte that step refuses"
            here = behind
        return bytes(found)


class NotYet(Exception):
    """The time slice is over before it is known what may come next. What was found is kept: ask again."""


class Turn(threading.local):
    """The time slice in which this thread may work on grammars; without end unless the step loop says so.

    All such work counts here, automata of parts within automata and searches in strings too.
    """

    _ends = math.inf
    _is_limited = False
    _gate: Gate | None = None
    _client: Any = None  # nobody waits for the work any more where it is `cancelled`

    def begin(self, seconds: float) -> None:
        """Starts a time slice of `seconds`."""
        self._ends = time.thread_time() + seconds

    def kept(self) -> None:
        """Call when a step (10 µs to 10 ms) was kept. Raises NotYet when time is up: asked again, a question goes on there."""
        if self._gate:
            self._gate.open.wait()
        if self._client and self._client.cancelled:
            raise Cancelled
        if self.is_over:
            raise NotYet

    def tick(self) -> None:
        """Call every few µs within a step. Raises NotYet when limited work takes too long, Cancelled when nobody waits for it."""
        if self._is_limited or self._gate or self._client:
            self.kept()

    @contextlib.contextmanager
    def limited(self, seconds: float) -> Iterator[None]:
        """Ends work after `seconds`: it must then be done elsewhere, from its start."""
        self.begin(seconds)
        self._is_limited = True
        try:
            with contextlib.suppress(NotYet):
                yield
        finally:
            self.begin(math.inf)
            self._is_limited = False

    @contextlib.contextmanager
    def behind(self, gate: Gate | None, client: Any) -> Iterator[None]:
        """Lets work go on only while a gate is open and its client waits for it."""
        self._gate, self._client = gate, client
        if gate:
            gate.count(1)
        try:
            yield
        finally:
            self._gate = self._client = None
            if gate:
                gate.count(-1)

    @property
    def is_over(self) -> bool:
        return self._ends < math.inf and time.thread_time() > self._ends


TURN = Turn()


class Gate:
    """Keeps a thread's work off the processors while another computes with all of them.

    llama.cpp's threads wait for each other hundreds of times a step: one busy thread more than there are processors makes a
    step take five times as long.
    """

    def __init__(self) -> None:
        self.open, self.idle = threading.Event(), threading.Event()
        self.open.set()
        self.idle.set()
        self._lock, self._working = threading.Lock(), 0

    def count(self, more: int) -> None:
        """Counts the threads that work behind it; `idle` is set while there is none."""
        with self._lock:
            self._working += more
            (self.idle.clear if self._working else self.idle.set)()

    @contextlib.contextmanager
    def shut(self, seconds: float) -> Iterator[None]:
        """Lets running work go on for up to `seconds`, then holds it while the block runs."""
        self.idle.wait(seconds)
        self.open.clear()
        try:
            yield
        finally:
            self.open.set()


class Automaton:
    """The states of one grammar, made as texts reach them and kept for all its texts. Used by one thread at a time."""

    MAX_READINGS = 4000  # of one state, with what they open into: some 1 µs each
    MAX_KEPT = 50_000  # states; some 1 KB each

    def __init__(self, root: Symbol) -> None:
        self._states: dict[tuple[frozenset[Stack], bool], State] = {}
        self._stacks: dict[tuple[Symbol, Below], Stack] = {}
        self._root = root
        self.start = self._closed({(root,): frozenset([None])})

    def after(self, state: State, byte: int) -> State | None:
        """The state behind one more byte; None if no reading allows it. Raises InvalidRequest, NotYet."""
        if max(len(self._states), len(self._stacks)) > self.MAX_KEPT:
            for kept in (self._states, self._stacks, self.start._next):  # texts under way go on from the states they have
                kept.clear()
        try:
            found: dict[Symbols, Below] = {}
            for stack in state.stacks:
                rest = stack.top.step(byte)
                if rest is not None:
                    found[rest] = found[rest] | stack.below if rest in found else stack.below
            return self._closed(found) if found else None
        except RecursionError:
            raise InvalidRequest("the grammar nests too deep: what a text may go on with cannot be found") from None

    def _stack(self, top: Symbol, below: Below) -> Stack:
        key = (top, below)
        if key not in self._stacks:
            self._stacks[key] = Stack(top, below)
        return self._stacks[key]

    def _closed(self, todo: dict[Symbols, Below]) -> State:
        """The state of some readings, opened up to symbols that read bytes.

        Readings that want the same next are one from here on, whatever they want behind it: so many readings that begin
        alike stay few (a graph-structured stack, as in Tomita's parsers).
        """
        belows: dict[Symbol, Below] = {}  # what stands below each symbol that was met
        reading, ends, work = set(), False, 0
        while todo:
            symbols = () if () in todo else next(iter(todo))
            below = todo.pop(symbols)
            if not symbols:
                ends = ends or None in below
                options: list[tuple[Symbols, Below]] = [((stack.top,), stack.below) for stack in below if stack is not None]
            else:
                top, *rest = symbols
                for symbol in reversed(rest):
                    below = frozenset((self._stack(symbol, below),))
                below -= belows.get(top, frozenset())
                belows[top] = belows[top] | below if top in belows else below
                opened = top.opened() if below else ()
                if opened is None:
                    reading.add(top)
                    opened = (top.left(),) if top.ends else ()
                options = [(option, below) for option in opened]
            for option, behind in options:
                todo[option] = todo[option] | behind if option in todo else behind
            work += len(options)
            if work > self.MAX_READINGS:
                raise InvalidRequest(f"the grammar is ambiguous: a text has over {self.MAX_READINGS} readings at once")
        key = (frozenset(self._stack(top, belows[top]) for top in reading), ends)
        if key not in self._states:
            self._states[key] = State(self, *key)
        return self._states[key]

    def __len__(self) -> int:
        """How many states are kept."""
        return len(self._states)


# ── D.2. Patterns ─────────────────────────────────────────────────────────────────────────────────────────────────────
# Regular expressions and GBNF grammars, read into symbols.
# Offers: read_pattern, read_gbnf, Gbnf, token_names; ranges of characters (merged, others, touching). Uses: D.1's symbols.

Ranges = tuple[tuple[int, int], ...]  # code points, first and last, ascending and apart
EVERY_CHAR: Ranges = ((0, 0xD7FF), (0xE000, 0x10FFFF))


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Sorts ranges, joins those that touch, and drops the surrogates."""
    halves = (half for low, high in ranges for half in ((low, min(high, 0xD7FF)), (max(low, 0xE000), high)))
    return tuple(touching(half for half in halves if half[0] <= half[1]))


def touching(spans: Iterable[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """Sorts spans of whole numbers, and joins those that touch."""
    found: list[tuple[int, Any]] = []
    for low, high in sorted(spans):
        if found and low <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], high))
        else:
            found.append((low, high))
    return found


def others(ranges: Ranges) -> Ranges:
    """The characters outside of ranges."""
    edges = [(-1, -1), *ranges, (0x110000, 0x110000)]
    return merged([(one[1] + 1, two[0] - 1) for one, two in itertools.pairwise(edges)])


@dataclass(frozen=True, eq=False)
class Edge(Symbol):
    """A regular expression's anchor: the text's beginning, or its end."""

    at_end: bool
    looks = True


@dataclass(frozen=True, eq=False)
class Ahead(Symbol):
    """A regular expression's lookahead: what must follow, or must not."""

    inside: Symbol
    wanted: bool
    looks = True


class Reader:
    """Reads what regular expressions and GBNF share: choices of sequences of repeated parts, brackets, character classes.

    A subclass has the TOKENs of its language, and reads one part and one character.
    """

    MAX_TEXT, MAX_DEPTH, MAX_REPEATS = 500_000, 100, 10**9
    TOKEN: ClassVar[re.Pattern[str]]
    SIGNS: ClassVar[dict[str | None, tuple[int, int | None]]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
    REPEATS_REPEATS = True  # a** is (a*)*
    DOT = EVERY_CHAR

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.token: re.Match[str] | None = None
        self.kind: str | None = None  # of the token; None: the end
        if len(text) > self.MAX_TEXT:
            raise self.refuse(f"over {self.MAX_TEXT} characters")
        self.advance()

    def refuse(self, what: str) -> InvalidRequest:
        raise NotImplementedError

    def part(self, depth: int) -> Symbol:
        """Reads the part that the token begins, up to its last token."""
        if self.kind == "class":
            return OneChar(self.characters())
        return OneChar(self.DOT) if self.kind == "dot" else self.inside(depth)

    def member(self) -> Ranges:
        """Reads a character of a class, or a named class, at `at`."""
        raise NotImplementedError

    def word(self) -> str:
        """The token's text."""
        return self.token[0] if self.token else ""

    def advance(self) -> None:
        """Goes to the next token that is not blank."""
        TURN.tick()
        self.kind = "blank"
        while self.kind == "blank":
            self.token = self.TOKEN.match(self.text, self.at)
            if self.token is None and self.at < len(self.text):
                raise self.refuse(f"{_said(self.text[self.at : self.at + 20])} cannot be read")
            self.kind, self.at = (self.token.lastgroup, self.token.end()) if self.token else (None, self.at)

    def choice(self, depth: int) -> Symbol:
        if depth > self.MAX_DEPTH:
            raise self.refuse(f"brackets are nested over {self.MAX_DEPTH} deep")
        options = [self._sequence(depth)]
        while self.kind == "or":
            self.advance()
            options.append(self._sequence(depth))
        return options[0] if len(options) == 1 else AnyOf(tuple(options))

    def _sequence(self, depth: int) -> Symbol:
        parts: list[Symbol] = []
        may_repeat = False
        while self.kind not in (None, "or", "close", "rule"):
            if self.kind != "repeat":
                parts.append(self.part(depth))
            elif may_repeat:
                parts[-1] = Repeated(parts[-1], *self._bounds())
            else:
                raise self.refuse(f"there is nothing before {self.word()} to repeat")
            may_repeat = self.kind != "repeat" or self.REPEATS_REPEATS
            self.advance()
        return parts[0] if len(parts) == 1 else InOrder(tuple(parts))

    def _bounds(self) -> tuple[int, int | None]:
        assert self.token is not None
        sign, least, comma, most = self.token.group("sign", "low", "comma", "high")
        low, high = int(least or 0), int(most) if most else None if comma else int(least or 0)
        low, high = self.SIGNS.get(sign, (low, high))
        if max(low, high or 0) > self.MAX_REPEATS or (high is not None and low > high):
            raise self.refuse(f"{self.word()} is not a number of repeats up to {self.MAX_REPEATS}")
        return low, high

    def inside(self, depth: int) -> Symbol:
        """Reads what stands in brackets, up to the closing one."""
        self.advance()
        inside = self.choice(depth + 1)
        if self.kind != "close":
            raise self.refuse("a bracket is not closed")
        return inside

    def characters(self) -> Ranges:
        """Reads a class in square brackets, from behind the opening one."""
        negated = self.text.startswith("^", self.at)
        self.at += negated
        found = set[tuple[int, int]]()
        while not self.text.startswith("]", self.at):
            TURN.tick()
            if self.at >= len(self.text):
                raise self.refuse("a square bracket is not closed")
            low, begun = self.member(), self.at
            if self.text.startswith("-", self.at) and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                high = self.member()
                if len(low) == len(high) == 1 and low[0][0] == low[0][1] and high[0][0] == high[0][1]:
                    if low > high:
                        raise self.refuse(f"the range {_said(self.text[begun - 1 : self.at])} is empty")
                    low = ((low[0][0], high[0][0]),)
                else:  # [\w-.]: the hyphen is one
                    low = (*low, (45, 45), *high)
            found |= set(low)
        self.at += 1
        return others(merged(found)) if negated else merged(found)


class PatternReader(Reader):
    """Reads one regular expression in the syntax of ECMA 262, as JSON Schema wants it.

    Beyond it, where ECMA 262 says nothing useful, Python's: `{,n}`, `(?P<name>…)`, `(?#…)`, `\\A` and `\\Z`.
    """

    MAX_TEXT, MAX_DEPTH, REPEATS_REPEATS = 20_000, 40, False
    SPACES = merged([(9, 13), (32, 32), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F),
                     (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)])  # fmt: skip
    CLASSES: ClassVar = {"d": ((48, 57),), "w": ((48, 57), (65, 90), (95, 95), (97, 122)), "s": SPACES}
    NAMED: ClassVar = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "0": 0, "b": 8}
    DOT = others(((10, 10), (13, 13), (0x2028, 0x2029)))
    TOKEN = re.compile(
        r"(?P<blank>\(\?\#[^)]*\))|(?P<open>\((?:\?(?::|(?P<ahead>[=!])|P?<[^\W\d][\w$]*>|(?P<other>)))?)|(?P<close>\))"
        r"|(?P<or>\|)|(?P<repeat>(?:(?P<sign>[*+?])|\{(?:(?P<low>[0-9]{1,4000})(?P<comma>,)?|,(?=[0-9]))(?P<high>(?<=,)[0-9]{1,4000})?\})\??)"
        r"|(?P<edge>[\^$]|\\[AZz])|(?P<class>\[)|(?P<dot>\.)|(?P<char>.)", re.DOTALL)  # fmt: skip
    CHAR = re.compile(
        r"\\(?:u([dD][89abAB][0-9A-Fa-f]{2})\\u([dD][c-fC-F][0-9A-Fa-f]{2})"
        r"|(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|u\{([0-9A-Fa-f]{1,6})\})"
        r"|c([A-Za-z])|([pP])\{([^}]*)\}|(.))|([^\\])", re.DOTALL)  # fmt: skip

    def refuse(self, what: str) -> InvalidRequest:
        return InvalidRequest(f"pattern {_said(self.text)}: {what}")

    def read(self) -> Symbol:
        found = self.choice(0)
        if self.kind is not None:
            raise self.refuse("a bracket is closed that was not opened")
        return found

    def part(self, depth: int) -> Symbol:
        assert self.token is not None
        if self.kind == "open":
            if self.token["other"] is not None:
                begun = self.text[self.token.start() : self.token.start() + 4]
                raise self.refuse(f"{_said(begun)} (look-behind, flags …) cannot be honoured")
            ahead, inside = self.token["ahead"], self.inside(depth)
            return Ahead(inside, ahead == "=") if ahead else inside
        if self.kind == "edge":
            return Edge(self.word() not in ("^", "\\A"))
        if self.kind != "char":
            return super().part(depth)
        if self.text.startswith(("\\b", "\\B"), self.token.start()):
            raise self.refuse(f"{self.text[self.token.start() :][:2]} (a word's border) cannot be honoured")
        self.at = self.token.start()
        return OneChar(merged(self.member()))

    def member(self) -> Ranges:
        match = self.CHAR.match(self.text, self.at)
        if match is None:
            raise self.refuse("it ends with a backslash")
        self.at = match.end()
        first, second, *codes, control, kind, name, char, plain = match.groups()
        if first:
            code = 0x10000 + ((int(first, 16) & 0x3FF) << 10) + (int(second, 16) & 0x3FF)
        elif any(codes):
            code = int(next(filter(None, codes)), 16)
        elif control:
            code = ord(control) % 32
        elif kind:
            return self._property(name) if kind == "p" else others(self._property(name))
        elif plain or char in self.NAMED:
            code = ord(plain) if plain else self.NAMED[char]
        elif char.lower() in self.CLASSES:
            return self.CLASSES[char] if char in self.CLASSES else others(self.CLASSES[char.lower()])
        elif char in "123456789":
            raise self.refuse(f"\\{char} (a back-reference) cannot be honoured")
        elif char.isascii() and char.isalnum():
            raise self.refuse(f"the escape \\{char} cannot be honoured")
        else:
            code = ord(char)
        if code > 0x10FFFF:
            raise self.refuse(f"{match[0]} is not a character")
        return ((code, code),)

    def _property(self, name: str) -> Ranges:
        """The characters of a general category by its short name, or of a property of emoji."""
        name = re.sub(r"^(gc|General_Category)=", "", name)
        if name in PROPERTIES:
            return PROPERTIES[name]
        found = [ranges for category, ranges in general_categories().items() if category.startswith(name)]
        if not found or not name:
            raise self.refuse(f"the property {_said(name)} is not one of the general categories (L, Lu, Nd …)")
        return merged(itertools.chain(*found))


def _ranges_of(text: str) -> Ranges:
    """Reads ranges written as in Unicode's tables."""
    pairs = (part.partition("-") for part in text.split())
    return merged((int(low, 16), int(high or low, 16)) for low, _, high in pairs)


PROPERTIES = {
    "Any": EVERY_CHAR, "ASCII": ((0, 127),),
    # of Unicode's emoji-data.txt those that zod's z.emoji names
    "Emoji_Component": _ranges_of("23 2A 30-39 200D 20E3 FE0F 1F1E6-1F1FF 1F3FB-1F3FF 1F9B0-1F9B3 E0020-E007F"),
    "Extended_Pictographic": _ranges_of(
        "A9 AE 203C 2049 2122 2139 2194-2199 21A9-21AA 231A-231B 2328 2388 23CF 23E9-23F3 23F8-23FA 24C2 25AA-25AB 25B6 25C0 "
        "25FB-25FE 2600-2605 2607-2612 2614-2685 2690-2705 2708-2712 2714 2716 271D 2721 2728 2733-2734 2744 2747 274C 274E "
        "2753-2755 2757 2763-2767 2795-2797 27A1 27B0 27BF 2934-2935 2B05-2B07 2B1B-2B1C 2B50 2B55 3030 303D 3297 3299 "
        "1F000-1F0FF 1F10D-1F10F 1F12F 1F16C-1F171 1F17E-1F17F 1F18E 1F191-1F19A 1F1AD-1F1E5 1F201-1F20F 1F21A 1F22F "
        "1F232-1F23A 1F23C-1F23F 1F249-1F3FA 1F400-1F53D 1F546-1F64F 1F680-1F6FF 1F774-1F77F 1F7D5-1F7FF 1F80C-1F80F "
        "1F848-1F84F 1F85A-1F85F 1F888-1F88F 1F8AE-1F8FF 1F90C-1F93A 1F93C-1F945 1F947-1FAFF 1FC00-1FFFD"),
}  # fmt: skip


@functools.cache
def general_categories() -> dict[str, list[tuple[int, int]]]:
    """The ranges of Unicode's general categories."""
    import unicodedata

    found: dict[str, list[tuple[int, int]]] = {"Co": [(0xF0000, 0xFFFFD), (0x100000, 0x10FFFD)]}
    found["Cn"] = [(0x40000, 0xDFFFF), (0xE1000, 0xEFFFF), (0xFFFFE, 0xFFFFF), (0x10FFFE, 0x10FFFF)]  # planes without characters
    for codes in (range(0x40000), range(0xE0000, 0xE1000)):
        for category, run in itertools.groupby(codes, lambda code: unicodedata.category(chr(code))):
            members = list(run)
            found.setdefault(category, []).append((members[0], members[-1]))
    return found


@functools.lru_cache(maxsize=1000)
def read_pattern(text: str) -> Symbol:
    """Reads a regular expression into AnyOf, InOrder, Repeated, OneChar, Edge and Ahead. Raises InvalidRequest saying why it
    cannot be honoured."""
    return PatternReader(text).read()


@dataclass(frozen=True)
class Gbnf(Symbol):
    """A grammar in llama.cpp's notation (grammars/README.md there), read when it is met."""

    text: str

    def opened(self) -> Iterable[Symbols]:
        return ((read_gbnf(self.text),),)


@functools.lru_cache(maxsize=32)
def read_gbnf(text: str) -> Symbol:
    """The root of a GBNF grammar. Raises InvalidRequest saying where it is wrong."""
    return GbnfReader(text).read()


def token_names(grammar: str) -> frozenset[str]:
    """The control tokens that a GBNF grammar may write: those it names, such as <think>."""
    return frozenset(filter(None, GbnfReader.NAMED_TOKENS.findall(grammar))) if "<" in grammar else frozenset()


@dataclass(frozen=True, eq=False)
class RuleName(Symbol):
    """A rule of a GBNF grammar, which may be written further down."""

    name: str
    rules: Mapping[str, Symbol]

    def opened(self) -> Iterable[Symbols]:
        return ((self.rules[self.name],),)


class GbnfReader(Reader):
    """Reads one GBNF grammar into symbols, as llama.cpp does: of two rules with one name the last counts."""

    NAMED_TOKENS = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|\#[^\n]*|(<[^>\n]+>)', re.DOTALL)  # between texts
    TOKEN = re.compile(
        r"(?P<blank>(?:[ \t\r\n]|\#[^\n]*)+)|(?P<rule>[A-Za-z0-9-_]+)[ \t]*::=|(?P<name>[A-Za-z0-9-_]+)|(?P<literal>\")"
        r"|(?P<class>\[)|(?P<repeat>(?P<sign>[*+?])|\{\s*(?P<low>[0-9]{1,12})\s*(?:(?P<comma>,)\s*(?P<high>[0-9]{0,12})\s*)?\})"
        r"|(?P<open>\()|(?P<close>\))|(?P<or>\|)|(?P<dot>\.)|(?P<token><(?!\[)[^>\n]+>)|(?P<no_text>!?<)")  # fmt: skip
    CHAR = re.compile(r"\\x([0-9A-Fa-f]{2})|\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})|\\(.)|([^\\])", re.DOTALL)
    ESCAPES: ClassVar = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\", "[": "[", "]": "]", "-": "-", "^": "^"}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.rules: dict[str, Symbol] = {}
        self.used: dict[str, int] = {}  # name → place

    def refuse(self, what: str, place: int | None = None) -> InvalidRequest:
        place = (self.token.start() if self.token else self.at) if place is None else place
        return InvalidRequest(f"grammar: line {self.text.count(chr(10), 0, place) + 1}: {what}", "grammar")

    def read(self) -> Symbol:
        while self.token is not None:
            if self.kind != "rule":
                wrong = "{} is not expected here" if self.rules else "a rule must begin here (name ::= …), not {}"
                raise self.refuse(wrong.format(_said(self.word())))
            name = self.token["rule"]
            self.advance()
            self.rules[name] = self.choice(0)
        missing = next((name for name in self.used if name not in self.rules), None)
        if missing is not None:
            raise self.refuse(f"the rule {_said(missing)} is used but not written", self.used[missing])
        if "root" not in self.rules:
            raise InvalidRequest("grammar: there is no rule named root", "grammar")
        self._check_left_recursion()
        return self.rules["root"]

    def part(self, depth: int) -> Symbol:
        assert self.token is not None
        if self.kind == "name":
            self.used.setdefault(self.word(), self.token.start())
            return RuleName(self.word(), self.rules)
        if self.kind == "literal":
            return word(self._literal())
        if self.kind == "token":
            return word(self.word())
        if self.kind == "no_text":
            raise self.refuse("tokens by number, and all tokens but one, cannot be honoured: write <name>, or a text")
        found = super().part(depth)
        if found == OneChar(()):
            raise self.refuse("a class without characters matches nothing")
        return found

    def _literal(self) -> str:
        codes = []
        while not self.text.startswith('"', self.at):
            TURN.tick()
            if self.at >= len(self.text):
                raise self.refuse("a text is not closed")
            codes.append(self.member()[0][0])
        self.at += 1
        return "".join(map(chr, codes))

    def member(self) -> Ranges:
        match = self.CHAR.match(self.text, self.at)
        if match is None:
            raise self.refuse("the grammar ends with a backslash")
        self.at = match.end()
        *codes, escaped, plain = match.groups()
        code = next((int(digits, 16) for digits in codes if digits), None)
        if code is None and plain is None and escaped not in self.ESCAPES:
            raise self.refuse(f"the escape {_said(match[0])} is unknown")
        code = ord(plain or self.ESCAPES[escaped]) if code is None else code
        if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            raise self.refuse(f"{match[0]} is not a character")
        return ((code, code),)

    def _check_left_recursion(self) -> None:
        """Refuses a rule that leads back to itself before anything is read: it would open for ever."""
        empty: dict[Symbol, bool] = {}  # the symbols that were looked through, and whether they may be empty
        for rule in self.rules.values():
            path = {} if rule in empty else {rule: self._first_parts(rule, empty)}
            while path:
                TURN.tick()
                part = next(path[next(reversed(path))], None)
                if part is None:
                    path.popitem()
                elif part in path:
                    name = next(symbol.name for symbol in reversed(path) if isinstance(symbol, RuleName))
                    raise InvalidRequest(f"grammar: the rule {_said(name)} is left-recursive: it begins with itself", "grammar")
                elif part not in empty:
                    path[part] = self._first_parts(part, empty)

    def _first_parts(self, symbol: Symbol, empty: dict[Symbol, bool]) -> Iterator[Symbol]:
        """The parts that may be met before anything is read; says at the end whether the whole may be empty."""
        is_empty = isinstance(symbol, InOrder) or (isinstance(symbol, Repeated) and not symbol.low)
        for part in (self.rules[symbol.name],) if isinstance(symbol, RuleName) else symbol.parts:
            yield part
            if not isinstance(symbol, InOrder):
                is_empty = is_empty or empty[part]
            elif not empty[part]:
                is_empty = False
                break
        empty[symbol] = is_empty


# ── D.3. Strings ──────────────────────────────────────────────────────────────────────────────────────────────────────
# Sets of texts, with and, or and not, and the JSON strings of such a set: symbols that know what can still come.
# Offers: Texts and its algebra (union, intersection, complement, word_texts, texts_by); shortest; StringShape, string_symbol,
# string_fits, few_texts; JsonText; FORMATS. Uses: D.1's symbols, D.2's patterns.


class Texts:
    """A set of texts, as an expression over ranges of characters: a regular language. The functions below make equal ones once.

    No text is shorter than `least` or longer than `most`. In one that is `plain`, as those are that are made without complements
    and intersections, there is a text as short as `least`.
    """

    __slots__ = ("data", "kind", "least", "most", "moves", "nullable", "parts", "plain", "search", "shortest")
    MAX_KEPT = 50_000
    made: ClassVar[dict[tuple[Any, ...], Texts]] = {}

    def __init__(self, kind: str, data: Any, parts: tuple[Texts, ...]) -> None:
        self.kind, self.data, self.parts = kind, data, parts
        self.moves: Moves | None = None
        self.search: Any = None  # for its shortest text, as far as one thread came: it goes on from there when asked again
        self.shortest: float | None = None  # the length of its shortest text, once that has been sought; inf: there is none
        self.plain: bool = kind not in ("none", "not", "both") and all(part.plain for part in parts)
        self.nullable, self.least, self.most = False, 1, 1.0
        leasts, mosts = [part.least for part in parts], [part.most for part in parts]
        if kind == "empty":
            self.nullable, self.least, self.most = True, 0, 0
        elif kind == "words":
            lengths = {len(text) for text in data.rest()}
            self.nullable, self.least, self.most = 0 in lengths, min(lengths), max(lengths)
        elif kind == "then":
            self.nullable, self.least, self.most = all(part.nullable for part in parts), sum(leasts), sum(mosts)
        elif kind == "repeat":
            low, high = data
            self.nullable = low == 0 or parts[0].nullable
            self.least, self.most = leasts[0] * low, mosts[0] * high if mosts[0] else 0
        elif kind == "sized":
            low, high = data
            self.plain = self.plain and (low <= leasts[0] <= high or parts[0] is ALL)
            self.nullable, self.least, self.most = parts[0].nullable and low == 0, max(low, *leasts), min(high, *mosts)
        elif kind == "not":
            self.nullable, self.least, self.most = not parts[0].nullable, int(parts[0].nullable), math.inf
        elif kind == "both":
            self.nullable, self.least, self.most = all(part.nullable for part in parts), max(leasts), min(mosts)
        elif kind == "either":
            self.nullable, self.least, self.most = any(part.nullable for part in parts), min(leasts), max(mosts)


Moves = tuple[tuple[Ranges, Texts], ...]  # characters that may come first, and the texts that follow one of them
MAX_OPTIONS, MAX_UNROLLED = 1000, 50


def _make(kind: str, data: Any = None, parts: tuple[Texts, ...] = ()) -> Texts:
    key = (kind, data, parts)
    found = Texts.made.get(key)
    if found is None:
        TURN.tick()
        if len(Texts.made) > Texts.MAX_KEPT:
            Texts.made = {(one.kind, one.data, one.parts): one for one in CONSTANTS}  # what is in use lives on
        found = Texts.made.setdefault(key, Texts(*key))
    return found


def char_texts(ranges: Ranges) -> Texts:
    """The texts of one character."""
    return _make("char", ranges) if ranges else NONE


NONE, EMPTY, EVERY = _make("none"), _make("empty"), _make("char", EVERY_CHAR)
ALL = _make("repeat", (0, math.inf), (EVERY,))
CONSTANTS = (NONE, EMPTY, EVERY, ALL)


def then(one: Texts, two: Texts) -> Texts:
    """One text of each, joined."""
    chain = [one]
    while chain[-1].kind == "then":
        chain[-1:] = chain[-1].parts
    for part in reversed(chain):
        if part is NONE or two is NONE:
            two = NONE
        elif part is EMPTY or two is EMPTY:
            two = two if part is EMPTY else part
        elif (part is ALL and two.nullable) or (two is ALL and part.nullable):
            two = ALL
        else:
            two = _make("then", parts=(part, two))
    return two


def repeat(part: Texts, low: int, high: float) -> Texts:
    """So many texts of a set, joined."""
    if high == 0 or part is EMPTY or part is NONE:
        return NONE if part is NONE and low else EMPTY
    low = 0 if part.nullable else low
    if part.kind == "repeat" and part.data == (0, math.inf):
        return part  # (a*)*
    return part if low == high == 1 else _make("repeat", (low, high), (part,))


def union(options: Iterable[Texts]) -> Texts:
    """The texts of all."""
    flat: dict[Texts, None] = {}
    ranges: list[tuple[int, int]] = []
    for option in options:
        for part in option.parts if option.kind == "either" else (option,):
            if part.kind == "char":
                ranges += part.data
            else:
                flat[part] = None
    flat.pop(NONE, None)
    if ALL in flat:
        return ALL
    if len(flat) > 1:
        flat = _merged_counts(flat)
    if ranges:
        flat[char_texts(merged(ranges))] = None
    if EMPTY in flat and any(part.nullable for part in flat if part is not EMPTY):
        del flat[EMPTY]
    if len(flat) > MAX_OPTIONS:
        raise InvalidRequest(f"pattern: a text has over {MAX_OPTIONS} readings at once")
    return _of_some("either", flat, NONE)


def _of_some(kind: str, parts: dict[Texts, None], without: Texts) -> Texts:
    return _make(kind, parts=tuple(sorted(parts, key=id))) if len(parts) > 1 else next(iter(parts), without)


def _merged_counts(parts: dict[Texts, None]) -> dict[Texts, None]:
    """Makes one of a{0,4}b and a{2,7}b, or counting would keep every count."""
    counts: dict[tuple[Texts, Texts], list[tuple[int, float]]] = {}
    for texts in parts:
        head, rest = texts.parts if texts.kind == "then" else (texts, EMPTY)
        part, low, high = (head.parts[0], *head.data) if head.kind == "repeat" else (head, 1, 1)
        counts.setdefault((part, rest), []).append((low, high))
    if len(counts) == len(parts):
        return parts
    return dict.fromkeys(then(repeat(part, *span), rest) for (part, rest), spans in counts.items() for span in touching(spans))


def intersection(parts: Iterable[Texts]) -> Texts:
    """The texts that are in every one."""
    flat: dict[Texts, None] = {}
    low, high = 0, math.inf
    for part in parts:
        if part.kind == "sized":
            (least, most), (part,) = part.data, part.parts
            low, high = max(low, least), min(high, most)
        flat |= dict.fromkeys(part.parts if part.kind == "both" else (part,))
    flat.pop(ALL, None)
    if NONE in flat or any(part.kind == "not" and part.parts[0] in flat for part in flat):
        return NONE
    return sized(_of_some("both", flat, ALL), low, high)


def sized(texts: Texts, low: int, high: float) -> Texts:
    """Those of the texts that have so many characters."""
    if texts.kind == "sized":
        return intersection([texts, sized(ALL, low, high)])
    if max(low, texts.least) > min(high, texts.most):
        return NONE
    return texts if low <= texts.least and texts.most <= high else _make("sized", (low, high), (texts,))


def complement(texts: Texts) -> Texts:
    """All the other texts."""
    if texts is NONE or texts is ALL:
        return ALL if texts is NONE else NONE
    return texts.parts[0] if texts.kind == "not" else _make("not", parts=(texts,))


class WordList:
    """Some of the texts of a sorted list, which begin alike: from `low` to `high`, from their character `at` on."""

    def __init__(self, texts: list[str], low: int, high: int, at: int) -> None:
        self.texts, self.low, self.high, self.at = texts, low, high, at

    def rest(self) -> Iterator[str]:
        """The texts, without what was read."""
        return (text[self.at :] for text in self.texts[self.low : self.high])

    def moves(self) -> Iterator[tuple[Ranges, Texts]]:
        texts, at = self.texts, self.at
        first = self.low + (len(texts[self.low]) == at)
        while first < self.high:
            code = ord(texts[first][at])
            last = bisect.bisect_right(texts, code, first, self.high, key=lambda text: ord(text[at]))
            yield ((code, code),), _make("words", WordList(texts, first, last, at + 1))
            first = last


@functools.lru_cache(maxsize=1000)
def word_texts(texts: frozenset[str]) -> Texts:
    """Just some texts."""
    return _make("words", WordList(sorted(texts), 0, len(texts), 0)) if texts else NONE


def moves(texts: Texts) -> Moves:
    """The sets that follow a first character (Brzozowski's derivatives), by ranges of characters."""
    if texts.moves is None:
        texts.moves = tuple(_moves(texts))
        TURN.kept()
    return texts.moves


def _moves(texts: Texts) -> Iterable[tuple[Ranges, Texts]]:
    kind, parts = texts.kind, texts.parts
    if kind in ("none", "empty"):
        return ()
    if kind == "char":
        return ((texts.data, EMPTY),)
    if kind == "words":
        return texts.data.moves()
    if kind == "repeat":
        again = repeat(parts[0], max(texts.data[0] - 1, 0), texts.data[1] - 1)
        return [(ranges, then(behind, again)) for ranges, behind in moves(parts[0])]
    if kind == "sized":
        low, high = texts.data
        return [(ranges, sized(behind, max(low - 1, 0), high - 1)) for ranges, behind in moves(parts[0])]
    if kind == "either":
        return _combined([moves(part) for part in parts], union)
    if kind == "both":
        return _combined([moves(part) for part in parts], lambda found: intersection(found) if len(found) == len(parts) else NONE)
    if kind == "not":
        return _combined([moves(parts[0]), ((EVERY_CHAR, NONE),)], lambda found: complement(union(found)))
    found = []
    while texts.kind == "then":
        one, texts = texts.parts
        found.append([(ranges, then(behind, texts)) for ranges, behind in moves(one)])
        if not one.nullable:
            return found[0] if len(found) == 1 else _combined(found, union)
    return _combined([*found, moves(texts)], union)


def _combined(options: Iterable[Iterable[tuple[Ranges, Texts]]], join: Callable[[list[Texts]], Texts]) -> Moves:
    """The moves of several sets at once: `join` makes one of all that a character leads to."""
    begun: dict[int, list[Texts]] = {}
    ended: dict[int, list[Texts]] = {}
    for ranges, behind in itertools.chain(*options):
        for low, high in ranges:
            begun.setdefault(low, []).append(behind)
            ended.setdefault(high + 1, []).append(behind)
    found: dict[Texts, list[tuple[int, int]]] = {}
    known: dict[tuple[int, frozenset[Texts]], Texts] = {}
    here: list[Texts] = []
    for low, after in itertools.pairwise(sorted(begun.keys() | ended.keys())):
        for one in ended.get(low, ()):
            here.remove(one)
        here += begun.get(low, ())
        if here:
            key = len(here), frozenset(here)
            if key not in known:
                known[key] = join(here)
            found.setdefault(known[key], []).append((low, after - 1))
    found.pop(NONE, None)
    return tuple((tuple(touching(ranges)), behind) for behind, ranges in found.items())


# Patterns


class Matching:
    """Makes the set of texts in which a pattern is found."""

    MAX_WORK = 20_000

    def __init__(self) -> None:
        self.work = 0

    def before(self, pattern: Symbol, rest: tuple[Texts, Texts]) -> tuple[Texts, Texts]:
        """Joins a pattern and the rest up to the text's end: as read from the text's beginning, and as read from later on.

        That a pattern is read with all that follows makes anchors and lookaheads plain intersections with the rest.
        """
        self.work += 1
        if self.work > self.MAX_WORK:
            raise InvalidRequest("pattern: its anchors and repeats multiply too far")
        first, later = rest
        if not pattern.looks:
            return self._plainly(self.alone(pattern), rest)
        if isinstance(pattern, Edge):
            ends = tuple(EMPTY if texts.nullable else NONE for texts in rest)
            return (ends[0], ends[1]) if pattern.at_end else (first, NONE)
        if isinstance(pattern, InOrder):
            for part in reversed(pattern.parts):
                rest = self.before(part, rest)
            return rest
        if isinstance(pattern, AnyOf):
            options = [self.before(part, rest) for part in pattern.parts]
            return union(option[0] for option in options), union(option[1] for option in options)
        if isinstance(pattern, Ahead):
            one, two = self.before(pattern.inside, (ALL, ALL))
            one, two = (one, two) if pattern.wanted else (complement(one), complement(two))
            return intersection([one, first]), intersection([two, later])
        assert isinstance(pattern, Repeated)
        return self._loop(pattern, rest)

    def alone(self, pattern: Symbol) -> Texts:
        """The texts that a pattern matches as a whole, away from the text's beginning and end."""
        if isinstance(pattern, OneChar):
            return char_texts(pattern.ranges)
        if isinstance(pattern, AnyOf):
            return union([self.alone(part) for part in pattern.parts])
        if isinstance(pattern, Repeated):
            return repeat(self.alone(pattern.symbol), pattern.low, math.inf if pattern.high is None else pattern.high)
        if isinstance(pattern, InOrder):
            return functools.reduce(lambda later, one: then(self.alone(one), later), reversed(pattern.parts), EMPTY)
        return NONE  # an Edge

    @staticmethod
    def _plainly(texts: Texts, rest: tuple[Texts, Texts]) -> tuple[Texts, Texts]:
        """Joins texts that look at nothing around them, and the rest."""
        first, later = rest
        found = then(texts, later)
        if first is later or not texts.nullable:
            return found, found
        return union([first, then(sized(texts, 1, math.inf), later)]), found

    def _loop(self, loop: Repeated, rest: tuple[Texts, Texts]) -> tuple[Texts, Texts]:
        """Joins a repeat of something that looks around it: what reads between its first round and its last meets no edge."""
        part, low, more = loop.symbol, loop.low, math.inf if loop.high is None else loop.high - loop.low
        if _looks_ahead(part) and loop.high not in (0, 1):
            return self._tempered(loop, rest)
        if low > MAX_UNROLLED:
            raise InvalidRequest(f"pattern: an anchor within over {MAX_UNROLLED} repeats cannot be honoured")
        for optional in range(int(min(more, 2))):
            rest = self._plainly(repeat(self.alone(part), 0, more - 2), rest) if optional else rest
            once = self.before(part, rest)
            rest = union([rest[0], once[0]]), union([rest[1], once[1]])
        return self.before(InOrder((part,) * low), rest) if low else rest

    def _tempered(self, loop: Repeated, rest: tuple[Texts, Texts]) -> tuple[Texts, Texts]:
        """((?!foo).)* up to the end: what it says of each character is that foo is nowhere."""
        parts = loop.symbol.parts
        if isinstance(loop.symbol, InOrder) and len(parts) > 1 and rest == (EMPTY, EMPTY) and loop.high is None:
            *looks, char = parts
            unwanted = [look.inside for look in looks if isinstance(look, Ahead) and not look.wanted]
            seen = [self.before(inside, (ALL, ALL)) for inside in unwanted]
            if isinstance(char, OneChar) and len(seen) == len(looks) and all(a is b and not a.nullable for a, b in seen):
                nowhere = (complement(then(ALL, one)) for one, _ in seen)
                found = intersection([repeat(self.alone(char), loop.low, math.inf), *nowhere])
                return found, found
        raise InvalidRequest("pattern: a look ahead within a repeat cannot be honoured")


def _looks_ahead(pattern: Symbol) -> bool:
    return isinstance(pattern, Ahead) or any(map(_looks_ahead, pattern.parts))


@functools.lru_cache(maxsize=1000)
def texts_by(keyword: str, value: str, wanted: bool = True) -> Texts:
    """The strings that a schema's `pattern` or `format` admits; without `wanted` all others. Raises InvalidRequest saying why
    it cannot be honoured."""
    if keyword == "pattern":
        pattern = InOrder((Repeated(OneChar(EVERY_CHAR)), read_pattern(value)))
    elif value in UNKNOWN_FORMATS or (value in PARTIAL_FORMATS and not wanted):
        raise InvalidRequest(f"{'' if wanted else 'not '}format {_said(value)} cannot be honoured")
    else:  # what is no standard's is a remark
        pattern = InOrder((Edge(False), read_pattern(FORMATS[value]), Edge(True))) if value in FORMATS else InOrder(())
    longest = MAX_HOSTNAME if (keyword, value) == ("format", "hostname") else math.inf
    found = sized(Matching().before(pattern, (ALL, ALL))[0], 0, longest)
    return found if wanted else complement(found)


# What can still be reached

MAX_SEARCH = 20_000  # sets looked at for one question, of which each takes 1 to 100 µs


def alive(at: Texts) -> bool:
    """True if there is a text. Raises NotYet.

    What a search does not find counts as dead: a text is then kept from what could have been right, but never led where
    it cannot end.
    """
    try:
        return at.plain or at.nullable or shortest(at) < math.inf
    except InvalidRequest:
        at.shortest = math.inf
        return False


def _known_shortest(at: Texts) -> float | None:
    """The length of the shortest text where that needs no search."""
    if at.plain or at.nullable:
        return at.least
    if at.shortest is None and at.kind == "sized":
        (low, high), (inner,) = at.data, at.parts
        found = _known_shortest(inner)
        if found is not None and found < low and any(behind is inner for _, behind in moves(inner)):
            found = low  # a character that leads back here makes a text as long as it must be
        if found is not None and found >= low:
            return found if found <= high else math.inf
    return at.shortest


def shortest(at: Texts, spend: Callable[[int], None] = lambda steps: None) -> float:
    """Finds the length of the shortest text, breadth first; inf if there is none. Raises InvalidRequest if that takes too long.

    Raises NotYet: what was derived is kept, and the next search goes quickly where this one has been. `spend` counts the steps.
    """
    if at.kind == "sized" and _known_shortest(at) is None:
        shortest(at.parts[0], spend)
    thread, search = threading.get_ident(), at.search
    if not search or search[0] != thread:  # another thread's goes on by itself
        search = thread, {at: None}, [at], 0, math.inf, 0, None
    _, before, layer, length, found, rest, last = search
    while layer and length < found:
        longer: dict[Texts, Texts] = {}
        for one in layer:
            known = _known_shortest(one)
            if known is None:
                spend(2)
                fresh = (behind for _, behind in moves(one) if behind not in before and behind not in longer)
                longer |= dict.fromkeys(fresh, one)
            elif length + known < found:
                found, rest, last = length + known, known, one
            if len(before) + len(longer) > MAX_SEARCH:
                at.search = None
                raise InvalidRequest("the string's patterns and formats together are too complex to tell what fits them")
        before |= longer
        layer, length = list(longer), length + 1
        at.search = thread, before, layer, length, found, rest, last
        TURN.kept()
    at.search = None
    if last is None:
        for one in before:
            one.shortest = math.inf
    while last is not None:
        last.shortest, rest = rest, rest + 1
        last = before[last]
    return found


@functools.lru_cache(maxsize=50_000)
def living(at: Texts) -> Moves:
    """How a text may go on: the moves behind which there is a text."""
    return tuple((ranges, behind) for ranges, behind in moves(at) if alive(behind))


def behind(at: Texts, code: int) -> Texts:
    """The texts that follow a character."""
    for ranges, behind in moves(at):
        index = bisect.bisect_right(ranges, (code, 0x110000)) - 1
        if index >= 0 and ranges[index][1] >= code:
            return behind
    return NONE


# JSON strings


@dataclass(frozen=True)
class StringShape:
    """The condition on a JSON string."""

    texts: Texts = ALL

    @classmethod
    def of(cls, lows: Iterable[int], highs: Iterable[int], rules: Iterable[tuple[str, str, bool]]) -> StringShape:
        """The shape by several bounds of the length, in code points, and by arguments of texts_by."""
        texts = intersection(texts_by(*rule) for rule in rules)
        return cls(sized(texts, max(lows, default=0), min(highs, default=math.inf)))

    def within(self, texts: Texts) -> StringShape:
        """The same, of just those texts."""
        return StringShape(intersection([self.texts, texts]))

    def but_not(self, texts: Iterable[str]) -> StringShape:
        """The same without some texts."""
        return self.within(complement(word_texts(frozenset(texts))))


@dataclass(frozen=True)
class JsonText(Symbol):
    """The rest of a JSON string behind its opening quote."""

    at: Texts
    is_escaped: bool = False  # a backslash was read

    def longer(self) -> list[tuple[Ranges, JsonText]]:
        """The characters that may come, and the rest behind them."""
        return [(ranges, replace(self, at=behind, is_escaped=False)) for ranges, behind in living(self.at)]

    @functools.cached_property
    def _ways(self) -> list[Symbols]:
        """The ways to go on, each from a symbol that reads bytes."""
        longer = self.longer()
        if self.is_escaped:
            return [(way, rest) for ranges, rest in longer for way in written(ranges, "escaped")]
        found: list[Symbols] = [(Word(b'"'),)] if self.at.nullable else []
        first, last = (longer[0][0][0][0], longer[-1][0][-1][1]) if longer else (0, 1)
        if first == last:  # where no other character may stand, there is one way to write it
            return [*found, (word(json.dumps(chr(first), ensure_ascii=False)[1:-1]), longer[0][1])]
        found += ((way, rest) for ranges, rest in longer for way in written(ranges, "JSON"))
        return [*found, (Word(b"\\"), replace(self, is_escaped=True))] if longer else found

    @functools.cached_property
    def firsts(self) -> int:  # type: ignore[override]
        return functools.reduce(operator.or_, (way[0].firsts for way in self._ways), 0)

    def step(self, byte: int) -> Symbols | None:
        found = [(*more, *rest) for first, *rest in self._ways if (more := first.step(byte)) is not None]
        if len(found) > 1:
            return (AnyOf(tuple(map(InOrder, found))),)
        return found[0] if found else None


@functools.lru_cache(maxsize=1000)
def string_symbol(shape: StringShape) -> Symbol | None:
    """A JSON string of a shape, with its quotes; None if there is none. Raises InvalidRequest where that cannot be told."""
    return None if shortest(shape.texts) == math.inf else InOrder((Word(b'"'), JsonText(shape.texts)))


def string_fits(shape: StringShape, text: str) -> bool:
    """True if a text has a shape."""
    return functools.reduce(behind, map(ord, text), shape.texts).nullable


def few_texts(shape: StringShape, most: int) -> set[str] | None:
    """The texts of a shape; None if they are more than `most`, or longer than 1000 characters."""
    found = set[str]()
    layer = [("", shape.texts)] if alive(shape.texts) else []  # each can be finished, so texts are at least as many
    for _ in range(1000):
        if not layer or len(found) + len(layer) > most:
            break
        found |= {text for text, at in layer if at.nullable}
        longer = ((text + chr(code), behind) for text, at in layer for ranges, behind in living(at)
                  for first, last in ranges for code in range(first, last + 1))  # fmt: skip
        layer = list(itertools.islice(longer, most + 1))
    return None if layer else found


# Formats as regular expressions, after the RFCs that JSON Schema names; where jsonschema's checker is narrower, as it says.
_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
         f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)")  # fmt: skip
_CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](?:\.[0-9]+)?(?:[Zz]|[+-]{_CLOCK})"  # a leap second is right twice in ten years: left out
_SPAN = "T(?:[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?|[0-9]+M(?:[0-9]+S)?|[0-9]+S)"
_DAYS = "(?:[0-9]+Y(?:[0-9]+M(?:[0-9]+D)?)?|[0-9]+M(?:[0-9]+D)?|[0-9]+D)"
_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"{_OCTET}(?:\.{_OCTET}){{3}}"
_H16 = "[0-9A-Fa-f]{1,4}"
_LS32 = f"(?:{_H16}:{_H16}|{_IPV4})"
_IPV6 = "(?:{})".format("|".join(
    [f"(?:{_H16}:){{6}}{_LS32}", f"::(?:{_H16}:){{0,5}}{_LS32}"]
    + [f"{_H16}(?::{_H16}){{0,{n}}}::(?:{_H16}:){{0,{4 - n}}}{_LS32}" for n in range(5)]
    + [f"(?:{_H16}(?::{_H16}){{0,5}})?::{_H16}", f"(?:{_H16}(?::{_H16}){{0,6}})?::"]))  # fmt: skip
# "--" as a label's third and fourth character is left out: what is written so (xn--) is right only if it is right in Unicode.
_LABEL = ("[A-Za-z0-9](?:[A-Za-z0-9-]{0,2}[A-Za-z0-9]"
          "|[A-Za-z0-9-](?:[A-Za-z0-9][A-Za-z0-9-]|-[A-Za-z0-9])[A-Za-z0-9-]{0,58}[A-Za-z0-9])?")  # fmt: skip
_HOSTNAME = rf"{_LABEL}(?:\.{_LABEL})*"
_MAIL_HOST = rf"(?:{_HOSTNAME}|\[(?:{_IPV4}|IPv6:{_IPV6})\])"
_POINTER = "(?:/(?:[^~/]|~[01])*)*"


def _mailbox(more: str) -> str:
    """RFC 5321's mailbox; `more` characters may stand before the @."""
    atom = f"[A-Za-z0-9!#$%&'*+/=?^_`{{|}}~{more}-]+"
    return rf'(?:{atom}(?:\.{atom})*|"(?:[ !#-\[\]-~{more}]|\\[ -~])*")@{_MAIL_HOST}'


def _uri(more: str, private: str = "") -> tuple[str, str]:
    """RFC 3986's URI, and its relative reference; RFC 3987 allows more characters."""
    free, escaped = rf"A-Za-z0-9._~!$&'()*+,;={more}\-", "%[0-9A-Fa-f]{2}"
    char, plain, user = (f"(?:[{free}{extra}]|{escaped})" for extra in (":@", "@", ":"))
    host = rf"(?:\[(?:{_IPV6}|[vV][0-9A-Fa-f]+\.[A-Za-z0-9._~!$&'()*+,;=:-]+)\]|(?:[{free}]|{escaped})*)"
    authority = f"//(?:{user}*@)?{host}(?::[0-9]*)?(?:/{char}*)*"
    rooted = f"/(?:{char}+(?:/{char}*)*)?"
    tail = rf"(?:\?(?:[{free}:@/?{private}]|{escaped})*)?(?:\#(?:[{free}:@/?]|{escaped})*)?"
    whole = f"[A-Za-z][A-Za-z0-9+.-]*:(?:{authority}|{rooted}|{char}+(?:/{char}*)*)?{tail}"
    return whole, f"(?:{authority}|{rooted}|{plain}+(?:/{char}*)*)?{tail}"


_UCS = r"\u00A0-\uD7FF\uF900-\uFDCF\uFDF0-\uFFEF" + "".join(
    rf"\u{{{plane:X}{'1000' if plane == 14 else '0000'}}}-\u{{{plane:X}FFFD}}" for plane in range(1, 15))  # fmt: skip
(_URI, _RELATIVE), (_IRI, _RELATIVE_IRI) = _uri(""), _uri(_UCS, r"\uE000-\uF8FF\u{F0000}-\u{FFFFD}\u{100000}-\u{10FFFD}")
# Regular expressions without what dialects read differently, brackets at most one deep.
_ITEM = r"(?:[A-Za-z0-9 _,:;=!@%&<>/~#'\"-]|\\[dDwWsStnrfv.*+?()\[\]{}|^$/-])"
_SET = r"\[\^?(?:[A-Za-z0-9_.,:;!?@#%<>=+*(){}$/'\" ]|[a-m]-[n-z]|[A-M]-[N-Z]|[0-4]-[5-9]|\\[dDwWsS])+\]"
_PIECE = rf"(?:{_ITEM}|\.|{_SET})(?:(?:[*+?]|\{{[0-9](?:,(?:[1-9][0-9])?)?\}})\??)?"
_RUN = rf"(?:{_PIECE})*(?:\|(?:{_PIECE})*)*"
_REGEX = rf"\^?(?:{_PIECE}|\(\?:{_RUN}\)[*+?]?|\({_RUN}\)[*+?]?|\|)*\$?"

FORMATS = {  # name → a regular expression for the whole text
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}[Tt]{_TIME}",
    "duration": f"P(?:[0-9]+W|{_DAYS}(?:{_SPAN})?|{_SPAN})",
    "email": _mailbox(""),
    "idn-email": _mailbox(r"\u00A0-\uD7FF\uF900-\uFDCF\uFDF0-\uFFEF"),
    "hostname": _HOSTNAME,
    "ipv4": _IPV4,
    "ipv6": _IPV6,
    "uuid": "[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
    "uri": _URI,
    "uri-reference": f"(?:{_URI}|{_RELATIVE})",
    "iri": _IRI,
    "iri-reference": f"(?:{_IRI}|{_RELATIVE_IRI})",
    "json-pointer": _POINTER,
    "relative-json-pointer": f"(?:0|[1-9][0-9]*)(?:#|{_POINTER})",
    "regex": _REGEX,
}
MAX_HOSTNAME = 253
UNKNOWN_FORMATS = ("idn-hostname", "uri-template")  # standard ones that are refused
PARTIAL_FORMATS = ("email", "idn-email", "regex", "hostname")  # the rule leaves out some texts that have the format


# ── D.4. Numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────
# JSON numbers by bounds and multiples, digit by digit.
# Offers: NumberShape, number_symbol, another_number, number_fits. Uses: D.1's symbols.


@dataclass(frozen=True)
class NumberShape:
    """The condition on a JSON number. A bound is its value and whether the value itself is left out."""

    whole: bool = False
    low: tuple[int | float, bool] | None = None
    high: tuple[int | float, bool] | None = None
    multiples: tuple[int | float, ...] = ()
    not_multiples: tuple[int | float, ...] = ()  # (1,): not an integer
    excluded: frozenset[int | float] = frozenset()


def exact(value: int | float) -> Fraction:
    """A number as its shortest decimal notation has it."""
    from fractions import Fraction

    return Fraction(value if isinstance(value, int) else repr(value))


Bound = tuple[int | float, bool]
Spans = tuple[tuple[int, int], ...]


class NumberMachine:
    """The numbers of one shape, as whole multiples of a smallest unit (a decimal place) in an interval.

    The digits are bounded, so that no number goes on for ever: doubles hold fewer. A number with bounds has an exponent only
    behind one digit other than 0, and what stands before it is within bounds too (or a model that begins with 7 where 1 is the
    most would be led to 7e-05). One with multiples has none, nor one with excluded values.
    """

    DIGITS, PLACES, MORE_PLACES, DOUBLE = 20, 18, 3, 15
    MAX_PLACES, MAX_NUMBER, MAX_UNLIKE, MAX_TRIES = 60, 10**400, 4, 64

    def __init__(self, shape: NumberShape, exponents: bool) -> None:
        multiples, unlike = (*shape.multiples, *((1,) if shape.whole else ())), shape.not_multiples
        bounds = [bound[0] for bound in (shape.low, shape.high) if bound]
        if any(value <= 0 for value in (*multiples, *unlike)):
            raise InvalidRequest("multipleOf must be over 0")
        if len(unlike) > self.MAX_UNLIKE:
            raise InvalidRequest(f"over {self.MAX_UNLIKE} multipleOf that must not hold cannot be honoured")
        self.has_bounds, has_factors = bool(bounds), bool(multiples or unlike)
        self.places = max([self.PLACES, *(self._places(bound) + 1 for bound in bounds)])
        if has_factors:
            self.places = max(map(self._places, (*multiples, *unlike))) + (0 if multiples else self.MORE_PLACES)
        scale = 10**self.places
        units, others = ([int(exact(value) * scale) for value in values] for values in (multiples, unlike))
        unit = math.lcm(*units)
        if not any(number % scale for number in (unit, *others)):
            self.places = 0  # a point would add nothing
        self.scale = 10**self.places
        self.unit, *self.unlike = (number * self.scale // scale for number in (unit, *others))
        self.cycle = math.lcm(self.unit, *self.unlike)
        self.low = self._edge(*shape.low) if shape.low else -math.inf
        self.high = -self._edge(-shape.high[0], shape.high[1]) if shape.high else math.inf
        low, high = ((bound and (-bound[0], bound[1])) for bound in (shape.high, shape.low))
        ends = ((shape.low, shape.high), (low, high)) if exponents and not has_factors else ()
        self.exponents = [exponent_within(*span) for span in ends] or [None, None]  # of a positive number, and of a negative one
        nearest = int(max(self.low, -self.high, 0))  # the smallest magnitude
        most = self.DOUBLE - self.places if self.places and has_factors else self.DIGITS  # a double holds what is to be divided
        self.digits = max(most, len(str((nearest + self.unit) // self.scale)) + 1)
        self.most = 10 ** (self.digits + self.places) - 1

    def _places(self, value: int | float) -> int:
        """The decimal places of a number. Raises InvalidRequest where it is out of all proportion."""
        if not abs(value) < self.MAX_NUMBER:
            raise InvalidRequest("a bound of numbers has too many digits")
        parts = exact(value).denominator
        places = next((count for count in range(self.MAX_PLACES + 1) if 10**count % parts == 0), None)
        if places is None:
            raise InvalidRequest(f"the number {_said(value)} has over {self.MAX_PLACES} decimal places")
        return places

    def _edge(self, bound: int | float, left_out: bool) -> int:
        """The least number of units that a lower bound allows."""
        edge = math.floor(exact(bound) * self.scale) + 1 if left_out else math.ceil(exact(bound) * self.scale)
        if left_out and self.places and abs(bound) < sys.float_info.max:
            # a text nearer to the bound than doubles are to each other would be read as the bound
            edge = max(edge, math.ceil(exact(math.nextafter(bound, math.inf)) * self.scale))
        return edge

    def _is_right(self, value: int) -> bool:
        """True for a number of units that is a multiple of what it must be, and of nothing that it must not be."""
        return value % self.unit == 0 and all(value % one for one in self.unlike)

    def symbol(self, excluded: Iterable[int | float]) -> Symbol | None:
        """A JSON number that is none of those excluded; None if there is none."""
        units = (exact(value) * self.scale for value in excluded)
        taken = sorted(int(value) for value in units if value.denominator == 1)
        plus = JsonNumber(self, self._spans(self.low, self.high, taken), self.exponents[0])
        minus = JsonNumber(self, self._spans(-self.high, -self.low, [-value for value in reversed(taken)]), self.exponents[1])
        options: list[Symbol] = [plus] if plus.firsts else []
        if self.holds(1, self.most, minus.spans):
            options.append(InOrder((Word(b"-"), minus)))
        return AnyOf(tuple(options)) if options else None

    def _spans(self, low: float, high: float, taken: list[int]) -> Spans:
        """The magnitudes from `low` to `high`, in units, that are not taken."""
        least, most = int(max(low, 0)), int(min(high, self.most))
        edges = [least - 1, *(value for value in taken if least <= value <= most), most + 1]
        return tuple((one + 1, two - 1) for one, two in itertools.pairwise(edges) if two - one > 1)

    def holds(self, low: int, high: int, spans: Spans | None) -> bool:
        """True if one of the magnitudes `low` to `high`, and within the spans, is right."""
        parts = [(low, high)] if spans is None else [(max(low, least), min(high, most)) for least, most in spans]
        return any(self._is_right(value) for least, most in parts for value in itertools.islice(
            range(-(-least // self.unit) * self.unit, most + 1, self.unit), self.MAX_TRIES))  # fmt: skip


@dataclass(frozen=True)
class JsonNumber(Symbol):
    """The rest of a JSON number behind its sign: the digits so far as a number, how many there are, and of which part of it.

    `spans` are the magnitudes that it may have; None if no further digit can miss them: then only the remainder is kept.
    """

    machine: NumberMachine
    spans: Spans | None
    exponent: Symbol | None  # what may stand behind an e, where one may be
    part: str = ""  # zero, whole, point, fraction
    value: int = 0
    count: int = 0

    @functools.cached_property
    def after(self) -> Mapping[int, Symbols]:
        found = ((byte, self._next(chr(byte))) for byte in b"0123456789.eE")
        return {byte: (following,) for byte, following in found if following is not None}

    @property
    def ends(self) -> bool:  # type: ignore[override]
        low = self._range(0)[0]
        return self.part in ("zero", "whole", "fraction") and self.machine.holds(low, low, self.spans)

    def _next(self, char: str) -> Symbol | None:
        """The symbol behind a character; None if no number goes on so."""
        if char.isdigit():
            return self._digit(int(char))
        if self.part not in ("zero", "whole", "fraction"):
            return None
        if char in "eE":
            return self.exponent
        return replace(self, part="point", count=0)._if_possible() if self.part != "fraction" and self.machine.places else None

    def _digit(self, digit: int) -> JsonNumber | None:
        part, exponent = self.part, self.exponent
        if self.count >= {"": 1, "zero": 0, "whole": self.machine.digits}.get(part, self.machine.places):
            return None
        if self.machine.has_bounds and (part == "whole" or (part == "" and digit == 0)):
            exponent = None
        part = {"": "whole" if digit else "zero", "point": "fraction"}.get(part, part)
        return replace(self, part=part, value=self.value * 10 + digit, count=self.count + 1, exponent=exponent)._if_possible()

    def _range(self, more: int) -> tuple[int, int]:
        """The magnitudes that so many further digits before the point can make, or all behind it."""
        machine = self.machine
        unit = 10 ** (machine.places - self.count) if self.part in ("point", "fraction") else machine.scale
        return self.value * 10**more * unit, (self.value + 1) * 10**more * unit - 1

    def _if_possible(self) -> JsonNumber | None:
        """Itself, without what does not matter any more; None if it is no number's beginning."""
        machine, most = self.machine, self.machine.digits - self.count if self.part == "whole" else 0
        ranges = [self._range(more) for more in range(most + 1)]
        first, last = ranges[0][0], ranges[-1][1]
        spans = None if self.spans is None else tuple(span for span in self.spans if span[0] <= last and span[1] >= first)
        if not any(machine.holds(low, high, spans) for low, high in ranges):
            return None
        if spans is None or (spans[0][0] <= first and last <= spans[0][1]):
            return replace(self, spans=None, value=self.value % machine.cycle)
        return replace(self, spans=spans)


EXPONENTS = range(-290, 282)
DECIMAL = _digit(ord("0"), 10)


@functools.lru_cache(maxsize=1000)
def exponent_within(low: Bound | None, high: Bound | None) -> Symbol | None:
    """The exponents, of up to three digits, with which all numbers from 1 to 10 are within bounds; None if there is none."""
    def place(bound: int | float, behind: bool) -> int:
        return (bisect.bisect_right if behind else bisect.bisect_left)(EXPONENTS, bound, key=lambda one: float(f"1e{one}"))

    first = place(*low) if low else 0
    last = place(high[0], not high[1]) if high else len(EXPONENTS)
    if first >= last - 1:
        return None
    least, most = EXPONENTS[first], EXPONENTS[last - 2]
    spans = (("", max(least, 0), most), ("+", max(least, 0), most), ("-", max(-most, 0), -least))
    return AnyOf(tuple(InOrder((word(sign), numeral(((low, min(high, 10**count - 1)),), (DECIMAL,) * count)))
                       for sign, low, high in spans for count in (1, 2, 3) if low <= min(high, 10**count - 1)))  # fmt: skip


number_machine = functools.lru_cache(maxsize=1000)(NumberMachine)  # of shapes that exclude nothing


@functools.lru_cache(maxsize=1000)
def number_symbol(shape: NumberShape) -> Symbol | None:
    """A JSON number of a shape; None if there is none. Raises InvalidRequest naming what cannot be honoured."""
    return another_number(shape, ())


def another_number(shape: NumberShape, taken: Iterable[int | float]) -> Symbol | None:
    """A JSON number of a shape that is none of those taken; None if there is none."""
    values = shape.excluded.union(taken)
    return number_machine(replace(shape, excluded=frozenset()) if shape.excluded else shape, not values).symbol(values)


def number_fits(shape: NumberShape, value: int | float) -> bool:
    """True if a number has a shape, by its decimal notation."""
    if value in shape.excluded:
        return False
    if shape.low and (value <= shape.low[0] if shape.low[1] else value < shape.low[0]):
        return False
    if shape.high and (value >= shape.high[0] if shape.high[1] else value > shape.high[0]):
        return False
    multiples = (*shape.multiples, *((1,) if shape.whole else ()))
    number = exact(value)
    return not any(number % exact(one) for one in multiples) and all(number % exact(one) for one in shape.not_multiples)


# ── E.1. JSON schemas ─────────────────────────────────────────────────────────────────────────────────────────────────
# A client's JSON schema, read: keywords checked, older drafts in the words of the newest, references followed; what can
# be said in fewer keywords is, and what cannot be honoured is refused by name.
# Offers: SchemaReader, its numbers of schemas as Node; comparable and plain, type_bit. Uses: nothing.

Node = tuple[int, ...]  # schemas that must all hold, by their number in SchemaReader, ~number: must not hold; () allows all
Result = TypeVar("Result")


class SchemaReader:
    """A client's JSON schema as checked dicts with a number each, equal ones once.

    A checked dict holds numbers where the client's holds schemas, and only keywords that are honoured; `type` is a bit for
    each type, const an enum, multipleOf a list; pattern and format are lists of texts_by's arguments. `soft` is our own: the
    schema was derived, and does not close an object.
    """

    MAX_STEPS = 60_000  # schemas read, joined and compared, some 10 µs each
    MAX_TEXT = 2_000_000  # characters of names and constants
    MAX_DEPTH = 64
    MAX_COUNT = 10**9
    MAX_BOUND = 2**1024  # a number beyond is no bound
    TYPES: ClassVar = {"object": 1, "array": 2, "string": 4, "number": 24, "integer": 8, "boolean": 32, "null": 64}
    FRACTION, EVERY_TYPE = 16, 127  # a number that is no integer; all

    def __init__(self, name: str, root: Any) -> None:
        self.name, self.root, self.steps, self.size, self.depth = name, root, 0, 0, 0
        self.schemas: list[dict[str, Any]] = []
        self.numbers: dict[str, int] = {}  # JSON text → number
        self._read: dict[int, int] = {}  # id of a client's dict → number
        self._targets: dict[str, int] = {}
        self._nodes: dict[tuple[int, ...], Node] = {}
        self._has_ids = False  # of schemas inside: references are relative to those
        said = root if isinstance(root, dict) else {}
        self.base = next((said[key] for key in ("$id", "id") if isinstance(said.get(key), str)), "").partition("#")[0]
        draft = re.search(r"draft-0?(\d)\b", str(said.get("$schema")))
        self.lone_refs = draft is not None and int(draft[1]) < 8  # what stands beside $ref was ignored up to draft 7
        self.free, self.never, self.null = self.number({}), self.number({"enum": []}), self.number({"enum": [None]})

    def refuse(self, what: str) -> InvalidRequest:
        return InvalidRequest(f"{self.name}: {what}", self.name)

    def spend(self, steps: int = 1) -> None:
        TURN.tick()
        self.steps += steps
        if self.steps > self.MAX_STEPS:
            raise self.refuse("the schema is too large, or its allOf, anyOf and $ref unfold into too many cases")

    def keep(self, *texts: str) -> None:
        """Counts text that documents will hold. Raises InvalidRequest when it cannot be written."""
        text = "".join(texts)
        self.size += len(text)
        if self.size > self.MAX_TEXT:
            raise self.refuse(f"the schema's names and constants are over {self.MAX_TEXT} characters")
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            raise self.refuse("a name or constant holds half of a surrogate pair")

    def number(self, schema: dict[str, Any]) -> int:
        text = repr(schema)  # properties are written in the order that the client gave
        if text not in self.numbers:
            self.numbers[text] = len(self.schemas)
            self.schemas.append(schema)
        return self.numbers[text]

    def read(self, schema: Any, where: str = "the schema") -> int:
        """The number of a client's schema."""
        self.spend()
        if not isinstance(schema, dict):
            if not isinstance(schema, bool):
                raise self.refuse(f"{where} holds {self.said(schema)}, which is not a schema")
            return self.free if schema else self.never
        if self.depth > self.MAX_DEPTH:
            raise self.refuse(f"the schema is nested over {self.MAX_DEPTH} levels deep")
        number = self._read.get(id(schema))
        if number is None:
            self.depth += 1
            number = self._read[id(schema)] = self._checked(schema)
            self.depth -= 1
        return number

    def said(self, value: Any) -> str:
        """A client's value for a message."""
        return ("an object" if isinstance(value, dict) else "a list") if isinstance(value, (dict, list)) else _said(value)

    def _checked(self, schema: dict[str, Any]) -> int:
        """The number of a schema's checked dict."""
        given = schema if self.OLDER.isdisjoint(schema) and None not in schema.values() else self._renewed(schema)
        self._note_id(given)
        found: dict[str, Any] = {}
        readers = self.KEYWORDS
        for key, value in given.items():
            if (reader := readers.get(key)) is not None:
                found[key] = reader(self, key, value)
        return self.number(found) if self.REWRITTEN.isdisjoint(found) else self._rewritten(found)

    def _note_id(self, schema: Any) -> None:
        url = schema.get("$id") if isinstance(schema, dict) else None
        self._has_ids = self._has_ids or (isinstance(url, str) and not url.startswith("#") and url.rstrip("#") != self.base)

    def _renewed(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Keywords of older drafts in the words of the newest; those that are null are left out."""
        given = {key: value for key, value in schema.items() if value is not None or key == "const"}
        if "$ref" in given and self.lone_refs:
            return {"$ref": given["$ref"]}
        if isinstance(given.get("items"), list):
            given |= {"prefixItems": given["items"], "items": given.get("additionalItems", True)}
            if not given["prefixItems"]:
                del given["prefixItems"]
            elif "additionalItems" not in given:
                del given["items"]
        if isinstance(given.get("dependencies"), dict):
            for name, needs in given["dependencies"].items():
                key = "dependentRequired" if isinstance(needs, (list, str)) else "dependentSchemas"
                given[key] = {**given.get(key, {}), name: [needs] if isinstance(needs, str) else needs}
        for key, partner in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
            if given.get(key) is True:
                if partner not in given:
                    raise self.refuse(f"{key}: true needs {partner} beside it")
                given[key] = given.pop(partner)
            elif given.get(key) is False:
                del given[key]
        return given

    # Keywords: a method checks each one's value.

    def _must(self, fits: bool, key: str, what: str, value: Any) -> None:
        if not fits:
            raise self.refuse(f"{key} must be {what}, not {self.said(value)}")

    def _schema(self, key: str, value: Any) -> int:
        return self.read(value, key)

    def _schemas(self, key: str, value: Any) -> list[int]:
        return [self.read(one, key) for one in self._list(key, value)]

    def _named(self, key: str, value: Any, inner: Callable[[str, Any], Any] | None = None) -> dict[str, Any]:
        self._must(isinstance(value, dict), key, "an object", value)
        self.keep(*value)
        return {name: (inner or self._schema)(key, one) for name, one in value.items()}

    def _list(self, key: str, value: Any) -> list[Any]:
        self._must(isinstance(value, list) and bool(value), key, "a list of at least one element", value)
        return value  # type: ignore[no-any-return]

    def _count(self, key: str, value: Any) -> int:
        whole = type_bit(value) == self.TYPES["integer"] and 0 <= value <= self.MAX_COUNT
        self._must(whole, key, f"a whole number from 0 to {self.MAX_COUNT}", value)
        return int(value)

    def _bound(self, key: str, value: Any) -> int | float:
        self._must(bool(type_bit(value) & self.TYPES["number"]), key, "a number", value)
        if not -self.MAX_BOUND <= value <= self.MAX_BOUND:
            raise self.refuse(f"{key} must lie within the bounds of a double")
        return value  # type: ignore[no-any-return]

    def _factor(self, key: str, value: Any) -> list[int | float]:
        if self._bound(key, value) <= 0:
            raise self.refuse(f"{key} must be above 0")
        return [value]

    def _text(self, key: str, value: Any) -> list[tuple[str, str, bool]]:
        self._must(isinstance(value, str), key, "a string", value)
        self.keep(value)
        return [(key, value, True)]

    def _types(self, key: str, value: Any) -> int:
        types = value if isinstance(value, list) else [value]
        if not types or not all(isinstance(kind, str) and kind in self.TYPES for kind in types):
            raise self.refuse(f"type {self.said(value)} is unknown")
        return functools.reduce(operator.or_, map(self.TYPES.__getitem__, types))

    def _names(self, key: str, value: Any) -> list[str]:
        self._must(isinstance(value, list) and all(isinstance(name, str) for name in value), key, "a list of names", value)
        self.spend(len(value) // 8)
        self.keep(*value)
        return list(dict.fromkeys(value))

    def _needs(self, key: str, value: Any) -> dict[str, list[str]]:
        return self._named(key, value, self._names)

    def _enum(self, key: str, value: Any) -> list[Any]:
        self.spend(len(self._list(key, value)) // 8)
        return self._constants(key, value)

    def _constants(self, key: str, value: Any) -> Any:
        try:
            self.keep(json.dumps(value, ensure_ascii=False, allow_nan=False))
        except ValueError:
            raise self.refuse("a number is too large for JSON") from None
        return value

    def _flag(self, key: str, value: Any) -> bool:
        return value is True

    def _reference(self, key: str, value: Any) -> str:
        self._must(isinstance(value, str), key, "a string", value)
        if self._has_ids:
            raise self.refuse(f"$ref {_said(value)} beside an $id inside the schema is not supported")
        return value  # type: ignore[no-any-return]

    def _discriminator(self, key: str, value: Any) -> str | None:
        name = value.get("propertyName") if isinstance(value, dict) else None
        return name if isinstance(name, str) else None

    def _unsupported(self, key: str, value: Any) -> NoReturn:
        raise self.refuse(f"keyword {key} is not supported")

    OLDER: ClassVar = {"items", "dependencies", "exclusiveMinimum", "exclusiveMaximum", "$ref"}
    REWRITTEN: ClassVar = {"if", "then", "else", "dependentRequired", "dependentSchemas", "const", "nullable",
                           "unevaluatedProperties", "unevaluatedItems"}  # fmt: skip
    EVALUATING: ClassVar = ("$ref", "allOf", "anyOf", "oneOf", "not", "if", "dependentSchemas", "contains")
    KEYWORDS: ClassVar[dict[str, Callable[..., Any]]] = {
        key: reader for keys, reader in {
            ("items", "additionalProperties", "propertyNames", "contains", "not", "if", "then", "else",
             "unevaluatedProperties", "unevaluatedItems"): _schema,
            ("prefixItems", "allOf", "anyOf", "oneOf"): _schemas,
            ("properties", "patternProperties", "dependentSchemas"): _named,
            ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minContains",
             "maxContains"): _count,
            ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"): _bound,
            ("pattern", "format"): _text, ("uniqueItems", "nullable"): _flag, ("multipleOf",): _factor, ("type",): _types,
            ("required",): _names, ("dependentRequired",): _needs, ("enum",): _enum, ("const",): _constants,
            ("$ref",): _reference, ("discriminator",): _discriminator,
            ("$dynamicRef", "$recursiveRef", "extends", "disallow", "divisibleBy"): _unsupported,
        }.items() for key in keys}  # fmt: skip

    def _rewritten(self, found: dict[str, Any]) -> int:
        """The number of a checked dict in which const is an enum and conditions are alternatives."""
        for key, plain in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
            if key in found:
                if beside := next((other for other in self.EVALUATING if other in found), None):
                    raise self.refuse(f"keyword {key} is not supported beside {beside}")
                found.setdefault(plain, found.pop(key))
        if "const" in found:
            const = found.pop("const")
            wanted = comparable(const)
            found["enum"] = [value for value in found.get("enum", [const]) if comparable(value) == wanted]
        also = [self._lacks_or(name, {"required": names}) for name, names in found.pop("dependentRequired", {}).items()]
        also += [self._lacks_or(name, {"allOf": [one]}) for name, one in found.pop("dependentSchemas", {}).items()]
        condition, then, other = (found.pop(key, None) for key in ("if", "then", "else"))
        if condition is not None and not (then is other is None):
            opposite = {"not": condition, **({} if other is None else {"allOf": [other]})}
            also.append(self._any({"allOf": [condition, *([] if then is None else [then])]}, opposite))
        if also:
            found["allOf"] = [*found.get("allOf", ()), *also]
        nullable = found.pop("nullable", False)  # OpenAPI's: null may be whatever else stands there, an enum too
        return self.number({"anyOf": [self.number(found), self.null]} if nullable else found)

    def _lacks_or(self, name: str, schema: dict[str, Any]) -> int:
        """A schema of objects that lack a property, or have it and fit a schema."""
        needs = {**schema, "required": [name, *schema.get("required", ())], "soft": True}
        return self._any({"properties": {name: self.never}, "soft": True}, needs)

    def _any(self, *schemas: dict[str, Any]) -> int:
        return self.number({"anyOf": [self.number(schema) for schema in schemas]})

    def target(self, ref: str) -> int:
        """The number of the schema that a reference within the document names (RFC 6901)."""
        if ref not in self._targets:
            url, _, pointer = ref.partition("#")
            try:
                inside = not url or urllib.parse.urljoin(self.base, url) == self.base
            except ValueError:
                raise self.refuse(f"$ref {_said(ref)} is no reference") from None
            pointer = urllib.parse.unquote(pointer)
            if not inside or (pointer and not pointer.startswith("/")):
                raise self.refuse(f"$ref {_said(ref)} is not inside the schema; $id and $anchor are not supported there")
            target = self.root
            for part in pointer.split("/")[1:]:
                part = part.replace("~1", "/").replace("~0", "~")
                try:
                    target = target[int(part)] if isinstance(target, list) and part.isdecimal() else target[part]
                except (KeyError, IndexError, ValueError, TypeError):
                    raise self.refuse(f"$ref {_said(ref)} names nothing") from None
                self._note_id(target)
            self._targets[ref] = self.read(target, "$ref")
        return self._targets[ref]

    def both(self, one: Node, two: Node) -> Node:
        """The schemas of two nodes."""
        return (self.never,) if (self.never,) in (one, two) else tuple(dict.fromkeys(one + two)) if one and two else one or two

    def node(self, numbers: Iterable[int]) -> Node:
        """Schemas that must all hold; one that only points to others is replaced by those."""
        given = tuple(numbers)
        if given not in self._nodes:
            self._nodes[given] = self._node(given)
        return self._nodes[given]

    def _node(self, numbers: tuple[int, ...]) -> Node:
        found: dict[int, None] = {}
        todo, seen = list(reversed(numbers)), set()
        while todo:
            number = todo.pop()
            schema = self.schemas[max(number, ~number)]
            key = next(iter(schema), "") if len(schema) == 1 and number not in seen else ""
            seen.add(number)
            if key == "$ref":
                target = self.target(schema[key])
                todo.append(target if number >= 0 else ~target)
            elif key in ("allOf", "not") and number >= 0:
                todo += schema[key][::-1] if key == "allOf" else [~schema[key]]
            elif number in (self.never, ~self.free):
                return (self.never,)
            elif number not in (self.free, ~self.never):
                found[number] = None
        return tuple(found)


TYPE_BITS = {dict: 1, list: 2, str: 4, int: 8, bool: 32, type(None): 64}


def type_bit(value: Any) -> int:
    """The type of a value, as one of SchemaReader's bits; 1.0 is an integer there."""
    if isinstance(value, float):
        return 8 if value.is_integer() else 16
    return TYPE_BITS[type(value)]


class Fields(dict[str, Any]):
    """An object's properties, to compare and hash."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


def comparable(value: Any) -> Any:
    """A JSON value that compares and hashes as JSON's values do: 1 is 1.0 and not true."""
    if isinstance(value, dict):
        return Fields((name, comparable(one)) for name, one in value.items())
    if isinstance(value, list):
        return tuple(map(comparable, value))
    return (type(value), value) if isinstance(value, bool) else value


def plain(value: Any) -> Any:
    """The JSON value that a comparable one was made of."""
    if isinstance(value, Fields):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, tuple):
        return value[1] if value[:1] == (bool,) else [plain(one) for one in value]
    return value


# ── E.2. Shapes ───────────────────────────────────────────────────────────────────────────────────────────────────────
# A schema in normal form: the shapes that its values may have, of which one must fit; forms are joined, united and denied.
# Offers: SchemaShapes (a schema as shapes), the shapes. Uses: E.1's schemas, D.3's strings, D.4's numbers.


@dataclass(frozen=True)
class Constant:
    """One value, as JSON text."""

    text: str


@dataclass(frozen=True, eq=False)
class Listed:
    """Values that are listed, by what compares as they do; choice() makes Constants of them."""

    values: dict[Any, Any]


@dataclass(frozen=True)
class ArrayShape:
    """Elements with a schema each, then any number of the `rest` (None: no more), `low` to `high` in all.

    `contains` are schemas, and how many elements at least and at most fit them. A form has how it was said, too: whether
    some schema speaks of the rest, and of the least length.
    """

    first: tuple[Node, ...] = ()
    rest: Node | None = ()
    low: int = 0
    high: int | None = None
    unique: bool = False
    contains: tuple[tuple[int, int, int | None], ...] = ()
    is_rest_said: bool = False
    is_low_said: bool = False
    why: str = ""

    def at(self, index: int) -> Node | None:
        """The schema of one element; None where the array has ended."""
        if self.high is not None and index >= self.high:
            return None
        return self.first[index] if index < len(self.first) else self.rest


@dataclass(frozen=True)
class Property:
    """A property with a name of its own. `late`: it comes behind those that have a place; `said`: a closed object may have it."""

    name: str
    node: Node
    required: bool
    late: bool = False
    said: bool = True


Others = tuple[tuple[StringShape, Node], ...]  # kinds of properties that have no place of their own: their names, their schema


@dataclass(frozen=True)
class ObjectShape:
    """Properties in their order, then unnamed ones: names of a shape, and their values' schema. `low` to `high` in all.

    A form has what no schema speaks of apart, as `unsaid`: `closed` objects have none of it. Its `names` fit a schema; of the
    properties without these names and patterns `some` one must fit a schema; `wanted` ones are required where objects are
    written. `why` it cannot be honoured, if so.
    """

    named: tuple[Property, ...] = ()
    unnamed: Others = ((StringShape(), ()),)
    low: int = 0
    high: int | None = None
    unsaid: Others = ()
    closed: bool = False
    names: Node = ()
    some: tuple[tuple[tuple[str, ...], tuple[str, ...], int], ...] = ()
    wanted: tuple[str, ...] = ()
    why: str = ""

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.named, self.unnamed, self.low, self.high, self.unsaid, self.closed, self.names, self.some, self.why))

    @functools.cached_property
    def places(self) -> dict[str, Property]:
        return {prop.name: prop for prop in self.named}

    def at(self, name: str) -> Property:
        """A property that has no place of its own."""
        for others in (self.unnamed, self.unsaid):
            for names, node in others:
                if names == StringShape() or string_fits(names, name):
                    return Property(name, node, False, True, others is self.unnamed)
        raise AssertionError("every name has its kind")


ANY_OBJECT = ObjectShape(unnamed=(), unsaid=((StringShape(), ()),))
Shape = Constant | StringShape | NumberShape | ArrayShape | ObjectShape
Shapes = tuple[Shape, ...]  # a value that has one of these shapes
Form = list[tuple[Any, int]]  # such values: a shape or Listed, and the types that keywords are about, or TYPED
TYPED = 128  # a type is said


class Forms(SchemaReader):
    """Brings schemas into normal form: all that they allow, exactly."""

    MAX_OPTIONS = 1000  # cases of one value
    MAX_PATTERNS = 12  # that an object's unnamed properties may have
    COMBINED: ClassVar = {"$ref", "allOf", "anyOf", "oneOf", "not", "discriminator"}
    HINTS: ClassVar = {  # type → keywords about it; the first one counts
        1: {"properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties",
            "maxProperties"},
        2: {"items", "prefixItems", "minItems", "maxItems", "contains", "uniqueItems"},
        24: {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
        4: {"minLength", "maxLength", "pattern", "format"}}  # fmt: skip

    def __init__(self, name: str, root: Any) -> None:
        super().__init__(name, root)
        self.dead_end = ""  # why a form came to nothing
        self._forms: dict[int, Form] = {}
        self._following: list[int] = []  # schemas being followed with no bracket between them
        self._lists: dict[Node, frozenset[Any] | None] = {}
        self._enums: dict[int, frozenset[Any]] = {}
        words = Listed({comparable(value): value for value in (None, True, False)})
        self.everything: Form = [(words, 0), (NumberShape(), 0), (StringShape(), 0), (ArrayShape(), 0), (ANY_OBJECT, 0)]

    def form(self, number: int) -> Form:
        """A schema's normal form; that of ~number is all that it does not allow."""
        if number not in self._forms:
            if number in self._following:
                raise self.refuse("a $ref leads back to itself")
            if len(self._following) > self.MAX_DEPTH:
                raise self.refuse(f"$ref leads to $ref over {self.MAX_DEPTH} times")
            self._following.append(number)
            try:
                schema = self.schemas[max(number, ~number)]
                self._forms[number] = self._read_form(schema) if number >= 0 else self._denied(schema)
            finally:
                self._following.pop()
        return self._forms[number]

    def _read_form(self, schema: dict[str, Any]) -> Form:
        plain = {key: value for key, value in schema.items() if key not in self.COMBINED}
        found = self._plain(plain)
        for key, form in self._also(schema) if len(plain) < len(schema) else ():
            found = self.meet(found, form, key)
        if name := schema.get("discriminator"):  # OpenAPI's: the property that tells options apart is always written
            found = [(replace(shape, wanted=(name,)) if isinstance(shape, ObjectShape) else shape, said) for shape, said in found]
        return found

    def _also(self, schema: dict[str, Any]) -> Iterator[tuple[str, Form]]:
        """The forms that must fit beside a schema's own keywords, and the keywords that say so."""
        if "$ref" in schema:
            yield "$ref", self.form(self.target(schema["$ref"]))
        for number in schema.get("allOf", ()):
            yield "allOf", self.form(number)
        if "not" in schema:
            yield "not", self.form(~schema["not"])
        if "anyOf" in schema:
            yield "anyOf", self.union([self.form(number) for number in schema["anyOf"]])
        if "oneOf" in schema:
            yield "oneOf", self._exactly_one(schema["oneOf"])

    def meeting(self, node: Node) -> Form:
        """The form of a value that fits several schemas."""
        allowed = self.listed(node) if len(node) > 1 else None
        if allowed is not None:
            schemas = {number: self.schemas[max(number, ~number)] for number in node}
            others = [number for number in node if schemas[number].keys() != {"enum"}]
            enums = (schemas[number]["enum"] for number in node if number >= 0 and "enum" in schemas[number])
            values = {key: value for value in min(enums, key=len) if (key := comparable(value)) in allowed}
            values = {key: value for key, value in values.items() if self.fits(value, others)}
            return [(Listed(values), TYPED)] if values else []
        return functools.reduce(lambda found, number: self.meet(found, self.form(number), "allOf"), node, self.everything)

    def union(self, forms: Iterable[Form]) -> Form:
        """The values of all forms."""
        values: dict[int, dict[Any, Any]] = {}
        found: dict[tuple[Any, int], None] = {}
        for shape, said in itertools.chain.from_iterable(forms):
            if isinstance(shape, Listed):
                values.setdefault(said, {}).update(shape.values)
            else:
                found[shape, said] = None
        return [*((Listed(values[said]), said) for said in values), *found]

    # One schema's own keywords

    def _plain(self, schema: dict[str, Any]) -> Form:
        if not schema:
            return self.everything
        bits, excluded, soft = schema.get("type", self.EVERY_TYPE), schema.get("excluded", ()), "soft" in schema
        if "enum" in schema:
            values = {comparable(value): value for value in schema["enum"] if type_bit(value) & bits}
            if rest := {key: value for key, value in schema.items() if key not in ("enum", "type")}:
                form = self._plain(rest)
                values = {key: value for key, value in values.items() if self._fits_form(value, form)}
            return [(Listed(values), TYPED)] if values else []
        said = 0 if soft else TYPED
        if not soft and "type" not in schema:
            said = sum(bit for bit, about in self.HINTS.items() if about & schema.keys())
        values = {key: value for key, value in self.everything[0][0].values.items()
                  if type_bit(value) & bits and not any(value is one for one in excluded)}  # fmt: skip
        found: Form = [(Listed(values), said)] if values else []
        if bits & 24:
            found.append((self._number(schema, bits & 24, excluded), said))
        if bits & 4:
            rules = [rule for key in ("pattern", "format") for rule in schema.get(key, ())]
            low, high = ([schema[key]] if key in schema else [] for key in ("minLength", "maxLength"))
            texts = StringShape.of(low, high, rules)
            found.append((texts.but_not(one for one in excluded if isinstance(one, str)) if excluded else texts, said))
        for kind in (list, dict):
            if bits & TYPE_BITS[kind]:
                shape = self._array(schema) if kind is list else self._object(schema)
                taken = [one for one in excluded if isinstance(one, kind)]
                why = "keyword not is not supported around a constant object or array" if any(taken) else shape.why
                found.append((replace(shape, low=max(shape.low, 1), why=why) if taken else shape, said))
        return found

    def _number(self, schema: dict[str, Any], bits: int, excluded: Seq[Any]) -> NumberShape:
        lows = [(schema[key], key != "minimum") for key in ("minimum", "exclusiveMinimum") if key in schema]
        highs = ((schema[key], key != "maximum") for key in ("maximum", "exclusiveMaximum") if key in schema)
        others = (*schema.get("notMultiple", ()), *((1,) if bits == self.FRACTION else ()))
        return NumberShape(bits == 8, max(lows, default=None), functools.reduce(lower, highs, None),
                           tuple(schema.get("multipleOf", ())), others, frozenset(one for one in excluded if type_bit(one) & 24))

    def _array(self, schema: dict[str, Any]) -> ArrayShape:
        contains = [(schema["contains"], schema.get("minContains", 1), schema.get("maxContains"))] if "contains" in schema else []
        return ArrayShape(tuple(self.node([one]) for one in schema.get("prefixItems", ())),
                          self.node([schema["items"]]) if "items" in schema else (), schema.get("minItems", 0),
                          schema.get("maxItems"), schema.get("uniqueItems", False), tuple(contains), "items" in schema,
                          "minItems" in schema, schema.get("why", ""))  # fmt: skip

    def _object(self, schema: dict[str, Any]) -> ObjectShape:
        properties, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
        self.spend((len(properties) + len(patterns)) // 4)
        if len(patterns) > self.MAX_PATTERNS:
            raise self.refuse(f"patternProperties: over {self.MAX_PATTERNS} patterns in one object")
        is_open = "additionalProperties" in schema
        rest: Node = self.node([schema["additionalProperties"]]) if is_open else ()
        kinds: list[tuple[StringShape, tuple[int, ...]]] = [(StringShape(), ())]
        for pattern, number in patterns.items():
            texts = texts_by("pattern", pattern)
            yes = [(names.within(texts), (*matched, number)) for names, matched in kinds]
            no = [(names.within(complement(texts)), matched) for names, matched in kinds]
            kinds = [pair for pair in (*yes, *no) if len(patterns) == 1 or self.string(pair[0]) is not None]
        said = [(names, self.node(matched) if matched else rest) for names, matched in kinds if matched or is_open]
        unsaid = [(names, rest) for names, matched in kinds if not (matched or is_open)]
        shape = ObjectShape((), tuple(said), schema.get("minProperties", 0), schema.get("maxProperties"),
                            tuple(unsaid), "soft" not in schema and bool(schema.keys() & self.CLOSING),
                            self.node([schema["propertyNames"]]) if "propertyNames" in schema else (),
                            (schema["other"],) if "other" in schema else (), why=schema.get("why", ""))  # fmt: skip
        needed = set(schema.get("required", ()))
        is_said, named = schema.get("soft") != "not", list[Property]()
        for name, number in properties.items():
            more = [one for pattern, one in patterns.items() if self.matches(pattern, name)] if patterns else ()
            named.append(Property(name, self.node([number, *more]), name in needed, False, is_said))
        named += [replace(shape.at(name), required=True, said=is_said or bool(said)) for name in schema.get("required", ())
                  if name not in properties]  # fmt: skip
        return replace(shape, named=tuple(named))

    CLOSING: ClassVar = {"properties", "patternProperties", "required"}

    def matches(self, pattern: str, name: str) -> bool:
        return string_fits(StringShape(texts=texts_by("pattern", pattern)), name)

    def string(self, shape: StringShape) -> Symbol | None:
        """A string; None if there is none of its shape. The search for one is counted."""
        shortest(shape.texts, self.spend)
        return string_symbol(shape)

    # allOf: the meet of two forms

    def meet(self, ours: Form, theirs: Form, key: str) -> Form:
        """The values that two forms have both."""
        if ours is self.everything or theirs is self.everything:
            return theirs if ours is self.everything else ours
        self.spend(len(ours) * len(theirs))
        found: dict[tuple[Any, int], None] = {}
        for (one, said), (two, more) in itertools.product(ours, theirs):
            shape = self._meet(one, two)
            if shape is not None:
                found[shape, said | more] = None
        if len(found) > self.MAX_OPTIONS:
            raise self.refuse(f"{key} multiplies out into over {self.MAX_OPTIONS} alternatives")
        if not found and ours and theirs:
            kinds = [self._kind(form[0][0]) for form in (ours, theirs)]
            self.dead_end = f"nothing is both {kinds[0]} and {kinds[1]}" if kinds[0] != kinds[1] else self.dead_end
        return list(found)

    def _kind(self, shape: Any) -> str:
        bits = type_bit(next(iter(shape.values.values()))) if isinstance(shape, Listed) else SHAPE_BITS[type(shape)]
        return next(kind for kind, bit in self.TYPES.items() if bit & bits)

    def _meet(self, one: Any, two: Any) -> Any:
        """The shape of what has two shapes; None if that is seen to be nothing."""
        if isinstance(two, Listed):
            one, two = two, one
        if isinstance(one, Listed):
            values = {key: value for key, value in one.values.items() if self.fits_shape(value, two)}
            return Listed(values) if values else None
        if type(one) is not type(two) or one == two:
            return one if one == two else None
        if isinstance(one, ObjectShape):
            return self._meet_objects(one, two)
        return self._meet_arrays(one, two) if isinstance(one, ArrayShape) else joined_shape(one, two)

    def _meet_arrays(self, one: ArrayShape, two: ArrayShape) -> ArrayShape:
        longest = max(len(one.first), len(two.first))
        self.spend(longest)
        firsts = [[*shape.first, *[shape.rest or ()] * (longest - len(shape.first))] for shape in (one, two)]
        return replace(joined_shape(one, two), first=tuple(self.both(a, b) for a, b in zip(*firsts, strict=True)),
                       rest=self.both(one.rest or (), two.rest or ()))  # fmt: skip

    def _meet_objects(self, one: ObjectShape, two: ObjectShape) -> ObjectShape | None:
        named = {prop.name: prop for prop in sorted((*one.named, *two.named), key=operator.attrgetter("late"))}
        both_say = [name for name in two.places if name in one.places or one.unnamed]
        both_say += [name for name in one.places if name not in two.places] if two.unnamed else []
        self.spend(len(both_say) // 8)
        for name in both_say:
            mine, yours = (shape.places.get(name) or shape.at(name) for shape in (one, two))
            named[name] = Property(name, self.both(mine.node, yours.node), mine.required or yours.required,
                                   mine.late and yours.late, mine.said or yours.said)  # fmt: skip
            if named[name].required and self._is_never(named[name].node):
                return None
        kinds: tuple[list[tuple[StringShape, Node]], ...] = ([], [])  # unnamed, unsaid
        ours, theirs = ([(*kind, others is shape.unnamed) for others in (shape.unnamed, shape.unsaid) for kind in others]
                        for shape in (one, two))  # fmt: skip
        for (names, node, said), (more, other, also) in itertools.product(ours, theirs):
            both = joined_shape(names, more)
            if both and (len(ours) == 1 or len(theirs) == 1 or self.string(both) is not None):
                kinds[not (said or also)].append((both, self.both(node, other)))
        return replace(joined_shape(one, two), named=tuple(named.values()), unnamed=tuple(kinds[0]), unsaid=tuple(kinds[1]),
                       names=self.both(one.names, two.names))  # fmt: skip

    def _is_never(self, node: Node) -> bool:
        """True if schemas list values of which none is left."""
        return node == (self.never,) or (len(node) > 1 and self.listed(node) == frozenset())

    def listed(self, node: Node) -> frozenset[Any] | None:
        """The values that schemas leave as far as enum and not of enum tell, to compare with; None if that is no list."""
        if node not in self._lists:
            self.spend(len(node) // 8)
            lists = [self._values(number) for number in node if number >= 0 and "enum" in self.schemas[number]]
            denied = [self._values(~number) for number in node if number < 0 and self.schemas[~number].keys() == {"enum"}]
            self._lists[node] = frozenset.intersection(*lists).difference(*denied) if lists else None
        return self._lists[node]

    def _values(self, number: int) -> frozenset[Any]:
        if number not in self._enums:
            self._enums[number] = frozenset(map(comparable, self.schemas[number]["enum"]))
        return self._enums[number]

    # oneOf: each option, without what fits another too

    def _exactly_one(self, options: list[int]) -> Form:
        found = []
        for number, rivals in self._rivals(options):
            near = (self.form(~rival) for rival in rivals if not self._is_empty((number, rival)))
            found.append(functools.reduce(lambda form, other: self.meet(form, other, "oneOf"), near, self.form(number)))
        return self.union(found)

    def _rivals(self, options: list[int]) -> Iterator[tuple[int, list[int]]]:
        """Each option, and the others that it may share a document with, as far as listed values tell: their own, or those of a
        property that all need."""
        marks = [self._marks(number) for number in options]
        counts = Counter(itertools.chain(*marks))
        best = max(counts, key=counts.__getitem__, default=None)
        holders: dict[Any, list[int]] = {}
        for i, mark in enumerate(marks):
            for value in mark.get(best, ()):
                holders.setdefault(value, []).append(i)
        unmarked = [i for i, mark in enumerate(marks) if best not in mark]
        for i, mark in enumerate(marks):
            near = {*unmarked, *(j for value in mark[best] for j in holders[value])} if best in mark else range(len(options))
            self.spend(len(near) // 4)
            yield options[i], [options[j] for j in sorted(near) if j != i]

    def _marks(self, number: int) -> dict[str | None, frozenset[Any]]:
        """The values that a schema lists for its documents (None) or, if all are objects, for the properties that they need."""
        shapes = [shape for shape, _ in self.form(number)]
        if all(isinstance(shape, Listed) for shape in shapes):
            return {None: frozenset().union(*(shape.values for shape in shapes if isinstance(shape, Listed)))}
        if not all(isinstance(shape, ObjectShape) for shape in shapes):
            return {}
        lists = [{prop.name: values for prop in shape.named if prop.required and (values := self.listed(prop.node)) is not None}
                 for shape in shapes if isinstance(shape, ObjectShape)]  # fmt: skip
        return {name: frozenset().union(*(own[name] for own in lists)) for name in set.intersection(*map(set, lists))}

    def _is_empty(self, node: Node, depth: int = 0) -> bool:
        """True if nothing fits all schemas, as far as a look 4 levels deep tells."""
        try:
            return self._is_never(node) or (
                depth < 4 and all(self._is_impossible(shape, depth + 1) for shape, _ in self.meeting(node)))
        except InvalidRequest:
            return False  # it cannot be told so

    def _is_impossible(self, shape: Any, depth: int) -> bool:
        self.spend()
        if isinstance(shape, ArrayShape):
            return any(self._is_empty(shape.at(index) or (), depth) for index in range(min(shape.low, 8)))
        if isinstance(shape, ObjectShape):
            return any(self._is_empty(prop.node, depth) for prop in shape.named if prop.required)
        if isinstance(shape, StringShape):
            return self.string(shape) is None
        return isinstance(shape, NumberShape) and number_symbol(shape) is None

    # not: what a schema does not allow

    FLIPS: ClassVar = {  # keyword → type, keyword that holds where it does not, how far the number moves
        "minLength": ("string", "maxLength", -1), "maxLength": ("string", "minLength", 1),
        "minItems": ("array", "maxItems", -1), "maxItems": ("array", "minItems", 1),
        "minProperties": ("object", "maxProperties", -1), "maxProperties": ("object", "minProperties", 1),
        "minimum": ("number", "exclusiveMaximum", 0), "exclusiveMaximum": ("number", "minimum", 0),
        "maximum": ("number", "exclusiveMinimum", 0), "exclusiveMinimum": ("number", "maximum", 0)}  # fmt: skip

    def _denied(self, schema: dict[str, Any]) -> Form:
        """All that a schema does not allow. Raises InvalidRequest if it cannot be told."""
        found: list[Form] = []
        for key, value in schema.items():
            if key == "$ref":
                found.append(self.form(~self.target(value)))
            elif key == "allOf":
                found += [self.form(~one) for one in value]
            elif key in ("anyOf", "oneOf"):
                found.append(self.meeting(tuple(~one for one in value)))
                pairs = itertools.combinations(value, 2) if key == "oneOf" else ()
                found += [self.meet(self.form(one), self.form(two), "not") for one, two in pairs]
            elif key == "not":
                found.append(self.form(value))
            else:
                found += [self._plain({**option, "soft": "not"}) for option in self._denials(key, value, schema)]
        return self.union(found)

    def _denials(self, key: str, value: Any, schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Schemas of which one holds where a keyword's demand is not met."""
        types = self.TYPES
        objects, arrays = {"type": types["object"]}, {"type": types["array"]}
        if key in ("items", "additionalProperties") and value == self.free:
            return
        if key in self.FLIPS:
            kind, other, move = self.FLIPS[key]
            if move + 1 or value:  # nothing is shorter than 0
                yield {"type": types[kind], other: value + move}
        elif key in ("pattern", "format"):
            yield from ({"type": types["string"], key: [(key, text, not wanted)]} for _, text, wanted in value)
        elif key == "multipleOf":
            yield {"type": types["number"], "notMultiple": value}
        elif key == "type":
            yield {"type": self.EVERY_TYPE & ~value}
        elif key == "enum":
            yield {"excluded": value}
        elif key == "required":
            yield from ({**objects, "properties": {name: self.never}} for name in value)
        elif key == "properties":
            yield from ({**objects, "required": [name], "properties": {name: ~one}} for name, one in value.items())
        elif key == "additionalProperties":
            outside = (tuple(schema.get(inner, ())) for inner in ("properties", "patternProperties"))
            yield {**objects, "other": (*outside, ~value)}
        elif key == "prefixItems":
            for i, one in enumerate(value):
                yield {**arrays, "minItems": i + 1, "prefixItems": [self.free] * i + [~one], "items": self.free}
        elif key == "items" and value == self.never and "prefixItems" in schema:
            yield {**arrays, "minItems": len(schema["prefixItems"]) + 1}
        elif key == "items" and "prefixItems" not in schema:
            yield {**arrays, "contains": ~value}
        elif key == "contains":
            least, most = schema.get("minContains", 1), schema.get("maxContains")
            if least:
                yield {**arrays, "contains": value, "minContains": 0, "maxContains": least - 1}
            if most is not None:
                yield {**arrays, "contains": value, "minContains": most + 1}
        elif not (value is False or key in ("soft", "discriminator", "minContains", "maxContains")
                  or (key == "patternProperties" and set(value.values()) <= {self.free})):  # fmt: skip
            of = arrays if key in self.HINTS[2] else objects
            yield {**of, "why": f"keyword not is not supported around {key}, and oneOf needs it where a document may fit two "
                                "options: tell them apart by a required constant, or write anyOf"}  # fmt: skip

    # Constants: does a value fit?

    def fits(self, value: Any, node: Iterable[int]) -> bool:
        """True if a value fits schemas."""
        return all(self._fits_form(value, self.form(number)) for number in node)

    def _fits_form(self, value: Any, form: Form) -> bool:
        return any(self.fits_shape(value, shape) for shape, _ in form)

    def fits_shape(self, value: Any, shape: Any) -> bool:
        self.spend()
        if isinstance(shape, Listed):
            return comparable(value) in shape.values
        if not SHAPE_BITS[type(shape)] & type_bit(value):
            return False
        if isinstance(shape, StringShape):
            return string_fits(shape, value)
        if isinstance(shape, NumberShape):
            return number_fits(shape, value)
        if shape.why:
            raise self.refuse(shape.why)
        if not shape.low <= len(value) <= (len(value) if shape.high is None else shape.high):
            return False
        return self._fits_array(value, shape) if isinstance(shape, ArrayShape) else self._fits_object(value, shape)

    def _fits_array(self, value: list[Any], shape: ArrayShape) -> bool:
        counts = ((sum(self.fits(one, (number,)) for one in value), least, most) for number, least, most in shape.contains)
        return ((not shape.unique or len(set(map(comparable, value))) == len(value))
                and all(least <= count and (most is None or count <= most) for count, least, most in counts)
                and all(self.fits(one, shape.at(i) or ()) for i, one in enumerate(value)))  # fmt: skip

    def _fits_object(self, value: dict[str, Any], shape: ObjectShape) -> bool:
        return (all(prop.name in value for prop in shape.named if prop.required)
                and all(self.fits(one, (shape.places.get(name) or shape.at(name)).node) for name, one in value.items())
                and all(self.fits(name, shape.names) for name in value)
                and all(any(self._is_other(name, *outside) and self.fits(one, (number,)) for name, one in value.items())
                        for *outside, number in shape.some))  # fmt: skip

    def _is_other(self, name: str, names: Iterable[str], patterns: Iterable[str]) -> bool:
        return name not in names and not any(self.matches(pattern, name) for pattern in patterns)


SHAPE_BITS = {ObjectShape: 1, ArrayShape: 2, StringShape: 4, NumberShape: 24}


def lower(one: Any, two: Any) -> Any:
    """The lower of two upper bounds, of which each may be None; of a number's equal ones that which is left out itself."""
    bounds = (bound for bound in (one, two) if bound is not None)
    return min(bounds, key=lambda bound: (bound[0], not bound[1]) if isinstance(bound, tuple) else bound, default=None)


JOINS: dict[str, Callable[[Any, Any], Any]] = {  # by field
    "low": lambda one, two: max((bound for bound in (one, two) if bound is not None), default=None), "high": lower,
    "texts": lambda one, two: intersection([one, two]), "excluded": frozenset.union,
    **dict.fromkeys(("whole", "unique", "closed", "is_rest_said", "is_low_said", "why"), lambda one, two: one or two),
    **dict.fromkeys(("multiples", "not_multiples", "contains", "some", "wanted"),
                    lambda one, two: tuple(dict.fromkeys(one + two)))}  # fmt: skip


def joined_shape(one: Any, two: Any) -> Any:
    """Two shapes of a kind as one, as far as their fields tell; None for strings and numbers of which there are none."""
    found = replace(one, **{key: JOINS[key](getattr(one, key), getattr(two, key)) for key in vars(one) if key in JOINS})
    if isinstance(found, StringShape) and found.texts is NONE:
        return None
    if isinstance(found, NumberShape) and ((found.whole and 1 in found.not_multiples)
                                           or (found.low and found.high and found.low[0] > found.high[0])):  # fmt: skip
        return None
    return found


class SchemaShapes(Forms):
    """Turns a JSON schema into the shapes in which its documents are written.

    An object without additionalProperties or patternProperties holds only the properties it names, as with every engine
    that generates; a tuple is written whole; and a schema without a type allows what its keywords are about.
    """

    MAX_SHAPES = 1500  # of one value: so many a text can begin with at once

    def __init__(self, name: str, root: Any) -> None:
        super().__init__(name, root)
        self._choices: dict[Node, Shapes] = {}

    def choice(self, node: Node) -> Shapes:
        """The shapes of a value, without those that others contain."""
        if node not in self._choices:
            meant = (shape for shape, said in self.meeting(node) if self._is_meant(shape, said))
            shapes = [written for shape in meant for written in self._written(shape)]
            shapes = list(dict.fromkeys(shapes)) if len(shapes) > 1 else shapes
            if sum(not isinstance(shape, Constant) for shape in shapes) > self.MAX_SHAPES:
                raise self.refuse(f"anyOf and oneOf leave over {self.MAX_SHAPES} alternatives that are not constants")
            free = {type(shape) for shape in shapes if shape in FREE} if len(shapes) > 1 else ()
            if StringShape in free:
                shapes = [shape for shape in shapes if not (isinstance(shape, Constant) and shape.text[0] == '"')]
            self._choices[node] = tuple(shape for shape in shapes if type(shape) not in free or shape in FREE)
        return self._choices[node]

    @staticmethod
    def _is_meant(shape: Any, said: int) -> bool:
        """True for a type that a schema says, or that its keywords are about."""
        about = next((bit for bit in (1, 2, 24, 4) if said & bit), 0)
        return bool(said & TYPED or not about or (not isinstance(shape, Listed) and SHAPE_BITS[type(shape)] == about))

    def _written(self, shape: Any) -> Iterator[Shape]:
        if isinstance(shape, Listed):
            self.spend(len(shape.values) // 8)
            yield from (Constant(self.json(value)) for value in shape.values.values())
        elif isinstance(shape, (StringShape, NumberShape)):
            yield shape
        elif shape.why:
            raise self.refuse(shape.why)
        elif shape.high is not None and shape.low > shape.high:
            what = "Items" if isinstance(shape, ArrayShape) else "Properties"
            self.dead_end = f"min{what} {shape.low} is more than max{what} {shape.high}"
        else:
            yield from [self._array_written(shape)] if isinstance(shape, ArrayShape) else self._object_written(shape)

    json = staticmethod(json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode)

    def _array_written(self, shape: ArrayShape) -> ArrayShape:
        low, high, longest = shape.low, shape.high, len(shape.first)
        rest = shape.rest if shape.is_rest_said or not longest else None
        stops = [index for index, node in enumerate(shape.first) if node == (self.never,)]
        if stops or rest is None or rest == (self.never,):
            high, rest = min([*stops[:1], longest, *([] if high is None else [high])]), None
        if longest and not shape.is_low_said:
            low = longest if high is None else min(longest, high)
        return ArrayShape(shape.first, rest, low, high, shape.unique, shape.contains)

    def _object_written(self, shape: ObjectShape) -> Iterator[ObjectShape]:
        if shape.some:
            yield from self._with_some(shape)
            return
        kinds = shape.unnamed if shape.closed else shape.unnamed + shape.unsaid
        named = dict(shape.places)
        choice: Shapes = (StringShape(),)
        if shape.names:
            choice = self.choice(shape.names)
            listed = (json.loads(one.text) for one in choice if isinstance(one, Constant) and one.text[0] == '"')
            named |= {name: shape.at(name) for name in listed if kinds and name not in named}
        if shape.closed:
            if any(prop.required and not prop.said for prop in named.values()):
                return
            named = {name: prop for name, prop in named.items() if prop.said}
        properties = list(named.values())
        if shape.names or shape.wanted:
            properties = [Property(prop.name, prop.node if self.fits(prop.name, shape.names) else (self.never,),
                                   prop.required or prop.name in shape.wanted) for prop in properties]  # fmt: skip
        self.spend(len(properties) // 4)
        unnamed = list[tuple[StringShape, Node]]()
        for (names, node), wanted in itertools.product(kinds, choice):
            both = joined_shape(names, wanted) if isinstance(wanted, StringShape) and node != (self.never,) else None
            if both:
                unnamed.append((both.but_not(named) if named else both, node))
        yield ObjectShape(tuple(properties), tuple(unnamed), shape.low, shape.high)

    def _with_some(self, shape: ObjectShape) -> Iterator[ObjectShape]:
        """Objects of which one property, among those that are named, fits what `some` says."""
        (names, patterns, number), *more = shape.some
        rest = replace(shape, some=tuple(more))
        for inner in self._object_written(rest):
            if inner.unnamed and self.form(number):
                raise self.refuse("keyword not is not supported around additionalProperties where objects are open")
        for prop in shape.named:
            if self._is_other(prop.name, names, patterns):
                needed = replace(ANY_OBJECT, named=(Property(prop.name, self.node([number]), True),))
                if (found := self._meet_objects(rest, needed)) is not None:
                    yield from self._object_written(found)


FREE: Shapes = (NumberShape(), StringShape(), ArrayShape(), ObjectShape())


# ── E.3. Grammars ─────────────────────────────────────────────────────────────────────────────────────────────────────
# A schema's documents as symbols that open as a text reaches them, and calls of functions.
# Offers: json_symbol, read_json, read_soon, calls_symbol, anything_but. Uses: D.1's automata, E.2's shapes, C's CallFormat.


@dataclass(frozen=True)
class Json(Symbol):
    """The documents of a JSON schema, which is read when it is met; `param` is the request's field that holds it."""

    text: str
    param: str

    def opened(self) -> Iterable[Symbols]:
        return ((read_json(self.text, self.param),),)


@functools.lru_cache(maxsize=64)
def read_json(text: str, param: str) -> Symbol:
    """The documents of a schema. Raises InvalidRequest naming the keyword at fault."""
    shapes = SchemaShapes(param, json.loads(text))
    try:
        return Documents(shapes).root()
    except InvalidRequest as error:  # strings and numbers know no field
        raise error if error.param else shapes.refuse(str(error)) from None
    except RecursionError:
        raise shapes.refuse("the schema is nested too deep") from None


Position = tuple[int, tuple[int, ...]]  # of an array: elements read, and how many fit each schema of contains


class Documents:
    """Turns shapes into symbols; those that nothing can fit are left out, so that no text comes to a dead end."""

    MAX_KEPT = 10_000  # values, objects and arrays, as far as texts have reached them
    MAX_PLACES = 20_000  # of an array with contains
    MAX_TAKEN, MAX_EXAMPLE = 100, 10_000  # values that are counted, and their length
    WIDE = 40  # so many bytes may come only within a string
    MAX_NAMES = 10_000  # names that an object may have, counted
    MAX_ALIKE = 16  # names of those taken that an object may have too, at a time
    BLOCK = 256  # named properties that are opened at a time: a millisecond

    def __init__(self, shapes: SchemaShapes) -> None:
        self.shapes = shapes
        self.possible: set[Node] = set()
        self._leaves: dict[StringShape | NumberShape, Symbol | None] = {}
        self._live: dict[ArrayShape, set[Position]] = {}
        self._kept: dict[Part, list[Symbols]] = {}
        self._scarce: set[ArrayShape] = set()
        self._tails: dict[ObjectShape, list[tuple[int, int]]] = {}

    def root(self) -> Symbol:
        """The root of the grammar. Raises InvalidRequest naming the keyword at fault."""
        reader = self.shapes
        root = reader.node([reader.read(reader.root)])
        self.possible = self._possible(root)
        while scarce := self._scarce_arrays():
            self._scarce.update(scarce)
            self._live.clear()
            self._kept.clear()
            self.possible = self._possible(root)
        reader.steps = -(10**12)  # from here on texts bound the work
        if root not in self.possible:
            raise reader.refuse(f"no document can fit the schema{': ' if reader.dead_end else ''}{reader.dead_end}")
        return Value(self, root)

    def leaf(self, shape: StringShape | NumberShape, taken: Iterable[Any] = ()) -> Symbol | None:
        """A string or number that is none of those taken; None if there is none."""
        if isinstance(shape, StringShape) and (texts := [value for value in taken if isinstance(value, str)]):
            return string_symbol(shape.but_not(texts))
        if isinstance(shape, NumberShape) and (numbers := [value for value in taken if isinstance(value, (int, float))]):
            return another_number(shape, numbers)
        if shape not in self._leaves:
            self._leaves[shape] = self.shapes.string(shape) if isinstance(shape, StringShape) else number_symbol(shape)
        return self._leaves[shape]

    # What can be written at all: a required property that nothing fits makes its object impossible, and so on.

    def _possible(self, root: Node) -> set[Node]:
        nodes, found = {root: None}, set[Node]()
        for node in (todo := [root]):
            fresh = [inner for inner in self._inside(self.shapes.choice(node)) if inner not in nodes]
            nodes |= dict.fromkeys(fresh)
            todo += dict.fromkeys(fresh)
        before = -1
        while before < len(found):  # a list that must hold lists is never finished
            before = len(found)
            for node in reversed(nodes):
                if node not in found and any(self.is_possible(shape, found) for shape in self.shapes.choice(node)):
                    found.add(node)
        return found

    def _inside(self, choice: Shapes) -> Iterator[Node]:
        for shape in choice:
            if isinstance(shape, ObjectShape):
                self.shapes.spend(len(shape.named) // 4)
                yield from (prop.node for prop in shape.named)
                yield from (node for _, node in shape.unnamed)
            elif isinstance(shape, ArrayShape):
                for index in range(len(shape.first) + 1):
                    yield from (node for node, _ in self.elements(shape, index, (0,) * len(shape.contains)))
            elif not isinstance(shape, Constant):
                self.leaf(shape)  # may be refused

    def _scarce_arrays(self) -> list[ArrayShape]:
        """Arrays that must hold more different elements than there are."""
        arrays = [shape for node in self.possible for shape in self.shapes.choice(node) if isinstance(shape, ArrayShape)]
        return [shape for shape in arrays
                if self.is_possible(shape, self.possible) and shape.unique and not self._has_enough(shape)]  # fmt: skip

    def is_possible(self, shape: Shape, possible: set[Node]) -> bool:
        self.shapes.spend()
        if isinstance(shape, Constant):
            return True
        if isinstance(shape, ArrayShape):
            if shape in self._scarce:
                return False
            if shape.contains:
                return (0, (0,) * len(shape.contains)) in self.alive(shape, possible)
            return all(shape.at(index) in possible for index in range(min(shape.low, len(shape.first) + 1)))
        if not isinstance(shape, ObjectShape):
            return self.leaf(shape) is not None
        if not all(prop.node in possible for prop in shape.named if prop.required):
            return False
        most = sum(prop.node in possible for prop in shape.named) + self.most_names(shape, possible)
        return shape.low <= most and (shape.high is None or sum(prop.required for prop in shape.named) <= shape.high)

    def _has_enough(self, shape: ArrayShape) -> bool:
        """True if an array whose elements are all different can be as long as it must be."""
        rest = shape.at(len(shape.first))
        wanted = [(node, shape.low) for node in (*shape.first[: shape.low], rest) if node is not None]
        if not shape.first:
            wanted += [(self.shapes.node((*(rest or ()), number)), least) for number, least, _ in shape.contains]
        if all(count < 2 or self._has_different(node, count) for node, count in wanted):
            return True
        if shape.first:
            raise self.shapes.refuse("uniqueItems beside prefixItems is not supported where an element has few values")
        return False

    def _has_different(self, node: Node, count: int) -> bool:
        """True if so many different values fit, as a try tells."""
        taken = frozenset[Any]()
        for _ in range(min(count, self.MAX_TAKEN)):
            if not self.kept(value := Value(self, node, taken)):
                return False
            taken |= {comparable(self._example(value))}
        return True

    def _example(self, value: Value) -> Any:
        """A document, written as chance has it, but ended where it can be."""
        here, text = Automaton(value).start, b""
        while not here.ends:
            may = list(bytes_of(here.bits))
            ends = [byte for byte in (b']}"' if len(may) < self.WIDE else b'"') if byte in may]
            byte = ends[0] if ends else may[zlib.crc32(text) % len(may)]
            text, behind = text + bytes([byte]), here.step(byte)
            if behind is None or len(text) > self.MAX_EXAMPLE:
                raise self.shapes.refuse("uniqueItems: the elements are too long to count them")
            here = behind
        return json.loads(text)

    def most_names(self, shape: ObjectShape, possible: set[Node]) -> int:
        """How many unnamed properties an object may have, counted as far as it must have some."""
        found = 0
        for names, node in shape.unnamed:
            if node in possible and self.leaf(names) is not None and found < shape.low:
                few = few_texts(names, min(shape.low, self.MAX_NAMES))
                found += shape.low if few is None else len(few)
        return found

    def kept(self, part: Part) -> list[Symbols]:
        """The alternatives for a part, found once. Raises NotYet."""
        found = self._kept.get(part)
        if found is None:
            found = part.made()
            if len(self._kept) > self.MAX_KEPT:
                self._kept.clear()  # other threads may do so too: what is returned is never looked up again
            self._kept[part] = found
            TURN.kept()
        return found

    # Objects: what is required, and how many properties there must be, must be able to come within the most there may be

    def can_end(self, here: Members) -> bool:
        shape, lacking = here.shape, here.shape.low - here.count
        if lacking <= 0 and shape.high is None:
            return True
        required, possible = self._tail(shape, here.at)
        if shape.high is not None and here.count + required > shape.high:
            return False
        return possible >= lacking or possible + self.most_names(shape, self.possible) - len(here.taken) >= lacking

    def _tail(self, shape: ObjectShape, at: int) -> tuple[int, int]:
        """How many of the named properties from one on are required, and how many can be."""
        if shape not in self._tails:
            counts = [(prop.required, prop.node in self.possible) for prop in reversed(shape.named)]
            sums = itertools.accumulate(counts, lambda so_far, one: (so_far[0] + one[0], so_far[1] + one[1]), initial=(0, 0))
            self._tails[shape] = list(sums)[::-1]
        return self._tails[shape][at]

    # Arrays

    @staticmethod
    def next(shape: ArrayShape, index: int) -> int:
        """The index of the next element, as far as it matters."""
        return index + 1 if shape.high is not None or index < max(len(shape.first), shape.low, 1) else index

    def elements(self, shape: ArrayShape, index: int, counts: tuple[int, ...]) -> Iterator[tuple[Node, tuple[int, ...]]]:
        """The schemas that an element may fit, and how many then have fitted each schema of contains."""
        node = shape.at(index)
        for counted in itertools.product((True, False), repeat=len(shape.contains)) if node is not None else ():
            inside, after = list(node or ()), []
            for fits, count, (number, least, most) in zip(counted, counts, shape.contains, strict=True):
                if fits and (count == most or (most is None and count >= least)):
                    break  # one more may not be, or need not be told apart
                inside += [number] if fits else [] if most is None else [~number]
                after.append(count + fits)
            else:
                yield self.shapes.node(inside), tuple(after)

    def alive(self, shape: ArrayShape, possible: set[Node]) -> set[Position]:
        """The places of an array, elements read and counts of contains, from which it can be finished."""
        if shape in self._live:
            return self._live[shape]
        last = shape.high if shape.high is not None else max(len(shape.first), shape.low, 1)
        spans = [range(low if most is None else most, -1, -1) for _, low, most in shape.contains]
        if (last + 1) * math.prod(map(len, spans)) > self.MAX_PLACES:
            raise self.shapes.refuse(f"contains beside minItems or maxItems is supported up to {self.MAX_PLACES} cases")
        found: set[Position] = set()
        for index in range(last, -1, -1):
            for counts in itertools.product(*spans):
                behind = [more for node, more in self.elements(shape, index, counts) if node in possible]
                if self.is_whole(shape, index, counts) or any((self.next(shape, index), more) in found for more in behind):
                    found.add((index, counts))
        if possible is self.possible:
            self._live[shape] = found
        return found

    @staticmethod
    def is_whole(shape: ArrayShape, index: int, counts: tuple[int, ...]) -> bool:
        """True if an array may end here."""
        return index >= shape.low and all(count >= low for count, (_, low, _) in zip(counts, shape.contains, strict=True))

    # uniqueItems: elements that are objects and arrays are told apart part by part

    def _parts_soon(self, here: Members | Elements) -> bool:
        """True if the next value can be one that none of those taken has there: then no look further on is needed."""
        if isinstance(here, Elements):
            node = here.shape.at(here.index)
            heads = {one[0] for one in here.alike if one}
            if node is None or node not in self.possible or here.shape.contains:
                return False
            return bool(self.kept(Value(self, node, here.seen | heads)))
        if here.shape.low or here.shape.high is not None:
            return False
        for prop in here.shape.named[here.at :]:
            values = frozenset(one[prop.name] for one in here.alike if prop.name in one)
            if prop.node in self.possible and self.kept(Value(self, prop.node, values)):
                return True
            if prop.required:
                return False
        taken = here.taken.union(*here.alike)
        return any(node in self.possible and self.leaf(names, taken) is not None for names, node in here.shape.unnamed)

    def unlike(self, node: Node, heads: Mapping[Any, set[Any]], after: Any) -> list[Symbols]:
        """A value and what follows it, so that the whole is none of those taken: `heads` maps the values that those have here
        to the rest of them."""
        unique = isinstance(after, Elements) and after.shape.unique
        if not heads and not unique:
            return [(Value(self, node), after)]
        found, seen = list[Symbols](), after.seen if unique else frozenset()
        for value, rest in heads.items():
            same = replace(after, alike=frozenset(rest), **({"seen": seen | {value}} if unique else {}))
            if value not in seen and self.shapes.fits(plain(value), node) and (self._parts_soon(same) or self.kept(same)):
                found.append((word(self.shapes.json(plain(value))), same))
        other = Value(self, node, seen.union(heads))
        if not other.but or self.kept(other):
            found.append((Recorded(Automaton(other).start, after),) if unique else (other, after))
        return found


@dataclass(frozen=True)
class Part(Symbol):
    """A part of a document whose alternatives are kept."""

    documents: Documents

    def opened(self) -> Iterable[Symbols]:
        return self.documents.kept(self)

    def made(self) -> list[Symbols]:
        raise NotImplementedError


@dataclass(frozen=True)
class Value(Part):
    """A value that fits some schemas, and is none of `but`, to compare with."""

    node: Node
    but: frozenset[Any] = frozenset()

    def made(self) -> list[Symbols]:
        constants: dict[bytes, Symbols] = {}
        found: list[Symbols] = []
        for shape in self.documents.shapes.choice(self.node):
            if isinstance(shape, Constant):
                if not self.but or comparable(json.loads(shape.text)) not in self.but:
                    constants[shape.text.encode()] = ()
            elif self.documents.is_possible(shape, self.documents.possible):
                found += self._of_shape(shape)
        return [any_text(constants), *found] if constants else found

    def _of_shape(self, shape: StringShape | NumberShape | ObjectShape | ArrayShape) -> list[Symbols]:
        if isinstance(shape, (StringShape, NumberShape)):
            leaf = self.documents.leaf(shape, self.but)
            return [(leaf,)] if leaf else []
        inside: Members | Elements
        if isinstance(shape, ObjectShape):
            begin, inside = b"{", Members(self.documents, shape, alike=frozenset(x for x in self.but if isinstance(x, Fields)))
        else:
            begin, inside = b"[", Elements(self.documents, shape, 0, (0,) * len(shape.contains),
                                           alike=frozenset(x for x in self.but if isinstance(x, tuple) and x[:1] != (bool,)))
        return [(Word(begin), inside)] if not inside.alike or self.documents.kept(inside) else []


@dataclass(frozen=True)
class Members(Part):
    """The rest of an object: its named properties from `at` on. `count` properties stand there, as far as that matters.

    `taken` are the names of unnamed properties that may not come again; `alike` is the rest of each object that this one must
    not be and begins as.
    """

    shape: ObjectShape
    at: int = 0
    count: int = 0
    first: bool = True
    taken: frozenset[str] = frozenset()
    alike: frozenset[Fields] = frozenset()

    def made(self) -> list[Symbols]:
        """The alternatives: a named property, the end, an unnamed one; a block of named ones at a time."""
        documents, shape, alike = self.documents, self.shape, self.alike
        texts: dict[bytes, Symbols] = {}
        found: list[Symbols] = []
        next_block = (self.at // documents.BLOCK + 1) * documents.BLOCK
        for index in range(self.at, min(next_block, len(shape.named))):
            prop, after = shape.named[index], Members(documents, shape, index + 1, self._counted(), False, self.taken)
            if prop.node in documents.possible and documents.can_end(after):
                behind = self._behind(prop.name, prop.node, after, alike)
                if behind:
                    texts[self._key(prop.name)] = behind[0] if len(behind) == 1 else (AnyOf(tuple(map(InOrder, behind))),)
            if prop.required:
                break
            alike = frozenset(one for one in alike if prop.name not in one) if alike else alike
        else:
            if next_block < len(shape.named):
                block = replace(self, at=next_block, alike=alike)
                found += [(block,)] if not alike or documents.kept(block) else []
            else:
                found += replace(self, at=len(shape.named), alike=alike)._unnamed() if shape.unnamed else []
                if self.count >= shape.low and Fields() not in alike:
                    texts[b"}"] = ()
        return [any_text(texts), *found] if texts else found

    def _key(self, name: str) -> bytes:
        return f"{'' if self.first else ', '}{json.dumps(name, ensure_ascii=False)}: ".encode()

    def _counted(self) -> int:
        """One more property, counted as far as it matters."""
        return self.count + 1 if self.shape.high is not None or self.count < self.shape.low else self.count

    def _behind(self, name: str, node: Node, after: Members, alike: Iterable[Fields]) -> list[Symbols]:
        """The value of a property and the rest."""
        heads: dict[Any, set[Any]] = {}
        for one in alike:
            if name in one:
                rest = Fields((other, value) for other, value in one.items() if other != name)
                heads.setdefault(one[name], set()).add(rest)
        return self.documents.unlike(node, heads, after)

    def _unnamed(self) -> list[Symbols]:
        """Unnamed properties; where properties are counted, their names are told apart."""
        shape, documents, found = self.shape, self.documents, list[Symbols]()
        if (shape.high is not None and self.count >= shape.high) or not documents.can_end(self):
            return found  # those that are named and left out would be missing
        after = Members(documents, shape, self.at, self._counted(), False, self.taken)
        known = [name for name in dict.fromkeys(itertools.chain(*sorted(self.alike, key=list))) if name not in self.taken]
        for names, node in shape.unnamed:
            if node not in documents.possible:
                continue
            for name in known[: documents.MAX_ALIKE]:
                if string_fits(names, name):
                    again = replace(after, taken=self.taken | {name})
                    found += [(Word(self._key(name)), *behind) for behind in self._behind(name, node, again, self.alike)]
            key = documents.leaf(names, self.taken.union(known))
            if key is not None:
                begin = () if self.first else (word(", "),)
                counted = shape.low > 0 or shape.high is not None
                found.append((*begin, Recorded(Automaton(key).start, Named(after, node))) if counted
                             else (*begin, key, Word(b": "), Value(documents, node), after))  # fmt: skip
        return found


@dataclass(frozen=True)
class Elements(Part):
    """The rest of an array behind `index` elements, of which so many fit what it must contain.

    `seen` are the elements so far, where no two may be the same; `alike` is the rest of each array that this one must not be
    and begins as.
    """

    shape: ArrayShape
    index: int
    counts: tuple[int, ...]
    seen: frozenset[Any] = frozenset()
    alike: frozenset[tuple[Any, ...]] = frozenset()

    def made(self) -> list[Symbols]:
        """The alternatives: the end, or one more element."""
        shape, documents, found = self.shape, self.documents, list[Symbols]()
        if documents.is_whole(shape, self.index, self.counts) and () not in self.alike:
            found.append((Word(b"]"),))
        heads: dict[Any, set[Any]] = {}
        for one in filter(None, self.alike):
            heads.setdefault(one[0], set()).add(one[1:])
        live = documents.alive(shape, documents.possible) if shape.contains else None
        comma = (Word(b", "),) if self.index else ()
        for node, counts in documents.elements(shape, self.index, self.counts):
            after = Elements(documents, shape, documents.next(shape, self.index), counts, self.seen)
            if node in documents.possible and (live is None or (after.index, counts) in live):
                found += [(*comma, *behind) for behind in documents.unlike(node, heads, after)]
        return found

    def follow(self, text: bytes) -> Symbols:
        return (replace(self, seen=self.seen | {comparable(json.loads(text))}),)


@dataclass(frozen=True)
class Named:
    """Behind the name of an unnamed property: its value, and an object where that name is taken."""

    after: Members
    node: Node

    def follow(self, text: bytes) -> Symbols:
        taken = self.after.taken | {json.loads(text)}
        return (Word(b": "), Value(self.after.documents, self.node), replace(self.after, taken=taken))


@dataclass(frozen=True)
class Recorded(Symbol):
    """A part whose text so far is kept, for what follows depends on it. It is never empty."""

    here: State
    then: Named | Elements
    text: bytes = b""

    @property
    def firsts(self) -> int:
        return self.here.bits

    @property
    def ends(self) -> bool:  # type: ignore[override]
        return self.here.ends

    def step(self, byte: int) -> Symbols | None:
        here, text = self.here.step(byte), self.text + bytes([byte])
        if here is None:
            return None
        return (Recorded(here, self.then, text),) if here.bits else self.then.follow(text)

    def left(self) -> Symbols:
        return self.then.follow(self.text)


@dataclass(frozen=True, eq=False)
class OneText(Symbol):
    """One of several texts, and what follows each."""

    texts: Mapping[bytes, Symbols]

    @functools.cached_property
    def _after(self) -> dict[int, Symbols]:
        groups: dict[int, dict[bytes, Symbols]] = {}
        for text, after in self.texts.items():
            if text:
                groups.setdefault(text[0], {})[text[1:]] = after
        return {byte: any_text(group) for byte, group in groups.items()}

    @functools.cached_property
    def firsts(self) -> int:
        return sum(1 << byte for byte in self._after)

    @property
    def ends(self) -> bool:  # type: ignore[override]
        return b"" in self.texts

    def step(self, byte: int) -> Symbols | None:
        return self._after.get(byte)

    def left(self) -> Symbols:
        return self.texts[b""]


def any_text(texts: Mapping[bytes, Symbols]) -> Symbols:
    """One of some texts, and what follows it."""
    begin = os.path.commonprefix([min(texts), max(texts)])  # noqa: RUF071 - no paths
    rest = {text[len(begin) :]: after for text, after in texts.items()} if begin else texts
    behind = (OneText(rest),) if len(texts) > 1 else rest[b""]
    return (Word(begin), *behind) if begin else behind


LETTERS = OneChar(((0x30, 0x39), (0x41, 0x5A), (0x61, 0x7A)))
LEFT_OPEN = {ID: Repeated(LETTERS, 9, 9), ANY: Repeated(LETTERS, 1, 24)}  # by a format


def format_text(text: str) -> Symbol:
    """A format's text, what it leaves open filled in."""
    return InOrder(tuple(LEFT_OPEN.get(piece) or word(piece) for piece in re.split(f"([{ID}{ANY}])", text) if piece))


def calls_symbol(format: CallFormat, tools: Seq[dict[str, Any]], opened: str, many: bool) -> Symbol:
    """One call or several of the offered functions as their model writes them; `opened`, the first one's beginning, stands
    there already. Raises InvalidRequest where a schema cannot be."""
    call = AnyOf(tuple(one_call(format, f"tools[{i}].function.parameters", t["function"]) for i, t in enumerate(tools)))
    first, again = (o + format.head for o in (format.opens.lstrip(), format.again))
    behind = Repeated(InOrder((format_text(again), call)), 0, 7 if many and format.again else 0)
    return InOrder((format_text(first.removeprefix(opened)), call, behind, format_text(format.closes.rstrip())))


def one_call(format: CallFormat, where: str, function: dict[str, Any]) -> Symbol:
    """A function's name and arguments."""
    schema = function.get("parameters") or {}
    schema = schema if "type" in schema or "properties" in schema else {"type": "object", **schema}
    name = function["name"] if format.keys is None else json.dumps(function["name"], ensure_ascii=False)[1:-1]
    text = json.dumps(schema)
    arguments = ArgumentList(text, where, format.params) if format.params else Json(text, where)
    read_soon(arguments)
    return InOrder((word(name), format_text(format.named), arguments))


class SchemaStructure(SchemaReader):
    """Reads no more of a schema than where the others in it stand, which templates and parsers rely on."""

    def _type_names(self, key: str, value: Any) -> int:
        if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            raise self.refuse(f"{key} must be a type or a list of types, not {self.said(value)}")
        return self.EVERY_TYPE

    KEYWORDS: ClassVar = {key: read for key, read in SchemaReader.KEYWORDS.items() if read in (
        SchemaReader._schema, SchemaReader._schemas, SchemaReader._named, SchemaReader._enum)} | {"type": _type_names}


@functools.lru_cache(maxsize=512)
def check_structure(text: str, where: str) -> None:
    """Raises InvalidRequest, naming the keyword, for a schema that holds something else where a schema or a list must be."""
    reader = SchemaStructure(where, json.loads(text))
    try:
        reader.read(reader.root)
    except RecursionError:
        raise reader.refuse("the schema is nested too deep") from None


@functools.lru_cache(maxsize=256)
def argument_types(text: str, key: str) -> int:
    """The types that a function's schema allows for one of its arguments, as SchemaReader's bits; all where it does not say."""
    shapes, found = SchemaShapes("parameters", json.loads(text)), 0
    with contextlib.suppress(InvalidRequest, RecursionError):
        for shape in object_shapes(shapes):
            named = [prop.node for prop in shape.named if prop.name == key]
            for node in named or [node for names, node in shape.unnamed if string_fits(names, key)][:1]:
                found |= types_of(shapes.choice(node))
    return found or SchemaReader.EVERY_TYPE


def object_shapes(shapes: SchemaShapes) -> list[ObjectShape]:
    """The objects that a schema allows."""
    root = shapes.node([shapes.read(shapes.root)])
    return [shape for shape in shapes.choice(root) if isinstance(shape, ObjectShape)]


def types_of(shapes: Shapes) -> int:
    """The types of values of these shapes, as SchemaReader's bits."""
    found, kinds = 0, {NumberShape: "number", StringShape: "string", ArrayShape: "array", ObjectShape: "object"}
    for shape in shapes:
        if isinstance(shape, Constant):
            found |= type_bit(json.loads(shape.text))
        else:
            found |= SchemaReader.TYPES["integer" if isinstance(shape, NumberShape) and shape.whole else kinds[type(shape)]]
    return found


@dataclass(frozen=True)
class ArgumentList(Json):
    """The objects of a JSON schema, their properties written one by one."""

    params: Params

    def opened(self) -> Iterable[Symbols]:
        return read_arguments(self.text, self.param, self.params)


@functools.lru_cache(maxsize=64)
def read_arguments(text: str, param: str, params: Params) -> tuple[Symbols, ...]:
    """A schema's objects, property by property. Raises InvalidRequest naming the keyword at fault."""
    documents, found = Documents(SchemaShapes(param, json.loads(text))), list[Symbols]()
    objects = object_shapes(documents.shapes)
    for shape in objects:
        if shape.high is not None or shape.low > sum(prop.required for prop in shape.named):
            keyword = "minProperties" if shape.high is None else "maxProperties"
            raise documents.shapes.refuse(f"keyword {keyword} is not supported where arguments are written one by one")
    documents.root()  # tells what is possible
    for shape in objects:
        arguments = tuple((one_argument(documents, prop, params), prop.required) for prop in shape.named
                          if prop.node in documents.possible)  # fmt: skip
        found.append((NamedArguments(arguments, format_text(params.closes if params.quote else "")),))
    if not found:
        raise documents.shapes.refuse("a function's arguments are an object, and the schema allows none")
    return tuple(found)


def one_argument(documents: Documents, prop: Property, params: Params) -> Symbol:
    """A name and its value: a string without quotes or in the family's, other types as JSON."""
    closes = "" if params.quote else params.closes.replace(KEY, prop.name)
    shapes = documents.shapes.choice(prop.node)
    value: Symbol = Value(documents, prop.node)
    if types_of(shapes) in (SchemaReader.TYPES["string"], SchemaReader.EVERY_TYPE):
        quote = word(params.quote)
        value = InOrder((quote, AnyOf(plain_texts(documents, shapes, closes.strip() or params.quote)), quote))
    return InOrder((format_text(params.opens + prop.name + params.keyed), value, format_text(closes)))


def plain_texts(documents: Documents, shapes: Shapes, marker: str) -> Symbols:
    """Strings as they are: what stands behind them, `marker`, does not occur in them. Raises InvalidRequest if there are none."""
    apart, found = texts_by("pattern", not_before(marker), False), list[Symbol]()
    for shape in shapes:
        if isinstance(shape, Constant) and shape.text[0] == '"' and string_fits(StringShape(texts=apart), json.loads(shape.text)):
            found.append(word(json.loads(shape.text)))
        elif isinstance(shape, StringShape):
            shape = shape.within(apart)
            if documents.leaf(shape) is not None:
                found.append(PlainText(shape.texts))
    if not found:
        raise documents.shapes.refuse(f"no string can fit the schema and be written before {_said(marker)}")
    return tuple(found)


def not_before(marker: str) -> str:
    """A pattern that no text before a marker may match: its first two characters, or one that could become them."""
    first, second = map(re.escape, (marker + "  ")[:2])
    return rf"{first}|\\|\n" if len(marker) == 1 else f"{first}(?:{first}|{second}|$)"


class PlainText(JsonText):
    """The rest of a text that is written as it is."""

    def opened(self) -> Iterable[Symbols]:
        end: list[Symbols] = [()] if self.at.nullable else []
        return [*end, *((OneChar(ranges), rest) for ranges, rest in self.longer())]


@dataclass(frozen=True)
class NamedArguments(Symbol):
    """Arguments from the one at `at` on, in their order; those that are not required may be left out."""

    options: tuple[tuple[Symbol, bool], ...]  # and whether it is required
    separator: Symbol
    at: int = 0
    begun: bool = False  # one stands there already

    def opened(self) -> Iterable[Symbols]:
        for index, (argument, required) in enumerate(self.options[self.at :], self.at):
            between = (self.separator,) if self.begun else ()
            yield (*between, argument, NamedArguments(self.options, self.separator, index + 1, True))
            if required:
                return
        yield ()

    @property
    def parts(self) -> Symbols:  # type: ignore[override]
        return (self.separator, *(argument for argument, _ in self.options))


def json_symbol(param: str, schema: Mapping[str, Any]) -> Json:
    """The documents of a schema in the request's field `param`. Raises InvalidRequest naming the keyword at fault."""
    symbol = Json(json.dumps(schema), param)
    read_soon(symbol)
    return symbol


@dataclass(frozen=True)
class RestOf(Symbol):
    """The rest of a grammar's text that has begun. Raises InvalidRequest where no text begins so."""

    grammar: Symbol
    begun: bytes
    param: str

    def opened(self) -> Iterable[Symbols]:
        state = Automaton(self.grammar).start.read(self.begun)
        if state is None:
            words = f"{self.param}: the answer that is to be continued begins no text that fits"
            raise InvalidRequest(words, "messages")
        return [*((Unread(stack),) for stack in state.stacks), *([()] if state.ends else [])]

    @property
    def parts(self) -> Symbols:  # type: ignore[override]
        return (self.grammar,)


@dataclass(frozen=True)
class Unread(Symbol):
    """The symbols that one reading of a text still wants."""

    stack: Stack

    def opened(self) -> Iterable[Symbols]:
        return [(self.stack.top, *([Unread(below)] if below else [])) for below in self.stack.below]


READING_SECONDS = 0.005  # of a grammar: 95 of 100 schemas take less


def read_soon(root: Symbol) -> bool:
    """Reads a grammar for up to 5 ms; False for a slower one, which is read where no text waits. Raises InvalidRequest."""
    with TURN.limited(READING_SECONDS):
        read_ahead(root)
        return True
    return False


def anything_but(marker: str) -> Symbol:
    """One character or two of a text that never holds the marker, nor what looks much like it."""
    first, second = list((marker + "  ")[:2])
    return AnyOf((char_but(first), InOrder((word(first), char_but(first + second)))))


def char_but(chars: str) -> OneChar:
    """Any character without some."""
    return OneChar(others(merged((ord(char), ord(char)) for char in chars)))


# ── F. Pull ───────────────────────────────────────────────────────────────────────────────────────────────────────────
# Fetches models: from a Hugging Face hub into its cache, where every other tool finds them, or from any address.
# Offers: Pull, Plan, read_wanted, repository, pulled_before. Uses: hub_home, hub_caches (3), some_of (12), user_cache.

MAX_LISTING = 32 * MIB  # a repository's files as JSON; the largest have some 10,000
PULL_CHUNK = MIB
PULL_SILENCE = 30.0  # seconds without a byte: the connection is lost
PULL_RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)  # the pauses between tries; bytes that come start them anew
MAX_REMOTE_FILE = 1 << 63  # bytes; no file system has larger files
MAX_RETRY_AFTER = 300.0  # seconds that a busy server may have us wait
MAX_REDIRECTS = 8


class PullFailed(ApiError, status=502, message="The model could not be fetched"):
    """The model could not be fetched; the message says why, and what helps."""


class DiskFull(PullFailed, status=507):
    """The model does not fit the disk; the message says how much is missing, and what helps."""


class ConnectionLost(Exception):
    """The server cannot be reached, or broke off; the message says why."""


# What is wanted, and what there is


@dataclass(frozen=True)
class Wanted:
    """A repository's model, by quantization or file name ("": we choose), or an address."""

    repo: str = ""
    part: str = ""
    url: str = ""


def is_address(url: str) -> bool:
    """True for an http or https address that names a host, and no impossible port."""
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def hub_address() -> str:
    """The hub's address. Raises PullFailed when HF_ENDPOINT is none."""
    address = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    if not is_address(address):
        raise PullFailed(message=f"HF_ENDPOINT is '{printable(address)}': write an address, such as {HUB}")
    return address


def repository(name: str) -> Wanted | None:
    """OWNER/REPO[:PART], also behind hf.co/ as Ollama writes it; None for anything else."""
    found = re.fullmatch(r"(?:hf\.co/|huggingface\.co/)?(\w[\w.-]{0,95}/\w[\w.-]{0,95})(?::(.+))?", name, re.ASCII)
    if not found or "--" in found[1] or ".." in found[1]:  # names that the hub does not give, and no folder may have
        return None
    return Wanted(found[1], found[2] or "")


def read_wanted(name: str) -> Wanted:
    """Reads a NAME of the command line; an address of the hub's pages means a repository. Raises InvalidRequest."""
    named = name
    for site in (hub_address(), HUB, "https://hf.co"):
        if name.startswith(site + "/"):
            named = name.removeprefix(site + "/").partition("?")[0].strip("/")
            if file := re.fullmatch(r"([^/]+/[^/]+)/(?:resolve|blob)/main/(.+)", named):
                named = f"{file[1]}:{urllib.parse.unquote(file[2])}"
    if wanted := repository(named):
        return wanted
    if is_address(name):
        return Wanted(url=urllib.parse.quote(name, safe="%!#$&'()*+,/:;=?@[]~"))
    shapes = "OWNER/REPO, OWNER/REPO:Q4_K_M, OWNER/REPO:FILE.gguf or an address"
    raise InvalidRequest(f"'{printable(name)}' is no model to fetch: write {shapes}", "model")


@dataclass(frozen=True)
class RemoteFile:
    """A file that a server offers."""

    name: str  # its path in the repository, or the address's last part
    url: str
    size: int
    digest: str = ""  # SHA-256, or git's SHA-1 of a file that is stored plainly; "": nobody tells
    etag: str = ""  # what an address says in place of a digest


@dataclass(frozen=True)
class Offer:
    """A model of a repository: one file, or its shards in order."""

    stem: str  # without shard numbers and .gguf
    files: tuple[RemoteFile, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def quant(self) -> str:
        """The quantization that its name or its folder's states, or ""."""
        return next(iter(QUANT_IN_NAME.findall(self.stem.replace("/", "-"))[::-1]), "").upper()

    @property
    def label(self) -> str:
        return self.quant or self.stem

    def preference(self) -> tuple[Any, ...]:
        """Sorts Q4_K_M to the front, then its neighbours: more bits rather than fewer, K-quants rather than others."""
        bits = int((re.search(r"\d+", self.quant) or ("16",))[0])
        far = abs(bits - 4) + (0.5 if bits < 4 else 0.0)
        return self.quant != "Q4_K_M", far, "K_M" not in self.quant, "_K" not in self.quant, len(self.stem), self.stem

    def is_called(self, part: str) -> int:
        """How well a wanted part names this model: by its file, its quantization, its name's end, or not at all (0)."""
        names = {n.lower() for file in self.files for n in (file.name, file.name.rpartition("/")[2])}
        part = part.lower()
        return 3 * (part in names) or 2 * (part == self.quant.lower()) or int(self.stem.lower().endswith(part))


def offers_of(files: Iterable[RemoteFile]) -> list[Offer]:
    """The models among a repository's files: projectors and importance matrices are none, shards belong together."""
    sets: dict[tuple[str, str], list[RemoteFile]] = {}
    for file in sorted(files, key=lambda f: f.name):
        stem, dot, kind = file.name.rpartition(".")
        if dot and kind.lower() == "gguf" and not re.search(r"mmproj|imatrix", stem, re.I):
            shard = SHARD.search(stem)
            sets.setdefault((SHARD.sub("", stem), shard[2] if shard else "1"), []).append(file)
    return [Offer(stem, tuple(parts)) for (stem, count), parts in sets.items() if len(parts) == int(count)]


def choose_offer(offers: Seq[Offer], part: str) -> Offer | None:
    """The model that the part names, or without one the most usual quantization; None if nothing is called so."""
    if not part or part.lower() == "latest":
        return min(offers, key=Offer.preference, default=None)
    best = max((offer.is_called(part) for offer in offers), default=0)
    return min((o for o in offers if best and o.is_called(part) == best), key=Offer.preference, default=None)


def offered_names(offers: Iterable[Offer]) -> list[str]:
    """Lists models for a message, smallest first, each with its size."""
    return [f"{printable(o.label, 60)} ({human_bytes(o.size)})" for o in sorted(offers, key=lambda o: o.size)]


# Where it goes


@dataclass(frozen=True)
class Target:
    """A file's place on the disk, where `path` leads to the bytes in `blob`; until it is whole it grows in `partial`."""

    path: str
    blob: str
    partial: str
    lock: str

    def holds(self, size: int) -> bool:
        return any(os.path.isfile(path) and os.path.getsize(path) == size for path in (self.blob, self.path))

    def begun(self) -> int:
        """Bytes that an earlier pull has left."""
        return os.path.getsize(self.partial) if os.path.isfile(self.partial) else 0

    def link(self) -> None:
        """Makes `path` lead to the blob; where there are no links, as on many Windows machines, the blob moves there."""
        if os.path.exists(self.path):
            return
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        try:
            os.symlink(os.path.relpath(self.blob, os.path.dirname(self.path)), self.path)
        except FileExistsError:
            pass  # another pull was faster
        except (OSError, NotImplementedError):
            os.replace(self.blob, self.path)


def hub_target(folder: str, commit: str, file: RemoteFile) -> Target:
    """A file's place in the hub's cache, as huggingface_hub lays it out, locks included."""
    blob = os.path.join(folder, "blobs", file.digest)
    cache, name = os.path.split(folder)
    return Target(os.path.join(folder, "snapshots", commit, *file.name.split("/")), blob, f"{blob}.shimmy.incomplete",
                  os.path.join(cache, ".locks", name, f"{file.digest}.lock"))  # fmt: skip


def plain_target(folder: str, file: RemoteFile) -> Target:
    """A file's place in a plain folder. What the server says of it names the part, so that another file is not continued."""
    import hashlib

    path = os.path.join(folder, file.name)
    address = file.url.partition("?")[0]  # what is behind it may be a signature, another each time
    key = hashlib.sha256(f"{address} {file.size} {file.etag}".encode()).hexdigest()[:12]
    lock = os.path.join(user_cache(), "locks", hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:24])
    return Target(path, path, f"{path}.{key}.incomplete", lock)


def repository_folder(repo: str) -> str:
    """Where the hub's cache keeps a repository."""
    return os.path.join(os.path.abspath(hub_caches()[0]), f"models--{repo.replace('/', '--')}")


def pulled_before(wanted: Wanted) -> str | None:
    """The path of a repository's model that the cache already has, found without asking the hub."""
    folder = pathlib.Path(repository_folder(wanted.repo))
    try:
        commit = (folder / "refs" / "main").read_text().strip()
    except (OSError, ValueError):
        return None
    snapshot = folder / "snapshots" / commit
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        return None
    here = [RemoteFile(p.relative_to(snapshot).as_posix(), "", 0) for p in snapshot.rglob("*.gguf") if p.is_file()]
    found = choose_offer(offers_of(here), wanted.part)
    return str(snapshot / found.files[0].name) if found else None


def lock_file(file: IO[str]) -> bool:
    """Locks a file between processes and threads, until it is closed. Never waits: False while another has it.

    Where the file system has no locks, everybody gets one.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
    return True


# Asking for it


def hub_token() -> str | None:
    """The hub's token, from HF_TOKEN or the file that `hf auth login` writes."""
    path = os.environ.get("HF_TOKEN_PATH") or os.path.join(hub_home(), "token")
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    with contextlib.suppress(OSError, ValueError):
        token = token or pathlib.Path(path).expanduser().read_text()
    token = (token or "").strip()
    if token and not re.fullmatch(r"[!-~]+", token):
        raise InvalidRequest("HF_TOKEN holds a character that no token has")
    return token or None


def origin_of(url: str) -> tuple[str, str, int | None]:
    """An address's scheme, host and port: a token is sent to the hub's own only."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def retry_after(headers: http.client.HTTPMessage) -> float | None:
    """Seconds that a busy server asks for, in a number or a date (RFC 9110, 10.2.3)."""
    said = headers.get("Retry-After") or ""
    if re.fullmatch(r"\d{1,9}", said.strip()):
        return float(said)
    from email.utils import parsedate_to_datetime

    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


class Hub:
    """Speaks HTTP with the hub and with whoever it sends us to. The token goes to the hub's own address only."""

    BUSY = (429, 500, 502, 503, 504)

    def __init__(self, cancel: Cancellation) -> None:
        import urllib.request as web

        self.url, self._token, self.cancel = hub_address(), hub_token(), cancel
        self.host = urllib.parse.urlsplit(self.url).netloc
        self._woken, self._answers = threading.Event(), queue.SimpleQueue[Any]()
        self._socket: socket.socket | None = None  # of the last answer
        cancel.on_cancel(self._break_off)
        self._request, self._opener = web.Request, web.OpenerDirector()
        for handler in (web.ProxyHandler, web.HTTPHandler, web.HTTPSHandler):  # statuses and redirects are ours
            self._opener.add_handler(handler())

    def _break_off(self) -> None:
        """Wakes the thread that waits or reads; in the thread that cancels."""
        self._woken.set()
        self._answers.put(Cancelled())
        if self._socket:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def pause(self, seconds: float) -> None:
        """Waits; raises Cancelled."""
        self._woken.wait(seconds)
        self.cancel.check()

    def wait(self, seconds: float, why: str) -> Iterator[Fetching]:
        """Waits to try again, and tells every second how many are left, so that nobody gives us up; raises Cancelled."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            yield Fetching(f"{why}, trying again in {left:.0f} s")
            self.pause(min(left, 1.0))

    def get(self, url: str, headers: Mapping[str, str]) -> Generator[Fetching, None, http.client.HTTPResponse]:
        """The answer, behind redirects, once a server is not busy, whatever its status. Raises ConnectionLost, PullFailed."""
        for usual in (*PULL_RETRY_SECONDS, math.inf):
            response = self._follow(url, headers)
            pause = usual if math.isinf(usual) else retry_after(response.headers) or usual
            if response.status not in self.BUSY or pause > MAX_RETRY_AFTER:
                break
            response.close()
            yield from self.wait(pause, f"{printable(urllib.parse.urlsplit(url).netloc)} is busy ({response.status})")
        return response

    def _follow(self, url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        for _ in range(MAX_REDIRECTS):
            response = self._send(url, headers)
            location = response.headers.get("Location")
            if response.status not in (301, 302, 303, 307, 308) or not location:
                return response
            response.close()
            before, url = url, location
            with contextlib.suppress(ValueError):  # then it is no address
                url = urllib.parse.quote(urllib.parse.urljoin(before, location), safe="%!#$&'()*+,/:;=?@[]~")
            if not is_address(url) or origin_of(before)[0] == "https" != origin_of(url)[0]:
                raise PullFailed(message=f"{urllib.parse.urlsplit(before).netloc} redirects to {printable(url)}: refused")
        raise PullFailed(message=f"{urllib.parse.urlsplit(url).netloc} redirects in circles")

    def _send(self, url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        """Asks in a thread that a cancel leaves behind: nothing else ends a look-up, which may take minutes."""
        known = {"Authorization": f"Bearer {self._token}"} if self._token and origin_of(url) == origin_of(self.url) else {}
        common = {"User-Agent": f"shimmy/{__version__}", "Accept-Encoding": "identity"}

        def ask() -> None:
            try:
                request = self._request(url, headers={**common, **headers, **known})
                self._answers.put(self._opener.open(request, timeout=PULL_SILENCE))
            except Exception as error:  # raised again where it is waited for
                self._answers.put(error)

        try:
            threading.Thread(target=ask, name="asking", daemon=True).start()
            answer = self._answers.get()
            if isinstance(answer, Exception):
                raise answer
            self._socket = socket.fromfd(answer.fileno(), socket.AF_INET, socket.SOCK_STREAM)  # of any family: to shut it down
        except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
            raise ConnectionLost(connection_words(error)) from None
        self.cancel.check()
        return answer  # type: ignore[no-any-return]

    def read(self, response: http.client.HTTPResponse) -> bytes:
        """Some bytes, none at the end. Raises ConnectionLost, Cancelled."""
        self.cancel.check()
        try:
            return response.read1(PULL_CHUNK)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ConnectionLost(connection_words(error)) from None

    # The hub's own API

    def _read_document(self, response: http.client.HTTPResponse) -> bytes:
        """A whole answer, as far as MAX_LISTING. Raises ConnectionLost, Cancelled."""
        data = bytearray()
        while len(data) < MAX_LISTING and (chunk := self.read(response)):
            data += chunk
        return bytes(data)

    def listing(self, repo: str) -> Generator[Fetching, None, tuple[str, list[RemoteFile]]]:
        """A repository's commit and files. Raises PullFailed, Forbidden, ModelNotFound."""
        try:
            response = yield from self.get(f"{self.url}/api/models/{repo}/revision/main?blobs=true", {})
            with contextlib.closing(response):
                if response.status != 200:
                    raise (yield from self.refusal(response, repo))
                data = self._read_document(response)
        except ConnectionLost as error:
            other = "" if os.environ.get("HF_ENDPOINT") else "; is the network there? HF_ENDPOINT names another hub"
            raise PullFailed(message=f"{self.host} cannot be reached: {error}{other}") from None
        try:
            return self._read_listing(repo, json.loads(data))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise PullFailed(message=f"what {self.host} answers is no list of a repository's files") from None

    def _read_listing(self, repo: str, document: Any) -> tuple[str, list[RemoteFile]]:
        commit, files = document["sha"], []
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise ValueError("no commit")
        for sibling in document["siblings"]:
            name, size = sibling["rfilename"], sibling.get("size")
            digest = (sibling.get("lfs") or {}).get("sha256") or sibling.get("blobId") or ""
            sane = is_safe_name(name) and isinstance(size, int) and 0 <= size < MAX_REMOTE_FILE
            if sane and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest):
                url = f"{self.url}/{repo}/resolve/{commit}/{urllib.parse.quote(name)}"
                files.append(RemoteFile(name, url, size, digest))
        return commit, files

    def refusal(self, response: http.client.HTTPResponse, repo: str) -> Generator[Fetching, None, ApiError]:
        """The error for an answer without a file, with what helps; repo is "" for an address that is none of the hub's."""
        status, said = response.status, response.headers.get("X-Error-Code") or ""
        if not repo or status not in (401, 403, 404) or origin_of(response.url) != origin_of(self.url):
            wait = retry_after(response.headers)
            later = f"; it asks to be left alone for {wait:.0f} s" if wait else ""
            return PullFailed(message=f"{printable(urllib.parse.urlsplit(response.url).netloc)} answers {status}{later}")
        token = f"HF_TOKEN (made at {self.url}/settings/tokens)"
        if said == "GatedRepo" or (status == 403 and said != "RepoNotFound"):
            how = "with the account of your HF_TOKEN" if self._token else f"and set {token}"
            return Forbidden(message=f"{repo} is gated: accept its licence at {self.url}/{repo} {how}")
        like = yield from self._repositories_like(repo)
        near = f"; did you mean {' or '.join(like)}?" if like else ""
        private = "not for your HF_TOKEN" if self._token else f"if it is private, set {token}"
        return ModelNotFound(message=f"there is no {repo} at {self.host}; {private}{near}")

    def _repositories_like(self, repo: str) -> Generator[Fetching, None, list[str]]:
        """Up to three repositories with GGUF files whose name is like this one's."""
        import difflib

        words = urllib.parse.quote(repo.partition("/")[2])
        with contextlib.suppress(ConnectionLost, PullFailed, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            response = yield from self.get(f"{self.url}/api/models?search={words}&filter=gguf&limit=20", {})
            with contextlib.closing(response):
                ids = [found["id"] for found in json.loads(self._read_document(response))]
            return difflib.get_close_matches(repo, [id for id in ids if repository(id)], n=3, cutoff=0.3)
        return []


def connection_words(error: BaseException) -> str:
    """Why a connection failed, in the system's words."""
    reason = getattr(error, "reason", error)
    return printable(str(getattr(reason, "strerror", None) or reason or type(error).__name__))


def is_safe_name(name: Any) -> bool:
    """True for a path that stays below its folder on every system, and that a terminal can show."""
    parts = name.split("/") if isinstance(name, str) and name.isprintable() else [""]
    return all(part.strip(". ") and len(part) < 200 and not set(part) & set('\\:*?"<>|') for part in parts)


# Fetching it


class Download:
    """One file on its way to the disk: resumes what is there, goes on after a cut, and checks what came."""

    def __init__(self, hub: Hub, repo: str, file: RemoteFile, target: Target) -> None:
        import hashlib

        self._hub, self._repo, self._file, self._target = hub, repo, file, target
        git = len(file.digest) == 40
        self._new_hash = lambda: hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False) if git else hashlib.sha256()
        self._have = 0  # bytes in the partial file

    def run(self) -> Iterator[Fetching]:
        """Raises PullFailed, Forbidden, ModelNotFound, Cancelled, OSError; the part stays for the next time."""
        target, size = self._target, self._file.size
        for path in (target.partial, target.lock):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(target.lock, "a") as lock:
            while not lock_file(lock):
                yield self._event("waiting for another pull of ")
                self._hub.pause(0.2)
            if not target.holds(size):
                with open(target.partial, "a+b", buffering=0) as part:
                    yield from self._complete(part)
                if self._file.digest and self._hash.hexdigest() != self._file.digest:
                    os.remove(target.partial)
                    what = "SHA-256" if len(self._file.digest) == 64 else "checksum"
                    wrong = f"its {what} is wrong, so it was removed; pull it again"
                    raise PullFailed(message=f"{printable(self._file.name)}: {wrong}")
                os.replace(target.partial, target.blob)
            target.link()
        self._have = size
        yield self._event("")

    def _event(self, doing: str) -> Fetching:
        return Fetching(doing + printable(self._file.name, 60), self._file.digest, self._have, self._file.size)

    def _complete(self, part: BinaryIO) -> Iterator[Fetching]:
        """Fetches what the part lacks, over as many connections as that takes."""
        yield from self._take_up(part)
        pauses = iter(PULL_RETRY_SECONDS)
        while self._have < self._file.size:
            before = self._have
            try:
                yield from self._receive(part)
            except ConnectionLost as lost:
                pauses = iter(PULL_RETRY_SECONDS) if self._have > before else pauses
                pause = next(pauses, None)
                if pause is None:
                    left = f"; {human_bytes(self._have)} of {human_bytes(self._file.size)} are here, pull again to go on"
                    raise PullFailed(message=f"{printable(self._file.name)}: {lost}{left}") from None
                yield Fetching(f"{lost}: going on in {pause:.0f} s", self._file.digest, self._have, self._file.size)
                self._hub.pause(pause)

    def _restart(self, part: BinaryIO) -> None:
        part.truncate(0)
        self._have, self._hash = 0, self._new_hash()

    def _take_up(self, part: BinaryIO) -> Iterator[Fetching]:
        """Reads what an earlier pull has left."""
        self._have, self._hash = 0, self._new_hash()
        part.seek(0)
        while chunk := part.read(PULL_CHUNK):
            self._hash.update(chunk)
            self._have += len(chunk)
            yield self._event("")
        if self._have > self._file.size:
            self._restart(part)

    def _receive(self, part: BinaryIO) -> Iterator[Fetching]:
        """One connection's bytes, behind those that are here. Raises ConnectionLost when they end too early."""
        headers = {"Range": f"bytes={self._have}-"} if self._have else {}
        if self._have and self._file.etag:
            headers["If-Range"] = self._file.etag
        with contextlib.closing((yield from self._hub.get(self._file.url, headers))) as response:
            if response.status not in (200, 206, 416):
                raise (yield from self._hub.refusal(response, self._repo))
            self._check_answer(response, part)
            while chunk := self._hub.read(response):
                if self._have + len(chunk) > self._file.size:
                    raise PullFailed(message=f"{printable(self._file.name)}: the server sends more than {self._file.size} bytes")
                self._append(part, chunk)
                self._hash.update(chunk)
                self._have += len(chunk)
                yield self._event("")
        if self._have < self._file.size:
            raise ConnectionLost("the connection was cut")

    def _append(self, part: BinaryIO, chunk: bytes) -> None:
        """Writes all of a chunk, where a disk that becomes full takes a part of it first. Raises DiskFull."""
        left = memoryview(chunk)
        try:
            while left:
                left = left[part.write(left) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            room = f"make room for {human_bytes(self._file.size - self._target.begun())} and pull again to go on"
            remove = f"or remove {printable(part.name, 400)}"
            raise DiskFull(message=f"{printable(self._file.name)}: {error.strerror}: {room}, {remove}") from None

    def _check_answer(self, response: http.client.HTTPResponse, part: BinaryIO) -> None:
        """Starts anew if the server sends something else than the rest that was asked for."""
        sent = re.fullmatch(r"bytes (\d{1,15})-\d+/(\d+|\*)", response.headers.get("Content-Range") or "")
        goes_on = response.status == 206 and sent and int(sent[1]) == self._have and sent[2] in ("*", str(self._file.size))
        if self._have and not goes_on:
            self._restart(part)
            if response.status != 200:
                raise ConnectionLost("the server cannot go on where the part ends")
        length = response.headers.get("Content-Length")
        if length is not None and length.strip() != str(self._file.size - self._have):
            told = f"the server sends {printable(length, 20)} bytes, not {self._file.size - self._have}"
            raise PullFailed(message=f"{printable(self._file.name)}: {told}")


@dataclass(frozen=True)
class Plan:
    """The files that a pull will fetch, and where they go."""

    title: str  # as one would ask for it
    files: tuple[tuple[RemoteFile, Target], ...]
    repo: str = ""
    others: tuple[str, ...] = ()  # what else the repository has
    commit: str = ""

    @property
    def path(self) -> str:
        """Where the model lies afterwards."""
        return self.files[0][1].path

    @property
    def size(self) -> int:
        return sum(file.size for file, _ in self.files)

    @property
    def left(self) -> int:
        """Bytes still to fetch."""
        return sum(max(0, file.size - target.begun()) for file, target in self.files if not target.holds(file.size))


class Pull(Hub):
    """One pull: `plan` asks what there is, `run` fetches it. Both yield how far they are."""

    def plan(self, wanted: Wanted, folder: str) -> Generator[Fetching, None, Plan]:
        """Raises ModelNotFound, Forbidden, PullFailed; `folder` takes what comes from an address."""
        return (yield from self._plan_repository(wanted) if wanted.repo else self._plan_address(wanted.url, folder))

    def _plan_repository(self, wanted: Wanted) -> Generator[Fetching, None, Plan]:
        commit, files = yield from self.listing(wanted.repo)
        offers = offers_of(files)
        chosen = choose_offer(offers, wanted.part)
        if chosen is None:
            raise self._nothing_called(wanted, offers, files)
        folder = repository_folder(wanted.repo)
        targets = tuple((file, hub_target(folder, commit, file)) for file in chosen.files)
        others = tuple(offered_names(o for o in offers if o is not chosen))
        return Plan(f"{wanted.repo}:{printable(chosen.label, 60)}", targets, wanted.repo, others, commit)

    @staticmethod
    def _nothing_called(wanted: Wanted, offers: Seq[Offer], files: Seq[RemoteFile]) -> ApiError:
        if not offers:
            other = next((f.name for f in files if f.name.endswith((".safetensors", ".bin"))), None)
            hint = f" (it has {printable(other)}): look for one whose name ends in -GGUF" if other else ""
            return ModelNotFound(message=f"{wanted.repo} holds no GGUF model{hint}")
        there = some_of(offered_names(offers), 12)
        return ModelNotFound(message=f"{wanted.repo} has no {printable(wanted.part, 60)}; there are {there}")

    def _plan_address(self, url: str, folder: str) -> Generator[Fetching, None, Plan]:
        name = urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2]
        if not name.lower().endswith(".gguf") or not is_safe_name(name):
            raise InvalidRequest(f"'{printable(url)}' does not name a .gguf file", "model")
        try:
            with contextlib.closing((yield from self.get(url, {}))) as response:
                if response.status != 200:
                    raise (yield from self.refusal(response, ""))
                length, etag = response.headers.get("Content-Length") or "", response.headers.get("ETag") or ""
                start = response.read(4)
        except (ConnectionLost, OSError, http.client.HTTPException) as error:
            raise PullFailed(message=f"{urllib.parse.urlsplit(url).netloc} cannot be reached: {error}") from None
        if start != b"GGUF" or not re.fullmatch(r"\d{1,15}", length):
            raise PullFailed(message=f"what {printable(url)} gives is no GGUF file, or of unknown size")
        file = RemoteFile(name, url, int(length), etag="" if etag.startswith("W/") else etag)
        target = plain_target(os.path.abspath(folder), file)
        if os.path.lexists(target.path) and not target.holds(file.size):
            raise PullFailed(message=f"{printable(target.path, 400)} is there already, and is another file: move it away first")
        return Plan(name, ((file, target),))

    def run(self, plan: Plan) -> Generator[Fetching, None, None]:
        """Fetches all that is not here yet. Raises as Download.run does, but PullFailed for what cannot be written."""
        free = free_disk(plan.files[0][1].blob)
        if free is not None and plan.left > free:
            need = f"{human_bytes(plan.left)} are to be fetched, {human_bytes(free)} are free"
            raise DiskFull(message=f"the disk is too small: {need}")
        try:
            for file, target in plan.files:
                yield from Download(self, plan.repo, file, target).run()
            if plan.commit:
                write_reference(repository_folder(plan.repo), plan.commit)
        except OSError as error:
            where = f"{printable(str(error.filename), 400)}: " if error.filename else ""
            raise PullFailed(message=f"the model cannot be written: {where}{error.strerror or error}") from None


def free_disk(path: str) -> int | None:
    """Bytes free where the path is, or will be; None where nobody tells."""
    import shutil

    for parent in pathlib.Path(path).parents:
        with contextlib.suppress(OSError):
            return shutil.disk_usage(parent).free
    return None


def write_reference(folder: str, commit: str) -> None:
    """Says which commit of the repository is its main branch's; after its files, or the cache's other readers stumble."""
    main = os.path.join(folder, "refs", "main")
    os.makedirs(os.path.dirname(main), exist_ok=True)
    new = f"{main}.{os.getpid()}.{threading.get_ident()}.tmp"
    pathlib.Path(new).write_text(commit)
    os.replace(new, main)


# ── G. Page ───────────────────────────────────────────────────────────────────────────────────────────────────────────
# The chat page at /: one document without a build, a network or a framework. Its script speaks the same API as every client
# and keeps conversations in the browser. Nothing in it may run but what stands here, for the policy names its hashes.
# Offers: PAGE, page_headers, open_page.
# Uses: nothing.

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1, interactive-widget=resizes-content">
<title>shimmy</title>
<link rel="icon" href="data:,">
<style>
:root {
  color-scheme: light dark; background: var(--bg); color: var(--text); accent-color: light-dark(#0b6b5f, #5ccbb9);
  --bg: light-dark(#fdfdfb, #17181a); --side: light-dark(#f5f4f0, #1d1f21); --raised: light-dark(#ffffff, #232527);
  --line: light-dark(#e3e1db, #35383b); --edge: light-dark(#85888c, #757a80); --code: light-dark(#f4f3ef, #1f2123);
  --text: light-dark(#1d1e20, #e8e8e5); --mute: light-dark(#5a5d62, #a5aaaf); --tint: light-dark(#e6f1ee, #1e3632);
  --accent: light-dark(#0b6b5f, #5ccbb9); --on-accent: light-dark(#ffffff, #06231f);
  --bad: light-dark(#9f241b, #ffa195); --bad-tint: light-dark(#fdeeec, #38211f);
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Helvetica Neue", Arial, sans-serif;
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0; height: 100dvh; display: grid; grid-template-columns: 17rem minmax(0, 1fr); overflow: hidden; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.unseen:not(:focus) { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
#skip:focus { position: fixed; z-index: 9; top: .5rem; left: .5rem; padding: .5rem 1rem; background: var(--raised); }
.row { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; }
button, input, select, textarea { font: inherit; color: var(--text); border-radius: .6rem; background: var(--raised); }
button { cursor: pointer; border: 1px solid var(--line); padding: .4rem .8rem; }
button.main { background: var(--accent); border-color: transparent; color: var(--on-accent); }
button.plain { border: 0; background: none; color: var(--mute); padding: .25rem .5rem; font-size: .85rem; }
button:not(.main):hover { background: var(--tint); color: var(--text); }
input:not([type=checkbox]), textarea, select { border: 1px solid var(--edge); padding: .4rem .6rem; width: 100%; min-width: 0; }
textarea { field-sizing: content; resize: none; max-height: 40dvh; line-height: 1.5; }
@supports not (field-sizing: content) { textarea { min-height: 5rem; } }
#side { position: static; width: auto; height: auto; margin: 0; border: 0; border-right: 1px solid var(--line); color: inherit;
  background: var(--side); display: flex; flex-direction: column; gap: .75rem; padding: .75rem; min-height: 0; }
.brand { font-size: 1.15rem; font-weight: 700; color: var(--accent); margin: 0 .25rem; }
#chats { list-style: none; margin: 0; padding: 2px; overflow-y: auto; flex: 1; }
#chats li { display: flex; align-items: center; border-radius: .6rem; margin-bottom: 2px; }
#chats .now { background: var(--tint); }
#chats .open { flex: 1; text-align: left; overflow: hidden; text-overflow: ellipsis; text-wrap: nowrap; color: var(--text); }
main { display: grid; grid-template: auto minmax(0, 1fr) auto / minmax(0, 1fr); min-height: 0; }
header { display: flex; align-items: center; gap: .6rem; padding: .6rem .75rem; border-bottom: 1px solid var(--line); }
#menu { display: none; }
#model { width: auto; max-width: 32rem; text-overflow: ellipsis; }
#state { color: var(--mute); font-size: .85rem; white-space: nowrap; }
#tune { margin-left: auto; }
#log { overflow-y: auto; padding: 1.5rem 1rem; overscroll-behavior: contain; }
#log > * { max-width: 46rem; margin: 0 auto 1.5rem; }
#log > .user { display: flex; flex-direction: column; align-items: flex-end; margin-bottom: .5rem; }
.words { background: var(--tint); border-radius: 1.1rem 1.1rem .3rem 1.1rem; padding: .55rem 1rem; max-width: 88%; }
.words, .thought div, .tool pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.foot { gap: .1rem; margin: .25rem 0 0 -.5rem; }
.figures { color: var(--mute); font-size: .85rem; margin-left: .5rem; font-variant-numeric: tabular-nums; }
.answer:not(:last-child) .again { display: none; }
.wait { color: var(--mute); font-size: .9rem; }
.card { border: 1px solid var(--line); border-radius: .9rem; padding: .75rem 1rem; margin: .5rem 0; background: var(--raised); }
.card.bad { background: var(--bad-tint); border-color: transparent; color: var(--bad); }
details { overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: .7rem; padding: .4rem .75rem; margin: .5rem 0; }
.tool pre { margin: .2rem 0; font: .85rem/1.5 var(--mono); max-height: 16rem; overflow-y: auto; }
.md { overflow-wrap: anywhere; }
p { margin: 0; }
.md p { white-space: pre-line; margin: .75em 0; }
.md li > p { margin: .15em 0; }
.md :is(h1, h2, h3, h4, h5, h6) { line-height: 1.3; margin: 1.3em 0 .5em; font-size: 1.1em; }
.md :is(h1, h2) { font-size: 1.3em; }
.md :is(ul, ol) { padding-left: 1.6em; margin: .5em 0; }
.md blockquote { border-left: 3px solid var(--line); margin: .75em 0; padding-left: 1em; color: var(--mute); }
.md a { color: var(--accent); }
:not(pre) > code { font: .875em var(--mono); background: var(--code); border-radius: .3em; padding: .1em .3em; }
.code { border: 1px solid var(--line); border-radius: .7rem; margin: .75em 0; background: var(--code); overflow: hidden; }
.code .row { justify-content: space-between; padding: 0 .25rem 0 .9rem; font-size: .8rem; border-bottom: 1px solid var(--line); }
.code pre { margin: 0; padding: .75rem .9rem; overflow-x: auto; overflow-wrap: normal; font-size: .9rem; }
.wide { overflow-x: auto; margin: .75em 0; }
table { border-collapse: collapse; font-size: .95em; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .8rem .35rem 0; text-align: left; overflow-wrap: normal;
  white-space: pre-line; }
.empty { text-align: center; padding-top: 12vh; color: var(--mute); text-wrap: balance; }
#foot { padding: 0 1rem max(.75rem, env(safe-area-inset-bottom)); }
#foot > * { max-width: 46rem; margin: 0 auto .5rem; }
#notice { display: flex; gap: .75rem; align-items: center; justify-content: space-between; }
#ask { display: flex; align-items: flex-end; border: 1px solid var(--edge); border-radius: 1.4rem; background: var(--raised); }
#ask:focus-within { border-color: var(--accent); outline: 1px solid var(--accent); }
#box { border: 0; background: none; padding: .65rem 1rem; outline: none; }
#send { border-radius: 50%; margin: .3rem; padding: 0; width: 2.25rem; height: 2.25rem; flex: none; }
dialog { width: min(36rem, 100vw - 1.5rem); border: 1px solid var(--line); border-radius: 1rem; background: var(--bg); }
::backdrop { background: #0007; }
h2, legend { margin: 0; padding: 0; font-size: 1.1rem; font-weight: 600; }
fieldset { border: 0; margin: 1.25rem 0; padding: 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)); gap: .75rem; }
small { display: block; color: var(--mute); line-height: 1.4; margin-bottom: .25rem; }
.check { display: flex; gap: .6rem; align-items: flex-start; padding: .25rem 0; }
@media (max-width: 52rem) {
  body { grid-template-columns: minmax(0, 1fr); }
  #menu { display: inline-block; }
  #side { position: fixed; inset: 0 auto 0 0; width: min(19rem, 85vw); height: 100dvh; }
  #side:not(:popover-open) { display: none; }
  #model { flex: 1 1 0; }
}
@media (pointer: coarse) { #chats button, .foot button { min-width: 2.75rem; min-height: 2.75rem; } }
@media (max-width: 32rem) { #state, .empty p + p { display: none; } }
</style>
</head>
<body>
<a id="skip" class="unseen" href="#box">Skip to the message box</a>
<nav id="side" popover aria-label="Conversations">
  <div class="brand">shimmy</div>
  <button id="new" type="button" title="Alt+N">+ New chat</button>
  <ul id="chats"></ul>
  <div class="row"><button id="export" type="button">Export</button><button id="import" type="button">Import</button></div>
  <input id="imported" type="file" accept=".json,application/json" hidden aria-label="File to import">
</nav>
<main>
  <h1 class="unseen">Chat with shimmy</h1>
  <header>
    <button id="menu" type="button" popovertarget="side" aria-label="Conversations">☰</button>
    <label for="model" class="unseen">Model</label><select id="model"></select>
    <span id="state"></span>
    <button id="tune" type="button">Settings</button>
  </header>
  <div id="log" tabindex="0" role="log" aria-live="off" aria-label="Conversation"></div>
  <div id="foot">
    <div id="notice" class="card" role="alert" hidden></div>
    <form id="ask">
      <label for="box" class="unseen">Your message</label>
      <textarea id="box" rows="1" placeholder="Write a message" autocomplete="off" enterkeyhint="send"></textarea>
      <button id="send" class="main" type="submit"></button>
    </form>
  </div>
</main>
<dialog id="settings" closedby="any" aria-labelledby="settings-title"><form method="dialog">
  <h2 id="settings-title">Settings of this chat</h2>
  <label for="system">System prompt <small>What the model is told before everything else.</small></label>
  <textarea id="system"></textarea>
  <fieldset id="sampling"><legend>Sampling</legend><div class="grid">
    <label>Temperature <input type="number" name="temperature" min="0" max="5" step="any" placeholder="default"></label>
    <label>Top P <input type="number" name="top_p" min="0" max="1" step="any" placeholder="default"></label>
    <label>Top K <input type="number" name="top_k" min="0" step="1" placeholder="default"></label>
    <label>Min P <input type="number" name="min_p" min="0" max="1" step="any" placeholder="default"></label>
    <label>Max tokens <input type="number" name="max_tokens" min="1" step="1" placeholder="default"></label>
    <label>Seed <input type="number" name="seed" min="0" max="4294967295" step="1" placeholder="default"></label>
  </div></fieldset>
  <fieldset><legend>Tools that the server may run</legend><div id="tools"></div></fieldset>
  <button id="done" class="main">Done</button>
</form></dialog>
<div id="status" class="unseen" role="status" aria-live="polite"></div>
<script>
"use strict";
// ── Elements. Text becomes text nodes only: nothing that a model, a file or a server says is ever read as HTML.
const $ = id => document.getElementById(id);
const log = $("log"), box = $("box");
const sleep = ms => new Promise(done => setTimeout(done, ms));
const parsed = text => { try { return JSON.parse(text); } catch { return null; } };

function make(tag, props, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props || {})) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
  children.flat().forEach(child => node.append(child));  // as arguments, tens of thousands would overflow the stack
  return node;
}

const button = (text, click, props) => make("button", {type: "button", click, ...props}, text);

function copyButton(text, label) {
  const node = button("Copy", () => {
    const area = make("textarea", {class: "unseen"}, text);
    document.body.append(area);
    area.select();
    document.execCommand("copy");  // navigator.clipboard is missing where the page came over plain HTTP
    area.remove();
    node.focus();
    node.textContent = "Copied";
    say("Copied");
    setTimeout(() => node.textContent = "Copy", 1200);
  }, {class: "plain", "aria-label": label});
  return node;
}

const say = words => $("status").textContent = words;  // to those who listen to the page

function notice(...children) {
  const close = button("×", () => $("notice").hidden = true, {class: "plain", "aria-label": "Dismiss"});
  $("notice").replaceChildren(make("div", {class: "row"}, ...children), close);
  $("notice").hidden = false;
}

// ── Markdown. The time it takes is linear in the text, whatever that is: nesting is bounded, and the length of a span.
const DEEPEST = 6;  // quotes, lists and emphasis inside one another; what lies deeper is shown as it was written
const FENCE = /^ {0,3}(`{3,}|~{3,}(?!~))([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6}) +(.*)$/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])( {1,4}|$)/;
const isBlank = line => !line.trim();
const begins = line => [FENCE, HEADING, RULE, QUOTE, ITEM].some(start => start.test(line));
const indent = line => line.length - line.trimStart().length;

// Draws a growing text: what stays the same is left alone, and only the last block is read again.
function drawMarkdown(parent, text) {
  let {line, kept} = parent.drawn && text.startsWith(parent.drawn.text) ? parent.drawn : {line: 0, kept: 0};
  const lines = text.split(/\r?\n/), nodes = [], first = kept;
  for (let i = line; i < lines.length;) {
    const [end, ...found] = blockAt(lines, i, 0);
    if (found.length) [line, kept] = [i, first + nodes.length];
    nodes.push(...found);
    i = end;
  }
  parent.drawn = {text, line, kept};
  const same = nodes.findIndex((node, n) => !parent.children[first + n]?.isEqualNode(node));
  const stays = first + (same === -1 ? nodes.length : same);
  while (parent.children.length > stays) parent.lastChild.remove();
  nodes.slice(stays - first).forEach(node => parent.append(node));
}

function blocks(lines, depth) {
  const nodes = [];
  for (let i = 0; i < lines.length;) {
    const [end, ...found] = blockAt(lines, i, depth);
    nodes.push(...found);
    i = end;
  }
  return nodes;
}

// The block that begins at line i, and the line behind it.
function blockAt(lines, i, depth) {
  const line = lines[i], fence = FENCE.exec(line), heading = HEADING.exec(line);
  const past = (from, test) => { while (from < lines.length && test(lines[from], from)) from++; return from; };
  if (fence) {
    const end = past(i + 1, l => !l.trim().startsWith(fence[1]) || l.trim().replaceAll(fence[1][0], ""));
    const code = lines.slice(i + 1, end).map(l => l.slice(Math.min(indent(line), indent(l)))).join("\n");
    return [end + 1, codeBlock(code, fence[2].trim().split(" ")[0])];
  }
  if (isBlank(line)) return [i + 1];
  if (heading) return [i + 1, make("h" + heading[1].length, null, inline(heading[2].replace(/ #+ *$/, "")))];
  if (RULE.test(line)) return [i + 1, make("hr")];
  if (QUOTE.test(line) && depth < DEEPEST) {
    const end = past(i, l => QUOTE.test(l)), inner = lines.slice(i, end).map(l => l.replace(QUOTE, ""));
    return [end, make("blockquote", null, blocks(inner, depth + 1))];
  }
  if (ITEM.test(line) && depth < DEEPEST) return list(lines, i, depth);
  if (isTableRule(lines[i + 1] || "", cells(line).length)) {
    const end = past(i, l => l.includes("|"));
    return [end, table(lines.slice(i, end).map(cells))];
  }
  const end = past(i + 1, l => !isBlank(l) && !begins(l));
  return [end, make("p", null, inline(lines.slice(i, end).map(l => l.trim()).join("\n")))];
}

function list(lines, i, depth) {
  const [, lead, marker] = ITEM.exec(lines[i]), number = parseInt(marker), items = [];
  const starts = line => {
    const m = RULE.test(line) ? null : ITEM.exec(line);
    return m && m[1].length <= lead.length + 1 && isNaN(parseInt(m[2])) === isNaN(number) ? m[0].length : 0;
  };
  for (let width = 0; i < lines.length; i++) {
    const line = lines[i].replace(/^\t+/, tabs => "    ".repeat(tabs.length)), next = lines[i + 1] || "";
    const goesOn = () => isBlank(line) ? starts(next) || indent(next) > lead.length
      : indent(line) > lead.length || !isBlank(lines[i - 1]) && !begins(line);
    if (starts(line)) {
      width = starts(line);
      items.push([line.slice(width)]);
    } else if (goesOn()) items.at(-1).push(line.slice(Math.min(width, indent(line))));
    else break;
  }
  const [tag, props] = isNaN(number) ? ["ul"] : ["ol", {start: number !== 1 && String(number)}];
  return [i, make(tag, props, items.map(item => make("li", null, blocks(ticked(item), depth + 1))))];
}

// A task's box, which is shown and cannot be ticked here.
const ticked = ([first, ...rest]) => [first.replace(/^\[( |x|X)\] /, (_, mark) => mark === " " ? "☐ " : "☑ "), ...rest];

const cells = line => line.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/).map(cell => cell.trim());
const isTableRule = (line, width) =>
  line.includes("|") && cells(line).length === width && cells(line).every(cell => /^:?-+:?$/.test(cell));

function table([head, rule, ...rows]) {
  const row = (tag, texts) => make("tr", null, ...head.map((_, n) =>
    make(tag, null, inline((texts[n] || "").replaceAll("\\|", "|").replace(/<br *\/?>/gi, "\n")))));
  const body = make("tbody", null, ...rows.map(texts => row("td", texts)));
  return make("div", {class: "wide", tabindex: 0, role: "region", "aria-label": "Table"},
    make("table", null, make("thead", null, row("th", head)), body));
}

function codeBlock(code, language) {
  const head = make("div", {class: "row"}, make("span", null, language || "text"), copyButton(code, "Copy the code"));
  return make("div", {class: "code"}, head, make("pre", {tabindex: 0, "aria-label": "Code"}, make("code", null, code)));
}

const SPANS = new RegExp([
  /(?<math>\\\(.{1,500}?\\\)|\\\[.{1,500}?\\\])/,
  /\\(?<escaped>[!-/:-@[-`{-~])/,
  /(?<!`)(?<ticks>`+)(?!`) ?(?<code>.{1,500}?) ?(?<!`)\k<ticks>(?!`)/,
  /!?\[(?<label>[^[\]]{0,500})\]\( ?<?(?<target>[^\s()<>]+(?:\([^\s()<>]*\)[^\s()<>]*)*)>?(?: "[^"]{0,500}")? ?\)/,
  /(?<address>https?:\/\/[^\s<>"'`|\])]*[^\s<>"'`|\]).,;:!?*_~])/,
  /(?<mark>\*{2,3}|~~)(?![\s*~])(?<strong>.{1,500}?)(?<!\s)\k<mark>(?![*~])/,
  /\*(?![\s*])(?<em>.{1,500}?)(?<![\s*])\*(?!\*)/,
  /(?<![\p{L}\p{N}_])(?<under>_{1,2})(?![\s_])(?<underlined>.{1,500}?)(?<![\s_])\k<under>(?![\p{L}\p{N}_])/,
].map(each => each.source).join("|"), "gsu");
const TAGS = {"*": ["em"], "_": ["em"], "**": ["strong"], "__": ["strong"], "***": ["strong", "em"], "~~": ["del"]};

function inline(text, depth = 0) {
  const nodes = [];
  let from = 0;
  for (const match of text.matchAll(SPANS)) {
    nodes.push(text.slice(from, match.index), span(match[0], match.groups, depth));
    from = match.index + match[0].length;
  }
  return [...nodes, text.slice(from)];
}

function span(whole, {math, escaped, code, label, target, address, mark, strong, em, under, underlined}, depth) {
  const inner = words => depth < DEEPEST ? inline(words, depth + 1) : [words];
  if (math) return whole;  // as it was written
  if (escaped) return escaped;
  if (code) return make("code", null, code);
  if (address) return link(address, [address]) || whole;
  if (target) return link(target, label && !label.includes("://") ? inner(label) : [label || target]) || whole;
  const words = strong || em || underlined;
  return TAGS[mark || under || "*"].reduceRight((children, tag) => [make(tag, null, children)], inner(words))[0];
}

function link(target, label) {
  const url = URL.canParse(target) ? new URL(target) : null;
  if (!url || !["http:", "https:", "mailto:"].includes(url.protocol)) return null;
  return make("a", {href: url.href, title: url.href, target: "_blank", rel: "noopener noreferrer"}, label);
}

// ── Conversations, kept in the browser. What its storage or a file holds is taken as far as it has the shape of these.
const FIELDS = [...$("sampling").querySelectorAll("input")];
const PART = {kind: "text", text: "", id: "", name: "", arguments: "", result: "", failed: false};
const TURN = {question: "", model: "", parts: [PART], end: "cut", error: {code: "", message: ""},
  figures: {completion_tokens: 0, prompt_tokens: 0, cached: 0, rate: 0, first: 0}};
const CHAT = {title: "", changed: 0, model: "", system: "", tools: [""], turns: [TURN],
  settings: Object.fromEntries(FIELDS.map(field => [field.name, ""]))};

function fit(value, shape) {
  if (Array.isArray(shape)) return Array.isArray(value) ? value.map(each => fit(each, shape[0])) : [];
  if (typeof shape !== "object") return typeof value === typeof shape ? value : shape;
  return Object.fromEntries(Object.keys(shape).map(name => [name, fit(value?.[name], shape[name])]));
}

const newChat = (given, id = crypto.getRandomValues(new Uint32Array(2)).join("-")) => ({...fit(given, CHAT), id});
const runs = new Map();  // the answers being written, by their chat
const stop = chat => runs.get(chat)?.abort.abort();
let chats = [], current = newChat();

const area = name => name === "key" ? sessionStorage : localStorage;
const recall = name => { try { return area(name).getItem("shimmy." + name) || ""; } catch { return ""; } };

function store(name, value) {
  try {
    if (value === null) area(name).removeItem("shimmy." + name);
    else area(name).setItem("shimmy." + name, value);
  } catch {
    notice("The browser does not keep this: its storage is full or denied. Export your chats, then delete old ones.");
  }
}

// Saves a chat that was not deleted meanwhile.
const save = chat => chats.includes(chat) && store("chat." + chat.id, JSON.stringify(chat));

function keep(...added) {
  chats = [...added, ...chats.filter(chat => !added.includes(chat))];
  added.forEach(save);
}

function readChats() {
  try {
    const names = Object.keys(localStorage).filter(name => name.startsWith("shimmy.chat."));
    chats = names.map(name => newChat(parsed(localStorage.getItem(name)), name.slice(12)));
  } catch { /* the storage is denied: chats live as long as the page */ }
  chats.sort((a, b) => b.changed - a.changed);
  current = chats.find(chat => chat.id === recall("last")) || current;
}

function exportChats() {
  const file = new Blob([JSON.stringify({format: "shimmy-chats", version: 1, chats}, null, 1)], {type: "application/json"});
  make("a", {href: URL.createObjectURL(file), download: "shimmy-chats.json"}).click();
}

async function importChats(file) {
  const found = parsed(await file.text()), given = found?.format === "shimmy-chats" && found.chats;
  const read = fit(given, [CHAT]).filter(chat => chat.turns.length).map(chat => newChat(chat));
  keep(...read);
  drawSide();
  notice(read.length ? `${read.length} ${read.length === 1 ? "chat was" : "chats were"} imported.`
    : `${file.name} was not imported: it is no file that Export has written here.`);
}

// ── The server
function failure(error, otherwise) {
  const words = error?.code === "context_length_exceeded" ? error.details : error?.message;
  return Object.assign(new Error(words || otherwise), {code: String(error?.code)});
}

async function call(path, body, signal) {
  const headers = {"Content-Type": "application/json"}, key = new TextEncoder().encode(recall("key"));
  if (key.length) headers.Authorization = "Bearer " + String.fromCharCode(...key);
  const response = await fetch(path, {method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body)});
  if (response.ok) return response;
  throw failure(parsed(await response.text())?.error, `The server answered ${response.status}`);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", chunk; !(chunk = await reader.read()).done;) {
    const lines = (rest + chunk.value).split("\n");
    rest = lines.pop();
    for (const data of lines.filter(line => line.startsWith("data: ")).map(line => line.slice(6))) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw failure(event.error);
      yield event;
    }
  }
  throw failure({code: "cut"});
}

let models = [], usual = "", tools = [], reached;  // usual: what the server calls its default
const get = async path => (await call(path)).json();
const modelOf = id => models.find(model => model.id === id);
// The model that answers in a chat: its own, while the server has it.
const chosen = chat => (modelOf(chat.model) || modelOf(usual) || models[0] || {id: "default"}).id;

async function refresh() {
  try {
    const listed = (await get("/api/models")).models;
    tools = (await get("/api/tools")).tools;
    models = listed.filter(model => model.id !== "default" && !model.embedding);
    usual = await get("/api/models/default/status").then(status => status.model, () => "");
    if (reached === false) $("notice").hidden = true;
    reached = true;
  } catch (error) {
    reached = false;
    notice(...advice(error, refresh));
  }
  drawModels();
  if (!current.turns.length) drawLog();
}

const ADVICE = {
  gone: "The server does not answer. Is it still running? Start it with “python shimmy.py serve”, then try again.",
  cut: "The answer broke off. What was written so far is kept.",
  unauthorized: "This server asks for its key (serve --api-key, or SHIMMY_API_KEY).",
  context_length_exceeded: "Shorten the question, begin a new chat, or start the server with a larger context: serve --ctx N.",
  overloaded: "Wait a moment, then try again.",
  model_not_found: "It may have been moved or renamed: choose another model above.",
};

// What an error means in plain words, and what mends it. One without a code is the browser's: the server is gone.
function advice({code = "gone", message}, again, edit) {
  const said = code === "gone" || code === "cut" ? "" : message.replace(/[.\s]*$/, ". ");
  const words = make("p", null, said, ADVICE[code] || "");
  if (code === "context_length_exceeded") return [words, button("Edit the question", edit), button("New chat", startChat)];
  if (code !== "unauthorized") return [words, button("Try again", again)];
  const key = make("input", {type: "password", autocomplete: "off", "aria-label": "Key", placeholder: "Key"});
  const submit = event => {
    event.preventDefault();
    store("key", key.value.trim());
    again();
  };
  return [words, make("form", {submit, class: "row"}, key, make("button", null, "Use this key"))];
}

// ── Asking and answering
// What is sent of a chat: questions without an answer are not, but for the last.
function messagesOf(chat) {
  const sent = chat.system.trim() ? [{role: "system", content: chat.system}] : [];
  for (const turn of chat.turns) {
    const answer = answerMessages(turn, chat.tools.length > 0);
    if (answer.length || turn === chat.turns.at(-1)) sent.push({role: "user", content: turn.question}, ...answer);
  }
  return sent;
}

function answerMessages(turn, withTools) {
  const sent = [];
  for (const {kind, text, id, name, result, ...part} of turn.parts) {
    if (kind === "text") sent.push({role: "assistant", content: text});
    if (kind !== "tool" || !withTools) continue;
    const said = sent.at(-1)?.role === "assistant" ? sent.pop().content : "";
    const called = {id, type: "function", function: {name, arguments: part.arguments}};
    sent.push({role: "assistant", content: said, tool_calls: [called]}, {role: "tool", tool_call_id: id, content: result});
  }
  return sent;
}

function requestOf(chat) {
  const set = Object.entries(chat.settings).filter(([, value]) => value !== "").map(([name, value]) => [name, Number(value)]);
  const offered = chat.tools.filter(name => tools.some(tool => tool.name === name)).map(name => ({type: "builtin", name}));
  return {model: chosen(chat), messages: messagesOf(chat), stream: true, stream_options: {include_usage: true},
    ...Object.fromEntries(set), ...(offered.length ? {tools: offered} : {})};
}

// Asks in place of the turn at n and of all that followed it.
async function ask(chat, question, n = chat.turns.length) {
  if (runs.has(chat)) return;
  const turn = fit({question, model: chosen(chat)}, TURN);
  const run = {abort: new AbortController(), began: performance.now(), first: 0, waits: "Asking", progress: null};
  chat.turns.splice(n, Infinity, turn);
  chat.title ||= question.trim().split("\n")[0].slice(0, 80);
  chat.changed = Date.now();
  runs.set(chat, run);
  keep(chat);
  openChat(chat);
  watch(chat, turn.model, run);
  try {
    const response = await call("/v1/chat/completions", requestOf(chat), run.abort.signal);
    for await (const event of events(response)) take(turn, run, event);
  } catch (error) {
    if (!error.code) await sleep(300);  // leaving the page aborts fetches: wait, so that this is not shown as an error
    turn.end = run.abort.signal.aborted ? "stopped" : "error";
    turn.error = {code: error.code || (run.first ? "cut" : "gone"), message: error.message};
  }
  runs.delete(chat);
  save(chat);
  drawSide();
  drawSoon();
  say(turn.end === "error" ? turn.error.message : turn.end === "stopped" ? "Stopped" : `The answer is complete: ${textOf(turn)}`);
}

// Says what an answer waits for, until its first words come.
async function watch(chat, model, run) {
  for (; runs.get(chat) === run && !run.first; await sleep(250)) {
    const status = await get(`/api/models/${encodeURIComponent(model)}/status`).catch(() => null);
    if (!status || run.first) continue;
    const before = run.waits;
    run.progress = status.status === "loading" ? status.progress : null;
    run.waits = run.progress !== null ? `Loading ${model}, ${Math.round(100 * run.progress)} %`
      : status.requests_waiting ? "Waiting for its turn" : status.loaded ? "Reading the question" : "Waiting for the model";
    if (run.waits !== before) say(run.waits);
    drawSoon();
  }
  if (run.first) refresh();  // the model is loaded by now
}

const textOf = turn => turn.parts.filter(part => part.kind === "text").map(part => part.text).join("\n\n");

function take(turn, run, event) {
  const [choice] = event.choices, delta = choice?.delta || {};
  if (delta.reasoning_content) grow(turn, "thought", delta.reasoning_content);
  if (delta.content) grow(turn, "text", delta.content);
  for (const {error, result, ...called} of delta.tool_results || []) {
    const words = error == null ? JSON.stringify(result, null, 1) : error;
    turn.parts.push(fit({...called, kind: "tool", result: words, failed: error != null}, PART));
  }
  if (turn.parts.length) {
    run.first ||= performance.now();
    run.waits = turn.parts.at(-1).kind === "thought" ? "Thinking" : "Writing";
  }
  turn.model = event.model;
  turn.end = choice?.finish_reason || turn.end;
  if (event.usage) {
    const rate = event.usage.timings?.predicted_per_second, cached = event.usage.prompt_tokens_details?.cached_tokens;
    turn.figures = fit({...event.usage, rate, cached, first: (run.first - run.began) / 1000}, TURN.figures);
  }
  drawSoon();
}

function grow(turn, kind, text) {
  if (turn.parts.at(-1)?.kind !== kind) turn.parts.push(fit({kind}, PART));
  turn.parts.at(-1).text += text;
}

// ── The conversation on the screen
let newest = null;  // draws the last answer as it grows
let due = 0;  // the frame in which it will
let stick = true;  // the end of the conversation stays in view
const scroll = () => { if (stick) log.scrollTop = log.scrollHeight; };
let edited = null;  // the number of the turn whose question is in the box

function drawLog() {
  newest = edited = null;
  const views = current.turns.flatMap((_, n) => [questionView(current, n), answerView(current, n)]);
  log.replaceChildren(...(views.length ? views : [emptyView()]));
  document.title = current.title ? `${current.title} · shimmy` : "shimmy";
  scroll();
}

function drawSoon() {
  due ||= requestAnimationFrame(() => {
    due = 0;
    newest?.();
    scroll();
  });
}

function emptyView() {
  const pull = make("code", null, "python shimmy.py pull OWNER/REPO");
  const how = ["Get a real one with ", pull, ", or put a .gguf file into ./models."];
  const lead = !reached ? ["Asking the server for its models …"]
    : !models.length ? ["No model was found on this machine. ", ...how]
    : models.every(model => model.size_bytes < 5e7) ? ["Only the tiny demonstration model is here. ", ...how]
    : ["Everything runs on your own machine."];
  return make("section", {class: "empty"}, make("h2", null, "What is on your mind?"), make("p", null, ...lead),
    make("p", null, "Enter sends · Shift+Enter new line · Esc stops · / to the box · ↑ edits · Alt+N new chat"));
}

const heading = words => make("h2", {class: "unseen"}, words);  // readers of screens go from one to the next

function questionView(chat, n) {
  const text = chat.turns[n].question;
  const again = button("Edit", () => edit(n), {class: "plain", "aria-label": "Edit and ask again"});
  const foot = make("div", {class: "row foot"}, copyButton(text, "Copy the question"), again);
  return make("article", {class: "user", "aria-label": "You"}, heading("You"), make("div", {class: "words"}, text), foot);
}

function edit(n) {  // the question of turn n, in the box; null: no longer
  edited = n;
  box.value = n === null ? "" : current.turns[n].question;
  if (n === null) $("notice").hidden = true;
  else notice("Your question and all that follows it will be replaced.", button("Cancel", () => edit(null)));
  box.focus();
}

function answerView(chat, n) {
  const turn = chat.turns[n], parts = make("div"), foot = make("div");
  let shown = "";
  newest = () => {
    const run = turn === chat.turns.at(-1) && runs.get(chat), words = run ? run.waits : turn.end;
    turn.parts.forEach((part, k) => {
      const node = parts.children[k] || parts.appendChild(partView(part));
      if (part.kind === "thought") node.lastChild.textContent = part.text.trim();
      else if (part.kind !== "tool") drawMarkdown(node, part.text);
    });
    if (words !== shown) foot.replaceChildren(...(run ? waitingFoot(run) : doneFoot(chat, n)));
    shown = words;
  };
  newest();
  return make("article", {class: "answer", "aria-label": `Answer of ${turn.model}`}, heading("Answer"), parts, foot);
}

const folded = (name, summary, ...children) => make("details", {class: name}, make("summary", null, ...summary), ...children);
const titled = (title, text) => [make("small", null, title), make("pre", null, text)];
const waitingFoot = ({waits, progress}) =>
  [make("div", {class: "row wait"}, make("progress", {max: 1, value: progress, "aria-label": waits}), waits)];
const brief = text => text.length > 60 ? text.slice(0, 60) + "…" : text;

function partView(part) {
  if (part.kind === "thought") return folded("thought", ["Thoughts"], make("div"));
  if (part.kind !== "tool") return make("div", {class: "md"});
  const given = parsed(part.arguments), name = make("b", null, part.name);
  return folded("tool", [name, `${part.failed ? " failed" : ""} → ${brief(part.result)}`],
    ...titled("Arguments", given ? JSON.stringify(given, null, 1) : part.arguments),
    ...titled(part.failed ? "Error" : "Result", part.result));
}

function doneFoot(chat, n) {
  const turn = chat.turns[n], again = () => ask(chat, turn.question, n);
  const text = textOf(turn);
  const foot = make("div", {class: "row foot"}, text ? copyButton(text, "Copy the answer") : "",
    button("Again", again, {class: "plain again", "aria-label": "Answer again"}),
    make("span", {class: "figures"}, figureWords(turn)));
  if (turn.end !== "error") return [foot];
  const [words, ...mends] = advice(turn.error, again, () => edit(n));
  return [make("div", {class: "card bad", role: "alert"}, words, make("div", {class: "row"}, ...mends)), foot];
}

function figureWords({model, end, figures: {completion_tokens, prompt_tokens, cached, rate, first}}) {
  const ends = {length: "no more tokens allowed", stopped: "stopped", cut: "cut off by a reload"};
  const measured = completion_tokens ? [`${completion_tokens} tokens`, `${rate.toFixed(rate < 100 ? 1 : 0)} tokens/s`,
    `first token after ${first.toFixed(2)} s`, `prompt ${prompt_tokens}` + (cached ? ` (${cached} cached)` : "")] : [];
  return [model, ...measured, ends[end]].filter(Boolean).join(" · ");
}

// ── Around the conversation
function drawSide() {
  Object.assign($("send"), runs.has(current) ? {textContent: "■", ariaLabel: "Stop"} : {textContent: "↑", ariaLabel: "Send"});
  $("chats").replaceChildren(...chats.map(chat => {
    const title = (runs.has(chat) ? "● " : "") + (chat.title || "Untitled");
    return make("li", {class: chat === current && "now"},
      button(title, () => openChat(chat), {class: "plain open", "aria-current": chat === current && "true"}),
      button("×", () => remove(chat), {class: "plain", "aria-label": `Delete ${chat.title}`}));
  }));
}

function remove(chat) {
  if (!confirm(`Delete “${brief(chat.title)}”?`)) return;
  const at = chats.indexOf(chat);
  stop(chat);
  chats = chats.filter(each => each !== chat);
  store("chat." + chat.id, null);
  if (chat === current) return openChat(chats[0] || newChat());
  drawSide();
  ($("chats").children[Math.min(at, chats.length - 1)]?.firstChild || $("new")).focus();
}

// Another tab has written or deleted a chat: its word counts, but for one that is being answered here.
function takeStored({key, newValue}) {
  const id = key?.startsWith("shimmy.chat.") && key.slice(12), old = chats.find(chat => chat.id === id);
  if (!id || runs.has(old) || (!old && !newValue)) return;
  const fresh = newValue === null ? null : newChat(parsed(newValue), id);
  chats = [fresh, ...chats.filter(chat => chat !== old)].filter(Boolean).sort((a, b) => b.changed - a.changed);
  if (current !== old || !old) return drawSide();
  current = fresh || newChat();
  drawSide();
  drawLog();
}

function openChat(chat) {
  current = chat;
  stick = true;
  store("last", chat.id);
  if (reached) $("notice").hidden = true;
  $("side").hidePopover?.();
  drawSide();
  drawModels();
  drawLog();
  if (hasKeyboard) box.focus();  // on a phone that would open the one on the screen
}

function drawModels() {
  const size = bytes => bytes >= 1e9 ? (bytes / 1e9).toFixed(1) + " GB" : Math.ceil(bytes / 1e6) + " MB";
  $("model").replaceChildren(...models.map(({id, parameter_count, quantization, size_bytes, state}) => {
    const kind = [parameter_count, quantization].filter(Boolean).join(" ");
    const words = [id, kind, size(size_bytes), state === "loaded" && state].filter(Boolean).join(" · ");
    return make("option", {value: id, selected: id === chosen(current)}, words);
  }));
  $("state").textContent = (modelOf(chosen(current))?.state || "").replace("unloaded", "not loaded");
}

function showSettings() {
  $("system").value = current.system;
  FIELDS.forEach(field => field.value = current.settings[field.name]);
  $("tools").replaceChildren(...tools.map(({name, description}) => make("label", {class: "check"},
    make("input", {type: "checkbox", name, checked: current.tools.includes(name)}),
    make("span", null, name, make("small", null, description)))));
  $("settings").showModal();
}

function takeSettings() {
  current.system = $("system").value;
  for (const field of FIELDS) current.settings[field.name] = field.validity.valid ? field.value : "";
  current.tools = [...$("tools").querySelectorAll(":checked")].map(check => check.name);
  save(current);
}

// Puts the words of dropped and pasted files into the box.
async function insert(event, files) {
  if (!files.length) return;
  event.preventDefault();
  for (const file of files) {
    const text = file.size < 200000 ? await file.text() : "\0";
    if (/[\0\ufffd]/.test(text)) notice(`${file.name} cannot be read: the models here read text files of up to 200 kB.`);
    else box.value += `${box.value && "\n\n"}${file.name}:\n\n${text}\n`;
  }
  box.focus();
}

function submitBox(event) {
  event.preventDefault();
  if (runs.has(current)) return event.type === "submit" && stop(current);  // the button stops, Enter does not
  if (!box.value.trim()) return;
  const [text, n] = [box.value, edited ?? current.turns.length];
  box.value = "";
  ask(current, text, n);
}

const hasKeyboard = matchMedia("(hover: hover)").matches;
const OVERLAY = "dialog[open]" + (CSS.supports("selector(:popover-open)") ? ", :popover-open" : "");

function pressed(event) {
  const {key, target} = event, inBox = target === box;
  if (event.isComposing || event.keyCode === 229 || document.querySelector(OVERLAY)) return;  // 229: Safari's end of composing
  const act = key === "Escape" ? () => edited === null ? stop(current) : edit(null)
    : key === "/" && !target.matches("input, textarea, select") ? () => box.focus()
    : event.altKey && event.code === "KeyN" ? startChat
    : inBox && key === "Enter" && !event.shiftKey && hasKeyboard ? () => submitBox(event)
    : inBox && key === "ArrowUp" && !box.value && current.turns.length ? () => edit(current.turns.length - 1) : null;
  if (act) event.preventDefault();
  act?.();
}

const startChat = () => openChat(newChat({model: current.model}));
const on = (target, name, act) => target.addEventListener(name, act);
on($("ask"), "submit", submitBox);
on(box, "paste", event => insert(event, event.clipboardData.files));
on($("new"), "click", startChat);
on($("side"), "toggle", event => event.newState === "open" && $("new").focus());
on($("export"), "click", exportChats);
on($("import"), "click", () => $("imported").click());
on($("imported"), "change", async () => { await importChats($("imported").files[0]); $("imported").value = ""; });
on($("model"), "change", () => { current.model = $("model").value; save(current); drawModels(); });
on($("tune"), "click", showSettings);
on($("settings"), "input", takeSettings);
on(log, "scroll", () => stick = log.scrollHeight - log.scrollTop - log.clientHeight < 48);
on(document, "keydown", pressed);
on(document, "dragover", event => event.preventDefault());
on(document, "drop", event => insert(event, event.dataTransfer.files));
on(document, "visibilitychange", () => document.hidden ? [...runs.keys()].forEach(save) : refresh());

on(window, "storage", takeStored);

if (!hasKeyboard) box.enterKeyHint = "enter";  // there is no Shift+Enter: the button sends
readChats();
openChat(current);
refresh();
</script>
</body>
</html>
"""


@functools.lru_cache(maxsize=1)
def page_headers() -> dict[str, str]:
    """What the page may do: run and be styled by what stands in it, speak with this server, and nothing else."""
    import hashlib

    def hash_of(tag: str) -> str:
        inside = PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"

    policy = (f"default-src 'none'; script-src {hash_of('script')}; style-src {hash_of('style')}; connect-src 'self'; "
              "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
              "require-trusted-types-for 'script'; trusted-types 'none'")  # fmt: skip
    return {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": policy, "Cache-Control": "no-cache",
            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Vary": "Accept"}  # fmt: skip


def open_page(url: str) -> None:
    """Opens the page in the user's browser. A server that listens everywhere is met on loopback."""
    import webbrowser

    address = url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    if not webbrowser.open(address):
        log.warning("no browser was found here to open %s", address)


if __name__ == "__main__":
    sys.exit(main())
