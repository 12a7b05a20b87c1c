"""The Hugging Face encoder of a checkpoint, on what vLLM's processor made and on its own. Imports no vLLM."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.media import SAMPLING_RATE, Media

Inputs = Mapping[str, Tensor]
"""What a processor made of the items of one modality, by argument name, as a batch."""


class Item(Protocol):
    """As observe.ProcessedItem."""

    @property
    def modality(self) -> str:
        """Such as "image"."""

    @property
    def num_embeds(self) -> int:
        """Its rows."""

    @property
    def data(self) -> dict[str, Tensor]:
        """The encoder's inputs, a batch of this item alone."""


class Encoded(NamedTuple):
    """Rows (num_rows, hidden_size) and deepstack levels (num_levels, num_rows, hidden_size)."""

    rows: Tensor
    levels: Tensor


Encode = Callable[["Reference", str, Inputs], Encoded]
"""Runs the encoder: reference, modality, inputs."""


class Reference:
    """The whole model, in one dtype.

    Args:
        checkpoint: its folder.
        dtype: to compute in.
        encoder: key of ENCODERS.
        num_levels: deepstack levels, zeros for items that have none.
        device: of the encoder; inputs and outputs are on the CPU. The language model stays there too.
    """

    def __init__(
        self,
        checkpoint: Path,
        dtype: torch.dtype = torch.float32,
        encoder: str = "generic",
        num_levels: int = 0,
        device: str = "cpu",
    ) -> None:
        self.dtype = dtype
        self.num_levels = num_levels
        self.device = torch.device(device)
        self._encode = ENCODERS[encoder]
        self.processor: Any = transformers.AutoProcessor.from_pretrained(checkpoint)
        self.model: Any = _load(checkpoint, dtype)
        self._place(self.device)

    def _place(self, device: torch.device) -> None:
        for tensor in encoder_tensors(self.model):
            tensor.data = tensor.data.to(device)

    @torch.inference_mode()
    def encode(self, modality: str, inputs: Inputs) -> Encoded:
        """The encoder's output for the items of one modality, one after another."""
        with self.device, _exact(self.device, self.dtype):
            found = self._encode(self, modality, {name: _to(value, self.device) for name, value in inputs.items()})
        return Encoded(*(tensor.cpu() for tensor in found))

    def encode_items(self, items: Sequence[Item]) -> Encoded:
        """Rows and levels of items, each encoded from its own inputs."""
        return _concatenate([self.encode(item.modality, item.data) for item in items], self.num_levels)

    def encode_processed(self, processed: Inputs, items: Sequence[Item]) -> Encoded:
        """Rows and levels in the order of `items`, from what `process` made of the whole prompt.

        Raises:
            ValueError: the encoder's rows are not as many as those of the items.
        """
        found: dict[str, list[Encoded]] = {}
        for modality in dict.fromkeys(item.modality for item in items):
            sizes = [item.num_embeds for item in items if item.modality == modality]
            encoded = self.encode(modality, processed)
            if len(encoded.rows) == sum(item.num_embeds for item in items):
                return encoded  # of items of one modality, or of all: InternVL's processor joins images and frames
            if len(encoded.rows) != sum(sizes):
                raise ValueError(
                    f"Hugging Face's processor and encoder make {len(encoded.rows)} rows of the {modality} items where "
                    f"vLLM's processor counts {sum(sizes)}"
                )
            pieces = zip(encoded.rows.split(sizes), encoded.levels.split(sizes, dim=1), strict=True)
            found[modality] = [Encoded(*piece) for piece in pieces]
        return _concatenate([found[item.modality].pop(0) for item in items], self.num_levels)

    def process(self, text: str, media: Mapping[str, Sequence[Media]]) -> dict[str, Any]:
        """What Hugging Face's own processor makes of a prompt: the arguments of the model's forward."""
        arguments: dict[str, Any] = {}
        if images := media.get("image"):
            arguments["images"] = [item.content for item in images]
        if videos := media.get("video"):
            arguments["videos"] = [item.content for item in videos]
            metadata = [{**item.metadata} for item in videos]
            for entry in metadata:
                entry.pop("do_sample_frames")
            arguments["videos_kwargs"] = {"video_metadata": metadata, "do_sample_frames": False}
        if recordings := media.get("audio"):
            arguments["audio"] = [item.content for item in recordings]
            arguments["audio_kwargs"] = {"sampling_rate": SAMPLING_RATE}
        return dict(self.processor(text=[text], return_tensors="pt", **arguments))

    def generate(self, inputs: Mapping[str, Any], max_new_tokens: int) -> list[int]:
        """Greedy token ids that follow the inputs of `process`."""
        inputs = {
            name: value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }
        self._place(torch.device("cpu"))
        with torch.inference_mode():
            output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        self._place(self.device)
        return [int(token) for token in output[0, inputs["input_ids"].shape[1] :]]


