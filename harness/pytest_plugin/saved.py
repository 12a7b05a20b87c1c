"""Runs that pytest-benchmark saved: where they are kept, and which of them may be compared with this session."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.session import PerformanceRegression

from harness import environment
from harness.matrix import ModelSpec

_STORAGE = "file://./.benchmarks"
"""What pytest-benchmark takes where --benchmark-storage is not given."""

_USES = ("benchmark_save", "benchmark_autosave", "benchmark_compare")
"""Options that need the storage. pytest-benchmark makes the folder in every session, also in one without benchmarks."""


class SavedRuns:
    """A pytest plugin of one session."""

    def __init__(
        self, config: pytest.Config, models: list[tuple[ModelSpec, Path | None]], engine_options: Sequence[str]
    ) -> None:
        """Points pytest-benchmark to `golden/benchmarks`, so it must be made before that is configured.

        Args:
            config: of the session.
            models: of the session, with the folders of their checkpoints; None for an embedded one.
            engine_options: as they were given.
        """
        self._session = {
            "models": {spec.name: str(folder or "embedded") for spec, folder in models},
            "full_size": config.getoption("--full-size"),
            "engine_options": sorted(engine_options),
        }
        self._compared = False
        self._versions: list[str] = []
        goldens = config.rootpath / "golden"
        # The plugin is in every session of an environment that it is installed in: another project keeps its storage.
        used = goldens.is_dir() and any(config.getoption(option, None) for option in _USES)
        if used and config.getoption("benchmark_storage") == _STORAGE:
            config.option.benchmark_storage = f"file://{goldens / 'benchmarks' / _folder(self._info)}"

    @functools.cached_property
    def _info(self) -> dict[str, Any]:
        return {**environment.describe(), "session": self._session}

    def pytest_benchmark_generate_machine_info(self) -> dict[str, Any]:
        """With GPUs, driver and versions, which pytest-benchmark's own leaves out."""
        return self._info

    @pytest.hookimpl(tryfirst=True)
    def pytest_benchmark_compare_machine_info(
        self, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
    ) -> None:
        """Refuses what would be taken for a difference of the code: another machine, or other work.

        Raises:
            pytest.UsageError: one of these; one sentence.
        """
        saved = compared_benchmark["machine_info"]
        if unlike := [*_unlike(_machine(saved), _machine(machine_info))]:
            raise pytest.UsageError(
                f"--benchmark-compare: the saved run is of another machine ({'; '.join(unlike)}): "
                "name one of this machine"
            )
        if unlike := [*_unlike(_work(saved), _work(machine_info), only_common=True)]:
            raise pytest.UsageError(
                f"--benchmark-compare: the saved run is of other work ({'; '.join(unlike)}): give the same options"
            )
        self._compared = True
        self._versions += _unlike(_versions(saved), _versions(machine_info))
        # All is said. pytest-benchmark's own hook comes next: it would print both machines whole, and it fails where
        # the storage is not below the working directory.
        compared_benchmark["machine_info"] = machine_info

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Says now what pytest-benchmark would find out after hours.

        Raises:
            pytest.UsageError: there is nothing that could be compared with.
        """
        if session.config.getoption("benchmark_compare_fail", None) and not self._compared:
            raise pytest.UsageError(
                "--benchmark-compare-fail: there is no saved run to compare with: save one with --benchmark-autosave, "
                "and give --benchmark-compare too"
            )

    @pytest.hookimpl(wrapper=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
        """The versions before the table; a regression fails the session."""
        if self._versions:
            terminalreporter.section("compared with a run of other versions", yellow=True, bold=True)
            for line in self._versions:
                terminalreporter.write_line(line)
        try:
            yield
        except PerformanceRegression:
            # It has been told; raised on, it would end pytest with a traceback.
            session: Any = terminalreporter.config.pluginmanager.get_plugin("session")
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def _folder(info: Mapping[str, Any]) -> str:
    """Of the runs of such a machine: the last one there is the one to compare with."""
    names = Counter(gpu["name"] for gpu in info["gpus"]) or {info["cpu"]["model"]: 1}
    text = " ".join(f"{count} {name}" if count > 1 else name for name, count in sorted(names.items()))
    return re.sub(r"\W+", "-", text).strip("-")


def _machine(info: Mapping[str, Any]) -> dict[str, str]:
    cpu = info.get("cpu", {})
    return {
        "GPU": ", ".join(f"{gpu['name']} with driver {gpu['driver']}" for gpu in info.get("gpus", [])) or "none",
        "CPU": f"{cpu.get('model')} ({cpu.get('capability')}), {cpu.get('cores')} cores",
    }


def _work(info: Mapping[str, Any]) -> dict[str, str]:
    session = info.get("session", {})
    return {
        "--full-size": str(session.get("full_size")),
        "--engine-option": " ".join(session.get("engine_options", [])) or "none",
        **{f"--model {name}": checkpoint for name, checkpoint in session.get("models", {}).items()},
    }


def _versions(info: Mapping[str, Any]) -> dict[str, str]:
    return {**info.get("versions", {}), "kernel": str(info.get("kernel"))}


def _unlike(saved: Mapping[str, str], here: Mapping[str, str], *, only_common: bool = False) -> Iterator[str]:
    for name in {**here, **saved}:
        if saved.get(name) != here.get(name) and not (only_common and (name not in saved or name not in here)):
            yield f"{name}: {saved.get(name, 'none')} there, {here.get(name, 'none')} here"
