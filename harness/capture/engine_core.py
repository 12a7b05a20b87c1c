"""What the plugin wraps in the engine-core process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from harness.capture.patches import Patch
from harness.capture.settings import CONNECTOR

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor import Executor
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    from harness.capture.scheduler import SchedulerCapture


def _activate(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def initialise(self: Executor, vllm_config: VllmConfig) -> None:
        from harness.capture.connector import activated  # imports the scheduler, which is not for every process

        with activated(self, vllm_config):
            original(self, vllm_config)

    return initialise


def _one_reply(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def init_ec_output_aggregator(self: Executor) -> None:
        if not _captures(self.vllm_config):
            original(self)

    return init_ec_output_aggregator


def _captures(config: VllmConfig) -> bool:
    return config.ec_transfer_config is not None and config.ec_transfer_config.ec_connector == CONNECTOR


def _capture_of(scheduler: Scheduler) -> SchedulerCapture | None:
    if not _captures(scheduler.vllm_config):
        return None
    capture: SchedulerCapture = scheduler.ec_connector.capture
    return capture


def _read_early(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def preprocess_add_request(self: EngineCore, request: EngineCoreRequest) -> tuple[Request, int]:
        made, wave = original(self, request)
        if made.mm_features and _captures(self.vllm_config):
            self.scheduler.ec_connector.capture.expect(made)
        return made, wave

    return preprocess_add_request


def _deliver(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def update_from_output(
        self: Scheduler, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        capture = _capture_of(self)
        if capture is None:
            return original(self, scheduler_output, model_runner_output)
        outputs: dict[int, EngineCoreOutputs] = {}
        capture.begin_update()
        try:
            outputs = original(self, scheduler_output, model_runner_output)
        finally:
            capture.end_update(outputs.values())
        return outputs

    return update_from_output


def _forget(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def reset_encoder_cache(self: Scheduler) -> None:
        original(self)
        if (capture := _capture_of(self)) is not None:
            capture.reset()

    return reset_encoder_cache


def install_stats() -> None:
    """Adds `EngineCore.mm_embedding_stats`, which clients reach with `call_utility("mm_embedding_stats")`."""
    from vllm.v1.engine.core import EngineCore

    def mm_embedding_stats(self: EngineCore) -> dict[str, int] | None:
        """SchedulerCapture.stats(); None where capture is off."""
        capture = _capture_of(self.scheduler)
        return None if capture is None else capture.stats()

    EngineCore.mm_embedding_stats = mm_embedding_stats


PATCHES = (
    Patch(
        "vllm.v1.executor.abstract",
        "Executor.__init__",
        ("self", "vllm_config"),
        _activate,
        "The encoder-cache connector must be in the configuration before workers are made and after the configuration "
        "was validated: validating a consumer sets enable_mm_embeds, and clients could send embeddings.",
        "an encoder-cache connector can observe without being a producer or a consumer",
    ),
    Patch(
        "vllm.v1.executor.abstract",
        "Executor.init_ec_output_aggregator",
        ("self",),
        _one_reply,
        "With it every worker replies at every step, with the tokens, and the engine core waits for them all, to join "
        "what their connectors report. Ours report nothing; with tensor parallel 2 it takes 4 % of the throughput. "
        "Without it an error of a worker that does not reply shows as late as in an engine without a connector.",
        "connectors can say that they report nothing, as KVOutputAggregator.from_connector asks them",
    ),
    Patch(
        "vllm.v1.engine.core",
        "EngineCore.preprocess_add_request",
        ("self", "request"),
        _read_early,
        "Connectors first see a request when it is scheduled, and the GPU waits for what they do then. Where the "
        "engine core has a process of its own, this runs in the thread that takes requests in, beside the forward.",
        "connectors are told of requests that arrive",
    ),
    Patch(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
        _deliver,
        "The connector's hooks see a request's end only, and a request that a stop string ends has no output then. "
        "The handle must go with its first output.",
        "connectors may add ec_transfer_params to any output",
    ),
    Patch(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.reset_encoder_cache",
        ("self",),
        _forget,
        "New weights make what was captured stale; connectors are not told.",
        "connectors have a hook for it",
    ),
)
