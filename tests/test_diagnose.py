"""Which part is named for a difference, on tensors made here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from harness.compare import Comparison
from harness.diagnose import Cause, of_attention, of_preprocessing, of_tokens
from harness.observe import ProcessedItem
from harness.reference import Reference


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
