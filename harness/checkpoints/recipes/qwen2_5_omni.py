"""Qwen2.5-Omni, the part that reads; full size: the 7B model's dimensions."""

from __future__ import annotations

import transformers

from harness.checkpoints import processors
from harness.checkpoints.recipes.base import TEXT, Recipe

_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 4,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "head_dim": 128,
}


class Qwen2_5OmniModel(transformers.Qwen2_5OmniForConditionalGeneration):  # noqa: N801
    """By the name that the published checkpoints have in their config.json."""


def build(full: bool) -> Recipe:
    """See the module."""
    names = {
        "image_token": "<|IMAGE|>",
        "audio_token": "<|AUDIO|>",
        "video_token": "<|VIDEO|>",
        "vision_bos_token": "<|vision_bos|>",
        "vision_eos_token": "<|vision_eos|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
    }
    size = {"shortest_edge": 28 * 28, "longest_edge": 256 * 256}  # from one token to 81
    processor = processors.qwen_omni(transformers.Qwen2_5OmniProcessor, names, size=size)
    tokenizer = processor.tokenizer
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24] if full else [4, 6, 6]}
    vision = {
        "depth": 32 if full else 4,
        "hidden_size": 1280 if full else 64,
        "intermediate_size": 3420 if full else 128,
        "num_heads": 16 if full else 4,
        "out_hidden_size": 3584 if full else 128,
        "window_size": 112 if full else 56,  # two by two tokens, so that small images have several windows
        "fullatt_block_indexes": [7, 15, 23, 31] if full else [1, 3],
    }
    audio = {
        "encoder_layers": 32 if full else 2,
        "encoder_attention_heads": 20 if full else 4,
        "encoder_ffn_dim": 5120 if full else 128,
        "d_model": 1280 if full else 64,
        "output_dim": 3584 if full else 128,
    }
    thinker = {
        "text_config": {
            **(TEXT | _7B if full else TEXT),
            "rope_parameters": rope,
            "eos_token_id": tokenizer.eos_token_id,
            "tie_word_embeddings": False,
        },
        "vision_config": vision,
        "audio_config": audio,
        "image_token_index": tokenizer.image_token_id,
        "audio_token_index": tokenizer.audio_token_id,
        "video_token_index": tokenizer.video_token_id,
        "vision_start_token_id": tokenizer.vision_bos_token_id,
        "vision_end_token_id": tokenizer.vision_eos_token_id,
        "audio_start_token_id": tokenizer.audio_bos_token_id,
        "audio_end_token_id": tokenizer.audio_eos_token_id,
    }
    config = transformers.Qwen2_5OmniConfig(thinker_config=thinker, enable_audio_output=False)
    return Recipe(Qwen2_5OmniModel, config, processor)
