"""The scores of an episode's calls: by the version that scores, with what people said of each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from everloop import wire
from everloop.episode import Episode
from everloop.log.base import NewRecord
from everloop.score import Score
from everloop.topics import SCORES

from reward import course, evidence, hearing
from reward.desk import Desk
from reward.evidence import Said
from reward.known import Known, Read, teaches
from reward.model import Estimate


def score(desk: Desk, read: Read, known: Known) -> list[NewRecord]:
    """Scores of the calls that are new, or of which something else is said than when they were scored last."""
    episode = read.episode
    calls = [known.call(turn.call.id) for turn in episode.turns]
    words = evidence.words(episode)
    held = [hearing.kept_out(turn.call.id, its, known.calls) for turn, its in zip(episode.turns, words, strict=True)]
    digests = [
        hashlib.blake2b(repr((*both, episode.quarantine)).encode("utf-8", "replace"), digest_size=8).digest()
        for both in zip(words, held, read.examples, strict=True)
    ]
    fresh = [i for i, call in enumerate(calls) if call.get("scored") != digests[i]]
    estimates = desk.estimate([read.examples[i] for i in fresh])
    new = [i for i in fresh if "scored" not in calls[i]]
    for i, both in zip(new, course.foretold(desk.scoring, episode, read.examples, new), strict=True):
        calls[i].update({} if both is None else {"course": both})
    heard = evidence.said(episode, desk.scoring.reliability)
    said = [one.measured if why else one for one, why in zip(heard, held, strict=True)]
    outputs = []
    for i, estimate in zip(fresh, estimates, strict=True):
        made = score_of(
            episode,
            i,
            estimate,
            said[i],
            quarantined=held[i],
            version=desk.version,
            pessimism=desk.scoring.config.pessimism,
            predicted=calls[i].get("predicted"),
            ends_well=calls[i].get("course"),
        )
        if "scored" not in calls[i] and teaches(episode):
            desk.live.saw(read.examples[i])
            if made.mask:
                desk.watch.rewards.add(made.reward)
        calls[i]["scored"] = digests[i]
        calls[i].pop("outcome", None)
        calls[i].update({} if said[i].outcome is None else {"outcome": said[i].outcome})
        outputs.append(score_record(made))
    return outputs


def score_of(
    episode: Episode,
    turn: int,
    estimate: Estimate,
    said: Said,
    *,
    version: str,
    pessimism: float,
    predicted: float | None,
    quarantined: str | None = None,
    ends_well: Sequence[float] | None = None,
) -> Score:
    """The score of one turn: the strongest source decides; a failed call or a quarantined episode is masked."""
    final, source = evidence.decide(estimate, said, pessimism)
    call = episode.turns[turn].call
    return Score(
        tenant=episode.tenant,
        policy=episode.policy,
        episode=episode.id,
        version=episode.version,
        call=call.id,
        reward_version=version,
        value=final.value,
        spread=final.spread,
        reward=final.reward,
        mask=final.mask and call.error is None and episode.quarantine is None,
        source=source,
        label=said.label,
        predicted=predicted,
        quarantined=quarantined,
        ends_well_before=ends_well[0] if ends_well else None,
        ends_well_after=ends_well[1] if ends_well else None,
        time=episode.updated,
    )


def score_record(score: Score) -> NewRecord:
    about = f"{score.policy}/{score.episode}/{score.version}/{score.call}/{score.reward_version}"
    return NewRecord(SCORES.name, score.key, wire.encode(score), {"schema": "Score", "id": about}, score.time)
