"""LLaVA-NeXT: a family that no file of the matrix is of, for the tests of what is then found in a checkpoint."""

from __future__ import annotations

import transformers

from harness.checkpoints import tokenizer as tokenizers
from harness.checkpoints.recipes.base import TEXT, Recipe


def build(_full: bool) -> Recipe:
    """See the module."""
    tokenizer = tokenizers.build(image_token="<image>")
    image_size, patch_size = 64, 16
    pinpoints = [[image_size, 2 * image_size], [2 * image_size, image_size]]
    config = transformers.LlavaNextConfig(
        text_config=transformers.LlamaConfig(**TEXT, eos_token_id=tokenizer.eos_token_id, bos_token_id=None),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            projection_dim=64,
            image_size=image_size,
            patch_size=patch_size,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(image_size // patch_size) ** 2,
        image_grid_pinpoints=pinpoints,
    )
    processor = transformers.LlavaNextProcessor(
        image_processor=transformers.LlavaNextImageProcessor(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            image_grid_pinpoints=pinpoints,
        ),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizers.chat_template({"image": "<image>", "image_url": "<image>"}),
    )
    rename = {"vision_tower.": "vision_tower.vision_model."}
    return Recipe(transformers.LlavaNextForConditionalGeneration, config, processor, rename)