def _load(checkpoint: Path, dtype: torch.dtype) -> Any:
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    [architecture] = config.architectures
    if hasattr(config, "thinker_config"):
        # Of an omni model the part that reads, as in vLLM: the whole needs files for the voices of the other part.
        architecture = f"{type(config).__name__.removesuffix('Config')}ThinkerForConditionalGeneration"
    return getattr(transformers, architecture).from_pretrained(checkpoint, dtype=dtype).eval()


def _to(value: Any, device: torch.device) -> Any:
    # A processor's output is not tensors alone.
    return value.to(device) if isinstance(value, Tensor) else value


@contextlib.contextmanager
def _exact(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """float32 as such: on a GPU convolutions and fused attention may round what they take to TensorFloat-32."""
    if device.type == "cpu" or dtype != torch.float32:
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), sdpa_kernel(SDPBackend.MATH):
        yield


_LANGUAGE_MODELS = ("language_model", "text_model")
"""What the families call it, beside the encoder; an omni model's is called "model"."""


def encoder_tensors(model: torch.nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of all but the language model."""
    yield from (*model.parameters(recurse=False), *model.buffers(recurse=False))
    for name, child in model.named_children():
        if any(hasattr(child, language) for language in _LANGUAGE_MODELS):
            yield from encoder_tensors(child)
        elif name not in (*_LANGUAGE_MODELS, "model", "lm_head"):
            yield from (*child.parameters(), *child.buffers())


def _concatenate(pieces: Sequence[Encoded], num_levels: int) -> Encoded:
    """Items without deepstack levels (audio of a model whose images have some) have zeros, as in the language model."""
    most = max(num_levels, *(len(piece.levels) for piece in pieces))
    levels = [
        torch.cat([piece.levels, piece.rows.new_zeros(most - len(piece.levels), *piece.rows.shape)]) for piece in pieces
    ]
    return Encoded(torch.cat([piece.rows for piece in pieces]), torch.cat(levels, dim=1))


def generic(reference: Reference, modality: str, inputs: Inputs) -> Encoded:
    """`get_image_features` and its kin, with those of the inputs that their signature names."""
    # A family without get_video_features encodes the frames as images.
    kinds = [modality, "image"] if modality == "video" else [modality]
    owners = (reference.model, getattr(reference.model, "model", None))
    encode = next((found for kind in kinds for owner in owners if (found := _features(owner, kind))), None)
    if encode is None:
        raise NotImplementedError(f"{type(reference.model).__name__} has no get_{modality}_features")
    names = {name: _input_name(modality, name, inputs) for name in inspect.signature(encode).parameters}
    return encoded(
        encode(**{name: prepared(reference, modality, inputs[key]) for name, key in names.items() if key in inputs})
    )


def _features(owner: Any, modality: str) -> Any:
    return getattr(owner, f"get_{modality}_features", None)


def _input_name(modality: str, argument: str, inputs: Inputs) -> str:
    """Whose value an argument of the encoder gets: a video's pixel_values are called pixel_values_videos."""
    of_video = f"{argument}_videos"
    return of_video if modality == "video" and of_video in inputs else argument


def encoded(output: Any) -> Encoded:
    """From what the `get_..._features` of a family return: a tensor, one an item, or an output object."""
    if isinstance(output, tuple):
        output = output[0]
    levels = getattr(output, "deepstack_features", None)
    pooled = getattr(output, "pooler_output", None)
    rows = joined(pooled if pooled is not None else getattr(output, "last_hidden_state", output))
    empty = rows.new_zeros(0, *rows.shape)
    return Encoded(rows, torch.stack([joined(level) for level in levels]) if levels else empty)


def joined(rows: Tensor | Sequence[Tensor]) -> Tensor:
    """(num_rows, hidden_size) of the items' rows, whole or item by item, batched or not."""
    if not isinstance(rows, Tensor):
        return torch.cat([joined(piece) for piece in rows])
    return rows.reshape(-1, rows.shape[-1])


def prepared(reference: Reference, modality: str, value: Tensor) -> Tensor:
    """An input as the encoder takes it: pixels normalised, floats in the reference's dtype.

    vLLM leaves the normalisation of some families to the device and hands raw uint8 pixels on.
    """
    if value.dtype == torch.uint8:
        processor = image_processor(reference.processor, modality)
        value = normalised(value, processor.image_mean, processor.image_std)
    return value.to(reference.dtype) if value.is_floating_point() else value


def image_processor(processor: Any, modality: str) -> Any:
    """The part of a processor that knows how images, or videos, are normalised."""
    video = getattr(processor, "video_processor", None)
    return video if modality == "video" and video is not None else processor.image_processor


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """float32 (x / 255 - mean) / std by channel, of raw pixels.

    Args:
        pixels: (..., channels, height, width), or patches (num_patches, channels * temporal * height * width).
        mean: by channel.
        std: by channel.
    """
    shape = (-1, 1) if pixels.ndim == 2 else (-1, 1, 1)
    channels = pixels.unflatten(1, (len(mean), -1)) if pixels.ndim == 2 else pixels
    scaled = (channels.float() / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    return scaled.reshape(pixels.shape)


def tiles(reference: Reference, modality: str, inputs: Inputs) -> Encoded:
    """As generic, for tiles that come as those of one prompt: (1, num_tiles, ...). vLLM hands on (num_tiles, ...)."""
    dimensions = {"pixel_values": 5, "pixel_attention_mask": 4}
    batch = {
        name: value[None] if name in dimensions and value.ndim < dimensions[name] else value
        for name, value in inputs.items()
    }
    return generic(reference, modality, batch)


def pixtral(reference: Reference, modality: str, inputs: Inputs) -> Encoded:
    """With image_sizes, (height, width) of each image, which vLLM does not hand on: its images are not padded."""
    pixels = prepared(reference, modality, inputs["pixel_values"])
    sizes = inputs.get("image_sizes", torch.tensor([pixels.shape[-2:]] * len(pixels)))
    return encoded(reference.model.get_image_features(pixel_values=pixels, image_sizes=sizes))


def omni(reference: Reference, modality: str, inputs: Inputs) -> Encoded:
    """`generic`, and audio also as vLLM packs it: one recording's features, (num_mel_bins, num_frames), unpadded."""
    packed = inputs.get("input_audio_features")
    if packed is not None:
        mask = torch.ones(1, packed.shape[-1], dtype=torch.long)
        inputs = {"input_features": packed[None], "feature_attention_mask": mask}
    return generic(reference, modality, inputs)


def qwen2_audio(reference: Reference, modality: str, inputs: Inputs) -> Encoded:
    """As the forward of Qwen2AudioModel, which has no `get_audio_features`."""
    del modality
    model = reference.model.model
    features, mask = inputs["input_features"].to(reference.dtype), inputs["feature_attention_mask"]
    lengths, num_rows = model.audio_tower._get_feat_extract_output_lengths(mask.sum(-1))
    most = (features.shape[-1] - 2) // 2 + 1
    heard = torch.arange(most) < lengths[:, None]
    attention = torch.zeros(len(features), 1, most, most, dtype=reference.dtype)
    attention.masked_fill_(~heard[:, None, None], float("-inf"))
    rows = model.multi_modal_projector(model.audio_tower(features, attention_mask=attention).last_hidden_state)
    return encoded([item[:number] for item, number in zip(rows, num_rows.tolist(), strict=True)])


ENCODERS: dict[str, Encode] = {
    "generic": generic,
    "tiles": tiles,
    "pixtral": pixtral,
    "omni": omni,
    "qwen2_audio": qwen2_audio,
}
"""By the name that a model's YAML file gives."""
