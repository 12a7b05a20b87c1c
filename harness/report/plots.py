"""How the cost grows, as a picture: ``python -m harness.report.plots RESULTS.json OUT.svg``.

Draws capturing/absent with its interval over what `test_growth` varies: the side of an image, the items of a request,
the requests of a batch. Needs matplotlib, the extra "plots". The same results give the same file.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness.files import write_atomically
from harness.matrix import GATES
from harness.report.readme import provenance
from harness.results import Results, ResultsError, TestRecord

AXES = {"side": "side of an image, pixels", "items": "items of a request", "requests": "requests of a batch"}
RATIO = "capturing/absent"


class PlotError(Exception):
    """There is nothing to draw, or nothing to draw with; the message is one sentence for the user."""


def growth(records: Iterable[TestRecord]) -> dict[str, list[tuple[int, float, float, float]]]:
    """By axis, in its order: value, and the ratio with the bounds of its interval (the ratio where it has none)."""
    found: dict[str, list[tuple[int, float, float, float]]] = {axis: [] for axis in AXES}
    for record in records:
        numbers = record.numbers
        if numbers.get("axis") in found and numbers.get(f"{RATIO} value") is not None:
            ratio = float(numbers[f"{RATIO} value"] or 0)
            low, high = (numbers.get(f"{RATIO} {bound}") for bound in ("low", "high"))
            bounds = [ratio if bound is None else float(bound) for bound in (low, high)]
            found[str(numbers["axis"])].append((int(numbers["value"] or 0), ratio, bounds[0], bounds[1]))
    return {axis: sorted(points) for axis, points in found.items() if points}


def draw(results: Results) -> bytes:
    """SVG, a panel for each axis.

    Raises:
        PlotError: no matplotlib, or no test_growth among the results.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError('this needs matplotlib: pip install "vllm-mm-embedding[plots]"') from error
    found = growth(results.records)
    if not found:
        raise PlotError(
            "there is no test_growth among the results: run pytest suites/test_cost_throughput.py --results"
        )
    # Without date and with ids that are no random numbers, the file changes when its numbers do; as text, so that it
    # looks the same with other fonts and is small.
    with matplotlib.rc_context({"svg.hashsalt": "vllm-mm-embedding", "svg.fonttype": "none"}):
        figure = Figure(figsize=(4 * len(found), 3.4), layout="constrained")
        panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for panel, (axis, points) in zip(panels, found.items(), strict=True):
            values, ratios, lows, highs = zip(*points, strict=True)
            below = [ratio - low for ratio, low in zip(ratios, lows, strict=True)]
            above = [high - ratio for ratio, high in zip(ratios, highs, strict=True)]
            panel.errorbar(values, ratios, yerr=[below, above], marker="o", capsize=3, linewidth=1)
            panel.axhline(1, color="black", linewidth=0.8)
            panel.axhline(GATES["throughput"].goal, color="grey", linewidth=0.8, linestyle="dashed")
            panel.set_xscale("log", base=2)
            panel.set_xticks(values, [str(value) for value in values])
            panel.set_xlabel(AXES[axis])
        panels[0].set_ylabel("throughput, capturing / absent")
        figure.suptitle(provenance(results), fontsize=7)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the picture. Exit status 0: done; 2: it cannot be drawn or written."""
    parser = argparse.ArgumentParser(prog="python -m harness.report.plots", description="How the cost grows.")
    parser.add_argument("results", type=Path, help="JSON file that --results wrote")
    parser.add_argument("picture", type=Path, help="SVG file to write")
    options = parser.parse_args(arguments)
    try:
        write_atomically(options.picture, draw(Results.read(options.results)))
    except (ResultsError, PlotError) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"cannot write {options.picture}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
