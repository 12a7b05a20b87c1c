"""What one pytest session found, as data: one JSON file from which every report is made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from harness.compare import finite
from harness.contract import CLAUSES
from harness.files import write_atomically

SCHEMA = 1
"""Version of the file's form; raised when an older reader would misread it."""

Outcome = Literal["passed", "failed", "known", "skipped", "error"]
"""`failed`: the thing tested is wrong. `error`: the infrastructure broke (an engine died, a download failed). `known`:
it failed as the model's YAML file says it must, with the reason."""

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


class ResultsError(Exception):
    """A results file cannot be read, written or merged; the message is one sentence for the user."""


@dataclass(frozen=True)
class TestRecord:
    """The outcome of one test."""

    __test__ = False  # pytest collects classes that are called Test...

    nodeid: str
    """pytest's id, unique in a session."""
    suite: str
    """Column of the tables, such as "contract", "encoder" or "golden"."""
    outcome: Outcome
    clauses: tuple[str, ...] = ()
    """Contract clauses that the test shows, such as "C7"."""
    model: str | None = None
    """Row of the tables: the name that `--model` knows."""
    case: str | None = None
    duration: float = 0.0
    """Seconds, set-up and tear-down included."""
    comparison: Mapping[str, Any] | None = None
    """`Comparison.summary`."""
    numbers: Mapping[str, int | float | str | bool | None] = field(default_factory=dict)
    """Whatever else was measured or counted, such as "cached_tokens" or "preemptions"."""
    message: str = ""
    """Why it failed or was skipped."""

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES:
            raise ValueError(f"outcome {self.outcome!r} of {self.nodeid} is none of {', '.join(OUTCOMES)}")
        unknown = [clause for clause in self.clauses if clause not in CLAUSES]
        if unknown:
            raise ValueError(f"{self.nodeid} names clause {', '.join(unknown)}, which the contract does not have")


class Results:
    """The records of one session, by node id, with the environment that they were measured in."""

    def __init__(
        self,
        environment: Mapping[str, Any],
        models: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        created: str | None = None,
        interrupted: bool = False,
    ) -> None:
        """Start an empty collection.

        Args:
            environment: `harness.environment.describe()`.
            models: per model name what a report says of it (hub id, revision, whether its reference is independent).
            created: ISO 8601 time, now if not given.
            interrupted: the session did not run all its tests.
        """
        self.environment = dict(environment)
        self.models: dict[str, dict[str, Any]] = {name: dict(facts) for name, facts in (models or {}).items()}
        self.created = created or datetime.now(UTC).isoformat(timespec="seconds")
        self.interrupted = interrupted
        self._records: dict[str, TestRecord] = {}

    @property
    def records(self) -> list[TestRecord]:
        """In the order in which the tests were first added."""
        return list(self._records.values())

    def add(self, record: TestRecord) -> None:
        """Keep a record. The same node id again (an error in tear-down, a later session) replaces the earlier one."""
        self._records[record.nodeid] = record

    def merge(self, later: Results) -> Results:
        """Both sessions' records as a new collection; where both ran a test the later one counts.

        Raises:
            ResultsError: other environment; a table of both would not say which number is whose.
        """
        if self.environment != later.environment:
            keys = sorted(self.environment.keys() | later.environment.keys())
            differing = [key for key in keys if self.environment.get(key) != later.environment.get(key)]
            raise ResultsError(
                f"the two results come from different environments ({', '.join(differing)}): report them separately"
            )
        merged = Results(
            self.environment,
            {**self.models, **later.models},
            created=later.created,
            interrupted=self.interrupted or later.interrupted,
        )
        for record in [*self.records, *later.records]:
            merged.add(record)
        return merged

    def write(self, path: Path) -> None:
        """Write the file at once or not at all, so that an interrupted session leaves no half file.

        Raises:
            ResultsError: the folder cannot be written.
        """
        data = {
            "schema": SCHEMA,
            "created": self.created,
            "interrupted": self.interrupted,
            "environment": self.environment,
            "models": self.models,
            "tests": [asdict(record) for record in self.records],
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, (json.dumps(_plain(data), indent=1, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise ResultsError(f"cannot write the results to {path}: {error.strerror}") from error

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read what `write` wrote.

        Raises:
            ResultsError: the file is missing, damaged, or of another version of this project.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ResultsError(f"cannot read the results {path}: {error.strerror}") from error
        except ValueError as error:
            raise ResultsError(f"{path} is not a results file ({error}): write it again with --results") from error
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise ResultsError(
                f"{path} has schema {schema!r} where this version reads {SCHEMA}: write it again with --results"
            )
        try:
            results = cls(data["environment"], data["models"], created=data["created"], interrupted=data["interrupted"])
            known = {entry.name for entry in fields(TestRecord)}
            for test in data["tests"]:
                values = {name: value for name, value in test.items() if name in known}
                results.add(TestRecord(**{**values, "clauses": tuple(values.get("clauses", ()))}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ResultsError(f"{path} is damaged ({error}): write it again with --results") from error
        return results


def _plain(value: Any) -> Any:
    """Mappings to dicts, sequences to lists, a float that is not finite to None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [_plain(entry) for entry in value]
    return finite(value)
