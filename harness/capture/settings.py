"""What a user can set: four engine options and two keys of a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.config import VllmConfig

RETURN = "return_mm_embedding"
"""Key of SamplingParams.extra_args: False opts a request out of capture."""

RETURN_LEVELS = "return_mm_embedding_levels"
"""Key of SamplingParams.extra_args: True asks for the deepstack levels too."""

READER = "mm_embedding_reader"
"""Key of SamplingParams.extra_args, set by the frontend: where it is (transport.whereabouts)."""


@dataclass(frozen=True)
class Option:
    """An engine option that the plugin adds to EngineArgs, MultiModalConfig and the command line.

    Attributes:
        name: of the keyword argument and attribute; the flag is `--` and the name with dashes.
        default: also tells the type.
        help: for `vllm serve --help`.
    """

    name: str
    default: bool | float
    help: str


OPTIONS = (
    Option(
        "enable_return_mm_embedding",
        False,
        "Return the multimodal encoder's embeddings with each finished completion, as `completion.mm_embedding`.",
    ),
    Option(
        "mm_embedding_cache_gb",
        1.0,
        "GiB of CPU memory for embeddings that no request needs any more, kept so that a prefix-cache hit need not "
        "encode their items again. 0 keeps none.",
    ),
    Option(
        "mm_embedding_memory_gb",
        4.0,
        "GiB of CPU memory for all captured embeddings, the kept ones included. At the cap, requests wait.",
    ),
    Option(
        "enable_mm_embedding_reuse",
        False,
        "Load an item that left the GPU's encoder cache from the kept embeddings instead of encoding it again. They "
        "are kept with the deepstack levels then, which the language model needs.",
    ),
)


@dataclass(frozen=True)
class CaptureSettings:
    """The options of one engine, checked.

    Attributes:
        enabled: whether the engine captures.
        cache_bytes: cap of the embeddings that are kept for re-use.
        memory_bytes: cap of all captured embeddings.
        reuse: whether kept embeddings are loaded into the GPU's encoder cache.
    """

    enabled: bool
    cache_bytes: int
    memory_bytes: int
    reuse: bool = False

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> CaptureSettings:
        """Reads the options from `vllm_config.model_config.multimodal_config`, which travels to every process.

        Raises:
            ValueError: an option is out of range, or the engine cannot capture. One sentence that names the option.
        """
        model_config = vllm_config.model_config
        options = getattr(model_config, "multimodal_config", None)
        enabled, cache_gb, memory_gb, reuse = (getattr(options, option.name, option.default) for option in OPTIONS)
        if not enabled:
            if reuse:
                raise ValueError(
                    "enable_mm_embedding_reuse loads what was captured: set enable_return_mm_embedding too, or leave "
                    "it out."
                )
            return cls(False, 0, 0)
        if cache_gb < 0:
            raise ValueError(f"mm_embedding_cache_gb is {cache_gb}: give 0 (keep none) or more.")
        if memory_gb <= 0:
            raise ValueError(f"mm_embedding_memory_gb is {memory_gb}: give more than 0.")
        if reason := cannot_capture(vllm_config):
            raise ValueError(f"enable_return_mm_embedding is not possible here: {reason}.")
        if reuse and getattr(options, "video_pruning_rate", None):
            raise ValueError(
                "enable_mm_embedding_reuse is not possible here: video_pruning_rate packs positions behind the "
                "embeddings, which are not kept; leave one of the two out."
            )
        return cls(True, int(cache_gb * 2**30), int(memory_gb * 2**30), bool(reuse))


def cannot_capture(vllm_config: VllmConfig) -> str | None:
    """Why an engine of this configuration cannot capture, or None."""
    from vllm import envs

    model_config, parallel_config = vllm_config.model_config, vllm_config.parallel_config
    ec_config, kv_config = vllm_config.ec_transfer_config, vllm_config.kv_transfer_config
    if model_config is None or model_config.multimodal_config is None:
        return f"{getattr(model_config, 'model', 'the model')} is a text-only model; use a multimodal one"
    if model_config.is_encoder_decoder:
        return (
            f"{model_config.model} is an encoder-decoder model, whose encoder output the decoder attends to and which "
            "has no embeddings among its input; use a decoder-only one"
        )
    if model_config.runner_type != "generate":
        return f"runner is {model_config.runner_type!r} and there are no completions; use runner='generate'"
    if model_config.multimodal_config.language_model_only:
        return "language_model_only turns the encoder off; leave it out"
    if ec_config is not None and ec_config.ec_connector not in (None, CONNECTOR):
        return f"ec_transfer_config has a connector of its own ({ec_config.ec_connector}); leave one of the two out"
    if kv_config is not None and kv_config.kv_role in ("kv_consumer", "kv_both"):
        return (
            f"kv_transfer_config has kv_role={kv_config.kv_role!r}, so that prompts arrive already computed and the "
            "encoder does not run; capture on the producer"
        )
    if parallel_config.nnodes > 1:
        return (
            f"nnodes is {parallel_config.nnodes}, and an engine's workers write to memory that they share with it; run "
            "one engine a host"
        )
    if envs.VLLM_USE_RUST_FRONTEND:
        return "VLLM_USE_RUST_FRONTEND is set, and that frontend passes no embeddings on; unset it"
    if parallel_config.distributed_executor_backend == "ray":
        return "distributed_executor_backend is 'ray'; use 'mp'"
    return None


CONNECTOR = "MMEmbeddingConnector"
"""Name of the encoder-cache connector that captures, as in ECTransferConfig.ec_connector."""


class RequestOptions(NamedTuple):
    """What one request asks for.

    Attributes:
        capture: return the embeddings.
        levels: return the deepstack levels too.
        reader: where the frontend is that reads them (transport.whereabouts), if it has told.
    """

    capture: bool
    levels: bool
    reader: str | None = None

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None) -> RequestOptions:
        """Reads `SamplingParams.extra_args`."""
        extra_args = extra_args or {}
        capture = bool(extra_args.get(RETURN, True))
        return cls(capture, capture and bool(extra_args.get(RETURN_LEVELS, False)), extra_args.get(READER))
