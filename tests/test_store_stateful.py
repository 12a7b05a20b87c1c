"""Random lives of requests against a model that knows only who holds what and which bytes were written where.

The model does not know what the store caches and evicts. It does not have to: what nobody holds can be evicted, so
whether a request gets room depends on what is held; and every capture between two resets has the same bytes.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from harness.capture import arena, reader
from harness.capture.arena import Arena
from harness.capture.reader import read
from harness.capture.store import EmbeddingStore, Item, ItemTooLarge, Loan, NotDispatched
from harness.capture.transport import Block, BlockGone, CaptureFailed, TransportTimeout, footprint
from harness.capture.writer import Writer

CAPACITY = 8192
LEASE_SECONDS = 100.0
WIDTH = 32
NUM_ROWS = {"a": 1, "b": 3, "c": 7, "d": 12, "e": 20, "f": 30}
TOO_LARGE = Item("too large", False, 70, WIDTH, "float32")


def item_of(name: str) -> Item:
    return Item(name, False, NUM_ROWS[name], WIDTH, "float32")


def rows_of(name: str, epoch: int) -> torch.Tensor:
    """What the encoder makes of an item with the weights of this epoch; every value tells where it belongs."""
    num_values = NUM_ROWS[name] * WIDTH
    return (torch.arange(num_values) + 1000 * ord(name) + 1_000_000 * epoch).float().view(-1, WIDTH)


class StoreWithoutThread(EmbeddingStore):
    """Leases end when somebody asks: the same at each replay."""

    def _start_reaper(self) -> None:
        pass


@dataclass(eq=False)
class Copy:
    """An item's place in the store, while somebody holds it."""

    name: str
    holders: set[object] = field(default_factory=set)
    generation: int | None = None  # of the block, once dispatched


@dataclass(eq=False)
class Request:
    request_id: str
    names: list[str]
    epoch: int
    copies: dict[str, Copy]
    holds: bool = True


@dataclass(eq=False)
class Reading:
    """A lease."""

    handle: dict[str, Any]
    request: Request
    deadline: float
    done: bool = False
    alive: bool = True  # the store has not noticed its end


@dataclass
class Written:
    """What the worker was told to put into a block."""

    name: str
    epoch: int
    state: str = "queued"  # then "written" or "failed"


