"""'everloop reward' and 'everloop explain' over a desk that was scored by the real handler, archived and read back."""

from __future__ import annotations

import contextlib
import getpass
import json
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
from everloop import wire
from everloop.cli.main import main
from everloop.config import Config, load
from everloop.episode import Episode, Turn
from everloop.event import Call, Message
from everloop.feedback import Feedback
from everloop.home import Home
from everloop.log import NewRecord, open_log

from pipelines.archive import Archive
from reward.handler import RewardHandler
from reward.snapshot import CODE_VERSION
from services import rewards
from services.scorer.ordered import Ordered
from services.stream import run_handler

THINGS = ("card", "loan", "rate", "pin")
VERBS = ("lost", "want", "about", "my", "help", "today", "again")


class Named:
    """The letters' encoder, wherever one is asked for by name."""

    def __init__(self, letters: Any) -> None:
        self.letters = letters

    def __call__(self, name: str) -> Any:
        return self.letters


def episode(number: int) -> Episode:
    asked, answered = THINGS[number % 4], THINGS[(number * 7 + number // 4) % 4]
    thumb = Feedback(id=f"f{number}", kind="thumb", value=1 if asked == answered else -1, time=5.0, rater=f"r{number}")
    call = Call(
        id=f"c{number}",
        messages=(Message(role="user", content=f"{VERBS[number % 7]} {asked} {VERBS[number * 3 % 5]}"),),
        output=Message(role="assistant", content=f"{answered} desk"),
    )
    about = {"tenant": "default", "policy": "assistant", "started": float(number + 1), "updated": float(number + 1)}
    return Episode(id=f"ep_{number:03d}", version=2, turns=(Turn(call=call, feedback=(thumb,)),), **about)


@pytest.fixture
def installation(home: Home, letters: Any, monkeypatch: pytest.MonkeyPatch) -> Config:
    path = home.folder() / "everloop.toml"
    path.write_text(f'home = "{home.root}"\n[tenants.default]\n')
    monkeypatch.setenv("EVERLOOP_CONFIG", str(path))
    monkeypatch.setattr(rewards, "Encoder", Named(letters))
    return load(path, {})


def taken(installation: Config, home: Home, letters: Any, made: list[Episode]) -> None:
    """Have episodes scored and filed."""
    log = open_log(installation)
    log.append([NewRecord("episodes", e.key, wire.encode(e), {"schema": "Episode"}, e.updated, e.route) for e in made])
    for handler in (RewardHandler(installation, home, lambda name: letters), Archive(home)):
        run_handler(handler, log, home.folder("state"), stop=threading.Event(), until_idle=True)
    log.close()


@pytest.fixture
def desk(installation: Config, home: Home, letters: Any) -> Home:
    """240 rated answers, scored and in the store."""
    taken(installation, home, letters, [episode(number) for number in range(240)])
    return home


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def ask(*words: str) -> tuple[int, str, str]:
        status = main(words)
        return (status, *capsys.readouterr())

    return ask


def listed(said: Callable[..., Any]) -> list[dict[str, Any]]:
    status, out, _ = said("reward", "list", "--json")
    assert status == 0
    return [json.loads(line) for line in out.splitlines()]


def test_every_version_is_listed_with_its_state_and_why(desk: Home, said: Callable[..., Any]) -> None:
    versions = listed(said)
    assert [one["updates"] for one in versions] == [0, 50, 100, 150, 200]
    assert [one["scores"] for one in versions].count(True) == 1
    assert all(one["reason"] for one in versions)
    status, out, _ = said("reward", "list")
    assert status == 0
    assert all(one["version"] in out and one["reason"] in out for one in versions)
    shown = {line.split()[1]: line.split()[2] for line in out.splitlines() if line.startswith("default/assistant")}
    for one in versions:
        state = "scores" if one["scores"] else "waits" if one["reason"].startswith("waits:") else one["state"]
        assert shown[one["version"]] == state
    assert "waits" in shown.values()


def test_the_report_has_what_was_foretold_by_slice_beside_the_version_before(
    desk: Home, said: Callable[..., Any], tmp_path: Any
) -> None:
    status, out, _ = said("reward", "report", "--json", "--plot", str(tmp_path / "reward.png"))
    assert status == 0
    report = json.loads(out)
    whole = report["slices"]["all"]["whole"]
    assert (whole["calls"], whole["labels"]) == (240, 240)
    assert 0.5 < whole["auc"] <= 1
    assert 0 <= whole["calibration_error"] < 0.3
    scored = [one["version"] for one in listed(said) if one["state"] == "released"]
    assert [report["version"], report["before"]] == scored[:-3:-1]
    each = [report["slices"]["all"][version]["labels"] for version in scored[-2:]]
    assert sum(each) < 240
    assert min(each) > 0
    assert "answer 'card desk'" in report["slices"]
    assert report["slices"].keys() & {"turn 4 and later"} == set()
    assert report["planted"][scored[-1]]["null"] == 1.0
    assert report["planted"][scored[-1]].keys() >= {"null", "refusal", "broken_tool"}
    believed = report["sources"][scored[-1]]["thumb"]
    assert believed["words"] > 0
    assert believed["up"] != believed["down"], "what this desk's thumbs were found to be worth, not what is supposed"
    assert (tmp_path / "reward.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    status, out, _ = said("reward", "report")
    assert status == 0
    assert "AUC" in out
    assert "planted pairs" in out
    assert all(f"how far each source is believed by {name}" in out for name in scored[-2:])
    assert out.count("answer 'card desk'") == 3, "all time, now and before"


def test_the_report_tells_topics_and_languages_apart_for_both_versions(desk: Home, said: Callable[..., Any]) -> None:
    report = json.loads(said("reward", "report", "--json")[1])
    parts, versions = report["slices"], (report["version"], report["before"])
    topics = {name: its for name, its in parts.items() if name.startswith("topic ")}
    assert len(topics) > 1
    assert sum(its["whole"]["calls"] for its in topics.values()) == 240
    asked = {f"{VERBS[n % 7]} {THINGS[n % 4]} {VERBS[n * 3 % 5]}" for n in range(240)}
    assert {name.partition(": ")[2].strip("'") for name in topics} <= asked, "each is named by a prompt that was asked"
    columns = {"auc", "calibration_error", "coverage", "drift", "length_correlation", "planted"}
    assert all(its[version].keys() >= columns for its in parts.values() for version in versions)
    planted = {name: its[versions[0]]["planted"] for name, its in topics.items()}
    assert any(share is not None and 0 <= share <= 1 for share in planted.values())
    assert 0 < parts["in English"]["whole"]["calls"] < 240, "such as 'about my card my'; most are in no language"
    assert set(report["sources"]) == set(versions)
    for name in versions:  # as a release with other features finds them
        path = desk.root / "rewards/default/assistant" / name / "model.json"
        path.write_text(path.read_text().replace(CODE_VERSION, "0" * 16).replace('"curve"', '"line"'))
    status, out, _ = said("reward", "report")
    assert (status, "topic 0" in out) == (0, False)
    assert all(f"{name} cannot be asked any more" in out for name in versions)
    assert out.count("is of another release of the reward model") == 2


def test_two_versions_are_compared_on_labels_new_to_both(desk: Home, said: Callable[..., Any]) -> None:
    versions = [one["version"] for one in listed(said)]
    status, out, _ = said("reward", "compare", versions[1], versions[3][:10], "--json", "--top", "3")
    assert status == 0
    found = json.loads(out)
    assert found["versions"] == [versions[1], versions[3]]
    assert found["new_to_both"]["labels"] == 240 - 150
    assert {one["turn"] for one in found["most"]} == {1}, "counted as 'explain' counts them"
    assert len(found["most"]) == 3
    apart = [abs(a - b) for a, b in (one["values"] for one in found["most"])]
    assert apart == sorted(apart, reverse=True)
    assert apart[0] > 0
    status, out, _ = said("reward", "compare", versions[1], versions[3])
    assert status == 0
    assert found["most"][0]["episode"] in out


def test_an_episode_is_explained_and_what_would_change_it(desk: Home, said: Callable[..., Any]) -> None:
    status, out, _ = said("explain", "ep_230", "--json")
    assert status == 0
    (turn,) = json.loads(out)["turns"]
    up = THINGS[230 % 4] == turn["answer"].split()[0]
    assert turn["label"] == float(up)
    (word,) = turn["words"]
    assert (word["source"], word["counts"], word["log_odds"] > 0) == ("thumb", True, up)
    assert abs(word["log_odds"]) != pytest.approx(math.log(19), abs=1e-3), "as learned, not as supposed"
    assert turn["declaration"]["version"] is None
    assert turn["held"] is None
    assert len(turn["neighbours"]) == 5
    assert "ep_230" not in {one["episode"] for one in turn["neighbours"]}
    changed = {one["said"]: one["reward"] for one in turn["if"]}
    assert changed["an outcome of 0"] == -1.0 < changed["one more thumb down"] < turn["reward"] < 1.0
    assert changed["one more thumb up"] > turn["reward"]
    logit = sum(value for _, value in turn["features"])
    assert (logit > 0) == (turn["opinion"]["value"] > 0.5)
    status, out, _ = said("explain", "ep_23", "--policy", "assistant")
    assert status == 2
    status, out, _ = said("explain", "ep_230")
    assert status == 0
    assert "one more thumb down" in out
    assert "no declaration: all words count" in out
    assert "rated" in out


def test_an_answer_is_explained_by_the_id_that_its_agent_got(
    home: Home, installation: Config, letters: Any, said: Callable[..., Any]
) -> None:
    name = home.ids.new_episode("default")
    ids = [home.ids.response("default", name, bytes([at] * 8)) for at in range(3)]
    calls = [home.ids.call_of(response) for response in ids[:2]]
    first = episode(0)
    turns = tuple(
        turn.model_copy(update={"call": turn.call.model_copy(update={"id": call})})
        for call, number in zip(calls, (0, 1), strict=True)
        for turn in episode(number).turns
    )
    taken(installation, home, letters, [first.model_copy(update={"id": name, "turns": turns})])
    for at, response in enumerate((ids[0], ids[1].replace("chatcmpl-", "resp_"))):
        (turn,) = json.loads(said("explain", response, "--json")[1])["turns"]
        assert turn["turn"] == at + 1
    assert len(json.loads(said("explain", name, "--json")[1])["turns"]) == 2
    status, _, error = said("explain", ids[2])
    assert (status, f"there is no answer {ids[2]!r} in the store" in error) == (2, True)
    assert "no such response" in said("explain", "chatcmpl-madeup")[2]


def test_what_another_version_scored_again_stands_beside_in_an_explanation(
    desk: Home, installation: Config, letters: Any, said: Callable[..., Any]
) -> None:
    (before,) = json.loads(said("explain", "ep_230", "--json")[1])["turns"]
    assert before["beside"] == []
    other = next(one["version"] for one in listed(said) if one["version"] != before["reward_version"])
    status, out, _ = said("replay", "--reward", other[:8])
    assert status == 0
    assert f"scores by reward model {other}, appended to the log; the store has them once 'everloop up' runs" in out
    taken(installation, desk, letters, [])
    (after,) = json.loads(said("explain", "ep_230", "--json")[1])["turns"]
    assert after["reward_version"] == other
    (beside,) = after["beside"]
    assert (beside["reward_version"], beside["value"]) == (before["reward_version"], before["value"])
    assert (
        f"beside      {before['reward_version']} scored the same: P(good) {before['value']:.3f}"
        in (said("explain", "ep_230")[1])
    )
    assert "nothing was to do" in said("replay", "--reward", other)[1]


def conversation(number: int) -> Episode:
    """Three turns, of which the second decides how the episode ends: that is measured."""
    good = number % 2 == 0
    things = THINGS[number // 2 % 4]
    said = ("how can i help", "xylophone quiz" if good else "bubble gum", "xenon quartz" if good else "bob mumbles")
    turns = []
    for at, answer in enumerate(said):
        asked = (Message(role="user", content=f"{VERBS[at]} {things}"),)
        turns.append(
            Turn(call=Call(id=f"t{number}-{at}", messages=asked, output=Message(role="assistant", content=answer)))
        )
    ended = Feedback(id=f"o{number}", kind="outcome", value=float(good), time=5.0)
    about = {"tenant": "default", "policy": "assistant", "started": float(number + 1), "updated": float(number + 1)}
    return Episode(id=f"co_{number:03d}", version=4, turns=tuple(turns), feedback=(ended,), **about)


def test_the_course_of_an_episode_is_told_and_how_well_ends_were_foretold(
    installation: Config, home: Home, letters: Any, said: Callable[..., Any]
) -> None:
    taken(installation, home, letters, [conversation(number) for number in range(160)])
    status, out, _ = said("explain", "co_150", "--json")
    assert status == 0
    course = json.loads(out)["course"]
    assert [one["turn"] for one in course] == [1, 2, 3]
    assert course[1]["after"] - course[1]["before"] > 0.1
    out = said("explain", "co_150")[1]
    assert f"P(ends well), as each turn came: {course[0]['before']:.2f} before turn 1; after turn 1: " in out
    assert "it rose most with turn 2, by 0." in out
    assert "it ended well, as was said of it: 1.00" in out
    out = said("explain", "co_151")[1]
    assert "it fell most with turn 2, by 0." in out
    assert "it ended badly, as was said of it: 0.00" in out
    assert "how it would end was not foretold" in said("explain", "co_000")[1]
    stages = json.loads(said("reward", "report", "--json")[1])["courses"]
    assert list(stages) == [
        "before the first answer",
        "a quarter of its turns",
        "half of them",
        "three quarters",
        "all of them",
    ]
    assert stages["before the first answer"]["auc"] < 0.7
    assert stages["a quarter of its turns"]["auc"] < 0.7
    assert stages["half of them"]["auc"] > 0.9
    assert stages["all of them"]["episodes"] > 60
    assert "how episodes end, foretold when each turn was new" in said("reward", "report")[1]
    status, out, _ = said("sql", "select count(ends_well_after) as known from scores where ends_well_before < 1")
    assert status == 0
    assert str(3 * stages["all of them"]["episodes"]) in out


def test_what_is_no_moment_of_an_episode_is_not_in_its_course(
    installation: Config, home: Home, letters: Any, said: Callable[..., Any]
) -> None:
    """A second answer to the same request, which nothing followed, and a call that failed."""
    first, second, third = conversation(151).turns
    sibling = second.model_copy(update={"call": second.call.model_copy(update={"id": "beside", "choice": 1})})
    failed = third.model_copy(update={"call": third.call.model_copy(update={"id": "failed", "error": "refused"})})
    odd = conversation(151).model_copy(update={"turns": (first, second, sibling, failed, third)})
    taken(installation, home, letters, [*(conversation(number) for number in range(150)), odd])
    course = json.loads(said("explain", odd.id, "--json")[1])["course"]
    assert [one["turn"] for one in course] == [1, 2, 5]


def test_of_single_answers_no_course_is_told(desk: Home, said: Callable[..., Any]) -> None:
    assert json.loads(said("explain", "ep_230", "--json")[1])["course"] == []
    out = said("explain", "ep_230")[1]
    assert "ends well" not in out
    assert "how it would end" not in out
    assert json.loads(said("reward", "report", "--json")[1])["courses"] == {}
    assert "how episodes end" not in said("reward", "report")[1]


def test_of_held_words_the_rule_and_what_they_would_do_is_told(
    desk: Home, installation: Config, letters: Any, said: Callable[..., Any]
) -> None:
    first = episode(240)
    again = []
    for number in range(300, 305):  # one rater says the same of the same words five times
        (turn,) = first.turns
        thumb = turn.feedback[0].model_copy(update={"id": f"g{number}", "rater": "twin"})
        turn = turn.model_copy(update={"call": turn.call.model_copy(update={"id": f"c{number}"}), "feedback": (thumb,)})
        about = {"id": f"ep_{number}", "turns": (turn,), "started": float(number), "updated": float(number)}
        again.append(first.model_copy(update=about))
    taken(installation, desk, letters, again)
    status, out, _ = said("explain", "ep_304", "--json")
    assert status == 0
    (turn,) = json.loads(out)["turns"]
    assert turn["held"] == "one rater said the same of the same words 3 times before"
    assert turn["source"] == "model"
    assert [one["said"] for one in turn["if"]] == ["its words were believed"]
    assert turn["if"][0]["value"] != turn["value"]
    out = said("explain", "ep_304")[1]
    assert "held        what was said is kept out of the score, and what is held is not learned: one rater" in out
    assert json.loads(said("explain", "ep_300", "--json")[1])["turns"][0]["held"] is None


def test_versions_are_rolled_back_kept_promoted_and_resumed(
    desk: Home, installation: Config, letters: Any, said: Callable[..., Any]
) -> None:
    def scored_on() -> None:
        with contextlib.closing(open_log(installation)) as log:
            handler = RewardHandler(installation, desk, lambda name: letters, Ordered(log, desk.blobs))
            run_handler(handler, log, desk.folder("state"), stop=threading.Event(), until_idle=True)

    before, left = [one["version"] for one in listed(said) if one["state"] == "released"][-2:]
    why = ("--reason", "it likes lists", "--no-wait")
    assert said("reward", "rollback", *why)[0] == 0
    assert "is ordered by" in said("reward", "list")[1]
    scored_on()
    out = said("reward", "list")[1]
    assert "kept by" in out
    assert "No snapshot takes over until 'everloop reward resume'" in out
    now = {one["version"]: one for one in listed(said)}
    assert now[before]["scores"]
    assert "it likes lists" in now[before]["reason"]
    assert now[left]["state"] == "refused"
    status, _, error = said("reward", "rollback", "--to", left, *why)
    assert (status, "was refused" in error) == (2, True)
    assert said("reward", "promote", left[:8], *why)[0] == 0
    scored_on()
    assert {one["version"]: one["scores"] for one in listed(said)}[left]
    out = said("reward", "list")[1]
    assert "No snapshot takes over" not in out
    assert "kept until" not in out, "of the version that a promotion took the place of"
    assert f"was kept by {getpass.getuser()}: it likes lists; {left} was promoted by" in out
    status, _, error = said("reward", "resume", *why)
    assert (status, "nothing to resume" in error) == (2, True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["explain", "nothing"], "there is no episode 'nothing'"),
        (["explain", "ep_1"], "several episodes begin with 'ep_1'"),
        (["reward", "compare", "zz", "yy"], "has no single reward version 'zz'; kept are: "),
        (["reward", "report", "--plot", "no/such/file.png"], "give a file that ends in .png"),
        (["reward", "report", "--policy", "other"], "there is no policy 'other'"),
    ],
)
def test_a_mistake_is_said_clearly(desk: Home, said: Callable[..., Any], words: list[str], told: str) -> None:
    status, _, error = said(*words)
    assert status == 2
    assert told in error


def test_before_any_traffic_it_says_what_brings_some(installation: Config, said: Callable[..., Any]) -> None:
    open_log(installation).close()
    assert said("reward", "list")[:2] == (0, "No reward versions yet: the first episode that is scored makes one.\n")
    status, _, error = said("reward", "report")
    assert status == 2
    assert "the first traffic" in error
