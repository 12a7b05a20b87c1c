"""Media have the same bytes on every machine, and are what they say."""

from __future__ import annotations

import numpy as np
import pytest

from harness.media import SAMPLING_RATE, Media, audio, image, photograph, recording, video

DIGESTS = {
    image(1): "1edaccf3b4f87fb10178fa19930fd4d78644ec139247482151131ca19ba8fafa",
    image(2, 33, 57): "c9acb0671028be1ac662efe0024f3ac03cf62b86491062050c3a08fd5ff16652",
    video(7): "fadb88848618ae9e9b8b12671bc7b44c66f80ea2d27e752a8786078489aae8ee",
    audio(11, 1.5): "749037faf7fd368db6fc5a016be24d6e7d81240bef2eb924965955c546aaa303",
    photograph("astronaut", 192, 192): "bcc693bf34a4e22ba48ba1b05c2eb6e65910b7f90a0cd7851a7aa8695e7ab1a4",
    recording("young-man", 2.99): "13fccdb6257f3c0c608b1e8194b56e50b35dfe6d83979dcc79a81b99a478d703",
}


@pytest.mark.parametrize("media", DIGESTS, ids=lambda media: f"{media.source or 'generated'} {media.modality}")
def test_the_bytes_are_pinned(media: Media) -> None:
    assert media.digest == DIGESTS[media]


def test_seeds_differ() -> None:
    for make in (image, video, audio):
        assert make(1).digest != make(2).digest


def test_audio() -> None:
    samples = audio(3, 0.7).content
    assert samples.shape == (round(0.7 * SAMPLING_RATE),)
    assert samples.dtype == np.float32
    assert 0.05 < np.abs(samples).max() <= 1
    assert recording("young-man", 1.0).content.shape == (SAMPLING_RATE,)
