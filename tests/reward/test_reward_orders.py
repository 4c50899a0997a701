"""Orders about which version scores: obeyed where they were given, kept, and the same after a restart or a rebuild."""

import numpy as np
import pytest
from everloop.config import Config
from everloop.run import Command, RewardVersion
from everloop.score import Score

from reward.handler import RewardHandler
from tests.reward.conftest import run


@pytest.fixture
def ordered():
    """The orders that the log has; a test adds to it."""
    return []


@pytest.fixture
def new_handler(home, words, ordered):
    config = Config.model_validate({"home": home.root, "tenants": {"default": {}}})
    return lambda: RewardHandler(config, home, lambda name: words, lambda *pair: list(ordered))


def order(kind, after, version=None, number=1):
    arguments = {"version": version, "reason": "it likes lists", "after": {"episodes/0": after}}
    about = {"tenant": "default", "policy": "assistant", "by": "ada", "time": 1000.0 + number}
    return Command(id=f"cmd_{number}", kind=f"reward-{kind}", arguments=arguments, **about)


def announced(kit, outputs):
    return kit.decoded(RewardVersion, outputs, "reward-versions")


def scored_by(kit, outputs):
    return [score.reward_version for score in kit.decoded(Score, outputs, "scores")]


def test_a_rollback_scores_from_where_it_was_given_and_no_snapshot_takes_over_until_resume(new_handler, ordered, kit):
    records, handler, state = kit.records(*kit.desk_traffic(400)), new_handler(), kit.MemoryState()
    early = announced(kit, run(handler, state, records[:200]))
    whole = [one for one in early if one.state == "released"]
    first = [one.version for one in whole]
    ordered.append(order("rollback", 210, first[-2]))
    outputs = run(handler, state, records[200:300])
    assert scored_by(kit, outputs) == [first[-1]] * 10 + [first[-2]] * 90
    left, back, *later = announced(kit, outputs)
    assert (left.version, left.state, back.version, back.state) == (first[-1], "refused", first[-2], "released")
    assert "ada: it likes lists" in back.reason
    assert back.evidence["order"] == "cmd_1"
    assert (back.updates, back.auc, back.offsets) == (whole[-2].updates, whole[-2].auc, whole[-2].offsets)
    assert [one.state for one in later] == ["refused", "refused"]
    assert "is kept by ada" in later[-1].reason
    status = handler.status()["default/assistant"]
    assert status["pinned"] == "by ada: it likes lists"
    assert status["snapshots_refused"] + status["snapshots_waited"] == len(early) - len(whole) + len(later)
    assert status["snapshots_waited"] >= 1, "the one that a person keeps back"
    assert status["snapshots_waited"] == sum(one.waits for one in (*early, *later))
    assert handler.office.answers["cmd_1"]["done"]
    ordered.append(order("resume", 300, number=2))
    again = announced(kit, run(handler, state, records[300:]))
    assert again[0].version == first[-2]
    assert any(one.state == "released" and one.version != first[-2] for one in again[1:])
    assert handler.status()["default/assistant"]["pinned"] is None


def test_a_restart_keeps_it_and_a_rebuild_obeys_at_the_same_place(new_handler, ordered, kit):
    records, state = kit.records(*kit.desk_traffic(300)), kit.MemoryState()
    lived = run(new_handler(), state, records[:200])
    first = [one.version for one in announced(kit, lived) if one.state == "released"]
    ordered.append(order("rollback", 200, first[1]))
    lived += run(new_handler(), state, records[200:260])
    restarted = new_handler()
    assert restarted.flush(state, 0.0) == []
    lived += run(restarted, state, records[260:])
    assert set(scored_by(kit, lived)[200:]) == {first[1]}
    rebuilt = run(new_handler(), kit.MemoryState(), records, batch=33)
    assert announced(kit, rebuilt) == announced(kit, lived)
    assert scored_by(kit, rebuilt) == scored_by(kit, lived)


def test_without_traffic_an_order_is_obeyed_once_all_before_it_was_taken(new_handler, ordered, kit):
    records, handler, state = kit.records(*kit.desk_traffic(160)), new_handler(), kit.MemoryState()
    first = announced(kit, run(handler, state, records[:150]))
    ordered.append(order("rollback", 160, first[1].version))
    assert handler.flush(state, 0.0) == []
    run(handler, state, records[150:])
    assert handler.status()["default/assistant"]["version"] == first[1].version
    ordered.append(order("resume", 160, number=2))
    assert [one.version for one in announced(kit, handler.flush(state, 0.0))] == [first[1].version]
    assert handler.flush(state, 0.0) == [], "once"
    assert new_handler().flush(state, 0.0) == []


def test_a_refused_version_is_promoted_and_the_next_is_judged_beside_it(new_handler, ordered, kit):
    records, handler, state = kit.records(*kit.desk_traffic(400)), new_handler(), kit.MemoryState()
    first = announced(kit, run(handler, state, records[:200]))
    ordered.append(order("rollback", 200, first[1].version))
    refused = announced(kit, run(handler, state, records[200:300]))[-1]
    assert (refused.state, refused.waits) == ("refused", refused.reason.startswith("waits"))
    ordered.append(order("promote", 300, refused.version, number=2))
    (left, lifted, *later) = announced(kit, run(handler, state, records[300:]))
    assert (left.version, left.state) == (first[1].version, "released")
    assert left.reason.startswith("was kept by ada"), "until it was promoted over, and no longer until resume"
    assert f"{lifted.version} was promoted by ada" in left.reason
    assert "until" not in left.reason
    assert (lifted.version, lifted.state) == (refused.version, "released")
    assert lifted.updates == refused.updates
    assert not any("is kept by" in one.reason for one in later)


def test_what_cannot_score_is_answered_and_what_scored_goes_on(new_handler, ordered, kit, home):
    records, handler, state = kit.records(*kit.desk_traffic(260)), new_handler(), kit.MemoryState()
    run(handler, state, records[:200])
    before = handler.status()["default/assistant"]["version"]
    (desk,) = handler._desks.values()
    broken = desk.live
    broken.heads.shared[0, 0] = np.nan
    never = broken.save(home.root / "rewards/default/assistant")
    ordered.extend([order("rollback", 200, "0" * 16), order("promote", 200, never, number=2)])
    handler = new_handler()  # from the state, where nothing is broken
    outputs = run(handler, state, records[200:230])
    assert announced(kit, outputs) == []
    assert set(scored_by(kit, outputs)) == {before}
    assert [said["done"] for said in handler.office.answers.values()] == [False, False]
    assert "not finite" in handler.office.answers["cmd_2"]["says"]
