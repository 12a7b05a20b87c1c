"""Prompts: text and media in order, and the cases that every model is judged by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from harness.matrix import ModelSpec
from harness.media import Media, audio, image, photograph, recording, video

Part = str | Media

CASES: dict[str, tuple[Part, ...]] = {
    "image": (image(1), "What is this?"),
    "two-images": (image(1), image(2, 64, 128), "Compare them."),
    "image-between-texts": ("Look at this: ", image(3, 128, 96), " and tell what it is."),
    "same-image-twice": (image(1), image(1), "Are they the same?"),
    "three-sizes": (image(4, 64, 64), image(5, 224, 96), image(6, 96, 192), "Which is the largest?"),
    "photographs": (photograph("astronaut", 192, 192), photograph("coffee", 300, 200), "Who drinks this?"),
    "photograph": (photograph("chelsea", 225, 150), "Which animal is this?"),
    "video": (video(7), "What happens?"),
    "image-and-video": (image(8, 64, 96), "and", video(9, 6, 96, 64), "Do they match?"),
    "audio": (audio(11, 1.5), "What is said?"),
    "recording": (recording("young-man", 2.99), "Who was not ill-disposed?"),
    "two-audios": (audio(12, 0.8), "and", audio(13, 2.37), "Is it the same voice?"),
    "image-and-audio": (image(14, 96, 64), "while", audio(15, 1.1), "Do they match?"),
    "audio-and-video": (audio(16, 1.3), "over", video(17, 4, 64, 96), "Do they match?"),
}
"""By name; a model's YAML file lists those that apply to it, beside "smallest-image" and "largest-image"."""


def parts(spec: ModelSpec, case: str) -> tuple[Part, ...]:
    """What the case's prompt is made of.

    "smallest-image" and "largest-image" are those that the model's processor takes, from its YAML file.
    """
    if case == "smallest-image":
        return (image(18, *spec.smallest_image), "What is this?")
    if case == "largest-image":
        return (image(19, *spec.largest_image), "What is this?")
    return CASES[case]


def text(spec: ModelSpec, parts: Sequence[Part]) -> str:
    """The prompt's text, with the model's placeholder where media stand."""
    body = "".join(part if isinstance(part, str) else spec.placeholders[part.modality] for part in parts)
    return spec.prompt.replace("{body}", body)


def media(parts: Sequence[Part]) -> dict[str, list[Media]]:
    """The media by modality, each in order."""
    found: dict[str, list[Media]] = {}
    for part in parts:
        if not isinstance(part, str):
            found.setdefault(part.modality, []).append(part)
    return found


def prompt(spec: ModelSpec, parts: Sequence[Part]) -> dict[str, Any]:
    """vLLM's prompt: {"prompt": text} and, if there are media, {"multi_modal_data": {modality: list}}."""
    data = {
        modality: [(item.content, item.metadata) if modality == "video" else item.content for item in items]
        for modality, items in media(parts).items()
    }
    return {"prompt": text(spec, parts)} | ({"multi_modal_data": data} if data else {})


def digest(parts: Sequence[Part]) -> str:
    """sha256 of the media's digests, in order."""
    digests = [part.digest for part in parts if not isinstance(part, str)]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
