"""An adapter's files: from the registry into the home, checked before any engine sees them.

Runs as a process of its own, ``python -m services.releaser.files``, started by the releaser when it is needed:
MLflow and torch take seconds to import and hundreds of megabytes, and a file made to break its reader breaks this
process alone. One JSON object a line comes in, ``{"do": name, …}``, and one goes out, ``{"done": result}`` or
``{"error": class, "says": message}``. It ends when its input does, so it never outlives the releaser, and after
some idle minutes.
"""

from __future__ import annotations

import json
import math
import os
import select
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from everloop.config import Config, load
from everloop.errors import AdapterRefused, EverloopError
from everloop.home import Home
from everloop.names import CHECKPOINT
from everloop.registry import ADAPTER_FILES, ADAPTER_TAG, REFUSED_TAG, Registry, allowed_files
from everloop.release import Adapter

IDLE = 600.0


class AdapterFiles:
    """``home/adapters/<hash>`` for the adapters of one installation."""

    def __init__(self, config: Config) -> None:
        self._config = config
        home = Home(config.home)
        self._folder = home.folder("adapters")
        self._runs = home.root / "runs"
        self._registry = Registry(config.under_home(config.mlflow.uri), home.root / "mlartifacts")
        self._bases: dict[str, Any] = {}

    def bring(self, adapter: str, uri: str, tenant: str, policy: str) -> None:
        """Have ``home/adapters/<adapter>``, fetched where it is not here yet, and check it; see :meth:`check`.

        What is refused is deleted where it was downloaded for this, or is not what its name says (the registry can
        give it again). Else it stays: other policies may serve it, and this one did with the base that it had.

        Raises:
            AdapterRefused: the files are not those that the hash names, or do not fit the policy's base.
            RegistryError: the registry does not answer; try again later.
        """
        from trainer.policy.lora import content_hash

        fresh = not (self._folder / adapter).exists()
        trained = CHECKPOINT.fullmatch(uri)
        if trained is None:
            folder = self._registry.fetch(uri, adapter, self._folder, content_hash)
        else:
            folder = self._copied(self._runs / trained[1] / "adapters" / adapter)
        try:
            self.check(folder, adapter, tenant, policy)
        except AdapterRefused:
            if fresh or not _is_whole(folder, adapter):
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _copied(self, checkpoint: Path) -> Path:
        """``home/adapters/<hash>``, a copy of a checkpoint's files. It stays when the run lets go of them: calls that
        it answered name it. Raises AdapterRefused where they are gone."""
        target = self._folder / checkpoint.name
        if target.exists():
            return target
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=self._folder) as scratch:
            partial = Path(scratch) / checkpoint.name
            partial.mkdir()
            try:
                for name in allowed_files(checkpoint):
                    shutil.copyfile(checkpoint / name, partial / name)
            except FileNotFoundError:
                raise AdapterRefused(
                    f"the files of this checkpoint are gone: a run keeps its newest (train.keep_checkpoints). "
                    f"They lay in {checkpoint}"
                ) from None
            partial.rename(target)
        return target

    def check(self, folder: Path, adapter: str | None, tenant: str, policy: str) -> None:
        """Names, shapes, finite values and hash (None: any), against the policy's base, and whether the engine can
        serve it.

        Raises AdapterRefused.
        """
        from trainer.policy import lora, servable

        base = self._base(tenant, policy)
        lora.check(folder, base, adapter)
        servable.check(folder, servable.of(self._config.serving, lambda: base.folder))

    def _base(self, tenant: str, policy: str) -> Any:
        from trainer.policy import base

        name = self._config.policy(tenant, policy).base
        if name not in self._bases:
            self._bases[name] = base.load(name, self._config.cache)
        return self._bases[name]

    def distances(self, adapter: str, tenant: str, policy: str, rows: list[list[list[int]]]) -> list[float | None]:
        """KL to the base of each [prompt ids, answer ids], in nats a token; None where the answer is empty."""
        from trainer.policy.divergence import kl_to_base

        pairs = [(row[0], row[1]) for row in rows]
        found = kl_to_base(self._base(tenant, policy), self._folder / adapter, pairs)
        return [_known(distance, bool(answer)) for distance, (_, answer) in zip(found, pairs, strict=True)]

    def adopt(self, source: str, tenant: str, policy: str, reason: str, now: float) -> dict[str, Any]:
        """Register an adapter that was made elsewhere, as if a run had published it: fields of ``Adapter``.

        Raises:
            AdapterRefused: the files are not an adapter of this policy's base.
            RegistryError: the registry does not answer.
        """
        if not Path(source).is_dir():
            raise AdapterRefused(f"there is no adapter folder {source}")
        names = allowed_files(Path(source))
        with tempfile.TemporaryDirectory(prefix=".adopting-", dir=self._folder) as scratch:
            copied = Path(scratch) / "adapter"
            copied.mkdir()
            for name in names:
                shutil.copyfile(Path(source) / name, copied / name)
            adapter = self._hash(copied, tenant, policy)
            registry_run = self._log(copied, adapter, tenant, policy, reason, now)
            uri = self._registry.register(tenant, policy, registry_run=registry_run, content=adapter, tags={})
            return self._announced(copied, adapter, tenant, policy, uri, registry_run, now)

    def adopt_version(self, version: str, tenant: str, policy: str, now: float) -> dict[str, Any]:
        """As :meth:`adopt`, for a version that somebody made in the registry. What is refused is marked there, with the
        reason, and not looked at again."""
        known = self._registry.version(tenant, policy, version)
        if REFUSED_TAG in known.tags:
            raise AdapterRefused(known.tags[REFUSED_TAG])
        with tempfile.TemporaryDirectory(prefix=".adopting-", dir=self._folder) as scratch:
            try:
                folder = self._registry.download(known.uri, Path(scratch) / "adapter")
                adapter = self._hash(folder, tenant, policy)
            except AdapterRefused as error:
                self._registry.mark(known.uri, REFUSED_TAG, str(error))
                raise
            self._registry.mark(known.uri, ADAPTER_TAG, adapter)
            return self._announced(folder, adapter, tenant, policy, known.uri, known.run, now)

    def _hash(self, folder: Path, tenant: str, policy: str) -> str:
        """The content hash of files that nobody vouches for, once they are checked. Raises AdapterRefused."""
        from trainer.policy.lora import content_hash

        self.check(folder, None, tenant, policy)
        return content_hash(folder)

    def _log(self, folder: Path, adapter: str, tenant: str, policy: str, reason: str, now: float) -> str:
        fields = json.loads((folder / "adapter_config.json").read_bytes())
        return self._registry.log_run(
            tenant,
            policy,
            _made_elsewhere(adapter),
            title=f"{adapter[:8]} registered",
            took=(now, now),
            batch="",
            params={"rank": fields["r"], "reason": reason},
            curves=[],
            results={},
            tags={"everloop.source": "registered by a person"},
            files={ADAPTER_FILES: folder},
        )

    def _announced(
        self, folder: Path, adapter: str, tenant: str, policy: str, uri: str, registry_run: str, now: float
    ) -> dict[str, Any]:
        fields = json.loads((folder / "adapter_config.json").read_bytes())
        return Adapter(
            hash=adapter,
            tenant=tenant,
            policy=policy,
            base=self._config.policy(tenant, policy).base,
            run=_made_elsewhere(adapter),
            batch="",
            uri=uri,
            registry_run=registry_run,
            rank=int(fields["r"]),
            targets=(*(fields.get("target_modules") or ()), *(fields.get("target_parameters") or ())),
            time=now,
        ).model_dump(mode="json")

    def aliases(self, policies: list[tuple[str, str]]) -> dict[str, dict[str, str]]:
        """The number of a version by its alias, by 'tenant/policy'. Raises RegistryError."""
        return {f"{tenant}/{policy}": self._registry.aliases(tenant, policy) for tenant, policy in policies}

    def mirror(self, tenant: str, policy: str, uri: str | None) -> None:
        """Point the registry's alias ``live`` at what is live; None: at nothing. Raises RegistryError."""
        if uri is None:
            self._registry.drop_alias(tenant, policy, "live")
        else:
            self._registry.set_alias(uri, "live")


