"""The tables of the README and of the terminal, from records made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.report import readme, terminal
from harness.results import Outcome, Results, TestRecord

COMPARED = {
    "ok": True,
    "limit_used": 0.5,
    "worst_cosine": 0.9999,
    "worst_relative_l2": 1.5e-6,
    "worst_item": "the image",
}


def record(name: str, outcome: Outcome = "passed", suite: str = "encoder", **values: Any) -> TestRecord:
    return TestRecord(
        f"suites/test_{suite}.py::{name}", suite, outcome, **{"model": "llava", "case": "image", **values}
    )


def results(*records: TestRecord) -> Results:
    found = Results(
        {"versions": {"vllm": "0.32.0"}, "cpu": {"model": "a CPU"}},
        {"llava": {"independent": True}, "audio": {"independent": False}},
        created="2026-11-24T00:00:00+00:00",
    )
    for each in records:
        found.add(each)
    return found


def test_a_model_is_a_row_with_its_worst_row() -> None:
    table = readme.matrix_table(results(record("a", comparison=COMPARED), record("b", case="video")))
    assert "| `llava` | 2 passed<br>cos 0.999900, L2 1.5e-06 | 1 passed |" in table
    assert table.splitlines()[0] == "| model | encoder | video |"


def test_a_reference_that_shares_code_is_said_to_be_weak() -> None:
    table = readme.matrix_table(results(record("a", model="audio")))
    assert "| `audio`<br>not independent |" in table
    assert "Not independent: vLLM runs Hugging Face's own encoder module" in table


@pytest.mark.parametrize(
    ("outcome", "title"), [("known", "Known to differ from Hugging Face:"), ("skipped", "Skipped:")]
)
def test_reasons_are_listed(outcome: Outcome, title: str) -> None:
    table = readme.matrix_table(results(record("a", outcome, message="one mean and std.\nmore")))
    assert title in table
    assert "- `llava` encoder (image): one mean and std." in table


def test_a_clause_that_no_test_shows_is_not_shown() -> None:
    table = readme.contract_table(results(record("a", clauses=("C3",)), record("b", "error", clauses=("C5",))))
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines()}
    assert rows["C3"].endswith("| test_encoder.py: `a` | 1 passed |")
    assert "not shown: **1 in error**" in rows["C5"]
    assert "not shown: no test of this session names it" in rows["C1"]


def test_the_readme_is_filled_in_and_checked(tmp_path: Path) -> None:
    path, file = tmp_path / "README.md", tmp_path / "results.json"
    path.write_text("a\n<!-- matrix:begin -->\nold\n<!-- matrix:end -->\nb\n")
    results(record("a")).write(file)
    assert readme.main([str(file), str(path), "--check"]) == 1
    assert "old" in path.read_text()
    assert readme.main([str(file), str(path)]) == 0
    assert "`llava`" in path.read_text()
    assert "Generated from a session of 2026-11-24: vllm 0.32.0, a CPU." in path.read_text()
    assert readme.main([str(file), str(path), "--check"]) == 0


def test_the_terminal_tells_failures_from_a_broken_infrastructure() -> None:
    lines = terminal.summary(results(record("a", "failed", message="wrong"), record("b", "error", message="died")))
    assert lines[0].split() == ["model", "encoder", "worst", "cosine", "relative", "L2", "where"]
    assert "1 failed, 1 in error" in lines[1]
    assert any(line.endswith("failed: suites/test_encoder.py::a: wrong") for line in lines)
    assert any(line.endswith("error: suites/test_encoder.py::b: died") for line in lines)
