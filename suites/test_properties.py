"""Whatever is asked and whatever runs beside it, a request gets its own rows: random prompts in random batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from harness import observe
from harness.cases import Part
from harness.compare import compare
from harness.engine_process import Server
from harness.media import audio, image
from harness.pytest_plugin.subject import Subject

pytestmark = [pytest.mark.suite("properties"), pytest.mark.clause("C3", "C7"), pytest.mark.usefixtures("core")]

EXAMPLES = 5
"""Of each model; the same ones on every run of CI, others elsewhere (hypothesis' profiles)."""


def items(subject: Subject) -> st.SearchStrategy[Any]:
    seeds = st.integers(200, 220)  # few: the same item comes again
    if "image" not in subject.spec.placeholders:
        return st.builds(audio, seeds, st.floats(0.3, 2.0))
    sides = st.integers(24, 200)
    return st.builds(image, seeds, sides, sides)


def prompts(subject: Subject) -> st.SearchStrategy[tuple[Part, ...]]:
    """Texts and up to three items in any order, where the model takes as many."""
    [modality, *_] = subject.spec.placeholders
    most = min(3, subject.spec.engine_options.get("limit_mm_per_prompt", {}).get(modality, 3))
    texts = st.text("abc d", min_size=1, max_size=20)
    return st.builds(
        lambda media, body, order: tuple(order.sample([*media, *body], len(media) + len(body))),
        st.lists(items(subject), max_size=most),
        st.lists(texts, min_size=1, max_size=3),
        st.randoms(use_true_random=False),
    )


def forget(server: Server) -> None:
    """So that the next run encodes again."""
    server.core.reset_prefix_cache()
    server.core.reset_encoder_cache()


def test_rows_do_not_depend_on_the_batch(subject: Subject, record_property: Callable[[str, object], None]) -> None:
    engine = subject.engine()
    ran = []

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @example([(subject.item(230), "a"), (subject.item(231, 1), "b")])
    @given(st.lists(prompts(subject), min_size=1, max_size=4))
    def check(batch: list[tuple[Part, ...]]) -> None:
        requests = [subject.request(*parts, max_tokens=2, ignore_eos=True) for parts in batch]
        engine.call(forget)
        together, trace = engine.call(observe.run, requests)
        for request, [completion], processed in zip(requests, together, trace.processed, strict=True):
            if not processed:
                assert completion.mm_embedding is None
                continue
            spans = completion.mm_embedding_items
            assert completion.mm_embedding is not None
            assert spans is not None
            assert [(span.modality, span.num_rows) for span in spans] == [
                (item.modality, item.num_embeds) for item in processed
            ]
            engine.call(forget)
            [[alone]] = engine.generate(request)
            assert alone.mm_embedding is not None
            tolerance = subject.tolerance(processed, alone.mm_embedding.dtype)
            found = compare(completion.mm_embedding, alone.mm_embedding, tolerance=tolerance, items=spans)
            assert found.ok, f"in a batch of {len(batch)}: {found.explain()}"
        ran.append(len(batch))

    check()
    record_property("requests", sum(ran))
