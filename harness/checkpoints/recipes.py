"""How each family's checkpoint is built: its real configuration, model and processor classes, small or full size."""

from __future__ import annotations

from typing import Any, NamedTuple

import transformers
from transformers import PreTrainedModel

from harness.checkpoints import tokenizer as tokenizers


class Recipe(NamedTuple):
    """Not built yet: the model's class and configuration, and what else belongs in the folder."""

    model_class: type[PreTrainedModel]
    config: Any
    processor: Any


_TEXT = {
    "vocab_size": tokenizers.VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}
_QWEN3_VL_4B_TEXT = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": True,
}


def qwen3_vl(full: bool) -> Recipe:
    """Qwen3-VL with deepstack; full size: the 4B model's dimensions."""
    names = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    }
    tokenizer = tokenizers.build(**names)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    section = [24, 20, 20] if full else [8, 4, 4]
    rope = {
        "rope_type": "default",
        "rope_theta": 5e6 if full else 1e4,
        "mrope_section": section,
        "mrope_interleaved": True,
    }
    vision = {
        "depth": 24 if full else 4,
        "hidden_size": 1024 if full else 64,
        "num_heads": 16 if full else 4,
        "intermediate_size": 4096 if full else 128,
        "out_hidden_size": 2560 if full else 128,
        "num_position_embeddings": 2304 if full else 256,
        "deepstack_visual_indexes": [5, 11, 17] if full else [0, 1, 2],
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    config = transformers.Qwen3VLConfig(
        text_config={
            **(_QWEN3_VL_4B_TEXT if full else _TEXT),
            "rope_parameters": rope,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config=vision,
        image_token_id=ids["image_token"],
        video_token_id=ids["video_token"],
        vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
        tie_word_embeddings=full,
    )
    size = {"shortest_edge": 64 * 64, "longest_edge": 256 * 256}  # small, so that few tokens make a small encoder cache
    # As published. Where the two differ, vLLM normalises videos with the image processor's numbers.
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=16, size=size, **half),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(patch_size=16, size=size, **half),
        chat_template=tokenizers.chat_template(
            {
                "image": "<|vision_start|><|image_pad|><|vision_end|>",
                "image_url": "<|vision_start|><|image_pad|><|vision_end|>",
                "video": "<|vision_start|><|video_pad|><|vision_end|>",
            }
        ),
    )
    return Recipe(transformers.Qwen3VLForConditionalGeneration, config, processor)


def qwen3_text(full: bool) -> Recipe:
    """A text-only model, which capture must refuse."""
    del full
    tokenizer = tokenizers.build()
    config = transformers.Qwen3Config(**_TEXT, eos_token_id=tokenizer.eos_token_id)
    return Recipe(transformers.Qwen3ForCausalLM, config, tokenizer)


def whisper(full: bool) -> Recipe:
    """An encoder-decoder model, which capture must refuse."""
    del full
    tokenizer = tokenizers.build(["<|startoftranscript|>"])
    start = tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    config = transformers.WhisperConfig(
        vocab_size=tokenizers.VOCABULARY,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        decoder_start_token_id=start,
        bos_token_id=start,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    processor = transformers.WhisperProcessor(transformers.WhisperFeatureExtractor(), tokenizer)
    return Recipe(transformers.WhisperForConditionalGeneration, config, processor)


RECIPES = {function.__name__: function for function in (qwen3_vl, qwen3_text, whisper)}
"""By name."""
