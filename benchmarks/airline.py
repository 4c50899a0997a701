"""How well the reward model foretells whether an airline agent solved its task, before it is told.

200 recorded episodes of 50 tasks (tau-bench) go through gateway, assembler and scorer as a live agent's would: all
episodes of five tasks are scored before the first outcome of any of them is given, so that no task is recognised. The
baselines are given the better sign, which they could not have known. ``--quick`` takes 20 tasks. Needs the recording:
``EVERLOOP_DATA``, or the example's cache.
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import everloop
from everloop.home import Home

from benchmarks._report import aim, loads, parser, publish
from benchmarks._report import load as load_now
from benchmarks._services import service
from examples.airline_replay import evaluation, recorded
from examples.airline_replay.evaluation import Judged
from examples.airline_replay.replay import Replay, Sql, replay
from services.gateway.keys import Keys

TASKS, QUICK_TASKS, BLOCK = 50, 20, 5
PATIENCE = 300.0
NOBODY = "http://127.0.0.1:9"  # no engine is asked


def judged_by(episodes: list[recorded.Recorded], home: Home) -> tuple[list[Judged], int]:
    """Replay through the platform's own processes; see ``replay``."""
    with ExitStack() as running:
        gateway = running.enter_context(service("gateway", home, NOBODY, answers="/healthz"))
        for name in ("assembler", "scorer"):
            running.enter_context(service(name, home, NOBODY, answers="/healthz"))
        key = Keys(home.root / "keys.db").create("default")
        everloop.configure(f"{gateway}/v1", key, strict=True)
        return replay(episodes, Replay(Sql(home.root, None), "assistant", PATIENCE), BLOCK, seed=0)


def main() -> int:
    options, began = parser(__doc__ or "").parse_args(), load_now()
    try:
        whole = recorded.read(recorded.find(None, Path(".everloop/cache")))
    except recorded.RecordingError as error:
        print(error, file=sys.stderr)
        return 2
    tasks = QUICK_TASKS if options.quick else TASKS
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ev-airline-") as folder:
        judged, skipped = judged_by([one for one in whole if one.task < tasks], Home(Path(folder) / "home"))
    outcomes = [one.outcome for one in judged]
    low, high = evaluation.task_interval(judged)
    found = evaluation.auc([one.score for one in judged], outcomes)
    length = evaluation.either_way([one.length for one in judged], outcomes)
    tools = evaluation.either_way([one.tool_calls for one in judged], outcomes)
    rows = [
        {"judge": "reward model", "AUC": round(found, 3), "low": round(low, 3), "high": round(high, 3)},
        {"judge": "episode length", "AUC": round(length, 3), "low": None, "high": None},
        {"judge": "number of tool calls", "AUC": round(tools, 3), "low": None, "high": None},
    ]
    notes = [
        f"{len(judged)} episodes of {len({one.task for one in judged})} tasks, {sum(outcomes):.0f} solved; {skipped} "
        "more came before the model had learned anything; 95% interval over tasks",
        f"{time.monotonic() - started:.0f} s; {loads(began)}",
    ]
    publish(
        "airline", rows, [aim("AUC above both baselines", max(length, tools), found)], quick=options.quick, notes=notes
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
