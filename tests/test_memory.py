"""Memory of a tree of processes, against processes that hold a known amount."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from harness.memory import cpu_bytes, mapped_bytes, tree, watched

MIB = 1 << 20
SIZE = 64 * MIB

READY = "print(flush=True); time.sleep(60)"
MEMFD = "descriptor = os.memfd_create('test'); os.write(descriptor, bytes(SIZE))"
HOLDS = {
    "nothing": READY,
    "private": f"held = bytearray(b'1') * SIZE; {READY}",
    "memfd": f"{MEMFD}; {READY}",
    "memfd, mapped": f"{MEMFD}; mapped = mmap.mmap(descriptor, SIZE); mapped[:]; {READY}",
    "memfd, two processes": f"{MEMFD}; os.fork() or time.sleep(60); {READY}",
    "memfd, a child's": f"os.fork() and time.sleep(60); {MEMFD}; {READY}",
    "memfd, closed": f"{MEMFD}; os.close(descriptor); {READY}",
}
"""Programs; each says when it is ready."""


@contextmanager
def holding(what: str) -> Iterator[int]:
    """Process id of one that holds SIZE bytes so."""
    program = f"import mmap, os, time; SIZE = {SIZE}; {HOLDS[what]}"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    below = tree(process.pid)[1:]
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        for child in below:
            child.kill()


@pytest.mark.parametrize("what", [name for name in HOLDS if name not in ("nothing", "memfd, closed")])
def test_what_is_held_is_counted_once(what: str) -> None:
    with holding("nothing") as other, holding(what) as pid:
        processes = len(tree(pid))
        held = cpu_bytes(pid) - processes * cpu_bytes(other)
        # A forked child shares most of its pages with its parent, whose share is counted once.
        assert SIZE - 12 * MIB * (processes - 1) - MIB <= held <= SIZE + 2 * MIB, f"{held / MIB:.1f} MiB"


def test_what_was_given_back_is_not_counted() -> None:
    with holding("nothing") as other, holding("memfd, closed") as pid:
        assert abs(cpu_bytes(pid) - cpu_bytes(other)) < 2 * MIB


def test_what_is_mapped_is_told_by_the_files_name() -> None:
    with holding("memfd, mapped") as pid:
        assert mapped_bytes(pid, "/memfd:test") == SIZE
        assert mapped_bytes(pid, "/memfd:tes") == mapped_bytes(pid, "/memfd:tests") == 0
    with holding("memfd") as pid:
        assert mapped_bytes(pid, "/memfd:test") == 0
    assert mapped_bytes(pid, "/memfd:test") == 0, "it has ended"


def test_a_process_that_is_gone_has_no_memory() -> None:
    with holding("private") as pid:
        assert cpu_bytes(pid) > SIZE
    assert tree(pid) == []
    assert cpu_bytes(pid) == 0


def test_a_peak_is_seen() -> None:
    # One MiB more than is asked for: the share of the interpreter's own pages shrinks with each process that starts.
    program = f"""
import sys
held = None
for line in sys.stdin:
    held = bytearray(b"1") * {SIZE + MIB} if line == "take\\n" else None
    print(flush=True)
"""
    with ExitStack() as stack:
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None
        stack.callback(stdin.close)
        stack.callback(stdout.close)

        def say(line: str) -> None:
            stdin.write(f"{line}\n")
            stdout.readline()

        say("give")
        with watched(process.pid, 0.01) as watch:
            say("take")
            while len(watch.samples) < 100 and max(watch.samples, default=0) < watch.before + SIZE:
                pass
            say("give")
        assert watch.peak - watch.before >= SIZE
        assert watch.after - watch.before < MIB
