#!/usr/bin/env python3
"""Trains shimmy-tiny.gguf from nothing: tokenizer, training, export and self-check.

    python models/make_tiny.py                  train and export (resumes where it was stopped)
    python models/make_tiny.py --show 5         print a few generated conversations
    python models/make_tiny.py --export-only    export and check the newest checkpoint

The text comes from the package `generator`, and is rendered through the chat template that goes into the file: in
training the model sees exactly what a server shows it later. Step n draws its text from a generator seeded by n, so a
resumed run continues with the text it would have seen.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from generator import SEED, Chat, conversation
    from tiny_export import check_export, export
    from tiny_model import Shape, Tiny, token_id, train_tokenizer
    from tokenizers import Tokenizer
    from torch import nn
except ImportError as missing:  # one line, not a traceback: these are development packages
    sys.exit(f"make_tiny.py needs the package {missing.name}: pip install torch==2.13.0 gguf tokenizers numpy jinja2")

HERE = Path(__file__).resolve().parent


# ── Batches ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Batches:
    """Cuts conversations into windows; a conversation that fits into what is left of a window is not cut."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.end = token_id(tokenizer, "<|endoftext|>")
        self.turn_end = token_id(tokenizer, "<|im_end|>")
        self.header = tokenizer.encode("<|im_start|>assistant\n").ids

    def encode(self, chat: Chat, rng: random.Random) -> tuple[list[int], list[float]]:
        """Tokens, and how much predicting each counts: 1 in the assistant's text; elsewhere half, for one in seven."""
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
        """Token ids and weights of one step; the same step always gives the same."""
        rng = random.Random(SEED * 1000003 + step)
        rows, width = (2, 2048) if step % 24 == 23 else (8, 512)
        windows = [self.window(rng, width) for _ in range(rows)]
        return np.array([ids for ids, _ in windows], np.int32), np.array([weights for _, weights in windows], np.float32)


def batches_ahead(tokenizer_path: Path, start: int, steps: int, ahead: int = 8) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the batches from `start` on; a second process makes them while this one trains."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=start_writer, initargs=(str(tokenizer_path),)) as writer:
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


# ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────────

STEPS = 4000
OTHER_WEIGHT, OTHER_SHARE = 0.5, 0.15
PEAK_RATE = 3e-3
WARM_UP = 150
TOKENS_PER_STEP = 4096
CHECKPOINT_SECONDS = 120


def optimizers_of(model: Tiny) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for embedding and norms.

    Muon adds a tenth to the time of a step, and is known to need fewer tokens than AdamW alone (not measured here).
    """
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    rest = [p for name, p in model.named_parameters() if p.dim() < 2 or name.startswith("embedding")]
    muon = torch.optim.Muon(matrices, lr=PEAK_RATE, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(rest, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [muon, adam]


def rate(step: int, steps: int) -> float:
    """The share of the peak rate at this step: a short rise, then half a cosine down to a hundredth."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - WARM_UP) / max(1, steps - WARM_UP))))


class Progress:
    """One line on stderr: redrawn on a terminal, else written every half minute."""

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
    """Chooses how many threads a step uses: all, or one for a while after a step that took far too long.

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
    """Makes glibc keep freed memory: without the page faults a step takes a quarter less time."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own from the kernel
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def fast_bfloat16() -> bool:
    """True if the CPU multiplies bfloat16 itself; others emulate it, slowly."""
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "avx512_bf16" in flags.read_text()


def save(path: Path, model: Tiny, optimizers: list[torch.optim.Optimizer], facts: dict[str, Any]) -> None:
    temporary = path.with_suffix(".part")
    torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], **facts}, temporary)
    os.replace(temporary, path)


def train_step(model: Tiny, batch: tuple[np.ndarray, np.ndarray], low_precision: bool) -> float:
    """Runs one forward and backward pass; returns the loss in the assistant's text."""
    ids, weights = torch.from_numpy(batch[0]).long(), torch.from_numpy(batch[1])[:, 1:]
    wanted = weights > 0  # the logits are a third of the work, so they are made only where they count
    weights = weights[wanted]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low_precision):
        logits = model(ids[:, :-1], wanted)
    losses = F.cross_entropy(logits.float(), ids[:, 1:][wanted], reduction="none")
    (losses @ weights / weights.sum()).backward()  # type: ignore[no-untyped-call]
    return float(losses.detach()[weights == 1.0].mean())


def update(optimizers: list[torch.optim.Optimizer], learning_rate: float) -> None:
    """Steps both optimizers at this rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()


def resume(path: Path, model: Tiny, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Loads the checkpoint if there is one; returns its step, seconds and loss."""
    if not path.exists():
        return {"step": 0, "seconds": 0.0, "loss": 0.0}
    facts: dict[str, Any] = torch.load(path)
    model.load_state_dict(facts.pop("model"))
    for optimizer, state in zip(optimizers, facts.pop("optimizers"), strict=True):
        optimizer.load_state_dict(state)
    return facts


def stop_signals() -> list[int]:
    """A list that Ctrl-C and SIGTERM append to, so that a checkpoint can be written before the exit."""
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda got, _frame: received.append(got))
    return received


def train(work: Path, steps: int, threads: int) -> None:
    """Trains up to `steps`, from the checkpoint in `work` if there is one."""
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
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps of {TOKENS_PER_STEP} tokens (default {STEPS})")
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
