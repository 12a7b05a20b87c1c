"""What a request's first output carries: a handle, or the rows where the frontend is elsewhere. Without an engine."""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import Request

from harness.capture import frontend, scheduler
from harness.capture.scheduler import DELIVERY, SchedulerCapture
from harness.capture.settings import READER, CaptureSettings
from harness.capture.transport import whereabouts
from harness.capture.writer import Writer

WIDTH, NUM_ROWS, NUM_LEVELS = 8, 5, 2
TRUTH = {
    name: torch.randn(NUM_ROWS, WIDTH * (1 + NUM_LEVELS), generator=torch.Generator().manual_seed(seed)).bfloat16()
    for seed, name in enumerate("ab")
}


@pytest.fixture
def capture() -> Iterator[SchedulerCapture]:
    capture = SchedulerCapture(CaptureSettings(True, 0, 1 << 20), WIDTH, NUM_LEVELS, "bfloat16")
    yield capture
    capture.close()


def feature(name: str, offset: int) -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec(None, "image", name, PlaceholderRange(offset, NUM_ROWS), name)


def delivered(capture: SchedulerCapture, reader: str | None, worker: str = "copies") -> dict[str, Any]:
    """What the frontend gets of a request for "a" and "b" with levels, after one step in which the worker copies, fails
    or does nothing."""
    extra_args = {"return_mm_embedding_levels": True, **({READER: reader} if reader else {})}
    features = [feature("b", 1), feature("a", 1 + NUM_ROWS)]
    params = SamplingParams(max_tokens=1, extra_args=extra_args)
    request = Request("r", list(range(1 + 2 * NUM_ROWS)), params, None, mm_features=features)
    assert capture.admit(request, 0)
    step = SchedulerOutput.make_empty()
    step.num_scheduled_tokens = {"r": request.num_tokens}
    plan = capture.plan(step)
    assert plan is not None
    writer = Writer(plan.owner)
    for item, block in plan.copies:
        if worker == "copies":
            writer.write(block, TRUTH[item.identifier])
        elif worker == "fails":
            writer.fail(block)
    capture.begin_update()
    output = EngineCoreOutput("r", [1])
    capture.request_finished("r")
    capture.end_update([EngineCoreOutputs(outputs=[output])])
    writer.close()
    assert output.ec_transfer_params is not None
    sent: dict[str, Any] = msgspec.msgpack.decode(msgspec.msgpack.encode(output.ec_transfer_params[DELIVERY]))
    return sent


def assert_nothing_is_held(capture: SchedulerCapture) -> None:
    stats = capture.stats()
    held = {name: stats[name] for name in ("admitted", "requests", "leases", "items", "held_bytes")}
    assert not any(held.values()), held


@pytest.mark.parametrize(
    ("reader", "means"),
    [
        pytest.param(whereabouts(), "handle", id="here"),
        pytest.param(None, "handle", id="has not told"),
        pytest.param("another host", "rows", id="elsewhere"),
    ],
)
def test_rows_items_and_levels_are_the_same_whichever_way(
    capture: SchedulerCapture, reader: str | None, means: str
) -> None:
    delivery = delivered(capture, reader)
    assert {"handle", "rows", "error"} & set(delivery) == {means}
    embeddings = frontend._read(delivery)
    truth = torch.cat([TRUTH["b"], TRUTH["a"]])
    assert torch.equal(embeddings.rows, truth[:, :WIDTH])
    assert embeddings.levels is not None
    assert torch.equal(embeddings.levels, truth[:, WIDTH:].unflatten(1, (NUM_LEVELS, WIDTH)).transpose(0, 1))
    assert [(item.start, item.identifier) for item in embeddings.items] == [(0, "b"), (NUM_ROWS, "a")]
    assert_nothing_is_held(capture)


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        ("fails", "Request r has no mm_embedding: .* send the request again"),
        ("does nothing", "did not deliver .* in time"),
    ],
)
def test_what_cannot_be_read_is_an_error(
    capture: SchedulerCapture, monkeypatch: pytest.MonkeyPatch, worker: str, message: str
) -> None:
    monkeypatch.setattr(scheduler, "_STAMP_SECONDS", 0.05)
    with pytest.raises(frontend.MMEmbeddingError, match=message):
        frontend._read(delivered(capture, "another host", worker))
    assert_nothing_is_held(capture)


