"""Idefics3, whose images are always cut into tiles, a thumbnail after them; full size: the 8B model's dimensions."""

from __future__ import annotations

import transformers

from harness.checkpoints import tokenizer as tokenizers
from harness.checkpoints.recipes.base import TEXT, Recipe

TOKENS = [
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
]
"""What stands around and between the rows of an image."""


def build(full: bool) -> Recipe:
    """See the module."""
    tokenizer = tokenizers.build(TOKENS)
    tile, patch, scale = (364, 14, 2) if full else (56, 14, 2)
    vision = {
        "hidden_size": 1152 if full else 64,
        "num_hidden_layers": 27 if full else 3,
        "num_attention_heads": 16 if full else 4,
        "intermediate_size": 4304 if full else 128,
        "image_size": tile,
        "patch_size": patch,
    }
    published = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    config = transformers.Idefics3Config(
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
    processor = transformers.Idefics3Processor(
        image_processor=transformers.Idefics3ImageProcessor(
            # The longest edge is scaled to this many tiles, also up. One of full size has 169 rows: no more are needed.
            size={"longest_edge": tile if full else 3 * tile},
            max_image_size={"longest_edge": tile},
        ),
        tokenizer=tokenizer,
        image_seq_len=(tile // patch) ** 2 // scale**2,
        chat_template=tokenizers.chat_template({"image": "<image>", "image_url": "<image>"}),
    )
    return Recipe(transformers.Idefics3ForConditionalGeneration, config, processor)
