"""Worker side: copies what the scheduler asks for from the model's encoder cache into the shared memory."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from vllm.distributed.parallel_state import get_pcp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.platforms import current_platform

from harness.capture.store import Item
from harness.capture.transport import Address, Block
from harness.capture.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from harness.capture.scheduler import StepPlan

logger = init_logger("vllm.mm_embedding")


class WorkerCapture:
    """Runs in every worker; only one of those that hold the same encoder output copies it."""

    def __init__(self) -> None:
        self._writers: dict[Address, Writer] = {}

    def copy(self, plan: StepPlan, encoder_cache: Mapping[str, Tensor]) -> None:
        """Copies the items of one step. Must run after the encoder and before the step's end.

        An item that is not there, or has another shape than planned, is stamped as failed: its requests end with an
        error. Raising would hide the encoder's own error, which is the likely reason.
        """
        if not plan.copies or not self._is_first_rank:
            return
        writer = self._writer(plan.owner)
        copies: list[tuple[Block, Tensor]] = []
        for item, block in plan.copies:
            rows = _rows(item, encoder_cache.get(item.identifier), plan.whole)
            if rows is None:
                writer.fail(block)
            else:
                copies.append((block, rows))
        writer.write_many(copies)

    def load(self, plan: StepPlan, encoder_cache: dict[str, Tensor]) -> None:
        """Puts kept items into the encoder cache, on every rank. Must run before the encoder's output is used.

        Prepares new segments too: before the encoder runs, so that they are ready when its output is copied.
        """
        if plan.prepare and self._is_first_rank:
            self._writer(plan.owner).prepare(plan.prepare)
        for item, block in plan.loads:
            shape = (item.num_rows, item.width)
            encoder_cache[item.identifier] = self._writer(plan.owner).fetch(block, shape, getattr(torch, item.dtype))

    @functools.cached_property
    def _is_first_rank(self) -> bool:
        return get_tensor_model_parallel_rank() == 0 and get_pcp_group().rank_in_group == 0

    def _writer(self, owner: Address) -> Writer:
        if owner not in self._writers:
            self._writers[owner] = Writer(owner, current_platform.device_type)
        return self._writers[owner]

    def close(self) -> None:
        """Unmaps the shared memory."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


def _rows(item: Item, output: Tensor | None, whole: bool) -> Tensor | None:
    """The planned columns of an encoder output, (num_rows, width) in the engine's dtype. `whole`: it has no others."""
    if output is None or output.ndim != 2 or output.shape[0] != item.num_rows:
        found = "nothing" if output is None else f"shape {tuple(output.shape)}"
        logger.error("Encoder output of item %s: expected %d rows, found %s.", item.identifier, item.num_rows, found)
        return None
    width = output.shape[1]
    if whole and width > item.width:
        logger.error(
            "Encoder output of item %s has %d columns, %d of them known: leave enable_mm_embedding_reuse out here.",
            *(item.identifier, width, item.width),
        )
        return None
    if width < item.width:
        # Levels are asked for and this item has none (audio beside images, an image given as its embeddings): zeros,
        # which is what the language model adds there.
        output = torch.nn.functional.pad(output, (0, item.width - width))
    rows, dtype = output[:, : item.width], getattr(torch, item.dtype)
    return rows if rows.dtype == dtype else rows.to(dtype)
