"""The contract on AsyncLLM: streaming, slow consumers, abort."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any
from unittest import mock

import psutil
import pytest
import torch

from harness.capture import frontend
from harness.capture.transport import process_start
from harness.compare import compare
from harness.engine import Completion, Engine, EngineError, Interface, Request
from harness.engine_process import Server, generate, rendered, stream
from harness.media import image
from harness.pytest_plugin.subject import Subject
from suites.test_contract_basics import capture_stats, other_batch

pytestmark = [pytest.mark.suite("contract"), pytest.mark.once]


@pytest.fixture(scope="module")
def engine(subject: Subject) -> Engine:
    return subject.engine(interface=Interface.ASYNC_LLM, in_process=False, mm_embedding_cache_gb=0.0)


async def collect(server: Server, request: Request, kind: str, slow: bool) -> list[tuple[int, bool, Any]]:
    """(tokens, finished, embedding) of every output; a slow consumer takes the second one when all is generated."""
    from vllm.sampling_params import RequestOutputKind

    request = Request(request.prompt, {**request.params, "output_kind": RequestOutputKind[kind]})
    outputs = []
    async for output in stream(server, request):
        completion = output.outputs[0]
        outputs.append((len(completion.token_ids), completion.finished(), completion.mm_embedding))
        while slow and server.engine.output_processor.has_unfinished_requests():
            assert not server.engine.errored, "the engine core ended: its requests never will"
            await asyncio.sleep(0.01)
    return outputs


@pytest.mark.clause("C1", "C5")
@pytest.mark.parametrize("slow", [False, True], ids=["quick", "slow consumer"])
@pytest.mark.parametrize("kind", ["DELTA", "CUMULATIVE", "FINAL_ONLY"])
def test_only_the_final_output_carries_it(subject: Subject, engine: Engine, kind: str, slow: bool) -> None:
    truth = engine.generate(subject.request(image(91), "one", max_tokens=1))[0][0].mm_embedding
    request = subject.request(image(91), "stream", max_tokens=24, ignore_eos=True)
    outputs = engine.call(collect, request, kind, slow)
    if slow and kind != "FINAL_ONLY":
        assert len(outputs) <= 2, "the outputs after the first one were not merged: the condition did not happen"
    *others, (_tokens, finished, rows) = outputs
    assert all(not done and value is None for _count, done, value in others)
    assert finished
    assert rows is not None, "the final output has no mm_embedding"
    assert truth is not None
    torch.testing.assert_close(rows, truth)


async def generate_from_elsewhere(server: Server, requests: list[Request]) -> tuple[list[list[Completion]], int]:
    """As from a frontend on another host; and how many handles it got, which it could not open there."""
    from harness.capture import frontend, reader

    with (
        mock.patch.object(frontend, "whereabouts", return_value="another host"),
        mock.patch.object(reader, "read", wraps=reader.read) as read,
    ):
        return await generate(server, requests), read.call_count


@pytest.mark.clause("C2", "C3", "C8", "C11")
def test_a_frontend_elsewhere_gets_the_same(subject: Subject, engine: Engine) -> None:
    levels = {"return_mm_embedding_levels": True}
    requests = [
        subject.request(image(94), "one token", max_tokens=1),
        subject.request(image(95, 64, 160), "and", image(94), extra_args=levels),
        subject.request(image(95, 64, 160), "children", n=2, temperature=1.0),
        subject.request("text"),
    ]
    # One after another the first time, so that each has its own encoder run.
    here = [engine.generate(request)[0] for request in requests]
    elsewhere, handles = engine.call(generate_from_elsewhere, requests)
    assert handles == 0, "a frontend elsewhere got a handle, which it cannot open"
    one_engine = dict(engine.spec.options).get("data_parallel_size", 1) == 1
    for own, others in zip(here, elsewhere, strict=True):
        for expected, found in zip(own, others, strict=True):
            assert found.mm_embedding_items == expected.mm_embedding_items
            for name in ("mm_embedding", "mm_embedding_levels"):
                rows, truth = getattr(found, name), getattr(expected, name)
                assert (rows is None) == (truth is None), name
                if truth is not None:
                    assert rows.is_contiguous()
                    if one_engine:
                        torch.testing.assert_close(rows, truth)
                        continue
                    # Another engine may have encoded it again, in another batch.
                    comparison = compare(rows.flatten(0, -2), truth.flatten(0, -2), tolerance=other_batch(truth.dtype))
                    assert comparison.ok, f"{name}: {comparison.explain()}"
    assert here[1][0].mm_embedding_levels is not None, "no levels were asked for: the test could not fail"
    stats = engine.call(capture_stats)
    assert not any(stats[name] for name in ("admitted", "requests", "leases", "held_bytes")), f"still held: {stats}"


async def abort_many(server: Server, requests: list[Request], seed: int) -> Counter[str]:
    """Runs all requests and drops each; how many were where at that moment.

    Half of them go at a random moment, and half after one of their outputs: however slow the machine is, some of each.
    """
    drawn = random.Random(seed)

    async def one(request: Request, seconds: float | None, outputs: int) -> str:
        state = "before the first output"
        enough = asyncio.Event()

        async def consume() -> None:
            nonlocal state, outputs
            async for output in stream(server, request):
                state = "done" if output.finished else "streaming"
                outputs -= 1
                if not outputs:
                    enough.set()

        task = asyncio.create_task(consume())
        ends = [task, asyncio.create_task(enough.wait())]
        await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        await asyncio.gather(*ends, return_exceptions=True)
        return state

    states: Counter[str] = Counter()
    for start in range(0, len(requests), 25):
        batch = requests[start : start + 25]
        ends = [(drawn.uniform(0.0, 0.4), 0) if index % 2 else (None, drawn.randint(1, 40)) for index in range(25)]
        states.update(await asyncio.gather(*(one(request, *end) for request, end in zip(batch, ends, strict=True))))
    return states


async def stats_when_all_is_taken(server: Server) -> dict[str, int]:
    """Of the engine core, when the frontend has taken what it was sent, and has read it."""
    await capture_stats(server)  # the answer follows all that was sent, on the same socket
    readers = frontend._readers()
    barrier = threading.Barrier(readers._max_workers)  # which all threads reach when they have read the others
    waiting = [readers.submit(barrier.wait) for _ in range(readers._max_workers)]
    await asyncio.gather(*map(asyncio.wrap_future, waiting))
    return await capture_stats(server)


@pytest.mark.clause("C11")
def test_aborts_leave_nothing(subject: Subject, engine: Engine, record_property: Callable[[str, object], None]) -> None:
    requests = [subject.request(image(seed % 50), "long", max_tokens=60, ignore_eos=True) for seed in range(1000)]
    states = engine.call(abort_many, requests, 1)
    stats = engine.call(stats_when_all_is_taken)
    record_property("aborted", dict(states))
    for moment in ("before the first output", "streaming"):
        assert states[moment] > 50, f"few requests were aborted {moment}: the condition did not happen ({states})"
    assert stats["captured"] > 0
    left = {name: stats[name] for name in ("admitted", "requests", "leases", "items", "held_bytes")}
    assert not any(left.values()), f"still held after the aborts: {left}"
    assert engine.generate(subject.request(image(92), "alive"))[0][0].mm_embedding is not None


async def abort_what_was_sent(server: Server, request: Request) -> int:
    """Aborts the request when its first output has left the engine core; how many leases there are then."""
    from harness.capture.scheduler import DELIVERY

    processor = server.engine.output_processor
    process_outputs = processor.process_outputs

    def aborting(outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        sent = [output.request_id for output in outputs if DELIVERY in (output.ec_transfer_params or {})]
        processor.abort_requests(sent, internal=True)
        return process_outputs(outputs, *args, **kwargs)

    with mock.patch.object(processor, "process_outputs", aborting):
        outputs = [output async for output in stream(server, request)]
    assert [output.outputs[0].finish_reason for output in outputs] == ["abort"]
    return (await capture_stats(server))["leases"]


@pytest.mark.clause("C11")
def test_an_abort_while_the_embeddings_are_on_their_way_leaves_nothing(subject: Subject, engine: Engine) -> None:
    leases = engine.call(abort_what_was_sent, subject.request(image(96), "too late"))
    assert leases == 0, "what was sent of a request that was aborted meanwhile is held until its lease expires"


async def stream_inputs(server: Server, requests: list[Request]) -> Any:
    """The last output of a session whose prompt is sent in pieces."""
    from vllm import SamplingParams
    from vllm.engine.protocol import StreamingInput

    params = SamplingParams(**requests[0].params)
    prompts = await rendered(server, [dict(request.prompt) for request in requests])

    async def inputs() -> AsyncIterator[StreamingInput]:
        for prompt in prompts:
            yield StreamingInput(prompt)

    async for output in server.engine.generate(inputs(), params, request_id="session"):
        last = output
    return last.outputs[0].mm_embedding


@pytest.mark.clause("C12")
def test_a_streaming_input_session_is_refused(subject: Subject, engine: Engine) -> None:
    """Its items come when its first completions have ended. One without items goes on."""
    pieces = [subject.request("first"), subject.request(image(97), "then")]
    with pytest.raises(RuntimeError, match="is a streaming-input session; send its items in one prompt"):
        engine.call(stream_inputs, pieces)
    assert engine.call(stream_inputs, [subject.request("first"), subject.request("then")]) is None
    stats = engine.call(stats_when_all_is_taken)
    assert not any(stats[name] for name in ("admitted", "requests", "leases", "held_bytes")), f"still held: {stats}"


def engine_core_pid(server: Server) -> int:
    process, *_ = server.engine.engine_core.resources.engine_manager.processes
    return int(process.pid)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended in 5 s; a zombie has."""
    _gone, left = psutil.wait_procs(processes, timeout=5)
    return [process for process in left if process_start(process.pid) is not None]


async def kill_while_streaming(server: Server, request: Request, pid: int) -> None:
    for _ in range(10):  # until the frontend knows, which takes seconds with a GPU, another engine may go on
        async for output in stream(server, request):
            if not output.finished:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.clause("C11")
def test_a_killed_engine_core_leaves_nothing(subject: Subject, engine: Engine) -> None:
    tree = psutil.Process(engine.pid).children(recursive=True)
    assert tree, "the engine has no processes of its own"
    request = subject.request(image(93), "long", max_tokens=500, ignore_eos=True)
    with pytest.raises(EngineError, match="the engine died"):
        engine.call(kill_while_streaming, request, engine.call(engine_core_pid))
    engine.shutdown()
    # The memory has no name (memfd): with the last process it is gone.
    assert not (left := alive(tree)), f"processes outlived the engine: {left}"
