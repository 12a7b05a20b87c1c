"""How a request fails that has no embedding: in vLLM's own frontend, without an engine core."""

from __future__ import annotations

import asyncio
import inspect
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any
from unittest import mock

import pytest
import torch
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.outputs import RequestOutput
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector, RequestState

from harness.capture import frontend
from harness.capture.frontend import MMEmbeddingError
from harness.capture.scheduler import DELIVERY
from harness.capture.settings import READER

WRAPPED = {
    each.__name__: each for each in (OutputProcessor, RequestState, LLMEngine, RequestOutputCollector, RequestOutput)
}


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> OutputProcessor:
    """vLLM's, with the plugin's wrappers."""
    for patch in (*frontend.PATCHES, *frontend.OFFLINE_PATCHES):
        owner, _, name = patch.name.partition(".")
        if owner in WRAPPED:
            original = inspect.unwrap(getattr(WRAPPED[owner], name))
            monkeypatch.setattr(WRAPPED[owner], name, patch.wrap(original))
    return OutputProcessor(None, log_stats=False)


def add(
    processor: OutputProcessor,
    name: str,
    expected: bool = True,
    kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY,
    **options: Any,
) -> None:
    """A request, of which an embedding is expected."""
    extra_args = {READER: "here"} if expected else None
    params = SamplingParams(extra_args=extra_args, detokenize=False, output_kind=kind)
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


def test_a_pooling_request_passes(processor: OutputProcessor) -> None:
    """Its engine cannot capture, but may have the plugin installed."""
    request = EngineCoreRequest("0", [1, 2], None, None, PoolingParams(), 0.0, None, None, None, external_req_id="0")
    processor.add_request(request, None)
    assert processor.get_num_unfinished_requests() == 1


@pytest.mark.parametrize("theirs", [{}, {"peer": "host"}], ids=["alone", "beside another connector's"])
def test_an_output_has_left_what_the_plugin_did_not_put_there(
    processor: OutputProcessor, theirs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontend, "_read", lambda _delivery: frontend._Embeddings(torch.ones(3, 2), None, []))
    outputs = [ended("0", refused=True), ended("1")]
    for output in outputs:
        add(processor, output.request_id, expected=output.request_id == "0")
        output.ec_transfer_params = {**(output.ec_transfer_params or {}), **theirs} or None
    processor.process_outputs(outputs)
    assert [output.ec_transfer_params for output in outputs] == [theirs or None] * 2


def test_embeddings_that_are_there_are_taken_without_waiting(
    processor: OutputProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings = frontend._Embeddings(torch.ones(3, 2), torch.ones(1, 3, 2), [])
    monkeypatch.setattr(frontend, "_read", lambda _delivery: embeddings)
    pool = ThreadPoolExecutor(1)
    monkeypatch.setattr(frontend, "_readers", lambda: pool)

    async def caller() -> RequestOutput:
        collector = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, "0")
        add(processor, "0", queue=collector)
        processor.process_outputs([ended("0", refused=True)])
        pool.shutdown()
        output = collector.get_nowait()
        assert isinstance(output, RequestOutput)
        return output

    [completion] = asyncio.run(caller()).outputs
    assert completion.mm_embedding is embeddings.rows
    assert completion.mm_embedding_levels is embeddings.levels
    assert completion.mm_embedding_items is embeddings.items


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


def test_a_caller_of_async_llm_waits_for_its_embeddings_alone(
    processor: OutputProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While they are copied the event loop serves the others."""
    copied = threading.Event()

    def read(_delivery: dict[str, Any]) -> Any:
        assert copied.wait(30)
        return frontend._Embeddings(torch.ones(3, 2), None, [])

    async def caller() -> list[str]:
        ends: list[str] = []
        collectors = [RequestOutputCollector(RequestOutputKind.FINAL_ONLY, name) for name in "01"]
        for name, collector in zip("01", collectors, strict=True):
            add(processor, name, queue=collector, expected=name == "0")
        processor.process_outputs([ended("0", refused=True), ended("1")])
        assert collectors[0].get_nowait() is None, "its embeddings are not there"
        waits = asyncio.create_task(collectors[0].get())
        waits.add_done_callback(lambda _task: ends.append("0"))
        other = collectors[1].get_nowait()
        assert other is not None
        await asyncio.sleep(0.05)
        ends.append(other.request_id)
        copied.set()
        output = await waits
        assert isinstance(output, RequestOutput)
        assert torch.equal(output.outputs[0].mm_embedding, torch.ones(3, 2))
        return ends

    monkeypatch.setattr(frontend, "_read", read)
    monkeypatch.setattr(frontend, "_readers", lambda: ThreadPoolExecutor(1))
    assert asyncio.run(caller()) == ["1", "0"]


def test_a_caller_that_gives_up_leaves_the_copy_to_end(
    processor: OutputProcessor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It ends the lease."""
    copied, ended_lease = threading.Event(), threading.Event()
    pool = ThreadPoolExecutor(1)
    pool.submit(copied.wait, 30)  # the copy waits for its turn

    async def caller() -> None:
        collector = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, "0")
        add(processor, "0", queue=collector)
        processor.process_outputs([ended("0", refused=True)])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(collector.get(), 0.05)

    monkeypatch.setattr(frontend, "_read", lambda _delivery: ended_lease.set())
    monkeypatch.setattr(frontend, "_readers", lambda: pool)
    asyncio.run(caller())
    copied.set()
    assert ended_lease.wait(30)
    pool.shutdown()
    assert [record.getMessage() for record in caplog.records if record.name == "concurrent.futures"] == []


@pytest.mark.parametrize("merged", [False, True])
def test_embeddings_stay_with_their_completion(
    processor: OutputProcessor, monkeypatch: pytest.MonkeyPatch, merged: bool
) -> None:
    monkeypatch.setattr(frontend, "_read", lambda _delivery: frontend._Embeddings(torch.ones(3, 2), None, []))

    async def caller() -> Any:
        collector = RequestOutputCollector(RequestOutputKind.DELTA, "0")
        add(processor, "0", queue=collector, kind=RequestOutputKind.DELTA)
        first = ended("0", refused=True)
        first.finish_reason = None
        processor.process_outputs([first])
        if not merged:
            assert not (await collector.get()).finished
        processor.process_outputs([ended("0")])
        return await collector.get()

    output = asyncio.run(caller())
    [completion] = output.outputs
    assert (output.finished, len(completion.token_ids)) == (True, 2 if merged else 1)
    assert torch.equal(completion.mm_embedding, torch.ones(3, 2))
    assert not hasattr(completion, frontend._UNREAD), "it would keep what the user drops"


def test_it_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(MMEmbeddingError("why", HTTPStatus.BAD_REQUEST)))
    assert (str(error), error.http_status) == ("why", HTTPStatus.BAD_REQUEST)
