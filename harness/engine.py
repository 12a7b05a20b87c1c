"""vLLM in a child process, in one of three arms, and what its requests gave.

The child (engine_process.py) owns the engine; this side sends it functions to run there and gets their results. vLLM's
own processes are the child's children. Everything that they print goes to the engine's log file.
"""

from __future__ import annotations

import contextlib
import enum
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, overload
from unittest import mock

from torch import Tensor

T = TypeVar("T")

START_SECONDS = 900.0
"""A full-size model on a cold disk needs minutes; a start that takes longer is an error."""


class Arm(enum.StrEnum):
    """What is compared with what."""

    ABSENT = "absent"  # the plugin is not loaded
    IDLE = "idle"  # loaded, capture off
    CAPTURING = "capturing"  # loaded, capture on


class Interface(enum.StrEnum):
    """How vLLM is called."""

    LLM = "LLM"
    ASYNC_LLM = "AsyncLLM"


class EngineError(RuntimeError):
    """The engine did not start, or died. An error of the infrastructure, not a mismatch; ends with the log's tail."""


@dataclass(frozen=True)
class EngineSpec:
    """One engine; equal specs share it.

    Attributes:
        model: directory of the checkpoint, or hub id.
        arm: see Arm.
        interface: see Interface.
        in_process: the engine core runs in the child itself (starts in seconds) and not in a process of its own.
        options: keyword arguments of EngineArgs, as sorted pairs.
        environment: environment variables of the child, as sorted pairs.
        setup: "module:function" to call in the child before vLLM is imported (tests of the harness break things there).
    """

    model: str
    arm: Arm = Arm.CAPTURING
    interface: Interface = Interface.LLM
    in_process: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    setup: str | None = None

    def __str__(self) -> str:
        processes = "in-process" if self.in_process else "default processes"
        options = "".join(f", {name}={value}" for name, value in self.options)
        return f"{Path(self.model).name}: {self.interface.value}, {self.arm.value}, {processes}{options}"


@dataclass(frozen=True)
class Request:
    """One request for `generate`.

    Attributes:
        prompt: vLLM's prompt: {"prompt": ..., "multi_modal_data": ...}.
        params: keyword arguments of vLLM's SamplingParams.
    """

    prompt: Mapping[str, Any]
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EmbeddingItem:
    """As completion.mm_embedding_items gives it."""

    modality: str
    start: int
    num_rows: int
    identifier: str


@dataclass(frozen=True)
class Completion:
    """One finished completion.

    Attributes:
        text, token_ids, finish_reason, stop_reason: as vLLM's.
        logprobs: of the sampled tokens; empty if not asked for.
        num_cached_tokens: prompt tokens that the prefix cache had.
        prompt_token_ids: with the placeholders expanded.
        has_field: whether vLLM's object has the attribute `mm_embedding` at all.
        mm_embedding: (num_features, hidden_size) on CPU, or None.
        mm_embedding_items: spans of the rows, or None.
        mm_embedding_levels: (num_levels, num_features, hidden_size), or None.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: list[float]
    num_cached_tokens: int
    prompt_token_ids: list[int]
    has_field: bool
    mm_embedding: Tensor | None
    mm_embedding_items: list[EmbeddingItem] | None
    mm_embedding_levels: Tensor | None

    @classmethod
    def of(cls, request_output: Any, completion: Any) -> Completion:
        """From vLLM's RequestOutput and one of its CompletionOutputs."""
        sampled = zip(completion.token_ids, completion.logprobs or [], strict=False)
        items = getattr(completion, "mm_embedding_items", None)
        return cls(
            text=completion.text,
            token_ids=list(completion.token_ids),
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
            logprobs=[position[token].logprob for token, position in sampled],
            num_cached_tokens=request_output.num_cached_tokens or 0,
            prompt_token_ids=list(request_output.prompt_token_ids),
            has_field=hasattr(completion, "mm_embedding"),
            mm_embedding=getattr(completion, "mm_embedding", None),
            mm_embedding_items=items
            and [EmbeddingItem(item.modality, item.start, item.num_rows, item.identifier) for item in items],
            mm_embedding_levels=getattr(completion, "mm_embedding_levels", None),
        )


