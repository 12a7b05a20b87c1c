"""The defects: each function breaks capture, the reference or a golden, as a mistake in its code would.

`apply` is called in every process of an engine that captures: in the engine's child as EngineSpec.setup, and as a
plugin of vLLM in the processes that vLLM itself starts. The environment variable says which defects.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import harness.capture
from harness import reference
from harness.reference import Reference

VARIABLE = "VLLM_MM_EMBEDDING_DEFECTS"
"""Names of the functions below, separated by commas."""


def apply() -> None:
    """Applies the defects that the environment names, once a process."""
    capture: Any = harness.capture
    if not hasattr(capture, "defects"):
        capture.defects = [name for name in os.environ.get(VARIABLE, "").split(",") if name]
        for name in capture.defects:
            globals()[name]()


def _replace(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    setattr(owner, name, wrap(getattr(owner, name)))


def item_dropped() -> None:
    """The last of a request's items is left out."""
    from harness.capture import scheduler

    _replace(
        scheduler,
        "encoded_features",
        lambda original: lambda features: original(features)[:-1] or original(features),
    )


def items_swapped() -> None:
    """Items are taken in an order that is not the prompt's."""
    from harness.capture import scheduler

    _replace(scheduler, "encoded_features", lambda original: lambda features: original(features)[::-1])


def stale_tensor() -> None:
    """The store tells items apart by their size and not by what they are: rows of another request are returned."""
    from harness.capture.store import Item

    item: Any = Item
    item.__eq__ = lambda self, other: self.nbytes == other.nbytes
    item.__hash__ = lambda self: hash(self.nbytes)


def off_by_one_rows() -> None:
    """The slice of the encoder's output begins one row late."""
    import torch

    from harness.capture import worker

    def late(original: Any) -> Any:
        def rows(*args: Any) -> Any:
            output = original(*args)
            return None if output is None else torch.cat([output[1:], output[-1:]])

        return rows

    _replace(worker, "_rows", late)


def levels_not_cut() -> None:
    """The deepstack levels stay behind the rows."""
    import torch

    from harness.capture import frontend

    def uncut(original: Any) -> Any:
        def read(delivery: dict[str, Any]) -> Any:
            found = original(delivery)
            if found.levels is None:
                return found
            return dataclasses.replace(found, rows=torch.cat([found.rows, *found.levels], dim=1))

        return read

    _replace(frontend, "_read", uncut)


def levels_reversed() -> None:
    """The deepstack levels are in another order."""
    from harness.capture import frontend

    def reverse(original: Any) -> Any:
        def read(delivery: dict[str, Any]) -> Any:
            found = original(delivery)
            return dataclasses.replace(found, levels=None if found.levels is None else found.levels.flip(0))

        return read

    _replace(frontend, "_read", reverse)


def lost_on_stop_string() -> None:
    """The embeddings go with the engine core's last output, which a request that a stop string ends does not have."""
    from harness.capture.scheduler import SchedulerCapture

    def at_the_end(original: Any) -> Any:
        def deliver(self: Any, output: Any) -> None:
            if output.finish_reason is not None:
                original(self, output)

        return deliver

    _replace(SchedulerCapture, "_deliver", at_the_end)


def children_share_memory() -> None:
    """Completions of the same items get one tensor."""
    from harness.capture import frontend

    def remember(original: Any) -> Any:
        known: dict[str, Any] = {}

        def read(delivery: dict[str, Any]) -> Any:
            return known.setdefault(str(delivery["items"]), original(delivery))

        return read

    _replace(frontend, "_read", remember)


def text_gets_rows() -> None:
    """A request without items gets the rows of the one before."""
    from vllm.outputs import CompletionOutput

    from harness.capture import frontend

    def keep(original: Any) -> Any:
        def read(delivery: dict[str, Any]) -> Any:
            found = original(delivery)
            CompletionOutput.mm_embedding = found.rows  # the default of all completions
            return found

        return read

    _replace(frontend, "_read", keep)


def opt_out_ignored() -> None:
    """A request that opts out is captured all the same."""
    from harness.capture.settings import RequestOptions

    original = RequestOptions.of
    RequestOptions.of = staticmethod(  # type: ignore[method-assign]
        lambda extra_args: original(extra_args)._replace(capture=True)
    )


