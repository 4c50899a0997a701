"""The stream handler "signals": episodes in; what checks and the course of an episode say of its answers out, as
feedback events.

::

    handle: decode ──▶ checks of the answers that are new ──▶ what changed since it was said last ──▶ events
    flush:  answers that nobody came back to for the declared time ──▶ events

Its own words come back with the next version of the episode, and change nothing. State, by episode: what was said,
the verdicts with a hash of what they are of (an answer is checked once), and since when nobody did anything. Time is
event time: the newest that any episode of the policy has. Judges are asked elsewhere (:mod:`reward.judges`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field
from typing import Any

import ormsgpack
from everloop import wire
from everloop.config import Config
from everloop.episode import Episode, Turn
from everloop.errors import ContractError
from everloop.feedback import FeedbackKind
from everloop.home import Home
from everloop.log.base import NewRecord, Record
from everloop.stream import State
from everloop.topics import EPISODES

from reward import checks, declaration, derived
from reward.checks import TurnView
from reward.declaration import CheckDeclaration, Declaration
from reward.told import About, Told, Whose, changes, may_be_judged

AT_ONCE = 4  # checks that run at a time
TIMEOUTS = 2  # of one check within one episode, after which its other answers are not checked
GIVEN_UP = "given_up"
ABANDONED = "derived:abandoned"


@dataclass
class Remembered:
    """Of one episode. ``verdicts``: by ``call<tab>check``, the hash of what was checked and the value (None: none).

    ``active``: hash of what people did. ``due``: event time at which the answer ``waiting`` counts as abandoned if
    nothing is done until then; 0: never. ``abandoned``: the call that was; empty: none.
    """

    version: int = -1
    told: Told = field(default_factory=dict)
    verdicts: dict[str, list[Any]] = field(default_factory=dict)
    active: str = ""
    due: float = 0.0
    waiting: str = ""
    abandoned: str = ""


class SignalsHandler:
    """See the module. Raises ConfigError where a declaration or a check in it is none."""

    name = "signals"
    topics = (EPISODES.name,)

    def __init__(self, config: Config, home: Home) -> None:
        self._home = home
        self._declared = declared(config)
        self._words: dict[tuple[str, str], Counter[str]] = {at: Counter() for at in self._declared}
        self._failures: dict[tuple[str, str], Counter[str]] = {at: Counter() for at in self._declared}
        self._next_due: dict[tuple[str, str], float] = dict.fromkeys(self._declared, 0.0)  # no later than the first
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="check")

    def handle(self, state: State, record: Record, now: float) -> list[NewRecord]:
        episode = read(record, self._home)
        at = (episode.tenant, episode.policy)
        its = self._declared.get(at)
        if its is None:
            return []
        _advance(state, at, min(episode.updated, now))  # what is dated ahead is no sign that time has passed
        if not may_be_judged(episode, its.also):
            return []
        whose = Whose.of(episode)
        known = _load(state, whose)
        if episode.version <= known.version:
            return []
        known.version = episode.version
        found = self._check(at, its, episode, known)
        signals = derived.found(episode, its.derived)
        found |= {About(call, f"derived:{name}"): value for (call, name), value in signals.items()}
        self._silence(state, at, its, episode, known)
        if known.abandoned:
            found[About(known.abandoned, ABANDONED)] = 0.0
        records = changes(whose, episode.updated, known.told, found, self._words[at])
        _save(state, whose, known)
        return records

    def flush(self, state: State, now: float) -> list[NewRecord]:
        return [record for at in self._declared for record in self._let_go(state, at)]

    def status(self) -> dict[str, dict[str, Any]]:
        """By 'tenant/policy', since the start: words by source, failures by ``check:<name> <failure>``."""
        return {
            "/".join(at): {"words": dict(words), "failures": dict(self._failures[at])}
            for at, words in self._words.items()
        }

    def _check(self, at: tuple[str, str], its: Declaration, episode: Episode, known: Remembered) -> dict[About, float]:
        """What the checks say of each answer; each check goes through the answers by itself, beside the others."""
        made = list(self._pool.map(lambda check: _verdicts(check, episode, known.verdicts), its.check))
        found: dict[About, float] = {}
        for check, (verdicts, failures) in zip(its.check, made, strict=True):
            kind = FeedbackKind.OUTCOME if check.verifiable else FeedbackKind.IMPLICIT
            self._failures[at].update(f"check:{check.name} {failure}" for failure in failures)
            for call, (digest, value) in verdicts.items():
                known.verdicts[f"{call}\t{check.name}"] = [digest, value]
                if value is not None:
                    found[About(call, f"check:{check.name}", kind)] = value
        return found

    def _silence(
        self, state: State, at: tuple[str, str], its: Declaration, episode: Episode, known: Remembered
    ) -> None:
        """Note whether somebody did something, and from when on the last answer would count as abandoned."""
        active = derived.activity(episode)
        if active == known.active:
            return
        _unwait(state, at, episode.id, known)
        known.active, known.abandoned = active, ""
        waiting, after = derived.waits(episode), its.derived.abandoned_after
        if waiting is not None and after is not None:
            known.due, known.waiting = round(episode.updated + after, 3), waiting
            state.put(_waiting(at, known.due, episode.id), b"")
            self._next_due[at] = min(self._next_due[at], known.due)

    def _let_go(self, state: State, at: tuple[str, str]) -> list[NewRecord]:
        """The words about answers whose time is over; reads what waits only where something can be due."""
        held = state.get(_clock(at))
        time = float(held) if held else 0.0
        if time < self._next_due[at]:
            return []
        records: list[NewRecord] = []
        self._next_due[at] = float("inf")
        for key, _ in state.scan(_waiting(at)):
            _, _, _, due, id = key.split("/", 4)
            if float(due) > time:
                self._next_due[at] = float(due)
                break
            whose = Whose(*at, id)
            known = _load(state, whose)
            known.abandoned = known.waiting
            found = {About.of(one): value for one, (value, _) in known.told.items() if value is not None}
            found[About(known.abandoned, ABANDONED)] = 0.0
            records += changes(whose, known.due, known.told, found, self._words[at])
            _unwait(state, at, id, known)
            _save(state, whose, known)
        return records


def declared(config: Config) -> dict[tuple[str, str], Declaration]:
    """The declarations with a check or a derived signal, by (tenant, policy). Raises ConfigError."""
    return {at: its for at, its in declarations(config).items() if its.check or its.derived.any}


def declarations(config: Config) -> dict[tuple[str, str], Declaration]:
    return {at: declaration.load(config.policy(*at).reward.declaration) for at in config.policies()}


def read(record: Record, home: Home) -> Episode:
    """The episode of a record. Raises ContractError where it is none, or lies under another's key."""
    if record.value is None:
        raise ContractError("an episode has no value; episodes are never deleted by tombstone")
    episode = wire.decode(Episode, record.value, home.blobs)
    if episode.key != record.key:
        raise ContractError(f"episode {episode.key} lies under the key {record.key}; it cannot join either")
    return episode


