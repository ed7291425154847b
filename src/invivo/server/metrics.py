"""GET /metrics for Prometheus: names as vLLM's where the meaning is the same, prefix ``invivo:``.

Everything is read from the LM's statistics at the moment of the scrape; only requests that never
reach the engine are counted here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from invivo.server.auth import Principal, needs
from invivo.server.documents import failures
from invivo.server.services import Services

router = APIRouter(tags=["watch"])

_HISTOGRAMS = {
    "ttft": ("time_to_first_token_seconds", "From arrival to the first token"),
    "itl": ("inter_token_latency_seconds", "Between two tokens of one sequence"),
    "e2e": ("e2e_request_latency_seconds", "From arrival to the last token"),
    "queue": ("request_queue_time_seconds", "From arrival to the first step"),
}
_TOKENS = {
    "prompt": ("prompt_tokens", "Tokens of prompts, found in the cache or computed"),
    "generated": ("generation_tokens", "Tokens generated"),
    "prefill": ("prefill_tokens", "Prompt tokens computed, after preemptions again"),
    "score": ("score_tokens", "Tokens scored or embedded"),
}
_JOB_LIVE = ("queued", "running", "paused", "finishing")
_JOB_STATES = (*_JOB_LIVE, "succeeded", "failed", "cancelled")
_JOB_GAUGES = (
    ("loss", "loss", "Mean loss per learned token of a job's last step"),
    ("step", "step", "Optimizer steps that a job has done"),
    ("steps", "steps", "Optimizer steps that a job has in all"),
    ("adapter_version", "version", "Newest version that a job has published"),
    ("restarts", "restarts", "Texts of a job that began anew"),
)


@router.get(
    "/metrics",
    response_class=Response,
    responses=failures() | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def metrics(
    request: Request, _principal: Annotated[Principal, Depends(needs("metrics"))]
) -> PlainTextResponse:
    """The text format of Prometheus."""
    text = generate_latest(request.app.state.registry)
    return PlainTextResponse(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)


def make_registry(services: Services) -> CollectorRegistry:
    """A registry of its own for one application."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(EngineCollector(services))
    return registry


class EngineCollector(Collector):
    """Renames the statistics of one LM."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._labels = ["model_name"]
        self._values = [services.model_name]

    def collect(self) -> Iterator[Metric]:
        stats = self._services.lm.stats()
        kv, prefix, totals = stats["kv"], stats["prefix"], stats["totals"]
        yield self._gauge("num_requests_running", "Requests in the batch", stats["running"])
        yield self._gauge("num_requests_waiting", "Requests not yet begun", stats["waiting"])
        yield self._gauge(
            "kv_cache_usage_perc",
            "Cache blocks held by requests, 1 = all",
            kv["used"] / max(kv["total"], 1),
        )
        yield self._gauge("kv_cache_blocks", "Cache blocks there are", kv["total"])
        yield self._gauge("http_requests_in_work", "Admitted requests", self._services.gate.taken)
        yield self._counter(
            "prefix_cache_queries", "Prompt tokens looked up in the cache", prefix["queries"]
        )
        yield self._counter("prefix_cache_hits", "Prompt tokens found in the cache", prefix["hits"])
        yield self._counter("num_preemptions", "Sequences sent back", stats["preemptions"])
        for purpose, (name, text) in _TOKENS.items():
            yield self._counter(name, text, totals[purpose])
        yield self._finished(totals)
        yield self._adapters()
        yield from self._tuning(stats["jobs"], totals)
        for key, histogram in stats.get("histograms", {}).items():
            if key in _HISTOGRAMS:
                yield self._histogram(*_HISTOGRAMS[key], histogram)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"invivo:{name}", text, labels=self._labels)
        family.add_metric(self._values, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"invivo:{name}", text, labels=self._labels)
        family.add_metric(self._values, value)
        return family

    def _finished(self, totals: dict[str, int]) -> Metric:
        family = CounterMetricFamily(
            "invivo:request_success",
            "Finished requests by reason",
            labels=[*self._labels, "finished_reason"],
        )
        for reason in ("stop", "length", "cancelled", "error"):
            family.add_metric([*self._values, reason], totals[reason])
        return family

    def _adapters(self) -> Metric:
        family = GaugeMetricFamily(
            "invivo:lora_requests_running",
            "Requests that hold an adapter",
            labels=[*self._labels, "lora_name"],
        )
        for adapter in self._services.lm.adapters():
            family.add_metric([*self._values, adapter.name], adapter.running)
        return family

    def _tuning(self, jobs: list[dict[str, Any]], totals: dict[str, int]) -> Iterator[Metric]:
        tokens = CounterMetricFamily(
            "invivo:finetune_tokens",
            "Tokens trained on, by direction",
            labels=[*self._labels, "direction"],
        )
        tokens.add_metric([*self._values, "forward"], totals["train"])
        tokens.add_metric([*self._values, "backward"], totals["backward"])
        yield tokens
        states = GaugeMetricFamily(
            "invivo:finetune_jobs",
            "Jobs of the engine by state; of those that have ended, the latest few",
            labels=[*self._labels, "state"],
        )
        for state in _JOB_STATES:
            states.add_metric([*self._values, state], sum(job["state"] == state for job in jobs))
        yield states
        for name, key, text in _JOB_GAUGES:
            gauge = GaugeMetricFamily(
                f"invivo:finetune_{name}", text, labels=[*self._labels, "job_name"]
            )
            for job in jobs:
                if job["state"] in _JOB_LIVE and job[key] is not None:
                    gauge.add_metric([*self._values, job["name"]], job[key])
            yield gauge

    def _histogram(self, name: str, text: str, histogram: dict[str, Any]) -> Metric:
        family = HistogramMetricFamily(f"invivo:{name}", text, labels=self._labels)
        buckets: list[tuple[str, float]] = []
        seen = 0
        for edge, count in zip([*histogram["le"], "+Inf"], histogram["counts"], strict=True):
            seen += count
            buckets.append((str(edge), seen))
        family.add_metric(self._values, buckets, histogram["sum"])
        return family
