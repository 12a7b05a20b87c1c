"""`python -m harness.checkpoints RECIPE FOLDER [--size full] [--dtype bfloat16]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.checkpoints import build
from harness.checkpoints.recipes import RECIPES

parser = argparse.ArgumentParser(description="Build an embedded checkpoint.")
parser.add_argument("recipe", choices=sorted(RECIPES))
parser.add_argument("folder", type=Path)
parser.add_argument("--size", choices=["tiny", "full"], default="tiny")
parser.add_argument("--dtype", default="float32")
arguments = parser.parse_args()
build(arguments.recipe, arguments.folder, size=arguments.size, dtype=arguments.dtype)
