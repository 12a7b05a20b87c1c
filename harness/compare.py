"""Row-by-row comparison of an encoder's output with what it should be, and the text that explains a difference.

An embedding is a matrix of shape (num_rows, hidden_size) whose rows belong to the items (images, videos, audio) of a
prompt. Checks run in the order in which a difference is easiest to understand: is there a tensor, its dtype, its
width, its number of rows, the order of its rows, and only then its values. Values are judged row by row: a mean over
rows hides a broken row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch

Failure = Literal["presence", "dtype", "shape", "row count", "row order", "values"]

FLOAT32_SUMMANDS = 4096
"""Additions along the longest path of a tiny embedded encoder (patch embedding, a few layers, merger), rounded up."""

CONFIDENCE = 4.0
"""lambda of Higham and Mary: a sum exceeds its bound with a probability below 2 exp(-lambda**2 / 2), here 7e-4."""

CEILING = 0.5
"""No yardstick excuses a row that is half its own length away: 1.0 would accept a row of zeros."""

CDIST_ERROR = 1e-6
"""Relative error of distances that `torch.cdist` computes in float64 through a matrix product, rounded up."""

ORDER_ROWS = 8192
"""Above this many rows no wrong order is looked for: all pairs of rows would take minutes and gigabytes."""

CLEARLY_BETTER = 5
"""Rows of different patches are an order of magnitude further apart than even bfloat16 rounds them."""

MOST_BLOCKS = 8
"""How many displaced blocks of rows the explanation names."""

TABLE_ROWS = 5
"""How many of the worst rows the explanation lists."""


class ItemSpan(Protocol):
    """The rows of one item of the prompt; what `completion.mm_embedding_items` holds."""

    @property
    def modality(self) -> str:
        """Such as "image", "video" or "audio"."""

    @property
    def start(self) -> int:
        """First row."""

    @property
    def num_rows(self) -> int:
        """How many rows follow each other from `start` on."""

    @property
    def identifier(self) -> str:
        """The engine's name for the item's content."""


class Span(NamedTuple):
    """An `ItemSpan` of the harness's own: rows `start` to `start + num_rows - 1` of the embedding."""

    modality: str
    start: int
    num_rows: int
    identifier: str


def float32_floor(summands: int = FLOAT32_SUMMANDS) -> float:
    """Relative L2 by which two correct float32 implementations may differ: ``lambda * sqrt(summands) * eps``.

    A sum of n float32 terms in any order errs by at most ``exp(lambda * sqrt(n) * u + ...) - 1``, to first order
    ``lambda * sqrt(n) * u``, of its terms' size, where u = eps / 2 (Higham and Mary, "A New Approach to Probabilistic
    Rounding Error Analysis", SIAM J. Sci. Comput. 41(5), 2019; the certain bound n * u is Higham, "Accuracy and
    Stability of Numerical Algorithms", section 3.1). The errors of the sums along a path are taken as independent and
    add in quadrature, so n is the number of additions along the path. eps instead of u: both sides round.

    Args:
        summands: additions along the longest path from pixel to output, for a transformer the sum of the inner
            dimensions of its matrix products.
    """
    return CONFIDENCE * math.sqrt(summands) * torch.finfo(torch.float32).eps


