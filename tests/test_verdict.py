"""Ratios, intervals and verdicts on samples whose truth is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from harness.verdict import Gate, Judgement, Ratio, Verdict, judge, median_ratio, over_starts, pooled_ratio

GATE = Gate(goal=0.99, limit=0.98)


def paired(rng: np.random.Generator, rounds: int, ratio: float, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Seconds without capture and with it, where without is `ratio` of with."""
    without, with_it = 1 + noise * rng.standard_normal((2, rounds)) / math.sqrt(2)
    return ratio * without, with_it


def p99(values: np.ndarray) -> float:
    return float(np.percentile(values, 99))


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict"),
    [
        (1.0, 0.985, 1.01, Verdict.PASS),
        (0.99, 0.9801, 1.0, Verdict.PASS),
        (0.97, 0.96, 0.9899, Verdict.FAIL),
        (1.0, 0.98, 1.02, Verdict.UNDECIDED),  # may still be at the limit
        (0.989, 0.985, 0.995, Verdict.UNDECIDED),  # below the goal, which may still hold
        (0.95, 0.5, 1.4, Verdict.UNDECIDED),  # noise alone fails nothing
        (1.3, 0.5, 2.0, Verdict.UNDECIDED),  # and passes nothing
    ],
)
def test_a_gate_needs_the_ratio_and_its_interval(value: float, low: float, high: float, verdict: Verdict) -> None:
    assert judge(Ratio(value, low, high, 12), GATE).verdict is verdict


@pytest.mark.parametrize("rounds", [1, 5])
@pytest.mark.parametrize("ours", [0.5, 1.0, 2.0])
def test_too_few_rounds_decide_nothing(rounds: int, ours: float) -> None:
    ratio = median_ratio([ours] * rounds, [1.0] * rounds)
    assert ratio.value == ours
    assert judge(ratio, GATE) == Judgement(Verdict.UNDECIDED, 6 - rounds)
    assert str(ratio) == f"{ours:.4f} ({rounds} rounds, too few for an interval)"
    samples = [[ours]] * rounds
    assert judge(pooled_ratio(samples, [[1.0]] * rounds, p99), GATE) == Judgement(Verdict.UNDECIDED, 6 - rounds)


def test_six_rounds_are_enough_for_an_interval() -> None:
    ratio = median_ratio([0.9] * 6, [1.0] * 6)
    assert (ratio.low, ratio.high) == (0.9, 0.9)
    assert judge(ratio, GATE).verdict is Verdict.FAIL


# Halfway between limit and goal, what was found so far is often on the wrong side.
@pytest.mark.parametrize(("truth", "share"), [(1.0, 0.8), (0.995, 0.8), (0.985, 0.4), (0.975, 0.8)])
def test_the_rounds_that_it_asks_for_mostly_decide(truth: float, share: float) -> None:
    rng = np.random.default_rng(1)
    asked, decided = [], []
    for _ in range(150):
        ours, theirs = paired(rng, 12, truth, noise=0.02)
        found = judge(median_ratio(ours, theirs), GATE)
        # Who happens to stand next to goal or limit is told a number that nobody will run.
        if found.verdict is not Verdict.UNDECIDED or found.more > 400:
            continue
        asked.append(found.more)
        more_ours, more_theirs = paired(rng, found.more, truth, noise=0.02)
        ratio = median_ratio(np.concatenate([ours, more_ours]), np.concatenate([theirs, more_theirs]))
        decided.append(judge(ratio, GATE).verdict is not Verdict.UNDECIDED)
    assert len(asked) > 30
    assert np.mean(decided) > share
    assert np.median(asked) < 100
    assert str(Judgement(Verdict.UNDECIDED, 7)) == "undecided: needs about 7 more rounds"


@pytest.mark.parametrize("rounds", [6, 12, 40])
def test_the_interval_of_the_median_covers_the_truth(rounds: int) -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        ratio = median_ratio(*paired(rng, rounds, 1.03, noise=0.05))
        covered += ratio.low <= 1.03 <= ratio.high
    # Exact, so at least 95 % apart from the luck of 400 draws; and no wider than order statistics make it.
    assert stats.binomtest(covered, 400, 0.95, alternative="less").pvalue > 0.001
    assert covered < 400


