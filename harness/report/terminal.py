"""The summary at the end of a pytest session: model x suite, worst row, failures and skips with their reasons."""

from __future__ import annotations

from harness.report.tally import columns, first_line, models_worst_first, reasons, suites, worst_row
from harness.results import Results


def summary(results: Results) -> list[str]:
    """Lines for the terminal, worst model first; empty if no test was recorded."""
    records = results.records
    if not records:
        return []
    names = list(suites(records))
    rows = [["model", *names, "worst cosine", "relative L2", "where"]]
    for model, tally in models_worst_first(records).items():
        cells = suites(tally.records)
        worst = tally.worst
        item = (worst.comparison or {}).get("worst_item") if worst else None
        where = f"{worst.suite} {worst.case or ''} {item or ''}".split() if worst else []
        cosine, relative = worst_row(worst) if worst else ("-", "-")
        counts = [str(cells[name]) if name in cells else "" for name in names]
        rows.append([model, *counts, cosine, relative, " ".join(where)])
    lines = columns(rows)

    bad = [record for record in records if record.outcome in ("failed", "error")]
    if bad:
        lines += ["", "failed (the thing tested is wrong) and in error (the infrastructure broke):"]
        lines += [f"  {record.outcome}: {record.nodeid}: {first_line(record.message)}" for record in bad]
    skipped = [record for record in records if record.outcome == "skipped"]
    if skipped:
        lines += ["", "skipped:"]
        for reason, group in reasons(skipped).items():
            models = sorted({record.model for record in group if record.model})
            lines.append(f"  {len(group)} x {reason}" + (f" ({', '.join(models)})" if models else ""))
    if results.interrupted:
        lines += ["", "interrupted: not every test ran"]
    return lines
