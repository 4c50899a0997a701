"""Everything that scores one (tenant, policy): the live model, the snapshot that scores, what is watched.

State, below ``model/<tenant>/<policy>/``: the pieces of :mod:`reward.durable`, below ``guard/`` those of
:mod:`reward.poison`, and ``desk`` (version that scores, what it and the live model foretold, what is watched, how often
the desk was written). A desk in memory is a cache of it: ``stale`` tells where a batch was given up after the desk had
learned from it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from everloop.config import DriftKind, RewardConfig
from everloop.errors import ContractError
from everloop.run import RewardVersion
from everloop.stream import State

from reward import durable, snapshot
from reward.features import Example
from reward.floor import worthless
from reward.model import Estimate, Label, Pair, RewardModel, Vectors
from reward.poison import Guard
from reward.release import Shadow, Verdict, finite
from reward.taught import Taught, name_of
from reward.watch import Watch

logger = logging.getLogger(__name__)
GUARD = "guard/"
WAY_OUT = (
    "Set this policy's [reward] encoder, heads and reservoir back; or, to learn again what the log still has, stop the "
    "reward service and delete its state (state/score.db below the home; docs/operations.md for Kafka)"
)
DRIFTED: dict[DriftKind, str] = {
    "inputs": "what is asked has",
    "labels": "how answers are rated has",
    "calibration": "what the model's probabilities mean has",
}


class Desk:
    """``root``: the installation's home; snapshots lie in ``rewards/<tenant>/<policy>/`` below it."""

    def __init__(self, tenant: str, policy: str, config: RewardConfig, encoder: Vectors, root: Path) -> None:
        self.tenant, self.policy = tenant, policy
        self.live = RewardModel(config, encoder)
        self.watch = Watch(config.window)
        self.guard = Guard(config.reservoir, config.trusted, config.distrusted)
        self.shadow = Shadow(config.window)
        self.refused: tuple[str, str] | None = None  # the newest snapshot, where it did not take over, and why
        self.refusals = 0
        self.waits = 0  # snapshots that did not take over, and were not refused
        self.pinned: str | None = None  # why a person has this version kept, whatever snapshots come
        self.obeyed = 0.0  # time of the newest order that was obeyed; see reward.orders
        self.scoring = self.live
        self.version = ""
        self.prefix = f"model/{tenant}/{policy}/"
        self._root = root
        self._folder = root / "rewards" / tenant / policy
        self._writes = 0

    def read(self, state: State) -> Desk:
        """Take up what the state holds; returns itself.

        Raises ContractError where it belongs to another encoder or size: what was learned is nobody's to delete here.
        """
        pieces = {key.removeprefix(self.prefix): value for key, value in state.scan(self.prefix)}
        desk = json.loads(pieces.pop("desk", b"{}"))
        guarded = {name.removeprefix(GUARD): pieces.pop(name) for name in [*pieces] if name.startswith(GUARD)}
        try:
            if not durable.restore(self.live, pieces.items()):
                return self
        except ContractError as error:
            raise ContractError(f"{self.tenant}/{self.policy}: {error}. {WAY_OUT}") from None
        self.guard.restore(guarded)  # written with the model, so by the same release
        self._writes = desk["writes"]
        self.watch = Watch(self.live.config.window, **desk["watch"])
        self.shadow = Shadow(self.live.config.window, **desk["shadow"])
        self.refused = (str(held[0]), str(held[1])) if (held := desk["refused"]) else None
        self.refusals, self.waits = desk["refusals"], desk["waits"]
        self.pinned, self.obeyed = desk["pinned"], desk["obeyed"]
        self._score_with(desk["version"])
        return self

    def _score_with(self, version: str) -> None:
        try:
            self.scoring = RewardModel.load(self._folder / version, self.live.encoder)
            self.version = version
        except ContractError as error:
            logger.warning("%s; the live model is frozen as a new version", error)

    def stale(self, state: State) -> bool:
        """Whether the state is not the one that this desk has written last."""
        held = state.get(f"{self.prefix}desk")
        return (json.loads(held)["writes"] if held else 0) != self._writes

    def write(self, state: State) -> None:
        self._writes += 1
        for name, value in durable.changes(self.live):
            state.put(self.prefix + name, value)
        for name, held in self.guard.changes():
            if held is None:
                state.delete(f"{self.prefix}{GUARD}{name}")
            else:
                state.put(f"{self.prefix}{GUARD}{name}", held)
        desk = {
            "version": self.version,
            "writes": self._writes,
            "watch": self.watch.dump(),
            "shadow": self.shadow.dump(),
            "refused": self.refused,
            "refusals": self.refusals,
            "waits": self.waits,
            "pinned": self.pinned,
            "obeyed": self.obeyed,
        }
        state.put(f"{self.prefix}desk", json.dumps(desk).encode())

    def learn(self, lesson: Label | Pair, raters: Sequence[str] = ()) -> tuple[float, bool]:
        """Learn at once; what was expected before, and whether it is time for a snapshot. ``raters``: who said it."""
        before = self.live.updates
        watched = lesson if isinstance(lesson, Label) and lesson.watched and self.scoring.may_judge else None
        beside = self._foretold(watched) if watched is not None else 0.5
        (expected,) = self.live.learn([lesson])
        learned = self.live.updates > before
        if watched is not None and learned:
            rater = name_of("rater", min(raters)) if raters else ""
            self.shadow.add(beside, expected, watched.value, watched.example, rater)
        return expected, learned and self.live.updates % self.live.config.snapshot_every == 0

    def take_back(self, taught: Taught) -> None:
        """Undo a lesson, as far as it is remembered."""
        if isinstance(taught.lesson, Pair):
            self.live.take_back_pair(taught.lesson, taught.trace.lesson)
        else:
            self.live.take_back(taught.lesson.id, taught.lesson.example, taught.trace)

    def agrees(self, lesson: Label | Pair) -> bool:
        """Whether the live model thinks itself what a label says of its answer. Of a pair it is never asked: few are
        said, hardly the same one twice by one person, and they move a model so much that it would soon agree.
        """
        if isinstance(lesson, Pair) or not self.live.may_judge:
            return False
        (estimate,) = self.live.estimate([lesson.example])
        return (estimate.value > 0.5) == (lesson.value > 0.5)

    def _foretold(self, label: Label) -> float:
        """What the version that scores expects of a label that nobody has learned yet."""
        (estimate,) = self.scoring.estimate([label.example])
        return self.scoring.calibration.heard(estimate.value)

    def estimate(self, examples: list[Example]) -> list[Estimate]:
        """What the snapshot says of each answer; nothing that is to be trained on while a drift has frozen that."""
        found = self.scoring.estimate(examples)
        if not self.live.frozen:
            return found
        both = zip(found, examples, strict=True)
        return [one if worthless(example) else replace(one, mask=False) for one, example in both]

    def freeze(self, time: float) -> RewardVersion:
        """Save the live model as it is: a candidate, which scores from here on if it is released.

        Doing it twice gives the same. Where nothing frozen scores yet, it is released at once.
        """
        self._keep_scoring()
        version = self.live.save(self._folder)
        candidate = RewardModel.load(self._folder / version, self.live.encoder)
        verdict = self._verdict(candidate)
        if verdict.takes_over:
            self._take_over(version, candidate)
        else:
            self.refused = (version, verdict.reason)
            self.waits += verdict.waits
            self.refusals += not verdict.waits
        state: Literal["released", "refused"] = "released" if verdict.takes_over else "refused"
        made = self.described(version, time, state, verdict.reason, verdict.evidence)
        return made.model_copy(update={"waits": verdict.waits})

    def _keep_scoring(self) -> None:
        """What scores is the last to make room for other snapshots."""
        if self.version:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self._folder / self.version / "model.json")

    def described(
        self, version: str, time: float, state: Literal["released", "refused"], reason: str, evidence: dict[str, Any]
    ) -> RewardVersion:
        """What is announced of a snapshot that is kept. Raises ContractError where it is gone."""
        facts = snapshot.facts_of(self._folder / version)
        return RewardVersion(
            version=version,
            tenant=self.tenant,
            policy=self.policy,
            path=str((self._folder / version).relative_to(self._root)),
            updates=facts["updates"],
            auc=facts["evidence"]["auc"],
            calibration_error=facts["evidence"]["calibration_error"],
            offsets=facts["offsets"],
            state=state,
            reason=reason,
            evidence=evidence,
            time=time,
        )

    def _take_over(self, version: str, model: RewardModel) -> None:
        self.version, self.scoring = version, model
        self.shadow.pairs.clear()
        self.refused = None

    def score_by_order(self, version: str) -> None:
        """Score with a snapshot that is kept. Raises ContractError where it is gone, or could say nothing."""
        model = RewardModel.load(self._folder / version, self.live.encoder)
        if not finite(model):
            raise ContractError(f"reward model {version} has weights that are not finite, so it can say nothing")
        self._take_over(version, model)

    def _paged(self) -> str | None:
        """What somebody should know of the kinds of drift that page; None: nothing changed."""
        kinds = [
            f"{words} changed {count}x"
            for kind, words in DRIFTED.items()
            if "page" in self.live.config.on_drift[kind] and (count := self.live.drift.counts[kind])
        ]
        return "; ".join(kinds) or None

    def _verdict(self, candidate: RewardModel) -> Verdict:
        if not self.version:
            return Verdict(True, "takes over: it is the first, or the version that scored is gone", {})
        verdict = self.shadow.judge(self.scoring, candidate)
        if self.pinned is None:
            return verdict
        kept = f"{self.version} is kept {self.pinned}"
        if not verdict.takes_over:
            return verdict._replace(reason=f"{verdict.reason}; besides, {kept}")
        return Verdict(False, f"waits: {kept}; else it {verdict.reason}", verdict.evidence, waits=True)

    def status(self) -> dict[str, Any]:
        """JSON values; see ``services/scorer``."""
        live = self.live
        return {
            "version": self.version,
            "updates": live.updates,
            "labels": sum(live.seen),
            "good_labels": live.seen[1],
            "may_judge": live.may_judge,
            "refused": live.refused,
            "auc": live.calibration.auc,
            "calibration_error": live.calibration.error,
            "sources": live.reliability.status(),
            "raters": len(live.reliability.own),
            "answers_known": len(live.prototypes.rows),
            "snapshot_updates": self.scoring.updates,
            **{f"drift_{kind}": count for kind, count in live.drift.counts.items()},
            "drift": self._paged(),
            "frozen": live.frozen,
            "topics": len(live.topics.centres),
            "poison": self.guard.status(),
            "shadow_labels": len(self.shadow.pairs),
            "scoring_auc": self.shadow.auc,
            "snapshots_refused": self.refusals,
            "snapshots_waited": self.waits,
            "pinned": self.pinned,
            "refused_version": self.refused[0] if self.refused else None,
            "refused_because": self.refused[1] if self.refused else None,
            **self.watch.status(),
        }
