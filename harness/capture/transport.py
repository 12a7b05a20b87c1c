"""What the owner, the writer and the reader of the shared memory have in common: addresses, and access to them.

The owner (arena.Arena, in the engine core) allocates *blocks* in memfd segments and grants *leases* on them. The writer
(writer.Writer, in the worker) copies rows into a block and then stamps the block's header with its generation. The
reader (reader.read, in the frontend) waits for the stamps, copies the rows out, checks that its lease was alive all the
while, and marks the lease as done in the ledger, one more memfd. Nothing is sent back.

The segments have no name in any file system: other processes of the same user open them through /proc/<pid>/fd, and
the kernel frees them when the processes are gone, however they ended. Where a reader cannot (`whereabouts` differ), the
owner reads for it, and reader.pack and reader.unpack are for sending the rows.

Why a reader never sees foreign bytes: a block is freed only after its leases are done or expired; the owner withdraws
an expired lease in the ledger *before* it frees the block; and the reader looks at the ledger after its copy. The
header tells when the data is there. A header may hold anything before its stamp (another block's data was there);
generations start at a random number, so that no data looks like a stamp.
"""

from __future__ import annotations

import functools
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

HEADER_BYTES = 64
"""Bytes before a block's data; the first eight are the stamp. Also the alignment of the data."""

WORD = 8
SLOT_BYTES = 2 * WORD  # of the ledger: the word that the owner writes, the word that the reader writes
FAILED = 1 << 62  # set in a stamp: the writer has no data for this generation. Generations stay below it.


class TransportError(RuntimeError):
    """The rows cannot be had through the shared memory; the base of all its errors."""


class BlockGone(TransportError):  # noqa: N818 - the state that it reports
    """The memory is not the reader's any more: the owner ended, or the lease expired, was cancelled or read before."""


class TransportTimeout(TransportError):  # noqa: N818 - the state that it reports
    """The writer did not stamp a block in time."""


class CaptureFailed(TransportError):  # noqa: N818 - the state that it reports
    """The writer stamped that it has no data for the block."""


class SegmentId(NamedTuple):
    """A memfd of the owner. The inode tells it from a later file that got the same descriptor."""

    fd: int
    inode: int


class Address(NamedTuple):
    """What another process needs to open the owner's segments; picklable.

    `started` (clock ticks since boot, field 22 of /proc/<pid>/stat) tells the owner from a later process of the same
    pid. All memfds lie on one kernel-internal `device`.
    """

    pid: int
    started: int
    device: int
    ledger: SegmentId


class Block(NamedTuple):
    """`nbytes` of data behind a header of HEADER_BYTES at `offset` of a segment; picklable."""

    segment: SegmentId
    offset: int
    nbytes: int
    generation: int


class Span(NamedTuple):
    """Rows in a block, as the reader gets them: shape (num_rows, width) of the torch dtype of that name."""

    block: Block
    num_rows: int
    width: int
    dtype: str


class Lease(NamedTuple):
    """A reader's hold on blocks, until it is done or `deadline` (time.monotonic) has passed."""

    slot: int
    generation: int
    deadline: float


def footprint(nbytes: int) -> int:
    """Bytes that a block of `nbytes` data takes in an arena: header and alignment included."""
    return HEADER_BYTES + round_up(nbytes, HEADER_BYTES)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not less."""
    return -(-value // multiple) * multiple


def read_word(fd: int, offset: int) -> int:
    """The WORD bytes there as a number. Stamps and leases are such words, written and read at once."""
    return int.from_bytes(os.pread(fd, WORD, offset), "little")


def write_word(fd: int, offset: int, value: int) -> None:
    """Writes a number for `read_word`."""
    os.pwrite(fd, value.to_bytes(WORD, "little"), offset)


def process_start(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None if it has ended (a zombie has)."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:  # noqa: PTH123 - as in opened
            stat = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(b")")[2].split()  # the name before it may hold anything
    return None if fields[0] in b"ZXx" else int(fields[19])


@functools.cache
def whereabouts() -> str:
    """Where this process runs: which kernel, pid and user namespace, and user. Where two are equal, each can open the
    other's segments. It may be possible elsewhere too, but pids and user ids there may also mean others. What cannot
    be told (a sandbox without these files) is equal to nothing.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespaces = [Path(f"/proc/self/ns/{kind}").stat().st_ino for kind in ("pid", "user")]
    except OSError:
        return secrets.token_hex()
    return f"{boot} {namespaces} {os.geteuid()}"


@contextmanager
def opened(address: Address, segment: SegmentId, flags: int) -> Iterator[int]:
    """A descriptor of the owner's segment.

    Raises:
        BlockGone: the owner ended, or its descriptor is another file now.
        TransportError: this process may not open it.
    """
    path = _path(address, segment)
    try:
        if not _is(os.stat(path), address, segment):  # noqa: PTH116 - runs beside the event loop: pathlib takes thrice
            raise FileNotFoundError  # before the open, which can have effects on a foreign file
        fd = os.open(path, flags | os.O_CLOEXEC)
    except PermissionError as error:
        if not lives(address):
            raise owner_gone(address) from error
        raise TransportError(
            f"cannot open the shared memory of process {address.pid}: run all processes of vLLM as the same user"
        ) from error
    except OSError as error:
        raise owner_gone(address) from error
    try:
        if not _is(os.fstat(fd), address, segment) or not lives(address):
            raise owner_gone(address)
        yield fd
    finally:
        os.close(fd)


def _path(address: Address, segment: SegmentId) -> str:
    return f"/proc/{address.pid}/fd/{segment.fd}"


def _is(stat: os.stat_result, address: Address, segment: SegmentId) -> bool:
    return (stat.st_dev, stat.st_ino) == (address.device, segment.inode)


def exists(address: Address, segment: SegmentId) -> bool:
    """Whether the owner still has the segment."""
    with suppress(OSError):
        return _is(os.stat(_path(address, segment)), address, segment)  # noqa: PTH116 - as in opened
    return False


def lives(address: Address) -> bool:
    """Whether the owner has not ended."""
    return process_start(address.pid) == address.started


def owner_gone(address: Address) -> BlockGone:
    """The error for a segment that the owner has no more."""
    return BlockGone(
        f"the embeddings are gone, because process {address.pid} (vLLM's engine core) ended or gave the memory back: "
        "send the request again"
    )
