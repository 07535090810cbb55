"""What tenants wrote reaches the terminal of whoever looks as text: it commands nothing and hides nothing."""

import doctest
import io
import re
from pathlib import Path

import orjson
import pytest
from rich.console import Console

from farm.cli import display, saying
from tests.cli.conftest import Run
from tests.client.fake import FakeFarm, Reply, batch_document, job_document, page, problem

HOSTILE = "\x1b]0;x\x07 \x1b[31m \u202e\u2066 \x9b2J \r\n\u2028 =1+1 [red] \U0001f469\u200d\U0001f692"
SHOWN = r"\x1b]0;x\x07 \x1b[31m \u202e\u2066 \x9b2J \r\n\u2028 =1+1 [red] " + "\U0001f469\u200d\U0001f692"
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202a-\u202e\u2066-\u2069]")
API = "/api/v1"


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(saying).failed == 0


def test_nothing_is_written_by_other_ways() -> None:
    """A command that writes by itself would bring back what `say` takes out."""
    folder = Path(saying.__file__).parent
    ways = r"typer\.s?echo\(|(?<!>>> )\bprint\(|sys\.std(?:out|err)\.write"
    found = {file.name: len(re.findall(ways, file.read_text("utf-8"))) for file in folder.glob("*.py")}
    # JSON and tables, and `say` itself.
    assert {name: count for name, count in found.items() if count} == {"display.py": 2, "saying.py": 1}


@pytest.fixture
def hostile(fake: FakeFarm) -> FakeFarm:
    """A farm whose tenant put the same into every text that it may choose, and a server that repeats it."""
    error = {"code": "render-failed", "message": HOSTILE}
    job = job_document(state="failed", prompt=HOSTILE, labels={HOSTILE: HOSTILE}, error=error)
    done = batch_document(1, failed=1) | {
        "id": job["batch_id"],
        "name": HOSTILE,
        "labels": {"a": HOSTILE},
        "stop_reason": HOSTILE,
    }
    fake.on("GET", f"{API}/jobs", page(job | {"finished_at": "2030-01-01T00:00:00Z"}))
    fake.on("GET", f"{API}/batches", page(done))
    for named in ("b", job["batch_id"]):
        fake.on("GET", f"{API}/batches/{named}", Reply(body=done))
    fake.on("GET", f"{API}/queue", page({
        "lane": "a" * 64, "checkpoint": HOSTILE, "pool": HOSTILE, "depth": 1, "running": 0,
        "oldest_age_seconds": 1.0, "images_per_second": 0.0,
    }))  # fmt: skip
    fake.on("GET", f"{API}/workers", page())
    wrong = [{"line": 1, "field": f"labels.{HOSTILE}", "problem": HOSTILE}]
    fake.on("GET", f"{API}/batches/wrong", problem(422, "invalid-request", HOSTILE, problems=wrong))
    return fake


@pytest.mark.parametrize("command", ["jobs", "jobs --failed", "batches", "watch b", "status", "watch wrong"])
def test_text_of_tenants_stays_text(run: Run, hostile: FakeFarm, command: str) -> None:
    shown = run(*command.split())
    both = shown.stdout + shown.stderr
    assert SHOWN[:30] in both, shown.output
    assert not RAW.search(both)
    longest = 2 if command == "watch wrong" else 8
    assert len(both.splitlines()) <= longest, "a line of theirs stays in its line"


@pytest.mark.parametrize("command", ["jobs", "batches", "jobs --failed", "watch b"])
def test_json_for_scripts_is_whole_and_as_harmless(run: Run, hostile: FakeFarm, command: str) -> None:
    written = run(*command.split(), "--json").stdout
    assert not RAW.search(written)
    lines = written.splitlines()
    assert len(lines) == 1
    assert orjson.dumps(HOSTILE) in orjson.dumps(orjson.loads(lines[0]))


def test_a_live_bar_and_a_spinner_show_text_too(monkeypatch: pytest.MonkeyPatch) -> None:
    on_terminal = Console(force_terminal=True, record=True, width=200, file=io.StringIO())
    monkeypatch.setattr(display, "err", on_terminal)
    with display.Bar("rendering", 2) as bar:
        bar.update(1, HOSTILE)
    with display.waiting("registering x") as note:
        note(HOSTILE)
    seen = on_terminal.export_text(styles=False)
    assert SHOWN in seen
    assert not RAW.search(seen)
