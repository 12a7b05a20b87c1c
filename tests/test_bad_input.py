"""What a user may get wrong: one sentence that names the option or file, and nothing lost."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from harness import checkpoints, environment
from harness.engine import EngineSpec
from harness.matrix import load_all
from harness.pytest_plugin.subject import EnginePool

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def session(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the suites with options; exit code and all that was printed."""

    def run(*options: str) -> tuple[int, str]:
        common = ["--rootdir", str(ROOT), "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "files")]
        code = pytest.main([f"{ROOT}/suites/test_golden.py", *common, *options])
        return int(code), "".join(capfd.readouterr())

    return run


def folder_with_config(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(content)
    return folder


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not JSON"),
        ("[]", "names no architectures"),
        ('{"architectures": []}', "names no architectures"),
        ('{"architectures": ["Gpt9"]}', "is a Gpt9 and has no processor: Unrecognized processing class"),
        (None, "cannot be read"),
    ],
)
def test_a_folder_that_is_no_checkpoint_of_a_known_family(
    session: Callable[..., tuple[int, str]], tmp_path: Path, content: str | None, sentence: str
) -> None:
    folder = tmp_path / "model"
    if content is None:
        folder.mkdir()
    else:
        folder_with_config(folder, content)
    code, output = session("--model", str(folder))
    assert code == pytest.ExitCode.USAGE_ERROR
    assert_one_sentence(output, rf"ERROR: --model: \S*{sentence}|ERROR: --model: \S* {sentence}")


def assert_one_sentence(output: str, pattern: str) -> None:
    lines = [line for line in output.splitlines() if line.startswith("ERROR: ")]
    assert len(lines) == 1, output
    assert re.match(pattern, lines[0]), lines[0]
    assert "Traceback" not in output


def test_an_unknown_model(session: Callable[..., tuple[int, str]]) -> None:
    code, output = session("--model", "qwen9")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert_one_sentence(output, "ERROR: --model: there is no model and no folder 'qwen9': .*qwen3_vl")


