"""What a batch gives to learn from: who may enter PPO, what replay takes, and how rollouts are judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipelines.batch import Batch, BatchItem
from reward.features import Example, answer_text
from reward.model import Estimate
from trainer import gather, recipe
from trainer.gather import Sources
from trainer.material import Answer
from trainer.packing import Sample
from trainer.policy import tools
from trainer.policy.base import Policy
from trainer.sampling import Rollout, Sampling

pytestmark = pytest.mark.models


def item(episode: str, turn: int = 0, turns: int = 1, **changes: Any) -> BatchItem:
    made = BatchItem(
        episode=episode,
        version=1,
        call=f"{episode}-{turn}",
        subject=None,
        prompt_messages=[{"role": "user", "content": f"my {episode} is gone"}],
        answer="lost_card",
        correction=None,
        reward=0.5,
        mask=True,
        source="model",
        label=None,
        tokens=np.asarray([5, 6, turn + 10, 7, 2], np.int32),
        logprobs=np.asarray([0, 0, 0, -0.5, -0.1], np.float32),
        span=(3, 5),
        policy_version="base",
        temperature=1.0,
        trainable=True,
        turn=turn,
        turns=turns,
    )
    return replace(made, **changes)


class Judge:
    """Believes in answers that say 'card'; near in meaning is what has the same letters."""

    class encoder:
        name, size, version = "letters", 26, "1"

        @staticmethod
        def encode(texts: Sequence[str]) -> np.ndarray:
            counts = np.asarray([[text.count(chr(97 + i)) for i in range(26)] for text in texts], np.float32)
            return counts / np.linalg.norm(counts, axis=1, keepdims=True).clip(1e-6)

    def estimate(self, examples: Sequence[Example]) -> list[Estimate]:
        return [
            Estimate(0.9, 0.0, 0.8, True) if "card" in e.answer else Estimate(0.1, 0.0, -0.8, True) for e in examples
        ]


class Sampler:
    """Gives every prompt the same two rollouts."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def rollouts(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[list[Rollout]]:
        self.asked = list(prompts)
        good, bad = (tuple(self.policy.encode_answer(text)) for text in ("lost_card", "refund"))
        return [
            [
                Rollout(good, np.zeros(len(good), np.float32), 3, True),
                Rollout(bad, np.zeros(len(bad), np.float32), 1, True),
            ]
            for _ in prompts
        ]


def sources(policy: Policy, items: list[BatchItem], **changes: Any) -> Sources:
    return replace(Sources(Batch("t", "p", "v1", items), policy, Judge()), **changes)


def made(**fields: Any) -> recipe.Recipe:
    return recipe.parse({"name": "x", **fields}, "test")


WITH_ROLLOUTS = {"rollouts": {"prompts": 10, "samples": 4}}


def spoken(policy: Policy, *items: BatchItem) -> list[BatchItem]:
    """The items with the answer that their token ids give."""
    return [replace(one, answer=policy.decode([7, 2])) for one in items]


def test_the_turns_of_an_episode_share_one_weight(policy: Policy):
    items = spoken(policy, item("a", 0, 2), item("a", 1, 2), item("b"))
    answers = gather.logged(sources(policy, items), made())
    assert [answer.weight for answer in answers] == [0.5, 0.5, 1.0]
    assert answers[0].sample == Sample((5, 6, 10), (7, 2))
    assert answers[0].behaviour == pytest.approx([-0.5, -0.1])


@pytest.mark.parametrize(
    "changes",
    [
        {"trainable": False},
        {"temperature": 0.0},
        {"mask": False},
        {"tokens": None, "logprobs": None, "span": None},
        {"policy_version": "old"},
    ],
)
def test_what_ppo_must_not_take(policy: Policy, changes: dict[str, Any]):
    given = sources(policy, spoken(policy, item("a", **changes), item("b")), recent=frozenset({"base"}))
    assert [answer.episode for answer in gather.logged(given, made())] == ["b"]


def test_the_turns_before_a_word_are_taken_with_it_and_those_after_it_are_not(policy: Policy):
    plain = made(reward={"source": "feedback"})
    old = {"policy_version": "old", "tokens": None, "logprobs": None, "span": None}
    items = spoken(policy, item("a", 0, 4), item("a", 1, 4, **old), item("a", 2, 4, label=1.0), item("a", 3, 4))
    answers = gather.logged(sources(policy, items, recent=frozenset({"base"})), plain)
    assert [(a.turn, a.reward, a.weight) for a in answers] == [(0, 0.0, 0.5), (1, 0.0, 0.0), (2, 1.0, 0.5)]
    assert answers[1].sample.prompt == tuple(policy.encode_chat(items[1].prompt_messages))


