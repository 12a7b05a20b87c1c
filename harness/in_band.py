"""A prototype of capture, as one would write it first: an arm of the benchmarks, and nothing that is used elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.ec_transfer.ec_connector.base import (
    ECConnectorBase,
    ECConnectorMetadata,
    ECConnectorRole,
    ECConnectorWorkerMetadata,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ECConnectorOutput
    from vllm.v1.request import Request


class _Nothing(ECConnectorMetadata):
    """For the worker, which saves all that it encodes."""


@dataclass
class _Rows(ECConnectorWorkerMetadata):
    """Encoder outputs of a step, by identifier."""

    rows: dict[str, bytes] = field(default_factory=dict)

    def aggregate(self, other: ECConnectorWorkerMetadata) -> ECConnectorWorkerMetadata:
        """Of ranks that all have the same."""
        return self if self.rows else other


class InBandConnector(ECConnectorBase):
    """The prototype: a blocking copy of each output, all of its columns, and bytes with the finished request."""

    def __init__(self, vllm_config: VllmConfig, role: ECConnectorRole) -> None:
        super().__init__(vllm_config, role)
        self._new: dict[str, bytes] = {}
        self._known: dict[str, bytes] = {}

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **_: Any) -> None:
        """Nothing is loaded."""

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **_: Any) -> None:
        """Copies at once."""
        self._new[mm_hash] = encoder_cache[mm_hash].cpu().view(torch.uint8).numpy().tobytes()

    def build_connector_worker_meta(self) -> _Rows:
        """What was saved in this step."""
        rows, self._new = self._new, {}
        return _Rows(rows)

    def has_cache_item(self, identifier: str) -> bool:
        """Nothing is loaded."""
        del identifier
        return False

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        """Nothing is loaded."""

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> ECConnectorMetadata:
        """Nothing to tell."""
        del scheduler_output
        return _Nothing()

    def update_connector_output(self, connector_output: ECConnectorOutput) -> None:
        """Keeps the bytes until their request ends."""
        meta = connector_output.ec_connector_worker_meta
        if isinstance(meta, _Rows):
            self._known |= meta.rows

    def request_finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        """The bytes go to the client, as RequestOutput.ec_transfer_params."""
        found = {f.identifier: self._known.pop(f.identifier, b"") for f in request.mm_features}
        return False, found or None
