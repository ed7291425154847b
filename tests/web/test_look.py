"""The panel that looks inside, in a real browser against a real server with a tiny model."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from tests.waiting import wait_for

from invivo.instruments.direct_attribution import direct_attribution
from invivo.instruments.logit_lens import logit_lens
from invivo.server.keys import KeyStore
from invivo.server.run import ServerThread
from invivo.server.settings import Settings

PROMPT = "the cat is red and the dog"


def looked(page: Any, prompt: str = PROMPT) -> Any:
    """The page after it has looked into ``prompt``."""
    page.wait_for_selector("#state[data-state=ready]")
    page.locator("button[data-view=look]:visible").click()
    page.fill("#look-prompt", prompt)
    page.click("#look-go")
    page.wait_for_selector("#heads tbody tr")
    page.wait_for_selector("#next-plain .alt")
    return page


@pytest.fixture
def page(open_page: Any) -> Any:
    return looked(open_page())


def visible(word: Any) -> str:
    """As the page writes a token."""
    return str(word).replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥") or "∅"


def cells(page: Any, table: str, row: int) -> list[str]:
    return page.locator(f"#{table} tbody tr").nth(row).locator("td").all_text_contents()


def test_maps_show_what_the_library_reads(page, lm):
    lens = logit_lens(lm, PROMPT)
    shown = [cells(page, "lens", row) for row in range(3)]
    assert shown == [[visible(w) for w in row] for row in lens.words[::-1, :, 0]]
    assert page.locator("#lens-sub").text_content() == f"{len(lens.tokens)} tokens"
    found = direct_attribution(lm, PROMPT)
    titles = page.locator("#heads .share").evaluate_all("all => all.map(one => one.title)")
    values = [float(t.split(": ")[1].replace("−", "-")) for t in titles]
    expected = np.concatenate([found.heads, found.mlp[:, None]], axis=1)[::-1].reshape(-1)
    np.testing.assert_allclose(values, expected, atol=2e-3)
    assert f"logit {found.logit:.1f}" in page.locator("#heads-sub").text_content()


def test_a_cell_tells_its_alternatives(page):
    page.locator("#lens tbody tr").nth(1).locator("td").nth(2).hover()
    assert page.locator("#tip .alt").count() == 5
    page.mouse.move(0, 0)
    assert page.locator("#tip").is_hidden()


def test_another_token_has_other_shares(page):
    before = page.locator("#heads .share").first.get_attribute("title")
    page.select_option("#heads-token", "3")
    assert page.locator("#heads .share").first.get_attribute("title") != before


def test_a_click_switches_a_layer_off_and_the_answers_stand_side_by_side(page, lm):
    assert page.locator("#answers .answer-box").last.is_hidden()
    page.locator("#lens .layer").first.click()  # the last layer
    page.wait_for_selector("#next-changed .alt")
    assert "layer 2 ×" in page.locator("#edits").text_content()
    sites = ["layers.2.attn.out", "layers.2.mlp.out"]
    edit = {"steps": [{"at": sites, "do": "scale", "a": 0}]}
    greedy = {"max_tokens": 24, "temperature": 0}
    changed = lm.generate(PROMPT, interventions=edit, **greedy).text.strip()
    assert page.locator("#answer-changed").text_content() == changed
    assert (
        page.locator("#answer-plain").text_content() == lm.generate(PROMPT, **greedy).text.strip()
    )
    # Scaled by one it is as it was.
    page.fill("#edits input", "1")
    page.press("#edits input", "Enter")
    wait_for(
        lambda: (
            page.locator("#answer-changed").text_content()
            == page.locator("#answer-plain").text_content()
        )
    )
    page.click("#edits .small-button")
    assert page.locator("#edits li").count() == 0
    wait_for(page.locator("#answers .answer-box").last.is_hidden)


def test_heads_are_switched_off_and_the_maps_drawn_with_that(page):
    before = cells(page, "lens", 0)
    page.locator('[title^="layer 0, head 1:"]').click()
    page.locator('[title^="layer 0, feed-forward:"]').click()
    page.locator('[title^="layer 0, head 1:"]').click()  # there already
    assert page.locator("#edits li").count() == 2
    page.locator("label:has(#look-edited)").click()
    title = page.locator('[title^="layer 0, head 1:"]')
    wait_for(lambda: title.get_attribute("title").endswith("0.000"))
    page.click("#edits-clear")
    wait_for(lambda: not title.get_attribute("title").endswith("0.000"))
    assert cells(page, "lens", 0) == before


def test_numbers_that_are_none_are_put_back(page):
    page.locator("#heads .share").first.click()
    page.fill("#edits input", "99")
    page.press("#edits input", "Enter")
    assert page.locator("#edits input").input_value() == "0"


def test_a_long_prompt_shows_its_end(open_page):
    page = looked(open_page(), "the cat " * 40)
    assert re.match(r"the last 48 of \d+ tokens", page.locator("#lens-sub").text_content())
    assert page.locator("#lens thead th").count() == 49


def test_a_message_is_asked_through_the_chat_template(page, lm):
    page.locator("label:has(#look-chat)").click()
    page.fill("#look-prompt", "the cat?")
    page.click("#look-go")
    chat = [{"role": "user", "content": "the cat?"}]
    answer = lm.chat(chat, max_tokens=24, temperature=0).text.strip()
    wait_for(lambda: page.locator("#answer-plain").text_content() == answer)
    lens = logit_lens(lm, chat, pos="@last")
    wait_for(lambda: cells(page, "lens", 0)[-1] == visible(lens.words[-1, 0, 0]))
    page.locator("#lens .layer").first.click()
    page.wait_for_selector("#next-changed .alt")


def test_phone_has_the_panel_as_a_view_of_its_own(open_page):
    page = looked(open_page(width=390, height=844, dark=True))
    assert page.locator("#chat").is_hidden()
    assert page.locator("#live").is_hidden()
    assert page.locator("#lens tbody td").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # Only the panel scrolls: nothing hangs out below the tabs.
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight")


def test_without_the_scope_it_says_what_is_missing(open_page, lm, tmp_path):
    url = f"sqlite:///{tmp_path / 'keys.sqlite3'}"
    secret, _ = KeyStore(url).add("screen", ["metrics", "generate"])
    settings = Settings(port=0, served_name="tiny", require_keys=True, database=url)
    with ServerThread(lm, settings) as locked:
        page = open_page(locked.url)
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key-form [name=key]", secret)
        page.press("#key-form [name=key]", "Enter")
        page.wait_for_selector("#state[data-state=ready]")
        page.locator("button[data-view=look]:visible").click()
        page.click("#look-go")
        page.wait_for_selector("#look-error:not([hidden])")
        assert "scope edit" in page.locator("#look-error").text_content()
        page.close()
    refused = ("status of 401", "status of 403")
    assert [p for p in open_page.problems if not any(r in p for r in refused)] == []
    open_page.problems.clear()
