"""Rows: the typed columns of events, episodes, trajectories and rollouts, and how a contract fills them.

Nested things stay nested (an episode's turns, a trajectory's sequences), so that one row is one version, whole.
Token ids are ``list<int32>``, log-probabilities ``list<float>``, times seconds since 1970, and what has no fixed
form is JSON text. ``envelope`` is the record as it lay on the log, from which the contract can be had again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from everloop.contract import Contract
from everloop.episode import Episode, Turn
from everloop.event import Call, Event, FeedbackGiven, Message, ToolResult
from everloop.feedback import Feedback, FeedbackKind
from everloop.trajectory import Sequence, Trajectory

from pipelines.preferences import asked, preferences

Row = dict[str, Any]
text, number, whole, flag = pa.string(), pa.float64(), pa.int64(), pa.bool_()
OWNER = {"tenant": text, "policy": text}


def json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_plain)


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json", exclude_none=True) if isinstance(value, Contract) else str(value)


def fields(thing: Contract, columns: Mapping[str, pa.DataType]) -> Row:
    return {name: getattr(thing, name) for name in columns}


# Events: as they lay in the log, for replay beyond the log's retention, with columns to look at.

EVENT_COLUMNS = {
    **OWNER,
    "episode": text,
    "id": text,
    "subject": text,
    "seq": whole,
    "time": number,
    "kind": text,
    "call": text,
    "synthetic": flag,
    "payload": text,
    "envelope": pa.binary(),
}


def event_row(event: Event, envelope: bytes) -> Row:
    return {
        "tenant": event.tenant,
        "policy": event.policy,
        "episode": event.episode,
        "id": event.id,
        "subject": event.subject,
        "seq": event.seq,
        "time": event.time,
        "kind": event.payload.kind,
        "call": _call_of(event),
        "synthetic": event.synthetic,
        "payload": event.payload.model_dump_json(exclude={"tokens"}, exclude_none=True),
        "envelope": envelope,
    }


def _call_of(event: Event) -> str | None:
    payload = event.payload
    if isinstance(payload, Call):
        return payload.id
    if isinstance(payload, FeedbackGiven):
        return payload.feedback.call
    return payload.call if isinstance(payload, ToolResult) else None


# Episodes: one row a version, its turns, feedback and preferences nested in it.

TOOL = {"name": text, "arguments": text, "result": text, "error": flag, "call": text, "id": text}
TURN = {
    "turn": pa.int32(),
    "call": text,
    "prompt": text,
    "messages": text,
    "tools_offered": text,
    "answer": text,
    "output": text,
    "finish_reason": text,
    "policy_version": text,
    "model": text,
    "arm": text,
    "release": text,
    "probability": number,
    "temperature": number,
    "support_known": flag,
    "latency": number,
    "error": text,
    "tools": pa.list_(pa.struct(list(TOOL.items()))),
    "thumb": number,
    "rating": number,
    "outcome": number,
    "correction": text,
    "raters": pa.list_(text),
    "trace": text,
}
FEEDBACK = {
    "id": text,
    "call": text,
    "kind": text,
    "time": number,
    "rater": text,
    "value": number,
    "text": text,
    "chosen": text,
    "rejected": text,
    "name": text,
}
PREFERENCE = {"call": text, "prompt": text, "chosen": text, "rejected": text, "source": text, "rater": text}
EPISODE_COLUMNS = {
    **OWNER,
    "episode": text,
    "version": whole,
    "subject": text,
    "started": number,
    "updated": number,
    "complete": flag,
    "synthetic": flag,
    "split": text,
    "outcome": number,
    "quarantine": text,
    "turns": pa.list_(pa.struct(list(TURN.items()))),
    "feedback": pa.list_(pa.struct(list(FEEDBACK.items()))),
    "preferences": pa.list_(pa.struct(list(PREFERENCE.items()))),
    "envelope": pa.binary(),
}


def episode_row(episode: Episode, envelope: bytes) -> Row:
    words = [word for turn in episode.turns for word in turn.feedback] + list(episode.feedback)
    return {
        "tenant": episode.tenant,
        "policy": episode.policy,
        "episode": episode.id,
        "version": episode.version,
        "subject": episode.subject,
        "started": episode.started,
        "updated": episode.updated,
        "complete": episode.complete,
        "synthetic": episode.synthetic,
        "split": episode.split.value,
        "outcome": episode.outcome,
        "quarantine": episode.quarantine,
        "turns": [_turn_row(episode, at, turn) for at, turn in zip(episode.positions, episode.turns, strict=True)],
        "feedback": [fields(word, FEEDBACK) for word in words],
        "preferences": [fields(pair, PREFERENCE) for pair in preferences(episode)],
        "envelope": envelope,
    }


def _turn_row(episode: Episode, at: int, turn: Turn) -> Row:
    call = turn.call
    # What was said about the episode as a whole stands for a turn that nobody said anything about in that kind;
    # a correction of the whole is one of the last answer.
    said = {**_values(episode.feedback), **_values(turn.feedback)}
    if turn.correction is None and (episode.judged is None or turn is not episode.turns[episode.judged]):
        said.pop(FeedbackKind.CORRECTION, None)
    return {
        "turn": at,
        "call": call.id,
        "prompt": asked(call),
        "messages": json_text([_message(message) for message in call.messages]),
        "tools_offered": json_text(call.tools) if call.tools else None,
        "answer": call.output.text,
        "output": json_text(_message(call.output)),
        "finish_reason": call.finish_reason,
        "policy_version": call.policy_version,
        "model": call.model,
        "arm": call.arm,
        "release": call.release,
        "probability": call.probability,
        "temperature": call.sampling.temperature,
        "support_known": call.sampling.support_known,
        "latency": call.latency,
        "error": call.error,
        "tools": [fields(result, TOOL) for result in turn.tools],
        "thumb": said.get(FeedbackKind.THUMB),
        "rating": said.get(FeedbackKind.RATING),
        "outcome": said.get(FeedbackKind.OUTCOME),
        "correction": said.get(FeedbackKind.CORRECTION),
        "raters": sorted({word.rater for word in (*turn.feedback, *episode.feedback) if word.rater}),
        "trace": call.trace,
    }


def _values(words: tuple[Feedback, ...]) -> dict[FeedbackKind, Any]:
    """The newest value (or, of a correction, text) of each kind; settled feedback stands oldest first."""
    return {word.kind: word.text if word.kind is FeedbackKind.CORRECTION else word.value for word in words}


def _message(message: Message) -> dict[str, Any]:
    return message.model_dump(mode="json", exclude_none=True)


# Trajectories: typed arrays.

SPAN = {
    "start": pa.int32(),
    "end": pa.int32(),
    "call": text,
    "policy_version": text,
    "temperature": number,
    "trainable": flag,
}
SEQUENCE = {
    "tokens": pa.list_(pa.int32()),
    "logprobs": pa.list_(pa.float32()),
    "spans": pa.list_(pa.struct(list(SPAN.items()))),
}
TRAJECTORY_COLUMNS = {
    **OWNER,
    "episode": text,
    "version": whole,
    "subject": text,
    "synthetic": flag,
    "sequences": pa.list_(pa.struct(list(SEQUENCE.items()))),
}


def trajectory_row(trajectory: Trajectory, envelope: bytes) -> Row:
    flat = fields(trajectory, {name: kind for name, kind in TRAJECTORY_COLUMNS.items() if name != "sequences"})
    return {**flat, "sequences": [_sequence(one) for one in trajectory.sequences]}


def _sequence(one: Sequence) -> Row:
    # Arrow reads numpy arrays whole, where it would ask any other sequence item by item.
    return {
        "tokens": np.frombuffer(one.tokens, dtype=np.int32),
        "logprobs": np.frombuffer(one.logprobs, dtype=np.float32),
        "spans": [fields(span, SPAN) for span in one.spans],
    }


# Rollouts: one row a distinct answer that the policy in training gave to a prompt. No person saw it.

ROLLOUT_COLUMNS = {
    **OWNER,
    "run": text,
    "round": pa.int32(),
    "number": pa.int32(),
    "episode": text,
    "turn": pa.int32(),
    "subject": text,
    "prompt": text,
    "answer": text,
    "reward": number,
    "belief": number,
    "mask": flag,
    "count": pa.int32(),
    "samples": pa.int32(),
    "policy_version": text,
    "parent": text,
    "steps": pa.int32(),
    "reward_version": text,
    "batch": text,
    "temperature": number,
    "synthetic": flag,
    "prompt_tokens": pa.list_(pa.int32()),
    "tokens": pa.list_(pa.int32()),
    "logprobs": pa.list_(pa.float32()),
    "time": number,
}
