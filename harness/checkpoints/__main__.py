"""`python -m harness.checkpoints RECIPE FOLDER [--size full] [--dtype bfloat16]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.checkpoints import CheckpointError, build
from harness.checkpoints.recipes import NAMES

parser = argparse.ArgumentParser(description="Build an embedded checkpoint.")
parser.add_argument("recipe", choices=NAMES)
parser.add_argument("folder", type=Path)
parser.add_argument("--size", choices=["tiny", "full"], default="tiny")
parser.add_argument("--dtype", default="float32")
arguments = parser.parse_args()
try:
    build(arguments.recipe, arguments.folder, size=arguments.size, dtype=arguments.dtype)
except CheckpointError as error:
    sys.exit(str(error))
