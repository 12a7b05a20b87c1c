"""The contract where embeddings get lost: caches, chunks, budgets and preemption, each proved to have happened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from harness import observe
from harness.engine import Completion, Engine, Request
from harness.engine_process import Server
from harness.media import Media, image
from harness.pytest_plugin.subject import Subject
from suites.test_contract_basics import assert_same, capture_stats, embedding, metrics

pytestmark = [pytest.mark.suite("contract"), pytest.mark.clause("C7"), pytest.mark.usefixtures("core")]

LONG = "a rather long text, so that whole blocks of the prefix cache are filled by it. " * 4


@pytest.fixture(scope="module")
def engine(subject: Subject) -> Engine:
    return subject.engine()


def run(engine: Engine, *requests: Request) -> tuple[list[list[Completion]], observe.Trace]:
    return engine.call(observe.run, requests)


def rows(subject: Subject, engine: Engine, media: Media) -> torch.Tensor:
    return embedding(engine.generate(subject.request(media, f"alone {media.seed}"))[0][0])


def assert_own_rows(subject: Subject, engine: Engine, completions: list[list[Completion]], media: list[Media]) -> None:
    truth = [rows(subject, engine, item) for item in media]
    known = {f"request {index}": expected for index, expected in enumerate(truth)}
    for [completion], expected in zip(completions, truth, strict=True):
        assert_same(completion, expected, known=known)


def test_prefix_cache_hit(subject: Subject, engine: Engine, record_property: Callable[[str, object], None]) -> None:
    request = subject.request(subject.item(21), LONG)
    first = engine.generate(request)[0][0]
    [[again]], trace = run(engine, request)
    record_property("cached_tokens", again.num_cached_tokens)
    assert again.num_cached_tokens > embedding(first).shape[0] + 20, "the prefix cache did not cover the image"
    assert sum(trace.encoded) == 0, "the encoder ran all the same"
    assert_same(again, embedding(first))


def test_prefix_cache_hit_on_an_item_that_was_not_captured(subject: Subject, engine: Engine) -> None:
    opted_out = subject.request(subject.item(22), LONG, extra_args={"return_mm_embedding": False})
    engine.generate(opted_out)
    covered = engine.generate(opted_out)[0][0]
    assert covered.num_cached_tokens > 20, "the prefix cache has nothing: the condition did not happen"
    before = engine.call(capture_stats)["forced_prefills"]
    completion = engine.generate(subject.request(subject.item(22), LONG))[0][0]
    assert engine.call(capture_stats)["forced_prefills"] == before + 1
    engine.call(reset_encoder_cache)  # the store with it, so that the truth is captured anew
    assert_same(completion, rows(subject, engine, subject.item(22)))


def test_encoder_cache_hit_of_an_item_that_was_not_captured(subject: Subject, engine: Engine) -> None:
    engine.generate(subject.request(subject.item(23), "x", extra_args={"return_mm_embedding": False}))
    [[completion]], trace = run(engine, subject.request(subject.item(23), "other text"))
    assert sum(trace.encoded) == 0, "the encoder cache did not have the item: the condition did not happen"
    assert embedding(completion).isfinite().all()
    engine.call(reset_encoder_cache)
    assert_same(completion, rows(subject, engine, subject.item(23)))


def reset_encoder_cache(server: Server) -> None:
    server.core.reset_encoder_cache()


def test_repeats_in_a_prompt_and_in_a_step(subject: Subject, engine: Engine) -> None:
    subject.needs_items(2)
    requests = [subject.request(subject.item(24), subject.item(24), text) for text in "abc"]
    completions, trace = run(engine, *requests)
    assert sum(trace.encoded) == 1, "the item was encoded more than once"
    truth = rows(subject, engine, subject.item(24))
    for [completion] in completions:
        assert_same(completion, truth, truth)


def capped(subject: Subject) -> Engine:
    """With memory for the embeddings of two small images."""
    footprint = rows(subject, subject.engine(), image(60)).nbytes + 128
    return subject.engine(mm_embedding_memory_gb=2.5 * footprint / 2**30, mm_embedding_cache_gb=0.0)


@pytest.mark.once
@pytest.mark.clause("C15")
def test_requests_wait_at_the_memory_cap(subject: Subject) -> None:
    engine = capped(subject)
    completions = engine.generate(*(subject.request(image(60 + index), "wait") for index in range(6)))
    waits = engine.call(capture_stats)["waits"]
    assert waits > 0, "no request had to wait: the condition did not happen"
    assert engine.call(metrics)["waits"] == waits, "the metrics do not show who waited"
    assert_own_rows(subject, engine, completions, [image(60 + index) for index in range(6)])


@pytest.mark.once
@pytest.mark.clause("C12")
def test_an_item_above_the_memory_cap_is_an_error_that_says_so(subject: Subject) -> None:
    engine, fine = capped(subject), subject.request(image(71), "small")
    with pytest.raises(RuntimeError, match="mm_embedding_memory_gb"):
        engine.generate(subject.request(image(70, 224, 224), "too large"), fine)
    assert_own_rows(subject, engine, engine.generate(fine), [image(71)])


CHUNK = 128
"""Tokens a step, where no item has more rows."""


def chunking(subject: Subject, media: list[Media]) -> Engine:
    """With several steps for a long prompt.

    An item must fit into one: vLLM takes LLaVA-OneVision's images for smaller than they are, and the encoder
    cache, which is as large as a step or a model's largest item, has no room for them then.
    """
    largest = max(len(rows(subject, subject.engine(), item)) for item in media)
    return subject.engine(
        max_num_batched_tokens=max(CHUNK, largest), enable_prefix_caching=False, mm_embedding_cache_gb=0.0
    )


def test_chunked_prefill_with_several_images(subject: Subject, record_property: Callable[[str, object], None]) -> None:
    subject.needs_items(3)
    media = [subject.item(31, 2), subject.item(32, 3), subject.item(33, 1)]
    engine = chunking(subject, media)
    request = subject.request(media[0], LONG, media[1], LONG, media[2])
    [[completion]], trace = run(engine, request)
    record_property("prefill_steps", len(trace.chunks))
    assert len(trace.chunks) >= 3, f"the prefill took {len(trace.chunks)} steps: it was not chunked"
    assert sum(step > 0 for step in trace.encoded) >= 2, "all images were encoded in one step"
    assert_same(completion, *(rows(subject, engine, item) for item in media))


def evict(subject: Subject, engine: Engine) -> None:
    """Sends other items until the encoder cache, which has room for a model's largest item or more, has had to let go
    of all that was in it.
    """
    filler = image(400, 224, 224)
    number = engine.call(encoder_cache_size) // len(rows(subject, engine, filler)) + 1
    others = [image(filler.seed + index, filler.width, filler.height) for index in range(1, number)]
    engine.generate(*(subject.request(item, "fill", max_tokens=1) for item in others))


def encoder_cache_size(server: Server) -> int:
    """Rows."""
    size: int = server.core.scheduler.encoder_cache_manager.cache_size
    return size


@pytest.mark.once
def test_eviction_from_the_encoder_cache_and_encoding_again(subject: Subject) -> None:
    # With neither the prefix cache nor the processor's, vLLM would give the item another name in each request, and
    # encode it in any case.
    engine = subject.engine(max_num_batched_tokens=CHUNK, mm_embedding_cache_gb=0.0)
    item = image(41, 224, 224)
    first = rows(subject, engine, item)
    _, trace = run(engine, subject.request("still there", item))
    assert sum(trace.encoded) == 0, "the item has another name in each request: the condition cannot happen"
    evict(subject, engine)
    [[again]], trace = run(engine, subject.request("again", item))
    assert sum(trace.encoded) == 1, "the item was still in the encoder cache: the condition did not happen"
    assert_same(again, first)


@pytest.mark.once
def test_an_evicted_item_is_loaded_instead_of_encoded_where_that_is_asked_for(subject: Subject) -> None:
    params = {"max_tokens": 6, "logprobs": 0, "ignore_eos": True}
    engine = subject.engine(max_num_batched_tokens=CHUNK, enable_mm_embedding_reuse=True)
    media = [image(seed, 224, 224) for seed in (301, 302)]
    truth_rows = [rows(subject, engine, item) for item in media]
    levels = {"return_mm_embedding_levels": True}
    request = subject.request("again", media[0], "and", media[1], extra_args=levels, **params)
    # The truth is answered from the encoder cache, from the rows that were captured, and with no token computed before:
    # on a GPU the last bits of rows depend on what is encoded beside them, and an answer's on how much is computed.
    engine.call(reset_prefix_cache)
    [[truth]], trace = run(engine, request)
    assert sum(trace.encoded) == 0, "the truth was encoded again"
    assert engine.call(capture_stats)["reused"] == 0, "the truth was loaded"
    [[other]] = engine.generate(subject.request("again", media[1], "and", media[0], **params))
    evict(subject, engine)
    engine.call(reset_prefix_cache)
    [[loaded]], trace = run(engine, request)
    assert loaded.num_cached_tokens == truth.num_cached_tokens == 0
    assert sum(trace.encoded) == 0, "the encoder ran all the same"
    stats = engine.call(capture_stats)
    assert stats["reused"] == 2
    assert loaded.mm_embedding is not None
    assert loaded.mm_embedding_levels is not None
    assert stats["reused_bytes"] == loaded.mm_embedding.nbytes + loaded.mm_embedding_levels.nbytes
    assert answer(other) != answer(truth), "the images are not heard: the answer tells nothing"
    assert answer(loaded) == answer(truth), "the language model was given something else than where it was encoded"
    assert_same(loaded, *truth_rows)
    assert_same(truth, *truth_rows)
    assert truth.mm_embedding_levels is not None
    assert torch.equal(loaded.mm_embedding_levels, truth.mm_embedding_levels)


def answer(completion: Completion) -> tuple[Any, Any]:
    return completion.token_ids, completion.logprobs


def reset_prefix_cache(server: Server) -> None:
    assert server.core.reset_prefix_cache()


@pytest.mark.once
def test_preemption(subject: Subject, record_property: Callable[[str, object], None]) -> None:
    engine = subject.engine(
        num_gpu_blocks_override=7,
        block_size=128,
        max_model_len=512,
        enable_prefix_caching=False,
        mm_embedding_cache_gb=0.0,  # so that the truth below is captured anew
    )
    requests = [subject.request(image(50 + index), LONG[:60], max_tokens=200, ignore_eos=True) for index in range(4)]
    completions, trace = run(engine, *requests)
    record_property("preemptions", trace.preemptions)
    assert trace.preemptions > 0, "no request was preempted: the condition did not happen"
    assert_own_rows(subject, engine, completions, [image(50 + index) for index in range(4)])
