"""What is live, why the last candidate was or was not promoted, what the next run waits for; and the services.

Exit status 1 where nothing runs, or the log's broker does not answer or refuses us.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from services.commands.orders import add_policy
from services.installation import Installation
from services.reach import meanwhile, spooled, trouble
from services.starting import NotReady, not_ready
from services.tables import clock, span, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="everything that the services say of themselves")
    add_policy(parser, all_of_them=True)


def run(options: argparse.Namespace) -> int:
    with Installation.here() as here, ThreadPoolExecutor() as pool:
        running = here.running()
        asked = pool.submit(trouble, here.config)
        late = pool.submit(not_ready, here)
        said = dict(zip(running, pool.map(here.status, running), strict=True))
        expected, unready, away = here.expected(), late.result(), asked.result()
        whole = {
            "home": str(here.home.root),
            "running": {name: service._asdict() for name, service in running.items()},
            "services": said,
            "not_ready": [one._asdict() for one in unready],
            "log": {"url": here.config.log.url, "trouble": None if away is None else str(away)},
        }
        if options.json:
            print(json.dumps(whole))
            return 0 if running and away is None else 1
        keys = ["/".join(pair) for pair in here.policies(options.policy)]
    if away is not None:
        print(f"{_sentence(away)}\n{meanwhile(said.get('gateway'))}.\n")
    if not running and not unready:
        print(f"Nothing runs on {here.home.root}. 'everloop up' starts it; 'everloop release list' shows the past.")
        return 1
    for key in keys:
        print("\n".join([key, *_policy(key, said)]), end="\n\n")
    print(_services(expected, whole, {one.name: one for one in unready}))
    replicas = _replicas(said)
    if replicas:
        print(f"\n{replicas}")
    if "releaser" in running:
        print(f"\nEvidence of every release: {running['releaser'].url}/releases")
    spool = _spool((said.get("gateway") or {}).get("spool") or {})
    if spool and away is None:
        print(spool)
    told = _without_engine(said.get("gateway") or {})
    told += [f"{one.name} is not ready{_since(one)}: {one.why}" for one in unready]
    print("\n".join(["", *told]) if told else "", end="\n" if told else "")
    return int(away is not None)


def _without_engine(gateway: dict[str, Any]) -> list[str]:
    """That the gateway is ready although no engine answers it, where it is."""
    its = gateway.get("gateway") or {}
    if not its.get("engine_trouble") or not its.get("ready_without_engine"):
        return []
    return [f"{its['engine_trouble']}: until one does, every policy is answered by its provider"]


def _sentence(error: Exception) -> str:
    text = str(error)
    return f"{text[0].upper()}{text[1:]}."


def _replicas(said: dict[str, Any]) -> str:
    """The engines, where there are several: who takes calls, and what each holds; empty where there is one."""
    seen = (said.get("gateway") or {}).get("replicas") or []
    kept = {its["url"]: its for its in (said.get("releaser") or {}).get("replicas") or []}
    rows = []
    for its in seen if len(seen) > 1 else []:
        state = "takes calls" if its["complete"] else "waits for its adapters"
        state = state if its["up"] else f"away for {_ago(its['since'])}"
        held = [adapter[:12] for adapter in kept.get(its["url"], {}).get("holds", [])]
        rows.append([its["url"], state, its["in_flight"], ", ".join(held) or "-"])
    return table(["engine", "state", "calls", "adapters"], rows) if rows else ""


def _spool(its: dict[str, Any]) -> str:
    """What the gateway has acknowledged and the log does not have yet; empty where that is next to nothing."""
    why = its.get("refused") or its.get("away")
    if not its.get("records") and not its.get("aside") and not why:
        return ""
    events, comma, rest = spooled(its).partition(")")
    return f"\n{events}{comma} wait in the gateway's spool{rest}" + (f": {why}" if why else "")


def _since(one: NotReady) -> str:
    return "" if one.seconds is None else f" after {span(one.seconds)}"


def _policy(key: str, said: dict[str, Any]) -> Iterator[str]:
    released = _of(said, "releaser", "policies", key)
    if released:
        yield from _release(released)
    else:
        yield "  live          unknown: the releaser does not answer"
    asked = (said.get("gateway") or {}).get("gateway") or {}
    yield from _provider((released or {}).get("provider") or {}, (asked.get("providers") or {}).get(key) or {})
    yield from _reward(_of(said, "scorer", "rewards", key))
    yield from _said(*(_of(said, "scorer", part, key) for part in ("checks", "judges")))
    yield from _learning(_of(said, "learner", "policies", key), "learner" in said)


def _of(said: dict[str, Any], service: str, part: str, key: str) -> dict[str, Any]:
    found = ((said.get(service) or {}).get(part) or {}).get(key)
    return found if isinstance(found, dict) else {}


def _release(its: dict[str, Any]) -> Iterator[str]:
    live = its["live"]
    if live["since"]:
        yield f"  live          {live['adapter'][:12]} since {clock(live['since'])}, before it {live['previous'][:12]}"
        if live["lacks"]:
            yield f"                on a person's word: it has {' and '.join(live['lacks'])}"
    else:
        yield f"  live          {_unadapted(its.get('provider'))}"
    progress = its.get("in_progress")
    if progress:
        yield f"  {progress['state']:<13} {progress['adapter'][:12]}: {progress['reason']}"
        if "arms" in progress:
            yield from _canary(progress)
    for waiting in its.get("waiting", []):
        yield f"  candidate     {waiting['adapter'][:12]}: {waiting['waits'] or waiting['reason']}"
    decided = its.get("last_decision")
    if decided:
        which = f"{decided['adapter'][:12]} {decided['state']}, {clock(decided['time'])}"
        yield f"  last decision {which}: {decided['reason']}"
    gold = its["gold"]
    needed = (
        "" if gold["enough"] else f": {gold['needed']} are needed to promote without a person (everloop gold import)"
    )
    yield f"  gold          {gold['items']} items{needed}"
    for said in its.get("registry", []):
        yield f"  registry      {said}"
    for pinned in its.get("pinned", []):
        until = f"until {clock(pinned['until'])} if nobody calls it"
        yield f"  pinned        {pinned['adapter'][:12]} ({pinned['uri']}), {until}"
    if its.get("frozen"):
        yield f"  frozen        {its['frozen']}"
    if its["paused"]:
        yield "  paused        no new runs and canaries: everloop resume"


def _unadapted(provider: dict[str, Any] | None) -> str:
    """Who answers while no adapter is live."""
    if provider is None or provider["role"] != "incumbent":
        return "the base model"
    return f"the provider: {provider['model']} at {provider['host']}"


def _provider(its: dict[str, Any], gateway: dict[str, Any]) -> Iterator[str]:
    """Of a provider that stands by, or that had trouble when it was asked last; and that no engine answers."""
    if its and its["role"] == "fallback":
        yield f"  stands by     where no engine answers, {its['model']} at {its['host']} does"
    if gateway.get("trouble"):
        yield f"  provider      {gateway['trouble']}"


def _canary(progress: dict[str, Any]) -> Iterator[str]:
    arms, interval = progress["arms"], progress["interval"]
    means = [f"{arms[name]['mean']:.3f}" if arms[name]["mean"] is not None else "-" for name in ("canary", "control")]
    difference = interval["difference"]
    between = (
        f", difference between {interval['low']:+.3f} and {interval['high']:+.3f}" if difference is not None else ""
    )
    units = [arms[name]["units"] for name in ("canary", "control")]
    yield f"                success {means[0]} against {means[1]} ({units[0]} and {units[1]} units){between}"
    shares = progress["plan"]["stages"]
    if shares:
        yield f"                stage {progress['stage'] + 1} of {len(shares)}: {progress['share']:.0%} of traffic"
    yield f"                {progress['decides']}"


def _reward(its: dict[str, Any]) -> Iterator[str]:
    if not its:
        yield "  reward model  unknown: the scorer does not answer, or has seen nothing of this policy"
        return
    auc, error, ours = its.get("auc"), its.get("calibration_error"), its.get("scoring_auc")
    quality = f"AUC {auc:.3f}" if auc is not None else "AUC not known yet"
    since = f"{its.get('shadow_labels') or 0} labels since it scores"
    own = f"AUC {ours:.3f} on {since}" if ours is not None else f"{since}, too few for an AUC of its own"
    calibration = f", calibration error {error:.3f}" if error is not None else ""
    version = str(its.get("version") or "none")[:12]
    counts = {"refused": its.get("snapshots_refused"), "waited": its.get("snapshots_waited")}
    refused = "".join(f", {count} versions {what}" for what, count in counts.items() if count)
    yield f"  reward model  {version}: {own}"
    yield f"                the live one: {quality}{calibration}, {its.get('labels', 0)} labels{refused}"
    if its.get("pinned"):
        yield f"                kept {its['pinned']}; 'everloop reward resume' ends that"
    poison = its.get("poison") or {}
    held = {**(poison.get("quarantined") or {})}
    if poison.get("taken_back"):
        held["taken back"] = poison["taken_back"]
    if held:
        yield f"                words held: {', '.join(f'{count} x {rule}' for rule, count in held.items())}"
    if its.get("drift"):
        frozen = "; its opinions are kept from training for now" if its.get("frozen") else ""
        yield f"                {its['drift']}{frozen}"
    if its.get("refused_version"):
        yield f"                its newest snapshot {its['refused_version'][:12]}: {its['refused_because']}"
    weights = [f"{source} +{one['up']:.1f} -{one['down']:.1f}" for source, one in (its.get("sources") or {}).items()]
    if weights:
        yield f"  believed      {', '.join(weights)} (log-odds of a good and of a bad word)"


def _said(*parts: dict[str, Any]) -> Iterator[str]:
    """What the platform's own checks, judges and critic said since the scorer's start, and why they did not."""
    words = {source: count for its in parts for source, count in its.get("words", {}).items()}
    failures = {what: count for its in parts for what, count in its.get("failures", {}).items()}
    if words or failures:
        said = [f"{source} {count} words" for source, count in sorted(words.items())]
        without = [f"{count} answers without an opinion ({what})" for what, count in sorted(failures.items())]
        yield f"  looked at     {', '.join([*said, *without])}"
    for source, one in sorted((name, one) for its in parts for name, one in its.get("judges", {}).items()):
        if one.get("trouble"):
            yield f"  {'':13} {source}: {one['trouble']}"


def _learning(its: dict[str, Any], runs: bool) -> Iterator[str]:
    if not its:
        yield "  next run      " + ("nothing is known yet" if runs else "unknown: the learner does not run")
        return
    current, last = its.get("running"), its.get("last_run")
    if current:
        shown = {name: current[name] for name in ("phase", "step", "steps", "trigger") if current.get(name) is not None}
        yield f"  training      run {current['run']}: {_words(shown)}"
    yield f"  next run      waits for {its.get('waits_for')}"
    if last:
        why = last["reason"] or last["trigger"]
        yield f"  last run      {last['id']} {last['state']}, {clock(last['time'])}: {why}"
    apart = its.get("mismatch")
    if apart:
        yield f"  log-probs     {apart['says']}"


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(inner)}" for name, inner in value.items() if inner not in (None, "", {}, []))
    if isinstance(value, list):
        return "; ".join(map(_words, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _services(expected: list[str], whole: dict[str, Any], waiting: dict[str, NotReady]) -> str:
    rows: list[list[Any]] = []
    for name in expected:
        service, said = whole["running"].get(name), whole["services"].get(name)
        late = waiting.get(name)
        if service is None:
            state, pid, seconds = ("starting", late.pid, late.seconds) if late else ("not running", None, None)
            rows.append([name, state, pid, None, None if seconds is None else span(seconds), None])
            continue
        lag, letters = _lag(said or {})
        state = "does not answer" if said is None else "not ready" if late else "runs"
        rows.append([name, state, service["pid"], service["url"], _ago(service["started"]), lag])
        if letters:
            rows[-1][1] = f"{state}, {letters} dead letters"
    return table(["service", "state", "pid", "url", "up", "lag"], rows)


def _lag(said: dict[str, Any]) -> tuple[int | None, int]:
    """(records behind, dead letters) over a service's handlers; None where it has none."""
    handlers = [part for part in said.values() if isinstance(part, dict) and isinstance(part.get("lag"), int)]
    letters = sum(int(part.get("dead_letters") or 0) for part in handlers)
    return (sum(part["lag"] for part in handlers) if handlers else None), letters


def _ago(since: float) -> str:
    return span(time.time() - since)
