"""Every topic of the log: what it carries, who writes and reads it, how it is kept."""

from __future__ import annotations

from typing import NamedTuple

from everloop.contract import Contract
from everloop.episode import Episode
from everloop.event import Event
from everloop.release import Adapter, Release, Route
from everloop.run import Command, DeadLetter, RewardVersion, Run
from everloop.score import Score
from everloop.trajectory import Trajectory


class Topic(NamedTuple):
    """``compacted``: the newest record of a key is kept for ever, older ones may go."""

    name: str
    contract: type[Contract]
    keyed_by: str
    compacted: bool = False
    partitioned: bool = True


EVENTS = Topic("events", Event, "tenant/episode")  # gateway → assembler
EPISODES = Topic("episodes", Episode, "tenant/episode")  # assembler → reward, archive, releaser
TRAJECTORIES = Topic("trajectories", Trajectory, "tenant/episode")  # assembler → archive
SCORES = Topic("scores", Score, "tenant/episode")  # reward → archive
REWARDS = Topic("reward-versions", RewardVersion, "tenant/policy", partitioned=False)  # reward → learner, archive
RUNS = Topic("runs", Run, "tenant/policy", partitioned=False)  # learner → status, archive
ADAPTERS = Topic("adapters", Adapter, "tenant/policy", partitioned=False)  # learner → releaser, archive
RELEASES = Topic("releases", Release, "tenant/policy/release", compacted=True, partitioned=False)  # → status, archive
ROUTES = Topic("routes", Route, "tenant/policy", compacted=True, partitioned=False)  # releaser → gateways
COMMANDS = Topic("commands", Command, "tenant/policy", partitioned=False)  # people → learner, releaser, reward
PAUSES = Topic("pauses", Command, "tenant/policy", compacted=True, partitioned=False)  # people → learner, releaser
DEAD_LETTERS = Topic("dead-letters", DeadLetter, "handler", partitioned=False)  # every handler → people

TOPICS = {
    topic.name: topic
    for topic in (
        EVENTS,
        EPISODES,
        TRAJECTORIES,
        SCORES,
        REWARDS,
        RUNS,
        ADAPTERS,
        RELEASES,
        ROUTES,
        COMMANDS,
        PAUSES,
        DEAD_LETTERS,
    )
}

CHANGELOG = "everloop-state-"
"""What the name of a handler's changelog begins with: the compacted topic that its state is restored from."""
