"""Answered calls of a policy as they lie in the store, with their tokens: what an off-policy estimate starts from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from typing import NamedTuple

from everloop.episode import Split

from pipelines.batch import SCHEMA, BatchItem, items_of
from pipelines.store import Store

ANSWERED = """
WITH able AS (
    SELECT t.episode, t.version, t.call, t.subject, t.messages AS prompt_messages, t.answer, t.correction,
           coalesce(s.reward, 0) AS reward, coalesce(s.mask, false) AS mask, coalesce(s.source, 'model') AS source,
           s.label, t.policy_version, t.temperature, t.turn, t.turns, coalesce(t.tools_offered, '[]') AS tools,
           t.raters, t.time AS started, coalesce(json_extract(t.output, '$.tool_calls')::VARCHAR, '[]') AS tool_calls,
           t.split, t.model, s.ends_well_before AS ends_well
    FROM turns t LEFT JOIN scores s
      ON s.tenant = t.tenant AND s.policy = t.policy AND s.episode = t.episode AND s.call = t.call
    WHERE t.tenant = $tenant AND t.policy = $policy AND t.time >= $since
      AND NOT t.synthetic AND t.quarantine IS NULL AND t.error IS NULL
    ORDER BY t.time DESC, t.episode, t.turn DESC, t.call LIMIT $most
), spans AS (
    SELECT episode, unnest(s.spans) AS span, s.tokens AS tokens, s.logprobs AS logprobs
    FROM (SELECT episode, unnest(sequences) AS s FROM trajectories
          WHERE tenant = $tenant AND policy = $policy AND episode IN (SELECT episode FROM able))
)
SELECT t.*, spans.span.start AS start, coalesce(spans.span.trainable, false) AS trainable,
       spans.tokens[1:spans.span."end"] AS tokens, spans.logprobs[1:spans.span."end"] AS logprobs
FROM able t LEFT JOIN spans ON spans.episode = t.episode AND spans.span.call = t.call
ORDER BY started, t.episode, turn, t.call
"""
NO_TOKENS = "no tokens are recorded: another provider's, or made elsewhere"
NO_SUPPORT = "greedy, truncated or constrained: its probability is not known"
ANOTHER_BASE = "answered by another base model"
LEARNED = "the candidate learned from its episode"


class Answered(NamedTuple):
    """``items``: calls whose sampling distribution is known, oldest first, and ``held`` whether each was kept from
    training. ``left_out``: how many others there are, by reason.
    """

    items: list[BatchItem]
    held: list[bool]
    left_out: dict[str, int]


class Learned(NamedTuple):
    """What a candidate learned from: these episodes, and perhaps any that began before ``until`` (unix seconds)."""

    episodes: Set[str] = frozenset()
    until: float = 0.0

    def has(self, item: BatchItem, held: bool) -> bool:
        return item.episode in self.episodes or (item.started < self.until and not held)


def answered(
    store: Store, tenant: str, policy: str, *, base: str, since: float, most: int, learned: Learned
) -> Answered:
    """The newest ``most`` calls of episodes that began at ``since`` (unix seconds) or later.

    ``base``: the policy's base model; a call that another one answered has ids of another vocabulary.
    """
    table = store.sql(ANSWERED, {"tenant": tenant, "policy": policy, "since": since, "most": most})
    held = [split != Split.TRAIN.value for split in table.column("split").to_pylist()]
    rows = zip(items_of(table.select(SCHEMA.names)), held, table.column("model").to_pylist(), strict=True)
    found = Answered([], [], {})
    reasons: Counter[str] = Counter()
    for item, kept, model in rows:
        reason = _unusable(item, model, base) or (LEARNED if learned.has(item, kept) else None)
        if reason is None:
            found.items.append(item)
            found.held.append(kept)
        else:
            reasons[reason] += 1
    return found._replace(left_out=dict(reasons))


def _unusable(item: BatchItem, model: str, base: str) -> str | None:
    if item.tokens is None or item.span is None or item.span[0] == item.span[1]:
        return NO_TOKENS
    if not item.trainable or item.temperature <= 0:
        return NO_SUPPORT
    return ANOTHER_BASE if model and model != base else None
