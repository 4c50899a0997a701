"""The run from top to bottom, on an engine that is a table: weights, advantages, order, schedule, and resuming."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from everloop.errors import NotEnoughData

from pipelines.batch import Batch, BatchItem
from trainer import algorithm, recipe
from trainer.engine import Estimates, Objective, Outputs
from trainer.gather import Sources
from trainer.material import Answer, Material
from trainer.packing import Sample


def made(**fields: Any) -> recipe.Recipe:
    return recipe.parse({"name": "x", **fields}, "test")


def logged(episode: str, turn: int, reward: float, weight: float, **changes: Any) -> Answer:
    sample = Sample((turn, ord(episode)), (7, 2))
    return Answer(sample, "logged", episode, turn=turn, reward=reward, weight=weight, **changes)


def fresh(prompt: int, token: int, reward: float, count: int, of: int = 4) -> Answer:
    sample = Sample((prompt,), (token, 2))
    return Answer(sample, "fresh", str(prompt), reward=reward, weight=count / of, count=count)


def test_logged_episodes_get_gae_over_their_turns_and_fresh_ones_the_mean_of_their_group():
    answers = [
        logged("a", 1, 1.0, 0.5, value=0.6),
        logged("a", 0, 0.0, 0.5, value=0.2),
        logged("b", 0, -1.0, 1.0, value=0.0),
        fresh(1, 8, 1.0, 3),
        fresh(1, 9, 0.0, 1),
    ]
    found = algorithm.weighed(Material.of(answers), made(value={"discount": 0.9, "trace": 0.5})).answers
    by_hand = np.asarray([0.4, 0.9 * 0.6 - 0.2 + 0.45 * 0.4, -1.0])
    mean = np.average(by_hand, weights=[0.5, 0.5, 1])
    spread = np.sqrt(np.average((by_hand - mean) ** 2, weights=[0.5, 0.5, 1]))
    assert [a.advantage for a in found[:3]] == pytest.approx((by_hand - mean) / spread)
    assert [a.target for a in found[:3]] == pytest.approx([1.0, by_hand[1] + 0.2, -1.0])
    assert [a.advantage for a in found[3:]] == pytest.approx(np.asarray([0.25, -0.75]) / np.sqrt(0.1875))


def test_an_answer_beside_the_course_of_an_episode_is_judged_by_its_own_reward():
    answers = [logged("a", 0, 0.0, 0.5), logged("a", 0, -1.0, 0.5, branch=1), logged("a", 1, 1.0, 0.5)]
    found = algorithm.weighed(Material.of(answers), made(value={"trace": 1.0})).answers
    assert {(a.turn, a.branch): a.target for a in found} == {(0, 0): 1.0, (0, 1): -1.0, (1, 0): 1.0}


def test_credit_lands_on_the_turn_at_which_the_foretold_end_moves():
    """Two episodes of three turns, rewarded at their ends alone; the second turn decided both."""
    courses = {"a": (1.0, (0.0, 0.0, 0.8)), "b": (-1.0, (0.0, 0.0, -0.8))}

    def weighed(known: bool) -> dict[tuple[str, int], float]:
        answers = [
            logged(name, turn, end if turn == 2 else 0.0, 1 / 3, potential=potential if known else None)
            for name, (end, potentials) in courses.items()
            for turn, potential in enumerate(potentials)
        ]
        plain = made(reward={"source": "feedback"}, value={"trace": 0.0})
        return {(a.episode, a.turn): a.advantage for a in algorithm.weighed(Material.of(answers), plain).answers}

    credit = weighed(known=True)
    assert credit["a", 1] == pytest.approx(-credit["b", 1])
    assert credit["a", 1] > 3 * credit["a", 2] > 3 * abs(credit["a", 0])
    without = weighed(known=False)
    assert without["a", 1] == pytest.approx(0)
    assert without["a", 2] > 1


def test_an_episode_of_which_one_turn_was_not_foretold_is_not_shaped():
    answers = [logged("a", 0, 0.0, 0.5, potential=0.3), logged("a", 1, 1.0, 0.5)]
    bare = [replace(answer, potential=None) for answer in answers]
    both = [[a.target for a in algorithm.weighed(Material.of(its), made()).answers] for its in (answers, bare)]
    assert both[0] == both[1]


def test_identical_rollouts_once_with_a_count_weigh_as_much_as_each_alone():
    recipe_ = made()
    merged = algorithm.weighed(Material.of([fresh(1, 8, 1.0, 3), fresh(1, 9, 0.0, 1)]), recipe_)
    apart = algorithm.weighed(Material([[fresh(1, 8, 1.0, 1)] * 3 + [fresh(1, 9, 0.0, 1)]]), recipe_)
    pull = [sum(a.weight * a.advantage for a in m.answers if a.reward == 1.0) for m in (merged, apart)]
    assert pull[0] == pytest.approx(pull[1])


def test_every_group_comes_once_an_epoch_and_the_seed_decides_the_order():
    material = Material([[fresh(i, 8, 0.0, 4)] for i in range(10)])
    once = made(optimizer={"epochs": 3, "minibatch": 4})
    steps = algorithm.minibatches(material, once, seed=1, number=0)
    assert len(steps) == 9
    for epoch in range(3):
        assert sorted(i for step in steps[3 * epoch : 3 * epoch + 3] for i in step) == list(range(10))
    assert steps == algorithm.minibatches(material, once, seed=1, number=0)
    assert steps != algorithm.minibatches(material, once, seed=1, number=1)
    bounded = made(optimizer={"epochs": 3, "minibatch": 4, "steps": 4})
    assert algorithm.minibatches(material, bounded, seed=1, number=0) == steps[:4]


def test_a_correction_that_is_not_learned_yet_comes_more_often():
    def corrected(prompt: int, logprob: float) -> Answer:
        proximal = np.asarray([logprob, 0.0], np.float32)
        return Answer(Sample((prompt,), (8, 2)), "corrected", str(prompt), replay=1.0, proximal=proximal)

    material = Material([[corrected(1, -2.0)], [corrected(2, -0.1)], [fresh(3, 8, 0.0, 4)]])
    recipe_ = made(replay={"repeats": 5}, optimizer={"epochs": 1, "minibatch": 4})
    steps = algorithm.minibatches(material, recipe_, seed=1, number=0)
    assert sorted(i for step in steps for i in step) == [0] * 5 + [1, 2]


def test_the_rate_warms_up_and_falls_to_its_final_share():
    shape = made(optimizer={"warmup": 0.1, "final": 0.2})
    assert algorithm.rate(0.05, shape) == pytest.approx(0.5)
    assert algorithm.rate(0.1, shape) == pytest.approx(1.0)
    assert algorithm.rate(0.55, shape) == pytest.approx(0.6)
    assert algorithm.rate(1.0, shape) == pytest.approx(0.2)


def outputs(answers: list[Answer], logprob: float = -0.5) -> Outputs:
    present = torch.ones(len(answers), 2, dtype=torch.bool)
    return Outputs(torch.full((len(answers), 2), logprob, requires_grad=True), torch.zeros(len(answers)), present)


def test_a_minibatch_in_any_parts_has_one_loss():
    answers = [fresh(1, 8, 1.0, 3), fresh(1, 9, 0.0, 1), fresh(2, 8, 0.5, 2), fresh(2, 9, 0.1, 2)]
    material = algorithm.weighed(Material.of(answers), made())
    scale = algorithm.Scale.of(material, made())
    loss = algorithm.objective(material.groups, scale, made())
    whole = loss(outputs(answers), slice(0, 4)).value
    parts = loss(outputs(answers[:3]), slice(0, 3)).value + loss(outputs(answers[3:]), slice(3, 4)).value
    assert whole.item() == pytest.approx(parts.item(), rel=1e-5)


def test_an_episode_of_many_calls_pulls_no_harder_than_one_of_a_single_call():
    answers = [logged("a", 0, 1.0, 0.5), logged("a", 1, 1.0, 0.5), logged("b", 0, 1.0, 1.0)]
    given = outputs(answers)
    told = Material.of([replace(a, advantage=1.0, proximal=np.full(2, -0.5, np.float32)) for a in answers])
    loss = algorithm.objective(told.groups, algorithm.Scale.of(told, made()), made(kl={"coefficient": 0}))
    loss(given, slice(0, 3)).value.backward()
    pull = given.logprobs.grad.sum(1)
    assert (pull[0] + pull[1]).item() == pytest.approx(pull[2].item())


def test_shuffled_rewards_are_the_same_rewards_elsewhere():
    answers = [fresh(i, 8, float(i), 4) for i in range(20)] + [Answer(Sample((99,), (1,)), "rated", "r", replay=1.0)]
    moved = algorithm.shuffled(answers, seed=0)
    assert sorted(a.reward for a in moved[:20]) == [float(i) for i in range(20)]
    assert [a.reward for a in moved] != [a.reward for a in answers]
    assert moved[20].replay == 1.0
    assert moved[20].reward == 0.0


def test_estimates_go_to_the_answers_in_ppo_and_to_corrections_and_to_no_other():
    class Counting(Table):
        def estimates(self, groups: Any) -> Estimates:
            rows = [np.asarray([float(i)], np.float32) for i in range(sum(map(len, groups)))]
            return Estimates(rows, rows, np.arange(len(rows), dtype=np.float32))

    replayed = Answer(Sample((1,), (8, 2)), "believed", "1", replay=1.0)
    other = Answer(Sample((5,), (8, 2)), "rated", "5", replay=1.0)
    corrected = Answer(Sample((6,), (8, 2)), "corrected", "6", replay=1.0)
    given = [replayed, fresh(1, 9, 0.0, 4), other, corrected, fresh(2, 9, 0.0, 4)]
    told = algorithm.estimated(Material.of(given), Counting())
    assert [a.proximal.tolist() for a in told.answers] == [[], [0.0], [], [1.0], [2.0]]
    assert [a.value for a in told.answers] == [0.0, 0.0, 0.0, 1.0, 2.0]


class Table:
    """An engine whose policy is one number a step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def rollouts(self, *_: Any) -> list[Any]:
        return []

    def estimates(self, groups: Any) -> Estimates:
        rows = [np.zeros(len(sample.completion), np.float32) for group in groups for sample in group]
        return Estimates(rows, rows, np.zeros(len(rows), np.float32))

    def step(self, groups: Any, objective: Objective, rate: float) -> dict[str, float]:
        self.rates.append(rate)
        return {"loss": 0.0}


