"""What went wrong, as an exception: RFC 9457 problem documents by their `code`, anything else by its status."""

from collections.abc import Iterator
from typing import Any

import orjson

from farm import errors
from farm.errors import FarmError, Problem


def _classes(root: type[FarmError]) -> Iterator[type[FarmError]]:
    yield root
    for child in root.__subclasses__():
        yield from _classes(child)


BY_CODE: dict[str, type[FarmError]] = {
    kind.code: kind for kind in _classes(FarmError) if kind.__module__ == errors.__name__
}
"""The class to raise for a code, of those that callers know. Where parent and child share one, the child (met later) is
meant."""

BY_STATUS: dict[int, type[FarmError]] = {
    401: errors.Unauthorized,
    403: errors.Forbidden,
    404: errors.NotFound,
    408: errors.TooSlow,
    409: errors.Conflict,
    413: errors.TooLarge,
    415: errors.UnsupportedMedia,
    422: errors.InvalidRequest,
    429: errors.Unavailable,
    502: errors.Unavailable,
    503: errors.Unavailable,
    504: errors.Unavailable,
}
"""For answers that are no problem document: a proxy in between, say."""


def error_from(status: int, body: bytes) -> FarmError:
    """The exception that an answer with this status (>= 400) and body means. `details` keeps the whole document."""
    document = _document(body)
    code = document.get("code")
    kind = BY_CODE.get(code) if isinstance(code, str) else None
    if kind is None:
        kind = BY_STATUS.get(status, errors.PermanentError if status < 500 else FarmError)
    message = str(document.get("detail") or document.get("title") or f"the farm answered with status {status}")
    details = {key: value for key, value in document.items() if key != "problems"} | {"status": status}
    if issubclass(kind, errors.InvalidRequest):
        return kind(message, problems=_problems(document), **details)
    return kind(message, **details)


def _document(body: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _problems(document: dict[str, Any]) -> list[Problem]:
    problems = document.get("problems")
    return [problem for problem in problems if isinstance(problem, dict)] if isinstance(problems, list) else []  # type: ignore[misc]
