"""Qwen2-VL; full size: the 2B model's dimensions."""

from __future__ import annotations

import transformers

from harness.checkpoints import processors
from harness.checkpoints.recipes.base import TEXT, Recipe

_2B = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "head_dim": 128,
}


def build(full: bool) -> Recipe:
    """See the module."""
    size = {"shortest_edge": 28 * 28, "longest_edge": 256 * 256}  # from one token to 81
    processor = processors.qwen_vl(transformers.Qwen2VLProcessor, size=size)
    tokenizer = processor.tokenizer
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24] if full else [4, 6, 6]}
    vision = {
        "depth": 32 if full else 3,
        "embed_dim": 1280 if full else 64,
        "hidden_size": 1536 if full else 128,  # of its output
        "num_heads": 16 if full else 4,
        "mlp_ratio": 4 if full else 2,
    }
    config = transformers.Qwen2VLConfig(
        text_config={
            **(TEXT | _2B if full else TEXT),
            "rope_parameters": rope,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config=vision,
        **processors.qwen_token_ids(tokenizer),
        tie_word_embeddings=full,
    )
    return Recipe(transformers.Qwen2VLForConditionalGeneration, config, processor)