@dataclass(frozen=True, eq=False)
class Tolerance:
    """How far each row may be from the truth, in relative L2. Made by `measured`, `float32` or `exact`.

    Only relative L2 is gated: a relative L2 of r <= 1 bounds the row's cosine from below by sqrt(1 - r**2).
    """

    dtype: torch.dtype
    """dtype that the compared tensor must have (the engine's)."""
    limits: torch.Tensor
    """float64, shape (num_rows,) or (): the largest relative L2 accepted, per row."""
    origin: str
    """How the limits came about, for the explanation."""

    @classmethod
    def measured(
        cls,
        reference_float32: torch.Tensor,
        reference_in_engine_dtype: torch.Tensor,
        *,
        multiple: float = 3.0,
        summands: int = FLOAT32_SUMMANDS,
    ) -> Tolerance:
        """The reference's own rounding error in the engine's dtype is the yardstick.

        A row may err by ``multiple`` of the larger of the reference's error in that row and its median error over the
        rows (a row that the reference hit by luck is no yardstick), and never less than `float32_floor`. The engine
        rounds as often as the reference but in another order (fused kernels, other attention), so its error is another
        draw of the same size: the multiple covers the spread between two draws and no more.

        Args:
            reference_float32: shape (num_rows, width), the truth.
            reference_in_engine_dtype: the same reference on the same inputs, run in the engine's dtype.
            multiple: how many yardsticks the engine may err.
            summands: see `float32_floor`.

        Raises:
            ValueError: the yardstick is unusable: other shape, not finite, or so long that it would accept anything.
        """
        if reference_float32.shape != reference_in_engine_dtype.shape or reference_float32.ndim != 2:
            raise ValueError(
                f"the yardstick needs two matrices of one shape, not {tuple(reference_float32.shape)} and "
                f"{tuple(reference_in_engine_dtype.shape)}"
            )
        if reference_float32.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the truth must be float32 or float64, not {_name(reference_float32.dtype)}")
        dtype = reference_in_engine_dtype.dtype
        own, _, _ = _row_errors(reference_in_engine_dtype, reference_float32)
        if not bool(torch.isfinite(own).all()):
            raise ValueError(f"the reference itself is not finite in {_name(dtype)}, so it measures no tolerance")
        median = float(own.median()) if len(own) else 0.0
        if multiple * median >= CEILING:
            raise ValueError(
                f"the reference in {_name(dtype)} is {median:.2g} (relative L2, median row) away from itself in "
                f"float32: {multiple:g} times that accepts anything"
            )
        limits = (multiple * own.clamp(min=median)).clamp(min=float32_floor(summands), max=CEILING)
        origin = (
            f"{multiple:g} x the reference's own error in {_name(dtype)} (median row {median:.2g}), "
            f"at least {float32_floor(summands):.2g}"
        )
        return cls(dtype, limits, origin)

    @classmethod
    def float32(cls, *, summands: int = FLOAT32_SUMMANDS) -> Tolerance:
        """Two float32 runs of the same computation: every row within `float32_floor`."""
        floor = float32_floor(summands)
        origin = f"float32 rounding of {summands} additions, {floor:.2g}"
        return cls(torch.float32, torch.tensor(floor, dtype=torch.float64), origin)

    @classmethod
    def exact(cls, dtype: torch.dtype) -> Tolerance:
        """The same numbers, bit for bit (for copies: nothing was computed in between)."""
        return cls(dtype, torch.tensor(0.0, dtype=torch.float64), "equal bit for bit")


