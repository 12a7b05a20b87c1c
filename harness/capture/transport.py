"""Shared memory between the engine core (owner), the worker (writer) and the frontend (reader).

The owner allocates *blocks* in memfd segments and grants *leases* on them. The writer copies rows into a block and then
stamps the block's header with its generation. The reader waits for the stamps, copies the rows out, checks that its
lease was alive all the while, and marks the lease as done in the ledger, one more memfd. Nothing is sent back.

The segments have no name in any file system: other processes of the same user open them through /proc/<pid>/fd, and
the kernel frees them when the processes are gone, however they ended. Where a reader cannot (`whereabouts` differ), the
owner reads for it, and `pack` and `unpack` are for sending the rows.

Why a reader never sees foreign bytes: a block is freed only after its leases are done or expired; the owner withdraws
an expired lease in the ledger *before* it frees the block; and the reader looks at the ledger after its copy. The
header tells when the data is there. A header may hold anything before its stamp (another block's data was there);
generations start at a random number, so that no data looks like a stamp.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

HEADER_BYTES = 64
"""Bytes before a block's data; the first eight are the stamp. Also the alignment of the data."""

SEGMENT_BYTES = 32 << 20
"""Of shared memory, which grows and shrinks by as much; the last segment stays."""

_WORD = 8
_SLOT_BYTES = 2 * _WORD  # of the ledger: the word that the owner writes, the word that the reader writes
_FAILED = 1 << 62  # set in a stamp: the writer has no data for this generation. Generations stay below it.


class TransportError(RuntimeError):
    """The rows cannot be had through the shared memory; the base of all errors of this module."""


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


@dataclass(frozen=True, slots=True)
class Address:
    """What another process needs to open the owner's segments; picklable.

    `started` (clock ticks since boot, field 22 of /proc/<pid>/stat) tells the owner from a later process of the same
    pid. All memfds lie on one kernel-internal `device`.
    """

    pid: int
    started: int
    device: int
    ledger: SegmentId


@dataclass(frozen=True, slots=True)
class Block:
    """`nbytes` of data behind a header of HEADER_BYTES at `offset` of a segment; picklable."""

    segment: SegmentId
    offset: int
    nbytes: int
    generation: int


@dataclass(frozen=True, slots=True)
class Span:
    """Rows in a block, as the reader gets them: shape (num_rows, width) of the torch dtype of that name."""

    block: Block
    num_rows: int
    width: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Lease:
    """A reader's hold on blocks, until it is done or `deadline` (time.monotonic) has passed."""

    slot: int
    generation: int
    deadline: float


def footprint(nbytes: int) -> int:
    """Bytes that a block of `nbytes` data takes in an arena: header and alignment included."""
    return HEADER_BYTES + _round_up(nbytes, HEADER_BYTES)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _memfd(name: str, nbytes: int) -> SegmentId:
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.fchmod(fd, 0o600)
    os.ftruncate(fd, nbytes)
    return SegmentId(fd, os.fstat(fd).st_ino)


def _read_word(fd: int, offset: int) -> int:
    return int.from_bytes(os.pread(fd, _WORD, offset), "little")


def _write_word(fd: int, offset: int, value: int) -> None:
    os.pwrite(fd, value.to_bytes(_WORD, "little"), offset)


