"""One training run from top to bottom: read :func:`train`, change what you like, name your file in a recipe.

Decoupled PPO on logged calls and fresh rollouts, with a value head, the KL to the base, and a replay term on
answers that people corrected or rated well. Nothing here knows what holds the model (:mod:`trainer.engine`), where
checkpoints lie or who asked for the run: ``training`` brings those.

Every random choice is a function of (seed, round), so a run that was killed and resumed ends with the same weights
as one that was not.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from everloop.errors import NotEnoughData
from numpy.typing import NDArray
from torch import Tensor

from trainer import advantages, gather, losses
from trainer.engine import Engine, Objective, Outputs
from trainer.gather import Sources
from trainer.losses import Loss, PolicyTerms
from trainer.material import Answer, Material
from trainer.recipe import Recipe

LEARNED = 0.5  # probability of a whole answer from which on it counts as learned


class Training(Protocol):
    """What a run is given. :class:`trainer.learner.Training` keeps checkpoints; a test may bring its own."""

    engine: Engine
    recipe: Recipe
    sources: Sources
    seed: int

    def resume(self) -> tuple[int, int]:
        """(round, step in it) to go on with, the engine's weights already those; (0, 0) at the start."""

    def material(self, number: int, make: Callable[[], Material]) -> Material:
        """The material of a round: made once and kept, read back after a kill."""

    def took(self, number: int, step: int, last: bool, metrics: dict[str, float]) -> None:
        """A step was taken: keep its metrics, write a checkpoint where one is due (always after the last)."""


def train(training: Training) -> None:
    """Rounds of: draw and judge fresh answers, weigh everything, and take the steps of a few epochs."""
    recipe, engine = training.recipe, training.engine
    start_round, start_step = training.resume()
    for number in range(start_round, recipe.optimizer.rounds):
        material = training.material(number, lambda number=number: gathered(training, number))
        scale = Scale.of(material, recipe)
        batches = minibatches(material, recipe, training.seed, number)
        for step in range(start_step, len(batches)):
            groups = [material.groups[i] for i in batches[step]]
            samples = [material.samples[i] for i in batches[step]]
            done = (number + step / len(batches)) / recipe.optimizer.rounds
            metrics = engine.step(samples, objective(groups, scale, recipe), rate(done, recipe))
            training.took(number, step, step == len(batches) - 1, metrics)
        start_step = 0


def gathered(training: Training, number: int) -> Material:
    """Everything that a round learns from, with log-probabilities, values and advantages as they are at its start."""
    recipe, engine, sources = training.recipe, training.engine, training.sources
    rollouts = gather.fresh(sources, recipe, engine, seed=_seed(training.seed, number, "rollouts"))
    told = gather.remembered(sources, recipe)
    answers = [*told, *gather.believed([*rollouts, *gather.proposed(sources, recipe)], recipe, told)]
    if recipe.ppo.coefficient > 0:
        answers += gather.informative(rollouts, recipe, answers) if recipe.ppo.fresh else []
        answers += gather.logged(sources, recipe) if recipe.ppo.logged else []
    if recipe.reward.shuffled:
        answers = shuffled(answers, _seed(training.seed, number, "shuffle"))
    if not any(answer.weight > 0 or answer.replay > 0 for answer in answers):
        raise NotEnoughData(
            "there is nothing to learn from yet: no answer was rated or corrected, and the reward model has heard too "
            "little to judge any; feedback brings both"
        )
    return _with_a_say(weighed(estimated(Material.of(answers), engine), recipe))


def _with_a_say(material: Material) -> Material:
    """Without the turns of logged episodes that only carried what was said later to the turns before them."""
    groups = [[a for a in group if a.weight > 0 or a.source != "logged"] for group in material.groups]
    return Material([group for group in groups if group])


