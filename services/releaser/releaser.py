"""The releaser's loop: from adapters, traffic and orders to releases and routes.

::

    adapters ─▶ candidate ─▶ Examiner (own thread): files, engine, gold ─▶ gated ─▶ canary ◀─ episodes, calls
                             Examiner: recent prompts, in the shadow ─────────┘     │ └─▶ its next, larger share
    pins ─▶ adapters that are asked for by name: checked, loaded (pins.py)          │
    MLflow's aliases ◀─▶ requests to examine, and what is live (aliases.py)         │
    commands ─▶ orders, before anything else                                        │ verdict or guard
                                                                                    ▼
                                              live, retired, rolled back ─▶ route ─▶ gateways

One thread does all of this, and waits for nothing but the log: what takes seconds is a future of the Examiner's,
looked at in the next round. A round begins at once when an order comes. All that matters is in the log: a new
process reads it and goes on where this one was killed.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from everloop.config import Config, PolicyConfig
from everloop.episode import Episode
from everloop.errors import EverloopError
from everloop.event import BASE, PROVIDER, EventKind
from everloop.home import Home
from everloop.log.base import Log
from everloop.release import CanaryPlan, Release
from everloop.topics import COMMANDS, EPISODES, EVENTS, PAUSES
from prometheus_client import Counter, Gauge

from pipelines.gate import Decision
from pipelines.sequential import Verdict, bounds, judge, stage_lacks
from services.releaser.aliases import Aliases
from services.releaser.examiner import Examiner, Ready
from services.releaser.history import History
from services.releaser.journal import Journal, Tail
from services.releaser.office import Office
from services.releaser.pins import Pins
from services.releaser.power import forecast, told
from services.releaser.recent import recent
from services.releaser.state import (
    Change,
    PolicyState,
    candidate,
    gated,
    next_stage,
    promote,
    rejected,
    rejected_in_shadow,
    release_id,
    roll_back,
    start_canary,
)
from services.releaser.traffic import Traffic

logger = logging.getLogger(__name__)
ROUND = 0.1  # seconds that a round waits for an order
LOOK = 0.25  # seconds between looks at a canary's traffic
BY_HAND = "Waits for a person ('everloop release promote {} --without-evidence --reason …')"
LATER = 5.0  # seconds before something that failed is tried again
AT_ONCE = 250  # records of a partition that one look takes: an order must not wait for a long backlog
MOVED = Counter("everloop_release_transitions", "Transitions of releases, by the state they led to", ["state"])
CANARIES = Gauge("everloop_releaser_canaries", "Canaries that run now")
WAITING = Gauge("everloop_releaser_candidates", "Candidates that wait for their turn, or for a person")


@dataclass
class Canary:
    """A running canary's traffic, and where it is read from."""

    traffic: Traffic
    events: Tail
    episodes: Tail
    verdict: Verdict | None = None
    history: History = field(default_factory=History)
    look_at: float = 0.0


@dataclass
class Work:
    """What is under way or known for one policy, and is not in the log."""

    config: PolicyConfig
    canary: Canary | None = None
    examination: tuple[Release, Future[Decision]] | None = None
    """The release as it is compared: its incumbent is what was live when the examination began."""
    readying: tuple[str, Future[Ready]] | None = None
    waits: dict[str, str] = field(default_factory=dict)
    """By release: why it does not go on now, in one sentence."""
    undecided: tuple[str, int, str] | None = None
    """The release that a person has to decide about, how many gold items there were, and what was live."""
    again_at: float = 0.0


