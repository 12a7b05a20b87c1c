"""Captured embeddings against the Hugging Face encoder: same checkpoint, same processed inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness import cases, observe
from harness.compare import Comparison, Tolerance, compare
from harness.engine import Completion
from harness.pytest_plugin.subject import Subject
from harness.reference import Reference

pytestmark = pytest.mark.suite("reference")


@functools.cache  # billions of weights of a full-size model, once a session
def load(path: Path, dtype: torch.dtype) -> Reference:
    return Reference(path, dtype)


@pytest.fixture
def reference(subject: Subject) -> Reference:
    return load(subject.path, torch.float32)


def check(subject: Subject, reference: Reference, case: str) -> tuple[observe.Trace, Completion, Comparison]:
    engine = subject.engine(mm_processor_cache_gb=0.0)
    request = subject.request(*cases.CASES[case], extra_args={"return_mm_embedding_levels": True})
    [[completion]], trace = engine.call(observe.run, [request])
    rows, levels = reference.encode(trace.processed[0])
    dtype = torch.float32 if completion.mm_embedding is None else completion.mm_embedding.dtype
    if dtype == torch.float32:
        tolerance = Tolerance.float32()
    else:
        tolerance = Tolerance.measured(rows, load(subject.path, dtype).encode(trace.processed[0])[0])
    comparison = compare(completion.mm_embedding, rows, tolerance=tolerance, items=completion.mm_embedding_items)
    if comparison.ok and dtype == torch.float32:
        assert completion.mm_embedding_levels is not None
        known = {f"deepstack level {index}": level for index, level in enumerate(levels)}
        for level, (name, expected) in zip(completion.mm_embedding_levels, known.items(), strict=True):
            found = compare(level, expected, tolerance=tolerance, known=known)
            assert found.ok, f"{name}: {found.explain()}"
    return trace, completion, comparison


@pytest.mark.clause("C3", "C8")
def test_encoder(
    subject: Subject, reference: Reference, case: str, record_property: Callable[[str, object], None]
) -> None:
    trace, completion, comparison = check(subject, reference, case)
    record_property("comparison", comparison.summary)
    assert comparison.ok, comparison.explain()
    items = completion.mm_embedding_items
    assert items is not None
    assert [item.num_rows for item in items] == [item.num_embeds for item in trace.processed[0]]


def test_first_tokens(subject: Subject, reference: Reference) -> None:
    if not subject.embedded:
        pytest.skip("greedy tokens of a bfloat16 model may differ where two logits are close")
    parts = cases.CASES["image"]
    completion = subject.engine(mm_processor_cache_gb=0.0).generate(
        subject.request(*parts, max_tokens=6, ignore_eos=True)
    )[0][0]
    media = {"image": [part.content for part in parts if not isinstance(part, str)]}
    expected = reference.generate(cases.text(subject.spec, parts), media, 6)
    assert completion.token_ids[: len(expected)] == expected, "vLLM's tokens are not Hugging Face's"
