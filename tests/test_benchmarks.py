"""Gates of a benchmark, on ratios made here."""

from __future__ import annotations

import importlib
from typing import Any, cast

import pytest

from harness.pytest_plugin.benchmarks import Cost
from harness.pytest_plugin.subject import Subject
from harness.verdict import Gate, Ratio

GOOD, BAD, NOISY = Ratio(1.0, 0.99, 1.01, 12), Ratio(0.9, 0.89, 0.91, 12), Ratio(1.0, 0.97, 1.03, 12)


class FakeSubject:
    class spec:  # noqa: N801 -- an attribute of Subject
        gates = {"throughput": Gate(goal=0.99, limit=0.98)}  # noqa: RUF012


@pytest.fixture
def recorded() -> dict[str, Any]:
    return {}


def judge(recorded: dict[str, Any], **ratios: Ratio) -> None:
    Cost(cast("Subject", FakeSubject()), 12).judge("throughput", ratios, recorded.__setitem__)


def on_gpu(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(importlib.import_module("harness.pytest_plugin.benchmarks"), "on_gpu", lambda: there)


def test_each_ratio_has_its_verdict(recorded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, True)
    judge(recorded, idle=GOOD)
    assert recorded["idle verdict"] == "pass"
    assert (recorded["idle value"], recorded["idle low"], recorded["idle high"]) == (1.0, 0.99, 1.01)
    with pytest.raises(pytest.skip.Exception, match=r"capturing: 1.0000 .*: undecided: needs about .* more rounds"):
        judge(recorded, idle=GOOD, capturing=NOISY)
    with pytest.raises(pytest.fail.Exception, match=r"idle: 0.9000 .*: fail \(goal 0.99, interval above 0.98\)"):
        judge(recorded, idle=BAD, capturing=NOISY)
    assert recorded["idle verdict"] == "fail"
    assert recorded["capturing verdict"].startswith("undecided")


def test_a_cpu_judges_nothing(recorded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, False)
    judge(recorded, idle=BAD)
    assert recorded["verdict"] == "not judged on a CPU"
    assert "idle verdict" not in recorded
    assert recorded["idle value"] == 0.9
