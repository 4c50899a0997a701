"""Where the loop stands, read from the services' ``/status``, and what to send next because of it. Pure."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, NamedTuple

PROMOTED = frozenset({"live", "retired"})
REFUSED = frozenset({"rejected", "rolled_back", "vetoed"})
SERVICES = ("releaser", "learner", "scorer", "assembler")
BEHIND = (("assembler", "assemble"), ("scorer", "score"))  # services and the handlers in them
CHUNK, TRICKLE = 48, 4
MOST_BEHIND = 500  # records; a message makes about six
TRICKLES = 120  # messages at most while others need the cores
BREATH = 1.0  # seconds between trickles
BEYOND, FAR_BEYOND = 1.25, 1.6  # of the planned messages, for a canary under way; the latter where it is the first


class Stage(StrEnum):
    """What the loop is at; the value says it to people."""

    GATHERING = "messages for the next training run"
    TRAINING = "a training run, beside the traffic"
    EXAMINING = "the gate asks its held-out questions"
    CANARY = "half of the traffic goes to the candidate, half to the version that is live"


class Decision(NamedTuple):
    """What became of a release. ``gate`` and ``canary`` say in a few words why, "" where it did not come so far."""

    release: str
    adapter: str
    state: str
    reason: str
    gate: str
    canary: str


class Standing(NamedTuple):
    """The loop at one moment. ``live`` is an adapter's hash or "base"; numbers are None while they are unknown.

    ``ended`` is the id of the training run that ended last; ``backlog`` counts records that assembler and scorer
    have still to take.
    """

    stage: Stage
    live: str
    decision: Decision | None
    auc: float | None
    calibration_error: float | None
    steps: int | None
    kl: float | None
    ended: str | None
    backlog: int


def standing(policy: str, said: dict[str, dict[str, Any]]) -> Standing | None:
    """From the services' status payloads; None while the releaser does not answer: then nothing is known."""
    releases = said["releaser"].get("policies", {}).get(policy)
    if releases is None:
        return None
    learning = said["learner"].get("policies", {}).get(policy, {})
    reward = said["scorer"].get("rewards", {}).get(policy, {})
    last = learning.get("last_run") or {}
    metrics = last.get("metrics") or {}
    return Standing(
        stage=_stage(releases, learning),
        live=releases["live"]["adapter"],
        decision=_decision(releases.get("last_decision")),
        auc=reward.get("auc"),
        calibration_error=reward.get("calibration_error"),
        steps=None if metrics.get("steps") is None else int(metrics["steps"]),
        kl=metrics.get("kl"),
        ended=last.get("id"),
        backlog=sum(int(said[name].get(part, {}).get("lag") or 0) for name, part in BEHIND),
    )


def reward_told(its: dict[str, Any], paused: bool = False) -> tuple[str, str]:
    """How good the reward model is by now, and which of its guards acted: two lines for people.

    ``its``: what the scorer says of the policy's. ``paused``: the learner starts no runs.
    """
    auc, error = (
        "not known yet" if its.get(name) is None else f"{its[name]:.3f}" for name in ("auc", "calibration_error")
    )
    refused, waited = its.get("snapshots_refused", 0), its.get("snapshots_waited", 0)
    first = (
        f"Reward model {str(its.get('version') or 'none')[:8]}: AUC {auc}, calibration error {error} on "
        f"{its.get('labels', 0):,} labels; {refused} of its versions were refused, {waited} waited for labels"
    )
    poison = its.get("poison") or {}
    held = [f"{count} x {rule}" for rule, count in poison.get("quarantined", {}).items()]
    acted = [
        *([f"words held: {', '.join(held)}"] if held else []),
        *([f"drift: {its['drift']}"] if its.get("drift") else []),
        *(["opinions are kept from training for now"] if its.get("frozen") else []),
        *(["training is paused"] if paused else []),
    ]
    return first, f"Guards: {'; '.join(acted) or 'none had to act'}"


def _stage(releases: dict[str, Any], learning: dict[str, Any]) -> Stage:
    under_way = releases.get("in_progress")
    if under_way is not None:
        return Stage.CANARY if under_way["state"] == "canary" else Stage.EXAMINING
    if learning.get("running"):
        return Stage.TRAINING
    last = learning.get("last_run") or {}
    known = {releases["live"]["adapter"], (releases.get("last_decision") or {}).get("adapter")}
    announced = last.get("state") == "published" and last.get("adapter") not in known
    return Stage.EXAMINING if releases.get("waiting") or announced else Stage.GATHERING


def _decision(decided: dict[str, Any] | None) -> Decision | None:
    if decided is None:
        return None
    evidence = decided.get("evidence") or {}
    came_to_canary = "canary" in evidence
    return Decision(
        release=decided["release"],
        adapter=decided["adapter"],
        state=decided["state"],
        reason=decided["reason"],
        gate="passed" if came_to_canary else "refused",
        canary=_verdict(decided["state"]) if came_to_canary else "",
    )


def _verdict(state: str) -> str:
    return "promoted" if state in PROMOTED else "rolled back" if state == "rolled_back" else state


def since(before: Standing, now: Standing) -> Standing:
    """``now``, with what ``before`` knows: a run that began and did not end goes on once the learner is back."""
    if before.stage is Stage.TRAINING and now.stage is Stage.GATHERING and now.ended in (None, before.ended):
        return now._replace(stage=Stage.TRAINING, ended=before.ended)
    return now


class Sent(NamedTuple):
    """Messages sent: in all, since the last training run began, and since the loop came to where it stands."""

    total: int
    since_run: int
    in_stage: int


class Aim(NamedTuple):
    """``messages`` planned in all; ``a_run``: scored messages that start a training run."""

    messages: int
    a_run: int


class Next(NamedTuple):
    """Send so many messages, then wait so many seconds; ``done``: the loop has run its course."""

    messages: int = 0
    wait: float = 0.0
    done: bool = False


def plan(now: Standing, sent: Sent, aim: Aim, promoted: int) -> Next:
    """What to do next, from where the loop stands, what was sent, and how many releases were promoted.

    Messages come fast while the next run or a canary needs them, though not faster than they are scored, and few
    come while others need the cores. What is planned may be passed where a canary is under way or nothing was
    promoted yet.
    """
    left = aim.messages - sent.total
    unfinished = now.stage is Stage.CANARY or (promoted == 0 and now.stage is not Stage.GATHERING)
    if (left <= 0 and not unfinished) or sent.total >= aim.messages * (BEYOND if promoted else FAR_BEYOND):
        return Next(done=True)
    if now.stage in (Stage.TRAINING, Stage.EXAMINING):
        return Next(TRICKLE if sent.in_stage < TRICKLES else 0, BREATH)
    if now.stage is Stage.GATHERING and sent.since_run >= aim.a_run:
        return Next(min(TRICKLE, left), BREATH)  # enough: the learner is about to begin
    if now.backlog > MOST_BEHIND:
        return Next(wait=BREATH / 4)
    return Next(min(CHUNK, left) if left > 0 else CHUNK)