class Engine:
    """An engine that starts, so that several can at once; `wait` until it runs. `call` runs functions beside it.

    Args:
        spec: what to start.
        log: file for everything that the child and its children print.
        progress: gets a line when the start begins and when it is done.
    """

    def __init__(self, spec: EngineSpec, log: Path, progress: Callable[[str], None] = lambda _line: None) -> None:
        self.spec = spec
        self.log = log
        self.usable = True
        """False after an EngineError: nothing more can be asked of it."""
        self.start_seconds: float | None = None
        """How long the start took; None until it runs."""
        self._progress = progress
        self._began = time.monotonic()
        progress(f"starting {spec}")
        from harness import engine_process

        # Importing vLLM takes 8 of the 10 s of an in-process start: such engines are forked from a server that has done
        # it. Those with vLLM's default processes begin with a new interpreter, as a user's do.
        context: Any = multiprocessing.get_context("forkserver" if spec.in_process else "spawn")
        context.set_forkserver_preload(["harness.engine_process", "harness.vllm_preload"])
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=engine_process.run, args=(theirs, log, {**os.environ, **_variables(spec)})
        )
        log.touch()
        # The server of forks loads no plugin, whichever engine is the first: each fork does it for itself.
        with mock.patch.dict(os.environ, {**_variables(spec), **({"VLLM_PLUGINS": ""} if spec.in_process else {})}):
            self._process.start()
        theirs.close()
        self._send(spec)

    def wait(self) -> None:
        """Returns when the engine runs.

        Raises:
            EngineError: it did not start.
        """
        if self.start_seconds is not None:
            return
        try:
            self._receive(START_SECONDS)
        except BaseException:
            self.kill()
            raise
        self.start_seconds = time.monotonic() - self._began
        self._progress(f"started in {self.start_seconds:.1f} s: {self.spec}")

    @overload
    def call(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any, timeout: float = ...) -> T: ...

    @overload
    def call(self, function: Callable[..., T], *args: Any, timeout: float = ...) -> T: ...

    def call(self, function: Callable[..., Any], *args: Any, timeout: float = 600.0) -> Any:
        """Runs `function(engine_process.Server, *args)` in the child and returns its result.

        The function must be importable there, and its arguments and its result picklable. It may be a coroutine.

        Raises:
            EngineError: the engine died or did not answer in `timeout` seconds.
            Exception: what the function raised, with the child's traceback as its cause.
        """
        self._send((function, args))
        try:
            return self._receive(timeout)
        except KeyboardInterrupt:
            # The answer comes all the same, and would be taken for that of the next call.
            with contextlib.suppress(Exception):
                self._receive(timeout)
            raise

    def generate(self, *requests: Request) -> list[list[Completion]]:
        """The completions of each request, run together, in order."""
        from harness import engine_process

        return self.call(engine_process.generate, requests)

    def _send(self, message: Any) -> None:
        # Plain pickle: the connection's own would pass tensors as file descriptors, which die with their sender.
        try:
            self._connection.send_bytes(pickle.dumps(message))
        except OSError as error:
            raise self._died("is gone") from error

    def _receive(self, timeout: float) -> Any:
        deadline = time.monotonic() + timeout
        while not self._connection.poll(1.0):
            if not self._process.is_alive() and not self._connection.poll(0):
                raise self._died("died")
            if time.monotonic() > deadline:
                raise self._died(f"did not answer within {timeout:.0f} s")
        try:
            succeeded, value = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._died("died") from error
        if succeeded:
            return value
        failure, trace = value
        if isinstance(failure, EngineError):
            raise self._died(str(failure))
        raise failure from RuntimeError(f"in the engine's process:\n{trace}")

    def _died(self, how: str) -> EngineError:
        self.usable = False
        code = self._process.exitcode
        status = f" (exit status {code})" if code is not None else ""
        return EngineError(f"the engine {how}{status}: {self.spec}.\nIts log, {self.log}, ends:\n{self.log_tail()}")

    def log_tail(self, lines: int = 40) -> str:
        """The end of the engine's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    @property
    def pid(self) -> int:
        """Of the child; vLLM's processes are below it."""
        return int(self._process.pid)

    def shutdown(self) -> None:
        """Ends the engine in good order, by force after 30 s."""
        with contextlib.suppress(OSError):
            self._connection.send_bytes(pickle.dumps(None))
            self._process.join(30)
        self.kill()

    def kill(self) -> None:
        """Ends the child and vLLM's processes at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, 9)
        self._process.kill()  # it may not have made its process group yet
        self._process.join()


def _variables(spec: EngineSpec) -> dict[str, str]:
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if spec.in_process else "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "INFO"),
        "PYTHONUNBUFFERED": "1",
        **({"VLLM_PLUGINS": ""} if spec.arm is Arm.ABSENT else {}),
        **dict(spec.environment),
    }
