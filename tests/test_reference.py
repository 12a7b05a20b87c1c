"""The Hugging Face side: what it makes of the inputs that families hand over in their own ways."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from harness.observe import ProcessedItem
from harness.reference import Encoded, Reference, omni


def fake(encode: Any, num_levels: int = 0) -> Any:
    """A reference without a model."""
    reference = Reference.__new__(Reference)
    reference.dtype, reference.num_levels, reference._encode = torch.float32, num_levels, encode
    return reference


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
