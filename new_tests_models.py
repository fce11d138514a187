from test_shimmy import *  # noqa

import importlib


# ---------------------------------------------------------------------------------------------------
# The making of the model in the box
# ---------------------------------------------------------------------------------------------------


def imported_from_models(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(REPO / "models")
    return importlib.import_module(name)


def test_training_text_is_the_same_for_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An intended change of models/text or models/generator records its new hash here."""
    generator = imported_from_models("generator", monkeypatch)
    rng = random.Random(generator.SEED)
    text = "".join(generator.conversation(rng).render() for _ in range(300))
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "1dc82e4a81f9132251dc93b9f2af98349c40dbf3ec0f3f65ac6100e7e8bbbcd6")


def test_evaluation_asks_the_same_questions_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shares in models/README.md are comparable only as long as this hash stays."""
    cases = imported_from_models("eval_tiny", monkeypatch).all_cases()
    asked = json.dumps([[case.category, case.messages, case.tools] for case in cases])
    assert hashlib.sha256(asked.encode()).hexdigest() == (
        "da88a38c3cbd96ad58472d99b6fb5524b4c52716ec8cbecfcb1f2ff6ff36f8d9")


def test_box_model_holds_the_chat_template_it_was_trained_with(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = imported_from_models("generator", monkeypatch)
    reader = gguf.GGUFReader(REPO / "models" / "shimmy-tiny.gguf")
    assert reader.fields["tokenizer.chat_template"].contents() == generator.CHAT_TEMPLATE
