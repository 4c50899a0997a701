"""The loop on the bank desk inside one process: the platform's own parts, called as a library.

Messages are answered by the policy, a simulated customer has an opinion of some answers, the reward model learns
from each at once, and every so often a run of the trainer makes the next adapter, which answers from then on. What
services add (log, store, gate, canary) is left out: this measures how much is learned, not how it is carried.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from everloop.config import RewardConfig
from everloop.episode import Episode, Turn
from everloop.event import Call, Message
from everloop.feedback import Feedback, FeedbackKind

from examples.bank_desk.customer import Customer, Opinion
from examples.bank_desk.data import Desk
from examples.bank_desk.data import Message as Asked
from pipelines.batch import Batch, BatchItem
from reward import evidence
from reward.encoder import Encoder
from reward.features import examples
from reward.model import RewardModel
from trainer.learner import Learner
from trainer.policy import base, lora, tiny_k2
from trainer.recipe import Recipe
from trainer.request import VALUE_HEAD, Request, Trained
from trainer.sampling import Rollout, Sampling, rollouts

ANSWER_TOKENS = 24
ROLLOUT_TOKENS = 32  # as the figures that are kept were measured with


@dataclass
class Cycle:
    """What one training run did. ``accuracy`` is exact match of greedy answers on the held-out half, after it."""

    messages: int
    accuracy: float
    seconds: float
    thumbs_up: float
    metrics: dict[str, float] = field(default_factory=dict)


class DeskLoop:
    """One agent's loop. ``folder`` keeps runs and batches; ``learner`` may be shared between loops.

    ``temperature`` is the one that customers' messages are answered at.
    """

    def __init__(
        self,
        desk: Desk,
        folder: Path,
        cache: Path,
        recipe: Recipe,
        *,
        learner: Learner,
        encoder: Encoder,
        seed: int,
        threads: int,
        temperature: float = 1.0,
        window: int = 4000,
    ) -> None:
        self.desk, self.folder, self.recipe, self.seed, self.threads = desk, folder, recipe, seed, threads
        self.cache, self.temperature, self.window = cache, temperature, window
        self.base = str(tiny_k2.cached(cache, [tuple(message) for message in desk.prior], seed=seed))
        self.policy = base.load(self.base, cache)
        self.customer = Customer(seed)
        self.encoder = encoder
        self.reward = RewardModel(RewardConfig(), encoder)
        self.learner = learner
        self.adapter: Path | None = None
        self.module: Any = self.policy.model
        self.served: list[tuple[BatchItem, Episode]] = []
        self.right = 0
        self.parent_run: Path | None = None

    def serve(self, messages: Sequence[Asked]) -> float:
        """Answer messages, hear what customers say, let the reward model learn; the share of thumbs that were up."""
        prompts = [self.policy.encode_chat([{"role": "user", "content": message.text}]) for message in messages]
        number = len(self.served)
        self.encoder.encode([message.text for message in messages])
        answers = self._said(prompts, self.temperature, self.seed * 1_000_003 + number)
        thumbs: list[float] = []
        for at, (message, prompt, answer) in enumerate(zip(messages, prompts, answers, strict=True)):
            item, episode = self._answered(number + at, message, prompt, answer)
            self.served.append((item, episode))
            self.right += item.answer == message.topic
            thumbs += [] if item.label is None or item.correction else [item.label]
            for _, lesson in evidence.lessons(episode, examples(episode)):
                self.reward.learn([lesson])
        return float(np.mean(thumbs)) if thumbs else float("nan")

    def _said(self, prompts: Sequence[Sequence[int]], temperature: float, seed: int = 0) -> list[Rollout]:
        """One answer to each prompt, by the adapter that answers now."""
        torch.set_num_threads(self.threads)
        once = Sampling(samples=1, max_tokens=ANSWER_TOKENS, temperature=temperature)
        drawn = rollouts(self.module, prompts, once, stop_ids=self.policy.stop_ids, seed=seed)
        return [answer for (answer,) in drawn]

    def _answered(self, number: int, message: Asked, prompt: list[int], answer: Rollout) -> tuple[BatchItem, Episode]:
        text = self.policy.decode(answer.completion)
        opinion = self.customer.judge(number, message.topic, text)
        words = words_of(number, opinion, float(number))
        episode = episode_of(f"ep_{number:06d}", message.text, text, words)
        return self._item(episode, self.customer.name(number), message, prompt, answer, opinion), episode

    def _item(
        self, episode: Episode, subject: str, message: Asked, prompt: list[int], answer: Rollout, opinion: Opinion
    ) -> BatchItem:
        """What a batch holds of an answer before it is scored."""
        text, words = self.policy.decode(answer.completion), episode.turns[0].feedback
        return BatchItem(
            episode=episode.id,
            version=1,
            call=episode.turns[0].call.id,
            subject=subject,
            prompt_messages=[{"role": "user", "content": message.text}],
            answer=text,
            correction=opinion.correction,
            reward=0.0,
            mask=False,
            source="model",
            label=evidence.said_of(text, words).label,
            tokens=np.asarray([*prompt, *answer.completion], np.int32),
            logprobs=np.concatenate([np.zeros(len(prompt), np.float32), answer.logprobs]),
            span=(len(prompt), len(prompt) + len(answer.completion)),
            policy_version="base" if self.adapter is None else self.adapter.name,
            temperature=self.temperature,
            trainable=self.temperature > 0,
            turn=0,
            turns=1,
        )

    def retrain(self) -> Trained:
        """One run of the trainer on the newest window of messages; its adapter answers from now on."""
        run = self.folder / f"run-{len(self.served):06d}"
        version = self.reward.save(self.folder / "rewards")
        batch = Batch(
            "bank", "desk", version, self._scored(RewardModel.load(self.folder / "rewards" / version, self.encoder))
        )
        request = Request(
            run=run.name,
            folder=str(run),
            adapters=str(self.folder / "adapters"),
            base=self.base,
            cache=str(self.cache),
            batch=str(batch.save(self.folder / "batches")),
            recipe=self.recipe.model_dump(),
            seed=self.seed * 1000 + len(self.served) // 100,
            parent=None if self.adapter is None else str(self.adapter),
            value_head=None if self.parent_run is None else str(self.parent_run / VALUE_HEAD),
            reward=str(self.folder / "rewards" / version),
            threads=self.threads,
            max_tokens=ROLLOUT_TOKENS,
        )
        run.mkdir(parents=True, exist_ok=True)
        request.save()
        trained = self.learner.train(request)
        self.parent_run = run
        self.adopt(self.folder / "adapters" / trained.adapter)
        return trained

    @property
    def incumbent(self) -> tuple[Path | None, Any, Path | None]:
        """What answers now, for :meth:`go_back`."""
        return self.adapter, self.module, self.parent_run

    def go_back(self, incumbent: tuple[Path | None, Any, Path | None]) -> None:
        """Have answer, and be trained further, what did so before a run."""
        self.adapter, self.module, self.parent_run = incumbent

    def adopt(self, adapter: Path) -> None:
        """Answer with this adapter from now on."""
        self.adapter = adapter
        self.module = lora.merged(self.policy, adapter)

    def _scored(self, judge: RewardModel) -> list[BatchItem]:
        """The window as batch selection would give it: each call with its final score."""
        from dataclasses import replace

        window = self.served[-self.window :]
        estimates = judge.estimate([examples(episode)[0] for _, episode in window])
        scored = []
        for (item, episode), estimate in zip(window, estimates, strict=True):
            said = evidence.said_of(item.answer, episode.turns[0].feedback)
            final, source = evidence.decide(estimate, said, judge.config.pessimism)
            scored.append(replace(item, reward=final.reward, mask=final.mask, source=source))
        return scored

    def accuracy(self, messages: Sequence[Asked]) -> float:
        """Exact match of greedy answers."""
        return float(
            np.mean([answer == message.topic for answer, message in zip(self.greedy(messages), messages, strict=True)])
        )

    def greedy(self, messages: Sequence[Asked]) -> list[str]:
        return [self.policy.decode(answer.completion) for _, answer in self.likeliest(messages)]

    def likeliest(self, messages: Sequence[Asked]) -> list[tuple[list[int], Rollout]]:
        """Each message as a prompt of tokens, and its greedy answer."""
        prompts = [self.policy.encode_chat([{"role": "user", "content": message.text}]) for message in messages]
        return [*zip(prompts, self._said(prompts, 0.0), strict=True)]

    def cycle(self, messages: Sequence[Asked]) -> Cycle:
        """Serve, retrain, measure."""
        thumbs = self.serve(messages)
        started = time.monotonic()
        trained = self.retrain()
        seconds = time.monotonic() - started
        return Cycle(len(self.served), self.accuracy(self.desk.report), seconds, thumbs, trained.metrics)


def words_of(number: int, opinion: Opinion, time: float, rater: str | None = None) -> tuple[Feedback, ...]:
    """What a customer says of an answer, as feedback."""
    said = []
    about = {"time": time, "rater": rater}
    if opinion.thumb is not None:
        value = 1.0 if opinion.thumb else -1.0
        said.append(Feedback(id=f"t{number}", kind=FeedbackKind.THUMB, value=value, **about))
    if opinion.correction is not None:
        said.append(Feedback(id=f"c{number}", kind=FeedbackKind.CORRECTION, text=opinion.correction, **about))
    return tuple(said)


def episode_of(name: str, asked: str, answer: str, words: tuple[Feedback, ...], time: float = 0.0) -> Episode:
    """One message and its answer. ``time``: event time, seconds."""
    call = Call(
        id=f"{name}-call",
        messages=(Message(role="user", content=asked),),
        output=Message(role="assistant", content=answer),
        finish_reason="stop",
    )
    return Episode(
        tenant="bank",
        policy="desk",
        id=name,
        version=1,
        started=time,
        updated=time,
        turns=(Turn(call=call, feedback=words),),
    )
