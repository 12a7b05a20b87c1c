"""An encoder-decoder model, which capture must refuse."""

from __future__ import annotations

import transformers

from harness.checkpoints import tokenizer as tokenizers
from harness.checkpoints.recipes.base import Recipe


def build(_full: bool) -> Recipe:
    """See the module."""
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
