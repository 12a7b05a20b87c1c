"""Idefics3, whose images are always cut into tiles, a thumbnail after them; full size: the 8B model's dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers

from harness.checkpoints import processors
from harness.checkpoints.recipes.base import TEXT, Recipe

PATCH_SIZE = 14

_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def build(full: bool) -> Recipe:
    """See the module."""
    tile, scale = (364, 2) if full else (56, 2)
    processor = processors.idefics3(
        transformers.Idefics3Processor,
        transformers.Idefics3ImageProcessor,
        tile=tile,
        longest_edge=tile if full else 3 * tile,  # one tile of full size has 169 rows: no more are needed
        rows_of_a_tile=(tile // PATCH_SIZE) ** 2 // scale**2,
    )
    settings = configuration(_8B if full else None, processor.tokenizer, tile, scale)
    return Recipe(transformers.Idefics3ForConditionalGeneration, transformers.Idefics3Config(**settings), processor)


def configuration(text: Mapping[str, int] | None, tokenizer: Any, tile: int, scale: int) -> dict[str, Any]:
    """Of the model.

    Args:
        text: the published language model's dimensions, for full size.
        tokenizer: of its processor.
        tile: side of a tile in pixels.
        scale: patches that become one row, to a side.
    """
    full = text is not None
    return {
        "text_config": {
            **TEXT,
            **(text or {}),
            "model_type": "llama",
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        "vision_config": {
            "hidden_size": 1152 if full else 64,
            "num_hidden_layers": 27 if full else 3,
            "num_attention_heads": 16 if full else 4,
            "intermediate_size": 4304 if full else 128,
            "image_size": tile,
            "patch_size": PATCH_SIZE,
        },
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "pad_token_id": tokenizer.pad_token_id,
        "scale_factor": scale,
    }
