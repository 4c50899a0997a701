"""What a provider answered teaches the reward model and replay, and never PPO; what the engine answered teaches all."""

from __future__ import annotations

from typing import Any

import pytest
from everloop import wire
from everloop.config import Config, TrainConfig
from everloop.event import PROVIDER, CallTokens, Message, Sampling
from everloop.home import Home
from everloop.score import Score
from everloop.topics import EPISODES, SCORES

from pipelines.batch import select
from reward.handler import RewardHandler
from trainer import gather, recipe
from trainer.gather import Sources
from trainer.packing import Sample
from trainer.policy.base import Policy

pytestmark = pytest.mark.models
ANSWER = "lost_card"


def scores_of(handler: RewardHandler, loop: Any, episodes: list[Any]) -> list[Score]:
    for episode in episodes:
        handler.handle(loop.state, loop.place(EPISODES.name, episode.key, wire.encode(episode), episode.updated), 0.0)
    outputs = handler.flush(loop.state, 0.0)
    return [wire.decode(Score, record.value) for record in outputs if record.topic == SCORES.name]


def test_a_providers_answers_reach_scorer_and_replay_and_never_ppo(
    loop: Any, make: Any, home: Home, letters: Any, policy: Policy
) -> None:
    """By who answered alone: all were asked alike, and liked by somebody. One pretends to have token ids."""
    asked = {name: [{"role": "user", "content": f"my {name} is gone"}] for name in ("card", "purse", "phone")}
    prompts = {name: tuple(policy.encode_chat(messages)) for name, messages in asked.items()}
    completion = tuple(policy.encode_answer(ANSWER))

    def tokens(name: str) -> CallTokens:
        return CallTokens(prompt=prompts[name], completion=completion, logprobs=[-0.5] * len(completion))

    theirs = {"policy_version": PROVIDER, "model": "gpt-4.1-mini"}
    answered = {
        "card": {"tokens": tokens("card")},
        "purse": {"tokens": None, **theirs},
        "phone": {"tokens": tokens("card"), **theirs},
    }
    events = []
    for name, fields in answered.items():
        messages = tuple(Message.model_validate(message) for message in asked[name])
        call = make.call(name, answer=ANSWER, messages=messages, sampling=Sampling(temperature=1.0), **fields)
        events += [make.event(call, episode=f"ep_{name}")]
        events += [make.event(make.thumb(call=name), name=f"t-{name}", episode=f"ep_{name}")]
    episodes = loop.take(*events)
    config = Config.model_validate({"home": home.root, "tenants": {"acme": {"policies": {"desk": {}}}}})
    scores = scores_of(RewardHandler(config, home, lambda name: letters), loop, episodes)
    newest = {score.call: score for score in scores}
    assert {name: (score.label, score.mask) for name, score in newest.items()} == dict.fromkeys(asked, (1.0, True))

    loop.keep(scores)
    batch = select(loop.store, "acme", "desk", TrainConfig(min_scored=1))
    assert {item.call: item.policy_version for item in batch.items} == {
        "card": "base",
        "purse": PROVIDER,
        "phone": PROVIDER,
    }
    assert {item.call: item.tokens is None for item in batch.items} == {"card": False, "purse": True, "phone": True}
    sources = Sources(batch, policy, judge=None)
    made = recipe.parse({"name": "x"}, "test")
    assert [(answer.episode, answer.weight) for answer in gather.logged(sources, made)] == [("ep_card", 1.0)]
    told = {answer.episode: (answer.sample, answer.weight) for answer in gather.remembered(sources, made)}
    assert told == {f"ep_{name}": (Sample(prompts[name], completion), 0.0) for name in asked}, "in our own template"


def test_who_answered_can_be_asked_in_sql(loop: Any, make: Any) -> None:
    loop.take(make.event(make.call("p1", tokens=None, policy_version=PROVIDER, model="gpt-4.1-mini")))
    (row,) = loop.store.rows("SELECT policy_version, model, support_known FROM turns")
    assert (row["policy_version"], row["model"]) == (PROVIDER, "gpt-4.1-mini")
