"""Embeddings and reranking. The functions move into test_shimmy.py unchanged."""

# ruff: noqa: F405

from __future__ import annotations

import base64
import math

from test_shimmy import *  # noqa: F403

# ── Embeddings ────────────────────────────────────────────────────────────────────────────────────────────────────────
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
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(str(path), "bert")
        writer.add_context_length(BERT_CONTEXT)
        writer.add_embedding_length(BERT_WIDTH)
        writer.add_block_count(BERT_LAYERS)
        writer.add_feed_forward_length(96)
        writer.add_head_count(BERT_HEADS)
        writer.add_layer_norm_eps(BERT_EPS)
        writer.add_causal_attention(False)
        writer.add_uint32("bert.pooling_type", pooling)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_tokenizer_model("bert")
        writer.add_token_list([*BERT_SPECIALS, *(f"▁{word}" for word in BERT_WORDS)])
        writer.add_token_types([CONTROL] * 5 + [NORMAL] * 100)
        for name, token in (("unknown", 1), ("cls", CLS), ("bos", CLS), ("seperator", SEP), ("padding", 0), ("mask", 4)):
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
        writer.add_token_type_count(2)
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


@pytest.fixture(scope="module")
def embedding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a BERT, a reranker, one whose output is not a number, and models that generate; recital is default."""
    folder = tmp_path_factory.mktemp("embedding")
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
    running = Server(tmp_path_factory.mktemp("embedding-home"), "--port", "0", "--models-dir", folder, "--model", "recital",
                     "--max-loaded", "12", "--ctx", str(LONG_CTX))  # fmt: skip
    yield running
    running.stop()


TEXTS_TO_EMBED = [words(*range(n % 7, n % 7 + n)) for n in (1, 2, 9, 40, 3, 90, 1, 17)]


def test_vectors_are_those_of_the_forward_pass(embedding: Server) -> None:
    found = vectors(embed(embedding, TEXTS_TO_EMBED))
    wanted = np.array([BERT.vector([CLS, *ids_of(text), SEP]) for text in TEXTS_TO_EMBED])
    assert (found * wanted).sum(1).min() > 0.9999
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_vectors_follow_the_models_own_pooling(embedding: Server) -> None:
    (found,) = vectors(embed(embedding, words(1, 2, 3), "bert-first"))
    first = BERT.states([CLS, *ids_of(words(1, 2, 3)), SEP])[0]
    assert found @ first / np.linalg.norm(first) > 0.9999


def test_usage_counts_the_tokens_of_all_inputs(embedding: Server) -> None:
    reply = embed(embedding, [words(1), words(1, 2, 3)]).json()
    assert reply["usage"] == {"prompt_tokens": 3 + 5, "total_tokens": 3 + 5}
    assert reply["model"] == "bert"


ALL_EMBEDDERS = ["bert", "bert-first", "recital", *(f"kind-{kind}" for kind in KINDS)]


@pytest.mark.parametrize("model", ALL_EMBEDDERS)
def test_many_inputs_give_what_each_gives_alone(embedding: Server, model: str) -> None:
    inputs = [ids_of(words(n % 9, n % 31, *range(n % 50))) for n in range(60)]
    together = vectors(embed(embedding, inputs, model))
    alone = np.array([vectors(embed(embedding, ids, model))[0] for ids in inputs[::10]])
    assert (together[::10] * alone).sum(1).min() > 0.9999
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_same_input_gives_the_same_vector(embedding: Server) -> None:
    assert embed(embedding, words(4, 5)).body == embed(embedding, words(4, 5)).body


def test_most_inputs_that_openai_takes_are_taken(embedding: Server) -> None:
    texts = [words(n % 100, n // 100) for n in range(2048)]
    found = vectors(embed(embedding, texts))
    for n in (0, 1, 777, 2047):
        assert found[n] @ BERT.vector([CLS, *ids_of(texts[n]), SEP]) > 0.9999


def test_token_ids_are_taken_as_they_are(embedding: Server) -> None:
    ids = [CLS, *ids_of(words(7, 8)), SEP]
    (text,) = vectors(embed(embedding, words(7, 8)))
    assert np.allclose(vectors(embed(embedding, ids)), text, atol=1e-6)
    assert np.allclose(vectors(embed(embedding, [ids, ids])), text, atol=1e-6)


@pytest.mark.parametrize("model", ["bert", "recital"])
def test_token_ids_of_another_vocabulary_are_refused(embedding: Server, model: str) -> None:
    reply = embed(embedding, [[5, 6], [5, 100257]], model)
    error = assert_error(reply, 400, "invalid_request", "input[1]", "100257", "send text")
    assert (error["param"], error["type"]) == ("input", "invalid_request_error")


def test_base64_holds_the_same_numbers(embedding: Server) -> None:
    texts = [words(1, 2), words(3)]
    packed = embed(embedding, texts, encoding_format="base64").json()["data"]
    unpacked = np.array([np.frombuffer(base64.b64decode(d["embedding"]), "<f4") for d in packed])
    assert (unpacked == vectors(embed(embedding, texts)).astype(np.float32)).all()


def test_openai_client_reads_vectors(embedding: Server) -> None:
    reply = embedding.client().embeddings.create(model="bert", input=[words(1, 2), words(3)])
    assert np.allclose([d.embedding for d in reply.data], vectors(embed(embedding, [words(1, 2), words(3)])), atol=1e-6)
    assert (reply.usage.prompt_tokens, reply.object) == (7, "list")


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
    "object": {"text": "x"}, "true": [True], "text and tokens": ["w011", [5]], "nested text": [["w011"]],
    "fractions": [[1.5]], "too many": ["w011"] * 2049, "null among others": ["w011", None],
}  # fmt: skip


@cases("input", INPUTS_REFUSED)
def test_malformed_input_is_refused(embedding: Server, input: Any) -> None:
    error = assert_error(embed(embedding, input), 400, "invalid_request", "input")
    assert (error["param"], error["type"]) == ("input", "invalid_request_error")


def test_encoding_nobody_knows_is_refused(embedding: Server) -> None:
    error = assert_error(embed(embedding, "w011", encoding_format="int8"), 400, "invalid_request", "float", "base64", "int8")
    assert error["param"] == "encoding_format"


def test_unused_fields_of_openai_are_ignored(embedding: Server) -> None:
    assert embed(embedding, "w011", user="me", stream=True, dimensions=None, encoding_format=None).status == 200


@cases("model, size", {"looks both ways": ("bert", 600), "reads on": ("kind-llama", 512)})
def test_input_as_long_as_the_context_is_read_to_its_end(embedding: Server, model: str, size: int) -> None:
    ids = [5 + n % 100 for n in range(size - 1)]
    one, other, again = vectors(embed(embedding, [[*ids, 50], [*ids, 51], [*ids, 50]], model))
    assert np.allclose(one, again, atol=1e-5) and not np.allclose(one, other, atol=1e-5)
    if model == "bert":
        assert one @ BERT.vector([*ids, 50]) > 0.9999


@cases("model, size", {"looks both ways": ("bert", 600), "reads on": ("kind-llama", 512)})
def test_input_longer_than_the_context_is_refused_with_both_numbers(embedding: Server, model: str, size: int) -> None:
    reply = embed(embedding, [[5], [5] * (size + 1)], model)
    error = assert_error(reply, 400, "context_length_exceeded", "input[1]", str(size), str(size + 1))
    assert (error["param"], error["type"]) == ("input", "invalid_request_error")


def test_text_far_longer_than_the_context_is_refused(embedding: Server) -> None:
    assert_error(embed(embedding, "w011 " * 500_000), 400, "context_length_exceeded", "input[0]", "600")


def test_slices_of_any_size_give_the_same_vector(embedding: Server, serve: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    write_kind(tmp_path / "models" / "kind-llama.gguf", "llama")
    slicing = serve("--models-dir", tmp_path / "models", "--batch", "64")
    inputs = [[5 + (n * k) % 250 for n in range(400)] for k in (1, 3, 7)]
    found, wanted = vectors(embed(slicing, inputs, "kind-llama")), vectors(embed(embedding, inputs, "kind-llama"))
    assert (found * wanted).sum(1).min() > 0.9999


def test_last_tokens_of_all_beginnings_make_the_mean(
    embedding: Server, serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pooled by the last token, as Qwen3-Embedding is. States here are of one length, so their mean is the mean's direction."""
    plain = KIND_METADATA["llama"]

    def with_pooling(writer: gguf.GGUFWriter, kv_heads: int) -> None:
        plain(writer, kv_heads)
        writer.add_uint32("llama.pooling_type", 3)

    monkeypatch.setitem(KIND_METADATA, "llama", with_pooling)
    write_kind(tmp_path / "last.gguf", "llama")
    server = serve("--models-dir", tmp_path, "--batch", "64")
    ids = [5 + (7 * n) % 250 for n in range(150)]
    mean = vectors(embed(server, [ids[:n] for n in range(1, 151)], "last")).mean(0)
    (wanted,) = vectors(embed(embedding, ids, "kind-llama"))
    assert mean @ wanted / np.linalg.norm(mean) > 0.9999


