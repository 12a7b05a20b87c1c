"""The model under test and the engines that it runs in."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import cases, observe
from harness.capture.settings import OPTIONS
from harness.compare import Tolerance
from harness.engine import Arm, Completion, Engine, EngineError, EngineSpec, Interface, Request
from harness.matrix import ModelSpec
from harness.media import Media, audio, image
from harness.observe import ProcessedItem
from harness.reference import Reference

KV_CACHE_BYTES = 2 << 30
"""Of each engine on a GPU: several live beside each other."""


PARALLEL = ("tensor_parallel_size", "data_parallel_size")
"""Options of engines with several workers."""

NUM_TOKENS = 6
"""Greedy tokens of a case: enough to notice a language model that is not the checkpoint's."""


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
            engine.wait()
        self._engines[spec] = engine
        return engine

    def together(self, specs: Iterable[EngineSpec]) -> list[Engine]:
        """Engines of these specs, all alive at once and no other, which would disturb what is measured.

        Raises:
            EngineError: one did not start.
        """
        wanted = list(specs)
        self._end([spec for spec, engine in self._engines.items() if spec not in wanted or not engine.usable])
        for spec in wanted:
            if spec not in self._engines:
                self._started += 1
                self._engines[spec] = Engine(spec, self._folder / f"{self._started}.log", self._progress)
        for spec in wanted:
            try:
                self._engines[spec].wait()
            except EngineError:
                del self._engines[spec]
                raise
        return [self._engines[spec] for spec in wanted]

    def again(self, engines: Iterable[Engine]) -> list[Engine]:
        """Other engines of the specs of these, which end: as `together`, started in this order.

        Raises:
            EngineError: one did not start.
        """
        specs = [engine.spec for engine in engines]
        self._end(specs)
        return self.together(specs)

    def shutdown(self) -> None:
        """Ends them all."""
        self._end(list(self._engines))

    def _end(self, specs: Sequence[EngineSpec]) -> None:
        ended = [self._engines.pop(spec) for spec in specs]
        with ThreadPoolExecutor(len(ended) or 1) as pool:
            list(pool.map(lambda engine: engine.shutdown(), ended))


@dataclass(frozen=True)
class Observed:
    """One case, run on an engine that captures.

    Attributes:
        completion: with embeddings, levels and the first greedy tokens.
        items: what vLLM's processor made of the media, in prompt order.
    """

    completion: Completion
    items: list[ProcessedItem]


