"""Qwen3-VL whose image and video processors normalise with different numbers, as a checkpoint may."""

from __future__ import annotations

from harness.checkpoints.recipes import qwen3_vl
from harness.checkpoints.recipes.base import Recipe


def build(full: bool) -> Recipe:
    """See the module."""
    recipe = qwen3_vl.build(full)
    recipe.processor.video_processor.image_mean = [0.48145466, 0.4578275, 0.40821073]
    recipe.processor.video_processor.image_std = [0.26862954, 0.26130258, 0.27577711]
    return recipe
