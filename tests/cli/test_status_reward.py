"""What 'everloop status' says of a reward model: how good it is, who keeps it, and which guards acted."""

from __future__ import annotations

from typing import Any

from services.commands.status import _reward

ITS: dict[str, Any] = {
    "version": "0123456789abcdef",
    "auc": 0.91,
    "calibration_error": 0.04,
    "labels": 600,
    "shadow_labels": 7,
}


def test_a_reward_model_that_nothing_happened_to_has_two_lines() -> None:
    quiet = {
        "snapshots_refused": 0,
        "snapshots_waited": 0,
        "pinned": None,
        "poison": {"quarantined": {}},
        "drift": None,
        "frozen": False,
    }
    assert list(_reward(ITS | quiet)) == [
        "  reward model  0123456789ab: 7 labels since it scores, too few for an AUC of its own",
        "                the live one: AUC 0.910, calibration error 0.040, 600 labels",
    ]


def test_how_good_the_version_that_scores_is_stands_apart_from_the_live_one() -> None:
    first, second = _reward(ITS | {"scoring_auc": 0.88, "shadow_labels": 71})
    assert first == "  reward model  0123456789ab: AUC 0.880 on 71 labels since it scores"
    assert "the live one: AUC 0.910" in second


def test_what_did_not_take_over_who_keeps_it_and_what_guards_did_is_told() -> None:
    changed = {"snapshots_refused": 3, "snapshots_waited": 2, "pinned": "by ada: it likes lists", "frozen": True}
    guards = {"poison": {"quarantined": {"duplicate": 2}, "taken_back": 3}, "drift": "what is asked has changed 1x"}
    _, first, *more = _reward(ITS | changed | guards)
    assert first.endswith("600 labels, 3 versions refused, 2 versions waited")
    assert [line.strip() for line in more] == [
        "kept by ada: it likes lists; 'everloop reward resume' ends that",
        "words held: 2 x duplicate, 3 x taken back",
        "what is asked has changed 1x; its opinions are kept from training for now",
    ]
