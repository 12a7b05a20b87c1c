"""The model under test and the engines that it runs in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness import cases
from harness.engine import Arm, Engine, EngineSpec, Interface, Request
from harness.matrix import ModelSpec

KV_CACHE_BYTES = 2 << 30
"""Of each engine on a GPU: several live beside each other."""


class EnginePool:
    """Running engines, shared by spec; the least recently used one goes when there are too many.

    Args:
        folder: for their logs.
        progress: gets a line at each start.
        most: how many may live at once.
    """

    def __init__(self, folder: Path, progress: Callable[[str], None], most: int = 2) -> None:
        self._folder = folder
        self._progress = progress
        self._most = most
        self._engines: dict[EngineSpec, Engine] = {}
        self._started = 0

    def get(self, spec: EngineSpec) -> Engine:
        """The engine of that spec, started if it is not running.

        Raises:
            EngineError: it did not start.
        """
        engine = self._engines.pop(spec, None)
        if engine is not None and not engine.usable:
            engine.shutdown()
            engine = None
        if engine is None:
            while len(self._engines) >= self._most:
                self._engines.pop(next(iter(self._engines))).shutdown()
            self._started += 1
            engine = Engine(spec, self._folder / f"{self._started}.log", self._progress)
        self._engines[spec] = engine
        return engine

    def shutdown(self) -> None:
        """Ends them all."""
        for engine in self._engines.values():
            engine.shutdown()
        self._engines.clear()


@dataclass(frozen=True)
class Subject:
    """One model.

    Attributes:
        spec: what is known of it.
        path: of the checkpoint.
        pool: of engines.
        embedded: whether the checkpoint is a tiny one of ours, and not the user's.
    """

    spec: ModelSpec
    path: Path
    pool: EnginePool
    embedded: bool

    def engine(
        self,
        arm: Arm = Arm.CAPTURING,
        interface: Interface = Interface.LLM,
        *,
        in_process: bool = True,
        **options: Any,
    ) -> Engine:
        """An engine of this model, shared with every test that asks for the same."""
        options = {"max_num_seqs": 8, "enforce_eager": True, "seed": 0, **self.spec.engine_options, **options}
        if self.embedded:
            options.setdefault("dtype", "float32")
        if torch.cuda.is_available():
            # A fixed cache instead of what is free: vLLM need not measure that, which fails when an engine beside it
            # ends meanwhile. The utilization is only what must be free at the start.
            options = {"kv_cache_memory_bytes": KV_CACHE_BYTES, "gpu_memory_utilization": 0.15, **options}
        environment = (("HF_HUB_OFFLINE", "1"), ("VLLM_CPU_KVCACHE_SPACE", "1"))
        pairs = tuple(sorted(options.items()))
        return self.pool.get(EngineSpec(str(self.path), arm, interface, in_process, _Frozen(pairs), environment))

    def request(self, *parts: cases.Part, **params: Any) -> Request:
        """A greedy request of these texts and media; `params` for SamplingParams."""
        return Request(cases.prompt(self.spec, parts), {"temperature": 0.0, "max_tokens": 4, **params})


class _Frozen(tuple[tuple[str, Any], ...]):
    """Options with values that cannot be hashed (limit_mm_per_prompt), compared by what they print."""

    __slots__ = ()

    def __hash__(self) -> int:
        return hash(repr(self))
