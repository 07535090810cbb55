"""Submissions from files: every format means the same, and every mistake is named by line and field."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from farm.cli.reading import read
from farm.errors import InvalidRequest


def _file(tmp_path: Path, name: str, content: str) -> str:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return str(path)


JOBS = [
    {"prompt": "A crack, wide", "steps": 4, "adapters": [{"name": "moss", "weight": 0.5}], "labels": {"wall": "n"}},
    {"prompt": 'Says "dry"'},
]
CSV = '''\ufeffprompt,steps,adapters,label.wall
"A crack, wide",4,moss:0.5,n

"Says ""dry""",,,
'''
NDJSON = """{"prompt":"A crack, wide","steps":4,"adapters":[{"name":"moss","weight":0.5}],"labels":{"wall":"n"}}

"Says \\"dry\\""
"""
JSON = """[
  {"prompt": "A crack, wide", "steps": 4, "adapters": [{"name": "moss", "weight": 0.5}], "labels": {"wall": "n"}},
  "Says \\"dry\\""
]"""


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [("a.csv", CSV, [2, 4]), ("a.ndjson", NDJSON, [1, 3]), ("a.jsonl", NDJSON, [1, 3]), ("a.json", JSON, [1, 2])],
)
def test_every_format_holds_the_same_jobs(tmp_path: Path, name: str, content: str, places: list[int]) -> None:
    submission = read(_file(tmp_path, name, content))
    assert list(submission.rows) == JOBS
    assert list(submission.places) == places
    assert list(submission.rows) == JOBS, "a file can be walked again, should the client have to send it again"
    assert list(submission.places) == places


@pytest.mark.parametrize("content", [CSV, NDJSON, JSON])
def test_a_file_without_a_telling_name_is_recognised(tmp_path: Path, content: str) -> None:
    assert list(read(_file(tmp_path, "jobs", content)).rows) == JOBS


@pytest.mark.parametrize("content", [CSV, NDJSON, JSON])
def test_standard_input(monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    assert list(read("-").rows) == JOBS


def test_a_batch_in_json_brings_name_and_defaults(tmp_path: Path) -> None:
    content = '{"name": "walls", "labels": {"a": "b"}, "defaults": {"steps": 2},\n "jobs": [{"prompt": "x"}]}'
    submission = read(_file(tmp_path, "a.json", content))
    assert (submission.name, submission.defaults) == ("walls", {"steps": 2, "labels": {"a": "b"}})
    assert list(submission.rows) == [{"prompt": "x"}]


def test_one_job_in_json(tmp_path: Path) -> None:
    assert list(read(_file(tmp_path, "a.json", '{\n "prompt": "x"}')).rows) == [{"prompt": "x"}]


def test_cells_become_what_the_column_says(tmp_path: Path) -> None:
    content = (
        "prompt,guidance_scale,metadata,labels,label.b,run_at,seed\n"
        "x,1.5,no,a=1; c=2,3,2031-01-01T00:00:00Z,9007199254740991\n"
    )
    assert list(read(_file(tmp_path, "a.csv", content)).rows) == [
        {
            "prompt": "x",
            "guidance_scale": 1.5,
            "metadata": False,
            "labels": {"a": "1", "c": "2", "b": "3"},
            "run_at": "2031-01-01T00:00:00Z",
            "seed": 2**53 - 1,
        }
    ]


@pytest.mark.parametrize(
    ("name", "content", "problems"),
    [
        ("a.csv", "prompt,stepz\nx,4\n", [(1, "stepz", "did you mean steps?")]),
        ("a.csv", "steps\n4\n", [(1, "prompt", "is missing")]),
        ("a.csv", "prompt,prompt\nx,y\n", [(1, "prompt", "is there twice")]),
        ("a.csv", "", [(1, "", "column names")]),
        (
            "a.csv",
            'prompt,steps,guidance_scale,metadata,adapters,labels\n"two\nlines",4,,,,\nx,four,nan,maybe,a:b,c\nx,y\n',
            [
                (4, "steps", "whole number, not 'four'"),
                (4, "guidance_scale", "must be a number, not 'nan'"),
                (4, "metadata", "true or false"),
                (4, "adapters", "NAME or NAME:WEIGHT"),
                (4, "labels", "KEY=VALUE"),
                (5, "", "has 2 cells, but there are 6 columns"),
            ],
        ),
        ("a.csv", 'prompt\n"open\n', [(2, "", "no CSV")]),
        ("a.ndjson", '{"prompt": "x"}\n{"prompt":\n[1]\n', [(2, "", "must be JSON"), (3, "", "must be an object")]),
        ("a.json", "[1, \n 2", [(2, "", "")]),
        ("a.json", "[1]", [(None, "job 1", "must be an object")]),
        ("a.json", '{"jobs": [], "nam": "x"}', [(None, "nam", "did you mean name?")]),
        ("a.json", '{"jobs": 3, "defaults": []}', [(None, "jobs", "a list"), (None, "defaults", "an object")]),
    ],
)
def test_mistakes_are_named_by_line_and_field(tmp_path: Path, name: str, content: str, problems: list[Any]) -> None:
    with pytest.raises(InvalidRequest) as raised:
        list(read(_file(tmp_path, name, content)).rows)
    found = raised.value.problems
    assert [(each.get("line"), each["field"]) for each in found] == [(line, field) for line, field, _ in problems]
    for each, (_, _, words) in zip(found, problems, strict=True):
        assert words in each["problem"]


def test_a_file_full_of_mistakes_is_not_read_to_its_end(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as raised:
        list(read(_file(tmp_path, "a.ndjson", "nonsense\n" * 1000)).rows)
    assert len(raised.value.problems) == 100


def test_the_farms_lines_become_lines_of_the_file(tmp_path: Path) -> None:
    submission = read(_file(tmp_path, "a.csv", CSV))
    list(submission.rows)
    refused = InvalidRequest("no", problems=[{"line": 2, "field": "prompt", "problem": "too long"}])
    assert submission.placed(refused).problems == [{"line": 4, "field": "prompt", "problem": "too long"}]


def test_the_farms_lines_become_jobs_of_a_document(tmp_path: Path) -> None:
    submission = read(_file(tmp_path, "a.json", JSON))
    refused = InvalidRequest("no", problems=[{"line": 2, "field": "prompt", "problem": "too long"}])
    assert submission.placed(refused).problems == [{"field": "job 2: prompt", "problem": "too long"}]
