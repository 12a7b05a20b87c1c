"""The requests that workloads are made of."""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from harness import load, matrix
from harness.engine import Arm, EngineSpec, Interface, Request
from harness.engine_process import Server
from harness.load import WORKLOADS, Workload
from harness.media import Media

TINY = Workload("tiny", requests=6, items=2, side=32)


def media(workload: Workload, *rounds: int) -> list[Media]:
    return [part for number in rounds for parts in workload.parts(number) for part in parts if isinstance(part, Media)]


def test_every_round_asks_about_new_media() -> None:
    pixels = {item.digest for item in media(TINY, 0, 1, 2)}
    assert len(pixels) == 3 * 6 * 2


def test_again_asks_the_same_in_every_round() -> None:
    again = dataclasses.replace(TINY, again=True)
    assert list(again.parts(0)) == list(again.parts(7))
    assert len(set(media(again, 0))) == 12


def test_a_round_asks_the_same_several_times() -> None:
    prompts = list(dataclasses.replace(TINY, times=3).parts(0))
    assert len(prompts) == TINY.requests
    assert len({*prompts[:2]}) == 2
    assert prompts[:2] == prompts[2:4] == prompts[4:]


def test_several_texts_ask_about_the_same_media() -> None:
    prompts = list(dataclasses.replace(TINY, texts=3).parts(1))
    groups = [prompts[:3], prompts[3:]]
    for group in groups:
        assert len({parts[1:] for parts in group}) == 1
        assert len({parts[0] for parts in group}) == 3
        assert all(isinstance(parts[0], str) for parts in group), "the prefix cache would answer for media in front"
    assert groups[0][0][1:] != groups[1][0][1:]
    assert not {*media(dataclasses.replace(TINY, texts=3), 1)} & {*media(dataclasses.replace(TINY, texts=3), 2)}


def test_scattered_requests_about_the_same_media_are_far_from_each_other() -> None:
    in_a_row, scattered = (dataclasses.replace(TINY, texts=3, scattered=each) for each in (False, True))
    assert {*scattered.parts(1)} == {*in_a_row.parts(1)}
    items = [parts[1:] for parts in scattered.parts(1)]
    assert len({*items[:2]}) == 2
    assert items[:2] == items[2:4] == items[4:]


def test_every_second_request_may_be_of_text_only() -> None:
    prompts = list(dataclasses.replace(TINY, text_only=True).parts(0))
    numbers = [sum(isinstance(part, Media) for part in parts) for parts in prompts]
    assert numbers == [2, 0] * 3
    assert len({parts for parts in prompts if len(parts) == 1}) == 3, (
        "equal texts would be answered by the prefix cache"
    )


def test_a_video_has_frames() -> None:
    filmed = dataclasses.replace(TINY, frames=4)
    assert (filmed.modality, TINY.modality) == ("video", "image")
    [item, *_] = media(filmed, 0)
    assert (item.modality, item.num_frames, item.width, item.height) == ("video", 4, 32, 32)
    [item, *_] = media(TINY, 0)
    assert (item.modality, item.width, item.height) == ("image", 32, 32)


def test_workloads_share_no_media() -> None:
    assert not {*media(TINY, 0)} & {*media(dataclasses.replace(TINY, name="another"), 0)}


@pytest.mark.parametrize("workload", [*WORKLOADS, load.ALONE], ids=str)
def test_small_is_the_same_shape_of_work(workload: Workload) -> None:
    small = workload.small()
    assert (small.name, small.again, small.text_only) == (workload.name, workload.again, workload.text_only)
    for name, most in {
        "requests": 8,
        "items": 2,
        "side": 256,
        "frames": 4,
        "tokens": 4,
        "texts": 4,
        "times": 2,
    }.items():
        few, many = getattr(small, name), getattr(workload, name)
        assert few <= min(most, many)
        assert (few > 1) == (many > 1), f"{name} is another kind of work"
    assert len(list(small.parts(0))) == small.requests


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Its `now` is the time of the loads, which passes when a test says so, however slow the machine is."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(load, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def run(monkeypatch: pytest.MonkeyPatch, engine: Any, interface: Interface, workload: Workload) -> load.Sample:
    server = Server(EngineSpec("model", Arm.ABSENT, interface), engine)
    monkeypatch.setattr(load, "prompts_and_params", lambda _requests: ([], []))
    load.prepared(server).made_of = (workload, [])
    load.prepared(server).requests = [Request({}), Request({})]
    return asyncio.run(load.run(server))


