"""What the demo shows at its end: the table, the plot, and the object that ``--json`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from examples.bank_desk.measure import Gain, Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROMOTED, REFUSED = "#2da44e", "#8c959f"  # colours of the plot's marks

KEYS = (
    *("data", "messages", "accuracy_before", "accuracy_after", "gain_low", "gain_high", "held_out"),
    *("corrected", "corrected_then_right", "releases_promoted", "releases_rejected", "thumbs_up", "thumbs_down"),
    *("seconds", "seconds_by_phase", "closed", "trouble"),
)
"""Of the object that ``--json`` prints, whatever became of the demo."""


class Release(NamedTuple):
    """A release that was decided: its adapter, and how many messages had been served by then."""

    version: str
    messages: int


class Outcome(NamedTuple):
    """Everything that the demo found out. Accuracies are shares; ``seconds`` by phase, in order."""

    data: str
    messages: int
    measured: tuple[Measured, ...]
    gain: Gain
    corrected: int
    corrected_then_right: float
    promoted: tuple[Release, ...]
    refused: tuple[Release, ...]
    thumbs_up: int
    thumbs_down: int
    seconds: dict[str, float]

    @property
    def trouble(self) -> str | None:
        """Why this demo failed, in one sentence; None: the loop closed, and the agent is better for it."""
        if not self.promoted:
            return "the loop did not close: no release was promoted"
        if self.gain.low <= 0:
            return (
                f"nothing improved for certain: the gain is {100 * self.gain.mean:+.1f} points, and its 95% interval "
                f"from {100 * self.gain.low:+.1f} to {100 * self.gain.high:+.1f} does not lie above 0"
            )
        return None


def as_json(outcome: Outcome) -> dict[str, Any]:
    """One flat object with KEYS."""
    first, last = outcome.measured[0], outcome.measured[-1]
    return {
        "data": outcome.data,
        "messages": outcome.messages,
        "accuracy_before": round(first.accuracy, 4),
        "accuracy_after": round(last.accuracy, 4),
        "gain_low": round(outcome.gain.low, 4),
        "gain_high": round(outcome.gain.high, 4),
        "held_out": len(first.right),
        "corrected": outcome.corrected,
        "corrected_then_right": round(outcome.corrected_then_right, 4),
        "releases_promoted": len(outcome.promoted),
        "releases_rejected": len(outcome.refused),
        "thumbs_up": outcome.thumbs_up,
        "thumbs_down": outcome.thumbs_down,
        "seconds": round(sum(outcome.seconds.values()), 1),
        "seconds_by_phase": {phase: round(took, 1) for phase, took in outcome.seconds.items()},
        **verdict(outcome.trouble),
    }


def verdict(trouble: str | None) -> dict[str, Any]:
    """Whether the loop closed, and if not, why."""
    return {"closed": trouble is None, "trouble": trouble}


def failure(trouble: str) -> dict[str, Any]:
    """The same keys of a demo that ended before it had an outcome: what is not known is null."""
    return {**dict.fromkeys(KEYS), **verdict(trouble)}


def table(outcome: Outcome) -> str:
    """The closing table, for people."""
    first, last = outcome.measured[0], outcome.measured[-1]
    gain = outcome.gain
    rows = [
        ("messages served", f"{outcome.messages:,}"),
        ("thumbs", f"{outcome.thumbs_up:,} up, {outcome.thumbs_down:,} down; {outcome.corrected:,} corrections"),
        ("releases promoted", str(len(outcome.promoted))),
        ("releases refused", f"{len(outcome.refused)} (by the gate or the canary)"),
        ("accuracy before", f"{first.accuracy:.1%} of {len(first.right)} held-out messages"),
        ("accuracy after", f"{last.accuracy:.1%}"),
        ("gain", f"{100 * gain.mean:+.1f} points (95% interval {100 * gain.low:+.1f} to {100 * gain.high:+.1f})"),
        ("corrected, then right", f"{outcome.corrected_then_right:.0%} of {outcome.corrected} messages"),
        ("seconds", " + ".join(f"{took:.0f} {phase}" for phase, took in outcome.seconds.items())),
        ("", f"= {sum(outcome.seconds.values()):.0f}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def plot(outcome: Outcome, path: Path) -> Path:
    """Held-out accuracy over messages as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(outcome).savefig(path)
    return path


def draw(outcome: Outcome) -> Figure:
    """Held-out accuracy over messages, every release marked: those promoted green, those refused grey."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120)
    axes = figure.subplots()
    measured = [100 * point.accuracy for point in outcome.measured]
    served = [point.messages for point in outcome.measured]
    # What is live changes with a release and not in between: steps, the last of them up to the end.
    axes.step([*served, outcome.messages], [*measured, measured[-1]], where="post", color="#1f6feb")
    axes.plot(served, measured, "o", color="#1f6feb")
    for release in outcome.promoted:
        _mark(axes, release, "release", PROMOTED)
    for release in outcome.refused:
        _mark(axes, release, "refused", REFUSED)
    axes.set(
        title=f"Learning from use: {outcome.data}",
        xlabel="messages served",
        ylabel=f"right answers on {len(outcome.measured[0].right)} held-out messages, %",
    )
    axes.set_ylim(*_limits(measured))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def _mark(axes: Axes, release: Release, word: str, colour: str) -> None:
    axes.axvline(release.messages, color=colour, linestyle="--", linewidth=1)
    axes.annotate(
        f"{word} {release.version[:8]}",
        (release.messages, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(3, -4),
        textcoords="offset points",
        rotation=90,
        va="top",
        fontsize=8,
        color=colour,
    )


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """A tenth of air around the values, within 0 to 100."""
    air = max(5.0, (max(values) - min(values)) / 2)
    return max(0.0, min(values) - air), min(101.0, max(values) + air)
