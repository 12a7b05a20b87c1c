"""The picture of how the cost grows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from harness.report import plots
from harness.results import Results, TestRecord

SIDE, ITEMS = [(1024, 0.99, 0.98, 1.0), (224, 1.0, 0.99, 1.01)], [(1, 0.97, None, None)]


def point(axis: str, value: int, ratio: float, low: float | None, high: float | None) -> TestRecord:
    bounds = {"capturing/absent value": ratio, "capturing/absent low": low, "capturing/absent high": high}
    return TestRecord(
        f"suites/test_cost_throughput.py::test_growth[qwen3_vl-{axis}-{value}]",
        "cost",
        "passed",
        numbers={"axis": axis, "value": value, **bounds},
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    results = Results({"versions": {"vllm": "0.32.0"}, "cpu": {"model": "a CPU"}}, created="2026-11-25T00:00:00+00:00")
    results.add(TestRecord("suites/test_cost_throughput.py::test_throughput[a]", "cost", "passed"))
    for axis, points in (("side", SIDE), ("items", ITEMS)):
        for each in points:
            results.add(point(axis, *each))
    path = tmp_path / "results.json"
    results.write(path)
    return path


def test_points_are_in_order_by_axis(file: Path) -> None:
    assert plots.growth(Results.read(file).records) == {
        "side": [(224, 1.0, 0.99, 1.01), (1024, 0.99, 0.98, 1.0)],
        "items": [(1, 0.97, 0.97, 0.97)],
    }


def test_the_same_results_give_the_same_picture(file: Path, tmp_path: Path) -> None:
    pictures = [tmp_path / "1.svg", tmp_path / "2.svg"]
    for picture in pictures:
        assert plots.main([str(file), str(picture)]) == 0
    first, second = (picture.read_text() for picture in pictures)
    assert first == second
    assert "side of an image, pixels" in first
    assert "items of a request" in first
    assert "requests of a batch" not in first
    assert "session of 2026-11-25: vllm 0.32.0, a CPU." in first
    assert "<dc:date>" not in first


def test_nothing_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    Results({}).write(path)
    assert plots.main([str(path), str(tmp_path / "out.svg")]) == 2
    assert capsys.readouterr().err.startswith("there is no test_growth among the results: ")
    assert not (tmp_path / "out.svg").exists()


def test_nothing_to_draw_with(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plots.main([str(file), str(tmp_path / "out.svg")]) == 2
    assert capsys.readouterr().err == 'this needs matplotlib: pip install "vllm-mm-embedding[plots]"\n'