def leases_never_end() -> None:
    """Leak: what was delivered is held for ever."""
    from harness.capture.store import EmbeddingStore

    EmbeddingStore._end_lease = lambda self, lease: None  # type: ignore[method-assign]


def metrics_count_totals() -> None:
    """The metrics are sent totals, which they add up."""
    from harness.capture.metrics import COUNTERS, Poll

    def totals(original: Any) -> Any:
        def poll(self: Any) -> Any:
            changes = original(self)
            if changes is not None:
                changes.data.update({key: self._last[key] for key in changes.data if key in COUNTERS})
            return changes

        return poll

    _replace(Poll, "__call__", totals)


def reuse_loads_rows_shifted() -> None:
    """Re-use puts the rows of an item into the encoder cache one row further."""
    from harness.capture.worker import WorkerCapture

    def shifted(original: Any) -> Any:
        def load(self: Any, plan: Any, encoder_cache: Any) -> None:
            original(self, plan, encoder_cache)
            for item, _ in plan.loads:
                encoder_cache[item.identifier] = encoder_cache[item.identifier].roll(1, 0)

        return load

    _replace(WorkerCapture, "load", shifted)


def aborted_requests_never_released() -> None:
    """Leak: a request that is aborted is kept, with its items if it had no output yet."""
    from harness.capture.scheduler import SchedulerCapture

    def leak(original: Any) -> Any:
        def request_finished(self: Any, request_id: str) -> None:
            if self._ended is not None:  # it ends with an output, and not by an abort
                original(self, request_id)

        return request_finished

    _replace(SchedulerCapture, "request_finished", leak)


def sent_embeddings_not_discarded() -> None:
    """Leak: what was sent of a request that was aborted meanwhile is held until its lease expires."""
    from harness.capture import reader

    _replace(reader, "discard", lambda _original: lambda _handle: None)


def session_accepted() -> None:
    """A streaming-input session is captured like a request that has all of its items."""
    from harness.capture.scheduler import SchedulerCapture

    def accepting(original: Any) -> Any:
        def start(self: Any, request: Any) -> Any:
            request.resumable, resumable = False, request.resumable
            try:
                return original(self, request)
            finally:
                request.resumable = resumable

        return start

    _replace(SchedulerCapture, "_start", accepting)


def prefill_not_forced() -> None:
    """A prefix-cache hit is taken although it covers an item that was not captured."""
    from harness.capture.scheduler import SchedulerCapture

    def never(original: Any) -> Any:
        def admit(self: Any, request: Any, num_computed_tokens: int) -> bool:
            forced = self.forced_prefills
            admitted: bool = original(self, request, num_computed_tokens)
            if self.forced_prefills > forced:
                self.forced_prefills, request.skip_reading_prefix_cache = forced, False
                return True
            return admitted

        return admit

    _replace(SchedulerCapture, "admit", never)


def repeats_dropped() -> None:
    """An item that occurs twice in a prompt is returned once."""
    from harness.capture import scheduler

    def once(original: Any) -> Any:
        return lambda features: list({feature.identifier: feature for feature in original(features)}.values())

    _replace(scheduler, "encoded_features", once)


def captures_when_idle() -> None:
    """Capture is on although nobody asked for it."""
    from harness.capture.settings import CaptureSettings

    original = CaptureSettings.of

    def always(vllm_config: Any) -> CaptureSettings:
        vllm_config.model_config.multimodal_config.enable_return_mm_embedding = True
        return original(vllm_config)

    CaptureSettings.of = staticmethod(always)  # type: ignore[method-assign]


def _changes_the_models_rows(change: Callable[[Any], Any]) -> None:
    from harness.capture.connector import MMEmbeddingConnector

    def save_caches(self: Any, encoder_cache: dict[str, Any], mm_hash: str, **kwargs: Any) -> None:
        encoder_cache[mm_hash].copy_(change(encoder_cache[mm_hash]))

    MMEmbeddingConnector.save_caches = save_caches  # type: ignore[method-assign]


def model_gets_rounded_rows() -> None:
    """The rows are rounded where they lie, and the language model reads them after that."""
    _changes_the_models_rows(lambda rows: rows.bfloat16())


def model_gets_cleared_rows() -> None:
    """The rows are cleared before the language model has read them."""
    _changes_the_models_rows(lambda rows: rows * 0)


