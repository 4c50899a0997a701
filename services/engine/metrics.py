"""The engine's Prometheus metrics. Decoding's own counts are read when they are scraped."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from trainer.rollout.embedded import EmbeddedServing

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class RequestMetrics:
    """What is measured of each request."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.requests = Counter(
            "everloop_engine_requests_total", "Requests answered.", ("route", "code"), registry=registry
        )
        self.duration = Histogram(
            "everloop_engine_request_duration_seconds",
            "From the request to the last byte.",
            ("route",),
            buckets=SECONDS,
            registry=registry,
        )
        self.first = Histogram(
            "everloop_engine_first_token_seconds",
            "From the request to the first chunk with a token, of streams.",
            buckets=SECONDS,
            registry=registry,
        )


class EngineCollector(Collector):
    """Queue, batch, tokens and residents of one engine."""

    def __init__(self, serving: EmbeddedServing) -> None:
        self._serving = serving

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        counts = self._serving.counts
        gauges = {
            "waiting_requests": ("Requests in the queue.", counts.waiting),
            "running_answers": ("Answers being decoded: the batch.", counts.running),
            "resident_adapters": ("Adapters that requests can name.", len(self._serving.residents.adapters())),
        }
        counters = {
            "sampled_tokens": ("Tokens sampled.", counts.sampled_tokens),
            "prompt_tokens": ("Tokens of prompts run.", counts.prompt_tokens),
            "steps": ("Steps of any batch: tokens by steps is the mean batch size.", counts.steps),
            "refused": ("Requests refused because the queue was full.", counts.refused),
            "cancelled": ("Requests that were left before their answer.", counts.cancelled),
            "failed": ("Requests that decoding could not answer.", counts.failed),
            "busy_seconds": ("Seconds spent decoding.", counts.busy_seconds),
        }
        for name, (words, value) in gauges.items():
            yield GaugeMetricFamily(f"everloop_engine_{name}", words, value=value)
        for name, (words, total) in counters.items():
            yield CounterMetricFamily(f"everloop_engine_{name}", words, value=total)


OF_VLLM = {
    "vllm:num_requests_waiting": ("everloop_engine_waiting_requests", "Requests in the queue."),
    "vllm:num_requests_running": ("everloop_engine_running_answers", "Answers being decoded: the batch."),
}


class VllmCollector(Collector):
    """Queue and batch of a vLLM, under the names that the embedded engine has. The rest is in vLLM's own /metrics."""

    def __init__(self, url: str) -> None:
        self._url = url

    def collect(self) -> Iterator[GaugeMetricFamily]:
        try:
            with urllib.request.urlopen(f"{self._url}/metrics", timeout=5) as answer:
                families = list(text_string_to_metric_families(answer.read().decode()))
        except (OSError, ValueError):
            return  # it starts, or has ended: there is nothing to say of it
        for family in families:
            if family.name in OF_VLLM:
                name, told = OF_VLLM[family.name]
                yield GaugeMetricFamily(name, told, value=sum(sample.value for sample in family.samples))
