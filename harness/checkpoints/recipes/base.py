"""What recipes are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from harness.checkpoints import tokenizer as tokenizers

TEXT: dict[str, Any] = {
    "vocab_size": tokenizers.VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}
"""Configuration of a small language model."""


@dataclass(frozen=True)
class Recipe:
    """A checkpoint that is not built yet.

    Attributes:
        model_class: of transformers.
        config: of the model.
        processor: its processor or tokenizer; anything with save_pretrained.
        rename: prefix of parameter names in the file to the prefix that vLLM expects, where transformers saves another
            one than the published checkpoints have. transformers still loads the result.
        extra: further files, by name.
    """

    model_class: type[PreTrainedModel]
    config: Any
    processor: Any
    rename: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, str] = field(default_factory=dict)
