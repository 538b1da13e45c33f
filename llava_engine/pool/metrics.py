"""What the pool counts, published through prometheus_client where that is installed.

Counters and histograms are fed as requests end; gauges are read from `health()` when scraped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llava_engine.errors import PoolError

if TYPE_CHECKING:
    from llava_engine.channel import Channel
    from llava_engine.pool.request import Request

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_STATES = ("spawning", "loading", "ready", "processing", "idle", "evicting", "dead", "failed")


def stages(channel: Channel) -> dict[str, float]:
    """Seconds from the call to each stage that was reached, and the mean time between tokens."""
    times = {k: v for k, v in asdict(channel.timings()).items() if v is not None}
    if channel.produced > 1 and "total" in times:
        spent = times["total"] - times["first_token"]
        times["inter_token"] = spent / (channel.produced - 1)
    return times


class Metrics:
    """One registration with one registry. Thread-safe as prometheus_client is.

    health: the pool's record, asked at each scrape.
    """

    def __init__(self, health: Callable[[], dict[str, Any]], registry: Any = None) -> None:
        """Raises PoolError where prometheus_client is not installed, or `registry` has metrics of
        these names already; TypeError for what is no registry."""
        for method in ("register", "unregister"):
            if registry is not None and not callable(getattr(registry, method, None)):
                kind = type(registry).__name__
                raise TypeError(f"registry must be a prometheus CollectorRegistry, not {kind}")
        try:
            import prometheus_client
        except ImportError as error:
            raise PoolError("Metrics need prometheus_client (the extra `metrics`).") from error
        self._registry = prometheus_client.REGISTRY if registry is None else registry
        self._health = health

        def histogram(name: str, text: str) -> Any:
            return prometheus_client.Histogram(
                f"llava_engine_{name}_seconds",
                text,
                ["model"],
                buckets=_BUCKETS,
                registry=None,
            )

        def counter(name: str, text: str, *labels: str) -> Any:
            return prometheus_client.Counter(
                f"llava_engine_{name}", text, ["model", *labels], registry=None
            )

        self._histograms = {
            "queued": histogram("queue", "From the call to the end of the wait for a worker."),
            "first_token": histogram("first_token", "From the call to the first token."),
            "inter_token": histogram("inter_token", "Mean time between a request's tokens."),
            "total": histogram("request", "From the call to the end."),
        }
        self._requests = counter("requests", "Requests by how they ended.", "outcome")
        self._tokens = counter("tokens", "Tokens generated.")
        self._register()

    def _register(self) -> None:
        """All of it, or nothing."""
        done: list[Any] = []
        try:
            for collector in self._collectors():
                self._registry.register(collector)
                done.append(collector)
        except ValueError as error:
            for collector in done:
                self._registry.unregister(collector)
            taken = PoolError(
                "The registry has llava_engine's metrics already, of this pool or another one: "
                "attach once, and give each pool a prometheus_client.CollectorRegistry of its own."
            )
            taken.retryable = False
            raise taken from error

    def _collectors(self) -> tuple[Any, ...]:
        return (self, *self._histograms.values(), self._requests, self._tokens)

    def observe(self, request: Request, times: dict[str, float]) -> None:
        """Count a request that has ended."""
        key = request.registry_key
        self._requests.labels(key, request.outcome).inc()
        self._tokens.labels(key).inc(request.channel.produced)
        for stage, histogram in self._histograms.items():
            if stage in times:
                histogram.labels(key).observe(times[stage])

    def describe(self) -> list[Any]:
        """No names ahead of the first scrape (prometheus_client's Collector)."""
        return []

    def collect(self) -> Iterator[Any]:
        """The gauges of now (prometheus_client's Collector)."""
        from prometheus_client.core import GaugeMetricFamily

        health = self._health()
        workers = GaugeMetricFamily(
            "llava_engine_workers", "Workers by state.", labels=["model", "state"]
        )
        queue = GaugeMetricFamily("llava_engine_queue", "Requests waiting.", labels=["model"])
        paused = GaugeMetricFamily(
            "llava_engine_paused", "Requests that wait for their readers.", labels=["model"]
        )
        blocked = GaugeMetricFamily(
            "llava_engine_blocked_threads",
            "Threads held by pictures of requests that have ended.",
            labels=["model"],
        )
        for key, model in health["models"].items():
            queue.add_metric([key], model["queue_depth"])
            paused.add_metric([key], model["paused"])
            blocked.add_metric([key], sum(worker["blocked"] for worker in model["workers"]))
            states = [worker["state"] for worker in model["workers"]]
            for state in _STATES:
                workers.add_metric([key, state], states.count(state))
        memory = GaugeMetricFamily(
            "llava_engine_memory_bytes", "Memory of a device.", labels=["device", "kind"]
        )
        for name, device in health["devices"].items():
            for kind in ("used", "limit", "free", "total"):
                memory.add_metric([name, kind], device[f"{kind}_mb"] * (1 << 20))
        yield from (workers, queue, paused, blocked, memory)

    def close(self) -> None:
        """Take everything out of the registry."""
        for collector in self._collectors():
            self._registry.unregister(collector)
