"""Types of the fields in bodies that people send, and what is wrong with such a body in the words of the farm."""

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, AwareDatetime, BeforeValidator, Field, Strict, StringConstraints, ValidationError

from farm.errors import Problem

FailedShare = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
"""A share of failed jobs at which something happens."""

MAX_PROMPT = 8_000
MAX_LABELS = 32
MAX_FIELDS = 100
"""More fields than any object of ours has. Past it nobody is told which of them are unknown: that could be millions."""

DATE = re.compile(r"\d{4}-\d\d-\d\d")


def _storable(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not contain the character U+0000")
    return value


def _spoken(value: str) -> str:
    if value and not value.strip():
        raise ValueError("must hold more than white space")
    return _storable(value)


def _askable(value: str) -> str:
    if "=" in value:
        raise ValueError("must not contain =, which ends the key where labels are asked for as key=value")
    return _storable(value)


def _written(value: object) -> object:
    # Left alone, pydantic takes numbers for seconds or milliseconds since 1970, whichever it finds likelier.
    if not isinstance(value, str) or not DATE.match(value):
        raise ValueError("must be a datetime as text, such as 2030-01-31T08:00:00Z")
    return value


def _in_utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError("must lie within the years 1 to 9999 (UTC)") from None


def at_most(most: int) -> BeforeValidator:
    """Refuses a longer list or object before its entries are looked at: each of a million could be wrong."""

    def check(value: object) -> object:
        if isinstance(value, (list, dict)) and len(value) > most:
            raise ValueError(f"must have at most {most} entries, not {len(value)}")
        return value

    return BeforeValidator(check)


Name = Annotated[str, StringConstraints(min_length=1, max_length=200), AfterValidator(_storable)]
LabelKey = Annotated[str, StringConstraints(min_length=1, max_length=100), AfterValidator(_askable)]
Label = Annotated[str, StringConstraints(max_length=500), AfterValidator(_storable)]
Labels = Annotated[dict[LabelKey, Label], at_most(MAX_LABELS), Field(max_length=MAX_LABELS)]
Prompt = Annotated[str, StringConstraints(min_length=1, max_length=MAX_PROMPT), AfterValidator(_spoken)]
NegativePrompt = Annotated[str, StringConstraints(max_length=MAX_PROMPT), AfterValidator(_storable)]
UploadHash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""The sha256 of an uploaded picture's bytes."""
Moment = Annotated[AwareDatetime, Strict(False), AfterValidator(_in_utc), BeforeValidator(_written)]
"""A point in time with its zone, as text; held in UTC."""


def words_of(found: Mapping[str, Any]) -> str:
    """What one of pydantic's findings says."""
    if found["type"] == "extra_forbidden":
        return "unknown parameter" if found["loc"][0] == "query" else "unknown field"
    return str(found["msg"]).removeprefix("Value error, ")


def problems_of(error: ValidationError) -> Iterator[Problem]:
    """Pydantic's findings in the words of the farm: field path and problem."""
    for found in error.errors(include_url=False, include_input=False, include_context=False):
        yield {"field": ".".join(str(part) for part in found["loc"]), "problem": words_of(found)}


def refuse_flood(document: Mapping[str, Any], known: int) -> None:
    """Raises ValueError for an object with far more fields than it could have; `known` is how many there are."""
    if len(document) > MAX_FIELDS:
        raise ValueError(f"has {len(document)} fields, of which {known} are known")
