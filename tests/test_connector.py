"""The connector between vLLM's scheduler and its worker, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from vllm.config import VllmConfig
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request

from harness.capture.connector import MMEmbeddingConnector, transfer_config
from harness.capture.engine_core import PATCHES
from harness.capture.scheduler import DELIVERY, SchedulerCapture, StepPlan
from harness.capture.settings import RETURN, CaptureSettings
from harness.capture.writer import Writer

WIDTH, NUM_ROWS = 8, 5


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> SchedulerCapture:
    return capture_of(monkeypatch)


def capture_of(monkeypatch: pytest.MonkeyPatch, *, num_levels: int = 0, reuse: bool = True) -> SchedulerCapture:
    """What the next connector captures with."""
    capture = SchedulerCapture(CaptureSettings(True, 1 << 20, 1 << 20, reuse=reuse), WIDTH, num_levels, "bfloat16")
    monkeypatch.setattr(SchedulerCapture, "of", lambda _config: capture)
    return capture


def connector(
    role: ECConnectorRole, use_v2_model_runner: bool = True, worker: str | type = "vllm.v1.worker.gpu_worker.Worker"
) -> MMEmbeddingConnector:
    config = SimpleNamespace(
        ec_transfer_config=transfer_config(),
        parallel_config=SimpleNamespace(worker_cls=worker),
        use_v2_model_runner=use_v2_model_runner,
    )
    return MMEmbeddingConnector(cast(VllmConfig, config), role)


def request(name: str, num_rows: int = NUM_ROWS, identifier: str = "item") -> Request:
    return request_of(name, {identifier: PlaceholderRange(1, num_rows)})


def request_of(name: str, items: dict[str, PlaceholderRange]) -> Request:
    """With items of these identifiers at these places, and nothing behind the last one."""
    features = [MultiModalFeatureSpec(None, "image", each, where, each) for each, where in items.items()]
    num_tokens = max(where.offset + where.length for where in items.values())
    return Request(name, list(range(num_tokens)), SamplingParams(max_tokens=1), None, mm_features=features)


def step(**num_scheduled_tokens: int) -> SchedulerOutput:
    output = SchedulerOutput.make_empty()
    output.num_scheduled_tokens = num_scheduled_tokens
    output.total_num_scheduled_tokens = sum(num_scheduled_tokens.values())
    return output


def copied(made: MMEmbeddingConnector, asked: Request) -> StepPlan:
    """The plan of the step that prefills the request, whose item's rows are there now."""
    assert made.ensure_cache_available(asked, 0)
    plan = made.build_connector_meta(step(**{asked.request_id: asked.num_tokens}))
    assert isinstance(plan, StepPlan)
    for item, block in plan.copies:
        Writer(plan.owner).write(block, torch.zeros(item.num_rows, item.width, dtype=torch.bfloat16))
    return plan


@pytest.mark.usefixtures("capture")
def test_a_step_with_nothing_to_do_has_no_plan() -> None:
    made = connector(ECConnectorRole.SCHEDULER)
    assert made.build_connector_meta(SchedulerOutput.make_empty()) is None
    made.shutdown()


@pytest.mark.parametrize("other", [{"use_v2_model_runner": False}, {"worker": "theirs.Worker"}, {"worker": object}])
def test_a_worker_that_may_have_another_model_runner_gets_an_empty_one(
    capture: SchedulerCapture, other: dict[str, Any]
) -> None:
    made = connector(ECConnectorRole.SCHEDULER, **other)
    plan = made.build_connector_meta(SchedulerOutput.make_empty())
    assert plan == StepPlan(capture._arena.address, [], [], True, [])
    made.shutdown()


def test_copies_loads_and_new_memory_each_make_a_plan(capture: SchedulerCapture) -> None:
    made = connector(ECConnectorRole.SCHEDULER)
    first = request("first")
    assert made.ensure_cache_available(first, 0)
    prepares = made.build_connector_meta(step(another=1))
    copies = copied(made, first)
    [(item, block)] = copies.copies
    assert prepares == StepPlan(capture._arena.address, [], [], True, [block.segment])
    assert copies == StepPlan(capture._arena.address, [(item, block)], [], True, [])

    second = request("second")
    assert made.ensure_cache_available(second, 0)
    assert made.has_cache_item("item")
    made.update_state_after_alloc(second, 0)
    loads = made.build_connector_meta(step(second=second.num_tokens))
    assert loads == StepPlan(capture._arena.address, [], [(item, block)], True, [])
    assert made.build_connector_meta(step(first=1, second=1)) is None
    made.shutdown()


