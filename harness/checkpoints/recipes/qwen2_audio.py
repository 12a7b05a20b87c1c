"""Qwen2-Audio; full size: the 7B model's audio tower and projector."""

from __future__ import annotations

import transformers

from harness.checkpoints import tokenizer as tokenizers
from harness.checkpoints.recipes.base import TEXT, Recipe


def build(full: bool) -> Recipe:
    """See the module."""
    names = {"audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
    tokenizer = tokenizers.build(**names)
    text = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
    }
    config = transformers.Qwen2AudioConfig(
        text_config=transformers.Qwen2Config(
            **{**TEXT, **(text if full else {})}, eos_token_id=tokenizer.eos_token_id, bos_token_id=None
        ),
        audio_config=transformers.Qwen2AudioEncoderConfig(
            d_model=1280 if full else 64,
            encoder_ffn_dim=5120 if full else 128,
            encoder_layers=32 if full else 3,
            encoder_attention_heads=20 if full else 4,
            num_mel_bins=128,
            max_source_positions=1500,  # of 30 seconds, which vLLM takes for granted
        ),
        audio_token_index=tokenizer.convert_tokens_to_ids(names["audio_token"]),
    )
    placeholder = "".join([names["audio_bos_token"], names["audio_token"], names["audio_eos_token"]])
    parts = dict.fromkeys(["audio", "audio_url", "input_audio"], placeholder)
    processor = transformers.Qwen2AudioProcessor(
        feature_extractor=transformers.WhisperFeatureExtractor(feature_size=128),
        tokenizer=tokenizer,
        chat_template=tokenizers.chat_template(parts),
    )
    return Recipe(
        transformers.Qwen2AudioForConditionalGeneration,
        config,
        processor,
        rename={"language_model.model.model.": "language_model.model."},
    )
