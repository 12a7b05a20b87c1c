"""Which slowdown shows with how many rounds: ``python -m harness.report.detectable SAMPLES.json``.

Reads what `--benchmark-autosave` saved. Two arms that should cost the same, absent and idle, stand for capture that
costs nothing; then one of them is slowed down on paper. Writes a Markdown table for each benchmark.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.engine import Arm
from harness.matrix import GATES
from harness.report.tally import markdown
from harness.verdict import FEWEST, Gate, Verdict, judge, median_ratio

SLOWDOWNS = (0.0, 0.01, 0.02, 0.05)
ROUNDS = (6, 12, 20, 40)
SESSIONS = 300
"""Drawn for each cell of the table."""


class SamplesError(Exception):
    """The file cannot be used; the message is one sentence for the user."""


def shares(
    ours: Sequence[float] | np.ndarray,
    theirs: Sequence[float] | np.ndarray,
    rounds: int,
    gate: Gate,
    sessions: int = SESSIONS,
) -> dict[Verdict, float]:
    """Share of each verdict on ours/theirs among sessions of so many rounds, drawn from these with replacement."""
    rng = np.random.default_rng(0)
    pairs = np.column_stack([ours, theirs])
    drawn = (rng.choice(pairs, rounds).T for _ in range(sessions))
    counts = Counter(judge(median_ratio(*columns), gate).verdict for columns in drawn)
    return {verdict: counts[verdict] / sessions for verdict in Verdict}


def table(seconds: Mapping[str, Sequence[float]], gate: Gate, sessions: int = SESSIONS) -> str:
    """Markdown: slowdown x rounds, each cell "pass / fail / undecided" in percent.

    Args:
        seconds: one number a round, of the arms absent and idle.
        gate: of the ratio absent/idle.
        sessions: drawn for each cell.
    """
    absent, idle = (np.asarray(seconds[arm], dtype=float) for arm in (Arm.ABSENT, Arm.IDLE))
    rows = [["slower by", *(f"{rounds} rounds" for rounds in ROUNDS)]]
    for slowdown in SLOWDOWNS:
        found = [shares(absent, idle * (1 + slowdown), rounds, gate, sessions) for rounds in ROUNDS]
        cells = (" / ".join(f"{100 * each[verdict]:.0f}" for verdict in Verdict) for each in found)
        rows.append([f"{100 * slowdown:.0f} %", *cells])
    return "\n".join(markdown(rows))


def read(path: Path) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Name and seconds by arm of each benchmark that has enough rounds of both arms.

    Raises:
        SamplesError: the file is missing, damaged or not of --benchmark-autosave, or has no such benchmark.
    """
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        found = [
            (bench["name"], bench["extra_info"].get("seconds", {}))
            for bench in data["benchmarks"]
            if len({*bench["extra_info"].get("starts", ())}) <= 1  # else its rounds are not what is judged
        ]
    except OSError as error:
        raise SamplesError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SamplesError(f"{path} is not a file of --benchmark-autosave ({error}): name one") from error
    usable = [(name, of) for name, of in found if min(len(of.get(arm, ())) for arm in (Arm.ABSENT, Arm.IDLE)) >= FEWEST]
    if not usable:
        raise SamplesError(
            f"{path} has no {FEWEST} rounds of {Arm.ABSENT} and {Arm.IDLE} from one start: run it with --rounds=12"
        )
    yield from usable


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tables. Exit status 0: done; 2: the file cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.report.detectable", description="Which slowdown shows with how many rounds."
    )
    parser.add_argument("samples", type=Path, help="JSON file that --benchmark-autosave wrote")
    options = parser.parse_args(arguments)
    gate = GATES["throughput"]
    try:
        for name, seconds in read(options.samples):
            recorded = len(seconds[Arm.IDLE])
            print(
                f"{name}: pass / fail / undecided of {SESSIONS} sessions, in percent; goal {gate.goal}, limit "
                f"{gate.limit}; drawn from {recorded} recorded rounds of {Arm.IDLE} against {Arm.ABSENT}, slowed down "
                f"on paper\n\n{table(seconds, gate, SESSIONS)}\n"
            )
    except SamplesError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
