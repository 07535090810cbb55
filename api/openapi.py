"""The OpenAPI document: what FastAPI derives, plus request bodies, problem answers and keys, which are ours."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from api import parameters
from api.errors import MEDIA_TYPE
from api.examples import NDJSON
from api.middleware import OPEN
from api.schemas import (
    AdapterBody,
    BatchBody,
    CheckpointBody,
    ControlNetBody,
    KeyBody,
    LimitsBody,
    MotionBody,
    PriorityBody,
    ProblemDocument,
    VaeBody,
    WebhookBody,
    WebhookChange,
)
from farm.jobspec import JobSpec

DESCRIPTION = """\
Submit jobs, watch batches, fetch pictures. Every route but the health checks needs an API key, as
`Authorization: Bearer <key>` or `X-API-Key: <key>`. Errors are problem documents (RFC 9457) with a stable `code`.
"""

DOCUMENTED: tuple[type[BaseModel], ...] = (
    AdapterBody,
    BatchBody,
    CheckpointBody,
    ControlNetBody,
    JobSpec,
    KeyBody,
    LimitsBody,
    MotionBody,
    PriorityBody,
    ProblemDocument,
    VaeBody,
    WebhookBody,
    WebhookChange,
)
"""Models that no route's signature names."""

PROBLEMS = {
    "400": "The request cannot be read",
    "401": "No valid API key",
    "403": "The key lacks the scope",
    "404": "Nothing with this id in your project",
    "408": "The body did not arrive in time",
    "409": "The present state does not allow this, or a twin of this request is being worked on",
    "413": "The body is over the limit",
    "415": "A content type this route does not read",
    "422": "Something in the request is not valid; `problems` says what",
    "429": "A limit of the project is reached; `limit` says which, `Retry-After` for how long",
    "503": "A server the farm depends on does not answer; try again",
}


def ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def body(model: type[BaseModel], examples: dict[str, Any]) -> dict[str, Any]:
    """A route's `openapi_extra` for a JSON body that it reads itself."""
    named = {name: {"value": value} for name, value in examples.items()}
    content = {"application/json": {"schema": ref(model.__name__), "examples": named}}
    return {"requestBody": {"required": True, "content": content}}


def upload(model: type[BaseModel], examples: dict[str, Any]) -> dict[str, Any]:
    """The same for the route that also reads NDJSON, with the query parameters that belong to it."""
    extra = body(model, examples)
    lines = {"schema": {"type": "string"}, "examples": {"one job a line": {"value": NDJSON}}}
    extra["requestBody"]["content"]["application/x-ndjson"] = lines
    return extra | {"parameters": parameters.documented()}


def picture(types: Sequence[str]) -> dict[str, Any]:
    """The same for a body that is a picture of one of these types."""
    example = {"a file": {"summary": "the bytes of the file as they are", "value": "(binary)"}}
    content = {kind: {"schema": {"type": "string", "format": "binary"}, "examples": example} for kind in types}
    return {"requestBody": {"required": True, "content": content}}


def install(app: FastAPI) -> None:
    """Make the app answer this document."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # the documented way to extend it


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    _, definitions = models_json_schema(
        [(model, "validation") for model in DOCUMENTED], ref_template="#/components/schemas/{model}"
    )
    schemas.update(definitions["$defs"])
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    components["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    document["security"] = [{"bearer": []}, {"header": []}]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if path in OPEN:
                operation["security"] = []
            else:
                _add_problems(path, operation)
    return document


def _add_problems(path: str, operation: dict[str, Any]) -> None:
    statuses = ["401", "403", "429", "503"]
    if "{" in path:
        statuses.append("404")
    if "requestBody" in operation:
        statuses += ["400", "408", "413", "415"]
    if "requestBody" in operation or operation.get("parameters"):
        statuses.append("422")
    if ("{" in path and path.count("/") > 4) or "requestBody" in operation:
        statuses.append("409")
    answers = operation.setdefault("responses", {})
    for status in sorted(statuses):
        answers[status] = {"description": PROBLEMS[status], "content": {MEDIA_TYPE: {"schema": ref("ProblemDocument")}}}
