"""The page in a real browser: a message typed, drafts coloured, the layers of a token shown, an error shown."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.servers import serving

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
PICTURES = os.environ.get("LAYERSKIP_PICTURES")  # a folder to look at what the tests saw


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: Any) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 390, "height": 800})  # a phone's
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(server.url)
    page.wait_for_function("document.getElementById('model').textContent === 'tiny'")
    yield page
    page.close()
    assert not faults


def send(page: Any, text: str) -> None:
    page.keyboard.type(text)  # the message has the focus from the start
    page.keyboard.press("Enter")
    page.wait_for_function("document.getElementById('send').textContent === 'Send' && document.querySelector('.token')")


def picture(page: Any, name: str) -> None:
    if PICTURES:
        page.screenshot(path=Path(PICTURES, f"{name}.png"))


def test_a_conversation_shows_its_drafts(page, server):
    send(page, "sort a list")
    picture(page, "page")
    text = page.locator("article.assistant").evaluate(
        "e => [...e.querySelectorAll('.token')].map(t => t.innerText).join('')"
    )
    body = dict(messages=[{"role": "user", "content": "sort a list"}], temperature=0, max_tokens=512)
    expected = server.post("/v1/chat/completions", **body).json()["choices"][0]["message"]["content"]
    assert text == expected != ""
    assert page.locator(".accepted.token").count() > 0
    assert "drafts accepted" in page.locator("#figures").inner_text()
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390  # nothing to scroll sideways
    page.uncheck("#drafts")
    assert page.locator("article .rejected").first.is_hidden()


def test_a_token_shows_its_layers(page, server):
    send(page, "sort a list")
    page.locator(".token").nth(2).focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog table")
    picture(page, "layers")
    assert page.locator("dialog tbody tr").count() == server.model.config.num_layers
    said = page.locator(".token").nth(2).evaluate("e => e.textContent")
    assert page.locator("dialog tbody tr").last.inner_text().split("\t")[1] == '"' + said.replace("\n", "\\n") + '"'
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()


def test_arrows_go_from_token_to_token(page):
    send(page, "sort a list")
    page.keyboard.press("Shift+Tab")  # one stop for a whole answer
    focused = "[...document.querySelectorAll('.token')].indexOf(document.activeElement)"
    assert page.evaluate(focused) == 0
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(focused) == 1
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "input"
    assert page.locator("#heard").inner_text().strip()  # a screen reader is told the answer once, at its end


def test_a_new_conversation_knows_nothing_of_the_last(page, server):
    page.keyboard.type("sort a list")
    page.keyboard.press("Enter")
    page.wait_for_selector(".token", state="attached")
    page.locator("#reset").click()  # in the middle of the answer
    page.wait_for_function("document.getElementById('send').textContent === 'Send'")
    with page.expect_request("**/v1/chat/completions") as asked:
        send(page, "def add(")
    assert asked.value.post_data_json["messages"] == [{"role": "user", "content": "def add("}]
    assert page.locator("article").count() == 2 and server.all_pages_free()


def test_an_error_is_shown(page):
    page.locator("#input").fill("word " * 3000)
    page.locator("#send").click()
    page.wait_for_selector("article.error")
    picture(page, "error")
    assert "positions" in page.locator("article.error").inner_text()
    box, form = page.locator("article.error").bounding_box(), page.locator("#form").bounding_box()
    assert 0 < box["y"] and box["y"] + box["height"] <= form["y"]  # in sight, not below the form
    assert page.locator("#input").input_value().startswith("word word")  # to be changed and sent again
    page.locator("#reset").click()
    assert page.locator("article").count() == 0


def test_a_model_without_a_template_continues_texts(browser, tiny_code):
    template, tiny_code.tokenizer.chat_template = tiny_code.tokenizer.chat_template, None
    try:
        with serving(tiny_code) as server:
            page = browser.new_page()
            page.goto(server.url)
            page.wait_for_function("document.getElementById('input').placeholder.includes('no chat template')")
            send(page, "def f(x):")
            assert page.locator(".token").count() > 5
            page.close()
    finally:
        tiny_code.tokenizer.chat_template = template
