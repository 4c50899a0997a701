"""The distribution that is sampled from, on worked examples."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from everloop.event import Sampling

from trainer.rollout import sampling

LOGITS = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()


def probabilities(outputs: list[int] = [], **fields: object) -> list[float]:  # noqa: B006
    given = sampling.processed(LOGITS, [Sampling(**fields)], [outputs])
    return [round(p, 4) for p in given.exp()[0].tolist()]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [0.5, 0.25, 0.125, 0.125]),
        ({"temperature": 0.5}, [0.7273, 0.1818, 0.0455, 0.0455]),  # squares: 1/4, 1/16, 1/64, 1/64 over 22/64
        ({"temperature": 0}, [0.5, 0.25, 0.125, 0.125]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 2}, [0.6667, 0.3333, 0, 0]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_p": 0.6}, [0.6667, 0.3333, 0, 0]),
        ({"top_p": 1e-6}, [1, 0, 0, 0]),
        ({"min_p": 0.4}, [0.6667, 0.3333, 0, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0]),
    ],
)
def test_what_is_left_of_the_distribution(fields: dict[str, object], expected: list[float]) -> None:
    assert probabilities(**fields) == expected


def test_penalties_count_what_the_answer_has_said() -> None:
    two_ln2 = 2 * math.log(2)
    assert probabilities([0], presence_penalty=two_ln2) == [0.2, 0.4, 0.2, 0.2]  # 1/2 becomes 1/8 of 5/8
    assert probabilities([0, 0], presence_penalty=two_ln2) == [0.2, 0.4, 0.2, 0.2]
    assert probabilities([0, 0], frequency_penalty=math.log(2)) == [0.2, 0.4, 0.2, 0.2]


def test_each_row_has_its_own_settings() -> None:
    rows = [Sampling(top_k=1), Sampling(), Sampling(temperature=2.0, top_p=0.4)]
    together = sampling.processed(LOGITS.repeat(3, 1), rows, [[], [], []])
    for i, row in enumerate(rows):
        assert torch.allclose(together[i], sampling.processed(LOGITS, [row], [[]])[0])


def test_draws_follow_the_distribution_and_never_leave_it() -> None:
    rows = [Sampling(top_k=3)] * 4000
    logprobs = sampling.processed(LOGITS.repeat(4000, 1), rows, [[]] * 4000)
    uniforms = [(i + 0.5) / 4000 for i in range(4000)]
    drawn = Counter(sampling.draw(logprobs, rows, uniforms).tolist())
    kept = logprobs.exp()[0]
    assert set(drawn) == {i for i in range(4) if kept[i] > 0}
    assert all(abs(drawn[i] / 4000 - kept[i].item()) < 0.002 for i in drawn)


@pytest.mark.parametrize("uniform", [0.0, 0.999999999999])
def test_the_ends_of_the_interval_draw_tokens_that_can_be(uniform: float) -> None:
    logprobs = torch.tensor([[float("-inf"), 0.0, float("-inf")]])
    assert sampling.draw(logprobs, [Sampling()], [uniform]).tolist() == [1]


def test_greedy_rows_ignore_their_number() -> None:
    rows = [Sampling(temperature=0), Sampling()]
    logprobs = sampling.processed(LOGITS.repeat(2, 1), rows, [[], []])
    assert sampling.draw(logprobs, rows, [0.99, 0.99]).tolist() == [0, 3]
