"""Gemma 3; full size: the SigLIP tower and the 4B model's projector."""

from __future__ import annotations

import transformers
from transformers.image_utils import PILImageResampling

from harness.checkpoints import tokenizer as tokenizers
from harness.checkpoints.recipes.base import TEXT, Recipe


def build(full: bool) -> Recipe:
    """See the module."""
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    # vLLM looks for newlines by these names, and takes two that meet for a longer one, as the published tokenizer does.
    newlines = ["\n" * number for number in range(1, 5)]
    tokenizer = tokenizers.build(newlines, **names)
    # Published are 896 pixels and 256 rows an image: 64 are enough. The tower's table of positions is all that
    # depends on them.
    image_size, patch_size, num_tokens = (448, 14, 64) if full else (64, 8, 16)
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 1024,
    }
    small = {"query_pre_attn_scalar": 32, "sliding_window": 64}
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(
            **{**TEXT, **(text if full else small)},
            layer_types=["sliding_attention", "full_attention"],
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        ),
        vision_config=transformers.SiglipVisionConfig(
            hidden_size=1152 if full else 64,
            intermediate_size=4304 if full else 128,
            num_hidden_layers=27 if full else 4,
            num_attention_heads=16 if full else 4,
            image_size=image_size,
            patch_size=patch_size,
            vision_use_head=False,
        ),
        mm_tokens_per_image=num_tokens,
        boi_token_index=tokenizer.convert_tokens_to_ids(names["boi_token"]),
        eoi_token_index=tokenizer.convert_tokens_to_ids(names["eoi_token"]),
        image_token_index=tokenizer.convert_tokens_to_ids(names["image_token"]),
    )
    processor = transformers.Gemma3Processor(
        # Published is bilinear, which gives other pixels on a CPU without AVX2: torchvision 0.28 resizes in float32
        # there, and not in uint8 (transforms/v2/functional/_geometry.py:275). A golden must hold on both.
        image_processor=transformers.Gemma3ImageProcessor(
            size={"height": image_size, "width": image_size}, resample=PILImageResampling.BICUBIC
        ),
        tokenizer=tokenizer,
        image_seq_length=num_tokens,
        chat_template=tokenizers.chat_template({"image": names["boi_token"], "image_url": names["boi_token"]}),
    )
    return Recipe(
        transformers.Gemma3ForConditionalGeneration,
        config,
        processor,
        rename={"vision_tower.": "vision_tower.vision_model."},
    )
