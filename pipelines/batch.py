"""Batches: the scored calls that a training run takes, chosen the same way from the same store, and pinned.

Chosen are the newest episodes of one policy that may be trained on: not held out, not synthetic, not
quarantined, no near-duplicate of a gold item, scored. Opinions of the reward model come from one version of it.
Nobody weighs more than their share: 1% of the episodes, or three equal shares where people are under 300.

A batch is named by its content, so a run can be repeated on the very same one.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from everloop.config import TrainConfig
from everloop.episode import Split
from everloop.errors import ContractError, NotEnoughData
from everloop.event import Message

from pipelines.archive import write
from pipelines.holdout import touches
from pipelines.rows import json_text
from pipelines.store import Store
from reward.features import answer_text

SUBJECT_SHARE = 0.01
FEW_PEOPLE = 3  # equal shares that one of few people may hold


@dataclass(frozen=True, eq=False)
class BatchItem:
    """One model call with its reward.

    ``answer`` is its words, ``tool_calls`` what it asked for in OpenAI's form, ``said`` both as one text.
    ``tokens`` and ``logprobs`` (int32 and float32, shape (length,)) hold the call's prompt and completion;
    ``span`` is where the completion lies, ``[start, end)`` with end == length. All three are None where the
    engine gave no tokens. ``mask`` False: nobody has a right to an opinion about the reward. ``trainable`` False:
    for the replay term alone, never for PPO. ``ends_well``: P(the episode ends well) before this answer, as it was
    foretold when the call was new; None: not known then.
    """

    episode: str
    version: int
    call: str
    subject: str | None
    prompt_messages: list[dict[str, Any]]
    answer: str
    correction: str | None
    reward: float
    mask: bool
    source: str
    label: float | None
    tokens: np.ndarray | None
    logprobs: np.ndarray | None
    span: tuple[int, int] | None
    policy_version: str
    temperature: float
    trainable: bool
    turn: int
    turns: int
    tools: list[dict[str, Any]] = field(default_factory=list)
    raters: tuple[str, ...] = ()
    started: float = 0.0
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    ends_well: float | None = None

    @property
    def said(self) -> str:
        """What the reward model reads of the answer: its words, then its tool calls."""
        return answer_text({"content": self.answer, "tool_calls": self.tool_calls})


NOBODY = ""
Opinions = dict[tuple[str, str], str]
"""Whose opinion the reward of (episode, call) is: a reward version, "outcome", "feedback" or nobody's."""

Rescore = Callable[[Sequence[BatchItem]], Sequence[tuple[float, bool]]]
"""(reward, mask) of each item by the pinned reward version, for items that another one had an opinion on."""


