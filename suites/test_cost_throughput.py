"""What capture costs an offline batch: the time of the same requests with the plugin absent, idle and capturing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from harness.engine import Arm, Interface
from harness.load import WORKLOADS, Workload
from harness.pytest_plugin.benchmarks import Cost, offline
from harness.verdict import median_ratio

pytestmark = [pytest.mark.suite("cost"), pytest.mark.clause("C14"), pytest.mark.once]


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_throughput(
    cost: Cost, workload: Workload, benchmark: Any, record_property: Callable[[str, object], None]
) -> None:
    modality = "image" if workload.frames == 1 else "video"
    if modality not in cost.subject.spec.placeholders:
        pytest.skip(f"{cost.subject.spec.name} takes no {modality}")
    work = cost.scaled(workload)
    rounds = offline(cost, cost.arms(Interface.LLM), work)
    rounds.warm_up()
    benchmark.group = f"throughput {workload}"
    benchmark.pedantic(rounds.timed, setup=rounds.before, teardown=rounds.after, rounds=cost.rounds)
    seconds = {arm: [sample.seconds for sample in samples] for arm, samples in rounds.samples.items()}
    benchmark.extra_info.update(seconds=seconds, requests=work.requests)
    for arm, samples in rounds.samples.items():
        multimodal = work.requests // 2 if work.text_only else work.requests
        assert {sample.tokens for sample in samples} == {work.requests * work.tokens}
        expected = multimodal if arm == Arm.CAPTURING else 0
        assert {sample.with_embedding for sample in samples} == {expected}, f"embeddings where the plugin is {arm}"
        rate = work.requests * len(samples) / sum(sample.seconds for sample in samples)
        record_property(f"{arm} requests/s", round(rate, 2))
    absent = seconds[Arm.ABSENT]
    ratios = {f"{arm}/absent": median_ratio(absent, seconds[arm]) for arm in (Arm.IDLE, Arm.CAPTURING)}
    cost.judge("throughput", ratios, record_property)
