"""What raters who are heard no more have taught is taken back: from the model, its episodes, and the scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from everloop.score import Score

from reward import course, evidence, hearing
from reward.desk import Desk
from reward.evidence import Said, is_credited
from reward.features import Example
from reward.known import Known
from reward.model import Label, Pair
from reward.poison import Verdict
from reward.taught import Place, Taught


def take_back(desk: Desk, doomed: Sequence[tuple[Taught, Verdict]], known_of: Callable[[str], Known]) -> list[Score]:
    """Undo what is to be taken back, and hold it; returns the scores that change with it.

    ``known_of``: what is remembered of an episode by its id, which is changed here. What is held is in no score, so
    that a call's is its outcome, or the opinion of the version that scores: nothing more of the episode is needed.
    """
    scores = []
    for taught, verdict in doomed:
        lesson, place = taught.lesson, taught.place
        known = known_of(place.episode)
        call = known.call(place.call)
        desk.take_back(taught)
        desk.guard.take_back(taught, verdict)
        known.learned = [name for name in known.learned if name != lesson.id]
        call.get("taught", {}).pop(lesson.id, None)
        call.setdefault("held", {})[lesson.id] = [verdict.silenced, verdict.says]
        if is_credited(lesson) or (isinstance(lesson, Pair) and not lesson.absolute):
            continue  # the call's score was not made of it
        if isinstance(lesson, Label):
            course.forget(desk.live, known.end, place.call)
            hearing.unheard(desk.live, place.call, call)
        if "scored" in call:
            call["scored"] = b""  # the next version of the episode is scored whatever is said in it
            scores.append(_score(desk, _answer(lesson), place, known, verdict.says))
    return scores


def _answer(lesson: Label | Pair) -> Example:
    """The answer that a lesson is about: of a correction, the one that was corrected."""
    if isinstance(lesson, Pair):
        return Example(lesson.prompt, lesson.rejected, lesson.structure)
    return lesson.example


def _score(desk: Desk, example: Example, place: Place, known: Known, why: str) -> Score:
    """The call's score by what was measured of it, which nobody's held words change, or else by the model's opinion."""
    call = known.call(place.call)
    outcome = call.get("outcome")
    (estimate,) = desk.estimate([example])
    final, source = evidence.decide(estimate, Said(outcome, False, 0.0, outcome), desk.scoring.config.pessimism)
    ends_well = call.get("course", (None, None))
    return Score(
        tenant=desk.tenant,
        policy=desk.policy,
        episode=place.episode,
        version=known.version,
        call=place.call,
        reward_version=desk.version,
        value=final.value,
        spread=final.spread,
        reward=final.reward,
        mask=final.mask,
        source=source,
        label=outcome,
        predicted=call.get("predicted"),
        quarantined=why,
        ends_well_before=ends_well[0],
        ends_well_after=ends_well[1],
        time=place.time,
    )
