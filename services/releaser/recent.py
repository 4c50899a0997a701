"""A policy's traffic of late: how many people rate, and what they asked. Read from the log's newest end."""

from __future__ import annotations

from dataclasses import dataclass

from everloop.episode import Episode
from everloop.event import Call
from everloop.topics import EPISODES

from pipelines.sequential import Arm, arm
from services.releaser.journal import Journal, Tail
from services.releaser.traffic import success

NEWEST = 5000  # records of all partitions together: read in a second or two


@dataclass(frozen=True)
class Recent:
    """``seconds``: the time that it covers. Rates are units a second, of those that had not been seen before.

    ``rated``: one mean for each rated unit. ``episodes``: rated episodes of one. ``calls``: the last of each episode,
    newest first.
    """

    seconds: float
    rated: Arm
    episodes: float
    rated_rate: float
    seen_rate: float
    calls: tuple[Call, ...]


def recent(journal: Journal, tenant: str, policy: str, now: float) -> Recent:
    """Blocks for as long as the reading takes. Raises LogError."""
    newest: dict[str, Episode] = {}
    for record in Tail(journal.log, EPISODES, _near_the_end(journal)).all():
        episode = journal.decode(Episode, record)
        if episode is None or (episode.tenant, episode.policy) != (tenant, policy) or not _of_users(episode):
            continue
        held = newest.get(episode.id)
        if held is None or episode.version > held.version:
            newest[episode.id] = episode
    return summed(list(newest.values()), now)


def _of_users(episode: Episode) -> bool:
    """Not those that were made for training, nor those in which somebody named the version that was to answer."""
    return not episode.synthetic and not any(turn.call.pinned for turn in episode.turns)


def _near_the_end(journal: Journal) -> dict[int, int]:
    ends = journal.log.end_offsets(EPISODES.name)
    return {partition: max(0, end - NEWEST // len(ends)) for partition, end in enumerate(ends)}


def summed(episodes: list[Episode], now: float) -> Recent:
    """Of some episodes, one version each."""
    seen: dict[str, float] = {}
    rated: dict[str, list[float]] = {}
    for episode in sorted(episodes, key=lambda one: one.started):
        unit = episode.subject or episode.id
        seen.setdefault(unit, episode.started)
        value = success([*episode.feedback, *(item for turn in episode.turns for item in turn.feedback)])
        if value is not None:
            rated.setdefault(unit, []).append(value)
    began = min(seen.values(), default=now)
    seconds = max(now - began, 1.0)
    late = began + seconds / 2
    return Recent(
        seconds=seconds,
        rated=arm([sum(values) / len(values) for values in rated.values()]),
        episodes=sum(map(len, rated.values())) / max(len(rated), 1),
        rated_rate=sum(seen[unit] >= late for unit in rated) / (seconds / 2),
        seen_rate=sum(at >= late for at in seen.values()) / (seconds / 2),
        calls=tuple(one.turns[-1].call for one in sorted(episodes, key=lambda e: -e.updated) if one.turns),
    )
