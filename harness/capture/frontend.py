"""Frontend side: takes the handle off a request's first output, reads the rows and puts them on the last one.

It also tells vLLM's loggers of the connector, whose metrics they show.
"""

from __future__ import annotations

import asyncio
import copy
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from vllm.exceptions import GracefulHTTPError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine import FinishReason

from harness.capture import reader
from harness.capture.patches import Patch
from harness.capture.scheduler import DELIVERY, encoded_features
from harness.capture.settings import READER, RETURN, CaptureSettings, RequestOptions
from harness.capture.transport import TransportError, whereabouts

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config import VllmConfig
    from vllm.outputs import PoolingRequestOutput
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector, RequestState
    from vllm.v1.metrics.loggers import StatLoggerManager


@dataclass(frozen=True)
class MMEmbeddingItem:
    """Where one item of the prompt lies in `mm_embedding`.

    Attributes:
        modality: "image", "video" or "audio".
        start: first row.
        num_rows: number of rows.
        identifier: vLLM's hash of the item (with LoRA prefix if applicable).
    """

    modality: str
    start: int
    num_rows: int
    identifier: str


class MMEmbeddingError(GracefulHTTPError, RuntimeError):
    """The embeddings of a request cannot be returned.

    AsyncLLM raises it to the request's caller; LLM and LLMEngine, when the other requests have ended too. A server
    answers with its message and status, as with every GracefulHTTPError.

    Attributes:
        http_status: 400 where the same request would fail again, or 500.
    """

    def __init__(self, message: str, http_status: HTTPStatus = HTTPStatus.INTERNAL_SERVER_ERROR) -> None:
        super().__init__(message, http_status)


@dataclass(frozen=True)
class _Embeddings:
    rows: Tensor
    levels: Tensor | None
    items: list[MMEmbeddingItem]


_ONLY_IF_ASKED = "_mm_embedding_only_if_asked"
"""Attribute of an InputProcessor: a request that does not say whether it is to be captured is not."""


def capture_only_if_asked(processor: InputProcessor) -> None:
    """Of the requests that this processor makes from now on; else those are captured that do not say no."""
    setattr(processor, _ONLY_IF_ASKED, True)


_FAILURES = "_mm_embedding_failures"
"""Attribute of an OutputProcessor: what LLMEngine.step is to raise."""

FIELDS = ("mm_embedding", "mm_embedding_items", "mm_embedding_levels")
"""What a CompletionOutput has more: a Tensor (num_features, hidden_size), a list of MMEmbeddingItem, and on demand a
Tensor (num_levels, num_features, hidden_size). All None until the completion is finished, and for text-only requests.
"""


@functools.cache
def _readers() -> ThreadPoolExecutor:
    # Copies run without the GIL, beside the event loop. Two threads saturate no memory and hide one slow page fault.
    return ThreadPoolExecutor(2, thread_name_prefix="mm-embedding")


def _read(delivery: dict[str, Any]) -> _Embeddings:
    """Runs in a reader thread.

    Raises:
        MMEmbeddingError: the engine core could not capture.
        TransportError: the shared memory cannot be read.
    """
    if (error := delivery.get("error")) is not None:
        raise MMEmbeddingError(error, HTTPStatus(delivery["status"]))
    packed = reader.unpack(delivery["rows"]) if "rows" in delivery else reader.read(delivery["handle"])
    hidden_size = delivery["hidden_size"]
    items, start = [], 0
    for modality, num_rows, identifier in delivery["items"]:
        items.append(MMEmbeddingItem(modality, start, num_rows, identifier))
        start += num_rows
    levels = None
    if delivery["levels"]:
        levels = _own(packed[:, hidden_size:].unflatten(1, (-1, hidden_size)).transpose(0, 1))
    return _Embeddings(_own(packed[:, :hidden_size]), levels, items)


def _own(rows: Tensor) -> Tensor:
    return rows if rows.is_contiguous() else reader.empty(rows.shape, rows.dtype).copy_(rows)


def _not_sent(request_id: str) -> Future[_Embeddings]:
    future: Future[_Embeddings] = Future()
    future.set_exception(
        MMEmbeddingError(
            f"Request {request_id} has no mm_embedding: its engine sent none; start every engine with "
            "enable_return_mm_embedding."
        )
    )
    return future


_UNREAD = "_mm_embedding_unread"
"""Attribute of a finished CompletionOutput until its consumer takes it: the future of its fields."""


def _attach(completion: CompletionOutput, future: Future[_Embeddings]) -> MMEmbeddingError | None:
    """Waits for the future, and returns why there are no embeddings."""
    try:
        embeddings = future.result()
    except MMEmbeddingError as error:
        return error
    except TransportError as error:
        return MMEmbeddingError(str(error))
    completion.mm_embedding = embeddings.rows
    completion.mm_embedding_items = embeddings.items
    completion.mm_embedding_levels = embeddings.levels
    return None


