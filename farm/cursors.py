"""Cursors of lists: the last id of a page, in a form that nobody takes for anything else."""

import base64
import binascii
from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import RowMapping

from farm.errors import InvalidRequest


def next_cursor(found: Sequence[RowMapping], limit: int) -> str | None:
    """The cursor after a page of `limit` rows, of which one more than that was asked for; None on the last page."""
    if len(found) <= limit:
        return None
    last: UUID = found[limit - 1]["id"]
    return base64.urlsafe_b64encode(last.bytes).decode().rstrip("=")


def decode(cursor: str | None) -> UUID | None:
    """The id in a cursor. Raises InvalidRequest."""
    if cursor is None:
        return None
    try:
        return UUID(bytes=base64.b64decode(cursor + "==", altchars=b"-_", validate=True))
    except (ValueError, binascii.Error) as error:
        raise InvalidRequest("cursor is not one that a page of this list gave as next_cursor") from error
