"""The Hugging Face side: what it makes of the inputs that families hand over in their own ways."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.observe import ProcessedItem
from harness.reference import Encoded, Reference, encoder_tensors, omni


def fake(encode: Any, num_levels: int = 0) -> Any:
    """A reference without a model."""
    reference = Reference.__new__(Reference)
    reference.dtype, reference.num_levels, reference._encode = torch.float32, num_levels, encode
    reference.device = torch.device("cpu")
    return reference


class Parts(torch.nn.Module):
    """A module of these children, each of one weight, or of others."""

    def __init__(self, *weights: str, **children: torch.nn.Module) -> None:
        super().__init__()
        for name in weights:
            self.add_module(name, torch.nn.Linear(1, 1))
        for name, child in children.items():
            self.add_module(name, child)


@pytest.mark.parametrize(
    ("model", "encoder"),
    [
        pytest.param(
            Parts("lm_head", model=Parts("vision_tower", "projector", "language_model")),
            {"model.vision_tower", "model.projector"},
            id="most families",
        ),
        pytest.param(
            Parts("lm_head", model=Parts("vision_model", "connector", "text_model")),
            {"model.vision_model", "model.connector"},
            id="Idefics3",
        ),
        pytest.param(Parts("lm_head", "visual", "audio_tower", "model"), {"visual", "audio_tower"}, id="omni"),
    ],
)
def test_the_encoder_is_all_but_the_language_model(model: torch.nn.Module, encoder: set[str]) -> None:
    wanted = {id(tensor) for tensor in encoder_tensors(model)}
    found = {name.rpartition(".")[0] for name, tensor in model.named_parameters() if id(tensor) in wanted}
    assert found == encoder


def test_a_weight_beside_the_encoder_goes_with_it() -> None:
    inner = Parts("vision_tower", "language_model")
    inner.image_newline = torch.nn.Parameter(torch.zeros(3))
    assert any(tensor is inner.image_newline for tensor in encoder_tensors(Parts(model=inner)))


def test_items_without_levels_have_zeros() -> None:
    def encode(_reference: Reference, modality: str, _inputs: object) -> Encoded:
        return Encoded(torch.ones(2, 4), torch.ones(3 if modality == "image" else 0, 2, 4))

    reference = fake(encode, num_levels=3)
    image, audio = ProcessedItem("image", 2, {}), ProcessedItem("audio", 2, {})
    assert reference.encode_items([audio]).levels.shape == (3, 2, 4)
    mixed = reference.encode_items([image, audio]).levels
    assert mixed.shape == (3, 4, 4)
    assert mixed[:, :2].all()
    assert not mixed[:, 2:].any()


def test_packed_audio_is_a_batch_of_one_without_padding() -> None:
    found: dict[str, Tensor] = {}

    def get_audio_features(input_features: Tensor, feature_attention_mask: Tensor) -> Tensor:
        found.update(input_features=input_features, feature_attention_mask=feature_attention_mask)
        return torch.zeros(5, 4)

    reference = fake(omni)
    reference.model = SimpleNamespace(get_audio_features=get_audio_features)
    reference.encode(
        "audio", {"input_audio_features": torch.ones(128, 20), "feature_attention_mask": torch.ones(1, 30)}
    )
    assert found["input_features"].shape == (1, 128, 20)
    assert found["feature_attention_mask"].shape == (1, 20)
    assert found["feature_attention_mask"].all()
