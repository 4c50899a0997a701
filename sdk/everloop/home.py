"""Where everything lies below one home folder, and the secret of the installation."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from tempfile import TemporaryFile

from everloop.errors import ConfigError
from everloop.ids import Ids
from everloop.wire import BlobStore


class Home:
    """The folders of one installation. Safe to delete as a whole while nothing runs.

    ========================  ==========================================================
    ``log.db``                the embedded log
    ``log.url``               the log that all of this belongs to
    ``config.path``           the configuration file of its newest start
    ``spool/events.db``       what the gateway acknowledged and Kafka has not yet: nowhere else
    ``keys.db``               hashed API keys
    ``blobs/``                large bodies by content hash
    ``state/<handler>.db``    state and offsets of each stream handler
    ``store/<table>/…``       Parquet: episodes, trajectories, scores, feedback, …
    ``batches/<id>.parquet``  pinned training batches
    ``rewards/<t>/<p>/<v>/``  reward-model snapshots
    ``runs/<run>/``           checkpoints of training runs, the newest with adapter files
    ``adapters/<hash>/``      adapter files fetched from the registry, checked
    ``vllm-adapters/<hash>/`` those in vLLM's layout, where it differs
    ``gold/<t>/<p>.jsonl``    gold items
    ``mlflow.db``, ``mlartifacts/``   the registry
    ``run/<service>.json``    pid, url and start time of each running service
    ``logs/<service>.log``    what each service printed
    ========================  ==========================================================
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def made(self) -> Home:
        """Itself, its folder there. Raises ConfigError where that cannot be made or written."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=self.root):
                return self
        except OSError as error:
            raise ConfigError(
                f"the home folder {self.root} cannot be made or written ({error.strerror}): choose another with --home "
                "or EVERLOOP_HOME, or give this user the right to write there"
            ) from None

    def folder(self, *parts: str) -> Path:
        """A folder below the home, made if it is missing."""
        path = self.root.joinpath(*parts)
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def blobs(self) -> BlobStore:
        return BlobStore(self.root / "blobs")

    @property
    def is_known(self) -> bool:
        """Whether an installation ever ran here."""
        return (self.root / "secret").exists()

    def secret(self) -> bytes:
        """32 random bytes, made once; readable by the owner alone. Losing it makes old response ids unknown."""
        path = self.folder() / "secret"
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        except FileExistsError:
            return path.read_bytes()
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(32))
        return path.read_bytes()

    @property
    def ids(self) -> Ids:
        return Ids(self.secret())