class RowError(NamedTuple):
    """One row of the worst-rows table."""

    row: int
    item: str
    relative_l2: float
    limit: float
    cosine: float
    max_abs: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. `ok` is the verdict; `explain()` the text of a failed test; `summary` the numbers.

    `worst_row` is the row that uses most of its limit (relative L2 / limit); `worst_cosine` and `worst_relative_l2` are
    that row's. They are None where no rows were compared.
    """

    failure: Failure | None
    headline: str
    """One sentence."""
    origin: str = ""
    details: tuple[str, ...] = ()
    worst_rows: tuple[RowError, ...] = ()
    numbers: Mapping[str, int | float | None] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return self.failure is None

    @property
    def worst_row(self) -> int | None:
        """Index of the row that uses most of its limit."""
        return self.worst_rows[0].row if self.worst_rows else None

    @property
    def worst_cosine(self) -> float | None:
        """Cosine between that row and the expected one."""
        return self.worst_rows[0].cosine if self.worst_rows else None

    @property
    def worst_relative_l2(self) -> float | None:
        """Length of that row's difference over the expected row's length."""
        return self.worst_rows[0].relative_l2 if self.worst_rows else None

    @property
    def summary(self) -> dict[str, Any]:
        """Numbers for a JSON file; a number that is not finite becomes None."""
        worst = {
            "worst_row": self.worst_row,
            "worst_item": self.worst_rows[0].item if self.worst_rows else None,
            "worst_cosine": self.worst_cosine,
            "worst_relative_l2": self.worst_relative_l2,
        }
        numbers = {name: finite(value) for name, value in {**self.numbers, **worst}.items()}
        return {"ok": self.ok, "failure": self.failure, "headline": self.headline, **numbers}

    def explain(self) -> str:
        """How many rows differ, how far, and where."""
        lines = [self.headline, *(f"  {line}" for line in self.details)]
        if self.origin and self.failure in ("row order", "values", None):
            lines.append(f"  tolerance: {self.origin}")
        if self.worst_rows and self.failure != "row order":
            lines += ["", *_table(self.worst_rows)]
        return "\n".join(lines)


def compare(
    actual: object,
    expected: torch.Tensor | None,
    *,
    tolerance: Tolerance,
    items: Sequence[ItemSpan] | None = None,
    known: Mapping[str, torch.Tensor] | None = None,
) -> Comparison:
    """Compare an embedding with the expected one, row by row.

    Args:
        actual: what the engine returned: a tensor of shape (num_rows, width) and dtype `tolerance.dtype`, or None;
            anything else is a failure.
        expected: the same shape, any floating dtype, or None where no embedding may be.
        tolerance: limits per row.
        items: the expected spans, so that a failure names items instead of rows.
        known: embeddings of other items or requests by name; rows that equal one of them are named as stale.

    Raises:
        ValueError: `items` do not cover the rows of `expected` in order, or the tolerance is for another row count.
    """
    if expected is None or not isinstance(actual, torch.Tensor):
        return _compare_presence(actual, expected)
    spans = _spans(items, len(expected))
    if tolerance.limits.ndim and len(tolerance.limits) != len(expected):
        raise ValueError(f"the tolerance is for {len(tolerance.limits)} rows, expected has {len(expected)}")
    if actual.dtype != tolerance.dtype:
        return Comparison("dtype", f"The embedding is {_name(actual.dtype)}, expected {_name(tolerance.dtype)}.")
    if actual.ndim != 2 or actual.shape[1] != expected.shape[1]:
        return _compare_width(actual, expected, tolerance, items, known)

    truth, got = expected.detach().double().cpu(), actual.detach().double().cpu()
    limits = tolerance.limits.expand(len(truth))
    layout = _Layout(truth, limits, spans, known or {})
    if len(got) != len(truth):
        headline = f"The embedding has {len(got)} rows, expected {len(truth)}{_sizes(spans)}."
        return Comparison("row count", headline, tolerance.origin, tuple(layout.describe(got)))
    return _compare_rows(got, truth, limits, layout, tolerance.origin)


def _compare_presence(actual: object, expected: torch.Tensor | None) -> Comparison:
    if actual is None and expected is None:
        return Comparison(None, "There is no embedding, as expected.")
    if expected is None:
        shape = tuple(actual.shape) if isinstance(actual, torch.Tensor) else type(actual).__name__
        return Comparison("presence", f"There is an embedding {shape} where none is expected.")
    if actual is not None:
        return Comparison("presence", f"The embedding is a {type(actual).__name__}, not a tensor.")
    return Comparison("presence", f"The embedding is missing (None), expected shape {tuple(expected.shape)}.")


def _compare_width(
    actual: torch.Tensor,
    expected: torch.Tensor,
    tolerance: Tolerance,
    items: Sequence[ItemSpan] | None,
    known: Mapping[str, torch.Tensor] | None,
) -> Comparison:
    headline = f"The embedding has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}."
    if actual.ndim != 2 or actual.shape[1] < expected.shape[1]:
        return Comparison("shape", headline, tolerance.origin)
    width = expected.shape[1]
    leading = compare(actual[:, :width], expected, tolerance=tolerance, items=items, known=known)
    if leading.ok:
        cause = f"deepstack columns were not cut: the leading {width} of {actual.shape[1]} columns are right"
        return Comparison("shape", f"{headline[:-1]}: {cause}.", tolerance.origin, (), (), leading.numbers)
    return Comparison("shape", headline, tolerance.origin, (f"Its leading {width} columns: {leading.headline}",))


def _compare_rows(
    got: torch.Tensor, truth: torch.Tensor, limits: torch.Tensor, layout: _Layout, origin: str
) -> Comparison:
    if not len(truth):
        return Comparison(None, "The embedding has no rows, as expected.", origin)
    relative, cosine, max_abs = _row_errors(got, truth)
    used = torch.where(relative > 0, relative / limits, 0.0)
    failing = relative > limits
    bad = int(failing.sum())
    worst = tuple(
        RowError(
            row, layout.item_of(row), float(relative[row]), float(limits[row]), float(cosine[row]), float(max_abs[row])
        )
        for row in torch.argsort(used, descending=True, stable=True)[: min(bad, TABLE_ROWS) or TABLE_ROWS].tolist()
    )
    numbers: dict[str, int | float | None] = {
        "rows": len(truth),
        "width": truth.shape[1],
        "failing_rows": bad,
        "failing_percent": 100 * bad / len(truth),
        "limit_used": float(used.max()),
        "max_relative_l2": float(relative.max()),
        "mean_relative_l2": float(relative.mean()),
        "median_relative_l2": float(relative.median()),
        "min_cosine": float(cosine.min()),
        "max_abs": float(max_abs.max()),
    }
    spread = (
        f"relative L2 over all rows: max {relative.max():.3g}, mean {relative.mean():.3g}, "
        f"median {relative.median():.3g}; lowest cosine {cosine.min():.7f}; largest difference {max_abs.max():.3g}"
    )
    if not bad:
        return Comparison(None, f"All {len(truth)} rows agree.", origin, (spread,), worst, numbers)
    order = layout.describe(got)
    if order:
        headline = f"{bad} of {len(truth)} rows are not the expected ones: {order[0]}."
        return Comparison("row order", headline, origin, tuple(order[1:]), worst, numbers)
    first = worst[0]
    headline = (
        f"{bad} of {len(truth)} rows ({100 * bad / len(truth):.3g} %) differ; worst is row {first.row} ({first.item}): "
        f"relative L2 {first.relative_l2:.3g} where {first.limit:.3g} is allowed, cosine {first.cosine:.6f}."
    )
    details = [*_not_numbers(got), *_zeros(got, truth), f"different: {_rows(failing)}", spread]
    if max(len(got), len(layout.table)) > ORDER_ROWS:
        details.append(f"more than {ORDER_ROWS} rows: a wrong order was not looked for")
    return Comparison("values", headline, origin, tuple(details), worst, numbers)


def _row_errors(got: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Relative L2, cosine and largest absolute difference per row, float64; not finite counts as infinitely far."""
    got, truth = got.detach().double().cpu(), truth.detach().double().cpu()
    difference = got - truth
    if not truth.shape[1]:
        return torch.zeros(len(truth)).double(), torch.ones(len(truth)).double(), torch.zeros(len(truth)).double()
    length, norm = difference.norm(dim=1), truth.norm(dim=1)
    relative = torch.where(length > 0, length / norm, 0.0).nan_to_num(nan=math.inf)
    relative = torch.where(torch.isfinite(length), relative, math.inf)
    product = norm * got.norm(dim=1)
    cosine = torch.where(product > 0, (got * truth).sum(dim=1) / product, (length == 0).double()).nan_to_num(nan=0.0)
    return relative, cosine.clamp(-1, 1), difference.abs().amax(dim=1).nan_to_num(nan=math.inf)


