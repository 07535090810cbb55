"""The query parameters of `POST /batches`: an NDJSON body has its name and defaults there."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import QueryParams

from api.schemas import Text
from farm import jsontext
from farm.errors import InvalidRequest, Problem
from farm.fields import FailedShare, Labels, words_of
from farm.jobspec import JobSpec

PROPERTIES: dict[str, dict[str, Any]] = {
    name: schema for name, schema in JobSpec.model_json_schema()["properties"].items() if name not in {"prompt", "seed"}
}
"""What defaults may hold. A prompt or a seed belongs to one job."""


def _is_text(schema: Mapping[str, Any]) -> bool:
    return any(option.get("type") == "string" for option in (schema, *schema.get("anyOf", ())))


TEXTS = frozenset(name for name, schema in PROPERTIES.items() if _is_text(schema))
"""Parameters taken as they are; the others are JSON: `steps=4`, `labels={"site":"bridge-7"}`."""

STOP = "stop_at_failed_share"

FLAGS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class BatchParameters:
    """How to take a batch, checked as far as it can be without a catalogue."""

    name: str = ""
    dry_run: bool = False
    stop_at_failed_share: float | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, query: QueryParams) -> "BatchParameters":
        """Raises InvalidRequest with every parameter that is unknown, doubled or cannot be read."""
        problems: list[Problem] = []
        found: dict[str, Any] = {}
        for name in query:
            try:
                found[name] = _value(name, query.getlist(name))
            except ValueError as error:
                problems.append({"field": name, "problem": str(error)})
        defaults = {name: value for name, value in found.items() if name in PROPERTIES}
        title = _checked(Text, "name", found.get("name", ""), problems)
        labels = _checked(Labels, "labels", defaults.get("labels", {}), problems)
        share = _checked(FailedShare | None, STOP, found.get(STOP), problems)
        if problems:
            raise InvalidRequest("a query parameter is not valid", problems=problems)
        return cls(title, found.get("dry_run", False), share, defaults, labels)

    def refuse_defaults(self) -> None:
        """A JSON body says these things itself. Raises InvalidRequest."""
        own = {"name": self.name, STOP: self.stop_at_failed_share}
        given = [*self.defaults, *(name for name, value in own.items() if value)]
        if given:
            problems: list[Problem] = [{"field": name, "problem": "belongs into the JSON body"} for name in given]
            raise InvalidRequest("query parameters give defaults to NDJSON only", problems=problems)


def documented() -> list[dict[str, Any]]:
    """These parameters for the OpenAPI document."""
    flag = {"type": "boolean", "default": False}
    own = [
        {"name": "dry_run", "in": "query", "schema": flag, "description": "Check everything, store nothing."},
        {"name": "name", "in": "query", "schema": {"type": "string"}, "description": "NDJSON: the batch's name."},
        {
            "name": STOP,
            "in": "query",
            "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            "description": "NDJSON: the batch stops itself once this share of its jobs failed.",
        },
    ]
    for name, schema in PROPERTIES.items():
        parameter: dict[str, Any] = {"name": name, "in": "query", "description": "NDJSON: default for every line."}
        if schema.get("type") in {"array", "object"}:
            own.append(parameter | {"content": {"application/json": {"schema": _moved(schema)}}})
        else:
            own.append(parameter | {"schema": schema})
    return own


def _moved(schema: Any) -> Any:
    """The schema with its references pointing where OpenAPI keeps models."""
    if isinstance(schema, dict):
        return {key: _moved(value) for key, value in schema.items()}
    if isinstance(schema, list):
        return [_moved(value) for value in schema]
    return schema.replace("#/$defs/", "#/components/schemas/") if isinstance(schema, str) else schema


def _value(name: str, given: list[str]) -> Any:
    """One parameter, decoded. Raises ValueError."""
    if len(given) > 1:
        raise ValueError("is given more than once")
    if name == "dry_run":
        if given[0].lower() not in FLAGS:
            raise ValueError("must be true or false")
        return FLAGS[given[0].lower()]
    if name == "name" or name in TEXTS:
        return given[0]
    if name not in PROPERTIES and name != STOP:
        raise ValueError("unknown parameter")
    try:
        return jsontext.loads(given[0])
    except ValueError as error:
        raise ValueError(f"must be JSON: {error}") from None


def _checked(kind: Any, name: str, value: Any, problems: list[Problem]) -> Any:
    try:
        return TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        for found in error.errors():
            where = ".".join([name, *(str(part) for part in found["loc"])])
            problems.append({"field": where, "problem": words_of(found)})
        return None
