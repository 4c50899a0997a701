"""A live model as small pieces of bytes, so that what one label changed can be written with the label's offset.

Pieces: ``core`` (weights, calibration, counts: about 60 kB), ``drift`` (what its detectors go on from: 5 kB),
``topics`` (their centres, when one is new), ``answer/<row>`` (one prototype), ``lesson/<slot>`` (one remembered
lesson), ``sources`` (what the sources said together), ``rater/<slot>`` (the same of one rater),
``comment/<slot>`` (an example of what comments mean); of a policy whose episodes have a course, ``values`` and
``value/<slot>`` (the weights and remembered moments of :mod:`reward.value`).
:func:`changes` gives those that changed since the last call; :func:`restore` takes all.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from everloop.errors import ContractError

from reward.encoder import precisions
from reward.heads import Heads, Lesson
from reward.model import RewardModel
from reward.value import Values

Array = np.ndarray[Any, np.dtype[np.float32]]
FORMAT = 3  # of the pieces
MARK = struct.Struct("<QI")  # a lesson's number and slice


def shape_of(model: RewardModel) -> str:
    """Hash of what must be equal for pieces to fit: encoder, members, and how much is remembered."""
    config = model.config
    parts = (
        FORMAT,
        model.encoder.version,
        config.heads,
        config.reservoir,
        model.prototypes.capacity,
        model.heads.shared.shape,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def changes(model: RewardModel) -> Iterator[tuple[str, bytes]]:
    """The pieces that changed since the last call; ``core`` always."""
    for row in sorted(model.changed_rows):
        yield f"answer/{row:05d}", model.prototypes.pack(row)
    for slot in sorted(model.changed_slots):
        yield f"lesson/{slot:07d}", _pack_lesson(model.reservoir.lesson(slot), model.reservoir.marks[slot])
    if model.changed_slots:
        yield "topics", np.ascontiguousarray(model.topics.centres, "<f4").tobytes()
    believed = model.reliability
    if believed.changed:
        yield "sources", json.dumps(believed.dump()).encode()
    for slot in sorted(believed.changed_slots):
        yield f"rater/{slot:05d}", json.dumps(believed.dump_rater(slot)).encode()
    for slot in sorted(model.comments.changed):
        yield f"comment/{slot:05d}", model.comments.pack(slot)
    yield from _value_changes(model.values)
    model.comments.changed.clear()
    believed.changed = False
    believed.changed_slots.clear()
    model.changed_rows.clear()
    model.changed_slots.clear()
    yield "drift", model.drift.pack()
    yield "core", _pack_core(model)


def restore(model: RewardModel, pieces: Iterable[tuple[str, bytes]]) -> bool:
    """Make a new ``model`` what it was when the pieces were packed.

    ``pieces`` in ascending order of their names, as a scan of the state gives them. The model goes on with the
    encoder's arithmetic that they were made with. Returns False, with the model as it was, where there are none.

    Raises ContractError where they belong to another encoder or size, or a piece is cut short.
    """
    held = dict(pieces)
    if "core" not in held:
        return False
    try:
        core = _unpack_core(held.pop("core"))
        _take_encoder(model, core["shape"])
        raters = [json.loads(held.pop(name)) for name in sorted(held) if name.startswith("rater/")]
        model.reliability.take(json.loads(held.pop("sources", b"[]")), raters)
        model.drift.unpack(held.pop("drift"))
        centres = np.frombuffer(held.pop("topics", b""), "<f4").reshape(-1, model.encoder.size)
        model.topics.centres = centres.astype(np.float32)
        lessons, moments = [], []
        values = _unpack_core(held.pop("values")) if "values" in held else None
        for name, value in sorted(held.items()):
            kind, _, number = name.partition("/")
            if kind == "answer":
                model.prototypes.unpack(int(number), value)
            elif kind == "comment":
                model.comments.unpack(int(number), value)
            elif kind == "value":
                moments.append(_unpack_lesson(value, model.values.heads))
            else:
                lessons.append(_unpack_lesson(value, model.heads))
        model.reservoir.restore(lessons, core["lessons"])
        if values is not None:
            model.values.reservoir.restore(moments, values["lessons"])
            model.values.take(values)
            _take_arrays(model.values.heads, values["arrays"])
        _take_core(model, core)
    except (ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise ContractError(f"the reward model's state is damaged: {error!r}; delete it to rebuild it") from None
    return True


def _value_changes(values: Values) -> Iterator[tuple[str, bytes]]:
    if values.touched:
        yield "values", _with_arrays(values.facts(), values.heads)
    for slot in sorted(values.changed):
        yield f"value/{slot:07d}", _pack_lesson(values.reservoir.lesson(slot), values.reservoir.marks[slot])
    values.changed.clear()
    values.touched = False


def _take_encoder(model: RewardModel, shape: str) -> None:
    own = model.encoder
    for model.encoder in precisions(own):
        if shape_of(model) == shape:
            return
    model.encoder = own
    raise ContractError(
        f"what the reward model has learned belongs to another encoder or size than the configured {own.name!r} with "
        f"heads = {model.config.heads} and reservoir = {model.config.reservoir}; nothing was deleted"
    )


def _pack_lesson(lesson: Lesson, mark: tuple[int, int]) -> bytes:
    numbers = np.array([lesson.label, lesson.weight], np.float32)
    parts = (numbers, lesson.members, lesson.own, lesson.shared)
    return MARK.pack(*mark) + b"".join(np.ascontiguousarray(part, "<f4").tobytes() for part in parts)


def _unpack_lesson(packed: bytes, heads: Heads) -> tuple[int, int, Lesson]:
    """Its number, its slice, and the lesson."""
    own = heads.own.shape
    number, slice_ = MARK.unpack_from(packed)
    numbers = np.frombuffer(packed[MARK.size :], "<f4")
    head, seen, mine, shared = np.split(numbers, np.cumsum([2, own[0], own[0] * own[1]]))
    if shared.shape != heads.shared.shape[1:]:
        raise ValueError(f"a lesson of {len(packed)} bytes")
    return number, slice_, Lesson(mine.reshape(own), shared, float(head[0]), float(head[1]), seen)


def _pack_core(model: RewardModel) -> bytes:
    """JSON with everything small (floats as exact decimal text), a zero byte, and the heads' arrays in order."""
    calibration = model.calibration
    small = {
        "shape": shape_of(model),
        "updates": model.updates,
        "seen": model.seen,
        "offsets": model.offsets,
        "lessons": model.reservoir.count,
        "comments": model.comments.count,
        "totals": model.prototypes.totals.tolist(),
        "curve": calibration.curve.tolist(),
        "pairs": calibration.pairs.tolist(),
        "shares": [calibration.shares.means.tolist(), calibration.shares.known.tolist()],
        "drifts": model.drift.counts,
        "frozen_until": model.frozen_until,
        "propensity": model.propensity.dump(),
        "length": model.length.sums,
    }
    return _with_arrays(small, model.heads)


