"""How fast this GPU copies to pinned memory: the bytes of the embeddings over it bound what capture can cost."""

from __future__ import annotations

import functools
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor

import torch

_COPIES = 20
_NBYTES = 64 << 20


@functools.cache
def pinned_bandwidth() -> float | None:
    """Bytes a second from the GPU to pinned memory, the median of copies of 64 MiB; None without a GPU.

    Measured in a process of its own, whose CUDA context, about 0.5 GB of the GPU's memory, goes with it.
    """
    if not torch.cuda.is_available():
        return None
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure).result()


def _measure() -> float:
    source = torch.empty(_NBYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty(_NBYTES, dtype=torch.uint8, pin_memory=True)
    milliseconds = []
    for _ in range(_COPIES):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        target.copy_(source, non_blocking=True)
        ended.record()
        ended.synchronize()
        milliseconds.append(began.elapsed_time(ended))
    return _NBYTES / statistics.median(milliseconds) * 1000
