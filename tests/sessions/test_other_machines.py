"""The goldens hold on a machine without AVX-512, and where torch does without AVX2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

CAPABILITY = "import torch; print(torch.backends.cpu.get_cpu_capability(), torch.cpu._is_avx512_supported())"


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("aten", "onednn", "model"),
    [
        ("avx2", "AVX2", "qwen3_5"),  # in bfloat16, for which vLLM has other kernels where the CPU has AVX-512
        ("default", "SSE41", "gemma3"),  # whose published way of resizing gives other pixels without AVX2
    ],
)
def test_goldens_hold_with_a_lesser_cpu(tmp_path: Path, aten: str, onednn: str, model: str) -> None:
    """A process of its own: both libraries read the variables once, when they are loaded."""
    path = os.pathsep.join([str(ROOT / "tests/sessions/lesser_cpu"), str(ROOT)])
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn, "PYTHONPATH": path}
    found = subprocess.run(
        [sys.executable, "-c", CAPABILITY], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == [aten.upper(), "False"]
    tests = ["suites/test_golden.py", "--model", "qwen3_vl", "--model", model]
    options = ["--rootdir", str(ROOT), "-p", "no:cacheprovider", "-q", "--basetemp", str(tmp_path / "files")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *tests, *options],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
