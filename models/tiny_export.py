"""Writes shimmy-tiny as GGUF, and checks that llama.cpp computes from the file what torch does."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from generator import CHAT_TEMPLATE, SEED, conversation
from tiny_model import CONTROL, MARKERS, Shape, Tiny, token_id
from tokenizers import Tokenizer

# ── Export ───────────────────────────────────────────────────────────────────────────────────────────────────────────

DESCRIPTION = (
    "A very small chat model, trained from nothing on text written by its own generator: a demonstration and test "
    "fixture for the shimmy server. It greets, answers questions about shimmy, tells short stories, gives small facts, "
    "writes simple JSON and calls tools. It knows nothing else."
)


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorders rows of q or k as llama.cpp wants them: the two of a rotated pair side by side, not half a head apart."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def tensors_of(model: Tiny) -> Iterator[tuple[str, np.ndarray]]:
    """The weights under llama.cpp's names; no output matrix, as it is the embedding."""
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
    """Writes the model as GGUF: matrices as Q8_0, or F32 to check the layout; norms as F32."""
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


# ── Self-check ───────────────────────────────────────────────────────────────────────────────────────────────────────


def llama_logits(path: Path, ids: list[int]) -> np.ndarray:
    """llama.cpp's logits at every position."""
    from llama_cpp import Llama

    engine = Llama(str(path), n_ctx=2048, logits_all=True, verbose=False)
    engine.eval(ids)
    return np.array(engine.scores[: len(ids)])


ODD_TEXTS = ["", " ", "\n\n", "a\tb", "  two  spaces ", "naïve café", "日本語", "🙂👍🏽", "ÀÉÎ", "It's I'LL we'Re", "x²=4½"]
ODD_TEXTS += ["\u00a0nbsp", "1234567890", "a\r\nb", "…—“”", "\x00\x7f", "\ud7ff\ue000"]
ODD_LETTERS = "abcXYZ019 .,!?'\"\n\t{}[]<>|/\\_-éßжあ🙂"


def check_tokens(path: Path, tokenizer: Tokenizer, texts: int = 2000) -> None:
    """Exits unless llama.cpp cuts every text, odd ones included, into the same tokens as training did."""
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
    """Exits unless logits of torch and llama.cpp agree: closely in F32, which proves the layout, roughly in Q8_0."""
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
