"""The store's counts among vLLM's own metrics: in `/metrics` of a server, in `LLM.get_metrics()` and in the log.

The scheduler asks the connector at the end of each step, which answers a few times a second. What changed travels with
that step's outputs to a frontend, whose loggers give it to the classes below.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorPromMetrics, ECConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from harness.capture.scheduler import SchedulerCapture


class Metric(NamedTuple):
    """One metric.

    Attributes:
        name: without vLLM's prefix; `/metrics` appends `_total` to a counter's.
        documentation: what it counts, for a metric's help and the README.
    """

    name: str
    documentation: str


GAUGES = {
    "held_bytes": Metric("mm_embedding_held_bytes", "Bytes of captured embeddings; mm_embedding_memory_gb is the cap"),
    "cached_bytes": Metric(
        "mm_embedding_cached_bytes", "Those of them that no request needs any more; mm_embedding_cache_gb is the cap"
    ),
    "mapped_bytes": Metric("mm_embedding_mapped_bytes", "Bytes of shared memory that hold them"),
    "leases": Metric("mm_embedding_leases", "Requests whose embeddings were sent and not read yet"),
    "admitted": Metric("mm_embedding_admitted_requests", "Multimodal requests that were let in and have not ended"),
}
"""By the key in SchedulerCapture.counts(): its value as of a step at most 0.1 s before the engine's last one."""

COUNTERS = {
    "captured": Metric("mm_embedding_captured_items", "Items that were copied out of the encoder cache"),
    "captured_bytes": Metric("mm_embedding_captured_bytes", "Bytes of their rows"),
    "reused": Metric(
        "mm_embedding_reused_items", "Items that were loaded into the encoder cache instead of encoded again"
    ),
    "reused_bytes": Metric("mm_embedding_reused_bytes", "Bytes of their rows, for one worker"),
    "hits": Metric("mm_embedding_hits", "Items of admitted requests that were held already"),
    "misses": Metric("mm_embedding_misses", "Items of admitted requests that were not"),
    "evictions": Metric("mm_embedding_evictions", "Items that no request needed and that made room for others"),
    "waits": Metric(
        "mm_embedding_waits", "Times that a request had to wait for a later step, at mm_embedding_memory_gb"
    ),
    "expired": Metric("mm_embedding_expired_leases", "Requests whose embeddings no frontend read in time"),
    "forced_prefills": Metric(
        "mm_embedding_forced_prefills",
        "Requests whose prefix-cache hit was passed by, because it covered an item that was not held",
    ),
}
"""By the key in SchedulerCapture.counts(). They travel as differences: each step's go to one of several frontends."""


class Changes(ECConnectorStats):
    """What changed in the store: `data` has the new values of gauges and the increments of counters, by their keys."""

    def is_empty(self) -> bool:
        """Whether nothing changed."""
        return not self.data

    def reset(self) -> None:
        """Forgets it all."""
        self.data.clear()

    def aggregate(self, other: ECConnectorStats) -> Changes:
        """These changes and then the others."""
        sums = {key: self.data.get(key, 0) + value for key, value in other.data.items() if key in COUNTERS}
        return Changes({**self.data, **other.data, **sums})

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's line in the log, by the metrics' names."""
        return {{**GAUGES, **COUNTERS}[key].name: value for key, value in self.data.items()}

    @classmethod
    def for_log(cls, data: dict[str, Any] | None) -> Changes:
        """The counters alone, so that an interval in which nothing was captured has no line."""
        return cls({key: value for key, value in (data or {}).items() if key in COUNTERS})


_POLL_SECONDS = 0.1
"""Between answers. To compare takes ten microseconds of a step, and to tell what changed takes more of it and of the
frontend's event loop; nobody looks as often as an engine steps."""


class Poll:
    """Finds what changed in the store between calls.

    Says so at most every 0.1 s, and in any case in the first step after the last multimodal request has ended, or in
    the one that ends it: no other may follow.
    """

    def __init__(self, capture: SchedulerCapture) -> None:
        self._capture = capture
        self._last = capture.counts()
        self._next = 0.0  # time.monotonic
        self._ended = capture.num_ended

    def __call__(self) -> Changes | None:
        """The changes since they were told last; None if there are none, or it is not yet time."""
        asked = time.monotonic()
        ended = self._capture.num_ended
        if asked < self._next and (ended == self._ended or self._capture.num_admitted()):
            return None
        self._next, self._ended = asked + _POLL_SECONDS, ended
        now = self._capture.counts()
        last, self._last = self._last, now
        data = {key: now[key] for key in GAUGES if now[key] != last[key]}
        data |= {key: now[key] - last[key] for key in COUNTERS if now[key] != last[key]}
        return Changes(data) if data else None


class PromMetrics(ECConnectorPromMetrics):
    """The metrics in Prometheus' registry, one child for each engine."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)

        def of_engines(make: Any, metric: Metric, **options: Any) -> dict[int, Any]:
            made = make("vllm:" + metric.name, metric.documentation + ".", labelnames=labelnames, **options)
            return create_metric_per_engine(made, per_engine_labelvalues)

        self._gauges = {
            key: of_engines(self._gauge_cls, metric, multiprocess_mode="mostrecent") for key, metric in GAUGES.items()
        }
        self._counters = {key: of_engines(self._counter_cls, metric) for key, metric in COUNTERS.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Takes in the `data` of a Changes."""
        for key, value in transfer_stats_data.items():
            if key in COUNTERS:
                self._counters[key][engine_idx].inc(value)
            else:
                self._gauges[key][engine_idx].set(value)
