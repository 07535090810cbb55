"""Every error the farm raises on purpose.

An error carries a stable `code` (what a program tests), a message (what a person reads: what, where, what would be
right) and whether trying again can help. `api/errors.py` holds the one table from code to HTTP status.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypedDict


class Problem(TypedDict, total=False):
    """One thing wrong with a submission: `line` counts from 1 and is absent where there are no lines."""

    line: int
    field: str
    problem: str


class FarmError(Exception):
    """Something went wrong in the farm."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str | None = None, **details: Any) -> None:
        super().__init__(message or (self.__doc__ or "").strip())
        self.details: Mapping[str, Any] = details

    @property
    def message(self) -> str:
        return str(self.args[0])


class TransientError(FarmError):
    """A service did not answer; the same request can succeed later."""

    code = "unavailable"
    retryable = True


class PermanentError(FarmError):
    """The request can never succeed as it stands."""

    code = "invalid"


class Unavailable(TransientError):
    """A server the farm depends on does not answer."""


class InvalidRequest(PermanentError):
    """The request is not valid. `problems` says which fields, and what would be right."""

    code = "invalid-request"

    def __init__(self, message: str | None = None, problems: Sequence[Problem] = (), **details: Any) -> None:
        super().__init__(message, problems=list(problems), **details)
        self.problems: list[Problem] = list(problems)


class InvalidModel(PermanentError):
    """A checkpoint or adapter file cannot be used. The message names file, key and reason."""

    code = "invalid-model"


class NotFound(PermanentError):
    """There is nothing with this id in your project."""

    code = "not-found"


class Conflict(PermanentError):
    """The present state does not allow this."""

    code = "conflict"


class InFlight(TransientError):
    """A request with the same Idempotency-Key is still being worked on; ask again in a moment."""

    code = "in-flight"


class IdempotencyMismatch(PermanentError):
    """This Idempotency-Key was used for a different request."""

    code = "idempotency-mismatch"


class Unauthorized(PermanentError):
    """No valid API key. Send `Authorization: Bearer <key>` or `X-API-Key: <key>`."""

    code = "unauthorized"


class Forbidden(PermanentError):
    """This API key lacks the scope for that."""

    code = "forbidden"


class TooLarge(PermanentError):
    """The request body is over the limit."""

    code = "too-large"


class LimitReached(TransientError):
    """A limit of the project is reached. `limit` names it, `value` is its value, `retry_after` counts seconds."""

    code = "limit-reached"


class TooSlow(TransientError):
    """The request body did not arrive in time."""

    code = "too-slow"


class UnsupportedMedia(PermanentError):
    """The request's content type is not one this route reads."""

    code = "unsupported-media-type"


class SchemaMismatch(PermanentError):
    """The database has another schema than this version of the farm."""

    code = "schema-mismatch"


class StackError(PermanentError):
    """The stack on this machine could not be started or stopped."""

    code = "stack"


class OutOfMemory(TransientError):
    """The device has no room for this micro-batch, even alone."""

    code = "out-of-memory"


class RenderFailed(TransientError):
    """The pipeline raised while rendering."""

    code = "render-failed"


class IntegrityFailed(TransientError):
    """A stored file does not have the hash it was registered with."""

    code = "integrity"
