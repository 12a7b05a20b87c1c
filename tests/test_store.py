"""Who holds which embeddings, what is kept for later, and when a request waits."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import msgspec
import pytest
import torch

from harness.capture import store as store_module
from harness.capture.arena import Arena
from harness.capture.reader import read
from harness.capture.store import EmbeddingStore, Item, ItemTooLarge, NotDispatched
from harness.capture.transport import Block, BlockGone, CaptureFailed, TransportTimeout, footprint
from harness.capture.writer import Writer

PAGE = 4096
WIDTH = 32
SEGMENT = PAGE


def item(identifier: str, num_rows: int = 7, levels: bool = False) -> Item:
    return Item(identifier, levels, num_rows, WIDTH, "float32")


BLOCK = footprint(item("").nbytes)  # 960 bytes: four to a segment


def rows_of(wanted: Item) -> torch.Tensor:
    """Rows that no other item has."""
    seed = int.from_bytes(wanted.identifier.encode(), "big") * 2 + wanted.levels
    return torch.randn(wanted.num_rows, wanted.width, generator=torch.Generator().manual_seed(seed))


class Engine:
    """A store with the worker's side in the same process."""

    def __init__(
        self, capacity_bytes: int = 16 * PAGE, cache_bytes: int = 16 * PAGE, lease_seconds: float = 60
    ) -> None:
        self.arena = Arena(capacity_bytes, SEGMENT, lease_seconds, retain_seconds=0.0)
        self.store = EmbeddingStore(self.arena, cache_bytes)
        self.writer = Writer(self.arena.address)

    def dispatch(self, request_id: str) -> list[tuple[Item, Block]]:
        """All pending items of a request."""
        copies = []
        for pending in self.store.pending(request_id):
            block = self.store.dispatch(request_id, pending)
            assert block is not None
            copies.append((pending, block))
        return copies

    def step(self, request_id: str) -> int:
        """Dispatches and copies what is pending; how many items."""
        copies = self.dispatch(request_id)
        self.writer.write_many([(block, rows_of(copied)) for copied, block in copies])
        self.writer.drop_gone()
        return len(copies)

    def run(self, request_id: str, *items: Item) -> torch.Tensor:
        """A request from admission to delivery."""
        assert self.store.acquire(request_id, items)
        self.step(request_id)
        rows = read(self.store.deliver(request_id), timeout=5)
        self.store.release(request_id)
        self.store.reap()
        return rows


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(*args: float, **kwargs: float) -> Engine:
        engines.append(Engine(*args, **kwargs))  # type: ignore[arg-type]
        return engines[-1]

    yield make
    for engine in engines:
        engine.store.close()
        engine.writer.close()


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    return make_engine()


# --- one request -----------------------------------------------------------------------------------------------------


def test_the_rows_come_in_the_requests_order_with_repeats(engine: Engine) -> None:
    a, b = item("a", 2), item("b", 3)
    rows = engine.run("r", b, a, b)
    assert torch.equal(rows, torch.cat([rows_of(b), rows_of(a), rows_of(b)]))
    assert engine.store.stats().captured == 2


def test_levels_and_rows_of_one_identifier_are_two_items(engine: Engine) -> None:
    assert not torch.equal(engine.run("1", item("a")), engine.run("2", item("a", levels=True)))
    assert engine.store.stats().captured == 2


def test_a_handle_has_only_integers_strings_and_lists(engine: Engine) -> None:
    engine.store.acquire("r", [item("a"), item("b")])
    engine.step("r")
    handle = engine.store.deliver("r")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(handle)) == handle


def test_what_is_pending_is_dispatched_once(engine: Engine) -> None:
    a, b = item("a"), item("b")
    engine.store.acquire("r", [a, b, a])
    assert engine.store.pending("r") == [a, b]
    assert not engine.store.is_dispatched("r", a)
    assert engine.store.dispatch("r", a) is not None
    assert engine.store.dispatch("r", a) is None
    assert engine.store.is_dispatched("r", a)
    assert engine.store.pending("r") == [b]


