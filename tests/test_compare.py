from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.compare import CEILING, Span, Tolerance, compare, float32_floor

FLOAT32 = Tolerance.float32()
SPANS = (Span("image", 0, 10, "a"), Span("image", 10, 12, "b"), Span("video", 22, 8, "c"))


def embedding(rows: int = 30, width: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


EXPECTED = embedding()
FIRST, SECOND, VIDEO = EXPECTED.split([10, 12, 8])


def explain(actual: object, failure: str, **options: object) -> str:
    comparison = compare(actual, EXPECTED, tolerance=FLOAT32, items=SPANS, **options)  # type: ignore[arg-type]
    assert not comparison.ok
    assert comparison.failure == failure
    return comparison.explain()


# In the order of the checks.


def test_equal_rows_agree() -> None:
    comparison = compare(EXPECTED, EXPECTED, tolerance=FLOAT32, items=SPANS)
    assert comparison.ok
    assert comparison.worst_relative_l2 == 0
    assert comparison.worst_cosine == pytest.approx(1)
    assert "All 30 rows agree" in comparison.explain()


def test_presence() -> None:
    assert compare(None, None, tolerance=FLOAT32).ok
    assert "missing (None), expected shape (30, 64)" in explain(None, "presence")
    assert "is a list, not a tensor" in explain(EXPECTED.tolist(), "presence")
    unexpected = compare(EXPECTED, None, tolerance=FLOAT32)
    assert unexpected.failure == "presence"
    assert "(30, 64) where none is expected" in unexpected.explain()


def test_dtype_comes_before_shape() -> None:
    assert "is bfloat16, expected float32" in explain(EXPECTED[:5].bfloat16(), "dtype")


@pytest.mark.parametrize("actual", [EXPECTED[None], EXPECTED[:, :32], EXPECTED.flatten()])
def test_shape(actual: torch.Tensor) -> None:
    text = explain(actual, "shape")
    assert f"shape {tuple(actual.shape)}, expected (30, 64)" in text
    assert "deepstack" not in text


def test_columns_that_were_not_cut() -> None:
    text = explain(torch.cat([EXPECTED, embedding(seed=1), embedding(seed=2)], dim=1), "shape")
    assert "deepstack columns were not cut: the leading 64 of 192 columns are right" in text


def test_wider_and_wrong_is_not_taken_for_a_missing_cut() -> None:
    text = explain(torch.cat([SECOND, FIRST, VIDEO], dim=0).repeat(1, 2), "shape")
    assert "deepstack" not in text
    assert "Its leading 64 columns: 22 of 30 rows are not the expected ones" in text


@pytest.mark.parametrize(
    ("actual", "says"),
    [
        (torch.cat([FIRST, VIDEO]), ["rows 10..17 equal the video's", "the second image is nowhere"]),
        (torch.cat([SECOND, VIDEO]), ["rows 0..19 equal the second image's and the video's", "first image is nowhere"]),
        (EXPECTED[:-3], ["the video lacks its rows 5..7"]),
        (EXPECTED[1:], ["equal the expected rows 1..29", "shifted by one row", "the first image lacks its row 0"]),
        (torch.cat([FIRST, FIRST, SECOND, VIDEO]), ["the first image is there 2 times"]),
        (torch.cat([EXPECTED, embedding(3, seed=1)]), ["3 rows of the embedding equal no expected row"]),
        (embedding(7, seed=1), ["no row equals an expected one"]),
        (EXPECTED[:0], ["no row equals an expected one"]),
    ],
)
def test_row_count_names_what_is_missing_or_added(actual: torch.Tensor, says: list[str]) -> None:
    text = explain(actual, "row count")
    assert f"has {len(actual)} rows, expected 30 (the first image 10, the second image 12, the video 8)" in text
    for words in says:
        assert words in text


def test_stale_embedding_of_another_length() -> None:
    text = explain(stale := embedding(12, seed=3), "row count", known={"request 7's image": stale})
    assert "rows 0..11 equal request 7's image's" in text


@pytest.mark.parametrize(
    ("actual", "says"),
    [
        (
            torch.cat([SECOND, FIRST, VIDEO]),
            ["rows 0..11 equal the second image's", "rows 12..21 equal the first image's"],
        ),
        (
            torch.cat([VIDEO, FIRST, SECOND]),
            ["rows 0..7 equal the video's", "rows 8..29 equal the first image's and the second image's"],
        ),
        (EXPECTED.roll(1, 0), ["rows 1..29 equal the expected rows 0..28", "shifted by one row"]),
        (EXPECTED.roll(-2, 0), ["rows 0..27 equal the expected rows 2..29", "shifted by 2 rows"]),
        (
            torch.cat([FIRST, FIRST, FIRST[:2], VIDEO]),
            ["rows 10..19 equal the first image's", "second image is nowhere"],
        ),
        (EXPECTED.flip(0), ["row 0 equals the expected row 29", "more blocks of rows"]),
    ],
)
def test_row_order(actual: torch.Tensor, says: list[str]) -> None:
    text = explain(actual, "row order")
    for words in says:
        assert words in text


def test_stale_item_is_named() -> None:
    stale = embedding(12, seed=3)
    known = {"an earlier image": embedding(5, seed=4), "request 7's image": stale}
    text = explain(torch.cat([FIRST, stale, VIDEO]), "row order", known=known)
    assert "12 of 30 rows are not the expected ones: rows 10..21 equal request 7's image's." in text
    assert "the second image is nowhere in the embedding" in text


def test_part_of_a_stale_item_is_named() -> None:
    stale = embedding(20, seed=3)
    text = explain(torch.cat([FIRST, stale[4:16], VIDEO]), "row order", known={"an earlier image": stale})
    assert "rows 10..21 equal rows 4..15 of an earlier image" in text


def test_known_tensors_that_cannot_match_are_passed_over() -> None:
    known = {"narrow": torch.ones(3, 8), "empty": EXPECTED[:0], "flat": torch.ones(64)}
    assert "row 3" in explain(perturb(3, 1.0), "values", known=known)


def test_broken_rows_beside_wrong_order_are_counted() -> None:
    actual = torch.cat([SECOND, FIRST, VIDEO])
    actual[29] = 7
    assert "one row of the embedding equal no expected row" in explain(actual, "row order")


def test_rounding_among_equal_rows_is_not_taken_for_wrong_order() -> None:
    """The rows of a plain image hardly differ: a row that is off may be within another row's limit."""
    expected = embedding(1).repeat(6, 1) * torch.linspace(1, 1 + 5e-5, 6)[:, None]
    actual = expected.clone()
    actual[2] *= 1 + 4e-5
    comparison = compare(actual, expected, tolerance=FLOAT32)
    assert comparison.failure == "values"
    assert comparison.worst_row == 2


def test_repeated_items_are_not_taken_for_wrong_order() -> None:
    """One image twice in a prompt: a broken row of the first is a wrong value, though the second holds it."""
    expected = torch.cat([FIRST, FIRST])
    actual = expected.clone()
    actual[3] += 1
    spans = (Span("image", 0, 10, "a"), Span("image", 10, 10, "a"))
    comparison = compare(actual, expected, tolerance=FLOAT32, items=spans)
    assert comparison.failure == "values"
    assert comparison.worst_row == 3


def perturb(row: int, size: float) -> torch.Tensor:
    actual = EXPECTED.clone()
    actual[row, 5] += size
    return actual


def test_values_say_how_many_how_far_and_where() -> None:
    actual = perturb(12, 1.0)
    actual[3:6] *= 1.01
    text = explain(actual, "values")
    assert "4 of 30 rows (13.3 %) differ; worst is row 12 (the second image): relative L2 0.1" in text
    assert "different: rows 3..5, 12" in text
    assert "median 0;" in text
    assert "tolerance: float32 rounding of 4096 additions" in text
    assert next(line.split()[0] for line in text.splitlines()[-4:]) == "12"


def test_one_broken_row_among_thousands_is_seen() -> None:
    expected = embedding(5000, 16)
    actual = expected.clone()
    actual[4321] *= 1.001
    comparison = compare(actual, expected, tolerance=FLOAT32)
    assert comparison.worst_row == 4321
    assert comparison.summary["failing_rows"] == 1
    assert comparison.summary["mean_relative_l2"] < float32_floor()


@pytest.mark.parametrize(("value", "name"), [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity")])
def test_not_finite_is_named_and_kept_out_of_json(value: float, name: str) -> None:
    actual = EXPECTED.clone()
    actual[7, 1:3] = value
    comparison = compare(actual, EXPECTED, tolerance=FLOAT32, items=SPANS)
    assert comparison.failure == "values"
    assert comparison.worst_row == 7
    assert f"{name} in row 7 (2 values)" in comparison.explain()
    json.dumps(comparison.summary, allow_nan=False)


def test_nan_where_nan_is_expected_still_fails() -> None:
    expected = EXPECTED.clone()
    expected[7] = math.nan
    assert not compare(expected, expected, tolerance=FLOAT32).ok


def test_rows_never_written_are_named() -> None:
    actual = EXPECTED.clone()
    actual[4:9] = 0
    assert "only zeros in rows 4..8: never written?" in explain(actual, "values")


def test_expected_zeros() -> None:
    zeros = torch.zeros(2, 4)
    assert compare(zeros, zeros, tolerance=FLOAT32).ok
    comparison = compare(zeros + torch.tensor([[0.0], [1e-9]]), zeros, tolerance=FLOAT32)
    assert comparison.failure == "values"
    assert comparison.worst_row == 1


def test_no_rows() -> None:
    assert compare(EXPECTED[:0], EXPECTED[:0], tolerance=FLOAT32).ok


def test_beyond_the_limit_for_order_the_text_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.compare.ORDER_ROWS", 20)
    text = explain(EXPECTED.roll(1, 0), "values")
    assert "a wrong order was not looked for" in text
    assert "expected 30" in explain(EXPECTED[:-1], "row count")


@pytest.mark.parametrize(
    ("spans", "says"),
    [
        ([Span("image", 0, 10, "a")], "cover 10 rows, expected has 30"),
        ([Span("image", 5, 25, "a")], "starts at row 5, expected 0"),
    ],
)
def test_items_must_cover_the_expected_rows(spans: list[Span], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        compare(EXPECTED, EXPECTED, tolerance=FLOAT32, items=spans)


def test_many_items_are_numbered() -> None:
    spans = [Span("image", row, 1, str(row)) for row in range(30)]
    actual = EXPECTED.clone()
    actual[11] = EXPECTED[12]
    text = compare(actual, EXPECTED, tolerance=FLOAT32, items=spans).explain()
    assert "row 11 equals image number 13's" in text
    assert "image number 12 is nowhere" in text


def test_the_first_blocks_of_rows_are_named_and_the_others_counted() -> None:
    text = explain(EXPECTED.flip(0), "row order")  # of an even number of rows none stays in its place
    assert text.count("equals the expected row") == 8
    assert "and so on in 22 more blocks of rows" in text
    nine = torch.cat([EXPECTED[:9].flip(0), EXPECTED[9:]])  # the fifth of nine rows stays: eight do not
    assert "and so on" not in explain(nine, "row order")


def test_rows_of_nothing_are_no_blocks() -> None:
    text = explain(embedding(20, seed=9), "row count")
    assert "equal no expected row" not in text
    some = torch.cat([EXPECTED[:10], embedding(5, seed=9)])
    assert "5 rows of the embedding equal no expected row" in explain(some, "row count")


def test_what_an_explanation_has_beside_its_sentences() -> None:
    """The tolerance where it decided, and a table where rows can be compared in their places."""
    agree = compare(EXPECTED, EXPECTED, tolerance=FLOAT32, items=SPANS).explain()
    values, order = explain(EXPECTED + 1, "values"), explain(EXPECTED.flip(0), "row order")
    missing, cut = explain(None, "presence"), explain(EXPECTED[:, :32], "shape")
    for text in (agree, values, order):
        assert f"tolerance: {FLOAT32.origin}" in text
    for text in (missing, cut):
        assert "tolerance" not in text
    assert "cosine" in values
    assert "cosine" not in order + missing


def test_known_rows_of_another_width_or_none_are_left_out() -> None:
    known = {"of none": EXPECTED[:0], "narrower": EXPECTED[:, :32], "another": embedding(30, seed=9)}
    assert "another" in explain(known["another"], "row order", known=known)


# Properties.


@st.composite
def prompts(draw: st.DrawFn) -> tuple[torch.Tensor, list[Span], list[int]]:
    """An embedding, its items, and another order of the items."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=2, max_size=6))
    order = draw(st.permutations(range(len(sizes))).filter(lambda order: list(order) != sorted(order)))
    modality = st.sampled_from(["image", "video", "audio"])
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    spans = [
        Span(draw(modality), start, size, str(number))
        for number, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]
    return embedding(sum(sizes), 16, draw(st.integers(0, 2**31))), spans, list(order)


@given(prompts())
@settings(deadline=None, max_examples=40)
def test_any_permutation_of_items_is_called_wrong_order(prompt: tuple[torch.Tensor, list[Span], list[int]]) -> None:
    expected, spans, order = prompt
    blocks = expected.split([span.num_rows for span in spans])
    comparison = compare(torch.cat([blocks[item] for item in order]), expected, tolerance=FLOAT32, items=spans)
    assert comparison.failure == "row order"
    text = comparison.explain()
    assert "equal" in text
    assert "nowhere" not in text
    assert "no expected row" not in text


@given(prompts(), st.data())
@settings(deadline=None, max_examples=40)
def test_any_dropped_item_is_named(prompt: tuple[torch.Tensor, list[Span], list[int]], data: st.DataObject) -> None:
    expected, spans, _ = prompt
    dropped = data.draw(st.integers(0, len(spans) - 1))
    blocks = list(expected.split([span.num_rows for span in spans]))
    del blocks[dropped]
    comparison = compare(torch.cat(blocks), expected, tolerance=FLOAT32, items=spans)
    assert comparison.failure == "row count"
    assert comparison.explain().count("is nowhere in the embedding") == 1


@given(row=st.integers(0, 29), factor=st.floats(1.5, 1e6), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_any_row_beyond_its_limit_is_found_there(row: int, factor: float, seed: int) -> None:
    expected = embedding(30, 64, seed)
    limits = FLOAT32.limits * (1 + torch.arange(30, dtype=torch.float64))
    tolerance = Tolerance(torch.float32, limits, "made up")
    direction = torch.nn.functional.normalize(embedding(1, 64, seed + 1), dim=1)[0]
    actual = expected.clone()
    actual[row] += direction * expected[row].norm() * float(limits[row]) * factor
    comparison = compare(actual, expected, tolerance=tolerance)
    assert comparison.failure == "values"
    assert comparison.worst_row == row
    assert comparison.summary["failing_rows"] == 1


@given(share=st.floats(0, 0.9), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=20)
def test_rows_within_their_limits_pass(share: float, seed: int) -> None:
    expected = embedding(30, 64, seed)
    direction = torch.nn.functional.normalize(embedding(30, 64, seed + 1), dim=1)
    actual = expected + direction * expected.norm(dim=1, keepdim=True) * FLOAT32.limits.float() * share
    assert compare(actual, expected, tolerance=FLOAT32).ok


# Tolerance.


def encoder(dtype: torch.dtype, pixels: torch.Tensor, *, reverse: bool = False) -> torch.Tensor:
    """Six residual MLP blocks in a dtype; `reverse` sums in the other order, as another implementation would."""
    generator = torch.Generator().manual_seed(7)
    state = pixels.to(dtype)
    for _ in range(6):
        up = (torch.randn(64, 128, generator=generator) / 8).to(dtype)
        down = (torch.randn(128, 64, generator=generator) / 128**0.5).to(dtype)
        step = torch.nn.functional.layer_norm(state, (64,))
        if reverse:
            half = step[:, :32] @ up[:32] + step[:, 32:] @ up[32:]
            step = (half.tanh().flip(1) @ down.flip(0)).to(dtype)
        else:
            step = (step @ up).tanh() @ down
        state = state + step
    return state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("seed", range(4))
def test_another_correct_implementation_is_within_the_measured_tolerance(dtype: torch.dtype, seed: int) -> None:
    pixels = embedding(200, 64, seed)
    truth = encoder(torch.float32, pixels)
    tolerance = Tolerance.measured(truth, encoder(dtype, pixels))
    comparison = compare(encoder(dtype, pixels, reverse=True), truth, tolerance=tolerance)
    assert comparison.ok, comparison.explain()
    assert comparison.summary["limit_used"] > 0


@pytest.mark.parametrize(
    ("dtype", "coarse"),
    [(torch.float32, torch.float16), (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float8_e4m3fn)],
)
def test_what_was_computed_one_dtype_coarser_is_found(dtype: torch.dtype, coarse: torch.dtype) -> None:
    pixels = embedding(200, 64)
    truth = encoder(torch.float32, pixels)
    tolerance = Tolerance.measured(truth, encoder(dtype, pixels))
    eight_bits = coarse == torch.float8_e4m3fn  # no arithmetic in it: only the result is rounded
    engine = truth.to(coarse) if eight_bits else encoder(coarse, pixels)
    comparison = compare(engine.to(dtype), truth, tolerance=tolerance)
    assert comparison.failure == "values"
    assert comparison.summary["failing_rows"] > 100


def test_measured_limits_follow_the_rows_and_a_lucky_row_gets_the_median() -> None:
    errors = torch.tensor([0.0, 0.001, 0.002, 0.003, 0.02])
    reference = torch.ones(5, 4) * (1 + errors[:, None])
    tolerance = Tolerance.measured(torch.ones(5, 4), reference, multiple=2)
    assert tolerance.limits.tolist() == pytest.approx([0.004, 0.004, 0.004, 0.006, 0.04], rel=1e-3)
    assert "2 x the reference's own error in float32 (median row 0.002)" in tolerance.origin


def test_no_row_is_allowed_more_than_the_ceiling() -> None:
    reference = torch.ones(5, 4)
    reference[3] = 3
    assert Tolerance.measured(torch.ones(5, 4), reference).limits[3] == CEILING


def test_floor_in_float32() -> None:
    tolerance = Tolerance.measured(EXPECTED, EXPECTED, summands=10_000)
    assert tolerance.limits.tolist() == [4 * 100 * 2**-23] * 30
    assert float32_floor(10_000) == 4 * 100 * 2**-23


@pytest.mark.parametrize(
    ("truth", "reference", "says"),
    [
        (EXPECTED, EXPECTED[:3], "two matrices of one shape"),
        (EXPECTED[0], EXPECTED[0], "two matrices of one shape"),
        (EXPECTED.bfloat16(), EXPECTED.bfloat16(), "must be float32 or float64, not bfloat16"),
        (EXPECTED, EXPECTED * math.nan, "not finite"),
        (EXPECTED, -EXPECTED, "accepts anything"),
    ],
)
def test_a_broken_yardstick_is_refused(truth: torch.Tensor, reference: torch.Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Tolerance.measured(truth, reference)


def test_a_tolerance_for_other_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="for 30 rows, expected has 10"):
        compare(FIRST, FIRST, tolerance=Tolerance.measured(EXPECTED, EXPECTED))


def test_exact() -> None:
    exact = Tolerance.exact(torch.bfloat16)
    tensor = EXPECTED.bfloat16()
    assert compare(tensor.clone(), tensor, tolerance=exact, items=SPANS).ok
    other = tensor.clone()
    other[4, 4] = torch.nextafter(other[4, 4], torch.tensor(math.inf, dtype=torch.bfloat16))
    comparison = compare(other, tensor, tolerance=exact, items=SPANS)
    assert comparison.failure == "values"
    assert comparison.worst_row == 4
    assert compare(tensor.roll(1, 0), tensor, tolerance=exact, items=SPANS).failure == "row order"
