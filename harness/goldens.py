"""Recorded embeddings: did the answer change, or did the question?

`golden/<model>/manifest.json` is small and reviewable: for each case the hashes of its inputs, shape, dtype, items, row
norms, the versions that it was recorded with and the sha256 of its tensor. The tensor lies beside it as
`<case>.safetensors`, or, where it is too large for git, in a store outside the repository as `<sha256>.safetensors`.
An update never deletes anything.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors
import safetensors.torch
import torch

from harness.compare import Comparison, ItemSpan, Span, Tolerance, compare
from harness.files import write_atomically

SCHEMA = 1
"""Version of the manifest's form."""

UPDATE_OPTION = "--golden-update"
"""The option that the failure texts name."""

UpdateMode = Literal["new", "changed", "all"]
"""`new`: record missing goldens. `changed`: record again those that fail. `all`: record every visited case."""

UPDATE_MODES: tuple[UpdateMode, ...] = get_args(UpdateMode)

Status = Literal["matched", "recorded", "missing", "input changed", "answer changed", "rejected"]

NORM_ROUNDING = 5e-6
"""Norms are kept with six digits: 1.00000 stands for anything within half of its last digit."""

_KEY = "embedding"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class GoldenError(Exception):
    """Base of this module's errors; the message is one sentence for the user."""


class MissingGoldenError(GoldenError):
    """No golden is recorded for the case, or its tensor is not here."""

    def __init__(self, message: str, *, recordable: bool = True) -> None:
        """Keep the message and whether the mode `new` may record the case (not if its tensor is merely elsewhere)."""
        super().__init__(message)
        self.recordable = recordable


class CorruptGoldenError(GoldenError):
    """The manifest or a tensor cannot be read as it was written. Nothing is overwritten."""


class RejectedGoldenError(GoldenError):
    """The tensor may not become a golden: the reference check rejects it, or it is not finite."""


@dataclass(frozen=True)
class GoldenInputs:
    """What the embedding was computed from, so that a changed input is not taken for a changed answer."""

    prompt: str
    """The text itself."""
    media: str
    """Digest of the pixels or samples before the processor."""
    token_ids: str
    """`hash_token_ids` of the processed prompt."""
    weights: str
    """Digest of the checkpoint."""
    processor: str
    """`hash_tensors` of what the processor made of the media. The only one that may depend on the machine."""


@dataclass(frozen=True)
class Golden:
    """One recorded embedding."""

    case: str
    tensor: torch.Tensor
    """Shape (len(rows), width) if rows were sampled, else (num_rows, width)."""
    num_rows: int
    """Rows of the whole embedding."""
    rows: tuple[int, ...] | None
    """Indices of the rows that were kept, None for all."""
    norms: tuple[float, ...]
    """L2 norm of every row of the whole embedding if rows were sampled, else empty. Six digits."""
    items: tuple[Span, ...]
    inputs: GoldenInputs
    recorded_with: Mapping[str, str]
    """Versions, as `harness.environment.versions` gives them."""


@dataclass(frozen=True)
class GoldenCheck:
    """What `Goldens.verify` found. The test passes if `ok` and fails with `message` otherwise."""

    status: Status
    message: str
    comparison: Comparison | None = None

    @property
    def ok(self) -> bool:
        """Whether the golden matches or was just recorded."""
        return self.status in ("matched", "recorded")


def hash_token_ids(token_ids: Sequence[int]) -> str:
    """sha256 over the ids as decimal text."""
    return hashlib.sha256(" ".join(str(int(token)) for token in token_ids).encode()).hexdigest()


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sample_rows(num_rows: int, count: int) -> tuple[int, ...]:
    """At most `count` row indices spread evenly over 0 .. num_rows - 1, first and last among them."""
    if num_rows <= count:
        return tuple(range(num_rows))
    return tuple(round(index * (num_rows - 1) / max(count - 1, 1)) for index in range(count))


