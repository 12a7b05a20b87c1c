"""What a cost ratio shows: an interval from paired rounds, and pass, fail or undecided.

A ratio is capturing over absent, of the same round, so that what slows the machine down slows both. Above 1 is better:
a ratio of latencies is turned round by the caller. Noise of the rounds widens the interval, which leads to "undecided"
and never to "fail"; and never to "pass", which needs the interval above the limit.

Two engines that were started alike differ too, for as long as they live (where their memory and their threads came to
lie). No number of rounds shows that, so that one start may fail by it: only starting them again does show it, and then
each start counts as one sample (T. Kalibera and R. Jones, "Rigorous benchmarking in reasonable time", ISMM 2013).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from scipy import optimize, stats

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)

CONFIDENCE = 0.95
"""Of the two-sided intervals."""

_RESAMPLES = 499
"""Of a permutation test: the interval's ends are where 2.5 % of them are as extreme."""

_FAR = 100.0
"""How many times as far from a ratio the end of its interval is looked for."""


@dataclass(frozen=True)
class Gate:
    """What is promised of a ratio where above 1 is better.

    Attributes:
        goal: the ratio itself is at least this.
        limit: and its interval lies above this.
    """

    goal: float
    limit: float

    def __post_init__(self) -> None:
        if not 0 < self.limit <= self.goal:
            raise ValueError(f"a gate needs 0 < limit <= goal, not goal={self.goal} and limit={self.limit}")


@dataclass(frozen=True)
class Ratio:
    """An estimate with its interval at CONFIDENCE; infinite bounds where there are too few samples for one.

    Attributes:
        samples: how many it is from.
        unit: what they are, "rounds" of one start of the engines, or "starts".
    """

    value: float
    low: float
    high: float
    samples: int
    unit: str = "rounds"

    def __str__(self) -> str:
        if not math.isfinite(self.low):  # an end at infinity is one
            return f"{self.value:.4f} ({self.samples} {self.unit}, too few for an interval)"
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}] ({self.samples} {self.unit})"


class Verdict(enum.StrEnum):
    """Of a gate."""

    PASS = "pass"
    FAIL = "fail"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Judgement:
    """A verdict and, where it is undecided, how many samples more (of the ratio's unit) would decide it in four of five
    cases, if the truth is what was found so far."""

    verdict: Verdict
    more: int = 0
    unit: str = "rounds"

    def __str__(self) -> str:
        if self.verdict is Verdict.UNDECIDED:
            return f"undecided: needs about {self.more} more {self.unit}"
        return self.verdict.value


class Estimate(Protocol[T_contra]):
    """What gives a ratio."""

    def __call__(self, ours: Sequence[T_contra], theirs: Sequence[T_contra], /, *, interval: bool = True) -> Ratio:
        """From the rounds of two arms; quick where no interval is wanted."""


def median_ratio(
    ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray, *, interval: bool = True
) -> Ratio:
    """Median over the rounds of ours/theirs, with the exact interval from order statistics (scipy's quantile_test).

    Raises:
        ValueError: not one positive number of each for every round, or no round.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"rounds come in pairs: {len(ours)} and {len(theirs)}")
    ratios = _positive(ours) / _positive(theirs)
    low, high = -math.inf, math.inf
    if interval:
        found = stats.quantile_test(ratios, p=0.5).confidence_interval(CONFIDENCE)
        if math.isfinite(found.low) and math.isfinite(found.high):
            low, high = float(found.low), float(found.high)
    return Ratio(float(np.median(ratios)), low, high, len(ratios))


def pooled_ratio(
    ours: Sequence[Sequence[float]],
    theirs: Sequence[Sequence[float]],
    statistic: Callable[[np.ndarray], float],
    *,
    interval: bool = True,
) -> Ratio:
    """statistic(all samples of ours) / statistic(all of theirs), for what one round holds too few samples of, as a p99.

    The interval holds the ratios that a permutation test (scipy's) does not reject: were the arms alike but for such a
    ratio, each round could as well have been the other arm's (P. Good, Permutation, Parametric, and Bootstrap Tests of
    Hypotheses, 2005). A p99 is that of a few rounds, and a bootstrap, which draws them again, trusts them too much.

    Raises:
        ValueError: not as many rounds of both, or no round, or a statistic that is not a positive number.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"rounds come in pairs: {len(ours)} and {len(theirs)}")
    rounds, arms = len(ours), [[np.asarray(samples, dtype=float) for samples in arm] for arm in (ours, theirs)]
    found = [statistic(np.concatenate(samples)) for samples in arms]
    if not all(math.isfinite(number) and number > 0 for number in found):
        raise ValueError(f"a ratio needs positive numbers, not {found[0]} and {found[1]}")
    value = found[0] / found[1]
    if rounds < FEWEST or not interval:
        return Ratio(value, -math.inf, math.inf, rounds)

    def excess(logarithm: float, alternative: str) -> float:
        """The p-value of a ratio, above that of the interval's ends."""
        scaled = [*arms[0], *(math.exp(logarithm) * samples for samples in arms[1])]

        def pooled(drawn: np.ndarray) -> float:
            return statistic(np.concatenate([scaled[i] for i in drawn.astype(int)]))

        test = stats.permutation_test(
            (np.arange(rounds), np.arange(rounds, 2 * rounds)),
            lambda first, second: math.log(pooled(first) / pooled(second)),
            permutation_type="samples",  # the numbers of rounds, which change places with those of the other arm's
            vectorized=False,
            n_resamples=_RESAMPLES,
            alternative=alternative,
            rng=np.random.default_rng(0),
        )
        return float(test.pvalue) - (1 - CONFIDENCE) / 2

    def end(factor: float, alternative: str) -> float:
        near, far = math.log(value), math.log(factor * value)
        if excess(near, alternative) <= 0:  # rounds that are all alike
            return value
        if excess(far, alternative) >= 0:  # a round that stalled: it may hide any ratio
            return math.inf if factor > 1 else 0.0
        return math.exp(optimize.bisect(excess, near, far, args=(alternative,), xtol=5e-4))

    return Ratio(value, end(1 / _FAR, "greater"), end(_FAR, "less"), rounds)


