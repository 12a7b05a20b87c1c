"""The models' YAML files, and what a wrong one is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from harness import cases, matrix
from harness.checkpoints import recipes
from harness.matrix import SpecError
from harness.reference import ENCODERS

MODELS = matrix.load_all()


@pytest.mark.parametrize("name", MODELS)
def test_a_file_names_what_there_is(name: str) -> None:
    spec = MODELS[name]
    assert spec.recipe in recipes.NAMES
    assert spec.reference in ENCODERS
    for case in spec.cases:
        modalities = {part.modality for part in cases.parts(spec, case) if not isinstance(part, str)}
        assert modalities
        assert modalities <= spec.placeholders.keys(), case
    for difference in spec.differences:
        assert set(difference.cases) <= set(spec.cases)
        assert set(difference.suites) <= {"encoder", "preprocessing", "tokens"}
        assert difference.reason.endswith(".")
        assert difference.device in {"", "cpu", "cuda"}
    if not spec.skip:
        assert spec.gpu_memory_gb > 0


def test_every_modality_of_a_model_is_a_case() -> None:
    for spec in MODELS.values():
        used = {part.modality for case in spec.cases for part in cases.parts(spec, case) if not isinstance(part, str)}
        assert used == spec.placeholders.keys(), spec.name


def test_every_field_has_a_sentence() -> None:
    lines = (Path(matrix.__file__)).read_text().splitlines()
    for field in dataclasses.fields(matrix.ModelSpec):
        index = next(i for i, line in enumerate(lines) if line.startswith(f"    {field.name}: "))
        assert lines[index + 1].startswith('    """'), field.name


GOOD = """
hub_id: a/b
architecture: C
recipe: qwen3_vl
placeholders: {image: x}
cases: [image]
"""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- a", r"bad.yaml must be a mapping"),
        ("a: [", r"bad.yaml is not YAML"),
        (GOOD + "colour: red", r"bad.yaml has the unknown key 'colour'"),
        (GOOD.replace("recipe: qwen3_vl", ""), r"bad.yaml lacks the key 'recipe'"),
        (GOOD + "cases: 3", r"bad.yaml: 'cases' must be a list"),
        (GOOD + "num_levels: three", r"bad.yaml: 'num_levels' must be a int"),
        (GOOD + "differences: [{suites: [encoder], cases: [image]}]", r"an entry of 'differences' must have"),
    ],
)
def test_a_wrong_file_is_told_in_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=sentence):
        matrix.load(path)


def test_a_difference_is_read(tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD + "differences: [{suites: [encoder], cases: [image], finding: x, reason: because.}]")
    assert matrix.load(path).differences == (matrix.Difference(("encoder",), ("image",), "x", "because."),)
