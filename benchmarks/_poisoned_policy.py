"""What becomes of the policy where a few customers poison: the desk's loop, scored by the scorer's own handler.

The base answers, customers (see ``_poisoned``) rate, the handler scores, and one run of the trainer learns from that.
With guards, no customer brings more of the batch than batch selection lets a person bring.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import _poisoned
from benchmarks._desk_loop import DeskLoop, episode_of, words_of
from benchmarks._reward_streams import folder as folder_of_data
from examples.bank_desk import data
from examples.bank_desk.customer import Customer
from pipelines.batch import FEW_PEOPLE, SUBJECT_SHARE, BatchItem
from reward.encoder import Encoder
from reward.features import examples
from reward.model import RewardModel
from trainer import recipe
from trainer.learner import Learner

HELD_OUT = 1000  # messages of the report's split
RECIPE: dict[str, Any] = {
    "name": "default, half as long",
    "rollouts": {"prompts": 800, "samples": 4},
    "ppo": {"coefficient": 0.1, "logged": False, "settled": False},
    "replay": {"coefficient": 1.0, "repeats": 8, "believed": 1.0, "proposals": 8},
    "optimizer": {"learning_rate": 4e-3, "epochs": 5, "steps": 80},
}


class PoisonedLoop(DeskLoop):
    """The desk's loop among customers of whom a ``share`` poisons in one ``kind`` of way."""

    def among(self, kind: str, share: float, guarded: bool) -> PoisonedLoop:
        self.kind, self.share, self.guarded = kind, share, guarded
        return self

    def serve(self, messages: Sequence[data.Message]) -> float:
        """Answer messages and hear what is said; then the handler scores everything. The share of thumbs up."""
        asked = [(number, copy) for number in range(len(messages)) for copy in range(self._copies(number))]
        prompts = [self.policy.encode_chat([{"role": "user", "content": messages[n].text}]) for n, _ in asked]
        answers = self._said(prompts, self.temperature, self.seed)
        self.encoder.encode([*{message.text: None for message in messages}])
        visits = []
        for (number, copy), prompt, answer in zip(asked, prompts, answers, strict=True):
            text, message = self.policy.decode(answer.completion), messages[number]
            user, at = f"user-{_poisoned.user_of(self.seed, number)}", _poisoned.APART * number + copy
            dice = random.Random(f"opinion/{self.seed}/{number}/{copy}")
            poisons = self._poisons(number)
            if poisons:
                opinion = _poisoned.opinion_of(self.kind, _poisoned.pushed_of(self.desk, self.seed), text, dice)
            else:
                opinion = Customer(self.seed).judge(number, message.topic, text)
            words = words_of(number * _poisoned.TIMES + copy, opinion, at, user)
            episode = episode_of(f"ep_{number:06d}_{copy}", message.text, text, words, at)
            self.served.append((self._item(episode, user, message, prompt, answer, opinion), episode))
            visits.append(_poisoned.Visit(episode, user, poisons))
        self.learned = _poisoned.learned(visits, self.encoder)
        self.reward = self.learned.model
        thumbs = [item.label for item, _ in self.served if item.label is not None]
        return float(np.mean(thumbs))

    def _poisons(self, number: int) -> bool:
        return bool(self.kind) and _poisoned.user_of(self.seed, number) < self.share * _poisoned.USERS

    def _copies(self, number: int) -> int:
        return _poisoned.TIMES if self.kind == "bought" and self._poisons(number) else 1

    def _scored(self, judge: RewardModel) -> list[BatchItem]:
        """What people said as it was scored, all opinions by the version that scores in the end."""
        estimates = judge.estimate([examples(episode)[0] for _, episode in self.served])
        scored = []
        for (item, _), estimate in zip(self.served, estimates, strict=True):
            score = self.learned.scores[item.episode]
            final = estimate if score.source == "model" else score
            told = item.correction if score.quarantined is None else None
            about = {"source": score.source, "label": score.label, "correction": told}
            scored.append(replace(item, reward=final.reward, mask=final.mask, **about))
        return _within_share(scored) if self.guarded else scored


def _within_share(items: list[BatchItem]) -> list[BatchItem]:
    """The newest of each person up to the share that batch selection leaves him."""
    people = {item.subject for item in items}
    most = max(SUBJECT_SHARE, FEW_PEOPLE / len(people)) * len(items)
    held: Counter[str | None] = Counter()
    kept = []
    for item in reversed(items):
        held[item.subject] += 1
        kept += [item] if held[item.subject] <= most else []
    return kept[::-1]


def parts() -> tuple[Encoder, Learner]:
    """What cells share: the encoder and the learner."""
    torch.set_num_threads(1)
    encoder, learner = Encoder(remember=200_000), Learner()
    learner.share(encoder)
    return encoder, learner


def trained(
    kind: str,
    share: float,
    guarded: bool,
    seed: int,
    messages: int,
    *,
    place: Path,
    parts: tuple[Encoder, Learner],
) -> dict[str, Any]:
    """One cell: what the policy answers to held-out messages before and after its run. ``place``: the cache."""
    began = time.monotonic()
    desk = data.load(None, folder_of_data(), seed=seed)
    encoder, learner = parts
    held_out = desk.report[:HELD_OUT]
    with tempfile.TemporaryDirectory(prefix="everloop-poison-") as folder, _poisoned.guards(guarded):
        options: dict[str, Any] = {"learner": learner, "encoder": encoder, "seed": seed, "threads": 1}
        loop = PoisonedLoop(desk, Path(folder), place.absolute(), recipe.parse(RECIPE, "of this benchmark"), **options)
        loop.among(kind, share, guarded)
        before = loop.greedy(held_out)
        loop.serve(desk.stream[:messages])
        loop.retrain()
        after = loop.greedy(held_out)
    pushed = _poisoned.pushed_of(desk, seed)
    return {
        "before": float(np.mean([a == m.topic for a, m in zip(before, held_out, strict=True)])),
        "right": float(np.mean([a == m.topic for a, m in zip(after, held_out, strict=True)])),
        "pushed": after.count(pushed) / len(after),
        "asked": float(np.mean([m.topic == pushed for m in held_out])),
        "held_poison": loop.learned.held[True],
        "held_others": loop.learned.held[False],
        "taken_back": loop.learned.status["poison"].get("taken_back", 0),
        "seconds": time.monotonic() - began,
    }
