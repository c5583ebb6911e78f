"""The OpenAPI document says what the server does; with schemathesis, requests made of it find no error of ours."""

import json
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from layerskip_kernels.serving.app import ServerSettings, build_app
from layerskip_kernels.serving.openapi import ROUTES, openapi_document
from support.servers import Server, serving


def test_every_route_is_in_the_document(server: Server):
    app = build_app(server.engine, ServerSettings("tiny"))
    routes = [route for route in app.routes if isinstance(route, Route)]
    served = {(method.lower(), route.path) for route in routes for method in route.methods or ()}
    assert {(route.method, route.path) for route in ROUTES} == {pair for pair in served if pair[0] != "head"}


def test_the_document_is_served_and_complete(server: Server):
    document = httpx.get(server.url + "/openapi.json").json()
    assert document == openapi_document(has_key=False)
    schemas = document["components"]["schemas"]
    references = {part.split('"')[0] for part in json.dumps(document).split('"$ref": "')[1:]}
    assert references and all(reference.removeprefix("#/components/schemas/") in schemas for reference in references)
    fields = schemas["CompletionRequest"]["properties"]
    assert fields["n"]["minimum"] == 1 and {"exit_layer", "prompt", "max_tokens"} <= fields.keys()


def test_what_is_behind_the_key_says_so(tiny_code):
    with serving(tiny_code, api_key="s3cret") as server:
        document = httpx.get(server.url + "/openapi.json").json()
        for route in ROUTES:
            operation = document["paths"][route.path][route.method]
            asked = httpx.request(route.method, server.url + route.path)
            assert ("security" in operation) == (asked.status_code == 401), route.path


def _ask(case: Any, seen: set[tuple[str, int]], documented: dict[str, Any]) -> None:
    if isinstance(case.body, dict):  # what it says is short
        wanted = case.body.get("max_tokens")
        case.body["max_tokens"] = min(wanted, 4) if type(wanted) is int else 4
    response = case.call()
    seen.add((case.path, response.status_code))
    assert response.status_code == 200 or str(response.status_code) in documented
    if response.status_code != 200:
        assert response.json()["error"]["message"]


def test_requests_made_of_the_document(server: Server):
    """Any request is answered, or refused with a status that the document names, in the API's form."""
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis (pip install schemathesis)")
    from hypothesis import HealthCheck, given, settings
    from hypothesis.strategies import just

    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    seen: set[tuple[str, int]] = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        documented = operation.definition.raw["responses"]
        inputs = dict(case=operation.as_strategy(), seen=just(seen), documented=just(documented))
        few = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        few(given(**inputs)(_ask))()
    assert {path for path, _ in seen} == {route.path for route in ROUTES} - {"/openapi.json"}
    assert {status for path, status in seen if path == "/v1/completions"} >= {200, 400}
    assert server.all_pages_free()
