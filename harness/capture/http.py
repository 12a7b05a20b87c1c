"""The chat completions API: a request asks for its embeddings with `vllm_xargs: {"return_mm_embedding": true}`.

Each finished choice then has a field `mm_embedding`: {"dtype", "shape", "data", "items"}, the data in base64, row-major
and little-endian; and `mm_embedding_levels` if `return_mm_embedding_levels` was asked for. Without asking, the JSON is
vLLM's own and nothing is captured.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import torch

from harness.capture.frontend import capture_only_if_asked
from harness.capture.patches import Patch
from harness.capture.settings import RETURN, RequestOptions

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.engine.protocol import EngineClient
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.outputs import CompletionOutput, RequestOutput


def encode(tensor: Tensor) -> dict[str, Any]:
    """A tensor as JSON: {"dtype": torch's name, "shape": list, "data": base64 of its row-major little-endian bytes}."""
    data = base64.b64encode(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).decode()
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "data": data}


def decode(value: dict[str, Any]) -> Tensor:
    """The tensor of `encode`, for clients."""
    data = bytearray(base64.b64decode(value["data"]))
    return torch.frombuffer(data, dtype=getattr(torch, value["dtype"])).reshape(value["shape"])


def _fields(completion: CompletionOutput) -> dict[str, Any]:
    if completion.mm_embedding is None:
        return {"mm_embedding": None}
    items = [dataclasses.asdict(item) for item in completion.mm_embedding_items]
    fields = {"mm_embedding": {**encode(completion.mm_embedding), "items": items}}
    if completion.mm_embedding_levels is not None:
        fields["mm_embedding_levels"] = encode(completion.mm_embedding_levels)
    return fields


def _only_if_asked(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def initialise(self: OpenAIServingModels, engine_client: EngineClient, *args: Any, **kwargs: Any) -> None:
        original(self, engine_client, *args, **kwargs)
        capture_only_if_asked(engine_client.input_processor)

    return initialise


def _is_asked(request: ChatCompletionRequest) -> bool:
    return RequestOptions.of({RETURN: False, **(request.vllm_xargs or {})}).capture


def _refusal(serving: OpenAIServingChat, request: ChatCompletionRequest) -> str | None:
    if request.use_beam_search:
        return f"{RETURN} and use_beam_search are asked for, and beams have no embeddings: leave one of the two out."
    if getattr(serving.model_config.multimodal_config, "enable_return_mm_embedding", False):
        return None
    return f"{RETURN} is asked for, but the server captures no embeddings: start it with --enable-return-mm-embedding."


def _refuse(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def create_chat_completion(
        self: OpenAIServingChat, request: ChatCompletionRequest, *args: Any, **kwargs: Any
    ) -> Any:
        if _is_asked(request) and (refusal := _refusal(self, request)) is not None:
            return self.create_error_response(refusal)
        return await original(self, request, *args, **kwargs)

    return create_chat_completion


class _Finished:
    """Passes a request's outputs on and keeps the fields of its finished choices, by index."""

    def __init__(self, outputs: AsyncIterator[RequestOutput]) -> None:
        self._outputs = outputs
        self.fields: dict[int, dict[str, Any]] = {}

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        async for output in self._outputs:
            for completion in output.outputs:
                if completion.finished():
                    self.fields[completion.index] = _fields(completion)
            yield output


def _full(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def chat_completion_full_generator(
        self: OpenAIServingChat,
        request: ChatCompletionRequest,
        result_generator: AsyncIterator[RequestOutput],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not _is_asked(request):
            return await original(self, request, result_generator, *args, **kwargs)
        finished = _Finished(result_generator)
        response = await original(self, request, finished, *args, **kwargs)
        for choice in getattr(response, "choices", ()):
            for name, value in finished.fields.get(choice.index, {}).items():
                setattr(choice, name, value)  # vLLM's protocol models allow additional fields
        return response

    return chat_completion_full_generator


def _streaming(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def chat_completion_stream_generator(
        self: OpenAIServingChat,
        request: ChatCompletionRequest,
        result_generator: AsyncIterator[RequestOutput],
        *args: Any,
        **kwargs: Any,
    ) -> AsyncIterator[str]:
        if not _is_asked(request):
            async for event in original(self, request, result_generator, *args, **kwargs):
                yield event
            return
        finished = _Finished(result_generator)
        async for event in original(self, request, finished, *args, **kwargs):
            yield _with_fields(event, finished.fields)

    return chat_completion_stream_generator


def _with_fields(event: str, fields: dict[int, dict[str, Any]]) -> str:
    """The server-sent event, with the fields on the chunk that tells a choice's finish_reason."""
    data = event.removeprefix("data: ").strip()
    if not fields or '"finish_reason":"' not in data:
        return event
    chunk = json.loads(data)
    for choice in chunk["choices"]:
        if choice.get("finish_reason") is not None:
            choice.update(fields.get(choice["index"], {}))
    return f"data: {json.dumps(chunk, separators=(',', ':'), ensure_ascii=False)}\n\n"


_REMOVE_WHEN = "CompletionOutput has mm_embedding upstream and the API serves it"
_CHAT = "vllm.entrypoints.openai.chat_completion"
_GENERATOR = ("self", "request", "result_generator", "request_id", "model_name", "conversation", "tokenizer")

PATCHES = (
    Patch(
        "vllm.entrypoints.openai.models.serving",
        "OpenAIServingModels.__init__",
        ("self", "engine_client", "base_model_paths", "lora_modules"),
        _only_if_asked,
        "A response that does not carry the embeddings should not cost their capture, nor fail for it. Every server "
        "makes one of these of its engine's client, whatever APIs it has.",
        _REMOVE_WHEN,
    ),
    Patch(
        f"{_CHAT}.serving",
        "OpenAIServingChat.create_chat_completion",
        ("self", "request", "raw_request"),
        _refuse,
        "What cannot be returned is refused before the media are processed: the processor's cache believes that the "
        "engine has got what it has seen, and the next request for the same would fail.",
        _REMOVE_WHEN,
    ),
    Patch(
        f"{_CHAT}.serving",
        "OpenAIServingChat.chat_completion_full_generator",
        (*_GENERATOR, "request_metadata", "parser", "mm_token_counts"),
        _full,
        "Choices are made from the completions here, and vLLM has no hook for more fields.",
        _REMOVE_WHEN,
    ),
    Patch(
        f"{_CHAT}.serving",
        "OpenAIServingChat.chat_completion_stream_generator",
        (*_GENERATOR, "request_metadata", "chat_template_kwargs", "mm_token_counts"),
        _streaming,
        "Likewise for the chunks of a stream.",
        _REMOVE_WHEN,
    ),
)
