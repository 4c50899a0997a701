"""Batches: what is drawn, what never is, nobody too heavy, the same again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from everloop.config import TrainConfig
from everloop.errors import ContractError, NotEnoughData
from everloop.event import CallTokens, Ended, Message, Sampling
from everloop.run import RewardVersion
from everloop.topics import REWARDS

from pipelines.batch import Batch, _Drawn, _most, capped, select
from pipelines.gold import GoldItem, GoldSet

TRAIN = TrainConfig(min_scored=1)


def captured(loop, make, count, **fields):
    """Episodes of one call each, a second apart, with their scores."""
    events = [
        make.event(
            make.call(f"c{n}", asked=f"question {'x' * n}", **fields),
            episode=f"ep_{n:03}",
            subject=f"s{n}",
            time=1_763_900_000.0 + n,
        )
        for n in range(count)
    ]
    return loop.take(*events)


def score_all(loop, make, episodes, **fields):
    loop.keep([make.score(one, turn.call.id, **fields) for one in episodes for turn in one.turns])


def test_items_carry_what_training_needs(loop, make):
    call = make.call(sampling=Sampling(temperature=0.7), policy_version="hash1", tools=({"type": "function"},))
    (episode,) = loop.take(make.event(call, subject="sue"), make.event(make.correction("card_lost")))
    loop.keep([make.score(episode, reward=-0.5, source="feedback", label=0.0)])
    batch = select(loop.store, "acme", "desk", TRAIN)
    (item,) = batch.items
    assert (item.episode, item.version, item.call, item.subject) == ("ep_1", 2, "c1", "sue")
    assert item.prompt_messages == [{"role": "user", "content": "Where is my card?"}]
    assert (item.answer, item.correction, item.tools) == ("card_arrival", "card_lost", [{"type": "function"}])
    assert (item.reward, item.mask, item.source, item.label) == (-0.5, True, "feedback", 0.0)
    assert (item.policy_version, item.temperature, item.trainable) == ("hash1", 0.7, True)
    assert (item.turn, item.turns, item.span) == (0, 1, (2, 4))
    assert item.tokens.tolist() == [1, 5, 7, 2]
    assert item.tokens.dtype == np.int32
    assert item.logprobs.tolist() == [0, 0, -0.5, -0.25]
    assert item.logprobs.dtype == np.float32
    assert (batch.tenant, batch.policy, batch.reward_version) == ("acme", "desk", "rv1")


def test_an_item_carries_its_tool_calls(loop, make, home):
    asked = {"id": "t", "type": "function", "function": {"name": "block", "arguments": "{}"}}
    call = make.call().model_copy(update={"output": Message(role="assistant", tool_calls=[asked])})
    score_all(loop, make, loop.take(make.event(call)))
    batch = select(loop.store, "acme", "desk", TRAIN)
    (item,) = Batch.load(batch.save(home.folder("batches"))).items
    assert (item.answer, item.tool_calls, item.said) == ("", [asked], "block({})")


def test_a_batch_of_words_keeps_the_name_that_it_had_before_there_were_tool_calls(loop, make, home):
    score_all(loop, make, captured(loop, make, 1))
    path = select(loop.store, "acme", "desk", TRAIN).save(home.folder("batches"))
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["tool_calls"]), path)
    assert Batch.load(path).items[0].tool_calls == []


def test_an_item_carries_how_its_episode_was_foretold_to_end_and_a_batch_without_keeps_its_name(loop, make, home):
    episodes = captured(loop, make, 2)
    score_all(loop, make, episodes)
    plain = select(loop.store, "acme", "desk", TRAIN)
    assert [item.ends_well for item in plain.items] == [None, None]
    without = replace(plain, items=[replace(item, ends_well=0.25) for item in plain.items])
    assert without.id != plain.id
    path = plain.save(home.root)
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["ends_well"]), path)  # as it was written before batches held them
    assert Batch.load(path).id == plain.id
    score_all(loop, make, episodes, ends_well_before=0.25, ends_well_after=0.5, version=9)
    foretold = select(loop.store, "acme", "desk", TRAIN)
    assert [item.ends_well for item in foretold.items] == [0.25, 0.25]
    assert Batch.load(foretold.save(home.root)).items[0].ends_well == 0.25


def test_a_later_turn_has_the_tokens_up_to_its_own_end(loop, make):
    first = make.call("a", tokens=CallTokens(prompt=[1], completion=[2], logprobs=[-0.5]))
    second = make.call("b", tokens=CallTokens(prompt=[1, 2, 3], completion=[4], logprobs=[-1.0]))
    episodes = loop.take(make.event(first, seq=0), make.event(second, seq=1), make.event(Ended(), "end"))
    score_all(loop, make, episodes)
    one, two = select(loop.store, "acme", "desk", TRAIN).items
    assert (one.tokens.tolist(), one.span) == ([1, 2], (1, 2))
    assert (two.tokens.tolist(), two.logprobs.tolist(), two.span) == ([1, 2, 3, 4], [0, -0.5, 0, -1.0], (3, 4))
    assert [(item.turn, item.turns) for item in (one, two)] == [(0, 2), (1, 2)]


def test_calls_without_tokens_serve_replay_alone(loop, make):
    score_all(loop, make, captured(loop, make, 1, tokens=None))
    (item,) = select(loop.store, "acme", "desk", TRAIN).items
    assert (item.tokens, item.logprobs, item.span, item.trainable) == (None, None, None, False)


def test_the_same_store_gives_the_same_batch_and_a_file_gives_it_back(loop, make, home):
    score_all(loop, make, captured(loop, make, 5))
    batch = select(loop.store, "acme", "desk", TRAIN)
    loop.store.compact(grace=0, min_files=2)
    assert select(loop.store, "acme", "desk", TRAIN).id == batch.id
    path = batch.save(home.folder("batches"))
    assert path.name == f"{batch.id}.parquet"
    again = Batch.load(path)
    assert again.id == batch.id
    assert [item.tokens.tolist() for item in again.items] == [item.tokens.tolist() for item in batch.items]
    assert (again.items[0].prompt_messages, again.scored_by) == (batch.items[0].prompt_messages, batch.scored_by)
    score_all(loop, make, captured(loop, make, 6))
    assert select(loop.store, "acme", "desk", TRAIN).id != batch.id


def test_a_file_that_is_not_what_its_name_says_is_refused(loop, make, home):
    score_all(loop, make, captured(loop, make, 2))
    path = select(loop.store, "acme", "desk", TRAIN).save(home.folder("batches"))
    other = path.with_name("batch_0000.parquet")
    other.write_bytes(path.read_bytes())
    with pytest.raises(ContractError, match="does not hold the batch that its name says"):
        Batch.load(other)
    path.write_bytes(b"garbage")
    with pytest.raises(ContractError, match="is not a batch"):
        Batch.load(path)
    with pytest.raises(ContractError, match="is not a batch"):
        Batch.load(home.root / "nowhere.parquet")


def test_only_what_may_be_trained_on_is_drawn(loop, make):
    good = make.event(make.call("good"), episode="ep_good")
    never = [
        make.event(make.call("rollout"), episode="ep_synthetic", synthetic=True),
        make.event(make.call("failed", error="timeout"), episode="ep_failed"),
        make.event(
            make.call("doubt", tokens=CallTokens(prompt=[1], completion=[2], logprobs=[-1], checked=False)),
            episode="ep_doubt",
        ),
        make.event(make.call("clerks"), episode="ep_clerk", policy="clerk"),
        make.event(make.call("others"), episode="ep_other", tenant="other"),
    ]
    episodes = loop.take(good, *never, make.event(make.call("unscored"), episode="ep_unscored"))
    score_all(loop, make, [one for one in episodes if one.id != "ep_unscored"])
    assert [item.call for item in select(loop.store, "acme", "desk", TRAIN).items] == ["good"]


def test_near_duplicates_of_gold_are_left_out_also_where_they_became_gold_later(loop, make, home):
    score_all(loop, make, captured(loop, make, 3))
    gold = GoldSet(home.root / "gold")
    gold.add("acme", "desk", [GoldItem.of("Question: XX!", "a", split="report")])
    batch = select(loop.store, "acme", "desk", TRAIN, gold=gold.keys("acme", "desk"))
    assert [item.call for item in batch.items] == ["c0", "c1"]
    assert batch.left_out == {"near-duplicates of gold items": 1}


def test_the_newest_episodes_make_the_window(loop, make):
    score_all(loop, make, captured(loop, make, 6))
    batch = select(loop.store, "acme", "desk", TrainConfig(min_scored=1, window=2))
    assert [item.call for item in batch.items] == ["c4", "c5"]


def test_too_little_says_how_much_is_missing(loop, make):
    with pytest.raises(NotEnoughData, match=r"acme/desk has 0 scored episodes to train on, 200 fewer than the 200"):
        select(loop.store, "acme", "desk", TrainConfig())
    score_all(loop, make, captured(loop, make, 3))
    with pytest.raises(NotEnoughData, match="has 3 scored episodes to train on, 7 fewer than the 10"):
        select(loop.store, "acme", "desk", TRAIN, minimum=10)


def test_opinions_come_from_one_version_and_people_need_none(loop, make):
    episodes = captured(loop, make, 3)
    score_all(loop, make, episodes[:1], reward=0.25, reward_version="old")
    score_all(loop, make, episodes[1:2], reward=1.0, reward_version="old", source="feedback", label=1.0)
    score_all(loop, make, episodes[2:], reward=0.5, reward_version="new")
    loop.keep([RewardVersion(tenant="acme", policy="desk", version="new", path="", updates=1, time=1.0)], REWARDS.name)
    asked = []

    def rescore(items):
        asked.extend(item.call for item in items)
        return [(-0.75, False) for _ in items]

    batch = select(loop.store, "acme", "desk", TRAIN, rescore=rescore)
    assert asked == ["c0"]
    assert [(item.reward, item.mask) for item in batch.items] == [(-0.75, False), (1.0, True), (0.5, True)]
    assert (batch.reward_version, batch.scored_by) == ("new", {"feedback": 1, "new": 2})
    unasked = select(loop.store, "acme", "desk", TRAIN)
    assert [item.mask for item in unasked.items] == [False, True, True]  # what another version thinks does not count
    assert unasked.scored_by == {"feedback": 1, "new": 1}


def test_a_pinned_version_is_preferred_to_a_newer_one(loop, make):
    episodes = captured(loop, make, 1)
    score_all(loop, make, episodes, reward=0.25, reward_version="rv1")
    score_all(loop, make, episodes, reward=0.5, reward_version="rv2")
    assert select(loop.store, "acme", "desk", TRAIN).items[0].reward == 0.5
    assert select(loop.store, "acme", "desk", TRAIN, reward_version="rv1").items[0].reward == 0.25


def drawn(subjects, raters=()):
    return [_Drawn(f"ep_{n}", subject, tuple(raters), []) for n, subject in enumerate(subjects)]


def subject_of(one):
    return () if one.subject is None else (one.subject,)


def test_no_subject_holds_more_than_a_hundredth_where_there_are_many():
    episodes = drawn(["heavy"] * 400 + [f"s{n}" for n in range(400)])
    kept = capped(episodes, subject_of)
    heavy = [one.episode for one in kept if one.subject == "heavy"]
    assert len(heavy) <= 0.01 * len(kept)
    assert len(heavy) + 1 > 0.01 * (len(kept) + 1)  # and no fewer than allowed
    assert heavy == [f"ep_{n}" for n in range(400 - len(heavy), 400)]  # the newest ones
    assert len(kept) - len(heavy) == 400


def test_few_people_may_each_hold_three_equal_shares():
    kept = capped(drawn(["heavy"] * 90 + [f"s{n % 9}" for n in range(90)]), subject_of)
    heavy = sum(one.subject == "heavy" for one in kept)
    assert heavy <= 0.3 * len(kept)
    assert heavy > 30
    assert len(capped(drawn(["only"] * 50), subject_of)) == 50


def test_nobodys_episodes_are_not_capped():
    assert len(capped(drawn([None] * 500), subject_of)) == 500
    kept = capped(drawn([None] * 500 + ["heavy"] * 500 + [f"s{n}" for n in range(400)]), subject_of)
    assert sum(one.subject is None for one in kept) == 500
    assert sum(one.subject == "heavy" for one in kept) <= 0.01 * len(kept)


def test_a_share_can_always_be_kept():
    assert _most([5] * 300, 0, 0.01) == 5
    assert _most([1000, *[1] * 299], 0, 0.01) == 3
    assert _most([7, 1, 1], 0, 1.0) == 7


def test_raters_are_capped_like_subjects(loop, make):
    events = []
    for n in range(40):
        rater = "heavy" if n < 20 else f"r{n}"
        events.append(
            make.event(make.call(f"c{n}", asked="q" + "x" * n), episode=f"ep_{n:02}", time=1_763_900_000.0 + n)
        )
        events.append(make.event(make.thumb(1, f"c{n}", id=f"t{n}", rater=rater), episode=f"ep_{n:02}"))
    score_all(loop, make, loop.take(*events))
    batch = select(loop.store, "acme", "desk", TRAIN)
    heavy = sum("heavy" in item.raters for item in batch.items)
    assert 0 < heavy <= 3 / 21 * len(batch.items)
    assert batch.left_out == {"beyond the share of one person": 20 - heavy}
