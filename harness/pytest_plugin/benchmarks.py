"""The arms of a benchmark, its interleaved rounds and their verdicts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import pytest
import torch

from harness import load, pace, peers
from harness.engine import Arm, Engine, EngineError, EngineSpec, Interface
from harness.load import Workload
from harness.pytest_plugin.subject import Subject
from harness.verdict import FEWEST, Ratio, Verdict, judge

T = TypeVar("T")

GPU_OPTIONS = {"max_model_len": 8192, "max_num_seqs": 48, "kv_cache_memory_bytes": 8 << 30}
"""Of an engine among three on a GPU."""

MOST_IMAGES = 8
"""Of a request of a workload."""


def on_gpu() -> bool:
    """Where cost is judged. On a CPU the benchmarks run small, to see that they work."""
    return torch.cuda.is_available()


@dataclass(frozen=True)
class Cost:
    """The engines that are compared with each other.

    Attributes:
        subject: the model.
        rounds: how often each arm runs a workload in each start of the engines.
        chosen: with --arm, the arms beside the two that a ratio needs, absent and capturing.
        seconds: of a benchmark's rounds, which are as many as fit then, and not `rounds`.
        starts: how often the engines of a benchmark start.
        session: is ended after a benchmark that the user interrupts.
        not_started: errors of engines that did not start again, raised when what the starts before showed is recorded.
        paces: of the processors, three between any two rounds.
    """

    subject: Subject
    rounds: int
    chosen: tuple[Arm, ...] = tuple(Arm)
    seconds: float | None = None
    starts: int = 1
    session: pytest.Session | None = None
    not_started: list[EngineError] = field(default_factory=list)
    paces: list[float] = field(default_factory=list)

    def arms(
        self,
        interface: Interface,
        arms: Iterable[Arm] = tuple(Arm),
        *,
        peer: tuple[str, EngineSpec] | None = None,
        capture_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> dict[str, Engine]:
        """The engines by arm, all alive at once.

        Args:
            interface: to vLLM.
            arms: which.
            peer: one more, with its name.
            capture_options: the plugin's, for the arm that captures.
            options: of all arms.
        """
        specs = {
            str(arm): self._spec(arm, interface, **options, **(capture_options or {} if arm is Arm.CAPTURING else {}))
            for arm in arms
            if arm in (*self.chosen, Arm.ABSENT, Arm.CAPTURING)
        }
        if peer is not None:
            specs[peer[0]] = peer[1]
        return dict(zip(specs, self.subject.pool.together(specs.values()), strict=True))

    def peer(self, name: str, config: Mapping[str, Any]) -> tuple[str, EngineSpec]:
        """For `arms`: an engine without the plugin, with the encoder-cache connector of harness.peers.PEERS."""
        if config:
            return name, self._spec(Arm.ABSENT, Interface.LLM, ec_transfer_config=dict(config, ec_role="ec_both"))
        return name, dataclasses.replace(self._spec(Arm.ABSENT, Interface.LLM), setup=peers.SECOND_PASS)

    def _spec(self, arm: Arm, interface: Interface, **options: Any) -> EngineSpec:
        in_process = not on_gpu() and interface is Interface.LLM  # a core and a frontend of each on two cores is much
        limits = {modality: MOST_IMAGES if modality == "image" else 1 for modality in self.subject.spec.placeholders}
        settings = {**(GPU_OPTIONS | {"limit_mm_per_prompt": limits} if on_gpu() else {}), **options}
        return self.subject.engine_spec(arm, interface, in_process=in_process, **settings)

    def scaled(self, workload: Workload) -> Workload:
        """The workload as this machine and this model can take it."""
        return workload if on_gpu() else workload.small()

    def needs(self, modality: str) -> None:
        """Skips the test, before any engine starts for it, where the model takes no such media."""
        if modality not in self.subject.spec.placeholders:
            pytest.skip(f"{self.subject.spec.name} takes no {modality}")

    def run(self, rounds: Rounds[Any], benchmark: Any, group: str) -> None:
        """Warms up, and fills in the rounds' samples.

        Interrupted, or where the engines do not start again, it keeps the rounds that are complete: they may have taken
        an hour.
        """
        number = self._warm_up(rounds)
        benchmark.group = group
        benchmark.extra_info.update(began=rounds.began, starts=rounds.starts, paces=self.paces)

        def before() -> None:
            if len(rounds.starts) == number * (rounds.start + 1):
                try:
                    rounds.renew(self.subject.pool.again)
                except EngineError as error:
                    self.not_started.append(error)
                    raise _NotStartedError from error
                rounds.warm_up()
            self.paces.extend(pace.sample() for _ in range(3))
            rounds.before()

        def after() -> None:
            rounds.after()
            rounds.count()

        try:
            with suppress(_NotStartedError):
                benchmark.pedantic(rounds.timed, setup=before, teardown=after, rounds=number * self.starts)
        except KeyboardInterrupt:
            rounds.drop_uncounted()
            if self.session is None or not rounds.starts:
                raise
            self.session.shouldstop = "the benchmark's rounds up to then count"

    def _warm_up(self, rounds: Rounds[Any]) -> int:
        """Runs what does not count, and says how many rounds each start is to run."""
        rounds.warm_up()
        if self.seconds is None:
            return self.rounds
        began = time.monotonic()
        rounds.warm_up()
        return max(1, int(self.seconds / self.starts / (time.monotonic() - began)))

    def record(self, ratios: Mapping[str, Ratio], record_property: Callable[[str, object], None]) -> None:
        """Records ratios that have no gate."""
        for name, ratio in ratios.items():
            record_property(name, str(ratio))
            for part in ("value", "low", "high"):
                record_property(f"{name} {part}", getattr(ratio, part))

    def judge(
        self,
        kind: str,
        ratios: Mapping[str, Ratio],
        record_property: Callable[[str, object], None],
        watched: Mapping[str, Ratio] | None = None,
    ) -> None:
        """Records the ratios; on a GPU, fails the test that breaks its gate, or skips it as undecided.

        Args:
            kind: of the gate.
            ratios: by name.
            record_property: pytest's.
            watched: ratios that fail the test too, and do not leave it undecided: most sessions cannot decide them.
        """
        watched = watched or {}
        self.record({**ratios, **watched}, record_property)
        if not on_gpu():
            record_property("verdict", "not judged on a CPU")
            return
        gate = self.subject.spec.gates[kind]
        failed = {name: ratio for name, ratio in watched.items() if judge(ratio, gate).verdict is Verdict.FAIL}
        ratios = {**ratios, **failed}
        judgements = {name: judge(ratio, gate) for name, ratio in ratios.items()}
        for name, judgement in judgements.items():
            record_property(f"{name} verdict", str(judgement))
        promised = f"(goal {gate.goal}, interval above {gate.limit})"
        text = "\n".join(f"{name}: {ratios[name]}: {judgement} {promised}" for name, judgement in judgements.items())
        if self.paces:
            took = pace.Pace.of(self.paces)
            record_property("spread of the processors' pace", round(took.spread, 2))
            if not took.is_steady:
                text += (
                    f"\nThe same piece of Python took {took} between the rounds: most likely others share this "
                    "machine's processors. Let CUDA graphs hold prefill and encoder too, or take another machine."
                )
        verdicts = {judgement.verdict for judgement in judgements.values()}
        if Verdict.FAIL in verdicts:
            if self.starts == 1:
                text += f"\nTwo engines that start alike differ too: --starts {FEWEST} tells it from a loss."
            pytest.fail(text, pytrace=False)
        if Verdict.UNDECIDED in verdicts:
            pytest.skip(text)


class _NotStartedError(Exception):
    """Ends the rounds. An EngineError would do so too, but it may also be of an engine that died in a round."""


@dataclass
class Rounds(Generic[T]):
    """Runs the arms one after another in each round, beginning with another one each time, so that drift hits all.

    For `benchmark.pedantic`: `before` and `after` belong to its setup and teardown, `timed`, the capturing arm, is its
    target.

    Attributes:
        arms: engines by name; the one that is timed is `Arm.CAPTURING`. `renew` puts others in their places.
        prepare: puts a round's requests into an engine.
        run: runs them.
        samples: what `run` gave, by arm, one a round.
        began: when, seconds since the epoch. What disturbs the machine shows in all that runs on it then.
        starts: of each round that counts, which start of the engines ran it.
        start: the one that runs now, from 0 on.
    """

    arms: dict[str, Engine]
    prepare: Callable[[Engine, int], None]
    run: Callable[[Engine, int], T]
    samples: dict[str, list[T]] = field(default_factory=dict)
    began: dict[str, list[float]] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)
    start: int = 0
    _round: int = 0

    def warm_up(self) -> None:
        """A round that does not count."""
        self.before()
        self.timed()
        self.after()
        self.drop_uncounted()

    def renew(self, restart: Callable[[list[Engine]], list[Engine]]) -> None:
        """Goes on with other engines, which `restart` starts, each time in another order."""
        self.start += 1
        names = self._turned(self.start)
        self.arms.update(zip(names, restart([self.arms[name] for name in names]), strict=True))

    def count(self) -> None:
        """The round that all arms have run counts."""
        self.starts.append(self.start)

    def drop_uncounted(self) -> None:
        """Drops the samples of a round that was interrupted, or is not to count."""
        of_arms: tuple[list[Any], ...] = (*self.samples.values(), *self.began.values())
        for each in of_arms:
            del each[len(self.starts) :]

    def before(self) -> None:
        """Prepares a round in all engines and runs the arms that come before the one that is timed."""
        self._round += 1
        with ThreadPoolExecutor(len(self.arms)) as pool:
            list(pool.map(lambda engine: self.prepare(engine, self._round), self.arms.values()))
        first, _ = self._order()
        for name in first:
            self._run(name)

    def timed(self) -> None:
        """Runs the arm that is timed."""
        self._run(Arm.CAPTURING)

    def after(self) -> None:
        """Runs the others."""
        for name in self._order()[1]:
            self._run(name)

    def _turned(self, number: int) -> list[str]:
        names = list(self.arms)
        first = number % len(names)
        return names[first:] + names[:first]

    def _order(self) -> tuple[list[str], list[str]]:
        names = self._turned(self._round)
        timed = names.index(Arm.CAPTURING)
        return names[:timed], names[timed + 1 :]

    def _run(self, name: str) -> None:
        self.began.setdefault(str(name), []).append(time.time())
        self.samples.setdefault(str(name), []).append(self.run(self.arms[name], self._round))


def rounds_of(
    cost: Cost,
    arms: dict[str, Engine],
    workload: Workload,
    run: Callable[..., Coroutine[Any, Any, T]],
    *args: Any,
) -> Rounds[T]:
    """Rounds of a workload: each engine prepares its requests and then calls `run(server, *args)`."""
    return Rounds(
        arms,
        lambda engine, number: engine.call(load.prepare, cost.subject.spec, workload, number),
        lambda engine, _number: engine.call(run, *args),
    )


@pytest.fixture
def cost(subject: Subject, pytestconfig: pytest.Config, request: pytest.FixtureRequest) -> Iterator[Cost]:
    """The arms of the model under test."""
    rounds: int | None = pytestconfig.getoption("--rounds")
    seconds: float | None = pytestconfig.getoption("--seconds")
    every = Arm if on_gpu() else [Arm.ABSENT, Arm.CAPTURING]  # three engines are much for few cores
    chosen = [Arm(arm) for arm in pytestconfig.getoption("--arm") or every]
    starts: int = pytestconfig.getoption("--starts")
    made = Cost(subject, rounds or (12 if on_gpu() else 1), tuple(chosen), seconds, starts, request.session)
    made.needs("image")
    yield made
    for error in made.not_started:
        raise error
