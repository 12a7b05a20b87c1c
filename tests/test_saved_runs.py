"""Runs that pytest-benchmark saves and compares: whole sessions over a suite of one test, without an engine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import environment

pytest_plugins = ["pytester"]

SUITE = """
import pytest
@pytest.mark.suite("cost")
def test_work(benchmark):
    benchmark.extra_info["seconds"] = {"absent": [1.0], "capturing": [1.0]}
    benchmark.pedantic(lambda: None, rounds=3)
"""

H100 = {"name": "NVIDIA H100 80GB", "driver": "550", "memory": 1}
MACHINE = {
    "versions": {"vllm": "0.32.0"},
    "kernel": "6",
    "cpu": {"model": "a CPU", "cores": 8, "capability": "AVX2"},
    "gpus": [H100],
}

Session = Callable[..., tuple[int, str]]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """This one, for as long as nobody changes it."""
    found = dict(MACHINE)
    monkeypatch.setattr(environment, "describe", lambda: dict(found))
    return found


@pytest.fixture
def session(pytester: pytest.Pytester, machine: dict[str, Any]) -> Session:
    """Runs the suite with options; exit code and all that was printed."""
    pytester.makeini("[pytest]")
    pytester.mkdir("golden")
    folder = pytester.mkdir("suites")
    (folder / "test_cost.py").write_text(SUITE)

    def run(*options: str) -> tuple[int, str]:
        done = pytester.runpytest_inprocess(
            f"{folder}/test_cost.py", "--rootdir", str(pytester.path), "-p", "no:hypothesispytest", *options
        )
        return int(done.ret), f"{done.stdout}\n{done.stderr}"

    return run


def saved(folder: Path, machine_folder: str = "NVIDIA-H100-80GB") -> list[Path]:
    return sorted((folder / "golden" / "benchmarks" / machine_folder).rglob("*.json"))


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("ERROR: ")]


def test_runs_are_saved_beside_the_goldens_and_found_there(session: Session, pytester: pytest.Pytester) -> None:
    assert session("--benchmark-autosave")[0] == pytest.ExitCode.OK
    [file] = saved(pytester.path)
    data = json.loads(file.read_text())
    assert data["benchmarks"][0]["extra_info"]["seconds"]["absent"] == [1.0]
    assert data["machine_info"]["gpus"] == [H100]
    code, output = session("--benchmark-compare")
    assert code == pytest.ExitCode.OK
    assert "Comparing against benchmarks from: " in output
    assert "test_work (NOW)" in output
    assert "other versions" not in output


def test_also_from_another_folder(session: Session, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pytester.mkdir("elsewhere"))
    assert session("--benchmark-autosave")[0] == pytest.ExitCode.OK
    assert len(saved(pytester.path)) == 1
    assert "test_work (NOW)" in session("--benchmark-compare")[1]


@pytest.mark.parametrize("compare_from", ["elsewhere", "."])
def test_other_versions_are_compared_and_announced(
    session: Session,
    pytester: pytest.Pytester,
    machine: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    compare_from: str,
) -> None:
    session("--benchmark-autosave")
    pytester.mkdir("elsewhere")
    monkeypatch.chdir(pytester.path / compare_from)
    machine["versions"] = {"vllm": "0.33.0", "torch": "2"}
    code, output = session("--benchmark-compare", "-q")
    assert code == pytest.ExitCode.OK
    assert "= compared with a run of other versions =" in output
    assert "vllm: 0.32.0 there, 0.33.0 here\ntorch: none there, 2 here\n" in output
    assert "test_work (NOW)" in output


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"gpus": [{**H100, "name": "NVIDIA H200"}]}, "GPU: NVIDIA H100 80GB with driver 550 there, NVIDIA H200 with"),
        ({"gpus": [{**H100, "driver": "560"}]}, "driver 550 there, NVIDIA H100 80GB with driver 560 here"),
        ({"gpus": [H100, H100]}, "driver 550 there, NVIDIA H100 80GB with driver 550, NVIDIA H100 80GB with driver"),
        ({"gpus": []}, "GPU: .* there, none here"),
        ({"cpu": {**MACHINE["cpu"], "cores": 4}}, "CPU: .*, 8 cores there, .*, 4 cores here"),  # type: ignore[dict-item]
    ],
    ids=["GPU", "driver", "GPUs", "no GPU", "cores"],
)
def test_another_machine_is_refused(
    session: Session, pytester: pytest.Pytester, machine: dict[str, Any], change: dict[str, Any], sentence: str
) -> None:
    session("--benchmark-autosave")
    [file] = saved(pytester.path)
    machine.update(change)
    code, output = session("--benchmark-compare", str(file))
    assert code == pytest.ExitCode.USAGE_ERROR
    [line] = errors(output)
    assert re.match(rf"ERROR: --benchmark-compare: the saved run is of another machine \(.*{sentence}", line), line
    assert line.endswith(": name one of this machine")
    assert "Traceback" not in output
    assert "INTERNALERROR" not in output


def test_another_gpu_has_a_folder_of_its_own(
    session: Session, pytester: pytest.Pytester, machine: dict[str, Any]
) -> None:
    session("--benchmark-autosave")
    machine["gpus"] = [H100, H100]
    assert session("--benchmark-autosave")[0] == pytest.ExitCode.OK
    machine["gpus"] = []
    session("--benchmark-autosave")
    assert [len(saved(pytester.path, name)) for name in ("NVIDIA-H100-80GB", "2-NVIDIA-H100-80GB", "a-CPU")] == [1] * 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--engine-option", "tensor_parallel_size=2"], "--engine-option: none there, tensor_parallel_size=2 here"),
        (["--full-size"], "--full-size: False there, True here"),
    ],
)
def test_other_work_is_refused(session: Session, options: list[str], sentence: str) -> None:
    session("--benchmark-autosave")
    code, output = session("--benchmark-compare", *options)
    assert code == pytest.ExitCode.USAGE_ERROR
    assert errors(output) == [
        f"ERROR: --benchmark-compare: the saved run is of other work ({sentence}): give the same options"
    ]


def test_fewer_models_are_no_other_work(session: Session) -> None:
    session("--benchmark-autosave")
    assert session("--benchmark-compare", "--model", "qwen3_vl")[0] == pytest.ExitCode.OK


@pytest.mark.parametrize(("mean", "code"), [(1e-12, 1), (3600.0, 0)])
def test_a_regression_fails_the_session(session: Session, pytester: pytest.Pytester, mean: float, code: int) -> None:
    session("--benchmark-autosave")
    [file] = saved(pytester.path)
    data = json.loads(file.read_text())
    data["benchmarks"][0]["stats"]["mean"] = mean
    file.write_text(json.dumps(data))
    found, output = session("--benchmark-compare", "--benchmark-compare-fail=mean:5%")
    assert found == code
    assert ("Performance has regressed" in output) == bool(code)
    assert "Traceback" not in output
    assert "1 passed" in output


def test_a_comparison_that_must_hold_needs_a_saved_run(session: Session) -> None:
    code, output = session("--benchmark-compare-fail=mean:5%")
    assert code == pytest.ExitCode.USAGE_ERROR
    [line] = errors(output)
    assert line.startswith("ERROR: --benchmark-compare-fail: there is no saved run to compare with: ")
    assert "Traceback" not in output


def test_the_users_storage_is_used(session: Session, pytester: pytest.Pytester) -> None:
    session("--benchmark-autosave", f"--benchmark-storage=file://{pytester.path}/mine")
    assert len(list((pytester.path / "mine").rglob("*.json"))) == 1
    assert not (pytester.path / "golden" / "benchmarks").exists()


@pytest.mark.parametrize("goldens", [True, False], ids=["nothing saved", "another project"])
def test_nothing_is_made_among_the_goldens(session: Session, pytester: pytest.Pytester, goldens: bool) -> None:
    if not goldens:
        (pytester.path / "golden").rmdir()
    code, _ = session(*([] if goldens else ["--benchmark-autosave"]))
    assert code == pytest.ExitCode.OK
    assert not (pytester.path / "golden" / "benchmarks").exists()
