"""Pixtral in transformers' own format, which is LLaVA with a Pixtral tower; full size: the 12B model's dimensions."""

from __future__ import annotations

import transformers

from harness.checkpoints import tokenizer as tokenizers
from harness.checkpoints.recipes.base import TEXT, Recipe
from harness.checkpoints.recipes.mistral3 import TOKENS

LONGEST_EDGE = 160
"""Pixels, also in full size: few rows an image. The tower's rotary embedding has no weights that depend on it."""


def build(full: bool) -> Recipe:
    """See the module."""
    tokenizer = tokenizers.build(TOKENS)
    vision = {
        "model_type": "pixtral",
        "hidden_size": 1024 if full else 64,
        "num_hidden_layers": 24 if full else 3,
        "num_attention_heads": 16 if full else 4,
        "intermediate_size": 4096 if full else 128,
        "image_size": LONGEST_EDGE,
        "patch_size": 16,
        "hidden_act": "silu",
    }
    published = {
        "hidden_size": 5120,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    config = transformers.LlavaConfig(
        text_config={
            **TEXT,
            **(published if full else {}),
            "model_type": "mistral",
            "eos_token_id": tokenizer.eos_token_id,
            "sliding_window": None,
        },
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        image_seq_length=1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    processor = transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessor(
            size={"longest_edge": LONGEST_EDGE}, patch_size={"height": 16, "width": 16}
        ),
        tokenizer=tokenizer,
        patch_size=16,
        chat_template=tokenizers.chat_template({"image": "[IMG]", "image_url": "[IMG]"}),
    )
    return Recipe(transformers.LlavaForConditionalGeneration, config, processor)
