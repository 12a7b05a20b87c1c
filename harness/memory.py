"""CPU memory of a tree of processes, shared memory counted once, and GPU memory of one."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil


def tree(pid: int) -> list[psutil.Process]:
    """The process and everything below it."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def cpu_bytes(pid: int) -> int:
    """Memory of the tree: its proportional set size (PSS) and the shared memory that it holds.

    The PSS leaves out pages of a shared file that nobody has mapped, such as those that are only read with pread; so
    shared pages are taken from the files themselves, each once, and left out of the PSS.
    """
    private, shared = 0, {}
    for process in tree(pid):
        with contextlib.suppress(OSError):
            private += _rollup(process.pid, "Pss") - _rollup(process.pid, "Pss_Shmem")
            shared.update(_shared_files(process.pid))
    return private + sum(shared.values())


def _rollup(pid: int, key: str) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return 0


def _shared_files(pid: int) -> dict[tuple[int, int], int]:
    """Allocated bytes of the files of shared memory that the process has open, by device and inode."""
    found = {}
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(descriptor.readlink())
            if target.startswith(("/memfd:", "/dev/shm/")):
                stat = descriptor.stat()
                found[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
    return found


def mapped_bytes(pid: int, name: str) -> int:
    """Bytes of address space at which the process maps files of that name; 0 if it has ended."""
    found = 0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            addresses, *_, path = line.split(maxsplit=5)
            if path.removesuffix(" (deleted)") == name:  # as a memfd always is
                start, stop = (int(address, 16) for address in addresses.split("-"))
                found += stop - start
    return found


@dataclass
class Watch:
    """What `watched` saw.

    Attributes:
        before: bytes at the start.
        peak: largest of the samples.
        after: bytes at the end.
    """

    before: int
    peak: int
    after: int = 0
    samples: list[int] = field(default_factory=list)


@contextlib.contextmanager
def watched(pid: int, seconds: float = 0.1) -> Iterator[Watch]:
    """Samples cpu_bytes of the tree in a thread, that often, while the body runs."""
    watch = Watch(before := cpu_bytes(pid), before)
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(seconds):
            watch.samples.append(cpu_bytes(pid))

    thread = threading.Thread(target=sample, name="memory")
    thread.start()
    try:
        yield watch
    finally:
        stop.set()
        thread.join()
        watch.after = cpu_bytes(pid)
        watch.peak = max([watch.before, watch.after, *watch.samples])


def gpu_bytes(pid: int) -> int | None:
    """GPU memory of the tree, from nvidia-smi; None where it cannot be told (no GPU, or hidden process ids)."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    pids = {process.pid for process in tree(pid)}
    rows = [line.split(",") for line in lines if line.count(",") == 1]
    found = [int(used) * 2**20 for owner, used in rows if used.strip().isdigit() and int(owner) in pids]
    return sum(found) if found else None
