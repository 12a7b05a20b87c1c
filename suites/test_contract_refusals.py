"""What cannot work is refused at start-up in one sentence that names the option; a native vLLM is left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from harness import checkpoints
from harness.pytest_plugin.subject import Subject

pytestmark = [pytest.mark.suite("contract"), pytest.mark.once, pytest.mark.clause("C12")]

PROGRAM = """
import json, os, sys
from vllm import EngineArgs
from vllm.config import ECTransferConfig, KVTransferConfig, MultiModalConfig
answers = {}
for name, options in json.loads(sys.argv[1]).items():
    environment = options.pop("environment", {})
    os.environ.update(environment)
    if "ec_transfer_config" in options:
        options["ec_transfer_config"] = ECTransferConfig(**options["ec_transfer_config"])
    try:
        config = EngineArgs(**options, enable_return_mm_embedding=True, enforce_eager=True).create_engine_config()
        answers[name] = f"accepted, enable_mm_embeds={config.model_config.multimodal_config.enable_mm_embeds}"
    except Exception as error:
        answers[name] = str(error)
    for variable in environment:
        del os.environ[variable]
answers["MultiModalConfig"] = MultiModalConfig(enable_return_mm_embedding=True).enable_return_mm_embedding
print("ANSWERS" + json.dumps(answers))
"""


def python(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def answers(subject: Subject) -> dict[str, str]:
    model = {"model": str(subject.path)}
    connector = {"ec_connector": "ECExampleConnector", "ec_role": "ec_producer"}
    attempts = {
        "possible": model,
        "text-only": {"model": str(checkpoints.build("qwen3_text"))},
        "encoder-decoder": {"model": str(checkpoints.build("whisper"))},
        "pooling": {**model, "runner": "pooling"},
        "another connector": {**model, "ec_transfer_config": connector},
        "rust frontend": {**model, "environment": {"VLLM_USE_RUST_FRONTEND": "1"}},
        "cache": {**model, "mm_embedding_cache_gb": -1.0},
        "memory": {**model, "mm_embedding_memory_gb": 0.0},
        "one engine on two hosts": {
            **model,
            "nnodes": 2,
            "tensor_parallel_size": 2,
            "distributed_executor_backend": "mp",
        },
        "engines on two hosts": {**model, "data_parallel_size": 2, "data_parallel_size_local": 1},
    }
    done = python(PROGRAM, json.dumps(attempts))
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    assert lines, done.stderr[-2000:]
    found: dict[str, str] = json.loads(lines[0].removeprefix("ANSWERS"))
    return found


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        ("text-only", ("enable_return_mm_embedding", "text-only model")),
        ("encoder-decoder", ("enable_return_mm_embedding", "encoder-decoder model")),
        ("pooling", ("enable_return_mm_embedding", "runner='generate'")),
        ("another connector", ("ec_transfer_config", "ECExampleConnector")),
        ("rust frontend", ("enable_return_mm_embedding", "VLLM_USE_RUST_FRONTEND")),
        ("cache", ("mm_embedding_cache_gb", "-1.0")),
        ("memory", ("mm_embedding_memory_gb", "0.0")),
        ("one engine on two hosts", ("enable_return_mm_embedding", "nnodes is 2")),
    ],
)
def test_refused_in_one_sentence(answers: dict[str, str], attempt: str, words: tuple[str, ...]) -> None:
    for word in words:
        assert word in answers[attempt]
    assert "\n" not in answers[attempt]


@pytest.mark.clause("C1")
def test_the_options_are_accepted_and_enable_mm_embeds_is_the_users(answers: dict[str, str]) -> None:
    assert answers["possible"] == "accepted, enable_mm_embeds=False"
    assert answers["engines on two hosts"].startswith("accepted, ")
    assert answers["MultiModalConfig"]


def test_an_unsupported_vllm_is_refused(subject: Subject) -> None:
    program = (
        "import vllm.version; vllm.version.__version__ = '0.99.0'\n"
        f"from vllm import LLM\nLLM({str(subject.path)!r}, enable_return_mm_embedding=True)"
    )
    done = python(program)
    assert done.returncode != 0
    assert "supports vLLM 0.32 and 0.33 and found 0.99.0" in done.stderr


NATIVE = """
import dataclasses, importlib, json, sys
from harness.capture.patches import when_imported

def make_native():
    config = sys.modules["vllm.config.multimodal"].MultiModalConfig
    field = dataclasses.field(default=False)
    field.name, field.type, field._field_type = "enable_return_mm_embedding", bool, dataclasses._FIELD
    config.__dataclass_fields__[field.name] = field

if sys.argv[1] == "native":
    when_imported("vllm.config.multimodal", make_native)  # before the plugin's own look at it
import vllm
from vllm.plugins import load_general_plugins
load_general_plugins()
from harness.capture import arguments, engine_core, frontend, http
from harness.capture.patches import _patch_of, _resolve
changed = []
for patch in (*arguments.PATCHES, *engine_core.PATCHES, *frontend.PATCHES, *http.PATCHES):
    if _patch_of(_resolve(patch)[1]) is not None:
        changed.append(patch.name)
from vllm.outputs import CompletionOutput
from vllm.config import MultiModalConfig
for owner in (CompletionOutput, MultiModalConfig, vllm.EngineArgs):
    added = [name for name in vars(owner) if name.startswith(("mm_embedding", "enable_return_mm_embedding"))]
    changed += [f"{owner.__name__}.{name}" for name in added]
print("CHANGED" + json.dumps(changed))
"""


def changed(vllm: str) -> list[str]:
    done = python(NATIVE, vllm)
    lines = [line for line in done.stdout.splitlines() if line.startswith("CHANGED")]
    assert lines, done.stderr[-2000:]
    found: list[str] = json.loads(lines[0].removeprefix("CHANGED"))
    return found


@pytest.mark.clause("C1")
def test_a_vllm_that_has_the_option_itself_is_left_alone() -> None:
    assert changed("released"), "nothing of the released vLLM is changed: the test could not fail"
    assert changed("native") == []
