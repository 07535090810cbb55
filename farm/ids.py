"""Identifiers: UUIDv7, so ids sort by the time they were made and a batch's jobs sort in submission order."""

import uuid

import uuid_utils.compat


def new_id() -> uuid.UUID:
    """A fresh UUIDv7. Ids made by one process rise strictly, also within a millisecond."""
    return uuid_utils.compat.uuid7()