def test_absent_model_is_the_default_which_embeds_by_mean(embedding: Server) -> None:
    reply = embedding.post("/v1/embeddings", {"input": "hello"})
    assert reply.json()["model"] == "recital"
    # a recital's states are one-hot, for its layers add nothing: the mean tells which tokens were there
    assert np.count_nonzero(vectors(reply)[0] > 0.1) == len(set("hello")) + 1


def test_embeddings_work_without_v1(embedding: Server) -> None:
    assert embedding.post("/embeddings", {"model": "bert", "input": "w011"}).status == 200


def test_model_that_generates_embeds_and_generates_on(embedding: Server) -> None:
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


def test_broken_decode_fails_its_requests_alone(serve: Callable[..., Server], tmp_path: Path) -> None:
    BERT.write(tmp_path / "models" / "bert.gguf")
    decode = "        status = self._decode(context, plan)\n"
    script = altered(tmp_path, (decode, decode.replace("self", "-3 if len(plan) == 7 else self")))
    server = serve("--models-dir", tmp_path / "models", script=script)
    assert_error(embed(server, ["w011"] * 7), 500, "generation_failed", "-3")
    assert vectors(embed(server, ["w011"] * 8)).shape == (8, BERT_WIDTH)


def test_context_without_memory_for_it_is_refused(serve: Callable[..., Server], tmp_path: Path) -> None:
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


