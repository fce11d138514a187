"""Tests shimmy.py through its public entry points: command line, HTTP and WebSocket.

Every model is written here. *Recital* models decode predictably on the real engine: attention and feed-forward are
zero, embeddings are one-hot, and the output matrix maps each token to its successor. So the last byte of a prompt
chooses the script that is recited, and since every byte is one token (plus one BOS), `usage` can be checked exactly.
*Dice* is a small random model for tests of sampling.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import base64
import contextlib
import copy
import ctypes
import faulthandler
import functools
import glob
import gzip
import hashlib
import http.client
import http.server
import importlib
import importlib.util
import inspect
import io
import ipaddress
import itertools
import json
import logging
import marshal
import math
import operator
import os
import pathlib
import pickle
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import tracemalloc
import types
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar
from urllib.parse import quote, unquote, urlsplit

import gguf
import hypothesis
import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as some
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, FormatChecker  # type: ignore[import-untyped]
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as ws_connect

import shimmy as module
from shimmy import (
    FORMATS,
    TURN,
    Automaton,
    CallFormat,
    Cancellation,
    Catalog,
    GenerationFailed,
    InvalidRequest,
    ModelTable,
    NotYet,
    NumberShape,
    Params,
    SearchRoot,
    State,
    TableOptions,
    Watcher,
    bytes_of,
    calls_symbol,
    number_fits,
    number_symbol,
    read_ahead,
    read_json,
)

if __name__ != "__main__":  # the benchmark does not need them, and importing them takes seconds
    import llama_cpp  # noqa: F401  the whole package, before shimmy takes its bindings alone
    import openai

REPO = Path(__file__).resolve().parent
SHIMMY = REPO / "shimmy.py"
TINY = "shimmy-tiny"  # the model in the box
HANG = 60.0  # seconds until a test counts as hung; never a measurement
LONG_CTX = 65536  # tokens; leaves time to interrupt an endless recital


# ── Models ────────────────────────────────────────────────────────────────────────────────────────────────────────────
# Written with the gguf package; small enough to load in milliseconds.

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|quiet|>"]
EOS, EOT, QUIET = "</s>", "<|im_end|>", "<|quiet|>"

# Maps the prompt's last byte to the tokens recited. Pieces are unique, and no prompt text tokenizes to them.
SCRIPTS: dict[str, list[str]] = {
    ":": ["Hello", " wide", " world", EOS],
    "#": ["Tick ", "tock ", "tick "],  # repeats endlessly
    "=": [*(f"w{i:02d} " for i in range(40)), EOS],
    "~": ["caf", "<0xC3>", "<0xA9>", " and", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "!!!", EOS],
    "|": ["alp", "ha S", "TOPP", "STO", "P om", "ega", EOS],
    "/": ["Good", QUIET, "bye", EOT],
    "W": ["<tool_call>", '\n{"name":', ' "get_weather",', ' "argu', 'ments": {"ci', 'ty": "Par', 'is"}}',
          "\n</tool_call>", EOS],
    "2": ["Both: ", "<tool_call>\n", '{"name": "add", "arguments": {"a": 1}}', "\n</tool", "_call>", "\n<tool",
          '_call>\n{"name": "add", "arguments": {"a": 2}}\n', "</tool_call>\n", EOT],
    "X": ["<tool_call>{", '"name": oops', "</tool_", "call>", EOS],
    "S": ["It is ", "sunny", " in Paris", EOS],
    "K": ["<think>", "\ntwo and two", "\n</think>", "\n\nFour", "!!", EOS],
}  # fmt: skip
TEXTS = {
    ":": "Hello wide world",
    "=": "".join(f"w{i:02d} " for i in range(40)),
    "~": "café and😀!!!",
    "|": "alpha STOPPSTOP omega",
    "/": "Goodbye",
    "S": "It is sunny in Paris",
}
TEXT_NAMES = {  # ids for tests parametrized over TEXTS
    ":": "three words",
    "=": "forty words",
    "~": "characters of several tokens",
    "|": "stop string in pieces",
    "/": "special token inside",
    "S": "sentence",
}
TEMPLATE = (
    "{{ bos_token }}"
    "{% if 'mutiny' in messages[-1].content %}"
    "{{ raise_exception('No mutiny on this ship') }}{% endif %}"
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% set last = messages[-1] %}"
    "{% if last.role == 'tool' %}S{% elif tools and 'weather' in last.content %}W"
    "{% elif tools and 'twice' in last.content %}2{% elif tools and 'botched' in last.content %}X"
    "{% elif 'think' in last.content %}K{% elif 'count' in last.content %}={% elif 'forever' in last.content %}#"
    "{% elif 'stopping' in last.content %}|{% elif 'unicode' in last.content %}~{% else %}:{% endif %}{% endif %}"
)

PLAIN_TEMPLATE = (  # ignores tools, needs arguments as a string, and uses Hugging Face extensions
    "{% for m in messages %}{% if m.content == 'unsaid' %}{% continue %}{% endif %}"
    "[{{ m.role }}]{% generation %}{{ m.content }}{% endgeneration %}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments.strip() }}{% endfor %}{% endfor %}"
    "{{ strftime_now('%Y')[:2] }}{% if add_generation_prompt %}W{% endif %}"
)

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def recital_vocabulary() -> list[str]:
    pieces = {piece for script in SCRIPTS.values() for piece in script} - set(SPECIALS)
    words = sorted(piece.replace(" ", "▁") for piece in pieces if not piece.startswith("<0x"))
    return [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *words]


VOCABULARY = recital_vocabulary()
TOKEN_ID = {text.replace("▁", " "): index for index, text in enumerate(VOCABULARY)}


def successor_matrix(width: int) -> np.ndarray:
    """Scores the next token (row) after each token (column): 3 for the script's next piece, 1.5 for its first."""
    matrix = np.zeros((len(VOCABULARY), width), np.float16)
    matrix[TOKEN_ID["Hello"], : len(VOCABULARY)] = 3
    for trigger, script in SCRIPTS.items():
        steps = [f"<0x{ord(trigger):02X}>", *script, *([] if script[-1] in (EOS, EOT) else [script[1]])]
        for here, there in itertools.pairwise(steps):
            matrix[TOKEN_ID["Hello"], TOKEN_ID[here]] = 0
            matrix[TOKEN_ID[script[0]], TOKEN_ID[here]] = 1.5
            matrix[TOKEN_ID[there], TOKEN_ID[here]] = 3
    return matrix


def start_model(path: Path, arch: str, fields: dict[str, Any], **kwargs: Any) -> gguf.GGUFWriter:
    """Begins a file with these fields of its header: {"context_length": 9} is written by add_context_length(9)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(path), arch, **kwargs)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    return writer


def sizes_of(name: str, context: int, width: int, layers: int) -> dict[str, Any]:
    """The fields of a small llama."""
    return {"name": name, "context_length": context, "embedding_length": width, "block_count": layers, "feed_forward_length": 32,
            "head_count": 1, "head_count_kv": 1, "key_length": 32, "value_length": 32, "rope_dimension_count": 32,
            "layer_norm_rms_eps": 1e-6, "file_type": gguf.LlamaFileType.MOSTLY_F16}  # fmt: skip


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_layers(writer: gguf.GGUFWriter, width: int, layers: int, make: Callable[..., np.ndarray]) -> None:
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for layer in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(width, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", make(32, width))
        for name in ("attn_output", "ffn_down"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", make(width, 32))


def write_recital(
    path: Path, name: str = "Recital", template: str = TEMPLATE, tokens: list[str] = VOCABULARY, **kwargs: Any
) -> Path:
    width = 32 * (len(VOCABULARY) // 32 + 1)
    types = [UNKNOWN, *[CONTROL] * (len(SPECIALS) - 1), *[BYTE] * 256]
    words = {"tokenizer_model": "llama", "token_list": tokens, "token_scores": [0.0] * len(VOCABULARY),
             "token_types": types + [NORMAL] * (len(VOCABULARY) - len(types)), "unk_token_id": 0, "bos_token_id": 1,
             "eos_token_id": 2, "add_bos_token": True, "add_space_prefix": False, "chat_template": template}  # fmt: skip
    writer = start_model(path, "llama", sizes_of(name, LONG_CTX, width, 1) | words, **kwargs)
    writer.add_tensor("token_embd.weight", np.eye(len(VOCABULARY), width, dtype=np.float16))
    writer.add_tensor("output.weight", successor_matrix(width))
    add_layers(writer, width, 1, lambda *shape: np.zeros(shape, np.float16))
    finish(writer)
    return path


def byte_alphabet() -> list[str]:
    """Returns GPT-2's printable character for each of the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def write_dice(path: Path, name: str = "Dice", context: int = 256) -> Path:
    """Writes a random model with a byte-level BPE tokenizer, a few merges and no chat template."""
    rng, width = np.random.default_rng(7), 64
    merges = ["t h", "th e", "Ġ the", "i n"]
    tokens = [*byte_alphabet(), *(merge.replace(" ", "") for merge in merges), "<|endoftext|>", *SPECIALS[3:5]]
    words = {"tokenizer_model": "gpt2", "tokenizer_pre": "gpt-2", "token_list": tokens,
             "token_types": [NORMAL] * 260 + [CONTROL] * 3, "token_merges": merges, "bos_token_id": 260, "eos_token_id": 260,
             "add_bos_token": False}  # fmt: skip
    writer = start_model(path, "llama", sizes_of(name, context, width, 2) | words)

    def make(*shape: int) -> np.ndarray:
        """In 32 bits: with fewer, kernels for one row and for several round differently, and seeds give other texts."""
        return rng.normal(0, 0.3, shape).astype(np.float16).astype(np.float32)

    writer.add_tensor("token_embd.weight", make(len(tokens), width))
    writer.add_tensor("output.weight", make(len(tokens), width))
    add_layers(writer, width, 2, make)
    finish(writer)
    return path


@dataclass(frozen=True)
class Spelled:
    """What a speller spells, and what a chat makes of it."""

    text: str
    content: str
    thought: str = ""
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()


def hermes(name: str, arguments: dict[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


SPELLED = {
    "prose": Spelled("naïve 😀 and 日本", "naïve 😀 and 日本"),
    "thought": Spelled("<think>\nTwo and two?\n</think>\n\nFour.", "Four.", "Two and two?"),
    "near misses in a thought": Spelled("<think>a </thin b </think >c<</think>d", "d", "a </thin b </think >c<"),
    "call": Spelled(hermes("get_weather", {"city": "Zürich"}), "", "", (("get_weather", {"city": "Zürich"}),)),
    "text and call": Spelled(f"Look: <b> \n{hermes('add', {})}", "Look: <b>", "", (("add", {}),)),
    "two calls": Spelled(
        f"{hermes('add', {'a': 1})}\n{hermes('add', {'a': 2})}\n", "", "", (("add", {"a": 1}), ("add", {"a": 2}))
    ),
    "thought, text and call": Spelled(
        f"<think>\nHm\n</think>\n\nSo: \n{hermes('add', {'a': '}'})}", "So:", "Hm", (("add", {"a": "}"}),)
    ),
    "near miss in a call": Spelled(hermes("add", {"a": "</tool_cal>"}), "", "", (("add", {"a": "</tool_cal>"}),)),
    "malformed call": Spelled("<tool_call>\n{oops}\n</tool_call>", "<tool_call>\n{oops}\n</tool_call>"),
    "near misses": Spelled("<tool_cal> <tool_call <<tool_c", "<tool_cal> <tool_call <<tool_c"),
    "stops": Spelled("one STO two STOPP café three", "one STO two STOPP café three"),
}
SPELLER_PROMPT = 768  # tokens reserved for prompts
SPELLER_STARTS = dict(
    zip(
        SPELLED,
        itertools.accumulate((len(each.text.encode()) + 1 for each in SPELLED.values()), initial=SPELLER_PROMPT),
        strict=False,
    )
)
SPELLER_TEMPLATE = (  # pads the prompt to the position where the text that the last message names begins
    "{% set prompt %}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% endset %}{{ prompt }}"
    "{% if add_generation_prompt %}{% set starts = " + json.dumps(SPELLER_STARTS) + " %}"
    "{{ '.' * (starts.get(messages[-1].content, 0) - prompt | length) }}{% endif %}"
)


def write_speller(path: Path) -> Path:
    """Writes a model that spells SPELLED one byte per token, whatever the prompt says: only its length counts.

    A recital cannot spell, for each of its tokens has one successor. Here token embeddings are zero, position embeddings
    are one-hot, and the output matrix maps each position to its token.
    """
    alphabet = byte_alphabet()
    end = len(alphabet)
    tape = [token for each in SPELLED.values() for token in (*each.text.encode(), end)]
    width = 64 * (len(tape) // 64 + 1)
    writer = start_model(path, "gpt2", {
        "context_length": SPELLER_PROMPT + len(tape), "embedding_length": width, "block_count": 1, "feed_forward_length": 32,
        "head_count": width // 64, "layer_norm_eps": 1e-6, "file_type": gguf.LlamaFileType.MOSTLY_F16, "tokenizer_model": "gpt2",
        "tokenizer_pre": "gpt-2", "token_list": [*alphabet, "<|endoftext|>", alphabet[0] + alphabet[1]],
        "token_types": [NORMAL] * end + [CONTROL, NORMAL], "token_merges": [f"{alphabet[0]} {alphabet[1]}"], "bos_token_id": end,
        "eos_token_id": end, "add_bos_token": False, "chat_template": SPELLER_TEMPLATE,
    })  # fmt: skip
    positions = np.zeros((SPELLER_PROMPT + len(tape), width), np.float16)
    output = np.zeros((end + 2, width), np.float16)
    for place, token in enumerate(tape):
        positions[SPELLER_PROMPT + place - 1, place] = 1  # the last token read decides the next one
        output[token, place] = 1
    writer.add_tensor("token_embd.weight", np.zeros((end + 2, width), np.float16))
    writer.add_tensor("position_embd.weight", positions)
    writer.add_tensor("output.weight", output)
    for norm in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{norm}.weight", np.ones(width, np.float32))
        writer.add_tensor(f"{norm}.bias", np.zeros(width, np.float32))
    for name, rows, columns in (("attn_qkv", 3 * width, width), ("attn_output", width, width), ("ffn_up", 32, width),
                                ("ffn_down", width, 32)):  # fmt: skip
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((rows, columns), np.float16))
        writer.add_tensor(f"blk.0.{name}.bias", np.zeros(rows, np.float32))
    finish(writer)
    return path


def write_header(
    path: Path, arch: str = "llama", name: str = "", size_label: str = "",
    tokens: Seq[str] = ("<unk>", "<s>", "</s>"), **kwargs: Any,
) -> Path:  # fmt: skip
    """Writes a file that is listed as a model but cannot be loaded: a header and one 64 x 64 tensor."""
    named = ({"name": name} if name else {}) | ({"size_label": size_label} if size_label else {})
    writer = start_model(path, arch, named | {
        "context_length": 2048, "embedding_length": 64, "block_count": 1, "file_type": gguf.LlamaFileType.MOSTLY_Q8_0,
        "tokenizer_model": "llama", "token_list": list(tokens)}, **kwargs)  # fmt: skip
    writer.add_tensor("token_embd.weight", np.zeros((64, 64), np.float32))
    finish(writer)
    return path


def write_lora(path: Path) -> Path:
    """Writes an adapter that makes ":" continue with the "=" script from w30."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 1.0)
    width = 32 * (len(VOCABULARY) // 32 + 1)
    before, after = np.zeros((1, width), np.float32), np.zeros((len(VOCABULARY), 1), np.float32)
    before[0, TOKEN_ID["<0x3A>"]] = after[TOKEN_ID["w30 "], 0] = 5
    writer.add_tensor("output.weight.lora_a", before)
    writer.add_tensor("output.weight.lora_b", after)
    finish(writer)
    return path


KINDS = ("llama", "gemma2", "mamba", "lfm2")  # full attention, sliding window, recurrent, hybrid


WORDS: dict[str, Any] = {  # a vocabulary of 257 tokens; token 17 reads " w017"
    "tokenizer_model": "llama", "token_list": ["<unk>", "<s>", "</s>", *(f"▁w{i:03d}" for i in range(3, 257))],
    "token_scores": [0.0] * 257, "token_types": [UNKNOWN, CONTROL, CONTROL] + [NORMAL] * 254, "eos_token_id": 2,
    "add_bos_token": False,
}  # fmt: skip


def letters_and(*controls: str) -> dict[str, Any]:
    """A vocabulary of 257 tokens: bytes, and control tokens for the end of a text and more."""
    end = 256 - len(controls)
    return {"tokenizer_model": "gpt2", "tokenizer_pre": "gpt-2",
            "token_list": [*byte_alphabet()[:end], "<|endoftext|>", *controls],
            "token_types": [NORMAL] * end + [CONTROL] * (1 + len(controls)), "token_merges": ["t h"], "eos_token_id": end,
            "add_bos_token": False}  # fmt: skip


def write_kind(path: Path, kind: str, context: int = 512, kv_heads: int = 2, letters: Seq[str] | None = None) -> Path:
    """Writes a small random model with one kind of memory. Token 17 reads " w017", so its text converts back to ids.

    With `letters` it reads any text, and these control tokens.
    """
    rng, width = np.random.default_rng(11), 64
    sizes = {"context_length": context, "embedding_length": width, "block_count": 4, "feed_forward_length": 96,
             "layer_norm_rms_eps": 1e-6, "file_type": gguf.LlamaFileType.ALL_F32}  # fmt: skip
    fields = sizes | (WORDS if letters is None else letters_and(*letters)) | KIND_METADATA[kind](kv_heads)
    writer = start_model(path, kind, fields)
    spread = 1 / 8 if kind == "gemma3" else 1  # Gemma multiplies it by 8
    norm = "token_embd_norm.weight" if kind == "lfm2" else "output_norm.weight"
    tensors: dict[str, Any] = {"token_embd.weight": rng.normal(0, spread, (257, width)), norm: (width,)}
    tensors |= {f"blk.{i}.{name}": made for i in range(4) for name, made in KIND_LAYERS[kind](i, width, kv_heads).items()}
    if kind in ("llama", "mamba", "gemma3", "qwen2vl"):
        tensors["output.weight"] = (257, width)
    for name, made in tensors.items():
        if isinstance(made, tuple):  # of one dimension: ones
            made = np.ones(made) if len(made) == 1 else rng.normal(0, 0.35 / np.sqrt(made[-1] / 16), made)
        writer.add_tensor(name, made.astype(np.float32))
    finish(writer)
    return path


def attention_metadata(kv_heads: int, **more: Any) -> dict[str, Any]:
    return {"head_count": max(4, kv_heads), "head_count_kv": kv_heads, "key_length": 16, "value_length": 16,
            "rope_dimension_count": 16, **more}  # fmt: skip


def attention_layer(layer: int, width: int, kv_heads: int) -> dict[str, Any]:
    """The tensors of a layer: shapes, or what is in them."""
    heads = max(4, kv_heads) * 16
    return {
        "attn_norm.weight": (width,), "ffn_norm.weight": (width,), "attn_q.weight": (heads, width),
        "attn_k.weight": (kv_heads * 16, width), "attn_v.weight": (kv_heads * 16, width), "ffn_gate.weight": (96, width),
        "ffn_up.weight": (96, width), "attn_output.weight": (width, heads), "ffn_down.weight": (width, 96),
    }  # fmt: skip


def gemma_layer(layer: int, width: int, kv_heads: int) -> dict[str, Any]:
    return attention_layer(layer, width, kv_heads) | {"post_attention_norm.weight": (width,), "post_ffw_norm.weight": (width,)}


def gemma3_layer(layer: int, width: int, kv_heads: int) -> dict[str, Any]:
    """With attention that chooses: positions and masks show."""
    return gemma_layer(layer, width, kv_heads) | {f"attn_{name}_norm.weight": np.full(16, 3.0) for name in "qk"}


def qwen2vl_layer(layer: int, width: int, kv_heads: int) -> dict[str, Any]:
    sizes = {"q": max(4, kv_heads) * 16, "k": kv_heads * 16, "v": kv_heads * 16}
    return attention_layer(layer, width, kv_heads) | {f"attn_{name}.bias": np.zeros(size) for name, size in sizes.items()}


def mamba_layer(layer: int, width: int, _: int) -> dict[str, Any]:
    decay = -np.exp(np.random.default_rng(layer).normal(0, 0.5, (128, 16)))  # negative, so that the state decays
    return {
        "attn_norm.weight": (width,), "ssm_in.weight": (256, width), "ssm_conv1d.weight": (128, 4), "ssm_conv1d.bias": (128,),
        "ssm_x.weight": (36, 128), "ssm_dt.weight": (128, 4), "ssm_dt.bias": (128,), "ssm_a": decay, "ssm_d": (128,),
        "ssm_out.weight": (width, 128),
    }  # fmt: skip


def hybrid_layer(layer: int, width: int, _: int) -> dict[str, Any]:
    feed = {"attn_norm.weight": (width,), "ffn_norm.weight": (width,), "ffn_gate.weight": (96, width),
            "ffn_up.weight": (96, width), "ffn_down.weight": (width, 96)}  # fmt: skip
    attention = {"attn_q_norm.weight": (16,), "attn_k_norm.weight": (16,), "attn_q.weight": (64, width),
                 "attn_k.weight": (32, width), "attn_v.weight": (32, width), "attn_output.weight": (width, 64)}  # fmt: skip
    convolution = {"shortconv.conv.weight": (width, 3), "shortconv.in_proj.weight": (3 * width, width),
                   "shortconv.out_proj.weight": (width, width)}  # fmt: skip
    return feed | (attention if layer % 2 else convolution)


def write_mixture(path: Path) -> Path:
    """Writes a small random mixture of experts."""
    rng, width, experts = np.random.default_rng(5), 64, 4
    fields = sizes_of("Mixture", 256, width, 2) | WORDS | {"expert_count": experts, "expert_used_count": 2}
    writer = start_model(path, "llama", fields)
    shapes = {"attn_q": (32, width), "attn_k": (32, width), "attn_v": (32, width), "attn_output": (width, 32),
              "ffn_gate_inp": (experts, width), "ffn_gate_exps": (experts, 32, width), "ffn_up_exps": (experts, 32, width),
              "ffn_down_exps": (experts, width, 32), "attn_norm": (width,), "ffn_norm": (width,)}  # fmt: skip
    named = {"token_embd": (257, width), "output_norm": (width,)}
    for name, shape in (named | {f"blk.{i}.{n}": shape for i in range(2) for n, shape in shapes.items()}).items():
        writer.add_tensor(f"{name}.weight", rng.normal(0, 0.1, shape).astype(np.float32))
    finish(writer)
    return path


def write_projector(
    path: Path, name: str = "Seer", width: int = 64, kind: gguf.LlamaFileType = gguf.LlamaFileType.ALL_F32, basename: str = "",
    make: str = "mlp",
) -> Path:  # fmt: skip
    """Writes a random projector: 32 x 32 pixels in patches of 8 x 8 become 16 tokens.

    LLaVA's; Gemma's, which takes the mean of 2 x 2 patches of 64 x 64 pixels; Qwen's, which takes pictures of any size, and
    makes a token of 2 x 2 patches.
    """
    rng, size, side = np.random.default_rng(3), 32, 32 if make == "mlp" else 64
    named = {"basename": basename} if basename else {}
    writer = start_model(path, "clip", {"type": "mmproj", "name": name, "file_type": kind, **named})
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.use_gelu", True)
    writer.add_string("clip.projector_type", make)
    for key, value in {"embedding_length": size, "feed_forward_length": size, "block_count": 2, "projection_dim": width,
                       "attention.head_count": 2, "image_size": side, "patch_size": 8, "projector.scale_factor": 2,
                       "spatial_merge_size": 2}.items():  # fmt: skip
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    writer.add_array("clip.vision.image_mean", [0.5] * 3)
    writer.add_array("clip.vision.image_std", [0.25] * 3)

    def draw(tensor: str, *shape: int, spread: float = 0.0) -> None:
        values = rng.normal(0, spread or 1 / np.sqrt(shape[-1]), shape)
        writer.add_tensor(tensor, values.astype(np.float32))

    def linear(tensor: str, rows: int, columns: int) -> None:
        draw(f"{tensor}.weight", rows, columns)
        writer.add_tensor(f"{tensor}.bias", np.zeros(rows, np.float32))

    draw("v.patch_embd.weight", size, 3, 8, 8, spread=0.3)
    if make != "qwen2vl_merger":
        draw("v.position_embd.weight", 17 if make == "mlp" else 64, size, spread=1)
    for layer in range(2):
        for part in ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down"):
            linear(f"v.blk.{layer}.{part}", size, size)
    if make == "mlp":
        draw("v.class_embd", size, spread=1)
        linear("mm.0", width, size)
        linear("mm.2", width, width)
    elif make == "gemma3":
        writer.add_tensor("v.patch_embd.bias", np.zeros(size, np.float32))
        writer.add_tensor("mm.soft_emb_norm.weight", np.ones(size, np.float32))
        draw("mm.input_projection.weight", size, width)
    else:
        draw("v.patch_embd.weight.1", size, 3, 8, 8, spread=0.3)
        linear("mm.0", 4 * size, 4 * size)
        linear("mm.2", width, 4 * size)
    for norm in (*["v.pre_ln"] * (make == "mlp"), "v.post_ln", *(f"v.blk.{i}.ln{n}" for i in range(2) for n in (1, 2))):
        writer.add_tensor(f"{norm}.weight", np.ones(size, np.float32))
        writer.add_tensor(f"{norm}.bias", np.zeros(size, np.float32))
    finish(writer)
    return path


def png(pixels: np.ndarray, size: tuple[int, int] | None = None) -> bytes:
    """A PNG file of pixels (height, width, 3); `size` is what its header says instead."""
    height, width, _ = pixels.shape

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    head = struct.pack(">IIBBBBB", *(size or (width, height)), 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b"")


RED, BLUE = (png(np.full((40, 32, 3), colour, np.uint8)) for colour in ((220, 20, 20), (20, 40, 220)))
RED64, BLUE64 = (base64.b64encode(picture).decode() for picture in (RED, BLUE))


def model_info(path: Path) -> Any:
    """A model file as a scan describes it."""
    catalog = module.Catalog([], [str(path)])
    (model,) = catalog.scan().models
    return catalog.whole(model)


def plain_model(**fields: Any) -> Any:
    """A model that is on no disk."""
    named: dict[str, Any] = {
        "id": "m", "name": "m", "path": "/m.gguf", "source": "", "size_bytes": 1000, "architecture": "llama",
        "parameter_count": None, "quantization": "F32", "context_length": 100, "embedding": False, "pooling": None,
        "chat_template": None, "description": "",
    }  # fmt: skip
    return module.ModelInfo(**named | fields)


KIND_METADATA: dict[str, Callable[[int], dict[str, Any]]] = {
    "llama": attention_metadata, **dict.fromkeys(("gemma2", "gemma3"), lambda kv: attention_metadata(kv, sliding_window=32)),
    "mamba": lambda _: {"head_count": 0, "ssm_conv_kernel": 4, "ssm_inner_size": 128, "ssm_state_size": 16,
                        "ssm_time_step_rank": 4},
    "lfm2": lambda _: {"head_count": 4, "head_count_kv": [0, 2, 0, 2], "rope_dimension_count": 16, "shortconv_l_cache": 3,
                       "vocab_size": 257},
    # half of a head's 16: time, height, width
    "qwen2vl": lambda kv: attention_metadata(kv, rope_dimension_sections=[2, 3, 3, 0]),
}  # fmt: skip
KIND_LAYERS: dict[str, Callable[[int, int, int], dict[str, Any]]] = {
    "llama": attention_layer, "gemma2": gemma_layer, "mamba": mamba_layer, "lfm2": hybrid_layer, "gemma3": gemma3_layer,
    "qwen2vl": qwen2vl_layer,
}  # fmt: skip


def with_bytes(path: Path, offset: int, data: bytes) -> Path:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    return path


def hf_snapshot(hub: Path, repo: str, write: Callable[[Path], Path], stem: str) -> None:
    """Writes a model in the Hugging Face cache layout: a snapshot of symlinks to blobs named by digest."""
    folder = hub / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    (folder / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    written = write(folder / "new" / f"{stem}.gguf").parent
    for file in list(written.glob("*.gguf")):
        blob = folder / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    written.rmdir()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)


def ollama_model(
    store: Path, name: str, tag: str, digest: str | None = None, made: Path | None = None, more: dict[str, bytes] | None = None
) -> None:
    """Writes a model in Ollama's layout: a manifest whose model layer names a blob, and `more` layers by kind."""
    made = made or write_header(store / "new.gguf", name=name)
    real = hashlib.sha256(made.read_bytes()).hexdigest()
    (store / "blobs").mkdir(parents=True, exist_ok=True)
    made.rename(store / "blobs" / f"sha256-{real}")
    manifest = store / "manifests" / "registry.ollama.ai" / "library" / name / tag
    manifest.parent.mkdir(parents=True, exist_ok=True)
    layers = [
        {"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:" + "1" * 64, "size": 1},
        {"mediaType": "application/vnd.ollama.image.model", "digest": digest or f"sha256:{real}", "size": 1},
    ]
    for kind, content in (more or {}).items():
        blob = hashlib.sha256(content).hexdigest()
        (store / "blobs" / f"sha256-{blob}").write_bytes(content)
        layers.append({"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{blob}", "size": len(content)})
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))


# ── Servers and clients ───────────────────────────────────────────────────────────────────────────────────────────────
# Run the command line and servers, and talk to them over HTTP, raw sockets and WebSocket.


def environment(home: Path, extra: dict[str, str] | None = None) -> dict[str, str]:
    """Returns a clean environment: none of the user's models or settings, and a port without a server."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    return {**kept, "HOME": str(home), "USERPROFILE": str(home), "LANG": "C.UTF-8", "SHIMMY_PORT": "9", **(extra or {})}


@functools.cache
def kernels_found() -> bytes:
    """What a machine's file of known faults holds once its kernels have been tried: else each server would try them again."""
    with tempfile.TemporaryDirectory() as folder:
        faults = module.KnownFaults(os.path.join(folder, "known-faults.json"))
        faults.kernels()
        return Path(faults.path).read_bytes()


def known_faults(home: Path) -> Path:
    """The file of known faults of a user with this home."""
    return home / ".cache" / "shimmy" / os.path.basename(module.KnownFaults().path)


def seed(home: Path) -> None:
    """Lets a home know this machine's kernels."""
    if not known_faults(home).exists() and not home.is_symlink():
        known_faults(home).parent.mkdir(parents=True, exist_ok=True)
        known_faults(home).write_bytes(kernels_found())


def seeded(home: Path, extra: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a home that knows this machine's kernels."""
    seed(home)
    return environment(home, extra)


LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_the_tests() -> None:
    """In a child before it runs: on Linux it ends with the test process, however that ends; and it minds Ctrl-C.

    Where a shell runs the tests in the background they ignore it, and so would all that they start.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if LIBC:
        LIBC.prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


Child: Any = functools.partial(subprocess.Popen, preexec_fn=end_with_the_tests)


def command_of(script: Path = SHIMMY) -> list[str]:
    """Runs our own file from its bytecode, as `serve` goes on by itself: to compile it costs a quarter of a second a start.

    So does what `altered` made. Copies, and what the benchmark measures, start as a user starts them.
    """
    if __name__ == "__main__" or not (script == SHIMMY or script in ALTERED):
        return [sys.executable, str(script)]
    return [sys.executable, "-c", module.STARTER, "", "main", str(script)]


IN_A_SHELL = shlex.join(command_of())


def shimmy(
    *args: str | Path, home: Path, stdin: bytes = b"", env: dict[str, str] | None = None, script: Path = SHIMMY
) -> subprocess.CompletedProcess[bytes]:
    """Runs a command as a user with this home would: in this process where it can, for another takes 0.3 s to import the file."""
    words, settings = list(map(str, args)), seeded(home, env)
    if script == SHIMMY and "serve" not in words and not any(name.startswith(("PYTHON", "LC_")) for name in settings):
        return run_in_this_process(words, home, stdin, settings)
    return shimmy_process(*args, home=home, stdin=stdin, env=env, script=script)


def shimmy_process(
    *args: str | Path, home: Path, stdin: bytes = b"", env: dict[str, str] | None = None, script: Path = SHIMMY
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*command_of(script), *map(str, args)], cwd=home, env=seeded(home, env), input=stdin, capture_output=True,
        timeout=HANG, check=False, preexec_fn=end_with_the_tests,
    )


def in_a_shell(command: str, home: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["bash", "-c", command], cwd=home, env=seeded(home, env), capture_output=True, timeout=HANG,
                          check=False)  # fmt: skip


def run_in_this_process(
    words: list[str], home: Path, stdin: bytes, settings: dict[str, str]
) -> subprocess.CompletedProcess[bytes]:
    """Runs main() with streams, environment, directory and logging of its own."""
    files = [io.BytesIO(stdin), io.BytesIO(), io.BytesIO()]
    given, out, err = (io.TextIOWrapper(file, "utf-8", write_through=True) for file in files)
    ours, handler, root = os.getcwd(), signal.getsignal(signal.SIGINT), logging.getLogger()
    level = root.level
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"stdin": given, "stdout": out, "stderr": err, "argv": [str(SHIMMY), *words]}.items():
            patch.setattr(sys, name, value)
        for name in set(os.environ) - set(settings):
            patch.delenv(name)
        for name, value in settings.items():
            patch.setenv(name, value)
        patch.setattr(root, "handlers", [])
        os.chdir(home)
        faulthandler.dump_traceback_later(HANG, exit=True, file=sys.__stderr__ or err)
        try:
            code: Any = module.main(words)
        except SystemExit as end:
            code = end.code
        finally:
            faulthandler.cancel_dump_traceback_later()
            signal.signal(signal.SIGINT, handler)
            root.setLevel(level)
            os.chdir(ours)
    return subprocess.CompletedProcess(words, code or 0, *(file.getvalue() for file in files[1:]))


def assert_failed(done: subprocess.CompletedProcess[bytes], code: int, *words: str) -> None:
    """Asserts exit code `code`, one line on stderr that contains `words`, and nothing on stdout."""
    message = done.stderr.decode()
    assert done.returncode == code, message
    assert done.stdout == b"" and "Traceback" not in message
    assert len(message.strip().splitlines()) == 1, message
    for word in words:
        assert word in message


def eventually(check: Callable[[], Any], what: str) -> Any:
    """Polls `check` and returns its first true result."""
    deadline = time.monotonic() + HANG
    while time.monotonic() < deadline:
        if answer := check():
            return answer
        time.sleep(0.02)
    raise AssertionError(f"never happened: {what}")


@dataclass(frozen=True)
class Reply:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        assert self.status == 200, self.body
        return self.json()["choices"][0]["text"]

    @property
    def message(self) -> dict[str, Any]:
        assert self.status == 200, self.body
        return self.json()["choices"][0]["message"]

    @property
    def finish_reason(self) -> str:
        assert self.status == 200, self.body
        return self.json()["choices"][0]["finish_reason"]


def assert_error(reply: Reply, status: int, code: str, *words: str) -> dict[str, Any]:
    """Asserts the status and the error object, with `words` in its message or details; returns the object."""
    assert reply.status == status, reply.body
    error = reply.json()["error"]
    assert error["code"] == code and error["message"] and isinstance(error["details"], str)
    assert reply.headers["Content-Type"].startswith("application/json") and b"Traceback" not in reply.body
    for word in words:
        assert word in f"{error['message']} {error['details']}", error
    return error


def cases(names: str, by_id: dict[str, Any]) -> pytest.MarkDecorator:
    """Parametrizes a test from a dict of readable ids; the values are tuples when there are several names."""
    several = "," in names
    return pytest.mark.parametrize(names, [pytest.param(*(v if several else (v,)), id=id) for id, v in by_id.items()])


def encoded(body: Any) -> bytes | None:
    return body if body is None or isinstance(body, bytes) else json.dumps(body).encode()


class Server:
    """Runs `shimmy.py serve` on its own port, with `home` as HOME and working directory."""

    def __init__(
        self, home: Path, *flags: str | Path, env: dict[str, str] | None = None, script: Path = SHIMMY, seeded: bool = True
    ):
        home.mkdir(parents=True, exist_ok=True)
        if seeded:
            seed(home)
        self.home = home
        self.log = home / "stderr.log"
        settings = {**environment(home, {"SHIMMY_PORT": ""}), **(env or {})}
        if not settings["SHIMMY_PORT"]:
            del settings["SHIMMY_PORT"]
        with self.log.open("wb") as stderr:
            self.process = Child(
                [*command_of(script), "serve", "--threads", "1", "--cache-disk", "0", *map(str, flags)],
                cwd=home, env=settings, text=True, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr,
            )  # fmt: skip
        self.first_line = self.read_line()
        found = re.search(r"http://\S+:(\d+)", self.first_line)
        assert found, self.first_line + self.log.read_text()
        self.port = int(found[1])
        self.host = "127.0.0.1"

    def read_line(self) -> str:
        guard = threading.Timer(HANG, self.process.kill)
        guard.start()
        assert self.process.stdout
        try:
            return self.process.stdout.readline()
        finally:
            guard.cancel()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=HANG)

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, encoded(body), headers or {})
            try:
                response = connection.getresponse()
            except TimeoutError:
                raise AssertionError(f"no answer after {HANG} s; {self.get('/health').body!r}; {self.log.read_text()}") from None
            return Reply(response.status, response.headers, response.read())

    def get(self, path: str, **headers: str) -> Reply:
        return self.request("GET", path, None, headers)

    def post(self, path: str, body: Any = None, **headers: str) -> Reply:
        return self.request("POST", path, body, headers)

    def generate(self, prompt: str = ":", model: str = "recital", **fields: Any) -> Reply:
        return self.post("/api/generate", {"model": model, "prompt": prompt, **fields})

    def chat(self, content: Any = "hi", model: str = "recital", **fields: Any) -> Reply:
        return self.post("/v1/chat/completions", chatting(content, model=model, **fields))

    @contextlib.contextmanager
    def stream(self, path: str, body: Any) -> Iterator[Iterator[Any]]:
        """Yields the stream's events ([DONE] as a string); leaving the block disconnects."""
        with contextlib.closing(self.connect()) as connection:
            connection.request("POST", path, encoded({**body, "stream": True}))
            response = connection.getresponse()
            assert response.status == 200, response.read()
            assert response.headers["Content-Type"].startswith("text/event-stream")
            yield events(response)
            response.close()

    def streamed(self, path: str, body: Any) -> list[Any]:
        with self.stream(path, body) as stream:
            return list(stream)

    def endless(self, model: str = "recital") -> contextlib.AbstractContextManager[Iterator[Any]]:
        body = {"model": model, "prompt": "#", "max_tokens": LONG_CTX}
        return self.stream("/api/generate", body)

    def ws(self, **options: Any) -> ClientConnection:
        url = f"ws://{self.host}:{self.port}/ws/generate"
        return ws_connect(url, proxy=None, open_timeout=HANG, **options)

    def status(self, model: str) -> dict[str, Any]:
        return self.get(f"/api/models/{quote(model, safe='')}/status").json()

    def load(self, model: str) -> Reply:
        return self.post(f"/api/models/{quote(model, safe='')}/load")

    def unload(self, model: str, query: str = "") -> Reply:
        return self.post(f"/api/models/{quote(model, safe='')}/unload{query}")

    def ids(self) -> list[str]:
        return [model["id"] for model in self.get("/api/models").json()["models"]]

    def engine(self, file: str) -> int:
        """Returns the process id of the child that has this model file mapped."""
        (pid,) = eventually(lambda: engines(self.process.pid, file), f"an engine for {file}")
        return pid

    def client(self) -> openai.OpenAI:
        web = openai.DefaultHttpxClient(trust_env=False)
        return openai.OpenAI(base_url=f"http://{self.host}:{self.port}/v1", api_key="none", http_client=web)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """Terminates the server and returns its exit code; kills it if it does not exit."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(HANG)
        finally:
            self.process.kill()
            assert self.process.stdout
            self.process.stdout.close()


Serve: TypeAlias = Callable[..., Server]  # the fixture `serve`


def assert_healthy(server: Server) -> None:
    """Asserts that a server still responds and has logged no traceback, except from the test's own tools file."""
    tracebacks = server.log.read_text().split("Traceback")[1:]
    assert not [text for text in tracebacks if "mytools.py" not in text]
    assert server.get("/health").status == 200


@contextlib.contextmanager
def shared(home: Path, *flags: str | Path, script: Path = SHIMMY, healthy: bool = True) -> Iterator[Server]:
    """Runs a server for several tests, and checks at the end that it is still healthy."""
    running = Server(home, "--port", "0", *flags, script=script)
    try:
        yield running
        if healthy:
            assert_healthy(running)
    finally:
        running.stop()


def serving(
    *flags: str, write: Callable[[Path], Any] | None = None, changes: Seq[tuple[str, str]] = (), load: Seq[str] = (),
    healthy: bool = True,
) -> Any:  # fmt: skip
    """Makes a module's fixture: a server with the models that `write` puts into its home's `models`, else with the usual ones.

    `changes` alter its shimmy.py, the models of `load` are loaded, and it must end healthy.
    """

    @pytest.fixture(scope="module")
    def started(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        home = tmp_path_factory.mktemp("served")
        if write:
            models = home / "models"
            write(models)
        script = altered(tmp_path_factory.mktemp("altered"), *changes) if changes else SHIMMY
        with shared(home, "--models-dir", models, *flags, script=script, healthy=healthy) as running:
            for model in load:
                assert running.load(model).status == 200
            yield running

    return started


def user(content: Any) -> list[dict[str, Any]]:
    """The messages of a chat in which one thing was said."""
    return [{"role": "user", "content": content}]


def chatting(content: Any = "hi", **fields: Any) -> dict[str, Any]:
    """A body for /v1/chat/completions, and for /api/chat."""
    return {"model": "recital", "messages": user(content), **fields}


def spoken_in(stream: list[Any], field: str = "content") -> str:
    """What a chat's stream says in a field of its deltas."""
    return "".join(delta.get(field) or "" for delta in deltas(stream))


def events(response: http.client.HTTPResponse) -> Iterator[Any]:
    for line in response:
        if line.startswith(b"data: "):
            data = line[6:].strip()
            yield "[DONE]" if data == b"[DONE]" else json.loads(data)


def joined(stream: list[Any]) -> str:
    return "".join(event["choices"][0]["text"] for event in stream if event != "[DONE]")


def deltas(stream: list[Any]) -> list[dict[str, Any]]:
    return [event["choices"][0]["delta"] for event in stream if event != "[DONE]" and event["choices"]]


def descendants(pid: int) -> list[int]:
    """Returns all descendants of `pid`."""
    table = subprocess.run(["ps", "-Ao", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in table.splitlines()]
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in pairs if its_parent == parent and child not in found]
    return found[1:]


def maps(pid: int, file: str) -> bool:
    try:
        return file in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


def engines(pid: int, file: str) -> list[int]:
    return [child for child in descendants(pid) if maps(child, file)]


def alive(pid: int) -> bool:
    """True if a process is running; zombies do not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def read_reply(sock: socket.socket, method: str = "GET") -> Reply:
    response = http.client.HTTPResponse(sock, method=method)
    response.begin()
    return Reply(response.status, response.headers, response.read())


def head_of(method: str, path: str, *lines: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *lines, "", ""]).encode()


def raw_post(path: str, body: bytes) -> bytes:
    return head_of("POST", path, f"Content-Length: {len(body)}") + body


def exchange(server: Server, *requests: bytes, method: str = "GET") -> list[Reply]:
    """Sends raw requests over one connection, each after the previous reply."""
    replies = []
    with socket.create_connection((server.host, server.port), timeout=HANG) as sock:
        for request in requests:
            sock.sendall(request)
            replies.append(read_reply(sock, method))
    return replies


def ws_answer(ws: ClientConnection) -> tuple[str, dict[str, Any]]:
    """Returns the joined tokens and the message that ended them."""
    text = ""
    while True:
        message = json.loads(ws.recv(HANG))
        if "token" not in message:
            return text, message
        text += message["token"]


def ws_ask(server: Server, **fields: Any) -> tuple[str, dict[str, Any]]:
    with server.ws() as ws:
        ws.send(json.dumps({"model": "recital", **fields}))
        return ws_answer(ws)


def ws_error(server: Server, message: str | bytes) -> dict[str, Any]:
    with server.ws() as ws:
        ws.send(message)
        return json.loads(ws.recv(HANG))["error"]


streamed_and_plain = cases("stream", {"plain": False, "streamed": True})
every_text = pytest.mark.parametrize("prompt", list(TEXTS), ids=TEXT_NAMES.__getitem__)
pty = pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="finds engine processes through /proc")


ALTERED: set[Path] = set()
CONTEXT_BEGINS = "        n_batch = max(self.options.batch, self.options.parallel, self.eyes.whole if self.eyes else 0)\n"


def altered(folder: Path, *changes: tuple[str, str]) -> Path:
    """Writes a copy of shimmy.py with each old text, which must occur exactly once, replaced by the new one.

    Its bytecode lies beside it: the server and each of its children would else compile it anew.
    """
    script, (source, bytecode) = folder / "shimmy.py", compiled(changes)
    script.write_bytes(source)
    os.utime(script, (SETTLED, SETTLED))
    cached = folder / "__pycache__" / f"shimmy.{sys.implementation.cache_tag}.pyc"
    cached.parent.mkdir(exist_ok=True)
    cached.write_bytes(bytecode)
    ALTERED.add(script)
    return script


SETTLED = 1_000_000_000  # when an altered file was last changed: long enough ago for its bytecode to be used


@functools.cache
def compiled(changes: tuple[tuple[str, str], ...]) -> tuple[bytes, bytes]:
    """Returns shimmy.py with its changes, and the bytecode file of that."""
    text = SHIMMY.read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    source = text.encode()
    code = compile(source, "shimmy.py", "exec", dont_inherit=True)
    return source, importlib.util.MAGIC_NUMBER + struct.pack("<III", 0, SETTLED, len(source)) + marshal.dumps(code)


def give_up(server: Server, body: dict[str, Any], seconds: float) -> None:
    """Sends a completion and disconnects after `seconds`."""
    with socket.create_connection((server.host, server.port)) as gone:
        gone.sendall(raw_post("/v1/completions", json.dumps(body).encode()))
        time.sleep(seconds)


# Servers and clients.


@dataclass(frozen=True)
class Tongue:
    """One dialect: how to ask for a text in it."""

    path: str
    fields: dict[str, Any]
    text: str = "prompt"  # the field that holds the text

    def body(self, text: str = "forever", pad: str = "", stream: bool = True) -> dict[str, Any]:
        """A request for endless text ("forever") or for three words ("hi")."""
        prompt = pad + {"forever": "#", "hi": ":"}[text]
        said = {"prompt": prompt, "input": f"{pad} {text}", "messages": [{"role": "user", "content": f"{pad} {text}"}]}
        return {"model": "recital", self.text: said[self.text], "stream": stream, **self.fields}


TONGUES = {
    "native": Tongue("/api/generate", {"max_tokens": LONG_CTX}),
    "chat": Tongue("/v1/chat/completions", {"max_tokens": LONG_CTX}, "messages"),
    "completions": Tongue("/v1/completions", {"max_tokens": LONG_CTX}),
    "messages": Tongue("/v1/messages", {"max_tokens": LONG_CTX}, "messages"),
    "responses": Tongue("/v1/responses", {"max_output_tokens": LONG_CTX}, "input"),
    "ollama chat": Tongue("/api/chat", {"options": {"num_predict": LONG_CTX}}, "messages"),
    "ollama generate": Tongue("/api/generate", {"raw": True, "options": {"num_predict": LONG_CTX}}),
    "llama-server": Tongue("/completion", {"n_predict": LONG_CTX}),
}
in_every_tongue = cases("tongue", TONGUES)


def last_document(body: bytes) -> Any:
    """The last document of a stream, whichever kind of stream it is."""
    line = body.strip().splitlines()[-1].removeprefix(b"data: ")
    return line.decode() if line == b"[DONE]" else json.loads(line)


def ends_with_an_error(body: bytes) -> bool:
    document = last_document(body)
    return document.get("type") == "response.failed" or "error" in document


def ends_well(body: bytes) -> bool:
    document = last_document(body)
    return document == "[DONE]" or bool(
        document.get("done") or document.get("stop") or document.get("type") in ("message_stop", "response.completed",
                                                                               "response.incomplete")
    )  # fmt: skip


@contextlib.contextmanager
def requested(server: Server, tongue: Tongue | Errand, **options: Any) -> Iterator[socket.socket]:
    """A raw connection on which a request has been sent."""
    with socket.create_connection((server.host, server.port), timeout=HANG) as sock:
        sock.sendall(raw_post(tongue.path, json.dumps(tongue.body(**options)).encode()))
        yield sock


def requests_of(server: Server, model: str = "recital") -> tuple[int, int]:
    status = server.status(model)
    return status["requests_running"], status["requests_waiting"]


# What runs longer under make soak.

SOAK = float(os.environ.get("SHIMMY_SOAK", 0))  # minutes of `make soak`; 0: the plain suite
more_under_soak = pytest.mark.soak  # runs in the plain suite too, with fewer examples


def fuzz(examples: int) -> Any:
    """Settings of a fuzz test: always the same examples in the plain suite, others and 50 times as many under make soak."""
    return hypothesis.settings(max_examples=examples * (50 if SOAK else 1), derandomize=not SOAK, deadline=None, database=None,
                               suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip


def only_under_soak(test: Any) -> Any:
    """Marks a test that takes minutes."""
    return pytest.mark.soak(pytest.mark.skipif(not SOAK, reason="make soak runs it")(test))


# ── Fixtures ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# Shared by several sections; a fixture that only one section uses is defined there.


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds recital, plain, dice, and hollow, which is listed but cannot be loaded."""
    folder = tmp_path_factory.mktemp("models")
    write_recital(folder / "plain.gguf", name="Plain", template=PLAIN_TEMPLATE)
    write_recital(folder / "recital.gguf")
    write_dice(folder / "dice.gguf")
    write_header(folder / "hollow.gguf", name="Hollow")
    return folder


@pytest.fixture(scope="session")
def tool_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds files for file_read, with a secret outside the root and links that lead to it."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "secret.txt").write_text("secret")
    root = folder / "root"
    (root / "sub").mkdir(parents=True)
    (root / "note.txt").write_text("a café note")
    (root / "sub" / "deep.txt").write_text("deep")
    (root / "escape.txt").symlink_to(folder / "secret.txt")
    (root / "up").symlink_to(folder)
    os.mkfifo(root / "pipe")
    with (root / "huge.bin").open("wb") as huge:
        huge.truncate(1 << 30)
    return root


TOOL_FILE = '''
from shimmy import tool

@tool
def double(n: int) -> int:
    """Twice a number."""
    return 2 * n

@tool
def stumble(why: str = "no reason") -> str:
    """Always fails."""
    raise ValueError(f"stumbled over {why}")
'''


@pytest.fixture(scope="session")
def server(models: Path, tool_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server most tests share; a test must not leave it in a state that breaks others."""
    home = tmp_path_factory.mktemp("home")
    (home / "mytools.py").write_text(TOOL_FILE)
    flags: list[str | Path] = [
        "--models-dir", models, "--model", "recital", "--ctx", str(LONG_CTX), "--alias", "gpt-*=default",
        "--alias", "die=dice", "--tool-root", tool_root, "--tool-hosts", "*", "--tools", home / "mytools.py",
    ]  # fmt: skip
    with shared(home, *flags) as running:
        yield running


@pytest.fixture(scope="session")
def guarded(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with an API key, one extra origin and host, and one host allowed for http_get."""
    flags: list[str | Path] = [
        "--models-dir", models, "--model", "recital", "--api-key", "s3cret", "--allow-origin", "https://my.app",
        "--allow-host", "my.box", "--tool-hosts", "tools.example",
    ]  # fmt: skip
    with shared(tmp_path_factory.mktemp("guarded"), *flags) as running:
        yield running


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts servers for one test: serve(*flags, env=…, script=…)."""
    running: list[Server] = []

    def start(*flags: str | Path, **options: Any) -> Server:
        port = () if options.pop("own_port", False) else ("--port", "0")
        running.append(Server(tmp_path / f"home{len(running)}", *port, *flags, **options))
        return running[-1]

    yield start
    for each in running:
        each.stop()


# with one small random model for each kind of memory
kinds = serving("--max-loaded", "4", write=lambda folder: write_kinds(folder))
# with a speller that sends each character by itself instead of 10 ms of them together
spelling = serving(write=lambda folder: write_speller(folder / "speller.gguf"),
                   changes=[("FLUSH_SECONDS = 0.01", "FLUSH_SECONDS = 0.0")])  # fmt: skip


# ── The file ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# A script that runs from anywhere and declares its dependencies.


def test_script_declares_its_dependencies_for_uv_run() -> None:
    block = re.search(r"(?m)^# /// script$\s(?P<content>(?:^#(?:| .*)$\s)+)^# ///$", SHIMMY.read_text())
    assert block and "llama-cpp-python" in block["content"] and "websockets" in block["content"]
    assert "requires-python" in block["content"]


def test_docstring_lists_the_sections_as_they_are() -> None:
    lines = SHIMMY.read_text().splitlines()
    found = [(at, m) for at, line in enumerate(lines) if (m := re.match(r"# ── (\S+)\. (.+?) ─+$", line))]
    heads = [(at, m[1], m[2].removesuffix(" (child)")) for at, m in found]
    listed = re.findall(r"(?m)^    ([\dA-G.]+) +(\S.*?) +(\d+)  \S", module.__doc__ or "")
    assert [(number, title) for number, title, _ in listed] == [(number, title) for _, number, title in heads]
    ends = [at for at, *_ in heads[1:]] + [len(lines)]
    for (at, number, _), end, (_, _, told) in zip(heads, ends, listed, strict=True):
        assert abs(int(told) - (end - at)) <= max(30, (end - at) / 5), f"section {number} has {end - at} lines"


def test_script_runs_from_a_copy_anywhere(models: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(SHIMMY, tmp_path / "shimmy.py"))
    shutil.copytree(models, tmp_path / "models")
    done = shimmy("generate", "recital", "--prompt", ":", home=tmp_path, script=copy)
    assert done.stdout.startswith(b"Hello wide world"), done.stderr


# Cached bytecode


START = SHIMMY.read_text().partition("\nif __name__ ==")[0] + """
def entry():
    import ctypes, importlib.util, json, numpy
    print("started")
if __name__ == "__main__":
    os.execv(sys.executable, child_command("entry"))
"""  # our file's beginning, which starts helper processes, with a helper that is quick to compile


def settled_copy(folder: Path, name: str = "shimmy.py", age: float = 100, source: str = START) -> Path:
    """A script that was changed `age` seconds ago."""
    folder.mkdir(exist_ok=True)
    script = folder / name
    script.write_text(source)
    os.utime(script, (time.time() - age,) * 2)
    return script


def bytecode_below(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.pyc"))


def helper_of(script: Path, home: Path) -> str:
    """What a helper process started by this script prints."""
    done = subprocess.run([sys.executable, script], cwd=home, env=environment(home), capture_output=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().strip()


@pytest.mark.parametrize("name", ["shimmy.py", "my server", "a.b.py"])
def test_helper_processes_start_from_bytecode_beside_the_file(name: str, tmp_path: Path) -> None:
    script = settled_copy(tmp_path / "some folder", name)
    assert helper_of(script, tmp_path) == "started"
    (bytecode,) = bytecode_below(script.parent)
    made = bytecode.stat().st_mtime_ns
    assert helper_of(script, tmp_path) == "started" and bytecode.stat().st_mtime_ns == made


def test_bytecode_of_a_file_in_a_folder_for_all_is_kept_in_the_users_cache(tmp_path: Path) -> None:
    script = settled_copy(tmp_path / "open")
    script.parent.chmod(0o777)
    assert helper_of(script, tmp_path) == "started"
    assert bytecode_below(script.parent) == [] and bytecode_below(tmp_path / ".cache" / "shimmy")


def test_file_that_changed_is_compiled_anew(tmp_path: Path) -> None:
    assert helper_of(settled_copy(tmp_path / "copy", age=200), tmp_path) == "started"
    changed = settled_copy(tmp_path / "copy", age=100, source=START.replace('"started"', '"changed"'))
    assert helper_of(changed, tmp_path) == "changed"


def test_file_changed_this_second_leaves_no_bytecode(tmp_path: Path) -> None:
    script = settled_copy(tmp_path / "copy", age=-HANG)  # of this second still when a busy machine comes to start it
    assert helper_of(script, tmp_path) == "started" and bytecode_below(tmp_path) == []


def test_bytecode_that_a_stranger_could_have_left_is_not_run(tmp_path: Path) -> None:
    script = settled_copy(tmp_path / "open")
    planted = Path(importlib.util.cache_from_source(str(script)))
    planted.parent.mkdir()
    stat = script.stat()
    code = compile("def entry(): print('planted')", "planted", "exec")
    head = importlib.util.MAGIC_NUMBER + struct.pack("<III", 0, int(stat.st_mtime), stat.st_size)
    planted.write_bytes(head + marshal.dumps(code))
    assert helper_of(script, tmp_path) == "planted"  # as for every import: the folder is ours
    for open_to_all in (planted, planted.parent):
        before = open_to_all.stat().st_mode
        open_to_all.chmod(0o777)
        assert helper_of(script, tmp_path) == "started"
        open_to_all.chmod(before)


def test_modules_in_the_working_directory_are_not_imported_by_helpers(tmp_path: Path) -> None:
    (tmp_path / "importlib").mkdir()
    for name in ("numpy.py", "ctypes.py", "json.py", "importlib/__init__.py"):
        (tmp_path / name).write_text("raise SystemExit('from the working directory')")
    assert helper_of(settled_copy(tmp_path / "copy"), tmp_path) == "started"


def test_serve_runs_as_a_module_too(tmp_path: Path) -> None:
    """Python's own -m must not come before what `serve` restarts itself with."""
    (tmp_path / "shimmy.py").write_bytes(SHIMMY.read_bytes())
    os.utime(tmp_path / "shimmy.py", (1e9, 1e9))
    command = [sys.executable, "-m", "shimmy", "serve", "--port", "0"]
    with Child(command, cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, text=True) as running:
        guard = threading.Timer(HANG, running.kill)
        guard.start()
        assert running.stdout and "listening" in running.stdout.readline()
        guard.cancel()
        running.terminate()


# ── Limits and errors ─────────────────────────────────────────────────────────────────────────────────────────────────
# Every error has a status and a code, and its message has the names and numbers.


def test_unknown_model_returns_the_documented_error(server: Server) -> None:
    reply = server.generate(model="invalid-model")
    assert reply.status == 404
    assert reply.json() == {
        "error": {
            "code": "model_not_found",
            "message": "The specified model was not found",
            "details": "Model 'invalid-model' is not available",
        }
    }
    error = assert_error(server.chat(model="nonesuch"), 404, "model_not_found", "nonesuch")
    assert (error["type"], error["param"]) == ("not_found_error", "model")


@cases("length", {"a little": 300, "far, which is no 413": 500_000})
def test_prompt_longer_than_the_context_reports_both_lengths(length: int, server: Server) -> None:
    assert_error(server.generate("a" * length, "dice"), 400, "context_length_exceeded", str(length), "256")


def test_error_before_the_first_byte_keeps_its_status_also_in_a_stream(server: Server) -> None:
    reply = server.post("/v1/completions", {"model": "dice", "prompt": "a" * 300})
    error = assert_error(reply, 400, "context_length_exceeded", "300", "256")
    assert error["type"] == "invalid_request_error"
    body = {"model": "recital", "prompt": [":", "x" * (LONG_CTX + 5)], "stream": True}
    assert_error(server.post("/v1/completions", body), 400, "context_length_exceeded")
    assert_error(server.generate(model="nonesuch", stream=True), 404, "model_not_found")
    assert_error(server.generate("a" * 300, model="dice", stream=True), 400, "context_length_exceeded")
    assert_error(server.generate(temperature=9, stream=True), 400, "invalid_request")


# ── The machine ───────────────────────────────────────────────────────────────────────────────────────────────────────
# Memory and versions that the server reports.


def test_health_includes_engine_memory(server: Server) -> None:
    def megabytes() -> float:
        number, unit = re.findall(r"([\d.]+)([KMG]B)", server.get("/health").json()["memory_usage"])[0]
        return float(number) * {"KB": 1 / 1024, "MB": 1, "GB": 1024}[unit]

    server.unload("recital")
    without = megabytes()
    server.load("recital")
    assert megabytes() > without + 5


ROUNDED = {
    "ones": (module.human_count, 999, "999"), "a rounded thousand": (module.human_count, 999_999, "1M"),
    "thousands": (module.human_count, 1_543_000, "1.5M"), "many": (module.human_count, 260_000, "260K"),
    "a rounded billion": (module.human_count, 999_600_000, "1B"), "billions": (module.human_count, 2_000_000_000_000, "2000B"),
    "bytes": (module.human_bytes, 1023, "1023B"), "a rounded megabyte": (module.human_bytes, 1_048_575, "1.0MB"),
    "a rounded gigabyte": (module.human_bytes, 1_073_741_000, "1.0GB"), "gigabytes": (module.human_bytes, 2_254_857_830, "2.1GB"),
    "thousands of them": (module.human_bytes, 1 << 42, "4096.0GB"),
}  # fmt: skip


@cases("human, number, shown", ROUNDED)
def test_numbers_are_rounded_into_the_next_unit(human: Callable[[int], str], number: int, shown: str) -> None:
    assert human(number) == shown


def test_build_is_asked_again_when_it_did_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["", '{"engine": "x", "gpu_offload": true}'])
    monkeypatch.setattr(module, "output_of", lambda *_: next(answers))
    monkeypatch.setattr(module, "_known_build", {})
    assert module.engine_build()["gpu_offload"] is False
    assert module.engine_build() == module.engine_build() == {"engine": "x", "gpu_offload": True}


def test_diag_over_http_matches_the_command(server: Server, models: Path) -> None:
    report = server.get("/diag").json()
    assert {"version", "python", "llama_cpp", "websockets", "memory", "skipped", "server"} <= set(report)
    assert str(models) in [entry["path"] for entry in report["directories"]]


OUTER = {"memory.max": "90000000", "memory.current": "1000", "memory.stat": "anon 500\n"}
CGROUPS: dict[str, tuple[str, dict[str, dict[str, str]]]] = {
    "page cache counts as free": ("0::/\n", {"": {
        "memory.max": "3000000", "memory.current": "2900000",
        "memory.stat": "anon 7\ninactive_file 1000000\nactive_file 500000\n"}}),
    "a nested group binds": ("0::/app/job\n", {"": {}, "app": OUTER, "app/job": {
        "memory.max": "1700000", "memory.current": "100000", "memory.stat": "file 9\n"}}),
    "an outer group binds": ("0::/app/job\n", {"app/job": OUTER, "app": {
        "memory.max": "1600000", "memory.current": "1", "memory.stat": "active_file 1\n"}}),
    "no limit in the inner one": ("0::/app\n", {"app": OUTER | {"memory.max": "max"}, "": OUTER | {
        "memory.max": "1601000"}}),
}  # fmt: skip


@cases("own, groups", CGROUPS)
@linux
def test_free_memory_within_a_container(
    own: str, groups: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").write_text(own)
    for folder, files in groups.items():
        (tmp_path / "groups" / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / "groups" / folder / name).write_text(text)
    monkeypatch.setattr(module, "OWN_CGROUPS", str(tmp_path / "own"))
    monkeypatch.setattr(module, "CGROUPS", str(tmp_path / "groups"))
    assert module.available_memory() == 1_600_000


COUNT_BUILDS = """
import sys
if "build_main" in sys.orig_argv:
    with open({file!r}, "a") as file:
        print("asked", file=file)
"""


def test_first_diags_at_once_ask_for_the_build_once(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(COUNT_BUILDS.format(file=str(tmp_path / "asked")))
    server = serve(env={"PYTHONPATH": str(tmp_path / "site")})
    with ThreadPoolExecutor(12) as pool:
        assert {reply.status for reply in pool.map(lambda _: server.get("/diag"), range(12))} == {200}
    assert (tmp_path / "asked").read_text().count("asked") == 1


# ── Requests ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# Valid and invalid bodies, on every route that reads one.

MALFORMED = {
    "empty": b"",
    "half an object": b'{"model": "recital", ',
    "a list": b"[]",
    "a string": b'"prompt"',
    "null": b"null",
    "two documents": b"{} {}",
    "NaN": b'{"model": "recital", "prompt": ":", "temperature": NaN}',
    "Infinity": b'{"model": "recital", "prompt": ":", "x": -Infinity}',
    "a huge float": b'{"model": "recital", "prompt": ":", "temperature": 1e999}',
    "invalid UTF-8": b'{"model": "recital", "prompt": "\xff:"}',
    "UTF-16": '{"model": "recital", "prompt": ":"}'.encode("utf-16"),
    "a lone surrogate": b'{"model": "recital", "prompt": "\\ud800:"}',
    "a lone surrogate in a key": b'{"model": "recital", "prompt": ":", "\\udfff": 1}',
    "70 levels": b'{"model": "recital", "prompt": ":", "x": ' + b"[" * 70 + b"]" * 70 + b"}",
    "100000 levels": b'{"model": "recital", "prompt": ":", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a number of 5000 digits": b'{"model": "recital", "prompt": ":", "max_tokens": -' + b"1" * 5000 + b"}",
}


@pytest.mark.parametrize("path", ["/api/generate", "/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("kind", list(MALFORMED))
def test_malformed_body_is_400(kind: str, path: str, server: Server) -> None:
    error = assert_error(server.post(path, MALFORMED[kind]), 400, "invalid_request")
    assert ("type" in error) == path.startswith("/v1")


def test_odd_texts_and_fields_are_read(server: Server) -> None:
    body = b'{"model": "recital", "prompt": "\\ud83d\\ude00:"}'
    assert server.post("/api/generate", body).json()["usage"]["prompt_tokens"] == 1 + 4 + 1
    names = ("max_tokens", "temperature", "stream", "top_p", "seed", "stop", "ignore_eos")
    nulls: dict[str, Any] = dict.fromkeys(names)
    assert server.generate(**nulls, colour="blue", settings={"deep": [1]}).text == "Hello wide world"


WRONG_VALUES: dict[str, tuple[list[Any], tuple[str, ...]]] = {  # invalid values, and bounds that the message must contain
    "max_tokens": ([0, -2, 1.5, "5", True, [], {}], ("1",)),
    "temperature": ([-0.1, 5.1, "hot", True, [1]], ("0", "5")),
    "top_p": ([-0.1, 1.1, "x"], ("0", "1")),
    "min_p": ([-0.1, 1.1, "x"], ("0", "1")),
    "presence_penalty": ([-2.1, 2.1, "x"], ("-2", "2")),
    "frequency_penalty": ([-2.1, 2.1, False], ("-2", "2")),
    "top_k": ([1.5, "x"], ()),
    "repeat_penalty": (["x", [], True], ()),
    "seed": ([1.5, "7", []], ()),
    "stream": (["yes", 1], ()),
    "ignore_eos": (["no", 0], ()),
    "stop": ([5, [1], {"a": 1}, ["x"] * 65], ()),
    "typical_p": ([-0.1, 1.1, "x", True], ("0", "1")),
    "top_n_sigma": ([-1.1, 101, "x"], ("-1", "100")),
    "xtc_probability": ([-0.1, 1.1, []], ("0", "1")),
    "xtc_threshold": ([-0.1, 1.1, {}], ("0", "1")),
    "dynatemp_range": ([-0.1, 5.1, "x"], ("0", "5")),
    "dynatemp_exponent": ([-0.1, 11, []], ("0", "10")),
    "repeat_last_n": ([-2, 1.5, "64"], ("-1",)),
    "dry_multiplier": ([-0.1, 101, "x"], ("0", "100")),
    "dry_base": ([0.9, 101, "x"], ("1", "100")),
    "dry_allowed_length": ([-1, 1.5, "2"], ("0",)),
    "dry_penalty_last_n": ([-2, 0.5, True], ("-1",)),
    "dry_sequence_breakers": ([5, [1], ["x"] * 17, ["x" * 41]], ()),
    "mirostat": ([-1, 3, 1.5, "2"], ("0", "2")),
    "mirostat_tau": ([-1, 101], ("0", "100")),
    "mirostat_eta": ([-0.1, 1.1], ("0", "1")),
    "logit_bias": ([5, "x", {"x": 1}, {"1": 101}, {"1": True}, [1], [[1]], [["x", 1]], [[-1, 1]], [[1, 101]], [[1, True]]], ()),
}
WRONG_FIELDS = {
    f"{field}={json.dumps(value)[:40]}": (field, value, bounds)
    for field, (values, bounds) in WRONG_VALUES.items()
    for value in values
}


@cases("field, value, bounds", WRONG_FIELDS)
def test_invalid_field_is_400_naming_it_and_its_bounds(field: str, value: Any, bounds: tuple[str, ...], server: Server) -> None:
    assert_error(server.generate(**{field: value}), 400, "invalid_request", field, *bounds)
    error = assert_error(server.chat(**{field: value}), 400, "invalid_request", field, *bounds)
    assert error["type"] == "invalid_request_error" and re.fullmatch(rf"{field}(\W.*)?", error["param"])


@cases("body, field", {
    "no model": ({"prompt": ":"}, "model"),
    "model null": ({"model": None, "prompt": ":"}, "model"),
    "model a number": ({"model": 5, "prompt": ":"}, "model"),
    "no prompt": ({"model": "recital"}, "prompt"),
    "prompt null": ({"model": "recital", "prompt": None}, "prompt"),
    "prompt a number": ({"model": "recital", "prompt": 5}, "prompt"),
    "prompt a list": ({"model": "recital", "prompt": ["a"]}, "prompt"),
    "messages a string": ({"model": "recital", "messages": "hi"}, "messages"),
    "messages empty": ({"model": "recital", "messages": []}, "messages"),
    "system a number": ({"model": "recital", "messages": [{"role": "user", "content": "x"}], "system": 5}, "system"),
})  # fmt: skip
def test_generate_missing_or_mistyped_field_is_400_naming_it(body: Any, field: str, server: Server) -> None:
    assert_error(server.post("/api/generate", body), 400, "invalid_request", field)


@cases("seed", {"2**63": 2**63, "2**64": 2**64, "-(2**70)": -(2**70)})
def test_huge_seed_is_never_a_server_error(seed: int, server: Server) -> None:
    assert server.generate(seed=seed).status in (200, 400)


@cases("prompt", {"empty": "", "NUL": "\0:", "a special token": "<|im_end|>:", "the end token": "</s>:", "U+2028": "\u2028:"})
def test_odd_prompt_is_never_a_server_error(prompt: str, server: Server) -> None:
    reply = server.generate(prompt)
    assert reply.status in (200, 400) and (reply.status == 400 or reply.text == "Hello wide world")


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


@cases("fields, param", {
    "messages null": ({"messages": None}, "messages"),
    "messages empty": ({"messages": []}, "messages"),
    "messages a string": ({"messages": "hi"}, "messages"),
    "a message that is a number": ({"messages": [1]}, "messages"),
    "a message without a role": ({"messages": [{"content": "x"}]}, "role"),
    "role a number": ({"messages": [{"role": 5, "content": "x"}]}, "role"),
    "a message without content": ({"messages": [{"role": "user"}]}, "content"),
    "content a number": ({"messages": [{"role": "user", "content": 5}]}, "content"),
    "content an image": ({"messages": [{"role": "user", "content": [IMAGE]}]}, "content"),
    "content a list of strings": ({"messages": [{"role": "user", "content": ["x"]}]}, "content"),
    "tools a string": ({"tools": "x"}, "tools"),
    "a tool that is empty": ({"tools": [{}]}, "tools"),
    "a tool without a function": ({"tools": [{"type": "function"}]}, "tools"),
    "a tool's name a number": ({"tools": [{"type": "function", "function": {"name": 5}}]}, "tools"),
    "500 tools": ({"tools": [ADD] * 500}, "tools"),
    "tool_choice unknown": ({"tool_choice": "maybe"}, "tool_choice"),
    "stream_options a string": ({"stream_options": "x"}, "stream_options"),
    "n=0": ({"n": 0}, "n"),
    "n=17": ({"n": 17}, "n"),
    "n a string": ({"n": "two"}, "n"),
    "max_completion_tokens=0": ({"max_completion_tokens": 0}, "max_completion_tokens"),
    "logit_bias a list of numbers": ({"logit_bias": [1]}, "logit_bias"),
    "logit_bias key not a number": ({"logit_bias": {"x": 1}}, "logit_bias"),
    "logit_bias beyond 100": ({"logit_bias": {"1": 101}}, "logit_bias"),
    "model a number": ({"model": 5}, "model"),
    "top_logprobs without logprobs": ({"top_logprobs": 2}, "top_logprobs"),
    "top_logprobs=21": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "logprobs a string": ({"logprobs": "yes"}, "logprobs"),
    "an unknown format": ({"response_format": {"type": "xml"}}, "response_format"),
    "allowed tools without a list": ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    "a regular expression of vLLM's": ({"guided_regex": "a+"}, "guided_regex"),
    "another format of vLLM's": ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs"),
    "a tool of an unknown type": ({"tools": [{"type": "web_search"}]}, "tools"),
    "parallel_tool_calls a string": ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
    "parallel_tool_calls a number": ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
})  # fmt: skip
def test_chat_invalid_field_is_400_naming_it(fields: dict[str, Any], param: str, server: Server) -> None:
    body = {"model": "recital", "messages": [{"role": "user", "content": "hi"}], **fields}
    error = assert_error(server.post("/v1/chat/completions", body), 400, "invalid_request", param)
    assert error["type"] == "invalid_request_error" and param in error["param"]


@cases("prompt, param", {"one text": (":", "model"), "two texts": (["a", "b"], "suffix"), "tokens": ([1, 2], "suffix")})
def test_completions_suffix_that_cannot_be_served_names_what_is_missing(prompt: Any, param: str, server: Server) -> None:
    reply = server.post("/v1/completions", {"model": "recital", "prompt": prompt, "suffix": "end"})
    assert assert_error(reply, 400, "invalid_request", "suffix")["param"] == param


def test_chat_response_format_text_is_accepted(server: Server) -> None:
    assert server.chat(response_format={"type": "text"}).message["content"] == "Hello wide world"


@cases("prompt", {"text": [":", "="], "tokens": [[1, TOKEN_ID["<0x3A>"]], [1, TOKEN_ID["<0x3D>"]]]})
def test_completions_accept_several_prompts_as_text_or_tokens(prompt: Any, server: Server) -> None:
    choices = server.post("/v1/completions", {"model": "recital", "prompt": prompt, "max_tokens": 50}).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    assert [choice["text"] for choice in choices] == [TEXTS[":"], TEXTS["="]]


@cases("path, index", {"completions": ("/v1/completions", lambda d: [c["text"] for c in d["choices"]]),
                       "llama-server's": ("/completion", lambda d: [c["content"] for c in d])})  # fmt: skip
def test_many_prompts_are_answered_in_their_order(path: str, index: Callable[[Any], list[str]], server: Server) -> None:
    """As LangChain sends 20 at once."""
    prompts = [":", "=", "S"] * 30
    document = server.post(path, {"model": "recital", "prompt": prompts, "temperature": 0}).json()
    assert index(document) == [TEXTS[prompt] for prompt in prompts]


LONGEST: dict[str, tuple[str, dict[str, Any], str, str]] = {  # what is too long, the field at fault and its bound
    "prompts": ("/v1/completions", {"prompt": ["a"] * 257}, "prompt", "256"),
    "prompts times n": ("/v1/completions", {"prompt": ["a"] * 17, "n": 16}, "prompt", "256"),
    "stops": ("/api/generate", {"prompt": ":", "stop": ["x"] * 65}, "stop", "64"),
    "a stop": ("/api/generate", {"prompt": ":", "stop": ["x" * 257]}, "stop", "256"),
    "messages": ("/v1/chat/completions", {"messages": [{"role": "system", "content": "hi"}] * 4097}, "messages", "4096"),
}


@cases("path, fields, param, most", LONGEST)
def test_field_that_is_too_long_is_400_naming_its_bound(
    path: str, fields: dict[str, Any], param: str, most: str, server: Server
) -> None:
    assert_error(server.post(path, {"model": "recital", **fields}), 400, "invalid_request", param, most)


def test_stops_may_be_as_many_as_a_chat_has_names(server: Server) -> None:
    names = [f"\nName{n}:" for n in range(62)]
    assert server.generate(stop=[*names, "wide", "x"]).text == "Hello "
    assert server.generate(stop=["x" * 256]).status == 200


PICTURE = {"image_url": {"url": "data:,"}, "type": "image_url"}
LOOK = {"type": "text", "text": "Look"}
LEFT_OUT = "[image left out: this model reads text only]"


def blind(messages: Iterable[Any]) -> list[str]:
    """The contents that a model without eyes reads."""
    contents = [message["content"] for message in messages]
    return [content if isinstance(content, str) else content.shown("m", None) for content in contents]


@cases("messages, contents", {
    "in an older turn": ([{"role": "user", "content": [LOOK, PICTURE, PICTURE]}, {"role": "user", "content": "hi"}],
                         [f"Look\n{LEFT_OUT}", "hi"]),
    "in a tool's result": ([{"role": "user", "content": "hi"}, {"role": "tool", "content": [PICTURE]}], ["hi", LEFT_OUT]),
    "of several kinds": ([{"role": "assistant", "content": [PICTURE, {"type": "file"}, {"type": "input_audio"}]}],
                         [LEFT_OUT.replace("image", "image and file and audio")]),
})  # fmt: skip
def test_media_become_a_note(messages: list[Any], contents: list[str]) -> None:
    assert blind(module.read_messages({"messages": messages}) or ()) == contents


@cases("kind", {"image": "image_url", "audio": "input_audio", "file": "file"})
def test_media_in_the_newest_turn_are_refused_by_name(kind: str, server: Server) -> None:
    messages = [*HELLO, {"role": "user", "content": [LOOK, {"type": kind}]}, {"role": "tool", "content": "x"}]
    reply = server.post("/v1/chat/completions", {"model": "recital", "messages": messages})
    assert assert_error(reply, 400, "invalid_request", kind)["param"] == "messages[1].content[1].type"


INVALID_PROMPTS: list[Any] = [[], [1, "a"], [True], [-1], [10**9], [1.5], [[]], {"a": 1}, 5, [None]]


@pytest.mark.parametrize("fields", [{}, *({"prompt": prompt} for prompt in INVALID_PROMPTS)], ids=json.dumps)
def test_completions_with_an_invalid_prompt_are_400(fields: dict[str, Any], server: Server) -> None:
    error = assert_error(server.post("/v1/completions", {"model": "recital", **fields}), 400, "invalid_request", "prompt")
    assert error["param"] == "prompt" and (fields != {"prompt": [-1]} or "0…" in error["message"] + error["details"])


# Strict JSON


@contextlib.contextmanager
def quickly(seconds: float = 5.0) -> Iterator[None]:
    """What used to take minutes; the bound is generous for a busy machine."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


@cases("body", {"behind lists": b"[" + b"[]," * 80 + b'"' + b'\\"' * 500_000,
                "behind brackets": b'{"model":"default","prompt":"' + b"[]" * 65 + b'\\"' * 500_000 + b"\\"})  # fmt: skip
def test_body_of_escaped_quotes_is_refused_in_linear_time(body: bytes, server: Server) -> None:
    with quickly():
        assert_error(server.post("/api/generate", body), 400, "invalid_request")


@pytest.mark.parametrize("unit", ["{},", "[],", '"a",', "1,", '{"a":1},'])
def test_body_of_too_many_values_is_refused(unit: str, server: Server) -> None:
    body = b'{"model": "recital", "prompt": ":", "x": [' + unit.encode() * ((12 << 20) // len(unit)) + b"0]}"
    assert_error(server.post("/api/generate", body), 400, "invalid_request", "values")


@pytest.mark.parametrize("text", ['[[{"' * 80, "\\\\" * 3000 + '"[{', "[]{}" * 400_000, '","' * 400_000])
def test_marks_inside_a_string_are_neither_levels_nor_values(text: str, server: Server) -> None:
    assert server.generate(":", x=text).text == TEXTS[":"]


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('["\\"]",', "]")])
def test_json_of_64_levels_is_read_and_of_65_refused(opening: str, closing: str, server: Server) -> None:
    for levels, status in ((63, 200), (64, 400)):  # and the body's own
        nested = opening * levels + "1" + closing * levels
        body = f'{{"model": "recital", "prompt": ":", "x": {nested}, "y": 1}}'.encode()
        assert server.post("/api/generate", body).status == status


@linux
def test_large_bodies_beyond_their_places_wait_and_are_then_refused(serve: Serve, tmp_path: Path) -> None:
    """A body takes a place once 1 MiB of it is there, however it comes, and gives it back when it is parsed."""
    changed = altered(tmp_path, ("BoundedSemaphore(8)", "BoundedSemaphore(1)"), ("TURN_SECONDS = 10.0", "TURN_SECONDS = 1.0"))
    own, body = serve(script=changed), b'{"model": "nonesuch", "prompt": ":", "x": "' + b"x" * (2 << 20) + b'"}'
    with contextlib.ExitStack() as stack:
        announced, arriving = (stack.enter_context(socket.create_connection((own.host, own.port))) for _ in range(2))
        announced.sendall(head_of("POST", "/api/generate", "Content-Length: 2000000"))
        assert_error(own.post("/api/generate", body), 404, "model_not_found")
        arriving.sendall(raw_post("/api/generate", body)[: -(1 << 19)])
        time.sleep(0.3)
        packed = gzip.compress(b"{}")
        for headers, sent in (({}, body), ({"Content-Encoding": "gzip"}, packed)):
            assert_error(own.post("/api/generate", sent, **headers), 503, "overloaded", "large")
        assert own.post("/api/generate", {"model": "nonesuch", "prompt": ":"}).status == 404
        with own.ws() as ws, pytest.raises(ConnectionClosed):
            ws.send(body)
            ws.recv(timeout=HANG)
        assert ws.close_code == 1013
    for _ in range(3):
        assert_error(own.post("/api/generate", body), 404, "model_not_found")
        assert ws_error(own, body)["code"] == "model_not_found"


@linux
def test_large_bodies_at_once_stay_within_bounds(server: Server) -> None:
    values = b"[" + b"{}," * 200_000 + b"0]"
    body = b'{"model": "recital", "prompt": ":", "x": ' + values + b', "y": "' + b"z" * (12 << 20) + b'"}'
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: server.post("/api/generate", body), range(8)))
    assert [reply.text for reply in replies] == [TEXTS[":"]] * 8
    peak = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{server.process.pid}/status").read_text())
    assert peak and int(peak[1]) < 600 << 10  # KiB


def test_room_for_bodies_is_given_back_when_the_connection_closes(server: Server) -> None:
    body = json.dumps({"model": "recital", "prompt": ":", "x": "y" * (2 << 20)}).encode()
    for _ in range(12):  # the ninth would find no room
        assert server.post("/api/generate", body, Connection="close").text == TEXTS[":"]


# ── Model files ───────────────────────────────────────────────────────────────────────────────────────────────────────
# Which files `list` finds, and what it reports about each.


def write_skipped(folder: Path) -> None:
    """Writes one file for every reason to skip it."""
    write_header(folder / "mmproj-tiny.gguf", arch="clip", name="Projector")
    adapter = gguf.GGUFWriter(str(folder / "adapter.gguf"), "llama")
    adapter.add_type("adapter")
    adapter.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((4, 64), np.float32))
    finish(adapter)
    vocabulary = gguf.GGUFWriter(str(folder / "vocab-only.gguf"), "llama")
    vocabulary.add_tokenizer_model("llama")
    vocabulary.add_token_list(["<unk>", "a"])
    finish(vocabulary)
    write_recital(folder / "parts" / "lonely.gguf", split_max_tensors=4)
    for part in sorted((folder / "parts").glob("*.gguf"))[1:2]:
        part.unlink()
    (folder / "garbage.gguf").write_bytes(b"not a model at all, whatever its name says")
    (folder / "empty.gguf").write_bytes(b"")
    (folder / "dangling.gguf").symlink_to(folder / "gone.gguf")
    with_bytes(write_header(folder / "ancient.gguf"), 4, struct.pack("<I", 1))
    with_bytes(write_header(folder / "many-keys.gguf"), 16, struct.pack("<Q", 1 << 60))
    with_bytes(write_header(folder / "many-tensors.gguf"), 8, struct.pack("<Q", 1 << 60))
    with_bytes(write_header(folder / "long-key.gguf"), 24, struct.pack("<Q", 1 << 62))
    os.truncate(write_header(folder / "cut-in-header.gguf", name="Cut"), 100)
    whole = write_recital(folder / "cut-in-data.gguf")
    os.truncate(whole, whole.stat().st_size - 100_000)


SKIPPED = {"mmproj-tiny": "projector", "adapter": "LoRA adapter", "vocab-only": "vocabulary only", "garbage": "not a GGUF",
           "empty": "truncated", "ancient": "version 1", "many-keys": "metadata pairs", "many-tensors": "tensors",
           "long-key": "truncated|MiB of text", "cut-in-header": "truncated", "cut-in-data": "truncated: \\d+ of",
           "swapped": "big-endian", "dangling": "No such file",
           "lonely-00001-of-00003": "incomplete shard set: lonely-00002-of-00003.gguf missing"}  # fmt: skip


def write_oddities(folder: Path) -> None:
    """Writes unusual files that are listed all the same."""
    write_header(folder / "My_Model Q4.gguf")
    write_header(folder / "left" / "twin.gguf", name="Left")
    write_header(folder / "right" / "twin.gguf", name="Right")
    (folder / "left" / "same.gguf").symlink_to(folder / "left" / "only.gguf")
    write_header(folder / "left" / "only.gguf", name="Only")
    (folder / "right" / "round").symlink_to(folder, target_is_directory=True)
    write_header(folder / "sized.gguf", name="A Name", size_label="0.5B")
    write_header(folder / "summed.gguf")
    write_header(folder / "bert.gguf", arch="bert", name="Embedder")
    with_bytes(write_header(folder / "version-two.gguf"), 4, struct.pack("<I", 2))
    write_header(folder / "swapped.gguf", endianess=gguf.GGUFEndian.BIG)
    write_recital(folder / "whole" / "split.gguf", split_max_tensors=4)
    write_header(folder / "UPPER.GGUF")


@dataclass(frozen=True)
class Listing:
    home: Path
    models: dict[str, dict[str, Any]]  # by id
    skipped: dict[str, str]  # reason by path

    def at(self, *parts: str) -> list[str]:
        """Returns the ids of the models at a path below HOME."""
        path = self.home.joinpath(*parts)
        return [key for key, model in self.models.items() if Path(model["path"]).absolute() == path]

    def reason(self, name: str) -> str:
        (reason,) = [reason for path, reason in self.skipped.items() if Path(path).name == name]
        return reason


def listing(home: Path, *args: str | Path, env: dict[str, str] | None = None) -> Listing:
    """The output of `list --json`, which runs in this process."""
    (home / "cwd").mkdir(parents=True, exist_ok=True)
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(os, "environ", environment(home, env))
        patch.chdir(home / "cwd")
        assert module.main(["list", "--json", *map(str, args)]) == 0
    return listing_of(home, out.getvalue())


def listing_of(home: Path, document: str | bytes) -> Listing:
    report = json.loads(document)
    skipped = {entry["path"]: entry["reason"] for entry in report["skipped"]}
    return Listing(home, {model["id"]: model for model in report["models"]}, skipped)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Listing:
    """The output of `list --json` on a machine with every kind of store."""
    home = tmp_path_factory.mktemp("found")
    write_header(home / "models" / "homely.gguf")
    write_header(home / "cwd" / "models" / "nearby.gguf")
    write_header(home / "box" / "models" / "boxed.gguf")
    write_header(home / "extra" / "deep" / "er" / "extra-one.gguf")
    write_header(home / "more" / "extra-two.gguf")
    for name in ("base", "sibling", "below/beneath"):
        write_header(home / "base" / f"{name}.gguf")
    for name in ("path-one", "path-two"):
        write_header(home / name / f"{name}.gguf")
    hf_snapshot(home / ".cache/huggingface/hub", "org/Repo", write_header, "from-hub")
    split = functools.partial(write_recital, split_max_tensors=4)
    hf_snapshot(home / ".cache/huggingface/hub", "org/Split", split, "hub-split")
    write_header(home / ".cache" / "llama.cpp" / "org_repo_cached.gguf")
    write_header(home / ".lmstudio" / "models" / "org" / "repo" / "studio.gguf")
    write_header(home / ".cache" / "lm-studio" / "models" / "org" / "repo" / "old-studio.gguf")
    ollama_model(home / ".ollama" / "models", "tiny", "latest")
    ollama_model(home / ".ollama" / "models", "evil", "latest", "sha256:../../../../base/base.gguf")
    ollama_model(home / ".ollama" / "models", "short", "latest", "sha256:abc")
    (home / ".ollama/models/manifests/registry.ollama.ai/library/tiny/broken").write_text("{not json")
    write_skipped(home / "skips")
    write_oddities(home / "odd")
    script = shutil.copy(SHIMMY, home / "box" / "shimmy.py")
    flags = [part for name in ("extra", "more", "skips", "odd") for part in ("--models-dir", home / name)]
    env = {
        "SHIMMY_BASE_GGUF": str(home / "base" / "base.gguf"),
        "SHIMMY_MODEL_PATHS": f"{home / 'path-one'};{home / 'path-two'}",
    }
    done = subprocess.run([sys.executable, script, "list", "--json", *flags], cwd=home / "cwd", env=environment(home, env),
                          capture_output=True, timeout=HANG, check=True)  # fmt: skip
    return listing_of(home, done.stdout)


FOUND = {  # path by id, in the order of the list
    "base": "base/base.gguf", "extra-one": "extra/deep/er/extra-one.gguf", "extra-two": "more/extra-two.gguf",
    "my-model-q4": "odd/My_Model Q4.gguf", "upper": "odd/UPPER.GGUF", "bert": "odd/bert.gguf", "sized": "odd/sized.gguf",
    "summed": "odd/summed.gguf", "version-two": "odd/version-two.gguf", "only": "odd/left/only.gguf",
    "twin": "odd/left/twin.gguf", "twin-HASH": "odd/right/twin.gguf", "split": "odd/whole/split-00001-of-00003.gguf",
    "path-one": "path-one/path-one.gguf", "path-two": "path-two/path-two.gguf", "sibling": "base/sibling.gguf",
    "nearby": "cwd/models/nearby.gguf", "homely": "models/homely.gguf",
    "from-hub": ".cache/huggingface/hub/models--org--Repo/snapshots/HASH/from-hub.gguf",
    "hub-split": ".cache/huggingface/hub/models--org--Split/snapshots/HASH/hub-split-00001-of-00003.gguf",
    "org-repo-cached": ".cache/llama.cpp/org_repo_cached.gguf", "studio": ".lmstudio/models/org/repo/studio.gguf",
    "old-studio": ".cache/lm-studio/models/org/repo/old-studio.gguf", "tiny:latest": ".ollama/models/blobs/sha256-HASH",
    "boxed": "box/models/boxed.gguf",
}  # fmt: skip


def test_list_finds_each_model_once_and_names_it_after_its_file(found: Listing) -> None:
    paths = {re.sub(r"-[0-9a-f]{6}$", "-HASH", id): str(Path(model["path"]).relative_to(found.home))
             for id, model in found.models.items()}  # fmt: skip
    assert [(id, re.sub("[0-9a-f]{40,}", "HASH", path)) for id, path in paths.items()] == list(FOUND.items())


@cases("stem, reason", {stem: (stem, reason) for stem, reason in SKIPPED.items()})
def test_list_skips_with_a_reason(stem: str, reason: str, found: Listing) -> None:
    assert stem not in found.models
    assert re.search(reason, found.reason(f"{stem}.gguf"))


def test_list_shows_shards_as_one_model_and_gives_equal_stems_ids_that_are_stable(found: Listing) -> None:
    (model,) = [model for model in found.models.values() if Path(model["path"]).name.startswith("split-")]
    assert "-00001-of-" in model["path"]
    total = sum(part.stat().st_size for part in (found.home / "odd" / "whole").iterdir())
    assert model["size_bytes"] == total
    again = listing(found.home, "--models-dir", found.home / "odd")
    assert found.at("odd", "right", "twin.gguf") == again.at("odd", "right", "twin.gguf")


@cases("id, shown", {
    "stated": ("sized", {"name": "A Name", "parameter_count": "0.5B", "model_type": "llama", "quantization": "Q8_0",
                         "context_length": 2048}),
    "parameters counted": ("summed", {"parameter_count": "4.1K"}),
    "an embedding model": ("bert", {"model_type": "bert", "embedding": True}),
    "GGUF version 2": ("version-two", {"context_length": 2048}),
})  # fmt: skip
def test_list_shows_metadata_from_the_header(id: str, shown: dict[str, Any], found: Listing) -> None:
    model = found.models[id]
    assert {key: model[key] for key in shown} == shown
    assert model["size_bytes"] == (found.home / "odd" / f"{id}.gguf").stat().st_size


def test_list_reads_past_a_large_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    words = {"tokenizer_model": "gpt2", "token_list": [f"token-{'x' * (number % 50)}-{number}" for number in range(30_000)],
             "token_scores": [0.5] * 30_000, "chat_template": TEMPLATE}  # fmt: skip
    writer = start_model(path, "llama", sizes_of("Large", 4096, 64, 1) | words)
    writer.add_tensor("token_embd.weight", np.zeros((30_000, 64), np.float16))
    finish(writer)
    model = listing(tmp_path, "--models-dir", tmp_path).models["large"]
    assert (model["name"], model["context_length"], model["parameter_count"]) == ("Large", 4096, "1.9M")


def test_status_reads_the_whole_header(serve: Serve, tmp_path: Path) -> None:
    """A scan reads only some of so many large vocabularies; asking for a status reads the rest of that header."""
    folder = tmp_path / "many"
    first = write_header(folder / "a000.gguf", tokens=[f"token{i}" for i in range(150_000)])
    for i in range(1, 30):
        shutil.copy(first, folder / f"a{i:03d}.gguf")
    with (folder / "a029.gguf").open("ab") as largest:
        largest.write(b"\0" * 64)
    many = serve("--models-dir", folder)
    assert many.status("a029")["status"] == "unloaded"
    listed = {m["id"]: m for m in many.get("/api/models").json()["models"]}
    assert listed["a029"]["chat_template"] is False


@cases("variable, folder, id", {
    "HF_HUB_CACHE": ("HF_HUB_CACHE", "", "moved"), "HF_HOME": ("HF_HOME", "hub", "moved"),
    "LLAMA_CACHE": ("LLAMA_CACHE", "", "moved"), "OLLAMA_MODELS": ("OLLAMA_MODELS", "", "moved:1b"),
})  # fmt: skip
def test_list_follows_the_cache_variable(variable: str, folder: str, id: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    if variable == "OLLAMA_MODELS":
        ollama_model(store, "moved", "1b")
    elif variable == "LLAMA_CACHE":
        write_header(store / "moved.gguf")
    else:
        hf_snapshot(store / folder, "org/moved", write_header, "moved")
    ids = listing(tmp_path, env={variable: str(store)}).models
    assert [key for key in ids if key.startswith("moved")] == [id]


def test_list_splits_model_paths_at_the_systems_separator(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_header(tmp_path / name / f"in-{name}.gguf")
    env = {"SHIMMY_MODEL_PATHS": os.pathsep.join([str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "none")])}
    assert {"in-a", "in-b"} <= set(listing(tmp_path, env=env).models)


def test_list_survives_undecodable_file_names(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    made = write_header(tmp_path / "odd.gguf")
    for name in (b"b\xffad.gguf", "m\u00f6del.gguf".encode()):
        shutil.copy(os.fsencode(made), os.path.join(os.fsencode(tmp_path / "models"), name))
    for args in (["list"], ["list", "--short"], ["list", "--json"], ["-v", "list"], ["diag"]):
        done = shimmy(*args, home=tmp_path, env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
        assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr


JUNK = {"nothing": "", "the magic number alone": "GGUF", "no counts": "GGUF\x03\0\0\0",
        "counts of 2**64 - 1": "GGUF\x03\0\0\0" + "\xff" * 400, "another magic number": "FUGG" * 100}  # fmt: skip


def test_list_survives_junk_and_truncated_headers(tmp_path: Path) -> None:
    whole = write_header(tmp_path / "whole.gguf", name="Whole").read_bytes()
    broken = {name: junk.encode("latin-1") for name, junk in JUNK.items()}
    broken |= {f"cut-{length}": whole[:length] for length in range(0, 700, 7)}
    for name, data in broken.items():
        (tmp_path / f"{name}.gguf").write_bytes(data)
    result = listing(tmp_path, "--models-dir", tmp_path)
    assert "whole" in result.models and not any(result.at(f"{name}.gguf") for name in broken)
    assert all(result.reason(f"{name}.gguf") for name in broken)


def test_list_survives_link_loops_and_malformed_manifests(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    write_dice(folder / "dice.gguf")
    (folder / "loop").symlink_to("loop")
    (folder / "self.gguf").symlink_to("self.gguf")
    (folder / "through.gguf").symlink_to(folder / "dice.gguf" / "x")
    store = tmp_path / "store"
    manifests = {"a": "[]", "b": '{"layers": null}', "c": '{"layers": [1]}', "d": "[" * 5000, "e": "nonsense"}
    for name, manifest in manifests.items():
        path = store / "manifests" / "host" / "library" / name / "latest"
        path.parent.mkdir(parents=True)
        path.write_text(manifest)
    assert "dice" in listing(tmp_path, "--models-dir", folder, env={"OLLAMA_MODELS": str(store)}).models


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_list_skips_a_directory_it_cannot_read(tmp_path: Path) -> None:
    write_header(tmp_path / "models" / "fine.gguf")
    closed = write_header(tmp_path / "models" / "closed" / "shut.gguf").parent
    closed.chmod(0)
    result = listing(tmp_path)
    closed.chmod(0o700)
    assert "fine" in result.models and "shut" not in result.models


def test_list_limits_scan_depth_and_says_so(tmp_path: Path) -> None:
    write_header(tmp_path / "models" / "fine.gguf")
    write_header(tmp_path.joinpath("models", *["d"] * 100, "abyss.gguf"))
    done = shimmy("-v", "list", home=tmp_path)
    assert b"fine" in done.stdout and b"abyss" not in done.stdout
    assert re.search(rb"level|depth|deep", done.stdout + done.stderr)


def test_list_verbose_and_diag_say_what_was_skipped(found: Listing) -> None:
    done = shimmy("-v", "list", "--models-dir", found.home / "skips", home=found.home)
    text = (done.stdout + done.stderr).decode()
    assert "garbage.gguf" in text and "adapter.gguf" in text
    done = shimmy("diag", "--json", "--models-dir", found.home / "skips", home=found.home)
    skipped = {Path(entry["path"]).name: entry["reason"] for entry in json.loads(done.stdout)["skipped"]}
    assert skipped["garbage.gguf"]


def test_generate_loads_a_sharded_model_from_a_hugging_face_snapshot(found: Listing, tmp_path: Path) -> None:
    (model,) = [key for key in found.models if key.startswith("hub-split")]
    env = {"HF_HUB_CACHE": str(found.home / ".cache/huggingface/hub")}
    done = shimmy("generate", model, "--prompt", ":", home=tmp_path, env=env)
    assert done.stdout.decode().removesuffix("\n") == "Hello wide world", done.stderr


def test_discover_finds_a_new_file_and_forgets_a_deleted_one(server: Server, models: Path) -> None:
    late = write_header(models / "late-comer.gguf")
    reply = server.post("/api/models/discover").json()
    assert isinstance(reply["discovered"], int) and "late-comer" in [model["id"] for model in reply["models"]]
    late.unlink()
    server.post("/api/models/discover")
    assert "late-comer" not in server.ids()


# Model files


def write_marked(path: Path, arch: str = "llama", **marks: Any) -> Path:
    """A header with keys of the architecture: pooling_type=1 writes llama.pooling_type."""
    writer = start_model(path, arch, {"context_length": 512})
    for key, value in marks.items():
        name = f"{arch}.{key.replace('__', '.')}"
        writer.add_bool(name, value) if isinstance(value, bool) else writer.add_uint32(name, value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "a"])
    writer.add_tensor("token_embd.weight", np.zeros((64, 64), np.float32))
    finish(writer)
    return path


ENCODERS = ["bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "modern-bert", "neo-bert", "eurobert",
             "gemma-embedding", "llama-embed", "t5encoder"]  # fmt: skip


def test_list_tells_embedding_models_from_generative_ones(tmp_path: Path) -> None:
    for arch in ENCODERS:
        write_marked(tmp_path / f"{arch}.gguf", arch)
    write_marked(tmp_path / "last.gguf", "qwen3", pooling_type=3)
    write_marked(tmp_path / "reranker.gguf", "qwen3", pooling_type=4)
    write_marked(tmp_path / "both-ways.gguf", "qwen3", attention__causal=False)
    write_marked(tmp_path / "no-pooling.gguf", "qwen3", pooling_type=0)
    write_marked(tmp_path / "diffusion.gguf", "llada", attention__causal=False)
    write_marked(tmp_path / "plain.gguf")
    models = listing(tmp_path, "--models-dir", tmp_path).models
    generative = {"no-pooling", "diffusion", "plain", "shimmy-tiny"}
    assert {id for id, model in models.items() if not model["embedding"]} == generative & set(models)
    assert (models["last"]["pooling"], models["reranker"]["pooling"], models["plain"]["pooling"]) == ("last", "rank", None)


EMBEDDER_REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": ("/api/generate", {"prompt": "x"}),
    "a stream": ("/api/generate", {"prompt": "x", "stream": True}),
    "chat": ("/v1/chat/completions", {"messages": user("x")}),
    "completion": ("/v1/completions", {"prompt": "x"}),
}
# its only model, but for shimmy's own, cannot generate, and is called the default
embedder = serving("--model", "all-mini", write=lambda folder: write_marked(folder / "all-mini.gguf", "bert", pooling_type=1))


@pytest.mark.parametrize("model", ["all-mini", "default"])
@cases("path, fields", EMBEDDER_REQUESTS)
def test_embedding_model_is_refused_before_it_loads(path: str, fields: dict[str, Any], model: str, embedder: Server) -> None:
    error = assert_error(embedder.post(path, {"model": model, **fields}), 400, "invalid_request", "all-mini", "embedding model")
    assert error.get("param", "model") == "model"
    assert (embedder.status("all-mini")["status"], embedder.status("all-mini")["error"]) == ("unloaded", None)


def test_default_is_the_first_model_that_generates(tmp_path: Path) -> None:
    write_marked(tmp_path / "a-bert.gguf", "bert")
    with pytest.raises(module.ModelNotFound) as alone:
        table_of(tmp_path, None).resolve("default")
    assert alone.value.status == 404 and all(word in str(alone.value.details) for word in ("embedding", "a-bert"))
    write_recital(tmp_path / "b-writer.gguf")
    assert table_of(tmp_path, None).status("default")["model"] == "b-writer"


def bytes_of_pair(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def header_of(pairs: int, *parts: bytes) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, 1, pairs) + b"".join(parts)


TENSOR = struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 32, 0, 0)
ARCHITECTURE = bytes_of_pair("general.architecture", 8, struct.pack("<Q", 5) + b"llama")


@linux
def test_header_that_states_a_string_of_2_gib_is_read_in_little_memory(tmp_path: Path) -> None:
    with (tmp_path / "vast.gguf").open("wb") as file:
        file.write(header_of(2, ARCHITECTURE, bytes_of_pair("general.description", 8, struct.pack("<Q", 1 << 31))))
        file.seek(1 << 31, os.SEEK_CUR)
        file.write(TENSOR + bytes(4096))
    done = subprocess.run(
        [*command_of(), "list", "--json", "--models-dir", tmp_path], cwd=tmp_path, env=environment(tmp_path),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)), capture_output=True, timeout=HANG,
    )  # fmt: skip
    assert "vast" in [model["id"] for model in json.loads(done.stdout)["models"]]


def sparse(path: Path, size: int, head: bytes) -> Path:
    path.write_bytes(head)
    os.truncate(path, size)
    return path


LONG_STRING = struct.pack("<Q", 1 << 20) + bytes(1 << 20)
STRAINING = {
    "pairs": (130 << 20, header_of(10_000_000), "metadata pairs"),
    "tensors": (130 << 20, struct.pack("<4sIQQ", b"GGUF", 3, 3_000_000, 1) + ARCHITECTURE, "tensors"),
    "kept text": (20 << 20, header_of(14, *(bytes_of_pair(f"k{i}", 8, LONG_STRING) for i in range(14))), "MiB of text"),
    "strings of nothing": (2 << 30, header_of(2, bytes_of_pair("k", 9, struct.pack("<IQ", 8, 1 << 28))), "to read"),
}


@pytest.mark.parametrize("kind", STRAINING)
def test_header_that_would_take_long_to_read_is_skipped_with_a_reason(kind: str, tmp_path: Path) -> None:
    size, head, word = STRAINING[kind]
    sparse(tmp_path / "strain.gguf", size, head)
    began = time.thread_time()
    assert word in listing(tmp_path, "--models-dir", tmp_path).reason("strain.gguf")
    assert time.thread_time() - began < 5


@pytest.mark.parametrize("what", ["manifest", "blob", "gguf file"])
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_named_pipe_holds_up_no_scan(what: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    ollama_model(store, "tiny", "latest")
    (blob,) = (store / "blobs").iterdir()
    manifest = store / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "latest"
    pipe = {"manifest": manifest, "blob": blob, "gguf file": tmp_path / "models" / "pipe.gguf"}[what]
    write_header(tmp_path / "models" / "fine.gguf")
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    done = shimmy("-v", "list", home=tmp_path, env={"OLLAMA_MODELS": str(store)})
    assert b"fine" in done.stdout and str(pipe) + ": not a regular file" in done.stderr.decode()


FORGED = "good\n\x1b[31mforged    7B  \u202egpj"


def test_texts_of_a_header_are_listed_printable_and_short(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "forger.gguf"), "llama")
    writer.add_name(FORGED)
    writer.add_description("x" * (1 << 20))
    writer.add_size_label(FORGED)
    writer.add_tensor("t", np.zeros((64, 64), np.float32))
    finish(writer)
    model = listing(tmp_path, "--models-dir", tmp_path).models["forger"]
    assert model["name"].startswith("good\\n\\x1b[31mforged") and model["description"].endswith("…")
    texts = [model[key] for key in ("id", "name", "description", "model_type", "parameter_count")]
    assert all(text.isprintable() and len(text) <= 200 for text in texts)


def test_name_of_a_file_cannot_forge_a_row(tmp_path: Path) -> None:
    write_header(tmp_path / "models" / "a.gguf").rename(tmp_path / "models" / f"{FORGED}.gguf")
    (tmp_path / "models" / "b.gguf").symlink_to(tmp_path / "models" / "\x1b[2J gone")
    done = shimmy("list", "--short", home=tmp_path)
    (line,) = [line for line in done.stdout.decode().splitlines() if "forged" in line]
    assert line.isprintable() and line.startswith("good")
    report = json.loads(shimmy("list", "--json", home=tmp_path).stdout)
    assert all(note.isprintable() for folder in report["directories"] for note in folder["notes"])


def test_odd_names_of_files_can_be_addressed_and_blank_ones_mean_no_model(serve: Serve, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    write_header(odd / "model-one.gguf")
    write_header(odd / "a.gguf").rename(odd / "\x01\x02.gguf")
    write_recital(odd / "made.gguf").rename(os.fsdecode(os.fsencode(odd) + b"/caf\xe9-one.gguf"))
    server = serve("--models-dir", odd)
    assert {"model", "model-one"} <= set(server.ids())
    for name in ("\0", " ", "\x1b"):
        assert_error(server.generate(model=name), 404, "model_not_found")
    (id,) = [id for id in server.ids() if id.startswith("caf")]
    assert id.isprintable() and server.generate(model=id).text == "Hello wide world"


# Hostile model files.

EXTREME = [0, 1, 2, 7, 8, 9, 127, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63,
           (1 << 64) - 1]


def changed_file(data: bytes, header: int, pick: random.Random) -> bytes:
    """A model file with a few changes in its header: bytes, whole numbers, pieces cut out or doubled, its end."""
    changed = bytearray(data)
    for _ in range(pick.randint(1, 4)):
        at = pick.randrange(4, header)
        how = pick.randrange(6)
        if how < 2:
            changed[at] = pick.randrange(256)
        elif how < 4:
            size = pick.choice((4, 8))
            changed[at : at + size] = (pick.choice(EXTREME) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        elif how == 4:
            del changed[at : at + pick.randint(1, 40)]
        else:
            changed[at:at] = changed[at : at + pick.randint(1, 40)]
    return bytes(changed[: pick.randrange(len(changed))] if pick.random() < 0.1 else changed)


STRING, ARRAY = struct.pack("<Q", 3) + b"\x1b[2", struct.pack("<IQ", 4, 2) + bytes(8)
VALUES = {8: STRING, 9: ARRAY, 6: struct.pack("<f", float("nan")), 12: struct.pack("<d", float("inf")), 7: b"\1",
          10: b"\xff" * 8, 11: b"\xff" * 8,
          5: b"\0\0\0\x80", 0: b"\0"}  # fmt: skip
READ_KEYS = ["general.architecture", "general.name", "general.description", "general.file_type", "general.alignment",
             "general.size_label",
             "general.parameter_count", "general.type", "split.no", "split.count", "llama.context_length", "llama.pooling_type",
             "llama.attention.causal", "tokenizer.chat_template", "adapter.type"]  # fmt: skip


def read_model(path: Path) -> None:
    """Reads a file as `list` does. Raises GgufError where it is no model; checks what it says else."""
    size = path.stat().st_size
    for whole in (False, True):
        header = module.read_gguf_header(str(path), whole)
        info = module.describe(header, str(path), "id", "here", size)
        shown = json.loads(json.dumps(info.document(), allow_nan=False))
        assert all(text.isprintable() and len(text) <= 200 for text in shown.values() if isinstance(text, str)), shown


def write_shards(folder: Path, *numbers: int) -> list[Path]:
    """Writes shards of a set of two."""
    paths = []
    for number in numbers:
        paths.append(folder / f"big-{number:05d}-of-00002.gguf")
        writer = gguf.GGUFWriter(str(paths[-1]), "llama")
        writer.add_uint16("split.no", number - 1)
        writer.add_uint16("split.count", 2)
        writer.add_tensor(f"part{number}", np.zeros((64, 64), np.float32))
        finish(writer)
    return paths


def listed(catalog: Any) -> list[str]:
    return [model.id for model in catalog.scan().models]


def test_shards_may_come_and_go_while_the_server_runs(tmp_path: Path) -> None:
    catalog = Catalog([SearchRoot(str(tmp_path), "here")])
    write_shards(tmp_path, 1)
    assert listed(catalog) == [] and "incomplete" in catalog.why_skipped("big")
    (second,) = write_shards(tmp_path, 2)
    assert listed(catalog) == ["big"] and catalog.report.models[0].parameter_count == "8.2K"
    second.unlink()
    assert listed(catalog) == []


def test_each_shard_must_be_whole(tmp_path: Path) -> None:
    _, second = write_shards(tmp_path, 1, 2)
    second.write_bytes(second.read_bytes()[:-4000])
    assert listed(catalog := Catalog([SearchRoot(str(tmp_path), "here")])) == []
    assert any("truncated" in skipped["reason"] for skipped in catalog.report.skipped)


def test_merged_file_that_is_still_named_like_a_shard_is_a_model_and_what_was_thrown_away_is_none(tmp_path: Path) -> None:
    write_header(tmp_path / "merged-00001-of-00003.gguf")
    for folder in (".Trash", ".Trash-1000", ".Trashes", "$RECYCLE.BIN"):
        write_header(tmp_path / folder / "files" / "old.gguf")
    assert listed(Catalog([SearchRoot(str(tmp_path), "here")])) == ["merged"]


def test_split_model_that_is_reached_twice_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    write_shards(tmp_path / "one", 1, 2)
    (tmp_path / "two").symlink_to(tmp_path / "one")
    catalog = Catalog([SearchRoot(str(tmp_path / name), name) for name in ("one", "two")])
    assert [(model.id, model.source) for model in catalog.scan().models] == [("big", "one")]


def test_folder_that_is_named_twice_keeps_its_first_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    paths = [str(tmp_path / name) for name in ("a", "b", "link", "a")]
    assert [root.path for root in module.search_roots(paths, None)[:2]] == paths[:2]
    monkeypatch.chdir(REPO)
    assert module.search_roots(["models"], None)[0].path == str(REPO / "models")
    base = str(tmp_path / "a" / "x.gguf")  # of this folder alone only what lies in it, else all below
    monkeypatch.setenv("SHIMMY_MODEL_PATHS", "")
    assert module.search_roots([], base)[0].depth == 0
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "a"))
    assert module.search_roots([], base)[0].depth == module.MAX_SCAN_DEPTH


def test_names_with_accents_are_found_as_they_are_typed(tmp_path: Path) -> None:
    write_header(tmp_path / "caf\u0065\u0301.gguf")
    assert listed(Catalog([SearchRoot(str(tmp_path), "here")])) == ["caf\u00e9"]
    assert module.plain_id("caf\u0065\u0301") == module.plain_id("caf\u00e9")


def test_metadata_of_any_type_is_read_or_refused(tmp_path: Path) -> None:
    for key, (kind, value) in itertools.product(READ_KEYS, VALUES.items()):
        pairs = [ARCHITECTURE] * ("architecture" not in key) + [bytes_of_pair(key, kind, value)]
        (tmp_path / "odd.gguf").write_bytes(header_of(len(pairs), *pairs, TENSOR, bytes(4096)))
        with contextlib.suppress(module.GgufError):
            read_model(tmp_path / "odd.gguf")


@more_under_soak
@pytest.mark.parametrize("write", [write_dice, write_recital, write_header], ids=lambda write: write.__name__)
def test_changed_header_is_read_or_refused_in_little_memory_and_time(write: Any, tmp_path: Path) -> None:
    path, pick = tmp_path / "changed.gguf", random.Random(SOAK)
    data = write(tmp_path / "whole.gguf").read_bytes()
    data = data[: 40_000 if write is not write_header else 900]
    tracemalloc.start()
    try:
        for number in range(20_000 if SOAK else 70):
            path.write_bytes(changed_file(data, min(len(data), 8000), pick))
            began = time.thread_time()
            with contextlib.suppress(module.GgufError):
                read_model(path)
            assert time.thread_time() - began < 2.5, number
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def with_little_memory(folder: Path) -> Path:
    """A shimmy.py whose processes may have 6 GB of addresses each: what a file asks for beyond is an error."""
    return wrapper(folder, "import resource", "resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))",
                   "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))")  # fmt: skip


def loadable(data: bytes, header: int, pick: random.Random, path: Path) -> None:
    """Writes a changed model file that is still listed."""
    while True:
        path.write_bytes(changed_file(data, header, pick))
        with contextlib.suppress(module.GgufError):
            return read_model(path)


@linux
@more_under_soak
def test_changed_file_that_is_loaded_is_one_error_and_the_server_goes_on(serve: Serve, models: Path, tmp_path: Path) -> None:
    pick, count = random.Random(SOAK), 600 if SOAK else 4
    data = {name: (models / f"{name}.gguf").read_bytes() for name in ("recital", "dice")}
    folder = tmp_path / "changed"
    folder.mkdir()
    for number in range(count):
        name = pick.choice(sorted(data))
        loadable(data[name], 14_000 if name == "recital" else 10_000, pick, folder / f"changed-{number}.gguf")
    own = serve("--models-dir", models, "--models-dir", folder, "--max-loaded", "2", "--ctx", "128",
                script=with_little_memory(tmp_path))
    statuses = []
    for id in [id for id in own.ids() if id.startswith("changed-")]:
        reply = own.generate("Once", id, max_tokens=2)
        assert reply.status in (200, 400, 500), reply.body
        assert reply.status != 500 or reply.json()["error"]["code"] == "generation_failed", reply.body
        statuses.append(reply.status)
        own.unload(id, "?force=true")
    assert len(statuses) > count // 2 and own.generate().text == TEXTS[":"]
    log = own.log.read_text()
    assert "Traceback" not in log and not module.CONTROL.search(log)


NASTY = "\x1b]0;owned\x07\x1b[31m\x9b2J\r"


def write_nasty(path: Path, **more: Any) -> Path:
    """A model all of whose texts hold control characters."""
    template = "{{ raise_exception('" + NASTY + "') }}" if not more else "{{ messages[-1].content }}:"
    write_recital(path, name=f"Nasty {NASTY}", template=template, **more)
    return path


@pytest.mark.parametrize("command", [
    ["list", "-v"], ["diag"], ["-v", "generate", "nasty", "--prompt", "x"], ["generate", "broken", "--prompt", "x"],
    ["generate", NASTY, "--raw", "--prompt", ":"],
], ids=lambda command: " ".join(command).translate({27: "ESC"})[:30])  # fmt: skip
def test_control_characters_of_a_file_reach_no_terminal(command: list[str], nasty: Path) -> None:
    done = shimmy(*command, "--models-dir", nasty, home=nasty)
    shown = (done.stdout + done.stderr).decode()
    assert shown and not module.CONTROL.search(shown), shown


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with control characters in every text, one of which cannot be loaded."""
    folder = tmp_path_factory.mktemp("nasty")
    data = write_nasty(folder / "nasty.gguf").read_bytes()
    name = b"blk.0.attn_norm.weight"
    assert data.count(name) == 1
    (folder / "broken.gguf").write_bytes(data.replace(name, NASTY.encode("latin-1", "replace").ljust(len(name), b"\x1b")))
    write_recital(folder / "b.gguf").rename(folder / f"{NASTY}.gguf")
    return folder


def test_control_characters_of_files_and_clients_reach_no_log(nasty: Path, serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "mytools.py").write_text(TOOL_FILE)
    own = serve("-v", "--models-dir", nasty, "--tools", tmp_path / "mytools.py")
    assert own.chat("hi", "nasty").status == 400
    assert own.generate("hi", "broken").status == 500
    own.generate("hi", NASTY)
    assert_tool_failed(own.post("/api/tools/stumble/execute", {"why": f"{NASTY}\n12:00:00 forged"}))
    own.get(f"/v1/models/{quote(NASTY)}", **{"User-Agent": "\x1b".join("ab").replace("\x1b", "\t")})
    exchange(own, b"GET /\xc2\x9b2J HTTP/1.1\r\nHost: localhost\r\n\r\n")
    log = own.log.read_text()
    assert "stumble" in log and not module.CONTROL.search(log), log
    assert "12:00:00 forged" in log and "\n12:00:00 forged" not in log


@pty
def test_control_characters_that_a_model_writes_reach_no_terminal(tmp_path: Path) -> None:
    tokens = [NASTY if token == "▁wide" else token for token in VOCABULARY]
    write_recital(tmp_path / "models" / "writer.gguf", tokens=tokens)
    with terminal("generate", "writer", "--raw", "--prompt", ":", home=tmp_path) as screen:
        assert screen.left() == "Hello" + module.harmless(NASTY) + " world\n"
    done = shimmy("generate", "writer", "--raw", "--prompt", ":", home=tmp_path)
    assert done.stdout.decode() == f"Hello{NASTY} world"


PROJECTORS: dict[str, tuple[dict[str, Any], str | None]] = {  # files beside seer.gguf and their options: which one is its
    "beside it": ({"mmproj-seer.gguf": {}}, "mmproj-seer.gguf"),
    "none": ({}, None),
    "another's width": ({"mmproj-seer.gguf": {"width": 48}}, None),
    "named otherwise": ({"mmproj-F16.gguf": {"name": "Gazer", "basename": "gazer"}}, None),
    "an older one, named for its encoder": ({"mmproj-model-f16.gguf": {"name": "vit-large336"}}, "mmproj-model-f16.gguf"),
    "named by its file": ({"Seer.mmproj-Q8_0.gguf": {"name": "vit-large336", "basename": "vit"}}, "Seer.mmproj-Q8_0.gguf"),
    "the smallest that is F16 or Q8_0": (
        {"mmproj-seer-Q4_0.gguf": {"kind": gguf.LlamaFileType.MOSTLY_Q4_0}, "mmproj-seer-F32.gguf": {},
         "mmproj-seer-F16.gguf": {"kind": gguf.LlamaFileType.MOSTLY_F16}}, "mmproj-seer-F16.gguf"),
    "in the folder above": ({"../mmproj-seer.gguf": {}}, "mmproj-seer.gguf"),
    "somebody's in the folder above": ({"../mmproj-F16.gguf": {"name": "vit-large336"}}, None),
}  # fmt: skip


@cases("files, expected", PROJECTORS)
def test_projector_is_found_beside_its_model(files: dict[str, Any], expected: str | None, tmp_path: Path) -> None:
    write_dice(tmp_path / "seer" / "seer.gguf", "Seer")
    for name, options in files.items():
        write_projector(tmp_path / "seer" / name, **options)
    (found,) = Catalog([SearchRoot(str(tmp_path), "--models-dir")]).scan().models
    assert expected == (found.projector and os.path.basename(found.projector))
    assert found.document()["vision"] is bool(expected)


def test_projector_without_a_name_belongs_to_no_model_among_several(tmp_path: Path) -> None:
    """By its width alone it could be of either."""
    for stem in ("seer", "gazer"):
        write_dice(tmp_path / f"{stem}.gguf", stem.title())
    write_projector(tmp_path / "mmproj-model-f16.gguf", name="vit-large336")
    write_projector(tmp_path / "mmproj-gazer.gguf", name="Gazer")
    scanned = Catalog([SearchRoot(str(tmp_path), "--models-dir")]).scan()
    assert {m.id: bool(m.projector) for m in scanned.models} == {"seer": False, "gazer": True}
    assert sum("projector" in each["reason"] for each in scanned.skipped) == 2


def test_projector_of_the_command_line_is_the_default_models_and_a_presets_its_own() -> None:
    settings = module.Settings({"mmproj": "eyes.gguf"}, [module.Preset("seer", {"mmproj": "none"})])
    found = [settings.of(plain_model(id=id), first).engine.mmproj for id, first in (("m", True), ("m", False), ("seer", True))]
    assert found == ["eyes.gguf", None, "none"]


def test_projector_of_a_hub_snapshot_and_of_ollamas_store_is_found(tmp_path: Path) -> None:
    def write(path: Path) -> Path:
        write_projector(path.with_name("mmproj-F16.gguf"))
        return write_dice(path, "Seer")

    hf_snapshot(tmp_path / "hub", "me/seer-GGUF", write, "seer")
    ollama_model(tmp_path / "ollama", "seer", "1b", more={"projector": write_projector(tmp_path / "p.gguf").read_bytes()})
    roots = [SearchRoot(str(tmp_path / "hub"), "hub"), SearchRoot(str(tmp_path / "ollama"), "ollama", ollama=True)]
    hub, ollama = Catalog(roots).scan().models
    (alone,) = Catalog([], [hub.path]).scan().models
    assert alone.projector
    assert hub.projector and os.path.basename(hub.projector) == "mmproj-F16.gguf"
    settings = module.Settings()
    fitted = ollama.fitted(settings.of(ollama, True).engine.mmproj)
    assert fitted.projector and "sha256-" in fitted.projector and fitted.weights_bytes > ollama.size_bytes
    assert not ollama.fitted("none").projector


def test_projector_that_came_with_a_later_commit_is_found(tmp_path: Path) -> None:
    """The hub's cache links a file that did not change from both snapshots."""
    model = write_dice(tmp_path / "old" / "seer.gguf", "Seer")
    write_projector(tmp_path / "new" / "mmproj-F16.gguf")
    (tmp_path / "new" / "seer.gguf").hardlink_to(model)
    (found,) = Catalog([SearchRoot(str(tmp_path / "old"), ""), SearchRoot(str(tmp_path / "new"), "")]).scan().models
    assert found.projector and found.path == str(model)


# ── Chat ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
# Messages to a prompt by the model's template; the model's text to reasoning, tool calls and content.


def test_generate_accepts_messages_instead_of_a_prompt(server: Server) -> None:
    messages = [{"role": "user", "content": "please count"}]
    reply = server.post("/api/generate", {"model": "recital", "messages": messages, "system": "Be brief"})
    assert reply.text == TEXTS["="]
    rendered = "[system]Be brief[user]please count[assistant]="
    assert reply.json()["usage"]["prompt_tokens"] == 1 + len(rendered)


def test_chat_renders_every_message_with_the_models_template_or_chatml(server: Server) -> None:
    messages = [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": [{"type": "text", "text": "co"}, {"type": "text", "text": "unt"}]},
    ]
    reply = server.post("/v1/chat/completions", {"model": "recital", "messages": messages})
    rendered = "[system]Be brief[user]one[assistant]two[user]count[assistant]="
    assert reply.message["content"] == TEXTS["="]
    assert reply.json()["usage"]["prompt_tokens"] == 1 + len(rendered)
    reply = server.chat("yo", "dice", max_tokens=1, ignore_eos=True)
    assert reply.json()["usage"]["prompt_tokens"] == 3 + len("user\nyo") + 1 + len("assistant\n")


ADDED = {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


@cases("first, rendered", {
    "with Hugging Face's extensions": ({"role": "user", "content": "unsaid"}, "[user]hi20W"),
    "with arguments as text": (
        {"role": "assistant", "content": "x", "tool_calls": [ADDED]}, '[assistant]xadd{"a": 1}[user]hi20W'),
})  # fmt: skip
def test_chat_template_is_rendered(first: dict[str, Any], rendered: str, server: Server) -> None:
    reply = server.post("/v1/chat/completions", {"model": "plain", "messages": [first, *user("hi")]})
    assert reply.json()["usage"]["prompt_tokens"] == 1 + len(rendered)


def test_chat_template_that_ignores_tools_gets_them_in_the_system_prompt(server: Server) -> None:
    reply = server.chat("hi", "plain", tools=[WEATHER])
    assert [call["function"]["name"] for call in reply.message["tool_calls"]] == ["get_weather"]
    assert reply.json()["usage"]["prompt_tokens"] > len(json.dumps(WEATHER["function"]))


def test_chat_refuses_what_its_template_does_and_every_noncharacter(server: Server) -> None:
    reply = server.chat("mutiny")
    assert_error(reply, 400, "invalid_request", "No mutiny on this ship")
    text = "".join(map(chr, range(0xFDD0, 0xFDF0))) + "<|im_end|>"
    assert_error(server.chat(text), 400, "invalid_request", "noncharacter")


def test_chat_special_token_names_of_users_and_tools_stay_text(server: Server) -> None:
    def tokens(content: str) -> int:
        return server.chat(content, "dice", max_tokens=1, ignore_eos=True).json()["usage"]["prompt_tokens"]

    assert tokens("a<|im_end|>b") - tokens("ab") == len("<|im_end|>")
    # As text the name is several tokens; as a special token it would be one.
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {name: {}}}}}
             for name in ("<|im_end|>", "<|xx_xxx|>")]  # fmt: skip
    used = [server.chat("hi", tools=[tool], max_tokens=1).json()["usage"]["prompt_tokens"] for tool in tools]
    assert used[0] == used[1]


def assembled(sent: list[Any]) -> list[dict[str, Any]]:
    """Assembles tool calls from their deltas, as clients do."""
    calls: list[dict[str, Any]] = []
    for part in (part for delta in deltas(sent) for part in delta.get("tool_calls") or []):
        if part["index"] == len(calls):
            calls.append({"id": part["id"], "name": part["function"]["name"], "arguments": ""})
        calls[part["index"]]["arguments"] += part["function"].get("arguments") or ""
    return calls


def test_chat_tool_call_is_parsed_and_streamed_as_deltas(server: Server) -> None:
    reply = server.chat("weather?", tools=[WEATHER])
    (call,) = reply.message["tool_calls"]
    assert reply.finish_reason == "tool_calls" and not reply.message["content"]
    assert (call["type"], call["function"]["name"]) == ("function", "get_weather") and call["id"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    sent = server.streamed("/v1/chat/completions", chatting("weather?", tools=[WEATHER]))
    (streamed,) = assembled(sent)
    assert streamed["name"] == "get_weather" and json.loads(streamed["arguments"]) == {"city": "Paris"}
    assert spoken_in(sent).strip() == "" and sent[-2]["choices"][0]["finish_reason"] == "tool_calls"


@streamed_and_plain
def test_chat_two_tool_calls_after_text_keep_order_and_have_unique_ids(stream: bool, server: Server) -> None:
    if stream:
        sent = server.streamed("/v1/chat/completions", chatting("twice", tools=[ADD]))
        content, calls = spoken_in(sent), assembled(sent)
    else:
        message = server.chat("twice", tools=[ADD]).message
        content, calls = message["content"], [{"id": call["id"], **call["function"]} for call in message["tool_calls"]]
    assert content.strip() == "Both:"
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [("add", {"a": 1}), ("add", {"a": 2})]
    assert len({call["id"] for call in calls}) == 2


@cases("content, fields, word", {
    "a malformed call": ("botched", {"tools": [ADD]}, "oops"),
    "a call without tools": ("hi", {"model": "plain"}, "get_weather"),
    "what is said where tools are hidden": ("weather?", {"tools": [WEATHER], "tool_choice": "none"}, "Hello"),
})  # fmt: skip
def test_chat_text_that_is_no_call_stays_text(content: str, fields: dict[str, Any], word: str, server: Server) -> None:
    reply = server.chat(content, **fields)
    assert word in reply.message["content"] and not reply.message.get("tool_calls") and reply.finish_reason == "stop"


def test_chat_continues_from_a_tool_result(server: Server) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    reply = server.post("/v1/chat/completions", {"model": "recital", "messages": messages, "tools": [WEATHER]})
    assert (reply.message["content"], reply.finish_reason) == (TEXTS["S"], "stop")


def test_chat_reasoning_is_separated_from_content(server: Server) -> None:
    message, sent = server.chat("think").message, server.streamed("/v1/chat/completions", chatting("think"))
    assert message["content"].strip() == spoken_in(sent).strip() == "Four!!"
    assert message["reasoning_content"].strip() == spoken_in(sent, "reasoning_content").strip() == "two and two"


def arguments_of(call: dict[str, Any]) -> Any:
    """A call's arguments; those of a call that was cut stay the text that came."""
    with contextlib.suppress(ValueError):
        return json.loads(call["arguments"])
    return call["arguments"]


def spelled_chat(server: Server, name: str, **fields: Any) -> tuple[Spelled, Spelled]:
    """Has the speller spell one of SPELLED in a chat, plain and streamed; returns what each reply says."""
    body = chatting(name, model="speller", tools=[WEATHER, ADD], temperature=0, **fields)
    message = server.post("/v1/chat/completions", body).message
    calls = [call["function"] for call in message.get("tool_calls") or []]
    plain = (message["content"] or "", message.get("reasoning_content") or "", calls)
    sent = server.streamed("/v1/chat/completions", body)
    streamed = (spoken_in(sent), spoken_in(sent, "reasoning_content"), assembled(sent))
    return tuple(  # type: ignore[return-value]
        Spelled(SPELLED[name].text, content, thought, tuple((c["name"], arguments_of(c)) for c in calls))
        for content, thought, calls in (plain, streamed)
    )


@pytest.mark.parametrize("name", list(SPELLED))
def test_chat_format_spelled_one_character_at_a_time_is_parsed(name: str, spelling: Server) -> None:
    plain, streamed = spelled_chat(spelling, name)
    assert plain == streamed
    assert replace(plain, content=plain.content.strip(), thought=plain.thought.strip()) == SPELLED[name]


def test_chat_spelled_one_character_at_a_time_is_streamed_so_and_may_be_cut_anywhere(spelling: Server) -> None:
    sent = spelling.streamed("/v1/chat/completions", chatting("prose", model="speller", temperature=0))
    assert [delta["content"] for delta in deltas(sent) if delta.get("content")] == list(SPELLED["prose"].text)
    for length in range(1, len(SPELLED["thought, text and call"].text), 7):
        plain, streamed = spelled_chat(spelling, "thought, text and call", max_tokens=length)
        assert plain == streamed


HOSTILE_TEMPLATES = {
    "a power of powers": "{{ 9 ** (9 ** 9) }}",
    "nine billion letters": "{{ 'a' * 10**10 }}",
    "centred in a billion": "{{ 'a' | center(10**9) }}",
    "a format of a billion": "{{ '%999999999d' % 1 }}",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
                    "{% endfor %}{% endfor %}{% endfor %}",
    "endless recursion": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "output without end": "{% for a in range(99999) %}{% for b in range(99999) %}{{ messages }}{% endfor %}{% endfor %}",
    "doubling": "{% set ns = namespace(s='aaaaaaaa') %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "an index error": "{{ messages[99].content.x }}{{ [][1] }}{{ ''.split(',')[3].a.b }}",
    "a division by zero": "{{ 1 / 0 }}",
}  # fmt: skip


LITTLE_WORK = (  # what runs away burns less of our processors, in as much time as ever on a machine that others keep busy
    ("HELPER_SECONDS = 1.5 ", "HELPER_SECONDS = 0.25 "), ("HELPER_PATIENCE = 4 ", "HELPER_PATIENCE = 24 "),
)  # fmt: skip


def write_hostile(folder: Path) -> None:
    for name, template in HOSTILE_TEMPLATES.items():
        write_recital(folder / f"{name.replace(' ', '-')}.gguf", template=template)
    write_recital(folder / "recital.gguf")


hostile = serving("--max-loaded", "20", write=write_hostile, changes=LITTLE_WORK, load=("recital",))


@pytest.mark.parametrize("name", HOSTILE_TEMPLATES)
def test_hostile_chat_template_is_its_requests_error_and_nobody_elses(name: str, hostile: Server) -> None:
    """A runaway is ended within two seconds (here: of a machine that other tests use too), while others are served."""
    model = name.replace(" ", "-")
    assert hostile.load(model).status == 200
    replies: list[Reply] = []
    asking = threading.Thread(target=lambda: replies.append(hostile.chat("hi", model)))
    waits: list[float] = []
    with quickly(6.0):
        asking.start()
        while not waits or asking.is_alive():
            asked = time.monotonic()
            assert hostile.get("/health").status == 200
            waits.append(time.monotonic() - asked)
            time.sleep(0.05)
        assert_error(replies[0], 400, "invalid_request", "template")
    assert max(waits) < 1
    assert hostile.chat("hi").message["content"] == "Hello wide world"


def test_template_whose_process_gets_no_time_is_the_machines_fault(serve: Serve, tmp_path: Path) -> None:
    script = altered(tmp_path, ("HELPER_SECONDS = 1.5 ", "HELPER_SECONDS = 0.2 "), ("= outcome_of(task)", "= time.sleep(60)"))
    write_recital(tmp_path / "starved.gguf")
    own = serve("--models-dir", tmp_path, "--model", "starved", script=script)
    refused = own.chat("hi", "starved")
    assert_error(refused, 503, "overloaded", "The machine is too busy")
    assert refused.headers["Retry-After"]
    assert own.post("/api/generate", {"model": "starved", "prompt": "hi", "max_tokens": 4}).status == 200


def test_more_runaway_templates_than_helpers_leave_the_others_served(hostile: Server) -> None:
    hostile.load("nested-loops")
    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda _: hostile.chat("hi", "nested-loops"), range(12)))
    assert {r.status for r in replies} <= {400, 503}
    assert hostile.chat("hi").message["content"] == "Hello wide world"


def test_model_without_a_template_stops_at_the_markers_it_is_given(serve: Serve, tmp_path: Path) -> None:
    write_recital(tmp_path / "models" / "plain.gguf", template="")
    server = serve("--models-dir", tmp_path / "models")
    assert server.chat("hi", "plain").status == 200
    assert server.log.read_text().count("no chat template") == 1


THOUGHT_CASES = {
    "at the beginning": ("<think>why</think>So", "why", "So"),
    "behind white space": ("\n <think>why</think>\n\nSo", "why", "So"),
    "in the middle": ("So <think>why</think> not", "", "So <think>why</think> not"),
    "never closed": ("<think>why", "why", ""),
    "a marker that is none": ("<thin air>", "", "<thin air>"),
}


def collected(events: Iterable[Any]) -> dict[int, Any]:
    """The choices of an answer, by their index."""
    choices: dict[int, Any] = {}
    for event in events:
        if isinstance(event, (module.Text, module.Thought, module.CallBegan, module.CallArguments, module.ChoiceEnd)):
            choices.setdefault(event.index, module.Choice()).add(event)
    return dict(sorted(choices.items()))


def parsed(text: str, pieces: Iterable[str], **options: Any) -> dict[str, Any]:
    """What a client is told of a text: content, thought, calls and the reason of its end."""
    schemas: dict[str, Any] = {"get_weather": {}} if options.get("tools") else {}
    parser = module.ChatParser(0, module.ChatFormat(), schemas, "", frozenset())
    events = [e for piece in pieces for e in parser.push(piece)] + list(parser.finish("stop"))
    (choice,) = collected(events).values()
    calls = [(c.name, c.text) for c in choice.calls]
    return {"text": choice.said(), "thought": choice.said("thought"), "calls": calls, "reason": choice.finish_reason}


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "one character at a time"])
@pytest.mark.parametrize("case", THOUGHT_CASES)
def test_thought_only_begins_an_answer(case: str, whole: bool) -> None:
    text, thought, content = THOUGHT_CASES[case]
    said = parsed(text, [text] if whole else text)
    assert (said["thought"], said["text"]) == (thought, content)


def test_pairs_with_blanks_between_cost_linear_time() -> None:
    """Each blank could stand on either side of a missing comma: 140 characters held the interpreter for 13 s."""
    text = "<tool_call>\n{" + ('"x": 1' + " " * 12) * 20 + "!"
    with quickly(2.0):
        assert parsed(text, text, tools=True)["text"] == text


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "one character at a time"])
def test_call_that_was_cut_has_what_came_and_nothing_else(whole: bool) -> None:
    text = 'Well <tool_call>\n{"name": "get_weather", "arguments": {"ci'
    said = parsed(text, [text] if whole else text, tools=True)
    assert (said["text"], said["calls"]) == ("Well", [("get_weather", '{"ci')])


THINKING_TEMPLATE = "{{ messages[-1].content }}<think>"  # the answer begins inside the thought
ALWAYS_BEHIND = (  # as if every prompt ended inside the thought
    "        if self._is_thinking(request, last):\n            return",
    "        if end or not end:\n            return",
)


def write_thinkers(folder: Path) -> None:
    write_speller(folder / "speller.gguf")
    write_recital(folder / "recital.gguf")
    write_recital(folder / "thinker.gguf", template=THINKING_TEMPLATE)
    for name, piece in (("opening", "\n</think>{"), ("foul", "\n</think>[")):  # the marker's token goes on
        write_recital(folder / f"{name}.gguf", tokens=[piece if t == "\n</think>" else t for t in VOCABULARY])


EACH_TOKEN = ("FLUSH_SECONDS = 0.01", "FLUSH_SECONDS = 0.0")  # is sent by itself
thinking = serving("--model", "recital", "--max-loaded", "5", write=write_thinkers, changes=(EACH_TOKEN, ALWAYS_BEHIND))


def thought_of(reply: Reply) -> tuple[str, str]:
    message = reply.message
    return message.get("reasoning_content", "").strip(), message["content"]


@cases("model, budget, thought, content", {
    "none": ("recital", None, "two and two", "Four!!"),
    "unlimited": ("recital", -1, "two and two", "Four!!"),
    "more than enough": ("recital", 100, "two and two", "Four!!"),
    "one token": ("recital", 1, "two and two", "Hello wide world"),
    "nothing": ("recital", 0, "", "Hello wide world"),
    "begun by the prompt, nothing": ("thinker", 0, "", "Hello wide world"),
    "begun by the prompt, two tokens": ("thinker", 2, "Hello wide", "Hello wide world"),
    "begun by the prompt, more than enough": ("thinker", 9, "Hello wide world", ""),
})  # fmt: skip
def test_thought_ends_within_its_budget(model: str, budget: int | None, thought: str, content: str, thinking: Server) -> None:
    fields: dict[str, Any] = {"model": model, "temperature": 0, "thinking_budget_tokens": budget}
    reply = thinking.chat("think", **fields)
    assert thought_of(reply) == (thought, content)
    sent = thinking.streamed("/v1/chat/completions", chatting("think", **fields))
    assert (spoken_in(sent, "reasoning_content").strip(), spoken_in(sent)) == (thought, content)


def test_thoughts_are_counted_also_where_they_are_closed(thinking: Server) -> None:
    usage = thinking.chat("think", temperature=0).json()["usage"]
    reasoning = usage["completion_tokens_details"]["reasoning_tokens"]
    assert reasoning == len(["<think>", "two", " and two"]) < usage["completion_tokens"]
    body = {"model": "recital", "input": "think", "temperature": 0}
    assert thinking.post("/v1/responses", body).json()["usage"]["output_tokens_details"] == {"reasoning_tokens": reasoning}
    assert thinking.chat("hi").json()["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}
    reply = thinking.chat("think", temperature=0, thinking_budget_tokens=1, logprobs=True).json()
    assert reply["usage"]["completion_tokens"] == len(["<think>", "two", *"\n</think>\n\n", "Hello", " wide", " world"])
    said = "".join(token["token"] for token in reply["choices"][0]["logprobs"]["content"])
    assert said.endswith("Hello wide world") and "two and two" in said
    reply = thinking.chat("think", temperature=0, thinking_budget_tokens=1, max_tokens=5)
    assert (reply.finish_reason, reply.json()["usage"]["completion_tokens"]) == ("length", 5)


def test_thought_budget_leaves_a_marker_inside_the_answer_alone(thinking: Server) -> None:
    """Only what an answer begins with is a thought."""
    later = {str(TOKEN_ID["<think>"]): 40, str(TOKEN_ID["Hello"]): 0}  # as the second token
    plain = thinking.chat("hi", temperature=0, max_tokens=6, logit_bias=later)
    limited = thinking.chat("hi", temperature=0, max_tokens=6, logit_bias=later, thinking_budget_tokens=0)
    assert plain.message == limited.message


@pytest.mark.parametrize("value", [-2, 1.5, "x", True], ids=json.dumps)
@pytest.mark.parametrize("field", ["thinking_budget_tokens", "reasoning_budget_tokens"])
def test_thinking_budget_out_of_bounds_is_400(field: str, value: Any, server: Server) -> None:
    assert_error(server.chat(**{field: value}), 400, "invalid_request", field, "-1")


SHAPE = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}


@cases("temperature", {"greedy": 0, "sampled": 1})
@cases("model", {"a token of its own": "recital", "a token that goes on as the schema does": "opening"})
def test_schema_holds_behind_the_thought(model: str, temperature: float, thinking: Server) -> None:
    reply = thinking.chat("think", model, temperature=temperature, response_format={
        "type": "json_schema", "json_schema": {"name": "a", "schema": SHAPE}})  # fmt: skip
    assert reply.message["reasoning_content"].strip() == "two and two"
    assert json.loads(reply.message["content"]) == {"a": 1} and reply.finish_reason == "stop"


@cases("said, model, fields, thought, content, reason", {
    "where a token would break it": ("think", "foul", {"json_schema": SHAPE, "max_tokens": 40}, "two and two", "", "length"),
    "where the model ends inside": ("think", "thinker", {"json_schema": SHAPE}, "Hello wide world", '{"a": 1}', "stop"),
    "where its marker is spelled": (
        "thought", "speller", {"grammar": 'root ::= "\\n\\n" [A-Z] "x"'}, "Two and two?", "Fx", "stop"),
})  # fmt: skip
def test_grammar_holds_behind_the_thought(
    said: str, model: str, fields: dict[str, Any], thought: str, content: str, reason: str, thinking: Server
) -> None:
    reply = thinking.chat(said, model, temperature=0, **fields)
    thoughts, answer = thought_of(reply)  # which begin again and again where no token of the answer may come
    assert (thoughts.partition("<think>")[0].strip(), answer, reply.finish_reason) == (thought, content, reason)


@pytest.mark.parametrize("budget", [0, 1, 2])
@pytest.mark.parametrize("model", ["recital", "thinker"])
def test_schema_holds_behind_a_thought_that_was_closed(model: str, budget: int, thinking: Server) -> None:
    reply = thinking.chat("think", model, temperature=0, json_schema=SHAPE, thinking_budget_tokens=budget)
    assert json.loads(reply.message["content"]) == {"a": 1} and reply.finish_reason == "stop"


@pytest.mark.parametrize("private", [True, False], ids=["private prompts", "shared prompts"])
def test_clients_with_different_keys_share_prompts_only_if_allowed(private: bool, serve: Serve, models: Path) -> None:
    flags = ["--private-prompts"] * private
    own = serve("--models-dir", models, "--api-key", "one", "--api-key", "two", *flags)

    def cached(key: str) -> int:
        body = chatting("A long beginning that some share")
        reply = own.post("/v1/chat/completions", body, Authorization=f"Bearer {key}").json()
        return reply["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("one") == 0
    assert (cached("two") > 0) is not private
    assert cached("one") > 0
    assert_error(own.get("/api/models", Authorization="Bearer three"), 401, "unauthorized")


TYPES: dict[str, dict[str, Any]] = {
    "text": {"type": "string"}, "count": {"type": "integer"}, "share": {"type": "number"}, "yes": {"type": "boolean"},
    "gone": {"type": "null"}, "list": {"type": "array", "items": {}}, "inner": {"type": "object"},
}  # fmt: skip
NAMES = ("get_weather", "add_to_list")
OFFERED: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "description": f"The function {name}", "parameters": {
        "type": "object", "properties": {k: v | {"description": k} for k, v in TYPES.items()}, "required": ["text"]}}}
    for name in NAMES
]  # fmt: skip
CALLS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "one": [("get_weather", {"text": "Paris"})],
    "two": [("get_weather", {"text": "Paris", "count": 1}), ("add_to_list", {"text": "milk and honey", "yes": True})],
    "types": [("get_weather", {"text": "some words", "count": -3, "share": 0.25, "yes": False, "gone": None, "list": [1, "a"],
                               "inner": {}})],
    "nested": [("get_weather", {"text": "some words", "inner": {"deep": {"list": [{"a": [1, 2]}, {"b": {}}]}, "word": "w"}})],
    "quotes": [("get_weather", {"text": 'say "hi", it\'s \\ fine'})],
    "lines": [("get_weather", {"text": "one\ntwo\n\n  three"})],
    "marker": [("get_weather", {"text": "a </tool_call> b"})],
    "unicode": [("get_weather", {"text": "naïve 😀 日本"})],
}


def templates() -> list[Path]:
    """llama.cpp's templates: in the folder SHIMMY_TEMPLATES names, else none."""
    return sorted(map(Path, glob.glob(os.path.join(os.environ.get("SHIMMY_TEMPLATES", "/nowhere"), "*.jinja"))))


def common(a: str, b: str) -> int:
    """How many characters two texts both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


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
    at = common(prompt, whole)
    for opens, closes in ("<>", "[]"):  # not in the middle of a marker
        if (start := prompt.rfind(opens, 0, at)) > prompt.rfind(closes, 0, at):
            at = start
    return (prompt if whole[at:].lstrip().startswith("</") else whole[:at]), whole[at:]


def read(format: Any, prompt: str, text: Any, size: int = 1) -> tuple[str, str, list[tuple[str, Any]], list[Any]]:
    """The content, thought and calls that the parser finds in a text fed in pieces, or of a size each."""
    schemas = {t["function"]["name"]: t["function"]["parameters"] for t in OFFERED}
    parser = module.ChatParser(0, format, schemas, prompt, frozenset())
    pieces = [text[i : i + size] for i in range(0, len(text), size)] if isinstance(text, str) else text
    events = [e for piece in pieces for e in parser.push(piece)] + list(parser.finish("stop"))
    choice = collected(events)[0]
    return choice.said(), choice.said("thought"), [(c.name, json.loads(c.text or "null")) for c in choice.calls], events


def derived(source: str) -> Any:
    return module.Derivation({"": source}, "<bos>", "<eos>", ()).run()


FRAME = (
    "{%% for t in tools or [] %%}{{ t | tojson }}{%% endfor %%}{%% for m in messages %%}<|%%{{ m.role }}|>"
    "{%% if m.reasoning_content %%}<think>{{ m.reasoning_content }}</think>{%% endif %%}{{ m.content }}"
    "{%% if m.tool_calls %%}%s{%% endif %%}<|end|>{%% endfor %%}{%% if add_generation_prompt %%}<|%%assistant|>{%% endif %%}"
).replace("%%", "%").replace("<|%", "<|")
PARAMETERS = "{% for k, v in f.arguments.items() %}%s{{ k }}%s{{ v if v is string else v | tojson }}%s{% endfor %}"


def family(begin: str, call: str, end: str, between: str = "") -> str:
    """A template that writes calls so; `f` is the call's function."""
    between = "{% if not loop.last %}" + between + "{% endif %}"
    calls = "{% for c in m.tool_calls %}{% set f = c.function %}" + call + between + "{% endfor %}"
    return FRAME.replace("%s", begin + calls + end)


def parameters(opens: str, keyed: str, closes: str) -> str:
    a, b, c, d = PARAMETERS.split("%s")
    return a + opens + b + keyed + c + closes + d


NAME, ARGUMENTS = "{{ f.name }}", "{{ f.arguments | tojson }}"
FAMILIES = {
    "hermes": family("", '<tool_call>\n{"name": "' + NAME + '", "arguments": ' + ARGUMENTS + "}\n</tool_call>", "", "\n"),
    "array": family("<calls>[", '{"name": "' + NAME + '", "arguments": ' + ARGUMENTS + "}", "]</calls>", ", "),
    "name is the key": family("<calls>[", '{"' + NAME + '": ' + ARGUMENTS + "}", "]</calls>", ", "),
    "marked name": family("", "[TOOL_CALLS]" + NAME + "[ARGS]" + ARGUMENTS, ""),
    "id in the header": family("<|calls|>", "<|call|>functions." + NAME + ":{{ loop.index0 }}<|args|>" + ARGUMENTS + "<|/call|>",
                               "<|/calls|>"),
    "fenced": family("<|calls|>", "<|call|>function<|sep|>" + NAME + "\n```json\n" + ARGUMENTS + "\n```<|/call|>",
                     "<|/calls|>", "\n"),
    "tags": family("", "<tool_call>\n<function=" + NAME + ">\n" + parameters("<parameter=", ">\n", "\n</parameter>\n") +
                   "</function>\n</tool_call>", "", "\n"),
    "attributes": family("<calls>\n", '<invoke name="' + NAME + '">\n' + parameters('<parameter name="', '">', "</parameter>\n") +
                         "</invoke>\n", "</calls>"),
    "keys and values": family("", "<tool_call>" + NAME + "\n" +
                              parameters("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n") + "</tool_call>", "", "\n"),
    "bare": family("", '{"name": "' + NAME + '", "parameters": ' + ARGUMENTS + "}",
                   "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call a turn') }}{% endif %}"),
}  # fmt: skip


@functools.cache
def derived_once(source: str) -> Any:
    return derived(source)


@pytest.mark.parametrize("said", CALLS)
@pytest.mark.parametrize("name", FAMILIES)
def test_calls_come_back_as_the_template_writes_them(name: str, said: str) -> None:
    """Whole and fed one character at a time."""
    calls = CALLS[said]
    if name == "bare" and len(calls) > 1:
        pytest.skip("this family writes one call a turn")
    prompt, text = turn(FAMILIES[name], calls=calls)
    for size in (len(text), 1):
        content, _, found, _ = read(derived_once(FAMILIES[name]), prompt, text.removesuffix("<|end|>"), size)
        assert (content, found) == ("", calls)


NOT_BACK = {  # templates whose text does not come back, by the first words of their name
    ("MiniMax-M3", "types"): "lists and objects are nested tags", ("MiniMax-M3", "nested"): "objects are nested tags",
}  # fmt: skip


@pytest.mark.skipif(not templates(), reason="SHIMMY_TEMPLATES names no folder of llama.cpp's templates")
@pytest.mark.parametrize("said", CALLS)
@pytest.mark.parametrize("path", templates(), ids=lambda path: path.stem)
def test_calls_of_llama_cpps_templates_come_back(path: Path, said: str) -> None:
    for (name, what), why in NOT_BACK.items():
        if path.name.startswith(name) and said == what:
            pytest.xfail(why)
    ids = ("functions.get_weather:0", "functions.add_to_list:1") if "Kimi-K2" in path.name else ("abcdefgh1", "abcdefgh2")
    source = path.read_text()
    prompt, text = turn(source, ids, calls=CALLS[said])
    end = turn(source, content="some words")[1].partition("some words")[2]
    pick = random.Random(said)
    for pieces in ([text], list(text), *(in_pieces(text, pick) for _ in range(100 if SOAK else 5))):
        content, _, found, _ = read(derived_once(source), prompt, pieces)
        assert found == CALLS[said]
        words = {p for p in module.MARKER.findall(content.replace("<eos>", "")) if not p.isspace()}
        assert words <= set(module.MARKER.findall(end)) or "command-r-plus" in path.name  # which asks for the next turn


REFERRING = {
    "type": "object", "$defs": {"Zip": {"enum": ["12345", "true"]}}, "required": ["zip", "count", "tags"],
    "properties": {"zip": {"$ref": "#/$defs/Zip"}, "count": {"type": "integer", "minimum": 0, "maximum": 9},
                   "tags": {"type": "array", "items": {"enum": ["x", 2]}, "maxItems": 2}},
}  # fmt: skip


def check_forced(source: str) -> None:
    """What the grammar of forced calls writes in a template's form comes back, in any cutting, and fits its schema."""
    format, pick = derived_once(source), random.Random(1)
    tools = [{"type": "function", "function": {"name": name, "parameters": REFERRING}} for name in NAMES]
    start = Automaton(read_ahead(calls_symbol(format.calls[0], tools, "", True))).start
    for _ in range(10):
        state, data = start, b""
        while state.bits and len(data) < 2000 and not (state.ends and pick.random() < 0.5):
            data += bytes([pick.choice(list(bytes_of(state.bits)))])
            state = state.step(data[-1]) or start
        if not state.ends:
            continue  # calls without end
        text = data.decode()
        for pieces in ([text], list(text), in_pieces(text, pick)):
            parser = module.ChatParser(0, format, dict.fromkeys(NAMES, REFERRING), "", frozenset(), forced=True)
            choice = collected([*(e for piece in pieces for e in parser.push(piece)), *parser.finish("stop")])[0]
            assert choice.finish_reason == "tool_calls" and not choice.said(), text
            for call in choice.calls:
                Draft202012Validator(REFERRING).validate(json.loads(call.text))


@pytest.mark.parametrize(
    "source", [*FAMILIES.values(), *(path.read_text() for path in templates())],
    ids=[*FAMILIES, *(path.stem for path in templates())],
)  # fmt: skip
def test_forced_calls_come_back(source: str) -> None:
    check_forced(source)


@pytest.mark.parametrize(
    "opens, closes, prompted",
    [("<think>", "</think>", False), ("<think>", "</think>", True), ("[THINKING]", "[/THINKING]", False)],
)
def test_thought_is_derived_and_kept_apart(opens: str, closes: str, prompted: bool) -> None:
    source = FRAME.replace("<think>", opens).replace("</think>", closes).replace("%s", "")
    source = source.replace("<|assistant|>", f"<|assistant|>{opens}\n") if prompted else source
    format = derived(source)
    assert format.thought == (opens, closes)
    text = f"{'' if prompted else opens}\nTwo and two.\n{closes}\n\nFour, not <think>five</think>."
    for size in (len(text), 1):
        answer = read(format, f"<|assistant|>{opens}\n" if prompted else "<|assistant|>", text, size)
        assert answer[:2] == ("Four, not <think>five</think>.", "Two and two.\n")


HERMES_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"text": "Paris"}}\n</tool_call>'


def test_call_is_told_as_it_is_written() -> None:
    events = read(module.ChatFormat(), "", HERMES_CALL, 1)[3]
    assert isinstance(events[0], module.CallBegan) and events[0].name == "get_weather"
    assert [e.text for e in events[1:-1]] == list('{"text": "Paris"}')
    assert events[-1].finish_reason == "tool_calls"
    text = turn(FAMILIES["tags"], calls=[("get_weather", {"text": 'a "b"', "count": 12})])[1]
    pieces = [e.text for e in read(derived_once(FAMILIES["tags"]), "", text, 1)[3] if isinstance(e, module.CallArguments)]
    assert "".join(pieces) == '{"text": "a \\"b\\"", "count": 12}' and len(pieces) > 8


@pytest.mark.parametrize(
    "text",
    ['Use <tool_call> and </tool_call> around it.', '<tool_call>{"name": oops</tool_call>', "<tool_call>",
     '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>', '<tool_call>\n{"arguments": {}}\n</tool_call>',
     '{"name": "get_weather"}', "a < b <tool", "[1, 2]"],
)  # fmt: skip
def test_text_that_only_looks_like_a_call_stays_text(text: str) -> None:
    for size in (len(text), 1):
        assert read(module.ChatFormat(), "", text, size)[::2] == (text, [])


def test_call_that_was_cut_has_its_arguments_as_far_as_they_came() -> None:
    for cut in range(len('<tool_call>\n{"name": "get_weather"'), len(HERMES_CALL) - len("}\n</tool_call>")):
        parser = module.ChatParser(0, module.ChatFormat(), {"get_weather": {}}, "", frozenset())
        said: list[Any] = [*parser.push(HERMES_CALL[:cut]), *parser.finish("length")]
        *events, end = said
        assert end.finish_reason == "length" and events[0].name == "get_weather"
        assert "".join(e.text for e in events[1:]) == HERMES_CALL[:cut].partition('"arguments": ')[2]


def test_calls_in_an_array_and_with_their_arguments_first_or_as_text_are_read() -> None:
    calls = [("get_weather", {"text": str(i)}) for i in range(3)]
    text = turn(FAMILIES["array"], ids=("aaaaaaaa1", "aaaaaaaa2", "aaaaaaaa3"), calls=calls)[1].removesuffix("<|end|>")
    for size in (len(text), 1):
        assert read(derived_once(FAMILIES["array"]), "", text, size)[::2] == ("", calls)
    first = '<tool_call>{"arguments": {"text": "Paris"}, "name": "get_weather"}</tool_call>'
    inside = '<tool_call>{"name": "get_weather", "arguments": "{\\"text\\": \\"Paris\\"}"}</tool_call>'
    for text in (first, inside):
        assert read(module.ChatFormat(), "", text, 1)[2] == CALLS["one"]


READABLE: dict[str, Any] = {
    "f": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}, "c": {}}},
    "get": {}, "get_weather": {"type": "object", "properties": {"text": {"type": "string"}}},
}  # fmt: skip


@dataclass(frozen=True)
class Answered:
    """What a client is told of an answer."""

    text: str = ""
    calls: tuple[tuple[str, str], ...] = ()  # names, and arguments as they were written
    thought: str = ""
    reason: str = "tool_calls"


def answered(format: Any, pieces: Iterable[str], reason: str = "stop", prompt: str = "", **more: Any) -> Answered:
    parser = module.ChatParser(0, format, READABLE, prompt, frozenset(), **more)
    choice = collected([*(e for piece in pieces for e in parser.push(piece)), *parser.finish(reason)])[0]
    calls = tuple((block.name, block.text) for block in choice.calls)
    return Answered(choice.said("text"), calls, choice.said("thought"), str(choice.finish_reason))


def in_pieces(text: str, pick: random.Random) -> list[str]:
    """The text cut at random, into single characters or larger pieces."""
    pieces, most = list[str](), pick.choice((1, 3, 9, 30))
    while text:
        size = pick.randint(1, most)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


GPT_OSS = "<|channel|>analysis<|message|> {{ messages[0].content }}"
QUOTED = {  # families whose arguments are literals
    "python": CallFormat("<|tools|>[", "(", ")]<|/tools|>", "), ", params=Params("", "=", ", ", "'")),
    "own quotes": CallFormat("<|call>call:", "{", "}<call|>", "}<call|><|call>call:", params=Params("", ":", ",", '<|"|>')),
}
SPOKEN: dict[str, tuple[str, ...]] = {  # by family: answers with calls of READABLE's functions, to be spoiled
    "hermes": (
        '<tool_call>\n{"name": "f", "arguments": {"a": "x", "b": 1}}\n</tool_call>\n<tool_call>\n'
        '{"name": "get_weather", "arguments": {}}\n</tool_call>',
        '<tool_call>[{"arguments": {"a": "q"}, "name": "get"}]</tool_call>', "<tool_call>{'name': 'f'}</tool_call>",
        '<tool_call>{"name":"f","parameters":null}{"type":"function","function":{"name":"get","arguments":"{}"}}</tool_call>'),
    "array": ('<calls>[{"name": "f", "arguments": {"a": "x"}}, {"name": "get", "arguments": {}}]</calls>',),
    "id in the header": ('<|calls|><|call|>functions.get_weather:0<|args|>{"text": "x"}<|/call|><|call|>functions.get:1<|args|>'
                         "{}<|/call|><|/calls|>",),
    "tags": ("<tool_call>\n<function=f>\n<parameter=a>\nhello\n</parameter>\n<parameter=b>\n12\n</parameter>\n</function>\n"
             "</tool_call>",),
    "keys and values": ("<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>x y</arg_value>\n<arg_key>b</arg_key>\n"
                        "<arg_value>3</arg_value>\n</tool_call>", "<tool_call>get\n</tool_call>"),
    "bare": ('{"name": "f", "parameters": {"a": "x"}}; {"name": "get", "parameters": {}}',
             '[{"name": "f", "parameters": {"a": "x"}}]', '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'),
    "python": ("<|tools|>[f(a='it''s', b=1), get(c=[1, 'x'])]<|/tools|>",),
    "own quotes": ('<|call>call:f{a:<|"|>x<|"|>,b:1,c:{d:[1,<|"|>e<|"|>]}}<call|>',),
    "gpt-oss": (
        '<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json'
        '<|message|>{"a":"x"}<|call|>',
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Four.",
        "<|channel|>commentary<|message|>So<|end|><|start|>assistant to=functions.get<|channel|>commentary json<|message|>{}"
        "<|call|>"),
}  # fmt: skip
SPOILS = ["<think>", "</think>", "\n", " ", *"<>{}[]\"',:;x\\", "name", "arguments", "f", "get", "None", "true", "12", "</",
          "<tool_call>", "</tool_call>", "héé", " and ", "\t"]  # fmt: skip


def format_of(name: str) -> Any:
    if name in QUOTED:
        return module.ChatFormat(calls=(QUOTED[name], module.HERMES))
    return derived_once(GPT_OSS if name == "gpt-oss" else FAMILIES[name])


def spoiled(text: str, pick: random.Random) -> str:
    """The text with some of it left out, repeated, or something put in."""
    for _ in range(pick.choice((0, 0, 1, 1, 2, 3, 5))):
        at, size, how = pick.randint(0, len(text)), pick.choice((1, 1, pick.randint(1, 20))), pick.randrange(4)
        text = text[:at] + (text[at + size :] if how == 0 else text[at : at + size] * 2 + text[at + size :] if how == 1 else
                            pick.choice(SPOILS) + text[at:])  # fmt: skip
    return text


@more_under_soak
def test_answer_says_the_same_however_it_is_cut() -> None:
    pick = random.Random(SOAK)
    for _ in range(30_000 if SOAK else 1000):
        name = pick.choice(list(SPOKEN))
        before = pick.choice(("", "", "So ", "<think>hm</think>\n", "<think>\n"))
        text = before + spoiled(pick.choice(SPOKEN[name]), pick) + pick.choice(("", "", " Done.", "\n\nBye"))
        reason, format = pick.choice(("stop", "stop", "length")), format_of(name)
        whole = answered(format, [text], reason)
        assert answered(format, in_pieces(text, pick), reason) == whole, text
        if whole.reason == "tool_calls":
            assert all(isinstance(json.loads(arguments), dict) for _, arguments in whole.calls), text


CALLED = '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>'


def check_in_pieces(format: Any, text: str, wanted: Answered, reason: str = "stop", **more: Any) -> None:
    """The answer is told so, whole and by character."""
    for pieces in ([text], text):
        assert answered(format, pieces, reason, **more) == wanted


@cases("prompt, text, wanted", {
    "the prompt ends with a mark": (
        "<|start|>assistant", "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Four.",
        Answered("Four.", (), "hm", "stop")),
    "thought, words, thought, call": (
        "", "<|channel|>analysis<|message|>one<|end|><|start|>assistant<|channel|>commentary<|message|>So.<|end|><|start|>"
        "assistant<|channel|>analysis<|message|>two<|end|><|start|>assistant<|channel|>commentary to=functions.get "
        "<|constrain|>json<|message|>{}<|call|>", Answered("So.", (("get", "{}"),), "onetwo")),
    "the marker as text": ("", "<|channel|>final<|message|>It is <|channel|>analysis<|message|> that begins it.",
                           Answered("It is <|channel|>analysis<|message|> that begins it.", (), "", "stop")),
})  # fmt: skip
def test_thoughts_stand_behind_markup_of_channels(prompt: str, text: str, wanted: Answered) -> None:
    check_in_pieces(derived_once(GPT_OSS), text, wanted, prompt=prompt)


@cases("text, wanted", {
    "ends with a call": (f"<think>\nI ask.\n{CALLED}\n", Answered("", (("f", '{"a": "x"}'),), "I ask.\n")),
    "ends with two": (f"<think>Ask.{CALLED}\n{CALLED}", Answered("", (("f", '{"a": "x"}'),) * 2, "Ask.")),
    "closes": (f"<think>Say {CALLED}\n</think>\nNo.", Answered("No.", (), f"Say {CALLED}\n", "stop")),
    "goes on": (f"<think>Say {CALLED} and wait", Answered("", (), f"Say {CALLED} and wait", "stop")),
    "only names it": ("<think>With <tool_call> I", Answered("", (), "With <tool_call> I", "stop")),
    "shows it, then does it": (f"<think>So: {CALLED}, now {CALLED}", Answered(
        "", (("f", '{"a": "x"}'),), f"So: {CALLED}, now ")),
    "has half a call": (f"<think>Ask.{CALLED[:40]}", Answered("", (), f"Ask.{CALLED[:40]}", "stop")),
})  # fmt: skip
def test_call_in_a_thought_that_never_closes_is_one(text: str, wanted: Answered) -> None:
    check_in_pieces(module.ChatFormat(), text, wanted)


@cases("arguments, wanted", {
    "null": ("null", {}),
    "none": ("None", {}),
    "Python's words": ('{"a": None, "c": [True, False]}', {"a": None, "c": [True, False]}),
    "Python's quotes": ("{'a': 'it\\'s \"x\"', 'c': 'it's'}", {"a": 'it\'s "x"', "c": "it's"}),
    "raw line breaks": ('{"a": "one\ntwo\tthree"}', {"a": "one\ntwo\tthree"}),
    "trailing commas": ('{"a": "x", "c": [1, 2, ], }', {"a": "x", "c": [1, 2]}),
    "unquoted words": ("{a: Paris, b: 2}", {"a": "Paris", "b": 2}),
    "Python's numbers": ("{'b': 0x10, 'c': [.5, 1_000, +1, 1.]}", {"b": 16, "c": [0.5, 1000, 1, 1.0]}),
    "Python's escapes": ("{'a': '\\x41\\d'}", {"a": "A\\d"}),
    "a tuple": ("{'c': (1, 'x')}", {"c": [1, "x"]}),
    "text of JSON": ('"{\\"a\\": \\"x\\"}"', {"a": "x"}),
    "text of Python": ('"{\'a\': \'x\'}"', {"a": "x"}),
})  # fmt: skip
@pytest.mark.parametrize("key", ["arguments", "parameters"])
def test_arguments_are_mended_where_their_meaning_is_plain(arguments: str, wanted: Any, key: str) -> None:
    text = f'<tool_call>\n{{"name": "f", "{key}": {arguments}}}\n</tool_call>'
    for pieces in ([text], text):
        found = answered(module.ChatFormat(), pieces)
        assert (found.text, found.reason) == ("", "tool_calls")
        assert [(name, json.loads(said)) for name, said in found.calls] == [("f", wanted)]


NO_OBJECTS = ["[1, 2]", "7", "oops", '"words"', ""]


@pytest.mark.parametrize("arguments", [*NO_OBJECTS, '{"a": "x" "b": 1}', '{"a": }', '{"a": 1]', '{"a": -}', '{"a"; 1}'])
def test_arguments_that_are_no_object_are_no_reason_to_run_a_function(arguments: str) -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    for pieces in ([text], text):
        found = answered(module.ChatFormat(), pieces)
        assert found.reason == "stop" and (arguments not in NO_OBJECTS or found == Answered(text, (), "", "stop"))


@cases("name, text, count", {
    "semicolons": ("bare", '{"name": "f", "parameters": {"a": "1"}}; {"name": "f", "parameters": {"a": "2"}}', 2),
    "a bare list": ("bare", '[{"name": "f", "parameters": {"a": "1"}}, {"name": "f", "parameters": {"a": "2"}}]', 2),
    "two objects": ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": "1"}}\n{"name": "f", "arguments": {"a": "2"}}\n'
                              "</tool_call>", 2),
    "a list": ("hermes", '<tool_call>[{"name": "f", "arguments": {"a": "1"}}, {"name": "f", "arguments": {"a": "2"}}]'
                         "</tool_call>", 2),
    "an object inside": ("hermes", '<tool_call>{"id": "7", "type": "function", "function": {"name": "f", "arguments": '
                                   '{"a": "1"}}, "index": 0}</tool_call>', 1),
    "a brace too few": ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "1"}\n</tool_call>', 1),
    "a brace too many": ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "1"}}}\n</tool_call>', 1),
})  # fmt: skip
def test_several_calls_stand_in_one_section(name: str, text: str, count: int) -> None:
    calls = tuple(("f", f'{{"a": "{i}"}}') for i in range(1, count + 1))
    check_in_pieces(derived_once(FAMILIES[name]), text, Answered("", calls))


@cases("name, text, wanted", {
    "behind another's beginning": ("hermes", f'<tool_call>{{"name": "zzz", {CALLED}', '<tool_call>{"name": "zzz",'),
    "behind words about it": ("hermes", f"Use <tool_call> so: {CALLED}", "Use <tool_call> so:"),
    "behind a mark of its own": ("hermes", f"<tool_call>\n{CALLED}", "<tool_call>"),
    "before half of another": ("hermes", CALLED + '\n<tool_call>\n{"name": "f", "ar', '<tool_call>\n{"name": "f", "ar'),
    "before half a mark": ("hermes", f"{CALLED}\n<tool_c", "<tool_c"),
    "before half a pair": ("hermes", CALLED + ', "x": ', ', "x":'),
    "before one of no function": ("bare", '{"name": "f", "parameters": {"a": "x"}}; {"name": "zzz"}', '; {"name": "zzz"}'),
    "before half an argument": ("tags", "<tool_call>\n<function=f>\n<parameter=a>\nx\n</parameter>\n<param", "<param"),
    "behind one of no function": (
        "tags", "<tool_call>\n<function=zzz><tool_call>\n<function=f>\n<parameter=a>\nx\n</parameter>\n</function>",
        "<tool_call>\n<function=zzz>"),
    "with ends too many": ("hermes", CALLED.replace("\n</", "}}\n</") + "</tool_call>", ""),
    "without arguments, with ends too many": ("keys and values", "<tool_call>get</tool_call>\n</tool_call> ] hi", "] hi"),
})  # fmt: skip
def test_text_beside_a_call_that_is_none_is_not_lost(name: str, text: str, wanted: str) -> None:
    calls = (("get", "{}"),) if "get" in text else (("f", '{"a": "x"}'),)
    check_in_pieces(format_of(name), text, Answered(wanted, calls))


@pytest.mark.parametrize("name", SPOKEN)
def test_calls_that_are_cut_leave_no_markup(name: str) -> None:
    """Anywhere, where one is forced; else behind the first."""
    for text in SPOKEN[name]:
        for cut in range(1, len(text)) if "'name'" not in text and "final" not in text else ():
            found = answered(format_of(name), [text[:cut]], "length", forced=True)
            assert "So".startswith(found.text.strip()) and found.reason == "length", text[:cut]
    format, (text, *_) = format_of(name), SPOKEN[name]
    first = next(cut for cut in range(len(text)) if answered(format, [text[:cut]]).reason == "tool_calls")
    assert not any(answered(format, text[:cut], "length").text for cut in range(first, len(text)))


OPENED = '<tool_call>{"name": "f", "arguments": {"a": '


@cases("name, begin, again", {
    "marks": ("hermes", "", "<tool_call>"), "marks in a thought": ("hermes", "<think>", "<tool_call>"),
    "calls in a thought, and prose": ("hermes", "<think>", f"{CALLED} and\n"),
    "calls in a thought": ("hermes", "<think>", f"{CALLED}\n"), "calls": ("bare", "", '{"name": "f", "parameters": {}}; '),
    "half a header": ("hermes", "", '<tool_call>\n{"name": "f", "x": "'),
    "strings before names": ("hermes", "", '<tool_call>{"arguments": \''),
    "arguments first": ("hermes", "", '<tool_call>{"arguments": {"a": "'),
    "blanks": ("hermes", "", "<tool_call>" + " " * 900), "a long word": ("hermes", OPENED, "x"),
    "a long number": ("hermes", OPENED, "1"), "brackets": ("hermes", OPENED, "["), "half lists": ("hermes", OPENED, "[1, "),
    "a long list": ("hermes", OPENED + "[", "1, "), "apostrophes": ("hermes", OPENED + "'", "'x"),
    "half escapes": ("hermes", OPENED + '"', "\\u00"), "many arguments": ("tags", "<tool_call>\n<function=f>\n",
                                                                        "<parameter=a>\nx\n</parameter>\n"),
    "half ends": ("tags", "<tool_call>\n<function=f>\n<parameter=b>\n", "</paramete"),
    "ends of calls": ("tags", "<tool_call>\n<function=f>\n<parameter=a>\n", "\n</function>\n"),
    "half quotes": ("own quotes", '<|call>call:f{a:<|"|>', '<|"'), "dropped markup": ("gpt-oss", "", "<|start|>assistant"),
})  # fmt: skip
def test_reading_an_answer_costs_linear_time(name: str, begin: str, again: str) -> None:
    format, text = format_of(name), begin + again * (30_000 // len(again))
    answered(format, [text[:1000]])  # what is made once
    began = time.thread_time()
    answered(format, [text], "length")
    answered(format, (text[i : i + 4] for i in range(0, len(text), 4)), "length")
    assert time.thread_time() - began < 2  # 0.2 s where nothing else runs


def test_argument_whose_end_is_missing_is_whole_where_the_call_ends() -> None:
    text = "<tool_call>\n<function=f>\n<parameter=a>\nhello\n</function>\n</tool_call>"
    for end in ("", "\n"):
        check_in_pieces(derived_once(FAMILIES["tags"]), text + end, Answered("", (("f", '{"a": "hello"}'),)))
    cut = text.partition("\n</function>")[0]
    check_in_pieces(derived_once(FAMILIES["tags"]), cut, Answered("", (("f", '{"a": "hello'),), "", "stop"))


@pytest.mark.parametrize("before, behind", [("", ""), ("\n", "\n"), ("", "\n\n")])
def test_argument_may_stand_in_cdata(before: str, behind: str) -> None:
    value, more = f"{before}<![CDATA[a </parameter> b]]>{behind}</parameter>", "\n<parameter=b>\n1\n</parameter>"
    text = f"<tool_call>\n<function=f>\n<parameter=a>{value}{more}\n</function>\n</tool_call>"
    check_in_pieces(derived_once(FAMILIES["tags"]), text, Answered("", (("f", '{"a": "a </parameter> b", "b": 1}'),)))


def test_logprobs_go_with_their_own_text() -> None:
    parser = module.ChatParser(0, module.ChatFormat(), {"get_weather": {}}, "", frozenset({"<|quiet|>"}))
    tokens = ["<think>", "hm", "</think>", "One", " <", "|", "<|quiet|>", " two", " <tool", "_x", " three"]
    events: list[Any] = []
    for token in tokens:
        logprob = module.TokenLogprob(token.encode(), -1.0, ())
        events += parser.push("" if token == "<|quiet|>" else token, (logprob,))
    events += parser.finish("stop")
    texts = [e for e in events if isinstance(e, module.Text)]
    assert "".join(e.text for e in texts) == "One <| two <tool_x three"
    spoken = "".join(p.token.decode() for e in texts for p in e.logprobs if p.token != b"<|quiet|>")
    assert spoken == "One <| two <tool_x three"
    assert all(e.logprobs for e in texts if e.text)


class InThisProcess:
    """Runs a helper's tasks here."""

    def run(self, task: Any) -> Any:
        try:
            return task.run()
        except Exception as error:
            raise module.HelperFailed(str(error)) from None


def chat(source: str, *specials: str) -> Any:
    here: Any = InThisProcess()
    return module.Chat(module.ChatFacts({"": source}, "<s>", False, "</s>", specials), here)


def asked(*messages: tuple[str, str], **more: Any) -> Any:
    said = tuple({"role": role, "content": content} for role, content in messages)
    return module.GenerateRequest(messages=said, split_markers=True, **more)


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


MADE = {"tool_calls": [{"id": "abcdefgh1", "type": "function",
                        "function": {"name": "get_weather", "arguments": {"text": "Paris"}}}]}  # fmt: skip
TALKS = {
    "system in the middle": [
        said("system", "Be brief and kind."), said("user", "First question."), said("assistant", "First answer."),
        said("system", "Now be verbose."), said("user", "Second question."), said("assistant", "Second answer."),
        said("user", "Third question.")],
    "system before the answer": [
        said("system", "Be brief and kind."), said("user", "First question."), said("system", "Now be verbose."),
        said("assistant", "First answer."), said("user", "Second question.")],
    "two users": [
        said("user", "First question."), said("user", "And one more."), said("assistant", "First answer."),
        said("user", "Second question."), said("user", "And again one.")],
    "assistant first": [
        said("assistant", "Hello, I am here."), said("user", "First question."), said("assistant", "First answer."),
        said("user", "Second question.")],
    "result of no call": [
        said("user", "First question."), said("assistant", "First answer."),
        said("tool", "Sunny in Paris.", tool_call_id="abcdefgh9"), said("assistant", "Second answer."),
        said("user", "Second question.")],
    "two systems": [
        said("system", "Be brief and kind."), said("system", "Be honest."), said("user", "First question."),
        said("assistant", "First answer."), said("user", "Second question.")],
    "calls": [
        said("system", "Be brief and kind."), said("user", "First question."), said("assistant", "", **MADE),
        said("tool", "Sunny in Paris.", tool_call_id="abcdefgh1"), said("assistant", "First answer."),
        said("system", "Now be verbose."), said("user", "Second question.")],
}  # fmt: skip
STRICT = (  # refuses what Gemma 2's and Mistral's refuse
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MOVED = {  # templates that themselves change what stands earlier, or refuse later what they took before
    "Mistral-Small-3.2": {"system before the answer", "result of no call", "calls"},
    "mistralai-Ministral": {"result of no call"}, "mistralai-Mistral-Nemo": {"result of no call", "calls"},
    "Qwen3.5": {"result of no call", "calls"}, "StepFun3.5": {"result of no call", "calls"},
    "deepseek-ai-DeepSeek-V3.2": {"result of no call", "calls"},
}  # fmt: skip


def check_talk(source: str, talk: str) -> None:
    """All is in the prompt, and what the client had said at an earlier answer stands where it stood then."""
    messages = TALKS[talk]
    tools = OFFERED if talk == "calls" else []

    def render(messages: list[Any]) -> str:
        return str(module.Rendering({"": source}, "<bos>", "<eos>", messages, tools, {}, generation=False).run())

    whole = render(messages)
    assert all(m["content"] in whole for m in messages)
    for k in (k for k, m in enumerate(messages) if k and m["role"] == "assistant"):
        begun = whole[: common(whole, render(messages[:k]))]
        assert all(m["content"] in begun for m in messages[:k])


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize(
    "source", [STRICT, FAMILIES["hermes"], *(path.read_text() for path in templates())],
    ids=["strict", "lenient", *(path.stem for path in templates())],
)  # fmt: skip
def test_conversation_is_folded_append_only(source: str, talk: str, request: pytest.FixtureRequest) -> None:
    if any(f"[{name}" in request.node.name and talk in talks for name, talks in MOVED.items()):
        pytest.xfail("the template itself moves or changes earlier turns")
    check_talk(source, talk)


@pytest.mark.parametrize(
    "specials",
    [("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), ("<|im_start|>", "<|im_end|>"),
     ("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>")],
    ids=["llama", "qwen and SmolLM", "gemma"],
)  # fmt: skip
def test_special_tokens_in_a_users_text_stay_text(specials: tuple[str, ...]) -> None:
    """No segment but the template's own holds a special token's name."""
    words = f"I say {''.join(specials)} here"
    prompt = chat(FAMILIES["hermes"], *specials).prompt(asked(("user", words), ("assistant", words), ("user", words)))
    assert "".join(prompt).count(words) == 3
    assert not any(name in segment for segment in prompt for name in specials)


BEGUN = {  # templates, and what stands behind the user's turn where an answer has begun with "Hello"
    "behind a thought that the prompt opens": (
        FAMILIES["hermes"].replace("<|assistant|>", "<|assistant|><think>\n"), "<|assistant|><think>\n\n\n</think>\n\nHello"),
    "markup before the content": (
        FRAME.replace("{{ m.content }}", "{% if m.role == 'assistant' %}<|final|>{% endif %}{{ m.content }}"),
        "<|assistant|><|final|>Hello"),
    "an empty thought before it": (
        FRAME.replace("{{ m.content }}", "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"),
        "<|assistant|><think>\n\n</think>\n\nHello"),
    "refuses an answer at the end": (
        "{% if messages[-1].role != 'user' %}{{ raise_exception('no user') }}{% endif %}" + FRAME, "<|assistant|>Hello"),
    "trims it": (FRAME.replace("{{ m.content }}", "{{ m.content | trim }}"), "<|assistant|>Hello"),
}  # fmt: skip


@cases("source, wanted", BEGUN)
def test_continued_answer_stands_where_the_template_writes_content(source: str, wanted: str) -> None:
    prompt = chat(source.replace("%s", "")).prompt(asked(("user", "Hi"), ("assistant", "Hello")))
    assert "".join(prompt) == f"<|user|>Hi<|end|>{wanted}"


def test_last_assistant_message_is_continued_unless_the_request_says_no() -> None:
    prompt = chat(FAMILIES["hermes"], "<|end|>").prompt(asked(("user", "A poem"), ("assistant", "Roses are <|end|>")))
    assert "".join(prompt) == "<|user|>A poem<|end|><|assistant|>Roses are <|end|>"
    assert prompt[-1] == "|end|>"  # its special token is text
    prompt = chat(FAMILIES["hermes"]).prompt(asked(("user", "Hi"), ("assistant", "Hello"), continue_final_message=False))
    assert "".join(prompt) == "<|user|>Hi<|end|><|assistant|>Hello<|end|><|assistant|>"


@pytest.mark.parametrize("opened", ["", "<think>\n"], ids=["by the answer", "by the prompt"])
@pytest.mark.parametrize("special", [True, False], ids=["special", "plain"])
def test_answer_that_begins_with_a_thought_goes_on_thinking(opened: str, special: bool) -> None:
    talk = chat(FAMILIES["hermes"].replace("<|assistant|>", f"<|assistant|>{opened}"), *["<think>", "</think>"] * special)
    request = asked(("user", "Hi"), ("assistant", "<think>\nFirst I "))
    prompt = talk.prompt(request)
    assert "".join(prompt) == "<|user|>Hi<|end|><|assistant|><think>\nFirst I "
    parser, choice = talk.parser(request, prompt[-1:], 0), module.Choice()
    for event in [*parser.push("count.\n</think>\n\nFour."), *parser.finish("stop")]:
        choice.add(event)  # type: ignore[arg-type]
    assert (choice.said("thought"), choice.said("text")) == ("count.\n", "Four.")
    assert talk.constraint(replace_field(request, schema_of("messages")), prompt[-1:]).after == "</think>"


def schema_of(field: str) -> Any:
    schema = {"type": "object", "properties": {"a": {"enum": ["one", "two"]}}, "required": ["a"]}
    return module.Constraint(module.json_symbol(field, schema), field)


def replace_field(request: Any, constraint: Any) -> Any:
    return replace(request, sampling=replace(request.sampling, constraint=constraint))


def test_continued_document_fits_its_schema_as_a_whole_or_is_refused_by_name() -> None:
    talk = chat(FAMILIES["hermes"])
    request = replace_field(asked(("user", "Hi"), ("assistant", '{"a": "t')), schema_of("response_format"))
    grammar = talk.constraint(request, talk.prompt(request)[-1:]).grammar
    assert pickle.loads(pickle.dumps(grammar)) is not None
    state = Automaton(read_ahead(grammar)).start
    assert state.forced(9) == b'wo"}'
    end = state.read(b'wo"}')
    assert end and end.ends and state.read(b'{"a') is None
    talk = chat(FAMILIES["hermes"])
    request = replace_field(asked(("user", "Hi"), ("assistant", "Sure: ")), schema_of("response_format"))
    with pytest.raises(InvalidRequest, match="response_format"):
        talk.constraint(request, talk.prompt(request)[-1:])


@pytest.mark.parametrize("sent", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("read", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_in_the_history_reach_the_template_under_its_name(read: str, sent: str) -> None:
    talk = chat(FRAME.replace("%s", "").replace("reasoning_content", read))
    body = {"messages": [said("user", "Hi"), said("assistant", "Hello", **{sent: "They greet."}), said("user", "Bye")]}
    prompt = talk.prompt(module.GenerateRequest(messages=module.read_messages(body)))
    assert "<|assistant|><think>They greet.</think>Hello<|end|>" in "".join(prompt)


def test_template_arguments_that_are_names_of_our_own_change_nothing() -> None:
    args = {"add_generation_prompt": False, "messages": [], "bos_token": "x", "self": 1, "tools": [], "known": "yes"}
    talk = chat(FRAME.replace("%s", "") + "{{ known }}")
    assert "".join(talk.prompt(asked(("user", "Hi"), template_args=args))) == "<|user|>Hi<|end|><|assistant|>yes"


def test_results_have_the_ids_that_their_calls_have_in_the_prompt() -> None:
    """Kimi K2 wants the function's name and the call's number in them, and writes nothing else of a result's call."""
    source = ("{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.id }}{{ c.function }}{% endfor %}"
              "{{ m.tool_call_id }}={{ m.content }};{% endfor %}")  # fmt: skip
    calls = [{"id": name, "type": "function", "function": {"name": name, "arguments": {}}} for name in NAMES]
    messages = [said("assistant", "", tool_calls=calls), *(said("tool", id, tool_call_id=id) for id in reversed(NAMES))]
    telling = next(turns for turns in module.NATIVE if "functions." in str(turns(messages, [])))
    prompt = module.Rendering({"": source}, "", "", *telling(messages, []), {}).run()
    assert prompt.endswith("functions.add_to_list:1=add_to_list;functions.get_weather:0=get_weather;")


@cases("parameters, word", {
    "options that are none": ({"properties": {"a": {"anyOf": 5}}}, "anyOf"),
    "a type that is none": ({"properties": {"a": {"type": 5}}}, "type"),
    "a list of properties": ({"properties": ["a"]}, "properties"),
    "a property that is none": ({"properties": {"a": "string"}}, "properties"),
    "values that are no list": ({"properties": {"a": {"enum": "x"}}}, "enum"),
})  # fmt: skip
def test_malformed_schema_of_a_tool_is_refused_by_name(parameters: Any, word: str, server: Server) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    assert_error(server.chat("hi", tools=[tool]), 400, "invalid_request", "tools[0].function.parameters", word)


def test_function_without_parameters_has_empty_ones() -> None:
    ((tool,), _) = module.read_tools({"tools": [{"type": "function", "function": {"name": "f"}}]})
    assert tool["function"]["parameters"] == {"type": "object", "properties": {}}
    check_in_pieces(module.ChatFormat(), '<tool_call>{"name": "get"}</tool_call>', Answered("", (("get", "{}"),)))


REFUSES_EMPTY = "{% for m in messages %}{% if not m.content %}{{ raise_exception('empty') }}{% endif %}{% endfor %}"
BILLED = "x-anthropic-billing-header: cc_version=2.1; cch=5f3a1;\nYou are Claude Code."


@cases("source, messages, wanted", {
    "an empty turn of the assistant's": (
        REFUSES_EMPTY + FRAME.replace("%s", ""), [("user", "Hi"), ("assistant", ""), ("user", "Hello?")],
        "<|user|>Hi\n\nHello?<|end|><|assistant|>"),
    "Claude Code's billing header": (FAMILIES["hermes"], [("system", BILLED), ("user", "Hi")],
                                     "<|system|>You are Claude Code.<|end|><|user|>Hi<|end|><|assistant|>"),
})  # fmt: skip
def test_conversation_leaves_out(source: str, messages: list[tuple[str, str]], wanted: str) -> None:
    assert "".join(chat(source).prompt(asked(*messages))) == wanted


FORCED = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]},
                                         "days": {"type": "integer", "minimum": 0, "maximum": 9}, "exact": {"type": "boolean"}},
        "required": ["city", "unit"]}}},
    {"type": "function", "function": {"name": "add", "parameters": {
        "type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99},
                                         "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 2}},
        "required": ["a"]}}},
]  # fmt: skip


@pytest.fixture(scope="module")
def box() -> Iterator[Any]:
    """A service in this process with the model in the box."""
    path = str(REPO / "models" / "shimmy-tiny.gguf")
    service = module.Service(module.Catalog([], [path]), module.TableOptions(default=path), module.Settings({"ctx": 1024}))
    yield service
    service.close()


@pytest.mark.parametrize(
    "name, choice",
    [("hermes", "required"), ("hermes", "function:add"), ("array", "required"), ("tags", "required"), ("bare", "required"),
     ("id in the header", "required")],
)  # fmt: skip
@more_under_soak
def test_forced_calls_hold(box: Any, name: str, choice: str) -> None:
    """All of them at temperature 1, on a model that knows nothing of the form: 100 in each form under make soak."""
    count = 100 if SOAK else 40 if (name, choice) == ("hermes", "required") else 10
    talk = chat(FAMILIES[name])
    request = asked(("user", "Is it warm in Paris?"), tools=tuple(FORCED), tool_choice=choice, parallel_tool_calls=False)
    prompt = talk.prompt(request)
    sampling = module.Sampling(max_tokens=300, temperature=1.0, seed=7, constraint=talk.constraint(request, prompt[-1:]))
    forced = module.GenerateRequest(prompts=("".join(prompt),), sampling=sampling, n=count)
    answers = collected(box.generate(forced, module.Cancellation()))
    for index, written in answers.items():
        parser = talk.parser(request, prompt[-1:], index)
        (choice_made,) = collected([*parser.push(written.said("text")), *parser.finish(written.finish_reason)]).values()
        assert choice_made.finish_reason == "tool_calls" and choice_made.said("text") == "", written.said("text")
        [call] = choice_made.calls
        assert call.name == "add" or choice == "required"
        assert {"get_weather": {"city", "unit"}, "add": {"a"}}[call.name] <= set(json.loads(call.text))
    assert len(answers) == count


def test_only_as_much_of_an_answer_is_constrained_as_the_choice_of_tools_says() -> None:
    """One call at most begins at its marker, a forced one behind the thought; a free choice is none of a grammar's business."""
    single = chat(FAMILIES["hermes"]).constraint(asked(("user", "Hi"), tools=tuple(FORCED), parallel_tool_calls=False), ("",))
    assert (single.after, single.param) == ("<tool_call>", "parallel_tool_calls")
    thoughtful = chat(FAMILIES["hermes"].replace("<|assistant|>", "<|assistant|><think>\n"))
    request = asked(("user", "Hi"), tools=tuple(FORCED), tool_choice="required")
    assert thoughtful.constraint(request, thoughtful.prompt(request)[-1:]).after == "</think>"
    for choice in ("auto", "none"):
        free = asked(("user", "Hi"), tools=tuple(FORCED), tool_choice=choice)
        assert chat(FAMILIES["hermes"]).constraint(free, ("",)) is None


def test_special_tokens_are_found_in_time_linear_in_the_text() -> None:
    """Gemma 3 names 6,000 tokens `<unused…>`: an alternation of them all took 5 s for this text."""
    names = module.SpecialNames([f"<unused{i}>" for i in range(6000)] + ["<bos>", "[INST]"])
    with quickly(2.0):
        assert not list(names.spans("<unused" * 32_000))
        assert names.split("a<unused77>b<bos>", "|") == "a<|unused77>b<|bos>"


def test_helpers_are_kept_for_the_next_burst() -> None:
    helpers = module.Helpers()
    rendering = module.Rendering({"": "{% for a in range(90000) %}{% endfor %}{{ messages[0].content }}"}, "", "",
                                 [said("user", "x")], [], {})  # fmt: skip
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(helpers.run, [rendering] * 3)) == ["x"] * 3
        kept = {helper.process.pid for helper in helpers._idle}
        assert len(kept) > 1
        assert list(pool.map(helpers.run, [rendering] * 3)) == ["x"] * 3
    assert kept <= {helper.process.pid for helper in helpers._idle}
    helpers.close()


def test_helper_that_died_while_it_waited_is_replaced() -> None:
    helpers, rendering = module.Helpers(), module.Rendering({"": "x"}, "", "", [], [], {})
    assert helpers.run(rendering) == "x"
    (helper,) = helpers._idle
    helper.process.kill()
    helper.process.wait(HANG)
    assert helpers.run(rendering) == "x"
    helpers.close()


def test_no_thread_to_be_had_is_the_machines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    helpers = module.Helpers()
    helpers.warm()

    def refuse(thread: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Timer, "start", refuse)
    with pytest.raises(module.Overloaded, match="threads"):
        helpers.run(module.Rendering({"": "x"}, "", "", [], [], {}))
    helpers.close()


@linux
def test_helper_that_runs_away_ends_although_its_server_was_killed(serve: Serve, tmp_path: Path) -> None:
    write_recital(tmp_path / "models" / "endless.gguf", template=HOSTILE_TEMPLATES["nested loops"])
    own = serve("--models-dir", tmp_path / "models", script=altered(tmp_path, *LITTLE_WORK))
    own.load("endless")
    with requested(own, Errand("/v1/chat/completions", "endless", {"messages": user("hi")}, {})):

        def helpers() -> list[int]:
            return [p for p in descendants(own.process.pid) if b"helper_main" in Path(f"/proc/{p}/cmdline").read_bytes()]

        (helper,) = eventually(helpers, "a helper")
        own.process.kill()
        own.process.wait(HANG)
        eventually(lambda: not alive(helper), "the helper ends")


# Hostile templates.

MORE_TEMPLATES = {
    "range of a billion": "{{ range(10**9) | list }}",
    "a sum over a billion": "{{ range(10**9) | sum }}",
    "a string that grows": "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s * 9 %}{% endfor %}",
    "a list that grows": "{% set x = [1] * 10**10 %}{{ x }}",
    "a deep include": "{% include 'x' %}{% import '/etc/passwd' as p %}",
    "nesting in the source": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "ifs in the source": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "a pattern": "{{ 'a' * 5000 | wordwrap(1) * 99999 }}",
    "a join": "{{ (['ab' * 100000] * 100000) | join }}",
    "a replacement": "{{ ('a' * 10**6) | replace('a', 'b' * 10**6) }}",
    "an indent": "{{ ('\\n' * 10**6) | indent(10**6) }}",
    "a big number": "{{ 10 ** 10 ** 8 }}",
    "tojson of itself": "{% set x = [] %}{% for i in range(99) %}{% set x = [x, x] %}{% endfor %}{{ x | tojson }}",
    "a way out": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a way out by format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "a way out by attr": "{{ messages | attr('__class__') | attr('__base__') }}",
    "globals of a function": "{{ raise_exception.__globals__['os'].system('id') }}",
    "cycler's globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "self": "{{ self.__dict__ }}{{ self._TemplateReference__context }}",
    "strftime of a long format": "{{ strftime_now('%Y' * 10**8) }}",
    "sleep by macro": "{% macro m(n) %}{% for i in range(9) %}{{ m(n) }}{% endfor %}{% endmacro %}{{ m(1) }}",
}


@pytest.fixture(scope="module")
def helpers() -> Iterator[module.Helpers]:
    made = module.Helpers()
    yield made
    made.close()


def rendered(source: str, helpers: module.Helpers) -> str:
    facts = module.ChatFacts({"": source}, "<s>", False, "</s>", ())
    return "".join(map(str, module.Chat(facts, helpers).prompt(asked(("user", "hi")))))


@pytest.mark.parametrize("name", MORE_TEMPLATES)
def test_runaway_or_escaping_template_ends_with_a_reason(
    name: str, helpers: module.Helpers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HELPER_SECONDS", 0.2)  # ours, of the clock; the process's own bound is 1.5 s of work
    monkeypatch.setattr(module, "HELPER_PATIENCE", 50)  # tests beside it use the processors too
    with quickly(12.0):
        try:
            text = rendered(MORE_TEMPLATES[name], helpers)
        except module.InvalidRequest as error:
            assert "template" in str(error) and len(str(error)) < 1000
        else:
            assert len(text) <= module.MAX_RENDERED and not re.search(r"<class|uid=|root:|module 'os'", text)
    monkeypatch.undo()
    assert rendered("{{ messages[0].content }}", helpers) == "hi"


# What a child says to the server: whoever took it over may write what it likes into the pipe.


def message_of(data: bytes) -> Any:
    """What the server reads from a child that wrote these bytes."""
    return module.Pipe(io.BytesIO(struct.pack("<I", len(data)) + data), io.BytesIO()).receive()


def from_a_child(message: Any) -> bytes:
    """The bytes that a child writes for a message."""
    written = io.BytesIO()
    module.Pipe(io.BytesIO(), written, in_child=True).send(message)
    return written.getvalue()[4:]


CHILDS_MESSAGES = [
    module.Progress(0.5), module.LoadFailed("no \ud800 luck", "room"), module.Alive("decode"),
    module.Accepted(1, 9), module.Loaded(256, 512, module.ChatFacts({"": "t"}, "<s>", True, "</s>", ("a",)), ("n",)),
    module.Stepped((module.Piece(3, "é\n", (module.TokenLogprob(b"\xc3", -math.inf, (b"a", b"\xff"), (-0.5, -1.0)),), 1),
                    module.Vectors(4, (b"\0" * 9, b"")), module.Tokens(5, (1, 2), ()),
                    module.Finished(3, "stop", 1, 2, 0, 0.1, 0.2), module.Failed(6, "server_error", "d", None, (1, 2))), 2, 7),
    module.ChatFormat(),
]  # fmt: skip


@pytest.mark.parametrize("message", CHILDS_MESSAGES, ids=lambda m: type(m).__name__)
def test_message_of_a_child_arrives_as_it_was(message: Any) -> None:
    assert message_of(from_a_child(message)) == message


@cases("data", {
    "a pickle that calls": b"cshimmy\nload_tools\n(S'/tmp/x'\ntR.",
    "a pickle that sets attributes": b"cshimmy\nAccess\n(N}S'check'\ncshimmy\nAccepted\nstb.",
    "another type": b'{"type": 99, "fields": []}', "a type by name": b'{"type": "Access", "fields": []}',
    "a negative type": b'{"type": -99, "fields": []}', "too few fields": b'{"type": 0, "fields": []}',
    "too many": b'{"type": 0, "fields": [1, 2, 3]}', "a field of another kind": b'{"type": 4, "fields": ["1", 2]}',
    "no fields": b'{"type": 0}', "no bytes": b'{"bytes": 5}', "deep": b"[" * 100_000, "no JSON": b"\xff\xfe", "nothing": b"",
})  # fmt: skip
def test_what_is_no_message_is_an_error_and_changes_nothing(data: bytes) -> None:
    before = dict(vars(module.Access))
    with pytest.raises((ValueError, LookupError, TypeError, RecursionError)):
        message_of(data)
    assert dict(vars(module.Access)) == before
    with pytest.raises(ValueError, match="4294967295 bytes"):  # a length is not believed
        module.Pipe(io.BytesIO(b"\xff\xff\xff\xff" + data), io.BytesIO()).receive()


def test_fuzzed_messages_of_a_child_are_messages_or_errors() -> None:
    """100,000 of them under `make soak`."""
    choose, valid = random.Random(5), [from_a_child(message) for message in CHILDS_MESSAGES]
    kinds, before = tuple(module.sendable()), sorted(vars(module))
    for _ in range(100_000 if SOAK else 3000):
        data = bytearray(choose.choice(valid))
        for _ in range(choose.randrange(1, 4)):
            at = choose.randrange(len(data))
            parts = [b"", b"{", b"[", b'"', b"9", b"null", b'"type"', bytes([choose.randrange(256)])]
            data[at : at + choose.randrange(3)] = choose.choice(parts)
        try:
            found = message_of(bytes(data))
        except (ValueError, LookupError, TypeError, RecursionError):
            continue
        assert isinstance(found, (*kinds, dict, list, str, int, float, bytes, type(None)))
    assert sorted(vars(module)) == before


def test_engine_that_writes_what_is_no_message_ends_and_nothing_else(serve: Serve, models: Path, tmp_path: Path) -> None:
    hostile = ("        data = json.dumps(message, default=json_form,",
               "        if isinstance(message, Stepped) and not os.path.exists('once'):\n"
               "                open('once', 'w').close()\n"
               "                self._writer.write(struct.pack('<I', 50) + b'cshimmy\\nAccess\\n(N}'.ljust(50))\n"
               "                self._writer.flush()\n"
               "            data = json.dumps(message, default=json_form,")  # fmt: skip
    own = serve("--models-dir", models, script=altered(tmp_path, hostile))
    assert_error(own.generate(), 500, "generation_failed")
    assert own.generate().text == TEXTS[":"] and own.get("/health").status == 200


# ── Strings and numbers ───────────────────────────────────────────────────────────────────────────────────────────────


def each(**values: list[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test by the values of one name."""
    name, found = next(iter(values.items()))
    return pytest.mark.parametrize(name, found)


@dataclass(frozen=True)
class Strings:
    """What strings must be, in the words of a schema; lengths in characters."""

    low: int = 0
    high: int | None = None
    patterns: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    not_formats: tuple[str, ...] = ()
    excluded: frozenset[str] = frozenset()

    @functools.cached_property
    def shape(self) -> module.Texts:
        groups = [("pattern", self.patterns, True), ("pattern", self.unlike, False),
                  ("format", self.formats, True), ("format", self.not_formats, False)]  # fmt: skip
        rules = [(key, value, wanted) for key, values, wanted in groups for value in values]
        texts = module.intersection(module.texts_by(*rule) for rule in rules)
        return module.but_not(module.sized(texts, self.low, math.inf if self.high is None else self.high), self.excluded)


def string_symbol(strings: Strings) -> module.Symbol | None:
    return module.string_symbol(strings.shape)


def string_fits(strings: Strings, text: str) -> bool:
    return module.has(strings.shape, text)


def first_state(shape: Strings | NumberShape) -> State:
    """The state before a string or number of a shape."""
    symbol = string_symbol(shape) if isinstance(shape, Strings) else number_symbol(shape)
    assert symbol is not None
    return Automaton(symbol).start


def reads(shape: Strings | NumberShape, text: str | bytes) -> bool:
    """Whether a JSON text is read to its end."""
    state = first_state(shape).read(text if isinstance(text, bytes) else text.encode())
    return state is not None and state.ends


def takes(shape: Strings, text: str) -> bool:
    return reads(shape, json.dumps(text, ensure_ascii=False))


def random_text(shape: Strings | NumberShape, seed: int, patience: int = 40) -> str | None:
    """A JSON text, byte by byte at random; after some of them it ends where it may. None where chance led nowhere near an end."""
    chance, state, text = random.Random(seed), first_state(shape), b""
    while not (state.ends and (not state.bits or chance.random() < 0.3)):
        options = list(bytes_of(state.bits))
        assert options, f"{shape} leads into a dead end behind {text!r}"
        quote = 34 in options and len(text) > 1 and (len(text) > patience or chance.random() < 0.2)
        text += bytes([34 if quote else chance.choice(options)])
        following = state.step(text[-1])
        assert following is not None
        state = following
        if len(text) > 3000:
            return None
    return text.decode()


def pattern(*texts: str, **more: object) -> Strings:
    return Strings(patterns=texts, **more)  # type: ignore[arg-type]


NO_JSON: list[str | bytes] = [
    b'"\\ud83d"', b'"\\ude00"', b'"\\ud83d\\u0041"', b'"\\ud83dx"', b'"a\nb"', b'"\\x41"', b'"\xc0\x80"', b'"\xed\xa0\x80"',
    b'"\xf4\x90\x80\x80"', b'"\xe0\x80\x80"', b'"\\u12g4"', b'"abc'
]  # fmt: skip


def test_string_without_conditions_is_one_state():
    state = first_state(Strings()).read(b'"')
    assert state is not None and state.read(b"abc") is state and state.read("é\\n\\ud83d\\ude00".encode()) is state


@each(text=['"\U0001f600\U0001f600"', '"\\ud83d\\ude00a"', '"ab"'])
def test_length_counts_code_points(text):
    assert [reads(shape, text) for shape in (Strings(low=2, high=2), Strings(high=1), Strings(low=3))] == [True, False, False]


YES_AND_NO = [
    ("^abc[0-9]$", ["abc5"], ["abc", "xabc5", "abc5\n"]),
    ("^a|b$", ["a", "axx", "xxb"], ["xax", "bx"]),
    ("(^a)b", ["ab", "abx"], ["xab"]),
    ("a{2,3}", ["aa", "xaaaax"], ["a", "axa"]),
    ("^a{2,3}$", ["aa", "aaa"], ["a", "aaaa"]),
    ("^(a{2,3}){2,}?$", ["aaaa", "aaaaaaa"], ["aaa"]),
    ("^x{,2}$", ["", "xx"], ["xxx"]),
    ("((^|, )(foo|bar))+$", ["foo", "foo, bar", "x, foo"], ["xfoo", "foo,"]),
    ("^((foo|bar)(,|$))+", ["foo", "foo,", "foo,bar", "foo,baz"], ["foob", "x"]),
    ("^(?:a|$){2}$", ["aa", "a", ""], ["aaa"]),
    ("(^|a){2}b$", ["aab", "ab", "b"], ["xb", "xab"]),
    ("^$|^x", ["", "xy"], ["y"]),
    ("$^", [""], ["a"]),
    ("^(?!foo)", ["bar", "fo", ""], ["foo", "foox"]),
    ("^(?!foo$)[a-z]+$", ["fo", "foox"], ["foo"]),
    ("^(?=.*[A-Z])(?=.*[0-9]).{3,}$", ["A1b", "xx9X"], ["abc", "A1"]),
    ("^((?!foo).)*$", ["abc", "fo", ""], ["foo", "xfoox"]),
    ("a(?=b)", ["ab"], ["a", "ac"]),
    ("^[^]$", ["\n", "x"], ["", "xx"]),
    ("^.$", ["x", "\U0001f600"], ["\n", "\u2028", ""]),
    ("^\\w\\d\\s$", ["a1 ", "_0\ufeff"], ["é1 ", "a٣ "]),
    ("^[\\W\\D\\S]$", ["é", "1"], ["ab"]),
    ("^\\p{Lu}\\P{L}$", ["É1"], ["é1", "Éé"]),
    ("^\\p{Ll}\\P{Lo}$", ["\ufb01\ufb01"], ["\ufb01\ufb50"]),
    ("^(\\p{Extended_Pictographic}|\\p{Emoji_Component})+$", ["\U0001f600", "\u2764\ufe0f", "1\u20e3"], ["", "a", "\U0001f600a"]),
    ("^\\u00e9\\x41\\u{1F600}\\ud83d\\ude00\\cJ$", ["éA\U0001f600\U0001f600\n"], ["éA"]),
    ("^[a\\-z\\]/\\/-]$", ["a", "-", "]", "/"], ["b"]),
    ("^[\\w-.]$", ["a", "-", "."], ["+"]),
    ("^(?<name>a)(?P<other>b)(?:c)(?#d)$", ["abc"], ["abcd"]),
    ("^{a}]$", ["{a}]"], ["a"]),
    ("\\Aab\\Z", ["ab"], ["abc"]),
    ("", ["", "x"], []),
    ("^(a|a)*$", ["", "aaa"], ["b"]),
    ("^(a*)*(b?){3}$", ["aab", "bbb"], ["bbbb"]),
]


@pytest.mark.parametrize("text, yes, no", YES_AND_NO)
def test_pattern_takes_what_it_matches(text, yes, no):
    for example, wanted in [(one, True) for one in yes] + [(one, False) for one in no]:
        assert takes(pattern(text), example) is wanted and string_fits(pattern(text), example) is wanted
        assert string_fits(Strings(unlike=(text,)), example) is not wanted


@each(text=[
    "(a)\\1", "\\bfoo", "(?<=a)b", "(?<!a)b", "(?i)a", "\\k<a>", "\\q", "\\p{Greek}", "\\uD8ZZ\\uDCZZ", "(", "a)", "[a", "*a",
    "a**", "a{2,1}", "[z-a]", "(?:(?!b)a){2}", "\\", "a{9999999999}"
])  # fmt: skip
def test_pattern_that_cannot_be_honoured_is_refused_by_name(text):
    with pytest.raises(InvalidRequest, match="pattern"):
        string_symbol(pattern(text))


@each(
    case=[(("^abc[0-9]$",), b'"abc'), (('^a"\n\x1f[0-9]$',), b'"a\\"\\n\\u001f'), (("^é\U0001f600$",), '"é\U0001f600"'.encode())]
)
def test_pattern_forces_text(case):
    assert first_state(pattern(*case[0])).forced(100) == case[1]
    last_left = pattern("^(red|green|blue)$", excluded=frozenset(["red", "green"]))
    assert first_state(last_left).forced(100) == b'"blue"'


@each(shape=[
    pattern("^a+$", "^b+$"), pattern("^(abc)*$", low=4, high=5), pattern("^a$", excluded=frozenset("a")),
    Strings(low=2, high=1), pattern("^[a-c]{2}$", unlike=("[ab]", "^.c")), Strings(formats=("ipv4", "ipv6")),
    Strings(formats=("uuid",), high=35), pattern("[^]^")
])  # fmt: skip
def test_string_that_cannot_be_is_none(shape):
    assert string_symbol(shape) is None


@cases("one, two, meet", {
    "patterns of a common text": ({"pattern": "^a+b$"}, {"pattern": "^[ab]{3}$"}, True),
    "patterns without one": ({"pattern": "^a+$"}, {"pattern": "b"}, False),
    "a length and a pattern": ({"minLength": 3}, {"pattern": "^(abc)*$"}, True),
    "a length between two texts": ({"minLength": 4, "maxLength": 5}, {"pattern": "^(abc)*$"}, False),
    "an integer between": ({"type": "integer", "exclusiveMinimum": 1}, {"maximum": 2}, True),
    "no integer between": ({"type": "integer", "exclusiveMinimum": 1}, {"exclusiveMaximum": 2}, False),
})  # fmt: skip
def test_schemas_meet_where_a_value_fits_both(one, two, meet):
    kind = {"type": "number" if "type" in one else "string"}
    schemas = [{**kind, **one}, {**kind, **two}]
    if meet:
        begin({"allOf": schemas})
    else:
        begin({"oneOf": schemas})  # told apart, with no more said
        with pytest.raises(InvalidRequest, match="no document"):
            begin({"allOf": schemas})


LETTERS = some.text("ab1-\n\U0001f600", max_size=6)
PATTERNS = some.sampled_from([
    "^a", "b$", "a.b", "^[ab]*$", "(ab)+", "^(aab?)*$", "^.{2,4}$", "1|-", "^(?!a)", "^((?!ab).)*$", "^[^1]*$", "(a|b){3}",
    "^(..)*$", "^(...)*$", "^(a|1)*b?$", "^$|..", "a*b*"
])  # fmt: skip
SHAPES = some.builds(
    Strings,
    low=some.integers(0, 5),
    high=some.none() | some.integers(2, 9),
    patterns=some.lists(PATTERNS, max_size=2).map(tuple),
    unlike=some.lists(PATTERNS, max_size=2).map(tuple),
    excluded=some.frozensets(LETTERS, max_size=4),
)


def is_right(shape: Strings, text: str) -> bool:
    """As `re` says."""
    dotted = text.replace("\u2028", "\n").replace("\r", "\n").replace("\u2029", "\n")
    return (
        shape.low <= len(text) <= (9999 if shape.high is None else shape.high)
        and text not in shape.excluded
        and all(re.search(one.replace("$", r"\Z"), dotted) for one in shape.patterns)
        and not any(re.search(one.replace("$", r"\Z"), dotted) for one in shape.unlike)
    )


@more_under_soak
@fuzz(80)
@hypothesis.given(SHAPES, LETTERS, some.integers(0, 999))
def test_string_of_any_shape_is_as_re_says(shape, text, seed):
    symbol = string_symbol(shape)
    assert symbol is not None or not is_right(shape, text)
    assume(symbol is not None)
    assert takes(shape, text) == string_fits(shape, text) == is_right(shape, text)
    written = random_text(shape, seed)
    assert written is None or is_right(shape, json.loads(written))


RIGHT = Draft202012Validator.FORMAT_CHECKER


@each(name=[name for name in FORMATS if name != "relative-json-pointer"])  # jsonschema refuses 101#
def test_format_is_what_jsonschema_accepts(name):
    texts = [random_text(Strings(formats=(name,)), seed) for seed in range(20)]
    assert all(RIGHT.conforms(json.loads(text), name) for text in texts if text is not None)
    assert any(texts)


LONGEST_NAME = ".".join(["a" * 62] * 4) + "a"  # 253 characters
OF_FORMATS: dict[str, tuple[list[str], list[str]]] = {  # what is of a format, and what is not
    "date": (["2024-02-29"], ["2023-02-29", "1900-02-29", "2020-04-31", "0000-01-01"]),
    "date-time": (["1985-04-12T23:20:50.52Z", "1937-01-01t12:00:27.87+00:20"], ["2020-01-01 00:00:00Z"]),
    "time": (["08:30:06Z"], ["24:00:00Z", "12:00:00"]), "duration": (["P4Y1M2DT3H4M5S", "P2W", "PT36H"], ["P", "P1YT"]),
    "email": (["joe.o'neil+x@example.com", '"joe bloggs"@[127.0.0.1]'], ["a.b.c", ".a@b.c"]),
    "hostname": (["a-b.example", "a-b", "a--b", "abc--d", "a-b-c.de", "abcd", "ab-d", "x" * 63, "a1-b", LONGEST_NAME],
                 ["-a.b", "a_b", "a" * 64, LONGEST_NAME + ".a", "xn--X", "a.xn--07jt112bpxg", "XN--aa---o47jg78q", "ab--c"]),
    "ipv4": (["87.10.0.1"], ["256.1.1.1", "01.1.1.1"]),
    "ipv6": (["::ffff:192.168.0.1", "1:2::8", "::"], ["1::2::3", "1:2:3:4:5:6:7"]),
    "uuid": (["2EB8AA08-aa98-11ea-b4aa-73b441d16380"], ["2eb8aa08aa9811eab4aa73b441d16380"]),
    "uri": (["http://foo.bar/?baz=qux#quux", "urn:oasis:names:x:1.0", "http://[::1]:80/%C3", "mailto:a@b.c"],
            ["/abc", "http://a b", "http://a/%zz"]),
    "uri-reference": (["/abc?q#f", "//a/b", ""], ["\\a"]), "iri": (["http://ƒøø.ßår/?∂éœ"], []),
    "json-pointer": (["/foo/~0~1/"], ["/~2"]), "relative-json-pointer": (["1/foo", "0#"], ["01/a"]),
    "regex": (["^([a-z]+)\\d{3}$"], ["(a"]), "unheard-of": (["x"], []),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_FORMATS)
def test_format_takes_its_texts_alone(name):
    shape, (yes, no) = Strings(formats=(name,)), OF_FORMATS[name]
    assert [text for text in yes if not takes(shape, text)] == [text for text in no if takes(shape, text)] == []


def test_format_that_cannot_be_honoured_is_refused_by_name():
    for shape in (Strings(formats=("uri-template",)), Strings(not_formats=("regex",)), Strings(not_formats=("hostname",))):
        with pytest.raises(InvalidRequest, match="format"):
            string_symbol(shape)


HOSTILE_PATTERNS = [
    "(a+)+$",
    "^(a|a)*$",
    "^(a{0,10000}){0,10000}$",
    "^(((a{0,1000}b){0,1000}c){0,1000}d){0,1000}$",
    "(" * 10_000,
    "[" * 10_000,
    "(" * 5000 + ")" * 5000,
    "^" + "a?" * 3000 + "a" * 3000 + "$",
    "(x+x+)+y",
    "^(" + "|".join(f"w{n}" for n in range(2500)) + ")$",
    "((((((((^a)*)*)*)*)*)*)*)*b",
    "(a|b)*a(a|b){200}$",
    "^" + "(?=.*a)" * 500,
    "(?!" * 30 + "a" + ")" * 30,
    "^(" + "|".join(f"[{chr(0x4E00 + n)}-{chr(0x7E00 + n)}]" for n in range(2000)) + ")*$",
]


@each(number=list(range(len(HOSTILE_PATTERNS))))
def test_hostile_pattern_is_served_or_refused(number):
    began = time.thread_time()
    with contextlib.suppress(InvalidRequest):
        random_text(pattern(HOSTILE_PATTERNS[number]), 1)
    assert time.thread_time() - began < 20  # for ever, it would take


def test_number_never_begins_what_bounds_forbid():
    assert first_state(NumberShape(low=(0, False))).read(b"-") is None
    assert first_state(NumberShape(True, (12, False), (17, False))).bits == 1 << ord("1")
    assert first_state(NumberShape(True, (7, False), (7, False))).forced(9) == b"7"
    assert first_state(NumberShape(True, (100, False), None, (1000,))).read(b"0") is None


READ: list[tuple[Strings | NumberShape, list[str], Seq[str | bytes]]] = [
    (Strings(), ['""', '"abc"', '"\\n\\u00e9\\/"', '"é\U0001f600"', '"\\ud83d\\ude00"', '"\\uD83D\\uDE00x"', '"\x7f"'], NO_JSON),
    (NumberShape(), ["0", "-0", "1.5", "1e5", "-1.5E-07", "123456", "0.001"],
     ["01", "1.", "-", ".5", "1e", "+1", "--1", "0x1", "1" * 99, "1e400"]),
    (NumberShape(low=(0, False), high=(1, False)), ["1e-06", "1.0E-290", "0.5"], ["1e0", "1e1", "2e-1", "10e-3", "-1e-3"]),
    (NumberShape(low=(0, True)), ["1e100", "2.5e+20", "1e-100"], ["0e1", "1e400", "-1e1"]),
    (NumberShape(high=(-5, False)), ["-9e3"], ["-9e-1", "1e3"]),
    (NumberShape(high=(10, True)), ["9e-1", "1e-5"], ["9e1", "1e1"]),
    (NumberShape(True, (0, False)), ["100"], ["1e2"]),
    (NumberShape(), ["1e100", "12.5e-120", "0e1"], ["1e400", "1e0001"]),
    (NumberShape(high=(1, True)), ["0.999999"], ["0.99999999999999999", "1"]),  # as near to it as doubles are
]  # fmt: skip


@pytest.mark.parametrize("shape, yes, no", READ)
def test_strings_and_numbers_are_read_and_exponents_keep_their_bounds(shape, yes, no):
    assert [text for text in yes if not reads(shape, text)] == [text for text in no if reads(shape, text)] == []


@each(shape=[
    NumberShape(True, (1, True), (2, True)), NumberShape(False, (1, False), (6, False), (7,)),
    NumberShape(False, (3, True), (3, False)), NumberShape(True, not_multiples=(1,)),
    NumberShape(multiples=(6,), not_multiples=(3,))
])  # fmt: skip
def test_number_that_cannot_be_is_none(shape):
    assert number_symbol(shape) is None


@each(shape=[
    NumberShape(low=(float("inf"), False)), NumberShape(multiples=(0,)), NumberShape(multiples=(-1,)),
    NumberShape(high=(10**999, False)), NumberShape(multiples=(1e-99,))
])  # fmt: skip
def test_number_out_of_proportion_is_refused(shape):
    with pytest.raises(InvalidRequest):
        number_symbol(shape)


NUMBERS = some.integers(-30, 30) | some.integers(-(10**12), 10**12) | some.integers(-900, 900).map(lambda n: n / 100)
BOUNDS = some.none() | some.tuples(NUMBERS, some.booleans())
NUMBER_SHAPES = some.builds(
    NumberShape,
    some.booleans(),
    BOUNDS,
    BOUNDS,
    some.lists(some.sampled_from([1, 2, 3, 7, 10, 0.1, 0.01, 2.5, 0.25, 100]), max_size=2).map(tuple),
    some.lists(some.sampled_from([1, 2, 3, 0.1]), max_size=1).map(tuple),
)


@more_under_soak
@fuzz(80)
@hypothesis.given(NUMBER_SHAPES, NUMBERS, some.integers(0, 999))
def test_number_of_any_shape_is_as_arithmetic_says(shape, value, seed):
    symbol = number_symbol(shape)
    assert symbol is not None or not number_fits(shape, value)
    assume(symbol is not None)
    value = int(value) if value == int(value) else value
    assert reads(shape, json.dumps(value)) == number_fits(shape, value)
    written = random_text(shape, seed)
    assert written is not None and number_fits(shape, json.loads(written))


def test_states_are_few_and_excluded_texts_many_and_long():
    text = Automaton(string_symbol(pattern("^[a-z]{3}-[0-9]+$")))  # type: ignore[arg-type]
    for word in ("abc-1", "xyz-22", "qqq-9999999"):
        assert text.start.read(f'"{word}"'.encode()) is not None
    assert len(text._states) < 12
    names = frozenset(["a" * n for n in range(1000)] + [f"name{n}" for n in range(1000)])
    shape = Strings(excluded=names)
    assert takes(shape, "a" * 1000) and takes(shape, "name1000") and not takes(shape, "aaa") and not takes(shape, "name12")


SEARCHED = Strings(patterns=("a.{5}b", "c.{4}d"), unlike=("aa", "bd"), high=40)  # a way to its end must be searched


def test_pattern_is_searched_for_every_text_as_for_the_first():
    pick = random.Random(1)
    for _ in range(100):  # a machine once had 20,000 steps of search for all its life
        here = first_state(SEARCHED)
        while here.bits:
            here = here.step(pick.choice([byte for byte in b'abcd"' if here.bits >> byte & 1] or [here.bits.bit_length() - 1]))
    texts = ("".join(pick.choices("abcdx", k=pick.randint(20, 40))) for _ in range(1000))
    assert all(takes(SEARCHED, text) for text in texts if string_fits(SEARCHED, text))


@contextlib.contextmanager
def short_turns() -> Iterator[None]:
    """The thread's turn is over at once."""
    TURN.begin(0.0)
    try:
        yield
    finally:
        TURN.begin(math.inf)


def asked_again(here: State, data: bytes) -> tuple[State, int]:
    """The state behind some bytes, and how many short turns that took."""
    turns = 1
    with short_turns():
        while True:
            try:
                found = here.read(data)
                assert found is not None
                return found, turns
            except NotYet:
                turns += 1
                TURN.begin(0.0)


def test_search_goes_on_in_the_next_turn():
    shape = Strings(patterns=("x.{3}b", "c.{2}d"), unlike=("aa", "bd"), high=30)
    here, turns = asked_again(Automaton(string_symbol(shape)).start, b'"xc')
    assert turns > 2 and here.bits
    differing = {"type": "array", "items": {"enum": list(range(20))}, "minItems": 2}
    here, turns = asked_again(begin({"type": "array", "uniqueItems": True, "items": differing}), b"[[1, 2], [1")
    assert turns > 1 and here.bits
    here, turns = asked_again(begin(wide_object(count=20_000)), b'{"p19999": null}')
    assert turns > 60 and here.ends


# ── Structured output ─────────────────────────────────────────────────────────────────────────────────────────────────
# A JSON schema constrains what the model writes, or is rejected.


@cases("schema, documents", {
    "a choice": ({"type": "string", "enum": ["yes", "no"]}, ("yes", "no")),
    "the keys of an object": ({"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
                               "additionalProperties": False}, ({"ok": True}, {"ok": False})),
    "one document": ({"const": [1]}, ([1],)),
})  # fmt: skip
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_json_schema_constrains_the_answer(schema: Any, documents: tuple[Any, ...], ignore_eos: bool, server: Server) -> None:
    """It ends when the document is complete, whatever a request says of the end token."""
    reply = server.generate("Well", "dice", json_schema=schema, max_tokens=100, ignore_eos=ignore_eos)
    assert json.loads(reply.text) in documents and reply.finish_reason == "stop"


SCHEMAS: dict[str, tuple[dict[str, Any], Callable[[Any], bool]]] = {
    "bounded integer": ({"type": "integer", "minimum": -12, "maximum": 345}, lambda v: -12 <= v <= 345),
    "enum": ({"enum": ["red", "green", 3, None]}, lambda v: v in ("red", "green", 3, None)),
    "const": ({"const": {"a": [1, 'quo"te']}}, lambda v: v == {"a": [1, 'quo"te']}),
    "bounded array":
    ({"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4}, lambda v: 2 <= len(v) <= 4),
    "prefixItems":
    ({"type": "array", "prefixItems": [{"type": "null"}, {"const": "é"}], "items": False}, lambda v: v == [None, "é"]),
    "bounded string": ({"type": "string", "minLength": 3, "maxLength": 5}, lambda v: 3 <= len(v) <= 5),
    "date": ({"type": "string", "format": "date"}, lambda v: re.fullmatch(r"\d{4}-\d\d-\d\d", v) is not None),
    "several types": ({"type": ["boolean", "null"]}, lambda v: v in (True, False, None)),
    "anyOf": ({"anyOf": [{"const": 1}, {"const": 2}]}, lambda v: v in (1, 2)),
    "allOf":
    ({"allOf": [{"properties": {"a": {"const": 1}}, "required": ["a"]}, {"properties": {"b": {"const": 2}}, "required": ["b"]}]},
     lambda v: v == {"a": 1, "b": 2}),
    "optional properties":
    ({"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}, "required": ["b"]},
     lambda v: v["b"] == 2 and set(v) <= {"a", "b", "c"}),
    "$ref":
    ({"$defs": {"leaf": {"enum": ["x"]}}, "type": "object", "properties": {"l": {"$ref": "#/$defs/leaf"}}, "required": ["l"]},
     lambda v: v == {"l": "x"}),
    "recursion":
    ({"$defs": {"node": {"type": "object", "properties": {"v": {"const": 1}, "next": {"anyOf": [{"$ref": "#/$defs/node"},
      {"type": "null"}], "title": "Next"}}, "required": ["v", "next"]}}, "$ref": "#/$defs/node"}, lambda v: v["v"] == 1),
    "nullable":
    ({"type": "object", "properties": {"n": {"type": "boolean", "nullable": True}}, "required": ["n"]},
     lambda v: v["n"] in (True, False, None)),
}  # fmt: skip


@cases("schema, fits", SCHEMAS)
def test_json_schema_constrains_a_random_model(schema: dict[str, Any], fits: Callable[[Any], bool], server: Server) -> None:
    for seed in range(2):
        reply = server.generate("any", "dice", json_schema=schema, max_tokens=200, temperature=1, seed=seed)
        assert fits(json.loads(reply.text)), reply.text


def nested(levels: int) -> dict[str, Any]:
    return {"type": "array", "items": nested(levels - 1)} if levels else {"type": "null"}


IMPOSSIBLE: dict[str, Any] = {
    "not an object": 5,
    "a list": [],
    "$ref to itself": {"$ref": "#"},
    "$refs in a ring": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "endless recursion": {"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}, "minItems": 1}}, "$ref": "#/$defs/n"},
    "an invalid pattern": {"type": "string", "pattern": "["},
    "minimum above maximum": {"type": "integer", "minimum": 5, "maximum": 3},
    "an enormous string": {"type": "string", "minLength": 10**9},
    "an enormous array": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
    "58 levels": nested(58),
}


@cases("schema", IMPOSSIBLE)
def test_json_schema_that_is_impossible_is_never_a_server_error(schema: Any, server: Server) -> None:
    reply = server.generate("Well", "dice", json_schema=schema, max_tokens=20)
    if reply.status != 200 or not isinstance(schema, dict):
        assert_error(reply, 400, "invalid_request", "json_schema")


# Schemas, and what is true of each of their documents -----------------------------------------------


def holding(schema: dict[str, Any]) -> dict[str, Any]:
    """An object whose one property has the schema."""
    return {"type": "object", "properties": {"v": schema}, "required": ["v"]}


def options(*schemas: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": list(schemas)}


def both(*schemas: dict[str, Any]) -> dict[str, Any]:
    return {"allOf": list(schemas)}


def recursive(schema: dict[str, Any]) -> dict[str, Any]:
    return {"$defs": {"R": schema}, "$ref": "#/$defs/R"}


INTEGER, FLAG, SHORT = {"type": "integer"}, {"type": "boolean"}, {"type": "string", "maxLength": 3}
FITTING: dict[str, tuple[Any, Callable[[Any], bool]]] = {
    "exclusiveMinimum false": ({**INTEGER, "minimum": -3, "exclusiveMinimum": False, "maximum": 0}, lambda v: -3 <= v <= 0),
    "exclusiveMaximum false": ({**INTEGER, "minimum": 0, "exclusiveMaximum": False, "maximum": 0}, lambda v: v == 0),
    "exclusive true": ({**INTEGER, "minimum": 5, "exclusiveMinimum": True, "maximum": 7, "exclusiveMaximum": True},
                       lambda v: v == 6),
    "two minimums": (both({**INTEGER, "minimum": 7}, {"minimum": 3}, {"maximum": 9}, {"maximum": 8}), lambda v: v in (7, 8)),
    "minimum and a type": (both({"minimum": 7}, {"type": "integer", "maximum": 9}), lambda v: 7 <= v <= 9),
    "two anyOfs": (both(options({"const": 1}, {"const": 2}), options({"const": 2}, {"const": 3})), lambda v: v == 2),
    "anyOf beside allOf": ({**both(options({"const": 1}, {"const": 2})), **options({"const": 2}, {"const": 3})},
                           lambda v: v == 2),
    "two lengths": (both({"type": "string", "minLength": 2}, {"minLength": 1, "maxLength": 9}, {"maxLength": 3}),
                    lambda v: 2 <= len(v) <= 3),
    "two counts": (both({"type": "array", "items": FLAG, "minItems": 2}, {"minItems": 1, "maxItems": 9}, {"maxItems": 3}),
                   lambda v: 2 <= len(v) <= 3),
    "two enums": (both({"enum": [1, 2, "a"]}, {"enum": [2.0, "a", None]}, {"type": "integer"}), lambda v: v == 2),
    "enum beside a type": ({"enum": ["a", 1, None, 2.5], "type": "integer"}, lambda v: v == 1),
    "enum beside bounds": ({"enum": [1, 5, 9], "minimum": 2, "exclusiveMaximum": 9}, lambda v: v == 5),
    "enum of objects": ({"enum": [{"a": 1}, {"a": "x"}, {}], "properties": {"a": INTEGER}, "required": ["a"]},
                        lambda v: v == {"a": 1}),
    "property in both": (both({"properties": {"a": {**INTEGER, "minimum": 3}}, "required": ["a"]},
                              {"properties": {"a": {"maximum": 4}, "b": FLAG}}), lambda v: v["a"] in (3, 4)),
    "items in both": (both({"type": "array", "items": {**INTEGER, "minimum": 3}, "minItems": 1, "maxItems": 3},
                           {"items": {"maximum": 4}}), lambda v: set(v) <= {3, 4} and v != []),
    "closed in one": (both({"properties": {"a": FLAG}, "additionalProperties": False, "required": ["a"]},
                           {"properties": {"a": {}, "b": FLAG}}), lambda v: set(v) == {"a"}),
    "beside $ref": ({"$defs": {"n": INTEGER}, "$ref": "#/$defs/n", "minimum": 3, "maximum": 4}, lambda v: v in (3, 4)),
    "prefix of two, one needed": ({"type": "array", "prefixItems": [FLAG, {"const": 7}, {"const": 8}], "minItems": 1,
                                   "maxItems": 2}, lambda v: 1 <= len(v) <= 2 and v[1:] in ([], [7])),
    "prefix and more": ({"type": "array", "prefixItems": [{"const": 7}], "items": FLAG, "minItems": 3, "maxItems": 4},
                        lambda v: v[0] == 7 and 3 <= len(v) <= 4 and all(type(x) is bool for x in v[1:])),
    "prefix cut": ({"type": "array", "prefixItems": [FLAG, FLAG, FLAG], "maxItems": 1}, lambda v: len(v) == 1),
    "required alone": ({"required": ["a"], "properties": {"b": FLAG}, "additionalProperties": INTEGER},
                       lambda v: type(v["a"]) is int and {type(x) for k, x in v.items() if k == "b"} <= {bool}),
    "minItems alone": ({"minItems": 2, "maxItems": 2, "items": FLAG}, lambda v: len(v) == 2),
    "null keywords": ({"type": "object", "properties": {"a": FLAG}, "required": None, "allOf": None, "enum": None,
                       "additionalProperties": None, "$ref": None, "minProperties": None}, lambda v: set(v) <= {"a"}),
    "const null": ({"const": None}, lambda v: v is None),
    "impossible option":
    (options({**INTEGER, "minimum": 5, "maximum": 3}, {"const": "x"}, {"enum": [1], "const": 2}), lambda v: v == "x"),
    "impossible property": ({"properties": {"a": False, "b": FLAG}, "required": ["b"]}, lambda v: set(v) == {"b"}),
    "oneOf told apart": ({"oneOf": [holding({"const": 1}), holding({"const": 2})]}, lambda v: v["v"] in (1, 2)),
    "date": ({"type": "string", "format": "date"}, lambda v: time.strptime(v.replace("0000", "2000"), "%Y-%m-%d") is not None),
    "nullable in one of both": (both({**FLAG, "nullable": True}, FLAG), lambda v: v in (True, False)),
    "unevaluatedProperties": ({"type": "object", "unevaluatedProperties": False}, lambda v: v == {}),
    "64-bit bounds": ({**INTEGER, "minimum": 9223372036854775800, "maximum": 9223372036854775807},
                      lambda v: 2**63 - 8 <= v < 2**63),
    "large minimum": ({**INTEGER, "minimum": 10**16}, lambda v: v >= 10**16),
}  # fmt: skip


@cases("schema, fits", FITTING)
def test_json_schema_admits_only_its_documents(schema: Any, fits: Callable[[Any], bool]) -> None:
    texts = list(filter(None, (walk(begin(schema), random.Random(seed)) for seed in range(20))))
    assert texts and all(fits(json.loads(text)) for text in texts), texts


def test_json_schema_keeps_additional_properties_off_the_named_ones(server: Server) -> None:
    """Names are made of a and b almost alone, so that many of them would be named ones."""
    named = {name: {"const": 1} for name in ("", "a", "ab", "é")}
    schema = {"type": "object", "properties": named, "additionalProperties": {"const": 7}}
    bias = {str(byte_alphabet().index(char)): 30 for char in 'ab"'}
    ask = functools.partial(server.generate, "any", "dice", json_schema=schema, max_tokens=60, temperature=4, logit_bias=bias)
    pairs = [pair for seed in range(40) for pair in re.findall(r'"([^"]*)":\s*(\d)', ask(seed=seed).text)]
    assert all((name in named) == (value == "1") for name, value in pairs), pairs
    assert {"", "a"} <= {name for name, _ in pairs} and any(name not in named for name, _ in pairs)


# Refused by name ---------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, str]] = {
    "4,000 digits": ({**INTEGER, "maximum": 10**4000}, "maximum"),
    "minLength of 4,000 digits": ({"minLength": 10**4000}, "minLength"),
    "exclusive true without a bound": ({**INTEGER, "exclusiveMinimum": True}, "exclusiveMinimum"),
    "bounds of true": ({**INTEGER, "minimum": True}, "minimum"),
    "an endless object": (recursive(holding({"$ref": "#/$defs/R"})), "no document"),
    "nothing is both": (both({"type": "string"}, {"type": "integer"}), "string"),
    "oneOf of the same": ({"oneOf": [INTEGER, INTEGER]}, "no document"),
    "two formats that exclude each other": (both({"format": "date"}, {"format": "uuid"}), "no document"),
    "oneOf that cannot be told apart": (
        {"oneOf": [{"patternProperties": {"a": FLAG}}, {"propertyNames": {"pattern": "b"}}]}, "oneOf"),
    "not of patternProperties": ({"not": {"patternProperties": {"a": FLAG}}}, "not"),
    "a look behind": ({"pattern": "(?<!a)b"}, "pattern"),
    "$ref to another document": ({"$ref": "https://json-schema.org/draft/2020-12/schema"}, "$ref"),
    "unevaluatedItems beside contains": ({"type": "array", "contains": FLAG, "unevaluatedItems": False}, "unevaluatedItems"),
    "unevaluatedProperties beside allOf": (
        {"allOf": [{"properties": {"a": FLAG}}], "unevaluatedProperties": False}, "unevaluatedProperties"),
    "$ref by an $anchor": ({"$defs": {"n": {"$anchor": "n", **FLAG}}, "$ref": "#n"}, "$anchor"),
    "$ref by an $id inside": ({"$defs": {"n": {"$id": "https://x.org/a", **FLAG}}, "$ref": "https://x.org/a"}, "$ref"),
    "$ref within a schema that has an $id": ({"$defs": {"n": {"$id": "b", "properties": {"a": {"$ref": "#/$defs/m"}}}, "m": FLAG},
                                             "properties": {"c": {"$ref": "#/$defs/m"}, "d": {"$ref": "#/$defs/n"}}}, "$id"),
    "$ref into a schema that has an $id": ({"$defs": {"n": {"$id": "b", "not": {"$ref": "#/$defs/m"}}, "m": FLAG},
                                           "$ref": "#/$defs/n/not"}, "$id"),
    "required names nobody may give": ({"required": ["a"], "additionalProperties": False}, "no document"),
    "not of anything": ({"not": {}}, ""),
    "an unknown type": ({"type": "what"}, ""),
    "$ref to nowhere": ({"$ref": "#/nowhere"}, ""),
    "$dynamicRef": ({"type": "array", "items": {"$dynamicRef": "#x"}}, ""),
    "an empty enum": ({"enum": []}, ""),
    "properties a number": ({"properties": 5}, ""),
    "required a number": ({"required": 5}, ""),
    "required a list of objects": ({"type": "object", "required": [{}]}, ""),
    "prefixItems a number": ({"prefixItems": 5}, ""),
    "anyOf an object": ({"anyOf": {}}, ""),
    "minimum a string": ({"type": "integer", "minimum": "a"}, ""),
    "properties a list in allOf": (both({"properties": [1]}, {}), ""),
    "required a number in allOf": (both({"required": 3}, {}), ""),
    "maxItems below 0": ({"type": "array", "maxItems": -1}, ""),
}  # fmt: skip


@cases("schema, word", REFUSED)
def test_json_schema_names_what_it_refuses(schema: Any, word: str, server: Server) -> None:
    reply = server.generate("any", "dice", json_schema=schema, max_tokens=5)
    assert len(assert_error(reply, 400, "invalid_request", "json_schema", word)["message"]) < 300


# Bounded in time ---------------------------------------------------------------------------------------


def chained(option: Callable[[int, int], dict[str, Any]]) -> dict[str, Any]:
    """Fifteen definitions, each anyOf of four times allOf of the next and an option."""
    defs = {f"d{i}": {"anyOf": [both({"$ref": f"#/$defs/d{i + 1}"}, option(i, j)) for j in range(4)]} for i in range(15)}
    return {"$defs": defs | {"d15": FLAG}, "$ref": "#/$defs/d0"}


def alike(property: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    return recursive(options(*({"type": "object", "properties": property(i)} for i in range(10))))


SELF = {"$ref": "#/$defs/R"}
HOSTILE: dict[str, Any] = {
    "chained, all alike": chained(lambda i, j: {"title": f"{i} {j}"}),
    "chained, all different": chained(lambda i, j: {"maxLength": 4 * i + j}),
    "chained without brackets": {"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(3000)}, "$ref": "#/$defs/d0"},
    "ten alike": alike(lambda i: {"a": SELF}),
    "ten alike that need themselves": recursive(options(*10 * [{**holding(SELF), "title": "x"}])),
    "ten alike, then different": alike(lambda i: {"a": SELF, f"b{i}": FLAG}),
    "ten that hold different": alike(lambda i: {"a": options(SELF, {"const": i}), f"b{i}": FLAG}),
    "ten in arrays": alike(lambda i: {"a": {"type": "array", "items": SELF, "maxItems": i}, f"b{i}": FLAG}),
    "allOf of itself": recursive(both(*({"properties": {"a": one}} for one in (both(SELF, {"properties": {"b": SELF}}), SELF)))),
    "a product": both(*(options(*({"minLength": 3 * i + j} for j in range(3))) for i in range(30))),
    "20,000 properties": {"type": "object", "properties": {f"p{i}": {} for i in range(20_000)}},
    "900 properties": {"type": "object", "properties": {f"p{i}": FLAG for i in range(900)}},
    "names to avoid": {"type": "object", "properties": {f"p{i}" * 40: FLAG for i in range(500)}, "additionalProperties": True},
    "a constant of 2 MB": {"const": "x" * 2_000_000},
    "5,000 constants": {"enum": [f"v{i:05d}" for i in range(5000)]},
    "lengths by the thousand": {"properties": {f"p{i}": {"type": "string", "maxLength": 1000 + i} for i in range(500)}},
    "200 alike objects": options(*({"properties": {f"p{i * j % 97}": SHORT for j in range(20)}} for i in range(200))),
    "200 arrays": options(*({"type": "array", "items": {"type": "string", "maxLength": i}} for i in range(200))),
    "60 deep": functools.reduce(lambda inner, i: options(inner, {"const": i}), range(28), FLAG),
}


@cases("schema", HOSTILE)
def test_json_schema_that_is_hostile_costs_little(schema: Any, server: Server) -> None:
    """Either a 400, or a grammar with which the text goes on, deeper and deeper; and the model serves others afterwards."""
    server.generate("warm", "dice", max_tokens=1)
    bias = {str(byte_alphabet().index(char)): 30 for char in '{[:"a'}
    with quickly(10.0):
        reply = server.generate("any", "dice", json_schema=schema, max_tokens=60, temperature=1, seed=1, logit_bias=bias)
    if reply.status != 200:
        assert_error(reply, 400, "invalid_request", "json_schema")
    assert server.generate("any", "dice", max_tokens=1).status == 200


# Useful ones work -----------------------------------------------------------------------------------------

PET = {"oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}], "discriminator": {"propertyName": "kind"}}
FRIEND = options(PET, {"type": "null"})
USEFUL: dict[str, Any] = {
    "optional": {"properties": {"a": options(SHORT, {"type": "null"})}},
    "linked list": recursive({"properties": {"v": INTEGER, "next": options(SELF, {"type": "null"})}, "required": ["v", "next"]}),
    "tree": recursive({"properties": {"v": INTEGER, "below": {"type": "array", "items": SELF}}, "required": ["v"]}),
    "discriminated": {"$defs": {"cat": {"properties": {"kind": {"const": "cat"}, "n": INTEGER, "friend": FRIEND}},
                                "dog": {"properties": {"kind": {"const": "dog"}, "n": FLAG, "friend": FRIEND}}}, **PET},
    "expressions": recursive(options(
        {"properties": {"left": SELF, "right": SELF, "op": {"const": "+"}}, "required": ["left", "right", "op"]},
        {"properties": {"left": SELF, "right": SELF, "op": {"const": "*"}}, "required": ["left", "right", "op"]},
        {"properties": {"value": {"type": "number"}}, "required": ["value"]})),
    "any JSON": recursive(options(SHORT, {"type": "number"}, {"type": "null"}, {"type": "array", "items": SELF},
                                  {"type": "object", "additionalProperties": SELF})),
    "eight objects": options(*({"properties": {"x": INTEGER, f"y{i}": SHORT}, "required": ["x", f"y{i}"]} for i in range(8))),
    "constants with titles": {"oneOf": [{"const": f"c{i}", "title": f"Choice {i}"} for i in range(300)]},
    "zod's integer": {**INTEGER, "minimum": -(2**53) + 1, "maximum": 2**53 - 1},
}  # fmt: skip


@cases("schema", USEFUL)
def test_json_schema_of_a_common_form_is_taken(schema: Any, server: Server) -> None:
    reply = server.generate("any", "dice", json_schema=schema, max_tokens=100, temperature=1, seed=2)
    assert reply.finish_reason == "length" or holds(schema, reply.text)


# Tokens under a grammar.


@pytest.fixture(scope="module")
def llama() -> Any:
    """The model in the box, in this process."""
    file = REPO / "models" / f"{TINY}.gguf"
    options = module.EngineOptions(ctx=512, parallel=2, threads=1, gpu_layers=0)
    return module.Llama(module.Load(model_info(file), module.Setup(options)), lambda fraction: None)


class Rows(module.Rows):
    """A text that is decoded by hand."""

    def __init__(self, llama: Any, text: str) -> None:
        tokens = llama.vocab.tokens(text, first=True)
        super().__init__(llama.np.zeros(512, llama.np.int32), len(tokens), llama.np.arange(513, dtype=llama.np.int32))
        self.llama, self.row = llama, 0
        self.tokens[: self.n_tokens] = tokens
        llama.main.drop(0)

    def logits(self) -> tuple[Any, int]:
        """The logits behind the text, and their row in the batch."""
        rows = self.n_tokens - self.n_computed
        assert self.llama.main.decode([(self, rows)]) == 0
        self.n_computed = self.n_tokens
        return self.llama.main.logits(1)[0], rows - 1

    def append(self, token: int) -> None:
        self.tokens[self.n_tokens] = token
        self.n_tokens += 1


def sampler(llama: Any, grammar: str, prompt: Any = (), **fields: Any) -> Any:
    constraint = module.Constraint(module.Gbnf(grammar), "grammar")
    return module.Sampler(llama, module.Sampling(constraint=constraint, **fields), prompt)


GRAMMARS = {
    "a record": 'root ::= "{\\"name\\": \\"" [^"\\\\\\x00-\\x1f]{3,40} "\\", \\"kind\\": " ("\\"red\\"" | "\\"green\\"") "}"',
    "a string": r'root ::= "\"" ([^"\\\x00-\x1f] | "\\" ["\\nt])* "\""',
    "numbers": 'root ::= ([0-9]+ ", "){20}',
    "no vowels": "root ::= [^aeiou]{20,60}",
}


@cases("grammar", GRAMMARS)
@cases("fields", {
    "the usual chain": {},
    "the likeliest": {"temperature": 0.0},
    "hot": {"temperature": 3.0},
    "no filter": {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0},
    "top_k": {"top_k": 5, "top_p": 1.0, "min_p": 0.0},
    "top_p": {"top_k": 0, "top_p": 0.9, "min_p": 0.0},
    "most of top_p": {"top_k": 0, "top_p": 0.995, "min_p": 0.0, "temperature": 1.5},
    "min_p": {"top_k": 0, "top_p": 1.0, "min_p": 0.02, "temperature": 1.5},
    "top_p and min_p": {"top_k": 0, "top_p": 0.8, "min_p": 0.05},
    "typical": {"typical_p": 0.7},
    "typical of all": {"typical_p": 0.7, "top_k": 0},
    "deviations": {"top_n_sigma": 1.0},
    "without the likeliest": {"xtc_probability": 0.6, "xtc_threshold": 0.1},
    "the likeliest but for XTC": {"temperature": 0.0, "xtc_probability": 0.9},
    "penalties": {"repeat_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "the likeliest with penalties": {"temperature": 0.0, "repeat_penalty": 1.5},
    "repetition": {"dry_multiplier": 1.0},
    "biases": {"logit_bias": ((300, 5.0), (301, -math.inf), (11, 2.0))},
    "Mirostat": {"mirostat": 1},
    "Mirostat 2": {"mirostat": 2},
})  # fmt: skip
def test_picks_are_what_the_grammar_allows_and_the_likeliest_of_all(grammar: str, fields: dict[str, Any], llama: Any) -> None:
    """Shown all that is allowed from the first refused token on, a greedy sampler picks the same."""
    rows = Rows(llama, "Here is the record of a customer: ")
    prompt, greedy = list(rows.tokens[: rows.n_tokens]), fields.get("temperature") == 0.0 and "xtc_probability" not in fields
    quick, whole = (sampler(llama, grammar, prompt, seed=7, **fields) for _ in range(2))
    whole.TRIES = 0
    for _ in range(16):
        logits, row = rows.logits()
        before, allowed = logits.copy(), set(quick.grammar.allowed())
        token = quick.pick(logits, row)
        logits[:] = before
        assert (token in allowed or token < 0) and (not greedy or token == whole.pick(logits, row))
        if token < 0 or token in llama.vocab.eog:
            break
        rows.append(token)


def test_picks_under_a_grammar_have_the_probabilities_that_all_allowed_tokens_give(llama: Any) -> None:
    logits, row = Rows(llama, "The number is ").logits()
    kept = logits.copy()
    whole = module.Grammar(llama, module.Constraint(module.Gbnf("root ::= [0-9]+"), "grammar")).allowed()
    wanted = {int(t): math.exp(kept[t] - max(kept[whole])) for t in whole}
    counts: dict[int, int] = dict.fromkeys(wanted, 0)
    for seed in range(2000):
        picking = sampler(llama, "root ::= [0-9]+", seed=seed, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
        logits[:] = kept
        counts[picking.pick(logits, row)] += 1
        picking.close()
    expected = {t: 2000 * p / sum(wanted.values()) for t, p in wanted.items()}
    often = [t for t in wanted if expected[t] >= 10]
    assert sum((counts[t] - expected[t]) ** 2 / expected[t] for t in often) < 3 * len(often) + 10


@cases("grammar", GRAMMARS)
def test_allowed_tokens_are_those_whose_bytes_may_follow(grammar: str, llama: Any) -> None:
    started = module.Grammar(llama, module.Constraint(module.Gbnf(grammar), "grammar"))
    for token in llama.vocab.tokens_inside(b'{"name": "'):
        tokens = [t for t in range(llama.vocab.size) if started.after(t) is not None]
        assert list(started.allowed()) == tokens
        started.follow(token)


def test_allowed_tokens_are_found_within_a_character_and_hold_the_end_only_where_the_text_may_end(llama: Any) -> None:
    started = module.Grammar(llama, module.Constraint(module.Json('{"type": "string", "minLength": 600}', "x"), "x"))
    assert started.is_quick, "a quote must come"
    for token in llama.vocab.tokens_inside('"é'.encode())[:2]:
        assert started.after(token)
        started.follow(token)
    assert started._state.bits.bit_count() == 64 and started.is_quick and len(started.allowed())
    started = module.Grammar(llama, module.Constraint(module.Gbnf('root ::= "a" "b"?'), "grammar"))
    assert not set(started.allowed()) & llama.vocab.eog
    started.follow(llama.vocab.tokens_inside(b"a")[0])
    assert llama.vocab.eog <= set(started.allowed())


def test_control_tokens_stand_for_no_text_but_a_formats_own(llama: Any) -> None:
    control = next(t for t in llama.vocab.marker_pieces if t not in llama.vocab.eog)
    name = llama.vocab.marker_pieces[control]
    grammar = module.Gbnf(f"root ::= {json.dumps(name)}")
    assert module.Grammar(llama, module.Constraint(grammar, "grammar")).after(control) is None
    assert module.Grammar(llama, module.Constraint(grammar, "tools", None, frozenset({name}))).after(control)


@cases("text", {"a key": '{"name": "', "no space at first": "name", "spaces": "   ", "lines": "\n\n a", "letters of Greek": "αβγ",
                "emoji": "😀!", "nothing": ""})  # fmt: skip
@pytest.mark.parametrize("model", [TINY, "recital", "dice"])
def test_tokens_of_forced_text_stand_for_just_its_bytes(text: str, model: str, models: Path) -> None:
    file = (models if model != TINY else REPO / "models") / f"{model}.gguf"
    options = module.EngineOptions(ctx=256, parallel=1, threads=1, gpu_layers=0)
    vocab = module.Llama(module.Load(model_info(file), module.Setup(options)), lambda fraction: None).vocab
    assert b"".join(map(vocab.piece, vocab.tokens_inside(text.encode()))) == text.encode()


def test_machines_of_many_grammars_are_few_and_the_oldest_or_largest_go(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machines = module.Machines(llama.vocab)
    first = machines.of(module.Gbnf('root ::= "0"'))
    for number in range(1, 60):
        machines.of(module.Gbnf(f'root ::= "{number}" [a-z]*'))
        assert machines.of(module.Gbnf('root ::= "0"')) is first
    assert len(machines._kept) == machines.MAX_KEPT
    machines = module.Machines(llama.vocab)
    monkeypatch.setattr(machines, "MAX_STATES", 100)
    for number in range(5):
        machine = machines.of(module.Gbnf(f'root ::= "{number}" [a-z]{{100}}'))
        machine.automaton.start.read(f"{number}".encode() + b"a" * 60)
    assert len(machines._kept) == 2


# Text that is written without the model.

SENTENCE = "The quick brown fox jumps over the lazy dog and runs far away"
FORCED_TEXTS = f'root ::= "{SENTENCE} " ("home" | "again") " in the evening of the day."'


def forced(reply: Any) -> int:
    count: int = reply.json()["usage"]["timings"]["forced_n"]
    return count


def test_forced_text_is_written_without_the_model_and_ends_with_its_document(boxed: Server) -> None:
    reply = boxed.chat("hi", TINY, grammar=FORCED_TEXTS)
    assert reply.message["content"] in {f"{SENTENCE} {end} in the evening of the day." for end in ("home", "again")}
    assert reply.json()["usage"]["completion_tokens"] - 4 <= forced(reply) < reply.json()["usage"]["completion_tokens"]
    assert forced(boxed.chat("hi", TINY, max_tokens=8)) == 0
    reply = boxed.chat("hi", TINY, grammar=f'root ::= "{SENTENCE}"', ignore_eos=True)
    assert reply.message["content"] == SENTENCE and reply.json()["choices"][0]["finish_reason"] == "stop"
    whole = boxed.chat("hi", TINY, grammar=FORCED_TEXTS, temperature=0).json()["usage"]["completion_tokens"]
    choice = boxed.chat("hi", TINY, grammar=FORCED_TEXTS, temperature=0, max_tokens=whole).json()["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"].endswith("day.")


def test_max_tokens_within_forced_text_is_exact(boxed: Server) -> None:
    for most in range(1, 20):
        reply = boxed.chat("hi", TINY, grammar=FORCED_TEXTS, max_tokens=most).json()
        assert reply["usage"]["completion_tokens"] == most and reply["choices"][0]["finish_reason"] == "length"
        assert SENTENCE.startswith(reply["choices"][0]["message"]["content"][: len(SENTENCE)])


@cases("stop", {"in the text that is forced at first": "fox ju", "at its very begin": "The", "in what is forced later": "evening",
                "over a choice": "away "})  # fmt: skip
def test_stop_string_within_forced_text_ends_it(stop: str, boxed: Server) -> None:
    reply = boxed.chat("hi", TINY, grammar=FORCED_TEXTS, stop=stop, temperature=0)
    whole = boxed.chat("hi", TINY, grammar=FORCED_TEXTS, temperature=0).message["content"]
    assert reply.message["content"] == whole.partition(stop)[0]
    assert reply.json()["choices"][0]["finish_reason"] == "stop"


PLACES = 'root ::= ("a place of " [a-z]{3,9} " and of much more than that, ")+ "the end"'


def test_same_seed_gives_the_same_text_with_forced_parts(server: Server) -> None:
    # not the model in the box: its weights are of eight bits, so its sums hang on how many rows a step happens to have
    ask = {"grammar": PLACES, "temperature": 1.2, "max_tokens": 120}
    first, second, other = (server.chat("hi", "dice", seed=seed, **ask).message["content"] for seed in (5, 5, 6))
    assert first == second != other
    both = server.chat("hi", "dice", seed=5, n=2, **ask).json()["choices"]
    assert [choice["message"]["content"] for choice in both] == [first, other]


def test_forced_text_has_log_probabilities_and_is_streamed_alike(boxed: Server) -> None:
    reply = boxed.chat("hi", TINY, grammar=FORCED_TEXTS, logprobs=True, top_logprobs=2)
    said = reply.json()["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in said) == reply.message["content"]
    assert len(said) == reply.json()["usage"]["completion_tokens"] and forced(reply) == 0
    body = chatting(model=TINY, grammar=PLACES, seed=3, max_tokens=80)
    plain = boxed.post("/v1/chat/completions", body)
    assert spoken_in(boxed.streamed("/v1/chat/completions", body)) == plain.message["content"]


def test_client_that_leaves_ends_a_text_with_forced_parts_in_which_nothing_banned_stands(boxed: Server) -> None:
    with boxed.stream("/v1/chat/completions", chatting(model=TINY, grammar=PLACES.replace(")+", "){100000}"))) as stream:
        list(itertools.islice(stream, 5))
    eventually(lambda: boxed.status(TINY)["requests_running"] == 0, "the end of the text")
    tokens = boxed.post("/tokenize", {"content": " brown"}).json()["tokens"]
    reply = boxed.chat("hi", TINY, grammar=FORCED_TEXTS, logit_bias={str(token): -100 for token in tokens})
    assert SENTENCE.startswith(reply.message["content"]) or reply.message["content"].startswith(SENTENCE)
    assert " brown" not in reply.message["content"] or len(tokens) > 1


@cases("choice", {"any function": "required", "one": {"type": "function", "function": {"name": "get_weather"}}})
def test_forced_call_is_partly_written_without_the_model(choice: Any, boxed: Server) -> None:
    reply = boxed.chat("weather?", TINY, tools=[WEATHER, ADD], tool_choice=choice, max_tokens=200, seed=1)
    assert reply.message["tool_calls"] and forced(reply) >= 5


def test_forced_text_is_kept_and_begins_behind_a_thought(boxed: Server) -> None:
    reply = boxed.chat("hi", TINY, response_format={"type": "json_object"}, thinking_budget_tokens=0, max_tokens=40)
    assert reply.status == 200
    usages = [boxed.chat("a new prompt", TINY, grammar=FORCED_TEXTS, temperature=0).json()["usage"] for _ in range(2)]
    assert usages[1]["prompt_tokens_details"]["cached_tokens"] == usages[1]["prompt_tokens"]


def test_texts_with_forced_parts_beside_each_other_are_as_alone(serve: Serve) -> None:
    many = serve("--models-dir", REPO / "models", "--model", TINY, "--parallel", "6")
    asks = [{"grammar": PLACES, "temperature": 0, "max_tokens": 90, "logit_bias": {str(300 + i): 3}} for i in range(6)]
    alone = [many.chat("hi", TINY, **ask).message["content"] for ask in asks]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda ask: many.chat("hi", TINY, **ask).message["content"], asks))
    assert [text[:40] for text in together] == [text[:40] for text in alone]  # sums in another order may differ later
    assert all(text.startswith("a place of ") and " and of much more than that, " in text for text in together)


def test_text_that_steps_back_in_its_forced_part_goes_on_where_it_was(serve: Serve) -> None:
    small = serve("--models-dir", REPO / "models", "--model", TINY, "--ctx", "512", "--kv-pool", "512", "--parallel", "4")
    ask: dict[str, Any] = {"grammar": PLACES.replace(")+", "){60}"), "temperature": 0.5, "seed": 4, "max_tokens": 300}
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda i: small.chat("hi " * i, TINY, **ask), range(1, 5)))
    for reply in replies:
        assert reply.json()["usage"]["completion_tokens"] == 300
        parts = reply.message["content"].split(" and of much more than that, ")
        assert all(part.startswith("a place of ") for part in parts[:-1]) and len(parts) > 8


def test_forced_text_without_chat_and_of_words_cut_within_a_character_is_whole(server: Server) -> None:
    reply = server.post("/v1/completions", {"model": "dice", "prompt": "x", "grammar": FORCED_TEXTS, "max_tokens": 200})
    assert reply.json()["choices"][0]["text"].startswith(SENTENCE) and reply.json()["usage"]["timings"]["forced_n"] > 50
    text = server.chat("hi", "dice", grammar='root ::= ("日本" | "日曜" | "é😀") "語の文"', temperature=1).message["content"]
    assert text in ("日本語の文", "日曜語の文", "é😀語の文")


# Hostile grammars.

DOUBLING = "\n".join(["root ::= a0", *(f'a{i} ::= "a" a{i + 1} "b" | "a" a{i + 1} "c"' for i in range(20)), 'a20 ::= "d"'])
MANY = "root ::= " + " | ".join(f'[a-z]{{{n}}} "{n}"' for n in range(300, 430))  # well within what may be sought for a text
MOST = 'root ::= "ab" m\nm ::= ' + " | ".join(f'[a-z]{{{n}}} "{n}"' for n in range(60, 5000))
REPEATS = "root ::= ((([a-z]{1,1000}){1,1000}){1,1000}){1,1000}"


@cases("grammar, said", {
    "brackets 10,000 deep": ("root ::= " + "(" * 10_000 + '"a"' + ")" * 10_000, "nested over 100 deep"),
    "a rule that begins with itself": ('root ::= root "a" | "b"', "left-recursive"),
    "rules that begin with each other": ('root ::= x\nx ::= "a"? y\ny ::= x "b"', "left-recursive"),
    "repeats beyond numbers": ('root ::= "a"{99999999999}', "not a number of repeats"),
    "more text than is read": ('root ::= "' + "a" * 600_000 + '"', "over 500000 characters"),
})  # fmt: skip
def test_hostile_grammar_is_refused(grammar: str, said: str, server: Server) -> None:
    assert assert_error(server.chat("hi", "dice", grammar=grammar), 400, "invalid_request", said)["param"] == "grammar"


@cases("grammar, fields", {
    "a billion repeats": ('root ::= "ab"{1000000000}', {}),
    "readings that double": (DOUBLING, {}),
    "rules 10,000 deep": ("root ::= a0\n" + "\n".join(f'a{i} ::= "x" a{i + 1} "y"' for i in range(9999)) + '\na9999 ::= "z"', {}),
    "readings by the hundred": (MANY, {"top_k": 0, "top_p": 1, "min_p": 0, "ignore_eos": True}),
    "brackets without end": ('root ::= "(" root ")" | "x"', {"logit_bias": {"120": -100}}),
})  # fmt: skip
def test_hostile_grammar_is_followed_as_far_as_the_text_goes(grammar: str, fields: dict[str, Any], server: Server) -> None:
    choice = server.chat("hi", "dice", grammar=grammar, max_tokens=40, **fields).json()["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["content"]


@cases("grammar, said", {
    "readings by the thousand": (MOST, "ambiguous"),
    "repeats of repeats": (REPEATS, "the grammar is"),
})  # fmt: skip
@streamed_and_plain
def test_grammar_that_is_too_much_to_follow_ends_its_own_text(grammar: str, said: str, stream: bool, server: Server) -> None:
    body = chatting(model="dice", grammar=grammar, max_tokens=100, top_k=0, top_p=1, min_p=0, ignore_eos=True)
    with server.endless() as other:
        next(other)
        if stream:
            error = server.streamed("/v1/chat/completions", body)[-1]["error"]
        else:
            error = assert_error(server.post("/v1/chat/completions", body), 400, "invalid_request")
        assert error["code"] == "invalid_request" and said in error["message"]
        assert next(other)["choices"][0]["text"]


NO_TIME = (("    PATIENCE = 0.01 ", "    PATIENCE = 0.0 "), ("SEEKING, SEEKING_EACH = 5.0", "SEEKING, SEEKING_EACH = 1e9"))


def test_time_does_not_change_what_is_forced_nor_what_is_said_behind_it(serve: Serve, tmp_path: Path) -> None:
    """Nor what a grammar or a schema leaves, where each token takes many steps."""
    items = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^[ab]c?$"}, "b": {"type": "integer"}},
             "required": ["a"]}  # fmt: skip
    schema = {"type": "array", "items": items, "uniqueItems": True, "minItems": 4, "maxItems": 5}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asks: list[dict[str, Any]] = [
        {"grammar": PLACES, "seed": 5},
        {"grammar": 'root ::= ([a-z]{2,5} " "){8}', "seed": 2, "top_k": 0, "top_p": 1, "min_p": 0, "temperature": 1.5},
        {"response_format": form, "seed": 2, "temperature": 1.5},
    ]

    def replies(script: Path) -> list[Reply]:
        own = serve("--models-dir", REPO / "models", "--model", TINY, script=script)
        return [own.chat("hi", TINY, **ask) for ask in asks]

    usual, slow = replies(SHIMMY), replies(altered(tmp_path, *NO_TIME))
    assert [reply.message for reply in usual] == [reply.message for reply in slow]
    assert forced(usual[0]) == forced(slow[0]) > 20 and len(usual[1].message["content"].split()) == 8
    Draft202012Validator(schema).validate(json.loads(usual[2].message["content"]))


def test_grammar_that_takes_too_many_steps_for_a_token_ends_its_own_text(serve: Serve, tmp_path: Path) -> None:
    script = altered(tmp_path, NO_TIME[0], ("SEEKING, SEEKING_EACH = 5.0", "SEEKING, SEEKING_EACH = 0.0"))
    hasty = serve("--models-dir", REPO / "models", "--model", TINY, script=script)
    assert_error(hasty.chat("hi", TINY, grammar=MANY), 400, "invalid_request", "intricate")
    assert hasty.chat("hi", TINY, max_tokens=4).status == 200


FUZZ = int(os.environ.get("SHIMMY_FUZZ", 0))  # schemas of each kind under `make fuzz`; 0: the plain suite
CHECKED_FORMATS = FormatChecker(["date", "email", "ipv4", "ipv6", "uuid"])  # what jsonschema checks without further packages
CHECKED = [*CHECKED_FORMATS.checkers, "time"]


@CHECKED_FORMATS.checks("time")
def is_time(value: Any) -> bool:
    """RFC 3339's full-time."""
    return not isinstance(value, str) or bool(
        re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?([Zz]|[+-]([01]\d|2[0-3]):[0-5]\d)", value, re.ASCII))


def begin(schema: Any) -> State:
    """The state before the first byte of a schema's documents."""
    return Automaton(read_json(json.dumps(schema), "json_schema")).start


def follow(here: State | None, data: bytes) -> State | None:
    for byte in data:
        if here is None:
            return None
        here = here.step(byte)
    return here


def accepts(schema: Any, value: Any) -> bool:
    here = follow(begin(schema), json.dumps(value, ensure_ascii=False).encode())
    return here is not None and here.ends


def walk(here: State, pick: random.Random, most: int = 500) -> bytes | None:
    """A text that ends, chosen at random, what leads to an end more often; None if none was found in so many bytes."""
    text = bytearray()
    while here.bits and not (here.ends and pick.random() < 0.5):
        if len(text) >= most:
            return None
        may = [byte for byte in range(256) if here.bits >> byte & 1]
        soon = [byte for byte in may if byte in b'"]}ab01'] if pick.random() < 0.9 else []
        text.append(pick.choice(soon or may))
        behind = here.step(text[-1])
        assert behind is not None, f"{text!r} leads to what firsts did not say"
        here = behind
    assert here.ends, f"{text!r} is a dead end"
    return bytes(text)


def schema_made(pick: random.Random, depth: int = 0) -> Any:
    """A schema made at random, of all keywords, with values small enough to meet."""
    inner = functools.partial(schema_made, pick, depth + 1)
    values = [1, 2, "a", "ab", None, True, 1.5, {"a": 1}, [], [1], "b", 0, {}]
    leaves: list[Callable[[], Any]] = [
        lambda: True,
        lambda: {"type": pick.choice(["string", "integer", "number", "boolean", "null"])},
        lambda: {"enum": pick.choices(values, k=pick.randint(1, 4))},
        lambda: {"const": pick.choice([1, "a", None, [1, "a"], {"a": 1, "b": [2]}])},
        lambda: {"$ref": f"#/$defs/{pick.choice('xy')}"},
    ]
    if depth > 2 or pick.random() < 0.1:
        return pick.choice(leaves)()
    groups = keywords_made(pick, inner)
    which = pick.choices(range(6), (4, 3, 1, 1, 3, 0.3))[0]
    found = {key: groups[which][key]() for key in pick.sample([*groups[which]], pick.randint(1, min(3, len(groups[which]))))}
    if which < 4 and pick.random() < 0.7:
        kind = ("object", "array", "string", "number")[which]
        found["type"] = kind if pick.random() < 0.8 else [kind, "null"]
    elif pick.random() < 0.5:
        group = pick.choice(groups[:4])
        found |= {key: group[key]() for key in pick.sample([*group], 2)}
    return found


def keywords_made(pick: random.Random, inner: Callable[[], Any]) -> list[dict[str, Callable[[], Any]]]:
    """Values for keywords: of objects, arrays, strings and numbers, those that combine, those that come late."""
    names = ["a", "b", "ab", "é"]

    def number() -> float:
        return pick.choice([-2, -0.5, 0, 0.5, 1, 2, 3, 10])

    def count() -> int:
        return pick.randint(0, 3)

    def pair() -> list[Any]:
        return [inner(), inner()]

    return [
        {
            "properties": lambda: {name: inner() for name in pick.sample(names, pick.randint(1, 3))},
            "required": lambda: pick.sample(names, pick.randint(1, 2)),
            "additionalProperties": inner,
            "patternProperties": lambda: {pick.choice(["^a", "b$", "^[ab]+$", "c"]): inner()},
            "propertyNames": lambda: pick.choice([{"maxLength": 2}, {"pattern": "a"}, {"enum": names[:3]}, inner()]),
            "minProperties": count, "maxProperties": count,
            "dependentRequired": lambda: {pick.choice(names): pick.sample(names, 2)},
            "dependentSchemas": lambda: {pick.choice(names): inner()},
        },
        {"items": inner, "prefixItems": pair, "minItems": count, "maxItems": lambda: count() + 1, "uniqueItems": lambda: True,
         "contains": inner, "minContains": count, "maxContains": count},
        {"minLength": count, "maxLength": lambda: count() + 1, "format": lambda: pick.choice(CHECKED),
         "pattern": lambda: pick.choice(["^a", "b", "^[a-c]*$", "a.b"])},
        {"minimum": number, "maximum": number, "exclusiveMinimum": number, "exclusiveMaximum": number,
         "multipleOf": lambda: pick.choice([1, 2, 0.5, 3, 0.25])},
        {"not": inner, "allOf": pair, "anyOf": pair, "oneOf": pair, "if": inner, "then": inner, "else": inner},
        {"unevaluatedProperties": inner, "unevaluatedItems": inner},
    ]  # fmt: skip


def with_definitions(pick: random.Random) -> Any:
    schema = schema_made(pick)
    return {**(schema if isinstance(schema, dict) else {}), "$defs": {"x": schema_made(pick, 2), "y": schema_made(pick, 3)}}


def holds(schema: Any, text: str | bytes) -> bool:
    """Whether a document fits; a $ref that leads to itself says nothing, and jsonschema follows it without end."""
    try:
        return bool(Draft202012Validator(schema, format_checker=CHECKED_FORMATS).is_valid(json.loads(text)))
    except RecursionError:
        return True


def test_schema_made_at_random_is_refused_or_holds_whatever_the_walk() -> None:
    """Random legal bytes lead to a document that fits, never into a dead end; no model is needed for that."""
    fitted, schemas = 0, FUZZ or 200
    for seed in range(schemas):
        pick = random.Random(seed)
        schema = with_definitions(pick)
        try:
            here = begin(schema)
        except InvalidRequest:
            continue
        for text in filter(None, (walk(here, pick) for _ in range(4))):
            assert holds(schema, text), (seed, schema, text)
            fitted += 1
    assert fitted > schemas


# What a keyword admits, and what not: documents in the order and style in which they are written.
OBJECT, ANY_ARRAY, ONE = {"type": "object"}, {"type": "array"}, {"const": 1}
UNIQUE = {**ANY_ARRAY, "uniqueItems": True}
NAMED_SCHEMAS = {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}}
KEYWORDS: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "pattern": ({"pattern": "^a+$"}, ["a", "aaa"], ["", "b", "ab"]),
    "format": ({"format": "date"}, ["2024-02-29"], ["2023-02-29", ""]),
    "an unknown format": ({"format": "colour"}, ["red", ""], [1]),
    "lengths in characters": ({"minLength": 2, "maxLength": 3}, ["éé", "\U0001f600ab"], ["é", "abcd"]),
    "minimum of a number": ({"type": "number", "minimum": 0.5}, [0.5, 1, 12345.75], [0.4, -1]),
    "exclusive bounds": ({"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 4}, [2, 3], [1, 4, 0]),
    "draft 4's exclusive bounds": ({"type": "integer", "minimum": 1, "exclusiveMinimum": True}, [2], [1, 0]),
    "multipleOf": ({"type": "number", "multipleOf": 0.1}, [0.3, 2, -0.1], [0.35]),
    "not of a type": ({"not": {"type": ["string", "object"]}}, [1, None, [{}]], ["a", {}]),
    "not of integers": ({"type": "number", "not": {"type": "integer"}}, [0.5, -1.25], [1, 0]),
    "not of constants": ({"type": "integer", "minimum": 1, "maximum": 4, "not": {"enum": [2, 3]}}, [1, 4], [2, 3]),
    "not of a pattern": ({"type": "string", "not": {"pattern": "^a"}}, ["b", ""], ["a", "ab"]),
    "not of required": ({**OBJECT, "not": {"required": ["a"]}}, [{}, {"b": 1}], [{"a": 1}]),
    "not of a property": ({**NAMED_SCHEMAS, "not": {"properties": {"a": {"const": 1}}}}, [{"a": 2}], [{"a": 1}, {}]),
    "not of anyOf": ({"type": "integer", "not": {"anyOf": [{"minimum": 5}, {"maximum": 2}]}}, [3, 4], [2, 5]),
    "not of items": ({**ANY_ARRAY, "not": {"items": {"type": "null"}}}, [[1], [None, 1]], [[], [None]]),
    "oneOf that overlaps": ({"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 5}]}, [3, 5.5], [6, 0.5]),
    "oneOf of required": ({**NAMED_SCHEMAS, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
                          [{"a": 1}, {"b": 1}], [{"a": 1, "b": 1}, {}]),
    "if, then and else": ({**NAMED_SCHEMAS, "required": ["a"], "if": {"properties": {"a": {"const": 1}}},
                          "then": {"required": ["b"]},
                           "else": {"required": ["c"]}}, [{"a": 1, "b": 2}, {"a": 2, "c": 1}], [{"a": 1}, {"a": 2, "b": 1}]),
    "dependentRequired": ({**NAMED_SCHEMAS, "dependentRequired": {"a": ["b"]}}, [{}, {"b": 1}, {"a": 1, "b": 1}], [{"a": 1}]),
    "dependencies of both forms": ({**NAMED_SCHEMAS, "dependencies": {"a": ["b"], "b": {"required": ["c"]}}},
                                   [{}, {"c": 1}, {"a": 1, "b": 1, "c": 1}], [{"a": 1}, {"b": 1}, {"a": 1, "b": 1}]),
    "dependentSchemas": ({**NAMED_SCHEMAS, "dependentSchemas": {"a": {"properties": {"b": {"const": 1}}}}},
                         [{"a": 1, "b": 1}, {"b": 2}], [{"a": 1, "b": 2}]),
    "patternProperties": ({**OBJECT, "patternProperties": {"^x": {"type": "integer"}}},
                          [{}, {"x1": 1, "xy": 2}], [{"x1": "a"}, {"y": 1}]),
    "patternProperties that overlap": ({**OBJECT, "patternProperties": {"^x": {"minimum": 2}, "y$": {"maximum": 3}}},
                                       [{"x": 9}, {"xy": 2}, {"y": 1}], [{"xy": 9}, {"xy": 1}]),
    "patternProperties and others": ({**OBJECT, "patternProperties": {"^x": {"const": 1}}, "additionalProperties": {"const": 2}},
                                     [{"x": 1, "y": 2}], [{"x": 2}, {"y": 1}]),
    "a named property that matches": ({"properties": {"xa": {"minimum": 0}}, "patternProperties": {"^x": {"maximum": 5}}},
                                      [{"xa": 3}, {"xb": -3}], [{"xa": 6}, {"xa": -1}]),
    "propertyNames": ({**OBJECT, "propertyNames": {"pattern": "^a"}}, [{}, {"ab": 1}], [{"b": 1}]),
    "propertyNames as constants": ({**OBJECT, "propertyNames": {"enum": ["a", "b"]}}, [{"a": 1}, {"a": 1, "b": 2}], [{"c": 1}]),
    "minProperties": ({**NAMED_SCHEMAS, "minProperties": 2}, [{"a": 1, "c": 1}], [{}, {"b": 1}]),
    "maxProperties": ({**NAMED_SCHEMAS, "maxProperties": 1}, [{}, {"c": 1}], [{"a": 1, "b": 1}]),
    "counts of unnamed properties": ({**OBJECT, "minProperties": 2, "maxProperties": 2}, [{"x": 1, "y": 2}], [{"x": 1}, {}]),
    "unevaluatedProperties": ({"properties": {"b": {}}, "unevaluatedProperties": {"type": "null"}}, [{"b": 1, "x": None}],
                              [{"x": 1}]),
    "contains": ({**ANY_ARRAY, "contains": {"const": 1}}, [[1], [0, 1, 0]], [[], [0]]),
    "minContains and maxContains": ({**ANY_ARRAY, "contains": {"const": 1}, "minContains": 2, "maxContains": 2},
                                    [[1, 1], [1, 0, 1]],
                                    [[1], [1, 1, 1]]),
    "uniqueItems": ({**ANY_ARRAY, "uniqueItems": True}, [[], [1, "1", 2], [{"a": 1}, {"a": 2}]], [[1, 1], [{"a": 1}, {"a": 1}]]),
    "uniqueItems of lists that must contain": ({**ANY_ARRAY, "uniqueItems": True, "items": {
        **ANY_ARRAY, "items": {"enum": [1, 2]}, "maxItems": 1, "contains": {"const": 1}}}, [[], [[1]]], [[[2]], [[]]]),
    "uniqueItems of what is written in two ways": ({**ANY_ARRAY, "uniqueItems": True}, [[1, True]], [[1, 1.0]]),
    "draft 4's tuples": ({**ANY_ARRAY, "items": [{"const": 1}], "additionalItems": {"const": 2}}, [[1], [1, 2, 2]],
                         [[2], [1, 1]]),
    "unevaluatedItems": ({**ANY_ARRAY, "prefixItems": [{}], "unevaluatedItems": False}, [[1]], [[1, 2]]),
    "nullable": ({"type": "integer", "nullable": True}, [1, None], ["a"]),
    "const of an object": ({"const": {"b": [1, None], "a": "é"}}, [{"b": [1, None], "a": "é"}], [{"b": [1]}]),
    "enum that shares beginnings": ({"enum": ["a", "ab", 1, 12, {"a": 1}]}, ["a", "ab", 1, 12, {"a": 1}], ["b", 2, {}]),
    "$ref by the schema's own $id": ({"$id": "https://x.org/a", "$defs": {"n": ONE}, "$ref": "a#/$defs/n"}, [1], [2]),
    "$ref alone in draft 7": ({"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"a": {"const": 1}},
                               "$ref": "#/definitions/a", "not": {}}, [1], [2]),
    "closed objects": ({"properties": {"a": {}}}, [{}, {"a": 1}], [{"b": 1}, {"a": 1, "b": 1}]),
    "opened objects": ({"properties": {"a": {}}, "additionalProperties": True}, [{"a": 1, "b": 1}], [1]),
}  # fmt: skip


@cases("schema, fitting, others", KEYWORDS)
def test_schema_keyword_admits_just_what_fits(schema: Any, fitting: list[Any], others: list[Any]) -> None:
    assert [value for value in fitting if not accepts(schema, value)] == []
    assert [value for value in others if accepts(schema, value)] == []


def each_its_own(count: int, **more: Any) -> dict[str, Any]:
    """An object whose kind tells which property it must have."""
    properties = {"kind": {"enum": [f"v{n}" for n in range(count)]}, **{f"p{n}": {"type": "null"} for n in range(count)}}
    rules = [{"if": {"properties": {"kind": {"const": f"v{n}"}}, **more}, "then": {"required": [f"p{n}"]}} for n in range(count)]
    return {**OBJECT, "properties": properties, "required": ["kind"], "allOf": rules}


def told_apart(count: int) -> dict[str, Any]:
    kinds = [{**OBJECT, "properties": {"kind": {"const": f"v{n}"}, "n": {"type": "integer"}}, "required": ["kind"]}
             for n in range(count)]  # fmt: skip
    return {"oneOf": kinds}


@cases("schema, fitting, others", {
    "a condition for each value": (each_its_own(60), {"kind": "v59", "p59": None}, {"kind": "v59", "p58": None}),
    "one that needs the property": (each_its_own(60, required=["kind"]), {"kind": "v7", "p7": None}, {"kind": "v7"}),
    "options by a constant": (told_apart(1000), {"kind": "v999", "n": 1}, {"kind": "v1000"}),
    "constants": ({"oneOf": [{"const": f"c{n}", "title": f"{n}"} for n in range(1000)]}, "c999", "c1000"),
    "options by a constant, and others": ({"oneOf": [{"type": "null"}, {"type": "integer"}, *told_apart(400)["oneOf"]]},
                                          {"kind": "v399"}, {"n": 1}),
    "options that share a value": (
        {"oneOf": [*told_apart(300)["oneOf"], {**told_apart(1)["oneOf"][0], "required": ["kind", "n"]}]},
        {"kind": "v0"}, {"kind": "v0", "n": 1}),
    "a hundred unlike objects": (
        {"anyOf": [FLAG, {**UNIQUE, "minItems": 100, "items": {**OBJECT, "required": ["id", "mail"], "properties": {
            "id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"}, "mail": {"type": "string", "format": "email"}}}}]},
        True, [{"id": "AB-1000", "mail": "a@b.c"}]),
    "a long address without an x": (
        {"type": "string", "format": "email", "not": {"pattern": "x"}, "minLength": 60, "maxLength": 64},
        "a" * 40 + "@" + "b" * 20, "x" * 40 + "@" + "b" * 20),
})  # fmt: skip
def test_schema_with_many_kinds_is_read_soon(schema: Any, fitting: Any, others: Any) -> None:
    begun = time.thread_time()
    assert accepts(schema, fitting) and not accepts(schema, others)
    assert time.thread_time() - begun < 5  # 0.3 s on a quiet machine


def test_schema_with_many_alternatives_or_overlapping_patterns_is_read_or_says_so() -> None:
    with pytest.raises(InvalidRequest, match="anyOf and oneOf leave over 1500 alternatives"):
        begin({"anyOf": told_apart(2000)["oneOf"]})
    names = zip("abcdef", "lmnopq", strict=True)
    patterns = {f"{one}.*{two}": {"type": "integer", "minimum": n} for n, (one, two) in enumerate(names)}
    begun = time.thread_time()
    assert accepts({**OBJECT, "patternProperties": patterns}, {"al": 0, "alfq": 5, "abcdeflmnopq": 9})
    assert not accepts({**OBJECT, "patternProperties": patterns}, {"alfq": 4})
    assert time.thread_time() - begun < 10


@cases("schema, text", {
    "between elements and behind keys": ({**OBJECT, "required": ["a"], "properties": {"a": {"const": [1, 2]}}}, '{"a": [1, 2]}'),
    "a constant's own order": ({"const": {"b": 1, "a": "é"}}, '{"b": 1, "a": "é"}'),
    "a list of all there is": ({**ANY_ARRAY, "uniqueItems": True, "minItems": 1, "items": {"enum": ["only"]}}, '["only"]'),
})  # fmt: skip
def test_schema_without_a_choice_forces_its_whole_text(schema: Any, text: str) -> None:
    assert begin(schema).forced(100) == text.encode()


NULLS = {"type": "object", "additionalProperties": {"type": "null"}}
STRINGS = {**UNIQUE, "items": {"type": "string"}}


@cases("schema", {
    "elements that run out": {**ANY_ARRAY, "uniqueItems": True, "items": {"enum": [1, 2]}, "minItems": 2},
    "a property that nothing fits": {**OBJECT, "properties": {"a": False, "b": {"const": 1}}},
    "as many as are named": {**NAMED_SCHEMAS, "minProperties": 3},
    "the most, with one required last": {**NAMED_SCHEMAS, "required": ["c"], "maxProperties": 1},
    "what must be contained, late": {**ANY_ARRAY, "items": {"enum": [1, 2]}, "contains": {"const": 1}, "maxItems": 2},
    "unique objects that run out": {**ANY_ARRAY, "uniqueItems": True, "minItems": 2,
                                    "items": {**OBJECT, "properties": {"a": {"type": "boolean"}}, "required": ["a"]}},
    "as many as there are": {**ANY_ARRAY, "uniqueItems": True, "minItems": 3,
                             "items": {**ANY_ARRAY, "maxItems": 1, "items": {"enum": [1, 2]}}},
    "unique numbers that run out": {**ANY_ARRAY, "uniqueItems": True, "items": {"type": "integer", "minimum": 9, "maximum": 11}},
    "any strings": STRINGS,
    "few characters": {**UNIQUE, "items": {"type": "string", "maxLength": 2, "pattern": "^[aé😀]*$"}, "minItems": 5},
    "all there are": {**UNIQUE, "items": {"type": "string", "pattern": "^(a|b.|cd?)$", "maxLength": 2}, "minItems": 9},
    "a text that ends or goes on": {**UNIQUE, "items": {"type": "string", "pattern": "^(ab?c?|d*)$"}, "minItems": 8},
    "escapes": {**UNIQUE, "items": {"type": "string", "pattern": r"^[\n\u0001/]$"}, "minItems": 3},
    "constants and strings": {**UNIQUE, "minItems": 3,
                              "items": {"anyOf": [{"enum": ["a", 1]}, {"type": "string", "pattern": "^[ab]$"}]}},
    "names": {**NULLS, "minProperties": 3, "propertyNames": {"pattern": "^[abc]$"}},
    "lists that can only be empty": {"anyOf": [{"const": 1}, {**UNIQUE, "minItems": 2, "items": {"type": "array", "items": {
        "type": "object", "required": ["a"], "maxProperties": 0}}}]},
    "lists that are too few, among others": {**UNIQUE, "minItems": 2, "items": {"anyOf": [
        {"enum": [1, 2]}, {**UNIQUE, "minItems": 3, "items": {"enum": [1, 2]}}]}},
    "lists with one list at most": {**UNIQUE, "items": {**ANY_ARRAY, "items": {"enum": [1, [1]]}, "contains": {"const": [1]},
                                                        "maxContains": 1, "maxItems": 2}},
})  # fmt: skip
def test_schema_leads_into_no_dead_end(schema: Any) -> None:
    texts = list(filter(None, (walk(begin(schema), random.Random(seed), 600) for seed in range(40))))
    for text in texts:
        Draft202012Validator(schema).validate(json.loads(text))
    assert texts


@cases("schema", {
    "one value, twice": {**ANY_ARRAY, "uniqueItems": True, "minItems": 2, "items": {"const": {"a": 1}}},
    "two integers, three times": {**ANY_ARRAY, "uniqueItems": True, "minItems": 3, "items": {"enum": [1, 2]}},
    "120 integers, 200 times": {**UNIQUE, "minItems": 200, "items": {"type": "integer", "minimum": 1, "maximum": 120}},
    "more properties than there are": {**NAMED_SCHEMAS, "minProperties": 4},
    "what nothing is": {"type": "string", "allOf": [{"pattern": "^a"}, {"pattern": "^b"}]},
    "contained twice, without repeats": {"uniqueItems": True, "contains": {"const": 1}, "minContains": 2},
    "contained twice among few": {**ANY_ARRAY, "uniqueItems": True, "items": {"enum": [1, 2, 3]}, "contains": {"minimum": 3},
                                  "minContains": 2},
    "an empty object, twice": {"uniqueItems": True, "contains": {"const": {}}, "minContains": 2, "maxItems": 3},
    "contained where nothing is": {**ANY_ARRAY, "items": {"type": "string"}, "contains": {"type": "integer"}},
    "objects that must not be empty, without repeats": {**UNIQUE, "minItems": 3, "items": {
        **OBJECT, "properties": {"a": {"type": "boolean"}}, "minProperties": 1}},
})  # fmt: skip
def test_schema_that_nothing_fits_is_refused(schema: Any) -> None:
    with pytest.raises(InvalidRequest, match="no document can fit"):
        begin(schema)


def written_alike(count: int) -> dict[str, Any]:
    """Objects that begin alike and hold each other."""
    return recursive(options(ONE, *({"properties": {"a": {"$ref": "#/$defs/R"}, f"b{i}": {"const": i}}, "required": ["a"]}
                                             for i in range(count))))  # fmt: skip


@cases("schema, text", {
    "ten objects": (written_alike(10), b'{"a": ' * 40),
    "arrays of arrays": (recursive(options(*({**ANY_ARRAY, "items": {"$ref": "#/$defs/R"}, "maxItems": n} for n in range(1, 9)))),
                         b"[" * 60),
})  # fmt: skip
def test_alternatives_that_begin_alike_stay_few_however_deep(schema: Any, text: bytes) -> None:
    here = follow(begin(schema), text)
    assert here is not None and len(here.stacks) < 100


def filled_at_random(server: Server, seed: int) -> tuple[str, str]:
    """How a schema made at random ended that the model in the box filled, and what is wrong with its document."""
    schema = with_definitions(random.Random(10**6 + seed))
    reply = server.generate("any", TINY, json_schema=schema, max_tokens=40, temperature=1, seed=seed)
    if reply.status != 200:
        assert_error(reply, 400, "invalid_request", "json_schema")
        return "refused", ""
    if reply.finish_reason == "stop" and not holds(schema, reply.text):
        return "invalid", f"{seed}: {json.dumps(schema)} {reply.text!r}"
    return reply.finish_reason, ""


def test_schemas_filled_at_temperature_1_hold(server: Server) -> None:
    """As above through the server: what ends by itself fits, what cannot be honoured is 400."""
    schemas, ends = FUZZ or 200, dict.fromkeys(("stop", "length", "refused", "invalid"), 0)
    with ThreadPoolExecutor(8) as pool:
        for end, wrong in pool.map(functools.partial(filled_at_random, server), range(schemas)):
            ends[end] += 1
            print(wrong, end="\n" * bool(wrong))
    print(f"{schemas} schemas: {ends}")
    assert not ends["invalid"] and ends["stop"] > schemas // 4


# Calls whose arguments stand one by one.

TAGS = CallFormat("<call>", "\n", "</call>", params=Params("<p=", ">", "</p>"))


def written(parameters, seed):
    """A call as a random walk through its grammar writes it, at most 300 bytes of it."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    state, text, chance = Automaton(read_ahead(calls_symbol(TAGS, tools, "", False))).start, b"", random.Random(seed)
    while state.bits and len(text) < 300:
        text += bytes([chance.choice(list(bytes_of(state.bits)))])
        state = state.read(text[-1:])
    return text.decode(errors="replace")


def one(schema):
    return {"type": "object", "properties": {"a": schema}, "required": ["a"]}


@pytest.mark.parametrize("schema, pattern", [
    ({"type": "string", "pattern": "^[0-9]{3}$"}, "[0-9]{3}"),
    ({"type": "string", "format": "ipv4"}, r"[0-9]{1,3}(\.[0-9]{1,3}){3}"),
    ({"type": "string", "minLength": 2, "maxLength": 4, "not": {"pattern": "x"}}, "[^x]{2,4}"),
    ({"allOf": [{"enum": ["u", "v</p>"]}]}, "u"),
    ({"const": 5}, "5"),
])  # fmt: skip
def test_a_plain_argument_fits_its_schema(schema, pattern):
    for seed in range(10):
        assert re.fullmatch(f"<call>f\n<p=a>({pattern})</p></call>", written(one(schema), seed))


def test_a_required_argument_without_a_schema_is_written():
    assert "<p=b>" in written({"type": "object", "properties": {}, "required": ["b"]}, 1)


@pytest.mark.parametrize("parameters, word", [
    (one({"type": "string", "minLength": "x"}), "minLength"),
    (one({"type": "string", "pattern": "("}), "bracket"),
    (one({"enum": ["</p>"]}), "no string"),
    ({**one({}), "minProperties": 2}, "minProperties"),
])  # fmt: skip
def test_what_plain_arguments_cannot_honour_is_refused_by_name(parameters, word):
    with pytest.raises(InvalidRequest, match=word):
        written(parameters, 1)


ZIP = {"$defs": {"Zip": {"enum": ["12345", "true"]}}}
REFERENCES = {"$defs": ZIP["$defs"] | {"Args": one({"$ref": "#/$defs/Zip"})}, "$ref": "#/$defs/Args"}


@cases("schema, said, wanted", {
    "a reference": (ZIP | one({"$ref": "#/$defs/Zip"}), "12345", "12345"),
    "references all the way": (REFERENCES, "12345", "12345"),
    "allOf": (ZIP | one({"allOf": [{"$ref": "#/$defs/Zip"}], "description": "d"}), "true", "true"),
    "or null": (one({"anyOf": [{"type": "integer"}, {"type": "null"}]}), "null", None),
    "a string or null": (one({"anyOf": [{"type": "string"}, {"type": "null"}]}), "12", "12"),
    "a list of types": (one({"type": ["string", "null"]}), "null", None),
    "nullable": (one({"type": "integer", "nullable": True}), "null", None),
    "const": (one({"const": "5"}), "5", "5"),
    "enum": (one({"enum": [1, 2]}), "2", 2),
    "another property": ({"type": "object", "additionalProperties": {"type": "string"}}, "7", "7"),
    "of either object": ({"anyOf": [one({"type": "string"}), {"type": "object", "properties": {"b": {}}}]}, "7", "7"),
    "an integer that is none": (one({"type": "integer"}), "1.5", "1.5"),
    "words for a number": (one({"type": "number"}), "a few", "a few"),
    "half a list": (one({"type": "array"}), "[1, ", "[1, "),
    "a list as Python writes it": (one({"type": "array"}), "['x', None]", ["x", None]),
    "anything": (one({}), '{"x": [1]}', {"x": [1]}),
    "a schema that cannot be read": (one({"$dynamicRef": "#x"}), "7", 7),
})  # fmt: skip
def test_argument_in_tags_has_the_type_that_its_schema_gives_it(schema: Any, said: str, wanted: Any) -> None:
    text = f"<call>f\n<p=a>{said}</p></call>"
    for pieces in ([text], text):
        parser = module.ChatParser(0, module.ChatFormat(calls=(TAGS,)), {"f": schema}, "", frozenset())
        events: list[Any] = [*(e for piece in pieces for e in parser.push(piece)), *parser.finish("stop")]
        arguments = "".join(e.text for e in events if isinstance(e, module.CallArguments))
        end = events[-1]
        assert json.loads(arguments) == {"a": wanted} and isinstance(end, module.ChoiceEnd) and end.finish_reason == "tool_calls"


@pytest.mark.parametrize("schema", [
    ZIP | one({"$ref": "#/$defs/Zip"}), REFERENCES,
    one({"anyOf": [{"type": "integer"}, {"type": "null"}]}), one({"const": "5"}), one({"enum": ["a", 2]}),
    {"allOf": [one({"type": "boolean"})], "type": "object"},
    {"anyOf": [one({"type": "integer"}), {"type": "object", "properties": {"b": {"const": 1}}, "required": ["b"]}]},
], ids=json.dumps)  # fmt: skip
def test_forced_arguments_in_tags_come_back_and_fit_their_schema(schema: Any) -> None:
    for seed in range(20):
        parser = module.ChatParser(0, module.ChatFormat(calls=(TAGS,)), {"f": schema}, "", frozenset())
        text = written(schema, seed)
        if not text.endswith("</call>"):
            continue  # a number without end
        events = [*parser.push(text), *parser.finish("stop")]
        arguments = json.loads("".join(e.text for e in events if isinstance(e, module.CallArguments)))
        assert set(arguments) & {"a", "b"}
        Draft202012Validator(schema).validate(arguments)


def test_schema_of_many_unlike_texts_keeps_one_machine() -> None:
    root = read_json(json.dumps(STRINGS), "json_schema")
    state = Automaton(root).start.read(json.dumps([f"text {i}" for i in range(60)]).encode())
    assert state is not None and state.ends
    assert len(root.documents._leaves) == 1  # type: ignore[attr-defined]


R = {"$ref": "#/$defs/R"}
HOLDS_ITSELF: dict[str, Any] = {**R, "$defs": {"R": {**ANY_ARRAY, "uniqueItems": True, "items": R}}}


@cases("schema, text, ends", {
    "a text twice": (STRINGS, '["ab", "ab"', None),
    "a text twice, escaped": (STRINGS, r'["ab", "\u0061b"', None),
    "a text twice, once escaped": (STRINGS, r'["\u00e9", "é"', None),
    "a slash twice": (STRINGS, r'["a\/b", "a/b"', None),
    "no text twice": (STRINGS, '["", ""', None),
    "texts that begin alike": (STRINGS, '["ab", "abc", "a", "b"]', True),
    "half a pair twice": (STRINGS, r'["\ud83d\ude00", "\ud83d\ude01"]', True),
    "a backslash": (STRINGS, r'["a\\b", "ab"]', True),
    "the empty list, and others": (HOLDS_ITSELF, "[[], [[]], [[], [[]]]]", True),
    "a list twice": (HOLDS_ITSELF, "[[], []", None),
    "a list twice, further in": (HOLDS_ITSELF, "[[[]], [[], []", None),
    "three lists that hold each other": (HOLDS_ITSELF, "[[], [[]], [[[]]]]", True),
    "an object in another order": (UNIQUE, '[{"a": 1, "b": 2}, {"b": 2, "a": 1', False),
    "an object that goes on": (UNIQUE, '[{"a": 1}, {"a": 1, "b": 2}]', True),
})  # fmt: skip
def test_array_without_repeats_takes_what_is_new(schema: Any, text: str, ends: bool | None) -> None:
    here = begin(schema).read(text.encode())
    assert (here.ends if here else None) == ends
    assert here is None or ends or not here.bits >> ord("}") & 1


def test_element_that_begins_like_another_can_still_become_one_of_its_own() -> None:
    text = {"type": "string", "pattern": "b", "maxLength": 2}
    schema = {**ANY_ARRAY, "uniqueItems": True, "items": {"type": "object", "properties": {"a": text}, "required": ["a"]}}
    here = follow(begin(schema), b'[{"a": "1b"}, {"a": "')
    assert here and here.step(ord("2")) and here.step(ord("b")) and not here.step(ord("1"))


def elements(items: dict[str, Any]) -> dict[str, Any]:
    """Lists without repeats."""
    return {**UNIQUE, "items": items}


def test_text_that_nests_too_deep_to_be_followed_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="nests too deep"):
        begin(HOLDS_ITSELF).read(b"[" * 3000 + b"]")


@cases("schema, said", {
    "a format that a constant must not have": ({"const": "a", "not": {"format": "email"}}, "format"),
    "an array beside something else": ({"type": ["array", "null"], "uniqueItems": True, "minItems": 2,
                                        "prefixItems": [{"const": 1}, {"const": 1}]}, "uniqueItems"),
    "objects that can only be empty, without repeats": ({**UNIQUE, "prefixItems": [
        {**OBJECT, "maxProperties": 0}, {**OBJECT, "additionalProperties": False}]}, "uniqueItems"),
    "elements that may take what must be contained": (
        {**UNIQUE, "prefixItems": [{"enum": [1, [2]]}], "items": {"const": [2]}, "contains": {"const": [2]}, "minContains": 2},
        "uniqueItems"),
})  # fmt: skip
def test_schema_is_refused_before_a_text_begins_and_by_its_field(schema: Any, said: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^json_schema: .*{said}") as refused:
        begin(schema)
    assert refused.value.param == "json_schema"


def test_what_a_number_must_not_be_is_one_machine_however_it_is_written():
    values = list(range(0, 4000, 2))
    here = begin({"type": "integer", "minimum": 0, "not": {"enum": values}}).read(b"1")
    assert here is not None and here.ends and len(here.stacks) == 1
    schema = {"type": "integer", "not": {"enum": values}}
    assert not accepts(schema, 1998) and accepts(schema, 1999)
    for document in ("0", "-0", "0.0", "2", "2.0", "2.50", "-1"):
        here = begin({"type": "number", "not": {"enum": [0, 2, 2.5, -1]}}).read(document.encode())
        assert here is None or not here.ends, document


@cases("schema, least", {
    "a pattern": (elements({"type": "string", "pattern": "^(x|yy|zzz)$"}), 3),
    "a pattern and lengths": (elements({"type": "string", "pattern": "^[ab]*$", "maxLength": 1}), 3),
    "one multiple": (elements({"type": "number", "exclusiveMinimum": 0.5, "maximum": 2, "multipleOf": 2}), 1),
    "halves": (elements({"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.5}), 3),
    "lists of one": (
        elements({"type": "array", "items": {"type": "string", "pattern": "^[ab]$"}, "minItems": 1, "maxItems": 1}), 2),
    "lists without repeats": (elements({"type": "array", "items": {"const": 1}, "uniqueItems": True}), 2),
    "objects": (
        elements({"type": "object", "properties": {"a": {"type": "string", "pattern": "^[ab]$"}}, "minProperties": 1}), 2),
    "names of a pattern": ({"type": "object", "patternProperties": {"^[ab]$": {}}}, 2),
    "beside one that is named": ({"type": "object", "properties": {"a": {}, "c": {}}, "patternProperties": {"^[ab]$": {}}}, 3),
    "the empty name": ({"type": "object", "additionalProperties": {}, "propertyNames": {"maxLength": 0}}, 1),
})  # fmt: skip
def test_different_elements_and_names_are_counted(schema, least):
    count = "minItems" if schema["type"] == "array" else "minProperties"
    with pytest.raises(InvalidRequest, match="no document can fit"):
        begin({**schema, count: least + 1})
    for seed in range(20):
        text = walk(begin({**schema, count: least}), random.Random(seed), 5000)
        assert (text is None and count == "minProperties") or len(json.loads(text)) == least


def test_objects_keep_room_for_what_they_need_and_differ_in_their_names():
    here = begin({"type": "object", "properties": {"name": {}}, "patternProperties": {"^[ab]$": {}}, "minProperties": 3})
    assert here.forced(100) == b'{"name": '
    letters = [chr(code) for code in range(ord("a"), ord("u"))]
    item = {"type": "object", "properties": {"a": {"enum": letters}}, "required": ["a"]}
    schema = {"type": "array", "items": item, "uniqueItems": True}
    here = begin(schema).read(("[" + ", ".join(f'{{"a": "{letter}"}}' for letter in letters[:-2]) + ', {"a": "').encode())
    assert here is not None and here.bits == 1 << ord("s") | 1 << ord("t")


def wide_object(*required: int, count: int = 700, **fields: Any) -> dict[str, Any]:
    """An object with many properties, of which those of some numbers are required."""
    properties = {f"p{number}": {"type": "null"} for number in range(count)}
    return {"type": "object", "properties": properties, "required": [f"p{number}" for number in required], **fields}


def nulls(*numbers: int | str) -> dict[str, None]:
    return {f"p{number}": None for number in numbers}


@cases("schema, value, fits", {
    "the first": (wide_object(), nulls(0), True),
    "one far behind": (wide_object(), nulls(699), True),
    "one of each part": (wide_object(), nulls(3, 300, 600), True),
    "none": (wide_object(), {}, True),
    "one before another": (wide_object(), nulls(600, 300), False),
    "one that is not there": (wide_object(), nulls(700), False),
    "one that is not there, where more may be": (wide_object(additionalProperties={"type": "null"}), nulls(5, 700), True),
    "what is required in a later part": (wide_object(400), nulls(2, 400, 600), True),
    "without what is required in a later part": (wide_object(400), nulls(2, 600), False),
    "as many as there must be": (wide_object(minProperties=2), nulls(1, 690), True),
    "too few": (wide_object(minProperties=2), nulls(690), False),
    "as many as there may be": (wide_object(650, maxProperties=2), nulls(1, 650), True),
    "too many before what is required": (wide_object(650, maxProperties=2), nulls(1, 2, 650), False),
})  # fmt: skip
def test_object_with_many_properties_holds_what_it_may(schema: dict[str, Any], value: dict[str, Any], fits: bool):
    assert accepts(schema, value) == fits


def test_gate_is_idle_when_the_last_of_its_threads_has_ended():
    gate = module.Gate()

    def work() -> None:
        with TURN.behind(gate, Cancellation()):
            TURN.tick()

    with TURN.behind(gate, Cancellation()):
        other = threading.Thread(target=work)
        other.start()
        other.join()
        assert not gate.idle.is_set()
    assert gate.idle.is_set()


@cases("schema", {"not a word": {"not": {"pattern": "TODO"}, "minLength": 10_000},
                  "ends so": {"format": "uri", "pattern": "x$", "minLength": 100}})  # fmt: skip
def test_long_string_is_read_in_turns_however_intricate(schema: dict[str, Any]) -> None:
    assert asked_again(begin({"type": "string", **schema}), b'"a')[1] < 20_000


def test_work_behind_a_gate_waits_while_it_is_shut():
    gate, ticks = module.Gate(), itertools.count()

    def work() -> None:
        with TURN.behind(gate, Cancellation()):
            while next(ticks) < 20_000_000 and not done.is_set():
                TURN.tick()

    done, worker = threading.Event(), threading.Thread(target=work)
    worker.start()
    eventually(lambda: next(ticks) > 100, "it works")
    with gate.shut(0.0):
        time.sleep(0.05)  # one tick may be under way
        before = next(ticks)
        time.sleep(0.05)
        assert next(ticks) == before + 1
    eventually(lambda: next(ticks) > before + 100, "it goes on")
    done.set()
    worker.join(HANG)
    with gate.shut(HANG):  # nothing to wait for
        pass


@cases("usual, decoding, sought, seconds", {
    "a quick step": (0.001, 2, 0.0, 0.01),
    "a quick step in which others have asked": (0.001, 2, 0.02, 0.0025),
    "a step of a large model": (3.0, 2, 0.02, 1.0),
    "a prompt alone": (3.0, 0, 0.0, None),
})  # fmt: skip
def test_grammar_that_is_read_has_a_part_of_each_step(usual: float, decoding: int, sought: float, seconds: float | None):
    """A large model's steps take seconds: in 10 ms of each, a grammar would count as stuck before it is read."""
    given = list[float]()
    pace = module.Pace(512)
    pace.record(2, 2, usual)
    engine = types.SimpleNamespace(
        llama=types.SimpleNamespace(gate=types.SimpleNamespace(shut=given.append)), _sought=sought,
        PATIENCE=module.Engine.PATIENCE, scheduler=types.SimpleNamespace(pace=pace))  # fmt: skip
    module.Engine._undisturbed(engine, decoding)  # type: ignore[arg-type]
    assert given == ([] if seconds is None else [pytest.approx(seconds)])


@streamed_and_plain
def test_schema_that_takes_long_to_read_is_refused_by_the_engine(stream: bool, server: Server) -> None:
    slow_pattern = {"type": "string", "pattern": "^(" + "|".join(f"w{n}" for n in range(2500)) + ")$"}  # refused, after a while
    reply = server.chat("hi", "dice", json_schema={"properties": {"a": slow_pattern}}, stream=stream)
    error = assert_error(reply, 400, "invalid_request", "json_schema: pattern", "readings at once")
    assert error["param"] == "json_schema"


@pytest.mark.parametrize("threads", [1, len(module.processors())])
def test_schema_that_takes_long_to_read_is_followed(threads: int, serve: Serve) -> None:
    own = serve("--models-dir", REPO / "models", "--model", TINY, "--threads", threads)
    with own.endless(TINY) as other:
        next(other)
        reply = own.chat("hi", TINY, json_schema=wide_object(7, count=20_000))
        next(other)
    assert json.loads(reply.message["content"])["p7"] is None


def test_lists_that_differ_within_lists_that_differ_cost_little():
    schema = {"type": "array", "uniqueItems": True, "items": {"type": "array", "uniqueItems": True}}
    automaton = Automaton(read_json(json.dumps(schema), "x"))
    here = automaton.start.read(b'[[1, [2]], [1, [3]], [1, [2, 4')
    assert here is not None and here.bits >> ord("]") & 1


def test_grammar_that_is_or_becomes_too_ambiguous_names_its_field(server: Server) -> None:
    begins = "root ::= " + " | ".join(f'[a-z]{{{n}}} "{n}"' for n in range(60, 5000))
    error = assert_error(server.chat("hi", "dice", grammar=begins), 400, "invalid_request", "grammar: the grammar is ambiguous")
    assert error["param"] == "grammar"
    error = assert_error(server.chat("hi", "dice", grammar=MOST, max_tokens=100), 400, "invalid_request", "ambiguous")
    assert error["param"] == "grammar"


# ── Tools ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
# The three built-in tools and tools from a file, with their limits.


def execute(server: Server, name: str, value: Any) -> Reply:
    """Runs a tool with `value` as its one required argument."""
    tools = {tool["name"]: tool for tool in server.get("/api/tools").json()["tools"]}
    (argument,) = tools[name]["parameters"]["required"]
    return server.post(f"/api/tools/{name}/execute", {argument: value})


def assert_tool_failed(reply: Reply, *words: str) -> None:
    answer = reply.json()
    assert reply.status == 200 and answer["success"] is False and answer["error"], answer
    assert "Traceback" not in answer["error"]
    for word in words:
        assert word in answer["error"]


def test_tools_are_listed_with_a_json_schema(server: Server) -> None:
    tools = {tool["name"]: tool for tool in server.get("/api/tools").json()["tools"]}
    assert {"calculator", "file_read", "http_get", "double"} <= set(tools)
    for tool in tools.values():
        assert tool["description"] and tool["parameters"]["type"] == "object"
    assert tools["double"]["description"].startswith("Twice a number.")
    assert tools["double"]["parameters"]["properties"]["n"]["type"] == "integer"


@cases("arguments", {"none": {}, "an unknown argument": {"wrong": 1}, "a list": [], "a string": "2+2", "an empty body": None})
def test_tool_arguments_outside_the_schema_are_400(arguments: Any, server: Server) -> None:
    body = b"" if arguments is None else arguments
    assert_error(server.post("/api/tools/calculator/execute", body), 400, "invalid_request")


def test_tool_of_a_file_runs_and_its_arguments_are_checked(server: Server) -> None:
    assert_error(server.post("/api/tools/double/execute", {"n": "five"}), 400, "invalid_request", "n", "integer")
    assert_error(execute(server, "calculator", 5), 400, "invalid_request", "string")
    reply = server.post("/api/tools/stumble/execute", {"why": None})
    assert reply.json()["error"] == "ValueError: stumbled over no reason"
    assert_error(server.post("/api/tools/hammer/execute", {}), 404, "not_found", "hammer")
    answer = server.post("/api/tools/double/execute", {"n": 21}).json()
    assert answer["success"] is True and answer["result"] == 42
    assert_tool_failed(server.post("/api/tools/stumble/execute", {"why": "a stone"}), "stumbled over a stone")
    assert_tool_failed(server.post("/api/tools/stumble/execute", {}), "no reason")


@cases("source, word", {
    "a missing import": ("import nothing_like_it", "nothing_like_it"),
    "a syntax error": ("def (", "broken.py"),
    "raises": ("raise ValueError('so there')", "so there"),
    "divides by zero": ("1 / 0", "zero"),
    "a parameter without a type": ("from shimmy import tool\n@tool\ndef f(x): ...", "x"),
})  # fmt: skip
def test_tools_file_that_fails_to_load_exits_1_with_one_line(source: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(source + "\n")
    flags = ["serve", "--port", "0", "--tools", str(tmp_path / "broken.py")]
    assert_failed(run_in_this_process(flags, tmp_path, b"", seeded(tmp_path, None)), 1, word)


def test_tools_that_are_not_opened_stay_listed_and_name_their_flag(guarded: Server, server: Server) -> None:
    key = {"Authorization": "Bearer s3cret"}
    tools = {tool["name"] for tool in guarded.get("/api/tools", **key).json()["tools"]}
    assert {"calculator", "file_read", "http_get"} <= tools
    assert_tool_failed(guarded.post("/api/tools/file_read/execute", {"path": "x"}, **key), "--tool-root")
    assert_tool_failed(guarded.post("/api/tools/http_get/execute", {"url": "http://other.example/"}, **key), "other.example")
    with pytest.raises(module.ToolError, match="--tool-hosts"):
        module.HttpGetter([]).http_get("http://example.com/")


SUMS = {
    "2 + 3*4": 14, "(1 + 2) / 4": 0.75, "-7 // 2": -4, "7 % 4": 3, "2**10": 1024, "sqrt(16)": 4,
    "abs(-3)": 3, "floor(2.9)": 2, "max(1, 5, 3)": 5, "factorial(5)": 120, "round(2.345, 1)": 2.3, "sin(pi / 2) + log(e)": 2,
}  # fmt: skip


@cases("expression, result", {f"{sum} = {result}": (sum, result) for sum, result in SUMS.items()})
def test_calculator_evaluates(expression: str, result: float, server: Server) -> None:
    answer = execute(server, "calculator", expression).json()
    assert answer["success"] is True and answer["result"] == pytest.approx(result) and not answer["error"]


@pytest.mark.parametrize(
    "expression",
    ["1/0", "", "2 +", "__import__('os')", "().__class__", "(1).real", "[1 for _ in 'ab']", "lambda: 1", "x", "'a' * 9",
     "open('/etc/passwd')", "9**9**9", "10**1000000", "factorial(10**6)", "1e308 * 10", "1 << 10**9", "sqrt(-1)",
     "pow(9, 10**9)", "comb(10**6, 5 * 10**5)", "(a := 1)", "'a'.join(['b'])", "f'{1}'", "1; 2",
     "(-8) ** 0.5", "2 ** 500000", "factorial(-1)", "round(5, -3000000)", "round(1.5, 10**9)"],
    ids=lambda expression: expression or "nothing",
)  # fmt: skip
def test_calculator_rejects(expression: str, server: Server) -> None:
    reply = execute(server, "calculator", expression)
    if expression or reply.status != 400:
        assert_tool_failed(reply)


@pytest.mark.parametrize("long", ["parentheses", "sum", "minuses", "digits"])
def test_calculator_survives_a_long_expression(long: str, server: Server) -> None:
    n = 20_000
    text = {"parentheses": "(" * n + "1" + ")" * n, "sum": "1" + "+1" * n, "minuses": "-" * n + "1", "digits": "9" * n}
    reply = execute(server, "calculator", text[long])
    assert reply.status in (200, 400) and b"Traceback" not in reply.body
    assert reply.status == 400 or reply.json()["error"] or reply.json()["result"] in (1, n + 1)


@cases("path, text", {
    "at the root": ("note.txt", "a café note"), "in a folder": ("sub/deep.txt", "deep"),
    "through ..": ("sub/../note.txt", "a café note"),
})  # fmt: skip
def test_file_read_reads_a_file_inside_its_root(path: str, text: str, server: Server) -> None:
    answer = execute(server, "file_read", path).json()
    assert answer["success"] is True and text in json.dumps(answer["result"], ensure_ascii=False)


@cases("path", {
    "above the root": "../secret.txt", "above the root through a folder": "sub/../../secret.txt",
    "a link to a file outside": "escape.txt", "through a link to a folder outside": "up/secret.txt",
    "an absolute path": "/etc/passwd", "one beside the root": "{root}/../secret.txt", "a missing file": "missing.txt",
    "a folder": "sub", "the root itself": ".", "nothing": "", "a pipe": "pipe", "a NUL in the name": "note.txt\0.png",
    "a name of 300 characters": "a" * 300, "the home folder": "~/x", "a device": "/dev/zero",
    "a process's environment": "/proc/self/environ",
})  # fmt: skip
def test_file_read_rejects(path: str, server: Server, tool_root: Path) -> None:
    reply = execute(server, "file_read", os.path.normpath(path.format(root=tool_root)) if "{" in path else path)
    if reply.status != 400:
        assert_tool_failed(reply)
    assert b'secret"' not in reply.body


def test_file_read_limits_its_result(server: Server) -> None:
    reply = execute(server, "file_read", "huge.bin")
    assert reply.status == 200 and len(reply.body) < 20 << 20


REJECTED_URLS = [
    "http://127.0.0.1:{port}/health", "http://localhost:{port}/health", "http://[::1]:{port}/", "http://0.0.0.0:{port}/",
    "http://2130706433:{port}/", "http://127.1:{port}/health", "http://[::ffff:127.0.0.1]:{port}/", "http://10.0.0.1/",
    "http://192.168.1.1/", "http://169.254.169.254/latest/meta-data", "http://100.64.0.1/", "http://[fe80::1]/",
    "http://[fc00::1]/", "http://224.0.0.1/", "file:///etc/passwd", "ftp://example.com/", "gopher://x/", "http://",
    "nonsense", "http://user@127.0.0.1:{port}/health", "http://[64:ff9b::7f00:1]/",
]  # fmt: skip


@pytest.mark.parametrize("url", REJECTED_URLS)
def test_http_get_rejects(url: str, server: Server) -> None:
    reply = execute(server, "http_get", url.format(port=server.port))
    if reply.status != 400:
        assert_tool_failed(reply)
    assert b"healthy" not in reply.body


NOT_GLOBAL = ["[::7f00:1]", "[::ffff:10.0.0.1]", "[64:ff9b::a00:1]", "[64:ff9b:1::a00:1]", "[fec0::1]", "[2002:7f00:1::]",
              "[3fff::1]", "0.0.0.0", "100.64.0.1", "224.0.0.1", "192.88.99.1", "[2002:808:808::1]", "[2001:0:808:808::1]"]


@pytest.mark.parametrize("host", NOT_GLOBAL)
def test_http_get_rejects_a_non_global_address(host: str, server: Server) -> None:
    assert_tool_failed(execute(server, "http_get", f"http://{host}/"), "not global")


def test_tool_that_does_not_return_is_given_up_until_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    awake = threading.Event()

    def sleeper() -> str:
        """Sleeps."""
        return "awake" if awake.wait(HANG) else "in vain"

    monkeypatch.setattr(module, "TOOL_SECONDS", 0.2)
    monkeypatch.setitem(module.REGISTERED, "sleeper", module.make_tool(sleeper))
    tools = module.Tools(module.ToolOptions())
    for _ in range(4):
        assert tools.execute("sleeper", {}) == {"success": False, "result": None, "error": "sleeper took over 0.2 seconds"}
    with quickly():
        assert "4 calls of sleeper have not come back" in tools.execute("sleeper", {})["error"]
    assert tools.execute("calculator", {"expression": "1 + 1"})["result"] == 2
    awake.set()
    eventually(lambda: tools.execute("sleeper", {})["result"] == "awake", "they have come back")


def read_while_swapped(root: Path, path: str, swap: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What file_read gives or raises when `swap` happens between its look and its opening."""
    is_file = pathlib.Path.is_file
    outcome: list[Any] = []

    def then_swap(self: pathlib.Path) -> bool:
        found = is_file(self)
        swap()
        return found

    def read() -> None:
        try:
            outcome.append(module.FileReader(str(root)).file_read(path))
        except module.ToolError as error:
            outcome.append(error)

    monkeypatch.setattr(pathlib.Path, "is_file", then_swap)
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(10.0)
    return outcome


def swapped_in_time(folder: Path, swap: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The one error that file_read raises for sub/note.txt, which `swap` changes."""
    (folder / "root" / "sub").mkdir(parents=True)
    (folder / "root" / "sub" / "note.txt").write_text("note")
    (answer,) = read_while_swapped(folder / "root", "sub/note.txt", swap, monkeypatch)
    assert isinstance(answer, module.ToolError)
    return answer


def test_file_read_does_not_follow_a_link_put_there_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note.txt").write_text("secret")

    def swap() -> None:
        (tmp_path / "root" / "sub").rename(tmp_path / "root" / "old")
        (tmp_path / "root" / "sub").symlink_to(tmp_path / "out")

    swapped_in_time(tmp_path, swap, monkeypatch)


def test_file_read_does_not_wait_for_a_pipe_put_there_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swap() -> None:
        (tmp_path / "root" / "sub" / "note.txt").unlink()
        os.mkfifo(tmp_path / "root" / "sub" / "note.txt")

    assert "regular" in str(swapped_in_time(tmp_path, swap, monkeypatch))


# IANA's special-purpose address registries, and what is no unicast
SPECIAL = ["0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
           "192.0.0.9/32", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16",
           "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
           "255.255.255.255/32", "::/128", "::1/128", "::ffff:10.0.0.0/104", "64:ff9b::10.0.0.0/104", "64:ff9b:1::/48",
           "100::/64", "100:0:0:1::/64", "2001::/23", "2001:1::1/128", "2001:2::/48", "2001:3::/32", "2001:4:112::/48",
           "2001:10::/28", "2001:20::/28", "2001:30::/28", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20",
           "5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8"]  # fmt: skip


@pytest.mark.parametrize("network", SPECIAL)
def test_special_purpose_network_is_not_global(network: str) -> None:
    addresses = ipaddress.ip_network(network)
    assert not any(map(module.is_global, map(str, (addresses[0], addresses[addresses.num_addresses // 2], addresses[-1]))))


@pytest.mark.parametrize("address", ["1.1.1.1", "9.255.255.255", "11.0.0.0", "192.0.1.0", "192.88.98.255", "192.88.100.0",
                                     "223.255.255.255", "2606:4700::1111", "2001:200::1", "2a00::1", "::ffff:8.8.8.8",
                                     "64:ff9b::8.8.8.8"])  # fmt: skip
def test_public_address_is_global(address: str) -> None:
    assert module.is_global(address)


def test_client_that_leaves_a_tool_or_its_chat_is_not_waited_for(serve: Serve, models: Path, tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(STUCK_WEATHER)
    own = serve("-v", "--models-dir", models, "--tools", tmp_path / "stuck.py")
    asks = {"/api/tools/get_weather/execute": {"city": "Paris"},
            "/v1/chat/completions": chatting("weather", tools=[WEATHER_BUILTIN], stream=True)}  # fmt: skip
    for path, body in asks.items():
        with socket.create_connection((own.host, own.port), timeout=HANG) as gone:
            gone.sendall(raw_post(path, json.dumps(body).encode()))
            assert "tools" in path or gone.recv(100)
            time.sleep(0.5)
        eventually(lambda path=path: f"POST {path}" in own.log.read_text(), "the request ends")  # type: ignore[misc]
    (line,) = [line for line in own.log.read_text().splitlines() if "POST /api/tools" in line]
    assert " 200 " not in line
    assert own.status("recital")["requests_running"] == own.status("recital")["requests_waiting"] == 0


# Tools against hostile arguments.

BOMBS = ["9**9**9**9", "(9**999)**(9**999)", "factorial(400) * factorial(400) * factorial(400)", "2**4095 * 2**4095", "9" * 999,
         "-" * 999 + "1",
         "(" * 499 + "1" + ")" * 499, "max(" * 199 + "1" + ")" * 199, "abs(" * 199 + "1" + ")" * 199, "1" + "**1" * 330,
         "2" + "**2" * 300,
         "'a' * 10**9", "f'{1:>999999999}'", "[0] * 10**9", "(0,) * 10**9", "{1: 2}", "0x" + "f" * 990, "1e999", "1j",
         "True + True", "...",
         "10.0**308 * 10", "floor(1e308)", "round(1e308, 400)", "round(2**4000, -400)", "round(1.5, 2**64)", "round(1, True)",
         "log(0)", "atan2(1)",
         "min()", "max(*[1])", "abs(x=1)", "hypot(" + "1," * 480 + "1)", "2**-(2**4000)", "0**-1", "(-1)**0.5", "1**(2**4000)",
         "(2**4000) % 3.5",
         "1\n2", "1;2", "\0", "\ud7ff", "pi.real", "__builtins__", "(lambda: 0)()", "1 if 1 else 2", "1 < 2", "not 1", "~1",
         "1 << 99999999", "1 @ 1",
         "await 1", "factorial(True)", "gcd(2**4000, 3**2500)", "fmod(1e308, 5e-324)", "exp(1e4)", "sqrt(2**4095)",
         "degrees(1e308)",
         "comb(9**9, 9)", "9 ^ 9 ^ 9", "pow(9, 9**9)", "sum([1])", "1_0", "\u0661 + \u0661", "\uff11+\uff11"]  # fmt: skip


@pytest.mark.parametrize("expression", BOMBS, ids=[f"{number} {bomb[:16]!a}" for number, bomb in enumerate(BOMBS)])
def test_calculator_gives_a_number_or_a_reason_at_once(expression: str) -> None:
    began = time.thread_time()
    try:
        result = module.calculator(expression)
    except module.ToolError as error:
        assert str(error) and len(str(error)) < 200
    else:
        assert type(result) in (int, float) and json.loads(json.dumps(result, allow_nan=False)) == result
    assert time.thread_time() - began < 0.2


@more_under_soak
@fuzz(300)
@hypothesis.given(st.lists(st.sampled_from([*"0123456789+-*/%^().,e _\"'[]{}\n\t\0", *module.MATH_FUNCTIONS, "pi", "**", "//",
                                            "factorial(", "round(", "1e308", "9999", "lambda", " if ", "x:=", "\u00b2"]),
                           max_size=30))  # fmt: skip
def test_calculator_survives_any_expression(parts: list[str]) -> None:
    with contextlib.suppress(module.ToolError):
        assert type(module.calculator("".join(parts))) in (int, float)


@pytest.fixture(scope="module")
def walled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tool root with ways out of it."""
    folder = tmp_path_factory.mktemp("walled")
    root = folder / "root"
    (root / "sub" / "deep").mkdir(parents=True)
    (folder / "root-too").mkdir()
    for path in (folder / "secret", folder / "root-too" / "secret"):
        path.write_text("secret")
    (root / "loop").symlink_to("loop")
    (root / "one").symlink_to("two")
    (root / "two").symlink_to("one")
    (root / "up").symlink_to("../secret")
    (root / "far").symlink_to("/proc/self/environ")
    (root / "sub" / "deep" / "root").symlink_to("/")
    (root / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(root / "door"))
    return root


OUTSIDE = ["../secret", "sub/../../secret", "./sub/deep/../../../secret", "sub//..//..//secret", "up", "up/",
           "../root-too/secret", "far",
           "sub/deep/root/etc/passwd", "sub/deep/root/proc/self/environ", "/proc/self/root/etc/passwd",
           "/proc/self/cwd/../secret", "zero", "door",
           "loop", "loop/x", "one", "sub/deep", "//etc/passwd", "~root/.bashrc", "sub\\..\\..\\secret", "..%2fsecret",
           "\u2025/secret", "\0", "a\0b",
           "x" * 5000, "/".join("x" * 2000), "note\n../secret", "file:///etc/passwd", "C:\\Windows\\win.ini", "$HOME",
           "*"]  # fmt: skip


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: f"{path[:24]!a}")
def test_file_read_stays_inside_and_says_so_without_a_path(path: str, walled: Path) -> None:
    with pytest.raises(module.ToolError) as refused:
        module.FileReader(str(walled)).file_read(path)
    assert str(walled) not in str(refused.value) and str(refused.value).isprintable()


@pytest.mark.skipif(not hasattr(os, "mknod") or os.geteuid() != 0, reason="only root makes devices")
def test_file_read_opens_no_device(walled: Path) -> None:
    try:
        os.mknod(walled / "device", 0o600 | 0o020000, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("not even root makes devices here")
    with pytest.raises(module.ToolError, match="regular"):
        module.FileReader(str(walled)).file_read("device")


NUMERIC = ["2130706433", "0x7f000001", "0x7F.1", "0177.0.0.1", "017700000001", "127.1", "127.0.1", "0", "0.0", "127.0.0.1.",
           "localhost", "LOCALHOST.",
           "\u2460\u2461\u2466.0.0.1", "127\u30020\u30020\u30021", "\uff11\uff12\uff17.0.0.1", "[::]", "[::1]",
           "[0:0:0:0:0:ffff:7f00:1]",
           "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[::ffff:0:127.0.0.1]", "[::1%25lo]", "[::1%lo]",
           "[fe80::1%25eth0]", "[fe80::1%1]",
           "[64:ff9b::127.0.0.1]", "[64:ff9b::10.0.0.1]", "[64:ff9b:1::1]", "[2002:7f00:1::]", "[2002:a00:1::]", "[2001::1]",
           "[fc00::1]", "[ff02::1]",
           "[fec0::1]", "10.1", "0xa9fea9fe", "169.254.169.254", "2852039166", "[fd00:ec2::254]", "255.255.255.255",
           "224.0.0.1", "100.100.100.200"]  # fmt: skip


@pytest.mark.parametrize("host", NUMERIC, ids=ascii)
@pytest.mark.parametrize("form", ["http://{}:{}/health", "http://evil.example@{}:{}/health"], ids=["plain", "behind a user"])
def test_http_get_reaches_no_private_address_in_any_spelling(form: str, host: str, server: Server) -> None:
    reply = execute(server, "http_get", form.format(host, server.port))
    assert_tool_failed(reply)
    assert b"healthy" not in reply.body


NO_ADDRESSES = [
    "http://[", "http://[::1", "http://a:b:c/", "http://x:99999/", "http://x:-1/", "http:///x", "https:/x", "HTTP://", "//x",
    "http://\0/", "http://x\r\nHost: y/", "javascript:1", "data:text/plain,x", "unix:/run/x", "http://" + "a." * 200,
    "http://" + "a" * 70 + ".example/", "http://xn--\ud7ff.example/", "http://*/", "http://%31%32%37.0.0.1/",
    "http://127.0.0.1/" + "a" * 10_000,
]  # fmt: skip


@pytest.mark.parametrize("url", NO_ADDRESSES, ids=lambda url: f"{url[:20]!a}")
def test_http_get_refuses_what_is_no_address(url: str, server: Server) -> None:
    assert_tool_failed(execute(server, "http_get", url), "characters" if len(url) > 9999 else "")


class Resolver:
    """Stands for the name service: each look-up of a name gives its next addresses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> None:
        self.asked: list[str] = []
        self.connected: list[Any] = []
        self._answers, self._real = iter(answers), socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self.look_up)
        monkeypatch.setattr(socket, "create_connection", self.connect)

    def look_up(self, host: str, port: int, **more: Any) -> list[Any]:
        self.asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in next(self._answers)]

    def connect(self, address: Any, **more: Any) -> Any:
        self.connected.append(address[0])
        raise OSError("nobody is there")


@cases("addresses", {
    "loopback": ["127.0.0.1"], "a global and a private one": ["1.1.1.1", "10.0.0.1"], "one in IPv6": ["::ffff:192.168.0.1"],
    "a zone": ["fe80::1%eth0"], "6to4": ["2002:c0a8:1::"], "NAT64": ["64:ff9b::a9fe:a9fe"],
})  # fmt: skip
def test_http_get_refuses_a_name_of_a_private_address(addresses: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = Resolver(monkeypatch, addresses)
    with pytest.raises(module.ToolError, match="not global"):
        module.HttpGetter(["*"]).http_get("http://rebind.example/")
    assert resolver.connected == []


def test_http_get_connects_to_the_address_that_it_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that means another address when it is looked up again gains nothing: it is looked up once."""
    resolver = Resolver(monkeypatch, ["1.1.1.1"], ["127.0.0.1"])
    with pytest.raises(module.ToolError):
        module.HttpGetter(["*"]).http_get("http://rebind.example/")
    assert (resolver.asked, resolver.connected) == (["rebind.example"], ["1.1.1.1"])


class Redirects(http.server.BaseHTTPRequestHandler):
    """Sends whoever comes to `place`."""

    place = ""

    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", self.place)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def redirecting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """A page at what counts as the one global address: redirecting(place) gives its URL."""
    monkeypatch.setattr(module, "is_global", lambda address: address == "127.0.0.2")
    with http.server.ThreadingHTTPServer(("127.0.0.2", 0), Redirects) as pages:
        threading.Thread(target=pages.serve_forever, args=[0.02], daemon=True).start()

        def to(place: str) -> str:
            Redirects.place = place.format(port=pages.server_port)
            return f"http://127.0.0.2:{pages.server_port}/"

        yield to
        pages.shutdown()


@linux
@cases("hosts, place, why", {
    "loopback": ("*", "http://127.0.0.1:{port}/", "not global"),
    "without a scheme": ("*", "//127.0.0.1:{port}/", "not global"),
    "in hexadecimal": ("*", "http://0x7f000001:{port}/", "not global"),
    "in IPv6": ("*", "http://[::ffff:127.0.0.1]:{port}/", "not global"),
    "by name": ("*", "http://localhost:{port}/", "not global"),
    "a file": ("*", "file:///etc/passwd", "http"),
    "another protocol": ("*", "gopher://127.0.0.1/", "http"),
    "itself, without end": ("*", "/", "redirects"),
    "nonsense": ("*", "http://[", "cannot be fetched"),
    "a host that is not opened": ("127.0.0.2", "http://other.example/", r"other\.example is not opened"),
})  # fmt: skip
def test_http_get_checks_where_it_is_sent_on(hosts: str, place: str, why: str, redirecting: Callable[[str], str]) -> None:
    with pytest.raises(module.ToolError, match=why):
        module.HttpGetter([hosts]).http_get(redirecting(place))


STUCK_WEATHER = """
import time
from shimmy import tool

@tool
def get_weather(city: str) -> str:
    '''Never comes back.'''
    time.sleep(3600)
    return ""
"""
WEATHER_BUILTIN = {"type": "builtin", "name": "get_weather"}


def test_tool_that_never_returns_ends_a_chat_with_its_error(serve: Serve, models: Path, tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(STUCK_WEATHER)
    script = altered(tmp_path, ("TOOL_SECONDS = 30.0", "TOOL_SECONDS = 0.3"))
    own = serve("--models-dir", models, "--tools", tmp_path / "stuck.py", script=script)
    with quickly(20.0):
        for _ in range(6):  # beyond the calls that may hang
            message = own.chat("weather", tools=[WEATHER_BUILTIN]).message
            assert message["content"] == TEXTS["S"] and message["tool_results"][0]["error"]
        assert own.chat("hi").message["content"] == TEXTS[":"]
        assert own.stop() == 0


def test_tools_of_a_round_tell_their_results_as_they_come_and_keep_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five calls of one round: each result goes out at once, signs of life between, and none begins when the time is over."""
    for name, seconds in {"TOOL_LOOP_SECONDS": 1.0, "PING_SECONDS": 0.1}.items():
        monkeypatch.setattr(module, name, seconds)
    monkeypatch.setitem(module.REGISTERED, "nap", module.make_tool(nap))
    tools = module.Tools(module.ToolOptions())

    def answer(request: Any, _: Any) -> Iterator[Any]:
        if request.tools and not any(message["role"] == "tool" for message in request.messages):
            for number in range(5):
                yield module.CallBegan(0, number, f"call{number}", "nap")
                yield module.CallArguments(0, number, "{}")
        yield module.ChoiceEnd(0, "stop")

    request = module.GenerateRequest(messages=({"role": "user", "content": "hi"},), builtins=("nap",))
    began, seen = time.monotonic(), list[tuple[float, Any]]()
    for event in module.ToolLoop(tools, request, Cancellation()).run(answer):
        seen.append((time.monotonic() - began, event))
    results = [(at, event) for at, event in seen if isinstance(event, module.ToolResult)]
    assert [event.id for _, event in results] == [f"call{n}" for n in range(5)]
    assert [event.error is None for _, event in results][:2] == [True, True] and results[0][0] < results[1][0] - 0.2
    errors = [str(event.error) for _, event in results[2:]]
    assert "nap took over" in errors[0] and "not run" in errors[1] and "not run" in errors[2]
    assert sum(isinstance(event, module.Waiting) for _, event in seen) >= 4 and seen[-1][0] < 3


def nap() -> bool:
    """Sleeps for a moment."""
    time.sleep(0.4)
    return True


# ── llama.cpp ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# Tokens, text and sampling on the real engine.


def test_spaces_missing_from_the_vocabulary_take_three_tokens_each(serve: Serve, tmp_path: Path) -> None:
    path = write_recital(tmp_path / "spaceless.gguf")
    data, length = path.read_bytes(), struct.pack("<Q", 3)
    assert data.count(length + "▁".encode()) == 1
    path.write_bytes(data.replace(length + "▁".encode(), length + b"ooo"))
    reply = serve("--models-dir", tmp_path, "--ctx", "16384").generate(" " * 3000 + ":", "spaceless")
    assert reply.text == TEXTS[":"] and reply.json()["usage"]["prompt_tokens"] > 9000


def test_special_tokens_never_appear_in_text_and_no_character_is_split(server: Server) -> None:
    reply = server.generate("/")
    assert (reply.text, reply.finish_reason) == ("Goodbye", "stop")
    pieces = server.streamed("/api/generate", {"model": "recital", "prompt": "~"})[:-1]
    texts = [piece["choices"][0]["text"] for piece in pieces]
    assert "".join(texts) == TEXTS["~"] and not any("\ufffd" in text for text in texts)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7], ids="{} tokens".format)
def test_text_cut_inside_a_character_drops_it(count: int, server: Server) -> None:
    text = server.generate("~", max_tokens=count).text
    assert text in ("caf", "café", "café and") and "\ufffd" not in text


def test_streamed_and_plain_text_are_equal_for_random_bytes(server: Server) -> None:
    body = {"model": "dice", "prompt": "Once", "seed": 3, "temperature": 1.5, "max_tokens": 120, "ignore_eos": True}
    plain = server.post("/api/generate", body).text
    assert joined(server.streamed("/api/generate", body)) == plain and len(plain) > 20


@pytest.mark.parametrize("stop", ["STOP", ["STOP"], ["never", "STOP"], ["STOPPED", "STOP"]], ids=json.dumps)
@streamed_and_plain
def test_stop_string_split_across_pieces_never_leaks(stop: Any, stream: bool, server: Server) -> None:
    body = {"model": "recital", "prompt": "|", "stop": stop}
    if stream:
        sent = server.streamed("/api/generate", body)
        assert (joined(sent), sent[-2]["choices"][0]["finish_reason"]) == ("alpha ", "stop")
    else:
        reply = server.post("/api/generate", body)
        assert (reply.text, reply.finish_reason) == ("alpha ", "stop")


@cases("stop, said", {
    "one word": ("STOP", "one STO two "),
    "the earlier of two": (["café", "STOP"], "one STO two "),
    "one that contains another": (["STOPPED", "STOPP"], "one STO two "),
    "one with a character of two bytes": ("fé", "one STO two STOPP ca"),
    "at the very end": (["three"], "one STO two STOPP café "),
    "one that never comes": (["STOPS", "threes"], SPELLED["stops"].text),
    "null": (None, SPELLED["stops"].text),
    "none": ([], SPELLED["stops"].text),
})  # fmt: skip
def test_stop_string_spelled_one_character_at_a_time_never_leaks(stop: Any, said: str, spelling: Server) -> None:
    body = {"model": "speller", "prompt": "." * SPELLER_STARTS["stops"], "stop": stop, "temperature": 0}
    assert spelling.post("/api/generate", body).text == said
    assert joined(spelling.streamed("/api/generate", body)) == said
    assert joined(spelling.streamed("/v1/completions", body)) == said
    assert ws_ask(spelling, **body)[0] == said


def test_chat_stop_string_never_leaks(server: Server) -> None:
    assert spoken_in(server.streamed("/v1/chat/completions", chatting("stopping", stop="STOP"))) == "alpha "
    assert server.chat("stopping", stop=["STOP"]).message["content"] == "alpha "


def test_seed_repeats_a_text_and_without_one_texts_differ(server: Server) -> None:
    def roll(seed: int) -> str:
        return server.generate("Once", "dice", seed=seed, temperature=1, max_tokens=40, ignore_eos=True).text

    assert roll(11) == roll(11) != roll(12)
    fields: dict[str, Any] = {"temperature": 1.5, "max_tokens": 40, "ignore_eos": True}
    assert len({server.generate("Once", "dice", **fields).text for _ in range(3)}) == 3


GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 60, "ignore_eos": True}
ALL: dict[str, Any] = {"top_k": 0, "top_p": 1, "min_p": 0}


@cases("fields, same", {
    "top_k of one": ({"temperature": 3, "top_k": 1}, True), "min_p of all": ({"temperature": 3, "min_p": 1}, True),
    "top_p of nothing": ({"temperature": 3, "top_p": 0}, True),
    "no deviation": ({**ALL, "temperature": 3, "top_n_sigma": 0.0001}, True),
    "Mirostat's lowest": ({**ALL, "temperature": 3, "mirostat": 2, "mirostat_tau": 0}, True),
    "XTC above one half": ({"xtc_probability": 1, "xtc_threshold": 0.6}, True), "presence": ({"presence_penalty": 2}, False),
    "frequency": ({"frequency_penalty": 2}, False), "repetition": ({"repeat_penalty": 3}, False),
})  # fmt: skip
def test_greedy_text_is_the_same_where_only_the_best_token_is_left_and_another_with_penalties(
    fields: dict[str, Any], same: bool, server: Server
) -> None:
    greedy = server.generate("Once", "dice", **GREEDY).text
    assert (server.generate("Once", "dice", **{**GREEDY, **fields}).text == greedy) == same


def test_top_k_beyond_32_bits_means_all(server: Server) -> None:
    ask = functools.partial(server.generate, "roll", "dice", max_tokens=12, temperature=2, seed=3, ignore_eos=True)
    assert ask(top_k=2**32 + 1).text == ask(top_k=10**6).text


def test_sampling_defaults_in_the_model_file_are_used_where_they_make_sense(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With general.sampling.temp 0 in the file, requests without a temperature are greedy."""
    plain = gguf.GGUFWriter.add_bos_token_id

    def write(name: str, **settings: Any) -> None:
        def with_settings(writer: gguf.GGUFWriter, token: int) -> None:
            plain(writer, token)
            for key, value in settings.items():
                (writer.add_string if isinstance(value, str) else writer.add_float32)(f"general.sampling.{key}", value)

        monkeypatch.setattr(gguf.GGUFWriter, "add_bos_token_id", with_settings)
        write_dice(tmp_path / "models" / f"{name}.gguf")

    write("calm")
    write("set", temp=0.0)
    for key in ("temp", "top_k", "top_p"):
        write(f"odd-{key}", **{key: "inf"})
    own = serve("--models-dir", tmp_path / "models", "--max-loaded", "1")
    ask = {"prompt": "roll", "max_tokens": 24, "ignore_eos": True}
    said = [own.post("/v1/completions", {**ask, "model": "set"}).text for _ in range(2)]
    assert said[0] == said[1] == own.post("/v1/completions", {**ask, "model": "set", "temperature": 0}).text
    wild = {own.post("/v1/completions", {**ask, "model": "calm", "temperature": 1.5}).text for _ in range(3)}
    assert len(wild) > 1
    assert [own.post("/v1/completions", {**ask, "model": f"odd-{key}"}).status for key in ("temp", "top_k", "top_p")] == [200] * 3


def test_chat_logit_bias_forces_a_token(server: Server) -> None:
    bias = {str(TOKEN_ID["w07 "]): 100}
    assert server.chat("count", logit_bias=bias, max_tokens=3).message["content"] == "w07 w07 w07 "


def test_logprobs_are_returned_on_request(server: Server) -> None:
    choice = server.chat(logprobs=True, top_logprobs=2, temperature=0).json()["choices"][0]
    tokens = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == "Hello wide world"
    assert all(token["logprob"] == pytest.approx(0, abs=0.01) and len(token["top_logprobs"]) == 2 for token in tokens)
    body = {"model": "recital", "prompt": ":", "logprobs": 2, "temperature": 0}
    logprobs = server.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == "Hello wide world"
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"])
    assert logprobs["text_offset"][:3] == [1, 6, 11]  # from the prompt's start


LOGITS = """import json, sys, llama_cpp
llama, prompt = llama_cpp.Llama(sys.argv[1], n_ctx=64, logits_all=True, verbose=False), json.loads(sys.argv[2])
llama.eval(prompt)
print(json.dumps([float(score) for score in llama.scores[len(prompt) - 1]]))"""


def test_logprobs_match_a_full_softmax(kinds: Server, tmp_path: Path) -> None:
    path, prompt = write_kind(tmp_path / "same.gguf", "llama"), ids("What comes next")
    done = subprocess.run([sys.executable, "-c", LOGITS, path, json.dumps(prompt)], capture_output=True, check=True)
    scores = np.array(json.loads(done.stdout.splitlines()[-1]))
    expected = scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())
    body = {"model": "llama", "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 5, "ignore_eos": True}
    shown = kinds.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    assert shown["token_logprobs"][0] == pytest.approx(expected.max(), abs=2e-2)
    top = sorted(shown["top_logprobs"][0].values(), reverse=True)
    assert top == pytest.approx(sorted(expected, reverse=True)[:5], abs=2e-2)


ECHOED = """import json, sys, numpy, llama_cpp
llama, prompt = llama_cpp.Llama(sys.argv[1], n_ctx=512, logits_all=True, verbose=False), json.loads(sys.argv[2])
llama.eval(prompt)
rows = llama.scores[: len(prompt) - 1].astype(float)
rows -= rows.max(axis=1, keepdims=True)
rows -= numpy.log(numpy.exp(rows).sum(axis=1, keepdims=True))
print(json.dumps([float(row[token]) for row, token in zip(rows, prompt[1:])]))"""


def test_an_echo_tells_the_log_probabilities_that_llama_cpp_has(kinds: Server, tmp_path: Path) -> None:
    kind = "mamba"  # whose state must be saved on the way
    path, prompt = write_kind(tmp_path / "same.gguf", kind), ids("What comes next, and what then? " * 4)
    done = subprocess.run([sys.executable, "-c", ECHOED, path, json.dumps(prompt)], capture_output=True, check=True)
    body = {"model": kind, "prompt": [prompt] * 2, "max_tokens": 0, "echo": True, "logprobs": 2}
    with kinds.stream("/v1/completions", {"model": kind, "prompt": [9], "max_tokens": 60, "ignore_eos": True}) as busy:
        next(busy)
        document = kinds.post("/v1/completions", body).json()
    for choice in document["choices"]:
        first, *others = choice["logprobs"]["token_logprobs"]
        assert first is None and choice["logprobs"]["top_logprobs"][0] is None
        assert others == pytest.approx(json.loads(done.stdout.splitlines()[-1]), abs=2e-2)
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"] and choice["finish_reason"] == "length"
    assert document["usage"]["completion_tokens"] == 0 and document["usage"]["prompt_tokens"] == 2 * len(prompt)


def test_an_echo_with_logprobs_scores_an_answer_as_lm_eval_reads_it(tiny: Server) -> None:
    context = "Schön ist, was gefällt. "
    ask = {"model": "default", "prompt": context, "max_tokens": 8, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    written = tiny.post("/v1/completions", ask).json()["choices"][0]
    ask |= {"prompt": context + written["text"], "max_tokens": 1, "echo": True, "stop": ["."], "stream": False}
    for stream in (False, True):  # lm_eval/models/gguf.py, get_result
        answers = tiny.streamed("/v1/completions", ask)[:-1] if stream else [tiny.post("/v1/completions", ask).json()]
        choices = [choice for answer in answers for choice in answer["choices"]]
        shown = {name: [value for choice in choices for value in (choice["logprobs"] or {name: []})[name]]
                 for name in written["logprobs"]}  # fmt: skip
        assert "".join(choice["text"] for choice in choices).startswith(str(ask["prompt"]))
        index = next(i for i, offset in enumerate(shown["text_offset"]) if offset >= len(context))
        assert shown["tokens"][index:-1] == written["logprobs"]["tokens"]
        assert shown["token_logprobs"][index:-1] == pytest.approx(written["logprobs"]["token_logprobs"], abs=0.05)
        assert all(max(top, key=top.get) == token for token, top in zip(shown["tokens"][index:], shown["top_logprobs"][index:],
                                                                        strict=True))  # fmt: skip


@cases("fields, word", {
    "too long": ({"prompt": "word " * 20_000, "logprobs": 20}, "49932 characters"),
    "ids without logprobs": ({"prompt": [65, 66]}, "logprobs"),
    "before a gap": ({"prompt": "a", "suffix": "b", "logprobs": 1}, "suffix"),
    "no tokens": ({"prompt": "a", "echo": False, "max_tokens": 0}, "max_tokens"),
})  # fmt: skip
def test_completion_refuses_an_echo(fields: dict[str, Any], word: str, server: Server) -> None:
    body = {"model": "recital", "echo": True, **fields}
    assert_error(server.post("/v1/completions", body), 400, "invalid_request", word)


def test_context_too_large_for_memory_is_refused_with_a_size_that_fits(serve: Serve, tmp_path: Path) -> None:
    write_kind(tmp_path / "wide.gguf", "llama", context=1 << 24, kv_heads=1024)
    large = serve("--models-dir", tmp_path, "--ctx", str(1 << 24))
    refused = large.load("wide")
    error = assert_error(refused, 500, "generation_failed", "would fit", "KV cache")
    found = re.search(r"--ctx (\d+) would fit", error["details"])
    assert found and 256 <= int(found[1]) < 1 << 24


def test_ctx_larger_than_the_models_is_lowered_with_a_note(tmp_path: Path) -> None:
    write_dice(tmp_path / "dice.gguf", context=256)
    done = shimmy("probe", "dice", "--models-dir", tmp_path, "--ctx", "4096", "--json", home=tmp_path)
    assert json.loads(done.stdout)["context_length"] == 256 and b"using 256" in done.stderr


# Sampling never reaches an abort

BANNED = {str(write): -100 for write in (*b"tf", 256, 257)}  # t, f, th, the of dice's vocabulary
FIELDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "defaults": {},
    "hot": {"temperature": 5, "top_k": 0, "top_p": 1, "min_p": 0},
    "penalties": {"repeat_penalty": 10, "presence_penalty": 2, "frequency_penalty": -2},
    "greedy with penalties": {"temperature": 0, "repeat_penalty": 0.1},
    "only the likeliest": {"top_k": 1, "min_p": 1, "top_p": 0},
    "past the end": {"ignore_eos": True},
    "with log probabilities": {"logprobs": 5},
}


gambler = serving("--ctx", str(LONG_CTX), load=("dice",))  # whose dice nobody else throws


@linux
@cases("fields", FIELDS)
def test_schema_whose_every_document_is_banned_ends_the_text_and_nobody_elses(fields: dict[str, Any], gambler: Server) -> None:
    engine = gambler.engine("dice.gguf")
    body = {"model": "dice", "prompt": "x", "json_schema": {"type": "boolean"}, "logit_bias": BANNED, "max_tokens": 20}
    reply = gambler.post("/v1/completions", {**body, **fields})
    assert reply.text.strip() == "" and reply.finish_reason == "stop"
    assert gambler.engine("dice.gguf") == engine


@linux
def test_sampling_fields_of_all_kinds_at_once_never_end_the_engine(gambler: Server) -> None:
    choose, engine = random.Random(11), gambler.engine("dice.gguf")
    ranges: dict[str, Seq[Any]] = {
        "temperature": [0, 1e-38, 1e-5, 0.7, 5], "top_k": [0, 1, 3, 10**9], "top_p": [0, 1e-9, 0.5, 1], "min_p": [0, 0.5, 1],
        "repeat_penalty": [0.1, 1, 10], "presence_penalty": [-2, 0, 2], "frequency_penalty": [-2, 0, 2],
        "ignore_eos": [True, False], "logprobs": [None, 0, 20], "seed": [-1, 0, 2**64], "max_tokens": [1, 30],
        "json_schema": [None, None, {"type": "string"}, {"enum": ["é", "the", 1]}, {"type": "array"}],
    }  # fmt: skip

    def ask(_: int) -> int:
        body = {name: choose.choice(values) for name, values in ranges.items()}
        few, all_but = range(choose.randrange(1, 263)), range(1, 263)
        tokens = choose.choice([(), few, all_but, range(263)])
        bias = {str(t): choose.choice([-100, 100, -99.5]) if tokens is few else -100 for t in tokens}
        return gambler.post("/v1/completions", {"model": "dice", "prompt": "Once", **body, "logit_bias": bias}).status

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(ask, range(1000 if SOAK else 300))) == {200}
    assert gambler.engine("dice.gguf") == engine


def write_numberless(folder: Path) -> None:
    """Models whose output is not a number: "nan" and "inf"."""
    for value in ("nan", "inf"):
        broken = gguf.GGUFReader(write_dice(folder / f"{value}.gguf"), "r+")
        next(t for t in broken.tensors if t.name == "output.weight").data[:] = float(value)
        del broken


numberless = serving(write=write_numberless)


@linux
@pytest.mark.parametrize("model", ["nan", "inf"])
@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 1}, {"json_schema": {"type": "boolean"}}], ids=str)
def test_model_whose_output_is_not_a_number_fails_the_request_only(
    fields: dict[str, Any], model: str, numberless: Server
) -> None:
    numberless.load(model)
    engine = numberless.engine(f"{model}.gguf")
    assert_error(numberless.generate("any", model, **fields), 500, "generation_failed", "not a number")
    assert numberless.engine(f"{model}.gguf") == engine


@pytest.mark.parametrize("token", [263, 2**31, 9999999999])
def test_bias_of_a_token_that_does_not_exist_is_refused_by_name(token: int, server: Server) -> None:
    reply = server.chat(model="dice", logit_bias={str(token): 1})
    assert assert_error(reply, 400, "invalid_request", "logit_bias", "0…262")["param"] == "logit_bias"


# Texts


RUN_TOKENIZERS = ("deepseek-v3", "gpt-4o", "tekken", "llama4")


def write_runners(folder: Path) -> None:
    """One model for each of these tokenizers."""
    plain = gguf.GGUFWriter.add_tokenizer_pre
    for name in RUN_TOKENIZERS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gguf.GGUFWriter, "add_tokenizer_pre", lambda writer, _, name=name: plain(writer, name))
            write_dice(folder / f"{name}.gguf", context=20_000)


runners = serving("--ctx", "20000", "--max-loaded", "4", write=write_runners)


@pytest.mark.parametrize("count", [26_500, 200_000])
@pytest.mark.parametrize("tokenizer", RUN_TOKENIZERS)
def test_run_of_one_character_is_tokenized(tokenizer: str, count: int, runners: Server) -> None:
    assert_error(runners.generate("a" * count, tokenizer), 400, "context_length_exceeded", f"{count} tokens", "20000")
    assert runners.generate("a" * 300, tokenizer, max_tokens=1).json()["usage"]["prompt_tokens"] == 300


def test_text_that_no_context_holds_is_refused_before_it_is_tokenized(gambler: Server) -> None:
    with quickly(10.0):
        reply = gambler.generate("x" * 8_000_000, "dice")
    assert_error(reply, 400, "context_length_exceeded", f"at least {-(-8_000_000 // 13)} tokens", "256")


@pytest.mark.parametrize("special", ["<unk>", "<s>", "<|quiet|>"])
def test_special_token_in_a_users_text_stays_text(special: str, server: Server) -> None:
    plain = server.chat("(" * len(special)).json()["usage"]["prompt_tokens"]
    assert server.chat(special).json()["usage"]["prompt_tokens"] == plain


def naive_stream(text: str, stop: Seq[str]) -> str:
    """What is shown of a text: up to the end of the piece-by-piece first stop string, one character a piece."""
    for end in range(1, len(text) + 1):
        found = [at for s in stop if (at := text[:end].find(s)) >= 0]
        if found:
            return text[: min(found)]
    return text


def test_stop_strings_are_found_in_text_fed_one_character_at_a_time() -> None:
    choose = random.Random(3)
    for _ in range(3000):
        stop = tuple("".join(choose.choices("ab", k=choose.randrange(1, 6))) for _ in range(choose.randrange(1, 4)))
        text = "".join(choose.choices("abc", k=30))
        stream, shown = module.TextStream(stop), ""
        for character in text:
            shown += stream.push(character.encode())
            assert not any(s in shown for s in stop)
            if stream.stopped:
                break
        assert shown + stream.finish() == naive_stream(text, stop), (text, stop)


@pytest.mark.parametrize("text", ["a" * 5000, "ab" * 2500, "aab" * 1700])
def test_stop_strings_cost_the_same_however_long(text: str) -> None:
    def seconds(size: int) -> float:
        stream = module.TextStream(tuple(("aab" * size)[: size + i] + "z" for i in range(16)))
        started = time.process_time()
        for character in text:
            stream.push(character.encode())
        return time.process_time() - started

    # other work on the machine only adds to a time: one quiet try of each says what it costs
    assert any(seconds(4096) < 3 * seconds(16) + 0.5 for _ in range(5))


BREAKERS = {"dry_sequence_breakers": ["é", "\n", "\0", "", "the the", "日" * 13]}
LOWEST = {
    "typical_p": 0, "top_n_sigma": -1, "xtc_probability": 0, "xtc_threshold": 0, "repeat_last_n": -1, "dry_multiplier": 0,
    "dry_base": 1, "dry_allowed_length": 0, "dry_penalty_last_n": -1, "dry_sequence_breakers": [], "mirostat": 0,
    "dynatemp_range": 0, "dynatemp_exponent": 0, "temperature": 0, "top_p": 0, "min_p": 0, "presence_penalty": -2,
    "frequency_penalty": -2, "seed": -1,
}  # fmt: skip
HIGHEST = {
    "typical_p": 1, "top_n_sigma": 100, "xtc_probability": 1, "xtc_threshold": 1, "repeat_last_n": 2**40,
    "repeat_penalty": 1.1, "dry_multiplier": 100, "dry_base": 100, "dry_allowed_length": 2**40, "dry_penalty_last_n": 2**40,
    "dry_sequence_breakers": ["x" * 40] * 16, "dynatemp_range": 5, "dynatemp_exponent": 10, "temperature": 5, "top_p": 1,
    "min_p": 1, "presence_penalty": 2, "frequency_penalty": 2, "seed": 2**32,
}  # fmt: skip


@cases("fields", {
    "lowest": LOWEST,
    "highest": HIGHEST,
    "DRY with nothing allowed": {**LOWEST, "dry_multiplier": 1},
    "odd breakers": {"dry_multiplier": 1, **BREAKERS},
    "mirostat 1 at its lowest": {"mirostat": 1, "mirostat_tau": 0, "mirostat_eta": 0},
    "mirostat 2 at its highest": {"mirostat": 2, "mirostat_tau": 100, "mirostat_eta": 1, "temperature": 5},
    "typical with all tokens and the end ignored": {"typical_p": 0.5, "top_k": 0, "ignore_eos": True},
    "everything in a schema": {**HIGHEST, "typical_p": 0.1, "top_k": 0, "json_schema": {"enum": ["ab", "cd"]}},
    "mirostat in a schema": {"mirostat": 1, "json_schema": {"enum": ["ab", "cd"]}},
    "XTC in a schema": {"xtc_probability": 1, "xtc_threshold": 0, "json_schema": {"enum": ["ab", "cd"]}},
})  # fmt: skip
def test_sampling_limits_are_inclusive(fields: dict[str, Any], server: Server) -> None:
    reply = server.generate("Once", "dice", max_tokens=20, **fields)
    assert reply.status == 200, reply.body
    assert "json_schema" not in fields or json.loads(reply.text) in ("ab", "cd")


def next_tokens(server: Server, prompt: Any, model: str = "recital", **fields: Any) -> tuple[str, dict[str, float]]:
    """Returns the token picked next and the probabilities of the twenty likeliest."""
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "logprobs": 20, "ignore_eos": True, **fields}
    shown = server.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    return shown["tokens"][0], {token: math.exp(logprob) for token, logprob in shown["top_logprobs"][0].items()}


PROMPTS = ["Once", "the end", "abc"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_xtc_drops_every_likely_token_but_the_last(prompt: str, kinds: Server) -> None:
    _, top = next_tokens(kinds, ids(prompt), "llama")
    likely = sorted(top, key=top.__getitem__, reverse=True)[:4]
    threshold = (top[likely[3]] + sorted(top.values())[-5]) / 2
    assert threshold < 0.5
    picked, _ = next_tokens(kinds, ids(prompt), "llama", **ALL, temperature=0, xtc_probability=1, xtc_threshold=threshold)
    assert picked == likely[3]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_typical_p_zero_keeps_the_token_of_expected_surprise(prompt: str, kinds: Server) -> None:
    _, top = next_tokens(kinds, ids(prompt), "llama")
    best = sorted(top, key=top.__getitem__, reverse=True)[:10]
    shares = {token: top[token] / sum(map(top.__getitem__, best)) for token in best}
    entropy = -sum(p * math.log(p) for p in shares.values())
    picked, _ = next_tokens(kinds, ids(prompt), "llama", top_k=10, typical_p=0, temperature=2)
    assert picked == min(best, key=lambda token: abs(-math.log(shares[token]) - entropy))


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_follows_its_target(version: int, server: Server) -> None:
    """A low target keeps texts likely, a high one does not."""

    def surprise(tau: float) -> float:
        body = {"model": "dice", "prompt": "Once", "max_tokens": 60, "ignore_eos": True, "logprobs": 0, "temperature": 1,
                "seed": 5, "mirostat": version, "mirostat_tau": tau}  # fmt: skip
        shown = server.post("/v1/completions", body).json()["choices"][0]["logprobs"]
        return -sum(shown["token_logprobs"]) / len(shown["token_logprobs"])

    assert surprise(1) < surprise(6)


@cases("fields, repeats", {
    "off": ({}, True),
    "on": ({"dry_multiplier": 100}, False),
    "growing with the repetition": ({"dry_multiplier": 1, "dry_base": 10}, False),
    "too weak": ({"dry_multiplier": 0.1, "dry_base": 1}, True),
    "all of it allowed": ({"dry_multiplier": 100, "dry_allowed_length": 6}, True),
    "seeing one token": ({"dry_multiplier": 100, "dry_penalty_last_n": 1}, True),
    "seeing nothing": ({"dry_multiplier": 100, "dry_penalty_last_n": 0}, True),
    "seeing the whole context": ({"dry_multiplier": 100, "dry_penalty_last_n": -1}, False),
    "a breaker inside": ({"dry_multiplier": 100, "dry_sequence_breakers": ["ick"]}, True),
    "no breakers": ({"dry_multiplier": 100, "dry_sequence_breakers": []}, False),
})  # fmt: skip
def test_dry_sees_repetitions_in_the_prompt(fields: dict[str, Any], repeats: bool, server: Server) -> None:
    ticking = [TOKEN_ID[word] for word in ("tock ", "tick ", "tock ", "tick ", "tock ", "tick ")]
    picked, _ = next_tokens(server, ticking, temperature=0, **fields)
    assert (picked == "tock ") == repeats


def test_dry_stops_an_endless_repetition(server: Server) -> None:
    assert "tock tick tock tick tock" in server.generate("#", max_tokens=20, temperature=0).text
    assert "tock tick tock tick tock" not in server.generate("#", max_tokens=20, temperature=0, dry_multiplier=100).text


@cases("last_n, penalized", {"nothing": (0, False), "too little": (3, False), "enough": (6, True), "the context": (-1, True)})
def test_repeat_last_n_says_how_far_penalties_look_back(last_n: int, penalized: bool, server: Server) -> None:
    tokens = [TOKEN_ID[word] for word in ("tock ", "w01 ", "w02 ", "w03 ", "w04 ", "tick ")]
    picked, _ = next_tokens(server, tokens, temperature=0, repeat_penalty=10, repeat_last_n=last_n)
    assert (picked != "tock ") == penalized


def test_choices_repeat_with_a_seed_and_are_seeded_one_after_another(server: Server) -> None:
    """A few tokens: several rows of a step round differently from one, which shows once the cache's 16 bits have held it."""
    body = {"model": "dice", "prompt": "Once", "max_tokens": 3, "temperature": 1, "ignore_eos": True, "logprobs": 0}
    together = server.post("/v1/completions", {**body, "seed": 7, "n": 8}).json()["choices"]
    alone = [server.post("/v1/completions", {**body, "seed": 7 + i}).json()["choices"][0] for i in range(8)]
    assert [c["logprobs"]["tokens"] for c in together] == [c["logprobs"]["tokens"] for c in alone]
    assert len({tuple(c["logprobs"]["tokens"]) for c in alone}) > 4
    for fields in ({"mirostat": 1}, {"mirostat": 2}, {"xtc_probability": 0.5, "xtc_threshold": 0.01}):
        ask = functools.partial(server.generate, "Once", "dice", max_tokens=40, temperature=1, ignore_eos=True, **fields)
        assert ask(seed=3).text == ask(seed=3).text != ask(seed=4).text


W07 = TOKEN_ID["w07 "]


@cases("bias, text", {
    "an object": ({str(W07): 100}, "w07 w07 "),
    "pairs": ([[W07, 100]], "w07 w07 "),
    "pairs with the id in digits": ([[str(W07), 100]], "w07 w07 "),
    "none": ([], "w00 w01 "),
    "banned by false in pairs": ([[TOKEN_ID["w00 "], False], [W07, 100]], "w07 w07 "),
    "banned by false in an object": ({str(TOKEN_ID["w00 "]): False, str(W07): 100}, "w07 w07 "),
})  # fmt: skip
def test_logit_bias_takes_the_forms_of_openai_and_llama_server(bias: Any, text: str, server: Server) -> None:
    assert server.generate("=", max_tokens=2, temperature=0, logit_bias=bias).text == text


def test_generate_help_names_every_sampling_parameter(tmp_path: Path) -> None:
    said = shimmy("generate", "--help", home=tmp_path).stdout.decode()
    names = [name for name in WRONG_VALUES if name not in ("logit_bias", "stream")]
    assert [name for name in names if f"--{name.replace('_', '-')} " not in said] == []


def test_generate_flags_of_new_samplers_reach_them(models: Path, tmp_path: Path) -> None:
    args = ["--max-tokens", "20", "--temperature", "0", "--dry-multiplier", "100", "--repeat-last-n", "-1"]
    ask = functools.partial(shimmy, "generate", "recital", "--raw", "--prompt", "#", "--models-dir", models, home=tmp_path)
    done = ask(*args, "--dry-sequence-breakers", "Never", "--dry-sequence-breakers", "ever")
    assert done.returncode == 0 and b"tock tick tock tick tock" not in done.stdout, done.stderr
    assert b"tock tick tock tick tock" in ask(*args, "--dry-sequence-breakers", "ick").stdout


@cases("prompt, stop, text", {
    "no stop string": ("|", [], TEXTS["|"]),
    "a stop string of several tokens": ("|", ["STOP"], "alpha "),
    "a stop string that begins as a token does": ("=", ["w03 w04"], "w00 w01 w02 "),
    "a stop string inside a token": (":", ["orl"], "Hello wide w"),
    "a stop string at once": (":", ["Hell"], ""),
    "a stop string that does not come": ("|", ["omegaX", "STOPPX"], TEXTS["|"]),
    "characters of several tokens": ("~", ["!!!"], "café and😀"),
})  # fmt: skip
def test_logprobs_joined_are_the_text_up_to_a_stop_string(prompt: str, stop: list[str], text: str, server: Server) -> None:
    said = {":": "hi", "|": "stopping", "=": "count", "~": "unicode"}[prompt]
    choice = server.chat(said, logprobs=True, temperature=0, stop=stop).json()["choices"][0]
    assert choice["message"]["content"] == text
    assert b"".join(bytes(token["bytes"]) for token in choice["logprobs"]["content"]).decode() == text


@cases("prompt, stop, text", {
    "text of whole tokens": ("=", ["w03 w05"], TEXTS["="]),
    "text that ends inside a token": ("|", ["STOP"], "alpha "),
    "held text that is no stop string": ("|", ["STOPPER", "ha STOPPSTOPS"], TEXTS["|"]),
})  # fmt: skip
def test_every_chunk_carries_the_logprobs_of_its_own_text(prompt: str, stop: list[str], text: str, thinking: Server) -> None:
    """Where a stop string may begin text waits, in whole tokens, and so do their log probabilities."""
    body = {"model": "recital", "prompt": prompt, "stop": stop, "temperature": 0, "logprobs": 0}
    sent = thinking.streamed("/v1/completions", body)
    pieces = [chunk["choices"][0] for chunk in sent[:-1] if chunk["choices"] and chunk["choices"][0]["text"]]
    assert [piece["text"] for piece in pieces] == ["".join(piece["logprobs"]["tokens"]) for piece in pieces]
    assert "".join(piece["text"] for piece in pieces) == text and len(pieces) > 1


# Long runs of characters that a SentencePiece vocabulary does not have.

UNKNOWN_RUNS = {
    "letters": "a" * 30_000, "emoji": "😀" * 8_000, "between words": ("tick " + "龘" * 300) * 20 + " tick",
    "words behind": "é" * 20_000 + " wide  world",
}  # fmt: skip


def test_long_runs_of_letters_or_bytes_become_llama_cpps_tokens_or_are_refused_soon(server: Server, models: Path) -> None:
    with quickly(HANG / 2):  # it took llama.cpp over a minute
        reply = server.generate("a" * 1_000_000, max_tokens=1)
    assert_error(reply, 400, "context_length_exceeded", "1000001 tokens")
    command = [sys.executable, "-c", TOKENIZES, str(SHIMMY.parent), str(models / "recital.gguf")]
    texts = json.dumps([*UNKNOWN_RUNS.values()]).encode()
    theirs = subprocess.run(command, input=texts, capture_output=True, timeout=HANG, check=True)
    for (name, text), tokens in zip(UNKNOWN_RUNS.items(), theirs.stdout.splitlines(), strict=True):
        assert server.post("/tokenize", {"content": text, "model": "recital"}).json()["tokens"] == json.loads(tokens), name


TOKENIZES = """
import sys; sys.path.insert(0, sys.argv[1])
import json, numpy, shimmy
c = shimmy.import_llama(); c.llama_backend_init(); quiet = c.llama_log_callback(lambda *_: None); c.llama_log_set(quiet, None)
parameters = c.llama_model_default_params(); parameters.vocab_only = True
model = c.llama_model_load_from_file(sys.argv[2].encode(), parameters)
vocab = c.llama_model_get_vocab(model)
for text in json.load(sys.stdin):
    text = text.encode()
    rows = numpy.empty(len(text) + 16, numpy.int32)
    ids = rows.ctypes.data_as(c.ctypes.POINTER(c.ctypes.c_int32))
    print(json.dumps(rows[: c.llama_tokenize(vocab, text, len(text), ids, len(rows), False, True)].tolist()))
"""


# Memory: what a model takes, by its header, and what of it goes where.


@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_a_context_is_what_llama_cpp_says_that_it_takes(kind: str, tmp_path: Path) -> None:
    said: list[str] = []
    info = model_info(write_kind(tmp_path / f"{kind}.gguf", kind))
    options = module.EngineOptions(ctx=512, parallel=3, threads=1)

    class Listening(module.Llama):
        def _on_log(self, level: int, line: bytes, data: Any) -> None:
            said.append(line.decode())

    llama = Listening(module.Load(info, module.Setup(options)), lambda _: None)
    buffers = [float(size) for line in said for size in re.findall(r"(?:KV|RS) buffer size = +([\d.]+) MiB", line)]
    expected = info.kv.token_bytes("f16") * llama.pool + info.kv.state_bytes(llama.plan.sequences)
    assert abs(sum(buffers) * (1 << 20) - expected) < 0.006 * len(buffers) * (1 << 20)
    assert expected > 0 and llama.loaded().pool_bytes == int(info.kv.token_bytes("f16") * llama.pool)


@cases("meta, expected", {
    "one number for all layers": ({"attention.head_count_kv": 2}, ((64, 64, 64), (0, 0, 0))),
    "one for each layer": ({"attention.head_count_kv": (4, 0, 2)}, ((128, 0, 64), (0, 0, 0))),
    "windows with keys of their own": (
        {"attention.head_count_kv": 2, "attention.sliding_window_pattern": (True, False, True),
         "attention.key_length": 16, "attention.value_length": 16, "attention.key_length_swa": 8,
         "attention.value_length_swa": 8}, ((32, 64, 32), (0, 0, 0))),
    "keys alone, compressed": (
        {"attention.head_count_kv": 1, "attention.key_length": 40, "attention.value_length": 32,
         "attention.key_length_mla": 16}, ((40, 40, 40), (0, 0, 0))),
    "layers that share": ({"attention.head_count_kv": 2, "attention.shared_kv_layers": 1}, ((64, 64, 0), (0, 0, 0))),
    "attention at an interval": (
        {"attention.head_count_kv": 2, "full_attention_interval": 3, "ssm.conv_kernel": 4, "ssm.inner_size": 8,
         "ssm.state_size": 2, "ssm.group_count": 1}, ((0, 0, 64), (4 * (3 * 12 + 16),) * 2 + (0,))),
    "both in each layer": (
        {"attention.head_count_kv": 2, "ssm.conv_kernel": 2, "ssm.inner_size": 8, "ssm.state_size": 2},
        ((64, 64, 64), (4 * (8 + 16),) * 3)),
    "a state alone": ({"attention.head_count": 0, "wkv.head_size": 8}, ((0, 0, 0), (4 * 64 * 10,) * 3)),
})  # fmt: skip
def test_memory_of_a_context_by_layer(meta: dict[str, Any], expected: Any) -> None:
    shape = {"block_count": 3, "embedding_length": 64, "attention.head_count": 4, **meta}
    kv = module.kv_shape({f"a.{key}": value for key, value in shape.items()}, "a")
    assert kv and (kv.layers, kv.states) == expected


GIB = 1 << 30
DENSE = ("dense", [(GIB, 0)] * 32, GIB)  # 33 GiB
MIXTURE = ("mixture", [(2 * GIB, GIB * 7 // 4)] * 32, GIB)  # 65 GiB, 56 of them experts


@cases("shape, gpus, wish, expected", {
    "all fit": (DENSE, [56], {}, (33, 0, 32768)),
    "a smaller pool comes first": (DENSE, [40], {}, (33, 0, 9216)),
    "then fewer layers": (DENSE, [24], {}, (19, 0, 11264)),
    "two small ones": (DENSE, [24, 24], {}, (33, 0, 21504)),
    "none fits": (DENSE, [1], {}, (0, 0, 32768)),
    "no GPU with room": (DENSE, [0], {}, (0, 0, 32768)),
    "as told": (DENSE, [24], {"gpu_layers": 10}, (10, 0, 32768)),
    "all, as told": (DENSE, [24], {"gpu_layers": -1}, (33, 0, 8192)),
    "experts of some layers stay": (MIXTURE, [48], {}, (33, 14, 9216)),
    "experts of all layers stay": (MIXTURE, [15], {}, (33, 32, 9216)),
    "and fewer layers": (MIXTURE, [8], {}, (18, 32, 9216)),
    "experts as told": (MIXTURE, [24], {"cpu_moe": 32}, (33, 32, 26624)),
    "half of them after a crash": (DENSE, [56], {"share": 0.5}, (16, 0, 32768)),
})  # fmt: skip
def test_model_larger_than_the_gpu_is_placed(shape: Any, gpus: list[int], wish: dict[str, Any], expected: Any) -> None:
    _, layers, output = shape
    weights, kv = module.Weights(tuple(layers), output), module.KvShape((8192,) * 32, (0,) * 32)  # 0.5 MiB a token
    placed = module.place(weights, kv, [g * GIB for g in gpus], 8192, 32768, "f16", 16, GIB // 2, **wish)
    assert (placed.gpu_layers, placed.cpu_moe, placed.pool) == expected


@cases("free, options, rung, pool", {
    "four contexts": (1 << 30, {}, {}, 4096), "of a smaller one": (1 << 30, {"ctx": 500}, {}, 2048),
    "as told": (1 << 30, {"kv_pool": 3000}, {}, 3072), "a quarter of what is left": (120_000, {}, {}, 1536),
    "one at least": (20_000, {}, {}, 1024), "one a rung down": (1 << 30, {"kv_pool": 3000}, {"small_pool": True}, 1024),
    "nobody knows": (None, {}, {}, 4096),
})  # fmt: skip
def test_pool_that_a_load_is_planned_with(free: int | None, options: dict[str, Any], rung: dict[str, Any], pool: int) -> None:
    """`free` is left beside the weights."""
    model = plain_model(context_length=1000, kv=module.KvShape((10,), (0,)))
    setup = module.Setup(module.EngineOptions(**options), module.Rung(**rung))
    plan = module.plan_load(model, setup, None if free is None else free + model.size_bytes + module.GRAPH_BYTES)
    assert (plan.pool, plan.ctx) == (pool, options.get("ctx", 1000))


@cases("free, words", {
    "weights": (100, "the weights need 1000B, 100B of memory are available"),
    "context": (1500, "a context of 100 tokens needs 2KB of KV cache"),
})  # fmt: skip
def test_model_that_does_not_fit_the_memory_asks_for_room(free: int, words: str) -> None:
    model = plain_model(size_bytes=1000, context_length=100, kv=module.KvShape((10,), (0,)))
    with pytest.raises(module.LoadError, match=re.escape(words)) as error:
        module.plan_load(model, module.Setup(), free + (module.GRAPH_BYTES if free > 1000 else 0))
    assert error.value.cause == "room"


def test_model_rather_has_idle_ones_unloaded_than_a_part_of_itself_on_the_cpu() -> None:
    weights, kv = module.Weights(((GIB, 0),) * 32, GIB), module.KvShape((8192,) * 32, (0,) * 32)
    model = plain_model(size_bytes=33 * GIB, context_length=8192, kv=kv)
    with pytest.raises(module.LoadError, match="only 20 of 32 layers fit the GPU beside other models") as error:
        module.plan_load(model, module.Setup(others_idle=True), 64 * GIB, [25 * GIB], weights)
    plan = module.plan_load(model, module.Setup(), 64 * GIB, [25 * GIB], weights)
    assert error.value.cause == "room" and plan.gpu_layers == 20
    assert 12 * GIB < plan.memory_need < 18 * GIB


def test_weights_by_layer_are_read_from_the_header(tmp_path: Path) -> None:
    path = write_kind(tmp_path / "llama.gguf", "llama")
    weights = module.read_weights([str(path)])
    assert len(weights.layers) == 4 and len(set(weights.layers)) == 1 and weights.output == 4 * 64 * (257 + 1)


def test_tensors_are_placed_by_pattern_and_experts_apart(tmp_path: Path) -> None:
    """The real bindings take the overrides; the log tells which tensors they matched."""
    path, said = write_mixture(tmp_path / "mixture.gguf"), list[str]()

    class Listening(module.Llama):
        def _on_log(self, level: int, line: bytes, data: Any) -> None:
            said.append(line.decode())

        def _plan(self) -> Any:
            return replace(super()._plan(), cpu_moe=1)

    options = module.EngineOptions(ctx=64, threads=1, override_tensor=((r"blk\.1\.attn_q", "CPU"),))
    Listening(module.Load(model_info(path), module.Setup(options)), lambda _: None).trial()
    matched = {line.split()[1] for line in said if "overridden" in line}
    assert matched == {"blk.1.attn_q.weight", *(f"blk.0.ffn_{part}_exps.weight" for part in ("gate", "up", "down"))}


@linux
def test_pool_takes_memory_only_as_it_fills(serve: Serve, tmp_path: Path) -> None:
    write_kind(tmp_path / "llama.gguf", "llama", kv_heads=8)
    own = serve("--models-dir", tmp_path, "--kv-pool", "300000")
    status = own.load("llama").json()
    pool = re.search(r"KV pool of ([\d,]+) tokens takes up to ([\d.]+)MB", own.log.read_text())
    assert pool and float(pool[2]) > 550 and status["memory_bytes"] < 200 << 20
    body = {"model": "llama", "prompt": [17, 18], "max_tokens": 100, "ignore_eos": True}
    assert own.post("/v1/completions", body).json()["usage"]["completion_tokens"] == 100
    assert own.status("llama")["memory_bytes"] < 200 << 20


@cases("text, expected", {
    "a Mac": ("Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPages free:     100.\nPages active:   7.\n"
              "Pages inactive:    20.\nPages speculative:  3.\nPages purgeable:   1.\n", [124 * 16384]),
    "something else": ("no such command", []),
})  # fmt: skip
def test_free_memory_of_a_mac(text: str, expected: list[int]) -> None:
    assert list(module._mac_memory(text)) == expected


def test_memory_of_processes_on_windows() -> None:
    rows = [("python.exe", 10, "12.345 K"), ("python.exe", 11, "1,000 K"), ("other.exe", 12, "5 K")]
    listed = "".join(f'"{name}","{pid}","Console","1","{size}"\r\n' for name, pid, size in rows)
    assert module._windows_resident(listed, [10, 11]) == 13_345 * 1024


# ── Scheduling ────────────────────────────────────────────────────────────────────────────────────────────────────────
# Sequences start, share cells, wait, get preempted and end without losing or mixing tokens.

# Reads every prompt aside: the models here are too fast for the reader to be used otherwise.
ALL_ASIDE = (("    SLICES = 2 ", "    SLICES = 0 "), ("if self._wants_reader and self._may", "if self._may"))


def write_kinds(folder: Path) -> None:
    for kind in KINDS:
        write_kind(folder / f"{kind}.gguf", kind)


asides = serving("--max-loaded", "4", write=write_kinds, changes=ALL_ASIDE)  # reads prompts aside while a stream runs
# for two sequences in a pool that holds one, with one place in the queue
tight = serving("--ctx", "8192", "--kv-pool", "8192", "--parallel", "2", "--max-queue", "1", "--batch", "64", load=("recital",))


@dataclass(frozen=True)
class Run:
    """A greedy run: every choice's token ids, the first one's logprobs, and the number of cached prompt tokens."""

    choices: list[list[int]]
    logprobs: list[float]
    cached: int
    usage: dict[str, Any]

    @property
    def tokens(self) -> list[int]:
        return self.choices[0]

    def assert_same(self, other: Run) -> None:
        """Asserts the same run up to rounding: differently shaped batches round differently, which may break a tie."""
        pairs = zip(self.tokens, other.tokens, strict=True)
        until = next((i for i, (mine, its) in enumerate(pairs) if mine != its), len(self.tokens) - 1)
        assert other.logprobs[: until + 1] == pytest.approx(self.logprobs[: until + 1], abs=0.1)


def greedy(server: Server, model: str, prompt: list[int], tokens: int = 24, **fields: Any) -> Run:
    """Runs a completion at temperature 0 that ignores end tokens."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    reply = server.post("/v1/completions", {**body, **fields})
    assert reply.status == 200, reply.body
    document = reply.json()
    shown = [choice["logprobs"] for choice in document["choices"]]
    names = {"<unk>": 0, "<s>": 1, "</s>": 2}
    choices = [[names[t] if t in names else int(t.strip(" w")) for t in each["tokens"]] for each in shown]
    usage = document["usage"]
    return Run(choices, shown[0]["token_logprobs"], usage["prompt_tokens_details"]["cached_tokens"], usage)


def fresh(server: Server, model: str, prompt: list[int], tokens: int = 24) -> Run:
    """Runs a completion on a freshly loaded engine."""
    assert server.unload(model).status == 200
    made = greedy(server, model, prompt, tokens)
    assert made.cached == 0
    return made


def ids(words: str) -> list[int]:
    """Returns one token id per character."""
    return [3 + byte for byte in words.encode("ascii")]


STORY = "In the beginning there was a very long sentence, longer than any window that slides over it, and then "


# Pictures, by the worker: each family has something of its own.

EYES = {  # the projector and the tokens around a picture
    "llama": ("mlp", ()),
    "gemma3": ("gemma3", ("<start_of_image>", "<end_of_image>")),  # attention both ways within a picture; a sliding window
    "qwen2vl": ("qwen2vl_merger", ("<|vision_start|>", "<|vision_end|>")),  # positions in two dimensions; any size
}


def noise(width: int, height: int, seed: int) -> Any:
    """A picture unlike any other."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return module.Picture(png(pixels), width, height)


def letters(count: int, seed: int) -> str:
    return "".join(map(chr, np.random.default_rng(seed).integers(97, 123, count)))


SIGHTS: dict[str, tuple[Any, ...]] = {
    "none": (letters(9, 1),),
    "before": (noise(64, 64, 1), letters(9, 1)),
    "behind": (letters(70, 2), noise(64, 64, 1), letters(1, 1)),
    "two": (letters(3, 3), noise(64, 64, 1), letters(3, 4), noise(96, 32, 2), letters(5, 5)),
    "other order": (letters(3, 3), noise(96, 32, 2), letters(3, 4), noise(64, 64, 1), letters(5, 5)),
    "twice": (noise(64, 64, 1), noise(64, 64, 1), letters(3, 6)),
    "wide": (letters(3, 3), noise(320, 128, 3), letters(5, 5)),
}


LLAMA_SERVER = os.environ.get("SHIMMY_LLAMA_SERVER", "")


def marked(marker: str, sight: tuple[Any, ...]) -> dict[str, Any]:
    """A body for llama-server's /completion, with its marker in the place of each picture."""
    words = [part if isinstance(part, str) else marker for part in sight]
    media = [base64.b64encode(part.data).decode() for part in sight if not isinstance(part, str)]
    prompt = {"prompt_string": "".join(words), "multimodal_data": media} if media else "".join(words)
    return {"prompt": prompt, "n_predict": 12, "temperature": 0, "ignore_eos": True}


@pytest.mark.skipif(not LLAMA_SERVER, reason="SHIMMY_LLAMA_SERVER names no llama-server")
@pytest.mark.parametrize("family", EYES)
def test_answers_about_pictures_equal_llama_servers(family: str, serve: Serve, tmp_path: Path) -> None:
    make, controls = EYES[family]
    model = write_kind(tmp_path / "models" / "seer.gguf", family, letters=controls)
    projector = write_projector(tmp_path / "models" / "mmproj-seer.gguf", make=make)
    ours, port = serve("--models-dir", tmp_path / "models", "--model", "seer"), free_port()
    theirs = Child([LLAMA_SERVER, "-m", model, "--mmproj", projector, "--port", str(port), "-c", "1024", "-np", "1"])

    def ask(port: int, method: str, path: str, body: Any = None) -> Any:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=HANG)) as connection:
            connection.request(method, path, encoded(body))
            return json.loads(connection.getresponse().read())

    def is_ready() -> bool:
        with contextlib.suppress(OSError, ValueError):
            return bool(ask(port, "GET", "/health") == {"status": "ok"})
        return False

    try:
        eventually(is_ready, "llama-server")
        for name, sight in SIGHTS.items():
            asked = [ask(p, "POST", "/completion", marked(ask(p, "GET", "/props")["media_marker"], sight))
                     for p in (port, ours.port)]  # fmt: skip
            # a character that is cut at the end is nothing there, and U+FFFD here
            expected, found = ((a["content"].rstrip("\ufffd"), a["tokens_evaluated"]) for a in asked)
            assert found == expected, name
    finally:
        theirs.kill()
        theirs.wait()


@pytest.fixture(scope="module", params=EYES)
def eyes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A worker of each family."""
    folder, (make, controls) = tmp_path_factory.mktemp(request.param), EYES[request.param]
    info = model_info(write_kind(folder / "seer.gguf", request.param, letters=controls))
    info = replace(info, projector=str(write_projector(folder / "mmproj-seer.gguf", make=make)))
    options = module.EngineOptions(ctx=512, kv_pool=1024, parallel=4, batch=32)
    worker = module.Worker(info, module.Setup(options), 99, lambda *_: None, lambda _: None).start()
    assert worker.loaded.sees
    yield worker
    worker.stop()


@pytest.fixture(scope="module")
def llama_of_eyes(eyes: Any) -> Any:
    """The same model in this process."""
    return module.Llama(module.Load(eyes.info, module.Setup(module.EngineOptions(ctx=512, parallel=1))), lambda _: None)


@dataclass(frozen=True)
class Sight:
    """What a worker wrote of a prompt: token ids, their log probabilities, the likeliest first ones, and its end."""

    ids: list[int]
    logprobs: list[float]
    first: dict[int, float]
    end: Any


def look(worker: Any, prompt: tuple[Any, ...], tokens: int = 12, cancel: Any = None) -> Sight:
    sampling = module.Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True, logprobs=5)
    events = list(worker.submit([module.Generate(prompt, sampling, frozenset())], cancel or Cancellation()))
    said = [each for event in events if isinstance(event, module.Piece) for each in event.logprobs]
    return Sight([each.id for each in said], [each.logprob for each in said],
                 dict(zip(said[0].ids, said[0].logprobs, strict=True)), events[-1])  # fmt: skip


def assert_same_sight(one: Sight, other: Sight) -> None:
    """Asserts the same text up to rounding, which may break a tie."""
    assert other.first == pytest.approx(one.first, abs=0.1)
    until = next((i for i, (mine, its) in enumerate(zip(one.ids, other.ids, strict=True)) if mine != its), 12) + 1
    assert other.logprobs[:until] == pytest.approx(one.logprobs[:until], abs=0.1)


def assert_as_libmtmd(llama: Any, prompt: tuple[Any, ...], sight: Sight) -> None:
    """Asserts that the likeliest first tokens are those that libmtmd's own reader finds."""
    import llama_cpp.mtmd_cpp as mtmd

    c, handle, chunks, past = llama.c, llama.eyes.handle, mtmd.mtmd_input_chunks_init(), ctypes.c_int32()
    files = [part.data for part in prompt if isinstance(part, module.Picture)]
    text = "".join(part if isinstance(part, str) else "<__media__>" for part in prompt).encode()
    bitmaps = [mtmd.mtmd_helper_bitmap_init_from_buf(handle, (ctypes.c_uint8 * len(f))(*f), len(f), False) for f in files]
    words = mtmd.mtmd_input_text(text=text, text_len=len(text), add_special=True, parse_special=True)
    array = (ctypes.c_void_p * len(bitmaps))(*bitmaps)
    assert mtmd.mtmd_tokenize(handle, chunks, ctypes.byref(words), array, len(bitmaps)) == 0
    context = llama.main.handle
    assert mtmd.mtmd_helper_eval_chunks(handle, context, chunks, 0, 0, llama.main.n_batch, True, ctypes.byref(past)) == 0
    logits = np.ctypeslib.as_array(c.llama_get_logits_ith(context, -1), (llama.vocab.size,)).astype(float)
    llama.main.clear(False)
    expected = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    assert sight.first == pytest.approx({id: expected[id] for id in sight.first}, abs=0.1)
    assert expected.argmax() in sight.first


def test_pictures_are_read_as_libmtmd_reads_them(eyes: Any, llama_of_eyes: Any) -> None:
    found = {name: look(eyes, prompt) for name, prompt in SIGHTS.items()}
    for name, prompt in SIGHTS.items():
        assert_as_libmtmd(llama_of_eyes, prompt, found[name])
    assert found["two"].first != pytest.approx(found["other order"].first, abs=0.1)
    assert found["before"].end.picture_tokens == 16 and found["two"].end.picture_tokens in (28, 32)


def test_pictures_are_lent_like_text(eyes: Any, llama_of_eyes: Any) -> None:
    """Asked again, gone on with, left in a picture's middle, and at once with others, some of them cancelled."""
    talks: list[tuple[Any, ...]] = [(letters(40, i), noise(64, 64, i), letters(20, i), noise(160, 96, i % 3), letters(i + 1, i))
                                    for i in range(4)]  # fmt: skip
    talks += [(letters(40, i), noise(64, 64, i), letters(20, i), noise(160, 96, 9), letters(3, i)) for i in range(2)]
    talks += [(letters(20, 1), letters(20, 9)), (letters(40, 3), noise(64, 64, 9), letters(5, 9)), (letters(110, 9),)]
    alone = []
    for talk in talks:
        first, again = look(eyes, talk), look(eyes, talk)
        assert again.end.cached_tokens == first.end.prompt_tokens - 1
        assert_same_sight(first, again)
        assert_as_libmtmd(llama_of_eyes, talk, first)
        alone.append(first)
    longer = (*talks[-1], letters(9, 99), noise(64, 64, 99), letters(2, 98))
    gone_on = look(eyes, longer)
    assert gone_on.end.cached_tokens >= alone[-1].end.prompt_tokens - 1

    def ask(i: int) -> tuple[int, Sight | None]:
        cancel = Cancellation()
        if i % 5 == 0:
            threading.Timer(i / 500, cancel.cancel).start()
            with contextlib.suppress(module.Cancelled):
                look(eyes, talks[i % len(talks)], cancel=cancel)
            return i, None
        return i, look(eyes, talks[i % len(talks)], 12)

    with ThreadPoolExecutor(8) as pool:
        for i, sight in pool.map(ask, range(24)):
            if sight:
                assert_same_sight(alone[i % len(talks)], sight)
    assert_same_sight(gone_on, look(eyes, longer))


def test_picture_that_cannot_be_decoded_is_named(eyes: Any) -> None:
    broken = module.Picture(RED[:60], 32, 40)
    with pytest.raises(InvalidRequest, match="image 2 cannot be decoded"):
        look(eyes, (letters(2, 1), noise(64, 64, 1), broken, letters(2, 1)))


@cases("prompt, model, fields, count, text", {
    "max_tokens": ("=", "recital", {"max_tokens": 7}, 7, "".join(f"w{i:02d} " for i in range(7))),
    "100 where nothing is said": ("#", "recital", {}, 100, None),
    "more than there is room for": ("a" * 200, "dice", {"max_tokens": 10**30, "ignore_eos": True}, 56, None),
    "one behind a prompt that just fits": ("a" * 255, "dice", {"ignore_eos": True}, 1, None),
    "past the end token": ("=", "recital", {"ignore_eos": True, "max_tokens": 60}, 60, (TEXTS["="] * 2)[: 60 * 4]),
})  # fmt: skip
def test_generate_stops_at(
    prompt: str, model: str, fields: dict[str, Any], count: int, text: str | None, server: Server
) -> None:
    reply = server.generate(prompt, model, **fields)
    assert reply.finish_reason == "length" and reply.json()["usage"]["completion_tokens"] == count
    assert text is None or reply.text == text


def test_chat_stops_at_its_limit_or_where_the_context_is_full(server: Server) -> None:
    limits: tuple[dict[str, Any], ...] = ({"max_tokens": 3}, {"max_completion_tokens": 3})
    for limit in limits:
        reply = server.chat("count", **limit)
        assert (reply.message["content"], reply.finish_reason) == ("w00 w01 w02 ", "length")
    reply = server.chat("a" * 100, "dice", ignore_eos=True)
    assert reply.finish_reason == "length" and reply.json()["usage"]["total_tokens"] in (255, 256)


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_reuse_generates_the_same_as_a_fresh_run(kind: str, kinds: Server) -> None:
    """Repeats a prompt, goes on behind its answer and behind other words, forks it in the middle, and repeats it again."""
    kinds.unload(kind)
    prompt = ids(STORY)
    first, again = greedy(kinds, kind, prompt), greedy(kinds, kind, prompt)
    assert first.cached == 0 and (again.cached == len(prompt) - 1 or kind not in ("llama", "gemma2"))
    first.assert_same(again)
    answered = [*prompt, *first.tokens, *ids(" on")]
    on = greedy(kinds, kind, answered)
    assert on.cached == len(prompt) + 23  # all but the last token, which was never evaluated
    others = [[*prompt, *ids("x" * 10), *ids(" and on it goes")], [*prompt[:60], *ids("something else came up entirely")]]
    found = [(answered, on), *((other, greedy(kinds, kind, other)) for other in others)]
    first.assert_same(greedy(kinds, kind, prompt))
    for asked, run in found:
        fresh(kinds, kind, asked).assert_same(run)


@pytest.mark.parametrize("kind", ["mamba", "lfm2"])
def test_state_that_cannot_be_cut_is_kept_at_the_prompts_end_and_where_turns_begin(kind: str, kinds: Server) -> None:
    """Asked with another last token, with another last turn, as a template does that drops a thought, and again."""
    turns = [ids(f"{i}{STORY}"[:60]) for i in range(5)]
    prompt = [*turns[0], 2, *turns[1], 2, *turns[2], 2, *turns[3]]
    first = fresh(kinds, kind, prompt)
    other = [*prompt[:-1], prompt[-1] + 1]
    turn = [*prompt[: -len(turns[3])], *turns[4]]
    dropped = [*prompt, *ids("another answer"), 2, *turns[4]]
    found = {}
    for asked, least in ((turn, 3 * 61 - 1), (other, len(prompt) - 1), (dropped, len(prompt) - 1), (prompt, len(prompt) - 1)):
        found[tuple(asked)] = run = greedy(kinds, kind, asked)
        assert run.cached >= least, (kind, run.cached, least)
    first.assert_same(found.pop(tuple(prompt)))
    for tokens, run in found.items():
        fresh(kinds, kind, list(tokens)).assert_same(run)


@pytest.mark.parametrize("kind", KINDS)
def test_parked_conversation_is_restored_intact(kind: str, kinds: Server) -> None:
    """Idle sequences are saved, up to the pool's size in tokens, and restored."""
    kinds.unload(kind)
    prompts = [ids(f"{i}{STORY * 4}"[:380]) for i in range(5)]
    said = [greedy(kinds, kind, prompt) for prompt in prompts]
    longer = [*prompts[0], *said[0].tokens, *ids(" and")]
    on = greedy(kinds, kind, longer)
    assert on.cached == 380 + 23
    fresh(kinds, kind, longer).assert_same(on)


keeping = serving("--cache-disk", "100M", write=write_kinds)  # keeps prompts on the disk


def kept_files(server: Server) -> list[Path]:
    return list((server.home / ".cache" / "shimmy" / "prefixes").glob("*"))


@pytest.mark.parametrize("kind", KINDS)
def test_conversation_goes_on_after_its_model_was_unloaded(kind: str, kinds: Server, keeping: Server) -> None:
    prompt = ids(STORY * 3)[:300]
    first = greedy(keeping, kind, prompt)
    longer = [*prompt, *first.tokens, *ids(" and")]
    keeping.unload(kind)
    on = greedy(keeping, kind, longer)
    assert on.cached >= len(prompt) - 1
    fresh(kinds, kind, longer).assert_same(on)
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in kept_files(keeping))
    keeping.unload(kind)
    fork = [*prompt[:250], *ids("something else")]
    fresh(kinds, kind, fork).assert_same(greedy(keeping, kind, fork))


def test_kept_prompt_survives_a_restart_is_counted_and_spares_nothing_of_another_client(tmp_path: Path) -> None:
    write_kind(tmp_path / "llama.gguf", "llama")
    prompt, told = ids(STORY * 3)[:300], list[dict[str, float]]()
    flags: list[str | Path] = ["--port", "0", "--model", tmp_path / "llama.gguf", "--cache-disk", "2G", "--private-prompts"]
    for key, other, least, most in (("one", "two", 0, 0), ("one", "two", 299, 299), ("two", "one", 0, 0)):  # its first key
        server = Server(tmp_path / "home", *flags, "--api-key", key, "--api-key", other)
        try:
            body = {"prompt": prompt, "max_tokens": 4, "ignore_eos": True}
            usage = server.post("/v1/completions", body, Authorization=f"Bearer {key}").json()["usage"]
            assert least <= usage["prompt_tokens_details"]["cached_tokens"] <= most
            lines = server.get("/metrics", Authorization=f"Bearer {key}").body.decode().splitlines()
            told.append({line.split("{")[0]: float(line.split()[-1]) for line in lines if line.startswith("shimmy_prefix_disk")})
            kept = server.get("/diag", Authorization=f"Bearer {key}").json()["prefixes"]
        finally:
            server.stop()
    assert [t["shimmy_prefix_disk_hits_total"] for t in told] == [0, 1, 0]
    assert told[1]["shimmy_prefix_disk_read_bytes_total"] > 300 * 4
    assert kept["files"] == 1 and kept["bytes"] == kept_files(server)[0].stat().st_size
    assert len(kept_files(server)) == 2  # one of each client


def prefix_files(model: Path, most: int = 1 << 30) -> Any:
    """A model's prefixes on the disk, without an engine."""
    options = types.SimpleNamespace(cache_dir=None, cache_disk=most, kv_type="f16", flash_attn="auto", lora=())
    llama: Any = types.SimpleNamespace(options=options, info=types.SimpleNamespace(path=str(model)), on_cpu=True, n_swa=0, np=np,
                                       counting=np.arange(10_000))  # fmt: skip
    return module.PrefixFiles(llama)


def keep(files: Any, salt: int, tokens: int = 200, size: int = 40_000, uses: int = 1) -> Any:
    """Writes a prefix whose cells can be told from its tokens; returns it."""
    prefix = module.Prefix(np.full(tokens, salt, np.int32), "", 0, np.arange(10_000))
    prefix.saved, prefix.uses = np.full(size, salt, np.uint8), uses
    for _ in files.write(prefix, 0.01, ()):
        pass
    return prefix


@pytest.fixture
def model_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that stands for a model, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"x" * 1000)
    return tmp_path / "model.gguf"


def salts(files: Any) -> list[int]:
    """The prefixes whose cells can be read, by their tokens."""
    read = [prefix for kept in files.listed("") if (prefix := files.read(kept))]
    assert all((prefix.saved == prefix.tokens[0]).all() for prefix in read)
    return sorted(int(prefix.tokens[0]) for prefix in read)


def test_damaged_kept_prefix_is_removed_and_never_read(model_file: Path) -> None:
    files = prefix_files(model_file)
    for salt in range(1, 7):
        keep(files, salt)
    damages: list[Callable[[bytes], bytes]] = [
        lambda data: data[:-100], lambda data: data[:5000] + b"\x77" + data[5001:], lambda data: b"", lambda data: b"y" * 41_000,
        lambda data: data[:17] + b"\xff" * 8 + data[25:],
    ]  # fmt: skip
    for kept, damage in zip(sorted(Path(files.folder).iterdir()), damages, strict=False):
        kept.write_bytes(damage(kept.read_bytes()))
    assert len(salts(prefix_files(model_file))) == 1
    assert len(list(Path(files.folder).iterdir())) == 1
    os.utime(model_file, (1, 1))  # another model's file
    assert not prefix_files(model_file).listed("")


def test_kept_prefixes_worth_least_make_room(model_file: Path) -> None:
    files = prefix_files(model_file, most=130_000)
    keep(files, 1, uses=50)
    keep(files, 2)
    keep(files, 3, tokens=900)
    keep(files, 4)
    assert salts(files) == [1, 3, 4]
    for _ in range(3):
        assert len(files.listed("")) == 3
    keep(files, 5, size=140_000)  # larger than all that may be kept
    assert salts(files) == [1, 3, 4]
    other = prefix_files(model_file)
    (listed, *_) = files.listed("")
    Path(other.listed("")[0].path).unlink()  # by another server
    assert files.read(listed) is None
    assert not prefix_files(model_file, most=0).listed("")


def test_kept_prefix_that_is_slower_to_read_is_computed(model_file: Path) -> None:
    files = prefix_files(model_file)
    keep(files, 1)
    (kept,) = files.listed("")
    assert files.is_quicker(kept, 199) and not files.is_quicker(kept, 10)
    files.read(kept)
    assert files.is_quicker(kept, 199)
    kept.token_seconds = 1e-9
    assert not files.is_quicker(kept, 199)


@pytest.mark.parametrize("fault", ["a file in the folder's place", "a full disk"])
def test_prefixes_that_cannot_be_kept_cost_one_warning(
    fault: str, model_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = prefix_files(model_file)
    if fault == "a full disk":
        monkeypatch.setattr(module.PrefixFiles, "_make_room", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    else:
        Path(files.folder).parent.mkdir(parents=True)
        Path(files.folder).write_text("")
    keep(files, 1)
    keep(files, 2)
    assert len(caplog.records) == 1 and not files.listed("")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills its own copies")
def test_writer_that_is_killed_anywhere_leaves_only_whole_files(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.PrefixFiles, "BLOCK", 4096)
    choose, files = random.Random(7), prefix_files(model_file)
    for salt in range(1, 41):
        if not (child := os.fork()):
            with contextlib.suppress(BaseException):
                keep(files, salt, size=400_000)
            os._exit(0)
        time.sleep(choose.random() / 150)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    found = salts(prefix_files(model_file))
    assert found and set(found) < set(range(1, 41))
    parts = list(Path(files.folder).glob("*.part"))
    for part in parts:
        os.utime(part, (1, 1))
    assert salts(prefix_files(model_file)) == found and parts and not list(Path(files.folder).glob("*.part"))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mamba"])
def test_random_mix_of_conversations_stays_correct(kind: str, kinds: Server) -> None:
    """More conversations than slots or the pool can hold, in random order, six at a time, some cancelled."""
    kinds.unload(kind)
    choose, talks = random.Random(4), [ids(f"{i:02d}{STORY * 4}"[: 100 + 9 * i]) for i in range(34)]
    order = [choose.randrange(34) for _ in range(90 if SOAK else 50)]
    alone = {i: greedy(kinds, kind, talks[i], 8) for i in sorted({*order})}

    def ask(i: int) -> Run | None:
        if i % 3 == 0:
            give_up(kinds, {"model": kind, "prompt": talks[i], "max_tokens": 40}, i / 20_000)
        return greedy(kinds, kind, talks[i], 8) if i % 3 else None

    with ThreadPoolExecutor(6) as pool:
        runs = list(pool.map(ask, order))
    for i, run in zip(order, runs, strict=True):
        if run:
            alone[i].assert_same(run)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_read_aside_generate_the_same_as_alone(kind: str, asides: Server) -> None:
    """Eight at a time, twelve in all: most arrive during other streams and pass through the reader's context."""
    asides.unload(kind)
    talks = [ids(f"{i:02d}{STORY * 4}"[: 60 + 26 * i]) for i in range(12)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda talk: greedy(asides, kind, talk, 40), talks))
    for talk, run in zip(talks, together, strict=True):
        greedy(asides, kind, talk, 40).assert_same(run)
    fresh(asides, kind, talks[11], 40).assert_same(together[11])


def assert_together_as_alone(server: Server, prompts: list[list[int]], tokens: int, unload: bool = True) -> None:
    """Asserts that concurrent requests, on a fresh engine, generate what each generates alone."""
    alone = [greedy(server, "llama", p, tokens) for p in prompts]
    if unload:
        server.unload("llama")
    with ThreadPoolExecutor(min(8, len(prompts))) as pool:
        together = list(pool.map(lambda p: greedy(server, "llama", p, tokens), prompts))
    for one, among in zip(alone, together, strict=True):
        one.assert_same(among)


NO_READER = {
    "too little memory": ("free, need = available_memory(), ", "free, need = 0, "),
    "refused by llama.cpp": ("self.context = Context(llama, llama.ctx", "raise LoadError('no')\n        Context(llama, 9"),
}


@pytest.mark.parametrize("why", NO_READER)
def test_prompts_are_read_in_slices_when_a_reader_cannot_be_made(why: str, serve: Serve, tmp_path: Path) -> None:
    write_kind(tmp_path / "llama.gguf", "llama")
    own = serve("--models-dir", tmp_path, script=altered(tmp_path, *ALL_ASIDE, NO_READER[why]))
    talks = [ids(f"{i:02d}{STORY * 4}"[: 60 + 30 * i]) for i in range(10)]
    assert_together_as_alone(own, talks, 40)
    assert ("read in slices" in own.log.read_text()) == (why == "refused by llama.cpp")


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_cancelled_prompts_read_aside_leave_nothing_behind(kind: str, asides: Server) -> None:
    asides.unload(kind)
    alone = greedy(asides, kind, ids(STORY), 300)

    def leave(i: int) -> None:
        give_up(asides, {"model": kind, "max_tokens": 40, "prompt": [3 + i, *ids(STORY * 4)[:400]]}, i % 5 / 500)

    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(greedy, asides, kind, ids(STORY), 300) for _ in range(2)]
        list(pool.map(leave, range(40)))
    for stream in streams:
        stream.result().assert_same(alone)
    eventually(lambda: asides.get("/health").json()["requests_running"] == 0, "the engine is idle")
    fresh(asides, kind, ids(STORY), 300).assert_same(greedy(asides, kind, ids(STORY), 300))


def test_n_choices_share_one_prompt_and_repeat_with_a_seed(kinds: Server) -> None:
    kinds.unload("llama")
    made = greedy(kinds, "llama", ids(STORY), n=4)
    assert len(made.choices) == 4 and made.choices[0][:3] == made.choices[3][:3]
    assert made.usage["prompt_tokens"] == len(STORY)
    assert made.usage["completion_tokens"] == 4 * 24
    ask = functools.partial(greedy, kinds, "llama", ids(STORY), temperature=1, n=3, seed=5)
    first = ask().choices
    assert first[0] != first[1] != first[2]
    assert [c[:3] for c in first] == [c[:3] for c in ask().choices]


def test_chat_n_returns_and_streams_that_many_choices(server: Server) -> None:
    choices = server.chat(n=3).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in choices} == {"Hello wide world"}
    texts = ["", ""]
    for event in server.streamed("/v1/chat/completions", chatting("count", n=2))[:-1]:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
    assert texts == [TEXTS["="]] * 2


def test_eight_concurrent_requests_generate_the_same_as_alone(kinds: Server) -> None:
    assert_together_as_alone(kinds, [ids(f"{i} {STORY[i * 7 :]}") for i in range(8)], 16)


def test_preempted_sequences_generate_the_same_as_undisturbed(serve: Serve, tmp_path: Path) -> None:
    """Four sequences of 189 tokens in a pool of 256: the youngest are preempted and resume."""
    write_kind(tmp_path / "llama.gguf", "llama", context=256)
    small = serve("--models-dir", tmp_path, "--kv-pool", "256", "--parallel", "4")
    assert_together_as_alone(small, [ids(f"{i} bottles of beer on the wall") for i in range(4)], 160, unload=False)


def test_shared_prefix_counts_once_after_its_first_reader_leaves(serve: Serve, tmp_path: Path) -> None:
    """Three streams share a prefix of 1,000 tokens in a pool of 3,000, so a fourth still fits."""
    write_kind(tmp_path / "llama.gguf", "llama", context=8192)
    small = serve("--models-dir", tmp_path, "--ctx", "2048", "--kv-pool", "3000")
    body = {"model": "llama", "prompt": ids((STORY * 10)[:1000]), "max_tokens": 400, "ignore_eos": True}
    with ThreadPoolExecutor(4) as pool:
        reading = pool.submit(small.post, "/v1/completions", {**body, "max_tokens": 20})
        eventually(lambda: small.status("llama")["requests_running"] == 1, "the first one reads")
        for _ in range(3):
            pool.submit(small.post, "/v1/completions", body)
        reading.result()
        with small.stream("/v1/completions", body) as fourth:
            next(fourth)
            assert small.status("llama")["requests_running"] == 4


def test_full_pool_loses_and_repeats_no_tokens_and_a_long_prompt_is_read_in_slices(tight: Server) -> None:
    with ThreadPoolExecutor() as pool:
        replies = list(pool.map(lambda _: tight.generate("#", max_tokens=5000), range(2)))
    assert [reply.text for reply in replies] == [("Tick " + "tock tick " * 2500)[: 5 * 5000]] * 2
    assert {reply.finish_reason for reply in replies} == {"length"}
    reply = tight.generate("a" * 3000 + "=")
    assert reply.text == TEXTS["="]
    assert reply.json()["usage"]["prompt_tokens"] == 3002


def test_full_queue_answers_503_with_retry_after_and_a_client_that_leaves_frees_its_place(tight: Server) -> None:
    def is_waiting(count: int) -> bool:
        return tight.status("recital")["requests_waiting"] == count

    endless = {"model": "recital", "prompt": "#", "max_tokens": 8000}
    with ThreadPoolExecutor() as pool:
        with tight.stream("/api/generate", endless) as one, tight.stream("/api/generate", endless) as two:
            next(one), next(two)
            with socket.create_connection((tight.host, tight.port)) as sock:
                sock.sendall(raw_post("/api/generate", json.dumps({"model": "recital", "prompt": ":"}).encode()))
                eventually(lambda: is_waiting(1), "it waits")
            eventually(lambda: is_waiting(0), "its place is free again")
            waiting = pool.submit(tight.generate, ":")
            eventually(lambda: is_waiting(1), "one waits")
            reply = tight.generate(":")
            assert_error(reply, 503, "overloaded", "--max-queue 1")
            assert int(reply.headers["Retry-After"]) > 0 and tight.status("recital")["requests_running"] == 2
            assert tight.chat().json()["error"]["type"] == "overloaded_error"
        assert waiting.result().text == "Hello wide world"


# ── Engine ────────────────────────────────────────────────────────────────────────────────────────────────────────────
# Concurrent requests, and clients that leave before theirs are done.


def test_concurrent_requests_and_a_burst_of_100_streams_are_answered_in_full(server: Server) -> None:
    prompts = [":", "=", "~", "|", "/"] * 5  # more than --parallel allows
    with ThreadPoolExecutor(len(prompts)) as pool:
        replies = list(pool.map(server.generate, prompts))
    assert [reply.text for reply in replies] == [TEXTS[prompt] for prompt in prompts]
    with ThreadPoolExecutor(100) as pool:
        streams = list(pool.map(lambda _: server.streamed("/api/generate", {"model": "recital", "prompt": "="}), range(100)))
    assert all(joined(s) == TEXTS["="] and s[-1] == "[DONE]" for s in streams)


def test_short_request_overtakes_a_long_one(server: Server) -> None:
    with server.endless() as stream:
        next(stream)
        assert server.generate("=").text == TEXTS["="]
        assert server.status("recital")["requests_running"] == 1


def test_long_prompt_does_not_freeze_a_running_stream(server: Server) -> None:
    with server.endless() as stream:
        next(stream)
        done = threading.Event()

        def newcomer() -> None:
            assert server.generate("z" * 15_000 + ":", max_tokens=1).status == 200  # no other test sends z, so nothing is cached
            done.set()

        thread = threading.Thread(target=newcomer)
        thread.start()
        pieces = 0
        while not done.is_set():
            next(stream)
            pieces += 1
        thread.join()
    assert pieces > 20


def test_every_choice_finishes_when_some_start_before_the_last_is_queued(server: Server) -> None:
    prompts = [":", "x" * 9_000 + ":", ":", "y" * 9_000 + ":"]
    for _ in range(2):
        stream = server.streamed("/v1/completions", {"model": "recital", "prompt": prompts, "n": 2, "max_tokens": 3})
        assert sum(e["choices"][0]["finish_reason"] is not None for e in stream if e != "[DONE]") == 8


def test_dropped_streams_and_sockets_leave_the_engine_idle(server: Server) -> None:
    for _ in range(30):
        with server.endless() as stream:
            next(stream)
    with server.ws() as ws:
        ws.send(json.dumps({"model": "recital", "prompt": "#", "max_tokens": LONG_CTX}))
        assert json.loads(ws.recv(HANG))["token"].startswith("Tick ")
    with server.ws() as ws:
        ws.send(json.dumps({"model": "recital", "prompt": "#", "max_tokens": LONG_CTX}))
        ws.recv(HANG)
        ws.socket.shutdown(socket.SHUT_RDWR)  # skips the closing handshake
    eventually(lambda: requests_of(server) == (0, 0), "all are gone")
    assert server.generate().text == TEXTS[":"]


# Clients that leave at every stage, in every dialect.

HOLD = (
    "        self.c.llama_backend_init()\n",
    "        self.c.llama_backend_init()\n        while os.path.exists('hold'):\n            time.sleep(0.02)\n",
)


# runs one request at a time; a load waits while the file `hold` is there
single = serving("--ctx", str(LONG_CTX), "--parallel", "1", changes=(HOLD,), load=("recital",))


@contextlib.contextmanager
def held_load(server: Server, model: str = "recital") -> Iterator[None]:
    """The model is unloaded, and its next load waits for the block's end."""
    server.unload(model)
    hold = server.home / "hold"
    hold.touch()
    try:
        yield
    finally:
        hold.unlink(missing_ok=True)


def nobody_left(server: Server) -> None:
    eventually(lambda: requests_of(server) == (0, 0), "nobody is left")


@streamed_and_plain
@in_every_tongue
def test_client_that_leaves_during_decoding_ends_its_request(tongue: Tongue, stream: bool, single: Server) -> None:
    with requested(single, tongue, stream=stream) as sock:
        eventually(lambda: requests_of(single) == (1, 0), "it runs")
        if stream:
            assert sock.recv(1).startswith(b"H")
    nobody_left(single)


@streamed_and_plain
@in_every_tongue
def test_client_that_leaves_while_its_prompt_is_read_ends_its_request(tongue: Tongue, stream: bool, single: Server) -> None:
    with requested(single, tongue, stream=stream, pad=random.choice("bcdefg") * 40_000):
        eventually(lambda: requests_of(single) == (1, 0), "it runs")
    nobody_left(single)


@streamed_and_plain
@in_every_tongue
def test_client_that_leaves_while_it_waits_frees_its_place(tongue: Tongue, stream: bool, single: Server) -> None:
    with requested(single, TONGUES["native"]):
        eventually(lambda: requests_of(single) == (1, 0), "another runs")
        with requested(single, tongue, stream=stream):
            eventually(lambda: requests_of(single) == (1, 1), "it waits")
        eventually(lambda: requests_of(single) == (1, 0), "it waits no more")
    nobody_left(single)


def test_clients_that_leave_while_the_model_loads_are_waited_for_no_more(single: Server) -> None:
    with held_load(single), contextlib.ExitStack() as stack:
        for tongue, stream in itertools.product(TONGUES.values(), (True, False)):
            stack.enter_context(requested(single, tongue, stream=stream))
        eventually(lambda: requests_of(single) == (0, 2 * len(TONGUES)), "all wait")
        stack.close()
        nobody_left(single)
        assert single.status("recital")["status"] == "loading"
    assert single.generate().text == TEXTS[":"]


def test_websocket_that_closes_at_any_stage_is_waited_for_no_more(single: Server) -> None:
    ask = json.dumps(TONGUES["native"].body())
    with requested(single, TONGUES["native"]):
        eventually(lambda: requests_of(single) == (1, 0), "another runs")
        with single.ws() as ws:
            ws.send(ask)
            eventually(lambda: requests_of(single) == (1, 1), "it waits")
        eventually(lambda: requests_of(single) == (1, 0), "it waits no more")
    nobody_left(single)
    with held_load(single):
        with single.ws() as ws:
            ws.send(ask)
            eventually(lambda: requests_of(single) == (0, 1), "it waits for the model")
        nobody_left(single)
    with single.ws() as ws:
        ws.send(json.dumps(TONGUES["native"].body(pad="h" * 40_000)))
        eventually(lambda: requests_of(single) == (1, 0), "its prompt is read")
        ws.socket.shutdown(socket.SHUT_RDWR)  # no closing frame
        nobody_left(single)


# Clients that leave the routes that make vectors, ranks and gaps, at every stage.


@dataclass(frozen=True)
class Errand:
    """A request of seconds to a route that tells no endless text; used as a Tongue is."""

    path: str
    model: str
    long: dict[str, Any]
    short: dict[str, Any]
    streams: bool = False

    def body(self, stream: bool = False, long: bool = True) -> dict[str, Any]:
        return {"model": self.model, **(self.long if long else self.short), **({"stream": stream} if self.streams else {})}


MANY_TEXTS = [" ".join(f"w{n:03}" for n in range(10, 100))] * 2000
GAP = {"input_prefix": "a", "input_suffix": "b", "n_predict": 3}
ERRANDS = {
    "embeddings": Errand("/v1/embeddings", "bert", {"input": MANY_TEXTS}, {"input": "w011"}),
    "embeddings of a generative model": Errand("/v1/embeddings", "gap", {"input": MANY_TEXTS}, {"input": "w011"}),
    "ollama embed": Errand("/api/embed", "bert", {"input": MANY_TEXTS}, {"input": "w011"}),
    "ollama embeddings": Errand("/api/embeddings", "gap", {"prompt": "w011 " * 12_000}, {"prompt": "w011"}),
    "rerank": Errand("/v1/rerank", "reranker", {"query": "w011", "documents": MANY_TEXTS},
                     {"query": "w011", "documents": ["w012"]}),
    "infill": Errand("/infill", "gap", GAP | {"n_predict": LONG_CTX, "ignore_eos": True}, GAP, streams=True),
    "infill of a long text": Errand("/infill", "gap", GAP | {"input_prefix": "y" * 60_000}, GAP, streams=True),
}
on_every_errand = cases("errand", ERRANDS)


def write_errands(folder: Path) -> None:
    """Models for vectors, ranks and gaps."""
    BERT.write(folder / "bert.gguf")
    BERT.write(folder / "reranker.gguf", pooling=4)
    write_recital(folder / "gap.gguf", name="Gap", tokens=GAP_TOKENS)


ERRANDS_LOADED = ("bert", "reranker", "gap")
# runs one text at a time; a load waits while `hold` is there
errands = serving("--ctx", str(LONG_CTX), "--parallel", "1", write=write_errands, changes=(HOLD,), load=ERRANDS_LOADED)


def aborted(server: Server, model: str) -> int:
    """How many jobs the engine has ended before they were done."""
    metrics = server.get("/metrics").body.decode()
    found = re.search(rf'request_success_total{{model_name="{model}",finished_reason="abort"}} (\d+)', metrics)
    assert found
    return int(found[1])


def nobody_left_at(server: Server, errand: Errand) -> None:
    eventually(lambda: requests_of(server, errand.model) == (0, 0), "nobody is left")
    assert server.post(errand.path, errand.body(long=False)).status == 200


@on_every_errand
def test_client_that_leaves_ends_its_errand(errand: Errand, errands: Server) -> None:
    before = aborted(errands, errand.model)
    with requested(errands, errand):
        eventually(lambda: requests_of(errands, errand.model) == (1, 0), "it runs")
    eventually(lambda: aborted(errands, errand.model) == before + 1, "the engine lets go of it")
    nobody_left_at(errands, errand)


@cases("errand", {name: errand for name, errand in ERRANDS.items() if errand.streams})
def test_client_that_leaves_a_streamed_errand_ends_it(errand: Errand, errands: Server) -> None:
    before = aborted(errands, errand.model)
    with requested(errands, errand, stream=True) as sock:
        assert sock.recv(1) == b"H"
    eventually(lambda: aborted(errands, errand.model) == before + 1, "the engine lets go of it")
    nobody_left_at(errands, errand)


@on_every_errand
def test_client_that_leaves_behind_another_errand_is_waited_for_no_more(errand: Errand, errands: Server) -> None:
    before = aborted(errands, errand.model)
    with requested(errands, errand):
        eventually(lambda: sum(requests_of(errands, errand.model)) == 1, "another is at work")
        with requested(errands, errand):
            eventually(lambda: sum(requests_of(errands, errand.model)) == 2, "it waits")
        eventually(lambda: sum(requests_of(errands, errand.model)) == 1, "it waits no more")
    eventually(lambda: aborted(errands, errand.model) == before + 2, "the engine lets go of both")
    nobody_left_at(errands, errand)


def test_clients_that_leave_their_errands_while_the_models_load_are_waited_for_no_more(errands: Server) -> None:
    with contextlib.ExitStack() as held:
        for model in ERRANDS_LOADED:
            held.enter_context(held_load(errands, model))
        with contextlib.ExitStack() as clients:
            for errand in ERRANDS.values():
                clients.enter_context(requested(errands, errand))
            waiting = {"bert": (0, 2), "reranker": (0, 1), "gap": (0, 4)}
            eventually(lambda: {model: requests_of(errands, model) for model in waiting} == waiting, "all wait")
        eventually(lambda: {requests_of(errands, model) for model in waiting} == {(0, 0)}, "nobody is left")
        assert sorted(errands.status(model)["status"] for model in waiting) == ["loading", "unloaded", "unloaded"]
    for errand in ERRANDS.values():
        nobody_left_at(errands, errand)


def test_newcomers_wait_for_no_grammar_that_takes_long_to_read(server: Server) -> None:
    assert server.chat("hi", "dice", max_tokens=2).status == 200
    ask = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
    with contextlib.ExitStack() as clients:
        for n in range(3):
            large = {f"p{n}-{i}": {"pattern": f"^([a-z]|[0-9]){{{i},{i + 300}}}(x|y)*z{i}$"} for i in range(8000)}
            errand = Errand("/v1/chat/completions", "dice", {**ask, "json_schema": {"properties": large}}, {})
            clients.enter_context(requested(server, errand))
        eventually(lambda: requests_of(server, "dice")[1] >= 2, "their grammars are being read")
        assert server.chat("hi", "dice", max_tokens=2).status == 200
        assert server.chat("hi", "dice", grammar='root ::= "yes"').message["content"] == "yes"
        assert requests_of(server, "dice")[1], "none waits any more"
    eventually(lambda: requests_of(server, "dice") == (0, 0), "nobody waits for them")
    slow = {"properties": {f"p{i}": {"pattern": f"^[a-z]{{{i},{i + 300}}}(x|y)*z{i}$"} for i in range(60)}}
    assert server.chat("hi", "dice", json_schema=slow, max_tokens=9).status == 200


def test_newcomers_wait_for_no_inputs_that_are_tokenized(server: Server) -> None:
    large = Errand("/v1/embeddings", "recital", {"input": ["w011 " * 1500] * 2000}, {})
    with requested(server, large):
        eventually(lambda: requests_of(server) == (0, 1), "its inputs are being tokenized")
        assert server.post("/api/generate", {"model": "recital", "prompt": ":", "max_tokens": 2}).status == 200
        assert requests_of(server) == (0, 1)
    eventually(lambda: requests_of(server) == (0, 0), "nobody waits for them")


# ── Worker ────────────────────────────────────────────────────────────────────────────────────────────────────────────
# Engines that crash, fail to start or are unloaded: the server notices, reports it and cleans up.


LOST = cases("number, words", {"killed": (signal.SIGKILL, "the engine process ended"),
                               "stopped": (signal.SIGSTOP, "said nothing for 2 s")})  # fmt: skip


@linux
@LOST
def test_engine_lost_in_a_stream_ends_it_with_the_reason_and_reloads(number: int, words: str, breakable: Server) -> None:
    with breakable.endless() as stream:
        next(stream)
        os.kill(breakable.engine("recital.gguf"), number)
        rest = [event for event in stream if event != "[DONE]"]
    error = rest[-1]["error"]
    assert error["code"] == "generation_failed" and error["message"] and words in error["details"]
    assert breakable.generate("=").text == TEXTS["="]


@linux
def test_killed_engine_fails_plain_and_websocket_requests(server: Server) -> None:
    server.load("recital")
    fields: dict[str, Any] = {"prompt": "#", "max_tokens": LONG_CTX}
    with ThreadPoolExecutor() as pool:
        plain = pool.submit(server.generate, **fields)
        over_ws = pool.submit(ws_ask, server, **fields)
        over_v1 = pool.submit(server.chat, "forever", max_tokens=LONG_CTX)
        eventually(lambda: server.status("recital")["requests_running"] == 3, "all three run")
        os.kill(server.engine("recital.gguf"), signal.SIGKILL)
        assert_error(plain.result(), 500, "generation_failed")
        assert over_ws.result()[1]["error"]["code"] == "generation_failed"
        assert assert_error(over_v1.result(), 500, "generation_failed")["type"] == "server_error"
    assert server.generate("=").text == TEXTS["="]


@linux
@LOST
def test_engine_lost_while_idle_is_replaced(number: int, words: str, breakable: Server) -> None:
    breakable.load("recital")
    engine = breakable.engine("recital.gguf")
    os.kill(engine, number)
    assert words in eventually(lambda: breakable.status("recital")["error"], "it is noticed")
    eventually(lambda: not alive(engine), "the engine is gone")
    assert breakable.generate("=").text == TEXTS["="]


def test_file_that_cannot_be_loaded_fails_only_that_load(serve: Serve, tmp_path: Path) -> None:
    path = write_dice(tmp_path / "bad" / "corrupt.gguf")
    name = b"blk.0.attn_q.weight"
    at = path.read_bytes().index(name) + len(name) + 4 + 2 * 8  # skips the name, the dimension count and two dimensions
    with_bytes(path, at, struct.pack("<I", 4000))  # no such type of tensor
    doubled = [*VOCABULARY[:-1], VOCABULARY[-2]]  # two tokens with the same text make llama.cpp call abort()
    write_recital(tmp_path / "bad" / "doubled.gguf", tokens=doubled)
    write_recital(tmp_path / "bad" / "good.gguf")
    server = serve("--models-dir", tmp_path / "bad")
    for model in {"doubled"} | ({"corrupt"} & set(server.ids())):
        reply = server.generate(model=model)
        assert reply.status == 500 and server.status(model)["status"] == "failed"
    assert server.generate(model="good").text == "Hello wide world"


def held(server: Server) -> tuple[int, int]:
    """Counts a server's open descriptors and threads."""
    return tuple(len(os.listdir(f"/proc/{server.process.pid}/{what}")) for what in ("fd", "task"))  # type: ignore[return-value]


def assert_holds_as_before(server: Server, before: tuple[int, int]) -> None:
    eventually(lambda: all(now <= then + 1 for now, then in zip(held(server), before, strict=True)), "as before")


@linux
def test_generations_leak_no_descriptors_or_threads(server: Server) -> None:
    server.generate()
    before = held(server)
    for _ in range(100):
        assert server.generate(max_tokens=1).status == 200
    assert_holds_as_before(server, before)


@linux
def test_ended_and_failed_engines_leak_no_descriptors(server: Server) -> None:
    server.generate(model="dice", max_tokens=1)
    before = held(server)
    for _ in range(2):
        assert server.unload("dice").status == 200
        assert_error(server.load("hollow"), 500, "generation_failed")
        server.generate(model="dice", max_tokens=1)
        os.kill(server.engine("dice.gguf"), signal.SIGKILL)
        eventually(lambda: server.status("dice")["status"] == "failed", "its death is known")
        server.generate(model="dice", max_tokens=1)
    assert_holds_as_before(server, before)
    server.unload("dice")


# Children that hang

HURRY = (("SILENCE = 30 ", "SILENCE = 2 "), ("STARTING = 180 ", "STARTING = 3 "))


@linux
def test_engine_with_a_full_pipe_that_hangs_is_unloaded_by_force(server: Server) -> None:
    server.generate()
    engine = server.engine("recital.gguf")
    os.kill(engine, signal.SIGSTOP)
    with ThreadPoolExecutor() as pool:
        stuck = [pool.submit(server.generate, "x" * 300_000) for _ in range(3)]
        eventually(lambda: server.status("recital")["requests_waiting"] == 3, "they are on their way")
        started = time.monotonic()
        assert server.unload("recital", "?force=true").json()["status"] == "unloaded"
        assert time.monotonic() - started < 20 and not alive(engine)
        for each in stuck:
            assert_error(each.result(), 500, "generation_failed")


STOPS_ITSELF = (
    "        self.c.llama_backend_init()\n",
    "        if not os.path.exists('once'):\n"
    "            open('once', 'w').close()\n            os.kill(os.getpid(), signal.SIGSTOP)\n",
)


@pytest.fixture
def stopped(serve: Serve, models: Path, tmp_path: Path) -> Serve:
    """A server on whose first load the engine stops itself in the middle, with its pid."""

    def start(*changes: tuple[str, str]) -> tuple[Server, int]:
        own = serve("--models-dir", models, script=altered(tmp_path, STOPS_ITSELF, *changes))
        assert own.post("/api/models/recital/load?wait=false").status == 202
        eventually((own.home / "once").exists, "it loads")
        (engine,) = descendants(own.process.pid)
        return own, engine

    return start  # type: ignore[return-value]


@linux
def test_engine_that_hangs_while_it_loads_is_replaced(stopped: Callable[..., tuple[Server, int]]) -> None:
    own, engine = stopped(*HURRY)
    assert own.generate("=").text == TEXTS["="] and not alive(engine)
    assert "said nothing for 3 s; trying again" in own.log.read_text()


@linux
def test_load_that_hangs_is_ended_by_an_unload_by_force(stopped: Callable[..., tuple[Server, int]]) -> None:
    own, engine = stopped()
    with ThreadPoolExecutor() as pool:
        waiter = pool.submit(own.generate)
        eventually(lambda: own.status("recital")["requests_waiting"], "somebody waits for the load")
        assert own.unload("recital", "?force=true").json()["status"] == "unloaded"
        assert_error(waiter.result(), 500, "generation_failed", "unloaded")
    assert not alive(engine) and own.generate("=").text == TEXTS["="]


@linux
def test_load_that_hangs_does_not_keep_the_server_or_the_engine_alive(stopped: Callable[..., tuple[Server, int]]) -> None:
    own, engine = stopped()
    assert own.stop() == 0
    eventually(lambda: not alive(engine), "the engine is gone")


BEAT = '            pipe.send(Alive(next(filter(None, [pulse.beat() for pulse in pulses]), "")))\n'
BREAK_FIRST = """\
            if os.path.exists('break'):
                os.rename('break', 'broken')
                exec(open('broken').read())
"""
# whose engine runs the file `break` with its next heartbeat
breakable = serving("--ctx", str(LONG_CTX), "--parallel", "1", changes=((BEAT, BREAK_FIRST + BEAT), *HURRY), healthy=False)


def break_engine(server: Server, fault: str) -> None:
    """Has a breakable engine run some lines of Python."""
    (server.home / "broken").unlink(missing_ok=True)
    (server.home / "next").write_text(fault)
    (server.home / "next").rename(server.home / "break")
    eventually((server.home / "broken").exists, "it breaks")


@linux
@cases("task, place", {"decode": ("decode", "Context.decode"), "sample": ("sample", "Engine._sample"),
                       "tokenize": ("tokenize", "Intake._answering")})  # fmt: skip
def test_engine_that_does_not_come_back_from(task: str, place: str, breakable: Server) -> None:
    with breakable.endless() as stream:
        next(stream)
        break_engine(breakable, f"Pulse.LIMITS['{task}'] = 1; {place} = lambda *_: time.sleep(1000)")
        newcomer = threading.Thread(target=breakable.generate)
        newcomer.start()
        rest = [event for event in stream if event != "[DONE]"]
        newcomer.join()
    assert f"'{task}' did not come to an end within 1 s" in rest[-1]["error"]["details"]
    assert breakable.generate("=").text == TEXTS["="]


@linux
def test_cancel_does_not_wait_for_the_tokenizer(breakable: Server) -> None:
    breakable.load("recital")
    break_engine(breakable, "Intake._answering = lambda *_: time.sleep(1000)")
    started = time.monotonic()
    with breakable.ws() as ws:
        ws.send(json.dumps({"model": "recital", "prompt": ":"}))
        eventually(lambda: breakable.status("recital")["requests_waiting"], "it is on its way")
        ws.send('{"cancel": true}')
        assert ws_answer(ws)[1]["finish_reason"] == "cancelled"
    assert time.monotonic() - started < 10
    os.kill(engine_of(breakable), signal.SIGKILL)
    eventually(lambda: not breakable.status("recital")["loaded"], "its death is known")


def test_cancel_stops_the_engine_although_nobody_iterates(models: Path) -> None:
    """The thread that iterates may be stuck in a write to a client that does not read."""
    info, options = model_info(models / "recital.gguf"), module.EngineOptions(ctx=LONG_CTX, threads=1)
    worker = module.Worker(info, module.Setup(options), 9, lambda *_: None, lambda _: None).start()
    cancel, sampling = Cancellation(), module.Sampling(max_tokens=LONG_CTX, temperature=0)
    events = iter(worker.submit([module.Generate(("#",), sampling, frozenset())], cancel))
    while not isinstance(next(events), module.Piece):
        pass
    assert worker.counts() == (1, 0)
    cancel.cancel()
    eventually(lambda: worker.counts()[0] == 0, "the engine is idle")
    worker.stop()


def test_server_that_was_stopped_for_a_while_finds_its_engine_alive(breakable: Server) -> None:
    breakable.load("recital")
    engine = engine_of(breakable)
    breakable.signal(signal.SIGSTOP)
    time.sleep(2.6)  # more than an engine may say nothing for
    breakable.signal(signal.SIGCONT)
    time.sleep(0.8)
    assert breakable.status("recital")["loaded"] and engine_of(breakable) == engine


# Engines that are killed, stopped, starved or robbed of their file, at every stage.


def engines_of(server: Server) -> list[int]:
    """The engines' process ids, those that load included."""
    found = []
    for pid in descendants(server.process.pid):
        with contextlib.suppress(OSError):
            if b"engine_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def engine_of(server: Server) -> int:
    """The one engine's process id, also while it loads; helpers have no such name in their command line."""

    return eventually(lambda: engines_of(server), "an engine")[-1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV], ids=lambda n: n.name)
@linux
def test_engine_killed_while_it_loads_is_replaced_and_the_waiting_requests_wait_on(number: int, single: Server) -> None:
    known_faults(single.home).write_bytes(kernels_found())  # another crash is remembered
    with ThreadPoolExecutor(len(TONGUES)) as pool:
        with held_load(single):
            waiters = [pool.submit(single.post, t.path, t.body("hi", stream=False)) for t in TONGUES.values()]
            eventually(lambda: requests_of(single) == (0, len(TONGUES)), "all wait")
            killed = engine_of(single)
            os.kill(killed, number)
            eventually(lambda: not alive(killed), "it is gone")
        assert {waiter.result().status for waiter in waiters} == {200}
    assert single.generate().text == TEXTS[":"]


@linux
@streamed_and_plain
def test_engine_killed_while_it_reads_a_prompt_fails_all_that_run_and_wait(stream: bool, single: Server) -> None:
    bodies = [(t.path, t.body("hi", pad="i" * 40_000, stream=stream)) for t in TONGUES.values()]
    with ThreadPoolExecutor(len(bodies)) as pool:
        waiters = [pool.submit(single.post, *each) for each in bodies]
        eventually(lambda: requests_of(single) == (1, len(TONGUES) - 1), "one runs, the others wait")
        os.kill(engine_of(single), signal.SIGKILL)
        replies = [waiter.result() for waiter in waiters]
    if stream:
        assert all(r.status == 500 or ends_with_an_error(r.body) for r in replies)
    else:
        assert {r.status for r in replies} == {500}
    assert single.generate().text == TEXTS[":"]


@linux
def test_engine_that_hangs_while_it_reads_a_prompt_is_replaced(breakable: Server) -> None:
    breakable.load("recital")
    with ThreadPoolExecutor(len(TONGUES)) as pool:
        waiters = [pool.submit(breakable.post, t.path, t.body("hi", pad="i" * 40_000, stream=False)) for t in TONGUES.values()]
        eventually(lambda: requests_of(breakable) == (1, len(TONGUES) - 1), "one runs, the others wait")
        engine = engine_of(breakable)
        os.kill(engine, signal.SIGSTOP)
        replies = [waiter.result() for waiter in waiters]
    assert all(r.status == 500 and "said nothing" in r.body.decode() for r in replies)
    eventually(lambda: not alive(engine), "the engine is gone")
    assert breakable.generate().text == TEXTS[":"]


@linux
def test_engine_out_of_memory_fails_requests_and_is_replaced(serve: Serve, models: Path) -> None:
    own = serve("--models-dir", models, "--ctx", str(LONG_CTX))
    own.load("recital")
    engine = engine_of(own)
    size = int(Path(f"/proc/{engine}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(engine, resource.RLIMIT_AS, (size, size))
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda i: own.generate(f"{i} " * 10_000 + "#", max_tokens=10), range(8)))
    assert all(r.status == 200 or r.json()["error"]["code"] == "generation_failed" for r in replies)
    eventually(lambda: requests_of(own) == (0, 0), "nobody is left")
    own.unload("recital", "?force=true")
    assert own.generate().text == TEXTS[":"] and engine_of(own) != engine
    assert_healthy(own)


@linux
def test_engine_whose_thread_has_no_memory_to_say_why_it_fails_is_replaced(breakable: Server) -> None:
    breakable.load("recital")
    engine, logged = engine_of(breakable), len(breakable.log.read_text())
    break_engine(breakable, "def fail(*_): raise MemoryError\nIntake._prompt = log.exception = fail")
    eventually(lambda: breakable.generate().status == 500, "it fails")
    eventually(lambda: not alive(engine), "it is gone")
    assert breakable.generate().text == TEXTS[":"] and "Traceback" not in breakable.log.read_text()[logged:]


def test_engine_whose_thread_never_begins_fails_its_load(serve: Serve, models: Path, tmp_path: Path) -> None:
    faults = ("begun.set()", "raise MemoryError"), ("START_SECONDS = 10.0", "START_SECONDS = 0.5")
    own = serve("--models-dir", models, script=altered(tmp_path, *faults))
    assert_error(own.generate(), 500, "generation_failed", "recital")
    assert own.get("/health").status == 200  # its log has the traceback of our fault


BABBLE = {
    "bytes that are no message": "pipe._writer.write(b'\\xff' * 64); pipe._writer.flush()",
    "a message of 4 GiB": "pipe._writer.write(b'\\xff\\xff\\xff\\xff'); pipe._writer.flush()",
    "a closed pipe": "pipe._writer.close()",
}


@linux
@cases("fault", BABBLE)
def test_engine_whose_pipe_breaks_is_replaced(fault: str, breakable: Server) -> None:
    with breakable.endless() as stream:
        next(stream)
        engine = engine_of(breakable)
        break_engine(breakable, fault)
        rest = [event for event in stream if event != "[DONE]"]
    assert rest[-1]["error"]["code"] == "generation_failed"
    eventually(lambda: not alive(engine), "the engine is gone")
    assert breakable.generate().text == TEXTS[":"]


def write_changing(folder: Path) -> None:
    for name in ("truncated", "deleted", "replaced"):
        write_recital(folder / f"{name}.gguf", name=name)


files = serving("--ctx", str(LONG_CTX), write=write_changing)  # models whose files may be changed, in its home's `models`


def loaded_file(server: Server, model: str) -> Path:
    """Loads a model of `files`, and returns its file's path."""
    assert server.load(model).status == 200
    return server.home / "models" / f"{model}.gguf"


@linux
def test_file_truncated_while_loaded_fails_what_runs(files: Server) -> None:
    path = loaded_file(files, "truncated")
    whole = path.read_bytes()
    with files.endless("truncated") as stream:
        next(stream)
        os.truncate(path, 4096)
        rest = [event for event in stream if event != "[DONE]"]
    assert rest[-1]["error"]["code"] == "generation_failed"
    again = files.generate(model="truncated")
    assert again.status in (404, 500) and again.json()["error"]["code"] in ("model_not_found", "generation_failed")
    path.write_bytes(whole)
    assert eventually(lambda: files.generate(model="truncated").status == 200, "the file is whole again")


def test_file_deleted_while_loaded_serves_until_it_is_unloaded(files: Server) -> None:
    loaded_file(files, "deleted").unlink()
    files.post("/api/models/discover")
    assert files.generate(model="deleted").text == TEXTS[":"]
    assert files.unload("deleted").json()["status"] == "unloaded"
    reply = files.generate(model="deleted")
    assert reply.status in (404, 500) and reply.json()["error"]["code"] in ("model_not_found", "generation_failed")


def test_file_replaced_while_loaded_serves_the_old_one_until_it_is_unloaded(files: Server, tmp_path: Path) -> None:
    other = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}="
    os.replace(write_recital(tmp_path / "new.gguf", template=other), loaded_file(files, "replaced"))
    files.post("/api/models/discover")
    assert files.chat(model="replaced").message["content"] == TEXTS[":"]
    files.unload("replaced")
    assert files.chat(model="replaced").message["content"].strip() == TEXTS["="].strip()


def hammer(server: Server, number: int, seconds: float) -> dict[str, int]:
    """Loads, unloads, asks and generates at random; counts the answers. Asserts that each is well-formed."""
    rng, counts, until = random.Random(number), dict[str, int](), time.monotonic() + seconds
    while time.monotonic() < until:
        model, what = rng.choice(("recital", "plain", "dice")), rng.choice(("load", "unload", "status", "generate"))
        if what == "generate":
            answer = server.generate(model=model, max_tokens=rng.choice((1, 50)), stream=rng.random() < 0.5)
        elif what == "status":
            answer = server.get(f"/api/models/{model}/status")
        else:
            answer = server.post(f"/api/models/{model}/{what}{rng.choice(('', '?force=true'))}")
        failed = answer.status != 200 or (answer.headers["Content-Type"].startswith("text/event") and not ends_well(answer.body))
        error = (last_document(answer.body) if answer.status == 200 else answer.json())["error"] if failed else None
        assert not error or error["code"] in ("generation_failed", "overloaded"), (what, error)
        assert what != "status" or answer.json()["status"] in ("unloaded", "loading", "loaded", "unloading", "failed")
        key = f"{what} {error['details'] if error else 'ok'}"
        counts[key] = counts.get(key, 0) + 1
    return counts


@linux
@more_under_soak
def test_loads_and_unloads_from_all_sides_end_in_a_consistent_state(serve: Serve, models: Path) -> None:
    own = serve("--models-dir", models, "--max-loaded", "2")
    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(lambda i: hammer(own, i, 60.0 if SOAK else 2.0), range(4)))
    unexpected = {k for c in counts for k in c if not k.endswith(" ok") and "unloaded" not in k}
    assert not unexpected
    for model in ("recital", "plain", "dice"):
        assert own.unload(model).json()["status"] == "unloaded" and requests_of(own, model) == (0, 0)
    assert not [pid for pid in engines_of(own) if alive(pid)] and own.generate().text == TEXTS[":"]
    assert_healthy(own)


# The ladder: models load although native code crashes, hangs or gets no memory on this machine.

STAND_IN = '''
import os, signal, time
import llama_cpp
real = os.environ["REAL_LLAMA_CPP"]
llama_cpp.__path__.append(real)
__file__ = os.path.join(real, "llama_cpp.py")
exec(compile(open(__file__).read(), __file__, "exec"))
how, _, size = os.environ["STAND_IN"].partition(" ")
state = {"extra": True, "log": None}
load_model, decode, init, set_log = llama_model_load_from_file, llama_decode, llama_init_from_model, llama_log_set

def llama_log_set(callback, data):
    state["log"] = callback
    set_log(callback, data)

def llama_model_load_from_file(path, params):
    state["extra"] = params.use_extra_bufts
    return load_model(path, params)

def llama_decode(context, batch):
    if how == "dies" or (how == "crashes" and state["extra"]):
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "hangs" and state["extra"]:
        time.sleep(1000)
    if how == "crashes-later" and state["extra"] and batch.n_tokens == 1 and batch.pos[0] == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    return decode(context, batch)

def llama_init_from_model(model, params):
    if how == "memory" and params.n_ctx > int(size):
        state["log"](4, b"alloc_buffer: failed to allocate CPU buffer of size 1", None)
        return None
    return init(model, params)
'''


StandIn: TypeAlias = Callable[[str], dict[str, str]]


@pytest.fixture
def stand_in(tmp_path: Path) -> StandIn:
    """The environment in which llama_cpp behaves as STAND_IN says."""
    package = tmp_path / "stand-in" / "llama_cpp"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "llama_cpp.py").write_text(STAND_IN)
    spec = importlib.util.find_spec("llama_cpp")
    assert spec and spec.submodule_search_locations
    real = spec.submodule_search_locations[0]
    return lambda how: {"PYTHONPATH": str(package.parent), "REAL_LLAMA_CPP": real, "STAND_IN": how}


def test_model_whose_kernels_crash_loads_without_them_and_the_next_start_knows(
    serve: Serve, stand_in: StandIn, models: Path
) -> None:
    first = serve("--models-dir", models, env=stand_in("crashes"))
    asked = first.post("/api/models/recital/load", {"ctx": 512}).json()  # what a client asks for may be what crashes
    assert asked["fallback"] == "without special CPU kernels" and first.get("/diag").json()["known_faults"]["rungs"] == {}
    first.unload("recital")
    assert first.generate().text == TEXTS[":"]
    assert first.status("recital")["fallback"] == "without special CPU kernels"
    log = first.log.read_text()
    assert log.count("signal 11); trying again without special CPU kernels") == 1 and "Traceback" not in log
    known = first.get("/diag").json()["known_faults"]
    assert Path(known["file"]).parent == known_faults(first.home).parent and "signal 11" in known["rungs"]["llama F16"]["reason"]
    second = serve("--models-dir", models, env=stand_in("crashes") | {"HOME": str(first.home)})
    assert second.generate().text == TEXTS[":"] and "trying again" not in second.log.read_text()
    assert "recital is loaded without special CPU kernels" in second.log.read_text()


def test_commands_share_the_ladder_and_what_it_found(stand_in: StandIn, models: Path, tmp_path: Path) -> None:
    ask = functools.partial(shimmy, "generate", "recital", "--local", "--prompt", ":", home=tmp_path)
    dead = ask(env=stand_in("dies") | {"SHIMMY_MODEL_PATHS": str(models)})
    assert dead.returncode == 1 and "signal 11" in dead.stderr.decode().splitlines()[-1] and b"Traceback" not in dead.stderr
    env = stand_in("crashes") | {"SHIMMY_MODEL_PATHS": str(models)}
    done = ask(env=env)
    assert done.returncode == 0 and done.stdout.decode().startswith(TEXTS[":"]) and b"trying again" in done.stderr
    probed = shimmy("probe", "recital", home=tmp_path, env=env)
    assert b"fallback     without special CPU kernels" in probed.stdout and b"trying again" not in probed.stderr
    told = shimmy("diag", home=tmp_path, env=env).stdout.decode()
    assert f"to forget them, delete {known_faults(tmp_path).parent}/known-faults-" in told and "llama F16" in told


def test_model_that_hangs_in_its_first_step_loads_without_special_kernels(
    serve: Serve, stand_in: StandIn, models: Path, tmp_path: Path
) -> None:
    script = altered(tmp_path, ('"trial", 60 + llama.size_bytes // (50 * MIB)', '"trial", 1'))
    own = serve("--models-dir", models, env=stand_in("hangs"), script=script)
    assert own.generate().text == TEXTS[":"]
    assert "'trial' did not come to an end within 1 s" in own.log.read_text()


def test_model_that_always_dies_fails_with_the_first_reason_and_is_not_loaded_again_and_again(
    serve: Serve, stand_in: StandIn, models: Path
) -> None:
    own = serve("--models-dir", models, env=stand_in("dies"))
    assert_error(own.generate(), 500, "generation_failed", "signal 11")
    loads = own.log.read_text().count("loading recital")
    assert loads == 2  # as configured, and without special kernels
    assert_error(own.generate(), 500, "generation_failed", "signal 11", "tried again in")
    assert own.log.read_text().count("loading recital") == loads and own.status("recital")["status"] == "failed"
    assert own.load("recital").status == 500  # who asks for the load has it tried
    assert own.log.read_text().count("loading recital") == 2 * loads
    waits = [float(n) for n in re.findall(r"tried again in (\d+) s", own.generate().body.decode())]
    assert waits and waits[0] > 5


def test_library_without_memory_for_the_pool_gets_a_smaller_one_which_is_not_remembered(
    serve: Serve, stand_in: StandIn, models: Path
) -> None:
    own = serve("--models-dir", models, "--ctx", "1024", env=stand_in("memory 1024"))
    assert own.generate().text == TEXTS[":"]
    status = own.status("recital")
    assert status["kv_pool"] == 1024 and status["fallback"].startswith("with a KV pool of one context")
    assert "failed to allocate CPU buffer" in own.log.read_text() and own.get("/diag").json()["known_faults"]["rungs"] == {}
    short = serve("--models-dir", models, "--ctx", "1024", env=stand_in("memory 512"))
    assert_error(short.generate(), 500, "generation_failed", "failed to allocate CPU buffer")


def test_engine_that_crashes_twice_soon_after_its_load_steps_down(serve: Serve, stand_in: StandIn, models: Path) -> None:
    own = serve("--models-dir", models, env=stand_in("crashes-later"))
    for _ in range(2):  # at the second word, where the trial does not come
        assert_error(own.generate(":"), 500, "generation_failed", "signal 11")
    assert own.generate(":").text == TEXTS[":"]
    assert "crashed twice soon after it was loaded; it goes on without special CPU kernels" in own.log.read_text()


@linux
def test_kernel_that_crashes_is_found_before_any_model_loads_and_left_out(serve: Serve, models: Path, tmp_path: Path) -> None:
    """Each kernel is tried in a process without a model."""
    crash = ("        import numpy as np\n\n        c, pointer, side", "        os.kill(os.getpid(), signal.SIGILL)\n"
             "        import numpy as np\n\n        c, pointer, side")  # fmt: skip
    own = serve("--models-dir", models, script=altered(tmp_path, crash), seeded=False)
    assert own.generate().text == TEXTS[":"]
    kernels = own.get("/diag").json()["known_faults"]["kernels"]
    assert set(kernels.values()) <= {"signal 4"}
    for name in kernels:
        assert f"this CPU's {name} kernels are broken in this build of llama-cpp-python (signal 4)" in own.log.read_text()
    assert own.log.read_text().count("loading recital") == 1 and "trying again" not in own.log.read_text()
    assert own.status("recital")["fallback"] == (f"without the {' and '.join(kernels)} kernels of the CPU" if kernels else "")


def test_kernels_of_this_machine_are_tried_and_wrong_results_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    found = module.try_kernels()
    ggml = module.Ggml(module.import_llama())
    assert found is not None and set(found) == set(ggml.kernels())
    good = [name for name, fault in found.items() if not fault]
    ggml.leave_out([name for name in found if name not in good])
    assert list(ggml.kernels()) == good
    ggml = module.Ggml(module.import_llama())
    usual = ggml.buffer_type(ggml.cpu)
    assert ggml.try_kernel(usual) == ""
    real = module.Ggml._product
    monkeypatch.setattr(module.Ggml, "_product", lambda *arguments: real(*arguments) / 2)
    assert ggml.try_kernel(usual) == "wrong results"


@cases("content", {"not there": None, "no JSON": "{", "a list": "[]", "other shapes": '{"kernels": 5, "rungs": []}'})
def test_known_faults_file_that_is_damaged_counts_as_empty(content: str | None, tmp_path: Path) -> None:
    faults = module.KnownFaults(str(tmp_path / "folder" / "known.json"))
    if content is not None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "known.json").write_text(content)
    ladder = module.Ladder(faults, lambda _: None)
    assert ladder._known(plain_model()) == module.Rung()
    faults.note("rungs", {"llama F32": {"plain": True, "cpu": False, "gpu_share": 1.0, "reason": "r"}})
    assert ladder._known(plain_model()) == module.Rung(plain=True)


@cases("causes, kept", {
    "a crash": (["crash"], module.Rung(gpu_share=0.5)), "memory": (["memory"], None),
    "memory, then crashes": (["memory", "memory", "crash", "hang", "crash"], module.Rung(gpu_share=0.25, plain=True)),
    "a crash, then memory": (["crash", "memory"], module.Rung(gpu_share=0.5)),
})  # fmt: skip
def test_only_what_crashes_led_to_is_remembered(
    causes: list[str], kept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.KnownFaults, "kernels", lambda _: ({}, False))
    monkeypatch.setattr(module.Ladder, "_uses_gpu", staticmethod(lambda _: True))
    faults, left = module.KnownFaults(str(tmp_path / "known.json")), list(causes)

    def start(_: Any) -> Any:
        if left:
            raise module.LoadFailure(f"no luck: {left[0]}", cause=left.pop(0))
        return "a worker"

    ladder = module.Ladder(faults, lambda _: None)
    assert ladder.load(plain_model(), module.Setup(), start) == "a worker"
    known: Any = faults.read().get("rungs", {}).get("llama F32")
    assert ladder._known(plain_model()) == (kept or module.Rung())
    assert kept is None or known["reason"] == f"no luck: {next(c for c in causes if c != 'memory')}"


def test_known_faults_of_broken_off_trials_or_in_a_folder_that_cannot_be_written_cost_only_time(tmp_path: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        assert not module.has_crashed(-number)
    assert module.has_crashed(-signal.SIGSEGV) and module.has_crashed(0xC0000005) and not module.has_crashed(1)
    (tmp_path / "file").touch()
    faults = module.KnownFaults(str(tmp_path / "file" / "known.json"))
    faults.note("kernels", {"A": "signal 11"})
    assert faults.read() == {}


def test_load_that_always_fails_keeps_a_pause_with_an_end(models: Path) -> None:
    def fail(*_: Any) -> Any:
        raise module.LoadFailure("no luck", cause="hang")

    table = table_of(models, fail)
    table._residents._ladder._uses_gpu = lambda _: False  # type: ignore[method-assign, assignment]
    with pytest.raises(GenerationFailed):
        table.load("dice", True, Cancellation())
    table._residents.entries["dice"].failures = 5000
    with pytest.raises(GenerationFailed):
        table.load("dice", True, Cancellation())
    assert table.status("dice")["status"] == "failed"
    assert table._residents.entries["dice"].retry_at < time.monotonic() + 601
    table.close()


@cases("cause, gpu, words", {
    "memory": ("memory", False, ["with a KV pool of one context"]),
    "memory, with a GPU": ("memory", True, [
        "with a KV pool of one context", "with a KV pool of one context, with 50% of the layers on the GPU",
        "with a KV pool of one context, with 25% of the layers on the GPU", "with a KV pool of one context, on the CPU alone"]),
    "crash": ("crash", False, ["without special CPU kernels"]),
    "hang, with a GPU": ("hang", True, [
        "with 50% of the layers on the GPU", "with 25% of the layers on the GPU",
        "with 25% of the layers on the GPU, without special CPU kernels", "on the CPU alone, without special CPU kernels"]),
})  # fmt: skip
def test_rungs_that_a_cause_leads_down(cause: str, gpu: bool, words: list[str]) -> None:
    found, rung = list[str](), module.Rung().below(cause, gpu)
    while rung:
        found.append(rung.words())
        rung = rung.below(cause, gpu)
    assert found == words


# ── Models in memory ──────────────────────────────────────────────────────────────────────────────────────────────────
# Names, loading, unloading, eviction, and loads that fail.


def write_zoo(folder: Path) -> None:
    for name in ("ant", "bee", "cat"):
        write_recital(folder / f"{name}.gguf", name=name)


# three equal models, at most two loaded
zoo = serving("--max-loaded", "2", "--ctx", str(LONG_CTX), "--keep-alive", "-1", write=write_zoo)


def loaded(server: Server) -> set[str]:
    return {model["id"] for model in server.get("/api/models").json()["models"] if model["loaded"]} - {"default"}


@pytest.mark.parametrize("name", [
    "recital", "Recital", "RECITAL", "reci", "default", "gpt-4o", "die",
    "recital.gguf", "Recital.GGUF", "recital:latest", "RECITAL:latest",  # as other servers call it
])  # fmt: skip
def test_request_may_name_a_model_as(name: str, server: Server) -> None:
    assert server.generate(model=name, max_tokens=1).status == 200


def test_request_by_file_stem_finds_the_model(files: Server) -> None:
    write_recital(files.home / "models" / "My_Recital One.gguf")
    files.post("/api/models/discover")  # to a name that is not known a scan of a quarter second ago would answer
    for name in ("My_Recital One", "my-recital-one", "MY_RECITAL ONE"):
        assert files.generate(model=name).text == "Hello wide world"


def test_v1_model_absent_or_aliased_means_default(server: Server) -> None:
    for model in ({}, {"model": None}, {"model": "default"}, {"model": "gpt-4o-mini"}):
        reply = server.post("/v1/chat/completions", {**model, "messages": user("hi")})
        assert reply.message["content"] == "Hello wide world", model


def test_default_without_a_base_model_is_the_first_listed_and_stays_so(serve: Serve, tmp_path: Path) -> None:
    for name in ("n-model", "m-model"):
        write_header(tmp_path / "grow" / f"{name}.gguf")
    server = serve("--models-dir", tmp_path / "grow")
    listed = server.get("/api/models").json()["models"]
    assert listed[0]["id"] == "default"
    assert listed[0]["description"] == f"Base GGUF model: {listed[1]['id']}"
    assert listed[1]["id"] in ("m-model", "n-model")
    write_header(tmp_path / "grow" / "a-model.gguf")
    again = server.post("/api/models/discover").json()["models"]
    assert "a-model" in [model["id"] for model in again]
    assert server.get("/api/models").json()["models"][0]["description"] == listed[0]["description"]


def test_server_without_models_is_healthy_and_generate_is_404(serve: Serve, tmp_path: Path) -> None:
    server = serve(script=altered(tmp_path))  # beside which there is no model in the box
    assert server.get("/health").json()["models_loaded"] == 0
    assert_error(server.generate(model="default"), 404, "model_not_found")


def test_unknown_model_is_404_on_its_own_routes_and_no_request_names_a_path(server: Server, models: Path) -> None:
    for action in ("load", "unload"):
        assert_error(server.post(f"/api/models/nonesuch/{action}"), 404, "model_not_found", "nonesuch")
    assert_error(server.get("/api/models/nonesuch/status"), 404, "model_not_found", "nonesuch")
    for path in (str(models / "recital.gguf"), "../models/recital.gguf", "./recital.gguf"):
        assert_error(server.generate(model=path), 404, "model_not_found", path)


def test_model_routes_accept_default_and_percent_encoded_ids(files: Server) -> None:
    ollama_model(files.home / ".ollama" / "models", "tiny", "latest")
    assert files.post("/api/models/discover").json()["discovered"] >= 1
    assert files.get("/api/models/tiny%3Alatest/status").json()["model"] == "tiny:latest"
    assert files.get("/v1/models/tiny%3Alatest").json()["id"] == "tiny:latest"
    assert files.get("/api/models/default/status").status == 200


def test_load_waits_until_the_model_is_loaded_unless_it_is_told_not_to(server: Server) -> None:
    reply = server.load("dice")
    assert reply.status == 200
    status = reply.json()
    names = {"requests_running", "requests_waiting", "last_used"}
    assert names <= set(status) and status["model"] == "dice" and status.keys() == server.status("dice").keys()
    assert (status["status"], status["loaded"], status["progress"], status["error"]) == ("loaded", True, 1, None)
    assert status["memory_bytes"] > 0 and server.load("dice").status == 200
    server.unload("dice")
    reply = server.post("/api/models/dice/load?wait=false")
    assert reply.status == 202 and reply.json()["status"] in ("loading", "loaded")
    assert 0 <= reply.json()["progress"] <= 1
    eventually(lambda: server.status("dice")["loaded"], "dice is loaded")


@linux
def test_concurrent_requests_for_one_model_load_it_once(server: Server) -> None:
    server.unload("recital")
    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda _: server.generate("="), range(6)))
    assert {reply.text for reply in replies} == {TEXTS["="]}
    assert len(engines(server.process.pid, "recital.gguf")) == 1


@linux
def test_unload_ends_the_engine_and_is_idempotent(server: Server) -> None:
    server.load("dice")
    engine = server.engine("dice.gguf")
    for _ in range(2):
        reply = server.unload("dice")
        assert (reply.status, reply.json()["status"], reply.json()["loaded"]) == (200, "unloaded", False)
    assert not alive(engine)


def test_unload_lets_a_generation_finish_unless_it_is_forced(server: Server) -> None:
    body = {"model": "recital", "prompt": "#", "max_tokens": 2000}
    with server.stream("/api/generate", body) as stream, ThreadPoolExecutor() as pool:
        first = next(stream)
        unloading = pool.submit(server.unload, "recital")
        rest = list(stream)
        assert unloading.result().json()["status"] == "unloaded"
    assert len(joined([first, *rest]).split()) == 2000 and rest[-1] == "[DONE]"
    with server.endless() as stream:
        next(stream)
        assert server.unload("recital", "?force=true").json()["status"] == "unloaded"
        rest = list(stream)
    assert [event for event in rest if event != "[DONE]"][-1]["error"]["code"]


def test_concurrent_load_unload_and_generate_all_succeed(server: Server) -> None:
    def act(number: int) -> Reply:
        return server.unload("dice") if number % 3 == 0 else server.generate("Once", "dice", max_tokens=5, ignore_eos=True)

    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(act, range(9)))
    assert [reply.status for reply in replies] == [200] * 9


def test_failed_load_fails_every_waiter_and_its_reason_stays_until_an_unload(server: Server) -> None:
    with ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(server.generate, ":", "hollow", stream=bool(i % 2)) for i in range(6)]
        replies = [each.result() for each in waiting]
    for reply in (*replies, server.load("hollow")):
        assert_error(reply, 500, "generation_failed", "llama.attention")  # the missing key
    text, last = ws_ask(server, model="hollow", prompt=":")
    assert text == "" and last["error"]["message"]
    status = server.status("hollow")
    assert (status["status"], status["loaded"]) == ("failed", False) and status["error"]
    status = server.unload("hollow").json()
    assert (status["status"], status["error"]) == ("unloaded", None)


def test_model_whose_file_is_repaired_or_deleted_is_loaded_or_an_error(files: Server) -> None:
    path = write_header(files.home / "models" / "mended.gguf")
    files.post("/api/models/discover")  # to a name that is not known a scan of a quarter second ago would answer
    assert files.generate(model="mended").status == 500
    write_recital(path)
    files.post("/api/models/discover")
    assert files.generate(model="mended").text == "Hello wide world"
    path = write_recital(files.home / "models" / "lived.gguf")
    files.post("/api/models/discover")
    assert "lived" in files.ids()
    path.unlink()
    reply = files.generate(model="lived")
    assert reply.status in (404, 500) and reply.json()["error"]["code"] in ("model_not_found", "generation_failed")


def test_max_loaded_evicts_the_least_recently_used(zoo: Server) -> None:
    for name in ("ant", "bee", "ant"):
        assert zoo.generate(model=name).text == "Hello wide world"
    assert loaded(zoo) == {"ant", "bee"} and zoo.get("/api/health").json()["models_loaded"] == 2  # the default is no other
    assert zoo.generate(model="cat").text == "Hello wide world"
    assert loaded(zoo) == {"ant", "cat"}


def test_max_loaded_never_evicts_a_busy_model(zoo: Server) -> None:
    with zoo.endless("ant") as ant, zoo.endless("bee") as bee, ThreadPoolExecutor() as pool:
        next(ant), next(bee)
        waiting = pool.submit(zoo.generate, ":", "cat")
        eventually(lambda: zoo.status("cat")["requests_waiting"] == 1 or waiting.done(), "cat waits")
        next(ant), next(bee)
        zoo.unload("bee", "?force=true")
        assert waiting.result().text == "Hello wide world"
        assert "error" not in next(ant)


FEW_BYTES = ("container's limit; None where nobody tells.\"\"\"\n",
             "container's limit; None where nobody tells.\"\"\"\n    return 200 << 20\n")  # fmt: skip


@linux
def test_models_that_are_asked_for_together_take_turns_where_memory_holds_one(
    serve: Serve, models: Path, tmp_path: Path
) -> None:
    own = serve("--models-dir", models, script=altered(tmp_path, FEW_BYTES))
    most, over = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.01):
            found = own.get("/api/models").json()["models"]
            most = max(most, sum(m["state"] == "loaded" for m in found if m["id"] != "default"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor() as pool:
        replies = list(pool.map(lambda name: own.generate(model=name, max_tokens=1), ("recital", "plain", "dice")))
    over.set()
    watcher.join()
    assert [reply.status for reply in replies] == [200, 200, 200] and most == 1, own.log.read_text()


@linux
def test_model_without_memory_beside_a_busy_one_is_refused_in_time(serve: Serve, models: Path, tmp_path: Path) -> None:
    hurry = ("LOAD_WAIT_SECONDS = 60.0", "LOAD_WAIT_SECONDS = 1.0")
    own = serve("--models-dir", models, "--ctx", str(LONG_CTX), script=altered(tmp_path, FEW_BYTES, hurry))
    with own.endless() as stream:
        next(stream)
        assert_error(own.generate(model="plain"), 503, "overloaded", "no context would fit; 1 loaded models are busy")
        assert next(stream)
    assert own.generate(model="plain", max_tokens=1).status == 200


def test_keep_alive_unloads_an_idle_model(serve: Serve, models: Path) -> None:
    server = serve("--models-dir", models, "--keep-alive", "1s")
    server.load("recital")
    with server.stream("/api/generate", {"model": "recital", "prompt": "#", "max_tokens": 500}) as stream:
        assert len(joined(list(stream)).split()) == 500
    eventually(lambda: server.status("recital")["status"] == "unloaded", "the idle model goes")
    assert server.generate().text == "Hello wide world"


def test_keep_alive_zero_unloads_immediately(serve: Serve, models: Path) -> None:
    server = serve("--models-dir", models, "--keep-alive", "0")
    assert server.generate("=").text == TEXTS["="]
    eventually(lambda: server.status("recital")["status"] == "unloaded", "the model goes")


# Names

NAME_ROUTES: dict[str, tuple[str, str, Any]] = {
    "generate": ("POST", "/api/generate", {"prompt": ":"}),
    "chat": ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    "status": ("GET", "/api/models/{name}/status", None),
    "load": ("POST", "/api/models/{name}/load", {}),
    "unload": ("POST", "/api/models/{name}/unload", {}),
    "model": ("GET", "/v1/models/{name}", None),
}


@cases("method, path, body", NAME_ROUTES)
def test_name_with_a_nul_is_not_found(method: str, path: str, body: Any, server: Server) -> None:
    path = path.replace("{name}", quote("reci\0tal", safe=""))
    reply = server.request(method, path, body and {**body, "model": "reci\0tal"})
    assert_error(reply, 404, "model_not_found", "reci\\x00tal")


def test_name_of_a_mile_is_not_found_at_once(server: Server) -> None:
    with quickly():
        reply = server.generate(model="a/" * 400_000)
    assert_error(reply, 404, "model_not_found", "a/a/a/")
    assert len(reply.body) < 500


@pytest.mark.parametrize("name", ["reci:latest", ".gguf", ":latest", "recital.gguf.gguf", " ", "\0"])
def test_request_by_half_a_name_is_not_found(name: str, server: Server) -> None:
    assert_error(server.generate(model=name, max_tokens=1), 404, "model_not_found")


def test_ambiguous_name_is_told_what_it_could_mean(files: Server) -> None:
    for number in range(7):
        write_header(files.home / "models" / f"ape-{number}.gguf")
    files.post("/api/models/discover")
    error = assert_error(files.generate(model="ape"), 404, "model_not_found")
    assert error["details"] == (
        "Model 'ape' is not available: it could mean ape-0, ape-1, ape-2, ape-3, ape-4 and 2 more")
    message = files.chat(model="ape").json()["error"]["message"]
    assert message == f"The specified model was not found: {error['details']}"


def test_v1_unknown_model_is_told_in_the_message_what_there_is(server: Server) -> None:
    message = server.chat(model="claude-9").json()["error"]["message"]
    assert message.startswith("The specified model was not found: Model 'claude-9' is not available (available: ")
    assert "recital" in message and "--alias 'claude-9=MODEL'" in message


def test_models_named_in_vain_are_told_with_near_names(models: Path) -> None:
    options = TableOptions(default="recitol", aliases=(("gpt-*", "nonesuch"), ("ok", "dice"), ("d", "default")))
    table = ModelTable(Catalog([SearchRoot(str(models), "--models-dir")]), lambda *_: None, options)  # type: ignore[arg-type]
    lost = list(table.names().unresolved(table.catalog))
    assert lost == [("--model", "recitol", "; did you mean recital?"), ("--alias gpt-*", "nonesuch", "")]


def test_unknown_names_at_once_share_a_scan(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, scans, look = table_of(models, lambda *_: None), list[float](), Catalog._look

    def slowly(catalog: Catalog, began: float) -> Any:
        scans.append(began)
        time.sleep(0.4)
        return look(catalog, began)

    def unknown(number: int) -> bool:
        with pytest.raises(module.ModelNotFound):
            table.resolve(f"nonesuch-{number}")
        return True

    monkeypatch.setattr(Catalog, "_look", slowly)
    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(unknown, range(12)))
    assert 1 <= len(scans) <= 3


def test_first_scan_that_fails_leaves_nobody_waiting(serve: Serve, tmp_path: Path) -> None:
    script = altered(tmp_path, ("skipped: dict[str, str] = {}  # reason by path", "raise LookupError('no disk today')"))
    server = serve(script=script)
    assert server.generate(model="recital").status in (404, 500)
    assert server.get("/health").status == 200


class FakeWorker:
    """What a table asks of a worker, without a child."""

    alive, progress = True, 0.0
    parallel, loaded = 1, types.SimpleNamespace(ctx=1, pool=1, devices="", memory_need=0, sees=False)

    def __init__(self) -> None:
        self.measure, self.asked = threading.Event(), threading.Event()

    def start(self) -> FakeWorker:
        return self

    def counts(self) -> tuple[int, int]:
        return 0, 0

    def memory_bytes(self) -> int:
        self.asked.set()
        assert self.measure.wait(HANG)
        return 7

    def reserved_bytes(self) -> int:
        return 0

    def settings(self) -> dict[str, Any]:
        return {}

    def stop(self) -> None:
        self.measure.set()


def table_of(models: Path, start_worker: Any) -> ModelTable:
    return ModelTable(Catalog([SearchRoot(str(models), "--models-dir")]), start_worker, TableOptions())


def test_failing_load_gives_each_waiter_an_exception_of_its_own(models: Path) -> None:
    together = threading.Event()

    def fail(*_: Any) -> Any:
        assert together.wait(HANG)
        raise GenerationFailed("no luck", "The model could not be loaded")

    table = table_of(models, fail)
    caught: list[GenerationFailed] = []

    def ask() -> None:
        try:
            table.load("dice", True, Cancellation())
        except GenerationFailed as error:
            caught.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    eventually(lambda: table.status("dice")["requests_waiting"] == 8, "all wait for the same load")
    together.set()
    for thread in threads:
        thread.join(HANG)
    assert len({id(error) for error in caught}) == 8
    assert {(error.message, error.details) for error in caught} == {("The model could not be loaded", "no luck")}
    assert {sum(f.name == "ask" for f in traceback.extract_tb(error.__traceback__)) for error in caught} == {1}


def test_memory_that_is_slow_to_ask_for_holds_up_nobody(models: Path) -> None:
    worker = FakeWorker()
    table = table_of(models, lambda *_: worker)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(table.load, "dice", True, Cancellation())
        assert worker.asked.wait(HANG)
        began = time.monotonic()
        assert any(model["loaded"] for model in table.models()) and time.monotonic() - began < HANG / 4
        worker.measure.set()
        assert asked.result(HANG)["memory_bytes"] == 7
    table.close()


def test_engine_that_takes_long_to_end_holds_up_no_other_unload(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = threading.Event()
    monkeypatch.setattr(FakeWorker, "memory_bytes", lambda _: 7)
    monkeypatch.setattr(FakeWorker, "stop", lambda worker: None if worker is quick else gone.wait(HANG))
    quick = FakeWorker()
    table = table_of(models, lambda info, *_: quick if info.id == "recital" else FakeWorker())
    for name in ("dice", "recital"):
        assert table.load(name, True, Cancellation())["loaded"]
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(table.unload, "dice", False, Cancellation())
        eventually(lambda: table.status("dice")["status"] == "unloading", "it is to go")
        assert table.unload("recital", False, Cancellation())["status"] == "unloaded" and not slow.done()
        gone.set()
        assert slow.result(HANG)["status"] == "unloaded"
    table.close()


MAPS = """
import mmap, sys
file = open(sys.argv[1], "rb")
mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
print(sum(mapped[::4096]), flush=True)
sys.stdin.read()
"""


@linux
def test_weights_that_an_idle_model_has_mapped_are_not_free_for_the_next(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free memory, most of which is page cache: what an engine has mapped of it is in use all the same."""
    weights = tmp_path / "weights"
    weights.write_bytes(bytes(60 << 20))
    setups: list[module.Setup] = []
    monkeypatch.setattr(FakeWorker, "memory_bytes", lambda _: 7)

    def make(_: Any, setup: module.Setup, __: Any) -> Any:
        setups.append(setup)
        return FakeWorker()

    table = table_of(models, make)
    with Child([sys.executable, "-c", MAPS, str(weights)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as engine:
        assert engine.stdout and engine.stdout.readline()
        monkeypatch.setattr(FakeWorker, "process", engine, raising=False)
        monkeypatch.setattr(FakeWorker, "reserved_bytes", module.Worker.reserved_bytes)
        assert table.load("dice", True, Cancellation())["loaded"] and table.load("recital", True, Cancellation())["loaded"]
        assert setups[0].reserved == 0 and 60 << 20 <= setups[1].reserved < 80 << 20 and setups[1].others_idle
        engine.communicate()
    table.close()


def test_embedding_model_may_still_be_asked_about(tmp_path: Path) -> None:
    write_marked(tmp_path / "a-bert.gguf", "bert")
    table = table_of(tmp_path, lambda *_: FakeWorker())
    assert table.status("a-bert")["status"] == "unloaded"
    with pytest.raises(InvalidRequest):
        table.lease("a-bert", Cancellation())


HASTY_LOADS = ("LOAD_WAIT_SECONDS = 60.0", "LOAD_WAIT_SECONDS = 1.0")
roomy = serving("--max-loaded", "1", "--ctx", str(LONG_CTX), changes=(HASTY_LOADS,))


@pytest.fixture(scope="module")
def full(roomy: Server) -> Iterator[Server]:
    """A server with room for one model, which is busy; who waits for room gives up after a second."""
    with roomy.endless() as stream:
        next(stream)
        yield roomy


def test_load_that_gets_no_room_says_so_in_the_status_unless_an_unload_calls_it_off(full: Server) -> None:
    for _ in range(3):
        reply = full.post("/api/models/dice/load?wait=false")
        assert reply.status == 202 and reply.json()["error"] is None
    status = eventually(lambda: (s := full.status("dice"))["error"] and s, "the refusal shows")
    assert status["status"] == "failed" and "--max-loaded 1" in status["error"]
    full.post("/api/models/dice/load?wait=false")
    assert full.unload("dice").json()["status"] == "unloaded"
    eventually(lambda: full.status("dice")["requests_waiting"] == 0, "nobody waits")
    assert (full.status("dice")["status"], full.status("dice")["error"]) == ("unloaded", None)


def test_request_that_waits_for_a_model_is_refused_when_the_server_ends(serve: Serve, models: Path) -> None:
    own = serve("--models-dir", models, "--max-loaded", "1")
    replies: list[Reply] = []
    with own.endless() as stream:
        next(stream)
        waiting = threading.Thread(target=lambda: replies.append(own.generate("Once", "dice")))
        waiting.start()
        eventually(lambda: own.status("dice")["requests_waiting"], "it waits")
        own.signal(signal.SIGTERM)
        waiting.join(HANG)
    assert_error(replies[0], 503, "overloaded", "shutting down")
    assert own.process.wait(HANG) == 0 and "loading dice" not in own.log.read_text()


# Settings of single models.


def test_preset_gives_each_model_its_own_settings(serve: Serve, models: Path, tmp_path: Path) -> None:
    (tmp_path / "own.ini").write_text(
        "version = 1\n[*]\nctx-size = 512\ntemperature = 0\n[rec*]\nctx = 256\nn_predict = 2\n[dice]\nalias = cube, d6\n"
        "preload = true\nkeep-alive = 1h\n[ghost]\nctx = 9\n"
    )
    own = serve("--models-dir", models, "--model", "recital", "--parallel", "2", "--preset", tmp_path / "own.ini")
    assert own.generate(":", max_tokens=None).text == "Hello wide"
    recital, dice = (own.load(name).json() for name in ("recital", "cube"))
    assert (recital["context_length"], recital["parallel"], recital["options"]["ctx"]) == (256, 2, 256)
    assert recital["sampling"] == {"temperature": 0, "max_tokens": 2}
    assert (dice["model"], dice["context_length"]) == ("dice", 256)  # the model's own is less than asked
    eventually(lambda: "[ghost] means no model" in own.log.read_text(), "it is told")
    assert own.generate("Once", "d6", max_tokens=9).text == own.generate("Once", "dice", max_tokens=9).text
    assert own.generate(":", max_tokens=1).text == "Hello"


WRONG_PRESETS: dict[str, tuple[str | None, str]] = {
    "not there": (None, "No such file"),
    "no such key": ("[a]\nctx = 5\nspeed = 9\n", "[a] speed: there is no such setting"),
    "no number": ("[a]\nctx = many\n", "[a] ctx: 'many' is no whole number from 1 to 16777216"),
    "out of range": ("[a]\nparallel = 900\n", "[a] parallel: '900' is no whole number from 1 to 200"),
    "sampling out of range": ("[a]\ntemperature = 9\n", "[a] --temperature must be a number from 0 to 5, not 9"),
    "no device": ("[a]\ndevice = CUDA7\n", "[a] --device CUDA7: there is no such device"),
    "no section": ("ctx = 5\n", "ctx stands in no section"),
    "neither true nor false": ("[a]\nmmap = perhaps\n", "[a] mmap: perhaps is neither true nor false"),
    "a name for several": ("[a*]\nalias = b\n", "[a*] alias: a pattern means several models"),
    "twice": ("[a]\nctx = 5\nctx = 6\n", "option 'ctx' in section 'a' already exists"),
    "no INI": ("[a\n", "'[a"),
    "no adapter": ("[a]\nlora = none.gguf\n", "[a] --lora none.gguf: there is no such file"),
    "no projector": ("[a]\nmmproj = eyes.gguf\n", "[a] --mmproj eyes.gguf: there is no such file"),
}


@cases("text, words", WRONG_PRESETS)
def test_preset_that_is_wrong_ends_the_start(text: str | None, words: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "own.ini").write_text(text)
    flags = ["serve", "--port", "0", "--preset", "own.ini"]
    assert_failed(run_in_this_process(flags, tmp_path, b"", seeded(tmp_path, None)), 2, "--preset own.ini: ", words)


def test_load_takes_settings_and_tells_what_holds(serve: Serve, models: Path) -> None:
    own = serve("--models-dir", models)
    first = own.post("/api/models/recital/load", {"ctx": 128, "parallel": 2, "kv-type": "q8_0"}).json()
    assert (first["context_length"], first["parallel"], first["options"]["kv_type"]) == (128, 2, "q8_0")
    engine = own.engine("recital.gguf")
    again = own.post("/api/models/recital/load", {"ctx": 128}).json()
    assert again["context_length"] == 128 and own.engine("recital.gguf") == engine
    changed = own.post("/api/models/recital/load", {"n-gpu-layers": "all", "ctx_size": 200}).json()
    assert changed["context_length"] == 200 and changed["options"]["parallel"] == 2
    assert own.generate().text == TEXTS[":"]
    own.unload("recital")
    assert own.post("/api/models/recital/load", {"ctx": None}).json()["options"] == {"threads": 1, "cache_disk": 0}


def test_load_with_other_settings_that_does_not_wait_is_answered_at_once_by_a_busy_model(serve: Serve, models: Path) -> None:
    own = serve("--models-dir", models, "--ctx", str(LONG_CTX))
    with own.endless() as stream:
        next(stream)
        assert own.post("/api/models/recital/load?wait=false", {"ctx": 128}).status == 202
        assert next(stream) and own.status("recital")["context_length"] == LONG_CTX
    eventually(lambda: own.status("recital").get("context_length") == 128, "it is loaded again")


@cases("body, words", {
    "no such key": ({"speed": 1}, "speed: there is no such setting"), "no number": ({"ctx": "x"}, "ctx: 'x' is no whole number"),
    "out of range": ({"ctx": 0}, "ctx: '0' is no whole number from 1"),
    "sampling": ({"temperature": 1}, "a load takes the engine's settings"),
    "a file": ({"chat_template": "/etc/passwd"}, "chat_template names a file"),
    "another": ({"lora": ["x"]}, "lora names a file"), "a projector": ({"mmproj": "x"}, "mmproj names a file"),
    "no such device": ({"device": "CUDA9"}, "there is no such device"), "no object": ([1], "must be a JSON object"),
})  # fmt: skip
def test_load_refuses_settings_that_are_wrong_and_loses_nothing(body: Any, words: str, server: Server) -> None:
    server.load("recital")
    assert_error(server.post("/api/models/recital/load", body), 400, "invalid_request", words)
    assert server.status("recital")["loaded"]


def test_ollamas_num_ctx_reloads_an_idle_model_for_more_and_not_for_less(serve: Serve, models: Path) -> None:
    own = serve("--models-dir", models, "--ctx", "128", "--max-loaded", "1")

    def ask(size: int) -> int:
        body = {"model": "recital", "prompt": ":", "raw": True, "stream": False, "options": {"num_ctx": size}}
        assert own.post("/api/generate", body).json()["response"] == TEXTS[":"]
        return own.engine("recital.gguf")

    own.generate()
    first = own.engine("recital.gguf")
    assert ask(64) == first and ask(128) == first
    second = ask(512)
    assert second != first and ask(256) == second and own.generate().text == TEXTS[":"]
    assert own.engine("recital.gguf") == second
    assert own.get("/api/ps").json()["models"][0]["context_length"] == 512
    third = ask(LONG_CTX // 2)
    with ThreadPoolExecutor() as pool:
        with own.endless() as stream:
            next(stream)
            waits = pool.submit(ask, LONG_CTX)
            eventually(lambda: own.status("recital")["requests_waiting"] == 1, "it waits")
            assert next(stream) and own.engine("recital.gguf") == third  # nobody's answer is broken off for it
        assert waits.result() != third and own.status("recital")["context_length"] == LONG_CTX


def test_ollamas_store_gives_parameters_system_message_and_adapters(serve: Serve, tmp_path: Path) -> None:
    store = tmp_path / "store"
    named = {"params": json.dumps({"temperature": 0, "num_predict": 2, "num_ctx": 300, "stop": ["never"], "odd": 1}).encode(),
             "system": b"Speak:", "adapter": write_lora(tmp_path / "lora.gguf").read_bytes()}  # fmt: skip
    ollama_model(store, "tiny", "latest", made=write_recital(tmp_path / "new.gguf"), more=named)
    own = serve(env={"OLLAMA_MODELS": str(store)})
    status = own.load("tiny:latest").json()
    assert status["context_length"] == 300 and len(status["options"]["lora"]) == 1
    assert own.generate(":", "tiny:latest", max_tokens=None).json()["usage"]["completion_tokens"] == 2
    assert own.chat("hi", "tiny:latest").json()["usage"]["completion_tokens"] == 2
    assert "Speak:" in own.post("/apply-template", chatting(model="tiny:latest")).json()["prompt"]
    own_words = [{"role": "system", "content": "Sing"}, *user("hi")]
    assert "Speak:" not in own.post("/apply-template", {"model": "tiny:latest", "messages": own_words}).json()["prompt"]


def test_ollamas_parameters_that_are_wrong_leave_the_model_out_with_the_reason(tmp_path: Path) -> None:
    wrong = {"no-json": b"{", "a-list": b"[]", "out-of-range": b'{"temperature": 99}', "no-number": b'{"num_ctx": "x"}'}
    for tag, params in wrong.items():
        ollama_model(tmp_path / ".ollama" / "models", "tiny", tag, more={"params": params})
    done = shimmy("list", "-v", home=tmp_path)
    assert b"tiny:" not in done.stdout
    for tag in wrong:
        assert f"{tag}: " in done.stderr.decode()


def test_context_that_one_client_wishes_for_in_vain_leaves_the_model_to_the_others(
    serve: Serve, models: Path, stand_in: StandIn
) -> None:
    own = serve("--models-dir", models, "--ctx", "256", env=stand_in("memory 4096"))
    assert own.generate().text == TEXTS[":"]
    body = {"model": "recital", "prompt": ":", "raw": True, "stream": False, "options": {"num_ctx": 8192}}
    assert own.post("/api/generate", body).status == 500
    assert own.generate().text == TEXTS[":"] and own.status("recital")["context_length"] == 256


def test_adapters_and_templates_of_the_command_line_are_the_default_models(serve: Serve, models: Path, tmp_path: Path) -> None:
    write_lora(tmp_path / "adapter.gguf")
    (tmp_path / "own.jinja").write_text("{{ messages[-1].content }}:")
    flags = ("--lora", tmp_path / "adapter.gguf", "--chat-template", tmp_path / "own.jinja")
    own = serve("--models-dir", models, "--model", "recital", *flags)
    assert {"lora", "chat_template"} <= set(own.load("recital").json()["options"])
    assert not {"lora", "chat_template"} & set(own.load("dice").json()["options"])


# ── Dialects ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# One generation in the native format and in OpenAI's.


def test_generate_response_has_the_documented_shape(server: Server) -> None:
    reply = server.generate("Say :")
    document = reply.json()
    assert document["choices"] == [{"text": "Hello wide world", "index": 0, "finish_reason": "stop"}]
    usage = document["usage"]
    assert usage["prompt_tokens"] == 1 + len("Say :") and usage["completion_tokens"] in (3, 4)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    reply = server.generate()
    assert reply.headers["Content-Type"].startswith("application/json")
    assert int(reply.headers["Content-Length"]) == len(reply.body)


@every_text
def test_streamed_and_plain_text_are_equal(prompt: str, server: Server) -> None:
    body = {"model": "recital", "prompt": prompt}
    assert joined(server.streamed("/api/generate", body)) == TEXTS[prompt] == server.generate(prompt).text


def test_stream_events_have_the_documented_shape(server: Server) -> None:
    *pieces, last, done = server.streamed("/api/generate", {"model": "recital", "prompt": ":"})
    assert all(set(piece) == {"choices"} and piece["choices"][0]["index"] == 0 for piece in pieces)
    assert joined(pieces) == "Hello wide world"
    (choice,) = last["choices"]
    assert (choice["text"], choice["finish_reason"], last["usage"]["prompt_tokens"]) == ("", "stop", 2)
    assert done == "[DONE]"
    body = {"model": "recital", "prompt": ":", "stream": True}
    text = server.post("/api/generate", body).body.decode()
    assert text.endswith("data: [DONE]\n\n") and "\r" not in text
    assert all(block.startswith(("data: ", ":")) and "\n" not in block for block in text.split("\n\n")[:-1])


def test_chat_has_openais_shape_plain_and_streamed(server: Server) -> None:
    document = server.chat().json()
    assert document["object"] == "chat.completion" and document["id"].startswith("chatcmpl-")
    assert abs(document["created"] - time.time()) < 60 and document["model"]
    (choice,) = document["choices"]
    assert (choice["index"], choice["finish_reason"]) == (0, "stop")
    assert (choice["message"]["role"], choice["message"]["content"]) == ("assistant", "Hello wide world")
    assert document["usage"]["prompt_tokens"] == 1 + len("[user]hi[assistant]:")
    *chunks, done = server.streamed("/v1/chat/completions", chatting())
    assert done == "[DONE]" and {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert deltas(chunks)[0]["role"] == "assistant" and spoken_in(chunks) == "Hello wide world"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert not any("usage" in chunk for chunk in chunks)


@cases("path, body, size", {"chat": ("/v1/chat/completions", chatting(), len("[user]hi[assistant]:")),
                            "completion": ("/v1/completions", {"model": "recital", "prompt": ":"}, 1)})  # fmt: skip
def test_stream_ends_with_usage_on_request(path: str, body: dict[str, Any], size: int, server: Server) -> None:
    *chunks, last, done = server.streamed(path, {**body, "stream_options": {"include_usage": True}})
    assert done == "[DONE]" and last["choices"] == [] and chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert not any("usage" in chunk for chunk in chunks)  # strands-agents takes the first with the key for the last
    assert last["usage"]["prompt_tokens"] == 1 + size


def test_completions_response_has_openai_shape(server: Server) -> None:
    document = server.post("/v1/completions", {"model": "recital", "prompt": "Say :"}).json()
    assert document["object"] == "text_completion" and document["id"].startswith("cmpl-") and document["created"]
    (choice,) = document["choices"]
    assert (choice["text"], choice["index"], choice["finish_reason"]) == ("Hello wide world", 0, "stop")
    assert choice["logprobs"] is None and document["usage"]["prompt_tokens"] == 6
    body = {"model": "recital", "prompt": ["Say :", ":"], "logprobs": 0}
    offsets = [c["logprobs"]["text_offset"] for c in server.post("/v1/completions", body).json()["choices"]]
    assert [each[:2] for each in offsets] == [[5, 10], [1, 6]]  # Hello, wide, from the prompts' start


def test_completions_echo_their_prompt_and_take_best_of_as_n(server: Server) -> None:
    body = {"model": "recital", "prompt": [":", "S"], "echo": True}
    texts = [c["text"] for c in server.post("/v1/completions", body).json()["choices"]]
    assert texts == [":" + TEXTS[":"], "S" + TEXTS["S"]]
    assert joined(server.streamed("/v1/completions", {**body, "prompt": ":"})) == ":" + TEXTS[":"]
    for value in (2, 16):
        body = {"model": "recital", "prompt": ":", "best_of": value}
        assert_error(server.post("/v1/completions", body), 400, "invalid_request", "best_of")
        assert server.post("/v1/completions", {**body, "n": value}).status == 200


def test_chat_response_format_holds_the_answer_to_json(tiny: Server) -> None:
    schema = {"type": "object", "properties": {"port": {"type": "integer"}}, "required": ["port"]}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    for seed in range(3):
        reply = tiny.chat("Which port?", "default", response_format=form, temperature=1, seed=seed, max_tokens=100)
        document = json.loads(reply.message["content"])
        assert set(document) == {"port"} and isinstance(document["port"], int)
    reply = tiny.chat("Which port?", "default", response_format={"type": "json_object"}, max_tokens=60)
    assert reply.message["content"].startswith("{")


@cases("grammar, said", {
    "a wrong sign": ("root := bad", 'line 1: a rule must begin here (name ::= …), not "root"'),
    "no root": ('foo ::= "a"', "there is no rule named root"),
    "an unknown rule": ('root ::= "a"\n  undefinedrule', 'line 2: the rule "undefinedrule" is used but not written'),
    "an open bracket": ('root ::= ("a"', "line 1: a bracket is not closed"),
    "a left-recursive rule": ('root ::= root "a" | "a"', 'the rule "root" is left-recursive: it begins with itself'),
})  # fmt: skip
def test_chat_grammar_that_cannot_be_read_says_why(grammar: str, said: str, server: Server) -> None:
    forged = "\x1b[31mforged line"
    error = assert_error(server.chat("hi", grammar=f"{grammar} # {forged}"), 400, "invalid_request")
    assert error["message"] == f"grammar: {said}" and error["param"] == "grammar"
    assert forged not in server.log.read_text()


def reads_grammar(grammar: str, text: str) -> bool:
    here = Automaton(module.read_gbnf(grammar)).start.read(text.encode())
    return here is not None and here.ends


@cases("grammar, text, fits", {
    "a line break in a text": ('root ::= "a\nb"', "a\nb", True),
    "a line break in a class": ("root ::= [\n]+", "\n\n", True),
    "a rule written twice": ('root ::= "a"\nroot ::= "b"', "b", True),
    "the rule that came first": ('root ::= "a"\nroot ::= "b"', "a", False),
    "a token": ('root ::= <think> "x" </think>', "<think>x</think>", True),
    "blanks within repeats": ('root ::= "a"{ 1 , 2 }', "aa", True),
    "rules that may be empty": ('root ::= a b "c"\na ::= "x"*\nb ::= a | a a', "xxc", True),
})  # fmt: skip
def test_grammar_is_read_as_llama_cpp_reads_it(grammar: str, text: str, fits: bool) -> None:
    assert reads_grammar(grammar, text) == fits


@cases("grammar, said", {
    "two numbers without a comma": ('root ::= "a"{1 2}', "cannot be read"),
    "no number": ('root ::= "a"{ }', "cannot be read"),
    "a token by its number": ("root ::= <[12]>", "tokens by number"),
    "all tokens but one": ("root ::= !<think>", "all tokens but one"),
    "a rule that begins with itself behind what may be empty": ('root ::= a a root "b"\na ::= "x"?', "left-recursive"),
    "a backslash at the end": ('root ::= "\\', "backslash"),
})  # fmt: skip
def test_grammar_that_llama_cpp_would_not_read_or_we_cannot_is_refused(grammar: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        module.read_gbnf(grammar)


def test_grammar_of_a_long_chain_of_rules_is_read_soon_and_tokens_are_named() -> None:
    rules = "\n".join(f'a{n} ::= a{n + 1} | "y" a{n + 1} a{n}' for n in range(8000))
    begun = time.thread_time()
    with TURN.limited(0.02):
        module.read_gbnf(f'root ::= a0\n{rules}\na8000 ::= "z"')
    assert time.thread_time() - begun < 0.5, "it counts its time all along"
    module.read_gbnf(f'root ::= a0\n{rules}\na8000 ::= "z"')
    assert time.thread_time() - begun < 5
    grammar = 'root ::= <think> "<b>" [<] <|end|> # <c>\n'
    assert module.token_names(grammar) == {"<think>", "<|end|>"}


def test_schema_in_vllms_words_is_alone_and_a_grammar_holds(server: Server) -> None:
    assert server.chat("hi", "dice", grammar='root ::= "yes" | "no"', temperature=1).message["content"] in ("yes", "no")
    assert_error(server.chat("hi", guided_json={}, guided_choice=["a"]), 400, "invalid_request", "json and choice")


@cases("format, word", {
    "no schema": ({"type": "json_schema"}, "schema"), "a string": ("json", "object"),
    "an empty holder": ({"type": "json_schema", "json_schema": {"name": "x"}}, "schema"),
})  # fmt: skip
def test_chat_response_format_that_is_wrong_names_it(format: Any, word: str, server: Server) -> None:
    assert_error(server.chat(response_format=format), 400, "invalid_request", "response_format", word)


FIVE = {"const": 5}


@cases("fields, contents", {
    "OpenAI's": ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": FIVE}}}, {"5"}),
    "llama-server's json_object": ({"response_format": {"type": "json_object", "schema": FIVE}}, {"5"}),
    "llama-server's json_schema": ({"response_format": {"type": "json_schema", "schema": FIVE}}, {"5"}),
    "vLLM's": ({"structured_outputs": {"json": FIVE}}, {"5"}),
    "vLLM's as text": ({"structured_outputs": {"json": json.dumps(FIVE), "choice": None}}, {"5"}),
    "vLLM's older": ({"guided_json": FIVE}, {"5"}),
    "vLLM's choice": ({"structured_outputs": {"choice": ["left", 'a "b"']}}, {"left", 'a "b"'}),
    "vLLM's older choice": ({"guided_choice": ["left", "right"]}, {"left", "right"}),
    "vLLM's grammar": ({"guided_grammar": 'root ::= "up"'}, {"up"}),
})  # fmt: skip
def test_schema_is_kept_in_each_servers_words(fields: dict[str, Any], contents: set[str], server: Server) -> None:
    assert server.chat("hi", **fields).message["content"] in contents


def test_timings_stand_where_llama_server_has_them(server: Server) -> None:
    document = server.chat("hi").json()
    names = {"cache_n", "prompt_n", "prompt_ms", "prompt_per_second", "predicted_n", "predicted_per_second"}
    assert names <= set(document["timings"]) and document["usage"]["timings"] == document["timings"]
    body = {"model": "recital", "prompt": ":", "stream_options": {"include_usage": True}}
    *_, last, _ = server.streamed("/v1/completions", body)
    assert names <= set(last["timings"])


@cases("fields", {"its newer name": {"max_completion_tokens": -1}, "its older": {"max_tokens": -1},
                  "llama-server's": {"n_predict": -1}})  # fmt: skip
def test_text_without_a_limit_goes_on_to_the_contexts_end(fields: dict[str, Any], server: Server) -> None:
    for ask in (server.chat, server.generate) if "max_tokens" in fields else (server.chat,):
        reply = ask("a" * 200, "dice", ignore_eos=True, **fields)
        assert reply.json()["usage"]["total_tokens"] == 256 and reply.finish_reason == "length"


def test_chat_takes_llama_servers_limit(server: Server) -> None:
    assert server.chat("hi", n_predict=1).json()["usage"]["completion_tokens"] == 1
    assert server.chat("hi", n_predict=1, max_tokens=2).json()["usage"]["completion_tokens"] == 2
    assert_error(server.chat("hi", n_predict=0), 400, "invalid_request", "n_predict")


def test_answer_names_the_real_model(server: Server) -> None:
    default = server.get("/api/models").json()["models"][0]["description"].rpartition(" ")[2]
    assert server.chat("hi", "default").json()["model"] == default


BUILTIN = {"type": "builtin", "name": "calculator"}


def test_chat_runs_a_builtin_tool_and_answers_with_its_result(tiny: Server) -> None:
    body = chatting("What is 4827 plus 394?", model="default", tools=[BUILTIN], temperature=0)
    reply, parts = tiny.post("/v1/chat/completions", body), deltas(tiny.streamed("/v1/chat/completions", body))
    assert "5221" in reply.message["content"]
    (result,) = reply.message["tool_results"]
    assert (result["name"], result["result"], result["error"]) == ("calculator", 5221, None)
    assert reply.finish_reason == "stop" and "tool_calls" not in reply.message
    assert [r["result"] for p in parts for r in p.get("tool_results", [])] == [5221]
    assert "5221" in "".join(p.get("content") or "" for p in parts) and not any("tool_calls" in p for p in parts)


def test_chat_with_a_builtin_tool_that_fails_or_is_not_there(server: Server) -> None:
    assert server.chat("weather", tools=[BUILTIN, {"type": "builtin", "name": "file_read"}]).status == 200
    assert_error(server.chat("hi", tools=[BUILTIN], n=2), 400, "invalid_request", "tools", "n")
    for name in ("hammer", "", None):
        error = assert_error(server.chat("hi", tools=[{"type": "builtin", "name": name}]), 400, "invalid_request", "tools")
        assert name is None or "calculator" in error["message"]
    function = {"type": "function", "function": {"name": "calculator", "parameters": {"type": "object"}}}
    assert_error(server.chat("hi", tools=[BUILTIN, function]), 400, "invalid_request", "tools", "calculator")


NAMED = {"type": "function", "function": {"name": "get_weather"}}


@cases("fields, word", {
    "an unknown word": ({"tool_choice": "maybe"}, "auto"),
    "a number": ({"tool_choice": 5}, "auto"),
    "a function without a name": ({"tool_choice": {"type": "function", "function": {}}}, "name"),
    "required without tools": ({"tools": None, "tool_choice": "required"}, "tools"),
    "a function without tools": ({"tools": None, "tool_choice": NAMED}, "get_weather"),
    "a function that is not offered": ({"tools": [ADD], "tool_choice": NAMED}, "get_weather"),
    "allowed_tools": ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "allowed_tools"),
    "an allowed tool that is not offered": (
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [
            {"type": "function", "function": {"name": "fly"}}]}}}, '"fly"'),
    "a function with a grammar": ({"tool_choice": NAMED, "grammar": 'root ::= "a"'}, "grammar"),
})  # fmt: skip
def test_tool_choice_that_cannot_be_kept_is_400(fields: dict[str, Any], word: str, server: Server) -> None:
    error = assert_error(server.chat("weather?", **{"tools": [WEATHER], **fields}), 400, "invalid_request", word)
    assert error["param"].startswith("tool_choice")


@cases("choice", {"required": "required", "a function": NAMED})
def test_forced_call_wins_over_a_format(choice: Any, server: Server) -> None:
    """As LangChain, the AI SDK and openai-agents send it."""
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": 5}}}
    reply = server.chat("hi", tools=[WEATHER], tool_choice=choice, response_format=schema, max_tokens=100)
    assert {call["function"]["name"] for call in reply.message["tool_calls"]} == {"get_weather"}


@pytest.mark.parametrize("mode", ["required", "auto"])
def test_allowed_tools_narrow_what_is_offered(mode: str, server: Server) -> None:
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [NAMED]}}
    reply = server.chat("weather?", tools=[ADD, WEATHER], tool_choice=choice, max_tokens=100)
    assert {call["function"]["name"] for call in reply.message["tool_calls"]} == {"get_weather"}
    assert server.chat("weather?", tools=[WEATHER]).json()["usage"]["prompt_tokens"] == reply.json()["usage"]["prompt_tokens"]


@cases("fields, names", {
    "required": ({"tool_choice": "required"}, {"get_weather", "add"}),
    "a function": ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, {"add"}),
    "one call alone": ({"tool_choice": "required", "parallel_tool_calls": False}, {"get_weather", "add"}),
    "one call alone, if any": ({"parallel_tool_calls": False}, {"get_weather", "add"}),
})  # fmt: skip
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_tool_choice_is_enforced(fields: dict[str, Any], names: set[str], temperature: float, server: Server) -> None:
    said = "weather?" if "tool_choice" not in fields else "hi"
    reply = server.chat(said, tools=[WEATHER, ADD], temperature=temperature, seed=1, max_tokens=400, **fields)
    calls = reply.message.get("tool_calls") or []
    assert len(calls) >= 1 and {call["function"]["name"] for call in calls} <= names
    assert fields.get("parallel_tool_calls") is not False or len(calls) == 1


def test_tool_choice_auto_leaves_the_choice_to_the_model(server: Server) -> None:
    for choice in ({}, {"tool_choice": None}, {"tool_choice": "auto"}):
        assert server.chat("weather?", tools=[WEATHER], **choice).message["tool_calls"]


EFFORT_TEMPLATE = "{% if enable_thinking == false %}={% elif reasoning_effort == 'high' %}|{% else %}:{% endif %}"


@cases("fields, text", {
    "absent": ({}, TEXTS[":"]),
    "null": ({"reasoning_effort": None}, TEXTS[":"]),
    "low": ({"reasoning_effort": "low"}, TEXTS[":"]),
    "high": ({"reasoning_effort": "high"}, TEXTS["|"]),
    "none turns thinking off": ({"reasoning_effort": "none"}, TEXTS["="]),
    "chat_template_kwargs win": (
        {"reasoning_effort": "none", "chat_template_kwargs": {"reasoning_effort": "high", "enable_thinking": True}},
        TEXTS["|"]),
})  # fmt: skip
def test_reasoning_effort_reaches_the_template(fields: dict[str, Any], text: str, efforts: Server) -> None:
    assert efforts.chat("hi", "effort", temperature=0, **fields).message["content"].strip() == text.strip()


efforts = serving(write=lambda folder: write_recital(folder / "effort.gguf", template=EFFORT_TEMPLATE))


@pytest.mark.parametrize("value", ["most", "", 5, True, ["low"]], ids=json.dumps)
def test_reasoning_effort_unknown_is_400(value: Any, server: Server) -> None:
    assert_error(server.chat(reasoning_effort=value), 400, "invalid_request", "reasoning_effort", "minimal", "xhigh")


def test_schema_lets_a_model_think_that_may(serve: Serve, tmp_path: Path) -> None:
    may_think = TEMPLATE + "{# enable_thinking <think> #}"  # a model that opens its thoughts itself
    write_recital(tmp_path / "models" / "thinker.gguf", template=may_think)
    own = serve("--models-dir", tmp_path / "models")
    reply = own.chat("think", "thinker", temperature=0, response_format={
        "type": "json_schema", "json_schema": {"name": "a", "schema": SHAPE}})  # fmt: skip
    assert reply.message["reasoning_content"].strip() == "two and two"
    assert json.loads(reply.message["content"]) == {"a": 1} and reply.finish_reason == "stop"


# OpenAI's own packages and those built on them. Every test has its client do what its users do, then looks at the
# client's own objects: a wrong field shows as the error that a user would see.

HELLO: list[Any] = [{"role": "user", "content": "Hello!"}]
SUM: list[Any] = [{"role": "user", "content": "What is 4827 plus 394?"}]
ANNA: list[Any] = [{"role": "user", "content": "Anna is 31."}]
LONG: list[Any] = [{"role": "user", "content": "a " * 9999}]
PERSON = {
    "type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"], "additionalProperties": False,
}  # fmt: skip
CALCULATOR: Any = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluates an arithmetic expression",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}
WITHOUT_END = {"ignore_eos": True}  # goes on to the context's end, so that there is time to leave


def calculator(expression: str) -> str:
    """Evaluates an arithmetic expression"""
    left, right = expression.split("+")
    return str(int(left) + int(right))


@pytest.fixture(scope="module")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the model in the box."""
    running = Server(tmp_path_factory.mktemp("box"), "--port", "0", "--models-dir", REPO / "models", "--model", TINY)
    running.load(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", running.host)  # most clients look for a proxy
        yield running
    running.stop()


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a real chat model of 98 MB, which `make test-models` downloads; SHIMMY_SMOLLM2 names its file."""
    file = Path(os.environ.get("SHIMMY_SMOLLM2", REPO / ".venv/clients/SmolLM2-135M-Instruct.Q4_1.gguf"))
    if not file.is_file():
        pytest.skip("SmolLM2 is not downloaded")
    running = Server(tmp_path_factory.mktemp("smol"), "--port", "0", "--models-dir", file.parent, "--model", file)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(boxed: Server) -> Iterator[openai.OpenAI]:
    with boxed.client() as client:
        yield client


def base(server: Server) -> str:
    return f"http://{server.host}:{server.port}/v1"


def settings(server: Server) -> dict[str, Any]:
    """What most packages call the same."""
    return {"base_url": base(server), "api_key": "none"}


def idle(server: Server) -> bool:
    return not server.status(TINY)["requests_running"]


def said_in(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def spoken(chunks: Any) -> list[str]:
    return [token.token for chunk in chunks if chunk.choices and chunk.choices[0].logprobs
            for token in chunk.choices[0].logprobs.content]  # fmt: skip


def run_async(work: Callable[[openai.AsyncOpenAI], Awaitable[Any]], server: Server) -> Any:
    async def run() -> Any:
        web = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with openai.AsyncOpenAI(**settings(server), http_client=web) as client:
            return await work(client)

    return asyncio.run(run())


FORMS = {  # the names of openai's types: this file is also run where that is not imported
    "chat": ("/v1/chat/completions", "chat.ChatCompletion"),
    "completion": ("/v1/completions", "Completion"),
    "streamed chat": ("/v1/chat/completions", "chat.ChatCompletionChunk"),
    "streamed completion": ("/v1/completions", "Completion"),
}
STRICT_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("chat", {"messages": HELLO}),
    "a chat of three choices": ("chat", {"messages": HELLO, "n": 3}),
    "a chat with logprobs": ("chat", {"messages": HELLO, "logprobs": True, "top_logprobs": 2}),
    "a tool call": ("chat", {"messages": SUM, "tools": [CALCULATOR], "temperature": 0}),
    "a cut chat": ("chat", {"messages": HELLO, "max_tokens": 1}),
    "a completion": ("completion", {"prompt": "Once"}),
    "completions with logprobs": ("completion", {"prompt": ["Once", "upon"], "n": 2, "logprobs": 2}),
}


def check_answer_form(kind: str, fields: dict[str, Any], server: Server) -> None:
    """Asserts that an answer is of OpenAI's type, with nothing converted."""
    path, form = FORMS[kind][0], operator.attrgetter(FORMS[kind][1])(openai.types)
    form.model_validate_json(server.post(path, {"max_tokens": 30, **fields}).body, strict=True)


@cases("kind,fields", STRICT_CASES)
def test_answer_validates_strictly_against_openais_types(kind: str, fields: dict[str, Any], boxed: Server) -> None:
    check_answer_form(kind, fields, boxed)


def test_answer_holds_every_field_that_openai_requires(boxed: Server) -> None:
    (choice,) = boxed.chat("Hello!", TINY).json()["choices"]
    assert set(choice) == {"index", "message", "finish_reason", "logprobs"}
    assert set(choice["message"]) == {"role", "content", "refusal"} and choice["message"]["refusal"] is None
    body = {"messages": HELLO, "stream": True}
    first = next(iter(deltas(boxed.streamed("/v1/chat/completions", body))))
    assert first == {"role": "assistant", "content": "", "refusal": None}


@cases("kind,fields", STRICT_CASES)
def test_stream_validates_strictly_against_openais_types(kind: str, fields: dict[str, Any], boxed: Server) -> None:
    path, name = FORMS[f"streamed {kind}"]
    form = operator.attrgetter(name)(openai.types)
    body = {"max_tokens": 30, "stream_options": {"include_usage": True}, **fields}
    *chunks, done = boxed.streamed(path, body)
    for chunk in chunks:
        usage, absent = chunk.pop("usage", None), {} if kind == "chat" else {"finish_reason": "stop"}  # null until the end there
        assert (usage is None) == bool(chunk["choices"])
        chunk["choices"] = [{**c, **({} if c["finish_reason"] else absent)} for c in chunk["choices"]]
        form.model_validate_json(json.dumps(chunk), strict=True)
    assert done == "[DONE]"


@cases("fields", {
    "metadata": {"metadata": {"a": "b"}}, "modalities": {"modalities": ["text"]}, "store": {"store": True},
    "reasoning_effort": {"reasoning_effort": "low"}, "service_tier": {"service_tier": "auto"}, "user": {"user": "u"},
    "safety_identifier": {"safety_identifier": "s"}, "verbosity": {"verbosity": "low"},
    "prompt_cache_key": {"prompt_cache_key": "k"}, "parallel_tool_calls": {"parallel_tool_calls": True},
    "max_completion_tokens": {"max_completion_tokens": 3}, "logit_bias": {"logit_bias": {"5": -100}},
    "no tools": {"tools": [], "tool_choice": "none"}, "tool_choice auto": {"tools": [CALCULATOR], "tool_choice": "auto"},
    "penalties": {"frequency_penalty": 0.5, "presence_penalty": -0.5, "top_p": 0.9},
    "extras": {"extra_body": {"top_k": 5, "min_p": 0.1, "repeat_penalty": 1.1}},
})  # fmt: skip
def test_openai_client_may_send(fields: dict[str, Any], client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=TINY, messages=HELLO, **{"max_tokens": 3, **fields})
    assert answer.choices[0].message.role == "assistant"


@cases("messages", {
    "developer": [{"role": "developer", "content": "Be brief."}, *HELLO],
    "parts": [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *HELLO],
    "every field of an answer": [*HELLO, {"role": "assistant", "content": "Hi", "refusal": None, "annotations": [], "audio": None,
                                 "function_call": None, "tool_calls": None}, *HELLO],
    "a call without content": [*SUM, {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": {
        "name": "calculator", "arguments": ""}}]}, {"role": "tool", "tool_call_id": "a", "content": ""}],
    "a broken call": [*SUM, {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function",
        "function": {"name": "calculator", "arguments": "{broken"}}]}, {"role": "tool", "tool_call_id": "a", "content": "no"}],
    "no text": [{"role": "user", "content": ""}],
    "two users": [*HELLO, *HELLO],
    "a named user": [{"role": "user", "name": "anna", "content": "Hi"}],
    "a refusal": [*HELLO, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, *HELLO],
})  # fmt: skip
def test_openai_client_may_send_a_history_with(messages: list[Any], client: openai.OpenAI) -> None:
    assert client.chat.completions.create(model=TINY, messages=messages, max_tokens=3).choices


def test_openai_client_usage_is_null_until_the_last_chunk(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    stream = client.chat.completions.create(model=TINY, messages=HELLO, stream=True, stream_options=options)
    *chunks, last = stream
    assert last.usage and last.usage.completion_tokens and not last.choices
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


@streamed_and_plain
def test_openai_client_calls_a_tool_and_sends_its_result_back(stream: bool, client: openai.OpenAI) -> None:
    def ask(messages: list[Any]) -> Any:
        fields: dict[str, Any] = {"model": TINY, "messages": messages, "tools": [CALCULATOR], "temperature": 0}
        if not stream:
            return client.chat.completions.create(**fields).choices[0]
        with client.chat.completions.stream(**fields) as events:
            return events.get_final_completion().choices[0]

    first = ask(SUM)
    (call,) = first.message.tool_calls
    assert first.finish_reason == "tool_calls" and not first.message.content
    result = {"role": "tool", "tool_call_id": call.id, "content": calculator(**json.loads(call.function.arguments))}
    last = ask([*SUM, first.message, result])
    assert "5221" in last.message.content and last.finish_reason == "stop"


def test_openai_client_streams_n_choices(client: openai.OpenAI) -> None:
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(model=TINY, messages=HELLO, n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert all(texts)


def test_openai_client_gets_the_same_text_for_the_same_seed_and_up_to_a_stop_string(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": TINY, "messages": HELLO}
    first, second = (client.chat.completions.create(**fields, temperature=1.5, seed=7).choices[0] for _ in range(2))
    assert first.message.content == second.message.content
    answer = client.chat.completions.create(**fields, temperature=0, stop=["How", "zebra"])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hello! ", "stop")


@streamed_and_plain
def test_openai_client_reads_logprobs_that_join_to_the_text(stream: bool, client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": TINY, "messages": HELLO, "logprobs": True, "top_logprobs": 3}
    if stream:
        chunks = list(client.chat.completions.create(**fields, stream=True))
        assert "".join(spoken(chunks)) == said_in(chunks) != ""
        assert all(chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].delta.content)
        return
    choice = client.chat.completions.create(**fields).choices[0]
    assert choice.logprobs and choice.logprobs.content
    assert b"".join(bytes(token.bytes or ()) for token in choice.logprobs.content).decode() == choice.message.content
    assert all(len(token.top_logprobs) == 3 for token in choice.logprobs.content)


def test_openai_client_reads_no_logprobs_of_a_stop_string_or_a_tool_call(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": TINY, "messages": HELLO, "temperature": 0, "logprobs": True}
    choice = client.chat.completions.create(**fields, stop=" can").choices[0]
    assert choice.message.content == "Hello! How" and choice.logprobs and choice.logprobs.content
    assert "".join(token.token for token in choice.logprobs.content) == "Hello! How"
    choice = client.chat.completions.create(
        model=TINY, messages=SUM, tools=[CALCULATOR], temperature=0, logprobs=True).choices[0]  # fmt: skip
    assert choice.message.content is None and not (choice.logprobs and choice.logprobs.content)


def test_openai_client_reads_an_object_in_json_mode(client: openai.OpenAI) -> None:
    ask: Any = [{"role": "user", "content": "Give me a JSON object with a name."}]
    answer = client.chat.completions.create(
        model=TINY, messages=ask, response_format={"type": "json_object"}, temperature=0)  # fmt: skip
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


@streamed_and_plain
def test_openai_client_parses_a_pydantic_model(stream: bool, client: openai.OpenAI) -> None:
    person = person_model()
    fields: dict[str, Any] = {"model": TINY, "messages": ANNA, "response_format": person, "temperature": 0, "max_tokens": 200}
    if stream:
        with client.chat.completions.stream(**fields) as events:
            parsed = events.get_final_completion().choices[0].message.parsed
    else:
        parsed = client.chat.completions.parse(**fields).choices[0].message.parsed
    assert parsed == person(name="Anna", age=31)


def test_openai_client_gets_a_tool_call_beside_a_schema(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
    answer = client.chat.completions.create(
        model=TINY, messages=SUM, tools=[CALCULATOR], response_format=form, temperature=0, max_tokens=100)  # fmt: skip
    assert answer.choices[0].message.tool_calls


@pytest.mark.parametrize("limit", [8, 16, 20])  # before the name is there it may be text that only looks like a call
def test_openai_client_sees_no_marker_of_a_cut_call(limit: int, client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": TINY, "messages": SUM, "tools": [CALCULATOR], "temperature": 0}
    choice = client.chat.completions.create(**fields, max_tokens=limit).choices[0]
    assert choice.finish_reason == "length" and "<tool_call>" not in (choice.message.content or "")


@cases("error,status,code,fields", {
    "an unknown model": ("NotFoundError", 404, "model_not_found", {"model": "nonesuch"}),
    "a long prompt": ("BadRequestError", 400, "context_length_exceeded", {"messages": LONG}),
    "a wrong field": ("BadRequestError", 400, "invalid_request", {"temperature": 9}),
    "no messages": ("BadRequestError", 400, "invalid_request", {"messages": []}),
    "an image": ("BadRequestError", 400, "invalid_request", {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:,"}}]}]}),
})  # fmt: skip
@streamed_and_plain
def test_openai_client_raises(
    stream: bool, error: str, status: int, code: str, fields: dict[str, Any], client: openai.OpenAI
) -> None:
    with pytest.raises(getattr(openai, error)) as caught:
        client.chat.completions.create(**{"model": TINY, "messages": HELLO, "stream": stream, **fields})
    assert (caught.value.status_code, caught.value.code) == (status, code)


def test_openai_client_shows_both_lengths_of_a_long_prompt(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=TINY, prompt=[5] * 3000)
    assert isinstance(caught.value.body, dict)
    assert "3000 tokens" in caught.value.body["message"] and "2048" in caught.value.body["message"]


def test_openai_client_shows_what_was_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(model=TINY, prompt="a cat")
    assert isinstance(caught.value.body, dict) and "/v1/images/generations" in caught.value.body["message"]


def test_openai_client_without_the_key_is_not_let_in(guarded: Server) -> None:
    with guarded.client() as client, pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "unauthorized" and isinstance(caught.value.body, dict)
    assert "Bearer" in caught.value.body["message"]


def test_openai_client_raises_when_a_stream_breaks_off(boxed: Server, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model=TINY, messages=HELLO, n=16, stream=True, extra_body=WITHOUT_END)
    with pytest.raises(openai.APIError) as caught:
        for _ in stream:
            threading.Thread(target=boxed.unload, args=(TINY, "?force=true")).start()
            list(stream)
    assert caught.value.code == "generation_failed" and "unloaded" in caught.value.message


def test_openai_client_that_leaves_or_times_out_stops_the_engine(boxed: Server, client: openai.OpenAI) -> None:
    with client.chat.completions.create(model=TINY, messages=HELLO, stream=True, extra_body=WITHOUT_END) as stream:
        next(stream)
    eventually(lambda: idle(boxed), "the engine to be idle")
    hurried = client.with_options(timeout=0.05, max_retries=0)
    with pytest.raises(openai.APITimeoutError):
        hurried.chat.completions.create(model=TINY, messages=HELLO, n=16, extra_body=WITHOUT_END)
    eventually(lambda: idle(boxed), "the engine to be idle")


def test_openai_client_lists_and_retrieves_models(client: openai.OpenAI) -> None:
    assert TINY in [model.id for model in client.models.list()]
    model = client.models.retrieve(TINY)
    assert (model.id, model.object, client.models.retrieve("default").id) == (TINY, "model", TINY)


def test_openai_client_completes_prompts_with_logprobs_and_echoes_them(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=TINY, prompt=["Once", "upon"], n=2, max_tokens=5, logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice in answer.choices:
        assert choice.logprobs and choice.logprobs.tokens and "".join(choice.logprobs.tokens) == choice.text
    answer = client.completions.create(model=TINY, prompt="Once upon", echo=True, max_tokens=3)
    assert answer.choices[0].text.startswith("Once upon") and len(answer.choices[0].text) > len("Once upon")


def test_async_openai_client_asks_eight_at_once(boxed: Server) -> None:
    async def one(client: openai.AsyncOpenAI) -> str | None:
        answer = await client.chat.completions.create(model=TINY, messages=HELLO, temperature=0)
        return answer.choices[0].message.content

    async def eight(client: openai.AsyncOpenAI) -> list[str | None]:
        return await asyncio.gather(*[one(client) for _ in range(8)])

    assert set(run_async(eight, boxed)) == {"Hello! How can I help you?"}


def test_async_openai_client_cancels_and_the_engine_stops(boxed: Server) -> None:
    async def cancel(client: openai.AsyncOpenAI) -> None:
        asking = client.chat.completions.create(model=TINY, messages=HELLO, n=16, extra_body=WITHOUT_END)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asking, 0.05)

    run_async(cancel, boxed)
    eventually(lambda: idle(boxed), "the engine to be idle")


@cases("kind,fields", STRICT_CASES)
def test_real_models_answer_validates_strictly_against_openais_types(kind: str, fields: dict[str, Any], smol: Server) -> None:
    check_answer_form(kind, fields, smol)


def test_real_model_fills_a_schema(smol: Server) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
    with smol.client() as client:
        answer = client.chat.completions.create(model="default", messages=ANNA, temperature=0, response_format=form)
    assert json.loads(answer.choices[0].message.content or "") == {"name": "Anna", "age": 31}


@streamed_and_plain
def test_real_models_logprobs_join_to_a_text_of_many_bytes(stream: bool, smol: Server) -> None:
    """Emoji and Chinese take several tokens a character here; an incomplete one at the end is in the bytes alone."""
    ask: Any = [{"role": "user", "content": "Say this back to me: \U0001f60a\U0001f30dé漢字"}]
    fields: dict[str, Any] = {"model": "default", "messages": ask, "max_tokens": 40, "seed": 5, "logprobs": True}
    with smol.client() as client:
        answer: Any = client.chat.completions.create(**fields, stream=stream)
        chunks = list(answer) if stream else [answer]
    shown = [choice.logprobs.content for chunk in chunks for choice in chunk.choices if choice.logprobs]
    text = said_in(chunks) if stream else chunks[0].choices[0].message.content
    data = b"".join(bytes(token.bytes or ()) for tokens in shown for token in tokens)
    assert data.decode(errors="ignore") == text != ""


def test_real_model_gives_three_different_choices(smol: Server) -> None:
    with smol.client() as client:
        fields: dict[str, Any] = {"model": "default", "messages": HELLO, "max_tokens": 12, "temperature": 1, "n": 3}
        texts = [choice.message.content for choice in client.chat.completions.create(**fields, seed=3).choices]
    assert len(set(texts)) > 1


@pytest.mark.xfail(strict=False, reason="n choices do not always repeat: 10 of 15 times with n=3, 7 of 15 with n=8")
def test_real_model_repeats_eight_choices_for_a_seed(smol: Server) -> None:
    fields: dict[str, Any] = {"model": "default", "messages": HELLO, "max_tokens": 24, "temperature": 1, "n": 8, "seed": 3}
    with smol.client() as client:
        runs = [[c.message.content for c in client.chat.completions.create(**fields).choices] for _ in range(5)]
    assert all(run == runs[0] for run in runs)


# openai for Node

NODE = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const model = "shimmy-tiny", messages = [{ role: "user", content: "Hello!" }];
const sum = [{ role: "user", content: "What is 4827 plus 394?" }];
const parameters = { type: "object", properties: { expression: { type: "string" } }, required: ["expression"] };
const run = ({ expression }) => String(expression.split("+").reduce((a, b) => a + Number(b), 0));
const tools = [{ type: "function", function: {
  name: "calculator", description: "Evaluates an arithmetic expression", parameters, parse: JSON.parse, function: run } }];
const schema = { type: "object", properties: { name: { type: "string" } }, required: ["name"], additionalProperties: false };
const name = async (asking) => {
  try { await asking; return "no error"; } catch (e) { return e.constructor.name + " " + e.code; } };
const create = (fields, options) => client.chat.completions.create({ model, messages, ...fields }, options);
const steps = {
  plain: async () => (await create({ temperature: 0 })).choices[0].message.content,
  streamed: async () => { let text = ""; for await (const c of await create({ temperature: 0, stream: true }))
    text += c.choices[0].delta.content ?? ""; return text; },
  usage: async () => { let last; for await (const c of await create({ stream: true, stream_options: { include_usage: true } }))
    last = c; return last.choices.length === 0 && last.usage.total_tokens > 10; },
  tools: async () => (await client.chat.completions.runTools({ model, messages: sum, tools, temperature: 0 })).finalContent(),
  tools_streamed: async () =>
    (await client.chat.completions.runTools({ model, messages: sum, tools, temperature: 0, stream: true })).finalContent(),
  schema: async () => Object.keys(JSON.parse((await client.chat.completions.parse({ model, messages, temperature: 0,
    response_format: { type: "json_schema", json_schema: { name: "n", strict: true, schema } } })).choices[0].message.content)),
  choices: async () => (await client.chat.completions.stream({ model, messages, n: 3 }).finalChatCompletion()).choices.length,
  logprobs: async () => { const [c] = (await create({ logprobs: true })).choices;
    return c.logprobs.content.map((t) => t.token).join("") === c.message.content; },
  cut: async () => (await client.chat.completions.stream({ model, messages, max_tokens: 1 }).finalChatCompletion())
    .choices[0].finish_reason,
  unknown: () => name(create({ model: "nonesuch" })),
  wrong: () => name(create({ temperature: 9, stream: true })),
  aborted: () => name(create({ n: 16, ignore_eos: true }, { signal: AbortSignal.timeout(50) })),
  hurried: () => name(create({ n: 16, ignore_eos: true }, { timeout: 50 })),
  models: async () => (await client.models.retrieve(model)).id,
};
const answers = {};
for (const [step, ask] of Object.entries(steps)) answers[step] = await ask();
console.log(JSON.stringify(answers));
"""


def test_node_client_does_what_its_users_do(boxed: Server, tmp_path: Path) -> None:
    """SHIMMY_NODE names a folder whose node_modules hold openai: `npm install --prefix FOLDER openai`."""
    folder = Path(os.environ.get("SHIMMY_NODE", REPO / ".venv" / "node")) / "node_modules"
    if not (folder / "openai").is_dir() or not shutil.which("node"):
        pytest.skip("openai for Node is not installed")
    (tmp_path / "node_modules").symlink_to(folder)
    (tmp_path / "client.mjs").write_text(NODE)
    done = subprocess.run(["node", "client.mjs", base(boxed)], cwd=tmp_path, capture_output=True, timeout=HANG, check=False)
    assert done.returncode == 0, done.stderr.decode()
    hello = "Hello! How can I help you?"
    assert json.loads(done.stdout) == {
        "plain": hello, "streamed": hello, "usage": True, "tools": "4827 + 394 = 5221.", "tools_streamed": "4827 + 394 = 5221.",
        "schema": ["name"], "choices": 3, "logprobs": True, "cut": "length", "unknown": "NotFoundError model_not_found",
        "wrong": "BadRequestError invalid_request", "aborted": "APIUserAbortError undefined",
        "hurried": "APIConnectionTimeoutError undefined", "models": TINY,
    }  # fmt: skip
    eventually(lambda: idle(boxed), "the engine to be idle")


# Packages built on openai


def person_model() -> Any:
    return pytest.importorskip("pydantic").create_model("Person", name=(str, ...), age=(int, ...))


def langchain(server: Server, **fields: Any) -> Any:
    return pytest.importorskip("langchain_openai").ChatOpenAI(model=TINY, max_retries=0, **settings(server), **fields)


def strands_says(server: Server) -> str:
    """Its model for llama.cpp takes the first chunk that has a usage for the last."""
    models = pytest.importorskip("strands.models.llamacpp")
    model = models.LlamaCppModel(base_url=f"http://127.0.0.1:{server.port}", model_id=TINY, params={"temperature": 0})
    return str(pytest.importorskip("strands").Agent(model=model, callback_handler=None)("Hello!")).strip()


def langchain_ollama_says(server: Server) -> str:
    package = pytest.importorskip("langchain_ollama")
    where = {"model": TINY, "base_url": f"http://127.0.0.1:{server.port}"}
    assert len(package.OllamaEmbeddings(**where).embed_documents(["a", "b"])) == 2
    return package.ChatOllama(**where, temperature=0).invoke("Hello!").content


def smolagents_says(server: Server) -> str:
    model = pytest.importorskip("smolagents").OpenAIServerModel(
        model_id=TINY, api_base=f"http://127.0.0.1:{server.port}/v1", api_key="none", temperature=0)  # fmt: skip
    return model([{"role": "user", "content": [{"type": "text", "text": "Hello!"}]}]).content


def chatlas_says(server: Server) -> str:
    chat = pytest.importorskip("chatlas").ChatOpenAICompletions(
        model=TINY, base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")  # fmt: skip
    chat.set_model_params(temperature=0)
    return str(chat.chat("Hello!", echo="none"))


def agno_says(server: Server) -> str:
    model = pytest.importorskip("agno.models.openai.like").OpenAILike(
        id=TINY, base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", temperature=0)  # fmt: skip
    return pytest.importorskip("agno.agent").Agent(model=model).run("Hello!").content


@cases("says", {"strands": strands_says, "langchain-ollama": langchain_ollama_says, "smolagents": smolagents_says,
                "chatlas": chatlas_says, "agno": agno_says})  # fmt: skip
def test_client_library_chats(says: Callable[[Server], str], boxed: Server) -> None:
    assert says(boxed) == "Hello! How can I help you?"


def test_langchain_completes_and_streams_with_usage(boxed: Server) -> None:
    llm = pytest.importorskip("langchain_openai").OpenAI(model=TINY, max_tokens=2, max_retries=0, **settings(boxed))
    assert len(llm.generate(["Once"] * 20).generations) == 20
    llm = pytest.importorskip("langchain_openai").OpenAI(model=TINY, max_tokens=5, **settings(boxed))
    assert llm.invoke("Once upon") and "".join(llm.stream("Once upon"))
    whole = functools.reduce(operator.add, langchain(boxed, temperature=0, stream_usage=True).stream("Hello!"))
    assert whole.content == "Hello! How can I help you?" and whole.usage_metadata["output_tokens"] > 3


@streamed_and_plain
def test_langchain_calls_a_tool_and_sends_its_result_back(stream: bool, boxed: Server) -> None:
    llm = langchain(boxed, temperature=0, streaming=stream)
    tool = pytest.importorskip("langchain_core.tools").tool(calculator)
    agent = pytest.importorskip("langchain.agents").create_agent(llm, tools=[tool])
    messages = agent.invoke({"messages": SUM})["messages"]
    assert [message.type for message in messages] == ["human", "ai", "tool", "ai"] and "5221" in messages[-1].content


def test_langchain_reads_structured_output_and_recognises_a_prompt_that_is_too_long(boxed: Server) -> None:
    person = person_model()
    assert langchain(boxed, temperature=0).with_structured_output(person).invoke("Anna is 31.") == person(name="Anna", age=31)
    exceptions = pytest.importorskip("langchain_core.exceptions")
    with pytest.raises(exceptions.ContextOverflowError):
        langchain(boxed).invoke("a " * 9999)


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it fetches its price list
    return pytest.importorskip("litellm")


def lite(litellm: Any, server: Server, messages: list[Any], **fields: Any) -> Any:
    known = {"model": f"openai/{TINY}", "api_base": base(server), "api_key": "none", "num_retries": 0, "timeout": HANG}
    return litellm.completion(messages=messages, **{**known, **fields})


@streamed_and_plain
def test_litellm_calls_a_tool_and_sends_its_result_back(stream: bool, boxed: Server, litellm: Any) -> None:
    def ask(messages: list[Any]) -> Any:
        answer = lite(litellm, boxed, messages, tools=[CALCULATOR], temperature=0, stream=stream)
        return (litellm.stream_chunk_builder(list(answer)) if stream else answer).choices[0].message

    first = ask(SUM)
    (call,) = first.tool_calls
    last = ask([*SUM, first, {"role": "tool", "tool_call_id": call.id, "content": "5221"}])
    assert json.loads(call.function.arguments) == {"expression": "4827 + 394"} and "5221" in last.content


def test_litellm_reads_structured_output(boxed: Server, litellm: Any) -> None:
    person = person_model()
    text = lite(litellm, boxed, ANNA, response_format=person, temperature=0).choices[0].message.content
    assert person.model_validate_json(text) == person(name="Anna", age=31)


def test_litellm_raises_its_own_errors(boxed: Server, litellm: Any) -> None:
    with pytest.raises(litellm.NotFoundError):
        lite(litellm, boxed, HELLO, model="openai/nonesuch")
    with pytest.raises(litellm.BadRequestError):
        lite(litellm, boxed, HELLO, temperature=9)
    with pytest.raises(litellm.ContextWindowExceededError):
        lite(litellm, boxed, LONG)


@pytest.mark.parametrize("mode", ["JSON_SCHEMA", "JSON"])
def test_instructor_reads_a_model(mode: str, boxed: Server, client: openai.OpenAI) -> None:
    instructor, person = pytest.importorskip("instructor"), person_model()
    asking = instructor.from_openai(client, mode=instructor.Mode[mode]).chat.completions.create
    answer = asking(model=TINY, messages=ANNA, response_model=person, temperature=0, max_tokens=200)
    assert (answer.name, answer.age) == ("Anna", 31)


def test_instructor_streams_a_partial_model(boxed: Server, client: openai.OpenAI) -> None:
    instructor, person = pytest.importorskip("instructor"), person_model()
    asking = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA).chat.completions.create_partial
    *_, last = asking(model=TINY, messages=ANNA, response_model=person, temperature=0, max_tokens=200)
    assert (last.name, last.age) == ("Anna", 31)


@pytest.fixture
def pydantic_agent(boxed: Server) -> Callable[..., Any]:
    pydantic_ai = pytest.importorskip("pydantic_ai")
    models, providers = (pytest.importorskip(f"pydantic_ai.{name}.openai") for name in ("models", "providers"))

    def agent(**fields: Any) -> Any:
        model = models.OpenAIChatModel(TINY, provider=providers.OpenAIProvider(**settings(boxed)))
        return pydantic_ai.Agent(model, **{"model_settings": {"temperature": 0}, **fields})

    return agent


def test_pydantic_ai_calls_a_tool_and_streams_one(pydantic_agent: Callable[..., Any]) -> None:
    result = asyncio.run(pydantic_agent(tools=[calculator]).run("What is 4827 plus 394?"))
    assert "5221" in result.output
    assert asyncio.run(pydantic_agent().run("Thanks", message_history=result.all_messages())).output
    async def ask() -> str:
        async with pydantic_agent(tools=[calculator]).run_stream("What is 4827 plus 394?") as result:
            return "".join([text async for text in result.stream_text(delta=True)])

    assert "5221" in asyncio.run(ask())


def test_pydantic_ai_reads_structured_output_logprobs_and_length(pydantic_agent: Callable[..., Any]) -> None:
    person, native = person_model(), pytest.importorskip("pydantic_ai").NativeOutput
    assert asyncio.run(pydantic_agent(output_type=native(person)).run("Anna is 31.")).output == person(name="Anna", age=31)
    options = {"openai_logprobs": True, "openai_top_logprobs": 2, "max_tokens": 2, "seed": 1, "stop_sequences": ["zebra"]}
    response = asyncio.run(pydantic_agent(model_settings=options).run("Hello!")).all_messages()[-1]
    assert response.finish_reason == "length" and len(response.provider_details["logprobs"]) == 2


@pytest.fixture
def openai_agent(boxed: Server) -> Callable[..., Any]:
    agents = pytest.importorskip("agents")
    agents.set_tracing_disabled(True)

    def agent(**fields: Any) -> Any:
        model = agents.OpenAIChatCompletionsModel(TINY, openai_client=openai.AsyncOpenAI(**settings(boxed), max_retries=0))
        return agents.Agent(name="tiny", model=model, model_settings=agents.ModelSettings(temperature=0), **fields)

    return agent


@streamed_and_plain
def test_openai_agents_calls_a_tool_and_sends_its_result_back(stream: bool, openai_agent: Callable[..., Any]) -> None:
    agents = pytest.importorskip("agents")
    agent = openai_agent(tools=[agents.function_tool(calculator)])

    async def ask() -> str:
        if not stream:
            return (await agents.Runner.run(agent, SUM)).final_output
        run = agents.Runner.run_streamed(agent, SUM)
        kinds = {event.type async for event in run.stream_events()}
        assert "raw_response_event" in kinds
        return run.final_output

    assert "5221" in asyncio.run(ask())


def test_openai_agents_reads_structured_output_also_behind_a_tool(openai_agent: Callable[..., Any]) -> None:
    agents, person = pytest.importorskip("agents"), person_model()
    result = asyncio.run(agents.Runner.run(openai_agent(output_type=person), ANNA))
    assert result.final_output == person(name="Anna", age=31)
    agents = pytest.importorskip("agents")
    result = asyncio.run(
        agents.Runner.run(openai_agent(output_type=person_model(), tools=[agents.function_tool(calculator)]), SUM))  # fmt: skip
    assert "ToolCallItem" in [type(item).__name__ for item in result.new_items]


def llama_index(server: Server, **fields: Any) -> Any:
    like = pytest.importorskip("llama_index.llms.openai_like").OpenAILike
    known = {"model": TINY, "api_base": base(server), "api_key": "none", "is_chat_model": True, "context_window": 2048}
    return like(**{**known, "is_function_calling_model": True, "temperature": 0, "max_tokens": 60, "max_retries": 0, **fields})


def test_llama_index_calls_a_tool_streams_and_completes(boxed: Server) -> None:
    tools = pytest.importorskip("llama_index.core.tools")
    workflow = pytest.importorskip("llama_index.core.agent.workflow")

    async def ask() -> str:
        tool = tools.FunctionTool.from_defaults(calculator)
        return str(await workflow.FunctionAgent(tools=[tool], llm=llama_index(boxed)).run(SUM[0]["content"]))

    assert "5221" in asyncio.run(ask())
    llm = llama_index(boxed)
    assert llm.complete("Hello!").text == "".join(c.delta or "" for c in llm.stream_complete("Hello!"))
    assert llama_index(boxed, is_chat_model=False, max_tokens=5).complete("Once upon").text


LLM_MODELS = """\
- model_id: tiny
  model_name: shimmy-tiny
  api_base: "{base}"
  supports_tools: true
  supports_schema: true
- model_id: nonesuch
  model_name: nonesuch
  api_base: "{base}"
"""


def llm(server: Server, home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs simonw's llm with a user folder of its own."""
    pytest.importorskip("llm")
    (home / "extra-openai-models.yaml").write_text(LLM_MODELS.format(base=base(server)))
    (home / "tools.py").write_text(inspect.getsource(calculator))
    env = {**os.environ, "LLM_USER_PATH": str(home), "OPENAI_API_KEY": "none"}
    return subprocess.run([sys.executable, "-m", "llm", *args], cwd=home, env=env, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=HANG, check=False)  # fmt: skip


@cases("args,answer", {
    "streamed": (("Hello!", "-o", "temperature", "0"), "Hello! How can I help you?"),
    "plain": (("Hello!", "-o", "temperature", "0", "--no-stream"), "Hello! How can I help you?"),
    "with a tool": (("What is 4827 plus 394?", "--functions", "tools.py", "-o", "temperature", "0"), "4827 + 394 = 5221."),
    "with a schema": (("Anna is 31.", "--schema", "name, age int", "-o", "temperature", "0"), '{"name": "Anna", "age": 31}'),
})  # fmt: skip
def test_llm_answers(args: tuple[str, ...], answer: str, boxed: Server, tmp_path: Path) -> None:
    done = llm(boxed, tmp_path, "-m", "tiny", *args)
    assert done.stdout.strip() == answer, done.stderr


def test_llm_shows_the_servers_error(boxed: Server, tmp_path: Path) -> None:
    done = llm(boxed, tmp_path, "-m", "nonesuch", "Hello!")
    assert done.returncode == 1 and "Model 'nonesuch' is not available" in done.stderr


WEATHER_FUNCTION: Any = WEATHER["function"]
CLAUDE_WEATHER = {"name": "get_weather", "input_schema": WEATHER_FUNCTION["parameters"],
                  "description": WEATHER_FUNCTION["description"]}  # fmt: skip
RESPONSE_WEATHER = {"type": "function", **WEATHER_FUNCTION}
CITY = {"city": "Paris"}


def write_thoughtful(folder: Path) -> None:
    """The model in the box, and one whose prompts hold thoughts as text."""
    template = "{% for m in messages %}[{{ m.role }}]{{ m.reasoning_content or '' }}|{{ m.content }}{% endfor %}:"
    write_recital(folder / "thoughtful.gguf", template=template)
    shutil.copy(REPO / "models" / f"{TINY}.gguf", folder)


boxed_alias = serving(write=write_thoughtful)


def claude(content: Any = "hi", **fields: Any) -> dict[str, Any]:
    """A body for /v1/messages."""
    return {"model": "recital", "max_tokens": 50, "messages": [{"role": "user", "content": content}], **fields}


def respond(given: Any = "hi", **fields: Any) -> dict[str, Any]:
    """A body for /v1/responses."""
    return {"model": "recital", "input": given, **fields}


def named(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """A stream's documents; each event is named as its document says, and nothing else is sent."""
    reply = server.post(path, {**body, "stream": True})
    assert reply.status == 200 and reply.headers["Content-Type"].startswith("text/event-stream"), reply.body
    found = []
    for event in reply.body.decode().removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def prompt_tokens(server: Server, *messages: dict[str, Any], **fields: Any) -> int:
    """How long the same conversation's prompt is for OpenAI's chat route."""
    body = {"model": "recital", "messages": messages, "max_tokens": 1, **fields}
    return server.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens"]


# Anthropic's Messages


def test_messages_answer_has_anthropics_shape(server: Server) -> None:
    reply = server.post("/v1/messages?beta=true", claude()).json()
    assert re.fullmatch("msg_[0-9a-f]{24}", reply.pop("id"))
    usage = reply.pop("usage")
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == prompt_tokens(server, {"role": "user", "content": "hi"})
    assert usage["output_tokens"] == 3 and usage["cache_creation_input_tokens"] == 0
    assert reply == {"type": "message", "role": "assistant", "model": "recital", "stop_reason": "end_turn",
                     "stop_sequence": None, "content": [{"type": "text", "text": TEXTS[":"]}]}  # fmt: skip


def test_messages_stream_sends_its_events_in_order(server: Server) -> None:
    first, *rest, before, last = named(server, "/v1/messages", claude())
    assert first["type"] == "message_start" and first["message"]["content"] == []
    assert first["message"]["usage"]["input_tokens"] > 0
    assert rest[0] == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    assert rest[-1] == {"type": "content_block_stop", "index": 0}
    assert all(d["type"] == "content_block_delta" and d["delta"]["type"] == "text_delta" for d in rest[1:-1])
    assert "".join(d["delta"]["text"] for d in rest[1:-1]) == TEXTS[":"]
    assert before["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert before["usage"]["output_tokens"] == 3 and "input_tokens" in before["usage"]
    assert last == {"type": "message_stop"}


def test_messages_thought_is_a_thinking_block_before_the_text(server: Server) -> None:
    body = claude("think", thinking={"type": "enabled", "budget_tokens": 1024})
    content = server.post("/v1/messages", body).json()["content"]
    assert content == [{"type": "thinking", "thinking": "two and two\n", "signature": ""}, {"type": "text", "text": "Four!!"}]
    stream = named(server, "/v1/messages", body)
    shown = [(d["index"], d["delta"]["type"]) for d in stream if d["type"] == "content_block_delta"]
    assert [key for key, _ in itertools.groupby(shown)] == [(0, "thinking_delta"), (0, "signature_delta"), (1, "text_delta")]


def test_messages_calls_stream_their_arguments_in_blocks_with_rising_indexes(server: Server) -> None:
    stream = named(server, "/v1/messages", claude("weather", tools=[CLAUDE_WEATHER]))
    (begun,) = [d["content_block"] for d in stream if d["type"] == "content_block_start"]
    assert begun.pop("id") and begun == {"type": "tool_use", "name": "get_weather", "input": {}}
    parts = [d["delta"] for d in stream if d["type"] == "content_block_delta"]
    assert {p["type"] for p in parts} == {"input_json_delta"}
    assert json.loads("".join(p["partial_json"] for p in parts)) == CITY
    assert stream[-2]["delta"]["stop_reason"] == "tool_use"
    add = {"name": "add", "input_schema": {"type": "object", "properties": {}}}
    stream = named(server, "/v1/messages", claude("twice", tools=[add], max_tokens=100))
    begun = [(d["index"], d["content_block"]["type"]) for d in stream if d["type"] == "content_block_start"]
    assert begun == [(0, "text"), (1, "tool_use"), (2, "tool_use")]
    content = server.post("/v1/messages", claude("twice", tools=[add], max_tokens=100)).json()["content"]
    assert [b.get("input") for b in content[1:]] == [{"a": 1}, {"a": 2}] and content[0]["text"].strip() == "Both:"


def test_messages_stop_where_they_were_cut_or_at_a_sequence_that_is_named(server: Server) -> None:
    reply = server.post("/v1/messages", claude("weather", tools=[CLAUDE_WEATHER], max_tokens=5)).json()
    assert reply["stop_reason"] == "max_tokens" and reply["content"][-1]["input"] == {}
    reply = server.post("/v1/messages", claude("stopping", stop_sequences=["omega!", "STOPPSTOP"])).json()
    assert (reply["stop_reason"], reply["stop_sequence"]) == ("stop_sequence", "STOPPSTOP")
    assert reply["content"] == [{"type": "text", "text": "alpha "}]
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well:"}]
    assert server.post("/v1/messages", claude(messages=said)).json()["content"][0]["text"] == TEXTS[":"]


CLAUDE_CHATS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {  # what is sent, and the same as OpenAI's chat
    "system text": ({"system": "Be kind."}, [said("system", "Be kind."), *user("hi")]),
    "system blocks": (
        {"system": [{"type": "text", "text": "Be"}, {"type": "text", "text": "kind", "cache_control": {"type": "ephemeral"}}]},
        [said("system", "Be\n\nkind"), *user("hi")],
    ),
    "a header that changes with each request": (
        {"system": [{"type": "text", "text": "x-anthropic-billing-header: cc_version=1;"}, {"type": "text", "text": "Be"}]},
        [said("system", "Be"), *user("hi")],
    ),
    "texts": ({"messages": user([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}])}, user("one\n\ntwo")),
    "a system message in mid-conversation": (
        {"messages": [*user("a"), said("system", "b"), *user("c")]}, [*user("a"), said("system", "b"), *user("c")]),
    "blocks that only Anthropic reads": (
        {"messages": [*user("a"), {"role": "assistant", "content": [
            {"type": "redacted_thinking", "data": "x"}, {"type": "server_tool_use", "id": "1", "name": "web_search", "input": {}},
            {"type": "text", "text": "b"}]}, *user("c")]},
        [*user("a"), said("assistant", "b"), *user("c")],
    ),
    "a document": ({"messages": user([{"type": "document", "title": "T", "source": {
        "type": "text", "media_type": "text/plain", "data": "long"}}, {"type": "text", "text": "?"}])}, user("T\nlong\n\n?")),
    "fields that mean nothing here": (
        {"metadata": {"user_id": "u"}, "context_management": {"edits": []}, "service_tier": "auto",
         "thinking": {"type": "adaptive"}, "output_config": {"effort": "high"},
         "tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        user("hi"),
    ),
}  # fmt: skip


@cases("sent, same", CLAUDE_CHATS)
def test_messages_become_the_prompt_that_openais_chat_makes(sent: dict[str, Any], same: list[Any], server: Server) -> None:
    counted = server.post("/v1/messages/count_tokens", claude() | sent).json()
    assert counted == {"input_tokens": prompt_tokens(server, *same)}


RESULTS: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({"content": "sunny"}, "sunny"),
    "parts": ({"content": [{"type": "text", "text": "sun"}, {"type": "text", "text": "ny"}]}, "sun\n\nny"),
    "an error": ({"content": "no such city", "is_error": True}, "Error: no such city"),
    "nothing": ({}, ""),
    "tools that a search found": ({"content": [{"type": "tool_reference", "tool_name": "add"}]}, "add"),
}


@cases("result, text", RESULTS)
def test_messages_tool_result_becomes_a_tool_turn(result: dict[str, Any], text: str, server: Server) -> None:
    used = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": CITY}
    answered = {"type": "tool_result", "tool_use_id": "toolu_1", **result}
    said = [{"role": "user", "content": "weather"}, {"role": "assistant", "content": [{"type": "text", "text": "Well"}, used]},
            {"role": "user", "content": [answered]}]  # fmt: skip
    body = claude(messages=said, tools=[CLAUDE_WEATHER])
    call = {"id": "toolu_1", "type": "function", "function": {"name": "get_weather", "arguments": json.dumps(CITY)}}
    same: list[Any] = [said[0], {"role": "assistant", "content": "Well", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "toolu_1", "content": text}]  # fmt: skip
    counted = server.post("/v1/messages/count_tokens", body).json()["input_tokens"]
    assert counted == prompt_tokens(server, *same, tools=[WEATHER])
    assert server.post("/v1/messages", body).json()["content"][0]["text"] == TEXTS["S"]


def test_messages_thought_goes_back_into_the_prompt(boxed_alias: Server) -> None:
    thought = {"type": "thinking", "thinking": "hmm", "signature": ""}
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [thought, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "c"}]  # fmt: skip
    counted = boxed_alias.post("/v1/messages/count_tokens", claude(messages=said, model="thoughtful")).json()
    assert counted == {"input_tokens": 1 + len("[user]|a[assistant]hmm|b[user]|c:")}


def test_count_tokens_beyond_the_context_counts_on(server: Server) -> None:
    counted = server.post("/v1/messages/count_tokens", claude("a" * LONG_CTX)).json()
    assert counted == {"input_tokens": 1 + len("[user][assistant]:") + LONG_CTX}


def test_messages_headers_that_differ_reuse_the_same_prefix(server: Server) -> None:
    read = []
    for version in ("1.2.3", "4.5.6"):
        header = {"type": "text", "text": f"x-anthropic-billing-header: cc_version={version};"}
        body = claude(system=[header, {"type": "text", "text": "A system text that nobody else sends."}])
        read.append(server.post("/v1/messages", body).json()["usage"])
    assert read[1]["cache_read_input_tokens"] == read[0]["input_tokens"] + read[0]["cache_read_input_tokens"] - 1


def test_messages_tool_choice_forces_a_call_or_offers_no_tool(boxed_alias: Server, server: Server) -> None:
    ask = functools.partial(claude, "Good morning!", model="shimmy-tiny", tools=[CLAUDE_WEATHER], max_tokens=100)
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
        reply = boxed_alias.post("/v1/messages", ask(tool_choice=choice)).json()
        assert reply["stop_reason"] == "tool_use" and reply["content"][-1]["name"] == "get_weather"
        assert set(reply["content"][-1]["input"]) == {"city"}
    body = claude("weather", tools=[CLAUDE_WEATHER], tool_choice={"type": "none"})
    assert server.post("/v1/messages", body).json()["stop_reason"] == "end_turn"


PORT_SCHEMA = {"type": "object", "properties": {"port": {"type": "integer"}}, "required": ["port"], "additionalProperties": False}


def test_messages_and_responses_are_held_to_a_schema(boxed_alias: Server) -> None:
    config = {"format": {"type": "json_schema", "schema": PORT_SCHEMA}}
    reply = boxed_alias.post("/v1/messages", claude("Which port?", model="shimmy-tiny", output_config=config)).json()
    assert set(json.loads(reply["content"][0]["text"])) == {"port"}
    form = {"type": "json_schema", "name": "answer", "strict": True, "schema": PORT_SCHEMA}
    reply = boxed_alias.post("/v1/responses", respond("Which port?", model="shimmy-tiny", text={"format": form})).json()
    assert set(json.loads(reply["output"][0]["content"][0]["text"])) == {"port"}


CLAUDE_WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "messages absent": ({"messages": None}, "messages"),
    "messages no list": ({"messages": {}}, "messages"),
    "messages empty": ({"messages": []}, "messages"),
    "a message no object": ({"messages": ["hi"]}, "messages[0]"),
    "role unknown": ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    "role a list": ({"messages": [{"role": [], "content": "x"}]}, "messages[0].role"),
    "content absent": ({"messages": [{"role": "user"}]}, "messages[0].content"),
    "content a number": ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
    "a block no object": (claude(["x"]), "messages[0].content[0]"),
    "block type unknown": (claude([{"type": "sound"}]), "messages[0].content[0].type"),
    "block type an object": (claude([{"type": {}}]), "messages[0].content[0].type"),
    "an image": (claude([{"type": "image", "source": {}}]), '"image"'),
    "sound in a result": (claude([{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "sound"}]}]), '"sound"'),
    "text a number": (claude([{"type": "text", "text": 1}]), "messages[0].content[0].text"),
    "result without id": (claude([{"type": "tool_result", "content": "x"}]), "messages[0].content[0].tool_use_id"),
    "result a number": (claude([{"type": "tool_result", "tool_use_id": "1", "content": 5}]), "messages[0].content[0].content"),
    "is_error a string": (claude([{"type": "tool_result", "tool_use_id": "1", "is_error": "no"}]), "is_error"),
    "call from the user": (claude([{"type": "tool_use", "id": "1", "name": "a", "input": {}}]), "messages[0].content[0].type"),
    "document without source": (claude([{"type": "document"}]), "messages[0].content[0].source"),
    "document a PDF": (claude([{"type": "document", "source": {"type": "base64", "data": ""}}]), "\"document\""),
    "call's input text": (
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "a", "input": "{}"}]}]},
        "messages[0].content[0].input",
    ),
    "thinking a number": (
        {"messages": [{"role": "assistant", "content": [{"type": "thinking", "thinking": 7}]}]},
        "messages[0].content[0].thinking",
    ),
    "system a number": ({"system": 1}, "system"),
    "system an image": ({"system": [{"type": "image"}]}, "system[0].type"),
    "model a number": ({"model": 1}, "model"),
    "max_tokens zero": ({"max_tokens": 0}, "max_tokens"),
    "max_tokens text": ({"max_tokens": "5"}, "max_tokens"),
    "temperature beyond": ({"temperature": 9}, "temperature"),
    "top_p beyond": ({"top_p": 2}, "top_p"),
    "top_k negative": ({"top_k": -2}, "top_k"),
    "stop_sequences text": ({"stop_sequences": "x"}, "stop_sequences"),
    "stop_sequences numbers": ({"stop_sequences": [1]}, "stop_sequences"),
    "stream text": ({"stream": "yes"}, "stream"),
    "tools an empty object": ({"tools": {}}, "tools"),
    "a tool no object": ({"tools": ["x"]}, "tools[0]"),
    "tool without name": ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
    "tool without schema": ({"tools": [{"name": "a"}]}, "tools[0].input_schema"),
    "tool's description a list": ({"tools": [{**CLAUDE_WEATHER, "description": []}]}, "tools[0].description"),
    "tool type a number": ({"tools": [{**CLAUDE_WEATHER, "type": 1}]}, "tools[0].type"),
    "too many tools": ({"tools": [CLAUDE_WEATHER] * 129}, "tools"),
    "tool_choice text": ({"tool_choice": "auto"}, "tool_choice"),
    "tool_choice type unknown": ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
    "tool_choice any without tools": ({"tool_choice": {"type": "any"}}, "tool_choice"),
    "tool_choice of an unknown tool": (
        {"tools": [CLAUDE_WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name",
    ),
    "tool_choice without a name": ({"tools": [CLAUDE_WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    "disable_parallel_tool_use text": ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}}, "disable_parallel"),
    "thinking true": ({"thinking": True}, "thinking"),
    "thinking type unknown": ({"thinking": {"type": "hard"}}, "thinking.type"),
    "thinking budget zero": ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
    "output_config a list": ({"output_config": [1]}, "output_config"),
    "effort unknown": ({"output_config": {"effort": "huge"}}, "output_config.effort"),
    "format unknown": ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
    "format without schema": ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
}  # fmt: skip


@cases("fields, word", CLAUDE_WRONG)
def test_messages_wrong_field_is_400_naming_it_in_anthropics_shape(fields: dict[str, Any], word: str, server: Server) -> None:
    reply = server.post("/v1/messages", claude() | fields)
    document = reply.json()
    assert reply.status == 400 and set(document) == {"type", "error"} and document["type"] == "error", document
    assert document["error"]["type"] == "invalid_request_error" and word in document["error"]["message"], document


CLAUDE_ERRORS: dict[str, tuple[str, str, Any, int, str]] = {
    "unknown model": ("POST", "/v1/messages", claude(model="nobody"), 404, "not_found_error"),
    "no JSON": ("POST", "/v1/messages", b"{", 400, "invalid_request_error"),
    "no JSON to count": ("POST", "/v1/messages/count_tokens", b"[]", 400, "invalid_request_error"),
    "another method": ("GET", "/v1/messages", None, 405, "invalid_request_error"),
    "too large": ("POST", "/v1/messages", b" " * ((32 << 20) + 1), 413, "request_too_large"),
    "cannot be loaded": ("POST", "/v1/messages", claude(model="hollow"), 500, "api_error"),
}


@cases("method, path, body, status, kind", CLAUDE_ERRORS)
def test_messages_errors_have_anthropics_types(
    method: str, path: str, body: Any, status: int, kind: str, server: Server
) -> None:
    reply = server.request(method, path, body)
    assert (reply.status, reply.json()["type"], reply.json()["error"]["type"]) == (status, "error", kind)
    assert reply.json()["error"]["message"]


def test_messages_without_the_key_are_401_and_x_api_key_opens(guarded: Server) -> None:
    refused = guarded.post("/v1/messages", claude())
    assert (refused.status, refused.json()["error"]["type"]) == (401, "authentication_error")
    assert guarded.post("/v1/messages", claude(), **{"x-api-key": "s3cret"}).status == 200
    assert guarded.request("HEAD", "/").status == 200  # as Claude Code looks whether somebody is there


@streamed_and_plain
def test_messages_prompt_beyond_the_context_says_it_in_anthropics_words(stream: bool, server: Server) -> None:
    reply = server.post("/v1/messages", claude("a" * LONG_CTX, stream=stream))
    tokens = 1 + len("[user][assistant]:") + LONG_CTX
    assert reply.status == 400 and reply.json()["error"]["code"] == "context_length_exceeded"
    assert reply.json()["error"]["message"] == f"prompt is too long: {tokens} tokens > {LONG_CTX - 1} maximum"


def test_silence_while_a_model_loads_is_broken_in_each_dialects_way(serve: Serve, models: Path, tmp_path: Path) -> None:
    load = "        llama = Llama(load, progress)"
    script = altered(tmp_path, ("PING_SECONDS = 15.0", "PING_SECONDS = 0.2"), (load, f"        time.sleep(1.5)\n{load}"))
    server = serve("--models-dir", models, script=script)
    with ThreadPoolExecutor() as pool:
        plain = pool.submit(server.post, "/v1/completions", {"model": "recital", "prompt": ":", "stream": True})
        claudes = pool.submit(named, server, "/v1/messages", claude())
        responses = pool.submit(named, server, "/v1/responses", respond())
        ollamas = pool.submit(server.post, "/api/chat", chatting())
    assert plain.result().body.count(b": waiting\n") >= 3 and plain.result().body.endswith(b"data: [DONE]\n\n")
    pings = [d["type"] for d in claudes.result()]
    assert pings.count("ping") >= 3 and pings[-1] == "message_stop"
    kinds = [d["type"] for d in responses.result()]
    assert kinds.count("response.in_progress") >= 3 and kinds[-1] == "response.completed"
    assert kinds[0] == "response.created" and kinds.count("response.created") == 1
    assert [d["sequence_number"] for d in responses.result()] == list(range(len(kinds)))
    assert ollamas.result().body.startswith(b"   ")
    lines = map(json.loads, ollamas.result().body.splitlines())
    assert "".join(line["message"]["content"] for line in lines) == "Hello wide world"


def is_ollamas_break(last: dict[str, Any]) -> bool:
    return list(last) == ["error"] and "engine process ended" in last["error"]


BREAKS: dict[str, Callable[[dict[str, Any]], bool]] = {  # the last document of a stream that breaks off
    "messages": lambda last: (last["type"], last["error"]["code"]) == ("error", "generation_failed"),
    "responses": lambda last: (last["type"], last["response"]["error"]["code"]) == ("response.failed", "generation_failed"),
    "ollama chat": is_ollamas_break, "ollama generate": is_ollamas_break,
    "llama-server": lambda last: (last["error"]["code"], last["error"]["type"]) == (500, "server_error"),
}  # fmt: skip


@linux
def test_stream_that_breaks_off_ends_with_the_dialects_error(serve: Serve, models: Path) -> None:
    server = serve("--models-dir", models, "--ctx", str(LONG_CTX))
    for name, is_told in BREAKS.items():
        with contextlib.closing(server.connect()) as connection:
            connection.request("POST", TONGUES[name].path, encoded(TONGUES[name].body()))
            response = connection.getresponse()
            begun = b"".join(response.readline() for _ in range(20))
            os.kill(server.engine("recital.gguf"), signal.SIGKILL)
            body = begun + response.read()
        assert is_told(last_document(body)), body[-1000:]
        assert not re.search(rb"message_stop|message_delta|response\.completed", body)


# OpenAI's Responses


def test_response_has_openais_shape(server: Server) -> None:
    reply = server.post("/v1/responses", respond(instructions="Be kind.", metadata={"a": "b"})).json()
    assert (reply["object"], reply["status"], reply["model"], reply["error"]) == ("response", "completed", "recital", None)
    assert reply["instructions"] == "Be kind." and reply["metadata"] == {"a": "b"} and reply["store"] is False
    (item,) = reply["output"]
    assert item.pop("id").startswith("msg_") and reply["id"].startswith("resp_")
    part = {"type": "output_text", "text": TEXTS[":"], "annotations": [], "logprobs": []}
    assert item == {"type": "message", "role": "assistant", "status": "completed", "content": [part]}
    asked = prompt_tokens(server, {"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"})
    usage = reply["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (asked, 3, asked + 3)


def test_response_stream_sends_its_events_in_order(server: Server) -> None:
    stream = named(server, "/v1/responses", respond())
    kinds = [kind for kind, _ in itertools.groupby(d["type"].removeprefix("response.") for d in stream)]
    assert kinds == ["created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
                     "content_part.done", "output_item.done", "completed"]  # fmt: skip
    assert [d["sequence_number"] for d in stream] == list(range(len(stream)))
    (added,), (done,) = ([d["item"]["id"] for d in stream if d["type"] == f"response.output_item.{k}"] for k in ("added", "done"))
    final = stream[-1]["response"]
    assert added == done == final["output"][0]["id"] == stream[4]["item_id"] and final["usage"]["output_tokens"] == 3
    assert "".join(d["delta"] for d in stream if d["type"].endswith("delta")) == final["output"][0]["content"][0]["text"]
    assert {d["response"]["id"] for d in stream if "response" in d} == {final["id"]}


def test_response_thought_is_an_item_before_the_text_that_can_be_sent_back(server: Server, boxed_alias: Server) -> None:
    reasoning, message = server.post("/v1/responses", respond("think")).json()["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "two and two\n"}] and reasoning["summary"] == []
    assert base64.b64decode(reasoning["encrypted_content"]) == b"two and two\n"
    sealed = {"type": "reasoning", "summary": [], "encrypted_content": reasoning["encrypted_content"]}
    given = [{"role": "user", "content": "a"}, sealed, message, {"role": "user", "content": "c"}]
    usage = boxed_alias.post("/v1/responses", respond(given, model="thoughtful")).json()["usage"]
    same = [given[0], {"role": "assistant", "content": "Four!!", "reasoning_content": "two and two\n"}, given[3]]
    assert usage["input_tokens"] == prompt_tokens(boxed_alias, *same, model="thoughtful")
    stream = named(server, "/v1/responses", respond("think"))
    kinds = [kind for kind, _ in itertools.groupby(d["type"].removeprefix("response.") for d in stream)]
    assert kinds[2:8] == ["output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done",
                          "content_part.done", "output_item.done"]  # fmt: skip
    assert [d["item"]["type"] for d in stream if d["type"].endswith("item.done")] == ["reasoning", "message"]


def test_response_foreign_encrypted_content_is_left_out(boxed_alias: Server) -> None:
    sealed = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAAABo_-8="}
    given = [{"role": "user", "content": "a"}, sealed, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    usage = boxed_alias.post("/v1/responses", respond(given, model="thoughtful")).json()["usage"]
    assert usage["input_tokens"] == 1 + len("[user]|a[assistant]|b[user]|c:")


def test_response_call_streams_its_arguments(server: Server) -> None:
    stream = named(server, "/v1/responses", respond("weather", tools=[RESPONSE_WEATHER]))
    kinds = [kind for kind, _ in itertools.groupby(d["type"].removeprefix("response.") for d in stream)]
    assert kinds[2:] == ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
                         "output_item.done", "completed"]  # fmt: skip
    (call,) = stream[-1]["response"]["output"]
    assert json.loads(call["arguments"]) == CITY and call["name"] == "get_weather" and "namespace" not in call
    assert call["id"].startswith("fc_") and call["call_id"] and call["status"] == "completed"
    assert "".join(d["delta"] for d in stream if d["type"].endswith("delta")) == call["arguments"]


RESPONSE_CHATS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "developer and parts": (
        [{"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be"}]}, *user("a")],
        [said("system", "Be"), *user("a")],
    ),
    "a call and its output": (
        [*user("weather"), {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Well"}]},
         {"type": "function_call", "call_id": "1", "name": "get_weather", "arguments": '{"city": "Paris"}'},
         {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "sunny"}]}],
        [*user("weather"), said("assistant", "Well", tool_calls=[
            {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}]),
         said("tool", "sunny", tool_call_id="1")],
    ),
    "a freeform call": (
        [*user("x"), {"type": "custom_tool_call", "call_id": "1", "name": "get_weather", "input": "a\nb"},
         {"type": "custom_tool_call_output", "call_id": "1", "output": "done"}],
        [*user("x"), said("assistant", "", tool_calls=[
            {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"input": "a\\nb"}'}}]),
         said("tool", "done", tool_call_id="1")],
    ),
    "two calls in a row are one turn": (
        [*user("x"), *({"type": "function_call", "call_id": c, "name": "add", "arguments": "{}"} for c in "12"),
         *({"type": "function_call_output", "call_id": c, "output": c} for c in "12")],
        [*user("x"), said("assistant", "", tool_calls=[
            {"id": c, "type": "function", "function": {"name": "add", "arguments": "{}"}} for c in "12"]),
         *(said("tool", c, tool_call_id=c) for c in "12")],
    ),
    "what OpenAI's own tools did": (
        [*user("a"), {"type": "web_search_call", "id": "ws_1", "status": "completed"}], user("a")),
}  # fmt: skip


@cases("given, same", RESPONSE_CHATS)
def test_response_input_becomes_the_prompt_that_openais_chat_makes(given: list[Any], same: list[Any], server: Server) -> None:
    usage = server.post("/v1/responses", respond(given)).json()["usage"]
    assert usage["input_tokens"] == prompt_tokens(server, *same)


def test_response_namespaced_call_comes_back_with_name_and_namespace_apart(boxed_alias: Server) -> None:
    tools = [{"type": "namespace", "name": "mcp__sky__", "description": "The sky", "tools": [RESPONSE_WEATHER]}]
    body = respond("Paris?", model="shimmy-tiny", tools=tools, tool_choice="required", parallel_tool_calls=False)
    reply = boxed_alias.post("/v1/responses", body).json()
    (call,) = [item for item in reply["output"] if item["type"] == "function_call"]
    assert (call["namespace"], call["name"]) == ("mcp__sky__", "get_weather")
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "1"}
    sent_back = [{"role": "user", "content": "Paris?"}, call, output]
    assert boxed_alias.post("/v1/responses", {**body, "input": sent_back, "tool_choice": "none"}).status == 200


def test_response_freeform_call_comes_back_as_raw_input(boxed_alias: Server) -> None:
    tool = {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}}
    choice = {"type": "custom", "name": "apply_patch"}
    asked_for = respond("Patch it", model="shimmy-tiny", tools=[tool], tool_choice=choice, seed=1)
    stream = named(boxed_alias, "/v1/responses", asked_for)
    (call,) = [i for i in stream[-1]["response"]["output"] if i["type"] == "custom_tool_call"]
    assert call["name"] == "apply_patch" and isinstance(call["input"], str) and '"input"' not in call["input"]
    (done,) = [d for d in stream if d["type"] == "response.custom_tool_call_input.done"]
    assert (done["input"], done["item_id"]) == (call["input"], call["id"])


def test_response_tools_are_described_and_narrowed(server: Server) -> None:
    form = {"type": "grammar", "syntax": "regex", "definition": "[a-c]+"}
    tool = {"type": "custom", "name": "spell", "description": "Spells", "format": form}
    schema = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"], "additionalProperties": False}
    said = "Spells\n\nThe input must match this grammar (regex):\n[a-c]+"
    same = {"type": "function", "function": {"name": "spell", "description": said, "parameters": schema}}
    usage = server.post("/v1/responses", respond(tools=[tool])).json()["usage"]
    assert usage["input_tokens"] == prompt_tokens(server, {"role": "user", "content": "hi"}, tools=[same])
    hosted = [{"type": "web_search"}, {"type": "image_generation"}, {"type": "mcp", "server_label": "x"}]
    reply = server.post("/v1/responses", respond("weather", tools=hosted)).json()
    assert reply["usage"]["input_tokens"] == prompt_tokens(server, {"role": "user", "content": "weather"})
    other = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {}}}
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_weather"}]}
    usage = server.post("/v1/responses", respond("weather", tools=[other, RESPONSE_WEATHER], tool_choice=choice)).json()["usage"]
    assert usage["input_tokens"] == prompt_tokens(server, {"role": "user", "content": "weather"}, tools=[WEATHER])


def test_response_that_was_cut_or_beyond_the_context_says_so_among_the_events(server: Server) -> None:
    stream = named(server, "/v1/responses", respond("count", max_output_tokens=3))
    response = stream[-1]["response"]
    assert stream[-1]["type"] == "response.incomplete" and response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"} and response["output"][0]["status"] == "incomplete"
    stream = named(server, "/v1/responses", respond("a" * LONG_CTX))
    assert [d["type"] for d in stream] == ["response.created", "response.failed"]
    assert stream[-1]["response"]["status"] == "failed"
    assert stream[-1]["response"]["error"]["code"] == "context_length_exceeded"
    plain = server.post("/v1/responses", respond("a" * LONG_CTX))
    assert assert_error(plain, 400, "context_length_exceeded")["type"] == "invalid_request_error"


def test_messages_media_become_a_note(server: Server) -> None:
    """As Claude Code sends screenshots."""
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
    pdf = {"type": "document", "title": "A", "source": {"type": "base64", "data": ""}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": [LOOK, picture, picture]}
    messages = [{"role": "user", "content": [LOOK, picture, pdf]}, {"role": "assistant", "content": "Yes"},
                {"role": "user", "content": "hi"}, {"role": "user", "content": [result]}]  # fmt: skip
    assert blind(module.Messages({**claude(), "messages": messages}).request.messages) == [
        f"Look\n\nA\n{LEFT_OUT.replace('image', 'image and file')}", "Yes", "hi", f"Look\n{LEFT_OUT}"]  # fmt: skip
    beside = server.post("/v1/messages", {**claude(), "messages": [{"role": "user", "content": [picture, result]}]})
    assert beside.status == 400 and "messages[0].content[0].type" in beside.json()["error"]["message"]


def test_response_media_become_a_note_and_a_refusal_comes_back() -> None:
    """As Codex sends screenshots."""
    picture, text = {"type": "input_image", "image_url": "data:,"}, {"type": "input_text", "text": "Look"}
    items = [{"role": "user", "content": [text, picture]}, {"role": "user", "content": "hi"},
             {"type": "function_call", "call_id": "1", "name": "see", "arguments": "{}"},
             {"type": "function_call_output", "call_id": "1", "output": [picture]}]  # fmt: skip
    assert blind(module.Responses({"input": items}).request.messages) == [f"Look\n{LEFT_OUT}", "hi", "", LEFT_OUT]
    said = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    assert module.Responses({"input": [said, {"role": "user", "content": "hi"}]}).request.messages[0]["content"] == "No."


def test_response_truncation_leaves_out_the_oldest_turns(server: Server) -> None:
    """The model's context has 256 tokens, and reads a byte as one."""
    turns = [turn for n in range(9) for turn in ({"role": "user", "content": f"{n}" * 40}, {"role": "assistant", "content": "a"})]
    body = {"model": "dice", "instructions": "Be brief", "input": [*turns, {"role": "user", "content": "b" * 60}],
            "max_output_tokens": 2}  # fmt: skip
    assert_error(server.post("/v1/responses", body), 400, "context_length_exceeded")
    reply = server.post("/v1/responses", {**body, "truncation": "auto"})
    assert reply.status == 200 and reply.json()["truncation"] == "auto"
    assert 150 < reply.json()["usage"]["input_tokens"] < 256
    alone = {**body, "truncation": "auto", "input": "x" * 300}
    assert_error(server.post("/v1/responses", alone), 400, "context_length_exceeded")


RESPONSE_WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "input absent": ({"input": None}, "input"),
    "input a number": ({"input": 1}, "input"),
    "input empty": ({"input": []}, "input"),
    "input nothing that can be read": ({"input": [{"type": "web_search_call"}]}, "input"),
    "an item no object": ({"input": ["a"]}, "input[0]"),
    "item type unknown": ({"input": [{"type": "dance"}]}, "input[0].type"),
    "item type a list": ({"input": [{"type": ["message"]}]}, "input[0].type"),
    "an item reference": ({"input": [{"type": "item_reference", "id": "msg_1"}]}, '"item_reference"'),
    "role unknown": ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    "content absent": ({"input": [{"role": "user"}]}, "input[0].content"),
    "an image": ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, '"input_image"'),
    "text a number": ({"input": [{"role": "user", "content": [{"type": "input_text", "text": 1}]}]}, "input[0].content[0].text"),
    "call without id": ({"input": [{"type": "function_call", "name": "a", "arguments": "{}"}]}, "input[0].call_id"),
    "call without name": ({"input": [{"type": "function_call", "call_id": "1", "arguments": "{}"}]}, "input[0].name"),
    "arguments an object": (
        {"input": [{"type": "function_call", "call_id": "1", "name": "a", "arguments": {}}]}, "input[0].arguments",
    ),
    "namespace a number": (
        {"input": [{"type": "function_call", "call_id": "1", "name": "a", "namespace": 1, "arguments": ""}]},
        "input[0].namespace",
    ),
    "freeform input an object": (
        {"input": [{"type": "custom_tool_call", "call_id": "1", "name": "a", "input": {}}]}, "input[0].input",
    ),
    "output absent": ({"input": [{"type": "function_call_output", "call_id": "1"}]}, "input[0].output"),
    "encrypted_content a number": ({"input": [{"type": "reasoning", "encrypted_content": 1}]}, "input[0].encrypted_content"),
    "summary text": ({"input": [{"type": "reasoning", "summary": [1]}]}, "input[0].summary[0]"),
    "instructions a list": ({"instructions": []}, "instructions"),
    "model a number": ({"model": 1}, "model"),
    "previous_response_id": ({"previous_response_id": "resp_1"}, "previous_response_id"),
    "conversation": ({"conversation": "conv_1"}, "conversation"),
    "prompt": ({"prompt": {"id": "x"}}, "prompt"),
    "background": ({"background": True}, "background"),
    "top_logprobs": ({"top_logprobs": 2}, "top_logprobs"),
    "truncation unknown": ({"truncation": "middle"}, "truncation"),
    "max_output_tokens zero": ({"max_output_tokens": 0}, "max_output_tokens"),
    "temperature text": ({"temperature": "hot"}, "temperature"),
    "stream a number": ({"stream": 1}, "stream"),
    "parallel_tool_calls text": ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    "tools an object": ({"tools": {}}, "tools"),
    "tool without type": ({"tools": [{"name": "a"}]}, "tools[0].type"),
    "function without name": ({"tools": [{"type": "function"}]}, "tools[0].name"),
    "parameters a list": ({"tools": [{"type": "function", "name": "a", "parameters": [1]}]}, "tools[0].parameters"),
    "namespace without tools": ({"tools": [{"type": "namespace", "name": "a"}]}, "tools[0].tools"),
    "namespace's function without name": (
        {"tools": [{"type": "namespace", "name": "a", "tools": [{"type": "function"}]}]}, "tools[0].tools[0].name",
    ),
    "freeform format unknown": ({"tools": [{"type": "custom", "name": "a", "format": {"type": "yaml"}}]}, "tools[0].format.type"),
    "freeform syntax unknown": (
        {"tools": [{"type": "custom", "name": "a", "format": {"type": "grammar", "syntax": "bnf", "definition": "x"}}]},
        "tools[0].format.syntax",
    ),
    "too many tools": ({"tools": [RESPONSE_WEATHER] * 129}, "tools"),
    "tool_choice unknown": ({"tool_choice": "some"}, "tool_choice"),
    "tool_choice a number": ({"tool_choice": 1}, "tool_choice"),
    "tool_choice required without tools": ({"tool_choice": "required"}, "tool_choice"),
    "tool_choice of a hosted tool": ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
    "tool_choice of an unknown tool": (
        {"tools": [RESPONSE_WEATHER], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name",
    ),
    "allowed_tools without a mode": ({"tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice.mode"),
    "reasoning text": ({"reasoning": "high"}, "reasoning"),
    "effort unknown": ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    "text a string": ({"text": "x"}, "text"),
    "format unknown": ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    "format without schema": ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
}  # fmt: skip


@cases("fields, word", RESPONSE_WRONG)
def test_response_wrong_field_is_400_naming_it(fields: dict[str, Any], word: str, server: Server) -> None:
    assert assert_error(server.post("/v1/responses", respond() | fields), 400, "invalid_request", word)["param"]


def test_models_for_codex_hold_an_empty_list_of_its_own_kind(server: Server) -> None:
    listed = server.get("/v1/models?client_version=0.99.0").json()
    assert listed["models"] == [] and "recital" in [m["id"] for m in listed["data"]]
    assert "models" not in server.get("/v1/models").json()


# The official packages


def test_openai_package_reads_responses_and_their_streams(server: Server) -> None:
    client = server.client()
    assert client.responses.create(model="recital", input="hi").output_text == TEXTS[":"]
    with client.responses.stream(model="recital", input="weather", tools=[RESPONSE_WEATHER]) as stream:  # type: ignore[list-item]
        kinds = [event.type for event in stream]
        (call,) = stream.get_final_response().output
    assert call.type == "function_call" and json.loads(call.arguments) == CITY and kinds[-1] == "response.completed"
    client = server.client()
    with client.responses.stream(model="recital", input="think") as stream:
        first = stream.get_final_response()
    assert [item.type for item in first.output] == ["reasoning", "message"] and first.output_text == "Four!!"
    given: Any = [{"role": "user", "content": "think"}, *(i.to_dict() for i in first.output), {"role": "user", "content": "hi"}]
    assert client.responses.create(model="recital", input=given).output_text == TEXTS[":"]


def test_openai_package_raises_what_a_response_refuses(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().responses.create(model="recital", input="hi", previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"


def anthropic_client(server: Server) -> Any:
    """Anthropic's package, pointed at the server."""
    anthropic = pytest.importorskip("anthropic")
    web = anthropic.DefaultHttpxClient(trust_env=False)
    return anthropic.Anthropic(base_url=f"http://{server.host}:{server.port}", api_key="none", http_client=web, max_retries=0)


def test_anthropic_package_reads_a_message_and_counts_tokens(server: Server) -> None:
    client, said = anthropic_client(server), [{"role": "user", "content": "hi"}]
    message = client.messages.create(model="recital", max_tokens=20, messages=said)
    assert (message.content[0].text, message.stop_reason) == (TEXTS[":"], "end_turn")
    assert client.messages.count_tokens(model="recital", messages=said).input_tokens == prompt_tokens(server, *said)


def test_anthropic_package_runs_a_tool_with_thoughts_streamed(server: Server) -> None:
    client = anthropic_client(server)
    said: list[Any] = [{"role": "user", "content": "weather"}]
    fields = {"model": "recital", "max_tokens": 2000, "tools": [CLAUDE_WEATHER]}
    with client.messages.stream(messages=said, thinking={"type": "enabled", "budget_tokens": 1024}, **fields) as stream:
        message = stream.get_final_message()
    (call,) = message.content
    assert (call.name, call.input, message.stop_reason) == ("get_weather", CITY, "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    said += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    with client.messages.stream(messages=said, **fields) as stream:
        assert "".join(stream.text_stream) == TEXTS["S"]
        usage = stream.get_final_message().usage
    assert usage.input_tokens > 0 and usage.cache_read_input_tokens > 0


def test_anthropic_package_raises_its_own_errors(server: Server) -> None:
    anthropic: Any = pytest.importorskip("anthropic")
    client = anthropic_client(server)
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="nobody", max_tokens=5, messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        client.messages.create(model="recital", max_tokens=5, messages=[{"role": "user", "content": "a" * LONG_CTX}])


ANTHROPIC_SCRIPT = """
const Anthropic = require("@anthropic-ai/sdk");
const client = new Anthropic({baseURL: process.argv[1], apiKey: "none", maxRetries: 0});
(async () => {
  const tools = [JSON.parse(process.argv[2])];
  const ask = content => client.messages.stream({model: "recital", max_tokens: 50, tools, messages: [{role: "user", content}]});
  const called = await ask("weather").finalMessage(), said = await ask("think").finalMessage();
  const failed = await client.messages.create({model: "nobody", max_tokens: 1, messages: []}).catch(e => e.status);
  console.log(JSON.stringify([called.stop_reason, called.content[0].input, said.content.map(b => b.type), failed]));
})();
"""


def test_anthropic_npm_package_reads_streams(server: Server) -> None:
    """Needs node, and NODE_PATH where @anthropic-ai/sdk lies."""
    if not shutil.which("node") or subprocess.run(["node", "-e", "require('@anthropic-ai/sdk')"], capture_output=True).returncode:
        pytest.skip("@anthropic-ai/sdk is not installed")
    command = ["node", "-e", ANTHROPIC_SCRIPT, f"http://{server.host}:{server.port}", json.dumps(CLAUDE_WEATHER)]
    done = subprocess.run(command, capture_output=True, timeout=HANG)
    assert json.loads(done.stdout) == ["tool_use", CITY, ["thinking", "text"], 400], done.stderr


# A small random BERT is compared with a forward pass in numpy; real models with reference vectors, in make test-models.

BERT_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
BERT_WORDS = [f"w{i:03d}" for i in range(10, 110)]
BERT_WIDTH, BERT_HEADS, BERT_LAYERS, BERT_CONTEXT, BERT_EPS = 64, 4, 2, 600, 1e-12
CLS, SEP = 2, 3


class Bert:
    """A random BERT: its file, and the same sums in numpy."""

    def __init__(self, seed: int = 5) -> None:
        self._rng = np.random.default_rng(seed)
        width, self.tensors = BERT_WIDTH, dict[str, np.ndarray]()
        for name, rows in (("token_embd", 105), ("token_types", 2), ("position_embd", BERT_CONTEXT)):
            self.tensors[f"{name}.weight"] = self._random(rows, width, scale=1)
        self._norm("token_embd_norm")
        for layer in range(BERT_LAYERS):
            for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
                self._dense(f"blk.{layer}.{name}", width, width)
            self._dense(f"blk.{layer}.ffn_up", 96, width)
            self._dense(f"blk.{layer}.ffn_down", width, 96)
            self._norm(f"blk.{layer}.attn_output_norm")
            self._norm(f"blk.{layer}.layer_output_norm")
        self._dense("cls", width, width)
        self._dense("cls.output", 1, width)

    def _random(self, *shape: int, scale: float = 0.2) -> np.ndarray:
        return self._rng.normal(0, scale, shape).astype(np.float32)

    def _dense(self, name: str, rows: int, columns: int) -> None:
        self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"] = self._random(rows, columns), self._random(rows)

    def _norm(self, name: str) -> None:
        self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"] = 1 + self._random(BERT_WIDTH), self._random(BERT_WIDTH)

    def write(self, path: Path, pooling: int = 1, broken: bool = False, template: str = "") -> Path:
        """Writes the model; pooling as in llama.h: 1 mean, 2 cls, 4 rank."""
        writer = start_model(path, "bert", {
            "context_length": BERT_CONTEXT, "embedding_length": BERT_WIDTH, "block_count": BERT_LAYERS, "feed_forward_length": 96,
            "head_count": BERT_HEADS, "layer_norm_eps": BERT_EPS, "causal_attention": False,
            "pooling_type": gguf.PoolingType(pooling), "file_type": gguf.LlamaFileType.ALL_F32, "tokenizer_model": "bert",
            "token_list": [*BERT_SPECIALS, *(f"▁{word}" for word in BERT_WORDS)], "token_types": [CONTROL] * 5 + [NORMAL] * 100,
            "token_type_count": 2,
        })  # fmt: skip
        for name, token in (("unknown", 1), ("cls", CLS), ("bos", CLS), ("seperator", SEP), ("padding", 0), ("mask", 4)):
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
        if template:
            writer.add_chat_template([{"name": "rerank", "template": template}])
        for name, tensor in self.tensors.items():
            if pooling == 4 or not name.startswith("cls"):
                writer.add_tensor(name, tensor * np.float32("nan") if broken and "ffn_up" in name else tensor)
        finish(writer)
        return path

    def _apply(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def _normalised(self, name: str, x: np.ndarray) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + BERT_EPS)
        return x * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def states(self, ids: Seq[int]) -> np.ndarray:
        """Returns the last layer's states, one row a token."""
        tensors = self.tensors
        x = tensors["token_embd.weight"][list(ids)] + tensors["token_types.weight"][0]
        x = self._normalised("token_embd_norm", x + tensors["position_embd.weight"][: len(ids)])
        for b in (f"blk.{layer}" for layer in range(BERT_LAYERS)):
            q, k, v = (self._apply(f"{b}.attn_{n}", x).reshape(len(ids), BERT_HEADS, -1).swapaxes(0, 1) for n in "qkv")
            scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]))
            mixed = (scores / scores.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(len(ids), -1)
            x = self._normalised(f"{b}.attn_output_norm", self._apply(f"{b}.attn_output", mixed) + x)
            up = self._apply(f"{b}.ffn_up", x)
            up = up / 2 * (1 + np.vectorize(math.erf)(up / np.sqrt(2)))
            x = self._normalised(f"{b}.layer_output_norm", self._apply(f"{b}.ffn_down", up) + x)
        return x

    def vector(self, ids: Seq[int]) -> np.ndarray:
        mean = self.states(ids).mean(0)
        return mean / np.linalg.norm(mean)

    def score(self, query: Seq[int], document: Seq[int]) -> float:
        first = self.states([CLS, *query, SEP, *document, SEP])[0]
        return float(1 / (1 + np.exp(-self._apply("cls.output", np.tanh(self._apply("cls", first)))[0])))


BERT = Bert()


def words(*numbers: int) -> str:
    return " ".join(BERT_WORDS[n] for n in numbers)


def ids_of(text: str) -> list[int]:
    return [5 + BERT_WORDS.index(word) for word in text.split()]


def vectors(reply: Reply) -> np.ndarray:
    """Returns the vectors of an embeddings reply, one row an input, after checking their envelope."""
    assert reply.status == 200, reply.body
    document = reply.json()
    assert document["object"] == "list"
    assert [(d["object"], d["index"]) for d in document["data"]] == [("embedding", i) for i in range(len(document["data"]))]
    return np.array([d["embedding"] for d in document["data"]])


def embed(server: Server, input: Any, model: str = "bert", **fields: Any) -> Reply:
    return server.post("/v1/embeddings", {"model": model, "input": input, **fields})


def write_embedders(folder: Path) -> None:
    """A BERT, a reranker, one whose output is not a number, and models that generate."""
    BERT.write(folder / "bert.gguf")
    BERT.write(folder / "bert-first.gguf", pooling=2)
    BERT.write(folder / "reranker.gguf", pooling=4)
    BERT.write(folder / "broken.gguf", broken=True)
    write_recital(folder / "recital.gguf")
    for kind in KINDS:
        write_kind(folder / f"kind-{kind}.gguf", kind)
    encoder_decoder = gguf.GGUFWriter(str(folder / "t5.gguf"), "t5")
    encoder_decoder.add_tensor("token_embd.weight", np.zeros((64, 64), np.float32))
    finish(encoder_decoder)


embedding = serving("--model", "recital", "--max-loaded", "12", "--ctx", str(LONG_CTX), write=write_embedders)


TEXTS_TO_EMBED = [words(*range(n % 7, n % 7 + n)) for n in (1, 2, 9, 40, 3, 90, 1, 17)]


def test_vectors_are_those_of_the_forward_pass_and_of_the_models_own_pooling(embedding: Server) -> None:
    found = vectors(embed(embedding, TEXTS_TO_EMBED))
    wanted = np.array([BERT.vector([CLS, *ids_of(text), SEP]) for text in TEXTS_TO_EMBED])
    assert (found * wanted).sum(1).min() > 0.9999
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    (found,) = vectors(embed(embedding, words(1, 2, 3), "bert-first"))
    first = BERT.states([CLS, *ids_of(words(1, 2, 3)), SEP])[0]
    assert found @ first / np.linalg.norm(first) > 0.9999


def test_usage_counts_the_tokens_of_all_inputs_and_the_same_input_gives_the_same_vector(embedding: Server) -> None:
    reply = embed(embedding, [words(1), words(1, 2, 3)]).json()
    assert reply["usage"] == {"prompt_tokens": 3 + 5, "total_tokens": 3 + 5}
    assert reply["model"] == "bert"
    assert embed(embedding, words(4, 5)).body == embed(embedding, words(4, 5)).body


ALL_EMBEDDERS = ["bert", "bert-first", "recital", *(f"kind-{kind}" for kind in KINDS)]


@pytest.mark.parametrize("model", ALL_EMBEDDERS)
def test_many_inputs_give_what_each_gives_alone(embedding: Server, model: str) -> None:
    inputs = [ids_of(words(n % 9, n % 31, *range(n % 50))) for n in range(40)]
    together = vectors(embed(embedding, inputs, model))
    alone = np.array([vectors(embed(embedding, ids, model))[0] for ids in inputs[::10]])
    assert (together[::10] * alone).sum(1).min() > 0.9999
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_token_ids_and_as_many_inputs_as_openai_takes_are_taken(embedding: Server) -> None:
    texts = [words(n % 100, n // 100) for n in range(2048)]
    found = vectors(embed(embedding, texts))
    for n in (0, 1, 777, 2047):
        assert found[n] @ BERT.vector([CLS, *ids_of(texts[n]), SEP]) > 0.9999
    ids = [CLS, *ids_of(words(7, 8)), SEP]
    (text,) = vectors(embed(embedding, words(7, 8)))
    assert np.allclose(vectors(embed(embedding, ids)), text, atol=1e-6)
    assert np.allclose(vectors(embed(embedding, [ids, ids])), text, atol=1e-6)


@pytest.mark.parametrize("model", ["bert", "recital"])
def test_token_ids_of_another_vocabulary_are_refused(embedding: Server, model: str) -> None:
    reply = embed(embedding, [[5, 6], [5, 100257]], model)
    error = assert_error(reply, 400, "invalid_request", "input[1]", "100257", "send text")
    assert (error["param"], error["type"]) == ("input", "invalid_request_error")


def test_base64_holds_the_same_numbers_and_openais_client_reads_them(embedding: Server) -> None:
    texts = [words(1, 2), words(3)]
    packed = embed(embedding, texts, encoding_format="base64").json()["data"]
    unpacked = np.array([np.frombuffer(base64.b64decode(d["embedding"]), "<f4") for d in packed])
    reply = embed(embedding, texts)
    assert (unpacked == vectors(reply).astype(np.float32)).all()
    numbers = reply.json()["data"][0]["embedding"]
    assert max(len(repr(number).lstrip("-").replace("0.", "").split("e")[0].lstrip("0")) for number in numbers) <= 10
    found = embedding.client().embeddings.create(model="bert", input=[words(1, 2), words(3)])
    assert np.allclose([d.embedding for d in found.data], vectors(embed(embedding, [words(1, 2), words(3)])), atol=1e-6)
    assert (found.usage.prompt_tokens, found.object) == (7, "list")


def test_dimensions_cut_the_vector_and_stretch_it_to_length_one(embedding: Server) -> None:
    (whole,) = vectors(embed(embedding, words(1, 2)))
    (cut,) = vectors(embed(embedding, words(1, 2), dimensions=16))
    assert cut.shape == (16,)
    assert np.allclose(cut, whole[:16] / np.linalg.norm(whole[:16]), atol=1e-6)


@cases("dimensions, words_", {"too many": (65, ("64", "65")), "none": (0, ("≥ 1", "0")), "text": ("8", ("whole number",))})
def test_dimensions_that_cannot_be_had_are_refused(embedding: Server, dimensions: Any, words_: Seq[str]) -> None:
    error = assert_error(embed(embedding, "w011", dimensions=dimensions), 400, "invalid_request", "dimensions", *words_)
    assert error["param"] == "dimensions"


INPUTS_REFUSED: dict[str, Any] = {
    "absent": None, "empty text": "", "no inputs": [], "empty among others": ["w011", ""], "no tokens": [[]], "number": 7,
    "object": {"text": "x"}, "true": [True], "nested text": [["w011"]],
    "fractions": [[1.5]], "too many": ["w011"] * 2049, "null among others": ["w011", None],
}  # fmt: skip


@cases("input", INPUTS_REFUSED)
def test_malformed_input_is_refused(embedding: Server, input: Any) -> None:
    error = assert_error(embed(embedding, input), 400, "invalid_request", "input")
    assert (error["param"], error["type"]) == ("input", "invalid_request_error")


def test_encoding_nobody_knows_is_refused_and_unused_fields_are_ignored(embedding: Server) -> None:
    error = assert_error(embed(embedding, "w011", encoding_format="int8"), 400, "invalid_request", "float", "base64", "int8")
    assert error["param"] == "encoding_format"
    assert embed(embedding, "w011", user="me", stream=True, dimensions=None, encoding_format=None).status == 200
    assert embedding.post("/embeddings", {"model": "bert", "input": "w011"}).status == 200  # without /v1


@cases("model, size", {"looks both ways": ("bert", 600), "reads on": ("kind-llama", 512)})
def test_input_is_read_up_to_the_contexts_length(embedding: Server, model: str, size: int) -> None:
    ids = [5 + n % 100 for n in range(size - 1)]
    one, other, again = vectors(embed(embedding, [[*ids, 50], [*ids, 51], [*ids, 50]], model))
    assert np.allclose(one, again, atol=1e-5) and not np.allclose(one, other, atol=1e-5)
    if model == "bert":
        assert one @ BERT.vector([*ids, 50]) > 0.9999
        assert_error(embed(embedding, "w011 " * 500_000), 400, "context_length_exceeded", "input[0]", "600")
    reply = embed(embedding, [[5], [5] * (size + 1)], model)
    error = assert_error(reply, 400, "context_length_exceeded", "input[1]", str(size), str(size + 1))
    assert (error["param"], error["type"]) == ("input", "invalid_request_error")


def test_slices_of_any_size_give_the_same_vector_and_the_last_tokens_of_all_beginnings_the_mean(
    embedding: Server, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pooled by the last token, as Qwen3-Embedding is. States here are of one length, so their mean is the mean's direction."""
    write_kind(tmp_path / "models" / "kind-llama.gguf", "llama")
    monkeypatch.setitem(KIND_METADATA, "llama", lambda kv: attention_metadata(kv, pooling_type=gguf.PoolingType.LAST))
    write_kind(tmp_path / "models" / "last.gguf", "llama")
    slicing = serve("--models-dir", tmp_path / "models", "--batch", "64")
    inputs = [[5 + (n * k) % 250 for n in range(400)] for k in (1, 3, 7)]
    found, wanted = vectors(embed(slicing, inputs, "kind-llama")), vectors(embed(embedding, inputs, "kind-llama"))
    assert (found * wanted).sum(1).min() > 0.9999
    ids = [5 + (7 * n) % 250 for n in range(150)]
    mean = vectors(embed(slicing, [ids[:n] for n in range(1, 151)], "last")).mean(0)
    (whole,) = vectors(embed(embedding, ids, "kind-llama"))
    assert mean @ whole / np.linalg.norm(mean) > 0.9999


def test_absent_model_is_the_default_which_embeds_by_mean_and_generates_on(embedding: Server) -> None:
    reply = embedding.post("/v1/embeddings", {"input": "hello"})
    assert reply.json()["model"] == "recital"
    # a recital's states are one-hot, for its layers add nothing: the mean tells which tokens were there
    assert np.count_nonzero(vectors(reply)[0] > 0.1) == len(set("hello")) + 1
    with embedding.endless() as stream:
        next(stream)
        assert embed(embedding, [f"{n} words" for n in range(50)], "recital").status == 200
        assert next(stream)["choices"][0]["text"]
    assert embedding.generate().text == "Hello wide world"


def test_stream_goes_on_while_inputs_are_embedded(embedding: Server) -> None:
    inputs = ["x" * 2000] * 64
    with embedding.endless() as stream, ThreadPoolExecutor(1) as pool:
        next(stream)
        reply = pool.submit(embed, embedding, inputs, "recital")
        times = [time.monotonic()]
        while not reply.done():
            next(stream)
            times.append(time.monotonic())
        assert reply.result().status == 200
    spent, gap = times[-1] - times[0], max(np.diff(times))
    assert len(times) > 5 and gap < max(spent / 4, 0.5), (spent, gap, len(times))


def test_small_request_need_not_wait_for_a_large_one(embedding: Server) -> None:
    embed(embedding, "w011")
    with ThreadPoolExecutor(1) as pool:
        large = pool.submit(embed, embedding, [words(*range(90))] * 1500)
        eventually(lambda: embedding.status("bert")["requests_running"], "the large request runs")
        assert embed(embedding, "w011").status == 200
        assert not large.done()
        assert large.result().status == 200


def test_requests_at_once_each_get_their_own_vectors(embedding: Server) -> None:
    texts = [words(n, n + 1) for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: vectors(embed(embedding, [text, "w011"]))[0], texts))
    assert min(f @ BERT.vector([CLS, *ids_of(text), SEP]) for f, text in zip(found, texts, strict=True)) > 0.9999


@pytest.mark.parametrize("model", ["bert", "recital"])
def test_client_that_leaves_ends_the_work(embedding: Server, model: str) -> None:
    embed(embedding, "w011", model)
    body = json.dumps({"model": model, "input": ["w011 " * 90] * 2000}).encode()
    with socket.create_connection((embedding.host, embedding.port)) as gone:
        gone.sendall(raw_post("/v1/embeddings", body))
        eventually(lambda: embedding.status(model)["requests_running"], "the request runs")
    left = time.monotonic()
    eventually(lambda: not embedding.status(model)["requests_running"], "it ended")
    assert time.monotonic() - left < 5
    assert embed(embedding, "w011", model).status == 200


def test_output_that_is_not_a_number_is_an_error_and_no_end(embedding: Server) -> None:
    for _ in range(2):
        assert_error(embed(embedding, ["w011"] * 600, "broken"), 500, "generation_failed", "not a number")
    assert embedding.status("broken")["status"] == "loaded"


def test_broken_decode_fails_its_requests_alone(serve: Serve, tmp_path: Path) -> None:
    BERT.write(tmp_path / "models" / "bert.gguf")
    decode = "status = self._run(lambda: context.decode(plan))"
    script = altered(tmp_path, (decode, decode.replace("self", "-3 if len(plan) == 7 else self")))
    server = serve("--models-dir", tmp_path / "models", script=script)
    assert_error(embed(server, ["w011"] * 7), 500, "generation_failed", "-3")
    assert vectors(embed(server, ["w011"] * 8)).shape == (8, BERT_WIDTH)


def test_context_without_memory_for_it_is_refused(serve: Serve, tmp_path: Path) -> None:
    write_recital(tmp_path / "models" / "recital.gguf")
    asks = "EmbeddingContext.memory_need(self.llama), available_memory()"
    script = altered(tmp_path, (asks, "1 << 40, 0"))
    server = serve("--models-dir", tmp_path / "models", script=script)
    assert_error(embed(server, "x", "recital"), 503, "overloaded", "1024.0GB", "0B")
    assert server.generate().text == "Hello wide world"


def test_large_inputs_are_not_kept_waiting_by_small_ones(embedding: Server) -> None:
    """One input that fills the context, while others keep coming for which there is room."""
    large, small = [5] * 600, [[6] * 50] * 8
    vectors(embed(embedding, small))
    stop = time.monotonic() + 3

    def ask() -> None:
        while time.monotonic() < stop:
            embed(embedding, small)

    with ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask) for _ in range(6)]
        assert embed(embedding, [large] * 3).status == 200
        assert time.monotonic() < stop and not all(a.done() for a in asking)


def test_embedding_model_loads_and_unloads_by_itself_and_generates_nothing(embedding: Server) -> None:
    assert embedding.load("bert-first").json()["status"] == "loaded"
    assert embedding.unload("bert-first").json()["status"] == "unloaded"
    embed(embedding, "w011")
    error = assert_error(embedding.chat(model="bert"), 400, "invalid_request", "bert", "embedding model", "cannot generate")
    assert error["param"] == "model"


def rerank(server: Server, documents: Any, query: Any = "w011 w012", model: str | None = "reranker", **fields: Any) -> Reply:
    return server.post("/v1/rerank", {"model": model, "query": query, "documents": documents, **fields})


REFUSED_USES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "rerank by an embedding model": ("/v1/rerank", "bert", ("embedding model", "rerankers")),
    "rerank by a generative model": ("/v1/rerank", "kind-mamba", ("generative model", "rerankers")),
    "embeddings of a reranker": ("/v1/embeddings", "reranker", ("a reranker", "/v1/rerank")),
    "embeddings of an encoder-decoder": ("/v1/embeddings", "t5", ("encoder-decoder",)),
    "completion of an encoder-decoder": ("/v1/completions", "t5", ("encoder-decoder",)),
    "completion of a reranker": ("/v1/completions", "reranker", ("a reranker", "generate")),
}


@cases("path, model, words_", REFUSED_USES)
def test_use_that_a_model_is_not_made_for_is_refused(embedding: Server, path: str, model: str, words_: Seq[str]) -> None:
    body = {"model": model, "input": "x", "prompt": "x", "query": "x", "documents": ["x"]}
    before = embedding.status(model)["status"]
    error = assert_error(embedding.post(path, body), 400, "invalid_request", model, *words_)
    assert (error["param"], embedding.status(model)["status"]) == ("model", before)


DOCUMENTS = [words(n, 2 * n, 3 * n) for n in range(30)]


def test_rerank_puts_the_best_first_takes_objects_and_has_other_names(embedding: Server) -> None:
    reply = rerank(embedding, DOCUMENTS).json()
    scores = np.array([BERT.score(ids_of("w011 w012"), ids_of(d)) for d in DOCUMENTS])
    results = reply["results"]
    assert [r["index"] for r in results] == list(np.argsort(-scores))
    assert np.allclose([r["relevance_score"] for r in results], scores[[r["index"] for r in results]], atol=1e-3)
    assert all(r["document"] == {"text": DOCUMENTS[r["index"]]} for r in results)
    assert (reply["model"], reply["usage"]) == ("reranker", {"prompt_tokens": 30 * 8, "total_tokens": 30 * 8})
    whole = rerank(embedding, DOCUMENTS).json()["results"]
    few = rerank(embedding, [{"text": d} for d in DOCUMENTS], top_n=3, return_documents=False).json()["results"]
    assert few == [{"index": r["index"], "relevance_score": r["relevance_score"]} for r in whole[:3]]
    assert len(rerank(embedding, DOCUMENTS, top_n=99).json()["results"]) == 30
    for path in ("/rerank", "/v1/reranking", "/reranking"):
        body = {"model": "reranker", "query": "w011", "documents": ["w012"]}
        assert len(embedding.post(path, body).json()["results"]) == 1


RERANK_REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "no query": ("query", {"query": None}), "empty query": ("query", {"query": ""}), "query no text": ("query", {"query": 5}),
    "no documents": ("documents", {"documents": None}), "empty documents": ("documents", {"documents": []}),
    "one text": ("documents", {"documents": "w011"}), "document a number": ("documents", {"documents": ["w011", 4]}),
    "object without text": ("documents", {"documents": [{"body": "w011"}]}), "top_n 0": ("top_n", {"top_n": 0}),
    "return_documents a text": ("return_documents", {"return_documents": "yes"}),
    "document too long": ("documents", {"documents": ["w011 " * 599]}),
}  # fmt: skip


@cases("param, fields", RERANK_REFUSED)
def test_malformed_rerank_is_refused(embedding: Server, param: str, fields: dict[str, Any]) -> None:
    reply = rerank(embedding, **{"documents": ["w011"], **fields})
    code = "context_length_exceeded" if "long" in str(fields) or len(str(fields)) > 999 else "invalid_request"
    assert assert_error(reply, 400, code, param)["param"] == param


def test_rerank_uses_the_models_own_template(serve: Serve, tmp_path: Path) -> None:
    rerank_template = "[CLS] w020 {query} w021 [SEP] {document} w022 [SEP]"
    BERT.write(tmp_path / "models" / "reranker.gguf", pooling=4, template=rerank_template)
    server = serve("--models-dir", tmp_path / "models")
    for document, tokens in (("w013 w014", 10), ("w013 [SEP] w014", 13)):
        reply = rerank(server, [document], "w011 w012").json()
        assert reply["usage"]["prompt_tokens"] == tokens
    states = BERT.score(ids_of("w020 w011 w012 w021"), ids_of("w013 w014 w022"))
    reply = rerank(server, ["w013 w014"], "w011 w012").json()
    assert abs(reply["results"][0]["relevance_score"] - states) < 1e-3


def test_special_tokens_in_a_document_are_text(embedding: Server) -> None:
    one, other = rerank(embedding, ["w011 [SEP] w012", "w011 w012"], return_documents=False).json()["results"]
    usage = rerank(embedding, ["w011 [SEP] w012"]).json()["usage"]
    assert one["relevance_score"] != other["relevance_score"] and usage["prompt_tokens"] > 3 + 2 + 3


@pytest.mark.skipif("SHIMMY_TEST_EMBEDDER" not in os.environ, reason="make test-models converts all-MiniLM-L6-v2")
def test_vectors_agree_with_the_reference(serve: Serve) -> None:
    """50 texts of one word to 256 tokens in five languages: all-MiniLM-L6-v2 as transformers computes it."""
    reference = json.loads(Path(os.environ["SHIMMY_TEST_REFERENCE"]).read_text())
    model = Path(os.environ["SHIMMY_TEST_EMBEDDER"])
    server = serve("--models-dir", model.parent, "--model", model)
    found = vectors(server.post("/v1/embeddings", {"input": [row["text"] for row in reference]}))
    cosines = (found * np.array([row["vector"] for row in reference])).sum(1)
    assert len(reference) == 50 and len({row["language"] for row in reference}) == 5
    assert cosines.min() >= 0.999, sorted(cosines)[:5]


# Its routes in its own shapes: raw HTTP first, then its packages.


def post_lines(server: Server, path: str, body: dict[str, Any], **headers: str) -> list[dict[str, Any]]:
    """Posts a body and returns the lines of its answer, which must be newline-delimited JSON."""
    reply = server.post(path, {"model": "recital", **body}, **headers)
    assert reply.status == 200, reply.body
    assert reply.headers["Content-Type"] == "application/x-ndjson" and reply.body.endswith(b"\n")
    return [json.loads(line) for line in reply.body.splitlines()]


def ollama_chat(server: Server, content: str = "hi", **fields: Any) -> dict[str, Any]:
    """One plain answer of /api/chat."""
    reply = server.post("/api/chat", chatting(content, stream=False, **fields))
    assert reply.status == 200, reply.body
    return reply.json()


def assert_ollama_error(reply: Reply, status: int, *words: str) -> None:
    """Asserts Ollama's shape of an error: a text and nothing else."""
    assert reply.status == status, reply.body
    error = reply.json()
    assert list(error) == ["error"] and isinstance(error["error"], str) and "Traceback" not in error["error"]
    for word in words:
        assert word in error["error"], error


def test_ollama_chat_streams_lines_or_is_one_document_with_counts(server: Server) -> None:
    *pieces, end = post_lines(server, "/api/chat", chatting())
    assert "".join(p["message"]["content"] for p in pieces) == "Hello wide world"
    for piece in pieces:
        assert set(piece) == {"model", "created_at", "message", "done"} and piece["done"] is False
        assert piece["message"]["role"] == "assistant" and piece["model"] == "recital"
    assert end["done"] is True and end["done_reason"] == "stop" and end["message"]["content"] == ""
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", end["created_at"])
    usage = server.chat("hi").json()["usage"]
    reply = ollama_chat(server)
    assert reply["message"] == {"role": "assistant", "content": "Hello wide world"} and reply["done"] is True
    assert (reply["prompt_eval_count"], reply["eval_count"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert reply["total_duration"] >= reply["load_duration"] > 0 and reply["prompt_eval_duration"] > 0 < reply["eval_duration"]
    assert ollama_chat(server, model="Recital:latest")["model"] == "Recital:latest"  # takes a tag, and echoes the name


@streamed_and_plain
def test_ollama_chat_tells_thoughts_apart_and_calls_tools_with_objects(server: Server, stream: bool) -> None:
    def answers(content: str, **fields: Any) -> list[dict[str, Any]]:
        return [ollama_chat(server, content, **fields)] if not stream else post_lines(
            server, "/api/chat", chatting(content, **fields))  # fmt: skip

    message, said = server.chat("please think").message, answers("please think", think=True)
    assert "".join(a["message"].get("thinking", "") for a in said) == message["reasoning_content"]
    assert "".join(a["message"]["content"] for a in said) == message["content"]
    said = answers("weather", tools=[WEATHER])
    (call,) = [call for a in said for call in a["message"].get("tool_calls", [])]
    assert call["function"] == {"index": 0, "name": "get_weather", "arguments": {"city": "Paris"}} and call["id"]
    assert said[-1]["done_reason"] == "stop"
    said = answers("twice", tools=[{"function": ADD["function"]}])
    calls = [call["function"] for a in said for call in a["message"].get("tool_calls", [])]
    assert [(c["index"], c["arguments"]) for c in calls] == [(0, {"a": 1}), (1, {"a": 2})]


def test_ollama_chat_reads_calls_and_their_results(server: Server) -> None:
    call = {"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    turns = [
        {"role": "user", "content": "weather"},
        {"role": "assistant", "tool_calls": [call], "thinking": "hm"},
        {"role": "tool", "tool_name": "get_weather", "content": "sunny"},
    ]
    assert ollama_chat(server, messages=turns, tools=[WEATHER])["message"]["content"] == TEXTS["S"]


@cases("options,text,reason", {
    "limit": ({"num_predict": 2}, "Hello wide", "length"),
    "no limit": ({"num_predict": -1}, "Hello wide world", "stop"),
    "limit of zero is none": ({"num_predict": 0}, "Hello wide world", "stop"),
    "stop strings": ({"stop": ["wide"]}, "Hello ", "stop"),
    "seed below zero": ({"seed": -1, "num_predict": 1, "temperature": 0}, "Hello", "length"),
    "llama.cpp's words for off": ({"top_k": -1, "repeat_penalty": 0.0}, "Hello wide world", "stop"),
    "what is decided at the load": ({"num_ctx": 4096, "num_gpu": 1, "numa": False}, "Hello wide world", "stop"),
})  # fmt: skip
def test_ollama_options_hold(server: Server, options: dict[str, Any], text: str, reason: str) -> None:
    reply = ollama_chat(server, options=options)
    assert (reply["message"]["content"], reply["done_reason"]) == (text, reason)


def test_ollama_format_holds_a_schema_or_any_object(server: Server) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    reply = ollama_chat(server, model="dice", format=schema, options={"temperature": 0, "num_predict": 60})
    assert isinstance(json.loads(reply["message"]["content"])["ok"], bool)
    reply = ollama_chat(server, model="dice", format="json", options={"temperature": 0, "num_predict": 4})
    assert reply["message"]["content"].lstrip().startswith("{")


def test_ollama_logprobs_and_cached_tokens_are_told(server: Server) -> None:
    (first, *_) = ollama_chat(server, logprobs=True, top_logprobs=2)["logprobs"]
    assert first["token"] == "Hello" and len(first["top_logprobs"]) == 2
    ollama_chat(server, "a prompt for the cache")
    reply = ollama_chat(server, "a prompt for the cache")
    assert 0 < reply["prompt_eval_cached_count"] < reply["prompt_eval_count"]


@cases("body,headers", {
    "options": ({"options": {}}, {}), "raw": ({"raw": False}, {}), "keep_alive": ({"keep_alive": "5m"}, {}),
    "think": ({"think": False}, {}), "format": ({"format": ""}, {}),
    "system with options": ({"system": "be kind", "options": {}}, {}),
    "its Python package": ({}, {"User-Agent": "ollama-python/0.6.3 (x86_64 linux) Python/3.12"}),
    "its JavaScript package": ({}, {"User-Agent": "ollama-js/0.6.4 (x64 linux Node.js/v22)"}),
    "its own program": ({}, {"User-Agent": "ollama/0.14.0 (amd64 linux) Go/go1.24"}),
})  # fmt: skip
def test_ollama_generate_is_told_by_field_or_agent(server: Server, body: dict[str, Any], headers: dict[str, str]) -> None:
    *pieces, end = post_lines(server, "/api/generate", {"prompt": "hi", **body}, **headers)
    assert "".join(p["response"] for p in pieces) == "Hello wide world" and end["done_reason"] == "stop"


def test_generate_without_a_field_of_ollama_is_the_documented_one_and_raw_leaves_the_template_out(server: Server) -> None:
    body: dict[str, Any]
    for body in ({"prompt": "hi:"}, {"prompt": "hi:", "options": None, "think": None}, {"prompt": "hi", "system": "be kind"},
                 {"messages": user("hi")}):  # fmt: skip
        assert server.post("/api/generate", {"model": "recital", **body}).text == "Hello wide world"
    body = {"model": "recital", "prompt": "=", "raw": True, "stream": False}
    reply = server.post("/api/generate", body).json()
    assert reply["response"] == TEXTS["="] and reply["prompt_eval_count"] == 2


@cases("body,words", {
    "images": ({"images": ["aGk="]}, ["images[0]", "recital reads text only"]),
    "template": ({"template": "{{ .Prompt }}"}, ["template is not served"]),
    "context": ({"context": [1, 2]}, ["context is not served", "/api/chat"]),
    "raw with system": ({"raw": True, "system": "x"}, ["system needs"]),
    "suffix without such tokens": ({"suffix": "x"}, ["cannot fill a gap"]),
})  # fmt: skip
def test_ollama_generate_refuses_by_name(server: Server, body: dict[str, Any], words: list[str]) -> None:
    assert_ollama_error(server.post("/api/generate", {"model": "recital", "prompt": "x", **body}), 400, *words)


def test_ollama_keep_alive_holds_for_its_model_alone(serve: Serve, models: Path) -> None:
    server = serve("--models-dir", models)
    (begun,) = post_lines(server, "/api/generate", {"keep_alive": -1})
    assert begun["done_reason"] == "load" and server.status("recital")["loaded"]
    assert [m["name"] for m in server.get("/api/ps").json()["models"]] == ["recital:latest"]
    (gone,) = post_lines(server, "/api/chat", {"messages": [], "keep_alive": 0})
    assert gone["done_reason"] == "unload"
    eventually(lambda: server.get("/api/ps").json() == {"models": []}, "the model goes")
    ollama_chat(server, keep_alive="2h")
    (model,) = server.get("/api/ps").json()["models"]
    assert model["size"] > 0 and model["size_vram"] == 0 and model["context_length"] == 8192
    hours = (time.mktime(time.strptime(model["expires_at"][:19], "%Y-%m-%dT%H:%M:%S")) - time.mktime(time.gmtime())) / 3600
    assert 1.9 < hours <= 2.01
    ollama_chat(server, model="dice", keep_alive="999999999h", options={"num_predict": 1})
    for keep in (1, "600ms", "0"):
        assert ollama_chat(server, keep_alive=keep)["message"]["content"] == "Hello wide world"
        assert keep == "0" or [m["model"] for m in server.get("/api/ps").json()["models"]] == ["dice:latest", "recital:latest"]
        eventually(lambda: server.status("recital")["status"] == "unloaded", "its time is over")
        (dice,) = server.get("/api/ps").json()["models"]
        assert dice["name"] == "dice:latest" and int(dice["expires_at"][:4]) < 2100


def test_ollama_tags_list_every_model(server: Server, models: Path) -> None:
    listed = server.get("/api/tags").json()["models"]
    assert {"recital:latest", "dice:latest", "hollow:latest"} <= {m["name"] for m in listed}
    recital = next(m for m in listed if m["name"] == "recital:latest")
    assert recital["model"] == recital["name"] and recital["size"] == (models / "recital.gguf").stat().st_size
    assert re.fullmatch("[0-9a-f]{64}", recital["digest"]) and recital["modified_at"].endswith("Z")
    size = recital["details"].pop("parameter_size")
    assert size.endswith("K") and recital["details"] == {
        "parent_model": "", "format": "gguf", "family": "llama", "families": ["llama"], "quantization_level": "F16"
    }  # fmt: skip


def test_ollama_digest_changes_with_the_file(files: Server) -> None:
    def digest() -> str:
        return next(m["digest"] for m in files.get("/api/tags").json()["models"] if m["name"] == "touched:latest")

    file = write_header(files.home / "models" / "touched.gguf")
    files.post("/api/models/discover")
    before = digest()
    os.utime(file, (1, 1))
    files.post("/api/models/discover")
    assert before != digest()


def test_ollama_show_tells_all_and_its_version_is_one_that_clients_accept(server: Server, models: Path) -> None:
    for field in ("model", "name"):  # its older one
        reply = server.post("/api/show", {field: "recital:latest", "verbose": True})
        document = reply.json()
        assert document["template"] == TEMPLATE and {"completion", "tools"} <= set(document["capabilities"])
        told = document["model_info"]
        assert (told["general.architecture"], told["llama.context_length"]) == ("llama", LONG_CTX)
        assert told["general.basename"] == "Recital" and document["details"]["quantization_level"] == "F16"
        assert str(models).encode() not in reply.body
    assert tuple(map(int, server.get("/api/version").json()["version"].split("."))) >= (0, 13, 4)  # what Codex asks for


def test_ollama_embed_gives_normalised_vectors_of_what_is_cut_unless_told_not_to(server: Server) -> None:
    reply = server.post("/api/embed", {"model": "dice", "input": ["in the", "thin"]}).json()
    assert [round(math.hypot(*v), 3) for v in reply["embeddings"]] == [1.0, 1.0]
    assert reply["model"] == "dice" and reply["prompt_eval_count"] > 2 and reply["total_duration"] > 0
    older = server.post("/api/embeddings", {"model": "dice", "prompt": "thin"}).json()
    assert np.allclose(older["embedding"], reply["embeddings"][1], atol=1e-3)
    # An empty text among others, as Ollama's EmbedHandler does (server/routes.go); OpenAI refuses it.
    body = {"model": "dice", "input": "x" * 5000}
    assert server.post("/api/embed", body).json()["prompt_eval_count"] == 256
    assert_ollama_error(server.post("/api/embed", {**body, "truncate": False}), 400, "5000")
    vectors = server.post("/api/embed", {"model": "dice", "input": ["thin", ""]}).json()["embeddings"]
    assert [round(math.hypot(*v), 3) for v in vectors] == [1.0, 1.0]
    assert server.post("/api/embed", {"model": "dice", "input": []}).json()["embeddings"] == []  # it only loads
    assert server.post("/api/embeddings", {"model": "dice", "prompt": ""}).json()["embedding"] == []


def test_ollamas_routes_that_are_not_served_answer_in_its_shape(server: Server) -> None:
    for path in ("/api/create", "/api/copy", "/api/delete", "/api/push", "/api/blobs/sha256:0"):
        assert_ollama_error(server.post(path, {}), 404, "No route matches")
    assert_error(server.post("/api/nowhere", {}), 404, "not_found")


@cases("messages, contents", {
    "in an older turn": ([{"role": "user", "content": "Look", "images": ["aGk="]}, *HELLO], [f"Look\n{LEFT_OUT}", "Hello!"]),
    "in a tool's result": ([*HELLO, {"role": "tool", "images": ["aGk="]}], ["Hello!", LEFT_OUT]),
})  # fmt: skip
def test_ollama_images_become_a_note(messages: list[Any], contents: list[str]) -> None:
    assert blind(module.OllamaChat({"model": "recital", "messages": messages}).request.messages) == contents


@cases("path,body,status,words", {
    "unknown model": ("/api/chat", {"model": "nonesuch", "messages": []}, 404, ["not found", "nonesuch"]),
    "no model": ("/api/chat", {"messages": []}, 400, ["model is required"]),
    "unknown model shown": ("/api/show", {"model": "nonesuch"}, 404, ["not found"]),
    "nothing shown": ("/api/show", {}, 400, ["model is required"]),
    "pull": ("/api/pull", {"model": "llama3"}, 400, ["hf.co/OWNER/REPO:QUANT"]),
    "images": ("/api/chat", {"model": "recital", "messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, 400,
               ["messages[0].images"]),
    "unknown format": ("/api/chat", {"model": "recital", "messages": [], "format": "yaml"}, 400, ["format", "json"]),
    "keep_alive": ("/api/chat", {"model": "recital", "messages": [], "keep_alive": "soon"}, 400, ["keep_alive", "5m"]),
    "temperature": ("/api/chat", {"model": "recital", "messages": [], "options": {"temperature": 9}}, 400, ["temperature"]),
    "too long": ("/api/generate", {"model": "dice", "prompt": "x" * 300, "raw": True}, 400, ["context"]),
    "a list": ("/api/chat", [1], 400, ["JSON object"]),
    "wrong model": ("/api/embed", {"model": 5, "input": "x"}, 400, ["model must be a string"]),
})  # fmt: skip
def test_ollama_errors_are_a_text(server: Server, path: str, body: Any, status: int, words: list[str]) -> None:
    assert_ollama_error(server.post(path, body), status, *words)


OPTION_NAMES = ["num_predict", "temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_last_n", "repeat_penalty",
                "presence_penalty", "frequency_penalty", "seed", "stop", "num_ctx"]  # fmt: skip


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_ollama_wrong_options_are_refused_by_name(server: Server, name: str) -> None:
    values: tuple[Any, ...] = ("nonsense" if name != "stop" else 5, {}, [1], True)
    for value in values:
        body = {"model": "recital", "prompt": "hi", "options": {"num_predict": 1, name: value}}
        assert_ollama_error(server.post("/api/generate", body), 400, name)


# Its own routes, as editors call them.

GAP_TOKENS = ["<unk>", "<s>", "</s>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", *VOCABULARY[6:]]


# has a small context, and tokens for gaps, behind which it says Hello wide world
gaps = serving("--model", "gap", "--ctx", "64", write=lambda folder: write_recital(folder / "gap.gguf", tokens=GAP_TOKENS))


def assert_llama_error(reply: Reply, status: int, kind: str, *words: str) -> dict[str, Any]:
    """Asserts llama-server's shape of an error, whose code is the status."""
    assert reply.status == status, reply.body
    error = reply.json()["error"]
    assert (error["code"], error["type"]) == (status, kind) and isinstance(error["message"], str)
    for word in words:
        assert word in error["message"], error
    return error


def test_completion_has_llama_servers_shape_and_streams_without_done(server: Server) -> None:
    usage = server.generate("Say :").json()["usage"]
    document = server.post("/completion", {"prompt": "Say :"}).json()
    assert (document["content"], document["stop"], document["stop_type"]) == ("Hello wide world", True, "eos")
    assert (document["tokens_evaluated"], document["tokens_predicted"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert document["model"] == "recital" and document["truncated"] is False and document["tokens"] == []
    assert document["timings"]["predicted_n"] == document["tokens_predicted"]
    # As Continue sends it: it reads `content` of each event.
    body = {"model": "recital", "prompt": ":", "n_predict": 50, "stop": None, "temperature": 0.5, "mirostat": None}
    *pieces, end = server.streamed("/completion", body)
    assert "".join(p["content"] for p in pieces) == "Hello wide world" and not any(p["stop"] for p in pieces)
    assert end["stop"] is True and end["content"] == "" and end["timings"]


@cases("fields,told", {
    "end of text": ({}, ("Hello wide world", "eos", "")),
    "limit": ({"n_predict": 1}, ("Hello", "limit", "")),
    "no limit": ({"n_predict": -1}, ("Hello wide world", "eos", "")),
    "stop string": ({"stop": ["wide"]}, ("Hello ", "word", "wide")),
    "token ids": ({"prompt": [1, TOKEN_ID["<0x3A>"]]}, ("Hello wide world", "eos", "")),
    "a list of one": ({"prompt": [":"]}, ("Hello wide world", "eos", "")),
    "no tokens": ({"n_predict": 0}, ("", "limit", "")),
    "blank model": ({"model": " "}, ("Hello wide world", "eos", "")),
})  # fmt: skip
def test_completion_tells_why_it_stopped(server: Server, fields: dict[str, Any], told: tuple[str, str, str]) -> None:
    document = server.post("/completion", {"prompt": ":", **fields}).json()
    assert (document["content"], document["stop_type"], document["stopping_word"]) == told


def test_completion_takes_biases_in_pairs_and_fills_the_cache_with_no_tokens(server: Server) -> None:
    body = {"prompt": ":", "n_predict": 1, "temperature": 0, "seed": -1, "logit_bias": [[TOKEN_ID["Hello"], False]]}
    assert server.post("/completion", body).json()["content"] != "Hello"
    prompt = "warm up this very prompt :"
    assert server.post("/completion", {"prompt": prompt, "n_predict": 0}).json()["tokens_predicted"] == 0
    assert server.post("/completion", {"prompt": prompt}).json()["tokens_cached"] > 10


@cases("fields,document", {
    "flat and nested": (["content", "timings/predicted_n"], {"content": "Hello", "timings/predicted_n": 1}),
    "nothing": ([""], {}), "unknown": (["nonesuch/x", "stop"], {"stop": True}),
})  # fmt: skip
def test_completion_gives_only_the_fields_asked_for(server: Server, fields: list[str], document: dict[str, Any]) -> None:
    assert server.post("/completion", {"prompt": ":", "n_predict": 1, "response_fields": fields}).json() == document


def test_completion_ends_when_its_time_is_over(serve: Serve, tmp_path: Path) -> None:
    tokens = ["\ntock▁" if t == "tock▁" else t for t in VOCABULARY]
    write_recital(tmp_path / "own" / "ticks.gguf", tokens=tokens)
    server = serve("--models-dir", tmp_path / "own", "--ctx", str(LONG_CTX), "--model", "ticks")
    server.load("ticks")
    document = server.post("/completion", {"prompt": "#", "t_max_predict_ms": 200}).json()
    assert document["stop_type"] == "limit" and document["tokens_predicted"] < LONG_CTX - 10
    assert document["content"].startswith("Tick \ntock")


def test_completion_tells_its_tokens(server: Server) -> None:
    ids = [TOKEN_ID[token] for token in ("Hello", " wide", " world")]
    document = server.post("/completion", {"prompt": ":", "return_tokens": True}).json()
    assert document["tokens"][:3] == ids and "completion_probabilities" not in document
    *pieces, _ = server.streamed("/completion", {"prompt": ":", "return_tokens": True})
    assert [id for piece in pieces for id in piece["tokens"]] == document["tokens"]
    (first, *_) = server.post("/completion", {"prompt": ":", "n_probs": 2}).json()["completion_probabilities"]
    assert first["id"] == ids[0] == first["top_logprobs"][0]["id"]
    assert first["token"] == "Hello" and len(first["top_logprobs"]) == 2


@cases("fields", {
    "top_k below zero": {"top_k": -1}, "no penalty": {"repeat_penalty": 0}, "up to the context's end": {"n_predict": -2},
    "no time limit": {"t_max_predict_ms": -1}, "dynamic temperature": {"dynatemp_range": 0.5, "dynatemp_exponent": 1.5},
    "samplers": {"samplers": ["top_k", "infill"]}, "no samplers": {"samplers": []},
    "probabilities as they are": {"post_sampling_probs": False},
})  # fmt: skip
def test_completion_takes_llama_servers_words_for_off(server: Server, fields: dict[str, Any]) -> None:
    assert server.post("/completion", {"prompt": ":", **fields}).json()["content"] == "Hello wide world"


def test_completion_turns_off_the_samplers_that_are_not_named() -> None:
    fields = {"top_k": 1, "top_p": 0.5, "min_p": 0.3, "dry_multiplier": 2, "samplers": ["top_p", "temperature"]}
    sampling = module.LlamaCompletion({"prompt": ":", "temperature": 0.5, **fields}).request.sampling
    assert (sampling.top_k, sampling.top_p, sampling.min_p, sampling.dry_multiplier, sampling.temperature) == (0, 0.5, 0, 0, 0.5)


def test_dynamic_temperature_reaches_the_sampler(server: Server) -> None:
    """With a range as wide as the temperature, an unsure model is twice as hot: other texts of the same seeds."""
    body = {"model": "dice", "prompt": "Once", "temperature": 1, "n_predict": 40, "seed": 3}
    usual = server.post("/completion", body).json()["content"]
    assert server.post("/completion", {**body, "dynatemp_range": 0}).json()["content"] == usual
    assert server.post("/completion", {**body, "dynatemp_range": 1}).json()["content"] != usual


def test_completion_answers_several_prompts_by_their_index_with_their_counts(server: Server) -> None:
    events = server.streamed("/completion", {"prompt": [":", "="]})
    texts = {index: "".join(e["content"] for e in events if e["index"] == index) for index in (0, 1)}
    assert texts == {0: TEXTS[":"], 1: TEXTS["="]} and [e["stop"] for e in events].count(True) == 2
    first, second = server.post("/completion", {"prompt": ["Say :", ":"]}).json()
    assert (first["tokens_evaluated"], second["tokens_evaluated"]) == (6, 2)
    assert first["tokens_predicted"] == second["tokens_predicted"] == first["timings"]["predicted_n"]


def test_completions_suffix_is_infill(gaps: Server) -> None:
    for body in ({"prompt": "ab", "suffix": "cde"}, {"prompt": ["ab"], "suffix": "cde", "n": 2, "echo": True}):
        document = gaps.post("/v1/completions", body).json()
        assert document["choices"][-1]["text"] == ("ab" if "echo" in body else "") + "Hello wide world"
        assert document["usage"]["prompt_tokens"] == 9


@cases("body, size", {  # of the text between the gap's tokens
    "a prefix and a suffix": ({"input_prefix": "ab", "input_suffix": "cde"}, 5),
    "a prompt behind the prefix": ({"input_prefix": "ab", "input_suffix": "", "prompt": "cd"}, 4),
    "texts that look like special tokens": (
        {"input_prefix": "<|fim_middle|>", "input_suffix": "", "input_extra": [{"text": "<|fim_middle|>"}]},
        len("<|fim_middle|>") + len("\n\n--- snippet ---\n\n<|fim_middle|>")),
})  # fmt: skip
def test_infill_puts_the_gap_between_its_tokens(body: dict[str, Any], size: int, gaps: Server) -> None:
    document = gaps.post("/infill", body).json()
    assert document["content"] == "Hello wide world" and document["tokens_evaluated"] == 1 + 3 + size  # BOS, gap, bytes


def test_infill_leaves_out_what_does_not_fit_from_the_front(gaps: Server) -> None:
    """As llama.vim sends it: pieces of other files beyond the context are no error."""
    extra = [{"filename": "a.py", "text": "x" * 20}] * 5
    body: dict[str, Any] = {
        "id_slot": 0, "input_prefix": "ab\n", "input_suffix": "\n", "input_extra": extra, "prompt": "c", "n_predict": 8,
        "stop": [], "n_indent": 4, "top_k": 40, "top_p": 0.9, "samplers": ["top_k", "top_p", "infill"], "stream": False,
        "cache_prompt": True, "t_max_prompt_ms": 500, "t_max_predict_ms": 1000,
        "response_fields": ["content", "timings/prompt_n", "truncated", "tokens_cached", "tokens_evaluated"],
    }  # fmt: skip
    document = gaps.post("/infill", body).json()
    assert set(document) == set(body["response_fields"]) and document["content"] == "Hello wide world"
    assert 1 + 3 + 5 < document["tokens_evaluated"] <= 64 - 8  # with one piece, and room for the answer


def test_infill_as_zed_and_ollama_send_it(gaps: Server) -> None:
    stop = ["<|endoftext|>", "<|file_separator|>", "<|fim_pad|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
            "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<PRE>", "<SUF>", "<MID>", "[PREFIX]", "[SUFFIX]"]  # fmt: skip
    body = {"input_prefix": "ab", "input_suffix": "cd", "prompt": "Fill in.", "stream": False, "n_predict": 20,
            "temperature": 0.2, "top_k": 40, "top_p": 0.99, "stop": stop, "cache_prompt": True}  # fmt: skip
    assert gaps.post("/infill", body).json()["content"] == "Hello wide world"
    reply = gaps.post("/api/generate", {"model": "gap", "prompt": "ab", "suffix": "cde", "stream": False}).json()
    assert (reply["response"], reply["prompt_eval_count"]) == ("Hello wide world", 9)
    assert "insert" in gaps.post("/api/show", {"model": "gap"}).json()["capabilities"]


def test_llama_server_tells_both_sizes(gaps: Server) -> None:
    for path, body in (("/completion", {"prompt": "x" * 100}), ("/infill", {"input_prefix": "x" * 100, "input_suffix": ""})):
        error = assert_llama_error(gaps.post(path, body), 400, "exceed_context_size_error", "context")
        assert error["n_ctx"] == 64 and error["n_prompt_tokens"] > 100


@cases("path,body,word", {
    "no prompt": ("/completion", {}, "prompt is required"),
    "several prompts": ("/completion", {"prompt": ["a"] * 257}, "up to 256"),
    "probabilities of what is left": ("/completion", {"prompt": "a", "post_sampling_probs": True}, "post_sampling_probs"),
    "samplers no list": ("/completion", {"prompt": "a", "samplers": {"top_k": 1}}, "samplers must be a list"),
    "no such tokens": ("/infill", {"input_prefix": "a", "input_suffix": "b"}, "cannot fill a gap"),
    "no prefix": ("/infill", {"input_suffix": "b"}, "input_prefix"),
    "a piece without text": ("/infill", {"input_prefix": "", "input_suffix": "", "input_extra": [{}]}, "extra[0].text"),
    "no content": ("/tokenize", {}, "content"),
    "no tokens": ("/detokenize", {}, "tokens"),
    "an unknown token": ("/detokenize", {"tokens": [10**9]}, "the model's tokens are"),
    "a token below zero": ("/detokenize", {"tokens": [-1]}, "the model's tokens are"),
    "too much": ("/tokenize", {"content": "x" * (2**20 + 1)}, "1048576"),
    "no messages": ("/apply-template", {}, "messages is required"),
    "messages refused": ("/apply-template", {"messages": user("mutiny")}, "No mutiny"),
})  # fmt: skip
def test_llama_server_refuses_by_name(server: Server, path: str, body: dict[str, Any], word: str) -> None:
    assert_llama_error(server.post(path, body), 400, "invalid_request_error", word)


def test_llama_server_unknown_model_is_404(server: Server) -> None:
    for reply in (server.post("/completion", {"model": "nonesuch", "prompt": ":"}), server.get("/props?model=nonesuch")):
        assert_llama_error(reply, 404, "not_found_error", "nonesuch")


@cases("fields,tokens", {
    "a text": ({"content": "a:"}, ["<0x61>", "<0x3A>"]),
    "with the model's own": ({"content": "a", "add_special": True}, ["<s>", "<0x61>"]),
    "a special token": ({"content": "<|quiet|>"}, ["<|quiet|>"]),
    "a special token's name": ({"content": "<s>", "parse_special": False}, ["<0x3C>", "<0x73>", "<0x3E>"]),
    "nothing": ({"content": ""}, []),
})  # fmt: skip
def test_tokenize_gives_ids(server: Server, fields: dict[str, Any], tokens: list[str]) -> None:
    assert server.post("/tokenize", fields).json() == {"tokens": [TOKEN_ID[t] for t in tokens]}


def test_tokenize_shows_pieces_and_detokenize_gives_back_the_text(server: Server) -> None:
    pieces = [t["piece"] for t in server.post("/tokenize", {"content": "aé", "with_pieces": True}).json()["tokens"]]
    assert pieces == ["a", [0xC3], [0xA9]]
    for text in ("naïve 😀 and 日本", "", "a  b\n", "<|quiet|>x"):
        ids = server.post("/tokenize", {"content": text}).json()["tokens"]
        assert server.post("/detokenize", {"tokens": ids}).json() == {"content": text}


def test_tokenize_does_not_wait_for_streams_and_apply_template_gives_the_prompt(server: Server) -> None:
    with server.endless() as stream:
        next(stream)
        assert server.post("/tokenize", {"content": "ab"}).json()["tokens"]
    body = {"messages": [{"role": "system", "content": "Be kind"}, *user("hi")]}
    assert server.post("/apply-template", body).json() == {"prompt": "[system]Be kind[user]hi[assistant]:"}


def test_props_describe_a_model_without_directories(server: Server, models: Path) -> None:
    reply = server.get("/props?model=recital")
    document = reply.json()
    assert document["default_generation_settings"]["n_ctx"] == LONG_CTX and document["chat_template"] == TEMPLATE
    assert document["chat_template_caps"]["supports_tools"] and document["modalities"] == {"vision": False, "audio": False}
    assert document["model_path"] == "recital.gguf" and str(models).encode() not in reply.body
    assert server.get("/props").json() == document and document["total_slots"] == 8


def test_props_load_nothing_and_slots_show_what_runs_and_no_text(serve: Serve, models: Path) -> None:
    """Slots of no model are no reason to stay away: only the next request would load one."""
    own = serve("--models-dir", models, "--model", "recital", "--ctx", str(LONG_CTX), "--parallel", "2")
    assert own.get("/props").json()["default_generation_settings"]["n_ctx"] == LONG_CTX
    assert not own.status("recital")["loaded"] and own.get("/slots").json() == own.get("/slots?fail_on_no_slot=1").json() == []
    assert {"slots_idle": 0, "slots_processing": 0}.items() <= own.get("/health").json().items()
    own.load("recital")
    assert own.get("/health").json()["slots_idle"] == len(own.get("/slots?fail_on_no_slot=1").json()) == 2
    with own.endless() as stream:
        next(stream)
        slots = eventually(lambda: [s for s in own.get("/slots?model=recital").json() if s["is_processing"]], "one runs")
    (slot,) = slots
    assert slot == {"id": 0, "id_task": -1, "n_ctx": LONG_CTX, "speculative": False, "is_processing": True, "model": "recital"}
    assert len(own.get("/slots").json()) == 2


def test_model_list_serves_every_client(server: Server, models: Path) -> None:
    document = server.get("/v1/models").json()
    data = document["data"]
    assert (document["has_more"], document["first_id"], document["last_id"]) == (False, data[0]["id"], data[-1]["id"])
    recital = next(m for m in data if m["id"] == "recital")
    assert (recital["object"], recital["type"], recital["owned_by"]) == ("model", "model", "shimmy")
    assert (recital["display_name"], recital["context_length"], recital["max_model_len"]) == ("Recital", LONG_CTX, LONG_CTX)
    assert recital["created_at"] == time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime(recital["created"]))
    size = (models / "recital.gguf").stat().st_size
    count = recital["meta"].pop("n_params")
    assert recital["meta"] == {"n_ctx": LONG_CTX, "n_ctx_train": LONG_CTX, "size": size} and count > 1000
    recital["meta"]["n_params"] = count
    assert server.get("/v1/models/recital").json() == recital


def ollama_client(server: Server) -> Any:
    package = pytest.importorskip("ollama")
    return package.Client(host=f"http://{server.host}:{server.port}", trust_env=False)


def test_ollama_package_chats_and_generates(server: Server) -> None:
    client = ollama_client(server)
    turns = [{"role": "user", "content": "hi"}]
    assert client.chat("recital", turns).message.content == "Hello wide world"
    assert "".join(c.message.content for c in client.chat("recital", turns, stream=True)) == "Hello wide world"
    (call,) = client.chat("recital", [{"role": "user", "content": "weather"}], tools=[WEATHER]).message.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", {"city": "Paris"})
    client = ollama_client(server)
    assert client.generate("recital", "hi").response == "Hello wide world"
    assert "".join(c.response for c in client.generate("recital", "hi", stream=True)) == "Hello wide world"
    assert client.generate("recital").done_reason == "load"


def test_ollama_package_lists_shows_embeds_and_raises(server: Server) -> None:
    client = ollama_client(server)
    assert "recital:latest" in [m.model for m in client.list().models]
    assert client.show("recital").modelinfo["llama.context_length"] == LONG_CTX
    client.generate("recital")
    assert "recital:latest" in [m.model for m in client.ps().models]
    assert len(client.embed("dice", ["in", "the"]).embeddings) == 2 and len(client.embeddings("dice", "in").embedding) == 64
    client, package = ollama_client(server), pytest.importorskip("ollama")
    with pytest.raises(package.ResponseError, match="not found") as caught:
        client.chat("nonesuch", [{"role": "user", "content": "hi"}])
    assert caught.value.status_code == 404


@cases("stream", {"streamed": (), "plain": ("--no-stream",)})
def test_llm_with_its_ollama_plugin_prompts(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: tuple[str, ...]
) -> None:
    pytest.importorskip("llm_ollama")
    for name, value in {"OLLAMA_HOST": f"http://{server.host}:{server.port}", "LLM_USER_PATH": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "llm", "-m", "ollama/recital", "hi", "-o", "temperature", "0", *stream]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert (done.stdout.strip(), done.returncode) == ("Hello wide world", 0), done.stderr


NODE_CLIENT = """
const {Ollama} = require('ollama'); const client = new Ollama({host: process.argv[1]}); const said = [];
(async () => {
  const messages = [{role: 'user', content: 'hi'}], model = 'recital';
  said.push((await client.chat({model, messages})).message.content);
  let text = ''; for await (const part of await client.chat({model, messages, stream: true})) text += part.message.content;
  said.push(text, (await client.generate({model, prompt: 'hi'})).response);
  said.push((await client.list()).models.some(m => m.name === 'recital:latest'));
  said.push((await client.show({model})).template.length > 9);
  said.push((await client.ps()).models.length > 0, (await client.embed({model: 'dice', input: ['in', 'the']})).embeddings.length);
  try { await client.chat({model: 'nonesuch', messages}) } catch (error) { said.push(error.status_code) }
  console.log(JSON.stringify(said));
})();
"""


def test_ollama_package_of_npm_does_all(server: Server, tmp_path: Path) -> None:
    """Needs node, and the package `ollama` where NODE_PATH says."""
    found = shutil.which("node") and subprocess.run(["node", "-e", "require('ollama')"], capture_output=True, check=False)
    if not found or found.returncode:
        pytest.skip("npm's package ollama is not installed")
    command = ["node", "-e", NODE_CLIENT, f"http://{server.host}:{server.port}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert json.loads(done.stdout) == [*["Hello wide world"] * 3, True, True, True, 2, 404], done.stderr


LONG_TOOL = """
from shimmy import tool

@tool
def get_weather(city: str) -> str:
    "Tells the weather."
    return "sunny " * 50_000
"""


def test_long_result_of_a_builtin_tool_is_cut_for_the_model(serve: Serve, models: Path, tmp_path: Path) -> None:
    """Whole, it would not fit the context, and the client would be told that its two words are too long."""
    (tmp_path / "long.py").write_text(LONG_TOOL)
    own = serve("--models-dir", models, "--ctx", "16384", "--tools", tmp_path / "long.py")
    reply = own.chat("weather", tools=[WEATHER_BUILTIN])
    assert reply.message["content"] == TEXTS["S"]
    assert len(reply.message["tool_results"][0]["result"]) == 300_000
    contexts = {m["id"]: (m["context_length"], m["meta"]["n_ctx_train"]) for m in own.get("/v1/models").json()["data"]}
    assert contexts["recital"] == (16384, LONG_CTX) and contexts["dice"] == (256, 256)  # what a request may have


def test_llama_servers_health_needs_no_key(guarded: Server) -> None:
    assert guarded.get("/v1/health").json()["status"] == "ok" and guarded.get("/health").json()["status"] == "healthy"


# Pictures

PICTURE_FILES: dict[str, tuple[bytes, str]] = {  # and what is said of them
    "PNG": (RED, "32 x 40"),
    "GIF": (b"GIF89a" + struct.pack("<HH", 7, 5) + bytes(9), "7 x 5"),
    "BMP": (b"BM" + bytes(12) + struct.pack("<Iii", 40, 7, -5) + bytes(40), "7 x 5"),
    "BMP of OS/2": (b"BM" + bytes(12) + struct.pack("<IHH", 12, 7, 5) + bytes(40), "7 x 5"),
    "JPEG": (b"\xff\xd8\xff\xe0\0\4ab??\xff\xff\xc2\0\x11\x08" + struct.pack(">HH", 5, 7) + bytes(9), "7 x 5"),
    "nothing": (b"", "no PNG, JPEG, GIF or BMP"),
    "WebP": (b"RIFF\0\0\0\0WEBPVP8 ", "no PNG, JPEG, GIF or BMP"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no PNG, JPEG, GIF or BMP"),
    "a PNG cut in its header": (RED[:20], "damaged: its header tells no size"),
    "a PNG cut in its pixels": (RED[:-20], "damaged: it is cut"),
    "a PNG with other bytes in it": (RED[:50] + b"~~~~~~~~" + RED[58:], "damaged"),
    "a PNG of more than it says": (png(np.zeros((2000, 2000, 3), np.uint8), (9, 9)), "far more than its pixels"),
    "a PNG of no height": (png(np.zeros((9, 9, 3), np.uint8), (9, 0)), "no size"),
    "a PNG of 20,000 × 20,000": (png(np.zeros((1, 1, 3), np.uint8), (20_000, 20_000)), "20000 × 20000 pixels, more than 50"),
    "a BMP of an unknown kind": (b"BM" + bytes(12) + struct.pack("<Iii", 41, 7, 5) + bytes(40), "no size"),
    "a JPEG without a frame": (b"\xff\xd8\xff\xe0\0\4ab" * 9, "no size"),
    "a JPEG of many scans": (
        b"\xff\xd8\xff\xc2\0\x11\x08" + struct.pack(">HH", 5, 7) + b"\xff\xda\0\2" * 101, "far more than its pixels"),
}  # fmt: skip


@cases("data, words", PICTURE_FILES)
def test_picture_is_checked_by_its_bytes(data: bytes, words: str) -> None:
    try:
        picture = module.read_picture("images[0]", data)
        said = f"{picture.width} x {picture.height}"
        assert picture.data == data and picture.key == hashlib.sha256(data).hexdigest()
    except InvalidRequest as error:
        said, param = str(error), error.param
        assert param == "images[0]" and said.startswith("images[0]: ")
    assert words in said


@pytest.mark.parametrize("kind", [name for name, (_, words) in PICTURE_FILES.items() if " x " in words])
def test_damaged_picture_is_a_picture_within_bounds_or_refused(kind: str) -> None:
    data, chance = PICTURE_FILES[kind][0], random.Random(1)
    for _ in range(500):
        spoiled = bytearray(data[: chance.choice([len(data), chance.randrange(len(data))])] or b"?")
        for _ in range(chance.randrange(8)):
            spoiled[chance.randrange(len(spoiled))] = chance.choice([0, 1, 127, 255, chance.randrange(256)])
        with contextlib.suppress(InvalidRequest):
            picture = module.read_picture("images[0]", bytes(spoiled))
            assert 0 < picture.width * picture.height <= module.MAX_PIXELS


class SeeingWorker(FakeWorker):
    """Remembers the prompt of the job that it is given, and does no more."""

    loaded = types.SimpleNamespace(
        ctx=1, pool=1, parallel=1, sees=True, chat=module.ChatFacts({"": TEMPLATE}, "", False, "</s>", ("<|im_end|>",)))
    chat: Any = None
    prompt: tuple[Any, ...] = ()

    def __init__(self, info: Any) -> None:
        super().__init__()
        self.info = info

    def submit(self, jobs: Any, *_: Any) -> Any:
        self.prompt = jobs[0].prompt
        raise GenerationFailed("seen")


@pytest.fixture(scope="module")
def seer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Any], str]]:
    """What a seeing model reads of a dialect's request: its prompt as text, with the names of its pictures."""
    folder = tmp_path_factory.mktemp("seer")
    write_dice(folder / "seer.gguf", "Seer")
    write_projector(folder / "mmproj-seer.gguf")
    service = module.Service(Catalog([SearchRoot(str(folder), "")]), TableOptions(), module.Settings())
    workers: list[Any] = []

    def make(info: Any, *_: Any) -> Any:
        workers.append(SeeingWorker(info))
        return workers[-1]

    service.table._residents._make_worker = make

    def read(dialect: Any) -> str:
        with contextlib.suppress(GenerationFailed):
            list(dialect.events(service, Cancellation()))
        names = {RED: "(red)", BLUE: "(blue)"}
        return "".join(part if isinstance(part, str) else names[part.data] for part in workers[-1].prompt)

    yield read
    service.close()


RED_PART: dict[str, Any] = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{RED64}", "detail": "low"}}
BLUE_PART = {"type": "image_url", "image_url": BLUE64}
RED_SOURCE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": RED64}}
AND, SO = ({"type": "text", "text": text} for text in ("and", "so"))
SEEN: dict[str, tuple[str, dict[str, Any], str]] = {  # in each dialect: what is sent, and what the model reads
    "chat": ("ChatCompletion", {"messages": [{"role": "user", "content": [LOOK, RED_PART, AND, SO, BLUE_PART]}]},
             "[user]Look(red)and\nso(blue)[assistant]:"),
    "chat, in every role": (
        "ChatCompletion", {"messages": [
            {"role": "system", "content": [RED_PART]}, {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": [AND, BLUE_PART]}]},
        "[system](red)[user]hi[assistant]f{}[tool]and(blue)[assistant]S"),
    "chat, beside a file": (
        "ChatCompletion", {"messages": [{"role": "user", "content": [RED_PART, {"type": "file"}, AND]},
                                        {"role": "user", "content": "hi"}]},
        "[user](red)and\n[file left out: this model reads text and images only][user]hi[assistant]:"),
    "chat, with a text that looks like a mark": (
        "ChatCompletion", {"messages": [
            {"role": "user", "content": [{"type": "text", "text": "\ufdd00\ufdd0<|im_end|>"}, RED_PART]}]},
        "[user]\ufdd00\ufdd0<|im_end|>(red)[assistant]:"),
    "responses": (
        "Responses", {"input": [{"role": "user", "content": [
            {"type": "input_text", "text": "Look"}, {"type": "input_image", "image_url": RED_PART["image_url"]["url"]}]},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_image", "image_url": BLUE64}]}]},
        "[user]Look(red)[assistant]f{}[tool](blue)[assistant]S"),
    "messages": (
        "Messages", {"messages": [{"role": "user", "content": [RED_SOURCE, LOOK]},
                                  {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]},
                                  {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1",
                                                                "content": [AND, RED_SOURCE, SO]}]}]},
        "[user](red)Look[assistant]f{}[tool]and(red)so[assistant]S"),
    "ollama chat": ("OllamaChat", {"messages": [{"role": "user", "content": "Look", "images": [RED64, BLUE64]}]},
                    "[user](red)(blue)Look[assistant]:"),
    "ollama generate": ("OllamaGenerate", {"prompt": "Look", "system": "Be brief", "images": [RED64]},
                        "[system]Be brief[user](red)Look[assistant]:"),
    "ollama generate, images alone": ("OllamaGenerate", {"images": [RED64]}, "[user](red)[assistant]:"),
    "ollama generate, raw": ("OllamaGenerate", {"prompt": "Look", "raw": True, "images": [RED64]}, "(red)Look"),
    "llama-server": (
        "LlamaCompletion", {"prompt": {"prompt_string": "Look MARKER and MARKER", "multimodal_data": [RED64, BLUE64]}},
        "Look (red) and (blue)"),
    "llama-server, among others": (
        "LlamaCompletion", {"prompt": [{"prompt_string": "MARKER!", "multimodal_data": [RED64]}, "x"]}, "(red)!"),
    "native": ("NativeSocket", {"prompt": "Look", "images": [RED64]}, "(red)Look"),
    "native, with a system text": ("Native", {"prompt": "Look", "system": "S", "images": [RED64]},
                                   "[system]S[user](red)Look[assistant]:"),
    "native, messages": ("Native", {"messages": [{"role": "user", "content": [LOOK, RED_PART]}]}, "[user]Look(red)[assistant]:"),
}  # fmt: skip


@cases("dialect, body, expected", SEEN)
def test_pictures_stand_where_llama_server_puts_them(dialect: str, body: Any, expected: str, seer: Callable[[Any], str]) -> None:
    body = json.loads(json.dumps(body).replace("MARKER", module.media_marker()))
    assert seer(getattr(module, dialect)({"model": "seer", **body})) == expected


def looked_at(url: Any, count: int = 1) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return {"model": "seer", "messages": [{"role": "user", "content": [part] * count}]}


UNSEEN: dict[str, tuple[dict[str, Any], str]] = {
    "no base64": (looked_at("data:image/png;base64,%%%"), "must be base64"),
    "no text": (looked_at(5), "must be base64"),
    "nothing": (looked_at(None), "must be base64"),
    "a file's address": (looked_at("file:///etc/passwd"), "must be base64"),
    "a data: URL of text": (looked_at("data:text/plain,hello"), "must be base64"),
    "no picture": (looked_at(base64.b64encode(b"hello").decode()), "no PNG, JPEG, GIF or BMP"),
    "too many": (looked_at(RED64, 17), "up to 16 images"),
    "too many bytes": (looked_at(base64.b64encode(PICTURE_FILES["BMP"][0] + bytes(9 << 20)).decode(), 3), "up to 24"),
    "a host that is not open": (looked_at("http://example.com/cat.png"), "--tool-hosts"),
}  # fmt: skip


@cases("body, words", UNSEEN)
def test_image_that_is_none_is_refused_by_its_place(body: Any, words: str, seer: Callable[[Any], str]) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(words)) as caught:
        seer(module.ChatCompletion(body))
    assert re.match(r"messages\[0\].content\[\d+\].type: ", str(caught.value)) and caught.value.status == 400


def test_llama_server_prompt_needs_a_marker_for_each_image() -> None:
    with pytest.raises(InvalidRequest, match="1 images are given, and the media_marker of /props stands 0 times"):
        module.LlamaCompletion({"prompt": {"prompt_string": "<__media__>", "multimodal_data": [RED64]}})


def test_prompt_with_pictures_keeps_to_its_texts() -> None:
    picture, mark = module.Picture(RED, 32, 40), "\ufdd0"
    tool = {"type": "function", "function": {"name": "f", "description": f"{mark}0{mark}"}}
    request = module.GenerateRequest(messages=({"role": "user", "content": (f"{mark}1{mark}", picture)},), tools=(tool,))
    template = "{% for t in tools or [] %}{{ t.function.name }}{{ t.function.description }}{% endfor %}{{ messages[0].content }}"
    prompt = chat(template).prompt(request)
    assert "".join(part if isinstance(part, str) else "(red)" for part in prompt) == f"f{mark}0{mark}{mark}1{mark}(red)"
    picture = module.Picture(RED, 32, 40)
    request = module.GenerateRequest(messages=({"role": "user", "content": ("Look", picture)},))
    with pytest.raises(InvalidRequest, match="leaves out an image"):
        chat("{{ messages[0].role }}").prompt(request)
    whole = "{% for part in messages[0].content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    assert chat(whole).prompt(request)[:2] == ("Look", picture)


def write_seers(folder: Path) -> None:
    """A model that sees; the projector of another is of a type that nobody knows."""
    for stem in ("seer", "gazer"):
        write_dice(folder / f"{stem}.gguf", stem.title(), 512)
        write_projector(folder / f"mmproj-{stem}.gguf", stem.title())
    broken = folder / "mmproj-gazer.gguf"
    broken.write_bytes(broken.read_bytes().replace(b"\3\0\0\0\0\0\0\0mlp", b"\3\0\0\0\0\0\0\0xyz"))


seeing = serving("--model", "seer", write=write_seers)


def pictured(image: str = RED64, **more: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}, LOOK]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 8, "temperature": 0, **more}


def test_every_dialect_shows_the_model_the_same_picture(seeing: Server) -> None:
    told = seeing.post("/v1/chat/completions", pictured()).json()
    text, tokens = told["choices"][0]["message"]["content"], told["usage"]["prompt_tokens"]
    assert told["usage"]["prompt_tokens_details"]["image_tokens"] == 16
    again, blue = (seeing.post("/v1/chat/completions", pictured(image)).json() for image in (RED64, BLUE64))
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == tokens - 1
    assert [d["choices"][0]["message"]["content"] == text for d in (again, blue)] == [True, False]

    asked = {"input": [{"role": "user", "content": RESPONSE_PARTS}], "temperature": 0, "max_output_tokens": 8}
    response = seeing.post("/v1/responses", asked).json()
    claude = pictured(messages=[{"role": "user", "content": [RED_SOURCE, LOOK]}])
    message, options = seeing.post("/v1/messages", claude).json(), {"temperature": 0, "num_predict": 8}
    ollama = {"model": "seer", "options": options, "stream": False}
    turn = {"role": "user", "content": "Look", "images": [RED64]}
    prompt = seeing.post("/apply-template", pictured()).json()["prompt"]
    marked = {"prompt_string": prompt, "multimodal_data": [RED64]}
    said = {
        "responses": response["output"][-1]["content"][0]["text"], "messages": message["content"][0]["text"],
        "ollama chat": seeing.post("/api/chat", {**ollama, "messages": [turn]}).json()["message"]["content"],
        "ollama generate": seeing.post("/api/generate", {**ollama, "prompt": "Look", "images": [RED64]}).json()["response"],
        "llama-server": seeing.post("/completion", {"prompt": marked, "temperature": 0, "n_predict": 8}).json()["content"],
    }  # fmt: skip
    assert said == dict.fromkeys(said, text)
    assert seeing.post("/v1/messages/count_tokens", claude).json() == {"input_tokens": tokens}


def test_notes_stand_for_the_oldest_of_many_images() -> None:
    def turn(count: int, newest: bool = False) -> dict[str, Any]:
        images = tuple(module.Attachment("here", "image", newest, RED64) for _ in range(count))
        return {"role": "user", "content": module.Content(("look", *images)) if count else "words"}

    def counts(*turns: dict[str, Any]) -> list[int]:
        shown = module.without_older_images(turns)
        notes = {m["content"] for m in shown if isinstance(m["content"], str)} - {"words"}
        assert notes <= {"look\n[image left out: this model reads the newest 16 images only]"}
        return [len(m["content"].images()) if isinstance(m["content"], module.Content) else 0 for m in shown]

    assert counts(turn(8), turn(0), turn(8)) == [8, 0, 8]
    assert counts(*[turn(1)] * 17) == [0] * 8 + [1] * 9 == counts(*[turn(1)] * 24)[:8] + [1] * 9
    assert counts(turn(5), turn(5), turn(5), turn(5, True)) == [0, 0, 5, 5]
    assert counts(turn(1), turn(17, True)) == [0, 17]  # which is refused by name


def test_many_texts_beside_an_image_are_joined_in_linear_time() -> None:
    parts = [{"type": "text", "text": "x" * 160}] * 20_000
    content: Any = module.flat_content("content", [{"type": "image", "source": RED_SOURCE["source"]}, *parts])
    began = time.process_time()
    shown: Any = content.shown("seer", lambda _: module.Picture(RED, 1, 1))
    assert len(shown) == 2 and len(shown[1]) == 161 * 20_000 - 1 and time.process_time() - began < 1


RESPONSE_PARTS: Any = [{"type": "input_image", "image_url": RED64}, {"type": "input_text", "text": "Look"}]
PACKAGES: dict[str, Callable[[Server], str]] = {  # ask as their documentation does
    "openai": lambda seeing: seeing.client().chat.completions.create(
        model="seer", **pictured()).choices[0].message.content,
    "openai, responses": lambda seeing: seeing.client().responses.create(
        model="seer", temperature=0, max_output_tokens=8, input=[{"role": "user", "content": RESPONSE_PARTS}]).output_text,
    "anthropic": lambda seeing: anthropic_client(seeing).messages.create(
        model="seer", max_tokens=8, messages=[{"role": "user", "content": [RED_SOURCE, LOOK]}], extra_body={"temperature": 0},
    ).content[0].text,
    "ollama": lambda seeing: ollama_client(seeing).chat(
        "seer", [{"role": "user", "content": "Look", "images": [RED]}], options={"temperature": 0, "num_predict": 8},
    ).message.content,
}  # fmt: skip


@pytest.mark.parametrize("package", PACKAGES)
def test_client_package_shows_the_model_a_picture(package: str, seeing: Server) -> None:
    expected = seeing.post("/v1/chat/completions", pictured()).json()["choices"][0]["message"]["content"]
    assert PACKAGES[package](seeing) == expected


def test_images_beside_a_message_are_shown_and_elsewhere_refused(seeing: Server) -> None:
    ask = {"max_tokens": 8, "temperature": 0}
    turn = {"role": "user", "content": LOOK["text"], "images": [RED64]}
    expected = seeing.post("/v1/chat/completions", pictured()).json()["choices"][0]["message"]["content"]
    found = seeing.post("/v1/chat/completions", {**ask, "messages": [turn]}).json()["choices"][0]["message"]["content"]
    assert found == expected
    for path, field in (("/v1/completions", "images"), ("/completion", "multimodal_data")):
        refused = seeing.post(path, {**ask, "prompt": "Look", field: [RED64]})
        assert refused.status == 400 and field in refused.body.decode()


def test_socket_shows_the_model_a_picture_and_every_list_tells_what_sees(seeing: Server) -> None:
    body = {"model": "seer", "prompt": "Look", "max_tokens": 4, "temperature": 0}
    plain, pictures = (ws_ask(seeing, images=images, **body)[1]["usage"] for images in ([], [RED64, BLUE64]))
    assert pictures["prompt_tokens"] - plain["prompt_tokens"] == 32
    assert {m["id"]: m["vision"] for m in seeing.get("/api/models").json()["models"]}["seer"] is True
    assert "vision" in seeing.post("/api/show", {"model": "seer"}).json()["capabilities"]
    assert seeing.get("/props?model=seer").json()["modalities"]["vision"] is True
    assert seeing.get("/v1/models/seer").json()["architecture"]["input_modalities"] == ["text", "image"]


def test_generate_shows_the_model_a_picture(seeing: Server, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    flags = ("--bind", f"{seeing.host}:{seeing.port}", "--temperature", "0", "--max-tokens", "8", "--json", "--chat")
    done = shimmy("generate", "seer", "Look", "--image", tmp_path / "red.png", *flags, home=tmp_path)
    expected = seeing.post("/v1/chat/completions", pictured()).json()["choices"][0]["message"]["content"]
    assert json.loads(done.stdout)["choices"][0]["text"] == expected


@cases("data, words", {"no picture": (b"cat", "the image is no PNG"), "no file": (None, "No such file")})
def test_generate_refuses_an_image_that_is_none(data: bytes | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "cat.png"
    if data:
        file.write_bytes(data)
    with pytest.raises(module.UsageError, match=re.escape(f"--image {file}: {words}")):
        module.user_turn(argparse.Namespace(image=[str(file)]), "Look")


def test_projector_that_cannot_be_loaded_or_is_not_wanted_leaves_a_model_of_text(seeing: Server) -> None:
    body = pictured(model="gazer")
    assert_error(seeing.post("/v1/chat/completions", body), 400, "invalid_request", "the projector of gazer cannot be loaded")
    assert seeing.chat(model="gazer", max_tokens=4).status == 200
    refused = assert_error(seeing.post("/v1/chat/completions", body), 400, "invalid_request", "gazer reads text only")
    assert refused["param"] == "messages[0].content[0].type"
    assert not {m["id"]: m["vision"] for m in seeing.get("/api/models").json()["models"]}["gazer"]
    assert_error(seeing.post("/api/models/seer/load", {"mmproj": "/etc/passwd"}), 400, "invalid_request", "names a file")
    assert seeing.post("/api/models/seer/load", {"mmproj": "none"}).status == 200
    assert_error(seeing.post("/v1/chat/completions", pictured()), 400, "invalid_request", "seer reads text only")
    assert seeing.post("/api/models/seer/unload").status == 200
    assert seeing.post("/v1/chat/completions", pictured()).status == 200


def test_prompt_that_pictures_make_too_long_is_refused_with_both_numbers(seeing: Server) -> None:
    body = pictured()
    body["messages"][0]["content"] += [{"type": "text", "text": "x" * 490}]
    details = assert_error(seeing.post("/v1/chat/completions", body), 400, "context_length_exceeded")["details"]
    assert "512" in details and int(re.findall(r"\d+", details)[0]) > 512


def test_images_are_fetched_from_open_hosts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def fetch(self: Any, url: str, most: int, deadline: float) -> tuple[int, Any, bytes]:
        asked.append((url, most))
        return (200, {}, RED) if url.endswith("cat.png") else (404, {}, b"")

    monkeypatch.setattr(module.HttpGetter, "fetch", fetch)
    reader = module.PictureReader(module.HttpGetter(["a.example"]), Cancellation())
    cat = module.Attachment("images[0]", "image", True, "HTTPS://a.example/cat.png")
    assert reader.read(cat).data == RED
    with pytest.raises(InvalidRequest, match="its server answers 404"):
        reader.read(replace(cat, source="https://a.example/dog.png"))
    assert [most for _, most in asked] == [module.MAX_PICTURES_BYTES, module.MAX_PICTURES_BYTES - len(RED)]


# ── HTTP ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
# Routes, connections, bodies on the wire, and access.


def test_models_starts_with_default_and_shows_each_models_fields_and_state(server: Server) -> None:
    first, *rest = server.get("/api/models").json()["models"]
    assert (first["id"], first["name"], first["description"]) == (
        "default", "Default Model", "Base GGUF model: recital")  # fmt: skip
    names = {"id", "name", "description", "size_bytes", "model_type", "parameter_count", "quantization",
             "context_length", "state", "loaded"}  # fmt: skip
    assert all(names <= set(model) for model in (first, *rest))
    (recital,) = [model for model in rest if model["id"] == "recital"]
    assert (recital["model_type"], recital["quantization"], recital["context_length"]) == ("llama", "F16", LONG_CTX)
    server.load("recital"), server.unload("dice")
    with server.endless() as stream:
        next(stream)
        state = {model["id"]: (model["state"], model["loaded"]) for model in server.get("/api/models").json()["models"]}
    assert state["recital"] == state["default"] == ("loaded", True)
    assert state["dice"] == ("unloaded", False)


def test_v1_models_has_openai_shape_and_v1_paths_work_without_the_prefix(server: Server) -> None:
    document = server.get("/v1/models").json()
    assert document["object"] == "list"
    models = {model["id"]: model for model in document["data"]}
    assert {"recital", "dice"} <= set(models) and models["dice"]["object"] == "model"
    assert isinstance(models["dice"]["created"], int) and models["dice"]["owned_by"]
    assert server.get("/v1/models/dice").json()["id"] == "dice"
    assert_error(server.get("/v1/models/nonesuch"), 404, "model_not_found", "nonesuch")
    for path in ("/chat/completions", "/completions", "/models"):
        reply = server.get(path) if path == "/models" else server.post(path, {"messages": user("hi"), "prompt": ":"})
        assert reply.status == 200 and reply.json()["object"] in ("list", "chat.completion", "text_completion")


def test_health_has_the_documented_shape(server: Server) -> None:
    server.load("recital")
    for path in ("/api/health", "/health"):
        health = server.get(path).json()
        assert health["status"] == "healthy" and health["models_loaded"] >= 1
        assert re.fullmatch(r"\d+(\.\d+)?(KB|MB|GB)", health["memory_usage"])


@pytest.mark.parametrize(
    "path", ["//api//health", "/api/health/", "/api/health?verbose=1", "///api/health//?a=b&c", "/api/%68ealth"]
)
def test_path_variant_reaches_its_route(path: str, server: Server) -> None:
    assert server.get(path).json()["status"] == "healthy"


def test_head_is_get_without_a_body(server: Server) -> None:
    for path in ("/api/health", "/api/models", "/v1/models", "/diag", "/api/tools"):
        reply = server.request("HEAD", path)
        assert reply.status == 200 and reply.body == b"" and int(reply.headers["Content-Length"]) > 0


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("path", ["/nope", "/api", "/api/models/recital/dance", "/api/generate/more", "/%00"])
def test_unknown_path_is_404_with_the_error_object(method: str, path: str, server: Server) -> None:
    assert "type" not in assert_error(server.request(method, path), 404, "not_found")
    assert assert_error(server.request(method, f"/v1{path}"), 404, "not_found")["type"] == "not_found_error"


WRONG_METHODS = [
    ("GET", "/api/generate", "POST"), ("POST", "/api/health", "GET"), ("DELETE", "/api/models", "GET"),
    ("PUT", "/v1/chat/completions", "POST"), ("PATCH", "/api/tools/calculator/execute", "POST"),
    ("GET", "/api/models/recital/load", "POST"), ("BREW", "/health", "GET"),
]  # fmt: skip


@cases("method, path, allowed", {f"{method} {path}": (method, path, allowed) for method, path, allowed in WRONG_METHODS})
def test_wrong_method_is_405_with_allow(method: str, path: str, allowed: str, server: Server) -> None:
    reply = server.request(method, path)
    assert_error(reply, 405, "method_not_allowed")
    assert allowed in re.split(r",\s*", reply.headers["Allow"])


SENT = json.dumps({"model": "recital", "prompt": ":"}).encode()


@contextlib.contextmanager
def knocking(server: Server) -> Iterator[socket.socket]:
    """A raw connection."""
    with socket.create_connection((server.host, server.port), timeout=HANG) as sock:
        yield sock


def test_connection_is_kept_alive_behind_streams_and_answers_in_order(server: Server) -> None:
    replies = exchange(server, *[head_of("GET", "/health")] * 3)
    assert [reply.status for reply in replies] == [200] * 3
    body = json.dumps({"model": "recital", "prompt": ":", "stream": True})
    with contextlib.closing(server.connect()) as connection:
        for _ in range(3):
            connection.request("POST", "/api/generate", body)
            assert connection.getresponse().read().endswith(b"data: [DONE]\n\n")
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
    with knocking(server) as sock:
        sock.sendall(raw_post("/api/generate", SENT) + head_of("GET", "/nope") + head_of("GET", "/health", "Connection: close"))
        answer = b"".join(iter(lambda: sock.recv(65536), b""))  # to the connection's end
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"404", b"200"]


@pytest.mark.parametrize("path", ["/nope", "/api/generate", "/api/health", "/v1/nope"])
def test_connection_stays_in_sync_after_an_error_with_a_body(path: str, server: Server) -> None:
    with knocking(server) as sock:
        sock.sendall(raw_post(path, b"GET /evil HTTP/1.1\r\n\r\n" * 50))
        first = read_reply(sock)
        assert first.status in (400, 404, 405)
        if first.headers.get("Connection", "").lower() == "close":
            return
        sock.sendall(head_of("GET", "/health"))
        assert read_reply(sock).json()["status"] == "healthy"


def test_connection_stays_in_sync_after_head_and_post(server: Server) -> None:
    with knocking(server) as sock:
        sock.sendall(head_of("HEAD", "/health"))
        assert read_reply(sock, "HEAD").status == 200
        sock.sendall(raw_post("/api/generate", SENT))
        assert read_reply(sock).text == "Hello wide world"
        sock.sendall(head_of("GET", "/health"))
        assert read_reply(sock).status == 200


def send_slowly(sock: socket.socket, data: bytes) -> None:
    """Sends one byte at a time, and waits so that the server reads the first ones alone."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for index, byte in enumerate(data):
        sock.sendall(bytes([byte]))
        if index in (0, 8, 30):
            time.sleep(0.05)


def test_body_sent_one_byte_at_a_time_or_in_chunks_is_read(server: Server) -> None:
    with knocking(server) as sock:
        send_slowly(sock, b"\r\n\r\n" + raw_post("/api/generate", SENT))
        assert read_reply(sock).text == "Hello wide world"
    chunks = b"".join(b"%x;note=1\r\n%s\r\n" % (len(part), part) for part in (SENT[:5], SENT[5:6], SENT[6:]))
    request = head_of("POST", "/api/generate", "Transfer-Encoding: chunked") + chunks + b"0\r\nTrailer: x\r\n\r\n"
    replies = exchange(server, request, head_of("GET", "/health"))
    assert replies[0].text == "Hello wide world" and replies[1].status == 200


@cases("path, most", {
    "text": ("/v1/completions", 16 << 20), "pictures": ("/api/generate", 32 << 20),
    "a tool's arguments": ("/api/tools/calculator/execute", 16 << 20), "no route": ("/nope", None), "no body": ("/health", None),
})  # fmt: skip
def test_body_over_its_bound_is_413_before_it_is_sent(path: str, most: int | None, server: Server) -> None:
    (reply,) = exchange(server, head_of("POST", path, f"Content-Length: {(most or 16 << 20) + 1}"))
    if most:
        assert_error(reply, 413, "payload_too_large", str(most))
    assert reply.json()["error"]["code"]


def test_chunked_body_over_16_mib_is_413_and_one_of_15_accepted(server: Server) -> None:
    with knocking(server) as sock:
        sock.sendall(head_of("POST", "/v1/completions", "Transfer-Encoding: chunked"))
        with contextlib.suppress(ConnectionError):  # the server may stop reading early
            for _ in range(17):
                sock.sendall(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")
        with contextlib.suppress(ConnectionError):
            assert_error(read_reply(sock), 413, "payload_too_large")
    assert server.generate(x="y" * (15 << 20)).text == "Hello wide world"


def test_clients_that_send_slowly_or_do_not_read_do_not_block_others(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            slow = stack.enter_context(socket.create_connection((server.host, server.port)))
            slow.sendall(b"POST /api/generate HTTP/1.1\r\nContent-Length: 100\r\nX: ")
        assert server.get("/health").status == 200
        assert server.generate().text == "Hello wide world"
    server.load("recital")
    with knocking(server) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(raw_post("/api/generate", json.dumps({**json.loads(ENDLESS), "stream": True}).encode()))
        eventually(lambda: server.status("recital")["requests_running"] == 1, "it runs")
        for _ in range(3):
            assert server.generate("=").text == TEXTS["="]
    eventually(lambda: server.status("recital")["requests_running"] == 0, "the generation is cancelled")


BARE = zlib.compressobj(wbits=-15)


@cases("encoding, body", {
    "gzip": ("gzip", gzip.compress(SENT)), "x-gzip": ("X-GZip", gzip.compress(SENT)), "deflate": ("deflate", zlib.compress(SENT)),
    "bare deflate": ("deflate", BARE.compress(SENT) + BARE.flush()), "identity": ("identity", SENT),
})  # fmt: skip
def test_compressed_body_is_read(encoding: str, body: bytes, server: Server) -> None:
    reply = server.post("/api/generate", body, **{"Content-Encoding": encoding})
    assert reply.text == TEXTS[":"]


@cases("encoding, body, status, code, word", {
    "another encoding": ("br", SENT, 415, "invalid_request", "br is not served"),
    "two encodings": ("gzip, gzip", SENT, 415, "invalid_request", "gzip, gzip"),
    "no gzip": ("gzip", SENT, 400, "invalid_request", "not gzip"),
    "half a stream": ("gzip", gzip.compress(SENT)[:-9], 400, "invalid_request", "one whole gzip stream"),
    "two streams": ("gzip", gzip.compress(SENT) * 2, 400, "invalid_request", "one whole gzip stream"),
    "a bomb": ("gzip", gzip.compress(bytes(64 << 20)), 413, "payload_too_large", "unpacked"),
})  # fmt: skip
def test_compressed_body_that_cannot_be_read_is_refused(
    encoding: str, body: bytes, status: int, code: str, word: str, server: Server
) -> None:
    with contextlib.closing(server.connect()) as connection:
        connection.request("POST", "/api/generate", body, {"Content-Encoding": encoding})
        response = connection.getresponse()
        assert_error(Reply(response.status, response.headers, response.read()), status, code, word)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200


@linux
def test_client_that_reads_slowly_gets_all_of_a_large_answer(serve: Serve, models: Path, tmp_path: Path) -> None:
    """Time is counted from one read to the next, not for the whole answer."""
    own = serve("--models-dir", models, script=altered(tmp_path, ("WRITE_SECONDS = 60.0", "WRITE_SECONDS = 1.0")))
    body = json.dumps({"content": "x" * 1_000_000, "model": "recital"}).encode()
    with connect_stalled(own, raw_post("/tokenize", body)) as sock:
        head, received = read_until(sock, b"\r\n\r\n"), 0
        length = int(re.findall(rb"Content-Length: (\d+)", head)[0])
        began = time.monotonic()
        while received < length:
            received += len(piece := sock.recv(1 << 16))
            assert piece, f"{received} of {length}"
            time.sleep(max(0.0, 3.0 * received / length - (time.monotonic() - began)))
    assert time.monotonic() - began > 2.5


def test_our_own_connection_errors_are_no_clients_leaving(serve: Serve, tmp_path: Path) -> None:
    fails = '(_ for _ in ()).throw(ConnectionResetError("ours"))'
    own = serve(script=altered(tmp_path, ("lambda call: call.service.diag()", f"lambda call: {fails}")))
    assert_error(own.get("/diag"), 500, "server_error")
    assert "ConnectionResetError: ours" in own.log.read_text()


def test_expect_100_continue_is_answered_and_http_1_0_not_in_chunks(server: Server) -> None:
    with knocking(server) as sock:
        sock.sendall(head_of("POST", "/api/generate", f"Content-Length: {len(SENT)}", "Expect: 100-continue"))
        assert sock.recv(100).startswith(b"HTTP/1.1 100 ")
        sock.sendall(SENT)
        assert read_reply(sock).text == "Hello wide world"
    body = json.dumps({"model": "recital", "prompt": ":", "stream": True}).encode()
    with knocking(server) as sock:
        sock.sendall(b"POST /api/generate HTTP/1.0\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        reply = read_reply(sock)
    assert reply.status == 200 and reply.body.endswith(b"data: [DONE]\n\n")
    assert "Transfer-Encoding" not in reply.headers


KEYED = [("GET", "/api/models"), ("POST", "/api/generate"), ("GET", "/v1/models"), ("POST", "/v1/chat/completions"),
         ("GET", "/diag"), ("GET", "/api/tools"), ("POST", "/api/tools/calculator/execute"),
         ("POST", "/api/models/recital/load"), ("GET", "/api/models/recital/status"), ("POST", "/api/models/discover"),
         ("HEAD", "/api/models"), ("GET", "/ws/generate")]  # fmt: skip


@cases("method, path", {f"{method} {path}": (method, path) for method, path in KEYED})
@cases("headers", {
    "no key": {}, "another key": {"Authorization": "Bearer wrong"}, "another scheme": {"Authorization": "Basic s3cret"},
    "part of the key": {"x-api-key": "s3cre"}, "the key and one more byte": {"x-api-key": "s3cret\xe9"},
})  # fmt: skip
def test_key_is_required(method: str, path: str, headers: dict[str, str], guarded: Server) -> None:
    reply = guarded.request(method, path, b"{}" if method == "POST" else None, headers)
    assert reply.status == 401
    if method != "HEAD":
        error = assert_error(reply, 401, "unauthorized")
        assert error.get("type") == ("authentication_error" if path.startswith("/v1") else None)


def test_key_is_accepted_and_health_needs_none(guarded: Server) -> None:
    for name, key in {"Authorization": "Bearer s3cret", "authorization": "bearer s3cret", "x-api-key": "s3cret",
                      "X-API-Key": "s3cret"}.items():  # fmt: skip
        assert guarded.request("GET", "/api/models", None, {name: key}).status == 200
    for path in ("/health", "/api/health", "/api/health/"):
        assert guarded.get(path).status == 200


def test_keys_and_prompts_are_never_logged(serve: Serve, models: Path) -> None:
    server = serve("-v", "--models-dir", models, "--api-key", "hush-hush")
    body = {"model": "recital", "prompt": "private words :"}
    assert server.post("/api/generate", body, **{"x-api-key": "hush-hush"}).status == 200
    assert server.post("/api/generate", body, **{"x-api-key": "wrong-key"}).status == 401
    server.stop()
    log = server.log.read_text()
    assert "/api/generate" in log
    assert not [word for word in ("hush-hush", "wrong-key", "private words") if word in log]


def test_loopback_and_allowed_hosts_are_accepted(server: Server, guarded: Server) -> None:
    for host in ("localhost", "LOCALHOST:{port}", "127.0.0.1:{port}", "[::1]:{port}", "127.0.0.2"):
        assert server.get("/api/models", Host=host.format(port=server.port)).status == 200
    for host, status in {"my.box:80": 200, "your.box": 403}.items():
        assert guarded.get("/api/models", **{"Host": host, "x-api-key": "s3cret"}).status == status


FOREIGN = ["https://evil.example", "null", "http://localhost.evil.example", "http://127.0.0.1.evil", "file://",
           "https://evil.example/?http://localhost"]  # fmt: skip
FRIENDLY = ["http://localhost:3000", "http://127.0.0.1", "https://localhost", "http://[::1]:8080", "tauri://localhost",
            "app://obsidian.md", "vscode-webview://abc"]  # fmt: skip


@pytest.mark.parametrize("origin", FOREIGN)
def test_foreign_origin_is_rejected_before_anything_runs(origin: str, server: Server) -> None:
    server.unload("dice")
    reply = server.post("/api/models/dice/load", None, Origin=origin)
    assert_error(reply, 403, "forbidden")
    assert "Access-Control-Allow-Origin" not in reply.headers
    assert server.status("dice")["status"] == "unloaded"


@pytest.mark.parametrize("origin", [*FRIENDLY, "app://.", "app://", "capacitor://localhost", "http://shimmy.localhost:1"])
def test_friendly_origin_is_reflected(origin: str, server: Server) -> None:
    reply = server.get("/api/models", Origin=origin)
    assert reply.status == 200 and reply.headers["Access-Control-Allow-Origin"] == origin
    assert "origin" in reply.headers["Vary"].lower()


def test_friendly_origin_can_read_errors_and_streams_and_none_is_reflected_where_none_is_named(server: Server) -> None:
    origin = {"Origin": "http://localhost:3000"}
    for body in ({"model": "nonesuch", "prompt": ":"}, {"model": "recital", "prompt": ":", "stream": True}):
        reply = server.post("/api/generate", body, **origin)
        assert reply.headers["Access-Control-Allow-Origin"] == origin["Origin"]
        assert {"x-request-id", "request-id"} <= set(reply.headers["Access-Control-Expose-Headers"].lower().split(", "))
    assert "Access-Control-Allow-Origin" not in server.get("/api/models").headers


def test_allowed_origin_is_accepted_and_can_read_the_401(guarded: Server) -> None:
    reply = guarded.get("/api/models", Origin="https://my.app", **{"x-api-key": "s3cret"})
    assert reply.status == 200 and reply.headers["Access-Control-Allow-Origin"] == "https://my.app"
    assert guarded.get("/api/models", Origin="https://my.app.evil", **{"x-api-key": "s3cret"}).status == 403
    reply = guarded.get("/api/models", Origin="https://my.app")
    assert (reply.status, reply.headers["Access-Control-Allow-Origin"]) == (401, "https://my.app")


def preflight(server: Server, origin: str) -> Reply:
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST",
               "Access-Control-Request-Headers": "content-type,authorization"}  # fmt: skip
    return server.request("OPTIONS", "/v1/chat/completions", None, headers)


def test_preflight_needs_no_key_and_opens_to_allowed_origins_alone(guarded: Server) -> None:
    for origin in ("http://localhost:3000", "https://my.app"):
        reply = preflight(guarded, origin)
        assert reply.status == 200 and reply.headers["Access-Control-Allow-Origin"] == origin
        assert "POST" in reply.headers["Access-Control-Allow-Methods"]
        assert "authorization" in reply.headers["Access-Control-Allow-Headers"].lower()
    for origin in ("https://evil.example", "null"):
        reply = preflight(guarded, origin)
        assert reply.status == 200
        assert not [name for name in reply.headers if name.lower().startswith("access-control-allow")]


# Heads


def test_upgrade_head_of_spaces_is_refused_in_linear_time(server: Server) -> None:
    with quickly():
        (reply,) = exchange(server, b"GET /ws/generate HTTP/1.1\r\na:" + b" " * 12_000 + b"\n\r\n\r\n")
        assert_error(reply, 400, "invalid_request")


@pytest.mark.parametrize("path", ["/health", "/ws/generate"])
@pytest.mark.parametrize("line", ["X: a\rY: b", "X: a\0b", "X: a\x1bb", "X: a\x7f", "X: a\r\n folded", "X: a\r\n\tfolded",
                                  "X: a\r"])  # fmt: skip
def test_control_character_or_folded_line_in_a_head_is_400(line: str, path: str, server: Server) -> None:
    upgrade = [f"{name}: {value}" for name, value in UPGRADE.items()] if path != "/health" else []
    (reply,) = exchange(server, head_of("GET", path, *upgrade, line))
    assert_error(reply, 400, "invalid_request")


def test_ws_upgrade_may_be_as_large_as_any_head_and_no_larger(server: Server) -> None:
    lines = [f"{name}: {value}" for name, value in UPGRADE.items()]
    (reply,) = exchange(server, head_of("GET", "/ws/generate", *lines, "X-Large: " + "x" * 100_000))
    assert_error(reply, 431, "invalid_request")
    for more in (["X-Large: " + "x" * 30_000], [f"X-{n}: x" for n in range(90)]):
        with knocking(server) as sock:
            sock.sendall(head_of("GET", "/ws/generate", *lines, *more))
            assert sock.recv(4096).startswith(b"HTTP/1.1 101 ")


def test_foreign_page_may_not_embed_an_answer(server: Server) -> None:
    """Browsers send no Origin with an image; what they say of it is Sec-Fetch-Site."""
    for said in ({}, {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
                 {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}):  # fmt: skip
        assert_error(server.get("/api/models/x/status", **{"Sec-Fetch-Site": "cross-site", **said}), 403, "forbidden")
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert server.get("/", **link).status == 200
    for site in ("same-origin", "same-site", "none"):
        assert server.get("/health", **{"Sec-Fetch-Site": site}).status == 200


@pytest.mark.parametrize("path", ["//ws//generate", "/ws/generate/", "/ws/generate?x=1", "///////ws/generate", "/ws/%67enerate",
                                  "/" * 100 + "ws/generate"])  # fmt: skip
def test_ws_path_is_read_as_any_other(path: str, server: Server) -> None:
    with ws_connect(f"ws://127.0.0.1:{server.port}{path}", proxy=None) as ws:
        ws.send('{"model": "recital", "prompt": ":"}')
        assert ws_answer(ws)[0] == TEXTS[":"]


# Clients that leave, and clients that only end their side

ENDLESS = json.dumps({"model": "recital", "prompt": "#", "max_tokens": LONG_CTX}).encode()


def is_idle(server: Server) -> bool:
    return server.status("recital")["requests_running"] == 0


@contextlib.contextmanager
def running(server: Server, request: bytes, *, more: bytes = b"") -> Iterator[socket.socket]:
    """A raw connection whose request runs."""
    server.load("recital")
    eventually(lambda: is_idle(server), "nothing runs")
    with socket.create_connection((server.host, server.port), timeout=HANG) as sock:
        sock.sendall(request)
        eventually(lambda: not is_idle(server), "it runs")
        if more:
            sock.sendall(more)
            time.sleep(0.1)
        yield sock


@pytest.mark.parametrize("more", [b"\r\n", b"\r\n" * 3, b"\n", head_of("GET", "/health"), b"GET /hea"],
                         ids=["crlf", "crlfs", "lf", "request", "half"])  # fmt: skip
def test_client_that_leaves_behind_more_bytes_stops_the_engine(more: bytes, server: Server) -> None:
    with running(server, raw_post("/api/generate", ENDLESS), more=more):
        pass
    with quickly(10.0):
        eventually(lambda: is_idle(server), "the generation is cancelled")


@pytest.mark.parametrize("more", [b"", b"\r\n", head_of("GET", "/health")], ids=["nothing", "crlf", "request"])
@streamed_and_plain
def test_client_that_ends_its_side_has_left(stream: bool, more: bytes, server: Server) -> None:
    """As in Go's net/http: nothing tells a client that only ends its side from one that is gone."""
    body = json.dumps({**json.loads(ENDLESS), "stream": stream}).encode()
    with running(server, raw_post("/api/generate", body), more=more) as sock, quickly(10.0):
        sock.shutdown(socket.SHUT_WR)
        eventually(lambda: is_idle(server), "the generation is cancelled")


@pytest.mark.parametrize("ahead", [b"", b"GET /health HT"], ids=["nothing", "half a request"])
def test_watcher_keeps_what_a_client_sends_ahead(ahead: bytes) -> None:
    watcher, cancel, (ours, theirs) = Watcher(), Cancellation(), socket.socketpair()
    incoming = module.Incoming(ours)
    with contextlib.closing(ours), contextlib.closing(theirs), watcher.watching(incoming, cancel):
        theirs.sendall(ahead)
        time.sleep(0.1)
        assert not cancel.cancelled
        theirs.close()
        eventually(lambda: cancel.cancelled, "it has left")
        assert not ahead or io.BufferedReader(incoming).read(len(ahead)) == ahead


# Trust

STRANGE = ["http://127.0.0.1:80.evil.example", "http://127.0.0.1:80@evil.example", "http://user@127.0.0.1", "http://127.0.0.1:",
           "http://localhost:999999", "http://[127.0.0.1", "http://", "http://localhost.", "http://localhost/", "http:localhost",
           "http://localhost:80 ", "http://localhost#", "app://x/evil", "//localhost"]  # fmt: skip


@pytest.mark.parametrize("origin", STRANGE)
def test_strange_origin_is_refused_and_not_reflected(origin: str, server: Server) -> None:
    if origin.endswith(" "):
        origin = origin[:-1] + "\xa0"
    reply = server.post("/api/tools/calculator/execute", {"expression": "1"}, Origin=origin)
    assert_error(reply, 403, "forbidden")
    assert "Access-Control-Allow-Origin" not in reply.headers


@pytest.mark.parametrize("host", [
    "evil.example", "127.0.0.1.evil.example", "10.0.0.1", "localhost.evil", "", "user@127.0.0.1", "127.0.0.1.", "localhost.",
    "localhost:", "localhost:x", "127.0.0.1:80.evil", "localhost:99999", "[127.0.0.1", "[::1", "::1", "[::1]evil", "[]",
    "localhost/x", "[::1%25lo]",
])  # fmt: skip
def test_strange_host_is_refused(host: str, server: Server) -> None:
    assert_error(server.get("/api/models", Host=host), 403, "forbidden")


def test_key_is_trimmed(serve: Serve) -> None:
    """A file with Windows' line ends leaves a carriage return behind the key."""
    server = serve(env={"SHIMMY_API_KEY": " s3cret\r"})
    assert server.get("/api/models", **{"x-api-key": "s3cret"}).status == 200
    assert server.get("/api/models", **{"x-api-key": "s3cre"}).status == 401


# Connections and descriptors


def wrapper(folder: Path, *lines: str) -> Path:
    """A script that runs shimmy.py after `lines`."""
    path = repr(str(SHIMMY))
    runs = ["import runpy, sys", *lines, f"sys.argv[0] = {path}", f"runpy.run_path({path}, run_name='__main__')"]
    (folder / "wrapper.py").write_text("\n".join(runs))
    return folder / "wrapper.py"


def limited(folder: Path, soft: int, hard: int) -> Path:
    return wrapper(folder, "import resource", f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))")


@linux
def test_descriptor_limit_is_raised(serve: Serve, tmp_path: Path) -> None:
    server = serve(script=limited(tmp_path, 128, 2000))
    (line,) = [line for line in Path(f"/proc/{server.process.pid}/limits").read_text().splitlines() if "open files" in line]
    assert line.split()[3:5] == ["2000", "2000"]


@linux
def test_connections_are_bounded_by_the_descriptors_there_are(serve: Serve, tmp_path: Path) -> None:
    server = serve(script=limited(tmp_path, 200, 200))
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.create_connection((server.host, server.port), timeout=HANG)) for _ in range(120)]
        for sock in socks:
            sock.sendall(head_of("GET", "/health"))
        statuses = [read_reply(sock).status for sock in socks]
        assert set(statuses) == {200, 503} and 20 <= statuses.count(200) < 100
    eventually(lambda: server.get("/health").status == 200, "there is room again")


@linux
def test_connections_without_a_descriptor_wait_without_spinning(serve: Serve) -> None:
    import resource

    server = serve()
    assert server.get("/health").status == 200
    opened = len(os.listdir(f"/proc/{server.process.pid}/fd"))
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (opened + 3, opened + 3))  # a limit that nobody foresaw
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.create_connection((server.host, server.port), timeout=HANG)) for _ in range(8)]
        for sock in socks:
            sock.sendall(head_of("GET", "/health"))
        assert read_reply(socks[0]).status == 200
        assert not select.select(socks[-1:], [], [], 0.5)[0], "the last one waits"
        before = processor_seconds(server)
        time.sleep(1.0)
        assert processor_seconds(server) - before < 0.3
        for sock in socks:
            sock.close()
    eventually(lambda: server.get("/health").status == 200, "there is room again")


def processor_seconds(server: Server) -> float:
    user, system = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def test_connection_without_a_thread_is_answered_503(serve: Serve, tmp_path: Path) -> None:
    started = "super().process_request(request, client_address)"
    server = serve(script=altered(tmp_path, (started, "raise RuntimeError('no new thread')")))
    for _ in range(40):  # more than are kept waiting
        assert_error(server.get("/health"), 503, "overloaded", "thread")


# Clients that read slowly or never, many at once, and connections used for long.


def logprobs_of_20(path: str = "/v1/chat/completions") -> bytes:
    body = TONGUES["chat"].body() | {"logprobs": True, "top_logprobs": 20}
    return raw_post(path, json.dumps(body).encode())


def connect_stalled(server: Server, request: bytes) -> socket.socket:
    """A connection with a small buffer, on which a request was sent and nothing is read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(HANG)
    sock.connect((server.host, server.port))
    sock.sendall(request)
    return sock


def test_client_too_far_behind_is_given_up_and_told_why(serve: Serve, models: Path, tmp_path: Path) -> None:
    script = altered(tmp_path, ("MAX_UNREAD = 4 * MIB", "MAX_UNREAD = MIB // 4"))
    own = serve("--models-dir", models, "--ctx", str(LONG_CTX), script=script)
    own.load("recital")
    with connect_stalled(own, logprobs_of_20()) as sock:
        eventually(lambda: requests_of(own) == (1, 0), "it runs")
        nobody_running = eventually(lambda: requests_of(own)[0] == 0, "the engine's work for it ends")
        body = read_reply(sock).body
    assert nobody_running and "too slowly" in last_document(body)["error"]["details"]
    said = [json.loads(line[6:]) for line in body.splitlines() if line.startswith(b"data: ")][:-1]
    text = "".join(d["choices"][0]["delta"].get("content") or "" for d in said)
    assert ("Tick " + "tock tick " * LONG_CTX).startswith(text.rstrip() + " ") and len(text) > 1000


def test_300_clients_at_once_are_all_answered(server: Server) -> None:
    tongues = [t for t, _ in zip(itertools.cycle(TONGUES.values()), range(300), strict=False)]
    with ThreadPoolExecutor(300) as pool:
        replies = list(pool.map(lambda t: server.post(t.path, t.body("hi")), tongues))
    assert all(r.status == 200 and ends_well(r.body) for r in replies)


@linux
def test_connection_serves_thousands_of_requests(server: Server) -> None:
    for t in TONGUES.values():  # the helpers that render templates start
        server.post(t.path, t.body("hi", stream=False))
    before = held(server)
    requests: list[tuple[str, str, bytes | None]] = [("GET", "/api/models/recital/status", None), ("GET", "/health", None)] * 50
    requests += [("POST", t.path, encoded(t.body("hi", stream=False))) for t in TONGUES.values()]
    with contextlib.closing(server.connect()) as connection:
        for method, path, body in requests * 20:
            connection.request(method, path, body)
            response = connection.getresponse()
            assert response.status == 200 and response.read()
        used = connection.sock
        assert used is not None
    assert_holds_as_before(server, before)


# Browser attacks.


def plain_path(route: module.Route) -> str:
    """A route's address, with the name of a model or tool in it."""
    name = "calculator" if "tools" in route.path else "dice"
    return "/" + "/".join(name if part == "{}" else part for part in route.path)


ADDRESSES = sorted({(route.method, plain_path(route)) for route in module.ROUTES})
CORS = "Access-Control-Allow-Origin"
ASKING = {"model": "dice", "prompt": "x", "input": "x", "content": "x", "messages": [{"role": "user", "content": "x"}],
          "max_tokens": 1, "expression": "1"}  # fmt: skip
CONTENT_TYPES = ["application/json", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]


@pytest.mark.parametrize("content_type", CONTENT_TYPES)
def test_foreign_page_is_refused_on_every_route(content_type: str, server: Server) -> None:
    server.unload("dice")
    headers = {"Origin": "https://evil.example", **({"Content-Type": content_type} if content_type else {})}
    for method, path in ADDRESSES:
        reply = server.request(method, path, ASKING if method == "POST" else None, headers)
        assert (reply.status, reply.headers[CORS]) == (403, None), (method, path)
    assert server.status("dice")["status"] == "unloaded"


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND", "get", "X" * 50])
def test_foreign_page_is_refused_with_every_method(method: str, server: Server) -> None:
    for path in ("/", "/health", "/api/models", "/v1/chat/completions", "/api/models/dice/load", "/nope"):
        reply = server.request(method, path, None, {"Origin": "null"})
        assert (reply.status, reply.headers[CORS]) == (403, None), path


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:{port}", "[::2]:{port}", "localhost.:{port}", "0.0.0.0",
                                  "user@localhost", "169.254.169.254", "localhost:80:80",
                                  "localhost\\@evil.example"])  # fmt: skip
def test_rebound_name_is_refused_on_every_route(host: str, server: Server) -> None:
    server.unload("dice")
    with contextlib.closing(server.connect()) as connection:
        for method, path in [*ADDRESSES, ("OPTIONS", "/v1/models"), ("GET", "/nope")]:
            connection.request(method, path, json.dumps(ASKING), {"Host": host.format(port=server.port)})
            response = connection.getresponse()
            assert response.status == 403, (method, path)
            response.read()
    assert server.status("dice")["status"] == "unloaded"


@pytest.mark.parametrize("target", ["http://evil.example/api/models", "http://evil.example:80/api/models", "http:///api/models",
                                    "http://127.0.0.1@evil.example/api/models", "//evil.example/api/models",
                                    "http://user@127.0.0.1/api/models"])  # fmt: skip
def test_address_that_names_another_host_is_refused(target: str, server: Server) -> None:
    """RFC 9112, 3.2.2: the host in the address counts, not the header."""
    other, own = exchange(server, head_of("GET", target)), exchange(server, head_of("GET", "http://127.0.0.1/api/health?x=1"))
    assert 400 <= other[0].status < 500 and other[0].json()["error"]["code"] in ("invalid_request", "not_found", "forbidden")
    assert own[0].json()["status"] == "healthy"


def upgrade_of(path: str, **headers: str) -> bytes:
    fields = {**UPGRADE, **headers}
    lines = [f"{name}: {value}" for name, value in fields.items() if name != "Host"]
    return head_of("GET", path, *lines).replace(b"Host: 127.0.0.1", b"Host: " + fields.get("Host", "127.0.0.1").encode())


@pytest.mark.parametrize("path", ["/ws/generate", "//ws///generate/", "/ws/generate?x=http://localhost"])
def test_ws_of_a_foreign_page_or_name_is_refused(path: str, server: Server) -> None:
    for origin in [*FOREIGN, *(origin for origin in STRANGE if origin.strip() == origin), ""]:
        assert_error(exchange(server, upgrade_of(path, Origin=origin))[0], 403, "forbidden")
    for host in ("evil.example", "127.0.0.1.", "user@127.0.0.1", "[::2]"):
        assert_error(exchange(server, upgrade_of(path, Host=host))[0], 403, "forbidden")


def test_ws_with_two_origins_is_refused(server: Server) -> None:
    two = b"\r\nOrigin: https://evil.example\r\nOrigin"
    request = upgrade_of("/ws/generate", Origin="http://localhost").replace(b"\r\nOrigin", two)
    assert exchange(server, request)[0].status in (400, 403)


opened = serving("--model", "recital", "--allow-origin", "*")  # to pages of any origin


@pytest.mark.parametrize("origin", ["https://my.app", "null", "http://192.168.1.5:3000"])
def test_page_of_any_origin_is_answered_once_that_is_allowed(origin: str, opened: Server) -> None:
    body = {"model": "recital", "prompt": ":"}
    replies = [opened.post("/api/generate", {**body, "stream": stream}, Origin=origin) for stream in (False, True)]
    replies += [opened.get("/nope", Origin=origin), opened.request("OPTIONS", "/api/generate", None, {"Origin": origin})]
    assert [(reply.status, reply.headers[CORS]) for reply in replies] == [(s, origin) for s in (200, 200, 404, 200)]
    assert all("Access-Control-Allow-Credentials" not in reply.headers for reply in replies)
    with opened.ws(additional_headers={"Origin": origin}) as ws:
        ws.send(json.dumps(body))
        assert ws_answer(ws)[0] == TEXTS[":"]
    assert_error(opened.get("/api/models", Host="evil.example", Origin=origin), 403, "forbidden")  # a name of another machine


@pytest.mark.parametrize("asked", ["x\r\nSet-Cookie: a=b", "authorization,<script>", "a" * 3000])
def test_preflight_repeats_no_header_that_is_none(asked: str, opened: Server) -> None:
    lines = ("Origin: https://my.app", f"Access-Control-Request-Headers: {asked}")
    (reply,) = exchange(opened, head_of("OPTIONS", "/v1/chat/completions", *lines))
    assert "Set-Cookie" not in reply.headers and "<" not in (reply.headers["Access-Control-Allow-Headers"] or "")


# HTTP abuse.


BAD_LENGTHS: dict[str, tuple[str, int]] = {  # lines of a head, and the status
    "a length and chunks": ("Content-Length: 5\r\nTransfer-Encoding: chunked", 400),
    "two lengths": ("Content-Length: 5\r\nContent-Length: 6", 400),
    "a negative length": ("Content-Length: -1", 400),
    "a length that is not a number": ("Content-Length: five", 400),
    "a length with a sign": ("Content-Length: +5", 400),
    "an encoding that is not chunked": ("Transfer-Encoding: gzip", 400),
    "a length of 30 digits": ("Content-Length: " + "9" * 30, 400),
    "a length of 15 digits": ("Content-Length: " + "9" * 15, 413),
    "a length in hexadecimal": ("Content-Length: 0x10", 400),
    "a list of lengths": ("Content-Length: 5, 5", 400),
    "a length and a unit": ("Content-Length: 5 bytes", 400),
    "an empty length": ("Content-Length:", 400),
    "a fraction": ("Content-Length: 5.0", 400),
    "digits of another script": ("Content-Length: \u00b2", 400),
    "no length at all": ("X: y", 411),
    "chunked twice": ("Transfer-Encoding: chunked, chunked", 400),
    "compressed chunks": ("Transfer-Encoding: gzip, chunked", 400),
    "chunked and more": ("Transfer-Encoding: chunked, identity", 400),
    "almost chunked": ("Transfer-Encoding: xchunked", 400),
    "chunked in quotes": ('Transfer-Encoding: "chunked"', 400),
    "two encodings": ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", 400),
    "an empty encoding": ("Transfer-Encoding:", 400),
    "an encoding and an empty length": ("Transfer-Encoding: chunked\r\nContent-Length:", 400),
}


@cases("lines, status", BAD_LENGTHS)
def test_body_of_unclear_length_is_refused_and_ends_the_connection(lines: str, status: int, server: Server) -> None:
    with knocking(server) as sock:
        sock.sendall(head_of("POST", "/api/generate", lines) + head_of("GET", "/smuggled"))
        reply = read_reply(sock)
        assert reply.status == status and reply.headers["Connection"] == "close"
        assert status != 411 or assert_error(reply, 411, "invalid_request", "Content-Length")
        with contextlib.suppress(ConnectionError):
            assert sock.recv(1) == b""


@cases("line", {"an encoding": b"Transfer-Encoding: \xa0chunked", "a length": b"Content-Length: \x852\xa0",
                "a length in other digits": "Content-Length: ٢".encode()})  # fmt: skip
def test_only_http_s_own_blanks_and_digits_count(line: bytes, server: Server) -> None:
    """A proxy before us would read another length."""
    (reply,) = exchange(server, b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\n" + line + b"\r\n\r\n{}")
    assert_error(reply, 400, "invalid_request")


def test_length_said_twice_alike_is_read_and_chunks_in_http_1_0_are_refused(server: Server) -> None:
    body = b'{"expression": "1+1"}'
    request = head_of("POST", "/api/tools/calculator/execute", *[f"Content-Length: {len(body)}"] * 2) + body
    replies = exchange(server, request, head_of("GET", "/health"))
    assert [reply.status for reply in replies] == [200, 200]
    # RFC 9112, 6.1: such a request is faulty; what stands before it may have read its body otherwise.
    head = b"POST /api/generate HTTP/1.0\r\nHost: localhost\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n"
    (reply,) = exchange(server, head + b"0\r\n\r\n")
    assert_error(reply, 400, "invalid_request")
    assert reply.headers["Connection"] == "close"


BAD_CHUNKS = {
    "a size that is not a number": b"zz\r\nhello\r\n0\r\n\r\n",
    "a negative size": b"-5\r\nhello\r\n0\r\n\r\n",
    "no line end after the data": b"5\r\nhelloXX0\r\n\r\n",
    "no size": b"\r\n\r\n",
    "a size beyond 64 bits": b"ffffffffffffffff\r\nx",
    "a size of 17 digits": b"00000000000000005\r\nhello\r\n0\r\n\r\n",
    "a size with a prefix": b"0x5\r\nhello\r\n0\r\n\r\n",
    "a size with a sign": b"+5\r\nhello\r\n0\r\n\r\n",
    "a size with an underscore": b"1_0\r\nhello\r\n0\r\n\r\n",
    "an extension of 2000 bytes": b"5;" + b"x" * 2000 + b"\r\nhello\r\n0\r\n\r\n",
    "a chunk shorter than its size": b"9\r\nhello\r\n0\r\n\r\n    ",
    "200 trailers": b"0\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    "a trailer of 2000 bytes": b"0\r\nX: " + b"y" * 2000 + b"\r\n\r\n",
    "a size's line that ends in a bare LF": b"5\nhello\r\n0\r\n\r\n",
    "a chunk that ends in a bare LF": b"5\r\nhello\n0\r\n\r\n",
    "a chunk with blanks behind it": b"5\r\nhello   \r\n0\r\n\r\n",
    "a blank that is none of HTTP's": b"\xa05\r\nhello\r\n0\r\n\r\n",
}


@cases("chunks", BAD_CHUNKS)
def test_bad_chunks_are_refused_and_end_the_connection(chunks: bytes, server: Server) -> None:
    (reply,) = exchange(server, head_of("POST", "/api/generate", "Transfer-Encoding: chunked") + chunks)
    assert_error(reply, 400, "invalid_request")
    assert reply.headers["Connection"] == "close"


@cases("head, statuses", {
    "101 headers": (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"A:b\r\n" * 100 + b"\r\n", {431}),
    "20,000 headers": (b"GET /health HTTP/1.1\r\n" + b"A:b\r\n" * 20_000 + b"\r\n", {431}),
    "a header of 100 KB": (b"GET /health HTTP/1.1\r\nA: " + b"b" * 100_000 + b"\r\n\r\n", {431}),
    "a line of 100 KB": (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", {414, 431}),
    "bytes without a line": (b"\x80" * 100_000, {414}),
    "one word": (b"GARBAGE\r\n\r\n", {400}),
    "no version": (b"GET /health\r\n\r\n", {400}),
    "no path": (b"GET  HTTP/1.1\r\n\r\n", {400}),
    "version 9.9": (b"GET /health HTTP/9.9\r\n\r\n", {400}),
    "a TLS handshake": (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", {400}),
    "a header without a colon": (b"GET /health HTTP/1.1\r\nno colon here\r\n\r\n", {400}),
    "a space in a header's name": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nA B: 1\r\n\r\n", {400}),
    "a space before the colon": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length : 5\r\n\r\n", {400}),
    "a second Host": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", {400}),
    "two Origins": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\nOrigin: x\r\n\r\n", {400}),
    "half an address as its host": (b"GET /health HTTP/1.1\r\nHost: [\r\n\r\n", {403}),
    "half an address in its line": (b"GET http://[x/ HTTP/1.1\r\nHost: localhost\r\n\r\n", {400}),
    "HTTP/2's preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 405}),
    "version 2": (b"GET /health HTTP/2.0\r\nHost: localhost\r\n\r\n", {400}),
    "version 1.1.1": (b"GET /health HTTP/1.1.1\r\nHost: localhost\r\n\r\n", {400}),
    "version -1": (b"GET /health HTTP/-1.1\r\nHost: localhost\r\n\r\n", {400}),
    "version 1.99999999999": (b"GET /health HTTP/1.99999999999\r\nHost: localhost\r\n\r\n", {400}),
    "another protocol": (b"GET /health RTSP/1.0\r\nHost: localhost\r\n\r\n", {400}),
    "four words": (b"GET /api models HTTP/1.1\r\nHost: localhost\r\n\r\n", {400}),
    "a method alone": (b"GET\r\n\r\n", {400}),
    "a method of 20 KB": (b"G" * 20_000 + b" /health HTTP/1.1\r\nHost: localhost\r\n\r\n", {405}),
    "a method that is no token": (b"G<T /health HTTP/1.1\r\nHost: localhost\r\n\r\n", {405}),
    "a method in another script": (b"G\xc3\x89T /health HTTP/1.1\r\nHost: localhost\r\n\r\n", {405}),
    "a proxy's CONNECT": (b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n", {400, 404}),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", {400}),
    "a port as its host": (b"GET /health HTTP/1.1\r\nHost: :80\r\n\r\n", {403}),
    "bytes that are no text in its path": (b"GET /\xff\xfe/\xc0\xaf HTTP/1.1\r\nHost: localhost\r\n\r\n", {404}),
    "a header without a name": (b"GET /health HTTP/1.1\r\nHost: localhost\r\n: x\r\n\r\n", {400}),
    "a header that is an end": (b"GET /health HTTP/1.1\r\nHost: localhost\r\n:\r\n\r\n", {400}),
})  # fmt: skip
def test_bad_head_is_the_clients_fault(head: bytes, statuses: set[int], server: Server) -> None:
    (reply,) = exchange(server, head)
    assert reply.status in statuses, reply.body
    assert reply.json()["error"]["code"] and reply.headers["Content-Type"] == "application/json"


STRANGE_NAMES = ["..%2f..%2fetc%2fpasswd", "%2e%2e", "..", "%00", "nice%00.gguf", "%2Fetc%2Fpasswd", "%", "%zz", "%ff%fe",
                 "dice%2f..%2fdice", "%0d%0aX:%20y", "%1b%5b2J", "a" * 4000, "%F0%9F%98%80", "c%3a%5cx"]


@pytest.mark.parametrize("name", STRANGE_NAMES)
def test_name_in_an_address_is_only_a_name(name: str, server: Server) -> None:
    for address in (f"GET /api/models/{name}/status", f"POST /api/models/{name}/load", f"GET /v1/models/{name}"):
        method, path = address.split()
        assert_error(server.request(method, path), 404, "model_not_found")
    assert_error(server.post(f"/api/tools/{name}/execute", {}), 404, "not_found")


@pytest.mark.parametrize("path", ["/api%2fmodels", "/api/models%2fdice%2fload", "/api/../api/models", "/api/./models",
                                  "/%2e/health", "/health%00", "/health;x=1", "/HEALTH", "/api/models/.."])  # fmt: skip
def test_encoded_slash_or_dot_is_no_way_to_another_route(path: str, server: Server) -> None:
    assert exchange(server, head_of("GET", path))[0].status == 404


def test_thousands_of_query_fields_and_hundreds_of_pipelined_requests_are_answered(server: Server) -> None:
    reply = server.get("/health?" + "&".join(f"a{i}=%ff" for i in range(6000)))
    assert reply.status == 200
    with knocking(server) as sock:
        for i in range(300):
            sock.sendall(raw_post("/api/tools/calculator/execute", b'{"expression": "%d"}' % i))
        reader = sock.makefile("rb")
        assert [next_result(reader) for _ in range(300)] == list(range(300))


def next_result(reader: Any) -> Any:
    """The next answer of a tool from a connection with several."""
    while line := reader.readline().strip():
        if line.startswith(b"Content-Length: "):
            length = int(line[16:])
    return json.loads(reader.read(length))["result"]


def test_a_hundred_slow_heads_and_twenty_slow_bodies_keep_nobody_waiting(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection((server.host, server.port))) for _ in range(120)]
        for i, sock in enumerate(slow):
            whole = raw_post("/api/generate", json.dumps({"model": "recital", "prompt": ":"}).encode())
            sock.sendall(whole[: 30 if i < 100 else -5])
        with quickly(20.0):
            assert [server.generate(prompt).text for prompt in TEXTS] == list(TEXTS.values())
            assert ws_ask(server, prompt=":")[0] == TEXTS[":"]
        slow[-1].sendall(whole[-5:])
        assert read_reply(slow[-1]).text == TEXTS[":"]


# waits a second for a request, asks WebSockets for a sign of life, and ends those that are idle
hasty = serving(changes=(
    ("REQUEST_SECONDS = 30.0", "REQUEST_SECONDS = 1.0"), ("SOCKET_PING_SECONDS = 20.0", "SOCKET_PING_SECONDS = 0.3"),
    ("SOCKET_IDLE_SECONDS = 3600.0", "SOCKET_IDLE_SECONDS = 2.0"),
))  # fmt: skip


def test_slow_head_and_slow_body_end_after_their_time(hasty: Server) -> None:
    with contextlib.ExitStack() as stack:
        for start in (b"GET /hea", head_of("POST", "/api/generate", "Content-Length: 9") + b"{", b"GET /ws/gen"):
            sock = stack.enter_context(socket.create_connection((hasty.host, hasty.port), timeout=HANG))
            sock.sendall(start)
            with contextlib.suppress(ConnectionError):
                while sock.recv(4096):
                    pass
    assert hasty.get("/health").status == 200


@linux
def test_connections_far_beyond_the_descriptors_leave_the_server_working(serve: Serve, tmp_path: Path, models: Path) -> None:
    own = serve("--models-dir", models, script=limited(tmp_path, 160, 160))
    with contextlib.ExitStack() as stack:
        for _ in range(400):
            sock = stack.enter_context(socket.socket())
            sock.settimeout(HANG)
            sock.connect((own.host, own.port))
            with contextlib.suppress(ConnectionError):  # refused ones are closed
                sock.sendall(b"GET /h")
        first = stack.pop_all()
    first.close()
    eventually(lambda: own.get("/health").status == 200, "there is room again")
    assert own.generate().text == TEXTS[":"]  # an engine needs descriptors too
    assert "Traceback" not in own.log.read_text()


# Metrics.


class Scraped:
    """What `/metrics` says, as Prometheus' own package reads it."""

    def __init__(self, text: str) -> None:
        parser = pytest.importorskip("prometheus_client.parser")
        self.families = {family.name: family for family in parser.text_string_to_metric_families(text)}
        self.samples = {(s.name, *sorted(s.labels.items())): s.value for f in self.families.values() for s in f.samples}

    def __call__(self, name: str, **labels: str) -> float:
        """The value of the one sample of this name and these labels; 0 while there is none."""
        return self.samples.get((name, *sorted(labels.items())), 0.0)

    def of(self, model: str, name: str, **labels: str) -> float:
        return self(name, model_name=model, **labels)


def scrape(server: Server) -> Scraped:
    reply = server.get("/metrics")
    assert reply.status == 200, reply.body
    return Scraped(reply.body.decode())


KNOWN = {  # what dashboards ask for, by the type they take it for
    "counter": ["llamacpp:prompt_tokens", "llamacpp:prompt_seconds", "llamacpp:tokens_predicted",
                "llamacpp:tokens_predicted_seconds", "vllm:prompt_tokens", "vllm:generation_tokens",
                "vllm:prefix_cache_queries", "vllm:prefix_cache_hits", "vllm:request_success",
                "shimmy_requests", "shimmy_model_loads", "shimmy_model_load_failures",
                "shimmy_engine_deaths", "shimmy_connections_refused"],
    "gauge": ["llamacpp:prompt_tokens_seconds", "llamacpp:predicted_tokens_seconds", "llamacpp:kv_cache_usage_ratio",
              "llamacpp:requests_processing", "llamacpp:requests_deferred", "vllm:num_requests_running",
              "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "shimmy_model_memory_bytes", "shimmy_open_connections",
              "process_start_time_seconds", "process_resident_memory_bytes"],
    "histogram": ["vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds",
                  "vllm:e2e_request_latency_seconds", "vllm:request_queue_time_seconds", "vllm:request_prefill_time_seconds",
                  "vllm:request_decode_time_seconds", "vllm:request_prompt_tokens", "vllm:request_generation_tokens"],
}  # fmt: skip


def test_metrics_have_the_names_and_types_that_dashboards_know(server: Server) -> None:
    server.generate()
    families = scrape(server).families
    assert {name: families[name].type for names in KNOWN.values() for name in names} == {
        name: type for type, names in KNOWN.items() for name in names
    }
    assert all(family.documentation for family in families.values())


def test_metrics_are_prometheus_text_answer_head_and_hold_each_series_once(server: Server) -> None:
    reply, head = server.get("/metrics"), server.request("HEAD", "/metrics")
    assert reply.headers["Content-Type"] == head.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert reply.body.endswith(b"\n") and head.body == b"" and int(head.headers["Content-Length"]) > 1000
    ws_ask(server, prompt=":")
    lines = [line.rpartition(" ")[0] for line in server.get("/metrics").body.decode().splitlines()]
    series = [line for line in lines if not line.startswith("#")]
    assert len(set(series)) == len(series) > 100
    text = server.get("/metrics").body.decode()
    assert re.search(r"(?m)^llamacpp:prompt_tokens_total \d+$", text)
    assert "llamacpp:" in text and not re.search(r"llamacpp:\w+\{", text)


def test_metrics_need_the_key(guarded: Server) -> None:
    assert_error(guarded.get("/metrics"), 401, "unauthorized")
    assert guarded.get("/metrics", Authorization="Bearer s3cret").status == 200


def test_tokens_and_cache_hits_are_counted_and_histograms_hold_each_request_once(serve: Serve, models: Path) -> None:
    own = serve("--models-dir", models)
    used = [own.generate("="), own.generate("a longer prompt ="), own.chat("count"), own.generate("Once", "dice", max_tokens=7)]
    usage = [reply.json()["usage"] for reply in used]
    now = scrape(own)
    assert now("llamacpp:tokens_predicted_total") == sum(u["completion_tokens"] for u in usage)
    assert now.of("dice", "vllm:generation_tokens_total") == usage[3]["completion_tokens"]
    assert now.of("recital", "vllm:prompt_tokens_total") == sum(u["prompt_tokens"] for u in usage[:3])
    computed = now("llamacpp:prompt_tokens_total") + now("llamacpp:prompt_tokens_cached_total")
    assert computed == sum(u["prompt_tokens"] for u in usage)
    for name in KNOWN["histogram"]:
        samples = [s for s in now.families[name].samples if s.labels["model_name"] == "recital"]
        buckets = [s.value for s in samples if s.name == f"{name}_bucket"]
        assert buckets == sorted(buckets) and buckets[-1] == now.of("recital", f"{name}_count"), name
        assert now.of("recital", f"{name}_sum") > 0 or "latency" in name or "per_output" in name
        assert buckets[-1] == 3 or "inter_token" in name or name.endswith(":time_per_output_token_seconds"), name
    for _ in range(2):
        last = own.chat("count " * 20, "dice").json()["usage"]
    then = scrape(own)
    asked = then.of("dice", "vllm:prefix_cache_queries_total") - now.of("dice", "vllm:prefix_cache_queries_total")
    hits = then.of("dice", "vllm:prefix_cache_hits_total") - now.of("dice", "vllm:prefix_cache_hits_total")
    assert asked == 2 * last["prompt_tokens"] and hits == last["prompt_tokens_details"]["cached_tokens"] > 50


def test_time_to_first_token_has_the_load_in_it(serve: Serve, models: Path, tmp_path: Path) -> None:
    script = altered(tmp_path, (CONTEXT_BEGINS, "        time.sleep(0.3)\n" + CONTEXT_BEGINS))
    own = serve("--models-dir", models, script=script)
    own.generate(":")
    now = scrape(own)
    assert now.of("recital", "vllm:time_to_first_token_seconds_sum") > 0.3
    queued, computed = (now.of("recital", f"vllm:request_{what}_time_seconds_sum") for what in ("queue", "inference"))
    assert queued > 0.3 > computed > 0


def test_stream_shows_while_it_runs_and_the_tokens_of_a_client_that_left_are_counted(serve: Serve, models: Path) -> None:
    own = serve("--models-dir", models, "--ctx", str(LONG_CTX))
    with own.endless() as stream:
        next(stream)
        now = eventually(lambda: (s := scrape(own))("llamacpp:kv_cache_tokens") > 100 and s, "cells are in use")
        assert now.of("recital", "vllm:num_requests_running") == now("llamacpp:requests_processing") == 1
        assert 0 < now.of("recital", "vllm:kv_cache_usage_perc") == now("llamacpp:kv_cache_usage_ratio") <= 1
        before = now.of("recital", "vllm:generation_tokens_total")
        eventually(lambda: scrape(own).of("recital", "vllm:generation_tokens_total") > before > 0, "tokens count as they come")
    ended = functools.partial(Scraped.of, model="recital", name="vllm:request_success_total")
    now = eventually(lambda: ended(s := scrape(own), finished_reason="abort") and s, "the end is counted")
    assert now.of("recital", "vllm:generation_tokens_total") > 0 and now.of("recital", "vllm:prompt_tokens_total") == 2
    eventually(lambda: scrape(own)("llamacpp:kv_cache_tokens") == 0, "nobody holds cells")


@cases("body, reason", {"its own end": ({}, "stop"), "max_tokens": ({"max_tokens": 2}, "length")})
def test_ends_are_counted_by_reason(body: dict[str, Any], reason: str, server: Server) -> None:
    before = scrape(server).of("recital", "vllm:request_success_total", finished_reason=reason)
    server.generate(":", **body)
    assert scrape(server).of("recital", "vllm:request_success_total", finished_reason=reason) == before + 1


@linux
def test_loads_and_deaths_of_engines_are_counted_and_no_counter_falls(serve: Serve, models: Path) -> None:
    own, seen = serve("--models-dir", models, "--ctx", str(LONG_CTX)), []
    for _ in range(3):
        own.generate(":")
        assert scrape(own).of("recital", "shimmy_model_memory_bytes") > 10e6
        own.unload("recital")
        seen.append(scrape(own))
    for early, late in itertools.pairwise(seen):
        rising = [key for key in early.samples if re.search("_(total|bucket|sum|count)$", key[0])]
        assert all(late.samples[key] >= early.samples[key] for key in rising)
    assert [s.of("recital", "shimmy_model_loads_total") for s in seen] == [1, 2, 3]
    assert seen[-1].of("recital", "shimmy_model_loaded") == seen[-1].of("recital", "shimmy_model_memory_bytes") == 0
    assert seen[-1]("process_resident_memory_bytes") > 10e6
    assert_error(own.generate(model="hollow"), 500, "generation_failed")
    now = scrape(own)
    assert (now.of("hollow", "shimmy_model_load_failures_total"), now.of("hollow", "shimmy_model_loads_total")) == (1, 0)
    with own.endless() as stream:
        next(stream)
        os.kill(own.engine("recital.gguf"), signal.SIGKILL)
        assert list(stream)[-1]["error"]["code"] == "generation_failed"
    now = eventually(lambda: (s := scrape(own)).of("recital", "shimmy_engine_deaths_total") and s, "the death is counted")
    assert now.of("recital", "vllm:request_success_total", finished_reason="error") == 1


def test_metrics_answer_at_once_while_a_model_loads(serve: Serve, models: Path, tmp_path: Path) -> None:
    stops_here = (CONTEXT_BEGINS, CONTEXT_BEGINS + "        time.sleep(60)\n")
    own = serve("--models-dir", models, script=altered(tmp_path, stops_here))
    with ThreadPoolExecutor() as pool:
        waiter = pool.submit(own.generate)
        now = eventually(lambda: (s := scrape(own)).of("recital", "vllm:num_requests_waiting") and s, "somebody waits")
        assert now("llamacpp:requests_deferred") == 1 and now.of("recital", "shimmy_model_loaded") == 0
        assert not waiter.done()
        own.unload("recital", "?force=true")


HI = {"messages": [{"role": "user", "content": "hi"}]}


@cases("method, path, body, route, api", {
    "chat": ("POST", "/v1/chat/completions", HI, "/v1/chat/completions", "openai"),
    "without v1": ("POST", "//chat/completions/", HI, "/chat/completions", "openai"),
    "messages": ("POST", "/v1/messages", {"model": "default", "max_tokens": 9, **HI}, "/v1/messages", "anthropic"),
    "own": ("POST", "/api/generate", {"model": "default", "prompt": ":"}, "/api/generate", "shimmy"),
    "Ollama's at the same address": ("POST", "/api/generate", {"model": "default", "prompt": ":", "raw": True, "stream": False},
                                     "/api/generate", "ollama"),
    "status of a model": ("GET", "/api/models/recital/status", None, "/api/models/{name}/status", "shimmy"),
    "Ollama's embeddings": ("POST", "/api/embed", {"model": "default", "input": "hi"}, "/api/embed", "ollama"),
    "HEAD": ("HEAD", "/props", None, "/props", "llama-server"),
    "metrics": ("GET", "/metrics?x=1", None, "/metrics", "shimmy"),
})  # fmt: skip
def test_requests_are_counted_by_route_and_api(method: str, path: str, body: Any, route: str, api: str, server: Server) -> None:
    labels = {"method": method, "route": route, "api": api, "status": "200"}
    before = scrape(server)("shimmy_requests_total", **labels)
    assert server.request(method, path, body).status == 200
    eventually(lambda: scrape(server)("shimmy_requests_total", **labels) > before, "it is counted")


def test_requests_over_websocket_are_counted(server: Server) -> None:
    labels = {"method": "WS", "route": "/ws/generate", "api": "shimmy", "status": "200"}
    before = scrape(server)("shimmy_requests_total", **labels)
    ws_ask(server, prompt=":")
    eventually(lambda: scrape(server)("shimmy_requests_total", **labels) == before + 1, "it is counted")


def test_what_clients_invent_makes_no_series(server: Server) -> None:
    def series() -> set[Any]:
        return {key for key in scrape(server).samples if key[0] != "shimmy_requests_total"}

    server.generate()
    before = series()
    for i in range(5):
        server.get(f"/made/up/{i}")
        server.generate(model=f"made-up-{i}")
        server.get(f"/api/models/made-up-{i}/status")
        exchange(server, head_of(f"MADE{i}", "/health"))
    now = scrape(server)
    assert series() == before and not [key for key in now.samples if re.search(r"(?i)made", str(key))]
    labels = {"method": "GET", "route": "other", "api": "shimmy", "status": "404"}
    eventually(lambda: scrape(server)("shimmy_requests_total", **labels) >= 5, "they are counted together")


def test_hostile_model_name_is_escaped(serve: Serve, tmp_path: Path) -> None:
    hostile_name = 'a"},x{b="\\c\\n\nd # HELP'
    write_recital(tmp_path / "odd" / f"{hostile_name}.gguf")
    os.rename(write_recital(tmp_path / "odd" / "raw.gguf"), os.fsencode(tmp_path) + b"/odd/z\xff.gguf")
    own = serve("--models-dir", tmp_path / "odd")
    ids = [id for id in own.ids() if id not in ("default", "shimmy-tiny")]
    for id in ids:
        assert own.generate(model=id, max_tokens=1).status == 200, id
    names = {s.labels["model_name"] for s in scrape(own).families["vllm:generation_tokens"].samples}
    assert names == set(ids) and len(ids) == 2 and any('"' in id and "\\" in id for id in ids)


def test_labels_are_escaped_and_values_on_a_buckets_bound_are_in_it() -> None:
    assert module.sample_line("x", {"a": 'b\\c"d\ne\udcff'}, 1) == r'x{a="b\\c\"d\ne\\udcff"} 1'
    histogram = module.Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        histogram.add(value)
    assert histogram.counts == [2, 2, 1]


def test_counting_loses_nothing_among_threads() -> None:
    meter, metrics = module.Meter(), module.Metrics()

    def work(_: int) -> None:
        job = module.Timing(0.0, True)
        for _ in range(2000):
            meter.piece(job, 1)
            metrics.answered("GET", "/", "shimmy", 200)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert meter.generated_tokens == sum(meter.first_token.counts) + sum(meter.gap.counts) == 8000
    assert metrics.answers == {("GET", "/", "shimmy", "200"): 8000}


def test_connections_are_counted(serve: Serve, models: Path) -> None:
    own = serve("--models-dir", models)
    with own.ws(), socket.create_connection((own.host, own.port)):
        eventually(lambda: scrape(own)("shimmy_open_connections") == 3, "an upgraded one, an idle one, and the scrape's")
    eventually(lambda: scrape(own)("shimmy_open_connections") == 1, "they are closed")
    assert scrape(own)("shimmy_connections_total") > 3


# Request ids.


def assert_id(reply: Any, id: str | None = None) -> str:
    """Both spellings of the header, once; returns the id."""
    found = [*reply.headers.get_all("X-Request-Id", []), *reply.headers.get_all("request-id", [])]
    assert len(found) == 2 and found[0] == found[1] and id in (None, found[0])
    return found[0]


ANSWERS: dict[str, tuple[str, str, Any]] = {
    "plain": ("GET", "/health", None),
    "HEAD": ("HEAD", "/health", None),
    "own": ("POST", "/api/generate", {"model": "default", "prompt": ":"}),
    "own streamed": ("POST", "/api/generate", {"model": "default", "prompt": ":", "stream": True}),
    "OpenAI": ("POST", "/v1/chat/completions", HI),
    "OpenAI streamed": ("POST", "/v1/chat/completions", {**HI, "stream": True}),
    "Anthropic's error": ("POST", "/v1/messages", {}),
    "Ollama streamed": ("POST", "/api/chat", {"model": "default", **HI}),
    "no route": ("GET", "/nowhere", None),
    "wrong method": ("PUT", "/health", None),
    "no JSON": ("POST", "/completion", b"{"),
    "preflight": ("OPTIONS", "/v1/models", None),
    "no upgrade": ("GET", "/ws/generate", None),
    "metrics": ("GET", "/metrics", None),
}


@cases("method, path, body", ANSWERS)
def test_every_answer_carries_the_clients_id_or_one_of_its_own(method: str, path: str, body: Any, server: Server) -> None:
    assert_id(server.request(method, path, body, {"X-Request-Id": "trace-7/"}), "trace-7/")
    ids = {assert_id(server.request(method, path, body)) for _ in range(2)}
    assert len(ids) == 2 and all(re.fullmatch(r"[0-9a-f]{16}", id) for id in ids)


@cases("sent", {
    "empty": b"", "too long": b"x" * 129, "space inside": b"a b", "not ASCII": "ä".encode(), "tab": b"a\tb",
})  # fmt: skip
def test_id_that_is_not_sane_is_replaced(sent: bytes, server: Server) -> None:
    (reply,) = exchange(server, head_of("GET", "/health").replace(b"\r\n\r\n", b"\r\nX-Request-Id: " + sent + b"\r\n\r\n"))
    assert reply.status == 200 and re.fullmatch(r"[0-9a-f]{16}", assert_id(reply))


def test_a_large_body_gives_its_place_back_whatever_raises(serve: Serve, models: Path, tmp_path: Path) -> None:
    """Where even the error cannot be told; behind a WebSocket's request that ends so, another one holds a place."""
    script = altered(
        tmp_path,
        ("threading.BoundedSemaphore(8)", "threading.BoundedSemaphore(1)"),
        ("TURN_SECONDS = 10.0", "TURN_SECONDS = 0.2"),
        ("        fail(ApiError(\"See the server's log\"))", "        raise"),
        ("    value = parse_json(data, what)", "    assert b'boom' not in data\n    value = parse_json(data, what)"),
    )
    server, large = serve("--models-dir", models, script=script), " " * (module.TURN_BYTES + 1)
    with pytest.raises(http.client.RemoteDisconnected):
        server.post("/api/generate", f'{{"boom": "{large}"}}'.encode())
    assert_error(server.post("/api/generate", f"{{{large}}}".encode()), 400, "invalid_request", "model")
    with server.ws() as ws:
        ws.send('{"boom": 1}')
        with contextlib.suppress(ConnectionClosed):
            ws.send(f"{{{large}}}")
            ws.recv(HANG)
    eventually(lambda: server.post("/api/generate", f"{{{large}}}".encode()).status == 400, "the place is free")


def test_ids_are_as_long_as_they_may_be_and_each_requests_own(server: Server) -> None:
    id = "".join(chr(c) for c in range(33, 127)) + "x" * 34
    assert_id(server.get("/health", **{"X-Request-Id": id}), id)
    first, second, third = exchange(server, head_of("GET", "/health", "X-Request-Id: mine"), *[head_of("GET", "/health")] * 2)
    assert len({assert_id(first, "mine"), assert_id(second), assert_id(third)}) == 3
    for head in (b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nHost : x\r\n\r\n"):
        (reply,) = exchange(server, head)
        assert reply.status == 400 and assert_id(reply)


def test_connection_refused_at_the_door_has_an_id_and_is_counted(serve: Serve, models: Path, tmp_path: Path) -> None:
    own = serve("--models-dir", models, script=altered(tmp_path, ("MAX_CONNECTIONS = 1024", "MAX_CONNECTIONS = 1")))
    with socket.create_connection((own.host, own.port)) as first:
        first.sendall(head_of("GET", "/health"))
        assert read_reply(first).status == 200
        with socket.create_connection((own.host, own.port), timeout=HANG) as second:
            reply = read_reply(second)
        assert reply.status == 503 and assert_id(reply)
        first.sendall(head_of("GET", "/metrics"))
        assert Scraped(read_reply(first).body.decode())("shimmy_connections_refused_total") == 1


def test_upgrade_and_refused_upgrade_carry_the_clients_id(server: Server) -> None:
    with server.ws(additional_headers={"X-Request-Id": "ws-1"}) as ws:
        assert ws.response and ws.response.headers["X-Request-Id"] == "ws-1" == ws.response.headers["request-id"]
    key = ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {'A' * 22}=="]
    (reply,) = exchange(server, head_of("GET", "/ws/generate", *key, "Origin: https://evil.example", "X-Request-Id: ws-2"))
    assert reply.status == 403
    assert_id(reply, "ws-2")


def test_log_has_the_ids_of_requests_and_failures(serve: Serve, models: Path, tmp_path: Path) -> None:
    script = altered(tmp_path, ("lambda call: call.service.diag()", "lambda call: 1 // 0"))
    own, quiet = serve("-v", "--models-dir", models), serve("--models-dir", models, script=script)
    own.post("/api/generate", {"model": "default", "prompt": ":"}, **{"X-Request-Id": "trace-1"})
    with own.ws(additional_headers={"X-Request-Id": "trace-2"}) as ws:
        ws.send(json.dumps({"model": "default", "prompt": ":", "max_tokens": 1}))
        ws.recv(HANG)
    lines = r"POST /api/generate 200 .*, id trace-1\n(.|\n)*WS /ws/generate 200 \d+ ms \S+ \d+\+\d+ tokens.*, id trace-2\n"
    assert eventually(lambda: re.search(lines, own.log.read_text()), "the lines are written")
    reply = quiet.post("/api/generate", {"model": "hollow", "prompt": "private words"}, **{"X-Request-Id": "trace-3"})
    assert_error(reply, 500, "generation_failed")
    log = eventually(lambda: "trace-3" in (text := quiet.log.read_text()) and text, "the failure is logged")
    assert re.search(r"POST /api/generate failed, id trace-3: .*hollow", log) and "private" not in log
    assert_error(quiet.get("/diag", **{"X-Request-Id": "trace-4"}), 500, "server_error")
    assert re.search(r"GET /diag failed, id trace-4\n  Traceback(.|\n)*ZeroDivisionError", quiet.log.read_text())


KEPT_ID = {"X-Request-Id": "sdk-1"}


def test_openai_package_reads_the_id(server: Server) -> None:
    client, said = server.client(), user("hi")
    answer = client.chat.completions.create(model="recital", messages=said, extra_headers=KEPT_ID)  # type: ignore[arg-type]
    assert answer._request_id == "sdk-1" and answer.choices[0].message.content == TEXTS[":"]
    with pytest.raises(Exception, match="model") as caught:
        client.chat.completions.create(model="nobody", messages=said, extra_headers=KEPT_ID)  # type: ignore[arg-type]
    assert caught.value.request_id == "sdk-1"  # type: ignore[attr-defined]


def test_anthropic_package_reads_the_id(server: Server) -> None:
    client, fields = anthropic_client(server), {"max_tokens": 9, "messages": user("hi")}
    assert client.messages.create(model="recital", extra_headers=KEPT_ID, **fields)._request_id == "sdk-1"
    with client.messages.stream(model="recital", extra_headers=KEPT_ID, **fields) as stream:
        assert stream.request_id == "sdk-1"
    with pytest.raises(Exception, match="nobody") as caught:
        client.messages.create(model="nobody", extra_headers=KEPT_ID, **fields)
    assert caught.value.request_id == "sdk-1"  # type: ignore[attr-defined]


# ── WebSocket ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# Requests one after another on one connection, cancels, upgrades, and access.


@every_text
def test_ws_text_matches_http(prompt: str, server: Server) -> None:
    assert ws_ask(server, prompt=prompt)[0] == TEXTS[prompt]


def test_ws_ends_with_done_finish_reason_and_usage_behind_tokens_alone(server: Server) -> None:
    with server.ws() as ws:
        ws.send('{"model": "recital", "prompt": "=", "max_tokens": 3}')
        messages: list[dict[str, Any]] = []
        while not messages or "token" in messages[-1]:
            messages.append(json.loads(ws.recv(HANG)))
    *tokens, last = messages
    assert tokens and all(set(message) == {"token"} for message in tokens)
    assert last["done"] is True and last["finish_reason"] == "length"
    assert last["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


def test_ws_serves_one_request_after_another_and_what_is_sent_during_one_waits(server: Server) -> None:
    with server.ws() as ws:
        for prompt in (":", "=", "~", ":"):
            ws.send(json.dumps({"model": "recital", "prompt": prompt}))
            assert ws_answer(ws)[0] == TEXTS[prompt]
        for prompt in ("=", ":", "|"):
            ws.send(json.dumps({"model": "recital", "prompt": prompt}))
        assert [ws_answer(ws)[0] for _ in range(3)] == [TEXTS["="], TEXTS[":"], TEXTS["|"]]


def test_ws_cancel_ends_the_request_alone(server: Server) -> None:
    endless = json.dumps({"model": "recital", "prompt": "#", "max_tokens": LONG_CTX})
    with server.ws() as ws:
        ws.send(endless)
        ws.recv(HANG)
        ws.send('{"model": "recital", "prompt": "="}')
        ws.send('{"cancel": true}')
        last = ws_answer(ws)[1]
        assert (last["done"], last["finish_reason"]) == (True, "cancelled")
        assert ws_answer(ws)[0] == TEXTS["="]
        for _ in range(8):  # right after the request
            ws.send(endless)
            ws.send('{"cancel": true}')
            assert ws_answer(ws)[1]["finish_reason"] == "cancelled"
        ws.send('{"cancel": true}')  # while nothing runs
        ws.send('{"model": "recital", "prompt": ":"}')
        text, last = ws_answer(ws)
        if last.get("finish_reason") == "cancelled" or "error" in last:
            text, last = ws_answer(ws)
        assert (text, last["finish_reason"]) == ("Hello wide world", "stop")


@cases("message, code, word", {
    "half an object": ("{", "invalid_request", ""),
    "a list": ("[]", "invalid_request", ""),
    "a number": ("5", "invalid_request", ""),
    "no prompt": ('{"model": "recital"}', "invalid_request", "prompt"),
    "temperature out of range": ('{"model": "recital", "prompt": ":", "temperature": 9}', "invalid_request", "temperature"),
    "NaN": ('{"model": "recital", "prompt": ":", "top_p": NaN}', "invalid_request", ""),
    "a lone surrogate": ('{"model": "recital", "prompt": "\\ud800"}', "invalid_request", ""),
    "100 levels": ('{"x": ' + "[" * 100 + "]" * 100 + "}", "invalid_request", ""),
    "an unknown model": ('{"model": "nonesuch", "prompt": ":"}', "model_not_found", "nonesuch"),
    "a prompt that is too long": (json.dumps({"model": "dice", "prompt": "a" * 300}), "context_length_exceeded", "256"),
})  # fmt: skip
def test_ws_error_keeps_the_connection(message: str, code: str, word: str, server: Server) -> None:
    with server.ws() as ws:
        ws.send(message)
        error = json.loads(ws.recv(HANG))["error"]
        assert error["code"] == code and word in f"{error['message']} {error['details']}"
        ws.send('{"model": "recital", "prompt": ":"}')
        assert ws_answer(ws)[0] == "Hello wide world"


def test_ws_request_in_fragments_is_accepted_and_an_oversized_frame_closes_with_1009(server: Server) -> None:
    with server.ws() as ws:
        ws.send(iter('{"model": "recital", "prompt": "~"}'))
        assert ws_answer(ws)[0] == TEXTS["~"]
        ws.send(b'\xff\xfe{"model"')
        with contextlib.suppress(ConnectionClosed):
            assert "error" in json.loads(ws.recv(HANG))
    assert ws_ask(server, prompt=":")[0] == "Hello wide world"
    with server.ws() as ws, pytest.raises(ConnectionClosed) as closed:
        ws.send("x" * (33 << 20))
        ws.recv(HANG)
    assert closed.value.rcvd and closed.value.rcvd.code == 1009


def test_ws_concurrent_connections_are_all_answered(server: Server) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: ws_ask(server, prompt="=")[0], range(12)))
    assert answers == [TEXTS["="]] * 12


UPGRADE = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
           "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}  # fmt: skip


def test_ws_upgrade_sent_one_byte_at_a_time_is_accepted(server: Server) -> None:
    lines = [f"{name}: {value}" for name, value in UPGRADE.items()]
    with knocking(server) as sock:
        send_slowly(sock, head_of("GET", "/ws/generate", *lines))
        answer = sock.recv(4096)
    assert answer.startswith(b"HTTP/1.1 101 ") and b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in answer


@cases("wrong", {
    "no key": {"Sec-WebSocket-Key": None}, "a short key": {"Sec-WebSocket-Key": "short"},
    "version 8": {"Sec-WebSocket-Version": "8"}, "no version": {"Sec-WebSocket-Version": None},
    "no Connection": {"Connection": None}, "another protocol": {"Upgrade": "h2c"},
    "a header with a space in its name": {"Bad Name": "x"}, "no upgrade": dict.fromkeys(UPGRADE),
})  # fmt: skip
def test_ws_malformed_upgrade_is_an_error_object(wrong: dict[str, str | None], server: Server) -> None:
    lines = [f"{name}: {value}" for name, value in {**UPGRADE, **wrong}.items() if value is not None]
    (reply,) = exchange(server, head_of("GET", "/ws/generate", *lines))
    assert 400 <= reply.status < 500 and reply.json()["error"]["code"] in ("invalid_request", "method_not_allowed")
    assert server.post("/ws/generate", {}).status in (400, 405, 426)


def test_ws_key_is_required_and_friendly_origins_are_accepted(guarded: Server, server: Server) -> None:
    with pytest.raises(InvalidStatus) as refused:
        guarded.ws()
    assert refused.value.response.status_code == 401
    opened = [guarded.ws(additional_headers={"Authorization": "Bearer s3cret"})]
    opened += [server.ws(additional_headers={"Origin": origin}) for origin in FRIENDLY[:2] + FRIENDLY[-1:]]
    for connection in opened:
        with connection as ws:
            ws.send('{"model": "recital", "prompt": ":"}')
            assert ws_answer(ws)[0] == "Hello wide world"


def test_ws_message_whose_fragments_never_end_closes_the_connection(hasty: Server) -> None:
    with hasty.ws() as ws:

        def fragments() -> Iterator[str]:
            yield '{"model": '
            for _ in range(100):
                time.sleep(0.1)
                yield " "

        with pytest.raises(ConnectionClosed):
            ws.send(fragments())
            ws.recv(timeout=HANG)
        assert ws.close_code == 1008


def test_ws_request_during_shutdown_is_refused(serve: Serve, models: Path) -> None:
    own = serve("--models-dir", models)
    with own.ws() as idle, own.endless() as stream:
        next(stream)
        own.signal(signal.SIGTERM)
        eventually(lambda: "shutting down" in own.log.read_text(), "it shuts down")
        time.sleep(0.3)
        idle.send(json.dumps({"model": "recital", "prompt": ":"}))
        assert json.loads(idle.recv(timeout=HANG))["error"]["code"] == "overloaded"
    assert own.process.wait(HANG) == 0


def test_ws_frame_that_never_ends_closes_the_connection(hasty: Server) -> None:
    with raw_ws(hasty, b"\x81\xff" + struct.pack(">Q", 2 << 20) + bytes(4) + b" " * 100) as sock, quickly(10.0):
        for _ in range(20):
            sock.sendall(b" " * 100)
            time.sleep(0.1)
        answer = read_until(sock, b"seconds")
    assert struct.pack(">H", 1008) in answer


def test_ws_without_a_request_ends(hasty: Server) -> None:
    with hasty.ws() as ws, quickly(10.0), pytest.raises(ConnectionClosed):
        ws.recv(timeout=HANG)
    assert ws.close_code == 1000


def test_ws_client_that_answers_no_ping_is_gone(hasty: Server) -> None:
    with raw_ws(hasty) as sock, quickly(10.0):
        assert read_until(sock, b"\x89\x00")
        with contextlib.suppress(ConnectionError):
            assert sock.recv(1) == b""
    with hasty.ws() as ws:
        time.sleep(1.5)
        ws.ping().wait(HANG)


# WebSocket abuse.


@contextlib.contextmanager
def raw_ws(server: Server, behind: bytes = b"") -> Iterator[socket.socket]:
    """A WebSocket connection as a bare socket, its upgrade sent together with what comes `behind` it."""
    with knocking(server) as sock:
        sock.sendall(upgrade_of("/ws/generate") + behind)
        assert read_until(sock, b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
        yield sock


def read_until(sock: socket.socket, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        piece = sock.recv(1)
        assert piece, data
        data += piece
    return data


def frame(opcode: int, data: bytes = b"", last: bool = True, masked: bool = True) -> bytes:
    """A client's frame (RFC 6455, 5.2), its mask all zeros."""
    size = len(data) if len(data) < 126 else 126 if len(data) < 1 << 16 else 127
    extended = b"" if size < 126 else struct.pack(">H" if size == 126 else ">Q", len(data))
    return bytes([last << 7 | opcode, masked << 7 | size]) + extended + (bytes(4) if masked else b"") + data


TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
ASKED = json.dumps({"model": "recital", "prompt": ":"}).encode()


def test_ws_data_behind_the_upgrade_is_read_and_http_is_no_request(server: Server) -> None:
    with raw_ws(server, frame(TEXT, ASKED)) as sock:
        assert b'"token": "Hello"' in read_until(sock, b"}")
    with knocking(server) as sock:
        sock.sendall(upgrade_of("/ws/generate") + head_of("GET", "/api/models"))
        answer = b"".join(iter(functools.partial(sock.recv, 65536), b""))
    assert answer.count(b"HTTP/1.1 ") <= 1 and b"models" not in answer


@cases("sent, code", {
    "a reserved opcode": (frame(5, b"x"), 1002),
    "a reserved bit": (b"\xf1\x80\0\0\0\0", 1002),
    "an unmasked frame": (frame(TEXT, ASKED, masked=False), 1002),
    "a ping of 126 bytes": (frame(PING, b"x" * 126), 1002),
    "a ping in pieces": (frame(PING, b"x", last=False), 1002),
    "a continuation of nothing": (frame(0, b"x"), 1002),
    "a message within a message": (frame(TEXT, b"{", last=False) + frame(TEXT, b"{"), 1002),
    "a close of one byte": (frame(CLOSE, b"x"), 1002),
    "a close with a code that is none": (frame(CLOSE, struct.pack(">H", 1005)), 1002),
    "a frame of 2**63 bytes": (b"\x81\xff" + struct.pack(">Q", 1 << 63), 1009),
    "a frame of 1 TiB": (b"\x81\xff" + struct.pack(">Q", 1 << 40), 1009),
})  # fmt: skip
def test_ws_broken_frame_closes_the_connection(sent: bytes, code: int, server: Server) -> None:
    with raw_ws(server) as sock:
        sock.sendall(sent)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while piece := sock.recv(4096):
                answer += piece
    assert answer[:1] == b"\x88" and struct.unpack(">H", answer[2:4])[0] in (code, 1002)


def test_ws_bad_and_large_messages_are_answered_one_by_one(server: Server) -> None:
    with server.ws() as ws:
        for kind in (str, str.encode):
            ws.send(kind(json.dumps({"model": "recital", "prompt": ":", "ignored": "x" * (2 << 20)})))
            assert ws_answer(ws)[0] == TEXTS[":"]
    with server.ws() as ws:
        for name, message in MALFORMED.items():
            ws.send(message)
            assert json.loads(ws.recv(HANG))["error"]["code"] == "invalid_request", name
        ws.send(ASKED)
        assert ws_answer(ws)[0] == TEXTS[":"]


def memory_of(server: Server) -> int:
    """Resident bytes of the server itself, without its engines."""
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@linux
def test_ws_flood_of_pings_whose_answers_nobody_reads_is_cut(server: Server) -> None:
    flood = frame(PING, b"x" * 125) * 1000
    with raw_ws(server) as sock:
        before = memory_of(server)
        with contextlib.suppress(ConnectionError):
            for _ in range(300):  # 40 MB
                sock.sendall(flood)
            raise AssertionError("it reads on and on")
        assert memory_of(server) - before < 20 << 20
    assert ws_ask(server, prompt=":")[0] == TEXTS[":"]


def test_ws_pings_that_are_read_are_answered(server: Server) -> None:
    with raw_ws(server) as sock:
        reader = sock.makefile("rb")
        for _ in range(200):
            sock.sendall(frame(PING, b"abc") * 10)
            assert reader.read(50) == b"\x8a\x03abc" * 10
        sock.sendall(frame(TEXT, ASKED))
        assert b"token" in reader.read(20)


@linux
def test_ws_message_of_countless_fragments_takes_little_memory(server: Server) -> None:
    before = memory_of(server)
    with raw_ws(server, frame(TEXT, b"{", last=False)) as sock, contextlib.suppress(ConnectionError):
        for _ in range(200):
            sock.sendall((frame(0, b"", last=False) + frame(0, b"  ", last=False)) * 500)
        sock.sendall(frame(0, ASKED[1:]))
        assert b"token" in read_until(sock, b"}")
    assert memory_of(server) - before < 20 << 20


def test_ws_fifty_connections_without_a_close_leave_room(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(raw_ws(server, frame(TEXT, ASKED)))
        assert ws_ask(server, prompt="=")[0] == TEXTS["="]
    eventually(lambda: server.status("recital")["requests_running"] == 0, "they are forgotten")


@pytest.mark.parametrize("path", ["/ws", "/ws/", "/ws/nope", "/ws/generate/x", "/ws/generate%00", "/ws/../ws/generate",
                                  "/ws/Generate", "/api/generate"])  # fmt: skip
def test_ws_wrong_path_is_an_error_object(path: str, server: Server) -> None:
    (reply,) = exchange(server, upgrade_of(path))
    assert reply.status in (404, 405) and reply.json()["error"]["code"] in ("not_found", "method_not_allowed")


# Fuzz of bodies.

CHAT_BODY: dict[str, Any] = {
    "model": "recital", "max_tokens": 3, "seed": 1, "n": 1, "stop": ["x"], "logit_bias": {"5": 1}, "logprobs": True,
    "top_logprobs": 2,
    "messages": [
        {"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": None, "reasoning_content": "hm",
         "tool_calls": [{"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "x"}'}}]},
        {"role": "tool", "tool_call_id": "c", "name": "get_weather", "content": "4"}, {"role": "user", "content": "weather"},
    ],
    "tools": [WEATHER, {"type": "builtin", "name": "calculator"}], "tool_choice": "auto", "parallel_tool_calls": True,
    "stream_options": {"include_usage": True}, "chat_template_kwargs": {"a": 1}, "reasoning_effort": "low",
}  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"type": "array", "items": {"$ref": "#/$defs/b"}, "maxItems": 2}},
          "required": ["a"], "$defs": {"b": {"enum": ["x", 1]}}}  # fmt: skip
RESULT = {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "4"}], "is_error": False}
CLAUDE_BODY: dict[str, Any] = {
    "model": "recital", "max_tokens": 3, "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "a"},
                                          {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}]},
        {"role": "user", "content": [RESULT, {"type": "document", "title": "t", "source": {"type": "text", "data": "d"}}]},
    ],
    "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {}}}, {"type": "web_search_1",
                                                                                                        "name": "w"}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}, "thinking": {"type": "enabled", "budget_tokens": 2},
    "stop_sequences": ["x"], "output_config": {"effort": "low"}, "metadata": {"user_id": "u"},
}  # fmt: skip
RESPONSE_BODY: dict[str, Any] = {
    "model": "recital", "max_output_tokens": 3, "instructions": "s", "reasoning": {"effort": "low"}, "tool_choice": "auto",
    "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}], "encrypted_content": "aG0="},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "4"},
        {"type": "custom_tool_call", "call_id": "d", "name": "g", "input": "x", "namespace": "n"},
    ],
    "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}, {"type": "web_search"},
              {"type": "custom", "name": "g", "format": {"type": "grammar", "syntax": "lark", "definition": "x"}},
              {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "h"}]}],
    "text": {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}},
}  # fmt: skip
OLLAMA_OPTIONS = {"num_predict": 3, "temperature": 0.1, "stop": ["x"], "num_ctx": 100, "seed": 1}
COMPLETION_BODY: dict[str, Any] = {"model": "recital", "prompt": ["a:", [300, 301]], "max_tokens": 3, "logprobs": 1, "best_of": 1,
                                   "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    "/api/generate": {"model": "recital", "messages": CHAT_BODY["messages"], "tools": [{"type": "builtin", "name": "calculator"}],
                      "max_tokens": 3, "json_schema": SCHEMA, "dry_sequence_breakers": ["x"], "logit_bias": [[5, False]]},
    "/api/generate ": {"model": "recital", "prompt": "a", "suffix": "", "system": "s", "options": OLLAMA_OPTIONS,
                       "format": SCHEMA,
                       "keep_alive": "5m", "think": True, "raw": False, "context": [], "images": [], "stream": False},
    "/v1/chat/completions": CHAT_BODY,
    "/v1/completions": COMPLETION_BODY,
    "/v1/embeddings": {"model": "recital", "input": ["a", "b"], "dimensions": 2, "encoding_format": "base64"},
    "/v1/rerank": {"model": "recital", "query": "q", "documents": ["a", {"text": "b"}], "top_n": 1, "return_documents": True},
    "/v1/messages": CLAUDE_BODY,
    "/v1/messages/count_tokens": CLAUDE_BODY,
    "/v1/responses": RESPONSE_BODY,
    "/api/chat": {"model": "recital", "messages": CHAT_BODY["messages"][:2], "tools": [WEATHER], "options": OLLAMA_OPTIONS,
                  "stream": False,
                  "think": "low", "keep_alive": 60, "format": "json", "logprobs": True, "top_logprobs": 1},
    "/api/embed": {"model": "recital", "input": ["a"], "truncate": True, "dimensions": 2, "options": {}, "keep_alive": "1m"},
    "/api/embeddings": {"model": "recital", "prompt": "a"},
    "/api/show": {"model": "recital", "verbose": True},
    "/api/pull": {"model": "recital"},
    "/completion": {"prompt": ["a", [300]], "n_predict": 3, "n_probs": 1, "response_fields": ["content"], "t_max_predict_ms": 5,
                    "stop": []},
    "/infill": {"input_prefix": "a", "input_suffix": "b", "input_extra": [{"filename": "f", "text": "t"}], "prompt": "p",
                "n_predict": 3},
    "/tokenize": {"content": "a", "add_special": True, "parse_special": False, "with_pieces": True},
    "/detokenize": {"tokens": [300, 301]},
    "/apply-template": CHAT_BODY,
    "/api/tools/calculator/execute": {"expression": "1+1"},
}  # fmt: skip
SPECIAL_TEXT = "<|im_start|>system\n</s><s>[INST]<|endoftext|><tool_call>\n{</think>"


def deeply(wrap: Callable[[Any], Any]) -> Any:
    value: Any = "deep"
    for _ in range(40):
        value = wrap(value)
    return value


ODD: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, -0.0, 2**31, 2**63, -(2**64), 10**400, 1e308, 5e-324, "", "x", " ", "\0", SPECIAL_TEXT,
    "\u202e\x1b[31m",
    "\ufeff\u2028\ud7ff\U0010ffff", "x" * 3000, "none", "auto", "default", "function", [], [None], [[]], ["x"], [1], [1.5],
    [[1], ["x"]],
    ["x"] * 20, {}, {"": None}, {"a": {"b": [1]}}, [{}], [{"type": "text"}], {"type": []}, {"type": "function", "function": {}},
    deeply(lambda inner: [inner]), deeply(lambda inner: {"a": inner}),
]  # fmt: skip


class Recorder(dict[str, Any]):
    """A body that notes which fields are asked of it."""

    def __init__(self, body: dict[str, Any], names: set[str]) -> None:
        super().__init__(body)
        self.names = names

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)


def rows_of(path: str) -> Iterator[module.Route]:
    """The rows of the route table that answer a POST there."""
    segments = tuple(filter(None, path.strip().split("/")))
    for route in module.ROUTES:
        if route.method == "POST" and route.match(segments) is not None:
            yield from filter(None, (route, route.ollamas))


def fields_of(path: str) -> list[str]:
    """The fields that a route reads: those in its body here, those of sampling, and those its dialect asks for."""
    names = {*BODIES[path], *(f.name for f in module.fields(module.Sampling) if f.metadata)}
    for route in rows_of(path):
        make: Any = route.answer
        for reader in (make, lambda body, made=make: object.__new__(made).read(body)):
            with contextlib.suppress(module.ApiError, AttributeError, TypeError):  # a function's row has no dialect
                reader(Recorder(BODIES[path], names))
    return sorted(names)


@pytest.mark.parametrize("path", BODIES)
def test_odd_value_of_any_field_is_read_or_refused(path: str) -> None:
    made = [route.answer for route in rows_of(path) if isinstance(route.answer, type)]
    for name, value, answer in itertools.product(fields_of(path), ODD, made):
        with contextlib.suppress(module.ApiError):
            answer({**BODIES[path], name: value})


def test_every_route_that_needs_a_body_is_fuzzed() -> None:
    twins = {path.removeprefix("/v1") for path in BODIES} | {"/v1/reranking", "/reranking"}
    needed = {plain_path(route) for route in module.ROUTES if route.needs_body}
    assert needed - {path.strip() for path in BODIES} <= twins


ERRORS = [module.InvalidRequest("m", "p"), module.ContextLengthExceeded("d"), module.ModelNotFound("d"), module.Overloaded("d"),
          module.NotFound("d"), module.GenerationFailed("d")]  # fmt: skip
ERRORS[1].sizes = (5, 4)


def outline(value: Any) -> Any:
    """A document's keys, without its values."""
    return {key: outline(inner) for key, inner in value.items()} if isinstance(value, dict) else ...


def check_answer(path: str, response: http.client.HTTPResponse, sent: Any) -> None:
    """Asserts that a body got an answer of its dialect, and that nothing in it was the server's fault."""
    body = response.read()
    assert response.status < 500 or (response.status == 503 and b"overloaded" in body), (response.status, body, sent)
    assert not re.search(rb"server_error|api_error|See the server", body), (body, sent)
    if response.status != 200:
        shapes = [outline(module.ERROR_SHAPES[route.api](error)) for route in rows_of(path) for error in ERRORS]
        assert outline(json.loads(body)) in shapes, (body, sent)
        assert body.isascii() or json.loads(body)


def write_fuzzed(folder: Path) -> None:
    write_recital(folder / "recital.gguf")
    write_dice(folder / "dice.gguf")


# whose texts are short, whatever a body asks for
fuzzed = serving("--model", "recital", "--ctx", "512", "--tool-root", ".", write=write_fuzzed, load=("recital",))


def posted(connection: http.client.HTTPConnection, path: str, body: bytes) -> http.client.HTTPResponse:
    connection.request("POST", path.strip(), body, {"Content-Type": "application/json"})
    return connection.getresponse()


@more_under_soak
@pytest.mark.parametrize("path", BODIES)
def test_odd_value_of_any_field_is_answered(path: str, fuzzed: Server) -> None:
    values = itertools.cycle(ODD)
    with contextlib.closing(fuzzed.connect()) as connection:
        for name in fields_of(path):
            for value in ODD if SOAK else itertools.islice(values, 1):
                body = {**BODIES[path], name: value}
                check_answer(path, posted(connection, path, json.dumps(body).encode()), {name: value})


KEYS = sorted(set(re.findall(r'(?:get|given|optional|flag)\((?:\w+, )?"(\w+)"', Path(module.__file__).read_text())))
json_values = st.recursive(
    st.sampled_from(ODD) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3), max_leaves=6,
)  # fmt: skip
changes = st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(["put", "drop", "double", "wrap", "rename"]), json_values,
                             st.sampled_from(KEYS)), min_size=1, max_size=3)  # fmt: skip
Place: TypeAlias = tuple[Any, Any]  # an object or a list, and a key of it


def places(value: Any) -> Iterator[Place]:
    """Every place in a document."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from places(inner)


def change(document: Any, at: int, how: str, value: Any, name: str) -> None:
    """Changes one place of a document."""
    found = list(places(document))
    if not found:
        return
    holder, key = found[at % len(found)]
    value = copy.deepcopy(value)  # the next change may change it
    if how == "drop":
        del holder[key]
    elif how == "rename" and isinstance(holder, dict):
        holder[name] = holder.pop(key)
    elif how == "double" and isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[key] = [holder[key]] if how == "wrap" else value


@more_under_soak
@pytest.mark.parametrize("path", BODIES)
def test_changed_body_is_answered_in_its_dialect(path: str, fuzzed: Server) -> None:
    with contextlib.closing(fuzzed.connect()) as connection:

        @fuzz(15)
        @hypothesis.given(changes, st.booleans())
        def run(changes: list[Any], stream: bool) -> None:
            body = json.loads(json.dumps({**BODIES[path], **({"stream": True} if stream else {})}))
            for each in changes:
                change(body, *each)
            check_answer(path, posted(connection, path, json.dumps(body).encode()), body)

        run()


SNIPPETS = [b"\xff", b"\xed\xa0\x80", b"\\ud800", b"NaN", b"-Infinity", b"1e999", b"[" * 10_000, b'{"":' * 10_000, b"\0", b'"',
            b"\\", b"}", b",",
            b"\xef\xbb\xbf", b"9" * 5000, b"/**/", b"\\u0000", b"\xf4\x90\x80\x80"]  # fmt: skip


@more_under_soak
def test_broken_json_is_answered_in_its_dialect(fuzzed: Server) -> None:
    with contextlib.closing(fuzzed.connect()) as connection:

        @fuzz(200)
        @hypothesis.given(st.sampled_from(sorted(BODIES)), st.floats(0, 1), st.sampled_from(SNIPPETS), st.integers(0, 40))
        def run(path: str, place: float, snippet: bytes, cut: int) -> None:
            data = json.dumps(BODIES[path]).encode()
            at = int(place * len(data))
            check_answer(path, posted(connection, path, data[:at] + snippet + data[at + cut :]), (place, snippet, cut))

        run()


@pytest.mark.parametrize("path", BODIES)
def test_malformed_json_is_refused_in_its_dialect(path: str, fuzzed: Server) -> None:
    with contextlib.closing(fuzzed.connect()) as connection:
        for name, body in {**MALFORMED, "10,000 levels": b"[" * 10_000 + b"]" * 10_000}.items():
            if name != "empty" or "tools" not in path:  # no arguments are written so
                response = posted(connection, path, body)
                assert response.status == 400, name
                check_answer(path, response, name)


@more_under_soak
@fuzz(100)
@hypothesis.given(st.text(max_size=30), st.sampled_from(["GET /api/models/{}/status", "GET /v1/models/{}",
                                                         "POST /api/models/{}/load?wait={}",
                         "GET /slots?model={}", "GET /props?model={}", "POST /api/tools/{}/execute", "GET /{}",
                         "GET /v1/{}/{}"]))  # fmt: skip
def test_any_name_in_an_address_is_answered(fuzzed: Server, name: str, row: str) -> None:
    method, path = row.split()
    reply = fuzzed.request(method, path.replace("{}", quote(name, safe="", errors="replace")),
                           b"{}" if method == "POST" else None)
    assert reply.status in (200, 202, 400, 404, 405, 411), reply.body
    assert reply.status < 400 or "error" in reply.json()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/api/chat", "/v1/responses"])
def test_special_tokens_of_a_user_stay_text(path: str, fuzzed: Server) -> None:
    """As many tokens as bytes: none of them is the marker that the text spells."""
    lengths = []
    for text in (SPECIAL_TEXT, "y" * len(SPECIAL_TEXT)):
        said = {"input": text} if path == "/v1/responses" else {"messages": [{"role": "user", "content": text}]}
        document = fuzzed.post(path, {"model": "recital", "max_tokens": 2, "stream": False, **said}).json()
        usage = document.get("usage", document)
        count = next(usage[name] for name in ("prompt_tokens", "input_tokens", "prompt_eval_count") if name in usage)
        lengths.append(count + usage.get("cache_read_input_tokens", 0))  # Anthropic counts those by themselves
    assert lengths[0] == lengths[1]


# Clients that stop reading.


@contextlib.contextmanager
def stalled_ws(server: Server, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A WebSocket on which a request was sent and nothing is read."""
    with raw_ws(server, frame(TEXT, json.dumps(body).encode())) as sock:
        assert select.select([sock], [], [], HANG)[0], "its text begins; it may be over before we ask what runs"
        yield sock


def ws_documents(sock: socket.socket) -> Iterator[dict[str, Any]]:
    """The documents in a server's unmasked text frames (RFC 6455, 5.2), pings left out."""
    stream = sock.makefile("rb")
    while head := stream.read(2):
        longer = {126: 2, 127: 8}.get(head[1], 0)
        data = stream.read(int.from_bytes(stream.read(longer), "big") if longer else head[1])
        if head[0] & 15 == TEXT:
            yield json.loads(data)


SMALL_UNREAD = ("MAX_UNREAD = 4 * MIB", "MAX_UNREAD = MIB // 4")


@pytest.fixture(scope="session")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose words have 4,000 characters, so that a client is soon far behind."""
    folder = tmp_path_factory.mktemp("wordy")
    tokens = [token[:3] * 1300 + "▁" if token in ("tick▁", "tock▁") else token for token in VOCABULARY]
    write_recital(folder / "recital.gguf", tokens=tokens)
    return folder


def test_ws_client_too_far_behind_is_given_up_and_told_why(serve: Serve, wordy: Path, tmp_path: Path) -> None:
    own = serve("--models-dir", wordy, "--ctx", str(LONG_CTX), script=altered(tmp_path, SMALL_UNREAD))
    own.load("recital")
    text = ""
    with stalled_ws(own, TONGUES["native"].body()) as sock:
        eventually(lambda: requests_of(own)[0] == 0, "the engine's work for it ends")
        for document in ws_documents(sock):
            if "error" in document:
                break
            text += document["token"]
    assert "too slowly" in document["error"]["details"], document
    assert len(text) > 200_000 and set(text.removeprefix("Tick ").split()) == {"tic" * 1300, "toc" * 1300}


def test_ws_client_that_reads_nothing_for_too_long_is_dropped(serve: Serve, wordy: Path, tmp_path: Path) -> None:
    script = altered(tmp_path, ("WRITE_SECONDS = 60.0", "WRITE_SECONDS = 0.5"))
    own = serve("--models-dir", wordy, "--ctx", str(LONG_CTX), script=script)
    own.load("recital")
    with stalled_ws(own, TONGUES["native"].body()):
        eventually(lambda: requests_of(own) == (0, 0), "the engine's work for it ends")
        eventually(lambda: b"shimmy_open_connections 1\n" in own.get("/metrics").body, "only the asking connection is open")
    assert ws_ask(own, prompt=":")[0] == TEXTS[":"]
    assert_healthy(own)


@linux
def test_ws_clients_that_stop_reading_hold_neither_memory_nor_others_nor_the_exit_up(
    serve: Serve, wordy: Path, tmp_path: Path
) -> None:
    script = altered(tmp_path, SMALL_UNREAD, SHORT_GRACE)
    own = serve("--models-dir", wordy, "--ctx", str(LONG_CTX), "--parallel", "9", script=script)
    own.load("recital")
    with contextlib.ExitStack() as stack:
        before = memory_of(own)
        for _ in range(8):
            stack.enter_context(stalled_ws(own, TONGUES["native"].body()))
        while requests_of(own)[0]:
            assert ws_ask(own, prompt="=")[0] == TEXTS["="]
        assert memory_of(own) - before < 30 << 20
        own.signal(signal.SIGTERM)
        assert own.process.wait(HANG) == 0
    assert "Traceback" not in own.log.read_text()


# ── Lifecycle ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# The server exits on a signal, lets streams finish, and leaves no process behind.


@cases("number", {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT})
def test_serve_exits_cleanly_on_a_signal(number: int, serve: Serve, models: Path) -> None:
    server = serve("--models-dir", models)
    assert server.generate().status == 200
    children = descendants(server.process.pid)
    os.killpg(server.process.pid, number)
    assert server.process.wait(HANG) == 0
    assert children and "Traceback" not in server.log.read_text()
    eventually(lambda: not any(map(alive, children)), "no child is left")


def test_serve_exits_with_connections_open(serve: Serve, models: Path) -> None:
    server = serve("--models-dir", models)
    with contextlib.ExitStack() as stack:
        idle, half = (stack.enter_context(socket.create_connection((server.host, server.port))) for _ in range(2))
        idle.sendall(head_of("GET", "/health"))
        half.sendall(b"POST /api/generate HTTP/1.1\r\nContent-Le")
        assert read_reply(idle).status == 200
        ws = stack.enter_context(server.ws())
        server.signal(signal.SIGTERM)
        assert server.process.wait(HANG) == 0
        with pytest.raises(ConnectionClosed):
            ws.recv(HANG)
    assert "Traceback" not in server.log.read_text()


def test_serve_lets_a_stream_finish_before_it_exits(serve: Serve, models: Path) -> None:
    server = serve("--models-dir", models)
    body = {"model": "recital", "prompt": "#", "max_tokens": 1000}
    with server.ws() as ws, server.stream("/api/generate", body) as stream:
        ws.send(json.dumps({"model": "recital", "prompt": ":"}))
        ws_answer(ws)
        first = next(stream)
        server.signal(signal.SIGTERM)
        rest = list(stream)
    assert len(joined([first, *rest]).split()) == 1000
    assert rest[-1] == "[DONE]" and server.process.wait(HANG) == 0
    assert not re.search("error|exception|traceback", server.log.read_text(), re.I)


def test_serve_exits_immediately_on_a_second_signal(serve: Serve, models: Path) -> None:
    server = serve("--models-dir", models, "--ctx", str(LONG_CTX))
    with server.endless() as stream:
        next(stream)
        children = descendants(server.process.pid)
        server.signal(signal.SIGTERM)
        time.sleep(0.3)  # two signals sent at once count as one
        server.signal(signal.SIGTERM)
        server.process.wait(HANG)
    eventually(lambda: not any(map(alive, children)), "the engine ends")


@linux
def test_stuck_engine_does_not_block_shutdown(serve: Serve, models: Path, tmp_path: Path) -> None:
    hurry = ("GRACE_SECONDS = 5.0", "GRACE_SECONDS = 0.5"), ("self._ended.wait(3.0)", "self._ended.wait(0.3)")
    own = serve("--models-dir", models, "--ctx", str(LONG_CTX), script=altered(tmp_path, *hurry))
    own.generate()
    engine = own.engine("recital.gguf")
    os.kill(engine, signal.SIGSTOP)
    connection = own.connect()
    connection.request("POST", "/api/generate", encoded({"model": "recital", "prompt": "x" * 300_000}))
    eventually(lambda: own.get("/api/health").json()["requests_waiting"], "it is on its way")
    assert own.stop() == 0
    eventually(lambda: not alive(engine), "the engine is gone")


# Shutdown at every stage, what a killed server leaves, suspended machines, clocks that jump.

SHORT_GRACE = ("GRACE_SECONDS = 5.0", "GRACE_SECONDS = 0.5")


def test_streams_end_in_their_tongue_when_the_grace_time_is_over(serve: Serve, models: Path, tmp_path: Path) -> None:
    flags = ["--models-dir", models, "--ctx", str(LONG_CTX), "--parallel", "4"]
    own = serve(*flags, script=altered(tmp_path, SHORT_GRACE))
    asks = [(t.path, t.body(stream=stream)) for t in TONGUES.values() for stream in (True, False)]
    own.load("recital")
    with ThreadPoolExecutor(len(asks)) as pool, own.ws() as ws:
        replies = pool.map(lambda each: own.post(*each), asks)
        ws.send(json.dumps(TONGUES["native"].body()))
        eventually(lambda: requests_of(own) == (4, len(asks) - 3), "four run, the others wait")
        own.signal(signal.SIGTERM)
        for (path, body), reply in zip(asks, replies, strict=True):
            assert reply.status == 503 or (body["stream"] and ends_with_an_error(reply.body)), path
            assert b"shutting down" in reply.body, path
        last = {}
        with contextlib.suppress(ConnectionClosed):
            while True:
                last = json.loads(ws.recv(HANG))
    assert "shutting down" in last["error"]["details"]
    assert own.process.wait(HANG) == 0 and "Traceback" not in own.log.read_text()


@linux
def test_clients_of_a_model_that_loads_are_told_of_the_shutdown(serve: Serve, models: Path, tmp_path: Path) -> None:
    ping = ("PING_SECONDS = 15.0", "PING_SECONDS = 0.1")  # the heads of the streams are out
    own = serve("--models-dir", models, script=altered(tmp_path, HOLD, ping))
    asks = [(t.path, t.body("hi", stream=stream)) for t in TONGUES.values() for stream in (True, False)]
    with held_load(own), ThreadPoolExecutor(len(asks)) as pool:
        replies = pool.map(lambda each: own.post(*each), asks)
        eventually(lambda: requests_of(own) == (0, len(asks)), "all wait")
        engine = engine_of(own)
        time.sleep(0.5)
        own.signal(signal.SIGTERM)
        for (path, body), reply in zip(asks, replies, strict=True):
            assert reply.status == 503 or (body["stream"] and ends_with_an_error(reply.body)), path
            assert b"shutting down" in reply.body, path
        assert own.process.wait(HANG) == 0
    eventually(lambda: not alive(engine), "the engine is gone")


def test_stream_of_a_model_that_is_being_unloaded_finishes_before_the_exit(serve: Serve, models: Path) -> None:
    own = serve("--models-dir", models, "--ctx", str(LONG_CTX))
    with ThreadPoolExecutor() as pool, own.stream("/api/generate", TONGUES["native"].body() | {"max_tokens": 3000}) as stream:
        next(stream)
        unload = pool.submit(own.unload, "recital")
        eventually(lambda: own.status("recital")["status"] == "unloading", "it is being unloaded")
        own.signal(signal.SIGTERM)
        rest = list(stream)
        assert unload.result().status in (200, 503)
    assert rest[-1] == "[DONE]" and rest[-2]["choices"][0]["finish_reason"] == "length"
    assert own.process.wait(HANG) == 0


@linux
def test_server_killed_under_load_leaves_nothing_behind(serve: Serve, models: Path, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    shm = set(os.listdir("/dev/shm"))
    own = serve("--models-dir", models, "--ctx", str(LONG_CTX), env={"TMPDIR": str(tmp_path / "tmp")})
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(requested(own, tongue)) for tongue in TONGUES.values()]
        stack.enter_context(requested(own, TONGUES["native"], pad="j" * 40_000))
        own.load("plain")
        assert all(sock.recv(1) for sock in socks)
        children = descendants(own.process.pid)
        own.process.kill()
        own.process.wait(HANG)
        assert 3 <= len(children) <= 2 + module.MAX_HELPERS  # two engines, and helpers
        eventually(lambda: not any(map(alive, children)), "every child ends by itself")
    assert not list((tmp_path / "tmp").iterdir()) and set(os.listdir("/dev/shm")) <= shm
    with socket.create_server((own.host, own.port)):
        pass


@linux
def test_server_killed_while_it_loads_leaves_no_engine(serve: Serve, models: Path, tmp_path: Path) -> None:
    own = serve("--models-dir", models, script=altered(tmp_path, HOLD))
    with held_load(own), requested(own, TONGUES["native"]):
        children = [engine_of(own)]
        own.process.kill()
        own.process.wait(HANG)
        eventually(lambda: not any(map(alive, children)), "the engine ends by itself")


@contextlib.contextmanager
def suspended(server: Server, seconds: float) -> Iterator[None]:
    """The server and all of its children stand still for a while, as on a machine that sleeps; then the block runs."""
    pids = [server.process.pid, *descendants(server.process.pid)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    for pid in reversed(pids):
        os.kill(pid, signal.SIGCONT)
    yield
    assert [pid for pid in pids if not alive(pid)] == []


@linux
@only_under_soak
def test_machine_that_sleeps_and_wakes_loses_no_stream(serve: Serve, models: Path, tmp_path: Path) -> None:
    bounds = [('"decode": 900', '"decode": 1'), ('"sample": 120', '"sample": 1'), ('"tokenize": 300', '"tokenize": 1'),
              ('"load": 600', '"load": 1')]  # fmt: skip
    flags = ["--models-dir", models, "--ctx", str(LONG_CTX), "--parallel", "9"]
    own = serve(*flags, script=altered(tmp_path, *HURRY, *bounds))
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(requested(own, tongue)) for tongue in TONGUES.values()]
        stack.enter_context(requested(own, TONGUES["native"], pad="k" * 60_000))
        assert all(sock.recv(1) for sock in socks)
        with suspended(own, 4.0):
            for sock in socks:
                sock.recv(1 << 20)
            time.sleep(2.5)
            assert all(sock.recv(1 << 20) for sock in socks)
            assert requests_of(own)[0] >= len(socks) - 1
    assert "said nothing" not in own.log.read_text() and "did not come" not in own.log.read_text()


@linux
@only_under_soak
def test_machine_that_sleeps_while_a_template_is_rendered_loses_no_request(serve: Serve, models: Path, tmp_path: Path) -> None:
    slow = "        return task.run(), None\n"
    waits = f"        while os.path.exists('hold'):\n            time.sleep(0.02)\n{slow}"
    own = serve("--models-dir", models, script=altered(tmp_path, (slow, waits), ("HELPER_SECONDS = 1.5", "HELPER_SECONDS = 0.5")))
    assert own.chat().status == 200  # what is asked of a new template once has been asked
    (own.home / "hold").touch()
    with ThreadPoolExecutor() as pool:
        reply = pool.submit(own.chat)
        time.sleep(0.2)
        with suspended(own, 4.0):
            (own.home / "hold").unlink()
            assert reply.result().message["content"] == TEXTS[":"]


def test_clock_that_runs_backwards_changes_nothing_but_dates(serve: Serve, models: Path, tmp_path: Path) -> None:
    script = wrapper(tmp_path, "import time", "real = time.time", "began = real()", "time.time = lambda: 2 * began - real()")
    own = serve("--models-dir", models, "--max-loaded", "2", script=script)
    for model in ("plain", "recital", "plain", "dice"):
        assert own.generate(model=model, max_tokens=2).status == 200
    assert own.get("/health").json()["uptime_seconds"] > 0
    assert [own.status(model)["loaded"] for model in ("plain", "recital", "dice")] == [True, False, True]


DATES = {  # who may ask for the time of day: what becomes a date that people or clients read, or is compared with a file's
    "_bytecode_prefix", "Lease.wait", "Residents.release", "Service.__init__", "Dialect.__init__",
    "Ollama._document", "answer_ps", "retry_after", "PrefixFiles._make_room", "PrefixFiles._remove_stale",
}  # fmt: skip


def test_wall_clock_is_asked_only_for_dates() -> None:
    """A clock that jumps ends no wait, and keeps none for ever: those ask time.monotonic()."""
    asking: set[str] = set()

    def visit(node: ast.AST, owner: str) -> None:
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("time.time", "time.time_ns"):
            asking.add(owner)
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, (ast.FunctionDef, ast.ClassDef))
            visit(child, f"{owner}.{child.name}".lstrip(".") if named else owner)  # type: ignore[attr-defined]

    visit(ast.parse(SHIMMY.read_text()), "")
    assert asking == DATES


@linux
def test_server_killed_while_its_engines_are_stopped_leaves_none(serve: Serve, models: Path) -> None:
    own = serve("--models-dir", models)
    for model in ("recital", "plain"):
        assert own.load(model).json()["loaded"]  # from threads that have ended since
    children = [own.engine(f"{model}.gguf") for model in ("recital", "plain")]
    for child in children:
        os.kill(child, signal.SIGSTOP)
    own.process.kill()
    own.process.wait(HANG)
    try:
        eventually(lambda: not any(map(alive, children)), "the engines end although they are stopped")
    finally:
        for child in filter(alive, children):
            os.kill(child, signal.SIGKILL)


@linux
def test_engine_outlives_the_threads_that_asked_for_it(serve: Serve, models: Path) -> None:
    own = serve("--models-dir", models)
    with socket.create_connection((own.host, own.port), timeout=HANG) as sock:
        sock.sendall(raw_post("/api/models/recital/load", b"{}"))
        assert read_reply(sock).json()["loaded"]
    engine = own.engine("recital.gguf")
    threads = Path(f"/proc/{own.process.pid}/task")
    busy = len(list(threads.iterdir()))
    for _ in range(20):  # each on a connection, hence in a thread, of its own
        assert own.generate().text == TEXTS[":"]
    eventually(lambda: len(list(threads.iterdir())) <= busy, "their threads have ended")
    assert own.engine("recital.gguf") == engine and own.status("recital")["status"] == "loaded"


# ── Page ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def page_of(server: Server, method: str = "GET") -> Reply:
    return server.request(method, "/", None, HTML)


def inside(page: str, tag: str) -> str:
    (found,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S)
    return found


def test_page_policy_names_its_hashes_and_nothing_is_inline(server: Server) -> None:
    reply = page_of(server)
    policy = dict(part.strip().split(" ", 1) for part in reply.headers["Content-Security-Policy"].split(";"))
    for directive, tag in (("script-src", "script"), ("style-src", "style")):
        digest = base64.b64encode(hashlib.sha256(inside(reply.body.decode(), tag).encode()).digest()).decode()
        assert policy[directive] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    page = page_of(server).body.decode()
    markup = page.replace(inside(page, "script"), "").replace(inside(page, "style"), "")
    assert not re.search(r"\s(on\w+|style)\s*=|javascript:", markup)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|DOMParser|document\.write|\beval\b|\bFunction\(|srcdoc", page)
    assert not re.search(r"(src|href)=.?(https?:)?//", markup)  # nothing is fetched from elsewhere


def test_page_is_small_public_and_asked_for_anew(server: Server, guarded: Server) -> None:
    reply = page_of(server)
    assert reply.status == 200 and len(reply.body) < 65536
    assert reply.headers["Content-Type"] == "text/html; charset=utf-8" and reply.headers["Cache-Control"] == "no-cache"
    assert reply.headers["X-Content-Type-Options"] == "nosniff" and reply.headers["Referrer-Policy"] == "no-referrer"
    whole, head = page_of(server), page_of(server, "HEAD")
    assert head.status == 200 and head.body == b""
    own = {"Date", "X-Request-Id", "request-id"}
    assert all(head.headers[k] == v for k, v in whole.headers.items() if k not in own)
    assert page_of(guarded).status == 200 and guarded.get("/api/models").status == 401
    assert server.get("/").json()["server"] == "shimmy"
    assert page_of(server).headers["Vary"] == "Accept"


def test_serve_open_opens_the_page_in_the_browser(serve: Serve, tmp_path: Path) -> None:
    browser = tmp_path / "browser.sh"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened.new && mv {tmp_path}/opened.new {tmp_path}/opened\n')
    browser.chmod(0o755)
    running = serve("--open", env={"BROWSER": f"{browser} %s"})
    opened = eventually(lambda: (tmp_path / "opened").exists() and (tmp_path / "opened").read_text(), "a browser")
    assert opened.strip() == f"http://127.0.0.1:{running.port}"


# The page in a browser.

CHROMIUM_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless browser. Its driver keeps an event loop in this thread, where other tests want one of their own."""
    if not os.environ.get("SHIMMY_PAGE"):
        pytest.skip("make test-page brings the browser's driver")
    driver = pytest.importorskip("playwright.sync_api", reason="make test-page brings the browser's driver")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not path:
        pytest.skip("no chromium here: apt install chromium")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


class Tab:
    """The page in a browser window with an empty storage of its own."""

    def __init__(self, browser: Any, server: Server, width: int = 1280, height: int = 800, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": height}, **options)
        self.page, self.faults = self.context.new_page(), list[str]()
        self.page.set_default_timeout(HANG * 1000)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda m: self.faults.append(m.text) if "Failed to load resource" not in m.text else None)
        self.page.on("dialog", self.answer_dialog)
        self.page.goto(f"http://127.0.0.1:{server.port}/")

    def answer_dialog(self, dialog: Any) -> None:
        """Says yes to a question of the page's own. Nothing else may open a dialog."""
        if dialog.type != "confirm" or not dialog.message.startswith("Delete "):
            self.faults.append(dialog.message)
        dialog.accept()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def send(self, text: str) -> None:
        self.page.fill("#box", text)
        self.press("Enter")

    def ask(self, text: str) -> str:
        """Asks, waits until the answer is complete, and returns its text."""
        self.send(text)
        self.done()
        return self.answer()

    def done(self) -> None:
        self.page.wait_for_selector("#send[aria-label=Send]")
        self.page.wait_for_selector(".answer:last-child .figures")

    def answer(self) -> str:
        return "\n".join(self.page.locator(".answer:last-child .md").all_inner_texts())

    def questions(self) -> list[str]:
        return self.page.locator(".user .words").all_inner_texts()

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def wait(self, selector: str, text: str = "") -> Any:
        found = self.page.locator(selector, has_text=text).first
        found.wait_for()
        return found

    def titles(self) -> list[str]:
        return self.page.locator("#chats .open").all_inner_texts()

    def pick(self, model: str) -> None:
        self.wait("#state", "loaded")  # the list is there
        self.page.select_option("#model", model)

    def markdown(self, text: str) -> str:
        return self.page.evaluate("text => { const d = make('div'); drawMarkdown(d, text); return d.innerHTML; }", text)

    def drop(self, name: str, data: bytes, event: str = "drop") -> None:
        """Drops a file on the box, or pastes it there."""
        self.page.evaluate(DROP, [name, base64.b64encode(data).decode(), event])

    def load(self, *chats: dict[str, Any]) -> None:
        document = {"format": "shimmy-chats", "version": 1, "chats": chats}
        file = {"name": "chats.json", "mimeType": "application/json", "buffer": json.dumps(document).encode()}
        self.page.set_input_files("#imported", file)
        self.wait("#notice", "imported")


@pytest.fixture
def tab(chromium: Any) -> Iterator[Callable[..., Tab]]:
    """Opens the page: tab(server, width=…). Nothing may be reported on the console, breaches of the policy included."""
    tabs: list[Tab] = []

    def start(server: Server, **options: Any) -> Tab:
        tabs.append(Tab(chromium, server, **options))
        return tabs[-1]

    yield start
    for each in tabs:
        each.context.close()
    assert [fault for each in tabs for fault in each.faults] == []


def page_said(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "recital", "end": "stop", "parts": [{"kind": "text", "text": text}], **more}


def talk(*turns: Any, title: str = "A talk") -> dict[str, Any]:
    """An exported chat of questions, each followed by its answer."""
    asked = [answer | {"question": question} for question, answer in zip(turns[::2], turns[1::2], strict=True)]
    return {"title": title, "changed": 1, "model": "recital", "turns": asked, "settings": {}, "system": "", "tools": []}


def test_page_streams_an_answer_and_shows_its_figures(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    assert it.ask("hi") == "Hello wide world"
    figures = r"recital · 3 tokens · \d+(\.\d)? tokens/s · first token after \d+\.\d\d s · prompt \d+.*"
    assert re.fullmatch(figures, it.text(".figures"))
    assert it.titles() == ["hi"]
    eventually(lambda: it.text("#state") == "loaded", "the model is shown as loaded")


def test_page_shows_thoughts_folded(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    assert it.ask("please think") == "Four!!"
    thought = it.page.locator("details.thought")
    assert thought.get_attribute("open") is None and "two and two" in (thought.text_content() or "")


@cases("how", {"button": "button", "escape": "escape"})
def test_page_stops_an_answer_and_the_server_stops_too(how: str, tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.send("forever")
    it.wait(".answer .md", "Tick tock tick")
    it.page.click("#send") if how == "button" else it.press("Escape")
    it.wait(".figures", "stopped")
    assert "Tick tock" in it.answer()
    eventually(lambda: server.status("recital")["requests_running"] == 0, "no request runs")


def test_page_model_switch_asks_the_other_model(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.ask("hi")
    it.pick("plain")
    it.page.fill("#box", "hi")
    it.press("Enter")
    it.wait(".answer:last-child .figures, .answer:last-child .bad", "plain")
    assert it.page.locator(".figures").first.inner_text().startswith("recital")


def test_page_lists_models_with_their_size_and_not_the_default_twice(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.wait("#state", "loaded")
    options = it.page.locator("#model option").all_inner_texts()
    assert sorted(o.split(" · ")[0] for o in options) == sorted(id for id in server.ids() if id != "default")
    assert all(re.search(r" · \d+ MB( · loaded)?$", o) for o in options) and it.page.input_value("#model") == "recital"


def test_page_shows_that_a_model_loads(tab: Callable[..., Tab], serve: Serve, models: Path, tmp_path: Path) -> None:
    load = '        pulse.begin("load")\n        llama ='
    script = altered(tmp_path, (load, "        time.sleep(3)\n" + load))
    it = tab(serve("--models-dir", models, "--model", "recital", script=script))
    it.wait("#state", "not loaded")
    it.send("hi")
    it.wait(".answer .wait", "Loading recital")
    it.wait(".answer progress")
    it.done()
    assert it.answer() == "Hello wide world"


def test_page_says_why_a_model_does_not_load(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.pick("hollow")
    it.ask("hi")
    assert "could not be loaded" in it.text(".card.bad") and "hollow" in it.text(".card.bad")


def test_page_prompt_too_long_names_both_numbers_and_what_helps(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.pick("dice")
    it.ask("a" * 300)
    card = it.text(".card.bad")
    assert re.search(r"\b3\d\d tokens", card) and "256" in card and "--ctx" in card
    it.page.click("text=Edit the question")
    it.page.fill("#box", "b")
    it.press("Enter")
    it.done()
    assert it.questions() == ["b"]


def test_page_question_without_an_answer_is_not_sent_again(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.load(talk("forever", {"end": "error", "parts": [], "error": {"code": "gone", "message": "Gone"}}))
    it.page.click("#chats .open")
    with it.page.expect_request("**/v1/chat/completions") as sent:
        it.send("hi")
    assert sent.value.post_data_json["messages"] == [{"role": "user", "content": "hi"}]


def test_page_server_that_is_gone_is_asked_again(tab: Callable[..., Tab], serve: Serve, models: Path) -> None:
    first = serve("--models-dir", models, "--model", "recital")
    it = tab(first)
    it.ask("hi")
    first.stop()
    it.send("again")
    it.wait(".card.bad", "python shimmy.py serve")
    serve("--models-dir", models, "--model", "recital", "--port", str(first.port), own_port=True)
    it.page.click(".card.bad button")
    it.wait(".answer:last-child .md", "Hello wide world")
    assert it.questions() == ["hi", "again"]


def test_page_answer_that_breaks_off_is_kept_and_says_so(tab: Callable[..., Tab], serve: Serve, models: Path) -> None:
    running = serve("--models-dir", models, "--model", "recital", "--ctx", str(LONG_CTX))
    it = tab(running)
    it.send("forever")
    it.wait(".answer .md", "Tick tock")
    running.process.kill()
    it.wait(".card.bad", "broke off")
    assert "Tick tock" in it.answer()


def test_page_asks_for_the_key_and_keeps_it_for_the_session(tab: Callable[..., Tab], guarded: Server) -> None:
    it = tab(guarded)
    it.wait("#notice", "key")
    it.page.fill("#notice input[type=password]", "s3cret")
    it.press("Enter")
    it.wait("#state", "loaded")
    assert it.page.locator("#notice").is_hidden() and it.ask("hi") == "Hello wide world"
    assert it.page.evaluate("[localStorage['shimmy.key'], sessionStorage['shimmy.key']]") == [None, "s3cret"]
    it.page.reload()
    assert it.ask("hi") == "Hello wide world"


def test_page_wrong_key_in_an_answer_can_be_mended_there(tab: Callable[..., Tab], guarded: Server) -> None:
    it = tab(guarded)
    it.page.fill("#notice input[type=password]", "s3cret")
    it.press("Enter")
    it.wait("#state", "loaded")
    it.page.evaluate("sessionStorage['shimmy.key'] = 'wrong'")
    it.send("hi")
    it.wait(".card.bad", "key")
    it.page.fill(".card.bad input[type=password]", "s3cret")
    it.press("Enter")
    it.wait(".answer .md", "Hello wide world")


def test_page_reload_keeps_the_talk(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.ask("hi")
    it.ask("unicode")
    it.page.reload()
    assert it.questions() == ["hi", "unicode"] and it.answer() == "café and😀!!!"
    assert it.page.locator(".figures").count() == 2


def test_page_reload_in_mid_answer_keeps_what_was_written(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.send("forever")
    it.wait(".answer .md", "Tick tock")
    it.page.reload()
    it.wait(".figures", "cut off")
    assert "Tick tock" in it.answer()
    eventually(lambda: server.status("recital")["requests_running"] == 0, "no request runs")


def test_page_keeps_the_versions_of_an_answer(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.ask("hi")
    it.ask("=")
    with it.page.expect_request("**/v1/chat/completions") as sent:
        it.page.locator("[aria-label='Answer again']").first.click()
    it.done()
    assert sent.value.post_data_json["messages"] == [{"role": "user", "content": "hi"}] and it.questions() == ["hi"]
    it.page.click("[aria-label='Edit and ask again']")
    it.page.fill("#box", "unicode")
    it.press("Enter")
    it.done()
    assert it.questions() == ["unicode"] and "3/3" in it.text(".answer .foot")
    it.page.click("[aria-label='Later version']")  # the first comes behind the last
    assert it.questions() == ["hi", "="] and "1/3" in it.page.locator(".answer .foot").first.inner_text()
    assert it.page.evaluate("document.activeElement.ariaLabel") == "Later version"
    it.page.reload()
    assert it.questions() == ["hi", "="]
    it.page.click("[aria-label='Earlier version']")
    with it.page.expect_request("**/v1/chat/completions") as sent:
        it.send("S")
    assert [m["content"] for m in sent.value.post_data_json["messages"]] == ["unicode", "café and😀!!!", "S"]
    it.done()


def test_page_copies_the_answer_as_it_was_written(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server, permissions=["clipboard-read", "clipboard-write"])
    it.load(talk("hi", page_said("**bold** `code`")))
    it.page.click("#chats .open")
    it.page.click("[aria-label='Copy the answer']")
    it.wait("#status", "Copied")
    assert it.page.evaluate("navigator.clipboard.readText()") == "**bold** `code`"


def test_page_sends_the_settings_of_its_chat(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.page.click("#tune")
    it.page.fill("#system", "Be brief.")
    for name, value in {"temperature": "0.2", "top_k": "5", "max_tokens": "3", "seed": "7", "top_p": "9"}.items():
        it.page.fill(f"[name={name}]", value)
    it.page.click("#done")  # the browser says what is wrong with the 9, and stays
    it.press("Escape")
    with it.page.expect_request("**/v1/chat/completions") as sent:
        it.send("hi")
    body = sent.value.post_data_json
    assert body["messages"][0] == {"role": "system", "content": "Be brief."} and "top_p" not in body  # 9 is out of bounds
    assert (body["temperature"], body["top_k"], body["max_tokens"], body["seed"]) == (0.2, 5, 3, 7)
    it.done()
    it.page.click("#new")
    it.page.click("#tune")
    assert it.page.input_value("[name=temperature]") == "" and it.page.input_value("#system") == ""


def test_page_export_and_import_carry_the_talk_over(tab: Callable[..., Tab], server: Server, tmp_path: Path) -> None:
    it, other = tab(server), tab(server)
    it.ask("hi")
    with it.page.expect_download() as saved:
        it.page.click("#export")
    saved.value.save_as(tmp_path / "chats.json")
    other.page.set_input_files("#imported", tmp_path / "chats.json")
    other.wait("#notice", "1 chat was imported")
    other.page.click("#chats .open")
    assert other.answer() == "Hello wide world" and other.text(".figures") == it.text(".figures")


def test_page_import_of_another_file_is_refused(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    chats = '{"format": "shimmy-chats", "chats": %s}'
    for text in ("hello", "{}", "[]", "null", chats % 3, chats % '[{"title": "x"}]'):  # the last has no turns
        it.page.set_input_files("#imported", {"name": "other.json", "mimeType": "application/json", "buffer": text.encode()})
        it.wait("#notice", "other.json was not imported")
        it.page.click("#notice [aria-label=Dismiss]")
    assert it.titles() == []


def test_page_import_keeps_only_what_fits(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    odd = talk(7, {"parts": [{"kind": "odd"}, 3, None], "figures": "x", "end": 1})
    it.load(odd | {"title": "<b>odd</b>", "settings": {"temperature": 9, "seed": [], "top_k": "3"}, "tools": "x", "model": []})
    it.page.click("#chats .open")
    assert it.titles() == ["<b>odd</b>"] and it.questions() == [""]
    settings = it.page.evaluate("current.settings")
    assert {name: value for name, value in settings.items() if value} == {"top_k": "3"}


def test_page_deleted_chat_stays_deleted_though_its_answer_was_being_written(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.send("forever")
    it.wait(".answer .md", "Tick tock")
    it.page.click("[aria-label='Delete forever']")
    eventually(lambda: server.status("recital")["requests_running"] == 0, "no request runs")
    it.page.reload()
    assert it.titles() == []


def test_page_question_goes_out_before_the_models_are_known(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.page.route("**/api/models", lambda route: None)  # never answered
    it.page.reload()
    assert it.ask("hi") == "Hello wide world" and it.text(".figures").startswith("recital")


def test_page_runs_the_calculator_and_shows_the_call(tab: Callable[..., Tab], serve: Serve) -> None:
    it = tab(serve("--models-dir", REPO / "models"))
    it.wait("#state", "not loaded")
    it.page.click("#tune")
    it.page.check("[name=calculator]")
    it.page.click("#done")
    assert "5221" in it.ask("What is 4827 plus 394?")
    it.page.click("details.tool summary")
    shown = it.text("details.tool")
    assert "calculator → 5221" in shown and "4827 + 394" in shown
    with it.page.expect_request("**/v1/chat/completions") as sent:
        it.send("Thanks!")
    roles = [m["role"] for m in sent.value.post_data_json["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant", "user"]
    it.done()
    assert it.page.locator(".card.bad").count() == 0


def test_page_with_the_tiny_model_alone_says_how_to_get_a_real_one(tab: Callable[..., Tab], serve: Serve) -> None:
    it = tab(serve("--models-dir", REPO / "models"))
    assert "python shimmy.py pull OWNER/REPO" in it.wait(".empty", "Only the tiny").inner_text()


DROP = """([name, data, event]) => {
  const moved = new DataTransfer();
  moved.items.add(new File([Uint8Array.from(atob(data), letter => letter.charCodeAt(0))], name));
  const more = event === "drop" ? {dataTransfer: moved} : {clipboardData: moved};
  box.dispatchEvent(new (event === "drop" ? DragEvent : ClipboardEvent)(event, {bubbles: true, cancelable: true, ...more}));
}"""


def test_page_refuses_files_kindly(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    files = {"cat.png": b"\x89PNG\0\xff", "a.bin": b"\x89\xff", "large.txt": b"a" * 300_000}
    for event, (name, data) in itertools.product(("drop", "paste"), files.items()):
        it.drop(name, data, event)
        it.wait("#notice", f"{name} cannot be read: only pictures and text files of up to 200 kB can.")
        it.page.click("#notice [aria-label=Dismiss]")
    assert it.page.locator("#files > *").count() == 0


def test_page_sends_a_text_file_before_the_question(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.drop("note.md", "é ```x```".encode())
    it.wait("#files details", "note.md")
    with it.page.expect_request("**/v1/chat/completions") as sent:
        it.send("hi")
    parts = [{"type": "text", "text": "note.md:\n\né ```x```\n"}, {"type": "text", "text": "hi"}]
    assert sent.value.post_data_json["messages"] == [{"role": "user", "content": parts}]
    it.done()
    it.page.click(".user details summary")
    assert it.text(".user details pre") == "é ```x```" and it.page.locator("#files > *").count() == 0


def test_page_sends_pictures_scaled_down_and_keeps_them(tab: Callable[..., Tab], seeing: Server) -> None:
    it = tab(seeing)
    eventually(lambda: "sees" in it.text("#model"), "the models are listed")
    it.drop("wide.png", png(np.full((10, 2000, 3), 90, np.uint8)), "paste")
    it.page.set_input_files("#added", [{"name": "cat.png", "mimeType": "", "buffer": RED}])
    it.wait("#files img[alt='cat.png']")
    it.page.click("[aria-label='Remove cat.png']")
    with it.page.expect_request("**/v1/chat/completions") as sent:
        it.send("What is this?")
    ((picture, question),) = (m["content"] for m in sent.value.post_data_json["messages"])
    assert question == {"type": "text", "text": "What is this?"} and picture["type"] == "image_url"
    url = picture["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    assert struct.unpack(">2I", base64.b64decode(url.partition(",")[2])[16:24]) == (1280, 7)
    it.done()
    assert it.page.locator(".card.bad").count() == 0
    it.page.reload()
    assert it.page.locator(".user img").evaluate_all("all => all.map(i => [i.alt, i.naturalWidth])") == [["wide.png", 1280]]
    it.page.click("[aria-label='Edit and ask again']")
    assert it.page.locator("#files img").count() == 1 and it.page.input_value("#box") == "What is this?"


def test_page_takes_no_picture_for_a_model_that_does_not_see(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.pick("plain")
    it.drop("cat.png", RED)
    it.wait("#notice", "cat.png was not added: plain does not see pictures.")
    assert it.page.locator("#files > *").count() == 0


def test_page_drops_the_oldest_pictures_where_its_storage_is_full(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    noise = [png(np.random.default_rng(n).integers(0, 256, (100, 100, 3), np.uint8)) for n in range(3)]
    pictures = ["data:image/png;base64," + base64.b64encode(picture).decode() for picture in noise]
    files = [[{"name": f"{n}.png", "picture": url}] for n, url in enumerate(pictures)]
    old = talk("old", page_said("a", files=files[0]), "and", page_said("", files=files[1]))
    it.load(talk("new", page_said("b", files=files[2])), old)
    it.page.evaluate("""size => {
      for (; size > 250; size >>= 1) try { localStorage.fill = (localStorage.fill || "") + "x".repeat(size); } catch {}
    }""", 1 << 22)  # fmt: skip
    it.page.click("#chats li:first-child .open")
    it.ask("hi")
    it.wait("#notice", "The browser’s storage is full: the oldest pictures were removed from it.")
    it.page.reload()
    assert it.answer() == "Hello wide world" and it.page.locator(".user img").count() == 1
    it.page.click("#chats li:nth-child(2) .open")
    assert it.page.locator(".user img").evaluate_all("all => all.map(i => i.alt)") == ["1.png"]
    assert "no more room" in (it.page.locator(".user details").text_content() or "")


def test_page_tabs_that_answer_in_one_chat_keep_both_answers(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.ask("hi")
    other = it.context.new_page()
    other.goto(it.page.url)
    other.wait_for_selector(".answer .figures")
    it.send("forever")
    other.wait_for_selector(".words >> text=forever")
    other.fill("#box", "forever too")
    other.keyboard.press("Enter")
    it.wait(".words", "forever too")
    other.wait_for_selector(".answer:last-child .md p")
    for stopping in (other, it.page):  # whoever ends first has not seen the other's words
        stopping.keyboard.press("Escape")
        stopping.wait_for_selector("#send[aria-label=Send]")
    for page in (it.page, other):
        page.reload()
        assert page.locator(".user .words").all_inner_texts() == ["hi", "forever", "forever too"]
        assert all("Tick" in text for text in page.locator(".answer .md").all_inner_texts()[1:])


# The page and hostile text.

HOSTILE_ANSWER = {
    "Hello": "<img src=x onerror=window.hacked=1>\n\n<script>window.hacked=1</script>\n",
    "▁wide": "[x](javascript:window.hacked=1) ![y](javascript:window.hacked=1) "
             "[z](data:text/html,<script>window.hacked=1</script>)\n",
    "▁world": "\n```html\n<svg/onload=window.hacked=1>\n```\n"
              "| <b onclick=window.hacked=1> |\n|---|\n| <iframe src=javascript:hacked=1> |\n",
}  # fmt: skip


def test_page_executes_nothing_of_a_hostile_answer(tab: Callable[..., Tab], serve: Serve, tmp_path: Path) -> None:
    write_recital(tmp_path / "models" / "recital.gguf", tokens=[HOSTILE_ANSWER.get(t, t).replace(" ", "▁") for t in VOCABULARY])
    it = tab(serve("--models-dir", tmp_path / "models", "--model", "recital"))
    text = it.ask("hi")
    assert "<img src=x onerror" in text and "javascript:" in text and "<svg/onload" in text
    assert it.page.evaluate("window.hacked") is None
    assert it.page.locator("#log").locator("img, script, iframe, b, a, svg[onload]").count() == 0


def test_page_executes_nothing_of_a_hostile_model_name(tab: Callable[..., Tab], serve: Serve, tmp_path: Path) -> None:
    name = "<img src=x onerror=hacked=1>"
    write_recital(tmp_path / "models" / f"{name}.gguf", name=f"{name}<script>hacked=1</script>")
    it = tab(serve("--models-dir", tmp_path / "models", "--model", tmp_path / "models" / f"{name}.gguf"))
    assert it.ask("hi") == "Hello wide world"
    assert "<img" in it.text("#model") and "<img" in it.text(".figures")
    assert it.page.evaluate("window.hacked") is None and it.page.locator("body img").count() == 0


MARKDOWN = {
    "paragraphs": ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
    "headings": ("# A\n### B ##", "<h1>A</h1><h3>B</h3>"),
    "emphasis": ("**a** *b* ***c*** __d__ _e_ ~~f~~", "<p><strong>a</strong> <em>b</em> <strong><em>c</em></strong> "
                 "<strong>d</strong> <em>e</em> <del>f</del></p>"),
    "nested emphasis": ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
    "no emphasis": ("2 * 3 * 4 snake_case_name a**", "<p>2 * 3 * 4 snake_case_name a**</p>"),
    "code": ("`a*b*` ``c`d``", "<p><code>a*b*</code> <code>c`d</code></p>"),
    "escapes": (r"\*a\* \`b\`", "<p>*a* `b`</p>"),
    "list": ("- a\n- b\n  - c\n\nd", "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul></li></ul><p>d</p>"),
    "numbers": ("3. a\n4. b\n   - c", '<ol start="3"><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul></li></ol>'),
    "quote": ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
    "rule": ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
    "html": ("<b>&amp;</b>", "<p>&lt;b&gt;&amp;amp;&lt;/b&gt;</p>"),
    "relative link": ("[a](/b) [c](b:d) [e](//f)", "<p>[a](/b) [c](b:d) [e](//f)</p>"),
    "math": (r"\(x_1\) and \[*y*\], a\_b", r"<p>\(x_1\) and \[*y*\], a_b</p>"),
    "tasks": ("- [x] a\n- [ ] b\n- [y] c", "<ul><li><p>☑ a</p></li><li><p>☐ b</p></li><li><p>[y] c</p></li></ul>"),
    "line break": ("a<br>b `<br>` <br", "<p>a\nb <code>&lt;br&gt;</code> &lt;br</p>"),
    "line break in a table": ("|a|\n|-|\n|b<br>c<BR />d|", '<div class="wide" tabindex="0" role="region" aria-label="Table">'
                              "<table><thead><tr><th>a</th></tr></thead><tbody><tr><td>b\nc\nd</td></tr></tbody></table></div>"),
}  # fmt: skip


def test_page_markdown(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    drawn = {name: (text, it.markdown(text)) for name, (text, _) in MARKDOWN.items()}
    assert drawn == MARKDOWN


def test_page_links_open_elsewhere_and_tell_nothing(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    text = '[a](https://a.example/x_(y) "t") <https://b.example/> https://c.example/d. [e](mailto:e@f.example)'
    it.load(talk("hi", page_said(text)))
    it.page.click("#chats .open")
    links = it.page.locator(".md a").evaluate_all("all => all.map(a => [a.href, a.rel, a.target])")
    assert [href for href, _, _ in links] == [
        "https://a.example/x_(y)", "https://b.example/", "https://c.example/d", "mailto:e@f.example"]  # fmt: skip
    assert {(rel, target) for _, rel, target in links} == {("noopener noreferrer", "_blank")}


def test_page_table_and_code(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.load(talk("hi", page_said("| a | b |\n|:-:|--:|\n| `x` | 1 |\n\n```python\nif x:\n    y\n```\n\n~~~\nz")))
    it.page.click("#chats .open")
    assert it.page.locator("th, td").all_inner_texts() == ["a", "b", "x", "1"]
    assert it.page.locator(".code pre").all_text_contents() == ["if x:\n    y", "z"]
    assert it.page.locator(".code span").all_inner_texts() == ["python", "text"]


MARKDOWN_BOMBS = {
    "quotes": "> " * 50_000, "lists": "- " * 50_000, "numbers": "1. " * 50_000, "stars": "*" * 100_000,
    "openers": "**a " * 50_000, "pairs": "*a **b " * 20_000, "brackets": "[" * 100_000, "links": "[a](b" * 30_000,
    "ticks": "".join("`" * n + "a" for n in range(1, 600)), "underscores": "_a_" * 40_000, "tables": "|-" * 50_000,
    "table rows": "|a|\n|-|\n" + "|\n" * 20_000, "blanks": " " * 100_000 + "x", "fences": "```\n" * 30_000,
    "indents": "\n".join(" " * n + "- a" for n in range(1000)), "parentheses": "[a](" + "(" * 50_000,
    "fence marks": "~" * 100_000 + "`", "languages": "```" + "a" * 100_000 + "`", "spaces": "[a](" + " " * 100_000,
    "full stops": "https://a" + "." * 100_000 + "b", "rules": "- " * 3 + " " * 50_000 + "x", "addresses": "https://" * 20_000,
    "stairs": "\n".join(">" * n for n in range(1000)), "math": r"\(" * 50_000 + r"\[" * 50_000, "spans": "`a` " * 60_000,
    "blocks": "a\n\n" * 60_000, "items": "- a\n" * 60_000,
}  # fmt: skip


def test_page_markdown_bombs_are_shown_like_any_text(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    for name, bomb in MARKDOWN_BOMBS.items():
        deepest, seconds = it.page.evaluate("""text => {
          const drawn = make("div"), began = performance.now();
          drawMarkdown(drawn, text);
          const seconds = (performance.now() - began) / 1000;
          const depth = e => { let n = 0; for (; e !== drawn; e = e.parentElement) n++; return n; };
          return [Math.max(...[...drawn.querySelectorAll("*")].map(depth)), seconds];
        }""", bomb)  # fmt: skip
        assert deepest < 30 and seconds < 5, name


def test_page_draws_a_growing_answer_as_it_would_draw_it_whole(tab: Callable[..., Tab], server: Server) -> None:
    text = "\n\n".join(text for text, _ in MARKDOWN.values()) + "\n```js\ncode\n```\n\n|a|b|\n|-|-|\n|c|d|\n\nend"
    same = tab(server).page.evaluate("""text => {
      const growing = make("div");
      for (let n = 0; n <= text.length; n++) {
        const whole = make("div");
        drawMarkdown(growing, text.slice(0, n));
        drawMarkdown(whole, text.slice(0, n));
        if (growing.innerHTML !== whole.innerHTML) return text.slice(0, n);
      }
      return "same"; }""", text)  # fmt: skip
    assert same == "same"


def test_page_draws_only_the_end_of_a_long_answer_again(tab: Callable[..., Tab], server: Server) -> None:
    """110 kB took 96 ms, each time that a word came; so did long lists, tables and code."""
    words = "Some *words* and `code`, in a line.\n"
    shapes = {"paragraphs": (words + "\n") * 2000, "list": ("- " + words) * 2000, "code": "```\n" + words * 2000,
              "table": "|a|b|\n|-|-|\n" + "|some|words|\n" * 2000}  # fmt: skip
    milliseconds = tab(server).page.evaluate("""shapes => Object.fromEntries(Object.entries(shapes).map(([name, text]) => {
      const drawn = make("div");
      drawMarkdown(drawn, text);
      const began = performance.now();
      for (let n = 0; n < 20; n++) drawMarkdown(drawn, text += "word ");
      return [name, (performance.now() - began) / 20]; }))""", shapes)  # fmt: skip
    assert max(milliseconds.values()) < 5, milliseconds


def test_page_composing_a_word_neither_sends_nor_stops(tab: Callable[..., Tab], server: Server) -> None:
    """Enter and Escape belong to the input method then; Safari tells its last Enter by the code 229 only."""
    it = tab(server)
    it.send("forever")
    it.wait(".answer .md", "Tick tock tick")
    for key, more in (("Escape", "isComposing: true"), ("Escape", "keyCode: 229"), ("Enter", "keyCode: 229")):
        it.page.evaluate(f"box.dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}', bubbles: true, {more}}}))")
    time.sleep(0.3)
    assert it.page.locator("#send[aria-label=Stop]").count() == 1 and it.questions() == ["forever"]
    it.press("Escape")
    it.wait(".figures", "stopped")


def test_page_takes_what_another_tab_has_written(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.ask("hi")
    other = it.context.new_page()
    other.goto(it.page.url)
    other.wait_for_selector(".answer .figures")
    it.ask("=")
    other.wait_for_function("document.querySelectorAll('.user').length === 2")
    other.fill("#box", "S")
    other.keyboard.press("Enter")
    it.page.wait_for_function("document.querySelectorAll('.answer .figures').length === 3")
    assert it.questions() == ["hi", "=", "S"]
    other.on("dialog", lambda dialog: dialog.accept())
    other.click("#chats button[aria-label^=Delete]")
    it.wait(".empty")


def test_page_enter_is_a_new_line_on_a_phone(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server, width=360, height=640, has_touch=True, is_mobile=True)
    it.page.fill("#box", "one")
    it.page.focus("#box")
    it.press("End", "Enter")
    assert it.page.input_value("#box") == "one\n" and it.questions() == []
    it.page.tap("#send")
    it.done()


def test_page_keeps_the_focus_where_a_chat_was_deleted(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.load(*(talk("hi", page_said("Hello"), title=title) for title in ("one", "two", "three")))
    it.page.click("#chats li:first-child .open")
    it.page.click("#chats li:nth-child(2) button[aria-label^=Delete]")
    assert it.page.evaluate("document.activeElement.parentElement.parentElement.id") == "chats"


def test_page_turns_have_headings_and_the_answer_is_said(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.ask("hi")
    assert it.page.locator("#log h2").all_text_contents() == ["You", "Answer"]
    assert "Hello wide world" in it.page.text_content("#status")


# The page for everybody.

SAMPLE = talk(
    "How?",
    {"model": "recital", "end": "length",
     "figures": {"first": 1, "rate": 2, "completion_tokens": 3, "prompt_tokens": 4, "cached": 5},
     "parts": [{"kind": "thought", "text": "Hm"},
               {"kind": "tool", "id": "c", "name": "calculator", "arguments": "{}", "result": "1"},
               {"kind": "text", "text": "# H\n\n> quote\n\n`code` [link](https://a.example)\n\n```py\nx\n```\n\n|a|\n|-|\n|b|"}]},
    "And?",
    {"end": "error", "parts": [], "error": {"code": "gone", "message": "The server does not answer"}},
)  # fmt: skip

CONTRASTS = r"""() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = color => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = node => { for (; node; node = node.parentElement) {
    const color = rgba(getComputedStyle(node).backgroundColor); if (color[3] === 255) return color; } return [255, 255, 255]; };
  const poor = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || node.matches("input, textarea, select");
    if (!own || !node.checkVisibility({visibilityProperty: true}) || node.closest(".unseen, script, style")) continue;
    const [a, b] = [light(rgba(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) poor.push([node.tagName, node.className, node.textContent.slice(0, 30), ratio]);
  }
  return poor; }"""


@cases("theme", {"light": "light", "dark": "dark"})
def test_page_contrast_is_enough(theme: str, tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server, color_scheme=theme)
    it.wait("#state", "loaded")
    assert it.page.evaluate(CONTRASTS) == []
    it.load(SAMPLE)
    it.page.click("#chats .open")
    it.page.locator("details").evaluate_all("all => all.forEach(each => each.open = true)")
    assert it.page.evaluate(CONTRASTS) == []
    it.page.click("#tune")
    assert it.page.evaluate(CONTRASTS) == []


def test_page_focus_goes_in_the_order_of_reading(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.ask("hi")
    it.page.focus("#skip")
    seen = []
    for _ in range(14):
        it.press("Tab")
        seen.append(it.page.evaluate("(e => e.id || e.getAttribute('aria-label') || e.textContent)(document.activeElement)"))
        assert it.page.evaluate("document.activeElement.matches(':focus-visible')"), seen
    assert seen == [
        "new", "hi", "Delete hi", "export", "import", "model", "tune", "log", "Copy the question", "Edit and ask again",
        "Copy the answer", "Answer again", "add", "box"]  # fmt: skip


def test_page_every_field_and_button_has_a_name(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.load(SAMPLE)
    it.page.click("#chats .open")
    it.page.click("#tune")
    nameless = it.page.evaluate("""() => [...document.querySelectorAll("button, input, select, textarea, [tabindex]")].filter(
      e => !e.labels?.length && !e.getAttribute("aria-label") && !e.textContent.trim()).map(e => e.outerHTML)""")
    assert nameless == []


def test_page_works_by_keyboard_alone(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.wait("#state", "loaded")
    it.page.evaluate("document.activeElement.blur()")
    it.press("/")
    it.page.keyboard.type("hi")
    it.press("Shift+Enter")
    it.page.keyboard.type("there")
    it.press("Enter")
    it.done()
    assert it.questions() == ["hi\nthere"]
    it.press("ArrowUp")
    it.page.wait_for_selector("#box:focus")
    it.press("End")
    it.page.keyboard.type(" forever")
    it.press("Enter")
    it.wait(".answer .md", "Tick tock")
    it.press("Escape")
    it.wait(".figures", "stopped")
    it.press("Alt+n")
    assert it.page.locator(".empty").count() == 1 and it.page.evaluate("document.activeElement.id") == "box"


def test_page_is_usable_on_a_phone(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server, width=360, height=640, has_touch=True)
    it.load(SAMPLE)
    it.page.click("#menu")
    it.page.click("#chats .open")
    assert not it.page.evaluate("document.querySelector('#side').matches(':popover-open')")
    widths = it.page.evaluate("[document.documentElement.scrollWidth, log.scrollWidth, log.clientWidth]")
    assert widths[0] == 360 and widths[1] == widths[2]
    for control in ("#send", "#box", "#model", "#menu", "#tune"):
        place = it.page.locator(control).bounding_box()
        assert place and place["x"] >= 0 and place["x"] + place["width"] <= 360 and place["y"] + place["height"] <= 640
    it.page.tap("#tune")
    assert it.page.evaluate("document.querySelector('#settings').getBoundingClientRect().right") <= 360


def test_page_drawer_is_out_of_the_way_when_closed(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server, width=360, height=640)
    assert it.page.locator("#new").is_hidden()
    it.page.click("#menu")
    assert it.page.evaluate("document.activeElement.id") == "new"
    it.press("Escape")
    it.page.locator("#new").wait_for(state="hidden")
    assert it.page.evaluate("document.activeElement.id") == "menu"


def test_page_scrolls_with_an_answer_only_from_its_end(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server, height=400)
    it.load(talk("a\n" * 60, page_said("b\n\n" * 60)))
    it.page.click("#chats .open")
    at_end = "log.scrollHeight - log.scrollTop - log.clientHeight < 5"
    it.send("forever")
    it.wait(".answer:last-child .md", "Tick tock tick")
    eventually(lambda: it.page.evaluate(at_end), "the end is shown")
    it.page.evaluate("log.scrollTop = 0")
    length = len(it.answer())
    eventually(lambda: len(it.answer()) > length + 200, "more text")
    assert it.page.evaluate("log.scrollTop") == 0
    it.page.evaluate("log.scrollTop = log.scrollHeight")
    eventually(lambda: it.page.evaluate(at_end), "the end is shown")
    it.press("Escape")


# ── Pull ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
# Fetches from a hub in this process: its own port answers the API and redirects, another port has the files.

COMMIT = "c0ffee" * 6 + "c0ff"
REPO_NAME = "tester/Recital-GGUF"


class FakeHub:
    """A hub with one repository; tests change what it does."""

    def __init__(self) -> None:
        self.repo = REPO_NAME
        self.files: dict[str, bytes] = {}
        self.names: list[Any] = []  # more names in the list, whatever they are
        self.sizes: dict[str, int] = {}  # instead of the true ones
        self.cuts: list[float] = []  # each download ends at this part of the file
        self.answers: list[tuple[int, dict[str, str]]] = []  # what the next requests get instead
        self.token = self.error_code = ""
        self.gated = self.ignores_range = self.spoils = False
        self.hold = threading.Event()  # downloads wait in their middle until it is set
        self.hold.set()
        self.seen: list[tuple[str, str, dict[str, str]]] = []  # whose port, path, headers
        self._servers = [self._listen(name) for name in ("hub", "cdn")]
        self.url, cdn = (f"http://127.0.0.1:{each.server_address[1]}" for each in self._servers)
        self.cdn = cdn.replace("127.0.0.1", "localhost")
        self.env = {"HF_ENDPOINT": self.url}

    def _listen(self, name: str) -> http.server.ThreadingHTTPServer:
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.seen.append((name, self.path, dict(self.headers)))
                if hub.answers:
                    return self.reply(*hub.answers.pop(0))
                (hub.answer_api if name == "hub" else hub.answer_file)(self)

            def reply(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        return running

    def close(self) -> None:
        self.hold.set()
        for each in self._servers:
            each.shutdown()
            each.server_close()

    def answer_api(self, request: Any) -> None:
        path = urlsplit(request.path).path
        if path == "/api/models":
            return request.reply(200, {}, json.dumps([{"id": REPO_NAME}, {"id": "x/../y"}]).encode())
        if self.repo not in path:
            return request.reply(401, {"X-Error-Code": "RepoNotFound"})
        allowed = not self.gated or request.headers.get("Authorization") == f"Bearer {self.token}"
        if path.startswith("/api/models/"):
            return request.reply(200, {}, json.dumps(self.listing()).encode())
        if not allowed:
            return request.reply(403 if request.headers.get("Authorization") else 401, {"X-Error-Code": "GatedRepo"})
        request.reply(302, {"Location": f"{self.cdn}/{path.partition(COMMIT)[2].strip('/')}"})

    def listing(self) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = [{"rfilename": "README.md", "size": 3, "blobId": "1" * 40}]
        for name, data in self.files.items():
            size, digest = self.sizes.get(name, len(data)), hashlib.sha256(data).hexdigest()
            siblings.append({"rfilename": name, "size": size, "blobId": "2" * 40, "lfs": {"sha256": digest, "size": size}})
        siblings += [{"rfilename": n, "size": 1, "lfs": {"sha256": "a" * 64}} for n in self.names]
        return {"sha": COMMIT, "siblings": siblings}

    def answer_file(self, request: Any) -> None:
        data = self.files[unquote(urlsplit(request.path).path).strip("/")]
        start = int((re.match(r"bytes=(\d+)-", request.headers.get("Range") or "") or (0, 0))[1])
        start = 0 if self.ignores_range else start
        status, headers = 200, {"Content-Length": str(len(data) - start), "ETag": '"v1"'}
        if start:
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(data) - 1}/{len(data)}"
        sent = data[start : int(self.cuts.pop(0) * len(data))] if self.cuts else data[start:]
        sent = bytes(len(sent)) if self.spoils else sent
        request.close_connection = len(sent) < len(data) - start
        half = len(sent) // 2
        request.reply(status, headers, sent[:half])
        self.hold.wait(HANG)
        request.wfile.write(sent[half:])

    def downloads(self) -> list[dict[str, str]]:
        return [headers for port, _, headers in self.seen if port == "cdn"]


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    running = FakeHub()
    running.files = {"recital-q4_k_m.gguf": os.urandom(400_000), "recital-q8_0.gguf": os.urandom(500_000)}
    yield running
    running.close()


pull = functools.partial(shimmy, "pull")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pull in this process waits only briefly before it tries again."""
    monkeypatch.setattr(module, "PULL_RETRY_SECONDS", (0.01, 0.01, 0.01))


def cache(home: Path) -> Path:
    return home / ".cache" / "huggingface" / "hub" / f"models--{REPO_NAME.replace('/', '--')}"


def fetched(home: Path, name: str) -> bytes:
    return (cache(home) / "snapshots" / COMMIT / name).read_bytes()


def assert_pulled(done: subprocess.CompletedProcess[bytes], home: Path, hub: FakeHub, name: str = "recital-q4_k_m.gguf") -> None:
    """Asserts that a pull fetched this file whole."""
    assert done.returncode == 0 and fetched(home, name) == hub.files[name], done.stderr


def parts(home: Path) -> list[Path]:
    return list((cache(home) / "blobs").glob("*.incomplete"))


def test_pull_lays_files_out_as_the_hubs_cache_and_ends_with_the_next_command(hub: FakeHub, tmp_path: Path) -> None:
    done = pull(REPO_NAME, home=tmp_path, env=hub.env)
    data, place = hub.files["recital-q4_k_m.gguf"], cache(tmp_path) / "snapshots" / COMMIT / "recital-q4_k_m.gguf"
    assert (done.returncode, done.stdout.decode()) == (0, f"{place}\n"), done.stderr
    assert os.readlink(place) == f"../../blobs/{hashlib.sha256(data).hexdigest()}" and place.read_bytes() == data
    assert (cache(tmp_path) / "refs" / "main").read_text() == COMMIT and not parts(tmp_path)
    assert 'generate recital-q4-k-m "Hello"' in done.stderr.decode() and "there are also Q8_0 (488KB)" in done.stderr.decode()
    before = len(hub.downloads())
    again = pull(REPO_NAME, home=tmp_path, env=hub.env)
    assert again.returncode == 0 and b"is here already" in again.stderr and len(hub.downloads()) == before


def test_pulled_model_is_found_by_huggingface_hub(hub: FakeHub, tmp_path: Path) -> None:
    library = pytest.importorskip("huggingface_hub")
    pull(f"{REPO_NAME}:Q8_0", home=tmp_path, env=hub.env)
    folder = cache(tmp_path).parent
    found = library.hf_hub_download(REPO_NAME, "recital-q8_0.gguf", cache_dir=folder, local_files_only=True)
    assert Path(found).read_bytes() == hub.files["recital-q8_0.gguf"]
    scan = library.scan_cache_dir(folder)
    (repo,) = scan.repos
    assert not scan.warnings and repo.repo_id == REPO_NAME and repo.nb_files == 1
    assert next(iter(repo.revisions)).refs == {"main"}


@cases("names,part,chosen", {
    "the usual one": (["m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-Q2_K.gguf"], "", "m-Q4_K_M.gguf"),
    "its small sister": (["m-Q4_0.gguf", "m-Q4_K_S.gguf", "m-Q5_K_M.gguf"], "", "m-Q4_K_S.gguf"),
    "five bits rather than three": (["m-Q3_K_M.gguf", "m-Q5_K_M.gguf"], "", "m-Q5_K_M.gguf"),
    "eight rather than sixteen": (["m-f16.gguf", "m-Q8_0.gguf"], "", "m-Q8_0.gguf"),
    "one without a name": (["model.gguf"], "", "model.gguf"),
    "Ollama's latest": (["m-Q8_0.gguf", "m-Q4_K_M.gguf"], "latest", "m-Q4_K_M.gguf"),
    "named in another case": (["m-Q8_0.gguf", "m-Q4_K_M.gguf"], "q8_0", "m-Q8_0.gguf"),
    "by its end": (["m-UD-Q4_K_XL.gguf", "m-Q4_K_M.gguf"], "UD-Q4_K_XL", "m-UD-Q4_K_XL.gguf"),
    "by its file": (["a.Q4_0.gguf", "b.Q4_0.gguf"], "b.Q4_0.gguf", "b.Q4_0.gguf"),
    "by its folder": (["Q8_0/m.gguf", "F16/m.gguf"], "F16", "F16/m.gguf"),
    "no projector": (["mmproj-m-Q4_K_M.gguf", "m-Q8_0.gguf"], "", "m-Q8_0.gguf"),
    "no shards that are not all there": (["a-00001-of-00002.gguf", "b-00001-of-00001.gguf"], "", "b-00001-of-00001.gguf"),
})  # fmt: skip
def test_pull_chooses_a_quantization(names: list[str], part: str, chosen: str) -> None:
    offer = module.choose_offer(module.offers_of(module.RemoteFile(name, "", 1) for name in names), part)
    assert offer and [file.name for file in offer.files] == [chosen]


@cases("names, chosen", {
    "none": (["m-Q8_0.gguf"], None),
    "half precision": (["m-Q8_0.gguf", "mmproj-m-F32.gguf", "mmproj-m-F16.gguf"], "mmproj-m-F16.gguf"),
    "whatever there is": (["m-Q8_0.gguf", "mmproj-BF16.gguf"], "mmproj-BF16.gguf"),
    "the nearest": (["Q8_0/m.gguf", "mmproj-F16.gguf", "Q8_0/mmproj-F32.gguf"], "Q8_0/mmproj-F32.gguf"),
    "above": (["Q8_0/m.gguf", "mmproj-F16.gguf", "F16/mmproj-F16.gguf"], "mmproj-F16.gguf"),
    "no GGUF": (["m-Q8_0.gguf", "mmproj-F16.safetensors"], None),
})  # fmt: skip
def test_pull_chooses_a_projector(names: list[str], chosen: str | None) -> None:
    files = [module.RemoteFile(name, "", 1) for name in names]
    found = module.projector_for(module.offers_of(files)[0], files)
    assert [file.name for file in found] == ([chosen] if chosen else [])


@cases("flags, here", {"with it": ((), True), "without": (("--no-mmproj",), False)})
def test_pull_fetches_the_projector_too(flags: tuple[str, ...], here: bool, hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {"m-Q4_K_M.gguf": os.urandom(1000), "mmproj-F16.gguf": os.urandom(500)}
    done = shimmy("pull", REPO_NAME, *flags, home=tmp_path, env=hub.env)
    assert done.stdout.decode().endswith("m-Q4_K_M.gguf\n"), done.stderr
    assert (cache(tmp_path) / "snapshots" / COMMIT / "mmproj-F16.gguf").exists() is here


def test_pull_fetches_every_shard(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {f"Q4_K_M/big-0000{i}-of-00003.gguf": os.urandom(1000 + i) for i in (1, 2, 3)}
    done = pull(REPO_NAME, home=tmp_path, env=hub.env)
    assert done.stdout.decode().endswith("Q4_K_M/big-00001-of-00003.gguf\n"), done.stderr
    assert all(fetched(tmp_path, name) == data for name, data in hub.files.items())


def test_pull_sends_the_token_of_the_environment_or_of_hf_auth_login_to_the_hub_only(hub: FakeHub, tmp_path: Path) -> None:
    done = pull(REPO_NAME, home=tmp_path, env={**hub.env, "HF_TOKEN": "hf_secret"})
    sent = {(port, headers.get("Authorization")) for port, _, headers in hub.seen}
    assert done.returncode == 0 and sent == {("hub", "Bearer hf_secret"), ("cdn", None)}
    (tmp_path / ".cache" / "huggingface" / "token").write_text("hf_stored\n")
    hub.gated, hub.token = True, "hf_stored"
    assert pull(f"{REPO_NAME}:Q8_0", home=tmp_path, env=hub.env).returncode == 0


@cases("token", {"none": "", "another account's": "hf_other"})
def test_pull_of_a_gated_repository_says_where_its_licence_is(token: str, hub: FakeHub, tmp_path: Path) -> None:
    hub.gated, hub.token = True, "hf_right"
    done = pull(REPO_NAME, home=tmp_path, env={**hub.env, "HF_TOKEN": token})
    error = done.stderr.decode().splitlines()[-1]
    assert done.returncode == 1 and f"accept its licence at {hub.url}/{REPO_NAME}" in error and "HF_TOKEN" in error


def says(body: bytes) -> Callable[[Any], None]:
    """An answer of the hub's."""
    return lambda request: request.reply(200, {}, body)


NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_secret"}
BRACKET, PORT = "http://[bad/x.gguf", "http://127.0.0.1:99999/x.gguf"  # no addresses
FAILING_PULLS: dict[str, tuple[str, dict[str, Any], list[str]]] = {  # what is asked for, how the hub is, what is said
    "an unknown repository": ("tester/Recitel-GGUF", {}, [
        "there is no tester/Recitel-GGUF", "HF_TOKEN", f"did you mean {REPO_NAME}?"]),
    "a search nested without end": (REPO_NAME, {"answer_api": lambda request: request.reply(
        *((200, {}, b"[" * 100_000) if "search" in request.path else (404, {})))}, ["there is no"]),
    "an unknown quantization": (f"{REPO_NAME}:Q5_0", {}, ["no Q5_0", "Q4_K_M (391KB)", "Q8_0"]),
    "no GGUF": (REPO_NAME, {"files": {"model.safetensors": b"x"}}, ["no GGUF model", "-GGUF"]),
    **{f"no name: {name}": (name, {"env": {"HF_ENDPOINT": NOWHERE["HF_ENDPOINT"]}}, ["OWNER/REPO"])
       for name in ("recital", "../x", "a/..", "", "file:///etc/passwd")},
    "an hour to wait": (REPO_NAME, {"answers": [(429, {"Retry-After": "3600"})]}, ["429", "3600 s"]),
    **{f"no hub: {answer[:9]!r}": (REPO_NAME, {"answer_api": says(answer)}, ["no list"])
       for answer in (b"<html>", b"[]", b'{"sha":"../..","siblings":[]}', b"[" * 100_000)},
    "no network": (REPO_NAME, {"env": {"HF_ENDPOINT": NOWHERE["HF_ENDPOINT"]}}, [
        "127.0.0.1:9 cannot be reached: Connection refused"]),
    **{f"an endpoint {endpoint}": (REPO_NAME, {"env": {"HF_ENDPOINT": endpoint}}, ["HF_ENDPOINT", "write an address"])
       for endpoint in ("huggingface.co", "file:///etc", "http://[x")},
    **{f"a redirect to {place}": (REPO_NAME, {"answers": [(302, {"Location": place})] * 20}, ["redirects"])
       for place in ("file:///etc/passwd", "/api/again")},
    **{f"a redirect to {place}": ("{cdn}/x.gguf", {"answers": [(302, {"Location": place})], "env": NOWHERE}, [
        "redirects to", "refused"]) for place in (BRACKET, PORT)},
    **{f"no address: {place}": (place, {"env": NOWHERE}, ["is no model to fetch"])
       for place in (BRACKET, PORT, "http:///x.gguf")},
    "a web page": ("{cdn}/own.gguf", {"files": {"own.gguf": b"<html>"}}, ["no GGUF file"]),
    **{f"a length {length[:9]}": ("{cdn}/x.gguf", {
        "answers": [(200, {"Content-Length": length})], "answer_file": says(b"GGUF"), "env": NOWHERE}, [""])
       for length in ("²", "9" * 400, "9" * 5000)},
}  # fmt: skip


@cases("name, changes, words", FAILING_PULLS)
def test_pull_that_fails_says_why_in_one_line(
    name: str, changes: dict[str, Any], words: list[str], hub: FakeHub, tmp_path: Path
) -> None:
    for what, value in changes.items():
        setattr(hub, what, copy.copy(value))
    assert_failed(pull(name.format(cdn=hub.cdn), home=tmp_path, env=hub.env), 1, *words)


@cases("cut", {"early": [0.3], "late": [0.99], "often": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]})
def test_pull_goes_on_after_the_connection_was_cut(cut: list[float], hub: FakeHub, quick: None, tmp_path: Path) -> None:
    hub.cuts = list(cut)
    assert_pulled(pull(REPO_NAME, home=tmp_path, env=hub.env), tmp_path, hub)
    assert [headers.get("Range") for headers in hub.downloads()] == [None, *(f"bytes={int(c * 400_000)}-" for c in cut)]


def test_pull_that_failed_is_continued_by_the_next(hub: FakeHub, quick: None, tmp_path: Path) -> None:
    hub.cuts = [0.5, 0.0, 0.0, 0.0]
    cut = pull(REPO_NAME, home=tmp_path, env=hub.env)
    assert_failed_last(cut, "pull again to go on", "195KB of 391KB")
    assert [part.stat().st_size for part in parts(tmp_path)] == [200_000]
    done = pull(REPO_NAME, home=tmp_path, env=hub.env)
    assert_pulled(done, tmp_path, hub)
    assert hub.downloads()[-1]["Range"] == "bytes=200000-" and not parts(tmp_path)
    assert "195KB still to fetch" in done.stderr.decode()


def assert_failed_last(done: subprocess.CompletedProcess[bytes], *words: str) -> None:
    """Asserts exit code 1 and that the last line on stderr contains the words."""
    message = done.stderr.decode()
    assert done.returncode == 1 and done.stdout == b"" and "Traceback" not in message
    assert all(word in message.splitlines()[-1] for word in words), message


def test_pull_begins_anew_where_the_server_ignores_ranges(hub: FakeHub, quick: None, tmp_path: Path) -> None:
    hub.ignores_range, hub.cuts = True, [0.3]
    assert_pulled(pull(REPO_NAME, home=tmp_path, env=hub.env), tmp_path, hub)


def test_pull_removes_what_has_the_wrong_checksum(hub: FakeHub, tmp_path: Path) -> None:
    hub.spoils = True
    assert_failed_last(pull(REPO_NAME, home=tmp_path, env=hub.env), "SHA-256 is wrong")
    assert list((cache(tmp_path) / "blobs").iterdir()) == [] and not (cache(tmp_path) / "refs").exists()


def test_pull_waits_as_long_as_a_busy_hub_asks_for(hub: FakeHub, tmp_path: Path) -> None:
    hub.answers = [(429, {"Retry-After": "2"})]
    began = time.monotonic()
    assert pull(REPO_NAME, home=tmp_path, env=hub.env).returncode == 0
    assert time.monotonic() - began >= 2


@cases("size, words", {"larger than the disk": (1 << 60, ["disk is too small", "1073741824.0GB"]),
                       "another than the hub states": (300_000, ["400000 bytes, not 300000"])})  # fmt: skip
def test_pull_of_a_file_of_the_wrong_size_fails(size: int, words: list[str], hub: FakeHub, tmp_path: Path) -> None:
    hub.sizes["recital-q4_k_m.gguf"] = size
    assert_failed_last(pull(REPO_NAME, home=tmp_path, env=hub.env), *words)
    assert bool(hub.downloads()) == (size < 1 << 60)


def test_pull_dry_run_fetches_nothing_and_says_whether_the_model_fits(hub: FakeHub, tmp_path: Path) -> None:
    done = pull(REPO_NAME, "--dry-run", home=tmp_path, env=hub.env)
    assert done.returncode == 0 and not hub.downloads() and not cache(tmp_path).exists()
    for word in (f"{REPO_NAME}:Q4_K_M: 391KB", "recital-q4_k_m.gguf", "fits the memory", "Q8_0 (488KB)", str(cache(tmp_path))):
        assert word in done.stdout.decode()
    hub.sizes["recital-q4_k_m.gguf"] = 1 << 50
    assert b"does not fit the memory" in pull(REPO_NAME, "--dry-run", home=tmp_path, env=hub.env).stdout


def start(*args: str, home: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [*command_of(), *args]
    return Child(
        command, cwd=home, env=environment(home, env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=interruptible
    )


def test_two_pulls_of_one_file_fetch_it_once(hub: FakeHub, tmp_path: Path) -> None:
    hub.hold.clear()
    running = [start("pull", REPO_NAME, home=tmp_path, env=hub.env) for _ in range(2)]
    eventually(lambda: len([path for _, path, _ in hub.seen if path.startswith("/api/")]) == 2, "both have asked")
    eventually(hub.downloads, "one fetches")
    time.sleep(0.5)
    hub.hold.set()
    done = [(each.communicate(timeout=HANG), each.returncode) for each in running]
    assert [code for _, code in done] == [0, 0], done
    assert len(hub.downloads()) == 1 and fetched(tmp_path, "recital-q4_k_m.gguf") == hub.files["recital-q4_k_m.gguf"]


def test_ctrl_c_leaves_a_part_that_the_next_pull_continues(hub: FakeHub, tmp_path: Path) -> None:
    hub.hold.clear()
    with start("pull", REPO_NAME, home=tmp_path, env=hub.env) as running:
        eventually(lambda: [part for part in parts(tmp_path) if part.stat().st_size == 200_000], "half of it is here")
        running.send_signal(signal.SIGINT)
        _, stderr = running.communicate(timeout=HANG)
    assert running.returncode == -signal.SIGINT and b"Traceback" not in stderr
    hub.hold.set()
    assert pull(REPO_NAME, home=tmp_path, env=hub.env).returncode == 0
    assert hub.downloads()[-1]["Range"] == "bytes=200000-"


BAD_NAMES: dict[str, Any] = {
    "up": "../../../evil-Q4_K_M.gguf", "absolute": "/tmp/evil-Q4_K_M.gguf", "backslashes": "..\\evil-Q4_K_M.gguf",
    "a drive": "C:evil-Q4_K_M.gguf", "escapes": "evil\x1b[31m-Q4_K_M.gguf", "no text": 5, "empty part": "a//evil-Q4_K_M.gguf",
}  # fmt: skip


@cases("names, sizes", {
    **{name: ([bad], None) for name, bad in BAD_NAMES.items()}, "a negative size": ([], -5), "a huge size": ([], 10**400),
})  # fmt: skip
def test_pull_ignores_hostile_file_names_and_impossible_sizes(
    names: list[Any], sizes: int | None, hub: FakeHub, tmp_path: Path
) -> None:
    if sizes is None:
        del hub.files["recital-q4_k_m.gguf"]
    else:
        hub.sizes["recital-q4_k_m.gguf"] = sizes
    hub.names = names
    done = pull(REPO_NAME, home=tmp_path, env=hub.env)
    assert done.returncode == 0 and done.stdout.decode().endswith("/recital-q8_0.gguf\n"), done.stderr
    assert b"evil" not in done.stderr and b"\x1b" not in done.stderr


def test_pull_of_an_address_lands_in_the_models_folder(hub: FakeHub, tmp_path: Path) -> None:
    hub.files["own.gguf"] = b"GGUF" + os.urandom(300_000)
    done = pull(f"{hub.cdn}/own.gguf?download=true", home=tmp_path, env={**hub.env, "HF_TOKEN": "hf_secret"})
    assert done.returncode == 0 and (tmp_path / "models" / "own.gguf").read_bytes() == hub.files["own.gguf"]
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["own.gguf"]
    assert not any("Authorization" in headers for _, _, headers in hub.seen)
    done = pull(f"{hub.url}/{REPO_NAME}/blob/main/recital-q8_0.gguf", home=tmp_path, env=hub.env)
    assert done.returncode == 0 and fetched(tmp_path, "recital-q8_0.gguf") == hub.files["recital-q8_0.gguf"]


def test_pull_of_an_address_resumes_the_same_file_only(hub: FakeHub, quick: None, tmp_path: Path) -> None:
    hub.files = {"own.gguf": b"GGUF" + os.urandom(300_000)}
    hub.cuts = [1.0, 0.5, 0.0, 0.0, 0.0]
    assert pull(f"{hub.cdn}/own.gguf", home=tmp_path, env=hub.env).returncode == 1
    assert pull(f"{hub.cdn}/own.gguf", home=tmp_path, env=hub.env).returncode == 0
    last = hub.downloads()[-1]
    assert (last["Range"], last["If-Range"]) == ("bytes=150002-", '"v1"')
    assert (tmp_path / "models" / "own.gguf").read_bytes() == hub.files["own.gguf"]


def test_pull_of_an_address_overwrites_no_other_file(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {"own.gguf": b"GGUF" + os.urandom(3000)}
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "own.gguf").write_bytes(b"mine")
    assert_failed(pull(f"{hub.cdn}/own.gguf", home=tmp_path, env=hub.env), 1, "own.gguf", "another file")
    assert (tmp_path / "models" / "own.gguf").read_bytes() == b"mine"


@pty
def test_pull_on_a_terminal_draws_a_bar(hub: FakeHub, tmp_path: Path) -> None:
    hub.hold.clear()
    with terminal("pull", REPO_NAME, home=tmp_path, env=hub.env) as screen:
        screen.read_until("50% 195KB of 391KB")
        hub.hold.set()
        assert "fetched 391KB in 0:0" in screen.rest()


@pytest.fixture
def real_hub(hub: FakeHub, tmp_path: Path) -> FakeHub:
    """A hub whose model can be loaded."""
    hub.files = {"recital-q8_0.gguf": write_recital(tmp_path / "made" / "recital.gguf").read_bytes()}
    return hub


def test_serve_pulls_the_model_that_it_names(real_hub: FakeHub, serve: Serve) -> None:
    running = serve("--model", f"{REPO_NAME}:Q8_0", env=real_hub.env)
    assert running.generate(":", model="default").text == TEXTS[":"]


def test_generate_pulls_once_and_then_needs_no_hub(real_hub: FakeHub, tmp_path: Path) -> None:
    for _ in range(2):
        done = shimmy("generate", REPO_NAME, "--raw", "--prompt", ":", home=tmp_path, env=real_hub.env)
        assert done.stdout.decode() == TEXTS[":"], done.stderr
    assert len(real_hub.seen) == 3  # the list, the redirect, the file


def test_ollama_pull_fetches_for_a_client_where_that_is_allowed(real_hub: FakeHub, serve: Serve, server: Server) -> None:
    assert_ollama_error(server.post("/api/pull", {"model": f"hf.co/{REPO_NAME}"}), 403, "--allow-pull")
    running = serve("--allow-pull", env=real_hub.env)
    reply = running.post("/api/pull", {"model": f"hf.co/{REPO_NAME}:Q8_0"})
    first, *files, last = map(json.loads, reply.body.splitlines())
    size = len(real_hub.files["recital-q8_0.gguf"])
    assert (first, last) == ({"status": "pulling manifest"}, {"status": "success"}) and reply.status == 200
    assert files[-1]["completed"] == files[-1]["total"] == size and files[-1]["digest"].startswith("sha256:")
    assert running.generate(":", model="recital-q8-0").text == TEXTS[":"]
    whole = running.post("/api/pull", {"name": f"{REPO_NAME}:Q8_0", "stream": False})
    assert whole.json() == {"status": "success"}
    assert_ollama_error(running.post("/api/pull", {"model": "tester/nothing"}), 404, "there is no tester/nothing")


@cases("date", {"long ago": "Mon, 01 Jan 0001 00:00:00 -0000", "far away": "Mon, 01 Jan 2026 00:00:00 +99999999999999"})
def test_pull_waits_its_own_time_when_a_server_names_an_impossible_date(
    date: str, hub: FakeHub, quick: None, tmp_path: Path
) -> None:
    hub.answers = [(503, {"Retry-After": date})]
    assert pull(REPO_NAME, home=tmp_path, env=hub.env).returncode == 0


def test_a_file_server_that_refuses_does_not_make_its_repository_gated(hub: FakeHub, tmp_path: Path) -> None:
    hub.answer_file = lambda request: request.reply(403, {})  # type: ignore[method-assign]
    done = pull(REPO_NAME, home=tmp_path, env=hub.env)
    assert done.returncode == 1 and b"answers 403" in done.stderr and b"gated" not in done.stderr


# A busy hub, many pulls at once, a full disk, and clients that leave.


def pulling(server: Server, repo: str = REPO_NAME) -> http.client.HTTPConnection:
    """A connection on which a pull has been asked for."""
    connection = server.connect()
    connection.request("POST", "/api/pull", encoded({"model": f"hf.co/{repo}"}))
    return connection


def statuses(connection: http.client.HTTPConnection) -> list[str]:
    """What an answered pull says, each once in a row."""
    said = [json.loads(line) for line in connection.getresponse().read().splitlines()]
    return [status for status, _ in itertools.groupby(each.get("status") or each["error"] for each in said)]


def test_ollama_pull_tells_each_second_how_long_a_busy_hub_has_it_wait(real_hub: FakeHub, serve: Serve) -> None:
    real_hub.answers = [(429, {"Retry-After": "2"})]
    own = serve("--allow-pull", env=real_hub.env)
    response = pulling(own).getresponse()
    first = json.loads(response.readline())
    assert not real_hub.answers and len(real_hub.seen) == 1, "it still waits"
    assert response.status == 200 and first == {"status": f"{real_hub.url[7:]} is busy (429), trying again in 2 s"}
    rest = [json.loads(line) for line in response.read().splitlines()]
    assert rest[0]["status"].endswith("1 s") and rest[-1] == {"status": "success"}
    real_hub.answers = [(429, {"Retry-After": "1"}), (429, {"Retry-After": "3600"})]
    assert statuses(pulling(own))[-1].endswith("answers 429; it asks to be left alone for 3600 s")


def test_pulls_beyond_four_at_once_are_refused_and_later_ones_served(hub: FakeHub, serve: Serve) -> None:
    own = serve("--allow-pull", env=hub.env)
    hub.hold.clear()
    running = [pulling(own) for _ in range(4)]
    heads = [connection.getresponse() for connection in running]
    assert [head.status for head in heads] == [200] * 4
    refused = own.post("/api/pull", {"model": REPO_NAME})
    assert_ollama_error(refused, 503, "4 models are being fetched already")
    assert refused.headers["Retry-After"]
    hub.hold.set()
    assert [json.loads(head.read().splitlines()[-1]) for head in heads] == [{"status": "success"}] * 4
    assert own.post("/api/pull", {"model": REPO_NAME, "stream": False}).json() == {"status": "success"}
    assert len(hub.downloads()) == 1, "one fetched, the others waited for it"


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of a file's size here")
def test_pull_onto_a_full_disk_says_what_to_do_and_keeps_the_part(hub: FakeHub, tmp_path: Path) -> None:
    small = [sys.executable, "-c", f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (123456, 123456)); {EXEC}"]
    env = environment(tmp_path, hub.env)
    done = subprocess.run([*small, str(SHIMMY), "pull", REPO_NAME], cwd=tmp_path, env=env, capture_output=True, timeout=HANG)
    assert_failed_last(done, "File too large", "make room for 270KB and pull again to go on", ".incomplete")
    assert [part.stat().st_size for part in parts(tmp_path)] == [123456]
    assert_pulled(pull(REPO_NAME, home=tmp_path, env=hub.env), tmp_path, hub)
    assert hub.downloads()[-1]["Range"] == "bytes=123456-"


EXEC = "import os, sys; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
WRITE = "left = left[part.write(left) :]"
FULL = "raise OSError(errno.ENOSPC, 'No space left on device')"


@cases("stream,status", {"streamed": (True, 200), "whole": (False, 507)})
def test_ollama_pull_onto_a_full_disk_says_what_to_do(
    stream: bool, status: int, hub: FakeHub, serve: Serve, tmp_path: Path
) -> None:
    own = serve("--allow-pull", env=hub.env, script=altered(tmp_path, (WRITE, FULL)))
    reply = own.post("/api/pull", {"model": REPO_NAME, "stream": stream})
    error = json.loads(reply.body.splitlines()[-1])["error"]
    assert reply.status == status and "No space left on device: make room for 391KB" in error
    assert_healthy(own)


def test_pull_of_a_file_that_the_disk_takes_in_pieces_is_whole(hub: FakeHub, tmp_path: Path) -> None:
    script = altered(tmp_path, (WRITE, "left = left[part.write(left[:1000]) :]"))
    assert_pulled(shimmy("pull", REPO_NAME, home=tmp_path, env=hub.env, script=script), tmp_path, hub)


def test_ollama_pull_into_a_folder_that_cannot_be_made_names_it(hub: FakeHub, serve: Serve) -> None:
    own = serve("--allow-pull", env={**hub.env, "HF_HUB_CACHE": "/dev/null/hub"})
    reply = own.post("/api/pull", {"model": REPO_NAME, "stream": False})
    assert_ollama_error(reply, 502, "the model cannot be written: /dev/null/hub")
    assert_healthy(own)


def test_client_that_leaves_a_pull_ends_it_although_the_server_sends_nothing(hub: FakeHub, serve: Serve) -> None:
    own = serve("--allow-pull", "-v", env=hub.env)
    hub.hold.clear()
    connection = pulling(own)
    eventually(lambda: [part for part in parts(own.home) if part.stat().st_size == 200_000], "half of it is here")
    connection.close()
    left = time.monotonic()
    eventually(lambda: "POST /api/pull" in own.log.read_text(), "the pull has ended")
    assert time.monotonic() - left < 10, "it waited for the server's next byte"
    assert [part.stat().st_size for part in parts(own.home)] == [200_000] and not hub.hold.is_set()
    hub.hold.set()
    assert own.post("/api/pull", {"model": REPO_NAME, "stream": False}).json() == {"status": "success"}
    assert hub.downloads()[-1]["Range"] == "bytes=200000-"
    assert_healthy(own)


def test_client_that_leaves_while_the_hub_has_it_wait_ends_the_pull(hub: FakeHub, serve: Serve) -> None:
    own = serve("--allow-pull", "-v", env=hub.env)
    hub.answers = [(429, {"Retry-After": "200"})]
    connection = pulling(own)
    connection.getresponse().readline()
    connection.close()
    eventually(lambda: "POST /api/pull" in own.log.read_text(), "the pull has ended")
    assert_healthy(own)


@cases("script_of", {
    "a look-up that takes long": lambda tmp: altered(tmp, ("put(self._opener", "put(time.sleep(60) or self._opener")),
    "a server that does not shake hands": lambda _: SHIMMY,
})  # fmt: skip
def test_client_that_leaves_while_a_pull_connects_ends_it(
    script_of: Callable[[Path], Path], serve: Serve, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}"
        own = serve("--allow-pull", "-v", env={"HF_ENDPOINT": url}, script=script_of(tmp_path))
        connection = pulling(own)
        time.sleep(0.3)  # so that most of the time it connects
        connection.close()
        left = time.monotonic()
        eventually(lambda: "POST /api/pull" in own.log.read_text(), "the pull has ended")
        assert time.monotonic() - left < 10, "it waited for the server"
        assert_healthy(own)


# ── Command line ──────────────────────────────────────────────────────────────────────────────────────────────────────
# Options, output, exit codes and pipes of every command.


def run_here(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[Any, str, str]:
    """Exit code, stdout and stderr of a command that ends before it does anything, run in this process."""
    try:
        code: Any = module.main(args)
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def refused(*args: str | Path, home: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    """Runs a command in this process that ends before it serves."""
    return run_in_this_process([*map(str, args)], home, b"", seeded(home, env))


@pytest.mark.parametrize("args", [["--version"], ["-V"], ["list", "--version"], ["serve", "-V"]], ids=" ".join)
def test_version_before_and_after_the_command(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, stdout, _ = run_here(capsys, *args)
    assert code == 0 and re.fullmatch(r"shimmy \d+\.\d+\.\d+\n", stdout)


def test_help_lists_every_command_and_no_command_shows_usage(tmp_path: Path) -> None:
    done = shimmy("-h", home=tmp_path)
    assert done.returncode == 0 and done.stderr == b""
    assert all(word in done.stdout.decode() for word in ("--verbose", "serve", "generate", "list", "probe", "diag"))
    done = shimmy(home=tmp_path)
    assert done.returncode == 2 and b"usage" in done.stdout + done.stderr


WRONG_USE = {  # a command line, and what is wrong with it
    "bogus": "bogus", "list --bogus": "--bogus", "serve --bogus": "--bogus", "serve --port many": "--port",
    "serve --port 70000": "--port",
    "serve --keep-alive soon": "--keep-alive", "serve --max-loaded none": "--max-loaded", "serve --max-loaded 0": "--max-loaded",
    "serve --max-queue -5": "--max-queue", "serve --kv-type f13": "--kv-type", "serve --alias nothing": "--alias",
    "serve --ctx 0": "--ctx", "generate --max-tokens many": "--max-tokens", "generate a b c": "arguments: c",
    "generate --chat --raw": "--raw",
    # flags are never abbreviated
    "serve --model-dir": "arguments: --model-dir", "generate --models": "arguments: --models",
    "probe --thread": "arguments: --thread", "list --sho": "arguments: --sho", "diag --js": "arguments: --js",
    "pull a/b --dry": "arguments: --dry", "completion bash --verb": "arguments: --verb",
}  # fmt: skip


@pytest.mark.parametrize("line", WRONG_USE)
def test_flag_error_says_what_is_wrong_first(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, stdout, stderr = run_here(capsys, *line.split())
    error, hint = stderr.splitlines()
    command = "" if line == "bogus" else f" {line.split()[0]}"
    assert (code, stdout) == (2, "")
    assert error.startswith(f"shimmy{command}: error: ") and WRONG_USE[line] in error
    assert hint == f"try: shimmy{command} --help"


REFUSED_COMMANDS: dict[str, tuple[tuple[str, ...], dict[str, str], int, tuple[str, ...]]] = {  # arguments, settings, exit, words
    "SHIMMY_PORT=many": (("serve",), {"SHIMMY_PORT": "many"}, 2, ("SHIMMY_PORT",)),
    "SHIMMY_MAX_CTX=much": (("serve",), {"SHIMMY_MAX_CTX": "much"}, 2, ("SHIMMY_MAX_CTX",)),
    "--bind ::1::x": (("serve", "--bind", "::1::x"), {}, 2, ("--bind",)),
    "--bind with a port of its own": (("serve", "--bind", "127.0.0.1:70000"), {}, 2, ("--bind: '70000' is no whole number",)),
    "--lora none.gguf": (("serve", "--lora", "none.gguf"), {}, 2, ("none.gguf",)),
    "--tools none.py": (("serve", "--tools", "none.py"), {}, 2, ("none.py",)),
    "--schema none.json": (("generate", "--schema", "none.json", "--prompt", "x"), {}, 2, ("none.json",)),
    "an empty key": (("serve", "--api-key", ""), {}, 2, ("--api-key",)),
    **{f"{name} {key!a}": (("serve", *flags), env, 2, ("printable ASCII",)) for key in ("schl\u00fcssel", "a\tb", "a\x7f")
       for name, flags, env in (("--api-key", ("--api-key", key), {}), ("SHIMMY_API_KEY", (), {"SHIMMY_API_KEY": key}))},
    **{f"{bind} without a key": (("serve", "--bind", bind), {}, 2, ("--api-key", "--insecure"))
       for bind in ("0.0.0.0", "::", "[::]:0", "192.0.2.1")},
    "a default that is no file": (("serve", "--model", "./nowhere.gguf"), {}, 1, ("nowhere.gguf",)),
    "a model that is not there": (("generate", "--model", "nope", "--prompt", "hi"), {}, 1, ("nope",)),
    "an unknown model": (("generate", "nonesuch", "--prompt", ":"), {}, 1, ("nonesuch",)),
    "a missing file": (("generate", "./missing.gguf", "--prompt", ":"), {}, 1, ("missing.gguf",)),
    "a broken model": (("generate", "hollow", "--prompt", ":"), {}, 1, ("load",)),
    "a broken model to probe": (("probe", "hollow"), {}, 1, ("load",)),
    "a long prompt": (("generate", "recital", "--raw", "--ctx", "128", "--prompt", "a" * 200), {}, 1, ("201", "128")),
    "two models": (("generate", "recital", "hi", "--model", "dice"), {}, 2, ("twice",)),
    "two models to probe": (("probe", "recital", "--model", "dice"), {}, 2, ("twice",)),
    "two prompts": (("generate", "hi", "--model", "dice", "--prompt", "hi"), {}, 2, ("twice",)),
    "two prompts for a model": (("generate", "recital", "one", "--prompt", "two"), {}, 2, ("twice",)),
    "a prompt in its place": (("generate", "Tell me a joke"), {}, 2, ("no model is called 'Tell me a joke'", "--prompt")),
    "a misspelt model": (("generate", "recitol", "--prompt", "x"), {}, 1, ("did you mean recital?",)),
    "a misspelt model to probe": (("probe", "recitol"), {}, 1, ("did you mean recital?",)),
    "a tool without a chat": (("generate", TINY, "--raw", "--tool", "calculator", "--prompt", "x"), {}, 2, ("--tool",)),
    "a template that is no file": (("generate", "recital", "--chat-template", "none.jinja", "--prompt", "x"), {}, 2, (
        "--chat-template", "none.jinja")),
}  # fmt: skip


@cases("args, env, code, words", REFUSED_COMMANDS)
def test_command_that_cannot_be_meant_ends_with_one_line_that_says_why(
    args: tuple[str, ...], env: dict[str, str], code: int, words: tuple[str, ...], models: Path, tmp_path: Path
) -> None:
    found = {"SHIMMY_MODEL_PATHS": str(models), **({"SHIMMY_PORT": "0"} if args[0] == "serve" else {})}
    done = refused(*args, home=tmp_path, env=found | env)
    assert_failed(done, code, *words)
    assert "recitol" not in args or b"--alias" not in done.stderr


@cases("flags, env, words", {
    "a default near another": (("--model", "recitl"), {}, ("--model recitl", "did you mean recital?")),
    "an alias near another": (("--alias", "gpt-*=dicee"), {}, ("--alias gpt-*=dicee", "did you mean dice?")),
    "a setting near another": ((), {"SHIMMY_BASE_GGUF": "recitl"}, ("SHIMMY_BASE_GGUF recitl", "did you mean recital?")),
    "a default near none": (("--model", "zzz"), {}, ("--model zzz",)),
})  # fmt: skip
def test_serve_with_a_name_that_means_no_model_exits_2_naming_the_flag(
    flags: tuple[str, ...], env: dict[str, str], words: tuple[str, ...], models: Path, tmp_path: Path
) -> None:
    done = refused("serve", "--port", "0", *flags, "--models-dir", str(models), home=tmp_path, env=env)
    (error,) = [line for line in done.stderr.decode().splitlines() if "error" in line]
    assert done.returncode == 2 and error.startswith("shimmy serve: error: ")
    assert all(word in error for word in words), error


@pytest.mark.parametrize(("package", "old"), [("llama_cpp_python", "0.2.90"), ("websockets", "9.1"), ("jinja2", "3.1.5")])
def test_outdated_package_is_named_in_one_line(
    package: str, old: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "old" / f"{package}-{old}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {old}\n")
    monkeypatch.syspath_prepend(info.parent)
    args: list[str | Path] = ["generate", "recital", "--chat", "--prompt", "hi", "--models-dir", models]
    assert_failed(shimmy(*args, home=tmp_path), 1, old)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def test_serve_prints_one_line_with_its_url(server: Server) -> None:
    assert server.first_line.count("\n") == 1
    assert f"http://127.0.0.1:{server.port}" in server.first_line


def test_serve_port_overrides_bind(serve: Serve) -> None:
    port = free_port()
    server = serve("--bind", "127.0.0.1:1", "--port", str(port), own_port=True)
    assert server.port == port and server.get("/health").status == 200


def test_serve_listens_on_ipv6_loopback(serve: Serve) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    server = serve("--bind", "[::1]:0", own_port=True)
    server.host = "::1"
    assert f"[::1]:{server.port}" in server.first_line
    assert server.get("/health", Host=f"[::1]:{server.port}").status == 200


def test_serve_reads_settings_from_the_environment(serve: Serve, models: Path, tmp_path: Path) -> None:
    port = free_port()
    write_header(tmp_path / "one" / "first-path.gguf")
    write_header(tmp_path / "two" / "second-path.gguf")
    env = {
        "SHIMMY_BASE_GGUF": str(models / "recital.gguf"),
        "SHIMMY_MODEL_PATHS": f"{tmp_path / 'one'};{tmp_path / 'two'}",
        "SHIMMY_BIND_ADDRESS": "127.0.0.1",
        "SHIMMY_PORT": str(port),
        "SHIMMY_API_KEY": "k3y",
        "SHIMMY_MAX_CTX": "128",
    }
    server = serve(env=env, own_port=True)
    key = {"Authorization": "Bearer k3y"}
    listed = server.get("/api/models", **key).json()["models"]
    assert server.port == port
    assert listed[0]["description"] == "Base GGUF model: recital"
    assert {"first-path", "second-path"} <= {model["id"] for model in listed}
    assert server.get("/api/models").status == 401
    body = {"model": "default", "prompt": "a" * 300}
    assert_error(server.post("/api/generate", body, **key), 400, "context_length_exceeded", "301", "128")


def test_serve_flags_override_the_environment(serve: Serve, models: Path) -> None:
    port = free_port()
    env = {"SHIMMY_PORT": "1", "SHIMMY_API_KEY": "other", "SHIMMY_BASE_GGUF": str(models / "recital.gguf")}
    flags = ("--api-key", "mine", "--model", "dice", "--models-dir", models, "--bind", f"127.0.0.1:{port}")
    server = serve(*flags, env=env, own_port=True)
    reply = server.get("/api/models", **{"x-api-key": "mine"})
    assert server.port == port and reply.json()["models"][0]["description"] == "Base GGUF model: dice"


def test_serve_bind_address_variable_may_include_the_port(serve: Serve) -> None:
    port = free_port()
    assert serve(env={"SHIMMY_BIND_ADDRESS": f"127.0.0.1:{port}"}, own_port=True).port == port


@cases("flags, hosts", {
    "insecure": (["--insecure"], {"192.168.7.7:80": 200, "shimmy:11435": 200, f"{socket.gethostname()}:80": 200,
                                  "evil.example": 403}),
    "a name that is allowed": (["--insecure", "--allow-host", "evil.example"], {"evil.example": 200}),
    "a key": (["--api-key", "k3y"], {"some.lan.name": 200}),
})  # fmt: skip
def test_serve_beyond_loopback_is_allowed_with(flags: list[str], hosts: dict[str, int], serve: Serve) -> None:
    """Without a key, a page must not reach the server by a name that it points there (DNS rebinding)."""
    server = serve("--bind", "0.0.0.0", *flags)
    for host, status in hosts.items():  # an address, a container's name, our own, another's
        assert server.get("/health", Host=host).status == status
        own_page = {"Host": host, "Origin": f"http://{host}"}
        assert server.get("/health", **own_page).status == status


def test_serve_preloads_a_model_given_by_path(serve: Serve, tmp_path: Path) -> None:
    path = write_recital(tmp_path / "far" / "Far_Away.gguf", name="Far Away")
    server = serve("--model", path, "--preload")
    eventually(lambda: server.status("default")["status"] == "loaded", "the default model is loaded by itself")
    assert server.status("default")["model"] == "far-away"
    assert server.generate(model="far-away").text == "Hello wide world"


def test_serve_stays_up_when_preloading_fails(serve: Serve, models: Path) -> None:
    server = serve("--models-dir", models, "--model", "hollow", "--preload")
    eventually(lambda: server.status("hollow")["status"] == "failed", "the load fails")
    assert server.generate(":", "recital").text == "Hello wide world"


def test_serve_listens_without_llama_cpp_and_names_it_when_needed(serve: Serve, models: Path, tmp_path: Path) -> None:
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "llama_cpp.py").write_text("raise ImportError('no llama here')")
    server = serve("--models-dir", models, env={"PYTHONPATH": str(tmp_path / "stub")})
    assert server.get("/health").status == 200 and "recital" in server.ids()
    reply = server.generate()
    assert reply.status in (500, 503) and b"llama" in reply.body and b"Traceback" not in reply.body


def test_list_short_prints_names_only(models: Path, tmp_path: Path) -> None:
    done = shimmy("list", "--short", "--models-dir", models, home=tmp_path)
    assert done.returncode == 0
    assert {"recital", "dice", "hollow"} <= set(done.stdout.decode().splitlines())


def test_list_without_models_says_so_and_exits_0_and_generate_exits_1(tmp_path: Path) -> None:
    script = altered(tmp_path)  # beside which there is no model in the box
    done = shimmy("list", home=tmp_path, script=script)
    assert done.returncode == 0 and b"gguf" in (done.stdout + done.stderr).lower()
    assert_failed(shimmy("generate", "--prompt", ":", home=tmp_path, script=script), 1, "GGUF")


def test_list_into_a_closed_pipe_prints_no_error(models: Path, tmp_path: Path) -> None:
    command = f"{IN_A_SHELL} list --models-dir '{models}' | true; echo ${{PIPESTATUS[0]}}"
    assert in_a_shell(command, tmp_path).stderr == b""


@cases("words, stdin, text", {
    "the text and a newline": (["--prompt", "Say :"], b"", "Hello wide world\n"),
    "of standard input": (["--raw"], b"say =", TEXTS["="]),
    "of standard input by its name": (["--raw", "--prompt", "-"], b"say =", TEXTS["="]),
})  # fmt: skip
def test_generate_prints_only_the_text(
    words: list[str], stdin: bytes, text: str, server: Server, models: Path, tmp_path: Path
) -> None:
    done = shimmy("generate", "recital", *words, home=tmp_path, stdin=stdin, env=through(server, models))
    assert (done.returncode, done.stdout.decode()) == (0, text), done.stderr


@cases("words, stdin, tokens, text", {
    "plain": (["--raw", "--prompt", "ab:"], b"", len("ab:"), "Hello wide world"),
    "standard input behind the prompt": (["--raw", "--prompt", "Sum:", "--stdin"], b"log =", len("Sum:\nlog ="), TEXTS["="]),
    "by the template": (["--chat", "--prompt", "please count"], b"", len("[user]please count[assistant]="), TEXTS["="]),
    "with sampling": (["--raw", "--prompt", "=", "--max-tokens", "5", "--stop", "w03", "--temperature", "0", "--top-p", "0.9",
                       "--top-k", "3"], b"", 1, "w00 w01 w02 "),
})  # fmt: skip
def test_generate_json_prints_the_documented_response(
    words: list[str], stdin: bytes, tokens: int, text: str, server: Server, models: Path, tmp_path: Path
) -> None:
    done = shimmy("generate", "recital", "--json", *words, home=tmp_path, stdin=stdin, env=through(server, models))
    document = json.loads(done.stdout)
    assert document["choices"] == [{"text": text, "index": 0, "finish_reason": "stop"}]
    usage = document["usage"]
    assert usage["prompt_tokens"] == 1 + tokens
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_generate_with_a_prompt_does_not_read_stdin(models: Path, tmp_path: Path) -> None:
    reading, writing = os.pipe()  # never closed, so reading it would hang
    command = [*command_of(), "generate", "recital", "--prompt", ":", "--models-dir", str(models)]
    done = subprocess.run(
        command, stdin=reading, cwd=tmp_path, env=seeded(tmp_path), capture_output=True, timeout=HANG, check=False
    )
    os.close(writing)
    os.close(reading)
    assert done.stdout.startswith(b"Hello wide world")


@pytest.mark.parametrize("flags", [["--temperature", "9"], ["--top-p", "1.5"], ["--max-tokens", "0"]], ids=" ".join)
def test_generate_option_out_of_range_is_named(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, stdout, stderr = run_here(capsys, "generate", "--prompt", ":", *flags)
    assert (code, stdout) == (2, "") and stderr.startswith(f"shimmy: {flags[0]} must be") and stderr.count("\n") == 1


def test_generate_with_a_seed_repeats(server: Server, models: Path, tmp_path: Path) -> None:
    args = ["generate", "dice", "--prompt", "Once", "--seed", "5", "--temperature", "1", "--max-tokens", "20"]
    first, second = (shimmy(*args, home=tmp_path, env=through(server, models)).stdout for _ in range(2))
    assert first == second and first


@cases("words, env", {
    "by its path": (["./elsewhere.gguf"], {}), "as the base model": ([], {"SHIMMY_BASE_GGUF": "{models}/recital.gguf"}),
    "by a flag": (["--model", "recital"], {"SHIMMY_MODEL_PATHS": "{models}"}),
})  # fmt: skip
def test_generate_takes_a_model(words: list[str], env: dict[str, str], models: Path, tmp_path: Path) -> None:
    shutil.copy(models / "recital.gguf", tmp_path / "elsewhere.gguf")
    settings = {name: value.format(models=models) for name, value in env.items()}
    done = shimmy("generate", *words, "--prompt", ":", home=tmp_path, env=settings)
    assert done.stdout == b"Hello wide world\n", done.stderr


def test_generate_writes_utf_8_in_any_locale(models: Path, tmp_path: Path) -> None:
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = shimmy("generate", "recital", "--raw", "--prompt", "~", "--models-dir", models, home=tmp_path, env=env)
    assert done.stdout.decode() == TEXTS["~"], done.stderr


@cases("schema, fields, code, words", {
    "a choice": ('{"type": "string", "enum": ["yes", "no"]}', [], 0, ""),
    "half an object": ("{", [], 2, ""), "a list": ("[]", [], 2, ""), "not UTF-8": ("\xff", [], 2, ""),
    "an unknown type": ('{"type": "wrong"}', [], 1, ""), "$ref to nowhere": ('{"$ref": "#/nowhere"}', [], 1, ""),
    "one that is cut": ('{"type": "string", "enum": ["yes and no and yes and no"]}', ["--max-tokens", "3"], 1, "--max-tokens 3"),
})  # fmt: skip
def test_generate_with_a_schema_file_prints_matching_json_or_fails_with_one_line(
    schema: str, fields: list[str], code: int, words: str, server: Server, models: Path, tmp_path: Path
) -> None:
    (tmp_path / "schema.json").write_text(schema, "latin-1")
    args: list[str | Path] = ["generate", "dice", "--prompt", "Well", "--schema", "schema.json", *fields]
    done = shimmy(*args, home=tmp_path, env=through(server, models))
    if code == 0:
        assert json.loads(done.stdout) in ("yes", "no"), done.stderr
    else:
        assert done.returncode in (1, 2) and len(done.stderr.splitlines()) == 1 and b"Traceback" not in done.stderr
        assert words in done.stderr.decode()


@pytest.mark.parametrize("answer", [b"220 mail.example ESMTP\r\n", b'HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\n"ok"'],
                         ids=["mail", "another API"])  # fmt: skip
def test_generate_loads_the_model_itself_when_another_service_has_the_port(answer: bytes, models: Path, tmp_path: Path) -> None:
    def serve(stranger: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                stranger.accept()[0].sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as stranger:
        threading.Thread(target=serve, args=(stranger,), daemon=True).start()
        env = {"SHIMMY_PORT": str(stranger.getsockname()[1]), "SHIMMY_MODEL_PATHS": str(models)}
        done = shimmy("generate", "recital", "--prompt", ":", home=tmp_path, env=env)
    assert done.stdout.startswith(b"Hello wide world"), done.stderr


def test_generate_applies_a_lora_adapter_and_engine_options(models: Path, tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "adapter.gguf")
    done = shimmy("generate", "recital", "--prompt", ":", "--lora", adapter, "--models-dir", models, home=tmp_path)
    assert done.stdout.decode().split() == [f"w{i}" for i in range(30, 40)], done.stderr
    knobs = ["--threads", "1", "--batch", "32", "--no-mmap", "--kv-type", "q8_0", "--gpu-layers", "0", "--parallel", "2"]
    args: list[str | Path] = ["generate", "recital", "--raw", "--prompt", "a" * 90 + "=", *knobs, "--models-dir", models]
    assert shimmy(*args, home=tmp_path).stdout.decode().split() == TEXTS["="].split()


def test_generate_into_a_closed_pipe_prints_no_error(models: Path, tmp_path: Path) -> None:
    command = (
        f"{IN_A_SHELL} generate recital --raw --models-dir '{models}' --ctx {LONG_CTX}"
        f" --max-tokens {LONG_CTX} --prompt '#' | head -c 20"
    )
    done = in_a_shell(command, tmp_path)
    assert (done.stdout, done.stderr) == (b"Tick tock tick tock ", b"")


def test_generate_flushes_each_piece_and_exits_130_on_ctrl_c(models: Path, tmp_path: Path) -> None:
    args = ["generate", "recital", "--raw", "--prompt", "#", "--max-tokens", str(LONG_CTX), "--ctx", str(LONG_CTX)]
    running = Child(
        [*command_of(), *args, "--models-dir", str(models)], cwd=tmp_path, env=seeded(tmp_path),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=interruptible,
    )  # fmt: skip
    assert running.stdout and running.stdout.read(10) == b"Tick tock "
    os.killpg(running.pid, signal.SIGINT)  # a terminal sends it to the whole group
    _, stderr = running.communicate(timeout=HANG)
    assert running.returncode == -signal.SIGINT and b"Traceback" not in stderr


def through(server: Server, models: Path) -> dict[str, str]:
    """Returns settings that let `generate` use the server or load the model itself."""
    return {"SHIMMY_PORT": str(server.port), "SHIMMY_MODEL_PATHS": str(models)}


def test_generate_uses_a_running_server_that_has_the_model_loaded_unless_told_not_to(
    server: Server, models: Path, tmp_path: Path
) -> None:
    server.load("recital")
    server.load("dice")
    ask = functools.partial(shimmy, "generate", "recital", "--raw", home=tmp_path, env=through(server, models))
    before = server.status("recital")["last_used"]
    assert ask("--local", "--prompt", "=").stdout.decode() == TEXTS["="] and server.status("recital")["last_used"] == before
    assert ask("--prompt", "=").stdout.decode() == TEXTS["="] and server.status("recital")["last_used"] != before
    done = shimmy("generate", "dice", "--prompt", "a" * 300, home=tmp_path, env=through(server, models))
    assert_failed(done, 1, "300", "256")  # the server's error


def test_generate_through_a_server_that_dies_fails_in_one_line(serve: Serve, models: Path, tmp_path: Path) -> None:
    server = serve("--models-dir", models, "--ctx", str(LONG_CTX))
    server.load("recital")
    command = [*command_of(), "generate", "recital", "--raw", "--prompt", "#", "--max-tokens", str(LONG_CTX)]
    env = seeded(tmp_path, through(server, models))
    with Child(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout and running.stdout.read(5) == b"Tick "
        server.process.kill()
        _, stderr = running.communicate(timeout=HANG)
    assert running.returncode == 1 and len(stderr.splitlines()) == 1 and b"Traceback" not in stderr


def test_generate_through_a_server_into_a_closed_pipe_cancels(server: Server, models: Path, tmp_path: Path) -> None:
    server.load("recital")
    command = f"{IN_A_SHELL} generate recital --raw --max-tokens {LONG_CTX} --prompt '#' | head -c 20"
    done = in_a_shell(command, tmp_path, through(server, models))
    assert (done.stdout, done.stderr) == (b"Tick tock tick tock ", b"")
    eventually(lambda: server.status("recital")["requests_running"] == 0, "the server stops generating")


def test_probe_prints_a_report_and_no_progress_bar_into_a_pipe(models: Path, tmp_path: Path) -> None:
    done = shimmy("probe", "recital", "--models-dir", models, home=tmp_path)
    assert done.returncode == 0 and b"tokens/s" in done.stdout
    assert re.search(rb"context +8,192 tokens, up to 65,536 would fit\n", done.stdout)
    assert b"\r" not in done.stderr


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
def test_probe_draws_a_progress_bar_on_a_terminal_and_reports_what_it_measured(models: Path, tmp_path: Path) -> None:
    mine, its = os.openpty()
    command = [*command_of(), "probe", "recital", "--json", "--models-dir", str(models)]
    done = subprocess.run(command, env=seeded(tmp_path), stdout=subprocess.PIPE, stderr=its, timeout=HANG, check=True)
    os.close(its)
    assert b"\r" in os.read(mine, 65536)
    os.close(mine)
    report = json.loads(done.stdout)
    assert report["model"] == "recital" and report["context_length"] > 0
    for figure in ("load_seconds", "memory_bytes", "prompt_tokens_per_second", "generated_tokens_per_second"):
        assert report[figure] > 0, figure


def test_diag_reports_versions_memory_directories_and_whether_a_server_is_running(
    server: Server, models: Path, tmp_path: Path
) -> None:
    here = shimmy("diag", home=tmp_path, env={"SHIMMY_PORT": str(server.port)})
    away = json.loads(shimmy("diag", "--json", "--models-dir", models, home=tmp_path).stdout)
    assert here.returncode == 0 and b"llama" in here.stdout and b": answers\n" in here.stdout
    assert {"version", "python", "llama_cpp", "websockets", "memory", "skipped", "server"} <= set(away)
    assert str(models) in [entry["path"] for entry in away["directories"]] and away["server"]["running"] is False


@pytest.mark.parametrize("line", ["MODEL PROMPT", "MODEL --temperature 0 PROMPT", "--json MODEL PROMPT", "--model MODEL PROMPT",
                                  "PROMPT --model MODEL"])  # fmt: skip
def test_generate_takes_a_model_and_a_prompt(line: str) -> None:
    args = module.parse(["generate", *line.split()])
    assert (args.model, args.text) == ("MODEL", "PROMPT")


def usage_of(done: subprocess.CompletedProcess[bytes]) -> int:
    return json.loads(done.stdout)["usage"]["prompt_tokens"]


@pytest.mark.parametrize("where", ["here", "by-the-server"])
def test_generate_chats_with_a_model_that_has_a_template(where: str, server: Server, models: Path, tmp_path: Path) -> None:
    """And completes with one that has none."""
    env = through(server, models) if where != "here" else {"SHIMMY_MODEL_PATHS": str(models)}
    done = shimmy("generate", "recital", "please count", "--json", home=tmp_path, env=env)
    assert usage_of(done) == 1 + len("[user]please count[assistant]=")
    done = shimmy("generate", "dice", "roll", "--json", "--max-tokens", "3", home=tmp_path, env=env)
    assert usage_of(done) == len("roll")


@pytest.mark.parametrize(
    ("flags", "word"),
    [(["--max-tokens", "3"], "--max-tokens 3"), (["--max-tokens", "500", "--ctx", "32"], "context")],
    ids=["max-tokens", "context"],
)
def test_generate_that_is_cut_says_so_without_a_terminal(flags: list[str], word: str, models: Path, tmp_path: Path) -> None:
    done = shimmy("generate", "recital", "--raw", "--prompt", "#", *flags, "--models-dir", models, home=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith(b"Tick tock ")
    assert "cut" in done.stderr.decode() and word in done.stderr.decode()


def test_generate_max_tokens_minus_one_goes_to_the_end_of_the_context(models: Path, tmp_path: Path) -> None:
    args: list[str | Path] = ["--max-tokens", "-1", "--ctx", "256", "--json", "--models-dir", models]
    done = shimmy("generate", "recital", "--raw", "--prompt", "#", *args, home=tmp_path)
    assert json.loads(done.stdout)["usage"]["total_tokens"] == 256, done.stderr


def test_generate_names_input_that_is_not_utf_8_once(server: Server, models: Path, tmp_path: Path) -> None:
    done = shimmy("generate", "recital", "--raw", home=tmp_path, env=through(server, models), stdin=b"a\xff\xfe\xff:")
    assert done.stdout == b"Hello wide world"
    assert done.stderr.decode().count("not UTF-8") == 1 and len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no endless input here")
def test_generate_bounds_its_standard_input(models: Path, tmp_path: Path) -> None:
    with open("/dev/zero", "rb") as endless:
        command = [*command_of(), "generate", "recital", "--models-dir", str(models)]
        done = subprocess.run(command, stdin=endless, env=seeded(tmp_path), capture_output=True, timeout=HANG, check=False)
    assert_failed(done, 1, "standard input", "16.0MB")


def test_generate_says_that_a_pipe_with_data_is_ignored(models: Path, tmp_path: Path) -> None:
    args: list[str | Path] = ["generate", "recital", "--prompt", "hi", "--models-dir", models]
    done = shimmy_process(*args, home=tmp_path, stdin=b"a diff")
    assert done.stdout.startswith(b"Hello") and "--stdin" in done.stderr.decode()
    assert shimmy_process(*args, home=tmp_path).stderr == b""


def test_generate_in_a_loop_leaves_the_loops_input_alone(models: Path, tmp_path: Path) -> None:
    one = f"{IN_A_SHELL} generate recital --prompt \"$f\" --models-dir '{models}' 2>/dev/null"
    done = in_a_shell(f"printf 'a\\nb\\n' | while read f; do echo $f; {one}; done", tmp_path)
    assert [line for line in done.stdout.split() if len(line) == 1] == [b"a", b"b"]


@pytest.mark.parametrize(
    ("words", "code"),
    [("generate recital --prompt : >&-", 1), ("generate recital <&-", 1), ("generate recital --prompt : <&-", 0), ("list >&-", 1),
     ("list <&-", 0), ("diag >&-", 1), ("diag <&- >&-", 1), ("probe recital >&-", 1), ("generate recital --prompt : 2>&-", 0),
     ("list <&- 2>&-", 0), ("--version >&-", 0), ("generate --bogus 2>&-", 2), ("generate recital --prompt : <&- >&- 2>&-", 1)],
    ids=lambda value: re.sub(r"\W+", "-", value.translate({60: "in", 62: "out"})) if isinstance(value, str) else str(value),
)  # fmt: skip
def test_closed_standard_stream_gives_no_traceback(words: str, code: int, server: Server, models: Path, tmp_path: Path) -> None:
    done = in_a_shell(f"{IN_A_SHELL} {words}", tmp_path, through(server, models))
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr and len(done.stderr.splitlines()) <= 1


def test_serve_with_closed_streams_serves(models: Path, tmp_path: Path) -> None:
    line = f"exec '{sys.executable}' '{SHIMMY}' serve --port 0 --models-dir '{models}' --preload <&- >&-"
    with Child(["bash", "-c", line], env=seeded(tmp_path), stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr
        guard = threading.Timer(HANG, running.kill)
        guard.start()
        while "loaded " not in (said := running.stderr.readline()):
            assert said and "Traceback" not in said, said
        running.terminate()
        assert running.wait(HANG) == 0
        guard.cancel()


def test_generate_has_the_server_load_a_model_it_knows(server: Server, models: Path, tmp_path: Path) -> None:
    """By its id, in another letter case, by a prefix, an alias, or as the default."""
    server.unload("recital")
    for words in (["recital"], ["RECITAL"], ["recit"], ["gpt-4"], []):
        done = shimmy("-v", "generate", *words, "--prompt", "hi", home=tmp_path, env={"SHIMMY_PORT": str(server.port)})
        assert done.stdout == b"Hello wide world\n", done.stderr
        assert f"the server at http://127.0.0.1:{server.port} does the work" in done.stderr.decode()
        assert server.status("recital")["loaded"]


@pytest.mark.parametrize(
    ("args", "words"),
    [(["recital", "--local"], "--local"), (["recital", "--ctx", "512"], "--ctx"), (["{models}/recital.gguf"], "MODEL is a file"),
     (["unheard"], "knows no model unheard")],
    ids=["local", "engine-knob", "path", "unknown"],
)  # fmt: skip
def test_generate_says_why_it_uses_an_engine_of_its_own(
    args: list[str], words: str, server: Server, models: Path, tmp_path: Path
) -> None:
    write_recital(tmp_path / "models" / "unheard.gguf")
    arguments = [a.format(models=models) for a in args]
    done = shimmy("generate", "-v", *arguments, "--prompt", "hi", home=tmp_path, env=through(server, models))
    assert done.stdout == b"Hello wide world\n", done.stderr
    assert f"an engine of its own does the work: {words}" in re.sub(r"the server at \S+ ", "", done.stderr.decode())


def test_generate_with_models_dir_uses_the_server_if_it_has_the_same_model(server: Server, models: Path, tmp_path: Path) -> None:
    write_recital(tmp_path / "other" / "recital.gguf", name="A longer name than the other one has")
    port = {"SHIMMY_PORT": str(server.port)}
    for folder, env, words in (
        (models, port, "does the work, with recital"), (tmp_path / "other", port, "--models-dir holds another recital"),
        (models, {}, "no server answers at http://127.0.0.1:9"),
    ):  # fmt: skip
        done = shimmy("-v", "generate", "recital", "--prompt", "hi", "--models-dir", folder, home=tmp_path, env=env)
        assert done.stdout == b"Hello wide world\n" and words in done.stderr.decode()


def test_key_that_the_server_refused_is_told_and_one_is_trimmed(guarded: Server, models: Path, tmp_path: Path) -> None:
    ask = functools.partial(shimmy, "-v", "generate", "recital", "--prompt", "hi", home=tmp_path)
    env = through(guarded, models)
    for settings in (env, env | {"SHIMMY_API_KEY": "wrong"}):
        done = ask(env=settings)
        assert done.returncode == 1 and done.stdout == b"" and b"Traceback" not in done.stderr
        assert all(word in done.stderr.decode().splitlines()[-1] for word in ("the server at", "SHIMMY_API_KEY"))
    done = ask(env=env | {"SHIMMY_API_KEY": "s3cret\r"})
    assert done.stdout == b"Hello wide world\n" and b"the server at" in done.stderr, done.stderr
    port = {"SHIMMY_PORT": str(guarded.port)}
    assert b"SHIMMY_API_KEY" in shimmy("diag", home=tmp_path, env=port | {"SHIMMY_API_KEY": "wrong"}).stdout
    assert b"SHIMMY_API_KEY" not in shimmy("diag", home=tmp_path, env=port | {"SHIMMY_API_KEY": "s3cret"}).stdout


def test_generate_gives_the_servers_answer_to_a_prompt_that_is_too_large(server: Server, models: Path, tmp_path: Path) -> None:
    server.load("recital")
    large = b"\n" * ((16 << 20) - 1)  # twice as much as JSON
    done = shimmy("generate", "recital", home=tmp_path, stdin=b"x" + large, env=through(server, models))
    assert_failed(done, 1, "33554432")


class HangsUp(http.server.BaseHTTPRequestHandler):
    """Knows a model that is loaded, and closes the connection on every POST without reading its body."""

    def do_GET(self) -> None:
        model = {"id": "m", "loaded": True, "chat_template": False, "size_bytes": 1}
        body = json.dumps({"model": "m", "models": [model]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, *_: object) -> None:
        pass


def test_generate_through_a_server_that_hangs_up_on_a_large_prompt_fails_in_one_line(tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), HangsUp) as stub:
        threading.Thread(target=stub.serve_forever, daemon=True).start()
        env = {"SHIMMY_PORT": str(stub.server_port)}
        done = shimmy("generate", "m", home=tmp_path, stdin=b"x" * (8 << 20), env=env)
        stub.shutdown()
    assert_failed(done, 1, "server")


def interruptible() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_the_tests()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_ends_the_shells_loop(models: Path, tmp_path: Path) -> None:
    args = f"generate recital --raw --prompt '#' --max-tokens {LONG_CTX} --ctx {LONG_CTX} --models-dir '{models}'"
    script = f"for i in 1 2 3; do echo run $i; {IN_A_SHELL} {args}; done; echo behind"
    running = Child(
        ["bash", "-c", script], cwd=tmp_path, env=seeded(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, preexec_fn=interruptible,
    )  # fmt: skip
    assert running.stdout and running.stdout.read(16) == b"run 1\nTick tock "
    os.killpg(running.pid, signal.SIGINT)
    rest, stderr = running.communicate(timeout=HANG)
    assert b"run 2" not in rest and b"behind" not in rest and stderr == b""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
def test_ctrl_c_ends_the_line_on_a_terminal_and_the_engine(models: Path, tmp_path: Path) -> None:
    with terminal("generate", "recital", "--raw", "--prompt", "#", "--max-tokens", str(LONG_CTX), "--ctx", str(LONG_CTX),
                  "--models-dir", models, home=tmp_path) as screen:  # fmt: skip
        screen.read_until("Tick tock ")
        children = descendants(screen.process.pid)
        screen.process.send_signal(signal.SIGINT)
        assert screen.process.wait(HANG) == -signal.SIGINT
        assert screen.rest().endswith("\r\n")
    eventually(lambda: not any(map(alive, children)), "no child is left")


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_serve_goes_on_ignoring_signals_that_its_parent_ignores(models: Path, tmp_path: Path) -> None:
    command = f"trap '' INT HUP; exec '{sys.executable}' '{SHIMMY}' serve --port 0 --models-dir '{models}'"
    with Child(["bash", "-c", command], env=seeded(tmp_path), stdout=subprocess.PIPE) as running:
        assert running.stdout and b"listening" in running.stdout.readline()
        running.send_signal(signal.SIGINT)
        running.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(0.5)
        running.terminate()
        assert running.wait(HANG) == 0


def test_generate_goes_on_in_the_background_of_a_shell_that_ignores_ctrl_c(models: Path, tmp_path: Path) -> None:
    args = f"generate recital --raw --prompt '#' --temperature 0 --max-tokens 3000 --ctx {LONG_CTX} --models-dir '{models}'"
    command = ["bash", "-c", f"trap '' INT; exec {IN_A_SHELL} {args}"]
    with Child(command, env=seeded(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0) as running:
        assert running.stdout and running.stdout.read(5) == b"Tick "
        running.send_signal(signal.SIGINT)
        rest, _ = running.communicate(timeout=HANG)
    assert running.returncode == 0 and len(rest.split()) == 3000 - 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_serve_told_to_stop_while_it_starts_ends_with_0(name: str, models: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(1)\n")
    command = [sys.executable, str(SHIMMY), "serve", "--port", "0", "--tools", "slow.py", "--models-dir", str(models)]
    with Child(
        command, cwd=tmp_path, env=seeded(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=interruptible,
    ) as running:  # fmt: skip
        eventually((tmp_path / "begun").exists, "the server starts")
        running.send_signal(getattr(signal, name))
        assert running.wait(HANG) == 0
        assert running.stderr and b"Traceback" not in running.stderr.read()


def test_serve_tells_what_it_loads_and_for_whom_it_waits(serve: Serve, models: Path) -> None:
    own = serve("--models-dir", models, "--model", "recital")
    eventually(lambda: "default model: recital; " in own.log.read_text(), "the default model is named")
    with own.stream("/api/generate", {"model": "recital", "prompt": "#", "max_tokens": 1000}) as stream:
        next(stream)
        own.signal(signal.SIGTERM)
        list(stream)
    assert own.process.wait(HANG) == 0
    log = own.log.read_text()
    assert re.search(r"loading recital \(\d+KB\)\n", log)
    assert re.search(r"loaded recital in [\d.]+ s: [\d.]+MB of memory; its KV pool of [\d,]+ tokens takes up to [\d.]+MB\n", log)
    assert re.search(r"shutting down: waiting up to \d+ s for the requests of recital \(1\)\n", log)


class Screen:
    """A terminal (a pty) and what a process writes to it, stdout and stderr alike."""

    def __init__(self, mine: int, process: subprocess.Popen[bytes]) -> None:
        self.mine, self.process, self.seen = mine, process, ""

    def _read(self, seconds: float) -> bool:
        if not select.select([self.mine], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self.mine, 65536)
        except OSError:  # how Linux tells that nobody has the other end
            return False
        self.seen += data.decode("utf-8", "replace")
        return bool(data)

    def read_until(self, words: str) -> str:
        deadline = time.monotonic() + HANG
        while words not in self.seen and time.monotonic() < deadline:
            self._read(1.0)
        assert words in self.seen, self.seen
        return self.seen

    def interrupt_until(self, words: str) -> None:
        """Ctrl-C, and once more where readline missed it: it looks for signals only while it waits for a key."""
        deadline = time.monotonic() + HANG
        while words not in self.seen and time.monotonic() < deadline:
            self.process.send_signal(signal.SIGINT)
            again = time.monotonic() + 2  # one too many would end what comes next
            while words not in self.seen and time.monotonic() < again:
                self._read(0.2)
        assert words in self.seen, self.seen

    def rest(self) -> str:
        """All that was written, once the process has ended."""
        self.process.wait(HANG)
        while self._read(0.2):
            pass
        return self.seen

    def left(self) -> str:
        """What stands on the screen in the end, if every line that was erased was the last one."""
        return self.rest().rpartition("\r\x1b[K")[2].replace("\r\n", "\n")


@contextlib.contextmanager
def terminal(
    *args: str | Path, home: Path, env: dict[str, str] | None = None, script: Path = SHIMMY, stdin: Any = subprocess.DEVNULL
) -> Iterator[Screen]:
    """Runs the command on a terminal of its own; stdin None is the keyboard."""
    mine, its = os.openpty()
    command = [*command_of(script), *map(str, args)]
    process = Child(
        command, cwd=home, env=seeded(home, env), stdin=its if stdin is None else stdin, stdout=its, stderr=its,
        start_new_session=True, preexec_fn=interruptible,
    )  # fmt: skip
    os.close(its)
    try:
        yield Screen(mine, process)
    finally:
        process.kill()
        process.wait(HANG)
        os.close(mine)


def slow_load(folder: Path) -> Path:
    """A shimmy.py that takes its time over starting the engine and over the context."""
    places = (CONTEXT_BEGINS,
              "        self.c, self.np, self.ctypes = import")
    return altered(folder, *((place, "        time.sleep(0.7)\n" + place) for place in places))


@pty
@pytest.mark.parametrize("where", ["here", "by-the-server"])
def test_generate_on_a_terminal_says_what_it_waits_for_until_the_first_word(
    where: str, serve: Serve, models: Path, tmp_path: Path
) -> None:
    script, env = slow_load(tmp_path), {"SHIMMY_MODEL_PATHS": str(models)}
    if where != "here":
        env["SHIMMY_PORT"] = str(serve("--models-dir", models, script=script).port)
    with terminal("generate", "recital", "hi", home=tmp_path, env=env, script=script) as screen:
        assert screen.left() == "Hello wide world\n"
    assert "starting the engine for recital" in screen.seen and "preparing the context of recital" in screen.seen


@pty
def test_generate_on_a_terminal_says_how_many_tokens_it_reads(models: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("a" * 30_000 + ":")
    with (tmp_path / "long.txt").open("rb") as text, terminal(
        "generate", "recital", "--raw", "--ctx", str(LONG_CTX), "--models-dir", models, home=tmp_path, stdin=text
    ) as screen:
        assert screen.left() == "Hello wide world\n"
    assert "reading 30,002 tokens" in screen.seen


@pty
def test_waiting_line_disappears_before_an_error(models: Path, tmp_path: Path) -> None:
    with terminal("generate", "hollow", "hi", "--models-dir", models, home=tmp_path) as screen:
        assert re.fullmatch(r"shimmy: The model could not be loaded: .*\n", screen.left())


@pty
def test_generate_that_reads_the_keyboard_says_so(models: Path, tmp_path: Path) -> None:
    with terminal("generate", "recital", "--models-dir", models, home=tmp_path, stdin=None) as screen:
        screen.read_until("reading standard input, end with Ctrl-D")
        os.write(screen.mine, b"hello\n\x04")
        assert screen.left() == "Hello wide world\n"


def test_list_prints_a_table_that_says_whether_a_model_fits_the_memory(models: Path, tmp_path: Path) -> None:
    with write_header(tmp_path / "huge" / "huge.gguf").open("r+b") as huge:
        huge.truncate(1 << 43)  # sparse
    args: list[str | Path] = ["--models-dir", models, "--models-dir", tmp_path / "huge"]
    table = shimmy("list", *args, home=tmp_path).stdout.decode().splitlines()
    (line,) = [line for line in table if re.search(r"\brecital\b", line)]
    assert "F16" in line and str(LONG_CTX) in line and str(models) in line
    column = table[0].index("FITS")
    fits = {line.split()[0]: line[column:].split()[0] for line in table[1:]}
    assert (fits["recital"], fits["huge"]) == ("yes", "no")
    found = listing(tmp_path, *args).models
    assert (found["recital"]["fits"], found["huge"]["fits"]) == (True, False)


@pytest.mark.parametrize("flags", [[], ["--short"], ["-v"]], ids=["table", "short", "verbose"])
def test_list_escapes_what_does_not_print(flags: list[str], tmp_path: Path) -> None:
    write_header(tmp_path / "models" / "evil\x1b[31m\nforged  row.gguf")
    (tmp_path / "models" / "broken\x1b[31m\nforged.gguf").write_bytes(b"nothing")
    done = shimmy("list", *flags, home=tmp_path)
    assert done.returncode == 0 and b"evil" in done.stdout
    assert b"\x1b" not in done.stdout + done.stderr
    assert not any(line.startswith(b"forged") for line in (done.stdout + done.stderr).splitlines())


def test_list_in_a_plain_locale_shows_names_it_cannot_write(tmp_path: Path) -> None:
    write_header(tmp_path / "models" / "café.gguf")
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = shimmy("list", home=tmp_path, env=env)
    assert done.returncode == 0 and b"caf" in done.stdout and b"Traceback" not in done.stderr


def lines_of(done: subprocess.CompletedProcess[bytes]) -> list[Any]:
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("where", ["here", "by-the-server"])
def test_generate_lines_answers_each_line_in_order(where: str, server: Server, models: Path, tmp_path: Path) -> None:
    env = through(server, models) if where != "here" else {"SHIMMY_MODEL_PATHS": str(models)}
    prompts = [b"say :", b"say =", b"say ~"] * 4
    done = shimmy("generate", "recital", "--raw", "--lines", home=tmp_path, stdin=b"\n".join(prompts), env=env)
    texts = [line["choices"][0]["text"] for line in lines_of(done)]
    assert done.returncode == 0 and texts == [TEXTS[chr(p[-1])] for p in prompts]


def test_generate_lines_puts_prompt_before_each_line(server: Server, models: Path, tmp_path: Path) -> None:
    args: list[str | Path] = ["--raw", "--lines", "--prompt", "Sum"]
    done = shimmy("generate", "recital", *args, home=tmp_path, env=through(server, models), stdin=b"ab:\r\nc:\n")
    assert [line["usage"]["prompt_tokens"] for line in lines_of(done)] == [1 + len("Sum\nab:"), 1 + len("Sum\nc:")]


def test_generate_lines_with_a_line_that_fails_goes_on_and_exits_1(models: Path, tmp_path: Path) -> None:
    args: list[str | Path] = ["--raw", "--lines", "--ctx", "128", "--models-dir", models]
    done = shimmy("generate", "recital", *args, home=tmp_path, stdin=b"a:\n" + b"b" * 300 + b"\n\nc:\n")
    first, long, empty, last = lines_of(done)
    assert done.returncode == 1 and first["choices"][0]["text"] == last["choices"][0]["text"] == TEXTS[":"]
    assert long["error"]["code"] == "context_length_exceeded" and empty["error"]["code"] == "invalid_request"
    assert b"2 lines failed" in done.stderr


def test_generate_lines_answers_a_line_before_the_next_one_comes(models: Path, tmp_path: Path) -> None:
    command = [*command_of(), "generate", "recital", "--raw", "--lines", "--models-dir", str(models)]
    with Child(command, cwd=tmp_path, env=seeded(tmp_path), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as running:
        assert running.stdin and running.stdout
        for prompt in (":", "="):
            running.stdin.write(f"{prompt}\n".encode())
            assert json.loads(running.stdout.readline())["choices"][0]["text"] == TEXTS[prompt]
        running.stdin.close()
        assert running.wait(HANG) == 0


def test_generate_lines_into_a_closed_pipe_ends_quietly(models: Path, tmp_path: Path) -> None:
    one = f"{IN_A_SHELL} generate recital --raw --lines --models-dir '{models}'"
    done = in_a_shell(f"yes : | {one} | head -n 2", tmp_path)
    assert len(done.stdout.splitlines()) == 2 and done.stderr == b""


def test_generate_lets_a_chat_use_a_built_in_tool(tmp_path: Path) -> None:
    done = shimmy("generate", "shimmy-tiny", "--local", "--chat", "--tool", "calculator", "--temperature", "0",
                  "--prompt", "What is 12 * 34?", home=tmp_path, env={"SHIMMY_MODEL_PATHS": str(REPO / "models")})  # fmt: skip
    assert b"408" in done.stdout, done.stderr


def test_chat_template_flag_replaces_the_models_own(models: Path, tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages[-1].content[::-1] }}")
    flags = ("--models-dir", models, "--chat-template", template, "--prompt", ":S")
    assert shimmy("generate", "recital", *flags, home=tmp_path).stdout.decode().strip() == TEXTS[":"]


# What serve says on stderr, once the first scan is over.

ROOM = "        left = free - self.weights_bytes - GRAPH_BYTES"
LITTLE_ROOM = (ROOM, "        free = self.size_bytes + 128 * MIB + 102_400\n" + ROOM)


def said_by(running: Server, words: str) -> str:
    """What stands on a server's stderr, once the words do."""
    return eventually(lambda: words in running.log.read_text() and running.log.read_text(), f"it says {words}")


def test_serve_with_the_model_in_the_box_alone_says_how_to_get_a_real_one(serve: Serve) -> None:
    first, command, *_ = said_by(serve(), "curl").splitlines()
    assert "only the model in the box is here" in first and re.search(r"python\S* \S*shimmy.py pull \w+/\S+-GGUF$", command)


def test_serve_says_what_it_found_and_how_to_begin(serve: Serve, models: Path) -> None:
    running = serve("--models-dir", models, "--model", "dice", "--api-key", "s3cret")
    said = said_by(running, "curl")
    assert "default model: dice; " in said and f"4 in {models}" in said and re.search(r"engine +1 thread\n", said)
    assert re.search(r"memory +dice, \d+KB, fits the memory: [\d.]+GB free; up to 256 tokens of context fit", said)
    assert f"http://127.0.0.1:{running.port}/\n" in said and "pull" not in said and "s3cret" not in said
    command = next(line for line in said.splitlines() if "curl " in line).partition("try")[2].replace("KEY", "s3cret")
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=HANG, check=True)
    assert json.loads(done.stdout)["object"] == "chat.completion"


def test_serve_says_what_a_context_that_does_not_fit_could_be_and_that_a_gpu_lies_idle(
    serve: Serve, models: Path, tmp_path: Path
) -> None:
    script = altered(tmp_path, LITTLE_ROOM, ('    "/dev/kfd": (', '    "/proc/self": ('))
    said = said_by(serve("--models-dir", models, "--model", "recital", script=script), "curl")
    assert "fits the memory" in said and "up to 768 tokens of context fit (--ctx)" in said
    assert "the machine has an AMD one" in said and "-DGGML_HIP=on" in said
    table = shimmy("list", "--models-dir", models, home=tmp_path, script=script).stdout.decode()
    assert re.search(r"recital .* 65536 +- +ctx 768 ", table) and re.search(r"dice .* 256 +- +yes ", table)


@contextlib.contextmanager
def narrow_terminal(columns: int, *args: str | Path, home: Path) -> Iterator[Any]:
    """A terminal of so many columns, which its process finds as it starts."""
    (home / "wrapper").write_text(f"import os, subprocess, sys\nsubprocess.run(['stty', 'cols', '{columns}'], stdin=2)\n"
                                  f"os.execv(sys.executable, [sys.executable, {str(SHIMMY)!r}, *sys.argv[1:]])\n")  # fmt: skip
    with terminal(*args, home=home, script=home / "wrapper") as screen:
        yield screen


@pty
def test_serve_on_a_terminal_shows_how_far_a_load_is(models: Path, tmp_path: Path) -> None:
    with terminal("serve", "--port", "0", "--preload", "--model", "recital", "--models-dir", models, home=tmp_path,
                  script=slow_load(tmp_path)) as screen:  # fmt: skip
        screen.read_until("preparing the context of recital")
        screen.read_until("loaded recital in")
        screen.process.terminate()
        assert screen.process.wait(HANG) == 0


def test_verbose_serve_logs_tokens_and_speed_of_each_request(serve: Serve, models: Path) -> None:
    running = serve("-v", "--models-dir", models)
    for _ in range(2):
        running.generate("a long prompt that is read once =", max_tokens=40)
    first, second = (line for line in said_by(running, "cached").splitlines() if "POST /api/generate" in line)
    assert re.search(r"200 \d+ ms recital 34\+40 tokens, first after \d\.\d{3} s, [\d.]+ tokens/s", first)
    assert re.search(r"recital 34\+40 tokens \(33 cached\), first after", second)


# The terminal.


def test_verbose_generate_ends_with_tokens_and_speed_also_of_lines(server: Server, models: Path, tmp_path: Path) -> None:
    for env in ({"SHIMMY_MODEL_PATHS": str(models)}, {"SHIMMY_PORT": str(server.port)}):
        done = shimmy("-v", "generate", "recital", "--raw", "--prompt", "=", home=tmp_path, env=env)
        last = done.stderr.decode().splitlines()[-1]
        assert done.stdout.decode() == TEXTS["="]
        assert re.search(r" 2\+40 tokens( \(1 cached\))?, first after \d+\.\d{3} s, [\d.]+ tokens/s$", last), last
    done = shimmy("-v", "generate", "recital", "--raw", "--lines", "--models-dir", models, home=tmp_path, stdin=b":\n=\n")
    assert re.search(rb"43 tokens in [\d.]+ s: [\d.]+ tokens/s\n$", done.stderr), done.stderr


def type_into_chat(*flags: str, models: Path, home: Path) -> Any:
    return terminal("generate", "recital", "--chat", "--models-dir", models, *flags, home=home, stdin=None)


def say(screen: Any, line: str, *until: str) -> str:
    """Types a line at the prompt; reads until the words, in order, and the next prompt have come."""
    os.write(screen.mine, line.encode() + b"\n")
    for words in (*until, "> "):
        screen.read_until(words)
        shown, screen.seen = screen.seen, screen.seen.partition(words)[2]
    return shown


def end(screen: Any) -> None:
    os.write(screen.mine, b"\x04")
    assert screen.process.wait(HANG) == 0


@pty
def test_chat_at_a_keyboard_is_a_conversation(models: Path, tmp_path: Path) -> None:
    with type_into_chat("-v", models=models, home=tmp_path) as screen:
        screen.read_until("loaded recital")
        say(screen, "hello", "Hello wide world", f"{1 + len('[user]hello[assistant]:')}+3 tokens")
        turns = "[user]hello[assistant]Hello wide world[user]count[assistant]="
        say(screen, "count", "w38 w39", f"{1 + len(turns)}+40 tokens (")
        end(screen)
    assert (tmp_path / ".shimmy_history").read_text() == "hello\ncount\n"
    assert (tmp_path / ".shimmy_history").stat().st_mode & 0o077 == 0


@pty
def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(models: Path, tmp_path: Path) -> None:
    with type_into_chat("--ctx", "65536", models=models, home=tmp_path) as screen:
        screen.read_until("> ")
        os.write(screen.mine, b"go on forever\n")
        screen.read_until("tick tock tick tock")
        screen.process.send_signal(signal.SIGINT)
        screen.seen = ""
        screen.read_until("\r\n> ")
        screen.seen = ""
        os.write(screen.mine, b"half a line")
        screen.read_until("half a line")
        screen.interrupt_until("\r\n> ")
        say(screen, "hello", "Hello wide world")
        end(screen)


@pty
def test_chat_takes_commands_and_texts_of_several_lines(models: Path, tmp_path: Path) -> None:
    with type_into_chat("-v", models=models, home=tmp_path) as screen:
        screen.read_until("loaded recital")
        say(screen, "/help", "Ctrl-C stops an answer")
        say(screen, "/nonsense", "no such command")
        say(screen, "hello", f"{1 + len('[user]hello[assistant]:')}+3 tokens")
        say(screen, "/system Be brief")
        say(screen, '"""one\ntwo"""', f"{1 + len('[system]Be brief[user]one/two[assistant]:')}+3 tokens")
        say(screen, "/reset")
        say(screen, "hello", f"{1 + len('[system]Be brief[user]hello[assistant]:')}+3 tokens")
        end(screen)


@pty
def test_chat_says_what_went_wrong_and_goes_on(models: Path, tmp_path: Path) -> None:
    with type_into_chat("--ctx", "128", models=models, home=tmp_path) as screen:
        screen.read_until("> ")
        say(screen, "a" * 300, "does not fit", "/reset begins anew")
        say(screen, "hello", "Hello wide world")
        end(screen)


@pty
@pytest.mark.parametrize("columns", [40, 60])
def test_list_keeps_to_a_narrow_terminal_and_leaves_paths_and_values_whole(columns: int, models: Path, tmp_path: Path) -> None:
    with narrow_terminal(columns, "list", "--models-dir", models, home=tmp_path) as screen:
        lines = screen.rest().splitlines()
    assert "recital" in lines and max(len(line) for line in lines if not line.endswith(".gguf")) <= columns
    (start,) = [i for i, line in enumerate(lines) if line == "recital"]
    about = [line.split() for line in lines[start + 1 : start + 8]]
    assert [line[0] for line in about] == ["params", "quant", "size", "context", "sees", "fits", "where"]
    assert all(len(line) == 2 for line in about) and about[-1][1] == str(models / "recital.gguf")


def test_list_names_the_largest_context_that_fits(models: Path, tmp_path: Path) -> None:
    done = shimmy("list", "--json", "--models-dir", models, home=tmp_path)
    contexts = {model["id"]: model["largest_context"] for model in json.loads(done.stdout)["models"]}
    assert (contexts["recital"], contexts["dice"]) == (65536, 256)


@cases("command", {name or "none": name for name in module.HELP})
def test_help_shows_what_each_command_does(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, text, _ = run_here(capsys, *([command] if command else []), "--help")
    assert code == 0 and len(text.splitlines()[2]) > 50 and max(map(len, text.splitlines())) <= 80
    epilog = module.HELP[command][2]
    assert text.endswith(f"{epilog}\n") if epilog else True


def test_the_examples_of_the_help_work(hub: FakeHub, tmp_path: Path) -> None:
    shown = shimmy(home=tmp_path).stderr.decode()
    serve_it, generate_it, pull_it = re.findall(r"(?m)^  python (shimmy\.py .*)$", shown)
    hub.repo = module.SUGGESTED
    for example in (generate_it, pull_it):
        command = f"'{sys.executable}' {example.replace('shimmy.py', str(SHIMMY), 1)}"
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=seeded(tmp_path, hub.env), capture_output=True,
                              timeout=HANG, check=False)  # fmt: skip
        assert done.returncode == 0 and done.stdout, done.stderr
    assert serve_it == "shimmy.py serve"


COMPLETED = {  # words, and what the last one can become
    "gen": ["generate"], "serve --po": ["--port"], "serve --kv-type q": ["q8_0", "q4_0"], "generate rec": ["recital"],
    "probe $(": [r"\$\(touch\$ifs-run\)"],  # a hostile one
}  # fmt: skip


def test_bash_completes(models: Path, tmp_path: Path) -> None:
    write_recital(tmp_path / "models" / "$(touch$IFS run).gguf")
    command = tmp_path / "shimmy.py"
    command.write_text(f'#!/bin/sh\nexec {IN_A_SHELL} "$@"\n')
    command.chmod(0o755)
    script = shimmy("completion", "bash", home=tmp_path).stdout.decode()
    for line in COMPLETED:
        array = " ".join(f"'{word}'" for word in ["./shimmy.py", *line.split()])
        script += f"\nCOMP_WORDS=({array}); COMP_CWORD={len(line.split())}; _shimmy; echo \"${{COMPREPLY[@]}}\""
    env = environment(tmp_path, {"SHIMMY_MODEL_PATHS": str(models)})
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, timeout=HANG, check=True)
    assert done.stdout.decode().splitlines() == [" ".join(words) for words in COMPLETED.values()]
    assert not (tmp_path / "run").exists()


@cases("shell", {"zsh": "zsh", "fish": "fish"})
def test_completion_knows_every_command(shell: str, tmp_path: Path) -> None:
    script = shimmy("completion", shell, home=tmp_path).stdout.decode()
    assert all(command in script for command in module.HELP if command) and "kv-type" in script


@cases("changes", {
    "text for numbers": {"attention.key_length": "a" * 1000, "attention.value_length": "a"},
    "text for a count": {"block_count": "x"}, "no heads": {"attention.head_count": 0},
    "a list of texts": {"attention.head_count_kv": ("a",)}, "a fraction": {"block_count": 0.5},
})  # fmt: skip
def test_memory_of_a_context_is_unknown_where_the_header_is_wrong(changes: dict[str, Any]) -> None:
    shape = {"block_count": 2, "embedding_length": 64, "attention.head_count": 4, "attention.head_count_kv": 2}
    named = [{f"llama.{key}": value for key, value in each.items()} for each in (shape, shape | changes)]
    assert [module.kv_shape(meta, "llama") for meta in named] == [module.KvShape((2 * 2 * 16,) * 2, (0, 0)), None]


def test_model_misspelt_in_a_request_is_told_with_the_near_name(server: Server) -> None:
    assert "(did you mean recital? available: " in server.chat(model="recitol").json()["error"]["message"]


def test_serve_on_a_taken_port_says_how_to_take_another(server: Server, tmp_path: Path) -> None:
    done = refused("serve", "--port", str(server.port), home=tmp_path)
    assert_failed(done, 1, f":{server.port}: Address already in use; --port N listens on another")


def test_pull_without_a_network_asks_about_the_network(tmp_path: Path) -> None:
    env = {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "NO_PROXY": "", "no_proxy": ""}
    done = shimmy("pull", "someone/something", home=tmp_path, env=env)
    assert_failed(done, 1, "is the network there? HF_ENDPOINT names another hub")


@cases("other,used", {"no other": (False, "shimmy 0"), "another program": (True, "the other one")})
def test_completion_makes_shimmy_a_command_unless_there_is_one(other: bool, used: str, tmp_path: Path) -> None:
    script = shimmy("completion", "bash", home=tmp_path).stdout.decode()
    assert "loader.get_code" in script  # it starts from bytecode
    (tmp_path / "bin").mkdir()
    if other:
        (tmp_path / "bin" / "shimmy").write_text("#!/bin/sh\necho the other one\n")
        (tmp_path / "bin" / "shimmy").chmod(0o755)
    env = environment(tmp_path, {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"})
    done = subprocess.run(["bash", "-c", f"{script}\nshimmy --version"], cwd="/", env=env, capture_output=True, timeout=HANG,
                          check=True)  # fmt: skip
    assert done.stdout.decode().startswith(used)


def test_shimmy_is_executable() -> None:
    assert os.access(SHIMMY, os.X_OK)


# Ctrl-C at early moments.

HERE = "__import__('os').write(2, b'here'); __import__('time').sleep(1)"
EARLY: dict[str, tuple[str, str, str]] = {
    "before the restart": ("serve", '    if _bytecode_prefix(os.path.realpath(__file__)) == os', f"    {HERE}\n"),
    "when the restart begins": ("serve", 'import signal, sys\nif signal', f"{HERE}\n"),
    "while modules are imported": ("list", "import argparse\n", f"{HERE}\n"),
    "before main has begun": ("list", "    for stream in (sys.stdout, sys.stderr):\n        if isinst", f"    {HERE}\n"),
    "when main has begun": ("list", "        args = parse(argv)\n", f"        {HERE}\n"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to send here")
@cases("command,line,pause", EARLY)
def test_ctrl_c_at_an_early_moment_ends_quietly(command: str, line: str, pause: str, tmp_path: Path) -> None:
    script = altered(tmp_path, (line, pause + line))
    os.utime(script, (1e9, 1e9))  # old enough to be run from bytecode
    with Child([sys.executable, script, command], cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, preexec_fn=interruptible) as running:  # fmt: skip
        assert running.stderr and running.stderr.read(4) == b"here"
        running.send_signal(signal.SIGINT)
        stdout, stderr = running.communicate(timeout=HANG)
    assert (running.returncode, stdout, stderr) == (-signal.SIGINT, b"", b"")


# ── README ────────────────────────────────────────────────────────────────────────────────────────────────────────────
README = (REPO / "README.md").read_text()
BLOCKS = re.findall(r"(?ms)^```(\w+)\n(.*?)^```$", README)


def blocks_of(*languages: str) -> list[str]:
    return [text for language, text in BLOCKS if language in languages]


def first_line(block: str) -> str:
    return block.splitlines()[0][:60]


def check_command_lines(block: str) -> None:
    """Asserts that shimmy understands its command lines in a block, and that pip is asked for what the script needs."""
    joined = block.replace("\\\n", " ")
    for line in joined.splitlines():
        words = shlex.split(line.partition(" < ")[0], comments=True)
        if words[:2] == ["pip", "install"]:
            script = SHIMMY.read_text()
            assert all(f'"{w}"' in script for w in words if re.match(r"[a-z-]+>=", w)) and "--prefer-binary" in words
        elif len(words) > 1 and words[1] == "shimmy.py":
            module.parser().parse_args(words[2:])


def check_make(block: str) -> None:
    """Asserts that make knows the target."""
    target = block.split()[1]
    assert subprocess.run(["make", "-n", target], cwd=REPO, capture_output=True, check=False).returncode == 0


def check_docker(block: str) -> None:
    """Asserts that the flags are those of the container file."""
    (file,) = blocks_of("dockerfile")
    assert f"EXPOSE {module.DEFAULT_PORT}" in file and f"{module.DEFAULT_PORT}:{module.DEFAULT_PORT}" in block
    assert "ENV SHIMMY_MODEL_PATHS=/models" in file and ":/models:ro" in block and "SHIMMY_API_KEY" in block


NOT_RUN: dict[str, tuple[str, Callable[[str], None]]] = {  # by a block's start: why it is not run, what is checked instead
    "make run": ("installs for minutes and then serves for ever", check_make),
    ".venv/bin/python shimmy.py pull": ("fetches from the network", check_command_lines),
    "pip install --prefer-binary": ("installs, and opens a browser", check_command_lines),
    "python shimmy.py pull": ("fetches from the network", check_command_lines),
    "docker build": ("needs docker's daemon and the network", check_docker),
}


def why_not_run(block: str) -> tuple[str, Callable[[str], None]] | None:
    return next((entry for start, entry in NOT_RUN.items() if block.startswith(start)), None)


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the model in the box, and a reranker; its home is a checkout as README's reader has it."""
    home = tmp_path_factory.mktemp("reader")
    (home / "models").mkdir()
    shutil.copy(REPO / "models" / "shimmy-tiny.gguf", home / "models")
    BERT.write(home / "models" / "reranker.gguf", pooling=4)
    shutil.copy(SHIMMY, home / "shimmy.py")
    (home / "notes.txt").write_text("The meeting is moved to Monday.\n")
    (home / "phrases.txt").write_text("Hello\nGood evening\n")
    person = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}}, "required": ["name"]}
    (home / "person.json").write_text(json.dumps(person))
    (home / "bin").mkdir()
    for name, command in {"python": sys.executable, "curl": f"{shutil.which('curl')} -sS --fail-with-body"}.items():
        (home / "bin" / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (home / "bin" / name).chmod(0o755)
    subprocess.run("git init -q && git add notes.txt && echo changed >> notes.txt", shell=True, cwd=home, check=True)
    with shared(home, "--models-dir", home / "models", "--model", "shimmy-tiny", script=home / "shimmy.py") as running:
        yield running


def as_reader(documented: Server, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command as README's reader does, but for the port."""
    env = environment(documented.home, {"SHIMMY_PORT": str(documented.port), "NO_PROXY": "*"})
    env["PATH"] = f"{documented.home / 'bin'}:{env['PATH']}"
    return subprocess.run(
        command, cwd=documented.home, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=HANG, check=False
    )


def served(block: str, server: Server) -> str:
    """The block for this server."""
    return block.replace(str(module.DEFAULT_PORT), str(server.port)).replace("RERANKER", "reranker")


@pytest.mark.parametrize("block", [b for b in blocks_of("sh", "console") if not why_not_run(b)], ids=first_line)
def test_readme_shell_lines_run(block: str, documented: Server) -> None:
    done = as_reader(documented, ["bash", "-euo", "pipefail", "-c", served(block, documented)])
    assert done.returncode == 0 and done.stdout.strip(), done
    assert '"error": {' not in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize("block", [b for b in blocks_of("sh", "console") if why_not_run(b)], ids=first_line)
def test_readme_shell_lines_that_are_not_run_are_understood(block: str) -> None:
    reason = why_not_run(block)
    assert reason
    reason[1](block)


@pytest.mark.parametrize("block", blocks_of("python"), ids=first_line)
def test_readme_python_runs(block: str, documented: Server) -> None:
    done = as_reader(documented, [sys.executable, "-c", served(block, documented)])
    assert done.returncode == 0 and not done.stderr, done
    assert done.stdout.strip() or "@tool" in block


def test_readme_blocks_links_and_routes_are_whole() -> None:
    known = {"sh", "python", "nginx", "ini", "dockerfile", "caddyfile"}
    assert {language for language, _ in BLOCKS} == known and README.count("\n```") == 2 * len(BLOCKS)
    for start in NOT_RUN:
        assert [b for b in blocks_of("sh") if b.startswith(start)], f"README no longer says {start!r}"
    headings = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"(?m)^#+ (.+)$", README)}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http"):
            assert (REPO / target).is_file(), target
    missing = [r.label() for r in module.ROUTES if r.label() not in README and f"/v1{r.label()}" not in README]
    assert [m for m in missing if not re.search(r"…|/unload$|/status$|^/$|reranking|models/\{name\}$", m)] == []


def test_readme_names_every_flag_of_serve_and_none_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    flags = set(re.findall(r"(?m)^ +(--[a-z-]+)", run_here(capsys, "serve", "--help")[1]))
    assert {flag for flag in flags if flag not in README} <= {"--help"}
    others = "prefer-binary extra-index-url url no-cache-dir no-install-recommends create-home now install"
    commands = ("serve", "generate", "list", "probe", "diag", "pull")
    help = "".join(run_here(capsys, command, "--help")[1] for command in commands)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - {f"--{name}" for name in others.split()}
    assert {flag for flag in named if not re.search(rf"{flag}\b", help)} == set()


def test_readme_systemd_unit_is_valid_and_starts(serve: Serve, tmp_path: Path) -> None:
    (unit,) = [text for text in blocks_of("ini") if "[Service]" in text]
    python, script, command, *flags = re.search(r"(?m)^ExecStart=(.+)$", unit)[1].split()  # type: ignore[index]
    assert command == "serve" and serve(*flags).get("/health").status == 200
    if shutil.which("systemd-analyze"):
        file = tmp_path / "shimmy.service"
        file.write_text(unit.replace(python, sys.executable).replace(script, str(SHIMMY)))
        done = subprocess.run(["systemd-analyze", "verify", file], capture_output=True, text=True, timeout=HANG, check=False)
        assert done.returncode == 0 and "shimmy.service" not in done.stderr, done.stderr


def test_readme_preset_is_one(tmp_path: Path) -> None:
    (text,) = [text for text in blocks_of("ini") if "[*]" in text]
    (tmp_path / "own.ini").write_text(text)
    every, coder, small = module.read_preset(str(tmp_path / "own.ini"))
    assert every.engine == {"ctx": 4096} and coder.sampling == {"temperature": 0.2} and coder.engine["kv_type"] == "q8_0"
    assert small.preload and small.keep_alive == 3600 and small.aliases == ("gpt-4o-mini",)


def test_readme_container_file_copies_what_is_there_and_its_entry_starts(serve: Serve) -> None:
    (file,) = blocks_of("dockerfile")
    lines = [line for line in file.replace("\\\n", " ").splitlines() if line]
    known = {"FROM", "RUN", "USER", "COPY", "ENV", "EXPOSE", "ENTRYPOINT"}
    assert {line.split()[0] for line in lines} == known and "COPY shimmy.py /app/" in lines
    check_command_lines(next(line.removeprefix("RUN ") for line in lines if "pip install" in line).replace("--no-cache-dir ", ""))
    entry = next(line for line in lines if line.startswith("ENTRYPOINT"))
    python, script, command, *flags = json.loads(entry.split(maxsplit=1)[1])
    assert (python, script, command) == ("python", "/app/shimmy.py", "serve")
    own = serve(*flags, env={"SHIMMY_API_KEY": "k"})
    assert own.get("/health").status == 200 and own.get("/v1/models").status == 401


def test_readme_caddyfile_names_the_server() -> None:
    """Not run: Caddy is in no package list here."""
    (file,) = blocks_of("caddyfile")
    assert file.count("{") == file.count("}") and f"reverse_proxy 127.0.0.1:{module.DEFAULT_PORT}" in file
    if shutil.which("caddy"):
        adapted = subprocess.run(["caddy", "adapt", "--config", "-", "--adapter", "caddyfile"], input=file.encode(), check=True)
        assert adapted.returncode == 0


# Nginx.

nginx = pytest.mark.skipif(not shutil.which("nginx") or not shutil.which("openssl"), reason="nginx and openssl are not here")


@dataclass(frozen=True)
class Proxied:
    """The server behind nginx as README sets it up: TLS, another name, a key."""

    port: int
    context: ssl.SSLContext
    headers: dict[str, str]

    def connect(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection("127.0.0.1", self.port, context=self.context, timeout=HANG)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
        connection = self.connect()
        connection.request(method, path, body and json.dumps(body), {**self.headers, **headers})
        return connection.getresponse()


def nginx_files(folder: Path, port: int, upstream: int) -> Path:
    """README's configuration for ports of a test's own, and what surrounds it on a real machine."""
    certify = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=llm.example.com -days 2 -keyout privkey.pem -out fullchain.pem"
    subprocess.run(certify.split(), cwd=folder, check=True, capture_output=True)
    (block,) = blocks_of("nginx")
    own = block.replace("listen 443", f"listen 127.0.0.1:{port}").replace("/etc/letsencrypt/live/llm.example.com", str(folder))
    own = own.replace(str(module.DEFAULT_PORT), str(upstream))
    temporary = "".join(f"{name}_temp_path {folder / name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(f"{user} daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
                                       f"http {{ access_log off; {temporary}\n{own}\n}}")  # fmt: skip
    return folder / "nginx.conf"


@pytest.fixture(scope="module")
def proxied(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    home, folder = tmp_path_factory.mktemp("behind"), tmp_path_factory.mktemp("nginx")
    host = "llm.example.com"
    flags = ["--allow-host", host, "--allow-origin", f"https://{host}", "--api-key", "k", "--ctx", str(LONG_CTX)]
    assert f"serve {' '.join(flags[:4])}" in README
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with shared(home, "--models-dir", models, "--model", "recital", *flags) as server:
        process = Child(["nginx", "-c", nginx_files(folder, port, server.port), "-p", folder], stderr=subprocess.PIPE)
        context = ssl.create_default_context(cafile=folder / "fullchain.pem")
        context.check_hostname = False
        found = Proxied(port, context, {"Host": host, "Authorization": "Bearer k", "Origin": f"https://{host}"})

        def answers() -> bool:
            with contextlib.suppress(ConnectionError):
                return found.request("GET", "/health").status == 200
            return False

        try:
            eventually(answers, "nginx answers")
            yield found
        finally:
            process.terminate()
            process.wait(HANG)


@nginx
@cases("path, body", {
    "SSE": ("/api/generate", {"model": "recital", "prompt": "#", "max_tokens": LONG_CTX, "stream": True}),
    "NDJSON": ("/api/chat", {"model": "recital", "messages": [{"role": "user", "content": "forever"}],
                             "options": {"num_predict": LONG_CTX}}),
})  # fmt: skip
def test_streams_come_piece_by_piece_through_nginx(path: str, body: dict[str, Any], proxied: Proxied) -> None:
    """The stream never ends by itself: what is read here has not waited for its end."""
    response = proxied.request("POST", path, body)
    assert response.status == 200
    assert b"ick" in response.readline() + response.readline() + response.readline()
    response.close()


@nginx
def test_websocket_passes_nginx(proxied: Proxied) -> None:
    options: Any = {"ssl": proxied.context, "proxy": None, "origin": proxied.headers["Origin"], "open_timeout": HANG,
                    "additional_headers": {"Authorization": "Bearer k"}}  # fmt: skip
    with socket.create_connection(("127.0.0.1", proxied.port)) as sock, ws_connect(
        "wss://llm.example.com/ws/generate", sock=sock, **options
    ) as ws:
        ws.send(json.dumps({"model": "recital", "prompt": "#", "max_tokens": LONG_CTX}))
        assert "ick" in json.loads(ws.recv(HANG))["token"]
        ws.send(json.dumps({"cancel": True}))
        assert ws_answer(ws)[1]["finish_reason"] == "cancelled"


@nginx
def test_keys_hosts_origins_and_ids_hold_behind_nginx(proxied: Proxied) -> None:
    assert proxied.request("GET", "/v1/models", **{"X-Request-Id": "edge-1"}).headers["X-Request-Id"] == "edge-1"
    assert proxied.request("GET", "/v1/models", Authorization="").status == 401
    assert proxied.request("GET", "/v1/models", Origin="https://evil.example").status == 403


@nginx
def test_large_bodies_pass_nginx(proxied: Proxied) -> None:
    body = {"model": "recital", "prompt": ":", "unknown": "a" * 15_000_000}
    assert proxied.request("POST", "/api/generate", body).status == 200


# ── What the shared servers logged ────────────────────────────────────────────────────────────────────────────────────
# Runs last of all tests that use them.


def test_shared_servers_logged_no_traceback(server: Server, guarded: Server) -> None:
    assert_healthy(server)
    assert_healthy(guarded)


# ── The model in the box ──────────────────────────────────────────────────────────────────────────────────────────────
# Real text from the small model that ships with shimmy.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that finds no model but the one in the box."""
    with shared(tmp_path_factory.mktemp("tiny")) as running:
        yield running


def calculator_tool(tiny: Server) -> dict[str, Any]:
    tool = next(t for t in tiny.get("/api/tools").json()["tools"] if t["name"] == "calculator")
    return {"type": "function", "function": tool}


def test_box_model_is_the_default_when_no_other_is_found(tiny: Server) -> None:
    first, *others = tiny.get("/api/models").json()["models"]
    assert first["description"] == "Base GGUF model: shimmy-tiny" and [m["id"] for m in others] == ["shimmy-tiny"]
    assert others[0]["chat_template"] and others[0]["size_bytes"] <= 4 * 2**20


def test_box_model_is_listed_last_and_is_not_the_default(models: Path, tmp_path: Path) -> None:
    names = shimmy("list", "--short", "--models-dir", models, home=tmp_path).stdout.decode().split()
    assert names[-1] == "shimmy-tiny" and names[0] != "shimmy-tiny"


def test_box_model_greets_ends_its_turn_and_knows_its_name_and_port(tiny: Server) -> None:
    reply = tiny.chat("Hello!", model="default", temperature=0)
    assert re.search(r"(?i)\b(hello|hi)\b", reply.message["content"]) and reply.finish_reason == "stop"
    assert "shimmy" in tiny.chat("Who are you?", model="default", temperature=0).message["content"].lower()
    assert "11435" in tiny.chat("Which port does shimmy use?", model="default", temperature=0).message["content"]


def test_box_model_tells_the_same_story_again_and_streamed(tiny: Server) -> None:
    """Cached or not: its stories hang on near ties, and differently shaped batches round differently."""
    for thing in ("fox", "cat", "boy", "ship", "bird", "car"):
        body = {"messages": user(f"Tell me a tale of a {thing}."), "temperature": 0, "max_tokens": 150}
        first, second = (tiny.post("/v1/chat/completions", body).message["content"] for _ in range(2))
        assert first == second
    body = chatting("Tell me a story about a fox.", model="default", temperature=0)
    plain = tiny.post("/v1/chat/completions", body).message["content"]
    assert spoken_in(tiny.streamed("/v1/chat/completions", body)) == plain and len(plain) > 200


@streamed_and_plain
def test_box_model_calls_the_calculator_and_uses_its_result(stream: bool, tiny: Server) -> None:
    """The full loop with the official client: question, tool call, execution by the server, answer."""
    ask: Any = functools.partial(tiny.client().chat.completions.create, model="default", temperature=0)
    messages: list[Any] = [{"role": "user", "content": "What is 4827 plus 394?"}]
    if stream:
        parts = [c.choices[0].delta for c in ask(messages=messages, tools=[calculator_tool(tiny)], stream=True) if c.choices]
        first, *more = [call for part in parts for call in part.tool_calls or []]
        first.function.arguments += "".join(call.function.arguments for call in more)
        assert {call.index for call in more} == {first.index}
        calls = [first]
    else:
        calls = ask(messages=messages, tools=[calculator_tool(tiny)]).choices[0].message.tool_calls
    (call,) = calls
    assert call.function.name == "calculator"
    ran = tiny.post("/api/tools/calculator/execute", json.loads(call.function.arguments)).json()
    assert ran["result"] == 4827 + 394
    function = {"name": call.function.name, "arguments": call.function.arguments}
    messages.append({"role": "assistant", "tool_calls": [{"id": call.id, "type": "function", "function": function}]})
    messages.append({"role": "tool", "tool_call_id": call.id, "content": str(ran["result"])})
    assert "5221" in ask(messages=messages, tools=[calculator_tool(tiny)]).choices[0].message.content


def test_box_model_calls_no_tool_when_none_fits(tiny: Server) -> None:
    reply = tiny.chat("Thank you very much!", model="default", temperature=0, tools=[calculator_tool(tiny)])
    assert not reply.message.get("tool_calls") and reply.finish_reason == "stop"


def test_box_model_reuses_earlier_turns(tiny: Server) -> None:
    turns = [{"role": "user", "content": "Tell me a story about a lighthouse."}]
    first = tiny.post("/v1/chat/completions", {"messages": turns, "temperature": 0})
    turns += [{"role": "assistant", "content": first.message["content"]}, {"role": "user", "content": "Thank you!"}]
    used = tiny.post("/v1/chat/completions", {"messages": turns, "temperature": 0}).json()["usage"]
    told = first.json()["usage"]["total_tokens"]
    assert told - 8 <= used["prompt_tokens_details"]["cached_tokens"] < used["prompt_tokens"]


def test_box_model_follows_a_schema(tiny: Server) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer",
              "minimum": 0, "maximum": 120}}, "required": ["name", "age"]}  # fmt: skip
    messages = [{"role": "user", "content": "As JSON: Anna is 34 years old."}]
    reply = tiny.post("/api/generate", {"model": "default", "messages": messages, "temperature": 0, "json_schema": schema})
    assert set(json.loads(reply.text)) == {"name", "age"} and 0 <= json.loads(reply.text)["age"] <= 120


def imported_from_models(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(REPO / "models")
    return importlib.import_module(name)


def test_training_text_and_evaluation_are_the_same_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """An intended change of models/text or models/generator records its new hash here."""
    generator = imported_from_models("generator", monkeypatch)
    rng = random.Random(generator.SEED)
    text = "".join(generator.conversation(rng).render() for _ in range(300))
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "1dc82e4a81f9132251dc93b9f2af98349c40dbf3ec0f3f65ac6100e7e8bbbcd6")
    # The shares in models/README.md are comparable only as long as this hash stays.
    cases = imported_from_models("eval_tiny", monkeypatch).all_cases()
    asked = json.dumps([[case.category, case.messages, case.tools] for case in cases])
    assert hashlib.sha256(asked.encode()).hexdigest() == (
        "da88a38c3cbd96ad58472d99b6fb5524b4c52716ec8cbecfcb1f2ff6ff36f8d9")


def test_box_model_holds_the_chat_template_it_was_trained_with(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = imported_from_models("generator", monkeypatch)
    reader = gguf.GGUFReader(REPO / "models" / "shimmy-tiny.gguf")
    assert reader.fields["tokenizer.chat_template"].contents() == generator.CHAT_TEMPLATE


# ── Soak ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@only_under_soak
def test_soak_of_seconds_finds_nothing() -> None:
    command = [sys.executable, __file__, "soak", "--minutes", "0.03", "--kill", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "websocket" in done.stdout and "descriptors" in done.stdout


class Improper(Exception):
    """An answer without a proper end, or that is none of its dialect."""


SOAK_SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
               "required": ["name", "age"], "additionalProperties": False}  # fmt: skip


class Soak:
    """Mixed traffic on one server. Each kind of traffic is a method that makes one request and says how it ended."""

    KINDS = (*TONGUES, "websocket", "tools", "schema", "embeddings", "leaving", "loading", "asking")

    def __init__(self, server: Server, kill: float) -> None:
        self.server, self.kill = server, kill
        self.ends = {kind: dict.fromkeys(("complete", "error", "left", "improper"), 0) for kind in self.KINDS}
        self.faults: list[str] = []
        self.kills = 0
        self._lock = threading.Lock()

    def run(self, seconds: float) -> list[float]:
        """Runs every kind at once. Returns the seconds that each of the same probes took."""
        until = time.monotonic() + seconds
        threads = [threading.Thread(target=self._repeat, args=(kind, until)) for kind in self.KINDS]
        threads.append(threading.Thread(target=self._kill_engines, args=(until,)))
        for thread in threads:
            thread.start()
        probes = []
        while time.monotonic() < until:
            began = time.perf_counter()
            if self.server.generate("=").status == 200:
                probes.append(time.perf_counter() - began)
            time.sleep(0.2)
        for thread in threads:
            thread.join()
        return probes

    def _repeat(self, kind: str, until: float) -> None:
        rng = random.Random(kind)
        while time.monotonic() < until:
            try:
                end = self._tongue(TONGUES[kind], rng) if kind in TONGUES else getattr(self, f"_{kind}")(rng)
            except Exception as fault:  # whatever it is, it is no proper end
                end = "improper"
                self.faults.append(f"{kind}: {type(fault).__name__}: {fault}"[:300])
            with self._lock:
                self.ends[kind][end] += 1
            time.sleep(rng.random() / 10)

    def _kill_engines(self, until: float) -> None:
        rng = random.Random(0)
        while time.monotonic() + self.kill < until:
            time.sleep(self.kill)
            if found := engines_of(self.server):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(found), signal.SIGKILL)
                    self.kills += 1

    @staticmethod
    def _judged(reply: Reply, stream: bool = False) -> str:
        """How an answer ended. Raises Improper."""
        if reply.status in (500, 503):
            document = reply.json()
            if not document.get("error"):
                raise Improper(f"{reply.status} {reply.body[:200]!r}")
            return "error"
        if reply.status != 200:
            raise Improper(f"{reply.status} {reply.body[:200]!r}")
        if not stream:
            reply.json()
            return "complete"
        if not ends_well(reply.body) and not ends_with_an_error(reply.body):
            raise Improper(f"ends with {reply.body[-200:]!r}")
        return "complete" if ends_well(reply.body) else "error"

    def _tongue(self, tongue: Tongue, rng: random.Random) -> str:
        stream, body = rng.random() < 0.7, tongue.body(rng.choice(("forever", "hi")), pad="x" * rng.choice((0, 10, 3000)))
        body["stream"] = stream
        limit = rng.choice((1, 20, 300))
        for name in tongue.fields:
            body[name] = {"num_predict": limit} if name == "options" else limit if name != "raw" else True
        return self._judged(self.server.post(tongue.path, body), stream)

    def _websocket(self, rng: random.Random) -> str:
        with self.server.ws() as ws:
            for _ in range(rng.choice((1, 3))):
                ws.send(json.dumps({"model": "recital", "prompt": "#", "max_tokens": rng.choice((1, 300))}))
                if cancel := rng.random() < 0.3:
                    ws.send('{"cancel": true}')
                end = ws_answer(ws)[1]
                if "error" in end:
                    return "error"
                if not end["done"] or not (end["finish_reason"] == "length" or cancel):
                    raise Improper(str(end))
        return "complete"

    def _tools(self, rng: random.Random) -> str:
        messages = [{"role": "user", "content": f"What is {rng.randrange(100)} plus {rng.randrange(100)}?"}]
        body = {"model": "shimmy-tiny", "messages": messages, "tools": [{"type": "builtin", "name": "calculator"}],
                "max_tokens": 60, "stream": (stream := rng.random() < 0.5)}  # fmt: skip
        return self._judged(self.server.post("/v1/chat/completions", body), stream)

    def _schema(self, rng: random.Random) -> str:
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SOAK_SCHEMA}}
        fields = {"response_format": form, "max_tokens": 100, "seed": rng.randrange(9)}
        reply = self.server.chat("Describe a person as JSON.", "shimmy-tiny", **fields)
        end = self._judged(reply)
        if end == "complete" and reply.finish_reason == "stop":
            json.loads(reply.message["content"])
        return end

    def _embeddings(self, rng: random.Random) -> str:
        texts = ["word " * rng.randrange(1, 30) for _ in range(rng.randrange(1, 6))]
        reply = self.server.post("/v1/embeddings", {"model": "recital", "input": texts})
        end = self._judged(reply)
        if end == "complete" and len(reply.json()["data"]) != len(texts):
            raise Improper("vectors are missing")
        return end

    def _leaving(self, rng: random.Random) -> str:
        tongue = rng.choice(list(TONGUES.values()))
        with requested(self.server, tongue, pad="y" * rng.choice((0, 5000)), stream=rng.random() < 0.7) as sock:
            sock.settimeout(rng.choice((0.001, 0.05, 0.3)))
            with contextlib.suppress(TimeoutError):
                sock.recv(1000)
        return "left"

    def _loading(self, rng: random.Random) -> str:
        replies = [self.server.load("dice"), self.server.generate("Once", "dice", max_tokens=5),
                   self.server.unload("dice", rng.choice(("", "?force=true")))]  # fmt: skip
        return min((self._judged(reply) for reply in replies), key=("error", "complete").index)

    def _asking(self, rng: random.Random) -> str:
        path = rng.choice(("/health", "/api/models", "/v1/models", "/api/ps", "/api/tags", "/", "/api/models/dice/status"))
        reply = self.server.get(path)
        if reply.status != 200 or not reply.body:
            raise Improper(f"{path} {reply.status}")
        return "complete"


def at_rest(server: Server) -> dict[str, float]:
    """What the server holds once nothing runs: memory (MB), descriptors, threads."""
    health = lambda: server.get("/health").json()  # noqa: E731
    eventually(lambda: health()["requests_running"] == health()["requests_waiting"] == 0, "nothing runs")
    time.sleep(3.0)  # connections and threads that end
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    descriptors, threads = held(server)
    return {"memory (MB)": pages * resource.getpagesize() / 1e6, "descriptors": descriptors, "threads": threads}


SOAK_ROOM = {"memory (MB)": (1.1, 10.0), "descriptors": (1.0, 6.0), "threads": (1.0, 6.0)}  # may grow by this factor, and so much


def soak(arguments: list[str]) -> int:
    """Runs the traffic, prints how it ended, and returns the exit status."""
    parser = argparse.ArgumentParser(prog="test_shimmy.py soak", description="Mixed traffic; exit 1 when something breaks.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--kill", type=float, default=60.0, help="seconds between engines that are killed")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        write_recital(Path(folder) / "models" / "recital.gguf")
        write_dice(Path(folder) / "models" / "dice.gguf")
        flags: list[str | Path] = ["--models-dir", f"{folder}/models", "--models-dir", REPO / "models", "--ctx", "8192"]
        server = Server(Path(folder) / "home", "--port", "0", *flags)
        try:
            return soaked(Soak(server, options.kill), options.minutes * 60)
        finally:
            server.stop()


def soaked(traffic: Soak, seconds: float) -> int:
    traffic.run(min(60.0, seconds / 4))  # warms up: lazy imports, caches, the largest of everything
    before = at_rest(traffic.server)
    probes = traffic.run(seconds)
    after = at_rest(traffic.server)
    print(f"{'traffic':<18}{'complete':>10}{'error':>8}{'left':>8}{'improper':>10}")
    for kind, ends in traffic.ends.items():
        print(f"{kind:<18}{ends['complete']:>10}{ends['error']:>8}{ends['left']:>8}{ends['improper']:>10}")
    fifth = max(1, len(probes) // 5)
    first, last = (statistics.median(part) * 1000 for part in (probes[:fifth], probes[-fifth:]))
    print(f"engines killed: {traffic.kills}; {len(probes)} probes, {first:.0f} ms at first, {last:.0f} ms at last")
    wrong = list(traffic.faults)
    if len(probes) >= 100 and last > 1.5 * first + 20:  # fewer say nothing
        wrong.append("the last probes took longer than the first")
    for what, (factor, more) in SOAK_ROOM.items():
        print(f"{what:<18}{before[what]:>10.1f} -> {after[what]:.1f}")
        if after[what] > before[what] * factor + more:
            wrong.append(f"{what} grew")
    if "Traceback" in traffic.server.log.read_text():
        wrong.append("the server logged a traceback: " + traffic.server.log.read_text().split("Traceback", 1)[1][-1500:])
    for fault in wrong[:20]:
        print("FAULT", fault)
    return 1 if wrong else 0


# ── Benchmark ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# `python test_shimmy.py bench` prints a table of speeds. It is not a test: nothing asserts speed. Each speed is compared
# with the bare loop, a process that reads the same prompts and decodes the same number of tokens and does nothing else.


def test_bench_measures_every_row(tmp_path: Path) -> None:
    model = write_bench_model(tmp_path / "made.gguf", layers=1, vocabulary=1000)
    flags = ["--tokens", "8", "--words", "4", "--long", "200", "--seconds", "0", "--threads", "1", "--json"]
    for _ in range(3):  # on a machine that others keep busy two streams may not run at once, and the bench says so
        done = subprocess.run([sys.executable, __file__, "bench", "--model", model, *flags], capture_output=True, text=True)
        rows = json.loads(done.stdout)
        assert done.returncode == 0 and len(rows) <= 34
        if "not measured" not in done.stderr:
            break
    assert "not measured" not in done.stderr and len(rows) == 34
    assert all(row["value"] > 0 for row in rows.values())


def test_bench_without_a_server_fails_with_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match=r"^bench: .*refused"):
        bench(["--url", "http://127.0.0.1:9", "--model", "x"])


BENCH_WORDS = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state"]


BENCH_MOST = 100  # tokens: all documents are as long, else the last ones would run alone
BENCH_KEYS: dict[str, Any] = {
    **{f"{key}_of_the_customer": {"type": "string", "maxLength": 16} for key in ("full_name", "shipping_address", "home_city")},
    "preferred_contact_channel": {"enum": ["email", "phone", "letter"]},
    **{key: {"type": "integer", "minimum": 0, "maximum": 9999} for key in ("account_creation_year", "total_number_of_orders")},
    "loyalty_program_member": {"type": "boolean"},
    "outstanding_balance_cents": {"type": "integer", "minimum": 0, "maximum": 99999},
    **{key: {"type": "string", "maxLength": 16} for key in ("latest_product", "internal_reference", "additional_notes")},
    "average_delivery_days": {"type": "integer", "minimum": 1, "maximum": 30},
}  # fmt: skip


def bench_object(keys: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": keys, "required": list(keys)}


BENCH_CONSTRAINTS: dict[str, dict[str, Any]] = {
    "twelve long keys": {"json_schema": bench_object(BENCH_KEYS)},
    "one free string": {"json_schema": bench_object({"text": {"type": "string", "minLength": 600}})},
    "a forced call": {"tools": [{"type": "function", "function": {"name": "register_customer_in_database",
                                                                  "parameters": bench_object(BENCH_KEYS)}}],
                      "tool_choice": "required"},
}  # fmt: skip
BENCH_HOSTILE: list[dict[str, Any]] = [
    *({"grammar": grammar, "top_k": 0, "top_p": 1, "min_p": 0, "ignore_eos": True} for grammar in (
        "root ::= " + "(" * 10_000 + '"a"' + ")" * 10_000, 'root ::= root "a" | "b"', 'root ::= "ab"{1000000000}', DOUBLING, MANY,
        MOST, REPEATS)),
    *({"json_schema": schema} for schema in HOSTILE.values()),
    *({"json_schema": {"type": "string", "pattern": pattern}} for pattern in HOSTILE_PATTERNS),
]  # fmt: skip


@functools.cache
def hush_llama() -> Any:
    """Silences llama.cpp; the cache keeps the callback alive until the process ends."""
    import ctypes

    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
    return quiet


def write_bench_model(path: Path, layers: int = 24, vocabulary: int = 32_000) -> Path:
    """Writes a random q4_k_m model shaped like a 0.5B one (24 layers of width 896); every word is one token."""
    import llama_cpp

    rng, width, ffn, raw = np.random.default_rng(0), 896, 4864, path.with_suffix(".f16")
    words = [f"▁{w}" for w in (*BENCH_WORDS, "assistant", "user", "system")]
    # Every prefix of a word, because merges add one character at a time.
    pieces = sorted({w[:size] for w in words for size in range(1, len(w) + 1)} | set("".join(words)))
    # One character each, so that generated text tokenizes to the same tokens again.
    filler = [chr(c) for c in (*range(0x4E00, 0xA000), *range(0xAC00, 0xD7A4))][: vocabulary - 261 - len(pieces)]
    marks = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokens = [*marks, *(f"<0x{b:02X}>" for b in range(256)), *pieces, *filler]
    writer = start_model(raw, "llama", {
        "context_length": 8192, "embedding_length": width, "block_count": layers, "feed_forward_length": ffn, "head_count": 14,
        "head_count_kv": 2, "rope_dimension_count": width // 14, "layer_norm_rms_eps": 1e-6,
        "file_type": gguf.LlamaFileType.MOSTLY_F16, "tokenizer_model": "llama", "token_list": tokens,
        "token_scores": [0.0] * len(tokens), "bos_token_id": 1, "eos_token_id": 2,
        "token_types": [UNKNOWN, *[CONTROL] * 4, *[BYTE] * 256, *[NORMAL] * (len(tokens) - 261)],
    })  # fmt: skip

    def matrix(name: str, *shape: int) -> None:
        writer.add_tensor(name, (rng.standard_normal(shape, np.float32) * 0.02).astype(np.float16))

    matrix("token_embd.weight", len(tokens), width)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for b in (f"blk.{i}." for i in range(layers)):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{b}{norm}.weight", np.ones(width, np.float32))
        for name, rows, columns in (("attn_q", width, width), ("attn_k", 128, width), ("attn_v", 128, width),
                                    ("attn_output", width, width), ("ffn_gate", ffn, width), ("ffn_up", ffn, width),
                                    ("ffn_down", width, ffn)):  # fmt: skip
            matrix(f"{b}{name}.weight", rows, columns)
    finish(writer)
    hush_llama()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = 15  # LLAMA_FTYPE_MOSTLY_Q4_K_M
    assert llama_cpp.llama_model_quantize(str(raw).encode(), str(path).encode(), params) == 0
    raw.unlink()
    return path


def bare_loop(model: str, batch: int, prompt: int, tokens: int, threads: int) -> float:
    """Times one process that reads `batch` prompts and decodes `tokens` tokens of each, in seconds."""
    import llama_cpp as c

    hush_llama()
    module.Ggml(c.llama_cpp).leave_out([name for name, fault in (module.try_kernels() or {}).items() if fault])
    handle = c.llama_model_load_from_file(model.encode(), c.llama_model_default_params())
    params = c.llama_context_default_params()
    params.n_ctx = -(-batch * (prompt + tokens + 8) // 256) * 256
    params.n_batch = params.n_ubatch = 512
    params.n_seq_max = params.n_outputs_max = max(batch, 2)
    params.kv_unified = True
    params.n_threads = params.n_threads_batch = threads
    context = c.llama_init_from_model(handle, params)
    vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(handle))
    rows = c.llama_batch_init(512, 0, 1)
    known = np.random.default_rng(0).integers(3, vocabulary, (batch, prompt))

    def decode(entries: list[tuple[int, int, int, bool]]) -> np.ndarray:
        for i, (token, position, sequence, wanted) in enumerate(entries):
            rows.token[i], rows.pos[i], rows.n_seq_id[i], rows.seq_id[i][0], rows.logits[i] = token, position, 1, sequence, wanted
        rows.n_tokens = len(entries)
        assert c.llama_decode(context, rows) == 0
        return np.ctypeslib.as_array(c.llama_get_logits(context), (sum(e[3] for e in entries) or 1, vocabulary))

    decode([(int(known[0, 0]), 0, 0, True)])  # the first call allocates buffers
    c.llama_memory_clear(c.llama_get_memory(context), False)
    began, last = time.perf_counter(), np.zeros(batch, int)
    todo = [(int(known[s, p]), p, s, p == prompt - 1) for s in range(batch) for p in range(prompt)]
    for start in range(0, len(todo), 512):
        span = todo[start : start + 512]
        ended = [s for _, _, s, wanted in span if wanted]
        picked = decode(span).argmax(axis=1)
        last[ended] = picked[: len(ended)]
    for step in range(tokens - 1):
        last = decode([(int(last[s]), prompt + step, s, True) for s in range(batch)]).argmax(axis=1)
    return time.perf_counter() - began


def bench_prompt(words: int, salt: int) -> str:
    """Returns `words` random words; prompts with different salts share no prefix."""
    choose = random.Random(salt)
    return " ".join(choose.choice(BENCH_WORDS) for _ in range(words))


Done = TypeVar("Done")


class Streamed(NamedTuple):
    times: list[float]  # time of each event with text
    ended: float  # time of the last byte
    text: str
    usage: dict[str, int]


class BenchClient:
    """A cheap client on raw sockets; records event times and parses a response after its last byte."""

    def __init__(self, url: str, model: str, key: str = "") -> None:
        parts = urlsplit(url)
        self.address, self.model, self.key = (parts.hostname or "127.0.0.1", parts.port or 80), model, key

    def times(self, prompt: str, tokens: int, enough: Callable[[], bool]) -> Iterator[float]:
        """Yields the time of each event with text until the stream ends or `enough` returns true."""
        for chunk in self.post("/v1/completions", json.dumps(self.body(prompt, tokens)).encode()):
            if enough():
                return
            if b'"text": "' in chunk or b'"text":"' in chunk:
                yield time.perf_counter()

    def body(self, prompt: str | list[dict[str, str]], tokens: int) -> dict[str, Any]:
        return {"model": self.model, "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True,
                "stream_options": {"include_usage": True},
                "messages" if isinstance(prompt, list) else "prompt": prompt}  # fmt: skip

    def stream(self, prompt: str | list[dict[str, str]], tokens: int, **fields: Any) -> Streamed:
        """Streams one response and parses it afterwards, so that parsing does not count as the server's time."""
        chat = isinstance(prompt, list)
        times, data, body = list[float](), b"", json.dumps(self.body(prompt, tokens) | fields).encode()
        for chunk in self.post("/v1/chat/completions" if chat else "/v1/completions", body):
            data += chunk
            times += [time.perf_counter()] * (b'"text": "' in chunk or b'"text":"' in chunk or b'"content":' in chunk)
        ended = time.perf_counter()
        documents = [json.loads(line[6:]) for line in data.splitlines() if line.startswith(b"data: {")]
        if not documents or "error" in documents[-1] or b"[DONE]" not in data:
            head, _, answer = data.decode("utf-8", "replace").partition("\r\n\r\n")
            raise RuntimeError(f"{head.partition(chr(13))[0]}: {answer.strip()[:300]}")
        choices = [d["choices"][0] for d in documents if d.get("choices")]
        texts = [text for c in choices if (text := c.get("text") or c.get("delta", {}).get("content"))]
        usage = documents[-1].get("usage") or {"completion_tokens": len(texts)}  # not every server reports it
        return Streamed(times, ended, "".join(texts), usage)

    def post(self, path: str, body: bytes) -> Iterator[bytes]:
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
        head += f"Authorization: Bearer {self.key}\r\n" if self.key else ""
        with socket.create_connection(self.address) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            while chunk := connection.recv(65536):
                yield chunk

    def answers(self, chats: Iterable[bytes]) -> list[bytes]:
        """Sends chats one after another."""
        return [b"".join(self.post("/v1/chat/completions", body)) for body in chats]

    def first_token(self, prompt: str | list[dict[str, str]]) -> float:
        """Returns the seconds to the first text; in a chat, to the event after the role's."""
        began = time.perf_counter()
        times = self.stream(prompt, 2).times
        return times[min(isinstance(prompt, list), len(times) - 1)] - began

    def together(self, count: int, words: int, tokens: int, salt: int) -> float:
        """Returns the tokens per second of `count` concurrent clients, from the first request to the last byte."""
        prompts = [bench_prompt(words, salt * 1000 + i) for i in range(count)]
        with ThreadPoolExecutor(count) as pool:
            began = time.perf_counter()
            streams = list(pool.map(lambda p: self.stream(p, tokens), prompts))
        made = sum(s.usage["completion_tokens"] for s in streams)
        if made != count * tokens and "prompt_tokens" in streams[0].usage:
            raise RuntimeError(f"{count} clients asked for {tokens} tokens each and got {made} together")
        if made != count * tokens:
            print(f"{made} events counted as tokens where {count * tokens} were asked for", file=sys.stderr)
        return made / (max(s.ended for s in streams) - began)

    def constrained(self, count: int, tokens: int, salt: int, **fields: Any) -> tuple[float, float, int]:
        """Returns the tokens per second of `count` concurrent chats, seconds to the median first event, tokens of each."""
        chats = [[{"role": "user", "content": f"Write a record: {bench_prompt(8, salt * 1000 + i)}"}] for i in range(count)]
        with ThreadPoolExecutor(count) as pool:
            began = time.perf_counter()
            streams = list(pool.map(lambda chat: self.stream(chat, tokens, temperature=0.7, seed=salt, **fields), chats))
        made, ended = sum(s.usage["completion_tokens"] for s in streams), max(s.ended for s in streams)
        first = statistics.median(s.times[min(1, len(s.times) - 1)] if s.times else s.ended for s in streams)
        return made / (ended - began), first - began, made // count

    def gaps(self, words: int) -> dict[str, float]:
        """Measures two streams' gaps before and while a long prompt is read, and how long that prompt waits."""

        def first_text(salt: int) -> float:
            began = time.perf_counter()
            return self.stream(bench_prompt(words, salt), 2).times[0] - began

        alone = first_text(70)
        usual, worst, wait = self.beside(lambda: first_text(73))
        return {"usual_gap": usual, "worst_gap": worst, "alone": alone, "wait": wait}

    def beside(self, work: Callable[[], Done]) -> tuple[float, float, Done]:
        """Returns the usual gap of two streams before `work`, their worst one while it is done, and what it returned."""
        done, streams = threading.Event(), list[list[float]]([[], []])

        def run(number: int) -> None:
            for at in self.times(bench_prompt(16, 71 + number), 8000, done.is_set):
                streams[number].append(at)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        patience = time.perf_counter() + 30
        while min(map(len, streams)) < 48 and all(t.is_alive() for t in threads) and time.perf_counter() < patience:
            time.sleep(0.001)
        together, began = min(map(len, streams)) >= 48, time.perf_counter()
        try:
            if not together:
                raise RuntimeError("two do not stream at once")
            found, over = work(), time.perf_counter()
            if not all(t.is_alive() for t in threads):
                raise RuntimeError("the streams ended before what is measured beside them")
        finally:
            done.set()
            for thread in threads:
                thread.join()
        usual = statistics.median(b - a for stream in streams for a, b in itertools.pairwise(stream) if b < began)
        # Both streams are in every step, but one may print nothing while half a character is held back.
        shown = sorted(itertools.chain(*streams))
        return usual, max((b - a for a, b in itertools.pairwise(shown) if b > began and a < over), default=0.0), found


Bare: TypeAlias = Callable[[int], float]


class BenchTable:
    """Collects rows and prints them as they come: what, value, unit, and ratio to a named limit."""

    def __init__(self, as_json: bool) -> None:
        self.as_json, self.rows = as_json, dict[str, dict[str, Any]]()

    def add(self, what: str, value: float, unit: str, ratio: float | None = None, limit: str = "") -> float:
        self.rows[what] = {"value": round(value, 4), "unit": unit, "ratio": ratio and round(ratio, 3), "limit": limit}
        if not self.as_json:
            print(f"{what:<46} {value:>10.2f} {unit:<9} {f'{ratio:.2f} × {limit}' if ratio else ''}", flush=True)
        return value


def bench(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="test_shimmy.py bench", description="Measures this machine, or a server by its URL.")
    parser.add_argument("--url", help="an OpenAI-compatible server to measure instead of our own")
    parser.add_argument("--model", default="", help="a .gguf (made when absent), or with --url the model's name there")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
    parser.add_argument("--tokens", type=int, default=64, help="tokens each client asks for")
    parser.add_argument("--words", type=int, default=24, help="words of each client's prompt")
    parser.add_argument("--long", type=int, default=1200, help="words of the prompt that arrives while others stream")
    parser.add_argument("--key", default=os.environ.get("SHIMMY_API_KEY", ""), help="the server's API key")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=20, help="how long to repeat each measurement of speed")
    options = parser.parse_args(arguments)
    if options.url and not options.model:
        parser.error("--url needs --model NAME, as that server calls it")
    table = BenchTable(options.json)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # runs the `finally` that stops our server
    try:
        if options.url:
            bench_url(table, BenchClient(options.url, options.model, options.key), options, None)
        else:
            bench_own(table, options)
    except (RuntimeError, OSError) as error:
        sys.exit(f"bench: {error}")
    note = "Speeds and ratios are medians; a ratio is of runs side by side."
    print(json.dumps(table.rows, indent=2) if options.json else note)


def bench_own(table: BenchTable, options: argparse.Namespace) -> None:
    """Measures our own server: start, memory, and everything that bench_url measures."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shimmy-bench"
    model = Path(options.model).resolve() if options.model else cache / "half-billion.q4_k_m.gguf"
    if not model.exists():
        print(f"making {model} (a minute, once)", file=sys.stderr)
        write_bench_model(model)
    with tempfile.TemporaryDirectory() as home:
        began = time.perf_counter()
        flags = ["--threads", str(options.threads), "--cache-disk", "1G"]
        server = Server(Path(home), "--port", "0", "--model", model, *flags)
        server.get("/health")
        table.add("start to first /health", time.perf_counter() - began, "s", (time.perf_counter() - began) / python_start(),
                  "python -c 'import http.server, json, argparse'")  # fmt: skip
        try:
            idle = table.add("memory without a model", resident(server), "MB")
            client = BenchClient(f"http://127.0.0.1:{server.port}", "default")
            client.stream(bench_prompt(4, 1), 1)
            table.add("start to first token", time.perf_counter() - began, "s")
            loaded = table.add("memory with the model", resident(server), "MB")
            size = client.stream(bench_prompt(options.words, 2), 1).usage["prompt_tokens"]
            bench_url(table, client, options, lambda batch: batch * options.tokens / bare_seconds(model, batch, size, options))
            bench_hostile(table, client, options)
            server.unload("default")
            client.stream(bench_prompt(4, 1), 1)
            seconds = client.first_token(bench_prompt(400, 41))
            cold = table.rows["first token of a 400-word prompt, cold"]["value"]
            table.add("first token of it, after an unload", seconds, "s", seconds / cold, "cold")
            server.unload("default")
            kept = (resident(server) - idle) / max(loaded - idle, 1e-9)
            table.add("memory after unload", resident(server), "MB", kept or None, "what loading took is still there")
        finally:
            server.stop()


def bench_speed(table: BenchTable, client: BenchClient, options: argparse.Namespace, clients: int, bare: Bare | None) -> None:
    """Measures the tokens per second of `clients`, each run right after a bare loop; takes medians of up to 15 runs."""
    speeds, limits, batch, began = list[float](), list[float](), min(clients, 8), time.perf_counter()
    while not speeds or (time.perf_counter() - began < options.seconds and len(speeds) < 15):
        limits += [bare(batch)] if bare else []
        speeds.append(client.together(clients, options.words, options.tokens, clients * 100 + len(speeds)))
    if limits and f"bare loop, batch {batch}" not in table.rows:
        table.add(f"bare loop, batch {batch}", statistics.median(limits), "tokens/s")
    ratio = statistics.median(speed / limit for speed, limit in zip(speeds, limits, strict=True)) if limits else None
    what = f"HTTP, {clients} client{'s' * (clients > 1)}"
    table.add(what, statistics.median(speeds), "tokens/s", ratio, f"bare loop, batch {batch}")


def bench_url(table: BenchTable, client: BenchClient, options: argparse.Namespace, bare: Bare | None) -> None:
    """Measures what any server offers; `bare` measures the bare loop's tokens per second at a batch size, if available."""
    client.stream(bench_prompt(options.words, 3), 2)
    for clients in (1, 8, 32):
        bench_speed(table, client, options, clients, bare)
    for clients in (1, 8):
        for what, fields in BENCH_CONSTRAINTS.items():
            bench_constrained(table, client, options, clients, what, fields)
    try:
        bench_waits(table, client, options)
    except RuntimeError as error:  # the context may be too short for the long prompts
        print(f"not measured: {error}", file=sys.stderr)


def bench_constrained(table: BenchTable, client: BenchClient, options: argparse.Namespace, clients: int, what: str,
                      fields: dict[str, Any]) -> None:  # fmt: skip
    """Measures structured output, each run right before one of free text with as many tokens; takes medians."""
    rows, began, salt = list[tuple[float, float, float, float]](), time.perf_counter(), clients * 50
    client.constrained(1, BENCH_MOST, salt, **fields)  # the grammar is made
    offered = {k: v for k, v in fields.items() if k == "tools"}  # so that the prompts are as long
    while not rows or (time.perf_counter() - began < options.seconds and len(rows) < 15):
        salt += 2
        speed, first, made = client.constrained(clients, BENCH_MOST, salt, **fields)
        free, free_first, _ = client.constrained(clients, max(made, 1), salt + 1, **offered)
        rows.append((speed, speed / free, first, first / free_first))
    speed, ratio, first, later = (statistics.median(column) for column in zip(*rows, strict=True))
    whose = f"{clients} client{'s' * (clients > 1)}"
    table.add(f"{what}, {whose}", speed, "tokens/s", ratio, "free text")
    table.add(f"first token of {what}, {whose}", first, "s", later, "free text")


def bench_waits(table: BenchTable, client: BenchClient, options: argparse.Namespace) -> None:
    """Measures how long clients wait for first tokens, and for the next one while a long prompt is read."""
    prompt = bench_prompt(400, 41)
    cold = table.add("first token of a 400-word prompt, cold", client.first_token(prompt), "s")
    for what, again in {"again": prompt, "with another ending": f"{prompt} {bench_prompt(8, 42)}"}.items():
        seconds = client.first_token(again)
        table.add(f"first token of it, {what}", seconds, "s", seconds / cold, "cold")
    chat = [{"role": "user", "content": bench_prompt(400, 43)}]
    began = time.perf_counter()
    first = client.stream(chat, 8)
    cold = table.add("first token of a 400-word chat, cold", first.times[min(1, len(first.times) - 1)] - began, "s")
    seconds = client.first_token([*chat, {"role": "assistant", "content": first.text}, {"role": "user", "content": "time"}])
    table.add("first token of its second turn", seconds, "s", seconds / cold, "cold")
    gaps = client.gaps(options.long)
    table.add("usual gap of two streams", gaps["usual_gap"] * 1000, "ms")
    table.add(f"worst gap while {options.long} words arrive", gaps["worst_gap"] * 1000, "ms",
              gaps["worst_gap"] / gaps["usual_gap"], "usual gap")  # fmt: skip
    table.add("the newcomer's first token", gaps["wait"], "s", gaps["wait"] / gaps["alone"], "alone")


def bench_hostile(table: BenchTable, client: BenchClient, options: argparse.Namespace) -> None:
    """Measures two streams' worst gap while a third client sends hostile grammars, five beside each pair of streams."""
    chat = {"model": client.model, "messages": [{"role": "user", "content": "time"}], "max_tokens": 24, "seed": 1}
    bodies = [json.dumps({**chat, **fields}).encode() for fields in BENCH_HOSTILE]  # beside streams it would delay their clocks
    random.Random(0).shuffle(bodies)
    client.answers([json.dumps(chat).encode()])  # the prompt is read: what is measured are the grammars
    gaps, heads, began = list[tuple[float, float]](), list[bytes](), time.perf_counter()
    while bodies and (not gaps or time.perf_counter() - began < 5 * options.seconds):
        five, bodies = bodies[:5], bodies[5:]
        usual, worst, answers = client.beside(functools.partial(client.answers, five))
        gaps.append((worst / usual, worst))
        heads += [answer[:12] for answer in answers]
    refused, written = heads.count(b"HTTP/1.1 400"), heads.count(b"HTTP/1.1 200")
    if refused + written < len(heads):
        raise RuntimeError(f"hostile grammars were answered {sorted(set(heads))}")
    table.add("worst gap beside hostile grammars", max(gaps)[1] * 1000, "ms", max(gaps)[0], "usual gap")
    table.add("hostile grammars that are refused", refused, "requests", refused / len(heads), "all that were sent")
    table.add("hostile grammars that write", written, "requests", written / len(heads), "all that were sent")


def bare_seconds(model: Path, batch: int, prompt: int, options: argparse.Namespace) -> float:
    """Runs the bare loop in its own process."""
    numbers = map(str, (batch, prompt, options.tokens, options.threads))
    done = subprocess.run([sys.executable, __file__, "bare", str(model), *numbers], capture_output=True, text=True, check=True)
    return float(done.stdout)


def python_start() -> float:
    """Times the start of Python with the imports any server needs, in seconds."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import http.server, json, argparse"], check=True)
    return time.perf_counter() - began


def resident(server: Server) -> float:
    """Returns the resident memory of the server and its engines in MB."""
    return float(server.get("/diag").json()["memory"]["resident_bytes"]) / 1e6


if __name__ == "__main__":
    if sys.argv[1:2] == ["bench"]:
        bench(sys.argv[2:])
    elif sys.argv[1:2] == ["bare"]:
        print(bare_loop(sys.argv[2], *map(int, sys.argv[3:7])))
    elif sys.argv[1:2] == ["soak"]:
        sys.exit(soak(sys.argv[2:]))
    else:
        sys.exit("python test_shimmy.py bench|soak [--help]; the tests run with pytest")
