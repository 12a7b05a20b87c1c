"""LLaVA-1.5; full size: the 7B model's CLIP tower and projector."""

from __future__ import annotations

import transformers

from harness.checkpoints import tokenizer as tokenizers
from harness.checkpoints.recipes.base import TEXT, Recipe


def build(full: bool) -> Recipe:
    """See the module."""
    tokenizer = tokenizers.build(image_token="<image>")
    # Published are 336 pixels, which make 576 rows an image: 100 are enough. The tower's table of positions is all that
    # depends on them.
    image_size, patch_size = (140, 14) if full else (64, 16)
    text = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
    }
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(
            **{**TEXT, **(text if full else {})}, eos_token_id=tokenizer.eos_token_id, bos_token_id=None
        ),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=1024 if full else 64,
            intermediate_size=4096 if full else 128,
            num_hidden_layers=24 if full else 4,
            num_attention_heads=16 if full else 4,
            projection_dim=768 if full else 64,
            image_size=image_size,
            patch_size=patch_size,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(image_size // patch_size) ** 2,
    )
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
        ),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizers.chat_template({"image": "<image>", "image_url": "<image>"}),
    )
    return Recipe(
        transformers.LlavaForConditionalGeneration,
        config,
        processor,
        rename={"vision_tower.": "vision_tower.vision_model."},
    )
