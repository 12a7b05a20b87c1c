"""The requests that workloads are made of."""

from __future__ import annotations

import dataclasses

import pytest

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
    [item, *_] = media(dataclasses.replace(TINY, frames=4), 0)
    assert (item.modality, item.num_frames, item.width, item.height) == ("video", 4, 32, 32)
    [item, *_] = media(TINY, 0)
    assert (item.modality, item.width, item.height) == ("image", 32, 32)


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_small_is_the_same_shape_of_work(workload: Workload) -> None:
    small = workload.small()
    assert (small.name, small.again, small.text_only) == (workload.name, workload.again, workload.text_only)
    for name, most in {"requests": 8, "items": 2, "side": 256, "frames": 4, "tokens": 4, "texts": 4}.items():
        few, many = getattr(small, name), getattr(workload, name)
        assert few <= min(most, many)
        assert (few > 1) == (many > 1), f"{name} is another kind of work"
    assert len(list(small.parts(0))) == small.requests
