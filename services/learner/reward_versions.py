"""Released reward versions in the registry, with their evidence: ``<tenant>.<policy>.reward``, alias ``live``.

Only what scored is registered, and its numbers alone: weights stay in the home's ``rewards/``, and what was learned of
people with them. Nobody waits for it: a registry that is down is tried again, and scoring never asks it.
"""

from __future__ import annotations

import json
import logging
import tempfile
import threading
from pathlib import Path
from typing import Any

from everloop import wire
from everloop.errors import ContractError, LogError, RegistryError
from everloop.log import Log
from everloop.registry import EVIDENCE_FILES, REWARD_TAG, Registry
from everloop.run import RewardVersion
from everloop.topics import REWARDS
from everloop.wire import BlobStore

from services.releaser.journal import Tail

logger = logging.getLogger(__name__)
EVERY = 5.0  # seconds between looks at the log
FIRST = 20.0  # seconds after the start before the first one: what others need then goes first
LONGEST = 60.0  # between tries while the registry is away


def reward_name(policy: str) -> str:
    """What a policy's reward model is called beside the policy's own model. Example: 'desk' to 'desk.reward'."""
    return f"{policy}.reward"


class RewardVersions:
    """``run`` in a thread of its own until ``stop``. ``trouble``: why nothing is registered now; None: it is."""

    def __init__(self, log: Log, blobs: BlobStore, registry: Registry, stop: threading.Event) -> None:
        self._tail, self._blobs, self._registry, self._stop = Tail(log, REWARDS), blobs, registry, stop
        self._waiting: list[RewardVersion] = []
        self._known: dict[str, dict[str, str]] = {}  # by policy, the uri of each registered version
        self.trouble: str | None = None

    def run(self) -> None:
        pause = EVERY
        self._stop.wait(FIRST)
        while not self._stop.is_set():
            try:
                self.look()
                pause, self.trouble = EVERY, None
            except (RegistryError, LogError) as error:
                if self.trouble is None:
                    logger.warning("reward versions are not registered: %s", error)
                pause, self.trouble = min(2 * pause, LONGEST), str(error)
            self._stop.wait(pause)

    def look(self) -> None:
        """Register what was released since the last look. Raises RegistryError, LogError: what is left is kept."""
        for record in self._tail.all():
            if record.value is not None:
                try:
                    version = wire.decode(RewardVersion, record.value, self._blobs)
                except ContractError:  # whoever reads the topic as a handler buries it
                    continue
                if version.state == "released":
                    self._waiting.append(version)
        newest = {version.key: version for version in self._waiting}
        while self._waiting and not self._stop.is_set():
            version = self._waiting[0]
            uri = self._registered(version)
            if newest[version.key] is version:
                self._registry.set_alias(uri, "live")
            self._waiting.pop(0)

    def _registered(self, version: RewardVersion) -> str:
        name = reward_name(version.policy)
        if version.key not in self._known:
            self._known[version.key] = self._registry.tagged(version.tenant, name, REWARD_TAG)
        known = self._known[version.key]
        if version.version not in known:
            known[version.version] = self._register(version, name)
        elif "order" in version.evidence:
            self._registry.mark(known[version.version], "everloop.reason", version.reason)
        return known[version.version]

    def _register(self, version: RewardVersion, name: str) -> str:
        numbers: dict[str, Any] = {"auc": version.auc, "calibration_error": version.calibration_error}
        numbers |= {"updates": version.updates, **version.evidence}
        results = {key: float(value) for key, value in numbers.items() if isinstance(value, int | float)}
        with tempfile.TemporaryDirectory(prefix="everloop-reward-") as scratch:
            (Path(scratch) / "version.json").write_text(json.dumps(version.model_dump(mode="json"), indent=1))
            run = self._registry.log_run(
                version.tenant,
                name,
                version.version,
                title=f"reward {version.version}",
                took=(version.time, version.time),
                batch="",
                params={"path": version.path},
                curves=(),
                results=results,
                tags={"everloop.reason": version.reason},
                files={EVIDENCE_FILES: Path(scratch)},
            )
        tags = {"everloop.reason": version.reason, "everloop.path": version.path}
        return self._registry.register(
            version.tenant,
            name,
            registry_run=run,
            content=version.version,
            tags=tags,
            tag=REWARD_TAG,
            files=EVIDENCE_FILES,
        )
