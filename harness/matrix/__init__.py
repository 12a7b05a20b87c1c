"""The models that the suites know: one YAML file each, read into a ModelSpec."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent


class SpecError(ValueError):
    """A model's YAML file cannot be used; one sentence that names file and key."""


class UnknownModelError(LookupError):
    """No model of that name or checkpoint; one sentence that lists the known ones."""


@dataclass(frozen=True)
class ModelSpec:
    """What the suites must know of one model."""

    name: str
    """Stem of the YAML file; what --model takes."""
    hub_id: str
    """The published model of this family that the embedded checkpoint stands for."""
    architecture: str
    """Model class, as in config.json."""
    recipe: str
    """Function of harness.checkpoints.recipes that builds the embedded checkpoint."""
    placeholders: Mapping[str, str]
    """Text that stands for one item in a prompt, by modality."""
    cases: tuple[str, ...]
    """Names of the cases of harness.cases that apply."""
    prompt: str = "{body}"
    """What the family wraps around a prompt's text and media."""
    engine_options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of EngineArgs for the embedded checkpoint."""
    independent: bool = True
    """False where vLLM runs Hugging Face's own encoder module, so that agreement is weak evidence."""
    skip: str | None = None
    """Why the model cannot run here; None if it can."""


def load(path: Path) -> ModelSpec:
    """Reads one file.

    Raises:
        SpecError: it is not a mapping, or has a key that is unknown, missing or of another type.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise SpecError(f"{path.name} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise SpecError(f"{path.name} must be a mapping of the fields of ModelSpec")
    known = {entry.name: entry for entry in fields(ModelSpec) if entry.name != "name"}
    for key in values:
        if key not in known:
            raise SpecError(f"{path.name} has the unknown key {key!r}: use {', '.join(known)}")
    for key, entry in known.items():
        if key not in values and entry.default is MISSING and entry.default_factory is MISSING:
            raise SpecError(f"{path.name} lacks the key {key!r}")
    types = {"placeholders": dict, "engine_options": dict, "cases": list, "independent": bool}
    for key, value in values.items():
        if not isinstance(value, expected := types.get(key, str)):
            raise SpecError(f"{path.name}: {key!r} must be a {expected.__name__}, not {value!r}")
    return ModelSpec(name=path.stem, **{**values, "cases": tuple(values["cases"])})


def load_all() -> dict[str, ModelSpec]:
    """All models, by name."""
    return {path.stem: load(path) for path in sorted(FOLDER.glob("*.yaml"))}


def find(name: str) -> ModelSpec:
    """The model of that name.

    Raises:
        UnknownModelError: there is none.
    """
    models = load_all()
    if name not in models:
        raise UnknownModelError(
            f"there is no model and no folder {name!r}: name the folder of a checkpoint or one of {', '.join(models)}"
        )
    return models[name]


def of_checkpoint(folder: Path) -> ModelSpec:
    """The model that a checkpoint's config.json says it is of.

    Raises:
        UnknownModelError: it says nothing, or a family that no file here is of.
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
    models = load_all().values()
    for spec in models:
        if spec.architecture in architectures:
            return spec
    known = ", ".join(sorted({spec.architecture for spec in models}))
    raise UnknownModelError(f"{folder} is a {architectures[0]}: use a checkpoint of {known}")
