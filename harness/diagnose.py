"""Why captured rows are not the reference's: capture, the items' order, a processor, the encoder, or what follows.

A cause is looked for among what goes wrong in practice: the reference is run on inputs changed in one respect, and the
change that makes the rows agree is named. Where none does, the part in which the difference arose is named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from harness.compare import Comparison, Tolerance, compare
from harness.observe import ProcessedItem
from harness.reference import Reference, image_processor, normalised, prepared

Kind = Literal["capture", "order", "processor", "encoder", "language model"]

LINEAR_RESIDUAL = 1e-3
"""Share of the spread that an affine fit may leave: more than float32 and bfloat16 pixels round, and far less than
another resampling leaves."""


_SIZES = ("grid_thw", "mask", "lengths", "sizes")
"""Endings of the names of inputs that tell how large an item is."""


@dataclass(frozen=True)
class Cause:
    """What differs, and in whose part.

    Attributes:
        kind: the part.
        sentence: what differs there.
    """

    kind: Kind
    sentence: str

    def __str__(self) -> str:
        return f"cause: {self.kind}: {self.sentence}"


def of_encoder(
    comparison: Comparison,
    rows: Tensor | None,
    reference: Reference,
    items: Sequence[ProcessedItem],
    tolerance: Tolerance,
) -> Cause:
    """Why captured rows differ from the reference's on the same inputs.

    Args:
        comparison: of the two.
        rows: captured, (num_rows, hidden_size); None if there are none.
        reference: that was compared.
        items: what it was run on.
        tolerance: that the comparison had.
    """
    if comparison.failure == "row order":
        return Cause("order", comparison.headline)
    if rows is None or comparison.failure != "values":
        return Cause("capture", comparison.headline)
    for sentence, change in _hypotheses(reference, items):
        try:
            expected = reference.encode_items([change(item) for item in items]).rows
        except (RuntimeError, ValueError, IndexError):  # an encoder that cannot run on such inputs was not run on them
            continue
        if expected.shape == rows.shape and compare(rows, expected, tolerance=tolerance).ok:
            return Cause("processor", sentence)
    return Cause("encoder", "on the same inputs vLLM's encoder gives other rows than Hugging Face's")


def _hypotheses(
    reference: Reference, items: Sequence[ProcessedItem]
) -> Iterator[tuple[str, Callable[[ProcessedItem], ProcessedItem]]]:
    for modality in dict.fromkeys(item.modality for item in items if item.modality != "audio"):
        own: Any = image_processor(reference.processor, modality)
        for name in ("image", "video"):
            other = image_processor(reference.processor, name)
            if (other.image_mean, other.image_std) != (own.image_mean, own.image_std):
                yield (
                    f"vLLM normalises the {modality} with the mean and std of the {name} processor",
                    _changed(modality, _pixels, partial(_renormalised, own=own, other=other)),
                )
        yield (
            f"vLLM leaves the {modality}'s pixels raw, for the device to normalise, and the reference took them so",
            _changed(modality, _pixels, partial(normalised, mean=own.image_mean, std=own.image_std)),
        )
        yield (f"the pixels of the {modality} are not normalised", _changed(modality, _pixels, Tensor.float))
        yield (
            f"the pixels of the {modality} are scaled to 0..1 and not normalised",
            _changed(modality, _pixels, lambda pixels: pixels.float() / 255),
        )
        yield (
            f"height and width of the {modality}'s grid are exchanged",
            _changed(modality, lambda name: name.endswith("grid_thw"), lambda grid: grid[..., [0, 2, 1]]),
        )


def _pixels(name: str) -> bool:
    return name.startswith("pixel_values")


def _renormalised(pixels: Tensor, own: Any, other: Any) -> Tensor:
    if pixels.dtype != torch.uint8:  # normalised by the processor's own numbers: back to raw pixels
        inverse_mean = [-mean / std for mean, std in zip(own.image_mean, own.image_std, strict=True)]
        pixels = normalised(pixels * 255, inverse_mean, [1 / std for std in own.image_std]) * 255
    return normalised(pixels, other.image_mean, other.image_std)


def _changed(
    modality: str, names: Callable[[str], bool], change: Callable[[Tensor], Tensor]
) -> Callable[[ProcessedItem], ProcessedItem]:
    def changed(item: ProcessedItem) -> ProcessedItem:
        if item.modality != modality:
            return item
        return replace(item, data={name: change(value) if names(name) else value for name, value in item.data.items()})

    return changed


def of_preprocessing(
    comparison: Comparison | None, reference: Reference, items: Sequence[ProcessedItem], processed: Mapping[str, Any]
) -> Cause:
    """Why captured rows differ from Hugging Face's end to end, although its encoder agrees on vLLM's inputs.

    Args:
        comparison: of the rows; None where they are not as many.
        reference: whose processor made `processed`.
        items: what vLLM's processor made.
        processed: what Hugging Face's made of the same prompt.
    """
    if comparison is not None and comparison.failure == "row order":
        return Cause("order", comparison.headline)
    for modality in dict.fromkeys(item.modality for item in items):
        of_modality = [item for item in items if item.modality == modality]
        # What tells sizes comes first: where they differ, the pixels or samples do too.
        for name in sorted(of_modality[0].data, key=lambda name: not name.endswith(_SIZES)):
            theirs = processed.get(name)
            if isinstance(theirs, Tensor):
                sentence = _difference(reference, modality, name, [item.data[name] for item in of_modality], theirs)
                if sentence is not None:
                    return Cause("processor", sentence)
    return Cause("processor", "the inputs have the same names and values where both have them; one has others besides")


def _difference(reference: Reference, modality: str, name: str, ours: Sequence[Tensor], theirs: Tensor) -> str | None:
    mine = [prepared(reference, modality, value) for value in ours]
    if any(value.shape[1:] != mine[0].shape[1:] for value in mine):
        return f"{name} of the items have different shapes in vLLM: {', '.join(_shape(value) for value in mine)}"
    joined, theirs = torch.cat(mine), prepared(reference, modality, theirs)
    if joined.shape != theirs.shape:
        how = "another length" if modality == "audio" else "another size or number of pieces"
        return f"{name} has shape {_shape(joined)} in vLLM and {_shape(theirs)} in Hugging Face: {how}"
    joined, theirs = joined.double(), theirs.double()
    spread = theirs.std() if theirs.numel() > 1 else theirs.abs().sum()
    difference = (joined - theirs).abs()
    if bool(difference.max() <= 1e-5 * spread):
        return None
    if name.endswith("grid_thw"):
        exchanged = bool((joined[..., [0, 2, 1]] == theirs).all())
        how = "height and width are exchanged" if exchanged else "another size"
        return f"{name} is {joined.int().tolist()} in vLLM and {theirs.int().tolist()} in Hugging Face: {how}"
    if name.endswith("mask"):
        counts = f"{int(joined.count_nonzero())} in vLLM and {int(theirs.count_nonzero())} in Hugging Face"
        return f"{name} marks other places ({counts}): another length or size"
    if _is_affine(joined, theirs):
        return f"{name} has other values in vLLM, each a multiple and an offset of Hugging Face's: another mean or std"
    share = float((difference > 1e-5 * spread).double().mean())
    return (
        f"{name} has the same shape and other values ({100 * share:.3g} % of them, by up to "
        f"{float(difference.max()):.3g}): another resampling or other samples"
    )


def _is_affine(ours: Tensor, theirs: Tensor) -> bool:
    """Channel by channel where there are channels: a mean and a std are numbers of a channel."""
    if ours.ndim == 2 and ours.shape[1] % 3 == 0:
        ours, theirs = (value.unflatten(1, (3, -1)).movedim(1, 0) for value in (ours, theirs))
    elif ours.ndim >= 3 and ours.shape[-3] == 3:
        ours, theirs = (value.movedim(-3, 0) for value in (ours, theirs))
    else:
        ours, theirs = ours[None], theirs[None]
    if ours[0].numel() < 3:
        return False  # a line goes through any two points
    for mine, other in zip(ours.flatten(1), theirs.flatten(1), strict=True):
        basis = torch.stack([other, torch.ones_like(other)], dim=1)
        fit = basis @ torch.linalg.lstsq(basis, mine[:, None]).solution
        if float((fit[:, 0] - mine).std()) > LINEAR_RESIDUAL * float(mine.std()):
            return False
    return True


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def of_attention(tokens: Sequence[int], reference: Reference, processed: Mapping[str, Any]) -> Cause | None:
    """Whether the greedy tokens are those of a model that attends causally where it should attend in both directions.

    Args:
        tokens: vLLM's.
        reference: whose tokens are others.
        processed: what its processor made of the prompt; `token_type_ids` says where it attends in both directions.
    """
    types = processed.get("token_type_ids")
    if types is None:
        return None
    # Gemma marks what attends in both directions by 1, PaliGemma by 0, which is the whole prompt.
    causal = torch.zeros_like(types) if bool(types.any()) else torch.ones_like(types)
    found = reference.generate({**processed, "token_type_ids": causal}, len(tokens))
    if found != list(tokens[: len(found)]):
        return None
    return Cause("language model", "vLLM attends causally where Hugging Face attends in both directions")


def of_tokens(checkpoint: Iterable[str], parameters: Iterable[str], packed: Mapping[str, Sequence[str]]) -> Cause:
    """Why the greedy tokens differ although the embeddings agree.

    Args:
        checkpoint: names of the tensors in the checkpoint's files.
        parameters: names of the parameters and buffers of vLLM's model.
        packed: vLLM's `packed_modules_mapping`: name of a packed module to the modules in it.
    """
    unpacked = {part: whole for whole, parts in packed.items() for part in parts}
    known = {_tail(name) for name in parameters}
    unread: dict[str, int] = {}
    for name in checkpoint:
        module, _, kind = _tail(name).rpartition(".")
        if _tail(name) not in known and f"{unpacked.get(module, module)}.{kind}" not in known:
            pattern = re.sub(r"\.\d+\.", ".*.", name)
            unread[pattern] = unread.get(pattern, 0) + 1
    if not unread:
        return Cause("language model", "the embeddings agree, and vLLM has all the checkpoint's parameters")
    names = ", ".join(f"{pattern} ({count})" for pattern, count in unread.items())
    return Cause("language model", f"vLLM drops these tensors of the checkpoint, having no parameter for them: {names}")


def _tail(name: str) -> str:
    """Module and kind: "q_proj.bias"."""
    return ".".join(name.split(".")[-2:])
