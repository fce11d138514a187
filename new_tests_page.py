"""Tests of the chat page: what the server sends, and what headless Chromium makes of it (`make test-page`)."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from test_shimmy import (  # noqa: F401  (fixtures)
    HANG,
    LONG_CTX,
    REPO,
    VOCABULARY,
    Reply,
    Server,
    altered,
    cases,
    eventually,
    guarded,
    models,
    serve,
    server,
    tool_root,
    write_dice,
    write_header,
    write_recital,
)  # fmt: skip

# topic: the page as it is sent

HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def page_of(server: Server, method: str = "GET") -> Reply:
    return server.request(method, "/", None, HTML)


def inside(page: str, tag: str) -> str:
    (found,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S)
    return found


def test_page_policy_names_the_hashes_of_its_script_and_style(server: Server) -> None:
    reply = page_of(server)
    policy = dict(part.strip().split(" ", 1) for part in reply.headers["Content-Security-Policy"].split(";"))
    for directive, tag in (("script-src", "script"), ("style-src", "style")):
        digest = base64.b64encode(hashlib.sha256(inside(reply.body.decode(), tag).encode()).digest()).decode()
        assert policy[directive] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"


def test_page_has_no_inline_code_and_makes_no_html_of_text(server: Server) -> None:
    page = page_of(server).body.decode()
    markup = page.replace(inside(page, "script"), "").replace(inside(page, "style"), "")
    assert not re.search(r"\s(on\w+|style)\s*=|javascript:", markup)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|DOMParser|document\.write|\beval\b|\bFunction\(|srcdoc", page)
    assert not re.search(r"(src|href)=.?(https?:)?//", markup)  # nothing is fetched from elsewhere


def test_page_is_small_and_told_to_be_asked_for_anew(server: Server) -> None:
    reply = page_of(server)
    assert reply.status == 200 and len(reply.body) < 65536
    assert reply.headers["Content-Type"] == "text/html; charset=utf-8" and reply.headers["Cache-Control"] == "no-cache"
    assert reply.headers["X-Content-Type-Options"] == "nosniff" and reply.headers["Referrer-Policy"] == "no-referrer"


def test_page_answers_head_with_the_same_headers(server: Server) -> None:
    whole, head = page_of(server), page_of(server, "HEAD")
    assert head.status == 200 and head.body == b""
    own = {"Date", "X-Request-Id", "request-id"}
    assert all(head.headers[k] == v for k, v in whole.headers.items() if k not in own)


def test_page_needs_no_key(guarded: Server) -> None:
    assert page_of(guarded).status == 200 and guarded.get("/api/models").status == 401


def test_page_is_for_browsers_and_others_learn_who_is_here(server: Server) -> None:
    assert server.get("/").json()["server"] == "shimmy"
    assert page_of(server).headers["Vary"] == "Accept"


def test_serve_open_opens_the_page_in_the_browser(serve: Callable[..., Server], tmp_path: Path) -> None:
    browser = tmp_path / "browser.sh"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened.new && mv {tmp_path}/opened.new {tmp_path}/opened\n')
    browser.chmod(0o755)
    running = serve("--open", env={"BROWSER": f"{browser} %s"})
    opened = eventually(lambda: (tmp_path / "opened").exists() and (tmp_path / "opened").read_text(), "a browser")
    assert opened.strip() == f"http://127.0.0.1:{running.port}"


# topic: the page in a browser

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


def said(text: str, **more: Any) -> dict[str, Any]:
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
    assert it.titles() == ["hi"] and it.text("#state") == "loaded"


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


def test_page_shows_that_a_model_loads(
    tab: Callable[..., Tab], serve: Callable[..., Server], models: Path, tmp_path: Path
) -> None:
    load = '        pulses[0].begin("load")\n        llama ='
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


def test_page_server_that_is_gone_is_asked_again(tab: Callable[..., Tab], serve: Callable[..., Server], models: Path) -> None:
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


def test_page_answer_that_breaks_off_is_kept_and_says_so(
    tab: Callable[..., Tab], serve: Callable[..., Server], models: Path
) -> None:
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


def test_page_edit_asks_again_and_drops_what_followed(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.ask("hi")
    it.ask("unicode")
    it.page.locator("[aria-label='Edit and ask again']").first.click()
    it.page.fill("#box", "count")
    it.press("Enter")
    it.done()
    assert it.questions() == ["count"] and it.answer().startswith("w00 w01")


def test_page_answers_again_in_place_of_the_last_answer(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.ask("hi")
    with it.page.expect_request("**/v1/chat/completions") as sent:
        it.page.click("[aria-label='Answer again']")
    it.done()
    assert sent.value.post_data_json["messages"] == [{"role": "user", "content": "hi"}]
    assert it.page.locator(".answer").count() == 1


def test_page_copies_the_answer_as_it_was_written(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server, permissions=["clipboard-read", "clipboard-write"])
    it.load(talk("hi", said("**bold** `code`")))
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


@cases("text", {
    "no JSON": "hello", "another format": "{}", "a list": "[]", "no chats": '{"format": "shimmy-chats", "chats": 3}',
    "no turns": '{"format": "shimmy-chats", "chats": [{"title": "x"}]}', "null": "null",
})  # fmt: skip
def test_page_import_of_another_file_is_refused(text: str, tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.page.set_input_files("#imported", {"name": "other.json", "mimeType": "application/json", "buffer": text.encode()})
    it.wait("#notice", "other.json was not imported")
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


def test_page_runs_the_calculator_and_shows_the_call(tab: Callable[..., Tab], serve: Callable[..., Server]) -> None:
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


def test_page_with_the_tiny_model_alone_says_how_to_get_a_real_one(tab: Callable[..., Tab], serve: Callable[..., Server]) -> None:
    it = tab(serve("--models-dir", REPO / "models"))
    assert "python shimmy.py pull OWNER/REPO" in it.wait(".empty", "Only the tiny").inner_text()


DROP = """([name, type, data, event]) => {
  const moved = new DataTransfer();
  moved.items.add(new File([Uint8Array.from(data)], name, {type}));
  const more = event === "drop" ? {dataTransfer: moved} : {clipboardData: moved};
  box.dispatchEvent(new (event === "drop" ? DragEvent : ClipboardEvent)(event, {bubbles: true, cancelable: true, ...more}));
}"""


@cases("name, kind, data", {
    "image": ("cat.png", "image/png", b"\x89PNG\0\xff"), "binary": ("a.bin", "application/octet-stream", b"\x89\xff"),
    "large": ("a.txt", "text/plain", b"a" * 300_000),
})  # fmt: skip
@cases("event", {"dropped": "drop", "pasted": "paste"})
def test_page_refuses_files_kindly(
    event: str, name: str, kind: str, data: bytes, tab: Callable[..., Tab], server: Server
) -> None:
    it = tab(server)
    it.page.evaluate(DROP, [name, kind, list(data), event])
    it.wait("#notice", f"{name} cannot be read: the models here read text files of up to 200 kB")
    assert it.page.input_value("#box") == ""


def test_page_puts_a_dropped_text_file_into_the_box(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.page.evaluate(DROP, ["note.md", "text/markdown", list("é ```x```".encode()), "drop"])
    eventually(lambda: it.page.input_value("#box"), "text in the box")
    assert it.page.input_value("#box") == "note.md:\n\né ```x```\n"


# topic: the page and hostile text

HOSTILE = {
    "Hello": "<img src=x onerror=window.hacked=1>\n\n<script>window.hacked=1</script>\n",
    "▁wide": "[x](javascript:window.hacked=1) ![y](javascript:window.hacked=1) "
             "[z](data:text/html,<script>window.hacked=1</script>)\n",
    "▁world": "\n```html\n<svg/onload=window.hacked=1>\n```\n"
              "| <b onclick=window.hacked=1> |\n|---|\n| <iframe src=javascript:hacked=1> |\n",
}  # fmt: skip


def test_page_executes_nothing_of_a_hostile_answer(
    tab: Callable[..., Tab], serve: Callable[..., Server], tmp_path: Path
) -> None:
    write_recital(tmp_path / "models" / "recital.gguf", tokens=[HOSTILE.get(t, t).replace(" ", "▁") for t in VOCABULARY])
    it = tab(serve("--models-dir", tmp_path / "models", "--model", "recital"))
    text = it.ask("hi")
    assert "<img src=x onerror" in text and "javascript:" in text and "<svg/onload" in text
    assert it.page.evaluate("window.hacked") is None
    assert it.page.locator("#log").locator("img, script, iframe, b, a, svg[onload]").count() == 0


def test_page_executes_nothing_of_a_hostile_model_name(
    tab: Callable[..., Tab], serve: Callable[..., Server], tmp_path: Path
) -> None:
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
}  # fmt: skip


@cases("text, html", MARKDOWN)
def test_page_markdown(text: str, html: str, tab: Callable[..., Tab], server: Server) -> None:
    assert tab(server).markdown(text) == html


def test_page_links_open_elsewhere_and_tell_nothing(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    text = '[a](https://a.example/x_(y) "t") <https://b.example/> https://c.example/d. [e](mailto:e@f.example)'
    it.load(talk("hi", said(text)))
    it.page.click("#chats .open")
    links = it.page.locator(".md a").evaluate_all("all => all.map(a => [a.href, a.rel, a.target])")
    assert [href for href, _, _ in links] == [
        "https://a.example/x_(y)", "https://b.example/", "https://c.example/d", "mailto:e@f.example"]  # fmt: skip
    assert {(rel, target) for _, rel, target in links} == {("noopener noreferrer", "_blank")}


def test_page_table_and_code(tab: Callable[..., Tab], server: Server) -> None:
    it = tab(server)
    it.load(talk("hi", said("| a | b |\n|:-:|--:|\n| `x` | 1 |\n\n```python\nif x:\n    y\n```\n\n~~~\nz")))
    it.page.click("#chats .open")
    assert it.page.locator("th, td").all_inner_texts() == ["a", "b", "x", "1"]
    assert it.page.locator(".code pre").all_text_contents() == ["if x:\n    y", "z"]
    assert it.page.locator(".code span").all_inner_texts() == ["python", "text"]


BOMBS = {
    "quotes": "> " * 50_000, "lists": "- " * 50_000, "numbers": "1. " * 50_000, "stars": "*" * 100_000,
    "openers": "**a " * 50_000, "pairs": "*a **b " * 20_000, "brackets": "[" * 100_000, "links": "[a](b" * 30_000,
    "ticks": "".join("`" * n + "a" for n in range(1, 600)), "underscores": "_a_" * 40_000, "tables": "|-" * 50_000,
    "table rows": "|a|\n|-|\n" + "|\n" * 20_000, "blanks": " " * 100_000 + "x", "fences": "```\n" * 30_000,
    "indents": "\n".join(" " * n + "- a" for n in range(1000)), "parentheses": "[a](" + "(" * 50_000,
    "fence marks": "~" * 100_000 + "`", "languages": "```" + "a" * 100_000 + "`", "spaces": "[a](" + " " * 100_000,
    "full stops": "https://a" + "." * 100_000 + "b", "rules": "- " * 3 + " " * 50_000 + "x", "addresses": "https://" * 20_000,
    "stairs": "\n".join(">" * n for n in range(1000)),
}  # fmt: skip


@cases("bomb", BOMBS)
def test_page_markdown_bombs_are_shown_like_any_text(bomb: str, tab: Callable[..., Tab], server: Server) -> None:
    deepest = """text => {
      const drawn = make("div");
      drawMarkdown(drawn, text);
      const depth = e => { let n = 0; for (; e !== drawn; e = e.parentElement) n++; return n; };
      return Math.max(...[...drawn.querySelectorAll("*")].map(depth));
    }"""
    assert tab(server).page.evaluate(deepest, bomb) < 30


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


# topic: the page for everybody

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
    for _ in range(13):
        it.press("Tab")
        seen.append(it.page.evaluate("(e => e.id || e.getAttribute('aria-label') || e.textContent)(document.activeElement)"))
        assert it.page.evaluate("document.activeElement.matches(':focus-visible')"), seen
    assert seen == [
        "new", "hi", "Delete hi", "export", "import", "model", "tune", "log", "Copy the question", "Edit and ask again",
        "Copy the answer", "Answer again", "box"]  # fmt: skip


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
    it.load(talk("a\n" * 60, said("b\n\n" * 60)))
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
