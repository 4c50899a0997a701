"""Where the gateway's own spans go."""

from __future__ import annotations

from pydantic import Field, field_validator

from everloop.section import Section, check_url


class TelemetryConfig(Section):
    """Spans of the gateway, to an OpenTelemetry collector. None are made while no endpoint is named."""

    otlp_endpoint: str | None = Field(
        default=None, description="of a collector that takes OTLP over HTTP, such as 'http://127.0.0.1:4318'; None: off"
    )
    sample: float = Field(
        default=1.0, ge=0, le=1, description="share of traces that begin here; a caller's own decision stands"
    )

    @field_validator("otlp_endpoint")
    @classmethod
    def _reachable(cls, endpoint: str | None) -> str | None:
        if endpoint is None:
            return None
        return check_url(endpoint, ("http://", "https://"), "http://<host>:<port> of a collector (OTLP over HTTP)")
