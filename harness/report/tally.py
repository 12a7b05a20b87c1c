"""Counts and worst row of a group of test records; what the terminal and the README both show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from harness.results import OUTCOMES, Outcome, TestRecord

NO_MODEL = "-"
"""Row of the tests that need no model."""


@dataclass(frozen=True)
class Tally:
    """The outcomes of some tests."""

    records: tuple[TestRecord, ...]

    def count(self, outcome: Outcome) -> int:
        """How many tests ended so."""
        return sum(record.outcome == outcome for record in self.records)

    @property
    def bad(self) -> int:
        """How many tests failed or broke."""
        return self.count("failed") + self.count("error")

    @property
    def worst(self) -> TestRecord | None:
        """The test whose comparison used most of its tolerance, None where nothing was compared."""
        compared = [record for record in self.records if record.comparison is not None]
        return max(compared, key=limit_used, default=None)

    def __str__(self) -> str:
        """Such as '1 failed, 11 passed'; empty for no tests."""
        words = {"error": "in error", "known": "known to differ"}
        order: tuple[Outcome, ...] = ("failed", "error", *(o for o in OUTCOMES if o not in ("failed", "error")))
        counts = [(self.count(outcome), words.get(outcome, outcome)) for outcome in order]
        return ", ".join(f"{count} {word}" for count, word in counts if count)


def limit_used(record: TestRecord) -> float:
    """Worst relative L2 over what was allowed; infinite where rows could not be compared or were not finite."""
    comparison = record.comparison or {}
    if comparison.get("limit_used") is not None:
        return float(comparison["limit_used"])
    return 0.0 if comparison.get("ok") else math.inf


def worst_row(record: TestRecord) -> tuple[str, str]:
    """Cosine and relative L2 of the comparison's worst row, as text."""
    comparison = record.comparison or {}
    cosine, relative = comparison.get("worst_cosine"), comparison.get("worst_relative_l2")
    return "-" if cosine is None else f"{cosine:.6f}", "-" if relative is None else f"{relative:.1e}"


def models_worst_first(records: Iterable[TestRecord]) -> dict[str, Tally]:
    """Tally per model: most failures first, then by the share of the tolerance that the worst row used."""
    groups = _group(records, lambda record: record.model or NO_MODEL)

    def badness(item: tuple[str, Tally]) -> tuple[float, ...]:
        _, tally = item
        return (-tally.bad, -limit_used(tally.worst) if tally.worst else 0.0)

    return dict(sorted(groups.items(), key=badness))


def suites(records: Iterable[TestRecord]) -> dict[str, Tally]:
    """Tally per suite, in the order of first appearance."""
    return _group(records, lambda record: record.suite)


def reasons(records: Iterable[TestRecord]) -> dict[str, list[TestRecord]]:
    """The records by the first line of their message, most frequent first."""
    groups = _group(records, lambda record: first_line(record.message) or "no reason given")
    return {
        reason: [*tally.records] for reason, tally in sorted(groups.items(), key=lambda item: -len(item[1].records))
    }


def first_line(message: str) -> str:
    """The first line that is not empty."""
    return next((line.strip() for line in message.splitlines() if line.strip()), "")


def _group(records: Iterable[TestRecord], key: Callable[[TestRecord], str]) -> dict[str, Tally]:
    groups: dict[str, list[TestRecord]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return {name: Tally(tuple(group)) for name, group in groups.items()}


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a plain table, each column as wide as its widest cell; the first row is the head."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the first row is the head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]
