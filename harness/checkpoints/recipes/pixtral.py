"""Pixtral in transformers' own format, which is LLaVA with a Pixtral tower; full size: the 12B model's dimensions."""

from __future__ import annotations

import transformers

from harness.checkpoints import processors
from harness.checkpoints.recipes.base import TEXT, Recipe
from harness.checkpoints.recipes.mistral3 import tower

LONGEST_EDGE = 160
"""Pixels, also in full size: few rows an image. The tower's rotary embedding has no weights that depend on it."""

_12B = {
    "hidden_size": 5120,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def build(full: bool) -> Recipe:
    """See the module."""
    processor = processors.pixtral(longest_edge=LONGEST_EDGE, patch_size=16)
    tokenizer = processor.tokenizer
    config = transformers.LlavaConfig(
        text_config={
            **TEXT,
            **(_12B if full else {}),
            "model_type": "mistral",
            "eos_token_id": tokenizer.eos_token_id,
            "sliding_window": None,
        },
        vision_config=tower(full, LONGEST_EDGE, patch_size=16),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        image_seq_length=1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return Recipe(transformers.LlavaForConditionalGeneration, config, processor)
