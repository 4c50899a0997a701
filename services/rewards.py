"""What the commands about reward models read: versions in the log; scored calls and rated answers in the store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager

from everloop.errors import ContractError
from everloop.run import RewardVersion
from everloop.topics import REWARDS

from pipelines.store import Store
from reward import evidence
from reward.encoder import Encoder
from reward.features import Example, answer_text, examples, prompt_text
from reward.model import RewardModel, Vectors
from reward.report import Row
from reward.rescore import snapshot_folder
from services.installation import Installation

CALLS = """
WITH first AS (
    SELECT episode, call, reward_version, label, predicted, time FROM history.scores
    WHERE tenant = $tenant AND policy = $policy AND label IS NOT NULL AND predicted IS NOT NULL
    QUALIFY row_number() OVER (PARTITION BY episode, call ORDER BY version, log_offset) = 1
), newest AS (
    SELECT episode, call, reward_version, mask, time, source, label, ends_well_before, ends_well_after
    FROM scores WHERE tenant = $tenant AND policy = $policy
), its_turns AS (
    SELECT * FROM turns WHERE tenant = $tenant AND policy = $policy
), ended AS (
    SELECT episode, first(n.label ORDER BY n.source = 'outcome' DESC, t.turn DESC) AS ended
    FROM newest n JOIN its_turns t USING (episode, call) WHERE n.label IS NOT NULL GROUP BY episode
)
SELECT episode, call, t.turn, t.messages, t.output, coalesce(t.policy_version, '') AS adapter,
       coalesce(first.reward_version, newest.reward_version) AS reward_version, newest.mask AS mask,
       coalesce(first.time, newest.time) AS time, first.label AS label, first.predicted AS predicted, t.turns AS turns,
       newest.label AS newest, newest.ends_well_before AS ends_well_before,
       newest.ends_well_after AS ends_well_after, ended.ended AS ended
FROM newest JOIN its_turns t USING (episode, call)
LEFT JOIN first USING (episode, call) LEFT JOIN ended USING (episode)
ORDER BY time, episode, call
"""
RATED = """
SELECT episode, call, version, label FROM scores
WHERE tenant = ? AND policy = ? AND label IS NOT NULL AND time > ? ORDER BY time DESC, episode, call LIMIT ?
"""


@contextmanager
def opened(here: Installation, tenant: str) -> Iterator[Store]:
    with closing(Store(here.home.root / "store", tenant=tenant, blobs=here.home.blobs)) as store:
        yield store


def versions(here: Installation, tenant: str, policy: str) -> list[RewardVersion]:
    """All that were announced of a policy, in their order; where one was announced twice, the newer word."""
    found: dict[str, RewardVersion] = {}
    for one in here.records(REWARDS, RewardVersion):
        if one.key == f"{tenant}/{policy}":
            found.pop(one.version, None)
            found[one.version] = one
    return list(found.values())


def loaded(
    here: Installation, tenant: str, policy: str, version: str, encoder: Vectors | None = None
) -> tuple[str, RewardModel]:
    """The full name of a version, or of a unique beginning of one, and its model, which reads with ``encoder`` (None:
    one of its own). Raises ContractError."""
    folder = snapshot_folder(here.home, tenant, policy, version)
    return folder.name, RewardModel.load(folder, encoder or encoder_of(here, tenant, policy))


def encoder_of(here: Installation, tenant: str, policy: str) -> Encoder:
    return Encoder(here.config.policy(tenant, policy).reward.encoder)


def calls(store: Store, tenant: str, policy: str) -> list[Row]:
    """Every scored call of a policy, oldest first."""
    found = []
    for row in store.rows(CALLS, {"tenant": tenant, "policy": policy}):
        messages, output = (json.loads(row.pop(name) or "null") for name in ("messages", "output"))
        found.append(Row(**row, prompt=prompt_text(messages or []), answer=answer_text(output or {})))
    return found


def rated(
    store: Store, tenant: str, policy: str, *, since: float = 0.0, most: int = 200
) -> list[tuple[str, Example, float]]:
    """(episode, answer, newest label) of the newest rated calls after a time, newest first."""
    rows = store.rows(RATED, [tenant, policy, since, most])
    wanted = {row["episode"]: row["version"] for row in rows}
    seen: dict[tuple[str, str], Example] = {}
    for episode in store.versions(tenant, policy, wanted):
        for turn, example in zip(episode.turns, examples(episode), strict=True):
            seen[episode.id, turn.call.id] = example
    at = ((row["episode"], seen.get((row["episode"], row["call"])), row["label"]) for row in rows)
    return [(name, example, label) for name, example, label in at if example is not None]


def opinions(model: RewardModel, answers: list[Example]) -> list[float]:
    """P(good) of each, in parts that bound the memory."""
    return [one.value for start in range(0, len(answers), 500) for one in model.estimate(answers[start : start + 500])]


def newest(store: Store, tenant: str, policy: str, most: int) -> list[tuple[str, int, Example, float | None]]:
    """(episode, turn, answer, label) of the turns of the newest episodes."""
    names = store.rows(
        "SELECT episode FROM episodes WHERE tenant = ? AND policy = ? ORDER BY updated DESC, episode LIMIT ?",
        [tenant, policy, most],
    )
    if not names:
        raise ContractError(
            f"{tenant}/{policy} has no episodes in the store yet: traffic through the gateway brings them"
        )
    chosen = [row["episode"] for row in names]
    found = []
    for episode in store.episodes(
        "tenant = ? AND policy = ? AND episode IN (SELECT unnest(?))", [tenant, policy, chosen]
    ):
        for turn, (example, said) in enumerate(zip(examples(episode), evidence.said(episode), strict=True)):
            found.append((episode.id, turn, example, said.label))
    return found
