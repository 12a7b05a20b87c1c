"""What capture costs in memory: of the CPU while embeddings live and after, over many requests, and of the GPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import pytest
from scipy import stats

from harness import load
from harness.capture.arena import SEGMENT_BYTES
from harness.engine import Arm, Engine, Interface
from harness.engine_process import Server
from harness.memory import cpu_bytes, gpu_bytes, mapped_bytes, tree, watched
from harness.pytest_plugin.benchmarks import Cost, on_gpu

pytestmark = [pytest.mark.suite("cost"), pytest.mark.clause("C14"), pytest.mark.once]

BATCHES = 8
"""Of 64 requests each, on a GPU."""

FACTOR = 1.1
SLACK = 64 << 20
"""CPU memory may grow by FACTOR times the bytes of the live embeddings, and SLACK."""

NO_CACHE = {"mm_embedding_cache_gb": 0.0}
"""What the store keeps for later requests is under a cap of its own."""

NO_PROCESSOR_CACHE: dict[str, Any] = {"mm_processor_cache_gb": 0.0}
"""vLLM's own, of 4 GiB, in which the embeddings would be lost."""


def forget(server: Server) -> None:
    load.drop(server)
    gc.collect()


def mapped_by_a_process(pid: int) -> int:
    """Bytes of the plugin's segments: of the process of the tree that maps the most."""
    return max(mapped_bytes(process.pid, "/memfd:vllm-mm-embedding") for process in tree(pid))


def settled(engine: Engine) -> int:
    """Memory when nothing runs and nothing is kept: the store gives back all but a segment after half a minute.

    The worker maps each segment that has pages, and a moment longer those that were given back: they are in no count
    then, but a device may hold their pages.
    """
    engine.call(forget)
    deadline = time.monotonic() + 60
    while mapped_by_a_process(engine.pid) > SEGMENT_BYTES:
        assert time.monotonic() < deadline, "shared memory stays mapped"
        time.sleep(0.5)
    time.sleep(1.0)
    return cpu_bytes(engine.pid)


def test_cpu_memory(cost: Cost, record_property: Callable[[str, object], None]) -> None:
    arms = cost.arms(Interface.LLM, [Arm.ABSENT, Arm.CAPTURING], capture_options=NO_CACHE, **NO_PROCESSOR_CACHE)
    work = cost.scaled(load.DISTINCT)
    grown, left, live = {}, {}, 0
    for arm in (Arm.ABSENT, Arm.CAPTURING):
        engine = arms[arm]
        engine.call(load.prepare, cost.subject.spec, work, 0)
        engine.call(load.run)
        before = settled(engine)
        with watched(engine.pid) as watch:
            for batch in range(1, 1 + BATCHES):
                engine.call(load.prepare, cost.subject.spec, work, batch)
                live += engine.call(load.run, True).nbytes
            time.sleep(1.0)
            assert (mapped_by_a_process(engine.pid) > 0) == (arm == Arm.CAPTURING)
            grown[arm] = cpu_bytes(engine.pid) - before
        left[arm] = settled(engine) - before
        for name, value in (("grown", grown[arm]), ("peak", watch.peak - before), ("after drain", left[arm])):
            record_property(f"{arm} {name} MB", round(value / 1e6, 1))
    record_property("live embeddings MB", round(live / 1e6, 1))
    assert live > 0
    held = grown[Arm.CAPTURING] - grown[Arm.ABSENT]
    assert held <= FACTOR * live + SLACK, f"{held / 1e6:.0f} MB for {live / 1e6:.0f} MB of embeddings"
    kept = left[Arm.CAPTURING] - left[Arm.ABSENT]
    assert kept <= SLACK, f"{kept / 1e6:.0f} MB are held after everything was dropped"


def test_cpu_memory_does_not_grow_with_the_requests(cost: Cost, record_property: Callable[[str, object], None]) -> None:
    arms = cost.arms(Interface.LLM, [Arm.CAPTURING], capture_options=NO_CACHE, **NO_PROCESSOR_CACHE)
    engine = arms[Arm.CAPTURING]
    work = cost.scaled(load.DISTINCT)
    requests, held, nbytes = [], [], 0
    for batch in range(BATCHES):
        engine.call(load.prepare, cost.subject.spec, work, 100 + batch)
        nbytes = engine.call(load.run).nbytes
        requests.append(work.requests * batch)
        engine.call(forget)
        time.sleep(0.5)
        held.append(cpu_bytes(engine.pid))
    later = requests[-1] - requests[1]  # the first batch fills the allocators' pools
    grown, one = held[-1] - held[1], nbytes / work.requests
    record_property("bytes a request", round(stats.linregress(requests[1:], held[1:]).slope))
    record_property("bytes of embeddings a request", round(one))
    assert grown <= 0.1 * one * later + SLACK, f"{grown / 1e6:.0f} MB stay of {later} requests of {one:.0f} bytes each"


def test_start_up_and_gpu_memory(cost: Cost, record_property: Callable[[str, object], None]) -> None:
    arms = cost.arms(Interface.LLM)
    # In the same batches in every arm: others leave other blocks with torch's allocator.
    work = cost.scaled(load.PROCESSED)
    used = {}
    for arm, engine in arms.items():
        assert engine.start_seconds is not None
        record_property(f"{arm} start s", round(engine.start_seconds, 1))
        engine.call(load.prepare, cost.subject.spec, work, 200)
        engine.call(load.run)
        used[arm] = gpu_bytes(engine.pid)
        engine.call(forget)
    if not on_gpu():
        return
    found = {arm: nbytes for arm, nbytes in used.items() if nbytes is not None}
    if len(found) < len(used):
        pytest.skip("nvidia-smi does not tell the memory of single processes here")
    for arm, nbytes in found.items():
        record_property(f"{arm} GPU MB", round(nbytes / 1e6))
    # Below what a handful of the allocator's smallest segments (2 MiB) hold.
    assert found[Arm.CAPTURING] - found[Arm.ABSENT] <= 32 << 20