def rows_rounded() -> None:
    """The returned rows went through bfloat16."""
    from harness.capture import worker

    def rounded(original: Any) -> Any:
        def rows(*args: Any) -> Any:
            output = original(*args)
            return None if output is None else output.bfloat16().to(output.dtype)

        return rows

    _replace(worker, "_rows", rounded)


def lost_when_merged() -> None:
    """Outputs that merge for a slow consumer lose the embeddings."""
    from vllm.outputs import RequestOutput

    harness.capture.register()
    patched, original = RequestOutput.add, inspect.unwrap(RequestOutput.add)
    # With the patch's mark, so that registering again does not wrap it again.
    RequestOutput.add = functools.wraps(patched)(lambda *args, **kwargs: original(*args, **kwargs))


def handle_sent_elsewhere() -> None:
    """A frontend that cannot open the engine core's memory gets a handle all the same."""
    from harness.capture.scheduler import SchedulerCapture

    SchedulerCapture._rows = (  # type: ignore[method-assign]
        lambda self, request_id, handle, capture: {"handle": handle}
    )


def engines_mixed_up() -> None:
    """The frontend takes the first engine that it hears of for the owner of all embeddings."""
    from harness.capture import reader

    heard_of: list[Any] = []

    def of_the_first(original: Any) -> Any:
        def decode(handle: dict[str, Any]) -> Any:
            address, spans = original(handle)
            heard_of.append(address)
            return heard_of[0], spans

        return decode

    _replace(reader, "_decode", of_the_first)


def refusal_removed() -> None:
    """Every configuration passes for one that can capture."""
    from harness.capture import settings

    settings.cannot_capture = lambda vllm_config: None


def rust_frontend_accepted() -> None:
    """The frontend that passes no embeddings on passes for one that does."""
    from unittest import mock

    from harness.capture import settings

    def unaware(original: Any) -> Any:
        def cannot_capture(vllm_config: Any) -> Any:
            with mock.patch.dict(os.environ, {"VLLM_USE_RUST_FRONTEND": "0"}):
                return original(vllm_config)

        return cannot_capture

    _replace(settings, "cannot_capture", unaware)


def engines_not_counted() -> None:
    """An engine does not know of another one in its process that captures."""
    from harness.capture import connector

    class Uncounted(dict[Any, Any]):
        def __setitem__(self, executor: Any, captures: bool) -> None:
            pass

    connector._executors = Uncounted()  # type: ignore[assignment]


def rows_widened() -> None:
    """The rows come in a dtype that is not the engine's."""
    from harness.capture import frontend

    def wide(original: Any) -> Any:
        def read(delivery: dict[str, Any]) -> Any:
            found = original(delivery)
            return dataclasses.replace(found, rows=found.rows.double())

        return read

    _replace(frontend, "_read", wide)


def http_opt_in_ignored() -> None:
    """Every response has the field."""
    from harness.capture import http

    http._is_asked = lambda request: True


def _http_fields(change: Callable[[Any, dict[str, Any]], dict[str, Any]]) -> None:
    from harness.capture import http

    def changed(original: Any) -> Any:
        return lambda completion: change(completion, original(completion))

    _replace(http, "_fields", changed)


def http_levels_missing() -> None:
    """Responses have no deepstack levels."""
    _http_fields(lambda _completion, fields: {"mm_embedding": fields["mm_embedding"]})


def http_first_choice_alone() -> None:
    """The first choice has the field, the others do not."""
    _http_fields(lambda completion, fields: fields if completion.index == 0 else {})


def http_null_missing() -> None:
    """A chat without media has no field."""
    _http_fields(lambda completion, fields: fields if completion.mm_embedding is not None else {})


def http_field_missing() -> None:
    """The chunks of a stream do not get the field."""
    from harness.capture import http

    http._with_fields = lambda event, fields: event


def batches_rounded() -> None:
    """What is copied together with other items is rounded on the way."""
    from harness.capture.worker import WorkerCapture

    def rounding(original: Any) -> Any:
        def copy(self: Any, plan: Any, encoder_cache: dict[str, Any]) -> None:
            if len(plan.copies) > 1:
                encoder_cache = {name: rows.bfloat16().to(rows.dtype) for name, rows in encoder_cache.items()}
            original(self, plan, encoder_cache)

        return copy

    _replace(WorkerCapture, "copy", rounding)


# Of the Hugging Face side of the comparison, each in one case of the test that must see it.


