"""Errors as the OpenAI API tells them: {"error": {"message", "type", "param", "code"}} and a status."""

from __future__ import annotations

import re
from typing import Any

from layerskip_kernels.errors import CacheFull
from layerskip_kernels.serving.worker import QueueFullError, WorkerStoppedError

__all__ = ["ApiError", "as_api_error"]

RETRY_SECONDS = 1
LONGEST = 500  # characters of a message
# What the engine calls otherwise than the API does.
API_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "num_samples": "n"}


class ApiError(Exception):
    """What a client is told. ``param``: the field at fault, if one is."""

    def __init__(
        self, status: int, message: str, param: str | None = None, type_: str = "invalid_request_error",
        code: str | None = None, headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.param = param
        self.type = type_
        self.code = code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self)[:LONGEST], "type": self.type, "param": self.param, "code": self.code}}


def as_api_error(error: BaseException, fields: tuple[str, ...] = ()) -> ApiError:
    """What the engine raised, for the client. ``fields``: those that the request gave, to find the one it names."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), None, "rate_limit_error", "queue_full", {"Retry-After": str(RETRY_SECONDS)})
    if isinstance(error, WorkerStoppedError):
        return ApiError(503, str(error), None, "server_error", "unavailable", {"Retry-After": str(RETRY_SECONDS)})
    if isinstance(error, (ValueError, TypeError, CacheFull)):
        message = str(error)[:LONGEST]
        for ours, theirs in API_NAMES.items():
            message = re.sub(rf"\b{ours}\b", theirs, message)
        places = [(found.start(), field) for field in fields if (found := re.search(rf"\b{field}\b", message))]
        return ApiError(400, message, min(places)[1] if places else None)
    return ApiError(500, f"the request failed: {type(error).__name__}", None, "server_error")
