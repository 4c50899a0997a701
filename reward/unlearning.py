"""What raters who are heard no more have taught is taken back: from the model, its episodes, and the scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from everloop.score import Score

from reward import hearing
from reward.desk import Desk
from reward.evidence import is_credited
from reward.features import Example
from reward.model import Pair
from reward.taught import Place

if TYPE_CHECKING:
    from reward.handler import Known


def take_back(desk: Desk, known_of: Callable[[str], Known]) -> list[Score]:
    """Undo what is to be taken back, and hold it; returns the scores that change with it.

    ``known_of``: what is remembered of an episode by its id, which is changed here. What is held is in no score, so
    that a call's is the opinion of the version that scores: nothing of the episode is needed for that.
    """
    scores = []
    for taught, verdict in desk.guard.to_take_back():
        lesson, place = taught.lesson, taught.place
        known = known_of(place.episode)
        call = known.call(place.call)
        desk.take_back(taught)
        desk.guard.take_back(taught, verdict)
        known.learned = [name for name in known.learned if name != lesson.id]
        call.get("taught", {}).pop(lesson.id, None)
        call.setdefault("held", {})[lesson.id] = verdict.says
        if isinstance(lesson, Pair) or is_credited(lesson):
            continue  # the call's score was not made of it
        hearing.unheard(desk.live, place.call, call)
        if "scored" in call:
            call["scored"] = b""  # the next version of the episode is scored whatever is said in it
            scores += [] if taught.measured else [_score(desk, lesson.example, taught.place, known, verdict.says)]
    return scores


def _score(desk: Desk, example: Example, place: Place, known: Known, why: str) -> Score:
    """The call's score by the model's opinion alone."""
    (estimate,) = desk.estimate([example])
    return Score(
        tenant=desk.tenant,
        policy=desk.policy,
        episode=place.episode,
        version=known.version,
        call=place.call,
        reward_version=desk.version,
        value=estimate.value,
        spread=estimate.spread,
        reward=estimate.reward,
        mask=estimate.mask,
        source="model",
        label=None,
        predicted=known.call(place.call).get("predicted"),
        quarantined=why,
        time=place.time,
    )