FEWEST = 6
"""Rounds for an interval at 95 %: the exact one of a median needs as many. And starts for a verdict: what differs
between starts is often one of two states, and of two or three of them an interval may say anything.
"""


def over_starts(
    starts: Sequence[int],
    wanted: int,
    estimate: Estimate[T],
    numerator: Sequence[T],
    denominator: Sequence[T],
) -> Ratio:
    """The ratio where the engines were to start `wanted` times. Where that is once, it is `estimate`'s.

    Else it is the geometric mean of the starts' ratios, with Student's interval of their logarithms (scipy's).

    Args:
        starts: of each round, which start of the engines ran it.
        wanted: how often they were to start; an interrupted benchmark has fewer.
        estimate: the ratio from the rounds of one start.
        numerator: samples, one a round.
        denominator: as many, of the other arm.

    Raises:
        ValueError: no round.
    """
    if not starts:
        raise ValueError("a ratio needs a round")
    if wanted == 1:
        return estimate(numerator, denominator)
    rounds = [[index for index, start in enumerate(starts) if start == each] for each in sorted(set(starts))]
    ratios = [estimate([numerator[i] for i in of], [denominator[i] for i in of], interval=False) for of in rounds]
    logarithms = np.log([ratio.value for ratio in ratios])
    low, high = -math.inf, math.inf
    if len(ratios) > 1:
        interval = stats.ttest_1samp(logarithms, 0.0).confidence_interval(CONFIDENCE)
        low, high = (float(np.exp(bound)) for bound in (interval.low, interval.high))
    return Ratio(float(np.exp(np.mean(logarithms))), low, high, len(ratios), "starts")


_FOUR_OF_FIVE = ((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) / stats.norm.ppf(0.975)) ** 2


def judge(ratio: Ratio, gate: Gate) -> Judgement:
    """Pass: the ratio reaches the goal and its interval lies above the limit. Fail: all of it lies below the goal."""
    if ratio.samples < FEWEST or not math.isfinite(ratio.high):
        return Judgement(Verdict.UNDECIDED, max(1, FEWEST - ratio.samples), ratio.unit)
    if ratio.high < gate.goal:
        return Judgement(Verdict.FAIL)
    if ratio.value >= gate.goal and ratio.low > gate.limit:
        return Judgement(Verdict.PASS)
    # An interval narrows with the square root of the samples. It has to leave the limit or, below the goal, the goal.
    if ratio.value >= gate.goal:
        width, room = ratio.value - ratio.low, ratio.value - gate.limit
    else:
        width, room = ratio.high - ratio.value, gate.goal - ratio.value
    # Where it would just touch it, every second session of as many samples decides.
    needed = _FOUR_OF_FIVE * ratio.samples * (width / max(room, 1e-4)) ** 2
    return Judgement(Verdict.UNDECIDED, max(1, math.ceil(needed) - ratio.samples), ratio.unit)


def _positive(values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not len(array) or not (array > 0).all():
        raise ValueError("a ratio needs one positive number a round")
    return array
