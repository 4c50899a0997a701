"""History scored again by a newer version of the reward model: what ``everloop replay --scores`` does.

Reads the log's own episodes and scores, partition by partition, and appends a score of the newest version of each
episode wherever another reward version spoke last. A score keeps what was said and expected of its call, so
predict-then-learn numbers stay what they were. Done twice, the second time appends nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from everloop import wire
from everloop.contract import Contract
from everloop.episode import Episode
from everloop.errors import ContractError, NotEnoughData
from everloop.home import Home
from everloop.log.base import Log, NewRecord
from everloop.run import RewardVersion
from everloop.score import Score
from everloop.topics import EPISODES, REWARDS, SCORES

from reward import evidence
from reward.features import examples
from reward.handler import score_of, score_record
from reward.model import RewardModel, Vectors

C = TypeVar("C", bound=Contract)
CHUNK = 200  # episodes whose texts are encoded at once


def newest_version(log: Log, tenant: str, policy: str) -> str:
    """The reward version that was announced last. Raises NotEnoughData where none was."""
    found = [v for _, v in _records(log, REWARDS.name, 0, RewardVersion, None) if v.key == f"{tenant}/{policy}"]
    if not found:
        raise NotEnoughData(f"{tenant}/{policy} has no reward version yet: the first episode that is scored makes one")
    return found[-1].version


def rescore(log: Log, home: Home, encoder: Vectors, tenant: str, policy: str, *, version: str | None = None) -> int:
    """Score the history of a policy with a version (None: the newest); returns how many scores were appended.

    Raises NotEnoughData where there is no version; ContractError where its snapshot is not whole or gone.
    """
    folder = snapshot_folder(home, tenant, policy, version or newest_version(log, tenant, policy))
    model = RewardModel.load(folder, encoder)
    appended = 0
    for partition in range(log.partitions(EPISODES.name)):
        newest = {
            key: episode
            for key, episode in _records(log, EPISODES.name, partition, Episode, home)
            if (episode.tenant, episode.policy) == (tenant, policy)
        }
        before = {
            (score.episode, score.call): score
            for _, score in _records(log, SCORES.name, partition, Score, home)
            if (score.tenant, score.policy) == (tenant, policy)
        }
        episodes = list(newest.values())
        for start in range(0, len(episodes), CHUNK):
            made = list(_rescored(model, folder.name, episodes[start : start + CHUNK], before))
            log.append(made)
            appended += len(made)
    return appended


def snapshot_folder(home: Home, tenant: str, policy: str, version: str) -> Path:
    """The folder of a version by its name or a unique beginning of it. Raises ContractError where there is none."""
    root = home.root / "rewards" / tenant / policy
    found = sorted(folder for folder in root.glob(f"{version}*") if folder.is_dir()) if version.isalnum() else []
    if len(found) != 1:
        held = ", ".join(sorted(folder.name for folder in root.glob("[0-9a-f]*"))) or "none"
        raise ContractError(f"{tenant}/{policy} has no single reward version {version!r}; kept are: {held}")
    return found[0]


def _rescored(
    model: RewardModel, version: str, episodes: list[Episode], before: dict[tuple[str, str], Score]
) -> Iterator[NewRecord]:
    its = [examples(episode) for episode in episodes]
    estimates = iter(model.estimate([example for one in its for example in one]))
    for episode in episodes:
        for turn, said in enumerate(evidence.said(episode)):
            estimate = next(estimates)
            held = before.get((episode.id, episode.turns[turn].call.id))
            if held is None or held.reward_version != version or held.version != episode.version:
                said_before = held.predicted if held else None
                pessimism = model.config.pessimism
                score = score_of(
                    episode, turn, estimate, said, version=version, pessimism=pessimism, predicted=said_before
                )
                yield score_record(score)


def _records(log: Log, topic: str, partition: int, contract: type[C], home: Home | None) -> Iterator[tuple[str, C]]:
    """Key and content of the records of a partition that are what they should be; dead letters are left out."""
    offset, end = 0, log.end_offsets(topic)[partition]
    while offset < end:
        records = log.read(topic, partition, offset)
        if not records:
            return
        for record in records:
            if record.value is not None:
                try:
                    yield record.key, wire.decode(contract, record.value, home.blobs if home else None)
                except ContractError:
                    continue
        offset = records[-1].offset + 1
