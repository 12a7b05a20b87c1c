"""How each family's checkpoint is built: a module a family, whose `build(full)` gives a Recipe."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from harness.checkpoints.recipes.base import Recipe

NAMES = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]) if module.name != "base")
"""The recipes that there are."""


def load(name: str, *, full: bool) -> Recipe:
    """The recipe of that name, small or of the published model's dimensions."""
    recipe: Recipe = importlib.import_module(f"{__name__}.{name}").build(full)
    return recipe
