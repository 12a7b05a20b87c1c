"""LLaVA-OneVision; full size: the SigLIP tower of all sizes and the 0.5B model's projector."""

from __future__ import annotations

import transformers

from harness.checkpoints import tokenizer as tokenizers
from harness.checkpoints.recipes.base import TEXT, Recipe


def build(full: bool) -> Recipe:
    """See the module."""
    tokenizer = tokenizers.build(image_token="<image>", video_token="<video>")
    # Published are tiles of 384 pixels, which make 729 rows each, and up to six of them a side: less is enough. The
    # tower's table of positions is all that depends on them.
    tile, patch_size = (56, 14) if full else (64, 16)
    grid = [[tile * rows, tile * columns] for rows in range(1, 4) for columns in range(1, 4)]
    grid.append([5 * tile, 5 * tile])  # more than anyres_max_9 lets through: scaled down behind the encoder
    text = {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    config = transformers.LlavaOnevisionConfig(
        text_config=transformers.Qwen2Config(
            **{**TEXT, **(text if full else {})}, eos_token_id=tokenizer.eos_token_id, bos_token_id=None
        ),
        vision_config=transformers.SiglipVisionConfig(
            hidden_size=1152 if full else 64,
            intermediate_size=4304 if full else 128,
            num_hidden_layers=26 if full else 4,
            num_attention_heads=16 if full else 4,
            image_size=tile,
            patch_size=patch_size,
            vision_use_head=False,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grid,
    )
    size = {"height": tile, "width": tile}
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grid),
        tokenizer=tokenizer,
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(tile // patch_size) ** 2,
        vision_feature_select_strategy="full",
        chat_template=tokenizers.chat_template({"image": "<image>", "image_url": "<image>", "video": "<video>"}),
    )
    return Recipe(
        transformers.LlavaOnevisionForConditionalGeneration,
        config,
        processor,
        rename={"vision_tower.": "vision_tower.vision_model."},
    )
