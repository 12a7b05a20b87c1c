"""Counts the defects at the end of the session."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = {
        outcome: sum("::test_caught[" in report.nodeid for report in terminalreporter.stats.get(outcome, []))
        for outcome in ("passed", "failed", "error")
    }
    if seeded := sum(counts.values()):
        terminalreporter.write_line(f"defects: {seeded} seeded, {counts['passed']} caught")
