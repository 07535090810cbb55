"""Bad input is refused before anything is stored, with the field that is wrong: alone, in JSON, on an NDJSON line."""

from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from tests.api.conftest import PROMPT, Api, problem_of

NDJSON = {"Content-Type": "application/x-ndjson"}
JSON = {"Content-Type": "application/json"}

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", "string"),
    ({"prompt": ""}, "prompt", "at least 1"),
    ({"prompt": "x" * 8001}, "prompt", "at most 8000"),
    ({"prompt": ["x"]}, "prompt", "string"),
    ({"prompt": "a\0b"}, "prompt", "U+0000"),
    ({"prompt": " \n\t"}, "prompt", "more than white space"),
    ({"negative_prompt": 7}, "negative_prompt", "string"),
    ({"checkpoint": "crack-tinny"}, "checkpoint", "did you mean crack-tiny"),
    ({"checkpoint": "nothing like it"}, "checkpoint", "there are:"),
    ({"adapters": [{"name": "mos"}]}, "adapters.0.name", "did you mean moss"),
    ({"adapters": [{"name": "big-moss"}]}, "adapters.0.name", "made for sdxl"),
    ({"adapters": [{"name": "lcm"}]}, "adapters.0.name", "acceleration"),
    ({"adapters": [{"name": "moss", "weight": 10.5}]}, "adapters.0.weight", "less than"),
    ({"adapters": [{"name": "moss", "weight": "1"}]}, "adapters.0.weight", "number"),
    ({"adapters": [{"name": "moss", "wait": 1}]}, "adapters.0.wait", "unknown field"),
    ({"adapters": "moss"}, "adapters", "list"),
    ({"acceleration": "turbo"}, "acceleration", "lcm-lora"),
    ({"width": 130}, "width", "multiple of 8"),
    ({"width": 512}, "width", "64..256"),
    ({"height": 8}, "height", "64..256"),
    ({"height": "128"}, "height", "integer"),
    ({"height": 128.5}, "height", "integer"),
    ({"steps": 0}, "steps", "greater than"),
    ({"steps": 101}, "steps", "less than"),
    ({"steps": True}, "steps", "integer"),
    ({"guidance_scale": -0.1}, "guidance_scale", "greater than"),
    ({"guidance_scale": 31}, "guidance_scale", "less than"),
    ({"guidance_scale": "1.0"}, "guidance_scale", "number"),
    ({"scheduler": "henn"}, "scheduler", "lcm"),
    ({"scheduler": "euler"}, "scheduler", "needs scheduler lcm"),
    ({"format": "gif"}, "format", "'png', 'webp' or 'jpeg'"),
    ({"format": "jpeg", "quality": 0}, "quality", "greater than"),
    ({"format": "jpeg", "quality": 101}, "quality", "less than"),
    ({"format": "webp", "quality": 80.5}, "quality", "integer"),
    ({"format": "png", "quality": 80}, "quality", "a PNG keeps every pixel"),
    ({"quality": 80}, "quality", "goes with format webp or jpeg"),
    ({"format": "jpeg", "prompt": "\u88c2" * 8000}, "format", "set metadata to false"),
    ({"seed": -1}, "seed", "greater than"),
    ({"seed": 2**53}, "seed", "less than"),
    ({"seed": 2**70}, "seed", "integer"),
    ({"seed": 1.5}, "seed", "integer"),
    ({"count": 0}, "count", "greater than"),
    ({"count": 10_001}, "count", "less than"),
    ({"count": 2, "seed": 2**53 - 1}, "seed", "stay within"),
    ({"priority": 101}, "priority", "less than"),
    ({"labels": {"a": 1}}, "labels.a", "string"),
    ({"labels": ["a"]}, "labels", "dictionary"),
    ({"labels": {str(n): "" for n in range(33)}}, "labels", "at most 32"),
    ({"labels": {"a=b": ""}}, "labels.a=b.[key]", "must not contain ="),
    ({"run_at": 1_900_000_000}, "run_at", "datetime as text"),
    ({"run_at": "1900000000"}, "run_at", "datetime as text"),
    ({"run_at": 1.5}, "run_at", "datetime as text"),
    ({"run_at": "0001-01-01T00:00:00+14:00"}, "run_at", "years 1 to 9999"),
    ({"run_at": "9999-12-31T23:59:59-14:00"}, "run_at", "years 1 to 9999"),
    ({"run_at": "tomorrow"}, "run_at", "datetime"),
    ({"run_at": "2030-01-01T00:00:00"}, "run_at", "timezone"),
    ({"metadata": "no"}, "metadata", "boolean"),
    ({"colour": "red"}, "colour", "unknown field"),
    ({"Prompt": "x"}, "Prompt", "unknown field"),
]


