"""The live page in a real browser, against a real server with a tiny model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.ports import kept_port
from tests.training.small_run import pretended
from tests.waiting import PATIENCE, held_after, held_until_cancelled, wait_for

from invivo.adapter_archive import unpacked
from invivo.lm_jobs import ENDED, Job
from invivo.local import LocalLM
from invivo.server.keys import KeyStore
from invivo.server.run import ServerThread
from invivo.server.settings import Settings


@pytest.fixture
def page(open_page: Any) -> Any:
    made = open_page()
    # Greedy: the tiny model then repeats itself and does not end by chance.
    made.click("#settings-open")
    made.fill("#temperature", "0")
    return made


def ask(page: Any, text: str, *, max_tokens: int) -> None:
    page.fill("#max-tokens", str(max_tokens))
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def answer_length(page: Any) -> int:
    return len(page.locator(".message.assistant .content").last.text_content())


def facts_of(page: Any) -> str:
    return page.locator("#job-facts").text_content()


def number(page: Any, selector: str) -> float:
    return float(re.sub(r"[^\d.]", "", page.locator(selector).text_content()) or 0)


def test_page_shows_the_model_and_its_state(page, lm):
    page.wait_for_selector("#state[data-state=ready]")
    assert page.locator("#model-name").text_content() == "tiny"
    assert "float32 · cpu · 8,192 token context" in page.locator("#model-facts").text_content()
    assert page.locator("#running").text_content() == "0"
    assert page.title() == "tiny · invivo"


def test_answer_grows_while_it_streams_and_the_counters_move(page, lm):
    page.wait_for_selector("#state[data-state=ready]")
    before, counters = number(page, "#decode-total"), lm.engine._counters
    page.evaluate(
        """window.lengths = new Set();
           new MutationObserver(() => {
             const answer = document.querySelector('.message.assistant .content');
             if (answer) window.lengths.add(answer.textContent.length);
           }).observe(document.body, {subtree: true, childList: true, characterData: true})"""
    )
    most, seen = counters.generated + 100, 0
    with held_after(lm.engine, 0, until=lambda: counters.generated < most):
        ask(page, "hello world", max_tokens=600)
        for _ in range(4):  # more is written when the page has shown some of what there is
            page.wait_for_function(
                "n => document.querySelector('.assistant .content')?.textContent.length > n",
                arg=seen,
            )
            seen, most = answer_length(page), most + 100
    meta = page.locator(".message.assistant .meta")
    wait_for(lambda: "600 tokens" in meta.text_content())
    assert page.evaluate("window.lengths.size") > 3, "the answer came in one piece"
    assert re.match(r"first token .+ · [\d.,k]+ tok/s · 600 tokens", meta.text_content())
    assert page.locator(".message.user").text_content() == "You: hello world"
    page.wait_for_selector("#send")
    wait_for(lambda: number(page, "#decode-total") >= before + 500)
    row = page.locator("#recent tbody tr").first
    wait_for(lambda: "length" in row.text_content())
    assert row.locator("td").nth(4).text_content() == "600"
    assert page.locator("#tokens-chart canvas").count() == 1
    page.wait_for_selector("#tokens-chart:not(.is-empty)")
    page.wait_for_selector("#ttft-chart:not(.is-empty)")


def test_next_message_carries_the_conversation(page):
    page.wait_for_selector("#state[data-state=ready]")
    sent = []
    page.on("request", lambda r: r.url.endswith("chat/completions") and sent.append(r.post_data))
    for text in ("the cat", "the dog"):
        ask(page, text, max_tokens=4)
        page.wait_for_selector("#send")
        wait_for(lambda: page.locator(".message .meta").last.text_content().count("tokens"))
    roles = [message["role"] for message in json.loads(sent[-1])["messages"]]
    assert roles == ["user", "assistant", "user"]
    page.click("#new-chat")
    assert page.locator(".message").count() == 0


def test_stop_cancels_the_request_in_the_engine(page, lm):
    page.wait_for_selector("#state[data-state=ready]")
    before = lm.stats()["totals"]["cancelled"]
    with held_until_cancelled(lm.engine):
        ask(page, "hello", max_tokens=7000)
        wait_for(lambda: answer_length(page) > 0)
        page.click("#stop")
        wait_for(lambda: lm.stats()["totals"]["cancelled"] == before + 1)
    wait_for(lambda: lm.stats()["running"] == 0)
    meta = page.locator(".message.assistant .meta").text_content()
    assert meta.endswith("stopped")
    assert page.locator("#send").is_visible()


def test_tokens_show_their_probability_and_the_alternatives(page):
    page.wait_for_selector("#state[data-state=ready]")
    page.locator("#composer .switch").click()
    ask(page, "the red dog", max_tokens=12)
    page.wait_for_selector("#send")
    spans = page.locator(".tokens span")
    wait_for(lambda: spans.count() > 3)
    spans.nth(2).hover()
    assert page.locator("#tip .alt").count() >= 5
    assert page.locator("#tip .alt.chosen").count() >= 1
    assert re.search(r"\d %$", page.locator("#tip .alt").first.text_content())
    page.mouse.move(0, 0)
    assert page.locator("#tip").is_hidden()
    page.locator(".tokens").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#tip").is_visible()
    page.locator("#composer .switch").click()
    assert spans.count() == 0


def test_refused_request_says_why_and_gives_the_text_back(page, open_page):
    page.wait_for_selector("#state[data-state=ready]")
    ask(page, "hello", max_tokens=90_000)
    alert = page.locator(".message .meta.error")
    alert.wait_for()
    assert "max_tokens" in alert.text_content()
    assert page.locator("#prompt").input_value() == "hello"
    # The browser itself logs the refused call; nothing else may have been logged.
    assert [p for p in open_page.problems if "status of 400" not in p] == []
    open_page.problems.clear()


def test_plain_text_is_continued_without_a_template(page):
    page.wait_for_selector("#state[data-state=ready]")
    page.select_option("#mode", "text")
    page.locator("#composer .switch").click()
    ask(page, "hello world the", max_tokens=8)
    wait_for(lambda: page.locator(".tokens span").count() >= 4)
    wait_for(lambda: "8 tokens" in page.locator(".message .meta").text_content())


def test_adapter_is_uploaded_used_and_unloaded(page, lm, adapter_files):
    page.wait_for_selector("#state[data-state=ready]")
    page.click("#adapter-open")
    page.fill("#adapter-form [name=name]", "poet")
    page.set_input_files("#adapter-form [name=files]", adapter_files)
    page.click("#adapter-form [type=submit]")
    page.wait_for_selector("#adapters li")
    assert "poet" in page.locator("#adapters").text_content()
    page.select_option("#adapter", "poet")
    ask(page, "the blue cat", max_tokens=5)
    wait_for(lambda: "poet" in page.locator("#recent tbody tr").first.text_content())
    with page.expect_download() as saved:
        page.click("#adapters [aria-label='Save poet']")
    assert saved.value.suggested_filename == "poet.zip"
    assert unpacked(Path(saved.value.path()).read_bytes())["adapter_model.safetensors"]
    page.click("#adapters [aria-label='Unload poet']")
    page.wait_for_selector("#adapters-empty")
    assert lm.adapters() == []
    assert page.locator("#adapter").input_value() == ""


def test_phone_shows_one_view_at_a_time_without_sideways_scrolling(open_page):
    page = open_page(width=390, height=844, dark=True)
    page.wait_for_selector("#state[data-state=ready]")
    assert page.locator("#live").is_visible()
    assert page.locator("#chat").is_hidden()
    page.click(".views [data-view=chat]")
    assert page.locator("#chat").is_visible()
    assert page.locator("#live").is_hidden()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_theme_is_chosen_and_remembered(open_page):
    page = open_page()
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.click("#theme")  # auto -> light
    assert page.evaluate(background) == light
    page.click("#theme")  # light -> dark
    dark = page.evaluate(background)
    assert dark != light
    page.reload()
    assert page.evaluate(background) == dark


def test_every_control_has_a_name(page):
    nameless = page.evaluate(
        """[...document.querySelectorAll('button, input, select, textarea, [role=meter]')]
           .filter(e => !(e.textContent.trim() || e.getAttribute('aria-label')
                          || e.title || e.labels?.length))
           .map(e => e.outerHTML)"""
    )
    assert nameless == []


def test_page_finds_the_server_again(browser, lm):
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(1000 * PATIENCE)
    with kept_port() as kept:
        settings = Settings(port=kept.getsockname()[1], served_name="tiny")
        with ServerThread(lm, settings) as first:
            page.goto(first.url)
            page.wait_for_selector("#state[data-state=ready]")
        page.wait_for_selector("#state[data-state=lost]")
        with ServerThread(lm, settings):
            page.wait_for_selector("#state[data-state=ready]")
    context.close()


def test_page_asks_for_a_key_where_one_is_needed(open_page, lm, tmp_path):
    url = f"sqlite:///{tmp_path / 'keys.sqlite3'}"
    secret, _ = KeyStore(url).add("screen", ["metrics", "generate"])
    settings = Settings(port=0, served_name="tiny", require_keys=True, database=url)
    with ServerThread(lm, settings) as locked:
        page = open_page(locked.url)
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key-form [name=key]", "wrong")
        page.press("#key-form [name=key]", "Enter")
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key-form [name=key]", secret)
        page.press("#key-form [name=key]", "Enter")
        page.wait_for_selector("#state[data-state=ready]")
        ask_plainly(page, "hello")
        page.reload()  # the tab remembers
        page.wait_for_selector("#state[data-state=ready]")
        page.close()
    assert [p for p in open_page.problems if "status of 401" not in p] == []
    open_page.problems.clear()


def ask_plainly(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    wait_for(lambda: "first token" in page.locator(".message .meta").text_content())


@pytest.fixture(scope="module")
def adapter_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A LoRA on the queries of every layer of the tiny model, in the peft library's format."""
    folder: Path = tmp_path_factory.mktemp("adapter")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 32, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(3):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, 32, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(32, 4, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    return [str(folder / "adapter_config.json"), str(folder / "adapter_model.safetensors")]


def lines_of(n: int) -> str:
    asked = {"role": "user", "content": "the cat"}
    answers = [f"the red dog sits on the mat {i}" for i in range(n)]
    chats = [[asked, {"role": "assistant", "content": answer}] for answer in answers]
    return "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)


@pytest.fixture
def long_job(lm: LocalLM, tmp_path: Path) -> Iterator[Job]:
    data = tmp_path / "dialogue.jsonl"
    data.write_text(lines_of(20))
    job = lm.finetune(data, name="long", steps=100_000, r=2, batch_size=1, checkpoint_every=0)
    yield job
    if job.status not in ENDED:
        job.cancel()
    job.wait()


def test_job_is_started_from_a_file_and_its_adapter_talks(page, lm, tmp_path):
    page.wait_for_selector("#state[data-state=ready]")
    data = tmp_path / "dialogue.jsonl"
    data.write_text(lines_of(12))
    page.click("#job-open")
    held = tmp_path / "held.jsonl"
    held.write_text(lines_of(2))
    page.set_input_files("#job-form [name=file]", data)
    page.set_input_files("#job-form [name=validation]", held)
    page.fill("#job-form [name=suffix]", "dreamer")
    page.fill("#job-form [name=r]", "2")
    page.fill("#job-form [name=steps]", "4")
    page.fill("#job-form [name=batch_size]", "2")
    page.uncheck("#job-form [value=q]")
    page.click("#job-form [type=submit]")
    page.wait_for_selector("#job-dialog:not([open])", state="attached")
    page.wait_for_selector("#job-list .tag.succeeded")
    assert "step 4 of 4" in page.locator("#job-list").text_content()
    wait_for(lambda: "on v, down · r 2" in page.locator("#job-facts").text_content())
    wait_for(lambda: "held-out loss" in page.locator("#job-facts").text_content())
    assert page.locator("#loss-chart canvas").count() == 1
    assert float(page.locator("#loss-legend b").first.text_content()) > 0
    assert page.locator("#job-cancel").is_hidden()
    page.click("#job-chat")
    assert page.locator("#adapter").input_value() == "dreamer"
    ask(page, "the cat", max_tokens=3)
    wait_for(lambda: "dreamer" in page.locator("#recent tbody tr").first.text_content())

    # The same adapter is learned further: the form asks for nothing that it says itself.
    page.click("#job-open")
    assert page.locator("#job-form [name=start] option").all_text_contents()[1:] == ["dreamer"]
    page.select_option("#job-form [name=start]", "dreamer")
    assert page.locator("#job-form [name=r]").is_hidden()
    page.set_input_files("#job-form [name=file]", data)
    page.fill("#job-form [name=suffix]", "waker")
    page.fill("#job-form [name=steps]", "2")
    page.click("#job-form [type=submit]")
    page.wait_for_selector("#job-dialog:not([open])", state="attached")
    wait_for(lambda: "dreamer further · lora · on v, down" in facts_of(page))
    wait_for(lambda: "waker" in [one.name for one in lm.adapters()])
    for name in ("dreamer", "waker"):
        lm.unload_adapter(name)


def test_bad_lines_of_a_file_are_named_in_the_form(page, tmp_path):
    page.wait_for_selector("#state[data-state=ready]")
    data = tmp_path / "bad.jsonl"
    data.write_text('{"messages": []}\n' + lines_of(1) + "not json\n")
    page.click("#job-open")
    page.set_input_files("#job-form [name=file]", data)
    page.click("#job-form [type=submit]")
    page.wait_for_selector("#job-problems li")
    told = page.locator("#job-problems li").all_text_contents()
    assert [text.split(":")[0] for text in told] == ["line 1", "line 3"]
    page.click("#job-dialog [data-close]")
    wait_for(lambda: "failed" in page.locator("#job-status").text_content())
    wait_for(lambda: "line 3" in page.locator("#job-error").text_content())
    assert page.locator("#loss-chart").is_hidden()


def test_form_shows_the_fields_of_its_method(page):
    page.click("#job-open")
    page.select_option("#job-form [name=method]", "ia3")
    assert page.locator("#job-form [name=r]").is_hidden()
    assert page.locator("#job-maps").is_visible()
    page.select_option("#job-form [name=method]", "prefix")
    assert page.locator("#job-size-name").text_content() == "Virtual tokens"
    assert page.locator("#job-maps").is_hidden()


def test_job_is_paused_resumed_and_cancelled_after_a_question(page, long_job):
    page.wait_for_selector("#state[data-state=ready]")
    page.click("#job-list li:has-text('long') button")
    page.wait_for_selector("#job-status.running")
    page.wait_for_selector("#loss-chart:not(.is-empty)")
    page.wait_for_selector("#tokens-chart:not(.is-empty)")
    wait_for(lambda: number(page, "#tokens-legend .key:nth-child(5) b") > 0)
    page.click("#job-pause")
    page.wait_for_selector("#job-status.paused")
    page.click("#job-resume")
    page.wait_for_selector("#job-status.running")
    page.click("#job-cancel")
    assert "of 100000 steps" in page.locator("#cancel-message").text_content()
    page.click("#cancel-dialog .small-button")
    assert long_job.status == "running"
    page.click("#job-cancel")
    page.click("#cancel-dialog .danger")
    page.wait_for_selector("#job-status.cancelled")
    assert long_job.status == "cancelled"


def test_objective_is_named_beside_the_latency_it_limits(page, lm):
    page.wait_for_selector("#state[data-state=ready]")
    wait_for(lambda: page.locator("#itl-legend .promise b").text_content() == "200 ms")
    assert page.locator("#ttft-legend .promise b").text_content() == "5.00 s"


def test_training_runs_appear_with_their_curve(open_page, lm, tmp_path):
    home = tmp_path / "runs"
    with ServerThread(lm, Settings(port=0, served_name="tiny", runs=home)) as server:
        page = open_page(server.url)
        page.wait_for_selector("#state[data-state=ready]")
        assert page.locator("#training-card").is_hidden()
        made = tmp_path / "made"
        pretended(made, "gla-small", 150, "running")
        pretended(made, "transformer", 200, "done")
        made.rename(home)  # all at once: the page may look at any moment
        page.wait_for_selector("#training-card:not([hidden])")
        page.click("#training-list button[data-run=gla-small]")
        line = page.locator("#training-list button[aria-current=true]")
        assert "gla-small" in line.text_content()
        assert "step 150 of 200 · loss 5.500" in line.text_content()
        facts = page.locator("#training-facts").text_content()
        assert "6.73M parameters" in facts
        assert "1.250 bits a byte of held-out text at step 150" in facts
        assert page.locator("#training-chart canvas").count() == 1
        page.wait_for_selector("#training-chart:not(.is-empty)")
        keys = page.locator("#training-legend .key:visible").all_text_contents()
        assert len(keys) == 3
        assert not any("held-out" in key for key in keys)  # bits a byte are no loss
        page.close()  # it would go on asking a server that is gone