class Goldens:
    """The goldens of one model in a folder; remembers which cases a session visited."""

    def __init__(self, root: Path, model: str, *, store: Path | None = None) -> None:
        """Open a model's goldens; nothing is read or created yet.

        Args:
            root: the folder `golden/`.
            model: name or hub id; a "/" in it becomes "--".
            store: folder for the tensors of sampled goldens, outside the repository; None where there is none.
        """
        self.folder = root / _file_name(model.strip("/").replace("/", "--"))
        self.model = model
        self.store = store
        self._visited: set[str] = set()

    @property
    def manifest_path(self) -> Path:
        """Where the manifest is or would be."""
        return self.folder / "manifest.json"

    def cases(self) -> list[str]:
        """Recorded cases, sorted.

        Raises:
            CorruptGoldenError: the manifest cannot be read.
        """
        return sorted(self._manifest()["cases"])

    def unused(self, cases: Collection[str]) -> str:
        """One sentence that lists the recorded cases that no test read, verified or recorded; empty if there is none.

        Args:
            cases: all of the model. Where no test asked for one of them, tests were left out, and nothing is unused.

        Raises:
            CorruptGoldenError: the manifest cannot be read.
        """
        unused = [case for case in self.cases() if case not in self._visited]
        if not unused or not self._visited.issuperset(cases):
            return ""
        return (
            f"{self.manifest_path} holds {', '.join(unused)}, which no test of this session asked for: add the case to "
            "the model again, or remove its entry there and its .safetensors file"
        )

    def read(self, case: str) -> Golden:
        """Read one golden and check the tensor against the manifest's sha256.

        Raises:
            MissingGoldenError: it was never recorded, or its tensor is in a store that is not here.
            CorruptGoldenError: manifest or tensor is damaged.
        """
        self._visited.add(case)
        entry = self._manifest()["cases"].get(_file_name(case))
        if entry is None:
            raise MissingGoldenError(
                f"no golden for {case} of {self.model}: record it with {UPDATE_OPTION}=new, then review and commit it"
            )
        try:
            return self._read(case, entry)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise self._corrupt(self.manifest_path, f"has a damaged entry {case} ({error!r})") from error

    def record(
        self,
        case: str,
        tensor: torch.Tensor,
        *,
        inputs: GoldenInputs,
        items: Sequence[ItemSpan],
        reference_ok: bool | Comparison,
        versions: Mapping[str, str],
        rows: Sequence[int] | None = None,
    ) -> Path:
        """Record a tensor: first its file, then the manifest, each in one step.

        Args:
            case: becomes a file name.
            tensor: shape (num_rows, width).
            inputs: what it was computed from.
            items: its spans.
            reference_ok: verdict of the reference check on this very tensor.
            versions: `harness.environment.versions()`.
            rows: keep only these rows, and the norms of all; the tensor then goes to the store.

        Returns:
            The path of the tensor file.

        Raises:
            RejectedGoldenError: the reference rejects it, it has no rows or a number that is not finite.
            CorruptGoldenError: the manifest is damaged, so that nothing is written.
            GoldenError: rows are sampled and there is no store, or the folder cannot be written.
        """
        self._visited.add(case)
        _file_name(case)
        self._refuse(case, tensor, reference_ok)
        manifest = self._manifest()
        tensor = tensor.detach().cpu()
        kept = tensor if rows is None else tensor[list(rows)]
        content = safetensors.torch.save({_KEY: kept.contiguous()})
        sha256 = hashlib.sha256(content).hexdigest()
        path = self._tensor_path(case, sha256, sampled=rows is not None)
        norms = tensor.double().norm(dim=1)
        manifest["cases"][case] = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "inputs": asdict(inputs),
            "items": [f"{span.modality} {span.start} {span.num_rows} {span.identifier}" for span in items],
            "recorded_with": dict(versions),
            "row_norms": {
                "max": _six_digits(norms.max()),
                "mean": _six_digits(norms.mean()),
                "min": _six_digits(norms.min()),
                **({} if rows is None else {"all": " ".join(str(_six_digits(norm)) for norm in norms)}),
            },
            "rows": "all" if rows is None else " ".join(map(str, rows)),
            "shape": list(tensor.shape),
            "tensor_sha256": sha256,
        }
        text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
            write_atomically(self.manifest_path, text.encode())
        except OSError as error:
            raise GoldenError(f"cannot write the golden of {case} under {self.folder}: {error.strerror}") from error
        return path

    def verify(
        self,
        case: str,
        tensor: torch.Tensor | None,
        *,
        inputs: GoldenInputs,
        items: Sequence[ItemSpan],
        tolerance: Tolerance,
        reference_ok: bool | Comparison,
        versions: Mapping[str, str],
        update: UpdateMode | None = None,
        rows: Sequence[int] | None = None,
    ) -> GoldenCheck:
        """Compare a tensor with its golden, or record it where the update mode says so.

        Prompt, media, token ids and weights must be those recorded. The processor's output may differ in its bits, as
        image resizing does between CPUs, as long as the embedding agrees within the tolerance.

        Args:
            case: as in `record`.
            tensor: as in `record`; None (the engine returned nothing) never matches.
            inputs: as in `record`.
            items: as in `record`.
            tolerance: per row of the whole embedding, or one limit for all.
            reference_ok: as in `record`.
            versions: as in `record`.
            update: None compares only; see `UpdateMode`.
            rows: as in `record`, for a recording only.

        Raises:
            CorruptGoldenError: manifest or tensor is damaged; no update mode writes over it.
            GoldenError: the golden cannot be written.
        """
        self._visited.add(case)
        if tensor is None:
            lost = Comparison("presence", "The embedding is missing (None).")
            return GoldenCheck("answer changed", f"{case}: there is no embedding to compare or to record", lost)

        def record(why: str) -> GoldenCheck:
            try:
                path = self.record(
                    case,
                    tensor,
                    inputs=inputs,
                    items=items,
                    reference_ok=reference_ok,
                    versions=versions,
                    rows=rows,
                )
            except RejectedGoldenError as error:
                return GoldenCheck("rejected", str(error))
            return GoldenCheck("recorded", f"{case}: {why}, recorded {path}")

        try:
            golden = self.read(case)
        except MissingGoldenError as error:
            if error.recordable and update in ("new", "all"):
                return record("was missing")
            return GoldenCheck("missing", str(error))

        check = _judge(golden, tensor, inputs, items, tolerance, versions)
        if update == "all":
            return record("was visited")
        if update == "changed" and not check.ok:
            return record(check.status)
        return check

    def _refuse(self, case: str, tensor: torch.Tensor, reference_ok: bool | Comparison) -> None:
        if isinstance(reference_ok, Comparison) and not reference_ok.ok:
            raise RejectedGoldenError(
                f"{case} is not recorded: the reference check rejects it: {reference_ok.headline}"
            )
        if not reference_ok:
            raise RejectedGoldenError(f"{case} is not recorded: the reference check rejects it")
        if tensor.ndim != 2 or not tensor.numel():
            raise RejectedGoldenError(f"{case} is not recorded: its shape {tuple(tensor.shape)} holds no rows")
        if not bool(torch.isfinite(tensor).all()):
            raise RejectedGoldenError(f"{case} is not recorded: it holds NaN or infinity")

    def _manifest(self) -> dict[str, Any]:
        """The manifest as it is on the disk now: another process may have recorded meanwhile."""
        path = self.manifest_path
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {"cases": {}, "model": self.model, "schema": SCHEMA}
        except OSError as error:
            raise GoldenError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise self._corrupt(path, f"is not JSON ({error})") from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA or not isinstance(data.get("cases"), dict):
            raise self._corrupt(path, f"is not a manifest of schema {SCHEMA}")
        return data

    def _tensor_path(self, case: str, sha256: str, *, sampled: bool) -> Path:
        if not sampled:
            return self.folder / f"{case}.safetensors"
        if self.store is None:
            raise MissingGoldenError(
                f"the golden of {case} is kept outside the repository as {sha256}.safetensors: name the folder of the "
                "golden store",
                recordable=False,
            )
        return self.store / f"{sha256}.safetensors"

    def _read(self, case: str, entry: Mapping[str, Any]) -> Golden:
        rows = None if entry["rows"] == "all" else tuple(int(row) for row in entry["rows"].split())
        path = self._tensor_path(case, entry["tensor_sha256"], sampled=rows is not None)
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            if rows is not None:
                message = f"the golden store {path.parent} has no {path.name}, the golden of {case}: fetch it"
                raise MissingGoldenError(message, recordable=False) from error
            raise MissingGoldenError(
                f"{path} is gone while its manifest still names it: restore it with git, or record it again with "
                f"{UPDATE_OPTION}=new"
            ) from error
        except OSError as error:
            raise GoldenError(f"cannot read {path}: {error.strerror}") from error
        if hashlib.sha256(content).hexdigest() != entry["tensor_sha256"]:
            raise self._corrupt(path, "does not have the sha256 that its manifest names")
        try:
            tensor = safetensors.torch.load(content)[_KEY]
        except (safetensors.SafetensorError, KeyError) as error:
            raise self._corrupt(path, f"is not a golden tensor ({error})") from error
        num_rows, width = entry["shape"]
        if (
            tensor.shape != (num_rows if rows is None else len(rows), width)
            or str(tensor.dtype) != f"torch.{entry['dtype']}"
        ):
            raise self._corrupt(path, "has another shape or dtype than its manifest names")
        norms = () if rows is None else tuple(float(norm) for norm in entry["row_norms"]["all"].split())
        if rows is not None and len(norms) != num_rows:
            raise ValueError(f"{len(norms)} norms for {num_rows} rows")
        items = tuple(_span(text) for text in entry["items"])
        if items and sum(item.num_rows for item in items) != num_rows:
            raise ValueError(f"items do not cover {num_rows} rows")
        return Golden(
            case=case,
            tensor=tensor,
            num_rows=num_rows,
            rows=rows,
            norms=norms,
            items=items,
            inputs=GoldenInputs(**{part.name: entry["inputs"][part.name] for part in fields(GoldenInputs)}),
            recorded_with=dict(entry["recorded_with"]),
        )

    def _corrupt(self, path: Path, what: str) -> CorruptGoldenError:
        return CorruptGoldenError(
            f"{path} {what}: restore it with git, or move it away and record it again with {UPDATE_OPTION}=new"
        )