def test_embedding_model_loads_and_unloads_by_itself(embedding: Server) -> None:
    assert embedding.load("bert-first").json()["status"] == "loaded"
    assert embedding.unload("bert-first").json()["status"] == "unloaded"


def test_prompt_for_an_embedding_model_is_refused_though_it_is_loaded(embedding: Server) -> None:
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
def test_use_that_a_model_is_not_made_for_is_refused(
    embedding: Server, path: str, model: str, words_: Seq[str]
) -> None:
    body = {"model": model, "input": "x", "prompt": "x", "query": "x", "documents": ["x"]}
    before = embedding.status(model)["status"]
    error = assert_error(embedding.post(path, body), 400, "invalid_request", model, *words_)
    assert (error["param"], embedding.status(model)["status"]) == ("model", before)


DOCUMENTS = [words(n, 2 * n, 3 * n) for n in range(30)]


def test_rerank_puts_the_best_document_first(embedding: Server) -> None:
    reply = rerank(embedding, DOCUMENTS).json()
    scores = np.array([BERT.score(ids_of("w011 w012"), ids_of(d)) for d in DOCUMENTS])
    results = reply["results"]
    assert [r["index"] for r in results] == list(np.argsort(-scores))
    assert np.allclose([r["relevance_score"] for r in results], scores[[r["index"] for r in results]], atol=1e-3)
    assert all(r["document"] == {"text": DOCUMENTS[r["index"]]} for r in results)
    assert (reply["model"], reply["usage"]) == ("reranker", {"prompt_tokens": 30 * 8, "total_tokens": 30 * 8})


def test_rerank_takes_objects_and_gives_the_best_few_without_text(embedding: Server) -> None:
    whole = rerank(embedding, DOCUMENTS).json()["results"]
    few = rerank(embedding, [{"text": d} for d in DOCUMENTS], top_n=3, return_documents=False).json()["results"]
    assert few == [{"index": r["index"], "relevance_score": r["relevance_score"]} for r in whole[:3]]
    assert len(rerank(embedding, DOCUMENTS, top_n=99).json()["results"]) == 30


@pytest.mark.parametrize("path", ["/rerank", "/v1/reranking", "/reranking"])
def test_rerank_has_its_other_names(embedding: Server, path: str) -> None:
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


RERANK_TEMPLATE = "[CLS] w020 {query} w021 [SEP] {document} w022 [SEP]"


def test_rerank_uses_the_models_own_template(serve: Callable[..., Server], tmp_path: Path) -> None:
    BERT.write(tmp_path / "models" / "reranker.gguf", pooling=4, template=RERANK_TEMPLATE)
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
def test_vectors_agree_with_the_reference(serve: Callable[..., Server]) -> None:
    """50 texts of one word to 256 tokens in five languages: all-MiniLM-L6-v2 as transformers computes it."""
    reference = json.loads(Path(os.environ["SHIMMY_TEST_REFERENCE"]).read_text())
    model = Path(os.environ["SHIMMY_TEST_EMBEDDER"])
    server = serve("--models-dir", model.parent, "--model", model)
    found = vectors(server.post("/v1/embeddings", {"input": [row["text"] for row in reference]}))
    cosines = (found * np.array([row["vector"] for row in reference])).sum(1)
    assert len(reference) == 50 and len({row["language"] for row in reference}) == 5
    assert cosines.min() >= 0.999, sorted(cosines)[:5]
