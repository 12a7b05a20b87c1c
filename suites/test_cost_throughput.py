"""What capture costs an offline batch: the time of the same requests with the plugin absent, idle and capturing."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from harness import peers
from harness.bandwidth import pinned_bandwidth
from harness.engine import Arm, Engine, Interface
from harness.load import DISTINCT, REPEATED, WORKLOADS, Workload
from harness.pytest_plugin.benchmarks import Cost, on_gpu, rounds_of
from harness.verdict import Ratio, median_ratio, over_starts
from suites.test_contract_basics import capture_stats

Record = Callable[[str, object], None]

GROWTH = [("side", 224), ("side", 448), ("side", 1024), ("side", 2048), ("items", 2), ("items", 4), ("requests", 1)]
GROWTH += [("requests", 8), ("requests", 64)]

pytestmark = [pytest.mark.suite("cost"), pytest.mark.clause("C14"), pytest.mark.once]


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_throughput(cost: Cost, workload: Workload, benchmark: Any, record_property: Record) -> None:
    cost.needs(workload.modality)
    ratios = measure(cost, cost.arms(Interface.LLM), workload, benchmark, record_property)
    cost.judge("throughput", ratios, record_property)


@pytest.mark.parametrize(("axis", "value"), GROWTH)
def test_growth(cost: Cost, axis: str, value: int, benchmark: Any, record_property: Record) -> None:
    """How the cost grows; a picture and no gate."""
    changed: dict[str, Any] = {axis: value}
    workload = dataclasses.replace(Workload(f"{axis}-{value}", requests=16, side=448, processed=True), **changed)
    record_property("axis", axis)
    record_property("value", getattr(cost.scaled(workload), axis))
    arms = cost.arms(Interface.LLM, [Arm.ABSENT, Arm.CAPTURING])
    ratios = measure(cost, arms, workload, benchmark, record_property)
    cost.record(ratios, record_property)


@pytest.mark.parametrize("peer", peers.PEERS)
def test_peers(cost: Cost, peer: str, benchmark: Any, record_property: Record, pytestconfig: pytest.Config) -> None:
    """What other ways cost; no gate of ours."""
    if not pytestconfig.getoption("--peers"):
        pytest.skip("--peers runs other ways to get at the embeddings")
    if peer == "ECCPUConnector" and not on_gpu():
        pytest.skip("ECCPUConnector needs vLLM's V2 model runner, which needs a GPU")
    cost = dataclasses.replace(cost, starts=1)  # ECExampleConnector's folder would still hold what a start before wrote
    with TemporaryDirectory(dir="/dev/shm") as folder:  # empty: what lies there is loaded and not encoded
        config = dict(peers.PEERS[peer])
        if peer == "ECExampleConnector":
            config["ec_connector_extra_config"] = {"shared_storage_path": folder}
        arms = cost.arms(Interface.LLM, [Arm.ABSENT, Arm.CAPTURING], peer=cost.peer(peer, config))
        ratios = measure(cost, arms, DISTINCT, benchmark, record_property)
    cost.record(ratios, record_property)


def test_items_asked_about_again(cost: Cost, benchmark: Any, record_property: Record) -> None:
    """With re-use, what left the GPU's encoder cache is loaded and not encoded again: faster than without capture."""
    cost = dataclasses.replace(cost, starts=1)  # what the engine counts is asked for at the end
    work = Workload("asked-again", side=1024, texts=8, scattered=True)
    # An encoder cache for fewer images than the round has: vLLM makes it as large as a step's tokens, or as the model's
    # largest item, where that has more.
    tokens = 2048 if on_gpu() else 128
    reuse = {"enable_mm_embedding_reuse": True}
    both = [Arm.ABSENT, Arm.CAPTURING]
    arms = cost.arms(Interface.LLM, both, capture_options=reuse, max_num_batched_tokens=tokens)
    ratios = measure(cost, arms, work, benchmark, record_property)
    reused = arms[Arm.CAPTURING].call(capture_stats)["reused"]
    record_property("reused", reused)
    assert reused > 0 or not on_gpu(), "nothing left the encoder cache: the condition did not happen"
    cost.judge("reuse", ratios, record_property)


def test_repeats_that_the_store_does_not_hold(cost: Cost, benchmark: Any, record_property: Record) -> None:
    """A prefix-cache hit meets an item that was not kept: it is encoded again. The price, stated; no gate."""
    cost = dataclasses.replace(cost, starts=1)  # what the engine counts is asked for at the end
    too_small = {"mm_embedding_cache_gb": 0.0}
    arms = cost.arms(Interface.LLM, [Arm.ABSENT, Arm.CAPTURING], capture_options=too_small)
    once = dataclasses.replace(REPEATED, requests=REPEATED.requests // REPEATED.times, times=1)
    ratios = measure(cost, arms, once, benchmark, record_property)
    forced = arms[Arm.CAPTURING].call(capture_stats)["forced_prefills"]
    record_property("forced prefills", forced)
    assert forced > 0 or not on_gpu(), "no prefix-cache hit covered an image: the condition did not happen"
    cost.record(ratios, record_property)


def measure(
    cost: Cost, arms: dict[str, Engine], workload: Workload, benchmark: Any, record_property: Record
) -> dict[str, Ratio]:
    """Runs the rounds, checks what came back, and gives each arm's throughput over that without the plugin."""
    work = cost.scaled(workload)
    rounds = rounds_of(cost, arms, work, peers.run)
    bandwidth = pinned_bandwidth()  # before the rounds: where it fails, it costs no hour
    cost.run(rounds, benchmark, f"throughput {workload}")
    seconds = {arm: [sample.seconds for sample in samples] for arm, samples in rounds.samples.items()}
    benchmark.extra_info.update(seconds=seconds, requests=work.requests)
    for arm, samples in rounds.samples.items():
        multimodal = work.requests // 2 if work.text_only else work.requests
        assert {sample.tokens for sample in samples} == {work.requests * work.tokens}
        expected = multimodal if arm == Arm.CAPTURING else 0
        assert {sample.with_embedding for sample in samples} == {expected}, f"embeddings where the plugin is {arm}"
        rate = work.requests * len(samples) / sum(sample.seconds for sample in samples)
        record_property(f"{arm} requests/s", round(rate, 2))
    captured = rounds.samples[Arm.CAPTURING]
    record_property("MB of embeddings a round", round(captured[0].nbytes / 1e6, 2))
    copied = statistics.median(sample.captured_bytes for sample in captured)
    record_property("MB copied a round", round(copied / 1e6, 2))
    absent = seconds[Arm.ABSENT]
    if bandwidth is not None:
        record_property("pinned GB/s", round(bandwidth / 1e9, 1))
        bound = copied / bandwidth / statistics.median(absent)
        record_property("copies at that speed, % of the time", round(100 * bound, 3))
    others = [arm for arm in arms if arm != Arm.ABSENT]
    return {
        f"{arm}/absent": over_starts(rounds.starts, cost.starts, median_ratio, absent, seconds[arm]) for arm in others
    }
