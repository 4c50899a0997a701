"""Rollouts in the store: queryable, marked, whole or absent, and never taken for what people saw."""

from __future__ import annotations

import pytest
from everloop.config import TrainConfig
from everloop.errors import ContractError, NotEnoughData

from pipelines import archive, rollouts
from pipelines.batch import select
from pipelines.rollouts import Round
from pipelines.store import Store

ROUND = Round(
    tenant="acme",
    policy="desk",
    run="run_1",
    round=0,
    steps=0,
    parent="base",
    batch="batch_1",
    reward_version="rv1",
    time=1_763_900_000.0,
)
ROW = {
    "episode": "ep_1",
    "turn": 0,
    "subject": "sue",
    "prompt": "Where is my card?",
    "answer": "card_arrival",
    "reward": 0.5,
    "belief": 0.75,
    "mask": True,
    "count": 3,
    "samples": 4,
    "temperature": 1.0,
    "prompt_tokens": [1, 5],
    "tokens": [7, 2],
    "logprobs": [-0.5, -0.25],
}


def test_rollouts_are_a_view_of_their_own(loop, make):
    loop.take(make.event(make.call()))
    rollouts.keep(loop.store.folder, ROUND, [ROW, {**ROW, "answer": "lost_card", "count": 1, "reward": -0.5}])
    first, second = loop.store.rows("SELECT * FROM rollouts ORDER BY number")
    assert {name: first[name] for name in ROW} == ROW
    assert {name: first[name] for name in ROUND._fields} == ROUND._asdict()
    assert (first["synthetic"], first["policy_version"], second["answer"]) == (True, "base", "lost_card")
    joined = "SELECT t.answer AS said, r.answer FROM rollouts r JOIN turns t USING (tenant, policy, episode, turn)"
    assert loop.store.rows(f"{joined} ORDER BY number")[1] == {"said": "card_arrival", "answer": "lost_card"}
    for view in ("episodes", "turns", "trajectories", "events"):
        assert loop.store.rows(f"SELECT count(*) AS n FROM {view}") == [{"n": 1}]


def test_after_a_step_it_is_the_policy_in_training_that_answers():
    assert ROUND._replace(parent="abc").policy_version == "abc"
    assert ROUND._replace(round=1, steps=40).policy_version == "run_1@40"


def test_a_round_that_is_drawn_again_is_there_once(home, monkeypatch):
    store = Store(home.root / "store")
    rollouts.keep(store.folder, ROUND, [ROW])
    rollouts.keep(store.folder, ROUND, [ROW])
    rollouts.keep(store.folder, ROUND._replace(round=1, steps=8), [ROW])
    for number in range(8):
        rollouts.keep(store.folder, ROUND._replace(run=f"run_{number + 2}"), [ROW])
    assert store.compact(grace=0, min_files=2) == 10
    rollouts.keep(store.folder, ROUND, [ROW])  # killed after the file, resumed after it was folded away
    assert store.rows("SELECT count(*) AS n FROM rollouts WHERE run = 'run_1'") == [{"n": 2}]
    assert store.rows("SELECT count(*) AS n FROM rollouts") == [{"n": 10}]


def test_killed_while_it_is_written_nothing_of_it_is_there(home, monkeypatch):
    store = Store(home.root / "store")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(archive, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            rollouts.keep(store.folder, ROUND, [ROW])
    assert store.rows("SELECT * FROM rollouts") == []
    assert [path for path in store.folder.rglob("*") if path.is_file()] == []


def test_nothing_is_trained_on_that_only_a_policy_said(home):
    store = Store(home.root / "store")
    rollouts.keep(store.folder, ROUND, [ROW] * 5)
    with pytest.raises(NotEnoughData, match="has 0 scored episodes"):
        select(store, "acme", "desk", TrainConfig(min_scored=1))


def test_a_tenant_that_is_no_name_is_refused(home):
    with pytest.raises(ContractError, match="is not a name"):
        rollouts.keep(home.root / "store", ROUND._replace(tenant="../x"), [ROW])
