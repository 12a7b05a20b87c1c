"""The contract: what a finished completion carries, and when. On vLLM's default processes for one model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import accumulate
from string import ascii_letters
from typing import Any

import pytest
import torch

from harness.compare import Span, Tolerance, compare
from harness.engine import Completion, Engine, Request
from harness.engine_process import Server, final_outputs
from harness.media import Media
from harness.pytest_plugin.subject import Subject

pytestmark = pytest.mark.suite("contract")


@pytest.fixture(scope="module")
def engine(subject: Subject) -> Engine:
    return subject.engine(in_process=not subject.thorough)


@pytest.fixture(scope="module")
def items(subject: Subject) -> tuple[Media, Media]:
    """Two of different sizes."""
    return subject.item(11), subject.item(12, 1)


@pytest.fixture(scope="module")
def alone(subject: Subject, engine: Engine, items: tuple[Media, Media]) -> dict[str, Completion]:
    """Each item in a request of its own, one after another: the truth for what comes later."""
    first, second = (engine.generate(subject.request(item, "one"))[0][0] for item in items)
    return {"first": first, "second": second}


def embedding(completion: Completion) -> torch.Tensor:
    assert completion.mm_embedding is not None, "the completion has no mm_embedding"
    return completion.mm_embedding


def other_batch(dtype: torch.dtype) -> Tolerance:
    """For the same item in another batch: another order of the same roundings, of which a tower adds few up."""
    if dtype == torch.float32:
        return Tolerance.float32()
    return Tolerance(dtype, torch.tensor(4 * torch.finfo(dtype).eps, dtype=torch.float64), f"4 roundings to {dtype}")


def assert_same(completion: Completion, *expected: torch.Tensor, known: dict[str, torch.Tensor] | None = None) -> None:
    truth = torch.cat(expected)
    starts = accumulate(map(len, expected), initial=0)
    modality = completion.mm_embedding_items[0].modality if completion.mm_embedding_items else "image"
    spans = [Span(modality, start, len(rows), "") for start, rows in zip(starts, expected, strict=False)]
    comparison = compare(completion.mm_embedding, truth, tolerance=other_batch(truth.dtype), items=spans, known=known)
    assert comparison.ok, comparison.explain()
    items = [Span(item.modality, item.start, item.num_rows, "") for item in completion.mm_embedding_items or []]
    assert items == spans, "mm_embedding_items are not the items of the rows"


@pytest.mark.clause("C1", "C2", "C3")
def test_a_completion_carries_the_rows_of_its_item(
    engine: Engine, alone: dict[str, Completion], items: tuple[Media, Media]
) -> None:
    rows = embedding(alone["first"])
    assert rows.dtype == engine.call(dtype), "the rows are not in the engine's dtype"
    assert rows.device.type == "cpu"
    assert rows.is_contiguous()
    assert rows.isfinite().all()
    spans = alone["first"].mm_embedding_items
    assert spans is not None
    assert [(span.modality, span.start, span.num_rows) for span in spans] == [(items[0].modality, 0, len(rows))]
    assert spans[0].identifier
    assert not torch.allclose(rows[0], rows[-1]), "the rows do not depend on the item: the test could not fail"


def dtype(server: Server) -> torch.dtype:
    found: torch.dtype = server.llm_engine.model_config.dtype
    return found


@pytest.mark.clause("C3")
@pytest.mark.parametrize("swapped", [False, True])
def test_rows_are_the_items_in_prompt_order(
    subject: Subject, engine: Engine, items: tuple[Media, Media], alone: dict[str, Completion], swapped: bool
) -> None:
    subject.needs_items(2)
    parts, names = (items[0], " and ", items[1]), ["first", "second"]
    if swapped:
        parts, names = parts[::-1], names[::-1]
    completion = engine.generate(subject.request(*parts))[0][0]
    assert_same(completion, *(embedding(alone[name]) for name in names))


@pytest.mark.clause("C4")
def test_a_text_only_request_in_the_batch_gets_none(
    subject: Subject, engine: Engine, items: tuple[Media, Media], alone: dict[str, Completion]
) -> None:
    [text], [with_item] = engine.generate(subject.request("hello"), subject.request(items[0], "see"))
    assert text.has_field
    assert text.mm_embedding is None, "a text-only request got an embedding"
    assert text.mm_embedding_items is None
    assert_same(with_item, embedding(alone["first"]))


@pytest.mark.clause("C6")
@pytest.mark.parametrize("way", ["length", "one token", "stop token", "stop string", "eos"])
def test_every_way_to_finish_carries_it(
    subject: Subject, engine: Engine, items: tuple[Media, Media], alone: dict[str, Completion], way: str
) -> None:
    # Letters: a model of random weights may prefer ids that stand for no text at all, which no string can stop. Without
    # a prefix-cache hit, which changes the order of roundings: the same letters again.
    letters = {"max_tokens": 8, "ignore_eos": True, "allowed_token_ids": engine.call(letter_token_ids)}
    letters["skip_reading_prefix_cache"] = True
    free = engine.generate(subject.request(items[1], "go", **letters))[0][0]
    ways: dict[str, tuple[dict[str, Any], str, int | str | None]] = {
        "length": ({"max_tokens": 3, "ignore_eos": True}, "length", None),
        "one token": ({"max_tokens": 1, "ignore_eos": True}, "length", None),
        "stop token": ({**letters, "stop_token_ids": free.token_ids[2:3]}, "stop", free.token_ids[2]),
        "stop string": ({**letters, "stop": [free.text[1:3]]}, "stop", free.text[1:3]),
        "eos": ({"max_tokens": 8, "logit_bias": {engine.call(eos_token_id): 100.0}}, "stop", None),
    }
    params, reason, cause = ways[way]
    completion = engine.generate(subject.request(items[1], "go", **params))[0][0]
    assert (completion.finish_reason, completion.stop_reason) == (reason, cause), f"it did not finish by {way}"
    assert_same(completion, embedding(alone["second"]))


def eos_token_id(server: Server) -> int:
    return int(server.engine.get_tokenizer().eos_token_id)


def letter_token_ids(server: Server) -> list[int]:
    vocabulary: dict[str, int] = server.engine.get_tokenizer().get_vocab()
    return sorted(token_id for token, token_id in vocabulary.items() if len(token) == 1 and token in ascii_letters)


@pytest.mark.clause("C2", "C7")
def test_every_child_of_n_gets_its_own(
    subject: Subject, engine: Engine, items: tuple[Media, Media], alone: dict[str, Completion]
) -> None:
    [children] = engine.generate(subject.request(items[0], "again", n=3, temperature=1.0, seed=5))
    assert len(children) == 3
    for child in children:
        assert_same(child, embedding(alone["first"]))
    shared = engine.call(children_share_memory, subject.request(items[0], "own", n=2, temperature=1.0))
    assert not shared, "completions share memory: who writes to one embedding changes another"


async def children_share_memory(server: Server, request: Request) -> bool:
    [output] = await final_outputs(server, [request])
    first, second = output.outputs
    before = second.mm_embedding.clone()
    first.mm_embedding.zero_()
    again = (await final_outputs(server, [request]))[0].outputs[0]
    return not (torch.equal(second.mm_embedding, before) and torch.equal(again.mm_embedding, before))


@pytest.mark.clause("C8")
def test_levels_come_on_request_and_the_rows_stay_cut(
    subject: Subject, engine: Engine, items: tuple[Media, Media], alone: dict[str, Completion]
) -> None:
    assert alone["first"].mm_embedding_levels is None
    extra_args = {"return_mm_embedding_levels": True}
    completion = engine.generate(subject.request(items[0], "levels", extra_args=extra_args))[0][0]
    assert_same(completion, embedding(alone["first"]))
    levels = completion.mm_embedding_levels
    assert levels is not None
    assert levels.shape == (subject.spec.num_levels, *embedding(completion).shape)
    assert all(level.abs().max() > 0 for level in levels)


@pytest.mark.clause("C10")
def test_an_opted_out_request_copies_nothing(subject: Subject, engine: Engine) -> None:
    before = engine.call(capture_stats)
    request = subject.request(subject.item(13), "no", extra_args={"return_mm_embedding": False})
    completion = engine.generate(request)[0][0]
    after = engine.call(capture_stats)
    assert completion.mm_embedding is None, "a request that opted out got an embedding"
    assert (after["captured"], after["misses"], after["hits"]) == (before["captured"], before["misses"], before["hits"])


async def capture_stats(server: Server) -> dict[str, int]:
    stats = await server.capture_stats()
    assert stats is not None
    return stats


@pytest.mark.clause("C15")
def test_the_metrics_count_what_is_captured(subject: Subject, engine: Engine, alone: dict[str, Completion]) -> None:
    before = engine.call(metrics)
    completion = engine.generate(subject.request(subject.item(14), "count"))[0][0]
    after, stats = engine.call(metrics), engine.call(capture_stats)
    assert after["captured_items"] == before["captured_items"] + 1, "the metrics do not count what is captured"
    assert after["captured_bytes"] == before["captured_bytes"] + embedding(completion).nbytes
    # Since the engine started: no step's share was lost, or counted twice.
    shares = {
        "captured_items": "captured",
        "captured_bytes": "captured_bytes",
        "misses": "misses",
        "hits": "hits",
        "forced_prefills": "forced_prefills",
    }
    assert {name: after[name] for name in shares} == {name: stats[key] for name, key in shares.items()}
    assert after["mapped_bytes"] >= after["held_bytes"] >= embedding(completion).nbytes
    assert after["admitted_requests"] == 0, "a completed request counts as running"


def metrics(server: Server) -> dict[str, float]:
    """By their names without the prefix, as LLM.get_metrics() gives them; of data-parallel engines the sums."""
    from vllm.v1.metrics.reader import get_metrics_snapshot

    prefix = "vllm:mm_embedding_"
    found: dict[str, float] = defaultdict(float)
    for metric in get_metrics_snapshot():
        if metric.name.startswith(prefix):
            found[metric.name.removeprefix(prefix)] += metric.value
    return dict(found)  # of which a name that is missing is an error, and not 0


@pytest.mark.clause("C11")
def test_everything_is_released_at_completion(
    subject: Subject, engine: Engine, alone: dict[str, Completion], record_property: Callable[[str, object], None]
) -> None:
    stats = engine.call(capture_stats)
    record_property("captured", stats["captured"])
    assert stats["captured"] > 0, "nothing was captured: the test could not fail"
    assert (stats["requests"], stats["leases"]) == (0, 0), f"still held after completion: {stats}"
    assert stats["held_bytes"] == stats["cached_bytes"], f"still held after completion: {stats}"
