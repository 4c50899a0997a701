"""The learner on Ray: a local one made here, or a cluster by address and a shared folder. Nothing else imports ray.

::

    the learner service's thread ──start──▶ Ray (gcs, raylet; die with this process)
              │                                └─ worker: LearnerActor, kept warm between runs
              └──train(request)──▶ actor.train ──▶ run's folder: material, checkpoints, adapter
                     ▲   the worker dies: Ray starts it again and repeats the call,
                     └── which goes on from the run's last checkpoint

The thread that starts Ray must outlive it: Ray's processes get a signal when their parent *thread* ends. On a
cluster elsewhere the home and the cache must lie on storage that its nodes share, below the same paths. A
cluster that asks for a token takes it from ``RAY_AUTH_MODE=token`` and ``RAY_AUTH_TOKEN``, as Ray itself reads them.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everloop.config import RayConfig
from everloop.errors import EverloopError

from trainer.request import Request, Trained

if TYPE_CHECKING:
    from reward.features import Example
    from reward.model import Estimate

logger = logging.getLogger(__name__)
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_enable_metrics_collection": "0",
}
OBJECT_STORE = 200 * 2**20
RETRIES = 3  # of a run whose worker died; a run that kills its worker each time is given up
LOOK_EVERY = 0.5
PREFIX = "ever-"


class ClusterFailed(EverloopError):
    """Ray could not be reached or started, or a run's worker died over and over. The run may be tried again."""


class Interrupted(EverloopError):
    """The service was asked to stop while a run was under way; the next start goes on with it."""


class LearnerActor:
    """The learner inside a worker process. ``niceness``: serving on the same machine goes first."""

    def __init__(self, niceness: int) -> None:
        from trainer.learner import Learner

        os.nice(niceness)
        self._learner = Learner()

    def warm(self, base: str, cache: str, encoder: str) -> int:
        """Load what the first run needs; returns the worker's process id."""
        self._learner.warm(base, cache, encoder)
        return os.getpid()

    def estimate(self, snapshot: str, encoder: str, examples: Sequence[Example], threads: int) -> list[Estimate]:
        return self._learner.estimate(snapshot, encoder, examples, threads)

    def train(self, request: Request) -> Trained:
        return self._learner.train(request)


class Cluster:
    """Ray, and one learner on it. Every method must be called from the same, long-lived thread."""

    def __init__(self, config: RayConfig) -> None:
        self._config = config
        self._actor: Any = None
        self._scratch: Path | None = None

    @property
    def cpus(self) -> int:
        return self._config.cpus or len(os.sched_getaffinity(0))

    def start(self) -> None:
        """Start or join Ray and place the learner; some ten seconds. Raises ClusterFailed."""
        if self._actor is not None:
            return
        for name, setting in QUIET.items():
            os.environ.setdefault(name, setting)
        import ray

        options: dict[str, Any] = {"include_dashboard": False, "logging_level": logging.ERROR, "log_to_driver": True}
        if self._config.address == "local":
            self._scratch = _scratch()
            options |= {
                "address": "local",
                "num_cpus": self.cpus,
                "object_store_memory": OBJECT_STORE,
                "_node_ip_address": "127.0.0.1",
                "_temp_dir": str(self._scratch),
            }
        else:
            options |= {"address": self._config.address}
            del options["include_dashboard"]
        try:
            with _own_sigterm():
                ray.init(**options)
        except Exception as error:  # Ray raises a dozen unrelated types here
            raise ClusterFailed(f"Ray at {self._config.address!r} did not start: {error}") from error
        niceness = 5 if self._config.address == "local" else 0
        self._actor = (
            ray.remote(LearnerActor).options(num_cpus=1, max_restarts=-1, max_task_retries=RETRIES).remote(niceness)
        )

    def warm(self, base: str, cache: str, encoder: str) -> int:
        """Load base model and encoder in the worker; returns its process id."""
        import ray

        try:
            return int(ray.get(self._actor.warm.remote(base, cache, encoder)))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            raise ClusterFailed(f"the learner's worker did not come up: {error}") from None

    def estimate(
        self, snapshot: Path, encoder: str, examples: Sequence[Example], stop: threading.Event
    ) -> list[Estimate]:
        """What the reward model of a snapshot says of each answer, by the worker that will train on it.

        It keeps the model and the texts' vectors, so the run that follows need not make them again. Raises as
        ``train``.
        """
        task = self._actor.estimate.remote(str(snapshot.absolute()), encoder, list(examples), self.cpus)
        return self._result(task, stop, "scoring a batch")  # type: ignore[no-any-return]

    def train(self, request: Request, stop: threading.Event, meanwhile: Callable[[], None] = lambda: None) -> Trained:
        """Run it to its end; ``meanwhile`` is called twice a second.

        Raises:
            Interrupted: ``stop`` was set meanwhile.
            ClusterFailed: the worker died more often than it is started again, or Ray is gone.
            Exception: what the run itself raised: TrainingDiverged, or anything of a researcher's own algorithm.
        """
        task = self._actor.train.remote(request)
        return self._result(task, stop, f"run {request.run}", meanwhile)  # type: ignore[no-any-return]

    def _result(self, task: Any, stop: threading.Event, what: str, meanwhile: Callable[[], None] = lambda: None) -> Any:
        import ray

        while not stop.is_set():
            meanwhile()
            ready, _ = ray.wait([task], timeout=LOOK_EVERY)
            if not ready:
                continue
            try:
                return ray.get(task)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                raise ClusterFailed(f"{what}: its worker died over and over: {error}") from None
        raise Interrupted(f"{what} goes on at the next start")

    def close(self) -> None:
        """Leave Ray; a local one ends."""
        import ray

        self._actor = None
        with _own_sigterm():
            ray.shutdown()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray takes SIGTERM for a crash and ends the process by it; this gives the signal back to whoever had it.

    By the C library's call, for Python lets the main thread alone set handlers.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    held = ctypes.create_string_buffer(512)  # struct sigaction, larger than any
    libc.sigaction(signal.SIGTERM, None, held)
    try:
        yield
    finally:
        libc.sigaction(signal.SIGTERM, held, None)


def _scratch() -> Path:
    """A short path for Ray's sockets (108 bytes at most); what processes that are gone left behind is removed."""
    root = Path(tempfile.gettempdir())
    for old in root.glob(f"{PREFIX}*-ray"):
        pid = old.name.removeprefix(PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(old, ignore_errors=True)
    made = root / f"{PREFIX}{os.getpid()}-ray"
    made.mkdir(mode=0o700, exist_ok=True)
    return made