def _process_start(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None if it has ended (a zombie has)."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:  # noqa: PTH123 - as in _opened
            stat = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(b")")[2].split()  # the name before it may hold anything
    return None if fields[0] in b"ZXx" else int(fields[19])


# --- owner -----------------------------------------------------------------------------------------------------------


class _Segment:
    """One memfd and its free extents: sorted, disjoint and never adjacent (start, stop)."""

    def __init__(self, nbytes: int) -> None:
        self.id = _memfd("vllm-mm-embedding", nbytes)
        self.nbytes = nbytes
        self.free = [(0, nbytes)]

    @property
    def is_empty(self) -> bool:
        return self.free == [(0, self.nbytes)]

    def take(self, nbytes: int) -> int | None:
        for index, (start, stop) in enumerate(self.free):
            if stop - start >= nbytes:
                self.free[index : index + 1] = [(start + nbytes, stop)] if start + nbytes < stop else []
                return start
        return None

    def give(self, start: int, stop: int) -> None:
        index = next((i for i, extent in enumerate(self.free) if extent[0] > start), len(self.free))
        if index < len(self.free) and self.free[index][0] == stop:
            stop = self.free.pop(index)[1]
        if index > 0 and self.free[index - 1][1] == start:
            index -= 1
            start = self.free.pop(index)[0]
        self.free.insert(index, (start, stop))

    def close(self) -> None:
        # A process that still maps the segment would keep its pages. Punched out, they go now; a late copy of the
        # writer finds zeros there instead of a signal, which it would after a truncation.
        with mmap.mmap(self.id.fd, self.nbytes) as pages:
            pages.madvise(mmap.MADV_REMOVE)
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
            raise ValueError("capacity_bytes, segment_bytes and lease_seconds must be positive")
        self.capacity_bytes = capacity_bytes
        self._segment_bytes = _round_up(segment_bytes, mmap.PAGESIZE)
        self._lease_seconds = lease_seconds
        self._retain_seconds = retain_seconds
        self._segments: dict[SegmentId, _Segment] = {}  # oldest first: filled first, so that the newest drain
        self._blocks: dict[int, Block] = {}
        self._made: list[SegmentId] = []
        self._last_use = 0.0  # time.monotonic
        self._next_generation = 1 + secrets.randbits(61)
        self._leases: dict[int, Lease] = {}
        self._free_slots: list[int] = []
        self._num_slots = 0
        self.held_bytes = 0
        self.mapped_bytes = 0  # size of all segments; above the cap only while fragments of blocks in use force it
        self._closed = False
        ledger = _memfd("vllm-mm-embedding-ledger", 0)
        started = _process_start(os.getpid())
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
            if (offset := segment.take(needed)) is not None:
                break
        else:
            size = _round_up(max(needed, self._segment_bytes), mmap.PAGESIZE)
            for segment in self._empty():  # too small for this block
                if self.mapped_bytes + size > self.capacity_bytes:
                    self._give_back(segment)
            room = self.capacity_bytes - self.mapped_bytes
            if needed > room and not fragmented:
                return None
            segment = _Segment(_round_up(max(needed, min(size, room)), mmap.PAGESIZE))
            self._segments[segment.id] = segment
            self.mapped_bytes += segment.nbytes
            self._made.append(segment.id)
            offset = segment.take(needed)
            assert offset is not None
        block = Block(segment.id, offset, nbytes, self._generation())
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
        _write_word(block.segment.fd, block.offset, 0)
        segment = self._segments[block.segment]
        needed = footprint(block.nbytes)
        segment.give(block.offset, block.offset + needed)
        self.held_bytes -= needed
        if segment.is_empty and self.mapped_bytes > self.capacity_bytes:
            self._give_back(segment)

    def trim(self) -> bool:
        """Gives back what is empty `retain_seconds` after the last use, up to one segment.

        Returns:
            Whether there is more to come.
        """
        empty = sorted(self._empty(), key=lambda segment: segment.nbytes)
        others = empty if empty and empty[0].nbytes > self._segment_bytes else empty[1:]
        if time.monotonic() < self._last_use + self._retain_seconds:
            return bool(others)
        for segment in others:
            self._give_back(segment)
        return False

    def failed(self, block: Block) -> bool:
        """Whether the writer stamped that it has no data for this block."""
        return _read_word(block.segment.fd, block.offset) == block.generation | _FAILED

    def stamped(self, block: Block) -> bool:
        """Whether the writer has copied the block's data."""
        return _read_word(block.segment.fd, block.offset) == block.generation

    def take_made(self) -> list[SegmentId]:
        """The segments made since the last call and still there, for Writer.prepare."""
        made, self._made = [segment for segment in self._made if segment in self._segments], []
        return made

    def lease(self) -> Lease:
        """Grants a lease; the caller keeps the blocks that it covers until reap() returns it."""
        if self._free_slots:
            slot = self._free_slots.pop()
        else:
            slot, self._num_slots = self._num_slots, self._num_slots + 1
        self._last_use = time.monotonic()
        lease = Lease(slot, self._generation(), self._last_use + self._lease_seconds)
        os.pwrite(self.address.ledger.fd, lease.generation.to_bytes(_WORD, "little") + bytes(_WORD), slot * _SLOT_BYTES)
        self._leases[lease.generation] = lease
        return lease

    def handle(self, lease: Lease, spans: Sequence[Span]) -> dict[str, Any]:
        """What read() takes: a dict of integers, strings and lists."""
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
            _write_word(self.address.ledger.fd, lease.slot * _SLOT_BYTES, 0)
            self._free_slots.append(lease.slot)

    def reap(self) -> tuple[list[Lease], list[Lease]]:
        """Ends the leases that are done and those that have expired, and returns both lists."""
        if not self._leases:
            return [], []
        words = memoryview(os.pread(self.address.ledger.fd, self._num_slots * _SLOT_BYTES, 0)).cast("Q")
        now = time.monotonic()
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
        os.close(self.address.ledger.fd)

    def _generation(self) -> int:
        self._next_generation += 1
        return self._next_generation

    def _empty(self) -> list[_Segment]:
        return [segment for segment in self._segments.values() if segment.is_empty]

    def _give_back(self, segment: _Segment) -> None:
        del self._segments[segment.id]
        self.mapped_bytes -= segment.nbytes
        segment.close()


# --- another process's memory ----------------------------------------------------------------------------------------


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
def _opened(address: Address, segment: SegmentId, flags: int) -> Iterator[int]:
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
        if not _lives(address):
            raise _owner_gone(address) from error
        raise TransportError(
            f"cannot open the shared memory of process {address.pid}: run all processes of vLLM as the same user"
        ) from error
    except OSError as error:
        raise _owner_gone(address) from error
    try:
        if not _is(os.fstat(fd), address, segment) or not _lives(address):
            raise _owner_gone(address)
        yield fd
    finally:
        os.close(fd)


def _path(address: Address, segment: SegmentId) -> str:
    return f"/proc/{address.pid}/fd/{segment.fd}"


def _is(stat: os.stat_result, address: Address, segment: SegmentId) -> bool:
    return (stat.st_dev, stat.st_ino) == (address.device, segment.inode)


def _lives(address: Address) -> bool:
    return _process_start(address.pid) == address.started


def _owner_gone(address: Address) -> BlockGone:
    return BlockGone(
        f"the embeddings are gone, because process {address.pid} (vLLM's engine core) ended or gave the memory back: "
        "send the request again"
    )


# --- writer ----------------------------------------------------------------------------------------------------------


class _Copy(NamedTuple):
    """One step of a batch: bytes of `source` to the block's data if there is a source, then `stamp` to its header."""

    pages: Tensor  # of the segment
    block: Block
    stamp: int
    source: Tensor | None  # contiguous


class _Copier(Protocol):
    def attach(self, pages: Tensor) -> None: ...

    def detach(self, segments: Sequence[Tensor]) -> None: ...

    def copy(self, batch: Sequence[_Copy]) -> None: ...

    def fetch(self, pages: Tensor, data: Tensor) -> Tensor: ...

    def close(self) -> None: ...


def _data(pages: Tensor, block: Block) -> Tensor:
    start = block.offset + HEADER_BYTES
    return pages[start : start + block.nbytes]


class _HostCopier:
    """Copies at once, from any device."""

    def attach(self, pages: Tensor) -> None:
        pass

    def detach(self, segments: Sequence[Tensor]) -> None:
        pass

    def copy(self, batch: Sequence[_Copy]) -> None:
        for pages, block, stamp, source in batch:
            if source is not None:
                _data(pages, block).copy_(source.view(-1).view(torch.uint8))
            pages[block.offset : block.offset + _WORD].view(torch.int64).fill_(stamp)

    def fetch(self, pages: Tensor, data: Tensor) -> Tensor:
        del pages
        return data.clone()

    def close(self) -> None:
        pass


class _CudaCopier:
    """Copies on a side stream into registered (page-locked) memory; never waits for the device.

    A thread registers the memory: that takes 0.5 ms a MiB, most of it for the kernel to find pages, and torch's own
    binding would hold the interpreter meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        # By its number: in other threads another one may be the current one.
        self._device = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream(self._device)
        self._stream_writes = all(_attribute(number, self._device.index) for number in _STREAM_WRITES)
        self._thread = ThreadPoolExecutor(1, "mm-embedding-pages", initializer=self._use_device)
        # Of its own: it waits for the device, and registering must not wait behind it.
        self._dropping = ThreadPoolExecutor(1, "mm-embedding-dropped", initializer=self._use_device)
        self._registered: dict[int, Future[None]] = {}  # by address

    def _use_device(self) -> None:
        torch.cuda.set_device(self._device)
        torch.cuda.current_stream().query()  # makes the device's context current in this thread, for the driver's calls

    def attach(self, pages: Tensor) -> None:
        self._registered[pages.data_ptr()] = self._thread.submit(_register, pages)

    def detach(self, segments: Sequence[Tensor]) -> None:
        idle = self._stream.record_event()
        for pages in segments:
            registered = self._registered.pop(pages.data_ptr())
            self._dropping.submit(self._unregister, registered, idle, pages)

    @staticmethod
    def _unregister(registered: Future[None], idle: torch.cuda.Event, pages: Tensor) -> None:
        registered.result()
        idle.synchronize()
        _cuda("cuMemHostUnregister", ctypes.c_void_p(pages.data_ptr()))

    def copy(self, batch: Sequence[_Copy]) -> None:
        for address in {copy.pages.data_ptr() for copy in batch}:
            self._registered[address].result()
        # vLLM calls between the encoder and the language model, whose kernels wait for this thread: the driver is
        # called directly, because torch takes five operations for the same, of which two run on the device.
        sources = [None if copy.source is None else copy.source.to(self._device, non_blocking=True) for copy in batch]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        stream = ctypes.c_void_p(self._stream.cuda_stream)
        for copy, source in zip(batch, sources, strict=True):
            header = copy.pages.data_ptr() + copy.block.offset
            if source is not None and source.nbytes:
                source.record_stream(self._stream)
                data, nbytes = ctypes.c_void_p(header + HEADER_BYTES), ctypes.c_size_t(source.nbytes)
                _cuda("cuMemcpyDtoHAsync_v2", data, ctypes.c_uint64(source.data_ptr()), nbytes, stream)
            # In the stream's order and behind a barrier, or the way of the data: it arrives after them.
            if self._stream_writes:
                _cuda("cuStreamWriteValue64_v2", stream, ctypes.c_uint64(header), ctypes.c_uint64(copy.stamp), 0)
            else:
                with torch.cuda.stream(self._stream):
                    value = torch.full((1,), copy.stamp, dtype=torch.int64, device=self._device)
                stamp = ctypes.c_uint64(value.data_ptr())
                _cuda("cuMemcpyDtoHAsync_v2", ctypes.c_void_p(header), stamp, ctypes.c_size_t(_WORD), stream)

    def fetch(self, pages: Tensor, data: Tensor) -> Tensor:
        self._registered[pages.data_ptr()].result()
        found = data.to(self._device, non_blocking=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # for `detach`, which waits for this stream
        return found

    def close(self) -> None:
        self._thread.shutdown()
        self._dropping.shutdown()


def _register(pages: Tensor) -> None:
    address = ctypes.c_void_p(pages.data_ptr())
    nbytes = ctypes.c_size_t(pages.nbytes)
    # Without pages the driver finds them one by one, and holds a lock of its own meanwhile. Fails on old kernels, which
    # does not matter.
    ctypes.CDLL(None).madvise(address, nbytes, _MADV_POPULATE_WRITE)
    try:
        _cuda("cuMemHostRegister_v2", address, nbytes, _DEVICEMAP)
    except TransportError as error:
        raise TransportError(f"{pages.nbytes} bytes cannot be page-locked ({error}): lower the cap") from error


_STREAM_WRITES = (91, 122)
"""CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM and _CAN_USE_64_BIT_STREAM_MEM_OPS."""


def _attribute(number: int, device: int) -> int:
    value = ctypes.c_int()
    _cuda("cuDeviceGetAttribute", ctypes.byref(value), number, device)
    return value.value


_DEVICEMAP = 2  # the stream writes the stamps as the device does, and not by a copy
_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python's mmap has no name for it


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _cuda(function: str, *arguments: Any) -> None:
    """Calls the driver without the interpreter's lock, which torch.cuda.cudart() holds.

    Raises:
        TransportError: it refuses.
    """
    if (error := getattr(_driver(), function)(*arguments)) != 0:
        raise TransportError(f"the GPU's driver answers {function} with error {error}")


_LOOK_SECONDS = 1.0


class Writer:
    """Worker side: copies tensors into blocks. Thread-safe.

    Maps a segment at its first use. A small thread looks which the owner has given back and unmaps those: while a
    device has them registered, their memory is not free, and the owner of an idle engine has no step to say so with.

    Args:
        address: the owner's.
        device: where the tensors are. On CUDA all copies are asynchronous, ordered after the current stream.
    """

    def __init__(self, address: Address, device: torch.device | str = "cpu") -> None:
        device = torch.device(device)
        self._address = address
        self._copier: _Copier = _CudaCopier(device) if device.type == "cuda" else _HostCopier()
        self._segments: dict[SegmentId, Tensor] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._looker: threading.Thread | None = None

    def view(self, block: Block) -> Tensor:
        """The block's data: uint8, (nbytes,), shared with the other processes.

        Raises:
            BlockGone: the owner gave the segment back, or ended.
        """
        with self._lock:
            return _data(self._pages(block.segment), block)

    def write(self, block: Block, tensor: Tensor) -> None:
        """write_many() of one."""
        self.write_many([(block, tensor)])

    def write_many(self, copies: Iterable[tuple[Block, Tensor]]) -> None:
        """Copies each tensor to its block and stamps it. The bytes of both must be equally many.

        A block whose segment was given back is left out: its request was aborted, nobody waits for it.
        """
        with self._lock:
            batch = []
            for block, tensor in copies:
                if tensor.nbytes != block.nbytes:
                    raise ValueError(f"a tensor of {tensor.nbytes} bytes does not fill a block of {block.nbytes}")
                batch += self._stamped(block, block.generation, tensor.detach().contiguous())
            self._copier.copy(batch)

    def fetch(self, block: Block, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """A stamped block's data on the writer's device, on CUDA by a copy on the current stream.

        Raises:
            BlockGone: the owner gave the segment back, or ended.
        """
        with self._lock:
            pages = self._pages(block.segment)
            return self._copier.fetch(pages, _data(pages, block).view(dtype).view(shape))

    def fail(self, block: Block) -> None:
        """Stamps that there is no data for the block: its reader gets CaptureFailed."""
        with self._lock:
            self._copier.copy(self._stamped(block, block.generation | _FAILED, None))

    def prepare(self, segments: Iterable[SegmentId]) -> None:
        """Maps segments before their first use, which on CUDA goes on in a thread."""
        with self._lock:
            for segment in segments:
                with suppress(BlockGone):
                    self._pages(segment)

    def drop_gone(self) -> None:
        """Unmaps the segments that the owner gave back, after the copies that are under way; the thread does it too."""
        with self._lock:
            mapped = list(self._segments)
        gone = [segment for segment in mapped if not self._is_there(segment)]
        with self._lock:
            self._drop(gone)

    def close(self) -> None:
        """Unmaps everything. Not to be called beside the other methods."""
        self._closed.set()
        if (looker := self._looker) is not None:
            looker.join()
        with self._lock:
            self._drop(list(self._segments))
        self._copier.close()

    def _keep_looking(self) -> None:
        while not self._closed.wait(_LOOK_SECONDS):
            self.drop_gone()
            with self._lock:
                if not self._segments:
                    self._looker = None
                    return

    def _is_there(self, segment: SegmentId) -> bool:
        with suppress(OSError):
            return _is(os.stat(_path(self._address, segment)), self._address, segment)  # noqa: PTH116 - as in _opened
        return False

    # Below: with the lock held.

    def _drop(self, segments: Iterable[SegmentId]) -> None:
        dropped = [pages for segment in segments if (pages := self._segments.pop(segment, None)) is not None]
        if dropped:
            self._copier.detach(dropped)

    def _stamped(self, block: Block, stamp: int, source: Tensor | None) -> list[_Copy]:
        with suppress(BlockGone):
            return [_Copy(self._pages(block.segment), block, stamp, source)]
        return []

    def _pages(self, segment: SegmentId) -> Tensor:
        if (pages := self._segments.get(segment)) is None:
            with _opened(self._address, segment, os.O_RDWR) as fd:
                # The tensor alone holds the mapping, which goes with it.
                pages = torch.frombuffer(mmap.mmap(fd, os.fstat(fd).st_size), dtype=torch.uint8)
            self._copier.attach(pages)
            self._segments[segment] = pages
            if self._looker is None:
                self._looker = threading.Thread(target=self._keep_looking, name="mm-embedding-looker", daemon=True)
                self._looker.start()
        return pages


# --- reader ----------------------------------------------------------------------------------------------------------


def read(handle: dict[str, Any], timeout: float = 60.0) -> Tensor:
    """Copies the rows of a lease out and ends the lease, also on an error. To be called once, from any thread.

    Args:
        handle: from Arena.handle, as it is or decoded from msgpack.
        timeout: seconds to wait for the writer's stamps.

    Returns:
        A CPU tensor (sum of the spans' rows, width), contiguous, in memory of its own.

    Raises:
        BlockGone: the owner ended, or the lease expired, was cancelled or read before.
        TransportTimeout: a block was not stamped in time.
        CaptureFailed: the writer has no data for a block.
        TransportError: this process may not open the memory.
    """
    address, spans = _decode(handle)
    width, dtype = spans[0].width, spans[0].dtype
    if any((span.width, span.dtype) != (width, dtype) for span in spans):
        raise ValueError("the spans of one lease must have one width and dtype")
    deadline = time.monotonic() + timeout
    with _open_lease(address, handle) as is_alive:
        rows = empty((sum(span.num_rows for span in spans), width), getattr(torch, dtype))
        into = _bytes_of(rows)
        for span in spans:
            with _opened(address, span.block.segment, os.O_RDONLY) as fd:
                _wait(fd, span.block, address, is_alive, deadline)
                _read_into(fd, into[: span.block.nbytes], span.block.offset + HEADER_BYTES)
                if _read_word(fd, span.block.offset) != span.block.generation:
                    raise _lease_gone()
            into = into[span.block.nbytes :]
        # Alive after the copies, so alive during them: no block was freed.
        if not is_alive():
            raise _lease_gone()
    return rows


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A CPU tensor whose memory goes back to the system with it, if it is large.

    malloc keeps what it took for tensors of some MiB once such a one was freed: gigabytes, after a batch. As with every
    tensor over a buffer, `resize_` cannot make it larger.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    with suppress(OSError):  # too many mappings, or a kernel without huge pages
        if nbytes >= _OWN_PAGES_BYTES:
            pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            pages.madvise(mmap.MADV_HUGEPAGE)  # fewer page faults: they take as long as the copy
            return torch.frombuffer(pages, dtype=dtype).view(tuple(shape))
    return torch.empty(tuple(shape), dtype=dtype)


_OWN_PAGES_BYTES = 1 << 20


def pack(rows: Tensor) -> dict[str, Any]:
    """A contiguous CPU tensor for msgpack: {"shape": list, "dtype": torch's name, "data": its memory, not copied}."""
    return {"shape": list(rows.shape), "dtype": str(rows.dtype).removeprefix("torch."), "data": _bytes_of(rows)}


def unpack(message: dict[str, Any]) -> Tensor:
    """The tensor of `pack`, as it is or decoded from msgpack, in memory of its own."""
    rows = empty(message["shape"], getattr(torch, message["dtype"]))
    _bytes_of(rows)[:] = message["data"]
    return rows


def _bytes_of(rows: Tensor) -> memoryview:
    return rows.view(-1).view(torch.uint8).numpy().data


def discard(handle: dict[str, Any]) -> None:
    """Ends a lease without reading it (its request was aborted).

    Nothing happens if it or its owner has ended, or if this process may not open it: it expires by itself.
    """
    with suppress(TransportError), _open_lease(_decode(handle)[0], handle):
        pass


def _decode(handle: dict[str, Any]) -> tuple[Address, list[Span]]:
    pid, started, device, *ledger = handle["owner"]
    spans = [
        Span(Block(SegmentId(fd, inode), offset, nbytes, generation), num_rows, width, dtype)
        for fd, inode, offset, nbytes, generation, num_rows, width, dtype in handle["spans"]
    ]
    return Address(pid, started, device, SegmentId(*ledger)), spans


@contextmanager
def _open_lease(address: Address, handle: dict[str, Any]) -> Iterator[Callable[[], bool]]:
    """Tells whether the lease is alive, and marks it as done at the end."""
    slot, generation = handle["lease"]
    with _opened(address, address.ledger, os.O_RDWR) as ledger:

        def is_alive() -> bool:
            return _read_word(ledger, slot * _SLOT_BYTES) == generation

        if not is_alive():
            raise _lease_gone()
        try:
            yield is_alive
        finally:
            if is_alive():  # otherwise the slot may be another lease's
                _write_word(ledger, slot * _SLOT_BYTES + _WORD, generation)


def _wait(fd: int, block: Block, address: Address, is_alive: Callable[[], bool], deadline: float) -> None:
    pause = 50e-6
    while (stamp := _read_word(fd, block.offset)) != block.generation:
        if stamp == block.generation | _FAILED:
            raise CaptureFailed("the worker found no embeddings for an item of this request: send the request again")
        if not is_alive():
            raise _lease_gone()
        if not _lives(address):
            raise _owner_gone(address)
        if time.monotonic() >= deadline:
            raise TransportTimeout(
                "the worker did not deliver the embeddings in time: look for its error in the log, or raise the timeout"
            )
        time.sleep(pause)
        pause = min(2 * pause, 2e-3)


def _read_into(fd: int, into: memoryview, offset: int) -> None:
    """Copies without the GIL and without a mapping, which would keep pages that the owner gives back."""
    while into:
        count = os.preadv(fd, [into], offset)
        if count == 0:
            raise _lease_gone()
        into, offset = into[count:], offset + count


def _lease_gone() -> BlockGone:
    return BlockGone(
        "the embeddings are gone, because their lease expired, was cancelled or was read before: send the request again"
    )
