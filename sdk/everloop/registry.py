"""The registry of runs and adapters: MLflow, behind the few calls that the platform makes. Nothing else imports it.

A SQLite file below the home and a server's URL are the same client, so there is no port. Every write is
idempotent: a run is found again by its tag ``everloop.run``, a model version by the adapter's hash, so that a
publisher that was killed may simply start over. An adapter is fetched as files and checked; nothing is unpickled.

MLflow takes seconds to import and to open, so both happen at first use, not at import.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from everloop.errors import AdapterRefused, RegistryError

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_TAG = "everloop.run"
ADAPTER_TAG = "everloop.adapter"
REWARD_TAG = "everloop.reward"
REFUSED_TAG = "everloop.refused"
"""Of a model version: why its files are no adapter that can be served."""
MODEL_CARD = "README.md"
"""PEFT writes one beside an adapter. It is left behind."""
ADAPTER_FILES = "adapter"
"""Name of the artifact folder of a run that holds the adapter."""
EVIDENCE_FILES = "evidence"
"""And of one that holds what speaks for a version of the reward model."""

QUIET = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""A registry that is down must be noticed in seconds; MLflow's own defaults take minutes."""


RESULTS = "result/"
"""Before the name of a run's result: MLflow shows those in a section of their own, apart from the curves. At step 0
alone a metric is a bar for each run, not a curve of one point."""


class Point(NamedTuple):
    """One value of a curve, at an optimizer step."""

    name: str
    step: int
    value: float


def model_name(tenant: str, policy: str) -> str:
    """The registered model of a policy, such as ``default.assistant``."""
    return f"{tenant}.{policy}"


class Version(NamedTuple):
    """One version of a policy's model. ``run``: the registry's id of the run that made it; "": none is named."""

    uri: str
    run: str
    tags: dict[str, str]


