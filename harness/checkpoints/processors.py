"""Processors that several families share, each with a tokenizer that has the family's own tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers

from harness.checkpoints import tokenizer as tokenizers


def qwen_vl(kind: Any, video_processor: Any = transformers.Qwen2VLVideoProcessor, **pixels: Any) -> Any:
    """Of Qwen2-VL and what came after it.

    Args:
        kind: class of the processor.
        video_processor: class of its part for videos.
        pixels: arguments of the parts for images and for videos.
    """
    names = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    }
    return kind(
        image_processor=transformers.Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizers.build(**names),
        video_processor=video_processor(**pixels),
        chat_template=_qwen_template(names),
    )


def qwen_omni(kind: Any, names: Mapping[str, str], *, size: Mapping[str, int], **pixels: Any) -> Any:
    """Of Qwen's omni models.

    Args:
        kind: class of the processor.
        names: of the tokens, as `qwen_vl` has them, and those of audio.
        size: of images. A video's is the processor's own, whatever is set: at least 128 tokens a pair of frames.
        pixels: further arguments of the parts for images and for videos.
    """
    return kind(
        image_processor=transformers.Qwen2VLImageProcessor(size=size, **pixels),
        video_processor=transformers.Qwen2VLVideoProcessor(**pixels),
        feature_extractor=transformers.WhisperFeatureExtractor(feature_size=128),
        tokenizer=tokenizers.build(**names),
        chat_template=_qwen_template(names),
    )


def qwen_token_ids(tokenizer: Any) -> dict[str, int]:
    """Of what an image or a video is made of, by the names that the configurations have."""
    return {
        "image_token_id": tokenizer.image_token_id,
        "video_token_id": tokenizer.video_token_id,
        "vision_start_token_id": tokenizer.vision_bos_token_id,
        "vision_end_token_id": tokenizer.vision_eos_token_id,
    }


def _qwen_template(names: Mapping[str, str]) -> str:
    def between(border: str, modality: str) -> str:
        return names[f"{border}_bos_token"] + names[f"{modality}_token"] + names[f"{border}_eos_token"]

    parts = {
        "image": between("vision", "image"),
        "image_url": between("vision", "image"),
        "video": between("vision", "video"),
    }
    if "audio_token" in names:
        parts |= dict.fromkeys(["audio", "input_audio"], between("audio", "audio"))
    return tokenizers.chat_template(parts)


def idefics3(
    kind: Any,
    image_processor: Any,
    video_processor: Any = None,
    *,
    tile: int,
    longest_edge: int,
    rows_of_a_tile: int,
) -> Any:
    """Of Idefics3 and SmolVLM, whose images are cut into tiles.

    Args:
        kind: class of the processor.
        image_processor: class of its part for images.
        video_processor: class of its part for videos, if it has one.
        tile: side of a tile in pixels.
        longest_edge: to which an image is scaled, also up.
        rows_of_a_tile: rows that the language model gets of it.
    """
    tokens = [
        "<fake_token_around_image>",
        "<image>",
        "<end_of_utterance>",
        "<global-img>",
        *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    ]
    placeholders = {"image": "<image>", "image_url": "<image>"}
    size = {"size": {"longest_edge": longest_edge}, "max_image_size": {"longest_edge": tile}}
    videos = {}
    if video_processor is not None:
        tokens.append("<video>")
        placeholders["video"] = "<video>"
        videos["video_processor"] = video_processor(**size)
    return kind(
        image_processor=image_processor(**size),
        tokenizer=tokenizers.build(tokens),
        **videos,
        image_seq_len=rows_of_a_tile,
        chat_template=tokenizers.chat_template(placeholders),
    )


def pixtral(*, longest_edge: int, patch_size: int, **options: Any) -> Any:
    """Of Pixtral and Mistral 3, whose images keep their ratio and have a token at the end of each row.

    Args:
        longest_edge: to which a larger image is scaled, in pixels.
        patch_size: likewise.
        options: further ones of PixtralProcessor.
    """
    return transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessor(
            size={"longest_edge": longest_edge}, patch_size={"height": patch_size, "width": patch_size}
        ),
        tokenizer=tokenizers.build(["[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"]),
        patch_size=patch_size,
        **options,
        chat_template=tokenizers.chat_template({"image": "[IMG]", "image_url": "[IMG]"}),
    )
