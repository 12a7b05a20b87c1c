"""The goldens hold on a machine without AVX-512, and without AVX2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

CAPABILITY = "import torch; print(torch.backends.cpu.get_cpu_capability())"


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("aten", "onednn"), [("avx2", "AVX2"), ("default", "SSE41")])
def test_goldens_hold_with_a_lesser_cpu(tmp_path: Path, aten: str, onednn: str) -> None:
    """A process of its own: both libraries read the variables once, when they are loaded."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn}
    found = subprocess.run(
        [sys.executable, "-c", CAPABILITY], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip().lower() == aten
    tests = ["suites/test_golden.py", "--model", "qwen3_vl", "--rootdir", str(ROOT), "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *tests, "--basetemp", str(tmp_path / "files")],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
