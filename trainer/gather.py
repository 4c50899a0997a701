"""From a pinned batch to answers that a policy can learn from: what was logged, what people said, what is fresh.

Three sources, and what each may feed:

- *logged* calls of the batch: PPO, where the sampling distribution is known and the policy lag is within its cap;
- *corrected* and *rated* answers, from people: the replay term;
- *fresh* rollouts of the policy as it is now, judged by the reward model: PPO, and the best of them replay.

Nothing is re-tokenised where the engine recorded tokens, but ids that do not say the answer's words are left out; so is
a prompt that the policy's template cannot write. Both are counted.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from everloop.errors import ServingError
from numpy.typing import NDArray

from pipelines.batch import Batch, BatchItem
from reward.features import ANSWER_CHARS, Example, Structure, answer_text, course, prompt_text
from reward.model import Estimate, Vectors
from trainer.engine import Engine
from trainer.material import Answer
from trainer.packing import Sample
from trainer.policy.base import Policy
from trainer.policy.tools import offered, parse, written
from trainer.recipe import Recipe
from trainer.sampling import Rollout, Sampling

logger = logging.getLogger(__name__)
WORD = re.compile(r"\w+")
GOOD = 0.75
"""Label from which an answer counts as rated well: a thumb up, or a high rating."""
KNOWN_ANSWERS = 1000
"""Most answers that proposals are drawn from; where answers recur at all, there are far fewer."""


class Judge(Protocol):
    """A pinned snapshot of the reward model. ``encoder`` is the one that it reads texts with."""

    encoder: Vectors

    def estimate(self, examples: Sequence[Example]) -> Sequence[Estimate]:
        """One estimate an answer."""


Keep = Callable[[Sequence[tuple[Answer, BatchItem]]], object]


@dataclass(frozen=True)
class Sources:
    """What a run draws on. ``recent``: policy versions within the lag cap; None: all are.

    ``keep`` is given the fresh rollouts of a round, judged, each with the call that it answers anew, before anybody
    uses them. ``max_tokens``: of an answer of the policy, where the recipe does not say.
    """

    batch: Batch
    policy: Policy
    judge: Judge | None
    recent: frozenset[str] | None = None
    keep: Keep | None = None
    max_tokens: int = 256


def logged(sources: Sources, recipe: Recipe) -> list[Answer]:
    """Calls of the batch that PPO may take, the turns of an episode sharing a weight of 1; and its other turns.

    Those weigh nothing, but what was said at the end of an episode reaches its earlier turns through them (by GAE). An
    episode is taken up to the last turn that was judged; a turn before it that nobody judged has a reward of 0.
    """
    made: list[Answer | None] = []
    known = able = 0
    for turns in _episodes(sources.batch, recipe):
        asked = [item for item in turns if _in_ppo(item, sources)]
        its = [item.call for item in asked if says(item, sources.policy)]
        known, able = known + len(asked), able + len(its)
        if its:
            made += [
                _logged(item, branch, 1 / len(its) if item.call in its else 0.0, sources, recipe)
                for item, branch in zip(turns, _branches(turns), strict=True)
            ]
    if able < known:
        logger.warning(
            "%d of %d answers are left out of PPO: decoding their token ids does not give the text that was sent",
            known - able,
            known,
        )
    return [answer for answer in made if answer is not None]


def _episodes(batch: Batch, recipe: Recipe) -> list[list[BatchItem]]:
    """The turns of each episode up to its last judged one."""
    grouped: dict[str, list[BatchItem]] = {}
    for item in batch.items:
        grouped.setdefault(item.episode, []).append(item)
    lasts = (max((i.turn for i in turns if _is_judged(i, recipe)), default=-1) for turns in grouped.values())
    return [[i for i in turns if i.turn <= last] for turns, last in zip(grouped.values(), lasts, strict=True)]


def _is_judged(item: BatchItem, recipe: Recipe) -> bool:
    if recipe.reward.source == "feedback" and item.label is not None:
        return fit(2 * item.label - 1)
    return recipe.reward.source != "feedback" and item.mask and fit(item.reward)


def _in_ppo(item: BatchItem, sources: Sources) -> bool:
    known = item.tokens is not None and item.span is not None and item.span[1] > item.span[0]
    recent = sources.recent is None or item.policy_version in sources.recent
    return known and recent and item.trainable and item.temperature > 0


def _branches(turns: Sequence[BatchItem]) -> list[int]:
    """0 for the course of an episode; the other answers to a request (``n`` above 1) end branches of their own.

    The course goes on from the answer that stands in the prompts that came after it; where none can be found, from the
    first one.
    """
    followed = []
    for turn in turns:
        later = [message for other in turns if other.turn > turn.turn for message in other.prompt_messages]
        followed.append(any(m.get("role") == "assistant" and answer_text(m) == turn.said for m in later))
    best = {}
    for i, turn in enumerate(turns):
        held = best.setdefault(turn.turn, i)
        if followed[i] and not followed[held]:
            best[turn.turn] = i
    return [0 if best[turn.turn] == i else i + 1 for i, turn in enumerate(turns)]


def _logged(item: BatchItem, branch: int, weight: float, sources: Sources, recipe: Recipe) -> Answer | None:
    """A turn of a logged episode. Of one without a say its prompt is enough: the value head speaks there."""
    told = item.label if recipe.reward.source == "feedback" else None
    reward = item.reward if told is None else 2 * told - 1
    answer = Answer(
        Sample((), ()),
        "logged",
        item.episode,
        turn=item.turn,
        branch=branch,
        text=item.said,
        reward=reward if _is_judged(item, recipe) else 0.0,
        weight=weight,
        potential=_potential(item, recipe),
    )
    if weight:
        behaviour = np.asarray(item.logprobs, np.float32)[item.span[0] : item.span[1]]  # type: ignore[index]
        return replace(answer, sample=Sample(*_split(item), temperature=item.temperature), behaviour=behaviour)
    prompt = prompt_of(item, sources.policy)
    sample = Sample(prompt or (), (sources.policy.end_id,))
    return replace(answer, sample=sample) if prompt and _fits(sample, sources.policy) else None


def _potential(item: BatchItem, recipe: Recipe) -> float | None:
    """How the episode was foretold to end before this turn, on the scale of rewards.

    On feedback alone: there most turns have no reward of their own. Where each has the model's opinion, that is said.
    """
    known = item.ends_well if recipe.reward.source == "feedback" else None
    return None if known is None or not fit(2 * known - 1) else 2 * known - 1


def says(item: BatchItem, policy: Policy) -> bool:
    """Whether the recorded token ids say what was sent: each word of the answer, in any order and setting.

    Looser than equality on purpose: a stop string cuts the text and not the ids, and a tool call is sent in another
    form than it was sampled in. Ids of another answer, or of another tokenizer, do not say its words.
    """
    words = WORD.findall(item.said)
    if len(item.said) >= ANSWER_CHARS:
        del words[-1:]  # it may have been cut
    decoded = WORD.findall(policy.decode(_split(item)[1]))
    return not Counter(words) - Counter(decoded) if words else not decoded


def _split(item: BatchItem) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Prompt and completion as the engine recorded them."""
    assert item.tokens is not None
    assert item.span is not None
    tokens = item.tokens.tolist()
    return tuple(tokens[: item.span[0]]), tuple(tokens[item.span[0] : item.span[1]])


