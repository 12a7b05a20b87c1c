"""Which slowdowns show, on rounds whose noise is known."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from harness.report import detectable
from harness.verdict import Gate, Verdict

GATE = Gate(goal=0.99, limit=0.98)


def recorded(noise: float, rounds: int = 20) -> dict[str, list[float]]:
    absent, idle = 1 + noise * np.random.default_rng(0).standard_normal((2, rounds)) / 2**0.5
    return {"absent": absent.tolist(), "idle": idle.tolist(), "capturing": [9.0] * rounds}


def cells(table: str) -> dict[tuple[str, int], tuple[int, ...]]:
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]
    numbers = [int(name.removesuffix(" rounds")) for name in rows[0][1:]]
    return {
        (row[0], number): tuple(int(share) for share in cell.split("/"))
        for row in rows[2:]
        for number, cell in zip(numbers, row[1:], strict=True)
    }


def test_a_quiet_machine_tells_them_apart() -> None:
    found = cells(detectable.table(recorded(noise=0.001), GATE, sessions=40))
    assert set(found) == {(each, n) for each in ("0 %", "1 %", "2 %", "5 %") for n in (6, 12, 20, 40)}
    for number in (6, 12, 20, 40):
        assert found["0 %", number] == (100, 0, 0)
        assert found["5 %", number] == (0, 100, 0)
    assert found["2 %", 40] == (0, 100, 0)


def test_more_rounds_decide_more() -> None:
    found = cells(detectable.table(recorded(noise=0.03), GATE, sessions=60))
    undecided = [found["5 %", number][2] for number in (6, 12, 20, 40)]
    assert undecided == sorted(undecided, reverse=True)
    assert undecided[0] > 30
    assert undecided[-1] < 10


def test_noise_is_never_a_failure_where_nothing_is_slower() -> None:
    seconds = recorded(noise=0.1)
    found = detectable.shares(seconds["absent"], seconds["absent"], 12, GATE, sessions=40)
    assert found == {Verdict.PASS: 1.0, Verdict.FAIL: 0.0, Verdict.UNDECIDED: 0.0}
    assert detectable.shares(seconds["absent"], seconds["idle"], 12, GATE, sessions=100)[Verdict.FAIL] <= 0.1


def test_the_tables_of_a_saved_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detectable, "SESSIONS", 10)
    file = tmp_path / "0001.json"
    benchmarks = [
        {"name": "test_throughput[qwen3_vl-distinct]", "extra_info": {"seconds": recorded(0.01)}},
        {"name": "test_latency", "extra_info": {}},
        {"name": "test_starts", "extra_info": {"seconds": recorded(0.01), "starts": [0] * 10 + [1] * 10}},
        {"name": "test_short", "extra_info": {"seconds": recorded(0.01, rounds=5)}},
    ]
    file.write_text(json.dumps({"benchmarks": benchmarks}))
    assert detectable.main([str(file)]) == 0
    output = capsys.readouterr().out
    assert output.startswith("test_throughput[qwen3_vl-distinct]: pass / fail / undecided of 10 sessions")
    assert "drawn from 20 recorded rounds of idle against absent" in output
    assert output.count("| slower by |") == 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot read .*: No such file or directory"),
        ("{", "is not a file of --benchmark-autosave"),
        ("[]", "is not a file of --benchmark-autosave"),
        ('{"benchmarks": []}', "has no 6 rounds of absent and idle from one start: run it with --rounds=12"),
    ],
)
def test_a_file_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, sentence: str
) -> None:
    file = tmp_path / "samples.json"
    if content is not None:
        file.write_text(content)
    assert detectable.main([str(file)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(sentence, line)
