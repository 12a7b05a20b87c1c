"""The worker's half: from the encoder cache to the shared memory and back, without an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch

from harness.capture import worker
from harness.capture.arena import Arena
from harness.capture.reader import read
from harness.capture.scheduler import StepPlan
from harness.capture.store import Item
from harness.capture.transport import Block, CaptureFailed, SegmentId, Span, TransportTimeout
from harness.capture.worker import WorkerCapture

NUM_ROWS, WIDTH = 5, 8


@pytest.fixture
def arena() -> Iterator[Arena]:
    with closing(Arena(1 << 20)) as arena:
        yield arena


@pytest.fixture
def make_worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., WorkerCapture]]:
    """Of this rank in its tensor parallel group and in its group of prefill context parallelism."""
    made: list[WorkerCapture] = []

    class Group:
        rank_in_group = 0

    def make(tensor_parallel_rank: int = 0, context_parallel_rank: int = 0) -> WorkerCapture:
        Group.rank_in_group = context_parallel_rank
        monkeypatch.setattr("harness.capture.worker.get_tensor_model_parallel_rank", lambda: tensor_parallel_rank)
        monkeypatch.setattr("harness.capture.worker.get_pcp_group", Group)
        monkeypatch.setattr("harness.capture.worker.current_platform", SimpleNamespace(device_type="cpu"))
        made.append(WorkerCapture())
        return made[-1]

    yield make
    for each in made:
        each.close()


def item_of(rows: torch.Tensor, width: int = WIDTH, identifier: str = "item") -> Item:
    return Item(identifier, width > WIDTH, NUM_ROWS, width, str(rows.dtype).removeprefix("torch."))


def planned(arena: Arena, *items: Item, whole: bool = False) -> StepPlan:
    """A step that copies the items."""
    copies: list[tuple[Item, Block]] = []
    for item in items:
        block = arena.allocate(item.nbytes)
        assert block is not None
        copies.append((item, block))
    return StepPlan(arena.address, copies, [], whole, arena.take_made())


def delivered(arena: Arena, item: Item, block: Block) -> torch.Tensor:
    span = Span(block, item.num_rows, item.width, item.dtype)
    return read(arena.handle(arena.lease(), [span]), timeout=0.05)


def rows_of(width: int = WIDTH, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.arange(NUM_ROWS * width).view(NUM_ROWS, width).to(dtype)


@pytest.mark.parametrize("planned_width", [WIDTH, 3 * WIDTH])
@pytest.mark.parametrize("width", [WIDTH, 3 * WIDTH])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_planned_columns_are_copied(
    arena: Arena, make_worker: Callable[..., WorkerCapture], planned_width: int, width: int, dtype: torch.dtype
) -> None:
    """In the engine's dtype; what a narrower output lacks, deepstack levels, is zero."""
    output = rows_of(width, dtype)
    item = item_of(rows_of(), planned_width)
    plan = planned(arena, item)
    make_worker().copy(plan, {"item": output, "another": rows_of() + 1})
    expected = torch.zeros(NUM_ROWS, planned_width, dtype=torch.bfloat16)
    both = min(width, planned_width)
    expected[:, :both] = output[:, :both]
    assert torch.equal(delivered(arena, *plan.copies[0]), expected)


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the log has of them."""
    said: list[str] = []
    monkeypatch.setattr(worker.logger, "error", lambda message, *values: said.append(message % values))
    return said


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (None, "nothing"),
        (rows_of()[1:], "shape (4, 8)"),
        (rows_of().view(NUM_ROWS, 2, WIDTH // 2), "shape (5, 2, 4)"),
        (rows_of()[:, 0], "shape (5,)"),
    ],
    ids=["missing", "too few rows", "three dimensions", "one dimension"],
)
def test_an_output_that_is_not_as_planned_fails_the_requests_for_it_alone(
    arena: Arena,
    make_worker: Callable[..., WorkerCapture],
    errors: list[str],
    output: torch.Tensor | None,
    found: str,
) -> None:
    plan = planned(arena, item_of(rows_of()), item_of(rows_of(), identifier="fine"))
    cache = {"fine": rows_of()}
    make_worker().copy(plan, cache if output is None else {**cache, "item": output})
    with pytest.raises(CaptureFailed):
        delivered(arena, *plan.copies[0])
    assert torch.equal(delivered(arena, *plan.copies[1]), rows_of())
    assert errors == [f"Encoder output of item item: expected 5 rows, found {found}."]


@pytest.mark.parametrize("width", [WIDTH, 2 * WIDTH])
def test_what_is_to_be_loaded_again_must_be_all_of_the_output(
    arena: Arena, make_worker: Callable[..., WorkerCapture], errors: list[str], width: int
) -> None:
    plan = planned(arena, item_of(rows_of()), whole=True)
    make_worker().copy(plan, {"item": rows_of(width)})
    if width == WIDTH:
        assert torch.equal(delivered(arena, *plan.copies[0]), rows_of())
        assert errors == []
        return
    with pytest.raises(CaptureFailed):
        delivered(arena, *plan.copies[0])
    assert errors == [
        "Encoder output of item item has 16 columns, 8 of them known: leave enable_mm_embedding_reuse out here."
    ]


@pytest.mark.parametrize(("tensor_parallel", "context_parallel"), [(0, 0), (1, 0), (0, 1)])
def test_every_rank_loads_and_the_first_one_copies(
    arena: Arena, make_worker: Callable[..., WorkerCapture], tensor_parallel: int, context_parallel: int
) -> None:
    made = make_worker(tensor_parallel, context_parallel)
    plan = planned(arena, item_of(rows_of()))
    first = (tensor_parallel, context_parallel) == (0, 0)
    made.load(plan, {})
    assert len(prepared(made)) == first, "new memory is prepared by the rank that will copy"
    made.copy(plan, {"item": rows_of()})
    if first:
        assert torch.equal(delivered(arena, *plan.copies[0]), rows_of())
    else:
        with pytest.raises(TransportTimeout):
            delivered(arena, *plan.copies[0])
        make_worker().copy(plan, {"item": rows_of()})
    cache: dict[str, torch.Tensor] = {}
    made.load(StepPlan(arena.address, [], plan.copies, False, []), cache)
    assert torch.equal(cache["item"], rows_of())


def test_a_step_without_copies_opens_nothing(arena: Arena, make_worker: Callable[..., WorkerCapture]) -> None:
    made = make_worker()
    made.load(planned(arena), {})
    made.copy(planned(arena), {"item": rows_of()})
    assert made._writers == {}


def test_one_writer_for_all_steps_of_an_engine_until_the_end(
    arena: Arena, make_worker: Callable[..., WorkerCapture]
) -> None:
    made = make_worker()
    for _ in range(2):
        made.copy(planned(arena, item_of(rows_of())), {"item": rows_of()})
    [writer] = made._writers.values()
    assert len(prepared(made)) == 1
    made.close()
    assert (made._writers, writer._segments) == ({}, {})


def prepared(made: WorkerCapture) -> list[SegmentId]:
    """The segments that it has mapped."""
    return [segment for writer in made._writers.values() for segment in writer._segments]
