"""Every warning is an error in the harness's own tests; pyproject.toml says why not in the suites."""

from types import SimpleNamespace

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.filterwarnings("error"))


@pytest.fixture
def arena_clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Its `now` is the time of every arena: leases expire when the test says so, however slow the machine is."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("harness.capture.arena.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock
