"""Which block of the arena holds which item: references, re-use, eviction and the cap. Owned by the engine core.

An item's block is ALLOCATED when the first request that needs it is admitted, and DISPATCHED when a step that copies
it went to the worker. Requests hold the items they need; `deliver` turns a request's hold into a lease, which the
frontend ends. What nobody holds stays, up to `cache_bytes`, for a later request with the same item.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from harness.capture.arena import Arena
from harness.capture.transport import Block, Lease, SegmentId, Span, TransportError, footprint

_REAP_SECONDS = 0.1
"""How often the thread looks. While it does, the engine's step waits for the interpreter; and `acquire`, which may need
the memory, looks for itself."""


class ItemTooLarge(TransportError):  # noqa: N818 - the state that it reports
    """A request's items do not fit into the arena, not even alone."""


class NotDispatched(TransportError):  # noqa: N818 - the state that it reports
    """A request cannot be delivered yet: no step that copies all its items was sent to the worker."""


class Item(NamedTuple):
    """One multimodal item's embeddings: (num_rows, width) of the torch dtype of that name.

    `levels` tells the packed output with the deepstack levels from the rows cut to hidden_size.
    """

    identifier: str
    levels: bool
    num_rows: int
    width: int
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self.num_rows * self.width * _itemsize(self.dtype)


@functools.cache
def _itemsize(dtype: str) -> int:
    itemsize: int = getattr(torch, dtype).itemsize
    return itemsize


class Stats(NamedTuple):
    """The store now (upper part), and what happened since it was made (lower part).

    Bytes count whole blocks, but for `captured_bytes`, which are of rows.
    """

    held_bytes: int
    cached_bytes: int
    mapped_bytes: int
    items: int
    requests: int
    leases: int

    captured: int
    captured_bytes: int
    hits: int
    misses: int
    evictions: int
    waits: int
    expired: int


@dataclass(frozen=True, eq=False, slots=True)
class Loan:
    """A hold on an item while the worker reads its block."""

    item: Item
    block: Block


@dataclass(eq=False, slots=True)
class _Entry:
    item: Item
    block: Block
    nbytes: int = field(init=False)  # of the whole block
    dispatched: bool = False
    copied: bool = False  # as far as known: the worker's stamp was seen
    # Request ids (str), generations of leases (int) and loans.
    holders: set[str | int | Loan] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.nbytes = footprint(self.block.nbytes)


