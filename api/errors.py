"""Every refusal as an RFC 9457 problem document, and the one table from an error's code to its HTTP status."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import Scope

from farm.errors import FarmError, InvalidRequest, Problem
from farm.fields import words_of
from farm.logs import get_logger

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 1
MOST_PROBLEMS = 100
CLIENT_CLOSED_REQUEST = 499
"""Logged, and seen by nobody: the client left before its request was complete."""

STATUS: dict[str, int] = {
    "bad-request": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not-found": 404,
    "method-not-allowed": 405,
    "too-slow": 408,
    "conflict": 409,
    "in-flight": 409,
    "limit-reached": 429,
    "too-large": 413,
    "unsupported-media-type": 415,
    "idempotency-mismatch": 422,
    "invalid": 422,
    "invalid-model": 422,
    "invalid-request": 422,
    "integrity": 500,
    "internal": 500,
    "render-failed": 500,
    "stack": 500,
    "out-of-memory": 503,
    "schema-mismatch": 503,
    "unavailable": 503,
}
"""Every code a problem document can carry."""

BY_STATUS = {
    400: "bad-request",
    404: "not-found",
    405: "method-not-allowed",
    413: "too-large",
    415: "unsupported-media-type",
}
"""Codes for what the framework refuses by itself."""

log = get_logger(__name__)


def problem(  # one document, one call
    scope: Scope,
    code: str,
    detail: str,
    *,
    retryable: bool = False,
    details: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The answer for an error with this code; `details` become members beside the standard ones."""
    status = STATUS.get(code, 500)
    body = {
        **(details or {}),
        "type": f"urn:lcm-farm:problem:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "instance": scope.get("path", ""),
        "code": code,
        "retryable": retryable,
        "request_id": scope.get("farm.request_id", ""),
    }
    extra = {}
    if retryable and status in {409, 429, 503}:
        extra["Retry-After"] = str((details or {}).get("retry_after", RETRY_AFTER_SECONDS))
    if status == 401:
        extra["WWW-Authenticate"] = "Bearer"
    if status == 408:
        # What is left of the body may never come.
        extra["Connection"] = "close"
    content = orjson.dumps(body, default=str, option=orjson.OPT_NON_STR_KEYS)
    return Response(content, status, {**extra, **(headers or {})}, MEDIA_TYPE)


def farm_problem(scope: Scope, error: FarmError) -> Response:
    """The answer for an error the farm raised on purpose.

    What a server of ours said (addresses, statements) goes to the log; a client learns that it can try again.
    """
    status = STATUS.get(error.code, 500)
    if status < 500:
        return problem(scope, error.code, error.message, retryable=error.retryable, details=error.details)
    log.warning("request failed", code=error.code, reason=error.message)
    return problem(scope, error.code, (type(error).__doc__ or "").strip(), retryable=error.retryable)


def unexpected_problem(scope: Scope) -> Response:
    """The answer for an error nobody foresaw; the log holds the rest under the same request id."""
    return problem(scope, "internal", "Something went wrong in the farm. The log has more under this request_id.")


def install(app: FastAPI) -> None:
    """Make every handler of the app answer problem documents."""
    app.add_exception_handler(FarmError, _on_farm_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)


async def _on_farm_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, FarmError):
        raise error
    return farm_problem(request.scope, error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    return farm_problem(request.scope, InvalidRequest("the request is not valid", problems=problems_of(error.errors())))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    headers = dict(error.headers or {})
    code = BY_STATUS.get(error.status_code, "bad-request" if error.status_code < 500 else "internal")
    if error.status_code == 404:
        detail = f"there is nothing at {request.url.path}"
    elif error.status_code == 405:
        detail = f"{request.url.path} does not answer {request.method}"
        headers["Allow"] = ", ".join(_methods(request)) or headers.get("Allow", "")
    else:
        detail = str(error.detail)
    return problem(request.scope, code, detail, headers=headers)


def _methods(request: Request) -> list[str]:
    """What a path answers, over all of its routes: the router names those of the first alone."""
    documented = request.app.openapi()["paths"]
    found = [documented[path] for path in documented if compile_path(path)[0].match(request.scope["path"])]
    return sorted({method.upper() for operations in found for method in operations})


async def _on_disconnect(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def problems_of(errors: Any, prefix: str = "") -> list[Problem]:
    """Pydantic's errors as (field, problem), without the values that were sent; at most the first hundred."""
    places = ("body", "query", "path", "header", "cookie")
    found: list[Problem] = []
    for error in list(errors)[:MOST_PROBLEMS]:
        where = [str(part) for part in error["loc"]]
        if len(where) > 1 and where[0] in places:
            where = where[1:]
        found.append({"field": ".".join([prefix, *where] if prefix else where), "problem": words_of(error)})
    return found
