"""Why an episode's answers got their scores: what people said, what the reward model saw, and what would change it.

Of an episode of several turns: how it was foretold to end, before and after each turn, when that was new.
For each answer: the score and the version that gave it; what was said, by which source and with which weight, and
what of it is held; the declaration in force; the features that spoke for and against it; the nearest rated answers; how
sure it is; and the score after one more word. Weights, features and neighbours are those of the version that scored,
so they say again what was said then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from everloop.errors import ConfigError, ContractError
from everloop.ids import OBJECT, RESPONSE

from services.commands.orders import add_policy
from services.installation import Installation

if TYPE_CHECKING:
    from everloop.episode import Episode
    from everloop.score import Score

    from pipelines.store import Store
    from reward.declaration import Declaration

FEATURES = 6  # strongest ones that are told


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("episode", help="its id or the beginning of it; or the id of an answer, as feedback takes it")
    parser.add_argument("--among", type=int, default=200, metavar="N", help="newest rated answers to look among (200)")
    parser.add_argument("--json", action="store_true")
    add_policy(parser, all_of_them=True)


def run(options: argparse.Namespace) -> int:
    if options.among < 1:
        raise ConfigError("--among is at least 1")
    from services.rewards import opened

    with Installation.here() as here:
        found = []
        pairs = here.policies(options.policy)
        answers = _answers(here, {tenant for tenant, _ in pairs}, options.episode)
        for tenant, policy in pairs:
            name, call = answers.get(tenant, (options.episode, None))
            with opened(here, tenant) as store:
                for episode in _episodes(store, tenant, policy, name):
                    its = _explained(here, store, episode, options.among, call)
                    found += [its] if its["turns"] or call is None else []
    if not found:
        what = "answer" if answers else "episode"
        raise ContractError(
            f"there is no {what} {options.episode!r} in the store. What was answered is there a few seconds later: "
            'everloop sql "select episode from episodes order by updated desc limit 10"'
        )
    if len({one["episode"] for one in found}) > 1:
        names = ", ".join(sorted({one["episode"] for one in found})[:5])
        raise ContractError(f"several episodes begin with {options.episode!r}: {names} …; give more of the id")
    for one in found:
        print(json.dumps(one) if options.json else told(one))
    return 0


def _answers(here: Installation, tenants: set[str], name: str) -> dict[str, tuple[str, str]]:
    """By tenant, episode and call of a response id; empty where the name is no such id. Raises ContractError where it
    looks like one, and no tenant ever got it."""
    if not name.startswith((RESPONSE, OBJECT)):
        return {}
    found = {}
    for tenant in tenants if here.home.is_known else ():
        with contextlib.suppress(ValueError):
            found[tenant] = here.home.ids.parse_response(tenant, name)
    if not found:
        raise ContractError(
            f"no such response: {name}; it is the 'id' of an answer, as the gateway of this home gave it"
        )
    return found


def _episodes(store: Store, tenant: str, policy: str, name: str) -> list[Episode]:
    """The one of that id; else those that begin so, six at most."""
    about = [tenant, policy, name]
    exact = list(store.episodes("tenant = ? AND policy = ? AND episode = ?", about))
    return exact or list(
        store.episodes(
            "tenant = ? AND policy = ? AND episode IN (SELECT episode FROM episodes "
            "WHERE starts_with(episode, ?) ORDER BY episode LIMIT 6)",
            about,
        )
    )


def _explained(
    here: Installation, store: Store, episode: Episode, among: int, call: str | None = None
) -> dict[str, Any]:
    """``call``: of the answers to this one's request alone."""
    from everloop.score import Score

    names = ", ".join(f'"{name}"' for name in Score.model_fields if name != "schema_version")
    rows = store.rows(
        f"SELECT {names} FROM scores WHERE tenant = ? AND policy = ? AND episode = ?",
        [episode.tenant, episode.policy, episode.id],
    )
    scores = {row["call"]: Score(**row) for row in rows}
    beside = _beside(store, scores.values())
    if not scores:
        raise ContractError(
            f"episode {episode.id} is not scored yet: the scorer takes a moment, 'everloop status' says how far it is"
        )
    asked = {at for at, turn in zip(episode.positions, episode.turns, strict=True) if call in (None, turn.call.id)}
    return {
        "episode": episode.id,
        "policy": episode.route,
        "quarantine": episode.quarantine,
        "course": _course(episode, scores),
        "ended": _ended(episode, scores),
        "turns": [
            one
            for number, at in enumerate(episode.positions)
            if at in asked and (one := _turn(here, store, episode, number, scores, among, beside))
        ],
    }


