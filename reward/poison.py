"""Who may move the reward model, and how far: shares, bursts and duplicates. One guard for each (tenant, policy).

::

    lesson ─▶ burst? duplicate? ──yes──▶ held: not learned, counted, named, shown; a person's trust lets it in
                 └──no──▶ weight cut to its raters' share ─▶ learned

**Share.** Of the newest ``window`` lessons, which are what replay draws from, no rater holds more than 1% of the
weight, or two equal shares where there are fewer than 200 raters, at the time each lesson is learned. A lesson that
hardly any weight is left for is held.

**Burst.** In a minute of event time, more than BURST lessons of one rater, of one call, or in favour of one answer
(by many raters), and more than TIMES what their part of the window before makes expected. So what was always frequent
is no burst, and nothing is while little is known.

**Duplicate.** The same words of the same rater about the same prompt, more than TWINS times in the window.

**Distrusted.** What a person has named as a rater not to be heard, whatever it is about.

**One answer.** More than PUSHES lessons of one rater in favour of one answer (or against it) in the window, of that
rater's lessons more than OFTEN times the part that the answer has of all others', and the model does not think so
itself. So what is right for many is nobody's push, nor what somebody says again and again and is right about; answers
that never recur are none. From a rater of whom SUSPECT such lessons were held, and half as many as were learned,
nothing is learned any more. Pushes count for one to two
windows of lessons; after that he is heard again.

Who is heard no more, by this rule or by a person's order, is *guilty*: what he taught is taken back, as far as it is
remembered (:mod:`reward.taught`) and nobody else said it with him, and is held from then on.

A lesson whose rater is not known has no share and is no rater's burst. The first BURST lessons of a burst are learned:
until then it is none. Event times may come in any order within LATE minutes of the newest; what is later counts with
the oldest minute kept. The same lessons in the same order give the same verdicts. Memory: ``window`` slots of about 100
bytes, LATE minutes of at most WATCHED keys, MOST_HELD held lessons.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import ormsgpack

from reward.model import Label, Pair
from reward.taught import Lessons, Place, Taught, name_of, packed, unpacked

WORDS = re.compile(r"\w+")
MOST_SHARE = 0.01
EQUAL_SHARES = 2
MINUTE = 60.0
FAR = 253_402_300_799.0  # the year 9999: later times are taken for it
BURST = 20
TIMES = 10.0
TWINS = 3
LATE = 5
WATCHED = 2000
MOST_HELD = 1000
LEAST = 0.05  # of a lesson's weight: with less, it is held
PUSHES = 1  # lessons of one rater for one answer that nothing is asked of
OFTEN = 3.0
SUSPECT = 3  # pushes, and half as many as were learned of him, from which on a rater is held altogether
RULES = (
    "burst of a rater",
    "burst about a call",
    "burst for an answer",
    "duplicate",
    "one answer",
    "share",
    "distrusted",
)
TAUGHT = "taught/"
ORDERED = "a person had its rater heard no more"


class Seen(NamedTuple):
    """A learned lesson in the window. ``raters``: names, none where they are not known."""

    lesson: str
    raters: list[str]
    answer: str
    twin: str
    weight: float


EMPTY = Seen("", [], "", "", 0.0)


class Verdict(NamedTuple):
    """The weight that a lesson is learned with; 0: it is held, by the rule and for the ``name`` to trust. ``silenced``:
    whatever it says, for its rater is heard no more."""

    weight: float
    rule: str = ""
    name: str = ""
    says: str = ""
    silenced: bool = False


def share_of_each(raters: int) -> float:
    """The largest share that one of so many raters may hold. Example: ``share_of_each(10) == 0.2``."""
    return min(1.0, max(MOST_SHARE, EQUAL_SHARES / max(raters, 1)))


def normal(text: str) -> str:
    """Near-identical texts are one: case, punctuation and white space do not count."""
    return " ".join(WORDS.findall(text.lower())) or text


class Guard:
    """``trusted``: names (``rater:…``, ``answer:…``, ``call:…``) that a person vouches for; shares bind them too.
    ``distrusted``: raters (``rater:…``) who are not to be heard."""

    def __init__(self, window: int, trusted: Iterable[str] = (), distrusted: Iterable[str] = ()) -> None:
        self.window = window
        self.trusted = frozenset(trusted)
        self.distrusted = frozenset(distrusted)
        self.taught = Lessons()
        self.slots: list[Seen] = []
        self.count = 0
        self.minutes: dict[int, Counter[str]] = {}
        self.counted: Counter[str] = Counter()
        self.pushes: Counter[str] = Counter()  # by rater, since the window's worth of lessons began
        self.pushed: Counter[str] = Counter()  # in the window's worth before
        self.held: dict[str, bytes] = {}  # oldest words first
        self._said: dict[str, float] = {}  # when each of them was said
        self._weights: defaultdict[str, float] = defaultdict(float)
        self._numbers: Counter[str] = Counter()
        self._named = 0.0
        self._slot_of: dict[str, int] = {}
        self._changed_slots: set[int] = set()
        self._changed_held: set[str] = set()

    def weigh(
        self,
        lesson: Label | Pair,
        raters: Iterable[str],
        call: str,
        time: float,
        believed: Callable[[], bool] = lambda: False,
    ) -> Verdict:
        """What becomes of a lesson said at ``time`` (event time, seconds); what is learned is noted as learned.

        ``believed``: whether the model thinks so itself already.
        """
        seen = _seen(lesson, [name_of("rater", rater) for rater in sorted(set(raters))])
        minute = self._minute(time, [*seen.raters, name_of("call", call), seen.answer])
        verdict = self._doubt(seen) or self._burst(seen, name_of("call", call), minute) or self._twin(seen)
        verdict = verdict or self._push(seen, believed) or self._cut(seen)
        if verdict.rule:
            self.counted[verdict.rule] += 1
            return verdict
        return self._learned(seen, verdict)

    def admit(self, lesson: Label | Pair, raters: Iterable[str]) -> Verdict:
        """What becomes of a held lesson that a person trusts: shares bind it still."""
        seen = _seen(lesson, [name_of("rater", rater) for rater in sorted(set(raters))])
        verdict = self._cut(seen)
        return verdict if verdict.rule else self._learned(seen, verdict)

    def _learned(self, seen: Seen, verdict: Verdict) -> Verdict:
        if verdict.weight < seen.weight:
            self.counted["cut"] += 1
        self._note(seen._replace(weight=_exact(verdict.weight)))
        return verdict

    def _minute(self, time: float, names: Iterable[str]) -> Counter[str]:
        """Count a lesson in its minute; returns the minute, ``""`` being how many lessons it has."""
        now = int(min(time, FAR) // MINUTE)
        newest = max([now, *self.minutes])
        at = max(now, newest - LATE + 1)
        for old in [each for each in self.minutes if each <= newest - LATE]:
            del self.minutes[old]
        minute = self.minutes.setdefault(at, Counter())
        minute[""] += 1
        for name in names:
            if name in minute or len(minute) < WATCHED:
                minute[name] += 1
        return minute

    def _doubt(self, seen: Seen) -> Verdict | None:
        doubted = sorted(self.distrusted.intersection(seen.raters))
        return _held(RULES[6], doubted[0], ORDERED, True) if doubted else None

    def _burst(self, seen: Seen, call: str, minute: Counter[str]) -> Verdict | None:
        rushed = [rater for rater in seen.raters if self._rushes(rater, minute)]
        if rushed and len(rushed) == len(seen.raters):
            return _held(RULES[0], rushed[0], f"{minute[rushed[0]]} words of one rater in a minute")
        if self._rushes(call, minute):
            return _held(RULES[1], call, f"{minute[call]} words about one call in a minute")
        if self._rushes(seen.answer, minute):
            return _held(RULES[2], seen.answer, f"{minute[seen.answer]} words for one answer in a minute")
        return None

    def _rushes(self, name: str, minute: Counter[str]) -> bool:
        now, all_now = minute[name], minute[""]
        if now <= BURST or name in self.trusted:
            return False
        before = max(self._numbers[name] - now + 1, 0) + 1
        all_before = max(len(self.slots) - all_now + 1, 0) + 1
        return now > TIMES * all_now * before / all_before

    def _twin(self, seen: Seen) -> Verdict | None:
        if not seen.raters or self._numbers[seen.twin] < TWINS or self.trusted.issuperset(seen.raters):
            return None
        return _held(RULES[3], seen.raters[0], f"one rater said the same of the same words {TWINS} times before")

    def _push(self, seen: Seen, believed: Callable[[], bool]) -> Verdict | None:
        for rater in seen.raters:
            if rater in self.trusted:
                continue
            its, mine = self._numbers[_both(rater, seen.answer)], self._numbers[rater]
            if self._pushes_on(rater):
                says = f"{self._pushes(rater)} words of one rater were for one answer, {mine} are learned"
                return _held(RULES[4], rater, says, True)
            others = (self._numbers[seen.answer] - its + 1) / (len(self._slot_of) - mine + 1)
            if its >= PUSHES and its + 1 > OFTEN * (mine + 1) * others and not believed():
                if rater in self.pushes or len(self.pushes) < WATCHED:
                    self.pushes[rater] += 1
                return _held(RULES[4], rater, f"{its} of {mine} words of one rater are for one answer already")
        return None

    def _pushes_on(self, rater: str) -> bool:
        pushes = self._pushes(rater)
        return pushes >= SUSPECT and 2 * pushes >= self._numbers[rater]

    def _pushes(self, rater: str) -> int:
        return self.pushes[rater] + self.pushed[rater]

    def guilty(self, rater: str) -> bool:
        """Whether a rater, by name, is heard no more."""
        return rater not in self.trusted and (rater in self.distrusted or self._pushes_on(rater))

    def to_take_back(self) -> list[tuple[Taught, Verdict]]:
        """What raters who are heard no more have taught and nobody said with them, with what is to be said of it."""
        raters = [*self.distrusted, *filter(self._pushes_on, {*self.pushes, *self.pushed})]
        found = {}
        for name in filter(self.guilty, sorted(raters)):
            rule = RULES[6] if name in self.distrusted else RULES[4]
            says = ORDERED if name in self.distrusted else "its rater pushed one answer"
            for lesson, names in self.taught.of(name).items():
                if all(map(self.guilty, names)):
                    found[lesson] = self.taught.get(lesson), _held(rule, name, f"taken back: {says}", True)
        return list(found.values())

    def take_back(self, taught: Taught, verdict: Verdict) -> None:
        """Note that a lesson is learned no more, and is held."""
        self.forget(taught.lesson.id)
        self.counted["taken back"] += 1
        self.hold(taught.lesson, verdict, taught.place, taught.raters)

    def _cut(self, seen: Seen) -> Verdict:
        """x with held + x ≤ share · (all + x), for the rater who has least left; each has an equal part of x."""
        if not seen.raters:
            return Verdict(seen.weight)
        share = share_of_each(len(self._weights) + sum(rater not in self._weights for rater in seen.raters))
        if share >= 1:
            return Verdict(seen.weight)
        left = min((share * self._named - self._weights.get(rater, 0.0)) / (1 - share) for rater in seen.raters)
        weight = min(seen.weight, len(seen.raters) * left)
        if weight >= LEAST * seen.weight:
            return Verdict(weight)
        return _held(RULES[5], seen.raters[0], f"its rater holds {share:.1%} of the window's weight already")

    def _note(self, seen: Seen) -> None:
        slot = self.count % self.window
        if slot < len(self.slots):
            self._clear(slot)
            self.slots[slot] = seen
        else:
            self.slots.append(seen)
        self._add(seen, 1)
        self._slot_of[seen.lesson] = slot
        self.count += 1
        if self.count % self.window == 0:  # those of the window before count still, older ones no more
            self.pushes, self.pushed = Counter(), self.pushes
        self._changed_slots.add(slot)

    def forget(self, lesson: str) -> None:
        """Its words were taken back: it is held no more, or gives its raters their share again."""
        self.drop(lesson)
        self.taught.drop(lesson)
        if lesson in self._slot_of:
            self._changed_slots.add(self._slot_of[lesson])
            self._clear(self._slot_of[lesson])

    def _clear(self, slot: int) -> None:
        self._add(self.slots[slot], -1)
        self._slot_of.pop(self.slots[slot].lesson, None)
        self.slots[slot] = EMPTY

    def _add(self, seen: Seen, sign: int) -> None:
        for rater in seen.raters:
            self._weights[rater] += sign * _exact(seen.weight / len(seen.raters))
        self._named += sign * seen.weight * bool(seen.raters)
        both = [_both(rater, seen.answer) for rater in seen.raters]
        for name in (*seen.raters, *both, seen.answer, seen.twin) if seen.lesson else ():
            self._numbers[name] += sign
            if self._numbers[name] == 0:
                del self._numbers[name]
                self._weights.pop(name, None)

    def shares(self) -> dict[str, float]:
        """Each known rater's share of the window's weight."""
        return {name: weight / self._named for name, weight in self._weights.items()} if self._named else {}

    def hold(self, lesson: Label | Pair, verdict: Verdict, place: Place, raters: Sequence[str]) -> None:
        """Keep a lesson for a person to look at; the oldest goes where there are too many."""
        about = {"rule": verdict.rule, "name": verdict.name, "says": verdict.says, **place._asdict()}
        kept = {**about, "raters": list(raters), "lesson": packed(lesson)}
        newest = next(reversed(self.held), lesson.id)
        self.held[lesson.id], self._said[lesson.id] = ormsgpack.packb(kept), place.time
        self._changed_held.add(lesson.id)
        if self._when(lesson.id) < self._when(newest):  # what is taken back was said long ago
            self.held = dict(sorted(self.held.items(), key=lambda item: self._when(item[0])))
        if len(self.held) > MOST_HELD:
            self.drop(next(iter(self.held)))

    def drop(self, lesson: str) -> None:
        """Hold it no more."""
        if self.held.pop(lesson, None) is not None:
            del self._said[lesson]
            self._changed_held.add(lesson)

    def _when(self, lesson: str) -> tuple[float, str]:
        """What held lessons are in the order of."""
        return self._said[lesson], lesson

    def vouched(self) -> list[tuple[dict[str, Any], Label | Pair]]:
        """Held lessons that a person trusts by now, and what was noted with each; shares bind them still."""
        found = [ormsgpack.unpackb(one) for one in self.held.values()] if self.trusted else []
        return [
            (one, unpacked(one["lesson"])) for one in found if one["name"] in self.trusted and one["rule"] != "share"
        ]

    def changes(self) -> Iterator[tuple[str, bytes | None]]:
        """Pieces of the state that changed since the last call; None: delete it."""
        for slot in sorted(self._changed_slots):
            yield f"slot/{slot:07d}", ormsgpack.packb(tuple(self.slots[slot]))
        for name in sorted(self._changed_held):
            yield f"held/{name}", self.held.get(name)
        for name, taught in self.taught.changes():
            yield TAUGHT + name, taught
        self._changed_slots.clear()
        self._changed_held.clear()
        minutes = [[at, dict(minute)] for at, minute in self.minutes.items()]
        yield "core", ormsgpack.packb([self.count, dict(self.counted), minutes, dict(self.pushes), dict(self.pushed)])

    def restore(self, pieces: Mapping[str, bytes]) -> None:
        """What was ``changes`` before, in a new guard."""
        known = {name: value for name, value in pieces.items() if name.startswith(TAUGHT)}
        self.taught.restore({name.removeprefix(TAUGHT): value for name, value in known.items()})
        for name, value in sorted(pieces.items()):
            kind, _, rest = name.partition("/")
            if kind == "slot":
                self.slots.append(Seen(*ormsgpack.unpackb(value)))
                self._add(self.slots[-1], 1)
                if self.slots[-1].lesson:
                    self._slot_of[self.slots[-1].lesson] = len(self.slots) - 1
            elif kind == "held":
                self.held[rest], self._said[rest] = value, ormsgpack.unpackb(value)["time"]
        self.held = dict(sorted(self.held.items(), key=lambda item: self._when(item[0])))
        if "core" in pieces:
            self.count, counted, minutes, pushes, pushed = ormsgpack.unpackb(pieces["core"])
            self.counted, self.pushes, self.pushed = Counter(counted), Counter(pushes), Counter(pushed)
            self.minutes = {at: Counter(minute) for at, minute in minutes}

    def status(self, most: int = 20) -> dict[str, Any]:
        """JSON values: counts by rule, how many are held and the newest of them, and the largest share."""
        newest = [ormsgpack.unpackb(one) for one in list(self.held.values())[-most:]]
        shown = [{key: one[key] for key in one if key not in ("lesson", "raters")} for one in reversed(newest)]
        return {
            "quarantined": {rule: self.counted[rule] for rule in RULES if self.counted[rule]},
            "cut_to_share": self.counted["cut"],
            "taken_back": self.counted["taken back"],
            "held": len(self.held),
            "newest_held": shown,
            "largest_share": max(self.shares().values(), default=0.0),
        }


def _exact(weight: float) -> float:
    """A multiple of 2^-20, of which sums are the same in every order: also after a restart."""
    return round(weight * 2**20) / 2**20


def _both(rater: str, answer: str) -> str:
    return f"{rater} {answer}"


def _held(rule: str, name: str, says: str, silenced: bool = False) -> Verdict:
    return Verdict(0.0, rule, name, says, silenced)


def _seen(lesson: Label | Pair, raters: list[str]) -> Seen:
    if isinstance(lesson, Pair):
        prompt, answer, way = lesson.prompt, lesson.chosen, "up"
    else:
        prompt, answer, way = lesson.example.prompt, lesson.example.answer, "up" if lesson.value > 0.5 else "down"
    pushed = name_of("answer", normal(answer), way)
    return Seen(lesson.id, raters, pushed, name_of("twin", *raters, normal(prompt), normal(answer), way), lesson.weight)


def weighted(lesson: Label | Pair, weight: float) -> Label | Pair:
    """The lesson with the weight that the guard left it."""
    return lesson if weight == lesson.weight else replace(lesson, weight=weight)
