"""Qwen3-Omni, the part that reads, deepstack for images only; full size: the 30B-A3B model's dimensions."""

from __future__ import annotations

import transformers

from harness.checkpoints import processors
from harness.checkpoints.recipes.base import TEXT, Recipe

_30B_A3B = {
    "hidden_size": 2048,
    "intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}

_TINY = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}


def build(full: bool) -> Recipe:
    """See the module."""
    names = {
        "image_token": "<|image_pad|>",
        "audio_token": "<|audio_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
        "audio_bos_token": "<|audio_start|>",
        "audio_eos_token": "<|audio_end|>",
    }
    size = {"shortest_edge": 32 * 32, "longest_edge": 256 * 256}  # from one token to 64
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = processors.qwen_omni(transformers.Qwen3OmniMoeProcessor, names, size=size, patch_size=16, **half)
    tokenizer = processor.tokenizer
    rope = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [24, 20, 20] if full else [8, 4, 4],
        "mrope_interleaved": True,
    }
    vision = {
        "depth": 27 if full else 4,
        "hidden_size": 1152 if full else 64,
        "num_heads": 16 if full else 4,
        "intermediate_size": 4304 if full else 128,
        "out_hidden_size": 2048 if full else 128,
        "num_position_embeddings": 2304 if full else 256,
        "deepstack_visual_indexes": [8, 16, 24] if full else [0, 1, 2],
        # transformers' configuration has neither; vLLM reads both, the side of the position embeddings in pixels.
        "image_size": 768 if full else 256,
        "apply_vit_abs_pos_embed": True,
    }
    audio = {
        "encoder_layers": 32 if full else 2,
        "encoder_attention_heads": 20 if full else 4,
        "encoder_ffn_dim": 5120 if full else 128,
        "d_model": 1280 if full else 64,
        "downsample_hidden_size": 480 if full else 32,
        "output_dim": 2048 if full else 128,
    }
    thinker = {
        "text_config": {
            **TEXT,
            **(_30B_A3B if full else _TINY),
            "num_hidden_layers": 4,
            "rope_parameters": rope,
            "eos_token_id": tokenizer.eos_token_id,
            "tie_word_embeddings": False,
        },
        "vision_config": vision,
        "audio_config": audio,
        **processors.qwen_token_ids(tokenizer),
        "audio_token_id": tokenizer.audio_token_id,
        "audio_start_token_id": tokenizer.audio_bos_token_id,
        "audio_end_token_id": tokenizer.audio_eos_token_id,
    }
    config = transformers.Qwen3OmniMoeConfig(thinker_config=thinker, enable_audio_output=False)
    return Recipe(transformers.Qwen3OmniMoeForConditionalGeneration, config, processor)
