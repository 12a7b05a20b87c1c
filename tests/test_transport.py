"""The shared memory between processes: what is written is read, and nothing else, whoever dies when."""

import fcntl
import gc
import itertools
import mmap
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.capture import reader, transport
from harness.capture.arena import Arena
from harness.capture.reader import discard, pack, read, unpack
from harness.capture.transport import (
    HEADER_BYTES,
    Address,
    Block,
    BlockGone,
    CaptureFailed,
    Lease,
    SegmentId,
    Span,
    TransportError,
    TransportTimeout,
    footprint,
    process_start,
    whereabouts,
)
from harness.capture.writer import Writer, _HostCopier

PAGE = 4096
WIDTH = 32
DTYPES = ["float32", "bfloat16", "float16"]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def make_rows(seed: int, num_rows: int = 10, dtype: str = "float32") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, WIDTH, generator=generator).to(getattr(torch, dtype))


def span_of(block: Block, dtype: str = "float32") -> Span:
    return Span(block, block.nbytes // (WIDTH * getattr(torch, dtype).itemsize), WIDTH, dtype)


def allocate(arena: Arena, nbytes: int) -> Block:
    block = arena.allocate(nbytes)
    assert block is not None
    return block


def lease_of(arena: Arena, *blocks: Block, dtype: str = "float32") -> tuple[Lease, dict[str, Any]]:
    lease = arena.lease()
    return lease, arena.handle(lease, [span_of(block, dtype) for block in blocks])


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(16 * PAGE, segment_bytes=PAGE, retain_seconds=0.0)
    yield arena
    arena.close()


@pytest.fixture
def writer(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> Iterator[Writer]:
    """That drops when it is told to."""
    monkeypatch.setattr("harness.capture.writer._LOOK_SECONDS", 60.0)
    writer = Writer(arena.address)
    yield writer
    writer.close()


# --- the arena -------------------------------------------------------------------------------------------------------


def test_data_is_aligned_and_blocks_do_not_overlap(arena: Arena) -> None:
    blocks = [allocate(arena, nbytes) for nbytes in (1, 64, 65, 0, 1000)]
    assert [footprint(block.nbytes) for block in blocks] == [128, 128, 192, 64, 64 + 1024]
    assert [block.offset for block in blocks] == [0, 128, 256, 448, 512]
    assert arena.held_bytes == 128 + 128 + 192 + 64 + 1088
    assert arena.mapped_bytes == PAGE


def test_nothing_is_allocated_above_the_cap(arena: Arena) -> None:
    for _ in range(16):
        allocate(arena, PAGE - HEADER_BYTES)
    assert arena.held_bytes == arena.mapped_bytes == 16 * PAGE
    assert arena.allocate(0) is None
    assert arena.allocate(0, fragmented=True) is None


def test_a_block_larger_than_a_segment_gets_its_own(arena: Arena) -> None:
    allocate(arena, 10)
    block = allocate(arena, 3 * PAGE)
    assert block.offset == 0
    assert arena.mapped_bytes == 5 * PAGE
    arena.free(block)
    arena.trim()
    assert arena.mapped_bytes == PAGE, "a segment of unusual size is not kept as a spare"


def test_freed_neighbours_become_one_room_in_any_order(arena: Arena) -> None:
    for order in ([0, 1, 2], [2, 1, 0], [0, 2, 1], [1, 0, 2]):
        blocks = [allocate(arena, 1000) for _ in range(3)]
        for index in order:
            arena.free(blocks[index])
        whole = allocate(arena, PAGE - HEADER_BYTES)
        assert whole.offset == 0
        assert arena.mapped_bytes == PAGE
        arena.free(whole)


def test_one_spare_segment_is_kept(arena: Arena) -> None:
    blocks = [allocate(arena, PAGE - HEADER_BYTES) for _ in range(4)]
    for block in blocks:
        arena.free(block)
    assert not arena.trim()
    assert arena.mapped_bytes == PAGE
    assert allocate(arena, 0).segment == blocks[0].segment


def test_empty_segments_are_kept_while_the_arena_is_used(arena_clock: SimpleNamespace) -> None:
    arena = Arena(16 * PAGE, segment_bytes=PAGE, retain_seconds=30.0)
    blocks = [allocate(arena, PAGE - HEADER_BYTES) for _ in range(4)]
    made = arena.take_made()
    assert made == [block.segment for block in blocks]
    for block in blocks:
        arena.free(block)
    assert arena.trim(), "there is more to come"
    assert arena.mapped_bytes == 4 * PAGE
    again = [allocate(arena, PAGE - HEADER_BYTES) for _ in range(4)]
    assert [block.segment for block in again] == made
    assert arena.take_made() == []
    for block in again:
        arena.free(block)
    for use in (lambda: arena.free(allocate(arena, 1)), lambda: arena.withdraw(arena.lease())):
        arena_clock.now += 20
        use()
        arena_clock.now += 20
        assert arena.trim(), "all are empty for longer than that, but the load goes on"
        assert arena.mapped_bytes == 4 * PAGE
    arena_clock.now += 20
    assert not arena.trim()
    assert arena.mapped_bytes == PAGE
    arena.close()


def test_a_segment_that_is_given_back_at_once_is_not_announced(arena: Arena) -> None:
    arena.free(allocate(arena, 8 * PAGE))
    arena.trim()
    assert arena.take_made() == []


def test_the_writer_prepares_what_it_will_write_to(arena: Arena, writer: Writer) -> None:
    block = allocate(arena, 8 * PAGE)
    before = mappings()
    writer.prepare(arena.take_made())
    assert mappings() == before + 1
    writer.write(block, torch.ones(8 * PAGE, dtype=torch.uint8))
    assert mappings() == before + 1
    gone = allocate(arena, 6 * PAGE)
    made = arena.take_made()
    arena.free(gone)
    arena.trim()
    writer.prepare(made)  # given back meanwhile: nothing happens


def test_only_fragments_let_the_mapped_bytes_exceed_the_cap() -> None:
    arena = Arena(2 * PAGE, segment_bytes=PAGE)
    blocks = [allocate(arena, 1000) for _ in range(6)]  # three a segment
    for index in (0, 2, 3, 5):
        arena.free(blocks[index])
    assert arena.allocate(3000) is None, "no extent is long enough, and the cap is mapped"
    block = arena.allocate(3000, fragmented=True)
    assert block is not None
    assert arena.mapped_bytes == 3 * PAGE
    arena.free(block)
    assert arena.mapped_bytes == 2 * PAGE, "what is above the cap goes as soon as it is empty"
    arena.close()


def test_the_spare_makes_room_for_a_larger_block() -> None:
    arena = Arena(2 * PAGE, segment_bytes=PAGE)
    arena.free(allocate(arena, 10))
    assert allocate(arena, 2 * PAGE - HEADER_BYTES).offset == 0
    assert arena.mapped_bytes == 2 * PAGE
    arena.close()


def test_a_block_is_freed_once(arena: Arena) -> None:
    block = allocate(arena, 10)
    arena.free(block)
    with pytest.raises(KeyError):
        arena.free(block)


@pytest.mark.parametrize(
    "wrong", [{"capacity_bytes": 0}, {"segment_bytes": 0}, {"lease_seconds": 0.0}, {"retain_seconds": -1.0}], ids=str
)
def test_sizes_must_be_positive(wrong: dict[str, Any]) -> None:
    right = {"capacity_bytes": 1, "segment_bytes": 1, "lease_seconds": 1.0, "retain_seconds": 0.0}
    [name] = wrong
    with pytest.raises(ValueError, match=f"{name}.* positive|{name} not negative"):
        Arena(**{**right, **wrong})


@settings(deadline=None)
@given(st.lists(st.one_of(st.integers(0, 2 * PAGE), st.tuples(st.integers(0, 99))), max_size=60))
def test_blocks_are_disjoint_and_accounted_for(steps: list[int | tuple[int]]) -> None:
    """An integer allocates so many bytes, a tuple frees a block of that index."""
    arena = Arena(8 * PAGE, segment_bytes=PAGE, retain_seconds=0.0)
    try:
        blocks: list[Block] = []
        for step in steps:
            if isinstance(step, tuple):
                if blocks:
                    arena.free(blocks.pop(step[0] % len(blocks)))
            else:
                block = arena.allocate(step, fragmented=True)
                fits = sum(footprint(other.nbytes) for other in blocks) + footprint(step) <= 8 * PAGE
                assert (block is not None) == fits
                if block is not None:
                    blocks.append(block)
            extents = sorted((b.segment, b.offset, b.offset + footprint(b.nbytes)) for b in blocks)
            for (segment, _, stop), (next_segment, start, _) in itertools.pairwise(extents):
                assert segment != next_segment or stop <= start
            for segment, _, stop in extents:
                assert stop <= os.fstat(segment.fd).st_size
            assert arena.held_bytes == sum(footprint(block.nbytes) for block in blocks) <= 8 * PAGE
        for block in blocks:
            arena.free(block)
        assert arena.held_bytes == 0
        arena.trim()
        assert arena.mapped_bytes <= PAGE
    finally:
        arena.close()


# --- write and read in one process -----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_read_returns_the_spans_in_order(arena: Arena, dtype: str, device: str) -> None:
    writer = Writer(arena.address, device)
    first, second = make_rows(1, 3, dtype), make_rows(2, 5, dtype)
    blocks = [allocate(arena, rows.nbytes) for rows in (first, second)]
    writer.write_many(zip(blocks, (first.to(device), second.to(device)), strict=True))
    lease, handle = lease_of(arena, blocks[1], blocks[0], blocks[1], dtype=dtype)
    rows = read(handle)
    assert torch.equal(rows, torch.cat([second, first, second]))
    assert rows.dtype == first.dtype
    assert rows.is_contiguous()
    assert arena.reap() == ([lease], [])
    writer.close()


@pytest.mark.parametrize("device", [*DEVICES, *(["cuda without stream writes"] if "cuda" in DEVICES else [])])
def test_a_stamp_follows_all_of_its_data(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device, _, without = device.partition(" ")
    if without:
        monkeypatch.setattr("harness.capture.writer._Driver.attribute", lambda _self, _number, _device: 0)
    arena = Arena(256 << 20)
    writer = Writer(arena.address, device)
    rows = make_rows(1, 1 << 16)  # 8 MiB: on a GPU the copy is under way when the reader begins to look
    try:
        for number in range(8):
            blocks = [allocate(arena, rows.nbytes) for _ in range(4)]
            truth = [rows + 4 * number + index for index in range(4)]
            # As columns of wider ones, which are dropped while the copy is under way, and whose memory is used again.
            wide = [torch.cat([each, -each], dim=1).to(device) for each in truth]
            writer.write_many([(block, each[:, :WIDTH]) for block, each in zip(blocks, wide, strict=True)])
            del wide
            overwritten = [torch.zeros(1 << 16, 2 * WIDTH, device=device) for _ in blocks]
            for index in (3, 0, 1, 2):
                rows_read = read(lease_of(arena, blocks[index])[1])
                assert torch.equal(rows_read, truth[index]), "the stamp was there before its data"
            del overwritten
            arena.reap()
            for block in blocks:
                arena.free(block)  # so that the next ones lie where other data and stamps were
    finally:
        writer.close()
        arena.close()


def test_memory_of_large_rows_goes_back_to_the_system() -> None:
    def is_mapped(address: int) -> bool:
        ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
        return any(int(start, 16) <= address < int(stop, 16) for start, stop in ranges)

    kept = [reader.empty((1 << 14, WIDTH), torch.float32).fill_(1.0) for _ in range(3)]  # of 2 MiB
    del kept[0]  # from the first one freed malloc learns what to keep
    kept += [reader.empty((1 << 14, WIDTH), torch.float32).fill_(1.0) for _ in range(3)]
    addresses = [rows.data_ptr() for rows in kept]
    assert all(map(is_mapped, addresses))
    kept.clear()
    gc.collect()
    assert not any(map(is_mapped, addresses)), "memory of tensors that are gone is kept"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "rows_of",
    [
        lambda wide: wide[:, :WIDTH],
        lambda wide: wide[:, 3 : 3 + WIDTH],
        lambda wide: wide[::2, :WIDTH],
        lambda wide: wide[:, ::2],
        lambda wide: wide.T[:WIDTH],
        lambda wide: wide[:1, :WIDTH].expand(5, -1),
    ],
    ids=["main rows", "later columns", "every second row", "every second column", "transposed", "one row, repeated"],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_layout_are_written_as_their_values(
    arena: Arena, rows_of: Callable[[torch.Tensor], torch.Tensor], dtype: str, device: str
) -> None:
    writer = Writer(arena.address, device)
    rows = rows_of(torch.arange(48 * 5).view(5, 48).to(device, getattr(torch, dtype)))
    block = allocate(arena, rows.nbytes)
    writer.write(block, rows)
    num_rows, width = rows.shape
    handle = arena.handle(arena.lease(), [Span(block, num_rows, width, dtype)])
    assert torch.equal(read(handle), rows.cpu())
    writer.close()


def test_what_was_read_is_the_readers_own(arena: Arena, writer: Writer) -> None:
    block = allocate(arena, make_rows(1).nbytes)
    writer.write(block, make_rows(1))
    read(lease_of(arena, block)[1]).zero_()
    assert torch.equal(read(lease_of(arena, block)[1]), make_rows(1))


def test_an_item_without_rows(arena: Arena, writer: Writer) -> None:
    block = allocate(arena, 0)
    writer.write(block, torch.empty(0, WIDTH))
    assert read(lease_of(arena, block)[1]).shape == (0, WIDTH)


def test_a_handle_is_small_and_survives_msgpack(arena: Arena, writer: Writer) -> None:
    block = allocate(arena, make_rows(1).nbytes)
    writer.write(block, make_rows(1))
    packed = msgspec.msgpack.encode(lease_of(arena, block)[1])
    assert len(packed) < 200
    assert torch.equal(read(msgspec.msgpack.decode(packed)), make_rows(1))


def test_a_tensor_must_fill_its_block(arena: Arena, writer: Writer) -> None:
    block = allocate(arena, 100)
    with pytest.raises(ValueError, match="does not fill a block of 100"):
        writer.write(block, make_rows(1))


def test_a_view_is_the_data_that_readers_get(arena: Arena, writer: Writer) -> None:
    block = allocate(arena, WIDTH * 4)
    writer.write(block, torch.zeros(1, WIDTH))
    writer.view(block).view(torch.float32).fill_(3)
    assert writer.view(block).data_ptr() % HEADER_BYTES == 0
    assert torch.equal(read(lease_of(arena, block)[1]), torch.full((1, WIDTH), 3.0))


def test_one_lease_has_one_width(arena: Arena) -> None:
    block = allocate(arena, 256)
    handle = arena.handle(arena.lease(), [Span(block, 2, 32, "float32"), Span(block, 1, 64, "float32")])
    with pytest.raises(ValueError, match="one width"):
        read(handle)


@pytest.mark.parametrize("device", DEVICES)
def test_a_reader_waits_for_the_stamp(arena: Arena, device: str) -> None:
    writer = Writer(arena.address, device)
    block = allocate(arena, make_rows(1).nbytes)
    handle = lease_of(arena, block)[1]
    source = make_rows(1).to(device)
    timer = threading.Timer(0.1, writer.write, (block, source))
    timer.start()
    assert torch.equal(read(handle, timeout=10), make_rows(1))
    timer.join()
    writer.close()


@pytest.mark.parametrize("device", DEVICES)
def test_an_item_that_the_writer_has_not_is_an_error(arena: Arena, device: str) -> None:
    writer = Writer(arena.address, device)
    block = allocate(arena, make_rows(1).nbytes)
    writer.fail(block)
    lease, handle = lease_of(arena, block)
    with pytest.raises(CaptureFailed, match="send the request again"):
        read(handle, timeout=10)
    assert arena.failed(block)
    assert arena.reap() == ([lease], []), "a lease ends with an error too"
    writer.close()


def test_another_blocks_bytes_in_the_header_are_no_stamp(arena: Arena, writer: Writer) -> None:
    """The header of the second block lies where the first one had data."""
    first = allocate(arena, 1024)
    writer.write(first, torch.full((1024,), 0x55, dtype=torch.uint8))
    arena.free(first)
    allocate(arena, 10)
    second = allocate(arena, 512)
    assert first.offset < second.offset < first.offset + 1024
    with pytest.raises(TransportTimeout):
        read(lease_of(arena, second)[1], timeout=0.05)


# --- leases ----------------------------------------------------------------------------------------------------------


def test_a_lease_is_read_once(arena: Arena, writer: Writer) -> None:
    block = allocate(arena, make_rows(1).nbytes)
    writer.write(block, make_rows(1))
    handle = lease_of(arena, block)[1]
    read(handle)
    arena.reap()
    with pytest.raises(BlockGone, match="read before"):
        read(handle)


def test_rows_that_come_in_pieces(arena: Arena, writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One system call gives no more than 2 GiB, and may give less."""
    block = allocate(arena, make_rows(1).nbytes)
    writer.write(block, make_rows(1))
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, offset: preadv(fd, [into[0][:100]], offset))
    assert torch.equal(read(lease_of(arena, block)[1]), make_rows(1))


def test_a_discarded_lease_is_done(arena: Arena) -> None:
    lease, handle = lease_of(arena, allocate(arena, 100))
    discard(handle)
    assert arena.reap() == ([lease], [])
    discard(handle)


def test_a_withdrawn_lease_is_gone(arena: Arena, writer: Writer) -> None:
    block = allocate(arena, make_rows(1).nbytes)
    writer.write(block, make_rows(1))
    lease, handle = lease_of(arena, block)
    arena.withdraw(lease)
    with pytest.raises(BlockGone):
        read(handle)
    assert arena.reap() == ([], [])


def test_a_lease_expires(arena_clock: SimpleNamespace) -> None:
    with closing(Arena(PAGE, lease_seconds=60)) as arena:
        lease, handle = lease_of(arena, allocate(arena, 128))
        arena_clock.now += 59
        assert arena.reap() == ([], [])
        arena_clock.now += 1
        assert arena.reap() == ([], [lease])
        with pytest.raises(BlockGone, match="expired"):
            read(handle)


def test_each_lease_expires_at_its_own_time(arena_clock: SimpleNamespace) -> None:
    """Also where nothing changed in the ledger since the last look."""
    with closing(Arena(PAGE, lease_seconds=60)) as arena:
        first = arena.lease()
        arena_clock.now += 40
        second = arena.lease()
        assert arena.reap() == ([], [])
        arena_clock.now += 20
        assert arena.reap() == ([], [first])
        assert arena.reap() == ([], [])
        arena_clock.now += 40
        assert arena.reap() == ([], [second])


def test_a_reader_whose_lease_expires_while_it_waits(arena: Arena) -> None:
    lease, handle = lease_of(arena, allocate(arena, 128))
    timer = threading.Timer(0.1, arena.withdraw, (lease,))
    timer.start()
    with pytest.raises(BlockGone):
        read(handle, timeout=10)
    timer.join()


def test_a_late_reader_cannot_end_the_next_lease_of_its_slot(arena: Arena) -> None:
    old, old_handle = lease_of(arena, allocate(arena, 128))
    arena.withdraw(old)
    new, _ = lease_of(arena, allocate(arena, 128))
    assert new.slot == old.slot
    discard(old_handle)
    with pytest.raises(BlockGone):
        read(old_handle)
    assert arena.reap() == ([], [])


def test_a_reader_whose_lease_ends_under_it_does_not_touch_the_next_lease_of_its_slot(
    arena: Arena, writer: Writer, during_copy: Callable[[Callable[[], object]], None]
) -> None:
    block = allocate(arena, make_rows(1).nbytes)
    writer.write(block, make_rows(1))
    old, old_handle = lease_of(arena, block)
    following: list[Lease] = []

    def end_and_grant_again() -> None:
        arena.withdraw(old)
        new, new_handle = lease_of(arena, block)
        discard(new_handle)
        following.append(new)

    during_copy(end_and_grant_again)
    with pytest.raises(BlockGone):
        read(old_handle)
    assert following[0].slot == old.slot
    assert arena.reap() == (following, [])


def test_a_dead_lease_is_gone_whatever_the_block_says(arena: Arena, writer: Writer) -> None:
    block = allocate(arena, 128)
    lease, handle = lease_of(arena, block)
    writer.fail(block)
    arena.withdraw(lease)
    with pytest.raises(BlockGone):
        read(handle)


def test_a_reader_that_waits_when_the_arena_is_closed(arena: Arena) -> None:
    handle = lease_of(arena, allocate(arena, 128))[1]
    timer = threading.Timer(0.1, arena.close)
    timer.start()
    with pytest.raises(BlockGone):
        read(handle, timeout=10)
    timer.join()


def test_generations_of_two_arenas_are_far_apart(arena: Arena) -> None:
    """They start at random, so that no data looks like a stamp."""
    other = Arena(PAGE)
    first, second = allocate(arena, 1).generation, allocate(other, 1).generation
    assert abs(first - second) > 1 << 32
    assert 0 < min(first, second) < max(first, second) < 1 << 62
    other.close()


def test_slots_are_used_again(arena: Arena) -> None:
    for _ in range(100):
        lease, handle = lease_of(arena, allocate(arena, 1))
        assert lease.slot == 0
        discard(handle)
        arena.reap()


def test_the_ledger_grows(arena: Arena, writer: Writer) -> None:
    """Leases that were granted before can be read and ended afterwards."""
    block = allocate(arena, make_rows(1).nbytes)
    writer.write(block, make_rows(1))
    handles = [lease_of(arena, block)[1] for _ in range(600)]
    for handle in (handles[0], handles[300], handles[-1]):
        assert torch.equal(read(handle), make_rows(1))
    assert [lease.slot for lease in arena.reap()[0]] == [0, 300, 599]
    assert arena.lease().slot in {0, 300, 599}


def test_a_ledger_that_cannot_grow_keeps_its_leases(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    leases = [arena.lease() for _ in range(256)]
    for module, name in ((os, "ftruncate"), (mmap, "mmap")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, mock.Mock(side_effect=OSError("no room")))
            with pytest.raises(OSError, match="no room"):
                arena.lease()
    arena.withdraw(leases[0])
    assert arena.reap() == ([], [])
    assert arena.lease().slot == 0
    assert arena.lease().slot > 255


# --- stale readers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def during_copy(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Runs a function while a reader copies: after the stamp was seen, before it is looked at again."""
    original = reader._read_into

    def install(action: Callable[[], object]) -> None:
        def read_into(*args: Any) -> None:
            action()
            original(*args)

        monkeypatch.setattr(reader, "_read_into", read_into)

    return install


def test_a_block_used_again_under_a_reader(
    arena: Arena, writer: Writer, during_copy: Callable[[Callable[[], object]], None]
) -> None:
    block = allocate(arena, make_rows(1).nbytes)
    writer.write(block, make_rows(1))
    lease, handle = lease_of(arena, block)

    def use_again() -> None:
        arena.withdraw(lease)
        arena.free(block)
        again = allocate(arena, block.nbytes)
        assert (again.segment, again.offset) == (block.segment, block.offset)
        writer.write(again, make_rows(2))

    during_copy(use_again)
    with pytest.raises(BlockGone):
        read(handle)


def test_a_late_copy_that_brings_the_old_stamp_back(
    arena: Arena, writer: Writer, during_copy: Callable[[Callable[[], object]], None]
) -> None:
    """The header is as the reader expects it, only the ledger tells that the bytes may be another item's."""
    block = allocate(arena, make_rows(1).nbytes)
    writer.write(block, make_rows(1))
    lease, handle = lease_of(arena, block)

    def use_again() -> None:
        arena.withdraw(lease)
        arena.free(block)
        allocate(arena, block.nbytes)
        writer.write(block, make_rows(1))  # was queued before the block was freed
        writer.view(block).fill_(7)  # the next item's copy begins

    during_copy(use_again)
    with pytest.raises(BlockGone):
        read(handle)


def test_a_stamp_that_changes_under_a_living_lease(
    arena: Arena, writer: Writer, during_copy: Callable[[Callable[[], object]], None]
) -> None:
    block = allocate(arena, make_rows(1).nbytes)
    writer.write(block, make_rows(1))
    handle = lease_of(arena, block)[1]
    during_copy(lambda: writer.fail(block))
    with pytest.raises(BlockGone):
        read(handle)


def test_the_next_reader_waits_for_its_own_stamp(arena: Arena, writer: Writer) -> None:
    """An older copy to the same bytes is carried out late; its stamp is not the new block's."""
    old = allocate(arena, make_rows(1).nbytes)
    arena.free(old)
    new = allocate(arena, old.nbytes)
    writer.write(old, make_rows(1))
    lease, handle = lease_of(arena, new)
    with pytest.raises(TransportTimeout):
        read(handle, timeout=0.05)
    writer.write(new, make_rows(2))
    arena.withdraw(lease)
    assert torch.equal(read(lease_of(arena, new)[1]), make_rows(2))


def test_a_freed_block_has_no_stamp(arena: Arena, writer: Writer) -> None:
    block = allocate(arena, make_rows(1).nbytes)
    writer.write(block, make_rows(1))
    arena.free(block)
    with pytest.raises(TransportTimeout):
        read(lease_of(arena, block)[1], timeout=0.05)


# --- memory ----------------------------------------------------------------------------------------------------------


def pages_of(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def test_memory_is_given_back_although_the_writer_maps_it(arena: Arena, writer: Writer) -> None:
    block = allocate(arena, 8 * PAGE)
    ours = os.dup(block.segment.fd)
    writer.write(block, torch.ones(8 * PAGE, dtype=torch.uint8))
    assert pages_of(ours) == 9 * PAGE
    arena.free(block)
    arena.trim()
    assert pages_of(ours) == 0
    writer.write(block, torch.ones(8 * PAGE, dtype=torch.uint8))  # a late copy: no signal
    writer.drop_gone()
    os.close(ours)


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:vllm-mm-embedding")


def test_the_writer_unmaps_what_it_drops_and_the_reader_maps_nothing(arena: Arena, writer: Writer) -> None:
    gc.collect()
    before = mappings()
    block = allocate(arena, 8 * PAGE)
    writer.write(block, torch.ones(1, 8 * PAGE, dtype=torch.uint8))
    assert mappings() == before + 1
    lease = arena.lease()
    kept = read(arena.handle(lease, [Span(block, 1, 8 * PAGE, "uint8")]))
    assert mappings() == before + 1
    arena.free(block)
    arena.trim()
    writer.drop_gone()
    assert mappings() == before
    assert kept.sum() == 8 * PAGE


@pytest.mark.parametrize("device", DEVICES)
def test_the_writer_of_an_idle_engine_unmaps_too(arena: Arena, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.capture.writer._LOOK_SECONDS", 0.01)
    gc.collect()
    before = mappings()
    with closing(Writer(arena.address, device)) as writer:
        kept, gone = allocate(arena, PAGE - HEADER_BYTES), allocate(arena, 8 * PAGE)
        for block in (kept, gone):
            writer.write(block, torch.ones(block.nbytes, dtype=torch.uint8, device=device))
        time.sleep(0.1)
        assert mappings() == before + 2, "what the owner has is not the writer's to drop"
        arena.free(gone)
        arena.trim()
        deadline = time.monotonic() + 10
        while mappings() > before + 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert mappings() == before + 1
    assert mappings() == before


def test_the_writer_looks_again_after_it_had_nothing_to_look_for(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.capture.writer._LOOK_SECONDS", 0.01)
    gc.collect()
    before = mappings()
    with closing(Writer(arena.address)) as writer:
        for _ in range(2):
            block = allocate(arena, 8 * PAGE)
            writer.write(block, torch.ones(block.nbytes, dtype=torch.uint8))
            assert mappings() == before + 1
            arena.free(block)
            arena.trim()
            deadline = time.monotonic() + 10
            while writer._looker is not None and time.monotonic() < deadline:
                time.sleep(0.01)
            assert mappings() == before


def test_a_look_ends_before_the_writer_does(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.capture.writer._LOOK_SECONDS", 0.001)
    looking, ended = threading.Event(), threading.Event()

    def look(writer: Writer) -> None:
        looking.set()
        writer._closed.wait(10)
        time.sleep(0.1)
        ended.set()

    monkeypatch.setattr(Writer, "drop_gone", look)
    with closing(Writer(arena.address)) as writer:
        writer.write(allocate(arena, 0), torch.empty(0))
        assert looking.wait(10)
    assert ended.is_set()


def test_nothing_is_unmapped_under_a_copy(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.capture.writer._LOOK_SECONDS", 0.001)
    copying, finish = threading.Event(), threading.Event()
    happened: list[str] = []

    class Slow(_HostCopier):
        def copy(self, batch: Sequence[Any]) -> None:
            copying.set()
            finish.wait(10)
            happened.append("copied")

        def detach(self, pages: torch.Tensor) -> None:
            happened.append("detached")

    monkeypatch.setattr("harness.capture.writer._HostCopier", Slow)
    with closing(Writer(arena.address)) as writer:
        block = allocate(arena, 8 * PAGE)
        thread = threading.Thread(target=writer.write, args=(block, torch.ones(8 * PAGE, dtype=torch.uint8)))
        thread.start()
        assert copying.wait(10)
        arena.free(block)
        arena.trim()
        time.sleep(0.1)  # in which the other thread looks many times
        finish.set()
        thread.join()
    assert happened == ["copied", "detached"]


def test_nothing_stays_open(arena: Arena) -> None:
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names, not paths
    other = Arena(PAGE)
    writer = Writer(other.address)
    block = allocate(other, 128)
    writer.write(block, torch.zeros(1, WIDTH))
    read(lease_of(other, block)[1])
    writer.close()
    other.close()
    other.close()
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_only_this_user_may_open_it_and_no_program_inherits_it(arena: Arena) -> None:
    for fd in (allocate(arena, 1).segment.fd, arena.address.ledger.fd):
        assert os.fstat(fd).st_mode & 0o777 == 0o600
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def named_shared_memory(pid: int | None) -> set[str]:
    """The files of /dev/shm that the process has open or mapped. Not what is there: others' processes use it too."""
    process = Path(f"/proc/{pid}")
    paths = [line.split(maxsplit=5)[-1] for line in (process / "maps").read_text().splitlines()]
    for fd in (process / "fd").iterdir():
        with suppress(FileNotFoundError):  # it was that of this very look
            paths.append(str(fd.readlink()))
    return {path for path in paths if path.startswith("/dev/shm/")}


def test_no_file_appears(arena: Arena, writer: Writer) -> None:
    before = named_shared_memory(os.getpid())
    writer.write(allocate(arena, WIDTH * 4), torch.zeros(1, WIDTH))
    assert named_shared_memory(os.getpid()) == before


def test_a_late_copy_does_not_reach_a_file_with_the_segments_old_number(
    arena: Arena, writer: Writer, tmp_path: Path
) -> None:
    block = allocate(arena, 8 * PAGE)
    arena.free(block)
    arena.trim()
    file = tmp_path / "foreign"
    file.write_bytes(bytes(10 * PAGE))
    with file.open("r+b") as opened:
        assert opened.fileno() == block.segment.fd, "the lowest free number"
        writer.write(block, torch.ones(8 * PAGE, dtype=torch.uint8))
    assert file.read_bytes() == bytes(10 * PAGE)


def test_a_late_copy_does_not_reach_the_next_segment_of_that_number(arena: Arena, writer: Writer) -> None:
    old = allocate(arena, 8 * PAGE)
    arena.free(old)
    arena.trim()
    new = allocate(arena, 8 * PAGE)
    assert new.segment.fd == old.segment.fd
    writer.write(old, torch.ones(8 * PAGE, dtype=torch.uint8))
    assert not writer.view(new).any()


def test_a_writer_that_maps_a_segment_does_not_confuse_it_with_the_next_of_its_number(
    arena: Arena, writer: Writer
) -> None:
    old = allocate(arena, 8 * PAGE)
    writer.write(old, torch.ones(8 * PAGE, dtype=torch.uint8))
    arena.free(old)
    arena.trim()
    new = allocate(arena, 8 * PAGE)
    assert new.segment.fd == old.segment.fd
    writer.write(new, torch.full((8 * PAGE,), 2, dtype=torch.uint8))
    rows = read(arena.handle(arena.lease(), [Span(new, 1, 8 * PAGE, "uint8")]), timeout=1)
    assert rows.unique().tolist() == [2]


# --- other processes -------------------------------------------------------------------------------------------------

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch"])


class Remote:
    """A process that serves one object: calls its methods by name."""

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        self.pipe, theirs = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=target, args=(theirs, *args), daemon=True)
        self.process.start()
        theirs.close()

    def result(self) -> Any:
        assert self.pipe.poll(30), "the process does not answer"
        return self.pipe.recv()

    def call(self, name: str, *args: Any) -> Any:
        self.pipe.send((name, args))
        return self.result()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def serve(pipe: Connection, served: object) -> None:
    while True:
        name, args = pipe.recv()
        pipe.send(getattr(served, name)(*args))


def serve_arena(pipe: Connection, lease_seconds: float) -> None:
    arena = Arena(1 << 20, segment_bytes=PAGE, lease_seconds=lease_seconds)
    pipe.send(arena.address)
    serve(pipe, arena)


class SeededWriter(Writer):
    """Makes the rows itself: a tensor would not be sent by value."""

    def write_rows(self, block: Block, seed: int, num_rows: int, dtype: str) -> None:
        self.write(block, make_rows(seed, num_rows, dtype))

    def begin(self, block: Block) -> None:
        """A copy that comes to no end."""
        self.view(block).fill_(1)


def serve_writer(pipe: Connection, address: Address) -> None:
    serve(pipe, SeededWriter(address))


def serve_read(pipe: Connection, handle: dict[str, Any], timeout: float) -> None:
    try:
        rows = read(handle, timeout)
        pipe.send((str(rows.dtype), tuple(rows.shape), rows.view(torch.uint8).numpy().tobytes()))
    except TransportError as error:
        pipe.send(error)
    pipe.recv()


@contextmanager
def running(*args: Any) -> Iterator[Remote]:
    remote = Remote(*args)
    try:
        yield remote
    finally:
        remote.kill()


@pytest.fixture
def owner() -> Iterator[Remote]:
    with running(serve_arena, 60.0) as remote:
        yield remote


def remote_lease(owner: Remote, block: Block, dtype: str = "float32") -> dict[str, Any]:
    handle: dict[str, Any] = owner.call("handle", owner.call("lease"), [span_of(block, dtype)])
    return handle


@pytest.mark.parametrize("dtype", DTYPES)
def test_three_processes(owner: Remote, dtype: str) -> None:
    expected = make_rows(5, 100, dtype)
    address = owner.result()
    block = owner.call("allocate", expected.nbytes)
    handle = remote_lease(owner, block, dtype)
    with running(serve_read, handle, 30.0) as reader, running(serve_writer, address) as writer:
        writer.call("write_rows", block, 5, 100, dtype)
        assert reader.result() == (
            str(expected.dtype),
            tuple(expected.shape),
            expected.view(torch.uint8).numpy().tobytes(),
        )
    done, expired = owner.call("reap")
    assert (len(done), expired) == (1, [])


def holders_of(segment: SegmentId) -> list[str]:
    """Everything in /proc that keeps a memfd of this inode."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            maps = (process / "maps").read_text().splitlines()
            found += [line for line in maps if "memfd:vllm-mm" in line and line.split()[4] == str(segment.inode)]
            for fd in (process / "fd").iterdir():
                stat = fd.stat()
                if stat.st_ino == segment.inode and "memfd:vllm-mm" in str(fd.readlink()):
                    found.append(str(fd))
        except OSError:  # ended meanwhile
            continue
    return found


def wait_until_open(reader: Remote, segment: SegmentId) -> None:
    """From then on the reader waits for the stamp."""
    deadline = time.monotonic() + 10
    while not any(holder.startswith(f"/proc/{reader.process.pid}/fd/") for holder in holders_of(segment)):
        assert time.monotonic() < deadline, "the reader opened nothing"
        time.sleep(0.01)


def test_a_killed_owner_leaves_nothing_and_its_readers_an_error(owner: Remote) -> None:
    address = owner.result()
    block = owner.call("allocate", make_rows(1).nbytes)
    waiting = remote_lease(owner, block)
    late = remote_lease(owner, block)
    with running(serve_read, waiting, 30.0) as reader:
        wait_until_open(reader, block.segment)
        for process in (owner, reader):
            assert not named_shared_memory(process.process.pid), "what has a name outlives the process"
        owner.kill()
        error = reader.result()
        assert isinstance(error, BlockGone)
        assert "ended" in str(error)
    with pytest.raises(BlockGone, match="ended"):
        read(late)
    discard(late)
    assert holders_of(block.segment) == []
    assert holders_of(address.ledger) == []


def test_a_process_that_is_dead_but_not_waited_for_has_ended() -> None:
    """A zombie has its pid and start time still."""
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert process_start(process.pid) is None
    assert process_start(process.pid) is None
    assert process_start(os.getpid()) is not None


def test_an_owner_killed_while_a_reader_copies(
    owner: Remote, during_copy: Callable[[Callable[[], object]], None]
) -> None:
    """The reader has the memory open: the rows are whole and the right ones."""
    address = owner.result()
    block = owner.call("allocate", make_rows(1).nbytes)
    with closing(SeededWriter(address)) as writer:
        writer.write_rows(block, 1, 10, "float32")
    handle = remote_lease(owner, block)
    during_copy(owner.kill)
    assert torch.equal(read(handle), make_rows(1))


def test_a_later_process_of_the_owners_pid_is_not_the_owner(arena: Arena, writer: Writer) -> None:
    block = allocate(arena, make_rows(1).nbytes)
    writer.write(block, make_rows(1))
    handle = lease_of(arena, block)[1]
    handle["owner"][1] += 1  # the start time
    with pytest.raises(BlockGone, match="ended"):
        read(handle)


def test_a_killed_reader_loses_its_lease() -> None:
    with running(serve_arena, 2.0) as owner:
        owner.result()
        block = owner.call("allocate", make_rows(1).nbytes)
        handle = remote_lease(owner, block)
        with running(serve_read, handle, 30.0) as reader:
            wait_until_open(reader, block.segment)
        done: list[Lease] = []
        expired: list[Lease] = []
        deadline = time.monotonic() + 30
        while not expired and time.monotonic() < deadline:
            time.sleep(0.1)
            for found, more in zip((done, expired), owner.call("reap"), strict=True):
                found += more
        assert done == []
        assert [lease.generation for lease in expired] == [handle["lease"][1]]
        owner.call("free", block)
        assert owner.call("__getattribute__", "held_bytes") == 0
        with pytest.raises(BlockGone):
            read(handle)


def test_a_writer_killed_before_its_stamp(arena: Arena) -> None:
    block = allocate(arena, make_rows(1).nbytes)
    lease, handle = lease_of(arena, block)
    with running(serve_writer, arena.address) as writer:
        writer.call("begin", block)
    with pytest.raises(TransportTimeout, match="look for its error in the log"):
        read(handle, timeout=0.1)
    assert arena.reap() == ([lease], [])


def test_a_process_that_may_not_open_the_memory(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = lease_of(arena, allocate(arena, 128))[1]

    def forbidden(path: str, *args: Any, opened: Callable[..., int] = os.open) -> int:
        if "/fd/" in path:
            raise PermissionError
        return opened(path, *args)

    monkeypatch.setattr(os, "open", forbidden)
    with pytest.raises(TransportError, match="same user") as caught:
        read(handle)
    assert not isinstance(caught.value, BlockGone)


# --- readers elsewhere -----------------------------------------------------------------------------------------------


def whereabouts_of(*command: str, first: str = "pass") -> str:
    """As a process tells them that is started by this command and runs `first`; skips where that is not permitted."""
    permitted = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if permitted.returncode != 0:
        pytest.skip(f"{command[0]} is not permitted: {permitted.stderr}")
    program = f"import os; from {transport.__name__} import whereabouts; {first}; print(whereabouts())"
    done = subprocess.run([*command, sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_process_beside_this_one_is_at_the_same_place() -> None:
    assert whereabouts_of("env") == whereabouts()


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["unshare", "--pid", "--fork", "--mount-proc"], id="pid namespace"),
        pytest.param(["unshare", "--user", "--map-current-user"], id="user namespace"),
    ],
)
def test_a_process_in_another_namespace_is_elsewhere(command: list[str]) -> None:
    assert whereabouts_of(*command) not in ("", whereabouts())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_a_process_of_another_user_is_elsewhere() -> None:
    assert whereabouts_of("env", first="os.seteuid(65534)") not in ("", whereabouts())


@pytest.mark.parametrize("shape", [(10, WIDTH), (0, WIDTH)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_go_through_a_message(dtype: str, shape: tuple[int, int]) -> None:
    rows = make_rows(1, shape[0], dtype)
    received = unpack(msgspec.msgpack.decode(msgspec.msgpack.encode(pack(rows))))
    assert (received.dtype, received.shape, received.is_contiguous()) == (rows.dtype, rows.shape, True)
    assert torch.equal(received, rows)


def test_unpacked_rows_are_the_receivers_own() -> None:
    """In one process nothing is sent, and the message is the sender's memory."""
    rows = make_rows(1)
    received = unpack(pack(rows))
    rows.zero_()
    assert torch.equal(received, make_rows(1))