@dataclass(frozen=True, eq=False)
class Batch:
    """A pinned batch, items by time and turn. ``left_out`` counts episodes that were not taken, by reason.

    ``scored_by`` counts whose word the rewards are: ``reward_version``, "feedback" or "outcome", no other version.
    """

    tenant: str
    policy: str
    reward_version: str
    items: list[BatchItem]
    left_out: dict[str, int] = field(default_factory=dict)
    scored_by: dict[str, int] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Hash of the content; the same items in the same order give the same id."""
        digest = hashlib.sha256(f"{self.tenant}/{self.policy}/{self.reward_version}".encode())
        for item in self.items:
            plain = _plain(item)
            if not item.tool_calls:
                del plain["tool_calls"]  # a batch without any has the name that it had before batches held them
            if item.ends_well is None:
                del plain["ends_well"]
            digest.update(json_text(plain).encode())
            for array in (item.tokens, item.logprobs):
                digest.update(b"-" if array is None else array.tobytes())
        return "batch_" + digest.hexdigest()[:32]

    def save(self, folder: Path) -> Path:
        """Write ``<folder>/<id>.parquet``; returns its path. Saving the same batch again changes nothing."""
        path = folder / f"{self.id}.parquet"
        if not path.exists():
            about = {
                "tenant": self.tenant,
                "policy": self.policy,
                "reward_version": self.reward_version,
                "left_out": self.left_out,
                "scored_by": self.scored_by,
            }
            rows = [{**_plain(item), "tokens": item.tokens, "logprobs": item.logprobs} for item in self.items]
            write(pa.Table.from_pylist(rows, schema=SCHEMA), path, {"everloop.batch": json_text(about)})
        return path

    @classmethod
    def load(cls, path: Path) -> Batch:
        """Raises ContractError where the file is no batch, or not the one that its name says."""
        try:
            table = pq.read_table(path)
            about = json.loads((table.schema.metadata or {})[b"everloop.batch"])
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            raise ContractError(f"{path} is not a batch: {error!r}") from None
        batch = cls(items=list(items_of(table)), **about)
        if batch.id != path.stem:
            raise ContractError(f"{path} does not hold the batch that its name says, but {batch.id}: fetch it again")
        return batch


SCHEMA = pa.schema(
    [
        ("episode", pa.string()),
        ("version", pa.int64()),
        ("call", pa.string()),
        ("subject", pa.string()),
        ("prompt_messages", pa.string()),
        ("answer", pa.string()),
        ("correction", pa.string()),
        ("reward", pa.float64()),
        ("mask", pa.bool_()),
        ("source", pa.string()),
        ("label", pa.float64()),
        ("tokens", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("start", pa.int32()),
        ("policy_version", pa.string()),
        ("temperature", pa.float64()),
        ("trainable", pa.bool_()),
        ("turn", pa.int32()),
        ("turns", pa.int32()),
        ("tools", pa.string()),
        ("raters", pa.list_(pa.string())),
        ("started", pa.float64()),
        ("tool_calls", pa.string()),
        ("ends_well", pa.float64()),
    ]
)


def _plain(item: BatchItem) -> dict[str, Any]:
    """An item as it is stored, arrays left out."""
    row = {f.name: getattr(item, f.name) for f in fields(item) if f.name not in ("tokens", "logprobs", "span")}
    return {
        **row,
        "prompt_messages": json_text(item.prompt_messages),
        "tools": json_text(item.tools),
        "tool_calls": json_text(item.tool_calls),
        "raters": list(item.raters),
        "start": None if item.span is None else item.span[0],
    }


def items_of(table: pa.Table) -> Iterable[BatchItem]:
    """Items from rows in the form of ``SCHEMA``; arrays are views on the table's buffers."""
    plain = table.drop_columns(["tokens", "logprobs"]).to_pylist()
    arrays = zip(_arrays(table, "tokens", np.int32), _arrays(table, "logprobs", np.float32), strict=True)
    for row, (tokens, logprobs) in zip(plain, arrays, strict=True):
        start = row.pop("start")
        row["prompt_messages"] = json.loads(row["prompt_messages"])
        row["tools"] = json.loads(row["tools"] or "[]")
        row["tool_calls"] = json.loads(row.get("tool_calls") or "[]")
        row["raters"] = tuple(row["raters"] or ())
        span = None if start is None or tokens is None else (start, len(tokens))
        yield BatchItem(**row, tokens=tokens, logprobs=logprobs, span=span)


def _arrays(table: pa.Table, column: str, kind: Any) -> list[np.ndarray | None]:
    lists = table.column(column).combine_chunks()
    values = lists.values.to_numpy(zero_copy_only=False).astype(kind, copy=False)
    ends = lists.offsets.to_numpy()
    present = lists.is_valid().to_numpy(zero_copy_only=False)
    return [
        values[start:end] if there else None for start, end, there in zip(ends[:-1], ends[1:], present, strict=True)
    ]


class _Drawn(NamedTuple):
    """An episode of the window with its calls."""

    episode: str
    subject: str | None
    raters: tuple[str, ...]
    items: list[BatchItem]


