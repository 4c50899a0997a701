"""What the learner knows of each policy: a fold over the log, the same after every restart.

Scores say how much is new and whether things got worse; routes, releases and reward versions say what a run would
start from; commands and runs say what was asked for and what came of it. Nothing else moves these facts: the runner
appends a run, and the fold notes it like everybody's.
"""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, dataclass, field
from typing import Any

from everloop import wire
from everloop.errors import ContractError
from everloop.event import BASE
from everloop.log.base import NewRecord, Record
from everloop.release import Adapter, Release, ReleaseState, Route
from everloop.run import Command, CommandKind, RewardVersion, Run, RunState
from everloop.score import Score
from everloop.stream import State
from everloop.topics import ADAPTERS, COMMANDS, PAUSES, RELEASES, REWARDS, ROUTES, RUNS, SCORES
from everloop.wire import BlobStore

from pipelines.overoptimise import Window

RECENT = 200
"""Calls over which the mean reward, and labels over which the share of good ones, are taken."""
REMEMBERED = 64
DECIDING = (ReleaseState.CANDIDATE, ReleaseState.GATED, ReleaseState.CANARY)


@dataclass
class Facts:
    """One policy's state. ``rewards`` and ``labels``: the newest; ``*_before``: their means at the last run's start.

    ``lives`` are the versions that were live, newest first. ``orders`` are retrain commands that no run came of yet,
    oldest first. ``deciding`` is the newest release that is on its way: adapter, state, time of that state.
    ``runs`` maps adapters to the runs that made them. ``windows``: see :mod:`pipelines.overoptimise`, newest last;
    ``resumed``: when a person last let runs start again, which looks away from the windows before.
    """

    scored: int = 0
    rewards: list[float] = field(default_factory=list)
    labels: list[float] = field(default_factory=list)
    reward_before: float | None = None
    labels_before: float | None = None
    paused: bool = False
    paused_why: str = ""
    resumed: float = 0.0
    windows: list[list[Any]] = field(default_factory=list)
    live: str = BASE
    uris: dict[str, str] = field(default_factory=dict)
    lives: list[str] = field(default_factory=lambda: [BASE])
    reward_version: str = ""
    reward_path: str = ""
    orders: list[dict[str, Any]] = field(default_factory=list)
    run: dict[str, Any] | None = None
    run_started: float | None = None
    deciding: dict[str, Any] | None = None
    runs: dict[str, str] = field(default_factory=dict)


class FactsHandler:
    """Stream handler "learn". ``known`` is for other threads: facts as of the last flush, by "tenant/policy"."""

    name = "learn"
    topics = tuple(topic.name for topic in (SCORES, REWARDS, ROUTES, RELEASES, ADAPTERS, COMMANDS, PAUSES, RUNS))

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._held: dict[str, Facts] | None = None
        self._changed: set[str] = set()
        self._lock = threading.Lock()
        self._known: dict[str, Facts] = {}
        self.answers: dict[str, dict[str, Any]] = {}

    def known(self, key: str) -> Facts:
        """A copy of the facts of a policy; none yet: as at the very beginning."""
        with self._lock:
            return _parse(_text(self._known[key])) if key in self._known else Facts()

    def handle(self, state: State, record: Record, now: float) -> list[NewRecord]:
        if record.value is None:
            return []
        contract, fold = FOLDS[record.topic]
        said = wire.decode(contract, record.value, self._blobs)
        facts = self._of(state, said.key if record.topic != SCORES.name else f"{said.tenant}/{said.policy}")
        if isinstance(said, Score):
            _score(facts, said, state)
        else:
            fold(facts, said)
        return []

    def flush(self, state: State, now: float) -> list[NewRecord]:
        held = self._all(state)
        for key in self._changed:
            state.put(f"facts/{key}", _text(held[key]))
        with self._lock:
            fresh = held.keys() - self._known.keys() | self._changed
            self._known.update({key: _parse(_text(held[key])) for key in fresh})
        self._changed.clear()
        return []

    def _all(self, state: State) -> dict[str, Facts]:
        if self._held is None:
            self._held = {key.removeprefix("facts/"): _parse(value) for key, value in state.scan("facts/")}
        return self._held

    def _of(self, state: State, key: str) -> Facts:
        self._changed.add(key)
        return self._all(state).setdefault(key, Facts())


