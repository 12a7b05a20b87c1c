"""Qwen2.5-VL, whose tower attends in windows; full size: the 3B model's dimensions."""

from __future__ import annotations

import transformers

from harness.checkpoints import processors
from harness.checkpoints.recipes.base import TEXT, Recipe

_3B = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
}


def build(full: bool) -> Recipe:
    """See the module."""
    size = {"shortest_edge": 28 * 28, "longest_edge": 256 * 256}  # from one token to 81
    processor = processors.qwen_vl(transformers.Qwen2_5_VLProcessor, size=size)
    tokenizer = processor.tokenizer
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24] if full else [4, 6, 6]}
    vision = {
        "depth": 32 if full else 4,
        "hidden_size": 1280 if full else 64,
        "intermediate_size": 3420 if full else 128,
        "num_heads": 16 if full else 4,
        "out_hidden_size": 2048 if full else 128,
        "window_size": 112 if full else 56,  # two by two tokens, so that small images have several windows
        "fullatt_block_indexes": [7, 15, 23, 31] if full else [1, 3],
        "tokens_per_second": 2,
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **(TEXT | _3B if full else TEXT),
            "rope_parameters": rope,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config=vision,
        **processors.qwen_token_ids(tokenizer),
        tie_word_embeddings=full,
    )
    return Recipe(transformers.Qwen2_5_VLForConditionalGeneration, config, processor)
