"""What a served model is told; `moe-dist serve` and KubeRay's manifest say the same."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from moe_dist.errors import ConfigError, ConversionError
from moe_dist.inference.backends import Form
from moe_dist.serving.requests import RequestLimits

AUTO = "auto"
"""The form that is the fastest where it is asked for."""
LOGGING = {"enable_access_log": False, "log_level": "WARNING"}
"""Of Serve's processes: a line for each request costs as much as a part of the answer."""


class ServingSettings(BaseModel):
    """How a model directory is served."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    directory: str = Field(min_length=1, description="Of the model, on every node.")
    form: str = Field(AUTO, description="Such as lean-bf16; auto takes the fastest there.")
    task: str | None = Field(None, description="Of a model of several tasks the one to answer.")
    options: dict[str, Any] = Field(default_factory=dict, description="Of the task.")
    calibration: float | None = Field(None, description="What answers are read with.")
    max_length: int | None = Field(
        None, ge=1, description="Tokens after which a text is cut; 512, or what the model reads."
    )
    threads: int = Field(1, ge=1, description="CPU threads, and CPUs, of a replica.")
    replicas: int = Field(1, ge=1, description="Copies of the model.")
    max_batch_size: int = Field(32, ge=1, le=256, description="Texts of a call at most.")
    max_wait_ms: float = Field(
        0.0, ge=0, le=10_000, description="How long an idle model waits for more texts."
    )
    max_texts: int = Field(256, ge=1, description="Texts of a request at most.")
    max_body_bytes: int = Field(2**20, ge=1, description="Of a request's body at most.")
    max_characters: int = Field(100_000, ge=1, description="Of one text at most.")
    max_ongoing_requests: int = Field(64, ge=1, description="That a replica works on at once.")
    max_queued_requests: int = Field(
        256, ge=1, description="That wait for a replica; more are answered with 503."
    )
    version: str = Field("", description="Another one makes replicas load the model again.")

    @field_validator("form")
    @classmethod
    def _known_form(cls, text: str) -> str:
        """Refuse it here, before a replica does."""
        try:
            return text if text == AUTO else str(Form.parse(text))
        except ConversionError as fault:
            raise ValueError(f"{fault.message}; {fault.remedy}, or {AUTO}") from None

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Check values; all faults are one ConfigError."""
        try:
            return cls(**values)
        except ValidationError as error:
            faults = [
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}; it is {fault['input']!r}"
                for fault in error.errors()
            ]
            raise ConfigError(faults, source="serve") from None

    @property
    def limits(self) -> RequestLimits:
        """Of one request."""
        return RequestLimits(self.max_texts, self.max_body_bytes, self.max_characters)