def _score(facts: Facts, score: Score, state: State) -> None:
    """Each episode counts once, and each label once, however often a score is written again."""
    mark = f"seen/{score.tenant}/{score.policy}/{score.episode}"
    if state.get(mark) is None:
        state.put(mark, b"")
        facts.scored += 1
    call = f"call/{score.tenant}/{score.policy}/{score.episode}/{score.call}"
    held = state.get(call)
    if held is None and score.mask:
        facts.rewards = [*facts.rewards, score.reward][-RECENT:]
    if score.label is not None and held != b"labelled":
        facts.labels = [*facts.labels, score.label][-RECENT:]
    state.put(call, b"labelled" if score.label is not None else held or b"scored")


def _reward(facts: Facts, version: RewardVersion) -> None:
    if version.state == "released":
        facts.reward_version, facts.reward_path = version.version, version.path


def _route(facts: Facts, route: Route) -> None:
    facts.live, facts.uris = route.live, route.uris
    facts.lives = [route.live, *(one for one in facts.lives if one != route.live)][:REMEMBERED]


def _release(facts: Facts, release: Release) -> None:
    _window(facts, release)
    if release.state in DECIDING:
        facts.deciding = {"adapter": release.adapter, "state": release.state.value, "time": release.time}
    elif facts.deciding is not None and facts.deciding["adapter"] == release.adapter:
        facts.deciding = None


def _window(facts: Facts, release: Release) -> None:
    """What the gate said of a run's candidate, beside what the reward model had said: once a run."""
    run, metrics = release.evidence.get("run"), release.evidence.get("metrics") or {}
    gold = (release.evidence.get("gate") or {}).get("gold") or {}
    if not {"proxy_before", "proxy_after"} <= metrics.keys() or not {"gain", "items"} <= gold.keys():
        return
    if run not in {window[0] for window in facts.windows}:
        proxy = metrics["proxy_after"] - metrics["proxy_before"]
        window = Window(str(run), proxy, float(gold["gain"]), int(gold["items"]), release.time)
        facts.windows = [*facts.windows, list(window)][-REMEMBERED:]


def _adapter(facts: Facts, adapter: Adapter) -> None:
    facts.runs = dict([*facts.runs.items(), (adapter.hash, adapter.run)][-REMEMBERED:])
    facts.deciding = {"adapter": adapter.hash, "state": "announced", "time": adapter.time}


def _command(facts: Facts, command: Command) -> None:
    if command.kind is CommandKind.RETRAIN:
        facts.orders.append({"id": command.id, "time": command.time, "by": command.by, **command.arguments})


def _pause(facts: Facts, command: Command) -> None:
    if command.kind in (CommandKind.PAUSE, CommandKind.RESUME):
        facts.paused = command.kind is CommandKind.PAUSE
        facts.paused_why = str(command.arguments.get("reason") or "") if facts.paused else ""
        facts.resumed = facts.resumed if facts.paused else command.time


def _run(facts: Facts, run: Run) -> None:
    order = run_order(run)
    facts.orders = [one for one in facts.orders if one["id"] != order]
    if run.state is RunState.RUNNING and (facts.run is None or facts.run["id"] != run.id):
        facts.scored, facts.run_started = 0, run.time
        facts.reward_before, facts.labels_before = mean(facts.rewards), mean(facts.labels)
        facts.rewards, facts.labels = [], []
    facts.run = run.model_dump(mode="json")


def run_order(run: Run) -> str | None:
    """The command that a run came of; None: a trigger's."""
    return getattr(run, "command", None)


def mean(values: list[float], least: int = 30) -> float | None:
    """None where there are fewer than ``least``: a mean of few says nothing."""
    return sum(values) / len(values) if len(values) >= least else None


FOLDS: dict[str, tuple[Any, Any]] = {
    SCORES.name: (Score, None),
    REWARDS.name: (RewardVersion, _reward),
    ROUTES.name: (Route, _route),
    RELEASES.name: (Release, _release),
    ADAPTERS.name: (Adapter, _adapter),
    COMMANDS.name: (Command, _command),
    PAUSES.name: (Command, _pause),
    RUNS.name: (Run, _run),
}


def _text(facts: Facts) -> bytes:
    return json.dumps(asdict(facts)).encode()


def _parse(text: bytes) -> Facts:
    try:
        return Facts(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise ContractError(f"the learner's state is of another release: delete state/learn.db ({error})") from None
