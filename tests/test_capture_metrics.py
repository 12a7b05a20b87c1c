"""What vLLM's loggers get of the store's counts: from a real store to Prometheus and to the log, without an engine."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorLogging, ECConnectorProm

from harness.capture import frontend, metrics
from harness.capture.connector import transfer_config
from harness.capture.metrics import COUNTERS, GAUGES, Changes, Poll
from harness.capture.reader import discard
from harness.capture.scheduler import SchedulerCapture
from harness.capture.settings import CONNECTOR, CaptureSettings
from harness.capture.store import Item
from harness.capture.transport import footprint

WIDTH = 32


def item(identifier: str) -> Item:
    return Item(identifier, False, 7, WIDTH, "float32")


BLOCK = footprint(item("").nbytes)
CAPTURED = {"captured": 1, "captured_bytes": item("").nbytes, "misses": 1}


@pytest.fixture
def capture() -> Iterator[SchedulerCapture]:
    """With memory for two items."""
    made = SchedulerCapture(CaptureSettings(True, 2 * BLOCK, 2 * BLOCK), WIDTH, 0, "float32")
    yield made
    made.close()


def run(capture: SchedulerCapture, name: str) -> dict[str, Any]:
    """A request with the item of that name; the handle of its embeddings."""
    assert capture.store.acquire(name, [item(name)])
    capture.store.dispatch(name, item(name))
    return capture.store.deliver(name)


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step is asked, however fast they come."""
    monkeypatch.setattr(metrics, "_POLL_SECONDS", 0.0)


def data_of(poll: Poll) -> dict[str, Any]:
    changes = poll()
    assert changes is not None, "nothing changed"
    return changes.data


def test_every_metric_is_a_count_of_the_store(capture: SchedulerCapture) -> None:
    assert capture.counts().keys() - {"items", "requests"} == GAUGES.keys() | COUNTERS.keys()


@pytest.mark.usefixtures("every_step")
def test_a_poll_gives_what_changed_and_then_nothing(capture: SchedulerCapture) -> None:
    poll = Poll(capture)
    assert poll() is None, "a new store is no change"
    handle = run(capture, "a")
    mapped = capture.store.stats().mapped_bytes
    gauges = {"held_bytes": BLOCK, "mapped_bytes": mapped, "leases": 1}
    assert data_of(poll) == {**gauges, **CAPTURED}
    assert poll() is None
    discard(handle)
    capture.store.reap()
    assert data_of(poll) == {"cached_bytes": BLOCK, "leases": 0}, "a gauge that fell to 0, and no counter"
    assert poll() is None


@pytest.mark.usefixtures("every_step")
def test_counters_travel_as_differences(capture: SchedulerCapture) -> None:
    poll = Poll(capture)
    for name in "ab":
        run(capture, name)
        assert data_of(poll)["captured"] == 1
    assert not capture.store.acquire("c", [item("c")])
    assert data_of(poll) == {"waits": 1}
    capture.forced_prefills += 2
    assert data_of(poll) == {"forced_prefills": 2}


