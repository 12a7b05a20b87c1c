"""Qwen3-VL with deepstack; full size: the 4B model's dimensions."""

from __future__ import annotations

from typing import Any

import transformers

from harness.checkpoints import processors
from harness.checkpoints.recipes.base import TEXT, Recipe

_4B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": True,
}


def build(full: bool) -> Recipe:
    """See the module."""
    # Small in the tiny one, so that few tokens make a small encoder cache.
    size = {"shortest_edge": 64 * 64, "longest_edge": (2048 if full else 256) ** 2}
    # As published. Where the two differ, vLLM normalises videos with the image processor's numbers.
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = processors.qwen_vl(
        transformers.Qwen3VLProcessor, transformers.Qwen3VLVideoProcessor, patch_size=16, size=size, **half
    )
    tokenizer = processor.tokenizer
    section = [24, 20, 20] if full else [8, 4, 4]
    rope = {
        "rope_type": "default",
        "rope_theta": 5e6 if full else 1e4,
        "mrope_section": section,
        "mrope_interleaved": True,
    }
    vision = {
        "depth": 24 if full else 4,
        "hidden_size": 1024 if full else 64,
        "num_heads": 16 if full else 4,
        "intermediate_size": 4096 if full else 128,
        "out_hidden_size": 2560 if full else 128,
        "num_position_embeddings": 2304 if full else 256,
        "deepstack_visual_indexes": [5, 11, 17] if full else [0, 1, 2],
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    config = transformers.Qwen3VLConfig(
        text_config={
            **(_4B if full else {**TEXT, "num_hidden_layers": 4}),
            "rope_parameters": rope,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config=vision,
        **processors.qwen_token_ids(tokenizer),
        tie_word_embeddings=full,
    )
    return Recipe(transformers.Qwen3VLForConditionalGeneration, config, processor)
