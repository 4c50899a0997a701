"""A person's orders: what each would change, or why it cannot. Pure; the releaser carries them out.

Every change keeps the order's id in the releases' evidence, so an order that is read twice is done once.
"""

from __future__ import annotations

from typing import Any

from everloop.errors import TransitionRefused
from everloop.event import BASE
from everloop.release import Release
from everloop.run import Command, CommandKind

from services.releaser.evidence import lacking, refusal
from services.releaser.state import Change, PolicyState, promote, roll_back, veto

MINE = frozenset(
    {
        CommandKind.PAUSE,
        CommandKind.RESUME,
        CommandKind.FREEZE,
        CommandKind.UNFREEZE,
        CommandKind.PROMOTE,
        CommandKind.ROLLBACK,
        CommandKind.VETO,
        CommandKind.REGISTER,
    }
)


def to_roll_back(state: PolicyState, command: Command) -> Release:
    """The release that a rollback is about: the one named, else the canary that runs, else what is live.

    Raises TransitionRefused where there is nothing to take back.
    """
    if name := str(command.arguments.get("release") or ""):
        return state.find(name)
    live_only = bool(command.arguments.get("live"))
    target = state.live if live_only else state.canary or state.live
    if target is None:
        raise TransitionRefused(
            f"{state.tenant}/{state.policy} has no live adapter (its base model, or its provider, answers), and no "
            "canary runs: nothing to do"
        )
    return target


def rolled_back(state: PolicyState, command: Command, now: float) -> Change:
    return roll_back(state, to_roll_back(state, command), _because(command, "Rolled back"), now, _evidence(command))


def vetoed(state: PolicyState, command: Command, now: float) -> Change:
    release = state.find(str(command.arguments.get("release") or ""))
    return veto(state, release, _because(command, "Vetoed"), now, _evidence(command))


Seen = dict[str, dict[str, Any]]
"""By release, evidence of a canary that runs now: nowhere else yet."""


def promoted(state: PolicyState, command: Command, now: float, seen: Seen | None = None) -> Change:
    """Raises TransitionRefused as :func:`to_promote` does."""
    release = to_promote(state, command, seen)
    missing = lacking(release)
    what = f"Promoted without evidence ({', '.join(missing)})" if missing else "Promoted"
    return promote(state, release, _because(command, what), now, _evidence(command))


def to_promote(state: PolicyState, command: Command, seen: Seen | None = None) -> Release:
    """The release that a promotion is about: the one named, else the canary, else the candidate that waits.

    Raises TransitionRefused where there is none, or where its evidence is not whole and the order does not say that
    it goes live without.
    """
    if name := str(command.arguments.get("release") or ""):
        target: Release | None = state.find(name)
    else:
        target = state.canary or state.gated or state.waiting
    if target is None:
        raise TransitionRefused(f"{state.tenant}/{state.policy} has no canary and no candidate: nothing to promote")
    release = target.model_copy(update={"evidence": {**target.evidence, **(seen or {}).get(target.id, {})}})
    why = None if command.arguments.get("without_evidence") else refusal(release)
    if why is not None:
        raise TransitionRefused(why)
    return release


def described(state: PolicyState, change: Change, unadapted: str = "the base model") -> str:
    """What an order did, for the person who gave it. ``unadapted``: who answers without an adapter."""
    moved = ", ".join(f"{r.id} ({r.adapter[:12]}) is {r.state}" for r in change.releases)
    live = unadapted if state.live_adapter == BASE else state.live_adapter[:12]
    return f"{moved}; live is {live}"


def _because(command: Command, what: str) -> str:
    reason = str(command.arguments.get("reason") or "").strip().rstrip(".")
    return f"{what} by {command.by or 'a person'}{f': {reason}' if reason else ''}."


def _evidence(command: Command) -> dict[str, Any]:
    return {"order": command.id, "by": command.by}