class Run:
    """A training in memory that stops after some steps."""

    def __init__(self, material: Material, start: tuple[int, int] = (0, 0)) -> None:
        self.engine, self.recipe, self.seed = Table(), made(optimizer={"epochs": 2, "minibatch": 2}), 3
        self.sources = Sources(Batch("t", "p", "v", []), None, None)  # type: ignore[arg-type]
        self._material, self._start = material, start
        self.took_steps: list[tuple[int, int, bool]] = []

    def resume(self) -> tuple[int, int]:
        return self._start

    def material(self, number: int, make: Callable[[], Material]) -> Material:
        return self._material

    def took(self, number: int, step: int, last: bool, metrics: dict[str, float]) -> None:
        self.took_steps.append((number, step, last))


def test_a_run_takes_every_step_and_a_resumed_one_the_rest_of_them():
    material = Material([[fresh(i, 8, 0.0, 4)] for i in range(4)])
    whole, rest = Run(material), Run(material, start=(0, 3))
    algorithm.train(whole)
    algorithm.train(rest)
    assert whole.took_steps == [(0, 0, False), (0, 1, False), (0, 2, False), (0, 3, True)]
    assert rest.took_steps == whole.took_steps[3:]
    assert rest.engine.rates == whole.engine.rates[3:]


class Speller:
    """A policy that writes whatever it is asked for."""

    stop_ids, end_id, context = frozenset({2}), 2, 99

    def decode(self, ids: Sequence[int]) -> str:
        return "lost_card"


