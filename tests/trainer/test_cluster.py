"""The learner on a local Ray, as a service holds it: in a thread, with a worker that dies under it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

PROGRAM = """
import os, signal, sys, threading, time
from pathlib import Path
from everloop.config import RayConfig, RewardConfig
from everloop.errors import EverloopError
from reward.encoder import Encoder
from reward.features import Example
from reward.model import RewardModel
from trainer.cluster import Cluster, Interrupted
from trainer.request import Request

stop, signals = threading.Event(), []
signal.signal(signal.SIGTERM, lambda *_: signals.append("terminated"))
folder = Path(sys.argv[1])

def hold():
    cluster = Cluster(RayConfig(cpus=1))
    cluster.start()
    pid = cluster.warm(sys.argv[2], str(folder), "minilm")
    print("worker", pid, "differs", pid != os.getpid(), flush=True)
    request = Request(run="r", folder=str(folder / "r"), adapters=str(folder / "a"), base=sys.argv[2],
                      cache=str(folder), batch=str(folder / "none.parquet"), recipe={"name": "x"}, seed=0)
    try:
        cluster.train(request, stop)
    except EverloopError as error:
        print("raised", type(error).__name__, "none.parquet" in str(error), flush=True)
    os.kill(pid, signal.SIGKILL)
    print("again", cluster.warm(sys.argv[2], str(folder), "minilm") != pid, flush=True)
    snapshot = folder / "rewards" / RewardModel(RewardConfig(), Encoder("minilm")).save(folder / "rewards")
    said = [estimate.mask for estimate in cluster.estimate(snapshot, "minilm", [Example("where?", "here")] * 3, stop)]
    print("estimates", said, flush=True)
    stop.set()
    for ask in (lambda: cluster.train(request, stop), lambda: cluster.estimate(snapshot, "minilm", [], stop)):
        try:
            ask()
        except Interrupted:
            print("interrupted", flush=True)
    cluster.close()

thread = threading.Thread(target=hold)
thread.start()
while thread.is_alive():
    thread.join(0.1)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0)
print("end", signals, flush=True)
"""


def test_a_worker_is_warm_judges_raises_what_the_run_raised_and_comes_back_after_a_kill(
    untrained: Path, tmp_path: Path
):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(untrained)],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if "\x1b" not in line and line[:1] != "("]
    assert lines[0].endswith("differs True"), done.stderr[-2000:]
    assert lines[1:] == [
        "raised ContractError True",
        "again True",
        "estimates [False, False, False]",  # it has heard nothing yet
        "interrupted",
        "interrupted",
        "end ['terminated']",
    ]
    assert done.returncode == 0, done.stderr[-2000:]
    pid = int(lines[0].split()[1])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
