"""GLM-4.1V whose configuration does not tell vLLM of the biases that its attention has."""

from __future__ import annotations

from harness.checkpoints.recipes import glm4v
from harness.checkpoints.recipes.base import Recipe


def build(full: bool) -> Recipe:
    """See the module."""
    recipe = glm4v.build(full)
    recipe.config.text_config.attention_bias = False
    return recipe
