"""What a user can set, and what is refused, of configurations without an engine."""

from __future__ import annotations

import operator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vllm.config import VllmConfig

from harness.capture.settings import CONNECTOR, OPTIONS, CaptureSettings, RequestOptions, cannot_capture

ON = {"enable_return_mm_embedding": True}


def config_of(**multimodal: Any) -> Any:
    """Of one engine, whose options have their defaults where `multimodal` has none."""
    options = {option.name: option.default for option in OPTIONS}
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model="org/name",
            is_encoder_decoder=False,
            runner_type="generate",
            multimodal_config=SimpleNamespace(language_model_only=False, **{**options, **multimodal}),
        ),
        parallel_config=SimpleNamespace(nnodes=1, distributed_executor_backend="mp"),
        ec_transfer_config=None,
        kv_transfer_config=None,
    )


def settings_of(config: Any) -> CaptureSettings:
    return CaptureSettings.of(cast(VllmConfig, config))


def test_options_are_read_in_bytes() -> None:
    options = {"mm_embedding_cache_gb": 0.5, "mm_embedding_memory_gb": 3, "enable_mm_embedding_reuse": True}
    assert settings_of(config_of(**ON, **options)) == CaptureSettings(True, 1 << 29, 3 << 30, reuse=True)
    assert settings_of(config_of(**ON)) == CaptureSettings(True, 1 << 30, 4 << 30, reuse=False)
    assert settings_of(config_of(**ON, mm_embedding_cache_gb=0)).cache_bytes == 0


def test_nothing_is_asked_of_an_engine_without_capture() -> None:
    off = CaptureSettings(False, 0, 0)
    assert settings_of(config_of(mm_embedding_memory_gb=0)) == off
    assert settings_of(SimpleNamespace(model_config=SimpleNamespace(multimodal_config=None))) == off
    assert settings_of(SimpleNamespace(model_config=None)) == off


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_mm_embedding_reuse": True}, "^enable_mm_embedding_reuse .*: set enable_return_mm_embedding too"),
        ({**ON, "mm_embedding_cache_gb": -0.1}, "^mm_embedding_cache_gb is -0.1: give 0 "),
        ({**ON, "mm_embedding_memory_gb": 0}, "^mm_embedding_memory_gb is 0: give more than 0"),
        (
            {**ON, "enable_mm_embedding_reuse": True, "video_pruning_rate": 0.5},
            "^enable_mm_embedding_reuse is not possible here: video_pruning_rate ",
        ),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(config_of(**options))


def test_pruned_videos_are_captured_where_nothing_is_loaded_again() -> None:
    assert settings_of(config_of(**ON, video_pruning_rate=0.5)).enabled


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("model_config", None, "the model is a text-only model"),
        ("model_config.multimodal_config", None, "org/name is a text-only model"),
        ("model_config.is_encoder_decoder", True, "encoder-decoder"),
        ("model_config.runner_type", "pooling", "runner is 'pooling'"),
        ("model_config.multimodal_config.language_model_only", True, "language_model_only"),
        ("ec_transfer_config", SimpleNamespace(ec_connector="Another"), "connector of its own (Another)"),
        ("kv_transfer_config", SimpleNamespace(kv_role="kv_consumer"), "kv_role='kv_consumer'"),
        ("kv_transfer_config", SimpleNamespace(kv_role="kv_both"), "kv_role='kv_both'"),
        ("parallel_config.nnodes", 2, "nnodes is 2"),
        ("parallel_config.distributed_executor_backend", "ray", "'ray'; use 'mp'"),
    ],
)
def test_what_cannot_capture(name: str, value: Any, reason: str) -> None:
    config = config_of(**ON)
    assert cannot_capture(config) is None
    owner, _, attribute = name.rpartition(".")
    setattr(operator.attrgetter(owner)(config) if owner else config, attribute, value)
    found = cannot_capture(config)
    assert found is not None
    assert reason in found
    if name not in ("model_config", "model_config.multimodal_config"):  # which has the options
        with pytest.raises(ValueError, match=r"^enable_return_mm_embedding is not possible here: "):
            settings_of(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ec_transfer_config", SimpleNamespace(ec_connector=CONNECTOR)),
        ("ec_transfer_config", SimpleNamespace(ec_connector=None)),
        ("kv_transfer_config", SimpleNamespace(kv_role="kv_producer")),
    ],
    ids=["its own connector", "no connector", "producer of prompts"],
)
def test_what_can(name: str, value: Any) -> None:
    config = config_of(**ON)
    setattr(config, name, value)
    assert cannot_capture(config) is None


def test_the_rust_frontend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert "VLLM_USE_RUST_FRONTEND" in str(cannot_capture(config_of(**ON)))


@pytest.mark.parametrize(
    ("extra_args", "expected"),
    [
        (None, RequestOptions(True, False, None)),
        ({}, RequestOptions(True, False, None)),
        ({"return_mm_embedding": False}, RequestOptions(False, False, None)),
        ({"return_mm_embedding_levels": True}, RequestOptions(True, True, None)),
        ({"return_mm_embedding": False, "return_mm_embedding_levels": True}, RequestOptions(False, False, None)),
        ({"return_mm_embedding": True, "mm_embedding_reader": "here"}, RequestOptions(True, False, "here")),
    ],
)
def test_what_a_request_asks_for(extra_args: dict[str, Any] | None, expected: RequestOptions) -> None:
    assert RequestOptions.of(extra_args) == expected
