"""Options, fixtures and hooks of the suites: wiring only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import checkpoints, environment, matrix
from harness.engine import Arm
from harness.goldens import Goldens
from harness.pytest_plugin.recorder import Recorder
from harness.pytest_plugin.subject import EnginePool, Subject

DEFAULT_MODEL = "qwen3_vl"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of `pytest suites/`."""
    group = parser.getgroup("vllm-mm-embedding")
    group.addoption(
        "--model",
        action="append",
        metavar="NAME",
        help="embedded model or local checkpoint of one; may be given several times",
    )
    group.addoption("--arm", action="append", choices=list(Arm), help="only these arms, where a test compares arms")
    group.addoption("--golden-update", choices=["new", "changed", "all"], help="record goldens")
    group.addoption("--results", type=Path, metavar="PATH", help="write all that was found to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    """Checks the options before anything is started."""
    config.addinivalue_line("markers", "clause(*ids): clauses of the contract that the test shows")
    config.addinivalue_line("markers", "suite(name): column of the report")
    results: Path | None = config.getoption("--results")
    if results is not None and (results.is_dir() or not results.parent.is_dir()):
        # Found out after hours, it would lose all that was measured.
        raise pytest.UsageError(f"--results: {results} cannot be written: name a file in a folder that exists")
    try:
        config.stash[_MODELS] = [_find(name) for name in config.getoption("--model") or [DEFAULT_MODEL]]
    except (matrix.UnknownModelError, matrix.SpecError) as error:
        raise pytest.UsageError(f"--model: {error}") from error
    config.pluginmanager.register(Recorder(config), "mm-embedding-recorder")


_MODELS = pytest.StashKey[list[tuple[matrix.ModelSpec, Path | None]]]()


def _find(name: str) -> tuple[matrix.ModelSpec, Path | None]:
    folder = Path(name)
    if not folder.is_dir():
        return matrix.find(name), None
    return matrix.of_checkpoint(folder), folder


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test of a subject once per model and, if it takes a case, once per case."""
    models = metafunc.config.stash[_MODELS]
    if "case" in metafunc.fixturenames:
        pairs = [(model, case) for model in models for case in model[0].cases]
        metafunc.parametrize(
            ("subject", "case"),
            pairs,
            indirect=["subject"],
            ids=[f"{m[0].name}-{c}" for m, c in pairs],
            scope="session",
        )
    elif "subject" in metafunc.fixturenames:
        metafunc.parametrize("subject", models, indirect=True, ids=[spec.name for spec, _ in models], scope="session")
    if "arm" in metafunc.fixturenames:
        metafunc.parametrize("arm", [Arm(arm) for arm in metafunc.config.getoption("--arm") or Arm])


@pytest.fixture(scope="session")
def engine_pool(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[EnginePool]:
    """The engines of this session."""
    reporter = pytestconfig.pluginmanager.getplugin("terminalreporter")
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def progress(line: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(f"[engine] {line}")

    pool = EnginePool(tmp_path_factory.mktemp("engines"), progress)
    yield pool
    pool.shutdown()


@pytest.fixture(scope="session")
def subject(request: pytest.FixtureRequest, engine_pool: EnginePool) -> Subject:
    """The model under test."""
    spec, folder = request.param
    if spec.skip:
        pytest.skip(spec.skip)
    try:
        return Subject(spec, folder or checkpoints.build(spec.recipe), engine_pool, embedded=folder is None)
    except checkpoints.CheckpointError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def goldens(pytestconfig: pytest.Config, subject: Subject) -> Goldens:
    """The recorded embeddings of the model."""
    return Goldens(pytestconfig.rootpath / "golden", subject.spec.name)


@pytest.fixture(scope="session")
def versions() -> dict[str, str]:
    """Versions of what computes."""
    return environment.versions()
