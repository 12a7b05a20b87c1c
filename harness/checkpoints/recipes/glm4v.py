"""GLM-4.1V; full size: the 9B model's dimensions."""

from __future__ import annotations

import transformers

from harness.checkpoints import tokenizer as tokenizers
from harness.checkpoints.recipes.base import TEXT, Recipe

_9B = {
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
}


def build(full: bool) -> Recipe:
    """See the module."""
    names = {"image_token": "<|image|>", "video_token": "<|video|>"}
    borders = {
        "image_start_token_id": "<|begin_of_image|>",
        "image_end_token_id": "<|end_of_image|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
    }
    tokenizer = tokenizers.build(["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", *borders.values()], **names)
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [8, 12, 12] if full else [2, 3, 3],
    }
    vision = {
        "depth": 24 if full else 3,
        "hidden_size": 1536 if full else 64,
        "num_heads": 12 if full else 4,
        "image_size": 336 if full else 112,  # of the position embeddings
        "out_hidden_size": 4096 if full else 128,
        "intermediate_size": 13696 if full else 256,
    }
    config = transformers.Glm4vConfig(
        text_config={
            **(TEXT | _9B if full else TEXT),
            # As published. Hugging Face's model has the biases of q, k and v without it too; vLLM's would drop them.
            "attention_bias": True,
            "rope_parameters": rope,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids(names["image_token"]),
        video_token_id=tokenizer.convert_tokens_to_ids(names["video_token"]),
        tie_word_embeddings=False,
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in borders.items()},
    )
    # Of two frames, which an image counts as: from 9 tokens, as published, to 81.
    size = {"shortest_edge": 112 * 112, "longest_edge": 2 * 256 * 256}
    processor = transformers.Glm4vProcessor(
        image_processor=transformers.Glm4vImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=transformers.Glm4vVideoProcessor(size=size),
        chat_template=tokenizers.chat_template(
            {
                "image": "<|begin_of_image|><|image|><|end_of_image|>",
                "image_url": "<|begin_of_image|><|image|><|end_of_image|>",
                "video": "<|begin_of_video|><|video|><|end_of_video|>",
            }
        ),
    )
    return Recipe(transformers.Glm4vForConditionalGeneration, config, processor)
