"""Collects a record of every test, writes the results file and the summary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness import environment
from harness.engine import EngineError
from harness.matrix import ModelSpec
from harness.report import terminal
from harness.results import Outcome, Results, ResultsError, TestRecord


def facts(spec: ModelSpec) -> dict[str, Any]:
    """What a report says of a model."""
    return {
        "hub_id": spec.hub_id,
        "revision": spec.revision,
        "independent": spec.independent,
    }


class Recorder:
    """A pytest plugin of one session. Only tests with the mark `suite` are recorded."""

    def __init__(self, path: Path | None, models: Sequence[ModelSpec]) -> None:
        """Start without records.

        Args:
            path: of the results file; None for none.
            models: of this session.
        """
        self._path = path
        self._models = {spec.name: facts(spec) for spec in models}
        self._results: Results | None = None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        """One record a test; an engine's death is an error and not a mismatch."""
        report: Any = yield
        mark = item.get_closest_marker("suite")
        if mark is not None and (report.when == "call" or report.outcome != "passed"):
            if self._results is None:
                self._results = Results(environment.describe(), self._models)
            broken = report.when != "call" or (call.excinfo is not None and call.excinfo.errisinstance(EngineError))
            outcome: Outcome = "error" if report.outcome == "failed" and broken else report.outcome
            if hasattr(report, "wasxfail"):
                outcome = "known"
            properties: dict[str, Any] = dict(item.user_properties)
            parameters = getattr(getattr(item, "callspec", None), "params", {})
            subject = parameters.get("subject")
            self._results.add(
                TestRecord(
                    nodeid=item.nodeid,
                    suite=mark.args[0],
                    outcome=outcome,
                    clauses=tuple(clause for found in item.iter_markers("clause") for clause in found.args),
                    model=subject[0].name if subject else None,
                    case=parameters.get("case"),
                    duration=call.duration,
                    comparison=properties.pop("comparison", None),
                    numbers=properties,
                    message=str(call.excinfo.value) if call.excinfo is not None else "",
                )
            )
        return report

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Writes the results, also of an interrupted session."""
        del session
        if self._results is not None and self._path is not None:
            self._results.interrupted = exitstatus == pytest.ExitCode.INTERRUPTED
            try:
                self._results.write(self._path)
            except ResultsError as error:
                raise pytest.UsageError(f"--results: {error}") from error

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Model x suite, the worst first."""
        if self._results is not None:
            terminalreporter.section("embeddings")
            for line in terminal.summary(self._results):
                terminalreporter.write_line(line)
