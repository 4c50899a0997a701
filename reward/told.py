"""What a handler has said about the answers of an episode, and the events that say what changed since.

An event's id is a hash of what it says, about which answer, by which source and when, so that a batch that is
handled again, or a log that is read again from its beginning, says nothing new.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from everloop import wire
from everloop.episode import Episode, Split
from everloop.event import Event, FeedbackGiven
from everloop.feedback import Feedback, FeedbackKind
from everloop.log.base import NewRecord
from everloop.topics import EVENTS

STEP = 0.001  # seconds by which a word that replaces another is later
Told = dict[str, list[float | None]]
"""By :attr:`About.key`, the value that was said last (None: taken back) and when."""


class About(NamedTuple):
    """``source`` is such as ``check:sum``; its name is also the word's."""

    call: str
    source: str
    kind: FeedbackKind = FeedbackKind.IMPLICIT

    @property
    def key(self) -> str:
        return f"{self.call}\t{self.source}\t{self.kind}"

    @classmethod
    def of(cls, key: str) -> About:
        call, source, kind = key.split("\t")
        return cls(call, source, FeedbackKind(kind))


class Whose(NamedTuple):
    """The episode that words are about."""

    tenant: str
    policy: str
    id: str

    @classmethod
    def of(cls, episode: Episode) -> Whose:
        return cls(episode.tenant, episode.policy, episode.id)


def may_be_judged(episode: Episode, also: tuple[str, ...]) -> bool:
    """Held-out, synthetic and quarantined episodes are left alone unless ``also`` names what they are."""
    its = {
        "held-out": episode.split is not Split.TRAIN,
        "synthetic": episode.synthetic,
        "quarantined": episode.quarantine is not None,
    }
    return all(not is_so or name in also for name, is_so in its.items())


def changes(
    whose: Whose, time: float, told: Told, found: Mapping[About, float], words: Counter[str]
) -> list[NewRecord]:
    """Events that make what was said into what was found, at this event time or a moment later; notes them in
    ``told``, and counts them by source in ``words``. What is found no more is taken back."""
    said = {about.key: round(value, 6) for about, value in found.items()}
    gone = [key for key, (value, _) in told.items() if value is not None and key not in said]
    records = [_say(whose, time, told, key, None) for key in gone]
    for key, value in said.items():
        if key not in told or told[key][0] != value:
            records.append(_say(whose, time, told, key, value))
            words[About.of(key).source] += 1
    return records


def _say(whose: Whose, time: float, told: Told, key: str, value: float | None) -> NewRecord:
    before = told[key][1] if key in told else None
    at = time if before is None else max(time, before + STEP)
    told[key] = [value, at]
    about = About.of(key)
    text = "\n".join([*whose, key, repr(value), repr(at)])
    id = f"sg_{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    word = Feedback(
        id=id,
        kind=about.kind,
        time=at,
        call=about.call,
        value=value,
        name=about.source.partition(":")[2],
        source=about.source,
        withdrawn=value is None,
    )
    event = Event(
        id=id,
        tenant=whose.tenant,
        policy=whose.policy,
        episode=whose.id,
        time=at,
        payload=FeedbackGiven(feedback=word),
    )
    return NewRecord(EVENTS.name, event.key, wire.encode(event), {"schema": "Event", "id": id}, at)
