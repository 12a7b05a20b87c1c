"""The child process of engine.py: makes the engine, then runs what it is sent."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import pickle
import signal
import sys
import traceback
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from harness.engine import Arm, Completion, EngineError, EngineSpec, Interface, Request


@dataclass
class Server:
    """What functions get that run here.

    Attributes:
        spec: of the engine.
        engine: vLLM's LLM or AsyncLLM.
    """

    spec: EngineSpec
    engine: Any

    @property
    def core(self) -> Any:
        """The EngineCore, if it runs in this process.

        Raises:
            RuntimeError: it does not.
        """
        if not self.spec.in_process:
            raise RuntimeError("the engine core is in another process: use an engine with in_process=True")
        return self.engine.llm_engine.engine_core.engine_core

    @property
    def llm_engine(self) -> Any:
        """vLLM's LLMEngine; or AsyncLLM, which has its attributes, and most of its methods as coroutines."""
        return self.engine if self.spec.interface is Interface.ASYNC_LLM else self.engine.llm_engine

    async def capture_stats(self) -> dict[str, int] | None:
        """Counts of the capture store; None where capture is off. Of data-parallel engines the sums."""
        found = await self.capture_stats_by_engine()
        return {key: sum(stats[key] for stats in found) for key in found[0]} if found else None

    async def capture_stats_by_engine(self) -> list[dict[str, int]]:
        """The counts of each data-parallel engine, mostly of one; none where capture is off."""
        if self.spec.in_process:
            found = [self.core.mm_embedding_stats()]
        elif self.spec.interface is Interface.ASYNC_LLM:
            found = await self.engine.engine_core.call_utility_all_async("mm_embedding_stats")
        else:
            found = [self.engine.llm_engine.engine_core.call_utility("mm_embedding_stats")]
        return [stats for stats in found if stats is not None]


async def generate(server: Server, requests: Sequence[Request]) -> list[list[Completion]]:
    """Runs the requests together; the completions of each, in order."""
    outputs = await final_outputs(server, requests)
    return [[Completion.of(output, completion) for completion in output.outputs] for output in outputs]


async def final_outputs(server: Server, requests: Sequence[Request]) -> list[Any]:
    """vLLM's RequestOutput of each request, run together, in order."""
    from vllm.sampling_params import RequestOutputKind

    if server.spec.interface is Interface.LLM:
        outputs: list[Any] = server.engine.generate(*prompts_and_params(requests), use_tqdm=False)
        return outputs

    async def final(request: Request) -> Any:
        once = Request(request.prompt, {**request.params, "output_kind": RequestOutputKind.FINAL_ONLY})
        [output] = [output async for output in stream(server, once)]
        return output

    return await asyncio.gather(*map(final, requests))


def prompts_and_params(requests: Sequence[Request]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Prompts and SamplingParams, as the methods of vLLM's LLM take them."""
    from vllm import SamplingParams

    return [dict(request.prompt) for request in requests], [SamplingParams(**request.params) for request in requests]


async def rendered(server: Server, prompts: Sequence[dict[str, Any]]) -> list[Any]:
    """Tokenized and processed, for `stream` to send once."""
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    parsed = [parse_model_prompt(server.engine.model_config, prompt) for prompt in prompts]
    return list(await server.engine.renderer.render_cmpl_async(parsed))


def stream(server: Server, request: Request) -> AsyncIterator[Any]:
    """vLLM's RequestOutputs of one request, from AsyncLLM."""
    from vllm import SamplingParams

    generator: AsyncIterator[Any] = server.engine.generate(
        dict(request.prompt), SamplingParams(**request.params), request_id=uuid.uuid4().hex
    )
    return generator


def _make(spec: EngineSpec) -> Any:
    options = dict(spec.options)
    if spec.arm is Arm.CAPTURING:
        options.setdefault("enable_return_mm_embedding", True)
    if isinstance(options.get("ec_transfer_config"), dict):  # the parent imports no vLLM
        from vllm.config import ECTransferConfig

        options["ec_transfer_config"] = ECTransferConfig(**options["ec_transfer_config"])
    if spec.interface is Interface.ASYNC_LLM:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(AsyncEngineArgs(model=spec.model, **options))
    from vllm import LLM

    return LLM(model=spec.model, disable_log_stats=False, **options)


def _load_platform_plugins() -> None:
    """vLLM has done this when it was imported, in the server of forks, where plugins were off."""
    from vllm.plugins import PLATFORM_PLUGINS_GROUP, load_plugins_by_group

    for function in load_plugins_by_group(PLATFORM_PLUGINS_GROUP).values():
        function()


async def _serve(connection: Connection[Any, Any]) -> None:
    def answer(succeeded: bool, value: Any) -> None:
        connection.send_bytes(pickle.dumps((succeeded, value)))

    spec: EngineSpec = pickle.loads(connection.recv_bytes())
    try:
        if spec.in_process and spec.arm is not Arm.ABSENT:
            _load_platform_plugins()
        if spec.setup is not None:
            module, _, function = spec.setup.partition(":")
            getattr(importlib.import_module(module), function)()
        server = Server(spec, _make(spec))
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent reports it
        traceback.print_exc()
        answer(False, (EngineError(f"did not start: {error}"), ""))
        return
    answer(True, None)
    while (message := pickle.loads(await asyncio.to_thread(connection.recv_bytes))) is not None:
        function, args = message
        try:
            result = function(server, *args)
            answer(True, await result if inspect.isawaitable(result) else result)
        except Exception as error:  # noqa: BLE001 - likewise
            trace = traceback.format_exc()
            sys.stderr.write(trace)
            if type(error).__name__ == "EngineDeadError":  # vLLM's, of an engine core in a process of its own
                error = EngineError("died")
            try:
                pickle.loads(pickle.dumps(error))
            except Exception:  # noqa: BLE001 - pickling runs the exception's own code
                error = RuntimeError(f"{type(error).__name__}: {error}")
            answer(False, (error, trace))
    if spec.interface is Interface.ASYNC_LLM:
        server.engine.shutdown()
    else:
        server.engine.llm_engine.engine_core.shutdown()


def run(connection: Connection[Any, Any], log: Path, environment: Mapping[str, str]) -> None:
    """The child's main function.

    Args:
        connection: to the parent.
        log: file that gets everything printed here and below.
        environment: replaces this process's own, which may be that of the server it was forked from.
    """
    # A process group, so that the parent can end vLLM's processes too, and not a session: Linux schedules sessions
    # against each other (sched_autogroup), and vLLM's processes, which spin with sched_yield, keep a client in another
    # session from running for as long as they have work.
    os.setpgrp()
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    try:
        asyncio.run(_serve(connection))
    except (EOFError, BrokenPipeError):  # the parent was killed: vLLM's processes would wait for this one for ever
        os.killpg(0, signal.SIGKILL)