class _Run(NamedTuple):
    """Rows `row` .. `row + length - 1` of the embedding equal the rows from `source` on of the layout's table."""

    row: int
    source: int
    length: int


class _Layout:
    """Says which rows of an embedding equal which expected (or otherwise known) rows, in terms of items."""

    def __init__(
        self, truth: torch.Tensor, limits: torch.Tensor, spans: Sequence[Span], known: Mapping[str, torch.Tensor]
    ) -> None:
        self.rows = len(truth)
        self.spans = [*spans]
        self.names = [*_item_names(spans)]
        tables, bounds = [truth], [limits]
        typical = float(limits.median()) if len(limits) else 0.0
        start = self.rows
        for name, tensor in known.items():
            if tensor.ndim != 2 or tensor.shape[1] != truth.shape[1] or not len(tensor):
                continue
            tables.append(tensor.detach().double().cpu())
            bounds.append(torch.full((len(tensor),), typical, dtype=torch.float64))
            self.spans.append(Span("known", start, len(tensor), name))
            self.names.append(name)
            start += len(tensor)
        self.table, self.limits = torch.cat(tables), torch.cat([bound.double() for bound in bounds])

    def item_of(self, row: int) -> str:
        for span, name in zip(self.spans, self.names, strict=True):
            if span.start <= row < span.start + span.num_rows:
                return name
        return "-"

    def describe(self, got: torch.Tensor) -> list[str]:
        """Sentences on the rows that stand in the wrong place or are nowhere; empty where only values are wrong."""
        if max(len(got), len(self.table)) > ORDER_ROWS:
            return []
        runs = self._runs(got)
        moved = sorted((run for run in runs if run.source != run.row), key=lambda run: -run.length)
        if not moved and len(got) == self.rows:
            return []
        sentences = [self._place(run) for run in moved]
        if len(sentences) > MOST_BLOCKS:
            sentences[MOST_BLOCKS:] = [f"and so on in {len(sentences) - MOST_BLOCKS} more blocks of rows"]
        strangers = len(got) - sum(run.length for run in runs)
        if runs and strangers:
            sentences.append(f"{_count(strangers)} of the embedding equal no expected row")
        return sentences + self._absent_or_repeated(runs)

    def _runs(self, got: torch.Tensor) -> list[_Run]:
        """Cut the embedding into the longest runs that equal rows of the table; rows in place stay in place.

        Rows that equal nothing are in no run.
        """
        lengths = _diagonal_lengths(self._equal(got))
        starts = {span.start for span in self.spans}
        runs, row = [], 0
        while row < len(got):
            if row < self.rows and lengths[row, row]:
                best = row
            else:
                longest = int(lengths[row].max()) if lengths.shape[1] else 0
                ties = (lengths[row] == longest).nonzero().flatten().tolist() if longest else []
                best = next((tie for tie in ties if tie in starts), ties[0] if ties else -1)
            if best < 0:
                row += 1
                continue
            run = _Run(row, best, self._until_table_ends(best, int(lengths[row, best])))
            runs.append(run)
            row += run.length
        return runs

    def _until_table_ends(self, source: int, length: int) -> int:
        """The rows of the last expected item must not run on into a known tensor, nor one known tensor into another."""
        ends = [self.rows, *(span.start + span.num_rows for span in self.spans if span.start >= self.rows)]
        return min(length, next(end for end in ends if source < end) - source)

    def _equal(self, got: torch.Tensor) -> torch.Tensor:
        """bool, shape (len(got), len(table)): the row is within the table row's limit.

        Away from its own place a row must fit `CLEARLY_BETTER` times as well: among nearly equal rows, as a plain
        image has them, a rounding error is no wrong order.
        """
        usable = torch.isfinite(got).all(dim=1)
        distance = torch.cdist(torch.where(usable[:, None], got, 0.0), self.table)
        equal = (distance <= self.limits.clamp(min=CDIST_ERROR) * self.table.norm(dim=1)) & usable[:, None]
        common = torch.arange(min(len(got), self.rows))
        in_place = distance[common, common]
        fits_better = distance[common] <= in_place[:, None] / CLEARLY_BETTER
        fits_better[common, common] = True
        equal[common] &= fits_better
        return equal

    def _place(self, run: _Run) -> str:
        here = f"{_range(run.row, run.length)} {'equals' if run.length == 1 else 'equal'}"
        touched = [
            (span, name)
            for span, name in zip(self.spans, self.names, strict=True)
            if span.start < run.source + run.length and run.source < span.start + span.num_rows
        ]
        if touched and sum(span.num_rows for span, _ in touched) == run.length:
            owners = " and ".join(f"{name}'s" for _, name in touched)
            return f"{here} {owners}"
        if run.source >= self.rows:
            span, name = touched[0]
            return f"{here} {_range(run.source - span.start, run.length)} of {name}"
        shift = abs(run.row - run.source)
        note = f", shifted by {_count(shift)}" if shift < run.length else ""
        of = f" ({', '.join(name for _, name in touched)})" if touched else ""
        return f"{here} the expected {_range(run.source, run.length)}{of}{note}"

    def _absent_or_repeated(self, runs: Sequence[_Run]) -> list[str]:
        if not runs:
            return ["no row equals an expected one"]
        uses = torch.zeros(self.rows, dtype=torch.int64)
        for run in runs:
            if run.source < self.rows:
                uses[run.source : run.source + run.length] += 1
        sentences = []
        for span, name in zip(self.spans, self.names, strict=True):
            if span.start >= self.rows or not span.num_rows:
                continue
            times = uses[span.start : span.start + span.num_rows]
            if int(times.max()) == 0:
                sentences.append(f"{name} is nowhere in the embedding")
            elif int(times.min()) == 0:
                sentences.append(f"{name} lacks its {_rows(times == 0)}")
            elif int(times.min()) > 1:
                sentences.append(f"{name} is there {int(times.min())} times")
        return sentences


