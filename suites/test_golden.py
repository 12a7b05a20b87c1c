"""Captured embeddings against the recorded ones: did the answer change, or its input?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest

from harness import cases
from harness.goldens import GoldenError, GoldenInputs, Goldens, hash_tensors, hash_token_ids
from harness.pytest_plugin.subject import Subject
from suites.test_reference import check

pytestmark = pytest.mark.suite("golden")


def test_golden(
    subject: Subject,
    goldens: Goldens,
    case: str,
    versions: dict[str, str],
    pytestconfig: pytest.Config,
    record_property: Callable[[str, object], None],
) -> None:
    if not subject.embedded:
        pytest.skip("goldens are of the embedded checkpoints, in float32")
    observed = subject.observe(case)
    completion = observed.completion
    verdict, tolerance = check(subject, observed)
    parts = cases.parts(subject.spec, case)
    processed = {
        f"{index}.{name}": tensor for index, item in enumerate(observed.items) for name, tensor in item.data.items()
    }
    weights = hashlib.sha256((subject.path / "model.safetensors").read_bytes()).hexdigest()
    inputs = GoldenInputs(
        prompt=cases.text(subject.spec, parts),
        media=cases.digest(parts),
        token_ids=hash_token_ids(completion.prompt_token_ids),
        weights=weights,
        processor=hash_tensors(processed),
    )
    try:
        found = goldens.verify(
            case,
            completion.mm_embedding,
            inputs=inputs,
            items=completion.mm_embedding_items or [],
            tolerance=tolerance,
            reference_ok=verdict,
            versions=versions,
            update=pytestconfig.getoption("--golden-update"),
        )
    except GoldenError as error:
        pytest.fail(str(error), pytrace=False)
    if found.comparison is not None:
        record_property("comparison", found.comparison.summary)
    if not found.ok:
        pytest.fail(found.message, pytrace=False)