@pytest.mark.parametrize(
    ("fields", "field", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_bad_jobs_are_refused_wherever_they_stand(api: Api, fields: dict[str, Any], field: str, words: str) -> None:
    bad = {"prompt": PROMPT, **fields}
    good = {"prompt": PROMPT}
    encoded = orjson.dumps(bad) if fields.get("seed") != 2**70 else str(bad).replace("'", '"').encode()
    before = api.stored()

    alone = api.http.post("/jobs", content=encoded, headers=JSON)
    body = b'{"jobs": [%s, %s]}' % (orjson.dumps(good), encoded)
    in_array = api.http.post("/batches", content=body, headers=JSON)
    lines = orjson.dumps(good) + b"\n\n" + encoded + b"\n"
    on_line = api.http.post("/batches", content=lines, headers=NDJSON)
    rehearsed = api.http.post("/batches?dry_run=true", content=lines, headers=NDJSON)

    for answer, where in ((alone, field), (in_array, f"jobs.1.{field}"), (on_line, field), (rehearsed, field)):
        document = problem_of(answer, 422, "invalid-request")
        (found,) = [problem for problem in document["problems"] if problem["field"] == where]
        assert words in found["problem"]
        assert found.get("line") == (3 if answer in (on_line, rehearsed) else None)
    assert api.stored() == before


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"5",
        b'"x"',
        b'{"prompt": "x", "guidance_scale": NaN}',
        b'{"prompt": "x", "guidance_scale": Infinity}',
        b'{"prompt": "x", "guidance_scale": -Infinity}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x"} {"prompt": "y"}',
        b'{"prompt": "x", "prompt": "y"}',
        b'{"prompt": "x", "labels": {"a": "1", "\\u0061": "2"}}',
        b'\xef\xbb\xbf{"prompt": "x"}',
        b'{"prompt": "x", "x": ' + b"[" * 300 + b"]" * 300 + b"}",
        b'{"prompt": "x", "x": ' + b'{"y":' * 1000 + b"1" + b"}" * 1001,
        b'{"prompt": ' + b"[" * 90_000,
        b"prompt=x",
    ],
)
def test_what_is_no_json_object_is_refused(api: Api, body: bytes) -> None:
    before = api.stored()
    for path in ("/jobs", "/batches", "/keys"):
        document = problem_of(api.http.post(path, content=body, headers=JSON), 422, "invalid-request")
        assert document["problems"][0]["problem"]
    if body:
        problem_of(api.http.post("/batches", content=body, headers=NDJSON), 422, "invalid-request")
    assert api.stored() == before


def test_a_colon_is_no_twin(api: Api) -> None:
    job = {"prompt": 'a: "b": {c: d}', "labels": {"a:b": "c:d", "a": "::"}, "run_at": "2030-01-01T00:00:00+01:00"}
    answer = api.http.post("/jobs", json=job)
    assert answer.status_code == 201
    assert answer.json()["labels"] == job["labels"]
    assert answer.json()["run_at"] == "2029-12-31T23:00:00Z"


