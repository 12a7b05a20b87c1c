"""What the chat completions API refuses, without a server."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from harness.capture import http

ASKED = {"return_mm_embedding": True}


def answer(captures: bool, **options: Any) -> Any:
    """Of a request: "refused: " and the reason, or "passed on" to vLLM."""
    vllm = mock.AsyncMock(return_value="passed on")
    config = SimpleNamespace(multimodal_config=SimpleNamespace(enable_return_mm_embedding=captures))
    serving = SimpleNamespace(model_config=config, create_error_response=lambda reason: f"refused: {reason}")
    request = ChatCompletionRequest(messages=[{"role": "user", "content": "what?"}], **options)
    found = asyncio.run(http._refuse(vllm)(serving, request))
    assert vllm.await_count == (found == "passed on")
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("captures", "options", "reason"),
    [
        (False, {"vllm_xargs": ASKED}, "start it with --enable-return-mm-embedding"),
        (True, {"vllm_xargs": ASKED, "use_beam_search": True}, "leave one of the two out"),
    ],
)
def test_what_cannot_be_returned_is_refused_before_vllm_sees_it(
    captures: bool, options: dict[str, Any], reason: str, stream: bool
) -> None:
    found = answer(captures, stream=stream, **options)
    assert found.startswith("refused: return_mm_embedding ")
    assert reason in found


@pytest.mark.parametrize(
    ("captures", "options"),
    [
        (True, {"vllm_xargs": ASKED}),
        (True, {"use_beam_search": True}),
        (False, {}),
        (False, {"vllm_xargs": {"return_mm_embedding": False}}),
    ],
)
def test_all_else_is_passed_on(captures: bool, options: dict[str, Any]) -> None:
    assert answer(captures, **options) == "passed on"