def estimated(material: Material, engine: Engine) -> Material:
    """What policy and base say at the start of the round of answers in PPO, their episodes' turns, and corrections."""
    groups = [[answer for answer in group if _weighed_up(answer)] for group in material.groups]
    said = engine.estimates([[answer.sample for answer in group] for group in groups if group])
    told = iter(zip(said.logprobs, said.base, said.values.tolist(), strict=True))
    answers = []
    for answer in material.answers:
        proximal, base, value = next(told) if _weighed_up(answer) else (answer.proximal, answer.base, answer.value)
        answers.append(replace(answer, proximal=proximal, base=base, value=value))
    return material.changed(answers)


def _weighed_up(answer: Answer) -> bool:
    return answer.weight > 0 or answer.source in ("corrected", "logged")


def shuffled(answers: Sequence[Answer], seed: int) -> list[Answer]:
    """A control: the rewards of all answers in PPO change places."""
    able = [i for i, answer in enumerate(answers) if answer.weight > 0]
    moved = dict(zip(able, np.random.default_rng(seed).permutation(able).tolist(), strict=True))
    return [replace(a, reward=answers[moved.get(i, i)].reward) for i, a in enumerate(answers)]


def weighed(material: Material, recipe: Recipe) -> Material:
    """One advantage a turn: GAE over an episode for what was logged, the group's mean as baseline for what is fresh.

    Where every turn of an episode has a potential, rewards are shaped by it; the value head then learns what is left.
    """
    answers = material.answers
    found = np.zeros(len(answers))
    targets = np.zeros(len(answers))
    for members in _by(answers, "logged", lambda a: (a.episode, a.branch)):
        members.sort(key=lambda i: answers[i].turn)
        rewards, values = _column(answers, members, "reward"), _column(answers, members, "value")
        potentials = [answers[i].potential for i in members]
        if None not in potentials:
            known = np.asarray(potentials, dtype=np.float64)
            rewards = advantages.shaped(rewards, known, recipe.value.discount)
        turns = advantages.gae(rewards, values, discount=recipe.value.discount, trace=recipe.value.trace)
        found[members], targets[members] = turns.advantages, turns.returns
    for members in _by(answers, "fresh", lambda a: a.sample.prompt):
        rewards = _column(answers, members, "reward")
        found[members] = advantages.group_centred(rewards, _column(answers, members, "count"))
        targets[members] = rewards
    for source, centre in (("logged", True), ("fresh", False)):
        members = [i for i, a in enumerate(answers) if a.source == source and a.weight > 0]
        weights = _column(answers, members, "weight")
        found[members] = advantages.normalised(found[members], weights, centre=centre)
    told = zip(answers, found.tolist(), targets.tolist(), strict=True)
    return material.changed([replace(a, advantage=advantage, target=target) for a, advantage, target in told])


def _by(answers: Sequence[Answer], source: str, key: Callable[[Answer], object]) -> list[list[int]]:
    """Indices of the answers of one source, in groups of one key; of rollouts, those that have a say in PPO."""
    grouped: dict[object, list[int]] = defaultdict(list)
    for i, answer in enumerate(answers):
        if answer.source == source and (answer.weight > 0 or source == "logged"):
            grouped[key(answer)].append(i)
    return list(grouped.values())


def _column(answers: Sequence[Answer], members: Sequence[int], name: str) -> NDArray[np.float64]:
    return np.asarray([getattr(answers[i], name) for i in members], dtype=np.float64)


def minibatches(material: Material, recipe: Recipe, seed: int, number: int) -> list[list[int]]:
    """Indices of groups, a list a step, all epochs of a round: in random order, those of like length together.

    A correction that was not learned yet comes by ``replay.repeats`` times an epoch: a heavier weight would take from
    every other answer of its minibatch, whose weights are scaled together (``benchmarks/correction`` measures both).
    """
    chance = np.random.default_rng(_seed(seed, number, "order"))
    size = recipe.optimizer.minibatch
    lengths = [len(g[0].sample.prompt) + sum(len(a.sample.completion) for a in g) for g in material.groups]
    often = [recipe.replay.repeats if any(map(_not_learned, group)) else 1 for group in material.groups]
    steps: list[list[int]] = []
    for _ in range(recipe.optimizer.epochs):
        order = chance.permutation(np.repeat(np.arange(len(often)), often)).tolist()
        batches = []
        for start in range(0, len(order), 8 * size):
            alike = sorted(order[start : start + 8 * size], key=lambda i: lengths[i])
            batches += [alike[at : at + size] for at in range(0, len(alike), size)]
        steps += [batches[i] for i in chance.permutation(len(batches)).tolist()]
    return steps[: recipe.optimizer.steps or None]