class StoreMachine(RuleBasedStateMachine):
    requests = Bundle("requests")
    readings = Bundle("readings")
    lendings = Bundle("lendings")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=self.advance)
        self.patches = [mock.patch.object(module, "time", clock) for module in (arena, reader)]
        for patch in self.patches:
            patch.start()
        self.epoch = 0
        self.count = 0
        self.shared: dict[str, Copy] = {}  # held copies that a new request may share
        self.held: set[Copy] = set()
        self.all_requests: list[Request] = []
        self.all_readings: list[Reading] = []
        self.all_loans: dict[Loan, Copy] = {}
        self.written: dict[int, Written] = {}  # by generation
        self.captured: dict[str, int] = {}  # name: generation of its last block since the reset
        self.queue: list[Block] = []

    @initialize(cache_bytes=st.sampled_from([0, 1000, 3000, CAPACITY]))
    def start(self, cache_bytes: int) -> None:
        self.cache_bytes = cache_bytes
        self.arena = Arena(CAPACITY, segment_bytes=4096, lease_seconds=LEASE_SECONDS, retain_seconds=0.0)
        self.store = StoreWithoutThread(self.arena, cache_bytes)
        self.writer = Writer(self.arena.address)

    def advance(self, seconds: float) -> None:
        self.now += max(seconds, 0.5)

    # --- the model

    def bytes_held(self) -> int:
        return sum(footprint(item_of(copy.name).nbytes) for copy in self.held)

    def let_go(self, copies: Iterable[Copy], holder: object) -> None:
        for copy in copies:
            copy.holders.discard(holder)
            if not copy.holders:
                self.held.discard(copy)
                if self.shared.get(copy.name) is copy:
                    del self.shared[copy.name]

    def notice_ends(self) -> None:
        for reading in self.all_readings:
            if reading.alive and (reading.done or reading.deadline <= self.now):
                reading.alive = False
                self.let_go(reading.request.copies.values(), reading)

    def has_failed(self, copy: Copy) -> bool:
        return copy.generation is not None and self.written[copy.generation].state == "failed"

    # --- the scheduler

    @rule(target=requests, names=st.lists(st.sampled_from(sorted(NUM_ROWS)), min_size=1, max_size=4))
    def submit(self, names: list[str]) -> Any:
        self.count += 1
        request_id = str(self.count)
        items = [item_of(name) for name in names]
        self.notice_ends()
        if sum(footprint(item.nbytes) for item in set(items)) > CAPACITY:
            with pytest.raises(ItemTooLarge):
                self.store.acquire(request_id, items)
            return multiple()
        usable = {name: self.shared[name] for name in names if name in self.shared}
        usable = {name: copy for name, copy in usable.items() if not self.has_failed(copy)}
        needed = sum(footprint(item.nbytes) for item in set(items) if item.identifier not in usable)
        there_is_room = self.bytes_held() + needed <= CAPACITY
        assert self.store.acquire(request_id, items) == there_is_room
        if not there_is_room:
            assert not self.store.holds(request_id)
            return multiple()
        copies = {name: usable.get(name) or Copy(name) for name in names}
        request = Request(request_id, names, self.epoch, copies)
        for copy in copies.values():
            if copy.generation is None and self.store.is_dispatched(request_id, item_of(copy.name)):
                self.adopt(copy)  # now: a reset forgets what was captured, and the worker may fail later
                assert not self.has_failed(copy)
            copy.holders.add(request)
            self.held.add(copy)
            self.shared[copy.name] = copy
        self.all_requests.append(request)
        return request

    @rule()
    def submit_too_large(self) -> None:
        self.notice_ends()
        with pytest.raises(ItemTooLarge):
            self.store.acquire("too large", [TOO_LARGE])

    @rule(request=requests)
    def submit_again(self, request: Request) -> None:
        """The scheduler asks at every step until the request runs."""
        if request.holds:
            assert self.store.acquire(request.request_id, [item_of(name) for name in request.names])

    @rule(request=requests, whole=st.booleans())
    def dispatch(self, request: Request, whole: bool) -> None:
        if not request.holds:
            return
        pending = self.store.pending(request.request_id)
        for item in pending if whole else [item_of(request.names[0])]:
            copy = request.copies[item.identifier]
            block = self.store.dispatch(request.request_id, item)
            assert (block is not None) == (item in pending)
            if block is None:
                assert copy.generation is not None
            else:
                assert copy.generation is None, "dispatched twice"
                assert block.generation not in self.written
                self.written[block.generation] = Written(copy.name, self.epoch)
                copy.generation = block.generation
                if request.epoch == self.epoch:
                    self.captured[copy.name] = block.generation
                self.queue.append(block)

    def adopt(self, copy: Copy) -> None:
        """Dispatched, but by none of its holders: it was cached."""
        copy.generation = self.captured[copy.name]

    @rule(target=readings, request=requests)
    def deliver(self, request: Request) -> Any:
        if not request.holds or self.store.pending(request.request_id):
            with pytest.raises(NotDispatched):
                self.store.deliver(request.request_id)
            return multiple()
        handle = self.store.deliver(request.request_id)
        assert not self.store.holds(request.request_id)
        assert [span[4] for span in handle["spans"]] == [self.generation(request, name) for name in request.names]
        reading = Reading(handle, request, self.now + LEASE_SECONDS)
        for copy in request.copies.values():
            copy.holders.add(reading)
        self.let_go(request.copies.values(), request)
        request.holds = False
        self.all_readings.append(reading)
        return reading

    def generation(self, request: Request, name: str) -> int:
        generation = request.copies[name].generation
        assert generation is not None
        return generation

    @rule(target=lendings, request=requests)
    def lend(self, request: Request) -> Any:
        """An item that was asked for once: held, cached, evicted or never captured."""
        name = request.names[-1]
        copy, loan = self.shared.get(name), self.store.lend(item_of(name))
        if copy is not None:
            there = copy.generation is not None and self.written[copy.generation].state == "written"
            assert (loan is not None) == there
        if loan is None:
            return multiple()
        if copy is None:  # it was cached
            copy = Copy(name)
            self.adopt(copy)
        assert loan.block.generation == copy.generation
        copy.holders.add(loan)
        self.held.add(copy)
        self.shared[name] = copy
        self.all_loans[loan] = copy
        return loan

    @rule(loan=consumes(lendings))
    def load(self, loan: Loan) -> None:
        """The worker reads the block, steps later, and the store hears of it."""
        copy = self.all_loans.pop(loan)
        assert copy.generation is not None
        rows = self.writer.fetch(loan.block, (loan.item.num_rows, WIDTH), torch.float32)
        assert torch.equal(rows, rows_of(copy.name, self.written[copy.generation].epoch))
        self.store.end_loan(loan)
        self.let_go([copy], loan)

    @rule(request=requests)
    def finish_or_abort(self, request: Request) -> None:
        self.store.release(request.request_id)
        if request.holds:
            request.holds = False
            self.let_go(request.copies.values(), request)

    @rule(reading=readings)
    def cancel(self, reading: Reading) -> None:
        self.store.cancel(reading.handle)
        if reading.alive:
            reading.alive = False
            self.let_go(reading.request.copies.values(), reading)

    @rule()
    def reap(self) -> None:
        self.store.reap()
        self.notice_ends()

    @rule(target=requests)
    def reset(self) -> Any:
        self.store.reset()
        self.epoch += 1
        self.shared.clear()
        self.captured.clear()
        return multiple()

    @rule(seconds=st.sampled_from([1.0, 30.0, LEASE_SECONDS]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    # --- the worker, some steps behind

    @rule(count=st.integers(1, 5))
    def work(self, count: int) -> None:
        for _ in range(min(count, len(self.queue))):
            block = self.queue.pop(0)
            written = self.written[block.generation]
            self.writer.write(block, rows_of(written.name, written.epoch))
            written.state = "written"

    @rule(request=requests)
    def capture(self, request: Request) -> None:
        """A step that nothing disturbs."""
        self.dispatch(request=request, whole=True)
        self.work(count=len(self.queue))

    @rule()
    def fail(self) -> None:
        if self.queue:
            block = self.queue.pop(0)
            self.writer.fail(block)
            self.written[block.generation].state = "failed"

    @rule()
    def drop(self) -> None:
        self.writer.drop_gone()

    # --- the frontend

    @rule(reading=readings)
    def read(self, reading: Reading) -> None:
        """Also late, and again."""
        if not reading.alive:
            with pytest.raises(BlockGone):
                read(reading.handle)
            return
        request = reading.request
        written = [self.written[self.generation(request, name)] for name in request.names]
        assert [one.name for one in written] == request.names
        assert all(one.epoch >= request.epoch for one in written), "captured before the weights changed"
        unwritten = [one.state for one in written if one.state != "written"]
        if unwritten:
            error = {"failed": CaptureFailed, "queued": TransportTimeout}[unwritten[0]]
            with pytest.raises(error):
                read(reading.handle)
        else:
            assert torch.equal(read(reading.handle), torch.cat([rows_of(one.name, one.epoch) for one in written]))
        reading.done = True

    @rule(reading=consumes(readings))
    def discard(self, reading: Reading) -> None:
        reader.discard(reading.handle)
        reading.done = True

    # --- always

    @invariant()
    def nothing_is_held_but_by_somebody(self) -> None:
        if not hasattr(self, "store"):
            return
        stats = self.store.stats()
        assert stats.held_bytes <= CAPACITY
        assert stats.cached_bytes <= self.cache_bytes
        assert stats.held_bytes - stats.cached_bytes == self.bytes_held()
        assert stats.requests == sum(request.holds for request in self.all_requests)
        assert stats.leases == sum(reading.alive for reading in self.all_readings)
        assert stats.mapped_bytes >= stats.held_bytes

    def teardown(self) -> None:
        try:
            if hasattr(self, "store"):
                self.end()
        finally:
            if hasattr(self, "store"):
                self.writer.close()
                self.store.close()
            for patch in self.patches:
                patch.stop()

    def end(self) -> None:
        for request in self.all_requests:
            self.store.release(request.request_id)
        for reading in self.all_readings:
            reader.discard(reading.handle)
        for loan in self.all_loans:
            self.store.end_loan(loan)
        self.store.reap()
        stats = self.store.stats()
        assert stats.held_bytes == stats.cached_bytes
        self.store.reset()
        self.store.reap()
        stats = self.store.stats()
        assert (stats.held_bytes, stats.cached_bytes, stats.items, stats.leases, stats.requests) == (0, 0, 0, 0, 0)
        assert stats.mapped_bytes <= 4096


StoreMachine.TestCase.settings = settings(max_examples=500, stateful_step_count=50, deadline=None)
TestStore = StoreMachine.TestCase
