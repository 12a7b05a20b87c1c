"""Engine-core side: which embeddings a request needs, which step copies them, and the handle of its first output."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorMetadata
from vllm.logger import init_logger
from vllm.v1.engine import FinishReason

from harness.capture.arena import Arena
from harness.capture.reader import pack, read
from harness.capture.settings import CaptureSettings, RequestOptions
from harness.capture.store import EmbeddingStore, Item, ItemTooLarge, Loan, NotDispatched
from harness.capture.transport import Address, Block, SegmentId, TransportError, whereabouts

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.request import Request

logger = init_logger("vllm.mm_embedding")

DELIVERY = "mm_embedding"
"""Key of EngineCoreOutput.ec_transfer_params for what the frontend gets with a request's first output."""


_CAPTURE = "_mm_embedding_capture"
"""Attribute of a Request: its _Capture."""

_STAMP_SECONDS = 5.0
"""How long a step may wait for copies whose step is over, which therefore are there or about to be."""

_MESSAGE_BYTES = 2**32 - 1
"""The most that msgpack has one field for."""


@dataclass
class StepPlan(ECConnectorMetadata):
    """What the worker copies in one step. Complete in itself, so that any worker can serve any engine.

    Attributes:
        owner: of the memory.
        copies: items to copy and where to.
        loads: kept items to put into the encoder cache, and where they are.
        whole: the copies are to be loaded again, so that they must be all of the encoder's output.
        prepare: segments that the owner made.
    """

    owner: Address
    copies: list[tuple[Item, Block]]
    loads: list[tuple[Item, Block]]
    whole: bool
    prepare: list[SegmentId]


def num_levels(model_config: ModelConfig) -> int:
    """How many deepstack levels the vision encoder packs behind the rows of its output; 0 for most models."""
    for config in (model_config.hf_config, getattr(model_config.hf_config, "thinker_config", None)):
        vision_config = getattr(config, "vision_config", None)
        if indexes := getattr(vision_config, "deepstack_visual_indexes", None):
            return len(indexes)
    return 0


@dataclass(slots=True)
class _Capture:
    """What a request is to give. It does not hold the request, which holds it from its arrival on."""

    items: list[Item]  # in prompt order; none if it is not to be captured
    features: list[MultiModalFeatureSpec]  # likewise
    reader: str | None  # where it is, see settings.READER
    delivery: dict[str, Any]  # but for the rows


def encoded_features(features: Iterable[MultiModalFeatureSpec]) -> list[MultiModalFeatureSpec]:
    """Those with an encoder's output, in prompt order.

    vLLM passes the prompt_embeds among a chat's parts through the encoder cache too, though no encoder made them.
    """
    encoded = (feature for feature in features if feature.modality != "prompt_embeds")
    return sorted(encoded, key=lambda feature: feature.mm_position.offset)


def _num_embeds(feature: MultiModalFeatureSpec, start: int, stop: int) -> int:
    """How many of the feature's rows lie in the positions [start, stop) of the prompt."""
    position = feature.mm_position
    first, last = max(start - position.offset, 0), min(stop - position.offset, position.length)
    if first >= last:
        return 0
    low, high = position.get_embeds_indices_in_range(first, last)
    return high - low


def _error(message: str, status: HTTPStatus = HTTPStatus.INTERNAL_SERVER_ERROR) -> dict[str, Any]:
    """Instead of embeddings. The status: whether the same request would fail again."""
    return {"error": message, "status": int(status)}


