"""The pages of evidence: every release, and what stands behind one. HTML without scripts, made of what the log holds.

Pure: releases and the running canary's status in, a page out. Colours follow the reader's system, dark or light.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from everloop.release import Release

from services.releaser.evidence import told
from services.releaser.report import stops

HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'", "Cache-Control": "no-store"}
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --line: #d5dae0; --back: #fff; --panel: #f5f7f9;
  --good: #17724a; --bad: #b3261e; --band: #2f6fde; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #9aa5b1; --line: #343b44; --back: #14171b;
  --panel: #1d2127; --good: #5cc795; --bad: #ff8a80; --band: #7aa7ff; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.35rem; } h2 { font-size: 1.05rem; margin-top: 2rem; } a { color: var(--band); }
code { font: .92em ui-monospace, monospace; } .soft { color: var(--soft); } .scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; } th, td { padding: .35rem .7rem .35rem 0; text-align: left;
  border-bottom: 1px solid var(--line); vertical-align: top; } th { color: var(--soft); font-weight: 500; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.state { font-weight: 600; } .live, .canary { color: var(--good); }
.rolled_back, .rejected, .vetoed { color: var(--bad); }
.why { background: var(--panel); border-left: 3px solid var(--band); padding: .7rem 1rem; }
svg { width: 100%; height: auto; background: var(--panel); } svg text { fill: var(--soft); font: 12px system-ui; }
.band { fill: var(--band); opacity: .22; } .mean { fill: none; stroke: var(--band); stroke-width: 2; }
.zero { stroke: var(--soft); } .margin { stroke: var(--bad); stroke-dasharray: 5 4; } .grid { stroke: var(--line); }
.stage { stroke: var(--soft); stroke-dasharray: 1 4; }
"""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 300, 64, 16, 22, 34
Progress = dict[str, Any] | None
"""What ``/status`` says of the canary that runs; None: of this release none does."""


def index(releases: Iterable[Release]) -> str:
    """Every release, the newest first."""
    rows = [
        f'<tr><td><a href="/releases/{escape(r.id)}">{escape(r.id)}</a><br><code>{escape(r.adapter[:12])}</code></td>'
        f"<td>{escape(r.key)}</td><td>{_state(r)}<br><span class=soft>{_clock(r.time)}</span></td>"
        f"<td>{escape(r.reason)}<br><span class=soft>{escape(told(r))}</span></td></tr>"
        for r in sorted(releases, key=lambda one: -one.time)
    ]
    table = "<table><tr><th>release<th>policy<th>state<th>why</tr>" + "".join(rows) + "</table>"
    nothing = "<p>No releases yet: no adapter answers. A training run makes the first candidate.</p>"
    return _page("Releases", f"<h1>Releases</h1><div class=scroll>{table}</div>" if rows else nothing)


def one(release: Release, progress: Progress) -> str:
    """What is compared, how many, the interval over time, when it decides and what stops it."""
    seen = (progress or {}).get("arms") or release.evidence.get("canary") or {}
    interval = (progress or {}).get("interval") or {k: seen.get(k) for k in ("difference", "low", "high")}
    points = (progress or {}).get("history") or seen.get("history") or []
    parts = [
        '<p><a href="/releases">All releases</a></p>',
        f"<h1>{escape(release.id)} {_state(release)}</h1>",
        f"<p class=soft>{escape(release.key)}, adapter <code>{escape(release.adapter)}</code>, compared with "
        f"<code>{escape(release.incumbent[:16])}</code>; in this state since {_clock(release.time)}</p>",
        f"<p class=why>{escape(release.reason)}</p>",
        _waits(progress),
        _compared(release, seen, interval, points),
        _expected(release, progress),
        _gate(release.evidence.get("gate") or {}),
        _shadow(release.evidence.get("shadow") or {}),
    ]
    return _page(release.id, "".join(parts))


def _waits(progress: Progress) -> str:
    waits = (progress or {}).get("waits")
    return f"<p>{escape(str(waits))}</p>" if waits else ""


def _compared(release: Release, seen: dict[str, Any], interval: dict[str, Any], points: Sequence[Any]) -> str:
    plan = release.plan
    if plan is None or not seen:
        return ""
    text = (
        f"<h2>Canary</h2><p>Compared is {escape(plan.metric)} (mean of thumbs, ratings and outcomes of each person, "
        f"0 to 1), canary minus control, within each stage. Margin {plan.margin:g}; the interval holds at all times, "
        f"each side with probability {1 - plan.alpha:g}.</p>"
    )
    difference = interval.get("difference")
    if difference is not None:
        low, high = float(interval["low"]), float(interval["high"])
        text += f"<p>Difference <b>{difference:+.3f}</b>, between <b>{low:+.3f}</b> and <b>{high:+.3f}</b>.</p>"
    return text + chart(points, plan.margin, release.stages) + _arms(seen) + _guards(seen)


def _arms(seen: dict[str, Any]) -> str:
    head = "<tr><th>stage<th class=n>share" + "".join(
        f"<th class=n>{arm}: came<th class=n>rated<th class=n>success" for arm in ("canary", "control")
    )
    rows = [head + "</tr>"]
    for number, stage in enumerate(seen.get("stages", []), 1):
        cells = [_counts(stage[arm]) for arm in ("canary", "control")]
        rows.append(f"<tr><td>{number}<td class=n>{stage['share']:.0%}{''.join(cells)}</tr>")
    whole = [
        f"<td class=n>{seen[arm].get('episodes', 0):,} episodes<td class=n>{seen[arm]['units']:,}"
        f"<td class=n>{_mean(seen[arm].get('mean'))}"
        for arm in ("canary", "control")
        if arm in seen
    ]
    return f"<div class=scroll><table>{''.join(rows)}<tr><td>all<td>{''.join(whole)}</tr></table></div>"