def _beside(store: Store, scores: Iterable[Score]) -> dict[str, list[dict[str, Any]]]:
    """By call, what other versions of the reward model said of the same words: 'everloop replay --reward' leaves it."""
    found: dict[str, list[dict[str, Any]]] = {}
    for score in scores:
        found[score.call] = store.rows(
            "SELECT reward_version, value, spread, reward, mask FROM history.scores WHERE tenant = ? AND policy = ? "
            "AND episode = ? AND call = ? AND version = ? AND reward_version != ? ORDER BY log_offset DESC",
            [score.tenant, score.policy, score.episode, score.call, score.version, score.reward_version],
        )
    return found


def _course(episode: Episode, scores: dict[str, Score]) -> list[dict[str, Any]]:
    """What was foretold of the end of an episode of several turns, when each turn was new; where nothing was, none."""
    from reward import course

    turns = course.course_of(episode) if max(episode.positions, default=0) > 0 else []
    scored = [(number, scores.get(episode.turns[number].call.id)) for number in turns]
    return [
        {"turn": number + 1, "before": one.ends_well_before, "after": one.ends_well_after}
        for number, one in scored
        if one is not None and one.ends_well_before is not None and one.ends_well_after is not None
    ]


def _ended(episode: Episode, scores: dict[str, Score]) -> float | None:
    """What an episode came to, 0 to 1: its outcome, else what was said of its latest answer; None: nothing was said."""
    from reward import course

    its = (scores.get(episode.turns[number].call.id) for number in course.course_of(episode))
    told = [one for one in its if one is not None and one.label is not None]
    measured = [one for one in told if one.source == "outcome"]
    return next((one.label for one in reversed(measured or told)), None)


def _turn(
    here: Installation,
    store: Store,
    episode: Episode,
    number: int,
    scores: dict[str, Score],
    among: int,
    beside: dict[str, list[dict[str, Any]]],
) -> dict[str, Any] | None:
    """What is told of one turn; None: it is not scored."""
    from reward import evidence, explain
    from reward.features import examples
    from services.rewards import loaded, rated

    turn, example = episode.turns[number], examples(episode)[number]
    score = scores.get(turn.call.id)
    if score is None:
        return None
    words = turn.feedback + (episode.feedback if number == episode.judged else ())
    told = {
        "turn": number + 1,
        "prompt": example.prompt,
        "answer": example.answer,
        **score.model_dump(mode="json", include={"value", "spread", "reward", "mask", "source", "label", "predicted"}),
        "reward_version": score.reward_version,
        "held": score.quarantined,
        "beside": beside[score.call],
    }
    try:
        _, model = loaded(here, episode.tenant, episode.policy, score.reward_version)
    except ContractError as error:
        return told | {"gone": str(error), "words": [word.model_dump(mode="json") for word in words]}
    trust = model.reliability
    weighed = explain.weighed(example.answer, words, trust)
    (estimate,) = model.estimate([example])
    others = [one for one in rated(store, episode.tenant, episode.policy, most=among) if one[0] != episode.id]
    changed = explain.alternatives(
        estimate, example.answer, words, model.config.pessimism, trust, held=score.quarantined is not None
    )
    return told | {
        "words": [word._asdict() for word in weighed],
        "said": explain.told(evidence.said_of(example.answer, words, trust), weighed),
        "declaration": declared(trust.declaration),
        "opinion": {"value": estimate.value, "spread": estimate.spread, "mask": estimate.mask},
        "learned_from": model.updates,
        "features": explain.contributions(model, example),
        "neighbours": [
            {
                "near": n.near,
                "label": n.label,
                "prompt": n.example.prompt,
                "answer": n.example.answer,
                "episode": n.episode,
            }
            for n in explain.neighbours(model, example, others)
        ],
        "if": [{"said": name, "value": one.value, "reward": one.reward} for name, one in changed],
    }


def told(its: dict[str, Any]) -> str:
    from reward import course
    from reward.value import FEWEST_OF_A_KIND, MIN_ENDINGS

    lines = [f"{its['policy']}, episode {its['episode']}"]
    if its["quarantine"]:
        lines.append(f"quarantined, so nothing of it is trained on: {its['quarantine']}")
    lines += course.told([(one["turn"], one["before"], one["after"]) for one in its["course"]])
    if its["course"] and its["ended"] is not None:
        lines.append(f"it ended {'well' if its['ended'] > 0.5 else 'badly'}, as was said of it: {its['ended']:.2f}")
    if len(its["turns"]) > 1 and not its["course"]:
        lines.append(
            f"how it would end was not foretold: when its turns came, fewer than {MIN_ENDINGS} ends of episodes were "
            f"learned, or fewer than {FEWEST_OF_A_KIND} of the good or of the bad ones"
        )
    for turn in its["turns"]:
        lines += ["", *_turn_told(turn)]
    return "\n".join(lines)


