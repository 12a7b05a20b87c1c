"""Qwen2-VL; full size: the 2B model's dimensions."""

from __future__ import annotations

import transformers

from harness.checkpoints import tokenizer as tokenizers
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
    names = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    }
    tokenizer = tokenizers.build(**names)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
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
        image_token_id=ids["image_token"],
        video_token_id=ids["video_token"],
        vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
        tie_word_embeddings=full,
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 256 * 256}  # from one token to 81
    processor = transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(size=size),
        chat_template=tokenizers.chat_template(
            {
                "image": "<|vision_start|><|image_pad|><|vision_end|>",
                "image_url": "<|vision_start|><|image_pad|><|vision_end|>",
                "video": "<|vision_start|><|video_pad|><|vision_end|>",
            }
        ),
    )
    return Recipe(transformers.Qwen2VLForConditionalGeneration, config, processor)
