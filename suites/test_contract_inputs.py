"""What was not an encoder's input: embeddings that the user gives, and configurations that the user makes by hand."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any
from unittest import mock

import pytest
import torch

from harness import observe
from harness.engine import Completion, Engine, Request
from harness.engine_process import Server
from harness.media import image
from harness.pytest_plugin.subject import Subject
from suites.test_contract_basics import embedding

pytestmark = [pytest.mark.suite("contract"), pytest.mark.once, pytest.mark.usefixtures("core")]


@pytest.fixture(scope="module")
def engine(subject: Subject) -> Engine:
    return subject.engine(enable_mm_embeds=True, enable_prompt_embeds=True, mm_processor_cache_gb=0.0)


@pytest.fixture(scope="module")
def encoded(subject: Subject, engine: Engine) -> tuple[Completion, dict[str, torch.Tensor]]:
    """An image that the engine encodes, and what vLLM's processor made of it."""
    request = subject.request(image(111), "what?", extra_args={"return_mm_embedding_levels": True})
    [[completion]], trace = engine.call(observe.run, [request])
    return completion, trace.processed[0][0].data


@pytest.mark.clause("C9")
def test_precomputed_image_embeds_are_returned(
    subject: Subject, engine: Engine, encoded: tuple[Completion, Mapping[str, torch.Tensor]]
) -> None:
    completion, inputs = encoded
    assert completion.mm_embedding_levels is not None
    given = torch.cat([embedding(completion), *completion.mm_embedding_levels], dim=1)
    prompt = subject.request(image(111), "what?").prompt
    media = {"image": {"image_embeds": given, "image_grid_thw": inputs["image_grid_thw"].reshape(-1, 3)}}
    [again] = engine.generate(Request({**prompt, "multi_modal_data": media}, {"temperature": 0.0, "max_tokens": 4}))[0]
    assert again.token_ids == completion.token_ids
    assert again.mm_embedding is not None, "a request with image_embeds got no embedding"
    assert torch.equal(again.mm_embedding, embedding(completion)), "image_embeds came back changed"


def input_embeddings(server: Server, token_ids: list[int]) -> torch.Tensor:
    model = server.engine.llm_engine.model_executor.driver_worker.get_model()
    with torch.inference_mode():
        device = next(model.parameters()).device
        rows: torch.Tensor = model.get_language_model().embed_input_ids(torch.tensor(token_ids, device=device))
    return rows.cpu().clone()


@pytest.mark.clause("C9")
def test_prompt_embeds_are_not_an_encoders_output(subject: Subject, engine: Engine) -> None:
    text = engine.generate(subject.request("only text here"))[0][0]
    rows = engine.call(input_embeddings, text.prompt_token_ids)
    request = Request({"prompt_embeds": rows}, {"temperature": 0.0, "max_tokens": 4})
    alone = engine.generate(request)[0][0]  # as the text was: a batch may round otherwise
    assert alone.token_ids == text.token_ids, "the embeddings were not those of the text"
    [with_embeds], [with_image] = engine.generate(request, subject.request(image(112), "what?"))
    for completion in (alone, with_embeds):
        assert completion.mm_embedding is None, "prompt_embeds were returned as an encoder's output"
    assert with_image.mm_embedding is not None


def chat(server: Server, rows: torch.Tensor) -> Completion:
    import base64
    import io

    from vllm import SamplingParams

    buffer = io.BytesIO()
    torch.save(rows, buffer)
    part = {"type": "prompt_embeds", "data": base64.b64encode(buffer.getvalue()).decode()}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}]
    [output] = server.engine.chat(messages, SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False)
    return Completion.of(output, output.outputs[0])


@pytest.mark.clause("C9")
def test_prompt_embeds_in_a_chat_are_not_an_encoders_output(engine: Engine) -> None:
    # vLLM passes these through its encoder cache, like an image's. (Beside a real image it fails for deepstack models,
    # with and without the plugin: their rows are wider than an embedding.)
    completion = engine.call(chat, engine.call(input_embeddings, [5, 6, 7]))
    assert completion.token_ids
    assert completion.mm_embedding is None, "a chat's prompt_embeds were returned as an encoder's output"


KEPT: list[Any] = []
"""Engines of the child: the end of one tears down the parallel groups of the process."""


def in_this_process(server: Server, request: Request, capture: bool) -> Completion:
    """The completion of another engine, in the child itself and of a MultiModalConfig made by hand."""
    from vllm import EngineArgs, SamplingParams
    from vllm.config import MultiModalConfig
    from vllm.v1.engine.llm_engine import LLMEngine

    options = dict(server.spec.options)
    config = EngineArgs(model=server.spec.model, **options).create_engine_config()
    by_hand = MultiModalConfig(limit_per_prompt=options["limit_mm_per_prompt"], enable_return_mm_embedding=capture)
    config.model_config.multimodal_config = by_hand
    with mock.patch.dict(os.environ, {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}):
        engine: Any = LLMEngine.from_vllm_config(config)
    KEPT.append(engine)
    engine.add_request("by hand", dict(request.prompt), SamplingParams(**request.params))
    outputs: list[Any] = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    return Completion.of(outputs[-1], outputs[-1].outputs[0])


@pytest.mark.clause("C1", "C12")
def test_a_configuration_made_by_hand_switches_it_on(subject: Subject) -> None:
    # Its engine core is in another process: the one made by hand is the first of the child itself.
    engine = subject.engine(in_process=False)
    expected = engine.generate(subject.request(image(113), "what?"))[0][0]
    request = subject.request(image(113), "what?", output_kind=2)
    completion = engine.call(in_this_process, request, True)
    assert completion.finish_reason is not None
    assert completion.token_ids == expected.token_ids
    assert torch.equal(embedding(completion), embedding(expected))
    # The connector is a global of the process: an engine beside it would find it, or replace it.
    for capture in (True, False):
        with pytest.raises(RuntimeError, match="enable_return_mm_embedding must be alone in its process"):
            engine.call(in_this_process, request, capture)