def test_on_feedback_alone_turns_carry_how_the_episode_was_foretold_to_end(policy: Policy):
    items = spoken(policy, item("a", 0, 2, ends_well=0.25), item("a", 1, 2, ends_well=0.9, label=1.0))
    told = gather.logged(sources(policy, items), made(reward={"source": "feedback"}))
    assert [answer.potential for answer in told] == pytest.approx([-0.5, 0.8])
    assert [answer.potential for answer in gather.logged(sources(policy, items), made())] == [None, None]
    unsound = spoken(policy, item("a", 0, 1, ends_well=float("nan"), label=1.0))
    (answer,) = gather.logged(sources(policy, unsound), made(reward={"source": "feedback"}))
    assert answer.potential is None


def test_answers_to_one_request_are_no_turns_of_one_another(policy: Policy):
    said = policy.decode([7, 2])
    went_on = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "b"},
    ]
    items = [
        item("a", 0, 2, call="beside", answer="another"),
        item("a", 0, 2, call="taken", answer=said),
        item("a", 1, 2, call="one", answer=said, prompt_messages=went_on),
        item("a", 1, 2, call="two", answer=said, prompt_messages=went_on),
    ]
    answers = gather.logged(sources(policy, items), made())
    assert [(a.turn, a.branch) for a in answers] == [(0, 1), (0, 0), (1, 0), (1, 4)]


def test_token_ids_that_do_not_say_the_answer_are_kept_from_ppo(policy: Policy, caplog: pytest.LogCaptureFixture):
    told = np.asarray(policy.encode_answer("lost card 7"), np.int32)
    right = item("right", answer="lost card 7", tokens=np.concatenate([[5, 6, 8], told]), span=(3, 3 + len(told)))
    right = replace(right, logprobs=np.full(3 + len(told), -0.5, np.float32))
    called = replace(right, episode="called", answer="card\nlost(7)")  # another form of the same words
    wrong = replace(right, episode="wrong", answer="card_arrival")
    silent = replace(right, episode="silent", answer="")
    given = sources(policy, [right, called, wrong, silent])
    assert [answer.episode for answer in gather.logged(given, made())] == ["right", "called"]
    assert "2 of 4 answers are left out of PPO" in caplog.text


CALL = {"id": "c", "type": "function", "function": {"name": "block", "arguments": '{"card": 7}'}}
MARKUP = '<tool_call>{"name": "block", "arguments": {"card": 7}}</tool_call>'
OFFERED = [{"type": "function", "function": {"name": "block"}}]


def called(policy: Policy, **changes: Any) -> BatchItem:
    """A pure tool call, as the engine records and sends it."""
    ids = np.asarray([5, 6, 8, *policy.encode_answer(MARKUP)], np.int32)
    sent = {"answer": "", "tool_calls": [CALL], "tools": OFFERED}
    return item("a", tokens=ids, logprobs=np.full(len(ids), -0.5, np.float32), span=(3, len(ids)), **sent, **changes)


def test_a_tool_call_enters_ppo_and_replay_as_it_was_sampled(policy: Policy):
    given = sources(policy, [called(policy, label=1.0)])
    (entered,) = gather.logged(given, made())
    (told,) = gather.remembered(given, made())
    assert entered.text == told.text == 'block({"card": 7})'
    assert told.sample.completion == tuple(policy.encode_answer(MARKUP))
    assert told.belief == pytest.approx(0.9)  # the judge reads the call


def test_a_tool_call_without_ids_is_replayed_as_serving_reads_it(policy: Policy):
    bare = called(policy, label=1.0)
    (told,) = gather.remembered(sources(policy, [replace(bare, tokens=None, span=None, tools=[])]), made())
    words, calls = tools.parse(policy.decode(told.sample.completion), {"block": True})
    assert (words, [call["function"] for call in calls]) == ("", [CALL["function"]])


def test_a_rollout_that_calls_a_tool_is_judged_as_the_call(policy: Policy):
    ids = policy.encode_answer(MARKUP)
    assert answer_text(gather.heard(ids, called(policy), policy)) == 'block({"card": 7})'
    assert answer_text(gather.heard(ids, item("b"), policy)) == MARKUP  # no tool was offered: serving sends it as words