def _judge(
    golden: Golden,
    tensor: torch.Tensor,
    inputs: GoldenInputs,
    items: Sequence[ItemSpan],
    tolerance: Tolerance,
    versions: Mapping[str, str],
) -> GoldenCheck:
    changed = [
        entry.name for entry in fields(inputs) if getattr(inputs, entry.name) != getattr(golden.inputs, entry.name)
    ]
    comparison = _compare(golden, tensor, items, tolerance)
    if comparison.ok and changed in ([], ["processor"]):
        note = "; the processor's output differs in its bits" if changed else ""
        return GoldenCheck("matched", f"{golden.case} matches its golden{note}", comparison)
    recorded = _versions(golden.recorded_with, versions)
    accept = f"If this is meant, record it with {UPDATE_OPTION}=changed and review the difference."
    if changed:
        answer = "still agrees" if comparison.ok else f"is another:\n{comparison.explain()}"
        text = f"{golden.case}: the input changed ({', '.join(changed)}), {recorded}. The answer {answer}\n{accept}"
        return GoldenCheck("input changed", text, comparison)
    text = f"{golden.case}: the answer changed, the inputs did not, {recorded}.\n{comparison.explain()}\n{accept}"
    return GoldenCheck("answer changed", text, comparison)


def _compare(golden: Golden, tensor: torch.Tensor, items: Sequence[ItemSpan], tolerance: Tolerance) -> Comparison:
    limits = tolerance.limits
    if limits.ndim and len(limits) != golden.num_rows:  # measured for another number of rows, which is about to be said
        limits = limits.median()
    if golden.rows is None:
        whole = compare(tensor, golden.tensor, tolerance=replace(tolerance, limits=limits), items=golden.items)
    elif tensor.ndim != 2 or len(tensor) != golden.num_rows:
        shape = (golden.num_rows, golden.tensor.shape[1])
        return Comparison("row count", f"The embedding has shape {tuple(tensor.shape)}, expected {shape}.")
    else:
        whole = _compare_sample(golden, tensor, replace(tolerance, limits=limits))
    places = [(item.modality, item.start, item.num_rows) for item in items]
    recorded = [(item.modality, item.start, item.num_rows) for item in golden.items]
    if whole.ok and places != recorded:
        headline = f"The rows agree, but the items are {places}, recorded were {recorded} (modality, start, rows)."
        return replace(whole, failure="row count", headline=headline)
    return whole