def _not_learned(answer: Answer) -> bool:
    """Whether the policy would likely not have given this correction when the round began."""
    return answer.source == "corrected" and math.exp(float(answer.proximal.sum())) < LEARNED


def rate(done: float, recipe: Recipe) -> float:
    """Share of the learning rate when ``done`` (0 to 1) of the run is behind: a linear warm-up, then a cosine."""
    warmup, final = recipe.optimizer.warmup, recipe.optimizer.final
    if done < warmup:
        return max(done / warmup, 0.1)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


class Scale:
    """What the weights of an average minibatch add up to, so that every minibatch of a round is scaled alike.

    Constant over a round: a minibatch that happens to hold little then pulls little.
    """

    def __init__(self, policy: float, replay: float, values: float, tokens: float) -> None:
        self.policy, self.replay, self.values, self.tokens = policy, replay, values, tokens

    @classmethod
    def of(cls, material: Material, recipe: Recipe) -> Scale:
        answers = material.answers
        batches = max(1.0, len(material.groups) / recipe.optimizer.minibatch)
        policy = sum(a.weight for a in answers) / batches
        replay = sum(a.replay for a in answers) / batches
        tokens = float(np.mean([len(a.sample.completion) for a in answers])) if answers else 1.0
        return cls(max(policy, 1e-6), max(replay, 1e-6), max(policy, 1e-6), tokens)


def objective(groups: Sequence[Sequence[Answer]], scale: Scale, recipe: Recipe) -> Objective:
    """The loss of a minibatch: PPO + value + KL to the base + replay, each a weighted sum."""
    answers = [answer for group in groups for answer in group]

    def loss(outputs: Outputs, part: slice) -> Loss:
        these = answers[part]
        width = outputs.logprobs.shape[1]
        weight = _numbers(a.weight / (scale.policy * scale.tokens) for a in these)
        told = _numbers(a.replay / (scale.replay * scale.tokens) for a in these)
        each = outputs.present.to(weight.dtype)
        terms = PolicyTerms(
            new=outputs.logprobs,
            proximal=_padded([a.proximal for a in these], width),
            behaviour=_padded([a.behaviour if a.behaviour.size else a.proximal for a in these], width),
            advantage=_numbers(a.advantage for a in these)[:, None].expand(-1, width),
            weight=weight[:, None] * each,
        )
        clip = {"clip_low": recipe.ppo.clip_low, "clip_high": recipe.ppo.clip_high, "truncate": recipe.ppo.truncate}
        base = _padded([a.base for a in these], width)
        say = _numbers(a.weight / scale.values for a in these)
        return losses.total(
            (recipe.ppo.coefficient, losses.ppo(terms, **clip)),
            (recipe.kl.coefficient, losses.kl_to_base(outputs.logprobs, base, terms.weight)),
            (recipe.value.coefficient, losses.value(outputs.values, _numbers(a.target for a in these), say)),
            (recipe.replay.coefficient, losses.replay(outputs.logprobs, told[:, None] * each)),
        )

    return loss


def _numbers(values: object) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float32)  # type: ignore[call-overload]


def _padded(rows: Sequence[NDArray[np.float32]], width: int) -> Tensor:
    out = np.zeros((len(rows), width), np.float32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)


def _seed(seed: int, number: int, purpose: str) -> int:
    return int(np.random.SeedSequence([seed, number, *purpose.encode()]).generate_state(1)[0])
