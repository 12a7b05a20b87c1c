"""Gates of a benchmark, on ratios made here."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any, cast
from unittest import mock

import pytest

from harness import pace
from harness.engine import Engine, EngineError
from harness.pytest_plugin.benchmarks import Cost, Rounds
from harness.pytest_plugin.subject import Subject
from harness.verdict import Gate, Ratio
from suites.test_cost_latency import ratios

GOOD, BAD, NOISY = Ratio(1.0, 0.99, 1.01, 12), Ratio(0.9, 0.89, 0.91, 12), Ratio(1.0, 0.97, 1.03, 12)


class FakePool:
    """Starts engines again: the same names, with one more prime. With a failure it does that once."""

    def __init__(self, failure: BaseException | None) -> None:
        self.started: list[list[str]] = []
        self.failure = failure

    def again(self, engines: list[Engine]) -> list[Engine]:
        if self.failure is not None and self.started:
            raise self.failure
        started = [f"{engine}'" for engine in engines]
        self.started.append(started)
        return cast("list[Engine]", started)


class FakeSubject:
    def __init__(self, failure: BaseException | None = None) -> None:
        self.pool = FakePool(failure)

    class spec:  # noqa: N801 -- an attribute of Subject
        gates = {"throughput": Gate(goal=0.99, limit=0.98)}  # noqa: RUF012


@pytest.fixture
def recorded() -> dict[str, Any]:
    return {}


def judge(recorded: dict[str, Any], **ratios: Ratio) -> None:
    Cost(cast("Subject", FakeSubject()), 12).judge("throughput", ratios, recorded.__setitem__)


def on_gpu(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(importlib.import_module("harness.pytest_plugin.benchmarks"), "on_gpu", lambda: there)


def test_each_ratio_has_its_verdict(recorded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, True)
    judge(recorded, idle=GOOD)
    assert recorded["idle verdict"] == "pass"
    assert (recorded["idle value"], recorded["idle low"], recorded["idle high"]) == (1.0, 0.99, 1.01)
    with pytest.raises(pytest.skip.Exception, match=r"capturing: 1.0000 .*: undecided: needs about .* more rounds"):
        judge(recorded, idle=GOOD, capturing=NOISY)
    with pytest.raises(pytest.fail.Exception, match=r"idle: 0.9000 .*: fail \(goal 0.99, interval above 0.98\)"):
        judge(recorded, idle=BAD, capturing=NOISY)
    assert recorded["idle verdict"] == "fail"
    assert recorded["capturing verdict"].startswith("undecided")


def test_a_ratio_that_is_watched_only_fails(recorded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, True)
    cost = Cost(cast("Subject", FakeSubject()), 12)
    cost.judge("throughput", {"p99": GOOD}, recorded.__setitem__, {"of all": NOISY})
    assert recorded["p99 verdict"] == "pass"
    assert "of all verdict" not in recorded
    assert recorded["of all value"] == 1.0
    with pytest.raises(pytest.fail.Exception, match=r"of all: 0.9000 .*: fail"):
        cost.judge("throughput", {"p99": GOOD}, recorded.__setitem__, {"of all": BAD})


@pytest.mark.parametrize("starts", [1, 6])
def test_a_failure_of_one_start_may_be_its_own(
    recorded: dict[str, Any], monkeypatch: pytest.MonkeyPatch, starts: int
) -> None:
    on_gpu(monkeypatch, True)
    cost = Cost(cast("Subject", FakeSubject()), 12, starts=starts)
    with pytest.raises(pytest.fail.Exception) as failed:
        cost.judge("throughput", {"idle": BAD}, recorded.__setitem__)
    assert ("--starts 6" in str(failed.value)) == (starts == 1)


@pytest.mark.parametrize("slowest", [1.2, 1.8])
def test_what_is_undecided_tells_of_processors_that_are_not_steady(
    recorded: dict[str, Any], monkeypatch: pytest.MonkeyPatch, slowest: float
) -> None:
    on_gpu(monkeypatch, True)
    samples = itertools.cycle([1e-3, 1e-3, slowest * 1e-3])
    monkeypatch.setattr(pace, "sample", lambda: next(samples))
    cost = Cost(cast("Subject", FakeSubject()), 12)
    benchmark = FakeBenchmark()
    cost.run(rounds_of("absent capturing", []), benchmark, "a group")
    assert len(benchmark.extra_info["paces"]) == 3 * 12
    with pytest.raises(pytest.skip.Exception) as undecided:
        cost.judge("throughput", {"capturing": NOISY}, recorded.__setitem__)
    assert recorded["spread of the processors' pace"] == slowest
    told = f"The same piece of Python took 1.00 to {slowest:.2f} ms between the rounds: most likely others share"
    assert (told in str(undecided.value)) == (slowest > 1.3)


def test_a_cpu_judges_nothing(recorded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, False)
    judge(recorded, idle=BAD)
    assert recorded["verdict"] == "not judged on a CPU"
    assert "idle verdict" not in recorded
    assert recorded["idle value"] == 0.9


def rounds_of(names: str, ran: list[tuple[str, int]]) -> Rounds[str]:
    def run(engine: Engine, number: int) -> str:
        ran.append((str(engine), number))
        return f"{engine} {number}"

    return Rounds({name: cast("Engine", name) for name in names.split()}, lambda _engine, _number: None, run)


def test_arms_take_turns_at_being_the_first() -> None:
    ran: list[tuple[str, int]] = []
    rounds = rounds_of("absent idle capturing", ran)
    rounds.warm_up()
    assert not any(rounds.samples.values()), "the round that warms up counts"
    for _ in range(3):
        rounds.before()
        rounds.timed()
        rounds.after()
        rounds.count()
    assert {ran[start][0] for start in (3, 6, 9)} == {"absent", "idle", "capturing"}
    assert rounds.samples == {name: [f"{name} {number}" for number in (2, 3, 4)] for name in rounds.arms}


class FakeBenchmark:
    """Runs as pytest-benchmark's fixture does."""

    group = ""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(
        self, target: Callable[[], None], setup: Callable[[], None], teardown: Callable[[], None], rounds: int
    ) -> None:
        for _ in range(rounds):
            setup()
            target()
            teardown()