def _compare_sample(golden: Golden, tensor: torch.Tensor, tolerance: Tolerance) -> Comparison:
    """The sampled rows, then the norms of all rows.

    Two rows' norms differ by no more than the rows do, so the rows' own limits apply to the norms.
    """
    rows = list(golden.rows or ())
    limits = tolerance.limits[rows] if tolerance.limits.ndim else tolerance.limits
    sampled = compare(tensor[rows], golden.tensor, tolerance=replace(tolerance, limits=limits))
    note = f"{len(rows)} of {golden.num_rows} rows were compared, numbered within the sample; of the others the norms"
    sampled = replace(sampled, details=(*sampled.details, note))
    expected = torch.tensor(golden.norms, dtype=torch.float64)
    off = (tensor.detach().cpu().double().norm(dim=1) - expected).abs()
    failing = ~(off <= (tolerance.limits + NORM_ROUNDING) * expected)  # also where `off` is NaN
    if not sampled.ok or not bool(failing.any()):
        return sampled
    row = int(torch.where(failing, off / expected, -1.0).argmax())
    headline = (
        f"{int(failing.sum())} of {golden.num_rows} rows have another norm than recorded; worst is row {row}: "
        f"{float(tensor[row].double().norm()):.6g}, recorded {golden.norms[row]:.6g}."
    )
    return replace(sampled, failure="values", headline=headline, details=(note,), worst_rows=())


def _span(text: str) -> Span:
    modality, start, num_rows, identifier = text.split(" ", 3)
    return Span(modality, int(start), int(num_rows), identifier)


def _versions(recorded: Mapping[str, str], now: Mapping[str, str]) -> str:
    differing = [
        f"{name} {recorded.get(name, 'absent')} -> {now.get(name, 'absent')}"
        for name in sorted(recorded.keys() | now.keys())
        if recorded.get(name) != now.get(name)
    ]
    return f"recorded with other versions ({', '.join(differing)})" if differing else "recorded with these versions"


def _six_digits(value: torch.Tensor) -> float:
    return float(f"{float(value):.6g}")


def _file_name(name: str) -> str:
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a golden: use letters, digits, '.', '_' and '-'")
    return name
