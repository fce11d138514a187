"""The tokenizer and the network of shimmy-tiny."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from generator import SEED, conversation
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

# ── Tokenizer ────────────────────────────────────────────────────────────────────────────────────────────────────────
# Byte-level BPE: every byte has a piece, so every text can be written. The pattern is llama.cpp's "qwen2": it splits
# numbers into single digits, without which they could not be copied.

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
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
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


# ── Model ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Shape:
    """A small llama architecture; all widths are multiples of 32, as Q8_0 needs."""

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
    """Applies rotary positions to the two halves of a head; the export's `interleaved` reorders them for llama.cpp."""
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
        angles = torch.outer(torch.arange(shape.context).float(), shape.rope_base ** (-torch.arange(half).float() / half))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = 0.02 / math.sqrt(2 * shape.layers) if "output" in name or "down" in name else 0.04
                nn.init.normal_(parameter, std=scale)

    def forward(self, ids: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Logits at every position, or only where the mask `wanted` is true."""
        x = self.embedding(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]  # type: ignore[index]
        for block in self.blocks:
            x = block(x, cos, sin)
        x = self.norm(x if wanted is None else x[wanted])
        logits: Tensor = x @ self.embedding.weight.T
        return logits