@dataclass
class SchedulerCapture:
    """The scheduler's half of the connector, called from the connector's methods and from engine_core.

    What it does at every step, for every request that runs, is kept to a look into `settled`: while the engine decodes,
    the GPU waits for the scheduler.
    """

    settings: CaptureSettings
    hidden_size: int
    num_levels: int
    dtype: str
    forced_prefills: int = 0
    """Requests whose prefix-cache hit was passed by, because it covered an item that the store does not hold."""
    reused: int = 0
    """Items that were loaded into the encoder cache instead of encoded again."""
    reused_bytes: int = 0
    num_ended: int = 0
    """Of the requests that were admitted."""
    settled: set[str] = field(default_factory=set)
    """The admitted requests that `admit` says yes to until they end, and has nothing to do for."""
    _captures: dict[str, _Capture] = field(default_factory=dict)
    _undelivered: set[str] = field(default_factory=set)  # those of them that have items and had no output
    _uncopied: dict[str, Request] = field(default_factory=dict)  # those with items to dispatch, as far as known
    _failures: dict[str, str] = field(default_factory=dict)
    _ended: list[str] | None = None
    _asked: dict[str, Item] = field(default_factory=dict)  # items of the request that is being scheduled
    _promised: dict[str, Loan] = field(default_factory=dict)  # those of them that the step may load
    _loans: list[Loan] = field(default_factory=list)  # those that it will load
    _loans_of_steps: deque[list[Loan]] = field(default_factory=deque)  # of those under way

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> SchedulerCapture:
        """For one engine.

        Raises:
            ValueError: the engine cannot capture.
        """
        model_config = vllm_config.model_config
        return cls(
            CaptureSettings.of(vllm_config),
            model_config.get_inputs_embeds_size(),
            num_levels(model_config),
            str(model_config.dtype).removeprefix("torch."),
        )

    def __post_init__(self) -> None:
        self._arena = Arena(self.settings.memory_bytes)
        self.store = EmbeddingStore(self._arena, self.settings.cache_bytes)

    def stats(self) -> dict[str, int]:
        """Counts of the store (see store.Stats), `admitted` (requests that have not ended), and of this class."""
        self.store.reap()
        return self.counts()

    def counts(self) -> dict[str, int]:
        """The same, without a look at the leases, of which some may be done."""
        return {
            **self.store.stats()._asdict(),
            "admitted": self.num_admitted(),
            "forced_prefills": self.forced_prefills,
            "reused": self.reused,
            "reused_bytes": self.reused_bytes,
        }

    def num_admitted(self) -> int:
        """Multimodal requests that were let in and have not ended."""
        # A request that ends in this step is gone for vLLM: its own metrics do not count it as running.
        return len(self._captures) - sum(request_id in self._captures for request_id in self._ended or ())

    def close(self) -> None:
        """Gives all memory back."""
        self.store.close()

    def expect(self, request: Request) -> None:
        """Reads what the request asks for when it arrives, from any thread.

        Where that is in time, the GPU does not wait for it, as it does for a schedule. Else `admit` does it.
        """
        request.__dict__[_CAPTURE] = self._wanted(request)

    def admit(self, request: Request, num_computed_tokens: int) -> bool:
        """Whether the request may be scheduled now: there is memory for its embeddings and a way to get them.

        Called at every step for every multimodal request that is not settled. `num_computed_tokens` counts a
        prefix-cache hit in.
        """
        request_id = request.request_id
        capture = self._captures.get(request_id)
        if capture is None:
            capture = self._start(request)
            if capture is None:
                return False
        if self.settings.reuse:
            self._asked = self._loadable(capture)
        if not num_computed_tokens or request_id not in self._uncopied:
            return True
        pending = self.store.pending(request_id)
        if not pending:
            self._settle(request_id)
            return True
        # A prefix-cache hit over an item schedules no encoder for it: what was not captured before cannot be now.
        covered = any(
            item in pending and not _num_embeds(feature, num_computed_tokens, request.num_tokens)
            for item, feature in zip(capture.items, capture.features, strict=True)
        )
        if not covered:
            return True
        if request.skip_reading_prefix_cache:
            self._fail(request, "its prompt was computed elsewhere, so that the encoder does not run here")
        else:
            self.forced_prefills += 1
            request.skip_reading_prefix_cache = True
        return False

    def _wanted(self, request: Request) -> _Capture:
        options = RequestOptions.of(request.sampling_params.extra_args if request.sampling_params else None)
        features = encoded_features(request.mm_features) if options.capture else []
        packed = options.levels or self.settings.reuse
        width = self.hidden_size * (1 + self.num_levels if packed else 1)
        items = [
            Item(feature.identifier, packed, feature.mm_position.get_num_embeds(), width, self.dtype)
            for feature in features
        ]
        delivery = {
            "hidden_size": self.hidden_size,
            "items": [
                [feature.modality, item.num_rows, item.identifier]
                for item, feature in zip(items, features, strict=True)
            ],
            "levels": options.levels,
        }
        return _Capture(items, features, options.reader, delivery)

    def _start(self, request: Request) -> _Capture | None:
        request_id = request.request_id
        capture: _Capture = request.__dict__.get(_CAPTURE) or self._wanted(request)
        if capture.items:
            if request.resumable:
                self._fail(request, "it is a streaming-input session; send its items in one prompt")
                return None
            try:
                if not self.store.acquire(request_id, capture.items):
                    logger.info_once(
                        "Requests wait because the captured embeddings fill mm_embedding_memory_gb (%.3f GiB).",
                        self.settings.memory_bytes / 2**30,
                    )
                    return None
            except ItemTooLarge as error:
                self._fail(request, f"{error} (mm_embedding_memory_gb)")
                return None
            self._undelivered.add(request_id)
            self._uncopied[request_id] = request
        else:
            self._settle(request_id)
        self._captures[request_id] = capture
        return capture

    def _settle(self, request_id: str) -> None:
        self._uncopied.pop(request_id, None)
        if not self.settings.reuse:  # else `admit` says which items of the request may be loaded
            self.settled.add(request_id)

    def _fail(self, request: Request, reason: str) -> None:
        self._failures[request.request_id] = f"Request {request.request_id} has no mm_embedding: {reason}."

    def take_unavailable_requests(self) -> set[str]:
        """Requests that the scheduler must end with an error."""
        return set(self._failures)

    def plan(self, scheduler_output: SchedulerOutput) -> StepPlan | None:
        """The copies of this step: every item that has rows among the scheduled tokens and was not copied before.

        None if the worker has nothing to do in it, as in most steps.

        The worker reads them where the model does, from its encoder cache after the encoder ran: computed in this step,
        by another request or for the second time, it is there.
        """
        copies, copied = [], []
        for request_id, request in self._uncopied.items():
            num_tokens = scheduler_output.num_scheduled_tokens.get(request_id)
            if num_tokens is None:  # it waits
                continue
            start, capture = request.num_computed_tokens, self._captures[request_id]
            for item, feature in zip(capture.items, capture.features, strict=True):
                if _num_embeds(feature, start, start + num_tokens):
                    block = self.store.dispatch(request_id, item)
                    if block is not None:
                        copies.append((item, block))
            if not self.store.pending(request_id):
                copied.append(request_id)
        for request_id in copied:
            self._settle(request_id)
        loads = [(loan.item, loan.block) for loan in self._loans]
        self._loans_of_steps.append(self._loans)
        self._loans = []
        for loan in self._promised.values():  # there was no room for the request after all
            self.store.end_loan(loan)
        self._promised.clear()
        # In a step without tokens vLLM's V1 runner does not show the plan to its worker.
        made = self.store.take_made() if scheduler_output.total_num_scheduled_tokens else []
        return self._step_plan(copies, loads, made) if copies or loads or made else None

    def empty_plan(self) -> StepPlan:
        """Of a step in which there is nothing to do, for a worker that needs one."""
        return self._step_plan([], [], [])

    def _step_plan(
        self, copies: list[tuple[Item, Block]], loads: list[tuple[Item, Block]], made: list[SegmentId]
    ) -> StepPlan:
        return StepPlan(self._arena.address, copies, loads, self.settings.reuse, made)

    def _loadable(self, capture: _Capture) -> dict[str, Item]:
        # Beside deepstack levels, what has none (audio) is kept with zeros in their place, and is not what was encoded.
        return {
            item.identifier: item
            for item, feature in zip(capture.items, capture.features, strict=True)
            if not self.num_levels or feature.modality in ("image", "video")
        }

    def has(self, identifier: str) -> bool:
        """Whether an item of the request that `admit` was asked about last is loaded instead of encoded.

        A yes is a promise, for which the item is held from now on: vLLM does not encode it then, and it must not be
        evicted before the worker reads it.
        """
        if (item := self._asked.get(identifier)) is None:
            return False
        loan = self._promised.get(identifier)
        if loan is not None and loan.item != item:
            # Another request's, which got no room and will ask again. A user may give one identifier to two items.
            self.store.end_loan(self._promised.pop(identifier))
            loan = None
        if loan is None:
            loan = self.store.lend(item)
            if loan is not None:
                self._promised[identifier] = loan
        return loan is not None

    def allocated(self, identifier: str) -> None:
        """The encoder cache has room for the item: this step loads it if that was promised, or else encodes it."""
        if (loan := self._promised.pop(identifier, None)) is not None:
            self._loans.append(loan)
            self.reused += 1
            self.reused_bytes += loan.block.nbytes

    def request_finished(self, request_id: str) -> None:
        """Lets go of the request's embeddings; within a step after its outputs were delivered."""
        self.num_ended += request_id in self._captures
        if self._ended is not None:
            self._ended.append(request_id)
        else:
            self._let_go(request_id)

    def _let_go(self, request_id: str) -> None:
        self._captures.pop(request_id, None)
        self.settled.discard(request_id)
        self._failures.pop(request_id, None)
        if request_id in self._undelivered:
            self._undelivered.remove(request_id)
            self._uncopied.pop(request_id, None)
            self.store.release(request_id)

    def begin_update(self) -> None:
        """From now on requests may finish, whose first output is to be delivered by `end_update`."""
        self._ended = []

    def end_update(self, outputs: Collection[EngineCoreOutputs]) -> None:
        """Puts the handles on the first output of each request, which always follows its whole prefill.

        Not on the last one: a stop string is found in the frontend, where nothing comes after it.
        """
        if self._undelivered or self._failures:
            for client_outputs in outputs:
                for output in client_outputs.outputs:
                    self._deliver(output)
        # One rank replied. The others have read the blocks too: the language model's collective operations, which this
        # step's tokens came through, run after the loads on each of them.
        for loan in self._loans_of_steps.popleft() if self._loans_of_steps else ():
            self.store.end_loan(loan)
        ended, self._ended = self._ended or [], None
        for request_id in ended:
            self._let_go(request_id)

    def _deliver(self, output: EngineCoreOutput) -> None:
        request_id = output.request_id
        if (failure := self._failures.get(request_id)) is not None:
            delivery = _error(failure, HTTPStatus.BAD_REQUEST)
        elif request_id not in self._undelivered:
            return
        else:
            try:
                handle = self.store.deliver(request_id)
            except NotDispatched:
                if output.finish_reason is FinishReason.ERROR:  # vLLM's own, before the prefill was over
                    return
                # Not reached as far as known. Loud all the same: never a silent None.
                failure = f"Request {request_id} has no mm_embedding: an item was not captured."
                logger.error(failure)
                delivery = _error(failure)
                self.store.release(request_id)
            else:
                capture = self._captures[request_id]
                delivery = {**self._rows(request_id, handle, capture), **capture.delivery}
            self._undelivered.remove(request_id)
            self._settle(request_id)
        output.ec_transfer_params = {**(output.ec_transfer_params or {}), DELIVERY: delivery}

    def _rows(self, request_id: str, handle: dict[str, Any], capture: _Capture) -> dict[str, Any]:
        """The handle of the rows; for a frontend that cannot open this process's memory the rows themselves."""
        if capture.reader in (None, whereabouts()):
            return {"handle": handle}
        logger.info_once(
            "Embeddings go through the sockets, which is slower than shared memory, because a frontend is on another "
            "host, in another container or another user's."
        )
        if (nbytes := sum(item.nbytes for item in capture.items)) > _MESSAGE_BYTES:
            self.store.cancel(handle)
            failure = f"Request {request_id} has no mm_embedding: {nbytes} bytes are too many for a message."
            return _error(failure, HTTPStatus.BAD_REQUEST)
        try:
            return {"rows": pack(read(handle, _STAMP_SECONDS))}
        except TransportError as error:
            return _error(f"Request {request_id} has no mm_embedding: {error}.")

    def reset(self) -> None:
        """The weights changed: what was captured before is of no use to later requests."""
        self.store.reset()