def _counts(arm: dict[str, Any]) -> str:
    return f"<td class=n>{arm['came']:,}<td class=n>{arm['units']:,}<td class=n>{_mean(arm.get('mean'))}"


def _guards(seen: dict[str, Any]) -> str:
    rows = [
        f"<tr><td>{words}"
        + "".join(f"<td class=n>{_cell(seen.get(arm, {}).get(key))}" for arm in ("canary", "control"))
        for key, words in (
            ("calls", "calls"),
            ("failed", "failed"),
            ("empty", "empty answers"),
            ("broken", "broken tool calls"),
            ("length", "typical length, characters"),
        )
    ]
    head = "<tr><th>guards<th class=n>canary<th class=n>control</tr>"
    return f"<h2>Guards</h2><table>{head}{'</tr>'.join(rows)}</tr></table>"


def _expected(release: Release, progress: Progress) -> str:
    items = []
    if progress and progress.get("decides"):
        items.append(str(progress["decides"]))
    if release.plan is not None and release.state == "canary":
        items += [f"Stops: {why}" for why in stops(release.plan, (progress or {}).get("guards") or {})]
    listed = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<h2>When it decides, and what stops it</h2><ul>{listed}</ul>" if listed else ""


def _gate(gate: dict[str, Any]) -> str:
    checks = {name: check for name, check in gate.items() if isinstance(check, dict)}
    rows = "".join(
        f"<tr><td>{escape(name)}<td>{'passed' if check.get('passed') else 'failed'}"
        f"<td>{escape(str(check.get('says', '')))}"
        for name, check in checks.items()
    )
    return f"<h2>Gate</h2><table>{rows}</table>" if rows else ""


def _shadow(its: dict[str, Any]) -> str:
    if not its:
        return ""
    told_ = ", ".join(f"{its.get(key, 0)} {key}" for key in ("failed", "empty", "broken"))
    return f"<h2>Shadow</h2><p>{its.get('prompts', 0)} recent prompts answered before any user saw it: {told_}.</p>"


def chart(points: Sequence[Sequence[float]], margin: float, stages: Sequence[float] = ()) -> str:
    """The interval over time as SVG: a band between its bounds, zero, the margin, and where stages began."""
    if len(points) < 2:
        return "<p class=soft>The interval is drawn once two looks show rated people in both arms.</p>"
    began = min(stages[0], points[0][0]) if stages else points[0][0]
    span = max(points[-1][0] - began, 1.0)
    reach = min(1.0, max(2 * margin, *(max(abs(p[2]), abs(p[3])) for p in points[len(points) // 4 :])) * 1.1)

    def x(at: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * min(max((at - began) / span, 0.0), 1.0)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (reach - min(max(value, -reach), reach)) / (2 * reach)

    upper = [f"{x(p[0]):.1f},{y(p[3]):.1f}" for p in points]
    lower = [f"{x(p[0]):.1f},{y(p[2]):.1f}" for p in reversed(points)]
    middle = " ".join(f"{x(p[0]):.1f},{y(p[1]):.1f}" for p in points)
    drawn = [f'<polygon class=band points="{" ".join(upper + lower)}"/><polyline class=mean points="{middle}"/>']
    drawn += [_across(y(value), css, label) for value, css, label in _levels(reach, margin)]
    drawn += [
        f'<line class=stage x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text x="{x(at) + 3:.1f}" y="{TOP - 7}">stage {number}</text>'
        for number, at in enumerate(stages, 1)
    ]
    ends = ((LEFT, "start", _clock(began)), (WIDTH - RIGHT, "end", _clock(points[-1][0])))
    drawn += [f'<text x="{at}" y="{HEIGHT - 12}" text-anchor="{side}">{when}</text>' for at, side, when in ends]
    count = f"{points[-1][4]:,.0f} rated people at the end"
    units = f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">{count}</text>'
    title = "<title>Difference of success, canary minus control, and its interval over time</title>"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{title}{"".join(drawn)}{units}</svg>'


def _levels(reach: float, margin: float) -> list[tuple[float, str, str]]:
    step = 10 ** math.floor(math.log10(reach))
    grid = [(sign * step, "grid", f"{sign * step:+g}") for sign in (-1, 1) if step < reach and step != margin]
    return [*grid, (0.0, "zero", "0"), (-margin, "margin", f"margin {-margin:+g}")]


def _across(at: float, css: str, label: str) -> str:
    line = f'<line class={css} x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
    if css == "margin":
        return line + f'<text x="{WIDTH - RIGHT - 4}" y="{at - 5:.1f}" text-anchor="end">{label}</text>'
    return line + f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{label}</text>'


def _state(release: Release) -> str:
    return f'<span class="state {release.state.value}">{release.state.value.replace("_", " ")}</span>'


def _mean(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:,}"


def _clock(at: float) -> str:
    return time.strftime("%F %H:%M:%S", time.localtime(at))


def _page(title: str, body: str) -> str:
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{escape(title)}</title>"
    return f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{body}</body></html>"
