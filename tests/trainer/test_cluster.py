"""The learner on a local Ray, as a service holds it: in a thread, with a worker that dies under it; and a cluster."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

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


JOINING = """
import sys, threading
from everloop.config import RayConfig
from everloop.errors import EverloopError
from trainer.cluster import Cluster
from trainer.request import Request

folder = sys.argv[1]
cluster = Cluster(RayConfig(address=sys.argv[3]))
cluster.start()
print("worker", cluster.warm(sys.argv[2], folder, "minilm"), flush=True)
request = Request(run="r", folder=folder + "/r", adapters=folder + "/a", base=sys.argv[2], cache=folder,
                  batch=folder + "/none.parquet", recipe={"name": "x"}, seed=0)
try:
    cluster.train(request, threading.Event())
except EverloopError as error:
    print("raised", type(error).__name__, "none.parquet" in str(error), flush=True)
cluster.close()
"""

OWN = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray takes 127.0.0.1 for the machine's outer address
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}


@pytest.fixture
def head(tmp_path_factory: pytest.TempPathFactory, until: Callable[..., Any]) -> Iterator[str]:
    """The address of a Ray cluster of one node, in processes that this test did not make by ``Cluster``."""
    scratch = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray's sockets lie in it
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=1"]
    options = ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats"]
    sizes = [f"--temp-dir={scratch}", f"--object-store-memory={100 * 2**20}"]
    log = (tmp_path_factory.mktemp("head") / "log").open("w")
    node = subprocess.Popen(
        [*command, *options, *sizes], env={**os.environ, **OWN}, stdout=log, stderr=log, start_new_session=True
    )
    try:
        until(lambda: "Ray runtime started" in Path(log.name).read_text(), 120)
        yield f"127.0.0.1:{port}"
        assert node.poll() is None, "who leaves a cluster does not end it"
    finally:
        node.terminate()
        node.wait(120)
        with suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        log.close()
        shutil.rmtree(scratch, ignore_errors=True)


def test_a_cluster_is_joined_by_its_address_and_left_running(head: str, untrained: Path, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", JOINING, str(tmp_path), str(untrained), head],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **OWN, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if "\x1b" not in line and line[:1] != "("]
    assert lines[1:] == ["raised ContractError True"], done.stderr[-2000:]
    assert done.returncode == 0, done.stderr[-2000:]
