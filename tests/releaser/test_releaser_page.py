"""The pages of evidence and the line that they draw, and what ``everloop release watch`` prints."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from everloop.release import CanaryPlan, Release, ReleaseState

from services.commands.watch import told
from services.releaser import page
from services.releaser.__main__ import add_pages
from services.releaser.history import MOST, History
from services.releaser.report import Board

PLAN = CanaryPlan(share=0.25, stages=(0.01, 0.25))
ARM = {"episodes": 900, "units": 400, "mean": 0.65, "calls": 1200, "failed": 1, "empty": 0, "broken": 2, "length": 31.0}
STAGE = {"came": 50, "units": 20, "mean": 0.6}
POINTS = [[1000.0 + 60 * i, 0.01, 0.01 - 1 / math.sqrt(i + 4), 0.01 + 1 / math.sqrt(i + 4), 9.0 * i] for i in range(90)]
SEEN: dict[str, Any] = {
    "canary": ARM,
    "control": {**ARM, "length": None},
    "stages": [{"share": share, "canary": STAGE, "control": {**STAGE, "mean": None}} for share in PLAN.stages],
    "history": POINTS,
    "difference": 0.01,
    "low": -0.03,
    "high": 0.05,
}


def release(state: ReleaseState = ReleaseState.CANARY, **evidence: Any) -> Release:
    return Release(
        id="rel_a", tenant="t", policy="p", adapter="abc", uri="u", state=state, plan=PLAN, time=5000.0,
        stages=(1000.0, 3000.0), reason="Because <script>alert(1)</script>.", evidence=evidence,
    )  # fmt: skip


class Closed(HTMLParser):
    """Fails on a drawing whose tags do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.drawn: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.drawn.append(tag)
        if tag in ("svg", "text", "title"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("svg", "text", "title"):
            assert self.open.pop() == tag


def test_a_page_says_what_is_compared_and_draws_the_interval() -> None:
    shown = page.one(release(canary=SEEN, gate={"gold": {"passed": True, "says": "+3 points"}}), None)
    parser = Closed()
    parser.feed(shown)
    assert parser.open == []
    assert {"svg", "polygon", "polyline"} <= set(parser.drawn)
    assert "script" not in parser.drawn
    assert "Difference <b>+0.010</b>, between <b>-0.030</b> and <b>+0.050</b>" in shown
    assert "margin -0.05" in shown
    assert "stage 2" in shown
    assert "worse, however little" in shown
    assert "prefers-color-scheme: dark" in shown


@pytest.mark.parametrize("evidence", [{}, {"canary": {}}, {"canary": {**SEEN, "history": POINTS[:1]}}])
def test_a_page_of_little_is_a_page(evidence: dict[str, Any]) -> None:
    for state in ReleaseState:
        assert "</html>" in page.one(release(state, **evidence), None)
    assert "No releases yet" in page.index([])


async def test_pages_are_served_and_unknown_ones_are_not_found() -> None:
    board, app = Board(), web.Application()
    add_pages(app, board)
    board.releases = {"rel_a": release(canary=SEEN)}
    board.policies = {"t/p": {"in_progress": {"release": "rel_a", "waits": "for <you>", "decides": "soon"}}}
    async with TestClient(TestServer(app)) as client:
        every = await client.get("/releases")
        assert "Because &lt;script&gt;" in await every.text()
        one = await client.get("/releases/rel_a")
        assert one.headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert "for &lt;you&gt;" in await one.text()
        assert (await client.get("/releases/rel_b")).status == 404


def test_a_history_is_bounded_and_keeps_both_ends() -> None:
    history = History()
    history.add(0.0, (math.nan, -1.0, 1.0), 0)
    for i in range(5000):
        history.add(float(i), (0.0, -0.1, 0.1), i)
        history.add(float(i), (0.0, -0.1, 0.1), i)  # no new unit, no new point
    assert MOST / 2 <= len(history.points) <= MOST
    assert history.points[0][0] == 0.0
    assert history.points[-1][0] > 4900
    assert json.dumps(history.points)


def test_watching_tells_all_that_a_person_asks() -> None:
    progress = {
        "arms": SEEN,
        "interval": SEEN,
        "decides": "400 rated units of 900",
        "stops": ["it is worse"],
        "waits": "w",
    }
    text = "\n".join(told(release(), progress))
    for words in (
        "canary minus control",
        "margin 0.05",
        "2 now",
        "-0.030 to +0.050",
        "failed 1/1",
        "it is worse",
        "of 900",
    ):
        assert words in text
    ended = "\n".join(told(release(ReleaseState.ROLLED_BACK, canary=SEEN), None))
    assert "rolled back" in ended
    assert "2 now" not in ended
    assert "the releaser does not answer" in "\n".join(told(release(), None))
