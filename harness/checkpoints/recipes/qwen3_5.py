"""Qwen3.5: Qwen3-VL's tower without deepstack, and linear attention; full size: the 4B model's dimensions."""

from __future__ import annotations

import transformers

from harness.checkpoints import processors
from harness.checkpoints.recipes.base import TEXT, Recipe

_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9216,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}

# vLLM's kernels of linear attention on the CPU know heads of 128 only, the default. A block of the prefix cache must
# hold a layer's whole state: keys and values this wide make one of 128 tokens enough, as in the other models.
_TINY = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
}


def build(full: bool) -> Recipe:
    """See the module."""
    size = {"shortest_edge": 32 * 32, "longest_edge": 256 * 256}  # from one token to 64
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = processors.qwen_vl(
        transformers.Qwen3VLProcessor, transformers.Qwen3VLVideoProcessor, patch_size=16, size=size, **half
    )
    tokenizer = processor.tokenizer
    rope = {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10] if full else [6, 5, 5],
        "mrope_interleaved": True,
    }
    vision = {
        "depth": 24 if full else 4,
        "hidden_size": 1024 if full else 64,
        "num_heads": 16 if full else 4,
        "intermediate_size": 4096 if full else 128,
        "out_hidden_size": 2560 if full else 128,
        "num_position_embeddings": 2304 if full else 256,
    }
    text = TEXT | (_4B if full else _TINY)
    config = transformers.Qwen3_5Config(
        text_config={
            **text,
            "num_hidden_layers": len(text["layer_types"]),
            "rope_parameters": rope,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config=vision,
        **processors.qwen_token_ids(tokenizer),
        tie_word_embeddings=full,
    )
    return Recipe(transformers.Qwen3_5ForConditionalGeneration, config, processor)
