"""The models that the suites know: one YAML file each, read into a ModelSpec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from harness.verdict import Gate

FOLDER = Path(__file__).parent

_TYPES: dict[str, type] = {
    "placeholders": dict,
    "engine_options": dict,
    "cases": list,
    "differences": list,
    "suites": list,
    "smallest_image": list,
    "largest_image": list,
    "independent": bool,
    "num_levels": int,
    "gpu_memory_gb": float,
    "gates": dict,
}
"""Of the keys that are not text."""


class SpecError(ValueError):
    """A model's YAML file cannot be used; one sentence that names file and key."""


@dataclass(frozen=True)
class Difference:
    """What is known to differ between vLLM and Hugging Face for a model: its test fails, and says so."""

    suites: tuple[str, ...]
    """The columns of the report in which it shows: "encoder", "preprocessing", "tokens"."""
    cases: tuple[str, ...]
    """Cases in which it shows."""
    finding: str
    """Regular expression that the failure's text must match, so that another failure is not taken for it."""
    reason: str
    """One sentence: why, and in whose code."""
    device: str = ""
    """The only one on which it shows, as what an attention backend does: "cpu" or "cuda"; "" for any."""


GATES = {
    "throughput": Gate(goal=0.99, limit=0.98),
    "latency": Gate(goal=0.98, limit=0.95),
    "reuse": Gate(goal=1.10, limit=1.05),
}
"""What capture may cost, as the ratio without over with it: of the time for a batch, of the latency (the p99 of a round
under load, the median of requests one at a time), and of the time for a batch that asks about the same images again,
with re-use on."""


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
    """Module of harness.checkpoints.recipes that builds the embedded checkpoint."""
    placeholders: Mapping[str, str]
    """Text that stands for one item in a prompt, by modality."""
    cases: tuple[str, ...]
    """Names of the cases of harness.cases that apply."""
    revision: str = "main"
    """Of the published model on the hub."""
    vision_type: str = ""
    """model_type of its vision_config, where another family has the same architecture."""
    prompt: str = "{body}"
    """What the family wraps around a prompt's text and media."""
    engine_options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of EngineArgs; max_model_len is the embedded checkpoint's, others have their own."""
    dtype: str = "float32"
    """Of the embedded checkpoint's engine: float32 unless vLLM's CPU kernels of this family know another one only."""
    reference: str = "generic"
    """Function of harness.reference.ENCODERS that runs the Hugging Face encoder."""
    num_levels: int = 0
    """Deepstack levels that its vision encoder packs behind the rows."""
    smallest_image: tuple[int, int] = (32, 32)
    """Width and height of the smallest image that the embedded checkpoint's processor takes."""
    largest_image: tuple[int, int] = (512, 512)
    """Width and height of the largest image that it takes before it scales down, or a large one."""
    independent: bool = True
    """False where vLLM runs Hugging Face's own encoder module, so that agreement is weak evidence."""
    suites: tuple[str, ...] = ()
    """Columns of the report that it is for, where it is a case and not a family; empty for all."""
    differences: tuple[Difference, ...] = ()
    """What is known to differ from Hugging Face, each with its reason."""
    gpu_memory_gb: float = 0.0
    """GiB that the published model's weights take in its own dtype: with less on a GPU it is not fetched."""
    gates: Mapping[str, Gate] = field(default_factory=lambda: GATES)
    """What capture may cost, by what is measured: of GATES, those that are others for this model."""
    min_vllm: str = "0.32"
    """Oldest release of vLLM that has the model; on older ones it is skipped, with the reason."""
    min_transformers: str = "5.16"
    """Oldest release of transformers that has the model; likewise."""
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
    for key, value in values.items():
        expected = _TYPES.get(key, str)
        if not isinstance(value, expected):
            raise SpecError(f"{path.name}: {key!r} must be a {expected.__name__}, not {value!r}")
    tuples = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    try:
        tuples["differences"] = tuple(
            Difference(**{**entry, "suites": tuple(entry["suites"]), "cases": tuple(entry["cases"])})
            for entry in values.get("differences", ())
        )
    except (KeyError, TypeError) as error:
        raise SpecError(
            f"{path.name}: an entry of 'differences' must have suites, cases, finding and reason ({error})"
        ) from error
    try:
        gates = {name: Gate(**gate) for name, gate in values.pop("gates", {}).items()}
    except (TypeError, ValueError) as error:
        raise SpecError(f"{path.name}: an entry of 'gates' must have goal and limit ({error})") from error
    if unknown := gates.keys() - GATES.keys():
        raise SpecError(f"{path.name}: 'gates' has {', '.join(unknown)}: use {', '.join(GATES)}")
    return ModelSpec(name=path.stem, **{**values, **tuples, "gates": {**GATES, **gates}})


def load_all() -> dict[str, ModelSpec]:
    """All models, by name."""
    return {path.stem: load(path) for path in sorted(FOLDER.glob("*.yaml"))}
