"""The airline replay's parts: what a recording becomes, and how scores are compared with outcomes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from examples.airline_replay import evaluation, recorded
from examples.airline_replay.evaluation import Judged
from examples.airline_replay.recorded import Call, RecordingError, ToolAnswer

ASKS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": "{}"}}],
}
MESSAGES = (
    {"role": "system", "content": "rules"},
    {"role": "user", "content": "hello"},
    ASKS,
    {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "Error: no such user"},
    {"role": "assistant", "content": "sorry"},
)


def test_an_episode_becomes_calls_and_tool_answers_in_order() -> None:
    first, tool, last = recorded.events(MESSAGES)
    assert first == Call(MESSAGES[:2], ASKS)
    assert tool == ToolAnswer("f", "{}", "Error: no such user", error=True)
    assert last == Call(MESSAGES[:4], MESSAGES[4])


def test_another_file_is_refused_and_an_absent_one_explained(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="curl -fL"):
        recorded.find(None, tmp_path, {})
    (tmp_path / "own.json").write_text("[]")
    with pytest.raises(RecordingError, match="SHA-256"):
        recorded.read(recorded.find(tmp_path / "own.json", tmp_path, {}))


@pytest.mark.skipif(not os.environ.get("EVERLOOP_DATA"), reason="EVERLOOP_DATA is not set: no recording was read")
def test_the_recording_is_read_whole(tmp_path: Path) -> None:
    episodes = recorded.read(recorded.find(None, tmp_path))
    assert (len(episodes), len({one.task for one in episodes})) == (200, 50)
    assert len({(one.task, one.trial) for one in episodes}) == 200
    assert sum(one.outcome for one in episodes) == 84
    assert sum(len(list(recorded.events(one.messages))) for one in episodes) == 2454 + 1164


def test_auc_by_hand() -> None:
    assert evaluation.auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert evaluation.auc([0.5, 0.5], [0, 1]) == 0.5
    assert evaluation.either_way([0.9, 0.1], [0, 1]) == 1.0
    with pytest.raises(ValueError, match="solved and unsolved"):
        evaluation.auc([0.1, 0.2], [1, 1])


def test_trials_of_a_task_are_one_block() -> None:
    made = evaluation.blocks([3, 1, 2, 1, 3], 2, seed=0)
    assert sorted(task for block in made for task in block) == [1, 2, 3]
    assert [len(block) for block in made] == [2, 1]
    assert evaluation.blocks(range(50), 5, seed=0) != evaluation.blocks(range(50), 5, seed=1)


def test_only_the_first_score_of_a_call_counts() -> None:
    rows = [{"call": "a", "version": 7, "value": 0.9}, {"call": "a", "version": 3, "value": 0.2}]
    assert evaluation.first_scores([*rows, {"call": "b", "version": 1, "value": 0.5}]) == {"a": 0.2, "b": 0.5}


def test_the_table_has_the_baselines_beside_it() -> None:
    judged = [Judged(task, float(task % 2), 0.3 + 0.4 * (task % 2), 10 + task, 3) for task in range(20)]
    lines = evaluation.table(judged, skipped=20, seed=0).splitlines()
    assert "20 episodes of 20 tasks, 10 solved (20 more" in lines[0]
    assert "reward model          1.000  (95% 1.000 to 1.000)" in lines[1]
    assert "episode length" in lines[2]
    assert "number of tool calls  0.500" in lines[3]
