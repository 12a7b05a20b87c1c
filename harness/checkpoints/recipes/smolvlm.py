"""SmolVLM, which is Idefics3 with more patches a row and videos; full size: the 2.2B model's dimensions."""

from __future__ import annotations

import transformers

from harness.checkpoints import processors
from harness.checkpoints.recipes.base import Recipe
from harness.checkpoints.recipes.idefics3 import PATCH_SIZE, configuration

_2B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 64,
}


def build(full: bool) -> Recipe:
    """See the module."""
    tile, scale = (384, 3) if full else (84, 3)
    processor = processors.idefics3(
        transformers.SmolVLMProcessor,
        transformers.SmolVLMImageProcessor,
        transformers.SmolVLMVideoProcessor,
        tile=tile,
        longest_edge=tile if full else 2 * tile,  # one tile of full size has 81 rows: no more are needed
        rows_of_a_tile=(tile // PATCH_SIZE) ** 2 // scale**2,
    )
    settings = configuration(_2B if full else None, processor.tokenizer, tile, scale)
    return Recipe(transformers.SmolVLMForConditionalGeneration, transformers.SmolVLMConfig(**settings), processor)
