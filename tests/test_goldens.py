"""A recorded golden that no test asks for is an error, where the tests of all the model's cases ran."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import checkpoints
from harness.matrix import load_all

MODEL = "paligemma"
CASES = load_all()[MODEL].cases

Session = Callable[..., list[str]]


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    """Runs a test of each case that asks for its golden, where one more is recorded; what its errors say."""
    monkeypatch.setattr(checkpoints, "build", lambda _recipe: tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    (tmp_path / "test_asking.py").write_text(
        "import pytest\n"
        "from harness.goldens import MissingGoldenError\n\n"
        "def test_golden(goldens, case):\n"
        "    with pytest.raises(MissingGoldenError):\n"
        "        goldens.read(case)\n"
    )
    # Pytest takes the tests of a case together, and so leaves a module and comes back to it.
    (tmp_path / "test_another.py").write_text("def test_another(subject, case):\n    pass\n")
    folder = tmp_path / "golden" / MODEL
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"schema": 1, "model": MODEL, "cases": {"gone": {}}}))

    def run(*options: str) -> list[str]:
        seen = Errors()
        common = ["-c", str(tmp_path / "pytest.ini"), "-p", "no:cacheprovider", "--model", MODEL]
        with warnings.catch_warnings():
            warnings.resetwarnings()
            pytest.main([str(tmp_path), *common, *options], plugins=[seen])
        assert seen.passed, "no test ran"
        return seen.errors

    return run


class Errors:
    """A pytest plugin: how many tests passed, and what was wrong, by the test's name."""

    def __init__(self) -> None:
        self.passed = 0
        self.errors: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed
        if report.failed:
            self.errors.append(f"{report.nodeid.partition('::')[2]} {report.when}: {report.longreprtext}")


def test_it_is_an_error_of_the_suites_last_test(session: Session, tmp_path: Path) -> None:
    [error] = session()
    manifest = tmp_path / "golden" / MODEL / "manifest.json"
    assert error.startswith(f"test_golden[{MODEL}-{CASES[-1]}] teardown: {manifest} holds gone, which no test")
    assert "remove its entry there and its .safetensors file" in error


@pytest.mark.parametrize("left", [f"not {CASES[0]}", CASES[-1], "test_another"])
def test_nothing_is_unused_where_tests_were_left_out(session: Session, left: str) -> None:
    assert session("-k", left) == []
