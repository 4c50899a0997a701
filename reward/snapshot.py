"""Immutable snapshots of a reward model: what scores for training, named by the hash of everything in it.

A folder ``<version>/`` holds ``model.safetensors`` (weights, prototypes) and ``model.json`` (config, encoder, code,
offsets read, calibration, evidence). It is written under a temporary name, made durable, then renamed: a folder
with a version's name is whole. Writing the same version again does nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from everloop.config import RewardConfig
from everloop.errors import ContractError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from reward.encoder import precisions
from reward.model import RewardModel, Vectors
from reward.reliability import restored

KEPT = 64  # newest snapshots of a policy; older ones can be rebuilt from the log
CODE = (
    "bert",
    "calibration",
    "comments",
    "course",
    "declaration",
    "derived",
    "drift",
    "encoder",
    "evidence",
    "features",
    "floor",
    "heads",
    "hearing",
    "hollow",
    "known",
    "learning",
    "length",
    "model",
    "poison",
    "probes",
    "propensity",
    "prototypes",
    "reliability",
    "reservoir",
    "scoring",
    "taught",
    "topics",
    "unlearning",
    "value",
)


def _code_version() -> str:
    """Hash of the modules that decide what a label does and what a score is."""
    digest = hashlib.sha256()
    for name in CODE:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()[:16]


CODE_VERSION = _code_version()


def _arrays(model: RewardModel) -> dict[str, Any]:
    known = model.prototypes
    width = len(known.rows)
    keys = b"".join(sorted(known.rows, key=lambda key: known.rows[key]))
    return {
        "own_weights": model.heads.own,
        "shared_weights": model.heads.shared,
        "answers": np.frombuffer(keys, np.uint8).reshape(width, 16),
        "answer_vectors": np.ascontiguousarray(known.own[:width]),
        "good": np.ascontiguousarray(known.good[:, :width]),
        "bad": np.ascontiguousarray(known.bad[:, :width]),
        "counts": np.ascontiguousarray(known.counts[:, :, :width]),
        "totals": known.totals,
        "centres": model.topics.centres,
        "shares": model.calibration.shares.means,
        "comments": model.comments.line,
        "value_own": model.values.heads.own,
        "value_shared": model.values.heads.shared,
    }


def _facts(model: RewardModel) -> dict[str, Any]:
    """Everything that is not an array and decides what the model says."""
    return {
        "code": CODE_VERSION,
        "encoder": {"name": model.encoder.name, "version": model.encoder.version},
        "config": model.config.model_dump(exclude={"declaration"}),  # its place is no part of what it says
        "declaration": model.declaration.content,
        "sources": model.reliability.dump(),
        "raters": model.reliability.dump_raters(),
        "offsets": dict(sorted(model.offsets.items())),
        "updates": model.updates,
        "seen": model.seen,
        "values": {"begun": model.values.begun, "ended": model.values.ended},
        "curve": model.calibration.curve.tolist(),
        "length": model.length.sums,
    }


def version_of(model: RewardModel) -> str:
    """16 hexadecimal digits: the hash of code, config, declaration, encoder, offsets read,
    calibration, what is believed of the sources, and weights."""
    digest = hashlib.sha256(json.dumps(_facts(model), sort_keys=True).encode())
    for name, array in sorted(_arrays(model).items()):
        digest.update(f"{name}{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def save(model: RewardModel, root: Path) -> str:
    """Write the model as it is now to ``root/<version>``; returns the version. Old snapshots beyond KEPT go."""
    version = version_of(model)
    folder = root / version
    if not folder.exists():
        partial = root / f".{version}.{os.getpid()}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_arrays(model), partial / "model.safetensors")
        evidence = {"auc": model.calibration.auc, "calibration_error": model.calibration.error}
        (partial / "model.json").write_text(json.dumps({"version": version, **_facts(model), "evidence": evidence}))
        for path in (*partial.iterdir(), partial):
            _flush(path)
        partial.rename(folder)
        _flush(root)
        _prune(root)
    return version


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(root: Path) -> None:
    held = [folder for folder in root.iterdir() if (folder / "model.json").exists() and folder.name[0] != "."]
    for folder in sorted(held, key=lambda folder: (folder / "model.json").stat().st_mtime_ns)[:-KEPT]:
        shutil.rmtree(folder, ignore_errors=True)


def load(folder: Path, encoder: Vectors) -> RewardModel:
    """The model of a snapshot, to score with. It has no memory for replay: go on learning with the live one alone.

    It reads texts in the arithmetic that it was made with, whichever the given encoder has.

    Raises ContractError where the files are missing or damaged, or are of another encoder than the one given.
    """
    try:
        facts = json.loads((folder / "model.json").read_text())
        arrays = load_file(folder / "model.safetensors")
        same = next((one for one in precisions(encoder) if one.version == facts["encoder"]["version"]), None)
        if same is None:
            raise ContractError(
                f"reward model {folder.name} was made with encoder {facts['encoder']}; the one at hand is "
                f"{encoder.name} {encoder.version}: give the same one, or score with a newer reward version"
            )
        model = RewardModel(RewardConfig.model_validate(facts["config"]), same)
        model.believe(restored(facts))
        model.declaration = model.reliability.declaration
        _take(model, facts, arrays)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ContractError(f"{folder} {_unusable(folder)}: {error!r}") from None
    if facts["code"] == CODE_VERSION and version_of(model) != folder.name:
        raise ContractError(f"{folder} does not have the content that its name says")
    return model


def _unusable(folder: Path) -> str:
    """Why a snapshot that cannot be taken up may be so."""
    try:
        other = facts_of(folder)["code"] != CODE_VERSION
    except (ContractError, KeyError):
        other = False
    return "is of another release of the reward model" if other else "is not a whole snapshot of a reward model"


def facts_of(folder: Path) -> dict[str, Any]:
    """What a snapshot says of itself: ``updates``, ``offsets``, ``evidence`` and more. Raises ContractError."""
    try:
        found = json.loads((folder / "model.json").read_text())
        return {**found, "evidence": dict(found["evidence"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ContractError(f"{folder} is not a whole snapshot of a reward model: {error!r}") from None


def _take(model: RewardModel, facts: dict[str, Any], arrays: dict[str, Any]) -> None:
    model.heads.own[:], model.heads.shared[:] = arrays["own_weights"], arrays["shared_weights"]
    model.values.heads.own[:], model.values.heads.shared[:] = arrays["value_own"], arrays["value_shared"]
    model.values.take(facts["values"])
    known = model.prototypes
    for row, key in enumerate(arrays["answers"]):
        parts = (arrays["answer_vectors"][row], arrays["good"][:, row], arrays["bad"][:, row])
        known.put(row, key.tobytes(), *parts, arrays["counts"][:, :, row])
    known.totals[:] = arrays["totals"]
    model.topics.centres = arrays["centres"]
    model.calibration.curve[:], model.calibration.shares.means[:] = facts["curve"], arrays["shares"]
    model.comments.line = arrays["comments"]
    model.length.sums[:] = facts["length"]
    model.updates, model.seen, model.offsets = facts["updates"], facts["seen"], facts["offsets"]
