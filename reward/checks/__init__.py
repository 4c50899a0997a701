"""Verifiable rewards: checks of answers, found by entry point (group ``everloop.checks``), that never raise.

``run(check, turn)`` gives one verdict. Whatever goes wrong inside a check, a check of somebody else's included, is a
verdict without a value whose ``failure`` is a name: it is no opinion about the answer.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from everloop.errors import ConfigError
from pydantic import ValidationError

from reward.checks.base import NO_REFERENCE, NOT_A_VALUE, RAISED, Check, CheckConfig, TurnView, Verdict, failed

GROUP = "everloop.checks"
CONSTANT = "constant"  # the reference that is the same for every answer

__all__ = ["Check", "CheckConfig", "Checks", "TurnView", "Verdict", "kinds", "run"]


def kinds() -> dict[str, EntryPoint]:
    """What is installed, by kind."""
    return {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}


@functools.cache
def _load(kind: str) -> Check:
    known = kinds()
    if kind not in known:
        raise ConfigError(
            f"there is no check of the kind {kind!r}; there are: {', '.join(known) or 'none'}. One of your own is an "
            f"entry point of the group {GROUP} in an installed package"
        )
    try:
        found = known[kind].load()
    except Exception as error:  # somebody else's module may raise anything
        raise ConfigError(f"the check {kind!r} ({known[kind].value}) cannot be imported: {error!r}") from None
    if not isinstance(found, Check):
        raise ConfigError(f"the check {kind!r} ({known[kind].value}) is {found!r}, not a reward.checks.Check")
    return found


def opened(check: CheckConfig) -> tuple[Check, Any]:
    """The check of a configuration and its options. Raises ConfigError: what is unknown, wrong or missing, and what
    there is."""
    found = _load(check.kind)
    try:
        options = found.options.model_validate(check.options)
    except ValidationError as error:
        told = "; ".join(f"options.{'.'.join(map(str, one['loc']))}: {_says(one['msg'])}" for one in error.errors())
        known = ", ".join(found.options.model_fields) or "none"
        raise ConfigError(f"check {check.name!r} ({check.kind}): {told}. Its options are: {known}") from None
    if check.reference is None and found.compares(options):
        raise ConfigError(
            f"check {check.name!r} ({check.kind}): reference: it compares the answer with one, and none is named, so "
            f"it could say nothing: name it (in a declaration 'correction', or {CONSTANT!r} with {CONSTANT} = …)"
        )
    return found, options


def _says(message: str) -> str:
    return message.removeprefix("Value error, ")


def usable(check: CheckConfig, constant: Any) -> None:
    """Raises ConfigError where a check is wrong as it is declared, or can do nothing with its constant reference."""
    found, options = opened(check)
    if check.reference == CONSTANT:
        tried = _judged(check, found, options, TurnView("{}", references={CONSTANT: constant}))
        if tried.failure == NO_REFERENCE:
            raise ConfigError(f"check {check.name!r} ({check.kind}): constant: {constant!r} is of no use: {tried.why}")


def run(check: CheckConfig, turn: TurnView) -> Verdict:
    """The verdict on one answer. Raises ConfigError where the configuration is wrong, and nothing else."""
    return _judged(check, *opened(check), turn)


def _judged(config: CheckConfig, check: Check, options: Any, turn: TurnView) -> Verdict:
    reference = None
    if config.reference is not None:
        reference = turn.references.get(config.reference)
        if reference is None:
            return failed(NO_REFERENCE, f"this turn has no reference {config.reference!r}")
    try:
        verdict = check.judge(turn, reference, options)
    except Exception as error:  # a check is anybody's code, and an answer anybody's text
        return failed(RAISED, f"the check raised {type(error).__name__}: {str(error)[:200]}")
    return _sound(verdict)


def _sound(verdict: Any) -> Verdict:
    if not isinstance(verdict, Verdict):
        return failed(NOT_A_VALUE, f"the check returned {type(verdict).__name__}, not a Verdict")
    value = verdict.value
    if value is None:
        return verdict
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= 1:
        return failed(NOT_A_VALUE, f"the check returned the value {value!r}; a value is from 0 to 1")
    return verdict._replace(value=float(value))


class Checks:
    """The checks of one policy. ``failures`` counts (name of the check, failure). Raises ConfigError when made."""

    def __init__(self, configs: Sequence[CheckConfig]) -> None:
        twice = [name for name, count in Counter(config.name for config in configs).items() if count > 1]
        if twice:
            raise ConfigError(f"several checks are called {', '.join(twice)}: give each a name of its own")
        self._checks = [(config, *opened(config)) for config in configs]
        self.failures: Counter[tuple[str, str]] = Counter()

    def run(self, turn: TurnView) -> dict[str, Verdict]:
        """The verdict of each, by name."""
        verdicts = {config.name: _judged(config, check, options, turn) for config, check, options in self._checks}
        self.failures.update((name, one.failure) for name, one in verdicts.items() if one.failure is not None)
        return verdicts