def select(
    store: Store,
    tenant: str,
    policy: str,
    train: TrainConfig,
    *,
    gold: Mapping[str, Split] | None = None,
    reward_version: str | None = None,
    rescore: Rescore | None = None,
    minimum: int | None = None,
) -> Batch:
    """The batch that a run starting now would take.

    Args:
        gold: clusters that must not be trained on: ``GoldSet.keys(tenant, policy)``.
        reward_version: whose opinions count; None: the newest.
        rescore: asked for the opinion of that version where only another one has spoken; None: nobody can be
            asked, and the opinions of others are masked.
        minimum: episodes below which there is no batch; None: ``train.min_scored``.

    Raises:
        NotEnoughData: how many episodes are missing.
    """
    version = reward_version or newest_reward(store, tenant, policy)
    found, said_by = _window(store, tenant, policy, version, train.window)
    drawn, left_out = _allowed(found, gold or {})
    needed = train.min_scored if minimum is None else minimum
    if len(drawn) < needed:
        lower = ", or a lower train.min_scored does with fewer" if minimum is None else ""
        reasons = "".join(f"; {count} left out: {reason}" for reason, count in left_out.items())
        raise NotEnoughData(
            f"{tenant}/{policy} has {len(drawn)} scored episodes to train on, {needed - len(drawn)} fewer than the "
            f"{needed} that a batch needs{reasons}. More traffic through the gateway brings them{lower}."
        )
    items = _of_one_version([item for one in drawn for item in one.items], said_by, version, rescore)
    scored_by = Counter(voice for item in items if (voice := said_by[item.episode, item.call]))
    return Batch(tenant, policy, version, items, left_out, dict(sorted(scored_by.items())))


def newest_reward(store: Store, tenant: str, policy: str) -> str:
    """The newest released reward version of the policy; where none was announced, whose opinion is the newest."""
    for query in (
        "SELECT version FROM rewards WHERE tenant = ? AND policy = ? AND state IS DISTINCT FROM 'refused' "
        "ORDER BY time DESC, log_offset DESC LIMIT 1",
        "SELECT reward_version AS version FROM scores WHERE tenant = ? AND policy = ? "
        "ORDER BY time DESC, log_offset DESC LIMIT 1",
    ):
        rows = store.rows(query, [tenant, policy])
        if rows:
            return str(rows[0]["version"])
    return ""


WINDOW = """
WITH pinned AS (
    SELECT * FROM history.scores WHERE tenant = $tenant AND policy = $policy AND reward_version = $reward_version
    QUALIFY row_number() OVER (PARTITION BY episode, call ORDER BY version DESC, log_offset DESC) = 1
), scored AS (
    SELECT n.episode, n.call, n.source, n.label, n.quarantined, n.ends_well_before AS ends_well,
           CASE WHEN n.source = 'model' AND p.call IS NOT NULL THEN p.reward ELSE n.reward END AS reward,
           CASE WHEN n.source = 'model' AND p.call IS NOT NULL THEN p.mask ELSE n.mask END AS mask,
           CASE WHEN n.source <> 'model' THEN n.source ELSE coalesce(p.reward_version, n.reward_version) END AS said_by
    FROM scores n LEFT JOIN pinned p ON p.episode = n.episode AND p.call = n.call
    WHERE n.tenant = $tenant AND n.policy = $policy
), able AS (
    SELECT t.episode, t.version, t.call, t.subject, t.messages AS prompt_messages, t.answer,
           CASE WHEN s.quarantined IS NULL THEN t.correction END AS correction,
           s.reward, s.mask, s.source, s.label, t.policy_version, t.temperature, t.turn, t.turns,
           coalesce(t.tools_offered, '[]') AS tools, t.raters, t.time AS started, s.said_by, s.ends_well,
           coalesce(json_extract(t.output, '$.tool_calls')::VARCHAR, '[]') AS tool_calls
    FROM turns t JOIN scored s ON s.episode = t.episode AND s.call = t.call
    WHERE t.tenant = $tenant AND t.policy = $policy
      AND t.split = 'train' AND NOT t.synthetic AND t.quarantine IS NULL AND t.error IS NULL
), taken AS (
    SELECT * FROM able QUALIFY dense_rank() OVER (ORDER BY started DESC, episode) <= $episodes
), spans AS (
    SELECT episode, unnest(s.spans) AS span, s.tokens AS tokens, s.logprobs AS logprobs
    FROM (SELECT episode, unnest(sequences) AS s FROM trajectories
          WHERE tenant = $tenant AND policy = $policy AND episode IN (SELECT episode FROM taken))
)
SELECT t.*, spans.span.start AS start, coalesce(spans.span.trainable, false) AS trainable,
       spans.tokens[1:spans.span."end"] AS tokens, spans.logprobs[1:spans.span."end"] AS logprobs
FROM taken t LEFT JOIN spans ON spans.episode = t.episode AND spans.span.call = t.call
ORDER BY started, t.episode, turn, t.call
"""