@pytest.mark.parametrize("workload", [load.PROCESSED, load.REPEATED], ids=str)
def test_an_engine_begins_what_is_processed_when_it_has_all_requests(
    monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace, workload: Workload
) -> None:
    def take(seconds: float) -> list[Any]:
        clock.now += seconds
        return []

    llm = mock.MagicMock()
    llm.enqueue.side_effect = lambda *_args, **_options: take(8)
    llm.llm_engine.is_sleeping.side_effect = lambda: take(4)
    llm.wait_for_completion.side_effect = lambda **_options: take(2)
    sample = run(monkeypatch, llm, Interface.LLM, workload)
    in_turn = ["sleep", "enqueue", "llm_engine.is_sleeping", "wake_up", "wait_for_completion"]
    assert [name for name, *_ in llm.mock_calls] == in_turn
    assert sample.seconds == 2, "the time of what comes before the engine counts"


def test_what_a_round_copies_is_what_the_engine_counted_since_it_was_prepared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = {"captured_bytes": 700}

    async def stats(_server: Server) -> dict[str, int]:
        return dict(counts)

    async def outputs(_server: Server, _requests: list[Request]) -> list[Any]:
        counts.update(captured_bytes=1000)
        return []

    monkeypatch.setattr(Server, "capture_stats", stats)
    monkeypatch.setattr(load, "final_outputs", outputs)
    for arm, copied in ((Arm.IDLE, 0), (Arm.CAPTURING, 300)):
        counts.update(captured_bytes=700)
        server = Server(EngineSpec("model", arm), mock.MagicMock())
        asyncio.run(load.prepare(server, matrix.load_all()["qwen3_vl"], dataclasses.replace(TINY, requests=0), 0))
        assert asyncio.run(load.run(server)).captured_bytes == copied


@pytest.mark.parametrize("keep", [True, False])
def test_a_round_counts_what_it_generated(monkeypatch: pytest.MonkeyPatch, keep: bool) -> None:
    def completion(tokens: int, rows: torch.Tensor | None) -> SimpleNamespace:
        return SimpleNamespace(token_ids=[0] * tokens, mm_embedding=rows)

    several = [completion(3, torch.zeros(5, 4)), completion(2, torch.zeros(1, 4))]
    answers = [SimpleNamespace(outputs=several), SimpleNamespace(outputs=[completion(1, None)])]
    monkeypatch.setattr(load, "final_outputs", mock.AsyncMock(return_value=answers))
    server = Server(EngineSpec("model", Arm.ABSENT), mock.MagicMock())
    sample = asyncio.run(load.run(server, keep))
    assert dataclasses.replace(sample, seconds=0.0) == load.Sample(0.0, 2, 6, 2, 6, 96, 0)
    assert load.prepared(server).outputs == (answers if keep else [])
    load.drop(server)
    assert load.prepared(server) == load.Prepared()


def test_media_are_made_once_where_the_next_round_asks_the_same() -> None:
    server = Server(EngineSpec("model", Arm.ABSENT), mock.MagicMock())
    for again in (True, False):
        made = []
        for number in (1, 2):
            workload = dataclasses.replace(TINY, again=again)
            asyncio.run(load.prepare(server, matrix.load_all()["qwen3_vl"], workload, number))
            made.append(load.prepared(server).prompts)
        assert (made[0] is made[1]) == again


@pytest.mark.parametrize("processed", [True, False])
def test_what_is_processed_is_forgotten_by_all_but_the_processor(processed: bool) -> None:
    llm = mock.MagicMock()
    server = Server(EngineSpec("model", Arm.ABSENT), llm)
    workload = dataclasses.replace(TINY, requests=0, processed=processed)
    spec = matrix.load_all()["qwen3_vl"]
    asyncio.run(load.prepare(server, spec, workload, 0))
    assert llm.llm_engine.reset_encoder_cache.called == llm.llm_engine.reset_prefix_cache.called == processed
    llm.llm_engine.reset_prefix_cache.return_value = False
    if processed:
        with pytest.raises(RuntimeError, match="a round is not over"):
            asyncio.run(load.prepare(server, spec, workload, 1))


