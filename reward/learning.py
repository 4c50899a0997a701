"""What an episode's version teaches: each word once, as far as the guard lets it, until it is taken back.

::

    words that stand ──▶ taken back what stands no more ──▶ believed? held? ──▶ learned, remembered with its raters
    raters who are heard no more ──▶ what they taught is taken back     held words that a person trusts ──▶ learned
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from everloop.episode import Episode
from everloop.feedback import FeedbackKind
from everloop.log.base import NewRecord
from everloop.stream import State

from reward import evidence, hearing, poison, unlearning
from reward.desk import Desk
from reward.known import Known, Read, keep, recall, teaches
from reward.model import Label, Pair, Trace
from reward.orders import announcement
from reward.scoring import score_record
from reward.taught import Place, Taught


def learn(desk: Desk, read: Read, known: Known) -> list[NewRecord]:
    """Learn each word that was not learned before; note what was expected of a call before its first label."""
    outputs = []
    trust = desk.live.reliability
    hearing.before(desk.live, read.episode, known.calls, teaches(read.episode))
    read = replace(read, lessons=evidence.lessons(read.episode, read.examples, trust) if read.lessons else [])
    _take_back(desk, read, known)
    for number, lesson in read.lessons:
        call = known.call(read.episode.turns[number].call.id)
        if lesson.id in known.learned or any(lesson.id in one.get("held", {}) for one in known.calls.values()):
            continue
        first = isinstance(lesson, Label) and lesson.watched and "predicted" not in call
        if isinstance(lesson, Label):
            about = read.episode.judged if evidence.is_credited(lesson) else number
            rarity = hearing.rarity(desk.live, read.episode, read.examples, about, known.calls)
            lesson = replace(lesson, watched=first, rarity=rarity)
        raters = _raters(read.episode, number, lesson)
        words = evidence.words_of(read.episode, number, lesson)
        said = max((word.time for word in words), default=read.episode.updated)
        place = Place(read.episode.id, read.episode.turns[number].call.id, said)
        verdict = _weighed(desk, lesson, place, raters)
        if verdict.rule:
            call.setdefault("held", {})[lesson.id] = [verdict.silenced, verdict.says]
            continue
        if isinstance(lesson, Label):
            hearing.spoke(desk.live, read.episode, read.examples, about, known.calls)
        able = desk.live.may_judge
        expected, due = _teach(desk, poison.weighted(lesson, verdict.weight), known, place, raters)
        if first and isinstance(lesson, Label):
            call["predicted"] = expected
            if able:
                call["vote"] = expected
            desk.watch.label(lesson.value, lesson.rarity)
        if due:
            outputs.append(version_record(desk, read.episode.updated))
    hearing.after(desk.live, read.episode, known.calls, teaches(read.episode))
    return outputs


def _raters(episode: Episode, number: int, lesson: Label | Pair) -> list[str]:
    """The people who said what a lesson was made of, as far as they are known. An outcome is measured, and decides
    whatever people say beside it: it is theirs alone who are named with it."""
    words = [word for word in evidence.words_of(episode, number, lesson) if word.source is None]
    measured = [word for word in words if word.kind is FeedbackKind.OUTCOME]
    if measured and isinstance(lesson, Label):
        return [word.rater for word in measured if word.rater]
    return [rater for word in words if (rater := word.rater or episode.subject)]


def _weighed(desk: Desk, lesson: Label | Pair, place: Place, raters: Sequence[str]) -> poison.Verdict:
    """What the guard makes of a lesson, whose share is all that it weighs; what it holds is kept for a person."""
    verdict = desk.guard.weigh(_in_all(lesson), raters, place.call, place.time, lambda: desk.agrees(lesson))
    if verdict.rule:
        desk.guard.hold(lesson, verdict, place, raters)
    return _each(lesson, verdict)


def _in_all(lesson: Label | Pair) -> Label | Pair:
    """With the weight that the heads learn it with."""
    return poison.weighted(lesson, lesson.weight * lesson.rarity) if isinstance(lesson, Label) else lesson


def _each(lesson: Label | Pair, verdict: poison.Verdict) -> poison.Verdict:
    """What :func:`_in_all` put on the weight, taken off again."""
    return verdict._replace(weight=verdict.weight / lesson.rarity) if isinstance(lesson, Label) else verdict


def _teach(desk: Desk, lesson: Label | Pair, known: Known, place: Place, raters: Sequence[str]) -> tuple[float, bool]:
    """See :meth:`Desk.learn`; the episode remembers it, and the guard what its raters taught."""
    before = desk.live.updates
    expected, due = desk.learn(lesson, raters)
    known.learned.append(lesson.id)
    trace = desk.live.trace
    if trace is not None:
        known.call(place.call).setdefault("taught", {})[lesson.id] = [*trace]
    if (raters or isinstance(lesson, Pair)) and desk.live.updates > before:
        trace = trace or Trace(1.0, 0.0, 0.0, desk.live.reservoir.count - 1)
        desk.guard.taught.note(Taught(lesson, trace, place, list(raters)))
    return expected, due


def take_back_of_silenced(state: State, desk: Desk, open_: dict[str, Known] | None = None) -> list[NewRecord]:
    """See :mod:`reward.unlearning`. ``open_``: the episodes that are being taken, which their caller keeps."""
    found: dict[str, Known] = {}

    def known_of(episode: str) -> Known:
        if open_ and episode in open_:
            return open_[episode]
        if episode not in found:
            found[episode] = recall(state, desk, episode)
        return found[episode]

    doomed = desk.guard.to_take_back()
    if not doomed:
        return []
    time = max(taught.place.time for taught, _ in doomed)
    frozen = [] if desk.version else [version_record(desk, time)]  # what scores has a name
    scores = unlearning.take_back(desk, doomed, known_of)
    for episode, known in found.items():
        keep(state, desk, episode, known)
    return [*frozen, *map(score_record, scores)]


def let_in(state: State, desk: Desk) -> list[NewRecord]:
    """Learn what was held and a person trusts by now, as far as shares let. Its score stays: the episode is not at
    hand."""
    outputs = []
    for about, lesson in desk.guard.vouched():
        place = Place(about["episode"], about["call"], about["time"])
        verdict = _each(lesson, desk.guard.admit(_in_all(lesson), about["raters"]))
        if verdict.rule:
            desk.guard.hold(lesson, verdict, place, about["raters"])
            continue
        known = recall(state, desk, about["episode"])
        call = known.call(about["call"])
        call.get("held", {}).pop(lesson.id, None)
        desk.guard.drop(lesson.id)
        first = isinstance(lesson, Label) and lesson.watched and "predicted" not in call
        lesson = poison.weighted(lesson, verdict.weight)
        expected, due = _teach(desk, lesson, known, place, about["raters"])
        if first and isinstance(lesson, Label):
            call["predicted"] = expected
            desk.watch.label(lesson.value, lesson.rarity)
        keep(state, desk, about["episode"], known)
        outputs += [version_record(desk, about["time"])] if due else []
    return outputs


def _take_back(desk: Desk, read: Read, known: Known) -> None:
    """Undo what was revised or withdrawn, so that a word said again later is learned again. A pair of long ago, which
    the guard remembers no more, stays learned."""
    standing = {lesson.id for _, lesson in read.lessons}
    for name in [name for name in known.learned if name not in standing and name in desk.guard.taught.kept]:
        if isinstance((taught := desk.guard.taught.get(name)).lesson, Pair):
            desk.take_back(taught)
            desk.guard.forget(name)
            known.learned.remove(name)
    for turn, example in zip(read.episode.turns, read.examples, strict=True):
        taught = known.call(turn.call.id).get("taught", {})
        for name in [name for name in taught if name not in standing]:
            desk.live.take_back(name, example, Trace(*taught.pop(name)))
            desk.guard.forget(name)
            known.learned.remove(name)
        held = known.call(turn.call.id).get("held", {})
        for name in [name for name in held if name not in standing]:
            desk.guard.forget(name)
            del held[name]


def version_record(desk: Desk, time: float) -> NewRecord:
    """Freeze the live model as a version, and announce it."""
    return announcement(desk.freeze(time))