def _window(store: Store, tenant: str, policy: str, version: str, episodes: int) -> tuple[list[_Drawn], Opinions]:
    """The newest episodes with their scored calls, oldest first; and whose opinion each call's reward is."""
    table = store.sql(WINDOW, {"tenant": tenant, "policy": policy, "reward_version": version, "episodes": episodes})
    episode, call, voice = (table.column(name).to_pylist() for name in ("episode", "call", "said_by"))
    said_by = dict(zip(zip(episode, call, strict=True), voice, strict=True))
    grouped: dict[str, list[BatchItem]] = {}
    for item in items_of(table.select(SCHEMA.names)):
        grouped.setdefault(item.episode, []).append(item)
    drawn = [
        _Drawn(episode, items[0].subject, tuple(sorted({r for item in items for r in item.raters})), items)
        for episode, items in grouped.items()
    ]
    return drawn, said_by


def _allowed(found: list[_Drawn], gold: Mapping[str, Split]) -> tuple[list[_Drawn], dict[str, int]]:
    """What may be trained on, and how many episodes may not, by reason."""
    clean = [one for one in found if not gold or touches(_prompts(one), gold) is None]
    drawn = clean
    while True:  # one cap may bring somebody above the other; each round drops some, so it ends
        by_subject = capped(drawn, lambda one: () if one.subject is None else (one.subject,))
        by_rater = capped(by_subject, lambda one: one.raters)
        if len(by_rater) == len(drawn):
            break
        drawn = by_rater
    reasons = {
        "near-duplicates of gold items": len(found) - len(clean),
        "beyond the share of one person": len(clean) - len(drawn),
    }
    return drawn, {reason: count for reason, count in reasons.items() if count}


def _prompts(one: _Drawn) -> Iterable[list[Message]]:
    return ([Message.model_validate(message) for message in item.prompt_messages] for item in one.items)


def capped(drawn: Sequence[_Drawn], people: Callable[[_Drawn], Iterable[str]]) -> list[_Drawn]:
    """The newest episodes of each person up to their share of what is left; nobody's episodes are not capped."""
    counts = Counter(person for one in drawn for person in people(one))
    if not counts:
        return list(drawn)
    share = max(SUBJECT_SHARE, FEW_PEOPLE / len(counts))
    nobodys = sum(1 for one in drawn if not any(True for _ in people(one)))
    most = _most(list(counts.values()), nobodys, share)
    held: Counter[str] = Counter()
    kept = []
    for one in reversed(drawn):
        theirs = list(people(one))
        if all(held[person] < most for person in theirs):
            held.update(theirs)
            kept.append(one)
    return kept[::-1]


def _most(counts: Sequence[int], nobodys: int, share: float) -> int:
    """The largest number of episodes a person may have such that it is at most ``share`` of what is left."""
    most = max(counts)
    while most > 1 and most > share * (nobodys + sum(min(count, most) for count in counts)):
        most -= 1
    return most


def _of_one_version(
    items: list[BatchItem], said_by: Opinions, version: str, rescore: Rescore | None
) -> list[BatchItem]:
    """Every opinion by the pinned version; what people and products said needs none. Notes it in ``said_by``."""
    stale = [item for item in items if item.source == "model" and said_by[item.episode, item.call] != version]
    if not stale:
        return items
    opinions = [(item.reward, False) for item in stale] if rescore is None else rescore(stale)
    given = {
        (item.episode, item.call): replace(item, reward=reward, mask=mask)
        for item, (reward, mask) in zip(stale, opinions, strict=True)
    }
    said_by.update(dict.fromkeys(given, NOBODY if rescore is None else version))
    return [given.get((item.episode, item.call), item) for item in items]