@dataclass(frozen=True, eq=False)
class Subject:
    """One model.

    Attributes:
        spec: what is known of it.
        path: of the checkpoint.
        pool: of engines.
        embedded: whether the checkpoint is a tiny one of ours, and not the user's.
        thorough: whether the tests run that start many engines for what does not depend on the model.
        reference_device: of the Hugging Face encoder.
        user_options: keyword arguments of EngineArgs that the user set for all engines of the session.
    """

    spec: ModelSpec
    path: Path
    pool: EnginePool
    embedded: bool
    thorough: bool
    reference_device: str = "cpu"
    user_options: Mapping[str, Any] = field(default_factory=dict)
    _observed: dict[str, Observed] = field(default_factory=dict)
    _processed: dict[str, dict[str, Any]] = field(default_factory=dict)
    _references: dict[torch.dtype, Reference] = field(default_factory=dict)

    def engine(
        self,
        arm: Arm = Arm.CAPTURING,
        interface: Interface = Interface.LLM,
        *,
        in_process: bool = True,
        **options: Any,
    ) -> Engine:
        """An engine of this model, shared with every test that asks for the same."""
        return self.pool.get(self.engine_spec(arm, interface, in_process=in_process, **options))

    def engine_spec(
        self, arm: Arm = Arm.CAPTURING, interface: Interface = Interface.LLM, *, in_process: bool = True, **options: Any
    ) -> EngineSpec:
        """What `engine` starts."""
        if _is_data_parallel({**options, **self.user_options}):
            interface, in_process = Interface.ASYNC_LLM, False  # vLLM's LLM refuses data_parallel_size
        options = {"max_num_seqs": 8, "enforce_eager": True, "seed": 0, **self.spec.engine_options, **options}
        if in_process:
            # So that the processor's output is there to read, and one engine serves nearly every test.
            options.setdefault("mm_processor_cache_gb", 0.0)
        if self.embedded:
            options.setdefault("dtype", self.spec.dtype)
        if torch.cuda.is_available():
            # A fixed cache instead of what is free: vLLM need not measure that, which fails when an engine beside it
            # ends meanwhile. The utilization is only what must be free at the start.
            options = {"kv_cache_memory_bytes": KV_CACHE_BYTES, "gpu_memory_utilization": 0.15, **options}
        users = {  # an engine that does not capture knows the plugin's options not, or refuses them
            name: value
            for name, value in self.user_options.items()
            if arm is Arm.CAPTURING or name not in {option.name for option in OPTIONS}
        }
        options |= users
        environment = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        if any(options.get(name, 1) > 1 for name in PARALLEL):
            # On a CPU vLLM binds each worker to a NUMA node of its own, and most machines have one.
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        pairs = _Frozen(sorted(options.items()))
        return EngineSpec(str(self.path), arm, interface, in_process, pairs, tuple(environment.items()))

    def request(self, *parts: cases.Part, **params: Any) -> Request:
        """A greedy request of these texts and media; `params` for SamplingParams."""
        return Request(cases.prompt(self.spec, parts), {"temperature": 0.0, "max_tokens": 4, **params})

    def item(self, seed: int, shape: int = 0) -> Media:
        """An item of the model's first modality: an image where it takes images. `shape` picks another size."""
        if "image" in self.spec.placeholders:
            return image(seed, *((96, 64), (64, 160), (128, 128), (160, 96))[shape % 4])
        return audio(seed, (0.6, 1.7, 1.1, 0.9)[shape % 4])

    def needs_items(self, number: int) -> None:
        """Skips the test where the model takes fewer items of its first modality in a prompt."""
        [modality, *_] = self.spec.placeholders
        limit = self.spec.engine_options.get("limit_mm_per_prompt", {}).get(modality, number)
        if limit < number:
            pytest.skip(f"{self.spec.name} takes {limit} {modality} a prompt")

    def needs_core(self) -> None:
        """Skips the test, which looks into the engine core, where that cannot run in this side's process."""
        if _is_data_parallel(self.user_options):
            pytest.skip("data_parallel_size: its engines have processes of their own, into which this test cannot look")

    @functools.cached_property
    def weights_digest(self) -> str:
        """sha256 over the checkpoint's tensor files, in the order of their names."""
        digest = hashlib.sha256()
        for path in sorted(self.path.glob("*.safetensors")):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def observe(self, case: str) -> Observed:
        """The case as the engine ran it, once a session."""
        if case not in self._observed:
            self.needs_core()
            extra_args = {"return_mm_embedding_levels": True}
            parts = cases.parts(self.spec, case)
            request = self.request(*parts, extra_args=extra_args, max_tokens=NUM_TOKENS, ignore_eos=True)
            [[completion]], trace = self.engine().call(observe.run, [request])
            self._observed[case] = Observed(completion, trace.processed[0])
        return self._observed[case]

    def processed(self, case: str) -> dict[str, Any]:
        """What Hugging Face's own processor made of the case's prompt, once a session."""
        if case not in self._processed:
            parts = cases.parts(self.spec, case)
            self._processed[case] = self.reference().process(cases.text(self.spec, parts), cases.media(parts))
        return self._processed[case]

    def reference(self, dtype: torch.dtype = torch.float32) -> Reference:
        """The Hugging Face model, once a session."""
        if dtype not in self._references:
            levels = self.spec.num_levels
            self._references[dtype] = Reference(self.path, dtype, self.spec.reference, levels, self.reference_device)
        return self._references[dtype]

    def tolerance(self, items: Sequence[ProcessedItem], dtype: torch.dtype) -> Tolerance:
        """How far rows of these items, computed in that dtype, may be from the float32 reference."""
        if dtype == torch.float32:
            return Tolerance.float32()
        truth, own = (self.reference(each).encode_items(items).rows for each in (torch.float32, dtype))
        return Tolerance.measured(truth, own)


def _is_data_parallel(options: Mapping[str, Any]) -> bool:
    return int(options.get("data_parallel_size", 1)) > 1


class _Frozen(tuple[tuple[str, Any], ...]):
    """Options with values that cannot be hashed (limit_mm_per_prompt), compared by what they print."""

    __slots__ = ()

    def __hash__(self) -> int:
        return hash(repr(self))