def prompt_of(item: BatchItem, policy: Policy) -> tuple[int, ...] | None:
    """The prompt's token ids: as recorded, else as the template writes them; None where it cannot."""
    if item.tokens is not None and item.span is not None:
        return _split(item)[0]
    try:
        return tuple(policy.encode_chat(item.prompt_messages, item.tools or None))
    except ServingError:
        return None


def remembered(sources: Sources, recipe: Recipe) -> list[Answer]:
    """Answers for the replay term: corrections, and answers rated well, weighted by what the judge believes of them.

    A thumb may be a slip; the judge has heard of similar answers, so its belief tells a slip from a word meant.
    """
    if recipe.replay.coefficient == 0:
        return []
    corrected = [item for item in sources.batch.items if item.correction and recipe.replay.corrected > 0]
    rated = [i for i in sources.batch.items if i.label is not None and i.label >= GOOD and recipe.replay.rated > 0]
    beliefs = _beliefs(sources.judge, [Example(prompt_text(i.prompt_messages), i.said) for i in rated])
    made = [_corrected(item, recipe.replay.corrected, sources) for item in corrected]
    made += [
        _told(
            item, _completion(item, sources.policy), item.said, "rated", recipe.replay.rated * belief, belief, sources
        )
        for item, belief in zip(rated, beliefs, strict=True)
    ]
    return [answer for answer in made if answer is not None]


