"""Which part is named for a difference, on tensors made here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from harness.compare import Comparison, Tolerance
from harness.diagnose import Cause, of_attention, of_encoder, of_preprocessing, of_tokens
from harness.observe import ProcessedItem
from harness.reference import Reference, normalised, prepared


def reference() -> Reference:
    half = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return cast(Reference, SimpleNamespace(dtype=torch.float32, processor=SimpleNamespace(image_processor=half)))


def cause(ours: dict[str, Tensor], theirs: dict[str, Any], modality: str = "image") -> Cause:
    different = Comparison("values", "2 of 2 rows differ.")
    return of_preprocessing(different, reference(), [ProcessedItem(modality, 4, ours)], theirs)


PIXELS = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ({"pixel_values": PIXELS}, {"pixel_values": PIXELS[:1]}, "another size or number of pieces"),
        ({"pixel_values": PIXELS}, {"pixel_values": PIXELS * 2 - 1}, "another mean or std"),
        ({"pixel_values": PIXELS}, {"pixel_values": PIXELS.flip(-1)}, "another resampling or other samples"),
        (
            {"image_grid_thw": torch.tensor([[1, 4, 6]])},
            {"image_grid_thw": torch.tensor([[1, 6, 4]])},
            "height and width are exchanged",
        ),
        (
            {"image_grid_thw": torch.tensor([[1, 4, 6]])},
            {"image_grid_thw": torch.tensor([[1, 4, 8]])},
            r"is \[\[1, 4, 6\]\] in vLLM and \[\[1, 4, 8\]\] in Hugging Face: another size",
        ),
        ({"pixel_values": PIXELS}, {"pixel_values": PIXELS.clone()}, "the same names and values"),
    ],
)
def test_processors(ours: dict[str, Tensor], theirs: dict[str, Tensor], words: str) -> None:
    found = cause(ours, theirs)
    assert found.kind == "processor"
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(found.sentence)


def test_a_length_of_audio() -> None:
    found = cause({"input_features": torch.rand(1, 8, 40)}, {"input_features": torch.rand(1, 8, 20)}, "audio")
    assert found.sentence == "input_features has shape 1x8x40 in vLLM and 1x8x20 in Hugging Face: another length"


def test_a_mask_tells_a_length_before_the_samples_do() -> None:
    short, long = torch.tensor([[1, 1, 0, 0]]), torch.tensor([[1, 1, 1, 0]])
    found = cause(
        {"input_features": torch.zeros(1, 4), "feature_attention_mask": long},
        {"input_features": torch.ones(1, 4), "feature_attention_mask": short},
        "audio",
    )
    assert found.sentence.startswith("feature_attention_mask marks other places (3 in vLLM and 2 in Hugging Face)")


def test_each_channel_may_have_its_own_mean_and_std() -> None:
    scaled = PIXELS * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1) + torch.tensor([0.0, 0.5, -0.5]).view(3, 1, 1)
    assert "another mean or std" in cause({"pixel_values": PIXELS}, {"pixel_values": scaled}).sentence


def test_raw_pixels_are_normalised_before_they_are_compared() -> None:
    raw = (PIXELS * 255).to(torch.uint8)
    theirs = (raw.float() / 255 - 0.5) / 0.5
    assert "the same names and values" in cause({"pixel_values": raw}, {"pixel_values": theirs}).sentence


@pytest.mark.parametrize("shape", [(7,), (4, 12), (4, 8), (3, 4, 4), (2, 4, 4), (2, 3, 4, 4), (2, 4, 3, 3)], ids=str)
def test_one_mean_and_std_are_told_from_other_samples(shape: tuple[int, ...]) -> None:
    theirs = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    assert "another mean or std" in cause({"values": 3 * theirs + 1}, {"values": theirs}).sentence
    assert "another resampling or other samples" in cause({"values": theirs**2}, {"values": theirs}).sentence


@pytest.mark.parametrize(
    ("shape", "factors"),
    [((4, 12), (12,)), ((3, 4, 4), (3, 1, 1)), ((2, 3, 4, 4), (3, 1, 1))],
    ids=["patches", "an image", "tiles"],
)
def test_three_channels_may_have_a_mean_and_std_each(shape: tuple[int, ...], factors: tuple[int, ...]) -> None:
    theirs = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    by_channel = torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(factors[0] // 3).view(factors)
    assert "another mean or std" in cause({"values": theirs * by_channel}, {"values": theirs}).sentence


def test_columns_that_three_does_not_divide_are_no_channels() -> None:
    theirs = torch.rand(4, 8, generator=torch.Generator().manual_seed(3))
    assert "other samples" in cause({"values": theirs * torch.arange(1, 9)}, {"values": theirs}).sentence


@pytest.mark.parametrize("count", [1, 2])
def test_two_numbers_are_no_sign_of_a_mean_and_std(count: int) -> None:
    """As the seconds of a video's frames."""
    theirs = torch.arange(1, count + 1).float()
    found = cause({"second_per_grid_ts": theirs * 2}, {"second_per_grid_ts": theirs}, "video").sentence
    assert found.startswith(f"second_per_grid_ts has the same shape and other values (100 % of them, by up to {count}")