def _diagonal_lengths(equal: torch.Tensor) -> torch.Tensor:
    """lengths[i, j]: how many of equal[i, j], equal[i + 1, j + 1], ... are True in a row."""
    lengths = torch.zeros(equal.shape[0] + 1, equal.shape[1] + 1, dtype=torch.int32)
    for row in range(equal.shape[0] - 1, -1, -1):
        lengths[row, :-1] = torch.where(equal[row], lengths[row + 1, 1:] + 1, 0)
    return lengths[:-1, :-1]


def _spans(items: Sequence[ItemSpan] | None, rows: int) -> list[Span]:
    spans = [Span(item.modality, item.start, item.num_rows, item.identifier) for item in items or ()]
    end = 0
    for span in spans:
        if span.start != end:
            raise ValueError(f"the items do not follow each other: one starts at row {span.start}, expected {end}")
        end += span.num_rows
    if spans and end != rows:
        raise ValueError(f"the items cover {end} rows, expected has {rows}")
    return spans


_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


def _item_names(spans: Sequence[Span]) -> list[str]:
    """'the second image', counted within its modality; 'the image' where it is the only one."""
    totals: dict[str, int] = {}
    for span in spans:
        totals[span.modality] = totals.get(span.modality, 0) + 1
    seen: dict[str, int] = {}
    names = []
    for span in spans:
        number = seen.get(span.modality, 0)
        seen[span.modality] = number + 1
        if totals[span.modality] == 1:
            names.append(f"the {span.modality}")
        elif number < len(_ORDINALS):
            names.append(f"the {_ORDINALS[number]} {span.modality}")
        else:
            names.append(f"{span.modality} number {number + 1}")
    return names


