"""Images, videos and audio: made from a seed, structured so that a swap or another size shows, and real ones."""

from __future__ import annotations

import hashlib
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

Modality = Literal["image", "video", "audio"]

SAMPLING_RATE = 16_000
"""Hz; what the published audio encoders take, so that nothing is resampled."""

PHOTOGRAPHS = {
    "astronaut": "Eileen Collins, NASA, public domain",
    "chelsea": "a cat, Stefan van der Walt, CC0",
    "coffee": "a cup, Rachel Michetti, CC0",
}
"""Photographs in the wheel of scikit-image, and their licences (its data/README.txt)."""


@dataclass(frozen=True)
class Media:
    """One item of a prompt, by how it is made.

    Attributes:
        modality: "image", "video" or "audio".
        seed: decides the content.
        width, height: pixels of an image or a frame.
        num_frames: of a video.
        num_samples: of audio, at SAMPLING_RATE.
        source: name of a photograph, resized to width and height, or of a recording, cut to num_samples; None for what
            is generated.
    """

    modality: Modality
    seed: int
    width: int = 0
    height: int = 0
    num_frames: int = 1
    num_samples: int = 0
    source: str | None = None

    @property
    def content(self) -> Any:
        """What vLLM and Hugging Face take.

        A PIL image; a video's frames (num_frames, height, width, 3), uint8; or samples (num_samples,), float32.
        """
        if self.modality == "audio":
            samples = _samples(self.seed, self.num_samples) if self.source is None else _recording(self.source)
            return samples[: self.num_samples]
        if self.source is not None:
            return _photograph(self.source).resize((self.width, self.height), Image.Resampling.BICUBIC)
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
        """sha256 of modality, shape and pixels or samples."""
        values = np.asarray(self.content)
        return hashlib.sha256(f"{self.modality} {values.shape}\n".encode() + values.tobytes()).hexdigest()


def image(seed: int, width: int = 96, height: int = 64) -> Media:
    """An image."""
    return Media("image", seed, width, height)


def photograph(name: str, width: int, height: int) -> Media:
    """A photograph of PHOTOGRAPHS."""
    return Media("image", 0, width, height, source=name)


def video(seed: int, num_frames: int = 4, width: int = 64, height: int = 64) -> Media:
    """A video whose shapes move from frame to frame."""
    return Media("video", seed, width, height, num_frames)


def audio(seed: int, seconds: float = 1.5) -> Media:
    """Audio: tones that glide, one after another."""
    return Media("audio", seed, num_samples=round(seconds * SAMPLING_RATE))


def recording(name: str, seconds: float) -> Media:
    """The beginning of a recording of harness/recordings; its README.md tells licences."""
    return Media("audio", 0, num_samples=round(seconds * SAMPLING_RATE), source=name)


def _recording(name: str) -> np.ndarray:
    with wave.open(str(Path(__file__).parent / "recordings" / f"{name}.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (SAMPLING_RATE, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / np.float32(32768)


def _photograph(name: str) -> Image.Image:
    import skimage.data

    with Image.open(next(Path(skimage.data.__file__).parent.glob(f"{name}.*"))) as found:
        return found.convert("RGB")


def _frame(seed: int, index: int, width: int, height: int) -> np.ndarray:
    words = np.random.Philox(key=seed).random_raw(40).astype(np.int64) & 0xFFFFFF
    rows, columns = np.arange(height)[:, None], np.arange(width)
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = rows * 255 // height, columns * 255 // width
    pixels[..., 2] = (rows + columns) * 255 // (height + width)
    for left, top, size, *color in words[:36].reshape(6, 6):
        left, top, size = (left + 3 * index) % width, (top + 2 * index) % height, 4 + size % (min(width, height) // 2)
        pixels[top : top + size, left : left + size] = np.array(color) % 256
    return pixels


def _samples(seed: int, num_samples: int) -> np.ndarray:
    """In integers up to the last step: a sine differs in its last bit between machines, and with it the digest."""
    words = np.random.Philox(key=seed).random_raw(1 + num_samples // 4000 * 3 + 3).astype(np.int64) & 0xFFFFFF
    phase, pieces = np.int64(0), []
    for start in range(0, num_samples, 4000):
        low, glide, level = words[start // 4000 * 3 :][:3]
        steps = 800 + low % 6000 + np.arange(min(4000, num_samples - start), dtype=np.int64) * (1 + glide % 3) // 2
        phases = (phase + np.cumsum(steps)) % 65536  # of 65536 a period
        triangle = np.abs(phases - 32768) * 2 - 32768
        pieces.append(triangle * (2048 + level % 14336) // 32768)
        phase = phases[-1]
    return (np.concatenate(pieces) / 32768).astype(np.float32)
