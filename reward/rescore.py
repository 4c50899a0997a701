"""History scored again by a newer version of the reward model: what ``everloop replay --reward`` does.

History is the archive and the log's tail, which is newer. A score of the newest version of each episode is appended
wherever another reward version spoke last. A score keeps what was said and expected of its call, so
predict-then-learn numbers stay what they were. Done twice, the second time appends nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

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
from reward.model import RewardModel, Vectors
from reward.scoring import score_of, score_record

C = TypeVar("C", bound=Contract)
CHUNK = 200  # episodes whose texts are encoded at once


class Spoken(NamedTuple):
    """What matters of the newest score of a call: who scored which episode version, and what had been expected."""

    reward_version: str
    version: int
    predicted: float | None
    quarantined: str | None = None
    ends_well: tuple[float, float] | None = None


def newest_version(log: Log, tenant: str, policy: str) -> str:
    """The reward version that was released last. Raises NotEnoughData where none was."""
    known = (v for _, v in _records(log, REWARDS.name, 0, RewardVersion, None) if v.key == f"{tenant}/{policy}")
    found = [version for version in known if version.state == "released"]
    if not found:
        raise NotEnoughData(f"{tenant}/{policy} has no reward version yet: the first episode that is scored makes one")
    return found[-1].version


def rescore(
    log: Log,
    home: Home,
    encoder: Vectors,
    tenant: str,
    policy: str,
    *,
    version: str | None = None,
    episodes: Iterable[Episode] = (),
    scores: Iterable[Score] = (),
) -> int:
    """Score the history of a policy with a version (None: the newest); returns how many scores were appended.

    ``episodes`` and ``scores`` are the policy's newest in the archive; what the log has beyond them is read here.

    Raises NotEnoughData where there is no version; ContractError where its snapshot is not whole or gone.
    """
    folder = snapshot_folder(home, tenant, policy, version or newest_version(log, tenant, policy))
    model = RewardModel.load(folder, encoder)
    before = _spoken(scores)
    before.update(_spoken(_of(log, SCORES.name, Score, home, tenant, policy)))
    history = _newest(episodes, {one.id: one for one in _of(log, EPISODES.name, Episode, home, tenant, policy)})
    appended = 0
    while chunk := list(islice(history, CHUNK)):
        made = list(_rescored(model, folder.name, chunk, before))
        log.append(made)
        appended += len(made)
    return appended


def _spoken(scores: Iterable[Score]) -> dict[tuple[str, str], Spoken]:
    """By (episode, call): of all partitions together, since a score does not lie where its episode does."""
    return {(score.episode, score.call): _said(score) for score in scores}


def _said(score: Score) -> Spoken:
    before, after = score.ends_well_before, score.ends_well_after
    course = None if before is None or after is None else (before, after)
    return Spoken(score.reward_version, score.version, score.predicted, score.quarantined, course)


def _newest(archived: Iterable[Episode], tail: dict[str, Episode]) -> Iterator[Episode]:
    """Each episode once, in its newest version: of the archive, and what is in the log's tail alone."""
    for episode in archived:
        newer = tail.pop(episode.id, episode)
        yield max(newer, episode, key=lambda one: one.version)
    yield from tail.values()


def snapshot_folder(home: Home, tenant: str, policy: str, version: str) -> Path:
    """The folder of a version by its name or a unique beginning of it. Raises ContractError where there is none."""
    root = home.root / "rewards" / tenant / policy
    found = sorted(folder for folder in root.glob(f"{version}*") if folder.is_dir()) if version.isalnum() else []
    if len(found) != 1:
        held = ", ".join(sorted(folder.name for folder in root.glob("[0-9a-f]*"))) or "none"
        raise ContractError(f"{tenant}/{policy} has no single reward version {version!r}; kept are: {held}")
    return found[0]


def _rescored(
    model: RewardModel, version: str, episodes: list[Episode], before: dict[tuple[str, str], Spoken]
) -> Iterator[NewRecord]:
    its = [examples(episode) for episode in episodes]
    estimates = iter(model.estimate([example for one in its for example in one]))
    for episode in episodes:
        for turn, said in enumerate(evidence.said(episode, model.reliability)):
            estimate = next(estimates)
            held = before.get((episode.id, episode.turns[turn].call.id))
            if held is None or held.reward_version != version or held.version != episode.version:
                why = held.quarantined if held else None
                score = score_of(
                    episode,
                    turn,
                    estimate,
                    said.measured if why else said,
                    version=version,
                    pessimism=model.config.pessimism,
                    predicted=held.predicted if held else None,
                    quarantined=why,
                    ends_well=held.ends_well if held else None,
                )
                yield score_record(score)


def _of(log: Log, topic: str, contract: type[C], home: Home, tenant: str, policy: str) -> Iterator[C]:
    """What a topic holds of a policy, in the order of each partition."""
    for partition in range(log.partitions(topic)):
        for _, one in _records(log, topic, partition, contract, home):
            if (getattr(one, "tenant", None), getattr(one, "policy", None)) == (tenant, policy):
                yield one


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