def test_rows_in_another_order_are_no_processors_fault() -> None:
    found = of_preprocessing(Comparison("row order", "2 of 2 rows."), reference(), [], {})
    assert (found.kind, found.sentence) == ("order", "2 of 2 rows.")


def test_as_many_rows_are_not_needed_to_name_an_input() -> None:
    item = ProcessedItem("image", 4, {"pixel_values": PIXELS})
    assert "another mean or std" in of_preprocessing(None, reference(), [item], {"pixel_values": PIXELS * 2}).sentence


def test_each_modality_is_compared_with_its_own_inputs() -> None:
    """And what Hugging Face's processor has no name for, with none."""
    items = [
        ProcessedItem("image", 4, {"pixel_values": PIXELS, "of_vllm": PIXELS}),
        ProcessedItem("video", 4, {"pixel_values_videos": PIXELS}),
    ]
    theirs = {"pixel_values": PIXELS, "pixel_values_videos": PIXELS.flip(-1)}
    found = of_preprocessing(Comparison("values", "2 of 2 rows differ."), reference(), items, theirs)
    assert found.sentence.startswith("pixel_values_videos has the same shape and other values")


# --- on the same inputs ----------------------------------------------------------------------------------------------


class Encoder:
    """A reference whose rows are a linear map of the patches of images and videos, and of their height."""

    dtype = torch.float32
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]),
        video_processor=SimpleNamespace(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]),
    )

    def encode_items(self, items: list[ProcessedItem]) -> Any:
        weights = torch.rand(12, 16, generator=torch.Generator().manual_seed(4))
        rows = []
        for item in items:
            [patches] = [value for name, value in item.data.items() if not name.endswith("grid_thw")]
            height = item.data["grid_thw"][0, 1] if "grid_thw" in item.data else 0
            if height > 9:
                raise RuntimeError("it is too high")
            rows.append(prepared(cast(Reference, self), item.modality, patches) @ weights + height)
        return SimpleNamespace(rows=torch.cat(rows))


RAW = torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
IMAGES, VIDEOS = Encoder.processor.image_processor, Encoder.processor.video_processor
TOLERANCE = Tolerance(torch.float32, torch.tensor(1e-4, dtype=torch.float64), "the test's")


def with_numbers_of(processor: Any) -> Tensor:
    return normalised(RAW, processor.image_mean, processor.image_std)


def item_of(pixels: Tensor, modality: str = "image", height: int = 4, width: int = 6) -> ProcessedItem:
    name = "pixel_values_videos" if modality == "video" else "pixel_values"
    return ProcessedItem(modality, 4, {name: pixels, "grid_thw": torch.tensor([[1, height, width]])})


def encoders_cause(used: ProcessedItem, told: ProcessedItem, failure: Any = "values") -> Cause:
    """Where vLLM's encoder ran on `used`, and the reference on what it was told."""
    rows = Encoder().encode_items([used]).rows
    return of_encoder(Comparison(failure, "4 of 4 rows."), rows, cast(Reference, Encoder()), [told], TOLERANCE)


