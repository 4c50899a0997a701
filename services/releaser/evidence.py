"""What stands behind a release: a gate that was passed, and a canary that users' feedback decided. Pure.

Only both together speak for an adapter. Whoever promotes one without them does it on their own word, and the release
says so for as long as it is listed.
"""

from __future__ import annotations

from typing import Any

from everloop.release import ENDED, Release, ReleaseState

from pipelines.sequential import not_inferior


def lacking(release: Release) -> list[str]:
    """What is missing of a release's evidence, in words; empty: nothing is."""
    gate, canary = _gate(release), _canary(release)
    missing = [] if gate == "passed" else ["no gate verdict" if gate == "none" else "a gate that it did not pass"]
    if canary != "passed":
        missing.append("no canary" if canary == "none" else "a canary that is not decided")
    return missing


def told(release: Release) -> str:
    """For a list: both parts of the evidence, and what became of each."""
    return f"gate {_gate(release)}, canary {_canary(release)}"


def refusal(release: Release) -> str | None:
    """Why an order alone does not promote this release; None: its evidence is whole, or its state forbids it anyway."""
    missing = lacking(release)
    if not missing or release.state in ENDED or release.state is ReleaseState.LIVE:
        return None
    return (
        f"release {release.id} (adapter {release.adapter[:12]}) stays {release.state}: it has {' and '.join(missing)}, "
        "so nothing shows that it answers no worse than what is live. 'everloop status' says what it waits for; on "
        f"your own word it goes live by: everloop release promote {release.id} --without-evidence --reason '…'"
    )


def _gate(release: Release) -> str:
    checks = [check for check in release.evidence.get("gate", {}).values() if isinstance(check, dict)]
    if not checks:
        return "none"
    return "passed" if all(check.get("passed") for check in checks) else "failed"


def _canary(release: Release) -> str:
    seen: dict[str, Any] = release.evidence.get("canary", {})
    if not seen:
        return "runs" if release.state is ReleaseState.CANARY else "none"
    units = min(int(seen.get(arm, {}).get("units", 0)) for arm in ("canary", "control"))
    low = seen.get("low")
    if release.plan is not None and low is not None and not_inferior(units, float(low), release.plan):
        return "passed"
    return "undecided" if release.state in (ReleaseState.CANARY, ReleaseState.LIVE, ReleaseState.RETIRED) else "failed"
