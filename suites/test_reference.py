"""Captured embeddings against Hugging Face: the encoder, the preprocessing before it, and the tokens after it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from safetensors import safe_open

from harness import cases, diagnose
from harness.compare import Comparison, Tolerance, compare
from harness.engine_process import Server
from harness.pytest_plugin.subject import NUM_TOKENS, Observed, Subject

Record = Callable[[str, object], None]


def check(subject: Subject, observed: Observed) -> tuple[Comparison, Tolerance]:
    """The captured rows against the Hugging Face encoder's on the inputs that vLLM's processor made."""
    rows = observed.completion.mm_embedding
    tolerance = subject.tolerance(observed.items, torch.float32 if rows is None else rows.dtype)
    expected = subject.reference().encode_items(observed.items).rows
    return compare(rows, expected, tolerance=tolerance, items=observed.completion.mm_embedding_items), tolerance


@pytest.mark.suite("encoder")
@pytest.mark.clause("C3", "C8")
def test_encoder(subject: Subject, case: str, record_property: Record) -> None:
    observed = subject.observe(case)
    comparison, tolerance = check(subject, observed)
    record_property("comparison", comparison.summary)
    record_property("independent", subject.spec.independent)
    rows, items = observed.completion.mm_embedding, observed.completion.mm_embedding_items
    if rows is not None and not comparison.ok:
        cause = diagnose.of_encoder(comparison, rows, subject.reference(), observed.items, tolerance)
        record_property("cause", cause.kind)
        pytest.fail(f"{comparison.explain()}\n{cause}", pytrace=False)
    assert comparison.ok, comparison.explain()
    assert items is not None
    assert [(item.modality, item.num_rows) for item in items] == [
        (item.modality, item.num_embeds) for item in observed.items
    ]
    levels = observed.completion.mm_embedding_levels
    expected = subject.reference().encode_items(observed.items).levels
    assert levels is not None
    assert len(levels) == subject.spec.num_levels == len(expected)
    if levels.dtype == torch.float32:
        known = {f"deepstack level {index}": level for index, level in enumerate(expected)}
        for level, (name, truth) in zip(levels, known.items(), strict=True):
            found = compare(level, truth, tolerance=tolerance, known=known)
            assert found.ok, f"{name}: {found.explain()}"


@pytest.mark.suite("preprocessing")
def test_preprocessing(subject: Subject, case: str, record_property: Record) -> None:
    observed = subject.observe(case)
    parts, reference = cases.parts(subject.spec, case), subject.reference()
    processed = reference.process(cases.text(subject.spec, parts), cases.media(parts))
    try:
        expected = reference.encode_processed(processed, observed.items).rows
    except ValueError as error:
        cause = diagnose.of_preprocessing(None, reference, observed.items, processed)
        record_property("cause", cause.kind)
        pytest.fail(f"{error}\n{cause}", pytrace=False)
    rows = observed.completion.mm_embedding
    tolerance = subject.tolerance(observed.items, torch.float32 if rows is None else rows.dtype)
    comparison = compare(rows, expected, tolerance=tolerance, items=observed.completion.mm_embedding_items)
    record_property("comparison", comparison.summary)
    if not comparison.ok:
        cause = diagnose.of_preprocessing(comparison, reference, observed.items, processed)
        record_property("cause", cause.kind)
        pytest.fail(f"{comparison.explain()}\n{cause}", pytrace=False)


@pytest.mark.suite("tokens")
def test_first_tokens(subject: Subject, case: str, record_property: Record) -> None:
    if not subject.embedded or subject.spec.dtype != "float32":
        pytest.skip("greedy tokens of a bfloat16 model may differ where two logits are close")
    parts, reference = cases.parts(subject.spec, case), subject.reference()
    processed = reference.process(cases.text(subject.spec, parts), cases.media(parts))
    try:
        expected = reference.generate(processed, NUM_TOKENS)
    except ValueError as error:
        pytest.fail(f"Hugging Face's model does not take the prompt: {error}", pytrace=False)
    found = subject.observe(case).completion.token_ids[: len(expected)]
    if found != expected:
        with safe_open(subject.path / "model.safetensors", "pt") as file:
            checkpoint = list(file.keys())
        cause = diagnose.of_tokens(checkpoint, *subject.engine().call(parameters))
        record_property("cause", cause.kind)
        pytest.fail(f"vLLM's tokens are not Hugging Face's: {found}, expected {expected}\n{cause}", pytrace=False)


def parameters(server: Server) -> tuple[list[str], dict[str, list[str]]]:
    """Names of the parameters and buffers of vLLM's model, and its packed modules."""
    model = server.engine.llm_engine.model_executor.driver_worker.get_model()
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    return names, {name: list(parts) for name, parts in getattr(model, "packed_modules_mapping", {}).items()}
