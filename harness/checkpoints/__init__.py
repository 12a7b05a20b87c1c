"""Embedded checkpoints: built on the spot from the real model classes, with weights of a fixed seed."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

CACHE_VARIABLE = "VLLM_MM_EMBEDDING_CACHE"
"""Environment variable with the folder for built checkpoints."""

Size = Literal["tiny", "full"]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be built; one sentence that says where and what to change."""


def cache_folder() -> Path:
    """$VLLM_MM_EMBEDDING_CACHE, or a folder in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-mm-embedding"
    return Path(os.environ.get(CACHE_VARIABLE) or default)


def build(recipe: str, folder: Path | None = None, *, size: Size = "tiny", dtype: str = "float32") -> Path:
    """The folder of a checkpoint, built if it is not there.

    Another version of this package or of transformers builds another folder, so that a stale one is never used. It is
    complete or not there at all, also when several processes build it at once.

    Args:
        recipe: name in recipes.RECIPES.
        folder: where to put it; a folder of its own in `cache_folder()` by default.
        size: "tiny", or "full" for the published model's dimensions.
        dtype: of the weights, by torch's name.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    target = folder or cache_folder() / f"{recipe}-{size}-{dtype}-{_version()}"
    if (target / "config.json").exists():
        return target
    staging = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        _save(recipe, staging, size, dtype)
        try:
            staging.rename(target)
        except OSError:
            if not (target / "config.json").exists():  # otherwise another process was faster
                raise
    except (OSError, RuntimeError) as error:
        # safetensors reports a full disk as an error of its own.
        raise CheckpointError(
            f"cannot build the checkpoint {recipe} in {target.parent} ({error}): make room or set {CACHE_VARIABLE} to "
            "another folder"
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return target


def _save(recipe: str, folder: Path, size: Size, dtype: str) -> None:
    import torch

    from harness.checkpoints import recipes, weights

    model_class, config, processor = recipes.RECIPES[recipe](size == "full")
    if size == "tiny":
        with torch.device("cpu"):
            model = model_class(config).float()
        weights.fill(model)
        model = model.to(getattr(torch, dtype))
    else:
        model = _full_size(model_class, config, getattr(torch, dtype))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _full_size(model_class: Any, config: Any, dtype: torch.dtype) -> Any:
    """Torch's generator: billions of weights of the numpy one would take minutes, and no golden pins them."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = model_class._from_config(config, dtype=dtype)
        finally:
            torch.set_default_dtype(previous)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _version() -> str:
    import transformers

    sources = sorted(Path(__file__).parent.glob("*.py"))
    content = b"".join(path.read_bytes() for path in sources) + transformers.__version__.encode()
    return hashlib.sha256(content).hexdigest()[:12]