def _in_case(case: str) -> bool:
    return f"-{case}]" in os.environ.get("PYTEST_CURRENT_TEST", "")


def _reference_processes(patch: pytest.MonkeyPatch, case: str, change: Callable[[Any, dict[str, Any]], None]) -> None:
    """Changes the reference or the media, by modality, before the processor runs."""
    original = Reference.process

    def process(self: Reference, text: str, media: Any) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as once:
            if _in_case(case):
                media = dict(media)
                change((self.processor, once), media)
            return original(self, text, media)

    patch.setattr(Reference, "process", process)


def reference_images_reversed(patch: pytest.MonkeyPatch) -> None:
    """The reference gets the images in another order."""
    _reference_processes(patch, "two-images", lambda _processor, media: media.update(image=media["image"][::-1]))


def reference_resized(patch: pytest.MonkeyPatch) -> None:
    """The reference gets the image in another size."""

    def change(_processor: Any, media: dict[str, Any]) -> None:
        media["image"] = [dataclasses.replace(item, width=item.width // 2) for item in media["image"]]

    _reference_processes(patch, "image-between-texts", change)


def reference_mean_changed(patch: pytest.MonkeyPatch) -> None:
    """The reference normalises with another mean."""

    def change(processor: Any, _media: dict[str, Any]) -> None:
        found, once = processor
        once.setattr(found.image_processor, "image_mean", [0.4, 0.5, 0.6])

    _reference_processes(patch, "photograph", change)


def reference_audio_truncated(patch: pytest.MonkeyPatch) -> None:
    """The reference gets the first half of the audio."""

    def change(_processor: Any, media: dict[str, Any]) -> None:
        media["audio"] = [dataclasses.replace(item, num_samples=item.num_samples // 2) for item in media["audio"]]

    _reference_processes(patch, "audio", change)


def _reference_encodes(patch: pytest.MonkeyPatch, case: str, change: Callable[[Any, Any, Any], Any]) -> None:
    original = Reference.encode

    def encode(self: Reference, modality: str, inputs: Any) -> Any:
        if not _in_case(case):
            return original(self, modality, inputs)
        return change(functools.partial(original, self), modality, inputs)

    patch.setattr(Reference, "encode", encode)


def reference_grid_transposed(patch: pytest.MonkeyPatch) -> None:
    """The reference exchanges height and width of the grid."""

    def change(encode: Any, modality: str, inputs: Any) -> Any:
        return encode(modality, {**inputs, "image_grid_thw": inputs["image_grid_thw"][:, [0, 2, 1]]})

    _reference_encodes(patch, "three-sizes", change)


def reference_encoder_changed(patch: pytest.MonkeyPatch) -> None:
    """The reference's encoder is another."""

    def change(encode: Any, modality: str, inputs: Any) -> Any:
        found = encode(modality, inputs)
        return found._replace(rows=found.rows * 1.01)

    _reference_encodes(patch, "same-image-twice", change)


def reference_not_normalised(patch: pytest.MonkeyPatch) -> None:
    """The reference takes the raw pixels that vLLM's processor leaves for the device to normalise."""
    import torch

    original = reference.prepared

    def prepared(of: Any, modality: str, value: Any) -> Any:
        raw = _in_case("image") and value.dtype == torch.uint8
        return original(of, modality, value.float() if raw else value)

    patch.setattr(reference, "prepared", prepared)


# Of a copy of a model's goldens, in that folder.


def golden_value_changed(folder: Path) -> None:
    """A value in a recorded file is another."""
    _change_value(folder / "image.safetensors")


def golden_rerecorded(folder: Path) -> None:
    """A value in a recorded file is another, and the manifest agrees with the file."""
    path = folder / "video.safetensors"
    _change_value(path)
    with _manifest(folder) as cases:
        cases["video"]["tensor_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()


def golden_input_changed(folder: Path) -> None:
    """The recorded hash of the media is another."""
    with _manifest(folder) as cases:
        cases["two-images"]["inputs"]["media"] = "0" * 64


def _change_value(path: Path) -> None:
    import safetensors.torch

    tensors = safetensors.torch.load(path.read_bytes())
    tensors["embedding"][3, 5] += 0.1
    path.write_bytes(safetensors.torch.save(tensors))


@contextmanager
def _manifest(folder: Path) -> Iterator[dict[str, Any]]:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    yield manifest["cases"]
    path.write_text(json.dumps(manifest))