def test_a_model_that_no_gpu_here_holds_is_not_fetched(
    session: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = [8 * 2**30, 16 * 2**30]
    monkeypatch.setattr(environment, "gpus", lambda: [{"memory": each} for each in memory])
    fetched: list[str] = []

    def fetch(name: str, revision: str) -> str:
        fetched.append(name)
        raise OSError("there is no hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    omni = load_all()["qwen3_omni_moe"].hub_id
    code, output = session("--model", omni)
    assert code == pytest.ExitCode.USAGE_ERROR
    assert_one_sentence(output, rf"ERROR: --model: the weights of {omni} take 59.1 GiB and .* 16.0 GiB: use a larger")
    assert not fetched
    memory.append(80 * 2**30)
    _, output = session("--model", omni)
    assert_one_sentence(output, rf"ERROR: --model: {omni} is no folder and cannot be fetched")
    assert fetched == [omni]


def test_a_text_only_model(session: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    folder = checkpoints.build("qwen3_text", tmp_path / "text")
    code, output = session("--model", str(folder))
    assert code == pytest.ExitCode.USAGE_ERROR
    assert_one_sentence(
        output, r"ERROR: --model: \S*text is a Qwen3ForCausalLM, a text-only model: use a multimodal one"
    )


def test_a_hub_id_that_cannot_be_fetched(
    session: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    code, output = session("--model", "nobody/nothing")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert_one_sentence(output, "ERROR: --model: nobody/nothing is no folder and cannot be fetched from the hub: ")


@pytest.mark.parametrize("path", ["missing/results.json", "."])
def test_results_that_could_not_be_written_later(
    session: Callable[..., tuple[int, str]], tmp_path: Path, path: str
) -> None:
    code, output = session("--results", str(tmp_path / path))
    assert code == pytest.ExitCode.USAGE_ERROR
    assert_one_sentence(output, "ERROR: --results: .* cannot be written: name a file in a folder that exists")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--rounds=0"], "--rounds: 0 must be 1 or more"),
        (["--starts=0"], "--starts: 0 must be 1 or more"),
        (["--seconds=0"], "--seconds: 0.0 must be a finite number above 0"),
        (["--seconds=nan"], "--seconds: nan must be a finite number above 0"),
        (["--seconds=60", "--rounds=12"], "--seconds and --rounds both say how long a benchmark runs: give one"),
    ],
)
def test_a_benchmark_of_no_length(session: Callable[..., tuple[int, str]], options: list[str], sentence: str) -> None:
    code, output = session(*options)
    assert code == pytest.ExitCode.USAGE_ERROR
    assert_one_sentence(output, f"ERROR: {sentence}")


def test_a_reference_on_a_gpu_that_is_not_there(
    session: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, output = session("--reference-device=cuda")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert_one_sentence(output, "ERROR: --reference-device: torch finds no GPU here: leave the option out, or give cpu")


def test_a_cache_folder_that_cannot_be_written(
    session: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(checkpoints.CACHE_VARIABLE, str(tmp_path / "file"))
    code, output = session("-k", "two-images")
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "cannot build the checkpoint qwen3_vl in" in output
    assert f"set {checkpoints.CACHE_VARIABLE} to another folder" in output
    assert "Traceback" not in output
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize("limit", [1000, 50_000, 1_000_000], ids=["config", "tokenizer", "weights"])
def test_a_full_cache_folder(tmp_path: Path, limit: int) -> None:
    """The kernel refuses to write more than so many bytes to a file, as a full disk does."""
    program = (
        "import resource; from harness.checkpoints import build; import harness.checkpoints.recipes\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); build('qwen3_vl')"
    )
    done = subprocess.run(
        # -B: the limit would cut compiled modules short too
        [sys.executable, "-B", "-c", program],
        env={**os.environ, checkpoints.CACHE_VARIABLE: str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    *_trace, last = done.stderr.splitlines()
    assert last.startswith("harness.checkpoints.CheckpointError: cannot build the checkpoint qwen3_vl in"), done.stderr
    assert last.endswith(f"make room there or set {checkpoints.CACHE_VARIABLE} to another folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, "{}", "other"])
def test_a_folder_with_something_else_is_not_overwritten(tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes").write_text("mine")
    if content is not None:
        (folder / checkpoints.MARKER).write_text(content)
    with pytest.raises(checkpoints.CheckpointError, match="holds something else, not recipe qwen3_vl, size tiny"):
        checkpoints.build("qwen3_vl", folder)
    assert (folder / "notes").read_text() == "mine"


@pytest.mark.parametrize(
    ("recipe", "dtype", "sentence"),
    [("qwen9", "float32", "there is no recipe 'qwen9': use one of .*qwen3_vl"), ("qwen3_vl", "int8", "'int8' is no")],
)
def test_an_unknown_recipe_or_dtype(tmp_path: Path, recipe: str, dtype: str, sentence: str) -> None:
    with pytest.raises(checkpoints.CheckpointError, match=sentence):
        checkpoints.build(recipe, tmp_path / "new", dtype=dtype)
    assert not (tmp_path / "new").exists()


class FakeEngine:
    usable = True
    alive = True

    def __init__(self, spec: EngineSpec, *_args: object) -> None:
        self.spec = spec

    def wait(self) -> None:
        pass

    def shutdown(self) -> None:
        self.alive = False


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EnginePool:
    """Of engines that only say that they are there."""
    monkeypatch.setattr(importlib.import_module("harness.pytest_plugin.subject"), "Engine", FakeEngine)
    return EnginePool(tmp_path, lambda _line: None)


def test_engines_start_again(pool: EnginePool) -> None:
    specs = [EngineSpec("one"), EngineSpec("another")]
    old = pool.together(specs)
    new = pool.again(reversed(old))
    assert [engine.spec for engine in new] == specs[::-1]
    assert not any(cast("FakeEngine", engine).alive for engine in old), "an old one is still there"
    assert all(cast("FakeEngine", engine).alive for engine in new)
    assert pool.together(specs) == new[::-1], "the next test gets others"


def test_a_dead_engine_is_not_shared(pool: EnginePool) -> None:
    engine = pool.get(EngineSpec("model"))
    assert pool.get(EngineSpec("model")) is engine
    engine.usable = False
    assert pool.get(EngineSpec("model")) is not engine
    [engine] = pool.together([EngineSpec("model")])
    engine.usable = False
    assert pool.together([EngineSpec("model")]) != [engine]
