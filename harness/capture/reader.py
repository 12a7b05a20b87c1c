"""Reader's side of the shared memory, in the frontend: copies rows out, into memory of their own."""

from __future__ import annotations

import math
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from harness.capture.transport import (
    FAILED,
    HEADER_BYTES,
    SLOT_BYTES,
    WORD,
    Address,
    Block,
    BlockGone,
    CaptureFailed,
    SegmentId,
    Span,
    TransportError,
    TransportTimeout,
    lives,
    opened,
    owner_gone,
    read_word,
    write_word,
)


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
            with opened(address, span.block.segment, os.O_RDONLY) as fd:
                _wait(fd, span.block, address, is_alive, deadline)
                _read_into(fd, into[: span.block.nbytes], span.block.offset + HEADER_BYTES)
                if read_word(fd, span.block.offset) != span.block.generation:
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
    with opened(address, address.ledger, os.O_RDWR) as ledger:

        def is_alive() -> bool:
            return read_word(ledger, slot * SLOT_BYTES) == generation

        if not is_alive():
            raise _lease_gone()
        try:
            yield is_alive
        finally:
            if is_alive():  # otherwise the slot may be another lease's
                write_word(ledger, slot * SLOT_BYTES + WORD, generation)


def _wait(fd: int, block: Block, address: Address, is_alive: Callable[[], bool], deadline: float) -> None:
    pause = 50e-6
    while (stamp := read_word(fd, block.offset)) != block.generation:
        if stamp == block.generation | FAILED:
            raise CaptureFailed("the worker found no embeddings for an item of this request: send the request again")
        if not is_alive():
            raise _lease_gone()
        if not lives(address):
            raise owner_gone(address)
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
