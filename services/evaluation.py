"""A candidate's value before any user sees it: logged calls, its probabilities of them, its own answers, an estimate.

In this order: what the candidate learned from is left out; its weights say how probable each logged answer is; it
answers the same prompts itself; a reward model that had not heard of these calls judges both; then
:mod:`pipelines.offpolicy`. It needs the store and the base's weights, and no engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from everloop.config import Config
from everloop.errors import ContractError
from everloop.event import BASE
from everloop.home import Home
from everloop.release import Adapter

from pipelines.answered import Answered, Learned, answered
from pipelines.batch import BatchItem
from pipelines.offpolicy import Evaluation, Logged, evaluate
from pipelines.store import Store
from reward.encoder import Encoder
from reward.features import Example, answer_text, course, prompt_text
from reward.model import RewardModel
from services.releaser.files import AdapterFiles
from trainer.gather import heard
from trainer.packing import Sample
from trainer.policy import base, lora
from trainer.policy.base import Policy
from trainer.policy.likelihood import log_likelihoods
from trainer.sampling import PROMPTS_AT_ONCE, Sampling, rollouts

JUDGED_AT_ONCE = 500  # answers: bounds the features that are held for them
Told = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """``adapter`` is a hash or 'base'. Of the newest ``calls`` since ``since`` (unix seconds), ``answers`` of the
    candidate's own to each (0: none, and nothing doubly robust). ``also_learned``: those that it learned from too.
    """

    tenant: str
    policy: str
    adapter: str
    since: float
    calls: int = 4000
    answers: int = 4
    also_learned: bool = False
    confidence: float = 0.95


@dataclass(frozen=True)
class Found:
    """``judge``: the reward version that judged, or why none did. ``notes``: what limits the estimate, in words."""

    evaluation: Evaluation
    left_out: dict[str, int]
    judge: str
    notes: tuple[str, ...]


def evaluated(config: Config, asked: Asked, adapters: Mapping[str, Adapter], told: Told) -> Found:
    """Raises RegistryError or AdapterRefused where the adapter cannot be had, ConfigError where the base cannot."""
    home, its = Home(config.home), config.policy(asked.tenant, asked.policy)
    learned, notes = learned_from(home, asked.adapter, adapters)
    if asked.also_learned and learned != Learned():
        notes = (*notes, "what the candidate learned from is in it, which flatters the candidate")
        learned = Learned()
    store = Store(home.root / "store", tenant=asked.tenant, blobs=home.blobs)
    try:
        calls = answered(
            store, asked.tenant, asked.policy, base=its.base, since=asked.since, most=asked.calls, learned=learned
        )
        judge = snapshot(store, home, asked, calls) if asked.answers else "not asked for"
    finally:
        store.close()
    if not calls.items:
        return Found(evaluate(Logged.of([], [], [], []), asked.confidence), calls.left_out, "", notes)
    policy, model = _candidate(config, asked, adapters, told)
    logged = _logged(policy, model, calls.items, told)
    if isinstance(judge, Path):
        logged, judge = _with_model(config, asked, policy, model, calls.items, logged, judge, told)
    found = evaluate(logged, asked.confidence)
    return Found(found, calls.left_out | found.left_out, judge, notes)


def learned_from(home: Home, adapter: str, adapters: Mapping[str, Adapter]) -> tuple[Learned, tuple[str, ...]]:
    """What an adapter and those that it continues learned from; and what is not known of that, in words.

    Where the batch of one is not here, whatever was there before it may have been in it.
    """
    episodes: set[str] = set()
    until, notes = 0.0, []
    while adapter != BASE:
        its = adapters.get(adapter)
        if its is None or not its.batch:
            notes.append(f"what {adapter[:12]} learned from is not known here")
            break
        try:
            path = home.folder("batches") / f"{its.batch}.parquet"
            episodes.update(pq.read_table(path, columns=["episode"]).column("episode").to_pylist())
        except (OSError, ValueError):
            until = max(until, its.time)
            notes.append(f"the batch of {adapter[:12]} is gone: calls from before it are taken as learned from")
        adapter = its.parent
    return Learned(frozenset(episodes), until), tuple(notes)


def snapshot(store: Store, home: Home, asked: Asked, calls: Answered) -> Path | str:
    """The newest reward model that has learned from none of the calls; or why there is none.

    It never learns from held-out episodes. Of others it may have, from the first of them on.
    """
    taught = [item.started for item, held in zip(calls.items, calls.held, strict=True) if not held]
    rows = store.rows(
        "SELECT path, time FROM rewards WHERE tenant = ? AND policy = ? ORDER BY time DESC, log_offset DESC",
        [asked.tenant, asked.policy],
    )
    before = min(taught, default=time.time() + 1)
    able = [home.root / row["path"] for row in rows if row["time"] < before]
    kept = next((folder for folder in able if (folder / "model.json").is_file()), None)
    return kept or "none is kept that had not learned from these very calls; a later --last or --calls leaves some out"


def _candidate(config: Config, asked: Asked, adapters: Mapping[str, Adapter], told: Told) -> tuple[Policy, Any]:
    told("loading the base and the candidate")
    torch.set_num_threads(1)  # the other cores belong to the engine, which answers users meanwhile
    its = config.policy(asked.tenant, asked.policy)
    if asked.adapter == BASE:
        policy = base.load(its.base, config.cache)
        return policy, policy.model
    folder = Home(config.home).folder("adapters") / asked.adapter
    if not folder.is_dir():
        AdapterFiles(config).bring(asked.adapter, adapters[asked.adapter].uri, asked.tenant, asked.policy)
    policy = base.load(its.base, config.cache)
    lora.check(folder, policy, asked.adapter)
    return policy, lora.merged(policy, folder)


def _prompt(item: BatchItem) -> tuple[int, ...]:
    assert item.tokens is not None
    assert item.span is not None
    return tuple(map(int, item.tokens[: item.span[0]]))


def _logged(policy: Policy, model: Any, items: Sequence[BatchItem], told: Told) -> Logged:
    samples = [
        Sample(_prompt(item), tuple(map(int, item.tokens[item.span[0] :])), item.temperature)  # type: ignore[index]
        for item in items
    ]
    told(f"asking how probable {len(items)} logged answers are under it")
    likely = log_likelihoods(policy, model, samples, lambda done, of: told(f"{done} of {of} answers"))
    return Logged.of(
        reward=[np.nan if item.label is None else item.label for item in items],
        behaviour=[float(item.logprobs[item.span[0] :].astype(np.float64).sum()) for item in items],  # type: ignore[index]
        candidate=likely,
        cluster=[item.subject or item.episode for item in items],
    )


def _with_model(
    config: Config,
    asked: Asked,
    policy: Policy,
    model: Any,
    items: Sequence[BatchItem],
    logged: Logged,
    folder: Path,
    told: Told,
) -> tuple[Logged, str]:
    """With what a reward model expects of the logged answers and of the candidate's own; and which model it was."""
    its = config.policy(asked.tenant, asked.policy)
    try:
        judge = RewardModel.load(folder, Encoder(its.reward.encoder))
    except ContractError as error:
        return logged, str(error)
    if not judge.may_judge:
        return logged, f"{folder.name} had too few labels for an opinion"
    told(f"answering {len(items)} prompts, {asked.answers} times each")
    own = _own_answers(policy, model, items, asked.answers, its.max_tokens, told)
    examples = [_example(item, item.said) for item in items]
    examples += [_example(items[i], text) for i, text, _ in own]
    told(f"judging {len(examples)} answers")
    values = np.array(_values(judge, examples))
    expected, counts = np.zeros(len(items)), np.zeros(len(items))
    for (i, _, count), value in zip(own, values[len(items) :], strict=True):
        expected[i] += count * value
        counts[i] += count
    with np.errstate(invalid="ignore"):
        mean = expected / counts
    made = Logged.of(logged.reward, logged.behaviour, logged.candidate, logged.cluster, values[: len(items)], mean)
    return made, folder.name