class Registry:
    """Runs and adapters of one installation. Thread-safe; one MLflow client, opened at first use.

    Args:
        uri: a tracking URI: ``sqlite:////absolute/mlflow.db`` or ``http://server:5000``.
        artifacts: folder for the files where ``uri`` is a SQLite file; a server keeps them itself.

    All methods raise RegistryError where the registry does not answer or refuses.
    """

    def __init__(self, uri: str, artifacts: Path) -> None:
        self.uri = uri
        self._artifacts = artifacts
        self._lock = threading.RLock()
        self._opened: MlflowClient | None = None

    def open(self) -> None:
        """Import and open MLflow now: a service does so in the background, where nobody waits for it."""
        with self._client():
            pass

    @contextmanager
    def _client(self) -> Iterator[MlflowClient]:
        with self._lock:
            try:
                if self._opened is None:
                    self._opened = _connect(self.uri)
                yield self._opened
            except (RegistryError, AdapterRefused):
                raise
            except Exception as error:
                cause = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise RegistryError(f"the registry at {self.uri} does not answer as it should: {cause}") from error

    def log_run(
        self,
        tenant: str,
        policy: str,
        run: str,
        *,
        title: str,
        took: tuple[float, float],
        batch: str,
        params: Mapping[str, Any],
        curves: Sequence[Point],
        results: Mapping[str, float],
        tags: Mapping[str, str],
        files: Mapping[str, Path],
        failed: bool = False,
    ) -> str:
        """Write a whole training run and return the registry's id of it; the same one if it was written before.

        ``title`` is what people read in a list of runs. ``took``: its start and end, seconds since 1970. ``batch``:
        what it learned from, shown as its data set; "": nothing. ``results``: what it came to, beside the curves.
        ``files``: artifact folder name to the local folder whose files go there.
        """
        start, end = (int(1000 * at) for at in took)
        with self._client() as client:
            known = self._run_of(client, tenant, policy, run)
            if known is not None and known.info.status in ("FINISHED", "FAILED"):
                return str(known.info.run_id)
            experiment, named = self._experiment(client, tenant, policy), {RUN_TAG: run, **tags}
            made = known or client.create_run(experiment, start_time=start, run_name=title, tags=named)
            run_id = str(made.info.run_id)
            totals = [Point(RESULTS + name, 0, value) for name, value in results.items()]
            _log(client, run_id, params, [*curves, *totals], start)
            if batch:
                client.log_inputs(run_id, [_data_set(batch)])
            for name, folder in files.items():
                client.log_artifacts(run_id, str(folder), name)
            client.set_terminated(run_id, "FAILED" if failed else "FINISHED", end_time=end)
            return run_id

    def _experiment(self, client: MlflowClient, tenant: str, policy: str) -> str:
        name = f"{tenant}/{policy}"
        found = client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        local = self.uri.startswith("sqlite:")
        where = (self._artifacts / tenant / policy).absolute().as_uri() if local else None
        return str(client.create_experiment(name, artifact_location=where))

    def _run_of(self, client: MlflowClient, tenant: str, policy: str, run: str) -> Any:
        experiment = self._experiment(client, tenant, policy)
        quoted = run.replace("'", "")
        found = client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{quoted}'", max_results=1)
        return found[0] if found else None

    def experiments(self) -> dict[str, str]:
        """MLflow's id of each policy's experiment, by ``tenant/policy``; those that have runs."""
        with self._client() as client:
            return {str(found.name): str(found.experiment_id) for found in client.search_experiments()}

    def register(
        self,
        tenant: str,
        policy: str,
        *,
        registry_run: str,
        content: str,
        tags: Mapping[str, str],
        tag: str = ADAPTER_TAG,
        files: str = ADAPTER_FILES,
    ) -> str:
        """Register the files of a logged run; returns ``models:/<tenant>.<policy>/<n>``.

        ``content`` is their hash, kept as ``tag``: where one is registered already it keeps its version.
        """
        name = model_name(tenant, policy)
        with self._client() as client:
            if not client.search_registered_models(f"name = '{name}'", max_results=1):
                client.create_registered_model(name)
            known = client.search_model_versions(f"name = '{name}' and tags.`{tag}` = '{content}'")
            version = (
                known[0]
                if known
                else client.create_model_version(
                    name,
                    source=f"runs:/{registry_run}/{files}",
                    run_id=registry_run,
                    tags={tag: content, **tags},
                )
            )
            return f"models:/{name}/{version.version}"

    def tagged(self, tenant: str, policy: str, tag: str) -> dict[str, str]:
        """The uris of a model's versions by what a tag says of each."""
        name = model_name(tenant, policy)
        with self._client() as client:
            found = client.search_model_versions(f"name = '{name}'", max_results=10_000)
            return {one.tags[tag]: f"models:/{name}/{one.version}" for one in found if tag in one.tags}

    def set_alias(self, uri: str, alias: str) -> None:
        """Point an alias (``live``, ``canary``) at a version: a mirror for people, never the authority."""
        name, version = _version_of(uri)
        with self._client() as client:
            client.set_registered_model_alias(name, alias, version)

    def drop_alias(self, tenant: str, policy: str, alias: str) -> None:
        with self._client() as client:
            client.delete_registered_model_alias(model_name(tenant, policy), alias)

    def aliases(self, tenant: str, policy: str) -> dict[str, str]:
        """The number of a version by its alias; empty where the policy has no model yet."""
        with self._client() as client:
            found = client.search_registered_models(f"name = '{model_name(tenant, policy)}'", max_results=1)
            return {str(alias): str(version) for alias, version in found[0].aliases.items()} if found else {}

    def version(self, tenant: str, policy: str, number: str) -> Version:
        name = model_name(tenant, policy)
        with self._client() as client:
            found = client.get_model_version(name, number)
            return Version(f"models:/{name}/{number}", str(found.run_id or ""), dict(found.tags))

    def mark(self, uri: str, tag: str, text: str) -> None:
        """Write a tag on a version: what became of it, for those who look there."""
        name, version = _version_of(uri)
        with self._client() as client:
            client.set_model_version_tag(name, version, tag, text[:5000])

    def download(self, uri: str, into: Path) -> Path:
        """The files of an adapter, in ``into``. ``uri``: models:/name/3 or models:/name@alias.

        Raises:
            AdapterRefused: there is anything but ``adapter_config.json`` and ``*.safetensors`` in it.
        """
        with self._client() as client, tempfile.TemporaryDirectory(prefix="everloop-download-") as scratch:
            import mlflow.artifacts

            source = _source(client, uri)
            for found in mlflow.artifacts.list_artifacts(artifact_uri=source, tracking_uri=self.uri):
                _check_name(Path(found.path).name, plain=not found.is_dir)  # before anything of it comes here
            folder = Path(
                mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=scratch, tracking_uri=self.uri)
            )
            names = allowed_files(folder)
            into.mkdir(parents=True, exist_ok=True)
            for name in names:
                shutil.copyfile(folder / name, into / name)
            return into

    def fetch(self, uri: str, adapter: str, adapters: Path, content_hash: Callable[[Path], str]) -> Path:
        """``adapters/<hash>``, downloaded and checked if it is not there; never visible before it is whole.

        Raises:
            AdapterRefused: the files do not have the content that ``adapter`` names.
        """
        target = adapters / adapter
        if target.exists():
            return target
        adapters.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=adapters) as scratch:
            partial = self.download(uri, Path(scratch) / adapter)
            found = content_hash(partial)
            if found != adapter:
                raise AdapterRefused(f"{uri} should hold adapter {adapter}, and holds {found}: not loaded")
            try:
                partial.rename(target)
            except OSError:
                if not target.exists():
                    raise
        return target


