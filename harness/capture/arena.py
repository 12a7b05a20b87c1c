"""Owner's side of the shared memory, in the engine core: blocks in segments, and the ledger of leases."""

from __future__ import annotations

import mmap
import os
import secrets
import time
from collections.abc import Sequence
from typing import Any

from harness.capture.transport import (
    FAILED,
    SLOT_BYTES,
    Address,
    Block,
    Lease,
    SegmentId,
    Span,
    footprint,
    process_start,
    read_word,
    round_up,
    write_word,
)

SEGMENT_BYTES = 32 << 20
"""Of shared memory, which grows and shrinks by as much; the last segment stays."""


def _memfd(name: str, nbytes: int) -> SegmentId:
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.fchmod(fd, 0o600)
    os.ftruncate(fd, nbytes)
    return SegmentId(fd, os.fstat(fd).st_ino)


class _Segment:
    """One memfd and its free extents: sorted, disjoint and never adjacent (start, stop).

    Attributes:
        largest: bytes of the largest extent. An allocation looks at hundreds of segments that are full.
    """

    def __init__(self, nbytes: int) -> None:
        self.id = _memfd("vllm-mm-embedding", nbytes)
        self.nbytes = nbytes
        self.free = [(0, nbytes)]
        self.largest = nbytes

    @property
    def is_empty(self) -> bool:
        return self.free == [(0, self.nbytes)]

    def take(self, nbytes: int) -> int:
        """Where; there is an extent that is large enough."""
        index, (start, stop) = next(pair for pair in enumerate(self.free) if pair[1][1] - pair[1][0] >= nbytes)
        self.free[index : index + 1] = [(start + nbytes, stop)] if start + nbytes < stop else []
        self._measure()
        return start

    def give(self, start: int, stop: int) -> None:
        index = next((i for i, extent in enumerate(self.free) if extent[0] > start), len(self.free))
        if index < len(self.free) and self.free[index][0] == stop:
            stop = self.free.pop(index)[1]
        if index > 0 and self.free[index - 1][1] == start:
            index -= 1
            start = self.free.pop(index)[0]
        self.free.insert(index, (start, stop))
        self._measure()

    def _measure(self) -> None:
        self.largest = max((stop - start for start, stop in self.free), default=0)

    def close(self) -> None:
        # A process that still maps the segment would keep its pages. Punched out, they go now; a late copy of the
        # writer finds zeros there instead of a signal, which it would after a truncation.
        with mmap.mmap(self.id.fd, self.nbytes) as pages:
            pages.madvise(mmap.MADV_REMOVE)
        os.close(self.id.fd)


class _Ledger:
    """The slots of the leases, of two words: the owner's (a lease's generation, or 0) and the reader's, which ends it.

    Mapped, because a lease is granted, looked at and withdrawn while the engine's step waits, and a system call takes
    most of that time.
    """

    def __init__(self) -> None:
        self.id = _memfd("vllm-mm-embedding-ledger", mmap.PAGESIZE)
        self._map()

    def _map(self) -> None:
        self._pages = mmap.mmap(self.id.fd, 0)
        self._words = memoryview(self._pages).cast("Q")  # a word is written and read at once

    def write(self, slot: int, generation: int) -> None:
        if slot * SLOT_BYTES >= len(self._pages):
            self._grow(slot)
        self._words[2 * slot] = generation

    def _grow(self, slot: int) -> None:
        nbytes = len(self._pages)
        while slot * SLOT_BYTES >= nbytes:
            nbytes *= 2
        os.ftruncate(self.id.fd, nbytes)
        pages, words = self._pages, self._words
        self._map()  # may fail: the leases that there are need the old one then
        words.release()
        pages.close()

    def read(self, num_slots: int) -> bytes:
        return self._pages[: num_slots * SLOT_BYTES]

    def close(self) -> None:
        self._words.release()
        self._pages.close()
        os.close(self.id.fd)


