"""The plugin's options on vLLM's own configuration: EngineArgs, MultiModalConfig and the command line."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

from harness.capture.patches import Patch, install, vllm_version
from harness.capture.settings import OPTIONS, CaptureSettings


def install_options_on_multimodal_config() -> None:
    """Lets `MultiModalConfig(enable_return_mm_embedding=True, ...)` be written."""
    from vllm.config.multimodal import MultiModalConfig

    vllm_version()
    _accept_options(MultiModalConfig)


def install_options_on_engine_args() -> None:
    """Lets `EngineArgs`, `LLM` and `vllm serve` take the options."""
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    vllm_version()
    install(PATCHES)
    _accept_options(EngineArgs)
    _accept_options(AsyncEngineArgs)


def _accept_options(cls: Any) -> None:
    """Makes a dataclass take the options as keyword arguments and have them as attributes.

    Not as fields: a dataclass is complete when it is made. Hence `dataclasses.replace` drops them, pickle and deepcopy
    keep them.
    """
    original = cls.__init__
    if getattr(original, "_takes_mm_embedding_options", False):
        return

    @functools.wraps(original)
    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        given = {option.name: kwargs.pop(option.name) for option in OPTIONS if option.name in kwargs}
        original(self, *args, **kwargs)
        for name, value in given.items():
            setattr(self, name, value)

    initialise._takes_mm_embedding_options = True  # type: ignore[attr-defined]
    cls.__init__ = initialise
    for option in OPTIONS:
        if option.name not in cls.__dict__:
            setattr(cls, option.name, option.default)


def _with_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        group = parser.add_argument_group(
            title="vllm-mm-embedding", description="Return the multimodal encoder's embeddings (plugin)."
        )
        for option in OPTIONS:
            flag = "--" + option.name.replace("_", "-")
            if isinstance(option.default, bool):
                group.add_argument(
                    flag, action=argparse.BooleanOptionalAction, default=option.default, help=option.help
                )
            else:
                group.add_argument(flag, type=float, default=option.default, help=option.help)
        return parser

    return add_cli_args


def _from_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_cli_args(cls: type, args: argparse.Namespace) -> Any:
        engine_args = original(cls, args)
        for option in OPTIONS:
            if hasattr(args, option.name):
                setattr(engine_args, option.name, getattr(args, option.name))
        return engine_args

    return from_cli_args


def _to_config(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_engine_config(self: Any, usage_context: Any = None, headless: bool = False) -> Any:
        vllm_config = original(self, usage_context, headless)
        multimodal_config = vllm_config.model_config.multimodal_config
        if multimodal_config is not None:
            for option in OPTIONS:
                setattr(multimodal_config, option.name, getattr(self, option.name))
        elif self.enable_return_mm_embedding:
            raise ValueError(
                f"enable_return_mm_embedding is not possible here: {self.model} is a text-only model; use a multimodal "
                "one."
            )
        CaptureSettings.of(vllm_config)  # refuses here, in the user's process, before any other is started
        return vllm_config

    return create_engine_config


_REMOVE_WHEN = "vLLM has enable_return_mm_embedding itself, or a hook for a plugin's engine arguments"

PATCHES = (
    Patch(
        "vllm.engine.arg_utils",
        "EngineArgs.add_cli_args",
        ("parser",),
        _with_flags,
        "The flags of `vllm serve`. Platform plugins have a hook for the parser, general plugins have none.",
        _REMOVE_WHEN,
    ),
    Patch(
        "vllm.engine.arg_utils",
        "EngineArgs.from_cli_args",
        ("cls", "args"),
        _from_flags,
        "It copies dataclass fields only, and the options are no fields.",
        _REMOVE_WHEN,
    ),
    Patch(
        "vllm.engine.arg_utils",
        "EngineArgs.create_engine_config",
        ("self", "usage_context", "headless"),
        _to_config,
        "The options must get from the arguments to the configuration, which travels to all processes, and a "
        "configuration that cannot capture must be refused before processes are started.",
        _REMOVE_WHEN,
    ),
)
