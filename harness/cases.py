"""Prompts: text and media in order, and the cases that every model is judged by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from harness.matrix import ModelSpec
from harness.media import Media, image, video

Part = str | Media

CASES: dict[str, tuple[Part, ...]] = {
    "image": (image(1), "What is this?"),
    "two-images": (image(1), image(2, 64, 128), "Compare them."),
    "image-between-texts": ("Look at this: ", image(3, 128, 96), " and tell what it is."),
    "same-image-twice": (image(1), image(1), "Are they the same?"),
    "three-sizes": (image(4, 64, 64), image(5, 224, 96), image(6, 96, 192), "Which is the largest?"),
    "video": (video(7), "What happens?"),
    "image-and-video": (image(8, 64, 96), "and", video(9, 6, 96, 64), "Do they match?"),
}
"""By name; a model's YAML file lists those that apply to it."""


def text(spec: ModelSpec, parts: Sequence[Part]) -> str:
    """The prompt's text, with the model's placeholder where media stand."""
    body = "".join(part if isinstance(part, str) else spec.placeholders[part.modality] for part in parts)
    return spec.prompt.replace("{body}", body)


def prompt(spec: ModelSpec, parts: Sequence[Part]) -> dict[str, Any]:
    """vLLM's prompt: {"prompt": text} and, if there are media, {"multi_modal_data": {modality: list}}."""
    media: dict[str, list[Any]] = {}
    for part in parts:
        if not isinstance(part, str):
            content = (part.content, part.metadata) if part.modality == "video" else part.content
            media.setdefault(part.modality, []).append(content)
    return {"prompt": text(spec, parts)} | ({"multi_modal_data": media} if media else {})


def digest(parts: Sequence[Part]) -> str:
    """sha256 of the media's digests, in order."""
    digests = [part.digest for part in parts if not isinstance(part, str)]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