def allowed_files(folder: Path) -> list[str]:
    """Names of an adapter's files. Raises AdapterRefused where a folder holds anything else (a model card may lie
    there, and is none of them), or a link."""
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        _check_name(name, plain=(folder / name).is_file() and not (folder / name).is_symlink())
    names = [name for name in names if name != MODEL_CARD]
    if "adapter_config.json" not in names or len(names) < 2:
        raise AdapterRefused(
            f"an adapter is adapter_config.json and *.safetensors; found: {', '.join(names) or 'none'}"
        )
    return names


def _check_name(name: str, *, plain: bool) -> None:
    fits = name in ("adapter_config.json", MODEL_CARD) or name.endswith(".safetensors")
    if not fits or not plain:
        raise AdapterRefused(f"{name} has no place in an adapter: only adapter_config.json and *.safetensors do")


def _version_of(uri: str) -> tuple[str, str]:
    name, separator, version = uri.removeprefix("models:/").rpartition("/")
    if not uri.startswith("models:/") or not separator or not version.isdigit():
        raise RegistryError(f"{uri!r} is not the uri of a version: use models:/<name>/<number>")
    return name, version


def _source(client: MlflowClient, uri: str) -> str:
    """Where the files of a model version lie."""
    name, at, alias = uri.removeprefix("models:/").partition("@")
    if at:
        version = str(client.get_model_version_by_alias(name, alias).version)
    else:
        name, version = _version_of(uri)
    return str(client.get_model_version_download_uri(name, version))


def _connect(uri: str) -> MlflowClient:
    for name, setting in QUIET.items():
        os.environ.setdefault(name, setting)
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.search_experiments(max_results=1)
    if uri.startswith("sqlite:"):
        _hide_default(client)
    return client


def _hide_default(client: MlflowClient) -> None:
    """MLflow makes an experiment "Default" in a new store, which stays empty here: it is not listed. A deleted one
    is kept, and is not made again; one that somebody logged runs to stays.
    """
    default = client.get_experiment_by_name("Default")
    if default is None or default.lifecycle_stage != "active" or client.search_runs([default.experiment_id]):
        return
    client.delete_experiment(default.experiment_id)


def _data_set(batch: str) -> Any:
    from mlflow.entities import Dataset, DatasetInput

    digest = batch.rpartition("_")[2][:8]
    return DatasetInput(Dataset(name=batch, digest=digest, source_type="everloop", source=batch))


def _log(client: MlflowClient, run_id: str, params: Mapping[str, Any], points: Sequence[Point], start: int) -> None:
    """``start`` in ms since 1970. A point has no time of its own: one ms a step, the same whenever it is written."""
    from mlflow.entities import Metric, Param

    fixed = [Param(name, str(value)[:6000]) for name, value in params.items()]
    for first in range(0, len(fixed), 100):
        client.log_batch(run_id, params=fixed[first : first + 100])
    metrics = [Metric(name, float(value), start + step, step) for name, step, value in points]
    for first in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics=metrics[first : first + 1000])
