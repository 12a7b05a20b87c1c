"""What the parent says to an engine's process, without one."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from harness.engine import Engine


def test_an_interrupted_call_takes_its_answer() -> None:
    engine: Any = Engine.__new__(Engine)
    engine._send = mock.Mock()
    engine._receive = mock.Mock(side_effect=[KeyboardInterrupt, "of the first call", "of the second call"])
    with pytest.raises(KeyboardInterrupt):
        engine.call(len, [])
    assert engine.call(len, []) == "of the second call"