def ran_rounds(rounds: Rounds[str], subject: FakeSubject | None = None, **options: Any) -> int:
    benchmark = FakeBenchmark()
    Cost(cast("Subject", subject or FakeSubject()), 12, **options).run(rounds, benchmark, "a group")
    [number] = {len(samples) for samples in rounds.samples.values()}
    assert {arm: len(moments) for arm, moments in benchmark.extra_info["began"].items()} == {
        str(arm): number for arm in rounds.arms
    }, "each round of each arm has the moment when it began"
    assert len(benchmark.extra_info["starts"]) == number
    return number


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """Time for the benchmarks, which a test moves on."""
    time = mock.Mock(now=0.0)
    time.monotonic.side_effect = lambda: time.now
    monkeypatch.setattr(importlib.import_module("harness.pytest_plugin.benchmarks"), "time", time)
    return time


@pytest.mark.parametrize(
    ("seconds", "starts", "number"), [(None, 1, 12), (60.0, 1, 6), (15.0, 1, 1), (1.0, 1, 1), (60.0, 3, 3 * 2)]
)
def test_seconds_decide_how_many_rounds_there_are(
    clock: mock.Mock, seconds: float | None, starts: int, number: int
) -> None:
    rounds = rounds_of("absent capturing", [])

    def takes_time(_engine: Engine, number_of_round: int) -> str:
        clock.now += 100.0 if number_of_round == 1 else 5.0  # what warms up takes longer, and does not decide it
        return ""

    rounds.run = takes_time
    assert ran_rounds(rounds, seconds=seconds, starts=starts) == number


