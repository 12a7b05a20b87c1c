"""InternVL in transformers' own format, whose images are cut into tiles; full size: the 1B model's dimensions."""

from __future__ import annotations

import transformers
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

from harness.checkpoints import tokenizer as tokenizers
from harness.checkpoints.recipes.base import TEXT, Recipe


def build(full: bool) -> Recipe:
    """See the module."""
    tokenizer = tokenizers.build(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    tile, patch = (448, 14) if full else (56, 14)
    rows_of_a_tile = (tile // patch // 2) ** 2
    vision = {
        "hidden_size": 1024 if full else 64,
        "num_hidden_layers": 24 if full else 3,
        "num_attention_heads": 16 if full else 4,
        "intermediate_size": 4096 if full else 128,
        "image_size": [tile, tile],
        "patch_size": [patch, patch],
        "attention_bias": True,
    }
    published = {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    config = transformers.InternVLConfig(
        text_config={
            **TEXT,
            **(published if full else {}),
            "model_type": "qwen2",
            "eos_token_id": tokenizer.eos_token_id,
            "tie_word_embeddings": False,
        },
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=rows_of_a_tile,
        tie_word_embeddings=False,
    )
    pixels = {
        "size": {"height": tile, "width": tile},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    processor = transformers.InternVLProcessor(
        # A tile of full size has 256 rows: one a picture is enough for the prompts of the suites.
        image_processor=GotOcr2ImageProcessor(crop_to_patches=True, max_patches=1 if full else 6, **pixels),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(**pixels),
        image_seq_length=rows_of_a_tile,
        chat_template=tokenizers.chat_template(
            {"image": "<IMG_CONTEXT>", "image_url": "<IMG_CONTEXT>", "video": "<video>"}
        ),
    )
    return Recipe(transformers.InternVLForConditionalGeneration, config, processor)
