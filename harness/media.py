"""Images and videos from a seed, structured so that a swap, a transposition or another size shows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Media:
    """One item of a prompt, by how it is made.

    Attributes:
        modality: "image" or "video".
        seed: decides the content.
        width, height: pixels.
        num_frames: of a video.
    """

    modality: Literal["image", "video"]
    seed: int
    width: int
    height: int
    num_frames: int = 1

    @property
    def content(self) -> Any:
        """What vLLM and Hugging Face take: a PIL image, or a video's frames (num_frames, height, width, 3), uint8."""
        frames = np.stack([_frame(self.seed, index, self.width, self.height) for index in range(self.num_frames)])
        return frames if self.modality == "video" else Image.fromarray(frames[0])

    @property
    def metadata(self) -> dict[str, Any]:
        """Of a video, as vLLM's loaders give it: two frames a second, all of them sampled."""
        return {
            "fps": 2.0,
            "duration": self.num_frames / 2.0,
            "total_num_frames": self.num_frames,
            "frames_indices": list(range(self.num_frames)),
            "video_backend": "opencv",
            "do_sample_frames": False,
        }

    @property
    def digest(self) -> str:
        """sha256 of modality, shape and pixels."""
        pixels = np.asarray(self.content)
        return hashlib.sha256(f"{self.modality} {pixels.shape}\n".encode() + pixels.tobytes()).hexdigest()


def image(seed: int, width: int = 96, height: int = 64) -> Media:
    """An image."""
    return Media("image", seed, width, height)


def video(seed: int, num_frames: int = 4, width: int = 64, height: int = 64) -> Media:
    """A video whose shapes move from frame to frame."""
    return Media("video", seed, width, height, num_frames)


def _frame(seed: int, index: int, width: int, height: int) -> np.ndarray:
    words = np.random.Philox(key=seed).random_raw(40).astype(np.int64) & 0xFFFFFF
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) * 255 // (height + width)], -1)
    for left, top, size, *color in words[:36].reshape(6, 6):
        left, top, size = (left + 3 * index) % width, (top + 2 * index) % height, 4 + size % (min(width, height) // 2)
        pixels[top : top + size, left : left + size] = np.array(color) % 256
    return pixels.astype(np.uint8)
