"""Every topic of the log: what it carries, who writes and reads it, how it is kept."""

from __future__ import annotations

from typing import NamedTuple

from everloop.contract import Contract
from everloop.episode import Episode
from everloop.event import Event
from everloop.names import Checkpoints, Pin
from everloop.release import Adapter, Release, Route
from everloop.run import Command, DeadLetter, RewardVersion, Run
from everloop.score import Score
from everloop.trajectory import Trajectory


class Topic(NamedTuple):
    """``compacted``: the newest record of a key is kept for ever, older ones may go.

    ``writers`` and ``readers``: the services that may, on a cluster that asks; :data:`OPERATOR` may everywhere.
    """

    name: str
    contract: type[Contract]
    keyed_by: str
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    compacted: bool = False
    partitioned: bool = True


OPERATOR = "operator"
"""Who gives orders, replays and asks: people at the command line."""
ALL_HANDLERS = ("assembler", "scorer", "learner")

EVENTS = Topic("events", Event, "tenant/episode", ("gateway", "scorer"), ("assembler", "releaser", "gateway"))
EPISODES = Topic("episodes", Episode, "tenant/episode", ("assembler",), ("scorer", "assembler", "releaser"))
TRAJECTORIES = Topic("trajectories", Trajectory, "tenant/episode", ("assembler",), ("assembler",))
SCORES = Topic("scores", Score, "tenant/episode", ("scorer",), ("learner", "assembler"))
REWARDS = Topic(
    "reward-versions", RewardVersion, "tenant/policy", ("scorer",), ("learner", "assembler"), partitioned=False
)
RUNS = Topic("runs", Run, "tenant/policy", ("learner",), ("learner", "assembler"), partitioned=False)
ADAPTERS = Topic(
    "adapters",
    Adapter,
    "tenant/policy",
    ("learner", "releaser"),
    ("gateway", "learner", "releaser", "assembler"),
    partitioned=False,
)
RELEASES = Topic(
    "releases",
    Release,
    "tenant/policy/release",
    ("releaser",),
    ("releaser", "learner", "assembler"),
    compacted=True,
    partitioned=False,
)
ROUTES = Topic(
    "routes",
    Route,
    "tenant/policy",
    ("releaser",),
    ("gateway", "releaser", "learner", "assembler"),
    compacted=True,
    partitioned=False,
)
COMMANDS = Topic(
    "commands", Command, "tenant/policy", (), ("learner", "releaser", "scorer", "assembler"), partitioned=False
)
PAUSES = Topic(
    "pauses",
    Command,
    "tenant/policy",
    (),
    ("learner", "releaser", "scorer", "assembler"),
    compacted=True,
    partitioned=False,
)
PINS = Topic(
    "pins",
    Pin,
    "tenant/policy",
    ("gateway", "releaser"),
    ("gateway", "releaser", "assembler"),
    partitioned=False,
)
CHECKPOINTS = Topic(
    "checkpoints",
    Checkpoints,
    "tenant/policy/run",
    ("learner",),
    ("gateway", "releaser", "assembler"),
    compacted=True,
    partitioned=False,
)
DEAD_LETTERS = Topic(
    "dead-letters", DeadLetter, "handler", (*ALL_HANDLERS, "releaser"), ("assembler",), partitioned=False
)

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
        PINS,
        CHECKPOINTS,
        DEAD_LETTERS,
    )
}

CHANGELOG = "everloop-state-"
"""What the name of a handler's changelog begins with: the compacted topic that its state is restored from."""

HANDLERS = {"assemble": "assembler", "score": "scorer"}
"""The service of each handler whose partitions workers share: it has a changelog and writers for them. A handler's
group has the handler's name."""

RELEASER = "releaser"
"""The writer of releases and routes on Kafka: one at a time in the cluster, by this name."""

GROUPS = {
    **HANDLERS,
    "archive": "assembler",
    "signals": "scorer",
    "judge": "scorer",
    "learn": "learner",
    "releaser": "releaser",
}
"""The service of each group of readers."""
