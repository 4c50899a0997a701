"""Fresh rollouts of a run to the store, before the run uses them. See :mod:`pipelines.rollouts`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from everloop.event import BASE

from pipelines import rollouts
from pipelines.batch import Batch, BatchItem
from pipelines.rollouts import Round
from pipelines.rows import Row
from reward.features import prompt_text
from trainer.checkpoint import Position
from trainer.material import Answer
from trainer.request import Request


def keep(request: Request, batch: Batch, at: Position, drawn: Sequence[tuple[Answer, BatchItem]]) -> Path:
    """Write what was drawn in the round that begins at a position; returns the file."""
    samples = int(request.recipe["rollouts"]["samples"])
    about = Round(
        tenant=batch.tenant,
        policy=batch.policy,
        run=request.run,
        round=at.number,
        steps=at.taken,
        parent=BASE if request.parent is None else Path(request.parent).name,
        batch=batch.id,
        reward_version="" if request.reward is None else Path(request.reward).name,
        time=request.time,
    )
    return rollouts.keep(Path(str(request.store)), about, [_row(answer, item, samples) for answer, item in drawn])


def _row(answer: Answer, item: BatchItem, samples: int) -> Row:
    return {
        "episode": answer.episode,
        "turn": answer.turn,
        "subject": item.subject,
        "prompt": prompt_text(item.prompt_messages),
        "answer": answer.text,
        "reward": answer.reward,
        "belief": answer.belief,
        "mask": answer.weight > 0,
        "count": answer.count,
        "samples": samples,
        "temperature": answer.sample.temperature,
        "prompt_tokens": answer.sample.prompt,
        "tokens": answer.sample.completion,
        "logprobs": answer.behaviour,
    }
