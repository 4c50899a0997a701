"""The gateway's Prometheus metrics. Base units; no tenant, user or episode is ever a label."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.gateway.replicas import Replica

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
ADDED = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 1)


class Metrics:
    """Every metric of one gateway, in a registry of its own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, words: str, *labels: str) -> Counter:
            return Counter(f"everloop_gateway_{name}", words, labels, registry=registry)

        self.requests = counter("requests_total", "Requests answered.", "route", "code")
        self.fallbacks = counter("fallbacks_total", "Calls answered by another version than assigned.", "arm")
        self.provider_calls = counter("provider_calls_total", "Calls that a provider answered, by its role.", "role")
        self.retries_joined = counter("retries_joined_total", "Retried requests given the answer of the first.")
        self.events = counter("events_total", "Events given to the log.")
        self.capture_bytes = counter("capture_bytes_total", "Bytes of events given to the log.")
        self.dropped = counter("dropped_total", "Events of unanswered calls that the log refused.")
        self.feedback = counter("feedback_total", "Feedback accepted.", "kind")
        self.tokens = counter("tokens_total", "Tokens of captured calls.", "kind")
        self.disconnects = counter("disconnects_total", "Clients that left before their answer.")
        self.spans_sent = counter("spans_sent_total", "Own spans: exported, failed or dropped.", "outcome")
        self.spans_received = counter("spans_received_total", "Spans of agents: taken, dropped or rejected.", "outcome")
        self.under_way = 0
        in_flight = Gauge("everloop_gateway_in_flight_requests", "Calls under way.", registry=registry)
        in_flight.set_function(lambda: self.under_way)
        self.route_epoch = Gauge("everloop_gateway_route_epoch", "Newest epoch of any route.", registry=registry)
        self.routes_age = Gauge("everloop_gateway_routes_age_seconds", "Since routes were read.", registry=registry)
        self.duration = Histogram(
            "everloop_gateway_request_duration_seconds",
            "From the request's head to the answer's last byte.",
            ("route",),
            buckets=SECONDS,
            registry=registry,
        )
        self.added = Histogram(
            "everloop_gateway_added_latency_seconds",
            "Time of a whole answer that was not the engine's.",
            buckets=ADDED,
            registry=registry,
        )
        self._prompt = self.tokens.labels("prompt")
        self._completion = self.tokens.labels("completion")

    def captured(self, events: int, size: int) -> None:
        self.events.inc(events)
        self.capture_bytes.inc(size)

    def counted(self, prompt: int, completion: int) -> None:
        self._prompt.inc(prompt)
        self._completion.inc(completion)


class ReplicaMetrics(Collector):
    """What the gateway sees of each engine, by its place in ``serving.url``: ``host:port``."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._replicas = replicas

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        gauges: dict[str, tuple[str, Callable[[Replica], float]]] = {
            "up": ("1: it answered when it was looked at last.", lambda its: its.up),
            "complete": ("1: it held every adapter that is routed.", lambda its: its.complete),
            "in_flight_requests": ("Calls that it is answering.", lambda its: its.in_flight),
        }
        counters: dict[str, tuple[str, Callable[[Replica], float]]] = {
            "moved_on": ("Calls that were asked of another replica after this one.", lambda its: its.moved_on),
            "lost": ("Answers that were broken off because it ended.", lambda its: its.lost),
        }
        for family, metrics in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (words, value) in metrics.items():
                made = family(f"everloop_gateway_replica_{name}", words, labels=("replica",))
                for replica in self._replicas:
                    made.add_metric((replica.name,), value(replica))
                yield made


class ProviderMetrics(Collector):
    """How often providers failed, by the code of the error."""

    def __init__(self, failures: Callable[[], Mapping[str, int]]) -> None:
        self._failures = failures

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        made = CounterMetricFamily(
            "everloop_gateway_provider_failures", "Requests that a provider failed.", labels=("code",)
        )
        for code, count in self._failures().items():
            made.add_metric((code,), count)
        yield made


class SpoolMetrics(Collector):
    """What the scribe said last of its spool (``everloop.log.spool.SpoolState``). Counters begin anew with it."""

    def __init__(self, state: Callable[[], dict[str, Any]]) -> None:
        self._state = state

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        state = self._state()
        if not state:
            return
        gauges = {
            "records": ("records", "Events that wait in the spool for Kafka."),
            "bytes": ("bytes", "Bytes of the spool's file that are in use."),
            "oldest_seconds": ("oldest", "For how long the oldest event in the spool waits."),
            "undeliverable_records": ("aside", "Events set aside: Kafka takes none of their size."),
        }
        for name, (field, words) in gauges.items():
            yield GaugeMetricFamily(f"everloop_gateway_spool_{name}", words, state[field])
        counters = {
            "drained": ("drained", "Events that Kafka acknowledged."),
            "rebuilds": ("rebuilds", "Clients of Kafka that were thrown away and made anew."),
        }
        for name, (field, words) in counters.items():
            yield CounterMetricFamily(f"everloop_gateway_spool_{name}", words, state[field])