def chosen(share: float, *names: str) -> bool:
    """Whether an answer is among this share of all, by a hash of its names: the same at every look."""
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _verdicts(
    check: CheckDeclaration, episode: Episode, before: Mapping[str, list[Any]]
) -> tuple[dict[str, tuple[str, float | None]], list[str]]:
    """By call: hash of what was checked and verdict, as before where it is the same; and the failures."""
    config, failures, timeouts = check.config, [], 0
    found: dict[str, tuple[str, float | None]] = {}
    for turn in episode.turns:
        if turn.call.error is not None or not chosen(check.share, episode.id, turn.call.id, check.name):
            continue
        view = _view(check, turn)
        digest = _digest(check, view)
        held = before.get(f"{turn.call.id}\t{check.name}")
        if held is not None and held[0] == digest:
            found[turn.call.id] = (digest, held[1])
            continue
        if timeouts >= TIMEOUTS:
            failures.append(GIVEN_UP)
            found[turn.call.id] = (digest, None)
            continue
        verdict = checks.run(config, view)
        found[turn.call.id] = (digest, verdict.value)
        failures += [verdict.failure] if verdict.failure else []
        timeouts += verdict.failure == "timeout"
    return found, failures


def _view(check: CheckDeclaration, turn: Turn) -> TurnView:
    output = turn.call.output
    references = {"correction": turn.correction, checks.CONSTANT: check.constant}
    return TurnView(output.text, tuple(output.tool_calls or ()), turn.call.tools, references)


def _digest(check: CheckDeclaration, view: TurnView) -> str:
    seen = [check.model_dump(mode="json"), view.answer, view.tool_calls, view.tools, dict(view.references)]
    return hashlib.blake2b(json.dumps(seen, sort_keys=True, default=str).encode(), digest_size=12).hexdigest()


def _load(state: State, whose: Whose) -> Remembered:
    held = state.get("episode/" + "/".join(whose))
    return Remembered(*ormsgpack.unpackb(held)) if held else Remembered()


def _save(state: State, whose: Whose, known: Remembered) -> None:
    state.put("episode/" + "/".join(whose), ormsgpack.packb(astuple(known)))


def _clock(at: tuple[str, str]) -> str:
    return "clock/" + "/".join(at)


def _advance(state: State, at: tuple[str, str], time: float) -> None:
    held = state.get(_clock(at))
    if held is None or time > float(held):
        state.put(_clock(at), repr(time).encode())


def _waiting(at: tuple[str, str], due: float | None = None, id: str = "") -> str:
    """The key of an answer that may come to count as abandoned; without ``due`` what all of the policy begin with."""
    return f"waiting/{'/'.join(at)}/" + ("" if due is None else f"{due:017.3f}/{id}")


def _unwait(state: State, at: tuple[str, str], id: str, known: Remembered) -> None:
    if known.due:
        state.delete(_waiting(at, known.due, id))
    known.due, known.waiting = 0.0, ""
