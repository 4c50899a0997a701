"""One reward version's opinion of calls that another one scored, so that a batch speaks with one voice.

The version's snapshot reads the very episode version that the batch holds (its course too, not the texts alone) and
judges as the scorer does: what it thinks, moved by implicit signals. It is asked where it is kept warm, in the
learner's worker, which has then read the texts that the run is about to train on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from everloop.config import RewardConfig

from pipelines.batch import BatchItem, Rescore
from pipelines.store import Store
from reward import evidence
from reward.evidence import NOTHING, Said
from reward.features import Example, examples
from reward.model import Estimate
from reward.reliability import Reliability, of_snapshot

Estimator = Callable[[Path, str, Sequence[Example]], Sequence[Estimate]]
"""(folder of a snapshot, name of its encoder, answers) to what the snapshot says of each."""


def rescoring(store: Store, tenant: str, policy: str, snapshot: Path, config: RewardConfig, ask: Estimator) -> Rescore:
    """What ``select`` asks for the opinion of the snapshot in a folder."""

    def rescore(items: Sequence[BatchItem]) -> list[tuple[float, bool]]:
        trust = of_snapshot(snapshot)
        declared = trust.declaration.combine.pessimism
        pessimism = config.pessimism if declared is None else declared
        seen = _seen(store, tenant, policy, items, trust)
        known = [item.call for item in items if item.call in seen]
        estimates = dict(zip(known, ask(snapshot, config.encoder, [seen[call][0] for call in known]), strict=True))
        return [
            _final(estimates[item.call], _believed(item, seen[item.call][1]), pessimism)
            if item.call in seen
            else (0.0, False)
            for item in items
        ]

    return rescore


def _seen(
    store: Store, tenant: str, policy: str, items: Sequence[BatchItem], trust: Reliability
) -> dict[str, tuple[Example, Said]]:
    """Each call as the reward model sees it, and what was said of it, as far as the snapshot trusts whom."""
    found = {}
    for episode in store.versions(tenant, policy, {item.episode: item.version for item in items}):
        turns = zip(episode.turns, examples(episode), evidence.said(episode, trust), strict=True)
        found.update({turn.call.id: (example, said) for turn, example, said in turns})
    return found


def _believed(item: BatchItem, said: Said) -> Said:
    """Nothing, where the scorer did not believe what was said: then the score was the model's though somebody spoke."""
    return NOTHING if item.source == "model" and said.label is not None else said


def _final(estimate: Estimate, said: Said, pessimism: float) -> tuple[float, bool]:
    final, _ = evidence.decide(estimate, said, pessimism)
    return final.reward, final.mask
