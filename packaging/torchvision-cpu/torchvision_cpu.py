"""Lets a torchvision that was built for CUDA be imported next to CPU torch (why: README.md)."""

# Runs at the start of every Python process of the environment: whatever is not needed to put the finder in place is
# imported where it is used.
from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


# The operators whose existence torchvision's Python code takes for granted at import, and their schema (all the others
# it asks for only when its compiled code is there).
OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class Finder:
    """Finds torchvision where Python finds it, and calls `define_operators` just before its code runs."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The ordinary spec of torchvision with that one addition; None for every other module."""
        if name != "torchvision":
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None or spec.submodule_search_locations is None:
            return spec
        run, folders = spec.loader.exec_module, spec.submodule_search_locations

        def exec_module(module: ModuleType) -> None:
            define_operators(folders)
            run(module)

        # On the loader and not at once: whoever only asks whether torchvision is installed imports no torch.
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def define_operators(folders: Iterable[str]) -> list[str]:
    """Define the operator schemas that torchvision's Python code needs, if its compiled code cannot bring them.

    Args:
        folders: where the package torchvision lies.

    Returns:
        The names defined: none where torch has a GPU runtime or where the compiled operators load.
    """
    from pathlib import Path

    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return []
    try:
        for library in (file for folder in folders for file in Path(folder).glob("_C*.so")):
            torch.ops.load_library(library)  # what torchvision does next; the second time is free
    except OSError:
        pass  # built for a device that this torch does not have
    missing = [name for name in OPERATORS if not hasattr(torch.ops.torchvision, name)]
    for name in missing:
        torch.library.define(f"torchvision::{name}", SCHEMA)
    return missing


def install() -> None:
    """Put the finder first, once."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