def _made_elsewhere(adapter: str) -> str:
    """In place of a run's name: the same for the same files, so that what is registered twice is one candidate."""
    return f"registered-{adapter[:12]}"


def _is_whole(folder: Path, adapter: str) -> bool:
    """Whether an adapter's folder holds what its name says, and nothing else."""
    from trainer.policy.lora import content_hash

    try:
        allowed_files(folder)
        return content_hash(folder) == adapter
    except (AdapterRefused, OSError, ValueError):
        return False


def _known(distance: float, answered: bool) -> float | None:
    """What is not finite is as far as can be; what was not answered has no distance."""
    if not answered:
        return None
    return distance if math.isfinite(distance) else math.inf


def answer(files: AdapterFiles, line: str) -> dict[str, Any]:
    """What to answer to one request."""
    asked = json.loads(line)
    doing = {
        "bring": files.bring,
        "distances": files.distances,
        "adopt": files.adopt,
        "adopt_version": files.adopt_version,
        "aliases": files.aliases,
        "mirror": files.mirror,
    }
    try:
        return {"done": doing[asked.pop("do")](**asked)}
    except EverloopError as error:
        return {"error": type(error).__name__, "says": str(error)}


def main() -> int:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    files = AdapterFiles(load())
    last = time.monotonic()
    while time.monotonic() - last < IDLE:
        if not select.select([sys.stdin], [], [], 60.0)[0]:
            continue
        line = sys.stdin.readline()
        if not line:
            return 0
        print(json.dumps(answer(files, line)), file=out)
        last = time.monotonic()
    return 0


if __name__ == "__main__":
    sys.exit(main())