def test_engines_start_again_and_warm_up() -> None:
    ran: list[tuple[str, int]] = []
    rounds = rounds_of("absent idle capturing", ran)
    subject = FakeSubject()
    assert ran_rounds(rounds, subject, starts=3) == 3 * 12
    assert rounds.starts == [0] * 12 + [1] * 12 + [2] * 12
    first, second = subject.pool.started
    assert {*first} == {"absent'", "idle'", "capturing'"}
    assert first[0].strip("'") != second[0].strip("'"), "the same one starts first each time"
    # One round more of each start than counts, and its engines run under their arms' names.
    assert len(ran) == 3 * 3 * 13
    for arm, samples in rounds.samples.items():
        assert [sample.split()[0] for sample in samples] == [arm] * 12 + [f"{arm}'"] * 12 + [f"{arm}''"] * 12
        assert len({sample.split()[1] for sample in samples}) == len(samples)


def test_what_ran_before_an_interrupt_counts() -> None:
    session = mock.Mock(shouldstop=False)
    rounds = rounds_of("absent capturing", [])
    run = rounds.run

    def interrupted(engine: Engine, number: int) -> str:
        if number == 5 and "5" in str(rounds.samples):  # in the second arm of the round
            raise KeyboardInterrupt
        return run(engine, number)

    rounds.run = interrupted
    assert ran_rounds(rounds, session=session) == 3
    assert str(session.shouldstop).startswith("the benchmark's rounds")


def test_an_interrupt_before_the_first_round_is_one() -> None:
    rounds = rounds_of("absent capturing", [])
    rounds.run = mock.Mock(side_effect=["", "", KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        ran_rounds(rounds, session=mock.Mock(shouldstop=False))


@pytest.mark.parametrize("when", ["start", "warm-up"])
def test_starts_before_an_interrupted_one_count(when: str) -> None:
    rounds = rounds_of("absent capturing", [])
    run, subject = rounds.run, FakeSubject(KeyboardInterrupt() if when == "start" else None)

    def interrupted(engine: Engine, number: int) -> str:
        if str(engine) == "capturing''":
            raise KeyboardInterrupt
        return run(engine, number)

    rounds.run = interrupted
    assert ran_rounds(rounds, subject, starts=5, session=mock.Mock()) == 2 * 12
    assert rounds.starts == [0] * 12 + [1] * 12


def test_starts_before_one_that_fails_count() -> None:
    failure, errors = EngineError("no memory"), list[EngineError]()
    rounds = rounds_of("absent capturing", [])
    assert ran_rounds(rounds, FakeSubject(failure), starts=5, not_started=errors) == 2 * 12
    assert errors == [failure]


def test_an_engine_that_dies_in_a_round_fails_the_benchmark() -> None:
    rounds = rounds_of("absent capturing", [])
    rounds.run = mock.Mock(side_effect=[*"12345", EngineError("the engine died")])
    with pytest.raises(EngineError, match="died"):
        ran_rounds(rounds)


def test_a_round_that_is_disturbed_is_the_p99_of_all_and_not_that_of_the_rounds() -> None:
    calm = [[0.1 + 0.001 * number for number in range(64)] for _ in range(12)]
    disturbed = [*calm[:-1], [2 * seconds for seconds in calm[-1]]]
    found = ratios([0] * 12, 1, calm, disturbed)
    assert (found["p50"].value, found["p99"].value) == (1.0, 1.0)
    assert found["p99 of all"].value < 0.7
    # A request whose outputs were all merged has no time between its tokens.
    lacking = [[], *calm[1:]]
    assert ratios([0] * 12, 1, calm, lacking) == ratios([0] * 11, 1, calm[1:], calm[1:])
    assert ratios([0] * 12, 1, [[], [1.0, 1.0], *calm[2:]], calm)["p50"].samples == 11
    with pytest.raises(ValueError, match="needs a round"):
        ratios([0], 1, [[]], [[1.0]])
    # One request a round has one latency, which is all percentiles of its round.
    assert set(ratios([0] * 12, 1, [[1.0]] * 12, [[1.0]] * 12)) == {"p50", "p99 of all"}