def _with_arrays(small: dict[str, Any], heads: Heads) -> bytes:
    arrays = (np.ascontiguousarray(array, "<f4").tobytes() for array in heads.arrays().values())
    return json.dumps(small, sort_keys=True).encode() + b"\0" + b"".join(arrays)


def _unpack_core(packed: bytes) -> dict[str, Any]:
    small, _, arrays = packed.partition(b"\0")
    return {**json.loads(small), "arrays": arrays}


def _take_arrays(heads: Heads, packed: bytes) -> None:
    numbers = np.frombuffer(packed, "<f4")
    sizes = [array.size for array in heads.arrays().values()]
    if numbers.size != sum(sizes):
        raise ValueError(f"{numbers.size} weights where {sum(sizes)} belong")
    for array, part in zip(heads.arrays().values(), np.split(numbers, np.cumsum(sizes)[:-1]), strict=True):
        array[:] = part.reshape(array.shape)


def _take_core(model: RewardModel, core: dict[str, Any]) -> None:
    _take_arrays(model.heads, core["arrays"])
    model.updates, model.seen, model.offsets = core["updates"], core["seen"], core["offsets"]
    model.drift.counts.update(core["drifts"])
    model.frozen_until = core["frozen_until"]
    model.comments.count = core["comments"]
    model.propensity.take(core["propensity"])
    model.length.sums[:] = core["length"]
    model.calibration.shares.means[:], model.calibration.shares.known[:] = core["shares"]
    model.prototypes.totals[:] = core["totals"]
    model.calibration.curve[:] = core["curve"]
    model.calibration.remember(core["pairs"])
