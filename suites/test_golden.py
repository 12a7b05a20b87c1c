"""Captured embeddings against the recorded ones: did the answer change, or its input?"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from harness import cases
from harness.goldens import GoldenError, GoldenInputs, Goldens, hash_tensors, hash_token_ids, sample_rows
from harness.pytest_plugin.subject import Subject
from suites.test_reference import check

pytestmark = pytest.mark.suite("golden")

SAMPLED_ROWS = 64
"""Rows that are kept of a checkpoint that is not embedded; of the others the norms."""


def test_golden(
    subject: Subject,
    goldens: Goldens,
    case: str,
    versions: dict[str, str],
    pytestconfig: pytest.Config,
    record_property: Callable[[str, object], None],
) -> None:
    if not subject.embedded and pytestconfig.getoption("--golden-store") is None:
        pytest.skip("goldens of a checkpoint that is not embedded are kept outside the repository: give --golden-store")
    observed = subject.observe(case)
    completion = observed.completion
    verdict, tolerance, _ = check(subject, observed)
    parts = cases.parts(subject.spec, case)
    processed = {
        f"{index}.{name}": tensor for index, item in enumerate(observed.items) for name, tensor in item.data.items()
    }
    inputs = GoldenInputs(
        prompt=cases.text(subject.spec, parts),
        media=cases.digest(parts),
        token_ids=hash_token_ids(completion.prompt_token_ids),
        weights=subject.weights_digest,
        processor=hash_tensors(processed),
    )
    rows = None
    if not subject.embedded and completion.mm_embedding is not None:
        rows = sample_rows(len(completion.mm_embedding), SAMPLED_ROWS)
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
            rows=rows,
        )
    except GoldenError as error:
        pytest.fail(str(error), pytrace=False)
    if found.comparison is not None:
        record_property("comparison", found.comparison.summary)
    if not found.ok:
        pytest.fail(found.message, pytrace=False)