def test_numbers_out_of_this_world_are_refused(api: Api) -> None:
    for value in ("1e999", "-1e999", "9" * 400):
        body = b'{"prompt": "x", "guidance_scale": %s}' % value.encode()
        problem_of(api.http.post("/jobs", content=body, headers=JSON), 422, "invalid-request")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "jobs"),
        ({"jobs": []}, "jobs"),
        ({"jobs": {"prompt": "x"}}, "jobs"),
        ({"jobs": ["x"]}, "jobs.0"),
        ({"jobs": [{"prompt": "x"}], "name": 5}, "name"),
        ({"jobs": [{"prompt": "x"}], "name": "x" * 201}, "name"),
        ({"jobs": [{"prompt": "x"}], "name": "a\0"}, "name"),
        ({"jobs": [{"prompt": "x"}], "labels": {"a": 1}}, "labels.a"),
        ({"jobs": [{"prompt": "x"}], "labels": {"a": "\0"}}, "labels.a"),
        ({"jobs": [{"prompt": "x"}], "defaults": []}, "defaults"),
        ({"jobs": [{"prompt": "x"}], "defaults": {"steps": 0}}, "defaults.steps"),
        ({"jobs": [{"prompt": "x"}], "defaults": {"colour": "red"}}, "defaults.colour"),
        ({"jobs": [{"prompt": "x"}], "defaults": {"seed": 5}}, "defaults.seed"),
        ({"jobs": [{"prompt": "x"}], "defaults": {"labels": {"a": 1}}}, "defaults.labels.a"),
        ({"jobs": [{"prompt": "x"}], "jobz": []}, "jobz"),
    ],
)
def test_batches_that_make_no_sense_are_refused(api: Api, body: dict[str, Any], field: str) -> None:
    before = api.stored()
    document = problem_of(api.http.post("/batches", json=body), 422, "invalid-request")
    assert field in [problem["field"] for problem in document["problems"]]
    assert api.stored() == before


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("steps=four", "steps"),
        ("steps=0", "defaults.steps"),
        ("steps=4&steps=8", "steps"),
        ("guidance_scale=NaN", "guidance_scale"),
        ("colour=red", "colour"),
        ("seed=5", "seed"),
        ("prompt=x", "prompt"),
        ("dry_run=maybe", "dry_run"),
        ("name=a%00", "name"),
        ('labels={"a":1}', "labels.a"),
        ("labels=a", "labels"),
        ("labels=[]", "labels"),
        ("adapters=moss", "adapters"),
        ('adapters=[{"nam":"moss"}]', "defaults.adapters.0.nam"),
        ("run_at=tomorrow", "defaults.run_at"),
    ],
)
def test_defaults_of_ndjson_that_make_no_sense_are_refused(api: Api, query: str, field: str) -> None:
    before = api.stored()
    answer = api.http.post(f"/batches?{query}", content=b'{"prompt": "x"}\n', headers=NDJSON)
    document = problem_of(answer, 422, "invalid-request")
    assert field in [problem["field"] for problem in document["problems"]]
    assert api.stored() == before


def test_defaults_in_the_query_are_for_ndjson_only(api: Api) -> None:
    document = problem_of(api.http.post("/batches?steps=4&name=x", json={"jobs": []}), 422, "invalid-request")
    assert [problem["field"] for problem in document["problems"]] == ["steps", "name"]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from(
    ["prompt", "negative_prompt", "checkpoint", "adapters", "acceleration", "width", "height", "steps", "seed",
     "guidance_scale", "scheduler", "count", "priority", "labels", "run_at", "metadata", "x"]
)  # fmt: skip


@effort(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(job=st.dictionaries(fields, values, max_size=4), good=st.booleans())
def test_no_job_whatever_it_holds_breaks_the_api(api: Api, job: dict[str, Any], good: bool) -> None:
    if good:
        job = {**job, "prompt": PROMPT}
    try:
        body = orjson.dumps(job)
    except TypeError:  # integers that JSON readers do not agree on
        body = str(job).replace("'", '"').encode()
    for path, headers, content in (
        ("/jobs", JSON, body),
        ("/batches", JSON, b'{"jobs": [%s]}' % body),
        ("/batches?dry_run=true", NDJSON, body),
    ):
        answer = api.http.post(path, content=content, headers=headers)
        assert answer.status_code in {200, 201, 422}, (job, answer.text)


@effort(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200), ndjson=st.booleans())
def test_no_body_whatever_it_holds_breaks_the_api(api: Api, body: bytes, ndjson: bool) -> None:
    answer = api.http.post("/batches", content=body, headers=NDJSON if ndjson else JSON)
    assert answer.status_code == 422
