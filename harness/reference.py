"""The Hugging Face encoder of a checkpoint, on the inputs that vLLM's processor made. Imports no vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor


class Item(Protocol):
    """As observe.ProcessedItem."""

    @property
    def modality(self) -> str:
        """Such as "image"."""

    @property
    def data(self) -> dict[str, Tensor]:
        """The encoder's inputs."""


class Reference:
    """The whole model, in one dtype.

    Args:
        checkpoint: its folder.
        dtype: to compute in.
    """

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32) -> None:
        self._dtype = dtype
        self._model: Any = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype).eval()
        self._processor: Any = transformers.AutoProcessor.from_pretrained(checkpoint)

    @torch.inference_mode()
    def encode(self, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        """Rows (num_rows, hidden_size) and deepstack levels (num_levels, num_rows, hidden_size) of the items."""
        rows, levels = zip(*(self._encode(item) for item in items), strict=True)
        return torch.cat(rows), torch.cat(levels, dim=1)

    def _encode(self, item: Item) -> tuple[Tensor, Tensor]:
        pixels, grid = ("pixel_values", "image_grid_thw")
        encode, processor = self._model.model.get_image_features, self._processor.image_processor
        if item.modality == "video":
            pixels, grid = "pixel_values_videos", "video_grid_thw"
            encode, processor = self._model.model.get_video_features, self._processor.video_processor
        output = encode(
            normalised(item.data[pixels], processor.image_mean, processor.image_std).to(self._dtype),
            item.data[grid].reshape(-1, 3),
        )
        levels = [_joined(level) for level in output.deepstack_features]
        return _joined(output.pooler_output), torch.stack(levels)

    @torch.inference_mode()
    def generate(self, text: str, media: dict[str, list[Any]], max_new_tokens: int) -> list[int]:
        """Greedy token ids, on the inputs of Hugging Face's own processor."""
        inputs = self._processor(text=[text], images=media.get("image"), return_tensors="pt")
        output = self._model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return [int(token) for token in output[0, inputs["input_ids"].shape[1] :]]


def _joined(rows: Tensor | Sequence[Tensor]) -> Tensor:
    """transformers 5.17 gives deepstack features whole, 5.19 item by item."""
    return rows if isinstance(rows, Tensor) else torch.cat(tuple(rows))


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Patches as the encoder takes them, float32: (x / 255 - mean) / std by channel where they are raw uint8 pixels.

    vLLM leaves this to the device by default. Patches are (num_patches, channels * temporal * height * width).
    """
    if pixels.dtype != torch.uint8:
        return pixels.float()
    channels = pixels.float().unflatten(1, (len(mean), -1)) / 255
    return ((channels - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]).flatten(1)