def test_the_v2_model_runner_leaves_the_connector_out_of_a_step_without_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM does is the reason that a plan may be None."""
    module = pytest.importorskip("vllm.v1.worker.gpu.ec_connector")
    made = connector(ECConnectorRole.WORKER)
    monkeypatch.setattr(module, "get_ec_transfer", lambda: made)

    def called(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the step has no plan")

    for name in ("bind_connector_metadata", "start_load_caches", "build_connector_worker_meta"):
        monkeypatch.setattr(made, name, called)
    runner = module.ActiveECConnector(SimpleNamespace(), {})
    with runner.maybe_get_output(SchedulerOutput.make_empty()) as output:
        assert output is None


def test_a_promise_is_for_one_item(capture: SchedulerCapture) -> None:
    """A user may give an identifier to two items. The request whom the first was promised got no room in this step."""
    made = connector(ECConnectorRole.SCHEDULER)
    first, other, second = request("first"), request("other", NUM_ROWS + 1), request("second")
    assert len(copied(made, first).copies) == 1
    assert made.ensure_cache_available(second, 0)
    assert made.has_cache_item("item")
    assert made.ensure_cache_available(other, 0)
    assert not made.has_cache_item("item"), "the rows are another item's"
    made.update_state_after_alloc(other, 0)
    assert made.ensure_cache_available(second, 0)
    assert made.has_cache_item("item")
    plan = made.build_connector_meta(step(other=other.num_tokens))
    assert isinstance(plan, StepPlan)
    assert ([item.num_rows for item, _ in plan.copies], plan.loads) == ([NUM_ROWS + 1], [])
    assert capture.reused == 0
    made.shutdown()


def held_bytes(capture: SchedulerCapture) -> int:
    """Bytes that somebody holds: not those that are kept for re-use alone, which others may take the place of."""
    stats = capture.stats()
    return stats["held_bytes"] - stats["cached_bytes"]


def finish(made: MMEmbeddingConnector, *requests: Request) -> None:
    for each in requests:
        made.request_finished(each)


def end_step(capture: SchedulerCapture) -> None:
    """The one that began first of those under way."""
    capture.begin_update()
    capture.end_update([])


def test_what_a_step_loads_is_held_until_that_step_has_ended(capture: SchedulerCapture) -> None:
    """With several steps under way, whose requests may be aborted meanwhile."""
    made = connector(ECConnectorRole.SCHEDULER)
    kept = [request(name, identifier=name) for name in ("a", "b")]
    for each in kept:
        copied(made, each)
        end_step(capture)
    finish(made, *kept)
    block, loads = capture.stats()["cached_bytes"] // 2, []
    for name in ("a", "b"):
        again = request(f"{name} again", identifier=name)
        assert made.ensure_cache_available(again, 0)
        assert made.has_cache_item(name)
        made.update_state_after_alloc(again, 0)
        plan = made.build_connector_meta(step(**{again.request_id: again.num_tokens}))
        assert isinstance(plan, StepPlan)
        loads += [item.identifier for item, _ in plan.loads]
        finish(made, again)
    assert loads == ["a", "b"]
    assert (capture.reused, capture.reused_bytes) == (2, 2 * NUM_ROWS * WIDTH * 2)
    held = [held_bytes(capture)]
    for _ in range(2):
        end_step(capture)
        held.append(held_bytes(capture))
    assert held == [2 * block, block, 0]
    made.shutdown()


def test_a_promise_that_a_step_does_not_keep_ends_with_its_plan(capture: SchedulerCapture) -> None:
    """The encoder cache had no room for the request's item."""
    made = connector(ECConnectorRole.SCHEDULER)
    first, second = request("first"), request("second")
    copied(made, first)
    finish(made, first)
    assert made.ensure_cache_available(second, 0)
    assert made.has_cache_item("item")
    assert made.build_connector_meta(step(other=1)) is None
    made.update_state_after_alloc(second, 0)
    assert made.build_connector_meta(step(second=second.num_tokens)) is None, "what it would load is not held any more"
    finish(made, second)
    assert held_bytes(capture) == 0
    assert capture.reused == 0
    made.shutdown()


