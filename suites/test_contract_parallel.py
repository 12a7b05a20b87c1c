"""The contract of an engine with several workers, and of several engines behind one frontend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from harness.engine_process import Server
from harness.pytest_plugin.subject import PARALLEL, Subject
from suites.test_contract_basics import assert_same, capture_stats, embedding

pytestmark = [pytest.mark.suite("contract"), pytest.mark.once]


async def captured_by_engine(server: Server) -> list[int]:
    return [stats["captured"] for stats in await server.capture_stats_by_engine()]


@pytest.mark.clause("C2", "C3", "C11")
@pytest.mark.parametrize("way", PARALLEL)
def test_every_request_gets_its_own_rows(subject: Subject, way: str) -> None:
    parallel: dict[str, Any] = {way: 2, **subject.user_options}
    needed = math.prod(parallel.get(name, 1) for name in PARALLEL)
    if torch.cuda.is_available() and torch.cuda.device_count() < needed:
        pytest.skip(f"{way}={parallel[way]} takes {needed} GPUs here")
    media = [subject.item(120 + seed, seed) for seed in range(8)]
    one = subject.engine()
    truth = [embedding(one.generate(subject.request(item, "one"))[0][0]) for item in media]
    parallel["mm_embedding_cache_gb"] = 0.0
    engine = subject.engine(**parallel)
    pairs = [(index, (index + 1) % 8) for index in range(8)]
    completions = engine.generate(*(subject.request(media[first], "and", media[second]) for first, second in pairs))
    for [completion], (first, second) in zip(completions, pairs, strict=True):
        assert_same(completion, truth[first], truth[second])
    captured = engine.call(captured_by_engine)
    assert len(captured) == parallel.get("data_parallel_size", 1)
    assert all(captured), f"an engine had nothing to capture: the condition did not happen ({captured})"
    stats = engine.call(capture_stats)
    assert not any(stats[name] for name in ("admitted", "requests", "leases", "held_bytes")), f"still held: {stats}"
