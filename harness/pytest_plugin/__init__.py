"""Options, fixtures and hooks of the suites: wiring only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.version import Version

from harness import checkpoints, environment, matrix, models
from harness.engine import Arm
from harness.goldens import UPDATE_MODES, GoldenError, Goldens
from harness.pytest_plugin import benchmarks, differences
from harness.pytest_plugin.recorder import Recorder
from harness.pytest_plugin.saved import SavedRuns
from harness.pytest_plugin.subject import EnginePool, Subject

LEADING_MODEL = "qwen3_vl"
"""The one that the tests marked `once` run for, where no model is named."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of `pytest suites/`."""
    group = parser.getgroup("vllm-mm-embedding")
    group.addoption(
        "--model",
        action="append",
        metavar="NAME",
        help="embedded model, folder of a checkpoint or hub id; several may be given; by default all embedded ones",
    )
    group.addoption("--arm", action="append", choices=list(Arm), help="only these arms, where a test compares arms")
    group.addoption(
        "--full-size",
        action="store_true",
        help="embedded models with the published encoder's dimensions, in bfloat16 (for a GPU)",
    )
    group.addoption(
        "--engine-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="keyword argument of vLLM's EngineArgs for all engines, the value as YAML: tensor_parallel_size=2",
    )
    group.addoption(
        "--rounds", type=int, metavar="N", help="of a benchmark, by default 12 on a GPU, and 1 on a CPU to see it work"
    )
    group.addoption(
        "--reference-device",
        default="cpu",
        choices=["cpu", "cuda"],
        help="of the Hugging Face encoder; on a GPU a full-size one takes seconds instead of minutes (default: cpu)",
    )
    group.addoption(
        "--seconds",
        type=float,
        metavar="N",
        help="how long each benchmark runs, instead of --rounds: as many rounds as fit",
    )
    group.addoption(
        "--starts",
        type=int,
        default=1,
        metavar="N",
        help="how often a benchmark's engines start (default: 1), each time for --rounds rounds or its share of "
        "--seconds; two that start alike differ, which rounds do not show; a verdict over starts needs 6 of them",
    )
    group.addoption("--peers", action="store_true", help="benchmark other ways to get at embeddings too")
    group.addoption("--golden-store", type=Path, metavar="FOLDER", help="of the goldens of your own checkpoints")
    group.addoption("--golden-update", choices=UPDATE_MODES, help="record goldens")
    group.addoption("--results", type=Path, metavar="PATH", help="write all that was found to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    """Checks the options before anything is started."""
    config.addinivalue_line("markers", "clause(*ids): clauses of the contract that the test shows")
    config.addinivalue_line("markers", "suite(name): column of the report")
    config.addinivalue_line("markers", "once: what the test shows does not depend on the model, and takes many engines")
    results: Path | None = config.getoption("--results")
    if results is not None and (results.is_dir() or not results.parent.is_dir()):
        # Found out after hours, it would lose all that was measured.
        raise pytest.UsageError(f"--results: {results} cannot be written: name a file in a folder that exists")
    if config.getoption("--reference-device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--reference-device: torch finds no GPU here: leave the option out, or give cpu")
    for option in ("--rounds", "--starts"):
        if (number := config.getoption(option)) is not None and number < 1:
            raise pytest.UsageError(f"{option}: {number} must be 1 or more")
    if (seconds := config.getoption("--seconds")) is not None:
        if config.getoption("--rounds") is not None:
            raise pytest.UsageError("--seconds and --rounds both say how long a benchmark runs: give one of them")
        if not 0 < seconds < math.inf:
            raise pytest.UsageError(f"--seconds: {seconds} must be a finite number above 0")
    try:
        names = config.getoption("--model")
        config.stash[_MODELS] = [models.find(name) for name in names or matrix.load_all()]
    except (models.UnknownModelError, models.TooLargeError, matrix.SpecError) as error:
        raise pytest.UsageError(f"--model: {error}") from error
    config.stash[_ENGINE_OPTIONS] = _engine_options(config.getoption("--engine-option"))
    config.pluginmanager.register(
        Recorder(results, [spec for spec, _ in config.stash[_MODELS]]), "mm-embedding-recorder"
    )
    config.pluginmanager.register(differences, "mm-embedding-differences")
    config.pluginmanager.register(benchmarks, "mm-embedding-benchmarks")
    saved = SavedRuns(config, config.stash[_MODELS], config.getoption("--engine-option"))
    config.pluginmanager.register(saved, "mm-embedding-saved-runs")


_MODELS = pytest.StashKey[list[tuple[matrix.ModelSpec, Path | None]]]()
_ENGINE_OPTIONS = pytest.StashKey[dict[str, Any]]()


def _engine_options(given: list[str]) -> dict[str, Any]:
    options = {}
    for option in given:
        name, separator, value = option.partition("=")
        if not (name.isidentifier() and separator):
            raise pytest.UsageError(f"--engine-option: {option} must be NAME=VALUE, such as tensor_parallel_size=2")
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise pytest.UsageError(f"--engine-option: the value of {option} is not YAML ({error})") from error
    return options


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test of a subject once per model and, if it takes a case, once per case."""
    found = metafunc.config.stash[_MODELS]
    if "case" in metafunc.fixturenames:
        pairs = [(model, case) for model in found for case in model[0].cases]
        metafunc.parametrize(
            ("subject", "case"),
            pairs,
            indirect=["subject"],
            ids=[f"{m[0].name}-{c}" for m, c in pairs],
            scope="session",
        )
    elif "subject" in metafunc.fixturenames:
        metafunc.parametrize("subject", found, indirect=True, ids=[spec.name for spec, _ in found], scope="session")
    if "arm" in metafunc.fixturenames:
        metafunc.parametrize("arm", [Arm(arm) for arm in metafunc.config.getoption("--arm") or Arm])


def _is_thorough(config: pytest.Config, model: tuple[matrix.ModelSpec, Path | None]) -> bool:
    spec, folder = model
    return folder is not None or (spec.name == LEADING_MODEL and not config.getoption("--model"))


def _applies(item: pytest.Item, model: tuple[matrix.ModelSpec, Path | None], config: pytest.Config) -> bool:
    """Whether the test is run for the model."""
    suite = item.get_closest_marker("suite")
    if suite is not None and model[0].suites and suite.args[0] not in model[0].suites:
        return False
    return item.get_closest_marker("once") is None or _is_thorough(config, model)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Takes out what a model is not for and, for most, the tests marked `once`; puts each model's tests together.

    Pytest's own order goes through all models once a module, and starts their engines as often.
    """
    models = config.stash[_MODELS]
    kept: list[tuple[int, pytest.Item]] = []
    others: list[pytest.Item] = []
    for item in items:
        model = getattr(getattr(item, "callspec", None), "params", {}).get("subject")
        if not any(_applies(item, each, config) for each in ([model] if model is not None else models)):
            others.append(item)
        else:
            kept.append((len(models) if model is None else models.index(model), item))
    items[:] = [item for _, item in sorted(kept, key=lambda pair: pair[0])]
    if others:
        config.hook.pytest_deselected(items=others)


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
    if reason := spec.skip or _too_old(spec):
        pytest.skip(reason)
    full_size = request.config.getoption("--full-size")
    try:
        if folder is None and full_size:
            folder = checkpoints.build(spec.recipe, size="full", dtype="bfloat16")
        path = folder or checkpoints.build(spec.recipe)
        thorough = _is_thorough(request.config, request.param)
        options = request.config.stash[_ENGINE_OPTIONS]
        device = request.config.getoption("--reference-device")
        return Subject(
            spec,
            path,
            engine_pool,
            embedded=folder is None,
            thorough=thorough,
            reference_device=device,
            user_options=options,
        )
    except checkpoints.CheckpointError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def core(subject: Subject) -> None:
    """For tests that look into the engine core: skips them where it cannot be in the process of their functions."""
    subject.needs_core()


def _too_old(spec: matrix.ModelSpec) -> str | None:
    found = environment.versions()
    for package, needed in (("vllm", spec.min_vllm), ("transformers", spec.min_transformers)):
        if package in found and Version(found[package].split()[0]) < Version(needed):
            return f"{spec.name} needs {package} {needed} or newer and this is {found[package]}"
    return None


@pytest.fixture(scope="session")
def recorded(pytestconfig: pytest.Config, subject: Subject) -> Goldens:
    """The recorded embeddings of the model: an embedded one's are here, another's in the store, with its manifest."""
    store: Path | None = pytestconfig.getoption("--golden-store")
    if subject.embedded or store is None:
        return Goldens(pytestconfig.rootpath / "golden", subject.spec.name)
    return Goldens(store, subject.path.resolve().name, store=store)


@pytest.fixture
def goldens(recorded: Goldens, subject: Subject) -> Iterator[Goldens]:
    """Those, and an error behind the test that asks for the last of the model's cases if others are recorded."""
    yield recorded
    try:
        unused = recorded.unused(subject.spec.cases)
    except GoldenError:  # by which the test has failed
        return
    if unused:
        pytest.fail(unused, pytrace=False)


@pytest.fixture(scope="session")
def versions() -> dict[str, str]:
    """Versions of what computes."""
    return environment.versions()