def test_a_request_that_cannot_be_captured_is_told_why_once_and_forgotten(capture: SchedulerCapture) -> None:
    made = connector(ECConnectorRole.SCHEDULER)
    large = request("large", (1 << 20) // WIDTH)
    assert not made.ensure_cache_available(large, 0)
    assert made.take_unavailable_requests() == {"large"}
    output = EngineCoreOutput("large", [])
    capture.begin_update()
    finish(made, large)
    capture.end_update([EngineCoreOutputs(outputs=[output])])
    assert output.ec_transfer_params is not None
    delivery = output.ec_transfer_params[DELIVERY]
    assert delivery["status"] == 400
    assert "mm_embedding_memory_gb" in delivery["error"]
    assert made.take_unavailable_requests() == set()
    made.shutdown()


def test_an_item_is_copied_in_the_first_step_that_has_rows_of_it(capture: SchedulerCapture) -> None:
    made = connector(ECConnectorRole.SCHEDULER)
    mask = torch.tensor([False, False, True, False, False, True])
    asked = request_of("first", {"a": PlaceholderRange(1, 5), "b": PlaceholderRange(8, 6, mask)})
    steps = []
    # Of 14: before a, most of a, its end and b's begin, a row of b, none, the other.
    for num_tokens in (1, 4, 5, 1, 1, 2):
        assert made.ensure_cache_available(asked, asked.num_computed_tokens)
        plan = made.build_connector_meta(step(first=num_tokens))
        steps.append([item.identifier for item, _block in plan.copies] if isinstance(plan, StepPlan) else [])
        asked.num_computed_tokens += num_tokens
    assert steps == [[], ["a"], [], ["b"], [], []]
    assert capture.forced_prefills == 0
    made.shutdown()


def test_a_prefix_cache_hit_is_passed_by_only_for_what_it_covers_and_the_store_does_not_hold(
    capture: SchedulerCapture,
) -> None:
    made = connector(ECConnectorRole.SCHEDULER)
    copied(made, request("first", identifier="held"))
    places = PlaceholderRange(1, NUM_ROWS), PlaceholderRange(10, NUM_ROWS)
    for names, forced in ((("held", "new"), 0), (("other", "held"), 1), (("fresh", "newer"), 1)):
        asked = request_of(" ".join(names), dict(zip(names, places, strict=True)))
        before = capture.forced_prefills
        assert made.ensure_cache_available(asked, 10) == (not forced)
        assert capture.forced_prefills == before + forced
        assert asked.skip_reading_prefix_cache == bool(forced)
    made.shutdown()


def test_a_prompt_that_was_computed_elsewhere_is_an_error(capture: SchedulerCapture) -> None:
    """A connector of the key-value cache brought it: passing by the prefix cache would not make the encoder run."""
    made = connector(ECConnectorRole.SCHEDULER)
    asked = request("first")
    assert not made.ensure_cache_available(asked, asked.num_tokens)
    assert asked.skip_reading_prefix_cache
    assert capture.forced_prefills == 1
    assert not made.take_unavailable_requests()
    assert not made.ensure_cache_available(asked, asked.num_tokens)
    assert made.take_unavailable_requests() == {"first"}
    assert capture.forced_prefills == 1
    made.shutdown()


@pytest.mark.parametrize(
    ("num_levels", "modality", "loaded"),
    [(0, "audio", True), (0, "image", True), (3, "image", True), (3, "video", True), (3, "audio", False)],
)
def test_what_has_no_levels_beside_others_that_have_is_encoded_again(
    monkeypatch: pytest.MonkeyPatch, num_levels: int, modality: str, loaded: bool
) -> None:
    """It is kept with zeros in their place, which its encoder did not give."""
    capture_of(monkeypatch, num_levels=num_levels)
    made = connector(ECConnectorRole.SCHEDULER)
    first, again = request("first"), request("again")
    for each in (first, again):
        each.mm_features[0].modality = modality
    [(item, _block)] = copied(made, first).copies
    assert item.width == WIDTH * (1 + num_levels)
    assert made.ensure_cache_available(again, 0)
    assert made.has_cache_item("item") == loaded
    made.shutdown()


@pytest.mark.parametrize("reuse", [False, True])
def test_a_request_is_settled_until_it_ends_once_its_items_are_copied(
    monkeypatch: pytest.MonkeyPatch, reuse: bool
) -> None:
    capture = capture_of(monkeypatch, reuse=reuse)
    made = connector(ECConnectorRole.SCHEDULER)
    names = ["first", "hit", "not captured", "aborted"]
    first, hit, uncaptured, aborted = (request(name) for name in names)
    uncaptured.sampling_params = SamplingParams(extra_args={RETURN: False})
    assert made.ensure_cache_available(first, 0)
    assert first.request_id not in capture.settled, "its item is to be copied"
    copied(made, first)
    assert made.ensure_cache_available(hit, hit.num_tokens - 1)
    assert made.ensure_cache_available(uncaptured, 0)
    assert made.ensure_cache_available(aborted, aborted.num_tokens - 1)
    assert capture.settled == (set() if reuse else set(names)), "with re-use it says what a request may load"
    monkeypatch.setattr(capture, "admit", lambda *_args: pytest.fail("it has nothing to do for a settled request"))
    if not reuse:
        assert all(made.ensure_cache_available(each, 0) for each in (first, hit, uncaptured, aborted))
    monkeypatch.undo()
    never_run = request("never run", NUM_ROWS + 1)
    assert made.ensure_cache_available(never_run, 0)
    for each in (first, hit, uncaptured, aborted, never_run):
        made.request_finished(each)
    kept = [*capture.settled, *capture._undelivered, *capture._uncopied]
    assert kept == [], "requests that have ended"
    assert capture.stats()["requests"] == 0
    made.shutdown()


def test_what_a_request_asks_for_is_read_when_it_arrives(
    capture: SchedulerCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    [patch] = [patch for patch in PATCHES if patch.name == "EngineCore.preprocess_add_request"]
    made = connector(ECConnectorRole.SCHEDULER)
    config = SimpleNamespace(ec_transfer_config=transfer_config())
    core = SimpleNamespace(vllm_config=config, scheduler=SimpleNamespace(ec_connector=made))
    arrived = request("first")
    take_in = patch.wrap(lambda _core, _request: (arrived, 7))
    assert take_in(core, None) == (arrived, 7)
    monkeypatch.setattr(capture, "_wanted", lambda _request: pytest.fail("read while the GPU waits for the schedule"))
    assert len(copied(made, arrived).copies) == 1
    made.shutdown()


def test_an_engine_without_capture_takes_requests_in_as_ever() -> None:
    """Its scheduler may be the user's own, and is not asked for anything."""
    [patch] = [patch for patch in PATCHES if patch.name == "EngineCore.preprocess_add_request"]
    core = SimpleNamespace(vllm_config=SimpleNamespace(ec_transfer_config=None), scheduler=object())
    assert patch.wrap(lambda _core, _request: (request("first"), 7))(core, None)[1] == 7


def test_a_request_that_was_not_captured_is_told_so_and_asked_for_nothing_more(capture: SchedulerCapture) -> None:
    made = connector(ECConnectorRole.SCHEDULER)
    asked = request("first")
    assert made.ensure_cache_available(asked, 0)
    output = EngineCoreOutput("first", [1])
    capture.begin_update()
    capture.end_update([EngineCoreOutputs(outputs=[output])])
    assert output.ec_transfer_params is not None
    assert "was not captured" in output.ec_transfer_params[DELIVERY]["error"]
    assert capture.stats()["held_bytes"] == 0
    plan = made.build_connector_meta(step(first=asked.num_tokens))
    assert plan is None or (isinstance(plan, StepPlan) and plan.copies == []), "its memory is another's now"
    made.shutdown()
