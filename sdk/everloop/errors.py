"""Errors, named by the boundary that was crossed. Each message says what is wrong, why, and what to do."""

from __future__ import annotations


class EverloopError(Exception):
    """Base of all errors that Everloop raises on purpose."""


class ConfigError(EverloopError):
    """The configuration is unknown, contradictory or incomplete: refused at load."""


class ContractError(EverloopError):
    """Bytes or fields that are not the contract they claim to be. Permanent: never retried."""


class LogError(EverloopError):
    """The log refused or lost touch. Transient unless a subclass says otherwise."""


class RecordTooLarge(LogError):
    """A record above the log's limit. Permanent: put the body in the blob store and send the reference."""


class LogFull(LogError):
    """No room left on the log's disk. Nothing was written; retry after room is made."""


class LogRefused(LogError):
    """The log's cluster refuses this client, or lacks what it needs, until a person mends it; the message says how."""


class ServingError(EverloopError):
    """The serving engine answered with an error; ``status`` is the HTTP status that fits."""

    def __init__(self, message: str, *, status: int = 502, code: str = "upstream_error") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Overloaded(ServingError):
    """The engine's queue is full: try again after ``retry_after`` seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message, status=429, code="overloaded")
        self.retry_after = retry_after


class UnknownAdapter(ServingError):
    """The engine does not hold the adapter that was asked for."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=404, code="adapter_not_found")


class AdapterRefused(EverloopError):
    """An adapter's files are not what they must be (names, shapes, finite values, hash)."""


class RegistryError(EverloopError):
    """The registry (MLflow) does not answer, or refused. Transient unless the message says otherwise: try again."""


class TransitionRefused(EverloopError):
    """A release was asked to move to a state that its present one does not lead to."""


class NotEnoughData(EverloopError):
    """There is too little to train or to decide on; the message says how much is missing."""