def test_a_request_is_not_delivered_before_all_items_are_dispatched(engine: Engine) -> None:
    engine.store.acquire("r", [item("a"), item("b")])
    engine.store.dispatch("r", item("a"))
    with pytest.raises(NotDispatched, match="dispatch them first"):
        engine.store.deliver("r")
    assert engine.store.holds("r")
    assert engine.store.stats().leases == 0
    engine.store.dispatch("r", item("b"))
    engine.store.deliver("r")
    assert not engine.store.holds("r")


def test_an_unknown_request(engine: Engine) -> None:
    engine.store.release("r")
    assert not engine.store.holds("r")
    assert engine.store.pending("r") == []
    with pytest.raises(NotDispatched, match="acquire its items first"):
        engine.store.deliver("r")
    with pytest.raises(KeyError, match="does not hold item a"):
        engine.store.dispatch("r", item("a"))


def test_a_request_needs_items(engine: Engine) -> None:
    with pytest.raises(ValueError, match="without items"):
        engine.store.acquire("r", [])


def test_to_acquire_again_changes_nothing(engine: Engine) -> None:
    engine.store.acquire("r", [item("a")])
    before = engine.store.stats()
    assert engine.store.acquire("r", [item("a")])
    assert engine.store.stats() == before
    engine.store.release("r")
    assert engine.store.stats().held_bytes == 0


# --- room ------------------------------------------------------------------------------------------------------------