def _corrected(item: BatchItem, weight: float, sources: Sources) -> Answer | None:
    text = str(item.correction)
    completion = tuple(sources.policy.encode_answer(text)) if text else ()
    return _told(item, completion, text, "corrected", weight, 1.0, sources)


def _completion(item: BatchItem, policy: Policy) -> tuple[int, ...]:
    """What the policy should sample to give the item's answer again, the end token included; empty: there is none.

    A tool call as it was sampled where the engine recorded it, for each model has a form of its own.
    """
    if not item.said:
        return ()
    if item.tool_calls and item.span is not None and says(item, policy):
        sampled = _split(item)[1]
        return sampled if sampled[-1:] and sampled[-1] in policy.stop_ids else (*sampled, policy.end_id)
    return tuple(policy.encode_answer(written(item.answer, item.tool_calls)))


def _told(
    item: BatchItem,
    completion: tuple[int, ...],
    text: str,
    source: str,
    weight: float,
    belief: float,
    sources: Sources,
) -> Answer | None:
    prompt = prompt_of(item, sources.policy)
    if prompt is None or not completion or not _fits(sample := Sample(prompt, completion), sources.policy):
        return None
    return Answer(
        sample,
        source,  # type: ignore[arg-type]
        item.episode,
        turn=item.turn,
        text=text,
        replay=weight,
        belief=belief,
    )


def _fits(sample: Sample, policy: Policy) -> bool:
    return len(sample.prompt) + len(sample.completion) <= policy.context


def _beliefs(judge: Judge | None, examples: Sequence[Example]) -> list[float]:
    """The judge's calibrated probability that each answer is good; 1 where it has no right to an opinion, 0 where what
    it says is no probability.
    """
    if judge is None or not examples:
        return [1.0] * len(examples)
    found = judge.estimate(examples)
    return [(one.value if fit(one.reward, one.value) else 0.0) if one.mask else 1.0 for one in found]


def fresh(sources: Sources, recipe: Recipe, engine: Engine, seed: int) -> list[Answer]:
    """Rollouts on the newest distinct prompts, last turns only, judged; identical answers once, with their count."""
    if recipe.rollouts.prompts == 0:
        return []
    length = longest(sources, recipe)
    asked = recent_prompts(sources, recipe.rollouts.prompts, length)
    drawn = engine.rollouts(list(asked), Sampling(recipe.rollouts.samples, length), seed)
    judged = judged_rollouts(asked, drawn, recipe.rollouts.samples, sources)
    answered = {item.episode: item for item in asked.values()}
    if sources.keep is not None and judged:
        sources.keep([(answer, answered[answer.episode]) for answer in judged])
    return judged


def judged_rollouts(
    asked: dict[tuple[int, ...], BatchItem], drawn: Sequence[Sequence[Rollout]], samples: int, sources: Sources
) -> list[Answer]:
    """Rollouts of each prompt, ``samples`` of it, with the judge's word."""
    made = [
        _drawn(prompt, item, rollout, rollout.count / samples, sources.policy)
        for (prompt, item), rollouts in zip(asked.items(), drawn, strict=True)
        for rollout in rollouts
    ]
    return _judged(made, {item.episode: item for item in asked.values()}, sources.judge)


