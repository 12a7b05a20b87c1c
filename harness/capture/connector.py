"""The edge to vLLM: an encoder-cache connector that captures what passes by, and may load it again.

vLLM makes one for the scheduler and one for each worker. It is used as a consumer: a producer's language model is
turned off, and `ec_both` runs a dummy encode at start-up.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.config import ECTransferConfig
from vllm.distributed.ec_transfer import ensure_ec_transfer_shutdown, get_ec_transfer, has_ec_transfer
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase, ECConnectorMetadata, ECConnectorRole

from harness.capture.metrics import Changes, Poll, PromMetrics
from harness.capture.scheduler import SchedulerCapture, StepPlan
from harness.capture.settings import CONNECTOR, CaptureSettings
from harness.capture.worker import WorkerCapture

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.executor import Executor
    from vllm.v1.request import Request


class MMEmbeddingConnector(ECConnectorBase):
    """See the module. `capture` is the half of this process's role."""

    def __init__(self, vllm_config: VllmConfig, role: ECConnectorRole) -> None:
        super().__init__(vllm_config, role)
        self._encoder_cache: dict[str, torch.Tensor] = {}
        self.capture: Any = SchedulerCapture.of(vllm_config) if role is ECConnectorRole.SCHEDULER else WorkerCapture()
        self._poll = Poll(self.capture) if isinstance(self.capture, SchedulerCapture) else None
        # Without a plan vLLM's V2 model runner leaves the connector out of the step; others insist on one.
        self._no_plan: StepPlan | None = None
        if isinstance(self.capture, SchedulerCapture) and not _has_v2_model_runner(vllm_config):
            self._no_plan = self.capture.empty_plan()

    def shutdown(self) -> None:
        self.capture.close()

    # Worker.

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        self._encoder_cache = encoder_cache
        self.capture.load(self._plan(), encoder_cache)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any) -> None:
        pass  # called for new items only; the step's end sees all that the step uses

    def build_connector_worker_meta(self) -> None:
        self.capture.copy(self._plan(), self._encoder_cache)

    def _plan(self) -> StepPlan:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepPlan)
        return metadata

    # Scheduler.

    def has_cache_item(self, identifier: str) -> bool:
        return bool(self.capture.has(identifier))

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        self.capture.allocated(request.mm_features[index].identifier)

    def ensure_cache_available(self, request: Request, num_computed_tokens: int) -> bool:
        # Asked at every step for every multimodal request that runs, of which most are settled.
        capture: SchedulerCapture = self.capture
        return request.request_id in capture.settled or capture.admit(request, num_computed_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> ECConnectorMetadata | None:
        plan: StepPlan | None = self.capture.plan(scheduler_output)
        return self._no_plan if plan is None else plan

    def take_unavailable_requests(self) -> set[str]:
        unavailable: set[str] = self.capture.take_unavailable_requests()
        return unavailable

    def request_finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        self.capture.request_finished(request.request_id)
        return False, None

    def get_ec_connector_stats(self) -> Changes | None:
        return self._poll() if self._poll is not None else None  # a worker is asked too, and counts nothing

    # Frontend.

    @classmethod
    def build_ec_connector_stats(cls, data: dict[str, Any] | None = None) -> Changes:
        return Changes.for_log(data)

    @classmethod
    def build_prom_metrics(cls, *args: Any, **kwargs: Any) -> PromMetrics:
        return PromMetrics(*args, **kwargs)


def _has_v2_model_runner(vllm_config: VllmConfig) -> bool:
    """Whether the workers certainly have it: one that is not vLLM's own may have any."""
    worker = vllm_config.parallel_config.worker_cls
    return vllm_config.use_v2_model_runner and isinstance(worker, str) and worker.startswith("vllm.")


def transfer_config() -> ECTransferConfig:
    """The part of an engine's configuration that names the connector."""
    return ECTransferConfig(ec_connector=CONNECTOR, ec_connector_module_path=__name__, ec_role="ec_consumer")


_executors: weakref.WeakKeyDictionary[Executor, bool] = weakref.WeakKeyDictionary()
"""The engines of this process, and whether each captures. More than one only where vLLM runs in-process."""


@contextmanager
def activated(executor: Executor, vllm_config: VllmConfig) -> Iterator[None]:
    """Puts the connector into the configuration of an engine that captures; the body makes its workers.

    Raises:
        ValueError: the engine cannot capture.
        RuntimeError: it would share a process with an engine that captures. The worker's connector is a global of the
            process: an engine beside it would find it, and end at its first request.
    """
    settings = CaptureSettings.of(vllm_config)
    if _executors:
        gc.collect()  # engines that nobody has any more
    if any(_executors.values()) or (settings.enabled and _executors):
        raise RuntimeError(
            "an engine with enable_return_mm_embedding must be alone in its process: delete the other engine first, or "
            "unset VLLM_ENABLE_V1_MULTIPROCESSING=0."
        )
    if has_ec_transfer() and isinstance(get_ec_transfer(), MMEmbeddingConnector):
        ensure_ec_transfer_shutdown()  # left by an engine that is gone
    if settings.enabled:
        options = vllm_config.model_config.multimodal_config
        users = options.enable_mm_embeds, options.allow_missing_mm_embeddings
        vllm_config.ec_transfer_config = transfer_config()
        yield
        # A draft model's configuration is made and validated in there, and shares these options.
        options.enable_mm_embeds, options.allow_missing_mm_embeddings = users
    else:
        yield
    _executors[executor] = settings.enabled
