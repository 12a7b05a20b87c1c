"""PaliGemma; full size: the SigLIP tower and the 3B model's projector."""

from __future__ import annotations

import transformers

from harness.checkpoints import tokenizer as tokenizers
from harness.checkpoints.recipes.base import TEXT, Recipe


def build(full: bool) -> Recipe:
    """See the module."""
    # vLLM looks for the newline that ends a prompt by this name.
    tokenizer = tokenizers.build(["\n", "<bos>"], image_token="<image>")
    tokenizer.bos_token = "<bos>"
    # Published are 224 pixels and more, which make 256 rows or more: 100 are enough. The tower's table of positions is
    # all that depends on them.
    image_size, patch_size = (140, 14) if full else (64, 16)
    num_tokens = (image_size // patch_size) ** 2
    image_processor = transformers.SiglipImageProcessor(
        size={"height": image_size, "width": image_size}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    image_processor.image_seq_length = num_tokens
    processor = transformers.PaliGemmaProcessor(  # adds over a thousand tokens for places and segments
        image_processor=image_processor,
        tokenizer=tokenizer,
        chat_template=tokenizers.chat_template({"image": "", "image_url": ""}),  # vLLM puts the image first itself
    )
    vocabulary = -(-len(tokenizer) // 64) * 64
    hidden_size = 2048 if full else 128
    text = {
        "hidden_size": hidden_size,
        "intermediate_size": 16384,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
    }
    config = transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(
            **{**TEXT, **(text if full else {}), "vocab_size": vocabulary},
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
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
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vocab_size=vocabulary,
        projection_dim=hidden_size,
        hidden_size=hidden_size,
    )
    return Recipe(
        transformers.PaliGemmaForConditionalGeneration,
        config,
        processor,
        rename={"vision_tower.": "vision_tower.vision_model."},
    )