@pytest.mark.parametrize(
    ("used", "told", "words"),
    [
        (item_of(with_numbers_of(VIDEOS)), item_of(RAW), "the image with the mean and std of the video processor"),
        (
            item_of(with_numbers_of(VIDEOS)),
            item_of(with_numbers_of(IMAGES)),
            "the image with the mean and std of the video processor",
        ),
        (
            item_of(with_numbers_of(IMAGES), "video"),
            item_of(RAW, "video"),
            "the video with the mean and std of the image processor",
        ),
        (item_of(with_numbers_of(IMAGES)), item_of(RAW.float()), "leaves the image's pixels raw"),
        (item_of(RAW.float()), item_of(RAW), "the pixels of the image are not normalised"),
        (item_of(RAW / 255), item_of(RAW), "the pixels of the image are scaled to 0..1 and not normalised"),
        (item_of(RAW, height=6, width=4), item_of(RAW), "height and width of the image's grid are exchanged"),
    ],
)
def test_what_was_done_to_the_encoders_inputs(used: ProcessedItem, told: ProcessedItem, words: str) -> None:
    found = encoders_cause(used, told)
    assert found.kind == "processor"
    assert words in found.sentence


def test_nothing_that_was_done_to_the_inputs_makes_the_rows_agree() -> None:
    """An input that the encoder does not run on is passed by."""
    found = encoders_cause(item_of(RAW + 1), item_of(RAW, width=20))
    assert (found.kind, found.sentence) == (
        "encoder",
        "on the same inputs vLLM's encoder gives other rows than Hugging Face's",
    )


def test_only_the_modality_that_differs_is_named() -> None:
    told = [item_of(RAW), item_of(RAW, "video"), ProcessedItem("audio", 4, {"input_features": RAW.float()})]
    used = [told[0], item_of(RAW.float(), "video"), told[2]]
    rows = Encoder().encode_items(used).rows
    found = of_encoder(Comparison("values", ""), rows, cast(Reference, Encoder()), told, TOLERANCE)
    assert found.sentence == "the pixels of the video are not normalised"


def test_rows_that_are_not_there_or_of_another_shape_are_captures_fault() -> None:
    lost, cut = Comparison("presence", "none"), Comparison("shape", "half of them")
    for comparison, rows in ((lost, None), (cut, torch.zeros(4, 8))):
        found = of_encoder(comparison, rows, cast(Reference, Encoder()), [item_of(RAW)], TOLERANCE)
        assert (found.kind, found.sentence) == ("capture", comparison.headline)
    assert encoders_cause(item_of(RAW / 255), item_of(RAW), "row order").kind == "order"


CHECKPOINT = [f"model.layers.{index}.self_attn.{name}" for index in (0, 1) for name in ("q_proj.weight", "q_proj.bias")]
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


def test_dropped_tensors_are_named_and_counted() -> None:
    found = of_tokens(CHECKPOINT, ["language_model.layers.0.self_attn.qkv_proj.weight"], PACKED)
    assert found.kind == "language model"
    assert found.sentence.endswith("having no parameter for them: model.layers.*.self_attn.q_proj.bias (2)")


def test_packed_tensors_are_not_dropped() -> None:
    parameters = ["layers.0.self_attn.qkv_proj.weight", "layers.0.self_attn.qkv_proj.bias"]
    assert "vLLM has all the checkpoint's parameters" in of_tokens(CHECKPOINT, parameters, PACKED).sentence


class Attends:
    """A reference whose tokens are what it attends to in both directions."""

    def generate(self, inputs: dict[str, Tensor], max_new_tokens: int) -> list[int]:
        return [int(value) for value in inputs["token_type_ids"][0]][:max_new_tokens]


def attention(tokens: list[int], types: list[int]) -> Cause | None:
    return of_attention(tokens, cast(Reference, Attends()), {"token_type_ids": torch.tensor([types])})


def test_causal_attention_is_named() -> None:
    found = attention([0, 0, 0], [0, 1, 1])
    assert found is not None
    assert found.kind == "language model"
    assert "attends causally" in found.sentence
    assert attention([0, 1, 0], [0, 1, 1]) is None


def test_a_prefix_of_zeros_is_what_attends_in_both_directions() -> None:
    assert attention([1, 1, 1], [0, 0, 0]) is not None
    assert attention([0, 0, 0], [0, 0, 0]) is None


def test_a_causal_model_has_no_such_cause() -> None:
    assert of_attention([1], cast(Reference, Attends()), {}) is None
