"""The model that `--model` names: an embedded one, a checkpoint, or one from the hub; known to the matrix or not."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import environment
from harness.cases import CASES
from harness.matrix import ModelSpec, load_all
from harness.media import Media

MOST_TOKENS = 4096
"""Longest prompt: published models tile an image into thousands of tokens, and several engines share a GPU."""

LIMITS = {"image": 4, "video": 1, "audio": 4}
"""Items of a prompt, by modality."""

_PARTS = {"image": "image_processor", "video": "video_processor", "audio": "feature_extractor"}


class UnknownModelError(LookupError):
    """No model of that name or checkpoint; one sentence that lists the known ones."""


class TooLargeError(RuntimeError):
    """No GPU here holds the model's weights; one sentence."""


def find(name: str) -> tuple[ModelSpec, Path | None]:
    """The model of that name and the folder of its checkpoint; None for an embedded one.

    Args:
        name: stem of a YAML file of harness/matrix, folder of a checkpoint, or hub id of one to fetch.

    Raises:
        UnknownModelError: there is none, it cannot be fetched, or it is not a multimodal model; one sentence.
        TooLargeError: it is one of the matrix and would be fetched for GPUs that cannot hold it.
    """
    models = load_all()
    if name in models:
        return models[name], None
    folder = Path(name)
    if not folder.is_dir():
        folder = _fetch(name, models)
    return of_checkpoint(folder), folder


def _fetch(name: str, models: Mapping[str, ModelSpec]) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UnknownModelError(
            f"there is no model and no folder {name!r}: name the folder of a checkpoint, a hub id or one of "
            f"{', '.join(models)}"
        )
    import huggingface_hub

    known = next((spec for spec in models.values() if spec.hub_id == name), None)
    if known is not None:
        _refuse_too_large(known)
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=known.revision if known else "main"))
    except Exception as error:
        raise UnknownModelError(
            f"{name} is no folder and cannot be fetched from the hub: {_first_line(error)}"
        ) from error


def _refuse_too_large(spec: ModelSpec) -> None:
    largest = max((gpu["memory"] for gpu in environment.gpus()), default=None)
    if largest is not None and largest < spec.gpu_memory_gb * 2**30:
        raise TooLargeError(
            f"the weights of {spec.hub_id} take {spec.gpu_memory_gb:.1f} GiB and the largest GPU here has "
            f"{largest / 2**30:.1f} GiB: use a larger one, or a smaller model of the family"
        )


def of_checkpoint(folder: Path) -> ModelSpec:
    """What harness/matrix knows of a checkpoint's model by its config.json; else what its folder tells.

    Raises:
        UnknownModelError: it says nothing, or is of no multimodal model.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnknownModelError(f"{path} cannot be read ({error.strerror}): name the folder of a checkpoint") from error
    except ValueError as error:
        raise UnknownModelError(f"{path} is not JSON ({error}): name the folder of a checkpoint") from error
    architectures = config.get("architectures") if isinstance(config, dict) else None
    if not isinstance(architectures, list) or not architectures:
        raise UnknownModelError(f"{path} names no architectures: name the folder of a checkpoint")
    vision = config.get("vision_config")
    vision_type = vision.get("model_type") if isinstance(vision, dict) else None
    for wanted in (vision_type, ""):
        for spec in load_all().values():
            if spec.architecture in architectures and spec.vision_type == wanted and not spec.suites:
                return replace(spec, engine_options={**spec.engine_options, "max_model_len": _longest(config)})
    return discover(folder, config)


def discover(folder: Path, config: dict[str, Any]) -> ModelSpec:
    """The model's modalities from its processor, its prompt and placeholders from its chat template.

    Args:
        folder: of the checkpoint.
        config: its config.json, which names an architecture.

    Raises:
        UnknownModelError: it has no processor of media, or no chat template; one sentence.
    """
    import transformers

    architecture = config["architectures"][0]
    try:
        processor: Any = transformers.AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UnknownModelError(f"{folder} is a {architecture} and has no processor: {_first_line(error)}") from error
    modalities = [modality for modality, part in _PARTS.items() if getattr(processor, part, None) is not None]
    if not modalities:
        raise UnknownModelError(f"{folder} is a {architecture}, a text-only model: use a multimodal one")
    try:
        wrapper = _render(processor, {"type": "text", "text": "{body}"})
        placeholders = {modality: _placeholder(processor, wrapper, modality) for modality in modalities}
    except Exception as error:
        raise UnknownModelError(
            f"{folder} is a {architecture} without a chat template to tell its placeholders ({_first_line(error)}): "
            "write a YAML file for it as CONTRIBUTING.md shows"
        ) from error
    placeholders = {modality: text for modality, text in placeholders.items() if text}
    if not placeholders:
        raise UnknownModelError(
            f"{folder} is a {architecture} whose chat template has no place for {', '.join(modalities)}: write a YAML "
            "file for it as CONTRIBUTING.md shows"
        )
    return ModelSpec(
        name=folder.name,
        hub_id=str(folder),
        architecture=architecture,
        recipe="",
        placeholders=placeholders,
        cases=tuple(case for case, parts in CASES.items() if _modalities(parts) <= placeholders.keys()),
        prompt=wrapper,
        engine_options={
            "max_model_len": _longest(config),
            "limit_mm_per_prompt": {modality: LIMITS[modality] for modality in placeholders},
        },
        num_levels=_num_levels(config),
    )


def _render(processor: Any, part: dict[str, str]) -> str:
    messages = [{"role": "user", "content": [part]}]
    text: str = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return text


def _placeholder(processor: Any, wrapper: str, modality: str) -> str:
    """What stands in the rendered prompt where the text would; empty if the template has no such part."""
    before, _, after = wrapper.partition("{body}")
    rendered = _render(processor, {"type": modality})
    return rendered.removeprefix(before).removesuffix(after) if rendered.startswith(before) else ""


def _modalities(parts: tuple[str | Media, ...]) -> set[str]:
    return {part.modality for part in parts if not isinstance(part, str)}


def _longest(config: dict[str, Any]) -> int:
    found = config.get("text_config", config).get("max_position_embeddings")
    return min(found, MOST_TOKENS) if isinstance(found, int) else MOST_TOKENS


def _num_levels(config: dict[str, Any]) -> int:
    return len((config.get("vision_config") or {}).get("deepstack_visual_indexes") or [])


def _first_line(error: Exception) -> str:
    """Of an error's text."""
    return str(error).strip().partition("\n")[0]
