"""A worked example of every contract, as it lies on the log: one conversation of an agent, from call to release.

They are in the JSON Schemas of ``docs/schemas``, and the tests of the contracts run over all of them.
"""

from __future__ import annotations

from typing import Any

from everloop.contract import Contract
from everloop.episode import Episode, Turn
from everloop.event import Call, CallTokens, Ended, Event, FeedbackGiven, Message, Sampling, ToolResult
from everloop.feedback import Feedback, FeedbackKind
from everloop.names import Checkpoint, Checkpoints, Pin, PinState
from everloop.release import Adapter, CanaryPlan, Release, Route
from everloop.run import Command, CommandKind, DeadLetter, RewardVersion, Run, RunState
from everloop.score import Score
from everloop.trajectory import Sequence, Span, Trajectory

NOON = 1_763_900_000.0
OWNER: dict[str, Any] = {"tenant": "acme", "policy": "desk"}

# The worked example of a call: what the gateway records of one answer.
CALL = Call(
    id="call_1",
    messages=(Message(role="system", content="You are a desk."), Message(role="user", content="Where is my card?")),
    output=Message(
        role="assistant",
        tool_calls=[{"id": "t1", "type": "function", "function": {"name": "route", "arguments": "{}"}}],
    ),
    tools=({"type": "function", "function": {"name": "route"}},),
    finish_reason="tool_calls",
    policy_version="9f2c",
    model="tiny-k2",
    sampling=Sampling(temperature=0.7, max_tokens=32, stop=("\n",)),
    tokens=CallTokens(prompt=[1, 5], completion=[7, 2], logprobs=[-0.5, -0.25], raw_logprobs=[-0.6, -0.3]),
    release="rel_1",
    arm="canary",
    probability=0.25,
    latency=0.125,
)
THUMB = Feedback(id="f1", kind=FeedbackKind.THUMB, value=1, time=NOON, call="call_1", rater="r1")
TURN = Turn(call=CALL.model_copy(update={"tokens": None}), tools=(ToolResult(id="t", name="route"),), feedback=(THUMB,))
SPAN = Span(start=2, end=4, call="call_1", policy_version="9f2c", temperature=0.7)
EXAMPLES: dict[str, Contract] = {
    "call": Event(id="e1", episode="ep_1", subject="s1", seq=0, time=NOON, payload=CALL, **OWNER),
    "tool": Event(id="e2", episode="ep_1", time=NOON, payload=ToolResult(id="t", name="x", error=True), **OWNER),
    "feedback": Event(id="e3", episode="ep_1", time=NOON, payload=FeedbackGiven(feedback=THUMB), **OWNER),
    "end": Event(id="e4", episode="ep_1", time=NOON, payload=Ended(events=2), **OWNER),
    "episode": Episode(id="ep_1", version=3, started=NOON, updated=NOON, turns=(TURN,), feedback=(THUMB,), **OWNER),
    "trajectory": Trajectory(
        episode="ep_1",
        version=3,
        sequences=(Sequence(tokens=[1, 5, 7, 2], logprobs=[0, 0, -0.5, -0.25], spans=(SPAN,)),),
        **OWNER,
    ),
    "score": Score(
        episode="ep_1",
        version=3,
        call="call_1",
        reward_version="rv",
        value=0.75,
        spread=0.1,
        reward=0.5,
        time=NOON,
        **OWNER,
    ),
    "reward": RewardVersion(
        version="rv", path="rewards/acme/desk/rv", updates=7, offsets={"scores/0": 3}, time=NOON, **OWNER
    ),
    "run": Run(id="run_1", state=RunState.RUNNING, batch="b", parent="base", metrics={"kl": 0.5}, time=NOON, **OWNER),
    "adapter": Adapter(
        hash="9f2c",
        base="tiny-k2",
        run="run_1",
        batch="b",
        uri="models:/x/1",
        rank=8,
        targets=("q",),
        time=NOON,
        **OWNER,
    ),
    "release": Release(
        id="rel_1",
        adapter="9f2c",
        uri="models:/x/1",
        plan=CanaryPlan(),
        evidence={"gate": {"gain": 0.1}},
        time=NOON,
        **OWNER,
    ),
    "route": Route(epoch=2, live="9f2c", uris={"9f2c": "models:/x/1"}, time=NOON, **OWNER),
    "command": Command(id="c", kind=CommandKind.RETRAIN, arguments={"seed": 3}, time=NOON, **OWNER),
    "pin": Pin(id="pin_1", adapter="9f2c", state=PinState.FULL, reason="no room", time=NOON, **OWNER),
    "checkpoints": Checkpoints(run="run_1", kept=(Checkpoint(step=10, adapter="9f2c"),), time=NOON, **OWNER),
    "dead letter": DeadLetter(
        id="d",
        handler="score",
        topic="episodes",
        partition=0,
        offset=3,
        record_key="k",
        value=b"poison",
        cause="ContractError: not an Everloop envelope",
        time=NOON,
    ),
}