def test_the_pooled_interval_covers_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of few rounds that differ as much as those of requests that queue: the p99 is that of one or two of them."""
    monkeypatch.setattr("harness.verdict._RESAMPLES", 99)  # for speed
    rng = np.random.default_rng(3)
    truth = 1.25
    covered = 0
    for _ in range(30):
        ours, theirs = np.exp(0.4 * rng.standard_normal((2, 8, 1))) * (1 + rng.random((2, 8, 20)))
        ratio = pooled_ratio(list(truth * ours), list(theirs), p99)
        covered += ratio.low <= truth <= ratio.high
    assert covered >= 29


@pytest.mark.parametrize("rounds", [6, 12])
def test_the_pooled_interval_is_no_wider_than_the_noise(rounds: int) -> None:
    rng = np.random.default_rng(8)
    ours, theirs = 1 + 0.02 * rng.random((2, rounds, 20))
    ratio = pooled_ratio(list(0.9 * ours), list(theirs), p99)
    assert judge(ratio, GATE).verdict is Verdict.FAIL
    assert 0.88 < ratio.low < ratio.value < ratio.high < 0.92
    quick = pooled_ratio(list(0.9 * ours), list(theirs), p99, interval=False)
    assert (quick.value, quick.high) == (ratio.value, math.inf)


@pytest.mark.parametrize("rounds", [6, 8, 12])
def test_rounds_that_are_all_alike(rounds: int) -> None:
    ratio = pooled_ratio([[3.0]] * rounds, [[1.0]] * rounds, p99)
    assert ratio.low == pytest.approx(3.0, rel=1e-3)
    assert ratio.high == pytest.approx(3.0, rel=1e-3)


def test_a_round_that_stalls_for_a_hundred_times_as_long_decides_nothing() -> None:
    rng = np.random.default_rng(9)
    ours, theirs = 1 + 0.02 * rng.random((2, 12, 20))
    theirs[3] *= 300
    ratio = pooled_ratio(list(ours), list(theirs), p99)
    assert ratio.low < ratio.value < 0.01
    assert ratio.high == math.inf
    assert str(ratio).endswith(", inf] (12 rounds)")
    assert judge(ratio, GATE).verdict is Verdict.UNDECIDED


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_a_pooled_statistic_that_is_no_time(bad: float) -> None:
    with pytest.raises(ValueError, match=r"a ratio needs positive numbers, not .* and 1\.0"):
        pooled_ratio([[bad]] * 6, [[1.0]] * 6, p99)


def test_the_pooled_interval_draws_whole_rounds() -> None:
    """Samples of a round go up and down together: taken one by one, they would pass for many more than there are."""
    rng = np.random.default_rng(4)
    level = 1 + 0.1 * rng.standard_normal((12, 1))
    ours, theirs = level * (1 + 0.001 * rng.random((12, 200))), 1 + 0.001 * rng.random((12, 200))
    ratio = pooled_ratio(list(ours), list(theirs), lambda values: float(np.mean(values)))
    assert ratio.high - ratio.low > 0.05


def test_drift_hits_both_arms_of_a_round() -> None:
    """A machine that gets twice as slow: paired, a ratio of 0.97 shows; unpaired, nothing would."""
    rng = np.random.default_rng(5)
    drift = np.linspace(1, 2, 12)
    without, with_it = (drift * each for each in paired(rng, 12, 0.97, noise=0.003))
    assert judge(median_ratio(without, with_it), GATE).verdict is Verdict.FAIL
    shuffled = [judge(median_ratio(without, rng.permutation(with_it)), GATE).verdict for _ in range(20)]
    assert shuffled.count(Verdict.UNDECIDED) >= 18


@pytest.mark.parametrize(("goal", "limit"), [(0.98, 0.99), (0.99, 0.0), (0.99, -1.0), (math.nan, 0.9)])
def test_a_gate_that_promises_nothing(goal: float, limit: float) -> None:
    with pytest.raises(ValueError, match="a gate needs 0 < limit <= goal, not goal="):
        Gate(goal, limit)


@pytest.mark.parametrize("ours", [[], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan]])
def test_a_round_without_a_time(ours: Sequence[float]) -> None:
    with pytest.raises(ValueError, match="a ratio needs one positive number a round"):
        median_ratio(ours, [1.0] * len(ours))


def test_rounds_come_in_pairs() -> None:
    with pytest.raises(ValueError, match="2 and 1"):
        pooled_ratio([[1.0], [1.0]], [[1.0]], p99)
    with pytest.raises(ValueError, match="0 and 0"):
        pooled_ratio([], [], p99)
    with pytest.raises(ValueError, match="2 and 1"):
        median_ratio([1.0, 1.0], [1.0])  # which numpy would broadcast


def engines(rng: np.random.Generator, starts: int, rounds: int, truth: float) -> Ratio:
    """The ratio of engines that each differ by 2 % for as long as they live, from rounds that differ by 0.5 %."""
    ours, theirs = [], []
    for _ in range(starts):
        own = np.exp(0.02 * rng.standard_normal(2))
        without, with_it = paired(rng, rounds, truth, noise=0.005)
        ours += list(own[0] * without)
        theirs += list(own[1] * with_it)
    return over_starts([start for start in range(starts) for _ in range(rounds)], starts, median_ratio, ours, theirs)


def test_the_interval_over_starts_covers_the_truth() -> None:
    rng = np.random.default_rng(6)
    ratios = [engines(rng, 6, 8, 1.03) for _ in range(400)]
    covered = sum(ratio.low <= 1.03 <= ratio.high for ratio in ratios)
    assert stats.binomtest(covered, 400, 0.95).pvalue > 0.001
    assert {ratio.samples for ratio in ratios} == {6}
    assert str(ratios[0]).endswith(" (6 starts)")


def test_rounds_do_not_show_how_engines_differ() -> None:
    """Two that cost the same: of one start of each, many a session is sure of a loss; of six starts hardly one."""
    rng = np.random.default_rng(7)
    one, six = ([judge(engines(rng, starts, 40, 1.0), GATE).verdict for _ in range(60)] for starts in (1, 6))
    assert one.count(Verdict.FAIL) > 12
    assert six.count(Verdict.FAIL) <= 3


def test_one_start_has_the_interval_of_its_rounds() -> None:
    ours, theirs = paired(np.random.default_rng(8), 12, 1.0, noise=0.01)
    assert over_starts([0] * 12, 1, median_ratio, list(ours), list(theirs)) == median_ratio(ours, theirs)


@pytest.mark.parametrize("started", [1, 2, 5])
def test_fewer_than_six_starts_decide_nothing(started: int) -> None:
    """As of a benchmark that is interrupted: the rounds of one start must not pass for what eight were to show."""
    starts = [number for number in range(started) for _ in range(12)]
    ratio = over_starts(starts, 8, median_ratio, [0.9 + 0.001 * number for number in starts], [1.0] * len(starts))
    assert (ratio.samples, ratio.unit) == (started, "starts")
    assert ratio.value == pytest.approx(0.9, rel=0.01)
    assert judge(ratio, GATE) == Judgement(Verdict.UNDECIDED, 6 - started, "starts")


def test_no_round_has_no_ratio() -> None:
    with pytest.raises(ValueError, match="needs a round"):
        over_starts([], 1, median_ratio, [], [])


def test_each_start_counts_the_same_however_many_rounds_it_had() -> None:
    """The rounds of the last one are fewer where the user interrupts it."""
    ratio = over_starts([0, 0, 0, 1, 1, 2], 3, median_ratio, [1.0, 1.0, 1.1, 1.21, 1.21, 1.1], [1.0] * 6)
    assert ratio.value == pytest.approx(1.1)
    assert ratio.low < 1.0 < 1.21 < ratio.high
    judged = judge(ratio, GATE)
    assert judged.unit == "starts"
    assert str(judged).endswith(f"needs about {judged.more} more starts")


# Seconds a round of 64 requests about images of 1024 x 1024 that were processed before: Qwen3-VL-4B's dimensions, vLLM
# 0.33, eager, one NVIDIA H100 of a shared host, 2026-11-25.
RECORDED = {
    "absent": [4.10, 4.22, 3.79, 4.26, 4.06, 4.10, 4.52, 4.18, 4.64, 4.91, 3.98, 4.71],
    "idle": [4.41, 4.19, 4.16, 4.35, 4.59, 4.70, 4.11, 3.97, 4.46, 4.32, 4.11, 4.78],
    "capturing": [4.39, 4.57, 4.54, 4.34, 4.50, 4.24, 4.24, 4.48, 4.62, 4.52, 4.08, 4.58],
}


@pytest.mark.parametrize("name", ["idle", "capturing"])
def test_recorded_rounds_as_noisy_as_these_decide_nothing(name: str) -> None:
    ratio = median_ratio(RECORDED["absent"], RECORDED[name])
    assert ratio.low < GATE.limit < GATE.goal < ratio.high
    assert judge(ratio, GATE).verdict is Verdict.UNDECIDED
    assert judge(ratio, GATE).more > 100


@pytest.mark.parametrize(("slower", "verdict"), [(1.05, Verdict.UNDECIDED), (1.15, Verdict.FAIL)])
def test_a_loss_shows_in_recorded_rounds_once_it_is_larger_than_their_noise(slower: float, verdict: Verdict) -> None:
    slowed = [slower * seconds for seconds in RECORDED["idle"]]
    assert judge(median_ratio(RECORDED["absent"], slowed), GATE).verdict is verdict


# The same with tensor parallel 2 and CUDA graphs on two NVIDIA H200, 2026-11-26: seven starts of the engines.
STARTS = {
    "absent": [
        [1.438, 1.452, 1.469, 1.427, 1.423, 1.449, 1.442, 1.410],
        [1.453, 1.404, 1.422, 1.435, 1.423, 1.439, 1.416, 1.413],
        [1.414, 1.430, 1.412, 1.409, 1.386, 1.416, 1.434, 1.426],
        [1.435, 1.425, 1.421, 1.442, 1.437, 1.438, 1.475, 1.422],
        [1.415, 1.436, 1.431, 1.427, 1.437, 1.431, 1.426, 1.446],
        [1.457, 1.433, 1.440, 1.427, 1.429, 1.457, 2.698, 2.701],
        [1.421, 1.438, 1.447, 1.439, 1.437, 1.434],
    ],
    "capturing": [
        [1.739, 1.455, 1.479, 1.473, 1.549, 1.464, 1.459, 1.422],
        [1.406, 1.416, 1.417, 1.417, 1.427, 1.416, 1.423, 1.426],
        [1.427, 1.434, 1.417, 1.423, 1.412, 1.440, 1.418, 1.403],
        [1.432, 1.445, 1.423, 1.436, 1.428, 1.420, 1.428, 1.421],
        [1.452, 1.443, 1.441, 1.424, 1.436, 1.415, 1.445, 1.425],
        [1.429, 1.441, 1.429, 1.446, 1.441, 1.449, 1.465, 1.465],
        [1.415, 1.430, 1.418, 1.427, 1.427, 1.402],
    ],
}


def test_recorded_starts_pass() -> None:
    starts = [number for number, rounds in enumerate(STARTS["absent"]) for _ in rounds]
    absent, capturing = (list(itertools.chain(*rounds)) for rounds in STARTS.values())
    ratio = over_starts(starts, 8, median_ratio, absent, capturing)
    assert str(ratio) == "0.9998 [0.9935, 1.0061] (7 starts)"
    assert judge(ratio, GATE).verdict is Verdict.PASS
    slowed = over_starts(starts, 8, median_ratio, absent, [1.02 * seconds for seconds in capturing])
    assert judge(slowed, GATE).verdict is Verdict.FAIL
