"""What a hostile client may send: refused with a reason or kept as it is, never a crash, never a word from inside."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import orjson
import pytest
import structlog
from sqlalchemy import Engine, event

from api.schemas import BatchBody, KeyBody, LimitsBody, PriorityBody, WebhookBody, WebhookChange
from farm.jobspec import AdapterSpec, JobSpec
from tests.api.conftest import PROMPT, Api, operations, problem_of, until

JSON = {"Content-Type": "application/json"}
NDJSON = {"Content-Type": "application/x-ndjson"}
URL = "https://receiver.example/"
NOT_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e309", "-1e309", '"1e9"', '"1"', "true", "[]", "{}", "[1]", str(2**63),
               str(-(2**63) - 1), str(2**64), str(10**400))  # fmt: skip
"""As they stand in JSON. Beside them each field has its own bounds."""
INSIDE = re.compile(
    r"Traceback|File \"|\.py\b|/(?:usr|home|root|tmp|opt|var|etc)/|site-packages|SELECT |INSERT |UPDATE |psycopg"
    r"|sqlalchemy|127\.0\.0\.1|password",
    re.IGNORECASE,
)
CREATED = {
    "/keys": KeyBody, "/webhooks": WebhookBody, "/batches/batch_id/priority": PriorityBody,
    "/webhooks/webhook_id": WebhookChange, "/projects/project_id": LimitsBody, "/batches": BatchBody,
}  # fmt: skip
"""Bodies with numbers, other than jobs; a test below looks for ones that are missing here."""


def numbers(model: Any) -> Iterator[tuple[str, list[str]]]:
    """The numeric fields of a model, with what lies just outside of their bounds, as JSON."""
    for name, schema in model.model_json_schema()["properties"].items():
        for option in (schema, *schema.get("anyOf", ())):
            if option.get("type") in {"integer", "number"}:
                below = option.get("minimum", option.get("exclusiveMinimum"))
                above = option.get("maximum", option.get("exclusiveMaximum"))
                assert below is not None, f"{name} has no least value"
                assert above is not None, f"{name} has no greatest value"
                step = 1 if option["type"] == "integer" else 0.001
                outside = [orjson.dumps(below - step).decode(), orjson.dumps(above + step).decode()]
                if "exclusiveMinimum" in option:
                    outside.append(orjson.dumps(below).decode())
                optional = any(other.get("type") == "null" for other in schema.get("anyOf", ()))
                fractions = ["1.5"] if option["type"] == "integer" else []
                yield name, [*outside, *fractions, *NOT_NUMBERS, *([] if optional else ["null"])]


JOB_NUMBERS = [(name, value) for name, values in numbers(JobSpec) for value in values]


def refused(answer: Any, sent: str = "") -> dict[str, Any]:
    """The document of a refusal that says what is wrong, and nothing from inside; `sent` may be repeated in it."""
    document = problem_of(answer, 422, "invalid-request")
    assert document["problems"]
    words = [problem["problem"].replace(sent, "") if sent else problem["problem"] for problem in document["problems"]]
    assert not INSIDE.search(orjson.dumps({**document, "instance": "", "problems": words}).decode()), document
    return document


@pytest.mark.parametrize("name", sorted({name for name, _ in JOB_NUMBERS}))
def test_numbers_of_jobs(api: Api, name: str) -> None:
    before = api.stored()
    for _, value in (pair for pair in JOB_NUMBERS if pair[0] == name):
        body = f'{{"prompt": "x", "{name}": {value}}}'.encode()
        refused(api.http.post("/jobs", content=body, headers=JSON))
        refused(api.http.post("/batches", content=b'{"jobs": [%s]}' % body, headers=JSON))
        refused(api.http.post("/batches", content=body + b"\n", headers=NDJSON))
        if name != "seed":
            shared = f'{{"jobs": [{{"prompt": "x"}}], "defaults": {{"{name}": {value}}}}}'.encode()
            refused(api.http.post("/batches", content=shared, headers=JSON))
            line = b'{"prompt": "x"}\n'
            refused(api.http.post(f"/batches?{name}={quote(value)}", content=line, headers=NDJSON))
    assert api.stored() == before


@contextmanager
def statements() -> Iterator[list[str]]:
    """What is asked of Postgres meanwhile, apart from whose key it is."""
    asked: list[str] = []

    def note(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "api_keys" not in statement:
            asked.append(statement.strip())

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield asked
    finally:
        event.remove(Engine, "before_cursor_execute", note)


def test_a_refusal_costs_postgres_three_reads_however_much_is_wrong(api: Api) -> None:
    wrong = b'{"prompt": "x", "steps": 1e309}'
    for path, body, kind in (
        ("/jobs", wrong, JSON),
        ("/jobs", b"[" * 100_000, JSON),
        ("/batches", b'{"jobs": [%s]}' % b",".join([wrong] * 1000), JSON),
        ("/batches", b"\n".join([wrong] * 1000), NDJSON),
        ("/batches", b'{"jobs": [], "priority": 101}', JSON),
        ("/webhooks", b'{"url": 1}', JSON),
        ("/keys", b'{"name": 1}', JSON),
    ):
        with statements() as asked:
            refused(api.http.post(path, content=body, headers=kind))
        assert len(asked) <= 3
        assert all(one.startswith("SELECT") and "FROM jobs" not in one for one in asked)


def test_weights_of_adapters(api: Api) -> None:
    before = api.stored()
    for name, values in numbers(AdapterSpec):
        for value in values:
            body = f'{{"prompt": "x", "adapters": [{{"name": "moss", "{name}": {value}}}]}}'.encode()
            refused(api.http.post("/jobs", content=body, headers=JSON))
    assert api.stored() == before


def test_numbers_of_everything_else(api: Api) -> None:
    webhook = api.http.post("/webhooks", json={"url": URL}).json()
    batch = api.submit(1)
    project = api.http.get("/project").json()
    ids = {"webhook_id": webhook["id"], "batch_id": batch["id"], "project_id": project["id"]}
    looked = ("/project", f"/webhooks/{webhook['id']}", f"/batches/{batch['id']}", "/webhooks")

    def state() -> list[Any]:
        return [api.http.get(path).json() for path in looked]

    before = state()
    tried = 0
    for path, model in CREATED.items():
        where = re.sub(r"\w+_id", lambda found: ids[found[0]], path)
        method = "PATCH" if path.endswith(("webhook_id", "project_id")) else "POST"
        for name, values in numbers(model):
            for value in values:
                extra = {WebhookBody: f'"url": "{URL}", ', BatchBody: '"jobs": [{"prompt": "x"}], '}.get(model, "")
                body = f'{{{extra}"{name}": {value}}}'.encode()
                refused(api.http.request(method, where, content=body, headers=JSON))
                tried += 1
    for value in ("NaN", "1e309", "0", "501", "true", "null", "[]", str(2**63), "-1", "1.5", ""):
        for path in ("/jobs", "/batches", f"/webhooks/{webhook['id']}/deliveries"):
            refused(api.http.get(f"{path}?limit={value}"))
    for value in ("0", "1.001", "-1", "NaN", "1e309", "true", "[]", '"0.5"', "", str(2**63)):
        shared = f"/batches?stop_at_failed_share={quote(value)}"
        refused(api.http.post(shared, content=b'{"prompt": "x"}\n', headers=NDJSON))
    for value in ("-1", "2592001", "NaN", "1e309", "null", str(2**63)):
        refused(api.http.post(f"/webhooks/{webhook['id']}/rotate?overlap={value}"))
    assert tried > 80
    assert state() == before


def test_no_body_with_numbers_is_forgotten_here(api: Api) -> None:
    document = api.http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]

    def has_numbers(name: str) -> bool:
        found = re.findall(r'"type":"(?:integer|number)"', orjson.dumps(schemas[name]).decode())
        return bool(found)

    missing = set()
    for path, methods in document["paths"].items():
        for operation in methods.values():
            for content in operation.get("requestBody", {}).get("content", {}).values():
                name = content["schema"].get("$ref", "").rpartition("/")[2]
                if name and has_numbers(name):
                    missing.add((path.removeprefix("/api/v1").replace("{", "").replace("}", ""), name))
    known = {(path, model.__name__) for path, model in CREATED.items()} | {("/jobs", "JobSpec")}
    assert missing <= known


def in_a_path(name: str) -> str:
    """Percent-encoded, dots too: a client would walk up by itself over plain ones."""
    return quote(name, safe="").replace(".", "%2e")


STRANGE = ("..", "../../etc/passwd", "%2e%2e", "%2e%2e%2f", "a/b", "a\\b", "a#b", "a?b", "a b", "a\x00b", "a\r\nb",
           "\u202egnp", "\uff45",
           "é", "-rf", ".hidden", "", "a" * 300, "con:", "$(id)", "`id`", "';--", "{{7*7}}", "<b>")  # fmt: skip


@pytest.mark.parametrize("path", ["/checkpoints", "/vaes", "/adapters", "/controlnets", "/motions", "/keys"])
def test_names_that_are_no_names(api: Api, path: str) -> None:
    for name in STRANGE:
        body = {"name": name, "source": f"s3://models/{uuid4().hex}.safetensors"}
        if path == "/keys":
            body = {"name": "fine", "project": name}
        refused(api.http.post(path, json=body))
    assert api.http.get("/registrations").json()["items"] == []
    assert [project["name"] for project in api.http.get("/projects").json()["items"]] == ["cracks"]


def test_names_in_jobs_and_paths_lead_nowhere(api: Api) -> None:
    before = api.stored()
    for name in STRANGE:
        for field in ({"checkpoint": name}, {"vae": name}, {"adapters": [{"name": name}]}):
            refused(api.http.post("/jobs", json={"prompt": PROMPT, **field}), name)
        for method, path in operations(api):
            if "_id" not in path:
                continue
            answer = api.http.request(method, re.sub(r"\w+_id\b", in_a_path(name), path), json={})
            assert answer.status_code in {404, 405, 415, 422}, (method, path, name)
            assert answer.headers["content-type"] == "application/problem+json"
            assert not INSIDE.search(orjson.dumps({**answer.json(), "instance": "", "detail": ""}).decode())
    assert api.stored() == before


PROMPTS = (
    "line\r\nSet-Cookie: a=b\r\n\r\n<html>",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07",
    "\u202e\u2066bidi\u2069 \u200b\ufeff",
    "=HYPERLINK(\"http://x\",\"y\")",
    "+1+1", "-1+1", "@SUM(1)", "\t=1",
    "'; DROP TABLE jobs; --",
    "<script>alert(1)</script>",
    "${jndi:ldap://x}", "{{7*7}}", "%s%s%n", "[bold]x[/bold]",
    "\U0001f9f1" * 100,
)  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompts_are_kept_as_they_are_and_stay_in_their_place(api: Api, prompt: str) -> None:
    with structlog.testing.capture_logs() as lines:
        answer = api.http.post(
            "/jobs", json={"prompt": prompt, "labels": {prompt[:50].replace("=", "-"): prompt[:500]}}
        )
        assert answer.status_code == 201, answer.text
        until(lambda: lines)
    assert len(lines) == 1
    assert prompt[:10] not in str(lines)
    assert api.http.get(f"/jobs/{answer.json()['id']}").json()["prompt"] == prompt
    assert all(prompt not in value for value in answer.headers.values())
    line = orjson.dumps({"prompt": prompt}) + b"\n"
    assert api.http.post("/batches", content=line, headers=NDJSON).status_code == 201


def test_a_request_leaves_one_line_whatever_its_path_holds(api: Api) -> None:
    with structlog.testing.capture_logs() as lines:
        answer = api.http.get("/jobs/%0d%0aadmin%1b%5b31m%e2%80%ae", headers={"User-Agent": "\x1b[31m"})
        until(lambda: lines)
    refused(answer)
    (line,) = lines
    assert line["status"] == 422
    # Whatever renders the line, JSON or a console, writes the path as a quoted value.
    assert "\n" not in orjson.dumps(line, default=str).decode()
    assert "\x1b" not in repr(line)
