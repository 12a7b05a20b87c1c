"""Tables for README.md, made from a results file: ``python -m harness.report.readme results.json README.md [--check]``.

The text between ``<!-- contract:begin -->`` and ``<!-- contract:end -->`` becomes the table of contract clauses, that
between ``<!-- matrix:begin -->`` and ``<!-- matrix:end -->`` the table of models and suites, and that between
``<!-- cost:begin -->`` and ``<!-- cost:end -->`` the table of benchmarks. A file may have any of them. With
``--section`` only that one is filled in, such as the cost from another machine than the rest. With ``--check`` nothing
is written, and the exit status is 1 if the file is not up to date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.cases import CASES
from harness.contract import CLAUSES
from harness.engine import Arm
from harness.files import write_atomically
from harness.report.tally import Tally, first_line, markdown, models_worst_first, reasons, suites, worst_row
from harness.results import Results, ResultsError, TestRecord

COST = "cost"
"""The suite with a table of its own: its numbers are of a machine, and not of a model."""

MOST_CASES = 5
"""More cases than these of one model and suite are counted and not named."""


class ReadmeError(Exception):
    """The file cannot be filled in; the message is one sentence for the user."""


def contract_table(results: Results) -> str:
    """Markdown: clause, what it promises, the tests that name it, result."""
    rows = [["clause", "what it promises", "tests", "result"]]
    for clause, promise in CLAUSES.items():
        tally = Tally(tuple(record for record in results.records if clause in record.clauses))
        rows.append([clause, promise, _tests(tally), _verdict(tally)])
    return "\n".join(markdown(rows))


def matrix_table(results: Results) -> str:
    """Markdown: model x suite with counts, cosine and relative L2 of the worst row; then known differences and skips.

    The columns "video" and "audio" count the tests with such media again.
    """
    records = [record for record in results.records if record.model is not None and record.suite != COST]
    names = list(suites(records))
    media = [name for name in ("video", "audio") if any(_has(record, name) for record in records)]
    rows = [["model", *names, *media]]
    for model, tally in models_worst_first(records).items():
        cells = suites(tally.records)
        label = f"`{model}`"
        if not results.models.get(model, {}).get("independent", True):
            label += "<br>not independent"
        with_media = [Tally(tuple(r for r in tally.records if _has(r, name))) for name in media]
        rows.append([label, *(_cell(cells[name]) if name in cells else "" for name in names), *map(str, with_media)])
    lines = markdown(rows)
    if any("not independent" in row[0] for row in rows):
        lines += [
            "",
            "Not independent: vLLM runs Hugging Face's own encoder module, so that agreement is weak evidence.",
        ]
    for outcome, title in (("known", "Known to differ from Hugging Face"), ("skipped", "Skipped")):
        found = [record for record in records if record.outcome == outcome]
        if found:
            lines += ["", f"{title}:", ""]
        for reason, group in reasons(found).items():
            lines.append(f"- {_tests_of_models(group)}: {reason}")
    return "\n".join(lines)


def cost_table(results: Results) -> str:
    """Markdown: a benchmark a row, with what was measured of each arm, the ratios with intervals, the verdicts."""
    rows = [["model", "benchmark", "measured", "ratio [95 %]", "verdict"]]
    for record in results.records:
        if record.suite == COST:
            ratios = [name for name in record.numbers if f"{name} value" in record.numbers]
            shown = [f"{name} {record.numbers[name]}" for name in ratios]
            label = f"{_label(record)}<br>**failed**" if record.outcome in ("failed", "error") else _label(record)
            cells = (_measured(record, ratios), shown, _verdicts(record, ratios))
            rows.append([f"`{record.model}`", label, *("<br>".join(cell) for cell in cells)])
    return "\n".join(markdown(rows)) if len(rows) > 1 else "No benchmark ran in this session."


SECTIONS = {"contract": contract_table, "cost": cost_table, "matrix": matrix_table}


def provenance(results: Results) -> str:
    """One sentence: when, with which versions, on which machine."""
    environment = results.environment
    versions = environment.get("versions", {})
    parts = [f"{name} {versions[name]}" for name in ("vllm", "torch", "transformers") if name in versions]
    gpus = sorted({gpu["name"] for gpu in environment.get("gpus", [])})
    machine = ", ".join(gpus) or environment.get("cpu", {}).get("model", "unknown machine")
    state = " The session was interrupted: not every test ran." if results.interrupted else ""
    return f"Generated from a session of {results.created[:10]}: {', '.join([*parts, machine])}.{state}"


def fill(text: str, results: Results, sections: Sequence[str] = tuple(SECTIONS)) -> str:
    """The text with every marked section of these replaced.

    Raises:
        ReadmeError: there is no marker, or one without its partner.
    """
    filled = 0
    for name in sections:
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        counts = (text.count(begin), text.count(end))
        if counts == (0, 0):
            continue
        if counts != (1, 1) or text.index(begin) > text.index(end):
            raise ReadmeError(f"needs {begin} and then {end}, each once")
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}\n{SECTIONS[name](results)}\n\n{provenance(results)}\n{end}{tail}"
        filled += 1
    if not filled:
        raise ReadmeError(f"has none of {', '.join(f'<!-- {name}:begin -->' for name in sections)}")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill in or check a file. Exit status 0: done; 1: not up to date; 2: cannot be read or filled in."""
    parser = argparse.ArgumentParser(prog="python -m harness.report.readme", description="Fill in README's tables.")
    parser.add_argument("results", type=Path, help="JSON file that --results wrote")
    parser.add_argument("readme", type=Path, help="Markdown file with the markers")
    parser.add_argument("--section", action="append", choices=SECTIONS, help="only this one; several may be given")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if not up to date")
    options = parser.parse_args(arguments)
    try:
        old = options.readme.read_text(encoding="utf-8")
        new = fill(old, Results.read(options.results), options.section or tuple(SECTIONS))
        if old == new:
            return 0
        if not options.check:
            write_atomically(options.readme, new.encode())
            return 0
    except ResultsError as error:
        print(error, file=sys.stderr)
        return 2
    except ReadmeError as error:
        print(f"{options.readme} {error}", file=sys.stderr)
        return 2
    except (OSError, UnicodeDecodeError) as error:
        print(f"cannot fill in {options.readme}: {error}", file=sys.stderr)
        return 2
    print(
        f"{options.readme} is not up to date: run `python -m harness.report.readme {options.results} {options.readme}`",
        file=sys.stderr,
    )
    return 1


