"""Embedded checkpoints: built on the spot from the real model classes, with weights of a fixed seed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import safetensors

if TYPE_CHECKING:
    import torch

CACHE_VARIABLE = "VLLM_MM_EMBEDDING_CACHE"
"""Environment variable with the folder for built checkpoints."""

MARKER = "vllm-mm-embedding.json"
"""File in a built folder: recipe, size, dtype and version of what was built there."""

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
    complete or not there at all, also when several processes build it at once. Nothing that is there is overwritten.

    Args:
        recipe: one of recipes.NAMES.
        folder: where to put it, missing or empty; a folder of its own in `cache_folder()` by default.
        size: "tiny", or "full" for the published model's dimensions.
        dtype: of the weights, by torch's name.

    Raises:
        CheckpointError: no such recipe or dtype, the folder holds something else or cannot be written.
    """
    wanted = {"recipe": recipe, "size": size, "dtype": dtype, "version": _version()}
    target = folder or cache_folder() / "-".join(wanted.values())
    if _is_there(target, wanted):
        return target
    _check(recipe, dtype)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as staging:
            built = Path(staging) / "built"  # mkdtemp's own folder would be the owner's only
            built.mkdir()
            (built / MARKER).write_text(json.dumps(wanted, indent=1) + "\n")
            _save(recipe, built, size, dtype)
            for path in built.iterdir():  # so would safetensors' files
                path.chmod((built / MARKER).stat().st_mode & 0o777)
            try:
                built.rename(target)
            except OSError:
                if not _is_there(target, wanted):  # otherwise another process was faster
                    raise
    except Exception as error:
        # On a full disk safetensors raises an error of its own, tokenizers a bare Exception.
        if not isinstance(error, OSError | safetensors.SafetensorError) and type(error) is not Exception:
            raise
        where = "name another folder" if folder else f"set {CACHE_VARIABLE} to another folder"
        raise CheckpointError(
            f"cannot build the checkpoint {recipe} in {target.parent} ({error}): make room there or {where}"
        ) from error
    return target


def _is_there(target: Path, wanted: dict[str, str]) -> bool:
    """Whether the folder is the wanted checkpoint; False if it can be built there.

    Raises:
        CheckpointError: it is something else.
    """
    try:
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return False
        found = json.loads((target / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found == wanted:
        return True
    if isinstance(found, dict) and found.keys() == wanted.keys():
        what = "the checkpoint " + ", ".join(f"{key} {found[key]}" for key in wanted)
    else:
        what = "something else"
    raise CheckpointError(
        f"{target} holds {what}, not {', '.join(f'{key} {value}' for key, value in wanted.items())}: "
        "move it away or name another folder"
    )


def _check(recipe: str, dtype: str) -> None:
    import torch

    from harness.checkpoints import recipes

    if recipe not in recipes.NAMES:
        raise CheckpointError(f"there is no recipe {recipe!r}: use one of {', '.join(recipes.NAMES)}")
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CheckpointError(f"{dtype!r} is no dtype of weights: use float32, bfloat16 or float16")


def _save(recipe: str, folder: Path, size: Size, dtype: str) -> None:
    import torch

    from harness.checkpoints import recipes, weights

    made = recipes.load(recipe, full=size == "full")
    if size == "tiny":
        with torch.device("cpu"):
            model = made.model_class(made.config).float()
        weights.fill(model)
        model = model.to(getattr(torch, dtype))
    else:
        model = _full_size(made.model_class, made.config, getattr(torch, dtype))
    model.save_pretrained(folder)
    _rename(folder, made.rename)
    made.processor.save_pretrained(folder)
    for name, text in made.extra.items():
        (folder / name).write_text(text)


def _rename(folder: Path, prefixes: Mapping[str, str]) -> None:
    """Renames the parameters in the checkpoint's files by their prefix."""
    if not prefixes:
        return
    from safetensors.torch import load_file, save_file

    def renamed(name: str) -> str:
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        return prefixes.get(prefix, "") + name.removeprefix(prefix)

    for path in folder.glob("*.safetensors"):
        save_file({renamed(name): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {renamed(name): file for name, file in content["weight_map"].items()}
        index.write_text(json.dumps(content, indent=2) + "\n")


def _full_size(model_class: Any, config: Any, dtype: torch.dtype) -> Any:
    """Torch's generator: billions of weights of the numpy one would take minutes, and no golden pins them."""
    import torch

    from harness.checkpoints import weights

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
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, weights.fan_in(name, parameter) ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _version() -> str:
    import transformers

    sources = sorted(Path(__file__).parent.rglob("*.py"))
    content = b"".join(path.read_bytes() for path in sources) + transformers.__version__.encode()
    return hashlib.sha256(content).hexdigest()[:12]
