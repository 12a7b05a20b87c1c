"""Capture changes nothing else: tokens and logprobs with the plugin absent, idle and capturing."""

from __future__ import annotations

import pytest

from harness.engine import Arm
from harness.media import image, video
from harness.pytest_plugin.subject import Subject

pytestmark = [pytest.mark.suite("contract"), pytest.mark.once]


@pytest.mark.clause("C1", "C4")
def test_tokens_and_logprobs_are_those_without_the_plugin(subject: Subject, arm: Arm) -> None:
    prompts = [(image(81), "what?"), (image(82, 64, 128), "and", image(83), "which?"), (video(84), "when?"), ("text",)]
    # A prefix-cache hit would change how many tokens a step computes, and with that the order of the same roundings.
    params = {"max_tokens": 16, "logprobs": 0, "ignore_eos": True, "skip_reading_prefix_cache": True}
    requests = [subject.request(*parts, **params) for parts in prompts]
    truth = subject.engine(Arm.ABSENT).generate(*requests)
    outputs = subject.engine(arm).generate(*requests)
    for [expected], [completion], parts in zip(truth, outputs, prompts, strict=True):
        assert completion.token_ids == expected.token_ids, f"other tokens where the plugin is {arm}"
        assert completion.logprobs == expected.logprobs, f"other logprobs where the plugin is {arm}"
        assert len(completion.logprobs) == 16
        assert completion.has_field is (arm is not Arm.ABSENT)
        captured = completion.mm_embedding is not None
        assert captured is (arm is Arm.CAPTURING and len(parts) > 1), f"{captured=} where the plugin is {arm}"