def _own_answers(
    policy: Policy, model: Any, items: Sequence[BatchItem], many: int, max_tokens: int, told: Told
) -> list[tuple[int, str, int]]:
    """(which call, what the candidate answers to its prompt, how often), at the temperature of that call.

    A prompt that leaves no room for an answer has none.
    """
    room = min(max_tokens, policy.context // 2)
    able = [i for i, item in enumerate(items) if len(_prompt(item)) + room <= policy.context]
    able.sort(key=lambda i: items[i].temperature)
    found, done = [], 0
    for temperature, group in groupby(able, key=lambda i: items[i].temperature):
        its = list(group)
        for start in range(0, len(its), PROMPTS_AT_ONCE):
            part = its[start : start + PROMPTS_AT_ONCE]
            sampling = Sampling(many, room, temperature)
            prompts = [_prompt(items[i]) for i in part]
            drawn = rollouts(model, prompts, sampling, stop_ids=policy.stop_ids, seed=done)
            for i, answers in zip(part, drawn, strict=True):
                found += [(i, answer_text(heard(one.completion, items[i], policy)), one.count) for one in answers]
            done += len(part)
            told(f"{done} of {len(able)} prompts")
    return found


def _example(item: BatchItem, answer: str) -> Example:
    """A logged answer and one of the candidate's own look the same to the model, whatever else is known of the one."""
    return Example(prompt_text(item.prompt_messages), answer, course(item.prompt_messages, item.turn))


def _values(judge: RewardModel, examples: Sequence[Example]) -> list[float]:
    """The probability that a person says "good"; nan where the model has no right to an opinion."""
    parts = (examples[start : start + JUDGED_AT_ONCE] for start in range(0, len(examples), JUDGED_AT_ONCE))
    estimates = (one for part in parts for one in judge.estimate(part))
    return [judge.calibration.heard(one.value) if one.mask else np.nan for one in estimates]
