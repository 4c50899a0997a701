"""How good the reward model is, which versions of it there are and why, and where two of them disagree.

list       every version: whether it scores, was released once, waits for labels or was refused, and why
report     slice by slice (turn, who answered, topic, language, answers that recur): what it foretold before it learned
           (AUC, calibration error), coverage, drift, correlation with length, planted pairs; the same while the
           version that scores and the one before it did; how episodes end, foretold by how far they were; how far each
           source is believed by either
compare    two versions on the newest episodes: where they disagree most, and who was right on labels new to both
rollback   score with the version before (or --to another) and keep it, whatever snapshots come, until 'resume'
promote    score with a version that was refused or rolled back; the next snapshots are judged beside it as ever
resume     after a rollback: snapshots that pass take over again
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everloop.errors import ConfigError, ContractError, NotEnoughData

from services.commands import reward_orders
from services.commands.orders import add_policy
from services.installation import Installation
from services.tables import clock, table

if TYPE_CHECKING:
    from everloop.run import RewardVersion

    from pipelines.store import Store
    from reward.features import Example
    from reward.model import RewardModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="list|report|compare|rollback|promote|resume")
    listing = verbs.add_parser("list", help="every version, oldest first, and why it scores or not")
    report = verbs.add_parser("report", help="how good it is, slice by slice")
    report.add_argument("--plot", type=Path, metavar="FILE.png", help="reliability diagram and AUC over time")
    compare = verbs.add_parser("compare", help="where two versions disagree most")
    compare.add_argument("first", metavar="A", help="a version or its beginning")
    compare.add_argument("second", metavar="B", help="another")
    compare.add_argument("--episodes", type=int, default=1000, metavar="N", help="the newest so many (1000)")
    compare.add_argument("--top", type=int, default=10, metavar="N", help="disagreements shown (10)")
    for verb in (listing, report, compare):
        verb.add_argument("--json", action="store_true")
    add_policy(listing, all_of_them=True)
    add_policy(report)
    add_policy(compare)
    reward_orders.add_arguments(verbs)


def run(options: argparse.Namespace) -> int:
    with Installation.here() as here:
        if options.verb == "list":
            return _list(options, here)
        does = {"report": _report, "compare": _compare}.get(options.verb, reward_orders.run)
        return does(options, here, *here.policy(options.policy))


def _list(options: argparse.Namespace, here: Installation) -> int:
    from services.rewards import versions

    pairs = here.policies(options.policy)
    found = [one for pair in pairs for one in versions(here, *pair)]
    if options.json:
        for one in found:
            print(json.dumps({**one.model_dump(mode="json"), "scores": one.version in _scoring(found)}))
    elif not found:
        print("No reward versions yet: the first episode that is scored makes one.")
    else:
        print(_versions_told(found))
        for pair in pairs:
            for line in reward_orders.told(reward_orders.orders_of(here, *pair), versions(here, *pair)):
                print(f"\n{line}")
    return 0


def _scoring(found: list[RewardVersion]) -> set[str]:
    """The version of each policy that was released last."""
    return set({one.key: one.version for one in found if one.state == "released"}.values())


def _state(one: RewardVersion, scoring: set[str]) -> str:
    if one.version in scoring:
        return "scores"
    return "waits" if one.waits else one.state


def _versions_told(found: list[RewardVersion]) -> str:
    """A row for each, and below it the whole sentence that says why."""
    scoring = _scoring(found)
    rows = [
        [
            *(one.key, one.version, _state(one, scoring)),
            *(one.updates, one.auc, one.calibration_error, clock(one.time)),
        ]
        for one in found
    ]
    head, rule, *lines = table(
        ["policy", "version", "state", "learned", "AUC", "cal. error", "since"], rows
    ).splitlines()
    whole = (f"{line}\n    {one.reason}" if one.reason else line for line, one in zip(lines, found, strict=True))
    return "\n".join((head, rule, *whole))


def _report(options: argparse.Namespace, here: Installation, tenant: str, policy: str) -> int:
    from reward.report import courses, diagram, drawn, over_time
    from services.commands.reward_report import sliced, told
    from services.rewards import calls, opened, versions

    if options.plot and (options.plot.suffix != ".png" or not options.plot.absolute().parent.is_dir()):
        raise ConfigError(f"--plot {options.plot}: give a file that ends in .png, in a folder that is there")
    released = [one for one in versions(here, tenant, policy) if one.state == "released"]
    with opened(here, tenant) as store:
        rows = calls(store, tenant, policy)
    if not rows or not released:
        raise NotEnoughData(
            f"{tenant}/{policy} has no scored calls in the store yet: the first traffic through the gateway brings "
            "them, a few seconds after it is answered"
        )
    names = [one.version for one in reversed(released[-2:])]
    snapshots, gone = _snapshots(here, tenant, policy, names)
    parts, planted = sliced(rows, names, snapshots)
    result = {
        "policy": f"{tenant}/{policy}",
        "version": names[0],
        "before": names[1] if len(names) > 1 else None,
        "slices": parts,
        "planted": planted,
        "sources": {name: model.reliability.status() for name, model in snapshots.items()},
        "gone": gone,
        "courses": courses(rows),
        "reliability": diagram(rows),
        "auc_over_time": over_time(rows),
    }
    if options.plot:
        drawn(rows, f"{tenant}/{policy}", options.plot)
    print(json.dumps(result) if options.json else told(result))
    return 0


def _snapshots(
    here: Installation, tenant: str, policy: str, names: list[str]
) -> tuple[dict[str, RewardModel], dict[str, str]]:
    """The models of versions whose snapshots are still of use, with one encoder, so that a text is read once; and of
    the others why they are not."""
    from services.rewards import encoder_of, loaded

    found, gone, encoder = {}, {}, encoder_of(here, tenant, policy)
    for name in names:
        try:
            found[name] = loaded(here, tenant, policy, name, encoder)[1]
        except ContractError as error:
            gone[name] = str(error)
    return found, gone


def _compare(options: argparse.Namespace, here: Installation, tenant: str, policy: str) -> int:
    if options.episodes < 1 or options.top < 1:
        raise ConfigError("--episodes and --top are at least 1")
    from services.rewards import loaded, newest, opened, opinions

    (first, one), (second, two) = (loaded(here, tenant, policy, name) for name in (options.first, options.second))
    if first == second:
        raise ConfigError(f"{options.first} and {options.second} are the same version, {first}: name two")
    with opened(here, tenant) as store:
        turns = newest(store, tenant, policy, options.episodes)
        new = _fair(here, store, tenant, policy, (first, second))
    answers = [example for _, _, example, _ in turns]
    pairs = list(zip(opinions(one, answers), opinions(two, answers), turns, strict=True))
    apart = sorted(pairs, key=lambda pair: -abs(pair[0] - pair[1]))[: options.top]
    result = {
        "policy": f"{tenant}/{policy}",
        "versions": [first, second],
        "answers": len(pairs),
        "mean_difference": sum(abs(a - b) for a, b, _ in pairs) / len(pairs),
        "new_to_both": _paired([one, two], new),
        "most": [
            {"episode": name, "turn": turn + 1, "answer": example.answer, "values": [a, b], "label": label}
            for a, b, (name, turn, example, label) in apart
        ],
    }
    print(json.dumps(result) if options.json else _compare_told(result))
    return 0


def _fair(
    here: Installation, store: Store, tenant: str, policy: str, names: tuple[str, str]
) -> list[tuple[str, Example, float]]:
    """Rated answers of after both versions were made: neither had learned their labels."""
    from services.rewards import rated, versions

    made = {one.version: one.time for one in versions(here, tenant, policy)}
    if not all(name in made for name in names):
        return []
    return rated(store, tenant, policy, since=max(made[name] for name in names), most=500)


def _paired(models: list[Any], new: list[tuple[str, Example, float]]) -> dict[str, Any]:
    import numpy as np

    from reward.calibration import FEWEST, auc, calibration_error
    from services.rewards import opinions

    if len(new) < FEWEST:
        return {"labels": len(new)}
    labels = np.array([label for _, _, label in new])
    said = [np.array(opinions(model, [example for _, example, _ in new])) for model in models]
    errors = [calibration_error(one, labels) for one in said]
    return {"labels": len(new), "auc": [auc(one, labels) for one in said], "calibration_error": errors}


def _compare_told(result: dict[str, Any]) -> str:
    first, second = result["versions"]
    new = result["new_to_both"]
    lines = [
        f"{result['policy']}: A {first}, B {second} on {result['answers']} answers; they differ by "
        f"{result['mean_difference']:.3f} on the mean"
    ]
    if "auc" in new:
        aucs = ["-" if one is None else f"{one:.3f}" for one in new["auc"]]
        errors = [f"{one:.3f}" for one in new["calibration_error"]]
        lines.append(
            f"on {new['labels']} labels new to both: AUC {aucs[0]} and {aucs[1]}, calibration error {errors[0]} and "
            f"{errors[1]}"
        )
    else:
        lines.append(f"{new['labels']} labels are new to both: too few to say which is better")
    rows = [
        [
            *one["values"],
            "-" if one["label"] is None else f"{one['label']:g}",
            one["episode"],
            one["turn"],
            one["answer"],
        ]
        for one in result["most"]
    ]
    lines += ["", table(["A", "B", "label", "episode", "turn", "answer"], rows)]
    return "\n".join(lines)