@pytest.mark.usefixtures("every_step")
def test_a_request_that_ends_in_this_step_is_not_counted_as_admitted(capture: SchedulerCapture) -> None:
    poll = Poll(capture)
    for name in "ab":
        capture._captures[name] = SimpleNamespace()  # type: ignore[assignment]
    assert data_of(poll) == {"admitted": 2}
    capture.begin_update()
    for name in ("a", "of text alone"):
        capture.request_finished(name)
    assert data_of(poll) == {"admitted": 1}, "the scheduler asks before the step's requests are let go of"
    capture.end_update([])
    assert poll() is None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time for the metrics, which a test moves on."""
    made = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def test_steps_in_quick_succession_are_told_together(capture: SchedulerCapture, clock: SimpleNamespace) -> None:
    poll = Poll(capture)
    run(capture, "a")
    assert data_of(poll)["captured"] == 1, "the first one is told at once"
    clock.now += 0.09
    run(capture, "b")
    assert poll() is None
    clock.now += 0.02
    assert data_of(poll) == {"held_bytes": 2 * BLOCK, "leases": 2, **CAPTURED}


def test_the_end_of_the_last_request_is_told_at_once(capture: SchedulerCapture, clock: SimpleNamespace) -> None:
    poll = Poll(capture)
    for name in "ab":
        capture._captures[name] = SimpleNamespace()  # type: ignore[assignment]
    assert data_of(poll) == {"admitted": 2}
    clock.now += 0.01
    capture.begin_update()
    capture.request_finished("a")
    assert poll() is None
    capture.end_update([])
    capture.begin_update()
    capture.request_finished("b")
    assert data_of(poll) == {"admitted": 0}
    capture.end_update([])
    run(capture, "c")
    assert poll() is None, "the end is told once"


def test_the_abort_of_the_last_request_is_told_by_the_next_step(
    capture: SchedulerCapture, clock: SimpleNamespace
) -> None:
    poll = Poll(capture)
    capture._captures["a"] = SimpleNamespace()  # type: ignore[assignment]
    assert data_of(poll) == {"admitted": 1}
    clock.now += 0.01
    capture.request_finished("a")
    assert data_of(poll) == {"admitted": 0}


def test_changes_add_up_to_the_last_value_of_a_gauge_and_the_sum_of_a_counter() -> None:
    first = Changes({"held_bytes": 5000, "leases": 1, "captured": 2})
    then = Changes({"held_bytes": 3000, "captured": 1})
    together = first.aggregate(then)
    assert together.data == {"held_bytes": 3000, "leases": 1, "captured": 3}
    assert (first.data["captured"], then.data["captured"]) == (2, 1)
    together.reset()
    assert together.is_empty()
    assert Changes.for_log(None).is_empty()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def prom(registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch) -> ECConnectorProm:
    """vLLM's, of two engines, in a registry of its own."""
    for name, kind in (("_gauge_cls", Gauge), ("_counter_cls", Counter), ("_histogram_cls", Histogram)):
        monkeypatch.setattr(ECConnectorProm, name, functools.partial(kind, registry=registry))
    config = SimpleNamespace(ec_transfer_config=transfer_config())
    return ECConnectorProm(config, ["engine"], {0: ["0"], 1: ["1"]})


def test_prometheus_has_every_engine_by_itself(prom: ECConnectorProm, registry: CollectorRegistry) -> None:
    def values(name: str) -> list[float | None]:
        return [registry.get_sample_value(f"vllm:mm_embedding_{name}", {"engine": engine}) for engine in "01"]

    assert values("held_bytes") == values("captured_items_total") == [0, 0], "shown before anything is captured"
    for data in ({"held_bytes": 5000, "captured": 2}, {"held_bytes": 3000, "captured": 1}):
        prom.observe(data, engine_idx=1)
    assert values("held_bytes") == [0, 3000]
    assert values("captured_items_total") == [0, 3]


def test_the_log_has_a_line_for_an_interval_in_which_something_was_captured() -> None:
    log = ECConnectorLogging(transfer_config())
    lines: list[str] = []

    def interval(*observed: dict[str, int]) -> None:
        for data in observed:
            log.observe(data)
        log.log(lambda text, *args: lines.append(text % args))

    interval({"held_bytes": 5000, "captured": 2, "misses": 2}, {"captured": 1, "hits": 1})
    interval({"held_bytes": 0, "leases": 0})
    interval()
    assert len(lines) == 1
    assert lines[0].endswith(": mm_embedding_captured_items=3, mm_embedding_misses=2, mm_embedding_hits=1")


@pytest.mark.parametrize("enabled", [True, False])
def test_the_loggers_are_told_of_the_connector_where_capture_is_on(
    enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CaptureSettings, "of", lambda _config: CaptureSettings(enabled, 0, 1))
    patch = next(patch for patch in frontend.PATCHES if patch.name == "StatLoggerManager.__init__")
    got: list[Any] = []
    config = SimpleNamespace(ec_transfer_config=None)
    patch.wrap(lambda _self, vllm_config, engine_idxs: got.extend([vllm_config, engine_idxs]))(
        None, vllm_config=config, engine_idxs=[3]
    )
    assert got[1] == [3]
    connector = got[0].ec_transfer_config
    assert (connector.ec_connector if connector else None) == (CONNECTOR if enabled else None)
    assert config.ec_transfer_config is None, "the user's configuration was changed"


def test_the_readme_lists_them() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    table = text.partition("| metric | kind | what it counts |\n|---|---|---|\n")[2].partition("\n\n")[0]
    kinds = [*((metric, "gauge") for metric in GAUGES.values()), *((metric, "counter") for metric in COUNTERS.values())]
    assert table.splitlines() == [
        f"| `vllm:{metric.name}` | {kind} | {metric.documentation} |" for metric, kind in kinds
    ]
