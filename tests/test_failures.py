"""How a request fails that has no embedding: in vLLM's own frontend, without an engine core."""

from __future__ import annotations

import asyncio
import inspect
import pickle
from http import HTTPStatus
from typing import Any
from unittest import mock

import pytest
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector, RequestState

from harness.capture import frontend
from harness.capture.frontend import MMEmbeddingError
from harness.capture.scheduler import DELIVERY
from harness.capture.settings import READER

WRAPPED = {"OutputProcessor": OutputProcessor, "RequestState": RequestState, "LLMEngine": LLMEngine}


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> OutputProcessor:
    """vLLM's, with the plugin's wrappers."""
    for patch in (*frontend.PATCHES, *frontend.OFFLINE_PATCHES):
        owner, _, name = patch.name.partition(".")
        if owner in WRAPPED:
            original = inspect.unwrap(getattr(WRAPPED[owner], name))
            monkeypatch.setattr(WRAPPED[owner], name, patch.wrap(original))
    return OutputProcessor(None, log_stats=False)


def add(processor: OutputProcessor, name: str, expected: bool = True, **options: Any) -> None:
    """A request, of which an embedding is expected."""
    extra_args = {READER: "here"} if expected else None
    params = SamplingParams(extra_args=extra_args, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
    queue = options.pop("queue", None)
    request = EngineCoreRequest(
        name, [1, 2], None, params, None, 0.0, None, None, None, external_req_id=name, **options
    )
    processor.add_request(request, None, queue=queue)


def ended(name: str, reason: FinishReason = FinishReason.STOP, refused: bool = False) -> EngineCoreOutput:
    """The only output of a request."""
    delivery = {"error": f"Request {name} has no mm_embedding: it is too large.", "status": 400}
    params = {DELIVERY: delivery} if refused else None
    return EngineCoreOutput(name, [7], finish_reason=reason, ec_transfer_params=params)


def llm_engine(processor: OutputProcessor, *steps: list[EngineCoreOutput]) -> LLMEngine:
    """vLLM's, whose engine core gives these outputs."""
    engine = LLMEngine.__new__(LLMEngine)
    engine.should_execute_dummy_batch = engine.log_stats = False
    engine.output_processor, engine.logger_manager = processor, None
    engine.renderer = mock.Mock(mm_processor_cache=None)
    engine.engine_core = mock.Mock()
    engine.engine_core.get_output.side_effect = [EngineCoreOutputs(outputs=outputs) for outputs in steps]
    return engine


@pytest.mark.parametrize("together", [True, False], ids=["in one step", "one after another"])
def test_the_other_requests_of_a_call_end_before_it_fails(processor: OutputProcessor, together: bool) -> None:
    refused, other = ended("0", FinishReason.ERROR, refused=True), ended("1")
    steps = [[refused, other]] if together else [[refused], [other]]
    engine = llm_engine(processor, *steps, [ended("2")])
    add(processor, "0")
    add(processor, "1", expected=False)
    for _ in steps[1:]:
        engine.step()
    with pytest.raises(MMEmbeddingError, match="Request 0 has no mm_embedding: it is too large"):
        engine.step()
    assert not processor.has_unfinished_requests(), "the next call would wait for a request of this one"
    add(processor, "2", expected=False)
    [output] = engine.step()
    assert output.request_id == "2"


def test_all_failures_of_a_call_are_told(processor: OutputProcessor) -> None:
    engine = llm_engine(processor, [ended(name, FinishReason.ERROR, refused=True) for name in "012"])
    for name in "012":
        add(processor, name)
    with pytest.raises(MMEmbeddingError, match="Request 0") as raised:
        engine.step()
    [note] = raised.value.__notes__
    assert note.startswith("2 more requests failed, the last one: Request 2 has no mm_embedding")


def test_an_engine_that_sends_nothing_is_an_error(processor: OutputProcessor) -> None:
    engine = llm_engine(processor, [ended("0")])
    add(processor, "0")
    with pytest.raises(MMEmbeddingError, match=r"Request 0 has no mm_embedding: its engine sent none; start every"):
        engine.step()


@pytest.mark.parametrize(
    ("reason", "options"),
    [
        pytest.param(FinishReason.STOP, {"expected": False}, id="not captured"),
        pytest.param(FinishReason.ERROR, {}, id="vLLM's own error"),
        pytest.param(FinishReason.ABORT, {}, id="aborted"),
    ],
)
def test_nothing_is_missed_of(processor: OutputProcessor, reason: FinishReason, options: dict[str, Any]) -> None:
    engine = llm_engine(processor, [ended("0", reason)])
    add(processor, "0", **options)
    engine.step()


def test_the_engine_core_tells_why_it_refuses_a_streaming_input_session(processor: OutputProcessor) -> None:
    add(processor, "0", resumable=True)
    assert not hasattr(processor.request_states["0"], "_mm_embedding_failures")


def test_async_llm_raises_it_to_the_caller_and_aborts_the_rest(processor: OutputProcessor) -> None:
    async def caller(llm: Any) -> None:
        collector = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, "0")
        add(processor, "0", queue=collector)
        llm.add_request = mock.AsyncMock(return_value=collector)
        processor.process_outputs([ended("0", FinishReason.ERROR, refused=True)])
        async for _ in llm.generate("prompt", SamplingParams(), "0"):
            pass

    llm: Any = AsyncLLM.__new__(AsyncLLM)
    llm.log_requests, llm.abort = False, mock.AsyncMock()
    with pytest.raises(MMEmbeddingError, match="it is too large") as raised:
        asyncio.run(caller(llm))
    llm.abort.assert_awaited_once_with("0", internal=True)
    answer = create_error_response(raised.value).error
    assert (answer.code, answer.message) == (400, "Request 0 has no mm_embedding: it is too large.")


def test_it_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(MMEmbeddingError("why", HTTPStatus.BAD_REQUEST)))
    assert (str(error), error.http_status) == ("why", HTTPStatus.BAD_REQUEST)
