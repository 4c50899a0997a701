"""What a canary's traffic shows: rated units by arm from episodes, failures by arm from calls. Pure, in memory.

Everything is folded from the log since the canary began, so it is rebuilt by reading again; a record that is read
twice counts once. Intention to treat: a unit counts for the arm that it was assigned to, whoever answered it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from everloop.config import CanaryConfig
from everloop.episode import Episode
from everloop.feedback import Feedback, FeedbackKind
from scipy import stats

from pipelines.sequential import Arm, arm, variance_of

ARMS = ("canary", "control")
RATINGS = frozenset({FeedbackKind.THUMB, FeedbackKind.RATING, FeedbackKind.OUTCOME})
CERTAINTY = 0.001  # how unlikely failures must be at the limit before a guard blames the adapter
CANCELLED = "cancelled"  # the client left: nobody's failure


class Seen(NamedTuple):
    """One episode's part in the canary. ``success``: mean of its ratings, 0 to 1; None: nobody rated it."""

    version: int
    unit: str
    arm: str
    success: float | None


@dataclass
class Calls:
    """Counts of one arm's calls."""

    made: int = 0
    failed: int = 0
    empty: int = 0


@dataclass
class Units:
    """The rated units of one arm: sums, so that a look at them costs the same however many there are."""

    rated: dict[str, tuple[float, int]] = field(default_factory=dict)
    """By unit: the sum of its rated episodes' success, and how many there are."""
    total: float = 0.0
    squares: float = 0.0

    def add(self, unit: str, success: float, weight: int) -> None:
        """One rated episode of ``unit`` more (``weight`` 1), or one less (-1)."""
        before = self.rated.pop(unit, (0.0, 0))
        after = before[0] + weight * success, before[1] + weight
        for (its, count), sign in ((before, -1), (after, 1)):
            if count:
                self.total += sign * its / count
                self.squares += sign * (its / count) ** 2
        if after[1]:
            self.rated[unit] = after

    def summary(self) -> Arm:
        """One mean for each unit."""
        count = len(self.rated)
        if not count:
            return arm(())
        return Arm(count, self.total / count, float(variance_of(count, self.total, self.squares)))


@dataclass
class Traffic:
    """One canary's traffic so far."""

    release: str
    episodes: dict[str, Seen] = field(default_factory=dict)
    calls: dict[str, Calls] = field(default_factory=lambda: {name: Calls() for name in ARMS})
    _counted: set[str] = field(default_factory=set)
    _assigned: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ARMS, 0))
    _units: dict[str, Units] = field(default_factory=lambda: {name: Units() for name in ARMS})

    def take_episode(self, episode: Episode) -> bool:
        """Fold in one version of an episode; whether it belongs to this canary and is news."""
        turns = [turn for turn in episode.turns if turn.call.release == self.release and turn.call.arm in ARMS]
        held = self.episodes.get(episode.id)
        if not turns or episode.synthetic or (held is not None and held.version >= episode.version):
            return False
        feedback = [*episode.feedback, *(item for turn in turns for item in turn.feedback)]
        seen = Seen(episode.version, episode.subject or episode.id, turns[0].call.arm, success(feedback))
        if held is not None:
            self._count(held, -1)
        self._count(seen, 1)
        self.episodes[episode.id] = seen
        return True

    def _count(self, seen: Seen, weight: int) -> None:
        self._assigned[seen.arm] += weight
        if seen.success is not None:
            self._units[seen.arm].add(seen.unit, seen.success, weight)

    def take_call(self, call: dict[str, Any]) -> bool:
        """Fold in one call (fields of ``everloop.event.Call``); whether it belongs to this canary and is news."""
        name = call.get("arm")
        if call.get("release") != self.release or name not in ARMS or call["id"] in self._counted:
            return False
        self._counted.add(call["id"])
        counts, error = self.calls[name], call.get("error")
        if call.get("finish_reason") == CANCELLED:
            return False
        counts.made += 1
        counts.failed += bool(error)
        counts.empty += not error and is_empty(call.get("output") or {})
        return True

    def arms(self) -> tuple[Arm, Arm]:
        """(canary, control): one mean for each unit that somebody rated."""
        canary, control = (self._units[name].summary() for name in ARMS)
        return canary, control

    def assigned(self) -> dict[str, int]:
        """Episodes by arm."""
        return dict(self._assigned)

    def breach(self, config: CanaryConfig) -> str | None:
        """Why a hard guard ends the canary now; None: it does not."""
        canary, control = (self.calls[name] for name in ARMS)
        for what, limit in (("failed", config.max_error_share), ("empty", config.max_empty_share)):
            bad, beside = getattr(canary, what), getattr(control, what)
            usual = max(limit, (beside + 0.5) / (control.made + 1))
            if bad and bad / canary.made > usual and stats.binom.sf(bad - 1, canary.made, usual) < CERTAINTY:
                told = "calls failed" if what == "failed" else "answers were empty"
                return (
                    f"{bad} of {canary.made} of the canary's {told} (control: {beside} of {control.made}); "
                    f"more than the {limit:.0%} allowed"
                )
        return None

    def numbers(self) -> dict[str, Any]:
        """Counts by arm, for evidence and status."""
        assigned, (canary, control) = self.assigned(), self.arms()
        return {
            name: {
                "episodes": assigned[name],
                "units": summary.units,
                "mean": summary.mean if summary.units else None,
                "calls": self.calls[name].made,
                "failed": self.calls[name].failed,
                "empty": self.calls[name].empty,
            }
            for name, summary in zip(ARMS, (canary, control), strict=True)
        }


def success(feedback: Iterable[Feedback]) -> float | None:
    """Mean of thumbs, ratings and outcomes on a scale from 0 to 1; None: there are none."""
    values = [item.success for item in feedback if item.kind in RATINGS and item.success is not None]
    return sum(values) / len(values) if values else None


def is_empty(output: dict[str, Any]) -> bool:
    """Whether an answer (fields of a message) has neither words nor tool calls."""
    content = output.get("content")
    text = content if isinstance(content, str) else "".join(str(part.get("text", "")) for part in content or ())
    return not text.strip() and not output.get("tool_calls")
