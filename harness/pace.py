"""How steady this machine's processors are.

Where others use the other halves of its cores, the same work takes up to twice as long at times; and so does a step of
an engine that waits for the processor, which is then the noise of a benchmark.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_MULTIPLICATIONS = 10_000

_STEADY = 1.3
"""The most of a spread: of a machine that was left alone it was 1.07 to 1.13, of one that was not 1.4 to 2.1."""


def sample() -> float:
    """Seconds that a fixed piece of Python takes now: about a millisecond."""
    began = time.perf_counter()
    value = 1
    for _ in range(_MULTIPLICATIONS):
        value = (value * 1103515245 + 12345) % 2**31
    return time.perf_counter() - began


@dataclass(frozen=True)
class Pace:
    """What `sample` gave: the 10th and the 90th percentile, in seconds."""

    fast: float
    slow: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Pace:
        """Of at least one sample."""
        fast, slow = np.percentile(samples, (10, 90))
        return cls(float(fast), float(slow))

    @property
    def spread(self) -> float:
        """How many times as long it took."""
        return self.slow / self.fast

    @property
    def is_steady(self) -> bool:
        """Whether it always took about as long."""
        return self.spread <= _STEADY

    def __str__(self) -> str:
        return f"{1000 * self.fast:.2f} to {1000 * self.slow:.2f} ms"