class EmbeddingStore:
    """Thread-safe: a small thread reaps leases and empty segments, so that an idle engine gives its memory back too.

    Args:
        arena: used by this store alone from now on.
        cache_bytes: cap of the blocks that nobody holds, kept for re-use. 0 keeps none.
    """

    def __init__(self, arena: Arena, cache_bytes: int = 0) -> None:
        self._arena = arena
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()
        self._index: dict[Item, _Entry] = {}
        self._cached: OrderedDict[Item, _Entry] = OrderedDict()  # indexed, held by nobody; least recently used first
        self._cached_bytes = 0
        self._num_entries = 0  # in the index or held
        self._requests: dict[str, list[_Entry]] = {}  # in the request's item order, with repeats
        self._leases: dict[int, tuple[Lease, list[_Entry]]] = {}
        self._loans: dict[Loan, _Entry] = {}
        self._captured = self._captured_bytes = self._hits = self._misses = 0
        self._evictions = self._waits = self._expired = 0
        self._reaper: threading.Thread | None = None
        self._closed = threading.Event()

    def acquire(self, request_id: str, items: Sequence[Item]) -> bool:
        """Takes hold of all items of a request, or of none and returns False: there is no room until others let go.

        Items are in prompt order and may repeat. Nothing happens if the request has its items already.

        Raises:
            ItemTooLarge: there will never be room.
        """
        if not items:
            raise ValueError("a request without items has nothing to acquire")
        with self._lock:
            if request_id in self._requests:
                return True
            self._reap()
            entries: dict[Item, _Entry] = {}
            missing = []
            for item in dict.fromkeys(items):  # once each: the worker may stamp meanwhile
                entry = self._find_or_forget(item)
                if entry is None:
                    missing.append(item)
                else:
                    entries[item] = entry
            if missing and not self._has_room(request_id, entries.values(), missing):
                self._waits += 1
                return False
            self._hits += len(entries)
            self._misses += len(missing)
            for entry in entries.values():
                self._hold(entry, request_id)
            for item in missing:
                entries[item] = self._make(item, request_id)
            self._requests[request_id] = [entries[item] for item in items]
            return True

    def holds(self, request_id: str) -> bool:
        """Whether the request has its items and was not delivered or released since."""
        with self._lock:
            return request_id in self._requests

    def is_dispatched(self, request_id: str, item: Item) -> bool:
        """Whether a step that copies this item, which the request holds, was sent to the worker."""
        with self._lock:
            return self._entry(request_id, item).dispatched

    def pending(self, request_id: str) -> list[Item]:
        """The request's items that are not dispatched, in prompt order, without repeats."""
        entries = self._requests.get(request_id, [])  # no lock: the thread changes nothing of what is looked at here
        return list(dict.fromkeys([entry.item for entry in entries if not entry.dispatched]))

    def dispatch(self, request_id: str, item: Item) -> Block | None:
        """The block to which the worker has to copy the item in the step being built; None if a step did before."""
        with self._lock:
            entry = self._entry(request_id, item)
            if entry.dispatched:
                return None
            entry.dispatched = True
            self._captured += 1
            self._captured_bytes += entry.block.nbytes
            return entry.block

    def deliver(self, request_id: str) -> dict[str, Any]:
        """Turns the request's hold into a lease and returns the handle for reader.read, spans in item order.

        Raises:
            NotDispatched: an item of the request is not dispatched, or the request holds none.
        """
        with self._lock:
            entries = self._requests.get(request_id)
            if entries is None:
                raise NotDispatched(f"request {request_id} holds no embeddings: acquire its items first")
            for entry in entries:
                if not entry.dispatched:
                    raise NotDispatched(f"request {request_id} has items that no step has copied: dispatch them first")
            lease = self._arena.lease()
            self._leases[lease.generation] = (lease, entries)
            del self._requests[request_id]
            for entry in entries:
                entry.holders.add(lease.generation)
                entry.holders.discard(request_id)  # maybe already: an item may occur again in its request
            self._start_reaper()
            spans = [Span(entry.block, entry.item.num_rows, entry.item.width, entry.item.dtype) for entry in entries]
            return self._arena.handle(lease, spans)

    def lend(self, item: Item) -> Loan | None:
        """Holds an item whose rows are in its block until `end_loan`; None if they are not."""
        with self._lock:
            entry = self._index.get(item)
            if entry is None or not self._is_copied(entry):
                return None
            loan = Loan(item, entry.block)
            self._hold(entry, loan)
            self._loans[loan] = entry
            return loan

    def end_loan(self, loan: Loan) -> None:
        """The worker has read the block."""
        with self._lock:
            if (entry := self._loans.pop(loan, None)) is not None:
                self._drop(entry, loan)

    def cancel(self, handle: dict[str, Any]) -> None:
        """Ends the lease of a handle that nobody will read. Nothing happens if it has ended."""
        _slot, generation = handle["lease"]
        with self._lock:
            if generation in self._leases:
                lease, _entries = self._leases[generation]
                self._arena.withdraw(lease)
                self._end_lease(lease)

    def release(self, request_id: str) -> None:
        """Drops what the request holds (finish or abort). Nothing happens if it holds nothing; a lease is kept."""
        with self._lock:
            self._release(request_id)

    def reap(self) -> None:
        """Ends the leases that are done or expired and gives memory back, as the store's thread does all the time."""
        with self._lock:
            self._reap()
            self._arena.trim()

    def reset(self) -> None:
        """Forgets all items, because the weights changed. What requests and leases hold stays theirs alone."""
        with self._lock:
            self._index.clear()
            while self._cached:
                self._free(self._pop_cached(next(iter(self._cached))))

    def take_made(self) -> list[SegmentId]:
        """The segments that the arena made since the last call: send them to Writer.prepare with the next step."""
        if not self._arena.made:  # asked at every step
            return []
        with self._lock:
            return self._arena.take_made()

    def stats(self) -> Stats:
        """A snapshot."""
        with self._lock:
            return Stats(
                held_bytes=self._arena.held_bytes,
                cached_bytes=self._cached_bytes,
                mapped_bytes=self._arena.mapped_bytes,
                items=self._num_entries,
                requests=len(self._requests),
                leases=len(self._leases),
                captured=self._captured,
                captured_bytes=self._captured_bytes,
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                waits=self._waits,
                expired=self._expired,
            )

    def close(self) -> None:
        """Ends everything and closes the arena. Readers get BlockGone."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            self._index.clear()
            self._cached.clear()
            self._requests.clear()
            self._leases.clear()
            self._loans.clear()
            self._cached_bytes = self._num_entries = 0
            self._arena.close()
            reaper = self._reaper
        if reaper is not None:
            reaper.join()

    # Below: with the lock held.

    def _entry(self, request_id: str, item: Item) -> _Entry:
        # Not from the index: after a reset it may have another entry of this item, for later requests.
        for entry in self._requests.get(request_id, []):
            if entry.item == item:
                return entry
        raise KeyError(f"request {request_id} does not hold item {item.identifier}")

    def _has_room(self, request_id: str, found: Collection[_Entry], missing: Collection[Item]) -> bool:
        """Whether there is room for the missing items beside those found, all of one request.

        Raises:
            ItemTooLarge: there will never be room.
        """
        capacity = self._arena.capacity_bytes
        needed = sum(footprint(item.nbytes) for item in missing)
        if (total := needed + sum(entry.nbytes for entry in found)) > capacity:
            raise ItemTooLarge(
                f"the embeddings of request {request_id} take {total} bytes, more than the capture's cap of {capacity} "
                "bytes: raise the cap or send fewer items"
            )
        evictable = self._cached_bytes - sum(entry.nbytes for entry in found if not entry.holders)
        return self._arena.held_bytes - evictable + needed <= capacity

    def _allocate(self, nbytes: int) -> Block:
        """A block; acquire() made sure that there is room once the cache is empty."""
        while (block := self._arena.allocate(nbytes)) is None:
            if not self._cached:
                block = self._arena.allocate(nbytes, fragmented=True)
                assert block is not None
                break
            self._evict()
        return block

    def _make(self, item: Item, request_id: str) -> _Entry:
        """An entry for an item that has none, held by the request."""
        entry = self._index[item] = _Entry(item, self._allocate(item.nbytes))
        self._num_entries += 1
        entry.holders.add(request_id)
        return entry

    def _hold(self, entry: _Entry, holder: str | Loan) -> None:
        if not entry.holders:
            self._pop_cached(entry.item)
        entry.holders.add(holder)

    def _drop(self, entry: _Entry, holder: str | int | Loan) -> None:
        if holder not in entry.holders:  # an item that occurs again in its request
            return
        entry.holders.remove(holder)
        if entry.holders:
            return
        if self._index.get(entry.item) is not entry:  # forgotten by a reset
            self._free(entry)
        elif not entry.dispatched or entry.nbytes > self._cache_bytes:
            del self._index[entry.item]
            self._free(entry)
        else:
            self._cached[entry.item] = entry
            self._cached_bytes += entry.nbytes
            while self._cached_bytes > self._cache_bytes:
                self._evict()

    def _evict(self) -> None:
        entry = self._pop_cached(next(iter(self._cached)))
        del self._index[entry.item]
        self._free(entry)
        self._evictions += 1

    def _pop_cached(self, item: Item) -> _Entry:
        entry = self._cached.pop(item)
        self._cached_bytes -= entry.nbytes
        return entry

    def _free(self, entry: _Entry) -> None:
        self._num_entries -= 1
        self._arena.free(entry.block)
        self._start_reaper()

    def _find_or_forget(self, item: Item) -> _Entry | None:
        """The item's entry; not one that the worker had no data for, which is forgotten."""
        entry = self._index.get(item)
        if entry is None or not entry.dispatched or self._is_copied(entry):
            return entry
        # The worker sends no message back, but its stamp is there to read.
        if self._arena.failed(entry.block):
            del self._index[item]
            if not entry.holders:
                self._free(self._pop_cached(item))
            return None
        return entry

    def _is_copied(self, entry: _Entry) -> bool:
        if not entry.copied and entry.dispatched:  # a system call
            entry.copied = self._arena.stamped(entry.block)
        return entry.copied

    def _release(self, request_id: str) -> None:
        for entry in self._requests.pop(request_id, []):
            self._drop(entry, request_id)

    def _end_lease(self, lease: Lease) -> None:
        _lease, entries = self._leases.pop(lease.generation)
        for entry in entries:
            self._drop(entry, lease.generation)

    def _reap(self) -> None:
        done, expired = self._arena.reap()
        for lease in done + expired:
            self._end_lease(lease)
        self._expired += len(expired)

    def _start_reaper(self) -> None:
        if self._reaper is None and not self._closed.is_set():
            self._reaper = threading.Thread(target=self._keep_reaping, name="mm-embedding-reaper", daemon=True)
            self._reaper.start()

    def _keep_reaping(self) -> None:
        while not self._closed.wait(_REAP_SECONDS):
            with self._lock:
                if self._closed.is_set():
                    return
                self._reap()
                if not self._arena.trim() and not self._leases:
                    self._reaper = None
                    return