def test_what_was_said_of_the_last_turn_reaches_the_turns_before_it():
    """Of three turns the last one alone has a thumb, and the one in the middle may not be trained on."""
    ids, logprobs = np.asarray([5, 6, 7, 2], np.int32), np.zeros(4, np.float32)
    about = {"version": 1, "subject": None, "prompt_messages": [], "answer": "lost_card", "correction": None}
    sampled = {"logprobs": logprobs, "span": (2, 4), "policy_version": "base", "temperature": 1.0, "turns": 3}
    items = [
        BatchItem(**about, **sampled, episode="a", call=f"c{turn}", turn=turn, tokens=ids + 10 * turn,
                  reward=-0.5, mask=False, source="model", label=1.0 if turn == 2 else None, trainable=turn != 1)
        for turn in range(3)
    ]  # fmt: skip
    run = Run(Material([]))
    run.recipe = made(reward={"source": "feedback"}, value={"discount": 1.0, "trace": 0.5}, replay={"coefficient": 0.0})
    run.sources = Sources(Batch("t", "p", "v", items), Speller(), None)  # type: ignore[arg-type]
    found = algorithm.gathered(run, 0).answers
    assert [(a.turn, a.target) for a in found] == [(0, 0.25), (2, 1.0)]  # lambda to the number of turns between


def test_nothing_to_learn_from_is_said():
    with pytest.raises(NotEnoughData, match="nothing to learn from yet"):
        algorithm.gathered(Run(Material([])), 0)
