"""A text-only model, which capture must refuse."""

from __future__ import annotations

import transformers

from harness.checkpoints import tokenizer as tokenizers
from harness.checkpoints.recipes.base import TEXT, Recipe


def build(_full: bool) -> Recipe:
    """See the module."""
    tokenizer = tokenizers.build()
    config = transformers.Qwen3Config(**{**TEXT, "num_hidden_layers": 4}, eos_token_id=tokenizer.eos_token_id)
    return Recipe(transformers.Qwen3ForCausalLM, config, tokenizer)