class Arena:
    """Owner side: blocks in memfd segments, and the ledger of leases. Not thread-safe.

    Args:
        capacity_bytes: cap of the blocks' footprints together.
        segment_bytes: size of a segment; a larger block gets a segment of its own.
        lease_seconds: a lease that is not done by then has expired (its reader died).
        retain_seconds: how long after the last allocation or lease the segments without blocks are kept. The writer's
            device needs about 1 ms a MiB to get used to a new one, and may finish all its work before it lets one go:
            a load keeps what it has needed, up to the cap, until it has ended.
    """

    def __init__(
        self,
        capacity_bytes: int,
        segment_bytes: int = SEGMENT_BYTES,
        lease_seconds: float = 120.0,
        retain_seconds: float = 30.0,
    ) -> None:
        if capacity_bytes <= 0 or segment_bytes <= 0 or lease_seconds <= 0 or retain_seconds < 0:
            raise ValueError(
                "capacity_bytes, segment_bytes and lease_seconds must be positive, and retain_seconds not negative"
            )
        self.capacity_bytes = capacity_bytes
        self._segment_bytes = round_up(segment_bytes, mmap.PAGESIZE)
        self._lease_seconds = lease_seconds
        self._retain_seconds = retain_seconds
        self._segments: dict[SegmentId, _Segment] = {}  # oldest first: filled first, so that the newest drain
        self._blocks: dict[int, Block] = {}
        self._last_use = 0.0  # time.monotonic
        self._next_generation = 1 + secrets.randbits(61)
        self._leases: dict[int, Lease] = {}
        self._free_slots: list[int] = []
        self._num_slots = 0
        self._looked_at = b""  # the ledger, when `reap` went through it
        self.made: list[SegmentId] = []  # since `take_made`
        self.held_bytes = 0
        self.mapped_bytes = 0  # size of all segments; above the cap only while fragments of blocks in use force it
        self._closed = False
        self._ledger = _Ledger()
        ledger = self._ledger.id
        started = process_start(os.getpid())
        assert started is not None
        self.address = Address(os.getpid(), started, os.fstat(ledger.fd).st_dev, ledger)

    def allocate(self, nbytes: int, *, fragmented: bool = False) -> Block | None:
        """A block for `nbytes` of data, or None if there is no room below the cap now.

        Free bytes may lie in pieces too small for the block. A new segment for it may then exceed the cap of the mapped
        bytes, which happens only if `fragmented` allows it.
        """
        needed = footprint(nbytes)
        if self.held_bytes + needed > self.capacity_bytes:
            return None
        for segment in self._segments.values():
            if segment.largest >= needed:
                break
        else:
            size = round_up(max(needed, self._segment_bytes), mmap.PAGESIZE)
            for segment in self._empty():  # too small for this block
                if self.mapped_bytes + size > self.capacity_bytes:
                    self._give_back(segment)
            room = self.capacity_bytes - self.mapped_bytes
            if needed > room and not fragmented:
                return None
            segment = _Segment(round_up(max(needed, min(size, room)), mmap.PAGESIZE))
            self._segments[segment.id] = segment
            self.mapped_bytes += segment.nbytes
            self.made.append(segment.id)
        block = Block(segment.id, segment.take(needed), nbytes, self._generation())
        self._blocks[block.generation] = block
        self._last_use = time.monotonic()
        self.held_bytes += needed
        return block

    def free(self, block: Block) -> None:
        """Takes a block back; trim() gives back the segments that hold none.

        An older copy to these bytes may still be queued on the writer's stream when they get a new block. The copies of
        one writer run in order and each stamp follows its data, so that whoever waits for the new generation's stamp
        gets the new data.
        """
        del self._blocks[block.generation]  # KeyError: freed before
        write_word(block.segment.fd, block.offset, 0)
        segment = self._segments[block.segment]
        needed = footprint(block.nbytes)
        segment.give(block.offset, block.offset + needed)
        self.held_bytes -= needed
        if segment.is_empty and self.mapped_bytes > self.capacity_bytes:
            self._give_back(segment)

    def trim(self) -> bool:
        """Gives back what is empty `retain_seconds` after the last use, up to one segment.

        Returns:
            Whether there may be more to come.
        """
        if time.monotonic() < self._last_use + self._retain_seconds:
            return bool(self._segments)
        empty = sorted(self._empty(), key=lambda segment: segment.nbytes)
        for segment in empty if empty and empty[0].nbytes > self._segment_bytes else empty[1:]:
            self._give_back(segment)
        return False

    def failed(self, block: Block) -> bool:
        """Whether the writer stamped that it has no data for this block."""
        return read_word(block.segment.fd, block.offset) == block.generation | FAILED

    def stamped(self, block: Block) -> bool:
        """Whether the writer has copied the block's data."""
        return read_word(block.segment.fd, block.offset) == block.generation

    def take_made(self) -> list[SegmentId]:
        """The segments made since the last call and still there, for Writer.prepare."""
        made, self.made = [segment for segment in self.made if segment in self._segments], []
        return made

    def lease(self) -> Lease:
        """Grants a lease; the caller keeps the blocks that it covers until reap() returns it."""
        if self._free_slots:
            slot = self._free_slots.pop()
        else:
            slot, self._num_slots = self._num_slots, self._num_slots + 1
        self._last_use = time.monotonic()
        lease = Lease(slot, self._generation(), self._last_use + self._lease_seconds)
        self._ledger.write(slot, lease.generation)
        self._leases[lease.generation] = lease
        return lease

    def handle(self, lease: Lease, spans: Sequence[Span]) -> dict[str, Any]:
        """What reader.read takes: a dict of integers, strings and lists."""
        address = self.address
        return {
            "owner": [address.pid, address.started, address.device, *address.ledger],
            "lease": [lease.slot, lease.generation],
            "spans": [
                [*s.block.segment, s.block.offset, s.block.nbytes, s.block.generation, s.num_rows, s.width, s.dtype]
                for s in spans
            ],
        }

    def withdraw(self, lease: Lease) -> None:
        """Ends a lease: from now on its reader gets BlockGone. Nothing happens if it has ended before."""
        if self._leases.pop(lease.generation, None) is not None:
            self._ledger.write(lease.slot, 0)
            self._free_slots.append(lease.slot)

    def reap(self) -> tuple[list[Lease], list[Lease]]:
        """Ends the leases that are done and those that have expired, and returns both lists."""
        if not self._leases:
            return [], []
        ledger = self._ledger.read(self._num_slots)
        now = time.monotonic()
        # Leases are in the order of their deadlines. A step may admit many requests, and each of them asks.
        if ledger == self._looked_at and now < next(iter(self._leases.values())).deadline:
            return [], []
        self._looked_at = ledger
        words = memoryview(ledger).cast("Q")
        done = [lease for lease in self._leases.values() if words[2 * lease.slot + 1] == lease.generation]
        for lease in done:
            self.withdraw(lease)
        expired = [lease for lease in self._leases.values() if lease.deadline <= now]
        for lease in expired:
            self.withdraw(lease)
        return done, expired

    def close(self) -> None:
        """Withdraws all leases and gives all memory back, also that which a process still maps."""
        if self._closed:
            return
        self._closed = True
        for lease in list(self._leases.values()):
            self.withdraw(lease)
        for segment in list(self._segments.values()):
            self._give_back(segment)
        self._blocks.clear()
        self.held_bytes = 0
        self._ledger.close()

    def _generation(self) -> int:
        self._next_generation += 1
        return self._next_generation

    def _empty(self) -> list[_Segment]:
        return [segment for segment in self._segments.values() if segment.is_empty]

    def _give_back(self, segment: _Segment) -> None:
        del self._segments[segment.id]
        self.mapped_bytes -= segment.nbytes
        segment.close()