def _sizes(spans: Sequence[Span]) -> str:
    if not spans:
        return ""
    return f" ({', '.join(f'{name} {span.num_rows}' for name, span in zip(_item_names(spans), spans, strict=True))})"


def _count(rows: int) -> str:
    return "one row" if rows == 1 else f"{rows} rows"


def _range(start: int, length: int) -> str:
    return f"row {start}" if length == 1 else f"rows {start}..{start + length - 1}"


def _rows(mask: torch.Tensor, most: int = 8) -> str:
    """'rows 3..5, 9' for the True positions of a mask."""
    positions = mask.nonzero().flatten().tolist()
    pieces: list[list[int]] = []
    for position in positions:
        if pieces and position == pieces[-1][1] + 1:
            pieces[-1][1] = position
        else:
            pieces.append([position, position])
    texts = [str(first) if first == last else f"{first}..{last}" for first, last in pieces]
    word = "row" if len(positions) == 1 else "rows"
    return f"{word} {', '.join(texts[:most])}" + (f" and {len(texts) - most} more ranges" if len(texts) > most else "")


def _not_numbers(got: torch.Tensor) -> list[str]:
    lines = []
    for name, found in (("NaN", got.isnan()), ("infinity", got.isinf())):
        if bool(found.any()):
            lines.append(f"{name} in {_rows(found.any(dim=1))} ({int(found.sum())} values)")
    return lines


def _zeros(got: torch.Tensor, truth: torch.Tensor) -> list[str]:
    unwritten = (got == 0).all(dim=1) & (truth != 0).any(dim=1)
    return [f"only zeros in {_rows(unwritten)}: never written?"] if bool(unwritten.any()) else []


def _table(rows: Sequence[RowError]) -> list[str]:
    width = max(len("item"), *(len(row.item) for row in rows))
    head = f"{'row':>6}  {'item':<{width}}  {'relative L2':>11}  {'allowed':>9}  {'cosine':>10}  {'max |d|':>9}"
    return ["  worst rows:", f"  {head}"] + [
        f"  {row.row:>6}  {row.item:<{width}}  {row.relative_l2:>11.3g}  {row.limit:>9.3g}  {row.cosine:>10.7f}  "
        f"{row.max_abs:>9.3g}"
        for row in rows
    ]


def finite(value: Any) -> Any:
    """None in place of a float that JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
