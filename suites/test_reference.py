"""Captured embeddings against Hugging Face: the encoder, the preprocessing before it, and the tokens after it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from safetensors import safe_open

from harness import diagnose
from harness.compare import Comparison, Tolerance, compare
from harness.engine_process import Server
from harness.pytest_plugin.subject import NUM_TOKENS, Observed, Subject
from harness.reference import Encoded

Record = Callable[[str, object], None]


def check(subject: Subject, observed: Observed) -> tuple[Comparison, Tolerance, Encoded]:
    """The captured rows against the Hugging Face encoder's, which it gives too, on the inputs of vLLM's processor."""
    rows = observed.completion.mm_embedding
    tolerance = subject.tolerance(observed.items, torch.float32 if rows is None else rows.dtype)
    expected = subject.reference().encode_items(observed.items)
    items = observed.completion.mm_embedding_items or []
    covered = sum(item.num_rows for item in items) == len(expected.rows)
    comparison = compare(rows, expected.rows, tolerance=tolerance, items=items if covered else None)
    return comparison, tolerance, expected


def cause(subject: Subject, case: str) -> diagnose.Cause | None:
    """Why the captured rows are not Hugging Face's, end to end; None if they are."""
    observed, reference = subject.observe(case), subject.reference()
    rows = observed.completion.mm_embedding
    comparison, tolerance, _ = check(subject, observed)
    if not comparison.ok:
        return diagnose.of_encoder(comparison, rows, reference, observed.items, tolerance)
    processed = subject.processed(case)
    try:
        expected = reference.encode_processed(processed, observed.items).rows
    except ValueError:
        return diagnose.of_preprocessing(None, reference, observed.items, processed)
    comparison = compare(rows, expected, tolerance=tolerance, items=observed.completion.mm_embedding_items)
    return None if comparison.ok else diagnose.of_preprocessing(comparison, reference, observed.items, processed)


def fail(text: str, cause: diagnose.Cause | None, record_property: Record) -> None:
    if cause is not None:
        record_property("cause", cause.kind)
        text = f"{text}\n{cause}"
    pytest.fail(text, pytrace=False)


@pytest.mark.suite("encoder")
@pytest.mark.clause("C3", "C8")
def test_encoder(subject: Subject, case: str, record_property: Record) -> None:
    observed = subject.observe(case)
    comparison, tolerance, expected = check(subject, observed)
    record_property("comparison", comparison.summary)
    record_property("independent", subject.spec.independent)
    if not comparison.ok:
        fail(comparison.explain(), cause(subject, case), record_property)
    items = observed.completion.mm_embedding_items
    assert items is not None
    assert [(item.modality, item.num_rows) for item in items] == [
        (item.modality, item.num_embeds) for item in observed.items
    ]
    levels = observed.completion.mm_embedding_levels
    assert levels is not None
    assert len(levels) == subject.spec.num_levels == len(expected.levels)
    known = {f"deepstack level {index}": level for index, level in enumerate(expected.levels)}
    for index, (name, truth) in enumerate(known.items()):
        if levels.dtype != torch.float32:
            own = subject.reference(levels.dtype).encode_items(observed.items).levels[index]
            tolerance = Tolerance.measured(truth, own)
        found = compare(levels[index], truth, tolerance=tolerance, known=known)
        assert found.ok, f"{name}: {found.explain()}"


@pytest.mark.suite("preprocessing")
def test_preprocessing(subject: Subject, case: str, record_property: Record) -> None:
    observed, reference = subject.observe(case), subject.reference()
    try:
        expected = reference.encode_processed(subject.processed(case), observed.items).rows
    except ValueError as error:
        return fail(str(error), cause(subject, case), record_property)
    rows = observed.completion.mm_embedding
    tolerance = subject.tolerance(observed.items, torch.float32 if rows is None else rows.dtype)
    comparison = compare(rows, expected, tolerance=tolerance, items=observed.completion.mm_embedding_items)
    record_property("comparison", comparison.summary)
    if not comparison.ok:
        fail(comparison.explain(), cause(subject, case), record_property)
    return None


@pytest.mark.suite("tokens")
def test_first_tokens(subject: Subject, case: str, record_property: Record) -> None:
    if not subject.embedded or subject.spec.dtype != "float32":
        pytest.skip("greedy tokens of a bfloat16 model may differ where two logits are close")
    processed = subject.processed(case)
    try:
        expected = subject.reference().generate(processed, NUM_TOKENS)
    except ValueError as error:
        pytest.fail(f"Hugging Face's model does not take the prompt: {error}", pytrace=False)
    found = subject.observe(case).completion.token_ids[: len(expected)]
    if found != expected:
        with safe_open(subject.path / "model.safetensors", "pt") as file:
            names = list(file.keys())
        why = (
            cause(subject, case)
            or diagnose.of_attention(found, subject.reference(), processed)
            or diagnose.of_tokens(names, *subject.engine().call(parameters))
        )
        fail(f"vLLM's tokens are not Hugging Face's: {found}, expected {expected}", why, record_property)


def parameters(server: Server) -> tuple[list[str], dict[str, list[str]]]:
    """Names of the parameters and buffers of vLLM's model, and its packed modules."""
    model = server.engine.llm_engine.model_executor.driver_worker.get_model()
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    return names, {name: list(parts) for name, parts in getattr(model, "packed_modules_mapping", {}).items()}
