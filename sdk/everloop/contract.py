"""What every contract shares: frozen, versioned, tolerant of fields it does not know, exact on the wire.

A contract is a message between processes. It never changes in place: a changed thing is written again with a
higher version. Fields that this release does not know survive a round trip, so a newer writer and an older
reader can share a log.

Arrays of numbers (token ids, log-probabilities) are :mod:`array` arrays: typed in memory, raw little-endian
bytes on the wire, lists only in JSON made for people.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator, SerializationInfo, WithJsonSchema


class Contract(BaseModel):
    """Base of all contracts: immutable, unknown fields kept, non-finite floats refused by the fields."""

    model_config = ConfigDict(frozen=True, extra="allow", arbitrary_types_allowed=True, ser_json_inf_nan="null")


def _array_of(typecode: str, name: str) -> Any:
    def validate(value: object) -> array[Any]:
        if isinstance(value, array):
            if value.typecode != typecode:
                raise ValueError(f"{name} takes array({typecode!r}), not array({value.typecode!r})")
            return value
        made: array[Any] = array(typecode)
        if isinstance(value, bytes | bytearray | memoryview):
            made.frombytes(bytes(value))
            if sys.byteorder == "big":
                made.byteswap()
        elif isinstance(value, Sequence) and not isinstance(value, str):
            try:
                made.extend(value)
            except (TypeError, OverflowError) as error:
                raise ValueError(f"{name}: {error}") from None
        else:
            raise ValueError(f"{name} takes an array, bytes or a list of numbers, not {type(value).__name__}")
        return made

    def serialize(value: array[Any], info: SerializationInfo) -> Any:
        if info.mode_is_json():
            return list(value)
        if sys.byteorder == "big":
            value = array(value.typecode, value)
            value.byteswap()
        return value.tobytes()

    items = {"i": "integer", "f": "number"}[typecode]
    return Annotated[
        array,
        PlainValidator(validate),
        PlainSerializer(serialize),
        WithJsonSchema({"type": "array", "items": {"type": items}, "description": name}),
    ]


Int32Array: TypeAlias = _array_of("i", "int32 array")  # type: ignore[valid-type]
Float32Array: TypeAlias = _array_of("f", "float32 array")  # type: ignore[valid-type]