def test_an_engine_does_not_stay_asleep_where_a_request_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = mock.MagicMock()
    llm.enqueue.side_effect = ValueError("too long")
    with pytest.raises(ValueError, match="too long"):
        run(monkeypatch, llm, Interface.LLM, load.PROCESSED)
    assert [name for name, *_ in llm.mock_calls] == ["sleep", "enqueue", "wake_up"]


def test_async_llm_begins_what_is_processed_when_it_has_all_requests(
    monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace
) -> None:
    calls: list[str] = []
    awake = asyncio.Event()

    async def called(name: str) -> None:
        calls.append(name)
        if name == "is_sleeping":
            clock.now += 4
        if name == "wake_up":
            awake.set()

    async def outputs(_server: Server, requests: list[Request]) -> list[Any]:
        for _ in requests:
            await asyncio.sleep(0.01)
            clock.now += 4
            calls.append("taken in")
        await awake.wait()
        clock.now += 2
        return []

    engine = mock.MagicMock()
    engine.sleep.side_effect = lambda **_options: called("sleep")
    engine.is_sleeping.side_effect = lambda: called("is_sleeping")
    engine.wake_up.side_effect = lambda **_options: called("wake_up")
    engine.output_processor.get_num_unfinished_requests.side_effect = lambda: calls.count("taken in")
    monkeypatch.setattr(load, "final_outputs", outputs)
    sample = run(monkeypatch, engine, Interface.ASYNC_LLM, load.PROCESSED)
    assert calls == ["sleep", "taken in", "taken in", "is_sleeping", "wake_up"]
    assert sample.seconds == 2, "the time of what comes before the engine counts"


def test_async_llm_does_not_wait_for_requests_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = mock.MagicMock(sleep=mock.AsyncMock(), is_sleeping=mock.AsyncMock(), wake_up=mock.AsyncMock())
    engine.output_processor.get_num_unfinished_requests.return_value = 0
    monkeypatch.setattr(load, "final_outputs", mock.AsyncMock(side_effect=ValueError("too long")))
    server = Server(EngineSpec("model", Arm.ABSENT, Interface.ASYNC_LLM), engine)
    with pytest.raises(ValueError, match="too long"):
        asyncio.run(asyncio.wait_for(load._once_all_wait(server, [Request({})]), 30))
    engine.wake_up.assert_called_once()


@pytest.mark.parametrize("interface", [Interface.LLM, Interface.ASYNC_LLM])
@pytest.mark.parametrize("processed", [True, False])
def test_async_llm_gets_what_is_processed_rendered_anew_each_round(
    monkeypatch: pytest.MonkeyPatch, interface: Interface, processed: bool
) -> None:
    rounds = []

    async def render(_server: Server, prompts: list[dict[str, Any]]) -> list[Any]:
        rounds.append(prompts)
        return [{"type": "multimodal", "round": len(rounds)} for _ in prompts]

    monkeypatch.setattr(load, "rendered", render)
    server = Server(EngineSpec("model", Arm.ABSENT, interface), mock.MagicMock())
    workload = dataclasses.replace(TINY, processed=processed)
    for number in (1, 2):
        asyncio.run(load.prepare(server, matrix.load_all()["qwen3_vl"], workload, number))
        prompts = [request.prompt for request in load.prepared(server).requests]
        if processed and interface is Interface.ASYNC_LLM:
            # Once more, because the processor's cache at the engine must see what the one at the frontend sees.
            assert prompts == [{"type": "multimodal", "round": number}] * 6
            assert [len(prompt["multi_modal_data"]["image"]) for prompt in rounds[-1]] == [2] * 6
        else:
            assert not rounds
            assert [len(prompt["multi_modal_data"]["image"]) for prompt in prompts] == [2] * 6