def test_on_feedback_alone_only_rated_answers_enter_with_what_people_said(policy: Policy):
    plain = made(reward={"source": "feedback"})
    items = spoken(policy, item("a", label=1.0), item("b", label=0.0), item("c"))
    given = sources(policy, items, judge=None)
    assert [answer.reward for answer in gather.logged(given, plain)] == [1.0, -1.0]


def test_replay_takes_corrections_and_good_ratings_as_far_as_they_are_believed(policy: Policy):
    items = [
        item("a", correction="stolen_card", label=0.0),
        item("b", label=1.0),
        item("c", label=1.0, answer="refund"),
        item("d", label=0.0),
        item("e", label=1.0, tokens=None, logprobs=None, span=None),
    ]
    answers = gather.remembered(sources(policy, items), made())
    assert [(a.episode, a.source, a.replay) for a in answers] == [
        ("a", "corrected", 1.0),
        ("b", "rated", 0.9),
        ("c", "rated", 0.1),
        ("e", "rated", 0.9),
    ]
    assert answers[0].sample.completion == tuple(policy.encode_answer("stolen_card"))
    assert answers[3].sample.prompt == tuple(policy.encode_chat(items[4].prompt_messages))


def test_rollouts_are_judged_counted_and_of_last_turns_alone(policy: Policy):
    engine = Sampler(policy)
    given = sources(policy, [item("a", 0, 2), item("a", 1, 2), item("b", 1)])
    answers = gather.fresh(given, made(**WITH_ROLLOUTS), engine, seed=0)
    assert engine.asked == [(5, 6, 11)]
    assert [(a.text, a.reward, a.weight, a.count, a.synthetic) for a in answers] == [
        ("lost_card", 0.8, 0.75, 3, True),
        ("refund", -0.8, 0.25, 1, True),
    ]


def test_rollouts_are_kept_with_the_calls_that_they_answer_anew(policy: Policy):
    kept: list[Any] = []
    other = item("b", tokens=np.asarray([5, 6, 11, 7, 2], np.int32))
    given = sources(policy, [item("a"), other], keep=kept.extend)
    answers = gather.fresh(given, made(**WITH_ROLLOUTS), Sampler(policy), seed=0)
    assert [answer for answer, _ in kept] == answers
    assert [(answer.episode, call.episode) for answer, call in kept] == [("b", "b")] * 2 + [("a", "a")] * 2


def test_nobody_judges_nothing_is_learned_from_rollouts(policy: Policy):
    class Silent(Judge):
        def estimate(self, examples: Sequence[Example]) -> list[Estimate]:
            return [Estimate(0.5, 0.0, 0.0, False) for _ in examples]

    given = sources(policy, [item("a")], judge=Silent())
    answers = gather.fresh(given, made(**WITH_ROLLOUTS), Sampler(policy), seed=0)
    assert {a.weight for a in answers} == {0.0}
    believing = made(**WITH_ROLLOUTS, replay={"believed": 1.0})
    assert gather.believed(answers, believing) == []


def test_the_best_answer_of_each_prompt_is_replayed_if_it_is_believed(policy: Policy):
    believing = made(**WITH_ROLLOUTS, replay={"believed": 0.5, "belief": 0.6})
    one = Answer(Sample((1,), (7,)), "fresh", "a", belief=0.7, weight=0.5)
    other = Answer(Sample((1,), (8,)), "fresh", "a", belief=0.9, weight=0.5)
    weak = Answer(Sample((2,), (8,)), "fresh", "b", belief=0.5, weight=1.0)
    found = gather.believed([one, other, weak], believing)
    assert [(a.sample, a.source, a.weight) for a in found] == [(other.sample, "believed", 0.0)]
    assert found[0].replay == pytest.approx(0.45)