def _tests(tally: Tally) -> str:
    """Files and functions, parameters left out."""
    names = sorted({record.nodeid.partition("[")[0] for record in tally.records})
    files: dict[str, list[str]] = {}
    for name in names:
        file, _, function = name.partition("::")
        files.setdefault(file.rpartition("/")[2], []).append(function)
    return "<br>".join(f"{file}: {', '.join(f'`{name}`' for name in functions)}" for file, functions in files.items())


def _verdict(tally: Tally) -> str:
    if tally.bad:
        first = next(record for record in tally.records if record.outcome in ("failed", "error"))
        shown = "" if tally.count("passed") else "not shown: "
        return f"{shown}**{tally}**: {first_line(first.message)}"
    if tally.count("passed"):
        return str(tally)
    if tally.records:
        return f"not shown: {'; '.join(reasons(tally.records))}"
    return "not shown: no test of this session names it"


def _cell(tally: Tally) -> str:
    text = f"**{tally}**" if tally.bad else str(tally)
    if tally.worst is None:
        return text
    cosine, relative = worst_row(tally.worst)
    return f"{text}<br>cos {cosine}, L2 {relative}"


def _label(record: TestRecord) -> str:
    """Function and parameters, without the model."""
    function, _, parameters = record.nodeid.rpartition("::")[2].partition("[")
    name = function.removeprefix("test_").replace("_", " ")
    chosen = parameters.removesuffix("]").removeprefix(record.model or "").removesuffix(record.model or "").strip("-")
    return f"{name}: {chosen}" if chosen else name


def _measured(record: TestRecord, ratios: Sequence[str]) -> list[str]:
    """Such as "requests/s: absent 24.0, idle 23.9, capturing 23.8"; of percentiles the 99th."""
    derived = {*ratios, *(f"{name} {part}" for name in ratios for part in ("value", "low", "high"))}
    numbers = {
        name: value
        for name, value in record.numbers.items()
        if isinstance(value, int | float) and name not in derived and not re.search(r" p(?!50|99)\d+ ms$", name)
    }
    arms = [f"{arm} " for arm in Arm]
    measures = dict.fromkeys(name.partition(" ")[2] for name in numbers if name.startswith(tuple(arms)))
    lines = []
    for measure in measures:
        # The plugin's arms in their order, whichever ran first, and then peers.
        names = [f"{arm} {measure}" for arm in Arm] + [name for name in numbers if name.endswith(f" {measure}")]
        by_arm = {name.removesuffix(f" {measure}"): numbers.pop(name) for name in names if name in numbers}
        lines.append(f"{measure.replace('_', ' ')}: {', '.join(f'{arm} {value}' for arm, value in by_arm.items())}")
    return lines + [f"{name}: {value}" for name, value in numbers.items() if name not in ("value", "axis")]


def _verdicts(record: TestRecord, ratios: Sequence[str]) -> list[str]:
    """One a ratio where one of them has a gate and there is a machine to judge on; else one of the test."""
    verdicts = [record.numbers.get(f"{name} verdict") for name in ratios]
    if any(verdicts):
        return ["no gate" if verdict is None else str(verdict) for verdict in verdicts]
    if "verdict" in record.numbers:
        return [str(record.numbers["verdict"])]
    if record.outcome == "skipped":
        return [f"not shown: {first_line(record.message)}"]
    if record.outcome == "passed":
        return ["no gate" if ratios else "passed"]
    return [first_line(record.message)]


def _has(record: TestRecord, modality: str) -> bool:
    """Whether the test's case has such media."""
    parts = CASES.get(record.case or "", ())
    return any(not isinstance(part, str) and part.modality == modality for part in parts)


def _tests_of_models(records: Sequence[TestRecord]) -> str:
    """Model, suite and cases, such as "`llava` tokens (image, video)"."""
    cases: dict[str, list[str]] = {}
    for record in records:
        cases.setdefault(f"`{record.model}` {record.suite}", []).extend([record.case] if record.case else [])
    return ", ".join(
        f"{name} ({', '.join(found) if len(found) <= MOST_CASES else f'{len(found)} cases'})" if found else name
        for name, found in sorted(cases.items())
    )


if __name__ == "__main__":
    sys.exit(main())
