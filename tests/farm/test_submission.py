"""What is refused before anything is stored, and what comes out of what is accepted."""

import time
from dataclasses import replace
from datetime import UTC, datetime
from io import BytesIO
from typing import Any

import pytest
from sqlalchemy import text

from farm import db, submission
from farm.db import Database
from farm.errors import InvalidRequest, TooLarge, Unavailable
from farm.queries import submitting
from farm.settings import Settings
from tests.farm.conftest import Queue, catalogue

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def plain() -> Settings:
    return Settings(
        database_url="postgresql://farm:long-secret@localhost/x", redis_url="redis://:long-secret@localhost/0"
    )


def refused(plain: Settings, row: Any, **defaults: Any) -> list[dict[str, Any]]:
    with pytest.raises(InvalidRequest) as caught:
        submission.prepare([row], defaults=defaults, catalogue=catalogue(), settings=plain, name="n", now=NOW)
    return [dict(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("row", "field", "words"),
    [
        ({}, "prompt", "required"),
        ({"prompt": ""}, "prompt", "at least 1"),
        ({"prompt": "x" * 8001}, "prompt", "at most 8000"),
        ({"prompt": "a\0b"}, "prompt", "U+0000"),
        ({"prompt": 5}, "prompt", "string"),
        ({"prompt": "x", "colour": "red"}, "colour", "unknown field"),
        ({"prompt": "x", "checkpoint": "crack-tinny"}, "checkpoint", "did you mean crack-tiny"),
        ({"prompt": "x", "adapters": [{"name": "mos"}]}, "adapters.0.name", "did you mean moss"),
        ({"prompt": "x", "adapters": [{"name": "big"}]}, "adapters.0.name", "made for sdxl"),
        ({"prompt": "x", "adapters": [{"name": "lcm"}]}, "adapters.0.name", "acceleration adapter"),
        ({"prompt": "x", "adapters": [{"name": "moss"}, {"name": "moss"}]}, "adapters.1.name", "twice"),
        ({"prompt": "x", "adapters": [{"name": "moss", "weight": 11}]}, "adapters.0.weight", "less than or equal"),
        ({"prompt": "x", "width": 130}, "width", "multiple of 8"),
        ({"prompt": "x", "width": 512}, "width", "renders 64..256"),
        ({"prompt": "x", "width": 136}, "width", "in steps of 32"),
        ({"prompt": "x", "height": 32}, "height", "renders 64..256"),
        ({"prompt": "x", "width": "128"}, "width", "valid integer"),
        ({"prompt": "x", "steps": 0}, "steps", "greater than"),
        ({"prompt": "x", "steps": 101}, "steps", "less than"),
        ({"prompt": "x", "steps": True}, "steps", "valid integer"),
        ({"prompt": "x", "guidance_scale": -1}, "guidance_scale", "greater than"),
        ({"prompt": "x", "guidance_scale": float("nan")}, "guidance_scale", "finite"),
        ({"prompt": "x", "seed": -1}, "seed", "greater than"),
        ({"prompt": "x", "seed": 2**53}, "seed", "less than"),
        ({"prompt": "x", "seed": 2**53 - 1, "count": 2}, "seed", "seed + count"),
        ({"prompt": "x", "count": 0}, "count", "greater than"),
        ({"prompt": "x", "priority": 101}, "priority", "less than"),
        ({"prompt": "x", "scheduler": "euler"}, "scheduler", "needs scheduler lcm"),
        ({"prompt": "x", "labels": {"a": 1}}, "labels.a", "string"),
        ({"prompt": "x", "run_at": "2026-01-01T00:00:00"}, "run_at", "timezone"),
        (b"{", "", "not valid JSON"),
        (b"[1]", "", "a JSON object"),
        (5, "", "a JSON object"),
        (b'{"prompt": "x", "prompt": "y"}', "", '"prompt" stands twice'),
        (b'{"prompt": "x", "steps": NaN}', "", "not valid JSON"),
    ],
)
def test_bad_input_is_refused_with_its_field(plain: Settings, row: Any, field: str, words: str) -> None:
    problems = refused(plain, row)
    assert problems[0]["line"] == 1
    assert any(p["field"] == field and words.lower() in p["problem"].lower() for p in problems), problems


def test_bad_defaults_are_named_as_such(plain: Settings) -> None:
    assert refused(plain, {"prompt": "x"}, steps="four")[0]["field"] == "defaults.steps"
    assert refused(plain, {"prompt": "x"}, seed=1)[0]["field"] == "defaults.seed"


def test_the_first_hundred_bad_lines_are_reported(plain: Settings) -> None:
    rows = [b"{}"] * 250
    with pytest.raises(InvalidRequest) as caught:
        submission.prepare(rows, defaults={}, catalogue=catalogue(), settings=plain, name="n", now=NOW)
    assert [problem["line"] for problem in caught.value.problems] == list(range(1, 101))


def test_too_many_jobs_and_none_at_all(plain: Settings) -> None:
    small = plain.model_copy(update={"max_batch_jobs": 3})
    row = {"prompt": "x", "count": 4}
    with pytest.raises(TooLarge, match="at most 3"):
        submission.prepare([row], defaults={}, catalogue=catalogue(), settings=small, name="n", now=NOW)
    with pytest.raises(InvalidRequest, match="no job"):
        submission.prepare([b"  \n"], defaults={}, catalogue=catalogue(), settings=plain, name="n", now=NOW)


def test_dry_run_counts_jobs_lanes_and_pipelines(plain: Settings) -> None:
    rows = [
        {"prompt": "x", "count": 4},
        {"prompt": "y", "adapters": [{"name": "moss", "weight": 0.5}], "negative_prompt": "rain"},
        {"prompt": "z", "steps": 8, "acceleration": "none"},
    ]
    with submission.prepare(rows, defaults={}, catalogue=catalogue(), settings=plain, name="n", now=NOW) as prepared:
        dry = prepared.dry_run()
    assert (dry.jobs, dry.lanes, dry.pipelines) == (6, 2, 3)
    assert dry.warnings == ["negative_prompt has no effect at guidance_scale 1 or less"]


def test_what_is_cut_off_is_said(plain: Settings) -> None:
    counted = replace(catalogue(), tokens=lambda _, prompt: len(prompt.encode()))
    long = {"prompt": "\N{GRINNING FACE}" * 19, "negative_prompt": "\N{GRINNING FACE}" * 19, "guidance_scale": 2.0}
    short = {"prompt": "\N{GRINNING FACE}" * 18, "negative_prompt": "x" * 75, "guidance_scale": 2.0}
    for row, words in (
        (long, ["negative_prompt is longer than 77 tokens", "prompt is longer than 77 tokens"]),
        ({**long, "guidance_scale": 1.0}, ["negative_prompt has no effect", "prompt is longer than 77 tokens"]),
        (short, []),
    ):
        with submission.prepare([row], defaults={}, catalogue=counted, settings=plain, name="n", now=NOW) as prepared:
            found = prepared.dry_run().warnings
        assert [text.startswith(start) for text, start in zip(found, words, strict=True)] == [True] * len(words)


def test_nobody_gets_ahead_by_a_moment_that_is_past(plain: Settings) -> None:
    rows = [{"prompt": "x", "run_at": "1999-01-01T00:00:00Z"}, {"prompt": "x", "run_at": "2026-01-01T01:00:00+01:00"}]
    with submission.prepare(rows, defaults={}, catalogue=catalogue(), settings=plain, name="n", now=NOW) as prepared:
        assert [segment.head_run_at for segment in prepared.segments.values()] == [NOW]


def test_count_makes_jobs_with_rising_seeds(queue: Queue) -> None:
    batch = queue.submit([{"prompt": "x", "seed": 41, "count": 4}])
    assert batch.total == 4
    claimed = queue.claim()
    assert claimed is not None
    assert [job.recipe.seed for job in claimed.jobs] == [41, 42, 43, 44]


def test_profile_gives_the_defaults(queue: Queue) -> None:
    queue.submit([{"prompt": "x"}])
    claimed = queue.claim()
    assert claimed is not None
    recipe = claimed.jobs[0].recipe
    assert (recipe.width, recipe.steps, recipe.guidance_scale, recipe.scheduler) == (128, 4, 1.0, "lcm")
    assert recipe.acceleration is not None
    assert recipe.acceleration.hash == "b" * 64


def test_a_picture_is_a_png_unless_its_job_says_otherwise(queue: Queue) -> None:
    """Recipes of PNGs are as they were before there was a choice, and what a file is called tells no lanes apart."""
    told: list[dict[str, Any]] = [{}, {"format": "png"}, {"format": "webp"}, {"format": "jpeg"}, {"quality": 70}]
    told[-1]["format"] = "jpeg"
    motion = {"motion": "wind", "frames": 2, "width": 128}
    queue.submit([{"prompt": "x", "seed": 1, **one} for one in told])
    queue.submit([{"prompt": "x", "seed": 1, **motion, **one} for one in ({}, {"format": "webp"})])
    stills, moving = queue.claim(), queue.claim()
    assert stills is not None
    assert moving is not None
    recipes = [job.recipe for job in stills.jobs]
    assert [(one.format, one.quality) for one in recipes] == [
        (None, None), (None, None), ("webp", None), ("jpeg", 90), ("jpeg", 70),
    ]  # fmt: skip
    assert recipes[0].hash == recipes[1].hash
    assert "format" not in recipes[0].canonical().decode()
    assert (len({one.hash for one in recipes}), len({one.lane for one in recipes})) == (4, 1)
    assert len({job.recipe.hash for job in moving.jobs}) == 1
    assert {job.recipe.kind.suffix for job in moving.jobs} == {"webp"}


class Slow(BytesIO):
    """A spool on a disk that takes its time."""

    def read(self, size: int | None = -1) -> bytes:
        time.sleep(0.4)
        return super().read(size)


def test_a_large_copy_has_more_time_than_other_statements(database: Database) -> None:
    """Or a million jobs would be refused after half a minute whenever the disk is busy."""
    rows = Slow(b"0\n" * submitting.COPY_FLOOR)
    with database.transaction() as conn:
        conn.execute(text("CREATE TEMPORARY TABLE numbers (number int)"))
        conn.execute(text("SET LOCAL statement_timeout = 300"))
        submitting.copy(conn, "COPY numbers FROM STDIN", rows)
        assert conn.execute(text("SELECT count(*) FROM numbers")).scalar_one() == submitting.COPY_FLOOR


def test_a_lock_that_is_held_too_long_is_an_outage(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs go in by COPY, whose errors are the driver's own."""
    monkeypatch.setattr(db, "LOCK_TIMEOUT_MS", 50)
    impatient = Queue(Database(queue.settings), queue.settings)
    try:
        with queue.database.transaction() as conn:
            conn.execute(text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))
            with pytest.raises(Unavailable, match="lock timeout"):
                impatient.submit(1)
        assert impatient.submit(1).total == 1
    finally:
        impatient.database.dispose()