def test_a_request_waits_for_room_and_gets_all_or_nothing(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(3 * BLOCK)
    assert engine.store.acquire("1", [item("a"), item("b")])
    before = engine.store.stats()
    assert not engine.store.acquire("2", [item("c"), item("d")])
    after = engine.store.stats()
    assert (after.held_bytes, after.items, after.requests, after.waits) == (before.held_bytes, 2, 1, 1)
    assert not engine.store.holds("2")
    assert engine.store.acquire("3", [item("a"), item("c"), item("b")]), "a and b are there"
    engine.store.release("1")
    assert not engine.store.acquire("2", [item("c"), item("d")])
    engine.store.release("3")
    assert engine.store.acquire("2", [item("c"), item("d")])


def test_a_request_that_can_never_fit_is_told_so(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(2 * BLOCK)
    with pytest.raises(ItemTooLarge, match=r"request r .*raise the cap"):
        engine.store.acquire("r", [item("a"), item("b"), item("c")])
    assert engine.store.acquire("r", [item("a"), item("b"), item("a")]), "repeats take no room"


def test_a_lease_keeps_its_blocks_until_it_is_done(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(BLOCK)
    engine.store.acquire("1", [item("a")])
    engine.step("1")
    handle = engine.store.deliver("1")
    engine.store.release("1")
    assert not engine.store.acquire("2", [item("b")])
    read(handle)
    assert engine.store.acquire("2", [item("b")]), "acquire reaps by itself"


def test_what_was_read_is_not_found_again_without_a_cache(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.capture.store._REAP_SECONDS", 60.0)
    engine = make_engine(cache_bytes=0)
    engine.store.acquire("1", [item("a")])
    engine.step("1")
    read(engine.store.deliver("1"))
    engine.store.acquire("2", [item("a")])
    assert engine.store.pending("2") == [item("a")], "a truth that is to be captured anew would be the same capture"


@pytest.mark.parametrize("held", [False, True])
def test_an_item_that_fails_while_a_request_with_it_twice_is_admitted_is_one_item(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    engine = make_engine()
    engine.store.acquire("1", [item("a")])
    engine.dispatch("1")
    if not held:
        engine.store.release("1")
    stamps = iter([False])
    monkeypatch.setattr(engine.arena, "failed", lambda _block: next(stamps, True))
    assert engine.store.acquire("2", [item("a")] * 2)
    assert engine.store.pending("2") == [], "the worker had not failed when it was looked at"
    assert engine.store.acquire("3", [item("a")] * 2)
    assert engine.store.pending("3") == [item("a")]
    assert engine.step("3") == 1


def test_acquire_looks_for_done_leases_before_it_takes_memory_beyond_the_cap(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.capture.store._REAP_SECONDS", 60.0)
    engine = make_engine(2 * SEGMENT, cache_bytes=0)
    for name in "abcdefgh":  # four to a segment
        engine.store.acquire(name, [item(name)])
    for name in "degh":
        engine.store.release(name)
    for name in "abc":
        engine.step(name)
        read(engine.store.deliver(name))
    assert engine.store.acquire("r", [item("long", 21)]), "there is room, in pieces"
    assert engine.store.stats().mapped_bytes == 2 * SEGMENT


def test_a_lease_that_is_never_read_expires(make_engine: Callable[..., Engine], arena_clock: SimpleNamespace) -> None:
    engine = make_engine(BLOCK, lease_seconds=60)
    engine.store.acquire("1", [item("a")])
    engine.step("1")
    handle = engine.store.deliver("1")
    assert not engine.store.acquire("2", [item("b")])
    arena_clock.now += 60
    assert engine.store.acquire("2", [item("b")])
    engine.step("2")
    with pytest.raises(BlockGone):
        read(handle)
    assert torch.equal(read(engine.store.deliver("2")), rows_of(item("b")))
    assert engine.store.stats().expired == 1


def test_a_cancelled_lease_is_over(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(BLOCK)
    engine.store.acquire("1", [item("a")])
    engine.step("1")
    handle = engine.store.deliver("1")
    engine.store.cancel(handle)
    engine.store.cancel(handle)
    assert engine.store.acquire("2", [item("b")])
    with pytest.raises(BlockGone):
        read(handle)


def test_fragments_do_not_make_a_request_wait_for_ever(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(2 * SEGMENT)
    for name in "abcdefgh":
        assert engine.store.acquire(name, [item(name)])
    for name in "abdefh":  # what remains: the third block of each segment
        engine.store.release(name)
    assert engine.store.acquire("r", [item("long", 21)])
    assert engine.store.stats().mapped_bytes == 3 * SEGMENT
    engine.step("r")
    assert torch.equal(read(engine.store.deliver("r")), rows_of(item("long", 21)))


def test_cached_items_are_evicted_before_the_arena_grows_over_its_cap(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(2 * SEGMENT)
    for name in "abcdefgh":
        engine.run(name, item(name))
    assert engine.store.acquire("r", [item("long", 21)])
    assert engine.store.stats().mapped_bytes == 2 * SEGMENT


# --- re-use ----------------------------------------------------------------------------------------------------------


def test_a_lent_item_is_there_until_the_loan_ends(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(cache_bytes=BLOCK)
    engine.run("1", item("a"))
    loan = engine.store.lend(item("a"))
    assert loan is not None
    engine.run("2", item("b"))  # takes the room of the cache
    engine.run("3", item("c"))
    assert torch.equal(engine.writer.fetch(loan.block, (7, WIDTH), torch.float32), rows_of(item("a")))
    engine.store.end_loan(loan)
    engine.store.end_loan(loan)
    assert engine.store.stats().held_bytes == engine.store.stats().cached_bytes == BLOCK
    assert engine.store.lend(item("c")) is None, "the room is that of the last one that was let go of"


def test_what_is_not_copied_yet_is_not_lent(engine: Engine) -> None:
    assert engine.store.lend(item("a")) is None
    engine.store.acquire("1", [item("a")])
    assert engine.store.lend(item("a")) is None
    [(_, block)] = engine.dispatch("1")
    assert engine.store.lend(item("a")) is None, "the worker was told to copy it and has not"
    engine.writer.write(block, rows_of(item("a")))
    assert engine.store.lend(item("a")) is not None


def test_a_loan_outlives_a_reset(engine: Engine) -> None:
    engine.run("1", item("a"))
    loan = engine.store.lend(item("a"))
    assert loan is not None
    engine.store.reset()
    assert engine.store.lend(item("a")) is None, "the weights changed"
    assert engine.store.stats().held_bytes == BLOCK
    engine.store.end_loan(loan)
    assert engine.store.stats().held_bytes == 0


def test_a_cached_item_is_used_again(engine: Engine) -> None:
    engine.run("1", item("a"))
    assert engine.store.stats().cached_bytes == engine.store.stats().held_bytes == BLOCK
    assert engine.store.acquire("2", [item("a")])
    assert engine.store.stats().cached_bytes == 0
    assert engine.store.pending("2") == []
    assert torch.equal(read(engine.store.deliver("2")), rows_of(item("a")))
    stats = engine.store.stats()
    assert (stats.captured, stats.hits, stats.misses) == (1, 1, 1)


def test_two_requests_share_one_copy(engine: Engine) -> None:
    engine.store.acquire("1", [item("a")])
    engine.store.acquire("2", [item("a")])
    assert engine.store.stats().held_bytes == BLOCK
    assert (engine.step("1"), engine.step("2")) == (1, 0)
    handles = [engine.store.deliver("1"), engine.store.deliver("2")]
    for handle in handles:
        assert torch.equal(read(handle), rows_of(item("a")))


def test_an_abort_leaves_the_item_to_the_other_request(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(cache_bytes=0)
    engine.store.acquire("1", [item("a")])
    engine.store.acquire("2", [item("a")])
    engine.store.release("1")
    engine.store.release("1")
    assert engine.store.pending("2") == [item("a")]
    engine.step("2")
    assert torch.equal(read(engine.store.deliver("2")), rows_of(item("a")))


def test_the_item_least_recently_used_goes_first(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(3 * BLOCK)
    for name in "abc":
        engine.run(name, item(name))
    engine.run("again", item("a"))
    engine.run("new", item("d"))
    for name, kept in (("b", False), ("a", True), ("d", True), ("c", True)):
        assert (item(name) in engine.store._index) == kept, name
    assert engine.store.stats().evictions == 1


@pytest.mark.parametrize(("cache_bytes", "kept"), [(0, 0), (BLOCK - 1, 0), (BLOCK, 1), (3 * BLOCK, 3)])
def test_no_more_is_cached_than_allowed(make_engine: Callable[..., Engine], cache_bytes: int, kept: int) -> None:
    engine = make_engine(cache_bytes=cache_bytes)
    for name in "abcde":
        engine.run(name, item(name))
        assert engine.store.stats().cached_bytes <= cache_bytes
    assert engine.store.stats().held_bytes == engine.store.stats().cached_bytes == kept * BLOCK


def test_an_item_too_large_for_the_cache_does_not_empty_it(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(cache_bytes=BLOCK)
    engine.run("1", item("a"))
    engine.run("2", item("long", 21))
    assert engine.store.acquire("3", [item("a")])
    assert engine.store.pending("3") == []


def test_what_was_never_copied_is_not_cached(engine: Engine) -> None:
    engine.store.acquire("r", [item("a")])
    engine.store.release("r")
    assert engine.store.stats().held_bytes == 0


def test_an_item_that_the_worker_had_not_is_copied_anew(engine: Engine) -> None:
    """Held by another request and cached alike."""
    engine.store.acquire("1", [item("a")])
    [(_, block)] = engine.dispatch("1")
    engine.writer.fail(block)
    engine.store.acquire("2", [item("a")])
    assert engine.step("2") == 1
    with pytest.raises(CaptureFailed):
        read(engine.store.deliver("1"))
    assert torch.equal(read(engine.store.deliver("2")), rows_of(item("a")))

    engine.store.acquire("3", [item("b")])
    [(_, block)] = engine.dispatch("3")
    engine.writer.fail(block)
    engine.store.release("3")
    assert torch.equal(engine.run("4", item("b")), rows_of(item("b")))
    engine.store.reset()
    engine.store.reap()
    assert engine.store.stats().held_bytes == 0


# --- reset -----------------------------------------------------------------------------------------------------------


def test_nothing_from_before_a_reset_is_used_after_it(engine: Engine) -> None:
    a = item("a")
    engine.run("cached", a)
    engine.store.acquire("held", [item("b")])
    engine.step("held")
    engine.store.acquire("allocated", [item("c")])
    engine.store.reset()
    assert engine.store.stats().cached_bytes == 0
    for number, name in enumerate("abc"):
        engine.store.acquire(f"new {number}", [item(name)])
        assert engine.store.pending(f"new {number}") == [item(name)]
    assert engine.store.pending("held") == []
    assert engine.store.dispatch("allocated", item("c")) is not None
    assert engine.store.pending("new 2") == [item("c")], "each has its own"


def test_a_reset_leaves_requests_and_leases_what_they_hold(engine: Engine) -> None:
    engine.store.acquire("leased", [item("a")])
    engine.step("leased")
    handle = engine.store.deliver("leased")
    engine.store.acquire("held", [item("b")])
    engine.step("held")
    engine.store.reset()
    assert torch.equal(read(handle), rows_of(item("a")))
    assert torch.equal(read(engine.store.deliver("held")), rows_of(item("b")))
    engine.store.reap()
    assert engine.store.stats().held_bytes == 0


# --- memory comes back, without anybody's call ------------------------------------------------------------------------


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for five seconds"
        time.sleep(0.005)


def reapers() -> int:
    return sum(thread.name == "mm-embedding-reaper" for thread in threading.enumerate())


def test_an_idle_engine_gives_memory_back_and_the_reaper_ends(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(cache_bytes=0)
    assert reapers() == 0
    for _ in range(2):  # it starts again
        engine.store.acquire("r", [item("a")])
        engine.step("r")
        handle = engine.store.deliver("r")
        assert reapers() == 1
        assert engine.arena.held_bytes == BLOCK
        read(handle)
        wait_until(lambda: engine.arena.held_bytes == 0)
        wait_until(lambda: reapers() == 0)


def test_close_ends_the_reaper_and_all_leases(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    engine.store.acquire("r", [item("a")])
    engine.step("r")
    handle = engine.store.deliver("r")
    engine.store.close()
    engine.store.close()
    assert reapers() == 0
    with pytest.raises(BlockGone):
        read(handle)
    assert engine.store.stats().held_bytes == engine.store.stats().mapped_bytes == 0


def test_a_thousand_aborts_leave_nothing(make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """At every stage of a request; the frontend discards the handles it got."""
    monkeypatch.setattr(store_module, "_REAP_SECONDS", 0.001)
    engine = make_engine(8 * BLOCK, 0)
    for number in range(1000):
        request_id = str(number)
        assert engine.store.acquire(request_id, [item(f"{number % 5}"), item("x", 2)])
        stage = number % 4
        if stage >= 1:
            engine.dispatch(request_id)
        if stage == 2:
            engine.store.cancel(engine.store.deliver(request_id))
        if stage == 3:
            with pytest.raises(TransportTimeout):
                read(engine.store.deliver(request_id), timeout=0)
        engine.store.release(request_id)
    engine.store.reap()
    stats = engine.store.stats()
    assert (stats.held_bytes, stats.items, stats.requests, stats.leases) == (0, 0, 0, 0)
    assert stats.mapped_bytes <= SEGMENT


def test_readers_beside_a_busy_owner(make_engine: Callable[..., Engine]) -> None:
    """Blocks are re-used all the time; each of four threads must get its request's rows and no others."""
    engine = make_engine(12 * BLOCK, 4 * BLOCK)
    jobs: queue.SimpleQueue[tuple[dict[str, object], list[Item]] | None] = queue.SimpleQueue()
    wrong: list[object] = []

    def consume() -> None:
        while (job := jobs.get()) is not None:
            handle, items = job
            try:
                if not torch.equal(read(handle, timeout=10), torch.cat([rows_of(wanted) for wanted in items])):
                    wrong.append(items)
            except Exception as error:  # noqa: BLE001 - reported below
                wrong.append(error)

    readers = [threading.Thread(target=consume, daemon=True) for _ in range(4)]
    for reader in readers:
        reader.start()
    for number in range(400):
        items = [item(f"{(number * step) % 23}", 1 + (number * step) % 23 % 9) for step in (1, 7, 1)]
        request_id = str(number)
        wait_until(lambda request_id=request_id, items=items: engine.store.acquire(request_id, items))  # type: ignore[misc]
        copies = engine.dispatch(request_id)
        jobs.put((engine.store.deliver(request_id), items))  # before the copies, as with an asynchronous device
        engine.writer.write_many([(block, rows_of(copied)) for copied, block in copies])
    for _ in readers:
        jobs.put(None)
    for reader in readers:
        reader.join()
    assert wrong == []
    wait_until(lambda: engine.store.stats().leases == 0)
    stats = engine.store.stats()
    assert stats.held_bytes == stats.cached_bytes <= 4 * BLOCK
    assert stats.hits
    assert stats.evictions
    assert stats.expired == 0
