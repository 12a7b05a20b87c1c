"""Middleware of a server (`vllm serve --middleware`) that a request can kill.

A client that kills the server while it reads an answer may be too late: it is not scheduled for as long as vLLM's
processes need the processors, and reads a whole answer then.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

HEADER = "x-kill-at-the-first-chunk"

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


class KilledAtTheFirstChunk:
    """Ends the process with SIGKILL instead of sending the first chunk of an answer to a request with HEADER."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Send) -> None:
        async def kill(message: Message) -> None:
            if message["type"] == "http.response.body":
                os.kill(os.getpid(), signal.SIGKILL)
            await send(message)

        asked = HEADER.encode() in dict(scope.get("headers", ()))
        await self._app(scope, receive, kill if asked else send)