def longest(sources: Sources, recipe: Recipe) -> int:
    """Tokens of a rollout, at most. Half of the context is left to the prompt, whatever the policy may say."""
    return min(recipe.rollouts.max_tokens or sources.max_tokens, sources.policy.context // 2)


def _drawn(
    prompt: tuple[int, ...], item: BatchItem, rollout: Rollout, weight: float, policy: Policy
) -> tuple[Answer, Structure]:
    message = heard(rollout.completion, item, policy)
    answer = Answer(
        Sample(prompt, rollout.completion),
        "fresh",
        item.episode,
        turn=item.turn,
        text=answer_text(message),
        weight=weight,
        count=rollout.count,
        synthetic=True,
        finished=rollout.finished,
        behaviour=rollout.logprobs,
    )
    finish = None if rollout.finished else "length"
    return answer, replace(_course(item), calls_tool=bool(message["tool_calls"]), finish=finish)


def _course(item: BatchItem) -> Structure:
    return course(item.prompt_messages, item.turn)


def heard(completion: Sequence[int], item: BatchItem, policy: Policy) -> dict[str, Any]:
    """Sampled ids as the message that serving would have sent for them: words, and calls of the tools on offer."""
    words, calls = parse(policy.decode(completion), offered(item.tools))
    return {"content": words, "tool_calls": calls}


def recent_prompts(sources: Sources, most: int, length: int) -> dict[tuple[int, ...], BatchItem]:
    """The newest ``most`` distinct prompts of last turns, by tokens, each with the call that it comes from.

    Prompts that leave no room for an answer of ``length`` tokens are passed over: one of them would cut all others.
    """
    found: dict[tuple[int, ...], BatchItem] = {}
    passed = 0
    for item in reversed(sources.batch.items):
        if len(found) == most:
            break
        prompt = prompt_of(item, sources.policy) if item.turn == item.turns - 1 else None
        if prompt is not None and len(prompt) + length <= sources.policy.context:
            found.setdefault(prompt, item)
        elif prompt is not None:
            passed += 1
    if passed:
        logger.warning("%d prompts leave no room for an answer of %d tokens: nothing is drawn for them", passed, length)
    return found


def _judged(
    answers: Sequence[tuple[Answer, Structure]], items: dict[str, BatchItem], judge: Judge | None
) -> list[Answer]:
    """Rollouts with the judge's reward; those that it has no right to judge have no say."""
    if judge is None or not answers:
        return []
    texts = {episode: prompt_text(item.prompt_messages) for episode, item in items.items()}
    estimates = judge.estimate([Example(texts[a.episode], a.text, structure) for a, structure in answers])
    unfit = sum(not fit(said.reward, said.value) for said in estimates)
    if unfit:
        logger.warning("%d rewards of rollouts are no numbers from -1 to 1: those answers teach nothing", unfit)
    return [
        replace(answer, reward=said.reward, belief=said.value)
        if said.mask and fit(said.reward, said.value)
        else replace(answer, weight=0.0)
        for (answer, _), said in zip(answers, estimates, strict=True)
    ]


def fit(reward: float, belief: float = 0.0) -> bool:
    """Whether a judge's words are what they should be; what is not a number, or out of range, is never learned from."""
    return -1 <= reward <= 1 and 0 <= belief <= 1


def informative(rollouts: Sequence[Answer], recipe: Recipe, told: Sequence[Answer] = ()) -> list[Answer]:
    """Rollouts of prompts whose answers differ in reward: where all are equally good, no advantage is left.

    Dynamic sampling as in DAPO (Yu et al. 2025, arXiv:2503.14476), with a bound for rewards that are not 0 or 1.
    Without ``ppo.settled``, prompts whose answer replay tells (``told``) are left to it.
    """
    settled = set() if recipe.ppo.settled else {answer.sample.prompt for answer in told}
    rewards: dict[tuple[int, ...], list[float]] = {}
    for answer in rollouts:
        if answer.weight > 0 and answer.sample.prompt not in settled:
            rewards.setdefault(answer.sample.prompt, []).append(answer.reward)
    able = {prompt for prompt, its in rewards.items() if max(its) - min(its) >= recipe.rollouts.spread}
    return [answer for answer in rollouts if answer.weight > 0 and answer.sample.prompt in able]


def proposed(sources: Sources, recipe: Recipe) -> list[Answer]:
    """For each recent prompt, answers that others were given, as something to judge.

    Words alone, for the arguments of a tool call belong to their own prompt.
    A policy explores what it already half believes; what it never tries may be what was right for a similar prompt,
    or a known answer whose words are near to the prompt's. Nobody sampled these, so they have no say in PPO.
    """
    if recipe.replay.proposals == 0 or recipe.replay.believed == 0 or sources.judge is None:
        return []
    asked = recent_prompts(sources, recipe.rollouts.prompts, 1)
    texts = [prompt_text(item.prompt_messages) for item in asked.values()]
    found = _proposals(texts, sources.batch, sources.judge.encoder.encode, recipe.replay.proposals)
    made = [
        (Answer(sample, "believed", item.episode, turn=item.turn, text=text, synthetic=True), _course(item))
        for (prompt, item), answers in zip(asked.items(), found, strict=True)
        for text in answers
        if _fits(sample := Sample(prompt, tuple(sources.policy.encode_answer(text))), sources.policy)
    ]
    return _judged(made, {item.episode: item for item in asked.values()}, sources.judge)


def _proposals(
    texts: Sequence[str], batch: Batch, encode: Callable[[Sequence[str]], NDArray[np.float32]], most: int
) -> list[list[str]]:
    """For each text, up to ``most`` good answers of the nearest prompts, and as many of the nearest known answers."""
    good, known = _good_answers(batch), _known_answers(batch)
    if not texts or not known:
        return [[] for _ in texts]
    vectors = encode(texts)
    near_answers = np.argsort(-(vectors @ encode(known).T), axis=1, kind="stable")[:, :most]
    near_prompts = np.zeros((len(texts), 0), np.int64)
    if good:
        near = vectors @ encode([prompt for prompt, _ in good]).T
        near_prompts = np.argsort(-near, axis=1, kind="stable")[:, : 8 * most]
    made = []
    for by_prompt, by_words in zip(near_prompts, near_answers, strict=True):
        answers = list(dict.fromkeys(good[i][1] for i in by_prompt))[:most]
        made.append(list(dict.fromkeys([*answers, *(known[i] for i in by_words)])))
    return made


def _good_answers(batch: Batch) -> list[tuple[str, str]]:
    """(prompt text, answer) of everything in the batch that is held to be right."""
    found = []
    for item in batch.items:
        good = item.correction or (item.answer if item.mask and item.reward > 0 and not item.tool_calls else None)
        if good:
            found.append((prompt_text(item.prompt_messages), good))
    return found


def _known_answers(batch: Batch) -> list[str]:
    """Answers that came more than once, or from a person, the most frequent first."""
    counts = Counter(item.answer for item in batch.items if item.answer.strip() and not item.tool_calls)
    told = dict.fromkeys(item.correction for item in batch.items if item.correction)
    often = [answer for answer, count in counts.most_common(KNOWN_ANSWERS) if count > 1]
    return list(dict.fromkeys([*told, *often]))[:KNOWN_ANSWERS]


def believed(answers: Sequence[Answer], recipe: Recipe, told: Sequence[Answer] = ()) -> list[Answer]:
    """For the replay term: the answer to each prompt that is believed in most, where the belief is strong enough.

    An answer that was cut is none to imitate: the policy would learn not to end. Prompts that a person corrected
    (among ``told``) are left out: what people said stands above any belief.
    """
    if recipe.replay.believed == 0 or recipe.replay.coefficient == 0:
        return []
    settled = {answer.sample.prompt for answer in told if answer.source == "corrected"}
    best: dict[tuple[int, ...], Answer] = {}
    for answer in answers:
        if not answer.finished:
            continue
        held = best.get(answer.sample.prompt)
        if answer.sample.prompt not in settled and (held is None or answer.belief > held.belief):
            best[answer.sample.prompt] = answer
    return [
        replace(a, source="believed", weight=0.0, replay=recipe.replay.believed * a.belief)
        for a in best.values()
        if a.belief > recipe.replay.belief
    ]