SOURCES = {
    "outcome": "a measured outcome decides",
    "feedback": "what people said, with the model's opinion as prior",
    "model": "the model's opinion",
}
UNSURE = "what was said, beside a model with no right to an opinion"


def _turn_told(turn: dict[str, Any]) -> list[str]:
    unsure = turn["source"] == "model" and not turn["held"] and not turn.get("opinion", {}).get("mask", True)
    unsure = unsure and any(word["counts"] and word["log_odds"] for word in turn["words"])
    lines = [
        f"turn {turn['turn']}: {_asked(turn['prompt'])!r} → {_short(turn['answer'])!r}",
        f"  score       P(good) {turn['value']:.3f} ± {turn['spread']:.3f}, reward {turn['reward']:+.3f}"
        f"{'' if turn['mask'] else ', masked: never trained on'}; {UNSURE if unsure else SOURCES[turn['source']]}",
    ]
    lines += [
        f"  beside      {one['reward_version']} scored the same: P(good) {one['value']:.3f} ± {one['spread']:.3f}, "
        f"reward {one['reward']:+.3f}{'' if one['mask'] else ', masked'}"
        for one in turn["beside"]
    ]
    if turn["predicted"] is not None:
        lines.append(f"  foretold    {turn['predicted']:.3f} that the first label would be good, before it was learned")
    if turn["held"]:
        kept = "what was measured decides" if turn["source"] == "outcome" else "what was said is kept out of the score"
        lines.append(f"  held        {kept}, and what is held is not learned: {turn['held']}")
    if "gone" in turn:
        gone = f"{turn['reward_version']} is gone, and with it what its words weighed ({turn['gone']})"
        return [*lines, f"  version     {gone}"]
    lines += [f"  said        {line}" for line in turn["said"]]
    lines.append(f"  by          {_declaration_told(turn['declaration'])}")
    opinion = turn["opinion"]
    sure = "with no right to an opinion" if not opinion["mask"] else f"members differ by {opinion['spread']:.3f}"
    lines.append(
        f"  model       {turn['reward_version']} ({turn['learned_from']} updates) says {opinion['value']:.3f}: {sure}"
    )
    lines += _features(turn["features"])
    for one in turn["neighbours"]:
        rated = f"rated {one['label']:g}, cosine {one['near']:.2f}"
        lines.append(f"  near        {rated}: {_asked(one['prompt'])!r} → {_short(one['answer'])!r} ({one['episode']})")
    lines += [
        f"  if          {one['said']}: P(good) {one['value']:.3f}, reward {one['reward']:+.3f}" for one in turn["if"]
    ]
    return lines


def declared(declaration: Declaration) -> dict[str, Any]:
    """What of a declaration decides how words weigh: which one it is, what does not count, what is bounded."""
    from reward.declaration import DEFAULT

    signals = declaration.signals
    return {
        "version": None if declaration == DEFAULT else declaration.version,
        "not_counted": [source for source, its in signals.items() if not its.count],
        "bounds": {source: [its.least, its.most] for source, its in signals.items() if its.count},
        "cap": declaration.combine.cap,
    }


def _declaration_told(its: dict[str, Any]) -> str:
    if its["version"] is None:
        return "no declaration: all words count, as far as their sources are found to be right"
    parts = [f"{source} from {least:g} to {most:g} log-odds" for source, (least, most) in its["bounds"].items()]
    parts += [f"{', '.join(its['not_counted'])} not counted"] if its["not_counted"] else []
    return "; ".join([f"declaration {its['version']}", *parts, f"{its['cap']:g} log-odds together at most"])


def _features(features: list[Any]) -> list[str]:
    from reward.explain import WORDS

    return [f"  {'because':<12}{value:+.2f}  {WORDS[name]} ({name})" for name, value in features[:FEATURES]]


def _asked(prompt: str) -> str:
    """The user's own words: what the model reads after them is the exchange around them."""
    return _short(prompt.partition("\n")[0])


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 70 else f"{words[:69]}…"
