"""What the gateway does not serve, told so that whoever asked knows where to ask instead."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from services.gateway.refusals import Refused

REST = "rest"  # the route that has what no other has
ENDPOINTS = (
    "/v1/chat/completions, /v1/completions, /v1/responses, /v1/models, /v1/feedback, /v1/feedback/tokens, /v1/events "
    "and /openapi.json"
)
# What OpenAI's clients ask for as well, by the first part of the path.
PROVIDERS = {
    "embeddings": "embeddings",
    "images": "images",
    "audio": "audio",
    "moderations": "moderations",
    "videos": "videos",
    "files": "files",
    "uploads": "uploads",
    "batches": "batches",
    "fine_tuning": "fine-tuning",
    "vector_stores": "vector stores",
    "containers": "containers",
    "evals": "evals",
    "assistants": "assistants",
    "threads": "threads",
    "conversations": "conversations",
    "realtime": "realtime sessions",
}


async def refuse(request: web.Request) -> Any:
    """Raises Refused: 405 where the path is known and the method is not, else 404."""
    others = (resource for resource in request.app.router.resources() if resource.name != REST)
    methods = sorted({method for resource in others for method in (await resource.resolve(request))[1]})
    asked = f"{request.method[:20]} {request.path[:100]}"
    if methods:
        takes = ", ".join(methods)
        raise Refused(405, f"{asked} is not served: it takes {takes}", "method_not_allowed", headers={"Allow": takes})
    raise Refused(404, _instead(asked, request.path), "unknown_endpoint")


def _instead(asked: str, path: str) -> str:
    parts = path.split("/")
    first = parts[2] if len(parts) > 2 and parts[1] == "v1" else ""
    if first == "responses":
        return (
            f"there is no {asked} here: an answer goes to the request that asks for it, and is not kept to be fetched, "
            "cancelled or deleted. Keep what POST /v1/responses gave you"
        )
    if first in PROVIDERS:
        return (
            f"there is no {asked} here: the gateway answers chat completions, completions and responses of your "
            f"policies, and has no {PROVIDERS[first]}. Ask their provider with a client of its own (another base_url "
            "and key)"
        )
    return f"there is no {asked} here; the gateway has {ENDPOINTS}"