def _unread(output: Any) -> Iterator[tuple[CompletionOutput, Future[_Embeddings]]]:
    if isinstance(output, RequestOutput):
        for completion in output.outputs:
            if (future := completion.__dict__.get(_UNREAD)) is not None:
                yield completion, future


def _attach_all(output: Any) -> None:
    for completion, future in _unread(output):
        del completion.__dict__[_UNREAD]
        if (failure := _attach(completion, future)) is not None:
            from vllm.v1.engine.async_llm import InputStreamError

            # Of all that AsyncLLM catches the one that it passes on as it is, and aborts the other children for.
            raise InputStreamError(failure)


async def _done(future: Future[_Embeddings]) -> None:
    """Not asyncio.wrap_future: to give up waiting would cancel the copy, which ends the lease."""
    loop, event = asyncio.get_running_loop(), asyncio.Event()

    def wake(_future: Future[_Embeddings]) -> None:
        with suppress(RuntimeError):  # the loop is closed: its caller gave up
            loop.call_soon_threadsafe(event.set)

    future.add_done_callback(wake)
    await event.wait()


def _tell_where(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def process_inputs(self: InputProcessor, *args: Any, **kwargs: Any) -> EngineCoreRequest:
        request: EngineCoreRequest = original(self, *args, **kwargs)
        params, options = request.sampling_params, self.model_config.multimodal_config
        if params is None:
            return request
        given = params.extra_args or {}
        enabled = getattr(options, "enable_return_mm_embedding", False)
        # The parameters are vLLM's copy, but it may be a shallow one: a new dictionary each time.
        if enabled and RETURN not in given and getattr(self, _ONLY_IF_ASKED, False):
            given = params.extra_args = {**given, RETURN: False}
        if enabled and RequestOptions.of(given).capture and encoded_features(request.mm_features or []):
            params.extra_args = {**given, READER: whereabouts()}
        elif READER in given:  # from a client, whom nobody asked
            params.extra_args = {name: value for name, value in given.items() if name != READER}
        return request

    return process_inputs


def _expect(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_request(self: OutputProcessor, request: EngineCoreRequest, *args: Any, **kwargs: Any) -> None:
        original(self, request, *args, **kwargs)
        params = request.sampling_params
        # A streaming-input session is refused by the engine core, which knows what came before.
        if params is not None and READER in (params.extra_args or {}) and not request.resumable:
            _mark(self, self.request_states[request.request_id])

    return add_request


def _mark(processor: OutputProcessor, state: Any) -> None:
    """An embedding is expected of the request. Gives it the list for the failures of LLM's requests."""
    state._mm_embedding_failures = processor.__dict__.setdefault(_FAILURES, [])


def _take_deliveries(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def process_outputs(
        self: OutputProcessor, engine_core_outputs: list[EngineCoreOutput], *args: Any, **kwargs: Any
    ) -> Any:
        for output in engine_core_outputs:
            if output.ec_transfer_params is not None and DELIVERY in output.ec_transfer_params:
                delivery = output.ec_transfer_params.pop(DELIVERY)
                output.ec_transfer_params = output.ec_transfer_params or None  # the user's output as without capture
                state = self.request_states.get(output.request_id)
                if state is not None:
                    _mark(self, state)
                    state._mm_embedding = _readers().submit(_read, delivery)
                elif "handle" in delivery:  # aborted meanwhile
                    reader.discard(delivery["handle"])
        return original(self, engine_core_outputs, *args, **kwargs)

    return process_outputs


def _attach_at_finish(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _new_completion_output(
        self: RequestState, token_ids: list[int], finish_reason: FinishReason | None, stop_reason: int | str | None
    ) -> CompletionOutput:
        completion: CompletionOutput = original(self, token_ids, finish_reason, stop_reason)
        if finish_reason is None or finish_reason is FinishReason.ABORT:
            return completion
        future: Future[_Embeddings] | None = self.__dict__.pop("_mm_embedding", None)
        failures: list[MMEmbeddingError] | None = self.__dict__.pop("_mm_embedding_failures", None)
        if failures is None or (future is None and finish_reason is FinishReason.ERROR):
            return completion
        future = future or _not_sent(self.request_id)
        if self.queue is not None:  # AsyncLLM, whose event loop would wait here for the copy
            setattr(completion, _UNREAD, future)
            return completion
        if (failure := _attach(completion, future)) is not None:
            failures.append(failure)  # raised here, it would leave requests behind that the next call waits for
        return completion

    return _new_completion_output


def _take(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def get(self: RequestOutputCollector) -> RequestOutput | PoolingRequestOutput:
        output: RequestOutput | PoolingRequestOutput = await original(self)
        for _completion, future in _unread(output):
            if not future.done():
                await _done(future)
        _attach_all(output)
        return output

    return get


def _take_what_is_read(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_nowait(self: RequestOutputCollector) -> RequestOutput | PoolingRequestOutput | None:
        if not all(future.done() for _completion, future in _unread(self.output)):
            return None  # the caller goes on to `get`
        output: RequestOutput | PoolingRequestOutput | None = original(self)
        _attach_all(output)
        return output

    return get_nowait


def _raise_at_the_end(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def step(self: LLMEngine) -> Any:
        outputs = original(self)
        failures: list[MMEmbeddingError] | None = self.output_processor.__dict__.get(_FAILURES)
        if failures and not self.output_processor.has_unfinished_requests():
            first, *others = failures
            failures.clear()
            if others:
                first.add_note(f"{len(others)} more requests failed, the last one: {others[-1]}")
            raise first
        return outputs

    return step


def _keep_when_merged(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add(self: RequestOutput, next_output: RequestOutput, aggregate: bool) -> None:
        original(self, next_output, aggregate)
        if aggregate:
            unread = {completion.index: future for completion, future in _unread(next_output)}
            for completion in self.outputs:
                if (future := unread.get(completion.index)) is not None:
                    setattr(completion, _UNREAD, future)

    return add


def _with_connector(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def initialise(self: StatLoggerManager, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        if CaptureSettings.of(vllm_config).enabled:
            from harness.capture.connector import transfer_config

            # A copy: elsewhere in the frontend the configuration stays as the user made it, and is sent to engines.
            vllm_config = copy.copy(vllm_config)
            vllm_config.ec_transfer_config = transfer_config()
        original(self, vllm_config, *args, **kwargs)

    return initialise


def install_fields() -> None:
    """Gives every CompletionOutput the attributes, None by default, also where capture is off."""
    for name in FIELDS:
        setattr(CompletionOutput, name, None)


_REMOVE_WHEN = "CompletionOutput has mm_embedding upstream"

PATCHES = (
    Patch(
        "vllm.v1.engine.input_processor",
        "InputProcessor.process_inputs",
        (
            *("self", "request_id", "prompt", "params", "supported_tasks", "arrival_time", "lora_request"),
            *("tokenization_kwargs", "trace_headers", "priority", "data_parallel_rank", "resumable", "session_id"),
            "kv_hints",
        ),
        _tell_where,
        "The engine core must know whether the frontend can read its memory. Requests are made here, in the process "
        "that gets their outputs. OutputProcessor.add_request sees by it which requests are to be captured.",
        _REMOVE_WHEN,
    ),
    Patch(
        "vllm.v1.engine.output_processor",
        "OutputProcessor.add_request",
        ("self", "request", "prompt", "parent_req", "request_index", "queue"),
        _expect,
        "A completion without its embedding must be an error, and not None as for a request that has none: of several "
        "engines behind one frontend, one on another host may have been started without capture.",
        _REMOVE_WHEN,
    ),
    Patch(
        "vllm.v1.engine.output_processor",
        "OutputProcessor.process_outputs",
        ("self", "engine_core_outputs", "engine_core_timestamp", "iteration_stats", "weight_version"),
        _take_deliveries,
        "The only place that sees every output of the engine core, those of aborted requests too, whose memory would "
        "else be held until the lease expires. vLLM has no hook for outputs.",
        _REMOVE_WHEN,
    ),
    Patch(
        "vllm.v1.engine.output_processor",
        "RequestState._new_completion_output",
        ("self", "token_ids", "finish_reason", "stop_reason"),
        _attach_at_finish,
        "Private, but the only place where every way to finish meets, stop strings included, and every child of n>1 "
        "has its own completion.",
        _REMOVE_WHEN,
    ),
    Patch(
        "vllm.v1.engine.output_processor",
        "RequestOutputCollector.get",
        ("self",),
        _take,
        "AsyncLLM makes its outputs in the event loop, which all requests share. Here a caller waits for the copy of "
        "its embeddings beside it, and an error reaches no other caller.",
        _REMOVE_WHEN,
    ),
    Patch(
        "vllm.v1.engine.output_processor",
        "RequestOutputCollector.get_nowait",
        ("self",),
        _take_what_is_read,
        "Likewise, where an output is there already.",
        _REMOVE_WHEN,
    ),
    Patch(
        "vllm.outputs",
        "RequestOutput.add",
        ("self", "next_output", "aggregate"),
        _keep_when_merged,
        "Merges outputs for a slow consumer and copies only the fields that it names.",
        _REMOVE_WHEN,
    ),
    Patch(
        "vllm.v1.metrics.loggers",
        "StatLoggerManager.__init__",
        (
            "self",
            "vllm_config",
            "engine_idxs",
            "custom_stat_loggers",
            "enable_default_loggers",
            "aggregate_engine_logging",
            "client_count",
        ),
        _with_connector,
        "The loggers make a connector's metrics from the frontend's configuration, which names none: it was set in the "
        "engine core. Statistics of a connector that they do not know end the output handler.",
        "an encoder-cache connector can observe without being a producer or a consumer",
    ),
)

OFFLINE_PATCHES = (
    Patch(
        "vllm.v1.engine.llm_engine",
        "LLMEngine.step",
        ("self",),
        _raise_at_the_end,
        "Where an error leaves no request behind that the next call of LLM.generate would wait for or return.",
        _REMOVE_WHEN,
    ),
)
"""Of a module that not every process imports."""
