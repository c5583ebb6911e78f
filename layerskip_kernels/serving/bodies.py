"""What was sent: a body, bounded in size and time, as the request that it should be."""

from __future__ import annotations

import asyncio
import json
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from layerskip_kernels.serving.errors import ApiError
from layerskip_kernels.serving.protocol import FieldError

__all__ = ["read"]

Asked = TypeVar("Asked", bound=BaseModel)
BODY_SECONDS = 30.0  # for a whole body to arrive


async def read(request: Request, kind: type[Asked], max_body: int) -> Asked:
    """The body as a ``kind``. Raises ApiError: 408 too slow, 413 more than ``max_body`` bytes, 400 for all else."""
    try:
        body = await asyncio.wait_for(_bytes(request, max_body), BODY_SECONDS)
    except asyncio.TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds") from error
    try:
        return kind.model_validate(_json(body))
    except ValidationError as error:
        raise _as_api_error(error) from error


async def _bytes(request: Request, max_body: int) -> bytes:
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_body:
            raise ApiError(413, f"the body is larger than {max_body} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def _json(body: bytes) -> object:
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except RecursionError as error:
        why: object = "it is nested too deeply"
        raise ApiError(400, f"the body is not valid JSON: {why}") from error
    except UnicodeDecodeError as error:
        why = f"byte {error.start} is not UTF-8"
        raise ApiError(400, f"the body is not valid JSON: {why}") from error
    except ValueError as error:  # Python's own words on a number of too many digits end with advice to programmers
        why = str(error).partition(";")[0][:200]
        raise ApiError(400, f"the body is not valid JSON: {why}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _as_api_error(error: ValidationError) -> ApiError:
    """The first field at fault, in the API's form; where it may be of several types, what each of them says."""
    problems = error.errors(include_input=False, include_url=False)
    first = problems[0]
    if not first["loc"]:
        raised = first.get("ctx", {}).get("error")
        if isinstance(raised, FieldError):
            return ApiError(400, str(raised), raised.field)
        return ApiError(400, "the body must be a JSON object")
    field = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{field[:100]} is not a field of this API", field[:100])
    same = [problem for problem in problems if problem["loc"][0] == field]
    said = " or ".join(dict.fromkeys(problem["msg"].removeprefix("Input should be ") for problem in same))
    prefix = "should be " if first["msg"].startswith("Input should be ") else ""
    return ApiError(400, f"{field}: {prefix}{said}", field[:100])
