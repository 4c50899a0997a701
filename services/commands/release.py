"""List releases; watch, promote, roll back, veto or register one; freeze a policy.

list       every release: its state, why, what is live, and what evidence stands behind it
watch      a release's evidence, refreshed until its verdict: what is compared, how many, the interval, when it
           decides, what would stop it
promote    make a release live now (the canary, or a candidate that waits; or the one named); one that did not pass
           gate and canary only --without-evidence, on your own word
rollback   end the canary that runs, else take the live release back to the one before it
veto       end a release for good: it never goes live
freeze     no promotions, no new canaries and no larger shares of a policy until 'unfreeze'; rollbacks go on
register   take in an adapter that was made elsewhere: it becomes a candidate like any other
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from everloop.errors import ConfigError
from everloop.release import Release
from everloop.run import CommandKind
from everloop.topics import RELEASES

from services.commands.orders import add_policy, add_wait, give
from services.commands.watch import watch
from services.installation import Installation
from services.releaser.evidence import told
from services.tables import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(
        dest="verb", required=True, metavar="list|watch|promote|rollback|veto|freeze|unfreeze|register"
    )
    listing = verbs.add_parser("list", help="every release, newest last")
    listing.add_argument("--json", action="store_true", help="one JSON object a line, with all evidence")
    add_policy(listing, all_of_them=True)
    watching = verbs.add_parser("watch", help="a release's evidence until its verdict")
    watching.add_argument("release", nargs="?", help="id or adapter, or a beginning of either (default: the canary)")
    watching.add_argument("--once", action="store_true", help="as it is now, and no more")
    watching.add_argument("--json", action="store_true", help="one JSON object for each look")
    add_policy(watching)
    promote = verbs.add_parser("promote", help="make a release live now")
    promote.add_argument("release", nargs="?", help="id or adapter, or a beginning of either")
    promote.add_argument(
        "--without-evidence", action="store_true", help="although gate or canary did not pass it; needs --reason"
    )
    rollback = verbs.add_parser("rollback", help="end the canary, else take back what is live")
    rollback.add_argument("release", nargs="?", help="id or adapter, or a beginning of either")
    rollback.add_argument("--live", action="store_true", help="what is live, even while a canary runs")
    veto = verbs.add_parser("veto", help="end a release for good")
    veto.add_argument("release", help="id or adapter, or a beginning of either")
    freeze = verbs.add_parser("freeze", help="no promotions and no new canaries until unfreeze")
    unfreeze = verbs.add_parser("unfreeze", help="end a freeze")
    register = verbs.add_parser("register", help="take in an adapter made elsewhere")
    register.add_argument("folder", type=Path, help="adapter_config.json and adapter_model.safetensors")
    for verb in (promote, rollback, veto, register, freeze, unfreeze):
        verb.add_argument("--reason", required=verb is freeze, help="kept with it")
        add_policy(verb)
        add_wait(verb)


def run(options: argparse.Namespace) -> int:
    with Installation.here() as here:
        if options.verb == "list":
            return _list(options, here)
        pair = here.policy(options.policy)
        if options.verb == "watch":
            return watch(here, pair, options.release, once=options.once, as_json=options.json)
        if options.verb == "register":
            options.timeout = max(options.timeout, 120.0)  # it is checked and written to MLflow
            path = str(options.folder.absolute())
            return give(options, here, CommandKind.REGISTER, pair, path=path, reason=options.reason)
        kind = CommandKind(options.verb)
        live = True if getattr(options, "live", False) else None
        alone = _on_their_word(options)
        name = getattr(options, "release", None)
        return give(options, here, kind, pair, release=name, reason=options.reason, live=live, without_evidence=alone)


def _on_their_word(options: argparse.Namespace) -> bool | None:
    """True where a person answers for a release that nothing else speaks for. Raises ConfigError without a reason."""
    if not getattr(options, "without_evidence", False):
        return None
    if not (options.reason or "").strip():
        raise ConfigError("--without-evidence needs --reason '…': it is kept with the release, for whoever asks later")
    return True


def _list(options: argparse.Namespace, here: Installation) -> int:
    wanted = {"/".join(pair) for pair in here.policies(options.policy)}
    newest: dict[str, Release] = {}
    for release in here.records(RELEASES, Release):
        held = newest.get(release.id)
        if release.key in wanted and (held is None or release.step >= held.step):
            newest[release.id] = release
    shown = sorted(newest.values(), key=lambda release: release.time)
    if options.json:
        for release in shown:
            print(json.dumps(release.model_dump(mode="json")))
        return 0
    if not shown:
        print("No releases yet: no adapter answers. A training run makes the first candidate.")
        return 0
    print(_told(shown))
    return 0


def _told(releases: list[Release]) -> str:
    """A row for each, and below it the whole sentence that says why."""
    rows = [
        [r.key, r.id, r.adapter[:12], r.state.value, told(r), time.strftime("%m-%d %H:%M", time.localtime(r.time))]
        for r in releases
    ]
    names = ["policy", "release", "adapter", "state", "evidence", "since"]
    head, rule, *lines = table(names, rows).splitlines()
    whole = (f"{line}\n    {release.reason}" for line, release in zip(lines, releases, strict=True))
    return "\n".join((head, rule, *whole))
