"""The status page in a real browser."""

from __future__ import annotations

import re
import shutil

import pytest
from serving import ANSWER, ScriptedEngine, app_of, listening

from kvcli.server.served import Settings

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]


@pytest.fixture
def page():
    """A tab whose console must stay clean."""
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.set_default_timeout(120_000)
        said: list[str] = []
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        yield tab
        browser.close()
    assert [x for x in said if not re.search("status of (401|429|503)", x)] == []  # which the tests bring about


def test_state_and_a_conversation(page):
    engine = ScriptedEngine()
    with listening(app_of(engine)) as url:
        page.goto(url)
        playwright.expect(page.locator("#model")).to_have_text("scripted")
        playwright.expect(page.locator("#state")).to_have_text("ready")
        playwright.expect(page.locator("#effective_bits")).to_have_text("3.210")
        playwright.expect(page.locator("#pages")).to_have_text("0 of 100")
        playwright.expect(page.locator("#mode")).to_have_value("chat")
        page.fill("#prompt", "<script>alert(1)</script>")
        engine.answer = "<img src=x onerror=alert(1)> " + ANSWER
        page.click("#send")
        playwright.expect(page.locator("#answer")).to_have_text(engine.answer)
        playwright.expect(page.locator("#note")).to_contain_text(f"{len(engine.answer)} out")
        assert page.locator("#answer img").count() == 0
        page.select_option("#mode", "completion")
        page.fill("#max_tokens", "4")
        page.click("#send")
        playwright.expect(page.locator("#answer")).to_have_text(engine.answer[:4])
        engine.full = True
        page.click("#send")
        playwright.expect(page.locator("#note")).to_contain_text("the queue is full")
        engine.failed = RuntimeError("broken")
        playwright.expect(page.locator("#state")).to_have_text("failed")


def test_stopping_frees_the_engine(page):
    engine = ScriptedEngine(step_seconds=0.05, answer="x" * 10_000)
    with listening(app_of(engine)) as url:
        page.goto(url)
        page.click("#send")
        playwright.expect(page.locator("#answer")).to_contain_text("xx")
        playwright.expect(page.locator("#running_sequences")).to_have_text("1")
        page.click("#stop")
        playwright.expect(page.locator("#note")).to_have_text("stopped")
        playwright.expect(page.locator("#running_sequences")).to_have_text("0")
    assert engine.aborted


def test_a_key_is_asked_for(page):
    with listening(app_of(ScriptedEngine(), Settings(api_key="right"), template=None)) as url:
        page.goto(url)
        page.click("#send")
        playwright.expect(page.locator("#note")).to_contain_text("Missing API key")
        page.fill("#key", "right")
        page.click("#send")
        playwright.expect(page.locator("#answer")).to_have_text(ANSWER)
        playwright.expect(page.locator("#model")).to_have_text("scripted")
