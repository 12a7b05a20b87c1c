"""SmolVLM, which is Idefics3 with more patches a row and videos; full size: the 2.2B model's dimensions."""

from __future__ import annotations

import transformers

from harness.checkpoints import tokenizer as tokenizers
from harness.checkpoints.recipes.base import TEXT, Recipe
from harness.checkpoints.recipes.idefics3 import TOKENS


def build(full: bool) -> Recipe:
    """See the module."""
    tokenizer = tokenizers.build([*TOKENS, "<video>"])
    tile, patch, scale = (384, 14, 3) if full else (84, 14, 3)
    vision = {
        "hidden_size": 1152 if full else 64,
        "num_hidden_layers": 27 if full else 3,
        "num_attention_heads": 16 if full else 4,
        "intermediate_size": 4304 if full else 128,
        "image_size": tile,
        "patch_size": patch,
    }
    published = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 64,
    }
    config = transformers.SmolVLMConfig(
        text_config={
            **TEXT,
            **(published if full else {}),
            "model_type": "llama",
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=scale,
    )
    # The longest edge is scaled to this many tiles, also up. One of full size has 81 rows: no more are needed.
    size = {"size": {"longest_edge": tile if full else 2 * tile}, "max_image_size": {"longest_edge": tile}}
    processor = transformers.SmolVLMProcessor(
        image_processor=transformers.SmolVLMImageProcessor(**size),
        tokenizer=tokenizer,
        video_processor=transformers.SmolVLMVideoProcessor(**size),
        image_seq_len=(tile // patch) ** 2 // scale**2,
        chat_template=tokenizers.chat_template({"image": "<image>", "image_url": "<image>", "video": "<video>"}),
    )
    return Recipe(transformers.SmolVLMForConditionalGeneration, config, processor)
