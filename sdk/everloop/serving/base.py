"""The serving port: an engine that holds a base model and adapters beside each other, and answers in OpenAI's form.

Backends: the embedded engine (in this process, or as ``services.engine`` behind HTTP) and vLLM. Both answer in
vLLM's dialect of the OpenAI API: a request may carry ``return_token_ids`` and ``logprobs``; the answer then has
``prompt_token_ids`` at the top and ``token_ids`` in each choice (in a stream: in each chunk's choice, the prompt's
in the first chunk). ``model`` is the base model's name, or the content hash of a resident adapter.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal, Protocol

Route = Literal["chat/completions", "completions"]


LOST = "engine_lost"
"""Code of the error where an engine ended while it answered: whatever it was asked, it may be asked again."""


class Answering(Protocol):
    """What gives answers: an engine, or several as one. All methods raise ServingError (Overloaded, UnknownAdapter)."""

    async def complete(self, route: Route, body: dict[str, Any]) -> dict[str, Any]:
        """One whole answer. Cancelling the task stops the generation."""

    def stream(self, route: Route, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The answer in chunks, without the closing ``[DONE]``. Closing the iterator stops the generation."""

    async def close(self) -> None: ...


class Serving(Answering, Protocol):
    """Everything the platform asks of one engine. All methods raise ServingError (Overloaded, UnknownAdapter)."""

    async def load(self, name: str, folder: Path) -> None:
        """Make an adapter resident under its content hash. Loading a resident one again does nothing.

        Raises AdapterRefused where the files are not an adapter that this base can carry.
        """

    async def unload(self, name: str) -> None:
        """Drop a resident adapter; requests that it is answering are finished first."""

    async def adapters(self) -> frozenset[str]:
        """The adapters resident now."""

    async def healthy(self) -> bool:
        """Whether the engine answers requests now."""
