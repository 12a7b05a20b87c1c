"""Embedded checkpoints: the same bits everywhere, complete or not there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import checkpoints, models
from harness.checkpoints import weights
from harness.reference import normalised


def test_the_generator_is_bit_stable() -> None:
    values = weights.uniform("0/model.weight", (3, 5))
    assert hashlib.sha256(values.tobytes()).hexdigest() == UNIFORM
    assert values.dtype == np.float32
    assert -1 <= values.min() < values.max() < 1
    assert not np.array_equal(values, weights.uniform("0/model.bias", (3, 5)))


def test_the_experts_of_a_layer_are_a_stack_of_matrices() -> None:
    assert weights.fan_in("conv.weight", torch.empty(8, 3, 2, 2)) == 12
    assert weights.fan_in("mlp.experts.down_proj", torch.empty(4, 8, 16)) == 16


def test_vectors_do_not_keep_what_the_model_class_drew_at_random() -> None:
    digests = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        norm, linear = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)
        weights.fill(torch.nn.Sequential(norm, linear))
        assert (norm.weight - 1).abs().max() <= 0.1
        digests.add(weights.digest(linear))
    assert len(digests) == 1


def test_a_table_that_is_the_head_too_is_small() -> None:
    table, head = torch.nn.Embedding(64, 8), torch.nn.Linear(8, 64, bias=False)
    weights.fill(torch.nn.Sequential(table, head))
    free = table.weight.std()
    head.weight = table.weight
    weights.fill(torch.nn.Sequential(table, head))
    torch.testing.assert_close(table.weight.std(), free / 5)


def test_the_checkpoint_has_the_pinned_bytes() -> None:
    folder = checkpoints.build("qwen3_vl")
    assert {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "tokenizer.json")
    } == FILES


UNIFORM = "18d24a8f0322f665f9d2b73d04459bc719c0cfb272dc28ca74b0cfb0bedd31cd"
FILES = {
    "model.safetensors": "6c42d0f6b6d469b3e80fb3fdd0944289f6a688dac2f722840af6df21b8819dd1",
    "tokenizer.json": "77ce1e62b9adf1c82e29d18a13acfa207ae1234fe3f61c4b0a8b9730cb7464c9",
}


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_recipe: str, folder: Path, _size: str, _dtype: str) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_save", full)
    monkeypatch.setenv(checkpoints.CACHE_VARIABLE, str(tmp_path))
    with pytest.raises(checkpoints.CheckpointError, match=r"No space left.*set VLLM_MM_EMBEDDING_CACHE"):
        checkpoints.build("qwen3_vl")
    assert list(tmp_path.iterdir()) == []


def test_raw_pixels_are_normalised_by_channel() -> None:
    pixels = torch.tensor([[0, 255, 51, 102]], dtype=torch.uint8)  # two channels of two values
    expected = torch.tensor([[-1.0, 1.0, -0.6, 0.2]])
    torch.testing.assert_close(normalised(pixels, [0.5, 0.5], [0.5, 0.25])[:, :2], expected[:, :2])
    torch.testing.assert_close(normalised(pixels, [0.5, 0.5], [0.5, 0.25])[:, 2:], torch.tensor([[-1.2, -0.4]]))


def test_an_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(models.UnknownModelError, match=r"no model and no folder 'qwen9': .*qwen3_vl"):
        models.find("qwen9")


def test_families_of_one_architecture_are_told_apart(tmp_path: Path) -> None:
    def family(vision_type: str) -> str:
        content = {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {"model_type": vision_type}}
        (tmp_path / "config.json").write_text(json.dumps(content))
        return models.of_checkpoint(tmp_path).name

    assert family("pixtral") == "pixtral"
    assert family("clip_vision_model") == "llava"