class Cut(Sampler):
    """Gives every prompt one good rollout that was cut."""

    def rollouts(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[list[Rollout]]:
        self.asked, self.length = list(prompts), sampling.max_tokens
        cut = tuple(self.policy.encode("lost_card"))
        return [[Rollout(cut, np.zeros(len(cut), np.float32), 4, False)] for _ in prompts]


class Listening(Judge):
    def estimate(self, examples: Sequence[Example]) -> list[Estimate]:
        self.heard = [(e.structure.turn, e.structure.finish) for e in examples]
        return super().estimate(examples)


def test_a_cut_rollout_is_judged_as_cut_and_never_imitated(policy: Policy):
    given = sources(policy, [item("a", 1, 2)], judge=Listening())
    (answer,) = gather.fresh(given, made(**WITH_ROLLOUTS), Cut(policy), seed=0)
    assert given.judge.heard == [(1, "length")]
    assert not answer.finished
    assert answer.weight == 1.0
    assert gather.believed([answer], made(**WITH_ROLLOUTS, replay={"believed": 1.0})) == []


def test_rollouts_are_as_long_as_the_policys_answers_and_a_long_prompt_shortens_none(policy: Policy):
    long = np.asarray([5] * 230 + [7, 2], np.int32)
    given = sources(policy, [item("a"), item("b", tokens=long, span=(230, 232))], max_tokens=48)
    engine = Cut(policy)
    gather.fresh(given, made(**WITH_ROLLOUTS), engine, seed=0)
    assert (engine.asked, engine.length) == ([(5, 6, 10)], 48)
    gather.fresh(given, made(rollouts={"prompts": 1, "max_tokens": 8}), engine, seed=0)
    assert (len(engine.asked[0]), engine.length) == (230, 8)


def test_proposals_beyond_the_context_are_left_out(policy: Policy):
    proposing = made(**WITH_ROLLOUTS, replay={"believed": 1.0, "proposals": 1})
    long = np.asarray([5] * (policy.context - 3) + [7, 2], np.int32)
    asked = item("zebras", tokens=long, span=(policy.context - 3, policy.context - 1))
    known = [item(f"q{i}", answer="zebra zebra zebra") for i in range(2)]
    found = gather.proposed(sources(policy, [*known, asked]), proposing)
    assert found
    assert all(len(a.sample.prompt) + len(a.sample.completion) <= policy.context for a in found)
    assert "zebras" not in [a.episode for a in found]


def test_answers_of_near_prompts_are_proposed_and_judged(policy: Policy):
    proposing = made(**WITH_ROLLOUTS, replay={"believed": 1.0, "proposals": 1})
    items = [
        item("zebra", answer="card_of_zebra", correction="the_card", tokens=np.asarray([5, 8, 8, 7, 2], np.int32)),
        item("xxxxx", reward=0.9, answer="other"),
        item("zebras", reward=-0.9, tokens=np.asarray([5, 9, 9, 7, 2], np.int32)),
    ]
    found = gather.proposed(sources(policy, items), proposing)
    newest = next(answer for answer in found if answer.episode == "zebras")
    assert (newest.text, newest.belief, newest.weight) == ("the_card", 0.9, 0.0)


def test_known_answers_are_proposed_where_their_words_are_near(policy: Policy):
    proposing = made(**WITH_ROLLOUTS, replay={"believed": 1.0, "proposals": 1})
    known = [item(f"q{i}", reward=-0.9, answer=answer) for i, answer in enumerate(["zebra", "zebra", "once"])]
    asked = item("zebras", reward=-0.9, answer="wrong", tokens=np.asarray([5, 9, 9, 7, 2], np.int32))
    found = gather.proposed(sources(policy, [*known, asked]), proposing)
    assert [answer.text for answer in found if answer.episode == "zebras"] == ["zebra"]


def test_a_correction_stands_above_any_belief(policy: Policy):
    believing = made(**WITH_ROLLOUTS, replay={"believed": 1.0})
    guess = Answer(Sample((1,), (8,)), "fresh", "a", belief=0.99, weight=1.0)
    told = Answer(Sample((1,), (9,)), "corrected", "a", replay=1.0)
    assert gather.believed([guess], believing, [told]) == []
    assert len(gather.believed([guess], believing, [replace(told, source="rated")])) == 1


def test_prompts_whose_answers_are_equally_good_teach_ppo_nothing():
    def rollout(prompt: int, reward: float) -> Answer:
        return Answer(Sample((prompt,), (7,)), "fresh", str(prompt), reward=reward, weight=0.5)

    alike, apart = [rollout(1, 0.5), rollout(1, 0.6)], [rollout(2, 0.5), rollout(2, -0.5)]
    assert gather.informative([*alike, *apart], made(rollouts={"spread": 0.2, "prompts": 2})) == apart


def test_ppo_may_leave_prompts_to_replay_whose_answer_is_told() -> None:
    first, second = ([replace(fresh_of(prompt), reward=reward) for reward in (0.5, -0.5)] for prompt in (1, 2))
    told = [Answer(Sample((1,), (9,)), "believed", "1", replay=1.0)]
    assert gather.informative([*first, *second], made(ppo={"settled": False}), told) == second
    assert gather.informative([*first, *second], made(), told) == [*first, *second]


def fresh_of(prompt: int) -> Answer:
    return Answer(Sample((prompt,), (7,)), "fresh", str(prompt), weight=0.5)
