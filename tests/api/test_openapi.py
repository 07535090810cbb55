"""The document that describes the API: complete, with examples, and nothing in it that leads nowhere."""

from collections.abc import Iterator
from typing import Any

import pytest

from api.errors import MEDIA_TYPE
from api.main import create_app
from farm.jobspec import JobSpec
from farm.settings import Settings


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    plain = Settings(database_url="postgresql://farm:long@localhost/x", redis_url="redis://:long@localhost/0")
    return create_app(plain).openapi()


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def test_operations_are_named_and_described(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() and name == name.lower() for name in names)
    assert all(operation.get("description") and operation["tags"] for _, _, operation in operations(document))
    assert {"create_job", "create_batch", "get_image", "stream_batch_events", "set_batch_priority"} <= set(names)


def test_everything_lies_below_one_prefix(document: dict[str, Any]) -> None:
    assert all(path.startswith("/api/v1/") for path in document["paths"])


def test_every_body_has_a_schema_and_an_example(document: dict[str, Any]) -> None:
    bodies = [operation["requestBody"] for _, _, operation in operations(document) if "requestBody" in operation]
    assert len(bodies) == 13
    for body in bodies:
        assert body["required"]
        for content in body["content"].values():
            assert content["schema"]
            assert content["examples"]


def test_every_refusal_is_a_problem_document(document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        if "/health/" in path:
            assert operation["security"] == []
            continue
        refusals = {status: answer for status, answer in operation["responses"].items() if int(status) >= 400}
        assert {"401", "403", "429", "503"} <= set(refusals)
        assert ("404" in refusals) == ("{" in path)
        assert ("413" in refusals) == ("requestBody" in operation), (method, path)
        assert all(list(answer["content"]) == [MEDIA_TYPE] for answer in refusals.values())
    assert document["security"] == [{"bearer": []}, {"header": []}]


def test_references_lead_somewhere(document: dict[str, Any]) -> None:
    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                if key == "$ref":
                    yield value
                else:
                    yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    found = set(references(document))
    assert found
    for reference in found:
        node: Any = document
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]


def test_the_query_of_a_batch_names_what_a_line_may_leave_out(document: dict[str, Any]) -> None:
    parameters = document["paths"]["/api/v1/batches"]["post"]["parameters"]
    names = {parameter["name"] for parameter in parameters if parameter["in"] == "query"}
    assert names == (set(JobSpec.model_fields) - {"prompt", "seed"}) | {"name", "dry_run", "stop_at_failed_share"}