class Releaser:
    """Drives the releases of every policy of an installation. Make one, then :meth:`run`; one a home."""

    def __init__(self, config: Config, log: Log, examiner: Examiner, clock: Callable[[], float] = time.time) -> None:
        self.config = config
        self.examiner = examiner
        self.journal = Journal(log, Home(config.home).blobs)
        self.states = {f"{t}/{p}": PolicyState(t, p) for t, p in config.policies()}
        self.work = {key: Work(config.policy(s.tenant, s.policy)) for key, s in self.states.items()}
        self.office = Office(self)
        self.pins = Pins(config, self.journal, examiner)
        self.aliases = Aliases(config, examiner, self.journal.announce, clock())
        self.rounds = 0
        self._clock = clock

    def run(self, stop: threading.Event, after_round: Callable[[Releaser], None]) -> None:
        """Until ``stop``. Raises LogError where the log does not take a change: start anew, nothing is lost."""
        self.recover()
        consumer = self.journal.log.consumer("releaser", [COMMANDS.name, PAUSES.name])
        try:
            while not stop.is_set():
                self.office.receive(consumer, wait=ROUND)
                self.pins.take(self._clock())
                self._take_adapters(self._clock())  # first, so that an order can be about the newest candidate
                self.office.carry_out(consumer)
                self.round()
                after_round(self)
        finally:
            consumer.close()

    def recover(self) -> None:
        """Rebuild the state from the log; make the route what the releases say, where a kill left it otherwise."""
        self.journal.open()
        for release in self.journal.releases():
            if release.key in self.states:
                self.states[release.key].take(release)
        for route in self.journal.routes():
            if route.key in self.states:
                self.states[route.key].take_route(route)
        self.office.recover(self.journal)
        for state in self.states.values():
            self.write(state, Change((), state.route_now(self._clock())))
        self._keep()

    def round(self) -> None:
        """One look at everything."""
        now = self._clock()
        for key, state in self.states.items():
            self._advance(state, self.work[key], now)
        if self.pins.look(self.states, self._serving(), now):
            self._keep()
        self.aliases.look(self.states, now)
        self.rounds += 1

    def now(self) -> float:
        return self._clock()

    def seen(self, key: str) -> dict[str, dict[str, Any]]:
        """By release, evidence of the policy's canary as of the last look at it; empty where none runs."""
        canary = self.work[key].canary
        return {} if canary is None else {canary.traffic.release: self._evidence(canary)}

    def write(self, state: PolicyState, change: Change) -> None:
        """Append a change, and only then believe it."""
        if not change.releases and change.route is None:
            return
        self.journal.write(change)
        state.apply(change)
        for release in change.releases:
            MOVED.labels(release.state.value).inc()
            logger.info("%s: release %s is %s: %s", state_key(state), release.id, release.state, release.reason)
        self._keep()

    def _serving(self) -> dict[str, Release]:
        """By adapter, what releases need resident."""
        return {adapter: release for state in self.states.values() for adapter, release in state.resident.items()}

    def _keep(self) -> None:
        CANARIES.set(sum(state.canary is not None for state in self.states.values()))
        WAITING.set(sum(state.waiting is not None for state in self.states.values()))
        wanted = self._serving()
        known = {r.adapter for state in self.states.values() for r in state.releases.values()}
        self.examiner.residents.keep(wanted, known | self.pins.known, self.pins.wanted(wanted))

    def _take_adapters(self, now: float) -> None:
        for adapter in self.journal.new_adapters():
            state = self.states.get(adapter.key)
            if state is None:
                logger.warning("adapter %s is for %s, which is not configured", adapter.hash, adapter.key)
            elif release_id(adapter) not in state.releases:
                self.write(state, candidate(state, adapter, now))

    def _advance(self, state: PolicyState, work: Work, now: float) -> None:
        if state.canary is not None:
            self._watch(state, state.canary, work, now)
            return
        work.canary = None
        if self.office.paused(state_key(state)) or now < work.again_at:
            return
        passed, waiting = state.gated, state.gated or state.waiting
        if passed is not None and passed.incumbent == state.live_adapter:
            self._try_canary(state, passed, work, now)
        elif waiting is not None:  # one that has passed too, where something else is live since
            self._examine(state, waiting, work, now)

    def _examine(self, state: PolicyState, release: Release, work: Work, now: float) -> None:
        gold = self.examiner.gold_count(state.tenant, state.policy)
        if work.undecided == (release.id, gold, state.live_adapter):
            return
        compared = release.model_copy(update={"incumbent": state.live_adapter})
        if work.examination is None or work.examination[0] != compared:
            work.examination = compared, self.examiner.examine(compared)
            work.waits[release.id] = "It is being examined."
        future = work.examination[1]
        if not future.done():
            return
        work.examination = None
        decision = self._result(future, release, work, now)
        if decision is not None:
            self._decided(state, compared, work, decision, gold, now)

    def _decided(
        self, state: PolicyState, release: Release, work: Work, decision: Decision, gold: int, now: float
    ) -> None:
        asked = {"against": PROVIDER} if release.incumbent == BASE and work.config.incumbent is not None else {}
        if decision.verdict == "pass":
            self.write(state, gated(release, decision.reason, now, decision.numbers() | asked))
        elif decision.verdict == "fail":
            self.write(state, rejected(release, decision.reason, now, decision.numbers() | asked))
        else:
            work.undecided = release.id, gold, release.incumbent
            work.waits[release.id] = f"{BY_HAND.format(release.id)}: {decision.reason}"
            logger.info("%s: release %s: %s", state_key(state), release.id, work.waits[release.id])

    def _try_canary(self, state: PolicyState, release: Release, work: Work, now: float) -> None:
        """A route names an adapter only once the engine holds it, and recent prompts were answered in the shadow."""
        frozen = self.office.frozen(state_key(state))
        if frozen is not None:
            work.waits[release.id] = frozen
            return
        if work.readying is None or work.readying[0] != release.id:
            look_back = functools.partial(recent, self.journal, state.tenant, state.policy, now)
            work.readying = release.id, self.examiner.ready(release, look_back)
            work.waits[release.id] = "Its adapter is loaded, and answers recent prompts that no user sees."
        future = work.readying[1]
        if not future.done():
            return
        work.readying = None
        ready = self._result(future, release, work, now)
        if ready is not None and ready.shadow.breach:
            reason = f"Rejected before any user saw it: {ready.shadow.breach}."
            self.write(state, rejected_in_shadow(release, reason, now, {"shadow": ready.shadow.numbers()}))
        elif ready is not None and release.adapter in self.examiner.residents.held:
            self._start_canary(state, release, work, ready, now)

    def _start_canary(self, state: PolicyState, release: Release, work: Work, ready: Ready, now: float) -> None:
        plan = work.config.canary.plan()
        expected = forecast(plan, ready.recent)
        known = {"begins": self.journal.traffic_begins(), "shadow": ready.shadow.numbers(), "power": expected}
        marked = release.model_copy(update={"evidence": {**release.evidence, **known}})
        self.write(state, start_canary(state, marked, plan, now, f"; {told(plan, expected)}"))

    def _result(self, future: Future[Any], release: Release, work: Work, now: float) -> Any:
        """What a future gave; None where it failed and will be tried again."""
        try:
            result = future.result()
        except Exception as error:
            if not isinstance(error, EverloopError):
                logger.exception("examining %s", release.id)
            work.waits[release.id] = f"Tried again in {LATER:g} s: {error}"
            work.again_at = now + LATER
            return None
        work.waits.pop(release.id, None)
        return result

    def _watch(self, state: PolicyState, release: Release, work: Work, now: float) -> None:
        assert release.plan is not None
        if work.canary is None or work.canary.traffic.release != release.id:
            begins = release.evidence.get("begins", {})
            tails = (self.journal.tail_from(topic, begins) for topic in (EVENTS, EPISODES))
            work.canary = Canary(Traffic(release.id, release.plan.shares, release.adapter), *tails)
        canary = work.canary
        if now < canary.look_at:
            return
        canary.look_at = now + LOOK
        behind = self._read(canary)
        self._remember(canary, release.plan)
        breach = canary.traffic.breach(work.config.canary)
        if breach:
            self._end(state, release, canary, f"Rolled back by a guard: {breach}.", now)
            return
        if behind:  # what was not read yet may change the verdict: read on before judging
            canary.look_at = now
            return
        verdict = canary.verdict = self._judged(release, canary, now)
        frozen = self.office.frozen(state_key(state))
        if verdict.action in ("harm", "inconclusive"):
            self._end(state, release, canary, f"Rolled back: {verdict.reason}.", now)
        elif frozen is not None:
            work.waits[release.id] = frozen
        elif verdict.action == "promote" and work.config.canary.automatic:
            evidence = self._evidence(canary)
            self.write(state, promote(state, release, f"Promoted: {verdict.reason}.", now, evidence))
        elif verdict.action == "promote":
            work.waits[release.id] = f"Waits for a person ('everloop release promote'): {verdict.reason}"
        elif release.stage + 1 < len(release.plan.shares):
            self._grow(state, release, work, canary, now)
        else:
            work.waits.pop(release.id, None)

    @staticmethod
    def _remember(canary: Canary, plan: CanaryPlan) -> None:
        stages = canary.traffic.stages()
        units = sum(its.units for pair in stages for its in pair)
        canary.history.add(canary.traffic.newest, bounds(stages, plan), units)

    @staticmethod
    def _judged(release: Release, canary: Canary, now: float) -> Verdict:
        assert release.plan is not None
        return judge(
            canary.traffic.stages(),
            release.plan,
            seconds=now - release.canary_began,
            episodes=sum(canary.traffic.assigned().values()),
            last=release.stage + 1 == len(release.plan.shares),
            reached=canary.traffic.reached(),
        )

    def _grow(self, state: PolicyState, release: Release, work: Work, canary: Canary, now: float) -> None:
        """To the next stage, once this one has shown enough."""
        assert release.plan is not None
        came, began = canary.traffic.came(release.stage), release.time
        lacks = stage_lacks(release.plan, *came, now - began)
        if lacks is not None:
            work.waits[release.id] = f"Stage {release.stage + 1} of {len(release.plan.shares)}: {lacks}."
            return
        work.waits.pop(release.id, None)
        why = f"guards are quiet and no harm is shown after {came[0]} and {came[1]} people or episodes"
        self.write(state, next_stage(state, release, why, now))

    def _read(self, canary: Canary) -> bool:
        """Take what is new, not too much at once; whether there is more."""
        for record in canary.events.new(AT_ONCE):
            fields = self.journal.unsealed(record)
            payload = fields.get("payload") if fields and not fields.get("synthetic") else None
            if isinstance(payload, dict) and payload.get("kind") == EventKind.CALL:
                unit = str(fields.get("subject") or fields.get("episode"))
                canary.traffic.take_call(payload, unit, float(fields.get("time") or 0.0))
        for record in canary.episodes.new(AT_ONCE):
            episode = self.journal.decode(Episode, record)
            if episode is not None:
                canary.traffic.take_episode(episode)
        return canary.events.behind or canary.episodes.behind

    def _end(self, state: PolicyState, release: Release, canary: Canary, reason: str, now: float) -> None:
        self.write(state, roll_back(state, release, reason, now, self._evidence(canary)))

    @staticmethod
    def _evidence(canary: Canary) -> dict[str, Any]:
        numbers = canary.traffic.numbers() | {"history": canary.history.points}
        if canary.verdict is not None:
            numbers |= canary.verdict.numbers()
        return {"canary": numbers}


def state_key(state: PolicyState) -> str:
    return f"{state.tenant}/{state.policy}"
