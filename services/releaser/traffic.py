"""What a canary's traffic shows: rated units by arm and stage from episodes, what went wrong for whom from calls. Pure.

Everything is folded from the log since the canary began, so it is rebuilt by reading again; a record that is read
twice counts once. Intention to treat: a unit counts for the arm that it was assigned to, whoever answered it. Its
stage is the first that it was assigned in, by the probability logged with each call. What a provider answered because
no engine did says nothing of the adapter: it is counted in :meth:`Traffic.reached` alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from everloop.config import CanaryConfig
from everloop.episode import Episode
from everloop.event import BASE, PROVIDER
from everloop.feedback import Feedback, FeedbackKind
from everloop.serving.base import LOST

from pipelines.guards import Lengths, blamed, longer
from pipelines.sequential import Arm, arm, over_all, variance_of
from services.releaser.answers import is_broken, is_empty, length

ARMS = ("canary", "control")
RATINGS = frozenset({FeedbackKind.THUMB, FeedbackKind.RATING, FeedbackKind.OUTCOME})
CANCELLED = "cancelled"  # the client left: nobody's failure
AWAY = frozenset({"engine_unavailable", "provider_unavailable", LOST})  # nobody answered: no adapter did this
TOGETHER = 10.0  # seconds between answers that the end of one engine broke off
AT_ONCE = 4  # calls of each arm after which a canary that answered none of them well is ended
TOLD = {"failed": "calls failed", "empty": "answers were empty", "broken": "answers had broken tool calls"}


class Seen(NamedTuple):
    """One episode's part in the canary. ``success``: mean of its ratings, 0 to 1; None: nobody rated it, or a provider
    stood in for its arm.
    """

    version: int
    unit: str
    arm: str
    stage: int
    success: float | None


@dataclass
class Unit:
    """A person (else an episode) in one arm. ``total``: sum of what was measured, ``measured`` how often."""

    stage: int
    total: float = 0.0
    measured: int = 0
    episodes: int = 0


@dataclass
class Cell:
    """The units of one arm and stage, as sums: a look at them costs the same however many there are."""

    seen: int = 0
    measured: int = 0
    total: float = 0.0
    squares: float = 0.0

    def put(self, unit: Unit, sign: int) -> None:
        self.seen += sign
        if unit.measured:
            mean = unit.total / unit.measured
            self.measured += sign
            self.total += sign * mean
            self.squares += sign * mean**2

    def arm(self) -> Arm:
        """One mean for each rated unit."""
        if not self.measured:
            return arm(())
        variance = float(variance_of(self.measured, self.total, self.squares))
        return Arm(self.measured, self.total / self.measured, variance)

    def lengths(self) -> Lengths:
        """As of log lengths. A tenth of a log unit is added to their spread: equal answers are no certainty."""
        if self.measured < 2:
            return Lengths(0, 0.0, 0.0)
        mean = self.total / self.measured
        around = max(self.squares - self.measured * mean**2, 0.0) / (self.measured - 1)
        return Lengths(self.measured, mean, around + 0.01)


@dataclass
class Group:
    """Units of one arm, and their sums by stage."""

    units: dict[str, Unit] = field(default_factory=dict)
    cells: dict[int, Cell] = field(default_factory=dict)

    def fold(self, name: str, stage: int, value: float | None, sign: int) -> None:
        """One episode of a unit more (``sign`` 1) or less (-1), with what was measured in it."""
        unit = self.units.get(name)
        if unit is None:
            unit = self.units[name] = Unit(stage)
        else:
            self.cells[unit.stage].put(unit, -1)
        unit.stage = min(unit.stage, stage)
        unit.episodes += sign
        if value is not None:
            unit.measured += sign
            unit.total = unit.total + sign * value if unit.measured else 0.0
        if unit.episodes:
            self.cells.setdefault(unit.stage, Cell()).put(unit, 1)
        else:
            del self.units[name]

    def cell(self, stage: int) -> Cell:
        return self.cells.get(stage, Cell())


@dataclass
class Calls:
    """Counts of one arm's calls, and the units that something went wrong for."""

    made: int = 0
    failed: int = 0
    empty: int = 0
    broken: int = 0
    units: set[str] = field(default_factory=set)
    hit: dict[str, set[str]] = field(default_factory=lambda: {name: set() for name in TOLD})
    lengths: Group = field(default_factory=Group)

    def take(self, unit: str, call: dict[str, Any]) -> None:
        self.made += 1
        self.units.add(unit)
        output = call.get("output") or {}
        wrong = {
            "failed": bool(call.get("error")),
            "empty": not call.get("error") and is_empty(output),
            "broken": not call.get("error") and is_broken(output, call.get("tools") or ()),
        }
        for name in (name for name, it_is in wrong.items() if it_is):
            setattr(self, name, getattr(self, name) + 1)
            self.hit[name].add(unit)
        if not wrong["failed"] and not wrong["empty"]:
            self.lengths.fold(unit, 0, math.log1p(length(output)), 1)

    @property
    def good(self) -> int:
        """Calls that were answered with something."""
        return self.made - self.failed - self.empty

    def numbers(self) -> dict[str, Any]:
        told: dict[str, Any] = {"calls": self.made, "failed": self.failed, "empty": self.empty, "broken": self.broken}
        typical = self.lengths.cell(0).lengths()
        return told | {"length": round(math.expm1(typical.mean), 1) if typical.units else None}


