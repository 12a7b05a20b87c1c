"""Requests run with vLLM's own doings recorded. Runs in the engine's process, for engines with in_process=True."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from torch import Tensor

from harness.engine import Completion, Request
from harness.engine_process import Server, generate


@dataclass(frozen=True)
class ProcessedItem:
    """What vLLM's processor made of one item.

    Attributes:
        modality: "image", "video" or "audio".
        num_embeds: rows that its placeholder takes (`mm_position.get_num_embeds()`).
        data: the encoder's inputs as a batch of this item alone, such as pixel_values.
    """

    modality: str
    num_embeds: int
    data: dict[str, Tensor]


@dataclass
class Trace:
    """What happened while the requests ran.

    Attributes:
        processed: each request's items in prompt order.
        encoded: how many items the encoder was run for, by step.
        chunks: how many prompt tokens were scheduled, by step with a prefill.
        preemptions: how often a request was preempted.
    """

    processed: list[list[ProcessedItem]] = field(default_factory=list)
    encoded: list[int] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)
    preemptions: int = 0


async def run(server: Server, requests: Sequence[Request]) -> tuple[list[list[Completion]], Trace]:
    """The completions of the requests, run together, and the trace."""
    trace = Trace()
    with _recorded(server, trace):
        return await generate(server, requests), trace


def _batch_of_one(data: Mapping[str, Any]) -> dict[str, Tensor]:
    """As vLLM gives it to the model: stacked, concatenated or shared, whichever the field is."""
    batch = {name: element.field.reduce_data([element]) for name, element in data.items() if element.data is not None}
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}


@contextmanager
def _recorded(server: Server, trace: Trace) -> Iterator[None]:
    processor, scheduler = server.engine.llm_engine.input_processor, server.core.scheduler
    process_inputs, schedule = processor.process_inputs, scheduler.schedule
    preempt = scheduler._preempt_request

    def recording_process_inputs(*args: Any, **kwargs: Any) -> Any:
        request = process_inputs(*args, **kwargs)
        features = sorted(request.mm_features or [], key=lambda feature: feature.mm_position.offset)
        trace.processed.append(
            [
                ProcessedItem(
                    feature.modality,
                    feature.mm_position.get_num_embeds(),
                    _batch_of_one(feature.data or {}),
                )
                for feature in features
            ]
        )
        return request

    def recording_schedule(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        trace.encoded.append(sum(map(len, output.scheduled_encoder_inputs.values())))
        prefill = sum(tokens for tokens in output.num_scheduled_tokens.values() if tokens > 1)
        if prefill:
            trace.chunks.append(prefill)
        return output

    def recording_preempt(*args: Any, **kwargs: Any) -> Any:
        trace.preemptions += 1
        return preempt(*args, **kwargs)

    with (
        mock.patch.object(processor, "process_inputs", recording_process_inputs),
        mock.patch.object(scheduler, "schedule", recording_schedule),
        mock.patch.object(scheduler, "_preempt_request", recording_preempt),
    ):
        yield