def test_what_no_message_holds_is_an_error(capture: SchedulerCapture, monkeypatch: pytest.MonkeyPatch) -> None:
    nbytes = sum(rows.nbytes for rows in TRUTH.values())
    monkeypatch.setattr(scheduler, "_MESSAGE_BYTES", nbytes - 1)
    with pytest.raises(frontend.MMEmbeddingError, match=f"{nbytes} bytes are too many for a message") as raised:
        frontend._read(delivered(capture, "another host"))
    assert raised.value.http_status == HTTPStatus.BAD_REQUEST
    assert_nothing_is_held(capture)


def told(
    features: list[MultiModalFeatureSpec], params: SamplingParams | None, enabled: bool = True, server: bool = False
) -> Any:
    """The frontend's request, whose parameters vLLM has copied as they asked for."""
    options = SimpleNamespace(enable_return_mm_embedding=enabled)
    processor: Any = SimpleNamespace(model_config=SimpleNamespace(multimodal_config=options))
    if server:
        frontend.capture_only_if_asked(processor)
    request = SimpleNamespace(mm_features=features, sampling_params=params and params.clone())
    return frontend._tell_where(lambda _processor: request)(processor)


def test_a_request_tells_where_its_frontend_is_and_the_users_parameters_stay() -> None:
    given = {"return_mm_embedding_levels": True}
    for params in (
        SamplingParams(),
        SamplingParams(extra_args=given),
        SamplingParams(extra_args=given, skip_clone=True),
    ):
        before = dict(params.extra_args or {})
        assert told([feature("a", 0)], params).sampling_params.extra_args == {**before, READER: whereabouts()}
        assert (params.extra_args or {}) == before


def test_nothing_is_told_where_nothing_is_captured() -> None:
    opted_out = SamplingParams(extra_args={"return_mm_embedding": False})
    assert told([feature("a", 0)], None).sampling_params is None
    assert told([], SamplingParams()).sampling_params.extra_args is None
    assert told([feature("a", 0)], SamplingParams(), enabled=False).sampling_params.extra_args is None
    assert told([feature("a", 0)], opted_out).sampling_params.extra_args == opted_out.extra_args
    # A client cannot say that an embedding is expected of its text.
    assert not told([], SamplingParams(extra_args={READER: "anywhere"})).sampling_params.extra_args


def test_a_server_captures_what_asks_for_it() -> None:
    unsaid, asked = SamplingParams(extra_args={"other": 1}), SamplingParams(extra_args={"return_mm_embedding": True})
    silent = told([feature("a", 0)], unsaid, server=True).sampling_params.extra_args
    assert silent == {"return_mm_embedding": False, "other": 1}
    assert told([], unsaid, server=True).sampling_params.extra_args == silent, "a session may have items later"
    assert told([feature("a", 0)], unsaid, enabled=False, server=True).sampling_params.extra_args == unsaid.extra_args
    found = told([feature("a", 0)], asked, server=True).sampling_params.extra_args
    assert found == {"return_mm_embedding": True, READER: whereabouts()}


def test_an_error_of_vllms_own_is_left_to_it(capture: SchedulerCapture) -> None:
    """It may end a request before its items were computed."""
    request = Request("r", [0], SamplingParams(max_tokens=1), None, mm_features=[feature("a", 1)])
    assert capture.admit(request, 0)
    output = EngineCoreOutput("r", [], finish_reason=FinishReason.ERROR)
    capture.begin_update()
    capture.request_finished("r")
    capture.end_update([EngineCoreOutputs(outputs=[output])])
    assert output.ec_transfer_params is None
    assert_nothing_is_held(capture)


def test_prompt_embeds_among_a_chats_parts_are_not_expected() -> None:
    embeds = MultiModalFeatureSpec(None, "prompt_embeds", "e", PlaceholderRange(0, NUM_ROWS), "e")
    assert told([embeds], SamplingParams()).sampling_params.extra_args is None
