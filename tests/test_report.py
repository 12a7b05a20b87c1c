"""The tables of the README and of the terminal, from records made here."""

from __future__ import annotations

import re
from collections.abc import Mapping
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


def benchmark(name: str, numbers: Mapping[str, Any], outcome: Outcome = "passed", message: str = "") -> TestRecord:
    return record(name, outcome, "cost", case=None, clauses=("C14",), numbers=numbers, message=message)


RATIO = {
    "capturing/absent": "1.0012 [0.9950, 1.0043] (12 rounds)",
    "capturing/absent value": 1.0012,
    "capturing/absent low": 0.995,
    "capturing/absent high": 1.0043,
}
RATES = {"capturing requests/s": 23.0, "absent requests/s": 23.1}


def test_a_benchmark_is_a_row_with_its_arms_and_its_verdict() -> None:
    numbers = {**RATES, "MB of embeddings a round": 4.5, **RATIO, "capturing/absent verdict": "pass"}
    table = readme.cost_table(results(benchmark("test_throughput[llava-distinct]", numbers)))
    assert table.splitlines()[2] == (
        "| `llava` | throughput: distinct | requests/s: absent 23.1, capturing 23.0<br>MB of embeddings a round: 4.5 "
        "| capturing/absent 1.0012 [0.9950, 1.0043] (12 rounds) | pass |"
    )


def test_a_ratio_without_a_gate_has_no_verdict_of_another() -> None:
    other = {name.replace("capturing", "idle"): value for name, value in RATIO.items()}
    table = readme.cost_table(
        results(benchmark("test_x[llava]", {**other, **RATIO, "capturing/absent verdict": "pass"}))
    )
    assert "| no gate<br>pass |" in table


def test_of_latencies_the_median_and_the_99th_percentile_are_shown() -> None:
    numbers = {f"{arm} first_token p{n} ms": float(n) for arm in ("absent", "idle") for n in (50, 90, 99)}
    table = readme.cost_table(results(benchmark("test_latency[llava]", numbers)))
    shown = [f"first token p{n} ms: absent {n}.0, idle {n}.0" for n in (50, 99)]
    assert f"| latency | {'<br>'.join(shown)} |" in table


@pytest.mark.parametrize(
    ("outcome", "message", "numbers", "verdict"),
    [
        ("passed", "", {**RATIO, "verdict": "not judged on a CPU"}, "not judged on a CPU"),
        ("passed", "", RATIO, "no gate"),
        ("passed", "", {"bytes a request": 0}, "passed"),
        ("skipped", "takes no video", {}, "not shown: takes no video"),
        (
            "skipped",
            "x",
            {**RATIO, "capturing/absent verdict": "undecided: needs about 9 more rounds"},
            "undecided: .*",
        ),
        ("error", "the engine died\nmore", RATIO, "the engine died"),
        ("failed", "x", {**RATIO, "capturing/absent verdict": "fail"}, "fail"),
    ],
)
def test_what_a_benchmark_shows(outcome: Outcome, message: str, numbers: dict[str, Any], verdict: str) -> None:
    row = readme.cost_table(results(benchmark("test_work[llava]", numbers, outcome, message))).splitlines()[2]
    assert re.search(rf"\| {verdict} \|$", row), row
    assert ("work<br>**failed**" in row) == (outcome in ("failed", "error"))


def test_peers_are_arms_too() -> None:
    table = readme.cost_table(results(benchmark("test_peers[llava-Other]", {**RATES, "Other requests/s": 9.0})))
    assert "peers: Other | requests/s: absent 23.1, capturing 23.0, Other 9.0 |" in table


def test_cost_is_of_a_machine_and_no_column_of_the_models() -> None:
    found = results(record("a"), benchmark("test_throughput[llava-distinct]", {}, "skipped", "takes no video"))
    assert "cost" not in readme.matrix_table(found)
    assert "takes no video" not in readme.matrix_table(found)
    assert "test_cost.py: `test_throughput` | not shown: takes no video |" in readme.contract_table(found)
    assert readme.cost_table(results(record("a"))) == "No benchmark ran in this session."


def test_one_section_may_come_from_another_session(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, file = tmp_path / "README.md", tmp_path / "results.json"
    sections = "".join(f"<!-- {name}:begin -->\nold {name}\n<!-- {name}:end -->\n" for name in ("cost", "matrix"))
    path.write_text(sections)
    results(benchmark("test_throughput[llava-distinct]", RATES)).write(file)
    assert readme.main([str(file), str(path), "--section", "cost"]) == 0
    assert "throughput: distinct" in path.read_text()
    assert "old matrix" in path.read_text()
    assert readme.main([str(file), str(path), "--section", "contract"]) == 2
    assert "has none of <!-- contract:begin -->" in capsys.readouterr().err


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
