"""What can be watched: health, readiness, metrics, the live snapshot, scores, tokens, the page."""

from __future__ import annotations

import json

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.waiting import PATIENCE


def samples(http) -> dict[tuple[str, str], float]:
    text = http.get("/metrics").text
    return {
        (one.name, one.labels.get("finished_reason", one.labels.get("le", ""))): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def test_health_and_readiness(http, server):
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
    server.app.state.services.draining = True
    try:
        answer = http.get("/ready")
        assert answer.status_code == 503
        assert "retry-after" in answer.headers
        assert http.get("/health").status_code == 200
        body = {"prompt": "x", "max_tokens": 2}
        assert http.post("/v1/completions", json=body).status_code == 503
    finally:
        server.app.state.services.draining = False


def test_metrics_count_what_was_done(http, idle):
    idle()
    before = samples(http)
    body = {"prompt": "the red dog", "max_tokens": 7, "ignore_eos": True, "temperature": 0}
    usage = http.post("/v1/completions", json=body).json()["usage"]
    http.post("/v1/score", json={"items": [{"text": "the red dog"}]})
    idle()
    after = samples(http)

    def grown(name: str, label: str = "") -> float:
        return after[(f"invivo:{name}", label)] - before[(f"invivo:{name}", label)]

    assert usage["completion_tokens"] == 7
    assert grown("request_success_total", "length") == 1
    assert grown("time_to_first_token_seconds_count") == 1
    assert grown("e2e_request_latency_seconds_count") == 2
    assert grown("inter_token_latency_seconds_count") == 6
    assert grown("generation_tokens_total") == 7
    assert grown("prompt_tokens_total") >= usage["prompt_tokens"]
    assert grown("score_tokens_total") > 0
    assert grown("prefix_cache_queries_total") >= 0
    assert after[("invivo:num_requests_running", "")] == 0
    assert after[("invivo:num_requests_waiting", "")] == 0
    assert 0 <= after[("invivo:kv_cache_usage_perc", "")] <= 1
    assert ("invivo:num_preemptions_total", "") in after
    assert ("invivo:prefix_cache_hits_total", "") in after
    infinite = after[("invivo:time_to_first_token_seconds_bucket", "+Inf")]
    assert infinite == after[("invivo:time_to_first_token_seconds_count", "")]


def test_the_live_snapshot_is_complete_and_private(http):
    http.post("/v1/completions", json={"prompt": "hello world", "max_tokens": 3})
    snapshot = http.get("/v1/live").json()
    assert snapshot["state"] == "ready"
    assert snapshot["model"]["name"] == "tiny"
    for part in ("time", "uptime", "adapters", "running", "waiting", "kv", "prefix", "totals"):
        assert part in snapshot
    assert set(snapshot["latency"]) >= {"window", "ttft", "itl", "e2e"}
    assert len(snapshot["tokens"]["seconds"]) == len(snapshot["tokens"]["decode"])
    assert snapshot["recent"][0]["output_tokens"] >= 1
    assert "hello world" not in json.dumps(snapshot)


def test_the_live_stream_comes_by_the_second(server):
    with httpx.stream("GET", f"{server.url}/v1/live/stream", timeout=PATIENCE) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        events = (line for line in stream.iter_lines() if line)
        first, second = (json.loads(next(events).removeprefix("data: ")) for _ in range(2))
    assert second["time"] > first["time"]


def test_scores_are_those_of_the_model(http, lm):
    body = {"items": [{"text": "the red dog"}, {"context": "the red", "text": " dog"}], "top": 2}
    answer = http.post("/v1/score", json=body).json()
    expected = lm.score(["the red dog", ("the red", " dog")], top=2)
    assert answer["usage"]["prompt_tokens"] > 0
    for one, score in zip(answer["data"], expected, strict=True):
        assert one["logprob"] == pytest.approx(score.logprob, abs=1e-4)
        assert one["perplexity"] == pytest.approx(score.perplexity, rel=1e-3)
        assert one["greedy"] == score.greedy
        assert [token["id"] for token in one["tokens"]] == [token.id for token in score.tokens]
        assert all(len(token["top"]) == 2 for token in one["tokens"])


def test_tokens_go_there_and_back(http, lm):
    answer = http.post("/tokenize", json={"text": "the cat ü"}).json()
    assert answer["tokens"] == lm.tokenize("the cat ü")
    assert answer["count"] == len(answer["tokens"])
    back = http.post("/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back == {"text": "the cat ü"}
    messages = [{"role": "user", "content": "hello"}]
    answer = http.post("/tokenize", json={"messages": messages}).json()
    assert answer["text"] == lm.apply_chat_template(messages)


def test_the_page_is_served_under_a_policy(http):
    page = http.get("/")
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert http.get("/static/index.html").status_code == 200
    assert http.get("/static/../server/app.py").status_code == 404
    assert http.get("/static/%2e%2e/server/app.py").status_code == 404
