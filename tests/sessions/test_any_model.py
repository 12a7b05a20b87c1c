"""Whole sessions of the suites, inside a test: a model in a new file, one that no file is of, and one from the hub."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import checkpoints, matrix
from harness.results import Results, TestRecord

pytestmark = pytest.mark.timeout(240)
ROOT = Path(__file__).resolve().parents[2]

Session = Callable[..., list[TestRecord]]


@pytest.fixture
def session(tmp_path: Path) -> Session:
    """Runs tests of the suites with options, and gives their records."""

    def run(test: str, *options: str) -> list[TestRecord]:
        results = tmp_path / "results.json"
        common = ["--rootdir", str(ROOT), "--results", str(results), "-p", "no:cacheprovider", "-q"]
        with warnings.catch_warnings():
            warnings.resetwarnings()  # as in a session of the suites, where a library's warning is no error
            pytest.main([f"{ROOT}/suites/{test}", *common, "--basetemp", str(tmp_path / "files"), *options])
        return Results.read(results).records

    return run


def outcomes(records: list[TestRecord]) -> set[tuple[str, str]]:
    return {(record.suite, record.outcome) for record in records}


def test_adding_a_model_is_adding_a_file(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "matrix"
    folder.mkdir()
    text = (matrix.FOLDER / "qwen3_vl.yaml").read_text()
    (folder / "mine.yaml").write_text(text.replace("cases: [", "cases: [image] # ["))
    monkeypatch.setattr(matrix, "FOLDER", folder)
    records = session("test_reference.py")
    assert {record.model for record in records} == {"mine"}
    assert outcomes(records) == {("encoder", "passed"), ("preprocessing", "passed"), ("tokens", "passed")}


def test_a_checkpoint_that_no_file_is_of(session: Session, tmp_path: Path) -> None:
    folder = checkpoints.build("llava_next", tmp_path / "mine")
    records = session("test_reference.py", "--model", str(folder))
    assert {record.case for record in records} >= {"image", "two-images", "image-between-texts"}
    assert outcomes(records) == {("encoder", "passed"), ("preprocessing", "passed"), ("tokens", "skipped")}


def test_a_hub_id(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "hub" / "models--Qwen--Qwen3-VL-4B-Instruct"
    shutil.copytree(checkpoints.build("qwen3_vl"), repository / "snapshots" / "0123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    records = session("test_reference.py", "--model", "Qwen/Qwen3-VL-4B-Instruct", "-k", "encoder and two-images")
    assert [(record.model, record.outcome) for record in records] == [("qwen3_vl", "passed")]
