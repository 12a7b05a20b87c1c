"""The table of patches against the installed vLLM, and the mechanism on modules of its own."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from harness.capture import arguments, engine_core, frontend, http
from harness.capture.patches import Patch, UnsupportedVLLMError, install, vllm_version, when_imported

ALL = (*arguments.PATCHES, *engine_core.PATCHES, *frontend.PATCHES, *frontend.OFFLINE_PATCHES, *http.PATCHES)


@pytest.mark.parametrize("patch", ALL, ids=lambda patch: patch.name)
def test_the_installed_vllm_has_each_target_as_pinned(patch: Patch) -> None:
    target: Any = importlib.import_module(patch.module)
    for part in patch.name.split("."):
        target = inspect.getattr_static(target, part)
    target = inspect.unwrap(getattr(target, "__func__", target))
    assert tuple(inspect.signature(target).parameters) == patch.parameters
    assert patch.why
    assert patch.remove_when


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with a function, that changes its own spec and notes when its code ran to the end."""
    name = "patched_module"
    (tmp_path / f"{name}.py").write_text(
        "__spec__.loader_state = None\nclass Owner:\n    def method(self, value):\n        return value\nDONE = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def twice(original: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(original)
    def method(self: object, value: int) -> int:
        return 2 * original(self, value)

    return method


def test_a_target_is_wrapped_once(module: str) -> None:
    patch = Patch(module, "Owner.method", ("self", "value"), twice, "why", "when")
    install([patch])
    install([patch])
    assert importlib.import_module(module).Owner().method(3) == 6


@pytest.mark.parametrize("change", [{"parameters": ("self", "other")}, {"name": "Owner.gone"}, {"name": "Gone.method"}])
def test_a_changed_target_is_refused_and_nothing_is_wrapped(module: str, change: dict[str, Any]) -> None:
    good = Patch(module, "Owner.method", ("self", "value"), twice, "why", "when")
    with pytest.raises(UnsupportedVLLMError, match=r"patched_module\.\w+\.\w+ of the installed vLLM"):
        install([good, replace(good, **change)])
    assert importlib.import_module(module).Owner().method(3) == 3


def test_callbacks_run_after_the_import_and_all_of_them(module: str) -> None:
    seen: list[bool] = []
    for _ in range(2):
        when_imported(module, lambda: seen.append(sys.modules[module].__dict__.get("DONE", False)))
    assert seen == []
    spec = importlib.import_module(module).__spec__
    assert seen == [True, True]
    assert type(spec) is ModuleSpec, "the module's spec is still watched"
    assert not spec._initializing, "the import has no end for the threads that wait for it"  # type: ignore[attr-defined]
    when_imported(module, lambda: seen.append(True))
    assert seen == [True, True, True]


def test_a_callback_asked_for_during_the_import_waits_for_its_end(module: str, tmp_path: Path) -> None:
    (tmp_path / "asker.py").write_text("import builtins; builtins.ask_for_callback()")
    path = tmp_path / f"{module}.py"
    path.write_text("import asker\n" + path.read_text())
    seen: list[bool] = []
    import builtins

    builtins.ask_for_callback = lambda: when_imported(  # type: ignore[attr-defined]
        module, lambda: seen.append(sys.modules[module].__dict__.get("DONE", False))
    )
    try:
        importlib.import_module(module)
    finally:
        del builtins.ask_for_callback  # type: ignore[attr-defined]
        sys.modules.pop("asker", None)
    assert seen == [True]


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "0.320.0", "dev"])
def test_an_unsupported_version_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.version.__version__", version)
    with pytest.raises(UnsupportedVLLMError, match=f"found {version}: install one of them"):
        vllm_version()


@pytest.mark.parametrize("version", ["0.32", "0.32.1", "0.33.0", "0.33.0.dev1+cpu"])
def test_a_supported_version(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.version.__version__", version)
    assert vllm_version() == version


def test_capture_imports_nothing_else_of_the_harness() -> None:
    for path in Path(arguments.__file__).parent.glob("*.py"):
        for line in path.read_text().splitlines():
            if line.lstrip().startswith(("from harness", "import harness")):
                assert "harness.capture" in line, f"{path.name}: {line}"


@pytest.mark.parametrize("name", ["store", "transport", "arena", "writer", "reader"])
def test_the_store_and_what_is_below_it_import_no_vllm(name: str) -> None:
    assert "vllm" not in {
        word.partition(".")[0]
        for line in (Path(arguments.__file__).parent / f"{name}.py").read_text().splitlines()
        if line.startswith(("import ", "from "))
        for word in line.split()[1:2]
    }