@dataclass
class Ends:
    """Ends of engines that broke off answers: when, and answers of which arms. However many one end breaks off, it is
    one thing that happened, and where the adapter makes no difference it hits either arm alone as often as the other.
    """

    seen: list[tuple[float, set[str]]] = field(default_factory=list)

    def take(self, arm: str, at: float) -> None:
        """An answer of this arm that was broken off ``at`` seconds since 1970, in whatever order they come."""
        for when, hit in self.seen:
            if abs(at - when) <= TOGETHER:
                hit.add(arm)
                return
        self.seen.append((at, {arm}))

    def alone(self, arm: str) -> int:
        """Ends that hit this arm and not the other."""
        return sum(hit == {arm} for _, hit in self.seen)

    def breach(self) -> str | None:
        canary, control = (self.alone(name) for name in ARMS)
        if not blamed(canary, control):
            return None
        return f"{canary} times engines ended under calls of the canary alone (of the control alone: {control})"


@dataclass
class Traffic:
    """One canary's traffic so far. ``shares``: of its stages. ``adapter``: what answers the canary's calls."""

    release: str
    shares: Sequence[float] = (1.0,)
    adapter: str = BASE
    episodes: dict[str, Seen] = field(default_factory=dict)
    newest: float = 0.0
    """Time of the newest episode's newest event, seconds since 1970."""
    calls: dict[str, Calls] = field(default_factory=lambda: {name: Calls() for name in ARMS})
    ends: Ends = field(default_factory=Ends)
    _own: int = 0
    _stood_in: int = 0
    _counted: set[str] = field(default_factory=set)
    _assigned: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ARMS, 0))
    _groups: dict[str, Group] = field(default_factory=lambda: {name: Group() for name in ARMS})

    def take_episode(self, episode: Episode) -> bool:
        """Fold in one version of an episode; whether it belongs to this canary and is news."""
        turns = [turn for turn in episode.turns if turn.call.release == self.release and turn.call.arm in ARMS]
        held = self.episodes.get(episode.id)
        if not turns or episode.synthetic or (held is not None and held.version >= episode.version):
            return False
        feedback = [*episode.feedback, *(item for turn in turns for item in turn.feedback)]
        first = turns[0].call
        stage = self._stage(first.probability)
        theirs = any(stood_in(turn.call.policy_version, turn.call.instead_of) for turn in turns)
        value = None if theirs else success(feedback)
        seen = Seen(episode.version, episode.subject or episode.id, first.arm, stage, value)
        if held is not None:
            self._count(held, -1)
        self._count(seen, 1)
        self.episodes[episode.id] = seen
        self.newest = max(self.newest, episode.updated)
        return True

    def _stage(self, probability: float) -> int:
        """The stage whose share this is; the last one for any other."""
        within = (at for at, share in enumerate(self.shares) if probability <= share * (1 + 1e-9))
        return next(within, len(self.shares) - 1)

    def _count(self, seen: Seen, sign: int) -> None:
        self._assigned[seen.arm] += sign
        self._groups[seen.arm].fold(seen.unit, seen.stage, seen.success, sign)

    def take_call(self, call: dict[str, Any], unit: str, began: float) -> bool:
        """Fold in one call (fields of ``everloop.event.Call``) of a unit, begun so many seconds since 1970; whether it
        is this canary's and news.
        """
        name = call.get("arm")
        if call.get("release") != self.release or name not in ARMS or call["id"] in self._counted:
            return False
        self._counted.add(call["id"])
        if call.get("error_code") == LOST:
            self.ends.take(name, began + (call.get("latency") or 0.0))
        if call.get("finish_reason") == CANCELLED or call.get("error_code") in AWAY:
            return False
        if stood_in(call.get("policy_version"), call.get("instead_of")):
            self._stood_in += name == "canary" and not call.get("error")
            return False
        self.calls[name].take(unit, call)
        self._own += name == "canary" and not call.get("error") and call.get("policy_version") == self.adapter
        return True

    def reached(self) -> float:
        """The share of the canary's answers that its adapter gave, and not what is live in its place, nor a provider;
        1 of none.
        """
        canary = self.calls["canary"]
        answers = canary.made - canary.failed + self._stood_in
        return self._own / answers if answers else 1.0

    def stages(self) -> list[tuple[Arm, Arm]]:
        """(canary, control) of every stage: one mean for each unit that somebody rated."""
        cells = ([self._groups[name].cell(at) for name in ARMS] for at in range(len(self.shares)))
        return [(canary.arm(), control.arm()) for canary, control in cells]

    def arms(self) -> tuple[Arm, Arm]:
        """(canary, control) of all stages together."""
        return over_all(self.stages())

    def came(self, stage: int) -> tuple[int, int]:
        """Units of canary and control that came in a stage first, rated or not."""
        canary, control = (self._groups[name].cell(stage).seen for name in ARMS)
        return canary, control

    def assigned(self) -> dict[str, int]:
        """Episodes by arm."""
        return dict(self._assigned)

    def breach(self, config: CanaryConfig) -> str | None:
        """Why a guard ends the canary now; None: none does."""
        limits = {
            "failed": config.max_error_share,
            "empty": config.max_empty_share,
            "broken": config.max_broken_share,
        }
        found = (self._more(what, limit) for what, limit in limits.items())
        first = next((why for why in found if why), None)
        return first or self.ends.breach() or self._longer(config.max_length_ratio)

    def _more(self, what: str, limit: float) -> str | None:
        canary, control = (self.calls[name] for name in ARMS)
        hit, beside = (len(one.hit[what]) for one in (canary, control))
        if not hit or hit / len(canary.units) <= limit or not (blamed(hit, beside) or self._hopeless(what)):
            return None
        return (
            f"{getattr(canary, what)} of {canary.made} of the canary's {TOLD[what]}, for {hit} people or episodes "
            f"(control: {getattr(control, what)} of {control.made}, for {beside}); more than the {limit:.0%} allowed"
        )

    def _hopeless(self, what: str) -> bool:
        """None of the canary's first calls came to anything, and most of the control's did: no need for statistics."""
        canary, control = (self.calls[name] for name in ARMS)
        nothing = what != "broken" and canary.made >= AT_ONCE and canary.good == 0
        return nothing and control.made >= AT_ONCE and 2 * control.good > control.made

    def _longer(self, limit: float) -> str | None:
        canary, control = (self.calls[name].lengths.cell(0).lengths() for name in ARMS)
        ratio = longer(canary, control)
        if ratio is None or ratio <= limit:
            return None
        return f"the canary's answers are {ratio:.1f} times as long as the control's; at most {limit:g} is allowed"

    def numbers(self) -> dict[str, Any]:
        """Counts by arm, in all and by stage, for evidence and status. ``stood_in``: canary calls that a provider
        answered in the adapter's place."""
        stages, together = self.stages(), self.arms()
        found: dict[str, Any] = {
            name: {"episodes": self._assigned[name], **_summary(together[at]), **self.calls[name].numbers()}
            for at, name in enumerate(ARMS)
        }
        rows = (zip(stages[at], self.came(at), strict=True) for at in range(len(stages)))
        shown = [
            {
                "share": share,
                **{name: {"came": seen, **_summary(its)} for name, (its, seen) in zip(ARMS, row, strict=True)},
            }
            for share, row in zip(self.shares, rows, strict=True)
        ]
        ends = {name: self.ends.alone(name) for name in ARMS}
        return found | {"stages": shown, "stood_in": self._stood_in, "engines_ended": ends}


def _summary(its: Arm) -> dict[str, Any]:
    return {"units": its.units, "mean": its.mean if its.units else None}


def stood_in(version: str | None, instead_of: str | None) -> bool:
    """Whether a provider gave an answer that another version was to give."""
    return version == PROVIDER and instead_of is not None


def success(feedback: Iterable[Feedback]) -> float | None:
    """Mean of thumbs, ratings and outcomes on a scale from 0 to 1; None: there are none."""
    values = [item.success for item in feedback if item.kind in RATINGS and item.success is not None]
    return sum(values) / len(values) if values else None
