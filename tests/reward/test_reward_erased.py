"""Somebody who is deleted in the middle of the stream: every word of theirs goes, and nothing of them stays."""

from typing import Any

import numpy as np
import pytest
from everloop.config import Config
from everloop.episode import Episode
from everloop.feedback import Feedback
from everloop.home import Home
from everloop.score import Score

from reward.handler import RewardHandler
from reward.poison import name_of
from tests.reward.conftest import run

GONE = "r-gone"


def told_of(one: Episode, name: int, kit: Any) -> Episode:
    """An episode that the one to go rated, corrected and commented on, beside whoever rated it anyhow."""
    turn = one.turns[-1]
    about = {"rater": GONE, "time": 12.0}
    words = (
        kit.thumb(-1, f"g{name}", 12.0, rater=GONE),
        Feedback(id=f"gc{name}", kind="correction", text="pin desk", **about),
        Feedback(id=f"gw{name}", kind="comment", text="this is of no use", **about),
    )
    return one.model_copy(update={"turns": (turn.model_copy(update={"feedback": (*turn.feedback, *words)}),)})


def test_who_is_deleted_in_the_middle_of_the_stream_leaves_nothing(tmp_path: Any, words: Any, kit: Any) -> None:
    def learned(name: str, stream: list[Episode]) -> tuple[Any, list[Score]]:
        home = Home(tmp_path / name)
        handler = RewardHandler(Config(home=home.root), home, lambda _: words)
        outputs = run(handler, state := kit.MemoryState(), kit.records(*stream))
        again = RewardHandler(Config(home=home.root), home, lambda _: words)
        again.flush(state, 0.0)  # what a restart takes up
        return again._desks["default", "assistant"], kit.decoded(Score, outputs, "scores")

    traffic = kit.desk_traffic(90)
    theirs = {i: told_of(traffic[i], i, kit) for i in range(3, 60, 7)}
    spoken = [theirs.get(i, one) for i, one in enumerate(traffic[:60])]
    deleted = [traffic[i].model_copy(update={"version": traffic[i].version + 10}) for i in theirs]
    there, scores = learned("there", [*spoken, *deleted, *traffic[60:]])
    never, _ = learned("never", traffic)
    still, _ = learned("still", [*spoken, *traffic[60:]])

    name = name_of("rater", GONE)
    assert name in still.guard.shares(), "they weighed something while they were there"
    assert name not in there.guard.shares()
    kept = [*there.guard.held.values(), *there.guard.taught.kept.values()]
    assert not any(GONE.encode() in one for one in kept)
    newest = {score.call: score for score in scores}
    for i in theirs:
        call = traffic[i].turns[-1].call.id
        told = [score for score in scores if score.call == call]
        assert len(told) > 1, "its answer is scored anew without their word"
        assert newest[call].label == (1.0 if traffic[i].turns[-1].feedback[0].value == 1 else 0.0)
    assert there.live.seen == never.live.seen
    for table in ("good", "bad"):
        of = {key: getattr(there.live.prototypes, table)[:, row] for key, row in there.live.prototypes.rows.items()}
        for key, row in never.live.prototypes.rows.items():
            np.testing.assert_allclose(of.pop(key), getattr(never.live.prototypes, table)[:, row], atol=0.15)
        assert all(not left.any() for left in of.values())
    weights = [
        sum(desk.live.reservoir.lesson(slot).weight for slot in range(len(desk.live.reservoir)))
        for desk in (there, never)
    ]
    assert weights[0] == pytest.approx(weights[1], rel=0.02), "nothing of theirs is replayed"
