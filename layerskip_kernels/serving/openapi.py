"""The server's OpenAPI document, made of the same classes that check what is sent."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from layerskip_kernels.serving.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

__all__ = ["openapi_document"]

SCHEMAS = "#/components/schemas/"
# Of a route that reads a body; those of the engine's side come with completions alone.
REFUSALS = {
    "400": "a field is wrong", "401": "the key is wrong", "404": "another model", "408": "the body came too slowly",
    "413": "too large",
}  # fmt: skip
ENGINE = {"429": "the queue is full", "503": "shutting down", "504": "it took too long"}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


@dataclass(frozen=True)
class _Route:
    method: str
    path: str
    summary: str
    body: type[BaseModel] | None = None
    engine: bool = False  # whether it queues work
    media: str = "application/json"
    is_open: bool = False  # without the key


ROUTES = (
    _Route("get", "/", "the page", media="text/html", is_open=True),
    _Route("get", "/health", "200 while the engine runs, else 503", is_open=True),
    _Route("get", "/version", "the package's version"),
    _Route("get", "/metrics", "Prometheus metrics", media="text/plain"),
    _Route("get", "/openapi.json", "this document", is_open=True),
    _Route("get", "/v1/models", "the model that is served"),
    _Route("post", "/v1/completions", "continue texts or token ids", CompletionRequest, engine=True),
    _Route("post", "/v1/chat/completions", "answer a conversation", ChatRequest, engine=True),
    _Route("post", "/tokenize", "the token ids of a text or a conversation", TokenizeRequest),
    _Route("post", "/detokenize", "the text of token ids", DetokenizeRequest),
    _Route("post", "/lens", "what each layer would say after these tokens", DetokenizeRequest, engine=True),
)


def openapi_document(has_key: bool) -> dict[str, Any]:
    """OpenAPI 3.1. ``has_key``: whether the server asks for a bearer token."""
    kinds = list(dict.fromkeys(route.body for route in ROUTES if route.body is not None))
    _, defined = models_json_schema([(kind, "validation") for kind in kinds], ref_template=SCHEMAS + "{model}")
    components: dict[str, Any] = {"schemas": {**defined.get("$defs", {}), "Error": ERROR}}
    if has_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    paths: dict[str, Any] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method] = _operation(route, has_key)
    info = {"title": "layerskip serve", "version": version("layerskip_kernels")}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}


def _operation(route: _Route, has_key: bool) -> dict[str, Any]:
    refusals = {**(REFUSALS if route.body else {}), **(ENGINE if route.engine else {})}
    if has_key and not route.is_open:
        refusals["401"] = REFUSALS["401"]
    if route.path == "/health":
        refusals["503"] = "the engine has stopped"
    contents: dict[str, Any] = {} if route.path == "/health" else {route.media: {}}
    if route.engine and route.path != "/lens":
        contents["text/event-stream"] = {}
    operation: dict[str, Any] = {
        "operationId": f"{route.method}_{route.path.strip('/').replace('/', '_').replace('.', '_') or 'page'}",
        "summary": route.summary,
        "responses": {"200": {"description": "the answer", "content": contents}},
    }
    for status, description in refusals.items():
        error = {"application/json": {"schema": {"$ref": f"{SCHEMAS}Error"}}} if route.path != "/health" else {}
        operation["responses"][status] = {"description": description, "content": error}
    if route.body is not None:
        schema = {"$ref": SCHEMAS + route.body.__name__}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if has_key and not route.is_open:
        operation["security"] = [{"key": []}]
    return operation
