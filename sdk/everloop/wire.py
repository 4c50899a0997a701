"""Contracts as bytes: a sealed envelope around MessagePack.

Envelope, an array of four: format number, key id (None: not encrypted; a key per subject can come later, and
deleting it makes the past unreadable), blob reference (None: the body is here), body. A body above a limit
lies in the blob store by its content hash, and the record carries the reference.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any, TypeVar

import ormsgpack
from pydantic import ValidationError

from everloop.contract import Contract
from everloop.errors import ContractError

FORMAT = 1
C = TypeVar("C", bound=Contract)


class BlobStore:
    """Large bodies by SHA-256, one file each, written whole before they are named. Safe between processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, reference: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", reference):
            raise ContractError(f"not a blob reference: {reference!r}")
        return self.folder / reference[:2] / reference

    def put(self, body: bytes) -> str:
        """Store and return the reference; durable on return."""
        reference = hashlib.sha256(body).hexdigest()
        path = self._path(reference)
        if path.exists():
            return reference
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{reference}.{os.getpid()}.{id(body)}.partial")
        with partial.open("wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        return reference

    def get(self, reference: str) -> bytes:
        """Raises ContractError where the blob is gone or does not have its hash."""
        try:
            body = self._path(reference).read_bytes()
        except FileNotFoundError:
            raise ContractError(f"blob {reference} is not in {self.folder}") from None
        if hashlib.sha256(body).hexdigest() != reference:
            raise ContractError(f"blob {reference} does not have the content that its name says")
        return body


def seal(fields: dict[str, Any], blobs: BlobStore | None = None, inline_limit: int = 262_144) -> bytes:
    """Fields of a contract (``model_dump()``) as an envelope; bodies above ``inline_limit`` bytes go to ``blobs``."""
    body = ormsgpack.packb(fields, option=ormsgpack.OPT_SERIALIZE_PYDANTIC)
    if blobs is not None and len(body) > inline_limit:
        return ormsgpack.packb([FORMAT, None, blobs.put(body), b""])
    return ormsgpack.packb([FORMAT, None, None, body])


def encode(contract: Contract, blobs: BlobStore | None = None) -> bytes:
    return seal(contract.model_dump(), blobs)


def unseal(value: bytes, blobs: BlobStore | None = None) -> dict[str, Any]:
    """The fields inside an envelope.

    Raises:
        ContractError: not an envelope, a format or key that is not known here, or a blob that is gone.
    """
    try:
        form, key, reference, body = ormsgpack.unpackb(value)
    except (ValueError, TypeError) as error:
        raise ContractError(f"not an Everloop envelope: {error}") from None
    if form != FORMAT or key is not None:
        raise ContractError(f"envelope format {form!r} with key {key!r} is not known to this release")
    if reference is not None:
        if blobs is None:
            raise ContractError(f"the body lies in blob {reference}, and no blob store is open here")
        body = blobs.get(reference)
    try:
        fields = ormsgpack.unpackb(body)
    except (ValueError, TypeError) as error:
        raise ContractError(f"the envelope's body is not MessagePack: {error}") from None
    if not isinstance(fields, dict):
        raise ContractError(f"the envelope's body is a {type(fields).__name__}, not a map of fields")
    return fields


def decode(contract: type[C], value: bytes, blobs: BlobStore | None = None) -> C:
    """Raises ContractError where the bytes are not this contract."""
    try:
        return contract.model_validate(unseal(value, blobs))
    except ValidationError as error:
        raise ContractError(f"not a {contract.__name__}: {error}") from None
