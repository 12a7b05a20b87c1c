"""Mistral 3: a Pixtral tower, and four patches a row; full size: the dimensions of Mistral Small 3.1."""

from __future__ import annotations

from typing import Any

import transformers

from harness.checkpoints import processors
from harness.checkpoints.recipes.base import TEXT, Recipe

LONGEST_EDGE = 224
"""Pixels, also in full size: few rows an image. The tower's rotary embedding has no weights that depend on it."""

_24B = {
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def build(full: bool) -> Recipe:
    """See the module."""
    processor = processors.pixtral(longest_edge=LONGEST_EDGE, patch_size=14, spatial_merge_size=2)
    tokenizer = processor.tokenizer
    config = transformers.Mistral3Config(
        text_config={
            **TEXT,
            **(_24B if full else {}),
            "model_type": "mistral",
            "eos_token_id": tokenizer.eos_token_id,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
        vision_config=tower(full, LONGEST_EDGE, patch_size=14),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return Recipe(transformers.Mistral3ForConditionalGeneration, config, processor)


def tower(full: bool, longest_edge: int, patch_size: int) -> dict[str, Any]:
    """Configuration of a Pixtral tower."""
    return {
        "model_type": "pixtral",
        "hidden_size": 1024 if full else 64,
        "num_hidden_layers": 24 if full else 3,
        "num_attention_heads": 16 if full else 4,
        "intermediate_size": 4096 if full else 128,
        "image_size": longest_edge,
        "patch_size": patch_size,
        "hidden_act": "silu",
    }
