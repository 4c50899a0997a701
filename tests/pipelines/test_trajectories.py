"""Calls to sequences: what joins, what branches, what may be trained on."""

from __future__ import annotations

from array import array

import pytest
from everloop.event import CallTokens, Sampling

from pipelines.trajectories import sequences, trainable


def tokens(prompt, completion, **fields):
    return CallTokens(prompt=prompt, completion=completion, logprobs=[-0.5] * len(completion), **fields)


def test_the_contracts_worked_example(make):
    call = make.call(tokens=CallTokens(prompt=[1, 5], completion=[7, 2], logprobs=[-0.1, -0.2]))
    (sequence,) = sequences([call])
    assert sequence.tokens == array("i", [1, 5, 7, 2])
    assert sequence.logprobs == array("f", [0, 0, -0.1, -0.2])
    assert [(span.start, span.end, span.trainable) for span in sequence.spans] == [(2, 4, True)]


def test_a_prompt_that_extends_the_tokens_before_joins_them(make):
    calls = [
        make.call("a", tokens=tokens([1], [2]), policy_version="v1"),
        make.call("b", tokens=tokens([1, 2, 3], [4]), policy_version="v2"),
        make.call("c", tokens=tokens([1, 2, 3, 4], [5, 6])),
    ]
    (sequence,) = sequences(calls)
    assert list(sequence.tokens) == [1, 2, 3, 4, 5, 6]
    assert [(s.call, s.start, s.end, s.policy_version) for s in sequence.spans] == [
        ("a", 1, 2, "v1"),
        ("b", 3, 4, "v2"),
        ("c", 4, 6, "base"),
    ]
    assert list(sequence.logprobs) == [0, -0.5, 0, -0.5, -0.5, -0.5]


def test_a_prompt_that_differs_in_one_token_opens_its_own(make):
    calls = [make.call("a", tokens=tokens([1], [2])), make.call("b", tokens=tokens([1, 9, 3], [4]))]
    assert [list(one.tokens) for one in sequences(calls)] == [[1, 2], [1, 9, 3, 4]]


def test_several_answers_to_one_prompt_stay_apart_and_the_longest_is_continued(make):
    calls = [
        make.call("a", tokens=tokens([1], [2])),
        make.call("b", tokens=tokens([1], [2, 3]), choice=1),
        make.call("c", tokens=tokens([1, 2, 3, 4], [5])),
    ]
    assert [list(one.tokens) for one in sequences(calls)] == [[1, 2], [1, 2, 3, 4, 5]]


def test_calls_without_tokens_or_with_arrays_that_do_not_match_are_left_out(make):
    wrong = CallTokens(prompt=[1], completion=[2, 3], logprobs=[-1.0])
    assert sequences([make.call("a", tokens=None), make.call("b", tokens=wrong)]) == ()


@pytest.mark.parametrize(
    ("fields", "may"),
    [
        ({}, True),
        ({"sampling": Sampling(temperature=0.7)}, True),
        ({"sampling": Sampling(temperature=0)}, False),
        ({"sampling": Sampling(top_p=0.9)}, False),
        ({"sampling": Sampling(constrained=True)}, False),
        ({"tokens": tokens([1], [2], mode="raw")}, False),
        ({"tokens": tokens([1], [2], checked=False)}, False),
        ({"tokens": None}, False),
        ({"error": "timeout"}, False),
    ],
)
def test_only_a_known_distribution_may_be_trained_on(make, fields, may):
    assert trainable(make.call(**fields)) is may