def test_the_time_of_other_workloads_is_that_of_all(monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace) -> None:
    async def outputs(_server: Server, _requests: list[Request]) -> list[Any]:
        clock.now += 2
        return []

    monkeypatch.setattr(load, "final_outputs", outputs)
    engine = mock.MagicMock()
    assert run(monkeypatch, engine, Interface.LLM, load.DISTINCT).seconds == 2
    assert not engine.mock_calls


def test_arrivals_are_a_poisson_process_of_the_same_load_in_every_round() -> None:
    rounds = [load.arrivals(64, 25.0, seed) for seed in range(200)]
    assert rounds[0] == load.arrivals(64, 25.0, 0) == sorted(rounds[0])
    assert rounds[0] != rounds[1]
    assert all(times[0] >= 0 and times[-1] <= 64 / 25 for times in rounds)
    counts = [sum(0.5 <= time < 1.0 for time in times) for times in rounds]
    expected = 64 * 0.5 / (64 / 25)
    assert statistics.mean(counts) == pytest.approx(expected, rel=0.05)
    # Of a binomial distribution, which Poisson's is given the sum. Evenly spaced arrivals have none.
    assert statistics.variance(counts) == pytest.approx(expected * (1 - expected / 64), rel=0.25)


def answer(clock: SimpleNamespace, seconds: float, *tokens: int) -> AsyncIterator[Any]:
    """A request's outputs of so many tokens, each so long after the one before; the last one has the embedding."""

    async def outputs() -> AsyncIterator[Any]:
        for number in tokens:
            clock.now += seconds
            rows = "rows" if number == tokens[-1] else None
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * number, mm_embedding=rows)])

    return outputs()


def one_at_a_time(monkeypatch: pytest.MonkeyPatch, stream: Callable[[Request], AsyncIterator[Any]]) -> load.Latencies:
    monkeypatch.setattr(load, "stream", lambda _server, request: stream(request))
    server = Server(EngineSpec("model", interface=Interface.ASYNC_LLM), mock.MagicMock())
    load.prepared(server).requests = [Request({}) for _ in range(3)]
    return asyncio.run(load.one_at_a_time(server))


def test_one_at_a_time_no_request_waits_for_another(monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace) -> None:
    running: list[Request] = []

    async def stream(request: Request) -> AsyncIterator[Any]:
        assert not running, "two requests at once"
        running.append(request)
        async for output in answer(clock, 6.0, 1, 3):
            await asyncio.sleep(0.001)
            yield output
        running.remove(request)

    found = one_at_a_time(monkeypatch, stream)
    assert found == load.Latencies([6.0] * 3, [3.0] * 3, [12.0] * 3, with_embedding=3)


def test_requests_are_sent_when_they_are_due(monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace) -> None:
    async def sleep(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr(load, "asyncio", SimpleNamespace(sleep=sleep, gather=asyncio.gather))
    monkeypatch.setattr(load, "stream", lambda _server, _request: answer(clock, 1.0, 4))
    server = Server(EngineSpec("model", interface=Interface.ASYNC_LLM), mock.MagicMock())
    load.prepared(server).requests = [Request({}) for _ in range(8)]
    now, begin, expected = clock.now, clock.now + 0.05, []
    for due in (begin + seconds for seconds in load.arrivals(8, 0.5, 7)):
        now = max(now, due) + 1.0  # nothing here lets another request begin meanwhile
        expected.append(now - due)
    assert max(expected) > 1.0, "none came while another one was answered"
    assert asyncio.run(load.arrive(server, 0.5, 7)).first_token == pytest.approx(expected)


def test_the_time_between_tokens_is_that_after_the_first_output(
    monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace
) -> None:
    """Of outputs that AsyncLLM merged because their consumer was late."""
    answers = iter([answer(clock, 6.0, 3, 4), answer(clock, 6.0, 4), answer(clock, 6.0, 1, 4)])
    found = one_at_a_time(monkeypatch, lambda _request: next(answers))
    assert found.between_tokens == [6.0, 2.0], "one output has no time between tokens"
    assert found.first_token == [6.0] * 3
    assert found.end_to_end == [12.0, 6.0, 12.0]
